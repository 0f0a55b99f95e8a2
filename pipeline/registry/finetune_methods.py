"""The registry of `finetune.method`."""

from dataclasses import dataclass
from typing import Any

from pipeline.registry.entry import Citation, Entry, Registry

LORA = Citation("Hu et al.", 2021, "LoRA: Low-Rank Adaptation of Large Language Models", "arXiv:2106.09685")
ADAPTER = ("rank", "alpha", "dropout", "bias", "quantize")


@dataclass(frozen=True)
class FinetuneEntry(Entry):
    trains_weights: bool = False  # the model's own, whole and in float32, instead of adapters beside them
    leaves_model: bool = True  # one that is exactly as sparse; else an adapter alone, beside the pruned model
    published_as: str = ""  # in reporting/published.yaml

    def trained(self, settings: Any, count: int, width: int) -> int:
        """How many numbers train for a tensor of `count`, rows and columns together `width` (0 for no matrix)."""
        return count if self.trains_weights else settings.rank * width

    def problem(self, settings: Any) -> str | None:
        if settings.quantize and self.trains_weights:
            usual = type(settings)().method
            return (
                f"finetune.quantize freezes the weights, which finetune.method={settings.method} trains: "
                f"set finetune.method={usual}"
            )
        return None

    def in_words(self, settings: Any) -> str:
        """For a model card."""
        size = f" of rank {settings.rank}" if "rank" in self.reads else ""
        return self.label + size + (", merged" if size and self.leaves_model else "")


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
        "Every kept weight trains, and all that was never pruned",
        "pipeline.recovery.methods:SparseFull",
        trains_weights=True,
    ),
)
