"""Quantised checkpoints are dequantised exactly or refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GptOssConfig, GptOssForCausalLM

from pipeline.models import file_names, loading
from pipeline.models.model_files import Tensors
from pipeline.models.rewrite import parameters, rewrite
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe
from pipeline.stages import space
from tests.engine.test_decoder import small_model

IDS = torch.arange(3, 51).view(2, 24)
BITSANDBYTES = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True},
}


def perplexity(model) -> float:
    with torch.no_grad():
        return model(input_ids=IDS, labels=IDS).loss.float().exp().item()


def saved(family: str, folder: Path, **more) -> Path:
    """With weights so large that rounding them matters."""
    model = small_model(family, **more)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 4
    model.save_pretrained(folder)
    return folder


def name_in_config(folder: Path, about: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))


def check_plain(model, folder: Path, target: Path) -> None:
    """Checks that neither the model in memory nor a folder written from it is quantised."""
    before = loading.skeleton(folder, Recipe())
    assert file_names.saved_state(before).keys() == file_names.saved_state(model).keys()
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in before.named_modules()}
    assert {parameter.dtype for parameter in model.parameters()} == {model.config.dtype}
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit"):
        assert not hasattr(model, name)
    assert not hasattr(model.config, "quantization_config")
    weights = dict(parameters(folder, Recipe()))
    assert weights and all(torch.equal(weight, model.state_dict()[name]) for name, weight in weights.items())

    rewrite(folder, target, Recipe(), lambda name, weight: None)
    assert "quantization_config" not in (target / "config.json").read_text()
    assert loading.quantization(target) is None
    plain, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(plain(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", BITSANDBYTES)
@pytest.mark.slow
def test_bitsandbytes(tmp_path, family, kind, capsys):
    size = {"n_inner": 128} if family == "gpt2" else {"intermediate_size": 128, "head_dim": 16}
    saved(family, tmp_path / "dense", hidden_size=64, **size)  # required by bitsandbytes' CPU kernels
    asked = BitsAndBytesConfig(**BITSANDBYTES[kind])
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=asked, device_map={"": "cpu"}
    ).save_pretrained(tmp_path / "quantised")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map={"": "cpu"})
    capsys.readouterr()
    model = loading.load(tmp_path / "quantised", Recipe())
    assert f"is quantised ({kind}): its weights are dequantised to float32" in capsys.readouterr().out
    assert loading.quantization(tmp_path / "quantised") == kind
    assert perplexity(model) == pytest.approx(perplexity(theirs), rel=0.02)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), dense.parameters(), strict=True))
    check_plain(model, tmp_path / "quantised", tmp_path / "written")
    with pytest.raises(UserError, match="set evaluate.placement=stream"):
        loading.load(tmp_path / "quantised", Recipe(), device_map="auto")


def in_float8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix in 8-bit floats, the scale of each block, and the dequantised matrix."""
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    whole = torch.empty_like(weight)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scale[i, j] = weight[part].abs().max() / 448
            whole[part] = scale[i, j]
    quantised = (weight / whole).to(torch.float8_e4m3fn)
    return quantised, scale, quantised.float() * whole


@pytest.mark.parametrize(
    ("family", "block"),
    [("llama", (16, 16)), ("llama", (32, 20)), ("llama", (128, 128)), ("mixtral", (16, 8)), ("mixtral", (20, 20))],
)
@pytest.mark.slow
def test_float8(tmp_path, family, block):
    """Also if the last block of a matrix is cut off."""
    weights = load_file(saved(family, tmp_path / "dense") / "model.safetensors")
    exact = dict(weights)
    for name in [name for name in weights if "_proj" in name or "experts" in name]:
        weights[name], weights[f"{name}_scale_inv"], exact[name] = in_float8(weights[name], block)
    folder = tmp_path / "quantised"
    folder.mkdir()
    (folder / "config.json").write_text((tmp_path / "dense/config.json").read_text())
    name_in_config(folder, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)})
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    save_file(exact, tmp_path / "dense/model.safetensors", {"format": "pt"})
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")

    model = loading.load(folder, Recipe())
    assert loading.quantization(folder) == "fp8"
    for name, parameter in dense.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    check_plain(model, folder, tmp_path / "written")
    assert set(Tensors(tmp_path / "written")) == set(exact)
    assert {p.dtype for p in loading.load(folder, Recipe(dtype="bfloat16")).parameters()} == {torch.bfloat16}

    scale = next(name for name in weights if "scale" in name)
    del weights[scale]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="8-bit floats without scales"):
        loading.load(folder, Recipe())


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def test_mxfp4(tmp_path):
    torch.manual_seed(0)
    config = GptOssConfig(
        **{
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_local_experts": 4,
        },
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2},
        **{"pad_token_id": 0, "eos_token_id": 2},
        dtype="bfloat16",
    )
    GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    exact = {}
    for name in [name for name in weights if name.endswith("_proj") and "experts" in name]:
        experts, inputs, outputs = weights.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 126, (experts, outputs, inputs // 32), dtype=torch.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], -1).flatten(-2)
        values = values * 2.0 ** (scales.float() - 127)[..., None]
        exact[name] = values.flatten(-2).transpose(1, 2)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    name_in_config(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})

    model = loading.load(tmp_path, Recipe())
    assert loading.quantization(tmp_path) == "mxfp4"
    assert len(exact) == 4
    for name, weight in exact.items():
        assert torch.equal(model.get_parameter(name), weight.bfloat16()), name
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model(IDS).logits, theirs(IDS).logits)
    check_plain(model, tmp_path, tmp_path / "written")
    assert exact.keys() < set(Tensors(tmp_path / "written"))
    plain = sum(parameter.numel() * 2 for parameter in model.parameters())
    assert space._prune(Recipe(model=str(tmp_path)), {}) > plain  # more than its files hold


@pytest.mark.parametrize(
    "about",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "something-new"},
        {"bits": 4},
    ],
)
def test_formats_that_cannot_be_dequantised_are_refused(tiny_llama, tmp_path, about):
    for path in tiny_llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    name_in_config(tmp_path, about)
    name = about.get("quant_method", "an unknown method")
    for read in (loading.load, lambda *of: list(parameters(*of))):
        with pytest.raises(UserError, match=f"is quantised by {name} .* set model=... to the unquantised model"):
            read(tmp_path, Recipe())


def test_quantisation_in_the_text_config_only(tmp_path):
    config = {"text_config": {"quantization_config": {"quant_method": "gptq"}}, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert loading.quantization(tmp_path) == "gptq"


@pytest.mark.slow
def test_pruning_a_quantised_model_writes_an_unquantised_one(tiny_llama, tmp_path, finishes):
    folder, exact = tmp_path / "model", load_file(tiny_llama / "model.safetensors")
    shutil.copytree(tiny_llama, folder)
    weights = dict(exact)
    for name in [name for name in weights if "_proj" in name]:
        weights[name], weights[f"{name}_scale_inv"], exact[name] = in_float8(weights[name], (16, 16))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    name_in_config(folder, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]})
    _, output = finishes(tmp_path / "run", f"model={folder}")
    assert output.count("is quantised (fp8): its weights are dequantised to float32") == 1
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "run/prune/model", output_loading_info=True)
    assert not any(info.values()) and not hasattr(model.config, "quantization_config")
    for name, weight in model.named_parameters():
        assert torch.equal(weight[weight != 0], exact[name][weight != 0]), name
