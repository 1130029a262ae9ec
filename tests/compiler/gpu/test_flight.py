"""What is read from a kernel's PTX for predictions: loads under way, and instructions."""

from __future__ import annotations

from pathlib import Path

from stagefuse.compiler.gpu.flight import Flight, flight_of
from stagefuse.compiler.gpu.targets import TARGETS, loaded_ahead, predicted
from stagefuse.dsl.dims import const, sym
from stagefuse.dsl.dims_text import parse

from .gpu_run import compiled, launches

ENTRY = """.visible .entry k(
\t.param .u64 k_0
) .reqntid 256, 1, 1
{{
\t.reg .f32 %f<9>;
\tld.param.u64 %rd1, [k_0];
\t// a comment
\t.loc 1 3 0
{}
$end:
\tret;
}}
"""


def _flight(*lines: str) -> Flight:
    text = "\n".join(x if x.startswith("$") else f"\t{x}" for x in lines)
    return flight_of(ENTRY.format(text), {"$loop7": sym("N")})


LOAD = "ld.global.nc.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1];"
STORE = "st.shared.f32 [%r1], %f1;"


def test_loads_that_only_some_lanes_do_wait_for_each_other() -> None:
    assert _flight(LOAD, STORE, LOAD, STORE) == Flight(32, const(6))
    some = [f"@%p1 {x}" for x in (LOAD, STORE)]
    assert _flight(*some, *some).ahead == 16
    assert _flight(some[0], some[0], some[1]).ahead == 32


def test_lanes_that_meet_wait_for_what_they_load() -> None:
    meet = "shfl.sync.bfly.b32 %f5, %f1, 16, 31, 0xffffffff;"
    assert _flight(LOAD, meet, LOAD, LOAD).ahead == 32
    assert _flight("ld.global.b16 %h1, [%rd1];").ahead == 2
    assert _flight("cp.async.cg.shared.global [%r1], [%rd1], 16;", LOAD).ahead == 0


def test_the_shortest_way_counts() -> None:
    found = _flight(
        "@!%p1 bra $else2;", LOAD, "bra $done1;", "$else2:", LOAD, LOAD, STORE, STORE, "$done1:"
    )
    assert found == Flight(32, const(5))
    assert _flight("@%p1 bra $else1;", LOAD, STORE, "$else1:").instructions == const(3)
    loop = _flight("$loop1:", "@!%p1 bra $end1;", LOAD, "bra $loop1;", "$end1:")
    assert loop == Flight(16, const(5))
    assert _flight("div.u32 %r1, %r2, %r3;").instructions == const(23)


def test_loops_count_as_often_as_sizes_say() -> None:
    loop = ["$loop7:", "@!%p1 bra $end1;", LOAD, "bra $loop7;", "$end1:"]
    assert _flight(*loop).instructions == 2 + 3 * sym("N")
    assert _flight("@!%p1 bra $end2;", *loop, "$end2:").instructions == 3 + 3 * sym("N")


def test_a_lane_loops_over_what_it_sums(tmp_path: Path) -> None:
    """Twice as many elements are nearly twice as many instructions of each lane."""
    text = "pipeline p(x: f32[A, 128, 512]) -> f32[128]:\n    sum(x, axis=(0, 2))\n"
    (launch,) = launches(compiled(tmp_path / "p.pipe", text, ("sm_90a",)))[:1]
    issued = parse(str(launch.report["instructions"]))
    assert issued.symbols() == {"A"}
    assert issued.evaluate({"A": 1 << 15}) > 1.9 * issued.evaluate({"A": 1 << 14})


def test_registers_bound_what_is_loaded_ahead() -> None:
    assert loaded_ahead(128, 32) == 96
    assert loaded_ahead(64, 40) == 64


def test_one_round_waits_for_its_loads_and_issues_its_instructions() -> None:
    h200 = TARGETS["h200"]

    def time(grid: int, ahead: int = 16) -> float:
        return predicted(h200, 1024, 0, grid, 256, 4, read=512, ahead=ahead, instructions=99)[0]

    assert time(1, 0) < h200.start + 0.1
    assert time(132) == time(1) > h200.start + 0.6
    assert time(1) < time(2 * 132) < time(4 * 132) < time(5 * 132)


def test_what_a_kernel_never_reads_counts_nothing(tmp_path: Path) -> None:
    """Of the counts of all tiles, where digits start is in those of the last one."""
    text = "pipeline p(x: f32[N]) -> f32[N]\nwhere N in 0..=20000000:\n    sort(x)\n"
    found = launches(compiled(tmp_path / "p.pipe", text, ("sm_90a",)))
    starts = [x for x in found if "starts" in x.kernel]
    assert starts and all(x.report["bytes"] == str(2 * 256 * 4) for x in starts)
