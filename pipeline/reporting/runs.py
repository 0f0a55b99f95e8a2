"""Finished runs side by side: where they are, in which settings they differ, whether they compare."""

from pathlib import Path
from typing import Any, NamedTuple

from pipeline import registry
from pipeline.reporting import costs, summary
from pipeline.reporting.summary import MODEL_STAGES, MODELS
from pipeline.runtime import checksums, files
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import MODEL as MODEL_KEYS
from pipeline.settings.schema import STAGES


def _sections() -> dict[str, tuple[str, ...]]:
    """The sections of the recipe that decide each model of a run, together with those of the models before it."""
    sections = {"dense": ("model", "revision", *MODEL_KEYS, "pretrain")}
    since: tuple[str, ...] = ()  # of the stages since the last model: those of permute decide the pruned model
    for stage in STAGES.values():
        since += stage.settings
        if stage.model:
            sections[stage.model] = tuple(key for key in since if all(key not in keys for keys in sections.values()))
            since = ()
    return sections


SECTIONS = _sections()
# shown by the names of rows and columns
IN_NAMES = ("model", *registry.PRUNING, registry.TARGET, "prune.sparsity", "finetune.method")
COSTS = ("export", "speed")
NOT_IN_COSTS = ("speed.repeats", "speed.prompt_lengths", "speed.batches")  # they do not change what `compare` shows
PROTOCOL = ("seq_len", "limit", "fewshot", "windows", "bos")


class Run(NamedTuple):
    folder: Path
    settings: dict[str, Any]  # the recipe, flat: "prune.method" and so on
    results: dict
    sizes: dict | None = None  # of the stage export, and of speed: `costs.read`
    speed: dict | None = None

    @property
    def pattern(self) -> str:
        return self.label("prune.sparsity")

    @property
    def pruned_with(self) -> str:
        permuted = " + permuted channels" if "permute" in self.settings["stages"] else ""
        return registry.pruned_with(self.settings, self.results.get("methods")) + permuted

    def label(self, key: str) -> str:
        """Of a setting that a registry of `pipeline.registry` lists."""
        return registry.label(key, self.settings[key], self.results.get("methods"))


class Row(NamedTuple):
    """A model of one or several runs; `method` and `recovery` name the settings in which it differs from others."""

    model: str
    state: str  # one of MODELS
    method: str
    recovery: str = ""

    @property
    def label(self) -> str:
        return self.method + self.recovery


def find(folders: list[Path]) -> list[Run]:
    """The runs in `folders`, each a run or a folder of runs; `UserError` for none, or where they do not compare."""
    found = []
    for folder in folders:
        places = [folder] if is_run(folder) else [path for path in sorted(folder.glob("*")) if is_run(path)]
        if not places:
            raise UserError(f"{folder} is no finished run and holds none: looked for evaluate/results.json")
        for evaluate in (place / "evaluate" for place in places):
            about, results = checksums.read(evaluate), files.read_json(evaluate / "results.json")
            whole = {"results.json": results and "results.json" not in checksums.damaged(evaluate)}
            whole[checksums.STAGE_FILE] = about and "recipe" in about
            if damaged := [name for name, good in whole.items() if not good]:
                raise UserError(f"{evaluate / damaged[0]} is damaged: repeat its command, which makes it again")
            found.append(_run(evaluate, about, results))
    _check_texts(found)
    return found


def _run(evaluate: Path, about: dict, results: dict) -> Run:
    """With what the stages export and speed found of the models that were evaluated; not of those of an earlier command.

    The settings of these two are read from their own records: the cells of a sweep over them share one evaluation, whose record
    has the settings of the first cell."""
    settings, folders = _flat(about["recipe"]), {}
    evaluated = summary.get(about, "made_from", "read") or {}
    for name in COSTS:
        folder = evaluate.with_name(name)
        content = checksums.read(folder) or {}
        read = summary.get(content, "made_from", "read") or {}
        if read and all(outcome == evaluated.get(stage) for stage, outcome in read.items() if stage != "export"):
            folders[name] = folder
            own = _flat(content.get("recipe") or {})
            settings |= {key: value for key, value in own.items() if key.partition(".")[0] == name}
    return Run(evaluate.parent, settings, results, *costs.read(folders))


def unfinished(folders: list[Path]) -> list[str]:
    """The runs in folders of runs that have begun and have no results."""
    places = [path for folder in folders if not is_run(folder) for path in sorted(folder.glob("*"))]
    return [place.name for place in places if not is_run(place) and any(place.glob(f"*/{checksums.STAGE_FILE}"))]


