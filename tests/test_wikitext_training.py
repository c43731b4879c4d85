"""deq_wikitext.py as a program: training, wrong input, kill and resume, two processes, evaluation, text, benchmark.

Narrow models on generated text; SIGKILL and SIGTERM are sent to real processes, also to one of two under torchrun.
"""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import deq_wikitext
import mdeq_cifar
from common import Process
from deq_wikitext import DEQTransformer as Model
from deq_wikitext import jr_weight, load_text, main, parse_args
from test_wikitext import official_state_dict

ROOT = Path(deq_wikitext.__file__).parent
SCRIPT = ROOT / "deq_wikitext.py"
CPU = Process(0, 1, torch.device("cpu"))
SHAPE = "--d-model 16 --n-head 2 --d-inner 24 --cutoffs 10 20".split()
RUN = [*SHAPE, *"--batch-size 4 --segment 6 --mem-len 8 --steps 6 --warmup-steps 2 --pretrain-steps 0 --max-iter 4 "
       "--backward-max-iter 4 --lr 0.01 --eval-every 3 --eval-streams 3 --log-every 1".split()]
DROPOUT = "--dropout 0.2 --dropatt 0.1".split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(autouse=True)
def a_process_of_its_own(monkeypatch):
    """The script takes over SIGTERM, reads torchrun's variables and sets the precision of products."""
    handler, precision = signal.getsignal(signal.SIGTERM), torch.get_float32_matmul_precision()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    signal.signal(signal.SIGTERM, handler)
    torch.set_float32_matmul_precision(precision)


def make_text(root, train=130, types=40):
    """Lines of words that follow each other with a pattern, so that there is something to learn."""
    rng, root = random.Random(0), Path(root)
    root.mkdir(parents=True, exist_ok=True)
    words = [f"w{i}" for i in range(types)]
    for split, lines in (("train", train), ("valid", 12), ("test", 15)):
        text = [" ".join(words) + " \n"] if split == "train" else []            # each type at least once
        for _ in range(lines):
            at = rng.randrange(types)
            text.append(" ".join(words[(at + 3 * i) % types] for i in range(rng.randrange(0, 9))) + " \n")
        (root / f"{split}.txt").write_text("".join(text))
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The text; no test may change it."""
    root = make_text(tmp_path_factory.mktemp("text") / "small")
    return root


def run(*flags):
    main(parse_args([str(flag) for flag in flags]))


def metrics(out, event):
    records = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == event]


def refused(capsys, *flags, code=2):
    """Runs the script, which must end with this exit code; its last line on stderr, the message."""
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    assert stop.value.code == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert "error: " in lines[-1] and not any("Traceback" in line for line in lines)
    return lines[-1]


def checkpoint(out, name="checkpoint.pt"):
    return torch.load(Path(out) / name, weights_only=True)


def assert_same_end(a, b):
    """Weights, Adam's state, memory, schedule, generators and results equal bit for bit."""
    assert all(a[key] == b[key] for key in ("step", "evaluated", "score", "scheduler", "lam"))
    assert a["model"].keys() == b["model"].keys() and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    moments = [[v for s in c["optimizer"]["state"].values() for v in (s["exp_avg"], s["exp_avg_sq"])] for c in (a, b)]
    assert len(moments[0]) > 40 and all(torch.equal(x, y) for x, y in zip(*moments, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(a["memory"], b["memory"], strict=True))
    assert len(a["rng"]) == len(b["rng"])
    assert all(torch.equal(x["torch"], y["torch"]) for x, y in zip(a["rng"], b["rng"]))


# --- training --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", ["", "--grad npg", "--grad implicit", "--grad bptt --solver fixed-point",
                                   "--norm pre --jr 0.1 --jitter 2", "--grad npg --lam auto", "--solver anderson",
                                   "--max-iter 0 --k 3 --lam 1", "--pretrain-steps 4", "--amp", "--recompute",
                                   "--model deq-lm --max-iter 0 --k 4 --lr 0.003"])
def test_every_way_of_training_learns(flags, tmp_path, small):
    run(*RUN, "--data", small, "--out", tmp_path, "--steps", 54, "--eval-every", 54, *DROPOUT, *flags.split())
    losses = [record["loss"] for record in metrics(tmp_path, "train")]
    first, second = sum(losses[:27]) / 27, sum(losses[27:]) / 27            # the same text twice
    assert second < first - 0.05
    (valid,), (test,) = metrics(tmp_path, "eval"), metrics(tmp_path, "test")
    assert 1 < test["test_perplexity"] < 100 and valid["best_step"] == test["of_step"] == 54


