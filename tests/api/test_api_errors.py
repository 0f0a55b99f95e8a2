"""Bad arguments of the API give a one-line `UserError` and change nothing."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from pipeline import api as espalier
from tests import families
from tests.api.test_api import CALIBRATION, HELD_OUT, TEXTS, TUNING, loaded

# function, bad arguments, part of the message
BAD = [
    ("prune", {"model": torch.nn.Linear(4, 4)}, "model is a Linear: pass a transformers model"),
    ("prune", {"model": "meta-llama/Llama-2-7b"}, "model is a str"),
    ("prune", {"tokenizer": "gpt2"}, "tokenizer is a str"),
    ("prune", {"method": "wandda"}, "method=wandda is neither known nor a .py file: did you mean 'wanda'?"),
    ("prune", {"method": "./none.py"}, "method=none.py: no such file"),
    ("prune", {"sparsity": "half"}, "sparsity=half is not a sparsity"),
    ("prune", {"sparsity": 1.5}, "sparsity=1.5 is out of range"),
    ("prune", {"sparsity": "3of7"}, "32 inputs are not divisible by 7, so 3of7 does not fit"),
    ("prune", {"sparsity": object()}, "sparsity is a object"),
    ("prune", {"sparcity": 0.5}, "unknown argument 'sparcity': did you mean 'sparsity'?"),
    (
        "prune",
        {"allocation": "owl"},
        "allocation=owl distributes a ratio over the layers, but sparsity=2of4 is not a ratio: set sparsity=0.5",
    ),
    ("prune", {"overrides": {"*nothing*": "dense"}}, "overrides: no matrix matches '*nothing*'"),
    ("prune", {"samples": 0}, "samples=0 is out of range"),
    ("prune", {"samples": "many"}, "samples=many: a whole number is needed"),
    ("prune", {"samples": 100_000}, "set samples="),
    ("prune", {"seq_len": 4096}, "seq_len=4096 exceeds the model's 128 positions: set seq_len=128"),
    ("prune", {"seed": -1}, "seed=-1 is out of range"),
    ("prune", {"seed": 2**64}, "is out of range: set a value from 0 to 4294967295"),
    ("prune", {"calibration": []}, "calibration holds no text"),
    ("prune", {"calibration": ["", "  "]}, "calibration holds no text"),
    ("prune", {"calibration": ["a", 3]}, "calibration holds a int: a list of strings is needed"),
    ("prune", {"calibration": 5}, "calibration is a int"),
    ("prune", {"calibration": "self"}, "works only in the command"),
    ("prune", {"calibration": "./nothing.jsonl"}, "nothing.jsonl"),
    ("prune", {"calibration": {"train": TEXTS}}, "pass one, such as dataset['train']"),
    ("prune", {"calibration": Dataset.from_dict({"body": TEXTS})}, "it has body; set column to the one with the text"),
    ("prune", {"calibration": torch.zeros(4)}, "token ids of (windows, tokens) are needed"),
    ("prune", {"calibration": torch.full((2, 8), 10**6)}, "holds token 1000000, but the model knows"),
    ("prune", {"calibration": torch.zeros(2, 500, dtype=torch.long)}, "seq_len=500 exceeds the model's 128 positions"),
    ("finetune", {"masks": {}}, "masks is a dict"),
    ("finetune", {"masks": espalier.Masks()}, "masks holds no mask"),
    ("finetune", {"masks": "another"}, "another model's mask file?"),
    ("finetune", {"method": "lorra"}, "method=lorra is neither known nor a .py file: did you mean 'lora'?"),
    ("finetune", {"method": "plain_lora"}, "method=plain_lora is not merged into the weights: set method=lora or full"),
    ("finetune", {"texts": []}, "texts holds no text"),
    ("finetune", {"max_steps": 0}, "max_steps=0 is out of range"),
    ("finetune", {"seq_len": 4096}, "seq_len=4096 exceeds"),
    ("finetune", {"targets": ["nothing"]}, "targets: no pruned matrix is called 'nothing'"),
    ("finetune", {"quantize": "nf4"}, "quantize is not an argument of finetune"),
    ("finetune", {"dataset": "c4"}, "set texts="),
    ("finetune", {"distill": 0.5}, "pass teacher="),
    ("finetune", {"distill": 0.5, "teacher": "another"}, "teacher has vocab_size=512, and model"),
    ("finetune", {"patience": 2}, "patience counts validations"),
    ("reconstruct", {"dense": None}, "dense is a NoneType"),
    ("reconstruct", {"dense": "itself"}, "dense is the pruned model itself"),
    ("reconstruct", {"dense": "another"}, "dense is another model than model"),
    ("reconstruct", {"accumulate": 8}, "8 samples are too few"),
    ("reconstruct", {"dataset": "c4", "accumulate": 2}, "dataset is not an argument of reconstruct: set calibration="),
    ("evaluate", {"perplexity": HELD_OUT[0]}, "perplexity is a str"),
    ("evaluate", {"perplexity": [" ".join(HELD_OUT)]}, "set perplexity={'mine': [...]}"),
    ("evaluate", {"perplexity": [["short"]]}, "too few for one window of 64"),
    ("evaluate", {"perplexity": [], "tasks": []}, "nothing to evaluate"),
    ("evaluate", {"tasks": "arc_easy"}, "set tasks=['arc_easy']"),
    ("evaluate", {"batch_size": 0}, "batch_size=0 is out of range"),
    (
        "evaluate",
        {"perplexity": [torch.zeros(2, 8, dtype=torch.long)], "bos": True},
        "which do not change: set bos=False",
    ),
    ("verify", {"masks": None}, "masks is a NoneType"),
    ("verify", {"masks": "another"}, "another model's mask file?"),
    ("apply", {"masks": "another"}, "another model's mask file?"),
]


@pytest.fixture(scope="module")
def pruned(tiny_llama):
    model, tokenizer = loaded(tiny_llama)
    masks = espalier.prune(model, tokenizer, **CALIBRATION)
    other = families.tiny("llama")
    return model, tokenizer, masks, other, espalier.prune(copy.deepcopy(other), calibration=families.text(2, 8))


@pytest.mark.parametrize(
    ("function", "wrong", "says"), BAD, ids=[f"{f}-{next(iter(w))}-{i}" for i, (f, w, _) in enumerate(BAD)]
)
def test_bad_input_is_one_clear_line_and_changes_nothing(tiny_llama, pruned, function, wrong, says):
    model, tokenizer, masks, other, other_masks = pruned
    usual = {
        "prune": {"model": model, "tokenizer": tokenizer, **CALIBRATION},
        "finetune": {"model": model, "masks": masks, "texts": TEXTS, "tokenizer": tokenizer, **TUNING},
        "reconstruct": {"model": model, "masks": masks, "dense": other, "tokenizer": tokenizer, **CALIBRATION},
        "evaluate": {"model": model, "tokenizer": tokenizer, "perplexity": {"mine": HELD_OUT}, "seq_len": 64},
        "verify": {"model": model, "masks": masks},
        "apply": {"model": model, "masks": masks},
    }[function]
    if function == "reconstruct" and "dense" not in wrong:
        usual["dense"] = loaded(tiny_llama)[0]
    wrong = dict(wrong)
    for key, value in {"masks": other_masks, "dense": other, "teacher": other}.items():
        if isinstance(wrong.get(key), str):
            wrong[key] = value if wrong[key] == "another" else model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(espalier.UserError) as raised:
        getattr(espalier, function)(**(usual | wrong))
    assert says in str(raised.value) and "\n" not in str(raised.value)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.slow
def test_an_unknown_task_is_refused(pruned):
    model, tokenizer, *_ = pruned
    with pytest.raises(espalier.UserError, match="unknown task 'arc_eazy': did you mean arc_easy"):
        espalier.evaluate(model, tokenizer, tasks=["arc_eazy"])


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(tiny_llama):
    with pytest.raises(espalier.UserError, match="embedding rows"):
        small = families.tiny("llama", vocab_size=20)
        espalier.prune(small, AutoTokenizer.from_pretrained(tiny_llama), **CALIBRATION)


def test_offloaded_and_quantised_models_are_refused(tiny_llama):
    model, _ = loaded(tiny_llama)
    model.model.layers[0].to("meta")
    with pytest.raises(espalier.UserError, match="meta device"):
        espalier.prune(model, calibration=families.text(2, 8))


def test_several_processes_are_refused(tiny_llama, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(espalier.UserError, match="espalier.verify works in one process"):
        espalier.verify(None, None)
