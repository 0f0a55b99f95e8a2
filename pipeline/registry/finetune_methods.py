"""The registry of `finetune.method`."""

from dataclasses import dataclass
from typing import Any

from pipeline.registry.entry import Citation, Entry, Registry

LORA = Citation("Hu et al.", 2021, "LoRA: Low-Rank Adaptation of Large Language Models", "arXiv:2106.09685")
ADAPTER = ("rank", "alpha", "dropout", "bias", "quantize")


@dataclass(frozen=True)
class FinetuneEntry(Entry):
    trains_weights: bool = False  # the weights of the model, in float32; False: adapters
    leaves_model: bool = True  # writes an equally sparse model; False: only an adapter for the pruned model
    published_as: str = ""  # its name in reporting/published.yaml

    def trained_parameters(self, settings: Any, count: int, width: int) -> int:
        """The number of trained parameters for a tensor of `count` weights. `width`: rows + columns, 0 if not a matrix."""
        return count if self.trains_weights else settings.rank * width

    def problem(self, settings: Any) -> str | None:
        if settings.quantize and self.trains_weights:
            return (
                f"finetune.quantize freezes the weights, but finetune.method={settings.method} trains them: "
                f"set finetune.method={type(settings)().method}"
            )
        return None

    def in_words(self, settings: Any) -> str:
        """The label with rank, for a model card."""
        rank = f" of rank {settings.rank}" if "rank" in self.reads else ""
        return self.label + rank + (", merged" if rank and self.leaves_model else "")


FINETUNE_METHODS = Registry(
    "finetune.method",
    "pipeline.recovery.methods:FinetuneMethod",
    FinetuneEntry(
        "lora",
        "LoRA",
        "A low-rank update inside the mask, merged into the pruned weights",
        "pipeline.recovery.methods:MaskedLora",
        LORA,
        (*ADAPTER, "effective"),
        published_as="lora",
    ),
    FinetuneEntry(
        "plain_lora",
        "plain LoRA",
        "A dense low-rank update, kept apart from the pruned weights",
        "pipeline.recovery.methods:PlainLora",
        LORA,
        ADAPTER,
        leaves_model=False,
        published_as="lora",
    ),
    FinetuneEntry(
        "full",
        "full fine-tuning",
        "Trains every kept weight, and all parameters that are not pruned",
        "pipeline.recovery.methods:SparseFull",
        trains_weights=True,
    ),
)
