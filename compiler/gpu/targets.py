"""Descriptions of GPUs: what schedules and predictions know of a device, without having one.

Figures are the makers' data sheets' for the SXM or PCIe card named, and the compute capability
tables of the CUDA C++ Programming Guide. Clocks are boost clocks.
"""

from __future__ import annotations

from stagefuse.dsl.frozen import frozen


@frozen
class Arch:
    """What all devices of a compute capability share. Sizes in bytes, of an SM or a block."""

    name: str
    registers: int
    threads: int
    blocks: int
    shared: int
    block_shared: int
    reserved_shared: int = 1024  # of every block
    register_unit: int = 256  # registers are given to warps in such pieces
    fp32_lanes: int = 64


ARCHES = {
    "sm_80": Arch("sm_80", 65536, 2048, 32, 164 << 10, 163 << 10),
    "sm_89": Arch("sm_89", 65536, 1536, 24, 100 << 10, 99 << 10, fp32_lanes=128),
    "sm_90a": Arch("sm_90a", 65536, 2048, 32, 228 << 10, 227 << 10, fp32_lanes=128),
}
SHARED_LIMIT = 96 << 10
"""Shared memory of a block that every arch has; kernels are the same for all."""


@frozen
class Target:
    """A device: streaming multiprocessors, clock in GHz, memory bandwidth in GB/s, dense
    tensor-core rates in TFLOP/s for bf16, tf32 and 8-bit operands, and the L2 cache in MB. Those of
    f8 on devices without it are those of f16, into which it is converted."""

    name: str
    arch: Arch
    sms: int
    clock: float
    bandwidth: float
    tensor_bf16: float
    tensor_tf32: float
    tensor_eights: float
    cache: int
    start: float = 1.2  # microseconds of a kernel that does nothing much, in a graph

    def rate(self, arithmetic: str) -> float:
        """TFLOP/s: of "f32" without tensor cores, of f32 as three products of "tf32", and of
        "half", bf16 or f16, and of "eights", operands of 8 bits."""
        if arithmetic == "eights":
            return self.tensor_eights
        if arithmetic == "half":
            return self.tensor_bf16
        if arithmetic == "tf32":
            return self.tensor_tf32 / 3
        return self.sms * self.arch.fp32_lanes * 2 * self.clock / 1000


TARGETS = {
    t.name: t
    for t in (
        Target("a100", ARCHES["sm_80"], 108, 1.41, 2039, 312, 156, 624, 40),
        Target("l20", ARCHES["sm_89"], 92, 2.52, 864, 119.5, 59.8, 239, 96),
        Target("l40", ARCHES["sm_89"], 142, 2.49, 864, 181, 90.5, 362, 96),
        Target("h100", ARCHES["sm_90a"], 132, 1.98, 3350, 989, 494, 1979, 50),
        Target("h200", ARCHES["sm_90a"], 132, 1.98, 4800, 989, 494, 1979, 50),
        Target("h20", ARCHES["sm_90a"], 78, 1.98, 4000, 148, 74, 296, 60),
    )
}
_REACHED = 0.89
"""The share of a data sheet's bandwidth that a copy reaches: 2967 of 3350 GB/s on an H100."""
_CACHED = 1.75
"""How much quicker the L2 cache is: sums of parts just written, 5.2 TB/s on an H100."""
_LATENCY = 0.7  # microseconds from a load to its data, with memory busy
_LOADED = 0.62
"""The same of lanes' own loads: transposes of f32 and f16 that had one load of a warp under way at
a time took 208 and 150 microseconds on an H100 and on an H200."""
_IN_FLIGHT = 64  # bytes that a thread has under way by copies: four of 16
_SCHEDULERS = 4  # of an SM, each of which issues an instruction of a warp in a clock
_OTHER_REGISTERS = 8  # of a thread, which hold addresses


def arithmetic_of(text: str) -> str:
    """What a kernel's PTX multiplies with, as `Target.rate` has it."""
    if "mma" not in text:
        return "f32"
    if ".tf32" in text:
        return "tf32"
    return "eights" if "k32." in text else "half"


def occupancy(arch: Arch, threads: int, registers: int, shared: int) -> tuple[int, str]:
    """Blocks that an SM holds at a time, and what limits them."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // arch.register_unit) * arch.register_unit
    limits = {
        "threads": arch.threads // (warps * 32),
        "blocks": arch.blocks,
        "registers": arch.registers // max(per_warp * warps, 1),
        "shared memory": arch.shared // (shared + arch.reserved_shared),
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def loaded_ahead(ahead: int, registers: int) -> int:
    """Bytes that a thread with so many registers has loads under way for, of those it could."""
    return min(ahead, max(registers - _OTHER_REGISTERS, 4) * 4)


def predicted(
    target: Target,
    moved: int,
    flops: int,
    grid: int,
    threads: int,
    resident: int,
    arithmetic: str = "f32",
    cached: int = 0,
    read: int = 0,
    ahead: int = 0,
    instructions: int = 0,
) -> tuple[float, str]:
    """Microseconds that a kernel takes at least, and what bounds it: start, memory, loads,
    instructions, arithmetic.

    Memory is as fast as the threads that run at once keep loads under way (Little's law): `ahead`
    bytes each, if that is known, of the `read` ones; otherwise so much of all by copies. An SM
    computes at full rate from two blocks on. A round of the blocks that fit at once, of which
    there is one at least, takes what a load does and what issuing their `instructions` does.
    `cached` bytes of those moved may be in the L2 cache. No blocks take no time: another kernel
    does the work.
    """
    if not grid:
        return 0.0, "nothing to do"
    at_once = min(grid, target.sms * resident)
    most = target.bandwidth * 1e3 * _LATENCY  # bytes under way at full bandwidth
    kept = 1.0 if ahead else min(at_once * threads * _IN_FLIGHT / most, 1.0)
    filled = min(at_once / (target.sms * min(resident, 2)), 1.0)
    far = moved - cached + cached / _CACHED if cached <= target.cache << 19 else moved
    rounds = max(grid / (target.sms * resident), 1.0)
    beside = min(resident, -(-grid // target.sms))
    issue = beside * -(-threads // 32) * instructions / (_SCHEDULERS * target.clock * 1e3)
    times = {
        "start": target.start,
        "memory": far / (target.bandwidth * 1e3 * _REACHED * kept),
        "loads": read * _LOADED / (at_once * threads * ahead) * far / max(moved, 1) if ahead else 0,
        "instructions": rounds * (_LOADED + issue) if ahead else 0,
        "arithmetic": flops / (target.rate(arithmetic) * 1e6 * filled),
    }
    bound = max(times, key=lambda name: times[name])
    return target.start + max(time for name, time in times.items() if name != "start"), bound
