"""The solvers: what every one of them promises, and what each alone does."""
import functools
import math

import pytest
import torch
from torch.nn import functional as F

import common
from common import anderson, broyden, fixed_point, gmres

SOLVERS = [fixed_point, anderson, broyden]          # for any f; gmres, for an affine one, has its own section


def tanh_layer(lip=0.9, N=5, D=12, seed=0, dtype=torch.float64):
    """h -> tanh(h W + u), contraction with Lipschitz constant lip."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(D, D, generator=g, dtype=dtype)
    w = lip * w / torch.linalg.matrix_norm(w, 2)
    u = torch.randn(N, D, generator=g, dtype=dtype)
    return lambda h: torch.tanh(h @ w + u), torch.zeros(N, D, dtype=dtype)


def linear_map(spectrum, N=3, seed=0):
    """h -> h A + u with the given eigenvalues, A symmetric."""
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=g, dtype=torch.float64)).Q
    a = q @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ q.T
    u = torch.randn(N, len(spectrum), generator=g, dtype=torch.float64)
    return lambda h: h @ a + u, torch.zeros_like(u)


def conv_cell(N=2, seed=0):
    """A state of two resolutions, as in the MDEQ; not square, so that height and width cannot be confused."""
    g = torch.Generator().manual_seed(seed)
    w = [0.15 * torch.randn(4, 4, 3, 3, generator=g, dtype=torch.float64) for _ in range(2)]
    u = [torch.randn(N, 4, *size, generator=g, dtype=torch.float64) for size in ((8, 6), (4, 3))]

    def f(h):
        low = F.avg_pool2d(h[0], 2) + F.conv2d(h[1], w[1], padding=1)
        high = F.conv2d(h[0], w[0], padding=1) + 0.3 * F.interpolate(h[1], scale_factor=2.0)
        return torch.tanh(high + u[0]), torch.tanh(low + u[1])

    return f, tuple(torch.zeros_like(x) for x in u)


def residual(f, h):
    """||f(h) - h|| per sample over all parts, and ||f(h)||."""
    parts = [(a, b) for a, b in zip(f(h), h)] if isinstance(h, (tuple, list)) else [(f(h), h)]
    square = sum((a - b).flatten(1).square().sum(1) for a, b in parts)
    return square.sqrt(), sum(a.flatten(1).square().sum(1) for a, _ in parts).sqrt()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mode", ["rel", "abs", "max"])
def test_residual_is_that_of_the_returned_state(solver, mode):
    """Also where the budget ends the solve, and whatever the damping: f's residual, not the damped step's length."""
    f, h0 = tanh_layer()
    kwargs = {"lam": 0.1} if solver is fixed_point else {}
    result = solver(f, h0, max_iter=7, tol=0, stop_mode=mode, **kwargs)
    absolute, size = residual(f, result.h)
    expected = {"rel": absolute / size, "abs": absolute, "max": (f(result.h) - result.h).abs().amax(1)}[mode]
    torch.testing.assert_close(result.residual, expected, rtol=1e-9, atol=1e-15)
    assert result.n_evals == 8 and result.trace.shape == (8, 5)
    torch.testing.assert_close(result.residual, result.trace.min(0).values)


@pytest.mark.parametrize("solver", [*SOLVERS, functools.partial(broyden, memory=3)])
def test_a_small_part_does_not_hide_behind_a_large_one(solver):
    """One part is 1e4 times larger and soon solved.  "rel" is the worst part's residual; "rel_joint" is blind to it."""
    torch.manual_seed(0)
    W, V = (torch.linalg.qr(torch.randn(6, 6))[0] for _ in range(2))
    far, near = 1e4 * torch.randn(4, 6), torch.randn(4, 6)

    def f(h):
        return {"far": 0.1 * h["far"] @ W.T + far, "near": torch.tanh(0.95 * h["near"] @ V.T + 0.1 * near)}

    h0 = {"far": torch.zeros(4, 6), "near": torch.zeros(4, 6)}
    joint, result = (solver(f, h0, max_iter=200, tol=1e-4, stop_mode=mode) for mode in ("rel_joint", "rel"))
    own = [{name: (f(r.h)[name] - p).norm(dim=1) / f(r.h)[name].norm(dim=1) for name, p in r.h.items()}
           for r in (joint, result)]
    assert joint.converged.all() and own[0]["near"].min() > 0.01
    assert result.converged.all() and own[1]["near"].max() < 1.01e-4
    torch.testing.assert_close(result.residual, torch.maximum(own[1]["near"], own[1]["far"]), rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_part_that_is_zero_counts_by_the_rounding_of_the_others(solver):
    """h* = 0 in one part: its own relative residual would stay at 1 for ever."""
    result = solver(lambda h: (0.5 * h[0], 0.5 * h[1] + 1), (torch.ones(2, 3), torch.ones(2, 3)), max_iter=60, tol=1e-3)
    assert result.converged.all() and (result.h[0].norm(dim=1) < 1e-3).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mode", ["rel", "abs", "max"])
def test_the_joint_residual_of_several_tensors_is_that_of_their_concatenation(solver, mode):
    f, h0 = conv_cell()
    parts = solver(f, h0, max_iter=5, tol=0, stop_mode="rel_joint" if mode == "rel" else mode).trace
    torch.testing.assert_close(parts, solver(*flattened(f, h0), max_iter=5, tol=0, stop_mode=mode).trace)


@pytest.mark.parametrize("solver", [*SOLVERS, functools.partial(broyden, memory=3), functools.partial(anderson, m=2)])
def test_the_best_state_may_lie_in_the_middle_of_the_solve(solver):
    """Per sample at another evaluation: f is disturbed after its call number `last`, and what came later is worse."""
    f, h0 = tanh_layer()
    last, calls = torch.tensor([[0], [2], [4], [7], [10]]), []
    g = torch.Generator().manual_seed(1)

    def disturbed(h):
        calls.append(None)
        return f(h) + torch.where(len(calls) - 1 > last, 5 * torch.randn(h.shape, generator=g, dtype=h.dtype), 0.0)

    result = solver(disturbed, h0, max_iter=10, tol=0, stop_mode="abs")
    clean = result.trace.masked_fill(torch.arange(11)[:, None] > last.T, math.inf)
    assert (clean.min(0).values == result.trace.min(0).values).all()            # the disturbance does what it should
    assert (result.residual == clean.min(0).values).all()
    torch.testing.assert_close(residual(f, result.h)[0], result.residual, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tol", [1e-3, 1e-6])
def test_a_cpu_solve_ends_at_the_first_evaluation_that_finds_every_sample_converged(solver, tol):
    f, h0 = tanh_layer()
    full = solver(f, h0, max_iter=60, tol=tol).trace
    best = full.cummin(0).values
    assert len(full) < 61 and (best[-1] <= tol).all() and not (best[-2] <= tol).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_converges_and_says_so(solver):
    f, h0 = tanh_layer()
    result = solver(f, h0, max_iter=200, tol=1e-9)
    absolute, size = residual(f, result.h)
    assert result.converged.all() and (absolute <= 1.01e-9 * size).all() and result.n_evals < 200
    assert not solver(f, h0, max_iter=2, tol=1e-9).converged.any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_gives_the_answers_of_its_samples_one_at_a_time(solver):
    """Norms, stops and the best iterate are per sample; 1e-12: products of another batch size round differently."""
    for make in (tanh_layer, conv_cell):
        f, h0 = make()
        single = torch.is_tensor(h0)
        whole = solver(f, h0, max_iter=12, tol=1e-4)
        parts = (whole.h,) if single else whole.h
        for i in range(len(parts[0])):
            def f_i(h):             # the map of sample i alone
                full = [p.clone() for p in ((h0,) if single else h0)]
                for a, b in zip(full, (h,) if single else h):
                    a[i:i + 1] = b
                out = f(full[0] if single else tuple(full))
                return out[i:i + 1] if single else tuple(p[i:i + 1] for p in out)
            alone = solver(f_i, h0[i:i + 1] if single else tuple(p[i:i + 1] for p in h0), max_iter=12, tol=1e-4)
            for a, b in zip(parts, (alone.h,) if single else alone.h):
                torch.testing.assert_close(a[i:i + 1], b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["rel", "abs", "max"])
def test_offsets_make_samples_of_rows(mode):
    """Samples of 1, 4, 2 and 0 rows, each stopping by itself, one of them broken: each as it is alone."""
    g = torch.Generator().manual_seed(0)
    w, u = torch.randn(12, 12, generator=g).double() / 8, torch.randn(7, 12, generator=g).double()
    u[5:] = math.nan
    slow = torch.tensor([0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)[:, None]
    h0, offsets = torch.zeros_like(u), torch.tensor([0, 1, 5, 7, 7])

    def f(h, rows=slice(None)):
        return torch.tanh(slow[rows] * h @ w + u[rows])

    result = fixed_point(f, h0, max_iter=200, tol=1e-6, stop_mode=mode, offsets=offsets)
    assert result.trace.shape == (result.n_evals, 4) and result.converged.tolist() == [True, True, False, True]
    evals = []
    for i, rows in ((0, slice(0, 1)), (1, slice(1, 5))):
        def one(h):
            return f(h.view(-1, 12), rows).view(h.shape)

        alone = fixed_point(one, h0[rows].reshape(1, -1), max_iter=200, tol=1e-6, stop_mode=mode)
        torch.testing.assert_close(result.h[rows], alone.h.view(-1, 12), rtol=1e-12, atol=1e-12)
        assert result.residual[i].item() == pytest.approx(alone.residual.item(), rel=1e-6)
        evals.append(alone.n_evals)
    assert evals[0] < evals[1] < 200 and torch.equal(result.h[5:], h0[5:])
    for wrong in ([0, 6], [1, 7], [0, 5, 3, 7]):
        with pytest.raises(ValueError, match="offsets"):
            fixed_point(f, h0, offsets=torch.tensor(wrong))
    for wrong in ([0, 7], torch.tensor([0.0, 7.0]), torch.zeros(0, dtype=torch.long)):
        with pytest.raises(ValueError, match="offsets must be an integer tensor"):
            fixed_point(f, h0, offsets=wrong)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_sample_that_breaks_keeps_its_best_state_and_its_neighbours(solver, poison):
    """A NaN or Inf in a later iterate reaches neither the caller nor another sample (0 x NaN is NaN: use masks)."""
    f, h0 = tanh_layer()
    calls = []

    def broken(h):
        calls.append(None)
        out = f(h)
        if len(calls) > 4:
            out = out.clone()
            out[1] = poison
        return out

    good, bad = (solver(g, h0, max_iter=10, tol=0, stop_mode="abs") for g in (f, broken))
    assert bad.h.isfinite().all() and bad.residual.isfinite().all()
    others = [0, 2, 3, 4]
    torch.testing.assert_close(bad.h[others], good.h[others], rtol=0, atol=0)
    torch.testing.assert_close(bad.residual[1], good.trace[:4, 1].min())
    torch.testing.assert_close(residual(f, bad.h)[0][1], bad.residual[1])


WILD = {"cubic": lambda h: 40 * h ** 3 + h + 1 + h.abs(), "translation": lambda h: h + 1, "exponential": torch.exp,
        "nan": lambda h: h * math.nan}


@pytest.mark.parametrize("solver", [*SOLVERS, functools.partial(broyden, memory=3),
                                    functools.partial(anderson, ridge=0)])
@pytest.mark.parametrize("wild", WILD)
def test_a_sample_without_a_fixed_point_changes_no_neighbour(solver, wild):
    """Divergence, a singular update and NaN each stay in their row: the others come out bit for bit."""
    f, h0 = tanh_layer()

    def mixed(h):
        out = f(h).clone()
        out[1] = WILD[wild](h[1])
        return out

    tame, mixed = (solver(g, h0, max_iter=12, tol=1e-6) for g in (f, mixed))
    others = [0, 2, 3, 4]
    assert (mixed.h[others] == tame.h[others]).all() and (mixed.residual[others] == tame.residual[others]).all()
    assert mixed.h.isfinite().all() and not mixed.converged[1]


@pytest.mark.parametrize("mode", ["rel", "abs", "max"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_map_that_is_never_finite_leaves_the_start_and_says_so(solver, mode):
    """A NaN residual is reported as inf."""
    f, h0 = tanh_layer()
    h0[2] = 0.3
    broken = torch.tensor([0.0, 0.0, math.nan, 0.0, 0.0], dtype=h0.dtype)[:, None]
    result = solver(lambda h: f(h) + broken, h0, max_iter=6, tol=1e-3, stop_mode=mode)
    assert (result.h[2] == 0.3).all() and result.residual[2] == math.inf and not result.converged[2]


def test_a_sample_a_million_times_off_its_start_is_given_up():
    """It stays where it is, and a solve whose samples are all lost or converged ends before the budget does."""
    result = fixed_point(lambda h: 2e3 * h + 1, torch.zeros(2, 3), max_iter=50, tol=1e-6, stop_mode="abs")
    assert result.n_evals == 3 and (result.h == 0).all() and not result.converged.any()       # 1, 2e3, 4e6
    trace = fixed_point(lambda h: 2e3 * h + 1, torch.zeros(2, 3), max_iter=50, tol=0, stop_mode="abs").trace
    assert (trace[3:] == trace[2]).all()


@pytest.mark.parametrize("mode", ["rel", "abs", "max"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_that_is_broken_from_the_start_is_reported(solver, mode):
    f, h0 = tanh_layer()
    h0[2] = math.nan
    result = solver(f, h0, max_iter=6, tol=1e-3, stop_mode=mode)
    assert result.residual[2] == math.inf and not result.converged[2]
    assert result.h[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_diverging_map_returns_its_lowest_residual(solver):
    """f(h) = 3 h + 1 elementwise and cubed: iterates overflow; what comes back is the best state seen, and finite."""
    h0 = torch.full((2, 4), 0.5)
    result = solver(lambda h: 40 * h ** 3 + h + 1, h0, max_iter=60, tol=1e-6)
    assert result.h.isfinite().all() and (result.residual <= result.trace[0] + 1e-6).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_converged_samples_stay_where_they_are(solver):
    """Their update is zero from then on: the trace of an early sample is constant while the others go on."""
    f, h0 = tanh_layer()
    h0[0] = fixed_point(f, h0, max_iter=500, tol=1e-15).h[0]
    result = solver(f, h0, max_iter=15, tol=1e-6)
    assert (result.trace[1:, 0] == result.trace[0, 0]).all() and (result.h[0] == h0[0]).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_structure_dtype_and_inputs_are_kept(solver):
    f, h0 = conv_cell()
    before = [p.clone() for p in h0]
    for kind in (tuple, list):
        result = solver(lambda h: kind(f(h)), kind(h0), max_iter=5, tol=0)
        assert type(result.h) is kind and [p.shape for p in result.h] == [p.shape for p in h0]
        assert all(p.dtype == torch.float64 and not p.requires_grad for p in result.h)
    assert all((a == b).all() for a, b in zip(before, h0))
    half = torch.zeros(3, 4, dtype=torch.bfloat16)
    seen = []
    result = solver(lambda h: seen.append(h.dtype) or torch.cos(h), half, max_iter=3, tol=0)
    assert result.h.dtype == torch.bfloat16 and set(seen) == {torch.bfloat16} and result.residual.dtype == torch.float32


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_float64_part_makes_the_solve_float64(solver):
    h0 = (torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.float64))
    result = solver(lambda h: tuple(torch.cos(p) for p in h), h0, max_iter=100, tol=1e-12)
    assert [p.dtype for p in result.h] == [torch.float32, torch.float64] and result.residual.dtype == torch.float64
    torch.testing.assert_close(result.h[1], torch.full_like(result.h[1], 0.7390851332151607), rtol=1e-12, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_autocast_reaches_f_and_not_the_solvers_own_products(solver):
    """In bf16 a Gram matrix has 3 digits.  With an f that opts out nothing may differ from a solve without autocast."""
    w, u = 0.1 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 16)
    seen = []

    def f(h):
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        with torch.autocast("cpu", enabled=False):
            return torch.tanh(h @ w + u)

    expected = solver(f, torch.zeros(3, 16), max_iter=8, tol=0)
    assert not any(seen)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.float16):        # not the default, so that a lost dtype shows
        result = solver(f, torch.zeros(3, 16), max_iter=8, tol=0)
    assert set(seen) == {torch.float16} and (result.trace == expected.trace).all() and (result.h == expected.h).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_graph_is_recorded(solver):
    w = torch.eye(4, requires_grad=True)
    result = solver(lambda h: torch.tanh(h @ w + 1), torch.zeros(2, 4), max_iter=4, tol=0)
    assert not result.h.requires_grad and result.h.grad_fn is None


@pytest.mark.parametrize("solver", SOLVERS)
def test_channels_last_states_give_the_same_result_and_stay_channels_last(solver):
    f, h0 = conv_cell()
    formats = []

    def watched(h):
        formats.append(h[0].stride(1))
        return f(h)

    expected = solver(f, h0, max_iter=10, tol=0)
    result = solver(watched, tuple(p.contiguous(memory_format=torch.channels_last) for p in h0), max_iter=10, tol=0)
    assert set(formats) == {1}
    for a, b in zip(result.h, expected.h):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_tolerance_spends_the_whole_budget(solver):
    """All processes of a job must call f equally often where f holds a collective, so nothing may stop the solve."""
    assert solver(lambda h: h * 0, torch.zeros(2, 3), max_iter=9, tol=0).n_evals == 10


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_that_is_a_root_needs_one_evaluation(solver):
    result = solver(lambda h: h * 0, torch.zeros(2, 3), max_iter=9, tol=1e-6, stop_mode="abs")
    assert result.n_evals == 1 and result.converged.all() and (result.h == 0).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_budget_of_one_takes_one_step(solver):
    """Public Anderson codes return the start untouched; the first step of each is h <- f(h)."""
    f, h0 = tanh_layer()
    result = solver(f, h0, max_iter=1, tol=0)
    torch.testing.assert_close(result.h, f(h0))
    assert result.n_evals == 2


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("budget", [1, 2, 3])
def test_a_small_budget_is_the_beginning_of_a_large_one(solver, budget):
    f, h0 = tanh_layer()
    small, large = solver(f, h0, max_iter=budget, tol=0), solver(f, h0, max_iter=5, tol=0)
    torch.testing.assert_close(small.trace, large.trace[:budget + 1], rtol=1e-12, atol=0)
    assert small.n_evals == budget + 1 and (small.residual < small.trace[0]).all()


@pytest.mark.parametrize("solver", [functools.partial(anderson, ridge=1e-14), broyden])
def test_a_budget_of_two_is_a_secant_step(solver):
    """On a linear map of one number the second step ends it: (f(h_1) - f(h_0)) / (h_1 - h_0) is the slope."""
    h0 = torch.zeros(3, 1, dtype=torch.float64)
    slope = torch.tensor([[0.9], [-2.0], [3.0]], dtype=torch.float64)
    result = solver(lambda h: slope * h + 1, h0, max_iter=2, tol=0, stop_mode="abs")
    torch.testing.assert_close(result.h, 1 / (1 - slope), rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kwargs, name", [({"max_iter": 0}, "max_iter"), ({"max_iter": 2.5}, "max_iter"),
                                          ({"tol": -1.0}, "tol"), ({"tol": math.nan}, "tol"),
                                          ({"stop_mode": "norm"}, "stop_mode")])
def test_impossible_arguments_are_named(solver, kwargs, name):
    with pytest.raises(ValueError, match=name):
        solver(torch.cos, torch.zeros(1, 2), **kwargs)


@pytest.mark.parametrize("solver, kwargs", [
    (fixed_point, {"lam": 0.0}), (fixed_point, {"lam": 1.5}), (anderson, {"m": 0}), (anderson, {"beta": 0.0}),
    (anderson, {"beta": 1.5}), (anderson, {"ridge": -1.0}), (broyden, {"memory": 0})])
def test_each_solver_names_its_own_impossible_arguments(solver, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        solver(torch.cos, torch.zeros(1, 2), **kwargs)


@pytest.mark.parametrize("solver", SOLVERS)
def test_states_that_are_none_are_refused(solver):
    with pytest.raises(ValueError, match="shape"):
        solver(lambda h: h[:, :1], torch.zeros(2, 3))
    with pytest.raises(ValueError, match="batch size"):
        solver(lambda h: h, (torch.zeros(2, 3), torch.zeros(3, 3)))
    with pytest.raises(ValueError, match="f must return"):
        solver(lambda h: h[0], (torch.zeros(2, 3), torch.zeros(2, 3)))
    for state in (torch.zeros(2, 3, dtype=torch.long), torch.tensor(0.5), (), [0.5]):
        with pytest.raises(ValueError, match="floating-point"):
            solver(lambda h: h, state)


def textbook_broyden(f, h0, steps, memory=None):
    """Broyden's good method in the U V^T form: B^-1 <- B^-1 + (s - B^-1 y) s^T B^-1 / (s^T B^-1 y).  The trace.

    memory: the pairs of a limited-memory code, the oldest overwritten when they are used up.
    """
    shape, x = h0.shape, h0.flatten(1).clone()
    N, D = x.shape
    pairs = []

    def inverse(v, transposed=False):
        out = -v
        for p, q in pairs:
            out = out + ((q * (p * v).sum(1, keepdim=True)) if transposed else (p * (q * v).sum(1, keepdim=True)))
        return out

    def g(x):
        return f(x.view(shape)).flatten(1) - x

    gx, trace = g(x), []
    trace.append(gx.norm(dim=1))
    for t in range(steps):
        s = -inverse(gx)
        x = x + s
        new = g(x)
        y, gx = new - gx, new
        trace.append(gx.norm(dim=1))
        q = inverse(s, transposed=True)
        p = (s - inverse(y)) / (q * y).sum(1, keepdim=True)
        if memory is None or len(pairs) < memory:
            pairs.append((p, q))
        else:
            pairs[t % memory] = (p, q)
    return torch.stack(trace)


def flattened(f, h0):
    """A tuple problem as one on flat vectors, for the textbook."""
    sizes = [p[0].numel() for p in h0]

    def flat(x):
        parts = [c.reshape(p.shape) for c, p in zip(x.split(sizes, dim=1), h0)]
        return torch.cat([p.flatten(1) for p in f(tuple(parts))], dim=1)

    return flat, torch.cat([p.flatten(1) for p in h0], dim=1)


@pytest.mark.parametrize("name, problem, steps", [
    ("tanh layer, L_h = 0.9", tanh_layer(0.9), 12), ("tanh layer, L_h = 0.99", tanh_layer(0.99, D=40), 14),
    ("linear, spectrum up to 0.99", linear_map([0.99, 0.9, 0.5, 0.2, -0.3, -0.8, -0.95]), 9),
    ("no contraction", linear_map([3.0, -2.0, 1.7, 0.5, 0.1, -0.4]), 8), ("two resolutions", conv_cell(), 14),
    ("cos", (torch.cos, torch.tensor([[0.0, 1.0, 2.0], [-3.0, 0.5, 4.0]], dtype=torch.float64)), 10)])
def test_broyden_makes_the_textbook_iterates(name, problem, steps):
    """The steps-only form with the Gram matrix is the U V^T form: the same residual trace to 3 digits or better."""
    f, h0 = problem
    result = broyden(f, h0, max_iter=steps, tol=0, stop_mode="abs")
    trace = textbook_broyden(*((f, h0) if torch.is_tensor(h0) else flattened(f, h0)), steps)
    above = trace > 1e-9 * trace[0]                 # below, both only show their rounding
    assert above.float().mean() > 0.8
    assert ((result.trace / trace - 1).abs()[above] < 1e-3).all()


def test_broyden_ends_a_linear_system_in_at_most_2n_steps():
    """Gay's theorem: n = 6, so 12 steps; 1e-10 for the rounding of an ill-conditioned update."""
    f, h0 = linear_map([3.0, -2.0, 1.7, 0.5, 0.1, -0.4])
    assert (broyden(f, h0, max_iter=12, tol=0, stop_mode="abs").residual < 1e-10).all()


def test_broyden_with_a_full_memory_restarts_where_overwriting_stalls():
    """Ten pairs, 80 steps, an ill-conditioned map."""
    f, h0 = linear_map([0.999 * math.cos(math.pi * i / 60) for i in range(60)], N=2)
    overwriting = textbook_broyden(f, h0, 80, memory=10)[-1]
    result = broyden(f, h0, max_iter=80, tol=0, stop_mode="abs", memory=10)
    assert (result.residual < 0.1 * result.trace[0]).all()
    assert (result.residual < 0.1 * overwriting).all()
    torch.testing.assert_close(residual(f, result.h)[0], result.residual, rtol=1e-6, atol=1e-12)


def test_broyden_with_a_full_memory_still_converges_on_a_map_that_is_no_contraction():
    """Eigenvalues -3 to 0.84, 10 pairs, 80 steps: 2e-9 with restarts, above 1e-5 at best with overwritten pairs."""
    f, h0 = linear_map([-3 + 3.9 * i / 60 for i in range(60)], N=2)
    overwriting = textbook_broyden(f, h0, 80, memory=10).min(0).values
    assert (broyden(f, h0, max_iter=80, tol=0, stop_mode="abs", memory=10).residual < 1e-8).all()
    assert (overwriting > 1e-5).all()


@pytest.mark.parametrize("memory", [1, 2, 3])
def test_the_best_state_survives_restarts(memory):
    f, h0 = tanh_layer(0.99)
    result = broyden(f, h0, max_iter=20, tol=0, stop_mode="abs", memory=memory)
    torch.testing.assert_close(result.residual, result.trace.min(0).values)
    torch.testing.assert_close(residual(f, result.h)[0], result.residual, rtol=1e-6, atol=1e-13)


def test_broyden_guards_the_division_by_almost_zero():
    """f(h) = h + 1 has no fixed point, and the update divides by 1 - 1; f(h) = 2 h - 1 needs a step backwards.

    Almost zero is below 1e-5: then the step is the plain one; above it the secant step is taken, here 1e4 long.
    """
    result = broyden(lambda h: h + 1, torch.zeros(2, 3), max_iter=10, tol=0, stop_mode="abs")
    assert result.h.isfinite().all() and result.trace.isfinite().all()
    assert (broyden(lambda h: 2 * h - 1, torch.zeros(2, 3), max_iter=3, tol=0, stop_mode="abs").residual < 1e-6).all()
    h0 = torch.zeros(1, 1, dtype=torch.float64)
    for gap, expected in ((1e-6, 2), (1e-4, 1e4)):
        h = broyden(lambda h: (1 - gap) * h + 1, h0, max_iter=2, tol=0, stop_mode="abs").h
        assert h.item() == pytest.approx(expected, rel=1e-5)


def test_after_the_guard_a_sample_goes_on_as_if_it_had_started_there():
    """f translates by 1 for the first calls, so the second step would divide by 0.  It is a plain one, and the past
    before it is dropped; the neighbour, an ordinary sample, keeps its own.
    """
    f, _ = tanh_layer(N=2)
    h0 = torch.zeros(2, 12, dtype=torch.float64)

    def translating(first):
        calls = []

        def g(h):
            calls.append(None)
            out = f(h).clone()
            if len(calls) <= first:
                out[1] = h[1] + 1
            return out
        return g

    options = dict(max_iter=10, tol=0, stop_mode="abs")
    late = broyden(translating(2), h0, **options).trace
    torch.testing.assert_close(late[1:, 1], broyden(translating(1), h0 + 1, **options).trace[:-1, 1], rtol=1e-9, atol=0)
    torch.testing.assert_close(late[:, 0], broyden(f, h0, **options).trace[:, 0], rtol=1e-9, atol=0)


def test_a_guarded_step_is_the_plain_one_whatever_came_before():
    """f translates by 1 at its third and fourth call, so the fourth step would divide by 0: it is h <- f(h)."""
    f, _ = tanh_layer(N=1)
    states = []

    def translating(h):
        states.append(h.clone())
        return h + 1 if len(states) in (3, 4) else f(h)

    broyden(translating, torch.zeros(1, 12, dtype=torch.float64), max_iter=5, tol=0, stop_mode="abs")
    torch.testing.assert_close(states[4], states[3] + 1)


def test_after_a_restart_a_sample_that_was_guarded_uses_its_whole_memory_again():
    """Memory 4, the guard at the second step: from the restart at evaluation 4 on all is as in a solve begun there."""
    f, _ = tanh_layer(N=1)
    states = []

    def translating(h):
        states.append(h.clone())
        return h + 1 if len(states) <= 2 else f(h)

    options = dict(tol=0, stop_mode="abs", memory=4)
    late = broyden(translating, torch.zeros(1, 12, dtype=torch.float64), max_iter=8, **options).trace
    torch.testing.assert_close(late[4:], broyden(f, states[4], max_iter=4, **options).trace, rtol=1e-9, atol=0)


def plain_anderson(f, h0, steps, m, beta):
    """Type II by least squares on the differences, one sample, no ridge."""
    hs, trace = [h0], []
    gs = []
    for _ in range(steps + 1):
        gs.append(f(hs[-1]) - hs[-1])
        trace.append(gs[-1].norm())
        h, g = torch.stack(hs[-m:]), torch.stack(gs[-m:])
        if len(h) == 1:
            alpha = torch.ones(1, dtype=h.dtype)
        else:
            gamma = torch.linalg.lstsq((g[:-1] - g[-1]).T, -g[-1]).solution
            alpha = torch.cat([gamma, 1 - gamma.sum(0, keepdim=True)])
        hs.append((alpha[:, None] * (h + beta * g)).sum(0))
    return torch.stack(trace)


@pytest.mark.parametrize("m, beta", [(3, 1.0), (5, 1.0), (4, 0.6)])
def test_anderson_solves_the_constrained_least_squares_problem(m, beta):
    f, h0 = tanh_layer(N=1)
    trace = plain_anderson(lambda h: f(h[None])[0], h0[0], 9, m, beta)
    result = anderson(f, h0, max_iter=9, tol=0, stop_mode="abs", m=m, beta=beta, ridge=1e-14)
    torch.testing.assert_close(result.trace[:, 0], trace, rtol=1e-3, atol=1e-10)


def test_anderson_with_memory_one_is_the_plain_iteration():
    f, h0 = tanh_layer()
    plain = fixed_point(f, h0, max_iter=6, tol=0)
    torch.testing.assert_close(anderson(f, h0, max_iter=6, tol=0, m=1).trace, plain.trace)


def test_andersons_ridge_does_not_stop_progress_as_the_residuals_shrink():
    """An absolute ridge of 1e-4 outweighs residuals below 1e-2: the rate falls back to the plain iteration's."""
    f, h0 = linear_map([0.99, 0.97, 0.9, 0.5, -0.3, -0.8])
    plain = fixed_point(f, h0, max_iter=60, tol=0, stop_mode="abs").residual
    assert (anderson(f, h0, max_iter=60, tol=0, stop_mode="abs").residual < 1e-3 * plain).all()


def test_andersons_memory_does_not_slow_it_down():
    """A ridge of the window's mean did: 18, 25 and 42 evaluations with 6, 10 and 20 pairs; 17, 16 and 16 without."""
    f, h0 = linear_map(torch.linspace(-0.5, 0.5, 100).tolist())
    evals = [anderson(f, h0, max_iter=100, tol=1e-8, m=m).n_evals for m in (6, 10, 20)]
    assert evals == sorted(evals, reverse=True) and evals[0] <= 18


def test_andersons_ridge_is_of_each_pairs_own_size():
    """On a stiff map, eigenvalues 0 to 0.999, it is what keeps the small system solvable; in float32, and in bf16."""
    f, h0 = linear_map((1 - torch.logspace(-3, 0, 100)).tolist())
    assert anderson(f, h0, max_iter=400, tol=1e-6).converged.all()
    w, u = (0.2 * torch.randn(16, 16)).bfloat16(), torch.randn(4, 16).bfloat16()
    noisy = anderson(lambda h: torch.tanh(h.bfloat16() @ w + u), torch.zeros(4, 16), max_iter=40, tol=0, m=20)
    assert (noisy.residual < 0.01).all() and noisy.h.isfinite().all()


def test_anderson_takes_the_plain_step_where_its_small_system_is_singular():
    """f(h) = h + 1 gives the same g each time: without a ridge the Gram matrix has rank one; the step is h <- f(h)."""
    states = []
    result = anderson(lambda h: states.append(h.clone()) or h + 1, torch.zeros(2, 3), max_iter=8, tol=0, ridge=0.0)
    assert torch.stack(states)[:, 0, 0].tolist() == list(range(9)) and result.trace.isfinite().all()


@pytest.mark.parametrize("lam", [0.3, 1.0])
def test_fixed_point_is_equation_12(lam):
    f, h0 = tanh_layer()
    h = h0
    for _ in range(5):
        h = (1 - lam) * h + lam * f(h)
    torch.testing.assert_close(fixed_point(f, h0, max_iter=5, tol=0, lam=lam).h, h)


@pytest.mark.parametrize("solver", [anderson, broyden, functools.partial(broyden, memory=3), gmres])
def test_products_in_pieces_are_the_same_products(solver, monkeypatch):
    """As on a GPU, where long samples are cut; rounding of float64 only."""
    f, h0 = tanh_layer()
    if solver is gmres:
        f, _, h0, _ = affine(0.9, D=12)
    assert h0.dtype == torch.float64 and h0.shape[1] % 4 == 0
    whole = solver(f, h0, max_iter=9, tol=0)
    monkeypatch.setattr(common, "_pieces", lambda *_: 4)
    pieces = solver(f, h0, max_iter=9, tol=0)
    torch.testing.assert_close(pieces.h, whole.h, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(pieces.trace, whole.trace, rtol=1e-4, atol=1e-13)


@pytest.mark.parametrize("N, D", [(16, 188160), (128, 30720), (14, 105000), (32, 4096), (2000, 8192), (1, 2 ** 20),
                                  (3, 104729), (16, 24582), (0, 8192)])
def test_only_long_samples_are_cut_on_a_GPU(N, D):
    """Into equal pieces of at least 4096 numbers and of whole 16 bytes, no more than keep a GPU busy."""
    n = common._pieces(N, D, torch.device("meta"))
    assert common._pieces(N, D, torch.device("cpu")) == 1 <= n
    assert n == 1 or D % (4 * n) == 0 and D // n >= 4096 and n * N <= 1024
    assert (n > 1) == ((N, D) in [(16, 188160), (128, 30720), (14, 105000), (1, 2 ** 20), (0, 8192)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("solver", SOLVERS)
def test_gpu_solves_do_not_synchronise_with_zero_tolerance(solver):
    w, h0 = 0.1 * torch.randn(64, 64, device="cuda"), torch.zeros(8, 64, device="cuda")
    solver(lambda h: torch.tanh(h @ w + 1), h0, max_iter=10, tol=0)         # warm-up: libraries synchronise once
    torch.cuda.set_sync_debug_mode("error")
    try:
        solver(lambda h: torch.tanh(h @ w + 1), h0, max_iter=10, tol=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_tensor_for_a_tuple_is_refused(solver):
    """zip over a tuple and over a tensor's batch looks alike: the gradient was silently that of sample 0."""
    with pytest.raises(ValueError, match="a tensor if h0 is one"):
        solver(lambda h: h[0], (torch.zeros(2, 3),))
    with pytest.raises(ValueError, match="a tensor if h0 is one"):
        solver(lambda h: (h,), torch.zeros(2, 3))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_norm_that_overflows_is_not_a_root(solver):
    """||f(h)|| beyond the root of float32's largest number, ||f(h) - h|| not: finite / inf would be a residual of 0."""
    result = solver(lambda h: 0.999 * h, torch.full((1, 4), 1e20), max_iter=2, tol=1e-3)
    assert (result.trace > 1e-3).all() and not result.converged.any()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-15, 1e15, 1e25, 1e30])
@pytest.mark.parametrize("mode", ["rel", "abs"])
def test_the_residual_is_right_where_float32_squares_are_not(solver, scale, mode):
    """They are 0 below 1e-23 and inf above 1e19: a state of such numbers was a root, or was never finite."""
    w = torch.diag(torch.linspace(-0.6, 0.8, 6))
    result = solver(lambda h: h @ w + scale, torch.zeros(3, 6), max_iter=4, tol=1e-3 * (scale if mode == "abs" else 1),
                    stop_mode=mode)
    h = result.h.double()
    out = h @ w.double() + scale
    true = (out - h).norm(dim=1) / (out.norm(dim=1) if mode == "rel" else 1)
    torch.testing.assert_close(result.residual.double(), true, rtol=0.02, atol=0)
    assert not result.converged.any() and (true > 0).all()
    assert solver(lambda h: 0.5 * h, torch.zeros(3, 2), tol=1e-6).converged.all()           # zero, exactly
    assert not solver(lambda h: -h, torch.full((3, 2), 1e-44), max_iter=1, tol=1e-3).converged.any()
    halves = solver(lambda h: [p @ w[:3, :3] + scale for p in h], [torch.zeros(3, 3)] * 2, max_iter=1, tol=0)
    rows = solver(lambda h: h @ w + scale, torch.zeros(3, 6), max_iter=1, tol=0, offsets=torch.tensor([0, 2, 3]))
    assert (halves.trace[0] - 1).abs().max() < 1e-6 and (rows.trace[0] - 1).abs().max() < 1e-6      # f(0) / f(0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_that_is_infinite_from_the_start_keeps_h0(solver):
    """inf is not within a million times inf: Broyden's first step, infinite too, would be multiplied by 0 later."""
    u = torch.tensor([[-1.0], [1.0]])
    result = solver(lambda h: 0.3 * h + 1 / (u + 1), torch.zeros(2, 1), max_iter=20, tol=1e-5)
    assert result.h[0] == 0 and result.residual[0] == math.inf and result.converged.tolist() == [False, True]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_residual_that_equals_the_tolerance_has_converged(solver):
    result = solver(lambda h: 0 * h + 0.5, torch.zeros(2, 1), max_iter=5, tol=0.5, stop_mode="abs")
    assert result.n_evals == 1 and result.converged.all() and (result.h == 0).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_that_is_lost_never_moves_again(solver):
    """f is NaN at one call for sample 1.  From there on it stands where it was."""
    f, h0 = tanh_layer()
    states = []

    def once(h):
        states.append(h.clone())
        out = f(h).clone()
        if len(states) == 3:
            out[1] = math.nan
        return out

    solver(once, h0, max_iter=8, tol=1e-9, stop_mode="abs")
    assert len(states) == 9 and all((h[1] == states[2][1]).all() for h in states[3:])
    assert not (states[8][0] == states[7][0]).all()         # its neighbours go on


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tol", [1e-9, 0])
def test_a_sample_that_only_looked_solved_moves_again(solver, tol):
    """f returns its argument for sample 1 at one call: it stands at the next, and f looks as if it coupled samples.

    From there on all count as one, with the residual of the worst.
    """
    f, h0 = tanh_layer()
    states = []

    def once(h):
        states.append(h.clone())
        out = f(h).clone()
        if len(states) == 3:
            out[1] = h[1]
        return out

    result = solver(once, h0, max_iter=8, tol=tol, stop_mode="abs")
    assert (states[3][1] == states[2][1]).all() and not (states[4][1] == states[3][1]).all()
    assert result.trace[2, 1] == 0 and (result.residual == result.trace[3:, 1].min()).all() and result.residual[1] > 0
    torch.testing.assert_close(residual(f, result.h)[0].max(), result.residual[0], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_that_stands_within_ten_tolerances_stays(solver):
    """Converged to 1e-3, it is disturbed to 5e-3 from then on: its record stands, and it does not move."""
    f, h0 = tanh_layer()
    states, at = [], []

    def disturbed(h):
        states.append(h.clone())
        out = f(h)
        if (out - h)[1].norm() <= 1e-3:
            at.append(len(states) - 1)
            if len(at) > 1:
                out = out + torch.tensor([[0.0], [5e-3 / h.shape[1] ** 0.5], [0.0], [0.0], [0.0]], dtype=h.dtype)
        return out

    result = solver(disturbed, h0, max_iter=25, tol=1e-3, stop_mode="abs")
    assert len(at) > 1 and all((h[1] == states[at[0]][1]).all() for h in states[at[0]:])
    assert result.converged[1] and result.residual[1] == result.trace[at[0], 1]


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def place(request, monkeypatch):
    """On a GPU the solvers look at nothing but every eighth evaluation; the numbers are the same."""
    if request.param == "as on a GPU":
        init = common._Progress.__init__

        def blind(self, *args):
            init(self, *args)
            self.on_cpu, self.check_every = False, 8

        monkeypatch.setattr(common._Progress, "__init__", blind)


def chain(nodes=12, d=4, factor=0.9):
    """A graph whose nodes are the rows of the state, and its f for an input U: only what has been reached moves."""
    torch.manual_seed(0)
    A = torch.diag(torch.full((nodes - 1,), 0.5), 1) + torch.diag(torch.full((nodes - 1,), 0.5), -1)
    W = factor * torch.linalg.qr(torch.randn(d, d))[0]
    return lambda U: lambda h: torch.tanh(A.to(h.dtype) @ h @ W.to(h.dtype) + U)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tol", [1e-4, 0])
def test_a_row_that_the_signal_has_not_reached_is_not_solved(solver, tol, place):
    """Its residual is 0 at h0 = 0 until its neighbour moves: it stood still for ever, "solved" with a residual of 0."""
    U = torch.zeros(12, 4)
    U[0] = torch.randn(4, generator=torch.Generator().manual_seed(1))
    f = chain()(U)
    result = solver(f, torch.zeros(12, 4), max_iter=100, tol=tol)
    true = (f(result.h) - result.h).norm(dim=1) / f(result.h).norm(dim=1)
    if solver is fixed_point:
        assert (true < 20 * max(tol, 1e-5)).all() and (result.h.norm(dim=1) > 0).all()
    assert (true[result.converged] < 0.1).all()
    for whole in (solver(f, torch.zeros(12, 4), max_iter=100, tol=1e-6, offsets=torch.tensor([0, 12])),
                  solver(lambda h: f(h[0])[None], torch.zeros(1, 12, 4), max_iter=100, tol=1e-6)):
        h = whole.h.view(12, 4)
        assert whole.converged.all() and (f(h) - h).norm() < 2e-6 * h.norm() and (h.norm(dim=1) > 0).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mode", ["rel", "abs", "max"])
def test_a_row_that_a_much_larger_signal_reaches_is_not_lost(solver, mode, place):
    """A warm start solved for a small input: the rows stand at a rounding-sized residual when the large one arrives."""
    f = lambda u: lambda h: 0.5 * torch.cat([u, h[:-1]]) + 0.1 * h
    start = fixed_point(f(torch.ones(1, 3)), torch.zeros(5, 3), tol=1e-6, max_iter=200).h
    large = f(torch.full((1, 3), 1e5))
    result = solver(large, start, max_iter=200, stop_mode=mode, tol=1e-4 if mode == "rel" else 1.0)
    own = (large(result.h) - result.h).norm(dim=1)
    own = own / large(result.h).norm(dim=1) if mode == "rel" else own
    assert (own[result.converged] < (1e-3 if mode == "rel" else 10)).all()
    if solver is fixed_point or result.converged.all():
        torch.testing.assert_close(result.h[:, 0], 1e5 * (5 / 9) ** torch.arange(1, 6), rtol=1e-2, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tol", [0.4, 0.2, 0.1, 0.05])
def test_a_row_that_is_not_reached_yet_is_far_at_a_large_tolerance_too(solver, tol, place):
    """Its relative residual is 1 when the signal comes, which is not above 10 tol."""
    f = lambda h: torch.cat([torch.ones(1, 2), h[:-1]])
    result = solver(f, torch.zeros(5, 2), tol=tol)
    torch.testing.assert_close(result.h, torch.ones(5, 2))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mode", ["rel", "abs", "max"])
def test_what_has_converged_beside_what_does_not_is_measured_in_the_state_that_is_returned(solver, mode, place):
    """Row 0 explodes, row 1 is solved for where it was last; returned is row 0's best state, from long before."""
    f = lambda h: torch.cat([3 * h[:1] + 1, 0.5 * h[1:] + torch.tanh(h[:1])])
    result = solver(f, torch.full((2, 2), 0.1), stop_mode=mode, max_iter=60, tol=1e-2)
    own = {"abs": lambda g, y: g.norm(dim=1), "max": lambda g, y: g.abs().amax(1),
           "rel": lambda g, y: g.norm(dim=1) / y.norm(dim=1)}[mode](f(result.h) - result.h, f(result.h))
    assert (result.residual >= 0.999 * own).all() and not result.converged[own > 0.1].any()
    assert result.trace.shape[0] == result.n_evals <= 61


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [1e-170, 1e-160, 1e160, 1e200])
def test_the_residual_is_right_where_float64_squares_are_not(solver, scale):
    result = solver(lambda h: 0.5 * h + scale, torch.zeros(2, 3, dtype=torch.float64), max_iter=60, tol=1e-6)
    if scale < 1:           # the solvers' inner products underflow, too
        assert not result.converged.any() or (result.h / scale - 2).abs().max() < 1e-4
    if solver is fixed_point:
        assert result.converged.all()
        torch.testing.assert_close(result.h / scale, torch.full_like(result.h, 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("solver", [*SOLVERS, gmres])
def test_a_batch_of_none_and_parts_of_none(solver):
    for sizes in ((0, 3), (0, 0), (2, 0)):
        h0 = (torch.zeros(sizes), torch.zeros(sizes[0], 4))
        for mode in ("rel", "abs") if solver is gmres else ("rel", "rel_joint", "abs", "max"):
            result = solver(lambda h: tuple(0.5 * p + 1 for p in h), h0, max_iter=5, tol=0, stop_mode=mode)
            assert [p.shape for p in result.h] == [p.shape for p in h0] and result.residual.shape == sizes[:1]


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_f_that_works_in_place_is_harmless_or_refused_where_torch_counts_no_versions(solver):
    f = lambda h: h.mul_(0.5).add_(1)
    with torch.inference_mode():
        result = solver(f, torch.zeros(1, 2), max_iter=60)
    torch.testing.assert_close(result.h, torch.full((1, 2), 2.0), rtol=1e-3, atol=0)
    if solver is fixed_point:
        torch._dynamo.reset()
        run = torch.compile(lambda z: solver(f, z, tol=0, max_iter=30).h, backend="eager")
        torch.testing.assert_close(run(torch.zeros(1, 2)), torch.full((1, 2), 2.0))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_that_has_converged_repeats_its_residual(solver):
    """It stands at a small g that is not 0, after steps that are not 0, while others go on."""
    f, h0 = tanh_layer()
    trace = solver(f, h0, max_iter=60, tol=1e-3).trace
    at = (trace <= 1e-3).int().argmax(dim=0)
    assert at.min() > 1 and at.max() > at.min() + 1
    for i, sample in zip(at, trace.T):
        assert (sample[i:] == sample[i]).all() and sample[i] > 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_state_of_one_number_per_sample_is_per_sample_too(solver):
    """A state (N,) has no dimension left to take a norm over; "rel" needs the size of each sample's own number."""
    u = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    flat = solver(lambda h: 0.5 * torch.cos(h) + u, torch.zeros_like(u), max_iter=6, tol=0)
    column = solver(lambda h: 0.5 * torch.cos(h) + u[:, None], torch.zeros_like(u)[:, None], max_iter=6, tol=0)
    assert flat.h.shape == (3,)
    torch.testing.assert_close(flat.trace, column.trace, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_relative_residual_of_a_low_precision_map_has_float32s_digits(solver):
    h0 = torch.rand(8, 12, generator=torch.Generator().manual_seed(0))
    f_h = torch.cos(h0).bfloat16()
    trace = solver(lambda h: torch.cos(h).bfloat16(), h0, max_iter=1, tol=0).trace
    torch.testing.assert_close(trace[0], (f_h.float() - h0).norm(dim=1) / f_h.float().norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_float64_state_may_be_larger_than_float32s_range(solver):
    h0 = torch.zeros(2, 4, dtype=torch.float64)
    result = solver(lambda h: 0.5 * h + 1e25, h0, max_iter=25, tol=1e-6)
    assert result.converged.all()
    torch.testing.assert_close(result.h, torch.full_like(h0, 2e25), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gap, expected", [(1e-6, 2), (-1e-6, 2), (1e-4, 1e4), (-1e-4, -1e4)])
def test_broyden_guards_both_sides_of_zero(gap, expected):
    """The divisor is the gap: below 1e-5 the step is the plain one, whatever its sign."""
    h0 = torch.zeros(1, 1, dtype=torch.float64)
    states = []
    broyden(lambda h: states.append(h.clone()) or (1 - gap) * h + 1, h0, max_iter=2, tol=0, stop_mode="abs")
    assert states[2].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale, expected", [(1e10, 1e14), (1e12, 2e12)])
def test_broyden_takes_the_plain_step_for_one_longer_than_1e15(scale, expected):
    """The secant step is 1e4 times as long as g: 1e14 is taken; 1e16, whose square float32 could not hold, is not."""
    states = []
    broyden(lambda h: states.append(h.clone()) or (1 - 1e-4) * h + scale, torch.zeros(1, 1, dtype=torch.float64),
            max_iter=2, tol=0, stop_mode="rel")             # "rel": the length of g counts, not the residual
    assert states[2].item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("ratio, taken", [(1.2, True), (1.01, False)])
def test_the_length_of_a_step_counts_the_past_ones_in_it(ratio, taken):
    """g = 1e10 (1, 1 - 1e-4, ratio (1 - 1e-4)): s_1 is 1e14 long, the secant step is -ratio / (ratio - 1) times s_1:
    6e14 is taken; 1e16, of which g is only the 1e4th part, is not.
    """
    states, gs = [], [1e10, 1e10 * (1 - 1e-4), 1e10 * (1 - 1e-4) * ratio, 0.0]

    def f(h):
        states.append(h.item())
        return h + gs[len(states) - 1]

    broyden(f, torch.zeros(1, 1, dtype=torch.float64), max_iter=3, tol=0, stop_mode="abs")
    s_1 = states[2] - states[1]
    assert s_1 == pytest.approx(1e14, rel=1e-3)
    assert states[3] - states[2] == pytest.approx(-ratio / (ratio - 1) * s_1 if taken else gs[2], rel=1e-3)


def test_broyden_keeps_no_more_steps_than_the_budget_can_make():
    """Else this would ask for 8e15 bytes."""
    result = broyden(torch.cos, torch.zeros(1, 2), max_iter=3, tol=0, memory=10 ** 15)
    assert result.n_evals == 4 and (result.residual < result.trace[0]).all()


@pytest.mark.parametrize("gap", [1e-3, 1e-4, 2e-5])
def test_broyden_comes_back_from_a_long_step_in_float32(gap):
    """The first two calls of f are almost a translation, so the second step is 1 / gap long; then f is a
    contraction.  Inner products of the steps that come from a recurrence have lost their digits by then.
    """
    f, h0 = tanh_layer(N=16, D=30, dtype=torch.float32)
    way = torch.randn(16, 30, generator=torch.Generator().manual_seed(1))
    calls = []

    def leaping(h):
        calls.append(None)
        return f(h) if len(calls) > 2 else h + way * (1 if len(calls) == 1 else 1 - gap)

    assert broyden(leaping, h0, max_iter=30, tol=1e-4).converged.all()


@pytest.mark.parametrize("scale, step", [(1e13, 6 / 7), (1e14, 2)])
def test_a_step_whose_long_parts_cancel_is_as_uncertain_as_they_are(scale, step):
    """These g make a fifth step of 6/7 scale out of parts that are 17 scale long together; beyond 1e15 it is g."""
    states, gs = [], [scale * x for x in (1, -1, -0.5, 3, 2, 0)]

    def f(h):
        states.append(h.item())
        return h + gs[len(states) - 1]

    broyden(f, torch.zeros(1, 1, dtype=torch.float64), max_iter=5, tol=0, stop_mode="abs")
    assert states[5] - states[4] == pytest.approx(step * scale, rel=1e-3)


def excursion(h0):
    """(f, states it met): the first two calls are almost a translation, so the second step is 1e3 long."""
    states = []

    def f(h):
        states.append(h.clone())
        return h + (1, 1 - 1e-3)[len(states) - 1] if len(states) < 3 else 0.5 * torch.cos(h) + 0.2

    return f, states


@pytest.mark.parametrize("memory", [None, 4])
def test_broydens_state_is_the_one_that_f_met_also_after_an_excursion(memory):
    """In float32 h0 + s_0 + ... over a long way and back has another rounding."""
    h0 = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    f, states = excursion(h0)
    result = broyden(f, h0, max_iter=40, tol=1e-6, stop_mode="abs", memory=memory)
    assert max(h.abs().max() for h in states) > 500 and result.converged.all()
    torch.testing.assert_close((f(result.h) - result.h).norm(dim=1), result.residual, rtol=0, atol=3e-7)


def test_broydens_state_is_the_one_that_f_met_also_before_an_excursion():
    h0 = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    f, states = excursion(h0)
    result = broyden(f, h0, max_iter=2, tol=0, stop_mode="abs")
    assert states[2].abs().max() > 500 and torch.equal(result.h, states[1])


def test_broyden_finds_a_state_again_from_where_it_restarted():
    """The lowest residual is the one at the start until the restart, then the one a step after it."""
    states, gs = [], [0.3, 2, 0.35, 0.29, 5]

    def f(h):
        states.append(h.clone())
        return h + gs[len(states) - 1]

    result = broyden(f, torch.zeros(1, 1, dtype=torch.float64), max_iter=4, tol=0, stop_mode="abs", memory=2)
    assert abs(states[4] - states[3]) > 2 * abs(states[3] - states[2])          # so it is sought from the restart on
    torch.testing.assert_close(result.h, states[3])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("stop_mode", ["rel", "abs", "max"])
def test_f_may_return_a_higher_precision_than_its_states(solver, stop_mode):
    h0 = (torch.zeros(2, 3), torch.zeros(2))
    result = solver(lambda h: (0.5 * torch.cos(h[0].double()) + 0.2, 0.5 * h[1]), h0, tol=1e-5, stop_mode=stop_mode)
    assert result.converged.all() and result.h[0].dtype == torch.float32


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("f", [lambda h: h.mul_(0.5).add_(1), lambda h: 0.5 * torch.relu_(h) - 1])
def test_an_f_that_changes_its_argument_is_refused(solver, f):
    """f(h) - h would be 0: a root after one call."""
    with pytest.raises(ValueError, match="must not change its argument"):
        solver(f, torch.zeros(2, 3))
    with torch.inference_mode():                                # where torch does not count changes
        solver(lambda h: 0.5 * h, torch.zeros(2, 3))


# --- gmres: f(h) = J h + b -------------------------------------------------------------------------------------------

def affine(rho, N=3, D=30, seed=0, dtype=torch.float64):
    """h -> J h + b per sample, J not normal, of that spectral radius; J, b, and the solution."""
    g = torch.Generator().manual_seed(seed)
    J = torch.randn(D, D, generator=g, dtype=torch.float64)
    J *= rho / torch.linalg.eigvals(J).abs().max()
    b = torch.randn(N, D, generator=g, dtype=torch.float64)
    solution = torch.linalg.solve(torch.eye(D, dtype=torch.float64) - J, b.T).T
    J, b, solution = (x.to(dtype) for x in (J, b, solution))
    return lambda h: h @ J.T + b, J, b, solution


def size(x):
    return torch.linalg.vector_norm(x.double(), dim=1)


@pytest.mark.parametrize("rho", [0.9, 1.2, 3.0])
def test_gmres_makes_the_smallest_residual_of_any_polynomial(rho):
    """Row j of the trace: the least squares problem over (I - J) times span(b, J b, ..., J^j b), by QR, in float64."""
    f, J, b, _ = affine(rho)
    calls = []
    result = gmres(lambda h: calls.append(None) or f(h), b, max_iter=12, tol=0, stop_mode=b)
    basis, expected = [b], []
    for _ in range(12):
        Q = torch.linalg.qr(torch.stack(basis, dim=2)).Q                                    # (N, D, j + 1)
        A = Q - J @ Q
        y = torch.linalg.lstsq(A, b[:, :, None]).solution
        expected.append(size((A @ y)[:, :, 0] - b) / size(b))
        basis.append(basis[-1] @ J.T)
    torch.testing.assert_close(result.trace, torch.stack([*expected, expected[-1]]), rtol=1e-9, atol=1e-12)
    assert result.n_evals == len(calls) == 13 and (result.trace <= 1).all()
    torch.testing.assert_close(result.residual, size(f(result.h) - result.h) / size(b))


def test_gmres_is_done_after_as_many_products_as_there_are_numbers():
    """And what is left of the budget, with no direction left in it, does no harm."""
    f, _, b, solution = affine(1.2, D=7)
    for max_iter in (7, 8, 40):
        result = gmres(f, b, max_iter=max_iter, tol=0, stop_mode=b)
        assert result.n_evals == max_iter + 1
        torch.testing.assert_close(result.h, solution, rtol=1e-9, atol=1e-9)
    assert gmres(f, b, tol=1e-10, stop_mode=b).n_evals == 8


@pytest.mark.parametrize("mode", ["rel", "abs"])
def test_gmres_without_b_starts_at_h0(mode):
    f, J, b, solution = affine(0.9, D=7)
    start = solution + 0.1 * torch.randn_like(solution)
    result = gmres(f, start, tol=1e-10, stop_mode=mode)
    torch.testing.assert_close(result.trace[0], size(f(start) - start) / (size(f(start)) if mode == "rel" else 1))
    end = f(result.h)
    torch.testing.assert_close(result.residual, size(end - result.h) / (size(end) if mode == "rel" else 1))
    torch.testing.assert_close(result.h, solution, rtol=1e-8, atol=1e-8)
    assert result.converged.all() and result.n_evals == 9          # h0, seven directions, the end
    assert gmres(f, solution, tol=1e-9, stop_mode=mode).n_evals == 1
    assert gmres(f, start, max_iter=5, tol=0, stop_mode=mode).n_evals == 6


def test_gmres_takes_several_tensors_and_keeps_structure_and_dtype():
    f, _, b, _ = affine(0.9, dtype=torch.float32)
    whole = gmres(f, b, max_iter=9, tol=0, stop_mode=b)
    halves = gmres(lambda h: list(f(torch.cat(h, 1)).split(15, 1)), list(b.split(15, 1)), max_iter=9, tol=0,
                   stop_mode=list(b.split(15, 1)))
    assert type(halves.h) is list and halves.h[0].dtype == torch.float32
    torch.testing.assert_close(torch.cat(halves.h, 1), whole.h)


def test_gmres_solves_each_sample_as_if_it_were_alone():
    """Samples that stop at different products, one that is solved by b itself, one with b = 0, one that breaks."""
    g = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.3, 0.9, 0.0, 0.5, 0.7], dtype=torch.float64)[:, None]
    J = torch.randn(20, 20, generator=g, dtype=torch.float64) / 20 ** 0.5
    b = torch.randn(5, 20, generator=g, dtype=torch.float64)
    b[3] = 0
    broken = torch.tensor([0, 0, 0, 0, math.nan], dtype=torch.float64)[:, None]
    f = lambda h: scale[:len(h)] * (h @ J.T) + b[:len(h)]
    result = gmres(lambda h: f(h) + broken, b, max_iter=30, tol=1e-8, stop_mode=b)
    for i in range(4):
        alone = gmres(lambda h: scale[i] * (h @ J.T) + b[i], b[i:i + 1], max_iter=30, tol=1e-8, stop_mode=b[i:i + 1])
        torch.testing.assert_close(result.h[i], alone.h[0], rtol=1e-9, atol=1e-12)
        assert result.converged[i] == alone.converged[0] and result.converged[i]
    assert result.h[3].eq(0).all() and result.residual[4] == math.inf and result.h[4].eq(0).all()


def test_gmres_stays_orthogonal_as_long_as_float32_can():
    """Condition number 1000: residual 1e-4 (classical Gram-Schmidt: 5e-4)."""
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(200, 200, generator=g, dtype=torch.float64)).Q
    A, b = (Q * torch.logspace(-3, 0, 200)) @ Q.T, torch.randn(2, 200, generator=g)
    J = (torch.eye(200) - A).float()
    f = lambda h: h @ J + b
    assert (gmres(f, b, max_iter=150, tol=0, stop_mode=b).residual < 2e-4).all()


def test_gmres_of_a_b_that_is_almost_an_eigenvector():
    """Little is left of the first product, and rounding of the inner products of 20,000 numbers is much of that."""
    b = 1 + 1e-5 * torch.randn(2, 20000, generator=torch.Generator().manual_seed(0))
    result = gmres(lambda h: 0.7 * h.roll(1, 1) + b, b, max_iter=12, tol=0, stop_mode=b)
    assert (result.residual < 1e-6).all()           # in float64 1.3e-7; orthogonal once only, 6.5e-6


def test_gmres_keeps_what_it_has_where_a_product_is_not_finite():
    """In the fourth call sample 1 is NaN: what three directions gave stays, and the others do not notice."""
    f, _, b, _ = affine(0.9)
    calls = []

    def fails(h):
        calls.append(None)
        return f(h).index_fill(0, torch.tensor([1] if len(calls) == 4 else [], dtype=torch.long), math.nan)

    result, clean = (gmres(one, b, max_iter=10, tol=0, stop_mode=b) for one in (fails, f))
    torch.testing.assert_close(result.residual[1], clean.trace[2, 1])
    torch.testing.assert_close(result.h[[0, 2]], clean.h[[0, 2]])
    calls.clear()
    result = gmres(fails, b, max_iter=3, tol=0, stop_mode=b)            # the last evaluation is the fourth call
    assert result.residual[1] == 1 and (result.h[1] == 0).all() and (result.residual[[0, 2]] < 1).all()


def test_gmres_reports_the_residual_of_its_state_where_the_recurrence_is_wrong():
    """bf16 products: the recurrence goes on to 1e-6, the state stays where the rounding of f leaves it."""
    _, J, b, _ = affine(0.8, D=64, dtype=torch.float32)
    f = lambda h: (h.bfloat16() @ J.T.bfloat16()).float() + b
    result = gmres(f, b, max_iter=40, tol=0, stop_mode=b)
    true = size(f(result.h) - result.h) / size(b)
    assert (result.trace[-2].double() < 0.1 * true).all()
    torch.testing.assert_close(result.residual.double(), true, rtol=1e-3, atol=0)


def test_gmres_restarts_where_its_memory_is_full():
    f, _, b, solution = affine(0.9)
    states = []
    result = gmres(lambda h: states.append(h.shape) or f(h), b, max_iter=100, tol=1e-8, stop_mode=b, memory=6)
    torch.testing.assert_close(result.h, solution, rtol=1e-5, atol=1e-6)
    assert result.converged.all() and 31 < result.n_evals == len(states) <= 101
    assert (result.trace.diff(dim=0) <= 1e-9).all()


def test_gmres_of_a_singular_system_is_its_least_squares_solution():
    """I - J = diag(0, 1, 0.5): b's first number cannot be had.  A breakdown in which nothing can be divided."""
    J = torch.diag(torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64))
    b = torch.tensor([[1.0, 2.0, 2.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    result = gmres(lambda h: h @ J + b, b, max_iter=9, tol=0, stop_mode=b)
    torch.testing.assert_close(result.residual, torch.tensor([1 / 3, 1.0], dtype=torch.float64))
    assert result.h.isfinite().all()
    torch.testing.assert_close(result.h[0, 1:], torch.tensor([2.0, 4.0], dtype=torch.float64))


def test_gmres_of_a_rounded_map_is_no_worse_than_zero():
    """bf16 products of a nearly singular I - J: the state found may have a residual above 1, which zero has."""
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(40, 40, generator=g, dtype=torch.float64)).Q
    J, b = (torch.eye(40) - (Q * torch.logspace(-4, 0.2, 40)) @ Q.T).bfloat16(), torch.randn(20, 40, generator=g)
    for tol in (0, 0.01):
        result = gmres(lambda h: (h.bfloat16() @ J).float() + b, b, max_iter=40, tol=tol, stop_mode=b)
        assert (result.residual <= 1).all() and (result.residual == 1).any()
        assert (result.h[result.residual == 1] == 0).all()


def test_gmres_ends_when_all_samples_are_solved_or_lost():
    f, _, b, _ = affine(0.5)
    b[1] = math.nan
    result = gmres(f, b, max_iter=200, tol=1e-6, stop_mode=b)
    assert result.n_evals < 40 and result.converged.tolist() == [True, False, True]


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e-12, 1.0, 1e12, 1e15])
def test_gmres_of_samples_of_any_size(scale):
    """Beside one of size 1: the same answer, times the scale."""
    f, J, b, solution = affine(0.7, N=2, dtype=torch.float32)
    factor = torch.tensor([[1.0], [scale]])
    result = gmres(lambda h: h @ J.T + factor * b, factor * b, max_iter=60, tol=1e-4, stop_mode=factor * b)
    torch.testing.assert_close(result.h / factor, solution, rtol=1e-3, atol=1e-3)
    assert result.converged.all()


@pytest.mark.parametrize("solver", [gmres, functools.partial(gmres, memory=5), broyden, anderson, fixed_point])
def test_a_state_that_explodes_is_no_solution_of_a_singular_system(solver):
    """Random stochastic J, eigenvalue 1, float32: f(h) - h of an h of 1e7 is all rounding, and was 0 for some."""
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        J = torch.rand(10, 10, generator=g).double().softmax(1)
        J = (J / J.sum(1, keepdim=True)).float()
        b = torch.randn(3, 10, generator=g)
        result = solver(lambda h: h @ J + b, b, max_iter=40, tol=1e-4, stop_mode=b)
        h = result.h.double()
        true = size(h @ J.double() + b - h) / size(b)
        assert not result.converged.any()
        assert ((result.residual - true).abs() < 0.1 * true + 0.05).all()
        if getattr(solver, "func", solver) is gmres:
            assert (size(h) < 1e4 * size(b)).all()
    one = torch.ones(1, 3)          # f(h) = h + 1 has no fixed point; from 3e7 on, h + 1 is h
    assert not solver(lambda h: h + one, 3e7 * one, max_iter=3, tol=1e-4, stop_mode=one).converged.any()


@pytest.mark.parametrize("solver", [gmres, broyden, anderson, fixed_point, functools.partial(gmres, memory=3)])
def test_with_b_every_solver_measures_by_it(solver):
    """And where a sample has no b, by the batch's: rho(J) = 3, where an h that explodes is no solution."""
    f, J, b, _ = affine(3.0)
    b[1] = 0
    result = solver(f, b, max_iter=25, tol=0, stop_mode=b)
    yardstick = size(b)
    yardstick[1] = b.norm()
    torch.testing.assert_close(result.residual, size(f(result.h) - result.h) / yardstick, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("solver", [gmres, functools.partial(gmres, memory=2), broyden, anderson, fixed_point])
def test_rows_that_belong_together_are_solved_together(solver):
    """Samples of 1, 4, 2 and 0 rows that f couples within, by offsets: as one long row for each."""
    g = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 1, 5, 7, 7])
    mix = torch.block_diag(*(0.8 * torch.randn(n, n, generator=g, dtype=torch.float64) / n for n in (1, 4, 2)))
    b = torch.randn(7, 3, generator=g, dtype=torch.float64)
    result = solver(lambda h: mix @ h + b, b, max_iter=9, tol=0, stop_mode=b, offsets=offsets)
    for i, (start, stop) in enumerate([(0, 1), (1, 5), (5, 7)]):
        own, block = b[start:stop], mix[start:stop, start:stop]
        alone = solver(lambda h: (block @ h.view(-1, 3) + own).view(1, -1), own.reshape(1, -1), max_iter=9, tol=0,
                       stop_mode=own.reshape(1, -1))
        torch.testing.assert_close(result.h[start:stop], alone.h.view(-1, 3), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(result.trace[:, i], alone.trace[:, 0], rtol=1e-6, atol=1e-12)
    assert result.residual[3] == 0


def test_gmres_under_autocast_keeps_its_own_products_in_float32():
    f, J, b, _ = affine(0.7, dtype=torch.float32)
    seen = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = gmres(lambda h: seen.append((h @ J.T).dtype) or f(h), b, max_iter=20, tol=0, stop_mode=b)
    assert set(seen) == {torch.bfloat16} and result.h.dtype == torch.float32
    assert (size(f(result.h) - result.h) < 0.02 * size(b)).all()


@pytest.mark.parametrize("kwargs, message", [(dict(memory=0), "memory"), (dict(stop_mode="max"), "'max'"),
                                             (dict(stop_mode="l2"), "stop_mode"), (dict(max_iter=0), "max_iter"),
                                             (dict(stop_mode=None), "stop_mode"), (dict(stop_mode=3), "stop_mode"),
                                             (dict(tol=-1), "tol"),
                                             (dict(stop_mode=torch.zeros(2, 3)), "shape of h0")])
def test_gmres_names_its_impossible_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        gmres(lambda h: pytest.fail("f was called"), torch.zeros(1, 2), **kwargs)


@pytest.mark.parametrize("tol", [0.0, 1e-8])
def test_gmres_hands_f_no_nan_where_a_sample_is_solved_to_zero(tol):
    """Sample 0 has J = 0.  f sends all samples through one dense product: 0 x NaN would lose the others."""
    g = torch.Generator().manual_seed(0)
    K = torch.zeros(3, 4, 3, 4)
    K[1, :, 1], K[2, :, 2] = (0.2 * torch.randn(4, 4, generator=g) for _ in range(2))
    K, b, seen = K.view(12, 12), torch.randn(3, 4, generator=g), []

    def f(h):
        seen.append(bool(h.isnan().any()))
        return (K @ h.flatten()).view(3, 4) + b

    result = gmres(f, b, stop_mode=b, tol=tol, max_iter=20, memory=3)
    right = torch.linalg.solve(torch.eye(12) - K, b.flatten()).view(3, 4)
    assert not any(seen)
    torch.testing.assert_close(result.h, right, rtol=1e-5, atol=1e-6)


def test_gmres_without_b_stops_when_it_is_done_and_leaves_a_solved_sample_alone():
    g = torch.Generator().manual_seed(1)
    J, u = 0.5 * torch.randn(60, 60, generator=g) / 60 ** 0.5, torch.randn(4, 60, generator=g)
    result = gmres(lambda h: h @ J + u, torch.zeros(4, 60), tol=1e-2, max_iter=40)
    assert result.converged.all() and result.n_evals < 15 and result.trace.isfinite().all()
    u[0] = 0
    result = gmres(lambda h: h @ J + u, torch.zeros(4, 60), tol=1e-4, max_iter=40, stop_mode="abs")
    assert result.converged.all() and (result.h[0] == 0).all() and (result.trace[:, 0] == 0).all()


def test_an_infinite_norm_is_infinite():
    x = torch.tensor([[1.0, math.inf], [1.0, 2.0], [math.nan, 1.0], [1e30, 1e30], [0.0, 0.0]])
    for dtype in (torch.float32, torch.float64):
        norms, = common._norms([x.to(dtype)], dtype)
        torch.testing.assert_close(norms, torch.tensor([math.inf, 5 ** 0.5, math.nan, 2 ** 0.5 * 1e30, 0]).to(dtype),
                                   equal_nan=True)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_bit_of_noise_in_f_does_not_couple_samples(solver):
    """At tol = 0: sample 0 is solved exactly, and one ulp off at every second call, as atomic additions may be."""
    calls = []

    def f(h):
        calls.append(None)
        out = 0.9 * h + 1
        out[0] = 1 + (len(calls) % 2 == 0) * 2 ** -23
        return out

    result = solver(f, torch.ones(3, 2), max_iter=12, tol=0)
    assert result.residual[0] == 0 and result.trace[:, 0].max() < 2e-7 and result.trace[0, 1] > 0.1
