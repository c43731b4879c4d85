"""Implicit graph neural networks with phantom gradients: "On Training Implicit Models" (NeurIPS 2021), Table 4.

    python ignn_graphs.py --dataset chains                      # generated, no download; implicit beside 4 hops
    python ignn_graphs.py --dataset COX2                        # UPG A_{5,0.5}, 10 stratified folds, 200 epochs
    python ignn_graphs.py --dataset PROTEINS --table4           # four methods, same folds and weights; prints the table
    torchrun --nproc_per_node=2 ignn_graphs.py --dataset COX2 --table4          # the folds divided over two processes
    python ignn_graphs.py --dataset PPI --ppi-model literal --epochs 1000       # Table 4's PPI rows: the paper's model
    python ignn_graphs.py --dataset PPI-synthetic --ppi-model robust            # generated look-alike of PPI
    python ignn_graphs.py --dataset COX2 --benchmark            # step time and memory of the three gradients

Data: --data DIR (default data): PyG downloads COX2, PROTEINS and PPI, or finds them unpacked in DIR/NAME/raw/.

Table 4: --table4 for COX2, PROTEINS and PPI, or one row.  The paper solves backwards by plain iteration, which is the
default here, too, except for chains and --ppi-model robust and zoo: GMRES.
    paper COX2 84.1 ± 2.9  PROTEINS 78.6 ± 4.1  PPI 97.6        --grad implicit --backward-solver fixed-point
               83.9 ± 3.0           78.4 ± 4.2      98.2        --grad upg --lam 0.5
               83.9 ± 2.7           78.6 ± 4.2      97.4        --grad upg --lam 0.8
               83.0 ± 2.9           78.8 ± 4.2      96.2        --grad upg --lam 1.0
The paper's protocol takes the best TEST epoch of each fold.  Beside it stand the best common epoch, the last epoch
and, with --val, the epoch chosen on held-out training graphs.  What the official release does and changes numbers:
    --evaluate-2a-too       evaluate with the matrix of 2A + I as well, as the release does after training with A + I
    --unstratified-folds    the release shuffles the graphs after it has stratified them
    --ppi-model literal     raw adjacency, W projected with the radius of each step's graph, absolute tolerance 3e-6

Layer (IGNN, Gu et al. 2020), rows are nodes: H* = relu(A H* W^T + A V Omega_1^T), ||W||_inf <= kappa / rho(A).

What makes it faster: batches and their sparse matrices (CSR, with the transpose for the backward pass) are built once;
W is projected once per step, all rows in one sort; A V Omega_1^T is computed before the solve; graphs stop one by one;
freed memory is kept for the next step; the folds of COX2 and PROTEINS are divided over processes (on a CPU with
OMP_NUM_THREADS=1: the matrices are too small for threads).  No --amp, --compile or --cuda-graph: batches
are of any size, and solves stop at a tolerance.

Measured: README.md has Table 4 for COX2 and PROTEINS, and PPI-synthetic, on a CPU, and step times on one H200; PPI is
not run.

Differs from IGNN's code: A + I in training and evaluation (there: 2A + I in evaluation); stratified folds (there:
shuffled after stratification); residual per graph and relative (there: the largest entry of the batch); W is projected
at a step, not in each forward pass, so that evaluation changes nothing (with a raw adjacency each pass projects a copy
to its graphs' radius); the backward solve stops at a residual relative to dL/dH* (there: absolute, and it starts at
B); no Omega_2 and bias, which are counted there but never used: of COX2's 37,634 parameters 27,010 are.  --ppi-model
zoo is torchdeq's model with the solver budget of this file (there: 40 iterations, 1e-3).
"""
import argparse
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import NamedTuple

# Large CPU allocations then come in 2 MB pages: faster on a CPU.  torch reads it at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import (Process, Run, add_run_flags, anderson, benchmark, broyden, die, equilibrium, finite, fixed_point,
                    gmres, health, init_process, is_ours, launched, load_checkpoint, make_parser, output_folder,
                    parse_flags, save_checkpoint, seed_everything, upg, within)

PAPER = {"COX2": ("84.1 ± 2.9", "83.9 ± 3.0", "83.9 ± 2.7", "83.0 ± 2.9"),
         "PROTEINS": ("78.6 ± 4.1", "78.4 ± 4.2", "78.6 ± 4.2", "78.8 ± 4.2"),
         "PPI": ("97.6", "98.2", "97.4", "96.2")}
METHODS = (("implicit", None), ("upg", 0.5), ("upg", 0.8), ("upg", 1.0))        # Table 4's rows
# The defaults of options, by --dataset and, for PPI and its look-alike, by --ppi-model: that row wins.
GRAPHS = dict(hidden=64, kappa=0.9, epochs=200, batch_size=128, lr=0.001, clip=0.0, tol=1e-5, solver="fixed-point",
              backward_solver="fixed-point")
NODES = dict(kappa=0.98, clip=1.0, tol=1e-6, solver="anderson", backward_solver="gmres")
PRESETS = {"COX2": GRAPHS, "PROTEINS": GRAPHS,
           "PPI": dict(NODES, hidden=256, epochs=1000, batch_size=1, lr=0.005),
           "PPI-synthetic": dict(NODES, hidden=32, epochs=100, batch_size=1, lr=0.005),
           "chains": dict(NODES, hidden=16, epochs=200, batch_size=64, lr=0.01),
           "robust": {}, "zoo": dict(clip=0.0),
           "literal": dict(clip=0.0, tol=3e-6, solver="fixed-point", backward_solver="fixed-point")}
ONLY_FOR = {"folds val unstratified_folds evaluate_2a_too dropout": ("COX2", "PROTEINS"),
            "clip": ("PPI", "PPI-synthetic", "chains"), "chain_length hops": ("chains",),
            "ppi_model": ("PPI", "PPI-synthetic"), "graph_scale": ("PPI-synthetic",)}


def presets(args):
    ppi = args.dataset in ("PPI", "PPI-synthetic")
    return {**PRESETS[args.dataset], **(PRESETS[args.ppi_model] if ppi else {})}


