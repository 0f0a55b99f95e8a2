"""`espalier recipes`: a table of the recipes that there are. Imports no torch."""

import re

from pipeline.commands.table import lines
from pipeline.runtime.errors import UserError
from pipeline.settings import reader


def main(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"recipes takes no argument, {arguments[0]} was given: a run is `espalier recipe=NAME`")
    rows = [("recipe", "model", "sparsity", "stages")]
    for name in reader.available():
        recipe = reader.named(name)
        sparsity = re.sub(r"^(\d+)of(\d+)$", r"\1:\2", str(recipe.prune.sparsity))
        rows.append((name, recipe.model or "(trained here)", sparsity, ", ".join(recipe.stages)))
    print("\n".join(lines(rows)))
