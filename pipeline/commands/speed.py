"""`espalier speed FOLDER ... [speed.KEY=VALUE ...] [out=FILE]`: measures models on this machine's GPU or CPU.

Folders are ordinary or compact model folders. Measures size, load time, memory, prefill and decode speed of each model, and the
time of one product by matrix shape. The other models are compared with the first one. `espalier keys speed` lists the settings;
docs/speed.md explains the figures. `speed.device=cpu` measures the CPU even if there is a GPU. `out=FILE` writes JSON.
"""

from pathlib import Path

from pipeline import tasks
from pipeline.commands.table import lines
from pipeline.compact.file_format import MANIFEST, CompactFolder
from pipeline.models import loading
from pipeline.reporting import costs
from pipeline.runtime import files
from pipeline.runtime.errors import UserError
from pipeline.settings import reader
from pipeline.speed.measure import measure

USAGE = "run `python launch.py speed FOLDER [OTHER ...]`"


def main(arguments: list[str]) -> None:
    """Prints the tables. Raises `UserError` if a folder holds no model."""
    folders = {argument: Path(argument).expanduser() for argument in arguments if "=" not in argument}
    outputs = [argument.removeprefix("out=") for argument in arguments if argument.startswith("out=")]
    settings = [argument for argument in arguments if "=" in argument and not argument.startswith("out=")]
    if not folders:
        raise UserError(f"a model folder is needed: {USAGE}")
    for folder in folders.values():
        _check(folder)
    recipe = reader.checked([{"model": next(iter(folders)), "stages": ["prune"]}, reader.typed(settings)])
    for name, folder in folders.items():
        if not tasks.of(loading.config(folder, recipe)).reads_text:
            raise UserError(f"{name} is an image classifier, and speed measures models that generate text")
    results = measure(folders, recipe.speed, recipe.trust_remote_code)
    for number, (name, model) in enumerate(results["models"].items(), 1):
        print(f"{number}  {name}: {model['format']}, {model['dtype']}")
    numbers = tuple(map(str, range(1, len(folders) + 1)))
    for header, rows in (costs.table(None, results, numbers), costs.products(results, numbers), costs.forms(results)):
        if rows:
            print()
            print("\n".join(lines([header, *rows])))
    print()
    for text in costs.circumstances(results):
        print(text)
    if outputs:
        files.write_json(Path(outputs[-1]).expanduser(), results)


def _check(folder: Path) -> None:
    """Raises `UserError` for errors that can be found without reading weights."""
    if not folder.is_dir():
        raise UserError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}: a model folder is needed")
    if (folder / MANIFEST).is_file():
        CompactFolder(folder)
    elif (folder / "config.json").is_file():
        loading.locate(str(folder), None)
    else:
        raise UserError(
            f"{folder} has neither config.json nor {MANIFEST}: a model folder is needed, such as RUN/prune/model or "
            "RUN/export/compact of a run"
        )
