"""`prune.target=dense`: pruned matrices reproduce the outputs of the dense model from the inputs in the pruned model.

Published for quantisation as asymmetric calibration (Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for
Asymmetric Calibration"). Before a matrix is pruned, the best unpruned weights for this aim take the place of its dense ones;
scores, refinements and updates run unchanged. Shapes: O = out_features, I = in_features, N = tokens.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipeline.engine.blocks import Block
from pipeline.engine.layerwise import LayerwiseForwards
from pipeline.engine.matrices import Matrix, matrices
from pipeline.engine.observe import InputObserver, Observed
from pipeline.engine.walk import LayerWalk
from pipeline.pruning.method import PruneMethod
from pipeline.pruning.updates import store_
from pipeline.runtime.errors import UserError


def packed_with_difference(observed: Tensor, dense_NI: Tensor, input_NI: Tensor) -> Tensor:
    """(D - X)^T X in fp32, then `observed`, flat, because `LayerWalk.observe` sums one tensor per matrix. The sum is not of
    D^T X: so it is exactly zero where the inputs are equal, and precise where they nearly are."""
    fp32_NI = input_NI.float()
    return torch.cat([((dense_NI.float() - fp32_NI).T @ fp32_NI).flatten(), observed.flatten()])


def solve(weight_OI: Tensor, difference_II: Tensor, gram_II: Tensor, damp: float, name: str) -> Tensor:
    """The V that minimises ||D W^T - X V^T||^2 + damping ||V - W||^2: W + W (D - X)^T X (X^T X + damping)^-1, in float64.

    The damping is `damp` times the mean diagonal of `gram_II`, X^T X. The weights of inputs that are always zero do not change.
    Raises `UserError` if the sum is singular.
    """
    gram_II = gram_II.double()
    damping_I = (damp * gram_II.diagonal().mean()).expand(len(gram_II))
    gram_II.diagonal().add_(torch.where(gram_II.diagonal() == 0, 1, damping_I))
    lower_II, failed = torch.linalg.cholesky_ex(gram_II)
    if failed:
        raise UserError(
            f"{name}: the Gram matrix is singular at prune.damp={damp:g}: set prune.damp={max(10 * damp, 0.01):g}"
        )
    weight_OI = weight_OI.double()
    return weight_OI + torch.cholesky_solve((weight_OI @ difference_II.double()).T, lower_II).T


class DenseTarget:
    """Runs the forwards of the dense model block by block, in step with the walk."""

    def __init__(self, forwards: LayerwiseForwards) -> None:
        self.forwards = forwards
        self.matrices: dict[str, Matrix] = {}  # of the dense model's block
        self.samples: dict[str, Tensor] = {}  # the dense inputs of the tokens in `Observed.samples`
        self._differences: dict[str, Tensor] = {}  # (D - X)^T X by key of `Observed`

    @torch.no_grad()
    def observe_in_turn(
        self, walk: LayerWalk, block: Block, block_matrices: dict[str, Matrix], method: PruneMethod
    ) -> Iterator[tuple[dict[str, Matrix], Observed]]:
        """Yields the matrices to prune, those with the same inputs together, in the order in which the block calls them. The
        caller prunes them before it asks for the next, whose inputs depend on them.

        Matrices that stay dense are not observed: the tokens of an expert differ in the dense model.
        """
        self._follow(block)
        found = matrices(self.forwards.current, self.forwards.blocks)
        self.matrices = {name: found[name] for name in block_matrices if name in method.patterns}
        observer = InputObserver(self.matrices, lambda dense_NI: dense_NI.new_zeros(1))
        with observer.batch():
            self.forwards.run_block(0)
        groups: dict[str, dict[str, Matrix]] = defaultdict(dict)
        for name, key in observer.observed.shared_input_key.items():
            groups[key][name] = block_matrices[name]
        for part in groups.values():
            yield part, self._observe(walk, block, part, method.observe)

    def _observe(
        self, walk: LayerWalk, block: Block, part: dict[str, Matrix], observe: Callable[[Tensor], Tensor]
    ) -> Observed:
        """As `walk.observe`. Each batch runs through the dense block first, and its inputs are kept for the pruned model's,
        which come in the same order."""
        kept: deque[Tensor] = deque()
        shapes: dict[int, torch.Size] = {}  # of what `observe` returns, by number of inputs

        def keep(dense_NI: Tensor) -> Tensor:
            kept.append(dense_NI.clone())  # the block may change it
            return dense_NI.new_zeros(1)

        def pair(input_NI: Tensor) -> Tensor:
            if not kept or kept[0].shape != input_NI.shape:
                refuse()
            observed = observe(input_NI)
            shapes[input_NI.shape[1]] = observed.shape
            return packed_with_difference(observed, kept.popleft(), input_NI)

        def refuse() -> None:
            raise UserError(
                f"{block.name} has other products in the pruned model than in the dense one: set prune.target=pruned"
            )

        def run_dense(i: int) -> None:
            if kept:
                refuse()
            with observer.batch():
                self.forwards.run_block(i)

        observer = InputObserver({name: self.matrices[name] for name in part}, keep)
        observed = walk.observe(part, pair, run_dense)
        if kept:
            refuse()
        self.samples = observer.observed.samples
        for key, total in observed.totals.items():
            inputs = self.matrices[key].weight_OI.shape[1]
            difference, rest = total.tensor_split([inputs**2])
            self._differences[key], observed.totals[key] = difference.view(inputs, inputs), rest.view(shapes[inputs])
        return observed

    def replace(self, key: str, weights: dict[str, Tensor], total: Tensor, method: PruneMethod) -> None:
        """Replaces the weights (O, I) of matrices with the same inputs, in place. `total`: as `PruneMethod.prune` gets it."""
        difference_II = self._differences.pop(key)
        if not difference_II.any():  # before the first pruned block: the weights keep every bit
            return
        damp, stacked = method.settings.damp, torch.cat(list(weights.values()))
        solved = solve(stacked, difference_II, method.gram(weights, total), damp, next(iter(weights)))
        for name, part_OI in zip(weights, solved.split([len(weight_OI) for weight_OI in weights.values()])):
            store_(weights[name], part_OI, name, damp, method.readings)

    def _follow(self, block: Block) -> None:
        """Advances to the walk's block; after a resume, through the finished ones."""
        if not self.forwards.forwards:
            self.forwards.start()
        while self.forwards.current.index != block.index:
            for _ in self.forwards.advance():
                pass
