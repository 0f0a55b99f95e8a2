"""The base class of tasks.

Shapes: B = samples of a batch, P = predictions (tokens, or images), V = possible answers (vocabulary, or classes).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from pipeline.data.sources import Source
from pipeline.settings.schema import Calibration, Finetune, Recipe

# Prepared inputs, such as a tensor (N, T) of token windows: an index gives one sample, a slice a batch.
Samples = Sequence[Any]


class Task:
    """What a model reads and predicts: all in which language models and image classifiers differ."""

    noun: str  # in messages: "a language model"
    unit: str  # of what a model reads: "tokens"
    peft_type: str | None  # `task_type` of peft
    reads_text = False

    def check(self, recipe: Recipe, name: str) -> None:
        """Raises `UserError` for settings that models of this kind do not have. `name`: the model's, for the message."""

    def processor(self, folder: Path, recipe: Recipe) -> Any:
        """What prepares inputs, from a model folder: a tokenizer or an image processor. Raises `UserError`."""
        raise NotImplementedError

    def calibration(
        self, recipe: Recipe, text: Calibration, section: str, folder: Path, config: PreTrainedConfig
    ) -> Samples:
        """The `text.samples` inputs of a walk; a batch of them is one tensor. `section`: the recipe's section that sets
        `text`; `folder`: the model's, for its processor."""
        raise NotImplementedError

    def training(
        self, source: Source, processor: Any, config: PreTrainedConfig, settings: Finetune, count: int, seed: int
    ) -> Samples:
        """`count` samples to train on, in order: the source shuffled with `seed`, as often as needed."""
        raise NotImplementedError

    def loss_counts(self, samples: Samples, steps: int) -> list[int] | None:
        """The number of predictions with a loss in each of `steps` steps; None if all predictions have one."""
        return None

    def forward(self, model: nn.Module, batch: Tensor) -> Any:
        """Calls the model on a batch of `calibration`; without its head, which is outside the layers."""
        raise NotImplementedError

    def inputs_and_labels(self, batch: Any) -> tuple[dict[str, Any], Tensor]:
        """The arguments of the model, and the labels, from a batch of `training`."""
        raise NotImplementedError

    def logits(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return model(**inputs).logits

    def cross_entropy(
        self, logits: Tensor, labels: Tensor, reduction: str = "mean", label_smoothing: float = 0.0
    ) -> Tensor:
        """The loss in nats over the predictions that have one; `reduction` and `label_smoothing` as in torch."""
        raise NotImplementedError

    def predictions(self, logits: Tensor) -> Tensor:
        """The logits of the predictions alone, (P, V)."""
        raise NotImplementedError

    def targets(self, labels: Tensor) -> Tensor:
        """The right answers, (P,); those below 0 have no loss."""
        raise NotImplementedError

    def size(self, batch: Any) -> int:
        """The size of a batch of `calibration` or `training`, in `unit`."""
        raise NotImplementedError

    def sample_shape(self, config: PreTrainedConfig, seq_len: int) -> tuple[int, ...]:
        """The shape of one sample of `calibration`."""
        raise NotImplementedError

    def hidden_shape(self, model: nn.Module, batch: Tensor) -> tuple[int, int]:
        """(vectors, width) of the hidden states of a batch of `calibration`, about."""
        raise NotImplementedError
