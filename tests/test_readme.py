"""The commands, keys and examples in the README and the docs work."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from pipeline import api
from pipeline.commands.main import main
from pipeline.registry import PRUNE_METHODS
from pipeline.settings import reader, schema
from pipeline.sparsity.masks import Masks
from pipeline.stages import sweep
from tests.conftest import QUICK, ROOT, espalier

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def snippet(says: str) -> str:
    (code,) = (text for text in SNIPPETS if says in text)
    return code


def test_the_first_two_commands_are_those_of_ci():
    for ending in ("[^ ]*pytest -n 2", "launch launch.py"):
        assert len(re.findall(rf"^    python3 -m venv .* {ending}$", README, flags=re.M)) == 1
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)


def test_keys_and_methods_exist():
    table = README[README.index("| keys |") : README.index("More: [")]
    known = schema.plain(reader.load([]))["prune"].keys()
    for key in re.findall(r"`prune\.(\w+)`", table):
        assert key in known
    for method in PRUNE_METHODS.entries:
        assert f"`{method}`" in table


@pytest.mark.slow
def test_the_tables_of_scaling_are_those_of_its_script():
    printed = subprocess.run(
        [sys.executable, "benchmarks/scaling.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    page = (ROOT / "docs/scaling.md").read_text()
    assert printed.strip() and all(table.strip() in page for table in printed.split("\n\n"))


PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


@pytest.mark.parametrize("page", PAGES)
def test_settings_in_commands_of_readme_and_docs_are_valid(page):
    """Reads each command as the command line does, without the checks that need the model or a network."""
    for line in re.findall(r"^    .*launch\.py (.*=.*)$", PAGES[page], flags=re.M):
        if (
            " ..." in line
            or "NAME" in line
            or "sparcity" in line
            or "FOLDER" in line
            or line.startswith("export ")
            or "./my_" in line
        ):
            continue
        for cell in sweep.cells(shlex.split(line.rstrip("'\\"))).values():
            reader.load(cell)


def test_the_recipe_of_the_docs_and_its_variant_are_valid(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGES["recipes.md"], flags=re.S)
    (tmp_path / "my_recipe.yaml").write_text(text)
    whole, half = (reader.load([f"recipe={tmp_path}/my_recipe{ending}.yaml"]) for ending in ("", "_half"))
    assert (whole.prune.sparsity, half.prune.sparsity) == ("2of4", 0.5)
    assert whole.prune.method == half.prune.method == "sparsegpt"
    assert half.finetune.max_steps == reader.load(["recipe=llama7b_2of4"]).finetune.max_steps
    assert (whole.run_dir, half.run_dir) == ("runs/my_recipe", "runs/my_recipe_half")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_existing_files(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGES[page]):
        assert (folder / target).exists(), target


@pytest.mark.slow
def test_snippets_run_through_the_whole_pipeline(tiny_llama, tmp_path):
    mine = {"prune.method": snippet("PruneMethod"), "prune.sparsity": snippet("(Pattern)")}
    for setting, text in mine.items():
        assert len(text.splitlines()) <= 20
        (tmp_path / f"{setting}.py").write_text(text)
    chosen = [f"{setting}={tmp_path}/{setting}.py" for setting in mine]
    espalier(f"model={tiny_llama}", *QUICK, *chosen, f"run_dir={tmp_path}/run")
    masks = Masks.load(tmp_path / "run/prune/masks.safetensors")
    assert masks.sparsity() == pytest.approx(0.5)
    results = json.loads((tmp_path / "run/evaluate/results.json").read_text())["models"]
    assert results["finetuned"]["mask_violations"] == 0
    assert (tmp_path / "run/report/report.html").is_file()


@pytest.mark.slow
def test_commands_other_than_runs_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    section = README[README.index("## Command line") : README.index("## Python API")]
    commands = re.findall(r"^    espalier (.*)$", section, flags=re.M)
    assert len(commands) >= 5
    for line in commands:
        assert main(line.split()) == 0
        assert capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_api_example_runs(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "espalier", api)  # if another checkout is installed
    exec(snippet("import espalier").replace("runs/tiny/pretrain/model", str(tiny_llama)), {})
    model = AutoModelForCausalLM.from_pretrained("pruned")
    assert api.verify(model, api.Masks.load("masks.safetensors"))["sparsity"] >= 0.5
    assert "world_homes" in capsys.readouterr().out


def test_all_named_folders_exist():
    for name in ("pipeline", "callbacks", "recipes", "tests", "benchmarks", "examples"):
        assert (ROOT / name).is_dir()
        assert f"{name}/" in README
    assert not [path for path in ROOT.glob("*.py") if path.name != "launch.py"], Path.cwd()
