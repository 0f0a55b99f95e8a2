"""Owns what is known of finished runs side by side: where they lie, what tells them apart, whether they compare."""

from pathlib import Path
from typing import Any, NamedTuple

from pipeline.reporting import summary
from pipeline.reporting.summary import MODELS
from pipeline.runtime import checksums, files
from pipeline.runtime.errors import UserError

# the sections of the recipe that make each model of a run what it is, beside those of the models before it
SECTIONS = {
    "dense": ("model", "revision", "dtype", "attn_implementation", "pretrain"),
    "pruned": ("calibration", "prune", "seed"),
    "reconstructed": ("reconstruct",),
    "finetuned": ("finetune",),
}
OWN_PLACE = ("model", "prune.method", "prune.sparsity", "finetune.method")  # told by the rows' and columns' names
PROTOCOL = ("seq_len", "limit", "fewshot", "windows", "bos")


class Run(NamedTuple):
    folder: Path
    settings: dict[str, Any]  # the recipe, flat: "prune.method" and so on
    results: dict

    @property
    def pattern(self) -> str:
        return summary.pattern_name(self.settings["prune.sparsity"])


class Row(NamedTuple):
    """A model of one or several runs; `method` and `recovery` say the settings that tell it from others."""

    model: str
    state: str  # one of MODELS
    method: str
    recovery: str = ""

    @property
    def label(self) -> str:
        return self.method + self.recovery


def find(folders: list[Path]) -> list[Run]:
    """The runs in `folders`, each a run or a folder of runs, in the order of their table; `UserError` for none."""
    found = []
    for folder in folders:
        places = [folder] if is_run(folder) else [path for path in sorted(folder.glob("*")) if is_run(path)]
        if not places:
            raise UserError(f"{folder} is no finished run and holds none: looked for evaluate/results.json")
        for place in places:
            evaluate = place / "evaluate"
            about, results = checksums.read(evaluate), files.read_json(evaluate / "results.json")
            if not results or "results.json" in checksums.damaged(evaluate):
                raise UserError(f"{evaluate / 'results.json'} is damaged: repeat its command, which makes it again")
            if not about or "recipe" not in about:
                raise UserError(f"{evaluate / checksums.OWN} is damaged: repeat its command, which makes it again")
            found.append(Run(place, _flat(about["recipe"]), results))
    _check_texts(found)
    return found


def unfinished(folders: list[Path]) -> list[str]:
    """The runs in folders of runs that have begun and have no results."""
    places = [path for folder in folders if not is_run(folder) for path in sorted(folder.glob("*"))]
    return [place.name for place in places if not is_run(place) and any(place.glob(f"*/{checksums.OWN}"))]


def is_run(folder: Path) -> bool:
    return (folder / "evaluate" / "results.json").is_file()


def row_of(run: Run, state: str, runs: list[Run]) -> Row:
    """The row of a run's model. Runs of the same model are told apart by all settings that they differ in."""
    alike = [other for other in runs if other.settings["model"] == run.settings["model"]]
    told = {model: _differing(run, alike, sections) for model, sections in SECTIONS.items()}
    told["dense"] += [f"evaluate.{key}={run.results['protocol'].get(key)}" for key in differing_protocol(runs)]
    model = summary.short(run.settings["model"] or "A small Llama trained here")
    if state == "dense":
        return Row(model, state, f"dense{_bracketed(told['dense'])}")
    method = summary.METHODS.get(run.settings["prune.method"], Path(run.settings["prune.method"]).stem)
    recovery = ""
    tuning = summary.RECOVERIES[run.settings["finetune.method"]]
    for healed, name in (("reconstructed", "reconstruction"), ("finetuned", tuning)):
        if healed in run.results["models"] and MODELS.index(healed) <= MODELS.index(state):
            recovery += f" + {name}{_bracketed(told[healed])}"
    return Row(model, state, f"{method}{_bracketed(told['dense'] + told['pruned'])}", recovery)


def differing_protocol(runs: list[Run]) -> list[str]:
    return [key for key in PROTOCOL if len({run.results.get("protocol", {}).get(key) or None for run in runs}) > 1]


def _differing(run: Run, runs: list[Run], sections: tuple[str, ...]) -> list[str]:
    keys = [key for key in run.settings if key.partition(".")[0] in sections and key not in OWN_PLACE]
    keys = [key for key in keys if len({str(other.settings.get(key)) for other in runs}) > 1]
    return [f"{key}={run.settings[key]}" for key in keys]


def _bracketed(told: list[str]) -> str:
    return f" ({', '.join(told)})" if told else ""


def _check_texts(runs: list[Run]) -> None:
    """`UserError` where a data set's name stands for different texts."""
    seen: dict[str, tuple[str, Path]] = {}
    for run in runs:
        for name, told in (run.results.get("protocol", {}).get("datasets") or {}).items():
            text = told.rpartition(", ")[0]  # how many windows they make is the tokenizer's
            before, folder = seen.setdefault(name, (text, run.folder))
            if before != text:
                raise UserError(f"{name} is {before} in {folder} and {text} in {run.folder}: that does not compare")


def _flat(recipe: dict, prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in recipe.items():
        nested = isinstance(value, dict) and not prefix  # overrides, a dict of the user's, is one setting
        found |= _flat(value, f"{key}.") if nested else {prefix + key: value}
    return found
