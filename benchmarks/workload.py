"""What a workload is: a pipeline, its data, its formula for the peers, and its meaning in float64.

A family makes its data from sizes and a seed; the sizes in capitals are `const` lines of its
pipeline (pipes/*.pipe) too, so that one family gives workloads of any shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .operations import Operations

PIPES = Path(__file__).resolve().parent / "pipes"

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Any]
Sizes = Mapping[str, int]
# operations, inputs and weights by name -> results
Formula = Callable[[Any, Arrays, Arrays], list[Any]]
# inputs, weights, formula
Parts = tuple[dict[str, Array], dict[str, Array], Formula]
Make = Callable[..., Parts]


class Data:
    """Random arrays of one seed, so that every process makes the same ones."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        return self.rng.standard_normal(shape, np.float32) * np.float32(scale)

    def norm(self, size: int) -> dict[str, Array]:
        return {"w": 1 + self.normal(size, scale=0.1), "b": self.normal(size, scale=0.1)}

    def linear(self, name: str, inner: int, outer: int, bias: bool = True) -> dict[str, Array]:
        made = {f"{name}.W": self.normal(inner, outer, scale=inner**-0.5)}
        return {**made, f"{name}.b": self.normal(outer, scale=0.1)} if bias else made


@dataclass(frozen=True)
class Family:
    """Workloads of one formula.

    `sizes` are those of the tables, `others` more shapes that users meet, `tiny` those of tests.
    `tolerance` bounds the error of an element as a part of itself, or of the root mean square of
    its result where that is more.
    """

    name: str
    title: str
    pipe: str
    make: Make
    sizes: Sizes
    others: tuple[Sizes, ...]
    tiny: Sizes
    tolerance: float = 2e-4

    def workload(self, seed: int, sizes: Sizes | None = None) -> Workload:
        chosen = dict(self.sizes if sizes is None else sizes)
        named = {name.lower(): value for name, value in chosen.items()}
        inputs, weights, formula = self.make(Data(seed), **named)
        return Workload(self, chosen, inputs, weights, formula)


@dataclass(frozen=True)
class Workload:
    """One family at one shape, with its data."""

    family: Family
    sizes: Sizes
    inputs: dict[str, Array]
    weights: dict[str, Array]
    formula: Formula

    def source(self) -> str:
        """The pipeline's text, with the constants of these sizes."""
        text = (PIPES / f"{self.family.pipe}.pipe").read_text(encoding="utf-8")
        for name, value in self.sizes.items():
            text = re.sub(rf"^const {name} = \d+$", f"const {name} = {value}", text, flags=re.M)
        return text

    def reference(self) -> list[Array]:
        """The results in float64."""
        inputs, weights = _widened(self.inputs), _widened(self.weights)
        return [np.asarray(r) for r in self.formula(Operations(np.float64), inputs, weights)]

    def error(self, results: list[Array], reference: list[Array]) -> float:
        """The greatest error as a part of the element or, where that is more, of the result's
        root mean square; infinite for a NaN.
        """
        found = 0.0
        for number, (result, right) in enumerate(zip(results, reference, strict=True)):
            if result.shape != right.shape:
                raise ValueError(f"result {number} is {result.shape}, not {right.shape}")
            scale = np.maximum(np.abs(right), np.sqrt(np.mean(right * right)))
            error = np.max(np.abs(result - right) / scale, initial=0.0)
            found = max(found, float(error))
            if np.isnan(error):
                return float("inf")
        return found


def _widened(arrays: Arrays) -> dict[str, Array]:
    return {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in arrays.items()}
