"""Constant expressions and initial values, with the values that ptxas 13.0 gives them."""

import pytest

from stagefuse.compiler.ptx import PtxError, check, print_module, read_module
from stagefuse.compiler.ptx import syntax as s

HEAD = ".version 8.8\n.target sm_90a\n.address_size 64\n"

VALUES = {
    "(4*4)+3": 19, "~5": -6, "!5": 0, "!0": 1, "+7": 7, "5>3": 1, "1<<4": 16, "-16>>2": -4,
    "-7/2": -3, "(1?2:3)": 2, "0 ? 2 : 3": 3, "5&3": 1, "5|8": 13, "5^1": 4, "5&&0": 0, "5||0": 1,
    "5==5": 1, "5!=5": 0, "(.s64)5": 5, "(.u64)-1": -1, "((1<<5)-1)|~7": -1,
    "0xffffffffffffffff>>60": 15, "-1>>60": -1, "(.u64)(-1)>>60": 15, "- -3": 3, "~-1": 0,
    "1+-2": -1, "-1<0U": 0, "-1<0": 1, "-7/2U": 9223372036854775804, "7%-3": 7, "-1>0": 0,
    "1<<63": -(1 << 63), "1<<64": 1, "1<<65": 2, "1.5>1.0": 1, "1.5==1.5": 1,
    "1 + 2 * 3 - 4 / 2": 5, "1 | 2 ^ 3 & 4": 3, "1 < 2 == 1": 1, "8 >> 1 + 1": 2,
    "1 ? 0 ? 1 : 2 : 3": 2, "2*-3": -6, "~0x0F & 0xFF": 240, "-5 >> 1U": -3,
    "(.u64)-5 >> 1": 9223372036854775805, "(.s64)(0xffffffffffffffff) >> 1": -1,
    "~5 >> 1": 9223372036854775805, "~5 < 0": 0, "(5 & 0xffffffffffffffff) - 6 < 0": 0,
    "(5&3)-6 < 0": 1, "(-1 & -1) < 0": 1, "(3>2) - 2 < 0": 1,
    "9223372036854775807+1": -(1 << 63), "9223372036854775807+1 < 0": 1,
    "9223372036854775808 > 0": 1, "(7 % 3) - 2 < 0": 0, "(.s64)~5 < 0": 1, "!0 - 2 < 0": 1,
    "(1U-2) < 0": 0, "1 - 2U < 0": 0, "WARP_SZ*2": 64, "017": 15, "0b101": 5, "0X1f": 31,
}  # fmt: skip
"""What an .s64 holds that one of these is the initial value of."""


def initial(text: str) -> tuple[s.Initial, ...]:
    return read_module(f"{HEAD}.global {text};").variables[0].initial


@pytest.mark.parametrize("text", VALUES)
def test_integers(text: str) -> None:
    (x,) = initial(f".s64 x = {text}")
    assert isinstance(x, s.Immediate)
    assert x.value % (1 << 64) == VALUES[text] % (1 << 64)


@pytest.mark.parametrize(
    "text, value",
    [("1.5*2.0+1.0", 4.0), ("1.0/3.0", 1 / 3), ("-(1.5)", -1.5), (".5", 0.5), ("1.", 1.0),
     ("0d3FF0000000000000+1.0", 2.0), ("+1e-3", 1e-3), ("1.0e+3-0d4008000000000000", 997.0)],
)  # fmt: skip
def test_floats(text: str, value: float) -> None:
    (x,) = initial(f".f64 x = {text}")
    assert isinstance(x, s.FloatImmediate) and x.value == value


