"""The one-line breaks of a module's text: where they are, what they change, and a seeded draw of them.

A break replaces one expression or statement of the syntax tree, and nothing else of the text: comments and line numbers
stay. Not broken is what no test can observe, or what is not behaviour:

* texts for people: docstrings, f-strings, what an exception says, and calls that log, warn, print or lay out a table;
* what is for the reader and the type checker: annotations, aliases of types, ``__all__``, ``assert``, ``cast``,
  imports, decorators and base classes;
* ``device=``, which means nothing where there is one device, and ``strict=``, which is an ``assert``.
"""

from __future__ import annotations

import ast
import copy
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["KINDS", "Break", "breaks_of", "code_lines", "drawn"]

KINDS = (
    "comparison negated",
    "comparison shifted",
    "condition negated",
    "operator changed",
    "term dropped",
    "call dropped",
    "constant changed",
    "argument ignored",
)

NEGATED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
SHIFTED: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
CHANGED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
UNSEEN = ("device", "strict")
TELLING = {"print", "warn", "debug", "info", "warning", "error", "exception", "Table", "Text"}


@dataclass(frozen=True)
class Break:
    """One change of one place.

    Attributes:
        module: path of the module, as it is named in the draw.
        line: first line of the place, from 1.
        kind: one of ``KINDS``.
        start, stop: the place, in bytes of the module's UTF-8 text.
        before, after: what stands there, and what stands there instead, each on one line.
        text: what is written in the place: ``after``, with as many lines as were there.
        code: the line as it becomes, without the space around it.
    """

    module: str
    line: int
    kind: str
    start: int
    stop: int
    before: str
    after: str
    text: str
    code: str

    @property
    def key(self) -> str:
        """Names the break without its line number, so that a reason outlives changes elsewhere in the module."""
        return f"{self.module}: {self.before} -> {self.after} | {self.code}"

    def applied(self, source: str) -> str:
        """The module's text with the break in it."""
        whole = source.encode()
        return (whole[: self.start] + self.text.encode() + whole[self.stop :]).decode()

    def program(self, source: str) -> str:
        """What tells the broken module from others as a program; empty if it does not compile."""
        try:
            return ast.dump(ast.parse(self.applied(source)))
        except SyntaxError:
            return ""


def drawn(sources: Mapping[str, str], seed: int, count: int) -> list[Break]:
    """Draw distinct breaks: a line of code among those of all modules, then a kind, then one of that kind there.

    Fewer are the beginning of more: 30 breaks of a seed are the first 30 of its 100.

    Args:
        sources: text of every module, by its name.
        seed: of the draw.
        count: how many.

    Raises:
        ValueError: if there are not so many.
    """
    rng = random.Random(seed)
    at: dict[tuple[str, int], list[Break]] = defaultdict(list)
    for module, source in sorted(sources.items()):
        for one in breaks_of(module, source):
            at[module, one.line].append(one)
    lines = [(module, line) for module, source in sorted(sources.items()) for line in code_lines(source)]
    lines = [place for place in lines if place in at]
    programs = {(module, ast.dump(ast.parse(source))) for module, source in sources.items()}
    found: list[Break] = []
    while len(found) < count:
        if not lines:
            raise ValueError(f"{count} breaks are asked for, and these modules have {len(found)}")
        place = rng.choice(lines)
        kind = rng.choice(sorted({one.kind for one in at[place]}))
        one = rng.choice([one for one in at[place] if one.kind == kind])
        at[place].remove(one)
        if not at[place]:
            lines.remove(place)
        program = one.module, one.program(sources[one.module])
        if program[1] and program not in programs:
            programs.add(program)
            found.append(one)
    return found


def code_lines(source: str) -> list[int]:
    """The lines that are neither empty, nor comment, nor part of a docstring, from 1."""
    told = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and _is_text(node.value)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(source.splitlines(), 1)
    return [i for i, line in lines if i not in told and line.strip() and not line.strip().startswith("#")]


