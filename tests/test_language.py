"""Docstrings, comments, messages, documentation and names use the field's standard terms.

:data:`TERMS` lists home-made terms and the standard ones to use instead. A term is looked for in one of
three views of a file:

* ``prose``: strings and comments of Python files; all of a document;
* ``names``: code outside strings and comments, one-word strings, and what is between backticks;
* ``text``: the whole file.

Many terms are ordinary English words as well, so each pattern matches the home-made use only, and ``allowed``
lists standard phrases that contain it. :func:`test_term` shows both kinds of uses of every term. Old names of
renamed arguments are exempt: the arguments of ``renamed_arguments(...)``, and lines with the comment ``# old
name``.
"""

import json
import re
import string
import subprocess
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".cfg", ".ipynb", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
HERE = "tests/test_language.py"


class Term(NamedTuple):
    """A home-made term: where and how it is found, and what to write instead.

    ``words`` and ``allowed`` are lower-case patterns of whole words (of alternatives with a common start the
    longest first). They match in either case and as parts of ``snake_case`` and ``CamelCase`` names. A space
    in them stands for any gap between two words: spaces, a hyphen, an underscore, a line break in a comment.
    """

    name: str
    instead: str
    view: str  # "prose", "names" or "text"
    words: tuple[str, ...]
    bad: tuple[str, ...]  # lines of Python in which it must be found
    good: tuple[str, ...]  # lines of Python in which it must not be found
    allowed: tuple[str, ...] = ()  # standard phrases that contain one of the words
    exact: str = ""  # a further pattern, which is used as it is


