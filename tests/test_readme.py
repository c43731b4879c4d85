"""README.md and what it links to: examples run, commands parse, links lead somewhere, the length is bounded."""
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

import deq_synthetic
import deq_wikitext
import ignn_graphs
import mdeq_cifar
import mdeq_imagenet

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README, **{f"assets/{name}": (ROOT / "assets" / name).read_text()
                                 for name in ("results.md", "porting.md")}}
if (ROOT / "findings").is_dir():
    PAGES["findings/README.md"] = (ROOT / "findings" / "README.md").read_text()


def test_the_example_runs_as_printed(capsys):
    """And leaves the gradient A_{5,0.5}: five damped steps from the end of a plain iteration."""
    torch.manual_seed(0)
    code, example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], {}
    exec(compile(code, "README.md", "exec"), example)
    n_evals = int(capsys.readouterr().out.split()[0])
    assert 1 < n_evals <= 31 and example["result"].converged.all()
    f, layer, h = example["f"], example["layer"], torch.zeros(8, 64)
    with torch.no_grad():
        for _ in range(100):
            h = f(h)
    for _ in range(5):
        h = 0.5 * h + 0.5 * f(h)
    torch.testing.assert_close(example["h"], h, rtol=1e-3, atol=1e-5)
    expected, got = torch.autograd.grad(h.square().mean(), layer.weight)[0], layer.weight.grad
    assert (got - expected).norm() < 1e-3 * expected.norm()


