"""The checkout, the wheel and the import names are what pyproject.toml promises."""

import ctypes
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("dsl", "compiler", "runtime")


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_is_linked_into_the_package(name: str) -> None:
    link = ROOT / "stagefuse" / name
    assert link.is_symlink(), "a checkout without symbolic links (git config core.symlinks)"
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", FOLDERS)
def test_bare_name_does_not_import(name: str) -> None:
    with pytest.raises(ImportError):
        __import__(name)


def test_wheel_has_every_file(tmp_path: Path) -> None:
    copy = tmp_path / "source"  # setuptools writes build/ and *.egg-info beside the source
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], check=True, capture_output=True, text=True
    ).stdout
    tracked = [ROOT / name for name in listed.split("\0") if name]
    for path in tracked:
        if path.is_symlink() or path.is_file():
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():
                target.symlink_to(path.readlink())
            else:
                target.write_bytes(path.read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "-o", str(tmp_path / "dist"), str(copy)],
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert {n.split("/")[0] for n in names} == {"stagefuse"}
    want = {
        f"stagefuse/{path.relative_to(ROOT)}"
        for path in tracked
        if path.relative_to(ROOT).parts[0] in FOLDERS and path.is_file()
    }
    assert want <= names


def test_command_line_starts_without_the_compiler() -> None:
    """`stagefuse --help` imports neither the compiler, the runtime nor NumPy."""
    program = (
        "import sys\n"
        "from stagefuse import cli\n"
        "heavy = {'numpy', 'networkx', 'llvmlite', 'lark', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_that_need_no_other_package_are_there_without_onnx() -> None:
    code = (
        "import sys\n"
        "sys.modules['onnx'] = None\n"
        "from stagefuse import *\n"
        "import stagefuse, pydoc\n"
        "assert compile is stagefuse.compile and OnnxError is stagefuse.OnnxError\n"
        "assert 'export' in pydoc.render_doc(stagefuse)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_measuring_on_a_gpu_says_where_there_is_none() -> None:
    """Before it installs anything."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("there is a driver")
    command = ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}", "GPU_SITE=x"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode and ran.stdout == ""
    assert ran.stderr.startswith("no GPU to measure on: this machine has no CUDA driver")
