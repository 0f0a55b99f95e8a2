"""Owns the names, defaults and ranges of all settings: the schema, and how a recipe file becomes a `Recipe`.

defaults < `extends:` chain < recipe file < `key=value` on the command line. Imports nothing heavy, so that
a mistake is answered at once.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import UserError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
STAGES = ("pretrain", "prune", "reconstruct", "finetune", "evaluate", "report")


def setting(
    default: Any, low: float | None = None, high: float | None = None, choices: tuple | None = None, words: tuple = ()
) -> Any:
    """A field with its range (both ends allowed) and the words that may stand for a number, or its choices, checked by
    `_check`."""
    metadata = {"low": low, "high": high, "choices": choices, "words": words}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Pretrain:
    """Toy recipes only: the small Llama that is trained from scratch on the generated world."""

    hidden_size: int = setting(128, low=8)
    layers: int = setting(4, low=1)
    heads: int = setting(4, low=1)
    kv_heads: int = setting(2, low=1)
    intermediate_size: int = setting(352, low=8)
    max_positions: int = setting(256, low=8)
    seq_len: int = setting(128, low=8)
    steps: int = setting(400, low=1)
    batch_size: int = setting(32, low=1)
    lr: float = setting(3e-3, low=0)


@dataclass
class Calibration:
    dataset: str = "c4"
    config: str | None = None
    split: str = "train"
    samples: int = setting(128, low=1)
    seq_len: int = setting(2048, low=1)
    batch_size: int = setting(1, low=1)  # samples per forward pass


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", dict: "{name: value, ...}"}
METHODS = (
    *("wanda", "wanda_variant", "magnitude", "sparsegpt", "ria", "dsnot"),
    *("magnitude_seq", "magnitude_iter", "wanda_seq", "wanda_iter"),
)


@dataclass
class Prune:
    method: str = "wanda"  # one of METHODS, or a .py file with a LayerPruner of one's own
    sparsity: Any = "2of4"  # a ratio, or N kept of each M; see pipeline/patterns.py
    allocation: str = setting("uniform", choices=("uniform", "owl"))  # of a ratio, over the layers
    owl_outliers: float = setting(5.0, low=0)  # M: an outlier is above M times its layer's mean score
    owl_spread: float = setting(0.08, low=0, high=1)  # lambda: layers differ by at most twice this
    overrides: dict[str, Any] = field(default_factory=dict)  # glob of parameter names -> a sparsity, or dense
    damp: float = setting(0.01, low=0)  # of the mean of the Hessian's diagonal; sparsegpt, *_seq and *_iter
    hidden_states: str = setting("auto", choices=("auto", "gpu", "cpu"))  # where they wait between layers


@dataclass
class Reconstruct:
    dataset: str | None = None  # dataset[:config][@split]; null: as in calibration, so with samples and seq_len
    samples: int | None = setting(None, low=2)
    seq_len: int | None = setting(None, low=1)
    batch_size: int = setting(1, low=1)  # samples per forward pass
    accumulate: int = setting(8, low=1)  # forward passes per step, of all processes together
    epochs: int = setting(10, low=1)  # passes over the samples, for each layer
    lr: float = setting(0.03, low=0)  # of the root mean square of each parameter


@dataclass
class Finetune:
    method: str = setting(
        "lora", choices=("lora", "full", "plain_lora")
    )  # plain_lora: a baseline, kept apart, not sparse
    dataset: str = "c4"
    config: str | None = None
    split: str = "train"
    seq_len: int = setting(1024, low=2)
    max_steps: int = setting(1000, low=1)  # optimizer steps
    batch_size: int = setting(8, low=1)  # sequences per forward pass
    accumulate: int = setting(
        1, low=1
    )  # forward passes per step; batch_size * accumulate holds for any number of processes
    optimizer: str = setting("adamw", choices=("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"))
    lr: float = setting(1e-4, low=0)
    warmup: float = setting(0.03, low=0, high=1)  # share of max_steps
    weight_decay: float = setting(0.0, low=0)
    clip: float = setting(1.0, low=0)  # gradient norm; 0 is off
    rank: int = setting(8, low=1)
    alpha: float = setting(16.0, low=0)
    dropout: float = setting(0.0, low=0, high=0.99)
    bias: str = setting("none", choices=("none", "all", "lora_only"))  # which biases train beside a LoRA
    targets: list[str] = setting(["all"])  # last parts of module names, such as q_proj; all = every pruned matrix
    effective: str = setting("auto", choices=("auto", "cached", "recomputed"))  # LoRA's masked weights, see lora.py
    quantize: str | None = setting(None, choices=("nf4", "int8"))  # the frozen weights under a LoRA
    distill: float = setting(0.0, low=0, high=1)  # share of the loss that is the divergence from the dense model
    temperature: float = setting(1.0, low=0.01)  # of the distillation
    precision: str = setting("auto", choices=("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true"))
    strategy: str = setting("ddp", choices=("ddp", "fsdp"))  # whole weights on each process, or shared out over them
    checkpoint_activations: bool = False  # recompute a layer's activations in backward: less memory, a third more time
    checkpoint_every: int = setting(50, low=1)  # optimizer steps
    validation: str | None = None  # dataset[:config][@split] whose perplexity is measured while training
    validate_every: int = setting(100, low=1)  # optimizer steps
    validation_samples: int = setting(64, low=1)
    patience: int = setting(0, low=0)  # validations without progress before training stops at its best; 0 is off
    loggers: list[str] = setting([], choices=("tensorboard", "wandb"))  # beside metrics.csv


@dataclass
class Evaluate:
    perplexity: list[str] = setting(["wikitext2"])  # dataset[:config][@split]
    tasks: list[str] = setting(["boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"])
    seq_len: int = setting(2048, low=2)
    batch_size: int | str = setting(8, low=1, words=("auto",))  # auto: what the GPU has room for
    limit: int | None = setting(None, low=1)  # questions per task
    fewshot: int = setting(0, low=0)
    # where the model does not fit the GPU: stream = perplexity layer by layer, all else by accelerate's device map
    placement: str = setting("auto", choices=("auto", "whole", "stream", "device_map"))
    continuations: int = setting(3, low=0)  # prompts that every model continues, from the first perplexity data set
    continuation_tokens: int = setting(48, low=1)
    prompts: list[str] = setting([])  # instead of those from the data set


@dataclass
class Recipe:
    model: str | None = None  # hub id or path; null where a pretrain stage makes it
    revision: str | None = None
    dtype: str = setting("auto", choices=("auto", "float32", "bfloat16", "float16"))
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    run_dir: str | None = None  # runs/<recipe>
    seed: int = setting(0, low=0)
    stages: list[str] = setting(["prune", "finetune", "evaluate", "report"], choices=STAGES)
    mirror: str | None = None  # a folder laid out as the hub, read instead of it
    debug: bool = False  # tracebacks
    timeout_minutes: float = setting(30.0, low=0.05)  # that the processes wait for the slowest of them

    pretrain: Pretrain = field(default_factory=Pretrain)
    calibration: Calibration = field(default_factory=Calibration)
    prune: Prune = field(default_factory=Prune)
    reconstruct: Reconstruct = field(default_factory=Reconstruct)
    finetune: Finetune = field(default_factory=Finetune)
    evaluate: Evaluate = field(default_factory=Evaluate)


def load(argv: list[str]) -> Recipe:
    """`["recipe=NAME", "key=value", ...]` -> Recipe; without `recipe=`, the recipe is `tiny`."""
    for argument in argv:
        if "=" not in argument:
            raise UserError(f"cannot read argument '{argument}': settings are written key=value, such as recipe=tiny")
    given = [argument for argument in argv if not argument.startswith("recipe=")]
    names = [argument.removeprefix("recipe=") for argument in argv if argument.startswith("recipe=")] or ["tiny"]
    layers = [*_files(names[-1]), _from_dotlist(given)]
    for layer in layers:
        _refuse_unknown(layer, Recipe, "")
    merged = OmegaConf.structured(Recipe)
    for layer in layers:
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise UserError(_mismatch(layer, error.full_key)) from None
    recipe = OmegaConf.to_object(merged)
    recipe.run_dir = recipe.run_dir or f"runs/{Path(names[-1]).stem}"
    _check(recipe, "")
    _check_stages(recipe)
    return recipe


def plain(recipe: Recipe) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.structured(recipe))


def section(recipe: Recipe, key: str) -> Any:
    """The plain data (dict, list, number) of one top-level key."""
    return plain(recipe)[key]


def reconstruction_text(recipe: Recipe) -> Calibration:
    """What the reconstruct stage reads: its own settings, and the calibration's where it has none."""
    own = recipe.reconstruct
    text = Calibration(own.dataset) if own.dataset else recipe.calibration
    samples, seq_len = own.samples or recipe.calibration.samples, own.seq_len or recipe.calibration.seq_len
    return dataclasses.replace(text, samples=samples, seq_len=seq_len, batch_size=own.batch_size)


