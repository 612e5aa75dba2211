"""Colours and line styles of figures, without a plotting library."""

from typing import Any, NamedTuple

# Okabe and Ito's palette, which colour-blind readers can distinguish.
BLUE, SKY, GREEN, ORANGE, RED, PINK, YELLOW, GREY, BLACK, BROWN = (
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
    "#F0E442",
    "#999999",
    "#000000",
    "#8C510A",
)
_DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}  # Matplotlib's names and Plotly's


class Look(NamedTuple):
    """How a line is drawn in every figure.

    Attributes:
      color: ``"#RRGGBB"``.
      line: Matplotlib's line style, one of ``"-"``, ``"--"``, ``":"`` and ``"-."``.
    """

    color: str
    line: str = "-"

    def matplotlib(self) -> dict[str, Any]:
        """Keyword arguments of ``Axes.plot``.

        Examples:
          >>> Look(BLUE, "--").matplotlib()
          {'color': '#0072B2', 'linestyle': '--'}
        """
        return {"color": self.color, "linestyle": self.line}

    def plotly(self) -> dict[str, Any]:
        """The ``line`` of a Plotly trace.

        Examples:
          >>> Look(BLUE, "--").plotly()
          {'color': '#0072B2', 'dash': 'dash'}
        """
        return {"color": self.color, "dash": _DASHES[self.line]}
