"""The values of the settings that choose an algorithm, from prune methods to fine-tuning, and all that is known of each.

Imports no torch: the settings, the report and `compare` ask here. What an entry computes is loaded when it is used.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.registry.allocations import ALLOCATIONS
from pipeline.registry.entry import NONE, Registry, is_file
from pipeline.registry.finetune_methods import FINETUNE_METHODS
from pipeline.registry.patterns import PATTERNS
from pipeline.registry.prune_methods import PRUNE_METHODS
from pipeline.registry.refinements import REFINEMENTS
from pipeline.registry.updates import UPDATES

REGISTRIES: dict[str, Registry] = {
    it.key: it for it in (PRUNE_METHODS, REFINEMENTS, UPDATES, PATTERNS, ALLOCATIONS, FINETUNE_METHODS)
}
PRUNING = ("prune.method", "prune.refine", "prune.update")  # together, what a model was pruned with


def value_of(recipe: Any, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)


def describe(recipe: Any) -> dict[str, dict[str, str]]:
    """Label, description and citation by key, of what the run's stages use; runs the user's own files."""
    used = [key for key in REGISTRIES if key.partition(".")[0] in recipe.stages and value_of(recipe, key) != NONE]
    return {key: REGISTRIES[key].entry(value_of(recipe, key)).about() for key in used}


def label(key: str, value: Any, recorded: dict[str, dict[str, str]] | None = None) -> str:
    """What people call the `value` of the setting `key`. A user's file is not run: its label is what `describe` recorded,
    or else the file's name."""
    own = (recorded or {}).get(key) if is_file(value) else None
    return own["label"] if own else REGISTRIES[key].label(value)


def pruned_with(settings: Mapping[str, Any], recorded: dict[str, dict[str, str]] | None = None) -> str:
    """Such as "Wanda + swaps + least squares", of the recipe's values of `PRUNING` by key."""
    return " + ".join(label(key, settings[key], recorded) for key in PRUNING if settings.get(key, NONE) != NONE)


def ignored(recipe: Any) -> list[str]:
    """A line for each setting that was changed and that only other entries than the chosen one read."""
    chosen = {key: value_of(recipe, key) for key in REGISTRIES if key.partition(".")[0] in recipe.stages}
    read, unread = set(), {}
    for key, value in chosen.items():
        section, _, name = key.partition(".")
        every = {f"{section}.{it}" for entry in REGISTRIES[key].entries.values() for it in entry.reads}
        # what a user's file reads is not known
        mine = every if is_file(value) else {f"{section}.{it}" for it in REGISTRIES[key].entry(value).reads}
        read |= mine
        unread |= {it: f"{name}={value}" for it in sorted(every - mine) if it not in unread}
    usual = type(recipe)()
    return [
        f"{it} is set, and {by} does not read it"
        for it, by in unread.items()
        if it not in read and value_of(recipe, it) != value_of(usual, it)
    ]
