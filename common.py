"""Solvers, gradients and training runs for "On Training Implicit Models" (NeurIPS 2021, arXiv:2111.05177).

An implicit model outputs the fixed point h* = f(h*) of its equilibrium module f (the paper's F(h, z), where f
closes over the input u and the parameters theta).  A solver finds h*.  The gradient is a separate choice:

    h, result = equilibrium(f, h0, grad="upg", k=5, lam=0.5, solver=broyden, max_iter=22, tol=1e-4)
    loss(h).backward()                                   # gradients for everything that f closes over

    grad        backward pass, with J = df/dh at h*, B = lam J + (1 - lam) I, g = dL/dh   memory: graphs of f
    "upg"       autograd through k damped steps from h*, Eq. (16), Algorithm 1            k
    "npg"       g_hat = lam (I + B^T + ... + (B^T)^(k-1)) g, Eq. (17)                     1
    "implicit"  g_hat = (I - J^T)^-1 g by a second solve, Eq. (4): the exact gradient     1 + solver states
    "bptt"      autograd through every iteration of the forward solve, Eq. (10)           max_iter

A state h is a tensor whose first dimension is the batch N, or a tuple, list, dict, ... of such tensors (any
torch pytree).  The solvers take every decision per sample: if f treats its samples independently, a batch
gives the same answers as its samples one at a time.
The paper writes Jacobians transposed: its "Jacobian-vector product" is PyTorch's vector-Jacobian product.

The mathematics ends at "Part 2" and needs nothing but torch 2.6 or newer.  Copy this file into your project,
or copy the first block of imports, the line `State = ...` and one of these functions with what it needs:

    a solver    the whole section before "Solvers", and `_solver`
    upg         everything from `_require` to `_explain`, and `_check_phantom`
    npg         the same as for upg, and everything from `_vjp` to `_Undifferentiable`
    implicit    everything up to `gmres`, its default, and everything from `_vjp` to `_Undifferentiable`
"""
import contextlib
import functools
import gc
import math
import operator
import warnings
from typing import Callable, NamedTuple, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

State = Tensor | tuple | list | dict


# ------------------------------------------------------------------------------------------------------------
# The state as one flat (rows, D) tensor, and the bookkeeping that the solvers share
# ------------------------------------------------------------------------------------------------------------

def _require(ok, message):
    if not ok:
        raise ValueError(message)


def _whole(x, name):
    """Returns x, an int or an integer of numpy or torch, as an int >= 1."""
    try:
        n = x if type(x) is int else operator.index(x)
    except TypeError:
        n = 0
    if n < 1 or isinstance(x, bool) or torch.is_tensor(x) and x.dtype == torch.bool:
        raise ValueError(f"{name} must be an integer >= 1, got {x!r}")
    return n


def _fraction(x, name):
    """Returns x in (0, 1], a number of Python, numpy or torch, as a float, or unchanged if it is learned."""
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        learned = torch.is_tensor(x) and x.requires_grad
        if not isinstance(x, str) and 0 < float(x.detach() if learned else x) <= 1:
            return x if learned else float(x)
    raise ValueError(f"{name} must be one number in (0, 1], got {x!r}")


def _flatten(h):
    """The tensors of a state and the structure that holds them.

    Under autocast half precision becomes float32.  Otherwise a start like torch.zeros_like(u) would cost
    precision if autocast has computed u.
    """
    parts, spec = tree_flatten(h)
    for p in parts or [h]:
        if not (torch.is_tensor(p) and p.is_floating_point() and p.dim() > 0 and not p.is_nested
                and p.layout == torch.strided and not hasattr(p, "to_local")):
            found = repr(p)[:80]
            if torch.is_tensor(p):
                found = f"{type(p).__name__} {p.dtype} with {p.dim()} dimensions"
            raise ValueError(
                "h0 must be a floating-point tensor with the batch as first dimension, or a tuple, list, "
                f"dict, ... of them, got {found}.  Keep counters and flags outside of it.  Pass complex "
                "numbers as torch.view_as_real(h), nested tensors padded, distributed ones as h.to_local()")
    _require(all(p.shape[0] == parts[0].shape[0] for p in parts),
             f"the parts of h0 differ in batch size: {[tuple(p.shape) for p in parts]}")
    if torch.is_autocast_enabled(parts[0].device.type):
        parts = [p.float() if p.dtype in (torch.bfloat16, torch.float16) else p for p in parts]
    return parts, spec


def _returned(h, spec, shapes, name="f must return a state"):
    """The tensors of a state that f has returned, checked against the structure and the shapes of h0."""
    if type(h) in (tuple, list) and spec.type in (tuple, list):        # either may stand for the other
        h = spec.type(h)
    try:        # matches dicts by key, not by order.  If h0 is a tensor, a tuple counts as one part
        parts = [h] if spec.is_leaf() else spec.flatten_up_to(h)
    except ValueError as error:
        raise ValueError(f"{name} of the shape of h0: a tensor if h0 is one, else the same tuple, list, "
                         f"dict, ... ({error})") from None
    real = all(torch.is_tensor(p) and p.is_floating_point() for p in parts)
    if not real or [p.shape for p in parts] != shapes:
        expected = ", ".join(str(tuple(s)) for s in shapes)
        found = ", ".join(f"{tuple(p.shape)} of {p.dtype}" if torch.is_tensor(p) else type(p).__name__
                          for p in parts)
        raise ValueError(f"{name} of the shape of h0, a tensor if h0 is one, of real floating-point numbers: "
                         f"{expected} expected, {found} returned")
    return parts


def _call(f, h, spec, shapes):
    """Calls f on the state with the parts h.  Returns the parts of f(h)."""
    copied = torch.compiler.is_compiling() or any(p.is_inference() for p in h)
    if copied:                          # torch does not count in-place changes (_version) in these cases
        h = [p.clone() for p in h]
    versions = None if copied else [p._version for p in h]
    f_parts = _returned(f(h[0] if spec.is_leaf() else tree_unflatten(h, spec)), spec, shapes)
    if versions and versions != [p._version for p in h]:
        # A solver would take a state changed by f for a root, and a gradient would be taken at a changed h*.
        raise ValueError("f must not change its argument in place: use inplace=False in its first operation")
    return f_parts


def _forget_cached_weights():
    """Clears the caches of autocast and parametrize.cached(): a weight from a solve would have no graph."""
    if not torch.compiler.is_compiling():
        torch.clear_autocast_cache()
        torch.nn.utils.parametrize._cache.clear()


def _explain(error):
    """Raises an error that says what to use instead if a torch transform failed in a solver or its gradient.

    torch has no exception types for these failures, so their texts are matched.  Other errors are ignored.
    """
    text = str(error)
    if "forward AD" in text:
        remedy = ("forward-mode derivatives (jvp, jacfwd, hessian) cannot pass a fixed-point solver: use "
                  "reverse mode, with grad='upg' for second derivatives (torch.func.jacrev of jacrev)")
    elif (("vmap: " in text and "not possible" in text) or ("functorch" in text and "requires_grad_" in text)
          or "Batching rule not implemented" in text):
        remedy = ("a fixed-point solver cannot run under vmap, nor 'npg' and 'implicit' under any transform "
                  "of torch.func: call vmap inside f, and use grad='upg' under torch.func.grad")
    elif "selective activation checkpoint" in text:
        remedy = ("npg and implicit run f's backward pass several times, which selective activation "
                  "checkpointing refuses: use grad='upg', or plain checkpoint(..., use_reentrant=False)")
    else:
        return
    raise RuntimeError(f"equilibrium: {remedy}") from error


def _check_budget(max_iter, tol, stop_mode="rel", which=""):
    max_iter = _whole(max_iter, f"{which}max_iter")
    number = isinstance(tol, (int, float)) or hasattr(tol, "item")
    _require(number and float(tol) >= 0, f"{which}tol must be >= 0, got {tol!r}")
    if not any(map(torch.is_tensor, tree_flatten(stop_mode)[0])):           # else it is a state
        _require(stop_mode in ("rel", "rel_joint", "abs", "max"),
                 f"stop_mode must be 'rel', 'rel_joint', 'abs' or 'max', got {stop_mode!r}")
    return max_iter


def _check_offsets(offsets, rows):
    if not (torch.is_tensor(offsets) and offsets.dtype in (torch.int32, torch.int64) and offsets.dim() == 1
            and len(offsets) >= 1):
        raise ValueError(f"offsets must be an integer tensor (N + 1,), got {offsets!r}")
    # Reading the values would wait for a GPU.  With _require all offsets would be written out at every call.
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling() and not (
            int(offsets[0]) == 0 and int(offsets[-1]) == rows and bool((offsets.diff() >= 0).all())):
        raise ValueError("offsets must go from 0 up to the number of rows of h0, "
                         f"{rows}, got {offsets.tolist()}")


