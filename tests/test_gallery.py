"""The gallery's pipelines against what other engines made of the same inputs.

`examples/references.py` made `references.npz`. A model's result may lie ten times as far from the
reference as the reference engine lies from itself, optimised and plain or in f32 and f64.
"""

from __future__ import annotations

import pickle
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stagefuse as sf

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import classify  # noqa: E402
import filetype  # noqa: E402
import gallery  # noqa: E402
import ocr  # noqa: E402
import references  # noqa: E402
import speech  # noqa: E402
import text_boxes  # noqa: E402
import torch_file  # noqa: E402
import transcribe  # noqa: E402


def missing() -> list[str]:
    """Packages of packages.txt that are not installed."""
    lines = (EXAMPLES / "packages.txt").read_text().splitlines()
    found = []
    for name in (line.partition("==")[0] for line in lines if "==" in line):
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            found.append(name)
    return found


needs_models = pytest.mark.skipif(
    bool(missing()), reason=f"not installed, `make test` does: {', '.join(missing())}"
)


@pytest.fixture(scope="module")
def wanted() -> dict[str, Any]:
    """The reference results by name."""
    with np.load(EXAMPLES / "references.npz") as file:
        return dict(file)


def assert_close(found: Any, wanted: dict[str, Any], name: str) -> None:
    noise = float(wanted[f"{name}/noise"])
    np.testing.assert_allclose(found, wanted[name], rtol=0, atol=max(10 * noise, 1e-6))


@needs_models
def test_photographs_have_the_classes_that_pytorch_gives_them(wanted: dict[str, Any]) -> None:
    pipe = classify.pipeline()
    names = classify.names()
    for number, name in enumerate(classify.PHOTOGRAPHS):
        found = pipe(pixels=gallery.picture(gallery.sample(name))[None])
        assert found.label[0].tolist() == wanted["classify/label"][number].tolist()
        probability = {**wanted, "classify/probability": wanted["classify/probability"][number]}
        assert_close(found.probability[0], probability, "classify/probability")
    assert names[wanted["classify/label"][0, 0]] == "espresso"


@pytest.fixture(scope="module")
def reader() -> ocr.Reader:
    return ocr.Reader()


@needs_models
def test_a_page_is_read_as_rapidocr_reads_it(reader: ocr.Reader, wanted: dict[str, Any]) -> None:
    lines = reader.lines(references.page_with("upright"))
    assert [line.text for line in lines] == wanted["ocr/text"].tolist()
    boxes = np.array([line.box for line in lines])
    np.testing.assert_allclose(boxes, wanted["ocr/box"], atol=1)  # whole pixels
    # it samples and rounds twice what is sampled and rounded once here
    np.testing.assert_allclose([x.score for x in lines], wanted["ocr/score"], atol=0.02)


@needs_models
def test_a_page_that_is_turned_says_the_same(reader: ocr.Reader, wanted: dict[str, Any]) -> None:
    """Spaces are what the model is least sure of."""

    def texts(name: str) -> list[str]:
        return [line.text.replace(" ", "") for line in reader.lines(references.page_with(name))]

    expected = [text.replace(" ", "") for text in wanted["ocr/text"].tolist()]
    assert texts("slanted") == expected
    # RapidOCR finds these two as well, and merges or misses the others
    assert texts("upside down") == [expected[4], expected[1]]


@needs_models
def test_each_model_of_the_reader_equals_onnx_runtime(
    reader: ocr.Reader, wanted: dict[str, Any]
) -> None:
    page, boxes = references.detail(), references.boxes_of_detail()
    rows, columns = (ocr.centres(n, n) for n in page.shape[:2])
    found = reader.detect(page=page, rows=rows, columns=columns)
    assert_close(found, wanted, "detect/map")
    found = reader.direction(page=page, **ocr.placed(boxes, ocr.WIDTH))
    assert_close(found, wanted, "direction/probability")
    found = reader.read(page=page, **ocr.placed(boxes, ocr.READ_WIDTH))
    assert found[0].tolist() == wanted["read/code"].tolist()
    assert_close(found[1], wanted, "read/probability")


@needs_models
def test_files_are_of_the_kinds_that_onnx_runtime_finds(wanted: dict[str, Any]) -> None:
    paths = [gallery.package_file(*place) for place in references.FILES]
    found = filetype.pipeline()(content=np.stack([filetype.content(path) for path in paths]))
    assert found.kind[:, 0].tolist() == wanted["filetype/kind"][:, 0].tolist()
    assert_close(found.probability, wanted, "filetype/probability")
    names = filetype.kinds()
    assert [names[k] for k in found.kind[:2, 0]] == ["png", "jpeg"]


