"""What loses somebody's work when it is wrong: checkpoints, random states, logs, process groups."""
import io
import json
import math
import os
import random
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
from processes import pair

import common
from common import (Meter, MetricsLog, Process, SaveTimer, all_reduce_sum, choose_out, describe_run, die,
                    first_then_others, gather_objects, health, init_process, is_ours, load_checkpoint, medians_in_turns,
                    note_differences, open_run, peak_memory, reset_peak_memory, rng_state, rng_states, save_checkpoint,
                    seed_everything, set_rng_state, set_rng_states, solver_overhead, spell_health, start_log,
                    timed_step, what_broke)


def state(step):
    return {"step": step, "model": {"w": torch.full((3,), float(step))}, "rng": rng_states(), "args": {"lr": 0.1}}


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
    """Half a file is written and the rest refused: `path` still holds the last checkpoint, or does not exist yet."""
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
    """fsync of the whole new file first, then the renames: after a power cut the name must not point at nothing."""
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
        assert ("weights" in message) == (len(previous) > 100)      # torch's advice would load what could run code


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
    torch.save({"step": 7}, tmp_path / "model.pt.previous")          # a good one beside it is used, whatever is wrong
    assert load_checkpoint(tmp_path / "model.pt")["step"] == 7
    message = capsys.readouterr().err
    assert "model.pt is damaged or not a checkpoint (it holds more than tensors and plain values); using" in message


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "a.pt", state(1))
    save_checkpoint(tmp_path / "a.pt", state(2))

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(SystemExit) as end:
        load_checkpoint(tmp_path / "a.pt")
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: --resume: cannot read {tmp_path / 'a.pt'} (Permission denied)\n"


def test_a_checkpoint_of_ours_holds_the_runs_flags():
    assert is_ours(state(1))
    assert not any(is_ours(other) for other in ({"state_dict": {}}, {"args": "a namespace of another code"}, [1], None))


@pytest.fixture
def sigterm():
    """Sends SIGTERM to this process; its handler is put back at the end."""
    handler = signal.getsignal(signal.SIGTERM)
    yield lambda: os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, handler)


def test_a_timer_says_when_to_save(monkeypatch, sigterm):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    timer = SaveTimer(minutes=2)
    for now, due in ((1000, False), (1119, False), (1120, True), (1121, False), (1239, False), (1241, True)):
        assert timer.poll() == (due, False)
    assert SaveTimer(minutes=0).poll() == (True, False)             # every step


def test_a_wish_of_one_process_is_the_answer_on_all(monkeypatch, sigterm):
    """The other process was sent SIGTERM, this one was not; both stop after the same step."""
    timer, other = SaveTimer(minutes=60), torch.tensor([0, 1], dtype=torch.int32)
    timer.group = "of both"

    def all_reduce(wishes, op, group):
        assert op == torch.distributed.ReduceOp.MAX and group == "of both"
        torch.maximum(wishes, other, out=wishes)

    monkeypatch.setattr(common.dist, "all_reduce", all_reduce)
    assert timer.poll() == (True, True)


def test_SIGTERM_is_a_wish_to_save_and_stop(sigterm):
    timer = SaveTimer(minutes=60)
    sigterm()
    assert timer.poll() == (True, True)


def test_SIGTERM_ends_the_process_only_while_all_is_saved(sigterm):
    """With code 0; where an exception leaves the block, work that is not saved may follow."""
    timer = SaveTimer(minutes=60)
    with pytest.raises(SystemExit) as end, timer.saved():
        sigterm()
    assert end.value.code == 0
    timer = SaveTimer(minutes=60)
    with pytest.raises(KeyError), timer.saved():
        raise KeyError
    sigterm()
    assert timer.poll() == (True, True)
    with pytest.raises(SystemExit) as end, timer.saved():           # it came between the last poll and this block
        raise AssertionError("an evaluation was begun")
    assert end.value.code == 0


