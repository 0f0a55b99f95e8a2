"""Other kinds of models: block by block equals the model, and the observed inputs of experts are the routed tokens."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.engine.blocks import find_blocks
from pipeline.engine.layerwise import LayerwiseForwards
from pipeline.engine.matrices import matrices
from pipeline.engine.observe import InputObserver
from tests import families
from tests.engine import walking

KINDS = {
    "llama": "one stack, grouped-query attention",
    "gemma4_text": "inputs by token for each layer, keys and values shared between layers",
    "gemma3n_text": "4-D hidden states, and layers that share keys and values",
    "deepseek_v3": "latent attention, dense and routed layers",
    "qwen3_next": "linear and full attention, a shared expert behind a gate",
    "gpt_oss": "fused experts stored transposed, with biases and sinks",
    "zamba2": "a transformer block that layers share, beside Mamba 2",
    "falcon_mamba": "a state space whose matrices kernels read",
    "opt": "learned positions, 2-D inputs of the MLP",
    "gpt2": "Conv1D",
    "hrm_text": "two stacks that are called again and again",
    "gemma3:whole": "a multimodal checkpoint, given text",
}
BATCHES = [families.text(2, 20, seed) for seed in range(3)] + [families.text(1, 13, seed=3)]


@pytest.mark.parametrize("name", KINDS)
def test_block_by_block_equals_the_model_on_different_batches(name):
    assert walking.difference(families.tiny(name), BATCHES) is None


class Experts(NamedTuple):
    """How a family computes its experts: `path` of the module with router and experts, and the names of their weights. Fused
    weights are (E, O, I) after `transposed`; `inner` computes the last projection's inputs from the first one's outputs."""

    path: str
    router: str
    up: str
    down: str
    inner: Callable[[Tensor], Tensor]
    transposed: bool = False
    scaled_inputs: bool = False  # the router weight is applied before the expert, not after it


def gated(up_N2F: Tensor) -> Tensor:
    gate, up = up_N2F.chunk(2, dim=-1)
    return F.silu(gate) * up


def gated_interleaved(up_N2F: Tensor) -> Tensor:
    """gpt-oss: gate and up are interleaved and clamped."""
    gate, up = up_N2F[:, ::2].clamp(max=7.0), up_N2F[:, 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


FUSED = {
    "mixtral": Experts("mlp", "gate", "experts.gate_up_proj", "experts.down_proj", gated),
    "gpt_oss": Experts(
        "mlp", "router", "experts.gate_up_proj", "experts.down_proj", gated_interleaved, transposed=True
    ),
    "llama4_text": Experts(
        "feed_forward",
        "router",
        "experts.gate_up_proj",
        "experts.down_proj",
        gated,
        transposed=True,
        scaled_inputs=True,
    ),
    "jetmoe": Experts("mlp", "router.layer", "input_linear.weight", "output_linear.weight", gated),
}


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_inputs_of_fused_experts_equal_a_plain_loop(name):
    model, about = families.tiny(name), FUSED[name]
    blocks = find_blocks(model)
    block_matrices = matrices(blocks[0], blocks)
    observer = InputObserver(block_matrices, lambda input_NI: input_NI.double().square().sum(0))
    with LayerwiseForwards(model, blocks, model, BATCHES, torch.device("cpu")) as walk:
        walk.start()
        for i in range(len(BATCHES)):
            with observer.batch():
                walk.run_block(i)
    observed, prefix = observer.observed, f"{blocks[0].name}.{about.path}"

    moe, given = model.get_submodule(prefix), []
    moe.register_forward_pre_hook(lambda module, args: given.append(args[0].flatten(0, 1)))
    for batch in BATCHES:
        model(input_ids=batch, use_cache=False)
    input_NI = torch.cat(given)
    router = moe.get_submodule(about.router)
    logits_NE = F.linear(input_NI, router.weight, getattr(router, "bias", None))
    chosen_NK = logits_NE.topk(2).indices
    for expert in range(4):
        tokens = (chosen_NK == expert).any(1)
        assert 0 < tokens.sum() < len(tokens)
        up_input = input_NI[tokens]
        if about.scaled_inputs:
            up_input = up_input * torch.sigmoid(logits_NE[tokens, expert, None])
        up_OI = moe.get_parameter(about.up)[expert]
        up_bias = getattr(moe, "experts", moe)._parameters.get("gate_up_proj_bias")
        up = up_input @ (up_OI if about.transposed else up_OI.T) + (0 if up_bias is None else up_bias[expert])
        for which, expected in ((about.up, up_input), (about.down, about.inner(up))):
            matrix = f"{prefix}.{which}[{expert}]"
            key = observed.shared_input_key[matrix]
            assert block_matrices[matrix].routed and block_matrices[matrix].transposed == about.transposed
            assert observed.tokens[key] == tokens.sum()
            torch.testing.assert_close(observed.totals[key], expected.double().square().sum(0), rtol=1e-5, atol=1e-8)
