"""Numbers of a GPU are read together at the end, and the first problem is the one reported."""

import pytest
import torch

from pipeline.pruning.method import check_finite
from pipeline.runtime.errors import UserError
from pipeline.runtime.readings import Readings


def test_numbers_are_used_in_order_at_the_end():
    readings, used = Readings(), []
    with readings:
        readings.add([torch.tensor(True), torch.tensor(2**40)], lambda *numbers: used.append(numbers))
        readings.add([torch.tensor(0.5, dtype=torch.float16)], lambda *numbers: used.append(numbers))
        assert used == []
    assert used == [(1.0, 2.0**40), (0.5,)]
    readings.add([torch.tensor([3])], lambda *numbers: used.append(numbers))  # outside: at once
    assert used[2] == (3.0,)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_the_first_problem_is_reported_also_after_what_it_caused(value):
    readings, damaged = Readings(), torch.ones(4, 4)
    damaged[2, 1] = value
    with pytest.raises(UserError, match="^first is damaged"), readings:
        check_finite(readings, torch.ones(2), "none is damaged")
        check_finite(readings, damaged, "first is damaged")
        check_finite(readings, damaged, "second is damaged")
        raise ArithmeticError("the factorisation failed")
    with pytest.raises(ArithmeticError), readings:  # nothing is left of the first use
        raise ArithmeticError


def test_a_signal_is_not_kept_waiting():
    readings = Readings()
    with pytest.raises(KeyboardInterrupt), readings:
        check_finite(readings, torch.tensor([torch.nan]), "damaged")
        raise KeyboardInterrupt