def test_restarts_by_torchrun_need_a_store_of_their_own(monkeypatch, capsys):
    """torch's own store still holds the addresses of the dead processes: refused, not left to time out."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(SystemExit) as end:
        init_process()
    message = capsys.readouterr().err
    assert end.value.code == 2 and "--max-restarts" in message and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in message
    for name, value in (("USE_AGENT_STORE", "False"), ("MAX_RESTARTS", "0")):       # either is enough
        with monkeypatch.context() as m:
            m.setenv(f"TORCHELASTIC_{name}", value)
            assert init_process().world_size == 1


def test_every_random_generator_is_restored(tmp_path):
    save_checkpoint(tmp_path / "c.pt", {"rng": rng_states()})
    expected = random.random(), torch.rand(3)
    set_rng_state(load_checkpoint(tmp_path / "c.pt")["rng"][0])
    assert random.random() == expected[0] and (torch.rand(3) == expected[1]).all()
    assert set(rng_state()) == {"python", "torch"} | ({"cuda"} if torch.cuda.is_available() else set())


def test_metrics_are_appended_and_a_resumed_run_repeats_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3):
        log.write(step=step, loss=1 / step)
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')           # killed in the middle of a line
    MetricsLog(path, last_step=2).write(step=3, loss=0.5)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.5}]


def test_a_log_that_cannot_be_written_ends_the_run_with_one_line(tmp_path, capsys):
    log = MetricsLog(tmp_path / "gone" / "metrics.jsonl")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit) as end:
        log.write(step=1)
    message = capsys.readouterr().err
    assert end.value.code == 1 and message.startswith(f"error: --out: cannot write {tmp_path / 'gone'}")
    MetricsLog(tmp_path / "metrics.jsonl").write(step=1)
    (tmp_path / "metrics.jsonl.new").mkdir()
    with pytest.raises(SystemExit) as end:
        MetricsLog(tmp_path / "metrics.jsonl", last_step=1)
    (message,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and message.startswith(f"error: --out: cannot write {tmp_path / 'metrics.jsonl.new'}")


def test_an_event_may_be_behind_the_steps(tmp_path):
    """An evaluation that was logged but not saved will be logged again."""
    path = tmp_path / "metrics.jsonl"
    for event, step in (("train", 5), ("epoch", 5), ("train", 10), ("epoch", 10), ("train", 11)):
        MetricsLog(path).write(event=event, step=step)
    MetricsLog(path, last_step=10, last_step_of={"epoch": 5})
    assert [tuple(json.loads(line).values()) for line in path.read_text().splitlines()] == [
        ("train", 5), ("epoch", 5), ("train", 10)]


def test_a_new_log_appends_and_a_resumed_one_keeps_what_has_no_step(tmp_path):
    """A record of the start has none; a complete last line without its line break is a record as well."""
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, last_step=7).write(event="start")          # nothing to resume from is no error
    MetricsLog(path).write(step=5)
    with open(path, "a") as file:
        file.write('{"step": 6}')
    MetricsLog(path, last_step=6).write(step=7)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"event": "start"}, {"step": 5}, {"step": 6}, {"step": 7}]


def test_a_step_is_timed_in_three_parts(monkeypatch):
    """1 s forward, 2 s backward, 4 s to finish; the whole step is their sum."""
    now = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])

    def takes(seconds, result=None):
        now[0] += seconds
        return result

    loss = SimpleNamespace(backward=lambda: takes(2))
    times = timed_step(lambda: takes(1, loss), lambda: takes(4), torch.device("cpu"))
    assert times[:3] == [1000, 2000, 7000] and len(times) == 4


def test_medians_are_of_turns_of_which_the_first_does_not_count():
    calls, numbers = [], {"a": iter([100, 1, 5, 3]), "b": iter([200, 20, 40, 30])}

    def measure(name):
        calls.append(name)
        n = next(numbers[name])
        return [n, -n]

    found = medians_in_turns({name: partial(measure, name) for name in "ab"}, repeats=3)
    assert found == {"a": [3, -3], "b": [30, -30]} and calls == ["a", "b"] * 4


def test_a_solvers_overhead_is_its_time_over_that_of_its_calls_of_f(monkeypatch):
    """A solver of 4 calls of f, 0.5 s each, that needs 1 s more; f alone is timed on the solver's result."""
    now, states = [0.0], []
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])

    def f(h):
        assert not torch.is_grad_enabled()
        states.append(h)
        now[0] += 0.5
        return h + 1

    def solve(f, h):
        for _ in range(4):
            h = f(h)
        now[0] += 1
        return SimpleNamespace(h=h, n_evals=4)

    assert solver_overhead(solve, f, 0, torch.device("cpu")) == (1.5, 500)
    assert states == [0, 1, 2, 3, 4, 4, 4, 4]


