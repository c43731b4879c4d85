"""Solvers, gradients and run helpers for "On Training Implicit Models" (NeurIPS 2021, arXiv:2111.05177).

An implicit model outputs the fixed point h* = f(h*) of its equilibrium module f (the paper's F(h, z) with the input u
and the parameters theta closed over).  Finding h* is the solver's job; this file also holds the gradient's:

    h, result = equilibrium(f, h0, grad="upg", k=5, lam=0.5, solver=broyden, max_iter=22, tol=1e-4)
    loss(h).backward()                                   # reaches everything f closes over

    grad        backward pass, with J = df/dh at h*, B = lam J + (1 - lam) I, g = dL/dh        memory (graphs of f)
    "upg"       autograd through k damped steps from h*, Eq. (16), Algorithm 1                  k
    "npg"       g_hat = lam (I + B^T + ... + (B^T)^(k-1)) g, Eq. (17)                           1
    "implicit"  g_hat = (I - J^T)^-1 g by a second solve, Eq. (4): the exact gradient           1 (plus its states)
    "bptt"      autograd through every iteration of the forward solve, Eq. (10)                 max_iter

A state h is a tensor whose first dimension is the batch N, or tuples, lists, dicts, ... of such tensors (any pytree of
torch).  Every decision is taken per sample: where f treats samples independently, a batch gives the same answers as its
samples one at a time.
The paper writes Jacobians transposed: its "Jacobian-vector product" with J is PyTorch's vector-Jacobian product (VJP).

Needs torch 2.6 or newer only: copy it into your project; the mathematics ends at "Run helpers".  Or copy a part of it,
with the imports contextlib, functools, math, operator, torch and those from typing and torch, the line `State = ...`,

    a solver    the section before the solvers, and `_solver`
    upg         from `_require` to `_explain`, `_check_phantom`
    npg         the same, and from `_vjp` to `_Undifferentiable`
    implicit    a solver (`gmres`, or change the default), and from `_vjp` to `_Undifferentiable`
"""
import contextlib
import datetime
import errno
import functools
import gc
import io
import json
import math
import operator
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

State = Tensor | tuple | list | dict


# ---------------------------------------------------------------------------------------------------------------------
# The state as one flat (N, D) tensor, and the bookkeeping that the solvers share
# ---------------------------------------------------------------------------------------------------------------------

def _require(ok, message):
    if not ok:
        raise ValueError(message)


def _whole(x, name):
    """x, an int or an integer of numpy or torch, as an int >= 1."""
    try:
        n = x if type(x) is int else operator.index(x)
    except TypeError:
        n = 0
    if n < 1 or isinstance(x, bool) or torch.is_tensor(x) and x.dtype == torch.bool:
        raise ValueError(f"{name} must be an integer >= 1, got {x!r}")
    return n


def _fraction(x, name):
    """x in (0, 1], of Python, numpy or torch, as a float; as it is if it is learned."""
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        learned = torch.is_tensor(x) and x.requires_grad
        if not isinstance(x, str) and 0 < float(x.detach() if learned else x) <= 1:
            return x if learned else float(x)
    raise ValueError(f"{name} must be one number in (0, 1], got {x!r}")


def _flatten(h):
    """The tensors of a state and the structure that holds them.  Half precision becomes float32 under autocast.

    (So that a start like torch.zeros_like(u), whose u autocast has computed, does not cost precision.)
    """
    parts, spec = tree_flatten(h)
    for p in parts or [h]:
        if not (torch.is_tensor(p) and p.is_floating_point() and p.dim() > 0 and not p.is_nested
                and p.layout == torch.strided and not hasattr(p, "to_local")):
            found = f"{type(p).__name__} {p.dtype} with {p.dim()} dimensions" if torch.is_tensor(p) else repr(p)[:80]
            raise ValueError(
                "h0 must be a floating-point tensor with the batch as first dimension, or a tuple, list, dict, ... of "
                f"them, got {found}.  Counters and flags stay outside of it; complex numbers go as "
                "torch.view_as_real(h), nested tensors padded, distributed ones as h.to_local()")
    _require(all(p.shape[0] == parts[0].shape[0] for p in parts),
             f"the parts of h0 differ in batch size: {[tuple(p.shape) for p in parts]}")
    if torch.is_autocast_enabled(parts[0].device.type):
        parts = [p.float() if p.dtype in (torch.bfloat16, torch.float16) else p for p in parts]
    return parts, spec


def _returned(h, spec, shapes, name="f must return a state"):
    """The tensors of a state that f has returned, checked against the structure and the shapes of h0."""
    if type(h) in (tuple, list) and spec.type in (tuple, list):        # one may stand for the other
        h = spec.type(h)
    try:        # by the keys of a dict, not by their order; if h0 is a tensor, a tuple counts as one part
        parts = [h] if spec.is_leaf() else spec.flatten_up_to(h)
    except ValueError as error:
        raise ValueError(f"{name} of the shape of h0: a tensor if h0 is one, else the same tuple, list, dict, ... "
                         f"({error})") from None
    if not all(torch.is_tensor(p) and p.is_floating_point() for p in parts) or [p.shape for p in parts] != shapes:
        found = [f"{tuple(p.shape)} of {p.dtype}" if torch.is_tensor(p) else type(p).__name__ for p in parts]
        raise ValueError(f"{name} of the shape of h0, a tensor if h0 is one, of real floating-point numbers: "
                         f"{', '.join(str(tuple(s)) for s in shapes)} expected, {', '.join(found)} returned")
    return parts


def _call(f, h, spec, shapes):
    """The parts of f(h), for the parts h of a state."""
    copied = torch.compiler.is_compiling() or any(p.is_inference() for p in h)
    if copied:                              # torch does not count there how often a tensor was changed in place
        h = [p.clone() for p in h]
    versions = None if copied else [p._version for p in h]
    f_parts = _returned(f(h[0] if spec.is_leaf() else tree_unflatten(h, spec)), spec, shapes)
    if versions and versions != [p._version for p in h]:
        # It would look like a root to a solver, and change h* under a gradient.
        raise ValueError("f must not change its argument in place: use inplace=False in its first operation")
    return f_parts


def _forget_cached_weights():
    """Weights that autocast or parametrize.cached() hold from a solve without a graph would get no gradient."""
    if not torch.compiler.is_compiling():
        torch.clear_autocast_cache()
        torch.nn.utils.parametrize._cache.clear()


def _explain(error):
    """Raises what to do instead, if a transform of torch cannot pass a solver or a backward pass of ours.

    torch has no exceptions of their own for these, so their texts are matched; an unknown one passes.
    """
    text = str(error)
    if "forward AD" in text:
        remedy = "forward-mode derivatives (jvp, jacfwd, hessian) cannot pass a fixed-point solver: use reverse mode, "\
                 "with grad='upg' for second derivatives (torch.func.jacrev of jacrev)"
    elif (("vmap: " in text and "not possible" in text) or ("functorch" in text and "requires_grad_" in text)
          or "Batching rule not implemented" in text):
        remedy = "a fixed-point solver cannot run under vmap, nor 'npg' and 'implicit' under any transform of "\
                 "torch.func: call vmap inside f, and use grad='upg' under torch.func.grad"
    elif "selective activation checkpoint" in text:
        remedy = "npg and implicit run f's backward pass several times, which selective activation checkpointing "\
                 "refuses: use grad='upg', or plain checkpoint(..., use_reentrant=False)"
    else:
        return
    raise RuntimeError(f"equilibrium: {remedy}") from error


def _check_budget(max_iter, tol, stop_mode, which=""):
    max_iter = _whole(max_iter, f"{which}max_iter")
    _require(isinstance(tol, (int, float)) or hasattr(tol, "item"), f"{which}tol must be >= 0, got {tol!r}")
    _require(float(tol) >= 0, f"{which}tol must be >= 0, got {tol!r}")
    if not any(map(torch.is_tensor, tree_flatten(stop_mode)[0])):           # else a state
        _require(stop_mode in ("rel", "rel_joint", "abs", "max"),
                 f"stop_mode must be 'rel', 'rel_joint', 'abs' or 'max', got {stop_mode!r}")
    return max_iter


def _check_offsets(offsets, rows):
    if not (torch.is_tensor(offsets) and offsets.dtype in (torch.int32, torch.int64) and offsets.dim() == 1
            and len(offsets) >= 1):
        raise ValueError(f"offsets must be an integer tensor (N + 1,), got {offsets!r}")
    # Looking at values on a GPU would wait for it.  Not _require: it would write all the offsets out at every call.
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling() and not (
            int(offsets[0]) == 0 and int(offsets[-1]) == rows and bool((offsets.diff() >= 0).all())):
        raise ValueError(f"offsets must go from 0 up to the number of rows of h0, {rows}, got {offsets.tolist()}")


def _segments(x, how, offsets):
    """The sum or max of x (rows, ...) over the rows of every sample, (N, ...)."""
    return torch.segment_reduce(x, how, offsets=offsets, initial=0, unsafe=True)     # its check would wait for a GPU


