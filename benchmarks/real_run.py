"""Runs the rows of real.py, several at a time if asked."""

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from benchmarks.real_rows import Row

ROOT = Path(__file__).resolve().parent.parent
VALIDATION = "wikitext2:wikitext-2-v1@validation"
# each row is forked from a process that has imported everything, which takes as long as some rows take on a GPU
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pipeline.stages.runner"])


def command(row: Row, args: argparse.Namespace) -> list[str]:
    text = args.work / "validation.jsonl"
    common = {
        "model": args.model,
        "mirror": args.mirror,
        "run_dir": args.work / row.name,
        "stages": f"[{row.stages},evaluate]",
        "prune.sparsity": row.pattern,
        "calibration.dataset": VALIDATION,
        "calibration.samples": args.samples,
        "calibration.seq_len": 1024,
        "calibration.batch_size": 8,
        "finetune.dataset": text,
        "finetune.seq_len": 256,
        "finetune.batch_size": 2,
        "finetune.precision": "bf16-mixed",
        "evaluate.perplexity": "[wikitext2]",
        "evaluate.windows": 32,
        "evaluate.seq_len": 1024,
        "evaluate.batch_size": args.batch_size,
        "evaluate.continuations": 0,
        "evaluate.tasks": f"[{','.join(args.tasks if args.limit else ())}]",
        "evaluate.limit": args.limit or "null",
    }
    specific = [setting.format(text=text) for setting in row.settings]
    overridden = {setting.partition("=")[0] for setting in specific}
    return ["launch.py", *(f"{key}={value}" for key, value in common.items() if key not in overridden), *specific]


def run_all(chosen: list[Row], args: argparse.Namespace) -> list[str]:
    """Runs `args.jobs` rows at a time, each after the row that it continues. Returns the names of the failed rows."""
    failed, waiting, running = [], list(chosen), {}
    with ThreadPoolExecutor(args.jobs) as pool:
        while waiting or running:
            pending = {row.name for row in (*waiting, *running.values())}
            for row in [row for row in waiting if row.after not in pending][: args.jobs - len(running)]:
                waiting.remove(row)
                running[pool.submit(run, row, args)] = row
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                row = running.pop(done)
                failed += [] if done.result() else [row.name]
    return failed


def run(row: Row, args: argparse.Namespace) -> bool:
    folder = args.work / row.name
    for stage in row.linked:
        source = args.work / row.after / stage
        if source.is_dir() and not (folder / stage).exists():
            shutil.copytree(source, folder / stage, copy_function=os.link)
    arguments = command(row, args)
    print(shlex.join(["python", *arguments]), flush=True)
    record = folder / "command.json"
    if record.exists() and json.loads(record.read_text()) == arguments:
        return True
    folder.mkdir(exist_ok=True)
    process = SERVER.Process(target=launch, args=(arguments, folder / "output.txt" if args.jobs > 1 else None))
    process.start()
    process.join()
    if process.exitcode:
        return False
    record.write_text(json.dumps(arguments))
    return True


def launch(arguments: list[str], output: Path | None) -> None:
    """Makes this process the command. `output`: the file that its output is added to, instead of the terminal."""
    from pipeline.commands.main import leave, main

    os.chdir(ROOT)
    if output is not None:
        with open(output, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    sys.argv = arguments
    leave(main())
