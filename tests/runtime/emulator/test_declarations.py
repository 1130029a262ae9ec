"""Variables that hold addresses, rows of initial values, other names of functions."""

import numpy as np

from stagefuse.runtime import emulator

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"


def test_variables_that_hold_addresses() -> None:
    text = f"""{HEAD}
    .visible .global .b32 g[4] = {{10, 20, 30, 40}};
    .visible .const .b32 c[2] = {{7, 8}};
    .global .u64 p[3] = {{g+4*2, generic(g)+4, 5}};
    .global .align 8 .u8 bytes[8] = {{0xFF(g+4), 0xFF00(g+4), 0xFF0000(g+4), 0xFF000000(g+4),
        0xFF00000000(g+4), 0xFF0000000000(g+4), 0xFF000000000000(g+4), 0xFF00000000000000(g+4)}};
    .global .u32 low = g;
    .const .u64 to_const = generic(c)+4;
    .visible .entry k(.param .u64 out) {{
      .reg .b32 %r<9>; .reg .b64 %d<9>;
      ld.param.u64 %d0, [out];
      ld.global.u64 %d1, [p];         ld.global.u32 %r1, [%d1];
      ld.global.u64 %d2, [p+8];       ld.u32 %r2, [%d2];
      ld.global.u64 %d3, [bytes];     ld.global.u32 %r3, [%d3];
      ld.const.u64 %d4, [to_const];   ld.u32 %r4, [%d4];
      ld.global.u64 %d5, [p+WARP_SZ/2];
      cvt.u32.u64 %r5, %d5;
      mov.u64 %d6, g;                 cvt.u32.u64 %r6, %d6;
      ld.global.u32 %r7, [low];       sub.u32 %r6, %r6, %r7;
      st.global.v4.u32 [%d0], {{%r1, %r2, %r3, %r4}};
      st.global.v2.u32 [%d0+4*4], {{%r5, %r6}};
    }}"""
    out = np.full(6, -1, np.int32)
    emulator.load(text).launch("k", grid=1, block=1, args=[out])
    assert out.tolist() == [30, 20, 20, 8, 5, 0]


def test_rows_of_initial_values() -> None:
    text = f"{HEAD}.visible .global .b32 a[2][3] = {{{{1, 2}}, {{3*4}}}};\n.entry k() {{ ret; }}"
    assert emulator.load(text).globals["a"].tolist() == [[1, 2, 0], [12, 0, 0]]


def test_other_names_of_functions() -> None:
    text = f"""{HEAD}
    .visible .func (.reg .b32 r) other (.reg .b32 a);
    .visible .func (.reg .b32 r) doubled (.reg .b32 a) {{ add.u32 r, a, a; ret; }}
    .alias other, doubled;
    .visible .entry k(.param .u64 out) {{
      .reg .b32 %r<3>; .reg .b64 %d; .reg .v2 .b32 both;
      ld.param.u64 %d, [out];
      call (both.x), other, (5);
      call (both.y), doubled, ((1 << 3) | 1);
      st.global.v2.b32 [%d], both;
    }}"""
    out = np.zeros(2, np.int32)
    emulator.load(text).launch("k", grid=1, block=1, args=[out])
    assert out.tolist() == [10, 18]