@pytest.mark.parametrize("name", deq_wikitext.SOLVERS)
def test_the_backward_solver_of_the_command_solves_for_the_gradient_alone(name, tmp_path, monkeypatch, small):
    """Six steps, six backward solves of the whole budget: --backward-max-iter and one more call, also with GMRES."""
    found, real = [], deq_wikitext.SOLVERS[name]
    monkeypatch.setitem(deq_wikitext.SOLVERS, name, lambda *a, **options: (
        found.append(real(*a, **options)), found[-1])[1])
    forward = "fixed-point" if name == "broyden" else "broyden"
    run(*RUN, "--data", small, "--out", tmp_path, "--solver", forward, "--eval-solver", forward,
        *"--grad implicit --tol 0 --backward-max-iter 3 --backward-solver".split(), name)
    assert [result.n_evals for result in found] == [4] * 6


def test_the_rate_rises_and_falls_as_the_recipe_says(tmp_path, monkeypatch, small):
    """Step s: s / warm-up, then (1 + cos(pi s / steps)) / 2 over all steps, warm-up included; the first is not full."""
    used, real = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *args: (
        used.append(self.param_groups[0]["lr"]), real(self, *args))[1])
    run(*RUN, "--data", small, "--out", tmp_path, "--warmup-steps", 3)
    logged = [record["lr"] for record in metrics(tmp_path, "train")]
    expected = [0.01 * (s / 3 if s < 3 else (1 + math.cos(math.pi * s / 6)) / 2) for s in range(1, 7)]
    assert used == logged == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_the_weight_of_jr_grows_as_the_official_scripts_do():
    """2.0 until step 60,000, then 0.1 more each 30,000, ending at 2.8; constant with an increment of 0."""
    args = parse_args("--jr 2.0 --jr-increment 30000".split())
    steps = (0, 31_999, 32_000, 59_999, 60_000, 89_999, 90_000, 270_000, 299_999)
    assert [round(jr_weight(args, s), 6) for s in steps] == [2.0, 2.0, 2.0, 2.0, 2.1, 2.1, 2.2, 2.8, 2.8]
    args = parse_args("--jr 1.9 --jr-increment 35000".split())
    assert [round(jr_weight(args, s), 6) for s in (34_999, 35_000, 299_999)] == [1.9, 2.0, 2.7]
    assert jr_weight(parse_args("--jr 0.1".split()), 299_999) == 0.1


def test_jr_may_grow_from_zero(small, tmp_path, monkeypatch):
    """Weight 0 for two steps, without the cost of the term, then 0.1 and 0.2; --clip 0 does not clip."""
    calls = calls_of_forward(monkeypatch)
    run(*RUN, "--data", small, "--out", tmp_path, "--jr", 0, "--jr-increment", 2, "--jr-freq", 1, "--clip", 0)
    assert [call["regularize"] for call in calls] == [False] * 2 + [True] * 4
    moments = checkpoint(tmp_path)["optimizer"]["state"].values()
    assert all(record["grad_norm"] > 0.3 for record in metrics(tmp_path, "train"))
    assert max(state["exp_avg"].abs().max() for state in moments) > 0


def calls_of_forward(monkeypatch):
    calls, real = [], deq_wikitext.DEQTransformer.forward

    def forward(self, ids, targets=None, memory=None, **settings):
        if targets is not None and self.training:
            M = 0 if memory is None else memory.h.shape[1]
            calls.append(dict(settings, memory=M, T=ids.shape[1], first=ids[:, 0]))
        return real(self, ids, targets, memory, **settings)

    monkeypatch.setattr(deq_wikitext.DEQTransformer, "forward", forward)
    return calls


def test_segments_follow_each_other_and_an_epoch_begins_without_memory(tmp_path, monkeypatch, small):
    calls, text = calls_of_forward(monkeypatch), load_text(parse_args(["--data", str(small)]), CPU)
    length = len(text.train) // 4
    segments = math.ceil((length - 1) / 6)
    run(*RUN, "--data", small, "--out", tmp_path, "--steps", segments + 2, "--eval-every", 1000)
    assert [c["memory"] for c in calls] == [0, 6, *[8] * (segments - 2), 0, 6]
    assert sum(c["T"] for c in calls[:segments]) == length - 1 and calls[segments - 1]["T"] == (length - 1) % 6 > 0
    columns = text.train[:4 * length].view(4, length)
    for s, call in enumerate(calls):
        assert torch.equal(call["first"], columns[:, s % segments * 6])


def test_jitter_and_regularisation_are_drawn_for_each_step_and_again_alike(tmp_path, monkeypatch, small):
    calls = calls_of_forward(monkeypatch)
    flags = [*RUN, "--data", small, *"--steps 40 --eval-every 40 --pretrain-steps 5 --jitter 2 --jr 0.1".split()]
    for out in ("a", "b"):
        run(*flags, "--out", tmp_path / out)
    first, second = calls[:40], calls[40:]
    budgets = [[(c["unroll"], not c["unroll"] and c["solve"].keywords["max_iter"], c["regularize"]) for c in part]
               for part in (first, second)]
    assert budgets[0] == budgets[1]
    assert [c["unroll"] for c in first] == [2] * 5 + [0] * 35 and not any(c["regularize"] for c in first[:5])
    assert {budget for _, budget, _ in budgets[0][5:]} == {2, 3, 4} and 6 <= sum(c["regularize"] for c in first) <= 25


