"""Owns the names, defaults and ranges of all settings. Imports nothing heavy, so that a mistake is answered at once."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pipeline.registry import ALLOCATIONS, FINETUNE_METHODS, PATTERNS, PRUNE_METHODS
from pipeline.registry.entry import Registry, is_file


def setting(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple | None = None,
    words: tuple = (),
    registry: Registry | None = None,
    decides: bool = True,
) -> Any:
    """A field with its meaning, its range (both ends allowed) and the words that may stand for a number, or its choices, or
    the registry of its values; reader.py checks them. A setting that does not decide the result can be changed without
    running a stage again."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "words": words, "decides": decides}
    metadata["registry"] = registry
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Stage:
    """A line of the stage table: `pipeline/stages/<name>.py` has `run(recipe, folder, inputs)`, which writes `folder`, and
    where it can, `check(recipe)`, which answers before any work what is known to fail."""

    name: str
    reads: tuple[str, ...] | None  # the stages before it whose folders it is given; None is all
    settings: tuple[str, ...]  # the keys of the recipe that decide what it writes
    model: str | None = None  # what the model is called that it leaves
    # packages that only say how it looks (a model card): an edit there runs no long stage again
    display: tuple[str, ...] = ("pipeline/reporting",)


MODEL = ("dtype", "attn_implementation", "trust_remote_code")
BEFORE = ("pretrain", "prune", "reconstruct", "finetune")
TABLE = (
    Stage("pretrain", (), ("pretrain", "seed")),
    Stage("prune", BEFORE[:1], (*MODEL, "calibration", "prune", "seed"), "pruned"),
    Stage("reconstruct", BEFORE[:2], (*MODEL, "calibration", "reconstruct", "seed"), "reconstructed"),
    Stage("finetune", BEFORE[:3], (*MODEL, "finetune", "seed"), "finetuned"),
    Stage("export", BEFORE[1:], MODEL),
    Stage("evaluate", BEFORE, (*MODEL, "evaluate", "seed")),
    Stage("speed", (*BEFORE[1:], "export"), ("trust_remote_code", "speed")),
    Stage("report", None, ("model", "stages"), display=()),
)
STAGES = {stage.name: stage for stage in TABLE}  # in the order in which they run


@dataclass
class Pretrain:
    """Toy recipes only: the small Llama that is trained from scratch on the generated world."""

    hidden_size: int = setting(128, "width of the model", low=8)
    layers: int = setting(4, "decoder layers", low=1)
    heads: int = setting(4, "attention heads", low=1)
    kv_heads: int = setting(2, "heads of keys and values", low=1)
    intermediate_size: int = setting(352, "width of the MLPs", low=8)
    max_positions: int = setting(256, "tokens that a text may have", low=8)
    seq_len: int = setting(128, "tokens of a training window", low=8)
    steps: int = setting(400, "optimizer steps", low=1)
    batch_size: int = setting(32, "windows of a step", low=1)
    lr: float = setting(3e-3, "highest learning rate", low=0)


@dataclass
class Calibration:
    """The text that pruning looks at."""

    dataset: str = setting("c4", "data set[:config][@split], or a path; self: text that the dense model writes")
    config: str | None = setting(None, "configuration of the data set")
    split: str = setting("train", "split of the data set")
    column: str | None = setting(None, "the one with the text, where it is not called so; nested with dots: data.text")
    samples: int = setting(128, "windows of text", low=1)
    seq_len: int = setting(2048, "tokens of a window", low=1)
    batch_size: int = setting(1, "windows per forward pass", low=1)


@dataclass
class Prune:
    """Which weights are pruned."""

    method: str = setting("wanda", "which weights go, or a .py file with a method of your own", registry=PRUNE_METHODS)
    sparsity: Any = setting(
        "2of4", "share of the weights that go (0.5), N kept of each M (2of4), or a .py file", registry=PATTERNS
    )
    allocation: str = setting("uniform", "how a share is spread over the layers, or a .py file", registry=ALLOCATIONS)
    owl_outliers: float = setting(5.0, "OWL's M: an outlier is above M times its layer's mean score", low=0)
    owl_spread: float = setting(0.08, "OWL's lambda: layers differ by at most twice this", low=0, high=1)
    overrides: dict[str, Any] = setting({}, "{glob of parameter names: a sparsity, or dense}; the last match counts")
    damp: float = setting(0.01, "share of the Hessian's mean diagonal that is added: sparsegpt, *_seq, *_iter", low=0)
    hidden_states: str = setting(
        "auto", "where they wait between layers", choices=("auto", "gpu", "cpu"), decides=False
    )


