"""Barriers that live in shared memory (PTX ISA, "Parallel Synchronization": mbarrier)."""

from __future__ import annotations

from .record import Form

_SECTION = "Parallel Synchronization and Communication Instructions: mbarrier"
_BARRIER = frozenset({"barrier"})
_SPACES = {"S": "shared shared::cta shared::cluster", "W": "cta cluster"}


def _mbarrier(modifiers: str, operands: str, summary: str, meaning: str = "",
              version: tuple[int, int] = (7, 0), target: int = 80) -> Form:  # fmt: skip
    choices = _SPACES | {"R": "release relaxed", "A": "acquire relaxed"}
    return Form("mbarrier", modifiers, operands, f"mbarrier.{meaning or modifiers.split()[0]}",
                _SECTION, choices, version, target, effects=_BARRIER, summary=summary)  # fmt: skip


def _arrivals(opcode: str, drop: str) -> tuple[Form, ...]:
    return (
        _mbarrier(f"{opcode} ?R ?W ?S b64", ">d:b64 [a] n:u32?", f"arrive{drop}; the phase before",
                  version=(7, 0)),
        _mbarrier(f"{opcode} expect_tx ?R ?W ?S b64", ">d:b64 [a] n:u32",
                  f"expect n more bytes, then arrive{drop}", f"{opcode}_expect_tx", (8, 0), 90),
        _mbarrier(f"{opcode} noComplete ?R ?W ?S b64", ">d:b64 [a] n:u32",
                  f"arrive{drop} without completing the phase", f"{opcode}"),
    )  # fmt: skip


FORMS = (
    _mbarrier("init ?S b64", "[a] n:u32", "a barrier that n arrivals complete"),
    _mbarrier("inval ?S b64", "[a]", "the memory is no barrier any more"),
    _mbarrier("expect_tx ?R ?W ?S b64", "[a] n:u32", "expect n more bytes", "", (8, 0), 90),
    _mbarrier("complete_tx ?R ?W ?S b64", "[a] n:u32", "n bytes have come", "", (8, 0), 90),
    *_arrivals("arrive", ""),
    *_arrivals("arrive_drop", " for good"),
    _mbarrier("test_wait ?A ?W ?S b64", ">p:pred [a] b:b64", "whether that phase is complete"),
    _mbarrier("test_wait parity ?A ?W ?S b64", ">p:pred [a] b:u32",
              "whether the phase of that parity is complete", "test_wait_parity", (7, 1)),
    _mbarrier("try_wait ?A ?W ?S b64", ">p:pred [a] b:b64 t:u32?",
              "wait a while; whether that phase is complete", "try_wait", (7, 8), 90),
    _mbarrier("try_wait parity ?A ?W ?S b64", ">p:pred [a] b:u32 t:u32?",
              "wait a while; whether the phase of that parity is complete", "try_wait_parity",
              (7, 8), 90),
    _mbarrier("pending_count b64", ">d:u32 a:b64", "the arrivals that a phase still lacked"),
    Form("cp", "async mbarrier arrive ?noinc ?S b64", "[a]", "mbarrier.async_arrive", _SECTION,
         {"S": "shared shared::cta"}, (7, 0), 80, effects=frozenset({"async", "barrier"}),
         summary="arrive when this thread's copies so far are complete"),
    Form("fence", "mbarrier_init release cluster", "", "barrier.fence_init", _SECTION, {}, (8, 0),
         90, effects=_BARRIER, summary="order the initialisation of barriers"),
)  # fmt: skip
