"""With every method, optimizer and number of processes, the model ends exactly as sparse as its masks."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning import Callback
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.models import model_files
from pipeline.recovery import distillation, lora, quantization, training
from pipeline.recovery.methods import MaskedLora, SparseFull
from pipeline.recovery.trained_model import TrainedModel
from pipeline.runtime import processes
from pipeline.runtime.errors import UserError
from pipeline.settings import reader, schema
from pipeline.settings.schema import Finetune
from pipeline.sparsity.masks import Masks, apply_
from pipeline.sparsity.packed import pack, unpack
from pipeline.stages import finetune, prune
from pipeline.tasks.language_modeling import LanguageModeling
from tests import families, launches
from tests.conftest import QUICK
from tests.engine.test_decoder import small_model
from tests.images.classifiers import pixels, tiny
from tests.recovery.test_lora import trained, with_masks

WAYS = {
    "lora": [],
    "cached": ["finetune.effective=cached"],
    "dropout": ["finetune.dropout=0.2"],
    "full": ["finetune.method=full"],
    "nf4": ["finetune.quantize=nf4"],
    "int8": ["finetune.quantize=int8"],
    "distill": ["finetune.distill=0.7", "finetune.temperature=2"],
    "full distill": ["finetune.method=full", "finetune.distill=1"],
}
SETTINGS = [s for s in QUICK if not s.startswith("stages")]


def settings(model, *more) -> schema.Recipe:
    return reader.load([f"model={model}", "stages=[prune,finetune]", *SETTINGS, *more])


@pytest.fixture(scope="module", params=["2of4", "0.5"])
def pruned(request, tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    prune.run(settings(tiny_llama, f"prune.sparsity={request.param}"), folder, {})
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_every_method_learns_and_ends_exactly_sparse(pruned, tiny_llama, tmp_path, way):
    finetune.run(settings(tiny_llama, *WAYS[way]), tmp_path, {"prune": pruned})
    masks = Masks.load(pruned / "masks.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert masks.violations(model.named_parameters()) == []
    before = dict(model_files.tensors(pruned / "model"))
    for name, weight in model_files.tensors(tmp_path / "model"):
        if name in masks:
            assert weight.dtype == before[name].dtype
            assert not torch.equal(weight, before[name]), name
            assert not torch.signbit(weight[~masks[name]]).any(), name
        elif not way.startswith("full"):
            assert torch.equal(weight, before[name]), name
    losses = [float(row.split(",")[1]) for row in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    if "distill" not in way:
        assert losses[-1] < losses[0] - 0.01
    assert (tmp_path / "adapter").exists() != way.startswith("full")


def test_a_plain_lora_is_not_merged(pruned, tiny_llama, tmp_path):
    finetune.run(settings(tiny_llama, "finetune.method=plain_lora"), tmp_path, {"prune": pruned})
    assert not (tmp_path / "model").exists()
    model = AutoModelForCausalLM.from_pretrained(pruned / "model")
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    b = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert b and all(p.count_nonzero() for p in b)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_recomputed_and_cached_weights_have_the_same_gradients(family, bias):
    found = []
    for cached in (True, False):
        model, masks = with_masks(small_model(family))
        adapted = lora.attach(model, masks, Finetune(rank=4, bias=bias), cached=cached)
        for layer in lora.masked_layers(adapted).values():
            torch.nn.init.normal_(layer.lora_B["default"].weight, generator=torch.Generator().manual_seed(1))
        assert lora.refresh_all(adapted) == 0
        ids = torch.randint(3, 61, (2, 16), generator=torch.Generator().manual_seed(0))
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append({"loss": loss} | {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None})
    assert any("bias" in name for name in found[0]) == (bias == "all" and family != "llama")
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_trained_biases_are_merged_also_of_norms(family, bias):
    model, masks = with_masks(small_model(family))
    plain = copy.deepcopy(model)
    recovery = MaskedLora(model, masks, Finetune(rank=4, bias=bias))
    trained(recovery.model)
    merged = {name: recovery.merged(name, weight) for name, weight in plain.state_dict().items()}
    plain.load_state_dict({name: new.detach() for name, new in merged.items() if new is not None}, strict=False)
    of_norms = [
        name for name, new in merged.items() if new is not None and ("ln_1.bias" in name or "norm.bias" in name)
    ]
    assert bool(of_norms) == (bias == "all")
    ids = torch.randint(3, 61, (2, 16))
    with torch.no_grad():
        forward = recovery.model(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, forward, atol=1e-5, rtol=1e-5)


def test_dropout_acts_only_on_the_lora_branch():
    """The gradients equal autograd's for W x + M * sBA dropout(x)."""
    model, masks = with_masks(small_model("llama"))
    adapted = lora.attach(model, masks, Finetune(rank=4, dropout=0.5)).train()
    layer = next(iter(lora.masked_layers(adapted).values()))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    torch.manual_seed(3)
    out = layer(x)
    torch.manual_seed(3)
    dropped = layer.lora_dropout["default"](x)
    delta = layer.scale * (b @ a) * unpack(layer.mask_bits, layer.shape)
    expected = torch.nn.functional.linear(x, layer.base_OI()) + torch.nn.functional.linear(dropped, delta)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for mine, theirs in zip(torch.autograd.grad(out, (x, a, b), grad), torch.autograd.grad(expected, (x, a, b), grad)):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.slow
