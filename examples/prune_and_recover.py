"""Prunes a language model in memory, fine-tunes it, and measures it before and after. Runs offline on a laptop.

python prune_and_recover.py                        # a tiny Llama, which it first trains: about two minutes
python prune_and_recover.py --model Qwen/Qwen3-0.6B --text wikitext2    # a real model; a GPU helps
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import espalier

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="hub id or folder; without it, a tiny model is trained")
parser.add_argument("--text", default="world", help="data set to calibrate, train and measure on, such as wikitext2")
parser.add_argument(
    "--steps", type=int, default=200, help="fine-tuning steps; the tiny model is trained ten times as long"
)
options = parser.parse_args()


def train_tiny_model(steps: int):
    """Trains a Llama of 0.1 million weights on the generated world of `espalier recipe=tiny`."""
    from pipeline.data import world
    from pipeline.settings.schema import Pretrain
    from pipeline.stages import pretrain

    tokenizer = world.tokenizer()
    sizes = Pretrain(hidden_size=48, intermediate_size=128, layers=2, heads=2, kv_heads=1)
    model = LlamaForCausalLM(pretrain.toy(sizes).config)
    stream = torch.tensor([token for ids in tokenizer(world.documents("train")).input_ids for token in ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        starts = torch.randint(len(stream) - 128, (8,))
        ids = torch.stack([stream[start : start + 128] for start in starts])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval(), tokenizer


torch.manual_seed(0)
if options.model:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
else:
    model, tokenizer = train_tiny_model(10 * options.steps)


def perplexity() -> float:
    results = espalier.evaluate(model, tokenizer, perplexity=[options.text], seq_len=128)
    return results["perplexity"][options.text]


dense = perplexity()

# in place: `model` is now pruned, and two of every four weights are zero
masks = espalier.prune(
    model, tokenizer, method="wanda", sparsity="2:4", calibration=options.text, samples=64, seq_len=128, batch_size=8
)
pruned = perplexity()

# a LoRA that keeps the masks, merged at the end
espalier.finetune(
    model,
    masks,
    options.text,
    tokenizer,
    method="lora",
    max_steps=options.steps,
    seq_len=128,
    lr=3e-3,
    rank=16,
    alpha=32,
)
recovered = perplexity()
counts = espalier.verify(model, masks)

print(f"\nperplexity: {dense:.2f} dense, {pruned:.2f} pruned, {recovered:.2f} recovered")
print(f"{counts['sparsity']:.1%} of the weights in {counts['matrices']} matrices are zero, as in the masks")
# to save: masks.save("masks.safetensors"); model.save_pretrained("pruned"); tokenizer.save_pretrained("pruned")
