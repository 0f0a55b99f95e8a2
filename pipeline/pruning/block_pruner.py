"""The visitor of `run_layerwise` that prunes each block, with any method."""

import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline import registry
from pipeline.engine.block_store import BlockResult
from pipeline.engine.blocks import Block
from pipeline.engine.matrices import Matrix, matrices
from pipeline.engine.observe import Observed
from pipeline.engine.walk import LayerWalk
from pipeline.pruning import scores
from pipeline.pruning.dense_target import DenseTarget
from pipeline.pruning.method import PruneMethod, check_finite
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError
from pipeline.runtime.memory import peak_gib
from pipeline.runtime.readings import Readings
from pipeline.sparsity.masks import Masks
from pipeline.sparsity.packed import Packed, pack

FEW_TOKENS = 32  # an expert with fewer is pruned by its weights alone: its statistics would be noise


@dataclass
class _Pruned:
    """The results of pruning a block."""

    packed: dict[str, Packed] = field(default_factory=dict)  # masks by name, on the device
    kept: dict[str, int] = field(default_factory=dict)  # number of kept weights by name
    rows: list[dict] = field(default_factory=list)  # of `matrices.csv`
    undersampled: list[str] = field(default_factory=list)  # experts whose statistics were not used, with their tokens


class BlockPruner:
    """Prunes a block at each call."""

    def __init__(self, method: PruneMethod) -> None:
        self.method = method
        self.target: DenseTarget | None = None  # with prune.target=dense
        self.started = time.perf_counter()  # a block's seconds include the forwards since the block before

    def __call__(self, walk: LayerWalk, block: Block) -> BlockResult | None:
        """Prunes the block's weights in place, unless an earlier run did. Returns its masks and log entry."""
        result = None
        if not walk.is_finished(block):
            pruned, masks = self._prune(walk, block), Masks()
            masks.add_packed(pruned.packed)
            result = BlockResult(masks, self._log(walk, block, pruned))
        self.started = time.perf_counter()
        return result

    def _prune(self, walk: LayerWalk, block: Block) -> _Pruned:
        """All numbers that are computed on a GPU are read together, at the end."""
        block_matrices = matrices(block, walk.blocks)
        pruned = _Pruned()
        with self.method.readings:
            if self.target:
                parts = self.target.observe_in_turn(walk, block, block_matrices, self.method)
            else:
                parts = [(block_matrices, walk.observe(block_matrices, self.method.observe))]
            for part, observed in parts:
                self._prune_observed(block, part, observed, pruned)
        if pruned.undersampled:
            names = ", ".join(pruned.undersampled)
            processes.say(f"  fewer than {FEW_TOKENS} tokens, so pruned by weight alone: {names}")
        if empty := [name for name in sorted(pruned.kept) if not pruned.kept[name]]:
            processes.say(f"  no weight is left in {len(empty)} matrices of this layer, such as {empty[0]}")
        for name in sorted(self.method.patterns.keys() & (block_matrices.keys() - pruned.packed.keys())):
            processes.say(f"  stays dense, the calibration text never reaches it: {name}")
        return pruned

    def _prune_observed(
        self, block: Block, block_matrices: dict[str, Matrix], observed: Observed, pruned: _Pruned
    ) -> None:
        """Prunes the matrices and adds them to `pruned`."""
        inputs = []
        for key, members in _by_input(block_matrices, observed, self.method.patterns).items():
            weights = {name: matrix.weight_OI for name, matrix in members.items()}
            total, first = observed.totals.pop(key), next(iter(members.values()))
            if few := first.routed and observed.tokens[key] < FEW_TOKENS:
                pruned.undersampled += [f"{name} ({observed.tokens[key]})" for name in members]
                # as if all input features had the same norm
                total = self.method.observe(torch.eye(first.weight_OI.shape[1], device=total.device)).double()
            if self.method.group == "layer" or self.target:
                check_inputs(self.method.readings, weights, total)
            if self.target:
                self.target.replace(key, weights, total, self.method)
            inputs.append((weights, total, key, few))
        # experts with few tokens have scores on a scale of their own
        self.method.compare_layer([(weights, total) for weights, total, _, few in inputs if not few])
        while inputs:  # a sum is dropped as soon as its matrices are pruned
            weights, total, key, _ = inputs.pop(0)
            # only now: a weight whose update overflows makes the inputs of later matrices overflow, and is the one to name
            check_inputs(self.method.readings, weights, total)
            if self.target:
                dense_OI = {name: self.target.matrices[name].weight_OI for name in weights}
            else:
                dense_OI = {name: weight.clone() for name, weight in weights.items()}
            masks_OI = self.method.checked_prune(weights, total)
            sample_NI, dense_NI = observed.samples[key], self.target.samples[key] if self.target else None
            for name, weight_OI in weights.items():
                error = None
                if len(sample_NI):  # empty for an expert that no token of this rank reached
                    error = scores.relative_error(sample_NI, dense_OI[name], weight_OI, dense_NI)
                self._record(block, name, block_matrices[name], masks_OI[name], error, pruned)

    def _record(
        self, block: Block, name: str, matrix: Matrix, mask_OI: Tensor, error: Tensor | None, pruned: _Pruned
    ) -> None:
        """Adds a matrix to `pruned`. Its numbers are filled in when they are read, which raises `UserError` if the mask breaks
        its pattern. `error`: the relative output error, ()."""
        pattern, stored = self.method.pattern(name, mask_OI), matrix.stored(mask_OI)
        packed = Packed(pack(stored), tuple(stored.shape), str(pattern), matrix.transposed)
        row = {"layer": block.index, "matrix": name, "sparsity": None, "relative_output_error": None}
        pruned.packed[name] = packed
        pruned.rows.append(row)

        def use(broken: float, kept: float, relative_error: float | None = None) -> None:
            if broken:
                self._refuse(name, packed)
            pruned.kept[name] = int(kept)
            row.update(sparsity=1 - kept / packed.weights, relative_output_error=relative_error)

        numbers = [pattern.is_broken(mask_OI), mask_OI.count_nonzero()]
        self.method.readings.add(numbers if error is None else [*numbers, error], use)

    def _refuse(self, name: str, packed: Packed) -> None:
        mask = packed.unpack()
        pattern = self.method.pattern(name, mask)
        problem = pattern.violation(mask.T if packed.transposed else mask.flatten(1))
        raise UserError(f"{self._label()} on {name}: {problem}: set another prune.method or prune.sparsity")

    def _label(self) -> str:
        settings = self.method.settings
        return registry.pruned_with({key: getattr(settings, key.partition(".")[2]) for key in registry.PRUNING})

    def _log(self, walk: LayerWalk, block: Block, pruned: _Pruned) -> dict:
        seconds = time.perf_counter() - self.started
        weights = sum(packed.weights for packed in pruned.packed.values())
        sparsity = (weights - sum(pruned.kept.values())) / max(1, weights)
        errors = [row["relative_output_error"] for row in pruned.rows if row["relative_output_error"] is not None]
        error = sum(errors) / max(1, len(errors))
        processes.say(
            f"  layer {block.index + 1}/{len(walk.blocks)}: sparsity {sparsity:.4f}, output error {error:.3f}, {seconds:.1f} s"
        )
        # rank 0's, whichever rank writes it: the errors are of its samples
        return processes.from_main(
            {
                "layer": block.index,
                "seconds": round(seconds, 4),
                "tokens_per_second": round(walk.tokens * processes.world_size() / seconds, 1),
                "sparsity": sparsity,
                "relative_output_error": error,
                "memory_gib": round(peak_gib(walk.device), 3),
                "matrices": pruned.rows,
            }
        )


def _by_input(block_matrices: dict[str, Matrix], observed: Observed, patterns: dict) -> dict[str, dict[str, Matrix]]:
    """The matrices to prune that received tokens, grouped by shared input."""
    groups: dict[str, dict[str, Matrix]] = defaultdict(dict)
    for name, matrix in block_matrices.items():
        if name in patterns and name in observed.shared_input_key:
            groups[observed.shared_input_key[name]][name] = matrix
    return groups


def check_inputs(readings: Readings, weights: dict[str, Tensor], total: Tensor) -> None:
    """Makes `readings` raise `UserError` for damaged weights, and for the sums of damaged inputs."""
    for name, weight in weights.items():
        problem = f"{name} holds weights that are not finite: the files are damaged or the training diverged"
        check_finite(readings, weight, problem)
    half = any(weight.dtype == torch.float16 for weight in weights.values())
    hint = "set dtype=bfloat16 or dtype=float32" if half else "earlier weights are damaged or too large"
    check_finite(readings, total, f"the inputs of {' and '.join(weights)} are not finite: {hint}")
