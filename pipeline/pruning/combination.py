"""Combines a prune method with a refinement of its mask and an update of the kept weights.

`prune_method` returns the method or combination that a recipe chose. Shapes: O = out_features, I = in_features, R = rows of all
matrices with the same inputs.
"""

import torch
from torch import Tensor

from pipeline.pruning import obs
from pipeline.pruning.method import PruneMethod, check_finite, stacked
from pipeline.pruning.refinements import Refinement
from pipeline.pruning.statistics import GRAM, OBSERVE, Statistics, Sums
from pipeline.pruning.updates import WeightUpdate, store_
from pipeline.registry import NONE, PRUNE_METHODS, REFINEMENTS, UPDATES
from pipeline.registry.entry import is_file
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError, did_you_mean
from pipeline.runtime.user_code import check_returned, unchanged
from pipeline.settings.schema import Prune
from pipeline.sparsity import masks
from pipeline.sparsity.patterns import Pattern


def prune_method(settings: Prune, patterns: dict[str, Pattern]) -> PruneMethod:
    """`prune.method` with `prune.refine` and `prune.update`. Some methods, such as dsnot, are names for a combination."""
    entry = PRUNE_METHODS.entry(settings.method)
    method = entry.load()(settings, patterns)
    refine, update = entry.refine or settings.refine, entry.update or settings.update
    if (refine, update) == (NONE, NONE):
        return method
    return Combination(
        method,
        None if refine == NONE else REFINEMENTS.entry(refine).load()(settings),
        None if update == NONE else UPDATES.entry(update).load()(settings),
    )


class Combination(PruneMethod):
    """Prunes with `method`, then refines the masks, then updates the kept weights; one of the last two may be left out."""

    def __init__(self, method: PruneMethod, refinement: Refinement | None, update: WeightUpdate | None) -> None:
        super().__init__(method.settings, method.patterns)
        self.group = method.group
        self.method, self.refinement, self.weight_update = method, refinement, update
        if refinement:
            for pattern in method.patterns.values():
                refinement.check(pattern)
        self.readings = method.readings
        self.copies = 1 + max(method.copies, 3)  # the dense rows, then the pruned, the updated and the gathered ones
        # a method with a custom `observe`: its sum is put in front of the others
        self.is_custom = type(method).observe is not PruneMethod.observe
        self.custom_shapes: dict[int, torch.Size] = {}  # by the number of inputs
        needs = {*(refinement.needs if refinement else ()), *((GRAM,) if update else ())}
        if unknown := sorted(needs - OBSERVE.keys()):
            raise UserError(
                f"{type(refinement).__name__}.needs names '{unknown[0]}'{did_you_mean(unknown[0], list(OBSERVE))}"
            )
        self.sums = Sums(needs if self.is_custom else needs | {method.statistic})

    def observe(self, input_NI: Tensor) -> Tensor:
        sums = self.sums.observe(input_NI)
        if not self.is_custom:
            return sums
        custom = self.method.observe(input_NI)
        self.custom_shapes[input_NI.shape[1]] = custom.shape
        return torch.cat([custom.flatten(), sums])

    def prune(self, weights: dict[str, Tensor], total: Tensor) -> dict[str, Tensor]:
        statistics, method_total = self._read(weights, total)
        all_dense_RI, lengths = stacked(weights), [len(weight_OI) for weight_OI in weights.values()]
        dense = dict(zip(weights, all_dense_RI.split(lengths)))
        chosen = self.method.checked_prune(weights, method_total)
        if self.refinement:
            for name, weight_OI in weights.items():
                chosen[name] = self._refine(name, dense[name], weight_OI, chosen[name], statistics)
        if self.weight_update:
            self._update(weights, all_dense_RI, chosen, statistics.gram_II)
        return chosen

    def compare_layer(self, inputs: list[tuple[dict[str, Tensor], Tensor]]) -> None:
        self.method.compare_layer([(weights, self._read(weights, total)[1]) for weights, total in inputs])

    def gram(self, weights: dict[str, Tensor], total: Tensor) -> Tensor:
        statistics, method_total = self._read(weights, total)
        return self.method.gram(weights, method_total) if statistics.gram_II is None else statistics.gram_II

    def _read(self, weights: dict[str, Tensor], total: Tensor) -> tuple[Statistics, Tensor]:
        """The statistics for the refinement and the update, and the total for the method."""
        inputs = next(iter(weights.values())).shape[1]
        if self.is_custom:
            shape = self.custom_shapes[inputs]
            custom, sums = total.tensor_split([shape.numel()])
            return self.sums.read(sums, inputs), custom.view(shape)
        statistics = self.sums.read(total, inputs)
        return statistics, statistics.raw.get(self.method.statistic, statistics.square_sum_I)

    def _refine(
        self, name: str, dense_OI: Tensor, weight_OI: Tensor, mask_OI: Tensor, statistics: Statistics
    ) -> Tensor:
        """The refined mask, (O, I). Changes `weight_OI` accordingly, in place."""
        rows = processes.share_of(len(weight_OI), obs.row_tile(weight_OI) or 1)
        dense_RI, weight_RI, mask_RI = dense_OI[rows], weight_OI[rows].float(), mask_OI[rows]
        who = f"{type(self.refinement).__name__}.refine"
        sums = {key: value for key, value in vars(statistics).items() if isinstance(value, Tensor)}
        with unchanged(who, dense_RI=dense_RI, weight_RI=weight_RI, mask_RI=mask_RI, **sums):
            refined_RI = self.refinement.refine(dense_RI, weight_RI, mask_RI, statistics, self.patterns[name])
        check_returned(who, refined_RI, mask_RI.shape, torch.bool, name)
        refined_OI = processes.gather_rows(refined_RI)
        if not torch.equal(refined_OI.sum(1), mask_OI.sum(1)):
            raise UserError(
                f"{who} returned another number of kept weights in a row of {name}: return as many as in the mask that it got"
            )
        weight_OI.copy_(torch.where(refined_OI & ~mask_OI, dense_OI.to(weight_OI.dtype), weight_OI))
        masks.apply_(weight_OI, refined_OI)
        return refined_OI

    def _update(self, weights: dict[str, Tensor], dense_RI: Tensor, chosen: dict[str, Tensor], gram_II: Tensor) -> None:
        """Updates all matrices with the same inputs together, so that the update factorises their Gram matrix once."""
        weight_RI, mask_RI = stacked(weights), torch.cat([chosen[name] for name in weights])
        rows = processes.share_of(len(dense_RI), obs.row_tile(dense_RI) or 1)
        local = (dense_RI[rows], weight_RI[rows], mask_RI[rows])
        updated = self.weight_update.update(*local, gram_II, next(iter(weights)))
        who = f"{type(self.weight_update).__name__}.update"
        check_returned(who, updated, local[1].shape, torch.float32)
        parts = processes.gather_rows(updated).split([len(weight_OI) for weight_OI in weights.values()])
        for (name, weight_OI), part_OI in zip(weights.items(), parts):
            updated_OI = part_OI.masked_fill(~chosen[name], 0)  # a pruned weight may have any value
            if is_file(self.settings.update):
                check_finite(self.readings, updated_OI, f"{who} returned weights of {name} that are not finite")
            store_(weight_OI, updated_OI, name, self.settings.damp, self.readings)
            masks.apply_(weight_OI, chosen[name])
