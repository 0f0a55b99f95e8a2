"""Owns `dataset=self`: text that the dense model itself writes, to calibrate by where there is no other.

A model's samples come near the text that it was trained on, which its owner need not have. For quantising and pruning they
were competitive with real text, and often better: Williams, Chrysostomou & Aletras 2025, "Self-calibration for Language
Model Quantization and Pruning" (NAACL), who sample from the begin-of-sequence token on, as here. Their schedule of
temperatures over the first tokens is left out: this is the model's own distribution. Ji et al. 2025, "Beware of Calibration
Data for Pruning Large Language Models" (ICLR), find gains for Wanda, DSnoT and OWL by another way, which needs some text:
the model continues the beginnings of real documents, and samples of high perplexity are dropped.

Text after an end-of-sequence token is a new document in the same window, as in the packed text of a training.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pipeline import files, memory, model_files, models, placement, processes, special_tokens
from pipeline.errors import UserError
from pipeline.recipe import Recipe

BATCH = 16  # samples written at once: part of what they are, for the company of a sample decides its last bits
FORM = 1  # of what is kept; another form is written anew
EVERY = 30  # seconds between two lines that say how far it is


def dense(recipe: Recipe) -> Path:
    """The folder of the dense model, once it is there."""
    return models.locate(recipe.model or str(Path(recipe.run_dir) / "pretrain" / "model"), recipe.revision)


def samples(recipe: Recipe, dense: Path, count: int, seq_len: int) -> Tensor:
    """(count, seq_len) token ids, the same on all ranks and for any number of them; all ranks must call.

    Kept by batches in `<runs>/.sampled/`, by model and settings: a killed sampling goes on, other runs take it over, and
    fewer samples are the first of more.
    """
    tokenizer = models.tokenizer(dense, recipe)
    known_as = processes.from_main(model_files.identity(dense) if processes.is_main() else None)
    about = {
        "model": known_as,
        "dtype": recipe.dtype,
        "seq_len": seq_len,
        "seed": recipe.seed,
        "form": FORM,
        "at_once": BATCH,
    }
    cache = Path(recipe.run_dir).parent / ".sampled" / files.digest(about)
    batches = range(-(-count // BATCH))
    parts = [cache / f"{batch}.safetensors" for batch in batches]
    missing = processes.from_main([batch for batch in batches if _read(parts[batch], seq_len) is None])
    mine = missing[processes.rank() :: processes.world_size()]
    if missing:
        processes.say(f"  self: the dense model writes {count} samples of {seq_len} tokens")
        if mine:
            config = models.config(dense, recipe)
            model = _model(recipe, dense)
            for number, batch in enumerate(mine):
                tell = _teller(f"  self: {number} of {len(mine)} batches of {BATCH} samples")
                seed = recipe.seed * 1_000_003 + batch
                written = write(model, start(tokenizer, config), tokenizer.eos_token_id, seq_len, seed, tell)
                with files.whole(parts[batch]) as beside:
                    save_file({"ids": written}, beside)
            del model
            memory.let_go()
        processes.barrier()
    return torch.cat([_read(part, seq_len) for part in parts])[:count]


@torch.no_grad()
def write(
    model: nn.Module,
    begin: int,
    end: int | None,
    seq_len: int,
    seed: int,
    tell: Callable[[int], None] = lambda token: None,
) -> Tensor:
    """(BATCH, seq_len) int32 samples of a causal LM at temperature 1, the first token being `begin`, as is the one after an
    `end`. `tell` hears how many tokens each has."""
    model.generation_config = GenerationConfig()  # whose top_p and the like would be taken where ours are not set
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=seq_len - 1, use_cache=True, pad_token_id=begin)
    ids = torch.full((BATCH, 1), begin, device=model.device)
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.manual_seed(seed)
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_BeginAnew(begin, end, tell)]),
        )
    assert written.shape == (BATCH, seq_len), written.shape
    return written.int().cpu()


def start(tokenizer, config) -> int:
    """The token that a text begins with."""
    known = special_tokens.rows(config)
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None and token < known:
            return token
    raise UserError(
        "dataset=self: the model's tokenizer has no begin-of-sequence and no end-of-sequence token to begin a text with"
    )


class _BeginAnew(LogitsProcessor):
    def __init__(self, begin: int, end: int | None, tell: Callable[[int], None]) -> None:
        self.begin, self.end, self.tell = begin, end, tell

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.tell(input_ids.shape[1])
        if self.end is None or self.end == self.begin:
            return scores
        ended_B = input_ids[:, -1] == self.end
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.begin] = 0
        return torch.where(ended_B[:, None], forced, scores)


def _model(recipe: Recipe, dense: Path) -> nn.Module:
    def load(**where):
        return models.load(dense, recipe, **where)

    return placement.resident(placement_of(load), load)


def placement_of(load: Callable[[], nn.Module]) -> str:
    """Not `placement.choose`, which all ranks must call, as those without a batch do not."""
    device = processes.device()
    fits = device.type == "cpu" or memory.size_gib(load()) < placement.ROOM * memory.free_gib(device)
    return "whole" if fits else "device_map"


def _teller(beginning: str) -> Callable[[int], None]:
    last = time.monotonic()

    def tell(token: int) -> None:
        nonlocal last
        if processes.is_main() and time.monotonic() - last > EVERY:
            last = time.monotonic()
            print(f"{beginning}, {token} tokens of the next", file=sys.stdout, flush=True)

    return tell


def _read(path: Path, seq_len: int) -> Tensor | None:
    """None where there is no such file, or no whole one."""
    try:
        ids = load_file(path)["ids"]
    except (OSError, SafetensorError, KeyError):
        return None
    return ids if ids.shape == (BATCH, seq_len) else None
