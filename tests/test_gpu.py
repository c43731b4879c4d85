"""What only a GPU can show: a CPU's numbers, no waiting in a step, compiled and bf16 modules, the programs.

All of it is skipped without one.  Float64 where numbers are compared, so that no TF32 is involved.
"""
import copy
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import common
from common import (Meter, Process, anderson, broyden, captured, compiled, cosine_similarity, equilibrium,
                    fixed_point, gmres, jacobian_regularization, rng_state, set_rng_state, spectral_radius)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).resolve().parent.parent
GPU, PROCESS = torch.device("cuda", 0), Process(0, 1, torch.device("cuda", 0))
SOLVERS = [fixed_point, anderson, broyden, functools.partial(broyden, memory=4)]


@pytest.fixture
def no_waiting():
    """A context in which operations that make the host wait for the GPU raise: nearly all, says torch."""
    class Strict:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    yield Strict()
    torch.cuda.set_sync_debug_mode("default")


class Cell(nn.Module):
    """A contraction of two parts, one of them an image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.down, self.up = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 6), nn.Linear(6, 4)
        self.u = nn.Parameter(torch.randn(1, 4, 8, 8))

    def start(self, N=5):
        return self.u.new_zeros(N, 4, 8, 8), self.u.new_zeros(N, 6)

    def forward(self, h):
        image, vector = h
        return (torch.tanh(0.7 * self.conv(image) + 0.5 * self.up(vector)[:, :, None, None] + self.u),
                torch.tanh(self.down(image.mean((2, 3)))))


def both(double=True):
    cpu = Cell().to(torch.float64 if double else torch.float32)
    return cpu, copy.deepcopy(cpu).to(GPU)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solve_equals_the_CPUs(solver, last):
    results = []
    for cell in both():
        h0 = cell.start()
        if last:
            h0 = (h0[0].contiguous(memory_format=torch.channels_last), h0[1])
        results.append(solver(cell, h0, max_iter=12, tol=0))
    a, b = results
    assert a.n_evals == b.n_evals == 13 and b.residual.device == b.h[0].device == GPU
    torch.testing.assert_close(b.trace.cpu(), a.trace, rtol=1e-3, atol=1e-12)
    for x, y in zip(a.h, b.h):
        torch.testing.assert_close(y.cpu(), x, rtol=1e-8, atol=1e-10)


def test_a_solve_with_a_tolerance_looks_at_every_eighth_evaluation():
    cpu, gpu = both()
    a, b = (broyden(cell, cell.start(), max_iter=40, tol=1e-6) for cell in (cpu, gpu))
    assert b.converged.all() and a.n_evals <= b.n_evals < a.n_evals + 8 and b.n_evals % 8 == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_of_different_length_equal_the_CPUs(solver):
    torch.manual_seed(0)
    w, u = 0.1 * torch.randn(8, 8, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    offsets = torch.tensor([0, 3, 3, 11, 20])
    for mode in ("rel", "abs", "max"):
        a, b = (solver(lambda h: torch.tanh(h @ w.to(d) + u.to(d)), torch.zeros_like(u, device=d),
                       max_iter=20,
                       tol=1e-5, stop_mode=mode, offsets=offsets.to(d)) for d in ("cpu", GPU))
        torch.testing.assert_close(b.h.cpu(), a.h, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(b.residual.cpu(), a.residual, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("solver", [*SOLVERS, gmres])
def test_a_backward_solve_of_samples_of_different_length_equals_the_CPUs(solver):
    """It is solved between two looks of the GPU, at every eighth evaluation: what has stopped stays."""
    torch.manual_seed(0)
    w, g = 0.1 * torch.randn(8, 8, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    offsets = torch.tensor([0, 3, 3, 11, 20])
    a, b = (solver(lambda v: v @ w.to(d) + g.to(d), g.to(d), max_iter=20, tol=1e-5, stop_mode=g.to(d),
                   offsets=offsets.to(d)) for d in ("cpu", GPU))
    torch.testing.assert_close(b.h.cpu(), a.h, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(b.residual.cpu(), a.residual, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("grad, backward_solver", [("upg", None), ("npg", None), ("bptt", None),
                                                   ("implicit", gmres),
                                                   ("implicit", broyden), ("implicit", anderson)])
def test_a_gradient_equals_the_CPUs_and_does_not_wait(grad, backward_solver, no_waiting):
    found = []
    for cell in both():
        def step():
            h, _ = equilibrium(cell, cell.start(), grad=grad,
                               solver=fixed_point if grad == "bptt" else broyden,
                               max_iter=30, tol=0, backward_solver=backward_solver or gmres,
                               backward_max_iter=30,
                               backward_tol=0)
            sum(p.square().sum() for p in h).backward()

        step()
        found.append([p.grad.cpu().clone() for p in cell.parameters()])
    with no_waiting:
        step()
    for a, b in zip(*found):
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9)


def test_diagnostics_equal_the_CPUs_and_do_not_wait(no_waiting):
    (a, b), values = both(), []
    for cell in (a, b):
        h = broyden(cell, cell.start(), max_iter=30, tol=0).h
        torch.manual_seed(0)
        values.append(spectral_radius(cell, h, n_iter=60))      # random vectors of the device's own generator
        jacobian_regularization(cell, h).backward()
        grads = [p.grad for p in cell.parameters()]
    torch.testing.assert_close(values[1].cpu(), values[0], rtol=0.02, atol=0)
    with no_waiting:
        spectral_radius(b, h, n_iter=4)
        jacobian_regularization(b, h).backward()
        assert cosine_similarity(grads, grads).device == GPU
        meter = Meter(PROCESS)
        meter.add(3, loss=torch.ones((), device=GPU))


def test_a_solve_whose_memory_is_beyond_an_int():
    """2 samples of 2^28 numbers: g and the newest step are more than 2^31 apart, which cuBLAS cannot say."""
    if torch.cuda.get_device_properties(GPU).total_memory < 60e9:
        pytest.skip("needs 60 GB")
    h = broyden(lambda h: torch.cos(h), torch.zeros(2, 2 ** 28, device=GPU), max_iter=7, tol=0).h
    assert (h - 0.7390851).abs().max() < 1e-4
    del h
    torch.cuda.empty_cache()


def test_npg_needs_no_more_memory_for_more_terms():
    cell, peaks = both(double=False)[1], {}
    for k in (1, 1, 20):
        torch.cuda.reset_peak_memory_stats()
        h, _ = equilibrium(cell, cell.start(), grad="npg", k=k, max_iter=8, tol=0)
        sum(p.square().sum() for p in h).backward()
        peaks[k] = torch.cuda.max_memory_allocated()
    assert peaks[20] <= 1.02 * peaks[1]


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("grad", ["upg", "npg", "implicit"])
def test_a_compiled_f_has_the_gradient_of_the_eager_one(grad, amp):
    """With code generation, float32: rounding, or bf16's."""
    cell, found = both(double=False)[1], []
    with torch.backends.cudnn.flags(allow_tf32=False):
        for f in (cell, compiled(cell.forward)):
            for _ in range(2):
                with torch.autocast("cuda", dtype=torch.bfloat16, enabled=amp):
                    h, _ = equilibrium(f, cell.start(), grad=grad, max_iter=15, tol=0, backward_max_iter=15,
                                       backward_tol=0)
                assert all(p.dtype == torch.float32 for p in h)
                grads = torch.autograd.grad(sum(p.square().sum() for p in h), list(cell.parameters()))
            found.append(grads)
    assert cosine_similarity(*found) > (0.999 if amp else 1 - 1e-8)