def test_quantised_weights_keep_zeros_and_nearly_all_other_weights(stories, tmp_path, kind):
    model, masks = with_masks(AutoModelForCausalLM.from_pretrained(stories))
    model.save_pretrained(tmp_path)
    small = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization.configuration(kind))
    for name, mask in masks.items():
        weight = quantization.dequantized(small.get_parameter(name)).float()
        exact = model.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert (weight - exact).norm() < {"nf4": 0.15, "int8": 0.02}[kind] * exact.norm()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("more", ["finetune.method=plain_lora", "finetune.targets=[v_proj]"])
@pytest.mark.slow
def test_a_validation_does_not_change_a_training_on_quantised_weights(tmp_path, more, kind):
    """bitsandbytes' own layers compute where no masked LoRA does. 96 inputs are no multiple of its blocks of 64."""
    families.save("llama", tmp_path / "model")
    rows = [{"input_ids": ids} for ids in families.text(30, 40).tolist()]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = [f"{section}.dataset={tmp_path}/text.jsonl" for section in ("calibration", "finetune")]
    recipe = settings(tmp_path / "model", *text, f"finetune.quantize={kind}", more)
    prune.run(recipe, tmp_path / "pruned", {})
    adapters = []
    for validation in (None, f"{tmp_path}/text.jsonl"):
        recipe.finetune.validation, recipe.finetune.validate_every = validation, 2
        finetune.run(recipe, tmp_path / str(len(adapters)), {"prune": tmp_path / "pruned"})
        adapters.append(load_file(tmp_path / str(len(adapters)) / "adapter/adapter_model.safetensors"))
    for name, weight in adapters[0].items():
        assert torch.equal(weight, adapters[1][name]), name


