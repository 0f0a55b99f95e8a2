"""The updates of `prune.update`: new values of the kept weights, for a fixed mask.

They reduce the output error of each row, (w - w') G (w - w')^T. G is the Gram matrix of the inputs, damped by `prune.damp`
times its mean diagonal; ADMM, which scales the inputs to norm 1 as in its paper, damps each element of the diagonal. OBS alone
can also raise the error: it compensates in columns that the mask prunes later. Shapes: R = rows (output features),
I = in_features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.pruning import obs, obs_kernel
from pipeline.pruning.method import check_finite
from pipeline.runtime import processes
from pipeline.runtime.readings import Readings
from pipeline.settings.schema import Prune

CONVERGED = 1e-7  # `LeastSquares` stops for a row at this share of the initial residual norm
CHECK_EVERY = 4  # steps on a GPU between checks whether all rows have stopped: each check waits for the GPU


class WeightUpdate:
    """A subclass implements `update`. Rows are independent and are divided among the ranks. A subclass in a user's file may set
    `label`, `description` and `citation` for checks and reports."""

    def __init__(self, settings: Prune) -> None:
        self.settings = settings

    def update(self, dense_RI: Tensor, weight_RI: Tensor, mask_RI: Tensor, gram_II: Tensor, name: str) -> Tensor:
        """The new weights, (R, I) in fp32; those outside the mask are ignored. `weight_RI`: the current pruned weights.
        `gram_II` (fp32) may be modified. `name`: a matrix name for messages."""
        raise NotImplementedError


class ObsUpdate(WeightUpdate):
    """Column by column; later columns compensate each error (Frantar & Alistarh 2023, algorithm 1)."""

    def update(self, dense_RI: Tensor, weight_RI: Tensor, mask_RI: Tensor, gram_II: Tensor, name: str) -> Tensor:
        factor_II, dead_I = obs.factor(gram_II, self.settings.damp, name, processes.say)
        rows_RI = dense_RI.masked_fill(dead_I, 0)
        kernel, tile = obs_kernel.load(rows_RI.device), obs.row_tile(rows_RI)
        obs.prune_rows(
            rows_RI, factor_II, lambda weight_RB, columns: mask_RI[:, columns], tile=tile, prune_block=kernel
        )
        return rows_RI


class Admm(WeightUpdate):
    """Alternates between least squares and the mask, `prune.update_steps` times (Boža 2024, section 3; its rho = 1)."""

    def update(self, dense_RI: Tensor, weight_RI: Tensor, mask_RI: Tensor, gram_II: Tensor, name: str) -> Tensor:
        norm_I = gram_II.diagonal().sqrt()
        norm_I = norm_I.masked_fill(norm_I == 0, 1)  # dead inputs, whose weights do not change
        gram_II.div_(norm_I).div_(norm_I[:, None])
        gram_II.diagonal().add_(self.settings.damp * gram_II.diagonal().mean())
        inverse_II = gram_II.clone()
        inverse_II.diagonal().add_(1)
        inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(inverse_II))  # all eigenvalues are at least 1

        def update_rows(dense_RI: Tensor, weight_RI: Tensor, mask_RI: Tensor) -> Tensor:
            target_RI = (dense_RI * norm_I) @ gram_II
            free_RI, dual_RI = weight_RI * norm_I, torch.zeros_like(weight_RI)
            for _ in range(self.settings.update_steps):
                masked_RI = (free_RI + dual_RI) * mask_RI
                dual_RI += free_RI - masked_RI
                free_RI = (target_RI + masked_RI - dual_RI) @ inverse_II
            return (free_RI + dual_RI) / norm_I

        return _in_tiles(update_rows, dense_RI, weight_RI, mask_RI)


class LeastSquares(WeightUpdate):
    """The kept weights with the smallest output error, by at most `prune.update_steps` conjugate gradient steps for all rows.

    Preconditioned by the diagonal. Starts from the current weights; each step reduces the damped error.
    """

    def update(self, dense_RI: Tensor, weight_RI: Tensor, mask_RI: Tensor, gram_II: Tensor, name: str) -> Tensor:
        dead_I = gram_II.diagonal() == 0
        gram_II.diagonal().add_(self.settings.damp * gram_II.diagonal().mean())
        gram_II.diagonal()[dead_I] = 1  # the rest of the row and column is zero, so the solution is the dense weight
        inverse_I = gram_II.diagonal().reciprocal()

        def update_rows(dense_RI: Tensor, weight_RI: Tensor, mask_RI: Tensor) -> Tensor:
            weight_RI = weight_RI * mask_RI
            residual_RI = ((dense_RI - weight_RI) @ gram_II).mul_(mask_RI)
            scaled_RI = residual_RI * inverse_I
            direction_RI = scaled_RI.clone()
            size_R1 = first_R1 = (residual_RI * scaled_RI).sum(1, keepdim=True)
            every = CHECK_EVERY if weight_RI.is_cuda else 1
            for number in range(1, self.settings.update_steps + 1):
                product_RI = (direction_RI @ gram_II).mul_(mask_RI)
                curvature_R1 = (direction_RI * product_RI).sum(1, keepdim=True)
                moves_R1 = (size_R1 > CONVERGED**2 * first_R1) & (curvature_R1 > 0)
                if number % every == 0 and not moves_R1.any():
                    break
                step_R1 = torch.where(moves_R1, size_R1 / curvature_R1, 0)
                weight_RI.addcmul_(step_R1, direction_RI)
                residual_RI.addcmul_(step_R1, product_RI, value=-1)
                scaled_RI = residual_RI * inverse_I
                before_R1, size_R1 = size_R1, (residual_RI * scaled_RI).sum(1, keepdim=True)
                direction_RI = torch.addcmul(scaled_RI, torch.where(moves_R1, size_R1 / before_R1, 0), direction_RI)
            return weight_RI

        return _in_tiles(update_rows, dense_RI, weight_RI, mask_RI)


def _in_tiles(update_rows: Callable[..., Tensor], *rows_RI: Tensor) -> Tensor:
    """`update_rows` of each few rows of the tensors: what it computes with stays small, and in a CPU's cache; on a GPU a row's
    result does not depend on the rows of other ranks."""
    tiles = zip(*(part.split(obs.ROW_TILE) for part in rows_RI))
    return torch.cat([update_rows(*tile) for tile in tiles])


def store_(weight_OI: Tensor, updated_OI: Tensor, name: str, damp: float, readings: Readings) -> None:
    """Puts updated fp32 weights into the model's own, which may be float16. `readings` raises `UserError` if they overflow
    there."""
    weight_OI.copy_(updated_OI)
    more = f"prune.damp={min(max(10 * damp, 0.01), 10):g}"
    more += " or dtype=bfloat16" if weight_OI.dtype == torch.float16 else ""
    check_finite(readings, weight_OI, f"the updates of {name} overflow: set {more}, unless its weights are damaged")
