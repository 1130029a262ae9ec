"""Lark's tree to the syntax tree of `ast`."""

from __future__ import annotations

from typing import Any, TypeAlias

from lark import Token
from lark.visitors import Transformer_NonRecursive

from . import ast
from .diagnostics import Diagnostic, error
from .source import Source, Span

Children: TypeAlias = list[Any]

MAX_DEPTH = 100
"""Expressions inside expressions; more could exhaust Python's stack in the phases that follow."""
_TRANSPARENT = frozenset(("arguments", "items", "parenthesized"))
_STATEMENTS = frozenset(
    ("line_statement", "for_statement", "scan_statement", "if_statement", "block",
     "error_statement", "module")
)  # fmt: skip


class _Index:
    """`name in range` inside a subscript, until its place is known."""

    def __init__(self, span: Span, name: ast.Expr, range: ast.Expr) -> None:
        self.span, self.name, self.range = span, name, range


class TreeBuilder:
    """Builds the items of a tree; adds to `problems` what the grammar could not refuse."""

    def __init__(self, source: Source, problems: list[Diagnostic]) -> None:
        self.source, self.problems = source, problems

    def build(self, tree: Any) -> list[Any]:
        """The items: syntax nodes, and plain strings for documentation."""
        return [i for i in _Builder(self).transform(tree) if i is not None]


