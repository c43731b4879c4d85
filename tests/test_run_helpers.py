"""What loses somebody's work when it is wrong: options, checkpoints, a run's folder, signals, processes."""
import io
import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from processes import Forked, pair

import common
from common import (Meter, Process, Run, add_run_flags, benchmark, catch_signals, describe_run, die, finite,
                    health, init_process, is_ours, load_checkpoint, load_weights, lock, make_parser,
                    note_differences, parse_flags, peak_memory, reset_peak_memory, rng_state, save_checkpoint,
                    seed_everything, set_rng_state, spell, timed_step, within)

ROOT = Path(common.__file__).parent
CPU = torch.device("cpu")
ALONE = Process(0, 1, CPU)


@pytest.fixture(autouse=True)
def of_its_own(monkeypatch):
    """No process of torchrun, no GPU, and no signal of another test."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                 "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def ends(capfd, work, code=2):
    """work() ends the run with this exit code and one line; returns the line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        work()
    *rest, line = capfd.readouterr().err.splitlines()
    assert end.value.code == code and line.startswith(("error: ", "x: error: ")), line
    assert all(other.startswith(("usage: ", "warning: ")) for other in rest), rest
    return line.split("error: ", 1)[1]


# --- options ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, interval, good, bad", [
    (int, "[1, inf)", {"1": 1, "12345678901234567890": 12345678901234567890}, "0 -1 inf nan 1.5 1e3 x"),
    (int, "[0, 3]", {"0": 0, "3": 3}, "-1 4"), (int, "(0, 3)", {"1": 1, "2": 2}, "0 3"),
    (float, "(0, 1]", {"1": 1.0, "1e-300": 1e-300}, "0 -0.0 1.0000001 nan inf -inf x"),
    (float, "[0, 1)", {"0": 0.0, "0.999": 0.999}, "1 -1e-300 nan"),
    (float, "[0, inf)", {"0": 0.0, "1e300": 1e300}, "inf 1e999 nan -1"),
    (float, "(-inf, inf)", {"-1e300": -1e300}, "inf -inf nan")])
def test_a_number_lies_in_its_interval(kind, interval, good, bad, capfd):
    """A bracket includes its bound, a parenthesis does not; what is no number of the kind is refused, too."""
    p = make_parser("A script.")
    p.prog = "x"
    p.add_argument("--k", type=within(kind, interval), help="a number")
    for text, value in good.items():
        found = p.parse_args([f"--k={text}"]).k
        assert found == value and type(found) is kind
    for text in bad.split():
        said = ends(capfd, lambda: p.parse_args([f"--k={text}"]))
        assert said.startswith("argument --k: must be ") and said.endswith(f" in {interval}, got {text}")
        assert ("whole" in said) == (kind is int and text in ("inf", "nan", "1.5", "1e3", "x"))


def test_a_refusal_is_a_line_of_usage_and_the_error(capsys):
    p = make_parser("A script.")
    p.prog = "x"
    p.add_argument("--k", type=within(int, "[1, inf)"), help="a number")
    with pytest.raises(SystemExit):
        p.parse_args(["--k", "0"])
    assert capsys.readouterr().err.splitlines() == [
        "usage: x [options]    (--help lists them)", "x: error: argument --k: must be in [1, inf), got 0"]


PRESETS = {"tiny": dict(epochs=50), "large": dict(epochs=220, lr=0.5), "toy": dict(epochs=4)}


def options(*argv, **more):
    """A script's: --epochs and --lr have presets by --model and --data, --tol a default of the parser."""
    p = make_parser("A script.")
    p.prog = "x"
    p.add_argument("--data", default="data", help="folder")
    p.add_argument("--model", choices=["tiny", "large"], default="tiny", help="size")
    for name in ("--epochs", "--lr"):
        p.add_argument(name, type=float, help="a number")
    p.add_argument("--tol", type=float, default=0.1, help="a number")
    add_run_flags(p, "MODEL").add_argument("--generate", type=int, metavar="N", help="only generate N words")
    return parse_flags(p, [str(a) for a in argv], lambda a: {**PRESETS[a.model], **PRESETS.get(a.data, {})},
                       "data model tol epochs", **more)


def test_what_is_given_wins_then_a_checkpoint_then_the_presets_then_the_default(tmp_path):
    file = tmp_path / "checkpoint.pt"
    state = {"model": {}, "args": vars(options("--data", "toy", "--model", "large", "--tol", 0.3, "--lr", 9,
                                                "--epochs", 7))}
    save_checkpoint(file, state)
    chosen = ("data", "model", "epochs", "lr", "tol")

    def found(*argv):
        args = options(*argv)
        return tuple(getattr(args, name) for name in chosen)

    assert found() == ("data", "tiny", 50, None, 0.1)
    assert found("--model", "large") == ("data", "large", 220, 0.5, 0.1)
    assert found("--model", "large", "--data", "toy") == ("toy", "large", 4, 0.5, 0.1)      # the later preset
    assert found("--model", "large", "--lr", 2, "--epochs", 3) == ("data", "large", 3, 2, 0.1)
    # --eval: all but lr are the checkpoint's; lr was not asked for, and is the preset of its model
    assert found("--eval", "--resume", file) == ("toy", "large", 7, 0.5, 0.3)
    assert found("--eval", "--resume", file, "--model", "tiny", "--tol", 0.1) == ("toy", "tiny", 7, None, 0.1)
    assert found("--generate", 3, "--resume", file, "--data", "data") == ("data", "large", 7, 0.5, 0.3)
    # a training is continued on its data, and all else must be given again: Run compares
    assert found("--resume", file) == ("toy", "tiny", 4, None, 0.1)
    assert found("--resume", "auto", "--out", tmp_path) == ("toy", "tiny", 4, None, 0.1)
    assert found("--resume", file, "--data", "data") == ("data", "tiny", 50, None, 0.1)
    assert found("--resume", "auto", "--out", tmp_path / "new") == ("data", "tiny", 50, None, 0.1)
    file.rename(f"{file}.previous")
    assert found("--resume", "auto", "--out", tmp_path) == ("toy", "tiny", 4, None, 0.1)
    torch.save({"state_dict": {}}, tmp_path / "official.pt")                                # has no flags
    assert found("--eval", "--resume", tmp_path / "official.pt") == ("data", "tiny", 50, None, 0.1)


