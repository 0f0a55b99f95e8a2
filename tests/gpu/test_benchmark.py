"""benchmarks/gpu.py at a small size, on the CPU."""

import re
import sys

import pytest

from benchmarks import gpu


@pytest.mark.slow
def test_each_part_is_timed_against_its_floor(tmp_path, monkeypatch, capsys):
    size = "--shape 170m --layers 1 --samples 8 --seq-len 16 --steps 2 --parts evaluate compact --profile"
    monkeypatch.setitem(gpu.SHAPES, "170m", dict(gpu.SHAPES["170m"]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["gpu.py", *size.split(), "--work", str(tmp_path / "work")])
    gpu.main()
    output = capsys.readouterr().out
    rows = re.findall(r"\| ([a-z, ]+) \| ([0-9.e+-]+) \| ([0-9.e+-]+) \| ([0-9.]+) \|", output)
    assert [name for name, *_ in rows] == ["evaluate", "dense, a token", "compact, a token"]
    assert all(float(seconds) > 0 for _, seconds, _, _ in rows)
    assert re.search(r" s +\d+ calls  aten::", output)
    assert not (tmp_path / "work").exists()
