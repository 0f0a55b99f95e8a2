"""Which prune methods, allocations, patterns and fine-tuning methods there are, and all that is known of each.

Imports no torch: the settings, the report and `compare` ask here. What an entry computes is loaded when it is used.
"""

from typing import Any

from pipeline.registry.allocations import ALLOCATIONS
from pipeline.registry.entry import Registry, is_file
from pipeline.registry.finetune_methods import FINETUNE_METHODS
from pipeline.registry.patterns import PATTERNS
from pipeline.registry.prune_methods import PRUNE_METHODS

REGISTRIES: dict[str, Registry] = {it.key: it for it in (PRUNE_METHODS, PATTERNS, ALLOCATIONS, FINETUNE_METHODS)}


def value_of(recipe: Any, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)


def describe(recipe: Any) -> dict[str, dict[str, str]]:
    """Label, description and citation by key, of what the run's stages use; runs the user's own files."""
    used = [key for key in REGISTRIES if key.partition(".")[0] in recipe.stages]
    return {key: REGISTRIES[key].entry(value_of(recipe, key)).about() for key in used}


def label(key: str, value: Any, recorded: dict[str, dict[str, str]] | None = None) -> str:
    """What people call the `value` of the setting `key`. A user's file is not run: its label is what `describe` recorded,
    or else the file's name."""
    own = (recorded or {}).get(key) if is_file(value) else None
    return own["label"] if own else REGISTRIES[key].label(value)


def ignored(recipe: Any) -> list[str]:
    """A line for each setting that was changed and that only other entries than the chosen one read."""
    lines = []
    for key, registry in REGISTRIES.items():
        value, (section, _, name) = value_of(recipe, key), key.partition(".")
        if is_file(value) or section not in recipe.stages:
            continue
        settings, usual = getattr(recipe, section), type(getattr(recipe, section))()
        others = {it for entry in registry.entries.values() for it in entry.reads} - set(registry.entry(value).reads)
        for other in sorted(others):
            if getattr(settings, other) != getattr(usual, other):
                lines.append(f"{section}.{other} is set, and {name}={value} does not read it")
    return lines