def test_flags_that_do_not_go_together_are_refused_before_anything_is_read(tmp_path, monkeypatch, capfd):
    file = tmp_path / "a.pt"
    file.touch()
    refused = partial(ends, capfd)
    assert "not allowed with argument --eval" in refused(lambda: options("--eval", "--benchmark"))
    assert "not allowed with" in refused(lambda: options("--generate", 3, "--eval", "--resume", file))
    assert "--benchmark" in refused(lambda: options("--benchmark", "--resume", file))
    assert refused(lambda: options("--resume", "auto")) == "--resume auto continues the training in --out DIR"
    assert refused(lambda: options("--resume", tmp_path / "no")) == (
        f"argument --resume: there is no file {tmp_path / 'no'}")
    for mode in (["--eval"], ["--generate", 3]):
        for resume in ([], ["--resume", "auto", "--out", tmp_path]):
            said = refused(lambda: options(*mode, *resume))
            assert said == f"{mode[0]} needs --resume FILE, the checkpoint to use"
    assert refused(lambda: options("--seed", 2 ** 32)) == (
        "argument --seed: must be in [0, 4294967296), got 4294967296")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    assert "torchrun --max-restarts needs --out DIR --resume auto" in refused(lambda: options("--out", "x"))
    options("--out", "x", "--resume", "auto")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    for name in ("RANK", "LOCAL_RANK"):
        options("--benchmark")                              # RANK alone is what some platforms set
        monkeypatch.setenv(name, "0")
    for mode in (["--benchmark"], ["--generate", 3, "--resume", file]):
        assert refused(lambda: options(*mode)) == f"{mode[0]} is for one process: run it without torchrun"


def test_a_checkpoint_of_another_script_or_version_is_named(tmp_path, capfd):
    file, saved = tmp_path / "a.pt", vars(options())
    older = {name: value for name, value in saved.items() if name != "tol"}
    for args, named in (
            ({**saved, "crop": 224}, "is of another script, or of another version of this one: there is no "
             "--crop here"), (older, "is of another script, or of another version of this one, which "
             "had no --tol")):
        torch.save({"model": {}, "args": args}, file)
        for mode in (["--eval"], []):
            assert ends(capfd, lambda: options(*mode, "--resume", file)) == f"--resume {file} {named}"


def test_flags_of_another_value_in_training_are_noted_by_the_first_process(capsys):
    saved = {"max_iter": 22, "tol": 0.0, "lr": 1.0}
    args = SimpleNamespace(max_iter=5, tol=0.0, lr=2.0, amp=True)
    note_differences(saved, args, "max_iter tol amp", ALONE)
    assert capsys.readouterr().err.splitlines() == ["note: trained with --max-iter 22, evaluated with 5",
                                                    "note: trained with --amp None, evaluated with True"]
    note_differences(saved, args, "max_iter tol amp", Process(1, 2, CPU))
    assert not capsys.readouterr().err


SCRIPTS = ("deq_synthetic", "mdeq_cifar", "mdeq_imagenet", "deq_wikitext", "ignn_graphs")
START = """
import contextlib, importlib, io, json, sys
found = {}
for name in sys.argv[1:]:
    before, codes = set(sys.modules), []
    try:
        module = importlib.import_module(name)
        for flags in (["--help"], ["--k", "0"]):
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                try:
                    module.parse_args(flags)
                except SystemExit as end:
                    codes.append((end.code, flags[0] in said.getvalue()))
    except ImportError as error:
        codes = str(error)
    found[name] = codes, sorted({m.split(".")[0] for m in set(sys.modules) - before})
print(json.dumps(found))
"""


