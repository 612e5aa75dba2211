"""Configuration of the documentation: ``sphinx-build -W --keep-going docs build/site`` (``nox -s docs``).

The build needs no network, and nor does a reader: formulas become MathML, which browsers draw themselves, and
no page loads a script, font or style from another host. ``tests/test_site.py`` tests both.
"""

import inspect
import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from jax.typing import ArrayLike
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation

import greedylr_jax

project = "greedylr-jax"
author = "the authors of greedylr-jax"
copyright = author
version = release = greedylr_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
nitpicky = True  # a reference to a name of the library that is on no page is an error
nitpick_ignore_regex = [
    ("py:.*", r"(?!greedylr_jax\.).*"),  # names of other libraries
    ("py:.*", r"greedylr_jax\.(.*\.)?_.*"),  # private names
]

myst_enable_extensions = ["colon_fence", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # of a cell, in seconds; on an idle machine a notebook takes a fraction of that
nb_ipywidgets_js = {}  # would be loaded from another host

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_use_rtype = False
napoleon_use_ivar = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "greedylr-jax"
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "use_fullscreen_button": False}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False
html_copy_source = False


def math(translator: Any, node: nodes.Element) -> None:
    """Writes a formula as MathML."""
    formula = tex2mathml(node.astext())
    if isinstance(node, nodes.math_block):
        formula = formula.replace("<math", '<math display="block"', 1)
    translator.body.append(formula)
    raise nodes.SkipNode


LONG_NAMES = {stringify_annotation(ArrayLike, mode): "ArrayLike" for mode in ("fully-qualified", "smart")}


def shorten(app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str) -> Any:
    """Writes ``ArrayLike`` for the union that it stands for, and omits modules from the names of types."""

    def short(text: str | None) -> str | None:
        for long, abbreviation in LONG_NAMES.items():
            text = text and text.replace(long, abbreviation)
        return text and re.sub(r"~?\b(?!greedylr_jax\.[A-Z])(?:[a-z_]+\.)+(?=[A-Z])", "", text)

    return short(signature), short(returns)


def document_fields(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Adds to a state the table of its fields, from the comments beside them in the source."""
    if not (inspect.isclass(obj) and hasattr(obj, "_fields")) or any("Attributes:" in line for line in lines):
        return
    source = inspect.getsource(obj)
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", source, flags=re.MULTILINE))
    lines += ["", "Attributes:", *(f"  {field}: {comments.get(field, '')}" for field in obj._fields)]


def setup(app: Sphinx) -> None:
    """Registers the functions above."""
    app.add_html_math_renderer("mathml", inline_renderers=(math, None), block_renderers=(math, None))
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-process-docstring", document_fields, priority=100)  # before Napoleon
