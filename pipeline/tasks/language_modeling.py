"""Causal language models: they read windows of token ids and predict each next token.

Shapes: N = windows, B = windows of a batch, T = tokens of a window, V = vocabulary, P = predictions.
"""

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pipeline.data import sampled, sources, token_windows
from pipeline.models import loading, processors
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Calibration, Finetune, Recipe
from pipeline.tasks.task import Task


class LanguageModeling(Task):
    noun, unit, peft_type = "a language model", "tokens", "CAUSAL_LM"
    reads_text = True

    def check(self, recipe: Recipe, name: str) -> None:
        if "evaluate" in recipe.stages and recipe.evaluate.accuracy:
            raise UserError(
                f"evaluate.accuracy={','.join(recipe.evaluate.accuracy)} is for image classifiers, and {name} is "
                f"{self.noun}: set evaluate.accuracy=[]"
            )
        if "finetune" in recipe.stages and recipe.finetune.augment:
            raise UserError(
                f"finetune.augment=true is for image classifiers, and {name} is {self.noun}: set finetune.augment=false"
            )

    def processor(self, folder: Path, recipe: Recipe) -> Any:
        return processors.tokenizer(folder, recipe)

    def calibration(
        self, recipe: Recipe, text: Calibration, section: str, folder: Path, config: PreTrainedConfig
    ) -> Tensor:
        loading.check_length(config, f"{section}.seq_len", text.seq_len)
        source = sources.of_text(text, recipe.mirror, section)
        if source.name == sources.SELF:
            windows_NT = sampled.samples(recipe, sampled.dense_folder(recipe), text.samples, text.seq_len)
        else:
            tokenizer = self.processor(folder, recipe)
            windows_NT = token_windows.calibration(source, tokenizer, text.samples, text.seq_len, recipe.seed, section)
        loading.check_vocabulary(config, windows_NT, source)
        return windows_NT

    def training(
        self,
        source: sources.Source,
        processor: Any,
        config: PreTrainedConfig,
        settings: Finetune,
        count: int,
        seed: int,
    ) -> Tensor:
        windows_NT = token_windows.packed(source, processor, settings.seq_len, count, seed, loss=settings.loss)
        ids_NT = token_windows.ids_and_labels(windows_NT)[0] if settings.loss != "all" else windows_NT
        loading.check_vocabulary(config, ids_NT, source)
        return windows_NT

    def loss_counts(self, samples: Tensor, steps: int) -> list[int] | None:
        if not (samples < 0).any():
            return None
        return (samples.view(steps, -1, samples.shape[1])[..., 1:] >= 0).sum((1, 2)).tolist()

    def forward(self, model: nn.Module, batch: Tensor) -> Any:
        return model.base_model(input_ids=batch, use_cache=False)

    def inputs_and_labels(self, batch: Tensor) -> tuple[dict[str, Any], Tensor]:
        ids_BT, labels_BT = token_windows.ids_and_labels(batch.long())
        return {"input_ids": ids_BT, "use_cache": False}, labels_BT

    def cross_entropy(
        self, logits: Tensor, labels: Tensor, reduction: str = "mean", label_smoothing: float = 0.0
    ) -> Tensor:
        """Of each next token. The model's `.loss` is not used: GIT skips the first positions, which hold its image, and
        other models add a router loss."""
        next_BT = F.pad(labels[:, 1:], (0, 1), value=token_windows.IGNORED)  # the last token predicts nothing
        logits_PV = logits.flatten(0, 1).float()
        return F.cross_entropy(logits_PV, next_BT.flatten(), reduction=reduction, label_smoothing=label_smoothing)

    def predictions(self, logits: Tensor) -> Tensor:
        return logits[:, :-1].reshape(-1, logits.shape[-1])

    def targets(self, labels: Tensor) -> Tensor:
        return labels[:, 1:].reshape(-1)

    def size(self, batch: Tensor) -> int:
        return batch.numel()

    def sample_shape(self, config: PreTrainedConfig, seq_len: int) -> tuple[int, ...]:
        return (seq_len,)

    def hidden_shape(self, model: nn.Module, batch: Tensor) -> tuple[int, int]:
        config = model.config.get_text_config()
        return batch.numel(), getattr(config, "hidden_size", None) or model.get_input_embeddings().weight.shape[1]
