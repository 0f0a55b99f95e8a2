"""Numbers that are computed on a device and read together: each read of a GPU's number makes the host wait for the GPU."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime import processes


class Readings:
    """Inside `with readings:`, what is added waits until the end, where all numbers are read with one synchronisation and used
    in the order in which they were added. Outside, each is read and used at once.

    A use may raise: then later ones are skipped. After an error inside the `with`, the numbers are used all the same, so that
    damaged weights are reported rather than what failed because of them.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[list[Tensor], Callable[..., Any]]] = []
        self._waits = False

    def add(self, numbers: Iterable[Tensor], use: Callable[..., Any]) -> None:
        """`use` gets a float for each of `numbers`, which are tensors with one element."""
        self._waiting.append((list(numbers), use))
        if not self._waits:
            self._read()

    def __enter__(self) -> "Readings":
        self._waits = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waits = False
        # not after a signal, or the loss of a peer, whose collective the GPU may wait for
        if error is None or (isinstance(error, Exception) and not processes.is_lost_peer(error)):
            self._read()
        self._waiting = []

    def _read(self) -> None:
        waiting, self._waiting = self._waiting, []
        read = iter(to_floats([number for numbers, _ in waiting for number in numbers]))
        for numbers, use in waiting:
            use(*(next(read) for _ in numbers))


def to_floats(numbers: list[Tensor]) -> list[float]:
    """The values of tensors with one element, copied from their device together."""
    places: dict[tuple, list[int]] = defaultdict(list)
    for place, number in enumerate(numbers):
        places[number.device, number.dtype].append(place)
    doubles: dict[torch.device, list[Tensor]] = defaultdict(list)
    order: dict[torch.device, list[int]] = defaultdict(list)
    for (device, _), group in places.items():
        doubles[device].append(torch.stack([numbers[place].detach().reshape(()) for place in group]).double())
        order[device] += group
    found = [0.0] * len(numbers)
    for device, parts in doubles.items():
        for place, value in zip(order[device], torch.cat(parts).cpu().tolist()):
            found[place] = value
    return found
