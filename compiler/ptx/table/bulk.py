"""Bulk and tensor copies (PTX ISA, "Data Movement": asynchronous copy, bulk and tensor)."""

from __future__ import annotations

from .record import Form

_SECTION = "Data Movement and Conversion Instructions: Bulk and tensor copy"
_BYTES = "mbarrier::complete_tx::bytes"
_ASYNC = frozenset({"async"})
_CHOICES = {
    "dim": "1d 2d 3d 4d 5d",
    "C": "shared::cluster shared::cta",
    "redop": "add min max inc dec and or xor",
}
_PUSHED = (
    ("add", "u32 s32 u64"),
    ("min max", "u32 s32"),
    ("inc dec", "u32"),
    ("and or xor", "b32"),
)
"""What can be combined in another block's shared memory: operations and their types."""


def _bulk(opcode: str, modifiers: str, operands: str, summary: str, meaning: str,
          version: tuple[int, int] = (8, 0), **choices: str) -> Form:  # fmt: skip
    return Form(opcode, modifiers, operands, f"bulk.{meaning}", _SECTION, _CHOICES | choices,
                version, 90, effects=_ASYNC, summary=summary)  # fmt: skip


def _reduce(ops: str, types: str, noftz: str = "") -> Form:
    return _bulk("cp", f"reduce async bulk global shared::cta bulk_group ?hint redop {noftz}T",
                 "[d:global] [a:shared] n:u32 h:b64?", "combine n bytes with global memory",
                 "reduce", redop=ops, T=types)  # fmt: skip


def _im2col(dim: int) -> tuple[Form, ...]:
    """Copies of columns of pixels; loads move each pixel by an offset along each axis."""
    offsets, only = f"o:b16*{dim - 2}", f"{dim}d"
    load = f"[d:shared] [t:tensor] [m:shared] {offsets}"
    text = "copy a column of pixels"
    return (
        _bulk("cp", f"async bulk tensor dim shared::cluster global im2col {_BYTES} ?hint",
              f"{load} h:b64?", f"{text} in", "tensor_load", dim=only),
        _bulk("cp", f"async bulk tensor dim shared::cta global im2col {_BYTES} ?hint",
              f"{load} h:b64?", f"{text} in", "tensor_load", (8, 6), dim=only),
        _bulk("cp", f"async bulk tensor dim shared::cluster global im2col {_BYTES} "
              "multicast::cluster ?hint", f"{load} mask:b16 h:b64?",
              f"{text} into each block of a mask", "tensor_load_multicast", dim=only),
        _bulk("cp", "async bulk tensor dim global shared::cta im2col_no_offs bulk_group ?hint",
              "[t:tensor] [a:shared] h:b64?", f"{text} out", "tensor_store", dim=only),
        _bulk("cp", "reduce async bulk tensor dim global shared::cta redop im2col_no_offs "
              "bulk_group ?hint", "[t:tensor] [a:shared] h:b64?",
              "combine a column of pixels with a tensor", "tensor_reduce", dim=only),
        _bulk("cp", "async bulk prefetch tensor dim L2 global im2col ?hint",
              f"[t:tensor] {offsets} h:b64?", "bring a column of pixels into the L2 cache",
              "prefetch_tensor", dim=only),
    )  # fmt: skip


