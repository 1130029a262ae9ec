"""Barriers that live in shared memory (PTX ISA, "Parallel Synchronization": mbarrier)."""

from __future__ import annotations

from .record import Form

_SECTION = "Parallel Synchronization and Communication Instructions: mbarrier"
_BARRIER = frozenset({"barrier"})
_OWN, _ANY = "shared shared::cta", "shared shared::cta shared::cluster"


def _mbarrier(modifiers: str, operands: str, summary: str, meaning: str = "",
              version: tuple[int, int] = (7, 0), target: int = 80,
              **choices: str) -> Form:  # fmt: skip
    choices = {"S": _OWN, "W": "cta cluster"} | choices
    return Form("mbarrier", modifiers, operands, f"mbarrier.{meaning or modifiers.split()[0]}",
                _SECTION, choices, version, target, effects=_BARRIER, summary=summary)  # fmt: skip


def _arrivals(opcode: str, drop: str) -> tuple[Form, ...]:
    """Arrivals, with or without an order; on another block's barrier they give no state."""
    forms = [
        _mbarrier(f"{opcode} release W ?S b64", ">d:b64 [a:shared]",
                  f"arrive{drop}; the phase before", "", (8, 0), W="cta")
    ]  # fmt: skip
    for words, first, orders in (("", (7, 0), ""), ("R W ", (8, 0), "release relaxed")):
        for sink, space, result in ((False, "?S", ">d:b64"), (True, "S", ">_:b64")):
            spaces = "shared::cluster" if sink else _OWN
            remote = sink or "R" in words
            forms += [
                _mbarrier(f"{opcode} {words}{space} b64", f"{result} [a:shared] n:u32?",
                          f"arrive{drop}; the phase before", "", (8, 0) if remote else first,
                          90 if remote else 80, R=orders, S=spaces),
                _mbarrier(f"{opcode} expect_tx {words}{space} b64", f"{result} [a:shared] n:u32",
                          f"expect n more bytes, then arrive{drop}", f"{opcode}_expect_tx", (8, 0),
                          90, R=orders, S=spaces),
            ]  # fmt: skip
    forms += [
        _mbarrier(f"{opcode} noComplete {words}?S b64", ">d:b64 [a:shared] n:u32",
                  f"arrive{drop} without completing the phase", "", first, 80, W="cta")
        for words, first in (("", (7, 0)), ("release W ", (8, 0)))
    ]  # fmt: skip
    return tuple(forms)


def _waits(opcode: str, version: tuple[int, int], target: int, hint: str) -> tuple[Form, ...]:
    forms = []
    for words, first, level in (("", version, target), ("acquire cta ", (8, 0), target),
                                ("A W ", (8, 0), 90)):  # fmt: skip
        forms += [
            _mbarrier(f"{opcode} {words}?S b64", f">p:pred [a:shared] b:b64{hint}",
                      "whether that phase is complete", "", first, level, A="acquire relaxed"),
            _mbarrier(f"{opcode} parity {words}?S b64", f">p:pred [a:shared] b:u32{hint}",
                      "whether the phase of that parity is complete", f"{opcode}_parity",
                      max(first, (7, 1)), level, A="acquire relaxed"),
        ]  # fmt: skip
    return tuple(forms)


def _bytes(opcode: str, summary: str) -> tuple[Form, ...]:
    return tuple(
        _mbarrier(f"{opcode} {words}?S b64", "[a:shared] n:u32", summary, "", (8, 0), 90, S=_ANY)
        for words in ("", "relaxed W ")
    )


FORMS = (
    _mbarrier("init ?S b64", "[a:shared] n:u32", "a barrier that n arrivals complete"),
    _mbarrier("inval ?S b64", "[a:shared]", "the memory is no barrier any more"),
    *_bytes("expect_tx", "expect n more bytes"),
    *_bytes("complete_tx", "n bytes have come"),
    *_arrivals("arrive", ""),
    *_arrivals("arrive_drop", " for good"),
    *_waits("test_wait", (7, 0), 80, ""),
    *_waits("try_wait", (7, 8), 90, " t:u32?"),
    _mbarrier("pending_count b64", ">d:u32 a:b64", "the arrivals that a phase still lacked"),
    Form("cp", "async mbarrier arrive ?noinc ?S b64", "[a:shared]", "mbarrier.async_arrive",
         _SECTION, {"S": "shared shared::cta"}, (7, 0), 80,
         effects=frozenset({"async", "barrier"}),
         summary="arrive when this thread's copies so far are complete"),
    Form("fence", "mbarrier_init release cluster", "", "barrier.fence_init", _SECTION, {}, (8, 0),
         90, effects=_BARRIER, summary="order the initialisation of barriers"),
)  # fmt: skip
