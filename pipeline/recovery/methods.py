"""The fine-tuning methods: what is trained on a pruned model, and how its masks are kept."""

import functools
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pipeline.recovery import adapter_files, lora, sharding
from pipeline.recovery.effective import mask_gradient_, mask_weight_
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Finetune
from pipeline.sparsity.masks import Masks
from pipeline.sparsity.packed import pack


class FinetuneMethod:
    """Chooses what is trained on a pruned `model`, and keeps its masks during training: on the model's own weights if they are
    trained (`SparseFull`), or by adapters with a masked update (`MaskedLora`).

    A subclass sets `self.model`, the model that is called, with `requires_grad` on the trained parameters. A subclass in a
    user's file may set `label`, `description` and `citation` for checks and reports. If it extends `FinetuneMethod` itself, it
    also sets `trains_weights` and `leaves_model` (registry/finetune_methods.py). If `leaves_model` is False, `save` writes
    `adapter/`, a folder of peft.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, masks: Masks, settings: Finetune) -> None:
        raise NotImplementedError

    @classmethod
    def check(cls, model: nn.Module, matrices: Iterable[str], settings: Finetune) -> None:
        """Called before the first stage. Raises `UserError` if the method cannot train the `matrices` to prune. The model has
        no weights, and is not used again."""

    def mask_gradients(self) -> None:
        """Called before the gradients are clipped."""

    def reapply(self) -> int:
        """Called after each real optimizer step: masks what is trained. Returns how many pruned weights are still not zero."""
        return 0

    def merged(self, name: str, weight: Tensor) -> Tensor | None:
        """The trained value of the parameter `name`, given the pruned model's `weight`; None if it did not change. All ranks
        must call."""
        return None

    def save(self, folder: Path, masks_file: Path) -> None:
        """Writes what the method keeps besides the model, such as an adapter. All ranks must call."""


def with_plain_lora(model: nn.Module, matrices: Iterable[str], settings: Finetune) -> nn.Module:
    """Adds a LoRA of peft to those of the `matrices` that `settings` chooses. Raises `UserError` if peft would not adapt
    exactly these: it has no LoRA for some experts and names, and redirects some targets."""
    config = lora.lora_config(model, matrices, settings)
    wanted, why = set(config.target_modules), ""
    modules = {name for name, _ in model.named_modules()}
    adapted = wanted & modules
    if adapted == wanted:
        try:
            model = get_peft_model(model, config, adapter_name=lora.ADAPTER)
            layers = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
            adapted = {name.removeprefix("base_model.model.") for name in layers}
        except ValueError as error:
            adapted, why = set(), f" ({textwrap.shorten(str(error), 160, placeholder=' ...')})"
    if differ := adapted ^ wanted:
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in differ}))
        raise UserError(
            f"peft's LoRA cannot adapt exactly finetune.targets: {len(differ)} matrices differ, called {ends}{why}: set "
            "other finetune.targets, or finetune.method=lora"
        )
    return model


class PlainLora(FinetuneMethod):
    """The baseline of the Wanda paper (section 4.3): a dense LoRA, kept apart from the weights. Merged, it would fill the
    zeros, so there is no merged model. Nothing is masked in training: the pruned weights are frozen."""

    def __init__(self, model: nn.Module, masks: Masks, settings: Finetune) -> None:
        self.model = self.attach(model, masks, settings)

    def attach(self, model: nn.Module, masks: Masks, settings: Finetune) -> nn.Module:
        return with_plain_lora(model, masks, settings)

    @classmethod
    def check(cls, model: nn.Module, matrices: Iterable[str], settings: Finetune) -> None:
        with_plain_lora(model, matrices, settings)

    def save(self, folder: Path, masks_file: Path) -> None:
        """Writes `adapter/`. All ranks must call it."""
        state = sharding.gather_trained(self.model)
        if processes.is_main():
            self.model.save_pretrained(folder / "adapter", state_dict=state)


class MaskedLora(PlainLora):
    """W + M * (scale * B A), merged into a model with exactly the masks' sparsity."""

    def attach(self, model: nn.Module, masks: Masks, settings: Finetune) -> nn.Module:
        return lora.attach(model, masks, settings)

    @classmethod
    def check(cls, model: nn.Module, matrices: Iterable[str], settings: Finetune) -> None:
        """Nothing to refuse: it adapts whatever can be pruned."""

    @functools.cached_property
    def layers(self) -> dict[str, lora.Masked]:
        return lora.masked_layers(self.model)

    @functools.cached_property  # first used after training starts: sharding replaces the parameters
    def biases(self) -> dict[str, nn.Parameter]:
        """The trained biases by name in the model's files: of adapted layers, and of any others, such as norms."""
        named = ((lora.name_in_files(name), p) for name, p in self.model.named_parameters() if p.requires_grad)
        return {name: parameter for name, parameter in named if name.endswith("bias")}

    def reapply(self) -> int:
        return lora.refresh_all(self.model)

    def merged(self, name: str, weight: Tensor) -> Tensor | None:
        if name in self.layers:
            return self.layers[name].merged_weight(weight)
        return sharding.full_tensor(self.biases[name]) if name in self.biases else None

    def save(self, folder: Path, masks_file: Path) -> None:
        state = sharding.gather_trained(self.model)
        if processes.is_main():
            adapter_files.save_adapter(self.model, masks_file, folder / "adapter", state)


class SparseFull(FinetuneMethod):
    """Trains every kept weight, and everything that was never pruned (norms, embeddings)."""

    def __init__(self, model: nn.Module, masks: Masks, settings: Finetune) -> None:
        self.model = model
        chosen = None if settings.targets == lora.ALL else set(lora.targets(masks, settings.targets))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(chosen is None or name.removesuffix(".weight") in chosen)
        masks.refuse_other_model(model)
        self.masks = masks
        # this rank's masks, once the model is in place; packed on a GPU
        self.parts: dict[str, Tensor | None] = {}

    def _masked(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name not in self.parts:
                mask = self.masks.for_parameter(name, parameter)
                part = None if mask is None else sharding.shard_like(mask, parameter)
                self.parts[name] = part if part is None or not part.is_cuda or not part.numel() else pack(part)
            if (part := self.parts[name]) is not None:
                yield parameter, part

    @torch.no_grad()
    def mask_gradients(self) -> None:
        for parameter, mask in self._masked():
            if parameter.grad is not None:
                mask_gradient_(sharding.local_shard(parameter.grad), mask)

    @torch.no_grad()
    def reapply(self) -> int:
        count = 0
        for parameter, mask in self._masked():
            count = count + mask_weight_(sharding.local_shard(parameter), mask)
        return int(count)

    @functools.cached_property  # first used after training starts: sharding replaces the parameters
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def merged(self, name: str, weight: Tensor) -> Tensor | None:
        """None for buffers and other parameters that do not train, which precision=bf16-true has rounded."""
        parameter = self.parameters.get(name)
        return sharding.full_tensor(parameter.detach()) if parameter is not None and parameter.requires_grad else None
