"""Owns what is said where a cache of Hugging Face cannot be written: the variable to set, and not the data set's name."""

import errno
import os
from pathlib import Path

from pipeline.runtime.errors import UserError

FULL_OR_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)


def folders() -> dict[str, Path]:
    """The variable that moves each cache, and where that is now."""
    import datasets
    from huggingface_hub import constants

    return {
        "HF_DATASETS_CACHE": Path(datasets.config.HF_DATASETS_CACHE),
        "HF_HUB_CACHE": Path(constants.HF_HUB_CACHE),
    }


def problem(error: BaseException) -> str | None:
    """What to do about an error, or one that it came of, that says that a cache cannot be written; None for any other."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, OSError) and error.errno in FULL_OR_CLOSED:
            for variable, folder in folders().items():
                if _is_below(error.filename, folder) or (error.filename is None and error.errno == errno.ENOSPC):
                    return _text(variable, folder, error)
        error = error.__cause__ or error.__context__
    return None


def is_missing(dataset: str) -> bool:
    """Whether a data set of the hub is surely out of reach: the hub may not be asked, and no cache has heard of it."""
    import datasets

    if not datasets.config.HF_HUB_OFFLINE:
        return False
    known = {
        "HF_DATASETS_CACHE": dataset.replace("/", "___"),
        "HF_HUB_CACHE": f"datasets--{dataset.replace('/', '--')}",
    }
    there = {path.name.lower() for folder in folders().values() for path in folder.glob("*")}
    return not {name.lower() for name in known.values()} & there


def check_datasets() -> None:
    """`UserError` where the cache of `datasets`, which also holds what is made of local files, cannot be written."""
    folder = folders()["HF_DATASETS_CACHE"]
    probe = folder / f".espalier-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        raise UserError(_text("HF_DATASETS_CACHE", folder, error)) from error


def _is_below(name: object, folder: Path) -> bool:
    return isinstance(name, str | os.PathLike) and Path(os.path.abspath(name)).is_relative_to(os.path.abspath(folder))


def _text(variable: str, folder: Path, error: OSError) -> str:
    return (
        f"the cache of Hugging Face cannot be written in {folder} ({error.strerror or error}): set {variable}=FOLDER, or "
        "HF_HOME=FOLDER for all of its caches, to one with room"
    )
