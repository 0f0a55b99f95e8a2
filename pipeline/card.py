"""The report as Markdown, ready as a model card: facts in (`report.collect`), one text out."""

import json
import re
from pathlib import Path
from typing import Any

from pipeline.summary import keys, points

SINCE = ", since it was last started"  # a resumed stage counts its last try


def markdown(facts: dict[str, Any]) -> str:
    """A model card: front matter for the hub, then what the page says, with tables in place of the pictures."""
    name, pattern = facts["model"], facts["pattern"]
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists()
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [pruned, sparse, espalier]"]
    front += [f"base_model: {json.dumps(name)}"] if on_hub else []
    parts = ["\n".join(["---", *front, "---"]), f"# {_escaped(f'{name} {pattern}')}", _escaped(facts["headline"])]
    rows = []
    for title, group in facts["groups"]:
        rows.append([f"**{_escaped(title)}**", *[""] * len(facts["columns"])])
        rows += [[_escaped(label), *cells] for label, cells in group]
    parts += [_grid(["", *facts["columns"]], rows), *(f"> **Note:** {_escaped(note)}" for note in facts["notes"])]
    if "pruned" in facts["columns"]:
        parts.append("Pruned weights are stored as zeros: `from_pretrained` loads the model; its files are no smaller.")
    if facts["layers"]:
        known = keys(facts["layers"])
        header = [column for column in ("layer", "sparsity", "relative_output_error", "seconds") if column in known]
        cells = [[f"{row[column]:.4g}" if column in row else "-" for column in header] for row in facts["layers"]]
        parts += ["## Layers", _grid([column.replace("_", " ") for column in header], cells)]
    if losses := points(facts["metrics"], "step", "loss"):
        first, last = (f"{loss:.3f} at step {step:.0f}" for step, loss in (losses[0], losses[-1]))
        parts += ["## Fine-tuning", f"Loss (nats per token): {first}, {last}."]
    if facts["stages"]:
        cells = [[stage, *told] for stage, _, *told in facts["stages"]]
        parts += ["## Stages", _grid(["stage", f"time{SINCE}", "processes", "finished (UTC)"], cells)]
    for title, pairs in (("Protocol", facts["protocol"]), ("Versions", facts["versions"])):
        if pairs:
            parts += [f"## {title}", "\n".join(f"- {_escaped(key)}: {_escaped(value)}" for key, value in pairs)]
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", facts["recipe"])), default=0))
    return "\n\n".join([*parts, "## Recipe", f"{fence}yaml\n{facts['recipe']}\n{fence}"]) + "\n"


def _escaped(text: str) -> str:
    """One line of Markdown that shows `text` as it stands, in a table too."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")


def _grid(header: list[str], rows: list) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
