"""assets/figures.py on what runs have written; the loop of assets/fig3.sh, with a stand-in for training."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from assets import figures

ROOT = Path(__file__).resolve().parent.parent


def write(folder, *records, rest=""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + rest)
    return str(folder)


def start(**args):
    return {"event": "start", "step": 0, "args": {"epochs": 2, "lr": 0.1, **args}}


def epoch(number, accuracy):
    return {"event": "epoch", "step": 10 * number, "epoch": number, "test_accuracy": accuracy,
            "test_loss": 1.0,
            **{f"{name}_residual_p{p}": p / 1000 for name in ("train", "test") for p in (10, 50, 90)}}


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        figures.main([str(arg) for arg in argv])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_half_a_line_at_the_end_is_ignored_and_one_before_is_not(tmp_path, capsys):
    whole = [start(), epoch(1, 50.0)]
    assert figures.records(write(tmp_path / "killed", *whole, rest='{"event": "epo')) == whole
    with pytest.raises(SystemExit):
        figures.records(write(tmp_path / "bad", start(), rest='{"event"\n{"event": "epoch"}\n'))
    assert "metrics.jsonl, line 2" in capsys.readouterr().err


def test_the_table_of_fig_3(tmp_path, capsys, monkeypatch):
    """The last epoch's accuracy and not the best; what diverged, was cut off or never begun says so."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)                # the table comes first and needs none
    write(tmp_path / "upg-0.3-1", start(), epoch(1, 90.0), epoch(2, 80.0))
    write(tmp_path / "upg-0.3-3", start(), epoch(1, 90.0), {"event": "broken", "step": 15, "what": "loss"})
    write(tmp_path / "upg-0.3-5", start(), epoch(1, 70.0))
    write(tmp_path / "upg-0.3-9", start(), {"event": "train", "step": 3, "loss": None}, rest='{"ev')
    with pytest.raises(SystemExit) as end:
        figures.main(["fig3", str(tmp_path), str(tmp_path / "fig3.png")])
    out, err = capsys.readouterr()
    assert "| UPG, lam = 0.3 | 80.00 | diverged | not finished | not finished | not finished |" in out
    assert len(out.splitlines()) == 2 + 6 and "warning" not in err
    assert end.value.code == 2 and "pip install matplotlib" in err


def test_runs_of_fig_3_with_different_flags_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write(tmp_path / "upg-0.3-1", start(k=1, out="a"), epoch(2, 80.0))
    write(tmp_path / "npg-0.5-15", start(k=15, out="b", lr=0.2), epoch(2, 80.0))
    err = refused(capsys, "fig3", tmp_path, tmp_path / "x.png")
    assert "differ in --lr: 0.1, 0.2" in err and err.count("warning") == 1


def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path, capsys):
    run = write(tmp_path / "run", start())
    assert "run: nothing to draw" in refused(capsys, "curves", run, tmp_path / "x.png")
    assert "none: No such file" in refused(capsys, "curves", tmp_path / "none", tmp_path / "x.png")
    assert "must end in .png" in refused(capsys, "curves", run, run)               # the picture was forgotten
    drawable = write(tmp_path / "drawable", start(), epoch(1, 50.0))
    assert "--only radius: these runs have no such panel, but loss, score, training residual" in refused(
        capsys, "curves", drawable, tmp_path / "x.png", "--only", "radius")
    assert "no run of Fig. 3" in refused(capsys, "fig3", tmp_path, tmp_path / "x.png")


