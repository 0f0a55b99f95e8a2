"""The visitor of `run_layerwise` that reorders the channels of each block so that N of M keeps more importance."""

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.engine.block_store import BlockResult
from pipeline.engine.blocks import Block, shared_parameters, tensors_outside
from pipeline.engine.channels import Channels, Layout, Trials, channels_of, in_float64, kind, layouts
from pipeline.engine.matrices import Matrix, matrices
from pipeline.engine.observe import Observed, eager_experts
from pipeline.engine.walk import LayerWalk
from pipeline.pruning import scores
from pipeline.pruning.block_pruner import check_inputs
from pipeline.pruning.channel_order import channel_order, kept_importance
from pipeline.runtime import files, processes
from pipeline.runtime.errors import one_line
from pipeline.runtime.readings import Readings
from pipeline.sparsity.masks import Masks
from pipeline.sparsity.patterns import NofM


class BlockPermuter:
    """Importance is |W_ij| * ||x_j|| (Wanda), whatever the model is pruned with later."""

    def __init__(self, model: nn.Module, blocks: list[Block], pattern: NofM, rounds: int) -> None:
        self.pattern, self.rounds = pattern, rounds
        # by kind and shape of matrix, found in the first block with it; None if none is exact. A resumed run finds the same
        self.layouts: dict[tuple, Layout | None] = {}
        # weights that are used elsewhere too
        self.shared = shared_parameters(blocks) | {id(tensor) for tensor in tensors_outside(model, blocks)}

    def __call__(self, walk: LayerWalk, block: Block) -> BlockResult | None:
        started, found = time.perf_counter(), matrices(block, walk.blocks)
        if walk.is_finished(block) and all(_kind_and_shape(name, block, found) in self.layouts for name in found):
            return None
        observed = walk.observe(found, scores.square_sum)
        with Readings() as readings:
            for name, key in observed.shared_input_key.items():
                check_inputs(readings, {name: found[name].weight_OI}, observed.totals[key])
        channels = self._exact_channels(walk, block, found, observed)
        if walk.is_finished(block):
            return None
        ordered = self._orders(channels, observed)
        rows = []
        for group, (order_V, before, after) in zip(channels, ordered):
            group.reorder(order_V)
            identity = torch.equal(order_V, torch.arange(len(order_V)))
            order = None if identity else files.digest(order_V.tolist())
            rows.append(
                {"layer": block.index, "matrix": group.name, "kept_before": before, "kept_after": after, "order": order}
            )
        parts = [f"{name} {before:.4f} -> {after:.4f}" for name, before, after in _means(block, channels, ordered)]
        gains = f"kept importance {', '.join(parts)}" if parts else "no channels to reorder"
        seconds = time.perf_counter() - started
        processes.say(f"  layer {block.index + 1}/{len(walk.blocks)}: {gains}, {seconds:.1f} s")
        return BlockResult(Masks(), processes.from_main({"layer": block.index, "matrices": rows}))

    def _exact_channels(
        self, walk: LayerWalk, block: Block, found: dict[str, Matrix], observed: Observed
    ) -> list[Channels]:
        """The channels of the block that may be reordered. Decided on rank 0, whose first batch is that of any number of
        processes."""
        chosen: dict[str, Layout] = {}
        if processes.is_main():
            fused = {matrix.module for matrix in found.values() if matrix.expert is not None}
            with in_float64(block), eager_experts(fused):  # grouped products have no float64
                chosen = self._exact_layouts(walk, block, found, observed)
        chosen, self.layouts = processes.from_main((chosen, self.layouts))
        return [channels_of(name, block, found, layout) for name, layout in chosen.items()]

    def _exact_layouts(
        self, walk: LayerWalk, block: Block, found: dict[str, Matrix], observed: Observed
    ) -> dict[str, Layout]:
        """The layout of each matrix whose inputs may be reordered, by name. Tests layouts that are not known yet, and whether
        the known ones are exact here too."""
        try:
            trials = Trials(lambda: walk.forwards.call_block(0, torch.float64))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            processes.say(
                f"  {block.name}: the order of channels stays, as the layer does not run in float64: {one_line(str(error))}"
            )
            return {}
        alike: dict[tuple, list[str]] = defaultdict(list)  # matrices of one kind and shape, such as all experts
        for name in found:
            alike[_kind_and_shape(name, block, found)].append(name)

        def passes(test: Callable[[list[Channels]], bool], chosen: dict[str, Layout]) -> bool:
            channels = [channels_of(name, block, found, layout) for name, layout in chosen.items()]
            return None not in channels and not self._are_shared(channels) and test(channels)

        if alike.keys() <= self.layouts.keys():  # one test of all known layouts together
            chosen = {name: layout for key, names in alike.items() for name in names if (layout := self.layouts[key])}
            if passes(trials.keep_output, chosen):
                return chosen
        chosen = {}
        for key, names in alike.items():
            if key in self.layouts:
                layout = self.layouts[key]
                if layout and not passes(trials.are_exact, dict.fromkeys(names, layout)):
                    layout = None
                    processes.say(
                        f"  {block.name}.{key[0]}: the order of inputs stays, as here a permutation changes the output"
                    )
            else:
                candidates = list(layouts(names[0], block, found, observed, self.pattern.m))
                exact = (tried for tried in candidates if passes(trials.are_exact, dict.fromkeys(names, tried)))
                layout = self.layouts[key] = next(exact, None)
                if candidates and not layout:
                    processes.say(
                        f"  {key[0]}: the order of inputs stays, as no permutation is known to compute the same"
                    )
            if layout:
                chosen |= dict.fromkeys(names, layout)
        return chosen

    def _are_shared(self, channels: list[Channels]) -> bool:
        """Whether a weight that would be reordered is used elsewhere too."""
        moved = [matrix for group in channels for matrix in (group.fan_in, *(part for part, _ in group.producers))]
        return any(id(matrix.parameter) in self.shared for matrix in moved)

    def _orders(self, channels: list[Channels], observed: Observed) -> list[tuple[Tensor, float, float]]:
        """For each, the order and the shares of the importance kept before and after. The ranks compute them in turn."""
        mine = {}
        for i in range(processes.rank(), len(channels), processes.world_size()):
            group = channels[i]
            score_OC = scores.wanda(group.fan_in.weight_OI, observed.totals[observed.shared_input_key[group.name]])
            score_RV = score_OC[:, group.columns.to(score_OC.device)].flatten(0, 1)
            order_V = channel_order(score_RV, self.pattern, group.head, self.rounds)
            reordered = score_RV[:, order_V.to(score_RV.device)]
            mine[i] = order_V, kept_importance(score_RV, self.pattern), kept_importance(reordered, self.pattern)
        everyone = {i: value for part in processes.all_ranks(mine) for i, value in part.items()}
        return [everyone[i] for i in range(len(channels))]


def _kind_and_shape(name: str, block: Block, found: dict[str, Matrix]) -> tuple:
    return kind(name, block), tuple(found[name].weight_OI.shape)


def _means(block: Block, channels: list[Channels], ordered: list) -> list[tuple[str, float, float]]:
    """Kind, and the means of the shares before and after, for each kind."""
    by_kind = defaultdict(list)
    for group, (_, before, after) in zip(channels, ordered):
        by_kind[kind(group.name, block)].append((before, after))
    return [(name, *(sum(part) / len(part) for part in zip(*pairs))) for name, pairs in by_kind.items()]
