"""A Llama in llama.cpp as a baseline for speed.py: pip install llama-cpp-python gguf.

Weights are bf16 as in the model folder. The GGUF file has no tokenizer, since tokens are given as ids.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = {  # names in a GGUF file, after "blk.<number>."
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
CONTEXT = 1024  # tokens


def write_gguf(model: nn.Module, path: Path) -> None:
    """Writes a bf16 `LlamaForCausalLM` without biases and RoPE scaling."""
    import gguf

    config = model.config
    size = config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, weight: Tensor) -> None:
        if weight.dim() == 1:
            writer.add_tensor(f"{name}.weight", weight.detach().float().numpy())
        else:
            raw = weight.detach().bfloat16().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(f"{name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.BF16)

    add("token_embd", model.model.embed_tokens.weight)  # the head too, where it is tied
    add("output_norm", model.model.norm.weight)
    if not config.tie_word_embeddings:
        add("output", model.lm_head.weight)
    for number, layer in enumerate(model.model.layers):
        for theirs, ours in BLOCK.items():
            weight = layer.get_submodule(ours).weight
            if theirs in ("attn_q", "attn_k"):
                # llama.cpp rotates neighbours, transformers the two halves of a head
                weight = weight.view(-1, 2, size // 2, config.hidden_size).transpose(1, 2).reshape(weight.shape)
            add(f"blk.{number}.{theirs}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """Generates and reads a prompt as the other models of speed.py do, with torch's number of threads, batch 1."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.model = llama_cpp.Llama(str(path), n_ctx=CONTEXT, n_batch=CONTEXT, verbose=False)

    def generate(self, ids: Tensor, max_new_tokens: int, **_: Any) -> Tensor:
        """Greedily generated tokens after the prompt `ids` (1, N): (1, N + max_new_tokens)."""
        self._start()
        tokens = self.model.generate(ids[0].tolist(), top_k=1, temp=0.0, repeat_penalty=1.0)
        new = [next(tokens) for _ in range(max_new_tokens)]
        return torch.cat([ids, torch.tensor([new])], 1)

    def __call__(self, input_ids: Tensor, **_: Any) -> None:
        self._start()
        self.model.eval(input_ids[0].tolist())

    def _start(self) -> None:
        threads = torch.get_num_threads()
        self.api.llama_set_n_threads(self.model.ctx, threads, threads)
        self.model.reset()
        self.model._ctx.kv_cache_clear()
