"""The gradients UPG, NPG, implicit and BPTT against dense algebra, the engine they live in, and the diagnostics."""
import functools
import gc
import inspect
import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from common import (adaptive_damping, anderson, broyden, compare_gradients, cosine_similarity, equilibrium, fixed_point,
                    gmres, implicit, jacobian_regularization, npg, recomputed, spectral_radius, upg)

GRADS = ["upg", "npg", "implicit"]
EXACT = dict(max_iter=300, tol=1e-14, backward_max_iter=300, backward_tol=1e-14)


def problem(lip=0.8, N=1, D=6, seed=0):
    """A tanh layer: f, w, u, h0, and its equilibrium to rounding.  w and u want gradients."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(D, D, generator=g, dtype=torch.float64)
    w = (lip * w / torch.linalg.matrix_norm(w, 2)).requires_grad_()
    u = torch.randn(N, D, generator=g, dtype=torch.float64, requires_grad=True)

    def f(h):
        return torch.tanh(h @ w + u)

    h0 = torch.zeros(N, D, dtype=torch.float64)
    return f, w, u, h0, fixed_point(f, h0, max_iter=1000, tol=1e-16).h


def dense(f, w, h):
    """J[i, j] = df_i/dh_j and P[i, :] = df_i/dw, both at the single sample h."""
    j = torch.autograd.functional.jacobian(f, h)[0, :, 0]
    out = f(h.detach())[0]
    p = torch.stack([torch.autograd.grad(o, w, retain_graph=True)[0].flatten() for o in out])
    return j, p


def pull(h, w, g):
    return torch.autograd.grad(h, w, g, retain_graph=True)[0].flatten()


@pytest.mark.parametrize("k, lam", [(1, 1.0), (1, 0.5), (3, 0.5), (5, 0.8), (20, 0.1)])
def test_npg_is_equation_17(k, lam):
    """lam (I + B^T + ... + (B^T)^(k-1)) with a dense Jacobian, at any state; Algorithms 2 and 3 give lam times it."""
    f, w, _, _, _ = problem()
    h = torch.randn(1, 6, dtype=torch.float64)
    g = torch.randn(1, 6, dtype=torch.float64)
    j, p = dense(f, w, h)
    b = lam * j + (1 - lam) * torch.eye(6, dtype=j.dtype)
    g_hat = lam * sum(torch.linalg.matrix_power(b.T, i) @ g[0] for i in range(k))
    torch.testing.assert_close(pull(npg(f, h, k, lam), w, g), p.T @ g_hat, rtol=1e-10, atol=1e-12)


def test_what_npg_misses_is_exactly_b_to_the_k_of_the_exact_gradient():
    """exact - NPG = P^T (B^T)^k (I - J^T)^-1 g."""
    f, w, _, _, h = problem()
    g = torch.randn(1, 6, dtype=torch.float64)
    j, p = dense(f, w, h)
    eye = torch.eye(6, dtype=j.dtype)
    exact = torch.linalg.solve(eye - j.T, g[0])
    for k, lam in ((2, 0.5), (7, 0.9)):
        b = lam * j + (1 - lam) * eye
        missing = p.T @ (torch.linalg.matrix_power(b.T, k) @ exact)
        torch.testing.assert_close(p.T @ exact - pull(npg(f, h, k, lam), w, g), missing, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k, lam", [(1, 1.0), (4, 0.5), (6, 0.9)])
def test_upg_is_equation_16(k, lam):
    """Explicit matrices along the trajectory, from a start far away from h*."""
    f, w, _, _, _ = problem()
    h = 2 * torch.randn(1, 6, dtype=torch.float64)
    g = torch.randn(1, 6, dtype=torch.float64)
    state, trajectory = h, []
    for _ in range(k):
        trajectory.append(state)
        state = ((1 - lam) * state + lam * f(state)).detach()
    expected, v = 0, g[0]
    for state_t in reversed(trajectory):
        j, p = dense(f, w, state_t)
        expected = expected + lam * p.T @ v
        v = lam * j.T @ v + (1 - lam) * v
    out = upg(f, h, k, lam)
    torch.testing.assert_close(out.detach(), state)
    torch.testing.assert_close(pull(out, w, g), expected, rtol=1e-10, atol=1e-12)


def test_upg_and_npg_agree_at_a_fixed_point_and_not_elsewhere():
    f, w, _, _, h = problem()
    g = torch.randn(1, 6, dtype=torch.float64)
    torch.testing.assert_close(pull(upg(f, h, 5, 0.5), w, g), pull(npg(f, h, 5, 0.5), w, g), rtol=1e-9, atol=1e-12)
    away = h + 1
    assert (pull(upg(f, away, 5, 0.5), w, g) - pull(npg(f, away, 5, 0.5), w, g)).norm() > 1e-3


@pytest.mark.parametrize("lam", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("grad", ["upg", "npg"])
def test_phantom_gradients_tend_to_the_exact_one(grad, lam):
    """Theorem 2, for every lam in (0, 1]; ||B|| <= 1 - lam + 0.8 lam <= 0.98, and 0.98^1500 < 1e-13."""
    f, w, u, h0, h = problem()
    j, p = dense(f, w, h)
    expected = p.T @ torch.linalg.solve(torch.eye(6, dtype=j.dtype) - j.T, 2 * h[0])
    out, _ = equilibrium(f, h0, grad=grad, k=1500, lam=lam, **EXACT)
    torch.testing.assert_close(pull(out.square().sum(), w, None), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("solver", [fixed_point, anderson, broyden, gmres])
def test_implicit_is_the_dense_solve(solver):
    f, w, _, h0, h = problem()
    j, p = dense(f, w, h)
    expected = p.T @ torch.linalg.solve(torch.eye(6, dtype=j.dtype) - j.T, 2 * h[0])
    out, _ = equilibrium(f, h0, grad="implicit", backward_solver=solver, **EXACT)
    torch.testing.assert_close(pull(out.square().sum(), w, None), expected, rtol=1e-8, atol=1e-10)


def test_implicit_passes_gradcheck():
    """Finite differences through the whole solve, in w and u."""
    _, w, u, h0, _ = problem(D=3)

    def solve(w, u):
        return equilibrium(lambda h: torch.tanh(h @ w + u), h0, grad="implicit", **EXACT)[0]

    assert torch.autograd.gradcheck(solve, (w, u), eps=1e-6, atol=1e-6)


def test_bptt_is_plain_autograd_through_the_iteration():
    f, w, _, h0, _ = problem()
    out, result = equilibrium(f, h0, grad="bptt", solver=fixed_point, max_iter=7, stop_mode="abs")
    h = h0
    for _ in range(7):
        h = f(h)
    torch.testing.assert_close(out, h, rtol=0, atol=0)
    torch.testing.assert_close(pull(out.square().sum(), w, None), pull(h.square().sum(), w, None), rtol=1e-12, atol=0)
    assert result.n_evals == 8
    change = (f(h) - h).detach()
    torch.testing.assert_close(result.residual, change.norm(dim=1))
    for mode, expected in (("max", change.abs().amax(1)), ("rel", change.norm(dim=1) / f(h).detach().norm(dim=1))):
        _, result = equilibrium(f, h0, grad="bptt", solver=fixed_point, max_iter=7, stop_mode=mode)
        torch.testing.assert_close(result.residual, expected)


def test_bptt_tends_to_the_exact_gradient():
    """Lipschitz constant 0.8: what 200 steps leave out is below 200 x 0.8^200 = 1e-17 of it."""
    f, w, _, h0, h = problem()
    j, p = dense(f, w, h)
    expected = p.T @ torch.linalg.solve(torch.eye(6, dtype=j.dtype) - j.T, 2 * h[0])
    out, _ = equilibrium(f, h0, grad="bptt", solver=fixed_point, max_iter=200)
    torch.testing.assert_close(pull(out.square().sum(), w, None), expected, rtol=1e-9, atol=1e-11)


def test_the_gradient_of_a_batch_is_that_of_its_samples():
    """Also while the backward solve is far from converged: 4 iterations."""
    f, w, u, h0, _ = problem(N=4, lip=0.95)
    results = []
    options = dict(grad="implicit", max_iter=60, tol=0, backward_max_iter=4, backward_tol=0)
    whole = equilibrium(f, h0, **options, on_backward=results.append)[0]
    whole = torch.autograd.grad(whole.pow(3).sum(), u)[0]
    assert results[0].residual.max() > 1e-3
    for i in range(4):
        alone = equilibrium(lambda h: torch.tanh(h @ w + u[i:i + 1]), h0[i:i + 1], **options)[0]
        alone = torch.autograd.grad(alone.pow(3).sum(), u)[0]
        torch.testing.assert_close(alone[i], whole[i], rtol=1e-9, atol=1e-12)


def test_the_one_step_gradient_is_k_1_lam_1():
    """Jacobian-free back-propagation: P^T g."""
    f, w, _, _, h = problem()
    g = torch.randn(1, 6, dtype=torch.float64)
    for phantom in (upg, npg):
        torch.testing.assert_close(pull(phantom(f, h, 1, 1.0), w, g), dense(f, w, h)[1].T @ g[0])


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("grad", GRADS)
def test_states_of_several_tensors_get_the_gradient_of_their_concatenation(grad, kind):
    f, w, u, h0, _ = problem(N=3)

    def split(h):
        return kind(f(torch.cat(tuple(h), dim=1)).split([2, 4], dim=1))

    options = dict(grad=grad, k=4, lam=0.7, **EXACT)
    whole, _ = equilibrium(f, h0, **options)
    parts, _ = equilibrium(split, kind(h0.split([2, 4], dim=1)), **options)
    assert type(parts) is kind
    for a, b in zip(torch.autograd.grad(whole.pow(3).sum(), (w, u)),
                    torch.autograd.grad(sum(p.pow(3).sum() for p in parts), (w, u))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("grad", GRADS)
def test_a_loss_may_look_at_one_part_of_the_state(grad):
    """The others' incoming gradient is zero, and reaches u through the part that is looked at."""
    f, w, u, h0, _ = problem(N=3)

    def split(h):
        return tuple(f(torch.cat(tuple(h), dim=1)).split([2, 4], dim=1))

    options = dict(grad=grad, k=4, lam=0.7, **EXACT)
    whole, _ = equilibrium(f, h0, **options)
    parts, _ = equilibrium(split, tuple(h0.split([2, 4], dim=1)), **options)
    for a, b in zip(torch.autograd.grad(whole[:, 2:].pow(3).sum(), (w, u)),
                    torch.autograd.grad(parts[1].pow(3).sum(), (w, u))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("grad", GRADS)
def test_a_parameter_that_f_cancels_receives_exactly_zero_and_the_start_nothing(grad):
    f, w, _, h0, _ = problem(N=3)
    cancelled = torch.ones(6, dtype=torch.float64, requires_grad=True)
    h0.requires_grad_()
    h, _ = equilibrium(lambda h: f(h) + 0 * cancelled, h0, grad=grad)
    h.square().sum().backward()
    assert (cancelled.grad == 0).all() and w.grad.abs().sum() > 0 and h0.grad is None


@pytest.mark.parametrize("phantom", [upg, npg, implicit])
def test_the_state_that_a_gradient_starts_from_is_held_fixed(phantom):
    """Eq. (16) and (17) are gradients to u and theta; h* is where they are taken."""
    f, w, _, _, h = problem()
    h.requires_grad_()
    phantom(f, h).sum().backward()
    assert h.grad is None and w.grad.abs().sum() > 0


@pytest.mark.parametrize("grad, expected", [("upg", 0.875), ("npg", 0.875), ("implicit", 1.0)])
def test_a_map_that_ignores_the_state_has_j_zero(grad, expected):
    """J = 0: lam (1 + (1 - lam) + (1 - lam)^2) = 1 - (1 - lam)^3 of the exact gradient, which is that of 2 u."""
    u = torch.ones(2, 3, requires_grad=True)
    h, _ = equilibrium(lambda h: 2 * u, torch.zeros(2, 3), grad=grad, k=3, lam=0.5)
    torch.testing.assert_close(torch.autograd.grad(h.sum(), u)[0], torch.full((2, 3), 2 * expected))


@pytest.mark.parametrize("grad", GRADS)
def test_a_part_of_the_state_may_be_a_constant(grad):
    """f returns a tensor without a graph for it: its row of J is zero; the rest is the problem with that constant."""
    f, w, u, h0, _ = problem(N=3)
    c = torch.full_like(h0, 0.3)
    options = dict(grad=grad, k=4, lam=0.7, **EXACT)
    whole, _ = equilibrium(lambda h: torch.tanh(h @ w + u + c), h0, **options)
    parts, _ = equilibrium(lambda h: (torch.tanh(h[0] @ w + u + h[1]), c), (h0, h0), **options)
    for a, b in zip(torch.autograd.grad(whole.pow(3).sum(), (w, u)),
                    torch.autograd.grad(parts[0].pow(3).sum(), (w, u))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


class Layer(nn.Module):
    """A small equilibrium layer, as a user would write it."""

    def __init__(self, grad="upg", D=5, lip=0.5, **options):
        super().__init__()
        self.linear, self.unused, self.options = nn.Linear(D, D), nn.Linear(D, D), dict(grad=grad, k=3, **options)
        with torch.no_grad():
            self.linear.weight *= lip / torch.linalg.matrix_norm(self.linear.weight, 2)

    def forward(self, u):
        return equilibrium(lambda h: torch.tanh(self.linear(h) + u), torch.zeros_like(u), **self.options)[0]


def layer(grad, **options):
    torch.manual_seed(0)
    return Layer(grad, **{**dict(max_iter=60, tol=1e-12, backward_max_iter=60, backward_tol=1e-12), **options}).double()


@pytest.mark.parametrize("grad", GRADS)
def test_two_calls_in_one_forward_and_two_backwards_over_one_graph(grad):
    """Public codes hang on the first and silently return the one-step gradient on the second."""
    model, u, v = layer(grad), *torch.randn(2, 3, 5, dtype=torch.float64)
    params = list(model.linear.parameters())
    loss = model(u).square().sum() + model(v).sum()
    once = torch.autograd.grad(loss, params, retain_graph=True)
    twice = torch.autograd.grad(loss, params)
    alone = [torch.autograd.grad(x, params) for x in (model(u).square().sum(), model(v).sum())]
    for a, b, c, d in zip(once, twice, *alone):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, c + d, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("grad", GRADS)
def test_a_forward_with_or_without_a_backward_frees_its_memory(grad, backward):
    """By reference counts alone: no cycle waits for the garbage collector."""
    w = torch.full((1, 5), 0.3, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        u = torch.ones(3, 5).requires_grad_() * 1       # kept by the product in f, and by nothing else
        alive = weakref.ref(u)
        h, result = equilibrium(lambda h, u=u: torch.tanh(h * w) * u, torch.zeros(3, 5), grad=grad, max_iter=4)
        del u
        assert alive() is not None
        if backward:
            h.sum().backward()
        del h, result
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("grad", GRADS)
def test_memory_is_flat_over_50_steps(grad):
    model = layer(grad, max_iter=5, backward_max_iter=5, tol=0, backward_tol=0)
    optimizer = torch.optim.SGD(model.linear.parameters(), lr=1e-3)

    def step():
        model(torch.randn(3, 5, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    step()
    before = tensors()
    for _ in range(50):
        step()
    assert tensors() <= before


@pytest.mark.parametrize("loss", [torch.sum, lambda h: h.square().sum()])
@pytest.mark.parametrize("grad", ["npg", "implicit"])
def test_a_second_derivative_is_refused(grad, loss):
    """It would be silently wrong: J depends on h, and the backward solve is not differentiated.

    Also where the loss is linear and dL/dh a constant, and where autograd.grad asks for u alone.
    """
    model, u = layer(grad), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(loss(model(u)), u, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.sum(), u)


def test_upg_has_a_second_derivative():
    """That of its k-step graph, h* held fixed."""
    _, w, u, h0, h = problem(D=3)
    assert torch.autograd.gradgradcheck(lambda u: upg(lambda h: torch.tanh(h @ w.detach() + u), h, 3, 0.5), (u,))


@pytest.mark.parametrize("grad", GRADS)
def test_the_gradient_depends_on_grad_mode_alone(grad):
    """Fine-tuning in eval mode gets a gradient; under no_grad only the solver runs, without an unrolled step."""
    calls = []

    def f(h):
        calls.append(torch.is_grad_enabled())
        return torch.tanh(0.5 * h + w)

    w = torch.ones(1, 4, requires_grad=True)
    with torch.no_grad():
        h, result = equilibrium(f, torch.zeros(2, 4), grad=grad, k=3, max_iter=6, tol=0)
    assert not h.requires_grad and len(calls) == result.n_evals == 7 and not any(calls)
    calls.clear()
    h, result = equilibrium(f, torch.zeros(2, 4), grad=grad, k=3, max_iter=6, tol=0)
    assert h.requires_grad and sum(calls) == (3 if grad == "upg" else 1)
    model = layer(grad).eval()
    model(torch.randn(2, 5, dtype=torch.float64)).sum().backward()
    assert model.linear.weight.grad.abs().sum() > 0 and model.unused.weight.grad is None


@pytest.mark.parametrize("grad", GRADS)
def test_the_value_is_the_state_of_the_same_solve(grad):
    """h* for npg and implicit, where evaluation takes the loss; the k-th damped step from h* for upg."""
    f, _, _, h0, _ = problem()
    with torch.no_grad():
        h_star, _ = equilibrium(f, h0, max_iter=3, tol=0)
        expected = h_star
        for _ in range(2 if grad == "upg" else 0):
            expected = 0.5 * expected + 0.5 * f(expected)
    h, _ = equilibrium(f, h0, grad=grad, k=2, lam=0.5, max_iter=3, tol=0)
    torch.testing.assert_close(h.detach(), expected)


@pytest.mark.parametrize("grad", GRADS)
def test_bf16_autocast_reaches_convolutions_and_several_resolutions(grad):
    """Weights are leaves, cast and cached by autocast; backward inside of it too.

    bf16 has 8 bits of mantissa, 0.4 % per operation; a few operations in a row: cosine above 0.999, norm to 3 %.
    """
    torch.manual_seed(0)
    convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)])
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        for conv in convs:
            conv.weight *= 0.3

    def f(h):
        high = convs[0](h[0]) + 0.2 * nn.functional.interpolate(h[1], scale_factor=2.0)
        return torch.tanh(high + x), torch.tanh(convs[1](h[1]) + 0.5 * nn.functional.avg_pool2d(h[0], 2))

    def gradient(starts):
        def watched(f_b, start, **options):
            starts.extend(start)
            return broyden(f_b, start, **options)

        h, _ = equilibrium(f, (torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 4, 4)), grad=grad, max_iter=12, tol=0,
                           backward_solver=watched, backward_max_iter=12, backward_tol=0)
        assert all(p.dtype == torch.float32 for p in h)
        return torch.autograd.grad(sum(p.square().sum() for p in h), list(convs.parameters()))

    exact = gradient([])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert convs[0](x).dtype == torch.bfloat16
        rough = gradient(starts := [])
    assert len(starts) == (2 if grad == "implicit" else 0) and all(p.dtype == torch.float32 for p in starts)
    assert cosine_similarity(rough, exact) > 0.999
    for a, b in zip(rough, exact):
        assert abs(a.norm() / b.norm() - 1) < 0.03


@pytest.mark.parametrize("grad", GRADS)
def test_f_may_return_a_lower_precision(grad):
    """As where a layer ends in an operation that autocast runs in bf16: state and backward solve stay float32.

    8 bits of mantissa, 0.4 % per call of f: cosine above 0.999.
    """
    _, w, u, h0, _ = problem(N=3)
    w, u = (p.detach().float().requires_grad_() for p in (w, u))

    def gradient(dtype):
        h, _ = equilibrium(lambda h: torch.tanh(h @ w + u).to(dtype), h0.float(), grad=grad, max_iter=20, tol=0,
                           backward_max_iter=20, backward_tol=0)
        assert h.dtype == torch.float32
        return torch.autograd.grad(h.square().sum(), (w, u))

    assert cosine_similarity(gradient(torch.bfloat16), gradient(torch.float32)) > 0.999


def saved_bytes(make):
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = make()
    return sum(kept.values()), out


def test_npgs_memory_does_not_grow_with_k_and_upgs_does():
    """Table 2: one graph of f against k graphs."""
    f, _, _, _, h = problem(N=64, D=32)
    memory = {(p, k): saved_bytes(lambda: p(f, h, k, 0.5))[0] for p in (upg, npg) for k in (1, 10, 20)}
    assert memory[npg, 20] == memory[npg, 1]
    assert saved_bytes(lambda: implicit(f, h))[0] == memory[npg, 1]
    step = memory[upg, 10] - memory[upg, 1]
    assert step > 0 and abs((memory[upg, 20] - memory[upg, 10]) / step - 10 / 9) < 0.05


def test_upg_of_a_recomputed_f_keeps_a_state_per_step_and_gives_the_same_gradient():
    f, w, u, _, h = problem(N=64, D=32)
    memory = {k: saved_bytes(lambda: upg(recomputed(f), h, k, 0.5))[0] for k in (1, 5, 9)}
    state = h.numel() * h.element_size()
    assert memory[9] - memory[5] == memory[5] - memory[1] == 4 * state
    grads = []
    for g in (f, recomputed(f)):
        loss = upg(g, h, 5, 0.5).square().sum()
        grads.append(torch.autograd.grad(loss, [w, u]))
    assert all(map(torch.equal, *grads))


class Counted(torch.autograd.Function):
    """The identity, counting the backward passes through it."""

    @staticmethod
    def forward(ctx, h, count):
        ctx.count = count
        return h.view_as(h)

    @staticmethod
    def backward(ctx, g):
        ctx.count.append(None)
        return g, None


def test_the_backward_pass_costs_what_the_docstring_says():
    """NPG: k - 1 products, and one into the parameters.  Implicit: one per evaluation of its solver, and one."""
    f, w, _, h0, _ = problem()
    for k in (1, 5):
        count = []
        npg(lambda h: f(Counted.apply(h, count)), h0, k, 0.5).sum().backward()
        assert len(count) == k - 1 + 1
    count, results = [], []
    implicit(lambda h: f(Counted.apply(h, count)), h0, max_iter=7, tol=0, on_backward=results.append).sum().backward()
    assert len(count) == results[0].n_evals + 1 == 9


def test_the_backward_solve_starts_at_g_and_reports_itself():
    """At g times a power of two that brings its largest entry to about 1; what on_backward receives is unscaled."""
    f, w, _, h0, h = problem()
    seen, results = [], []

    def solver(f_b, start, **kwargs):
        seen.append((start[0].clone(), kwargs))
        return broyden(f_b, start, **kwargs)

    g = 1e-6 * torch.randn_like(h)
    out = implicit(f, h, solver=solver, max_iter=4, tol=0, on_backward=results.append)
    out.backward(g)
    start, kwargs = seen[0]
    scale = (start / g).unique()
    assert len(scale) == 1 and scale.log2().frac() == 0 and 0.5 <= start.abs().max() < 1
    assert torch.equal(kwargs["stop_mode"][0], start) and set(kwargs) == {"max_iter", "tol", "stop_mode"}
    j, _ = dense(f, w, h)
    g_hat = results[0].h[0][0]
    torch.testing.assert_close(results[0].residual[0], (j.T @ g_hat + g[0] - g_hat).norm() / g.norm())
    assert results[0].n_evals == 5


@pytest.mark.parametrize("kwargs, message", [
    (dict(grad="ift"), "grad must be"), (dict(k=0), "k must be"), (dict(k=2.0), "k must be"),
    (dict(lam=0), "lam must be"), (dict(lam=1.1), "lam must be"), (dict(solver="broyden"), "solver must be"),
    (dict(backward_solver="x"), "backward_solver must be"), (dict(grad="bptt", solver=broyden), "solver=fixed_point"),
    (dict(max_iter=0), "max_iter"), (dict(tol=-1), "tol"), (dict(stop_mode="l2"), "stop_mode"),
    (dict(grad="implicit", backward_max_iter=0), "backward_max_iter"),
    (dict(grad="implicit", backward_tol=-1), "backward_tol")])
def test_impossible_arguments_are_named(kwargs, message):
    """Before f is called: a solve may take long."""
    with pytest.raises(ValueError, match=message):
        equilibrium(lambda h: pytest.fail("f was called"), torch.zeros(1, 2), **kwargs)


@pytest.mark.parametrize("kwargs", [dict(lam=0), dict(lam=1.5), dict(n_iter=1), dict(n_iter=10.0)])
def test_the_spectral_radius_names_its_impossible_arguments(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        spectral_radius(torch.cos, torch.zeros(1, 2), **kwargs)


@pytest.mark.parametrize("n_vectors", [0, 1.0])
def test_jacobian_regularization_names_an_impossible_number_of_vectors(n_vectors):
    with pytest.raises(ValueError, match="n_vectors"):
        jacobian_regularization(torch.cos, torch.zeros(1, 2), n_vectors=n_vectors)


def test_jacobian_regularization_refuses_another_shape():
    for f in (lambda h: h[:, :1], lambda h: h.sum()):
        with pytest.raises(ValueError, match="of the shape of h0"):
            jacobian_regularization(f, torch.zeros(1, 2))


@pytest.mark.parametrize("grad, phantom", [("upg", upg), ("npg", npg)])
def test_the_defaults_are_five_steps_of_one_half(grad, phantom):
    f, w, _, h0, h = problem()
    g = torch.ones_like(h)
    expected = pull(phantom(f, h, 5, 0.5), w, g)
    torch.testing.assert_close(pull(phantom(f, h), w, g), expected, rtol=0, atol=0)
    torch.testing.assert_close(pull(equilibrium(f, h0, grad=grad, **EXACT)[0], w, g), expected, rtol=1e-9, atol=1e-12)


def test_the_backward_solve_has_a_tolerance_of_its_own():
    f, _, _, h0, _ = problem()
    results = []
    for tol, backward_tol in ((1e-2, 1e-9), (1e-9, 1e-2)):
        h, forward = equilibrium(f, h0, grad="implicit", tol=tol, backward_tol=backward_tol,
                                 on_backward=results.append)
        h.sum().backward()
        assert forward.converged.all() and results[-1].converged.all()
        assert (forward.residual.item() < 1e-8, results[-1].residual.item() < 1e-8) == (tol < 1e-8, backward_tol < 1e-8)


def test_a_solvers_own_arguments_are_bound_by_partial():
    f, _, _, h0, h = problem()
    out, _ = equilibrium(f, h0, solver=functools.partial(broyden, memory=4), max_iter=100, tol=1e-13)
    torch.testing.assert_close(out.detach(), h, rtol=1e-9, atol=1e-11)


# --- diagnostics -----------------------------------------------------------------------------------------------------

def linear(a):
    a = torch.as_tensor(a, dtype=torch.float64)
    return lambda h: h @ a.T


@pytest.mark.parametrize("matrix, rho, rtol", [
    ([[0.5, 0.2], [0.2, -0.7]], 0.1 + 0.4 ** 0.5, 1e-6),                                        # symmetric
    ([[0.9 * math.cos(1), -0.9 * math.sin(1)], [0.9 * math.sin(1), 0.9 * math.cos(1)]], 0.9, 1e-9),   # not 0.9 cos 1
    ([[0.9, 1.0], [0.0, 0.9]], 0.9, 0.02),                                               # defective: O(1 / n_iter)
    ([[0.0, 1.0], [0.0, 0.0]], 0.0, 1e-9), ([[0.0, 0.0], [0.0, 0.0]], 0.0, 1e-9)])
def test_spectral_radius_of_known_matrices(matrix, rho, rtol):
    torch.manual_seed(0)
    got = spectral_radius(linear(matrix), torch.zeros(3, 2, dtype=torch.float64), n_iter=100)
    torch.testing.assert_close(got, torch.full((3,), rho, dtype=torch.float64), rtol=rtol, atol=1e-12)


def test_spectral_radius_is_per_sample_damped_and_takes_tuples():
    scale = torch.tensor([[0.5], [-2.0]], dtype=torch.float64)
    h = torch.ones(2, 3, dtype=torch.float64)
    torch.testing.assert_close(spectral_radius(lambda h: scale * h, h), torch.tensor([0.5, 2.0], dtype=torch.float64))
    torch.testing.assert_close(spectral_radius(lambda h: scale * h, h, lam=0.5),
                               torch.tensor([0.75, 0.5], dtype=torch.float64))
    swap = spectral_radius(lambda h: (0.5 * h[1], 0.5 * h[0]), (h, h))
    torch.testing.assert_close(swap, torch.full((2,), 0.5, dtype=torch.float64))


def test_diagnostics_take_a_constant_part_and_a_map_that_ignores_the_state():
    """Their rows of J are zero.  ||J||_F^2 = 6 x 0.25 over 12 numbers, up to 3 sigma of 2000 vectors."""
    torch.manual_seed(0)
    h = torch.ones(2, 3, dtype=torch.float64)
    u = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(spectral_radius(lambda _: 2 * u, h), zero)
    assert jacobian_regularization(lambda _: 2 * u, h) == 0
    halved = (lambda parts: (0.5 * parts[0], h), (h, h))
    torch.testing.assert_close(spectral_radius(*halved), zero + 0.5)
    assert jacobian_regularization(*halved, n_vectors=2000).item() == pytest.approx(0.125, rel=3 * (2 / 12000) ** 0.5)


def test_jacobian_regularization_counts_every_part_and_every_sample_once():
    """E ||v^T J||^2 / (N D): J = 2 on the first part, 3 on the second.  4000 vectors of 2 x 6 normal numbers."""
    torch.manual_seed(0)
    h = [torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)]
    value = jacobian_regularization(lambda parts: [2 * parts[0], 3 * parts[1]], h, n_vectors=4000).item()
    assert value == pytest.approx((2 * 4 + 4 * 9) / 6, rel=4 * (2 / (4000 * 12)) ** 0.5 * 9 / 7.3)


def test_adaptive_damping_is_one_over_rho_clipped():
    assert adaptive_damping(torch.tensor([0.3, 0.9])) == 1.0
    assert adaptive_damping(torch.tensor([0.3, 4.0])) == 0.25
    assert adaptive_damping(1.6) == pytest.approx(1 / 1.6)         # a plain number, too
    with pytest.raises(ValueError, match="finite"):
        adaptive_damping(torch.tensor([math.nan]))


def test_jacobian_regularization_estimates_the_frobenius_norm_and_is_differentiable():
    """20000 vectors, 1000 for each of 20 samples; the relative deviation is below sqrt(2 / 20000) = 1 %, times 4."""
    torch.manual_seed(0)
    a = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    h = torch.zeros(20, 4, dtype=torch.float64)
    value = jacobian_regularization(lambda h: h @ a.T, h, n_vectors=1000)
    torch.testing.assert_close(value, a.square().sum() / 4, rtol=0.04, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, a)[0], a / 2, rtol=0.2, atol=0.1)


