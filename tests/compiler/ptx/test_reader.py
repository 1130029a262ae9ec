"""PTX text as nvcc and Triton write it is read, printed and read back the same."""

from __future__ import annotations

import pytest

from stagefuse.compiler.ptx import PtxError, print_module, read_module
from stagefuse.compiler.ptx import syntax as s
from stagefuse.compiler.ptx.table import matches

TEXT = """\
// Generated
.version 8.7
.target sm_90a
.address_size 64
	.file	1 "/a/b.py"
.extern .func  (.param .b32 func_retval0) vprintf
(
	.param .b64 vprintf_param_0,
	.param .b64 vprintf_param_1
)
;
.extern .shared .align 16 .b8 global_smem[];
.global .align 1 .b8 $str[7] = {72, 101, 108, 108, 111, 10, 0};
.visible .global .align 8 .u64 pointers[2] = {generic($str)+4, 0};
.const .align 4 .f32 table[] = {0f3F800000, -2.5, 1e3};
.visible .entry add_kernel(
	.param .u64 .ptr .global .align 16 add_kernel_param_0,
	.param .align 64 .b8 add_kernel_param_1[128]
)
.reqntid 128, 1, 1
.minnctapersm 2
.pragma "nounroll";
{
	.local .align 8 .b8 	__local_depot0[8];
	.reg .pred 	%p<3>;
	.reg .b32 	%r<25>, %single;
	.reg .f32 	%f<5>;
	.reg .b64 	%rd<11>;
	.loc	1 5 0
$L__func_begin0:
	.loc	1 7 3, function_name $L__info_string0+12, inlined_at 1 10 3
	ld.param.u64 	%rd4, [add_kernel_param_0];
	{ // callseq 0, 0
	.reg .b32 temp_param_reg;
	.param .b64 param0;
	st.param.b64 	[param0+0], %rd4;
	.param .b32 retval0;
	call.uni (retval0), vprintf, (param0, param0);
	ld.param.b32 	%r1, [retval0+0];
	} // callseq 0
	@!%p1 bra $L__BB0_2;
	ld.global.L1::evict_last.v4.f32 {%f1, %f2, %f3, %f4}, [ %rd4 + -16 ];
	mov.f32 %f1, 0f3F800000; mov.u32 %single, WARP_SZ;
	setp.lt.s32 %p1|%p2, %r1, -5;
	mov.u32 %r4, %tid.x;
	mov.u64 %rd5, $str+2;
	mov.b64 %rd6, {%r3, %r4};
	shfl.sync.bfly.b32 %r5|_, %r6, 0x10, 31, -1;
	fma.rn.f32 %f1, %f2, 1.5, 0d4008000000000000;
	/* a table of
	places to go */
$L__BB0_2:
	brx.idx %r1, ts;
ts: .branchtargets $L__BB0_2, $L__func_begin0;
	ret;
}
	.section .debug_abbrev
	{
.b8 1                                   // Abbreviation Code
$L__info_string0:
.b32 $L__tmp1-$L__func_begin0
	}
"""


def test_text_of_other_compilers_reads_back() -> None:
    module = read_module(TEXT)
    assert read_module(print_module(module)) == module


def test_what_is_read() -> None:
    module = read_module(TEXT)
    assert (module.version, module.target, module.file(1)) == ((8, 7), ("sm_90a",), "/a/b.py")
    assert module.variables[1].initial == tuple(map(s.Immediate, b"Hello\n\0"))
    assert module.variables[2].initial[0] == s.GenericOf("$str", 4)
    assert module.variables[3].shape == (3,)
    kernel = module.function("add_kernel")
    assert kernel is not None and kernel.body is not None
    assert kernel.directive("reqntid") == (128, 1, 1)
    assert kernel.parameters[1].shape == (128,)
    found = {x.name: x for x in kernel.body if isinstance(x, s.Instruction)}
    load = found["ld.global.L1::evict_last.v4.f32"]
    assert load.operands[1] == s.Address(s.Register("%rd4", "b64"), -16)
    assert load.loc is not None and load.loc.line == 7
    assert TEXT.splitlines()[load.line - 1].strip().startswith("ld.global.L1")
    assert found["shfl.sync.bfly.b32"].operands[0] == s.Pair(s.Register("%r5", "b32"), s.Sink())
    assert found["bra"].guard == s.Guard(s.Register("%p1", "pred"), True)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("mov.u32 %r4, %tid.x", "mov.u32 %r25, %tid.x", "`%r25` is not declared"),
        ("mov.u32 %r4, %tid.x", "mov.u32 %r4, %tid.v", "`%tid.v` is not declared"),
        ("mov.u32 %r4, %tid.x", "mov.u32 %r4, %r5+4", "`%r5+4`: a number is added to a register"),
        ("mov.u32 %r4, %tid.x", "mov.u32 %r4, %r5+-4", "`%r5-4`: a number is added to a register"),
        ("mov.u32 %r4, %tid.x", "vadd.u32.u32.u32 %r4, %r5.b0, %r6.h1",
         "`%r5.b0`: parts of registers are not known"),
        ("mov.u32 %r4, %tid.x", "mov.u32 %r4, %tid.x+1", "`%tid.x+1`: a number is added"),
        ("mov.u32 %r4, %tid.x;", "mov.u32 %r4 %tid.x;", "unexpected `%tid.x`"),
        ("mov.u32 %r4, %tid.x;", "mov.u32 %r4, \\;", "unexpected character"),
    ],
)
def test_wrong_text_is_named_with_its_line(old: str, new: str, says: str) -> None:
    line = TEXT[: TEXT.index(old)].count("\n") + 1
    with pytest.raises(PtxError) as caught:
        read_module(TEXT.replace(old, new))
    assert says in str(caught.value) and caught.value.line == line


def test_a_name_of_a_call_ends_with_its_braces() -> None:
    text = TEXT.replace("@!%p1 bra $L__BB0_2", "mov.b32 temp_param_reg, 1")
    module = read_module(text)
    kernel = module.function("add_kernel")
    assert kernel is not None and kernel.body is not None
    moved = next(x for x in kernel.body if isinstance(x, s.Instruction) and x.name == "mov.b32")
    assert moved.operands[0] == s.Symbol("temp_param_reg")  # no register outside the braces


@pytest.mark.parametrize(
    "name", ["vote.ballot.sync.b32", "shfl.up.sync.b32", "add.f32.rn", "cvt.sat.rzi.u32.f32",
             "setp.and.eq.u32", "ex2.ftz.approx.f32", "set.u32.eq.u32", "redux.add.sync.u32"],
)  # fmt: skip
def test_modifiers_in_any_order(name: str) -> None:
    """As ptxas takes them; CUB writes the first one."""
    opcode, *modifiers = name.split(".")
    (match, *_) = matches(opcode, tuple(modifiers))
    assert sorted(match.slots.values()) == sorted(modifiers)
