"""benchmarks/gpu.py at a small size, on the CPU."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment


@pytest.mark.slow
def test_each_part_is_timed_against_its_floor(tmp_path):
    size = "--shape 170m --layers 1 --samples 8 --seq-len 16 --steps 2 --parts evaluate compact --profile"
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *size.split(), "--work", str(tmp_path / "work")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(r"\| ([a-z, ]+) \| ([0-9.e+-]+) \| ([0-9.e+-]+) \| ([0-9.]+) \|", done.stdout)
    assert [name for name, *_ in rows] == ["evaluate", "dense, a token", "compact, a token"]
    assert all(float(seconds) > 0 for _, seconds, _, _ in rows)
    assert re.search(r" s +\d+ calls  aten::", done.stdout)
    assert not (tmp_path / "work").exists()
