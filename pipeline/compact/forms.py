"""Chooses the form of each matrix of a compact model on a GPU: bitmask, semi-structured (2:4 in 16 bits), or dense.

The first matrix of each kind (shape, dtype, share of kept weights, 2:4 or not) is measured in all forms that it can have. A
matrix is held in one form, for prefill too: the fastest for the tokens of a decoding step; dense only if it is faster.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.compact.compact_weight import CompactWeight
from pipeline.compact.gpu_weight import HALVES, TOLERANCE, GpuWeight, SemiStructuredWeight, error_of
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError, one_line

AUTO, BITMASK, SEMI_STRUCTURED, DENSE = "auto", "bitmask", "semi-structured", "dense"
FORMS = (AUTO, BITMASK, SEMI_STRUCTURED, DENSE)
TOKENS = (1, 16, 512)  # that are measured
REPEATS = 9
FLUSH = 512 << 20  # bytes written before each call: more than any cache, and long enough to hide a launch


class Forms:
    """Places matrices on `device`. `form`: `auto` measures; with `semi-structured`, a matrix that cannot have this form is held
    as bitmask. `tokens`: of a decoding step, which is the batch size."""

    def __init__(self, device: torch.device, form: str = AUTO, tokens: int = 1) -> None:
        if form not in FORMS:
            raise UserError(f"form={form} is unknown: set form to one of {', '.join(FORMS)}")
        if tokens < 1:
            raise UserError(f"tokens={tokens}: set it to the batch size of decoding, at least 1")
        self.device, self.form, self.tokens = device, form, tokens
        self._kinds: dict[tuple, dict[str, Any]] = {}

    @property
    def table(self) -> list[dict[str, Any]]:
        """{"shape", "dtype", "pattern", "matrices", "form", "microseconds": {form: {tokens: median}}}; none measured: {}."""
        return list(self._kinds.values())

    def place(self, weight: CompactWeight) -> CompactWeight | Tensor:
        """A matrix in its form on the device; a dense one as the model stores it."""
        found = GpuWeight.from_cpu(weight, self.device)
        two_of_four = found.dtype in HALVES and found.scales is None and not found.experts and found.is_2_of_4()
        share = (len(found.values) - 1) / max(1, found.rows * found.columns)
        rows, dtype = found.rows // max(1, found.experts), str(found.dtype).removeprefix("torch.")
        pattern = f"{round(20 * share) * 5}% kept" + ", 2:4" * two_of_four + ", int8" * (found.scales is not None)
        kind = (rows, found.columns, dtype, pattern)
        if kind not in self._kinds:
            form, times = self._choose(found, two_of_four)
            about = {"shape": f"{rows} x {found.columns}", "dtype": dtype, "pattern": pattern, "matrices": 0}
            self._kinds[kind] = about | {"form": form, "microseconds": times}
            if times:
                processes.say("  " + line(self._kinds[kind]))
        about = self._kinds[kind]
        about["matrices"] += max(1, found.experts)
        if about["form"] == SEMI_STRUCTURED:
            return SemiStructuredWeight(found.matrix(), found.transposed)
        return found.dense().contiguous() if about["form"] == DENSE else found

    def _choose(self, weight: GpuWeight, two_of_four: bool) -> tuple[str, dict[str, dict[int, float]]]:
        if self.form == AUTO:
            times = self._measure(weight[0] if weight.experts else weight, two_of_four)
            return min(times, key=lambda form: times[form][self.tokens]), times  # the first of equals: dense comes last
        if self.form == SEMI_STRUCTURED:
            try:
                two_of_four and SemiStructuredWeight(weight.matrix(), weight.transposed)
            except (RuntimeError, NotImplementedError):
                two_of_four = False
            return SEMI_STRUCTURED if two_of_four else BITMASK, {}
        return self.form, {}

    def _measure(self, weight: GpuWeight, two_of_four: bool) -> dict[str, dict[int, float]]:
        """Median microseconds by form and tokens, of the forms that give right results."""
        dense = weight.matrix()
        linears: dict[str, Callable[[Tensor], Tensor]] = {BITMASK: weight.linear}
        if two_of_four:
            try:
                linears[SEMI_STRUCTURED] = SemiStructuredWeight(dense, False).linear
            except (RuntimeError, NotImplementedError) as error:
                processes.say(f"  no semi-structured form of {tuple(dense.shape)}: {one_line(error)[:200]}")
        linears[DENSE] = lambda x: F.linear(x, dense)
        times: dict[str, dict[int, float]] = {}
        with torch.no_grad():
            flush = torch.empty(FLUSH, dtype=torch.uint8, device=self.device)
            inputs = {
                n: torch.randn(n, weight.columns, device=self.device).to(weight.dtype) for n in {*TOKENS, self.tokens}
            }
            for form, linear in linears.items():
                try:
                    for x in inputs.values():
                        if (error := error_of(linear(x), F.linear(x.double(), dense.double()))) > TOLERANCE.get(
                            x.dtype, 1e-6
                        ):
                            raise RuntimeError(f"its products are wrong by {error:.1g}")
                    times[form] = {n: microseconds(lambda: linear(x), flush) for n, x in sorted(inputs.items())}  # noqa: B023
                except Exception as error:  # of Triton's compiler, cuSPARSELt
                    processes.say(f"  not {form} for {tuple(dense.shape)}: {one_line(error)[:200]}")
            del flush
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what only the measurement needed
        return times


def microseconds(call: Callable[[], object], flush: Tensor, repeats: int = REPEATS) -> float:
    """The median of the GPU's time for a call, with its data not in a cache. The launch is hidden behind the flush."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    call()
    for before, after in events:
        flush.zero_()
        before.record()
        call()
        after.record()
    torch.cuda.synchronize(flush.device)
    return statistics.median(1e3 * before.elapsed_time(after) for before, after in events)


def line(about: dict[str, Any]) -> str:
    """A row of the table in words."""
    times = "; ".join(
        f"{form} {', '.join(f'{value:.0f}' for value in by_tokens.values())}"
        for form, by_tokens in about["microseconds"].items()
    )
    tokens = ", ".join(map(str, next(iter(about["microseconds"].values()), {})))
    measured = f" (µs for {tokens} tokens: {times})" if times else ""
    return f"{about['shape']}, {about['dtype']}, {about['pattern']}: {about['form']}{measured}"