class Model(nn.Module):
    """A classifier around the cell, with BatchNorm and dropout."""

    def __init__(self, grad, solver, backward_solver=gmres):
        super().__init__()
        self.cell, self.norm, self.grad, self.solver = Cell(), nn.BatchNorm2d(4), grad, solver
        self.backward_solver = backward_solver
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x, early=False):
        if early:
            return x.mean((2, 3))
        u = F.dropout(self.norm(x), 0.2, self.training)

        def f(h):
            image, vector = self.cell(h)
            return image + 0.1 * u, vector

        h, result = equilibrium(f, self.cell.start(len(x)), grad=self.grad, solver=self.solver, max_iter=9,
                                tol=0,
                                backward_solver=self.backward_solver, backward_max_iter=9, backward_tol=0)
        return h[0].mean((2, 3)), result.residual


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("grad, solvers", [("upg", [broyden]), ("npg", [broyden]),
                                           ("implicit", [broyden, gmres]),
                                           ("implicit", [broyden, broyden]), ("upg", [fixed_point]),
                                           ("bptt", [fixed_point])])
def test_a_captured_model_is_the_eager_one(grad, solvers, amp):
    """Its results, gradients, BatchNorm's statistics, random numbers, step after step; other shapes, too."""
    eager = Model(grad, *solvers).to(GPU)
    graph = copy.deepcopy(eager)
    torch.manual_seed(1)
    examples = torch.randn(5, 4, 8, 8, device=GPU)
    autocast = functools.partial(torch.autocast, "cuda", dtype=torch.bfloat16, enabled=amp)
    with torch.backends.cudnn.flags(allow_tf32=False):
        before = torch.cuda.get_rng_state()
        with autocast():
            graph = captured(graph, examples)
        assert torch.equal(torch.cuda.get_rng_state(), before)
        for a, b in zip(eager.buffers(), graph.buffers()):
            assert torch.equal(a, b)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (eager, graph)]
        for step in range(4):
            x, found = torch.randn(5, 4, 8, 8, device=GPU), []
            for model, optimizer in zip((eager, graph), optimizers):
                torch.manual_seed(step)
                # not around the optimiser: autocast would keep the weights of the step before
                with autocast():
                    out, residual = model(x)
                out.square().sum().backward()
                found.append([out.detach().clone(), residual.detach().clone(),
                              *(b.clone() for b in model.buffers()),
                              *(p.grad.clone() for name, p in model.named_parameters() if "cell." in name)])
                assert all(p.grad is None for name, p in model.named_parameters() if "unused" in name)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if amp:
                assert cosine_similarity(*(side[5:] for side in found)) > 0.99
            else:
                for a, b in zip(*found):
                    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(graph(x, early=True), eager(x, early=True))
        for other in (x[:2], x.clone().requires_grad_()):        # eagerly, and a gradient reaches the input
            out = []
            for model in (eager, graph, copy.deepcopy(graph)):
                torch.manual_seed(0)
                out.append(model(other)[0])
            for a in out[1:]:
                torch.testing.assert_close(a, out[0], rtol=1e-2, atol=1e-3)
        assert torch.autograd.grad(out[1].sum(), other)[0].abs().max() > 0
        out, _ = graph.eval()(x)
        torch.testing.assert_close(out, eager.eval()(x)[0], rtol=1e-2, atol=1e-3)


