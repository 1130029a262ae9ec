"""Control flow, barriers and fences (PTX ISA, "Control Flow", "Parallel Synchronization")."""

from __future__ import annotations

from .record import Form

_CONTROL = "Control Flow Instructions"
_SYNC = "Parallel Synchronization and Communication Instructions"
_MISC = "Miscellaneous Instructions"


def _control(opcode: str, modifiers: str, operands: str, summary: str, meaning: str = "",
             version: tuple[int, int] = (1, 0), target: int = 0) -> Form:  # fmt: skip
    return Form(opcode, modifiers, operands, meaning or f"control.{opcode}", _CONTROL, {}, version,
                target, effects=frozenset({"control"}), summary=summary)  # fmt: skip


def _sync(opcode: str, modifiers: str, operands: str, summary: str, meaning: str,
          version: tuple[int, int] = (1, 0), target: int = 0, **choices: str) -> Form:  # fmt: skip
    return Form(opcode, modifiers, operands, meaning, _SYNC, choices, version, target,
                effects=frozenset({"barrier"}), summary=summary)  # fmt: skip


def _barriers(opcode: str, aligned: str, version: tuple[int, int], target: int) -> tuple[Form, ...]:
    """The forms of `bar` and of `barrier`, which differ in how threads of a warp must meet."""
    return (
        _sync(opcode, f"?cta sync{aligned}", "a:u32 b:u32?", "wait for the threads of a barrier",
              "barrier.sync", version, target),
        _sync(opcode, f"?cta arrive{aligned}", "a:u32 b:u32", "be counted, without waiting",
              "barrier.arrive", version, target),
        _sync(opcode, f"?cta red popc{aligned} u32", ">d:u32 a:u32 !c:pred",
              "wait; the number of threads where c", "barrier.red", version, target),
        _sync(opcode, f"?cta red popc{aligned} u32", ">d:u32 a:u32 b:u32 !c:pred",
              "wait; the number of threads where c", "barrier.red", version, target),
        _sync(opcode, f"?cta red op{aligned} pred", ">d:pred a:u32 !c:pred",
              "wait; whether c holds for all, or any", "barrier.red", version, target, op="and or"),
        _sync(opcode, f"?cta red op{aligned} pred", ">d:pred a:u32 b:u32 !c:pred",
              "wait; whether c holds for all, or any", "barrier.red", version, target, op="and or"),
    )  # fmt: skip


FORMS = (
    _control("bra", "?uni", "@target", "go to a label"),
    _control("brx", "idx ?uni", "a:u32 @targets", "go to a label of a list", "control.brx",
             (6, 0), 30),
    _control("call", "?uni", "(results)? @function (arguments)? @prototype?", "call a function"),
    _control("ret", "?uni", "", "return from a function; from an entry, end the thread"),
    _control("exit", "", "", "end the thread"),
    _control("trap", "", "", "abort the launch"),
    *_barriers("bar", "", (1, 0), 0),
    *_barriers("barrier", " ?aligned", (6, 0), 30),
    _sync("bar", "warp sync", "a:b32", "wait for the lanes of a mask", "barrier.warp", (6, 0), 30),
    _sync("membar", "level", "", "order memory accesses", "barrier.fence", level="cta gl sys"),
    _sync("membar", "proxy alias", "", "order accesses through aliases", "barrier.proxy", (7, 5),
          70),
    _sync("fence", "?O S", "", "order memory accesses", "barrier.fence", (6, 0), 70,
          O="sc acq_rel", S="cta gpu sys"),
    _sync("fence", "?O S", "", "order memory accesses", "barrier.fence", (7, 8), 90,
          O="sc acq_rel", S="cluster"),
    _sync("fence", "O S", "", "order memory accesses one way", "barrier.fence", (8, 6), 90,
          O="acquire release", S="cta cluster gpu sys"),
    *(
        form
        for order, space in (("acquire", "cluster"), ("release", "cta"))
        for form in (
            _sync("fence", f"{order} sync_restrict::shared::{space} S", "",
                  "order accesses to mbarriers one way", "barrier.fence", (8, 6), 90, S="cluster"),
            _sync("fence", f"proxy async::generic {order} sync_restrict::shared::{space} S", "",
                  "order accesses of both proxies one way", "barrier.proxy", (8, 6), 90,
                  S="cluster"),
        )
    ),
    _sync("fence", "proxy alias", "", "order accesses through aliases", "barrier.proxy", (7, 5),
          70),
    _sync("fence", "proxy async ?P", "", "order accesses of the asynchronous proxy",
          "barrier.proxy", (8, 0), 90, P="global shared::cta shared::cluster"),
    _sync("griddepcontrol", "W", "", "order dependent grids", "barrier.griddepcontrol", (7, 8), 90,
          W="launch_dependents wait"),
    Form("nanosleep", "u32", "a:u32", "misc.nanosleep", _MISC, {}, (6, 3), 70,
         summary="give up the processor for a while"),
    Form("brkpt", "", "", "control.trap", _MISC, effects=frozenset({"control"}),
         summary="stop at a breakpoint"),
    Form("pmevent", "", "#a:u32", "misc.nothing", _MISC, summary="trigger a performance event"),
    Form("pmevent", "mask", "#a:u32", "misc.nothing", _MISC, {}, (3, 0), 20,
         summary="trigger performance events"),
)  # fmt: skip
