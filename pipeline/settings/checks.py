"""Checks of a recipe's values: ranges, choices, registries, and settings that exclude or need each other."""

import dataclasses
import difflib
import math
from typing import Any

from pipeline.registry import FINETUNE_METHODS, PATTERNS, REGISTRIES, value_of
from pipeline.registry.entry import is_file
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Finetune, Recipe

LARGEST = 2**31 - 1  # of integers; libraries fail late, or read beyond it


def check(recipe: Recipe) -> None:
    """Raises `UserError` for the first value that is wrong."""
    _check_section(recipe, "")
    _check_stages(recipe)
    _check_finetune(recipe.finetune)
    for key, registry in REGISTRIES.items():
        if problem := registry.entry(value_of(recipe, key)).problem(getattr(recipe, key.partition(".")[0])):
            raise UserError(problem)
    if recipe.prune.target == "dense" and recipe.calibration.activations == "dense":
        raise UserError(
            "prune.target=dense is for inputs that differ from the dense model's, which calibration.activations=dense uses: "
            "set prune.target=pruned, or calibration.activations=pruned"
        )
    for glob, value in recipe.prune.overrides.items():
        if value != "dense" and (problem := PATTERNS.entry(value, f"prune.overrides[{glob}]").problem(recipe.prune)):
            raise UserError(problem)


def _check_section(section: Any, prefix: str) -> None:
    for f in dataclasses.fields(section):
        key, value = prefix + f.name, getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            _check_section(value, f"{key}.")
        elif registry := f.metadata.get("registry"):
            registry.entry(value)  # raises for an unknown name, and for a file that cannot be loaded
        else:
            for item in value if isinstance(value, list) else [value]:
                _check_value(key, item, **{name: f.metadata.get(name) for name in ("low", "high", "choices", "words")})


def _check_value(
    key: str, value: Any, low: float | None, high: float | None, choices: tuple | None, words: tuple | None
) -> None:
    if value is None:
        return
    if words and isinstance(value, str):
        if value not in words:
            raise UserError(f"{key}={value} is neither a number nor {' or '.join(words)}")
        return
    if choices and value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f": did you mean '{close[0]}'?" if close else ""
        raise UserError(f"{key}={value} is not one of {', '.join(choices)}{hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value} is not a finite number")
    if high is None and isinstance(value, int) and value > LARGEST:
        high = LARGEST
    if low is not None and not low <= value <= (math.inf if high is None else high):
        allowed = f"{low} or more" if high is None else f"a value from {low} to {high}"
        raise UserError(f"{key}={value} is out of range: set {allowed}")


def _check_stages(recipe: Recipe) -> None:
    if not recipe.stages:
        raise UserError("stages=[] names nothing to do: set stages=[prune,finetune,evaluate,report], or some of them")
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
                f"{stage} needs {needed} in stages (a finished stage is not run again): set stages=[{needed},{stage},...]"
            )
    if "permute" in recipe.stages:
        if "prune" not in recipe.stages:
            raise UserError("permute orders channels for the prune stage: set stages=[permute,prune,...]")
        if is_file(recipe.prune.sparsity) or not PATTERNS.entry(recipe.prune.sparsity).is_grouped:
            raise UserError(
                f"the order of channels matters only for N of M, and prune.sparsity={recipe.prune.sparsity}: set "
                "prune.sparsity=2of4, or leave permute out of stages"
            )
    tuning = FINETUNE_METHODS.entry(recipe.finetune.method)
    if {"export", "finetune"} <= set(recipe.stages) and not tuning.leaves_model:
        raise UserError(
            f"export needs a sparse model, and finetune.method={recipe.finetune.method} writes only an adapter: set "
            f"finetune.method={Finetune().method}, or leave export out of stages"
        )
    if "report" in recipe.stages and "evaluate" not in recipe.stages:
        raise UserError(
            "report needs evaluate in stages (a finished stage is not run again): set stages=[...,evaluate,report]"
        )
    datasets = {"finetune.dataset": [recipe.finetune.dataset], "finetune.validation": [recipe.finetune.validation]}
    datasets |= {f"evaluate.{key}": getattr(recipe.evaluate, key) for key in ("perplexity", "accuracy")}
    for key, names in datasets.items():
        if "self" in names:
            raise UserError(f"{key}=self: text that the model writes is for calibration only: set {key} to a data set")


def _check_finetune(settings: Finetune) -> None:
    sharded = settings.strategy == "fsdp"
    if settings.quantize and sharded:
        raise UserError(
            "finetune.quantize and finetune.strategy=fsdp exclude each other, because quantised weights cannot be sharded: "
            "set finetune.strategy=ddp"
        )
    if sharded and settings.optimizer != "adamw":
        raise UserError(
            "finetune.strategy=fsdp does not support bitsandbytes' optimizers: set finetune.optimizer=adamw"
        )
    if settings.effective == "cached" and (settings.quantize or sharded or settings.dropout):
        raise UserError(
            "finetune.effective=cached needs whole, unquantised weights and no dropout: set finetune.effective=auto"
        )
    if settings.patience and not settings.validation:
        raise UserError("finetune.patience counts validations: set finetune.validation=<dataset>@<split>")
