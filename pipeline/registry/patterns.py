"""The registry of `prune.sparsity`, with the parser of values such as 0.5, 2of4, as_is or my_pattern.py."""

import re
from dataclasses import dataclass
from typing import Any

from pipeline.registry.entry import NONE, Entry, Registry, is_file
from pipeline.runtime.errors import UserError

AS_IS = "as_is"
N_OF_M = re.compile(r"\s*(\d+)\s*(?:of|:)\s*(\d+)\s*")


@dataclass(frozen=True)
class PatternEntry(Entry):
    is_ratio: bool = False  # a share of the weights, in any position
    is_grouped: bool = False  # among each few consecutive inputs, so that their order matters
    keeps_model: bool = False  # prunes only what is zero already

    def problem(self, settings: Any) -> str | None:
        if not self.keeps_model or (settings.method, settings.refine, settings.update) == ("magnitude", NONE, NONE):
            return None
        return (
            f"prune.sparsity={self.name} leaves the model as it is: set prune.method=magnitude, prune.refine={NONE} and "
            f"prune.update={NONE}, or another prune.sparsity"
        )


class Patterns(Registry):
    def label(self, value: Any) -> str:
        """The form for tables: 2:4 for `2of4`, 0.5 for 0.50."""
        text = str(value)
        if is_file(text) or text in self.entries:
            return super().label(text)
        if match := N_OF_M.fullmatch(text):
            return f"{match[1]}:{match[2]}"
        return re.sub(r"(\.\d*?)0+$", r"\1", text)

    def entry(self, value: Any, key: str | None = None) -> Entry:
        return self.parse(value, key)[0]

    def parse(self, value: Any, key: str | None = None) -> tuple[Entry, dict[str, Any]]:
        """The entry and the arguments of its pattern: `0.5` -> unstructured, `2of4` or `"2:4"` -> N:M, `as_is`,
        `./my_pattern.py` -> the class in the file. Raises `UserError`, which names `key`."""
        text, key = str(value), key or self.key
        if match := N_OF_M.fullmatch(text):
            n, m = map(int, match.groups())
            if not 0 < n < m:
                raise UserError(f"{key}={value} is impossible: N of M needs 0 < N < M, set for example {key}=2of4")
            return self.entries["N:M"], {"n": n, "m": m}
        if is_file(text):
            return super().entry(text, key), {}
        if text == AS_IS:
            return self.entries[AS_IS], {}
        try:
            ratio = float(value)
        except (ValueError, TypeError):
            raise UserError(
                f"{key}={value} is not a sparsity: set a ratio such as 0.5, N of M such as 2of4, or {AS_IS}"
            ) from None
        if ratio >= 60 and ratio.is_integer():
            n, m = divmod(int(ratio), 60)  # YAML 1.1 reads 2:4 in base 60
            raise UserError(f"{key}={value} is not a ratio. YAML reads {n}:{m} as {value}: set {key}={n}of{m}")
        if not 0 < ratio < 1:
            raise UserError(f"{key}={value} is out of range: set a ratio between 0 and 1, such as 0.5")
        return self.entries["unstructured"], {"ratio": ratio}


PATTERNS = Patterns(
    "prune.sparsity",
    "pipeline.sparsity.patterns:Pattern",
    PatternEntry(
        "unstructured",
        "unstructured",
        "Prunes a share of the weights, in any position",
        "pipeline.sparsity.patterns:Unstructured",
        is_ratio=True,
    ),
    PatternEntry(
        "N:M",
        "N:M",
        "Keeps N of each M consecutive inputs of a row",
        "pipeline.sparsity.patterns:NofM",
        is_grouped=True,
    ),
    PatternEntry(
        AS_IS,
        "its own zeros",
        "Keeps what is not zero in a model that another program pruned",
        "pipeline.sparsity.patterns:AsIs",
        keeps_model=True,
    ),
)
