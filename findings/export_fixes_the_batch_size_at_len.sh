#!/usr/bin/env bash
# torch 2.14.1, torch.export.export with a batch dimension that is to stay open.
# Expected: `len(x)` and `x.shape[0]` are the same number and export alike.
# Seen: `len(x)` fixes the batch to that of the example. With Dim.DYNAMIC that is an error. With Dim.AUTO there
#   is no message, but the exported program refuses every other batch size. With strict=True both stay open.
# Why it matters: solvers and norms per sample are written with one row per sample, as in `x.reshape(len(x), -1)`,
#   and a single such line in the layer is enough.
# Instead: write `x.shape[0]` or `x.flatten(1)`, or export with strict=True.
# Source: Python turns what `__len__` returns into an int, so that export without strict (the default), which runs the
#   code, has to settle the number. `x.shape[0]` hands out the symbol.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.14.1
cd "$tmp"
"$tmp/venv/bin/python" -W ignore - <<'EOF'
import sys
import torch
from torch import nn
from torch.export import Dim, export

print("torch", torch.__version__)


class ByLen(nn.Module):
    def forward(self, x):
        return x / x.reshape(len(x), -1).norm(dim=1)[:, None, None]


class ByShape(nn.Module):
    def forward(self, x):
        return x / x.reshape(x.shape[0], -1).norm(dim=1)[:, None, None]


def outcome(model, dim, strict=False):
    try:
        program = export(model(), (torch.randn(4, 3, 5),), dynamic_shapes=({0: dim},), strict=strict)
    except Exception as error:
        return f"not exported, {type(error).__name__}"
    try:
        return "runs" if program.module()(torch.randn(7, 3, 5)).shape[0] == 7 else "another shape"
    except Exception as error:
        return f"exported, then refuses 7 samples, {type(error).__name__}"


seen = {(model.__name__, name, strict): outcome(model, dim, strict) for model in (ByLen, ByShape)
        for name, dim in (("Dim.DYNAMIC", Dim.DYNAMIC), ("Dim.AUTO", Dim.AUTO)) for strict in (False, True)}
print("expected: a program exported with 4 samples runs with 7, in all eight cases")
for (model, dim, strict), what in seen.items():
    print(f"seen, {model:<7} {dim:<11} strict={strict!s:<5}: {what}")
stated = {key: "runs" for key in seen}
for dim, start in ("Dim.DYNAMIC", "not exported"), ("Dim.AUTO", "exported, then refuses"):
    stated["ByLen", dim, False] = start
if not all(seen[key].startswith(stated[key]) for key in seen):
    sys.exit("CHANGED: len(x) no longer fixes the batch size as stated")
print("as stated: len(x) fixes the batch size, x.shape[0] does not")
EOF
