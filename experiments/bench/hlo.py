"""Counts what an optimized XLA program does: kernels, copies, control flow, bytes, transfers to the host."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple


class Program(NamedTuple):
    """What the program of one train step does on one device.

    The first group of fields counts what every step executes. Operations in branches and loops are not among
    these, since rules have them for what few steps do. The second group counts in the whole program.
    """

    kernels: int  # on a GPU, the kernels that are launched; on a TPU, fusions and operations on scalars
    copies: int  # without the transfers between the memories of a TPU, which run beside the computation
    conditionals: int
    loops: int  # without those whose number of iterations is known to the compiler
    bytes: int  # read from and written to the main memory

    all_reduces: int
    float64: int  # arrays of this type
    host_operations: tuple[str, ...]  # callbacks, infeed, outfeed, send and receive


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    line: str


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")
_OTHER_MEMORY = re.compile(r"S\([1-9]")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective")
_HOST = ("infeed", "outfeed", "send", "recv")
# The kinds of operations; all others are kernels.
_KINDS = {
    **dict.fromkeys(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota"), "none"),
    **dict.fromkeys(("after-all", "add-dependency", "opt-barrier", "partition-id", "replica-id"), "none"),
    **dict.fromkeys(("copy-start", "slice-start"), "none"),  # counted where they end
    **dict.fromkeys(("copy-done", "slice-done"), "transfer"),
    **dict.fromkeys(("copy", "conditional", "call"), "same"),
}


def read_program(text: str) -> Program:
    """Counts operations in the text of an optimized HLO program, as of ``compiled.as_text()``."""
    computations, entry = _parse(text)
    everything = [each for body in computations.values() for each in body]
    shapes = {each.name: each.shape for each in everything}
    executed = list(_always_executed(computations, entry))
    counts = Counter(_kind(each) for each in executed)
    return Program(
        kernels=counts["kernel"],
        copies=counts["copy"],
        conditionals=counts["conditional"],
        loops=counts["loop"],
        bytes=sum(_bytes_moved(each, shapes) for each in executed),
        all_reduces=sum(each.operation in ("all-reduce", "all-reduce-start") for each in everything),
        float64=sum("f64[" in each.shape for each in everything),
        host_operations=tuple(name for each in everything if (name := _host_operation(each))),
    )


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program by name, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            body = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif found := _INSTRUCTION.match(line):
            name, shape, operation, rest = found.groups()
            operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
            body.append(Instruction(name, shape, operation, tuple(operands), line))
    return computations, entry


def _always_executed(computations: dict[str, list[Instruction]], name: str) -> Iterator[Instruction]:
    """The instructions of a computation and of those that it calls; branches and loops are not entered."""
    for each in computations[name]:
        called = re.search(r"\bto_apply=%?([\w.-]+)", each.line) if each.operation == "call" else None
        if called:
            yield from _always_executed(computations, called[1])
        else:
            yield each


def _kind(each: Instruction) -> str:
    kind = _KINDS.get(each.operation, "kernel")
    if kind != "kernel":
        return each.operation if kind == "same" else kind
    if each.operation == "while":
        return "none" if "known_trip_count" in each.line else "loop"
    if each.operation.endswith("-done") or 'custom_call_target="ConcatBitcast"' in each.line:
        return "none"
    return "collective" if each.operation.startswith(_COLLECTIVES) else "kernel"


def _bytes_moved(each: Instruction, shapes: dict[str, str]) -> int:
    """The bytes that an instruction reads and writes: all of its operands and results."""
    kind = _kind(each)
    if kind == "transfer":  # from or to another memory
        return _bytes(each.shape, everywhere=True)
    if kind in ("kernel", "copy", "collective"):
        return _bytes(each.shape) + sum(_bytes(shapes.get(name, "")) for name in each.operands)
    return 0


def _bytes(shape: str, everywhere: bool = False) -> int:
    """The bytes of the arrays in a shape; without ``everywhere``, only of those in the main memory."""
    total = 0
    for _, bits, dimensions, layout in _ARRAY.findall(shape):
        if everywhere or not _OTHER_MEMORY.search(layout):
            total += int(bits or 8) * math.prod(int(n) for n in dimensions.split(",") if n) // 8
    return total


def _host_operation(each: Instruction) -> str | None:
    """The name of an operation that exchanges data with the host."""
    if each.operation.removesuffix("-done").removesuffix("-start") in _HOST:
        return each.operation
    target = re.search(r'custom_call_target="([^"]*)"', each.line)
    return target[1] if target and re.search("callback|host", target[1], re.IGNORECASE) else None