def test_help_and_a_wrong_flag_import_nothing_slow():
    """torchvision and torch_geometric take seconds: they are imported when the arguments are right."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run([sys.executable, "-c", START, *SCRIPTS], cwd=ROOT, env=environment, check=True,
                          capture_output=True, text=True).stdout
    for name, (codes, packages) in json.loads(said).items():
        assert codes == [[0, True], [2, True]], name
        slow = {"torchvision", "torch_geometric", "scipy", "matplotlib", "sklearn"} & set(packages)
        assert not slow, f"{name} imports {slow}"


# --- checkpoints --------------------------------------------------------------------------------------------

def state(step):
    return {"step": step, "model": {"w": torch.full((3,), float(step))}, "args": {"lr": 0.1}}


def test_a_checkpoint_comes_back_and_the_one_before_stays(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for step in (1, 2, 3):
        save_checkpoint(path, state(step))
    assert load_checkpoint(path)["step"] == 3
    assert load_checkpoint(tmp_path / "checkpoint.pt.previous")["step"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "checkpoint.pt.previous"]


def test_the_one_before_stays_where_a_file_system_has_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "checkpoint.pt", state(step))
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
    assert load_checkpoint(tmp_path / "checkpoint.pt.previous")["step"] == 2


@pytest.mark.parametrize("call, after", [("fsync", 0), ("link", 0), ("replace", 0), ("replace", 1)])
def test_a_crash_at_any_moment_of_a_save_leaves_a_complete_checkpoint(tmp_path, monkeypatch, call, after):
    path, real, calls = tmp_path / "checkpoint.pt", getattr(os, call), []
    save_checkpoint(path, state(1))
    save_checkpoint(path, state(2))

    def crash(*args):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(os, call, crash)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, state(3))
    monkeypatch.undo()
    assert load_checkpoint(path)["step"] == (3 if (call, after) == ("replace", 1) else 2)
    assert load_checkpoint(path.with_name("checkpoint.pt.previous"))["step"] == 1
    save_checkpoint(path, state(4))             # what the crash left behind does not disturb the next save
    assert load_checkpoint(path)["step"] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "checkpoint.pt.previous"]


def test_a_rename_that_fails_leaves_both_checkpoints(tmp_path, monkeypatch, capsys):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, state(1))
    save_checkpoint(path, state(2))

    def refuse(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(SystemExit):
        save_checkpoint(path, state(3))
    monkeypatch.undo()
    assert "cannot write" in capsys.readouterr().err
    assert [load_checkpoint(p)["step"] for p in (path, f"{path}.previous")] == [2, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "checkpoint.pt.previous"]


@pytest.mark.parametrize("saves, error", [(0, OSError), (2, OSError), (2, RuntimeError)])
def test_a_disk_that_fills_up_costs_no_checkpoint(tmp_path, monkeypatch, capsys, saves, error):
    """Half a file is written, the rest refused: `path` holds the last checkpoint, or does not exist yet."""
    path = tmp_path / "checkpoint.pt"
    for step in range(1, saves + 1):
        save_checkpoint(path, state(step))

    def full(_, file):
        file.write(b"half")
        raise error("No space left on device\nand more lines")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as end:
        save_checkpoint(path, state(3))
    monkeypatch.undo()
    assert end.value.code == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"error: --out: cannot write {path}.new (No space left on device)")
    assert load_checkpoint(path)["step"] == 2 if saves else not path.exists()
    assert not path.with_name("checkpoint.pt.new").exists()         # room for what is saved elsewhere


def test_the_data_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """fsync of the whole new file, then the renames: after a power cut the name must not point at nothing."""
    path, order = tmp_path / "checkpoint.pt", []
    save_checkpoint(path, state(1))
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.fstat(fd).st_size), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    save_checkpoint(path, state(2))
    assert order == [path.stat().st_size, "checkpoint.pt", "checkpoint.pt.previous"]


def test_a_truncated_checkpoint_is_named_and_the_previous_one_used(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, state(1))
    save_checkpoint(path, state(2))
    for size in (0, 100, path.stat().st_size // 2, path.stat().st_size - 1):
        path.write_bytes(path.read_bytes()[:size])
        assert load_checkpoint(path)["step"] == 1
        message = capsys.readouterr().err
        assert str(path) in message and "checkpoint.pt.previous" in message
    torch.save(torch.nn.Linear(2, 2), tmp_path / "could_run_code.pt")
    for previous in (b"nothing", bytes(100), (tmp_path / "could_run_code.pt").read_bytes()):
        (tmp_path / "checkpoint.pt.previous").write_bytes(previous)
        path.write_bytes(previous)
        with pytest.raises(SystemExit) as end:
            load_checkpoint(path)
        (message,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and str(path) in message
        assert ("weights" in message) == (len(previous) > 100)      # torch's advice could run code


def test_a_missing_checkpoint_and_one_that_could_run_code_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        load_checkpoint(tmp_path / "none.pt")
    message = capsys.readouterr().err
    assert end.value.code == 2 and "--resume: there is no file" in message and "none.pt" in message
    with pytest.raises(SystemExit):
        load_checkpoint(tmp_path / "none.pt", flag="--init")
    assert "--init: there is no file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        load_checkpoint(tmp_path)
    assert f"is a folder; give a file in it, as {tmp_path / 'checkpoint.pt'}" in capsys.readouterr().err
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(SystemExit) as end:
        load_checkpoint(tmp_path / "model.pt")
    message = capsys.readouterr().err
    assert end.value.code == 2 and "weights_only=False" in message and "model.pt" in message
    torch.save({"step": 7}, tmp_path / "model.pt.previous")         # a good one beside it is used
    assert load_checkpoint(tmp_path / "model.pt")["step"] == 7
    message = capsys.readouterr().err
    assert "model.pt is damaged or not a checkpoint (it holds more than tensors and plain values); using" in (
        message)


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "a.pt", state(1))
    save_checkpoint(tmp_path / "a.pt", state(2))

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(SystemExit) as end:
        load_checkpoint(tmp_path / "a.pt")
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said == f"error: --resume: cannot read {tmp_path / 'a.pt'} (Permission denied)\n"


def test_a_checkpoint_of_ours_holds_the_runs_flags():
    assert is_ours(state(1))
    assert not any(map(is_ours, ({"state_dict": {}}, {"args": "a namespace of another code"}, [1], None)))


def test_every_random_generator_is_restored(tmp_path):
    save_checkpoint(tmp_path / "c.pt", {"rng": [rng_state()]})
    expected = random.random(), torch.rand(3)
    set_rng_state(load_checkpoint(tmp_path / "c.pt")["rng"][0])
    assert random.random() == expected[0] and (torch.rand(3) == expected[1]).all()
    assert set(rng_state()) == {"python", "torch"} | ({"cuda"} if torch.cuda.is_available() else set())


def test_a_second_writer_mixes_no_bytes(tmp_path, monkeypatch):
    """It saves while the first does; each has a file of its own until it is complete."""
    path, save, pid = tmp_path / "checkpoint.pt", torch.save, os.getpid()

    def interrupted(state, file):
        if state["who"] == 1:
            file.write(b"half of it")
            monkeypatch.setattr(os, "getpid", lambda: pid + 1)
            save_checkpoint(path, {"who": 2})
            monkeypatch.setattr(os, "getpid", lambda: pid)
            file.seek(0)
        save(state, file)

    monkeypatch.setattr(torch, "save", interrupted)
    save_checkpoint(path, {"who": 1})
    assert torch.load(path)["who"] == 1 and torch.load(tmp_path / "checkpoint.pt.previous")["who"] == 2
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "checkpoint.pt.previous"}


def test_weights_of_another_shape_are_refused_with_one_line(capfd):
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(3, 2)
    load_weights(model, {"args": {}, "model": torch.nn.Linear(2, 2).state_dict()}, pytest.fail, "")
    load_weights(model, {"state_dict": 1}, lambda m, state: m is model and state == {"state_dict": 1}, "")
    state = {"args": {}, "model": other.state_dict()}
    said = ends(capfd, lambda: load_weights(model, state, None, "--resume a"))
    assert said.startswith("--resume a: ") and "size mismatch for weight" in said
    for error in (KeyError("w"), ValueError("w"), TypeError("w"), AttributeError("w")):
        load = mock.Mock(side_effect=error)
        assert ends(capfd, lambda: load_weights(model, {}, load, "--resume a")).startswith("--resume a: ")


# --- the folder of a run ------------------------------------------------------------------------------------

def begin(out, process=ALONE, may_differ="", facts={"images": 9}, **more):
    """A Run with these flags."""
    args = dict(out=out and str(out), resume=None, data="d", seed=0, save_every=60.0, lr=0.1, k=5)
    return Run(SimpleNamespace(**{**args, **more}), process, "tiny-upg", may_differ, **facts)


def save(run, step, weight=1.0):
    run.save({"model": {"w": torch.full((3,), weight), "n": torch.ones(2, dtype=torch.long)}, "step": step})


def records(out):
    return [json.loads(line, parse_constant=pytest.fail)
            for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def test_a_folder_with_a_run_is_continued_or_left_alone(tmp_path, monkeypatch, capfd):
    out = tmp_path / "run"
    taken = "already holds a run: continue it with --resume auto, or choose another folder"
    run = begin(out, resume="auto")
    assert run.state is None
    run.start()
    for step in (1, 2):
        save(run, step)
    for more in ({}, dict(resume=str(tmp_path / "elsewhere.pt"))):
        assert ends(capfd, lambda: begin(out, **more)) == f"--out {out} {taken}"
    monkeypatch.chdir(out)
    for resume, step in (("auto", 2), (f"{out}/checkpoint.pt", 2), ("../run/checkpoint.pt.previous", 1)):
        assert begin(out, resume=resume).state["step"] == step
    run = begin(None, resume=f"{out}/checkpoint.pt")                    # in its own folder
    assert run.folder == out and run.args.out == str(out) and run.state["step"] == 2
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text(3 * '{"step": 9}\n')   # ended before its first checkpoint
    run = begin(tmp_path / "new", resume=f"{out}/checkpoint.pt")        # a branch, with a log of its own
    run.start()
    save(run, 3)
    assert [r["step"] for r in records(tmp_path / "new")] == [2]
    assert load_checkpoint("checkpoint.pt")["step"] == 2
    (out / "checkpoint.pt").unlink()
    assert ends(capfd, lambda: begin(out)) == f"--out {out} {taken}"
    assert begin(out, resume="auto").state["step"] == 1
    assert capfd.readouterr().err == (
        f"warning: {out}/checkpoint.pt is gone; continues from {out}/checkpoint.pt.previous\n")


def test_a_run_without_a_folder_gets_one_with_its_name_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = begin(None)
    name, date, clock, pid = Path(run.args.out).name.rsplit("-", 3)
    assert run.folder.parent == Path("runs") and run.folder.is_dir() and name == "tiny-upg"
    assert len(date + clock) == 14 and int(pid) == os.getpid()


def test_other_flags_are_named_and_may_not_be_given(tmp_path, capfd):
    """On one line; what changes no result may differ, as may the data's folder and what the script allows."""
    save(begin(tmp_path), 1)
    file = tmp_path / "checkpoint.pt"
    assert ends(capfd, lambda: begin(tmp_path, resume="auto", lr=0.2, k=3, seed=1)) == (
        f"--resume {file} is of a run with --seed 0 (here 1), --lr 0.1 (here 0.2), --k 5 (here 3); use the "
        "same flags, or start afresh with another --out")
    assert begin(tmp_path, resume="auto", k=3, may_differ="lr k", data="e", save_every=1.0).state["step"] == 1
    assert "had no --backward-solver" in ends(capfd, lambda: begin(
        tmp_path, resume="auto", may_differ="backward_solver", backward_solver="gmres"))
    torch.save({**load_checkpoint(file), "args": {"crop": 224}}, file)
    assert "is of another script, or" in ends(capfd, lambda: begin(tmp_path, resume="auto"))