def _wide(x):
    """float64, but for MPS, which has none."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _largest(x):
    """max |x_i| (N,) for x (N, ...); 0 if there is nothing."""
    x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    return torch.linalg.vector_norm(x, math.inf, dim=1) if x.shape[1] else x.new_zeros(x.shape[0])


def _norms(x, dtype):
    """||x_i|| (N,) for x (N, ...), also if its square under- or overflows: a 0 would look like a solution.

    On a CPU such a norm is that of x / max |x|, in float64.  Elsewhere the largest number stands in for it, since
    looking at the norms would wait for the GPU.
    """
    dims = tuple(range(1, x.dim()))
    if not dims:
        return x.to(dtype).abs()
    norms = torch.linalg.vector_norm(x, dim=dims, dtype=dtype)
    low, high = (1e-15, 1e18) if dtype == torch.float32 else (1e-150, 1e150)
    safe = (norms > low) & (norms < high)                   # False for NaN
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(safe, norms, _largest(x).to(dtype))
    if not bool(safe.all()):
        rows = x[~safe].double().flatten(1)
        largest = _largest(rows).clamp_min(torch.finfo(rows.dtype).tiny)
        scaled = torch.linalg.vector_norm(rows / largest[:, None], dim=1) * largest
        norms[~safe] = torch.where(largest.isinf(), largest, scaled).to(dtype)
    return norms


class _Layout:
    """Maps a state to one flat (N, D) tensor and back, without copying on the way back unless a dtype differs.

    The flat vectors are float32 (float64 if a part is); f gets every part in its own dtype.  A 4-dimensional part in
    channels-last memory stays channels-last, so that f's convolutions meet the format that they were tuned for.
    """

    def __init__(self, h):
        parts, self.spec = _flatten(h)
        self.shapes, self.dtypes = [p.shape for p in parts], [p.dtype for p in parts]
        self.N, self.device = parts[0].shape[0], parts[0].device
        self.sizes = [math.prod(s[1:]) for s in self.shapes]
        self.channels_last = [p.dim() == 4 and not p.is_contiguous()
                              and p.is_contiguous(memory_format=torch.channels_last) for p in parts]
        self.dtype = torch.float64 if torch.float64 in self.dtypes else torch.float32

    def split(self, x):
        """Views of the columns of x (N, D), in the shapes of the parts."""
        views = []
        for column, shape, last in zip(x.split_with_sizes(self.sizes, dim=1), self.shapes, self.channels_last):
            if last:
                n, c, *hw = shape
                views.append(column.view(n, *hw, c).permute(0, 3, 1, 2))
            else:
                views.append(column.view(shape))
        return views

    def parts(self, x):
        """The parts of x (N, D) as f gets them."""
        return [view.to(dtype) for view, dtype in zip(self.split(x), self.dtypes)]

    def pack(self, parts):
        x = torch.empty(self.N, sum(self.sizes), dtype=self.dtype, device=self.device)
        for view, part in zip(self.split(x), parts):
            view.copy_(part)
        return x


class SolverResult(NamedTuple):
    """What a solver found.  `residual` and `trace` are in the units of its stop mode; N counts samples."""
    h: State                # as h0; per sample of the lowest residual, h0 (gmres with b: zero) if none is finite
    residual: Tensor        # (N,) its residual, inf where f was never finite.  If f couples samples, give offsets: else
    n_evals: int            # calls of f                          it is of h itself only if all converge
    trace: Tensor           # (n_evals, N) residual at every evaluation; a sample that stopped repeats its last one
    converged: Tensor       # (N,) bool, residual <= tol


class _Progress:
    """Evaluates f, and keeps per sample: the trace of its residual, the lowest so far, whether it still moves.

    A sample is a row of the flat state, or the rows offsets[i] to offsets[i + 1].

    A sample stops moving when it has converged, or when it is lost: if its f(h) - h is not finite, or a million times
    the first (the official release's protective break, here per sample), or 1000 ||h0|| if that is more.  If one that
    stands is later found above 10 tol, f couples samples.  Then what was recorded before does not count, and all are
    one sample from there on, with the residual of the worst: a state put together from several evaluations has none of
    their residuals.

    Everything stays on the device; `finished` is the only host synchronisation (gmres has one like it, and one at a
    restart, and `result` one more): at every evaluation on a CPU, at every 8th on a GPU, and never with tol = 0, where
    the budget is the stop.  Disturbed samples are looked for as often, and at the last evaluation.
    """

    def __init__(self, f, h0, max_iter, tol, stop_mode, offsets=None):
        self.max_iter = _check_budget(max_iter, tol, stop_mode)
        self.f, self.tol, self.stop_mode, self.offsets = f, float(tol), stop_mode, offsets
        self.layout = _Layout(h0)
        self.x0 = self.layout.pack(tree_flatten(h0)[0])
        N, device = self.layout.N, self.x0.device
        if offsets is not None:
            _check_offsets(offsets, N)
            self.sample_of = torch.repeat_interleave(offsets.diff(), output_size=N)
            N = len(offsets) - 1
        self.on_cpu = device.type == "cpu" and not torch.compiler.is_compiling()    # where to look costs nothing
        self.b = self.limit = None
        if not isinstance(stop_mode, str):                  # f(h) = J h + b, for this b
            b = _flatten(stop_mode)[0]
            _require([p.shape for p in b] == self.layout.shapes, "stop_mode, a state, must be of the shape of h0")
            self.b, self.stop_mode = self.layout.pack(b), "b"
            size = self.per_sample(_norms(self.b, self.b.dtype))
            # A sample with b = 0 is measured by the whole batch's b, and by itself: f may couple it with the others.
            self.zero_b, self.size = size == 0, torch.where(size > 0, size, _norms(size[None], size.dtype))
            self.some_b_is_zero = not self.on_cpu or bool(self.zero_b.any())        # or may be
        self.by_part = len(self.layout.shapes) > 1 and self.stop_mode in ("rel", "b")
        self.trace = self.x0.new_empty(self.max_iter + 1, N)
        self.lowest = self.x0.new_full((N,), math.inf)
        self.moving = torch.ones(N, dtype=torch.bool, device=device)
        self.coupled = torch.zeros((), dtype=torch.bool, device=device)
        self.evals, self.check_every, self.nobody_stands = 0, 1 if device.type == "cpu" else 8, self.on_cpu

    def per_row(self, x):
        """Repeats what belongs to the samples (N, ...) for each of their rows (rows, ...)."""
        return x if self.offsets is None else x[self.sample_of]

    def per_sample(self, row_norms):
        """Norms of the samples (N,) from those of the state's rows."""
        if self.offsets is None:
            return row_norms
        squares = row_norms.to(_wide(row_norms)).square()
        return _segments(squares, "sum", self.offsets).sqrt().to(row_norms.dtype)

    def part_norms(self, x):
        """[||x_p|| (N,) for the parts of x (rows, D) that count by themselves]; of x as a whole if they do not."""
        columns = x.split_with_sizes(self.layout.sizes, dim=1) if self.by_part else (x,)
        return [self.per_sample(_norms(column, x.dtype)) for column in columns]

    def products(self, a, b):
        """(N, i, j): of each sample, the inner products of the states a (i, rows, D) with the states b (j, rows, D)."""
        products = _products(a, b)
        return products if self.offsets is None else _segments(products, "sum", self.offsets)

    def call(self, x, g, f_out=None):
        """g <- f(x) - x, all (rows, D); f_out <- f(x) if wanted.  Returns the parts of f(x)."""
        x_parts = self.layout.parts(x)
        f_parts = _call(self.f, x_parts, self.layout.spec, self.layout.shapes)
        for f_part, x_part, g_part in zip(f_parts, x_parts, self.layout.split(g)):
            torch.sub(f_part, x_part, out=g_part)
        if f_out is not None:
            for f_part, out in zip(f_parts, self.layout.split(f_out)):
                out.copy_(f_part)
        return f_parts

    def evaluate(self, x, g, f_out=None):
        """As `call`, and records the residual at x.  Returns ||g|| (N,), with a b at least its rounding."""
        f_parts, eps = self.call(x, g, f_out), torch.finfo(g.dtype).eps
        norms = self.part_norms(g)
        norm = _together(norms)
        if self.b is not None:      # f(x) - x is rounded to eps ||x||, which is all of it for an x that explodes
            sizes = self.part_norms(x)
            x_norm = _together(sizes)
            norm = torch.maximum(norm, eps * x_norm)
        elif self.stop_mode in ("rel", "rel_joint"):
            sizes = [self.per_sample(_norms(p, torch.promote_types(p.dtype, g.dtype))).to(g.dtype) for p in f_parts]
            self.size = _together(sizes)
        if self.stop_mode == "max":
            residual = _largest(g)
            residual = residual if self.offsets is None else _segments(residual, "max", self.offsets)
        else:
            residual = self.relative(norm)
        if self.b is not None and self.some_b_is_zero:
            own = _ratio(norm, torch.maximum(x_norm, eps * _norms(x_norm[None], x_norm.dtype)))
            residual = torch.where(self.zero_b, torch.maximum(residual, own), residual)
        if self.by_part:            # a small part would hide behind a large one
            least = eps * (self.size if self.b is None else x_norm)
            for part_norm, size in zip(norms, sizes):
                residual = torch.maximum(residual, _ratio(part_norm, torch.maximum(size, least)))
        # Above `limit` a sample is lost.  The first ||g|| says little where h0 happens to be a root (then ||h0|| does)
        # and nothing where both are 0, as in rows that no neighbour has reached yet (then the batch does).
        if self.limit is None:
            limit = torch.maximum(1e6 * norm, 1e3 * self.per_sample(_norms(x, x.dtype)))
            self.limit = torch.where(limit == 0, limit.nansum(), limit).clamp(max=torch.finfo(limit.dtype).max)
        fine = norm <= self.limit                               # False for NaN
        moving = fine & (residual > self.tol)
        if self.nobody_stands and bool(moving.all()):           # on a CPU: nobody was disturbed, and nobody is lost
            self.moving = moving
            self.record(self.joint(residual))
            return norm
        self.limit = torch.where(self.moving > fine, -1, self.limit)                # lost, for ever
        if self.on_cpu or (self.evals + 1) % self.check_every == 0 or self.evals == self.max_iter:
            far = 10 * self.tol         # rounding may lift a solved sample above tol; a relative 0.5 is far in any case
            far = far if self.stop_mode in ("abs", "max") else max(self.tol, min(max(far, 10 * eps), 0.5))
            disturbed = ~self.moving & (self.limit >= 0) & ~(residual <= far)
            grown = torch.maximum(self.limit, 1e6 * norm).clamp(max=torch.finfo(norm.dtype).max)
            self.limit = torch.where(disturbed, grown, self.limit)
            fine, self.moving = norm <= self.limit, self.moving | disturbed
            self.couple(disturbed.any())
        self.moving = fine & (residual > self.tol) & (self.moving | self.coupled)
        self.nobody_stands = self.on_cpu and bool(self.moving.all())
        self.record(self.joint(residual))
        return norm

    def couple(self, found):
        """If `found` (0-dim.), a sample that stood has another residual than before: f couples samples."""
        self.lowest = torch.where(found & ~self.coupled, math.inf, self.lowest)
        self.coupled = self.coupled | found

    def joint(self, residual):
        """The residual (N,), if f couples samples that of the worst for all."""
        if residual.numel() == 0 or self.on_cpu and not bool(self.coupled):
            return residual
        return torch.where(self.coupled, residual.amax(0), residual)

    def relative(self, norm):
        """The residual (N,) that belongs to ||f(h) - h|| = norm, all parts together."""
        return norm if self.stop_mode == "abs" else _ratio(norm, self.size)

    def record(self, residual):
        self.trace[self.evals] = residual
        self.evals += 1

    def improved(self):
        """Which samples (N,) the last evaluation found at their lowest residual."""
        residual = self.trace[self.evals - 1]
        better = residual < self.lowest                     # False for NaN: a broken evaluation is never the best
        self.lowest = torch.where(better, residual, self.lowest)
        return better

    def keep(self, x, x_best):
        """(the best state with x taken into account, where the next x may be written)."""
        better = self.improved()
        if self.on_cpu and bool((better | (self.lowest <= self.tol)).all()):
            return x, x_best        # no copy: each sample has improved at x, or is solved and has not moved since
        return torch.where(self.per_row(better)[:, None], x, x_best, out=x_best), x

    def hold(self, g, moving):
        """g <- 0 for the samples that have stopped.  By a mask, never by a product: 0 x NaN is NaN."""
        if not (self.on_cpu and bool(moving.all())):
            g.masked_fill_(self.per_row(~moving)[:, None], 0)

    def finished(self):
        if self.evals > self.max_iter:
            return True
        return self.tol > 0 and self.evals % self.check_every == 0 and not bool(self.moving.any())    # host sync

    def result(self, x_best, g, residual=None):
        residual = self.lowest if residual is None else residual
        converged = residual <= self.tol
        # The best states of those that are lost may be older than what the others were measured with.
        if (self.tol > 0 and self.check_every <= self.evals <= self.max_iter
                and bool(converged.any() & ~converged.all())):                                              # host sync
            self.evaluate(x_best, g)
            residual = self.trace[self.evals - 1].nan_to_num(nan=math.inf, posinf=math.inf)
            converged = residual <= self.tol
        h = tree_unflatten(self.layout.parts(x_best), self.layout.spec)
        return SolverResult(h, residual, self.evals, self.trace[:self.evals], converged)


def _together(norms):
    """The norm (N,) of several parts."""
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(
        torch.stack(norms), dim=0, dtype=_wide(norms[0])).to(norms[0].dtype)


def _ratio(norm, size):
    """norm / size.  If both are 0, so is the residual; norm / inf would be 0 and look solved."""
    return torch.where(norm == 0, 0, norm / size.clamp(max=torch.finfo(norm.dtype).max))


torch.serialization.add_safe_globals([SolverResult])        # torch.load of a checkpoint with a result in it


def _pieces(N, D, device):
    """How many equal pieces to cut the D numbers of N samples into, for their inner products.

    cuBLAS gives a product to one block of threads, and with a small N most of a GPU would idle.
    """
    most = 1 if device.type == "cpu" else min(1024 // max(N, 1), D // 4096)
    return next((i for i in range(most, 1, -1) if D % (4 * i) == 0), 1)


def _products(a, b):
    """(N, i, j): of each sample, the inner products of the rows of a (i, N, D) with those of b (j, N, D)."""
    (i, N, D), j = a.shape, len(b)
    pieces = _pieces(N, D, a.device)
    a, b = a.view(i, N * pieces, D // pieces), b.view(j, N * pieces, D // pieces)
    products = torch.bmm(a.transpose(0, 1), b.permute(1, 2, 0))
    return products if pieces == 1 else products.view(N, pieces, i, j).sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# Solvers
# ---------------------------------------------------------------------------------------------------------------------

def _solver(method):
    """Runs a solver without a graph, and its own products in float32 also under autocast: only f sees that.

    On GPUs they are in TF32 where torch.set_float32_matmul_precision allows it.
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
def fixed_point(f: Callable, h0: State, *, max_iter: int = 40, tol: float = 1e-4, stop_mode: str | State = "rel",
                lam: float = 1.0, offsets: Tensor | None = None) -> SolverResult:
    """Damped fixed-point iteration h <- (1 - lam) h + lam f(h), Eq. (12); lam = 1 is the plain one, Eq. (9).

    Converges at the rate rho(lam J + (1 - lam) I).  Stops per sample at ||f(h) - h|| / ||f(h)|| <= tol ("rel", the
    largest of this ratio over the parts of the state; "rel_joint", as official releases measure: one norm over all
    parts, behind which a small part can hide), ||f(h) - h|| <= tol ("abs") or max |f(h) - h| <= tol ("max"): the
    residual of f, not the length of the damped step.  "rel" cannot fall where h* = 0: use "abs" there.  (A part counts
    with at least eps times the norm of all parts.)  For an affine f(h) = J h + b, stop_mode may be the state b:
    ||f(h) - h|| / ||b||, which an h that explodes does not make small.  If a sample's b is zero, it is measured by the
    batch's ||b|| and by its own ||h||.  If there are several parts, each is also measured by its own ||h||.
    max_iter counts steps: f is called at most max_iter + 1 times, as the last state's residual is known too.  (If some
    samples converge and the others are lost before that, the last call is at h.)  Memory 3 states, with every solver
    one more for b.  Never raises for a map that does not converge: look at `converged`.  A sample is given up (lost) if
    ||f(h) - h|| is not finite, or above both a million times its first value and 1000 ||h0||.  Raises ValueError for an
    impossible argument.

    f receives every part in h0's own dtype, in which h comes back; the residual is that of this h.  (Under autocast
    float32 stands for half precision.)  The solver's own vectors are float32, or float64 if a part is.  No residual
    falls much below the rounding of f: with tanh layers about 1e-3 in bfloat16, 1e-4 in float16, 1e-7 in float32.

    f must neither change its argument, which is a ValueError, nor keep it: it may be a view of the solver's vectors,
    which is not contiguous if h0 has several parts.

    offsets (N + 1,): for samples of different length, as graphs: sample i is the rows offsets[i] to offsets[i + 1] of
    the state, whose first dimension is all their rows.  offsets[0] = 0; the last one is the number of rows.
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
             m: int = 6, beta: float = 1.0, ridge: float = 1e-4, offsets: Tensor | None = None) -> SolverResult:
    """Anderson acceleration (type II) over the last m pairs (h_i, f(h_i)), with g_i = f(h_i) - h_i:

        h <- beta sum_i alpha_i f(h_i) + (1 - beta) sum_i alpha_i h_i,
        alpha = argmin ||sum_i alpha_i g_i||^2 + ridge sum_i alpha_i^2 ||g_i||^2  subject to  sum_i alpha_i = 1.

    Each pair has a ridge of its own size.  A common one would be set by the oldest, largest residuals of the window,
    so that more memory would be slower.  An absolute one stalls once the residuals have shrunk below it.  More than
    m = 6 saved at most one evaluation on the F of MDEQ, of the Transformer and of tanh layers.  A sample whose small
    system cannot be solved uses its newest pair alone.  Stops, reports and costs as `fixed_point` does.  Memory
    2 m + 5 states.  Walker and Ni, "Anderson acceleration for fixed-point iterations", 2011.
    """
    m = _whole(m, "m")
    beta = float(_fraction(beta, "beta"))
    _require(ridge >= 0, f"ridge must be >= 0, got {ridge!r}")
    run = _Progress(f, h0, max_iter, tol, stop_mode, offsets)
    x, x_best = run.x0.clone(), run.x0
    m, N = min(m, run.max_iter), run.lowest.shape[0]
    fs, gs = x.new_empty(m, *x.shape), x.new_empty(m, *x.shape)     # overwritten in turn: the order does not matter
    gram = x.new_zeros(N, m, m)                                 # gram[i, j] = g_i . g_j
    ones = x.new_ones(N, m)
    while True:
        i = run.evals % m
        run.evaluate(x, gs[i], f_out=fs[i])
        x_best, out = run.keep(x, x_best)
        if run.finished():
            return run.result(x_best, gs[i])
        n = min(run.evals, m)
        row = run.products(gs[i:i + 1], gs[:n])[:, 0]                               # (N, n): the one new row
        gram[:, i, :n] = row
        gram[:, :n, i] = row
        system = gram[:, :n, :n].clone()
        system.diagonal(dim1=1, dim2=2).mul_(1 + ridge)
        alpha, info = torch.linalg.solve_ex(system, ones[:, :n])        # the checked variant would synchronise
        alpha = alpha / alpha.sum(dim=1, keepdim=True)
        plain = (info != 0) | ~alpha.isfinite().all(dim=1)
        alpha = alpha.masked_fill(plain[:, None], 0)
        alpha[:, i] = torch.where(plain, 1.0, alpha[:, i])
        alpha = run.per_row(alpha)[:, None]
        x_new = torch.bmm(alpha, fs[:n].transpose(0, 1))
        if beta < 1:
            x_new.baddbmm_(alpha, gs[:n].transpose(0, 1), alpha=beta - 1)
        x = torch.where(run.per_row(run.moving)[:, None], x_new[:, 0], x, out=out)


