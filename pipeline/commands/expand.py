"""`python launch.py expand COMPACT_FOLDER TARGET`: writes the ordinary model folder that a compact one was exported from.

The tensors are bit-equal to the exported ones and have the names of the original files; the split into files may differ. From
int8 values the dequantised weights are written, which are not bit-equal, and a line says so.
"""

from pathlib import Path

from pipeline.commands.verify import without_trust
from pipeline.compact.expand import expand
from pipeline.runtime.errors import UserError

USAGE = "run `python launch.py expand COMPACT_FOLDER TARGET`"


def main(arguments: list[str]) -> None:
    """Writes TARGET, which must not exist and appears only when it is complete."""
    words, recipe = without_trust(arguments)
    given = [Path(word).expanduser() for word in words]
    if len(given) != 2:
        raise UserError(f"2 paths are needed, {len(given)} given: {USAGE}")
    folder, target = given
    note = "" if expand(folder, target, recipe) else " of dequantised int8 weights, not the original's bits"
    print(f"{target}: an ordinary model folder{note}")
