"""The parser's tables, which Lark needs a quarter of a second to make, as a file of the package.

`python -m stagefuse.dsl.tables --write` makes it anew; a test asks that it is that of the grammar.
With another version of Lark, whose tables may look otherwise, they are made in each process.
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import lark

STARTS = ("module", "line")
"""An item is parsed as a module; a line alone only where a program is wrong."""


def parser_with(lexer: type) -> lark.Lark:
    """The parser of the grammar, which reads the tokens of a lexer."""
    grammar, kept = _text("grammar.lark"), json.loads(_text("grammar.json"))
    return _loaded(kept, lexer) if kept["of"] == _key(grammar) else _made(grammar, lexer)


def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _key(grammar: str) -> dict[str, str]:
    return {"lark": lark.__version__, "grammar": hashlib.sha256(grammar.encode()).hexdigest()}


def _made(grammar: str, lexer: type) -> lark.Lark:
    return lark.Lark(
        grammar, parser="lalr", lexer=lexer, start=list(STARTS), propagate_positions=True,
        maybe_placeholders=True,
    )  # fmt: skip


def _loaded(kept: dict[str, Any], lexer: type) -> lark.Lark:
    data = kept["data"]
    _set_lexer(data, lexer)
    table = data["parser"]["parser"]
    table["tokens"] = dict(enumerate(table["tokens"]))
    table["states"] = {
        number: {
            token: (0, to) if to >= 0 else (1, {"@": ~to})
            for token, to in zip(row[::2], row[1::2], strict=True)
        }
        for number, row in enumerate(kept["states"])
    }
    return lark.Lark.load({"data": data, "memo": dict(enumerate(kept["memo"]))})


def _set_lexer(data: dict[str, Any], lexer: type | None) -> None:
    data["options"]["lexer"] = data["parser"]["lexer_conf"]["lexer_type"] = lexer


def tables() -> str:
    """The file: what Lark has for other processes, numbered by content, not by the order of a set.

    The row of a state has for each token the state to shift to, or the complement of the number
    in `memo` of the rule to reduce by.
    """
    grammar = _text("grammar.lark")
    parser = _made(grammar, lark.lexer.BasicLexer)
    data, memo = parser.memo_serialize([lark.lexer.TerminalDef, lark.grammar.Rule])
    _set_lexer(data, None)
    table = data["parser"]["parser"]
    names, rows = table["tokens"], table.pop("states")
    order = [table["start_states"][start] for start in STARTS]
    number = {state: n for n, state in enumerate(order)}
    for state in order:  # it grows: states in the order in which they are first reached
        rows[state] = dict(sorted((names[t], action) for t, action in rows[state].items()))
        for reduces, to in rows[state].values():
            if not reduces and to not in number:
                number[to] = len(order)
                order.append(to)
    table["tokens"] = sorted(names.values())
    place = {name: n for n, name in enumerate(table["tokens"])}
    for ends in ("start_states", "end_states"):
        table[ends] = {start: number[table[ends][start]] for start in STARTS}
    states = [
        [x for name, (reduces, to) in rows[state].items()
         for x in (place[name], ~to["@"] if reduces else number[to])]
        for state in order
    ]  # fmt: skip
    parts = (_key(grammar), data, states, [memo[n] for n in range(len(memo))])
    named = map(_part, ("of", "data", "states", "memo"), parts)
    return "{" + ",\n".join(named) + "}\n"


def _part(name: str, value: object) -> str:
    """A part of the file, with a line for each row and each rule, so that changes can be read."""
    rows = value if isinstance(value, list) else [value]
    text = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    return f'"{name}":[\n{text}]' if isinstance(value, list) else f'"{name}":{text}'


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], "python -m stagefuse.dsl.tables --write"
    Path(__file__).with_name("grammar.json").write_text(tables(), "utf-8")
