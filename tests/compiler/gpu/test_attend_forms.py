"""How many warpgroups a block of attention has."""

from __future__ import annotations

from stagefuse.compiler.gpu.attention.forms import forms_of
from stagefuse.compiler.kernel_ir import Const, Load, Local, Op
from stagefuse.dsl.dtypes import F32

SCORE = Local("raw", F32)


def test_scores_of_many_operations_leave_no_room_for_a_third_warpgroup() -> None:
    scaled = Op("mul", (SCORE, Const(0.5, F32)), F32)
    assert [f.readers for f in forms_of(64, 64, (scaled,))] == [3, 2]
    capped = Op("tanh", (scaled,), F32)
    assert [f.readers for f in forms_of(64, 64, (capped,))] == [2]
    biased = Op("add", (scaled, Load("b", (), F32)), F32)
    assert [f.readers for f in forms_of(64, 64, (biased,))] == [2]
    assert [f.readers for f in forms_of(64, 128, (scaled,))] == [2]
