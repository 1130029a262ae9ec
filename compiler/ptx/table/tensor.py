"""Products of small matrices in a warp (PTX ISA, "Warp Level Matrix Instructions")."""

from __future__ import annotations

from collections.abc import Iterator

from .record import Form

_SECTION = "Warp Level Matrix Instructions"
_CONVERGE = frozenset({"converge"})


def _mma(shape: str, a: int, b: int, c: int, types: str, d_types: str, target: int,
         version: tuple[int, int] = (7, 0), register: str = "b32",
         sat: str = "", end: str = "") -> Form:  # fmt: skip
    """`mma.sync` of one shape with `a`, `b` and `c` registers a lane for each operand.

    `d_types` is the accumulators' type; `types` those of A and B, which are the same, or `A B`
    when each of the two may be either.
    """
    mixed = " " in types and types.split()[0][0] in "us" or types.startswith("e4m3 ")
    pair = "A B" if mixed else "A A"
    return Form(
        "mma", f"sync aligned {shape} row col {sat}D {pair} D{end}",
        f">d:{d_types}*{c} a:{register}*{a} b:{register}*{b} c:{d_types}*{c}", "tensor.mma",
        _SECTION, {"D": d_types if c else "", "A": types, "B": types}, version, target,
        effects=_CONVERGE, summary="a * b + c",
    )  # fmt: skip


def _f16(shape: str, a: int, b: int, c: int, target: int, version: tuple[int, int]) -> Form:
    """Products of f16 with f16 accumulators, two in a register."""
    return Form(
        "mma", f"sync aligned {shape} row col f16 f16 f16 f16",
        f">d:b32*{c} a:b32*{a} b:b32*{b} c:b32*{c}", "tensor.mma", _SECTION,
        {}, version, target, effects=_CONVERGE, summary="a * b + c, in f16",
    )  # fmt: skip


def _sparse(shape: str, a: int, b: int, types: str, result: str, sat: str = "",
            since: tuple[int, tuple[int, int]] = (80, (7, 1))) -> Iterator[Form]:  # fmt: skip
    """Products with an A of which half is zero; see `_mma`."""
    register, count = ("b32", 2) if result == "f16" else (result, 4)
    pair = "A B" if len(types.split()) > 1 else "A A"
    for sparse, version in (("sp", since[1]), ("sp::ordered_metadata", (8, 5))):
        yield Form(
            "mma", f"{sparse} sync aligned {shape} row col {sat}D {pair} D",
            f">d:{register}*{count} a:b32*{a} b:b32*{b} c:{register}*{count} e:b32 #selector:u32",
            "tensor.mma_sparse", _SECTION, {"D": result, "A": types, "B": types},
            version, since[0], effects=_CONVERGE,
            summary="a * b + c, where e says which half of a's elements are there",
        )  # fmt: skip


def _quads(result: str, before: str) -> Form:
    """Four products of 8x8x4 in a warp, each by two groups of four lanes."""
    d, c = ("f32*8" if kind == "f32" else "b32*4" for kind in (result, before))
    return Form(
        "mma", f"sync aligned m8n8k4 LA LB {result} f16 f16 {before}",
        f">d:{d} a:b32*2 b:b32*2 c:{c}", "tensor.mma_quads", _SECTION,
        {"LA": "row col", "LB": "row col"}, (6, 4), 70, effects=_CONVERGE,
        summary="a * b + c, four times in a warp",
    )  # fmt: skip