def parse_args(argv=None):
    p = make_parser("Trains IGNN on graphs.  Without options: the generated chains, a minute.  Defaults are those of "
                    "the chains; PRESETS has the others.")
    count, positive = within(int, "[1, inf)"), within(float, "[0, inf)")
    add = p.add_argument_group("data").add_argument
    add("--dataset", choices=["COX2", "PROTEINS", "PPI", "PPI-synthetic", "chains"], default="chains",
        help="COX2, PROTEINS: classification of graphs; PPI: of nodes; PPI-synthetic: its generated look-alike; "
        "chains: a generated task of long range")
    add("--data", default="data", help="folder with NAME/raw/*; PyG downloads what is not there")
    add("--folds", type=within(int, "[2, inf)"), default=10, help="folds of the cross-validation on COX2 and PROTEINS")
    add("--val", action="store_true", help="choose the epoch on a tenth of each training fold")
    add("--unstratified-folds", action="store_true", help="the official folds: graphs are shuffled after stratification")
    add("--evaluate-2a-too", action="store_true", help="also evaluate with the normalised 2A + I, as the official "
        "release does, in columns of its own")
    add("--graph-scale", type=within(float, "(0, inf)"), default=0.1,
        help="nodes of PPI-synthetic's graphs as a fraction of PPI's")
    add("--chain-length", type=within(int, "[2, inf)"), default=20, help="nodes of the longest chain")

    add = p.add_argument_group("model").add_argument
    add("--hidden", type=count, help="width")
    add("--kappa", type=within(float, "(0, 1)"), help="bound of ||W||_inf rho(A); below 1 the equilibrium exists")
    add("--dropout", type=within(float, "[0, 1)"), default=0.5, help="before the last layer, on COX2 and PROTEINS")
    add("--ppi-model", choices=["robust", "literal", "zoo"], default="robust",
        help="robust: A / rho(A), relative tolerance, clipping; literal: the paper's, raw A; zoo: torchdeq's, raw A, "
        "spectral norm and Omega_2")
    add("--hops", type=count, default=2, help="iterations of each of the two layers of the few-hop network of chains, "
        "which sees twice as far")

    add = p.add_argument_group("equilibrium").add_argument
    add("--grad", choices=["implicit", "upg", "npg"], default="upg", help="how the gradient is computed")
    add("--k", type=count, default=5, help="steps of the phantom gradient")
    add("--lam", type=within(float, "(0, 1]"), default=0.5, help="damping of the phantom gradient")
    add("--solver", choices=["fixed-point", "anderson", "broyden"], help="finds the equilibrium")
    add("--max-iter", type=count, default=300, help="iterations of the solver")
    add("--tol", type=positive, help="residual at which a graph is solved: relative, or the largest entry with "
        "--ppi-model literal")
    add("--backward-solver", choices=list(SOLVERS), help="solver of --grad implicit's backward pass; the paper's is "
        "fixed-point")
    add("--backward-max-iter", type=count, default=300, help="its iterations")
    add("--backward-tol", type=positive, help="residual at which the backward solve of a graph stops, relative to "
        "dL/dH* (default: ten times --tol, 1e-5 with literal)")

    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, help="passes over the training graphs")
    add("--batch-size", type=count, help="graphs per step over all processes; on COX2 and PROTEINS, whose folds are "
        "divided over the processes, per fold")
    add("--lr", type=within(float, "(0, inf)"), help="Adam's learning rate; COX2 and PROTEINS halve it from epoch 51 on")
    add("--clip", type=positive, help="largest norm of the gradient, on PPI and chains; 0: any")
    modes = add_run_flags(p, "ignn-DATASET", seed=42, log_every=None, log_unit="epochs")
    modes.add_argument("--table4", action="store_true",
                       help="train implicit differentiation and UPG with lam 0.5, 0.8, 1.0, and print Table 4")
    p.set_defaults(stop_mode=None)              # no option: it follows from --ppi-model
    plain = p.parse_args(argv)
    given = [name for name, value in vars(plain).items() if value != p.get_default(name)]
    of_run = {"out", "resume", "eval", "benchmark", "table4", "save_every", "log_every"}
    args = parse_flags(p, argv, presets, from_checkpoint=" ".join(set(vars(plain)) - of_run))
    for names, datasets in ONLY_FOR.items():
        for name in set(names.split()) & set(given):
            if args.dataset not in datasets and not (name == "graph_scale" and args.dataset == "PPI" and args.benchmark):
                p.error(f"--{name.replace('_', '-')} is of {' and '.join(datasets)}: it has no effect on {args.dataset}")
    if args.table4 and (args.dataset == "chains" or {"grad", "lam"} & set(given) or args.resume not in (None, "auto")):
        p.error("--table4 is of COX2, PROTEINS and PPI, sets --grad and --lam itself, and continues by --out DIR "
                "--resume auto")
    if args.eval and (args.dataset == "chains" or launched()):
        p.error("--eval is for one process, and not for chains: their run prints its figures at its end")
    if args.benchmark and args.dataset not in ("COX2", "PPI", "PPI-synthetic"):
        p.error("--benchmark needs --dataset COX2, PPI or PPI-synthetic: graphs of those sizes are generated for it")
    if args.dataset in ("COX2", "PROTEINS") and not args.eval and args.resume not in (None, "auto"):
        p.error("--resume: every fold has a checkpoint of its own; continue all with --out DIR --resume auto")
    literal = args.dataset in ("PPI", "PPI-synthetic") and args.ppi_model == "literal"
    args.stop_mode = "max" if literal else "rel"
    args.backward_tol = args.backward_tol if args.backward_tol is not None else 1e-5 if literal else 10 * args.tol
    args.log_every = args.log_every or max(1, args.epochs // 10)
    return args


@functools.cache
def pyg():
    """torch_geometric, imported when it is first needed: that takes a second."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
        import torch_geometric.data
        import torch_geometric.datasets
        import torch_geometric.nn.conv.gcn_conv
        import torch_geometric.utils
    return torch_geometric


# --- data: graphs to one block-diagonal batch ---------------------------------------------------------------

class Sparse(NamedTuple):
    """A sparse matrix and its transpose, both CSR: torch's own backward of a CSR product transposes anew, each time."""
    matrix: torch.Tensor
    transpose: torch.Tensor


def sparse(index, values, shape):
    """index (2, E): row and column of each value; duplicates are added."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
        matrix, transpose = (torch.sparse_coo_tensor(i, values, s).coalesce().to_sparse_csr()
                             for i, s in ((index, shape), (index.flip(0), shape[::-1])))
    return Sparse(matrix, transpose)


@dataclasses.dataclass
class Graphs:
    """A batch of graphs on the device, as one graph of n nodes."""
    x: torch.Tensor                 # (n, p)
    y: torch.Tensor                 # (G,) long, labels of graphs; (n,) long or (n, C) float, of nodes
    adjacency: Sparse               # (n, n)
    pool: Sparse                    # (G, n): the sum over the nodes of each graph
    offsets: torch.Tensor           # (G + 1,) first row of each graph
    longest: int                    # nodes of the largest graph
    slots: torch.Tensor             # (n,) place of each row when graphs are padded to the longest
    rho: float | None               # spectral radius of a raw adjacency; None: it is normalised, 1 at most
    adjacency_2a: Sparse | None     # the official evaluation's, if asked for


def make_batch(graphs, device, *, kind="sym", with_2a=False, dtype=torch.float32):
    """One batch of a list of PyG graphs.  Build it once: nothing of it changes in training.

    kind: "sym" S = (D + I)^-1/2 (A + I) (D + I)^-1/2, rho(S) = 1; "rho" A / rho(A), graph by graph; "raw" A.
    """
    batch = pyg().data.Batch.from_data_list(graphs)
    n, longest = batch.num_nodes, int(batch.ptr.diff().max())
    index, offsets, graph = (t.to(device) for t in (batch.edge_index, batch.ptr, batch.batch))
    nodes = torch.arange(n, device=device)

    def normalised(weight):
        """(D + I)^-1/2 (w A + I) (D + I)^-1/2 with D the degrees of w A."""
        values = torch.full(index.shape[1:], weight, dtype=dtype, device=device)
        return sparse(*pyg().nn.conv.gcn_conv.gcn_norm(index, values, n, dtype=dtype), (n, n))

    rho = None
    if kind == "sym":
        adjacency = normalised(1.0)
    else:
        ones = torch.ones(index.shape[1], dtype=dtype, device=device)
        adjacency = sparse(index, ones, (n, n))
        radius = spectral_radii(adjacency, offsets, graph)
        if kind == "raw":
            rho = radius.max().item() + 1e-5                # of the batch, as in the official release
        else:
            adjacency = sparse(index, ones / radius.to(dtype)[graph[index[0]]], (n, n))
    pool = sparse(torch.stack([graph, nodes]), torch.ones(n, dtype=dtype, device=device), (len(graphs), n))
    return Graphs(batch.x.to(device, dtype), batch.y.to(device), adjacency, pool, offsets, longest,
                  graph * longest + nodes - offsets[graph], rho, normalised(2.0) if with_2a else None)


def spectral_radii(A, offsets, graph, tol=1e-3, max_iter=1000):
    """An upper bound (G,) of rho(A) of each graph, within tol of it unless max_iter comes first; A >= 0, symmetric.

    Power iteration with A + I, which also converges for a bipartite graph.  For x > 0 the Rayleigh quotient is a lower
    bound and max_i (A x)_i / x_i an upper one (Collatz-Wielandt), so the projection's radius kappa / rho is safe.
    """
    matrix = A.matrix.double()
    x = torch.ones(matrix.shape[0], 1, dtype=torch.float64, device=graph.device)
    for i in range(max_iter):
        y = torch.sparse.mm(matrix, x)
        upper = torch.segment_reduce((y / x)[:, 0], "max", offsets=offsets, initial=0)
        if i % 10 == 9:
            lower, square = (torch.segment_reduce(v[:, 0], "sum", offsets=offsets) for v in (x * y, x * x))
            if bool((upper - lower / square <= tol * upper).all()):                 # host sync
                break
        x = x + y
        largest = torch.segment_reduce(x[:, 0], "max", offsets=offsets, initial=0)
        x = (x / largest[graph, None]).clamp_min(1e-200)        # stays positive where a component's radius is smaller
    return upper


# --- data: COX2, PROTEINS, PPI ------------------------------------------------------------------------------

def load(args, process, make):
    """The data set of PyG, by make().  The first process downloads and converts, the others read what it has left."""
    raw = Path(args.data) / args.dataset / "raw"
    names = ([f"{args.dataset}_{part}.txt" for part in ("A", "graph_indicator", "graph_labels", "node_labels")]
             if args.dataset != "PPI" else [f"{split}_{part}" for split in ("train", "valid", "test") for part in
                                            ("graph.json", "feats.npy", "labels.npy", "graph_id.npy")])

    def read():         # what is missing, too: another process may be downloading
        missing = [name for name in names if not (raw / name).is_file()]
        there = raw.is_dir() and any(raw.iterdir())         # PyG makes the folder before it downloads
        if there and missing:
            die(f"--data {args.data}: {raw} lacks {', '.join(missing[:4])}{' and more' if len(missing) > 4 else ''}; "
                "unpack it anew, or remove the folder to have it downloaded")
        try:
            return make()
        except Exception as error:          # PyG lets through whatever the network, the archive or the numbers raise
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            die(f"--data {args.data}: cannot read {args.dataset} ({type(error).__name__}: {what}); "
                + (f"its files are damaged: remove {raw.parent / 'processed'}, and unpack {raw} anew if that does "
                   "not help" if there else f"unpack it to {raw}, or give this machine internet access"))

    return process.first(read)


def check_graphs(args, graphs, nodes):
    """Ends the run with one line where a graph's edges, features and labels do not fit together."""
    where = f"--data {args.data}: {args.dataset}"
    if not graphs:
        die(f"{where} holds no graphs")
    for i, graph in enumerate(graphs):
        n = 0 if graph.x is None else len(graph.x)
        if n == 0:
            die(f"{where}: graph {i} has no node features")
        if not bool(graph.x.isfinite().all()):
            die(f"{where}: graph {i} has a feature that is not finite")
        if graph.edge_index.numel() and not 0 <= int(graph.edge_index.min()) <= int(graph.edge_index.max()) < n:
            die(f"{where}: graph {i} has an edge to a node outside 0..{n - 1}")
        if nodes and graph.edge_index.numel() == 0:
            die(f"{where}: graph {i} has no edges, so rho(A) = 0 and its projection has no radius; remove it")
        if graph.y is None or len(graph.y) != (n if nodes else 1):
            die(f"{where}: graph {i} has {0 if graph.y is None else len(graph.y)} labels for "
                f"{f'{n} nodes' if nodes else 'one graph'}")
        if nodes and graph.y.dim() == 2 and not bool(((graph.y == 0) | (graph.y == 1)).all()):
            die(f"{where}: graph {i} has a label that is neither 0 nor 1")
    return graphs


def load_tu(args, process):
    """COX2 or PROTEINS as a list of graphs; x is the one-hot node label."""
    def make():
        raw = Path(args.data) / args.dataset / "raw" / args.dataset
        if Path(f"{raw}_A.txt").is_file():          # PyG drops an index of 0 without a word
            nodes = len(Path(f"{raw}_graph_indicator.txt").read_text().split())
            ends = np.loadtxt(f"{raw}_A.txt", delimiter=",", dtype=int)
            if ends.min() < 1 or ends.max() > nodes:
                raise ValueError(f"an edge to a node outside 1..{nodes} in {raw}_A.txt")
        dataset = pyg().datasets.TUDataset(args.data, args.dataset)
        return dataset.y, list(dataset)

    labels, graphs = load(args, process, make)
    if labels is None or len(labels) != len(graphs):
        die(f"--data {args.data}: {args.dataset} has {0 if labels is None else len(labels)} labels for {len(graphs)} "
            "graphs")
    return check_graphs(args, graphs, nodes=False)


def stratified_folds(labels, folds, seed):
    """(n,) the fold of each graph: scikit-learn's StratifiedKFold(folds, shuffle=True, random_state=seed).

    Of the sorted labels every folds-th goes to the same fold, which fixes how many of each class a fold gets; which
    ones is drawn class by class, in the order in which the classes first appear.
    """
    labels, rng = np.asarray(labels), np.random.RandomState(seed)
    classes = labels[np.sort(np.unique(labels, return_index=True)[1])]
    ordered = np.repeat(np.arange(len(classes)), [(labels == c).sum() for c in classes])
    fold_of = np.empty(len(labels), dtype=int)
    for c, label in enumerate(classes):
        places = np.repeat(np.arange(folds), [(ordered[i::folds] == c).sum() for i in range(folds)])
        rng.shuffle(places)
        fold_of[labels == label] = places
    return fold_of


def split(args, labels):
    """[(train, val, test)] of each fold, lists of graph numbers; the order of train is that of its fixed batches.

    --unstratified-folds: the official split, whose indices of the graphs in file order are used on shuffled ones.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed)).numpy()
    fold_of = stratified_folds(labels, args.folds, args.seed)
    if args.unstratified_folds:
        shuffled = np.empty_like(fold_of)
        shuffled[order] = fold_of
        fold_of = shuffled
    splits = []
    for fold in range(args.folds):
        train, val = order[fold_of[order] != fold], []
        if args.val:
            held_out = stratified_folds(np.asarray(labels)[train], 10, args.seed) == 0
            train, val = train[~held_out], train[held_out]
        splits.append((list(train), list(val), list(np.flatnonzero(fold_of == fold))))
    return splits


# --- data: generated ----------------------------------------------------------------------------------------

PPI_NODES = ((1767, 1377, 2263, 2339, 1578, 1021, 1823, 2488, 591, 3312, 2401, 1878, 1819, 3480, 2794, 2326, 2650, 2815,
              3163, 3021), (3230, 3284), (3224, 2300))         # of the graphs of train, val and test


def ppi_lookalike(scale, seed):
    """[train, val, test], lists of graphs of PPI's sizes times scale: 50 features, 121 labels; heavy-tailed degrees.

    Edges join nodes with probability proportional to the product of log-normal weights, 13.65 per node.  The labels
    come from one linear teacher of a node's features and its neighbours' mean, cut at the 70th percentile.
    """
    rng = torch.Generator().manual_seed(seed)
    own, around = torch.randn(50, 121, generator=rng), torch.randn(50, 121, generator=rng)
    splits = []
    for sizes in PPI_NODES:
        graphs = []
        for n in (max(30, round(scale * n)) for n in sizes):
            weight = torch.exp(1.15 * torch.randn(n, generator=rng))
            weight = weight.clamp(max=25 * weight.mean().item())
            wanted, edges = round(min(13.65 * n, 0.3 * n * (n - 1) / 2)), torch.empty(0, dtype=torch.long)
            while len(edges) < wanted:
                ends = torch.multinomial(weight, 2 * wanted, replacement=True, generator=rng).view(2, -1).sort(dim=0)[0]
                drawn = (ends[0] * n + ends[1])[ends[0] < ends[1]]
                edges = torch.unique(torch.cat([edges, drawn]))
            edges = edges[torch.randperm(len(edges), generator=rng)[:wanted]]
            edge_index = pyg().utils.to_undirected(torch.stack([edges // n, edges % n]), num_nodes=n)
            x = ((torch.rand(n, 50, generator=rng) < 0.08).float() - 0.08) / math.sqrt(0.08 * 0.92)
            mean = torch.zeros(n, 50).index_add_(0, edge_index[0], x[edge_index[1]])
            mean = mean / pyg().utils.degree(edge_index[0], n).clamp_min(1)[:, None]
            graphs.append(pyg().data.Data(x=x, edge_index=edge_index, y=x @ own + mean @ around))
        splits.append(graphs)
    threshold = torch.cat([graph.y for graph in splits[0]]).quantile(0.7, dim=0)
    for graph in (graph for graphs in splits for graph in graphs):
        graph.y = (graph.y > threshold).float()
    return splits


def chains(length, seed):
    """[train, val, test]: chains of length / 2 to length nodes; the first node shows the class that all nodes have.

    No other node has a feature, so a network that sees t hops far can only guess for the nodes beyond.
    """
    rng = torch.Generator().manual_seed(seed)
    splits = []
    for count in (64, 32, 32):
        graphs = []
        for i in range(count):
            n = int(torch.randint(max(2, length // 2), length + 1, (1,), generator=rng))
            x = torch.zeros(n, 2)
            x[0, i % 2] = 1
            path = torch.stack([torch.arange(n - 1), torch.arange(1, n)])
            graphs.append(pyg().data.Data(x=x, edge_index=pyg().utils.to_undirected(path), y=torch.full((n,), i % 2)))
        splits.append(graphs)
    return splits


# --- model --------------------------------------------------------------------------------------------------

def project_rows(W, v):
    """Each row of W (m, m) to its nearest point, in Euclidean norm, of the L1 ball of radius v > 0; a new tensor.

    A row inside stays as it is, bit for bit; one from outside ends on the ball to rounding.  Sort and cumulated sums of
    all rows at once (IGNN's well-posedness condition ||W||_inf <= v, which decouples over rows): every absolute value
    loses theta = (u_1 + ... + u_r - v) / r, with u the sorted absolute values and r the number of j with
    u_j > (u_1 + ... + u_j - v) / j.
    """
    if not v > 0:
        raise ValueError(f"v, the radius of the L1 ball, must be positive, got {v}")
    size = W.abs()
    u = size.sort(dim=-1, descending=True).values
    total = u.cumsum(dim=-1)
    j = torch.arange(1, W.shape[-1] + 1, device=W.device, dtype=W.dtype)
    r = (u * j > total - v).sum(dim=-1, keepdim=True).clamp_min(1)                  # 0 only if the row is not finite
    theta = (total.gather(-1, r - 1) - v) / r
    return torch.where(total[..., -1:] > v, W.sign() * (size - theta).clamp_min(0), W)


class _Propagate(torch.autograd.Function):
    """matrix @ h, with the stored transpose for the backward pass."""

    @staticmethod
    def forward(ctx, h, matrix, transpose):
        ctx.matrices = transpose, matrix
        out = h.new_empty(matrix.shape[0], h.shape[1])
        return torch.addmm(out, matrix, h, beta=0, out=out)     # torch.sparse.mm would fill and copy zeros first

    @staticmethod
    def backward(ctx, g):
        return _Propagate.apply(g.contiguous(), *ctx.matrices), None, None


def propagate(A, h):
    """A h for h (n, m)."""
    return _Propagate.apply(h, *A)


def padded(solver, batch):
    """common.anderson or common.broyden for a batch: its graphs are the samples, padded to the longest with zeros.

    Few iterations where the contraction is slow, as with kappa = 0.98.  offsets=batch.offsets gives the same without
    padding, but takes about 1.3 times as long on a CPU, unless one large graph makes the batch mostly padding.
    """
    graphs, longest = len(batch.offsets) - 1, batch.longest

    def pack(x):
        if graphs * longest == len(x):
            return x.view(graphs, longest, -1)
        padded = x.new_zeros(graphs * longest, x.shape[1]).index_copy_(0, batch.slots, x)
        return padded.view(graphs, longest, -1)

    def unpack(x):
        x = x.flatten(0, 1)
        return x if len(x) == len(batch.slots) else x[batch.slots]

    def solve(f, h0, **options):
        if not torch.is_tensor(h0):         # the backward solve of common.implicit, with lists of one tensor
            (h0,), (g,) = h0, options["stop_mode"]
            result = solver(lambda x: pack(f([unpack(x)])[0]), pack(h0), **{**options, "stop_mode": pack(g)})
            return result._replace(h=[unpack(result.h)])
        result = solver(lambda x: pack(f(unpack(x))), pack(h0), **options)
        return result._replace(h=unpack(result.h))

    return solve


SOLVERS = {"fixed-point": lambda batch: functools.partial(fixed_point, offsets=batch.offsets),
           "anderson": functools.partial(padded, anderson), "broyden": functools.partial(padded, broyden),
           # memory: without it room for --backward-max-iter states, 300.
           "gmres": lambda batch: functools.partial(gmres, memory=40, offsets=batch.offsets)}


def graph_equilibrium(f, h0, batch, *, solver="fixed-point", backward_solver="gmres", max_iter=300, tol=1e-6,
                      backward_max_iter=300, backward_tol=1e-5, **more):
    """common.equilibrium of a batch, whose graphs are the samples."""
    return equilibrium(f, h0, solver=SOLVERS[solver](batch), max_iter=max_iter, tol=tol,
                       backward_solver=SOLVERS[backward_solver](batch), backward_max_iter=backward_max_iter,
                       backward_tol=backward_tol, **more)


class ImplicitLayer(nn.Module):
    """H* = relu(A H* W^T + B), B = A V Omega_1^T, with V (n, p), H (n, m): the IGNN paper's U^T, X^T.

    The official layer also owns Omega_2 (m, p) and a bias (m) that it never uses; they are in its parameter counts.
    omega_2: B = A V Omega_1^T + V Omega_2^T, as in torchdeq's node model.
    spectral: that model's normalisation, M <- diag(min(1, g / sigma)) M of each weight, sigma = u^T M v.
    hops: so many iterations from zero in place of the equilibrium, to see what that adds.
    """

    def __init__(self, p, m, kappa, solve, omega_2=False, spectral=False, hops=0):
        super().__init__()
        self.kappa, self.solve, self.spectral, self.hops = kappa, solve, spectral, hops
        self.names = ["W", "Omega_1", *(["Omega_2"] if omega_2 else [])]
        for name in self.names:
            weight = torch.empty(m, m if name == "W" else p).uniform_(-m ** -0.5, m ** -0.5)
            setattr(self, name, nn.Parameter(weight))
            if spectral:
                setattr(self, name + "_g", nn.Parameter(torch.ones(m, 1)))
                self.register_buffer(name + "_u", F.normalize(torch.randn(m), dim=0))
                self.register_buffer(name + "_v", F.normalize(torch.randn(weight.shape[1]), dim=0))
        for _ in range(15 if spectral else 1):          # enough power iterations for sigma to begin with
            self.project_()

    @torch.no_grad()
    def project_(self, rho=None):
        """To be called between a change of the weights and the next forward pass, which itself changes nothing.

        Puts W into the ball of radius kappa / rho.  With spectral W may be anywhere; then one power iteration of u, v.
        """
        if not self.spectral:
            self.W.copy_(project_rows(self.W, self.kappa / (rho or 1.0)))
            return
        for name in self.names:
            M, u, v = (getattr(self, name + part) for part in ("", "_u", "_v"))
            v.copy_(F.normalize(M.T @ u, dim=0))
            u.copy_(F.normalize(M @ v, dim=0))

    def weights(self, rho):
        """The effective W, Omega_1 and Omega_2 (or None) for a batch whose adjacency has this radius (None: 1)."""
        def effective(name):
            M = getattr(self, name, None)
            if M is None or not self.spectral:
                return M
            g, u, v = (getattr(self, name + part) for part in ("_g", "_u", "_v"))
            return M * (g / (u @ M @ v)).clamp(max=1)

        W, Omega_1, Omega_2 = map(effective, ("W", "Omega_1", "Omega_2"))
        if self.spectral or rho is not None:        # of a temporary; the gradient passes straight through
            W = project_rows(W.detach(), self.kappa / (rho or 1.0)) + (W - W.detach())
        return W, Omega_1, Omega_2

    def injection(self, V, A, Omega_1, Omega_2):
        """B (n, m) from V (n, p)."""
        m, p = Omega_1.shape
        B = propagate(A, V) @ Omega_1.T if p < m else propagate(A, V @ Omega_1.T)       # they commute: narrow first
        return B if Omega_2 is None else B + V @ Omega_2.T

    def f(self, h, B, W, A):
        """One application of the layer: h (n, m)."""
        return torch.addmm(B, propagate(A, h), W.T).relu_()

    def forward(self, V, batch, log=None):
        """H* (n, m).  log: a list that receives ("forward" or "backward", SolverResult)."""
        W, Omega_1, Omega_2 = self.weights(batch.rho)
        B = self.injection(V, batch.adjacency, Omega_1, Omega_2)
        f = functools.partial(self.f, B=B, W=W, A=batch.adjacency)
        if self.hops:
            return upg(f, torch.zeros_like(B), k=self.hops, lam=1.0)

        def keep(which, result):
            if log is not None:
                log.append((which, result._replace(h=None)))        # an epoch's states would fill the memory

        # From X = B, as in the official release.  From zero one more iteration would be needed: f(0) = relu(B).
        h, result = self.solve(f, B.detach(), batch, on_backward=lambda r: keep("backward", r))
        keep("forward", result)
        return h


def check_kappa(kappa):
    if not 0 < kappa < 1:
        raise ValueError(f"kappa must be in (0, 1), got {kappa}")


class GraphIGNN(nn.Module):
    """Log-probabilities (G, classes): three implicit layers, sum over each graph's nodes, two linear layers.

    solve(f, h0, batch) -> (H*, result) is the solver and its gradient, as graph_equilibrium with its settings.
    """

    def __init__(self, num_features, num_classes, hidden=64, kappa=0.9, dropout=0.5, solve=graph_equilibrium):
        super().__init__()
        check_kappa(kappa)
        self.dropout = dropout
        widths = [num_features, hidden, hidden, hidden]
        self.implicit = nn.ModuleList(ImplicitLayer(p, m, kappa, solve) for p, m in zip(widths, widths[1:]))
        self.readout = nn.ModuleList([nn.Linear(hidden, hidden), nn.Linear(hidden, num_classes)])

    def project_(self, rho=None):
        """After every step of an optimiser: puts the weights back into the well-posed set."""
        for layer in self.implicit:
            layer.project_(rho)

    def forward(self, batch, keep=None, log=None):
        """batch: Graphs.  keep (G, hidden): the dropout mask, 0 or 1 / (1 - dropout); drawn here if None."""
        h = batch.x
        for layer in self.implicit:
            h = layer(h, batch, log)
        g = F.relu(self.readout[0](propagate(batch.pool, h)))                           # (G, hidden)
        g = F.dropout(g, self.dropout, self.training) if keep is None else g * keep
        return F.log_softmax(self.readout[1](g), dim=-1)


class NodeIGNN(nn.Module):
    """Logits (n, classes) of the nodes: h <- elu(IGNN_i(h) + V_i h) for each layer i, without elu after the last.

    widths: of the layers; the paper's PPI model is the default, 4, 2, 2, 1 times hidden, then the classes.
    """

    def __init__(self, num_features, num_classes, hidden=256, kappa=0.98,
                 solve=functools.partial(graph_equilibrium, solver="anderson"), widths=None, omega_2=False,
                 spectral=False, hops=0):
        super().__init__()
        check_kappa(kappa)
        widths = [num_features, *(widths or [4 * hidden, 2 * hidden, 2 * hidden, hidden]), num_classes]
        pairs = list(zip(widths, widths[1:]))
        self.implicit = nn.ModuleList(ImplicitLayer(p, m, kappa, solve, omega_2, spectral, hops) for p, m in pairs)
        self.skip = nn.ModuleList(nn.Linear(p, m) for p, m in pairs)

    project_ = GraphIGNN.project_

    def forward(self, batch, log=None):
        h = batch.x
        for i, (layer, skip) in enumerate(zip(self.implicit, self.skip)):
            h = layer(h, batch, log) + skip(h)
            if i < len(self.skip) - 1:
                h = F.elu(h)
        return h


def load_official(model, state_dict):
    """Loads a state dict of the official IGNN release (graph or PPI model) or of torchdeq's zoo, then projects W.

    Strict: RuntimeError names keys that are unknown, missing or of another shape.  Parameters that those models own and
    never use (bias; Omega_2 where the model here has none) are left out.
    """
    node, own, found = isinstance(model, NodeIGNN), model.state_dict(), {}
    last = len(model.implicit) - 1
    for key, value in state_dict.items():
        stem, _, rest = key.removeprefix("module.").partition(".")
        name = key
        if stem.startswith("ig") and stem[2:].isdigit():
            name = f"implicit.{int(stem[2:]) - 1}.{rest}"
        elif stem == "V":
            name = f"skip.{last}.{rest}"                                # the official node model's fifth
        elif stem.startswith("V_"):
            name = f"{'skip' if node else 'readout'}.{stem[2:]}.{rest}"
        elif stem in ("ignn", "proj"):                                  # the zoo's node model
            name = f"{'implicit' if stem == 'ignn' else 'skip'}.{rest.removesuffix('_orig')}"
        unused = name.endswith(".bias") and name.startswith("implicit") or name.endswith(".Omega_2") and name not in own
        # What is unused is left out, but only of layers that the model has: others are unknown.
        if not unused or name.removesuffix("bias").removesuffix("Omega_2") + "W" not in own:
            found[name] = value
    model.load_state_dict(found)
    if not any(layer.spectral for layer in model.implicit):         # else u and v of the checkpoint are as they must be
        model.project_()


# --- training -----------------------------------------------------------------------------------------------

ADJACENCY = {"robust": "rho", "literal": "raw", "zoo": "raw"}           # of --ppi-model, for make_batch


def solver_settings(args):
    names = "grad k lam solver max_iter tol stop_mode backward_solver backward_max_iter backward_tol"
    return functools.partial(graph_equilibrium, **{name: getattr(args, name) for name in names.split()})


def graph_model(args, graphs, seed):
    """The model for COX2 or PROTEINS: from this seed, the same weights for every method."""
    seed_everything(seed)
    return GraphIGNN(graphs[0].x.shape[1], max(int(graph.y) for graph in graphs) + 1, args.hidden, args.kappa,
                     args.dropout, solver_settings(args))


def node_model(args, num_features, num_classes, hops=0):
    """The model for PPI, its look-alike or the chains, from --seed."""
    zoo = args.ppi_model == "zoo" and args.dataset != "chains"
    widths = [args.hidden] if args.dataset == "chains" else None
    seed_everything(args.seed)
    return NodeIGNN(num_features, num_classes, args.hidden, args.kappa, solver_settings(args), widths, omega_2=zoo,
                    spectral=zoo, hops=hops)


def official_count(model):
    """Parameters as the paper counts them: with the official layers' Omega_2 and bias, which nothing uses."""
    dead = sum(layer.Omega_1.shape[0] * (1 + (layer.Omega_1.shape[1] if "Omega_2" not in layer.names else 0))
               for layer in model.implicit)
    return sum(p.numel() for p in model.parameters()) + dead


def describe(model, args):
    """(a method's name, the name and its model's parameters)."""
    own, hops = sum(p.numel() for p in model.parameters()), model.implicit[0].hops * len(model.implicit)
    name = "implicit" if args.grad == "implicit" else f"{args.grad.upper()} A_{{{args.k},{args.lam}}}"
    name = f"{hops} hops" if hops else name
    return name, f"{name}: {own:,} parameters ({official_count(model):,} as the paper counts)"


def checksum(graphs):
    """Hash of a data set's edges, features and labels.  A run is only continued on the data it started with."""
    digest = hashlib.sha256()
    for tensor in (t for graph in graphs for t in (graph.edge_index, graph.x, graph.y)):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def write_results(args, **results):
    path = Path(args.out) / "results.json"
    try:
        path.write_text(json.dumps(finite({"args": vars(args), **results}), default=float))
    except OSError as error:
        die(f"--out: cannot write {path} ({error.strerror})", code=1)


def dropout_mask(args, fold, epoch, step, batch):
    """(G, hidden) for a step: the same whichever process trains this fold, and after a resume."""
    rng = torch.Generator().manual_seed((((args.seed * 1009 + fold) * 10007 + epoch) * 10007 + step) % 2 ** 63)
    keep = (torch.rand(len(batch.y), args.hidden, generator=rng) >= args.dropout) / (1 - args.dropout)
    return keep.to(batch.x.device, non_blocking=True)           # a blocking copy would wait for all steps before


def train(args, run, model, batches, shares, evaluation, fold=None):
    """Trains on `batches`, graphs of a fold or node graphs, and evaluates after each epoch.

    shares: of each batch, the factor of its loss: DistributedDataParallel averages over the processes.
    evaluation: {"val": batch, "test": batch, ...}.  Returns the curve {"loss", "val", "test", ...: after each epoch},
    or None if it was stopped.  A loss that is not finite ends the curve.
    """
    process, nodes, raw = run.process, fold is None, batches[0].rho is not None
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    first, curve = 0, {}
    if run.state:
        model.load_state_dict(run.state["model"])
        optimizer.load_state_dict(run.state["optimizer"])
        first, curve = run.state["epoch"], run.state["curve"]
    net = DistributedDataParallel(model) if process.world_size > 1 else model
    began, last_shown = time.perf_counter(), first
    for epoch in process.bar(range(first, args.epochs), "training" if nodes else f"fold {fold}"):
        log_of_solves, losses, order = [], [], list(range(len(batches)))
        if nodes:                   # the release keeps the order of a fold's batches
            rng = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            order = torch.randperm(len(batches), generator=rng).tolist()
        lr = args.lr * (0.5 if epoch >= 50 and not nodes else 1)            # halved once, for epoch 51
        for group in optimizer.param_groups:
            group["lr"] = lr
        for step, i in enumerate(order):
            batch = batches[i]
            if nodes:
                model.project_(batch.rho)           # as in the release: with a raw adjacency, this graph's radius
                loss = node_loss(net(batch, log=log_of_solves), batch.y)
            else:
                mask = dropout_mask(args, fold, epoch, step, batch)
                loss = F.nll_loss(net(batch, mask, log_of_solves), batch.y)
            (loss * shares[i]).backward()
            if args.clip:
                nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if not nodes:
                model.project_()
            losses.append(loss.detach() * shares[i] if nodes else loss.detach().double() * len(batch.y))
        if nodes and not raw:           # with a raw adjacency each forward pass projects for its own graph's radius
            model.project_()

        # --- the epoch's training ends here; what follows is evaluation, logging and saving ---
        losses = torch.stack(losses)
        found = {"loss": (process.sum(losses.mean()) / process.world_size if nodes else
                          losses.sum() / sum(len(batch.y) for batch in batches)).item()}               # host sync
        for name, batch in evaluation.items():
            found[name], found[f"{name}_loss"] = evaluate(model, batch, process)
        for name, value in found.items():
            curve.setdefault(name, []).append(value)
        if not math.isfinite(found["loss"] + found["test_loss"]):
            return curve
        last = epoch + 1 == args.epochs
        show = last or (epoch + 1) % args.log_every == 0
        ms = 1e3 * (time.perf_counter() - began) / (epoch + 1 - last_shown)
        extra = {"best_val_epoch": 1 + max(range(epoch + 1), key=lambda e: curve["val"][e])} if nodes else {"fold": fold}
        run.report("epoch", show, step=epoch + 1, epoch=epoch + 1, lr=lr, **found, **extra, ms_per_epoch=ms,
                   **solves(log_of_solves, args, process))
        if show:
            began, last_shown = time.perf_counter(), epoch + 1
        saving, stop = run.due()
        if saving or last:
            run.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": epoch + 1,
                      "epoch": epoch + 1, "curve": curve})
        if stop and not last:
            return None
    return curve


