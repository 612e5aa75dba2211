"""The source of Python's standard library as text and code, in four data sets, read from this machine.

They differ a little from one Python version to the next, so each version has a configuration of its own.
Whole modules are held out for the test splits.
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

CHUNK = 1025  # bytes of a piece of text
WINDOW = 48  # tokens of a piece of code
SIGNATURE, PARAMETER = 80, 16  # greatest lengths, characters
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}
_LEAST_MODULES = 100
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
    """Name and source of each module of the standard library, tests left out.

    Raises:
      UsageError: if this Python came without the source of its standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if not _LEFT_OUT & set(path.relative_to(root).parts)]
    if len(paths) < _LEAST_MODULES:
        raise UsageError(
            f"the tasks on text and code need the source of the standard library; {root} has {len(paths)} "
            f"modules, fewer than {_LEAST_MODULES}: use a Python that is installed with its .py files"
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
        """The examples of one module."""

    def splits(self) -> dict[str, Iterable[Example]]:
        """Whole modules, about one in ten held out; what several modules have in common is kept once."""
        modules = list(read_modules())
        seen: set[bytes] = set()
        return {
            "train": _distinct(
                self.examples, [text for name, text in modules if not is_held_out(name)], seen
            ),
            "test": _distinct(self.examples, [text for name, text in modules if is_held_out(name)], seen),
        }


def _distinct(
    examples: Callable[[str], Iterator[Example]], sources: list[str], seen: set[bytes]
) -> Iterator[Example]:
    for source in sources:
        for example in examples(source):
            key = b"\0".join(np.asarray(value).tobytes() for value in example.values())
            if key not in seen:
                seen.add(key)
                yield example


class StdlibText(_Stdlib):
    """Pieces of source text, for language modelling by characters."""

    def features(self) -> dict[str, Any]:
        """ASCII codes; other characters are question marks."""
        return {"text": tfds.features.Tensor(shape=(CHUNK,), dtype=np.uint8)}

    @staticmethod
    def examples(source: str) -> Iterator[Example]:
        """Pieces that overlap by one character, so that each is the target of some input."""
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
        """Functions with a docstring and more than that."""
        for function in _functions(source):
            docstring = ast.get_docstring(function)
            if not docstring or len(function.body) < 2:
                continue
            body = "\n".join(ast.unparse(statement) for statement in function.body[1:])
            code = f"{function.name}({ast.unparse(function.args)}): {body}"
            yield {"code": code, "summary": docstring.split("\n")[0]}


class StdlibTokens(_Stdlib):
    """Windows of tokens with the syntactic role of each, for tagging: the like of named entities."""

    def features(self) -> dict[str, Any]:
        """Tokens with spaces between; roles as indices into :data:`ROLES`."""
        return {
            "tokens": tfds.features.Text(),
            "roles": tfds.features.Tensor(shape=(WINDOW,), dtype=np.uint8),
        }

    @staticmethod
    def examples(source: str) -> Iterator[Example]:
        """Windows that follow one another; what is left at the end of a module is dropped."""
        tagged = tag(source)
        for start in range(0, len(tagged) - WINDOW, WINDOW):
            tokens, roles = zip(*tagged[start : start + WINDOW], strict=True)
            yield {
                "tokens": " ".join(tokens),
                "roles": np.array([ROLES.index(role) for role in roles], np.uint8),
            }


class StdlibDefaults(_Stdlib):
    """Which default has parameter p? The answer is a span of the signature: extractive question answering."""

    def features(self) -> dict[str, Any]:
        """The signature, the parameter asked for, and where its default begins and ends (exclusive)."""
        return {
            "signature": tfds.features.Text(),
            "parameter": tfds.features.Text(),
            "start": tfds.features.Scalar(np.int32),
            "end": tfds.features.Scalar(np.int32),
        }

    @staticmethod
    def examples(source: str) -> Iterator[Example]:
        """One example for each parameter with a default, of functions with at least two of them."""
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
    """The named parameters as text, without annotations, and the span of each default in it."""
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
    except (SyntaxError, ValueError):  # a few files are broken on purpose, or in another encoding
        return None


def _functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = _parse(source)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def tag(source: str) -> list[tuple[str, str]]:
    r"""The tokens of a module, each with its syntactic role; comments and layout are left out.

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
