"""The registries: the allowed values of each setting that chooses an algorithm, with label, description and citation.

Imports no torch, because the settings, the report and `compare` use it. An implementation is loaded when it is used.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.registry.allocations import ALLOCATIONS
from pipeline.registry.entry import NONE, Registry, is_file
from pipeline.registry.finetune_methods import FINETUNE_METHODS
from pipeline.registry.patterns import PATTERNS
from pipeline.registry.prune_methods import PRUNE_METHODS
from pipeline.registry.refinements import REFINEMENTS
from pipeline.registry.updates import DENSE_TARGET, UPDATES

REGISTRIES: dict[str, Registry] = {
    registry.key: registry
    for registry in (PRUNE_METHODS, REFINEMENTS, UPDATES, PATTERNS, ALLOCATIONS, FINETUNE_METHODS)
}
PRUNING = ("prune.method", "prune.refine", "prune.update")  # the keys that together name how a model was pruned
TARGET = "prune.target"  # also named, if it is not the default


def value_of(recipe: Any, key: str) -> Any:
    """The recipe's value of a key such as `prune.method`."""
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)


def describe(recipe: Any) -> dict[str, dict[str, str]]:
    """Label, description and citation by key, for the entries that the run's stages use. Runs the user's files."""
    used = [key for key in REGISTRIES if key.partition(".")[0] in recipe.stages and value_of(recipe, key) != NONE]
    described = {key: REGISTRIES[key].entry(value_of(recipe, key)).about() for key in used}
    if "prune" in recipe.stages and recipe.prune.target == DENSE_TARGET.name:
        described[TARGET] = DENSE_TARGET.about()
    return described


def label(key: str, value: Any, recorded: dict[str, dict[str, str]] | None = None) -> str:
    """The display name of the setting's value. Does not run a user's file: its label is the one in `recorded` (the result
    of `describe`), or else the file's name."""
    description = (recorded or {}).get(key) if is_file(value) else None
    return description["label"] if description else REGISTRIES[key].label(value)


def pruned_with(settings: Mapping[str, Any], recorded: dict[str, dict[str, str]] | None = None) -> str:
    """A label such as "Wanda + swaps + least squares". `settings`: the recipe's values of the `PRUNING` keys
    and of `TARGET`."""
    labels = [label(key, settings[key], recorded) for key in PRUNING if settings.get(key, NONE) != NONE]
    return " + ".join(labels + [DENSE_TARGET.label] * (settings.get(TARGET) == DENSE_TARGET.name))


def ignored(recipe: Any) -> list[str]:
    """A line for each setting that was changed but is read only by entries that were not chosen."""
    chosen = {key: value_of(recipe, key) for key in REGISTRIES if key.partition(".")[0] in recipe.stages}
    read, unread = set(), {}
    for key, value in chosen.items():
        section, _, name = key.partition(".")
        read_by_any = {f"{section}.{setting}" for entry in REGISTRIES[key].entries.values() for setting in entry.reads}
        if is_file(value):
            read_by_chosen = read_by_any  # a user's file may read any of them
        else:
            read_by_chosen = {f"{section}.{setting}" for setting in REGISTRIES[key].entry(value).reads}
        read |= read_by_chosen
        for setting in sorted(read_by_any - read_by_chosen):
            unread.setdefault(setting, f"{name}={value}")
    default = type(recipe)()
    return [
        f"{setting} is set, but {chosen_value} does not read it"
        for setting, chosen_value in unread.items()
        if setting not in read and value_of(recipe, setting) != value_of(default, setting)
    ]