@_solver
def broyden(f: Callable, h0: State, *, max_iter: int = 40, tol: float = 1e-4, stop_mode: str | State = "rel",
            memory: int | None = None, offsets: Tensor | None = None) -> SolverResult:
    """Broyden's good method for g(h) = f(h) - h = 0, from the initial Jacobian -I, without line search.

    The textbook keeps the inverse as -I + U V^T: two tall matrices, read three times per step.  Here only the steps
    s_0 = g, s_1, ... are kept, and read twice (after Kelley, "Iterative Methods for Linear and Nonlinear Equations",
    1995, Sec. 7.3).  After step s_n, with g at the new state,

        alpha_0 = 0,  alpha_{j+1} = (s_j . g + sum_{i<=j} (s_j . s_i) alpha_i) / (s_j . s_j),  j = 0 .. n
        s_{n+1} = (g + sum_{i<=n} alpha_i s_i) / (1 - alpha_{n+1})

    alpha is linear in the products s_j . g: alpha = T (s_j . g)_j, and T grows by a row per step.

    memory: steps kept (default max_iter).  When it is full the method restarts from the current state; overwriting
    the oldest pairs, as public code does, stalls it.  Where the update would divide by almost zero, that sample
    restarts with the plain step.  Stops, reports and costs as `fixed_point` does.  Memory `memory` + 4 states.
    """
    memory = None if memory is None else _whole(memory, "memory")
    run = _Progress(f, h0, max_iter, tol, stop_mode, offsets)
    x, x_best = run.x0.clone(), run.x0
    m, N = min(memory or run.max_iter, run.max_iter), run.lowest.shape[0]
    rows = x.new_empty(m + 1, *x.shape)                 # g, s_0, s_1, ...: the only large buffer, allocated once
    g = rows[0]
    lengths = x.new_zeros(N, m + 1)                 # of the rows
    T = x.new_zeros(N, m + 1, m)
    plain = torch.eye(1, m + 1, dtype=x.dtype, device=x.device)     # the coefficients of s = g
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
        else:       # one read of the steps, for their products with g and with s_{n-1}, whose row T still lacks
            # A view of g and s_{n-1}, unless its stride is beyond the int that cuBLAS takes.
            pair = rows[:n + 1:n] if n * x.numel() < 2 ** 31 else torch.stack([g, rows[n]])
            products = run.products(pair, rows[1:n + 1])                                               # (N, 2, n)
            square, inverse = products[:, 1, n - 1:], T[:, n, n - 1:n]
            torch.reciprocal(square.clamp_min(torch.finfo(x.dtype).tiny), out=inverse)  # at rest a step has length 0
            torch.mul(torch.bmm(products[:, 1:], T[:, :n, :n - 1])[:, 0], inverse, out=T[:, n, :n - 1])
            torch.sqrt(square, out=lengths[:, n:n + 1])
            alpha = torch.bmm(T[:, :n + 1, :n], products[:, 0, :, None])[:, :, 0]       # (N, n + 1)
        c = (1 - alpha[:, n:]).reciprocal()
        coefficients = torch.cat([c, c * alpha[:, :n]], dim=1)              # of the rows, in s_n
        lengths[:, 0] = norm
        bound = torch.linalg.vector_norm(coefficients * lengths[:, :n + 1], 1, dim=1, keepdim=True)     # on ||s_n||
        ok = (c.abs() < 1e5) & (bound < 1e15)                           # False for NaN; 1e15 squares within float32
        coefficients = torch.where(ok, coefficients, plain[:, :n + 1])
        T[:, :n + 1].masked_fill_(~ok[:, :, None], 0)
        s = rows[n + 1]
        torch.bmm(run.per_row(coefficients)[:, None], rows[:n + 1].transpose(0, 1), out=s[:, None])
        x = torch.add(x, s, out=out)
        n += 1


