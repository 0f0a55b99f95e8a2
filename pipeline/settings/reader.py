"""Owns the way from a recipe file and the command line to a `Recipe`, and the answers to what is wrong in them.

defaults < `extends:` chain < recipe file < its variant, if one is chosen < `key=value` on the command line.
"""

import dataclasses
import difflib
import math
import os
import re
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.registry import FINETUNE_METHODS, PATTERNS, REGISTRIES, value_of
from pipeline.runtime.errors import UserError, did_you_mean
from pipeline.settings.schema import Finetune, Recipe

# a package of data where it is installed, the folder at the top in a checkout
RECIPES = next(path for up in (1, 2) if (path := Path(__file__).resolve().parents[up] / "recipes").is_dir())
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", dict: "{name: value, ...}"}


def load(argv: list[str]) -> Recipe:
    """`["recipe=NAME", "key=value", ...]` -> Recipe; without `recipe=`, the recipe is `tiny`."""
    given = [argument for argument in argv if not argument.startswith("recipe=")]
    names = [argument.removeprefix("recipe=") for argument in argv if argument.startswith("recipe=")] or ["tiny"]
    own = typed(given)
    return checked([*_layers(names[-1])[0], own], f"runs/{Path(names[-1]).stem}")


def typed(arguments: list[str]) -> dict:
    """`["key=value", ...]` as plain data, a layer for `checked`."""
    for argument in arguments:
        if "=" not in argument:
            raise UserError(f"cannot read argument '{argument}': settings are written key=value, such as recipe=tiny")
    return _from_dotlist(arguments)


def checked(layers: list[dict], run_dir: str = "runs/unnamed") -> Recipe:
    """Plain data on top of the defaults, a later layer on an earlier one; `UserError` for the first thing wrong in it."""
    recipe = _merged(layers)
    _expand_homes(recipe)
    recipe.run_dir = recipe.run_dir or run_dir
    _check(recipe, "")
    _check_stages(recipe)
    return recipe


def named(name: str) -> Recipe:
    """The recipe of that name as its files have it, unchecked: for a list, which must not load torch."""
    return _merged(_layers(name)[0])


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


def available() -> list[str]:
    """The names of all recipes of the project, and of their variants."""
    names = []
    for path in sorted(RECIPES.glob("*.yaml")):
        names += [path.stem, *(f"{path.stem}_{variant}" for variant in _read(path)[1])]
    return names


def _layers(name: str, folder: Path = RECIPES, seen: tuple[Path, ...] = ()) -> tuple[list[dict], dict[str, dict]]:
    """The recipe and all that it extends, the base first, and the variants that these define. `name` is a recipe's name or
    a path to a .yaml, with `_VARIANT` behind it where one is chosen: llama7b_2of4 is the variant 2of4 of llama7b.yaml."""
    here = [folder / f"{name}.yaml", RECIPES / f"{name}.yaml"]
    candidates = [Path(os.path.expanduser(name)).resolve()] if name.endswith(".yaml") else here
    if path := next((path.resolve() for path in candidates if path.is_file()), None):
        return _read(path, seen)
    for path in candidates:
        parts = path.stem.split("_")
        for i in range(len(parts) - 1, 0, -1):
            base, variant = path.with_stem("_".join(parts[:i])), "_".join(parts[i:])
            layers, variants = _read(base, seen) if base.is_file() else ([], {})
            if variant in variants:
                return [*layers, variants[variant]], variants
            if variants:
                raise UserError(
                    f"recipe '{base.stem}' has no variant '{variant}'{did_you_mean(variant, list(variants))}"
                )
    raise UserError(f"no recipe '{name}'{did_you_mean(name, available())}: `espalier recipes` lists what there is")


def _read(path: Path, seen: tuple[Path, ...] = ()) -> tuple[list[dict], dict[str, dict]]:
    """As `_layers`, of a file that is there."""
    if path in seen:
        raise UserError(f"recipe '{path.stem}' extends itself: {' -> '.join(p.stem for p in [*seen, path])}")
    try:
        layer = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # yaml's own errors share no base class with omegaconf's
        raise UserError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(layer, dict):
        raise UserError(f"{path} is not a recipe: it should hold key: value lines")
    base, own = layer.pop("extends", None), layer.pop("variants", None) or {}
    if not isinstance(own, dict) or not all(isinstance(variant, dict) for variant in own.values()):
        raise UserError(f"variants of {path}: write {{name: {{key: value}}}}")
    layers, variants = _layers(base, path.parent, (*seen, path)) if base else ([], {})
    return [*layers, layer], variants | {str(name): variant for name, variant in own.items()}