def test_curves_of_every_kind_of_run_are_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    cifar = write(tmp_path / "cifar", start(), {"event": "train", "step": 5, "loss": 2.0, "accuracy": 10.0},
                  epoch(1, None), epoch(2, 80.0),
                  {"event": "cosine", "step": 5, "cosine_upg": 0.9, "cosine_npg": 0.8, "cosine_gmres": 1.0})
    text = write(tmp_path / "text", start(), {"event": "train", "step": 5, "loss": 2.0},
                 {"event": "eval", "step": 5, "valid_nll": 2.0, "valid_perplexity": 7.0})
    folds = [{"event": "epoch", "step": step, "fold": fold, "loss": 1.0, "test": 70.0 + fold}
             for fold in (0, 1) for step in (1, 2)]
    graphs = write(tmp_path / "graphs", start(), *folds)
    drawn, plt = {}, figures.prepare(tmp_path / "x.png")
    monkeypatch.setattr(figures, "save", lambda fig, picture: drawn.update({picture: fig}))
    figures.main(["curves", cifar, text, graphs, str(tmp_path / "all.png")])
    (fig,) = drawn.values()
    panels = {ax.get_title(): ax for ax in fig.axes}
    assert [title.split(" (")[0] for title in panels] == [
        "loss", "score", "perplexity", "training residual", "evaluation residual",
        "cosine to the exact gradient"]
    lines = [line for line in panels["score (%)"].lines if len(line.get_xdata())]
    assert sorted(tuple(line.get_ydata()) for line in lines if len(line.get_xdata()) == 2)[-2:] == [
        (70.0, 70.0), (71.0, 71.0)]                                                 # a line per fold
    band = panels["training residual (10, 50, 90 %)"].collections[0].get_paths()[0].vertices[:, 1]
    assert (min(band), max(band)) == (0.01, 0.09)
    assert [text.get_text() for text in fig.legends[0].texts] == [cifar, text, graphs]
    plt.close(fig)
    figures.main(["curves", cifar, str(tmp_path / "some.png"), "--only", "cosine", "training"])
    few = drawn[str(tmp_path / "some.png")]
    assert [ax.get_title().split()[0] for ax in few.axes] == ["training", "cosine"]
    plt.close(few)
    monkeypatch.undo()
    figures.main(["curves", cifar, str(tmp_path / "new" / "one.png")])
    assert (tmp_path / "new" / "one.png").stat().st_size > 10000


# --- the loop of fig3.sh, with a script that stands for python mdeq_cifar.py --------------------------------

STAND_IN = """#!/bin/bash
shift                                                   # mdeq_cifar.py
echo "$*" >> {log}
while [ $# -gt 0 ]; do [ "$1" = --out ] && out=$2; shift; done
mkdir -p $out
case $out in
    *upg-0.3-3) echo '{{"event": "broken"}}' >> $out/metrics.jsonl; exit 1 ;;
    *upg-0.3-9) [ -e {slow} ] || exit 0; trap 'kill $!; echo saved; exit 0' TERM
                sleep 30 & touch {slow}.now; wait ;;
    *upg-0.5-1) [ ! -e {bad} ] || exit 2 ;;
esac
"""


@pytest.fixture
def loop(tmp_path):
    (tmp_path / "python").write_text(STAND_IN.format(log=tmp_path / "log", slow=tmp_path / "slow",
                                                     bad=tmp_path / "bad"))
    (tmp_path / "python").chmod(0o755)

    def begin(*flags):
        (tmp_path / "log").write_text("")
        return subprocess.Popen([ROOT / "assets" / "fig3.sh", tmp_path / "out", *flags], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                env={**os.environ, "PYTHON": str(tmp_path / "python")})

    return begin


def test_the_loop_trains_all_30_and_goes_on_after_one_that_diverges(loop, tmp_path):
    run = loop("--epochs", "2")
    out = run.communicate(timeout=60)[0]
    lines = (tmp_path / "log").read_text().splitlines()
    assert run.returncode == 0 and len(lines) == len(set(lines)) == 30 and out.count("has diverged") == 1
    assert lines[0] == f"--epochs 2 --grad upg --lam 0.3 --k 1 --out {tmp_path}/out/upg-0.3-1 --resume auto"
    made = {f"{grad}-{lam}-{k}" for grad in figures.FIG3["grad"] for lam in figures.FIG3["lam"]
            for k in figures.FIG3["k"]}
    assert {path.name for path in (tmp_path / "out").iterdir()} == made          # those that figures.py reads
    assert loop().communicate(timeout=60)[0].count("has diverged before") == 1      # and is not tried again
    assert len((tmp_path / "log").read_text().splitlines()) == 29


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_run_save_and_ends_the_loop(number, loop, tmp_path):
    (tmp_path / "slow").touch()
    run, deadline = loop(), time.monotonic() + 30
    while not (tmp_path / "slow.now").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(run.pid, number)
    out = run.communicate(timeout=15)[0]
    assert run.returncode == 0 and "saved\nstopped" in out
    assert len((tmp_path / "log").read_text().splitlines()) == 4


def test_wrong_flags_end_the_loop(loop, tmp_path):
    (tmp_path / "bad").touch()
    run = loop()
    assert "upg-0.5-1 has ended with exit code 2" in run.communicate(timeout=60)[0] and run.returncode == 2
    for flags in (["--k", "3"], ["--lam=0.5"], ["--out", "x"]):
        run = loop(*flags)
        assert "sets " + flags[0].split("=")[0] in run.communicate(timeout=60)[0] and run.returncode == 2
    assert not (tmp_path / "log").read_text()