@_solver
def gmres(f: Callable, h0: State, *, max_iter: int = 40, tol: float = 1e-4, stop_mode: str | State = "rel",
          memory: int | None = None, offsets: Tensor | None = None) -> SolverResult:
    """GMRES for an affine f(h) = J h + b, so for (I - J) h = b: the backward solve of "implicit".

    After j products with J the residual is the smallest that any polynomial of J can reach with them, per sample, so it
    never rises.  The other solvers do not minimise: their residual may end larger than it began.  If f couples samples
    (BatchNorm, a graph without offsets), GMRES per sample is wrong: use offsets, or another solver.  Saad and Schultz,
    "GMRES: A generalized minimal residual algorithm for solving nonsymmetric linear systems", 1986.

    With stop_mode = b the search starts from zero, h0 is not used, and row j of the trace is after j + 1 products.
    Without it b is not known: the first evaluation is at h0, and "rel" is relative to ||f(h)|| at the last state that
    was evaluated.  The residual of the recurrence is not the true one once rounding shows, in f or here.  So the last
    evaluation is at the state found, and its residual decides.  If it is above tol, the sample starts afresh from there
    as long as budget is left and the state improves.  Stops, reports and costs as `fixed_point` does, in calls of f.

    The basis is made orthogonal by modified Gram-Schmidt (enough for GMRES: Paige, Rozloznik and Strakos, 2006), in the
    form that reads it twice per product as `broyden` does: (I + L)^-1 V^T w, where L is the lower triangle of V^T V,
    grows by a row per product (Swirydowicz et al., "Low synchronization Gram-Schmidt and generalized minimal residual
    algorithms", 2021).  If little is left of a product, and always on a GPU, it does so again.

    memory: products before a restart (default max_iter).  Memory `memory` + 5 states, without b two more, and up
    to 10 `memory`^2 numbers per sample.  Raises ValueError for an impossible argument and for stop_mode "max", which a
    recurrence of 2-norms cannot know.
    """
    memory = None if memory is None else _whole(memory, "memory")
    if isinstance(stop_mode, str) and stop_mode == "max":
        raise ValueError("gmres has no stop_mode 'max': use 'rel' or 'abs'")
    run = _Progress(f, h0, max_iter, tol, stop_mode, offsets)
    max_iter = run.max_iter
    m, N = min(memory or max_iter, max_iter), run.lowest.shape[0]
    x, x_best, r = run.x0.clone(), run.x0, torch.empty_like(run.x0)
    # J v = (f(origin + s v) - f(origin)) / s with s about ||f(origin)||: a much smaller s v would drown in the rounding
    # of f(origin + s v), a much larger one would drown f(origin).
    if run.b is None:
        run.evaluate(x, r)
        origin, size = x.clone(), run.per_sample(_norms(r + x, x.dtype))
        start, going, residual = run.lowest, run.improved(), run.trace[0]
        if run.finished():
            return run.result(x_best, r)
    else:                       # from zero, whose residual is known
        origin, size = None, run.size
        x.zero_()
        r.copy_(run.b)
        norm = run.per_sample(_norms(r, r.dtype))
        going = norm.isfinite()
        residual = run.lowest = start = torch.where(going, run.relative(norm), math.inf)
        x_best.masked_fill_(run.per_row(going)[:, None], 0)
    at_origin = r.clone() if run.b is None else run.b
    s = size.clamp(1, 1e15)                         # s^2 within float32
    rows = x.new_empty(m + 1, *x.shape)             # s times the basis
    eps, seen = torch.finfo(x.dtype).eps, torch.zeros_like(going)

    # going: its last true residual was the lowest; rest: it was solved before this cycle; alive: it gets directions;
    # good: this product is finite; left: it has a part outside the basis; turns: its rotation is defined; seen: f was
    # finite once.
    while run.evals < max_iter:                     # a product, and the last evaluation
        norm = run.per_sample(_norms(r, r.dtype))
        rest = ~(residual > tol)
        alive = going & ~rest & (norm > 0)
        # t is the norm over all parts, the trace is of the worst one: their ratio now is assumed to last.
        scale = torch.where(norm > 0, residual / run.relative(norm), 1)
        torch.div(r, run.per_row(norm)[:, None], out=rows[0]).mul_(run.per_row(s)[:, None])
        run.hold(rows[0], alive)
        # (I + L)^-1; the product of the Givens rotations; R y = t.  They grow: max_iter may be hundreds, N thousands.
        T, Q, R = x.new_zeros(3, N, min(m, 16) + 1, min(m, 16) + 1)
        Q[:, 0, 0], t, residuals = 1, [norm / s], [norm / s]
        for n in range(min(m, max_iter - run.evals)):
            if n + 1 == T.shape[1]:
                T, Q, R = torch.nn.functional.pad(torch.stack([T, Q, R]), (0, 16, 0, 16))
            v, w = rows[n], rows[n + 1]
            run.call(v if origin is None else origin + v, w)
            torch.sub(at_origin, w, out=w)                                              # (I - J) v
            products = run.products(rows[n:n + 2], rows[:n + 1]) / s.square()[:, None, None]        # (N, 2, n + 1)
            T[:, n, :n] = -torch.bmm(products[:, :1, :n], T[:, :n, :n])[:, 0]
            T[:, n, n] = 1
            c = 0
            for last in (False, True):
                more = torch.bmm(T[:, :n + 1, :n + 1], products[:, -1, :, None])[:, :, 0]
                w[:, None].baddbmm_(run.per_row(more)[:, None], rows[:n + 1].transpose(0, 1), alpha=-1)
                c = c + more
                # If little is left of w, the rounding of the products is much of it: once more.  A GPU always does so,
                # since to ask would be to wait.
                if last or run.on_cpu:
                    norm = run.per_sample(_norms(w, w.dtype)) / s
                    if last or bool((~alive | (norm > 0.1 * torch.linalg.vector_norm(c, dim=1))).all()):
                        break
                products = run.products(w[None], rows[:n + 1]) / s.square()[:, None, None]
            # If a product lies in the span of the basis, what is left of it is rounding: below 10 eps of its length it
            # counts as zero.  A sample that has stopped, is lost or has no direction left gets directions of zero,
            # which change nothing.
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
            if tol > 0 and run.evals % run.check_every == 0 and not bool(alive.any()):              # host sync
                break
        n += 1
        # y from the first 0, 1, ..., n directions: where I - J is nearly singular, the last of them may be rounding
        # that is blown up, and cost more digits than the residual gains.
        y = torch.stack(t[:n], dim=1)[:, :, None].expand(-1, -1, n).triu()
        y = torch.nn.functional.pad(torch.linalg.solve_triangular(R[:, :n, :n], y, upper=True), (1, 0))
        cost = torch.stack(residuals, dim=1) + 10 * eps * torch.linalg.vector_norm(y, dim=1)
        best = cost.nan_to_num(nan=math.inf).argmin(dim=1)
        y = y.gather(2, best[:, None, None].expand(-1, n, 1))
        x += torch.bmm(run.per_row(y).transpose(1, 2), rows[:n].transpose(0, 1))[:, 0]
        run.evaluate(x, r)
        residual = run.trace[run.evals - 1]         # a view: what is written to it is in the trace
        run.couple((rest & (residual > 10 * tol)).any())
        residual[:] = run.joint(residual)
        going = run.improved()
        torch.where(run.per_row(going)[:, None], x, x_best, out=x_best)
        if run.by_part:             # it may rise while the whole falls
            going = residual.isfinite()
        if tol > 0 and run.evals < max_iter and bool((~going | (run.lowest <= tol)).all()):         # host sync
            break
    found = seen | (run.lowest < start) | run.trace[run.evals - 1].isfinite()       # else f was never finite
    return run.result(x_best, r, torch.where(found, run.lowest, math.inf))


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------

def equilibrium(f: Callable, h0: State, *, grad: str = "upg", k: int = 5, lam: float = 0.5, solver: Callable = broyden,
                max_iter: int = 40, tol: float = 1e-4, stop_mode: str = "rel", backward_solver: Callable = gmres,
                backward_max_iter: int = 40, backward_tol: float = 1e-4, on_backward: Callable | None = None,
                offsets: Tensor | None = None) -> tuple[State, SolverResult]:
    """Solve h* = f(h*) without a graph, then attach the gradient `grad` (table at the top of this file).

    Returns the state and the solver's result.  The state is h_k, the last unrolled one, for "upg"; h* itself for
    "npg" and "implicit", so that the loss is taken where evaluation will take it (the official implicit code returns
    f(h*)); for "bptt", which runs all max_iter steps, the last iterate, here and in the result.  Under
    `torch.no_grad()` it only solves; whether a gradient is attached depends on grad mode alone, never on `.training`,
    nor on whether the solve has converged: look at result.converged.  Only with "bptt" does a gradient reach h0.

    max_iter, tol, stop_mode, and what f may and may not do: as in `fixed_point`.
    k, lam: phantom gradients only; k = 1, lam = 1 is the one-step gradient (JFB).
    solver, backward_solver: fixed_point, anderson, broyden, for the backward solve also gmres, or functools.partial of
    one, binding what is not passed here (m, beta, ridge, memory, lam).  One of your own is called as solver(f, h0,
    max_iter=, tol=, stop_mode=), with offsets= if they are given, and returns a SolverResult.
    backward_tol, on_backward: only for "implicit"; see there.
    offsets (N + 1,): sample i is the rows offsets[i] to offsets[i + 1] of the state (graphs), for both solves.
    f is handed states of h0's own dtype, or float32 instead of less under autocast (see `fixed_point`).
    Cost beyond the solve, in calls of f, where a VJP into h and one into the parameters count as one each: "upg"
    3 k - 1, "npg" k + 2, "implicit" at most backward_max_iter + 4; "bptt" 3 max_iter, its solve included.

    Under parametrize.cached() a weight is computed once for the solve, and once more with a graph for the gradient.  If
    f contains a collective (SyncBatchNorm), all processes must call it equally often: use tol = 0 and
    backward_tol = 0, and, as it couples samples, another backward_solver than gmres.  If it contains
    torch.utils.checkpoint, give that use_reentrant=False: the other kind loses a part of "upg" in silence and cannot do
    "npg" and "implicit".  A checkpoint around `equilibrium` needs the same for "upg": the other kind's forward pass has
    no graph and returns h*, not h_k.  Do not change the returned state in place. Raises ValueError for an impossible
    argument, RuntimeError for a second derivative through "npg" or "implicit".
    """
    _require(grad in ("upg", "npg", "implicit", "bptt"),
             f"grad must be 'upg', 'npg', 'implicit' or 'bptt', got {grad!r}")
    _check_solver(solver)
    _check_solver(backward_solver, "backward_solver")
    _require(isinstance(stop_mode, str), f"stop_mode must be 'rel', 'rel_joint', 'abs' or 'max', got {stop_mode!r}")
    if grad == "bptt" and torch.is_grad_enabled():
        _require(solver is fixed_point, "grad='bptt' differentiates the plain iteration: it needs solver=fixed_point")
        try:
            return _bptt(f, h0, max_iter, tol, stop_mode, offsets)
        except RuntimeError as error:
            _explain(error)
            raise
    if grad in ("upg", "npg"):
        _check_phantom(k, lam)
    elif grad == "implicit":
        _check_budget(backward_max_iter, backward_tol, "rel", "backward_")
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
    if not callable(solver):            # not _require: it would write out what a partial holds, and wait for a GPU
        raise ValueError(f"{name} must be a function: fixed_point, anderson, broyden or one like them, "
                         f"backwards also gmres, got {solver!r}")
    if name == "solver" and getattr(solver, "func", solver) is gmres:
        raise ValueError("solver=gmres is for an affine f, as that of the backward solve: use it as backward_solver")


def _check_phantom(k, lam):
    return _whole(k, "k"), _fraction(lam, "lam")


