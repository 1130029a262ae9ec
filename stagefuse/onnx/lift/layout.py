"""Statements as text: what stands in one line, what has a name, and which."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..names import Names, weight_path
from ..text import literal
from .program import Apply, Compute, Loop, Statement, Value, is_number, own_size
from .terms import Term

WIDTH = 96
INLINE = 44
"""Characters of an operand that needs no name of its own."""
LINKS = 7
PIPE, RANGE, NOT, COMPARE, SUM, PRODUCT, SIGN, POWER, POSTFIX = 0, 1, 4, 5, 10, 11, 12, 13, 14
PRECEDENCE = {
    "or": 2, "and": 3, "==": 5, "!=": 5, "<": 5, "<=": 5, ">": 5, ">=": 5, "|": 6, "^": 7, "&": 8,
    "<<": 9, ">>": 9, "+": 10, "-": 10, "*": 11, "/": 11, "//": 11, "%": 11, "@": 11, "**": 13,
}  # fmt: skip
ATOM = 15

Text = tuple[str, int]
"""An expression with how tightly its outermost operator binds."""


class Layout:
    """Writes one body. `names` are those that are taken, by inputs and by bodies around."""

    def __init__(self, names: Names, depth: int = 1) -> None:
        self.names, self.depth = names, depth
        self.lines: list[str] = []
        self.texts: dict[Value, Text] = {}
        self.held: dict[str, Value] = {}
        self.empty = _Plan([], [], {})

    # Bodies

    def body(self, body: Sequence[Statement], results: Sequence[Value],
             wanted: dict[Value, str] | None = None) -> None:  # fmt: skip
        """Lines for the statements; `wanted` are names that results must have."""
        plan = _Plan(body, results, wanted or {})
        for statement in body:
            if isinstance(statement, Compute) and statement.term.kind == "block":
                own = re.sub(r"\{\w+\}", " ", statement.term.value[0])
                self.names.taken.update(re.findall(r"[A-Za-z_]\w*", own))
        for number, statement in enumerate(body):
            if isinstance(statement, Loop):
                self._loop(statement, number, plan)
            elif statement.gives[0] in plan.inline:
                self.texts[statement.gives[0]] = ("", -1)  # written where it is read
            else:
                self._line(statement, number, plan)

    def _line(self, statement: Statement, number: int, plan: _Plan) -> None:
        if isinstance(statement, Compute) and statement.term.kind == "block":
            return self._block(statement, number, plan)
        text = self._whole(statement, plan)
        names = [self._name(v, number, plan) for v in statement.gives]
        target = ", ".join(names)
        if isinstance(statement, Compute) and statement.term.kind == "index":
            target = f"{target}[{self._indices(statement, plan)}]"
        self._emit(f"{target} = ", text)

    def _emit(self, head: str, text: list[str]) -> None:
        """A line, or several at `|>`."""
        pad = "    " * self.depth
        if len(text) == 1 or len(head + " |> ".join(text)) + len(pad) <= WIDTH:
            self.lines.append(f"{pad}{head}{' |> '.join(text)}")
            return
        self.lines.append(f"{pad}{head}{text[0]}")
        self.lines += [f"{pad}    |> {link}" for link in text[1:]]

    def _name(self, value: Value, number: int, plan: _Plan) -> str:
        """A name that nothing needs any more, or a new one."""
        name = plan.wanted.get(value)
        if name is None:
            hint = suggestion(value)
            stem, count = f"{hint}_" if hint[-1].isdigit() else hint, 1
            name = self.names.clean(hint)
            while not self._is_free(name, number, plan):
                count += 1
                name = self.names.clean(f"{stem}{count}")
        self.held[name] = value
        self.texts[value] = (name, ATOM)
        return name

    def _is_free(self, name: str, number: int, plan: _Plan) -> bool:
        if name in plan.reserved:
            return False
        if name in self.held:
            return self._is_dead(self.held[name], number, plan)
        return name not in self.names.taken

    def _is_dead(self, value: Value, number: int, plan: _Plan) -> bool:
        return plan.last.get(value, plan.end if value not in plan.made else -1) <= number

    # Expressions

    def _whole(self, statement: Statement, plan: _Plan) -> list[str]:
        """What a statement computes: links of a chain, or one text."""
        chain: list[str] = []
        while True:
            first = statement.reads[0] if statement.reads else None
            inner = first.maker if first is not None and first in plan.inline else None
            if inner is None or not _is_link(statement):
                break
            if not _is_link(inner) and not chain:
                break
            chain.append(self._call(statement, plan, skip=True)[0])
            statement = inner
        if len(chain) == 1:
            nested = self._nested(statement, chain, plan)
            if len(nested) < WIDTH - 24:
                return [nested]
        start, level = self._expression(statement, plan)
        return [self._parenthesized((start, level), RANGE), *reversed(chain)]

    def _nested(self, statement: Statement, chain: list[str], plan: _Plan) -> str:
        """f(x, ...) of the one link."""
        inner = self._parenthesized(self._expression(statement, plan), PIPE)
        link = chain[0]
        if "(" not in link:
            return f"{link}({inner})"
        name, _, rest = link.partition("(")
        return f"{name}({inner}, {rest}"

    def value(self, value: Value, plan: _Plan) -> Text:
        """The expression of an operand."""
        if value in plan.inline:
            maker = value.maker
            assert maker is not None
            return self._expression(maker, plan)
        if value.path is not None:
            return path_text(value, self.texts), POSTFIX
        found = self.texts.get(value)
        return found if found is not None else (value.name, ATOM)

    def _expression(self, statement: Statement, plan: _Plan) -> Text:
        if isinstance(statement, Apply):
            return self._call(statement, plan)
        assert isinstance(statement, Compute)
        return self._term(statement.term, statement, plan)

    def _call(self, statement: Statement, plan: _Plan, skip: bool = False) -> Text:
        """A call; `skip` leaves out the first argument, and brackets around none."""
        if isinstance(statement, Apply):
            name = statement.function.name
            args = [self.value(v, plan)[0] for v in statement.reads[skip:]]
            args += [self._number(n) for n in statement.numbers]
        else:
            assert isinstance(statement, Compute)
            name, args = statement.term.value[0], self._arguments(statement, plan)
            args = args[skip:]
        if skip and not args:
            return name, ATOM
        return f"{name}({', '.join(args)})", POSTFIX

    def _arguments(self, statement: Compute, plan: _Plan) -> list[str]:
        term = statement.term
        texts = self._parts(term, statement, plan)
        names = term.value[1]
        at = len(texts) - len(names)
        return texts[:at] + [f"{n}={t}" for n, t in zip(names, texts[at:], strict=True)]

    def _parts(self, term: Term, statement: Compute, plan: _Plan) -> list[str]:
        writer = _TermWriter(self, statement, plan)
        return [writer.text(a)[0] for a in term.args]

    def _term(self, term: Term, statement: Compute, plan: _Plan) -> Text:
        if term.kind == "call":
            return self._call(statement, plan)
        return _TermWriter(self, statement, plan).of(term)

    def _number(self, number: Term | Value) -> str:
        if isinstance(number, Value):
            return self.texts[number][0]
        return number_text(number)

    def _parenthesized(self, text: Text, least: int) -> str:
        return text[0] if text[1] >= least else f"({text[0]})"

    def _indices(self, statement: Compute, plan: _Plan) -> str:
        term = statement.term
        writer = _TermWriter(self, statement, plan)
        writer.text(term.args[0])
        return writer.indices(term)

    # Statements of several lines

    def _block(self, statement: Compute, number: int, plan: _Plan) -> None:
        """A statement as it was, but for names; what it binds again is bound before."""
        template, bound, used = statement.term.value
        texts: dict[str, str] = {}
        pad = "    " * self.depth
        writer = _TermWriter(self, statement, plan)
        for name, arg in zip(used, statement.term.args, strict=True):
            texts[name] = self._parenthesized(writer.text(arg), POSTFIX)
        for name, value in zip(bound, statement.gives, strict=True):
            given = plan.wanted.get(value) or self.names.fresh(name)
            self.held[given] = value
            self.texts[value] = (given, ATOM)
            if name in texts:
                self.lines.append(f"{pad}{given} = {texts[name]}")
            texts[name] = given
        self.lines += [f"{pad}{line}" for line in template.format(**texts).split("\n")]

    def _loop(self, loop: Loop, number: int, plan: _Plan) -> None:
        kept = dict(zip(loop.leaves, loop.gives, strict=True))
        wanted: dict[Value, str] = {}
        pad = "    " * self.depth
        for begin, inside, out in loop.carried:
            text = self.value(begin, plan)[0]
            name = text
            is_own = self.held.get(text) is begin and self._is_dead(begin, number, plan)
            if not is_own or begin in loop.reads[len(loop.carried) :] or name in wanted.values():
                name = self._name(inside, number - 1, plan)
                self.lines.append(f"{pad}{name} = {text}")
            self.held[name] = inside
            self.texts[inside] = (name, ATOM)
            wanted[out] = name
        names = []
        for target in loop.targets:
            names.append(self._name(target, number - 1, plan))
        self.lines.append(f"{pad}for {', '.join(names)} in {self._items(loop, plan)}:")
        for value in loop.leaves:
            if value not in wanted:
                wanted[value] = self._name(value, number - 1, plan)
        inner = Layout(Names([*self.names.taken, *self.held]), self.depth + 1)
        inner.texts = dict(self.texts)
        inner.body(loop.body, [*(c[2] for c in loop.carried), *loop.leaves], wanted)
        self.lines += inner.lines
        for leaf, give in kept.items():
            name = wanted[leaf]
            self.texts[give] = (name, ATOM)
            self.held[name] = give

    def _items(self, loop: Loop, plan: _Plan) -> str:
        """What a loop runs over: a scope of the weights, numbers, or rows."""
        first = loop.targets[0]
        if len(loop.targets) == 1 and first.name == "index":
            low, high = loop.items[0][0], loop.items[-1][0]
            assert isinstance(low, Value) and isinstance(high, Value)
            return f"{low.name}..{int(high.name) + 1}"
        rows = [[self._item(i, plan) for i in row] for row in loop.items]
        if len(loop.targets) == 1:
            scope = loop_scope(loop)
            if scope is not None:
                return weight_path(scope)
            return f"({', '.join(r[0] for r in rows)})"
        flat = "(" + ", ".join(f"({', '.join(r)})" for r in rows) + ")"
        if len(flat) < WIDTH - 24:
            return flat
        pad = "    " * (self.depth + 1)
        inside = "".join(f"\n{pad}({', '.join(r)})," for r in rows)
        return f"({inside}\n{'    ' * self.depth})"

    def _item(self, item: Value | Term, plan: _Plan) -> str:
        return self.value(item, plan)[0] if isinstance(item, Value) else number_text(item)


def loop_scope(loop: Loop) -> str | None:
    """The scope whose children a loop runs over, in order.

    Where a scope has more children than that, the loop runs over numbers.
    """
    paths = [row[0].path for row in loop.items if isinstance(row[0], Value)]
    if len(paths) != len(loop.items) or any(p is None for p in paths):
        return None
    above = {(p or "").rpartition(".")[0] for p in paths}
    last = [(p or "").rpartition(".")[2] for p in paths]
    is_numbered = last == [str(n) for n in range(len(last))]
    return above.pop() if len(above) == 1 and is_numbered and above != {""} else None


class _TermWriter:
    """The text of one operation; operands and numbers are taken in order."""

    def __init__(self, layout: Layout, statement: Compute, plan: _Plan) -> None:
        self.layout, self.plan = layout, plan
        self.reads = iter(statement.reads)
        self.numbers = iter(statement.numbers)

    def text(self, term: Term) -> Text:
        if term.is_operand:
            return self.layout.value(next(self.reads), self.plan)
        if is_number(term):
            number = next(self.numbers)
            text = self.layout._number(number)
            return text, SIGN if text.startswith("-") else ATOM
        return self.of(term)

    def of(self, term: Term) -> Text:
        match term.kind:
            case "size" | "name" | "local" | "input":
                return term.value, ATOM
            case "literal":
                value = term.value[1]
                return (f'"{value}"' if isinstance(value, str) else str(value)), ATOM
            case "absent":
                return "", ATOM
            case "list":
                return f"[{self._joined(term.args)}]", ATOM
            case "tuple":
                comma = "," if len(term.args) == 1 else ""
                return f"({self._joined(term.args)}{comma})", ATOM
            case "slice":
                start, stop, step = (self.text(a)[0] for a in term.args)
                return f"{start}:{stop}" + (f":{step}" if step else ""), ATOM
            case "range":
                a, b = (self._at(t, RANGE + 1) for t in term.args)
                return f"{a}{'..=' if term.value else '..'}{b}", RANGE
            case "call":
                texts = [self.text(a)[0] for a in term.args]
                names = term.value[1]
                at = len(texts) - len(names)
                named = [f"{n}={t}" for n, t in zip(names, texts[at:], strict=True)]
                return f"{term.value[0]}({', '.join([*texts[:at], *named])})", POSTFIX
            case "unary":
                return self._unary(term)
            case "binary":
                return self._binary(term)
            case "sub":
                base = self._at(term.args[0], POSTFIX)
                return f"{base}[{self._joined(term.args[1:])}]", POSTFIX
            case "reduce":
                body = self._at(term.args[0], PRODUCT)
                return f"{term.value[0]}[{self.indices(term)}] {body}", PIPE
            case "index":
                return self.text(term.args[0])[0], ATOM
        raise NotImplementedError(term.kind)

    def indices(self, term: Term) -> str:
        """The indices of a definition or reduction, with their ranges."""
        found = []
        for name, range_ in zip(term.value[1], term.args[1:], strict=True):
            text = self.text(range_)[0]
            found.append(f"{name} in {text}" if text else name)
        return ", ".join(found)

    def _joined(self, terms: Sequence[Term]) -> str:
        return ", ".join(self.text(t)[0] for t in terms)

    def _at(self, term: Term, least: int) -> str:
        text, level = self.text(term)
        return text if level >= least else f"({text})"

    def _unary(self, term: Term) -> Text:
        level = NOT if term.value == "not" else SIGN
        text = self._at(term.args[0], level)
        return f"{term.value} {text}" if term.value == "not" else f"{term.value}{text}", level

    def _binary(self, term: Term) -> Text:
        level = PRECEDENCE[term.value]
        left = self._at(term.args[0], level + (term.value == "**"))
        right = self._at(term.args[1], SIGN if term.value == "**" else level + 1)
        if term.value == "+" and right.startswith("-") and is_number(term.args[1]):
            return f"{left} - {right[1:]}", level
        return f"{left} {term.value} {right}", level


class _Plan:
    """What is written where it is read, and how long values are needed."""

    def __init__(self, body: Sequence[Statement], results: Sequence[Value],
                 wanted: dict[Value, str]) -> None:  # fmt: skip
        self.wanted, self.end = wanted, len(body)
        self.reserved = set(wanted.values())
        self.made = {v: n for n, s in enumerate(body) for v in s.gives}
        readers: dict[Value, list[int]] = {}
        for n, statement in enumerate(body):
            for value in statement.reads:
                readers.setdefault(value, []).append(n)
        self.inline: set[Value] = set()
        sizes: dict[Value, int] = {}
        links: dict[Value, int] = {}
        named = set(results) | set(wanted)
        bound = {v for s in body if isinstance(s, Compute) for v in _bound_operands(s)}
        for statement in body:
            size = _size(statement, sizes, self.inline)
            (value, *more) = statement.gives
            uses = readers.get(value, [])
            if more or len(uses) != 1 or value in named or value in bound:
                continue
            reader = body[uses[0]]
            if isinstance(statement, Loop) or isinstance(reader, Loop) or _is_stiff(statement):
                continue
            if isinstance(reader, Compute) and reader.term.kind == "block":
                continue
            is_first = reader.reads[0] is value
            linked = is_first and _is_link(reader) and _is_link(statement)
            chained = statement.reads and statement.reads[0] in self.inline and linked
            links[value] = 1 + (links[statement.reads[0]] if chained else 0)
            if links[value] >= LINKS:
                continue
            if not linked and size > INLINE or (is_first and linked and size > 3 * WIDTH):
                continue
            whole = _size(reader, {**sizes, value: size}, self.inline | {value})
            if whole > WIDTH - 12 and not linked:
                continue
            self.inline.add(value)
            sizes[value] = size
        self.last = self._ends(body, readers, results)

    def _ends(self, body: Sequence[Statement], readers: dict[Value, list[int]],
              results: Sequence[Value]) -> dict[Value, int]:  # fmt: skip
        """The statement that needs a value last, where inlined ones count where they stand."""
        place: dict[int, int] = {}
        for n in range(len(body) - 1, -1, -1):
            value = body[n].gives[0]
            if value in self.inline:
                reader = readers[value][0]
                place[n] = place.get(reader, reader)
        last = {v: max(place.get(n, n) for n in ns) for v, ns in readers.items()}
        last.update({v: len(body) for v in results})
        return last


def _bound_operands(statement: Compute) -> list[Value]:
    """Operands that index notation reads by name."""
    if statement.term.kind not in ("index", "reduce"):
        return []
    return [v for v in statement.reads if v.path is None]


def _is_stiff(statement: Statement) -> bool:
    """Whether a statement is always a line: definitions and blocks."""
    return isinstance(statement, Compute) and statement.term.kind in ("index", "block", "reduce")


def _is_link(statement: Statement) -> bool:
    """Whether a statement is a call that may be written with `|>` on its first operand."""
    if isinstance(statement, Apply):
        return bool(statement.reads) and statement.reads[0].path is None
    if not isinstance(statement, Compute) or statement.term.kind != "call":
        return False
    args = statement.term.args
    return bool(args) and args[0].is_operand and args[0].kind not in ("weight", "scope")


def _size(statement: Statement, sizes: dict[Value, int], inline: set[Value]) -> int:
    """About how many characters the text of a statement has."""
    total = 0
    for value in statement.reads:
        own = len(value.path) + 4 if value.path is not None else 5
        total += sizes.get(value, 5) if value in inline else own
    if isinstance(statement, Compute):
        return total + own_size(statement.term)
    return total + statement.cost // 2


def number_text(term: Term) -> str:
    if term.kind == "unary":
        return f"-{number_text(term.args[0])}"
    return literal(term.value[1])


def path_text(value: Value, texts: dict[Value, Text]) -> str:
    """`w.encoder.layer[0].query`, or below a parameter or a loop's number."""
    path, base = value.path or "", value.base
    if base is None:
        return weight_path(path)
    root = texts[base][0] if base in texts else base.name
    if base.name == "index":
        above, _, below = path.partition(".?")
        return weight_path(f"{above}.0{below}").replace(
            weight_path(f"{above}.0"), f"{weight_path(above)}[{root}]", 1)
    return weight_path(path, root) if path else root