def breaks_of(module: str, source: str) -> list[Break]:
    """Every break of a module's text; a few do not compile, or are the same program as another."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    lines, found = source.splitlines(), []
    for kind, node, new in _Places().of(source):
        first, last = node.lineno, node.end_lineno or node.lineno
        start, stop = starts[first - 1] + node.col_offset, starts[last - 1] + (node.end_col_offset or 0)
        before, after = ast.unparse(node), ast.unparse(new)
        # Brackets keep the precedence, and hold as many lines as there were.
        text = f"({after}{chr(10) * (last - first)})" if isinstance(new, ast.expr) else after + "\n" * (last - first)
        head = lines[first - 1].encode()[: node.col_offset].decode()
        tail = lines[last - 1].encode()[node.end_col_offset :].decode() if first == last else ""
        code = f"{head}{text}{tail}".replace("\n", "").strip()
        found.append(Break(module, first, kind, start, stop, before, after, text, code))
    return found


Node = ast.expr | ast.stmt
Place = tuple[str, Node, ast.AST]


class _Places(ast.NodeVisitor):
    """Collects (kind, node, what stands there instead); a ``visit_`` that does not go on leaves out what is inside."""

    def of(self, source: str) -> list[Place]:
        tree = ast.parse(source)
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        self.imported = {(name.asname or name.name).split(".")[0] for node in imports for name in node.names}
        self.found: list[Place] = []
        self.visit(tree)
        return self.found

    def add(self, kind: str, node: Node, new: ast.AST) -> None:
        self.found.append((kind, node, new))

    def changed(self, kind: str, node: Node, change: Callable[[Any], object]) -> None:
        """A break that is a copy of the node, changed in place."""
        new = copy.deepcopy(node)
        change(new)
        self.add(kind, node, new)

    # What is for readers and the type checker.

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for child in [*node.args.defaults, *node.args.kw_defaults, *node.body]:
            if child is not None:
                self.visit(child)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for child in node.body:
            self.visit(child)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._statement(node)
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        if not _is_for_readers(node):
            self._statement(node)
            self.visit(node.value)
            for target in node.targets:
                self.visit(target)

    def visit_Call(self, node: ast.Call) -> None:
        if _is_telling(node):
            return
        if _name(node.func) == "cast":
            self.visit(node.args[1])
            return
        self._call(node)
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg not in UNSEEN:
            self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self.add("call dropped", node, ast.Pass())

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and not _is_telling(node.value):
            self.add("call dropped", node, ast.Pass())
        if not _is_text(node.value):
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_Assert(self, node: ast.Assert) -> None:
        pass

    def visit_Import(self, node: ast.Import) -> None:
        pass

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        pass

    # What is broken.

    def visit_If(self, node: ast.If) -> None:
        if _name(node.test) == "TYPE_CHECKING":
            return
        self._test(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._test(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            if not isinstance(test, ast.Compare):
                self.add("condition negated", test, ast.UnaryOp(ast.Not(), test))
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for index, op in enumerate(node.ops):
            for kind, table in (("comparison negated", NEGATED), ("comparison shifted", SHIFTED)):
                if new := table.get(type(op)):
                    self.changed(kind, node, _setting_op(index, new))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        self.add("operator changed", node, ast.BoolOp(other, node.values))
        for index in range(len(node.values)):
            rest = node.values[:index] + node.values[index + 1 :]
            self.add("term dropped", node, rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.Mod) and _is_text(node.left):
            return  # a text
        if new := CHANGED.get(type(node.op)):
            self.add("operator changed", node, ast.BinOp(node.left, new(), node.right))
        self.add("term dropped", node, node.left)
        if isinstance(node.op, ast.Add | ast.Mult | ast.BitAnd | ast.BitOr):
            self.add("term dropped", node, node.right)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if not isinstance(node.op, ast.Not):
            self.add("operator changed", node, node.operand)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add("term dropped", node, ast.Pass())
        if new := CHANGED.get(type(node.op)):
            self.add("operator changed", node, ast.AugAssign(node.target, new(), node.value))
        self.generic_visit(node)

    def visit_Continue(self, node: ast.Continue | ast.Break) -> None:
        self.add("call dropped", node, ast.Pass())

    visit_Break = visit_Continue

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound is not None and not isinstance(bound, ast.Constant):
                self.add("comparison shifted", bound, ast.BinOp(bound, ast.Add(), ast.Constant(1)))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if (new := _other_constant(node.value)) is not None:
            self.add("constant changed", node, ast.Constant(new))

    def _test(self, node: ast.If | ast.IfExp) -> None:
        if not isinstance(node.test, ast.Compare):
            self.add("condition negated", node.test, ast.UnaryOp(ast.Not(), node.test))
        self.generic_visit(node)

    def _statement(self, node: ast.Assign | ast.AnnAssign) -> None:
        """An assignment to a part of something may be left out; one to a name, only together with its uses."""
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if node.value is not None and any(isinstance(target, ast.Subscript | ast.Attribute) for target in targets):
            self.add("term dropped", node, ast.Pass())

    def _call(self, node: ast.Call) -> None:
        for index, keyword in enumerate(node.keywords):
            if keyword.arg not in (None, *UNSEEN):
                self.changed("argument ignored", node, _without("keywords", index))
        if len(node.args) > 1 and not isinstance(node.args[-1], ast.Starred) and _name(node.func) != "isinstance":
            self.changed("argument ignored", node, _without("args", -1))
        if _name(node.func) == "range" and len(node.args) < 3:
            stop = node.args[-1]
            self.add("comparison shifted", stop, ast.BinOp(stop, ast.Add(), ast.Constant(1)))
        if _moves(node):
            return
        if len(node.args) == 1 and not node.keywords and not isinstance(node.args[0], ast.Starred):
            self.add("call dropped", node, node.args[0])
        if isinstance(node.func, ast.Attribute) and not self._is_imported(node.func.value):
            self.add("call dropped", node, node.func.value)

    def _is_imported(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id in self.imported


def _setting_op(index: int, new: type[ast.cmpop]) -> Callable[[Any], object]:
    return lambda node: node.ops.__setitem__(index, new())


def _without(field: str, index: int) -> Callable[[Any], object]:
    return lambda node: getattr(node, field).pop(index)


def _other_constant(value: object) -> bool | int | float | str | None:
    """Another value of the type; None for what has none, as the ellipsis."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return 2 * value if value else 1.0
    return f"{value}_" if isinstance(value, str) else None


def _name(node: ast.AST) -> str:
    """The last name of a dotted one."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_telling(node: ast.Call) -> bool:
    return _name(node.func) in TELLING


def _is_for_readers(node: ast.Assign) -> bool:
    """``__all__`` and aliases of types, such as ``A = Literal["b"]``, ``B = A | None`` and ``C = list[A]``."""
    name, value = _name(node.targets[0]), node.value
    union = isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr)
    return name == "__all__" or (
        name[:1].isupper() and not name.isupper() and (union or isinstance(value, ast.Subscript))
    )


def _moves(node: ast.Call) -> bool:
    """``x.to(device)`` and ``x.cpu()``, which do nothing where there is one device."""
    given = [_name(value) for value in node.args] + [keyword.arg for keyword in node.keywords]
    return _name(node.func) == "cpu" or (_name(node.func) == "to" and set(given) == {"device"})
