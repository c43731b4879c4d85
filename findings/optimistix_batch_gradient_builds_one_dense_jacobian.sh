#!/usr/bin/env bash
# optimistix 0.1.0 (lineax 0.1.1, jax 0.10.2), gradient of fixed_point with its default ImplicitAdjoint.
# Expected: an implicit gradient costs vector-Jacobian products and O(batch * n) memory, as in the DEQ papers.
# What happens: the default linear solver builds the dense Jacobian of the whole state and factorises it. A batch
#   of B states of n numbers is one state of B * n numbers, so the matrix has (B n)^2 entries, nearly all of them 0.
# Why it matters: 64 samples of 1,000 numbers, small for a DEQ, ask for 16 GB in float32 in the backward pass,
#   while the forward pass needs a few MB. The answer is right, so that small tests show nothing.
# Do instead: jax.vmap over samples (B n^2), or ImplicitAdjoint(linear_solver=lineax.GMRES(rtol, atol)).
# Source: the shapes in the traced gradient, printed below.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q optimistix==0.1.0 lineax==0.1.1 jax==0.10.2 >&2
JAX_PLATFORMS=cpu "$work/venv/bin/python" -W ignore - <<'PY'
import math
import re
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx

print("jax", version("jax"), " optimistix", version("optimistix"), " lineax", version("lineax"))
B, n = 8, 50
W = 0.5 * jax.random.normal(jax.random.key(0), (n, n)) / math.sqrt(n)
x = jax.random.normal(jax.random.key(1), (B, n))


def gradient(adjoint, each=False):
    """The gradient with respect to W, and the entries of the largest array in its computation."""
    def solve(W, x):
        solver = optx.FixedPointIteration(rtol=1e-6, atol=1e-6)
        return optx.fixed_point(lambda z, args: jnp.tanh(z @ args[0].T + args[1]), solver, jnp.zeros_like(x), (W, x),
                                max_steps=500, adjoint=adjoint).value

    def loss(W):
        h = jax.vmap(solve, (None, 0))(W, x) if each else solve(W, x)
        return jnp.sum(h * h)

    shapes = re.findall(r"f32\[([\d,]+)\]", str(jax.make_jaxpr(jax.grad(loss))(W)))
    return jax.grad(loss)(W), max(math.prod(map(int, s.split(","))) for s in shapes)


krylov = lx.GMRES(rtol=1e-6, atol=1e-6)
usual, entries = gradient(optx.ImplicitAdjoint())
each, entries_each = gradient(optx.ImplicitAdjoint(), each=True)
free, entries_free = gradient(optx.ImplicitAdjoint(linear_solver=krylov))
print(f"a batch of {B} states of {n} numbers: the state has {B * n} entries, W has {n * n}")
print(f"expected: no array of more than {n * n} entries in the gradient")
print(f"seen: largest array {entries} entries by default, {entries_each} with vmap, {entries_free} with GMRES")
same = max(jnp.linalg.norm(g - usual) / jnp.linalg.norm(usual) for g in (each, free)) < 1e-4
if entries == (B * n) ** 2 and entries_each == B * n * n and entries_free == n * n and same:
    print("seen: the default builds the dense Jacobian of the whole batch, and the three gradients are equal")
else:
    sys.exit("CHANGED: optimistix no longer builds one dense Jacobian for the batch, or the remedies have changed")
PY
