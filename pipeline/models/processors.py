"""Loads a model's processor: the tokenizer of a language model, the image processor of a classifier."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from pipeline.models import loading, model_files
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe

# shows a tokenizer's rules: spaces, line breaks, digits, case, accents, contractions, symbols and other scripts
RULES = "It's  2,048 Cafés\u0301\n\n\tx_1 = 'ﬁ' + \"ÅÉ\";\r\n    if a<=10.5: return 漢字 привет 😀 don't I'LL 12345678 "


def tokenizer(folder: Path, recipe: Recipe):
    """The tokenizer in a model folder. Raises `UserError` if it is unusable."""
    try:
        return read_tokenizer(folder, recipe.trust_remote_code)
    except Exception as error:  # damaged files raise KeyError, AttributeError and more
        loading.config(folder, recipe)  # the tokenizer's class depends on it: report an unreadable config as such
        raise UserError(
            f"{folder} has no usable tokenizer: {model_files.problem(folder, error, '*token*.json')}: copy tokenizer.json and "
            "tokenizer_config.json there from the original model"
        ) from error


def read_tokenizer(where: str | Path, own_code: bool = False):
    """The tokenizer in a folder or hub repository, which cuts texts as its tokenizer.json says. Raises transformers' errors.

    A few classes of transformers 5 (LlamaTokenizer, GPT2Tokenizer, Qwen2Tokenizer and others) take only the vocabulary from
    tokenizer.json, and replace its normalizer and pre-tokenizer by their own: texts lose spaces or accents, or are cut
    elsewhere. Many models name such a class but have other rules; AutoTokenizer knows some of them, by their hub ids."""
    found = AutoTokenizer.from_pretrained(where, trust_remote_code=own_code)
    is_own = not type(found).__module__.startswith("transformers.")
    if is_own or not isinstance(found, PreTrainedTokenizerFast) or type(found) is PreTrainedTokenizerFast:
        return found
    if cached_file(where, "tokenizer.json", _raise_exceptions_for_missing_entries=False) is None:
        return found
    exact = PreTrainedTokenizerFast.from_pretrained(where)
    ours, theirs = (t([RULES, f"  {RULES}"], add_special_tokens=False).input_ids for t in (exact, found))
    if ours == theirs:
        return found
    known = exact.get_vocab()
    for name, token in found.special_tokens_map.items():  # the class may have defaults
        if name in exact.SPECIAL_TOKENS_ATTRIBUTES and getattr(exact, name, None) is None and token in known:
            setattr(exact, name, token)
    processes.say(
        f"  {where}: {type(found).__name__} of transformers cuts texts differently from tokenizer.json, which is used"
    )
    return exact


def image_processor(folder: Path, recipe: Recipe):
    """The image processor in a model folder, which scales and normalises images. Raises `UserError` if it is unusable."""
    from transformers import AutoImageProcessor  # slow

    try:
        # with Pillow, whether or not torchvision is installed: the two differ in the last bits
        return AutoImageProcessor.from_pretrained(
            folder, backend="pil", trust_remote_code=recipe.trust_remote_code, local_files_only=True
        )
    except Exception as error:  # a missing or damaged file, or a package that is not installed
        raise UserError(
            f"{folder} has no usable image processor: {model_files.problem(folder, error, 'preprocessor_config.json')}: copy "
            "preprocessor_config.json there from the original model"
        ) from error