def available() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _files(name: str) -> list[dict]:
    """The recipe file and all that it extends, the base first. `name` is a recipe's name or a path to a .yaml."""
    layers: list[dict] = []
    seen: list[Path] = []
    folder = RECIPES
    while name:
        candidates = [folder / f"{name}.yaml", RECIPES / f"{name}.yaml", Path(name)]
        path = next((c.resolve() for c in candidates if c.suffix == ".yaml" and c.is_file()), None)
        if path is None:
            raise UserError(f"no recipe '{name}'{_did_you_mean(name, available())}: `ls recipes` lists what there is")
        if path in seen:
            raise UserError(f"recipe '{name}' extends itself: {' -> '.join(p.stem for p in [*seen, path])}")
        seen.append(path)
        try:
            layer = OmegaConf.to_container(OmegaConf.load(path))
        except Exception as error:  # yaml's own errors share no base class with omegaconf's
            raise UserError(f"{path} is not readable YAML: {error}") from None
        if not isinstance(layer, dict):
            raise UserError(f"{path} is not a recipe: it should hold key: value lines")
        name, folder = layer.pop("extends", None), path.parent
        layers.insert(0, layer)
    return layers


def _from_dotlist(arguments: list[str]) -> dict:
    given = OmegaConf.create()
    for argument in arguments:
        try:
            given.merge_with_dotlist([argument])
        except Exception:  # yaml's own say little of a value typed on a command line
            raise UserError(
                f"cannot read {argument}: is a bracket or a quote left open, or a key given both a value and keys of its own?"
            ) from None
    return OmegaConf.to_container(given)