def _wide(x):
    """float64, or float32 on MPS, which has no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _largest(x):
    """max |x_i| (N,) for x (N, ...), or 0 if x_i is empty."""
    x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    return torch.linalg.vector_norm(x, math.inf, dim=1) if x.shape[1] else x.new_zeros(x.shape[0])


def _norms(xs, dtype):
    """For each x (N, ...) of a list, the norms ||x_i|| (N,), also if their squares under- or overflow.

    A norm that underflows to 0 would look like a solution.  On a CPU such a norm is computed in float64 from
    x / max |x|.  Elsewhere max |x| replaces it, since a look at the norms would wait for the GPU.
    """
    xs = [x[:, None] if x.dim() == 1 else x for x in xs]
    N = xs[0].shape[0]          # torch.export would take len(xs[0]) for a constant
    norms, largest = xs[0].new_empty(2, len(xs), N, dtype=dtype)
    for x, out in zip(xs, norms):
        torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), dtype=dtype, out=out)
    # All norms at once, since on a GPU the launch of a small operation costs more than its arithmetic.
    safe = norms.clamp(*((1e-15, 1e18) if dtype == torch.float32 else (1e-150, 1e150))) == norms    # no NaN
    if xs[0].device.type != "cpu" or torch.compiler.is_compiling():
        for x, out in zip(xs, largest):
            order = math.inf if math.prod(x.shape[1:]) else 2           # an empty x has no maximum
            torch.linalg.vector_norm(x, order, dim=tuple(range(1, x.dim())), dtype=dtype, out=out)
        return list(torch.where(safe, norms, largest))
    if not bool(safe.all()):
        for x, norm, ok in zip(xs, norms, safe):
            rows = x[~ok].flatten(1)
            if not bool(rows.any()):            # as h0 = 0: a norm of 0 is right
                continue
            rows = rows.double()
            largest = _largest(rows).clamp_min(torch.finfo(rows.dtype).tiny)
            scaled = torch.linalg.vector_norm(rows / largest[:, None], dim=1) * largest
            norm[~ok] = torch.where(largest.isinf(), largest, scaled).to(dtype)
    return list(norms)


def _together(norms):
    """The norm (N,) of a state from those of its parts."""
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0, dtype=_wide(norms[0])).to(norms[0].dtype)


def _ratio(norm, size):
    """norm / size, or 0 if both are 0.  An infinite size is clamped: norm / inf = 0 would look solved."""
    return (norm / size.clamp(max=torch.finfo(norm.dtype).max)).masked_fill_(norm == 0, 0)


class _Layout:
    """The layout of a state in one flat tensor (rows, D): its parts are columns, its samples are rows.

    A sample is one row, or, with offsets (N + 1,), the rows offsets[i] to offsets[i + 1].  The flat tensor is
    float32, or float64 if a part is float64.  A 4-dimensional part in channels-last memory keeps that format,
    since f's convolutions were tuned for it.
    """

    def __init__(self, h, offsets=None):
        parts, self.spec = _flatten(h)
        self.shapes, self.dtypes = [p.shape for p in parts], [p.dtype for p in parts]
        self.rows, self.device = parts[0].shape[0], parts[0].device
        self.sizes = [math.prod(s[1:]) for s in self.shapes]
        self.channels_last = [p.dim() == 4 and not p.is_contiguous()
                              and p.is_contiguous(memory_format=torch.channels_last) for p in parts]
        self.dtype = torch.float64 if torch.float64 in self.dtypes else torch.float32
        self.N, self.offsets = self.rows, offsets
        if offsets is not None:
            _check_offsets(offsets, self.rows)
            self.N = len(offsets) - 1
            self.sample_of = torch.repeat_interleave(offsets.diff(), output_size=self.rows)

    def split(self, x):
        """The columns of x (rows, D) as views in the shapes of the parts."""
        columns, views = x.split_with_sizes(self.sizes, dim=1), []
        for column, shape, last in zip(columns, self.shapes, self.channels_last):
            if last:
                n, c, *hw = shape
                views.append(column.view(n, *hw, c).permute(0, 3, 1, 2))
            else:
                views.append(column.view(shape))
        return views

    def parts(self, x):
        """The parts of x (rows, D) as f gets them, in their own dtypes.  Copies only if the dtype differs."""
        return [view.to(dtype) for view, dtype in zip(self.split(x), self.dtypes)]

    def pack(self, parts):
        x = torch.empty(self.rows, sum(self.sizes), dtype=self.dtype, device=self.device)
        for view, part in zip(self.split(x), parts):
            view.copy_(part)
        return x

    def per_row(self, x):
        """Repeats values per sample (N, ...) for each of its rows: (rows, ...)."""
        return x if self.offsets is None else x[self.sample_of]

    def per_sample(self, x, how):
        """Reduces values per row (rows, ...) to values per sample (N, ...).  how: "sum" or "max"."""
        if self.offsets is None:
            return x
        # unsafe=True skips a check of the offsets that would wait for the GPU.
        return torch.segment_reduce(x, how, offsets=self.offsets, initial=0, unsafe=True)

    def norms_of(self, xs, dtype=None):
        """For each x (rows, ...) of a list, ||x|| of each sample (N,), summed in `dtype`."""
        norms = _norms(xs, dtype or functools.reduce(torch.promote_types, [x.dtype for x in xs], self.dtype))
        if self.offsets is not None:
            norms = [self.per_sample(norm.to(_wide(norm)).square(), "sum").sqrt() for norm in norms]
        return [norm.to(self.dtype) for norm in norms]

    def norms(self, x, dtype=None):
        """||x|| of each sample (N,), for x (rows, ...)."""
        return self.norms_of([x], dtype)[0]

    def products(self, a, b):
        """(N, i, j): per sample, the inner products of the states a (i, rows, D) with b (j, rows, D)."""
        return self.per_sample(_products(a, b), "sum")


class SolverResult(NamedTuple):
    """What a solver found.  `residual` and `trace` are measured as its stop mode says.  N counts samples.

    If f couples samples without offsets that say so, `residual` belongs to `h` only if all samples converged.
    """
    h: State                # each sample at its lowest residual, or h0 (gmres with b: zero) if none is finite
    residual: Tensor        # (N,) the residual of h, inf for a sample for which f was never finite
    n_evals: int            # calls of f
    trace: Tensor           # (n_evals, N) residual at each evaluation.  Stopped samples repeat their last one
    converged: Tensor       # (N,) bool, residual <= tol


torch.serialization.add_safe_globals([SolverResult])        # torch.load accepts a checkpoint with a result


class _Progress:
    """Evaluates f.  Per sample, keeps the trace of its residual, the lowest one, and whether it still moves.

    A sample stops when it has converged or is lost (see `fixed_point`).  (The official release has this
    protective break for the whole batch.)  If a stopped sample is later found above 10 tol, it was disturbed,
    so f couples samples.  From then on all samples count as one with the residual of the worst, and earlier
    records do not count: a state put together from several evaluations has none of their residuals.

    Everything stays on the device.  The host synchronises in `finished` alone: at every evaluation on a CPU,
    at every 8th on a GPU, and never with tol = 0, since then only the budget ends a solve.  (`gmres` has a
    check like it and one per restart, `result` has one more.)  Disturbed samples are looked for as often, and
    at the last evaluation.
    """

    def __init__(self, f, h0, max_iter, tol, stop_mode, offsets=None):
        self.max_iter = _check_budget(max_iter, tol, stop_mode)
        self.f, self.tol, self.stop_mode = f, float(tol), stop_mode
        self.layout = layout = _Layout(h0, offsets)
        self.per_row, self.norms, self.products = layout.per_row, layout.norms, layout.products
        self.finfo, self.x0 = torch.finfo(layout.dtype), layout.pack(tree_flatten(h0)[0])
        # True if a look at a number costs nothing.
        self.on_cpu = layout.device.type == "cpu" and not torch.compiler.is_compiling()
        self.b = self.limit = None
        if not isinstance(stop_mode, str):                  # stop_mode is the b of f(h) = J h + b
            b = _flatten(stop_mode)[0]
            _require([p.shape for p in b] == layout.shapes, "stop_mode, a state, must be of the shape of h0")
            self.b, self.stop_mode = layout.pack(b), "b"
            size = self.norms(self.b)
            # A sample with b = 0 is measured by the batch's ||b|| and its own ||h||, as f may couple samples.
            self.zero_b, self.size = size == 0, torch.where(size > 0, size, *_norms([size[None]], size.dtype))
            self.some_b_is_zero = not self.on_cpu or bool(self.zero_b.any())        # True also if unknown
        self.by_part = len(layout.shapes) > 1 and self.stop_mode in ("rel", "b")
        # A stopped sample is disturbed if its residual is above `far`, not tol: rounding may lift a solved
        # sample above tol.  A relative residual of 0.5 is far in any case.
        self.far = 10 * self.tol
        if self.stop_mode not in ("abs", "max"):
            self.far = max(self.tol, min(max(self.far, 10 * self.finfo.eps), 0.5))
        self.trace = self.x0.new_empty(self.max_iter + 1, layout.N)
        self.lowest = self.x0.new_full((layout.N,), math.inf)
        self.moving = torch.ones(layout.N, dtype=torch.bool, device=layout.device)
        self.coupled = torch.zeros((), dtype=torch.bool, device=layout.device)
        self.apart = True                                   # f does not couple samples.  False if unknown
        self.zero = self.x0.new_zeros(())   # torch.where would send a number to the device at each call
        self.evals, self.check_every = 0, 1 if layout.device.type == "cpu" else 8
        self.nobody_stands = self.on_cpu                    # all samples move.  False if unknown

    def call(self, x, g, f_out=None):
        """Writes f(x) - x to g, and f(x) to f_out if given, all (rows, D).  Returns the parts of f(x)."""
        x_parts = self.layout.parts(x)
        f_parts = _call(self.f, x_parts, self.layout.spec, self.layout.shapes)
        for f_part, x_part, g_part in zip(f_parts, x_parts, self.layout.split(g)):
            torch.sub(f_part, x_part, out=g_part)
        if f_out is not None:
            for f_part, out in zip(f_parts, self.layout.split(f_out)):
                out.copy_(f_part)
        return f_parts

    def columns(self, x):
        """[x_p for each part p of x (rows, D)] if each part is measured by itself, else [x]."""
        return list(x.split_with_sizes(self.layout.sizes, dim=1)) if self.by_part else [x]

    def measure(self, x, g, f_parts):
        """(||g||, residual at x), both (N,), for g = f(x) - x and the parts of f(x).  See `fixed_point`."""
        others, parts = [], self.columns(g)
        if self.b is not None:
            others = self.columns(x)
        elif self.stop_mode in ("rel", "rel_joint"):
            others = f_parts
        norms = self.layout.norms_of(parts + others)
        norms, sizes = norms[:len(parts)], norms[len(parts):]
        norm, eps = _together(norms), self.finfo.eps
        if self.b is not None:  # f(x) - x has a rounding error of eps ||x||.  If x explodes, it is all error
            x_norm = _together(sizes)
            norm = torch.maximum(norm, eps * x_norm)
        elif sizes:
            self.size = _together(sizes)
        if self.stop_mode == "max":
            residual = self.layout.per_sample(_largest(g), "max")
        else:
            residual = self.relative(norm)
        if self.b is not None and self.some_b_is_zero:
            own = _ratio(norm, torch.maximum(x_norm, eps * _norms([x_norm[None]], x_norm.dtype)[0]))
            residual = torch.where(self.zero_b, torch.maximum(residual, own), residual)
        if self.by_part:            # else a small part would hide behind a large one
            least = eps * (self.size if self.b is None else x_norm)
            for part_norm, size in zip(norms, sizes):
                residual = torch.maximum(residual, _ratio(part_norm, torch.maximum(size, least)))
        return norm, residual

    def evaluate(self, x, g, f_out=None):
        """Runs `call`, records the residual at x, returns ||g|| (N,), with b at least its rounding error."""
        norm, residual = self.measure(x, g, self.call(x, g, f_out))
        # A sample is lost if its ||g|| is above `limit`.  The first ||g|| is no scale if h0 happens to be a
        # root: then ||h0|| sets the limit.  If both are 0, as in graph rows that no neighbour has reached
        # yet, the batch sets it.
        if self.limit is None:
            limit = torch.maximum(1e6 * norm, 1e3 * self.norms(x))
            self.limit = torch.where(limit == 0, limit.nansum(), limit).clamp(max=self.finfo.max)
        fine, unsolved = norm <= self.limit, residual > self.tol        # False for NaN
        if not (self.nobody_stands and bool((fine & unsolved).all())):  # on a CPU this is rarely needed
            self.stop_and_restart(norm, residual, fine, unsolved)
        self.record(self.joint(residual))
        return norm

    def stop_and_restart(self, norm, residual, fine, unsolved):
        """Sets `moving`: a sample stops when it is solved or lost, and moves again if it is disturbed."""
        self.limit.masked_fill_(self.moving > fine, -1)                             # lost for good
        if self.on_cpu or (self.evals + 1) % self.check_every == 0 or self.evals == self.max_iter:
            disturbed = ~self.moving & (self.limit >= 0) & ~(residual <= self.far)
            grown = torch.maximum(self.limit, 1e6 * norm).clamp(max=self.finfo.max)
            self.limit = torch.where(disturbed, grown, self.limit)
            fine, self.moving = norm <= self.limit, self.moving | disturbed
            self.couple(disturbed.any())
        self.moving = fine & unsolved & (self.moving if self.apart else self.moving | self.coupled)
        self.nobody_stands = self.on_cpu and bool(self.moving.all())

    def couple(self, found):
        """If `found` (0-dim.), f couples samples: the residual of a stopped sample has changed."""
        self.lowest = torch.where(found & ~self.coupled, math.inf, self.lowest)
        self.coupled = self.coupled | found
        self.apart = self.on_cpu and not bool(self.coupled)

    def joint(self, residual):
        """Returns the residual (N,).  If f couples samples, all get that of the worst."""
        if residual.numel() == 0 or self.apart:
            return residual
        return torch.where(self.coupled, residual.amax(0), residual)

    def relative(self, norm):
        """The residual (N,) of all parts together, for ||f(h) - h|| = norm."""
        return norm if self.stop_mode == "abs" else _ratio(norm, self.size)

    def record(self, residual):
        self.trace[self.evals] = residual
        self.evals += 1

    def improved(self):
        """Updates the lowest residuals.  Returns which samples (N,) have improved in the last evaluation."""
        residual = self.trace[self.evals - 1]
        better = residual < self.lowest         # False for NaN: a broken evaluation is never the best
        self.lowest = torch.where(better, residual, self.lowest)
        return better

    def keep(self, x, x_best):
        """Returns the best state so far, including x, and a buffer for the next x."""
        better = self.improved()
        if self.on_cpu and bool((better | (self.lowest <= self.tol)).all()):
            return x, x_best    # without a copy: each sample has improved at x, or is solved and unmoved
        return torch.where(self.per_row(better)[:, None], x, x_best, out=x_best), x

    def hold(self, g, moving):
        """Sets g to 0 for the samples that have stopped.  A product with 0 would leave NaN as NaN."""
        if not (self.on_cpu and bool(moving.all())):
            torch.where(self.per_row(moving)[:, None], g, self.zero, out=g)

    def finished(self):
        if self.evals > self.max_iter:
            return True
        if self.tol == 0 or self.evals % self.check_every:
            return False
        found = int(self.moving.any() + 2 * self.coupled)               # host sync: two answers in one number
        self.apart = found < 2
        return found % 2 == 0

    def result(self, x_best, g, residual=None):
        residual = self.lowest if residual is None else residual
        converged = residual <= self.tol
        # Lost samples go back to their best states.  This changes other residuals if f couples samples.
        if (self.tol > 0 and self.check_every <= self.evals <= self.max_iter
                and bool(converged.any() & ~converged.all())):                                  # host sync
            self.evaluate(x_best, g)
            residual = self.trace[self.evals - 1].nan_to_num(nan=math.inf, posinf=math.inf)
            converged = residual <= self.tol
        h = tree_unflatten(self.layout.parts(x_best), self.layout.spec)
        return SolverResult(h, residual, self.evals, self.trace[:self.evals], converged)


def _pieces(N, D, device):
    """The number of equal pieces into which the D numbers of each sample are cut for inner products.

    cuBLAS computes a product in one block of threads, so with a small N most of a GPU would be idle.
    """
    most = 1 if device.type == "cpu" else min(1024 // max(N, 1), D // 4096)
    return next((i for i in range(most, 1, -1) if D % (4 * i) == 0), 1)


def _products(a, b):
    """(N, i, j): for each row, the inner products of a (i, N, D) with b (j, N, D)."""
    (i, N, D), j = a.shape, len(b)
    pieces = _pieces(N, D, a.device)
    a, b = a.view(i, N * pieces, D // pieces), b.view(j, N * pieces, D // pieces)
    products = torch.bmm(a.transpose(0, 1), b.permute(1, 2, 0))
    return products if pieces == 1 else products.view(N, pieces, i, j).sum(1)


# ------------------------------------------------------------------------------------------------------------
# Solvers
# ------------------------------------------------------------------------------------------------------------

def _solver(method):
    """Runs a solver without a graph.  Under autocast only f uses it, and the solver's products are float32.

    On GPUs these products are in TF32 if torch.set_float32_matmul_precision allows it.
    """
    @functools.wraps(method)
    def solve(f, h0, **options):
        parts, spec = _flatten(h0)
        device = parts[0].device.type
        try:
            with torch.no_grad():
                if not torch.is_autocast_enabled(device):
                    return method(f, h0, **options)
                f = torch.autocast(device, dtype=torch.get_autocast_dtype(device))(f)
                with torch.autocast(device, enabled=False):
                    return method(f, tree_unflatten(parts, spec), **options)
        except RuntimeError as error:
            _explain(error)
            raise
        finally:
            _forget_cached_weights()
    return solve


@_solver
def fixed_point(f: Callable, h0: State, *, max_iter: int = 40, tol: float = 1e-4,
                stop_mode: str | State = "rel", lam: float = 1.0,
                offsets: Tensor | None = None) -> SolverResult:
    """Fixed-point iteration, plain with lam = 1, Eq. (9), else damped: h <- (1 - lam) h + lam f(h), Eq. (12).

    It converges at the rate rho(lam J + (1 - lam) I).  A sample stops when its residual is at most tol.  The
    residual is that of f, not the length of the damped step.  stop_mode defines it:

        "rel"        ||f(h) - h|| / ||f(h)||, the largest over the parts of the state.  Cannot fall if h* = 0.
                     (The norm of a part counts as at least eps times the norm of all parts.)
        "rel_joint"  the same with one norm over all parts, as in official releases: a small part can hide
        "abs"        ||f(h) - h||
        "max"        max |f(h) - h|
        a state b    ||f(h) - h|| / ||b|| for an affine f(h) = J h + b.  An exploding h cannot make it small.
                     A sample whose b is zero is measured by the batch's ||b|| and by its own ||h||.  If there
                     are several parts, each is also measured by its own ||h||.

    A sample is lost, and stops, if ||f(h) - h|| is not finite, or is above both a million times its first
    value and 1000 ||h0||.  A solve that does not converge raises no error: check `converged`.

    max_iter counts steps.  f is called at most max_iter + 1 times, as the residual of the last state is
    computed, too.  (If some samples converge and the others are lost before that, the last call is at h.)
    Memory: 3 states.  Every solver needs one more for b.

    f gets each part in the dtype of h0.  h is returned in this dtype, and the residual is that of this h.
    (Under autocast float32 replaces half precision.)  The solver's own vectors are float32, or float64 if a
    part is.  No residual falls much below the rounding error of f: with tanh layers about 1e-3 in bfloat16,
    1e-4 in float16, 1e-7 in float32.  f must neither change its argument nor keep it, since the argument may
    be a view of the solver's vectors.  It is not contiguous if h0 has several parts.

    offsets (N + 1,): for samples of different length, such as graphs.  The first dimension of the state then
    runs over the rows of all samples, and sample i is the rows offsets[i] to offsets[i + 1].  offsets[0] is
    0, the last offset is the number of rows.  Raises ValueError for an invalid argument, and if f changes its
    argument or returns another shape.
    """
    lam = float(_fraction(lam, "lam"))
    run = _Progress(f, h0, max_iter, tol, stop_mode, offsets)
    x, x_best, g = run.x0.clone(), run.x0, torch.empty_like(run.x0)
    while True:
        run.evaluate(x, g)
        x_best, out = run.keep(x, x_best)
        if run.finished():
            return run.result(x_best, g)
        run.hold(g, run.moving)
        x = torch.add(x, g, alpha=lam, out=out)


@_solver
def anderson(f: Callable, h0: State, *, max_iter: int = 40, tol: float = 1e-4, stop_mode: str | State = "rel",
             m: int = 6, beta: float = 1.0, ridge: float = 1e-4,
             offsets: Tensor | None = None) -> SolverResult:
    """Anderson acceleration (type II) over the last m pairs (h_i, f(h_i)), with g_i = f(h_i) - h_i:

        h <- beta sum_i alpha_i f(h_i) + (1 - beta) sum_i alpha_i h_i,
        alpha = argmin ||sum_i alpha_i g_i||^2 + ridge sum_i alpha_i^2 ||g_i||^2  with  sum_i alpha_i = 1.

    The ridge of a pair is relative to its own residual.  A ridge common to all pairs would be set by the
    oldest, largest residuals of the window, and an absolute one stalls once the residuals are below it.  On
    the F of MDEQ and of the Transformer, m above 6 saved at most one evaluation.  If the small system of a
    sample cannot be solved, its newest pair is used alone.  All else is as in `fixed_point`.  Memory: 2 m + 5
    states.  Source: Walker and Ni, "Anderson acceleration for fixed-point iterations", 2011.
    """
    m = _whole(m, "m")
    beta = float(_fraction(beta, "beta"))
    _require(ridge >= 0, f"ridge must be >= 0, got {ridge!r}")
    run = _Progress(f, h0, max_iter, tol, stop_mode, offsets)
    x, x_best = run.x0.clone(), run.x0
    m, N = min(m, run.max_iter), run.layout.N
    fs, gs = x.new_empty(m, *x.shape), x.new_empty(m, *x.shape)     # rings: the order does not matter
    gram = x.new_zeros(N, m, m)                     # gram[i, j] = g_i . g_j, with the ridge on the diagonal
    ones, newest = x.new_ones(N, m), torch.eye(m, dtype=x.dtype, device=x.device)
    while True:
        i = run.evals % m
        run.evaluate(x, gs[i], f_out=fs[i])
        x_best, out = run.keep(x, x_best)
        if run.finished():
            return run.result(x_best, gs[i])
        n = min(run.evals, m)
        row = run.products(gs[i:i + 1], gs[:n])[:, 0]                   # (N, n), the only new row of gram
        row[:, i].mul_(1 + ridge)
        gram[:, i, :n] = row
        gram[:, :n, i] = row
        # torch.linalg.solve would synchronise with the host.
        alpha, info = torch.linalg.solve_ex(gram[:, :n, :n], ones[:, :n])
        alpha = alpha / alpha.sum(dim=1, keepdim=True)
        ok = (info == 0) & (torch.linalg.vector_norm(alpha, math.inf, dim=1) < math.inf)    # False for NaN
        alpha = run.per_row(torch.where(ok[:, None], alpha, newest[i, :n]))[:, None]
        x_new = torch.bmm(alpha, fs[:n].transpose(0, 1))
        if beta < 1:
            x_new.baddbmm_(alpha, gs[:n].transpose(0, 1), alpha=beta - 1)
        x = torch.where(run.per_row(run.moving)[:, None], x_new[:, 0], x, out=out)


@_solver
def broyden(f: Callable, h0: State, *, max_iter: int = 40, tol: float = 1e-4, stop_mode: str | State = "rel",
            memory: int | None = None, offsets: Tensor | None = None) -> SolverResult:
    """Broyden's good method for g(h) = f(h) - h = 0, from the initial Jacobian -I, without line search.

    Textbooks keep the inverse as -I + U V^T, two tall matrices that are read three times per step.  Here only
    the steps s_0 = g, s_1, ... are kept, and they are read twice (after Kelley, "Iterative Methods for Linear
    and Nonlinear Equations", 1995, Sec. 7.3).  After step s_n, with g at the new state,

        alpha_0 = 0,  alpha_{j+1} = (s_j . g + sum_{i<=j} (s_j . s_i) alpha_i) / (s_j . s_j),  j = 0 .. n
        s_{n+1} = (g + sum_{i<=n} alpha_i s_i) / (1 - alpha_{n+1})

    alpha is linear in the products s_j . g: alpha = T (s_j . g)_j, and T grows by a row per step.

    memory: the number of steps kept (default max_iter).  When it is full, the method restarts from the
    current state.  Overwriting the oldest pairs, as public code does, stalls it.  A sample restarts with the
    plain step if its update would divide by almost zero, or if its step might be longer than 1e15.  All else
    is as in `fixed_point`.  Memory: `memory` + 4 states.
    """
    memory = math.inf if memory is None else _whole(memory, "memory")
    run = _Progress(f, h0, max_iter, tol, stop_mode, offsets)
    x, x_best = run.x0.clone(), run.x0
    m, N = min(memory, run.max_iter), run.layout.N
    rows = x.new_empty(m + 1, *x.shape)             # g, s_0, s_1, ...: the only large buffer, allocated once
    g = rows[0]
    lengths = x.new_zeros(N, m + 1)                 # ||row|| of each row
    # The coefficients of the rows in s_n, and T, in one tensor, as a restart sets both: s_n = g and T = 0.
    table, fresh = x.new_zeros(N, m + 1, m), x.new_zeros(m + 1, m)
    coefficients, T, fresh[0, 0] = table[:, 0], table[:, 1:], 1
    n = 0                                           # steps taken since the last restart
    while True:
        norm = run.evaluate(x, g)
        x_best, out = run.keep(x, x_best)
        if run.finished():
            return run.result(x_best, g)
        n = n % m
        run.hold(g, run.moving)
        if n == 0:
            alpha = x.new_zeros(N, 1)
        else:   # reads the steps once: their products with g, and with s_{n-1} for its row of T
            # A view of g and s_{n-1}, or a copy if the view's stride is beyond the int that cuBLAS takes.
            pair = rows[:n + 1:n] if n * x.numel() < 2 ** 31 else torch.stack([g, rows[n]])
            products = run.products(pair, rows[1:n + 1])                                        # (N, 2, n)
            square, inverse = products[:, 1, n - 1:], T[:, n, n - 1:n]
            torch.reciprocal(square.clamp_min(run.finfo.tiny), out=inverse)     # square is 0 if stopped
            torch.mul(torch.bmm(products[:, 1:], T[:, :n, :n - 1])[:, 0], inverse, out=T[:, n, :n - 1])
            torch.sqrt(square, out=lengths[:, n:n + 1])
            alpha = torch.bmm(T[:, :n + 1, :n], products[:, 0, :, None])[:, :, 0]               # (N, n + 1)
        c = torch.reciprocal(1 - alpha[:, n:], out=coefficients[:, :1])
        torch.mul(alpha[:, :n], c, out=coefficients[:, 1:n + 1])
        # The bound is on the sum of the parts' lengths: if long parts cancel, the rest is as uncertain.
        # As ||g|| counts as at least 1e10, c is below 1e5.  The square of 1e15 is within float32.
        torch.clamp(norm, min=1e10, out=lengths[:, 0])
        bound = torch.linalg.vector_norm(coefficients[:, :n + 1] * lengths[:, :n + 1], 1, dim=1)
        used = table[:, :n + 2, :n + 1]
        torch.where(bound[:, None, None] < 1e15, used, fresh[:n + 2, :n + 1], out=used)     # NaN restarts too
        s = rows[n + 1]
        torch.bmm(run.per_row(used[:, 0])[:, None], rows[:n + 1].transpose(0, 1), out=s[:, None])
        x = torch.add(x, s, out=out)
        n += 1


def _orthogonalize(run, rows, n, s, T, alive):
    """Subtracts from w = rows[n + 1] its part in the span of rows[:n + 1].  Fills row n of T = (I + L)^-1.

    Returns the coefficients of that part (N, n + 1) and the norm of the rest (N,), both without the factor s.

    This is modified Gram-Schmidt, which suffices for GMRES (Paige, Rozloznik and Strakos, 2006).  Computed as
    (I + L)^-1 V^T w, where L is the lower triangle of V^T V, it reads the basis V only twice, as `broyden`
    does (Swirydowicz et al., "Low synchronization Gram-Schmidt and generalized minimal residual algorithms").
    """
    w, basis = rows[n + 1], rows[:n + 1]
    products = run.products(rows[n:n + 2], basis) / s.square()[:, None, None]           # (N, 2, n + 1)
    T[:, n, :n] = -torch.bmm(products[:, :1, :n], T[:, :n, :n])[:, 0]
    T[:, n, n] = 1
    c = 0
    for last in (False, True):
        more = torch.bmm(T[:, :n + 1, :n + 1], products[:, -1, :, None])[:, :, 0]
        w[:, None].baddbmm_(run.per_row(more)[:, None], basis.transpose(0, 1), alpha=-1)
        c = c + more
        # If little is left of w, much of that is rounding error, and w is orthogonalized once more.  On a
        # GPU this is always done, since the check would wait.
        if last or run.on_cpu:
            norm = run.norms(w) / s
            if last or bool((~alive | (norm > 0.1 * torch.linalg.vector_norm(c, dim=1))).all()):
                return c, norm
        products = run.products(w[None], basis) / s.square()[:, None, None]


def _best_coefficients(R, t, residuals):
    """y (N, n, 1) with R y = t in the first 0, 1, ... or n directions, the best number for each sample.

    If I - J is nearly singular, the last directions may be amplified rounding errors.  They then cost more
    digits than the residual gains.
    """
    n = len(t)
    y = torch.stack(t, dim=1)[:, :, None].expand(-1, -1, n).triu()              # column j: the first j + 1
    y = torch.nn.functional.pad(torch.linalg.solve_triangular(R, y, upper=True), (1, 0))    # and with 0
    cost = torch.stack(residuals, dim=1) + 10 * torch.finfo(R.dtype).eps * torch.linalg.vector_norm(y, dim=1)
    best = cost.nan_to_num(nan=math.inf).argmin(dim=1)
    return y.gather(2, best[:, None, None].expand(-1, n, 1))


@_solver
def gmres(f: Callable, h0: State, *, max_iter: int = 40, tol: float = 1e-4, stop_mode: str | State = "rel",
          memory: int | None = None, offsets: Tensor | None = None) -> SolverResult:
    """GMRES for an affine f(h) = J h + b, that is for (I - J) h = b, as in the backward solve of "implicit".

    After j products with J, each sample has the smallest residual that any polynomial of J can reach with
    them, so its residual never rises.  (That of the other solvers may end larger than it began.)  If f
    couples samples (BatchNorm, a graph without offsets), GMRES per sample is wrong: use offsets, or another
    solver.  Source: Saad and Schultz, "GMRES: A generalized minimal residual algorithm for solving
    nonsymmetric linear systems", 1986.

    With stop_mode = b the search starts from zero, h0 is not used, and row j of the trace is the residual
    after j + 1 products.  Otherwise b is unknown: the first evaluation is at h0, and "rel" is relative to
    ||f(h)|| at the last evaluated state.  Rounding errors make the residual of the recurrence differ from the
    true one.  So the last evaluation is at the state found, and its residual decides.  If it is above tol,
    the sample restarts from there as long as budget is left and the state improves.

    memory: the number of products before a restart (default max_iter).  Memory: `memory` + 5 states, two more
    without b, and up to 10 `memory`^2 numbers per sample.  All else is as in `fixed_point`, but stop_mode
    "max" raises ValueError, as a recurrence of 2-norms cannot measure it.
    """
    memory = math.inf if memory is None else _whole(memory, "memory")
    if isinstance(stop_mode, str) and stop_mode == "max":
        raise ValueError("gmres has no stop_mode 'max': use 'rel' or 'abs'")
    run = _Progress(f, h0, max_iter, tol, stop_mode, offsets)
    max_iter, m, N = run.max_iter, min(memory, run.max_iter), run.layout.N
    x, x_best, r = run.x0.clone(), run.x0, torch.empty_like(run.x0)
    # J v = (f(origin + s v) - f(origin)) / s with s about ||f(origin)||.  A much smaller s v would be lost in
    # the rounding of f(origin + s v).  With a much larger one f(origin) would be lost.
    if run.b is None:
        run.evaluate(x, r)
        origin, at_origin, size = x.clone(), r.clone(), run.norms(r + x)
        start, going, residual = run.lowest, run.improved(), run.trace[0]
        if run.finished():
            return run.result(x_best, r)
    else:                       # from zero, whose residual is known
        origin, at_origin, size = None, run.b, run.size
        x.zero_()
        r.copy_(run.b)
        norm = run.norms(r)
        going = norm.isfinite()
        residual = run.lowest = start = torch.where(going, run.relative(norm), math.inf)
        x_best.masked_fill_(run.per_row(going)[:, None], 0)
    s = size.clamp(1, 1e15)                         # s^2 within float32
    rows = x.new_empty(m + 1, *x.shape)             # s times the basis
    eps, seen = run.finfo.eps, torch.zeros_like(going)

    # Masks of samples (N,).  going: the last true residual was the lowest.  rest: solved before this cycle.
    # alive: gets directions.  good: this product is finite.  left: the product has a part outside the basis.
    # turns: the rotation is defined.  seen: f was finite once.
    while run.evals < max_iter:                     # enough for a product and the last evaluation
        norm = run.norms(r)
        rest = ~(residual > tol)
        alive = going & ~rest & (norm > 0)
        # t measures all parts together, the trace shows the worst one.  Their ratio is taken as constant.
        scale = torch.where(norm > 0, residual / run.relative(norm), 1)
        torch.div(r, run.per_row(norm)[:, None], out=rows[0]).mul_(run.per_row(s)[:, None])
        run.hold(rows[0], alive)
        # T = (I + L)^-1.  Q: product of the Givens rotations.  R y = t.  They grow with n, to save memory.
        T, Q, R = x.new_zeros(3, N, min(m, 16) + 1, min(m, 16) + 1)
        Q[:, 0, 0], t, residuals = 1, [norm / s], [norm / s]
        for n in range(min(m, max_iter - run.evals)):
            if n + 1 == T.shape[1]:
                T, Q, R = torch.nn.functional.pad(torch.stack([T, Q, R]), (0, 16, 0, 16))
            w = rows[n + 1]
            run.call(rows[n] if origin is None else origin + rows[n], w)
            torch.sub(at_origin, w, out=w)                                              # (I - J) v
            c, norm = _orthogonalize(run, rows, n, s, T, alive)
            # If a product lies in the span of the basis, only rounding errors are left of it.  Below 10 eps
            # of its length the rest counts as zero.  A sample that has stopped, is lost or has no direction
            # left gets directions of zero, which change nothing.
            good = alive & norm.isfinite()
            seen = seen | good
            rounding = 10 * eps * torch.hypot(norm, torch.linalg.vector_norm(c, dim=1))
            left = good & (norm > rounding)
            c, norm = torch.where(good[:, None], c, 0), torch.where(left, norm, 0)
            column = torch.bmm(Q[:, :n + 1, :n + 1], c[:, :, None])[:, :, 0]
            d = torch.hypot(column[:, n], norm)
            turns = good & (d > rounding)                   # else I - J is singular on the span: no progress
            cos, sin = torch.where(turns, column[:, n] / d, 0), torch.where(turns, norm / d, 1)
            R[:, :n, n], R[:, n, n] = column[:, :n], torch.where(turns, d, 1)
            t[n:] = [cos * t[n], -sin * t[n]]
            Q[:, n + 1, :n + 1], Q[:, n + 1, n + 1] = -sin[:, None] * Q[:, n, :n + 1], cos
            Q[:, n, :n + 1], Q[:, n, n + 1] = cos[:, None] * Q[:, n, :n + 1], sin
            residuals.append(t[n + 1].abs())
            run.record(run.relative(residuals[-1] * s) * scale)
            alive = left & (run.trace[run.evals - 1] > tol)
            w /= run.per_row(norm)[:, None]
            run.hold(w, alive)
            if tol > 0 and run.evals % run.check_every == 0 and not bool(alive.any()):          # host sync
                break
        y = _best_coefficients(R[:, :n + 1, :n + 1], t[:n + 1], residuals)
        x += torch.bmm(run.per_row(y).transpose(1, 2), rows[:n + 1].transpose(0, 1))[:, 0]
        run.evaluate(x, r)
        residual = run.trace[run.evals - 1]         # a view: writing to it changes the trace
        run.couple((rest & (residual > 10 * tol)).any())
        residual[:] = run.joint(residual)
        going = run.improved()
        torch.where(run.per_row(going)[:, None], x, x_best, out=x_best)
        if run.by_part:             # the worst part's residual may rise while that of all parts falls
            going = residual.isfinite()
        if tol > 0 and run.evals < max_iter and bool((~going | (run.lowest <= tol)).all()):     # host sync
            break
    found = seen | (run.lowest < start) | run.trace[run.evals - 1].isfinite()       # else f was never finite
    return run.result(x_best, r, torch.where(found, run.lowest, math.inf))


# ------------------------------------------------------------------------------------------------------------
# Gradients
# ------------------------------------------------------------------------------------------------------------

def equilibrium(f: Callable, h0: State, *, grad: str = "upg", k: int = 5, lam: float = 0.5,
                solver: Callable = broyden, max_iter: int = 40, tol: float = 1e-4, stop_mode: str = "rel",
                backward_solver: Callable = gmres, backward_max_iter: int = 40, backward_tol: float = 1e-4,
                on_backward: Callable | None = None,
                offsets: Tensor | None = None) -> tuple[State, SolverResult]:
    """Solves h* = f(h*) without a graph, then attaches the gradient `grad` (table at the top of this file).

    Returns the state and the solver's result.  For "upg" the state is h_k, the last unrolled one.  For "npg"
    and "implicit" it is h* itself, at which evaluation takes the loss, too.  (The official implicit code
    returns f(h*).)  For "bptt", which runs all max_iter steps, it is the last iterate.  In grad mode a
    gradient is always attached, whatever `.training` is and even if the solve has not converged: check
    result.converged.  Under `torch.no_grad()` the function only solves.  Only "bptt" sends a gradient to h0.

    max_iter, tol, stop_mode, offsets, and what f gets and may do: see `fixed_point`.
    k, lam: for phantom gradients only.  k = 1, lam = 1 is the one-step gradient (JFB).
    solver, backward_solver: fixed_point, anderson, broyden, for the backward solve also gmres, or a
    functools.partial of one that binds what is not passed here (m, beta, ridge, memory, lam).  Your own
    solver is called as solver(f, h0, max_iter=, tol=, stop_mode=), with offsets= if they are given, and must
    return a SolverResult.
    backward_max_iter, backward_tol, on_backward: for "implicit" only, see `implicit`.

    Cost beyond the solve, if a call of f, a VJP into h and a VJP into the parameters count as one each: "upg"
    3 k - 1, "npg" k + 2, "implicit" at most backward_max_iter + 4.  "bptt" costs 3 max_iter with its solve.
    Under parametrize.cached() a weight is computed once for the solve, and once more with a graph.

    If f contains a collective (SyncBatchNorm), all processes must call it equally often: use tol = 0 and
    backward_tol = 0.  As it also couples samples, use another backward_solver than gmres.  A checkpoint
    inside f, or around `equilibrium` with "upg", needs use_reentrant=False.  The reentrant kind silently
    loses a part of "upg" or returns h* without a graph, and it cannot do "npg" and "implicit".  Do not change
    the returned state in place.  Raises ValueError for an invalid argument, and RuntimeError for a second
    derivative through "npg" or "implicit".
    """
    _require(grad in ("upg", "npg", "implicit", "bptt"),
             f"grad must be 'upg', 'npg', 'implicit' or 'bptt', got {grad!r}")
    _check_solver(solver)
    _check_solver(backward_solver, "backward_solver")
    _require(isinstance(stop_mode, str),
             f"stop_mode must be 'rel', 'rel_joint', 'abs' or 'max', got {stop_mode!r}")
    if grad == "bptt" and torch.is_grad_enabled():
        _require(solver is fixed_point,
                 "grad='bptt' differentiates the plain iteration: it needs solver=fixed_point")
        try:
            return _bptt(f, h0, max_iter, tol, stop_mode, offsets)
        except RuntimeError as error:
            _explain(error)
            raise
    if grad in ("upg", "npg"):
        _check_phantom(k, lam)
    elif grad == "implicit":
        _check_budget(backward_max_iter, backward_tol, which="backward_")
    samples = {} if offsets is None else {"offsets": offsets}
    result = solver(f, h0, max_iter=max_iter, tol=tol, stop_mode=stop_mode, **samples)
    if not torch.is_grad_enabled():
        return result.h, result
    if grad == "upg":
        return upg(f, result.h, k, lam), result
    if grad == "npg":
        return npg(f, result.h, k, lam), result
    return implicit(f, result.h, solver=backward_solver, max_iter=backward_max_iter, tol=backward_tol,
                    on_backward=on_backward, offsets=offsets), result


def _check_solver(solver, name="solver"):
    if not callable(solver):    # _require would write out the tensors of a partial, and wait for a GPU
        raise ValueError(f"{name} must be a function: fixed_point, anderson, broyden or one like them, "
                         f"for the backward solve also gmres, got {solver!r}")
    if name == "solver" and getattr(solver, "func", solver) is gmres:
        raise ValueError("solver=gmres is for an affine f, as that of the backward solve: "
                         "use it as backward_solver")


def _check_phantom(k, lam):
    return _whole(k, "k"), _fraction(lam, "lam")


def upg(f: Callable, h_star: State, k: int = 5, lam: float = 0.5) -> State:
    """Unrolling-based phantom gradient, Eq. (16), Algorithm 1: returns h_k, k steps from h* with a graph,

        h <- (1 - lam) h + lam f(h)

    The gradient is exactly that of the k-step graph, also if h* is no fixed point.  Then it acts as
    back-propagation through time (Sec. 3, "Trade-offs between Unrolling and Neumann").  From h* = 0 with lam
    = 1 it is the unrolled pretraining network.  Cost: k calls of f.  Memory: k graphs of f.  Raises
    ValueError for an invalid k or lam, and if f(h) has another shape than h or f changes h in place.
    """
    k, lam = _check_phantom(k, lam)
    _forget_cached_weights()
    h, spec = _flatten(h_star)
    h, shapes = [p.detach() for p in h], [p.shape for p in h]
    for _ in range(k):
        f_h = _call(f, h, spec, shapes)
        h = [torch.lerp(a, b.to(a.dtype), lam) for a, b in zip(h, f_h)]     # saves no tensor for its backward
    return tree_unflatten(h, spec)


def npg(f: Callable, h_star: State, k: int = 5, lam: float = 0.5) -> State:
    """Neumann-series phantom gradient, Eq. (17): returns h* with the backward pass

        g_hat = lam (I + B^T + ... + (B^T)^(k-1)) g,  B = lam J + (1 - lam) I,   dL/dz = (df/dz)^T g_hat.

    Memory: one graph of f for any k.  Cost: k + 2 calls of f and VJPs.  If rho(B) < 1, it tends to the exact
    gradient as k grows (Theorem 2 says so for a contraction).  At an exact fixed point it equals UPG.
    Algorithms 2 and 3 of the paper multiply by lam once more than Eq. (17), since their f already contains
    one lam.  We follow Eq. (17), for whose series Theorem 2 holds.  Raises ValueError for an invalid k or lam
    and if f(h) has another shape than h, and RuntimeError for a second derivative.
    """
    k, lam = _check_phantom(k, lam)

    def neumann(vjp, g):
        v = g
        for _ in range(k - 1):                              # Horner's scheme: v <- g + B^T v
            v = [gi + lam * ji + (1 - lam) * vi for gi, ji, vi in zip(g, vjp(v), v)]
        return [lam * vi for vi in v]

    return _attach(f, h_star, neumann)


def implicit(f: Callable, h_star: State, *, solver: Callable = gmres, max_iter: int = 40, tol: float = 1e-4,
             on_backward: Callable | None = None, offsets: Tensor | None = None) -> State:
    """Implicit differentiation, Eq. (4): returns h* with the backward pass g_hat = J^T g_hat + g, g = dL/dh.

    It is exact at an exact fixed point if the backward solve has converged.  `solver` starts at g (gmres at
    zero).  Its residual is ||g + J^T g_hat - g_hat|| / ||g||, that is stop_mode = g of `fixed_point`.
    (Relative to ||g_hat||, an exploding g_hat would look solved.)  If the solve fails, its best g_hat is
    used, and only on_backward(SolverResult) shows the failure.  Your own solver is called as
    solver(f, g, max_iter=, tol=, stop_mode=g), where g is a list, with offsets= if they are given, and must
    return a SolverResult.

    g is multiplied by a power of two before the solve, and g_hat is divided by it afterwards, so that the
    solve does not under- or overflow at any scale of the loss.  If the g of a sample is not finite, neither
    is its gradient (torch.amp.GradScaler relies on that).  If f couples samples, use offsets (for BatchNorm
    [0, N]), or another solver than gmres.

    Memory: one graph of f.  Cost: at most max_iter + 4 calls of f and VJPs.  offsets: see `fixed_point`.
    Raises ValueError for an invalid argument and if f(h) has another shape than h, and RuntimeError for a
    second derivative.
    """
    if not callable(solver):            # without _require, as in `_check_solver`
        raise ValueError(f"solver must be a function, got {solver!r}")
    _check_budget(max_iter, tol)
    layout, samples = _Layout(h_star, offsets), {} if offsets is None else {"offsets": offsets}

    def adjoint(vjp, g):
        g = [gi.to(torch.promote_types(gi.dtype, torch.float32)) for gi in g]
        largest = [gi.reshape(len(gi), -1).abs().amax(1) for gi in g if gi.numel()]     # NaN stays NaN
        if not largest:
            return g
        largest = torch.stack(largest).amax(0)                                          # (rows,)
        bad_rows = layout.per_sample((~largest.isfinite()).float(), "sum")
        finite = layout.per_row(bad_rows == 0)                      # the same for all rows of a sample
        # One factor for the whole batch: if f couples samples, scaling per sample would change the system.
        exponent = torch.frexp(torch.where(finite, largest, 0).amax()).exponent
        most = 125 if largest.dtype == torch.float32 else 1000
        exponent = exponent.clamp(-most, most).to(largest.dtype)
        g = [gi * torch.exp2(-exponent) for gi in g]
        result = solver(lambda w: [ji + gi for ji, gi in zip(vjp(w), g)], list(g), max_iter=max_iter, tol=tol,
                        stop_mode=g, **samples)
        factor = torch.where(finite, torch.exp2(exponent), math.nan)
        result = result._replace(h=[w * factor.view(-1, *[1] * (w.dim() - 1)) for w in result.h])
        if on_backward is not None:
            on_backward(result)
        return result.h

    return _attach(f, h_star, adjoint)


def _vjp(outputs, inputs, v, create_graph=False):
    """J^T v for lists of tensors.  v may have any precision.  An input without influence gets zeros."""
    pairs = [(o, vi.to(o.dtype)) for o, vi in zip(outputs, v) if o.requires_grad]
    j = [None] * len(inputs)
    if pairs:
        try:
            j = torch.autograd.grad([o for o, _ in pairs], inputs, [vi for _, vi in pairs], retain_graph=True,
                                    create_graph=create_graph, allow_unused=True)
        except RuntimeError as error:
            _explain(error)
            raise
    return [torch.zeros_like(x) if ji is None else ji for ji, x in zip(j, inputs)]


def _open(f, h):
    """For `_vjp`: leaves with the values of h, the parts of f at them with a graph, the structure of h."""
    parts, spec = _flatten(h)
    _forget_cached_weights()
    try:
        leaves = [p.detach().requires_grad_() for p in parts]
    except RuntimeError as error:
        _explain(error)
        raise
    # f gets views, since FlopCounterMode and similar tools put hooks on f's inputs, which leaves refuse.
    return leaves, _call(f, [p.view_as(p) for p in leaves], spec, [p.shape for p in leaves]), spec


def _attach(f, h_star, adjoint):
    """Returns h* with a gradient: f is evaluated once with a graph, and adjoint(vjp, dL/dh) is sent into it.

    The parameters and u get their gradients through the ordinary graph of that evaluation, so
    DistributedDataParallel, gradient accumulation and autocast work as usual.  No module gets a hook or a
    state, so two calls per forward pass, two backward passes, or none, are all fine.
    """
    h, f_h, spec = _open(f, h_star)
    out = _Adjoint.apply(lambda g: adjoint(lambda v: _vjp(f_h, h, v), g), *(p.detach() for p in h), *f_h)
    return tree_unflatten(list(out), spec)


class _Adjoint(torch.autograd.Function):
    """Forward: (h*, f(h*)) -> h*.  Backward: sends adjoint(dL/dh*) into f(h*)."""

    @staticmethod
    def forward(ctx, adjoint, *tensors):
        n = len(tensors) // 2
        ctx.adjoint = adjoint
        ctx.save_for_backward(*tensors[n:])
        return tuple(t.view_as(t) for t in tensors[:n])

    @staticmethod
    def backward(ctx, *g):
        with torch.no_grad():
            g_hat = [v.to(f.dtype) for v, f in zip(ctx.adjoint(g), ctx.saved_tensors)]
        if torch.is_grad_enabled():     # create_graph=True
            g_hat = _Undifferentiable.apply(len(g), *g_hat, *g, *ctx.saved_tensors)
        return None, *(None for _ in g), *g_hat


class _Undifferentiable(torch.autograd.Function):
    """Returns g_hat unchanged.  A second derivative, which would silently miss dJ/dh and dg/dh, raises.

    once_differentiable is not enough: autograd.grad(..., u) does not pass through its error node.
    """

    @staticmethod
    def forward(ctx, n, *tensors):
        return tuple(t.view_as(t) for t in tensors[:n])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("no second derivative through grad='npg' or 'implicit': use 'upg' or 'bptt', "
                           "which have one")


def compiled(f: Callable) -> Callable:
    """torch.compile(f), for an f inside `equilibrium`.  Sets torch's own options for all later compilation.

    "npg" and "implicit" run f's backward pass several times on one graph, so the first run must not give its
    buffers away, as it may by default.  Also, f meets more shapes and modes than torch compiles for by
    default: in the solver, in the gradient, in evaluation, and with a last, smaller batch.
    """
    from torch._functorch import config
    config.donated_buffer = False
    torch._dynamo.config.cache_size_limit = 64
    return torch.compile(f)


def recomputed(f: Callable) -> Callable:
    """An f that is computed again in the backward pass instead of keeping its intermediate results.

    This is for "upg" (and "bptt"), which keep a graph of f for each step.  Here a step keeps only its state,
    and costs one more call of f.  f must not draw random numbers, since its second run would draw others.
    """
    from torch.utils.checkpoint import checkpoint
    return functools.partial(checkpoint, f, use_reentrant=False, preserve_rng_state=False)


def captured(model: torch.nn.Module, *examples: Tensor) -> torch.nn.Module:
    """Returns a new module that runs the model's training pass as two CUDA graphs, one forward, one backward.

    A training step of an implicit model has thousands of kernels of some microseconds each.  The host takes
    longer to launch them than the GPU to run them.  A graph launches them all at once.

    The new module shares the model's parameters and buffers.  It replays the graphs in training mode and grad
    mode if its only arguments are tensors with the shape, dtype and requires_grad of the examples.  Otherwise
    it calls the model.  Copies of it always do.  `captured` leaves the model, its buffers and the random
    generators as they were.

    The model must be in training mode, take and return tensors, and never read a tensor on the host: use
    `equilibrium` with tol = 0 and backward_tol = 0, and any solver but anderson.  The model's Python code
    runs during capture only.  Changing k or lam later has no effect, and on_backward is not called again.  An
    autocast around `captured` is in both graphs.

    After one forward pass run its backward pass and optimizer.zero_grad(set_to_none=True) before the next: a
    call overwrites what the last one returned and saved, and each .grad that was None.  Move the model to its
    GPU before, and wrap the result in DistributedDataParallel.  Raises ValueError without a GPU, and for a
    model in evaluation mode or captured before.  For a model that waits for its GPU, torch raises
    RuntimeError, "operation not permitted when stream is capturing".
    """
    _require(isinstance(model, torch.nn.Module), f"captured takes an nn.Module, got {type(model).__name__}")
    _require(torch.cuda.is_available(), "captured needs a GPU")
    _require(model.training, "captured needs a model in training mode: model.train()")
    _require(not isinstance(model, _Captured) and "forward" not in vars(model),
             "this model's forward pass has been replaced or captured before")
    buffers = [b.clone() for b in model.buffers()]
    gc.collect()        # torch keeps unused graphs in a reference cycle, and they still hold their memory
    # The gradients arrive from the stream of the capture.  torch synchronises it by itself.
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
    with torch.random.fork_rng([torch.cuda.current_device()]), torch.autocast(
            "cuda", enabled=torch.is_autocast_enabled("cuda"), dtype=torch.get_autocast_dtype("cuda"),
            cache_enabled=False):                       # a cached weight would keep its present value
        torch.cuda.make_graphed_callables(model, examples, allow_unused_input=True)
    replay = vars(model).pop("forward")         # torch has put it there.  The model gets its own back
    for buffer, old in zip(model.buffers(), buffers):
        buffer.copy_(old)
    return _Captured(model, replay, examples)


class _Captured(torch.nn.Module):
    """Replays the graphs of the model if they fit the call, else calls the model.  See `captured`."""

    def __init__(self, model, replay=None, examples=()):
        super().__init__()
        self.model, self.replay, self.expected = model, replay, self.kind(examples)
        self.training = model.training

    @staticmethod
    def kind(tensors):
        return [torch.is_tensor(x) and (x.shape, x.dtype, x.requires_grad) for x in tensors]

    def forward(self, *inputs, **options):
        fits = (self.replay is not None and self.model.training and torch.is_grad_enabled() and not options
                and self.kind(inputs) == self.expected)
        return (self.replay if fits else self.model)(*inputs, **options)

    def __reduce__(self):       # a copy or pickle has weights of its own, so it gets no graphs
        return _Captured, (self.model,)


def _bptt(f, h0, max_iter, tol, stop_mode, offsets):
    """Eq. (9) and (10): max_iter plain steps with a graph, then one call without it for the last residual."""
    _forget_cached_weights()
    with torch.no_grad():
        run = _Progress(f, h0, max_iter, tol, stop_mode, offsets)
    parts, spec = _flatten(h0)
    h = [p.clone() for p in parts]
    for t in range(run.max_iter + 1):
        with torch.set_grad_enabled(t < run.max_iter):
            f_h = _call(f, [p.view_as(p) for p in h], spec, run.layout.shapes)
            f_h = [b.to(a.dtype) for a, b in zip(h, f_h)]       # even if f returns a lower precision
        with torch.no_grad():
            x, g = run.layout.pack(h), run.layout.pack([b - a for a, b in zip(h, f_h)])
            run.record(run.measure(x, g, f_h)[1])
        h = f_h if t < run.max_iter else h
    last = run.trace[-1].nan_to_num(nan=math.inf, posinf=math.inf)
    detached = tree_unflatten([p.detach() for p in h], spec)
    return tree_unflatten(h, spec), SolverResult(detached, last, run.evals, run.trace, last <= tol)


# ------------------------------------------------------------------------------------------------------------
# Diagnostics
# ------------------------------------------------------------------------------------------------------------

def _check_mode():
    _require(not torch.is_inference_mode_enabled(),
             "torch.inference_mode() has no derivatives: use torch.no_grad()")


def _linearized(f, h):
    """Leaves and outputs as from `_open`, in any grad mode.  Raises ValueError if f has no derivative."""
    _check_mode()
    with torch.enable_grad():
        inputs, outputs, _ = _open(f, h)
    if not any(o.requires_grad for o in outputs):
        raise ValueError("f has no derivative: it computes under no_grad, or detaches what it returns")
    return inputs, outputs


def spectral_radius(f: Callable, h: State, *, lam: float = 1.0, n_iter: int = 100,
                    offsets: Tensor | None = None) -> Tensor:
    """Spectral radius per sample (N,) of lam J + (1 - lam) I at h, J = df/dh, by the power method with VJPs.

    Its log is the mean growth of log ||v|| over the last half of the iterations.  Triangular weights average
    out oscillations, so the result is also right for a complex pair.  (A Rayleigh quotient would give rho
    cos(angle).)  The error is O(1 / n_iter) if J is not normal or if its largest eigenvalues are close: some
    per cent at 50.  Cost: one call of f and n_iter VJPs.  v is drawn from torch's own random numbers.
    offsets: see `fixed_point`.  Raises ValueError under torch.inference_mode(), and for an f without a graph.
    """
    n_iter = _whole(n_iter, "n_iter")
    _require(n_iter >= 2, f"n_iter must be an integer >= 2, got {n_iter!r}")
    lam = float(_fraction(lam, "lam"))
    inputs, outputs = _linearized(f, h)
    layout = _Layout(inputs, offsets)
    v = torch.randn_like(layout.pack([p.detach() for p in inputs]))
    # The squares are summed in float64: if J blows v up, they overflow float32, and v / inf would be 0.
    wide = _wide(v)
    size, growth = layout.norms(v, wide), []
    for _ in range(n_iter):
        v = v / layout.per_row(size.clamp_min(torch.finfo(v.dtype).tiny))[:, None]
        v = torch.lerp(v, layout.pack(_vjp(outputs, inputs, layout.split(v))), lam)
        size = layout.norms(v, wide)
        growth.append(size)
    growth = torch.stack(growth[len(growth) // 2:]).log()           # log 0 = -inf: a nilpotent J gives 0
    i = torch.arange(1, len(growth) + 1, device=v.device, dtype=v.dtype)
    weight = torch.minimum(i, len(growth) + 1 - i)[:, None]
    return ((weight * growth).sum(dim=0) / weight.sum()).exp()


def adaptive_damping(rho: Tensor | float) -> float:
    """lam = 1 / rho(J) clipped to (0, 1] (App. D.3), for the largest of the rho given.  One host sync.

    Damping helps if the largest eigenvalue is negative or complex.  A real eigenvalue above 1 stays above 1
    under any damping.  Raises ValueError for a rho that is not finite.
    """
    largest = float(torch.as_tensor(rho).max())
    _require(math.isfinite(largest), f"rho must be finite, got {largest}")
    return 1.0 / max(1.0, largest)


def jacobian_regularization(f: Callable, h: State, *, n_vectors: int = 1) -> Tensor:
    """Hutchinson estimate of ||J||_F^2 / (numbers in h), J = df/dh at the detached h.

    Returns a scalar, differentiable in what f closes over: E_v ||v^T J||^2 / (N D), with standard normal v
    from torch's own random numbers.  Cost: one call of f and n_vectors VJPs, and as much again in the
    backward pass.  Source: Bai et al., "Stabilizing Equilibrium Models by Jacobian Regularization", 2021.
    Raises ValueError for n_vectors below 1, if f(h) has another shape than h, under torch.inference_mode(),
    and for an f without a graph.
    """
    n_vectors = _whole(n_vectors, "n_vectors")
    inputs, outputs = _linearized(f, h)
    total = torch.zeros((), dtype=torch.float32, device=inputs[0].device)
    with torch.enable_grad():
        for _ in range(n_vectors):
            j = _vjp(outputs, inputs, [torch.randn_like(o) for o in outputs], create_graph=True)
            j = [ji.to(torch.promote_types(ji.dtype, torch.float32)) for ji in j]
            total = total + sum(ji.square().sum() for ji in j)
    return total / (n_vectors * sum(p.numel() for p in inputs))


def cosine_similarity(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> Tensor:
    """Cosine of the angle between two gradients (Fig. 2), lists over the same parameters.  None means zero.

    Returns a float64 scalar, which is 0 if a gradient is zero.  Raises ValueError if the lengths differ.
    """
    _require(len(a) == len(b),
             f"two gradients over the same parameters are needed, got lists of {len(a)} and {len(b)}")
    zero = torch.zeros((), dtype=torch.float64)
    pairs = [(x, y) for x, y in zip(a, b) if x is not None and y is not None]
    dot = sum(((x.double() * y.double()).sum() for x, y in pairs), zero)
    squares = [sum((x.double().square().sum() for x in grads if x is not None), zero) for grads in (a, b)]
    return dot / (squares[0].sqrt() * squares[1].sqrt()).clamp_min(torch.finfo(torch.float64).tiny)


@contextlib.contextmanager
def _unchanged(module, buffers):
    """On exit, restores the buffers of the module, if there is one, and those in `buffers`."""
    owned = [] if module is None else [(m._buffers, name, b) for m in module.modules()
                                       for name, b in m._buffers.items() if b is not None]
    before = [(b, b.clone()) for b in (*buffers, *(b for _, _, b in owned))]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer in owned:       # the module may have put another tensor in its place
                owner[name] = buffer
            for buffer, old in before:
                buffer.copy_(old)


def _used(f, h, parameters):
    """The parameters that f(h) depends on."""
    outputs, parameters = _linearized(f, h)[1], [p for p in parameters if p.requires_grad]
    if not parameters:
        return []
    outputs = [o for o in outputs if o.requires_grad]
    grads = torch.autograd.grad(outputs, parameters, [torch.zeros_like(o) for o in outputs],
                                retain_graph=True, allow_unused=True)
    return [p for p, g in zip(parameters, grads) if g is not None]


def _check_rows(rows):
    for row in rows:
        _require(isinstance(row, (tuple, list)) and len(row) == 3 and row[0] in ("upg", "npg", "implicit"),
                 f"rows is a list of (grad, k, lam) with grad 'upg', 'npg' or 'implicit', got {row!r} in it")
    return [(grad, *_check_phantom(k, 1.0 if grad == "implicit" else lam)) for grad, k, lam in rows]


def compare_gradients(f: Callable, h0: State, loss: Callable, parameters: torch.nn.Module | Sequence[Tensor],
                      rows: Sequence[tuple] = (("upg", 5, 0.5), ("npg", 5, 0.5), ("upg", 1, 1),
                                               ("implicit", 5, None)), *,
                      h: State | Callable | None = None, bptt: int = 0, solver: Callable = broyden,
                      max_iter: int = 200, tol: float = 1e-4, exact_max_iter: int = 200,
                      exact_tol: float = 1e-3, radius_iter: int = 50, offsets: Tensor | None = None,
                      buffers: Sequence[Tensor] = ()) -> dict:
    """Fig. 2 for your own model: how close cheaper gradients of loss(h) come to the exact one.

    f, h0, solver, max_iter, tol, offsets: as in `equilibrium`.  loss: a scalar function of the state.
    parameters: a module, or the tensors to differentiate by.  Only those that f uses are compared, since the
    gradient of a head at h* is the same in every row.
    rows: a list of (grad, k, lam).  "implicit" means GMRES with k products, and its lam is ignored.
    h: the state that the rows start from (default: h*), or a function of k that returns it.  If a truncated
    solve trains through its last k calls of f, give the state before these calls.
    bptt: also compare with back-propagation through this many plain steps from h0.

    The exact gradient is implicit differentiation at h*, by `gmres` to exact_tol with at most exact_max_iter
    products (restarted after 50).  Trust the cosines only as far as `exact` allows.  If rho is above 1, h* is
    a root that your iteration moves away from.  solver=fixed_point finds no such root.  The samples with the
    largest gradients decide the cosine of a batch.

    Returns a dict:
        rows                a dict per row.  grad, k, lam: as given.  cosine: with the exact gradient.
                            norm_ratio: length over that of the exact gradient.  f_calls, vjps: the cost (a
                            VJP into h and one into the parameters count as one each).  rho_B: the largest
                            spectral radius of lam J + (1 - lam) I at h*.  cosine_bptt: only with bptt
        exact               share of the samples whose forward and backward residual are at most exact_tol
        forward_residual    (N,), of h*
        backward_residual   (N,), of the exact gradient
        rho                 (N,), spectral radius of J at h*, or None with radius_iter = 0
        bptt                cosine of back-propagation with the exact gradient, or None

    Every gradient sees the same random numbers.  The random generators, .grad, the buffers of the module and
    those in `buffers` stay as they were.  Raises ValueError for an invalid argument, under
    torch.inference_mode(), and if f uses none of the parameters.
    """
    _check_mode()
    _check_solver(solver)
    rows = _check_rows(rows)
    bptt = bptt and _whole(bptt, "bptt")
    _require(radius_iter == 0 or _whole(radius_iter, "radius_iter") >= 2,
             "radius_iter must be 0 or at least 2")
    module = parameters if isinstance(parameters, torch.nn.Module) else None
    parameters = parameters if module is None else module.parameters()
    parameters = [parameters] if torch.is_tensor(parameters) else list(parameters)
    _require(all(map(torch.is_tensor, parameters)), "parameters must be a module or a list of tensors")
    samples = {} if offsets is None else {"offsets": offsets}
    parts, spec = _flatten(h0)
    shapes, device = [p.shape for p in parts], parts[0].device
    backward, calls = [], 0

    def counted(h):
        nonlocal calls
        calls += 1
        return f(h)

    def forked():
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    def gradient(attach):
        with forked():
            value = loss(attach())
            _require(torch.is_tensor(value) and value.numel() == 1, "loss must return a scalar tensor")
            return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)

    def exact(h, **options):
        return implicit(counted, h, on_backward=backward.append, **samples, **options)

    def length(grads):
        return sum(x.double().square().sum() for x in grads if x is not None) ** 0.5

    with torch.enable_grad(), _unchanged(module, buffers):
        with forked():
            star = solver(f, h0, max_iter=max_iter, tol=tol, **samples)
            parameters = _used(f, star.h, parameters)
        _require(parameters, "parameters: f uses none of them")
        truth = gradient(lambda: exact(star.h, solver=functools.partial(gmres, memory=50),
                                       max_iter=exact_max_iter, tol=exact_tol))
        truth_solve, bptt_cosine = backward[0], None
        if bptt:
            unroll = functools.partial(equilibrium, grad="bptt", solver=fixed_point, max_iter=bptt)
            bptt_grads = gradient(lambda: unroll(f, h0)[0])
            bptt_cosine = cosine_similarity(bptt_grads, truth).item()
        rho, found = {}, []
        for lam in {1.0, *(lam for grad, _, lam in rows if grad != "implicit")} if radius_iter else ():
            with forked():
                rho[lam] = spectral_radius(f, star.h, lam=lam, n_iter=radius_iter, **samples)
        for grad, k, lam in rows:
            calls, start = 0, h(k) if callable(h) else star.h if h is None else h
            _returned(start, spec, shapes, "h must be a state")
            grads = gradient({"upg": lambda: upg(counted, start, k, lam),
                              "npg": lambda: npg(counted, start, k, lam),
                              "implicit": lambda: exact(start, max_iter=k, tol=0.0)}[grad])
            vjps = {"upg": 2 * k - 1, "npg": k + 1, "implicit": backward[-1].n_evals + 2}[grad]
            row = {"grad": grad, "k": k, "lam": None if grad == "implicit" else lam,
                   "cosine": cosine_similarity(grads, truth).item(),
                   "norm_ratio": float(length(grads) / length(truth)), "f_calls": calls, "vjps": vjps,
                   "rho_B": rho[lam].max().item() if lam in rho and grad != "implicit" else None}
            if bptt:
                row["cosine_bptt"] = cosine_similarity(grads, bptt_grads).item()
            found.append(row)
    solved = (star.residual <= exact_tol) & (truth_solve.residual <= exact_tol)
    return {"rows": found, "exact": solved.double().mean().item(), "forward_residual": star.residual,
            "backward_residual": truth_solve.residual, "rho": rho.get(1.0), "bptt": bptt_cosine}


# ============================================================================================================
# Part 2, runs: what all scripts need beside the mathematics.  A mistake here can lose somebody's work.
# Leave it out when you copy the mathematics.
# ============================================================================================================

import argparse
import ctypes
import datetime
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm


def die(message: str, code: int = 2):
    """Ends the run with one clear line on stderr.  Exit code 2 is for wrong usage or input."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


# --- options ------------------------------------------------------------------------------------------------

def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help texts end with the default, and whose errors come without a page of usage."""
    class Help(argparse.HelpFormatter):
        def _get_help_string(self, action):
            shown = action.default is not None and action.default is not False and (
                action.default != argparse.SUPPRESS)
            return action.help + " (default: %(default)s)" * shown

    return argparse.ArgumentParser(description=description, formatter_class=Help,
                                   usage="%(prog)s [options]    (--help lists them)")


def within(kind: type, interval: str) -> Callable:
    """An argparse type: a number of this kind, int or float, in an interval such as "[1, inf)"."""
    low, high = map(float, interval[1:-1].split(","))

    def parse(text):
        try:
            value, must = kind(text), "must be"
        except ValueError:
            value, must = math.nan, "must be a whole number" if kind is int else "must be a number"
        above = low <= value if interval[0] == "[" else low < value
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise argparse.ArgumentTypeError(f"{must} in {interval}, got {text}")
        return value

    return parse


def existing_file(text: str) -> str:
    """An argparse type: "auto", or the path of a file.  Refuses a missing file before any data is read."""
    path = os.path.expanduser(text)         # a shell does so at the beginning of a word, not in --resume=~/x
    if text != "auto" and not os.path.exists(path):
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path


def add_run_flags(parser: argparse.ArgumentParser, name: str, *, seed: int = 0, save_every: float = 5.0,
                  log_every: int = 50, log_unit: str = "steps"):
    """Adds the options of a run's folder and log.  Returns the group of modes, which exclude each other."""
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=within(int, "[0, 4294967296)"), default=seed,
                     help="seed of weights, data order, augmentation and dropout")
    run.add_argument("--out", metavar="DIR", type=os.path.expanduser,
                     help="folder of checkpoint.pt and metrics.jsonl, which several "
                     f"machines must share (default: the folder of --resume, or runs/{name}-TIME-PID)")
    run.add_argument("--resume", metavar="FILE", type=existing_file,
                     help="continue from this checkpoint, with 'auto' from the one in --out, if there is one")
    run.add_argument("--save-every", metavar="MINUTES", type=within(float, "[0, inf)"), default=save_every,
                     help="minutes between checkpoints (SIGTERM and Ctrl-C also save one)")
    run.add_argument("--log-every", metavar="N", type=within(int, "[1, inf)"), default=log_every,
                     help=f"{log_unit} between lines of the log")
    modes = run.add_mutually_exclusive_group()
    modes.add_argument("--eval", action="store_true", help="only evaluate the checkpoint of --resume, ours "
                       "or an official one (ours sets the flags of data, model and solver)")
    modes.add_argument("--benchmark", action="store_true",
                       help="only measure the time and memory of training steps, on random input")
    return modes


