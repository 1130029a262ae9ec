"""Every form of the table, with each of its words, is what NVIDIA's assembler takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagefuse.compiler.ptx import PtxError, print_module, read_module
from stagefuse.compiler.ptx.check import target_number
from stagefuse.compiler.ptx.table import Form, forms

from .assembler import assemble, needs_ptxas
from .samples import emit, module, samples

TARGETS = ("sm_80", "sm_89", "sm_90a")
PLACED = ("bra", "brx", "call")
"""Opcodes whose operands need more than registers around them; their own tests have them."""


def _usable(form: Form, target: str) -> bool:
    number, feature = target_number(target)
    return form.target <= number and (not form.arch or form.arch == f"{number}{feature}")


@needs_ptxas
@pytest.mark.parametrize("target", TARGETS)
def test_every_form_assembles(target: str, tmp_path: Path) -> None:
    b = module(target)
    unbuilt: list[str] = []
    for opcode, rows in forms().items():
        if opcode in PLACED:
            continue
        k = b.entry(f"all_{opcode}", [("p", "u64"), ("x", "b8[128]")])
        for form in rows:
            if not _usable(form, target):
                continue
            for sample in samples(form):
                try:
                    emit(k, sample)
                except PtxError as error:
                    if "no registers of 8 bits" not in str(error):
                        unbuilt.append(str(error))
    assert not unbuilt, "\n".join(unbuilt)
    text = print_module(b.module())
    assert read_module(text) == b.module()
    lines = text.splitlines()
    wrong = assemble(text, target, tmp_path)
    # st.param and param::func are for calls
    wrong = [(n, why) for n, why in wrong if "input parameter" not in why and "::func" not in why]
    assert not wrong, "\n".join(f"{lines[n - 1].strip()}  <- {why}" for n, why in wrong)
