"""A report as one HTML file with tables and interactive figures, which needs no network."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
import plotly.io
import plotly.offline

from experiments.training.store import write_atomically

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto; }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: 3px 10px; text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #888; }
"""


class Table(NamedTuple):
    """A table of text cells."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


class Section(NamedTuple):
    """A heading, a paragraph, and tables and figures."""

    title: str
    text: str
    parts: Sequence[Table | go.Figure]


def write_page(path: Path, title: str, text: str, sections: Sequence[Section]) -> None:
    """Writes a self-contained page, which includes the plotting library.

    Args:
      path: the HTML file.
      title: title and first heading.
      text: the first paragraph.
      sections: the content. A click on the legend of a figure hides or shows a curve; figures zoom and show
        values on hover.

    Raises:
      UsageError: if the file cannot be written.
    """
    body = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(text)}</p>"]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>")
        body.extend(_table(part) if isinstance(part, Table) else _figure(part) for part in section.parts)
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Without an icon, browsers request one from the server and log an error.
        '<link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style><script>{plotly.offline.get_plotlyjs()}</script></head>"
        f"<body>{''.join(body)}</body></html>"
    )
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


class Curve(NamedTuple):
    """A line of a figure; ``style`` holds arguments of a Plotly ``Scatter``, such as ``Look.plotly()``."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: dict[str, Any] = {}  # noqa: RUF012  (never changed)


def line_figure(
    curves: Sequence[Curve], x_title: str, y_title: str, *, x_log: bool = False, y_log: bool = False
) -> go.Figure:
    """An interactive figure of curves."""
    figure = go.Figure()
    for name, x, y, style in curves:
        mode = "lines+markers" if "marker" in style else "lines"
        figure.add_scatter(x=list(x), y=list(y), name=name, mode=mode, **style)
    figure.update_xaxes(title=x_title, **({"type": "log", "dtick": 1} if x_log else {}))
    figure.update_yaxes(title=y_title, **({"type": "log", "exponentformat": "power"} if y_log else {}))
    figure.update_layout(height=430, margin={"t": 20}, showlegend=True)
    return figure


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(header)}</th>" for header in table.headers)
    rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figure(figure: go.Figure) -> str:
    return plotly.io.to_html(figure, include_plotlyjs=False, full_html=False, config={"displaylogo": False})