def is_run(folder: Path) -> bool:
    return (folder / "evaluate" / "results.json").is_file()


def row_of(run: Run, state: str, runs: list[Run]) -> Row:
    """The row of a run's model. Rows of the same model name all settings in which their runs differ."""
    alike = [other for other in runs if other.settings["model"] == run.settings["model"]]
    named = {model: _differing(run, alike, sections) for model, sections in SECTIONS.items()}
    if "pretrain" in run.settings["stages"]:
        named["dense"] += _differing(run, alike, ("seed",))
    named["dense"] += [f"evaluate.{key}={run.results['protocol'].get(key)}" for key in differing_protocol(runs)]
    model = _model_name(run, runs)
    if state == "dense":
        return Row(model, state, f"dense{_in_brackets(named['dense'])}")
    recovery = ""
    for recovered in MODELS[MODELS.index("pruned") + 1 : MODELS.index(state) + 1]:
        if recovered in run.results["models"]:
            name = summary.stage_label(MODEL_STAGES[recovered], run.label)
            recovery += f" + {name}{_in_brackets(named[recovered])}"
    return Row(model, state, f"{run.pruned_with}{_in_brackets(named['dense'] + named['pruned'])}", recovery)


def _model_name(run: Run, runs: list[Run]) -> str:
    """Short, unless another model in `runs` has the same short name: model folders are often called `model`."""
    model = run.settings["model"] or "A small Llama trained here"
    hashes = {_dense(other) for other in runs if summary.short(other.settings["model"] or "") == summary.short(model)}
    return model if len(hashes) > 1 else summary.short(model)


def _dense(run: Run) -> str:
    """What tells the dense models of two runs apart."""
    return summary.get(run.results, "models", "dense", "hash") or run.settings["model"]


def differing_costs(run: Run, runs: list[Run], *stages: str) -> str:
    """The settings of these stages in which the measured runs differ, for the name of a measure."""
    measured = [other for other in runs if other.sizes or other.speed]
    keys = [key for key in run.settings if key.partition(".")[0] in stages and key not in NOT_IN_COSTS]
    return "".join(
        f", {key}={run.settings[key]}" for key in keys if len({str(other.settings.get(key)) for other in measured}) > 1
    )


def differing_protocol(runs: list[Run]) -> list[str]:
    return [key for key in PROTOCOL if len({summary.get(run.results, "protocol", key) or None for run in runs}) > 1]


def _differing(run: Run, runs: list[Run], sections: tuple[str, ...]) -> list[str]:
    names = set(sections) - (STAGES.keys() - set(run.settings["stages"]))  # without stages that did not run
    alike = {key for key in registry.REGISTRIES if any(_has_label_of(run, other, key) for other in runs)}
    keys = [key for key in run.settings if key.partition(".")[0] in names and (key not in IN_NAMES or key in alike)]
    keys = [key for key in keys if len({str(other.settings.get(key)) for other in runs}) > 1]
    own = {key for key in registry.REGISTRIES if registry.is_file(run.settings.get(key))} - alike
    return [f"{key}={run.label(key) if key in own else run.settings[key]}" for key in keys]


def _has_label_of(run: Run, other: Run, key: str) -> bool:
    """Whether two files of the user, or one and a built-in entry, have the same label."""
    values = [each.settings.get(key) for each in (run, other)]
    differ = values[0] != values[1] and None not in values and any(map(registry.is_file, values))
    return differ and run.label(key) == other.label(key)


def _in_brackets(settings: list[str]) -> str:
    return f" ({', '.join(dict.fromkeys(settings))})" if settings else ""


def _check_texts(runs: list[Run]) -> None:
    """`UserError` where a data set's name stands for different texts."""
    seen: dict[str, tuple[str, Path]] = {}
    for run in runs:
        for name, source in (summary.get(run.results, "protocol", "datasets") or {}).items():
            text = source.rpartition(", ")[0]  # the number of windows depends on the tokenizer
            before, folder = seen.setdefault(name, (text, run.folder))
            if before != text:
                raise UserError(f"{name} is {before} in {folder} and {text} in {run.folder}: these cannot be compared")


def _flat(recipe: dict) -> dict[str, Any]:
    """One level deep: overrides, a dict of the user's, is one setting."""
    nested = {key: value if isinstance(value, dict) else {"": value} for key, value in recipe.items()}
    return {f"{key}.{name}".rstrip("."): value for key, values in nested.items() for name, value in values.items()}
