"""`espalier plan [recipe=NAME] [key=value ...]`: what a run would do, and what it needs. Writes nothing.

Makes the checks of a run, so it reads the texts of stages that are not done (from the hub, into the caches of Hugging Face);
a model that would have to be fetched is not, and then only the recipe itself is checked.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import LlamaForCausalLM

from pipeline.data import sources, world
from pipeline.engine.blocks import find_blocks
from pipeline.engine.coverage import Coverage
from pipeline.engine.matrices import coverage_entries
from pipeline.models import loading
from pipeline.pruning import calibration
from pipeline.pruning.allocation import allocate
from pipeline.runtime import checksums
from pipeline.settings import reader
from pipeline.settings.schema import Recipe, reconstruction_text
from pipeline.stages import preflight, pretrain, runner, space, sweep
from pipeline.stages.prune import observed_by


def main(arguments: list[str]) -> None:
    for name, cell in sweep.cells(arguments).items():
        if name:
            print(f"{name}:")
        _plan(reader.load(cell))


def _plan(recipe: Recipe) -> None:
    print(f"run_dir: {recipe.run_dir}")
    here = recipe.model is None or loading.is_here(recipe.model, recipe.revision)
    outside = runner.check(recipe) if here else None
    for line in _stages(recipe, outside):
        print(f"  {line}")
    if here:
        model = _skeleton(recipe)
        _model(recipe, model)
    else:
        print(
            f"model: {recipe.model} is not on this machine: a run fetches it first. What depends on it was not checked"
        )
    for line in _texts(recipe):
        print(line)
    if here and recipe.model is not None:
        stages, more, free = space.estimate(space.RUN, recipe, {}, Path(recipe.run_dir))
        print(
            f"disk: about {space.text(max(0, more))} more for {', '.join(stages) or 'nothing'}; {space.text(free)} free"
        )
        space.check(space.RUN, recipe, {}, Path(recipe.run_dir))


def _stages(recipe: Recipe, outside: dict | None):
    """A line for each stage. What comes after one that is to run depends on what comes out of that."""
    run_dir, done, first = Path(recipe.run_dir), {}, None
    for stage in runner.chosen(recipe):
        finished = run_dir / stage.name
        if outside is None:
            yield f"{stage.name}: {'there' if finished.exists() else 'runs'}"
        elif first and finished.exists():
            yield f"{stage.name}: runs again, unless {first} comes out as before and no setting has changed"
        elif first:
            yield f"{stage.name}: runs"
        elif (
            why := runner.why_again(
                finished, runner.made_from(stage, recipe, done, outside), stage.name in recipe.rerun
            )
        ) is None:
            about = checksums.read(finished)
            yield f"{stage.name}: done before ({about['finished']}, in {about['seconds']:.0f} s)"
            done[stage.name] = runner.outcome_of(finished)
        else:
            first = stage.name
            begun = (
                " from where it was stopped, if nothing has changed" if (run_dir / f".{stage.name}").exists() else ""
            )
            yield f"{stage.name}: {f'runs again: {why}' if why else f'runs{begun}'}"


def _skeleton(recipe: Recipe) -> nn.Module:
    if recipe.model is None:
        with torch.device("meta"):
            return LlamaForCausalLM(pretrain.configuration(recipe.pretrain, world.tokenizer()))
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    return loading.skeleton(loading.locate(recipe.model, recipe.revision), recipe, dtype)


def _model(recipe: Recipe, model: nn.Module) -> None:
    blocks, weights = find_blocks(model), sum(parameter.numel() for parameter in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"model: {recipe.model or 'a small Llama'}: {weights:,} weights, {len(blocks)} layers, {dtype}")
    if "prune" not in recipe.stages:
        return
    settings, text = recipe.prune, recipe.calibration
    patterns = allocate(blocks, settings)
    print(f"prune: {settings.method}, {settings.sparsity}, {len(patterns)} matrices")
    for what, how in Coverage(coverage_entries(model, blocks), patterns.keys()).describe(patterns):
        print(f"  {what}: {how}")
    windows = torch.empty(text.samples, text.seq_len, dtype=torch.int32, device="meta")
    observe = observed_by(settings, patterns)
    calibration.plan_memory(model, list(windows.split(text.batch_size)), settings.hidden_states, observe=observe)


def _texts(recipe: Recipe):
    text, tune = reconstruction_text(recipe), recipe.finetune
    steps = f"{tune.max_steps} steps of {tune.batch_size * tune.accumulate} windows of {tune.seq_len} tokens"
    amount = {
        "prune": f"{recipe.calibration.samples} windows of {recipe.calibration.seq_len} tokens",
        "reconstruct": f"{text.samples} windows of {text.seq_len} tokens",
        "finetune": steps,
        "evaluate": f"windows of {recipe.evaluate.seq_len} tokens",
    }
    for stage in preflight.READERS:
        if stage in recipe.stages:
            for source in sources.of_stage(recipe, stage):
                yield f"{stage} reads {source}: {amount[stage]}"
    if "evaluate" in recipe.stages and recipe.evaluate.tasks:
        yield f"evaluate asks {', '.join(recipe.evaluate.tasks)}"
