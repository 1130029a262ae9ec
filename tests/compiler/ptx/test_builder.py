"""What the builder makes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagefuse.compiler.ptx import (
    Kernel,
    ModuleBuilder,
    PtxError,
    check,
    print_module,
    read_module,
)
from stagefuse.compiler.ptx import syntax as s
from stagefuse.compiler.ptx.table import forms

from .assembler import assemble, needs_ptxas


def _kernel(target: str = "sm_80") -> tuple[ModuleBuilder, Kernel]:
    b = ModuleBuilder(target)
    return b, b.entry("k", [("x", "u64"), ("n", "u32")], block=(128, 1, 1))


def _scaled() -> ModuleBuilder:
    b, k = _kernel()
    tile = k.shared("tile", "f32", 128)
    i = k.op("mad.lo.u32", k.special("ctaid.x"), 128, k.special("tid.x"))
    k.at("model.pipe", 3, 5)
    k.comment("scale")
    at = k.r("add.u64", k.param("x"), k.op("mul.wide.u32", i, 4))
    with k.when(k.op("setp.lt.u32", i, k.param("n"))):
        a, c = k.op("ld.global.v2.f32", k.addr(at, 8))
        k.op("mul.rn.f32", a, 2.5, into=a)
        k.op("st.global.f32", at, k.fma.rn.f32(a, c, 1))
        k.st.shared.f32(tile, a)
    k.op("bar.sync", 0)
    j = k.reg("u32")
    k.op("mov.u32", 0, into=j)
    with k.loop(j, 4) as done, k.guarded(~k.r("setp.eq.u32", j, 3)):
        k.op("st.global.u32", at, j)
        del done
    return b


def test_module_prints_and_reads_back() -> None:
    module = _scaled().module()
    text = print_module(module)
    again = read_module(text)
    assert print_module(again) == text.replace("    // scale\n", "")
    assert "mul.rn.f32 %f0, %f0, 0f40200000;" in text
    assert ".loc 1 3 5" in text and '.file 1 "model.pipe"' in text


@needs_ptxas
def test_module_assembles(tmp_path: Path) -> None:
    assert assemble(print_module(_scaled().module()), "sm_80", tmp_path) == []


def test_second_results() -> None:
    _, k = _kernel()
    p, q = k.op("setp.lt.u32", k.param("n"), 4, pair=True)
    assert (p.type, q.type) == ("pred", "pred")
    d = k.op("shfl.sync.bfly.b32", k.param("n"), 1, 31, -1)
    assert d.type == "b32"


@pytest.mark.parametrize(
    ("name", "sources", "says"),
    [
        ("add.u33", (1, 2), "unknown instruction `add.u33`"),
        ("foo.u32", (1, 2), "there is no `foo`"),
        ("add.f32", ("n", 2.0), "is u32, and a is f32"),
        ("add.u32", ("n", 2.0), "2.0 where a u32 belongs"),
        ("add.u32", ("n",), "takes >d:T a:T b:T"),
        ("add.u32", ("n", 1, 2), "takes >d:T a:T b:T"),
        ("add.u32", ("n", 1 << 32), "is not in the range of u32"),
        ("ld.global.f32", (1.5,), "an address is a register"),
        ("ld.global.v2.f32", ("p",), "has 32 or 64 bits"),
        ("stmatrix.sync.aligned.m8n8.x1.shared.b16", ("x", ["n"]), "needs sm_90"),
        ("tanh.approx.bf16", ("h",), "needs sm_90"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
         (["n"] * 4, ["n"] * 3, [0.0] * 4), "b has 2 values in braces"),
    ],
)  # fmt: skip
def test_wrong_instructions_are_refused(name: str, sources: tuple[object, ...], says: str) -> None:
    _, k = _kernel()
    named = {"n": k.param("n"), "x": k.param("x"), "p": k.reg("pred"), "h": k.reg("bf16")}

    def value(x: object) -> object:
        return [value(e) for e in x] if isinstance(x, list) else named.get(str(x), x)

    with pytest.raises(PtxError, match=says.replace("+", r"\+")):
        k.op(name, *map(value, sources))  # type: ignore[arg-type]


def test_a_refused_instruction_leaves_nothing_behind() -> None:
    _, k = _kernel()
    before = k.function()
    with pytest.raises(PtxError):
        k.op("add.f32", 1.0, k.reg("pred"))
    after = k.function()
    assert [x for x in after.body or () if isinstance(x, s.Instruction)] == [
        x for x in before.body or () if isinstance(x, s.Instruction)
    ]


def test_a_form_of_one_target_only() -> None:
    made = s.Instruction("setmaxnreg", ("inc", "sync", "aligned", "u32"), (s.Immediate(40),))
    assert check(made, (8, 3), "sm_90a").form.arch == "90a"
    with pytest.raises(PtxError, match="needs exactly sm_90a"):
        check(made, (8, 3), "sm_90")


def test_a_form_of_a_later_version() -> None:
    k = ModuleBuilder("sm_80", (7, 0)).entry("k", [])
    with pytest.raises(PtxError, match="needs PTX 7.1, and the module says 7.0"):
        k.op("cvt.f32.bf16", k.reg("bf16"))


def test_labels_must_be_placed_once() -> None:
    _, k = _kernel()
    label = k.label()
    k.branch(label)
    with pytest.raises(PtxError, match="which is nowhere"):
        k.function()
    k.place(label)
    with pytest.raises(PtxError, match="twice"):
        k.place(label)


def test_every_row_of_the_table_is_complete() -> None:
    for rows in forms().values():
        for form in rows:
            assert form.summary and form.meaning and form.section, form
            names = [slot.name for slot in form.slots]
            for spec in form.specs:
                inner = spec.type.split("(")[-1].rstrip(")")
                assert not inner.isupper() or inner in names, form
