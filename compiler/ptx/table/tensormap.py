"""Tensor maps changed by a kernel (PTX ISA, "Data Movement": tensormap)."""

from __future__ import annotations

from .record import Form

_SECTION = "Data Movement and Conversion Instructions: tensormap"
_WRITES = frozenset({"writes"})


def _replace(fields: str, type_: str, operands: str, version: tuple[int, int] = (8, 3)) -> Form:
    return Form("tensormap", f"replace tile F ?S b1024 {type_}", f"[a] {operands}",
                "bulk.replace_field", _SECTION, {"F": fields, "S": "global shared::cta"}, version,
                arch="90a", effects=_WRITES, summary="change a field of a tensor map")  # fmt: skip


FORMS = (
    _replace("global_address", "b64", "n:b64"),
    _replace("rank", "b32", "n:b32"),
    _replace("box_dim global_dim element_stride", "b32", "#ord:u32 n:b32"),
    _replace("global_stride", "b64", "#ord:u32 n:b64"),
    _replace("elemtype interleave_layout swizzle_mode fill_mode", "b32", "#mode:u32"),
    Form("tensormap",
         "cp_fenceproxy global shared::cta tensormap::generic release scope sync aligned",
         "[d:global] [a:shared] #size:u32", "bulk.publish_map", _SECTION, {}, (8, 3), 90,
         effects=_WRITES | {"converge"}, summary="copy a tensor map out and publish it"),
)  # fmt: skip
