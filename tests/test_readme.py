"""The README: its example runs, and its commands parse."""
import re
import shlex
from pathlib import Path

import deq_synthetic
import mdeq_cifar

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_as_printed(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    exec(compile(code, "README.md", "exec"), {})
    n_evals = int(capsys.readouterr().out.split()[0])
    assert 1 < n_evals <= 31


def test_every_command_of_the_readme_and_the_headers_parses(monkeypatch):
    """And every row of Table 1 in mdeq_cifar.py's header differs from the others."""
    monkeypatch.setenv("RANK", "0")
    commands = re.findall(r"(?:python|torchrun --\S+) (deq_synthetic|mdeq_cifar)\.py((?: +-[^`#\n;(]*)?)",
                          README + deq_synthetic.__doc__ + mdeq_cifar.__doc__)
    assert len(commands) >= 8
    for script, flags in commands:
        if "--benchmark" in flags:
            monkeypatch.delenv("RANK", raising=False)       # a benchmark is of one process
        module = {"deq_synthetic": deq_synthetic, "mdeq_cifar": mdeq_cifar}[script]
        module.parse_args(shlex.split(flags))
    table = re.findall(r"^ +\d  .*?\+- \S+ +(.*)$", mdeq_cifar.__doc__, re.MULTILINE)
    parsed = [str(mdeq_cifar.parse_args([] if row == "(none)" else shlex.split(row))) for row in table]
    assert len(parsed) == 8 and len(set(parsed)) == 8


def test_no_placeholder_is_left():
    assert not re.search(r"@[A-Z]+@", README)
