#!/usr/bin/env bash
# torchdeq 0.1.0, sradius_mode=True (power_method), the number that DEQ papers plot as "spectral radius".
# Expected: info["sradius"] is the largest |eigenvalue| of J at the fixed point, as the documentation says.
# What happens: it is |v^T J v| / |v|^2 after 100 products. If a complex pair r e^(+-i t) dominates, which is
#   common, v keeps turning. For a scaled rotation the number is r |cos t| exactly, 0 at 90 degrees.
# Why it matters: a map that is unstable (r = 1.5) reads as safely contractive (0.75), and the reading does not
#   settle with more iterations. Fixed-point iteration diverges there.
# Do instead: the growth of the norm over many products, (||J^k v|| / ||v||)^(1/k), or scipy.sparse.linalg.eigs.
# Source: torchdeq/loss/jacobian.py of 0.1.0, power_method, and the docstring of SolverStat ("sradius").
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 torchdeq==0.1.0 numpy==2.4.6 >&2
"$work/venv/bin/python" - <<'PY'
import math
import sys
from importlib.metadata import version

import torch
from torchdeq import get_deq

print("torch", version("torch"), " torchdeq", version("torchdeq"))
torch.set_default_dtype(torch.float64)


def reading(J, seed):
    """The spectral radius that torchdeq reports at the fixed point of f(z) = J z + b, where the solver starts."""
    torch.manual_seed(seed)
    b = torch.randn(len(J))
    h = torch.linalg.solve(torch.eye(len(J)) - J, b)
    _, info = get_deq(f_max_iter=1).eval()(lambda z: z @ J.T + b, h[None], sradius_mode=True)
    assert info["abs_lowest"].item() < 1e-10
    return info["sradius"].item()


def growth(J, k=2000):
    v = torch.ones(len(J)) / math.sqrt(len(J))
    log = 0.0
    for _ in range(k):
        v = J.T @ v
        log += v.norm().log().item()
        v = v / v.norm()
    return math.exp(log / k)


ok = True
for degrees in (0, 60, 90):
    t = math.radians(degrees)
    J = 1.5 * torch.tensor([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]])
    r = reading(J, 0)
    print(f"1.5 times a rotation by {degrees:2} degrees: expected 1.50, seen {r:.2f},"
          f" by growth of the norm {growth(J):.2f}")
    ok = ok and abs(r - 1.5 * math.cos(t)) < 1e-6 and abs(growth(J) - 1.5) < 1e-6

torch.manual_seed(1)
J = torch.randn(50, 50)
J = 1.2 * J / torch.linalg.eigvals(J).abs().max()
readings = sorted(reading(J, seed) for seed in range(10))
print(f"random J of 50 numbers: expected 1.20 from each of 10 starts, seen {readings[0]:.2f} to {readings[-1]:.2f},"
      f" by growth of the norm {growth(J):.2f}")
if ok and readings[0] < 0.9 and readings[-1] < 1.19 and abs(growth(J) - 1.2) < 0.01:
    print("seen: unstable maps read as contractive")
else:
    sys.exit("CHANGED: torchdeq's spectral radius is no longer the Rayleigh quotient")
PY
