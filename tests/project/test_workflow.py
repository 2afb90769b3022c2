"""The public CI's workflow: valid YAML whose commands name what exists here."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import pygpt

ROOT = Path(pygpt.__file__).parents[1]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
COMMANDS = {
    f"{job}: {step['name']}": step["run"]
    for job, body in WORKFLOW["jobs"].items()
    for step in body["steps"]
    if "run" in step
}


@pytest.mark.parametrize("step", COMMANDS)
def test_commands_name_what_exists(step):
    command, makefile = COMMANDS[step], (ROOT / "Makefile").read_text(encoding="utf-8")
    for file in re.findall(r"\b(?:tests|bench|examples)/[\w/]+\.py|\bsetup\.py\b", command):
        assert (ROOT / file).is_file(), file
    for target in re.findall(r"\bmake ([\w-]+)", command):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in re.findall(r"\bpython -m (tests[\w.]*)", command):
        assert importlib.util.find_spec(module), module


def test_the_matrix_covers_both_ends():
    rows = WORKFLOW["jobs"]["versions"]["strategy"]["matrix"]["include"]
    assert {row["python"] for row in rows} == {"3.10", "3.13"}
    assert {row["torch"] for row in rows} == {"torch==2.10.0", "torch"}
    compilers = {row["cxx"] for row in rows}
    assert {"g++-11", "g++-14"} <= compilers and any(cxx.startswith("clang++") for cxx in compilers)
