"""The source as a person reads it: what it is, what it imports, the signature, the body."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx

from stagefuse.compiler.front import check_text
from stagefuse.dsl.source import Source
from stagefuse.dsl.types import TensorType

from .body import Body
from .lift.source import lifted
from .names import MODULES, Names
from .text import type_text

if TYPE_CHECKING:
    from .translate import Translator

Array: TypeAlias = "np.ndarray[Any, Any]"
WIDTH = 100
MOST_NAMED = 6
"""Inputs whose spelling alone had to change, which are listed one by one."""


def write_source(
    translator: Translator, body: Body, pipeline: str, weights_file: str, model: onnx.ModelProto,
    plain: bool = False,
) -> tuple[str, dict[str, Array]]:
    """The text of the `.pipe` file, and the tensors that it names.

    `plain` keeps one line for each node of the model.
    """
    results = _results(translator, body)
    about, signature = _about(translator, model), _signature(translator, pipeline, results)

    def whole(functions: list[str], lines: list[str], has_weights: bool) -> str:
        text = "\n\n".join([*functions, "\n".join([*signature, *lines])])
        used = [m for m in MODULES if re.search(rf"\b{m}\.", text)]
        head = [about, "\n".join(f"import {name}" for name in used)]
        head.append(f'weights {body.weights} = "{weights_file}"' if has_weights else "")
        return "\n\n".join([*filter(None, head), text]) + "\n"

    if not plain:
        inputs = [(text, type) for _, text, type in translator.inputs]
        found = lifted(body, inputs, [(n, t) for n, t, _ in results], translator.arrays)
        text = whole(found.functions, found.lines, bool(found.arrays))
        if _is_right(text, body.weights, found.arrays, [type for _, _, type in results]):
            return text, found.arrays
    lines = [f"    {part}" for line in body.lines for part in line.text.split("\n")]
    lines.append("    " + ", ".join(text for _, text, _ in results))
    return whole([], lines, bool(translator.arrays)), translator.arrays


def _is_right(
    text: str, name: str, arrays: dict[str, Array], types: list[TensorType]
) -> bool:
    """Whether a source is right, with results of these types."""
    weights = {name: arrays} if arrays else {}
    program, found, _ = check_text(Source("<import>", text), Path(), weights)
    if found:
        return False
    (pipeline,) = program.pipelines
    return [pipeline.types[v] for _, v in pipeline.results] == types


def _about(translator: Translator, model: onnx.ModelProto) -> str:
    """The docstring: where the model is from, and names that had to change."""
    producer = " ".join(filter(None, (model.producer_name, model.producer_version)))
    title = f"Imported from ONNX{f', made by {_plain(producer)}' if producer else ''}."
    pairs = [(o, n) for o, n, _ in translator.inputs if o != n]
    spelled = [(o, n) for o, n in pairs if n == re.sub(r"\W", "_", o)]
    alike = spelled[1:] if len(spelled) > MOST_NAMED else []
    pairs = [p for p in pairs if p not in alike]
    pairs += [(o, n) for o, n in translator.sizes.items() if o != n]
    changed = [f"`{new}` is `{_plain(old)}`" for old, new in pairs]
    notes = [f"In the model, {', '.join(changed)}."] if changed else []
    if alike:
        notes[0] += f" {len(alike)} more inputs are spelled with `_` like `{spelled[0][1]}`."
    notes += _counted(translator)
    if not notes:
        return f'"""{title}"""'
    about = "\n\n".join(textwrap.fill(note, WIDTH) for note in notes)
    return f'"""{title}\n\n{about}\n"""'


def _counted(translator: Translator) -> list[str]:
    """For each number of rows that depends on data, the results that have it."""
    labels = {name: label for name, label, _ in translator.results}
    groups: dict[tuple[str, int], list[str]] = {}
    for name, rows in translator.counts.items():
        groups.setdefault((rows.count, rows.axis), []).append(f"`{labels[name]}`")
    order = list(dict.fromkeys(count for count, _ in groups))
    first = len(translator.results) - len(order)
    meant = {c: name for c, (_, name, _) in zip(order, translator.results[first:], strict=True)}
    return [
        f"{' and '.join(names)} {'has' if len(names) == 1 else 'have'} as many elements along axis "
        f"{axis} as there can be; the first `{meant[count]}` are meant, the others are filling."
        for (count, axis), names in groups.items()
    ]


def _plain(text: str) -> str:
    """Text of the model that may stand in a docstring."""
    return re.sub(r"[^\x20-\x7e]|[\"\\]", "_", text)[:80]


def _results(translator: Translator, body: Body) -> list[tuple[str, str, TensorType]]:
    """Name, expression and type of every result; the names are identifiers, each once."""
    taken = Names((text for _, text, _ in translator.inputs), body.weights)
    plain = {text for _, text, _ in translator.results}
    found = []
    for number, (name, text, type) in enumerate(translator.results):
        is_own = text.isidentifier() and body.hints.get(text, "").endswith(name)
        label = text if is_own and text not in taken.taken else taken.value(name)
        while label in plain and label != text:
            label = taken.value(label)
        taken.taken.add(label)
        found.append((label, text, type))
        translator.results[number] = (name, label, type)
    return found


def _signature(
    translator: Translator, pipeline: str, results: list[tuple[str, str, TensorType]]
) -> list[str]:
    inputs = [f"{text}: {type_text(type)}" for _, text, type in translator.inputs]
    outputs = [f"{label}: {type_text(type)}" for label, _, type in results]
    gives = type_text(results[0][2]) if len(results) == 1 else f"({', '.join(outputs)})"
    head = f"pipeline {pipeline}({', '.join(inputs)}) -> {gives}"
    if len(head) > WIDTH:
        wide = "".join(f"\n    {i}," for i in inputs)
        if len(results) > 1:
            gives = "(" + "".join(f"\n    {o}," for o in outputs) + "\n)"
        head = f"pipeline {pipeline}({wide}\n) -> {gives}"
    sizes = ", ".join(
        f"{name} >= {low}" if high is None else f"{name} in {low}..={high}"
        for name, (low, high) in translator.guesses.factors().items()
    )
    return (head + (f"\nwhere {sizes}:" if sizes else ":")).split("\n")