def test_meter_weighs_by_samples_and_starts_afresh(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    meter = Meter(torch.device("cpu"))
    meter.add(3, loss=torch.tensor(1.0))
    meter.add(1, loss=torch.tensor(5.0))
    now[0] = 2.0
    assert meter.read() == {"loss": 2.0, "ms_per_step": 1000.0, "samples_per_s": 2.0}
    meter.add(1, loss=torch.tensor(7.0))
    now[0] = 3.0
    assert meter.read() == {"loss": 7.0, "ms_per_step": 1000.0, "samples_per_s": 1.0}
    meter.add(1, loss=torch.tensor(math.nan))
    now[0] = 4.0
    assert math.isnan(meter.read()["loss"])


def test_meter_averages_a_value_over_the_samples_it_was_added_with():
    """A figure measured at every tenth step only, such as rho, is not divided by the samples of the other nine."""
    meter = Meter(torch.device("cpu"))
    meter.add(2, loss=torch.tensor(1.0), rho=torch.tensor(3.0))
    meter.add(6, loss=torch.tensor(5.0))
    record = meter.read()
    assert record["loss"] == 4.0 and record["rho"] == 3.0


def test_meter_reads_means_and_throughput_of_all_processes(monkeypatch):
    """Two processes with 3 and 1 samples: the mean weighs by them, the throughput counts them all."""
    now = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    meters = [Meter(torch.device("cpu")) for _ in range(2)]
    sent = []
    for meter, n, loss in zip(meters, (3, 1), (1.0, 5.0)):
        meter.add(n, loss=torch.tensor(loss))
    now[0] = 2.0
    monkeypatch.setattr(common, "all_reduce_sum", lambda x: (sent.append(x.clone()), x)[1])
    meters[0].read()
    monkeypatch.setattr(common, "all_reduce_sum", lambda x: x + sent[0])
    assert meters[1].read() == {"loss": 2.0, "ms_per_step": 2000.0, "samples_per_s": 2.0}


def test_meter_adds_up_in_float32():
    """bfloat16 has 8 bits: a sum of it stops growing at 256 times its terms."""
    meter, value = Meter(torch.device("cpu")), torch.tensor(2.0, dtype=torch.bfloat16)
    for _ in range(2000):
        meter.add(1, loss=value)
    assert meter.read()["loss"] == 2.0


def test_meter_keeps_no_graph():
    w = torch.ones(1, requires_grad=True)
    meter = Meter(torch.device("cpu"))
    meter.add(1, loss=(2 * w).sum())
    assert not any(value.requires_grad for value in meter.sums.values())
    assert meter.read()["loss"] == 2.0


def test_residual_statistics_are_nearest_ranks_of_all_solves(monkeypatch):
    """Ten values in any order, of two processes; the limit of torch.quantile, 16 million, is none here."""
    parts = [torch.tensor([0.5, 0.1, math.inf, 0.4]), torch.tensor([1e-4, 0.2]), torch.tensor([0.3, 0.7, 0.6, 0.8])]
    expected = dict(x_residual_p10=0.1, x_residual_p50=0.4, x_residual_p90=0.8, x_solved=0.3)
    expected["x_above_0.1"] = 0.8
    assert health("x", parts, 0.2) == pytest.approx(expected)
    assert health("x", parts, 0.0)["x_solved"] == pytest.approx(0.1)
    assert health("x", [torch.zeros(2 ** 24 + 2)], 0.0)["x_residual_p90"] == 0
    assert health("x", [], 0.2) == {}
    monkeypatch.setattr(common, "gather_objects", lambda own: [own, parts[2]])
    record = health("x", parts[:2], 0.2)
    assert record == pytest.approx(expected)
    assert health("x", parts[:1], 0.2, alone=True)["x_solved"] == 0.25
    assert health("x", [], 0.7)["x_solved"] == 0.75         # a process without a solve takes part all the same
    assert spell_health({**record, **health("y", [], 0.9)}, "z", "y", "x") == (
        "relative residual (10, 50, 90 %) and share solved: y 3e-01 7e-01 8e-01, 100 %; x 1e-01 4e-01 8e-01, 30 %")


@pytest.mark.parametrize("loss, weight, broken", [
    (1.0, 1.0, ""), (math.nan, 1.0, "the loss became nan"), (-math.inf, 1.0, "the loss became -inf"),
    (1.0, math.inf, "a weight became infinite or not a number"),
    (1.0, math.nan, "a weight became infinite or not a number")])
def test_what_is_not_finite_is_named(loss, weight, broken):
    assert what_broke(loss, iter([torch.ones(2), torch.tensor([1.0, weight]), torch.ones(())])) == broken
    assert what_broke(loss) == (broken if "loss" in broken else "")


def test_a_run_is_opened_to_be_continued_or_not_at_all(tmp_path, monkeypatch, capsys):
    out, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint.pt"
    assert open_run(out, None) == open_run(str(out), "auto") == (checkpoint, None)
    assert open_run(out, "elsewhere/checkpoint.pt") == (checkpoint, "elsewhere/checkpoint.pt")
    assert not out.exists()
    out.mkdir()
    checkpoint.write_bytes(b"of a run")
    assert open_run(out, "auto") == (checkpoint, str(checkpoint))
    monkeypatch.chdir(out)
    for own in ("best.pt", "../run/checkpoint.pt.previous"):
        assert open_run(out, own) == (checkpoint, own)
    for other in (None, tmp_path / "checkpoint.pt"):
        with pytest.raises(SystemExit):
            open_run(out, other)
        assert f"--out {out} already holds a run" in capsys.readouterr().err
    monkeypatch.setattr(common, "gather_objects", lambda here: [here, False])
    for resume in (None, "auto"):
        with pytest.raises(SystemExit):
            open_run(out, resume)
        assert "checkpoint.pt is there for 1 of 2 processes" in capsys.readouterr().err


def test_generators_go_on_where_the_processes_are_as_many(capsys):
    states = []
    for seed in (1, 2):
        seed_everything(seed)
        states.append(rng_state())
    expected = torch.rand(3)
    for process, same in ((Process(1, 2, None), True), (Process(1, 3, None), False), (Process(0, 1, None), False)):
        seed_everything(3)
        set_rng_states(states, process)
        assert torch.equal(torch.rand(3), expected) == same
        assert ("note: the checkpoint is of 2 process(es)" in capsys.readouterr().out) == (process.world_size == 1)


def test_the_first_process_notes_and_prints_the_start_of_a_run(tmp_path, capsys):
    args = SimpleNamespace(out=str(tmp_path / "b"), pretrain_steps=5)
    for steps, found in ((5, True), (6, False)):
        start_log(args, Process(0, 1, torch.device("cpu")), 0, 7, "7 parameters", steps=steps)
        assert ("without a solver: lower --pretrain-steps 5" in capsys.readouterr().out) == found
    args = SimpleNamespace(out=str(tmp_path / "a"), lr=0.1)
    assert start_log(args, Process(1, 2, torch.device("cpu")), 0, 7, "7 parameters") is None
    assert not (tmp_path / "a").exists() and not capsys.readouterr().out
    for step, tail in ((0, "7 parameters"), (5, "7 parameters; continues after step 5")):
        log = start_log(args, Process(0, 2, torch.device("cpu")), step, 7, "7 parameters", {"epoch": 4})
        lines = capsys.readouterr().out.splitlines()
        assert "x 2, torch" in lines[1] and f"writing to {args.out}" in lines[1] and lines[2] == tail
        for event, at in (("train", 5), ("train", 6), ("epoch", 4), ("epoch", 5)):
            log.write(event=event, step=at)
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["event"], r["step"]) for r in records] == [
        ("start", 0), ("train", 5), ("epoch", 4), ("start", 5), ("train", 5), ("train", 6), ("epoch", 4), ("epoch", 5)]
    assert records[0]["parameters"] == 7 and records[0]["processes"] == 2 and records[0]["args"] == vars(args)