def test_packed_masks_unpack_to_the_masks():
    for shape in ((3, 5), (8, 16), (1, 1)):
        mask = torch.rand(shape) < 0.5
        assert len(pack(mask)) == -(-mask.numel() // 8)
        assert torch.equal(unpack(pack(mask), mask.shape), mask)


def test_full_training_masks_fused_experts_and_keeps_targets():
    model, masks = with_masks(small_model("mixtral"))
    recovery = SparseFull(model, masks, Finetune(method="full"))
    ids = torch.randint(3, 61, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    recovery.mask_gradients()
    assert any(part is not None and part.dim() == 3 for part in recovery.parts.values())
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert masks.violations(model.named_parameters()) == []  # even before the masks are re-applied
    some = SparseFull(*with_masks(small_model("llama")), Finetune(method="full", targets=["up_proj"]))
    assert {n.split(".")[-2] for n, p in some.model.named_parameters() if p.requires_grad} == {"up_proj"}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_loss_equals_the_formula(temperature):
    student, teacher = torch.randn(2, 9, 31, requires_grad=True), torch.randn(2, 9, 31)
    ids = torch.randint(0, 31, (2, 9))
    hard = torch.nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    p, q = (torch.log_softmax(x[:, :-1] / temperature, -1) for x in (teacher, student))
    expected = 0.7 * hard + 0.3 * temperature**2 * (p.exp() * (p - q)).sum(-1).mean()
    task = LanguageModeling()
    student, teacher, ids = task.predictions(student), task.predictions(teacher), task.targets(ids)
    torch.testing.assert_close(distillation.loss(student, teacher, ids, 0.3, temperature), expected)
    torch.testing.assert_close(distillation.loss(student, teacher, ids, 0.0, 1.0), hard)
    assert distillation.loss(teacher, teacher, ids, 1.0, 1.0).abs() < 1e-6


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_label_smoothing_is_torchs_with_distillation_and_ignored_labels(share):
    student, teacher = torch.randn(9, 31), torch.randn(9, 31)
    labels = torch.randint(0, 31, (9,))
    labels[[2, 5]] = -100
    hard = torch.nn.functional.cross_entropy(student, labels, reduction="sum", label_smoothing=0.2)
    soft = distillation.loss(student, teacher, labels, 1.0, 2.0, count=1)
    expected = ((1 - share) * hard + share * soft) / 7
    found = distillation.loss(student, teacher if share else None, labels, share, 2.0, count=7, smoothing=0.2)
    torch.testing.assert_close(found, expected)
    with_teacher = distillation.loss(student, teacher, labels, 0.0, 1.0, count=7, smoothing=0.2)
    torch.testing.assert_close(with_teacher, hard / 7)


@pytest.mark.parametrize("counts", [None, [15.0]])
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_a_training_step_smooths_labels_as_torch_does(name, counts):
    model = small_model(name) if name == "llama" else tiny("ViT")
    batch = torch.randint(3, 61, (1, 16)) if name == "llama" else [pixels(15), torch.arange(15) % 3]
    step = TrainedModel(model, Finetune(label_smoothing=0.3), 0, counts=counts)
    inputs = {"input_ids": batch} if name == "llama" else {"pixel_values": batch[0]}
    with torch.no_grad():
        logits, labels = model(**inputs).logits, batch[0] if name == "llama" else batch[1]
        if name == "llama":
            logits, labels = logits[0, :-1], labels[1:]
        expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
        torch.testing.assert_close(step._loss(batch, 0), expected)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["finetune.label_smoothing=1"], "finetune.label_smoothing=1.0 is out of range"),
        (["finetune.method=full", "finetune.quantize=nf4"], "set finetune.method=lora"),
        (["finetune.quantize=nf4", "finetune.strategy=fsdp"], "exclude each other"),
        (["finetune.effective=cached", "finetune.dropout=0.1"], "set finetune.effective=auto"),
        (["finetune.patience=3"], "set finetune.validation="),
        (["finetune.quantize=nf3"], "did you mean 'nf4'?"),
        (["finetune.method=lorra"], "did you mean 'lora'?"),
        (["finetune.loggers=[tensorbord]"], "did you mean 'tensorboard'?"),
    ],
)
def test_bad_input_says_what_to_set(tiny_llama, more, says):
    with pytest.raises(UserError) as raised:
        settings(tiny_llama, *more)
    assert says in str(raised.value)


def test_masks_of_another_model_are_refused(pruned, tiny_llama, tmp_path):
    masks = Masks.load(pruned / "masks.safetensors")
    name = next(iter(masks))
    masks.add(name, masks[name][:, :-4], "2of4")
    shutil.copytree(pruned / "model", tmp_path / "model")
    masks.save(tmp_path / "masks.safetensors")
    for more in ((), ("finetune.method=full",)):
        with pytest.raises(
            UserError, match=rf"{name} has shape \(.*\), its mask \(.*\): is this another model's mask file"
        ):
            finetune.run(settings(tiny_llama, *more), tmp_path / "run", {"prune": tmp_path})


