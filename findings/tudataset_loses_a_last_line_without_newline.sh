#!/usr/bin/env bash
# torch_geometric 2.8.1, datasets.TUDataset (the reader of COX2, PROTEINS and of any folder in their format).
# Expected: a text file means the same with and without a newline after its last line.
# Seen: without it the last line is not read. If that is an edge, it exists in one direction only. If that is a node,
#   it is gone, and another node keeps an edge to it. There is no message. If it is a label, the data set loads, and
#   reading its last graph raises an error about dimensions.
# Why it matters: graphs of one's own for IGNN are written in this format, often by "\n".join(lines). The adjacency
#   matrix of an undirected graph is then not symmetric, and its spectral radius, which bounds W in IGNN, changes.
# Instead: end every file with a newline, and compare the numbers of edges, nodes and labels with those written.
# Source: torch_geometric/io/txt_array.py, read_txt_array drops what follows the last "\n".
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.14.1 torch-geometric==2.8.1
cd "$tmp"
"$tmp/venv/bin/python" -W ignore - <<'EOF'
import contextlib, io, os, sys
import torch, torch_geometric
from torch_geometric.datasets import TUDataset

print("torch", torch.__version__, " torch_geometric", torch_geometric.__version__)
pairs = [(1, 2), (2, 3), (4, 5), (5, 6), (7, 8), (8, 9)]                          # three paths of three nodes
edges = [edge for a, b in pairs for edge in ((a, b), (b, a))]
lines = {"A": [f"{a}, {b}" for a, b in edges], "graph_indicator": "1 1 1 2 2 2 3 3 3".split(),
         "node_labels": "0 1 0 0 1 1 1 1 0".split(), "graph_labels": "0 1 0".split()}


def read(name, without_newline=()):
    folder = f"data/{name}/raw"
    os.makedirs(folder)
    for kind, content in lines.items():
        with open(f"{folder}/{name}_{kind}.txt", "w") as f:
            f.write("\n".join(content) + ("" if kind in without_newline else "\n"))
    with contextlib.redirect_stderr(io.StringIO()):
        dataset = TUDataset("data", name)
    try:
        graph = dataset[2]
    except RuntimeError as error:
        return f"{len(dataset)} graphs, RuntimeError at the last: {error}"
    return f"{len(dataset)} graphs, the last with {graph.num_nodes} nodes and the edges {graph.edge_index.t().tolist()}"


cases = {"everywhere": [], "but in A": ["A"], "but in graph_labels": ["graph_labels"],
         "but in A, graph_indicator, node_labels": ["A", "graph_indicator", "node_labels"]}
seen = [read(f"CASE{i}", files) for i, files in enumerate(cases.values())]
whole = "3 graphs, the last with 3 nodes and the edges [[0, 1], [1, 0], [1, 2], [2, 1]]"
print("expected, however the files end:", whole)
for where, what in zip(cases, seen):
    print(f"seen, newline {where}: {what}")
cut = whole.replace(", [2, 1]", "")
if [*seen[:2], seen[3]] != [whole, cut, cut.replace("3 nodes", "2 nodes")] or "RuntimeError" not in seen[2]:
    sys.exit("CHANGED: the last line without a newline is no longer lost as stated")
print("as stated: the last line without a newline is lost")
EOF
