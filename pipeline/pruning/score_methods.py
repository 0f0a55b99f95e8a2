"""The methods that only zero weights, by a score; the formulas are in scores.py."""

from torch import Tensor

from pipeline.pruning import scores
from pipeline.pruning.method import PruneMethod
from pipeline.sparsity.patterns import Unstructured


class Magnitude(PruneMethod):
    """|W| (Han et al. 2015); unstructured: compared over the whole matrix."""

    whole_matrix = True

    def score(self, weight_OI: Tensor, total: Tensor) -> Tensor:
        return scores.magnitude(weight_OI)


class Wanda(PruneMethod):
    """|W| times input norm (Sun et al. 2023), compared within each output row."""

    def score(self, weight_OI: Tensor, total: Tensor) -> Tensor:
        return scores.wanda(weight_OI, total)


class WandaVariant(Wanda):
    """Wanda, but each row loses an equal share of its score instead of an equal number of weights. N of M: as Wanda."""

    def select(self, name: str, score_OI: Tensor) -> Tensor:
        pattern = self.patterns[name]
        if isinstance(pattern, Unstructured):
            return scores.select_variant(score_OI, pattern.ratio)
        return super().select(name, score_OI)


class Ria(PruneMethod):
    """Relative importance and activations (Zhang et al. 2024); unstructured: compared over the whole matrix."""

    whole_matrix = True

    def score(self, weight_OI: Tensor, total: Tensor) -> Tensor:
        return scores.ria(weight_OI, total)
