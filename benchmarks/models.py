"""Tests every family of causal language models in transformers as a tiny random model, and writes MODELS.md.

    python benchmarks/models.py [--jobs 2] [--json FILE] [FAMILY ...]     # 15 minutes for all of them on two cores

A family is a model type (llama), a variant (gemma4_text:moe) or a multimodal checkpoint (gemma3:whole), see
`tests/families.py`. With families on the command line only those are tested, and MODELS.md is not written. The checks are in
`benchmarks/model_checks.py`. Each family runs in a process forked from this one, which saves the seconds of imports.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from datetime import date
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
# no import may initialise CUDA, for forked processes could not use it then
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}

import torch
import transformers

from benchmarks.model_checks import check
from pipeline.stages import runner  # noqa: F401  imported once, before the forks
from tests.families import FAMILIES

VERDICTS = ("right", "refused", "wrong", "crash", "unbuilt")
COLUMNS = ("prune", "exact", "walk", "reload", "lora", "full", "stream")
LITTLE = 0.6  # families with a smaller share of pruned weights are marked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cuda", action="store_true", help="the command uses the GPU; MODELS.md is not written")
    parser.add_argument("--json", type=Path, help="file for all findings")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a family")
    asked = parser.parse_args()
    if asked.cuda:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    # the command would use all cores, which is slow for such small models
    torch.set_num_threads = lambda count: None
    gc.freeze()  # so that the command's garbage collections skip the imported modules
    with tempfile.TemporaryDirectory() as work:
        results = try_all(asked.families or list(FAMILIES), Path(work), asked.jobs, asked.timeout)
    counts = Counter(result["verdict"] for result in results)
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS))
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=1))
    if not asked.families and not asked.cuda:
        (ROOT / "benchmarks" / "MODELS.md").write_text(
            page(results, f"python benchmarks/models.py --jobs {asked.jobs}")
        )
    return int(counts["wrong"] + counts["crash"] > 0)


def try_all(names: list[str], work: Path, jobs: int, timeout: float) -> list[dict[str, Any]]:
    """The findings of each family, in order; prints a line when one is done."""
    found, waiting, running = {}, list(names), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name, fork = waiting.pop(0), multiprocessing.get_context("fork")
            folder = work / name.replace(":", "+")
            process = fork.Process(target=try_one, args=(name, folder))
            process.start()
            running[process.sentinel] = (name, folder, process, time.monotonic())
        wait(list(running), timeout=1)
        for key, (name, folder, process, started) in list(running.items()):
            late = time.monotonic() - started > timeout
            if process.is_alive() and not late:
                continue
            process.kill()
            process.join()
            del running[key]
            if (result := folder.with_suffix(".json")).exists():
                found[name] = json.loads(result.read_text())
            else:
                found[name] = crashed(name, f"not done in {timeout:.0f} s" if late else f"exit code {process.exitcode}")
            found[name]["verdict"] = verdict(found[name])
            print(f"{len(found)}/{len(names)} {line(found[name])}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    return [found[name] for name in names]


def try_one(name: str, folder: Path) -> None:
    """Checks a family in a forked process, with its output in a file."""
    folder.mkdir()
    with open(folder / "log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        found = check(name, folder)
    except Exception:
        found = crashed(name, f"of the benchmark itself: {traceback.format_exc()[-800:]}")
    found["seconds"] = round(time.process_time(), 1)  # CPU time, so that other work on the machine does not count
    folder.with_suffix(".json").write_text(json.dumps(found))


def crashed(name: str, why: str) -> dict[str, Any]:
    return {"family": name, "builds": "ok", "prune": f"crash: {why}", "seconds": 0.0}


def verdict(found: dict[str, Any]) -> str:
    if found["builds"] != "ok":
        return "unbuilt"
    cells = [found.get(column, "") for column in COLUMNS]
    for verdict, start in (("wrong", "WRONG"), ("crash", "crash"), ("refused", "refused")):
        if any(cell.startswith(start) for cell in cells):
            return verdict
    return "right" if found["coverage"] >= LITTLE or found["dense"] else "wrong"


def line(found: dict[str, Any]) -> str:
    findings = [f"{column} {found[column]}" for column in COLUMNS if column in found and found[column] != "ok"]
    if found["builds"] != "ok":
        findings = [found["builds"]]
    return f"{found['family']}: {found['verdict']}, {covered(found)} {found['seconds']} s  " + " | ".join(findings)


def covered(found: dict[str, Any]) -> str:
    if "coverage" not in found:
        return ""
    return f"{found['coverage']:.0%}" + (" (little)" if found["coverage"] < LITTLE else "")


def page(results: list[dict[str, Any]], command: str) -> str:
    counts = Counter(result["verdict"] for result in results)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "peft"))
    built = [result for result in results if result["verdict"] != "unbuilt"]
    lines = [
        "# Tested models",
        "",
        f"{len(results)} tested, {len(built)} can be built: "
        + ", ".join(f"**{counts[verdict]} {verdict}**" for verdict in VERDICTS if verdict != "unbuilt")
        + ".",
        "",
        f"Each is a tiny random model, pruned to 2:4 and fine-tuned by the command. `{command}`, {date.today()}, {libraries}, "
        f"Python {platform.python_version()}, {sum(result['seconds'] for result in results):.0f} s of one core.",
        "",
        "- **right**: all checks passed. **refused**: with a reason. **wrong**: silently. **crash**: a bug in Espalier.",
        "- pruned: the share of the weights in the layers' matrices; stays dense: as the run reports it.",
        "- walk: layer by layer equals the model's own forward bitwise; masked matrices are exactly 2 of 4, others unchanged.",
        "- reload: with `from_pretrained`, with the input's tensor names, and equal to the model during pruning.",
        "- LoRA, full: three steps, exactly sparse, and the files compute what the trained model does.",
        "- stream: the perplexity layer by layer equals that of the whole model.",
        "",
        "| family | verdict | pruned | stays dense | walk | reload | LoRA | full | stream | s |",
        "| --- | --- | ---: | --- | --- | --- | --- | --- | --- | ---: |",
    ]
    lines += [row(result) for result in built]
    lines += ["", "Not built, with transformers' error:", "", "| family | why |", "| --- | --- |"]
    lines += [f"| {r['family']} | {escaped(r['builds'])} |" for r in results if r["verdict"] == "unbuilt"]
    return "\n".join(lines) + "\n"


def row(found: dict[str, Any]) -> str:
    dense = "; ".join(
        f"{', '.join(f'`{name}`' for name in names)} ({why})" for why, names in found.get("dense", {}).items()
    )
    if found["prune"] != "ok":
        return (
            f"| {found['family']} | {found['verdict']} | | {escaped(found['prune'])} | | | | | | {found['seconds']} |"
        )
    walk = found["walk"] if found["exact"] == "ok" else found["exact"]
    cells = [walk, *(found[column] for column in ("reload", "lora", "full", "stream"))]
    texts = " | ".join(escaped(cell) for cell in cells)
    return f"| {found['family']} | {found['verdict']} | {covered(found)} | {escaped(dense)} | {texts} | {found['seconds']} |"


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
