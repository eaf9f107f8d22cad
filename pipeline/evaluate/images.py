"""Plots as PNG images for notebooks: code hosts remove the SVG of a page."""

import io
import re
import textwrap
from typing import Any

from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.colors import to_hex, to_rgb, to_rgba_array
from matplotlib.figure import Figure

from pipeline.evaluate.plots import LIGHT, STYLE, THEME

COLOURS = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")
VALUES: dict[str, str] = dict(re.findall(r"(--[\w-]+): (#\w+)", LIGHT))
DOTS_PER_INCH = 110
CAPTION_WIDTH = 80  # characters


def render_png(figure: Figure, title: str, caption: str) -> bytes:
    """Return a plot as PNG, with its title above, its caption below, and the colours of the light theme.

    `figure` is one that `plots.draw_plot` drew. It is changed in place.
    """
    with style.context(["default", STYLE]):
        lines = textwrap.wrap(caption, CAPTION_WIDTH)
        figure.set_size_inches(figure.get_figwidth(), 3.1 + 0.13 * len(lines))
        figure.axes[0].set_title(title, loc="left", parse_math=False, weight="bold")
        figure.supxlabel("\n".join(lines), x=0.02, ha="left", fontsize=8, parse_math=False)
        figure.draw_without_rendering()  # it adds the ticks
        for artist in figure.findobj():
            _apply_light_theme(artist)

        buffer = io.BytesIO()
        figure.savefig(
            buffer,
            format="png",
            dpi=DOTS_PER_INCH,
            facecolor=VALUES["--page"],
            metadata={"Software": None},
        )
    return buffer.getvalue()


def _apply_light_theme(artist: Artist) -> None:
    for name in COLOURS:
        if hasattr(artist, f"get_{name}") and hasattr(artist, f"set_{name}"):
            colour: Any = to_rgba_array(getattr(artist, f"get_{name}")())
            for rgba in colour:
                if variable := THEME.get(to_hex(rgba[:3])):
                    rgba[:3] = to_rgb(VALUES[variable])
            if len(colour):
                getattr(artist, f"set_{name}")(colour if len(colour) > 1 else tuple(colour[0]))