def test_other_data_is_named(tmp_path, capfd):
    """One line, which says what there was and what is here; not a thousand classes of it."""
    def refused(**facts):
        return ends(capfd, lambda: begin(tmp_path, resume="auto", data="e", facts=facts))

    save(begin(tmp_path, facts=dict(images=9, classes=["cat", "dog"])), 1)
    said = refused(images=9, classes=["cat"])
    assert f"--resume {tmp_path}/checkpoint.pt" in said and "--data e" in said
    assert "classes ['cat', 'dog'], here ['cat']" in said
    assert "images 9, here 8" in refused(images=8, classes=[])
    assert len(refused(images=9, classes=[f"class {i}" for i in range(1000)])) < 400


def test_what_is_no_training_of_ours_can_only_be_evaluated(tmp_path, capfd):
    file = tmp_path / "a.pt"
    torch.save({"state_dict": {}}, file)
    assert ends(capfd, lambda: begin(tmp_path / "new", resume=str(file))) == (
        f"--resume {file} was not written by this script: an official checkpoint can be evaluated (--eval), "
        "not continued")
    save(begin(tmp_path / "run"), 1)
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    torch.save({"model": state["model"], "args": state["args"]}, file)
    assert "has weights alone" in ends(capfd, lambda: begin(tmp_path / "new", resume=str(file)))


def hold(out):
    lock(out)
    print("mine", flush=True)
    time.sleep(60)