def _from_dotlist(arguments: list[str]) -> dict:
    given = OmegaConf.create()
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "prune.sparsity" or key.startswith("prune.overrides"):  # YAML would read 2:4 as 124
            value = re.sub(r"(?<![^\s,:{'\"])(\d+):(\d+)(?![^\s,}'\"])", r"\1of\2", value)
            argument = f"{key}={value}"
        try:
            if _is_word(key) and value not in ("", "null"):  # a path as it stands: YAML would cut it at " #"
                OmegaConf.update(given, key, _unquoted(value))
            else:
                given.merge_with_dotlist([argument])
        except Exception:  # yaml's own say little of a value typed on a command line
            raise UserError(
                f"cannot read {argument}: is a bracket or a quote left open, or a key given both a value and keys of its own?"
            ) from None
    return OmegaConf.to_container(given)


def _is_word(key: str) -> bool:
    """Whether the schema has text at `key`, and only that."""
    kind: Any = Recipe
    for part in key.split("."):
        fields = {f.name: f.type for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
        kind = fields.get(part)
    return kind is str or kind == str | None


def _unquoted(value: str) -> str:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else value


def _expand_homes(recipe: Recipe) -> None:
    """`~` in every setting that is a path. Those of data sets, which may have a split behind them, are for
    pipeline/data/sources.py."""
    recipe.model, recipe.run_dir, recipe.mirror = (
        _expanded(key, getattr(recipe, key)) for key in ("model", "run_dir", "mirror")
    )
    for key in REGISTRIES:
        section, _, name = key.partition(".")
        setattr(getattr(recipe, section), name, _expanded(key, value_of(recipe, key)))
    overrides = recipe.prune.overrides
    overrides |= {name: _expanded(f"prune.overrides[{name}]", it) for name, it in overrides.items()}
    recipe.evaluate.tasks = [_expanded("evaluate.tasks", name) for name in recipe.evaluate.tasks]


def _expanded(key: str, value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise UserError(f"{key}={value}: there is no such home folder; a name that begins with ~ is typed ./{value}")
    return path


def _mismatch(layer: dict, key: str) -> str:
    """What to set for a value of another type than that of its key, which may be an item's, such as `stages[0]`."""
    key = key or _where_a_list_is_needed(layer, Recipe)  # omegaconf names no key there
    value, wanted = layer, Recipe
    for part in key.partition("[")[0].split("."):
        value, wanted = value[part], next(f.type for f in dataclasses.fields(wanted) if f.name == part)
    if get_origin(wanted) is list and not isinstance(value, list):
        return f"{key} is a list: set '{key}=[{value}]'"
    one_of = [wanted] if get_origin(wanted) is dict else get_args(wanted) or [wanted]
    kinds = [KINDS[get_origin(kind) or kind] for kind in one_of if kind is not NoneType]
    return f"{key}={value}: {' or '.join(kinds)} is needed"


def _where_a_list_is_needed(layer: dict, schema: type, prefix: str = "") -> str:
    """The first key of a list that is given a mapping."""
    types = {f.name: f.type for f in dataclasses.fields(schema)}
    for key, value in layer.items():
        if isinstance(value, dict) and get_origin(types[key]) is list:
            return prefix + key
        if dataclasses.is_dataclass(types[key]) and (found := _where_a_list_is_needed(value, types[key], f"{key}.")):
            return found
    return ""


def _refuse_unknown(layer: dict, schema: type, prefix: str) -> None:
    known = {f.name: f for f in dataclasses.fields(schema)}
    for key, value in layer.items():
        if key not in known:
            raise UserError(f"unknown key '{prefix}{key}'{did_you_mean(str(key), list(known), prefix)}")
        if dataclasses.is_dataclass(known[key].type):
            if not isinstance(value, dict):
                inside = "|".join(f.name for f in dataclasses.fields(known[key].type))
                raise UserError(
                    f"{prefix}{key}={value}: this is a section; set one of its keys, {prefix}{key}.<{inside}>"
                )
            _refuse_unknown(value, known[key].type, f"{prefix}{key}.")
        elif isinstance(value, dict) and (strange := [name for name in value if not isinstance(name, str)]):
            raise UserError(f"{prefix}{key} has the key {strange[0]}: put it in quotes")
        elif "${" in str(
            value
        ):  # OmegaConf would put in what it names: ${oc.env:HF_TOKEN}, and the report would show it
            raise UserError(f"{prefix}{key}={value}: ${{...}} is not allowed, a recipe holds plain values")


def _check(section: Any, prefix: str) -> None:
    for f in dataclasses.fields(section):
        key, value = prefix + f.name, getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            _check(value, f"{key}.")
            continue
        if registry := f.metadata.get("registry"):
            registry.entry(value)  # answers an unknown name, and a file that does not load
            continue
        low, high, choices, words = (f.metadata.get(name) for name in ("low", "high", "choices", "words"))
        for item in value if isinstance(value, list) else [value]:
            if words and isinstance(item, str):
                if item not in words:
                    raise UserError(f"{key}={item} is neither a number nor {' or '.join(words)}")
                continue
            if choices and item is not None and item not in choices:
                close = difflib.get_close_matches(str(item), choices, n=1)
                hint = f": did you mean '{close[0]}'?" if close else ""
                raise UserError(f"{key}={item} is not one of {', '.join(choices)}{hint}")
            if isinstance(item, float) and not math.isfinite(item):
                raise UserError(f"{key}={item} is not a finite number")
            if low is not None and item is not None and not low <= item <= (math.inf if high is None else high):
                where = f"at {low} or above" if high is None else f"between {low} and {high}"
                raise UserError(f"{key}={item} is out of range: it lies {where}")


def _check_stages(recipe: Recipe) -> None:
    if recipe.model is None and "pretrain" not in recipe.stages:
        raise UserError("no model: set model=<hub id or folder>, such as model=huggyllama/llama-7b")
    if recipe.model is not None and "pretrain" in recipe.stages:
        raise UserError(
            f"model={recipe.model} and a pretrain stage exclude each other: set stages=[prune,finetune,...]"
        )
    if absent := [stage for stage in recipe.rerun if stage not in recipe.stages]:
        raise UserError(f"rerun={absent[0]}: it is not in stages=[{','.join(recipe.stages)}]")
    for stage, needed in (("reconstruct", "prune"), ("finetune", "prune"), ("export", "prune"), ("speed", "export")):
        if stage in recipe.stages and needed not in recipe.stages:
            raise UserError(
                f"{stage} needs {needed} in stages (a finished stage is not run again): stages=[{needed},{stage},...]"
            )
    tuning = FINETUNE_METHODS.entry(recipe.finetune.method)
    if {"export", "finetune"} <= set(recipe.stages) and not tuning.leaves_model:
        raise UserError(
            f"export needs a sparse model, and finetune.method={recipe.finetune.method} leaves an adapter beside one: set "
            f"finetune.method={Finetune().method}, or leave export out of stages"
        )
    if "report" in recipe.stages and "evaluate" not in recipe.stages:
        raise UserError("report needs evaluate in stages (a finished stage is not run again)")
    texts = {"finetune.dataset": [recipe.finetune.dataset], "finetune.validation": [recipe.finetune.validation]}
    for key, names in (texts | {"evaluate.perplexity": recipe.evaluate.perplexity}).items():
        if "self" in names:
            raise UserError(
                f"{key}=self: what the model itself writes is text to calibrate by only: choose another text"
            )
    _check_finetune(recipe.finetune)
    for key, registry in REGISTRIES.items():
        if problem := registry.entry(value_of(recipe, key)).problem(getattr(recipe, key.partition(".")[0])):
            raise UserError(problem)
    for glob, value in recipe.prune.overrides.items():
        if value != "dense":
            PATTERNS.entry(value, f"prune.overrides[{glob}]")


def _check_finetune(settings: Finetune) -> None:
    refused = {
        "finetune.quantize and finetune.strategy=fsdp exclude each other: quantised weights are whole on each process": (
            settings.quantize and settings.strategy == "fsdp"
        ),
        "finetune.strategy=fsdp shares out what bitsandbytes' optimizers need whole: set finetune.optimizer=adamw": (
            settings.strategy == "fsdp" and settings.optimizer != "adamw"
        ),
        "finetune.effective=cached needs whole, unquantised weights and no dropout: set finetune.effective=auto": (
            settings.effective == "cached" and (settings.quantize or settings.strategy == "fsdp" or settings.dropout)
        ),
        "finetune.patience counts validations: set finetune.validation=<dataset>@<split>": (
            settings.patience and not settings.validation
        ),
    }
    for message, holds in refused.items():
        if holds:
            raise UserError(message)