@dataclass
class Reconstruct:
    """An optional stage: each pruned layer is trained alone, towards the dense model's hidden states."""

    dataset: str | None = setting(None, "data set[:config][@split]; null: the calibration's, with its samples")
    column: str | None = setting(None, "the one with the text")
    samples: int | None = setting(None, "windows of text; null: as in calibration", low=2)
    seq_len: int | None = setting(None, "tokens of a window; null: as in calibration", low=1)
    batch_size: int = setting(1, "windows per forward pass", low=1)
    accumulate: int = setting(8, "forward passes per step, of all processes together", low=1)
    epochs: int = setting(10, "passes over the samples, for each layer", low=1)
    lr: float = setting(0.03, "learning rate, relative to the root mean square of each parameter", low=0)


@dataclass
class Finetune:
    """The recovery of the pruned model."""

    method: str = setting("lora", "what trains, or a .py file with a method of your own", registry=FINETUNE_METHODS)
    dataset: str = setting("c4", "data set[:config][@split], or a path")
    config: str | None = setting(None, "configuration of the data set")
    split: str = setting("train", "split of the data set")
    column: str | None = setting(None, "the one with the text")
    loss: str = setting("all", "all tokens, or what the assistant of a chat says", choices=("all", "assistant"))
    seq_len: int = setting(1024, "tokens of a window", low=2)
    max_steps: int = setting(1000, "optimizer steps", low=1)
    batch_size: int = setting(8, "windows per forward pass", low=1)
    accumulate: int = setting(
        1, "forward passes per step; batch_size x accumulate holds for any number of processes", low=1
    )
    optimizer: str = setting(
        "adamw", "of bitsandbytes but for adamw", choices=("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
    )
    lr: float = setting(1e-4, "highest learning rate", low=0)
    warmup: float = setting(0.03, "share of max_steps in which the learning rate rises", low=0, high=1)
    weight_decay: float = setting(0.0, "of AdamW", low=0)
    clip: float = setting(1.0, "largest norm of the gradients; 0 is off", low=0)
    rank: int = setting(8, "of the LoRA", low=1)
    alpha: float = setting(16.0, "the LoRA is scaled by alpha / rank", low=0)
    dropout: float = setting(0.0, "on the inputs of the LoRA", low=0, high=0.99)
    bias: str = setting("none", "which biases train beside a LoRA", choices=("none", "all", "lora_only"))
    targets: list[str] = setting(["all"], "last parts of module names, such as q_proj; all: every pruned matrix")
    effective: str = setting(
        "auto",
        "the LoRA's masked weights, kept or made anew in each pass; both compute the same",
        choices=("auto", "cached", "recomputed"),
        decides=False,
    )
    quantize: str | None = setting(None, "the frozen weights under a LoRA", choices=("nf4", "int8"))
    distill: float = setting(0.0, "share of the loss that is the divergence from the dense model", low=0, high=1)
    temperature: float = setting(1.0, "of the distillation", low=0.01)
    precision: str = setting(
        "auto",
        "auto: bf16-mixed on a GPU, else 32-true",
        choices=("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true"),
    )
    strategy: str = setting("ddp", "whole weights on each process, or shared out over them", choices=("ddp", "fsdp"))
    checkpoint_activations: bool = setting(
        False, "recompute activations in backward: less memory, a third more time", decides=False
    )
    checkpoint_every: int = setting(50, "optimizer steps", low=1, decides=False)
    validation: str | None = setting(None, "data set[:config][@split] whose perplexity is measured while training")
    validate_every: int = setting(100, "optimizer steps", low=1)
    validation_samples: int = setting(64, "windows", low=1)
    patience: int = setting(0, "validations without progress before training stops at its best; 0 is off", low=0)
    loggers: list[str] = setting([], "beside metrics.csv", choices=("tensorboard", "wandb"), decides=False)


@dataclass
class Evaluate:
    """What is measured of the dense, the pruned and the fine-tuned model."""

    perplexity: list[str] = setting(["wikitext2"], "data sets, each [:config][@split]")
    column: str | None = setting(None, "the one with the text")
    windows: int | None = setting(None, "of each text, for a quick look; null is all, as in the papers", low=1)
    bos: bool = setting(False, "begin each window with BOS: not as in the papers, but Gemma-like models need it")
    tasks: list[str] = setting(
        ["boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"],
        "of lm-eval, or .yaml files of your own",
    )
    seq_len: int = setting(2048, "tokens of a window", low=2)
    batch_size: int | str = setting(8, "windows or questions; auto: what the GPU has room for", low=1, words=("auto",))
    limit: int | None = setting(None, "questions per task", low=1)
    fewshot: int = setting(0, "examples before a question", low=0)
    placement: str = setting(
        "auto",
        "of a model larger than the GPU; stream: perplexity layer by layer, the rest by a device map",
        choices=("auto", "whole", "stream", "device_map"),
    )
    continuations: int = setting(3, "prompts that every model continues, from the first perplexity data set", low=0)
    continuation_tokens: int = setting(48, "tokens of a continuation", low=1)
    prompts: list[str] = setting([], "instead of those from the data set")


@dataclass
class Speed:
    """What the ordinary and the compact model cost, measured on this machine's CPU."""

    repeats: int = setting(5, "measurements of each kind; a first one is not counted", low=1)
    prompt_lengths: list[int] = setting([128, 512], "tokens of the prompts of a prefill; none: []", low=1)
    new_tokens: int = setting(64, "tokens that are generated after a prompt of 16", low=1)
    batches: list[int] = setting([1, 4, 16], "texts that are generated at a time; none: []", low=1)
    threads: int | None = setting(None, "of the CPU; null: as many as the command has", low=1)


@dataclass
class Recipe:
    model: str | None = setting(None, "hub id or folder; null where a pretrain stage makes it")
    revision: str | None = setting(None, "branch, tag or commit of a hub id")
    dtype: str = setting("auto", "auto: that of the files", choices=("auto", "float32", "bfloat16", "float16"))
    attn_implementation: str | None = setting(None, "as transformers names it: eager, sdpa, ...")
    trust_remote_code: bool = setting(False, "run code that comes with the model")
    run_dir: str | None = setting(None, "where the run works; null: runs/<recipe>")
    seed: int = setting(0, "of all that is drawn", low=0)
    stages: list[str] = setting(["prune", "finetune", "evaluate", "report"], "what the run does", choices=tuple(STAGES))
    rerun: list[str] = setting([], "finished stages that run again; in no stage's key", choices=tuple(STAGES))
    mirror: str | None = setting(None, "a folder laid out as the hub, read instead of it")
    debug: bool = setting(False, "show tracebacks")
    timeout_minutes: float = setting(30.0, "how long the processes wait for the slowest of them", low=0.05)

    pretrain: Pretrain = field(default_factory=Pretrain)
    calibration: Calibration = field(default_factory=Calibration)
    prune: Prune = field(default_factory=Prune)
    reconstruct: Reconstruct = field(default_factory=Reconstruct)
    finetune: Finetune = field(default_factory=Finetune)
    evaluate: Evaluate = field(default_factory=Evaluate)
    speed: Speed = field(default_factory=Speed)


def plain(recipe: Recipe) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.structured(recipe))


def section(recipe: Recipe, key: str) -> Any:
    """The plain data (dict, list, number) of one top-level key, without what decides nothing."""
    data, value = plain(recipe)[key], getattr(recipe, key)
    if not dataclasses.is_dataclass(value):
        return data
    return {f.name: data[f.name] for f in dataclasses.fields(value) if f.metadata.get("decides", True)}


def own_code(settings: Any) -> list[Path]:
    """The Python files of the user's that a section (or a part of it) names."""
    if isinstance(settings, dict | list):
        parts = settings.values() if isinstance(settings, dict) else settings
        return sorted({path for part in parts for path in own_code(part)})
    return [Path(settings)] if isinstance(settings, str) and is_file(settings) else []


def reconstruction_text(recipe: Recipe) -> Calibration:
    """What the reconstruct stage reads: its own settings, and the calibration's where it has none."""
    own = recipe.reconstruct
    text = Calibration(own.dataset, column=own.column) if own.dataset else recipe.calibration
    samples, seq_len = own.samples or recipe.calibration.samples, own.seq_len or recipe.calibration.seq_len
    return dataclasses.replace(text, samples=samples, seq_len=seq_len, batch_size=own.batch_size)