def test_what_is_not_finite_is_null_in_the_log(tmp_path):
    """NaN and Infinity, which Python would write, are no JSON."""
    MetricsLog(tmp_path / "metrics.jsonl").write(a=math.nan, b=-math.inf, c=0.5, d="nan", e=[1])
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"a": None, "b": None, "c": 0.5, "d": "nan", "e": [1]}


def test_flags_of_another_value_in_training_are_noted_by_the_first_process(monkeypatch, capsys):
    saved, args = {"max_iter": 22, "tol": 0.0, "lr": 1.0}, SimpleNamespace(max_iter=5, tol=0.0, lr=2.0, amp=True)
    note_differences(saved, args, "max_iter tol amp")
    assert capsys.readouterr().err.splitlines() == ["note: trained with --max-iter 22, evaluated with 5",
                                                    "note: trained with --amp None, evaluated with True"]
    monkeypatch.setattr(common.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(common.dist, "get_rank", lambda: 1)
    note_differences(saved, args, "max_iter tol amp")
    assert not capsys.readouterr().err


def test_a_run_is_continued_in_its_own_folder():
    for out, resume, expected in (("a", "b/checkpoint.pt", "a"), (None, "b/checkpoint.pt", "b"), ("a", "auto", "a")):
        args = SimpleNamespace(out=out, resume=resume)
        choose_out(args, "x")
        assert args.out == expected


def test_a_log_makes_its_folder_or_names_it(tmp_path, capsys):
    MetricsLog(tmp_path / "a" / "b" / "metrics.jsonl").write(step=1)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit):
        MetricsLog(tmp_path / "file" / "metrics.jsonl")
    assert f"--out {tmp_path / 'file'}: cannot make this folder" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_sees_what_is_gone_already():
    """400 MB are allocated, freed and reported; 5 % for what else the process does."""
    device = torch.device("cpu")
    reset_peak_memory(device)
    before = peak_memory(device)
    torch.ones(100_000_000)
    assert 0.38 < peak_memory(device) - before < 0.42
    reset_peak_memory(device)
    assert peak_memory(device) - before < 0.02


