"""Owns the way pages are made: facts and a template in, one self-contained HTML file out. All text is escaped."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.runtime import files


def render(template: str, **facts: object) -> str:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    return environment.get_template(template).render(**facts)


def write(folder: Path, texts: dict[str, str]) -> None:
    """Each text into a file of its name."""
    for name, text in texts.items():
        with files.atomic_write(folder / name) as tmp:
            tmp.write_text(text, encoding="utf-8")
