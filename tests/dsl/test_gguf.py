"""GGUF files: what is read, what the library makes of blocks, and what is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.dsl.weights import WeightsError, open_weights

Bytes = np.ndarray[Any, Any]
Entry = tuple[str, tuple[int, ...], int, bytes]
"""A tensor: its name, shape, type and data."""


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def written(path: Path, entries: list[Entry], offsets: list[int] | None = None) -> Path:
    """A file with some metadata, and tensors one after another or at given offsets."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(entries), 3)
    out += text("general.name") + struct.pack("<I", 8) + text("a model")
    out += text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc")
    out += text("scores") + struct.pack("<IIQ2f", 9, 6, 2, 0.5, 1.5)
    at, places = 0, []
    for number, (name, shape, kind, data) in enumerate(entries):
        places.append(at if offsets is None else offsets[number])
        out += text(name) + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}Q", *shape[::-1])
        out += struct.pack("<IQ", kind, places[-1])
        at += -(-len(data) // 32) * 32
    out += bytes(-len(out) % 32)
    for _, _, _, data in entries:
        out += data + bytes(-len(data) % 32)
    path.write_bytes(out)
    return path


# Blocks by the definition in ggml-quants.c, element by element


def half(block: Bytes, at: int) -> np.float32:
    return np.float32(block[at : at + 2].view(np.float16)[0])


def small(block: Bytes, codes: int, high: int | None, zero: int, least: int | None) -> Any:
    """Types of 32 values: a scale, maybe a least value, nibbles, maybe a fifth bit."""
    d, m = half(block, 0), np.float32(0) if least is None else half(block, least)
    for j in range(32):
        byte = int(block[codes + j % 16])
        code = byte & 15 if j < 16 else byte >> 4
        if high is not None:
            code |= (int(block[high + j // 8]) >> j % 8 & 1) << 4
        yield d * np.float32(code - zero) + m


def q8_0(block: Bytes) -> Any:
    return [half(block, 0) * np.float32(q) for q in block[2:].view(np.int8)]


def six_bits(scales: Bytes, s: int) -> tuple[int, int]:
    """The scale and the least value of group s: `get_scale_min_k4`."""
    b = [int(v) for v in scales]
    if s < 4:
        return b[s] & 63, b[s + 4] & 63
    return b[s + 4] & 15 | b[s - 4] >> 6 << 4, b[s + 4] >> 4 | b[s] >> 6 << 4


def large(block: Bytes, codes: int, high: int | None) -> Any:
    """Q4_K and Q5_K."""
    d, m = half(block, 0), half(block, 2)
    for s in range(8):
        scale, least = six_bits(block[4:16], s)
        for i in range(32):
            code = int(block[codes + s // 2 * 32 + i]) >> 4 * (s % 2) & 15
            if high is not None:
                code |= (int(block[high + i]) >> s & 1) << 4
            yield d * np.float32(scale) * np.float32(code) - m * np.float32(least)


def q6_k(block: Bytes) -> Any:
    d, scales = half(block, 208), block[192:208].view(np.int8)
    for j in range(256):
        n, r, i = j // 128, j % 128 // 32, j % 32
        low = int(block[64 * n + 32 * (r % 2) + i]) >> 4 * (r // 2) & 15
        code = low | (int(block[128 + 32 * n + i]) >> 2 * r & 3) << 4
        yield d * np.float32(scales[j // 16]) * np.float32(code - 32)


def two_bits(block: Bytes, codes: int, j: int) -> int:
    """Element j of 256: of each 32 bytes the lowest bits first."""
    return int(block[codes + j // 128 * 32 + j % 32]) >> 2 * (j % 128 // 32) & 3


def q2_k(block: Bytes) -> Any:
    d, m = half(block, 80), half(block, 82)
    for j in range(256):
        scale = int(block[j // 16])
        code = np.float32(two_bits(block, 16, j))
        yield d * np.float32(scale & 15) * code - m * np.float32(scale >> 4)


def q3_k(block: Bytes) -> Any:
    d, b = half(block, 108), [int(v) for v in block]
    for j in range(256):
        s = j // 16
        scale = b[96 + s % 8] >> 4 * (s // 8) & 15 | (b[104 + s % 4] >> 2 * (s // 4) & 3) << 4
        code = two_bits(block, 32, j) - (0 if b[j % 32] >> j // 32 & 1 else 4)
        yield d * np.float32(scale - 32) * np.float32(code)


UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""`kvalues_iq4nl` of ggml."""


def iq4_nl(block: Bytes) -> Any:
    nibbles = [*(block[2:] & 15), *(block[2:] >> 4)]
    return [half(block, 0) * np.float32(UNEVEN[q]) for q in nibbles]


def iq4_xs(block: Bytes) -> Any:
    d, b = half(block, 0), [int(v) for v in block]
    high = b[2] | b[3] << 8
    for j in range(256):
        s, i = j // 32, j % 32
        scale = (b[4 + s // 2] >> 4 * (s % 2) & 15 | (high >> 2 * s & 3) << 4) - 32
        code = b[8 + 16 * s + i % 16] >> 4 * (i // 16) & 15
        yield d * np.float32(scale) * np.float32(UNEVEN[code])


def mxfp4(block: Bytes) -> Any:
    """`kvalues_mxfp4` times half of the power of two."""
    sizes = (0, 1, 2, 3, 4, 6, 8, 12)
    scale = np.float32(2.0 ** (int(block[0]) - 128))
    for q in (*(block[1:] & 15), *(block[1:] >> 4)):
        yield scale * np.float32(-sizes[q - 8] if q > 7 else sizes[q])


def tq1_0(block: Bytes) -> Any:
    d, b = half(block, 52), [int(v) for v in block]
    for first, count, digits in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        for k in range(digits):
            for i in range(count):
                yield d * np.float32((b[first + i] * 3**k % 256 * 3 >> 8) - 1)


def tq2_0(block: Bytes) -> Any:
    return [half(block, 64) * np.float32(two_bits(block, 0, j) - 1) for j in range(256)]


KINDS: dict[str, tuple[int, int, int, tuple[int, ...], Callable[[Bytes], Any]]] = {
    "q4_0": (2, 32, 18, (0,), lambda b: small(b, 2, None, 8, None)),
    "q4_1": (3, 32, 20, (0, 2), lambda b: small(b, 4, None, 0, 2)),
    "q5_0": (6, 32, 22, (0,), lambda b: small(b, 6, 2, 16, None)),
    "q5_1": (7, 32, 24, (0, 2), lambda b: small(b, 8, 4, 0, 2)),
    "q8_0": (8, 32, 34, (0,), q8_0),
    "q4_k": (12, 256, 144, (0, 2), lambda b: large(b, 16, None)),
    "q5_k": (13, 256, 176, (0, 2), lambda b: large(b, 48, 16)),
    "q6_k": (14, 256, 210, (208,), q6_k),
    "q2_k": (10, 256, 84, (80, 82), q2_k),
    "q3_k": (11, 256, 110, (108,), q3_k),
    "iq4_nl": (20, 32, 18, (0,), iq4_nl),
    "iq4_xs": (23, 256, 136, (0,), iq4_xs),
    "mxfp4": (39, 32, 17, (), mxfp4),
    "tq1_0": (34, 256, 54, (52,), tq1_0),
    "tq2_0": (35, 256, 66, (64,), tq2_0),
}  # fmt: skip
"""Number, values and bytes of a block, where its halves are, and what it means."""


def drawn(kind: str, rows: int, blocks: int, rng: np.random.Generator) -> Bytes:
    """Blocks of any bytes, whose scales are finite."""
    _, _, size, halves, _ = KINDS[kind]
    found = rng.integers(0, 256, (rows, blocks, size)).astype(np.uint8)
    for at in halves:
        scale = rng.standard_normal((rows, blocks, 1)).astype(np.float16)
        found[..., at : at + 2] = scale.view(np.uint8).reshape(rows, blocks, 2)
    if kind == "mxfp4":
        found[..., 0] = rng.integers(120, 136, (rows, blocks))
    return found


def test_powers_of_two_are_exact(tmp_path: Path) -> None:
    """All that are finite, of MXFP4's blocks: those below 2 ** -126 too."""
    blocks = np.zeros((255, 17), np.uint8)
    blocks[:, 0], blocks[:, 1] = np.arange(255), 2
    path = written(tmp_path / "m.gguf", [("w", (255, 32), 39, blocks.tobytes())])
    source = (
        f'import gguf\n\nweights w = "{path}"\n\n'
        "pipeline p(b: bool[]) -> f32[255, 32]:\n"
        "    select(b, gguf.matrix(w.w), 0.0)\n"
    )
    found = sf.compile(source)(b=True)
    np.testing.assert_array_equal(found[:, 0], np.ldexp(1.0, np.arange(255) - 127))


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", [("blk.0.w", (1, 256), 18, bytes(98))])
    source = f'weights w = "{path}"\npipeline p(x: f32[]) -> f32[]:\n    x + w.blk[0].w\n'
    with pytest.raises(sf.CompileError, match="`blk.0.w` has the dtype IQ3_XXS"):
        sf.compile(source)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_mean_what_ggml_makes_of_them(
    kind: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """To the last bit, as a matrix and as a layer."""
    number, values, _, _, meaning = KINDS[kind]
    blocks = drawn(kind, 3, 2, rng)
    bias = rng.standard_normal(3).astype(np.float32)
    path = written(tmp_path / "m.gguf", [
        ("l.weight", (3, 2 * values), number, blocks.tobytes()),
        ("l.bias", (3,), 0, bias.tobytes()),
    ])  # fmt: skip
    wanted = np.array([[v for b in row for v in meaning(b)] for row in blocks], np.float32)
    source = (
        f'import gguf\n\nweights w = "{path}"\n\n'
        f"pipeline p(x: f32[B, {2 * values}]) -> (f32[3, {2 * values}], f32[B, 3]):\n"
        "    gguf.matrix(w.l.weight), gguf.linear(x, w.l)\n"
    )
    x = rng.standard_normal((2, 2 * values)).astype(np.float32)
    matrix, y = sf.compile(source)(x=x)
    np.testing.assert_array_equal(matrix, wanted)
    exact = x.astype(float) @ wanted.T.astype(float) + bias
    size = np.abs(x).astype(float) @ np.abs(wanted).T.astype(float) + 1
    assert np.all(np.abs(y - exact) <= 2 * values * 2.0**-24 * size)


def test_plain_tensors_are_what_they_are(rng: np.random.Generator, tmp_path: Path) -> None:
    f = rng.standard_normal((2, 3, 5)).astype(np.float32)
    h, i = f.astype(np.float16), np.arange(7)
    path = written(tmp_path / "m.gguf", [("a.f", f.shape, 0, f.tobytes()),
                   ("a.h", h.shape, 1, h.tobytes()), ("i", (7,), 27, i.tobytes()),
                   ("none", (0, 4), 0, b""), ("odd", (3,), 99, b"")])  # fmt: skip
    file = open_weights(path)
    assert list(file.headers()) == ["a.f", "a.h", "i", "none"]
    for key, array in (("a.f", f), ("a.h", h), ("i", i), ("none", np.zeros((0, 4), np.float32))):
        np.testing.assert_array_equal(file.array(key), array)
    with pytest.raises(WeightsError, match="number 99"):
        file.array("odd")


def test_a_file_that_ends_early_is_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    data = drawn("q4_0", 1, 2, rng).tobytes()
    whole = written(tmp_path / "m.gguf", [("w", (1, 64), 2, data)]).read_bytes()
    used = len(whole) - (-len(data) % 32)
    for length in range(used):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            open_weights(tmp_path / "cut.gguf")


def test_any_byte_may_be_wrong(rng: np.random.Generator, tmp_path: Path) -> None:
    """It is refused, or read without reading elsewhere."""
    data = drawn("q8_0", 2, 1, rng).tobytes()
    whole = written(tmp_path / "m.gguf", [("w", (2, 32), 8, data), ("v", (4,), 0, bytes(16))])
    good = whole.read_bytes()
    for _ in range(400):
        bad = bytearray(good)
        bad[rng.integers(len(bad) - 128)] = rng.integers(256)
        whole.write_bytes(bad)
        try:
            file = open_weights(whole)
        except WeightsError:
            continue
        for key in file.headers():
            assert file.array(key).nbytes <= len(good)


@pytest.mark.parametrize(
    "entries, offsets, words",
    [([("w", (4,), 0, bytes(16)), ("v", (4,), 0, bytes(16))], [0, 0], "overlaps"),
     ([("w", (4,), 0, bytes(16)), ("w", (4,), 0, bytes(16))], None, "twice"),
     ([("w", (4,), 0, bytes(16))], [4], "multiple of 32"),
     ([("w", (1 << 40, 1 << 40), 0, bytes(16))], None, "impossible size"),
     ([("w", (4,), 0, bytes(16))], [1 << 62], "leaves the file"),
     ([("w", (33,), 8, bytes(34))], None, "whole blocks of Q8_0"),
     ([("w", (1, 1, 1, 1, 1), 0, bytes(16))], None, "5 dimensions")],
)  # fmt: skip
def test_a_header_that_lies_is_refused(
    entries: list[Entry], offsets: list[int] | None, words: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=words):
        open_weights(written(tmp_path / "m.gguf", entries, offsets))


def test_counts_are_checked_before_they_are_counted_to(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for tensors, entries in ((1 << 60, 0), (0, 1 << 60)):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + bytes(64))
        with pytest.raises(WeightsError, match="claims"):
            open_weights(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(WeightsError, match="version 1"):
        open_weights(path)