def solves(log, args, process):
    """Calls of f (mean) and health of the solves of an epoch; host sync."""
    record = {}
    for name, which, tol in (("train", "forward", args.tol), ("backward", "backward", args.backward_tol)):
        results = [r for direction, r in log if direction == which]
        if results:
            record[f"{name}_evals"] = statistics.mean(r.n_evals for r in results)
            record.update(health(name, [r.residual for r in results], tol, process))
    return record


def stopped(args, process, name):
    """Says how to continue, after a signal of this name."""
    if process.rank == 0:
        print(f"{name}: saved to {args.out}; continue with the same command, --out {args.out} and --resume auto",
              flush=True)


def train_graphs(args, process, graphs):
    """Cross-validation.  The folds are runs of their own, in --out/fold-N, and divided over the processes.

    Returns {"table": {protocol: accuracies of the folds}, "majority", "minutes"}, or None if it was stopped.
    """
    args.out = output_folder(args, process, f"ignn-{args.dataset}")
    whole, labels = Path(args.out, "checkpoint.pt"), [int(graph.y) for graph in graphs]
    if whole.exists() and not args.resume:
        process.die(f"--out {args.out} already holds a run: continue it with --resume auto, or choose another folder")
    splits = split(args, labels)
    if min(min(len(train_set), len(test)) for train_set, _, test in splits) < 1:
        process.die(f"--folds {args.folds}: {len(graphs)} graphs are too few for it")
    majority = [100 * max(np.bincount([labels[i] for i in test])) / len(test) for _, _, test in splits]
    alone, fingerprint = Process(0, 1, process.device), checksum(graphs)
    method, about = describe(graph_model(args, graphs, 0), args)
    about += (f"; {len(graphs)} graphs, {args.folds} {'un' * args.unstratified_folds}stratified folds, {args.epochs} "
              f"epochs; majority class {statistics.mean(majority):.1f} ± {statistics.pstdev(majority):.1f} % of the "
              "test folds")
    curves, weights, seconds, signal = {}, {}, 0.0, ""
    for fold in range(process.rank, args.folds, process.world_size):
        train_set, val, test = ([graphs[i] for i in numbers] for numbers in splits[fold])
        one = argparse.Namespace(**{**vars(args), "out": f"{args.out}/fold-{fold}"})
        run = Run(one, alone, "", data=fingerprint, fold=fold)
        model = graph_model(args, graphs, args.seed * 1000 + fold).to(process.device)
        run.start(about if fold == 0 else "", fold=fold)
        batches = [make_batch(train_set[i:i + args.batch_size], process.device)
                   for i in range(0, len(train_set), args.batch_size)]      # the same in every epoch, as in the release
        evaluation = {"test": make_batch(test, process.device, with_2a=args.evaluate_2a_too)}
        if args.evaluate_2a_too:
            batch = evaluation["test"]
            evaluation["test_2a"] = dataclasses.replace(batch, adjacency=batch.adjacency_2a)
        if args.val:
            evaluation["val"] = make_batch(val, process.device)
        curve = train(args, run, model, batches, [1.0] * len(batches), evaluation, fold)
        if curve is None:
            signal = run.stopped_by()
            break
        if not math.isfinite(curve["loss"][-1] + curve["test_loss"][-1]):
            run.broke(f"fold {fold}, epoch {len(curve['loss'])}: the loss became {curve['loss'][-1]}, in the test "
                      f"{curve['test_loss'][-1]}", len(curve["loss"]), "try a lower --lr or --kappa")
        curves[fold], seconds = curve, seconds + run.seconds
        weights[fold] = {name: v.cpu() for name, v in model.state_dict().items()}
    meeting = process.gather((curves, weights, seconds, signal))            # the only one of the processes
    if any(signal for *_, signal in meeting):
        return stopped(args, process, max(signal for *_, signal in meeting))
    curves, weights = ({fold: x for part in parts for fold, x in part.items()} for parts in list(zip(*meeting))[:2])
    table, minutes = protocols(curves), max(seconds for *_, seconds, _ in meeting) / 60
    if process.rank == 0:
        if not whole.exists():
            save_checkpoint(whole, {"weights": weights, "args": vars(args), "step": args.epochs,
                                    "data": fingerprint})
        record = {name: [values.mean(), values.std(), *values] for name, values in table.items()}
        write_results(args, majority=majority, minutes=minutes, folds=curves, **{"mean, std, folds": record})
        lines = [Path(args.out, f"fold-{fold}", "metrics.jsonl").read_text() for fold in range(args.folds)]
        Path(args.out, "metrics.jsonl").write_text("".join(lines))
        print(f"{args.dataset}, {method}, {args.folds} folds, mean ± standard deviation, {minutes:.1f} minutes")
        print(f"  {'majority class':26s} {statistics.mean(majority):5.1f} ± {statistics.pstdev(majority):.1f} %")
        for name, values in table.items():
            print(f"  {name:26s} {values.mean():5.1f} ± {values.std():.1f} %", flush=True)
    return {"table": table, "majority": np.array(majority), "minutes": minutes, "method": method}


