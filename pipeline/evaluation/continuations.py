"""Sample continuations: prompts from held-out text, and what a model generates from them."""

from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import GenerationConfig

from pipeline.data import chat, special_tokens
from pipeline.models import loading
from pipeline.runtime.errors import UserError, one_line

WORDS = 24  # per prompt; a text with twice as many is long enough
SCAN = 1000  # texts to search for one prompt


class CannotGenerate(Exception):
    """A model computes logits, but cannot generate."""


def prompts(rows: Dataset, tokenizer: Any, count: int, room: int) -> list[str]:
    """The first 24 words of `count` texts spread evenly over `rows`, or half of shorter texts.

    Each has at most `room` tokens. Rows of `input_ids` are decoded; of a conversation the first turn is used. Duplicates are
    dropped.
    """
    found = []
    for number in range(count):
        start = number * len(rows) // count
        part = rows[start : min(start + SCAN, (number + 1) * len(rows) // count)]
        if "input_ids" in part:
            texts = tokenizer.batch_decode(part["input_ids"], skip_special_tokens=True)
        else:
            texts = part["text"] if "text" in part else chat.first_turns(part)
        words = next((text.split() for text in texts if len(text.split()) >= 2 * WORDS), None)
        words = words or max((text.split() for text in texts), key=len, default=[])
        words = words[: max(1, min(WORDS, len(words) // 2))]
        while len(words) > 1 and len(tokenizer(" ".join(words)).input_ids) > room:
            words = words[: len(words) // 2]
        found.append(" ".join(words))
    return [prompt for prompt in dict.fromkeys(found) if prompt]


@torch.no_grad()
def continuations(model: nn.Module, tokenizer: Any, prompts: list[str], tokens: int) -> list[str]:
    """Generates greedily after each prompt, up to `tokens` tokens or the end of text.

    One prompt at a time, since padding would change the numbers. Raises `UserError` if a prompt fills all positions, and
    `CannotGenerate` if the model's `generate` fails. Replaces the model's `generation_config`.
    """
    positions = loading.positions(model.config)
    tokenizer, _ = special_tokens.for_questions(tokenizer, model.config)
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    model.generation_config = GenerationConfig()  # else the model's penalties, beams and the like would fill our gaps
    found = []
    for prompt in prompts:
        ids_1T = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        length = ids_1T.shape[1]
        if positions and length >= positions:
            raise UserError(f"a prompt of {length} tokens fills the model's {positions} positions: '{prompt[:40]}...'")
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=min(tokens, positions - length) if positions else tokens,
            eos_token_id=end,
            pad_token_id=0,  # unused for a single prompt, but generate warns without it
        )
        try:
            out_1T = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=settings)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # in transformers 5.23 the caches of Blt, xLSTM, HRM and Qwen4 raise their own types
            raise CannotGenerate(f"generate of {type(model).__name__} fails ({one_line(error)})") from error
        # decoding the new tokens alone would drop the space before the first word
        text, prompt_text = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (out_1T[0], ids_1T[0]))
        found.append(text[len(prompt_text) :])
    return found
