"""Errors about the Hugging Face caches: names the environment variable to set, where the libraries blame the data set."""

import errno
import os
from pathlib import Path

from pipeline.runtime.errors import UserError

NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)


def folders() -> dict[str, Path]:
    """The folder of each cache, by the environment variable that sets it."""
    import datasets
    from huggingface_hub import constants

    return {
        "HF_DATASETS_CACHE": Path(datasets.config.HF_DATASETS_CACHE),
        "HF_HUB_CACHE": Path(constants.HF_HUB_CACHE),
    }


def problem(error: BaseException) -> str | None:
    """The message for an error that a cache which cannot be written caused, directly or not; None for any other error."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
            for variable, folder in folders().items():
                if _is_below(error.filename, folder) or (error.filename is None and error.errno == errno.ENOSPC):
                    return _message(variable, folder, error)
        error = error.__cause__ or error.__context__
    return None


def is_missing(dataset: str) -> bool:
    """Whether a data set of the hub cannot be loaded: HF_HUB_OFFLINE is set and no cache holds it."""
    import datasets

    if not datasets.config.HF_HUB_OFFLINE:
        return False
    cached_names = {
        dataset.replace("/", "___"),  # in HF_DATASETS_CACHE
        f"datasets--{dataset.replace('/', '--')}",  # in HF_HUB_CACHE
    }
    cached = {path.name.lower() for folder in folders().values() for path in folder.glob("*")}
    return not {name.lower() for name in cached_names} & cached


def check_datasets() -> None:
    """Raises `UserError` if the cache of `datasets` cannot be written. Local files need it too."""
    folder = folders()["HF_DATASETS_CACHE"]
    probe = folder / f".espalier-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        raise UserError(_message("HF_DATASETS_CACHE", folder, error)) from error


def _is_below(name: object, folder: Path) -> bool:
    return isinstance(name, str | os.PathLike) and Path(os.path.abspath(name)).is_relative_to(os.path.abspath(folder))


def _message(variable: str, folder: Path, error: OSError) -> str:
    return (
        f"the cache of Hugging Face cannot be written in {folder} ({error.strerror or error}): set {variable}=FOLDER, or "
        "HF_HOME=FOLDER for all caches, to a writable folder with free space"
    )
