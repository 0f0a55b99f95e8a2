"""stage.json: what a stage was made from, and a checksum of each file that it wrote, checked before the file is used.

stage.json holds a digest of itself; a damaged one counts as missing. If size and modification time of a file over 64 MiB are
as recorded, only the blocks of `files.fingerprint` are read, so that two models of 140 GB take seconds; all other files are
read whole. Damage that leaves the time of a large file unchanged (a bad disk) is therefore noticed only within those blocks.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.runtime import files

STAGE_FILE = "stage.json"
DIGEST = "digest"  # key of the digest of all other keys


def write(folder: Path, content: dict[str, Any]) -> None:
    write_with_digest(folder / STAGE_FILE, content)


def read(folder: Path) -> dict[str, Any] | None:
    """None if stage.json is missing or damaged."""
    return read_with_digest(folder / STAGE_FILE)


def write_with_digest(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON with a digest of itself."""
    files.write_json(path, content | {DIGEST: files.digest(content)})


def read_with_digest(path: Path) -> dict[str, Any] | None:
    """None if the file is missing or its digest does not match."""
    content = files.read_json(path) or {}
    return content if content.pop(DIGEST, None) == files.digest(content) else None


def record(folder: Path, *paths: Path) -> None:
    """Adds files of an unfinished stage, so that a resumed run can verify them; drops those that no longer exist."""
    content = read(folder) or {}
    known = {name: entry for name, entry in content.get("artefacts", {}).items() if (folder / name).exists()}
    known |= {_name(folder, path): _entry(path) for path in paths}
    write(folder, content | {"artefacts": known})


def note(folder: Path, path: Path, known: dict[Path, str]) -> None:
    """Writes the entries of some files of a stage to the separate file `path`, for `adopt`: several processes must not write
    stage.json at the same time. `known`: the SHA-256 of each file."""
    write_with_digest(
        path, {"artefacts": {_name(folder, file): _entry(file, sha256) for file, sha256 in known.items()}}
    )


def adopt(folder: Path, notes: Iterable[Path]) -> None:
    """Adds what `note` wrote to the entries of the stage; ignores damaged notes."""
    content, noted = read(folder) or {}, {}
    for path in notes:
        noted |= (read_with_digest(path) or {}).get("artefacts", {})
    if noted:
        write(folder, content | {"artefacts": content.get("artefacts", {}) | noted})


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    return (read(folder) or {}).get("artefacts", {})


def of_folder(folder: Path, without: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """The entries of all files of a stage, except in the folders `without`. Recorded files are not read again."""
    known = recorded(folder)
    entries = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != STAGE_FILE):
        name = str(path.relative_to(folder))
        if name.startswith(tuple(f"{skipped}/" for skipped in without)):
            continue
        entries[name] = known[name] if name in known and _stamp(path) == _stamp_of(known[name]) else _entry(path)
    return entries


def damaged(folder: Path) -> list[str]:
    """The recorded files that are missing or changed."""
    return [name for name, entry in recorded(folder).items() if not _is_as_recorded(folder / name, entry)]


def is_whole(folder: Path, path: Path) -> bool:
    """Whether a file of a stage is recorded and unchanged."""
    entry = recorded(folder).get(_name(folder, path))
    return entry is not None and _is_as_recorded(path, entry)


def _name(folder: Path, path: Path) -> str:
    # Lightning resolves some paths, and a relative run_dir is not resolved
    return str(path.resolve().relative_to(folder.resolve()))


def _entry(path: Path, sha256: str | None = None) -> dict[str, Any]:
    sha256 = sha256 or files.sha256(path)
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
