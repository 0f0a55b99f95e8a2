"""A model's tokenizer cuts texts as its tokenizer.json says."""

import json

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, Qwen2Config

from pipeline.models import processors
from pipeline.settings.schema import Recipe

PARTS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+"), "isolated"),  # Llama 3 also cuts digits by three
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
RULES = {  # tokenizer_class, configuration, pre-tokenizer
    "GPT-2's class with other parts": ("GPT2Tokenizer", LlamaConfig, PARTS),
    "any tokenizer of a Qwen2": ("PreTrainedTokenizerFast", Qwen2Config, PARTS),
    "Llama's class without a first space": ("LlamaTokenizer", LlamaConfig, pre_tokenizers.Metaspace("▁", "never")),
}


@pytest.mark.parametrize(("name", "kind", "parts"), RULES.values(), ids=RULES)
def test_texts_are_cut_as_tokenizer_json_says(tmp_path, capsys, name, kind, parts):
    """Classes of transformers replace the rules in the file by their own."""
    rules = Tokenizer(BPE(unk_token="<unk>"))
    rules.pre_tokenizer = parts
    trainer = BpeTrainer(vocab_size=200, special_tokens=["<s>", "</s>", "<unk>"])
    rules.train_from_iterator(["The cat has 2023 or 12345678 hairs, hasn't it?"] * 9, trainer)
    rules.save(str(tmp_path / "tokenizer.json"))
    kind().save_pretrained(tmp_path)
    about = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))

    loaded = processors.tokenizer(tmp_path, Recipe())
    text = "The cat has 12345678 hairs"
    assert loaded(text, add_special_tokens=False).input_ids == rules.encode(text).ids
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token) == ("<s>", "</s>", "<unk>")
    assert "cuts texts differently from tokenizer.json" in capsys.readouterr().out
