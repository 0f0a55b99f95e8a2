"""`python launch.py verify MODEL_FOLDER MASKS_FILE`: checks a model folder against a mask file."""

from pathlib import Path

from pipeline.models import loading, model_files
from pipeline.models.verification import check_matrices
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import sha256
from pipeline.settings.schema import Recipe
from pipeline.sparsity.masks import Masks

TRUST = "trust_remote_code=true"  # for a model folder with code of its own
USAGE = "run `python launch.py verify MODEL_FOLDER MASKS_FILE`"


def main(arguments: list[str]) -> None:
    """Prints the masked matrices. Raises `UserError` if a pruned weight is not zero or a mask breaks its pattern."""
    (folder, path), recipe = paths(arguments, 2, USAGE)
    masks = Masks.load(path)
    widths = [max((len(name) for name in masks), default=6), 16, max(map(len, [*masks.patterns.values(), "pattern"]))]
    row = f"{{:{widths[0]}}}  {{:>{widths[1]}}}  {{:>{widths[2]}}}  {{:>9}}  {{:>8}}  {{:>10}}"
    print(row.format("matrix", "shape", "pattern", "pruned, %", "zero, %", "violations"))
    problems, zeros, weights = [], 0, 0
    for matrix in check_matrices(folder, masks, recipe):
        entry, violation = masks.packed[matrix.name], matrix.violation
        count = violation.count if violation else 0
        shares = (f"{100 * part / matrix.weights:.2f}" for part in (entry.weights - entry.kept, matrix.zeros))
        print(row.format(matrix.name, " x ".join(map(str, entry.shape)), entry.pattern, *shares, count), flush=True)
        zeros, weights = zeros + matrix.zeros, weights + matrix.weights
        if problem := entry.problem():
            problems.append(f"the mask of {matrix.name}: {problem}")
        if violation:
            problems.append(str(violation))
    print(f"model {folder}: {model_files.identity(folder)}")
    print(f"masks {path}: sha256 {sha256(path)}")
    if problems:
        more = f" ({len(problems) - 1} more matrices have problems)" if len(problems) > 1 else ""
        raise UserError(f"{folder} does not match its masks: {problems[0]}{more}")
    print(f"{len(masks)} matrices, {weights:,} weights, {zeros / max(1, weights):.2%} zero, no violations")


def paths(arguments: list[str], count: int, usage: str) -> tuple[list[Path], Recipe]:
    """`count` paths, the first of a model folder, the second of a mask file, and a recipe for loading the model; raises
    `UserError` otherwise."""
    arguments, recipe = without_trust(arguments)
    if len(arguments) != count:
        raise UserError(f"{count} paths are needed, {len(arguments)} given: {usage}")
    folder, masks, *rest = (Path(argument).expanduser() for argument in arguments)
    if not folder.is_dir():
        raise UserError(f"no model folder {folder}: {usage}")
    if not masks.is_file():
        raise UserError(f"no mask file {masks}: {usage}")
    return [loading.locate(str(folder), None), masks, *rest], recipe


def without_trust(arguments: list[str]) -> tuple[list[str], Recipe]:
    """The arguments without `trust_remote_code=true`, and a recipe that has it if it was among them."""
    return [word for word in arguments if word != TRUST], Recipe(trust_remote_code=TRUST in arguments)
