"""What a bad input is, and ways to damage files that only these cases need."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from pipeline.sparsity.masks import Masks
from tests.faults.harm import Harm, change_weights, put

UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
MASKS = "{here}/run/prune/masks.safetensors"
ON_DISK = "run_dir={here}/disk/run"
FLOAT_MASK = """
from pipeline.sparsity.patterns import Pattern

class Half(Pattern):
    ratio = 0.5
    def select(self, score_OI, whole_matrix=False):
        return (score_OI > score_OI.median()).float()
"""


class Case(NamedTuple):
    """A command line for a folder with `model/` and a finished `run/`, after `harm`, and part of the expected message."""

    typed: str
    says: str
    harm: Harm | None = None
    harmed: str = ""  # `harm` in words


def text(name: str, content: str | bytes, says: str) -> Case:
    return Case(f"calibration.dataset={{here}}/{name}", says, put(name, content), f"holds `{content or ' '}`")


def changed(json_file: str, **entries) -> Harm:
    def harm(folder: Path) -> None:
        path = folder / json_file
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return harm


def filled(name: str, value: float) -> Harm:
    return change_weights(lambda weights: weights[name].fill_(value), "model/model.safetensors")


def written_masks(mask: torch.Tensor, pattern: str, name: str = UP) -> Harm:
    def harm(folder: Path) -> None:
        masks = Masks()
        masks.add(name, mask, pattern)
        masks.save(folder / "masks.safetensors")

    return harm


def one_weight_not_zero(folder: Path) -> None:
    shutil.copytree(folder / "run/prune/model", folder / "pruned")
    row, column = (~Masks.load(folder / "run/prune/masks.safetensors")[UP]).nonzero()[0].tolist()
    index = json.loads((folder / "pruned/model.safetensors.index.json").read_text())
    change_weights(lambda weights: weights[UP][row].__setitem__(column, 0.25), index["weight_map"][UP])(
        folder / "pruned"
    )


def tokenizer_with(**tokens: str) -> Harm:
    """Special tokens without an embedding in the model."""

    def harm(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        tokenizer.add_special_tokens({f"{kind}_token": token for kind, token in tokens.items()})
        tokenizer.save_pretrained(folder / "model")

    return harm


def saved_splits(folder: Path) -> None:
    rows = Dataset.from_dict({"text": ["the cat sat on the mat ."]})
    DatasetDict({"train": rows, "test": rows}).save_to_disk(folder / "d")


def split_files(*names: str) -> Harm:
    def harm(folder: Path) -> None:
        for name in names:
            (folder / "d" / name).parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_dict({"text": ["the cat sat on the mat ."]}).to_parquet(folder / "d" / name)

    return harm


def together(*harms: Harm) -> Harm:
    return lambda folder: [harm(folder) for harm in harms]


CHAT = json.dumps({"messages": [{"role": "user", "content": "who ?"}, {"role": "assistant", "content": "I ."}]})
SPLITS = ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet")


def no_tokenizer(folder: Path) -> None:
    for path in (folder / "model").glob("*token*"):
        path.unlink()
