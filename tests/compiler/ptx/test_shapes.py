"""Instructions that are read by their shape are what the grammar reads one by one."""

from __future__ import annotations

import random
import re
from pathlib import Path

from stagefuse.compiler.ptx import PtxError, read_module
from stagefuse.compiler.ptx import syntax as s
from stagefuse.compiler.ptx.shapes import fillings, outline, shape_of

FIXTURES = Path(__file__).parents[2] / "runtime" / "emulator" / "fixtures"
HEAD = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .b8 memory[];
.entry k(.param .u64 x) {
    .reg .pred %p<3>; .reg .b32 %r<9>, a, $b; .reg .b64 %rd<4>; .reg .f32 %f<9>; .reg .v2 .b32 v;
"""
NAMES = ["%r1", "%r8", "%r9", "a", "$b", "v.x", "v", "%f3", "%rd2", "memory", "_", "%tid.x",
         "%nothing", "%p1", "L"]  # fmt: skip
NUMBERS = ["0", "7", "-7", "- 7", "+3", "0x1F", "0b101", "017", "09", "3U", "-3U", "WARP_SZ", "1.5",
           "9223372036854775808", "-9223372036854775808", "18446744073709551615", "0f3F800000",
           "-0f3F800000", "0d3FF0000000000000", "1e3", "2+3", "7 % 4", "(.u64) -1", "~3", "!0",
           "1?2:3", "0f3F", "12abc", "(4)"]  # fmt: skip


def operand(chance: random.Random, depth: int = 0) -> str:
    """An operand, mostly a right one."""
    name, number = chance.choice(NAMES), chance.choice(NUMBERS)
    kinds = [name, name, number, f"{name}+{number}", f"[{name}]", f"[{name}+{number}]", f"!{name}",
             f"[ {name} + {number} ]", f"[{number}]", f"{name}|%p1", f"{name} {number}", f"@{name}",
             f"[{name}+-{chance.randrange(99)}]"]  # fmt: skip
    if depth < 2:
        inner = ", ".join(operand(chance, depth + 1) for _ in range(chance.randrange(1, 4)))
        kinds += [f"{{{inner}}}", f"[{name}, {{{inner}}}]", f"({inner})"]
    return chance.choice(kinds)


def read(statement: str) -> s.Module | tuple[str, int]:
    """A module with a statement, or the error of it."""
    try:
        return read_module(f"{HEAD}{statement}\nL:\n ret;\n}}\n")
    except PtxError as error:
        return error.message, error.line


def test_shapes_are_filled_in_as_the_grammar_reads(program_seed: int) -> None:
    """A comment within an instruction makes the grammar read it."""
    chance = random.Random(program_seed)
    kinds: dict[bool, int] = {True: 0, False: 0}
    for _ in range(400):
        guard = chance.choice(["", "", "@%p1 ", "@!%p2 ", "@%r7 ", "@!%p1\n  "])
        name = chance.choice(["add.s32", "call", "call.uni", "ld.shared::cta.v2.b32", "ret"])
        gap = chance.choice([" ", "\t", "\n "])
        text = ", ".join(operand(chance) for _ in range(chance.randrange(4)))
        tail = chance.choice([";", ";", ";", ";", ""])
        whole = f"{guard}{name}{gap}{text}{tail}"
        one, other = read(whole), read(f"{guard}{name} /**/{gap}{text}{tail}")
        if isinstance(other, tuple) and not other[1]:  # the grammar alone does not know the line
            assert isinstance(one, tuple)
            other = other[0], one[1]
        assert one == other, whole
        if isinstance(one, s.Module) and isinstance(other, s.Module):
            first, second = (
                [x.line for x in m.functions[0].body or () if isinstance(x, s.Instruction)]
                for m in (one, other)
            )
            assert first == second, whole
        kinds[isinstance(one, s.Module)] += 1
    assert min(kinds.values()) > 40


def test_text_of_compilers_is_read_as_the_grammar_reads_it() -> None:
    for name in ("sync.ptx", "triton.scan_sort.sm_80.ptx", "library.ptx"):
        text = (FIXTURES / name).read_text()
        apart = re.sub(
            r"^(\s*(?:@!?%\w+\s)?[a-z][\w.:]*\s)([^:]*;)$", r"\1/**/\2", text, flags=re.M
        )
        assert apart != text
        assert read_module(text) == read_module(apart)


def test_numbers_that_are_part_of_an_expression_are_not_filled_in() -> None:
    hole = shape_of((s.Symbol("%0"),))
    assert outline(" %r1, -4, 0f3F800000;") == " ?, -#, #;"
    assert outline(" [memory+16], {%r1, WARP_SZ};") == " [?+#], {?, WARP_SZ};"
    assert fillings(" %r1;", hole) == ["%r1"]
