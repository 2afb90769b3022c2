"""The form of the source: ruff and clang-format leave it as it is, and no line is longer than 120 columns."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pygpt

ROOT = Path(pygpt.__file__).parents[1]
FOLDERS = "csrc", "bench", "tests", "pygpt", "triton_kernels", "examples", "docs", ".github"
C_PLUS_PLUS = ".cpp", ".h", ".cu", ".cuh"
SOURCE = *C_PLUS_PLUS, ".py", ".sh", ".toml", ".yml"
COLUMNS = 120


def sources(*suffixes) -> list[str]:
    files = [*ROOT.glob("*"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*"))]
    return sorted(str(path.relative_to(ROOT)) for path in files if path.suffix in suffixes)


def check(tool: str, *arguments: str):
    """Runs a tool of requirements.txt on the checkout; fails with the files that it complains of."""
    program = shutil.which(tool, path=sysconfig.get_path("scripts"))
    assert program, f"{tool} is not installed beside {sys.executable}"
    done = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    files = sorted(set(re.findall(r"^([\w./-]+\.\w+):\d", output, re.MULTILINE)))
    assert done.returncode == 0, f"{tool} {arguments[0]}: {len(files)} files:\n" + ("\n".join(files) or output)


def test_ruff_finds_no_fault():
    check("ruff", "check", "--no-cache", "--output-format=concise")


def test_ruff_formats_python():
    check("ruff", "format", "--no-cache", "--check", "--output-format=concise")


def test_clang_format_formats_c_plus_plus():
    assert (ROOT / ".clang-format").is_file()
    check("clang-format", "--dry-run", "--Werror", *sources(*C_PLUS_PLUS))


def test_no_line_is_longer_than_the_limit():
    wrong = [
        f"{name}:{number}"
        for name in sources(*SOURCE)
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > COLUMNS
    ]
    assert not wrong, "\n".join(wrong)