@needs_models
def test_the_notes_of_a_tune_are_those_that_were_played(wanted: dict[str, Any]) -> None:
    note, onset = transcribe.maps(transcribe.pipeline(), transcribe.tune())
    assert_close(note[::4], wanted, "transcribe/note")
    assert_close(onset[::4], wanted, "transcribe/onset")
    found = transcribe.notes(note, onset)
    assert [n.midi for n in found] == wanted["transcribe/midi"].tolist()
    heard = sorted((round(n.begin, 1), n.midi) for n in found)
    assert heard == sorted((at, midi) for midi, at, _ in transcribe.TUNE)


@needs_models
def test_speech_is_where_onnx_runtime_hears_it(wanted: dict[str, Any]) -> None:
    path = gallery.package_file("useful-moonshine-onnx", "beckett.wav")
    recording = gallery.sound(path, speech.RATE)
    found = speech.probabilities(speech.pipeline(), recording)
    assert_close(found, wanted, "speech/probability")
    spans = speech.spoken(found)
    assert len(spans) == 6 and 4 < sum(end - begin for begin, end in spans) < 5


@needs_models
@pytest.mark.slow
@pytest.mark.parametrize("target", ["a100", "l40", "h200"])
def test_speech_in_the_emulator_equals_its_cpu_code(rng: np.random.Generator, target: str) -> None:
    expected = speech.pipeline()
    source = EXAMPLES / "speech.pipe"
    samples = rng.standard_normal((2, speech.STEP), np.float32)
    kept = {"last": rng.standard_normal((2, 64), np.float32),
            "memory": rng.standard_normal((2, 2, 128), np.float32)}  # fmt: skip
    with sf.compile(source, target=target, device="emulator") as pipe:
        sessions = [pipe.session(B=2), expected.session(B=2)]
        for session in sessions:
            session.restore(kept)
        found, want = (session(samples=samples) for session in sessions)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
        for name in kept:
            left, right = (session.state[name] for session in sessions)
            np.testing.assert_allclose(left, right, rtol=0, atol=1e-5)


def test_boxes_around_blobs() -> None:
    """An upright bar, a slanted one, and specks that are too small or too weak."""
    found = np.zeros((96, 160), np.float32)
    found[10:20, 20:100] = 0.9
    y, x = np.mgrid[:96, :160]
    u, v = (x - 80) * 0.96 + (y - 60) * 0.28, (y - 60) * 0.96 - (x - 80) * 0.28
    found[(abs(u) < 40) & (abs(v) < 5)] = 0.8
    found[90, 5] = 1.0
    found[40:50, 140:150] = 0.4
    boxes = text_boxes.text_boxes(found, 320, 192)
    assert len(boxes) == 2
    low, high = boxes[0].min(0), boxes[0].max(0)
    by = 1.6 * 80 * 10 / (2 * (80 + 10))  # PP-OCR's growth, in points
    np.testing.assert_allclose(low, [2 * (20 - by), 2 * (10 - by)], atol=3)
    np.testing.assert_allclose(high, [2 * (100 + by), 2 * (20 + by)], atol=3)
    across = boxes[1][1] - boxes[1][0]
    slope = np.degrees(np.arctan2(across[1], across[0]))
    assert abs(slope - np.degrees(np.arctan2(0.28, 0.96))) < 3


def test_groups_are_those_of_a_flood_fill(rng: np.random.Generator) -> None:
    """Groups of random points, corners touching, against the same found point by point."""
    for density in (0.0, 0.2, 0.4, 0.6, 1.0):
        mask = rng.random((13, 17)) < density
        left = {(int(x), int(y)) for y, x in np.argwhere(mask)}
        expected = []
        while left:
            waiting, group = [left.pop()], set()
            while waiting:
                x, y = waiting.pop()
                group.add((x, y))
                near = {(x + i, y + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
                left -= near
                waiting += near
            expected.append(group)
        found = []
        for points in text_boxes.groups(mask):
            ends = {(int(x), int(y)) for x, y in points}
            assert ends <= set.union(*[g for g in expected if g & ends])
            found.append(ends)
        assert len(found) == len(expected)
        assert {min(g) for g in found} == {min(g) for g in expected}


def test_a_file_that_asks_for_more_than_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hostile.pth"
    first = b"".join(pickle.dumps(v, 2) for v in (torch_file.MAGIC, 1001, {}))

    class Hostile:
        def __reduce__(self) -> Any:
            return exec, ("raise SystemExit('run')",)

    path.write_bytes(first + pickle.dumps({"a": Hostile()}, 2))
    with pytest.raises(ValueError, match="asks for .*exec, which is no tensor"):
        torch_file.load(path)
    for whole in (b"", b"PK\x03\x04", first, first + pickle.dumps([], 2), pickle.dumps(7)):
        path.write_bytes(whole)
        with pytest.raises(ValueError, match="is no state dict of PyTorch"):
            torch_file.load(path)
