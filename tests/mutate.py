"""Mutation testing of the files that all rules rest on: ``python -m tests.mutate greedy|ring|rule``.

Each mutant (made by mutmut 2: a changed number, operator, name or default) runs the tests of its file in a
copy of the project. A mutant that passes all tests survives: either a test is missing, or the mutant is
equivalent to the original, like those listed here. A file takes half an hour: one process imports JAX and
forks for every mutant, and compiled programs are cached. Requires ``pip install "mutmut<3"`` and a system
with ``fork``.
"""

import argparse
import difflib
import importlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_OWN = "tests/greedylr_jax"
# The tests that find most mutants come first, as the first failure ends a run.
TESTS = {
    "greedy": (
        f"{_OWN}/test_greedy_traces.py",
        f"{_OWN}/test_greedy.py",
        "greedylr_jax/_greedy.py",
        f"{_OWN}/test_adapters.py",
        f"{_OWN}/test_greedy_model.py",
        f"{_OWN}/test_constructors.py",
        f"{_OWN}/test_wrappers.py",
        f"{_OWN}/test_adversarial.py",
    ),
    "ring": (f"{_OWN}/test_ring.py", f"{_OWN}/test_greedy.py", f"{_OWN}/test_greedy_model.py"),
    "rule": (
        f"{_OWN}/test_adapters.py",
        f"{_OWN}/test_chain.py",
        f"{_OWN}/test_greedy.py",
        "greedylr_jax/_rule.py",
        f"{_OWN}/test_reading.py",
        f"{_OWN}/test_hypergradient.py",
        f"{_OWN}/test_flax.py",
        f"{_OWN}/test_rate_optimizers.py",
        f"{_OWN}/test_rollback.py",
        f"{_OWN}/test_wrappers.py",
        f"{_OWN}/test_devices.py",
    ),
}
# Mutated lines that are equivalent to the original, and why.
_BOUND = "bound = known * _numerics.where(known <= 0, 1 + settings.threshold, 1 - settings.threshold)"
_COUNTDOWN = "1 if settings.reset_at_min is None else settings.reset_at_min"
_SHORT = "len(numbers) > 3 * _BLOCK:  # unrolling would make a long program"
_TERMS = "the order of additions does not change an exact sum"
EQUIVALENT = {
    f"reset_countdown=jnp.array({_COUNTDOWN}, jnp.int32),": "never read without resets",
    "known = _numerics.where(jnp.isfinite(best), best, 1)": "its bound is replaced if the best is infinite",
    _BOUND: "zero times either is zero",
    "_BLOCK = 9  # values per block sum": _TERMS,
    f"if {_SHORT.replace('>', '>=')}": _TERMS,
    f"if {_SHORT.replace('3 *', '4 *')}": _TERMS,
    f"if {_SHORT.replace('*', '/')}": _TERMS,
    "decides_each_step = None": "the mean of one loss is the loss",
}
_LIMIT = 900  # seconds after which a mutant counts as found


def mutants(source: str, name: str) -> list[str]:
    """All texts that differ from the source by one mutation."""
    from mutmut import Context, list_mutations, mutate  # noqa: PLC0415  # not among the tests' dependencies

    def context(**which) -> Context:
        return Context(source=source, filename=name, **which)

    return [mutate(context(mutation_id=each))[0] for each in list_mutations(context())]


def changed(source: str, mutant: str) -> str:
    """The line that is new in the mutant."""
    lines = difflib.unified_diff(source.splitlines(), mutant.splitlines(), lineterm="", n=0)
    return "\n".join(line[1:].strip() for line in lines if line.startswith("+") and line[:3] != "+++")


def copy_project(folder: Path) -> None:
    """Copies the library and its tests."""
    for name in ("greedylr_jax", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def survives(tests: tuple[str, ...], log: Path) -> bool:
    """Whether all tests pass in a fork of this process."""
    child = os.fork()
    if child == 0:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os._exit(int(pytest.main(["-x", "-q", "-n0", "--tb=line", *tests])))
    deadline = time.monotonic() + _LIMIT
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.1)
    os.killpg(child, 9)
    os.waitpid(child, 0)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutation testing; exit status 1 if a mutant survives.")
    parser.add_argument("file", choices=TESTS)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutants; default: all")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_project(folder)
        os.chdir(folder)
        sys.path.insert(0, name)
        sys.dont_write_bytecode = True  # a stale one would hide a mutant
        for module in [each for each in sys.modules if each.split(".")[0] == "tests"]:
            del sys.modules[module]  # so that those of the copy are imported
        for module in ("flax.nnx", "hypothesis.strategies", "jax.numpy", "optax.contrib"):
            importlib.import_module(module)  # once for all forks

        target, tests = folder / "greedylr_jax" / f"_{arguments.file}.py", TESTS[arguments.file]
        source, log = target.read_text(), folder / "log.txt"
        if not survives(tests, log):
            raise SystemExit(f"The tests fail without any mutation:\n{log.read_text()[-2000:]}")
        missing = 0
        for number, mutant in enumerate(mutants(source, target.name)):
            if arguments.only is not None and number not in arguments.only:
                continue
            line = changed(source, mutant)
            if line in EQUIVALENT:
                print(f"{number}: equivalent: {line}  ({EQUIVALENT[line]})", flush=True)
                continue
            target.write_text(mutant)
            if survives(tests, log):
                missing += 1
                print(f"{number}: SURVIVED: {line}", flush=True)
        print(f"{missing} mutants survived that are not known to be equivalent")
        raise SystemExit(missing > 0)


if __name__ == "__main__":
    main()
