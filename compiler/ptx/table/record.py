"""What a row of the instruction table is, and the two small notations that it is written in.

*Modifiers*, in the order of the instruction: `rn` is that word; `rnd` a word of the slot of that
name in `SLOTS`; a slot that the row defines itself (`T` below) is one of the row's words; `?`
before either makes it optional.

*Operands*: `>d:T` a result of type `T`, `>_:T` one that must be `_`, `a:T` a register or constant,
`#i:u32` a constant, `!p:pred` a predicate that may be inverted, `[a]` an address, `[a:shared]` one
in that space, `[t:tensor]` one of a tensor with coordinates, `@l` a label or function, `(x)` a list
of arguments. A type is a word, a slot (its word), `wide(T)` (twice the bits), `bits(T)` (the same
size, untyped). After a type: `*4` four in braces, `*vec` as many as that slot says, `*S/2` half the
N of that slot's shape, `~` a wider register will do, `|p` a second result, a predicate, that may be
missing; `?` at the end an operand that may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import field
from functools import cached_property

from stagefuse.compiler.ptx.types import TYPES
from stagefuse.dsl.frozen import frozen

SLOTS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "rnd": "rn rz rm rp",
        "irnd": "rni rzi rmi rpi",
        "half": "lo hi",
        "cmp": "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan",
        "bool": "and or xor",
        "order": "relaxed acquire release acq_rel",
        "scope": "cta cluster gpu sys",
        "space": "global shared shared::cta shared::cluster local const param "
        "param::entry param::func",
        "cop": "ca cg cs lu cv wb wt",
        "evict": "L1::evict_normal L1::evict_unchanged L1::evict_first L1::evict_last "
        "L1::no_allocate",
        "hint": "L2::cache_hint",
        "prefetched": "L2::64B L2::128B L2::256B",
        "vec": "v2 v4",
        "uni": "uni",
        "aligned": "aligned",
    }.items()
}


@frozen
class OperandSpec:
    """One operand of a form. `kind`: value, constant, predicate, address, label or arguments."""

    name: str
    kind: str
    type: str = ""
    is_result: bool = False
    count: str = ""
    loose: bool = False
    paired: bool = False
    optional: bool = False
    space: str = ""


_SPEC = re.compile(
    r"(?P<result>>)?(?P<mark>[#!])?(?P<name>\w+)(:(?P<type>[\w:()]+))?(\*(?P<count>\w+(/\d)?))?"
    r"(?P<loose>~)?(?P<paired>\|p)?(?P<optional>\?)?"
)
_ADDRESS = re.compile(r"\[(?P<name>\w+)(:(?P<space>[\w:]+))?\](?P<optional>\?)?")


def operand_spec(text: str) -> OperandSpec:
    """An operand from the notation of the table."""
    optional = text.endswith("?")
    if text[0] == "@":
        return OperandSpec(text[1:].rstrip("?"), "label", optional=optional)
    if text[0] == "(":
        return OperandSpec(text[1:].rstrip("?)"), "arguments", optional=optional)
    if (m := _ADDRESS.fullmatch(text)) is not None:
        return OperandSpec(m["name"], "address", optional=optional, space=m["space"] or "")
    m = _SPEC.fullmatch(text)
    if m is None:
        raise ValueError(f"no operand: {text}")
    kind = {"#": "constant", "!": "predicate", None: "value"}[m["mark"]]
    return OperandSpec(
        m["name"], kind, m["type"] or "", bool(m["result"]), m["count"] or "",
        bool(m["loose"]), bool(m["paired"]), optional,
    )  # fmt: skip


@frozen
class Slot:
    """One place among the modifiers: its name, its words, whether it may be missing."""

    name: str
    words: tuple[str, ...]
    optional: bool


@frozen
class Form:
    """One form of an instruction, and all that is known about it.

    `meaning` names the emulator's function. `effects` are among `reads`, `writes`, `control`,
    `barrier` (orders or waits), `converge` (all lanes named by a mask take part), `async`.
    `version` and `target` are the first that have it; `arch` is a target that must be exact
    (`90a`), since later ones lack it.
    """

    opcode: str
    modifiers: str
    operands: str
    meaning: str
    section: str
    choices: Mapping[str, str] = field(default_factory=dict)
    version: tuple[int, int] = (1, 0)
    target: int = 0
    arch: str = ""
    effects: frozenset[str] = frozenset()
    summary: str = ""

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        found = []
        for word in self.modifiers.split():
            name = word.lstrip("?")
            if name in self.choices:
                words = tuple(self.choices[name].split())
            else:
                words = SLOTS.get(name, (name,))
            found.append(Slot(name, words, word[0] == "?"))
        return tuple(found)

    @cached_property
    def specs(self) -> tuple[OperandSpec, ...]:
        return tuple(map(operand_spec, self.operands.split()))

    @property
    def results(self) -> tuple[OperandSpec, ...]:
        return tuple(spec for spec in self.specs if spec.is_result)

    def match(self, modifiers: Iterable[str]) -> Match | None:
        """The words of the slots, if these modifiers are this form's."""
        rest = list(modifiers)
        found: dict[str, str] = {}
        for slot in self.slots:
            if rest and rest[0] in slot.words and found.get(slot.name, rest[0]) == rest[0]:
                found[slot.name] = rest.pop(0)
            elif not slot.optional:
                return None
        return Match(self, found) if not rest else None

    def match_unordered(self, modifiers: Iterable[str]) -> Match | None:
        """As `match`, of modifiers in another order than the ISA's."""
        rest = list(modifiers)
        found: dict[str, str] = {}
        for slot in self.slots:
            word = next((w for w in rest if w in slot.words), None)
            if word is not None:
                found[slot.name] = word
                rest.remove(word)
            elif not slot.optional:
                return None
        return Match(self, found) if not rest else None

    def pattern(self) -> str:
        """The form as the reference prints it."""
        text = self.opcode
        for slot in self.slots:
            shown = slot.name if len(slot.words) > 1 else slot.words[0]
            text += f"{{.{shown}}}" if slot.optional else f".{shown}"
        return text


@frozen
class Match:
    """A form with the words of an instruction in its slots."""

    form: Form
    slots: Mapping[str, str]

    def __contains__(self, slot: str) -> bool:
        return slot in self.slots

    def get(self, slot: str, default: str = "") -> str:
        """The word in a slot, or `default` where the instruction leaves it out."""
        return self.slots.get(slot, default)

    def type_of(self, spec: OperandSpec) -> str:
        """The type of an operand."""
        return self.resolve(spec.type)

    def resolve(self, expression: str) -> str:
        if expression.endswith(")"):
            function, inner = expression[:-1].split("(")
            kind = TYPES[self.resolve(inner)]
            if function == "bits":
                return f"b{kind.bits}"
            assert function == "wide"
            return f"{kind.name[0]}{kind.bits * 2}"
        return self.slots.get(expression, expression)

    def count_of(self, spec: OperandSpec) -> int:
        """How many values stand in braces, 0 for no braces."""
        if not spec.count:
            return 0
        if spec.count.isdigit():
            return int(spec.count)
        if "/" in spec.count:
            slot, parts = spec.count.split("/")
            return int(self.slots[slot].split("n")[1].split("k")[0]) // int(parts)
        word = self.slots.get(spec.count, "")
        return int(word.lstrip("vx")) if word else 0
