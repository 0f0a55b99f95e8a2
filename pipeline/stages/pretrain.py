"""The pretrain stage of toy recipes: trains a small Llama from scratch on the generated world."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from callbacks import of_training
from pipeline.data import sources, token_windows, world
from pipeline.recovery.training import fit, sequences_per_step
from pipeline.runtime import deterministic, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Finetune, Pretrain, Recipe


def configuration(settings: Pretrain, tokenizer) -> LlamaConfig:
    """The model's config; raises `UserError` if its sizes do not fit together."""
    try:
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            max_position_embeddings=settings.max_positions,
            tie_word_embeddings=False,
            initializer_range=0.1,  # with the usual 0.02, so narrow a model learns facts several times later
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    except Exception as error:  # transformers wraps the ValueError of its check
        raise UserError(f"the sizes in the recipe's section pretrain do not fit together: {error}") from error


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `model/` and `metrics.csv`."""
    settings = recipe.pretrain
    tokenizer = world.tokenizer()
    config = configuration(settings, tokenizer)
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config)
    schedule = Finetune(max_steps=settings.steps, batch_size=settings.batch_size, lr=settings.lr)
    samples = schedule.max_steps * sequences_per_step(schedule)
    windows_NT = token_windows.packed(sources.source("world"), tokenizer, settings.seq_len, samples, recipe.seed)
    callbacks = of_training(folder, schedule.checkpoint_every)
    with deterministic.training(recipe.deterministic):
        fit(model, windows_NT, schedule, recipe.seed, folder, callbacks)
    if processes.is_main():
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