@pytest.mark.parametrize(
    "text, message",
    [("5/0", "divides by zero"), ("5 % 0", "divides by zero"), ("1.5+2", "an integer"),
     ("!1.5", "an integer"), ("1.0/0.0", "divides by zero"), ("1?1.5:2.5", "an integer"),
     ("0f3F800000+1.0", "notation of f32"), ("1.5*2.0 << 1", "an integer"),
     ("1.5 % 2.0", "takes integers")],
)  # fmt: skip
def test_no_value(text: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        initial(f".s64 x = {text}")


def test_operands() -> None:
    body = """mov.u32 %r1, (4*4)+3;
      ld.global.u32 %r1, [%rd1 + 8*(2+1)];
      ld.global.u32 %r1, [g+WARP_SZ-4];
      mov.u64 %rd1, g + 4 * 2;
      mov.f32 %f1, 1.0 / 4.0;
      bar.sync 1+1, WARP_SZ*2;
      call f, (1+2);
      setp.eq.u32 %p1|%p2, %r1, 5|8;"""
    text = f"""{HEAD}.global .b32 g[16];
    .func f(.reg .b32 a) {{ ret; }}
    .visible .entry k() {{ .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .f32 %f<9>; .reg .pred %p<9>;
    {body} }}"""
    module = read_module(text)
    assert read_module(print_module(module)) == module
    shown = print_module(module)
    for line in ("mov.u32 %r1, 19;", "[%rd1+24]", "[g+28]", "mov.u64 %rd1, g+8;", "bar.sync 2, 64;",
                 "call f, (3);", "%p1|%p2, %r1, 13;", "0d3FD0000000000000"):  # fmt: skip
        assert line in shown


def test_initial_values_in_braces_lie_in_their_rows() -> None:
    zero, one = s.Immediate(0), s.FloatImmediate(0x3F800000)
    assert initial(".b32 a[2][3]={{1,2},{3}}") == tuple(map(s.Immediate, (1, 2, 0, 3)))
    assert initial(".b32 a[2][2][2]={{{1},{2,3}},{{4}}}") == (
        s.Immediate(1), zero, *map(s.Immediate, (2, 3, 4)))  # fmt: skip
    assert initial(".f32 a[2][2]={{0f3F800000},{0f3F800000}}") == (one, s.FloatImmediate(0), one)
    open_ended = read_module(f"{HEAD}.global .v2 .b32 a[][2]={{{{{{1,2}},{{3,4}}}},{{{{5,6}}}}}};")
    assert open_ended.variables[0].shape == (2, 2)
    assert read_module(print_module(open_ended)) == open_ended


def test_addresses_as_initial_values() -> None:
    text = f"""{HEAD}.global .b32 g[8];
    .global .u64 p[4] = {{g+4*2, generic(g)+4, g, 5}};
    .global .u32 q = g;
    .global .u8 bytes[3] = {{0xFF(g), 0xFF00(generic(g)+4), 0xFF0000(g)}};"""
    module = read_module(text)
    assert read_module(print_module(module)) == module
    assert module.variables[3].initial[1] == s.ByteOf(s.GenericOf("g", 4), 1)


@pytest.mark.parametrize(
    "declaration",
    [".f32 x = 1", ".u32 x = 1.5", ".f16 x = 1.0", ".b64 x = g", ".b32 x[2] = {1,2,3}",
     ".b32 x[2] = 1", ".b32 x = {1}", ".b32 x[2][2] = {1,2}", ".u8 x = 0xF0(g)",
     ".u16 x = 0xFF(g)", ".b32 x = 0d3FF0000000000000"],
)  # fmt: skip
def test_initial_values_that_do_not_fit(declaration: str) -> None:
    with pytest.raises(PtxError):
        read_module(f"{HEAD}.global .b32 g;\n.global {declaration};")


def test_vectors_of_registers() -> None:
    text = f"""{HEAD}.visible .entry k() {{ .reg .v4 .f32 v; .reg .v2 .b32 w<2>; .reg .b64 %rd;
    mov.f32 v.x, 0f3F800000; mov.f32 v.a, v.x; st.global.v4.f32 [%rd], v; mov.b64 %rd, w1; }}"""
    module = read_module(text)
    shown = print_module(module)
    assert "mov.f32 v$w, v$x;" in shown
    assert "[%rd], {v$x, v$y, v$z, v$w};" in shown and "mov.b64 %rd, {w1$x, w1$y};" in shown
    assert read_module(shown) == module


@pytest.mark.parametrize("operand", ["[%rd1-4]", "[g-4]", "[16]"])
def test_addresses_that_are_none(operand: str) -> None:
    def checked(operand: str) -> None:
        text = f"""{HEAD}.global .b32 g[8];
        .visible .entry k() {{ .reg .b32 %r; .reg .b64 %rd1; .local .b32 l[8];
        ld.local.u32 %r, [16]; ld.global.u32 %r, [g+8-4]; ld.global.u32 %r, {operand}; }}"""
        module = read_module(text)
        for line in module.functions[0].body:
            if isinstance(line, s.Instruction):
                check(line, module.version, module.target[0])

    checked("[%rd1+-4]")
    with pytest.raises(PtxError):
        checked(operand)
