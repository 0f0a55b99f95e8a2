"""Owns what the cells of a sweep share: a finished stage of the same key is linked instead of made again."""

import os
import shutil
from pathlib import Path

from pipeline.runtime import checksums


def reuse(finished: Path, key: str) -> Path | None:
    """Puts at `finished` the same stage of a run in a folder beside, if there is one with this key; returns that run.

    The files are hard links where the file system has them, so they take no space and outlive the other run. They are
    never written to: a stage is made in a folder of its own and put in place whole.
    """
    run_dir, stage = finished.parent, finished.name
    for sibling in sorted(run_dir.parent.glob("*")):
        about = checksums.read(sibling / stage) or {}
        if sibling == run_dir or about.get("key") != key or checksums.damaged(sibling / stage):
            continue
        work = run_dir / f".{stage}"
        shutil.rmtree(work, ignore_errors=True)
        try:
            shutil.copytree(sibling / stage, work, copy_function=_link)
        except OSError:  # it is being replaced, or the disk is full: what is made here says so
            shutil.rmtree(work, ignore_errors=True)
            continue
        shutil.rmtree(finished, ignore_errors=True)
        work.rename(finished)
        return sibling
    return None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