def test_jacobian_regularization_adds_up_in_float32():
    """In float16 a square above 65504 would be inf."""
    assert jacobian_regularization(lambda h: 300 * h, torch.zeros(2, 3, dtype=torch.float16)).isfinite()


def test_cosine_similarity_of_huge_and_of_zero_gradients():
    """In float32 the square of 1e30 would be inf; a gradient of zeros has no angle, and gets 0."""
    huge = [torch.full((2,), 1e30)]
    assert cosine_similarity(huge, huge).item() == pytest.approx(1)
    assert cosine_similarity(huge, [torch.zeros(2)]) == cosine_similarity([None], huge) == 0


def test_cosine_similarity_is_over_all_parameters():
    a, b = [torch.tensor([1.0, 0.0]), torch.tensor([[2.0]]), None], [torch.tensor([1.0, 1.0]), None, torch.ones(2)]
    torch.testing.assert_close(cosine_similarity(a, b).item(), 1 / (math.sqrt(5) * math.sqrt(4)))
    assert cosine_similarity([torch.ones(2)], [-torch.ones(2)]).item() == pytest.approx(-1)
    with pytest.raises(ValueError, match="lists of 1 and 2"):
        cosine_similarity([None], [None, None])


def test_the_backward_solves_stop_does_not_depend_on_the_scale_of_the_loss():
    """The forward stop is absolute here; an absolute backward stop would accept g itself once the loss is small."""
    f, w, _, h0, _ = problem()
    grads = []
    for scale in (1.0, 1e-8, 1e-20):
        h, _ = equilibrium(f, h0, grad="implicit", max_iter=100, tol=1e-6, stop_mode="abs", backward_tol=1e-6)
        grads.append(torch.autograd.grad(scale * h.square().sum(), w)[0] / scale)
    for grad in grads[1:]:
        torch.testing.assert_close(grads[0], grad, rtol=1e-4, atol=1e-7)