def _mismatch(layer: dict, key: str) -> str:
    """What to type for a value of another type than that of its key, which may be an item's, such as `stages[0]`."""
    key = key or _where_a_list_is_needed(layer, Recipe)  # omegaconf names no key there
    value, wanted = layer, Recipe
    for part in key.partition("[")[0].split("."):
        value, wanted = value[part], next(f.type for f in dataclasses.fields(wanted) if f.name == part)
    if get_origin(wanted) is list and not isinstance(value, list):
        return f"{key} is a list: type '{key}=[{value}]'"
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
            raise UserError(f"unknown key '{prefix}{key}'{_did_you_mean(str(key), list(known), prefix)}")
        if dataclasses.is_dataclass(known[key].type):
            if not isinstance(value, dict):
                inside = "|".join(f.name for f in dataclasses.fields(known[key].type))
                raise UserError(
                    f"{prefix}{key}={value}: this is a section; set one of its keys, {prefix}{key}.<{inside}>"
                )
            _refuse_unknown(value, known[key].type, f"{prefix}{key}.")
        elif "${" in str(
            value
        ):  # OmegaConf would put in what it names: ${oc.env:HF_TOKEN}, and the report would show it
            raise UserError(f"{prefix}{key}={value}: ${{...}} is not allowed, a recipe holds plain values")


def _did_you_mean(name: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean '{prefix}{close[0]}'?" if close else f" (known: {', '.join(prefix + k for k in known)})"


def _check(section: Any, prefix: str) -> None:
    for f in dataclasses.fields(section):
        key, value = prefix + f.name, getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            _check(value, f"{key}.")
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
        raise UserError("no model: type model=<hub id or folder>, such as model=huggyllama/llama-7b")
    if recipe.model is not None and "pretrain" in recipe.stages:
        raise UserError(
            f"model={recipe.model} and a pretrain stage exclude each other: type stages=[prune,finetune,...]"
        )
    for stage in ("reconstruct", "finetune"):
        if stage in recipe.stages and "prune" not in recipe.stages:
            raise UserError(
                f"{stage} needs prune in stages (a finished stage is not run again): stages=[prune,{stage},...]"
            )
    if "report" in recipe.stages and "evaluate" not in recipe.stages:
        raise UserError("report needs evaluate in stages (a finished stage is not run again)")
    _check_finetune(recipe.finetune)
    method = recipe.prune.method
    if method not in METHODS and not method.endswith(".py"):
        raise UserError(f"prune.method={method} is not a method{_did_you_mean(method, list(METHODS))}")
    if method.endswith(".py") and not Path(method).is_file():
        raise UserError(f"prune.method={method}: no such file")
    from pipeline import patterns  # loads torch, so it comes last

    pattern = patterns.parse(recipe.prune.sparsity)
    if recipe.prune.allocation == "owl" and not isinstance(pattern, patterns.Unstructured):
        raise UserError(
            f"prune.allocation=owl shares out a ratio over the layers: type prune.sparsity={pattern.ratio:g}"
        )
    for glob, value in recipe.prune.overrides.items():
        if value != "dense":
            patterns.parse(value, f"prune.overrides[{glob}]")


def _check_finetune(settings: Finetune) -> None:
    lora = settings.method != "full"
    refused = {
        "finetune.quantize freezes the weights, which finetune.method=full trains: type finetune.method=lora": (
            settings.quantize and not lora
        ),
        "finetune.quantize and finetune.strategy=fsdp exclude each other: quantised weights are whole on each process": (
            settings.quantize and settings.strategy == "fsdp"
        ),
        "finetune.effective=cached needs whole, unquantised weights and no dropout: type finetune.effective=auto": (
            settings.effective == "cached" and (settings.quantize or settings.strategy == "fsdp" or settings.dropout)
        ),
        "finetune.patience counts validations: type finetune.validation=<dataset>@<split>": (
            settings.patience and not settings.validation
        ),
    }
    for message, holds in refused.items():
        if holds:
            raise UserError(message)