def test_a_single_process_needs_no_process_group(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    process = init_process()
    assert (process.rank, process.world_size) == (0, 1) and not torch.distributed.is_initialized()


def test_a_folder_has_one_owner_until_that_is_killed(tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "checkpoint.pt.123.new").touch()                 # of a run that was killed while it saved
    code = f"import common, time; common.own_folder({str(out)!r}); print('mine', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=Path(common.__file__).parent, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"mine\n" and not (out / "checkpoint.pt.123.new").exists()
    with pytest.raises(SystemExit) as end:
        common.own_folder(out)
    assert end.value.code == 2 and "another run is writing there" in capsys.readouterr().err
    other.kill()
    other.wait()
    common.own_folder(out)
    common.own_folder(out)                                  # a resumed run in one process, as in a notebook
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        common.own_folder(tmp_path / "file" / "run")
    assert "cannot make this folder" in capsys.readouterr().err


def test_a_second_writer_mixes_no_bytes(tmp_path, monkeypatch):
    """It saves while the first is in the middle of doing so; each has a file of its own until it is complete."""
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


def test_a_warm_up_as_long_as_the_run_is_named(tmp_path, capsys):
    for warmup, named in ((50, True), (49, False)):
        args = SimpleNamespace(out=str(tmp_path), warmup_steps=warmup)
        common.start_log(args, Process(0, 1, torch.device("cpu")), 0, 1, "a run", steps=50)
        assert (f"lower --warmup-steps {warmup}" in capsys.readouterr().out) == named


def test_the_checkpoint_before_counts_if_the_last_one_is_gone(tmp_path, capsys):
    previous = tmp_path / "checkpoint.pt.previous"
    previous.touch()
    assert open_run(tmp_path, "auto") == (tmp_path / "checkpoint.pt", str(previous))
    assert "is gone; continues from checkpoint.pt.previous" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        open_run(tmp_path, None)
    assert "already holds a run" in capsys.readouterr().err


def test_a_rank_alone_is_no_torchrun(monkeypatch, capsys):
    """RANK=0 is what some platforms set; a rank among several without the rest of torchrun's environment is named."""
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    for world_size in (None, "1"):
        if world_size:
            monkeypatch.setenv("WORLD_SIZE", world_size)
        assert init_process().world_size == 1 and not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(SystemExit):
        init_process()
    said = capsys.readouterr().err
    assert "has RANK, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start the script with torchrun" in said


def test_every_line_of_metrics_is_json_at_any_depth(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(event="start", args={"clip": math.inf, "list": [1.0, math.nan, (2, -math.inf)]}, loss=math.nan, step=3)
    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert record == {"event": "start", "args": {"clip": None, "list": [1.0, None, [2, None]]}, "loss": None, "step": 3}


def test_a_notebook_or_an_old_encoding_is_no_reason_to_end(monkeypatch):
    class Kernel(io.TextIOBase):
        pass

    monkeypatch.setattr("sys.stdout", Kernel())
    common.line_by_line()
    for terminal, shown in ((False, "84.1 ± 2.9"), (True, "84.1 ? 2.9")):
        file = io.BytesIO()
        stream = io.TextIOWrapper(file, encoding="ascii")
        monkeypatch.setattr(stream, "isatty", lambda: terminal)
        monkeypatch.setattr("sys.stdout", stream)
        common.line_by_line()
        print("84.1 ± 2.9")
        assert file.getvalue().decode("utf-8").strip() == shown


def test_a_single_process_sums_over_itself_in_place():
    x = torch.ones(2)
    assert all_reduce_sum(x) is x and (x == 1).all()


def test_a_seed_repeats_torch_and_python():
    def draw():
        seed_everything(3)
        return random.random(), torch.rand(2).tolist()

    assert draw() == draw()


def test_die_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        die("--lam: must be in (0, 1]")
    assert end.value.code == 2 and capsys.readouterr().err == "error: --lam: must be in (0, 1]\n"


def test_a_run_describes_itself_with_or_without_git(tmp_path, monkeypatch):
    """The commit is that of these files, whatever folder the run is started from."""
    here = describe_run(torch.device("cpu"), 2)
    assert set(here) == {"command", "commit", "torch", "device", "processes"}
    monkeypatch.chdir(tmp_path)
    assert describe_run(torch.device("cpu"), 2)["commit"] == here["commit"]
    monkeypatch.setenv("PATH", "")
    about = describe_run(torch.device("cpu"), 2)
    assert about["commit"] == "unknown" and about["processes"] == 2 and json.dumps(about)


def meet():
    process = init_process()
    assert (process.rank, process.world_size) == (int(os.environ["RANK"]), 2) == (torch.distributed.get_rank(), 2)
    assert torch.distributed.get_backend() == "gloo" and process.device == torch.device("cpu")
    seed_everything(process.rank)
    states = rng_states()
    assert len(states) == 2 and not (states[0]["torch"] == states[1]["torch"]).all()
    assert (states[process.rank]["torch"] == torch.get_rng_state()).all()           # by rank
    x = torch.tensor(float(process.rank + 1))
    assert all_reduce_sum(x) is x and x.item() == 3.0                               # in place
    torch.distributed.destroy_process_group()


def test_two_processes_find_each_other(tmp_path):
    """Process group, random states by rank, sums.  Gradients: test_usage.py; under torchrun: the scripts' tests."""
    for process in pair(tmp_path / "log", meet):
        process.finish()


def test_a_process_takes_the_GPU_of_its_local_rank(monkeypatch, capsys):
    """Before nccl meets the others there, and with time for the first process to download the data."""
    done, cuda = [], torch.device("cuda", 3)
    for name, value in (("RANK", "11"), ("LOCAL_RANK", "3"), ("TORCHELASTIC_MAX_RESTARTS", "0"), ("WORLD_SIZE", "16"),
                        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: done.append((a, k)))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 11)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 16)
    assert init_process() == Process(11, 16, cuda)
    (backend,), options = done[1]
    assert done[0] == options["device_id"] == cuda and backend == "nccl"
    assert options["timeout"] == torch.distributed.default_pg_timeout           # gloo's, three times nccl's
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(SystemExit):
        init_process()
    assert "--nproc_per_node: process 3 has no GPU, this machine has 3" in capsys.readouterr().err


