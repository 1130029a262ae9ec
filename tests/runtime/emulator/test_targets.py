"""A module is refused that uses what its target or its PTX version does not have."""

from __future__ import annotations

import pytest

from stagefuse.compiler.ptx import PtxError
from stagefuse.runtime import emulator

MODULE = """.version {version}
.target {target}
.address_size 64
.visible .entry k(){directive}
{{
    .reg .pred %p<2>;
    .reg .b16 %h<2>;
    .reg .b32 %r<3>;
    .reg .b64 %d<2>;
    .reg .f32 %f<2>;
    {instruction}
    ret;
}}
"""


@pytest.mark.parametrize(
    "version, target, instruction, says",
    [
        ("8.0", "sm_80", "wgmma.fence.sync.aligned;", "needs exactly sm_90a"),
        ("8.0", "sm_90", "setmaxnreg.inc.sync.aligned.u32 64;", "needs exactly sm_90a"),
        ("7.8", "sm_90a", "wgmma.fence.sync.aligned;", "needs PTX 8.0, and the module says 7.8"),
        ("7.8", "sm_80", "mbarrier.try_wait.parity.shared.b64 %p0, [%r0], %r1;", "needs sm_90"),
        ("7.0", "sm_75", "cp.async.ca.shared.global [%r0], [%d0], 16;", "needs sm_80"),
        ("8.1", "sm_80", "cvt.rn.satfinite.e4m3x2.f32 %h0, %f0, %f1;", "needs sm_89"),
        ("8.0", "sm_89", "mov.u32 %r0, %cluster_ctarank;", "needs sm_90"),
    ],
)
def test_what_is_too_new(version: str, target: str, instruction: str, says: str) -> None:
    text = MODULE.format(version=version, target=target, instruction=instruction, directive="")
    with pytest.raises(PtxError) as error:
        emulator.load(text)
    assert says in str(error.value)
    assert "line 11" in str(error.value)
    assert instruction.split()[0].rstrip(";") in str(error.value)


def test_a_cluster_that_is_too_new() -> None:
    text = MODULE.format(version="8.0", target="sm_80", instruction="",
                         directive=" .reqnctapercluster 2, 1, 1")  # fmt: skip
    with pytest.raises(PtxError, match="line 4: `.reqnctapercluster` needs sm_90"):
        emulator.load(text)


@pytest.mark.parametrize(
    "version, target, instruction",
    [
        ("7.8", "sm_90", "mbarrier.try_wait.parity.shared.b64 %p0, [%r0], %r1;"),
        ("8.0", "sm_80", "mbarrier.arrive.release.cta.shared.b64 %d0, [%r0];"),
        ("8.0", "sm_80", "mbarrier.test_wait.parity.acquire.cta.shared.b64 %p0, [%r0], %r1;"),
        ("7.1", "sm_80", "cvt.rn.f32.bf16 %f0, %h0;"),
        ("9.0", "sm_90a", "wgmma.fence.sync.aligned;"),
    ],
)
def test_what_is_just_new_enough(version: str, target: str, instruction: str) -> None:
    emulator.load(MODULE.format(version=version, target=target, instruction=instruction,
                                directive=""))  # fmt: skip
