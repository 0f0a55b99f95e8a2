"""The visitor of `run_layerwise` that prunes each block, with any method."""

import time
from collections import defaultdict

import torch
from torch import Tensor

from pipeline import registry
from pipeline.engine.block_files import BlockResult
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
            masks, kept, rows = self._prune(walk, block)
            result = BlockResult(masks, self._log(walk, block, masks, kept, rows))
        self.started = time.perf_counter()
        return result

    def _prune(self, walk: LayerWalk, block: Block) -> tuple[Masks, dict[str, int], list[dict]]:
        """The masks, their numbers of kept weights, and the rows of `matrices.csv`.

        All that is read of the GPU's results is read at the end, at once."""
        block_matrices, patterns = matrices(block, walk.blocks), self.method.patterns
        rows: dict[str, dict] = {}
        undersampled: list[str] = []
        packed: dict[str, Packed] = {}
        kept: dict[str, int] = {}
        with self.method.readings:
            if self.target:
                parts = self.target.observe_in_turn(walk, block, block_matrices, self.method)
            else:
                parts = [(block_matrices, walk.observe(block_matrices, self.method.observe))]
            for part, observed in parts:
                undersampled += self._prune_observed(block, part, observed, rows, packed, kept)
        masks = Masks()
        masks.add_packed(packed)
        if undersampled:
            processes.say(f"  fewer than {FEW_TOKENS} tokens, so pruned by weight alone: {', '.join(undersampled)}")
        if empty := [name for name in masks if not kept[name]]:
            processes.say(f"  no weight is left in {len(empty)} matrices of this layer, such as {empty[0]}")
        for name in patterns.keys() & (block_matrices.keys() - packed.keys()):
            processes.say(f"  stays dense, the calibration text never reaches it: {name}")
        return masks, kept, list(rows.values())

    def _prune_observed(
        self,
        block: Block,
        block_matrices: dict[str, Matrix],
        observed: Observed,
        rows: dict[str, dict],
        packed: dict[str, Packed],
        kept: dict[str, int],
    ) -> list[str]:
        """Prunes the matrices and adds to `rows`, `packed` and `kept`. Returns those whose statistics were not used."""
        undersampled, inputs, readings = [], [], self.method.readings
        for key, members in _by_input(block_matrices, observed, self.method.patterns).items():
            weights = {name: matrix.weight_OI for name, matrix in members.items()}
            total, first = observed.totals.pop(key), next(iter(members.values()))
            if few := first.routed and observed.tokens[key] < FEW_TOKENS:
                undersampled += [f"{name} ({observed.tokens[key]})" for name in members]
                # as if all input features had the same norm
                total = self.method.observe(torch.eye(first.weight_OI.shape[1], device=total.device)).double()
            if self.method.group == "layer" or self.target:
                check_inputs(readings, weights, total)
            if self.target:
                self.target.replace(key, weights, total, self.method)
            inputs.append((weights, total, key, few))
        # such experts have scores on a scale of their own
        self.method.compare_layer([(weights, total) for weights, total, _, few in inputs if not few])
        while inputs:  # a sum is dropped as soon as its matrices are pruned
            weights, total, key, _ = inputs.pop(0)
            sample_NI, dense_NI = observed.samples[key], self.target.samples[key] if self.target else None
            # only now: a weight whose update overflows makes the inputs of later matrices overflow, and is the one to name
            check_inputs(readings, weights, total)
            if self.target:
                dense_OI = {name: self.target.matrices[name].weight_OI for name in weights}
            else:
                dense_OI = {name: weight.clone() for name, weight in weights.items()}
            masks_OI = self.method.prune(weights, total)
            for name, weight_OI in weights.items():
                mask_OI, matrix = masks_OI[name], block_matrices[name]
                pattern = self.method.pattern(name, mask_OI)
                stored = matrix.stored(mask_OI)
                packed[name] = Packed(pack(stored), tuple(stored.shape), str(pattern), matrix.transposed)
                rows[name] = {"layer": block.index, "matrix": name, "sparsity": None, "relative_output_error": None}

                def use(broken: float, left: float, error: float | None = None, name: str = name) -> None:
                    if broken:
                        self._refuse(name, packed[name])
                    kept[name] = int(left)
                    rows[name] |= {"sparsity": 1 - left / packed[name].weights, "relative_output_error": error}

                numbers = [pattern.is_broken(mask_OI), mask_OI.count_nonzero()]
                if len(sample_NI):  # empty for an expert that no token of this rank reached
                    numbers.append(scores.relative_error(sample_NI, dense_OI[name], weight_OI, dense_NI))
                readings.add(numbers, use)
        return undersampled

    def _refuse(self, name: str, packed: Packed) -> None:
        mask = packed.unpack()
        pattern = self.method.pattern(name, mask)
        problem = pattern.violation(mask.T if packed.transposed else mask.flatten(1))
        raise UserError(f"{self._label()} on {name}: {problem}: set another prune.method or prune.sparsity")

    def _label(self) -> str:
        settings = self.method.settings
        return registry.pruned_with({key: getattr(settings, key.partition(".")[2]) for key in registry.PRUNING})

    def _log(self, walk: LayerWalk, block: Block, masks: Masks, kept: dict[str, int], rows: list[dict]) -> dict:
        seconds = time.perf_counter() - self.started
        weights = sum(entry.weights for entry in masks.packed.values())
        sparsity = (weights - sum(kept.values())) / max(1, weights)
        errors = [row["relative_output_error"] for row in rows if row["relative_output_error"] is not None]
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
                "matrices": rows,
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