def parse_flags(parser: argparse.ArgumentParser, argv, presets: Callable = lambda args: {},
                from_checkpoint: str = ""):
    """The options of a run.  The command line wins over a checkpoint's flags, and these over presets(args).

    from_checkpoint: names of flags, separated by blanks, that --eval and --generate take from a checkpoint of
    ours.  A continued training takes only `data` from it.  Its other flags must be given again (`Run`
    compares them).  --help shows the presets for the parser's own defaults.
    """
    usual, brought = presets(parser.parse_args([])), {}
    parser.set_defaults(**usual)
    args = parser.parse_args(argv)
    mode, path = None, args.resume
    for name in ("eval", "generate", "benchmark"):
        mode = mode if getattr(args, name, None) in (None, False) else name
    if args.benchmark and args.resume:
        parser.error("--benchmark measures a model with fresh weights: it takes no --resume")
    if mode in ("eval", "generate") and args.resume in (None, "auto"):
        parser.error(f"--{mode} needs --resume FILE, the checkpoint to use")
    if args.resume == "auto" and not args.out:
        parser.error("--resume auto continues the training in --out DIR")
    if mode in ("generate", "benchmark") and launched():
        parser.error(f"--{mode} is for one process: run it without torchrun")
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and not mode and not (args.out and args.resume == "auto"):
        parser.error("torchrun --max-restarts needs --out DIR --resume auto: a restarted job must find its "
                     "checkpoint")
    if path == "auto":
        path = f"{args.out}/checkpoint.pt"
        path = path if os.path.exists(path) else f"{path}.previous"
    if path and os.path.exists(path):
        state = load_checkpoint(path)
        if is_ours(state):
            check_version(path, state["args"], args)
            brought = {name: state["args"][name] for name in (from_checkpoint.split() if mode else ["data"])
                       if name in state["args"]}
    parser.set_defaults(**brought)
    parser.set_defaults(**{**usual, **presets(parser.parse_args(argv)), **brought})
    return parser.parse_args(argv)


