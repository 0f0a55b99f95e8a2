"""Finds what others published for the same model, method and pattern, by the same protocol; the numbers are in
`published.yaml`."""

from pathlib import Path

from omegaconf import OmegaConf

from pipeline.registry import ALLOCATIONS, FINETUNE_METHODS, PATTERNS
from pipeline.settings.schema import Recipe

TEXT = "wikitext-2-raw-v1@test"  # the tokenised configuration gives other numbers


def find(recipe: Recipe, protocol: dict) -> tuple[dict[str, float], str]:
    """({model: perplexity on wikitext2}, source), both empty where nothing comparable was published."""
    name, settings = Path(recipe.model or "").name.lower(), recipe.prune
    if (
        TEXT not in str((protocol.get("datasets") or {}).get("wikitext2"))
        or protocol.get("windows")
        or protocol.get("bos")
    ):
        return {}, ""
    pruned = f"{settings.method} {PATTERNS.label(settings.sparsity)}"
    rows = {"dense": "dense"}
    allocation = ALLOCATIONS.entries.get(settings.allocation)  # none of these for a file of the user's
    if allocation and not allocation.shares_ratio and not settings.overrides:
        tuning = FINETUNE_METHODS.entries.get(recipe.finetune.method)
        rows |= {"pruned": pruned, "finetuned": f"{pruned} + {tuning.published_as}" if tuning else ""}
    for table in OmegaConf.to_container(OmegaConf.load(Path(__file__).with_suffix(".yaml"))):
        columns = [Path(model).name.lower() for model in table["models"]]
        if name in columns and protocol.get("seq_len") == table["seq_len"]:
            place = columns.index(name)
            found = {model: table["rows"].get(row, [None] * len(columns))[place] for model, row in rows.items()}
            return {model: value for model, value in found.items() if value is not None}, table["source"]
    return {}, ""