TERMS = [
    Term(
        "settles",
        "restoring, restore_steps_left",
        "text",
        ("settl(?:es|ed|e|ing)",),
        ("settles = jnp.asarray(0)", "# further steps in which the way settles", "SETTLING_STEPS = 4"),
        ("settings = 1", "# the rule's settings"),
    ),
    Term(
        "takes (as a name)",
        "save",
        "names",
        ("takes",),
        ("takes = observed & improves", "exchange(takes=takes)", '"""``takes``: whether to save."""'),
        ('"""Takes an optimizer; it takes no arguments."""', "# it takes a minute"),
    ),
    Term(
        "kept (as a state)",
        "snapshot, Snapshot",
        "names",
        ("kept (?:params|parameters|states?|inner state)", "new kept"),
        ("state.kept", "class Kept: pass", "kept_params = 1", "new_kept = 1", "save(kept=kept)", "kept: Any"),
        (
            "kept = bernoulli(key, 0.9)",
            "# the state is kept in float32",
            "def test_is_kept_in_float32(): pass",
        ),
        exact=r"\bKept\b|\.kept\b|(?<![\w\"'])kept(?:=(?!=)|: )",
    ),
    Term(
        "what is kept",
        "the snapshot",
        "prose",
        (r"what (?:is|was|were|it) (?:then )?kept",),
        ("# Goes to what is kept.",),
        ("# The state is kept in float32.",),
    ),
    Term(
        "lost (as a name)",
        "diverged",
        "names",
        ("lost",),
        ("lost = losses > threshold", "is_lost = True", 'row["lost"]'),
        ("# no observation is lost", "lostness = 1"),
    ),
    Term(
        "a lost training",
        "diverged",
        "prose",
        (
            r"(?:trainings?|runs?|networks?|seeds?|models?|below|and) (?:is|are|was|were|gets?) lost",
            r"lost (?:trainings?|runs?|networks?|seeds?)",
        ),
        ("# below it the run is lost", "# most of the lost runs", "# until the network was lost"),
        ("# a change that is lost in the noise", "# no digits are lost"),
    ),
    Term(
        "hopeless",
        "diverged",
        "text",
        ("hopeless(?:ly)?",),
        ("is_hopeless = ~finite",),
        ("# hope",),
    ),
    Term(
        "boldness",
        "step_exponent, gain",
        "text",
        ("boldness",),
        ("boldness = 1.0", "# the boldness of a raise"),
        ("bold_driver()", "# the bold driver heuristic"),
    ),
    Term(
        "fade",
        "decay",
        "text",
        ("fad(?:es|ed|e|ing)",),
        ("trend_lr(fade=0.5)", "# the moves fade"),
        ("# rates decay", "facade = 1"),
    ),
    Term(
        "leap",
        "accelerated increase, accelerated_factor",
        "text",
        ("leap(?:s|ed|t|ing)?",),
        ("leap_factor = 2.0", "LEAPS = 3", "# the next one is a leap"),
        ("# leap years", "# overleaping"),
        allowed=("leap years?", "leap frog"),
    ),
    Term(
        "verdict, judge",
        "decision, decide",
        "text",
        (
            "verdicts?",
            "judge?ments?",
            "judg(?:es|ed|e|ing)",
        ),
        ("verdict: jax.Array", "# a change that is still to be judged"),
        ("# the decision",),
    ),
    Term(
        "pull",
        "directional derivative along the displacement",
        "text",
        ("pulls?",),
        ("pulls = empty_window()", "pull_mean = 0.0", "# the sign of the pull"),
        ("# git pull", "# see the pull request", "# pull the image from the registry", "# pull in packages"),
        allowed=("(?:git|docker) pulls?", "pull requests?", r"pulls? (?:[\w']+ ){0,3}(?:from|into|in)"),
    ),
    Term(
        "leads on, leads back",
        "is still descending along the displacement; has overshot",
        "text",
        (r"(?:lead(?:s|ing)?|led) (?:on|back)",),
        ("leads_on = pull < 0", "# as it always leads back"),
        ("# leads to an error", "# which leads the table"),
    ),
    Term(
        "way back",
        "restore, rollback",
        "text",
        ("ways? back",),
        ("way_back = True", "# whether the way\n# back is open"),
        ("# in this way", "# the way that it is computed"),
    ),
    Term(
        "the way (from the start)",
        "displacement, p - p0",
        "prose",
        (
            r"(?:the|a|longer|whole) way (?:since|from|so far)",
            r"along (?:this|the) way",
            r"longer way",
        ),
        ("# the way from the initial parameters", "# the loss along this way", "# a longer way is better"),
        ("# in this way", "# the same way as Optax", "# there is no way to know", "# half of the way"),
    ),
    Term(
        "way (as a name)",
        "displacement",
        "names",
        ("way",),
        ("way = param - first", "on_its_way = 1"),
        ("always = 1", "gateway = 2"),
    ),
    Term(
        "goes back",
        "restore, roll back",
        "text",
        (r"(?:go|goes|going|went|gone) back",),
        ("goes_back = bad", "# the training goes back to its best window", "# to go\n# back"),
        ("# rolls back",),
    ),
    Term(
        "a return (of a training)",
        "restore",
        "prose",
        (
            r"(?:after|since) (?:a|the|the last|each|every) return(?! (?:value|statement|type))",
            r"an? return (?:is|after|multiplies)",
            r"what a return",
        ),
        ("# A return after which no loss is good.", "# since the last return"),
        ("# Returns the new state.", '"""Returns:\n  a number"""', "# after the return value is known"),
    ),
    Term(
        "watch (as a state)",
        "divergence monitor",
        "names",
        (
            "watch(?:ed|es)?",
            "unwatched",
        ),
        ("state.watch", "class Watch: pass", "watched = 1", "unwatched()"),
        ("# rules that watch the loss", "watchdog = 1"),
    ),
    Term(
        "level, limit (of a monitor)",
        "baseline, threshold",
        "names",
        ("(?:rise|loss|bad|start) limit",),
        ("loss > state.limit", "mean < state.watch.level", "limit = rise_limit(mean)"),
        ("level = 1", "frame.limit(3)", "row.limit", "logger.level", "# the level of the noise", "limit = 5"),
        exact=r"\b(?:states?|watch|monitor|snapshot)\.(?:level|limit)\b",
    ),
    Term(
        "the ramp",
        "warm-up sweep, range test",
        "prose",
        (r"(?:the|a|its|of) ramps?", "ramping"),
        ("# the end of the ramp", "# a ramp over ten orders of magnitude"),
        ("# a linear ramp", "# ramp up the rate", "# a ramp-up of the rate", "range_test(ramp='linear')"),
        allowed=("(?:the|a) ramp (?:up|down|function)",),
    ),
    Term(
        "edge (of the rates)",
        "divergence rate, largest stable rate",
        "text",
        (r"the \*?edge(?!s? (?:of|case|cases)\b)",),
        ("state.edge", "# from the edge downwards"),
        (
            "# an edge of the graph",
            "# the edge of stability",
            "axes.edge",
            "edgecolor = 1",
            "# the edge case",
        ),
        exact=r"\b(?:search|states?)\.edge\b",
    ),
    Term(
        "given up",
        "aborted",
        "text",
        (r"(?:give|gives|given|gave|giving) up",),
        ("given_up = bad", "# a trial is given\n# up", "gives_up = 1"),
        ("# given an upper bound", "# given updates"),
    ),
    Term(
        "found (of a rate)",
        "selected",
        "text",
        (
            r"found_rates?",
            r"rates? (?:that (?:is|was) |that (?:its|the) search )?found",
            r"what (?:is|was|(?:its|the) search) found",
            r"search (?:has )?found",
        ),
        ("state.found", "# above what its search found", "# the rate that is found"),
        ("# not found", "found = []", 'raise KeyError("no rule found")', "# found in any nesting of states"),
        exact=r"\b(?:search|states?)\.found\b",
    ),
    Term(
        "asked",
        "sampled; called; requested",
        "text",
        ("asked",),
        ("asked = batch[:4]", "# before the next rate is asked"),
        ("# if asked to", "# where a seed is asked for", "masked = 1", "tasked = 2"),
        allowed=("asked (?:for|to)",),
    ),
    Term(
        "pays, has paid",
        "improvement ratio at least ...; is worth its cost",
        "text",
        (
            "pays",
            "paid",
        ),
        ("paid = ratio > 0.7", "# a raise that pays"),
        ("# pays attention to", "repaid = 1", "# which pays off"),
        allowed=("(?:pays|paid) (?:attention|off)",),
    ),
    Term(
        "knock",
        "parameter perturbation",
        "text",
        ("knock(?:s|ed|ing)?",),
        ("KNOCK = 3", "# a knock to the parameters", "knocked = 1"),
        ("# knockout",),
    ),
    Term(
        "carrier, carried",
        "adapter; rule_state",
        "text",
        (
            "carriers?",
            "carried",
        ),
        ("state.carried", "carriers = {}", "# in both carriers"),
        (
            "def step(carry, x): pass",
            "# carried out",
            "# carried from one step to the next",
            "# carries a batch axis",
        ),
        allowed=("carried (?:out|over|through|along|from|into|to)",),
    ),
    Term(
        "own rates",
        "optimizer with its own learning rate",
        "text",
        ("own rates",),
        ("OWN_RATES = {}", "# rules with own rates"),
        ("# an optimizer with its own learning rate", "# schedules that choose their own rate"),
    ),
    Term(
        "surely",
        "significantly",
        "text",
        ("surely",),
        ("# surely lower", "surely = 1"),
        ("# significantly lower", "# leisurely"),
    ),
    Term(
        "told apart",
        "distinguished by",
        "text",
        (r"(?:tell|tells|told|telling) (?:\w+ )?apart",),
        ("# are told apart by name", "# tells them apart"),
        ("# apart from this",),
    ),
    Term(
        "least, greatest",
        "minimum, maximum; smallest, largest",
        "text",
        (
            "least",
            "greatest",
        ),
        ("_LEAST = 1e-6", "# the least of them", "greatest = max(x)", "# the greatest rate"),
        ("# at least one", "at_least(3)", "# least-squares fit", "LeastSquares()", "# by at\n# least 3"),
        allowed=(
            "(?:at|not) least",
            "least(?: |)squares?",
            "least recently",
            "greatest common",
            "greatest or least",
        ),
    ),
    Term(
        "sides, turns (of a benchmark)",
        "variants, repetitions",
        "text",
        (
            r"sides",
            r"(?:each|one|all) sides?(?! (?:of the|length))",
            r"(?:in|alternating|\d+|one|of a) turns?(?! (?:out|on|off|into))",
            r"turns of",
        ),
        ("sides = {}", "# all\n# sides in one run", "# medians of 20 turns", "# one turn of each"),
        (
            "# on the left side",
            "# turns into",
            "# both sides of the equation",
            "# trained side by side",
            "# they take turns",
        ),
        allowed=("both sides", "in turn"),
    ),
    Term(
        "leaves (files)",
        "writes",
        "prose",
        (
            r"leaves (?:(?:its|their|an?|the|one) )?(?:interactive )?"
            r"(?:rows?|tables?|figures?|files?|reports?|results?|checkpoints?)",
            r"what (?:it|\w+ \w+) leaves",
        ),
        ("# and leaves rows, tables and a report", "# what a run leaves", "# leaves ``runs.parquet``"),
        (
            "# the leaves of the tree",
            "jax.tree.leaves(x)",
            "# leaves out the rest",
            "# leaves them unchanged",
            "# a build leaves files behind",
        ),
        allowed=(r"leaves (?:\w+ )+behind",),
        exact=r"\bleaves\s+``",
    ),
    Term(
        "measure, peer, opponent",
        "baseline",
        "text",
        (
            "opponents?",
            r"peers? (?:from|of|among)",
            r"(?:optax's|its|their|strong|the) peers?",
            r"no measure",
            r"measure of (?:comparison|what)",
        ),
        ("# an easy opponent", "# peers from Optax", "MEASURE = 'cosine'", "# is no measure of what follows"),
        ("# peer-to-peer", "# peer review", "# measures the time", "def measure(): pass", "bench('peers')"),
        exact=r"(?<![A-Za-z_])MEASURE(?![A-Za-z])",
    ),
    Term(
        "poison",
        "propagate",
        "text",
        ("poison(?:s|ed|ing|ous)?",),
        ("# NaN poisons the mean", "poisoned = 1"),
        ("# the Poisson distribution",),
    ),
    Term(
        "laboratory",
        "experiments, benchmarks",
        "text",
        ("laborator(?:y|ies)",),
        ("# the laboratory",),
        ("# collaboratory", "# labels"),
    ),
    Term(
        "decade (of rates)",
        "order of magnitude, factor of ten",
        "text",
        ("decades?",),
        ("DECADES = 10", "# one decade too low"),
        ("# decayed",),
    ),
    Term(
        "begins",
        "starts",
        "text",
        (
            r"(?<!\\)begins?",
            "began",
            "begun",
        ),
        ("begins = stage == 0", "search.begin()", "# the run begins anew"),
        ("# from the beginning", r"# \begin{equation}", "def on_epoch_begin(self, epoch): pass"),
        allowed=("on (?:train batch|train|epoch) begin",),  # methods of Keras's callbacks
    ),
    Term(
        "goes on",
        "continues",
        "text",
        (r"(?:go|goes|went|gone|going) on(?! (?:the|a|an|top|each|every|any|device)\b)",),
        (
            "# and goes on where it stopped",
            "going_on = 1",
            'print("going on from step 3")',
            "# to go on with",
        ),
        ("# goes on the x axis", "# goes on top", "# what is going on"),
        allowed=("what(?:'s| is| was) going on",),
    ),
    Term(
        "comes out",
        "is",
        "text",
        (r"(?:come|comes|came|coming) out",),
        ("# comes out four points higher", "# what comes\n# out"),
        ("# comes from",),
    ),
    Term(
        "the one ... the other",
        "name both things",
        "prose",
        (r"the one(?![\w-])[^.;:()]{1,200}?\bthe other(?![\w-])",),
        ("# the one has to read it, and the\n# other writes it",),
        ("# the same as the one before", "# one or the other", "# on the other hand"),
    ),
]

