"""Instructions of a whole warp, and atomics (PTX ISA, "Parallel Synchronization")."""

from __future__ import annotations

from .record import Form

_SECTION = "Parallel Synchronization and Communication Instructions"
_CONVERGE = frozenset({"converge"})
_ATOMIC = frozenset({"reads", "writes"})


def _warp(opcode: str, modifiers: str, operands: str, summary: str, meaning: str,
          version: tuple[int, int] = (6, 0), target: int = 30, **choices: str) -> Form:  # fmt: skip
    return Form(opcode, modifiers, operands, meaning, _SECTION, choices, version, target,
                effects=_CONVERGE, summary=summary)  # fmt: skip


def _atom(words: str, types: str, summary: str, target: int = 11, version: tuple[int, int] = (1, 1),
          mid: str = "", operands: str = "[a] b:T") -> tuple[Form, ...]:  # fmt: skip
    """`atom` and `red` of these operations; `exch` has no `red`."""
    forms = []
    for opcode, result in (("atom", ">d:T "), ("red", "")):
        if opcode == "red":
            words = " ".join(w for w in words.split() if w != "exch")
            if not words:
                continue
        orders = "relaxed acquire release acq_rel" if opcode == "atom" else "relaxed release"
        for head, scopes, spaces, since in _HEADS:
            forms.append(
                Form(opcode, f"{head} op {mid}?hint T", f"{result}{operands} h:b64?",
                     f"atomic.{opcode}", _SECTION,
                     {"op": words, "T": types, "scope": scopes, "space": spaces,
                      "order": orders},
                     max(version, (since, 0)), max(target, {1: 0, 5: 70, 7: 90}[since]),
                     effects=_ATOMIC, summary=summary)
            )  # fmt: skip
    return tuple(forms)


_HEADS = (
    ("?space", "", "global shared shared::cta", 1),
    ("?order ?scope ?space", "cta gpu sys", "global shared shared::cta", 5),
    ("?order ?scope ?space", "cta cluster gpu sys", "global shared shared::cta shared::cluster", 7),
)
"""Modifiers before the operation, their words, and the PTX version that brought them."""

FORMS = (
    _warp("vote", "sync op pred", ">d:pred !a:pred m:b32", "whether a holds for all, any, or alike",
          "warp.vote", op="all any uni"),
    _warp("vote", "sync ballot b32", ">d:b32 !a:pred m:b32", "a bit for each lane where a holds",
          "warp.ballot"),
    _warp("shfl", "sync mode b32", ">d:b32|p a:b32 b:b32 c:b32 m:b32",
          "a of another lane; p: whether it is within the segment", "warp.shfl",
          mode="up down bfly idx"),
    _warp("match", "any sync T", ">d:b32 a:T m:b32", "the lanes with the same a", "warp.match_any",
          target=70, T="b32 b64"),
    _warp("match", "all sync T", ">d:b32|p a:T m:b32", "the mask where all have the same a, else 0",
          "warp.match_all", target=70, T="b32 b64"),
    _warp("redux", "sync op T", ">d:T a:T m:b32", "the reduction of a over lanes", "warp.redux",
          (7, 0), 80, op="add min max", T="u32 s32"),
    _warp("redux", "sync bool b32", ">d:b32 a:b32 m:b32", "the reduction of a over lanes",
          "warp.redux", (7, 0), 80),
    Form("activemask", "b32", ">d:b32", "warp.activemask", _SECTION, {}, (6, 2), 30,
         summary="the lanes that execute this together"),
    _warp("elect", "sync", ">d:b32|p m:b32", "the lowest lane of a mask; p: whether this is it",
          "warp.elect", (8, 0), 90),
    *_atom("and or xor exch", "b32", "an operation on memory that nothing interrupts"),
    *_atom("and or xor exch", "b64", "an operation on memory that nothing interrupts", 32, (3, 1)),
    *_atom("add inc dec min max", "u32", "an operation on memory that nothing interrupts"),
    *_atom("add min max", "s32", "an operation on memory that nothing interrupts"),
    *_atom("add min max", "u64", "an operation on memory that nothing interrupts", 32, (3, 1)),
    *_atom("min max", "s64", "an operation on memory that nothing interrupts", 32, (3, 1)),
    *_atom("add", "f32", "an addition in memory that nothing interrupts", 20, (2, 0)),
    *_atom("add", "f64", "an addition in memory that nothing interrupts", 60, (5, 0)),
    *_atom("add", "f16 f16x2", "an addition in memory; each half on its own", 70, (6, 3),
           "noftz "),
    *_atom("add", "bf16 bf16x2", "an addition in memory; each half on its own", 90, (7, 8),
           "noftz "),
    *(
        Form("atom", f"{head} cas T", ">d:T [a] b:T c:T", "atomic.cas", _SECTION,
             {"T": types, "scope": scopes, "space": spaces}, max(version, (since, 0)),
             max(target, {1: 0, 5: 70, 7: 90}[since]), effects=_ATOMIC,
             summary="c where memory holds b; the old value")
        for types, version, target in (("b32", (1, 1), 11), ("b64", (1, 2), 12),
                                       ("b16", (6, 3), 70), ("b128", (8, 3), 90))
        for head, scopes, spaces, since in _HEADS
    ),
    *_atom("exch", "b128", "an exchange of 16 bytes", 90, (8, 3)),
    *(
        Form(opcode, f"?order ?scope ?global op {mid}?hint vec T",
             f"{result}[a:global] b:T*vec h:b64?", f"atomic.{opcode}", _SECTION,
             {"op": ops, "T": types, "vec": counts, "order": orders}, (8, 1), 90, effects=_ATOMIC,
             summary="an operation on memory for each element")
        for opcode, result, orders in (("atom", ">d:T*vec ", "relaxed acquire release acq_rel"),
                                       ("red", "", "relaxed release"))
        for ops, mid, types, counts in (("add", "", "f32", "v2 v4"),
                                        ("add min max", "noftz ", "f16 bf16", "v2 v4 v8"),
                                        ("add min max", "noftz ", "f16x2 bf16x2", "v2 v4"))
    ),
)  # fmt: skip
