"""Names of a model as names of the language: identifiers, sizes, paths of weights."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

from stagefuse.compiler.ops import BUILTINS
from stagefuse.dsl.dtypes import DTYPES
from stagefuse.dsl.lexer import CONSTANTS, KEYWORDS, LOGIC
from stagefuse.dsl.program import NO_INPUTS

MODULES = ("nn", "math", "onnx")
_TAKEN = frozenset(
    (*BUILTINS, *DTYPES, *CONSTANTS, *KEYWORDS, *LOGIC, *MODULES, "int", "float", "str", "bool",
     "has", "len", "extern", "scan", "state")
)  # fmt: skip
INDICES = frozenset(
    (*"bocijkmnqrt", *(f"{letter}{k}" for letter in "imdqrbt" for k in range(10)))
)
"""Indices of the notation that is written: there nothing else can be called so."""
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


class Names:
    """Gives out identifiers, each once. `weights` is what the source calls its weights."""

    def __init__(self, taken: Iterable[str] = (), weights: str = "w") -> None:
        self.weights = weights
        self.taken = {*_TAKEN, weights, *taken}
        self._latest: dict[str, int] = {}

    def within(self, taken: Iterable[str]) -> Names:
        """Names of a body inside, where more are taken."""
        return Names([*self.taken, *taken], self.weights)

    def value(self, wanted: str, is_input: bool = False) -> str:
        """An identifier for a value: what is special becomes `_`, the first letter is small.

        Only inputs may be called like an index; index notation reads them by another name.
        """
        return self._fresh(identifier(wanted, is_input))

    def fresh(self, wanted: str) -> str:
        """An identifier for a local value."""
        return self._fresh(self.clean(wanted))

    def clean(self, wanted: str) -> str:
        """The identifier, whether it is taken or not."""
        return identifier(wanted)

    def size(self, wanted: str) -> str:
        """An identifier for a size: `batch_size` becomes `BatchSize`."""
        parts = [p for p in re.split(r"[^A-Za-z0-9]+", wanted) if p]
        text = "".join(p[0].upper() + p[1:] for p in parts) or "N"
        text = text[:60] if text[0].isalpha() else f"N{text[:60]}"
        return self._fresh(f"{text}_" if text in _TAKEN else text)

    def _fresh(self, text: str) -> str:
        name, number = text, self._latest.get(text, 1)
        while name in self.taken:
            number += 1
            name = f"{text}_{number}" if text[-1].isdigit() else f"{text}{number}"
        self.taken.add(name)
        self._latest[text] = number
        return name


def identifier(wanted: str, is_input: bool = False) -> str:
    """A name in the language: what is special becomes `_`, the first letter is small."""
    text = re.sub(r"[^A-Za-z0-9_]+", "_", wanted).strip("_") or "v"
    if text[0].isdigit():
        text = f"v{text}"
    text = text[0].lower() + text[1:]
    if text in _TAKEN or text in (NO_INPUTS if is_input else INDICES):
        text = f"{text}_"
    return text[:60]


def safe_key(name: str, taken: Container[str] = ()) -> str:
    """A tensor's name as a key of a weights file: quotes and control characters are replaced."""
    text = re.sub(r"[^\x21-\x7e]|[\"'\\]", "_", name).strip(".") or "tensor"
    key, number = text, 1
    while key in taken:
        number += 1
        key = f"{text}_{number}"
    return key


def weights_name(values: Iterable[str]) -> str:
    """What a source calls its weights: `w`, unless an input or a result has that name."""
    taken = {identifier(value, is_input=True) for value in values}
    return next(n for n in ("w", "params", *map("params{}".format, range(2, len(taken) + 3)))
                if n not in taken)  # fmt: skip


def weight_path(key: str, root: str) -> str:
    """How a source names a tensor: `w.encoder.layer[0].weight`, or `w["/a/b"]`."""
    parts = key.split(".")
    if not all(parts):
        return f'{root}["{key}"]'
    return root + "".join(map(_part, parts))


def _part(part: str) -> str:
    if _IDENTIFIER.match(part) and part not in KEYWORDS | set(CONSTANTS) | set(LOGIC):
        return f".{part}"
    if part == "0" or (part.isdigit() and part[0] != "0"):
        return f"[{part}]"
    return f'["{part}"]'
