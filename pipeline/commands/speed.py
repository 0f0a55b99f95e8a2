"""`espalier speed FOLDER [OTHER ...] [speed.KEY=VALUE ...] [out=FILE]`: what models cost on this machine's CPU.

Folders are ordinary or compact model folders. Load time, size, memory, prefill and decode speed of each, measured in turns, the
first being what the others are compared with; and the time of one product by shape of the matrices. `espalier keys speed` lists
the settings, docs/speed.md says what the figures mean. `out=FILE` keeps them as JSON.
"""

from pathlib import Path

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
    """Prints the tables. `UserError` for a folder that holds no model."""
    given = [argument for argument in arguments if argument != "debug=true"]
    folders = {text: Path(text).expanduser() for text in given if "=" not in text}
    outs = [text.removeprefix("out=") for text in given if text.startswith("out=")]
    if not folders:
        raise UserError(f"a model folder is needed, none given: {USAGE}")
    for folder in folders.values():
        _check(folder)
    typed = reader.typed([text for text in given if "=" in text and not text.startswith("out=")])
    recipe = reader.checked([{"model": next(iter(folders)), "stages": ["prune"]}, typed])
    found = measure(folders, recipe.speed, recipe.trust_remote_code)
    for number, name in enumerate(folders, 1):
        print(f"{number}  {name}: {found['models'][name]['format']}, {found['models'][name]['dtype']}")
    numbers = tuple(map(str, range(1, len(folders) + 1)))
    for header, rows in (costs.table(None, found, numbers), costs.products(found, numbers)):
        if rows:
            print()
            print("\n".join(lines([header, *rows])))
    print()
    for text in costs.circumstances(found):
        print(text)
    if outs:
        files.write_json(Path(outs[-1]).expanduser(), found)


def _check(folder: Path) -> None:
    """`UserError` for what can be seen of a folder without reading its weights."""
    if not folder.is_dir():
        raise UserError(f"{folder} is {'a file' if folder.exists() else 'not there'}: a model folder is needed")
    if (folder / MANIFEST).is_file():
        CompactFolder(folder)
    elif (folder / "config.json").is_file():
        loading.locate(str(folder), None)
    else:
        raise UserError(
            f"{folder} has neither config.json nor {MANIFEST}: a model folder is needed, such as RUN/prune/model or "
            "RUN/export/compact of a run"
        )
