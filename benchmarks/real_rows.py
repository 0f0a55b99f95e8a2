"""The rows of real.py: which commands it runs, and in which table each is shown."""

from dataclasses import dataclass
from itertools import product

PARTS = ("methods", "self", "groups", "options", "recovery", "combinations")
PATTERNS = ("2of4", "0.5", "4of8")
SPARSE = "0.7"  # also used for the combinations
METHODS = {
    "wanda": (),
    "magnitude": ("prune.method=magnitude",),
    "sparsegpt": ("prune.method=sparsegpt",),
    "ria": ("prune.method=ria",),
    "dsnot": ("prune.method=dsnot",),
    "owl": ("prune.allocation=owl",),
}
GROUPS = {
    "matrix": ("prune.group=matrix",),
    "layer": ("prune.group=layer",),
    "dense activations": ("calibration.activations=dense",),
}
SWAPS_ADMM = ("prune.refine=swaps", "prune.update=admm")
PERMUTED = {  # with channels reordered for N of M
    "wanda": METHODS["wanda"],
    "ria": METHODS["ria"],
    "sparsegpt + swaps + admm": (*METHODS["sparsegpt"], *SWAPS_ADMM),
}
DENSE_TARGET = {
    "sparsegpt, dense target": (*METHODS["sparsegpt"], "prune.target=dense"),
    "wanda + least_squares, dense target": ("prune.update=least_squares", "prune.target=dense"),
    "sparsegpt + swaps + admm, dense target": (*METHODS["sparsegpt"], *SWAPS_ADMM, "prune.target=dense"),
    "ria + swaps + admm, dense target": (*METHODS["ria"], *SWAPS_ADMM, "prune.target=dense"),
}
REFINEMENTS, UPDATES = ("none", "swaps"), ("none", "obs", "admm", "least_squares")
# masked LoRA from better starts than Wanda's weights
STARTS = {
    "sparsegpt": METHODS["sparsegpt"],
    "sparsegpt + swaps + admm": PERMUTED["sparsegpt + swaps + admm"],
}
SELF = ("calibration.dataset=self",)
FULL = ("finetune.method=full", "finetune.lr=4e-4")
DISTILL = ("finetune.distill=0.5",)
STEPS = ("finetune.max_steps=140",)
RECONSTRUCT = (  # 56 steps of 512 tokens per epoch; 8 more batches are held out
    *("reconstruct.dataset={text}", "reconstruct.samples=128", "reconstruct.seq_len=256", "reconstruct.batch_size=2"),
    *("reconstruct.accumulate=1", "reconstruct.epochs=2", "reconstruct.lr=0.015"),
)
RECOVERY = {
    "lora": (*STEPS, "finetune.lr=1e-3", "finetune.rank=16", "finetune.alpha=32"),
    "full": (*STEPS, *FULL),
    "full_distilled": (*STEPS, *FULL, *DISTILL),
    "longer": (*FULL, *DISTILL, "finetune.max_steps=400"),
    "reconstructed": (*RECONSTRUCT,),
    "recovered": (*RECONSTRUCT, *FULL, *DISTILL, "finetune.max_steps=400"),
}


@dataclass(frozen=True)
class Row:
    part: str
    name: str  # of the run folder
    method: str
    pattern: str
    settings: tuple[str, ...]
    stages: str = "prune"
    after: str | None = None  # the row that it continues
    linked: tuple[str, ...] = ()  # the finished stages of that row to link


def rows() -> list[Row]:
    """All rows, the most important first, so that an interrupted benchmark leaves a useful table."""
    every = []
    for method, settings in METHODS.items():
        for pattern in PATTERNS:
            if method != "owl" or pattern == "0.5":
                every.append(Row("methods", f"{method}_{pattern}", method, pattern, settings))
    for method, settings in RECOVERY.items():
        for pattern in PATTERNS[:2]:
            sections = {setting.partition(".")[0] for setting in settings}
            stages = ",".join(("prune", *(stage for stage in ("reconstruct", "finetune") if stage in sections)))
            after, linked = f"wanda_{pattern}", ("prune",)
            if method == "recovered":
                after, linked = f"reconstructed_{pattern}", ("prune", "reconstruct")
            every.append(Row("recovery", f"{method}_{pattern}", method, pattern, settings, stages, after, linked))
    for start, settings in STARTS.items():
        for pattern in PATTERNS[:2]:
            after = f"{start.replace(' ', '')}_{pattern}"
            settings_of_both, name = (*settings, *RECOVERY["lora"]), f"lora_from_{after}"
            stages = "prune,finetune"
            every.append(
                Row("recovery", name, f"lora from {start}", pattern, settings_of_both, stages, after, ("prune",))
            )
    for method in ("wanda", "sparsegpt"):
        for pattern in PATTERNS[:2]:
            every.append(Row("self", f"{method}_{pattern}_self", method, pattern, (*METHODS[method], *SELF)))
    for group, settings in GROUPS.items():
        for pattern in ("0.5", "2of4")[: 2 if "dense" in group else 1]:
            name = f"wanda_{group.replace(' ', '_')}_{pattern}"
            every.append(Row("groups", name, f"wanda, {group}", pattern, settings))
    for pattern, (method, settings) in product(("2of4", "4of8"), PERMUTED.items()):
        name, stages = f"{method.replace(' ', '')}_permuted_{pattern}", "permute,prune"
        every.append(Row("options", name, f"{method}, permuted", pattern, settings, stages))
    for pattern, (method, settings) in product((*PATTERNS[:2], SPARSE), DENSE_TARGET.items()):
        every.append(
            Row("options", f"{method.replace(',', '').replace(' ', '_')}_{pattern}", method, pattern, settings)
        )
    for pattern, method, refine, update in product(
        (*PATTERNS, SPARSE), ("wanda", "sparsegpt", "ria", "magnitude"), REFINEMENTS, UPDATES
    ):
        steps = {key: value for key, value in (("refine", refine), ("update", update)) if value != "none"}
        settings = (*METHODS[method], *(f"prune.{key}={value}" for key, value in steps.items()))
        label = " + ".join((method, *steps.values()))
        every.append(Row("combinations", f"{label.replace(' ', '')}_{pattern}", label, pattern, settings))
    return every