def test_a_captured_model_gives_its_input_a_gradient():
    torch.manual_seed(1)
    eager = Model("upg", broyden).to(GPU)
    graph, encoder, x = copy.deepcopy(eager), nn.Conv2d(3, 4, 1).to(GPU), torch.randn(5, 3, 8, 8, device=GPU)
    graph = captured(graph, torch.randn(5, 4, 8, 8, device=GPU, requires_grad=True))
    grads = []
    for model in (eager, graph):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(model(encoder(x))[0].square().sum(), encoder.weight)[0])
    assert cosine_similarity(grads[:1], grads[1:]) > 0.999


@pytest.mark.parametrize("options", [{}, dict(broadcast_buffers=False, gradient_as_bucket_view=True)])
def test_a_captured_model_under_DistributedDataParallel(tmp_path, options):
    """With the settings of both scripts, on one GPU; an eager step between, as for the smaller last batch."""
    import torch.distributed as dist
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1,
                            device_id=GPU)
    try:
        eager = Model("upg", broyden).to(GPU)
        del eager.unused
        graph, x = copy.deepcopy(eager), torch.randn(5, 4, 8, 8, device=GPU)
        net = nn.parallel.DistributedDataParallel(captured(graph, x), device_ids=[0], **options)
        for step in range(4):
            for model in (eager, net):
                torch.manual_seed(step)
                model(x if step != 1 else x[:2])[0].square().sum().backward()
            for a, b in zip(eager.parameters(), graph.parameters()):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-4)
                a.grad = b.grad = None
    finally:
        dist.destroy_process_group()


def test_the_products_of_few_long_samples_are_made_in_pieces():
    """Broyden's, for N = 3 and D = 16384: the CPU's solve."""
    assert common._pieces(3, 16384, GPU) > 1
    torch.manual_seed(0)
    u = torch.randn(3, 16384, dtype=torch.float64)
    results = [broyden(lambda h: torch.tanh(0.8 * h.roll(1, 1) + u.to(h.device)),
                       torch.zeros_like(u, device=d),
                       max_iter=12, tol=0) for d in ("cpu", GPU)]
    torch.testing.assert_close(results[1].h.cpu(), results[0].h, rtol=1e-9, atol=1e-11)


