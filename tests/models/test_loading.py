"""A model folder is loaded completely and exactly or refused with one line; written models keep their input's names."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    YolosConfig,
    YolosForObjectDetection,
)

from pipeline.commands.verify import check_matrices
from pipeline.models import file_names, loading, model_files, placement
from pipeline.models.model_files import Tensors
from pipeline.models.rewrite import layers, parameters, rewrite
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe
from pipeline.sparsity.masks import Masks
from tests.engine.test_decoder import small_model
from tests.families import WHOLE, tiny

IDS = torch.arange(3, 27).view(1, -1)
FUSED = ("mixtral", "qwen2_moe")
CONVERTED = (*FUSED, "gemma3", "llava", "mistral3", "mllama", "qwen2_5_vl", "qwen3_5_moe")


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt", "bloom", *FUSED, *WHOLE])
def family(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    (tiny(f"{request.param}:whole") if request.param in WHOLE else small_model(request.param)).save_pretrained(folder)
    return request.param, folder


def load_with_transformers(name: str, folder: Path) -> nn.Module:
    """Loads with transformers' own class, without missing or unexpected keys."""
    chosen = AutoModelForImageTextToText if name in WHOLE else AutoModelForCausalLM
    model, info = chosen.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.slow
def test_every_family_loads_completely(family):
    name, folder = family
    theirs, ours = load_with_transformers(name, folder), loading.load(folder, Recipe())
    assert type(ours) is type(theirs) is type(loading.skeleton(folder, Recipe()))
    same(ours.state_dict(), theirs.state_dict())
    assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS, use_cache=False).logits)


@pytest.mark.slow
def test_every_family_is_written_with_its_input_names(family, tmp_path, monkeypatch):
    """Bit for bit except for the changed weights, layer by layer and all at once."""
    name, folder = family
    monkeypatch.setattr("pipeline.models.rewrite.SHARD", 20_000)
    before, model = load_file(folder / "model.safetensors"), loading.load(folder, Recipe())
    same(file_names.to_files(model, file_names.saved_state(model)), before)
    assert file_names.converts(model) == (
        name in (*FUSED, "gemma3", "llava", "mistral3", "mllama", "qwen2_5_vl", "qwen3_5_moe")
    )

    rewrite(folder, tmp_path / "same", Recipe(), lambda name, weight: None)
    assert len(list((tmp_path / "same").glob("*.safetensors"))) > 1
    same(dict(model_files.tensors(tmp_path / "same")), before)
    same(load_with_transformers(name, tmp_path / "same").state_dict(), model.state_dict())

    seen = set()

    def zeroed(name: str, weight: Tensor) -> Tensor | None:
        seen.add(name)
        return torch.zeros_like(weight) if "down_proj" in name or "fc2" in name or "mlp.c_proj" in name else None

    rewrite(folder, tmp_path / "zeroed", Recipe(), zeroed)
    assert seen == {name for name, _ in model.named_parameters()}
    after = load_with_transformers(name, tmp_path / "zeroed").state_dict()
    expected = {k: v if zeroed(k, v) is None else torch.zeros_like(v) for k, v in model.state_dict().items()}
    same(after, expected)


@pytest.mark.slow
def test_streamed_parameters_equal_those_in_memory(family):
    name, folder = family
    model = loading.load(folder, Recipe())
    streamed = list(parameters(folder, Recipe()))
    same(dict(streamed), file_names.saved_state(model))
    assert len(streamed) == len(dict(streamed))
    _, by_layer = layers(folder, Recipe())
    assert {layer for layer in by_layer if layer} == {file_names.layer_of(n) for n, _ in streamed} - {""}


def test_masks_of_fused_experts_are_checked_against_their_files(tmp_path):
    model = small_model("mixtral")
    masks, name = Masks(), "model.layers.1.mlp.experts.gate_up_proj"
    weight = model.get_parameter(name).data
    for expert in range(len(weight)):
        masks.add(f"{name}[{expert}]", torch.rand(weight.shape[1:]) < 0.5, "0.5")
        weight[expert] *= masks[f"{name}[{expert}]"]
    model.save_pretrained(tmp_path)
    assert not any("gate_up" in name for name in load_file(tmp_path / "model.safetensors"))
    assert masks.violations(parameters(tmp_path, Recipe())) == []

    row, column = (~masks[f"{name}[2]"])[48:].nonzero()[3].tolist()  # in its up_proj, after the gate's 48 rows
    files_of = load_file(tmp_path / "model.safetensors")
    (stray,) = (
        n for n in files_of if ("layers.1." in n and "experts.2." in n and ".w3." in n) or "experts.2.up_proj" in n
    )
    files_of[stray][row, column] = 0.25
    save_file(files_of, tmp_path / "model.safetensors", {"format": "pt"})
    (violation,) = [matrix.violation for matrix in check_matrices(tmp_path, masks, Recipe()) if matrix.violation]
    assert (violation.name, violation.first, violation.value) == (f"{name}[2]", (48 + row, column), 0.25)


