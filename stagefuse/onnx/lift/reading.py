"""The lines of a body as terms."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields

from stagefuse.dsl import ast
from stagefuse.dsl.types import TensorType

from .terms import Term, Terms


class Reader:
    """Follows lines: what every name stands for. `root` is what they call the weights, `hints`
    are the model's names of values."""

    def __init__(
        self, terms: Terms, inputs: Mapping[str, TensorType], sizes: Sequence[str], root: str,
        weights: Mapping[str, TensorType], hints: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.terms, self.root, self.weights, self.hints = terms, root, weights, hints
        self.scopes: dict[str, list[str]] = {}  # the ends of the tensors below each scope
        for key in weights:
            for dot in re.finditer(r"\.", key):
                self.scopes.setdefault(key[: dot.start()], []).append(key[dot.end() :])
        self.names: dict[str, Term] = {}
        self.kept: list[Term] = []
        for name in sizes:
            self.names[name] = terms.make("size", name)
        for name, type in inputs.items():
            self.names[name] = terms.make("input", name)
            self.names[name].type = type

    def line(self, statement: ast.Stmt, text: str, types: Mapping[str, list[TensorType]]) -> None:
        """One statement; `types` are those of the names that it binds, a list for each."""
        match statement:
            case ast.Assign(target=ast.Name(name=name)) if len(types.get(name, ())) == 1:
                self._bind(name, self.expression(statement.value), types[name][0])
            case ast.Assign(target=ast.TargetTuple(items=items)) if all(
                isinstance(i, ast.Name) for i in items
            ):
                names = [i.name for i in items if isinstance(i, ast.Name)]
                self._several(self.expression(statement.value), names, types)
            case ast.IndexDef():
                inner = _Notation(self, [i.name for i in statement.indices])
                body = inner.expression(statement.value)
                ranges = [self._range(i) for i in statement.indices]
                made = self.terms.make("index", ("", tuple(inner.indices)), body, *ranges)
                self._bind(statement.name, made, types[statement.name][0])
            case _:
                self._opaque(statement, text, types)

    def _bind(self, name: str, term: Term, type: TensorType) -> None:
        self.names[name] = self.terms.typed(term, type, self.hints.get(name, ""))

    def _several(self, term: Term, names: list[str], types: Mapping[str, list[TensorType]]) -> None:
        for number, name in enumerate(names):
            item = self.terms.make("item", (number, len(names)), term)
            self._bind(name, item, types[name][0])

    def _opaque(
        self, statement: ast.Stmt, text: str, types: Mapping[str, list[TensorType]]
    ) -> None:
        """A statement that is kept as it is, but for the names of what it reads and binds.

        The tensors that it reads keep their keys: they are in `kept`.
        """
        self.kept += [t for t in map(self._weight, _paths(statement)) if t is not None]
        turning = _names(statement.target) if isinstance(statement, ast.For) else []
        own = []
        if isinstance(statement, ast.Scan):
            turning, own = [statement.name], [s.name for s in statement.starts]
        used = [n for n in dict.fromkeys(_names(statement)) if n in self.names and n not in own]
        used = [n for n in used if self.names[n].kind != "size"]
        bound = [n for n in types if re.search(_word(n), text) and n not in turning]
        template = text.replace("{", "{{").replace("}", "}}")
        for name in dict.fromkeys((*used, *bound)):
            template = re.sub(_word(name), "{" + name + "}", template)
        value = (template, tuple(bound), tuple(used))
        made = self.terms.make("block", value, *(self.names[n] for n in used))
        for number, name in enumerate(bound):
            item = self.terms.make("item", (number, len(bound)), made)
            item.type = types[name][0] if len(types[name]) == 1 else None
            self.names[name] = item

    def _range(self, index: ast.IndexVar) -> Term:
        if index.range is None:
            return self.terms.make("absent")
        return self.expression(index.range)

    def expression(self, node: ast.Expr) -> Term:
        """The term of an expression, rewritten."""
        return self.terms.rewritten(self._expression(node))

    def _expression(self, node: ast.Expr) -> Term:
        make, sub = self.terms.make, self.expression
        match node:
            case ast.Name(name=name):
                return self.name(name)
            case ast.IntLit() | ast.FloatLit() | ast.StrLit() | ast.BoolLit():
                return self.terms.literal(node.value)
            case ast.NoneLit():
                return self.terms.literal(None)
            case ast.EllipsisLit():
                return make("name", "...")
            case ast.TupleExpr():
                return make("tuple", None, *map(sub, node.items))
            case ast.ListLit():
                return make("list", None, *map(sub, node.items))
            case ast.Attribute() | ast.Subscript() if (found := self._weight(node)) is not None:
                return found
            case ast.Attribute(base=ast.Name(name=base)):
                return make("name", f"{base}.{node.name}")
            case ast.Slice():
                ends = (node.start, node.stop, node.step)
                return make("slice", None, *(sub(e) if e else make("absent") for e in ends))
            case ast.Subscript():
                return make("sub", None, sub(node.base), *map(sub, node.items))
            case ast.Call():
                names = tuple(k.name for k in node.kwargs)
                fn = self._expression(node.fn)
                return make("call", (fn.value, names), *map(sub, node.args),
                            *(sub(k.value) for k in node.kwargs))  # fmt: skip
            case ast.Unary():
                return make("unary", node.op, sub(node.operand))
            case ast.Binary():
                first, operators = node.chain()
                found = sub(first)
                for at in operators[:-1]:
                    found = self.terms.rewritten(make("binary", at.op, found, sub(at.right)))
                return make("binary", node.op, found, sub(node.right))
            case ast.RangeExpr():
                return make("range", node.inclusive, sub(node.start), sub(node.stop))
            case ast.Reduction():
                inner = _Notation(self, [i.name for i in node.indices])
                ranges = [self._range(i) for i in node.indices]
                body = inner.expression(node.body)
                return make("reduce", (node.kind, tuple(inner.own)), body, *ranges)
        raise NotImplementedError(type(node).__name__)

    def _weight(self, node: ast.Expr) -> Term | None:
        """A tensor of the file, or a scope of some."""
        key = weight_key(node, self.root)
        if key is None:
            return None
        if key in self.weights:
            return self.weight(key)
        ends = self.scopes.get(key, [])
        tensors = [self.weight(f"{key}.{end}") for end in ends]
        return self.terms.make("scope", tuple((e, "") for e in ends), *tensors) if ends else None

    def weight(self, key: str) -> Term:
        made = self.terms.make("weight", key)
        made.type = self.weights[key]
        return made

    def name(self, name: str) -> Term:
        return self.names.get(name) or self.terms.make("name", name)


class _Notation(Reader):
    """The same where some names are indices."""

    def __init__(self, outer: Reader, indices: list[str]) -> None:
        self.terms, self.hints, self.names = outer.terms, outer.hints, outer.names
        self.root, self.weights, self.scopes = outer.root, outer.weights, outer.scopes
        self.own = indices
        self.indices = [*getattr(outer, "indices", []), *indices]

    def name(self, name: str) -> Term:
        if name in self.indices:
            return self.terms.make("local", name)
        return super().name(name)


def weight_key(node: ast.Expr, root: str) -> str | None:
    """The key that `w.encoder.layer[0].weight` names, where `w` is `root`."""
    match node:
        case ast.Attribute(base=ast.Name(name=name)) if name == root:
            return node.name
        case ast.Subscript(base=ast.Name(name=name), items=(item,)) if name == root:
            return _part(item)
        case ast.Attribute():
            base = weight_key(node.base, root)
            return None if base is None else f"{base}.{node.name}"
        case ast.Subscript(items=(item,)):
            base, part = weight_key(node.base, root), _part(item)
            return None if base is None or part is None else f"{base}.{part}"
    return None


def _part(item: ast.Expr) -> str | None:
    return str(item.value) if isinstance(item, ast.StrLit | ast.IntLit) else None


def _names(node: object) -> list[str]:
    """The names in a syntax tree, in order."""
    if isinstance(node, ast.Name):
        return [node.name]
    if isinstance(node, tuple):
        return [n for item in node for n in _names(item)]
    if isinstance(node, ast.Node):
        return [n for part in _parts(node) for n in _names(part)]
    return []


def _paths(node: object) -> list[ast.Expr]:
    """The attributes and subscripts in a syntax tree."""
    if isinstance(node, tuple):
        return [p for item in node for p in _paths(item)]
    if not isinstance(node, ast.Node):
        return []
    own = [node] if isinstance(node, ast.Attribute | ast.Subscript) else []
    return [*own, *(p for part in _parts(node) for p in _paths(part))]


def _parts(node: ast.Node) -> list[object]:
    """What a node of a syntax tree consists of."""
    return [getattr(node, f.name) for f in fields(node) if "span" not in f.name]


def _word(name: str) -> str:
    """The pattern of a name that is no attribute and no keyword."""
    return rf"(?<![\w.{{]){re.escape(name)}(?![\w}}=])"
