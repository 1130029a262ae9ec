"""Reads the text of an expression over dimensions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from .dims import APPLY, Expr, const, sym

MOST_TOKENS = 50_000
_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_][\w.$]*)|(//|[-+*%(),]))")


@lru_cache(maxsize=1 << 14)
def parse(text: str) -> Expr:
    """The expression that `str` printed. Raises ValueError on any other text."""
    tokens: list[str] = []
    position = 0
    stripped = text.rstrip()
    while position < len(stripped):
        match = _TOKEN.match(stripped, position)
        if not match or len(tokens) > MOST_TOKENS:
            raise ValueError(f"not a dimension expression: {text[:80]!r}")
        tokens.append(match.group(1) or match.group(2) or match.group(3))
        position = match.end()
    reader = _Reader([*tokens, ""], text)
    result = reader.sum(0)
    if reader.peek():
        raise ValueError(f"not a dimension expression: {text[:80]!r}")
    return result


def parse_tokens(tokens: Sequence[str]) -> tuple[Expr, int]:
    """The expression that tokens begin with, and how many it took. Raises ValueError."""
    reader = _Reader([*tokens, ""], " ".join(tokens[:40]))
    return reader.sum(0), reader.at


class _Reader:
    def __init__(self, tokens: list[str], text: str) -> None:
        self.tokens, self.text, self.at = tokens, text, 0

    def peek(self) -> str:
        return self.tokens[self.at]

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise ValueError(f"not a dimension expression: {self.text[:80]!r}")

    def sum(self, depth: int) -> Expr:
        if depth > 60:
            raise ValueError("a dimension expression is nested too deeply")
        total = self.product(depth)
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            total = total + self.product(depth) * sign
        return total

    def product(self, depth: int) -> Expr:
        total = self.unary(depth)
        while self.peek() in ("*", "//", "%"):
            operator = self.take()
            right = self.unary(depth)
            total = total * right if operator == "*" else APPLY[operator](total, right, None)
        return total

    def unary(self, depth: int) -> Expr:
        token = self.take()
        if token == "-":
            return -self.unary(depth + 1) if depth < 60 else self.sum(99)
        if token == "(":
            inner = self.sum(depth + 1)
            self.expect(")")
            return inner
        if token in ("min", "max") and self.peek() == "(":
            self.expect("(")
            a = self.sum(depth + 1)
            self.expect(",")
            b = self.sum(depth + 1)
            self.expect(")")
            return APPLY[token](a, b, None)
        if token.isdigit():
            return const(int(token))
        if re.fullmatch(r"[A-Za-z_][\w.$]*", token):
            return sym(token)
        raise ValueError(f"not a dimension expression: {self.text[:80]!r}")
