"""Settings on the command line, `key=value`, to plain data."""

import dataclasses
import re
from typing import Any

from omegaconf import OmegaConf

from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Recipe


def parse(arguments: list[str]) -> dict:
    """`["prune.method=wanda", ...]` -> {"prune": {"method": "wanda"}}; raises `UserError` if one cannot be read."""
    settings = OmegaConf.create()
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "prune.sparsity" or key.startswith("prune.overrides"):  # YAML would read 2:4 as 124
            value = re.sub(r"(?<![^\s,:{'\"])(\d+):(\d+)(?![^\s,}'\"])", r"\1of\2", value)
            argument = f"{key}={value}"
        try:
            if _is_text(key) and value not in ("", "null"):  # verbatim: YAML would cut a path at " #"
                OmegaConf.update(settings, key, _unquoted(value))
            else:
                settings.merge_with_dotlist([argument])
        except Exception:  # yaml's messages do not help with a command line
            raise UserError(
                f"cannot read {argument}: is a bracket or a quote left open, or are both a key and its subkeys set?"
            ) from None
    return OmegaConf.to_container(settings)


def _is_text(key: str) -> bool:
    """Whether the schema has a str at `key`."""
    kind: Any = Recipe
    for part in key.split("."):
        fields = {f.name: f.type for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
        kind = fields.get(part)
    return kind is str or kind == str | None


def _unquoted(value: str) -> str:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else value
