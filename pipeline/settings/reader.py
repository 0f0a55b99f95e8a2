"""A recipe file and `key=value` arguments to a `Recipe`.

defaults < `extends:` chain < recipe file < its variant, if one is chosen < `key=value` on the command line.
"""

import dataclasses
import os
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.registry import REGISTRIES, value_of
from pipeline.runtime.errors import UserError, did_you_mean
from pipeline.settings import checks, dotlist, recipe_files
from pipeline.settings.schema import Recipe

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", dict: "{name: value, ...}"}


def load(argv: list[str]) -> Recipe:
    """`["recipe=NAME", "key=value", ...]` -> Recipe; without `recipe=`, the recipe is `tiny`."""
    settings = [argument for argument in argv if not argument.startswith("recipe=")]
    names = [argument.removeprefix("recipe=") for argument in argv if argument.startswith("recipe=")] or ["tiny"]
    layers = [*recipe_files.layers(names[-1]), typed(settings)]
    return checked(layers, f"runs/{Path(names[-1]).stem}")


def typed(arguments: list[str]) -> dict:
    """`["key=value", ...]` as plain data, a layer for `checked`."""
    for argument in arguments:
        if "=" not in argument:
            raise UserError(f"cannot read argument '{argument}': settings are written key=value, such as recipe=tiny")
    return dotlist.parse(arguments)


def checked(layers: list[dict], run_dir: str = "runs/unnamed") -> Recipe:
    """Plain data merged over the defaults, later layers last; raises `UserError` for the first thing that is wrong."""
    recipe = _merged(layers)
    _expand_homes(recipe)
    recipe.run_dir = recipe.run_dir or run_dir
    checks.check(recipe)
    return recipe


def unchecked(name: str) -> Recipe:
    """The recipe of that name, unchecked: the checks of a recipe load torch, which a list of recipes must not."""
    return _merged(recipe_files.layers(name))


def _merged(layers: list[dict]) -> Recipe:
    for layer in layers:
        if isinstance(layer.get("rerun"), str):
            layer["rerun"] = [layer["rerun"]]  # rerun=prune
        _refuse_unknown(layer, Recipe, "")
    merged = OmegaConf.structured(Recipe)
    for layer in layers:
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise UserError(_mismatch(layer, error.full_key)) from None
    return OmegaConf.to_object(merged)


def _refuse_unknown(layer: dict, schema: type, prefix: str) -> None:
    known = {f.name: f for f in dataclasses.fields(schema)}
    for key, value in layer.items():
        if key not in known:
            raise UserError(f"unknown key '{prefix}{key}'{did_you_mean(str(key), list(known), prefix)}")
        if dataclasses.is_dataclass(known[key].type):
            if not isinstance(value, dict):
                names = "|".join(f.name for f in dataclasses.fields(known[key].type))
                raise UserError(
                    f"{prefix}{key}={value}: this is a section; set one of its keys, {prefix}{key}.<{names}>"
                )
            _refuse_unknown(value, known[key].type, f"{prefix}{key}.")
        elif isinstance(value, dict) and (not_text := [name for name in value if not isinstance(name, str)]):
            raise UserError(f"{prefix}{key} has the key {not_text[0]}: put it in quotes")
        elif "${" in str(value):  # OmegaConf would insert ${oc.env:HF_TOKEN}, and the report would show it
            raise UserError(f"{prefix}{key}={value}: ${{...}} is not allowed, a recipe holds plain values")
        elif "???" in (value if isinstance(value, list) else [value]):  # OmegaConf would leave the default
            raise UserError(f"{prefix}{key}={value}: ??? is no value, set one")


def _mismatch(layer: dict, key: str) -> str:
    """The message for a value of the wrong type at `key`, which may be an item's, such as `stages[0]`."""
    key = key or _mapping_for_list(layer, Recipe)  # omegaconf names no key for these
    value, wanted = layer, Recipe
    for part in key.partition("[")[0].split("."):
        value, wanted = value[part], next(f.type for f in dataclasses.fields(wanted) if f.name == part)
    if get_origin(wanted) is list and not isinstance(value, list):
        return f"{key} is a list: set '{key}=[{value}]'"
    alternatives = [wanted] if get_origin(wanted) is dict else get_args(wanted) or [wanted]
    kinds = [KINDS[get_origin(kind) or kind] for kind in alternatives if kind is not NoneType]
    return f"{key}={value}: {' or '.join(kinds)} is needed"


def _mapping_for_list(layer: dict, schema: type, prefix: str = "") -> str:
    """The first key that is set to a mapping and needs a list."""
    types = {f.name: f.type for f in dataclasses.fields(schema)}
    for key, value in layer.items():
        if isinstance(value, dict) and get_origin(types[key]) is list:
            return prefix + key
        if dataclasses.is_dataclass(types[key]) and (nested := _mapping_for_list(value, types[key], f"{key}.")):
            return nested
    return ""


def _expand_homes(recipe: Recipe) -> None:
    """Expands `~` in all settings that are paths, except data sets: those may end with a split (data/sources.py)."""
    for key in ("model", "run_dir", "mirror"):
        setattr(recipe, key, _expanded(key, getattr(recipe, key)))
    for key in REGISTRIES:
        section, _, name = key.partition(".")
        setattr(getattr(recipe, section), name, _expanded(key, value_of(recipe, key)))
    overrides = recipe.prune.overrides
    overrides |= {name: _expanded(f"prune.overrides[{name}]", value) for name, value in overrides.items()}
    recipe.evaluate.tasks = [_expanded("evaluate.tasks", name) for name in recipe.evaluate.tasks]


def _expanded(key: str, value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise UserError(
            f"{key}={value}: there is no such home folder; for a name that begins with ~ set {key}=./{value}"
        )
    return path
