#!/usr/bin/env bash
# torch 2.14.1, nn.TransformerEncoderLayer (batch_first, relu or gelu) in eval mode without gradients.
# Expected: after `layer.norm1 = layer.norm2 = nn.RMSNorm(d)` (the block of HRM and TRM), or with another class as
#   `linear1` (a low-rank adapter), the layer computes one function, with and without gradients.
# Seen: with RMSNorm training works and evaluation raises AttributeError. With the adapter nothing is raised:
#   the fused path reads only `linear1.weight` and `linear1.bias`, so that the adapter is missing from the result.
# Why it matters: an implicit model solves without gradients and evaluates once more with them. In eval mode these are
#   then two functions, and the fixed point of one has a large residual in the other.
# Instead: torch.backends.mha.set_fastpath_enabled(False), or give the activation as a lambda.
# Source: torch/nn/modules/transformer.py, TransformerEncoderLayer.forward. The documentation's list under "Fast path"
#   does not say that the parts must be of the original classes. Hooks had the same problem: pytorch issue 128413.
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

print("torch", torch.__version__)


class Adapted(nn.Linear):
    """A frozen linear map and a low-rank one beside it."""
    def __init__(self, n, m):
        super().__init__(n, m)
        self.down, self.up = nn.Linear(n, 4, bias=False), nn.Linear(4, m, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


def outcome(layer, x, fast=True):
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.no_grad():
            return layer(x)
    except AttributeError as error:
        return f"AttributeError: {error}"
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def encoder(activation):
    return nn.TransformerEncoderLayer(32, 4, 64, dropout=0, activation=activation, batch_first=True)


def gap(a, b):
    return (a - b).abs().max().item() if torch.is_tensor(a) and torch.is_tensor(b) else float("nan")


torch.manual_seed(0)
x, as_stated = torch.randn(2, 5, 32), []
for name, activation in ("relu", "relu"), ("gelu", "gelu"), ("a lambda", lambda x: x.relu()):
    layer = encoder(activation)
    layer.norm1 = layer.norm2 = nn.RMSNorm(32)
    layer(x).square().mean().backward()
    train, seen, slow = outcome(layer.train(), x), outcome(layer.eval(), x), outcome(layer, x, fast=False)
    print(f"RMSNorm, {name}: eval expected to differ from training by 0, seen",
          seen if isinstance(seen, str) else gap(seen, train), f"and {gap(slow, train)} with the fast path off")
    as_stated += [gap(slow, train) < 1e-5, ("has no attribute 'bias'" in str(seen)) == (name != "a lambda")]

    layer = encoder(activation).eval()
    layer.linear1 = Adapted(32, 64)
    with_grad, seen, slow = layer(x).detach(), outcome(layer, x), outcome(layer, x, fast=False)
    nn.init.zeros_(layer.linear1.up.weight)
    unadapted = layer(x).detach()
    print(f"adapter, {name}: eval without gradients expected to differ from eval with them by 0, seen "
          f"{gap(seen, with_grad):.2g}, and {gap(slow, with_grad):.2g} with the fast path off (from a layer without "
          f"the adapter: {gap(seen, unadapted):.2g})")
    skipped = gap(seen, with_grad) > 0.01 and gap(seen, unadapted) < 1e-5
    as_stated += [gap(slow, with_grad) < 1e-5, skipped == (name != "a lambda")]
if not all(as_stated):
    sys.exit("CHANGED: eval no longer bypasses replaced parts as stated")
print("as stated: eval bypasses replaced parts, RMSNorm with an error, an adapter in silence")
EOF
