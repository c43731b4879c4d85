#!/usr/bin/env bash
# torch_geometric 2.8.1, a transform that changes the number of edges (T.ToUndirected) applied to a Batch.
# Expected: to_data_list and batch[i] give back the graphs with both directions of each edge. The batch itself is right,
#   message passing on it too, and batch.validate() is True.
# What happens: slices from before the transform cut the new, sorted edges. The first graph has lost edges, the others
#   have edges of their neighbours, with negative node numbers. Nothing is raised.
# Why it matters: equilibrium layers take batches apart to solve or pad each graph by itself. torch accepts x[-2], too.
# Do instead: transform before batching, or select edges by batch.batch[edge_index[0]] == i and subtract batch.ptr[i].
# Source: torch_geometric/data/separate.py of 2.8.1, _separate (slices and incs of the collation).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 torch_geometric==2.8.1 >&2
"$work/venv/bin/python" -W ignore - <<'PY'
import sys
from importlib.metadata import version

import torch
import torch_geometric.transforms as T
from torch_geometric.data import Batch, Data

print("torch", version("torch"), " torch_geometric", version("torch_geometric"))


def chain(n):
    return Data(x=torch.ones(n, 1), edge_index=torch.stack([torch.arange(n - 1), torch.arange(1, n)]))


both = T.ToUndirected()
sizes = (3, 4, 2)
expected = [both(chain(n)).edge_index.tolist() for n in sizes]
batch = both(Batch.from_data_list([chain(n) for n in sizes]))
seen = [graph.edge_index.tolist() for graph in batch.to_data_list()]
before = Batch.from_data_list([both(chain(n)) for n in sizes])

for i, (e, s) in enumerate(zip(expected, seen)):
    print(f"graph {i} of {sizes[i]} nodes: expected {e}")
    print(f"graph {i} of {sizes[i]} nodes: seen     {s}")
lowest = min(min(map(min, s)) for s in seen)
right = [graph.edge_index.tolist() for graph in before.to_data_list()] == expected
if batch.validate() and torch.equal(batch.edge_index, before.edge_index) and lowest < 0 and right:
    print("seen: the batch has the right edges and validates, its graphs have wrong ones and negative node numbers")
else:
    sys.exit("CHANGED: a Batch that was made undirected no longer unbatches to wrong graphs")
PY
