"""Laws about the code itself."""

import ast

import pytest

from tests.conftest import ROOT

MATH = (
    "scores",
    "patterns",
    "obs",
    "perplexity",
    "observe",
    "masks",
    "allocation",
    "layerwise",
    "matrices",
    "layer_fit",
)
WIRING = ("lightning", "accelerate", "torch.distributed", "pytorch_lightning")


def imports(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("name", MATH)
def test_the_math_knows_no_trainer_and_no_processes(name):
    seen: set[str] = set()
    left = [ROOT / "pipeline" / f"{name}.py"]
    while left:  # what it imports of ours counts as well
        path = left.pop()
        for module in imports(path):
            assert not module.startswith(WIRING), f"{path.name} imports {module}"
            own = ROOT / f"{module.replace('.', '/')}.py"
            if own.is_file() and module not in seen:
                seen.add(module)
                left.append(own)


def test_callbacks_know_no_other_callback():
    """But for the methods, which are subclasses of one."""
    for path in (ROOT / "callbacks").glob("*.py"):
        own = {module for module in imports(path) if module.startswith("callbacks")}
        assert own <= ({"callbacks.pruner", "callbacks.pruner.LayerPruner"} if path.stem == "methods" else set()), (
            path.name
        )
