"""The training module: a model's loss, gradients, optimizer and checkpoints, on one process or several."""

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from pipeline import tasks
from pipeline.recovery import distillation, sharding
from pipeline.recovery.training_dtype import mixed_dtype, trains_in_float32
from pipeline.registry import FINETUNE_METHODS
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Finetune


class _ReachAll(torch.autograd.Function):
    """Returns the loss unchanged, with a graph edge without gradient to each parameter. DDP waits for all parameters, and fails
    on those that get no gradient (idle experts, an image encoder, an indexer that is not differentiable). DDP's option
    `find_unused_parameters` walks the graph in every step, and warns if all are used."""

    @staticmethod
    def forward(ctx, loss, *parameters):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, *[None] * (len(ctx.needs_input_grad) - 1)


class TrainedModel(LightningModule):
    """The training module. `teacher` is the dense model to distil from, weighted by `finetune.distill`.

    `counts` is set if samples hold tokens without loss: for each batch, the divisor of its summed loss (the step's tokens with
    loss, divided by accumulation and processes). This gives all tokens of a step the same weight in any split into batches.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Finetune,
        seed: int,
        teacher: nn.Module | None = None,
        counts: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.settings, self.seed, self.counts = model, settings, seed, counts
        self.task = tasks.of(model.config)
        object.__setattr__(self, "teacher", teacher)  # not in _modules, so it is not wrapped, trained or saved
        self.strict_loading = False  # checkpoints hold only the trained parameters
        self._hooks: list = []
        self.reached: set[nn.Parameter] = set()  # parameters with gradients in this step, on this rank

    def configure_model(self) -> None:
        if self.settings.strategy == "fsdp" and processes.world_size() > 1:
            mesh, full = self.device_mesh["data_parallel"], FINETUNE_METHODS.entry(self.settings.method).trains_weights
            # LoRA's few weights stay in float32, as in the merge
            compute = mixed_dtype(self.settings.precision) if full else None
            sharding.shard_(self.model, mesh, compute, trains_in_float32(self.settings))
            if self.teacher is not None:
                sharding.shard_(self.teacher, mesh)

    def on_fit_start(self) -> None:
        if self._uses_ddp():
            self._hooks = [p.register_post_accumulate_grad_hook(self._note_reached) for p in self._trained()]
        if self.teacher is not None:
            self.teacher.to(self.device)

    def on_fit_end(self) -> None:
        for hook in self._hooks:
            hook.remove()  # the hooks form a reference cycle through this module, which would keep the weights alive
        self._hooks = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        # seeded by batch, so that a resumed run has the same dropout
        torch.manual_seed((self.seed * 1_000_003 + index) * processes.world_size() + processes.rank())
        loss = self._loss(batch, index)
        if not loss.isfinite():
            raise UserError(
                f"the loss at step {self.trainer.global_step + 1} is {loss.item()}: set a smaller lr than "
                f"{self.settings.lr:g}, or precision=bf16-mixed if float16 overflows (the last good checkpoint is kept)"
            )
        if not loss.requires_grad:
            raise UserError(
                f"{type(self.model).__name__} gives no gradient to the trained weights (reversible layers, or code without "
                "gradients): set finetune.method=full, or stages without finetune"
            )
        self.log("loss", loss, prog_bar=True, logger=False)
        return _ReachAll.apply(loss, *self._trained()) if self._uses_ddp() else loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Removes DDP's zero gradients of parameters that no rank reached. A single process has no gradient there, and so no
        weight decay."""
        if self._uses_ddp():
            for parameter in self._trained():
                if parameter not in self.reached and parameter.grad is not None and not parameter.grad.any():
                    parameter.grad = None
            self.reached.clear()

    def optimizer_step(self, *args, **kwargs) -> None:
        """Frees the gradients after the step. Lightning keeps them through the next forward: four bytes per trained weight."""
        super().optimizer_step(*args, **kwargs)
        for parameter in self._trained():
            parameter.grad = None

    def _note_reached(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            self.reached.add(parameter)

    def _uses_ddp(self) -> bool:
        return self.settings.strategy == "ddp" and processes.world_size() > 1

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _trained_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def _loss(self, batch: Any, index: int) -> Tensor:
        task, (inputs, labels) = self.task, self.task.inputs_and_labels(batch)
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = task.predictions(task.logits(self.teacher, inputs))
        student = task.logits(self.model, inputs)
        smoothing = self.settings.label_smoothing
        if teacher is None and self.counts is None:
            return task.cross_entropy(student, labels, label_smoothing=smoothing)
        count = self.counts[index] if self.counts else None
        student, targets = task.predictions(student), task.targets(labels)
        share, temperature = self.settings.distill, self.settings.temperature
        return distillation.loss(student, teacher, targets, share, temperature, count, smoothing)

    def configure_optimizers(self) -> dict:
        settings = self.settings
        optimizer = _optimizer(self._trained(), settings)
        warmup = round(settings.warmup * settings.max_steps)
        scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, settings.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        trained = self._trained_names()
        state = {name: value for name, value in checkpoint["state_dict"].items() if name in trained}
        for name, value in state.items():
            if not value.isfinite().all():  # checked here, because writing this file removes the last good checkpoint
                raise UserError(
                    f"step {self.trainer.global_step} made {name} infinite or NaN: set a smaller lr than "
                    f"{self.settings.lr:g} (the last good checkpoint is kept)"
                )
        checkpoint["state_dict"] = state
        checkpoint["processes"] = processes.world_size()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        started, folder = checkpoint["processes"], Path(self.trainer.ckpt_path).parent.parent
        if started != processes.world_size():  # each process resumes its share of the data
            raise UserError(
                f"this training was started with {started} processes and cannot continue with {processes.world_size()}: launch "
                f"with --num_processes {started}, or remove {folder} to start again"
            )
        trained = self._trained_names()
        saved = checkpoint.get("state_dict", trained)  # with FSDP only one rank has it
        if differ := trained ^ set(saved):  # Lightning does not check this with `strict_loading` off
            raise UserError(
                f"this training was started with other weights (such as {sorted(differ)[0]}): remove {folder} to start again"
            )


def _optimizer(trained: list[nn.Parameter], settings: Finetune) -> torch.optim.Optimizer:
    common = {"lr": settings.lr, "betas": (0.9, 0.95), "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        if processes.device().type == "cpu":  # fused AdamW rounds differently there
            return torch.optim.AdamW(trained, **common)
        optimizer = torch.optim.AdamW(trained, **common, fused=True)  # saves temporaries of four bytes per weight
        optimizer._step_supports_amp_scaling = False  # else Lightning refuses clipping, though it unscales first
        return optimizer
    import bitsandbytes.optim as bnb  # takes seconds to import

    kinds = {"adamw_8bit": bnb.AdamW8bit, "paged_adamw": bnb.PagedAdamW, "paged_adamw_8bit": bnb.PagedAdamW8bit}
    return kinds[settings.optimizer](trained, **common)
