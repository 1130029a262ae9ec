"""LLVM IR text to object code for instruction-set levels."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm

from stagefuse.compiler.kernel_ir import Kernel
from stagefuse.compiler.plan import LEVELS
from stagefuse.dsl import cache

from .emit import AS_WRITTEN, module_text
from .native_calls import calls_text
from .wide_math import INLINED, KEPT

TRIPLE = "x86_64-unknown-linux-gnu"
OPTIONS = ("-indvars-widen-indvars=false", "-enable-masked-interleaved-mem-accesses")
"""The short loops that are done under a mask count in 32 bits, and shall go on to do so: masks of
16 lanes are made of one vector then. All other loops count in 64 bits. And what such a loop reads
two to four elements apart is read whole under a mask and parted by shuffles, not gathered."""
_targets: dict[str, llvm.TargetMachine] = {}


def target_machine(level: str) -> llvm.TargetMachine:
    """The code generator for a level of x86-64, the same on every host."""
    if level not in LEVELS:
        raise ValueError(f"no such instruction-set level: {level}")
    if not _targets:
        for option in OPTIONS:
            llvm.set_option("", option)
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    if level not in _targets:
        _targets[level] = llvm.Target.from_triple(TRIPLE).create_target_machine(
            cpu=f"x86-64-{level}", opt=3, reloc="pic", codemodel="small"
        )
    return _targets[level]


def compile_text(text: str, level: str, speed: int = 2) -> bytes:
    """The object file of a module given as text: kept, or new."""
    name = _name(text, level, speed)
    made = cache.kept(name)
    if made is None:
        made = bytes(target_machine(level).emit_object(improved(text, level, speed)))
        cache.keep(name, made)
    return made


def _name(text: str, level: str, speed: int = 2) -> str:
    """Of the object file in the cache."""
    llvm_version = ".".join(map(str, llvm.llvm_version_info))
    parts = (_recipe(), llvmlite.__version__, llvm_version, level, str(speed), text)
    return cache.name_of("object", parts)


@functools.cache
def _recipe() -> str:
    """What stands for how modules are improved and compiled: this file."""
    return Path(__file__).read_text("utf-8")


def improved(text: str, level: str, speed: int = 2) -> llvm.ModuleRef:
    """The module after LLVM's passes; what stands behind INLINED and AS_WRITTEN in it is linked
    after them."""
    machine, context = target_machine(level), llvm.create_context()
    whole, *rest = text.split(AS_WRITTEN)
    module, *wide = [_parsed(part, machine, context) for part in whole.split(INLINED)]
    written = [_parsed(part, machine, context) for part in rest]
    options = llvm.create_pipeline_tuning_options(speed_level=speed)
    options.loop_vectorization = True
    options.loop_interleaving = True
    options.slp_vectorization = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    for part in wide:
        _link(module, part)
        module.get_global_variable(KEPT).linkage = llvm.Linkage.internal
        after = llvm.create_new_module_pass_manager()
        after.add_global_dead_code_eliminate_pass()
        after.add_always_inliner_pass()
        after.add_instruction_combine_pass()
        after.add_global_dead_code_eliminate_pass()
        after.run(module, builder)
    for part in written:
        _link(module, part)
    return module


def _link(module: llvm.ModuleRef, part: llvm.ModuleRef) -> None:
    """Makes the functions of a part those of a module, for it alone."""
    names = [f.name for f in part.functions if not f.is_declaration]
    module.link_in(part)
    for name in names:
        module.get_function(name).linkage = llvm.Linkage.internal


def _parsed(text: str, machine: llvm.TargetMachine, context: llvm.ContextRef) -> llvm.ModuleRef:
    module = llvm.parse_assembly(text, context)
    module.triple = TRIPLE
    module.data_layout = str(machine.target_data)
    module.verify()
    return module


ALONE_CHARACTERS = 50_000
"""A module with less text than this compiles sooner than a process starts."""
_CHILD = """
import sys
sys.path[:] = {path!r}
from stagefuse.compiler.cpu.build import compile_text, target_machine
target_machine({level!r})
sys.stdout.buffer.write(compile_text(sys.stdin.read(), {level!r}))
"""


class LevelBuild:
    """The object files of kernels for some levels, being made from `start` on.

    llvmlite lets one thread at a time into LLVM, so that a large module for a second level is
    compiled by a process of its own, while the caller goes on and then compiles the first.
    `soon`: a large module is to be expected, and the process may load LLVM until it comes.
    """

    def __init__(self, levels: Sequence[str], soon: bool = False) -> None:
        self.texts = dict.fromkeys(levels, "")
        self.children: dict[str, _Child] = {}
        self.made: dict[str, bytes] = {}
        if soon:
            self._start(levels[1:])

    def start(self, kernels: Sequence[Kernel]) -> None:
        """Have the kernels compiled."""
        self.texts = {level: module_text(kernels, level) for level in self.texts}
        large = [x for x in list(self.texts)[1:] if len(self.texts[x]) > ALONE_CHARACTERS]
        asked = dict.fromkeys([*self.children, *large])
        kept = {level: cache.kept(_name(self.texts[level], level)) for level in asked}
        self.made = {level: made for level, made in kept.items() if made is not None}
        self._start([level for level in large if level not in self.made])
        for level, child in list(self.children.items()):
            if level in self.made or not child.send(self.texts[level]):
                self.children.pop(level).stop()

    def _start(self, levels: Sequence[str]) -> None:
        """Processes for the levels that have none; there are fewer where none can be started."""
        for level in levels:
            if level not in self.children and sys.executable:
                with suppress(OSError):
                    self.children[level] = _Child(level)

    def objects(self) -> dict[str, bytes]:
        """The object files; waits for them."""
        alone = [x for x in self.texts if x not in self.children and x not in self.made]
        found = self.made | {level: compile_text(self.texts[level], level) for level in alone}
        for level, child in self.children.items():
            output = child.output()
            if not output:  # whatever is wrong with processes here
                output = compile_text(self.texts[level], level)
            found[level] = output
        return {level: found[level] for level in self.texts}

    def call(self) -> bytes:
        """The object file of what calls pipelines from Python."""
        return compile_text(calls_text(), LEVELS[0])

    def stop(self) -> None:
        """Ends processes that are not waited for."""
        for child in self.children.values():
            child.stop()


class _Child:
    """A process that loads LLVM, waits for a text, and compiles it to a file.

    A file and not a pipe: that is full before the other side reads, and a process that is stopped
    while it waits to write, and goes on later, may leave the rest unwritten.

    Raises OSError where no process can be started.
    """

    def __init__(self, level: str) -> None:
        script = _CHILD.format(path=[p or "." for p in sys.path], level=level)
        self.file = tempfile.TemporaryFile()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", script],
                stdin=subprocess.PIPE, stdout=self.file, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError:
            self.file.close()
            raise

    def send(self, text: str) -> bool:
        """Give it the text; False if it has ended."""
        assert self.process.stdin is not None
        try:
            with self.process.stdin as pipe:
                pipe.write(text.encode())
        except OSError:
            return False
        return True

    def output(self) -> bytes:
        """The object file; waits for it. Nothing if the process failed."""
        with self.file:
            if self.process.wait():
                return b""
            self.file.seek(0)
            return self.file.read()

    def stop(self) -> None:
        """Ends a process that is not waited for."""
        self.process.kill()
        if self.process.stdin is not None:
            with suppress(OSError):  # of what it has not read
                self.process.stdin.close()
        self.process.wait()
        self.file.close()


def build(kernels: Sequence[Kernel], level: str) -> bytes:
    """The object file of kernels and the thread pool: the same bytes for the same kernels."""
    return compile_text(module_text(kernels, level), level)
