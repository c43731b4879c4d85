#!/usr/bin/env bash
# torch_geometric 2.8.1, GCNConv(add_self_loops=False), also gcn_norm and APPNP, on a directed graph.
# Expected: D^-1/2 A D^-1/2 rescales edges. A chain 0 -> 1 -> 2 -> ... carries a signal of node 0 one node per layer.
# What happens: D counts incoming edges only, on both sides of A. A node without incoming edges has degree 0, its
#   factor is set from infinity to 0, and every edge that leaves it gets weight 0. Nothing is raised or warned of.
# Why it matters: implicit graph networks are tested on chains whose only information is at the first node, and
#   they leave self loops out so that the norm of A stays known. The signal never enters the graph.
# Do instead: keep the self loops, or pass your own edge_weight with GCNConv(normalize=False).
# Source: torch_geometric/nn/conv/gcn_conv.py of 2.8.1, gcn_norm (deg of idx, masked_fill_ of inf).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 torch_geometric==2.8.1 >&2
"$work/venv/bin/python" -W ignore - <<'PY'
import sys
from importlib.metadata import version

import torch
from torch_geometric.nn import APPNP, GCNConv
from torch_geometric.nn.conv.gcn_conv import gcn_norm

print("torch", version("torch"), " torch_geometric", version("torch_geometric"))
n = 6
chain = torch.stack([torch.arange(n - 1), torch.arange(1, n)])     # 0 -> 1 -> ... -> 5
signal = torch.zeros(n, 1)
signal[0] = 1


def reached(**options):
    """Nodes with a signal after n - 1 layers that share one weight of 1."""
    layer = GCNConv(1, 1, bias=False, **options)
    torch.nn.init.ones_(layer.lin.weight)
    h, seen = signal, signal != 0
    for _ in range(n - 1):
        h = layer(h, chain)
        seen = seen | (h != 0)
    return int(seen.sum())


weights = gcn_norm(chain, None, n, add_self_loops=False)[1]
print("weights of the edges 0->1, 1->2, ... by gcn_norm without self loops:", weights.tolist())
loops, none, raw = reached(), reached(add_self_loops=False), reached(normalize=False)
appnp = APPNP(K=n - 1, alpha=0.1, add_self_loops=False)(signal, chain)
print(f"expected: the signal of node 0 is seen in {n} of {n} nodes")
print(f"seen: {loops} with self loops, {raw} with normalize=False, {none} with add_self_loops=False,"
      f" {int((appnp != 0).sum())} in APPNP(add_self_loops=False)")
if weights.tolist() == [0, 1, 1, 1, 1] and (loops, raw, none) == (n, n, 1) and (appnp != 0).sum() == 1:
    print("seen: the edge that leaves the first node has weight 0, the signal never leaves it")
else:
    sys.exit("CHANGED: gcn_norm no longer gives weight 0 to the edges that leave a node without incoming edges")
PY