def train_nodes(args, process, splits, hops=0):
    """PPI, its look-alike or chains; a step is --batch-size graphs, divided over the processes.

    Returns {"table": {protocol: test score (%)}, "collapsed": what happened or "", "minutes"}, or None if stopped.
    """
    device, world, rank = process.device, process.world_size, process.rank
    if args.batch_size % world:
        process.die(f"--batch-size {args.batch_size} is not divisible by the {world} processes")
    each, binary = args.batch_size // world, splits[0][0].y.dim() == 2
    if len(splits[0]) % args.batch_size:
        process.die(f"--batch-size {args.batch_size} does not divide the {len(splits[0])} training graphs")
    if min(map(len, splits)) < world:
        process.die(f"{min(map(len, splits))} graphs in a split for {world} processes: use fewer (--nproc_per_node)")
    kind = "sym" if args.dataset == "chains" else ADJACENCY[args.ppi_model]
    classes = splits[0][0].y.shape[1] if binary else int(max(graph.y.max() for graph in splits[0])) + 1
    groups = [splits[0][i:i + args.batch_size] for i in range(0, len(splits[0]), args.batch_size)]
    batches = [make_batch(group[rank * each:(rank + 1) * each], device, kind=kind) for group in groups]
    shares = [world * len(batch.x) / sum(len(graph.x) for graph in group) for batch, group in zip(batches, groups)]
    evaluation = {name: make_batch(graphs[rank::world], device, kind=kind)
                  for name, graphs in zip(("val", "test"), splits[1:])}
    # With a raw adjacency the projection's radius is that of a step's graph with the largest rho, of all processes.
    for batch in [*batches, *evaluation.values()] if kind == "raw" else []:
        batch.rho = max(process.gather(batch.rho))
    run = Run(args, process, f"ignn-{args.dataset}", processes=world,
              data=checksum([graph for graphs in splits for graph in graphs]))
    model = node_model(args, splits[0][0].x.shape[1], classes, hops).to(device)
    metric, constant = ("micro-F1", constant_f1(splits[1])) if binary else ("accuracy", 100 * torch.cat(
        [graph.y for graph in splits[1]]).bincount().max().item() / sum(len(graph.y) for graph in splits[1]))
    method, about = describe(model, args)
    run.start(f"{about}; {' + '.join(str(len(s)) for s in splits)} graphs of {args.dataset}, {args.epochs} epochs of "
              f"{len(groups)} steps; a constant prediction has a validation {metric} of {constant:.1f} %")
    curve = train(args, run, model, batches, shares, evaluation)
    if curve is None:
        return stopped(args, process, run.stopped_by())
    val, test, loss = curve["val"], curve["test"], curve["loss"][-1] + curve["test_loss"][-1]
    best = max(range(len(val)), key=lambda e: val[e])
    what = [collapses(val, constant, metric)] if binary else []
    what += [] if math.isfinite(loss) else [f"the loss became {loss} in epoch {len(val)}"]
    collapsed, minutes = "; ".join(filter(None, what)), run.seconds / 60
    table = {"epoch by val": test[best], "best test epoch": max(test), "last epoch": test[-1]}
    if collapsed:
        run.report("collapse", show=False, step=len(val), what=collapsed)
    if rank == 0:
        write_results(args, minutes=minutes, val_epoch=best + 1, collapsed=collapsed, curve=list(zip(val, test)), **table)
        print(f"{args.dataset}, {method}, test {metric}: "
              + ", ".join(f"{name} {value:.2f} %" for name, value in table.items()) + f"; {minutes:.1f} minutes"
              + (f"; {collapsed}" if collapsed else ""), flush=True)
    if not math.isfinite(loss) and not args.table4:
        run.broke(collapsed, len(val), "try a lower --lr, --clip or --ppi-model robust")
    return {"table": table, "collapsed": collapsed, "minutes": minutes, "method": method}


