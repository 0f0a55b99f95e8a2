"""SparseGPT and the ablations of the Wanda paper: the weights that stay make good for those that go."""

import torch
from torch import Tensor

from pipeline.pruning import obs, scores
from pipeline.pruning.method import PruneMethod
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError
from pipeline.sparsity.patterns import NofM


class Obs(PruneMethod):
    """Column by column, each error pushed on to the later columns (Frantar & Alistarh 2023, algorithm 1).

    The mask of a block of columns is chosen from its updated weights, by `obs_score`. Matrices with the same inputs
    share Hessian and factor, and their rows one column loop; the loop's rows are shared out over the ranks.
    """

    whole_matrix = True

    def observe(self, input_NI: Tensor) -> Tensor:
        return obs.hessian(input_NI)

    def obs_score(self, weight_RB: Tensor, diagonal_B: Tensor, square_sum_B: Tensor) -> Tensor:
        """The importance of updated weights: `diagonal_B` is the factor's, `square_sum_B` the Hessian's."""
        return weight_RB**2 / diagonal_B**2

    def masks_first(self, weights: dict[str, Tensor], square_sum_I: Tensor) -> dict[str, Tensor] | None:
        """The masks, where the method chooses them before any update."""
        return None

    def prune(self, weights: dict[str, Tensor], total: Tensor) -> dict[str, Tensor]:
        names = list(weights)
        pattern = self.patterns[names[0]]
        if any(self.patterns[name] != pattern for name in names):  # one column loop needs one pattern
            return {k: v for name in names for k, v in self.prune({name: weights[name]}, total).items()}
        hessian_II = obs.unpacked(total.float(), weights[names[0]].shape[1])
        square_sum_I = hessian_II.diagonal().clone()
        first = self.masks_first(weights, square_sum_I)
        factor_II, dead_I = obs.factor(hessian_II, self.settings.damp, names[0], processes.say)
        stacked_RI = torch.cat([weights[name].float() for name in names])
        stacked_RI[:, dead_I] = 0
        lengths = [len(weights[name]) for name in names]
        # A product's rounding depends on its shape on a GPU: there all have the same, on any number of ranks
        tile = obs.ROW_TILE if stacked_RI.is_cuda else None
        mine = processes.share_of(len(stacked_RI), tile or 1)

        def score(weight_RB: Tensor, columns: slice) -> Tensor:
            return self.obs_score(weight_RB, factor_II.diagonal()[columns], square_sum_I[columns])

        def choose(weight_RB: Tensor, columns: slice) -> Tensor:
            """A threshold over all rows of each matrix, so the ranks bring their rows' scores together."""
            score_RB = processes.gather_rows(score(weight_RB, columns))
            return torch.cat([pattern.select(part, self.whole_matrix) for part in score_RB.split(lengths)])[mine]

        def look_up(weight_RB: Tensor, columns: slice) -> Tensor:
            return mask_RI[mine, columns]

        if first is not None:
            mask_RI = torch.cat([first[name] for name in names])
        by_block = look_up if first is not None else None if isinstance(pattern, NofM) else choose
        rows_RI = stacked_RI[mine].clone()
        n_of_m = pattern if isinstance(pattern, NofM) else None
        kept_RI = obs.prune_rows(rows_RI, factor_II, by_block, score, n_of_m, tile)
        pruned_RI, kept_RI = processes.gather_rows(rows_RI), processes.gather_rows(kept_RI)
        for name, part_OI in zip(names, pruned_RI.split(lengths)):
            if not part_OI.isfinite().all():
                more = max(10 * self.settings.damp, 0.01)
                raise UserError(
                    f"the updates of {name} overflow: set prune.damp={more:g}, unless its weights are damaged"
                )
            weights[name].copy_(part_OI)
        return dict(zip(names, kept_RI.split(lengths)))


class SparseGpt(Obs):
    """Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot"."""


class _ByMagnitude:
    def obs_score(self, weight_RB: Tensor, diagonal_B: Tensor, square_sum_B: Tensor) -> Tensor:
        return weight_RB.abs()


class _ByWanda:
    def obs_score(self, weight_RB: Tensor, diagonal_B: Tensor, square_sum_B: Tensor) -> Tensor:
        return weight_RB.abs() * square_sum_B.sqrt()


class MagnitudeIter(_ByMagnitude, Obs):
    """Ablations of the Wanda paper (section 5): the score of one method, the update of the other. `iter`: the mask block
    by block from updated weights; `seq`: the whole mask first."""


class WandaIter(_ByWanda, Obs):
    """See `MagnitudeIter`."""


class MagnitudeSeq(Obs):
    """See `MagnitudeIter`."""

    def masks_first(self, weights: dict[str, Tensor], square_sum_I: Tensor) -> dict[str, Tensor]:
        return {name: self.patterns[name].select(scores.magnitude(w), True) for name, w in weights.items()}


class WandaSeq(Obs):
    """See `MagnitudeIter`."""

    def masks_first(self, weights: dict[str, Tensor], square_sum_I: Tensor) -> dict[str, Tensor]:
        return {name: self.patterns[name].select(scores.wanda(w, square_sum_I)) for name, w in weights.items()}
