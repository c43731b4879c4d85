#!/usr/bin/env bash
# torch_geometric 2.8.1, datasets.PPI (a folder of one's own in PPI's format, as GraphSAGE defines it).
# Expected: an edge joins the nodes that the file names.
# Seen: in a graph whose first node has no edge, all edges are moved to lower nodes. Features and labels stay where
#   they are, and the last node loses its edges. There is no message.
# Why it matters: IGNN and DEQ experiments on node classification, among them scaled-down or generated look-alikes
#   of PPI, then learn on a graph that is shifted against its features.
# Instead: give every graph an edge at its first node before writing (a self-loop will do, since the reader
#   removes it), or build torch_geometric.data.Data by hand.
# Source: process() in torch_geometric/datasets/ppi.py subtracts edge_index.min() instead of the number of the graph's
#   first node.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.14.1 torch-geometric==2.8.1
cd "$tmp"
"$tmp/venv/bin/python" -W ignore - <<'EOF'
import contextlib, io, json, os, sys
import numpy as np, torch, torch_geometric
from torch_geometric.datasets import PPI

print("torch", torch.__version__, " torch_geometric", torch_geometric.__version__)


def read(root, links):
    """The edges of both graphs (nodes 0 to 3 and 4 to 7 of the file) by the features of their ends."""
    os.makedirs(f"{root}/raw")
    graph = {"directed": False, "multigraph": False, "graph": {}, "nodes": [{"id": i} for i in range(8)],
             "links": [{"source": a, "target": b} for a, b in links]}
    for split in "train", "valid", "test":
        with open(f"{root}/raw/{split}_graph.json", "w") as f:
            json.dump(graph, f)
        np.save(f"{root}/raw/{split}_feats.npy", np.arange(8.0)[:, None])       # a node's feature is its number
        np.save(f"{root}/raw/{split}_labels.npy", np.eye(8))
        np.save(f"{root}/raw/{split}_graph_id.npy", np.array([1] * 4 + [2] * 4))
    with contextlib.redirect_stderr(io.StringIO()):
        dataset = PPI(root)
    return [sorted((int(a), int(b)) for a, b in data.x[data.edge_index.t()].squeeze(-1) if a < b) for data in dataset]


path = [(0, 1), (1, 2), (2, 3)]
expected = [path, [(5, 6), (6, 7)]]
seen = read("isolated", path + expected[1])
cured = read("cured", path + expected[1] + [(4, 4)])
print("expected, second graph (node 4 has no edge):", expected[1])
print("seen:                                       ", seen[1])
print("seen with a self-loop at node 4:            ", cured[1])
if (seen, cured) != ([path, [(4, 5), (5, 6)]], expected):
    sys.exit("CHANGED: the edges are no longer moved as stated")
print("as stated: the edges are moved down by one node")
EOF