def test_the_random_numbers_of_the_GPU_go_on_from_a_checkpoint():
    torch.rand(3, device=GPU)
    state = rng_state()
    expected = torch.rand(5, device=GPU)
    set_rng_state(state)
    assert torch.equal(torch.rand(5, device=GPU), expected)


# --- the scripts' steps -------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", ["", "--memory-format channels-last --amp", "--grad npg",
                                   "--grad implicit --dropout 0.2",
                                   "--grad implicit --backward-solver broyden",
                                   "--pretrain-steps 1"])
@pytest.mark.parametrize("name", ["mdeq_cifar", "mdeq_imagenet"])
def test_a_step_of_mdeq_does_not_wait(name, flags, no_waiting):
    module = pytest.importorskip(name)
    args = module.parse_args(f"--data toy --max-iter 4 --backward-max-iter 4 --k 2 {flags}".split())
    model = module.build_model(args, 10, PROCESS)
    optimizer, meter = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), Meter(PROCESS)
    images, labels = torch.zeros(4, 3, 64, 64, dtype=torch.uint8).pin_memory(), torch.arange(4).pin_memory()

    training, net = module.training_pass(args, model, 4, 64, PROCESS)

    def step():
        x, y = (t.to(GPU, non_blocking=True) for t in (images, labels))
        cifar = name == "mdeq_cifar"
        x = module.prepare(x, True, module.memory_format(args)) if cifar else module.prepare(x, args, GPU)
        with module.autocast(args, GPU):
            logits, residual = net(x, unroll=2 * args.pretrain_steps)
        loss = F.cross_entropy(logits.float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.add(4, loss=loss, accuracy=100 * (logits.argmax(1) == y).float().mean())
        kept = training.backward_residual[:4].clone()
        return residual if residual is None else residual.detach().clone(), kept

    step()
    with no_waiting:
        residual, backward = step()
    assert args.pretrain_steps or residual.isfinite().all()
    assert backward.isfinite().all() == (args.grad == "implicit")
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("flags", ["--amp", "--grad npg", "--grad implicit", "--recompute",
                                   "--norm pre --dropout 0.1 --dropatt 0.1 --jr 1"])
def test_a_step_of_the_transformer_does_not_wait(flags, no_waiting):
    module = pytest.importorskip("deq_wikitext")
    args = module.parse_args("--data toy --tol 0 --max-iter 4 --backward-max-iter 4 --k 2 --mem-len 9 "
                             f"{flags}".split())
    model = module.build_model(args, range(2000), PROCESS)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    ids = torch.arange(2 * 11).view(2, 11) * 90                             # of all three clusters

    def step(memory):
        with module.autocast(args, GPU):
            out = model(ids[:, :10], ids[:, 1:11], memory, regularize=args.jr > 0)
        (out.nll.mean() + (0 if out.jr is None else out.jr)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return out

    memory = step(step(None).memory).memory
    with no_waiting:
        out = step(memory)
    assert out.nll.isfinite().all() and out.memory.h.shape[1] == 9


@pytest.mark.parametrize("solver, grad", [("fixed-point", "upg"), ("fixed-point", "npg"),
                                          ("broyden", "implicit"),
                                          ("fixed-point", "implicit --backward-solver broyden")])
def test_a_step_of_ignn_equals_the_CPUs_and_does_not_wait(solver, grad, no_waiting):
    module = pytest.importorskip("ignn_graphs")
    data = pytest.importorskip("torch_geometric.data")
    args = module.parse_args("--dataset COX2 --hidden 8 --tol 0 --backward-tol 0 --max-iter 12 "
                             f"--backward-max-iter 12 --solver {solver} --grad {grad}".split())
    torch.manual_seed(0)
    graphs = []
    for n in (5, 9, 7):
        edge = torch.stack([torch.arange(n - 1), torch.arange(1, n)])
        graphs.append(data.Data(x=torch.rand(n, 6), y=torch.tensor(n % 2),
                                edge_index=torch.cat([edge, edge.flip(0)], 1)))
    model, found = module.GraphIGNN(6, 2, args.hidden, args.kappa, args.dropout,
                                    module.solver_settings(args)), []
    model.double()
    for device in ("cpu", GPU):
        net = copy.deepcopy(model).to(device)
        batch = module.make_batch(graphs, torch.device(device), dtype=torch.float64)

        def step():
            loss = F.nll_loss(net(batch, module.dropout_mask(args, fold=0, epoch=0, step=0, batch=batch)),
                              batch.y)
            loss.backward()
            net.project_()

        step()
        found.append([p.grad.cpu().clone() for p in net.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-10)
    with no_waiting:
        step()
        with torch.no_grad():
            net.eval()(batch)


# --- the programs -------------------------------------------------------------------------------------------

def run(folder, *command, kill_at=None):
    """What a program has printed, which must end well, or by SIGTERM as soon as it has printed `kill_at`."""
    log = folder / "log"
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, "-u", *map(str, command)], cwd=ROOT, stdout=file,
                                   stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "2"})
        started = time.monotonic()
        while process.poll() is None and time.monotonic() - started < 300:
            if kill_at and kill_at in log.read_text():
                process.send_signal(signal.SIGTERM)
                kill_at = None
            time.sleep(0.1)
        if process.poll() is None:
            process.kill()
    text = log.read_text()
    assert process.wait() == 0, text[-3000:]
    return text


TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=1 "
TRANSFORMER = "deq_wikitext.py --data toy --steps 60 --warmup-steps 10 --pretrain-steps 10 "


@pytest.mark.parametrize("command, last_words", [
    ("mdeq_cifar.py --data toy --epochs 1", "done: test accuracy"),
    ("mdeq_cifar.py --data toy --epochs 1 --train-size 200 --grad implicit --cosine-every 2 --radius-every 2",
     "done: test accuracy"),
    (TORCHRUN + "mdeq_cifar.py --data toy --epochs 1 --train-size 200 --sync-bn --amp",
     "done: test accuracy"),
    ("mdeq_cifar.py --data toy --epochs 1 --train-size 220 --grad implicit --cuda-graph --amp "
     "--pretrain-steps 1", "done: test accuracy"),
    ("mdeq_cifar.py --benchmark --batch-size 16 --cuda-graph --compile", "solver overhead"),
    ("mdeq_imagenet.py --data toy --epochs 1 --workers 2", "top-1"),
    (TORCHRUN + "mdeq_imagenet.py --data toy --epochs 1 --workers 2 --cuda-graph", "top-1"),
    (TORCHRUN + "mdeq_imagenet.py --data toy --epochs 1 --workers 2 --sync-bn --amp --accumulate 2", "top-1"),
    (TRANSFORMER + "--eval-every 40 --radius-every 40", "test"),
    (TORCHRUN + TRANSFORMER + "--eval-every 60 --amp --jr 0.1", "test"),
    ("ignn_graphs.py --epochs 3", "equilibrium")])
def test_a_program_runs(tmp_path, command, last_words):
    text = run(tmp_path, *command.split(), "--out", tmp_path / "run")
    assert last_words in text and torch.cuda.get_device_name() in text
    if "--benchmark" in command:
        return
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(r["loss"] is not None for r in records if r["event"] == "train")


@pytest.mark.parametrize("graph", [[], ["--cuda-graph", "--dropout", "0.1"]])
def test_a_run_that_was_ended_by_SIGTERM_goes_on(tmp_path, graph):
    """The same images, weights and masks: the losses are those of an undisturbed run, but for rounding."""
    flags = "mdeq_cifar.py --data toy --epochs 2 --train-size 500 --log-every 1 --lr 1e-3 --no-tf32".split()
    flags += graph
    run(tmp_path, *flags, "--out", tmp_path / "whole")
    out = tmp_path / "cut"
    assert "SIGTERM: saved" in run(tmp_path, *flags, "--out", out, kill_at="step 3  ")
    run(tmp_path, *flags, "--out", out, "--resume", "auto")
    losses = []
    for name in ("whole", "cut"):
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append({r["step"]: r["loss"] for r in records if r["event"] == "train"})
    assert list(losses[0]) == list(losses[1]) == list(range(1, 21))
    assert all(abs(a - b) < 2e-3 for a, b in zip(*(x.values() for x in losses))), losses


def test_the_synthetic_study_runs(tmp_path):
    assert "done in" in run(tmp_path, "deq_synthetic.py", "--device", "cuda")
