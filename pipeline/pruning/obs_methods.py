"""SparseGPT and the ablations of the Wanda paper: the kept weights are updated to compensate for the pruned ones."""

import torch
from torch import Tensor

from pipeline.pruning import gram, obs, obs_kernel
from pipeline.pruning.method import PruneMethod, stacked
from pipeline.pruning.statistics import GRAM
from pipeline.pruning.updates import store_
from pipeline.runtime import processes
from pipeline.sparsity.patterns import NofM


class SparseGpt(PruneMethod):
    """Prunes column by column and compensates each error in the later columns (Frantar & Alistarh 2023, "SparseGPT: Massive
    Language Models Can Be Accurately Pruned in One-Shot", algorithm 1).

    The mask of a block of columns is chosen from its updated weights, by `obs_score`. Matrices with the same inputs share the
    Gram matrix, its factor and one column loop, whose rows are split over the ranks.
    """

    statistic = GRAM
    copies = 3
    whole_matrix = True

    def obs_score(self, diagonal_I: Tensor, square_sum_I: Tensor) -> obs.Score:
        """The importance of updated weights. `diagonal_I`: of the factor; `square_sum_I`: the Gram matrix's diagonal."""
        return obs.Score(diagonal_I**2, squared=True)

    def prune(self, weights: dict[str, Tensor], total: Tensor) -> dict[str, Tensor]:
        names = list(weights)
        pattern = self.patterns[names[0]]
        if any(self.patterns[name] != pattern for name in names):  # one column loop needs one pattern
            return {name: self.prune({name: weights[name]}, total)[name] for name in names}
        gram_II = gram.unpacked(total, weights[names[0]].shape[1])
        square_sum_I = gram_II.diagonal().clone()
        factor_II, dead_I = obs.factor(gram_II, self.settings.damp, names[0], processes.say)
        stacked_RI = stacked(weights)
        stacked_RI.masked_fill_(dead_I, 0)
        lengths = [len(weights[name]) for name in names]
        tile = obs.row_tile(stacked_RI)
        rows = processes.share_of(len(stacked_RI), tile or 1)
        score = self.obs_score(factor_II.diagonal(), square_sum_I)

        def choose(weight_RB: Tensor, columns: slice) -> Tensor:
            """The threshold is over all rows of a matrix, so the ranks gather their rows' scores."""
            score_RB = processes.gather_rows(score[columns].of(weight_RB))
            parts = dict(zip(names, score_RB.split(lengths)))
            return torch.cat([self.select_among(name, part) for name, part in parts.items()])[rows]

        n_of_m = pattern if isinstance(pattern, NofM) else None
        rows_RI = stacked_RI[rows].clone()
        kernel = obs_kernel.load(rows_RI.device)
        kept_RI = obs.prune_rows(rows_RI, factor_II, None if n_of_m else choose, score, n_of_m, tile, kernel)
        pruned_RI, kept_RI = processes.gather_rows(rows_RI), processes.gather_rows(kept_RI)
        for name, part_OI in zip(names, pruned_RI.split(lengths)):
            store_(weights[name], part_OI, name, self.settings.damp, self.readings)
        return dict(zip(names, kept_RI.split(lengths)))


class MagnitudeIter(SparseGpt):
    """Ablation of the Wanda paper (section 5): magnitude's score in SparseGPT's blocks of columns, from updated weights."""

    def obs_score(self, diagonal_I: Tensor, square_sum_I: Tensor) -> obs.Score:
        return obs.Score(torch.ones_like(square_sum_I))


class WandaIter(SparseGpt):
    """Ablation of the Wanda paper (section 5): Wanda's score in SparseGPT's blocks of columns, from updated weights."""

    def obs_score(self, diagonal_I: Tensor, square_sum_I: Tensor) -> obs.Score:
        return obs.Score(square_sum_I.sqrt())
