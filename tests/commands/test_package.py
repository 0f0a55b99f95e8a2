"""The installed package is complete, and the example runs with it from an empty folder."""

import configparser
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment

OPTIONS = configparser.ConfigParser()
OPTIONS.read(ROOT / "setup.cfg")


def test_every_package_is_listed_and_nothing_else():
    folders = {
        str(path.parent.relative_to(ROOT)) for top in ("pipeline", "callbacks") for path in ROOT.glob(f"{top}/**/*.py")
    }
    places = dict(line.split(" = ") for line in OPTIONS["options"]["package_dir"].split("\n") if line)
    listed = OPTIONS["options"]["packages"].split()
    assert {places.get(name, name.replace(".", "/")) for name in listed} == folders | {"recipes"}
    assert len(listed) == len(set(listed))


def test_all_non_python_files_are_package_data():
    patterns = OPTIONS["options.package_data"]["*"].split(", ")
    for path in ROOT.glob("pipeline/**/*"):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".py":
            assert f"*{path.suffix}" in patterns, path
    folders = {str(path.parent.relative_to(ROOT / "recipes")) for path in ROOT.glob("recipes/**/*") if path.is_file()}
    assert folders == {"."}


@pytest.fixture
def installed(tmp_path):
    """The folder for PYTHONPATH from which this checkout's API is imported as `espalier`."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path/espalier").symlink_to(ROOT / "pipeline/api")
    return os.pathsep.join([str(tmp_path / "path"), str(ROOT)])


@pytest.mark.slow
def test_the_example_runs_from_an_empty_folder(installed, tmp_path):
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, ROOT / "examples/prune_and_recover.py", "--steps", "5"],
        cwd=tmp_path / "empty",
        env=environment() | {"PYTHONPATH": installed},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "50.0% of the weights in 14 matrices are zero" in done.stdout
    assert not list((tmp_path / "empty").iterdir())