def collapses(val, constant, metric):
    """What went wrong in a training on PPI, read off its validation scores (%) after each epoch; "" if nothing did."""
    found, down, best = [], False, 0.0
    for epoch, score in enumerate(val, start=1):
        if not down and best > constant + 5 and score <= constant + 1:
            found.append(f"collapsed in epoch {epoch}: validation {metric} fell from {best:.1f} to {score:.1f} %, a "
                         "constant prediction's")
            down = True
        elif down and score > constant + 5:
            found.append(f"recovered in epoch {epoch}")
            down = False
        best = max(best, score)
    if best <= constant + 1:
        found.append(f"never above the constant prediction's {constant:.1f} %")
    return "; ".join(found)


# --- evaluation ---------------------------------------------------------------------------------------------

def node_loss(logits, y, reduction="mean"):
    """Binary cross entropy over nodes and labels (y float), or cross entropy over nodes (y long)."""
    loss = F.binary_cross_entropy_with_logits if y.is_floating_point() else F.cross_entropy
    return loss(logits, y, reduction=reduction)


@torch.no_grad()
def evaluate(model, batch, process):
    """(score in %, loss) over the batches of all processes: micro-F1 of logit > 0 for labels 0 or 1, else accuracy."""
    training = model.training
    model.eval()
    logits, y = model(batch), batch.y
    model.train(training)
    if y.is_floating_point():               # F1 = 2 tp / (predicted + true)
        counts = [2 * ((logits > 0) * y).sum(), (logits > 0).sum() + y.sum()]
    else:
        counts = [(logits.argmax(dim=1) == y).sum(), y.new_tensor(len(y))]
    # Cross entropy is the same for logits and log-probabilities.
    sums = torch.stack([c.double() for c in (*counts, node_loss(logits, y, "sum"), y.new_tensor(y.numel()))])
    right, of, loss, n = process.sum(sums).tolist()                         # host sync
    return 100 * right / max(of, 1), loss / n


