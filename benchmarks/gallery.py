"""The gallery's imported models, stagefuse's CPU code beside ONNX Runtime on the model itself.

Needs what `examples/packages.txt` lists, onnx and onnxruntime. Whether the results are the same is
for tests/test_gallery.py; inputs here are random, of the shapes that the gallery's own inputs have.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from . import table
from .engines import Bound
from .harness import Row, Settings, loaded, processes, take_rounds

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
Feed = dict[str, "np.ndarray[Any, Any]"]


@dataclass(frozen=True)
class Model:
    """An ONNX file of a package, and the shapes of its inputs by the model's names."""

    title: str
    package: str
    file: str
    inputs: dict[str, tuple[int, ...]]
    known: dict[str, Any] = field(default_factory=dict)
    integers: int = 0
    """Inputs are below this, instead of normal floats."""

    def feed(self) -> Feed:
        """Random inputs, the same in every process."""
        rng = np.random.default_rng(0)
        if self.integers:
            return {k: rng.integers(0, self.integers, s, np.int32) for k, s in self.inputs.items()}
        return {k: rng.standard_normal(s, np.float32) for k, s in self.inputs.items()}


MODELS = {
    "text_detector": Model(
        "PP-OCRv4, where text is", "rapidocr-onnxruntime", "ch_PP-OCRv4_det_infer.onnx",
        {"x": (1, 3, 736, 1472)},
    ),
    "text_direction": Model(
        "PP-OCR, which way up", "rapidocr-onnxruntime", "ch_ppocr_mobile_v2.0_cls_infer.onnx",
        {"x": (5, 3, 48, 192)}, {"sizes": {"x.2": 48, "x.3": 192}},
    ),
    "text_reader": Model(
        "PP-OCRv4, what it says", "rapidocr-onnxruntime", "ch_PP-OCRv4_rec_infer.onnx",
        {"x": (5, 3, 48, 1000)}, {"sizes": {"x.2": 48}},
    ),
    "magika": Model(
        "kinds of files", "magika", "magika/models/standard_v3_3/model.onnx",
        {"bytes": (9, 2048)}, {"sizes": {"unk__214": (1, 65536)}}, 257,
    ),
    "basic_pitch": Model(
        "notes of music", "basic-pitch", "icassp_2022/nmp.onnx",
        {"serving_default_input_2:0": (3, 43844, 1)}, {"sizes": {"unk__749": (1, 1024)}},
    ),
    "silero": Model(
        "a step of voice activity", "silero-vad", "silero_vad_op18_ifless.onnx",
        {"input": (1, 576), "state": (2, 1, 128)},
        {"fixed": {"sr": 16000}, "sizes": {"batch": (1, 4096), "sequence": 576}},
    ),
}  # fmt: skip


def bound(engine: str, name: str, threads: int, level: str) -> Bound:
    """A model in one of the engines, with its inputs."""
    sys.path.insert(0, str(EXAMPLES))
    gallery = import_module("gallery")
    model = MODELS[name]
    if engine == "stagefuse":
        import stagefuse as sf

        source = gallery.imported(name, model.package, model.file, **model.known)
        pipe = sf.load(gallery.compiled(source.name), threads=threads)
        names = [str(argument.name) for argument in pipe.signature.inputs]
        given = dict(zip(names, model.feed().values(), strict=True))
        return Bound(lambda: pipe(**given))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    path = str(gallery.package_file(model.package, model.file))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed: dict[str, Any] = dict(model.feed())
    feed |= {k: np.asarray(v) for k, v in model.known.get("fixed", {}).items()}
    return Bound(lambda: session.run(None, feed))


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gallery", description=__doc__)
    parser.add_argument("--only", metavar="NAMES", help=f"of {','.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3, help="of one batch")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    engines = ("stagefuse", "onnxruntime")
    settings = Settings(engines, options.threads, "v4", options.rounds, options.seconds, 3, 0,
                        clock=options.clock)  # fmt: skip
    print("\n".join([*table.heading(settings), "", *table.header(engines)]))
    with processes(settings) as running:
        for name in options.only.split(",") if options.only else MODELS:
            model = MODELS[name]
            shape = " x ".join(map(str, next(iter(model.inputs.values()))))
            row = Row(name, f"{model.title}, {shape}", {}, {})
            for process in running:
                row.engines[process.engine] = loaded(process.ask("open", "gallery", name))
            take_rounds(row, running, settings)
            print(table.line(row, engines), flush=True)
            for failure in table.failures(row):
                print(failure, file=sys.stderr)


if __name__ == "__main__":
    main()
