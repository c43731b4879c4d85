#!/usr/bin/env bash
# torchdeq 0.1.0, get_deq(core="indexing", ift=True) with n_states or indexing (fixed-point correction).
# Expected: ift=True gives the last state the exact implicit gradient, and that state is the solver's solution.
# What happens: a solve that converges before the sampling steps are reached yields fewer states. The list of
#   states is then paired with the gradients from the front, so the last one is a phantom gradient of one step
#   and no backward solve is run. With indexing=[20] the returned state is that of step 20, not the solution.
# Why it matters: the better the solve, the more of the exact gradient is lost, and nothing says so.
# Do instead: core="sliced", or n_states=1, and count the backward solves with backward_writer.
# Source: torchdeq/core.py of 0.1.0, DEQIndexing.forward (zip of trajectory and produce_grad) and its docstring.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 torchdeq==0.1.0 numpy==2.4.6 >&2
"$work/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

import torch
from torchdeq import get_deq

print("torch", version("torch"), " torchdeq", version("torchdeq"))
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
W = torch.randn(6, 6)
W = (0.9 * W / torch.linalg.matrix_norm(W, 2)).requires_grad_()
b = torch.randn(1, 6)

h = torch.linalg.solve(torch.eye(6) - W, b[0])      # the fixed point of f(z) = W z + b, by a dense solve
exact = torch.autograd.grad(h.square().sum(), W)[0]


def error(**options):
    """Relative error of the gradient, error of the state, what the solver says, and the backward solves run."""
    backward_solves = []
    deq = get_deq(ift=True, f_max_iter=400, b_max_iter=400, f_tol=1e-10, b_tol=1e-12, **options).train()
    states, info = deq(lambda z: z @ W.T + b, torch.zeros(1, 6), backward_writer=backward_solves.append)
    z = states[-1]
    g = torch.autograd.grad(z.square().sum(), W)[0]
    row = ((g - exact).norm() / exact.norm()).item(), (z[0] - h).norm().item(), info["abs_lowest"].item()
    print(f"{str(options):45} states {len(states)}  gradient off by {row[0]:.1e}  state off by {row[1]:.1e}"
          f"  residual reported {row[2]:.1e}  backward solves {len(backward_solves)}")
    return row, len(backward_solves)


one, one_solves = error(core="indexing", n_states=1)
two, two_solves = error(core="indexing", n_states=2)
at20, at20_solves = error(core="indexing", indexing=[20])
sliced, _ = error(core="sliced", n_states=2)
print("expected: a gradient off by less than 1e-8 in every row, as ift=True in every row")
if max(one[0], sliced[0]) < 1e-8 and one_solves == 1 and two[0] > 0.1 and two_solves == 0 \
        and at20[0] > 0.1 and at20[1] > 1e4 * one[1] and at20_solves == 0:
    print("seen: with n_states=2 or indexing=[20] the implicit gradient is gone, and step 20 is returned as the state")
else:
    sys.exit("CHANGED: an early stop no longer drops the implicit gradient of torchdeq's indexing core")
PY