FORMS = (
    _quads("f32", "f32"),
    _quads("f32", "f16"),
    _quads("f16", "f16"),
    _mma("m16n8k8", 2, 1, 4, "f16", "f32", 75, (6, 5)),
    _mma("m16n8k16", 4, 2, 4, "f16", "f32", 80),
    _f16("m16n8k8", 2, 1, 2, 75, (6, 5)),
    _f16("m16n8k16", 4, 2, 2, 80, (7, 0)),
    _mma("m16n8k8", 2, 1, 4, "bf16", "f32", 80),
    _mma("m16n8k16", 4, 2, 4, "bf16", "f32", 80),
    _mma("m16n8k4", 2, 1, 4, "tf32", "f32", 80),
    _mma("m16n8k8", 4, 2, 4, "tf32", "f32", 80),
    _mma("m16n8k32", 4, 2, 4, "e4m3 e5m2", "f32", 89, (8, 4)),
    _mma("m16n8k16", 2, 1, 4, "e4m3 e5m2", "f32", 89, (8, 7)),
    *(
        Form("mma", f"sync aligned {shape} row col f16 A B f16",
             f">d:b32*2 a:b32*{a} b:b32*{b} c:b32*2", "tensor.mma", _SECTION,
             {"A": "e4m3 e5m2", "B": "e4m3 e5m2"}, (8, 7), 89, effects=_CONVERGE,
             summary="a * b + c, in f16")
        for shape, a, b in (("m16n8k16", 2, 1), ("m16n8k32", 4, 2))
    ),
    _mma("m8n8k16", 1, 1, 2, "u8 s8", "s32", 75, (6, 5), sat="?satfinite "),
    _mma("m16n8k16", 2, 1, 4, "u8 s8", "s32", 80, sat="?satfinite "),
    _mma("m16n8k32", 4, 2, 4, "u8 s8", "s32", 80, sat="?satfinite "),
    _mma("m8n8k32", 1, 1, 2, "u4 s4", "s32", 75, (6, 5), sat="?satfinite "),
    _mma("m16n8k32", 2, 1, 4, "u4 s4", "s32", 80, sat="?satfinite "),
    _mma("m16n8k64", 4, 2, 4, "u4 s4", "s32", 80, sat="?satfinite "),
    _mma("m8n8k4", 1, 1, 2, "f64", "f64", 80, register="f64"),
    _mma("m16n8k4", 2, 1, 4, "f64", "f64", 90, (7, 8), register="f64"),
    _mma("m16n8k8", 4, 2, 4, "f64", "f64", 90, (7, 8), register="f64"),
    _mma("m16n8k16", 8, 4, 4, "f64", "f64", 90, (7, 8), register="f64"),
    *(
        Form("mma", f"sync aligned {shape} row col s32 A A s32 {joined} popc",
             f">d:s32*{c} a:b32*{a} b:b32*{b} c:s32*{c}", "tensor.mma", _SECTION,
             {"A": "b1", "joined": joined}, version, target, effects=_CONVERGE,
             summary="the number of ones of a and b joined bit by bit, plus c")
        for shape, a, b, c, first in (("m8n8k128", 1, 1, 2, 75), ("m16n8k128", 2, 1, 4, 80),
                                      ("m16n8k256", 4, 2, 4, 80))
        for joined, version, target in (("xor", (7, 0), first), ("and", (7, 1), 80))
    ),
    *(_mma(shape, a, b, c, types, "s32", 75 if shape[1] == "8" else 80, end=" satfinite")
      for shape, a, b, c, types in (("m8n8k16", 1, 1, 2, "u8 s8"), ("m16n8k16", 2, 1, 4, "u8 s8"),
                                    ("m16n8k32", 4, 2, 4, "u8 s8"), ("m8n8k32", 1, 1, 2, "u4 s4"),
                                    ("m16n8k32", 2, 1, 4, "u4 s4"),
                                    ("m16n8k64", 4, 2, 4, "u4 s4"))),
    *_sparse("m16n8k16", 2, 2, "f16", "f16"),
    *_sparse("m16n8k32", 4, 4, "f16", "f16"),
    *_sparse("m16n8k16", 2, 2, "f16", "f32"),
    *_sparse("m16n8k32", 4, 4, "f16", "f32"),
    *_sparse("m16n8k16", 2, 2, "bf16", "f32"),
    *_sparse("m16n8k32", 4, 4, "bf16", "f32"),
    *_sparse("m16n8k8", 2, 2, "tf32", "f32"),
    *_sparse("m16n8k16", 4, 4, "tf32", "f32"),
    *_sparse("m16n8k32", 2, 2, "u8 s8", "s32", "?satfinite "),
    *_sparse("m16n8k64", 4, 4, "u8 s8", "s32", "?satfinite "),
    *_sparse("m16n8k64", 2, 2, "u4 s4", "s32", "?satfinite "),
    *_sparse("m16n8k128", 4, 4, "u4 s4", "s32", "?satfinite "),
    *_sparse("m16n8k64", 4, 4, "e4m3 e5m2", "f32", since=(89, (8, 4))),
    Form("ldmatrix", "sync aligned m8n8 N ?trans ?S b16", ">d:b32*N [a:shared]", "tensor.ldmatrix",
         _SECTION, {"N": "x1 x2 x4", "S": "shared shared::cta"}, (6, 5), 75,
         effects=_CONVERGE | {"reads"}, summary="8x8 matrices of 16-bit elements from rows"),
    Form("stmatrix", "sync aligned m8n8 N ?trans ?S b16", "[a:shared] b:b32*N", "tensor.stmatrix",
         _SECTION, {"N": "x1 x2 x4", "S": "shared shared::cta"}, (7, 8), 90,
         effects=_CONVERGE | {"writes"}, summary="8x8 matrices of 16-bit elements to rows"),
    Form("movmatrix", "sync aligned m8n8 trans b16", ">d:b32 a:b32", "tensor.movmatrix", _SECTION,
         {}, (7, 8), 75, effects=_CONVERGE, summary="an 8x8 matrix transposed"),
)  # fmt: skip