BACKWARD = [gmres, functools.partial(gmres, memory=8), broyden, anderson, fixed_point]


def matrix(rho, N=4, D=60, seed=0):
    """A J that is not normal, of that spectral radius, and a dL/dh for each of N samples."""
    g = torch.Generator().manual_seed(seed)
    J = torch.randn(D, D, generator=g, dtype=torch.float64)
    return J * (rho / torch.linalg.eigvals(J).abs().max()), torch.randn(N, D, generator=g, dtype=torch.float64)


def backward(J, g, offsets=None, **options):
    """g_hat of implicit for f(h) = h J^T + u (with offsets J h + u), which is dL/du, and the SolverResult."""
    u, results = torch.zeros_like(g, requires_grad=True), []

    def f(h):
        return u + (h @ J.T if offsets is None else J @ h)

    h = implicit(f, torch.randn_like(g), on_backward=results.append, offsets=offsets, **options)
    return torch.autograd.grad(h, u, g)[0], results[0]


def exact_of(J, g):
    return torch.linalg.solve(torch.eye(len(J), dtype=torch.float64) - J.double().T, g.double().T).T


@pytest.mark.parametrize("solver", BACKWARD)
@pytest.mark.parametrize("rho", [0.9, 1.2, 3.0])
def test_the_backward_residual_is_that_of_the_gradient_that_is_used(solver, rho):
    """Over ||g||.  Over ||g_hat|| a g_hat that explodes looks solved: Broyden claimed 0.4 of it here, and used it."""
    J, g = matrix(rho)
    g_hat, result = backward(J, g, solver=solver, max_iter=30, tol=0)
    true = (g + g_hat @ J - g_hat).norm(dim=1) / g.norm(dim=1)
    torch.testing.assert_close(result.residual, true, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(result.h[0], g_hat)
    assert (result.residual <= result.trace[0] * (1 + 1e-9)).all()         # no worse than the start
    if getattr(solver, "func", solver) is gmres:
        assert (result.trace.diff(dim=0) <= 1e-9).all() and (result.trace <= 1).all()


@pytest.mark.parametrize("solver", BACKWARD)
def test_a_solved_backward_solve_is_the_exact_gradient(solver):
    """If rho(J) is below 1 and the residual at most 1e-3."""
    J, g = matrix(0.9)
    g_hat, result = backward(J, g, solver=solver, max_iter=300, tol=1e-3)
    assert result.converged.all() and (result.residual <= 1e-3).all()
    assert (torch.cosine_similarity(g_hat, exact_of(J, g)) > 0.999).all()


@pytest.mark.parametrize("solver", BACKWARD)
def test_the_gradient_does_not_depend_on_the_scale_of_the_loss(solver):
    """A power of two changes not even the last bit; float32 squares of 1e-24 are 0 and of 1e24 inf."""
    J, g = matrix(0.8)
    J, g = J.float(), g.float()
    one, result = backward(J, g, solver=solver, max_iter=60, tol=1e-5)
    assert result.converged.all()
    for exponent in (-80, -40, 80):
        scaled, again = backward(J, torch.ldexp(g, torch.tensor(exponent)), solver=solver, max_iter=60, tol=1e-5)
        assert torch.equal(torch.ldexp(scaled, torch.tensor(-exponent)), one)
        assert torch.equal(again.residual, result.residual)
    for scale in (1e-24, 1e24):
        scaled, _ = backward(J, scale * g, solver=solver, max_iter=60, tol=1e-5)
        torch.testing.assert_close(scaled / scale, one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver", BACKWARD)
@pytest.mark.parametrize("tol", [0, 1e-6])
def test_a_sample_without_a_gradient_gets_zeros(solver, tol):
    J, g = matrix(0.8)
    g[1] = 0
    g_hat, result = backward(J, g, solver=solver, max_iter=100, tol=tol)
    assert (g_hat[1] == 0).all() and result.residual[1] == 0 and result.converged[1]
    torch.testing.assert_close(g_hat, exact_of(J, g), rtol=1e-3, atol=1e-4)
    g_hat, result = backward(J, 0 * g, solver=solver, max_iter=100, tol=tol)
    assert (g_hat == 0).all() and result.converged.all()


def test_a_zero_gradient_is_measured_by_the_batchs_norm_and_by_its_own_solution():
    """Sample 1 has no dL/dh of its own, but f couples it with sample 0, as BatchNorm does."""
    u, results = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True), []
    mix = torch.tensor([[0.2, 0.5], [0.3, 0.1]], dtype=torch.float64)           # f(h) = mix h + u
    h = implicit(lambda h: mix @ h + u, torch.zeros(2, 1, dtype=torch.float64), solver=fixed_point, max_iter=6, tol=0,
                 on_backward=results.append)
    g = torch.tensor([[2.0], [0.0]], dtype=torch.float64)
    g_hat = torch.autograd.grad(h, u, g)[0]
    own = torch.tensor([2.0, g_hat[1, 0].clamp(max=2)], dtype=torch.float64)       # and by its own g_hat
    torch.testing.assert_close(results[0].residual, (g + mix.T @ g_hat - g_hat).abs()[:, 0] / own)
    torch.testing.assert_close(g_hat, torch.linalg.solve(torch.eye(2) - mix.T, g), rtol=0.1, atol=0)


@pytest.mark.parametrize("solver", BACKWARD)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_stays_so_in_its_sample(solver, bad):
    """GradScaler looks for it in the parameters' gradients.  All of the sample's, since a ReLU would hide one.

    The factor of the batch is that of the others: without it their float32 squares would be 0.
    """
    J, g = matrix(0.8)
    J, g = J.float(), 1e-30 * g.float()
    g[1] = 0
    clean, _ = backward(J, g, solver=solver, max_iter=20, tol=0)
    g[2, 3] = bad
    g_hat, result = backward(J, g, solver=solver, max_iter=20, tol=0)
    assert not g_hat[2].isfinite().any() and result.residual[2] == math.inf
    assert result.residual[1] == 0
    others = [0, 1, 3]
    torch.testing.assert_close(g_hat[others], clean[others], rtol=1e-5, atol=1e-35)


@pytest.mark.parametrize("solver", [gmres, broyden, anderson, fixed_point])
def test_offsets_reach_both_solves(solver):
    """Samples of 5, 1 and 6 rows that f couples: one factor for all, and the stop of each sample by its own rows.

    A system scaled row by row would be another one.
    """
    g = torch.Generator().manual_seed(0)
    J = torch.block_diag(*(0.4 * torch.randn(n, n, generator=g, dtype=torch.float64) / n ** 0.5 for n in (5, 1, 6)))
    offsets = torch.tensor([0, 5, 6, 12])
    dL = torch.randn(12, 3, generator=g, dtype=torch.float64) * torch.logspace(-6, 0, 12)[:, None]
    g_hat, result = backward(J, dL, offsets, solver=solver, max_iter=300, tol=1e-10)
    expected = torch.linalg.solve(torch.eye(12, dtype=torch.float64) - J.T, dL)
    assert result.residual.shape == (3,) and result.converged.all()
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        error = (g_hat - expected)[start:stop].norm() / expected[start:stop].norm()
        assert error < 1e-8
    dL[7, 1] = math.nan             # all of its sample's gradient
    assert backward(J, dL, offsets, solver=solver)[0].isfinite().all(1).tolist() == [True] * 6 + [False] * 6
    u = torch.randn(12, 3, generator=g, dtype=torch.float64, requires_grad=True)
    results = []
    h, forward = equilibrium(lambda h: J @ h + u, torch.zeros(12, 3, dtype=torch.float64), grad="implicit",
                             solver=broyden if solver is gmres else solver, backward_solver=solver, max_iter=300,
                             backward_max_iter=300, tol=1e-10, backward_tol=1e-10, offsets=offsets,
                             on_backward=results.append)
    h.sum().backward()
    assert forward.residual.shape == results[0].residual.shape == (3,)
    torch.testing.assert_close(u.grad, torch.linalg.solve(torch.eye(12).double() - J.T, torch.ones_like(u)))
    for wrong in (torch.tensor([0, 5]), [0, 12], torch.tensor([0.0, 12.0])):
        for call in (equilibrium, implicit):
            with pytest.raises(ValueError, match="offsets must"):
                call(lambda h: J @ h + u, torch.zeros(12, 3, dtype=torch.float64), offsets=wrong)


def test_the_gradient_of_a_half_precision_state_is_solved_in_float32():
    """f's products are in float16, where 65504 is the largest number: a loss scale of 2^16 must not reach them."""
    w = (0.3 * torch.eye(4)).half()
    u, results = torch.zeros(2, 4, dtype=torch.float16, requires_grad=True), []
    h = implicit(lambda h: h @ w + u, torch.zeros(2, 4, dtype=torch.float16), on_backward=results.append, tol=1e-3)
    grad, = torch.autograd.grad(h, u, torch.full((2, 4), 4e4, dtype=torch.float16))
    assert results[0].h[0].dtype == torch.float32 and results[0].converged.all()
    tiny = torch.tensor([[4e4], [2.0 ** -20]]).expand(2, 4).half()          # would be 0 if float16 were scaled
    h = implicit(lambda h: h @ w + u, torch.zeros(2, 4, dtype=torch.float16), on_backward=results.append, tol=1e-3)
    torch.autograd.grad(h, u, tiny)
    assert results[1].residual[1] > 0
    torch.testing.assert_close(results[0].h[0], torch.full((2, 4), 4e4 / 0.7), rtol=2e-3, atol=0)
    torch.testing.assert_close(grad.float(), torch.full((2, 4), 4e4 / 0.7), rtol=2e-3, atol=0)


def test_the_default_backward_solver_is_gmres():
    for function, name in ((equilibrium, "backward_solver"), (implicit, "solver")):
        assert inspect.signature(function).parameters[name].default is gmres


@pytest.mark.parametrize("solver", [gmres, functools.partial(gmres, memory=5)])
def test_gmres_is_no_solver_for_the_state(solver):
    with pytest.raises(ValueError, match="use it as backward_solver"):
        equilibrium(lambda h: pytest.fail("f was called"), torch.zeros(1, 2), solver=solver)


@pytest.mark.parametrize("kwargs", [dict(solver="broyden"), dict(max_iter=0), dict(tol=-1.0)])
def test_implicit_refuses_at_once_what_would_fail_in_the_backward_pass(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        implicit(torch.cos, torch.zeros(1, 2), **kwargs)


@pytest.mark.parametrize("attach", [upg, npg, implicit])
@pytest.mark.parametrize("f, h", [(lambda h: (h[0],), (torch.zeros(2, 3), torch.zeros(2, 3))),
                                  (lambda h: h[None], torch.zeros(2, 3)), (lambda h: h[:, :1], torch.zeros(2, 3))])
def test_a_gradient_refuses_an_f_of_another_shape(attach, f, h):
    """zip would drop a part, and the damped step would broadcast the rest."""
    with pytest.raises(ValueError, match="of the shape of h0"):
        attach(f, h)


def test_bptt_reports_what_the_recorded_states_do():
    """h -> 3 h + 1: the relative residual is 2/3 at every step, also when a solver would have given up."""
    h0 = torch.ones(1, 1)
    for n in (5, 35):
        _, result = equilibrium(lambda h: 3 * h + 1, h0, grad="bptt", solver=fixed_point, max_iter=n)
        h, expected = h0, []
        for _ in range(n + 1):
            expected.append((2 * h + 1) / (3 * h + 1))
            h = 3 * h + 1
        torch.testing.assert_close(result.trace, torch.cat(expected))


def test_bptts_residual_is_the_last_one_and_inf_where_it_is_not_finite():
    """From beside the fixed point -1/2 of 3 h + 1 the first residual is below the tolerance, the last far above."""
    h0 = torch.full((1, 1), -0.5 + 1e-3)
    options = dict(grad="bptt", solver=fixed_point, max_iter=20, tol=1e-2, stop_mode="abs")
    h, result = equilibrium(lambda h: 3 * h + 1, h0.requires_grad_(), **options)
    assert h.requires_grad and torch.equal(h, result.h)
    assert not result.h.requires_grad           # else a result that is kept would keep the graph
    assert result.trace[0] < 1e-2 < result.trace[-1] == result.residual and not result.converged.any()
    _, result = equilibrium(lambda h: h * math.nan, h0, **options)
    assert result.residual == math.inf and not result.converged.any()


def test_bptt_under_no_grad_is_a_solve_that_stops():
    f, _, _, h0, _ = problem()
    options = dict(grad="bptt", solver=fixed_point, max_iter=100, tol=1e-3)
    assert equilibrium(f, h0, **options)[1].n_evals == 101
    with torch.no_grad():
        assert equilibrium(f, h0, **options)[1].n_evals < 50


def test_the_states_of_bptt_are_of_the_precision_of_h0_also_where_f_is_of_a_lower_one():
    seen = []

    def f(h):
        seen.append(h.dtype)
        return (0.5 * h + 1).bfloat16()

    for dtype in (torch.float32, torch.bfloat16):
        seen.clear()
        h, result = equilibrium(f, torch.zeros(2, 3, dtype=dtype), grad="bptt", solver=fixed_point, max_iter=4)
        assert {*seen, h.dtype, result.h.dtype} == {dtype}


def test_the_spectral_radius_of_a_skewed_complex_pair_is_within_three_per_cent_after_50_steps():
    """||v|| oscillates by the condition of the eigenvectors, 30; a plain mean of the last 25 steps is 12 % off."""
    rotation = 0.9 * torch.tensor([[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]])
    skew = torch.tensor([1.0, 30.0]).diag()
    a = (skew @ rotation @ skew.inverse()).double()
    torch.manual_seed(0)
    rho = spectral_radius(lambda h: h @ a.T, torch.zeros(500, 2, dtype=torch.float64), n_iter=50)
    torch.testing.assert_close(rho, torch.full_like(rho, 0.9), rtol=0.03, atol=0)


def test_upg_refuses_an_f_that_changes_its_argument():
    h_star = torch.ones(2, 3)
    with pytest.raises(ValueError, match="must not change its argument"):
        upg(lambda h: torch.relu_(h.sub_(2)), h_star, k=3)


def test_the_spectral_radius_of_an_exploded_jacobian_is_not_zero():
    for scale in (1e3, 1e20, 1e30):
        rho = spectral_radius(lambda h: scale * h, torch.zeros(2, 4), n_iter=10)
        torch.testing.assert_close(rho, torch.full((2,), scale), rtol=1e-3, atol=0)


@pytest.mark.parametrize("solver", BACKWARD)
def test_states_of_one_number_per_sample_of_two_precisions_and_of_no_samples(solver):
    """Two parts, one of them float64 and (N,); and an empty batch, as the last of a data set may be."""
    for N in (2, 0):
        u, v = torch.zeros(N, 3, requires_grad=True), torch.zeros(N, dtype=torch.float64, requires_grad=True)
        h = implicit(lambda h: (0.5 * h[0] + u, 0.2 * h[1] + h[0].sum(1) + v), (u.detach(), v.detach()), solver=solver,
                     max_iter=60, tol=1e-12)
        (h[0].sum() + h[1].sum()).backward()
        torch.testing.assert_close(v.grad, torch.full((N,), 1.25, dtype=torch.float64))
        torch.testing.assert_close(u.grad, torch.full((N, 3), 2 * (1 + 1.25)))
    u = torch.zeros(2, 3, requires_grad=True)
    h = implicit(lambda h: (0.5 * h[0] + u, h[1]), (torch.zeros(2, 3), torch.zeros(2, 0)), solver=solver)
    h[0].sum().backward()           # a part without numbers
    torch.testing.assert_close(u.grad, torch.full((2, 3), 2.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("solver", BACKWARD)
def test_a_part_with_a_small_gradient_is_solved_too(solver):
    """dL/dh of one part is 1e-4 times the other's, or zero: one norm over both would call it solved."""
    torch.manual_seed(0)
    W, V, M = (torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0] for _ in range(3))
    for small in (1e-4, 0.0):
        u = [torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        f = lambda h: (0.1 * h[0] @ W.T + 1e-4 * h[1] @ M.T + u[0], torch.tanh(0.9 * h[1] @ V.T + u[1]))
        star = fixed_point(f, (torch.zeros_like(u[0]), torch.zeros_like(u[1])), max_iter=2000, tol=1e-12).h
        grads = []
        for tol in (1e-3, 1e-11):
            seen = []
            h = implicit(f, star, solver=solver, max_iter=600, tol=tol, on_backward=seen.append)
            grads.append(torch.autograd.grad(h[0].sum() + small * h[1].sum(), u))
            assert seen[0].converged.all() and (tol < 1e-3 or solver is not gmres or seen[0].n_evals < 25)
        for found, right in zip(*grads):
            assert cosine_similarity([found], [right]) > 0.9999 and (found - right).norm() < 0.02 * right.norm()


@pytest.mark.parametrize("solver", [fixed_point, gmres, broyden, anderson])
def test_a_masked_loss_over_the_rows_of_a_graph(solver):
    """dL/dh is zero in all rows but one.  What is far from it stood still; now it is right or said to be unsolved."""
    torch.manual_seed(0)
    n, d = 12, 4
    A = (0.5 * (torch.eye(n).roll(1, 0).tril() + torch.eye(n).roll(-1, 0).triu())).double()
    W = 0.9 * torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
    u, whole = torch.randn(n, d, dtype=torch.float64, requires_grad=True), torch.tensor([0, n])
    f = lambda h: torch.tanh(A @ h @ W.T + u)
    star = fixed_point(f, torch.zeros_like(u), max_iter=500, tol=1e-12, offsets=whole).h

    def gradient(tol=1e-5, **options):
        seen = []
        h = implicit(f, star, max_iter=300, tol=tol, on_backward=seen.append, **options)
        return torch.autograd.grad(h[-1].sum(), u)[0], seen[0]

    right, result = gradient(1e-13, offsets=whole)
    assert result.converged.all() and (right.norm(dim=1) > 0).all()
    if solver is fixed_point:           # dL/dh itself solves its row to rounding, at first
        found, result = gradient(0, solver=solver)
        assert (found - right).norm() < 1e-6 * right.norm()
    found, result = gradient(solver=solver)
    error = (found - right).norm(dim=1) / right.norm(dim=1)
    assert not result.converged.all() or error.max() < 1e-2
    if solver is fixed_point:
        assert result.converged.all()
    found, result = gradient(solver=solver, offsets=whole)
    assert result.converged.all() and (found - right).norm() < 1e-3 * right.norm()


def test_the_spectral_radius_of_a_graph_is_that_of_all_its_rows():
    """Three graphs of 3, 0 and 5 rows, whose J is known; per row it would be something else."""
    torch.manual_seed(0)
    blocks = [torch.diag(torch.tensor([0.2, -0.9, 0.5], dtype=torch.float64)), 0.6 * torch.linalg.qr(torch.randn(
        5, 5, dtype=torch.float64))[0]]
    mixed = [q @ b @ q.inverse() for b in blocks for q in [torch.randn_like(b) + 2 * torch.eye(len(b))]]
    J, offsets = torch.block_diag(*mixed), torch.tensor([0, 3, 3, 8])
    h = torch.zeros(8, 2, dtype=torch.float64)
    rho = spectral_radius(lambda h: J @ h, h, n_iter=200, offsets=offsets)
    torch.testing.assert_close(rho[[0, 2]], torch.tensor([0.9, 0.6], dtype=torch.float64), rtol=0.02, atol=0)
    damped = spectral_radius(lambda h: J @ h, h, n_iter=200, offsets=offsets, lam=0.5)
    torch.testing.assert_close(damped[0], torch.tensor(0.75, dtype=torch.float64), rtol=0.02, atol=0)
    with pytest.raises(ValueError, match="offsets must go"):
        spectral_radius(lambda h: J @ h, h, offsets=torch.tensor([0, 3]))


def comparison(seed=0, factor=0.9, **options):
    torch.manual_seed(seed)
    layer = torch.nn.Linear(12, 12).double()
    layer.weight.data = factor * torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    norm, drop = torch.nn.BatchNorm1d(12).double(), torch.nn.Dropout(0.3)
    u, y = torch.randn(2, 8, 12, dtype=torch.float64)
    f = lambda h: torch.tanh(layer(h) + u)
    model = torch.nn.ModuleList([layer, norm, drop])
    loss = lambda h: (drop(norm(h)) - y).square().mean()
    return f, torch.zeros_like(u), loss, model, compare_gradients(f, torch.zeros_like(u), loss, model, **options)


def test_compare_gradients_gives_cosines_lengths_and_costs():
    """Against gradients that are computed here, of the same loss with the same dropout."""
    rows = [("upg", 3, 0.5), ("npg", 4, 0.7), ("upg", 1, 1.0), ("implicit", 2, None)]
    f, h0, loss, model, found = comparison(rows=rows, bptt=6, exact_tol=1e-10, tol=1e-12, radius_iter=200)
    after = torch.get_rng_state()                   # it leaves no trace, so this is what each of its losses has seen
    star = broyden(f, h0, max_iter=200, tol=1e-13).h
    parameters = list(model[0].parameters())        # f's; the head's gradient would lift the cosines

    def gradient(h):
        torch.set_rng_state(after)
        return torch.autograd.grad(loss(h), parameters)

    exact = gradient(implicit(f, star, max_iter=200, tol=1e-12))
    bptt = gradient(equilibrium(f, h0, grad="bptt", solver=fixed_point, max_iter=6)[0])
    length = lambda grads: sum(g.square().sum() for g in grads if g is not None).sqrt()
    costs = [(3, 5), (1, 5), (1, 1), (1, 5)]
    for row, (grad, k, lam), (calls, vjps) in zip(found["rows"], rows, costs):
        h = {"upg": lambda: upg(f, star, k, lam), "npg": lambda: npg(f, star, k, lam),
             "implicit": lambda: implicit(f, star, max_iter=k, tol=0)}[grad]()
        own = gradient(h)
        assert row["cosine"] == pytest.approx(cosine_similarity(own, exact).item(), abs=1e-9)
        assert row["cosine"] < 1 - 1e-6
        assert row["cosine_bptt"] == pytest.approx(cosine_similarity(own, bptt).item(), abs=1e-9)
        assert row["norm_ratio"] == pytest.approx((length(own) / length(exact)).item(), rel=1e-8)
        assert (row["f_calls"], row["vjps"]) == (calls, vjps) and (row["grad"], row["k"]) == (grad, k)
    assert found["bptt"] == pytest.approx(cosine_similarity(bptt, exact).item(), abs=1e-9)
    assert found["exact"] == 1
    assert found["forward_residual"].max() <= 1e-12 and found["backward_residual"].max() <= 1e-10
    torch.manual_seed(0)
    rho = spectral_radius(f, star, n_iter=400)
    torch.testing.assert_close(found["rho"], rho, rtol=0.1, atol=0)
    damped = spectral_radius(f, star, lam=0.7, n_iter=400).max().item()
    assert found["rows"][1]["rho_B"] == pytest.approx(damped, rel=0.05)
    assert found["rows"][3]["rho_B"] is None


def test_compare_gradients_leaves_no_trace():
    f, h0, loss, model, _ = comparison()
    loss(f(h0)).backward()
    grads, buffers = [p.grad.clone() for p in model.parameters()], [b.clone() for b in model.buffers()]
    state = torch.get_rng_state()
    with torch.no_grad():
        found = compare_gradients(f, h0, loss, model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers))
    found_again = compare_gradients(f, h0, loss, model)
    assert [r["cosine"] for r in found["rows"]] == [r["cosine"] for r in found_again["rows"]]
    with pytest.raises(ZeroDivisionError):
        compare_gradients(f, h0, lambda h: loss(h) * (1 / 0), model)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers))
    assert torch.equal(state, torch.get_rng_state())


def test_compare_gradients_says_when_exact_is_not_reached():
    _, _, _, _, found = comparison(max_iter=3, tol=0.0)
    assert found["exact"] < 1 and found["forward_residual"].max() > 1e-3
    _, _, _, _, found = comparison(exact_max_iter=2)
    assert found["exact"] < 1 and found["backward_residual"].max() > 1e-3
    assert found["rows"][0]["cosine"] < 1


def test_compare_gradients_from_the_end_of_a_truncated_solve():
    """At h != h* a longer UPG goes on to h*, as README says; NPG and GMRES use the wrong Jacobian."""
    torch.manual_seed(0)
    W = torch.randn(64, 64, dtype=torch.float64)
    W = (3 * W / torch.linalg.matrix_norm(W, 2)).requires_grad_()
    u, y = torch.randn(8, 64, dtype=torch.float64), torch.randn(8, 64, dtype=torch.float64)
    f = lambda h: torch.tanh(h @ W.T + u)
    short = broyden(f, torch.zeros_like(u), max_iter=4, tol=0)
    found = compare_gradients(f, torch.zeros_like(u), lambda h: (h - y).square().sum(), [W],
                              [("upg", 20, 0.5), ("npg", 20, 0.5), ("implicit", 100, None)], h=short.h, tol=1e-8)
    cosines = [row["cosine"] for row in found["rows"]]
    assert found["exact"] == 1 and short.residual.median() > 0.1
    assert cosines[0] > 0.9 and cosines[0] > max(cosines[1:]) + 0.1


def test_compare_gradients_of_a_truncated_solve_from_where_its_graph_begins():
    """h as a function of k: the last k calls of a segment of four.  All four are back-propagation itself."""
    f, h0, loss, model, _ = comparison()
    states = [h0]
    for _ in range(4):
        states.append(f(states[-1]).detach())
    found = compare_gradients(f, h0, loss, model, [("upg", k, 1.0) for k in (1, 2, 4)], h=lambda k: states[4 - k],
                              bptt=4, radius_iter=0)
    cosines = [row["cosine_bptt"] for row in found["rows"]]
    assert cosines[0] < cosines[1] < 1 - 1e-9 and cosines[2] == pytest.approx(1, abs=1e-12) and found["rho"] is None
    assert found["rows"][2]["cosine"] == pytest.approx(found["bptt"], abs=1e-12)


@pytest.mark.parametrize("options, message", [
    (dict(rows=[("bptt", 5, 0.5)]), "rows is a list"), (dict(rows=[("upg", 0, 0.5)]), "k must"),
    (dict(rows=[("npg", 5, 0)]), "lam must"), (dict(rows=[("implicit", 0, None)]), "k must"),
    (dict(rows=[("upg", 1)]), "rows is a list"), (dict(rows=("upg", 1, 1.0)), "rows is a list"),
    (dict(rows=[("upg", 1, None)]), "lam must"), (dict(bptt=True), "bptt must"), (dict(bptt=2.5), "bptt must"),
    (dict(radius_iter=1), "radius_iter must"), (dict(solver=gmres), "solver=gmres"),
    (dict(solver="broyden"), "solver must"), (dict(h=torch.zeros(7, 12)), "h must be a state of the shape of h0"),
    (dict(h=[]), "h must be a state of the shape of h0")])
def test_compare_gradients_names_its_impossible_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        comparison(**options)


def test_compare_gradients_names_a_loss_or_parameters_of_no_use():
    f, h0, loss, model, _ = comparison()
    for wrong in (lambda h: h.sum(1), lambda h: 3.0):
        with pytest.raises(ValueError, match="loss must return a scalar tensor"):
            compare_gradients(f, h0, wrong, model)
    other = torch.nn.Linear(12, 1).double()
    with pytest.raises(ValueError, match="f uses none of them"):
        compare_gradients(f, h0, lambda h: other(h).sum(), other)


class Averaged(torch.nn.Module):
    """Keeps a running mean, as a new tensor at every call."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("none", None)

    def forward(self, h):
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return torch.tanh(0.3 * self.layer(h) + 1)


def test_compare_gradients_puts_back_a_buffer_that_was_replaced():
    model = Averaged()
    mean = model.mean
    compare_gradients(model, torch.zeros(4, 3), lambda h: h.sum(), model)
    assert model.mean is mean and (mean == 0).all()


@pytest.mark.parametrize("solver", BACKWARD)
def test_a_float64_loss_of_any_scale_has_its_gradient(solver):
    u = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    h = implicit(lambda h: 0.5 * h + u, torch.full_like(u, 2).detach(), solver=solver)
    for scale in (1e-200, 1e-30, 1.0, 1e200):
        g, = torch.autograd.grad(scale * h.sum(), u, retain_graph=True)
        torch.testing.assert_close(g / scale, torch.full_like(g, 2), rtol=1e-3, atol=0)


def test_gmres_does_not_say_converged_of_a_row_whose_neighbours_are_not():
    """Without offsets GMRES is wrong for coupled rows; then on_backward must say so."""
    K = torch.zeros(4, 4, dtype=torch.float64)
    K[0, 3], K[1, 0], K[2, 1], K[3, 2] = -1.2, 1.2, 1.2, 1.2
    u, seen = torch.zeros(4, 1, dtype=torch.float64, requires_grad=True), []
    h = implicit(lambda h: K @ h + u, torch.zeros(4, 1, dtype=torch.float64), max_iter=10, on_backward=seen.append)
    g = torch.tensor([[1.0], [0], [0], [0]], dtype=torch.float64)
    w, = torch.autograd.grad(h, u, g)
    own = (g + K.T @ w - w).abs()[:, 0]
    assert not seen[0].converged[own > 0.1].any() and (own > 0.1).any()
    right = torch.autograd.grad(implicit(lambda h: K @ h + u, torch.zeros(4, 1, dtype=torch.float64), max_iter=10,
                                         offsets=torch.tensor([0, 4])), u, g)[0]
    torch.testing.assert_close(right, torch.linalg.solve(torch.eye(4).double() - K.T, g))


@pytest.mark.parametrize("lam", [np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5),
                                 torch.tensor(0.5, dtype=torch.float64)])
def test_lam_and_tol_may_be_of_numpy_or_torch(lam):
    f, h0 = lambda h: torch.tanh(0.5 * h + 1), torch.zeros(2, 3)
    assert torch.equal(upg(f, h0, 3, 0.5), upg(f, h0, 3, lam))
    for call in (lambda x: fixed_point(f, h0, lam=x, tol=1e-6), lambda x: anderson(f, h0, beta=x, tol=1e-6),
                 lambda x: broyden(f, h0, tol=x)):
        assert torch.equal(call(0.5).h, call(lam).h)


def test_a_damping_that_is_learned_gets_its_gradient():
    lam = torch.tensor(0.5, requires_grad=True)
    upg(lambda h: torch.tanh(0.5 * h + 1), torch.zeros(2, 3), 3, lam).sum().backward()
    assert lam.grad != 0


def test_bptt_reports_each_sample_by_itself():
    """Sample 0 passes below tol beside an unstable root and leaves again: nothing to sample 1."""
    f = lambda h: 1 + torch.tanh(2 * (h - 1))
    h, result = equilibrium(f, torch.tensor([[1 + 1e-5], [2.0]]), grad="bptt", solver=fixed_point, max_iter=15)
    own = ((f(h) - h) / f(h)).abs()[:, 0]
    torch.testing.assert_close(result.residual, own)
    assert result.converged.tolist() == [False, True]