def test_the_largest_gradient_norm_is_that_of_clip(tmp_path, monkeypatch, small):
    norms = []
    real = torch.optim.Adam.step

    def step(self, *args):
        norms.append(torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm().item())
        return real(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    run(*RUN, "--data", small, "--out", tmp_path, "--clip", 0.05)
    logged = [record["grad_norm"] for record in metrics(tmp_path, "train")]
    assert min(logged) > 0.05 and norms == pytest.approx([0.05] * 6, rel=1e-3)


def test_adaptive_damping_is_measured_logged_and_kept(tmp_path, monkeypatch, small):
    """lam = 1 / mean rho(J) where that exceeds 1, every 100 steps, and in the checkpoint for the steps between."""
    asked, rho = [], [[torch.tensor([1.0, 3.0])], [torch.tensor([4.0, 2.0])]]
    monkeypatch.setattr(deq_wikitext, "radius", lambda model, ids, memory, **_: (
        asked.append((ids, memory.h)), rho[len(asked) - 1])[1])
    flags = [*RUN, "--data", small, "--out", tmp_path, *"--grad npg --lam auto --pretrain-steps 2".split()]
    run(*flags, "--accumulate", 2)
    assert [record["lam"] for record in metrics(tmp_path, "train")] == [1.0] * 2 + [0.4] * 4
    text = load_text(parse_args(["--data", str(small)]), CPU).train
    segment = text[:len(text) // 4 * 4].view(4, -1)[:, 12:18]           # of step 3, whole, with the memory before it
    assert len(asked) == 2 and torch.equal(torch.cat([ids for ids, _ in asked]), segment)
    assert all(h.shape == (2, 8, 16) for _, h in asked)
    assert checkpoint(tmp_path)["lam"] == 0.4
    monkeypatch.setattr(deq_wikitext, "radius", lambda *_, **__: [torch.tensor([math.nan])])
    with pytest.raises(SystemExit) as end:
        run(*flags[:-4], "--lam", "auto", "--out", tmp_path / "other")
    assert end.value.code == 1


def assert_same_training(a, b):
    """Gradients (Adam's mean of them), memory and perplexities agree to rounding.

    Not all weights do: where the true gradient is zero, as for a key's bias, Adam steps by the sign of rounding.  These
    steps are as long as any, and meet the keys of the memory: the runs have a small --lr.
    """
    one, two = checkpoint(a), checkpoint(b)
    for x, y in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values(), strict=True):
        largest = max(0.01, x["exp_avg"].abs().max().item())
        assert torch.allclose(x["exp_avg"], y["exp_avg"], rtol=0, atol=1e-3 * largest)
    for x, y in zip(one["memory"], two["memory"]):
        assert x.shape == y.shape and torch.allclose(x, y, rtol=0, atol=2e-3)
    for event, key in (("eval", "valid_perplexity"), ("test", "test_perplexity")):
        found = [[r[key] for r in metrics(out, event)] for out in (a, b)]
        assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_micro_batches_are_the_same_step(tmp_path, small):
    """Each has its streams' memory.  A checkpoint of one continues as the other."""
    flags = [*RUN, "--data", small, "--lr", 1e-5, "--dropout", 0]
    for n in (1, 2):
        run(*flags, "--out", tmp_path / str(n), "--accumulate", n)
    assert_same_training(tmp_path / "1", tmp_path / "2")
    for key in ("loss", "grad_norm"):                   # of which clipping and Adam forget the size
        found = [[r[key] for r in metrics(tmp_path / n, "train")] for n in "12"]
        assert found[0] == pytest.approx(found[1], rel=1e-3)
    run(*flags, "--out", tmp_path / "2", "--accumulate", 4, "--resume", "auto")


def test_diagnostics_and_evaluations_leave_no_trace(tmp_path, small):
    """Radii every step and evaluations at other steps: the same weights and memory bit for bit, dropout included."""
    flags = [*RUN, *DROPOUT, "--data", small]
    run(*flags, "--out", tmp_path / "a")
    run(*flags, "--out", tmp_path / "b", "--radius-every", 1)
    assert_same_end(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"))
    radii = metrics(tmp_path / "b", "radius")
    assert len(radii) == 6 and all(r["rho_J"] > 0 and r["rho_J_lam"] > 0 for r in radii)
    run(*flags, "--out", tmp_path / "c", "--eval-every", 6)
    a, c = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "c")
    assert all(torch.equal(a["model"][k], c["model"][k]) for k in a["model"])
    assert all(torch.equal(x, y) for x, y in zip(a["memory"], c["memory"]))


def test_test_perplexity_is_of_the_weights_that_were_best_on_valid(tmp_path, monkeypatch, small):
    """valid is worse at the last evaluation: best.pt keeps the weights of the one before, and test takes those."""
    perplexities, real, weights = iter([5.0, 9.0, 7.0]), deq_wikitext.evaluate, {}

    def evaluate(model, name, *rest):
        weights[name] = model.state_dict()["cluster_bias"].clone()
        record = real(model, name, *rest)
        if name == "valid":
            record["valid_perplexity"] = next(perplexities)
            weights.setdefault("first", weights["valid"])
        return record

    monkeypatch.setattr(deq_wikitext, "evaluate", evaluate)
    run(*RUN, "--data", small, "--out", tmp_path, "--steps", 9)
    (test,), best = metrics(tmp_path, "test"), checkpoint(tmp_path, "best.pt")
    assert test["of_step"] == best["step"] == 3 and best["valid_perplexity"] == 5.0
    assert torch.equal(weights["test"], weights["first"]) and not torch.equal(weights["test"], weights["valid"])
    assert [r["best_perplexity"] for r in metrics(tmp_path, "eval")] == [5.0, 5.0, 5.0]


def test_a_best_of_another_validation_text_does_not_count(tmp_path, capsys):
    """A finished run that is continued with other valid text has no best yet: the last weights are tested."""
    flags, text = [*RUN, "--out", tmp_path / "run", "--data", tmp_path / "text"], make_text(tmp_path / "text")
    run(*flags)
    (text / "valid.txt").write_text("w1 w2 \n" * 30)
    capsys.readouterr()
    run(*flags, "--resume", "auto")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("note: the validation text is another one") for line in lines)
    assert metrics(tmp_path / "run", "test")[-1]["of_step"] == 6 and lines[-1].endswith("checkpoint.pt")


