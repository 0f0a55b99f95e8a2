"""`espalier plan [recipe=NAME] [key=value ...]`: what a run would do, and what it needs. Writes nothing.

Makes all checks of a run, so it loads the texts of stages that are not done (from the hub, into the Hugging Face caches). A
model is not downloaded: if it is not on this machine, only the recipe is checked.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from pipeline import registry, tasks
from pipeline.data import sources
from pipeline.engine.blocks import find_blocks
from pipeline.engine.coverage import Coverage
from pipeline.engine.matrices import coverage_entries
from pipeline.models import loading
from pipeline.runtime import checksums
from pipeline.settings import reader
from pipeline.settings.schema import READERS, Recipe, reconstruction_text
from pipeline.stages import keys, pretrain, prune, runner, space, sweep


def main(arguments: list[str]) -> None:
    for name, cell in sweep.cells(arguments).items():
        if name:
            print(f"{name}:")
        _plan(reader.load(cell))


def _plan(recipe: Recipe) -> None:
    print(f"run_dir: {recipe.run_dir}")
    is_local = recipe.model is None or loading.is_here(recipe.model, recipe.revision)
    external = runner.check(recipe) if is_local else None
    for line in _stages(recipe, external):
        print(f"  {line}")
    if is_local:
        _print_model(recipe, _skeleton(recipe))
    else:
        print(
            f"model: {recipe.model} is not on this machine: a run downloads it first, and plan checks only the recipe"
        )
    for line in _texts(recipe):
        print(line)
    if is_local and recipe.model is not None:
        stages, needed, free = space.estimate(space.RUN, recipe, {}, Path(recipe.run_dir))
        needed_for = f"{space.text(max(0, needed))} more for {', '.join(stages) or 'nothing'}"
        print(f"disk: about {needed_for}; {space.text(free)} free")
        space.check(space.RUN, recipe, {}, Path(recipe.run_dir))


def _stages(recipe: Recipe, external: dict | None) -> Iterator[str]:
    """A line for each stage. Stages after the first one to run depend on its outcome, which is unknown."""
    run_dir, outcomes, first = Path(recipe.run_dir), {}, None
    for stage in runner.chosen(recipe):
        finished = run_dir / stage.name
        if external is None:
            yield f"{stage.name}: {'finished' if finished.exists() else 'runs'}"
        elif first and finished.exists():
            yield f"{stage.name}: runs again, unless {first} has the same outcome and no setting has changed"
        elif first:
            yield f"{stage.name}: runs"
        else:
            made_from = keys.made_from(stage, recipe, outcomes, external)
            reason = keys.reason_to_run(finished, made_from, stage.name in recipe.rerun)
            if reason is None:
                content = checksums.read(finished)
                yield f"{stage.name}: done before ({content['finished']}, in {content['seconds']:.0f} s)"
                outcomes[stage.name] = keys.outcome_of(finished)
                continue
            first = stage.name
            resumed = ", resuming if nothing has changed" if (run_dir / f".{stage.name}").exists() else ""
            yield f"{stage.name}: {f'runs again: {reason}' if reason else f'runs{resumed}'}"


def _skeleton(recipe: Recipe) -> nn.Module:
    if recipe.model is None:
        with torch.device("meta"):
            toy = pretrain.toy(recipe.pretrain)
            return toy.model_class(toy.config)
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    return loading.skeleton(loading.locate(recipe.model, recipe.revision), recipe, dtype)


def _print_model(recipe: Recipe, model: nn.Module) -> None:
    blocks, weights = find_blocks(model), sum(parameter.numel() for parameter in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    name = recipe.model or f"a {pretrain.toy(recipe.pretrain).name}"
    print(f"model: {name}: {weights:,} weights, {len(blocks)} layers, {dtype}")
    if "prune" not in recipe.stages:
        return
    settings, calibrated = recipe.prune, recipe.calibration
    method = prune.method_of(blocks, settings)
    steps = [registry.value_of(recipe, key) for key in registry.PRUNING]
    steps = [step for step in steps if step != registry.NONE]
    print(f"prune: {' + '.join(steps)}, {settings.sparsity}, {len(method.patterns)} matrices")
    for name, text in Coverage(coverage_entries(model, blocks), method.patterns.keys()).describe(method.patterns):
        print(f"  {name}: {text}")
    shape = tasks.of(model.config).sample_shape(model.config, calibrated.seq_len)
    windows = torch.empty(calibrated.samples, *shape, dtype=torch.int32, device="meta")
    prune.plan_memory(model, list(windows.split(calibrated.batch_size)), method)


def _texts(recipe: Recipe) -> Iterator[str]:
    text, tune = reconstruction_text(recipe), recipe.finetune
    by_section = {  # what is read, and how much of it
        "calibration": (recipe.calibration, f"{recipe.calibration.samples} "),
        "reconstruct": (text, f"{text.samples} "),
        "finetune": (tune, f"{tune.max_steps} steps of {tune.batch_size * tune.accumulate} "),
        "evaluate": (recipe.evaluate, ""),
    }
    for stage, section in READERS.items():
        settings, count = by_section[section]
        unit = "images" if recipe.evaluate.accuracy else f"windows of {settings.seq_len} tokens"
        if stage in recipe.stages:
            for number, source in enumerate(sources.of_stage(recipe, stage)):
                held_out = section == "finetune" and number > 0  # finetune.validation
                yield f"{stage} reads {source}: {f'{tune.validation_samples} ' if held_out else count}{unit}"
    if "evaluate" in recipe.stages and recipe.evaluate.tasks:
        yield f"evaluate runs the tasks {', '.join(recipe.evaluate.tasks)}"