def test_a_folder_has_one_owner_until_that_is_killed(tmp_path, capfd):
    out, log = tmp_path / "run", tmp_path / "log"
    out.mkdir()
    (out / "checkpoint.pt.123.new").touch()                 # of a run that was killed while it saved
    other = Forked(log, hold, out)
    until(lambda: log.exists() and "mine" in log.read_text())
    assert not (out / "checkpoint.pt.123.new").exists()
    assert ends(capfd, lambda: begin(out)) == (
        f"--out {out}: another run is writing there; wait for its end, or choose another folder")
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    for _ in range(2):                                      # again in one process, as in a notebook
        begin(out)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").touch()
    assert ends(capfd, lambda: begin(tmp_path / "file" / "run")) == (
        f"--out {tmp_path}/file/run: cannot make this folder (Not a directory)")
    with monkeypatch.context() as m:                        # root, who runs the tests, may write everywhere
        m.setattr(os, "open", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
        m.setattr(os, "access", lambda *_: False)
        assert ends(capfd, lambda: begin(tmp_path)) == (
            f"--out {tmp_path}: cannot write in this folder (Permission denied)")
    (tmp_path / "metrics.jsonl.new").mkdir()
    assert ends(capfd, lambda: begin(tmp_path), code=1) == (
        f"--out: cannot write {tmp_path}/metrics.jsonl.new (Is a directory)")
    (tmp_path / "metrics.jsonl.new").rmdir()
    run = begin(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    assert ends(capfd, lambda: run.report("train", step=1), code=1) == (
        f"--out: cannot write {tmp_path}/metrics.jsonl (Is a directory)")


def test_a_file_system_without_locks_is_no_reason_to_end(tmp_path, monkeypatch, capfd):
    import fcntl
    with monkeypatch.context() as m:
        m.setattr(fcntl, "lockf", mock.Mock(side_effect=OSError(38, "Function not implemented")))
        begin(tmp_path)
    assert capfd.readouterr().out == (
        f"note: --out {tmp_path} cannot be locked against a second run (Function not implemented)\n")
    monkeypatch.setitem(sys.modules, "fcntl", None)         # Windows
    begin(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_the_log_ends_at_the_line_that_the_checkpoint_knows(tmp_path):
    """Whatever was written after it will be again: lines of any step and event, and half a line."""
    run = begin(tmp_path)
    run.start()
    for step in (1, 2):
        run.report("train", step=step, loss=1 / step)
        save(run, step)
    run.report("epoch", step=2)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "step": 3, "lo')     # killed in the middle of a line
    run = begin(tmp_path, resume="auto")
    run.start()
    run.report("epoch", step=2)
    assert [(r["event"], r["step"]) for r in records(tmp_path)] == [
        ("start", 0), ("train", 1), ("train", 2), ("start", 2), ("epoch", 2)]
    save(run, 2)
    begin(tmp_path, resume=f"{tmp_path}/checkpoint.pt.previous")
    assert [r["step"] for r in records(tmp_path)] == [0, 1, 2]
    (tmp_path / "metrics.jsonl").write_text("")             # somebody's
    run = begin(tmp_path, resume="auto")
    run.report("train", step=3)
    save(run, 3)
    run.report("train", step=4)
    begin(tmp_path, resume="auto")
    assert [r["step"] for r in records(tmp_path)] == [3]
    begin(tmp_path / "new").report("train", step=1)         # ended before its first checkpoint
    begin(tmp_path / "new", resume="auto")
    assert records(tmp_path / "new") == []


def test_a_run_goes_on_with_its_random_numbers_residuals_and_seconds(tmp_path, capfd):
    run = begin(tmp_path, seed=3)
    run.start()
    seed_everything(3)
    first = rng_state()["torch"]
    run.start()
    assert torch.equal(rng_state()["torch"], first)         # seeds as seed + rank
    run.began -= 100
    torch.rand(5), random.random()
    run.note_residuals(train=torch.tensor([0.5, 0.1]), backward=torch.tensor([0.3]))
    run.note_residuals(train=torch.tensor([0.2]))
    save(run, 1)
    expected = torch.rand(3), random.random()
    run = begin(tmp_path, seed=3, resume="auto")
    seed_everything(9)
    run.start()
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]
    assert 100 < run.seconds < 160
    run.note_residuals(train=torch.tensor([0.4]))
    again = begin(tmp_path, seed=3, resume="auto")
    record = run.health(tol=0.3)
    assert record == {**health("train", [torch.tensor([0.5, 0.1, 0.2, 0.4])], 0.3, ALONE),
                      **health("backward", [torch.tensor([0.3])], 0.3, ALONE)}
    assert run.health(0.3) == {}
    gpu = mock.Mock(wraps=ALONE, rank=0, world_size=1, device=torch.device("meta"))    # so to say
    assert begin(tmp_path, process=gpu, seed=3, resume="auto").residuals["train"][0].is_meta
    save(again, 2)                                          # a second interruption
    assert begin(tmp_path, seed=3, resume="auto").health(0.3)["train_residual_p50"] == pytest.approx(0.2)
    capfd.readouterr()
    two = begin(tmp_path / "of two", seed=3)
    save(two, 1)
    state = load_checkpoint(two.checkpoint)
    torch.save({**state, "rng": 2 * state["rng"]}, two.checkpoint)
    begin(two.folder, seed=3, resume="auto").start()
    assert torch.equal(rng_state()["torch"], first)
    assert capfd.readouterr().out == (
        "note: the checkpoint is of 2 process(es): dropout and augmentation are seeded anew\n")


def test_residuals_are_kept_as_they_were_when_noted(tmp_path):
    """A CUDA graph overwrites its result at the next step; and no graph of autograd is held."""
    run, r = begin(tmp_path), torch.tensor([0.25], requires_grad=True)
    run.note_residuals(train=r)
    with torch.no_grad():
        r.fill_(7)
    assert not run.residuals["train"][0].requires_grad and run.health(1.0)["train_residual_p50"] == 0.25


def test_the_start_of_a_run_is_noted_and_printed(tmp_path, capfd):
    for resume, tail in ((None, "7 parameters"), ("auto", "7 parameters; continues after step 5")):
        run = begin(tmp_path, resume=resume)
        run.start("7 parameters", parameters=7)
        command, about, words = capfd.readouterr().out.splitlines()
        assert "x 1, torch" in about and f"writing to {tmp_path}" in about
        assert words == tail and command == shlex.join(sys.argv)
        save(run, 5)
    first, second = records(tmp_path)
    assert (first["event"], first["step"], second["step"]) == ("start", 0, 5)
    assert first["parameters"] == 7 and first["processes"] == 1 and first["args"]["lr"] == 0.1


@pytest.mark.parametrize("loss", [math.nan, -math.inf])
def test_a_loss_that_is_no_number_ends_the_run_at_the_last_good_state(loss, tmp_path, capfd):
    """Exit code 1, one line that names the checkpoint, if there is one; the log says it, too."""
    run = begin(tmp_path)
    what = f"the loss became {loss} by step 6"
    assert ends(capfd, lambda: run.report("train", step=6, loss=loss), code=1) == (
        f"{what}: try a lower --lr or --lam; nothing was saved yet")
    save(run, 5)
    assert ends(capfd, lambda: run.report("train", step=6, loss=loss), code=1) == (
        f"{what}: try a lower --lr or --lam; the last good state is {tmp_path}/checkpoint.pt")
    assert records(tmp_path) == 2 * [{"event": "broken", "step": 6, "what": what}]
    run.report("radius", step=6, rho=loss)                  # a diagnostic is no loss


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_never_saved(weight, tmp_path, capfd):
    run = begin(tmp_path)
    save(run, 3)
    assert ends(capfd, lambda: save(run, 4, weight), code=1) == (
        "a weight became infinite or not a number by step 4: try a lower --lr or --lam; the last good state "
        f"is {tmp_path}/checkpoint.pt")
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3


def test_a_run_says_when_to_save(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    run = begin(tmp_path, save_every=2.0)
    for now, late in ((1000, False), (1119, False), (1120, True), (1121, True)):
        assert run.due() == (late, False)
    save(run, 1)
    for now, late in ((1240, False), (1241, True)):
        assert run.due() == (late, False)
    assert begin(tmp_path / "each step", save_every=0.0).due() == (True, False)


# --- signals, and a run that is stopped ---------------------------------------------------------------------

@pytest.mark.parametrize("number, name", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_is_a_wish_to_save_and_stop(number, name, tmp_path, capfd):
    run = begin(tmp_path)
    assert run.due() == (False, False)
    signal.raise_signal(number)
    assert run.due() == (True, True)
    run.stopped(7)
    said = capfd.readouterr()
    assert said.err.splitlines() == [f"{signal.Signals(number).name}: will save and stop after this step or "
                                     "evaluation" + "; Ctrl-C again stops at once" * (name == "Ctrl-C")]
    assert said.out == (f"{name}: saved after step 7 to {tmp_path}/checkpoint.pt; continue with the same "
                        f"command, --out {tmp_path} and --resume auto\n")
    assert begin(tmp_path / "fold").due() == (True, True)       # the process's next run has heard it
    ALONE.end()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert begin(tmp_path / "next").due() == (False, False)     # the next program of a notebook has not


def test_SIGTERM_and_then_Ctrl_C_is_the_first_Ctrl_C(tmp_path, capfd):
    run = begin(tmp_path)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        signal.raise_signal(number)
    assert run.due() == (True, True)
    run.stopped(7)
    said = capfd.readouterr()
    assert said.out.startswith("Ctrl-C: saved") and len(said.err.splitlines()) == 1


def press_three_times():
    """torchrun repeats the terminal's Ctrl-C after some milliseconds; the third one is a person's."""
    now = 1000.0
    came, common.time.monotonic = catch_signals(True), lambda: now
    for now in (1000.0, 1000.9, 1001.1):
        print("at", now, flush=True)
        signal.raise_signal(signal.SIGINT)
        assert came == {signal.SIGINT: 1000.0}
    print("lived on")


def test_a_second_Ctrl_C_more_than_a_second_later_ends_the_process_at_once(tmp_path):
    process = Forked(tmp_path / "log", press_three_times)
    assert process.wait() == -signal.SIGINT
    assert (tmp_path / "log").read_text().splitlines() == [
        "at 1000.0", "SIGINT: will save and stop after this step or evaluation; Ctrl-C again stops at once",
        "at 1000.9", "at 1001.1"]


def training(out, kills=()):
    """A script in small: 3 epochs of 4 steps with momentum and noise, an evaluation after each.

    kills: (moment, step, rank, signal).
    """
    process = init_process()

    def moment(name, step):
        for number in [k[3] for k in kills if k[:3] == (name, step, process.rank)]:
            os.kill(os.getpid(), number)

    run = begin(out, process=process, resume="auto", save_every=0.0)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    first_epoch, first_batch = 0, 0
    if run.state:
        model.load_state_dict(run.state["model"])
        optimizer.load_state_dict(run.state["optimizer"])
        first_epoch, first_batch = run.state["epoch"], run.state["batch"]
    run.start("a line", parameters=4)

    def keep(epoch, batch):
        run.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 4 * epoch + batch,
                  "epoch": epoch, "batch": batch})

    for epoch in range(first_epoch, 3):
        for batch in range(first_batch if epoch == first_epoch else 0, 4):
            step = 4 * epoch + batch + 1
            loss = model(torch.randn(5, 3)).square().mean()         # noise of each process's own
            loss.backward()
            for p in model.parameters():
                process.sum(p.grad)
            optimizer.step()
            optimizer.zero_grad()
            run.note_residuals(train=torch.rand(2))
            moment("step", step)
            _, stop = run.due()
            run.report("train", step=step, loss=process.sum(loss.detach()).item())
            moment("reported", step)
            keep(epoch, batch + 1)
            if stop:
                run.stopped(step)
                return process.end()
        moment("evaluating", 4 * epoch + 4)
        run.report("epoch", step=4 * epoch + 4, **run.health(0.5))
        moment("evaluated", 4 * epoch + 4)
        keep(epoch + 1, 0)
    process.end()


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
HISTORY = [         # what happens in each attempt, how its processes end, the words of the first process
    ([("reported", 2, 0, KILL)], [-KILL], None),                # a line of the log that no checkpoint knows
    ([("step", 3, -1, TERM)], [0], "saved after step 3"),       # -1: the last process alone
    ([("evaluating", 4, 0, KILL)], [-KILL], None),
    ([("evaluated", 4, 0, KILL)], [-KILL], None),
    ([("step", 6, 0, INT), ("step", 6, -1, INT)], [0], "Ctrl-C: saved after step 6"),
    ([("evaluating", 8, 0, INT), ("evaluating", 8, -1, INT)], [0], "Ctrl-C: saved after step 9"),
    ([("evaluating", 12, 0, TERM)], [0], None)]                 # nothing is left to do: it ends as if unasked


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_is_stopped_and_continued_is_the_one_that_was_not(world, tmp_path):
    """Bit for bit, at every moment, on one process and on two: weights, momenta, random numbers, the log."""
    def attempt(out, kills=()):
        log = f"{out}.log"
        kills = [(name, step, rank % world, number) for name, step, rank, number in kills]
        processes = pair(log, training, out, kills) if world == 2 else [Forked(log, training, out, kills)]
        return [p.wait() for p in processes], Path(log).read_text()

    codes, text = attempt(tmp_path / "a")
    assert set(codes) == {0} and "saved after" not in text
    for kills, ends_with, words in HISTORY:
        Path(f"{tmp_path}/b.log").unlink(missing_ok=True)
        codes, text = attempt(tmp_path / "b", kills)
        assert codes[:1] == ends_with, text
        assert (words or "") in text and text.count("saved after") == (words is not None)
    one, two = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in "ab")
    assert one["step"] == two["step"] == 12 and len(one["rng"]) == world
    for name in one["model"]:
        assert torch.equal(one["model"][name], two["model"][name])
    for i, momenta in one["optimizer"]["state"].items():
        assert torch.equal(momenta["momentum_buffer"], two["optimizer"]["state"][i]["momentum_buffer"])
    for a, b in zip(one["rng"], two["rng"]):
        assert torch.equal(a["torch"], b["torch"]) and a["python"] == b["python"]
    logs = [[{name: value for name, value in r.items() if name != "seconds"} for r in records(tmp_path / name)
             if r["event"] != "start"] for name in "ab"]
    assert logs[0] == logs[1] and len(logs[0]) == 12 + 3


# --- processes ----------------------------------------------------------------------------------------------

def test_a_single_process_needs_no_process_group():
    assert init_process() == ALONE and not torch.distributed.is_initialized()
    x = torch.ones(2)
    assert ALONE.sum(x) is x and (x == 1).all() and ALONE.gather(x) == [x]
    ALONE.broadcast_buffers(torch.nn.BatchNorm1d(2))


def test_die_is_one_line_and_exit_code_2(capfd):
    assert ends(capfd, lambda: die("--lam: must be in (0, 1]")) == "--lam: must be in (0, 1]"
    assert ends(capfd, lambda: ALONE.die("no", code=1), code=1) == "no"
    assert ends(capfd, lambda: ALONE.first(lambda: die("no data"))) == "no data"
    assert ALONE.first(lambda: 5) == 5


def test_a_rank_alone_is_no_torchrun(monkeypatch, capfd):
    """RANK=0 is what some platforms set; a rank among several needs the rest of torchrun's environment."""
    monkeypatch.setenv("RANK", "0")
    for world_size in (None, "1"):
        if world_size:
            monkeypatch.setenv("WORLD_SIZE", world_size)
        assert init_process().world_size == 1 and not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "8")
    said = ends(capfd, init_process)
    assert "has RANK, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start the script with torchrun" in said