def gather_from_gpus():
    """Each process's tensors say, as they are written, that they are on its GPU; there is none to put them on."""
    process = init_process()
    with mock.patch("torch.serialization.location_tag", lambda storage: f"cuda:{process.rank}"):
        values = gather_objects({"rank": process.rank, "state": [torch.full((2,), float(process.rank))]})
    assert [v["rank"] for v in values] == [0, 1]
    assert all(t.device.type == "cpu" and t.tolist() == 2 * [float(rank)]
               for rank, (t,) in enumerate(v["state"] for v in values))
    torch.distributed.destroy_process_group()


def test_what_is_gathered_from_other_gpus_comes_back_on_the_cpu(tmp_path):
    """all_gather_object alone puts each tensor on the GPU of its sender: eight processes with memory on eight GPUs."""
    for process in pair(tmp_path / "log", gather_from_gpus):
        process.finish()


def read_cache(folder, good):
    process = init_process()

    def read():
        cache = folder / "cache"
        if cache.exists():
            return cache.read_text()
        if not good:
            die("no data", code=1)
        time.sleep(0.5)                     # the other one would come first
        cache.write_text(f"rank {process.rank}")
        return cache.read_text()

    (folder / f"{process.rank}").write_text(first_then_others(read, process))
    time.sleep(0.2)         # torch 2.6 waits forever for a gloo thread that still holds the last sum's tensor
    torch.distributed.destroy_process_group()