_WORDS = {
    "nn.softmax": "probs", "nn.attend": "attended", "nn.embedding": "x", "nn.layer_norm": "h",
    "nn.rms_norm": "h", "iota": "positions", "concat": "joined", "sum": "total", "mean": "average",
    "exp": "e", "argmax": "best", "cos": "cosine", "sin": "sine",
}  # fmt: skip
_THROUGH = ("nn.split_heads", "nn.gelu", "nn.gelu_tanh", "nn.silu", "nn.relu", "reshape")
"""What does not change what a value is called."""
_PLAIN = re.compile(r"[A-Za-z][A-Za-z_]*[0-9]*\Z")


def suggestion(value: Value) -> str:
    """A name for a value: of its layer, or of what it is."""
    maker = value.maker
    if maker is None:
        return value.hint or "x"
    if isinstance(maker, Compute):
        term = maker.term
        scopes = [v for v in maker.reads if v.is_scope and v.path]
        if scopes and not term.is_call("nn.embedding", "nn.layer_norm", "nn.rms_norm"):
            words = [p for p in (scopes[0].path or "").split(".") if _PLAIN.match(p)]
            if words and 1 < len(words[-1]) <= 16:
                return words[-1].lower()
        if term.kind == "call" and term.value[0] in _WORDS:
            return _WORDS[term.value[0]]
        if term.kind == "binary" and term.value == "@":
            return "product"
        if value.type is not None and value.type.dtype.is_bool:
            return "mask"
        if term.is_call(*_THROUGH):
            return suggestion(maker.reads[0])
    return "x"