def test_restarts_by_torchrun_need_a_store_of_their_own(monkeypatch, capfd):
    """torch's own store still holds the addresses of the dead processes: refused, not left to time out."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    said = ends(capfd, init_process)
    assert "--max-restarts" in said and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in said
    for name, value in (("USE_AGENT_STORE", "False"), ("MAX_RESTARTS", "0")):       # either is enough
        with monkeypatch.context() as m:
            m.setenv(f"TORCHELASTIC_{name}", value)
            assert init_process().world_size == 1


def test_a_process_takes_the_GPU_of_its_local_rank(monkeypatch, capfd):
    """Before nccl meets the others there, and with time for the first process to download the data."""
    done, cuda = [], torch.device("cuda", 3)
    for name, value in (("RANK", "11"), ("LOCAL_RANK", "3"), ("WORLD_SIZE", "16"),
                        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: done.append((a, k)))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 11)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 16)
    assert init_process() == Process(11, 16, cuda)
    (backend,), more = done[1]
    assert done[0] == more["device_id"] == cuda and backend == "nccl"
    assert more["timeout"] == torch.distributed.default_pg_timeout              # gloo's, three times nccl's
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert ends(capfd, init_process) == "--nproc_per_node: process 3 has no GPU, there are 3"


def test_a_notebook_or_an_old_encoding_is_no_reason_to_end(monkeypatch):
    class Kernel(io.TextIOBase):
        pass

    monkeypatch.setattr("sys.stdout", Kernel())
    init_process()
    for terminal, shown in ((False, "84.1 ± 2.9"), (True, "84.1 ? 2.9")):
        file = io.BytesIO()
        stream = io.TextIOWrapper(file, encoding="ascii")
        monkeypatch.setattr(stream, "isatty", lambda: terminal)
        monkeypatch.setattr("sys.stdout", stream)
        init_process()
        print("84.1 ± 2.9")
        assert file.getvalue().decode("utf-8").strip() == shown


def test_a_bar_is_for_the_first_process_on_a_terminal(monkeypatch, capsys):
    for rank, terminal in ((0, True), (0, False), (1, True)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        assert list(Process(rank, 2, CPU).bar([1, 2], "epoch 1")) == [1, 2]
        assert ("epoch 1" in capsys.readouterr().err) == (rank == 0 and terminal)


def test_a_seed_repeats_torch_and_python():
    def draw():
        seed_everything(3)
        return random.random(), torch.rand(2).tolist()

    assert draw() == draw()


def meet(folder):
    """What two processes do together.  The last thing is that a weight of the second one breaks: both end."""
    process = init_process()
    rank = process.rank
    assert (rank, process.world_size) == (int(os.environ["RANK"]), 2) == (torch.distributed.get_rank(), 2)
    assert torch.distributed.get_backend() == "gloo" and process.device == CPU
    x = torch.tensor(rank + 1.0)
    assert process.sum(x) is x and x.item() == 3.0                      # in place
    values = process.gather({"rank": rank, "x": [torch.full((2,), float(rank))]})
    assert [v["rank"] for v in values] == [0, 1]
    assert all(v["x"][0].device == CPU and v["x"][0].tolist() == 2 * [v["rank"]] for v in values)
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(rank + 5)
    process.broadcast_buffers(norm)
    assert norm.running_mean.tolist() == [5.0, 5.0]

    meter = Meter(process)
    meter.add(3 - 2 * rank, loss=torch.tensor(1.0 + 4 * rank))          # 3 samples of 1, one of 5
    assert meter.read()["loss"] == 2.0
    r = [torch.tensor([0.5, 0.1, math.inf]), torch.tensor([0.3, 0.2])]
    assert health("x", [r[rank]], 0.25, process) == health("x", r, 0.25, ALONE)
    assert health("x", [r[0]] if rank else [], 0.7, process)["x_solved"] == pytest.approx(2 / 3)
    assert health("x", [], 0.7, process) == {}

    os.chdir(folder)
    run = begin(None, process=process)                                  # named by the first process's time
    assert process.gather(run.args.out)[0] == run.args.out and run.folder.is_dir()
    out = run.args.out
    run.start("the start")
    states = process.gather(rng_state())
    assert not torch.equal(states[0]["torch"], states[1]["torch"])      # masks of its own for each process
    run.note_residuals(train=torch.tensor([0.1, 0.2]) + 0.2 * rank)
    save(run, 1)
    process.gather(None)                                                # the first one has written it
    kept = load_checkpoint(run.checkpoint)
    assert torch.equal(kept["rng"][rank]["torch"], states[rank]["torch"]) and len(kept["rng"]) == 2
    assert kept["residuals"]["train"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    run = begin(out, process=process, resume="auto")
    seed_everything(5)
    run.start()
    assert torch.equal(rng_state()["torch"], states[rank]["torch"])
    save(run, 1)                                                        # each residual is still there once
    process.gather(None)
    again = load_checkpoint(run.checkpoint)
    assert torch.equal(again["residuals"]["train"], kept["residuals"]["train"])

    assert run.due() == (False, False)
    if rank == 1:
        signal.raise_signal(signal.SIGTERM)
    assert run.due() == (True, True)                                    # of both, when one was asked
    run.args.save_every = 0.0 if rank == 0 else 60.0
    run.came.clear()
    assert run.due() == (True, False)
    Path(f"met{rank}").touch()
    write = run._write
    run._write = lambda **record: (time.sleep(0.2 * (rank == 0)), write(**record))
    try:
        save(run, 2, math.nan if rank == 1 else 1.0)
    finally:                # torchrun kills the first process when another has ended: it must have spoken
        assert "error: " in (folder / "log").read_text()


def test_two_processes_meet_and_end_together(tmp_path):
    """Under torchrun: the scripts' tests.  Gradients: test_usage.py."""
    codes = [p.wait() for p in pair(tmp_path / "log", meet, tmp_path)]
    text = (tmp_path / "log").read_text()
    assert (tmp_path / "met0").exists() and (tmp_path / "met1").exists(), text
    assert codes == [1, 1] and text.count("error: ") == text.count("a weight became infinite") == 1
    assert text.count("the start") == 1 and "Traceback" not in text
    (out,) = (tmp_path / "runs").iterdir()
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 1 and records(out)[-1]["event"] == "broken"


