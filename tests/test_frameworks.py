"""A layer of a user's own inside other people's frameworks, and states of every structure and dtype.

What is right there is a test of its value; what cannot work is a test of the error that names the way out.
"""
import contextlib
import functools
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from common import (anderson, broyden, compare_gradients, cosine_similarity, equilibrium, fixed_point, gmres,
                    implicit, jacobian_regularization, npg, spectral_radius, upg)

GRADS = ("upg", "npg", "implicit")


def layer_and_input(dtype=torch.float64, d=6):
    torch.manual_seed(0)
    return nn.Linear(d, d).to(dtype), torch.randn(4, d, dtype=dtype)


ATTACH = {"equilibrium upg": lambda f, h: equilibrium(f, h, grad="upg")[0],
          "equilibrium npg": lambda f, h: equilibrium(f, h, grad="npg")[0],
          "equilibrium implicit": lambda f, h: equilibrium(f, h, grad="implicit")[0],
          "bptt": lambda f, h: equilibrium(f, h, grad="bptt", solver=fixed_point, max_iter=5)[0],
          "own loop, upg": lambda f, h: upg(f, plain(f, h)), "own loop, npg": lambda f, h: npg(f, plain(f, h)),
          "own loop, implicit": lambda f, h: implicit(f, plain(f, h)),
          "a second one": lambda f, h: equilibrium(f, equilibrium(f, h)[0] * 0.1, grad="npg")[0],
          "solver alone": lambda f, h: f(broyden(f, h).h)}


@torch.no_grad()
def plain(f, h):
    for _ in range(20):
        h = f(h)
    return h


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


@pytest.mark.parametrize("attach", ATTACH.values(), ids=ATTACH)
@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal,
                                  lambda layer: nn.utils.parametrizations.spectral_norm(layer).eval(),
                                  lambda layer: parametrize.register_parametrization(layer, "weight", Doubled())])
def test_weights_that_a_solve_has_cached_get_their_gradient(attach, wrap):
    """parametrize.cached(): the first call, in the solve, caches the weight without a graph; it had no gradient."""
    found = []
    for cached in (contextlib.nullcontext(), parametrize.cached()):
        layer, u = layer_and_input()
        layer = wrap(layer)
        with cached:
            attach(lambda h: torch.tanh(0.4 * layer(h) + u), torch.zeros_like(u)).square().sum().backward()
        found.append([p.grad for p in layer.parameters()])
    assert all(g is not None and g.norm() > 0 for g in found[1])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("attach", ATTACH.values(), ids=ATTACH)