def changed(origin: Path, folder: Path, change) -> Path:
    shutil.copytree(origin, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v.contiguous() for k, v in change(weights).items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def refused(folder: Path) -> str:
    """The message, which is the same for every way of reading the folder."""
    output = []
    for read in (loading.load, lambda *of: list(parameters(*of))):
        with pytest.raises(UserError) as raised:
            read(folder, Recipe())
        output.append(str(raised.value))
    assert output[0] == output[1]
    return output[0]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_weights_that_do_not_match_the_model_are_refused(family, tmp_path):
    small_model(family).save_pretrained(tmp_path / "model")
    bias = "model.layers.1.self_attn.q_proj.bias"
    more = changed(tmp_path / "model", tmp_path / "more", lambda w: w | {bias: torch.ones(32), "x.y": torch.ones(1)})
    assert f"holds {bias}, which its config.json does not define (2 such)" in refused(more)
    norm = "model.layers.2.input_layernorm.weight"
    less = changed(tmp_path / "model", tmp_path / "less", lambda w: {k: v for k, v in w.items() if k != norm})
    assert f"lacks {norm} (1 missing)" in refused(less)
    other = changed(tmp_path / "model", tmp_path / "other", lambda w: w | {norm: torch.ones(7)})
    assert f"{norm} is (7,) in the files, but (32,) by config.json" in refused(other)


def test_a_missing_or_damaged_shard_is_named(tmp_path):
    small_model("mixtral").save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:100])
    assert f"{shard.name} (100 bytes) is damaged" in refused(tmp_path)
    shard.unlink()
    assert f"No such file or directory: {shard}" in refused(tmp_path).replace('"', "")


def test_a_missing_expert_is_refused(tmp_path):
    small_model("mixtral").save_pretrained(tmp_path / "model")
    less = changed(
        tmp_path / "model",
        tmp_path / "less",
        lambda w: {k: v for k, v in w.items() if "layers.1" not in k or "experts.3" not in k},
    )
    assert "model.layers.1.mlp.experts" in refused(less)


OLD = {
    "llama": lambda w: w | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)},
    "gpt2": lambda w: (
        {k.removeprefix("transformer."): v for k, v in w.items()}
        | {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(3)}
        | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    ),
    "opt": lambda w: w | {"lm_head.weight": w["model.decoder.embed_tokens.weight"].clone()},
    "qwen2": lambda w: {"lm_head.weight" if "embed" in k else k: v for k, v in w.items()},
}


@pytest.mark.parametrize("family", OLD)
def test_old_checkpoint_formats_are_loaded(family, tmp_path):
    """Buffers that are now computed, names without prefix, a tied weight twice or under its other name."""
    model = small_model(family, tie_word_embeddings=family != "llama")
    model.save_pretrained(tmp_path / "new")
    old = changed(tmp_path / "new", tmp_path / "old", OLD[family])
    expected = file_names.saved_state(model)
    same(file_names.saved_state(loading.load(old, Recipe())), expected)
    same(dict(parameters(old, Recipe())), expected)
    rewrite(old, tmp_path / "written", Recipe(), lambda name, weight: None)
    same(load_with_transformers(family, tmp_path / "written").state_dict(), model.state_dict())


