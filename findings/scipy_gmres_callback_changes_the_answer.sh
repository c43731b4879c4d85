#!/usr/bin/env bash
# scipy 1.17.1, scipy.sparse.linalg.gmres(A, b, maxiter=, callback=) as backward solver (I - J^T) w = g.
# Expected: a callback watches. The solution, the number of products and info are the same with and without it.
# What happens: without a callback maxiter counts restart cycles, of 20 products each by default. With a callback
#   and no callback_type it counts products, so that the budget is 20 times smaller as soon as the solve is logged.
# Why it matters: if you print the residual to find out whether the adjoint has converged, you get another
#   gradient. The same "maxiter=20" buys 400 products in one script and 20 in the other.
# Do instead: callback_type="pr_norm" (a number per product) or "x" (the iterate, per restart).
# Source: the documentation of gmres, callback_type "legacy". A DeprecationWarning speaks of callback_type only.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q scipy==1.17.1 numpy==2.4.6 >&2
"$work/venv/bin/python" -W ignore - <<'PY'
import sys

import numpy as np
import scipy
from scipy.sparse.linalg import LinearOperator, gmres

print("scipy", scipy.__version__, " numpy", np.__version__)
rng = np.random.default_rng(0)
n = 200
J = 0.95 * rng.standard_normal((n, n)) / np.sqrt(n)      # spectral radius about 0.95
g = rng.standard_normal(n)


def solve(**options):
    products = []

    def matvec(v):
        products.append(1)
        return v - J.T @ v

    w, info = gmres(LinearOperator((n, n), matvec, dtype=float), g, rtol=1e-6, maxiter=20, **options)
    residual = np.linalg.norm(w - J.T @ w - g) / np.linalg.norm(g)
    name = " and ".join(options) or "no callback"
    print(f"{name:28} info {info:2}  products {len(products):3}  residual {residual:.1e}")
    return info, len(products), residual


silent = solve()
logged = solve(callback=lambda r: None)
typed = solve(callback=lambda r: None, callback_type="pr_norm")
print("expected: the three rows agree")
if silent == typed and silent[0] == 0 and silent[2] < 1e-6 and logged[0] == 20 and logged[1] < 25 and logged[2] > 1e-2:
    print("seen: a callback alone turns a converged solve into an unconverged one")
else:
    sys.exit("CHANGED: a callback without callback_type no longer changes what maxiter of scipy's gmres counts")
PY
