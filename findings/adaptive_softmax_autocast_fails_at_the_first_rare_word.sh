#!/usr/bin/env bash
# torch 2.14.1, nn.AdaptiveLogSoftmaxWithLoss under torch.autocast("cpu", torch.bfloat16), float32 hidden states.
# Expected: autocast takes any float32 module, and the loss is float32, as that of F.cross_entropy is.
# What happens: it runs as long as all targets are in the first cutoff, and raises a RuntimeError of index_copy_ in the
#   first batch with one rarer word. With bfloat16 states it runs, but each log-probability and the loss are bfloat16.
# Why it matters: word-level language models (WikiText-103) have this layer. A trial with frequent words passes, the run
#   stops later, and the obvious cure, to cast the states, makes the logged perplexities coarse (three digits).
# Do instead: call it within torch.autocast("cpu", enabled=False), with the states in float32.
# Source: torch/nn/modules/adaptive.py of 2.14.1, forward (output has the dtype of the input, index_copy_).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6 >&2
"$work/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
import torch.nn.functional as F
from torch import nn

print("torch", torch.__version__)
torch.manual_seed(0)
softmax = nn.AdaptiveLogSoftmaxWithLoss(64, 1000, cutoffs=[100, 400], div_value=2.0)
states = torch.randn(32, 64)
frequent = torch.randint(100, (32,))       # all in the first cutoff
rare = frequent.clone()
rare[3] = 777


def run(dtype, targets, enabled=True):
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        try:
            loss = softmax(states.to(dtype), targets).loss
            return f"{loss.item():.5f} in {str(loss.dtype)[6:]}"
        except RuntimeError as error:
            return f"RuntimeError: {error}"


with torch.autocast("cpu", torch.bfloat16):
    plain = F.cross_entropy(torch.randn(4, 9, dtype=torch.bfloat16), torch.arange(4)).dtype
print("expected: a float32 loss in every row, as F.cross_entropy gives", str(plain)[6:])
seen = {}
for dtype in (torch.float32, torch.bfloat16):
    for name, targets in (("frequent words", frequent), ("one rare word", rare)):
        seen[dtype, name] = run(dtype, targets)
        print(f"seen: {str(dtype)[6:]:8} states, {name:14}: {seen[dtype, name]}")
remedy = run(torch.float32, rare, enabled=False)
print("seen: float32 states, one rare word, autocast switched off around it:", remedy)
if plain == torch.float32 and "in float32" in seen[torch.float32, "frequent words"] \
        and "index_copy_" in seen[torch.float32, "one rare word"] \
        and "in bfloat16" in seen[torch.bfloat16, "one rare word"] and "in float32" in remedy:
    print("seen: the first rare word stops float32 states, and bfloat16 states get a bfloat16 loss")
else:
    sys.exit("CHANGED: the adaptive softmax behaves otherwise under CPU autocast")
PY
