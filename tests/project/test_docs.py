"""README and docs/ say what the repository holds: figures, links, lengths, and code that runs."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted({ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")})


@pytest.fixture(scope="module")
def chart():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import chart
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return chart


def test_the_readme_is_short():
    assert README.count("\n") <= 110


def test_the_chart_is_drawn_from_the_saved_run(chart):
    drawn = chart.draw(chart.newest(chart.saved_runs()))
    assert drawn == (ROOT / "docs" / "speed.svg").read_text(encoding="utf-8"), "python docs/chart.py draws it anew"


def test_the_table_of_machines_is_of_the_saved_runs(chart):
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert page.count("AMD EPYC |") >= 3 and chart.with_tables(page, chart.saved_runs()) == page


def test_the_first_sentence_has_the_charts_figures(chart):
    found = chart.ratios(chart.newest(chart.saved_runs()))
    wanted = [
        f"{ratio:.2f}"
        for op in ("attention", "gpt")
        for dtype in ("float32", "bfloat16")
        for (name, _), ratio in found[dtype].items()
        if name == op
    ]
    assert len(wanted) == 4 and re.findall(r"\d+\.\d\d", README.partition("![")[0]) == wanted


def test_a_run_that_lost_its_cores_is_no_line_of_the_table(chart):
    run = json.loads(json.dumps(chart.newest(chart.saved_runs())))
    assert "| AMD EPYC |" in chart.table([run])
    run["pygpt"]["machine"]["cpu_share"] = 0.8
    assert "| AMD EPYC |" not in chart.table([run])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|``.*?``|`[^`]*`", "", text, flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", prose)
    links += re.findall(r"\{(?:include|literalinclude)\} (\S+)", text)
    assert not [link for link in links if not (page.parent / link).exists()]


def test_every_page_is_in_the_table_of_contents():
    toctree = re.findall(r"^(\w+)$", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} == {*toctree, "index"}


def test_the_readmes_code_runs(run_python):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = run_python(code + "\nprint(tuple(q.grad.shape), bool(v.grad.isfinite().all()))")
    assert done.stdout == "(2, 12, 1000, 64) True\n", done.stdout + done.stderr[-3000:]


PRELUDE = """
import torch, pygpt
import pygpt.functional as P
x, weight, bias = torch.randn(3, 50, 64), torch.randn(64, 64), torch.randn(64)
q, k, v = torch.randn(3, 2, 4, 50, 16)
"""
LAST_LINES = {
    "quickstart": "print(Block(64, 2)(torch.randn(2, 5, 64)).shape)",
    "enable": "print(model.linear1.weight.grad.shape, len(pygpt.integrations.aten._overrides))",
    "drop_in": (
        "assert F.scaled_dot_product_attention is not original\n"
        "print(choice.backend, choice.rejected['cpp'], cache.length)"
    ),
    "determinism": "print(torch.get_num_threads())",
    "inspect": "print('served', report.served > 0.5, 'first', audit.first.name)",
}
PRINTED = {  # "..." stands for anything
    "quickstart": "layer_norm: cpp\ntorch.Size([2, 5, 64])\n",
    "enable": "torch.Size([256, 64]) 0\n",
    "drop_in": "torch ['pygpt.relu: input must be floating point, got torch.int64'] 101\n",
    "determinism": "8\n",
    "inspect": "relu: torch...Sequential: a training step...Sequential: the first layer that...served True first 3\n",
}


@pytest.mark.parametrize("page", LAST_LINES)
def test_the_pages_code_runs(page, run_python):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    done = run_python("\n".join([PRELUDE, *blocks, LAST_LINES[page]]), PYGPT_BACKEND="")
    wanted = ".*".join(map(re.escape, PRINTED[page].split("...")))
    assert re.fullmatch(wanted, done.stdout, re.DOTALL), done.stdout + done.stderr[-3000:]


def test_public_functions_are_documented():
    import pygpt

    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for module in (pygpt, pygpt.functional):
        for name in module.__all__:
            assert name in ("functional", "nn") or re.search(rf"{module.__name__}\.{name}\b", text), name
    table = README.partition("| `pygpt.functional` |")[2].partition("\n\n")[0]
    assert not [name for name in pygpt.functional.__all__ if f"`{name}`" not in table]


def test_cited_facts_are_listed():
    listed = re.findall(
        r"^\*\*([A-Z]\d+)\.\*\* ", (ROOT / "docs" / "measured.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(listed) == len(set(listed)) > 0
    suffixes = ".py", ".h", ".cpp", ".cu", ".cuh"
    folders = (ROOT / name for name in ("csrc", "pygpt", "triton_kernels", "bench", "tests"))
    sources = [path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes]
    cited = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in sources
        for name in re.findall(r"measured\.md ([A-Z]\d+)", path.read_text(encoding="utf-8"))
    }
    assert not [place for place in cited if place[1] not in listed]