def test_a_loss_that_is_not_a_number_ends_the_run_at_the_last_good_checkpoint(tmp_path, capsys, monkeypatch, small):
    calls, real = [], deq_wikitext.DEQTransformer.nll

    def nll(self, h, targets):
        calls.append(self.training)
        return real(self, h, targets) * (math.nan if sum(calls) == 5 and self.training else 1)

    monkeypatch.setattr(deq_wikitext.DEQTransformer, "nll", nll)
    message = refused(capsys, *RUN, "--data", small, "--out", tmp_path, code=1)
    assert "the loss became nan by step 5" in message and "checkpoint.pt" in message
    assert checkpoint(tmp_path)["step"] == 3


# --- wrong input -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, named", [
    ("--n-head 3", "--n-head 3"), ("--d-model 15 --n-head 1", "--d-model 15"),
    ("--cutoffs 20 10", "--cutoffs"), ("--cutoffs 0 10", "--cutoffs"), ("--cutoffs 10 41", "--cutoffs 10 41"),
    ("--d-embed 8", "(or --d-model) 8"), ("--mem-len 995", "--local-size"), ("--eval-mem-len 8 995", "--local-size"),
    ("--local-size -1", "--local-size"), ("--lam 0", "--lam"), ("--lam nan", "--lam"), ("--lam best", "--lam"),
    ("--grad implicit --lam auto", "--lam auto"), ("--k 0", "--k"), ("--tol -1", "--tol"), ("--dropout 1", "--dropout"),
    ("--dropatt nan", "--dropatt"), ("--max-iter -1", "--max-iter"), ("--max-iter 0 --grad npg", "--max-iter 0"),
    ("--max-iter 0 --jr 1", "--max-iter 0"), ("--max-iter 0 --jr-increment 2", "--max-iter 0"),
    ("--jitter 4", "--jitter 4"), ("--jr nan", "--jr"),
    ("--jr-freq 0", "--jr-freq"), ("--steps 0", "--steps"), ("--lr inf", "--lr"), ("--clip -1", "--clip"),
    ("--accumulate 3", "--batch-size 4"), ("--seed 9223372036854775808", "--seed"), ("--jr-increment -1", "--jr-incr"),
    ("--grad bptt", "--solver fixed-point"), ("--backward-solver newton", "--backward-solver"),
    ("--eval", "--resume"), ("--generate x", "--resume"),
    ("--eval-max-iter 0", "--eval-max-iter"), ("--eval --resume auto --out x", "--resume"), ("--resume auto", "--out"),
    ("--benchmark --eval --resume x", "--benchmark"), (f"--benchmark --resume {__file__}", "--benchmark"),
    ("--init x --eval --resume y", "--init"), ("--save-every nan", "--save-every"),
    ("--batch-size 400", "--batch-size 400"), ("--eval-streams 90", "--eval-streams 90"),
    ("--temperature -1", "--temperature"), ("--temperature 1e-9", "--temperature"),
    ("--data nowhere --resume nowhere.pt --out unused", "--resume: there is no file nowhere.pt"),
    ("--data nowhere --init nowhere.pt --out unused", "--init: there is no file nowhere.pt"),
    ("--resume nowhere.pt --eval", "nowhere.pt"),
    ("--data nowhere", "--data nowhere: needs the files wiki.train.tokens")])
