"""Renders the templates: facts in, text out. Every value is escaped for the language of its template."""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.runtime import files


def render(template: str, **facts: object) -> str:
    """`report.html.jinja` and so on. A page is one file that loads nothing."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_markdown if ".md." in template else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**facts)


def write(path: Path, text: str) -> None:
    with files.atomic_write(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def _markdown(value: object) -> Markup:
    """One line of Markdown that shows the value as it is, also in a table. Markup is what macros return."""
    if isinstance(value, Markup):
        return value
    text = re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(str(value).split()))
    return Markup(text.replace("&", "&amp;").replace("<", "&lt;"))
