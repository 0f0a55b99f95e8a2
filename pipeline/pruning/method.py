"""What a prune method is: a plain object that says what to observe, how to score, and how the weights change."""

import torch
from torch import Tensor

from pipeline.pruning import scores
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Prune
from pipeline.sparsity import masks
from pipeline.sparsity.patterns import Pattern


class PruneMethod:
    """Sums what `observe` makes of the inputs of a matrix over all tokens and ranks, and prunes by `score`.

    `patterns` gives the pattern of each matrix by its parameter's name; a matrix that it lacks stays dense. A method is a
    subclass with a `score`. In a file of the user's, its attributes `label`, `description` and `citation` say what it is
    called in checks and reports.
    """

    whole_matrix = False  # unstructured: compare over the matrix instead of within each output row

    def __init__(self, settings: Prune, patterns: dict[str, Pattern]) -> None:
        self.settings, self.patterns = settings, patterns

    def observe(self, input_NI: Tensor) -> Tensor:
        """What to sum over the inputs of a matrix; the sum is in float64. Default: the square sum of each feature, (I,)."""
        return scores.square_sum(input_NI)

    def score(self, weight_OI: Tensor, total: Tensor) -> Tensor:
        """The importance of each weight, (O, I), from the weight and the sum of what was observed; the lowest go."""
        raise NotImplementedError

    def select(self, name: str, score_OI: Tensor) -> Tensor:
        """The mask of the weights that stay, (O, I); `UserError` where a pattern of one's own gives something else."""
        mask_OI = self.patterns[name].select(score_OI, self.whole_matrix)
        if mask_OI.dtype != torch.bool or mask_OI.shape != score_OI.shape:
            raise UserError(
                f"{self.patterns[name]}.select gave {mask_OI.dtype} of {tuple(mask_OI.shape)} for {name}: "
                f"it should give torch.bool of {tuple(score_OI.shape)}"
            )
        return mask_OI

    def prune(self, weights: dict[str, Tensor], total: Tensor) -> dict[str, Tensor]:
        """Zeroes in place the weights (O, I) of matrices that share their inputs, and returns their masks."""
        found = {}
        for name, weight_OI in weights.items():
            score_OI = self.score(weight_OI, total)
            if not is_finite(score_OI):
                raise UserError(f"the {type(self).__name__}'s scores of {name} are not finite")
            found[name] = self.select(name, score_OI)
            masks.apply_(weight_OI, found[name])
        return found


def is_finite(tensor: Tensor) -> bool:
    """Without a tensor of as many flags: NaN and infinities show in the extremes."""
    return all(extreme.isfinite().item() for extreme in tensor.aminmax())
