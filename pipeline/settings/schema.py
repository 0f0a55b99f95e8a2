"""Owns the names, defaults and ranges of all settings. Imports nothing heavy, so that a mistake is answered at once."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

STAGES = ("pretrain", "prune", "reconstruct", "finetune", "evaluate", "report")


def setting(
    default: Any,
    low: float | None = None,
    high: float | None = None,
    choices: tuple | None = None,
    words: tuple = (),
    decides: bool = True,
) -> Any:
    """A field with its range (both ends allowed) and the words that may stand for a number, or its choices, checked by
    recipe_reader.py. What does not decide what comes out can be changed without running a stage again."""
    metadata = {"low": low, "high": high, "choices": choices, "words": words, "decides": decides}
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
    dataset: str = "c4"  # or self: text that the dense model writes
    config: str | None = None
    split: str = "train"
    column: str | None = None  # with the text, where it is not called so; of nested ones, with dots: data.text
    samples: int = setting(128, low=1)
    seq_len: int = setting(2048, low=1)
    batch_size: int = setting(1, low=1)  # samples per forward pass


METHODS = (
    *("wanda", "wanda_variant", "magnitude", "sparsegpt", "ria", "dsnot"),
    *("magnitude_seq", "magnitude_iter", "wanda_seq", "wanda_iter"),
)


@dataclass
class Prune:
    method: str = "wanda"  # one of METHODS, or a .py file with a LayerPruner of one's own
    sparsity: Any = "2of4"  # a ratio, or N kept of each M; see pipeline/sparsity/patterns.py
    allocation: str = setting("uniform", choices=("uniform", "owl"))  # of a ratio, over the layers
    owl_outliers: float = setting(5.0, low=0)  # M: an outlier is above M times its layer's mean score
    owl_spread: float = setting(0.08, low=0, high=1)  # lambda: layers differ by at most twice this
    overrides: dict[str, Any] = field(default_factory=dict)  # glob of parameter names -> a sparsity, or dense
    damp: float = setting(0.01, low=0)  # of the mean of the Hessian's diagonal; sparsegpt, *_seq and *_iter
    hidden_states: str = setting(
        "auto", choices=("auto", "gpu", "cpu"), decides=False
    )  # where they wait between layers


@dataclass
class Reconstruct:
    dataset: str | None = None  # dataset[:config][@split]; null: as in calibration, so with samples and seq_len
    column: str | None = None
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
    column: str | None = None
    loss: str = setting("all", choices=("all", "assistant"))  # on all tokens, or on what the assistant of a chat says
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
    # the LoRA's masked weights, see masked_linear.py; both forms compute the same
    effective: str = setting("auto", choices=("auto", "cached", "recomputed"), decides=False)
    quantize: str | None = setting(None, choices=("nf4", "int8"))  # the frozen weights under a LoRA
    distill: float = setting(0.0, low=0, high=1)  # share of the loss that is the divergence from the dense model
    temperature: float = setting(1.0, low=0.01)  # of the distillation
    precision: str = setting("auto", choices=("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true"))
    strategy: str = setting("ddp", choices=("ddp", "fsdp"))  # whole weights on each process, or shared out over them
    # recompute a layer's activations in backward: less memory, a third more time
    checkpoint_activations: bool = setting(False, decides=False)
    checkpoint_every: int = setting(50, low=1, decides=False)  # optimizer steps
    validation: str | None = None  # dataset[:config][@split] whose perplexity is measured while training
    validate_every: int = setting(100, low=1)  # optimizer steps
    validation_samples: int = setting(64, low=1)
    patience: int = setting(0, low=0)  # validations without progress before training stops at its best; 0 is off
    loggers: list[str] = setting([], choices=("tensorboard", "wandb"), decides=False)  # beside metrics.csv


@dataclass
class Evaluate:
    perplexity: list[str] = setting(["wikitext2"])  # dataset[:config][@split]
    column: str | None = None
    windows: int | None = setting(None, low=1)  # of each text, for a quick look; null is all, as in the papers
    bos: bool = False  # begin each window with BOS: not as in the papers, but Gemma-like models need it
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
    rerun: list[str] = setting([], choices=STAGES)  # stages that run again though they are done; in no stage's key
    mirror: str | None = None  # a folder laid out as the hub, read instead of it
    debug: bool = False  # tracebacks
    timeout_minutes: float = setting(30.0, low=0.05)  # that the processes wait for the slowest of them

    pretrain: Pretrain = field(default_factory=Pretrain)
    calibration: Calibration = field(default_factory=Calibration)
    prune: Prune = field(default_factory=Prune)
    reconstruct: Reconstruct = field(default_factory=Reconstruct)
    finetune: Finetune = field(default_factory=Finetune)
    evaluate: Evaluate = field(default_factory=Evaluate)


def plain(recipe: Recipe) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.structured(recipe))


def section(recipe: Recipe, key: str) -> Any:
    """The plain data (dict, list, number) of one top-level key, without what decides nothing."""
    data, value = plain(recipe)[key], getattr(recipe, key)
    if not dataclasses.is_dataclass(value):
        return data
    return {f.name: data[f.name] for f in dataclasses.fields(value) if f.metadata.get("decides", True)}


def own_code(settings: Prune) -> list[Path]:
    """The Python files of the user's that prune."""
    named = (settings.method, settings.sparsity, *settings.overrides.values())
    return sorted({Path(str(name)) for name in named if str(name).endswith(".py")})


def reconstruction_text(recipe: Recipe) -> Calibration:
    """What the reconstruct stage reads: its own settings, and the calibration's where it has none."""
    own = recipe.reconstruct
    text = Calibration(own.dataset, column=own.column) if own.dataset else recipe.calibration
    samples, seq_len = own.samples or recipe.calibration.samples, own.seq_len or recipe.calibration.seq_len
    return dataclasses.replace(text, samples=samples, seq_len=seq_len, batch_size=own.batch_size)