class _Builder(Transformer_NonRecursive):  # type: ignore[type-arg]
    def __init__(self, owner: TreeBuilder) -> None:
        super().__init__(visit_tokens=False)
        self.owner = owner
        self.depths: dict[int, int] = {}
        self.kept: list[Any] = []

    def _call_userfunc(self, tree: Any, new_children: Any = None) -> Any:
        children = tree.children if new_children is None else new_children
        if tree.meta.empty:
            span = Span(self.owner.source, 0, 0)
        else:
            span = Span(self.owner.source, tree.meta.start_pos, tree.meta.end_pos)
        found = getattr(self, "on_" + tree.data)(span, children)
        if found is not None:
            self._measure(span, tree.data, children, found)
        return found

    def _measure(self, span: Span, rule: str, children: Children, found: Any) -> None:
        """Report an expression that is nested too deeply, where it first is. The operands of a
        chain, such as a + b - c, are as deep as one another."""
        depths = [self.depths.get(id(child), 0) for child in children]
        if isinstance(found, ast.Binary) and isinstance(found.left, ast.Binary):
            depths[0] -= 1
        depth = max(depths, default=0)
        depth += rule not in _TRANSPARENT
        if rule in _STATEMENTS:
            depth = 0
        if depth == MAX_DEPTH + 1:
            self._problem(
                "E0107", f"this expression is nested more than {MAX_DEPTH} deep", span,
                "give a part of it a name on a line of its own",
            )  # fmt: skip
        self.depths[id(found)] = max(depth, self.depths.get(id(found), 0))
        self.kept.append(found)

    def _span(self, token: Token) -> Span:
        return Span(self.owner.source, token.start_pos or 0, token.end_pos or 0)

    def _problem(self, code: str, message: str, span: Span, help: str | None = None) -> None:
        self.owner.problems.append(error(code, message, span, help=help))

    # Items

    def on_module(self, span: Span, c: Children) -> Any:
        return [x for x in c if not isinstance(x, Token)]

    def on_doc_item(self, span: Span, c: Children) -> Any:
        return str(c[0])

    def on_import_item(self, span: Span, c: Children) -> Any:
        return ast.Import(self._span(c[0]), str(c[0]))

    def on_const_item(self, span: Span, c: Children) -> Any:
        return ast.Const(span, str(c[0]), self._span(c[0]), self._expr(c[1]))

    def on_weights_item(self, span: Span, c: Children) -> Any:
        name, path = c[0], c[1]
        return ast.WeightsDecl(span, str(name), self._span(name), str(path), self._span(path))

    def on_fn_item(self, span: Span, c: Children) -> Any:
        name, generics, params, result, where, (doc, body) = c
        return ast.Fn(
            span, str(name), self._span(name), tuple(generics or ()), tuple(params or ()),
            result, tuple(where or ()), body, doc,
        )  # fmt: skip

    def on_pipeline_item(self, span: Span, c: Children) -> Any:
        name, params, result, where, (doc, body) = c
        return ast.Pipeline(
            span, str(name), self._span(name), tuple(params or ()), result, tuple(where or ()),
            body, doc,
        )  # fmt: skip

    def on_generics(self, span: Span, c: Children) -> Any:
        return [x for x in c if x is not None]

    def on_generic(self, span: Span, c: Children) -> Any:
        return ast.Generic(span, str(c[0]), str(c[1]))

    on_params = on_generics

    def on_param(self, span: Span, c: Children) -> Any:
        default = None if c[2] is None else self._expr(c[2])
        return ast.Param(self._span(c[0]), str(c[0]), c[1], default)

    def on_tuple_type(self, span: Span, c: Children) -> Any:
        return ast.TupleType(span, tuple(x for x in c if x is not None))

    def on_named_type(self, span: Span, c: Children) -> Any:
        return ast.NamedType(span, None if c[0] is None else str(c[0]), c[1])

    def on_type(self, span: Span, c: Children) -> Any:
        if len(c) == 2:
            return ast.TypeExpr(span, str(c[0]), c[1])
        return ast.TypeExpr(span, "weights", c[0])

    def on_shape(self, span: Span, c: Children) -> Any:
        return tuple(x if isinstance(x, ast.Star) else self._expr(x) for x in c if x is not None)

    def on_star(self, span: Span, c: Children) -> Any:
        return ast.Star(span, str(c[-1]))

    def on_where(self, span: Span, c: Children) -> Any:
        return [x for x in c if x is not None]

    def on_clause(self, span: Span, c: Children) -> Any:
        if c[1] is None:
            return ast.WhereFact(span, self._expr(c[0]))
        if not isinstance(c[0], ast.Name) or not isinstance(c[1], ast.RangeExpr):
            self._problem(
                "E0109", "a range of `where` is `NAME in low..high`", span,
                "write for example `T in 1..=512`",
            )  # fmt: skip
            return None
        return ast.WhereRange(span, c[0].name, c[1])

    # Statements

    def on_block(self, span: Span, c: Children) -> Any:
        body = [x for x in c if not isinstance(x, Token) and x is not None]
        doc = ""
        if len(body) > 1 and isinstance(body[0], ast.ExprStmt):
            if isinstance(body[0].value, ast.StrLit):
                doc = body.pop(0).value.value
        return doc, tuple(body)

    def on_error_statement(self, span: Span, c: Children) -> Any:
        return None

    def on_for_statement(self, span: Span, c: Children) -> Any:
        target = self._target(c[0])
        if target is None:
            return None
        return ast.For(span, target, self._expr(c[1]), c[2][1])

    def on_scan_statement(self, span: Span, c: Children) -> Any:
        name, range, starts, (_, body) = c
        return ast.Scan(
            span, str(name), self._span(name), self._expr(range), tuple(starts or ()), body
        )

    on_starts = on_generics

    def on_start(self, span: Span, c: Children) -> Any:
        return ast.Start(span, str(c[0]), self._span(c[0]), self._expr(c[1]))

    def on_if_statement(self, span: Span, c: Children) -> Any:
        *pairs, orelse = c
        branches = tuple(
            ast.Branch(pairs[i].span, self._expr(pairs[i]), pairs[i + 1][1])
            for i in range(0, len(pairs) - 1, 2)
        )
        return ast.If(span, branches, orelse[1] if orelse else ())

    def on_line_statement(self, span: Span, c: Children) -> Any:
        target, value = c[0], c[1]
        end = value or target
        span = Span(span.source, target.span.start, end.span.end)
        if value is None:
            return ast.ExprStmt(span, self._expr(target))
        if isinstance(target, ast.Subscript):
            return self._items_assigned(span, target, self._expr(value))
        found = self._target(target)
        return None if found is None else ast.Assign(span, found, self._expr(value))

    def on_state_statement(self, span: Span, c: Children) -> Any:
        name, declared, initial = c[:3]
        end = initial.span.end
        where = Span(span.source, span.start, end)
        return ast.State(where, str(name), self._span(name), declared, self._expr(initial))

    def _items_assigned(self, span: Span, target: ast.Subscript, value: ast.Expr) -> Any:
        """A definition where the items are indices, else an assignment to items of a value."""
        base = target.base
        if not isinstance(base, ast.Name):
            self._problem("E0113", "only items of a name can be assigned to", target.span)
            return None
        items = target.items
        at = items[0] if items and isinstance(items[0], ast.Binary) else None
        others = items if at is None else items[1:]
        named = all(isinstance(item, ast.Name) for item in others)
        if not named and not any(isinstance(item, _Index) for item in others):
            return ast.ItemAssign(span, base.name, base.span, items, value)
        indices = self._index_vars(others)
        if indices is None:
            return None
        if at is not None:
            return ast.StepDef(span, base.name, base.span, at, indices, value)
        return ast.IndexDef(span, base.name, base.span, indices, value)

    def _index_vars(
        self, items: tuple[Any, ...], reduction: str | None = None
    ) -> tuple[ast.IndexVar, ...] | None:
        """Of a definition, or of a reduction of that name."""
        found: list[ast.IndexVar] = []
        for item in items:
            if isinstance(item, ast.Name):
                found.append(ast.IndexVar(item.span, item.name, None))
            elif isinstance(item, _Index) and isinstance(item.name, ast.Name):
                if not isinstance(item.range, ast.RangeExpr):
                    self._problem(
                        "E0109", "the range of an index is `low..high`", item.range.span,
                        f"write `{item.name.name} in 0..n`",
                    )  # fmt: skip
                    return None
                self._expr(item.range)
                found.append(ast.IndexVar(item.span, item.name.name, item.range))
            else:
                advice = "write `y[i, j in 0..3] = ...`, or positions and slices alone"
                if reduction is not None:
                    advice = (
                        f"write `{reduction}[i, j in 0..3] ...`; no value is called `{reduction}`, "
                        "which is built in"
                    )
                self._problem(
                    "E0113", "an index is a name, with a range if it needs one", item.span, advice
                )
                return None
        return tuple(found)

    def _target(self, expr: Any) -> ast.Target | None:
        if isinstance(expr, ast.Name):
            return expr
        if isinstance(expr, ast.TupleExpr):
            items = [self._target(item) for item in expr.items]
            if any(item is None for item in items):
                return None
            return ast.TargetTuple(expr.span, tuple(i for i in items if i is not None))
        self._problem(
            "E0113", "this cannot be assigned to", expr.span, "the left of `=` is a name or names"
        )
        return None

    # Expressions

    def _expr(self, node: Any) -> ast.Expr:
        if isinstance(node, _Index):
            self._problem(
                "E0109", "`in` belongs to an index or a range here", node.span,
                "indices with ranges stand in `y[i in 0..n] = ...` and `sum[i in 0..n] ...`",
            )  # fmt: skip
            return ast.NoneLit(node.span)
        if isinstance(node, ast.Subscript):
            for item in node.items:
                self._expr(item)
        result: ast.Expr = node
        return result

    def on_parenthesized(self, span: Span, c: Children) -> Any:
        return self._expr(c[0])

    def on_name(self, span: Span, c: Children) -> Any:
        return ast.Name(span, str(c[0]))

    def on_int_literal(self, span: Span, c: Children) -> Any:
        text = str(c[0]).replace("_", "")
        return ast.IntLit(span, int(text, 10) if text.isdigit() else int(text, 0))

    def on_float_literal(self, span: Span, c: Children) -> Any:
        return ast.FloatLit(span, float(str(c[0]).replace("_", "")))

    def on_string_literal(self, span: Span, c: Children) -> Any:
        return ast.StrLit(span, str(c[0]))

    def on_true(self, span: Span, c: Children) -> Any:
        return ast.BoolLit(span, True)

    def on_false(self, span: Span, c: Children) -> Any:
        return ast.BoolLit(span, False)

    def on_none(self, span: Span, c: Children) -> Any:
        return ast.NoneLit(span)

    def on_ellipsis(self, span: Span, c: Children) -> Any:
        return ast.EllipsisLit(span)

    def on_tuple_expr(self, span: Span, c: Children) -> Any:
        return ast.TupleExpr(span, tuple(self._expr(x) for x in c if x is not None))

    def on_list_literal(self, span: Span, c: Children) -> Any:
        return ast.ListLit(span, tuple(self._expr(x) for x in c if x is not None))

    def on_attribute(self, span: Span, c: Children) -> Any:
        return ast.Attribute(span, self._expr(c[0]), str(c[1]), self._span(c[1]))

    def on_items(self, span: Span, c: Children) -> Any:
        return tuple(x for x in c if x is not None)

    def on_index_in(self, span: Span, c: Children) -> Any:
        return _Index(span, c[0], c[1])

    def on_slice(self, span: Span, c: Children) -> Any:
        return ast.Slice(span, *(None if x is None else self._expr(x) for x in c))

    def on_subscript(self, span: Span, c: Children) -> Any:
        return ast.Subscript(span, self._expr(c[0]), c[1])

    def on_call(self, span: Span, c: Children) -> Any:
        arguments = [x for x in (c[1] or ()) if x is not None]
        positional: list[ast.Expr] = []
        keywords: list[ast.Keyword] = []
        for argument in arguments:
            if isinstance(argument, ast.Keyword):
                if any(k.name == argument.name for k in keywords):
                    self._problem(
                        "E0109", f"the argument `{argument.name}` is given twice", argument.span
                    )
                keywords.append(argument)
            elif keywords:
                self._problem(
                    "E0109", "a positional argument follows a keyword argument", argument.span,
                    "put it before the keyword arguments",
                )  # fmt: skip
            else:
                positional.append(self._expr(argument))
        return ast.Call(span, self._expr(c[0]), tuple(positional), tuple(keywords))

    def on_arguments(self, span: Span, c: Children) -> Any:
        return c

    def on_keyword(self, span: Span, c: Children) -> Any:
        return ast.Keyword(span, str(c[0]), self._expr(c[1]))

    def on_unary(self, span: Span, c: Children) -> Any:
        return ast.Unary(span, str(c[0]), self._expr(c[1]))

    def on_binary(self, span: Span, c: Children) -> Any:
        return ast.Binary(span, str(c[1]), self._expr(c[0]), self._expr(c[2]), self._span(c[1]))

    def on_compare(self, span: Span, c: Children) -> Any:
        left = c[0]
        if isinstance(left, ast.Binary) and str(left.op) in _COMPARISONS:
            inside = span.source.text[span.start : left.span.start]
            if "(" not in inside and left.span.start == span.start:
                self._problem("E0112", "comparisons are not chained", span, _unchained(left.right))
        return self.on_binary(span, c)

    def on_pipe(self, span: Span, c: Children) -> Any:
        return ast.Pipe(span, self._expr(c[0]), self._expr(c[1]))

    def on_range_exclusive(self, span: Span, c: Children) -> Any:
        return ast.RangeExpr(span, self._expr(c[0]), self._expr(c[1]), False)

    def on_range_inclusive(self, span: Span, c: Children) -> Any:
        return ast.RangeExpr(span, self._expr(c[0]), self._expr(c[1]), True)

    def on_reduction(self, span: Span, c: Children) -> Any:
        indices = self._index_vars(c[1], str(c[0])) or ()
        return ast.Reduction(span, str(c[0]), indices, self._expr(c[2]))


_COMPARISONS = frozenset(("==", "!=", "<", "<=", ">", ">="))


def _unchained(middle: ast.Expr) -> str:
    """What is written instead of `a < middle < c`."""
    if isinstance(middle, ast.Binary) and str(middle.op) in ("&", "|"):
        word = "and" if str(middle.op) == "&" else "or"
        return f"`{middle.op}` binds tighter than comparisons: write `a < b {word} c < d`"
    if isinstance(middle, ast.Name) and middle.name[:1].isupper():
        return f"write `a < b and b < c`, or in a `where` a range: `{middle.name} in 1..=512`"
    return "write `a < b and b < c`"