def upg(f: Callable, h_star: State, k: int = 5, lam: float = 0.5) -> State:
    """Unrolling-based phantom gradient, Eq. (16), Algorithm 1: returns h_k, k steps from h* with the graph on:

        h <- (1 - lam) h + lam f(h)

    Exactly the gradient of that k-step graph, so also right away from a fixed point, where it acts as back-propagation
    through time (Sec. 3, "Trade-offs between Unrolling and Neumann").  From h* = 0 with lam = 1 it is the unrolled
    pretraining network.  Calls f k times; memory: k graphs of f.  Raises ValueError for an impossible k or lam, and
    where f(h) has another shape than h or f changes h in place.
    """
    k, lam = _check_phantom(k, lam)
    _forget_cached_weights()
    h, spec = _flatten(h_star)
    h, shapes = [p.detach() for p in h], [p.shape for p in h]
    for _ in range(k):
        f_h = _call(f, h, spec, shapes)
        h = [torch.lerp(a, b.to(a.dtype), lam) for a, b in zip(h, f_h)]     # saves nothing for its own backward
    return tree_unflatten(h, spec)


def npg(f: Callable, h_star: State, k: int = 5, lam: float = 0.5) -> State:
    """Neumann-series phantom gradient, Eq. (17): returns h* with the backward pass

        g_hat = lam (I + B^T + ... + (B^T)^(k-1)) g,  B = lam J + (1 - lam) I,   dL/dz = (df/dz)^T g_hat.

    One graph of f whatever k is; k + 2 calls of f and VJPs.  Tends to the exact gradient as k grows if rho(B) < 1
    (Theorem 2 has it for a contraction); at an exact fixed point it equals UPG.  Algorithms 2 and 3 of the paper
    multiply by lam once more than Eq. (17), as their f already holds one; Theorem 2 holds for the series of Eq. (17),
    which we follow.  Raises ValueError for an impossible k or lam and where f(h) has another shape than h, RuntimeError
    for a second derivative.
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
    """Implicit differentiation, Eq. (4): returns h* with the backward pass  g_hat = J^T g_hat + g,  g = dL/dh*.

    Exact at an exact fixed point with a converged backward solve.  `solver` is started at g (gmres at zero), and stops,
    keeps its best state and reports by ||g + J^T g_hat - g_hat|| / ||g|| per sample.  (Relative to ||g_hat||, as other
    solves are, a g_hat that explodes looks solved.)  A sample whose g is zero is measured by the batch's ||g|| and by
    its own ||g_hat||; of several parts, whose g may be zero, each also by its own ||g_hat||.  on_backward(SolverResult)
    is the only sign of a solve that failed: its best g_hat is used.  A solver of your own is called as
    solver(f, g, max_iter=, tol=, stop_mode=g), with g a list, and with offsets= if they are given, and returns a
    SolverResult.

    g is multiplied by a power of two before the solve, and g_hat divided by it, so that the scale of the loss cannot
    under- or overflow it.  If g is not finite, neither is the sample's gradient (torch.amp.GradScaler relies on that).
    If f couples samples, use offsets (for BatchNorm [0, N]), or another solver than gmres.

    One graph of f; at most max_iter + 4 calls of f and VJPs.  offsets: as in `equilibrium`.  Raises ValueError for an
    impossible argument and where f(h) has another shape than h, RuntimeError for a second derivative.
    """
    if not callable(solver):            # not _require, as in `equilibrium`
        raise ValueError(f"solver must be a function, got {solver!r}")
    _check_budget(max_iter, tol, "rel")
    samples = {} if offsets is None else {"offsets": offsets}
    if offsets is not None:
        _check_offsets(offsets, len(_flatten(h_star)[0][0]))

    def adjoint(vjp, g):
        g = [gi.to(torch.promote_types(gi.dtype, torch.float32)) for gi in g]
        largest = [gi.reshape(len(gi), -1).abs().amax(1) for gi in g if gi.numel()]     # NaN stays NaN
        if not largest:
            return g
        largest = torch.stack(largest).amax(0)                                          # (rows,)
        finite = largest.isfinite()
        if offsets is not None:                                 # of all rows of the sample
            bad = _segments((~finite).float(), "sum", offsets)
            finite = torch.repeat_interleave(bad == 0, offsets.diff(), output_size=len(finite))
        # One factor for the whole batch: if f couples samples, a system scaled per sample is another system.
        exponent = torch.frexp(torch.where(finite, largest, 0).amax()).exponent
        exponent = exponent.clamp(*((-125, 125) if largest.dtype == torch.float32 else (-1000, 1000))).to(largest.dtype)
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
    """J^T v for lists of tensors; v in any precision, zeros where an output does not depend on an input."""
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
    """(leaves with the values of h, the parts of f at them with a graph, the structure of h), for `_vjp`."""
    parts, spec = _flatten(h)
    _forget_cached_weights()
    try:
        leaves = [p.detach().requires_grad_() for p in parts]
    except RuntimeError as error:
        _explain(error)
        raise
    # f gets views, not leaves: FlopCounterMode and its like put hooks on a layer's inputs, which a leaf may not have.
    return leaves, _call(f, [p.view_as(p) for p in leaves], spec, [p.shape for p in leaves]), spec


def _attach(f, h_star, adjoint):
    """h* with a gradient: f is evaluated once with the graph on, and adjoint(vjp, dL/dh*) is sent into that graph.

    Parameters and u get their gradients through the ordinary graph of that evaluation, so DistributedDataParallel,
    gradient accumulation and autocast work as ever.  No hook and no state on a module: two calls per forward, two
    backward passes, or none, are all fine.
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
    """g_hat as it is, but a second derivative through it raises: it would silently miss dJ/dh and dg/dh.

    once_differentiable is not enough: its error node is not on the way to u, and autograd.grad(..., u) passes it by.
    """

    @staticmethod
    def forward(ctx, n, *tensors):
        return tuple(t.view_as(t) for t in tensors[:n])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("no second derivative through grad='npg' or 'implicit': use 'upg' or 'bptt', which have one")


def compiled(f: Callable) -> Callable:
    """torch.compile(f), for an f inside `equilibrium`.

    "npg" and "implicit" run f's backward pass several times on one graph: the first must not give its buffers away, as
    it may by default.  And f meets more shapes and modes than torch compiles for by default: in the solver, in the
    gradient, in evaluation, with a last, smaller batch.  Both are settings of torch for all that is compiled later.
    """
    from torch._functorch import config
    config.donated_buffer = False
    torch._dynamo.config.cache_size_limit = 64
    return torch.compile(f)


def captured(model: torch.nn.Module, *examples: Tensor) -> torch.nn.Module:
    """The model, whose training pass is from now on two CUDA graphs, one forward and one backward.

    A step of an implicit model is thousands of kernels of some microseconds each: the host takes longer to launch them
    than the GPU to run them.  A graph launches them all at once.

    The model, in training mode, takes and returns tensors and never looks at one on the host: `equilibrium` with
    tol = 0 and backward_tol = 0, and any solver but anderson.  Its Python runs at capture only: what it branches on,
    prints or keeps (on_backward) stays as it was then, and an autocast around `captured` is in both graphs.  Capturing
    leaves buffers and random numbers as they were.  A call is a replay in training mode with grad on, for tensors of
    the examples' shape, dtype and requires_grad and nothing else; others run as before, as do copies of the model.

    One forward pass, then its backward pass, then optimizer.zero_grad(set_to_none=True): the next call overwrites what
    this one has returned and saved, and what was None in .grad.  Move the model before, and wrap it in
    DistributedDataParallel afterwards.  Raises ValueError without a GPU, for a model in evaluation mode or captured
    before, and torch's RuntimeError, "operation not permitted when stream is capturing", where it waits for the GPU.
    """
    _require(isinstance(model, torch.nn.Module), f"captured takes an nn.Module, got {type(model).__name__}")
    _require(torch.cuda.is_available(), "captured needs a GPU")
    _require(model.training, "captured needs a model in training mode: model.train()")
    _require("forward" not in vars(model), "this model's forward pass has been replaced or captured before")

    def kind(tensors):
        return [torch.is_tensor(x) and (x.shape, x.dtype, x.requires_grad) for x in tensors]

    eager, buffers, expected = model.forward, [b.clone() for b in model.buffers()], kind(examples)
    gc.collect()        # a captured model is a cycle: one that is no longer used would still hold its graphs' memory
    # It is captured on a stream of its own, which its gradients then arrive from; torch waits where it must.
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
    with torch.random.fork_rng([torch.cuda.current_device()]), torch.autocast(
            "cuda", enabled=torch.is_autocast_enabled("cuda"), dtype=torch.get_autocast_dtype("cuda"),
            cache_enabled=False):                       # a cached weight would be the one of this moment
        torch.cuda.make_graphed_callables(model, examples, allow_unused_input=True)
    replay = model.forward
    for buffer, old in zip(model.buffers(), buffers):
        buffer.copy_(old)

    def forward(eager, *inputs, **options):
        own = eager.__self__ is model           # and not a copy, whose eager pass is its own
        same = own and model.training and torch.is_grad_enabled() and not options and kind(inputs) == expected
        return replay(*inputs) if same else eager(*inputs, **options)

    model.forward = functools.partial(forward, eager)
    return model


def _bptt(f, h0, max_iter, tol, stop_mode, offsets):
    """Eq. (9) and (10): max_iter plain steps with the graph on, then an evaluation without for the last residual."""
    _forget_cached_weights()
    with torch.no_grad():
        # It only measures: f is called below, and the result handed back to it.  states[-1] is f of states[-2].
        run = _Progress(lambda _: tree_unflatten(states[-1], spec), h0, max_iter, tol, stop_mode, offsets)
        g = torch.empty_like(run.x0)
    parts, spec = _flatten(h0)
    states = [[p.clone() for p in parts]]
    for i in range(run.max_iter + 1):
        with torch.set_grad_enabled(i < run.max_iter):
            f_h = _call(f, [p.view_as(p) for p in states[-1]], spec, run.layout.shapes)
            states.append([b.to(a.dtype) for a, b in zip(parts, f_h)])      # also where f returns a lower precision
        with torch.no_grad():
            run.evaluate(run.layout.pack(states[-2]), g)
            run.moving.fill_(True)          # no sample ever stands here, and none is disturbed
    last = run.trace[-1].nan_to_num(nan=math.inf, posinf=math.inf)
    h, detached = states[-2], [p.detach() for p in states[-2]]
    return tree_unflatten(h, spec), SolverResult(tree_unflatten(detached, spec), last, run.evals, run.trace,
                                                 last <= tol)


# ---------------------------------------------------------------------------------------------------------------------
# Diagnostics
# ---------------------------------------------------------------------------------------------------------------------

def _linearized(f, h):
    """(leaves, outputs) as `_open` has them, whatever the grad mode; ValueError where there can be no derivative."""
    _require(not torch.is_inference_mode_enabled(), "torch.inference_mode() has no derivatives: use torch.no_grad()")
    with torch.enable_grad():
        inputs, outputs, _ = _open(f, h)
    if not any(o.requires_grad for o in outputs):
        raise ValueError("f has no derivative: it computes under no_grad, or detaches what it returns")
    return inputs, outputs