# What is about somebody's machine or way of working and not about the project.
PRIVATE = re.compile(
    r"""(?<![\w.:/~-])/(?:work|home|root|Users|mnt|opt|tmp)/[A-Za-z0-9]  # absolute paths
    |(?i:\bwork-?trees?\b)
    |(?i:\bissues?\s+(?:show\b|\d{1,2}\b))
    |(?i:\b(?:the\s+)?(?:house|mend|auto)\s+issue\b)
    |(?i:\bsub-?agents?\b)""",
    re.VERBOSE,
)

# Strings and comments of Python.
_PYTHON = re.compile(
    r"""(?P<string>(?i:\b[rbuf]{1,2})?(?:
        \"\"\"(?:[^\\]|\\.)*?\"\"\" | '''(?:[^\\]|\\.)*?''' | "(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*'))
    |(?P<comment>\#[^\n]*)""",
    re.VERBOSE | re.DOTALL,
)
_OLD_NAMES = re.compile(r"\brenamed_arguments\([^)]*\)|^.*# old name.*$", re.MULTILINE)
_ONE_WORD = re.compile(r"""(?:\b[rbuf]{1,2})?(["'])\w+\1""")
_BACKTICKS = re.compile(r"^```.*?^```|``[^`\n]+``|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_LINE = re.compile(r"[^\n]+")
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_GAP = r"[\s_#>*-]+"


def views(text: str, *, is_python: bool) -> dict[str, str]:
    """The three views of a text in which terms are looked for, see the module's docstring.

    What is not in a view is blank there, so that positions are the same in all of them.
    """
    text = _OLD_NAMES.sub(lambda match: _blank(match[0]), text)
    quoted = _spans(_BACKTICKS, text)
    if not is_python:
        return {"text": text, "prose": text, "names": _only(text, quoted)}
    prose = _spans(_PYTHON, text)
    words = [span for span in prose if _ONE_WORD.fullmatch(text, *span)]
    in_prose = [span for span in quoted if any(start <= span[0] < end for start, end in prose)]
    code = _inverse(prose, len(text))
    return {
        "text": text,
        "prose": _only(text, prose),
        "names": _only(text, sorted([*code, *words, *in_prose])),
    }


def _spans(pattern: re.Pattern[str], text: str) -> list[tuple[int, int]]:
    return [match.span() for match in pattern.finditer(text)]


def _inverse(spans: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    borders = [0, *(border for span in spans for border in span), length]
    return list(zip(borders[::2], borders[1::2], strict=True))


def _only(text: str, spans: list[tuple[int, int]]) -> str:
    pieces, end = [], 0
    for span in spans:
        if span[0] < end:  # within the one before
            continue
        pieces += [_blank(text[end : span[0]]), text[slice(*span)]]
        end = span[1]
    return "".join([*pieces, _blank(text[end:])])


def _blank(text: str) -> str:
    return _LINE.sub(lambda match: " " * len(match[0]), text)


def find(term: Term, view: str) -> list[int]:
    """Positions of a term in one view of a text."""
    places = [start for start, _ in _whole_words(term.words, view)]
    if term.exact:
        places += [match.start() for match in re.finditer(term.exact, view)]
    if places and term.allowed:
        allowed = _whole_words(term.allowed, view)
        places = [place for place in places if not any(start <= place < end for start, end in allowed)]
    return sorted(set(places))


def _whole_words(patterns: tuple[str, ...], text: str) -> list[tuple[int, int]]:
    """Where the patterns match whole words. Borders are checked here, which is faster than in the pattern."""
    return [match.span() for match in _compile(patterns).finditer(_lower(text)) if _is_whole(match, text)]


def _is_whole(match: re.Match[str], text: str) -> bool:
    start, end = match.span()
    before, first, after = text[start - 1 : start], text[start], text[end : end + 1]
    starts = not before.isalpha() or (before.islower() and first.isupper())
    return starts and not after.islower()


@lru_cache(maxsize=16)
def _lower(text: str) -> str:
    return text.translate(_LOWER)  # str.lower may change the length


@cache
def _compile(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(patterns).replace(" ", _GAP))


def python_of(notebook: str) -> list[tuple[str, str, bool]]:
    """Number, text and kind (whether it is Python) of each cell."""
    cells = json.loads(notebook)["cells"]
    return [
        (f" cell {number}", "".join(cell["source"]), cell["cell_type"] == "code")
        for number, cell in enumerate(cells, start=1)
    ]


def parts(path: Path) -> list[tuple[str, str, bool]]:
    """A file's name, text and kind; those of its cells if it is a notebook."""
    name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return [(f"{name}{cell}", source, is_python) for cell, source, is_python in python_of(text)]
    return [(name, text, path.suffix == ".py")]


def findings(name: str, text: str, is_python: bool) -> list[str]:
    """Every home-made term in a text, with its line and what to write instead."""
    seen = views(text, is_python=is_python)
    places = sorted((place, term) for term in TERMS for place in find(term, seen[term.view]))
    return [
        f"{name}:{text.count(chr(10), 0, place) + 1}: {term.name} -> {term.instead}: "
        f"{text[text.rfind(chr(10), 0, place) + 1 :].splitlines()[0].strip()}"
        for place, term in places
    ]


def repository_files() -> list[Path]:
    """Text files that git tracks, or would track; none where there is no git repository."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    names = sorted(set(listed.split("\0")) - {"", HERE})
    paths = [ROOT / name for name in names if Path(name).suffix in SUFFIXES or name.startswith(".ci/")]
    return [path for path in paths if path.is_file()]


def _parameters() -> list[Any]:
    """A parameter per file."""
    without_git = pytest.param(None, marks=pytest.mark.skip(reason="not a git repository"))
    files = [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in repository_files()]
    return files or [without_git]


@pytest.mark.parametrize("path", _parameters())
def test_file_uses_standard_terms(path):
    found = [finding for part in parts(path) for finding in findings(*part)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("path", _parameters())
def test_file_is_about_the_project(path):
    """No file names a path of a developer's machine, or a tool or ticket that readers do not have."""
    for name, text, _ in parts(path):
        match = PRIVATE.search(text)
        assert match is None, f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}"


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_term(term):
    """Each pattern matches its bad uses, in the right line, and none of its good ones."""
    for bad in term.bad:
        found = findings("example.py", f"\n{bad}\n", True)
        line = f"example.py:2: {term.name} -> {term.instead}: {bad.splitlines()[0]}"
        assert line in found, bad
    for good in term.good:
        assert find(term, views(f"\n{good}\n", is_python=True)[term.view]) == [], good


@pytest.mark.parametrize(
    ("text", "is_private"),
    [
        ("PYTHONPATH=/" + "work/x pytest", True),
        ("open('/home/someone/x')", True),
        ("see issue 29", True),
        ("in a worktree", True),
        ("/usr/bin/env bash", False),
        ("https://example.com/home/page", False),
        ("results/" + "work/x and runs/tmp/1", False),
        ("the file issues no warning", False),
        ("see google/jax issue #12345", False),
    ],
)
def test_private(text, is_private):
    assert bool(PRIVATE.search(text)) is is_private


def test_views_of_python():
    """Strings and comments are prose, the rest are names, and positions are the same in all views."""
    text = 'x = f(\n    "two words", "one"  # see `kept`\n)\n'
    seen = views(text, is_python=True)
    assert {len(view) for view in seen.values()} == {len(text)}
    assert seen["prose"].split() == ['"two', 'words"', '"one"', "#", "see", "`kept`"]
    assert seen["names"].split() == ["x", "=", "f(", ",", '"one"', "`kept`", ")"]


def test_old_names_are_exempt():
    text = """
@renamed_arguments(
    leap_factor="accelerated_factor",
)
def test_it(leap_factor):
    trend_lr(leap_factor=2.0)  # old name
"""
    (found,) = findings("example.py", text, True)
    assert found.startswith("example.py:5: leap -> ")


def test_notebook_cells_are_read():
    cell = {"cell_type": "markdown", "source": ["Sampled\n", "over two decades"]}
    notebook = json.dumps({"cells": [{"cell_type": "code", "source": ["lost = 1"]}, cell]})
    found = [finding for part in python_of(notebook) for finding in findings(*part)]
    assert [finding.split(": ")[:2] for finding in found] == [
        [" cell 1:1", "lost (as a name) -> diverged"],
        [" cell 2:2", "decade (of rates) -> order of magnitude, factor of ten"],
    ]
