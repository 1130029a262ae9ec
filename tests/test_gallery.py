"""The gallery's pipelines against what other engines made of the same inputs.

`examples/references.py` made `references.npz`. A model's result may lie ten times as far from the
reference as the reference engine lies from itself, optimised and plain or in f32 and f64.
"""

from __future__ import annotations

import pickle
import struct
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
import ctranslate2_file  # noqa: E402
import filetype  # noqa: E402
import gallery  # noqa: E402
import listen  # noqa: E402
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
    samples = 0.1 * rng.standard_normal((2, speech.STEP), np.float32)  # as loud as speech
    kept = {"last": 0.1 * rng.standard_normal((2, 64), np.float32),
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


@pytest.fixture(scope="module")
def listener() -> listen.Listener:
    return listen.Listener()


@pytest.fixture(scope="module")
def reading() -> Any:
    return gallery.sound(gallery.package_file("useful-moonshine-onnx", "beckett.wav"), listen.RATE)


def english(listener: listen.Listener) -> list[int]:
    """The tokens before an English text."""
    return [listener.ids[f"<|{name}|>"] for name in (listen.TASK[0], "en", *listen.TASK[1:])]


@needs_models
def test_what_is_read_is_what_ctranslate2_hears(
    listener: listen.Listener, reading: Any, wanted: dict[str, Any]
) -> None:
    heard = listener.hear(samples=reading)
    assert_close(heard.keys[[0, 5]][:, :, ::300], wanted, "listen/key")
    assert_close(heard.values[[0, 5]][:, :, ::300], wanted, "listen/value")
    language, *found = listener.tokens(reading)
    assert listener.vocabulary[language] == wanted["listen/language"]
    assert found == wanted["listen/token"].tolist()
    assert listener.text([language, *found]).endswith("Fail again. Fail better.")
    session, given, scores = listener.say.session(S=listen.TEXT), english(listener), []
    for token in found:
        said = listener.after(session, heard, given, listener.allowed)
        scores.append(said.scores[token])
        given = [token]
    assert_close(scores, wanted, "listen/score")


@needs_models
def test_two_recordings_at_once(listener: listen.Listener, reading: Any) -> None:
    """Turn by turn each says what it says alone; a text goes on from a copy of its session."""
    middle = len(reading) // 2
    heard = [listener.hear(samples=part) for part in (reading[:middle], reading[middle:])]
    start = english(listener)

    def after(session: sf.Session, which: int, tokens: list[int]) -> int:
        return int(listener.after(session, heard[which], tokens, listener.allowed).token)

    sessions = [listener.say.session(S=size) for size in (20, 31)]
    texts = [[after(session, n, start)] for n, session in enumerate(sessions)]
    for _ in range(5):
        for n, session in enumerate(sessions):
            texts[n].append(after(session, n, texts[n][-1:]))
    other = listener.say.session(S=20)
    other.restore(sessions[0].snapshot())
    last = [after(s, 0, texts[0][-1:]) for s in (sessions[0], other)]
    assert last[0] == last[1]
    for n, session in enumerate(sessions):
        session.reset()
        alone = [after(session, n, start)]
        for _ in range(5):
            alone.append(after(session, n, alone[-1:]))
        assert alone == texts[n] != texts[1 - n]


@needs_models
def test_tokens_are_written_as_text(listener: listen.Listener) -> None:
    """Of every token what it says, as the vocabulary has it; letters may be split over tokens."""
    assert len(listener.vocabulary) == 51865
    assert sorted(listen.LETTERS.values()) == list(range(256))
    letter = {byte: letter for letter, byte in listen.LETTERS.items()}
    written = ["".join(letter[byte] for byte in text.encode()) for text in ("é", "€", " a\n")]
    assert [listener.text([listener.ids[c] for c in word]) for word in written] == ["é", "€", "a"]
    assert listener.text([listener.ids["<|en|>"], listener.ids["ĠFail"]]) == "Fail"


def test_long_recordings_are_cut_where_it_is_quiet(rng: np.random.Generator) -> None:
    sound = rng.standard_normal(2 * listen.LONGEST, np.float32)
    sound[listen.LONGEST - 40000 : listen.LONGEST - 30000] = 0
    found = listen.parts(sound)
    assert len(found[0]) in range(listen.LONGEST - 40000, listen.LONGEST - 30000)
    assert all(0 < len(part) <= listen.LONGEST for part in found)
    np.testing.assert_array_equal(np.concatenate(found), sound)
    assert [len(part) for part in listen.parts(sound[: listen.LONGEST])] == [listen.LONGEST]


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


def model_of_ctranslate2(tensors: dict[str, Any]) -> bytes:
    """The file of a model, with a second name of its first tensor."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    found = struct.pack("<I", 6) + text("Spec") + struct.pack("<II", 3, len(tensors))
    for name, array in tensors.items():
        dtype = ctranslate2_file.DTYPES.index(array.dtype.str.replace("|", "<"))
        found += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        found += struct.pack("<BI", dtype, array.nbytes) + array.tobytes()
    return found + struct.pack("<I", 1) + text("second") + text(next(iter(tensors)))


def test_a_model_of_ctranslate2_is_read(tmp_path: Path, rng: np.random.Generator) -> None:
    """In two parts wherever it is cut; one that is cut short is refused, and so is other data."""
    tensors = {"a/b": rng.standard_normal((2, 3), np.float32), "c": np.array(7, np.int8),
               "d": np.arange(4, dtype=np.float16), "e": np.zeros((0, 5), np.int32)}  # fmt: skip
    data, paths = model_of_ctranslate2(tensors), [tmp_path / "1", tmp_path / "2"]
    for cut in range(len(data)):
        for path, part in zip(paths, (data[:cut], data[cut:]), strict=True):
            path.write_bytes(part)
        found = ctranslate2_file.load(paths)
        assert list(found) == [*tensors, "second"]
        for name, array in {**tensors, "second": tensors["a/b"]}.items():
            np.testing.assert_array_equal(found[name], array, strict=True)
        with pytest.raises(ValueError, match="no model of CTranslate2"):
            ctranslate2_file.load(paths[:1])
    places = {0: "begins as version 5", data.index(b"a/b") + 5: "a/b has 24 bytes"}
    for place, fault in places.items():
        paths[0].write_bytes(data[:place] + b"\5" + data[place + 1 :])
        with pytest.raises(ValueError, match=fault):
            ctranslate2_file.load(paths[:1])
