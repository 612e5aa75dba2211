"""Four data sets of text and code from the source of Python's standard library.

The source differs between Python versions, so each version has its own configuration. The test splits consist
of whole modules.
"""

import abc
import ast
import io
import keyword
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from experiments.data.builder import EmbeddedBuilder, Example, is_held_out
from experiments.errors import UsageError

CHUNK = 1025  # characters per example of StdlibText
WINDOW = 48  # tokens per example of StdlibTokens
SIGNATURE, PARAMETER = 80, 16  # maximum lengths in StdlibDefaults, characters
_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}
_MIN_MODULES = 100
ROLES = (
    "other",
    "function",
    "class",
    "parameter",
    "argument",
    "call",
    "method",
    "attribute",
    "import",
    "assigned",
    "read",
)


def read_modules() -> Iterator[tuple[str, str]]:
    """Yields name and source of each module of the standard library, without its tests.

    Raises:
      UsageError: if the source of the standard library is not installed.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if not _EXCLUDED & set(path.relative_to(root).parts)]
    if len(paths) < _MIN_MODULES:
        raise UsageError(
            f"the tasks on text and code require the source of the standard library; {root} has {len(paths)} "
            f"modules, fewer than {_MIN_MODULES}; use a Python installation with its .py files"
        )
    for path in paths:
        name = path.relative_to(root).with_suffix("").as_posix().replace("/", ".")
        yield name, path.read_text(encoding="utf-8", errors="replace")


class _Stdlib(EmbeddedBuilder):
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=f"python{sys.version_info.major}.{sys.version_info.minor}")
    ]

    @staticmethod
    @abc.abstractmethod
    def examples(source: str) -> Iterator[Example]:
        """Yields the examples of one module."""

    def splits(self) -> dict[str, Iterable[Example]]:
        """Whole modules, about one in ten in the test split; duplicate examples are dropped."""
        modules = list(read_modules())
        known: set[bytes] = set()
        return {
            "train": _distinct(
                self.examples, [text for name, text in modules if not is_held_out(name)], known
            ),
            "test": _distinct(self.examples, [text for name, text in modules if is_held_out(name)], known),
        }


def _distinct(
    examples: Callable[[str], Iterator[Example]], sources: list[str], known: set[bytes]
) -> Iterator[Example]:
    """Yields the examples that are not in ``known``, and adds them to it."""
    for source in sources:
        for example in examples(source):
            key = b"\0".join(np.asarray(value).tobytes() for value in example.values())
            if key not in known:
                known.add(key)
                yield example


class StdlibText(_Stdlib):
    """Chunks of source text, for character-level language modelling."""

    def features(self) -> dict[str, Any]:
        """ASCII codes; other characters become question marks."""
        return {"text": tfds.features.Tensor(shape=(CHUNK,), dtype=np.uint8)}

    @staticmethod
    def examples(source: str) -> Iterator[Example]:
        """Chunks that overlap by one character, so that every character but the first is a target."""
        codes = np.frombuffer(source.encode("ascii", "replace"), np.uint8)
        for start in range(0, len(codes) - CHUNK, CHUNK - 1):
            yield {"text": codes[start : start + CHUNK]}


class StdlibDocstrings(_Stdlib):
    """Bodies of functions and the first lines of their docstrings, for summarisation."""

    def features(self) -> dict[str, Any]:
        """Code without its docstring, and the summary line."""
        return {"code": tfds.features.Text(), "summary": tfds.features.Text()}

    @staticmethod
    def examples(source: str) -> Iterator[Example]:
        """Functions with a docstring and at least one other statement."""
        for function in _functions(source):
            docstring = ast.get_docstring(function)
            if not docstring or len(function.body) < 2:
                continue
            body = "\n".join(ast.unparse(statement) for statement in function.body[1:])
            code = f"{function.name}({ast.unparse(function.args)}): {body}"
            yield {"code": code, "summary": docstring.split("\n")[0]}


class StdlibTokens(_Stdlib):
    """Windows of tokens with their syntactic roles, for tagging."""

    def features(self) -> dict[str, Any]:
        """Tokens separated by spaces; roles as indices into :data:`ROLES`."""
        return {
            "tokens": tfds.features.Text(),
            "roles": tfds.features.Tensor(shape=(WINDOW,), dtype=np.uint8),
        }

    @staticmethod
    def examples(source: str) -> Iterator[Example]:
        """Consecutive windows; the remaining tokens at the end of a module are dropped."""
        tagged = tag(source)
        for start in range(0, len(tagged) - WINDOW, WINDOW):
            tokens, roles = zip(*tagged[start : start + WINDOW], strict=True)
            yield {
                "tokens": " ".join(tokens),
                "roles": np.array([ROLES.index(role) for role in roles], np.uint8),
            }


class StdlibDefaults(_Stdlib):
    """Extractive question answering: the default of a parameter is a span of the signature."""

    def features(self) -> dict[str, Any]:
        """The signature, the name of a parameter, and the start and end (exclusive) of its default."""
        return {
            "signature": tfds.features.Text(),
            "parameter": tfds.features.Text(),
            "start": tfds.features.Scalar(np.int32),
            "end": tfds.features.Scalar(np.int32),
        }

    @staticmethod
    def examples(source: str) -> Iterator[Example]:
        """One example per parameter with a default, from functions with at least two of them."""
        for function in _functions(source):
            arguments = function.args
            positional = [*arguments.posonlyargs, *arguments.args]
            defaults = dict(zip(reversed(positional), reversed(arguments.defaults), strict=False))
            defaults |= {a: d for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d}
            signature, spans = _signature(arguments, defaults)
            if len(spans) < 2 or len(signature) > SIGNATURE:
                continue
            for parameter, (start, end) in spans.items():
                if len(parameter) <= PARAMETER:
                    yield {"signature": signature, "parameter": parameter, "start": start, "end": end}


def _signature(
    arguments: ast.arguments, defaults: dict[ast.arg, ast.expr]
) -> tuple[str, dict[str, tuple[int, int]]]:
    """The named parameters as text, without annotations, and the span of each default in that text."""
    text, spans = "(", {}
    ordered = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    for index, argument in enumerate(ordered):
        text += (", " if index else "") + argument.arg
        if argument in defaults:
            text += "="
            start = len(text)
            text += ast.unparse(defaults[argument])
            spans[argument.arg] = start, len(text)
    return text + ")", spans


def _parse(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):  # a few files contain errors on purpose, or use another encoding
        return None


def _functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = _parse(source)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def tag(source: str) -> list[tuple[str, str]]:
    r"""Tokenizes a module; returns tokens with their syntactic roles, without comments and layout.

    Examples:
      >>> tag("def area(r):\n    return pi * r.square()\n")[1:5]
      [('area', 'function'), ('(', 'other'), ('r', 'parameter'), (')', 'other')]
    """
    tree = _parse(source)
    if tree is None:
        return []
    roles = _roles(tree)
    result, previous = [], ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text, role = token.string, "other"
        if token.type == tokenize.NAME:
            row, column = token.start
            position = row, len(token.line[:column].encode())  # ast counts bytes
            role = "other" if keyword.iskeyword(text) else roles.get(position, "other")
            role = {"def": "function", "class": "class"}.get(previous, role)
        elif token.type == tokenize.NUMBER:
            text = "<number>"
        elif token.type in (tokenize.STRING, getattr(tokenize, "FSTRING_START", None)):
            text = "<string>"
        elif token.type != tokenize.OP:
            continue
        result.append((text, role))
        previous = text
    return result


def _roles(tree: ast.Module) -> dict[tuple[int, int], str]:
    """The role of the name at each (line, byte)."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    roles = {}
    for node in ast.walk(tree):
        match node:
            case ast.arg():
                roles[node.lineno, node.col_offset] = "parameter"
            case ast.keyword() if node.arg:
                roles[node.lineno, node.col_offset] = "argument"
            case ast.Attribute():
                at = node.end_lineno, node.end_col_offset - len(node.attr.encode())
                roles[at] = "method" if id(node) in called else "attribute"
            case ast.alias():
                roles[node.lineno, node.col_offset] = "import"
            case ast.Name() if id(node) in called:
                roles[node.lineno, node.col_offset] = "call"
            case ast.Name():
                stored = isinstance(node.ctx, ast.Store)
                roles[node.lineno, node.col_offset] = "assigned" if stored else "read"
    return roles