def test_weights_that_autocast_has_cached_get_their_gradient(attach):
    layer, u = layer_and_input(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attach(lambda h: torch.tanh(0.4 * layer(h) + u), torch.zeros_like(u)).square().sum().backward()
    assert layer.weight.grad.norm() > 0


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("dtype, floor", [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("two", [False, True])
def test_weights_of_low_precision(grad, dtype, floor, two):
    """As transformers loads them: f gets h0's dtype, and the residual is that of the state that is returned."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(8, 32), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 4)])
    x, grads = torch.randn(16, 8), {}
    for kind in (torch.float32, dtype):
        embed, layer, norm, head = model.to(kind)
        u, seen = embed(x.to(kind)), set()

        def f(h):
            seen.update(p.dtype for p in (h if two else (h,)))
            y = torch.tanh(0.4 * layer(norm(h[0] + h[1] if two else h)) + u)
            return (y, 0.5 * y) if two else y

        zeros = torch.zeros_like(u)
        h, result = equilibrium(f, (zeros, zeros) if two else zeros, grad=grad, max_iter=30, tol=floor,
                                backward_tol=floor)
        h = h[0] + h[1] if two else h
        assert seen == {kind} == {h.dtype} and result.converged.all() and result.residual.dtype == torch.float32
        model.zero_grad()
        head(h).float().square().sum().backward()
        grads[kind] = [p.grad.float() for p in model.parameters()]
    assert cosine_similarity(grads[dtype], grads[torch.float32]) > 0.999


@pytest.mark.parametrize("solver", [fixed_point, anderson, broyden])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_residual_is_that_of_the_rounded_state(solver, dtype):
    layer, u = layer_and_input(torch.float32, d=32)
    layer, u = layer.to(dtype), u.to(dtype)
    f = lambda h: torch.tanh(layer(h) + u)
    with torch.no_grad():
        result = solver(f, torch.zeros_like(u), max_iter=12, tol=0)
        true = (f(result.h).float() - result.h.float()).norm(dim=1) / f(result.h).float().norm(dim=1)
    torch.testing.assert_close(result.residual, true, rtol=1e-2, atol=1e-7)


def test_under_autocast_a_half_start_is_float32():
    """Its u comes from autocast, so zeros_like(u) is bfloat16; the state and its residual are float32 all the same."""
    layer, u = layer_and_input(torch.float32)
    for grad in GRADS:
        seen = set()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h, result = equilibrium(lambda h: seen.add(h.dtype) or torch.tanh(0.4 * layer(h) + u),
                                    torch.zeros_like(u, dtype=torch.bfloat16), grad=grad)
        assert seen == {torch.float32} == {h.dtype, result.h.dtype}


@pytest.mark.parametrize("grad", GRADS)
def test_a_step_can_be_counted_by_flop_counter_mode(grad):
    """It puts hooks on the inputs of modules, which torch refuses on a leaf."""
    from torch.utils.flop_counter import FlopCounterMode
    layer, u = layer_and_input()
    with FlopCounterMode(display=False) as counter:
        equilibrium(lambda h: torch.tanh(0.4 * layer(h) + u), torch.zeros_like(u), grad=grad)[0].sum().backward()
    assert counter.get_total_flops() > 0


class Inference(nn.Module):
    """A fixed budget and no graph: what can be exported."""

    def __init__(self, solver):
        super().__init__()
        self.layer, self.solver = nn.Linear(6, 6), solver

    def forward(self, x):
        with torch.no_grad():
            return equilibrium(lambda h: torch.tanh(0.5 * self.layer(h) + x), torch.zeros_like(x), solver=self.solver,
                               max_iter=8, tol=0.0)[0]


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 exports no operation with out=")
@pytest.mark.parametrize("solver", [fixed_point, anderson, broyden])
def test_inference_with_a_fixed_budget_can_be_exported(solver):
    torch.manual_seed(0)
    model, x = Inference(solver).eval(), torch.randn(5, 6)
    sizes = {0: torch.export.Dim("N", min=2, max=64)}
    program = torch.export.export(model, (torch.randn(3, 6),), dynamic_shapes=(sizes,), strict=False)
    torch.testing.assert_close(program.module()(x), model(x))


def test_a_result_can_be_loaded_from_a_checkpoint(tmp_path):
    result = equilibrium(lambda h: 0.5 * h + 1, torch.zeros(2, 3))[1]
    torch.save({"result": result}, tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt")["result"]
    assert type(loaded) is type(result) and torch.equal(loaded.h, result.h) and loaded.n_evals == result.n_evals


@pytest.mark.parametrize("whole", [np.int64, np.int32, np.uint8, torch.tensor])
def test_whole_numbers_may_be_of_numpy_or_torch(whole):
    f, h0 = lambda h: torch.tanh(0.5 * h + 1), torch.ones(2, 3, requires_grad=True)
    for grad in ("upg", "npg", "implicit"):
        options = dict(k=3, max_iter=9, backward_max_iter=7)
        found = [equilibrium(f, h0, grad=grad, **{name: kind(n) for name, n in options.items()})[1].h
                 for kind in (int, whole)]
        assert torch.equal(*found)
    assert anderson(f, h0, m=whole(3)).n_evals == anderson(f, h0, m=3).n_evals
    assert broyden(f, h0, memory=whole(2)).n_evals == broyden(f, h0, memory=2).n_evals
    assert spectral_radius(f, h0, n_iter=whole(4)).shape == (2,)
    assert jacobian_regularization(f, h0, n_vectors=whole(2)) > 0


@pytest.mark.parametrize("wrong", [True, np.True_, torch.tensor(True), 2.0, np.float64(2), "2", None, 0, np.int64(0)])
def test_what_is_no_whole_number_is_refused(wrong):
    f, h0 = lambda h: torch.tanh(0.5 * h + 1), torch.ones(2, 3)
    for options in (dict(k=wrong), dict(max_iter=wrong), dict(grad="npg", k=wrong),
                    dict(grad="implicit", backward_max_iter=wrong)):
        with pytest.raises(ValueError, match="must be an integer >= 1"):
            equilibrium(f, h0, **options)


def test_transforms_of_torch_func_are_right_or_name_the_way_out():
    """Forward mode is not switched off by no_grad: under it h* would have no tangent, and nobody would know."""
    layer, u = layer_and_input()
    out = lambda u, grad: equilibrium(lambda h: torch.tanh(0.4 * layer(h) + u), torch.zeros_like(u), grad=grad, k=60,
                                      lam=1.0, tol=1e-13)[0].sum(1)
    right = torch.func.jacrev(lambda u: plain(lambda h: h, u).sum(1) * 0 + out(u, "upg"))(u)
    torch.testing.assert_close(torch.func.grad(lambda u: out(u, "upg").sum())(u), right.sum(0))
    vectorized = lambda grad: torch.autograd.functional.jacobian(lambda u: out(u, grad), u, vectorize=True)
    for grad in ("upg", "npg"):
        torch.testing.assert_close(vectorized(grad), right)
    for grad in GRADS:
        for under in (contextlib.nullcontext(), torch.no_grad()):
            with under, pytest.raises(RuntimeError, match="equilibrium: forward-mode .* use reverse mode"):
                torch.func.jvp(lambda u: out(u, grad), (u,), (torch.ones_like(u),))
        with pytest.raises(RuntimeError, match="equilibrium: .*call vmap inside f"):
            torch.func.vmap(lambda u: out(u[None], grad))(u)
        if grad != "upg":
            with pytest.raises(RuntimeError, match="equilibrium: .*use grad='upg' under torch.func.grad"):
                torch.func.grad(lambda u: out(u, grad).sum())(u)
    with pytest.raises(RuntimeError, match="equilibrium: .*vmap"):
        vectorized("implicit")
    with pytest.raises(RuntimeError, match="equilibrium: .*vmap"):
        torch.func.vmap(lambda u: equilibrium(lambda h: torch.tanh(0.4 * layer(h) + u), torch.zeros_like(u), max_iter=3,
                                              grad="bptt", solver=fixed_point)[0])(u[:, None])
    with pytest.raises(RuntimeError, match="equilibrium: .*vmap"):
        torch.func.vmap(lambda u: spectral_radius(lambda h: torch.tanh(0.4 * layer(h) + u), u[None]))(u)


@pytest.mark.parametrize("grad", GRADS)
def test_per_sample_weights_by_vmap_inside_f(grad):
    """The recipe for ensembles and per-sample gradients: vmap inside f, one copy of the weights per row."""
    layer, u = layer_and_input()
    options = dict(grad=grad, tol=1e-13, backward_tol=1e-13)
    many = {n: p.detach().expand(4, *p.shape).clone().requires_grad_() for n, p in layer.named_parameters()}
    call = torch.func.vmap(lambda p, x: torch.func.functional_call(layer, p, (x,)))
    h, _ = equilibrium(lambda h: torch.tanh(0.4 * call(many, h) + u), torch.zeros_like(u), **options)
    h.pow(3).sum().backward()
    for i in range(4):
        layer.zero_grad()
        equilibrium(lambda h: torch.tanh(0.4 * layer(h) + u[i:i + 1]), torch.zeros(1, 6, dtype=u.dtype),
                    **options)[0].pow(3).sum().backward()
        torch.testing.assert_close(many["weight"].grad[i], layer.weight.grad)


@pytest.mark.parametrize("grad", GRADS)
def test_selective_checkpointing_works_or_names_the_way_out(grad):
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE

    layer, u = layer_and_input()
    context = functools.partial(create_selective_checkpoint_contexts, policy)
    f = lambda h: checkpoint(lambda h: torch.tanh(0.4 * layer(h) + u), h, use_reentrant=False, context_fn=context)
    h, _ = equilibrium(f, torch.zeros_like(u), grad=grad)
    if grad == "upg":
        h.sum().backward()
        assert layer.weight.grad.norm() > 0
    else:
        with pytest.raises(RuntimeError, match="selective activation checkpointing refuses: use grad='upg'"):
            h.sum().backward()


@pytest.mark.parametrize("grad", GRADS)
def test_one_dropout_mask_per_solve(grad):
    """The recipe: a new mask per call has no fixed point; one seed per solve has, and leaves the generator alone."""
    layer, u = layer_and_input()
    drop, seed = nn.Dropout(0.2), int(torch.randint(2 ** 31, ()))

    def f(h):
        with torch.random.fork_rng(devices=[h.device] if h.is_cuda else []):
            torch.manual_seed(seed)
            return torch.tanh(0.4 * layer(drop(h)) + u)

    fresh = equilibrium(lambda h: torch.tanh(0.4 * layer(drop(h)) + u), torch.zeros_like(u), grad=grad)[1]
    before = torch.get_rng_state()
    h, result = equilibrium(f, torch.zeros_like(u), grad=grad)
    h.sum().backward()
    assert result.converged.all() and not fresh.converged.all() and torch.equal(before, torch.get_rng_state())


class Pair(NamedTuple):
    a: torch.Tensor
    b: list


STRUCTURES = {"nested": (lambda a, b, c: (a, [b, {"c": c}]), lambda h: (h[0], h[1][0], h[1][1]["c"])),
              "dict": (lambda a, b, c: {"a": a, "b": b, "c": c}, lambda h: (h["a"], h["b"], h["c"])),
              "named tuple": (lambda a, b, c: Pair(a, [b, c]), lambda h: (h.a, *h.b))}


@pytest.mark.parametrize("pack, unpack", STRUCTURES.values(), ids=STRUCTURES)
def test_a_state_may_be_any_pytree(pack, unpack):
    """Solvers, gradients and diagnostics give what a plain tuple gives, in the structure of h0."""
    torch.manual_seed(0)
    us = [torch.randn(3, d, dtype=torch.float64, requires_grad=True) for d in (2, 3, 4)]
    W = 0.2 * torch.randn(9, 9, dtype=torch.float64)

    def f(parts):
        return torch.tanh(torch.cat(parts, 1) @ W + torch.cat(us, 1)).split((2, 3, 4), dim=1)

    zeros = [torch.zeros_like(u) for u in us]
    for solver in (fixed_point, anderson, broyden):
        for grad in (*GRADS, "bptt"):
            if grad == "bptt" and solver is not fixed_point:
                continue
            found = []
            for run, h0, out in ((f, tuple(zeros), tuple), (lambda h: pack(*f(unpack(h))), pack(*zeros), unpack)):
                h, result = equilibrium(run, h0, grad=grad, solver=solver, max_iter=30)
                assert type(h) is type(h0) is type(result.h)
                found.append((*torch.autograd.grad(sum(p.pow(2).sum() for p in out(h)), us), *out(result.h),
                              result.residual))
            for a, b in zip(*found):
                assert torch.equal(a, b)
    torch.manual_seed(1)
    rho = spectral_radius(f, tuple(zeros))
    torch.manual_seed(1)
    assert torch.equal(rho, spectral_radius(lambda h: pack(*f(unpack(h))), pack(*zeros)))


def test_a_dict_goes_by_its_keys_and_not_by_their_order():
    h0 = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}
    result = broyden(lambda h: {"b": 0.5 * h["b"] + 2, "a": 0.5 * h["a"] + 1}, h0)
    torch.testing.assert_close(result.h, {"a": torch.full((2, 3), 2.0), "b": torch.full((2, 3), 4.0)})
    h = upg(lambda h: {"b": 0.5 * h["b"] + 2, "a": 0.5 * h["a"] + 1}, result.h, k=2)
    torch.testing.assert_close(h, result.h)
    for wrong in (lambda h: {"a": h["a"]}, lambda h: {**h, "c": h["a"]}, lambda h: (h["a"], h["b"]),
                  lambda h: {"a": h["a"], "b": None}):
        for call in (broyden, upg, npg, implicit, equilibrium):
            with pytest.raises(ValueError, match="f must return a state of the shape of h0"):
                call(wrong, h0)


def test_states_that_are_no_real_dense_tensors_are_refused():
    nested = [torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(5, 4)], layout=layout)
              for layout in (torch.jagged, torch.strided)]
    for h0 in (*nested, torch.zeros(2, 3, dtype=torch.cfloat), torch.eye(3).to_sparse(), torch.zeros(2, 3).long(),
               torch.zeros(()), (torch.zeros(2, 3), None), (), "h", (torch.zeros(2, 3), torch.zeros(3, 3))):
        for call in (fixed_point, anderson, broyden, equilibrium, upg, npg, implicit, spectral_radius,
                     jacobian_regularization):
            with pytest.raises(ValueError, match="h0 must be|of h0 differ|view_as_real"):
                call(lambda h: h, h0)
    for call in (fixed_point, anderson, broyden, equilibrium, upg, npg, implicit, spectral_radius):
        with pytest.raises(ValueError, match="of real floating-point numbers.*complex64 returned"):
            call(lambda h: 0.5 * h + 1j, torch.zeros(2, 3))
        with pytest.raises(ValueError, match="of real floating-point numbers.*int64 returned"):
            call(lambda h: h.long(), torch.zeros(2, 3))


@pytest.mark.parametrize("grad", [*GRADS, "bptt"])
def test_a_complex_state_as_real_numbers(grad):
    """The recipe of the refusal.  Linear, so the truth is (I - a)^-1 u, and dL/du for L = sum |h|^2."""
    a = torch.diag(torch.tensor([0.3 + 0.4j, -0.2 + 0.5j, 0.6j], dtype=torch.cdouble))
    u = torch.randn(4, 3, dtype=torch.cdouble, generator=torch.Generator().manual_seed(0), requires_grad=True)
    f = lambda h: torch.view_as_real(torch.view_as_complex(h) @ a + u)
    h, _ = equilibrium(f, torch.zeros(4, 3, 2, dtype=torch.double), grad=grad, k=100, lam=1.0, tol=1e-14, max_iter=100,
                       backward_tol=1e-14, solver=fixed_point)
    star = u / (1 - a.diagonal())
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), u) for loss in (h.square(), star.abs().square())))


@pytest.mark.parametrize("grad", [*GRADS, "bptt"])
@pytest.mark.parametrize("graph", [True, False])
def test_an_f_that_changes_its_argument_is_refused_and_h0_stays(grad, graph):
    h0 = torch.zeros(4, 6)
    with torch.set_grad_enabled(graph), pytest.raises(ValueError, match="must not change its argument in place"):
        equilibrium(lambda h: h.add_(0.1).tanh_(), h0, grad=grad, solver=fixed_point, max_iter=5)
    assert (h0 == 0).all()


def test_diagnostics_need_derivatives():
    """Under inference_mode enable_grad has no effect: rho was 0.  Under no_grad they are right."""
    layer, u = layer_and_input()
    f = lambda h: torch.tanh(layer(h) + u)
    calls = {"rho": lambda f: spectral_radius(f, u), "jacobian": lambda f: jacobian_regularization(f, u),
             "compare": lambda f: compare_gradients(f, u, lambda h: h.sum(), layer)}
    for name, call in calls.items():
        with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode.*no_grad"):
            call(f)
        if name != "compare":
            with pytest.raises(ValueError, match="f has no derivative"):
                call(torch.no_grad()(f))
        found = []
        for mode in (torch.no_grad(), torch.enable_grad()):
            torch.manual_seed(0)
            with mode:
                found.append(call(f) if name != "compare" else [row["cosine"] for row in call(f)["rows"]])
        torch.testing.assert_close(*found)


# --- layers that need a recipe: assets/porting.md, "Layers of other kinds" ---------------------------------

@pytest.mark.parametrize("solver", [fixed_point, anderson, broyden])
def test_padding_with_and_without_the_mask(solver):
    """f's output times the mask: each sequence as alone, evaluations included.  Without it the pads hide a residual."""
    torch.manual_seed(0)
    T, C, lengths, tol = 64, 8, [64, 16, 4], 1e-3
    keep = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
    q, k, v = (torch.randn(C, C, dtype=torch.float64) / C ** 0.5 for _ in range(3))
    u = torch.where(keep[..., None], torch.randn(3, T, C), 10 * torch.randn(C)).double()

    def layer(h, u, keep, masked):
        x = h + u
        a = F.scaled_dot_product_attention(x @ q, x @ k, h @ v, attn_mask=keep[:, None, :])
        y = F.layer_norm(u + 0.4 * a, (C,))
        return y * keep[..., None] if masked else y

    def solve(masked, u, keep):
        return solver(lambda h: layer(h, u, keep, masked), torch.zeros_like(u), max_iter=100, tol=tol)

    diluted, right = (solve(masked, u, keep) for masked in (False, True))
    worst = 0
    for i, n in enumerate(lengths):
        alone = solve(False, u[i:i + 1, :n], keep[i:i + 1, :n])
        torch.testing.assert_close(right.h[i:i + 1, :n], alone.h, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(right.residual[i:i + 1], alone.residual, rtol=1e-9, atol=1e-13)
        h = diluted.h[i:i + 1, :n]
        d = layer(h, u[i:i + 1, :n], keep[i:i + 1, :n], False) - h
        worst = max(worst, (d.norm() / (h + d).norm() / diluted.residual[i]).item())
    assert right.converged.all() and diluted.converged.all() and worst > 2


@pytest.mark.parametrize("backward_solver", [gmres, broyden, anderson, fixed_point])
def test_batch_norm_inside_f_makes_the_batch_one_sample(backward_solver):
    """offsets = [0, N].  Against the dense (I - J^T)^-1 of the whole batch."""
    torch.manual_seed(0)
    layer, norm = nn.Linear(4, 4).double(), nn.BatchNorm1d(4).double()
    u, whole = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 6])
    f = lambda h, u=u: torch.tanh(0.2 * norm(layer(h)) + u)
    h, result = equilibrium(f, torch.zeros_like(u), grad="implicit", tol=1e-12, max_iter=200, backward_tol=1e-12,
                            backward_max_iter=400, backward_solver=backward_solver, offsets=whole)
    assert result.converged.all() and result.residual.shape == (1,)
    got, = torch.autograd.grad(h.pow(3).sum(), u)
    J, B = torch.autograd.functional.jacobian(f, (h.detach(), u.detach()))
    g = 3 * h.detach().pow(2).flatten()
    right = B.reshape(24, 24).T @ torch.linalg.solve(torch.eye(24).double() - J.reshape(24, 24).T, g)
    torch.testing.assert_close(got.flatten(), right, rtol=1e-8, atol=1e-10)


def test_converged_is_of_the_equation_and_not_of_stability():
    """README's row: Broyden ends at an unstable fixed point, where plain steps leave, and UPG's sign is wrong."""
    torch.manual_seed(0)
    v = torch.ones(16, dtype=torch.float64) / 4
    R = torch.randn(16, 16, dtype=torch.float64)
    R = 0.4 * R / torch.linalg.matrix_norm(R, 2)
    W, t = 2 * torch.outer(v, v) + R - torch.outer(v, v @ R), torch.zeros((), dtype=torch.float64, requires_grad=True)
    u = 0.1 * torch.randn(32, 16, dtype=torch.float64) + 0.1
    f = lambda h: torch.tanh(h @ W.T + u + t)
    found, plain_one, warm = (solver(f, start, max_iter=300, tol=1e-10) for solver, start in (
        (broyden, torch.zeros_like(u)), (fixed_point, torch.zeros_like(u)), (broyden, plain(f, torch.zeros_like(u)))))
    unstable = (spectral_radius(f, found.h) > 1) & found.converged
    assert unstable.any() and not (spectral_radius(f, plain_one.h) > 1).any()
    assert not ((spectral_radius(f, warm.h) > 1) & warm.converged).any()
    left = (plain(f, found.h + 1e-6) - found.h).norm(dim=1)
    assert (left[unstable] > 1e-4).all()
    exact, short = (torch.autograd.grad((h @ v)[unstable].sum(), t)[0] for h in (implicit(f, found.h, tol=1e-9),
                                                                                upg(f, found.h)))
    assert exact < 0 < short


def test_onnx_runs_fixed_point(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    model, x = Inference(fixed_point).eval(), torch.randn(5, 6)
    torch.onnx.export(model, (torch.randn(3, 6),), tmp_path / "x.onnx", dynamo=True,
                      dynamic_shapes=({0: torch.export.Dim("N", min=2, max=64)},))
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    found, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x))
