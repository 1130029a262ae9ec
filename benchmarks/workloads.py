"""The table of workloads: their shapes, more shapes of the same families, tiny ones for tests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from . import blocks, models
from .workload import Family, Make, Sizes


def _sizes(names: str, *shapes: tuple[int, ...]) -> list[Sizes]:
    return [dict(zip(names.split(), shape, strict=True)) for shape in shapes]


def _family(
    name: str, title: str, pipe: str, make: Make, names: str,
    sizes: tuple[int, ...], others: Sequence[tuple[int, ...]], tiny: tuple[int, ...],
    tolerance: float = 2e-4,
) -> Family:  # fmt: skip
    first, small, *more = _sizes(names, sizes, tiny, *others)
    return Family(name, title, pipe, make, first, tuple(more), small, tolerance)


MINILM = (384, 1536, 12, 6, 30522)
ENCODERS = [(1, 17, *MINILM), (4, 64, *MINILM), (32, 32, *MINILM), (1, 128, 768, 3072, 12, 2, 5000)]
PRODUCTS = [(256, 256, 256), (1000, 500, 700), (16, 4096, 4096), (4096, 64, 512), (1, 1024, 1024)]

FAMILIES = {
    family.name: family
    for family in (
        _family(
            "W1", "gelu(x*s+b)+r", "W1", blocks.pointwise, "M N",
            (4096, 4096), [(1, 4096), (512, 768), (1000, 1001), (64, 50000)], (5, 33),
        ),
        _family(
            "W2a", "softmax of rows", "W2a", blocks.softmax, "M N",
            (4096, 4096), [(1024, 128), (4096, 1000), (8, 32000), (65536, 64)], (5, 37),
        ),
        _family(
            "W2b", "softmax(x*scale+mask)", "W2b", blocks.masked_softmax, "B H T S",
            (64, 12, 128, 128), [(8, 12, 512, 512), (4, 8, 100, 77), (1, 12, 128, 128)],
            (2, 3, 4, 19),
        ),
        _family(
            "W3a", "residual, rms norm, two results", "W3a",
            partial(blocks.residual_norm, rms=True), "M N",
            (4096, 1024), [(1, 4096), (512, 768), (1000, 1000), (16, 8192)], (5, 35),
        ),
        _family(
            "W3b", "residual, layer norm", "W3b",
            partial(blocks.residual_norm, rms=False), "M N",
            (4096, 1024), [(1, 4096), (512, 768), (1000, 1000), (16, 8192)], (5, 35),
        ),
        _family(
            "W4", "images u8 to NCHW", "W4", blocks.preprocess, "B H W S",
            (8, 720, 1280, 224), [(1, 1080, 1920, 224), (4, 480, 640, 299), (32, 256, 256, 224)],
            (2, 30, 41, 16), 2e-3,
        ),
        _family(
            "W5a", "linear, gelu", "W5a", blocks.linear_gelu, "M K N",
            (512, 384, 1536),
            [(1, 384, 1536), (128, 768, 3072), (1000, 500, 700), (37, 1024, 4096)], (7, 24, 40),
        ),
        _family(
            "W5b", "product with a constant", "W5b", blocks.product, "M K N",
            (1024, 1024, 1024), PRODUCTS, (9, 20, 33),
        ),
        _family(
            "W5c", "product with a constant", "W5b", blocks.product, "M K N",
            (2048, 2048, 2048), [], (17, 31, 18),
        ),
        _family(
            "W5d", "product of two inputs", "W5d", blocks.product_of_inputs, "M K N",
            (1024, 1024, 1024), PRODUCTS, (9, 20, 33),
        ),
        _family(
            "W6", "MLP block", "W6", blocks.mlp, "M D F",
            (512, 384, 1536), [(1, 768, 3072), (128, 768, 3072), (1000, 320, 1280)], (6, 16, 40),
        ),
        _family(
            "W7", "attention block", "W7", blocks.attention, "B T C H",
            (8, 128, 384, 12),
            [(1, 512, 768, 12), (4, 77, 512, 8), (32, 16, 384, 12), (1, 1000, 256, 4)],
            (2, 7, 24, 3),
        ),
        _family(
            "W8a", "MiniLM-L6 encoder", "W8", models.encoder, "B T D F H LAYERS V",
            (1, 128, *MINILM), ENCODERS, (1, 9, 24, 40, 3, 2, 50), 1e-3,
        ),
        _family(
            "W8b", "MiniLM-L6 encoder", "W8", models.encoder, "B T D F H LAYERS V",
            (8, 128, *MINILM), [], (3, 9, 24, 40, 3, 2, 50), 1e-3,
        ),
        _family(
            "W9", "ResNet-18", "W9", models.residual_network, "B S C N",
            (1, 224, 64, 1000), [(4, 224, 64, 1000), (1, 160, 64, 1000), (1, 224, 32, 100)],
            (2, 32, 4, 10), 1e-3,
        ),
        _family(
            "W11", "decoder step, two layers", "W11", models.decoder_step, "P D G R E F",
            (255, 2048, 4, 8, 64, 5632),
            [
                (1023, 2048, 4, 8, 64, 5632), (100, 1024, 8, 2, 64, 2816),
                (511, 768, 12, 1, 64, 3072),
            ],
            (5, 24, 2, 3, 4, 40), 1e-3,
        ),
    )
}  # fmt: skip


def chosen(only: str | None) -> list[Family]:
    """Families by name or by the beginning of one, in the table's order: `W1,W5,W8a`."""
    if only is None:
        return list(FAMILIES.values())
    wanted = only.split(",")
    found = [f for f in FAMILIES.values() if any(_matches(f.name, w) for w in wanted)]
    for name in wanted:
        if not any(_matches(f.name, name) for f in found):
            raise SystemExit(f"no workload is called {name!r}; there are {', '.join(FAMILIES)}")
    return found


def _matches(name: str, wanted: str) -> bool:
    """W5 is W5a to W5d, but W1 is not W11."""
    return name == wanted or (name.startswith(wanted) and not name[len(wanted)].isdigit())
