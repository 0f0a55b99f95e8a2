"""The checks of one model family for `benchmarks/models.py`, through the command line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

import pipeline.stages.finetune
from benchmarks.model_command import Command
from pipeline.engine import coverage
from pipeline.engine.blocks import find_blocks
from pipeline.engine.walk import LayerWalk
from pipeline.models import loading, model_files
from pipeline.reporting import series
from pipeline.settings.schema import Recipe
from pipeline.sparsity.masks import Masks
from tests import families
from tests.engine import walking
from tests.family_sizes import WIDTH

CLOSE, CLOSE_ON_GPU = 1e-5, 1e-3  # relative difference of logits and perplexities; the checks themselves run on the CPU
ROUTER = re.compile(r"(^|[.])(\w*router|gate|wg|\w*gating|shared_expert_gate)[.]", re.IGNORECASE)
DOWN = re.compile(r"down|w2|output_linear|wo\b|c_proj|dense_4h")  # matrices whose output width is the hidden size


def check(name: str, work: Path) -> dict[str, Any]:
    """The findings by column; each begins with ok, refused, crash or WRONG. `work`: a new folder."""
    found: dict[str, Any] = {"family": name}
    try:
        families.save(name, work / "dense")
        model, _ = by_class(work / "dense")
        model(input_ids=families.text(2, 32), use_cache=False).logits  # noqa: B018
    except Exception as error:
        return found | {"builds": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    found["builds"] = "ok"
    return found | Checks(work).all()


class Checks:
    """The checks of the model in `work`/dense."""

    def __init__(self, work: Path) -> None:
        self.work, self.dense, self.run = work, work / "dense", work / "whole/run"
        self.command = Command(work)
        self.walked: list[LayerWalk] = []
        self.seen: dict[int, list[list[Tensor]]] = {}  # the inputs of each block during pruning, by batch
        self.trained: list[nn.Module] = []
        self._record_calls()

    def _record_calls(self) -> None:
        step, fit = LayerWalk.predict_step, pipeline.stages.finetune.fit

        def predict_step(walk, block, number):
            self.walked.append(walk)
            given = [walking.given(f.args, f.kwargs) for f in walk.forwards.forwards]
            self.seen[block.index] = [[tensor.cpu() for tensor in tensors] for tensors in given]
            return step(walk, block, number)

        def fitted(model, *args, **kwargs):
            self.trained.append(model)
            return fit(model, *args, **kwargs)

        LayerWalk.predict_step, pipeline.stages.finetune.fit = predict_step, fitted

    def all(self) -> dict[str, Any]:
        prune, _ = self.command.typed(self.run, "stages=[prune]")
        found: dict[str, Any] = {"prune": prune}
        if prune != "ok":
            return found
        self.masks = Masks.load(self.run / "prune/masks.safetensors")
        self.batches = self.walked[0].batches
        self.before, self.after = self.loaded(self.dense), self.loaded(self.run / "prune/model")
        found["coverage"], found["dense"] = self.coverage(), stays_dense(self.run)
        checks: dict[str, Callable[[], str]] = {"exact": self.exact, "walk": self.walk, "reload": self.reload}
        checks |= {"lora": self.lora, "full": self.full, "stream": self.stream}
        for key, of in checks.items():
            try:
                found[key] = of()
            except Exception as error:
                found[key] = f"WRONG: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return found

    def loaded(self, folder: Path) -> dict[str, Tensor]:
        """The saved state of a model, with each shared weight only under its first name."""
        model = loading.load(folder, Recipe())
        once = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
        return {name: tensor for name, tensor in model.state_dict().items() if name in once}

    def coverage(self) -> float:
        """The share of the weights in the blocks' matrices that have a mask."""
        model = loading.load(self.dense, Recipe())
        inside = {
            id(parameter): parameter.numel()
            for block in find_blocks(model)
            for name, parameter in block.module.named_parameters()
            if parameter.squeeze().dim() >= 2 and not name.endswith("bias")
        }
        return sum(mask.weights for mask in self.masks.packed.values()) / max(1, sum(inside.values()))

    def exact(self) -> str:
        """Each masked matrix is 2 of 4 along its inputs, no router is masked, and all other bits are unchanged."""
        with_experts = any("expert" in name for name in self.before)  # Gemma 3n has another kind of router
        wrong = [f"{name} is a router" for name in self.masks if with_experts and ROUTER.search(name)]
        if self.before.keys() != self.after.keys():
            return f"WRONG: {sorted(self.before.keys() ^ self.after.keys())[0]} is in one model only"
        left = set(self.masks)
        for name, new in self.after.items():
            mask = self.masks.for_parameter(name, new)
            old = self.before[name] if mask is None else torch.where(mask, self.before[name], 0.0)
            if new.dtype != old.dtype or not torch.equal(as_bytes(new), as_bytes(old)):
                wrong.append(f"{name} has changed")
            if mask is None:
                continue
            parts = {f"{name}[{e}]": part for e, part in enumerate(new)} if name not in self.masks else {name: new}
            for key, part in parts.items():
                if key in self.masks:
                    left.discard(key)
                    weight_OI = part.T if self.inputs_first(key, part) else part
                    if not bool(((weight_OI.unflatten(1, (-1, 4)) == 0).sum(2) == 2).all()):
                        wrong.append(f"{key} is not 2 of 4 along its inputs")
        wrong += [f"{name} is no matrix of the model" for name in left]
        return f"WRONG: {wrong[0]} ({len(wrong)} in all)" if wrong else "ok"

    def inputs_first(self, name: str, weight: Tensor) -> bool:
        """Whether a matrix is stored as (in, out): from the masks, or for experts independently from their widths."""
        if not name.endswith("]") or weight.shape[0] == weight.shape[1]:
            return self.masks.packed[name].transposed
        return weight.shape[1] == WIDTH if DOWN.search(name) else weight.shape[0] == WIDTH

    def walk(self) -> str:
        """Block by block equals the model on several batches, one of them with another length."""
        model = by_class(self.dense)[0]
        together = walking.difference(model, [*self.batches[:3], families.text(1, 24)])
        if not together:
            return "ok"
        alone = [walking.difference(model, [batch]) for batch in self.batches[:3]]
        return f"WRONG: {together}" + ("" if any(alone) else " (not with one batch at a time)")

    def reload(self) -> str:
        """The folder loads with transformers, has the input's tensor names, and is the model of the walk."""
        model, problem = by_class(self.run / "prune/model")
        if problem := problem or self.other_names(self.run / "prune/model"):
            return f"WRONG: {problem}"
        for i, batch in enumerate(self.batches):
            calls = walking.own_calls(model, batch)
            for index, by_batch in self.seen.items():
                pairs = list(zip(by_batch[i], calls.get(index, ())))
                if len(pairs) != len(by_batch[i]) or len(pairs) != len(calls[index]):
                    return (
                        f"WRONG: block {index} gets {len(calls.get(index, ()))} tensors, {len(by_batch[i])} when pruned"
                    )
                for one, other in pairs:
                    # not bitwise: products may depend on the alignment of the weights in memory
                    if not walking.same(one, other) and not walking.relative(one, other) <= close():
                        return f"WRONG: block {index} gets other inputs than when pruned: {walking.apart(one, other)}"
        return "ok"

    def other_names(self, folder: Path) -> str:
        then, now = names_in(self.dense), names_in(folder)
        return f"the files' names differ: {sorted(then ^ now)[0]} ({len(then ^ now)} in all)" if then != now else ""

    def lora(self) -> str:
        verdict = self.finetuned("lora")
        if verdict.startswith(("crash", "refused")):
            return verdict
        with safe_open(self.run / "finetune/adapter/adapter_model.safetensors", framework="pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys() if "lora_A" in name]
        adapted = sum(shape[0] if len(shape) == 3 else 1 for shape in shapes)
        if adapted != len(self.masks):
            return f"WRONG: {adapted} of {len(self.masks)} matrices are adapted" + verdict.removeprefix("ok").replace(
                "WRONG", ""
            )
        return verdict

    def full(self) -> str:
        return self.finetuned("full")

    @torch.no_grad()
    def finetuned(self, method: str) -> str:
        """After three steps the saved model is exactly as sparse and computes what the trained model in memory does."""
        verdict, _ = self.command.typed(self.run, "stages=[prune,finetune]", f"finetune.method={method}")
        if verdict != "ok":
            return verdict
        folder, memory = self.run / "finetune/model", self.trained[-1].cpu().eval()
        model, problem = by_class(folder)
        if problem := problem or self.other_names(folder):
            return f"WRONG: {problem}"
        after = self.loaded(folder)
        if violations := self.masks.violations(after.items()):
            return f"WRONG: {violations[0].name} has {violations[0].count} pruned weights that are not zero"
        logits = [own(input_ids=self.batches[0], use_cache=False).logits for own in (model, memory)]
        if not walking.relative(*logits) <= close():
            return f"WRONG: its logits differ from the trained model's: {walking.apart(*logits)}"
        idle = {generic(n) for n in self.masks if torch.equal(matrix(self.after, n), matrix(after, n))}
        return "ok" + (f" (no gradient: {', '.join(sorted(idle))})" if idle else "")

    def stream(self) -> str:
        """The perplexity layer by layer equals that of the whole model, dense and pruned."""
        values = []
        for placement in ("whole", "stream"):
            # measurements are cached next to a run, so each gets its own folder
            run = self.work / placement / "run"
            if not run.exists():
                shutil.copytree(self.run, run)
            verdict, _ = self.command.typed(run, "stages=[prune,evaluate]", f"evaluate.placement={placement}")
            if verdict != "ok":
                return verdict
            results = json.loads((run / "evaluate/results.json").read_text())["models"]
            values.append([next(iter(results[which]["perplexity"].values())) for which in ("dense", "pruned")])
        if values[0] == values[1]:
            return "ok"
        close = all(abs(one / other - 1) < close() for one, other in zip(*values))
        return "ok (close)" if close else f"WRONG: {values[1]} is not {values[0]}"


def close() -> float:
    return CLOSE_ON_GPU if torch.cuda.is_available() else CLOSE


def by_class(folder: Path) -> tuple[nn.Module, str]:
    """The model by `from_pretrained` of the class in its config, and the missing and unexpected tensors of its files."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    wrong = [f"{kind} {sorted(map(str, keys))[0]} ({len(keys)} in all)" for kind, keys in info.items() if keys]
    return model.float().eval(), "; ".join(wrong)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def names_in(folder: Path) -> set[str]:
    return {name for name, _ in model_files.tensors(folder)}


def matrix(state: dict[str, Tensor], name: str) -> Tensor:
    parameter, _, expert = name.partition("[")
    return state[parameter][int(expert[:-1])] if expert else state[name]


def stays_dense(run: Path) -> dict[str, list[str]]:
    """The dense matrices that the run reports: generic names by reason."""
    found: dict[str, list[str]] = {}
    for row in series.read(run / "prune/coverage.csv"):
        if row["reason"] != coverage.PRUNED:
            found.setdefault(row["reason"], []).append(row["kind"])
    return found


def generic(name: str) -> str:
    """The name without numbers of layers and experts, such as model.layers.*.mlp.experts.down_proj[*]."""
    return re.sub(r"(?<=[.[])\d+(?=[].]|$)", "*", name)
