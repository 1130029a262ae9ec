"""Kernel IR to PTX: the frame of a kernel, and modules.

An entry takes the address of each buffer, each dimension (s64) and the address of the status. A
team executes one step of the flattened parallel loop. Scratch lies in the block's shared memory,
or in a workspace, one more buffer, where it does not fit: then the blocks go round the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field, replace

from stagefuse.compiler.cpu.bodies import walk
from stagefuse.compiler.cpu.trigonometry import two_over_pi_table
from stagefuse.compiler.kernel_ir import Alloc, Kernel
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, mod, sym
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen

from .fold_order import by_memory
from .ir import Value, constant_text
from .loops import Carry
from .matmul.tensor_loads import Matrices
from .matmul.tf32_roles import GROUP
from .matmul.tf32_tiles import SplitWriter
from .memory import Memory
from .private import private_arrays, vector_width
from .sequences.scan import scan_of, team_of
from .teams import WARP, Team, choose
from .tensor_maps import MAP_ALIGNMENT, MAP_BYTES, TensorMap

PTX_VERSION = "8.7"
MOST_BYTES = 1 << 42
"""No buffer of any GPU is larger."""
ROUND_BLOCKS = 512
"""Blocks of a kernel that keeps its scratch in a workspace."""


@frozen
class Entry:
    """A kernel's PTX and how it is launched; sizes are expressions over its dimensions.

    `workspace`: bytes of scratch in global memory, passed after the buffers, if any. `maps`: tensor
    maps, passed after everything else. `stays`: its blocks share the work whatever their number,
    and how many registers they may have is settled. `cluster`: blocks that follow each other and
    share their memory. `together`: how many of one that `stays` an SM has room for, 0 for others.
    `structure`: how its products and attention are computed, in words. `turns`: how often the body
    of a loop runs, by the label of its head, where sizes tell.
    """

    name: str
    text: str
    team: Team
    grid: Expr
    shared_bytes: Expr
    workspace: Expr | None
    tables: frozenset[str]
    maps: tuple[TensorMap, ...] = ()
    stays: bool = False
    cluster: int = 1
    together: int = 0
    structure: str = ""
    turns: Mapping[str, Expr] = field(default_factory=dict)

    @property
    def said(self) -> dict[str, str]:
        """Of how it computes, what goes into the report of its launches."""
        return {"structure": self.structure} if self.structure else {}

    def with_room(self, hint: str) -> Entry:
        """The same with a directive on its registers, instead of another."""
        head, body = self.text.split("{", 1)
        head, _, threads = head.rstrip().rpartition(".reqntid ")
        sizes = ", ".join(threads.replace(",", "").split()[:3])
        return replace(self, text=f"{head}.reqntid {sizes} {hint}\n{{{body}")


class KernelWriter(SplitWriter):
    """Writes the entry of one kernel."""

    def __init__(
        self,
        kernel: Kernel,
        facts: Facts,
        shared_limit: int,
        lines: Mapping[KernelValue, int],
        has_wgmma: bool = False,
        tiled: Matrices | None = None,
    ) -> None:
        kernel = by_memory(kernel)
        names = [name for name, _ in kernel.parallel]
        extents = [extent for _, extent in kernel.parallel]
        facts = facts.at_element(names, extents)
        scan = scan_of(kernel)
        team = choose(kernel, facts) if scan is None else team_of(scan, facts)
        if tiled is not None:
            team = replace(team, helpers=GROUP, resident=2 if team.lanes == GROUP else 1)
        facts = _as_stored(kernel, facts)
        super().__init__(kernel, facts, team)
        for value, line in lines.items():
            self.lines[id(self._unique(value))] = line
        self.shared_limit = shared_limit
        self.has_wgmma, self.tiled = has_wgmma, tiled
        self.count = const(1)
        for extent in extents:
            self.count = self.count * extent
        self.shared = const(0)  # bytes of the block
        self.scratch = const(0)  # bytes of a team in its workspace
        self.rounds = False
        self.step: Value | None = None
        self.name = ""
        self.maps: list[TensorMap] = []
        self.stays = False

    def entry(self, name: str, notes: Sequence[str]) -> Entry:
        """The whole function; `notes` are comments at its top."""
        code, self.name = self.code, name
        for note in notes:
            code.comment(note)
        self._parameters(name)
        if self.kernel.guarded and self.status is not None:
            noted = code.fresh("i64")
            code.line(f"ld.global.b64 {noted.text}, [{self.status.text}];")
            code.branch_if(noted.compare("eq", 0), "$end", holds=False)
        self._lanes()
        self._set_up()
        grid = self._steps()
        code.start("$end")
        code.line("ret;")
        threads = f".reqntid {self.team.threads}, 1, 1"
        if self.team.resident:
            threads += f" .minnctapersm {self.team.resident}"
        if self.cluster > 1:
            threads = f".reqnctapercluster {self.cluster}, 1, 1 {threads}"
        lines = [
            f".visible .entry {name}(", ",\n".join(self._declared(name)), f") {threads}",
            "{", *code.registers(), *code.text(), "}",
        ]  # fmt: skip
        workspace = self.scratch * grid * self.team.per_block if self.rounds else None
        return Entry(
            name, "\n".join(lines), self.team, grid, self.shared, workspace,
            frozenset(code.tables), tuple(self.maps), self.stays, self.cluster,
            structure="; ".join(dict.fromkeys(self.structure)), turns=code.turns,
        )  # fmt: skip

    def _steps(self) -> Expr:
        """The steps of the parallel loop, and how many blocks divide them."""
        grid = floordiv(self.count + (self.team.per_block - 1), self.team.per_block)
        if not self.rounds:
            self._one_step()
            return grid
        grid = minimum(grid, const(ROUND_BLOCKS))
        self._rounds(self.index(grid * self.team.per_block, self.team_number.type))
        return grid

    # Parameters

    def _slots(self) -> list[str]:
        names = [b.name for b in self.kernel.buffers]
        return [*names, *(["workspace"] if self._is_round() else []), *self.kernel.dims, "status"]

    def _declared(self, name: str) -> list[str]:
        kinds = ["s64" if n in self.kernel.dims else "u64" for n in self._slots()]
        plain = [f"\t.param .{kind} {name}_{n}" for n, kind in enumerate(kinds)]
        maps = [
            f"\t.param .align {MAP_ALIGNMENT} .b8 {name}_map{n}[{MAP_BYTES}]"
            for n in range(len(self.maps))
        ]
        return [*plain, *maps]

    def tensor_map(self, map: TensorMap) -> Value:
        """The address of a tensor map among the parameters."""
        if map not in self.maps:
            self.maps.append(map)
        name = f"{self.name}_map{self.maps.index(map)}"
        at = self.code.pure("mov.b64", "i64", Value(self.code, name, "i64"))
        return self.code.pure("cvta.param.u64", "i64", at)

    def _parameters(self, name: str) -> None:
        code = self.code
        self._plan_scratch()
        for number, slot in enumerate(self._slots()):
            raw = code.fresh("i64")
            kind = "s64" if slot in self.kernel.dims else "u64"
            code.line(f"ld.param.{kind} {raw.text}, [{name}_{number}];")
            if slot in self.kernel.dims:
                small = self.is_small(sym(slot))
                self.symbols[slot] = raw.to("trunc", "i32") if small else raw
                continue
            start = code.pure("cvta.to.global.u64", "i64", raw)
            if slot == "status":
                self.status = start
            elif slot == "workspace":
                self.workspace = start
            else:
                buffer = next(b for b in self.kernel.buffers if b.name == slot)
                self.memory[slot] = Memory(
                    slot, buffer.dtype, buffer.shape, "global", start, slot not in self.written
                )

    # Lanes and steps

    def _lanes(self) -> None:
        code, team = self.code, self.team
        thread = code.pure("mov.u32", "i32", Value(code, "%tid.x", "i32"))
        block = code.pure("mov.u32", "i32", Value(code, "%ctaid.x", "i32"))
        self.symbols["lane"] = thread & (team.lanes - 1) if 1 < team.lanes <= WARP else thread
        if team.lanes > 1:
            self.facts = self.facts.with_ranges({"lane": (0, team.lanes - 1)})
        self.warp = thread.lshr(5)
        if team.across:
            self.symbols["column'"] = thread & (team.across - 1)
            self.symbols["row'"] = thread.lshr(team.across.bit_length() - 1)
            ranges = {"column'": (0, team.across - 1), "row'": (0, team.down - 1)}
            self.facts = self.facts.with_ranges(ranges)
        kind = "i32" if self.is_small(self.count + team.per_block) else "i64"
        block = code.pure("cvt.u64.u32", "i64", block) if kind == "i64" else block
        if team.per_block > 1:
            own = thread.lshr(team.lanes.bit_length() - 1) if team.lanes > 1 else thread
            own = code.pure("cvt.u64.u32", "i64", own) if kind == "i64" else own
            block = block * team.per_block + own
        self.team_number = block

    def _one_step(self) -> None:
        if not self.kernel.parallel:
            if self.team.per_block > 1:
                self.code.branch_if(self.team_number.compare("lt", 1), "$end", holds=False)
            return self.statements(self.kernel.body)
        step = self.team_number
        if self.team.per_block > 1:
            end = self.index(self.count, step.type)
            if self.team.is_part:  # all lanes of a warp go on, on the last step, and store nothing
                self.exists = step.compare("lt", end)
                step = self.code.intrinsic("smin", step, end - 1)
            else:
                self.code.branch_if(step.compare("lt", end), "$end", holds=False)
        self._body(step)

    def _rounds(self, step: Value) -> None:
        """Steps so far apart, one after the other, from the team's own."""
        kind = self.team_number.type

        def body(carry: Carry) -> Carry:
            self._body(self.symbols["round"])
            if self.team.lanes > 1:
                self.barrier()
            return carry

        end = self.index(self.count, kind)
        ends = (const(0), self.count - 1)
        self._counted("round", self.team_number, end, step, ends, [], body)

    def _body(self, step: Value) -> None:
        with self.at_step(step):
            self.versions(self.kernel.body)

    @contextmanager
    def at_step(self, step: Value) -> Iterator[None]:
        """Inside, the parallel indices are those of a step."""
        rest = sym("step")
        with self.named(step=(step, const(0), self.count - 1)):
            places: dict[str, Expr] = {}
            whole = const(1)
            for name, extent in reversed(self.kernel.parallel[1:]):
                whole = whole * extent
                if 1 < self.team.lanes <= WARP:  # of others most indices are needed
                    self.divisors.add(whole)
                places[name] = mod(rest, extent, self.facts)
                rest = floordiv(rest, extent, self.facts)
            if self.kernel.parallel:
                places[self.kernel.parallel[0][0]] = rest
            with self.binding(**places):
                yield

    # Scratch

    def _plan_scratch(self) -> None:
        """Where each scratch array lies."""
        self.width = vector_width(self)
        private = private_arrays(self)
        arrays: list[tuple[Alloc, Expr]] = []
        total = const(0)
        for s in walk(self.kernel.body):
            if not isinstance(s, Alloc):
                continue
            if not s.shape or s.name in private:
                self.memory[s.name] = Memory(s.name, s.dtype, s.shape, "registers")
                continue
            arrays.append((s, total))
            total = total + _bytes(s)
        self.arrays = arrays
        most = self.facts.bounds(total)[1]
        self.rounds = most is None or most * self.team.per_block + 1024 > self.shared_limit
        self.team_bytes = total
        if self.rounds:
            self.scratch = total
        else:
            self.shared = total * self.team.per_block

    def _is_round(self) -> bool:
        return self.rounds

    def _set_up(self) -> None:
        """The addresses of scratch arrays."""
        code = self.code
        for s, offset in self.arrays:
            if self.rounds:
                own = self.team_number.to("sext", "i64") * self.index(self.scratch, "i64")
                start = self.workspace + own + self.index(offset, "i64")
                self.memory[s.name] = Memory(s.name, s.dtype, s.shape, "global", start)
                continue
            start = self.shared_address(offset)
            if self.team.per_block > 1:
                start = start + self.warp * self.index(self.team_bytes, "i32")
            self.memory[s.name] = Memory(s.name, s.dtype, s.shape, "shared", start)
        del code

    def reserve(self, size: int) -> Expr:
        offset = self.shared
        self.shared = self.shared + (size + 15) // 16 * 16
        return offset

    def shared_address(self, offset: Expr) -> Value:
        code = self.code
        code.tables.add("shared")
        start = code.pure("mov.u32", "i32", Value(code, "sf_shared", "i32"))
        return start + self.index(offset, "i32")

    def in_loop(self) -> bool:
        return self.rounds or super().in_loop()


