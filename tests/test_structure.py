"""Rules of the code: imports go one way, the maths imports no trainer, and callbacks import no other callback."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# each package imports only those before it; only the stages use the callbacks
ORDER = (
    *("runtime", "registry", "sparsity", "settings", "models", "data", "tasks", "engine", "pruning", "recovery"),
    *("compact", "evaluation", "speed", "callbacks", "reporting", "stages", "api", "commands"),
)
FILES = sorted([*ROOT.glob("pipeline/*/*.py"), *ROOT.glob("callbacks/*.py")])
MATH = (
    *("sparsity/masks", "sparsity/patterns", "pruning/scores", "pruning/obs", "pruning/allocation", "engine/layerwise"),
    *("engine/observe", "engine/matrices", "evaluation/perplexity", "recovery/layer_fit"),
)
WIRING = ("lightning", "accelerate", "torch.distributed", "pytorch_lightning")


def imports(path: Path) -> set[str]:
    """The dotted names of all modules that a file imports anywhere, and of the names imported from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(name: str) -> str | None:
    first, *rest = name.split(".")
    return first if first == "callbacks" else rest[0] if first == "pipeline" and rest else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    parts = {part for name in imports(path) if (part := part_of(name))}
    later = {part for part in parts if ORDER.index(part) > ORDER.index(own)}
    assert not later, f"{own} imports {sorted(later)}, which stand on it"
    if "callbacks" in parts:
        assert own in ("callbacks", "stages")


def test_every_package_has_a_place_in_the_order():
    assert {path.parent.name for path in FILES} == set(ORDER)


@pytest.mark.parametrize("name", MATH)
def test_the_math_imports_no_trainer_and_no_processes(name):
    seen: set[str] = set()
    left = [ROOT / "pipeline" / f"{name}.py"]
    while left:  # includes indirect imports
        path = left.pop()
        for module in imports(path):
            assert not module.startswith(WIRING), f"{path.name} imports {module}"
            own = ROOT / f"{module.replace('.', '/')}.py"
            if own.is_file() and module not in seen:
                seen.add(module)
                left.append(own)


CALLBACKS = sorted((ROOT / "callbacks").glob("[!_]*.py"))


@pytest.mark.parametrize("path", CALLBACKS, ids=lambda path: path.stem)
def test_a_callback_is_short_and_imports_no_other(path):
    assert not {module for module in imports(path) if module.startswith("callbacks")}
    assert len(path.read_text().splitlines()) <= 65


def test_methods_import_no_trainer():
    plain = [*ROOT.glob("pipeline/pruning/*.py"), ROOT / "pipeline/recovery/methods.py"]
    for path in plain:
        assert not any(module.startswith(("lightning", "callbacks")) for module in imports(path)), path.name


def test_settings_registries_and_comparison_import_no_torch():
    modules = "pipeline.settings.reader, pipeline.registry, pipeline.reporting.compare"
    code = f"import sys, {modules}; assert not {{'torch', 'lightning', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