def read_cache(folder):
    """The first process is slower, and yet the others read what it has written.  Then it finds bad input."""
    process = init_process()

    def read():
        cache = folder / "cache"
        if not cache.exists():
            time.sleep(0.2)                     # the other one would come first
            cache.write_text(f"rank {process.rank}")
        return cache.read_text()

    (folder / f"{process.rank}").write_text(process.first(read))
    process.first(lambda: die("no data", code=1))


def test_the_first_process_prepares_what_the_others_find_and_speaks_for_all(tmp_path):
    """If its input is bad, all end with its one line, not with a traceback of one that waits for another."""
    assert [p.wait() for p in pair(tmp_path / "log", read_cache, tmp_path)] == [2, 2]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["rank 0", "rank 0"]
    assert (tmp_path / "log").read_text() == "error: no data\n"


def test_a_folder_that_not_all_machines_see_is_named(tmp_path, capfd):
    save(begin(tmp_path), 1)
    other = mock.Mock(wraps=ALONE, rank=0, world_size=1)
    other.first, other.die = ALONE.first, ALONE.die
    other.gather = lambda own: [own, False] if own is True else [own]
    for resume in (None, "auto"):
        assert ends(capfd, lambda: begin(tmp_path, process=other, resume=resume)) == (
            f"--out {tmp_path}: checkpoint.pt is there for 1 of 2 processes; all machines must see one and "
            "the same folder")


# --- what a run writes, and what it measures ----------------------------------------------------------------

def test_every_line_of_metrics_is_json_at_any_depth(tmp_path):
    """NaN and Infinity, which Python would write, are no JSON."""
    run = begin(tmp_path, clip=math.inf, list=[1.0, math.nan, (2, -math.inf)])
    run.start()
    run.report("radius", step=3, rho=math.nan, of="nan", mean=0.5)
    start, radius = records(tmp_path)
    assert start["args"]["clip"] is None and start["args"]["list"] == [1.0, None, [2, None]]
    assert (radius["rho"], radius["of"], radius["mean"]) == (None, "nan", 0.5)
    assert finite({"a": (1, math.inf), "b": None}) == {"a": [1, None], "b": None}


def test_a_record_is_printed_as_it_is_logged_by_the_first_process(tmp_path, capfd):
    solves = dict(residual_p10=1e-4, residual_p50=0.25, residual_p90=7.0, solved=0.3) | {"above_0.1": 0.6}
    record = dict(step=3, lr=0.1, test_loss=1.23456789, test_accuracy=50.0, **{
        f"{name}_{what}": value for name in ("train", "test") for what, value in solves.items()})
    words = ("step 3  lr 0.1  test loss 1.2346  test accuracy 50\n  relative residual (10, 50, 90 %) and "
             "share solved: train 1e-04 2e-01 7e+00, 30 %; test 1e-04 2e-01 7e+00, 30 %")
    assert spell(record) == words and spell(dict(step=1)) == "step 1"
    run = begin(tmp_path)
    run.report("epoch", **record)
    run.report("train", show=False, step=4)
    run.process = Process(1, 2, CPU)
    run.report("train", step=5)
    assert capfd.readouterr().out == words + "\n"
    first, second = records(tmp_path)
    assert first == {"event": "epoch", **record, "seconds": first["seconds"]} and second["step"] == 4


