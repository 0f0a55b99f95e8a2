"""Published results for the same model, method, pattern and protocol; the numbers are in `published.yaml`."""

from pathlib import Path

from omegaconf import OmegaConf

from pipeline.registry import ALLOCATIONS, FINETUNE_METHODS, PATTERNS
from pipeline.settings.schema import Calibration, Prune, Recipe

TEXT = "wikitext-2-raw-v1@test"  # the tokenised configuration gives other numbers

AS_PUBLISHED = ("refine", "update", "target", "group", "overrides", "damp", "pointwise")  # settings at their defaults


def find(recipe: Recipe, protocol: dict) -> tuple[dict[str, float], str]:
    """({model: perplexity on wikitext2}, source), both empty where nothing comparable was published."""
    name, settings = Path(recipe.model or "").name.lower(), recipe.prune
    text = str((protocol.get("datasets") or {}).get("wikitext2"))
    if TEXT not in text or protocol.get("windows") or protocol.get("bos"):
        return {}, ""
    pruned = f"{settings.method} {PATTERNS.label(settings.sparsity)}"
    rows = {"dense": "dense"}
    allocation = ALLOCATIONS.entries.get(settings.allocation)  # none of these for a file of the user's
    plain = "permute" not in recipe.stages and recipe.calibration.activations == Calibration().activations
    plain = plain and all(getattr(settings, key) == getattr(Prune(), key) for key in AS_PUBLISHED)
    if allocation and not allocation.shares_ratio and plain:
        tuning = FINETUNE_METHODS.entries.get(recipe.finetune.method)
        recovered = tuning and "reconstruct" not in recipe.stages
        rows |= {"pruned": pruned, "finetuned": f"{pruned} + {tuning.published_as}" if recovered else ""}
    for table in OmegaConf.to_container(OmegaConf.load(Path(__file__).with_suffix(".yaml"))):
        columns = [Path(model).name.lower() for model in table["models"]]
        if name in columns and protocol.get("seq_len") == table["seq_len"]:
            numbers = {it: table["rows"][row][columns.index(name)] for it, row in rows.items() if row in table["rows"]}
            return {model: number for model, number in numbers.items() if number is not None}, table["source"]
    return {}, ""