def constant_f1(graphs):
    """The best micro-F1 (%) of a prediction that is the same for all nodes: what a collapsed network can score."""
    positive = torch.cat([graph.y for graph in graphs]).double().sum(dim=0).sort(descending=True).values       # (C,)
    predicted = sum(len(graph.y) for graph in graphs) * torch.arange(1, len(positive) + 1)      # with the j likeliest
    return 100 * (2 * positive.cumsum(dim=0) / (predicted + positive.sum()).clamp_min(1)).max().item()


def protocols(results):
    """{protocol: accuracies of the folds}, from {fold: {"test": accuracy after each epoch, ...}}."""
    folds = sorted(results)
    test = np.array([results[fold]["test"] for fold in folds])                                  # (folds, epochs)
    table = {"best test epoch per fold": test.max(axis=1), "one epoch for all": test[:, test.mean(axis=0).argmax()],
             "last epoch": test[:, -1]}
    if results[folds[0]].get("val"):
        epochs = [max(range(test.shape[1]), key=lambda e: (results[fold]["val"][e], -results[fold]["val_loss"][e]))
                  for fold in folds]                            # ties: the lower loss
        table["epoch by val"] = test[range(len(folds)), epochs]
    if results[folds[0]].get("test_2a"):
        test = np.array([results[fold]["test_2a"] for fold in folds])
        table["2A + I: best per fold"], table["2A + I: last"] = test.max(axis=1), test[:, -1]
    return table