def spectral_radius(f: Callable, h: State, *, lam: float = 1.0, n_iter: int = 100,
                    offsets: Tensor | None = None) -> Tensor:
    """Spectral radius per sample (N,) of lam J + (1 - lam) I at h, J = df/dh, by the power method with VJPs.

    A sample is a row of h, or with offsets (N + 1,) the rows offsets[i] to offsets[i + 1], as of a graph.  Estimates it
    as a mean of the growth of log ||v|| over the last half of the iterations, weighted by a triangle, which takes out
    what oscillates.  That is also right for a complex pair, where a Rayleigh quotient gives rho cos(angle).  Error O(1
    / n_iter) for a J that is not normal, and while its largest eigenvalues are close: some per cent at 50.  Costs one
    call of f and n_iter VJPs.  v is of torch's own random numbers.  Raises ValueError under torch.inference_mode(), and
    for an f without a graph.
    """
    n_iter = _whole(n_iter, "n_iter")
    _require(n_iter >= 2, f"n_iter must be an integer >= 2, got {n_iter!r}")
    lam = float(_fraction(lam, "lam"))
    inputs, outputs = _linearized(f, h)
    layout = _Layout(inputs)
    v = torch.randn_like(layout.pack([p.detach() for p in inputs]))
    if offsets is not None:
        _check_offsets(offsets, len(v))
        sample_of = torch.repeat_interleave(offsets.diff(), output_size=len(v))

    def norms(v):           # in float64: the squares of an exploded J's v are beyond float32, and v / inf would be 0
        norms = torch.linalg.vector_norm(v, dim=1, dtype=_wide(v))
        return norms if offsets is None else _segments(norms.square(), "sum", offsets).sqrt()

    size, growth = norms(v), []
    for _ in range(n_iter):
        size = size.to(v.dtype).clamp_min(torch.finfo(v.dtype).tiny)
        v = v / (size if offsets is None else size[sample_of])[:, None]
        j = layout.pack(_vjp(outputs, inputs, layout.split(v)))
        v = torch.lerp(v, j, lam)
        size = norms(v)
        growth.append(size.to(v.dtype))
    growth = torch.stack(growth[len(growth) // 2:]).log()           # log 0 = -inf: a nilpotent J gives 0
    i = torch.arange(1, len(growth) + 1, device=v.device, dtype=v.dtype)
    weight = torch.minimum(i, len(growth) + 1 - i)[:, None]
    return ((weight * growth).sum(dim=0) / weight.sum()).exp()


def adaptive_damping(rho: Tensor | float) -> float:
    """lam = 1 / rho(J) clipped to (0, 1] (App. D.3), for the largest of the rho given.  One host synchronisation.

    Helps where the largest eigenvalue is negative or complex; one above 1 stays above 1 under any damping.  Raises
    ValueError for a rho that is not finite.
    """
    largest = float(torch.as_tensor(rho).max())
    _require(math.isfinite(largest), f"rho must be finite, got {largest}")
    return 1.0 / max(1.0, largest)


def jacobian_regularization(f: Callable, h: State, *, n_vectors: int = 1) -> Tensor:
    """Hutchinson estimate of ||J||_F^2 / (numbers in h), J = df/dh at the detached h.

    A scalar, differentiable in what f closes over: E_v ||v^T J||^2 / (N D) with v standard normal, of torch's own
    random numbers.  Costs one call of f and n_vectors VJPs, and as much again in the backward pass.  Bai et al.,
    "Stabilizing Equilibrium Models by Jacobian Regularization", 2021.  Raises ValueError for n_vectors below 1, where
    f(h) has another shape than h, under torch.inference_mode(), and for an f without a graph.
    """
    n_vectors = _whole(n_vectors, "n_vectors")
    inputs, outputs = _linearized(f, h)
    total = torch.zeros((), dtype=torch.float32, device=inputs[0].device)
    with torch.enable_grad():
        for _ in range(n_vectors):
            j = _vjp(outputs, inputs, [torch.randn_like(o) for o in outputs], create_graph=True)
            total = total + sum(ji.to(torch.promote_types(ji.dtype, torch.float32)).square().sum() for ji in j)
    return total / (n_vectors * sum(p.numel() for p in inputs))


def cosine_similarity(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> Tensor:
    """Cosine of the angle between two gradients (Fig. 2), lists over the same parameters; None counts as zero.

    A float64 scalar; 0 if one of them is zero.  Raises ValueError for lists of different length.
    """
    _require(len(a) == len(b), f"two gradients over the same parameters are needed, got lists of {len(a)} and {len(b)}")
    zero = torch.zeros((), dtype=torch.float64)
    dot = sum(((x.double() * y.double()).sum() for x, y in zip(a, b) if x is not None and y is not None), zero)
    squares = [sum((x.double().square().sum() for x in grads if x is not None), zero) for grads in (a, b)]
    return dot / (squares[0].sqrt() * squares[1].sqrt()).clamp_min(torch.finfo(torch.float64).tiny)


def compare_gradients(f: Callable, h0: State, loss: Callable, parameters: torch.nn.Module | Sequence[Tensor],
                      rows: Sequence[tuple] = (("upg", 5, 0.5), ("npg", 5, 0.5), ("upg", 1, 1), ("implicit", 5, None)),
                      *, h: State | Callable | None = None, bptt: int = 0, solver: Callable = broyden,
                      max_iter: int = 200, tol: float = 1e-4, exact_max_iter: int = 200, exact_tol: float = 1e-3,
                      radius_iter: int = 50, offsets: Tensor | None = None, buffers: Sequence[Tensor] = ()) -> dict:
    """Fig. 2 for a model of your own: how close cheaper gradients of loss(h) come to the exact one.

    f, h0, solver, max_iter, tol, offsets: as in `equilibrium`.  loss: of the state, a scalar.  parameters: a module, or
    the tensors to differentiate by; those that f does not use are left out, since a head's gradient at h* is the same
    in every row.  rows: a list of (grad, k, lam); "implicit" is GMRES with k products, its lam is ignored.
    h: the state the rows start from (default: h*), or a function of k that gives it: of a truncated solve that trains
    through its last k calls of f, the state before them.  bptt: also compare with back-propagation through this many
    plain steps from h0.

    The exact gradient is implicit differentiation at h* by `gmres` until exact_tol, at most exact_max_iter products
    (restarted after 50).  Believe the cosines only as far as `exact` says: it is the share of the samples whose forward
    and backward residual are both at most exact_tol.  If rho is above 1, h* is a root that your iteration leaves: a
    solver=fixed_point finds none of these.  The samples with the largest gradients decide the cosine of a batch.

    Returns a dict:
        rows                dicts with grad, k, lam; cosine, to the exact gradient; norm_ratio, the length over its;
                            f_calls and vjps, the cost (a VJP into h and one into the parameters count as one each);
                            rho_B, the largest spectral radius of lam J + (1 - lam) I at h*; with bptt: cosine_bptt
        exact               see above
        forward_residual    (N,), of h*
        backward_residual   (N,), of the exact gradient
        rho                 (N,), spectral radius of J at h*; None with radius_iter = 0
        bptt                cosine of back-propagation to the exact gradient, or None
    Every gradient sees the same random numbers.  Leaves no trace: random numbers, .grad, the buffers of the module and
    those in `buffers` stay as they were.  Raises ValueError for an impossible argument, under torch.inference_mode(),
    and if f uses none of the parameters.
    """
    _require(not torch.is_inference_mode_enabled(), "torch.inference_mode() has no derivatives: use torch.no_grad()")
    _check_solver(solver)
    for row in rows:
        _require(isinstance(row, (tuple, list)) and len(row) == 3 and row[0] in ("upg", "npg", "implicit"),
                 f"rows is a list of (grad, k, lam) with grad 'upg', 'npg' or 'implicit', got {row!r} in it")
    rows = [(grad, *_check_phantom(k, 1.0 if grad == "implicit" else lam)) for grad, k, lam in rows]
    bptt = bptt and _whole(bptt, "bptt")
    _require(radius_iter == 0 or _whole(radius_iter, "radius_iter") >= 2, "radius_iter must be 0 or at least 2")
    owned = []
    if isinstance(parameters, torch.nn.Module):
        owned = [(m._buffers, name, b) for m in parameters.modules() for name, b in m._buffers.items() if b is not None]
        parameters = parameters.parameters()
    parameters = [parameters] if torch.is_tensor(parameters) else list(parameters)
    _require(all(map(torch.is_tensor, parameters)), "parameters must be a module or a list of tensors")
    before = [(b, b.clone()) for b in (*buffers, *(b for _, _, b in owned))]
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

    def exact(solver, max_iter, tol, h):
        return implicit(counted, h, solver=solver, max_iter=max_iter, tol=tol, on_backward=backward.append, **samples)

    def length(grads):
        return sum(x.double().square().sum() for x in grads if x is not None) ** 0.5

    try:
        with torch.enable_grad():
            with forked():
                star = solver(f, h0, max_iter=max_iter, tol=tol, **samples)
                outputs = [o for o in _linearized(f, star.h)[1] if o.requires_grad]
            parameters = [p for p in parameters if p.requires_grad]
            used = torch.autograd.grad(outputs, parameters, [torch.zeros_like(o) for o in outputs], retain_graph=True,
                                       allow_unused=True) if parameters else ()
            parameters = [p for p, g in zip(parameters, used) if g is not None]
            _require(parameters, "parameters: f uses none of them")
            truth = gradient(lambda: exact(functools.partial(gmres, memory=50), exact_max_iter, exact_tol, star.h))
            truth_solve, bptt_grads, bptt_cosine = backward[0], None, None
            if bptt:
                bptt_grads = gradient(lambda: equilibrium(f, h0, grad="bptt", solver=fixed_point, max_iter=bptt)[0])
                bptt_cosine = cosine_similarity(bptt_grads, truth).item()
            rho, found = {}, []
            for lam in {1.0, *(lam for grad, _, lam in rows if grad != "implicit")} if radius_iter else ():
                with forked():
                    rho[lam] = spectral_radius(f, star.h, lam=lam, n_iter=radius_iter, **samples)
            for grad, k, lam in rows:
                calls, start = 0, star.h if h is None else h(k) if callable(h) else h
                _returned(start, spec, shapes, "h must be a state")
                grads = gradient({"upg": lambda: upg(counted, start, k, lam),
                                  "npg": lambda: npg(counted, start, k, lam),
                                  "implicit": lambda: exact(gmres, k, 0.0, start)}[grad])
                vjps = {"upg": 2 * k - 1, "npg": k + 1, "implicit": backward[-1].n_evals + 2}[grad]
                row = {"grad": grad, "k": k, "lam": None if grad == "implicit" else lam,
                       "cosine": cosine_similarity(grads, truth).item(),
                       "norm_ratio": float(length(grads) / length(truth)), "f_calls": calls, "vjps": vjps,
                       "rho_B": rho[lam].max().item() if lam in rho and grad != "implicit" else None}
                found.append(row if not bptt else {**row, "cosine_bptt": cosine_similarity(grads, bptt_grads).item()})
    finally:
        with torch.no_grad():
            for of, name, buffer in owned:          # a module may have put another tensor in its place
                of[name] = buffer
            for buffer, old in before:
                buffer.copy_(old)
    solved = (star.residual <= exact_tol) & (truth_solve.residual <= exact_tol)
    return {"rows": found, "exact": solved.double().mean().item(), "forward_residual": star.residual,
            "backward_residual": truth_solve.residual, "rho": rho.get(1.0), "bptt": bptt_cosine}


# ---------------------------------------------------------------------------------------------------------------------
# Run helpers: what loses somebody's work when it is wrong, so it stands once for all scripts
# ---------------------------------------------------------------------------------------------------------------------

def die(message: str, code: int = 2):
    """End the run with one clear line on stderr; exit code 2 is for wrong usage or input."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def flag_checks(parser):
    """(refuse, check) for an argparse.ArgumentParser: each ends the run with its usage, one line and exit code 2.

    refuse(wrong, message): if `wrong`.  check(args, names, ok, must): if ok(x) is false for the value x of one of the
    flags, or for an entry of its list; `names` are their destinations, separated by blanks, `must` what x must be.
    """
    def refuse(wrong, message):
        if wrong:
            parser.error(message)

    def check(args, names, ok, must):
        for name in names.split():
            value = getattr(args, name)
            refuse(not all(map(ok, value if isinstance(value, list) else [value])),
                   f"--{name.replace('_', '-')} {must}, got {value}")

    return refuse, check


def check_run_flags(args, refuse: Callable):
    """Refuses flags of --out, --resume, torchrun and, in scripts with it, --init and --cuda-graph that do not fit."""
    refuse(args.resume == "auto" and not args.out, "--resume auto continues the training in --out DIR")
    refuse(int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not args.eval and not (
        args.out and args.resume == "auto"),
        "torchrun --max-restarts needs --out DIR --resume auto: a restarted job must find its checkpoint")
    for flag in ("resume", "init"):                     # now, and not when the data has been read
        path = getattr(args, flag, None)
        refuse(path not in (None, "auto") and not os.path.exists(path), f"--{flag}: there is no file {path}")
    if getattr(args, "cuda_graph", False):
        refuse(args.tol or "anderson" in (args.solver, args.backward_solver) or args.sync_bn, "--cuda-graph needs "
               "--tol 0, and neither anderson nor --sync-bn: a graph cannot wait for an answer")
        refuse(getattr(args, "accumulate", 1) > 1,
               "--cuda-graph needs --accumulate 1: a graph's gradients overwrite those of the micro-batch before")
        refuse(not torch.cuda.is_available(), "--cuda-graph needs a GPU")


class Process(NamedTuple):
    """This process's place in the run."""
    rank: int
    world_size: int
    device: torch.device


def launched() -> bool:
    """Whether torchrun has started this process, or what sets its environment.  (Some platforms set RANK=0 alone.)"""
    return "RANK" in os.environ and ("LOCAL_RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1")


def line_by_line():
    """A log file shows each line when it is printed, in UTF-8; a terminal shows a letter that it lacks as "?"."""
    with contextlib.suppress(AttributeError):           # a notebook's stream
        sys.stdout.reconfigure(line_buffering=True, errors="replace",
                               encoding=None if sys.stdout.isatty() else "utf-8")


def init_process() -> Process:
    """Process group from torchrun's environment: nccl on GPUs, gloo on CPUs, nothing for a single process."""
    missing = [name for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if launched() and missing:
        die(f"the environment has RANK, but not {', '.join(missing)}: start the script with torchrun, or set RANK, "
            "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for every process")
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        die("torchrun --max-restarts: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, and give it "
            "--standalone or --rdzv-backend=c10d; else a restarted job is given the addresses of the dead processes "
            "(github.com/pytorch/pytorch/issues/167288)")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            die(f"--nproc_per_node: process {local_rank} has no GPU, this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    if not launched():
        return Process(0, 1, device)
    if device.type == "cuda":
        # gloo's own timeout: of nccl's, 10 minutes, a download that the other processes wait for may take more
        dist.init_process_group("nccl", device_id=device, timeout=datetime.timedelta(minutes=30))
    else:
        dist.init_process_group("gloo")
    return Process(dist.get_rank(), dist.get_world_size(), device)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over all processes, in place; x itself for a single process."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather_objects(value) -> list:
    """[the value of each process], by rank, for anything that can be pickled; all processes must call it.

    Of several processes the tensors come back on the CPU.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    file, values = io.BytesIO(), [None] * dist.get_world_size()
    torch.save(value, file)
    dist.all_gather_object(values, file.getvalue())     # of bytes: a tensor would come back on the GPU of its sender
    return [torch.load(io.BytesIO(v), map_location="cpu", weights_only=False) for v in values]


def first_then_others(make: Callable, process: Process):
    """make() on the first process of each machine, then on the others, which find on the disk what it has left there.

    If it ends the run (`die`) on one process, all end with exit code 2, and only that one has printed.
    """
    for turn in (True, False):
        code = torch.zeros((), device=process.device)
        if (int(os.environ.get("LOCAL_RANK", 0)) == 0) == turn:
            try:
                result = make()
            except SystemExit:
                code += 1
        if all_reduce_sum(code) > 0:            # the others wait here
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()    # a process that ends while its gloo group exists may abort
            raise SystemExit(2)
    return result


def seed_everything(seed: int):
    """Seeds torch (all devices) and Python's random.  Seed alike before the model is built, then with seed + rank."""
    torch.manual_seed(seed)
    random.seed(seed)


def rng_state() -> dict:
    """The state of the generators that `seed_everything` seeds: Python's and torch's, of this process's GPU alone."""
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def rng_states() -> list[dict]:
    """`rng_state` of every process, by rank, for a checkpoint; all processes must call it."""
    return gather_objects(rng_state())


def set_rng_state(state: dict):
    """Puts back what `rng_state` has returned."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def set_rng_states(states: list[dict], process: Process):
    """Puts back what `rng_states` has returned; with another number of processes the seeds stay, with a note."""
    if len(states) == process.world_size:
        set_rng_state(states[process.rank])
    elif process.rank == 0:
        print(f"note: the checkpoint is of {len(states)} process(es): dropout and augmentation are seeded anew",
              flush=True)


def note_differences(saved: dict, args, names: str):
    """Says, on the first process, which of these flags, separated by blanks, had another value in training."""
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    for name in names.split() if first else ():
        if saved.get(name) != getattr(args, name):
            print(f"note: trained with --{name.replace('_', '-')} {saved.get(name)}, evaluated with "
                  f"{getattr(args, name)}", file=sys.stderr, flush=True)


def load_weights(model, state: dict, load_official: Callable, what: str):
    """Strictly, from a checkpoint of ours, or from another release's by load_official(model, state).

    Where they do not fit, `what` begins the line that ends the run.
    """
    try:
        model.load_state_dict(state["model"]) if is_ours(state) else load_official(model, state)
    except (ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        die(f"{what}: {' '.join(str(error).split())[:400]}")


def choose_out(args, name: str):
    """Sets --out where it is not given: the folder of --resume, or runs/NAME-TIME-PID; all processes must call it."""
    if not args.out and args.resume:
        args.out = str(Path(args.resume).parent)
    elif not args.out:
        args.out = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    args.out = gather_objects(args.out)[0]              # time and process differ from process to process


def open_run(out: str | os.PathLike, resume: str | None) -> tuple[Path, str | None]:
    """(the checkpoint of the run in --out, the file to continue from or None), from --out and --resume.

    Ends the run if `out` holds one that is not to be continued, so that none is overwritten.  If the checkpoint is
    gone, the one before it counts.  All processes must call it.
    """
    checkpoint = Path(out) / "checkpoint.pt"
    kept = [path for path in (checkpoint, checkpoint.with_name("checkpoint.pt.previous")) if os.path.exists(path)]
    here = gather_objects(bool(kept))
    if any(here) != all(here):
        die(f"--out {out}: {checkpoint.name} is there for {sum(here)} of {len(here)} processes; all machines must see "
            "one and the same folder")
    if resume == "auto":
        resume = str(kept[0]) if kept else None
        if kept and kept[0] != checkpoint and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
            print(f"warning: {checkpoint} is gone; continues from {kept[0].name}", file=sys.stderr, flush=True)
    if kept and not (resume and Path(resume).resolve().parent == checkpoint.resolve().parent):
        die(f"--out {out} already holds a run: continue it with --resume auto, or choose another folder")
    return checkpoint, resume


def own_folder(out: str | os.PathLike):
    """Makes the folder --out this process's own until it ends or is killed; ends the run if another process has it."""
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        die(f"--out {out}: cannot make this folder ({error.strerror})")
    try:
        import fcntl            # Windows has none
        # Never closed: the system takes the lock back when the process ends.
        fcntl.lockf(os.open(Path(out) / ".lock", os.O_RDWR | os.O_CREAT, 0o666), fcntl.LOCK_EX | fcntl.LOCK_NB)
        for rest in (*Path(out).glob("*.pt.*.new"), *Path(out).glob("*.pt.*.old")):     # of a run killed while saving
            rest.unlink(missing_ok=True)
    except ImportError:
        return
    except (BlockingIOError, PermissionError) as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES) or not os.access(out, os.W_OK):
            die(f"--out {out}: cannot write in this folder ({error.strerror})")
        die(f"--out {out}: another run is writing there; wait for its end, or choose another folder")
    except OSError as error:                            # a file system without locks
        print(f"note: --out {out} cannot be locked against a second run ({error.strerror})", flush=True)


def save_checkpoint(path: str | os.PathLike, state: dict):
    """Writes `state`; `path` is a complete checkpoint at every moment, and the one before stays as `path`.previous.

    Where it cannot be written (a full disk, no permission), both stay as they are and the run ends with exit code 1.
    """
    path = Path(path)
    new, old, previous = (path.with_name(path.name + end) for end in (
        f".{os.getpid()}.new", f".{os.getpid()}.old", ".previous"))         # two writers would mix one file's bytes
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
            os.replace(old, previous)
    except (OSError, RuntimeError) as error:            # torch.save turns a full disk into a RuntimeError
        for rest in (new, old):                         # half a file, on a disk that may be full
            with contextlib.suppress(OSError):
                rest.unlink(missing_ok=True)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        die(f"--out: cannot write {path}.new ({reason}); what was saved before is untouched", code=1)


def load_checkpoint(path: str | os.PathLike, flag: str = "--resume") -> dict:
    """Reads a checkpoint onto the CPU, tensors and plain values only; names a broken file and uses the previous one.

    flag: what the user gave the path with, for the messages.
    """
    path = Path(path)
    if not os.path.isfile(path):            # unlike Path.is_file, False also where a folder may not be entered
        die(f"{flag}: {path} is a folder; give a file in it, as {path / 'checkpoint.pt'}" if os.path.isdir(path) else
            f"{flag}: there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        die(f"{flag}: cannot read {path} ({error.strerror})")
    except Exception as error:          # torch.load raises half a dozen types for a file that is cut short
        could_run_code = "Unsupported global" in str(error)
        reason = (str(error).splitlines() or [""])[0]
        if could_run_code:
            reason = "it holds more than tensors and plain values"
        elif not reason or "weights" in reason.lower():        # torch advises to load it in a way that could run code
            reason = type(error).__name__
    previous = path.with_name(path.name + ".previous")
    with contextlib.suppress(Exception):
        state = torch.load(previous, map_location="cpu", weights_only=True)
        print(f"warning: {path} is damaged or not a checkpoint ({reason}); using {previous}", file=sys.stderr,
              flush=True)
        return state
    if could_run_code:
        die(f"{flag}: {path} holds more than tensors and plain values, which could run code.  If you trust it, "
            f"convert it: x = torch.load('{path}', weights_only=False); torch.save(x.state_dict(), 'converted.pt'), or "
            "x['state_dict'] where x is not the model itself")
    die(f"{flag}: {path} is damaged or not a checkpoint ({reason}), and no usable {previous.name} is beside it")


def is_ours(state) -> bool:
    """Whether a checkpoint was written by one of these scripts, with the run's flags, and not by another release."""
    return isinstance(state, dict) and isinstance(state.get("args"), dict)


def check_same_run(path, saved: dict, args, free, flag: str = "--resume",
                   remedy: str = "use the same flags, or start afresh with another --out"):
    """Ends the run where the flags `saved` in a checkpoint of ours differ from `args`, those in `free` set aside."""
    unknown = [name for name in saved if not hasattr(args, name)]
    if unknown:
        die(f"{flag} {path} is of another script, or of another version of this one: there is no "
            f"--{unknown[0].replace('_', '-')} here")
    missing = [name for name in vars(args) if name not in saved and name not in free]
    if missing:
        die(f"{flag} {path} is of another version of this script, which had no --{missing[0].replace('_', '-')}")
    differ = [f"--{name.replace('_', '-')} {value} (here {getattr(args, name)})"
              for name, value in saved.items() if name not in free and value != getattr(args, name)]
    if differ:
        die(f"{flag} {path} is of a run with {', '.join(differ)}; {remedy}")


class SaveTimer:
    """Says when to save: every `minutes`, and as soon as one process was sent SIGTERM, which also ends the run.

    SIGTERM is what a cluster sends some seconds before it kills a job; without this the work since the last
    checkpoint is lost.  Takes over the process's SIGTERM.  Inside `saved()` a process that is sent it ends at once,
    without telling the others: SIGTERM must go to all, as from clusters and torchrun.
    """

    def __init__(self, minutes: float):
        self.minutes, self.last = minutes, time.monotonic()
        self.group = None
        if dist.is_available() and dist.is_initialized():
            self.group = dist.new_group(backend="gloo")         # between the hosts: a GPU is not waited for
        self.sigterm = sigterm = types.SimpleNamespace(came=False, nothing_to_lose=False)

        def note(*_):       # does not hold self: a process that ends while its gloo group still exists may crash then
            sigterm.came = True
            if sigterm.nothing_to_lose:
                print("SIGTERM: ends here, all is saved", file=sys.stderr, flush=True)
                raise SystemExit(0)

        signal.signal(signal.SIGTERM, note)

    def poll(self) -> tuple[bool, bool]:
        """(save now, then stop): the same answer on all processes, which must all call it, after every step."""
        wishes = torch.tensor([time.monotonic() - self.last >= 60 * self.minutes, self.sigterm.came], dtype=torch.int32)
        if self.group is not None:
            dist.all_reduce(wishes, op=dist.ReduceOp.MAX, group=self.group)
        due, stop = (bool(wish) for wish in wishes.tolist())
        if due or stop:
            self.last = time.monotonic()
        return due or stop, stop

    @contextlib.contextmanager
    def saved(self):
        """While all is saved and `poll` is not called, as in an evaluation: SIGTERM ends the process, with code 0."""
        self.sigterm.nothing_to_lose = True
        if self.sigterm.came:               # since the last poll
            raise SystemExit(0)
        try:
            yield
        finally:
            self.sigterm.nothing_to_lose = False


def finite(value):
    """The value with null for every number that is not finite, at any depth: JSON has neither NaN nor Infinity."""
    if isinstance(value, dict):
        return {name: finite(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """Appends one JSON object per line to `path`, in a folder that it makes.

    A resumed run drops what it will repeat: records with step > last_step; last_step_of, as {"epoch": 500}, gives
    another limit for an event.
    """

    def __init__(self, path: str | os.PathLike, last_step: int | None = None, last_step_of: dict | None = None):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            die(f"--out {self.path.parent}: cannot make this folder ({error.strerror})")
        if last_step is not None and os.path.exists(self.path):
            kept = []
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):         # a killed run may leave half a line
                    record = json.loads(line)
                    if record.get("step", 0) <= (last_step_of or {}).get(record.get("event"), last_step):
                        kept.append(line + "\n")
            new = self.path.with_name(self.path.name + ".new")
            try:
                new.write_text("".join(kept))
                os.replace(new, self.path)
            except OSError as error:
                die(f"--out: cannot write {new} ({error.strerror})", code=1)

    def write(self, **record):
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(finite(record)) + "\n")
        except OSError as error:
            die(f"--out: cannot write {self.path} ({error.strerror})", code=1)


def start_log(args, process: Process, step: int, parameters: int, about_run: str, last_step_of: dict | None = None,
              steps: float = math.inf) -> MetricsLog | None:
    """The log of the run in --out, after its start has been noted and printed; None on all processes but the first.

    steps: of the whole run; if the warm-up or --pretrain-steps take all of them, that is printed too.
    """
    if process.rank > 0:
        return None
    own_folder(args.out)
    if getattr(args, "warmup_steps", 0) >= steps:
        about_run += f"; the learning rate never reaches --lr: lower --warmup-steps {args.warmup_steps}"
    if getattr(args, "pretrain_steps", 0) >= steps:
        about_run += f"; all steps are pretraining, without a solver: lower --pretrain-steps {args.pretrain_steps}"
    log = MetricsLog(Path(args.out) / "metrics.jsonl", step, last_step_of)
    about = describe_run(process.device, process.world_size)
    log.write(event="start", step=step, parameters=parameters, args=vars(args), **about)
    print(f"{about['command']}\n{about['device']} x {process.world_size}, torch {about['torch']}, commit "
          f"{about['commit']}; writing to {args.out}\n{about_run}"
          + (f"; continues after step {step}" if step else ""), flush=True)
    return log


class TrainingPass(torch.nn.Module):
    """A model's training pass from tensors to tensors, as CUDA graphs need it: x -> (output, residual (N,) or None).

    model(x, unroll=..., with_result=True, on_backward=...) returns (output, SolverResult or None).  What its backward
    solve, if it has one, ends at is left in backward_residual (N,).  batch: the largest N.
    """

    def __init__(self, model: torch.nn.Module, batch: int, device: torch.device):
        super().__init__()
        self.model, self.backward_residual = model, torch.full((batch,), math.nan, device=device)

    def forward(self, x, unroll=0):
        output, result = self.model(x, unroll=unroll, with_result=True, on_backward=self.note)
        return output, None if result is None else result.residual

    def note(self, result):
        self.backward_residual[:len(result.residual)].copy_(result.residual)


def reset_peak_memory(device: torch.device):
    """Starts a new measurement of `peak_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")           # Linux: forget the peak of the resident set


def peak_memory(device: torch.device) -> float:
    """Peak GB since `reset_peak_memory`: allocated on a GPU; on a CPU the resident set (Linux; nan elsewhere)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if os.access("/proc/self/clear_refs", os.W_OK):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024 / 1e9
    return math.nan


def clock(device: torch.device) -> float:
    """Seconds, when `device` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed_step(forward: Callable, finish: Callable, device: torch.device) -> list[float]:
    """[ms of forward(), which returns the loss, ms of its backward pass, ms of both and finish(), peak GB]."""
    reset_peak_memory(device)
    times = [clock(device)]
    loss = forward()
    times.append(clock(device))
    loss.backward()
    times.append(clock(device))
    finish()
    times.append(clock(device))
    start, after_forward, after_backward, end = times
    return [1e3 * (after_forward - start), 1e3 * (after_backward - after_forward), 1e3 * (end - start),
            peak_memory(device)]


def medians_in_turns(measures: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """{name: the medians of the numbers that measures[name]() returns}, all called in turns.

    A machine that is slow for a while is so for all of them.  A first turn does not count: warm-up, compilation.
    """
    found = {name: [] for name in measures}
    for turn in range(repeats + 1):
        for name, measure in measures.items():
            numbers = measure()
            if turn > 0:
                found[name].append(numbers)
    return {name: [statistics.median(column) for column in zip(*rows)] for name, rows in found.items()}


def solver_overhead(solve: Callable, f: Callable, h0: State, device: torch.device) -> tuple[float, float]:
    """(time of solve(f, h0) / that of its calls of f alone, ms per call of f); 1 is a solver that costs nothing."""
    with torch.no_grad():
        start = clock(device)
        result = solve(f, h0)
        solved = clock(device)
        for _ in range(result.n_evals):
            f(result.h)
        seconds = clock(device) - solved
    return (solved - start) / seconds, 1e3 * seconds / result.n_evals


class Meter:
    """Running means, throughput, peak memory.  `add` costs no synchronisation; `read` costs one, and starts afresh.

    The means and the throughput are of all processes, which must all call `read`, with values of the same names.
    """

    def __init__(self, device: torch.device):
        self.device = device
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

    def read(self) -> dict:
        """Means of the values, ms per step, samples per second, and this process's peak GPU memory (GB)."""
        counts = torch.tensor([*self.counts.values(), self.samples], dtype=torch.float64, device=self.device)
        totals = all_reduce_sum(torch.stack([x.double() for x in (*self.sums.values(), *counts)])).tolist()  # host sync
        seconds, n = time.perf_counter() - self.start, len(self.sums)
        record = {name: total / count for name, total, count in zip(self.sums, totals, totals[n:])}
        record["ms_per_step"] = 1e3 * seconds / max(1, self.steps)
        record["samples_per_s"] = totals[-1] / seconds
        if self.device.type == "cuda":
            record["peak_gb"] = peak_memory(self.device)
        self.reset()
        return record


def what_broke(loss: float, parameters=()) -> str:
    """What is not a finite number, the loss or a parameter, or "".  The loss shows a broken weight one step late."""
    if not math.isfinite(loss):
        return f"the loss became {loss}"
    finite = [p.isfinite().all() for p in parameters]
    return "a weight became infinite or not a number" if finite and not torch.stack(finite).all() else ""   # host sync


def health(name: str, residuals: list[Tensor], tol: float, alone: bool = False) -> dict:
    """{NAME_residual_p10, _p50, _p90: quantiles of the residuals of many solves, NAME_solved, NAME_above_0.1: shares}.

    Solved: to tol, or to 1e-3 where tol is 0.  Of all processes, which must all call it, or of this one `alone`.  {}
    where there was no solve.
    """
    own = torch.cat(residuals).float().cpu() if residuals else torch.empty(0)
    r = torch.cat([own] if alone else gather_objects(own)).sort().values    # torch.quantile: 16 million numbers at most
    if len(r) == 0:
        return {}
    return {**{f"{name}_residual_p{p}": r[round(p / 100 * (len(r) - 1))].item() for p in (10, 50, 90)},
            f"{name}_solved": (r <= (tol or 1e-3)).float().mean().item(),
            f"{name}_above_0.1": (r > 0.1).float().mean().item()}


def spell_health(record: dict, *names: str) -> str:
    """What `health` found of each name, on one line."""
    return "relative residual (10, 50, 90 %) and share solved: " + "; ".join(
        "{} {:.0e} {:.0e} {:.0e}, {:.0f} %".format(
            name, *(record[f"{name}_residual_p{p}"] for p in (10, 50, 90)), 100 * record[f"{name}_solved"])
        for name in names if f"{name}_solved" in record)


def describe_run(device: torch.device, world_size: int) -> dict:
    """What a reader of a log needs to repeat the run: command line, commit, torch version, device, processes."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
                                capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    threads = torch.get_num_threads()
    name = (torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"CPU, {threads} thread{'s' * (threads > 1)}")
    return {"command": shlex.join(sys.argv), "commit": commit, "torch": torch.__version__, "device": name,
            "processes": world_size}
