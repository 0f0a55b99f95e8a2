"""The pretrain stage of toy recipes: trains a small model from scratch, a Llama on the generated world or a ViT on digits."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, ViTConfig, ViTForImageClassification

from callbacks import of_training
from pipeline import tasks
from pipeline.data import digits, sources, world
from pipeline.recovery.training import fit, sequences_per_step
from pipeline.runtime import deterministic, processes
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Finetune, Pretrain, Recipe


class Toy(NamedTuple):
    """A model to train: its class and configuration, and what prepares its inputs."""

    name: str
    model_class: type[nn.Module]
    config: PreTrainedConfig
    processor: Any


def toy(settings: Pretrain) -> Toy:
    """The model that `pretrain.dataset` needs. Raises `UserError` if its sizes do not fit together."""
    try:
        return _llama(settings) if settings.dataset == "world" else _vit(settings)
    except Exception as error:  # transformers wraps the ValueError of its check
        raise UserError(f"the sizes in the recipe's section pretrain do not fit together: {error}") from error


def _llama(settings: Pretrain) -> Toy:
    # rotary embeddings turn pairs of channels
    if settings.hidden_size % (2 * settings.heads) or settings.heads % settings.kv_heads:
        raise ValueError("twice heads must divide hidden_size, and kv_heads must divide heads")
    tokenizer = world.tokenizer()
    config = LlamaConfig(
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
    return Toy("small Llama", LlamaForCausalLM, config, tokenizer)


def _vit(settings: Pretrain) -> Toy:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    if settings.hidden_size % settings.heads or digits.SIZE % settings.patch:
        raise ValueError(f"heads must divide hidden_size, and patch must divide {digits.SIZE}")
    config = ViTConfig(
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        image_size=digits.SIZE,
        patch_size=settings.patch,
        num_channels=1,
        id2label=dict(enumerate(digits.CLASSES)),
        label2id={name: number for number, name in enumerate(digits.CLASSES)},
    )
    size = {"height": digits.SIZE, "width": digits.SIZE}
    processor = ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.5])
    return Toy("small ViT", ViTForImageClassification, config, processor)


def run(recipe: Recipe, folder: Path, inputs: dict[str, Path]) -> None:
    """Writes `model/` and `metrics.csv`."""
    settings = recipe.pretrain
    _, model_class, config, processor = toy(settings)
    torch.manual_seed(recipe.seed)
    model = model_class(config)
    schedule = Finetune(
        max_steps=settings.steps, batch_size=settings.batch_size, lr=settings.lr, seq_len=settings.seq_len
    )
    count, source = schedule.max_steps * sequences_per_step(schedule), sources.source(settings.dataset)
    samples = tasks.of(config).training(source, processor, config, schedule, count, recipe.seed)
    callbacks = of_training(folder, schedule.checkpoint_every)
    with deterministic.training(recipe.deterministic):
        fit(model, samples, schedule, recipe.seed, folder, callbacks)
    if processes.is_main():
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