def _as_stored(kernel: Kernel, facts: Facts) -> Facts:
    """These facts with what follows from that every buffer lies in a device's memory."""
    for b in kernel.buffers:
        for axis, extent in enumerate(b.shape):
            name, size = extent.as_symbol(), b.dtype.itemsize
            if name is None:
                continue
            for other in (*b.shape[:axis], *b.shape[axis + 1 :]):
                size *= max(facts.bounds(other)[0] or 1, 1)
            low, high = facts.ranges.get(name, (0, None))
            most = None if high is None else facts.bounds(high)[1]
            if most is None or most > MOST_BYTES // size:
                facts = facts.with_ranges({name: (low, MOST_BYTES // size)})
    return facts


def _bytes(s: Alloc) -> Expr:
    size = const(s.dtype.itemsize)
    for extent in s.shape:
        size = size * extent
    known = size.as_int()
    if known is not None:
        return const(-(-known // 16) * 16)
    return floordiv(size + 15, 16) * 16


def module_text(entries: Sequence[Entry], arch: str, source_name: str) -> str:
    """The PTX module of entries for a target."""
    tables = frozenset[str]().union(*(e.tables for e in entries))
    head = [f".version {PTX_VERSION}", f".target {arch}", ".address_size 64", ""]
    head.append(f'.file 1 "{source_name}"')
    if "shared" in tables:
        align = 1024 if "aligned shared" in tables else 16
        head.append(f".extern .shared .align {align} .b8 sf_shared[];")
    if "two_over_pi" in tables:
        listed = [constant_text(v, "double") for row in two_over_pi_table() for v in row]
        head.append(
            f".global .align 8 .f64 sf_two_over_pi[{len(listed)}] = {{{', '.join(listed)}}};"
        )
    return "\n".join([*head, "", "\n\n".join(e.text for e in entries), ""])
