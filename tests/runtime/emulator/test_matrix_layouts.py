"""The layouts of shared-memory matrices and boxes, against another derivation of each."""

import numpy as np
import pytest

from stagefuse.runtime.emulator.matrix_descriptor import MatrixDescriptor
from stagefuse.runtime.emulator.swizzle import swizzle
from stagefuse.runtime.emulator.tensor_map import EncodedMap, TensorMap, decode


def test_swizzle_is_a_permutation_of_each_pattern() -> None:
    at = np.arange(2048)
    for width, alignment in ((32, 256), (64, 512), (128, 1024)):
        moved = swizzle(at, width)
        assert np.array_equal(np.sort(moved), at)
        assert np.array_equal(moved[alignment : 2 * alignment], moved[:alignment] + alignment)
        # chunks move only within their own 128-byte line
        assert np.array_equal(moved // 128, at // 128) and np.array_equal(moved % 16, at % 16)


def test_eight_rows_of_a_column_meet_all_banks() -> None:
    """The purpose of the 128-byte swizzle: 16-byte chunks of 8 rows lie in 8 bank groups."""
    for chunk in range(8):
        found = swizzle(np.arange(8) * 128 + chunk * 16, 128)
        assert sorted(found % 128 // 16) == list(range(8))


@pytest.mark.parametrize("width", [0, 32, 64, 128])
@pytest.mark.parametrize("mn", [False, True])
def test_operand_bytes_are_distinct(width: int, mn: bool) -> None:
    code = {0: 0, 128: 1, 64: 2, 32: 3}[width]
    if width == 0:
        leading, stride = (64 * 16, 128) if not mn else (128, 256)
    else:
        leading, stride = 16 * width, 8 * width
    bits = 1024 >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | code << 62
    matrix = MatrixDescriptor.decode(bits)
    assert (matrix.start, matrix.leading, matrix.stride, matrix.width) == (
        1024,
        leading,
        stride,
        width,
    )
    at = matrix.mn_major(64, 32) if mn else matrix.k_major(64, 32)
    assert len(np.unique(at)) == at.size and at.min() >= 1024


def test_step_along_k_within_a_swizzled_row() -> None:
    """32 bytes added to the start are the next 32 bytes of each row (K advance)."""
    first = MatrixDescriptor(0, 16, 1024, 0, 128).k_major(16, 32)
    second = MatrixDescriptor(32, 16, 1024, 0, 128).k_major(16, 32)
    both = np.concatenate([first, second], axis=1)
    plain = np.arange(16)[:, None] * 128 + np.arange(0, 64, 8)
    assert np.array_equal(both, swizzle(plain, 128))


def encoded(map_: TensorMap, address: int = 0) -> EncodedMap:
    found = decode(map_.encode(address))
    assert found is not None
    return found


def test_map_in_memory() -> None:
    x = np.zeros((6, 7, 8), np.float32)
    found = encoded(TensorMap(x, box=(2, 3, 4), swizzle=32, fill="nan"), 1 << 40)
    assert found == EncodedMap(
        *(1 << 40, (8, 7, 6), (4, 32, 224), (4, 3, 2), (1, 1, 1), np.dtype(np.float32), 32, True)
    )
    assert decode(bytes(128)) is None


def test_box_elements(rng: np.random.Generator) -> None:
    x = rng.integers(0, 100, (6, 7, 8)).astype(np.float32)
    tensor = encoded(TensorMap(x, box=(2, 3, 4)))
    start = tuple(int(v) for v in rng.integers(-3, 8, 3))
    offset, inside = tensor.elements(start[::-1])
    flat = x.reshape(-1)
    expected = []
    for i in range(2):
        for j in range(3):
            for k in range(4):
                at = (start[0] + i, start[1] + j, start[2] + k)
                inside_here = all(0 <= a < n for a, n in zip(at, x.shape, strict=True))
                expected.append(x[at] if inside_here else -1)
    found = np.where(inside, flat[np.where(inside, offset // 4, 0)], -1)
    assert found.tolist() == expected and tensor.box_bytes == 96


def test_element_strides_thin_a_box() -> None:
    x = np.arange(64, dtype=np.int32).reshape(4, 16)
    tensor = encoded(TensorMap(x, box=(4, 16), element_strides=(2, 1)))
    offset, inside = tensor.elements((0, 0))
    assert tensor.box_bytes == 128 and inside.all()
    assert np.array_equal(offset // 4, x[::2].reshape(-1))


@pytest.mark.parametrize(
    "shape, options, rule",
    [
        ((4, 6), {"box": (4, 6)}, "multiple"),
        ((4, 8), {"box": (4, 512)}, "1 to 256"),
        ((4, 64), {"box": (4, 64), "swizzle": 128}, "longer than the swizzle"),
        ((4, 8), {"box": (8,)}, "2 dimensions"),
        ((4, 8), {"box": (4, 8), "interleave": 16}, "interleave"),
    ],
)
def test_maps_that_the_driver_refuses(
    shape: tuple[int, ...], options: dict[str, object], rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        TensorMap(np.zeros(shape, np.float32), **options)  # type: ignore[arg-type]
