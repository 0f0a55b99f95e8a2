"""Owns what trains on a pruned model, one class a way, and how its mask holds meanwhile.

`merges` says whether a finished model comes of it. All have the same four methods:
`reapply` (after each real step; returns how many pruned weights were not zero),
`mask_gradients` (before clipping), `merged` (a weight of the finished model) and `save`.
"""

import functools
import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pipeline.recovery import lora, sharding
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Finetune
from pipeline.sparsity.masks import Masks, apply_, multiply_, nonzero_pruned


class PlainLora:
    """The baseline of the Wanda paper (section 4.3): a dense LoRA, kept apart from the weights. Merged, it would fill the
    zeros, so there is no merged model."""

    merges = False

    def __init__(self, model: nn.Module, masks: Masks, settings: Finetune) -> None:
        self.model = self.attach(model, masks, settings)

    def attach(self, model: nn.Module, masks: Masks, settings: Finetune) -> nn.Module:
        """Refuses what peft would not adapt, or would adapt instead: it has no LoRA for some experts and names, and moves
        some targets to others."""
        config = lora.lora_config(masks, settings)
        asked, why = set(config.target_modules), ""
        modules = {name for name, _ in model.named_modules()}
        adapted = asked & modules
        if adapted == asked:
            try:
                model = get_peft_model(model, config, adapter_name=lora.ADAPTER)
                layers = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
                adapted = {name.removeprefix("base_model.model.") for name in layers}
            except ValueError as error:
                adapted, why = set(), f" ({textwrap.shorten(str(error), 160, placeholder=' ...')})"
        if differ := adapted ^ asked:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in differ}))
            raise UserError(
                f"peft's LoRA cannot adapt exactly what finetune.targets asks for: {len(differ)} matrices differ, called "
                f"{ends}{why}: set finetune.targets to others, or finetune.method=lora"
            )
        return model

    def mask_gradients(self) -> None:
        """A and B are not masked: B starts at zero, and what they change is masked where it is made."""

    def reapply(self) -> int:
        return 0

    def merged(self, name: str, weight: Tensor) -> Tensor | None:
        return None

    def save(self, folder: Path, masks_file: Path) -> None:
        """Writes `adapter/`; all ranks must call."""
        state = sharding.trained(self.model)
        if processes.is_main():
            self.model.save_pretrained(folder / "adapter", state_dict=state)


class MaskedLora(PlainLora):
    """W + M * (scale * B A), merged into a model that is exactly as sparse."""

    merges = True

    def attach(self, model: nn.Module, masks: Masks, settings: Finetune) -> nn.Module:
        return lora.attach(model, masks, settings)

    @functools.cached_property
    def layers(self) -> dict[str, lora.Masked]:
        return lora.masked_layers(self.model)

    @functools.cached_property  # not before training: sharding replaces the parameters
    def biases(self) -> dict[str, nn.Parameter]:
        """Those that train, under their names in the model's files: of adapted layers, and of any others, such as norms."""
        named = ((lora.name_in_files(name), p) for name, p in self.model.named_parameters() if p.requires_grad)
        return {name: parameter for name, parameter in named if name.endswith("bias")}

    def reapply(self) -> int:
        return lora.refresh_all(self.model)

    def merged(self, name: str, weight: Tensor) -> Tensor | None:
        if name in self.layers:
            return self.layers[name].merged_weight(weight)
        return sharding.whole(self.biases[name]) if name in self.biases else None

    def save(self, folder: Path, masks_file: Path) -> None:
        state = sharding.trained(self.model)
        if processes.is_main():
            lora.save_adapter(self.model, masks_file, folder / "adapter", state)


class SparseFull:
    """Every kept weight trains, and all that was never pruned (norms, embeddings)."""

    merges = True

    def __init__(self, model: nn.Module, masks: Masks, settings: Finetune) -> None:
        self.model = model
        chosen = None if settings.targets == lora.ALL else set(lora.targets(masks, settings.targets))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(chosen is None or name.removesuffix(".weight") in chosen)
        for _ in masks.matched(model.named_parameters()):
            pass  # refuses another model's masks
        self.masks = masks
        self.parts: dict[str, Tensor | None] = {}  # this rank's, unpacked once the model is in place

    def _masked(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name not in self.parts:
                mask = self.masks.of(name, parameter)
                self.parts[name] = None if mask is None else sharding.like(mask, parameter)
            if (part := self.parts[name]) is not None:
                # Lightning takes a model that it has trained off the GPU
                yield parameter, part.to(sharding.local(parameter).device)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        for parameter, mask in self._masked():
            if parameter.grad is not None:
                multiply_(sharding.local(parameter.grad), mask)

    @torch.no_grad()
    def reapply(self) -> int:
        count = 0
        for parameter, mask in self._masked():
            part = apply_(sharding.local(parameter), mask)
            count = count + nonzero_pruned(part, mask).count_nonzero()
        return int(count)

    @functools.cached_property  # not before training: sharding replaces the parameters
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def merged(self, name: str, weight: Tensor) -> Tensor | None:
        """None for what is no parameter: buffers do not train."""
        return sharding.whole(self.parameters[name].detach()) if name in self.parameters else None

    def save(self, folder: Path, masks_file: Path) -> None:
        """There is nothing beside the model."""


METHODS = {"lora": MaskedLora, "plain_lora": PlainLora, "full": SparseFull}
