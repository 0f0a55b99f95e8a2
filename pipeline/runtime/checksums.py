"""Owns a stage's stage.json: what the stage was made from, and a checksum of each file that it wrote, taken when the file
is whole and checked before it is used. stage.json holds a digest of itself, so a damaged one is as good as none.

Of a file over 64 MiB whose size and time of change are as recorded, only the blocks of `files.fingerprint` are read, so
that two models of 140 GB take seconds. Any other file is read whole. So damage is always seen, but for damage to a large
file that nothing wrote to, such as a bad disk's, which is seen where it meets a block.
"""

import hashlib
from pathlib import Path
from typing import Any

from pipeline.runtime import files

OWN = "stage.json"
DIGEST = "digest"  # of all else in it


def write(folder: Path, about: dict[str, Any]) -> None:
    files.write_json(folder / OWN, about | {DIGEST: files.digest(about)})


def read(folder: Path) -> dict[str, Any] | None:
    """None where there is no stage.json, or a damaged one."""
    about = files.read_json(folder / OWN) or {}
    return about if about.pop(DIGEST, None) == files.digest(about) else None


def record(folder: Path, *paths: Path) -> None:
    """Adds files of an unfinished stage, so that a resumed run knows them to be whole; forgets those that are gone."""
    about = read(folder) or {}
    known = {name: entry for name, entry in about.get("artefacts", {}).items() if (folder / name).exists()}
    known |= {_name(folder, path): _entry(path) for path in paths}
    write(folder, about | {"artefacts": known})


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    return (read(folder) or {}).get("artefacts", {})


def of(folder: Path, without: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Of all files of a stage but those in the folders `without`; what is recorded already is not read again."""
    known = recorded(folder)
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != OWN):
        name = str(path.relative_to(folder))
        if name.startswith(tuple(f"{left}/" for left in without)):
            continue
        found[name] = known[name] if name in known and _stamp(path) == _stamp_of(known[name]) else _entry(path)
    return found


def damaged(folder: Path) -> list[str]:
    """The recorded files that are missing, or are not what they were."""
    return [name for name, entry in recorded(folder).items() if not _is_as_recorded(folder / name, entry)]


def is_whole(folder: Path, path: Path) -> bool:
    """Whether a file of a stage is recorded, and is as recorded."""
    entry = recorded(folder).get(_name(folder, path))
    return entry is not None and _is_as_recorded(path, entry)


def _name(folder: Path, path: Path) -> str:
    # resolved, as Lightning does with some paths: a run_dir such as runs/tiny is not
    return str(path.resolve().relative_to(folder.resolve()))


def _entry(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    size, changed = _stamp(path)
    blocks = {"blocks": files.fingerprint([path])} if size > files.READ_WHOLE else {}
    return {"bytes": size, "changed_ns": changed, "sha256": sha256} | blocks


def _is_as_recorded(path: Path, entry: dict[str, Any]) -> bool:
    try:
        if path.stat().st_size != entry["bytes"]:
            return False
        if "blocks" in entry and _stamp(path) == _stamp_of(entry):
            return files.fingerprint([path]) == entry["blocks"]
        return _entry(path)["sha256"] == entry["sha256"]
    except OSError:
        return False


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _stamp_of(entry: dict[str, Any]) -> tuple[int, int]:
    return entry["bytes"], entry["changed_ns"]
