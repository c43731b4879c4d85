#!/usr/bin/env bash
# torch 2.14.1, torch.utils.flop_counter.FlopCounterMode on the sparse product A X of an implicit graph network.
# Expected: the count is that of the work, here 2 * nnz(A) * d, or at worst says that the operator is not known.
# What happens: A @ X is counted as if A were dense. torch.sparse.mm(A, X), the same product bit for bit, is counted
#   as 0, and so is A @ x with a vector, which power iterations and Jacobian-vector products do.
# Why it matters: tables of graph and equilibrium models report FLOPs. How the product is written decides whether it
#   counts as nothing or, here, 200 times too much. A solver that is called 30 times multiplies the error.
# Do instead: count sparse products by hand, or register_flop_formula for aten._sparse_addmm and aten.mv.
# Source: torch/utils/flop_counter.py of 2.14.1, flop_registry (aten.mm by shapes, no aten._sparse_addmm, no aten.mv).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6 >&2
"$work/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

print("torch", torch.__version__)
torch.manual_seed(0)
n, d, degree = 1000, 16, 5
rows = torch.arange(n).repeat_interleave(degree)
edges = torch.stack([rows, torch.randint(n, (n * degree,))])
A = torch.sparse_coo_tensor(edges, torch.rand(n * degree), (n, n)).coalesce()
X = torch.randn(n, d)
work = 2 * A.values().numel() * d


def flops(product):
    with FlopCounterMode(display=False) as counter:
        result = product()
    return counter.get_total_flops(), result


at, by_at = flops(lambda: A @ X)
mm, by_mm = flops(lambda: torch.sparse.mm(A, X))
csr, by_csr = flops(lambda: A.to_sparse_csr() @ X)
mv, _ = flops(lambda: A.to_dense() @ X[:, 0])
print(f"expected: {work} FLOP for A X, and {2 * n * n} for a dense matrix times a vector")
print(f"seen: {at} for A @ X, {csr} for the same in CSR, {mm} for torch.sparse.mm(A, X), {mv} for a dense A @ x")
if torch.equal(by_at, by_mm) and torch.allclose(by_at, by_csr, atol=1e-5) and at == csr == 2 * n * n * d > 100 * work \
        and mm == 0 and mv == 0:
    print(f"seen: one product is counted as {at // work} times its work or as nothing, by its spelling")
else:
    sys.exit("CHANGED: FlopCounterMode counts sparse products or matrix-vector products otherwise")
PY
