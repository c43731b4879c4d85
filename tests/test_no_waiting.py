"""A step on a GPU never waits for it, nor mixes it with the host; shown without one.

Tensors of torch's meta device have shapes and no numbers: whatever reads one on the host (item, bool, tolist,
nonzero, a copy to the host) raises.  `OneDevice` also refuses what only a GPU would refuse, or wait for.
"""
import contextlib
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import (Meter, Process, anderson, broyden, cosine_similarity, equilibrium, fixed_point, gmres,
                    jacobian_regularization, spectral_radius)

META = torch.device("meta")
PROCESS = Process(0, 1, META)
SOLVERS = [fixed_point, anderson, broyden, gmres]


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of host and device, but for single numbers, and blocking copies."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device for t in tree_leaves((args, kwargs, out)) if torch.is_tensor(t) and t.dim() > 0}
        if len(devices) > 1:
            copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
            assert copies, f"{func} on host and device"
            assert (kwargs or {}).get("non_blocking") or True in args[2:], "a blocking copy to the device"
        return out


@pytest.fixture(autouse=True)
def what_the_meta_device_lacks(monkeypatch):
    """Autocast and, in torch 2.6, the backward pass of the fused weight norm."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda device, **_: contextlib.nullcontext())
    monkeypatch.setattr(torch, "_weight_norm", lambda v, g, dim: v * (g / torch.norm_except_dim(v, 2, dim)))


def cell(parts, N=3):
    """A map of one part or of two, its start, and the tensors that its gradient must reach."""
    w, u = (torch.randn(s, device=META, requires_grad=True) for s in ((4, 4, 3, 3), (N, 4, 8, 8)))

    def one(h):
        return torch.tanh(F.conv2d(h, w, padding=1) + u)

    if parts == 1:
        return one, torch.zeros_like(u), [w, u]
    return (lambda h: (one(h[0]), torch.tanh(h[1] + h[0].mean((2, 3)))),
            (torch.zeros_like(u), torch.zeros(N, 4, device=META)), [w, u])


def script(name):
    """The script, or a skip where one of its imports is not installed."""
    return pytest.importorskip(name)


def all_have_gradients(model):
    return all(p.grad is not None for p in model.parameters())


def test_reading_mixing_and_blocking_raise():
    """Else the tests below could not fail."""
    x, host = torch.ones(3, device=META), torch.ones(3)
    with OneDevice():
        for read in (lambda: x.sum().item(), lambda: bool((x > 0).all()), x.tolist, x.cpu, (x > 0).nonzero,
                     lambda: x[x > 0]):
            with pytest.raises((RuntimeError, NotImplementedError)):
                read()
        for wrong in (lambda: x @ host, lambda: x[torch.tensor([0])], lambda: host.to(META),
                      lambda: x.copy_(host)):
            with pytest.raises((RuntimeError, AssertionError)):
                wrong()
        host.to(META, non_blocking=True)
        x + torch.ones(())


def cases(*solvers):
    """(solver, stop mode) of what they can do; "b" stands for the state b of an affine f."""
    return [(solver, mode) for solver in solvers for mode in ("rel", "abs", "max", "b")
            if mode != "max" or getattr(solver, "func", solver) is not gmres]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("solver, mode", cases(*SOLVERS, functools.partial(broyden, memory=3),
                                               functools.partial(gmres, memory=4),
                                               functools.partial(anderson, beta=0.5)))
def test_a_solve_with_a_fixed_budget(solver, parts, mode):
    f, h0, _ = cell(parts)
    with OneDevice():
        result = solver(f, h0, max_iter=9, tol=0, stop_mode=h0 if mode == "b" else mode)
    assert result.n_evals == 10
    assert all(t.device == META for t in (result.residual, result.trace, result.converged))


class IntStrides(TorchDispatchMode):
    """Refuses a batched product of matrices whose rows are further apart than cuBLAS's int can tell."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "aten::bmm":
            assert all(stride < 2 ** 31 for x in args for stride in x.stride()[1:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_memory_of_a_solve_may_be_larger_than_an_int(solver):
    """Two samples of 2^29 numbers, so states of 4 GB; nothing on the meta device."""
    with IntStrides():
        assert solver(lambda h: h / 2, torch.empty(2, 2 ** 29, device=META), max_iter=6, tol=0).n_evals == 7


@pytest.mark.parametrize("solver, mode", cases(*SOLVERS))
def test_a_solve_of_samples_of_different_length(solver, mode):
    f, h0, _ = cell(1)
    offsets = torch.empty(3, dtype=torch.long, device=META)
    with OneDevice():
        result = solver(f, h0, max_iter=9, tol=0, stop_mode=h0 if mode == "b" else mode, offsets=offsets)
    assert result.residual.shape == (2,)


@pytest.mark.parametrize("solver, mode", cases(*SOLVERS))
def test_a_batch_of_none_and_parts_of_none(solver, mode):
    for sizes in ((0, 3), (0, 0), (2, 0)):
        h0 = (torch.empty(sizes, device=META), torch.empty(sizes[0], 4, device=META))
        with OneDevice():
            result = solver(lambda h: tuple(0.5 * p + 1 for p in h), h0, max_iter=5, tol=0,
                            stop_mode=h0 if mode == "b" else mode)
        assert [p.shape for p in result.h] == [p.shape for p in h0] and result.residual.shape == sizes[:1]


@pytest.mark.parametrize("solver", SOLVERS)
def test_with_a_tolerance_the_first_look_is_after_the_eighth_evaluation(solver):
    f, h0, _ = cell(1)
    calls = []

    def counted(h):
        calls.append(None)
        return f(h)

    with OneDevice():
        solver(counted, h0, max_iter=6, tol=1e-3)
        calls.clear()
        with pytest.raises(RuntimeError, match="meta"):
            solver(counted, h0, max_iter=9, tol=1e-3)
    assert len(calls) == 8


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("grad", ["upg", "npg", "implicit", "bptt"])
def test_a_gradient(grad, parts):
    f, h0, needed = cell(parts)
    with OneDevice():
        h, _ = equilibrium(f, h0, grad=grad, k=3, solver=fixed_point if grad == "bptt" else broyden,
                           max_iter=5, tol=0,
                           backward_max_iter=9, backward_tol=0)
        sum(p.square().sum() for p in tree_leaves(h)).backward()
    assert all(x.grad.device == META for x in needed)


def test_diagnostics_and_meter():
    f, h0, needed = cell(2)
    with OneDevice():
        assert spectral_radius(f, h0, n_iter=4).device == META
        jacobian_regularization(f, h0).backward()
        grads = [x.grad for x in needed]
        assert cosine_similarity(grads, [grads[0], None]).device == META
        meter = Meter(PROCESS)
        for _ in range(2):
            meter.add(3, loss=torch.ones((), device=META))


@pytest.mark.parametrize("flags", ["--memory-format channels-last", "--grad npg",
                                   "--grad implicit --dropout 0.2",
                                   "--grad implicit --backward-solver broyden", "--pretrain-steps 1"])
@pytest.mark.parametrize("name", ["mdeq_cifar", "mdeq_imagenet"])
def test_a_step_and_an_evaluation_of_mdeq(name, flags):
    module = script(name)
    args = module.parse_args("--data toy --memory-format contiguous --max-iter 2 --backward-max-iter 2 --k 2 "
                             f"{flags}".split())
    with META:
        model = module.build_model(args, 10, PROCESS)
    module.normalisation(META)                              # sent to the device once
    cifar = name == "mdeq_cifar"
    x, y = torch.zeros(4, 3, 64, 64, dtype=torch.uint8), torch.arange(4)
    with OneDevice():
        x, y = (t.to(META, non_blocking=True) for t in (x, y))
        x = module.prepare(x, True, module.memory_format(args)) if cifar else module.prepare(x, args, META)
        training, net = module.training_pass(args, model, 4, x.shape[-1], PROCESS)
        logits, residual = net(x, unroll=2 * args.pretrain_steps)
        F.cross_entropy(logits, y).backward()
        kept = [training.backward_residual[:4].clone(), residual is None or residual.detach().clone()]
        with torch.no_grad():
            logits, result = model.eval()(x, with_result=True)
    assert all_have_gradients(model) and logits.device == result.residual.device == kept[0].device == META


@pytest.mark.parametrize("flags", ["", "--grad npg", "--grad implicit", "--recompute",
                                   "--pretrain-steps 1",
                                   "--norm pre --dropout 0.1 --dropatt 0.1 --jr 1",
                                   "--model deq-lm --dropout 0.1"])
def test_a_step_and_an_evaluation_of_the_transformer_with_ids_on_the_host(flags):
    module = script("deq_wikitext")
    args = module.parse_args("--data toy --tol 0 --max-iter 2 --backward-max-iter 2 --k 2 --mem-len 9 "
                             f"{flags}".split())
    with META:
        model = module.build_model(args, range(2000), PROCESS)
    ids, memory = torch.arange(2 * 21).view(2, 21) * 47, None           # of all three clusters
    with OneDevice():
        for start in (0, 10):
            out = model(ids[:, start:start + 10], ids[:, start + 1:start + 11], memory,
                        unroll=2 * args.pretrain_steps,
                        regularize=args.jr > 0 and args.pretrain_steps == 0)
            (out.nll.mean() + (0 if out.jr is None else out.jr)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            memory = out.memory
        with torch.no_grad():
            assert model.eval()(ids[:, :10], ids[:, 1:11], memory).nll.device == META
    assert all_have_gradients(model) and memory.h.shape[1] == 9


@pytest.mark.parametrize("solver, grad", [("fixed-point", "upg"), ("anderson", "npg"), ("broyden",
                                                                                        "implicit"), *(
    ("fixed-point", f"implicit --backward-solver {name}")
    for name in ("fixed-point", "anderson", "broyden"))])
def test_a_step_of_ignn(solver, grad, monkeypatch):
    """Sparse matrices replaced by dense ones: there are none on the meta device."""
    module = script("ignn_graphs")
    monkeypatch.setattr(module, "propagate", lambda A, h: A.matrix @ h)
    args = module.parse_args("--dataset COX2 --hidden 8 --tol 0 --backward-tol 0 --max-iter 3 "
                             f"--backward-max-iter 3 --solver {solver} --grad {grad}".split())
    with META:
        model = module.GraphIGNN(6, 2, args.hidden, args.kappa, args.dropout, module.solver_settings(args))
        adjacency = module.Sparse(torch.zeros(12, 12), None)
        batch = module.Graphs(torch.zeros(12, 6), torch.zeros(3, dtype=torch.long), adjacency,
                              torch.zeros(4, dtype=torch.long), 5, torch.zeros(12, dtype=torch.long), None,
                              None)
    with OneDevice():
        log_probs = model(batch, module.dropout_mask(args, fold=0, epoch=0, step=0, batch=batch))
        F.nll_loss(log_probs, batch.y).backward()
        model.project_()
        with torch.no_grad():
            assert model.eval()(batch).device == META
    assert all_have_gradients(model)


class Launches(TorchDispatchMode):
    """Counts the operators that launch a kernel on a GPU: not those that only view or allocate a tensor."""

    FREE = {f"aten::{name}" for name in ("detach", "empty", "new_empty", "empty_like", "_unsafe_view",
                                         "promote_types")}

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += not (func.is_view or func._schema.name in self.FREE)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tol", [0, 1e-4])
@pytest.mark.parametrize("solver, most, late", [(fixed_point, 26, 29), (anderson, 38, 41), (broyden, 41, 44)])
def test_an_iteration_launches_few_kernels_beside_f(solver, most, late, tol):
    """The number of kernels decides the time of a small step.  At tol = 0 it grows after the first look for
    samples that f couples, because from there on the host does not know what was found."""
    marks = []

    def f(h):
        marks.append(launches.n)
        h = torch.tanh(h)
        marks.append(launches.n)
        return h

    for evaluation, most in [(5, most)] if tol else [(5, most), (12, late)]:
        marks.clear()
        with Launches() as launches:
            solver(f, torch.empty(3, 8, device=META), max_iter=7 if tol else 20, tol=tol)
        assert marks[2 * evaluation] - marks[2 * evaluation - 1] <= most
