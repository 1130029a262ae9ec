"""Statements as text: what stands in one line, what has a name, and which."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stagefuse.onnx.names import Names, weight_path

from .expressions import ATOM, PIPE, POSTFIX, RANGE, TermWriter, Text, number_text, path_text
from .plan import WIDTH, Plan, is_link
from .program import Apply, Compute, Loop, Statement, Value
from .terms import Term
from .words import suggestion


class Layout:
    """Writes one body. `names` are those that are taken, by inputs and by bodies around."""

    def __init__(self, names: Names, depth: int = 1) -> None:
        self.names, self.depth = names, depth
        self.lines: list[str] = []
        self.texts: dict[Value, Text] = {}
        self.held: dict[str, Value] = {}
        self.empty = Plan([], [], {})

    # Bodies

    def body(self, body: Sequence[Statement], results: Sequence[Value],
             wanted: dict[Value, str] | None = None) -> None:  # fmt: skip
        """Lines for the statements; `wanted` are names that results must have."""
        plan = Plan(body, results, wanted or {})
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

    def _line(self, statement: Statement, number: int, plan: Plan) -> None:
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

    def _name(self, value: Value, number: int, plan: Plan) -> str:
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

    def _is_free(self, name: str, number: int, plan: Plan) -> bool:
        if name in plan.reserved:
            return False
        if name in self.held:
            return self._is_dead(self.held[name], number, plan)
        return name not in self.names.taken

    def _is_dead(self, value: Value, number: int, plan: Plan) -> bool:
        return plan.last.get(value, plan.end if value not in plan.made else -1) <= number

    # Expressions

    def _whole(self, statement: Statement, plan: Plan) -> list[str]:
        """What a statement computes: links of a chain, or one text."""
        chain: list[str] = []
        while True:
            first = statement.reads[0] if statement.reads else None
            inner = first.maker if first is not None and first in plan.inline else None
            if inner is None or not is_link(statement):
                break
            if not is_link(inner) and not chain:
                break
            chain.append(self._call(statement, plan, skip=True)[0])
            statement = inner
        if len(chain) == 1:
            nested = self._nested(statement, chain, plan)
            if len(nested) < WIDTH - 24:
                return [nested]
        start, level = self._expression(statement, plan)
        return [self._parenthesized((start, level), RANGE), *reversed(chain)]

    def _nested(self, statement: Statement, chain: list[str], plan: Plan) -> str:
        """f(x, ...) of the one link."""
        inner = self._parenthesized(self._expression(statement, plan), PIPE)
        link = chain[0]
        if "(" not in link:
            return f"{link}({inner})"
        name, _, rest = link.partition("(")
        return f"{name}({inner}, {rest}"

    def value(self, value: Value, plan: Plan) -> Text:
        """The expression of an operand."""
        if value in plan.inline:
            maker = value.maker
            assert maker is not None
            return self._expression(maker, plan)
        if value.path is not None:
            return path_text(value, self.texts, self.names.weights), POSTFIX
        found = self.texts.get(value)
        return found if found is not None else (value.name, ATOM)

    def _expression(self, statement: Statement, plan: Plan) -> Text:
        if isinstance(statement, Apply):
            return self._call(statement, plan)
        assert isinstance(statement, Compute)
        return self._term(statement.term, statement, plan)

    def _call(self, statement: Statement, plan: Plan, skip: bool = False) -> Text:
        """A call; `skip` leaves out the first argument, and brackets around none."""
        if isinstance(statement, Apply):
            name = statement.function.name
            args = [self.value(v, plan)[0] for v in statement.reads[skip:]]
            args += [self.number(n) for n in statement.numbers]
        else:
            assert isinstance(statement, Compute)
            name, args = statement.term.value[0], self._arguments(statement, plan)
            args = args[skip:]
        if skip and not args:
            return name, ATOM
        return f"{name}({', '.join(args)})", POSTFIX

    def _arguments(self, statement: Compute, plan: Plan) -> list[str]:
        term = statement.term
        texts = self._parts(term, statement, plan)
        names = term.value[1]
        at = len(texts) - len(names)
        return texts[:at] + [f"{n}={t}" for n, t in zip(names, texts[at:], strict=True)]

    def _parts(self, term: Term, statement: Compute, plan: Plan) -> list[str]:
        writer = TermWriter(self, statement, plan)
        return [writer.text(a)[0] for a in term.args]

    def _term(self, term: Term, statement: Compute, plan: Plan) -> Text:
        if term.kind == "call":
            return self._call(statement, plan)
        return TermWriter(self, statement, plan).of(term)

    def number(self, number: Term | Value) -> str:
        if isinstance(number, Value):
            return self.texts[number][0]
        return number_text(number)

    def _parenthesized(self, text: Text, least: int) -> str:
        return text[0] if text[1] >= least else f"({text[0]})"

    def _indices(self, statement: Compute, plan: Plan) -> str:
        term = statement.term
        writer = TermWriter(self, statement, plan)
        writer.text(term.args[0])
        return writer.indices(term)

    # Statements of several lines

    def _block(self, statement: Compute, number: int, plan: Plan) -> None:
        """A statement as it was, but for names; what it binds again is bound before."""
        template, bound, used = statement.term.value
        texts: dict[str, str] = {}
        pad = "    " * self.depth
        writer = TermWriter(self, statement, plan)
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

    def _loop(self, loop: Loop, number: int, plan: Plan) -> None:
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
        if not names:
            names.append(self.names.within(self.held).value("turn"))
        self.lines.append(f"{pad}for {', '.join(names)} in {self._items(loop, plan)}:")
        for value in loop.leaves:
            if value not in wanted:
                wanted[value] = self._name(value, number - 1, plan)
        inner = Layout(self.names.within(self.held), self.depth + 1)
        inner.texts = dict(self.texts)
        inner.body(loop.body, [*(c[2] for c in loop.carried), *loop.leaves], wanted)
        self.lines += inner.lines
        for leaf, give in kept.items():
            name = wanted[leaf]
            self.texts[give] = (name, ATOM)
            self.held[name] = give

    def _items(self, loop: Loop, plan: Plan) -> str:
        """What a loop runs over: a scope of the weights, numbers, or rows."""
        if not loop.targets:  # every turn does the same, with the same weights
            return f"0..{len(loop.items)}"
        first = loop.targets[0]
        if len(loop.targets) == 1 and first.name == "index":
            low, high = loop.items[0][0], loop.items[-1][0]
            assert isinstance(low, Value) and isinstance(high, Value)
            return f"{low.name}..{int(high.name) + 1}"
        rows = [[self._item(i, plan) for i in row] for row in loop.items]
        if len(loop.targets) == 1:
            scope = loop_scope(loop)
            if scope is not None:
                return weight_path(scope, self.names.weights)
            return f"({', '.join(r[0] for r in rows)})"
        flat = "(" + ", ".join(f"({', '.join(r)})" for r in rows) + ")"
        if len(flat) < WIDTH - 24:
            return flat
        pad = "    " * (self.depth + 1)
        inside = "".join(f"\n{pad}({', '.join(r)})," for r in rows)
        return f"({inside}\n{'    ' * self.depth})"

    def _item(self, item: Value | Term, plan: Plan) -> str:
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
