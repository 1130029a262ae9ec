"""Loads, stores, addresses, caches, asynchronous copies (PTX ISA, "Data Movement")."""

from __future__ import annotations

from .record import Form

_SECTION = "Data Movement and Conversion Instructions"
_ASYNC = "Data Movement and Conversion Instructions: Asynchronous copy"
_READS, _WRITES = frozenset({"reads"}), frozenset({"writes"})


def _memory(opcode: str, modifiers: str, operands: str, summary: str, target: int = 0,
            version: tuple[int, int] = (1, 0), effects: frozenset[str] = frozenset(),
            meaning: str = "", section: str = _SECTION, **choices: str) -> Form:  # fmt: skip
    return Form(opcode, modifiers, operands, meaning or f"memory.{opcode}", section, choices,
                version, target, effects=effects, summary=summary)  # fmt: skip


def _moves(opcode: str, head: str, tail: str, operands: str, summary: str, target: int = 0,
           version: tuple[int, int] = (1, 0), **choices: str) -> tuple[Form, ...]:  # fmt: skip
    """A load or store of one value, and of vectors of up to 16 bytes; one of 16 bytes came late."""
    effects = _WRITES if opcode == "st" else _READS
    meaning = "memory.st" if opcode == "st" else "memory.ld"
    rows = [("", "", f"{_SMALL} {_LARGE}"), ("vec", "v2 v4", _SMALL), ("vec", "v2", _LARGE)]
    rows += [("", "", "b128")] if opcode != "ldu" else []
    return tuple(
        Form(opcode, " ".join((head, tail, vector, "T")), operands, meaning, _SECTION,
             {"T": types, **({"vec": words} if words else {}), **choices},
             max(version, (8, 3)) if types == "b128" else version,
             max(target, 70) if types == "b128" else target, effects=effects, summary=summary)
        for vector, words, types in rows
    )  # fmt: skip


_SPACES = "global shared shared::cta local const param param::entry"
_SMALL = "b8 b16 b32 u8 u16 u32 s8 s16 s32 f32"
_LARGE = "b64 u64 s64 f64"
_SHARED = "shared shared::cta"
_CACHES = "?evict ?hint ?prefetched"
_LD, _ST = ">d:T*vec~ [a] h:b64?", "[a] b:T*vec~ h:b64?"
_SCOPES = (("cta gpu sys", _SHARED, 70, (6, 0)), ("cta cluster gpu sys",
           f"{_SHARED} shared::cluster", 90, (7, 8)))  # fmt: skip

