"""Every code block of the documents does what the text says.

`pipe` blocks check without a diagnostic; one whose first line is `# name.pipe` is also written to
a file. `pipe error` blocks are wrong, and the `text` block after one is exactly what is shown.
`python` blocks of a document run one after the other beside those files, and so does each line
of a `console` block that starts with `$ stagefuse`.
"""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stagefuse import cli, cli_exit

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+(?: \w+)?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    kind: str
    text: str
    line: int


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    return [
        Block(m.group(1), m.group(2), text.count("\n", 0, m.start()) + 1)
        for m in BLOCK.finditer(text)
    ]


def prose(document: Path) -> str:
    """A document without its code blocks."""
    return BLOCK.sub("", document.read_text(encoding="utf-8"))


def places(document: Path) -> set[str]:
    """What links into a document can name: its headings, in small letters and with hyphens."""
    headings = (re.sub(r"[^\w\- ]", "", h).lower() for h in HEADING.findall(prose(document)))
    return {heading.replace(" ", "-") for heading in headings}


def shown(path: Path) -> str:
    """The diagnostics of a file as the terminal shows them."""
    from stagefuse.compiler import driver
    from stagefuse.dsl.diagnostics import render_all

    return render_all(driver.check_file(path)[1])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_blocks(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "examples", tmp_path / "examples")
    names: dict[str, Any] = {}
    found = blocks(document)
    for number, block in enumerate(found):
        following = found[number + 1] if number + 1 < len(found) else None
        where = f"{document.name}:{block.line}"
        if block.kind in ("pipe", "pipe error"):
            first = re.match(r"# (\w+\.pipe)\n", block.text)
            path = Path(first.group(1) if first else "example.pipe")
            path.write_text(block.text)
            if block.kind == "pipe":
                assert shown(path) == "", where
            else:
                assert following is not None and following.kind == "text", where
                assert shown(path) == following.text.rstrip("\n"), where
        elif block.kind == "python":
            exec(compile(block.text, where, "exec"), names)
        elif block.kind == "console":
            for line in block.text.splitlines():
                if line.startswith("$ stagefuse "):
                    arguments = shlex.split(line.partition("#")[0])[2:]
                    run = cli_exit.guarded(lambda a=arguments: cli.run_command(a), arguments)
                    assert run == 0, f"{where}: {line}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target, place in LINK.findall(prose(document)):
        found = document.parent / target if target else document
        assert found.exists(), target
        assert not place or place in places(found), f"{target}#{place}"


def test_every_built_in_is_documented() -> None:
    from stagefuse.compiler.ops import BUILTINS

    spans = re.findall(r"`[^`]+`", prose(ROOT / "docs" / "language.md"))
    words = set(re.findall(r"\w+", "\n".join(spans)))
    missing = [n for n, op in BUILTINS.items() if op.user_callable and n not in words]
    assert not missing