def test_a_run_describes_itself_with_or_without_git(tmp_path, monkeypatch):
    """The commit is that of these files, whatever folder the run is started from."""
    here = describe_run(ALONE)
    assert set(here) == {"command", "commit", "torch", "device", "processes"}
    monkeypatch.chdir(tmp_path)
    assert describe_run(ALONE)["commit"] == here["commit"]
    monkeypatch.setenv("PATH", "")
    about = describe_run(Process(0, 2, CPU))
    assert about["commit"] == "unknown" and about["processes"] == 2 and json.dumps(about)


def test_residual_statistics_are_nearest_ranks_of_all_solves(monkeypatch):
    """Ten values in any order.  torch.quantile would interpolate, and takes 16 million numbers at most."""
    monkeypatch.setattr(torch, "quantile", pytest.fail)
    monkeypatch.setattr(torch.Tensor, "quantile", pytest.fail)
    parts = [torch.tensor(r) for r in ([0.5, 0.1, math.inf, 0.4], [1e-4, 0.2], [0.3, 0.7, 0.6, 0.8])]
    expected = dict(x_residual_p10=0.1, x_residual_p50=0.4, x_residual_p90=0.8, x_solved=0.3)
    expected["x_above_0.1"] = 0.8
    assert health("x", parts, 0.2, ALONE) == pytest.approx(expected)
    assert health("x", parts, 0.0, ALONE)["x_solved"] == pytest.approx(0.1)
    assert health("x", [], 0.2, ALONE) == {}


@pytest.fixture
def clock(monkeypatch):
    """takes(seconds, result): time passes, and result comes back."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes(seconds, result=None):
        now[0] += seconds
        return result

    return takes


def test_meter_weighs_by_samples_and_starts_afresh(clock):
    meter = Meter(ALONE)
    meter.add(3, loss=torch.tensor(1.0))
    meter.add(1, loss=torch.tensor(5.0))
    clock(2)
    assert meter.read() == {"loss": 2.0, "ms_per_step": 1000.0, "samples_per_s": 2.0}
    meter.add(1, loss=torch.tensor(7.0))
    with meter.paused():            # a diagnostic
        clock(10)
    clock(1)
    assert meter.read() == {"loss": 7.0, "ms_per_step": 1000.0, "samples_per_s": 1.0}
    meter.add(1, loss=torch.tensor(math.nan))
    clock(1)
    assert math.isnan(meter.read()["loss"])


def test_meter_averages_a_value_over_the_samples_it_was_added_with():
    """A figure of every tenth step only, such as rho, is not divided by the samples of the other nine."""
    meter = Meter(ALONE)
    meter.add(2, loss=torch.tensor(1.0), rho=torch.tensor(3.0))
    meter.add(6, loss=torch.tensor(5.0))
    record = meter.read()
    assert record["loss"] == 4.0 and record["rho"] == 3.0


def test_meter_reads_means_and_throughput_of_all_processes(clock):
    """Two processes with 3 and 1 samples: the mean weighs by them, the throughput counts them all."""
    sums = []
    first = SimpleNamespace(device=CPU, sum=lambda x: sums.append(x.clone()) or x)
    second = SimpleNamespace(device=CPU, sum=lambda x: x + sums[0])
    meters = Meter(first), Meter(second)
    for meter, n, loss in zip(meters, (3, 1), (1.0, 5.0)):
        meter.add(n, loss=torch.tensor(loss))
    clock(2)
    meters[0].read()
    assert meters[1].read() == {"loss": 2.0, "ms_per_step": 2000.0, "samples_per_s": 2.0}


def test_meter_adds_up_in_float32_and_keeps_no_graph():
    """bfloat16 has 8 bits: a sum of it stops growing at 256 times its terms."""
    meter, value = Meter(ALONE), torch.tensor(2.0, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(600):
        meter.add(1, loss=value)
    assert not any(value.requires_grad for value in meter.sums.values())
    assert meter.read()["loss"] == 2.0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_sees_what_is_gone_already():
    """400 MB are allocated, freed and reported; 5 % for what else the process does."""
    def start():
        common.call_libc("malloc_trim", 0)          # another test may have called keep_freed_memory
        reset_peak_memory(CPU)

    start()
    before = peak_memory(CPU)
    torch.ones(100_000_000)
    assert 0.38 < peak_memory(CPU) - before < 0.42
    start()
    assert peak_memory(CPU) - before < 0.02


def test_a_step_is_timed_in_three_parts(clock):
    """1 s forward, 2 s backward, 4 s to finish; the whole step is their sum."""
    loss = SimpleNamespace(backward=lambda: clock(2))
    times = timed_step(lambda: clock(1, loss), lambda: clock(4), CPU)
    assert times[:3] == [1000, 2000, 7000] and len(times) == 4


def test_a_benchmark_takes_turns_and_prints_medians(clock, capsys, monkeypatch):
    """Without the first turn, which may compile; ratios to the first row; a row with a rarer forward pass.

    The solver calls f 4 times, 0.5 s each, and needs 9, 1, 2, 3 s more: an overhead of 2.  The first turn
    does not count, as on a CPU it imports what is needed later.
    """
    calls, memory = [], iter([1.0, *[0.0, 3.0] * 3, *[0.0, 2.0] * 99])      # GB: first, before, after
    monkeypatch.setattr(common, "peak_memory", lambda device: next(memory))
    more = iter([9, 1, 2, 3])
    turns = {"implicit": iter([100, 6, 2, 4]), "upg": iter([100, 1, 1, 1]), "rare": iter([100, 8, 8, 8])}

    def forward(name):
        calls.append(name)
        seconds = next(turns[name])
        return clock(seconds, SimpleNamespace(backward=lambda: clock(seconds)))

    def f(h):
        assert not torch.is_grad_enabled()
        return clock(0.5, h + 1)

    def solve(f, h):
        for _ in range(4):
            h = f(h)
        return clock(next(more), SimpleNamespace(h=h, n_evals=4))

    found = benchmark({name: partial(forward, name) for name in ("implicit", "upg")}, lambda: clock(1), ALONE,
                      about="a model", unit="images", n=18, solve=solve, f=f, h0=torch.zeros(()),
                      sometimes={"upg": (0.25, partial(forward, "rare"))}, repeats=3)
    assert calls == ["implicit", "upg", "rare"] * 4
    # implicit: 4 s forward, 4 s backward, 1 s more; upg: 3/4 of 1 s and 1/4 of 8 s
    assert found == {"implicit": [4000, 4000, 9000, 3.0], "upg": [2750, 2750, 6500, 3.0]}
    about, head, implicit, upg, solver = capsys.readouterr().out.strip().splitlines()
    assert about.startswith("a model; ") and "torch" in about
    assert "images/s" in head and "implicit / this" in head
    assert implicit.split() == ["implicit", "4000.0", "4000.0", "9000.0", "3.000", "2.0", "1.00x", "1.00x"]
    assert upg.split() == ["upg", "2750.0", "2750.0", "6500.0", "3.000", "2.8", "1.45x", "1.38x"]
    assert solver.startswith("F: 500.00 ms; solver overhead, solve / (calls of F x time of F): 2.000; memory")