FORMS = (
    *_moves("ld", "?weak ?space ?cop", _CACHES, _LD, "load", cop="ca cg cs lu cv",
            space=f"global {_SHARED} local const param param::entry param::func"),
    *_moves("ld", "?weak space", "", ">d:T*vec~ [a]", "load from another block of the cluster",
            90, (7, 8), space="shared::cluster"),
    *_moves("ld", "volatile ?space", "?prefetched", ">d:T*vec~ [a]", "load, never left out",
            space=f"global {_SHARED}"),
    *_moves("ld", "volatile space", "", ">d:T*vec~ [a]", "load, never left out", 90, (7, 8),
            space="shared::cluster"),
    _memory("ld", "mmio relaxed sys ?global T", ">d:T~ [a]", "load, exactly once", 70, (8, 2),
            _READS, T=f"{_SMALL} {_LARGE}"),
    *(
        form
        for scopes, spaces, target, version in _SCOPES
        for form in (
            *_moves("ld", "O scope ?space", _CACHES, _LD, "load with an order", target, version,
                    O="relaxed acquire", scope=scopes, space=f"global {spaces}"),
            *_moves("st", "O scope ?space", "?evict ?hint", _ST, "store with an order", target,
                    version, O="relaxed release", scope=scopes, space=f"global {spaces}"),
        )
    ),
    *_moves("ld", "global ?cop nc", _CACHES, ">d:T*vec~ [a:global] h:b64?",
            "load of what no thread writes", 32, (3, 1), cop="ca cg cs"),
    *_moves("ldu", "?global", "", ">d:T*vec~ [a]", "load of what is the same for a warp", 20,
            (2, 0)),
    *_moves("st", "?weak ?space ?cop", "?evict ?hint", _ST, "store", cop="wb cg cs wt",
            space=f"global {_SHARED} local param param::func"),
    *_moves("st", "?weak space", "", "[a] b:T*vec~", "store to another block of the cluster", 90,
            (7, 8), space="shared::cluster"),
    *_moves("st", "volatile ?space", "", "[a] b:T*vec~", "store, never left out",
            space=f"global {_SHARED}"),
    *_moves("st", "volatile space", "", "[a] b:T*vec~", "store, never left out", 90, (7, 8),
            space="shared::cluster"),
    _memory("st", "mmio relaxed sys ?global T", "[a] b:T~", "store, exactly once", 70, (8, 2),
            _WRITES, T=f"{_SMALL} {_LARGE}"),
    _memory("prefetch", "?space L", "[a]", "bring a line into a cache", 20, (2, 0),
            L="L1 L2", meaning="memory.prefetch", space="global local"),
    _memory("prefetch", "global L", "[a]", "bring a line into a cache", 80, (7, 4),
            L="L2::evict_last L2::evict_normal", meaning="memory.prefetch"),
    _memory("prefetchu", "L1", "[a]", "bring a line into the uniform cache", 20, (2, 0),
            meaning="memory.prefetch"),
    _memory("applypriority", "?global L2::evict_normal", "[a] #size:u32", "change a priority", 80,
            (7, 4), meaning="memory.prefetch"),
    _memory("discard", "?global L2", "[a] #size:u32", "forget a line without writing it", 80,
            (7, 4), _WRITES),
    _memory("createpolicy", "fractional P ?Q b64", ">d:b64 f:f32?", "a cache policy", 80, (7, 4),
            P="L2::evict_last L2::evict_normal L2::evict_first L2::evict_unchanged",
            Q="L2::evict_first L2::evict_unchanged", meaning="memory.createpolicy"),
    _memory("createpolicy", "range ?global P ?Q b64", ">d:b64 [a] n:u32 whole:u32",
            "a cache policy for a range of addresses", 80, (7, 4),
            P="L2::evict_last L2::evict_normal L2::evict_first L2::evict_unchanged",
            Q="L2::evict_first L2::evict_unchanged", meaning="memory.createpolicy"),
    _memory("createpolicy", "cvt L2 b64", ">d:b64 a:b64", "a cache policy from access properties",
            80, (7, 4), meaning="memory.createpolicy"),
    _memory("isspacep", "S", ">p:pred a:u64", "whether a generic address is in that space", 20,
            (2, 0), S=_SPACES),
    _memory("cvta", "to S T", ">d:T a:T", "generic address to address in that space", 20, (2, 0),
            S=_SPACES,
            T="u32 u64"),
    _memory("cvta", "S T", ">d:T a:T", "address in that space to generic address", 20, (2, 0),
            S=_SPACES,
            T="u32 u64"),
    _memory("cvta", "to shared::cluster T", ">d:T a:T",
            "generic address to address in the cluster's shared memory", 90, (7, 8), T="u32 u64"),
    _memory("cvta", "shared::cluster T", ">d:T a:T",
            "address in the cluster's shared memory to generic address", 90, (7, 8), T="u32 u64"),
    _memory("isspacep", "shared::cluster", ">p:pred a:u64",
            "whether a generic address is in the cluster's shared memory", 90, (7, 8)),
    _memory("cp", "async C S global ?hint ?prefetched",
            "[d:shared] [a:global] #size:u32 n:u32? h:b64?",
            "copy in the background; bytes after n are 0", 80, (7, 0), frozenset({"async"}),
            "async.copy", _ASYNC, C="ca cg", S="shared shared::cta"),
    _memory("cp", "async C S global ?prefetched", "[d:shared] [a:global] #size:u32 !p:pred",
            "copy in the background; where p, zeros", 80, (7, 0), frozenset({"async"}),
            "async.copy_unless", _ASYNC, C="ca cg", S="shared shared::cta"),
    _memory("cp", "async commit_group", "", "copies since the last group become a group", 80,
            (7, 0), frozenset({"async"}), "async.commit_group", _ASYNC),
    _memory("cp", "async wait_group", "#n:u32", "wait until at most n groups are open", 80, (7, 0),
            frozenset({"async", "barrier"}), "async.wait_group", _ASYNC),
    _memory("cp", "async wait_all", "", "wait for all copies", 80, (7, 0),
            frozenset({"async", "barrier"}), "async.wait_all", _ASYNC),
)  # fmt: skip