def test_the_first_process_prepares_what_the_others_then_find(tmp_path):
    for p in pair(tmp_path / "log", read_cache, tmp_path, True):
        p.finish()
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["rank 0", "rank 0"]


def test_if_the_first_process_finds_bad_input_all_end_with_its_one_line(tmp_path):
    """Not with the traceback of a process that waits for one that is gone."""
    assert [p.wait() for p in pair(tmp_path / "log", read_cache, tmp_path, False)] == [2, 2]
    assert (tmp_path / "log").read_text() == "error: no data\n"


@pytest.mark.parametrize("script, flags, train", [
    ("mdeq_cifar", "--data toy --train-size 10 --test-size 10", "train"), ("mdeq_imagenet", "--data toy", "train"),
    ("deq_wikitext", "--data toy", "train"), ("ignn_graphs", "--dataset PPI-synthetic --graph-scale 0.01",
                                              "train_nodes")])
def test_all_processes_write_to_the_default_folder_of_the_first(monkeypatch, sigterm, script, flags, train):
    """Its name holds the time and the number of a process."""
    script, found = pytest.importorskip(script), []
    monkeypatch.setattr(common, "gather_objects", lambda own: [f"first/{own}", own])
    monkeypatch.setattr(script, train, lambda args, *_, **__: found.append(args.out))
    script.main(script.parse_args(flags.split()))
    assert len(found) == 1 and found[0].startswith("first/runs/")


def test_a_checkpoint_from_before_a_flag_is_not_continued_with_its_default(capsys):
    """It was trained by something else: implicit differentiation by Broyden, before there was --backward-solver."""
    args = SimpleNamespace(lr=0.1, backward_solver="gmres")
    common.check_same_run("old.pt", {"lr": 0.1}, args, free={"backward_solver"})
    with pytest.raises(SystemExit):
        common.check_same_run("old.pt", {"lr": 0.1}, args, free=())
    assert "old.pt is of another version of this script, which had no --backward-solver" in capsys.readouterr().err
