"""LLVM IR text to object code for one instruction-set level."""

from __future__ import annotations

from collections.abc import Sequence

import llvmlite.binding as llvm

from stagefuse.compiler.kernel_ir import Kernel

from .emit import module_text

LEVELS = ("v3", "v4")
TRIPLE = "x86_64-unknown-linux-gnu"
_targets: dict[str, llvm.TargetMachine] = {}


def target_machine(level: str) -> llvm.TargetMachine:
    """The code generator for a level of x86-64, the same on every host."""
    if level not in LEVELS:
        raise ValueError(f"no such instruction-set level: {level}")
    if level not in _targets:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        _targets[level] = llvm.Target.from_triple(TRIPLE).create_target_machine(
            cpu=f"x86-64-{level}", opt=3, reloc="pic", codemodel="small"
        )
    return _targets[level]


def compile_text(text: str, level: str, speed: int = 3) -> bytes:
    """The object file of a module given as text."""
    machine = target_machine(level)
    module = llvm.parse_assembly(text, llvm.create_context())
    module.triple = TRIPLE
    module.data_layout = str(machine.target_data)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=speed)
    options.loop_vectorization = True
    options.loop_interleaving = True
    options.slp_vectorization = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return bytes(machine.emit_object(module))


def build(kernels: Sequence[Kernel], level: str) -> bytes:
    """The object file of kernels and the thread pool: the same bytes for the same kernels."""
    return compile_text(module_text(kernels, level), level)
