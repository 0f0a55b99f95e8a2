"""A compact model gives what the dense one gives, in less memory, and never reads what is not there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from pipeline.commands.export import export
from pipeline.compact import file_format, kernels
from pipeline.compact.compact_model import CompactLinear, FewTokensLinear, load_compact
from pipeline.compact.compact_weight import CompactWeight
from pipeline.compact.expand import expand
from pipeline.compact.file_format import Compact, Layout, compress
from pipeline.compact.memory import HugePages
from pipeline.models import loading
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe
from tests.compact.test_compact import NAME, SHARD, folder, prune_, resign  # noqa: F401
from tests.engine.test_decoder import small_model
from tests.families import save, text

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-12}


def a_matrix(
    rows: int, columns: int, sparsity: float, dtype: torch.dtype, values: str = "exact"
) -> tuple[torch.Tensor, CompactWeight]:
    """A random matrix, and its compact form; for int8 values the dequantised matrix."""
    mask = torch.rand(rows, columns) >= sparsity
    weight = torch.where(mask, torch.randn(rows, columns).to(dtype), torch.zeros((), dtype=dtype))
    packed = compress("w", weight, mask, False, ("x",), values)
    return packed.dense(), CompactWeight.from_compact(packed, dtype)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    scale = 1 + expected.abs().max()
    assert found.dtype == dtype and (found.double() - expected).abs().max() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("values", file_format.KINDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (16, 64), (9, 72), (33, 100), (7, 31), (24, 576)])
def test_products_of_few_and_many_tokens(shape, dtype, values):
    for sparsity in (0.0, 0.3, 0.5, 0.9, 1.0):
        weight, compact = a_matrix(*shape, sparsity, dtype, values)
        assert torch.equal(compact.dense(), weight) and compact.shape == weight.shape
        for tokens in (1, 2, 3, 4, 5, 9, 40):
            x, bias = torch.randn(1, tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
            close(compact.linear(x, bias), F.linear(x.double(), weight.double(), bias.double()), dtype)
            close(compact.linear(x), F.linear(x.double(), weight.double()), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_tokens_by_several_tiles_and_threads(threads, dtype):
    """Tiles have 256 rows; so large a product is divided among threads, which do not inherit the inference mode."""
    weight, compact = a_matrix(1300, 40, 0.5, dtype)
    x, bias, before = torch.randn(150, 80).to(dtype)[:, ::2], torch.randn(1300).to(dtype), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                close(compact.linear(x, bias), F.linear(x.double(), weight.double(), bias.double()), dtype)
                close(compact.linear(x), F.linear(x.double(), weight.double()), dtype)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("instructions", kernels.INSTRUCTIONS)
def test_other_instructions(instructions, monkeypatch):
    if not kernels.INSTRUCTIONS[instructions][0] <= kernels.cpu_flags():
        pytest.skip(f"this CPU has no {instructions}")
    operators = kernels.build(instructions)
    monkeypatch.setattr(kernels, "load", lambda: operators)
    for dtype in DTYPES:
        for shape in [(5, 7), (16, 64), (33, 100), (24, 576)]:
            for values in file_format.KINDS:
                test_products_of_few_and_many_tokens(shape, dtype, values)
                test_int8_inputs_of_any_size(dtype)


@pytest.mark.slow
def test_the_kernels_under_address_sanitizer(tmp_path):
    """It stops the process at the first read or write outside of a tensor."""
    if kernels.best() is None or shutil.which("g++") is None:
        pytest.skip("no kernels, or no g++ here")
    names = ("libasan.so", "libstdc++.so")  # the second, since the first looks for its exceptions at the start
    found = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names]
    if not all(Path(library).is_file() for library in found):
        pytest.skip("no AddressSanitizer here")
    code = (
        "from pipeline.compact import kernels; import tests.compact.test_compact_model as tests\n"
        "operators = kernels.build(kernels.best(), '-fsanitize=address', '-O0'); kernels.load = lambda: operators\n"
        "for dtype in tests.DTYPES:\n"
        "    for values in ('exact', 'int8'):\n"
        "        for shape in [(1, 1), (5, 7), (16, 64), (33, 100), (24, 576)]:\n"
        "            tests.test_products_of_few_and_many_tokens(shape, dtype, values)\n"
        "print('all done')"
    )
    asan = {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | asan, capture_output=True, text=True)
    assert "all done" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_inputs_of_any_size(dtype):
    """One large number costs the small ones no more than 2^-23 of it, and what is not finite stays so."""
    weight, compact = a_matrix(8, 128, 0.5, dtype, "int8")
    exact = (weight.double() / compact.scales[:, None]).round() * compact.scales[:, None].double()
    for size in (1e-3, 1.0, 1e2):
        x = (torch.randn(1, 128) * size).to(dtype)
        x[0, 5] = 3e3 * size**0.1
        expected = x.double() @ exact.T
        rounding = 2**-23 * x.abs().max() * exact.abs().sum(1)
        error = (compact.linear(x).double() - expected).abs()
        assert (error <= TOLERANCE[dtype] * expected.abs().max() + rounding).all()
    close(compact.linear(torch.zeros(1, 128, dtype=dtype)), torch.zeros(1, 8), dtype)
    for odd in (torch.inf, torch.nan):
        x[0, 7] = odd
        assert not compact.linear(x).isfinite().any() or kernels.load() is None


def test_memory_of_weights():
    """Copies are aligned, apart from each other, and outlive the object that made them."""
    pages = HugePages()
    tensors = [torch.arange(3), torch.randn(7, 5).bfloat16(), torch.empty(0), torch.randn(1 << 12)]
    copies = [pages.copy(tensor) for tensor in tensors]
    del pages
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy) and tensor.dtype == copy.dtype and copy.data_ptr() % 64 == 0


def test_without_kernels_the_dense_way_serves(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "best", lambda: None)
    monkeypatch.setattr(kernels, "_loaded", [])
    test_products_of_few_and_many_tokens((9, 72), torch.bfloat16, "exact")
    test_products_of_few_and_many_tokens((9, 72), torch.bfloat16, "int8")
    assert capsys.readouterr().out.count("\n") == 1  # said once


def test_whatever_else_torch_does_with_it_sees_it_dense():
    weight, compact = a_matrix(8, 16, 0.5, torch.float32)
    x = torch.randn(3, 16)
    assert torch.equal(x @ compact.T, compact.linear(x))
    for found, expected in [
        (torch.cat([compact, weight]), torch.cat([weight, weight])),
        (torch.einsum("ni,oi->no", x, compact), torch.einsum("ni,oi->no", x, weight)),
        (compact.float().sum(), weight.sum()),
        (compact[2:4], weight[2:4]),
        (weight @ compact.T, weight @ weight.T),
    ]:
        torch.testing.assert_close(found, expected)
    x.requires_grad_()
    compact.linear(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 16))


def test_a_mask_that_does_not_fit_its_values_is_refused():
    layout = Layout((4, 64), torch.float32, False, ("x",))
    bits = torch.full((32,), 255, dtype=torch.uint8)
    with pytest.raises(UserError, match="keeps 256 weights, but there are 255"):
        CompactWeight.from_compact(Compact("w", layout, bits, torch.zeros(255)), torch.float32)


def test_the_kernels_refuse_what_does_not_fit():
    operators = kernels.load()
    if operators is None:
        pytest.skip("no kernels here")
    _, it = a_matrix(8, 64, 0.5, torch.float32)
    x = torch.randn(1, 64)
    operators.product(it.mask, it.values, None, it.offsets, x, None)
    for mask, values, scales, offsets, inputs, bias in [
        (it.mask, it.values[:-1], None, it.offsets, x, None),
        (it.mask, it.values, None, it.offsets - 1, x, None),
        (it.mask, it.values, None, it.offsets[:-1], x, None),
        (it.mask[:, :-1], it.values, None, it.offsets, x, None),
        (it.mask, it.values, None, it.offsets, torch.randn(1, 65), None),
        (it.mask, it.values, None, it.offsets, x.bfloat16(), None),
        (it.mask, it.values, None, it.offsets, x, torch.zeros(7)),
        (it.mask, it.values.double(), None, it.offsets, x.double(), None),
        (it.mask, it.values, torch.ones(8), it.offsets, x, None),
        (it.mask, it.values.byte(), None, it.offsets, x, None),
        (it.mask, it.values.byte(), torch.ones(7), it.offsets, x, None),
        (it.mask, it.values.byte(), torch.ones(8).double(), it.offsets, x, None),
    ]:
        with pytest.raises(RuntimeError):
            operators.product(mask, values, scales, offsets, inputs, bias)
        with pytest.raises(RuntimeError):
            operators.prefill(mask, values, scales, offsets, inputs, bias)
        with pytest.raises(RuntimeError):
            operators.expand(mask, values, scales, offsets, inputs.new_empty(8 if bias is None else 7, inputs.shape[1]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@torch.no_grad()
def test_an_int8_model_gives_what_its_dequantised_weights_give(tmp_path, family):
    model = small_model(family)
    masks = prune_(model, "0.5", dense="layers.1.mlp.experts.gate_up_proj[2]")
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", masks, tmp_path / "compact", values="int8")
    assert not expand(tmp_path / "compact", tmp_path / "back")
    dense, ours = loading.load(tmp_path / "back", Recipe()), load_compact(tmp_path / "compact")
    for tokens in (2, 24):  # by the kernel and by tiles
        ids = text(1, tokens) % 60 + 1
        expected, found = (model(input_ids=ids, use_cache=False).logits for model in (dense, ours))
        assert (found - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())


FAMILIES = ["llama", "gpt2", "opt", "bloom", "gemma2", "phi", "mixtral", "qwen2_moe"]
OTHERS = [
    "gpt_oss",
    "llama4_text",
    "deepseek_v3",
    "falcon",
    "gemma3n_text",
    "bamba",
    "zamba2",
    "qwen3_next",
    "gemma3:whole",
]


@pytest.mark.parametrize("family", FAMILIES + OTHERS)
@torch.no_grad()
@pytest.mark.slow
def test_every_kind_of_family_gives_what_the_dense_model_gives(tmp_path, family):
    if family in FAMILIES:
        model = small_model(family)
    else:
        try:
            model = save(family, tmp_path / "tokenizer")
        except (ImportError, ValueError) as error:
            pytest.skip(str(error))
    masks = prune_(model, "0.5")
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", masks, tmp_path / "compact")
    dense, ours = loading.load(tmp_path / "model", Recipe()), load_compact(tmp_path / "compact")
    assert type(ours) is type(dense)
    for (name, buffer), (other, expected) in zip(ours.named_buffers(), dense.named_buffers(), strict=True):
        assert name == other and torch.equal(buffer, expected), name
    kept = dict(dense.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, kept[name]) and parameter.dtype == kept[name].dtype, name
    pruned = {name.split("[")[0] for name in masks}
    assert pruned.isdisjoint(dict(ours.named_parameters()))
    for tokens in (2, 24):  # by the kernel and by tiles
        ids = text(1, tokens) % 60 + 1 if family in FAMILIES else text(1, tokens)
        expected = dense(input_ids=ids, use_cache=False).logits
        found = ours(input_ids=ids, use_cache=False).logits
        assert (found - expected).abs().max() <= 1e-5 * (1 + expected.abs().max()), family


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen2_moe", "gpt_oss", "falcon"])
@torch.no_grad()
def test_no_matrix_is_made_dense_for_one_token(tmp_path, monkeypatch, family):
    if kernels.load() is None:
        pytest.skip("no kernels here")
    model = small_model(family) if family in FAMILIES else save(family, tmp_path / "tokenizer")
    masks = prune_(model, "0.5")
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", masks, tmp_path / "compact")
    ours = load_compact(tmp_path / "compact")
    operators = SimpleNamespace(product=kernels.load().product, dense=kernels.load().dense)
    monkeypatch.setattr(kernels, "load", lambda: operators)
    monkeypatch.setattr(CompactWeight, "matrix", None)
    ours(input_ids=torch.tensor([[3]]))


@pytest.mark.parametrize("pattern", ["0.3", "2of4", "0.7"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_greedy_generation(tmp_path, pattern, dtype):
    """The tokens are the dense model's; where one is not, the dense model had the two within the tolerance."""
    model = small_model("llama", vocab_size=521, hidden_size=128, intermediate_size=192, head_dim=32).to(dtype)
    masks = prune_(model, pattern)
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", masks, tmp_path / "compact")
    dense, ours = loading.load(tmp_path / "model", Recipe()), load_compact(tmp_path / "compact")
    assert ours.dtype == dtype and isinstance(ours.model.layers[0].mlp.up_proj, CompactLinear)
    assert isinstance(ours.lm_head, FewTokensLinear) == (dtype != torch.float32)
    ids = torch.arange(3, 40).view(1, -1)
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    found = ours.generate(ids, use_cache=True, **how)
    assert found.shape == (1, 57)
    logits, of_ours = (model(input_ids=found, use_cache=False).logits[0, 36:-1].float() for model in (dense, ours))
    assert (logits - of_ours).abs().max() <= TOLERANCE[dtype] * (1 + logits.abs().max())
    lead = logits.max(1).values - logits.gather(1, found[0, 37:, None])[:, 0]
    assert (lead <= 2 * TOLERANCE[dtype] * (1 + logits.abs().max())).all()


