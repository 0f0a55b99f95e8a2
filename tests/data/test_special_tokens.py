"""Tokenizers that do not fit their model: some are refused before any work, others are fixed with a message."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig

import launch
from pipeline.data import special_tokens, world
from pipeline.evaluation.zero_shot import zero_shot
from pipeline.runtime.errors import UserError
from tests.conftest import QUICK, byte_tokenizer
from tests.evaluation.test_zero_shot import mirror, private_cache  # noqa: F401
from tests.evaluation.test_zero_shot import tiny_llama as random_llama

WORDS = len(world.tokenizer())
CONFIG = LlamaConfig(vocab_size=WORDS, eos_token_id=1)
NO_EOS = LlamaConfig(vocab_size=WORDS, eos_token_id=None)


def tokenizer(single: str = "<bos> $A", **tokens):
    changed_tokenizer = world.tokenizer()
    changed_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    for kind, token in tokens.items():
        if token:
            changed_tokenizer.add_special_tokens({f"{kind}_token": token})
        else:
            setattr(changed_tokenizer, f"{kind}_token", None)
    return changed_tokenizer


@pytest.mark.parametrize(
    ("single", "before", "after"),
    [("$A", [], []), ("<bos> $A", [0], []), ("<bos> $A <eos>", [0], [1]), ("$A <eos>", [], [1])],
)
def test_special_tokens_around_a_text(single, before, after):
    assert special_tokens.added_tokens(tokenizer(single)) == (before, after)


MENDED = {
    "nothing": ({}, CONFIG, "", ("<eos>", "<pad>")),
    "no padding token": ({"pad": None}, CONFIG, "", ("<eos>", "<unk>")),
    "no padding and no unknown token": ({"pad": None, "unk": None}, CONFIG, "", ("<eos>", "<eos>")),
    "a padding token without a row": (
        {"pad": "[PAD]"},
        CONFIG,
        f"has id {WORDS} of {WORDS}: uses '<unk>'",
        ("<eos>", "<unk>"),
    ),
    "no end, but the model's": ({"eos": None}, CONFIG, "uses '<eos>' from config.json", ("<eos>", "<pad>")),
    "no end anywhere": ({"eos": None}, NO_EOS, "uses '<bos>' from its begin", ("<bos>", "<pad>")),
    "a beginning without a row": (
        {"single": "$A", "bos": "[BOS]"},
        CONFIG,
        "bos token '[BOS]' has id",
        ("<eos>", "<pad>"),
    ),
    "an end is appended": ({"single": "<bos> $A <eos>"}, CONFIG, "appends <eos> to every text", ("<eos>", "<pad>")),
}


@pytest.mark.parametrize(("tokens", "config", "says", "has"), MENDED.values(), ids=MENDED)
def test_fixes_for_questions(tokens, config, says, has):
    ours = tokenizer(**tokens)
    special_tokens.check(ours, config, "here")
    ids = ours("the cat").input_ids
    fixed, fixes = special_tokens.for_questions(ours, config)
    assert (says in fixes[0]) if says else not fixes
    assert (fixed.eos_token, fixed.pad_token) == has
    assert fixed.pad_token_id < WORDS
    appended = ids[-1:] == [1]
    assert fixed("the cat").input_ids == fixed.encode("the cat") == (ids[:-1] if appended else ids)
    assert ours("the cat").input_ids == ids  # the original tokenizer is unchanged


REFUSED = {
    "an end without a row": (
        {"eos": "[END]"},
        CONFIG,
        f"eos token '\\[END\\]' with id {WORDS}, but the model {WORDS} embedding rows",
    ),
    "an unknown token without a row": ({"unk": "[UNK]"}, CONFIG, "set unk_token in its tokenizer_config.json"),
    "another model's": ({}, LlamaConfig(vocab_size=WORDS - 9), "is the tokenizer or config.json another model's"),
}


@pytest.mark.parametrize(("tokens", "config", "says"), REFUSED.values(), ids=REFUSED)
def test_tokenizers_that_are_refused(tokens, config, says):
    with pytest.raises(UserError, match=says):
        special_tokens.check(tokenizer(**tokens), config, "here")


def test_a_prepended_token_without_an_embedding_is_refused():
    ours = tokenizer(bos="[BOS]")
    ours.backend_tokenizer.post_processor = TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", WORDS)])
    with pytest.raises(UserError, match=r"bos token '\[BOS\]' with id"):
        special_tokens.check(ours, CONFIG, "here")


def test_a_tokenizer_without_usable_special_tokens_is_refused():
    ours = tokenizer(single="$A", bos=None, eos=None)
    with pytest.raises(UserError, match="neither an end-of-sequence nor a begin-of-sequence token"):
        special_tokens.for_questions(ours, NO_EOS)


@pytest.mark.parametrize("change", ["an end is appended", "no end", "no padding"])
@pytest.mark.slow
def test_scores_do_not_depend_on_the_defect(mirror, change):  # noqa: F811
    """Scores do not depend on the special tokens that a tokenizer appends or lacks."""
    model = random_llama()
    expected = zero_shot(model, byte_tokenizer(), ["arc_easy"], mirror)
    ours = byte_tokenizer()
    if change == "an end is appended":
        ours.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
        assert ours("a").input_ids[-1] == 0
    elif change == "no end":
        model.config.eos_token_id = 0
        ours.eos_token = None
    else:
        ours.add_special_tokens({"pad_token": "[PAD]"})
        assert ours.pad_token_id == 257 == model.config.vocab_size
    assert zero_shot(model, ours, ["arc_easy"], mirror) == expected


def changed(folder: Path, **entries) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


RUN = [
    *QUICK,
    "stages=[prune,evaluate]",
    "evaluate.tasks=[world_tools]",
    "evaluate.limit=4",
    "evaluate.continuations=1",
]


def outcome(run_dir: Path) -> tuple:
    models = json.loads((run_dir / "evaluate/results.json").read_text())["models"]
    results = [{key: model[key] for key in ("perplexity", "zero_shot", "continuations")} for model in models.values()]
    return (run_dir / "prune/masks.safetensors").read_bytes(), results


@pytest.fixture(scope="module")
def reference_run(tiny_llama, tmp_path_factory) -> tuple:
    run_dir = tmp_path_factory.mktemp("reference_run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["launch.py", *RUN, f"model={tiny_llama}", f"run_dir={run_dir}"])
        assert launch.main() == 0
    return outcome(run_dir)


@pytest.mark.parametrize("change", ["[PAD]", "no end", "appends"])
@pytest.mark.slow
def test_a_run_with_each_defect(tiny_llama, reference_run, tmp_path, typed, change):
    """The results equal those with a correct tokenizer, and the fixes are reported."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    ours = AutoTokenizer.from_pretrained(folder)
    if change == "[PAD]":
        ours.add_special_tokens({"pad_token": "[PAD]"})
    elif change == "appends":
        template = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)])
        ours.backend_tokenizer.post_processor = template
    ours.save_pretrained(folder)
    if change == "no end":
        changed(folder, eos_token=None)
    code, output, lines = typed(*RUN, f"model={folder}", f"run_dir={tmp_path}/runs/run")
    assert code == 0, lines
    assert f"the tokenizer of {folder}: " in output
    masks, models = outcome(tmp_path / "runs/run")
    if change == "no end":  # packed documents are then not separated by one, so other weights are pruned
        assert models[0] == reference_run[1][0]
    elif change == "appends":  # the joined perplexity text ends with one, which may add a window
        assert masks == reference_run[0]
        assert [model["zero_shot"] for model in models] == [model["zero_shot"] for model in reference_run[1]]
        assert [model["continuations"] for model in models] == [model["continuations"] for model in reference_run[1]]
    else:
        assert (masks, models) == reference_run
