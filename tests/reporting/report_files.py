"""Runs with made-up results, their reports, and a parser that checks a page."""

import csv
import html.parser
import io
import json
from pathlib import Path

from rich.console import Console

from pipeline.reporting import report
from pipeline.runtime import checksums
from pipeline.settings import reader
from pipeline.stages import report as stage

MATRICES = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "mlp.experts.down_proj[0]", "mlp.experts.down_proj[1]")


def write_stage(root: Path, name: str, seconds: float = 12.5) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    about = {
        "stage": name,
        "seconds": seconds,
        "finished": "2030-01-02T03:04:05+00:00",
        "processes": 2,
        "memory_gib": 3.21,
        "machine": "2 x Abacus 9000, 16 cores, 64 GiB",
        "system": "Python 3.12.1, Linux 6.1",
        "versions": {"torch": "2.13.0"},
        "made_from": {},
    }
    checksums.write(folder, about)
    return folder


def write_csv(path: Path, header: str, rows: list) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])


def write_run(root: Path, results: dict) -> dict[str, Path]:
    """Writes a finished run with the stages of the models in `results`."""
    inputs = {}
    if "pruned" in results["models"]:
        inputs["prune"] = write_stage(root, "prune", 3725)
        header = "layer,seconds,tokens_per_second,sparsity,relative_output_error,memory_gib,remark"
        rows = [[layer, 1.5, 900, 0.5, 0.1 + layer / 50, 2, "text"] for layer in range(4)]
        write_csv(inputs["prune"] / "layers.csv", header, rows)
        rows = [
            [layer, f"model.layers.{layer}.{matrix}", 0.5, 0.1 + layer / 50 + place / 100]
            for layer in range(4)
            for place, matrix in enumerate(MATRICES)
        ]
        write_csv(inputs["prune"] / "matrices.csv", "layer,matrix,sparsity,relative_output_error", rows)
    if "reconstructed" in results["models"]:
        inputs["reconstruct"] = write_stage(root, "reconstruct")
        rows = [[layer, 9.5, 0.2 + layer / 50, 0.1 + layer / 50, 2] for layer in range(4)]
        write_csv(inputs["reconstruct"] / "layers.csv", "layer,seconds,error_before,error_after,memory_gib", rows)
    if "finetuned" in results["models"]:
        inputs["finetune"] = write_stage(root, "finetune")
        rows = [[step, 3 - step / 100, 1e-4, 800, 20 - step / 10 if step % 20 == 0 else ""] for step in range(1, 61)]
        write_csv(inputs["finetune"] / "metrics.csv", "step,loss,lr,tokens_per_second,val_perplexity", rows)
    inputs["evaluate"] = write_stage(root, "evaluate")
    (inputs["evaluate"] / "results.json").write_text(json.dumps(results))
    return inputs


def make_results(*names: str) -> dict:
    """Results with distinct numbers for each model, so that a mix-up shows."""
    models = {}
    for place, name in enumerate(names):
        models[name] = {
            "perplexity": {"wikitext2": 5.68 + (0, 6.11, 3.33, 2.22, 2.44)[place], "ptb": 1234.5 + place},
            "perplexity_stderr": {"wikitext2": 0.11 + place / 100},
            "zero_shot": {
                "arc_easy": {"acc": 0.611 - place / 50, "acc_stderr": 0.013, "acc_norm": 0.577 - place / 50},
                "boolq": {"acc": 0.707 - place / 50, "acc_stderr": 0.021},
            },
            "zero_shot_mean": 0.659 - place / 50,
            "sparsity": {"overall": 0.4987 if place else 0.0, "by_layer": [0.5] * 4},
            "mask_violations": 0,
            "continuations": [f"and {name} wrote on\nand on", f"but {name} ended"],
            "hash": f"feed{place}",
            "differences": {
                other: {
                    "perplexity": {"wikitext2": {"log": 0.7 + place / 10, "stderr": 0.01}},
                    "zero_shot": {"boolq": {"acc": -place / 50, "stderr": 0.015}},
                }
                for other in names[:place]
            },
        }
    protocol = {
        "seq_len": 256,
        "limit": 77,
        "fewshot": 0,
        "datasets": {"wikitext2": "some/set:config@test, 123 windows of 256 tokens"},
        "notes": ["tokenised text: not comparable"],
        "prompts": ["Once there was", "The end is"],
        "masks": "c0ffee",
    }
    return {"models": models, "protocol": protocol, "versions": {"torch": "2.13.0", "lm_eval": "0.4.13"}}


def write_report(root: Path, results: dict, *arguments: str, model: str = "some/model") -> tuple[str, str]:
    """(html, markdown) of a run under `root`."""
    inputs = write_run(root, results)
    settings = reader.load(["recipe=tiny", f"stages=[{','.join([*inputs, 'report'])}]", "model=some/model", *arguments])
    settings.model = model
    folder = root / "report"
    folder.mkdir()
    stage.run(settings, folder, inputs)
    return (folder / "report.html").read_text(encoding="utf-8"), (folder / "report.md").read_text(encoding="utf-8")


def shown(root: Path, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    report.show(root, console)
    return console.file.getvalue()


class Page(html.parser.HTMLParser):
    """The tags of a page, its text, and whether they nest."""

    VOID = {"meta", "br", "hr", "img", "link"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
