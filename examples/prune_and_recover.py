"""Prunes a language model in memory, trains it back, and measures it before and after. Runs offline on a laptop.

python prune_and_recover.py                        # a tiny Llama, trained here first: about two minutes
python prune_and_recover.py --model Qwen/Qwen3-0.6B --text wikitext2    # a real one; a GPU helps
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import espalier

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="hub id or folder; without it, a tiny model is trained")
parser.add_argument("--text", default="world", help="data set to calibrate, train and measure on, such as wikitext2")
parser.add_argument(
    "--steps", type=int, default=200, help="of fine-tuning; the tiny model is trained ten times as long"
)
chosen = parser.parse_args()


def train_tiny_model(steps: int):
    """A Llama of 0.1 million weights that has learnt the small world of `espalier recipe=tiny`."""
    from pipeline.data import world

    tokenizer = world.tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
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
if chosen.model:
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
else:
    model, tokenizer = train_tiny_model(10 * chosen.steps)


def perplexity() -> float:
    found = espalier.evaluate(model, tokenizer, perplexity=[chosen.text], seq_len=128)
    return found["perplexity"][chosen.text]


dense = perplexity()

# in place: `model` is the pruned model now; two of each four weights are zero, chosen by what flows through each layer
masks = espalier.prune(
    model, tokenizer, method="wanda", sparsity="2:4", calibration=chosen.text, samples=64, seq_len=128, batch_size=8
)
pruned = perplexity()

# a LoRA under the masks, merged at the end: as sparse as before, to the weight
espalier.finetune(
    model, masks, chosen.text, tokenizer, method="lora", max_steps=chosen.steps, seq_len=128, lr=3e-3, rank=16, alpha=32
)
recovered = perplexity()
kept = espalier.verify(model, masks)

print(f"\nperplexity: {dense:.2f} dense, {pruned:.2f} pruned, {recovered:.2f} recovered")
print(f"{kept['sparsity']:.1%} of the weights in {kept['matrices']} matrices are zero, exactly those of the masks")
# to keep them: masks.save("masks.safetensors"); model.save_pretrained("pruned"); tokenizer.save_pretrained("pruned")
