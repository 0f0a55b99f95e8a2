"""Owns the look of all pictures: what draws on a figure in, an inline SVG string out.

Figures are made without pyplot: no display is needed and none stays open. Colours are CSS variables of the page
(with a light fallback), so one picture serves the light scheme, the dark one and print.
"""

import io
import re
from collections.abc import Callable

import matplotlib
from matplotlib.figure import Figure

INK, LINE, ACCENT, SECOND = "#1e2822", "#dce4dc", "#2f7d4f", "#b3661a"
SERIES = (
    ACCENT,
    SECOND,
    "#2b6ca8",
    "#93458a",
    "#857414",
    "#5c6b73",
)  # told apart by the colour-blind, with their marks
VARIABLES = {INK: "ink", LINE: "line", ACCENT: "accent", SECOND: "second"}
VARIABLES |= {colour: f"series{place}" for place, colour in enumerate(SERIES) if place > 1}
SIZE = (4.4, 2.75)  # inches at 72 px; two stand side by side on a laptop, and text of 9.5 px survives a phone
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "text.parse_math": False,  # names from outside may hold a $
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


def draw(name: str, paint: Callable[[Figure], None], size: tuple[float, float] = SIZE) -> str:
    """The same numbers give the same bytes: own salt for ids, no date, nobody's matplotlibrc."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": name})
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # no XML prolog inside HTML
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", svg, count=3)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # figure_1, axes_1... would be twice in one page
    svg = re.sub(r"font-family: [^;]*; ", "", svg)  # the page's font
    # matplotlib's own style element would hold for the whole page
    style = re.search(r"<defs>\s*<style[^>]*>\*{(.*?)}</style>\s*</defs>", svg)
    svg = svg.replace(style[0], "").replace("<svg", f'<svg style="{style[1]}"', 1)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    return svg.strip()


def standalone(svg: str) -> str:
    """The same picture as a file of its own."""
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" font-family="sans-serif"'
    return svg.replace("<svg", f"<svg {names}", 1) + "\n"