BLOCKS = [block for text in PAGES.values() for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize("i", range(1, len(BLOCKS)))
def test_every_other_example_runs(i, capsys):
    """By itself, with common.py beside it; one without imports goes on from the one before.  Solved, a gradient."""
    torch.manual_seed(0)
    names, alone = {}, BLOCKS[i].startswith("import")
    for block in BLOCKS[i - (not alone):i + 1]:
        exec(compile(block, "README.md", "exec"), names)
        code = [line for line in block.splitlines() if line and not line.startswith(("import ", "from "))]
        assert len(code) <= 20
    if "result" in names:
        assert names["result"].converged.all()
    if "optimizer" in names:
        losses = [float(x) for x in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
        assert losses[0] > 2 and losses[1] < 0.3
    if "found" in names:
        row = names["found"]["rows"][2]
        assert names["found"]["exact"] == 1
        assert row.get("cosine_bptt", 1) == pytest.approx(1) and names["found"]["rows"][0]["cosine"] > 0


def example(word):
    torch.manual_seed(0)
    names = {}
    exec(compile(next(block for block in BLOCKS if word in block), "README.md", "exec"), names)
    return names


def test_the_example_of_graphs_gives_one_result_per_graph():
    names = example("GCNConv")
    assert len(names["result"].residual) == 3 and names["conv"].lin.weight.grad.norm() > 0


def test_the_example_of_padded_sequences_gives_what_each_sequence_gives_alone():
    names = example("real = ")
    block, u, h = names["block"], names["u"], names["h"]
    for i, n in enumerate((10, 4)):
        own, alone = u[i:i + 1, :n], torch.zeros(1, n, 16)
        for _ in range(300):
            alone = block(0.5 * alone + own)
        torch.testing.assert_close(h[i:i + 1, :n], alone, rtol=1e-2, atol=1e-2)
    assert (h[1, 4:] == 0).all()


SCRIPTS = {module.__name__: module for module in (deq_synthetic, deq_wikitext, ignn_graphs, mdeq_cifar,
                                                 mdeq_imagenet)}


def test_every_command_of_the_readme_and_the_headers_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)              # for --cuda-graph
    torch.save({}, "FILE")                      # --eval reads what --resume names: here an official checkpoint
    text = "".join([*PAGES.values(), *(module.__doc__ for module in SCRIPTS.values())]).replace("\\\n", " ")
    commands = re.findall(rf"(?:python|torchrun(?: +--\S+)+) +({'|'.join(SCRIPTS)})\.py((?: +-[^`#\n;(]*)?)", text)
    assert len(commands) >= 32 and {script for script, _ in commands} == set(SCRIPTS)
    for script, flags in commands:
        SCRIPTS[script].parse_args(shlex.split(flags))


@pytest.mark.parametrize("dry, count", [("", 26), ("1", 18)])
def test_every_command_of_the_list_for_a_GPU_parses(tmp_path, monkeypatch, dry, count):
    """None twice; those of the dry run without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not dry)
    (tmp_path / "row6").mkdir()
    torch.save({}, tmp_path / "row6" / "checkpoint.pt")
    said = subprocess.run(["bash", ROOT / "tests" / "gpu_list.sh", tmp_path, tmp_path / "data"], check=True,
                          env={"PATH": os.environ["PATH"], "SHOW": "1", "DRY": dry, "DATA2": "other"},
                          capture_output=True, text=True).stdout
    commands = re.findall(rf"^(?:profile: )?({'|'.join(SCRIPTS)})\.py (.*)", said, re.MULTILINE)
    parsed = [(script, str(SCRIPTS[script].parse_args(shlex.split(flags)))) for script, flags in commands]
    assert len(parsed) == len(set(parsed)) == count and len({script for script, _ in parsed}) == 3


@pytest.mark.parametrize("script, row, count", [(mdeq_cifar, r"^ +\d  .*?\+- \S+ +(.*)$", 8),
                                                (mdeq_imagenet, r"^ +(?:paper )?\d\S+ %  +(.*?)(?:  +#.*)?$", 3),
                                                (deq_wikitext,
                                                 r"^ +(?:paper )?[\dfails.-]+ +[\d.x-]*  +(.*?)(?:  +#.*)?$", 8)])
def test_the_rows_of_a_headers_table_parse_and_differ(script, row, count):
    text = re.sub(r"\n {20,}(?=--)", " ", script.__doc__)              # a row may go on in the next line
    rows = re.findall(row, text, re.MULTILINE)
    parsed = [str(script.parse_args([] if row == "(none)" else shlex.split(row))) for row in rows]
    assert len(parsed) == len(set(parsed)) == count
    exact = [row for row in rows if "--grad implicit" in row]               # the paper's, by its backward solver
    assert exact and all("--backward-solver broyden" in row for row in exact)


def prose(text):
    """Without blocks and snippets of code."""
    return re.sub(r"`[^`]*`", "code", re.sub(r"```.*?```|^ {4}.*?$", "", text, flags=re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_no_placeholder_is_left_and_few_sentences_are_packed(page):
    assert not re.search(r"@[A-Z_]+@", PAGES[page])
    words = prose(PAGES[page])
    assert words.count(";") <= 5 * len(words.split()) / 1000


def test_the_readme_is_short_and_its_first_command_stands_on_the_first_screen():
    assert len(README.split()) <= 4500
    assert README[:README.index("```bash")].count("\n") < 30


def anchors(text):
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", prose(PAGES[page]))
    assert links
    for path, anchor in links:
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text()), (path, anchor)


def test_every_file_that_the_text_names_is_there():
    """As `tests/gpu_list.sh` or `common.py`; what a run writes, and files of other projects, are no such names."""
    for page, text in PAGES.items():
        for name in re.findall(r"`((?:tests|assets|findings)/[\w./-]+\.(?:py|sh|md|png))`", text):
            assert (ROOT / name).exists(), (page, name)


def pieces(*names_and_ranges):
    """The text of common.py that its header says to copy: whole sections, and functions by name."""
    text = (ROOT / "common.py").read_text()
    starts = {m[1]: m.start() for m in re.finditer(r"^(?:@\w+\n)?(?:def|class) (\w+)", text, re.MULTILINE)}
    ends = sorted([*starts.values(), *(m.start() for m in re.finditer(r"^# -{9,}", text, re.MULTILINE))])
    code = ["import contextlib, functools, math, operator", "from typing import Callable, NamedTuple, Sequence",
            "import torch", "from torch import Tensor", "from torch.utils._pytree import tree_flatten, tree_unflatten",
            "State = object"]
    for first, last in names_and_ranges:
        end = next(e for e in ends if e > starts[last])
        code.append(text[starts[first]:end])
    return "\n".join(code)


@pytest.mark.parametrize("copied, call", [
    ([("_require", "_explain"), ("_check_phantom", "_check_phantom"), ("upg", "upg")], "upg(f, h)"),
    ([("_require", "_explain"), ("_check_phantom", "_check_phantom"), ("npg", "npg"), ("_vjp", "_Undifferentiable")],
     "npg(f, h)"),
    ([("_require", "_products"), ("_solver", "gmres"), ("_vjp", "_Undifferentiable"), ("implicit", "implicit")],
     "implicit(f, h)"),
    ([("_require", "_products"), ("_solver", "_solver"), ("broyden", "broyden")], "broyden(f, h).h"),
    ([("_require", "_products"), ("_solver", "_solver"), ("anderson", "anderson")], "anderson(f, h).h")])
def test_parts_of_common_can_be_copied_as_its_header_says(copied, call):
    """And meet their errors: a name that is missing shows in those, too."""
    names = {}
    exec(pieces(*copied), names)
    u = torch.ones(2, 3, requires_grad=True)
    names.update(f=lambda h: 0.5 * h + u, h=torch.full((2, 3), 2.0))
    h = eval(call, names)
    torch.testing.assert_close(h, torch.full((2, 3), 2.0), rtol=1e-3, atol=1e-3)
    if h.requires_grad:
        h.sum().backward()
        assert (u.grad > 0.9).all()
    for wrong in (lambda h: h[:1], lambda h: h.mul_(2), lambda h: (h,)):
        with pytest.raises((ValueError, RuntimeError), match="f must|in-place operation"):
            eval(call, {**names, "f": wrong})
    with pytest.raises((RuntimeError, ValueError), match="vmap|h0 must"):
        torch.func.vmap(lambda h: eval(call, {**names, "h": h}))(names["h"][None])
        eval(call, {**names, "h": 1})