def note_differences(saved: dict, args, names: str, process):
    """Prints which of the flags in `names`, separated by blanks, had another value in training."""
    for name in names.split() if process.rank == 0 else ():
        if saved.get(name) != getattr(args, name):
            print(f"note: trained with --{name.replace('_', '-')} {saved.get(name)}, evaluated with "
                  f"{getattr(args, name)}", file=sys.stderr, flush=True)


# --- processes ----------------------------------------------------------------------------------------------

def launched() -> bool:
    """Whether torchrun or a similar launcher has started this process.  Some platforms set RANK alone."""
    return "RANK" in os.environ and ("LOCAL_RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1")


class Process(NamedTuple):
    """This process's place in the run.  All processes must call the same methods."""
    rank: int
    world_size: int
    device: torch.device

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, value) -> list:
        """The list of all processes' values, by rank.  They must be picklable, with tensors on the CPU."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def first(self, make: Callable):
        """Runs make() on the first process of each machine, then on the others, which find its files on disk.

        A `die` in one process ends all of them, with exit code 2 and that one message.
        """
        alone = self.world_size == 1
        for turn in (True,) if alone else (True, False):
            ended = torch.zeros((), device=self.device)
            if alone or (int(os.environ.get("LOCAL_RANK", 0)) == 0) == turn:
                try:
                    result = make()
                except SystemExit:
                    ended += 1
            if self.sum(ended) > 0:             # the others wait here
                self.end()
                raise SystemExit(2)
        return result

    def die(self, message: str, code: int = 2):
        """Ends all processes at once, with one message for all of them."""
        if self.rank == 0:
            print(f"error: {message}", file=sys.stderr, flush=True)
        self.sum(torch.zeros((), device=self.device))       # torchrun kills the others when one ends
        self.end()
        raise SystemExit(code)

    def broadcast_buffers(self, model: torch.nn.Module):
        """Sends the first process's BatchNorm statistics to all.  Call it before the model is evaluated."""
        for buffer in model.buffers() if self.world_size > 1 else ():
            dist.broadcast(buffer, 0)

    def bar(self, items, what: str, **more):
        """A progress bar over `items`, which only the first process shows, and only on a terminal."""
        return tqdm(items, desc=what, leave=False, disable=self.rank > 0 or not sys.stderr.isatty(), **more)

    def end(self):
        """Leaves the process group, since a process that ends while its gloo group exists may abort."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
        forget_signals()        # the process of a notebook lives on


def keep_freed_memory():
    """Lets glibc keep freed memory.  Otherwise the kernel zeroes tensors of 1 MB again in each step.

    With it a UPG step of MDEQ-Tiny at batch 32 is 1.08 times as fast (one thread), and peak memory is up to
    12 % higher.  If the C library has no mallopt, nothing happens.
    """
    call_libc("mallopt", -1, 2 ** 31 - 1)       # M_TRIM_THRESHOLD
    call_libc("mallopt", -4, 0)                 # M_MMAP_MAX


def call_libc(name: str, *values: int):
    """Calls a function of the C library, if it has one of this name.  Windows has no CDLL(None)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        getattr(ctypes.CDLL(None), name)(*values)


