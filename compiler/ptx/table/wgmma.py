"""Asynchronous products of a warpgroup (PTX ISA, "Asynchronous Warpgroup Level Matrix")."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .record import Form

_SECTION = "Asynchronous Warpgroup Level Matrix Instructions"
_EFFECTS = frozenset({"converge", "async"})
_SCALES = "#scale_a:s32 #scale_b:s32"


def _shapes(k: int, sizes: range | list[int]) -> str:
    return " ".join(f"m64n{n}k{k}" for n in sizes)


_ALL = range(8, 257, 8)
_INTEGER = [8, 16, 24, 32, *range(48, 257, 16)]


def _products(k: int, sizes: range | list[int], d: str, types: str, tail: str, trans: bool,
              sat: str = "") -> tuple[Form, ...]:  # fmt: skip
    """Both forms of a product: A in shared memory, and A in registers (4 a thread).

    D has N / 2 registers a thread, or N / 4 of two f16; `tail` are the constants that follow.
    """
    pair = "A B" if len(types.split()) > 1 else "A A"
    register, count = ("b32", "S/4") if d == "f16" else (d, "S/2")
    head = f">d:{register}*{count}"
    rest = f"b:b64 !scale_d:pred {tail}".rstrip()
    forms = []
    for a, flips in (("a:b64", "#trans_a:s32 #trans_b:s32"), ("a:b32*4", "#trans_b:s32")):
        operands = f"{head} {a} {rest} {flips if trans else ''}".rstrip()
        forms.append(
            Form("wgmma", f"mma_async sync aligned S {d} {pair}{sat}", operands, "wgmma.mma_async",
                 _SECTION, {"S": _shapes(k, sizes), "A": types, "B": types}, (8, 0), arch="90a",
                 effects=_EFFECTS, summary="d = a * b, or where scale_d d + a * b; asynchronous")
        )  # fmt: skip
    return tuple(forms)


def _sparse(k: int, sizes: range | list[int], d: str, types: str, tail: str, trans: bool,
            sat: str = "") -> tuple[Form, ...]:  # fmt: skip
    """As `_products`, with an A of which half is zero: K is twice as long."""
    return tuple(
        replace(
            form,
            modifiers=form.modifiers.replace("mma_async", "mma_async sp"),
            operands=form.operands.replace("b:b64 ", "b:b64 e:b32 #selector:u32 "),
            version=(8, 2),
            summary="as the product without sp; e says which half of a's elements are there",
        )
        for form in _products(2 * k, sizes, d, types, tail, trans, sat)
    )


def _order(modifiers: str, operands: str, summary: str) -> Form:
    return Form("wgmma", modifiers, operands, f"wgmma.{modifiers.split()[0]}", _SECTION, {}, (8, 0),
                arch="90a", effects=_EFFECTS, summary=summary)  # fmt: skip


_KINDS: tuple[tuple[Any, ...], ...] = (
    (16, _ALL, "f32", "f16", _SCALES, True),
    (16, _ALL, "f16", "f16", _SCALES, True),
    (16, _ALL, "f32", "bf16", _SCALES, True),
    (8, _ALL, "f32", "tf32", _SCALES, False),
    (32, _ALL, "f32", "e4m3 e5m2", _SCALES, False),
    (32, _ALL, "f16", "e4m3 e5m2", _SCALES, False),
    (32, _INTEGER, "s32", "s8 u8", "", False, " ?satfinite"),
)
"""Products: elements of K, sizes of N, types of D and of A and B, what follows, transposition."""

FORMS = (
    _order("fence sync aligned", "", "order registers before the products that follow"),
    _order("commit_group sync aligned", "", "products since the last group become a group"),
    _order("wait_group sync aligned", "#n:u32", "wait until at most n groups are open"),
    *(form for kind in _KINDS for form in _products(*kind)),
    *(form for kind in _KINDS for form in _sparse(*kind)),
)