FORMS = (
    _bulk("cp", f"async bulk shared::cluster global {_BYTES} ?hint",
          "[d:shared] [a:global] n:u32 [m:shared] h:b64?",
          "copy n bytes in; they count on an mbarrier", "load"),
    _bulk("cp", f"async bulk shared::cta global {_BYTES} ?hint",
          "[d:shared] [a:global] n:u32 [m:shared] h:b64?",
          "copy n bytes in; they count on an mbarrier", "load", (8, 6)),
    _bulk("cp", f"async bulk shared::cluster global {_BYTES} multicast::cluster ?hint",
          "[d:shared] [a:global] n:u32 [m:shared] mask:b16 h:b64?",
          "copy n bytes into each block of a mask", "load_multicast"),
    _bulk("cp", f"async bulk shared::cluster shared::cta {_BYTES}",
          "[d:shared] [a:shared] n:u32 [m:shared]", "copy n bytes to another block's shared memory",
          "push"),
    _bulk("cp", "async bulk global shared::cta bulk_group ?hint",
          "[d:global] [a:shared] n:u32 h:b64?", "copy n bytes out", "store"),
    _reduce("add", "u32 s32 u64 f32 f64"),
    _reduce("add", "f16 bf16", "noftz "),
    _reduce("min max", "u32 s32 u64 s64 f16 bf16"),
    _reduce("inc dec", "u32"),
    _reduce("and or xor", "b32 b64"),
    *(
        _bulk("cp", f"reduce async bulk shared::cluster shared::cta {_BYTES} redop T",
              "[d:shared] [a:shared] n:u32 [m:shared]",
              "combine n bytes with another block's shared memory", "push_reduce", redop=ops,
              T=types)
        for ops, types in _PUSHED
    ),
    _bulk("cp", "async bulk prefetch L2 global ?hint", "[a:global] n:u32 h:b64?",
          "bring n bytes into the L2 cache", "prefetch"),
    _bulk("cp", "async bulk commit_group", "", "stores since the last group become a group",
          "commit_group"),
    _bulk("cp", "async bulk wait_group ?read", "#n:u32",
          "wait until at most n groups are open (read: until their sources may be reused)",
          "wait_group"),
    _bulk("cp", f"async bulk tensor dim shared::cluster global ?tile {_BYTES} ?hint",
          "[d:shared] [t:tensor] [m:shared] h:b64?", "copy a box of a tensor in", "tensor_load"),
    _bulk("cp", f"async bulk tensor dim shared::cta global ?tile {_BYTES} ?hint",
          "[d:shared] [t:tensor] [m:shared] h:b64?", "copy a box of a tensor in", "tensor_load",
          (8, 6)),
    _bulk("cp", f"async bulk tensor dim shared::cluster global ?tile {_BYTES} multicast::cluster "
          "?hint", "[d:shared] [t:tensor] [m:shared] mask:b16 h:b64?",
          "copy a box of a tensor into each block of a mask", "tensor_load_multicast"),
    _bulk("cp", "async bulk tensor dim global shared::cta ?tile bulk_group ?hint",
          "[t:tensor] [a:shared] h:b64?", "copy a box of a tensor out", "tensor_store"),
    _bulk("cp", "reduce async bulk tensor dim global shared::cta redop ?tile bulk_group ?hint",
          "[t:tensor] [a:shared] h:b64?", "combine a box with a tensor", "tensor_reduce"),
    _bulk("cp", "async bulk prefetch tensor dim L2 global ?tile ?hint", "[t:tensor] h:b64?",
          "bring a box of a tensor into the L2 cache", "prefetch_tensor"),
    *(form for dim in (3, 4, 5) for form in _im2col(dim)),
    _bulk("prefetch", "?P tensormap", "[a:global]", "bring a tensor map into its cache",
          "prefetch_map", P="const param"),
    _bulk("fence", "proxy F order scope", "[a:global] #size:u32",
          "a tensor map changed elsewhere is seen", "fence_map", (8, 3), F="tensormap::generic",
          order="acquire"),
    _bulk("fence", "proxy F order scope", "", "a change of a tensor map is published",
          "fence_map", (8, 3), F="tensormap::generic", order="release"),
    _bulk("st", f"async ?weak ?S {_BYTES} ?vec T", "[d:shared] b:T*vec [m:shared]",
          "store to another block's shared memory; it counts on its mbarrier", "st_async", (8, 1),
          T="b32 b64 u32 u64 s32 s64 f32 f64", S="shared::cluster"),
    *(
        _bulk("red", f"async relaxed cluster ?S {_BYTES} redop T", "[d:shared] b:T [m:shared]",
              "combine with another block's shared memory; it counts on its mbarrier", "red_async",
              (8, 1), redop=ops, T=types, S="shared::cluster")
        for ops, types in _PUSHED
    ),
)  # fmt: skip
