"""What the functions of one LLVM module share."""

from __future__ import annotations

from collections.abc import Sequence


class Module:
    """What the functions of one module share: helper functions and metadata.

    `partial` are the micro-kernels (columns of a panel, how its rows lie) that some product wants
    fewer columns of: the others call the same, since a second one takes a tenth of a second.
    """

    def __init__(self, level: str, partial: frozenset[tuple[int, str]] = frozenset()) -> None:
        self.level = level
        self.partial = partial
        self.helpers: dict[str, str] = {}
        self.micro_kernels: dict[str, str] = {}  # apart: no pass would improve them
        self.cut_columns: set[int] = set()  # of panels that are cut before a kernel runs
        self.metadata: list[str] = []
        self._known: dict[str, str] = {}

    def node(self, text: str) -> str:
        """The name of a metadata node with this text."""
        if text not in self._known:
            self._known[text] = self.distinct(text)
        return self._known[text]

    def distinct(self, text: str, word: str = "") -> str:
        name = f"!{len(self.metadata)}"
        self.metadata.append(f"{name} = {word}{text}")
        return name

    def loop(self, properties: Sequence[str]) -> str:
        """A new loop identity with properties."""
        name = f"!{len(self.metadata)}"
        self.metadata.append(f"{name} = distinct !{{{', '.join([name, *properties])}}}")
        return name