def test_a_compact_model_stays_what_it_is(folder, tmp_path):  # noqa: F811
    model = load_compact(folder)
    model.to("cpu").float()
    for change in (lambda: model.half(), lambda: model.save_pretrained(tmp_path / "saved")):
        with pytest.raises(UserError):
            change()


def test_damaged_values_and_bits(folder, tmp_path):  # noqa: F811
    for part, harm in [("#values", lambda t: t[:-1].clone()), ("#mask", lambda t: t ^ 4)]:
        bad = Path(shutil.copytree(folder, tmp_path / part.strip("#")))
        tensors = load_file(bad / SHARD)
        tensors[NAME + part] = harm(tensors[NAME + part])
        save_file(tensors, bad / SHARD)
        resign(bad, lambda about: None)
        with pytest.raises(UserError, match="is damaged: its mask keeps"):
            load_compact(bad)


def test_the_cache_of_kernels_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = kernels.private(kernels.cache() / "some")
    assert (made.stat().st_mode & 0o777, made.parent.stat().st_mode & 0o777) == (0o700, 0o700)
    made.chmod(0o770)
    with pytest.raises(RuntimeError, match="may be written by others"):
        kernels.private(made)
    shutil.rmtree(made)
    made.symlink_to(tmp_path)
    with pytest.raises((RuntimeError, OSError)):
        kernels.private(made)


def test_without_ninja_a_line_says_so(tmp_path, monkeypatch, capsys):
    if kernels.best() is None:
        pytest.skip("no kernels here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels.shutil, "which", lambda tool: None if tool == "ninja" else tool)
    monkeypatch.setattr(kernels, "_loaded", [])
    assert kernels.load() is None and kernels.load() is None
    (line,) = capsys.readouterr().out.splitlines()
    assert "pip install ninja" in line
