"""Sharing of stages between the cells of a sweep: a finished stage with the same key is linked instead of run again."""

import os
import shutil
from pathlib import Path

from pipeline.runtime import checksums


def reuse(finished: Path, key: str) -> Path | None:
    """Links to `finished` the same stage of a sibling run folder, if one has this key; returns that run folder.

    The files are hard links if the file system has them: they take no space and outlive the other run. Sharing is safe,
    because no stage writes to finished files.
    """
    run_dir, stage = finished.parent, finished.name
    for sibling in sorted(run_dir.parent.glob("*")):
        content = checksums.read(sibling / stage) or {}
        if sibling == run_dir or content.get("key") != key or checksums.damaged(sibling / stage):
            continue
        work = run_dir / f".{stage}"
        shutil.rmtree(work, ignore_errors=True)
        try:
            shutil.copytree(sibling / stage, work, copy_function=_link)
        except OSError:  # it is being replaced, or the disk is full, which the stage will report
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
