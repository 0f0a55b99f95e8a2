"""Renders the templates: facts in, Markdown out, and a page of it. Every value is escaped."""

import base64
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from pipeline.runtime import files


def render(template: str, **facts: object) -> str:
    """The text of `report.md.jinja` and so on."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_escaped if ".md." in template else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**facts)


def html(markdown: str, **facts: object) -> str:
    """One file that loads nothing. HTML in the Markdown is the template's own, as values are escaped."""
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    return render("page.html.jinja", body=Markup(body), **facts)


def data_uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def write(path: Path, text: str) -> None:
    with files.atomic_write(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def _escaped(value: object) -> Markup:
    """Markdown that shows the value as it is on one line, also in a table. Markup is what macros return."""
    if isinstance(value, Markup):
        return value
    text = re.sub(r"([\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])|^>|^[#+-]+(?=\s))", r"\\\1", " ".join(str(value).split()))
    return Markup(text.replace("&", "&amp;").replace("<", "&lt;"))