def evaluate_checkpoint(args, process):
    """--eval: prints the scores of a checkpoint: of all folds, of one fold, of a run on nodes, or an official one."""
    state, graphs = load_checkpoint(args.resume), args.dataset in ("COX2", "PROTEINS")
    ours = is_ours(state)
    if ours and graphs != ("weights" in state or "fold" in state.get("facts", {})):
        die(f"--resume {args.resume} is not of --dataset {args.dataset}")
    data = load_tu(args, process) if graphs else load_nodes(args, process)
    if not ours and not graphs and args.ppi_model == "robust":
        die(f"--resume {args.resume} is of another release, whose models have a raw adjacency: give --ppi-model literal "
            "or zoo")

    def model_with(weights):
        try:
            model = graph_model(args, data, args.seed) if graphs else (
                node_model(args, data[0][0].x.shape[1], data[0][0].y.shape[1]))
            model.load_state_dict(weights) if ours else load_official(model, weights)
            return model.to(process.device)
        except (ValueError, RuntimeError, KeyError, AttributeError) as error:
            die(f"--resume {args.resume} does not fit the model (--dataset, --hidden, --ppi-model): "
                f"{' '.join(str(error).split())[:400]}")

    if not graphs:
        model = model_with(state["model"] if ours else state)
        for name, part in zip(("validation", "test"), data[1:]):
            batch = make_batch(part, process.device, kind=ADJACENCY[args.ppi_model])
            print("{}: micro-F1 {:.2f} %, loss {:.4f}".format(name, *evaluate(model, batch, process)), flush=True)
        return
    weights, folds = {None: state}, {None: range(len(data))}
    if ours:
        weights = state["weights"] if "weights" in state else {state["facts"]["fold"]: state["model"]}
        for name in ("folds", "seed", "unstratified_folds", "val"):
            if state["args"][name] != getattr(args, name):
                die(f"--{name.replace('_', '-')}: the folds of {args.resume} are those of {state['args'][name]}")
        if checksum(data) != state.get("data", state.get("facts", {}).get("data")):
            die(f"--resume {args.resume} is of a run on other data than --data {args.data} holds")
        folds = {fold: numbers[2] for fold, numbers in enumerate(split(args, [int(graph.y) for graph in data]))}
    for fold, w in sorted(weights.items()):
        model, batch = model_with(w), make_batch([data[i] for i in folds[fold]], process.device, with_2a=True)
        scores = [evaluate(model, b, process)[0]
                  for b in (batch, dataclasses.replace(batch, adjacency=batch.adjacency_2a))]
        print(f"{f'fold {fold}' if ours else 'all graphs'}: accuracy {scores[0]:.2f} % of {len(folds[fold])}; with "
              f"2A + I {scores[1]:.2f} %", flush=True)