def test_a_wrong_flag_is_named(flags, named, capsys, tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    assert named in refused(capsys, *RUN, "--data", small, *flags.split())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]              # nothing was written


def test_a_window_that_is_named_may_be_shorter_than_the_memory():
    assert parse_args("--mem-len 995 --local-size 150".split()).local_size == 150


@pytest.mark.parametrize("split, content, named", [
    ("valid", b"", "valid.txt: it is empty"), ("train", b"", "train.txt: it is empty"),
    ("test", b"w1 zebra \n", "'zebra'"),
    ("train", b"w1 w2 \n \xff\xfe broken \n", "not UTF-8"),
    ("train", "w1 w2 \n".encode("utf-16-le"), "NUL bytes"), ("valid", None, "wiki.valid.tokens")])
def test_broken_texts_are_named(split, content, named, capsys, tmp_path):
    root = make_text(tmp_path / "text")
    path = root / f"{split}.txt"
    path.unlink() if content is None else path.write_bytes(content)
    message = refused(capsys, *RUN, "--data", root, "--out", tmp_path / "out")
    assert "--data" in message and named in message and not (tmp_path / "out").exists()


def test_a_text_that_cannot_be_read_is_named(capsys, tmp_path, monkeypatch):
    def opened(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(deq_wikitext, "open", opened, raising=False)
    message = refused(capsys, *RUN, "--data", make_text(tmp_path / "text"), "--out", tmp_path / "out")
    assert message == f"error: --data: cannot read {tmp_path / 'text' / 'train.txt'} (Permission denied)"


def test_checkpoints_of_other_runs_are_refused(tmp_path, capsys, small):
    out = tmp_path / "run"
    flags = [*RUN, "--data", small, "--out", out]
    run(*flags)
    before = (out / "metrics.jsonl").read_text()
    assert "already holds a run" in refused(capsys, *flags)
    for more, named in (("--lam 0.4", "--lam 0.8 (here 0.4)"), ("--norm pre", "--norm post (here pre)"),
                        ("--steps 9", "--steps 6 (here 9)"), ("--segment 7", "--segment 6 (here 7)"),
                        ("--batch-size 8", "--batch-size 4 (here 8)"), ("--jr 1", "--jr 0.0 (here 1.0)"),
                        ("--d-inner 25", "--d-inner 24 (here 25)")):
        assert named in refused(capsys, *flags, "--resume", "auto", *more.split())
    for mode in (["--eval", "--resume"], ["--init"]):
        for more, named in (("--norm pre", "--norm post (here pre)"),
                            ("--model deq-lm --norm post", "--model deq (here deq-lm)")):
            target = [] if mode == ["--init"] else flags[-2:]
            assert named in refused(capsys, *flags[:-2], *target, *mode, out / "checkpoint.pt", *more.split())
    assert "weights alone" in refused(capsys, *flags[:-2], "--out", out, "--resume", out / "best.pt")
    longer = make_text(tmp_path / "longer")                 # the same types
    (longer / "train.txt").write_text(2 * (longer / "train.txt").read_text())
    assert "with train_text " in refused(capsys, *RUN, "--data", longer, "--out", out, "--resume", "auto")
    torch.save({"a": 1}, tmp_path / "a.pt")
    assert "no state dict" in refused(capsys, *flags[:-2], "--eval", "--resume", tmp_path / "a.pt")
    other = make_text(tmp_path / "other")
    (other / "train.txt").write_text((other / "train.txt").read_text() + "w39 w39 w39 w39 w39 " * 9 + "\n")
    for mode in (["--resume", "auto"], ["--eval", "--resume", out / "checkpoint.pt"]):
        message = refused(capsys, *RUN, "--data", other, "--out", out, *mode)
        assert "another vocabulary" in message or "with types " in message
    torch.save({"args": vars(mdeq_cifar.parse_args(["--data", "toy"])), "model": {}, "step": 3}, tmp_path / "cifar.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    for file, named in (("cifar.pt", "another script"), ("model.pt", "torch.save(x.state_dict(), 'converted.pt')")):
        for mode in (["--out", tmp_path / "new"], ["--eval"]):
            assert named in refused(capsys, *RUN, "--data", small, "--resume", tmp_path / file, *mode)
    torch.save({"args": {"data": str(tmp_path / "images"), "model": "tiny"}, "model": {}}, tmp_path / "cifar.pt")
    assert "another script" in refused(capsys, "--eval", "--resume", tmp_path / "cifar.pt")
    assert (out / "metrics.jsonl").read_text() == before and not (tmp_path / "new").exists()


# --- kill and resume -------------------------------------------------------------------------------------------------

LONG_RUN = [*RUN, *DROPOUT, *"--steps 60 --eval-every 20 --jr 0.1 --jitter 1 --pretrain-steps 5 --save-every 0".split()]


def start(out, *command, launcher=(), **environment):
    """The script as a process group of its own; what it prints goes to OUT.log."""
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen([sys.executable, *launcher, *map(str, (SCRIPT, *command)), "--out", str(out)],
                                env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1", **environment}, stdout=log,
                                stderr=subprocess.STDOUT, start_new_session=True)


def finish(process, out):
    """Waits for the end, which must be a good one."""
    assert process.wait(timeout=120) == 0, Path(f"{out}.log").read_text()[-3000:]
    return checkpoint(out)


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < end, "the run ended, or hung, before it was disturbed"
        time.sleep(0.005)
    return found


def saved_at(out):
    path = out / "checkpoint.pt"
    return path.stat().st_mtime_ns if path.exists() else None


def steps_of(out, event="train"):
    return [record["step"] for record in metrics(out, event)]


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    """A run of one process and one of two, which go on while the tests begin: {processes: (Popen, out)}."""
    root, runs = tmp_path_factory.mktemp("undisturbed"), {}
    for n, launcher in ((1, ()), (2, TORCHRUN)):
        out = root / str(n)
        runs[n] = start(out, *LONG_RUN, "--data", small, launcher=launcher), out
    yield runs
    for process, _ in runs.values():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_killed_run_ends_with_the_same_weights(tmp_path, small, undisturbed):
    """SIGKILL twice, --resume auto: weights, Adam, memory, position in the text, dropout equal bit for bit."""
    out, rng = tmp_path / "run", random.Random(0)
    flags = [*LONG_RUN, "--data", small, "--resume", "auto"]
    for _ in range(2):
        before = saved_at(out)
        process = start(out, *flags)
        wait_for(lambda: saved_at(out) not in (None, before), process)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    end, expected = finish(start(out, *flags), out), finish(*undisturbed[1])
    assert end["step"] == 60
    assert_same_end(end, expected)
    assert steps_of(out, "start")[0] == 0 and min(steps_of(out, "start")[1:]) > 0
    for folder in (out, undisturbed[1][1]):
        assert steps_of(folder) == list(range(1, 61)) and steps_of(folder, "eval") == [20, 40, 60]
    losses = [[r["loss"] for r in metrics(folder, "train")] for folder in (out, undisturbed[1][1])]
    assert losses[0] == losses[1] and len(metrics(out, "test")) == 1


def test_SIGTERM_saves_and_ends_with_code_0(tmp_path, small, undisturbed):
    """--save-every is far away: the only checkpoint before step 20 is the one that SIGTERM asked for."""
    out = tmp_path / "run"
    flags = [*LONG_RUN, "--data", small, "--save-every", 1000]
    process, log = start(out, *flags), out / "metrics.jsonl"
    wait_for(lambda: log.exists() and '"train"' in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    step = finish(process, out)["step"]
    assert 0 < step < 60 and f"SIGTERM: saved after step {step} " in Path(f"{out}.log").read_text()
    assert_same_end(finish(start(out, *flags, "--resume", "auto"), out), finish(*undisturbed[1]))
    assert steps_of(out) == list(range(1, 61)) and steps_of(out, "eval") == [20, 40, 60]


def test_an_evaluation_that_was_cut_off_is_done_by_the_resumed_run(tmp_path, monkeypatch, small):
    flags, real = [*RUN, *DROPOUT, "--data", small], deq_wikitext.evaluate
    run(*flags, "--out", tmp_path / "whole")
    monkeypatch.setattr(deq_wikitext, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--out", tmp_path / "cut")
    assert (checkpoint(tmp_path / "cut")["step"], checkpoint(tmp_path / "cut")["evaluated"]) == (3, 0)
    monkeypatch.setattr(deq_wikitext, "evaluate", real)
    run(*flags, "--out", tmp_path / "cut", "--resume", "auto")
    assert_same_end(checkpoint(tmp_path / "cut"), checkpoint(tmp_path / "whole"))
    assert steps_of(tmp_path / "cut", "eval") == [3, 6]
    run(*flags, "--out", tmp_path / "cut", "--resume", "auto")          # a finished run: only the test text again
    assert len(metrics(tmp_path / "cut", "test")) == 1


# --- two processes ---------------------------------------------------------------------------------------------------

def test_two_processes_take_the_steps_of_one(tmp_path, small):
    """Each has half of the streams with their own memory: gradients and perplexities are those of one, to rounding.

    Without dropout, whose masks each process draws for itself; the jitter of the budget is the same for all.
    """
    flags = [*RUN, "--data", small, "--lr", 1e-5, "--dropout", 0, "--jitter", 3]
    agent = start(tmp_path / "two", *flags, launcher=TORCHRUN)
    run(*flags, "--out", tmp_path / "one")
    assert finish(agent, tmp_path / "two")["memory"][0].shape == (4, 8, 16)         # of all streams
    assert_same_training(tmp_path / "one", tmp_path / "two")
    for event in ("train", "eval", "test"):             # what is logged is of all processes
        for one, two in zip(metrics(tmp_path / "one", event), metrics(tmp_path / "two", event), strict=True):
            assert one.keys() == two.keys()
            measured = {"seconds", "ms_per_step", "tokens_per_s"}
            for key in one.keys() - measured - {"event"}:
                assert two[key] == pytest.approx(one[key], rel=2e-3), key
            if event == "train":
                assert two["tokens_per_s"] == pytest.approx(4 * 6 * 1e3 / two["ms_per_step"], rel=1e-6)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux")
def test_torchrun_restarts_a_job_that_lost_a_process(tmp_path, small, undisturbed):
    """SIGKILL to the second process: the job carries on by itself, to the same end bit for bit."""
    out = tmp_path / "run"
    agent = start(out, *LONG_RUN, "--data", small, "--resume", "auto",
                  launcher=[*TORCHRUN, "--max-restarts=1", "--monitor-interval=0.1"],
                  TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

    def second_process():
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or b"\0RANK=1\0" not in (entry / "environ").read_bytes():
                    continue
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == agent.pid:
                    return int(entry.name)
            except OSError:
                continue                        # it has just ended

    wait_for(lambda: saved_at(out) is not None, agent)
    os.kill(wait_for(second_process, agent), signal.SIGKILL)
    end, expected = finish(agent, out), finish(*undisturbed[2])
    assert len(end["rng"]) == 2
    assert_same_end(end, expected)
    assert steps_of(out) == list(range(1, 61)) and len(steps_of(out, "start")) == 2


# --- evaluation, official checkpoints, text, benchmark ---------------------------------------------------------------

def test_a_checkpoint_is_evaluated_with_its_own_flags(tmp_path, small, capsys):
    """Text, model, solver, budget and memory are the checkpoint's where they are not given; test as in training."""
    more = "--norm pre --local-size 9 --tol 0.01 --solver anderson --vocab all --eval-streams 2".split()
    run(*RUN, *more, "--data", small, "--out", tmp_path, "--steps", 12, "--eval-every", 12, "--log-every", 12)
    path, (test,) = tmp_path / "best.pt", metrics(tmp_path, "test")
    ended = capsys.readouterr().out.splitlines()[-1]
    command = f"python deq_wikitext.py --eval --resume {path}"
    assert ended == f"weights: {path}; evaluate them with: {command}"

    def evaluated(*flags):
        run("--eval", "--resume", path, *flags)
        out, err = capsys.readouterr()
        return out.splitlines(), [line for line in err.splitlines() if line.startswith("note: ")]

    lines, notes = evaluated()
    assert lines[0] == f"{path}, step 12: anderson, at most 4 steps, tolerance 0.01; 2 streams, segments of 6"
    assert [line.split()[0] for line in lines[1:]] == ["valid", "relative", "test", "relative", "rho"]
    assert f"test perplexity {test['test_perplexity']:.5g}  test tokens {test['test_tokens']}  " in lines[3]
    assert not notes
    lines, notes = evaluated("--eval-mem-len", 8, 20)
    assert [line.split()[0] for line in lines[1::2]] == ["valid", "test", "valid", "test", "rho"]
    assert "mem len 8" in lines[3] and "mem len 20" in lines[7] and not notes
    lines, notes = evaluated("--solver", "broyden", "--max-iter", 7, "--mem-len", 3, "--segment", 5, "--tol", 0)
    assert ": broyden, at most 7 steps, tolerance 0; 2 streams, segments of 5" in lines[0] and "mem len 3" in lines[3]
    assert len(notes) == 5 and "note: trained with --max-iter 4, evaluated with 7" in notes
    # a given --solver is that of evaluation, also against the checkpoint's --eval-solver
    run(*RUN, "--data", small, "--out", tmp_path / "b", "--eval-solver", "unrolled", "--eval-max-iter", 3)
    capsys.readouterr()
    run("--eval", "--resume", tmp_path / "b/best.pt", "--solver", "anderson", "--max-iter", 9)
    assert ": anderson, at most 9 steps" in capsys.readouterr().out
    assert ": fixed-point, at most 9 steps" in evaluated("--eval-solver", "fixed-point", "--eval-max-iter", 9)[0][0]
    assert "--amp True" not in str(notes) and "--amp False, evaluated with True" in str(evaluated("--amp")[1])
    run("--generate", "w1", "--resume", path, "--generate-tokens", 3)
    assert len(capsys.readouterr().out.split()) == 4
    for flags, named in (("--norm post", "--norm pre (here post)"), ("--cutoffs 10", "--cutoffs"),
                         ("--d-inner 25", "--d-inner 24 (here 25)"), ("--n-head 3", "--n-head 3"),
                         ("--mem-len 995 --local-size 0", "plus --segment is 1001")):
        assert named in refused(capsys, "--eval", "--resume", path, *flags.split())


def test_what_was_saved_in_pretraining_is_evaluated_by_its_network(tmp_path, small, capsys):
    run(*RUN, "--data", small, "--out", tmp_path, "--pretrain-steps", 9, "--pretrain-layers", 3)
    (test,) = metrics(tmp_path, "test")
    assert "; all of them are pretraining, without a solver" in capsys.readouterr().out
    run("--eval", "--resume", tmp_path / "best.pt")
    lines = capsys.readouterr().out.splitlines()
    assert "step 6: an unrolled network of 3 layers; " in lines[0] and "residual" not in lines[2]
    assert f"test perplexity {test['test_perplexity']:.5g} " in lines[2]
    assert "test_residual_p50" not in test


@pytest.mark.parametrize("lm", [False, True])
def test_official_checkpoints_are_evaluated_and_begun_with(lm, tmp_path, small, capsys):
    more = ["--model", "deq-lm", *"--d-inner 24 --max-iter 4 --pretrain-steps 0".split()] if lm else []
    torch.manual_seed(5)
    model = deq_wikitext.build_model(parse_args([*RUN, *more]), range(41), CPU)
    torch.save(official_state_dict(model, lm), tmp_path / "official.pkl")
    run(*RUN, *more, "--data", small, "--eval", "--resume", tmp_path / "official.pkl")
    assert "test perplexity" in capsys.readouterr().out
    if not lm:                          # the file knows no lam
        run(*RUN, "--data", small, "--grad", "npg", "--lam", "auto", "--eval", "--resume", tmp_path / "official.pkl")
        assert "lam 1" in capsys.readouterr().out.splitlines()[-1]
    run(*RUN, *more, "--data", small, "--init", tmp_path / "official.pkl", "--out", tmp_path / "run", "--lr", 1e-9)
    weights = checkpoint(tmp_path / "run")["model"]
    assert all(torch.allclose(weights[k], v, atol=1e-6) for k, v in model.state_dict().items())
    assert "--eval" in refused(capsys, *RUN, *more, "--data", small, "--resume", tmp_path / "official.pkl")
    message = refused(capsys, *RUN, *more, "--data", small, "--eval", "--resume", tmp_path / "official.pkl",
                      "--d-inner", 25)
    assert "does not fit" in message and "ff1" in message


def test_text_is_continued(tmp_path, monkeypatch, small, capsys):
    run(*RUN, "--data", small, "--out", tmp_path, "--steps", 60, "--eval-every", 60)
    capsys.readouterr()
    flags = [*RUN, "--data", small, "--resume", tmp_path / "checkpoint.pt", "--generate-tokens", 20]
    out = []
    for more in (["--temperature", 0], ["--temperature", 0], ["--seed", 1], ["--seed", 2]):
        run(*flags, "--generate", "w1 w4 w7", *more)
        out.append(capsys.readouterr().out)
    assert all(o.startswith("w1 w4 w7 ") for o in out) and out[0] == out[1] and out[2] != out[3]
    for o in out:
        words = o.replace("\n", " <eos> ").split()[3:-1]
        assert len(words) == 20 and all(w == "<eos>" or w.startswith("w") for w in words)
    lengths, log_p, p = [], [], []
    forward, log_prob, multinomial = Model.forward, Model.log_prob, torch.multinomial
    monkeypatch.setattr(Model, "forward", lambda self, ids, memory, **more: (
        lengths.append(0 if memory is None else memory.h.shape[1]), forward(self, ids, memory=memory, **more))[1])
    monkeypatch.setattr(Model, "log_prob", lambda self, h: (log_p.append(log_prob(self, h)), log_p[-1])[1])
    monkeypatch.setattr(torch, "multinomial", lambda x, n: (p.append(x), multinomial(x, n))[1])
    run(*flags, "--generate", "w1 w4 w7", "--temperature", 2)
    assert lengths == [0, 3, 4, 5, 6, 7, *[8] * 14]                 # each token is read once, with all before it
    assert all(torch.allclose(a.softmax(1), (b.log() * 2).softmax(1), atol=1e-6) for a, b in zip(log_p, p, strict=True))
    capsys.readouterr()
    assert "'zebra' is not in the vocabulary" in refused(capsys, *flags, "--generate", "w1 zebra")


def test_the_benchmark_measures_every_row(capsys):
    run(*RUN, "--data", "toy", "--benchmark", "--k", 3)
    printed = capsys.readouterr().out
    for row in deq_wikitext.TABLE3:
        (line,) = [line for line in printed.splitlines() if line.startswith(row + " ") and "x" in line
                   and line[len(row):].split()[0].replace(".", "").isdigit()]
        assert all(float(x.rstrip("x")) > 0 for x in line[len(row):].split() if x != "nan")
        assert line.endswith(" 1.00x   1.00x") or row != "PostLN implicit"
    assert "solver overhead" in printed and "PostLN NPG, k = 20" in printed
    assert "broyden forward, gmres backward" in printed
