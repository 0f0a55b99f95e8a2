"""Runs the command in this process and classifies its outcome."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import launch
from tests import families

QUICK = (
    "recipe=llama7b_2of4",
    "dtype=float32",
    "calibration.samples=8",
    "calibration.seq_len=32",
    "calibration.batch_size=2",
    "finetune.seq_len=32",
    "finetune.max_steps=3",
    "finetune.batch_size=2",
    "finetune.lr=1e-2",
    "finetune.targets=[all]",
    "evaluate.tasks=[]",
    "evaluate.seq_len=32",
    "evaluate.batch_size=2",
    "evaluate.continuations=1",
    "evaluate.continuation_tokens=2",
)


class Command:
    """Runs of a few seconds on the model in `work`/dense, with random text, which is written there."""

    def __init__(self, work: Path) -> None:
        self.work = work
        files = {name: work / f"{name}.jsonl" for name in ("calibration", "evaluation")}
        for seed, file in enumerate(files.values()):
            rows = families.text(64 if seed == 0 else 8, 48, seed).tolist()
            file.write_text("".join(f"{json.dumps({'input_ids': row})}\n" for row in rows))
        self.settings = [
            *QUICK,
            f"model={work / 'dense'}",
            f"calibration.dataset={files['calibration']}",
            f"finetune.dataset={files['calibration']}",
            f"evaluate.perplexity=[{files['evaluation']}]",
        ]

    def typed(self, run_dir: Path, *settings: str) -> tuple[str, str]:
        """The outcome (ok, or refused or crash with the message), and the output."""
        sys.argv = ["launch.py", *self.settings, f"run_dir={run_dir}", *settings]
        with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as error:
            code = launch.main()
        if code == 0:
            return "ok", output.getvalue()
        lines = [line for line in error.getvalue().splitlines() if line.startswith("espalier: ")]
        line = " / ".join(lines).replace("espalier: ", "").replace(str(self.work), "WORK")
        kind = "crash" if "a bug in Espalier" in line else "refused"
        return f"{kind}: {line}{where(run_dir / 'traceback-0.txt')}", output.getvalue()


def where(trace: Path) -> str:
    """The place of a crash: the last line of our code, and the last line of all. Removes the file."""
    if not trace.exists():
        return ""
    found = re.findall(r'File "([^"]+)", line (\d+)', trace.read_text())
    trace.unlink()
    places = [f"{Path(file).parent.name}/{Path(file).name}:{line}" for file, line in found]
    ours = [place for place in places if place.startswith(("pipeline/", "callbacks/"))]
    return f" [{(ours or ['-'])[-1]} -> {places[-1]}]" if places else ""