# --- benchmark ----------------------------------------------------------------------------------------------

def molecules(count, seed):
    """Graphs of COX2's size (41 nodes, 43.5 edges) for the benchmark: random trees with three more edges."""
    rng = torch.Generator().manual_seed(seed)
    graphs = []
    for i in range(count):
        n = int(torch.randint(32, 51, (1,), generator=rng))
        parent = (torch.arange(1, n) - 1 - (3 * torch.rand(n - 1, generator=rng)).long()).clamp_min(0)
        more = torch.randint(0, n, (2, 3), generator=rng)
        edge_index = torch.cat([torch.stack([torch.arange(1, n), parent]), more[:, more[0] != more[1]]], dim=1)
        x = F.one_hot(torch.randint(0, 8, (n,), generator=rng), 35).float()
        graphs.append(pyg().data.Data(x=x, edge_index=pyg().utils.to_undirected(edge_index, num_nodes=n), y=torch.tensor([i % 2])))
    return graphs


def run_benchmark(args, process):
    """--benchmark: training steps on generated graphs by implicit, UPG and NPG; NPG's memory at k = 1 and 20."""
    device, nodes = process.device, args.dataset in ("PPI", "PPI-synthetic")
    if nodes:
        graphs = ppi_lookalike(args.graph_scale, args.seed)[0][:args.batch_size]
        batch, model = make_batch(graphs, device, kind=ADJACENCY[args.ppi_model]), node_model(args, 50, 121)
    else:
        graphs = molecules(args.batch_size, args.seed)
        batch, model = make_batch(graphs, device), graph_model(args, graphs, args.seed)
    model, calls = model.to(device), {}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)

    def row(grad, k):
        solve = functools.partial(solver_settings(args), grad=grad, k=k)

        def forward():
            for layer in model.implicit:
                layer.solve = solve
            calls[grad] = []
            logits = model(batch, log=calls[grad])
            return node_loss(logits, batch.y) if nodes else F.nll_loss(logits, batch.y)

        return forward

    def finish():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.project_(batch.rho)

    rows = {grad: row(grad, args.k) for grad in ("implicit", "upg", "npg")}
    rows.update({f"npg, k = {k}": row("npg", k) for k in (1, 20)})
    layer = model.implicit[0]
    with torch.no_grad():
        W, *Omegas = layer.weights(batch.rho)
        B = layer.injection(batch.x, batch.adjacency, *Omegas)
    benchmark(rows, finish, process, unit="graphs", n=len(graphs), h0=B, repeats=5,
              f=functools.partial(layer.f, B=B, W=W, A=batch.adjacency),
              solve=functools.partial(SOLVERS[args.solver](batch), max_iter=args.max_iter, tol=args.tol,
                                      stop_mode=args.stop_mode),
              about=f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(graphs)} generated "
              f"{'look-alikes of graphs of PPI' if nodes else 'graphs of the size of those of COX2'}, {len(batch.x)} "
              f"nodes, {args.solver} to {args.tol:g}, backward {args.backward_solver} to {args.backward_tol:g}, "
              f"k = {args.k}")
    for which in ("forward", "backward"):
        evals = {grad: [r.n_evals for name, r in log if name == which] for grad, log in calls.items()}
        print(f"calls of f per {which} solve: " + ", ".join(
            f"{grad} {statistics.mean(n):.1f}" for grad, n in evals.items() if n), flush=True)


# --- main ---------------------------------------------------------------------------------------------------

def load_nodes(args, process):
    """[train, val, test] of PPI, its look-alike or the chains."""
    if args.dataset == "chains":
        return chains(args.chain_length, args.seed)
    if args.dataset == "PPI-synthetic":
        return ppi_lookalike(args.graph_scale, args.seed)
    root = Path(args.data) / "PPI"

    def make():
        for split in () if (root / "processed").is_dir() else ("train", "valid", "test"):       # PyG drops such edges
            if (root / "raw" / f"{split}_graph.json").is_file():
                graph = json.loads((root / "raw" / f"{split}_graph.json").read_text())
                ends = [link[end] for link in graph["links"] for end in ("source", "target")]
                if min(ends) < 0 or max(ends) >= len(graph["nodes"]):
                    raise ValueError(f"an edge to a node outside 0..{len(graph['nodes']) - 1} in {split}_graph.json")
        return [list(pyg().datasets.PPI(root, split=name)) for name in ("train", "val", "test")]

    splits = load(args, process, make)
    for graphs in splits:
        check_graphs(args, graphs, nodes=True)
    return splits


def table4(args, process):
    """Trains METHODS, each in a folder of its own, and prints the table beside the paper's."""
    data = load_tu(args, process) if args.dataset in ("COX2", "PROTEINS") else load_nodes(args, process)
    args.out, rows = output_folder(args, process, f"ignn-{args.dataset}"), []
    for i, (grad, lam) in enumerate(METHODS):
        name = grad if lam is None else f"{grad}-{lam}"
        one = argparse.Namespace(**{**vars(args), "grad": grad, "lam": lam or args.lam, "out": f"{args.out}/{name}"})
        row = (train_graphs if args.dataset in ("COX2", "PROTEINS") else train_nodes)(one, process, data)
        if row is None:
            return
        rows.append((row["method"], PAPER.get(args.dataset, [""] * 4)[i], row))
    if process.rank == 0:
        names = list(rows[0][2]["table"])
        nodes, note = "majority" not in rows[0][2], any(row.get("collapsed") for *_, row in rows)
        print(f"\nTable 4, {args.dataset}" + (f", --ppi-model {args.ppi_model}; the paper has the best of three runs"
                                              if nodes else ""))
        print("| method | paper | " + " | ".join(names) + " | minutes |" + note * " note |" + "\n"
              + "|---" * (len(names) + 3 + note) + "|")
        for method, paper, row in rows:
            cells = [f"{v.mean():.1f} ± {v.std():.1f}" if isinstance(v, np.ndarray) else f"{v:.2f}"
                     for v in row["table"].values()]
            print(f"| {method} | {paper} | " + " | ".join(cells) + f" | {row['minutes']:.1f} |"
                  + note * f" {row.get('collapsed', '')} |")
        if not nodes:
            v = rows[0][2]["majority"]
            print(f"Majority class of the test folds: {v.mean():.1f} ± {v.std():.1f} %", flush=True)


def keep_freed_memory():
    """Lets glibc keep what is freed: a step's tensors of 1 MB each came from the kernel anew, page by page.

    That was 40 % of a UPG step on a CPU (COX2, batch 128).  Where the C library has no mallopt, nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):       # Windows has no CDLL(None)
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2 ** 31 - 1)           # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2 ** 25)               # M_MMAP_THRESHOLD, its largest value


def main(args):
    keep_freed_memory()
    process = init_process()
    if args.benchmark:
        run_benchmark(args, process)
    elif args.eval:
        evaluate_checkpoint(args, process)
    elif args.table4:
        table4(args, process)
    elif args.dataset in ("COX2", "PROTEINS"):
        train_graphs(args, process, load_tu(args, process))
    else:
        splits = load_nodes(args, process)
        row = train_nodes(args, process, splits)
        if args.dataset == "chains" and row:
            few_args = argparse.Namespace(**{**vars(args), "out": f"{args.out}/few-hops",
                                             "resume": args.resume and "auto"})
            few = train_nodes(few_args, process, splits, hops=args.hops)
            if few and process.rank == 0:
                print(f"accuracy on chains of up to {args.chain_length} nodes: equilibrium "
                      f"{row['table']['epoch by val']:.1f} %, {2 * args.hops} hops "
                      f"{few['table']['epoch by val']:.1f} %, guessing 50.0 %", flush=True)
    process.end()


if __name__ == "__main__":
    main(parse_args())
