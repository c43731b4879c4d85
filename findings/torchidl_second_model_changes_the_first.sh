#!/usr/bin/env bash
# torchidl 0.0.4, ImplicitModel(kappa=, mitr=, tol=, grad_mitr=, grad_tol=).
# Expected: kappa (the bound on ||A||_inf), the iterations and the tolerances belong to the model they are given to.
# What happens: they are stored on the class of the implicit function. Whoever makes a second model, even of
#   another size and never run, changes what the first one computes. Its weights and its state_dict are as before.
# Why it matters: a table of several settings made in one process measures the setting of the last model made,
#   and a loaded model answers by the settings of whatever was built after it.
# Do instead: give each model its own subclass, ImplicitModel(f=type("F", (ImplicitFunctionInf,), {})).
# Source: torchidl/implicit_function.py of 0.0.4, ImplicitFunction.set_parameters (a classmethod).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 torchidl==0.0.4 >&2
"$work/venv/bin/python" -W ignore - <<'PY'
import sys
from importlib.metadata import version

import torch
from torchidl import ImplicitModel
from torchidl.implicit_function import ImplicitFunctionInf

print("torch", version("torch"), " torchidl", version("torchidl"))
torch.manual_seed(0)
x = torch.randn(5, 8)


def change(own_class):
    """How far the first model's answer moves, relatively, when a second model is made."""
    def f():
        return type("F", (ImplicitFunctionInf,), {}) if own_class else ImplicitFunctionInf

    first = ImplicitModel(8, 4, 16, f=f(), kappa=0.9)
    with torch.no_grad():
        first.A.mul_(8)                       # ||A||_inf is above kappa, so that the bound is at work
    before = first(x)
    weights = [p.detach().clone() for p in first.parameters()]
    ImplicitModel(3, 2, 5, f=f(), kappa=0.1)  # made and thrown away
    after = first(x)
    assert all(torch.equal(p, q) for p, q in zip(weights, first.parameters()))
    return ((after - before).norm() / before.norm()).item()


shared, apart = change(own_class=False), change(own_class=True)
print("expected: the first model's answer moves by 0 when a second model is made")
print(f"seen: it moves by {100 * shared:.1f} %, and by {100 * apart:.1f} % where each model has its own subclass")
if shared > 0.01 and apart == 0:
    print("seen: the second model's kappa is in force in the first one")
else:
    sys.exit("CHANGED: a second model of torchidl no longer changes the first one, or the remedy has stopped working")
PY
