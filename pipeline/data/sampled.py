"""`dataset=self`: calibration text that the dense model writes, for when there is no other.

A model's samples resemble its training text, which need not be available. For pruning and quantising they were competitive
with real text, and often better: Williams, Chrysostomou & Aletras 2025, "Self-calibration for Language Model Quantization and
Pruning" (NAACL). As there, we sample after a begin-of-sequence token, but without their temperature schedule over the first
tokens. Ji et al. 2025, "Beware of Calibration Data for Pruning Large Language Models" (ICLR), report gains for Wanda, DSnoT
and OWL by another method that needs some text: the model continues the beginnings of real documents, and samples of high
perplexity are dropped.

After an end-of-sequence token a new document starts in the same window, as in packed training text.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pipeline.data import special_tokens
from pipeline.models import loading, model_files, placement, processors
from pipeline.runtime import code, files, memory, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe

BATCH = 16  # samples per batch; it affects their last bits, so it is part of the cache key


def dense_folder(recipe: Recipe) -> Path:
    """The folder of the dense model."""
    return loading.locate(recipe.model or str(Path(recipe.run_dir) / "pretrain" / "model"), recipe.revision)


def samples(recipe: Recipe, dense: Path, count: int, seq_len: int) -> Tensor:
    """(count, seq_len) token ids, the same on all ranks and for any number of them. All ranks must call it.

    Batches are cached in `<runs>/.sampled/` by model, settings and code: an interrupted run continues, other runs reuse them,
    and fewer samples are a prefix of more.
    """
    tokenizer = processors.tokenizer(dense, recipe)
    identity = processes.from_main(model_files.identity(dense) if processes.is_main() else None)
    about = {
        "model": identity,
        "dtype": recipe.dtype,
        "attn_implementation": recipe.attn_implementation,
        "seq_len": seq_len,
        "seed": recipe.seed,
        "code": code.fingerprint(__name__),
        "at_once": BATCH,
    }
    shared = processes.from_main(files.cache(Path(recipe.run_dir), ".sampled") if processes.is_main() else None)
    cache = shared / files.digest(about)
    batches = range(-(-count // BATCH))
    parts = [cache / f"{batch}.safetensors" for batch in batches]
    missing = processes.from_main([batch for batch in batches if _read(parts[batch], seq_len) is None])
    mine = missing[processes.rank() :: processes.world_size()]
    if missing:
        processes.say(f"  self: the dense model writes {count} samples of {seq_len} tokens")
        if mine:
            config = loading.config(dense, recipe)
            model = _model(recipe, dense)
            for number, batch in enumerate(mine):
                report = processes.progress(f"  self: {number} of {len(mine)} batches of {BATCH} samples, ")
                seed = recipe.seed * 1_000_003 + batch
                sampled = sample_batch(
                    model, first_token(tokenizer, config), tokenizer.eos_token_id, seq_len, seed, report
                )
                with files.atomic_write(parts[batch]) as tmp:
                    save_file({"ids": sampled}, tmp)
            del model
            memory.free_memory()
        processes.barrier()
    return torch.cat([_read(part, seq_len) for part in parts])[:count]


@torch.no_grad()
def sample_batch(
    model: nn.Module,
    bos: int,
    eos: int | None,
    seq_len: int,
    seed: int,
    report: Callable[[str], None] = lambda text: None,
) -> Tensor:
    """(BATCH, seq_len) int32 samples of a causal LM at temperature 1. `bos` is the first token, and follows each `eos`.
    Calls `report` with how far it is, such as "12 tokens of the next"."""
    model.generation_config = GenerationConfig()  # else the model's top_p and the like would fill our gaps
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=seq_len - 1, use_cache=True, pad_token_id=bos)
    ids = torch.full((BATCH, 1), bos, device=model.device)
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.manual_seed(seed)
        sampled = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_RestartAfterEnd(bos, eos, report)]),
        )
    assert sampled.shape == (BATCH, seq_len), sampled.shape
    return sampled.int().cpu()


def first_token(tokenizer, config) -> int:
    """The token to start a text with. Raises `UserError` if the tokenizer has none that the model knows."""
    known = special_tokens.embedding_rows(config)
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None and token < known:
            return token
    raise UserError(
        "dataset=self needs a begin-of-sequence or end-of-sequence token to start a text with, and the tokenizer has none"
    )


class _RestartAfterEnd(LogitsProcessor):
    def __init__(self, bos: int, eos: int | None, report: Callable[[str], None]) -> None:
        self.bos, self.eos, self.report = bos, eos, report

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.report(f"{input_ids.shape[1]} tokens of the next")
        if self.eos is None or self.eos == self.bos:
            return scores
        ended_B = input_ids[:, -1] == self.eos
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.bos] = 0
        return torch.where(ended_B[:, None], forced, scores)


def _model(recipe: Recipe, dense: Path) -> nn.Module:
    def load(**where):
        return loading.load(dense, recipe, **where)

    return placement.place(placement.share_of_gpus(), load, _placement(load))


def _placement(load: Callable[[], nn.Module]) -> str:
    """Like `placement.choose`, which all ranks must call; here only ranks with a batch do."""
    device = processes.device()
    fits = device.type == "cpu" or memory.size_gib(load()) < placement.ROOM * memory.free_gib(device)
    return "whole" if fits else "device_map"


def _read(path: Path, seq_len: int) -> Tensor | None:
    """A cached batch; None if the file is missing or damaged."""
    try:
        ids = load_file(path)["ids"]
    except (OSError, SafetensorError, KeyError):
        return None
    return ids if ids.shape == (BATCH, seq_len) else None