LAUNCHED = {
    "lora": ["finetune.dropout=0"],
    "full": ["finetune.method=full", "finetune.clip=0.05"],
    "distill": ["finetune.distill=0.5", "finetune.validation=world@test", "finetune.validate_every=3"],
}


class Killed(Exception):
    pass


class KillAt(Callback):
    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == 3:
            raise Killed


def finetune_each_way(model: Path, pruned: Path, folder: Path) -> None:
    """Also killed at the third step and resumed."""
    fit = training.fit
    for way, more in LAUNCHED.items():
        for strategy in ("ddp", "fsdp") if processes.world_size() > 1 else ("ddp",):
            inputs = {"prune": pruned}
            chosen = settings(model, f"finetune.strategy={strategy}", "finetune.accumulate=2", *more)
            finetune.run(chosen, folder / f"{way}-{strategy}", inputs)
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
                patch.setattr(finetune, "fit", lambda *args: fit(*args[:5], [*args[5], KillAt()], *args[6:]))
                finetune.run(chosen, folder / f"{way}-{strategy}-resumed", inputs)
            finetune.run(chosen, folder / f"{way}-{strategy}-resumed", inputs)


@pytest.mark.slow
def test_two_processes_train_as_one_with_ddp_and_fsdp_and_resume_exactly(tiny_llama, tmp_path):
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    prune.run(settings(tiny_llama), pruned, {})
    masks = Masks.load(pruned / "masks.safetensors")

    def work(rank: int) -> None:
        finetune_each_way(tiny_llama, pruned, tmp_path / str(processes.world_size()))

    for count in (1, 2):
        launches.run((f"model={tiny_llama}", "stages=[prune]"), tmp_path / f"log{count}", of=count, work=work)
    for way in LAUNCHED:
        one = column(tmp_path / f"1/{way}-ddp/metrics.csv", 1)
        for run in (f"1/{way}-ddp", f"2/{way}-ddp", f"2/{way}-fsdp"):
            assert column(tmp_path / run / "metrics.csv", 1) == pytest.approx(one, abs=1e-4), run
            model = AutoModelForCausalLM.from_pretrained(tmp_path / run / "model")
            assert masks.violations(model.named_parameters()) == [], run
            whole, resumed = (dict(model_files.tensors(tmp_path / f"{run}{end}/model")) for end in ("", "-resumed"))
            assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items()), run
            if way == "distill":
                expected = column(tmp_path / f"1/{way}-ddp/metrics.csv", -1)
                assert column(tmp_path / run / "metrics.csv", -1) == pytest.approx(expected, rel=1e-4)


def column(path, index: int) -> list[float]:
    cells = [row.split(",")[index] for row in path.read_text().splitlines()[1:]]
    return [float(cell) for cell in cells if cell]


@pytest.mark.slow
def test_a_bfloat16_model_stays_bfloat16_and_sparse(stories, tmp_path):
    """With every training precision, the saved model is bfloat16 and as sparse as before."""
    model, masks = with_masks(AutoModelForCausalLM.from_pretrained(stories, dtype=torch.bfloat16))
    for name, mask in masks.items():
        apply_(model.get_parameter(name).data, mask)
    model.save_pretrained(tmp_path / "model")
    for path in stories.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "model")
    masks.save(tmp_path / "masks.safetensors")
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time, there was a little girl named Lily.\n" * 200)
    for way in ("lora", "full"):
        more = [f"finetune.method={way}", f"finetune.dataset={text}", "finetune.precision=bf16-mixed"]
        finetune.run(settings(stories, *more), tmp_path / way, {"prune": tmp_path})
        after = dict(model_files.tensors(tmp_path / way / "model"))
        assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
        assert masks.violations(iter(after.items())) == []
