"""The visitor of `run_layerwise` that reorders the channels of each block so that N of M keeps more importance."""

import time
from collections import defaultdict

import torch
from torch import Tensor, nn

from pipeline.engine.block_files import BlockResult
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
        # where the channels lie, by kind and shape of matrix, found in the first block with it; a resumed run finds the same
        self.layouts: dict[tuple, Layout | None] = {}
        # weights that are used elsewhere too
        self.shared = shared_parameters(blocks) | {id(tensor) for tensor in tensors_outside(model, blocks)}

    def __call__(self, walk: LayerWalk, block: Block) -> BlockResult | None:
        started, found = time.perf_counter(), matrices(block, walk.blocks)
        if walk.is_finished(block) and all(_place(name, block, found) in self.layouts for name in found):
            return None
        observed = walk.observe(found, scores.square_sum)
        with Readings() as readings:
            for name, key in observed.shared_input_key.items():
                check_inputs(readings, {name: found[name].weight_OI}, observed.totals[key])
        channels = self._exact(walk, block, found, observed)
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

    def _exact(self, walk: LayerWalk, block: Block, found: dict[str, Matrix], observed: Observed) -> list[Channels]:
        """The channels of the block that may be reordered. Decided on rank 0, whose first batch is that of any number of
        processes."""
        chosen: dict[str, Layout] = {}
        if processes.is_main():
            fused = {matrix.module for matrix in found.values() if matrix.expert is not None}
            with in_float64(block), eager_experts(fused):  # grouped products have no float64
                chosen = self._chosen(walk, block, found, observed)
        chosen, self.layouts = processes.from_main((chosen, self.layouts))
        return [channels_of(name, block, found, layout) for name, layout in chosen.items()]

    def _chosen(self, walk: LayerWalk, block: Block, found: dict[str, Matrix], observed: Observed) -> dict[str, Layout]:
        try:
            trials = Trials(lambda: walk.forwards.call_block(0, torch.float64))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            processes.say(
                f"  {block.name}: the order of channels stays, as the layer does not run in float64: {one_line(str(error))}"
            )
            return {}
        alike: dict[tuple, list[str]] = defaultdict(list)  # matrices of one kind, such as all experts
        for name in found:
            alike[_place(name, block, found)].append(name)
        chosen = {
            name: layout for place, names in alike.items() for name in names if (layout := self.layouts.get(place))
        }
        if all(place in self.layouts for place in alike):
            channels = [channels_of(name, block, found, layout) for name, layout in chosen.items()]
            if None not in channels and not self._are_shared(channels) and trials.keep_output(channels):
                return chosen
        chosen = {}
        for place, names in alike.items():

            def is_exact(layout: Layout, names: list[str] = names) -> bool:
                channels = [channels_of(name, block, found, layout) for name in names]
                return None not in channels and not self._are_shared(channels) and trials.are_exact(channels)

            known = place in self.layouts
            if not known:
                suggested = layouts(names[0], block, found, observed, self.pattern.m)
                first = next(suggested, None)
                tried = () if first is None else (first, *suggested)
                self.layouts[place] = next(filter(is_exact, tried), None)
                if first and not self.layouts[place]:
                    processes.say(
                        f"  {place[0]}: the order of inputs stays, as no permutation is known to compute the same"
                    )
            layout = self.layouts[place]
            if layout and known and not is_exact(layout):
                processes.say(
                    f"  {block.name}.{place[0]}: the order of inputs stays, as here a permutation changes the output"
                )
            elif layout:
                chosen |= dict.fromkeys(names, layout)
        return chosen

    def _are_shared(self, channels: list[Channels]) -> bool:
        moved = [
            matrix for group in channels for matrix in (group.fan_in, *(producer for producer, _ in group.producers))
        ]
        return any(id(matrix.parameter) in self.shared for matrix in moved)

    def _orders(self, channels: list[Channels], observed: Observed) -> list[tuple[Tensor, float, float]]:
        """The order of each, and the shares of the importance kept before and after; computed by the ranks in turn."""
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


def _place(name: str, block: Block, found: dict[str, Matrix]) -> tuple:
    return kind(name, block), tuple(found[name].weight_OI.shape)


def _means(block: Block, channels: list[Channels], ordered: list) -> list[tuple[str, float, float]]:
    """Kind, and the means of the shares before and after, for each kind."""
    by_kind = defaultdict(list)
    for group, (_, before, after) in zip(channels, ordered):
        by_kind[kind(group.name, block)].append((before, after))
    return [(name, *(sum(part) / len(part) for part in zip(*pairs))) for name, pairs in by_kind.items()]
