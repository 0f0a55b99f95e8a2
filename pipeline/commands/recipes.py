"""`espalier recipes`: a table of the recipes. Imports no torch."""

import re

from pipeline.commands.table import lines
from pipeline.runtime.errors import UserError
from pipeline.settings import reader, recipe_files


def main(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"recipes takes no argument, not {arguments[0]}: start a run with `espalier recipe=NAME`")
    rows = [("recipe", "model", "sparsity", "stages")]
    for name in recipe_files.available():
        recipe = reader.unchecked(name)
        sparsity = re.sub(r"^(\d+)of(\d+)$", r"\1:\2", str(recipe.prune.sparsity))
        model = recipe.model or ("(trained here)" if "pretrain" in recipe.stages else "(set model=)")
        rows.append((name, model, sparsity, ", ".join(recipe.stages)))
    print("\n".join(lines(rows)))