def test_tied_weights_that_differ_in_the_files_are_not_tied(tmp_path):
    model = small_model("qwen2", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    change = lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"] * 2}  # noqa: E731
    folder = changed(tmp_path / "tied", tmp_path / "apart", change)
    loaded = loading.load(folder, Recipe())
    same(dict(parameters(folder, Recipe())), file_names.saved_state(loaded))
    rewrite(folder, tmp_path / "written", Recipe(), lambda name, weight: None)
    same(load_with_transformers("qwen2", tmp_path / "written").state_dict(), loaded.state_dict())
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save_are_streamed(tmp_path, zipped):
    model = small_model("mixtral")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    same(dict(parameters(tmp_path, Recipe())), file_names.saved_state(model))


def test_weight_files_that_transformers_does_not_load_are_ignored(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    save_file({"tok_embeddings.weight": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert "tok_embeddings.weight" not in set(Tensors(tmp_path))
    assert dict(parameters(tmp_path, Recipe())).keys() == dict(parameters(tiny_llama, Recipe())).keys()


def adapted(model: nn.Module) -> peft.PeftModel:
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], r=2, base_model_name_or_path="some/base")
    )


def test_an_adapter_in_a_model_folder_is_refused(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    adapted(small_model("llama")).save_pretrained(tmp_path)
    line = refused(tmp_path)
    assert f"{tmp_path / 'adapter_config.json'} makes transformers load an adapter" in line and "adapter_*" in line


def test_an_adapter_folder_error_names_the_base_model(tmp_path):
    adapter = adapted(small_model("llama"))
    adapter.peft_config["default"].base_model_name_or_path = "some/base"
    adapter.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=f"model={tmp_path} is an adapter of some/base .*: set model=some/base, or merge"
    ):
        loading.locate(str(tmp_path), None)


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_the_weights_of_a_peft_model_are_refused(tmp_path, prefix):
    small_model("llama").save_pretrained(tmp_path)
    state = adapted(small_model("llama")).state_dict()
    state = {prefix + k.removeprefix("base_model.model."): v.clone() for k, v in state.items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    line = refused(tmp_path)
    assert f"{tmp_path} holds the weights of a PeftModel ({prefix}" in line and "merge_and_unload" in line


LAYERS = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "vocab_size": 60,
}
OTHERS = {
    "BertForMaskedLM": lambda: BertForMaskedLM(BertConfig(**LAYERS)),
    "T5ForConditionalGeneration": lambda: T5ForConditionalGeneration(
        T5Config(num_layers=1, d_model=16, d_ff=16, num_heads=2)
    ),
    "BartForConditionalGeneration": lambda: BartForConditionalGeneration(
        BartConfig(encoder_layers=1, decoder_layers=1, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16)
    ),
    "CLIPModel": lambda: CLIPModel(
        CLIPConfig(text_config=LAYERS, vision_config=LAYERS | {"image_size": 28, "patch_size": 14})
    ),
    "ViTModel": lambda: ViTModel(ViTConfig(**LAYERS, image_size=28, patch_size=14)),
    "YolosForObjectDetection": lambda: YolosForObjectDetection(
        YolosConfig(**LAYERS, image_size=[28, 28], patch_size=14, num_detection_tokens=2)
    ),
    "SegformerForSemanticSegmentation": lambda: SegformerForSemanticSegmentation(
        SegformerConfig(num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[16], num_attention_heads=[1])
    ),
    "LlamaModel": lambda: LlamaModel(LlamaConfig(**LAYERS)),
    "GPT2Model": lambda: GPT2Model(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=60)),
    "LlamaForSequenceClassification": lambda: LlamaForSequenceClassification(LlamaConfig(**LAYERS)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_refused(name, tmp_path):
    OTHERS[name]().save_pretrained(tmp_path)
    assert f"{tmp_path} holds a {name} (config.json), which is " in refused(tmp_path)
    with pytest.raises(UserError, match="holds a"):
        loading.skeleton(tmp_path, Recipe())


@pytest.mark.parametrize("architectures", [None, ["LLaMAForCausalLM"], ["SomebodysForCausalLM"]])
def test_other_names_of_a_causal_language_model_are_loaded(tiny_llama, tmp_path, architectures):
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    assert type(loading.load(tmp_path, Recipe())).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["opt", "gpt2", *loading.AFTER_PADDING])
@torch.no_grad()
def test_a_text_may_fill_all_positions(name):
    model = tiny(name)
    longest = loading.positions(model.config)
    model(input_ids=IDS[:, :1].expand(1, longest))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=IDS[:, :1].expand(1, longest + 1))


@pytest.mark.parametrize(
    "needed, visible, expected",
    [
        (1, 4, [(0, (0,)), (1, (1,)), (2, (2,)), (3, (3,))]),
        (2, 4, [(0, (0, 1)), (1, (2, 3)), (None, ()), (None, ())]),
        (3, 4, [(0, (0, 1, 2, 3)), (None, ()), (None, ()), (None, ())]),
        (9, 4, [(0, (0, 1, 2, 3)), (None, ()), (None, ()), (None, ())]),
        (2, 8, [(0, (0, 1)), (1, (2, 3)), (2, (4, 5)), (3, (6, 7))]),
        (2, 1, [(0, (5,)), (1, (5,)), (2, (5,)), (3, (5,))]),  # each process sees only its own GPU
    ],
)
def test_the_gpus_of_a_node_are_divided_into_groups_that_hold_the_model(needed, visible, expected):
    """On each of two nodes with four processes."""
    shares = [placement.divide(needed, visible, rank, 4, node, 2, 5) for node in range(2) for rank in range(4)]
    holders = [share for share in shares if share.number != placement.IDLE]
    assert [share.number for share in holders] == list(range(len(holders)))
    assert all(share.of == len(holders) for share in shares)
    own = [(None if share.number == placement.IDLE else share.number, share.gpus) for share in shares[:4]]
    assert own == expected and [share.gpus for share in shares[4:]] == [gpus for _, gpus in expected]
