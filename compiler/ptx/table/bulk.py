"""Bulk and tensor copies (PTX ISA, "Data Movement": asynchronous copy, bulk and tensor)."""

from __future__ import annotations

from .record import Form

_SECTION = "Data Movement and Conversion Instructions: Bulk and tensor copy"
_BYTES = "mbarrier::complete_tx::bytes"
_ASYNC = frozenset({"async"})
_CHOICES = {
    "dim": "1d 2d 3d 4d 5d",
    "C": "shared::cluster shared::cta",
    "mode": "tile im2col",
    "redop": "add min max inc dec and or xor",
    "group": "cta_group::1",
}


def _bulk(opcode: str, modifiers: str, operands: str, summary: str, meaning: str,
          version: tuple[int, int] = (8, 0), **choices: str) -> Form:  # fmt: skip
    return Form(opcode, modifiers, operands, f"bulk.{meaning}", _SECTION, _CHOICES | choices,
                version, 90, effects=_ASYNC, summary=summary)  # fmt: skip


FORMS = (
    _bulk("cp", f"async bulk C global {_BYTES} ?hint", "[d] [a:global] n:u32 [m] h:b64?",
          "copy n bytes in; they count on an mbarrier", "load"),
    _bulk("cp", f"async bulk shared::cluster global {_BYTES} multicast::cluster ?hint",
          "[d] [a:global] n:u32 [m] mask:b16 h:b64?",
          "copy n bytes into each block of a mask", "load_multicast"),
    _bulk("cp", f"async bulk shared::cluster shared::cta {_BYTES}", "[d] [a] n:u32 [m]",
          "copy n bytes to another block's shared memory", "push"),
    _bulk("cp", "async bulk global shared::cta bulk_group ?hint", "[d:global] [a] n:u32 h:b64?",
          "copy n bytes out", "store"),
    _bulk("cp", "reduce async bulk global shared::cta bulk_group ?hint redop ?noftz T",
          "[d:global] [a] n:u32 h:b64?", "combine n bytes with global memory", "reduce",
          T="f16 bf16 b32 u32 s32 b64 u64 s64 f32 f64"),
    _bulk("cp", f"reduce async bulk shared::cluster shared::cta {_BYTES} redop T",
          "[d] [a] n:u32 [m]", "combine n bytes with another block's shared memory", "push_reduce",
          T="b32 b64 u32 s32 u64 s64"),
    _bulk("cp", "async bulk prefetch L2 global ?hint", "[a:global] n:u32 h:b64?",
          "bring n bytes into the L2 cache", "prefetch"),
    _bulk("cp", "async bulk commit_group", "", "stores since the last group become a group",
          "commit_group"),
    _bulk("cp", "async bulk wait_group ?read", "#n:u32",
          "wait until at most n groups are open (read: until their sources may be reused)",
          "wait_group"),
    _bulk("cp", f"async bulk tensor dim C global ?mode {_BYTES} ?group ?hint",
          "[d] [t] [m] h:b64?", "copy a box of a tensor in", "tensor_load"),
    _bulk("cp", f"async bulk tensor dim shared::cluster global ?mode {_BYTES} multicast::cluster "
          "?group ?hint", "[d] [t] [m] mask:b16 h:b64?",
          "copy a box of a tensor into each block of a mask", "tensor_load_multicast"),
    _bulk("cp", "async bulk tensor dim global shared::cta ?mode bulk_group ?hint",
          "[t] [a] h:b64?", "copy a box of a tensor out", "tensor_store"),
    _bulk("cp", "reduce async bulk tensor dim global shared::cta redop ?mode bulk_group ?hint",
          "[t] [a] h:b64?", "combine a box with a tensor", "tensor_reduce"),
    _bulk("cp", "async bulk prefetch tensor dim L2 global ?mode ?hint", "[t] h:b64?",
          "bring a box of a tensor into the L2 cache", "prefetch_tensor"),
    _bulk("prefetch", "?P tensormap", "[a]", "bring a tensor map into its cache",
          "prefetch_map", P="const param"),
    _bulk("fence", "proxy F order scope", "[a] #n:u32", "a tensor map changed elsewhere is seen",
          "fence_map", (8, 3), F="tensormap::generic", order="acquire"),
    _bulk("fence", "proxy F order scope", "", "a change of a tensor map is published",
          "fence_map", (8, 3), F="tensormap::generic", order="release"),
    _bulk("st", f"async ?weak ?S {_BYTES} ?vec T", "[d] b:T*vec [m]",
          "store to another block's shared memory; it counts on its mbarrier", "st_async", (8, 1),
          T="b32 b64 u32 u64 s32 s64 f32 f64", S="shared::cluster"),
    _bulk("red", f"async relaxed cluster ?S {_BYTES} redop T", "[d] b:T [m]",
          "combine with another block's shared memory; it counts on its mbarrier", "red_async",
          (8, 1), T="b32 u32 s32 u64 b64", S="shared::cluster"),
)  # fmt: skip