def init_process() -> Process:
    """Joins torchrun's process group: nccl on GPUs, gloo on CPUs, no group for a single process."""
    forget_signals()            # an earlier run in this process may have ended with an exception
    with contextlib.suppress(AttributeError):           # a notebook's stream has no reconfigure
        # A log file gets each line when it is printed, in UTF-8.  A terminal shows "?" for unknown letters.
        sys.stdout.reconfigure(line_buffering=True, errors="replace",
                               encoding=None if sys.stdout.isatty() else "utf-8")
    needed = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if launched() and missing:
        die(f"the environment has RANK, but not {', '.join(missing)}: start the script with torchrun, or set "
            "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for every process")
    if (os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
            and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):
        die("torchrun --max-restarts: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, and give it "
            "--standalone or --rdzv-backend=c10d; else a restarted job is given the addresses of the dead "
            "processes (github.com/pytorch/pytorch/issues/167288)")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            die(f"--nproc_per_node: process {local_rank} has no GPU, there are {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    if not launched():
        return Process(0, 1, device)
    if device.type == "cuda":
        # As long as gloo's.  nccl's own 10 minutes are too short if the processes wait for a long download.
        dist.init_process_group("nccl", device_id=device, timeout=datetime.timedelta(minutes=30))
    else:
        dist.init_process_group("gloo")
    return Process(dist.get_rank(), dist.get_world_size(), device)


def seed_everything(seed: int):
    """Seeds torch and Python's random: all processes alike for building the model, then with seed + rank."""
    torch.manual_seed(seed)
    random.seed(seed)


def rng_state() -> dict:
    """The state of the generators that `seed_everything` seeds, including this process's GPU only."""
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict):
    """Restores what `rng_state` has returned."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# --- images -------------------------------------------------------------------------------------------------

def read_image(path: str):
    """Reads an image as RGB.  16-bit grey is cut to its high byte, as PIL itself does with 16-bit colour."""
    from PIL import Image
    with Image.open(path) as image:
        if image.mode[0] in "IF" and image.format not in ("PNG", "PPM"):
            raise ValueError(f"the value of white is not known in a {image.format} of mode {image.mode}: "
                             "save it as PNG, or with 8 bits")
        if image.mode[0] == "I":            # 0 to 65535, which convert() would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")


def image_folders(root: str | Path, process: Process, *splits: str) -> list:
    """For each split, (classes, [(path, label)]) of ROOT/SPLIT/CLASS/*, in torchvision's order.

    If all class folders are numbers, the labels follow the numbers: 2 comes before 10.  Hidden files and
    folders are ignored.  Other files that are no images, or in no class folder, are left out with a note.
    """
    from PIL import Image
    known, left_out, folders = Image.registered_extensions(), [], []

    def is_image(path):
        if os.path.splitext(path)[1].lower() in known:
            return True
        try:
            if os.path.isfile(path):
                Image.open(path).close()
                return True
        except PermissionError:
            raise
        except Exception:           # PIL raises many types
            pass
        left_out.append(path)
        return False

    def images(folder):
        """Yields the images of a folder and its subfolders.  Follows no links, which may lead back here."""
        def stop(error):
            raise error

        for place, inner, files in sorted(os.walk(folder, onerror=stop)):
            if os.sep + "." not in place[len(folder):]:
                left_out.extend(path for path in (os.path.join(place, name) for name in inner)
                                if os.path.islink(path))
                yield from (path for path in (os.path.join(place, name) for name in sorted(files)
                                              if not name.startswith(".")) if is_image(path))

    try:
        for split in (os.path.join(root, split) for split in splits):
            there = os.scandir(split) if os.path.isdir(split) else ()
            entries = [entry for entry in there if not entry.name.startswith(".")]
            left_out.extend(entry.path for entry in entries if not entry.is_dir())
            classes = [entry.name for entry in entries if entry.is_dir()]
            classes.sort(key=(lambda n: (int(n), n)) if all(map(str.isdecimal, classes)) else None)
            samples = []
            for name in sorted(classes):
                before = len(samples)
                samples += [(path, classes.index(name)) for path in images(os.path.join(split, name))]
                if len(samples) == before:
                    raise OSError(f"there is no image in {os.path.join(split, name)}")
            if not classes:
                raise OSError(f"{split} holds no class folders")
            folders.append((classes, samples))
    except OSError as error:
        die(f"--data {root}: {str(error)[:200]}; it must hold {'/CLASS/*, '.join(splits)}/CLASS/* "
            "(--data toy needs none)")
    if left_out and process.rank == 0:
        print(f"note: {len(left_out)} file(s) of --data that are no images, or in no class folder, are left "
              f"out, such as {left_out[0]}", flush=True)
    a, b = set(folders[0][0]), set(folders[-1][0])
    if a != b:
        die(f"--data {root}: {splits[0]}/ and {splits[-1]}/ must hold the same class folders; only in "
            f"{splits[0]}: {sorted(a - b)[:5]}, only in {splits[-1]}: {sorted(b - a)[:5]}")
    return folders


# --- checkpoints --------------------------------------------------------------------------------------------

def save_checkpoint(path: str | os.PathLike, state: dict):
    """Writes `state` to `path`, complete at every moment.  The checkpoint before stays as `path`.previous.

    If it cannot be written (a full disk, no permission), both stay as they are and the run ends with code 1.
    """
    path = Path(path)
    new, old = (Path(f"{path}.{os.getpid()}.{end}") for end in ("new", "old"))  # own names: two would mix
    try:
        with open(new, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())         # a rename may reach the disk before the data does
        old.unlink(missing_ok=True)
        if path.exists():
            try:
                os.link(path, old)          # a second name, so that `path` itself never goes missing
            except OSError:                 # a file system without hard links
                shutil.copyfile(path, old)
        os.replace(new, path)
        if old.exists():
            os.replace(old, f"{path}.previous")
    except (OSError, RuntimeError) as error:
        for rest in (new, old):                         # the disk may be full: removes half a file
            with contextlib.suppress(OSError):
                rest.unlink(missing_ok=True)
        reason = str(error.__context__ or error).split("\n")[0]     # torch.save hides a full disk's error
        die(f"--out: cannot write {path}.new ({reason}); what was saved before is untouched", code=1)


def load_checkpoint(path: str | os.PathLike, flag: str = "--resume") -> dict:
    """Reads a checkpoint of tensors and plain values onto the CPU.  If it is broken, reads the one before it.

    flag: the flag that gave the path, for the messages.
    """
    path = Path(path)
    if not os.path.isfile(path):    # Path.is_file would raise in a folder that may not be entered
        die(f"{flag}: {path} is a folder; give a file in it, as {path / 'checkpoint.pt'}"
            if os.path.isdir(path) else f"{flag}: there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        die(f"{flag}: cannot read {path} ({error.strerror})")
    except Exception as error:          # torch.load raises many types for a file that is cut short
        could_run_code = "Unsupported global" in str(error)
        reason = "it holds more than tensors and plain values" if could_run_code else type(error).__name__
    with contextlib.suppress(Exception):
        state = torch.load(f"{path}.previous", map_location="cpu", weights_only=True)
        print(f"warning: {path} is damaged or not a checkpoint ({reason}); using {path}.previous",
              file=sys.stderr, flush=True)
        return state
    if could_run_code:
        die(f"{flag}: {path} holds more than tensors and plain values, which could run code.  If you trust "
            f"it, convert it: x = torch.load('{path}', weights_only=False); torch.save(x.state_dict(), "
            "'converted.pt'), or x['state_dict'] if x is not the model itself")
    die(f"{flag}: {path} is damaged or not a checkpoint ({reason}), and no usable {path.name}.previous is "
        "beside it")


def is_ours(state) -> bool:
    """Whether a checkpoint was written by one of these scripts, and not by another release."""
    return isinstance(state, dict) and isinstance(state.get("args"), dict)


def load_weights(model, state: dict, load_official: Callable, what: str):
    """Loads weights strictly, from a checkpoint of ours, or by load_official(model, state) from another one.

    If they do not fit, the run ends with a message that begins with `what`.
    """
    try:
        model.load_state_dict(state["model"]) if is_ours(state) else load_official(model, state)
    except (ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        die(f"{what}: {' '.join(str(error).split())[:400]}")


def check_version(path, saved: dict, args, flag: str = "--resume"):
    """Ends the run if a checkpoint was `saved` with other names of flags than this script has."""
    for names, words in ((saved.keys() - vars(args).keys(), ": there is no --{} here"),
                         (vars(args).keys() - saved.keys(), ", which had no --{}")):
        if names:
            die(f"{flag} {path} is of another script, or of another version of this one"
                + words.format(min(names).replace("_", "-")))


def output_folder(args, process: Process, name: str) -> str:
    """--out, or its default: the folder of --resume, or a new one with this name and the time."""
    out = args.out or (Path(args.resume).parent if args.resume else
                       f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    return process.gather(str(out))[0]          # time and process id differ between processes


class Run:
    """The folder --out of a training run, with checkpoint.pt, the one before it, and metrics.jsonl.

        run = Run(args, process, name, images=50000)    # stops if --out or --resume does not fit these facts
        run.state                                       # what --resume has read, or None
        run.start("about the model and the data")       # seeds, begins the log
        run.report("train", step=step, loss=loss)       # a line on the screen, and the same in metrics.jsonl
        save, stop = run.due()
        run.save({"model": model.state_dict(), ...})
        if stop: return run.stopped(step)

    No other run may use the folder.  All processes call the same methods, and the first one writes.
    may_differ: flags, separated by blanks, that may change when a run is continued.  facts: values that may
    not change, such as the number of training images.
    """

    def __init__(self, args, process: Process, name: str, may_differ: str = "", **facts):
        self.args, self.process, self.facts, self.lines, self.residuals = args, process, facts, 0, {}
        args.out = output_folder(args, process, name)
        self.folder, self.state = Path(args.out), None
        self.checkpoint = self.folder / "checkpoint.pt"
        process.first(lambda: process.rank == 0 and lock(self.folder))
        resume = self._find_checkpoint(args.resume)
        if resume:
            self.state = process.first(lambda: self._read(resume, may_differ))
            self.residuals = {name: [(r if process.rank == 0 else r[:0]).to(process.device)]
                              for name, r in self.state["residuals"].items()}       # rank 0 keeps all
            here = Path(resume).resolve().parent == self.folder.resolve()
            self.lines = self.state["lines"] if here else 0
        if process.rank == 0:
            self._cut_log()
        self.began = time.perf_counter() - (self.state["seconds"] if self.state else 0)
        self.saved_at, self.came, self.group = time.monotonic(), catch_signals(process.rank == 0), None
        if process.world_size > 1:
            self.group = dist.new_group(backend="gloo")         # on the hosts, so nobody waits for a GPU

    def _find_checkpoint(self, resume):
        """The file to continue from, or None.  Stops if --out holds a run that you did not ask to resume."""
        previous = f"{self.checkpoint}.previous"
        kept = [path for path in (str(self.checkpoint), previous) if os.path.exists(path)]
        seen = self.process.gather(bool(kept))
        if any(seen) != all(seen):
            self.process.die(f"--out {self.folder}: {self.checkpoint.name} is there for {sum(seen)} of "
                             f"{len(seen)} processes; all machines must see one and the same folder")
        if resume == "auto":
            resume = kept[0] if kept else None
            if resume == previous and self.process.rank == 0:
                print(f"warning: {self.checkpoint} is gone; continues from {previous}", file=sys.stderr)
        if kept and not (resume and Path(resume).resolve().parent == self.folder.resolve()):
            self.process.die(f"--out {self.folder} already holds a run: continue it with --resume auto, or "
                             "choose another folder")
        return resume

    def _read(self, path, may_differ):
        """Reads the checkpoint.  Its script, flags and data must be the same as here."""
        state, args = load_checkpoint(path), self.args
        if not is_ours(state):
            die(f"--resume {path} was not written by this script: an official checkpoint can be evaluated "
                "(--eval), not continued")
        check_version(path, state["args"], args)
        if "lines" not in state:
            die(f"--resume {path} has weights alone, or is of another version of this script: it can be "
                "evaluated (--eval), not continued")
        free = {"data", "out", "resume", "eval", "benchmark", "save_every", "log_every", *may_differ.split()}
        differ = [f"--{name.replace('_', '-')} {value} (here {getattr(args, name)})"
                  for name, value in state["args"].items()
                  if name not in free and value != getattr(args, name)]
        if differ:
            die(f"--resume {path} is of a run with {', '.join(differ)}; use the same flags, or start afresh "
                "with another --out")
        for name, value in self.facts.items():
            before = state["facts"].get(name)
            if before != value:
                die(f"--resume {path} is of a run with {name} {str(before)[:60]}, here {str(value)[:60]} "
                    f"(--data {args.data})")
        return state

    def _cut_log(self):
        """Drops the lines of metrics.jsonl that are newer than the checkpoint: they will be written again."""
        path, new = self.folder / "metrics.jsonl", self.folder / "metrics.jsonl.new"
        try:
            lines = path.read_bytes().splitlines(keepends=True)[:self.lines] if path.exists() else []
            new.write_bytes(b"".join(lines))        # bytes: a power cut may have left anything there
            os.replace(new, path)
            self.lines = len(lines)
        except OSError as error:
            die(f"--out: cannot write {new} ({error.strerror})", code=1)

    @property
    def seconds(self) -> float:
        """Duration of the whole run, including the time before it was continued."""
        return time.perf_counter() - self.began

    def start(self, about: str = "", **record):
        """Seeds this process or restores its generators, begins the log, and prints what a reader needs.

        Call it after everything that draws random numbers and is repeated when the run is continued.
        """
        process, main = self.process, self.process.rank == 0
        seed_everything(self.args.seed + process.rank)
        if self.state and len(self.state["rng"]) == process.world_size:
            set_rng_state(self.state["rng"][process.rank])
        elif self.state and main:
            print(f"note: the checkpoint is of {len(self.state['rng'])} process(es): dropout and "
                  "augmentation are seeded anew", flush=True)
        circumstances, step = describe_run(process), self.state["step"] if self.state else 0
        self._write(event="start", step=step, **record, args=vars(self.args), **circumstances)
        if about and main:
            print("{command}\n{device} x {processes}, torch {torch}, commit {commit}".format(**circumstances)
                  + f"; writing to {self.folder}\n{about}"
                  + (f"; continues after step {step}" if step else ""), flush=True)

    def _write(self, **record):
        path = self.folder / "metrics.jsonl"
        if self.process.rank == 0:
            try:
                with open(path, "a") as file:
                    file.write(json.dumps(finite(record)) + "\n")
            except OSError as error:
                die(f"--out: cannot write {path} ({error.strerror})", code=1)
            self.lines += 1

    def report(self, event: str, show: bool = True, **record):
        """Prints the record, and writes it to metrics.jsonl.  A loss that is not finite ends the run."""
        if not math.isfinite(record.get("loss", 0.0)):
            self.broke(f"the loss became {record['loss']} by step {record['step']}", record["step"])
        self._write(event=event, **record, seconds=self.seconds)
        if show and self.process.rank == 0:
            tqdm.write(spell(record))

    def broke(self, what: str, step: int, remedy: str = "try a lower --lr or --lam"):
        """Ends a run whose loss or weights are not finite, on all processes."""
        self._write(event="broken", step=step, what=what)
        kept = f"the last good state is {self.checkpoint}"
        self.process.die(f"{what}: {remedy}; {kept if self.checkpoint.exists() else 'nothing was saved yet'}",
                         code=1)

    def due(self) -> tuple[bool, bool]:
        """Returns (save now, then stop), the same on all processes.  Call it after every step."""
        late = time.monotonic() - self.saved_at >= 60 * self.args.save_every
        wishes = torch.tensor([late, bool(self.came)], dtype=torch.int32)
        if self.group is not None:
            dist.all_reduce(wishes, op=dist.ReduceOp.MAX, group=self.group)
        save, stop = (bool(wish) for wish in wishes.tolist())
        return save or stop, stop

    def save(self, state: dict):
        """Saves {"model", "step", ...} as checkpoint.pt, with what `Run` needs to continue.

        A weight that is not finite ends the run here, since the loss would show it only one step later.
        """
        bad = torch.stack([~w.isfinite().all() for w in state["model"].values() if w.is_floating_point()])
        if self.process.sum(bad.any().float()) > 0:         # host sync.  BatchNorm differs among processes
            self.broke(f"a weight became infinite or not a number by step {state['step']}", state["step"])
        own = {name: torch.cat(r).cpu() for name, r in self.residuals.items()}
        rng, residuals = zip(*self.process.gather((rng_state(), own)))
        if self.process.rank == 0:
            save_checkpoint(self.checkpoint, {
                **state, "rng": list(rng), "facts": self.facts, "args": vars(self.args),
                "residuals": {name: torch.cat([r[name] for r in residuals]) for name in own},
                "seconds": self.seconds, "lines": self.lines})
        self.saved_at = time.monotonic()

    def stopped(self, step: int):
        """Prints how to continue.  Call it when `due` has asked to stop and all is saved."""
        if self.process.rank == 0:
            name = "Ctrl-C" if signal.SIGINT in self.came else "SIGTERM"
            print(f"{name}: saved after step {step} to {self.checkpoint}; continue with the same command, "
                  f"--out {self.folder} and --resume auto", flush=True)

    def note_residuals(self, **residuals: Tensor):
        """Keeps the residuals (N,) of a step's solves for `health`, also in checkpoints.  No host sync."""
        for name, r in residuals.items():
            self.residuals.setdefault(name, []).append(r.detach().clone())

    def health(self, tol: float) -> dict:
        """Returns `health` of all solves since the last call."""
        residuals, self.residuals, found = self.residuals, {}, {}
        for name, r in residuals.items():
            found.update(health(name, r, tol, self.process))
        return found


def catch_signals(speaks: bool) -> dict:
    """Returns {signal that came: when}.  SIGTERM, which precedes a cluster's kill, and Ctrl-C ask to stop."""
    before = signal.getsignal(signal.SIGTERM)
    if hasattr(before, "came"):             # from an earlier run in the same process
        signal.signal(signal.SIGINT, before)    # a notebook restores its own handler after each cell
        return before.came
    came = {}

    def note(number, frame):                # keeps no Run, whose gloo group must go before the process ends
        now = time.monotonic()
        if number == signal.SIGINT and now - came.get(number, now) > 1:     # torchrun repeats a Ctrl-C
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not came and speaks:
            os.write(2, f"{signal.Signals(number).name}: will save and stop after this step or evaluation"
                        f"{'; Ctrl-C again stops at once' * (number == signal.SIGINT)}\n".encode())
        came.setdefault(number, now)

    note.came = came
    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return came


def forget_signals():
    """Undoes `catch_signals`."""
    if hasattr(signal.getsignal(signal.SIGTERM), "came"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def lock(folder: Path):
    """Reserves the folder for this process until it ends or is killed.  Ends the run if it is taken."""
    try:
        os.makedirs(folder, exist_ok=True)
        file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)     # closed, thus free, at the end
    except OSError as error:
        die(f"--out {folder}: cannot {'write in' if folder.is_dir() else 'make'} this folder "
            f"({error.strerror})")
    try:
        import fcntl            # Windows has none
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for end in ("new", "old"):
            for rest in folder.glob(f"*.pt.[0-9]*.{end}"):      # from a run that was killed while saving
                rest.unlink(missing_ok=True)
    except ImportError:
        return
    except (BlockingIOError, PermissionError):
        die(f"--out {folder}: another run is writing there; wait for its end, or choose another folder")
    except OSError as error:                            # a file system without locks
        print(f"note: --out {folder} cannot be locked against a second run ({error.strerror})", flush=True)


# --- what a run writes --------------------------------------------------------------------------------------

def finite(value):
    """The value with None for every number that is not finite, at any depth.  JSON has no NaN or Infinity."""
    if isinstance(value, dict):
        return {name: finite(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def spell(record: dict) -> str:
    """A record as text for people: names and values, then the results of `health` on a line of their own."""
    solves = [name.removesuffix("_solved") for name in record if name.endswith("_solved")]
    of_health = tuple(f"{s}_{x}" for s in solves for x in ("residual_p", "solved", "above_"))
    words = "  ".join(f"{name.replace('_', ' ')} {f'{value:.5g}' if isinstance(value, float) else value}"
                      for name, value in record.items() if not name.startswith(of_health))
    found = "; ".join(" ".join([s, *(f"{record[f'{s}_residual_p{p}']:.0e}" for p in (10, 50, 90))])
                      + f", {100 * record[f'{s}_solved']:.0f} %" for s in solves)
    return words + ("\n  relative residual (10, 50, 90 %) and share solved: " + found if solves else "")


def health(name: str, residuals: list[Tensor], tol: float, process: Process) -> dict:
    """{NAME_residual_p10, _p50, _p90: quantiles over many solves, NAME_solved, NAME_above_0.1: shares}.

    Solved means to tol, or to 1e-3 if tol is 0.  All processes must call it, and the numbers are over all of
    them.  Without a solve it returns {}.
    """
    own = torch.cat(residuals).float().cpu() if residuals else torch.empty(0)
    r = torch.cat(process.gather(own)).sort().values    # torch.quantile takes 16 million numbers at most
    if len(r) == 0:
        return {}
    return {**{f"{name}_residual_p{p}": r[round(p / 100 * (len(r) - 1))].item() for p in (10, 50, 90)},
            f"{name}_solved": (r <= (tol or 1e-3)).float().mean().item(),
            f"{name}_above_0.1": (r > 0.1).float().mean().item()}


class Meter:
    """Running means, throughput, peak memory.  `add` does not synchronise.  `read` does so once, and resets.

    Means and throughput are over all processes.  All must call `read`, with values of the same names.
    """

    def __init__(self, process: Process, unit: str = "samples"):
        self.process, self.unit = process, unit
        self.reset()

    def reset(self):
        self.sums, self.counts, self.samples, self.steps, self.start = {}, {}, 0, 0, time.perf_counter()

    def add(self, n: int, **values: Tensor):
        """values: 0-dimensional tensors on the device, means over n samples."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float() * n
            self.counts[name] = self.counts.get(name, 0) + n
        self.samples += n
        self.steps += 1

    @contextlib.contextmanager
    def paused(self):
        """What is done inside, such as diagnostics, does not count as training time."""
        began = clock(self.process.device)
        yield
        self.start += clock(self.process.device) - began

    def read(self) -> dict:
        """Means of the values, ms per step, samples or tokens per second, and the peak GPU memory (GB)."""
        device, n = self.process.device, len(self.sums)
        counts = torch.tensor([*self.counts.values(), self.samples], dtype=torch.float64, device=device)
        totals = torch.stack([x.double() for x in (*self.sums.values(), *counts)])
        totals = self.process.sum(totals).tolist()                                              # host sync
        seconds = time.perf_counter() - self.start
        record = {name: total / count for name, total, count in zip(self.sums, totals, totals[n:])}
        record["ms_per_step"] = 1e3 * seconds / max(1, self.steps)
        record[f"{self.unit}_per_s"] = totals[-1] / seconds
        if device.type == "cuda":
            record["peak_gb"] = peak_memory(device)
        self.reset()
        return record


def describe_run(process: Process) -> dict:
    """What a reader of a log needs to repeat the run: command, commit, torch version, device, processes."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
                                capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    threads = torch.get_num_threads()
    name = (torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else
            f"CPU, {threads} thread{'s' * (threads > 1)}")
    return {"command": shlex.join(sys.argv), "commit": commit, "torch": torch.__version__, "device": name,
            "processes": process.world_size}


class TrainingPass(torch.nn.Module):
    """A training pass from tensors to tensors, as CUDA graphs need it: x -> (output, residual or None).

    model(x, unroll=..., with_result=True, on_backward=...) returns (output, SolverResult or None).  The
    residual of a backward solve is written to backward_residual (N,).  batch: the largest N.
    """

    def __init__(self, model: torch.nn.Module, batch: int, device: torch.device):
        super().__init__()
        self.model, self.backward_residual = model, torch.full((batch,), math.nan, device=device)

    def forward(self, x, unroll=0):
        output, result = self.model(x, unroll=unroll, with_result=True, on_backward=self.note)
        return output, None if result is None else result.residual

    def note(self, result):
        self.backward_residual[:len(result.residual)].copy_(result.residual)


# --- benchmark ----------------------------------------------------------------------------------------------

def clock(device: torch.device) -> float:
    """The time in seconds, after `device` has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak_memory(device: torch.device):
    """Starts a new measurement of `peak_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")           # Linux: resets the peak of the resident set


def peak_memory(device: torch.device) -> float:
    """Peak GB since `reset_peak_memory`: allocated memory on a GPU, else resident set on Linux, else nan."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if os.access("/proc/self/clear_refs", os.W_OK):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024 / 1e9
    return math.nan


def timed_step(forward: Callable, finish: Callable, device: torch.device) -> list[float]:
    """[ms of forward(), of backward(), of both and finish(), growth in GB].  forward() returns the loss."""
    reset_peak_memory(device)
    before = peak_memory(device)
    start = clock(device)
    loss = forward()
    middle = clock(device)
    loss.backward()
    end = clock(device)
    finish()
    return [1e3 * (middle - start), 1e3 * (end - middle), 1e3 * (clock(device) - start),
            peak_memory(device) - before]


def benchmark(rows: dict[str, Callable], finish: Callable, process: Process, *, about: str, unit: str, n: int,
              solve: Callable, f: Callable, h0: State, sometimes: dict = {}, repeats: int = 3) -> dict:
    """Times training steps and prints a table.  Returns {row: [forward, backward, step ms, peak GB]}.

    rows: {name: a forward pass that returns the loss}.  finish: what ends a step.  n, unit: what a step
    processes.  sometimes: {name: (share, forward)}, if a share of a row's steps has another forward pass.
    solve(f, h0) is timed, and the same number of calls of f alone.  Numbers are medians over the repeats.
    The rows take turns, so that a slow phase of the machine affects all of them.  The times of the first
    turn, which may compile or capture, do not count.
    """
    device, found, overheads, run = process.device, {}, [], describe_run(process)
    print(f"\n{about}; {run['device']}, torch {run['torch']}, commit {run['commit']}", flush=True)
    reset_peak_memory(device)
    at_start = peak_memory(device)
    for turn in range(repeats + 1):
        for name, forward in process.bar(rows.items(), f"turn {turn + 1} of {repeats + 1}"):
            if turn == 1:
                call_libc("malloc_trim", 0)         # memory freed by earlier rows would hide the growth
            times = timed_step(forward, finish, device)
            if name in sometimes:
                share, other = sometimes[name]
                more = timed_step(other, finish, device)
                mean = [(1 - share) * a + share * b for a, b in zip(times[:3], more)]
                times = [*mean, max(times[3], more[3])]
            found.setdefault(name, []).append(times)
        with torch.no_grad():
            start = clock(device)
            result = solve(f, h0)
            solved = clock(device)
            for _ in range(result.n_evals):
                f(result.h)
            seconds = clock(device) - solved
        overheads.append(((solved - start) / seconds, 1e3 * seconds / result.n_evals))
    # The first turn's memory counts on a GPU, as CUDA graphs allocate then.  On a CPU it includes imports.
    first = 0 if device.type == "cuda" else 1
    median = {name: [statistics.median(column) for column in list(zip(*times[1:]))[:3]]
              + [at_start + max(row[3] for row in times[first:])] for name, times in found.items()}
    width = max(map(len, rows))
    print(f"{'':{width}s} forward ms  backward ms   step ms  peak GB  {unit + '/s':>10s}  backward    step  "
          f"(ratios: {next(iter(rows))} / this)")
    _, first_backward, first_step, _ = next(iter(median.values()))
    for name, (forward_ms, backward_ms, step_ms, gb) in median.items():
        print(f"{name:{width}s} {forward_ms:10.1f} {backward_ms:12.1f} {step_ms:9.1f} {gb:8.3f} "
              f"{1e3 * n / step_ms:11.1f} {first_backward / backward_ms:8.2f}x {first_step / step_ms:6.2f}x")
    ratio, f_ms = (statistics.median(column) for column in zip(*overheads[1:]))
    print(f"F: {f_ms:.2f} ms; solver overhead, solve / (calls of F x time of F): {ratio:.3f}; memory before "
          f"the first step: {at_start:.3f} GB", flush=True)
    return median
