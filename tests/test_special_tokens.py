"""A tokenizer against its model: what no model can read is refused before any work, what can be mended is, and is said."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig

from pipeline import special_tokens, world
from pipeline.errors import UserError
from pipeline.zero_shot import zero_shot
from tests.conftest import QUICK
from tests.test_zero_shot import byte_tokenizer, mirror, own_cache  # noqa: F401
from tests.test_zero_shot import tiny_llama as random_llama

WORDS = len(world.tokenizer())
CONFIG = LlamaConfig(vocab_size=WORDS, eos_token_id=1)
NO_EOS = LlamaConfig(vocab_size=WORDS, eos_token_id=None)


def tokenizer(single: str = "<bos> $A", **tokens):
    found = world.tokenizer()
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    for kind, token in tokens.items():
        if token:
            found.add_special_tokens({f"{kind}_token": token})
        else:
            setattr(found, f"{kind}_token", None)
    return found


@pytest.mark.parametrize(
    ("single", "before", "behind"),
    [("$A", [], []), ("<bos> $A", [0], []), ("<bos> $A <eos>", [0], [1]), ("$A <eos>", [], [1])],
)
def test_what_is_put_around_a_text(single, before, behind):
    assert special_tokens.around(tokenizer(single)) == (before, behind)


MENDED = {
    "nothing": ({}, CONFIG, "", ("<eos>", "<pad>")),
    "no padding token": ({"pad": None}, CONFIG, "", ("<eos>", "<unk>")),
    "no padding and no unknown token": ({"pad": None, "unk": None}, CONFIG, "", ("<eos>", "<eos>")),
    "a padding token without a row": (
        {"pad": "[PAD]"},
        CONFIG,
        f"has id {WORDS} of {WORDS}: '<unk>' pads",
        ("<eos>", "<unk>"),
    ),
    "no end, but the model's": ({"eos": None}, CONFIG, "'<eos>' is taken, from config.json", ("<eos>", "<pad>")),
    "no end anywhere": ({"eos": None}, NO_EOS, "'<bos>' is taken, from its begin", ("<bos>", "<pad>")),
    "a beginning without a row": (
        {"single": "$A", "bos": "[BOS]"},
        CONFIG,
        "bos token '[BOS]' has id",
        ("<eos>", "<pad>"),
    ),
    "an end is appended": ({"single": "<bos> $A <eos>"}, CONFIG, "it appends <eos> to every text", ("<eos>", "<pad>")),
}


@pytest.mark.parametrize(("tokens", "config", "says", "has"), MENDED.values(), ids=MENDED)
def test_what_is_mended_for_questions(tokens, config, says, has):
    ours = tokenizer(**tokens)
    special_tokens.check(ours, config, "here")
    ids = ours("the cat").input_ids
    asking, mended = special_tokens.for_questions(ours, config)
    assert (says in mended[0]) if says else not mended
    assert (asking.eos_token, asking.pad_token) == has
    assert asking.pad_token_id < WORDS
    appended = ids[-1:] == [1]
    assert asking("the cat").input_ids == asking.encode("the cat") == (ids[:-1] if appended else ids)
    assert ours("the cat").input_ids == ids  # the texts' own tokenizer stays as it was


REFUSED = {
    "an end without a row": (
        {"eos": "[END]"},
        CONFIG,
        f"eos token '\\[END\\]' with id {WORDS}, the model {WORDS} embedding rows",
    ),
    "an unknown token without a row": ({"unk": "[UNK]"}, CONFIG, "set unk_token in its tokenizer_config.json"),
    "another model's": ({}, LlamaConfig(vocab_size=WORDS - 9), "it is another model's tokenizer"),
}


@pytest.mark.parametrize(("tokens", "config", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(tokens, config, says):
    with pytest.raises(UserError, match=says):
        special_tokens.check(tokenizer(**tokens), config, "here")


def test_a_prepended_token_without_a_row_is_refused():
    ours = tokenizer(bos="[BOS]")
    ours.backend_tokenizer.post_processor = TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", WORDS)])
    with pytest.raises(UserError, match=r"bos token '\[BOS\]' with id"):
        special_tokens.check(ours, CONFIG, "here")


def test_no_token_to_mend_with_is_refused():
    ours = tokenizer(single="$A", bos=None, eos=None)
    with pytest.raises(UserError, match="neither an end-of-sequence nor a begin-of-sequence token"):
        special_tokens.for_questions(ours, NO_EOS)


@pytest.mark.parametrize("change", ["an end is appended", "no end", "no padding"])
def test_scores_do_not_suffer(mirror, change):  # noqa: F811
    """What a tokenizer appends or lacks changes no score."""
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


@pytest.mark.parametrize("change", ["[PAD]", "no end", "appends"])
def test_a_whole_run_with_each(tiny_llama, tmp_path, typed, change):
    """Its masks, perplexity and scores are those of the same model with a sound tokenizer, and what was mended is said."""
    found = []
    for name in ("sound", "other"):
        folder = tmp_path / name
        shutil.copytree(tiny_llama, folder)
        if name == "other":
            ours = AutoTokenizer.from_pretrained(folder)
            if change == "[PAD]":
                ours.add_special_tokens({"pad_token": "[PAD]"})
            elif change == "appends":
                template = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)])
                ours.backend_tokenizer.post_processor = template
            ours.save_pretrained(folder)
            if change == "no end":
                changed(folder, eos_token=None)
        settings = [*QUICK, "evaluate.tasks=[world_tools]", "evaluate.continuations=1", "finetune.max_steps=2"]
        code, said, lines = typed(*settings, f"model={folder}", f"run_dir={tmp_path}/runs-{name}/run")
        assert code == 0, lines
        assert ("the tokenizer of" in said) == (name == "other")
        results = json.loads((tmp_path / f"runs-{name}/run/evaluate/results.json").read_text())["models"]
        masks = (tmp_path / f"runs-{name}/run/prune/masks.safetensors").read_bytes()
        found.append((masks, [(it["zero_shot"], it["continuations"]) for it in results.values()][:2]))
    if change != "no end":  # where documents have no end, packed text has other tokens
        assert found[0] == found[1]
    else:
        assert found[0][1][0] == found[1][1][0]  # the dense model's
