"""How calibration samples are divided."""

import pytest
import torch

from pipeline.pruning import calibration


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_batches_are_the_same_for_any_number_of_processes(world_size):
    samples = torch.arange(22).view(11, 2)
    expected = list(samples.split(3))
    shares = [calibration.split(samples, 3, rank, world_size) for rank in range(world_size)]
    found = [shares[i % world_size][i // world_size] for i in range(len(expected))]
    assert sum(map(len, shares)) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
