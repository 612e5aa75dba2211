"""Colours, line styles and markers of figures, without a plotting library.

No figure needs colour vision, or a printer with colours: every schedule has a pair of line style and marker
of its own. Under simulated protanopia, deuteranopia and tritanopia any two colours are at least 15 apart (CIE
1976), and the contrast of each with white is at least 2.2 (``tests/experiments/test_palette.py``).
"""

from typing import Any, NamedTuple

# Okabe and Ito's palette, with a violet in place of its yellow, which is hardly visible on paper, and more.
BLUE, SKY, GREEN, ORANGE, RED, PINK, VIOLET, GREY, BLACK, BROWN = (
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
    "#4B1D73",
    "#555555",
    "#000000",
    "#6F4008",
)
_DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}  # Matplotlib's names and Plotly's
_MARKERS = {  # of each colour: Matplotlib's name and Plotly's
    BLUE: ("o", "circle"),
    SKY: ("s", "square"),
    GREEN: ("^", "triangle-up"),
    ORANGE: ("D", "diamond"),
    RED: ("*", "star"),
    PINK: ("P", "cross"),
    VIOLET: ("X", "x"),
    GREY: ("v", "triangle-down"),
    BLACK: ("p", "pentagon"),
    BROWN: ("h", "hexagon"),
}
_MARKER_SIZES = {"*": 9.0, "p": 6.5, "h": 6.5, "P": 6.5, "X": 6.5}  # points, of those with little area
_MARK_EVERY = 0.12  # of the diagonal of the axes


class Look(NamedTuple):
    """How a line is drawn in every figure.

    Attributes:
      color: one of the colours above, each of which has a marker.
      line: Matplotlib's line style, one of ``"-"``, ``"--"``, ``":"`` and ``"-."``.
    """

    color: str
    line: str = "-"

    def matplotlib(self) -> dict[str, Any]:
        """Keyword arguments of ``Axes.plot``.

        Examples:
          >>> look = Look(BLUE, "--").matplotlib()
          >>> look["color"], look["linestyle"], look["marker"]
          ('#0072B2', '--', 'o')
        """
        # Lines of different styles start their markers at different places, should the lines coincide.
        start = _MARK_EVERY * list(_DASHES).index(self.line) / len(_DASHES)
        return {
            "color": self.color,
            "linestyle": self.line,
            "marker": self.markers[0],
            "markersize": _MARKER_SIZES.get(self.markers[0], 5.5),
            "markeredgecolor": "white",  # separates it from the line
            "markeredgewidth": 0.4,
            "markevery": (start, _MARK_EVERY),
        }

    def plotly(self) -> dict[str, Any]:
        """Keyword arguments of a Plotly ``Scatter``.

        Examples:
          >>> look = Look(BLUE, "--").plotly()
          >>> look["line"], look["marker"]["symbol"]
          ({'color': '#0072B2', 'dash': 'dash'}, 'circle')
        """
        marker = {"symbol": self.markers[1], "size": 7, "maxdisplayed": 12}
        return {"line": {"color": self.color, "dash": _DASHES[self.line]}, "marker": marker}

    @property
    def markers(self) -> tuple[str | None, str]:
        """The marker in Matplotlib and in Plotly; none for a colour that is not of the palette."""
        return _MARKERS.get(self.color, (None, "line-ew"))
