"""What weights are called: layers get a scope each, from the model's names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from stagefuse.onnx.names import safe_key

from .terms import Term

Array: TypeAlias = "np.ndarray[Any, Any]"
OPTIONAL = ("bias", "zero")
"""Tensors whose absence from a scope means something."""
_SCALINGS = ("scale", "zero")
_ENDINGS = r"(_output_0)?_(quantized|scale|zero_point)$"


@dataclass
class Naming:
    """Keys of the new weights file, as they are given out; `above` are the scopes that they are
    in."""

    arrays: dict[str, Array]
    prefix: str
    claims: dict[str, tuple[Term, str]] = field(default_factory=dict)
    above: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    paths: dict[Term, str] = field(default_factory=dict)

    def cleaned(self, key: str) -> str:
        return cleaned(key).removeprefix(self.prefix)

    def plain(self, weight: Term) -> None:
        """A tensor that is used as it is keeps its name."""
        wanted = self.cleaned(weight.value)
        if self._is_below_a_tensor(wanted):
            wanted = wanted.replace(".", "_")
        key = wanted
        while not self._is_free(key, (weight, "")):
            key = safe_key(wanted, {*self.claims, key})
        self.claim(key, (weight, ""))
        self.paths[weight] = key

    def layer(self, scope: Term, hint: str) -> None:
        """A scope for tensors of one layer: that of their names, or of the value's."""
        parts = list(zip(scope.value, scope.args, strict=True))
        for path in self._candidates(parts, hint):
            keys = {f"{path}.{end}": (tensor, how) for (end, how), tensor in parts}
            lacks = {f"{path}.{end}" for end in OPTIONAL} - set(keys)
            if all(self._is_free(k, c) for k, c in keys.items()) and not lacks & set(self.claims):
                break
        for key, claim in keys.items():
            self.claim(key, claim)
        self.absent |= lacks
        self.paths[scope] = path

    def _candidates(self, parts: list[tuple[Any, Term]], hint: str) -> Iterator[str]:
        told = scope_of(hint)
        named = self.below_known(told) or told.removeprefix(self.prefix)
        if parts[-1][0][0] in _SCALINGS:
            yield from self._quantised(parts, named)
        exact: list[str] = []
        near: list[str] = []
        for (end, _), tensor in parts:
            scope, _, last = self.cleaned(tensor.value).rpartition(".")
            (exact if last == end else near).append(scope)
        own = [s for s in exact + near if s]
        yield from own[: len(exact)] if exact else []
        yield from [named] if named else []
        yield from own
        base = named or self.cleaned(parts[0][1].value)
        yield base
        number = 2
        while True:
            yield f"{base}_{number}"
            number += 1

    def _quantised(self, parts: list[tuple[Any, Term]], named: str) -> Iterator[str]:
        """What a quantised tensor was called: quantizers add endings to that."""
        stems = [re.sub(_ENDINGS, "", self.cleaned(tensor.value)) for _, tensor in parts]
        yield from (s for s in stems if "." in s)
        if named and parts[0][0][0] == "q":
            yield f"{named}.{'bias' if parts[0][1].rank == 1 else 'weight'}"
        yield from stems

    def below_known(self, path: str) -> str:
        """A path that an exporter began below the model's name, from where tensors are named:
        `layers.0.fc.q` where they are `net.layers.0.fc.k`. Empty if no tensors tell, or several."""
        parts = path.split(".")
        for n in range(len(parts) - 1, 0, -1):
            scopes = self.ends[".".join(parts[:n])]
            if len(scopes) == 1:
                return ".".join([*scopes, *parts[n:]])
            if scopes:
                break
        return ""

    @cached_property
    def ends(self) -> dict[str, set[str]]:
        """The scopes of the model's tensors, by each path that they end in."""
        found: dict[str, set[str]] = defaultdict(set)
        for scope in {s for key in self.arrays for s in _above(self.cleaned(key))}:
            parts = scope.split(".")
            for n in range(len(parts)):
                found[".".join(parts[n:])].add(scope)
        return found

    def _is_free(self, key: str, claim: tuple[Term, str]) -> bool:
        if key in self.absent or self.claims.get(key, claim) != claim:
            return False
        if self._is_below_a_tensor(key):
            return False  # a tensor with tensors below it would be both
        return key not in self.above

    def _is_below_a_tensor(self, key: str) -> bool:
        parts = key.split(".")
        return any(".".join(parts[:n]) in self.claims for n in range(1, len(parts)))

    def claim(self, key: str, claim: tuple[Term, str]) -> None:
        """Give a key out."""
        self.claims[key] = claim
        self.above.update(_above(key))

    def stored(self) -> dict[str, Array]:
        """The tensors of the new file."""
        return {k: _stored(self.arrays[t.value], how) for k, (t, how) in self.claims.items()}


def _above(key: str) -> list[str]:
    """The scopes that a tensor is in."""
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _stored(array: Array, how: str) -> Array:
    if how == "transposed":
        return array.T
    if how.startswith("spread"):
        return array.reshape(-1, *[1] * int(how.removeprefix("spread")))
    if how == "scalar":
        return array.reshape(())
    return array.reshape(-1) if how == "flat" else array


def named_weights(
    order: Iterable[Term], hints: dict[Term, str], arrays: dict[str, Array],
    kept: Iterable[Term] = (),
) -> Naming:
    """Names for the weights and scopes of a program, in order of use; `kept` ones stay."""
    used = list(order)
    naming = Naming(arrays, _prefix([t.value for t in used if t.kind == "weight"]))
    for term in kept:
        for tensor in term.args or (term,):
            naming.claim(tensor.value, (tensor, ""))
    for term in used:
        if term.kind == "weight":
            naming.plain(term)
    for term in used:
        if term.kind == "scope":
            naming.layer(term, hints.get(term, ""))
    return naming


def _prefix(keys: list[str]) -> str:
    """What all tensors named by folders begin with, such as the name of the whole model."""
    paths = [cleaned(k).split(".")[:-1] for k in keys if "/" in k]
    if len(paths) < 2:
        return ""
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return "".join(f"{p}." for p in common)


def cleaned(key: str) -> str:
    """A tensor's name in dots: those of folders too, without a number of results."""
    text = re.sub(r":\d+$", "", key)
    text = re.sub(r"[/;]+", ".", text)
    return ".".join(p for p in re.sub(r":+", "_", text).split(".") if p) or "tensor"


def scope_of(hint: str) -> str:
    """The scope that a value's name tells: `/layer1/layer1.0/conv1/Conv_output_0`."""
    folders = [p for p in hint.split("/")[:-1] if p]
    kept = [p for n, p in enumerate(folders)
            if n + 1 == len(folders) or not folders[n + 1].startswith(f"{p}.")]  # fmt: skip
    return cleaned(".".join(kept)) if kept else ""
