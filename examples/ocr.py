"""Read the text of a picture with PP-OCRv4: find lines, turn them the right way up, read them.

Three models, imported from ONNX, in one pipeline file, ocr.pipe, which samples the page for each
of them; the boxes between are NumPy, text_boxes.py.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gallery
import numpy as np
from text_boxes import text_boxes

import stagefuse as sf

PACKAGE = "rapidocr-onnxruntime"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "text_detector": ("ch_PP-OCRv4_det_infer.onnx", {}),
    "text_direction": ("ch_ppocr_mobile_v2.0_cls_infer.onnx", {"sizes": {"x.2": 48, "x.3": 192}}),
    "text_reader": ("ch_PP-OCRv4_rec_infer.onnx", {"sizes": {"x.2": 48}}),
}
LEAST_SIDE, GREATEST_SIDE = 736, 2000  # pixels of a page, as the detector sees it
HEIGHT, WIDTH, READ_WIDTH = 48, 192, 320  # pixels of a line; the last is at least
BATCH = 6  # lines that are read at a time
SURE = 0.5  # of what is read, to be shown
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Line:
    """A line of text, how sure it is, and its box: corners (x, y) round from the top left."""

    text: str
    score: float
    box: Array


@dataclass(frozen=True)
class Box:
    """Three corners, (x, y): top left, top right, bottom left, and the pixels between them."""

    corners: Array
    width: int
    height: int

    def turned(self) -> Box:
        """The same pixels upside down: the last is the first."""
        a, b, c = self.corners
        first = a + (b - a) * (1 - 1 / self.width) + (c - a) * (1 - 1 / self.height)
        return replace(self, corners=np.array([first, first + a - b, first + a - c]))

    def columns(self, wide: int) -> int:
        """The columns that the box takes in a line `wide` pixels wide."""
        return min(wide, int(np.ceil(HEIGHT * self.width / self.height)))


def box_of(corners: Array) -> Box:
    """A box to be read along its longer side: a tall one from its right edge, top to bottom."""
    a, b, c, d = corners
    width = int(max(np.linalg.norm(a - b), np.linalg.norm(c - d)))
    height = int(max(np.linalg.norm(a - d), np.linalg.norm(b - c)))
    if height >= 1.5 * width:
        first = a + (b - a) * (1 - 1 / width)
        return Box(np.array([first, first + d - a, first + a - b]), height, width)
    return Box(np.array([a, b, d]), width, height)


def centres(pixels: int, count: int) -> Array:
    """Where the centres of `count` equal parts of a row of pixels lie, in pixels."""
    return np.asarray((np.arange(count) + 0.5) * (pixels / count) - 0.5, np.float32)


def inside(pixels: int, count: int) -> Array:
    """The same within a box, from 0 to 1."""
    return np.asarray(np.clip(centres(pixels, count), 0, pixels - 1) / pixels, np.float32)


def detector_size(height: int, width: int) -> tuple[int, int]:
    """The rows and columns in which a page is searched: multiples of 32, about as high and wide."""
    shorter, longer = min(height, width), max(height, width)
    scale = max(1.0, LEAST_SIDE / shorter) if longer <= GREATEST_SIDE else GREATEST_SIDE / longer
    rows, columns = (max(1, round(int(n * scale) / 32)) * 32 for n in (height, width))
    return rows, columns


class Reader:
    """The three pipelines, compiled, and the characters that they tell apart."""

    def __init__(self, threads: int | None = None) -> None:
        made_of = [gallery.imported(name, PACKAGE, file, **known).name
                   for name, (file, known) in MODELS.items()]  # fmt: skip
        fused = gallery.compiled("ocr.pipe", made_of)
        self.detect, self.direction, self.read = (
            sf.load(fused, pipeline=name, threads=threads)
            for name in ("detect", "direction", "read")
        )
        self.characters = characters()

    def lines(self, page: Array) -> list[Line]:
        """The lines of a page, u8 [height, width, 3], in the order of reading."""
        found = text_boxes(self.found(page), page.shape[1], page.shape[0])
        boxes = self.upright(page, [box_of(corners) for corners in found])
        read: dict[int, tuple[str, float]] = {}
        by_width = sorted(range(len(boxes)), key=lambda n: boxes[n].width / boxes[n].height)
        for start in range(0, len(boxes), BATCH):
            chosen = by_width[start : start + BATCH]
            read |= zip(chosen, self.texts(page, [boxes[n] for n in chosen]), strict=True)
        return [Line(*read[n], found[n]) for n in range(len(boxes)) if read[n][1] >= SURE]

    def found(self, page: Array) -> Array:
        """How likely text is, f32 [rows, columns] over the whole page."""
        rows, columns = detector_size(*page.shape[:2])
        height, width = page.shape[:2]
        return np.asarray(
            self.detect(page=page, rows=centres(height, rows), columns=centres(width, columns))
        )

    def upright(self, page: Array, boxes: list[Box]) -> list[Box]:
        """Boxes with those turned that are surely upside down."""
        if not boxes:
            return []
        p = np.asarray(self.direction(page=page, **placed(boxes, WIDTH)))
        return [box.turned() if p[n, 1] > 0.9 else box for n, box in enumerate(boxes)]

    def texts(self, page: Array, boxes: list[Box]) -> list[tuple[str, float]]:
        """What boxes say, and how sure that is: the mean over characters of their probability."""
        widest = max(READ_WIDTH, *(int(HEIGHT * box.width / box.height) for box in boxes))
        found = self.read(page=page, **placed(boxes, widest))
        return [self._text(*one) for one in zip(found.code, found.probability, strict=True)]

    def _text(self, code: Array, probability: Array) -> tuple[str, float]:
        """Of neighbours that are equal the first counts, and what is no character does not."""
        first = np.diff(code, prepend=-1) != 0
        kept = first & (code != 0)
        if not kept.any():
            return "", 0.0
        return "".join(self.characters[c] for c in code[kept]), float(probability[kept].mean())


def placed(boxes: list[Box], wide: int) -> dict[str, Array]:
    """What the pipelines take of boxes, for lines `wide` pixels wide."""
    along = np.full((len(boxes), wide), -1, np.float32)
    for number, box in enumerate(boxes):
        columns = box.columns(wide)
        along[number, :columns] = inside(box.width, columns)
    return {
        "boxes": np.array([box.corners for box in boxes], np.float32),
        "down": np.stack([inside(box.height, HEIGHT) for box in boxes]),
        "along": along,
    }


def characters() -> list[str]:
    """What the reader's codes stand for: its model file says it, and 0 is no character."""
    import onnx

    file = gallery.package_file(PACKAGE, MODELS["text_reader"][0])
    known = {p.key: p.value for p in onnx.load(str(file)).metadata_props}
    return ["", *known["character"].splitlines(), " "]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path, nargs="?", help="default: a scanned page")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    page = gallery.picture(options.picture or gallery.sample("page.png"))
    reader = Reader(options.threads)
    for line in reader.lines(page):
        corner = "{:.0f},{:.0f}".format(*line.box[0])
        print(f"{line.score:.2f}  {corner:>9}  {line.text}")
    rows, columns = detector_size(*page.shape[:2])
    print(f"{gallery.milliseconds(lambda: reader.lines(page), 5):.0f} ms for the page, of which "
          f"{gallery.milliseconds(lambda: reader.found(page), 5):.0f} ms to find lines in "
          f"{columns} x {rows} points, on {reader.detect.threads} threads")  # fmt: skip


if __name__ == "__main__":
    main()
