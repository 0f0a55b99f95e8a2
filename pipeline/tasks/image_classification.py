"""Image classifiers: they read pixel values and predict one class for each image.

Shapes: B = images of a batch, C = channels, H, W = pixels, V = classes.
"""

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pipeline.data import images, sources
from pipeline.models import processors
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Calibration, Finetune, Recipe
from pipeline.tasks.task import Task

SIZE, PATCH = 224, 16  # pixels of images and patches, where a configuration does not say


class ImageClassification(Task):
    noun, unit, peft_type = "an image classifier", "images", None

    def check(self, recipe: Recipe, name: str) -> None:
        settings, wrong = recipe.evaluate, ""
        if "evaluate" in recipe.stages:
            for key in ("perplexity", "tasks", "prompts"):
                if getattr(settings, key):
                    wrong = f"evaluate.{key}=[]" + (" evaluate.accuracy=[DATA SET]" if not settings.accuracy else "")
        if "finetune" in recipe.stages and recipe.finetune.loss != "all":
            wrong = "finetune.loss=all"
        if "speed" in recipe.stages:
            wrong = f"stages=[{','.join(stage for stage in recipe.stages if stage != 'speed')}]"
        if wrong:
            raise UserError(
                f"{name} is {self.noun}, which reads no text: set {wrong} (recipe=images has such settings)"
            )

    def processor(self, folder: Path, recipe: Recipe) -> Any:
        return processors.image_processor(folder, recipe)

    def calibration(
        self, recipe: Recipe, text: Calibration, section: str, folder: Path, config: PreTrainedConfig
    ) -> images.Images:
        source = sources.of_text(text, recipe.mirror, section)
        processor = self.processor(folder, recipe)
        return images.drawn(source, processor, config, text.samples, recipe.seed, section)

    def training(
        self,
        source: sources.Source,
        processor: Any,
        config: PreTrainedConfig,
        settings: Finetune,
        count: int,
        seed: int,
    ) -> images.Images:
        return images.repeated(source, processor, config, count, seed, settings.augment)

    def forward(self, model: nn.Module, batch: Tensor) -> Any:
        return model.base_model(batch.to(model.dtype))  # timm's models do not call it pixel_values

    def logits(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return model(pixel_values=inputs["pixel_values"].to(model.dtype)).logits

    def inputs_and_labels(self, batch: list[Tensor]) -> tuple[dict[str, Any], Tensor]:
        pixels_BCHW, labels_B = batch
        return {"pixel_values": pixels_BCHW}, labels_B

    def cross_entropy(
        self, logits: Tensor, labels: Tensor, reduction: str = "mean", label_smoothing: float = 0.0
    ) -> Tensor:
        return F.cross_entropy(logits.float(), labels, reduction=reduction, label_smoothing=label_smoothing)

    def predictions(self, logits: Tensor) -> Tensor:
        return logits

    def targets(self, labels: Tensor) -> Tensor:
        return labels

    def size(self, batch: Tensor | list[Tensor]) -> int:
        return len(batch if isinstance(batch, Tensor) else batch[-1])

    def sample_shape(self, config: PreTrainedConfig, seq_len: int) -> tuple[int, ...]:
        size = getattr(config, "image_size", SIZE)
        height, width = (size, size) if isinstance(size, int) else size
        return getattr(config, "num_channels", 3), height, width

    def hidden_shape(self, model: nn.Module, batch: Tensor) -> tuple[int, int]:
        """By the patches of the first stage, where there are most."""
        config = model.config
        patch = getattr(config, "patch_size", None) or PATCH
        width = next(
            (size for key in ("hidden_sizes", "embed_dim", "hidden_size") if (size := getattr(config, key, None))), 1
        )
        patches = batch[:, 0].numel() // (patch if isinstance(patch, int) else patch[0]) ** 2
        return patches, width if isinstance(width, int) else width[0]
