"""The breaks of ``benchmarks.mutants``: each is what its kind says, draws repeat, and tests that notice are told from
tests that do not."""

import json
from pathlib import Path

import pytest
from benchmarks import mutants
from benchmarks.mutation import targets
from benchmarks.mutation.breaks import KINDS, Break, breaks_of, code_lines, drawn

TOY = '''"""A toy."""

from __future__ import annotations

import logging
from typing import Literal, cast

__all__ = ["f", "g"]
Kind = Literal["a", "b"]
logger = logging.getLogger(__name__)


def f(x: int = 3, y: "int | None" = None) -> int:
    """What f does: 1 + 1."""
    if x < 0 or not y:  # a comment: 5
        raise ValueError(f"x is {x}, and must be {0}")
    logger.warning("x is %s", x + 1)
    assert x != 7, "seven"
    z = cast(
        "int",
        max(
            x,
            -4,
        ),
    )
    return g(z, by=2 * x) if x in (1, 2) else z


def g(a: int, by: int = 1) -> int:
    return a + by
'''


def changes(source: str) -> set[tuple[str, str, str]]:
    return {(one.kind, one.before, one.after) for one in breaks_of("toy.py", source)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x == y", {("comparison negated", "x == y", "x != y")}),
        ("x is None", {("comparison negated", "x is None", "x is not None")}),
        ("x in y", {("comparison negated", "x in y", "x not in y")}),
        ("x <= y", {("comparison negated", "x <= y", "x > y"), ("comparison shifted", "x <= y", "x < y")}),
        (
            "a < b < c",
            {
                ("comparison negated", "a < b < c", "a >= b < c"),
                ("comparison negated", "a < b < c", "a < b >= c"),
                ("comparison shifted", "a < b < c", "a <= b < c"),
                ("comparison shifted", "a < b < c", "a < b <= c"),
            },
        ),
        ("x[a:b]", {("comparison shifted", "a", "a + 1"), ("comparison shifted", "b", "b + 1")}),
        ("p if q else r", {("condition negated", "q", "not q")}),
        ("[p for p in q if r]", {("condition negated", "r", "not r")}),
        (
            "p and q",
            {
                ("operator changed", "p and q", "p or q"),
                ("term dropped", "p and q", "p"),
                ("term dropped", "p and q", "q"),
            },
        ),
        ("p - q", {("operator changed", "p - q", "p + q"), ("term dropped", "p - q", "p")}),
        (
            "p * q",
            {("operator changed", "p * q", "p / q"), ("term dropped", "p * q", "p"), ("term dropped", "p * q", "q")},
        ),
        ("-p", {("operator changed", "-p", "p")}),
        ("p += q", {("operator changed", "p += q", "p -= q"), ("term dropped", "p += q", "pass")}),
        ("p.q = r", {("term dropped", "p.q = r", "pass")}),
        ("p = f(q)", {("call dropped", "f(q)", "q")}),
        ("p = q.f()", {("call dropped", "q.f()", "q")}),
        ("raise E(1)", {("call dropped", "raise E(1)", "pass")}),
        ("f()", {("call dropped", "f()", "pass")}),
        ("p = f(q, r)", {("argument ignored", "f(q, r)", "f(q)")}),
        (
            "p = f(q=r, s=t)",
            {("argument ignored", "f(q=r, s=t)", "f(s=t)"), ("argument ignored", "f(q=r, s=t)", "f(q=r)")},
        ),
        ("x = 1", {("constant changed", "1", "2")}),
        ("x = 0.25", {("constant changed", "0.25", "0.5")}),
        ("x = True", {("constant changed", "True", "False")}),
        ("x = 'a'", {("constant changed", "'a'", "'a_'")}),
    ],
)  # fmt: skip
def test_what_is_broken(source: str, expected: set[tuple[str, str, str]]) -> None:
    assert changes(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""Text."""',
        "import a as b",
        "x: int | None = None",
        "Alias = int | None",
        "Alias = Literal['a', 'b']",
        "__all__ = ['a']",
        "assert x == 1, 'y'",
        "x = f'{a + 1} b'",
        "x = cast('A', b)",
        "if TYPE_CHECKING:\n    x = 1",
        "@f(1)\nclass A(g(2)):\n    x: int",
        "def f(x: g(1) = None) -> h(2):\n    pass",
        "print('a', 1)",
        "logger.warning('a', 1 + 2)",
        "import torch\nx = torch.stack(*y, device=z)",
        "x = y.to(device)",
        "import builtins\nx = builtins.zip(*y, strict=True)",
    ],
)
def test_what_is_left_alone(source: str) -> None:
    assert changes(source) == set()


def test_a_break_changes_its_place_and_nothing_else() -> None:
    every = breaks_of("toy.py", TOY)
    assert {one.kind for one in every} == set(KINDS)
    for one in every:
        broken, lines = one.applied(TOY).splitlines(), TOY.splitlines()
        assert len(broken) == len(lines)
        last = one.line - 1 + one.text.count("\n")
        assert broken[: one.line - 1] == lines[: one.line - 1]
        assert broken[last + 1 :] == lines[last + 1 :]
        assert broken != lines
        compile(one.applied(TOY), "toy.py", "exec")
    (several,) = [one for one in every if one.before == "max(x, -4)" and one.kind == "argument ignored"]
    expected = ["    z = cast(", '        "int",', "        (max(x)", "", "", "),", "    )"]
    assert several.applied(TOY).splitlines()[18:25] == expected


def test_brackets_keep_the_precedence() -> None:
    (one,) = [
        one for one in breaks_of("m", "x = a * (b - c) * d") if one.before == "a * (b - c) * d" and one.after == "d"
    ]
    assert one.applied("x = a * (b - c) * d") == "x = (d)"
    (one,) = [one for one in breaks_of("m", "x = 'é' + a / (b + c)") if one.after == "b"]
    assert one.applied("x = 'é' + a / (b + c)") == "x = 'é' + a / ((b))"


def test_lines_of_code() -> None:
    assert code_lines(TOY)[:6] == [3, 5, 6, 8, 9, 10]
    assert 14 not in code_lines(TOY)
    assert len(code_lines("x = 1\n\n# y\nz = 2\n")) == 2


def test_draws_repeat_and_grow() -> None:
    sources = {"toy.py": TOY, "other.py": "y = x + 1\n"}
    many = drawn(sources, 3, 25)
    assert drawn(sources, 3, 10) == many[:10]
    assert drawn(sources, 4, 10) != many[:10]
    programs = {(one.module, one.program(sources[one.module])) for one in many}
    assert len(programs) == 25
    with pytest.raises(ValueError, match="1000 breaks are asked for, and these modules have"):
        drawn(sources, 0, 1000)


def test_draws_are_in_proportion_to_lines() -> None:
    sources = {"long.py": "x = f(y, 1)\n" * 30, "short.py": "x = f(y, 1)\n" * 10}
    firsts = [drawn(sources, seed, 1)[0].module for seed in range(100)]
    assert 0.63 < firsts.count("long.py") / 100 < 0.87


def test_every_module_and_test_of_the_targets_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found = targets.modules(mutants.ROOT)
    assert {"algorithm/loss.py", "updates.py", "evaluation/held_out.py"} <= set(found)
    assert "algorithm/__init__.py" not in found
    for pattern in set(found.values()):
        assert targets.quick_tests(mutants.ROOT, pattern)
    files = targets.quick_tests(mutants.ROOT, "rewards/*.py", "rewards/ocr.py")
    assert files[0] == "tests/rewards/test_ocr.py"
    assert sorted(files) == sorted(targets.quick_tests(mutants.ROOT, "rewards/*.py"))
    monkeypatch.setitem(targets.TARGETS, "algorithm/loss.py", ("tests/test_nowhere*.py",))
    with pytest.raises(FileNotFoundError, match=r"test_nowhere\*\.py matches no file"):
        targets.quick_tests(mutants.ROOT, "algorithm/loss.py")


LIBRARY = """def double(x):
    return x + x


def countdown(x):
    while x > 0:
        x -= 1
    return x


def untested(x):
    return x * 2
"""
TESTS = """from varl.toy import countdown, double


def test_double():
    assert double(2) == 4


def test_countdown():
    assert countdown(3) == 0
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one module and two tests."""
    for name, text in {
        "pyproject.toml": "[tool.pytest.ini_options]\nmarkers = ['slow']\n",
        "src/varl/__init__.py": "",
        "src/varl/toy.py": LIBRARY,
        "tests/test_toy.py": TESTS,
    }.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(targets, "TARGETS", {"toy.py": ("tests/test_toy.py",)})
    return tmp_path / "toy"


def of(before: str, after: str) -> Break:
    (one,) = [one for one in breaks_of("toy.py", LIBRARY) if (one.before, one.after) == (before, after)]
    return one


@pytest.mark.slow
def test_what_tests_notice_is_told_from_what_they_do_not(toy: Path, tmp_path: Path) -> None:
    killed, hangs, survives = of("x + x", "x - x"), of("x -= 1", "pass"), of("x * 2", "x / 2")
    records = mutants.Records(tmp_path / "seed.jsonl", {"toy.py": LIBRARY})
    mutants.try_all([killed, hangs, survives], records, workers=1, limit=2, root=toy)
    assert [(records[one]["verdict"], records[one]["test"]) for one in (killed, hangs, survives)] == [
        ("killed", "tests/test_toy.py::test_double"),
        ("timed out", "tests/test_toy.py::test_countdown"),
        ("survived", None),
    ]
    assert (toy / "src/varl/toy.py").read_text() == LIBRARY

    again = mutants.Records(tmp_path / "seed.jsonl", {"toy.py": LIBRARY})
    assert again.of == records.of
    assert [again.lacks(one, False) for one in (killed, survives, of("x * 2", "x"))] == [False, False, True]
    assert [again.lacks(one, True) for one in (killed, hangs, survives)] == [False, False, True]
    with pytest.raises(ValueError, match=r"is of other texts of other\.py, toy\.py; give another seed"):
        mutants.Records(tmp_path / "seed.jsonl", {"toy.py": LIBRARY + "\n", "other.py": ""})

    found = list(again.of.values())
    text, without_reason = mutants.report(found, {})
    assert without_reason == 1
    assert (
        f"src/varl/toy.py:12: operator changed: x * 2 -> x / 2\n    NO REASON, key: {json.dumps(survives.key)}" in text
    )
    assert [line.split()[-4:] for line in text.splitlines() if line.startswith("all ")] == [["3", "1", "1", "1"]] * 2
    text, without_reason = mutants.report(found, {survives.key: "nobody calls it"})
    assert without_reason == 0
    assert "3 breaks, 1 survived, 0 of these without a reason" in text


@pytest.mark.slow
def test_tests_that_fail_unbroken_are_refused(toy: Path, tmp_path: Path) -> None:
    (toy / "tests/test_toy.py").write_text(TESTS.replace("== 0", "== 1"))
    records = mutants.Records(tmp_path / "seed.jsonl", {"toy.py": LIBRARY})
    with pytest.raises(
        RuntimeError, match=r"unbroken toy\.py: killed in .* at tests/test_toy.py::test_countdown; they"
    ):
        mutants.try_all([of("x + x", "x - x")], records, workers=1, limit=5, root=toy)
    assert not records.of
