"""How finely races are looked for in a kernel's memory."""

from __future__ import annotations

from stagefuse.compiler.ptx import syntax as s
from stagefuse.compiler.ptx.table import Match
from stagefuse.compiler.ptx.types import TYPES
from stagefuse.dsl.frozen import frozen


@frozen
class Granules:
    """Bytes of the smallest accesses of a kernel to shared and to global memory, at most 16: how
    finely races are looked for."""

    shared: int = 16
    globals: int = 16

    def joined(self, other: Granules) -> Granules:
        return Granules(min(self.shared, other.shared), min(self.globals, other.globals))

    def with_access(self, match: Match, operands: dict[str, s.Operand | None]) -> Granules:
        """These, and what an instruction accesses."""
        addresses = [spec for spec in match.form.specs if spec.kind == "address"]
        if not addresses:
            return self
        size = _accessed(match, operands)
        named = {match.get("space"), *(spec.space for spec in addresses)} - {""}
        if named and named <= {"param", "param::entry", "local", "const"}:
            return self
        if all(name.startswith("shared") for name in named) and named:
            return self.joined(Granules(size, 16))
        if named and not any(name.startswith("shared") for name in named):
            return self.joined(Granules(16, size))
        return self.joined(Granules(size, size))


def _accessed(match: Match, operands: dict[str, s.Operand | None]) -> int:
    """The bytes of an instruction's accesses, or of the smallest of them."""
    form = match.form
    if "T" in match:
        return TYPES[match.get("T")].size_bytes * int(match.get("vec", "v1")[1:])
    if form.opcode in ("ldmatrix", "stmatrix"):
        return 16
    if form.meaning.startswith("async.copy"):
        whole = operands["size"] if operands.get("n") is None else None
        return whole.value if isinstance(whole, s.Immediate) else 4
    if form.effects & {"async", "barrier"}:
        return 8
    words = [TYPES[word].size_bytes for word in match.slots.values() if word in TYPES]
    return min([4, *words])
