"""Code and launches of the fake GPU: what a kernel's parameters are, and what a launch touches."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from stagefuse.runtime import emulator
from stagefuse.runtime.cuda.calls import Node
from stagefuse.runtime.drivers import Launch

PARAMETER = re.compile(r"\.param \.(u64|s64|align)\b")


class NotedNode(Node):
    """A node that knows the bytes behind each of its pointers, and whether it writes them."""

    touches: tuple[tuple[int, bool], ...] = ()


def noting(node_of: Callable[[Any, Launch], Node]) -> Callable[[Any, Launch], Node]:
    """The driver's method that makes nodes, whose nodes say what they touch."""

    def run(driver: Any, launch: Launch) -> Node:
        node = node_of(driver, launch)
        sizes = [(r.size, w) for r, w in zip(launch.regions, launch.writes, strict=True)]
        object.__setattr__(node, "touches", tuple(sizes))
        return node

    return run


class Library:
    """Loaded code: the kinds of each entry's parameters, and what runs it."""

    def __init__(self, text: str) -> None:
        parts = re.split(r"\.visible \.entry (\w+)\(", text)[1:]
        self.entries = {
            name: PARAMETER.findall(body.partition(")")[0])
            for name, body in zip(parts[::2], parts[1::2], strict=True)
        }
        self.text = text

    @property
    def module(self) -> emulator.Module:
        return _emulated(self.text)


@lru_cache(maxsize=16)
def _emulated(text: str) -> emulator.Module:
    return emulator.load(text)
