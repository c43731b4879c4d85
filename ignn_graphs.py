"""Implicit graph networks with phantom gradients: "On Training Implicit Models" (NeurIPS 2021), Table 4.

    python ignn_graphs.py --dataset chains                  # generated graphs: equilibrium against 4 hops
    python ignn_graphs.py --dataset COX2                    # UPG A_{5,0.5}, 10 stratified folds, 200 epochs
    python ignn_graphs.py --dataset PROTEINS --table4       # four methods, same folds and weights, as a table
    torchrun --nproc_per_node=2 ignn_graphs.py --dataset COX2 --table4      # folds divided over two processes
    python ignn_graphs.py --dataset PPI --ppi-model literal --epochs 1000   # Table 4's PPI: the paper's model
    python ignn_graphs.py --dataset PPI-synthetic --ppi-model robust        # generated look-alike of PPI
    python ignn_graphs.py --dataset COX2 --benchmark        # step time and memory of the three gradients

Data: --data DIR (default data).  PyG downloads COX2, PROTEINS and PPI if they are not in DIR/NAME/raw/.

Table 4, the paper's values in %.  --table4 trains all four rows.  The flags at the end of a row train it:
          COX2        PROTEINS    PPI
          84.1 ± 2.9  78.6 ± 4.1  97.6      --grad implicit --backward-solver fixed-point
          83.9 ± 3.0  78.4 ± 4.2  98.2      --grad upg --lam 0.5
          83.9 ± 2.7  78.6 ± 4.2  97.4      --grad upg --lam 0.8
          83.0 ± 2.9  78.8 ± 4.2  96.2      --grad upg --lam 1.0
UPG A_{k,lam} is the phantom gradient of k unrolled steps with damping lam, Eq. (16).  NPG uses a Neumann
series instead, Eq. (17).  The paper's implicit row solves the backward system by plain iteration.  So does
this file, but chains and --ppi-model robust and zoo use GMRES by default.
The paper reports the best TEST epoch of each fold.  We also print the best common epoch, the last epoch and,
with --val, the epoch chosen on held-out training graphs.  Three flags do what the official release does:
    --evaluate-2a-too       evaluates with the matrix of 2A + I, after training with A + I
    --unstratified-folds    shuffles the graphs after it has stratified them
    --ppi-model literal     raw adjacency, projection of W by the radius of a step's graph, absolute tolerance

The layer (IGNN, Gu et al. 2020), with one row per node, input features V and adjacency matrix A:
    H* = relu(A H* W^T + A V Omega_1^T), ||W||_inf <= kappa / rho(A)
||W||_inf is the largest L1 norm of a row, rho(A) the spectral radius, kappa < 1 a constant.  The bound makes
the layer a contraction, so H* exists and plain iteration finds it.  Training projects W to keep the bound.

What makes it faster:
    - batches and their sparse matrices (CSR, with the transpose for the backward pass) are built once
    - W is projected once per step, all rows in one sort
    - A V Omega_1^T is computed before the solve, and each graph stops as soon as it is solved
    - freed memory is kept for the next step
    - the processes divide the folds (on a CPU with OMP_NUM_THREADS=1: the matrices are too small for threads)
There is no --amp, --compile or --cuda-graph, because batches differ in size and solves stop at a tolerance.

Measured: assets/results.md has Table 4 for COX2, PROTEINS and PPI-synthetic, and step times on an H200.  PPI
has not been run.

Differs from IGNN's code:
    - A + I in training and evaluation (there: 2A + I in evaluation)
    - stratified folds (there: shuffled after stratification)
    - residual per graph and relative (there: the batch's largest entry)
    - W is projected once per step, not in each forward pass, so that evaluation does not change W.  (With a
      raw adjacency each pass projects a copy of W by the radius of its graphs.)
    - the backward solve stops at a residual relative to dL/dH* (there: absolute, from A V Omega_1^T)
    - no Omega_2 and bias, which are never used there: 27,010 of COX2's 37,634 counted parameters are used
--ppi-model zoo is the model of torchdeq's examples ("deq-zoo") with the solver settings of this file (there:
40 iterations, tolerance 1e-3).
"""
import argparse
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import io
import json
import math
import os
import re
import signal
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

# Puts large CPU tensors into 2 MB pages, which is faster.  torch reads this at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import (Process, Run, add_run_flags, anderson, benchmark, broyden, catch_signals, die,
                    equilibrium, finite, fixed_point, gmres, health, init_process, is_ours,
                    keep_freed_memory, launched, load_checkpoint, load_weights, lock, make_parser,
                    output_folder, parse_flags, save_checkpoint, seed_everything, upg, within)

# The paper's Table 4, in the order of METHODS.
PAPER = {"COX2": ("84.1 ± 2.9", "83.9 ± 3.0", "83.9 ± 2.7", "83.0 ± 2.9"),
         "PROTEINS": ("78.6 ± 4.1", "78.4 ± 4.2", "78.6 ± 4.2", "78.8 ± 4.2"),
         "PPI": ("97.6", "98.2", "97.4", "96.2")}
METHODS = (("implicit", None), ("upg", 0.5), ("upg", 0.8), ("upg", 1.0))        # Table 4's rows

# Defaults of the options, by --dataset.  For PPI and its look-alike the entry of --ppi-model overrides them.
OF_GRAPHS = dict(hidden=64, kappa=0.9, epochs=200, batch_size=128, lr=0.001, clip=0.0, tol=1e-5,
                 solver="fixed-point", backward_solver="fixed-point")
OF_NODES = dict(kappa=0.98, batch_size=1, lr=0.005, clip=1.0, tol=1e-6, solver="anderson",
                backward_solver="gmres")
PRESETS = {"COX2": OF_GRAPHS, "PROTEINS": OF_GRAPHS,
           "PPI": {**OF_NODES, "hidden": 256, "epochs": 1000},
           "PPI-synthetic": {**OF_NODES, "hidden": 32, "epochs": 100},
           "chains": {**OF_NODES, "hidden": 16, "epochs": 200, "batch_size": 64, "lr": 0.01},
           "robust": {}, "zoo": dict(clip=0.0),
           "literal": dict(clip=0.0, tol=3e-6, solver="fixed-point", backward_solver="fixed-point")}
# Options that only these data sets use.  On others they would have no effect, so they are refused.
ONLY_FOR = {("COX2", "PROTEINS", "PPI"): "data",
            ("COX2", "PROTEINS"): "folds val unstratified_folds evaluate_2a_too dropout",
            ("PPI", "PPI-synthetic"): "ppi_model", ("PPI", "PPI-synthetic", "chains"): "clip",
            ("PPI-synthetic",): "graph_scale", ("chains",): "chain_length hops"}
ADJACENCY = {"robust": "rho", "literal": "raw", "zoo": "raw"}           # of --ppi-model, for make_batch


def presets(args):                          # {option: value}
    ppi = args.dataset in ("PPI", "PPI-synthetic")
    return {**PRESETS[args.dataset], **(PRESETS[args.ppi_model] if ppi else {})}


def parse_args(argv=None):
    p = make_parser("Trains IGNN on graphs.  Without options: the generated chains, in a minute.  The "
                    "defaults shown are those of the chains.  PRESETS has the others.")
    count, nonnegative = within(int, "[1, inf)"), within(float, "[0, inf)")
    add = p.add_argument_group("data").add_argument
    add("--dataset", choices=["COX2", "PROTEINS", "PPI", "PPI-synthetic", "chains"], default="chains",
        help="classification of graphs (COX2, PROTEINS) or nodes (PPI), a generated look-alike of PPI "
        "(PPI-synthetic), or a generated long-range task (chains)")
    add("--data", default="data", type=os.path.expanduser,
        help="folder with NAME/raw/*.  PyG downloads what is not there")
    add("--folds", type=within(int, "[2, inf)"), default=10, help="folds of the cross-validation")
    add("--val", action="store_true", help="also choose an epoch on a held-out tenth of each training fold")
    add("--unstratified-folds", action="store_true",
        help="the official folds: graphs are shuffled after stratification")
    add("--evaluate-2a-too", action="store_true",
        help="also evaluate with the normalised 2A + I, as the official release does, in separate columns")
    add("--graph-scale", type=within(float, "(0, inf)"), default=0.1,
        help="nodes of PPI-synthetic's graphs as a fraction of PPI's")
    add("--chain-length", type=within(int, "[2, inf)"), default=20, help="nodes of the longest chain")

    add = p.add_argument_group("model").add_argument
    add("--hidden", type=count, help="features of a node in the state")
    add("--kappa", type=within(float, "(0, 1)"), help="bound of ||W||_inf rho(A), below 1 so that H* exists")
    add("--dropout", type=within(float, "[0, 1)"), default=0.5,
        help="probability of dropout before the last layer of COX2 and PROTEINS")
    add("--ppi-model", choices=["robust", "literal", "zoo"], default="robust",
        help="'robust': A / rho(A), relative tolerance, clipping.  'literal': the paper's model, raw A.  "
        "'zoo': torchdeq's model, raw A, spectral norm and Omega_2")
    add("--hops", type=count, default=2, help="iterations in each of the two layers of the few-hop network "
        "for chains, which therefore sees twice as far")

    add = p.add_argument_group("equilibrium").add_argument
    add("--grad", choices=["implicit", "upg", "npg"], default="upg", help="how the gradient is computed")
    add("--k", type=count, default=5, help="steps of the phantom gradient")
    add("--lam", type=within(float, "(0, 1]"), default=0.5, help="damping of the phantom gradient")
    add("--solver", choices=["fixed-point", "anderson", "broyden"], help="solver that finds the equilibrium")
    add("--max-iter", type=count, default=300, help="steps of the forward solver")
    add("--tol", type=nonnegative, help="residual at which a graph counts as solved: relative, or with "
        "--ppi-model literal the largest entry")
    add("--backward-solver", choices=list(SOLVERS),
        help="solver of the backward pass of --grad implicit (the paper's is fixed-point)")
    add("--backward-max-iter", type=count, default=300, help="steps of the backward solver")
    add("--backward-tol", type=nonnegative, help="residual, relative to dL/dH*, at which a graph counts as "
        "solved in the backward pass (default: ten times --tol, 1e-5 with literal)")

    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, help="passes over the training graphs")
    add("--batch-size", type=count, help="graphs per step over all processes (COX2 and PROTEINS: per fold)")
    add("--lr", type=within(float, "(0, inf)"),
        help="Adam's learning rate.  On COX2 and PROTEINS it is halved from epoch 51 on")
    add("--clip", type=nonnegative, help="largest norm of the gradient.  0 means no clipping")
    modes = add_run_flags(p, "ignn-DATASET", seed=42, log_every=None,
                          log_unit="epochs (default: a tenth of all)")
    modes.add_argument("--table4", action="store_true",
                       help="train implicit and UPG with lam 0.5, 0.8 and 1.0, and print Table 4")
    p.set_defaults(stop_mode=None)          # no flag: it follows from --ppi-model
    # given: options that differ from the parser's own defaults.  of_a_run: those a checkpoint does not set.
    plain = vars(p.parse_args(argv))
    given = {name for name, value in plain.items() if value != p.get_default(name)}
    of_a_run = {"out", "resume", "save_every", "log_every", "eval", "benchmark", "table4"}
    args = parse_flags(p, argv, presets, from_checkpoint=" ".join(plain.keys() - of_a_run))

    # Rejects combinations that make no sense, before any data are read.
    for datasets, names in ONLY_FOR.items():
        for name in given & set(names.split()) if args.dataset not in datasets else ():
            # The benchmark of PPI generates its graphs, so it does have a scale.
            if not (name == "graph_scale" and args.dataset == "PPI" and args.benchmark):
                p.error(f"--{name.replace('_', '-')} is only for {' and '.join(datasets)}: it has no effect "
                        f"on {args.dataset}")
    file = args.resume not in (None, "auto")            # --resume FILE
    if args.table4 and (args.dataset == "chains" or given & {"grad", "lam"} or file):
        p.error("--table4 is not for chains, and sets --grad and --lam itself.  Continue it with "
                "--out DIR --resume auto")
    if file and not args.eval and args.dataset in ("COX2", "PROTEINS"):
        p.error("--resume: each fold has a checkpoint of its own; continue all by --out DIR --resume auto")
    if args.eval and (args.dataset == "chains" or launched()):
        p.error("--eval is for one process, and not for chains: their run prints its figures at its end")
    if args.benchmark and args.dataset not in ("COX2", "PPI", "PPI-synthetic"):
        p.error("--benchmark needs --dataset COX2, PPI or PPI-synthetic: it generates graphs of those sizes")
    # These settings follow from other options.
    literal = args.ppi_model == "literal" and args.dataset in ("PPI", "PPI-synthetic")
    args.stop_mode = "max" if literal else "rel"
    if args.backward_tol is None:
        args.backward_tol = 1e-5 if literal else 10 * args.tol
    args.log_every = args.log_every or max(1, args.epochs // 10)
    return args


@functools.cache
def pyg():
    """torch_geometric, imported only when it is needed, because that takes seconds."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
        import torch_geometric.data
        import torch_geometric.datasets
        import torch_geometric.nn.conv.gcn_conv
        import torch_geometric.utils
    return torch_geometric


# --- data: graphs to one block-diagonal batch ---------------------------------------------------------------

class Sparse(NamedTuple):
    """A sparse matrix and its transpose, both CSR (compressed rows).

    The transpose is stored because torch's own backward pass would compute it each time.
    """
    matrix: torch.Tensor
    transpose: torch.Tensor


def sparse(index, values, shape):
    """A Sparse with E values at index (2, E), their rows and columns.  Values at the same place are added."""
    with warnings.catch_warnings():         # torch calls its CSR tensors a beta feature
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
        matrix, transpose = (torch.sparse_coo_tensor(i, values, s).coalesce().to_sparse_csr()
                             for i, s in ((index, shape), (index.flip(0), shape[::-1])))
    return Sparse(matrix, transpose)


@dataclasses.dataclass
class Graphs:
    """A batch of G graphs on the device, stored as one graph of n nodes with a block-diagonal adjacency."""
    x: torch.Tensor                 # (n, p)
    y: torch.Tensor                 # labels: (G,) long of graphs, or (n,) long or (n, C) float of nodes
    adjacency: Sparse               # (n, n)
    offsets: torch.Tensor           # (G + 1,) first row of each graph, and n
    longest: int                    # nodes of the largest graph
    slots: torch.Tensor             # (n,) place of each row when graphs are padded to the longest
    rho: float | None               # spectral radius of a raw adjacency, None if it is normalised (1 at most)
    adjacency_2a: Sparse | None     # adjacency of the official evaluation, if asked for


def make_batch(graphs, device, *, kind="sym", with_2a=False, dtype=torch.float32):
    """A batch of a list of PyG graphs.  Build it once, because it does not change in training.

    kind "sym": S = (D + I)^-1/2 (A + I) (D + I)^-1/2, D the degrees, with rho(S) = 1.
    kind "rho": A / rho(A), each graph by its own radius.  kind "raw": A.
    """
    batch = pyg().data.Batch.from_data_list(graphs)
    n, longest = batch.num_nodes, int(batch.ptr.diff().max())
    index, offsets, graph = (t.to(device) for t in (batch.edge_index, batch.ptr, batch.batch))  # (n,) graph

    def normalised(weight):
        """(D + I)^-1/2 (w A + I) (D + I)^-1/2 with D the degrees of w A."""
        values = torch.full(index.shape[1:], weight, dtype=dtype, device=device)            # (E,)
        return sparse(*pyg().nn.conv.gcn_conv.gcn_norm(index, values, n, dtype=dtype), (n, n))

    rho = None
    if kind == "sym":
        adjacency = normalised(1.0)
    else:
        ones = torch.ones(index.shape[1], dtype=dtype, device=device)
        adjacency = sparse(index, ones, (n, n))
        # The radius of a raw A sets the projection, so the scores of an official checkpoint depend on it.
        radius = spectral_radii(adjacency, offsets, graph, tol=1e-10 if kind == "raw" else 1e-3)    # (G,)
        if kind == "raw":
            rho = radius.max().item() + 1e-5                # of the batch, as in the official release
        else:
            adjacency = sparse(index, ones / radius.to(dtype)[graph[index[0]]], (n, n))
    # Graph g begins at row g * longest when padded, and at offsets[g] here.
    slots = graph * longest + torch.arange(n, device=device) - offsets[graph]                   # (n,)
    return Graphs(batch.x.to(device, dtype), batch.y.to(device), adjacency, offsets, longest, slots, rho,
                  normalised(2.0) if with_2a else None)


def spectral_radii(A, offsets, graph, tol=1e-3, max_iter=1000):
    """An upper bound of each graph's rho(A), (G,), within tol of it unless max_iter is reached first.

    A must be symmetric and >= 0.  Power iteration with A + I also converges for a bipartite graph.  For x > 0
    the Rayleigh quotient x^T A x / x^T x is a lower bound and max_i (A x)_i / x_i an upper bound
    (Collatz-Wielandt).  With the upper bound the projection's radius kappa / rho is never too large.
    """
    matrix = A.matrix.double()
    x = torch.ones(matrix.shape[0], 1, dtype=torch.float64, device=graph.device)
    for i in range(max_iter):
        y = torch.sparse.mm(matrix, x)
        upper = torch.segment_reduce((y / x)[:, 0], "max", offsets=offsets, initial=0)          # (G,)
        if i % 10 == 9:                     # not at each step: the comparison waits for the device
            lower, square = (torch.segment_reduce(v[:, 0], "sum", offsets=offsets) for v in (x * y, x * x))
            if bool((upper - lower / square <= tol * upper).all()):                 # host sync
                break
        x = x + y                           # (A + I) x
        largest = torch.segment_reduce(x[:, 0], "max", offsets=offsets, initial=0)
        x = (x / largest[graph, None]).clamp_min(1e-200)       # > 0 also in a component of smaller radius
    return upper


# --- data: COX2, PROTEINS, PPI ------------------------------------------------------------------------------

def load(args, process, make):
    """Returns make(folder), a data set that PyG converts in a temporary folder.

    The first process downloads for the others.  By itself PyG would keep its converted files beside raw/, and
    use them even if raw/ has changed since.  If anything is wrong with the files, the run stops with one line
    that says what to do.
    """
    raw = os.path.join(args.data, args.dataset, "raw")
    if args.dataset == "PPI":
        names = [f"{split}_{part}" for split in ("train", "valid", "test")
                 for part in ("graph.json", "feats.npy", "labels.npy", "graph_id.npy")]
    else:
        names = [f"{args.dataset}_{part}.txt"
                 for part in ("A", "graph_indicator", "graph_labels", "node_labels")]

    def read():         # also looks for missing files, which another process may have downloaded by then
        missing = [name for name in names if not os.path.isfile(os.path.join(raw, name))]
        there = len(missing) < len(names)
        if there and missing:
            die(f"--data {args.data}: {raw} lacks {', '.join(missing[:4])}{' and more' * (len(missing) > 4)};"
                " unpack it anew, or remove the folder to have it downloaded")
        try:
            # PyG prints two lines at each start.  Only those about a download are worth showing.
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(
                    io.StringIO() if there else sys.stderr):
                return make(folder)
        except Exception as error:          # PyG passes on any error of the network, archive or numbers
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            die(f"--data {args.data}: cannot read {args.dataset} ({type(error).__name__}: {what}); "
                + (f"its files are damaged: unpack {raw} anew" if there else
                   f"unpack it to {raw}, or give this machine internet access"))

    return process.first(read)


def check_graphs(args, graphs, nodes):
    """Stops with one line if a graph's edges, features and labels do not fit together.

    nodes: whether each node has labels, and not each graph one label.
    """
    where = f"--data {args.data}: {args.dataset}"
    if not graphs:
        die(f"{where} holds no graphs")
    for i, graph in enumerate(graphs):
        n = 0 if graph.x is None else len(graph.x)  # nodes
        labels = 0 if graph.y is None else len(graph.y) if nodes else graph.y.numel()
        expected = n if nodes else 1
        if n == 0:
            die(f"{where}: graph {i} has no node features")
        if graph.x.dim() != 2 or graph.x.shape[1] != graphs[0].x.shape[1]:
            die(f"{where}: graph {i} has features of shape {tuple(graph.x.shape)}, not ({n}, "
                f"{graphs[0].x.shape[-1]})")
        if not bool(graph.x.isfinite().all()):
            die(f"{where}: graph {i} has a feature that is not finite")
        try:
            graph.validate()
        except ValueError as error:
            die(f"{where}: graph {i} has an edge to a node outside 0..{n - 1} ({error})")
        if not graph.is_undirected():
            die(f"{where}: graph {i} has an edge in one direction only: A must be symmetric")
        if nodes and graph.edge_index.numel() == 0:
            die(f"{where}: graph {i} has no edges, so rho(A) = 0 and its projection has no radius; remove it")
        if labels != expected:
            die(f"{where}: graph {i} has {labels} labels for {f'{n} nodes' if nodes else 'one graph'}")
        if nodes and graph.y.dim() == 2 and not bool(((graph.y == 0) | (graph.y == 1)).all()):
            die(f"{where}: graph {i} has a label that is neither 0 nor 1")
    return graphs


def load_tu(args, process):
    """COX2 or PROTEINS as a list of graphs, with one-hot node labels as x."""
    def make(folder):
        raw = Path(args.data) / args.dataset / "raw" / args.dataset
        if os.path.isfile(f"{raw}_A.txt"):          # rejects what PyG would silently drop or shift
            lines = {part: Path(f"{raw}_{part}.txt").read_text()
                     for part in ("A", "graph_indicator", "graph_labels", "node_labels")}
            nodes = lines["graph_indicator"].count("\n")
            ends = np.loadtxt(f"{raw}_A.txt", delimiter=",", dtype=int)
            if ends.min() < 1 or ends.max() > nodes:
                raise ValueError(f"an edge to a node outside 1..{nodes} in {raw}_A.txt")
            for part, text in lines.items():
                if not text.endswith("\n"):
                    raise ValueError(f"the last line of {raw}_{part}.txt has no end: the file is cut short")
            if lines["node_labels"].count("\n") != nodes:
                raise ValueError(f"{raw}_node_labels.txt has not one line for each of the {nodes} nodes")
        Fresh = type("Fresh", (pyg().datasets.TUDataset,), {"processed_dir": folder})
        dataset = Fresh(args.data, args.dataset)
        return dataset.y, list(dataset)

    labels, graphs = load(args, process, make)
    if labels is None or len(labels) != len(graphs):
        die(f"--data {args.data}: {args.dataset} has {0 if labels is None else len(labels)} labels for "
            f"{len(graphs)} graphs")
    return check_graphs(args, graphs, nodes=False)


def load_nodes(args, process):
    """[train, val, test] of PPI, its look-alike or the chains, each a list of graphs."""
    if args.dataset == "chains":
        return chains(args.chain_length, args.seed)
    if args.dataset == "PPI-synthetic":
        return ppi_lookalike(args.graph_scale, args.seed)
    root = Path(args.data) / "PPI"

    def make(folder):
        for part in ("train", "valid", "test"):
            file = root / "raw" / f"{part}_graph.json"
            if os.path.isfile(file):    # rejects what PyG would silently drop or shift
                links = json.loads(file.read_text())["links"]
                graph_of = np.load(root / "raw" / f"{part}_graph_id.npy")
                ends = np.array([[link["source"], link["target"]] for link in links])       # (links, 2)
                if ends.dtype.kind != "i" or ends.min() < 0 or ends.max() >= len(graph_of):
                    raise ValueError(f"an edge to a node outside 0..{len(graph_of) - 1} in {file.name}")
                if (graph_of[ends[:, 0]] != graph_of[ends[:, 1]]).any():
                    raise ValueError(f"an edge from one graph to another in {file.name}")
                first = np.unique(graph_of, return_index=True)[1]
                if not np.isin(first, ends).all():
                    raise ValueError(f"a graph whose first node has no edge in {file.name}")
        PPI = type("Fresh", (pyg().datasets.PPI,), {"processed_dir": folder})
        return [list(PPI(root, split=part)) for part in ("train", "val", "test")]

    splits = load(args, process, make)
    check_graphs(args, [graph for graphs in splits for graph in graphs], nodes=True)
    return splits


def stratified_folds(labels, folds, seed):
    """Each graph's fold (n,), as by scikit-learn's StratifiedKFold(folds, shuffle=True, random_state=seed).

    In the sorted labels every folds-th goes to the same fold.  This fixes how many graphs of each class a
    fold gets.  Those graphs are then drawn class by class, in the order in which the classes first appear.
    """
    labels, rng = np.asarray(labels), np.random.RandomState(seed)
    classes = labels[np.sort(np.unique(labels, return_index=True)[1])]      # in order of appearance
    # The sorted labels, each as the number of its class.
    ordered = np.repeat(np.arange(len(classes)), [(labels == c).sum() for c in classes])
    fold_of = np.empty(len(labels), dtype=int)
    for c, label in enumerate(classes):
        # Lists each fold as often as it gets this class, then shuffles the list over the class's graphs.
        places = np.repeat(np.arange(folds), [(ordered[i::folds] == c).sum() for i in range(folds)])
        rng.shuffle(places)
        fold_of[labels == label] = places
    return fold_of


def split(args, labels):
    """[(train, val, test) of each fold], lists of graph numbers.  Batches keep the order of `train`.

    --unstratified-folds: the official split.  It stratifies the graphs in the order of the file, but gives
    the resulting fold numbers to shuffled graphs.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed)).numpy()
    fold_of = stratified_folds(labels, args.folds, args.seed)
    if args.unstratified_folds:
        shuffled = np.empty_like(fold_of)
        shuffled[order] = fold_of           # the i-th fold number goes to the i-th shuffled graph
        fold_of = shuffled
    splits = []
    for fold in range(args.folds):
        train, val = order[fold_of[order] != fold], []
        if args.val:
            held_out = stratified_folds(np.asarray(labels)[train], 10, args.seed) == 0
            train, val = train[~held_out], train[held_out]
        splits.append((list(train), list(val), list(np.flatnonzero(fold_of == fold))))
    return splits


def checksum(graphs):
    """Hash of edges, features and labels, to check that a run is resumed on the data it began with."""
    digest = hashlib.sha256()
    for tensor in (t for graph in graphs for t in (graph.edge_index, graph.x, graph.y)):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


# --- data: generated ----------------------------------------------------------------------------------------

PPI_NODES = ((1767, 1377, 2263, 2339, 1578, 1021, 1823, 2488, 591, 3312, 2401, 1878, 1819, 3480, 2794, 2326,
              2650, 2815, 3163, 3021), (3230, 3284), (3224, 2300))     # of the graphs of train, val and test


def ppi_lookalike(scale, seed):
    """[train, val, test], lists of graphs of PPI's sizes times scale: 50 features, 121 labels, a few hubs.

    There are 13.65 edges per node, drawn with probability proportional to the product of the two nodes'
    log-normal weights.  A linear teacher scores a node by its features and its neighbours' mean.  A label is
    1 if its score is above the 70th percentile of the training nodes.
    """
    rng = torch.Generator().manual_seed(seed)
    # The teacher maps a node's own features and its neighbours' mean to scores, (50, 121) each.
    own, around = torch.randn(50, 121, generator=rng), torch.randn(50, 121, generator=rng)
    splits = []
    for sizes in PPI_NODES:
        graphs = []
        for n in (max(30, round(scale * n)) for n in sizes):
            weight = torch.exp(1.15 * torch.randn(n, generator=rng))
            weight = weight.clamp(max=25 * weight.mean().item())            # limits the largest hub
            # At most 0.3 of all pairs in a small graph.  An edge a-b, a < b, is the number a * n + b.
            wanted, edges = round(min(13.65 * n, 0.3 * n * (n - 1) / 2)), torch.empty(0, dtype=torch.long)
            while len(edges) < wanted:      # until enough are left without duplicates and self-loops
                ends = torch.multinomial(weight, 2 * wanted, replacement=True, generator=rng)
                a, b = ends.view(2, -1).sort(dim=0).values
                edges = torch.unique(torch.cat([edges, (a * n + b)[a < b]]))
            edges = edges[torch.randperm(len(edges), generator=rng)[:wanted]]
            edge_index = pyg().utils.to_undirected(torch.stack([edges // n, edges % n]), num_nodes=n)
            # Sparse 0/1 features, shifted and scaled to mean 0 and variance 1.
            x = ((torch.rand(n, 50, generator=rng) < 0.08).float() - 0.08) / math.sqrt(0.08 * 0.92)
            mean = torch.zeros(n, 50).index_add_(0, edge_index[0], x[edge_index[1]])    # sums over neighbours
            mean = mean / pyg().utils.degree(edge_index[0], n).clamp_min(1)[:, None]
            graphs.append(pyg().data.Data(x=x, edge_index=edge_index, y=x @ own + mean @ around))
        splits.append(graphs)
    threshold = torch.cat([graph.y for graph in splits[0]]).quantile(0.7, dim=0)            # (121,)
    for graph in (graph for graphs in splits for graph in graphs):
        graph.y = (graph.y > threshold).float()
    return splits


def chains(length, seed):
    """[train, val, test]: chains of length / 2 to length nodes.  All nodes of a chain have the same class.

    Only the first node's features show the class, so a network that sees t hops (edges) far can only guess
    the class of nodes farther away.
    """
    rng = torch.Generator().manual_seed(seed)
    splits = []
    for count in (64, 32, 32):
        graphs = []
        for i in range(count):
            n = int(torch.randint(max(2, length // 2), length + 1, (1,), generator=rng))
            x = torch.zeros(n, 2)
            x[0, i % 2] = 1                 # chain i is of class i % 2
            path = torch.stack([torch.arange(n - 1), torch.arange(1, n)])   # 0-1, 1-2, ...
            edge_index = pyg().utils.to_undirected(path)
            graphs.append(pyg().data.Data(x=x, edge_index=edge_index, y=torch.full((n,), i % 2)))
        splits.append(graphs)
    return splits


def molecules(count, seed):
    """Graphs of COX2's size (41 nodes, 43.5 edges) for --benchmark: random trees with up to 3 more edges."""
    rng = torch.Generator().manual_seed(seed)
    graphs = []
    for i in range(count):
        n = int(torch.randint(32, 51, (1,), generator=rng))
        # Each node is joined to one of the three before it, so the trees are long, like molecules.
        parent = (torch.arange(1, n) - 1 - (3 * torch.rand(n - 1, generator=rng)).long()).clamp_min(0)
        more = torch.randint(0, n, (2, 3), generator=rng)
        edges = torch.cat([torch.stack([torch.arange(1, n), parent]), more[:, more[0] != more[1]]], dim=1)
        x = F.one_hot(torch.randint(0, 8, (n,), generator=rng), 35).float()
        edge_index = pyg().utils.to_undirected(edges, num_nodes=n)
        graphs.append(pyg().data.Data(x=x, edge_index=edge_index, y=torch.tensor([i % 2])))
    return graphs


# --- model --------------------------------------------------------------------------------------------------

def project_rows(W, v):
    """A copy of W (m, m) with each row moved to the nearest point, in Euclidean norm, of an L1 ball.

    The ball has radius v, so the copy meets IGNN's condition ||W||_inf <= v for the existence of H*.  All
    rows are projected at once.  A row inside the ball stays as it is, bit for bit.  A row outside moves to
    the ball's surface, up to rounding: its absolute values are all reduced by
        theta = (u_1 + ... + u_r - v) / r
    and those below theta become 0.  Here u are the absolute values in descending order, and r is the number
    of j with u_j > (u_1 + ... + u_j - v) / j.
    """
    if not v > 0:
        raise ValueError(f"v, the radius of the L1 ball, must be positive, got {v}")
    size = W.abs()  # (m, m)
    u = size.sort(dim=-1, descending=True).values
    total = u.cumsum(dim=-1)                                                    # u_1 + ... + u_j
    j = torch.arange(1, W.shape[-1] + 1, device=W.device, dtype=W.dtype)
    r = (u * j > total - v).sum(dim=-1, keepdim=True).clamp_min(1)           # 0 only if the row is not finite
    theta = (total.gather(-1, r - 1) - v) / r                                   # (m, 1)
    return torch.where(total[..., -1:] > v, W.sign() * (size - theta).clamp_min(0), W)


class _Propagate(torch.autograd.Function):
    """matrix @ h, with the stored transpose for the backward pass."""

    @staticmethod
    def forward(ctx, h, matrix, transpose):
        ctx.matrices = transpose, matrix
        out = h.new_empty(matrix.shape[0], h.shape[1])
        # With beta=0 `out` is not read.  torch.sparse.mm would first fill it with zeros and copy it.
        return torch.addmm(out, matrix, h, beta=0, out=out)

    @staticmethod
    def backward(ctx, g):                   # the same function, so that it can be differentiated again
        return _Propagate.apply(g.contiguous(), *ctx.matrices), None, None


def propagate(A, h):
    """A h for h (n, m)."""
    return _Propagate.apply(h, *A)


def padded(solver, batch):
    """common.anderson or common.broyden for a batch: its graphs are the samples, padded with zeros.

    They need fewer iterations than plain iteration if the contraction is slow, as with kappa = 0.98.
    offsets=batch.offsets would give the same without padding, but takes about 1.3 times as long on a CPU,
    unless one large graph makes the batch mostly padding.  PyG's to_dense_batch would find the places again
    at each call, and a training step of COX2 would take 1.09 times as long.
    """
    graphs, longest = len(batch.offsets) - 1, batch.longest

    def pack(x):
        """(n, m) -> (G, longest, m)"""
        if graphs * longest != len(x):      # else all graphs have the same size
            x = x.new_zeros(graphs * longest, x.shape[1]).index_copy_(0, batch.slots, x)
        return x.view(graphs, longest, -1)

    def unpack(x):                          # (G, longest, m) -> (n, m)
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


# {name: batch -> solver}.  Each graph is a sample of the solver, so it stops by itself.  memory: gmres
# restarts after 40 products.  Otherwise it would keep room for --backward-max-iter states, 300.
SOLVERS = {"fixed-point": lambda batch: functools.partial(fixed_point, offsets=batch.offsets),
           "anderson": functools.partial(padded, anderson), "broyden": functools.partial(padded, broyden),
           "gmres": lambda batch: functools.partial(gmres, memory=40, offsets=batch.offsets)}


def graph_equilibrium(f, h0, batch, *, solver="fixed-point", backward_solver="gmres", max_iter=300, tol=1e-6,
                      backward_max_iter=300, backward_tol=1e-5, **more):
    """common.equilibrium with the graphs of a batch as its samples: (H*, SolverResult)."""
    return equilibrium(f, h0, solver=SOLVERS[solver](batch), max_iter=max_iter, tol=tol,
                       backward_solver=SOLVERS[backward_solver](batch), backward_max_iter=backward_max_iter,
                       backward_tol=backward_tol, **more)


class ImplicitLayer(nn.Module):
    """H* = relu(A H* W^T + B), B = A V Omega_1^T, with V (n, p), H (n, m): the IGNN paper's U^T, X^T.

    The official layer also owns Omega_2 (m, p) and a bias (m) that it never uses.
    omega_2: B = A V Omega_1^T + V Omega_2^T, as in torchdeq's node model.
    spectral: normalises each weight M as that model does, to diag(min(1, g / sigma)) M.  g (m, 1) is learned.
    sigma = u^T M v is the spectral norm of M, with u and v from power iterations.
    hops: this many iterations from zero replace the equilibrium, to show what the equilibrium adds.
    """

    def __init__(self, p, m, kappa, omega_2=False, spectral=False, hops=0):
        super().__init__()
        if not 0 < kappa < 1:
            raise ValueError(f"kappa must be in (0, 1), got {kappa}")
        self.kappa, self.spectral, self.hops = kappa, spectral, hops
        self.names = ["W", "Omega_1", *(["Omega_2"] if omega_2 else [])]
        for name in self.names:
            weight = torch.empty(m, m if name == "W" else p).uniform_(-m ** -0.5, m ** -0.5)
            setattr(self, name, nn.Parameter(weight))
            if spectral:                    # g, u (m,) and v (m,) or (p,)
                setattr(self, name + "_g", nn.Parameter(torch.ones(m, 1)))
                self.register_buffer(name + "_u", F.normalize(torch.randn(m), dim=0))
                self.register_buffer(name + "_v", F.normalize(torch.randn(weight.shape[1]), dim=0))
        for _ in range(15 if spectral else 1):          # enough power iterations for sigma to begin with
            self.project_()

    @torch.no_grad()
    def project_(self, rho=None):
        """Call this after a change of the weights, because a forward pass itself changes nothing.

        Projects the rows of W to the ball of radius kappa / rho.  With `spectral` W itself is free, because
        `weights` projects its effective value.  Then only u and v make one more power iteration here.
        """
        if not self.spectral:
            self.W.copy_(project_rows(self.W, self.kappa / (rho or 1.0)))
            return
        for name in self.names:
            M, u, v = (getattr(self, name + part) for part in ("", "_u", "_v"))
            v.copy_(F.normalize(M.T @ u, dim=0))
            u.copy_(F.normalize(M @ v, dim=0))

    def weights(self, rho):
        """The effective W, Omega_1 and Omega_2 (or None), for an adjacency of this radius (None: 1)."""
        def effective(name):
            M = getattr(self, name, None)
            if M is None or not self.spectral:
                return M
            g, u, v = (getattr(self, name + part) for part in ("_g", "_u", "_v"))
            return M * (g / (u @ M @ v)).clamp(max=1)   # u^T M v: sigma

        W, Omega_1, Omega_2 = map(effective, ("W", "Omega_1", "Omega_2"))
        # Projects a temporary, not the parameter.  The gradient ignores the projection ("straight through"):
        # W - W.detach() is 0, but its derivative is 1.
        if self.spectral or rho is not None:
            W = project_rows(W.detach(), self.kappa / (rho or 1.0)) + (W - W.detach())
        return W, Omega_1, Omega_2

    def f(self, h, B, W, A):
        """One application of the layer to h (n, m).  B is the term that does not depend on h."""
        return torch.addmm(B, propagate(A, h), W.T).relu_()

    def problem(self, V, batch):
        """(f, h0) for the input V (n, p): H* solves H = f(H), and a solver starts at h0."""
        W, Omega_1, Omega_2 = self.weights(batch.rho)   # (m, m), (m, p), (m, p) or None
        A, (m, p) = batch.adjacency, Omega_1.shape  # p inputs, m outputs
        # (A V) Omega_1^T = A (V Omega_1^T): A is applied to whichever has fewer columns.
        B = propagate(A, V) @ Omega_1.T if p < m else propagate(A, V @ Omega_1.T)                   # (n, m)
        if Omega_2 is not None:
            B = B + V @ Omega_2.T
        # A solve starts at B, as in the official release.  From zero it would need one more step, to relu(B).
        return functools.partial(self.f, B=B, W=W, A=A), B.detach()

    def forward(self, V, batch, solve, log=None):
        """H* (n, m).  log: a list that receives ("forward" or "backward", SolverResult)."""
        def note(which, result):
            if log is not None:
                log.append((which, result._replace(h=None)))        # an epoch's states would fill the memory

        f, h0 = self.problem(V, batch)
        if self.hops:                       # upg with lam = 1: an ordinary network of `hops` equal layers
            return upg(f, torch.zeros_like(h0), k=self.hops, lam=1.0)
        h, result = solve(f, h0, batch, on_backward=functools.partial(note, "backward"))
        note("forward", result)
        return h


class GraphIGNN(nn.Module):
    """Log-probabilities (G, classes): three implicit layers, sum over each graph's nodes, two linear layers.

    solve(f, h0, batch) -> (H*, result) is the solver and its gradient: graph_equilibrium with its settings.
    """

    def __init__(self, num_features, num_classes, hidden=64, kappa=0.9, dropout=0.5, solve=graph_equilibrium):
        super().__init__()
        self.dropout, self.solve = dropout, solve
        widths = [num_features, hidden, hidden, hidden]
        self.implicit = nn.ModuleList(ImplicitLayer(p, m, kappa) for p, m in zip(widths, widths[1:]))
        self.readout = nn.ModuleList([nn.Linear(hidden, hidden), nn.Linear(hidden, num_classes)])

    def project_(self, rho=None):
        """Puts the weights back into the well-posed set.  Call it after every step of an optimiser."""
        for layer in self.implicit:
            layer.project_(rho)

    def forward(self, batch, keep=None, log=None):
        """batch: Graphs.  keep (G, hidden): dropout mask of 0 and 1 / (1 - dropout), drawn here if None."""
        h = batch.x                         # (n, p)
        for layer in self.implicit:
            h = layer(h, batch, self.solve, log)
        # As fast as PyG's scatter, with the same bits, but in a fixed order on a GPU.  unsafe avoids a sync.
        g = torch.segment_reduce(h, "sum", offsets=batch.offsets, unsafe=True)              # (G, hidden)
        g = F.relu(self.readout[0](g))
        g = F.dropout(g, self.dropout, self.training) if keep is None else g * keep
        return F.log_softmax(self.readout[1](g), dim=-1)


class NodeIGNN(nn.Module):
    """Logits (n, classes) of the nodes: h <- elu(IGNN_i(h) + V_i h) for each layer i, the last without elu.

    V_i is a linear layer beside the implicit one (`skip`).  widths: outputs of the layers before the last, by
    default those of the paper's PPI model, 4, 2, 2 and 1 times hidden.  The last layer has `classes` outputs.
    """

    def __init__(self, num_features, num_classes, hidden=256, kappa=0.98,
                 solve=functools.partial(graph_equilibrium, solver="anderson"), widths=None, omega_2=False,
                 spectral=False, hops=0):
        super().__init__()
        self.solve = solve
        widths = [num_features, *(widths or [4 * hidden, 2 * hidden, 2 * hidden, hidden]), num_classes]
        pairs = list(zip(widths, widths[1:]))
        self.implicit = nn.ModuleList(ImplicitLayer(p, m, kappa, omega_2, spectral, hops) for p, m in pairs)
        self.skip = nn.ModuleList(nn.Linear(p, m) for p, m in pairs)

    project_ = GraphIGNN.project_

    def forward(self, batch, log=None):
        h = batch.x
        for i, (layer, skip) in enumerate(zip(self.implicit, self.skip)):
            h = layer(h, batch, self.solve, log) + skip(h)  # (n, m)
            if i < len(self.skip) - 1:
                h = F.elu(h)
        return h


def load_official(model, state_dict):
    """Loads a state dict of the official IGNN release (graph or PPI) or of torchdeq's zoo, then projects W.

    Raises RuntimeError that names keys that are unknown, missing or of another shape.  Leaves out the bias,
    and Omega_2 if our model has none, because those models own but never use them.
    """
    linear, last = "skip" if isinstance(model, NodeIGNN) else "readout", len(model.implicit) - 1
    # Applied to each key in this order: DataParallel's prefix, IGNN's release, then the zoo.
    renames = [(r"^module\.", ""), (r"^ig(\d+)\.", lambda m: f"implicit.{int(m[1]) - 1}."),
               (r"^V_(\d+)\.", rf"{linear}.\1."), (r"^V\.", f"skip.{last}."),       # V: the node model's last
               (r"^ignn\.(\d+)\.(\w+?)(_orig)?$", r"implicit.\1.\2"), (r"^proj\.", "skip.")]     # the zoo
    own, found = model.state_dict(), {}
    for key, value in state_dict.items():
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        unused = re.fullmatch(r"(implicit\.\d+\.)(bias|Omega_2)", key)
        # An unused key of a layer that our model lacks stays, so that load_state_dict names it as unknown.
        if key in own or not unused or unused[1] + "W" not in own:
            found[key] = value
    model.load_state_dict(found)
    if not model.implicit[0].spectral:          # else u and v of the checkpoint are right already
        model.project_()


def solver_settings(args):
    """The models' `solve`: graph_equilibrium with the options of the command line."""
    names = "grad k lam solver max_iter tol stop_mode backward_solver backward_max_iter backward_tol"
    return functools.partial(graph_equilibrium, **{name: getattr(args, name) for name in names.split()})


def graph_model(args, graphs, seed):
    """The model of COX2 and PROTEINS: a seed gives the same weights for every method."""
    seed_everything(seed)
    return GraphIGNN(graphs[0].x.shape[1], max(int(graph.y) for graph in graphs) + 1, args.hidden, args.kappa,
                     args.dropout, solver_settings(args))


def node_model(args, num_features, num_classes, hops=0):
    """The model of PPI, its look-alike and the chains: the same weights on all processes."""
    zoo = args.ppi_model == "zoo" and args.dataset != "chains"
    widths = [args.hidden] if args.dataset == "chains" else None
    seed_everything(args.seed)
    return NodeIGNN(num_features, num_classes, args.hidden, args.kappa, solver_settings(args), widths,
                    omega_2=zoo, spectral=zoo, hops=hops)


def official_count(model):
    """Number of parameters as the paper counts: with the official layers' unused Omega_2 and bias."""
    shapes, zoo = [layer.Omega_1.shape for layer in model.implicit], "Omega_2" in model.implicit[0].names
    return sum(p.numel() for p in model.parameters()) + sum(m + m * p * (not zoo) for m, p in shapes)


def describe(model, args):
    """(a method's name, such as "UPG A_{5,0.5}", the same with its number of parameters)."""
    hops = model.implicit[0].hops * len(model.implicit)
    name = "implicit" if args.grad == "implicit" else f"{args.grad.upper()} A_{{{args.k},{args.lam}}}"
    name = f"{hops} hops" if hops else name
    own = sum(p.numel() for p in model.parameters())
    return name, f"{name}: {own:,} parameters ({official_count(model):,} as the paper counts)"


# --- training -----------------------------------------------------------------------------------------------

def dropout_mask(args, fold, epoch, step, batch):
    """The mask (G, hidden) of a step.  It does not depend on the process, and is the same after a resume."""
    # One number per (seed, fold, epoch, step), in the range that manual_seed takes.
    seed = (((args.seed * 1009 + fold) * 10007 + epoch) * 10007 + step) % 2 ** 63
    rng = torch.Generator().manual_seed(seed)
    keep = (torch.rand(len(batch.y), args.hidden, generator=rng) >= args.dropout) / (1 - args.dropout)
    return keep.to(batch.x.device, non_blocking=True)       # a blocking copy would wait for all steps before


def node_loss(logits, y, reduction="mean"):
    """Binary cross entropy over nodes and labels (y float), or cross entropy over nodes (y long)."""
    loss = F.binary_cross_entropy_with_logits if y.is_floating_point() else F.cross_entropy
    return loss(logits, y, reduction=reduction)


def train(args, run, model, batches, shares, evaluation, fold=None):
    """Trains on `batches` and evaluates after each epoch.

    fold: the number of a fold of COX2 or PROTEINS, or None for graphs with labelled nodes.  shares: for each
    batch, the factor of its loss.  evaluation: {"test": batch, ...}.  Returns the curve {"loss", "test",
    "test_loss", ...: a number per epoch}, or None after a signal.
    """
    process, nodes = run.process, fold is None
    what = "" if nodes else f"fold {fold}, "
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    first, curve = 0, {}
    if run.state:                           # --resume
        model.load_state_dict(run.state["model"])
        optimizer.load_state_dict(run.state["optimizer"])
        first, curve = run.state["epoch"], run.state["curve"]
    net = DistributedDataParallel(model) if process.world_size > 1 else model
    for epoch in process.bar(range(first, args.epochs), what + "epochs"):
        began, log, losses = time.perf_counter(), [], []    # log: the epoch's SolverResults
        order = range(len(batches))             # always the same in a fold, as in the release
        if nodes:
            rng = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            order = torch.randperm(len(batches), generator=rng).tolist()
        lr = args.lr * (0.5 if epoch >= 50 and not nodes else 1)            # halved once, from epoch 51 on
        for group in optimizer.param_groups:
            group["lr"] = lr
        for step, i in enumerate(order):
            batch = batches[i]
            if nodes:
                model.project_(batch.rho)       # as in the release, by this graph's radius if A is raw
                loss = node_loss(net(batch, log=log), batch.y)
            else:
                loss = F.nll_loss(net(batch, dropout_mask(args, fold, epoch, step, batch), log), batch.y)
            (loss * shares[i]).backward()       # with several processes this averages the gradients
            if args.clip:
                nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if not nodes:
                model.project_()
            # Kept on the device for one transfer at the end: node losses times shares, or sums over graphs.
            losses.append(loss.detach() * shares[i] if nodes else loss.detach().double() * len(batch.y))
        if nodes and batches[0].rho is None:    # else each forward pass projects to its own graphs' radius
            model.project_()

        # --- the epoch's training ends here.  Evaluation, logging and saving follow ---
        # The mean over steps and processes, or over the graphs of the fold.
        losses, graphs = torch.stack(losses), sum(len(batch.y) for batch in batches)
        loss = process.sum(losses.mean()) / process.world_size if nodes else losses.sum() / graphs
        found = {"loss": loss.item()}                                                           # host sync
        for name, batch in evaluation.items():
            found[name], found[f"{name}_loss"] = evaluate(model, batch, process)
        for name, value in found.items():
            curve.setdefault(name, []).append(value)
        if not math.isfinite(found["loss"] + found["test_loss"]):       # test_loss: after the last step
            if nodes and args.table4:
                return curve                    # the table says so in a note
            run.broke(f"{what}epoch {epoch + 1}: the loss became {found['loss']}, in the test "
                      f"{found['test_loss']}", epoch + 1, "try a lower --lr, --kappa or (nodes) --clip")
        last = epoch + 1 == args.epochs
        more = {"best_val_epoch": 1 + best_epoch(curve)} if nodes else {"fold": fold}
        more["ms_per_epoch"] = 1e3 * (time.perf_counter() - began)
        run.report("epoch", last or (epoch + 1) % args.log_every == 0, step=epoch + 1, epoch=epoch + 1, lr=lr,
                   **found, **more, **solves(log, args, process))
        save, stop = run.due()
        if save or last:
            run.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": epoch + 1,
                      "epoch": epoch + 1, "curve": curve})
        if stop:
            return None
    return curve


def best_epoch(curve):
    """The index, from 0 on, of the first epoch with the best validation score."""
    return max(range(len(curve["val"])), key=lambda e: curve["val"][e])


def solves(log, args, process):
    """For the log: mean calls of f, and quantiles of the residuals, over an epoch's solves.  Host sync."""
    record = {}
    for name, which, tol in (("train", "forward", args.tol), ("backward", "backward", args.backward_tol)):
        results = [r for direction, r in log if direction == which]
        if results:
            record[f"{name}_evals"] = statistics.mean(r.n_evals for r in results)
            record.update(health(name, [r.residual for r in results], tol, process))
    return record


def write_results(args, **results):         # as JSON in --out, with the options
    path = Path(args.out) / "results.json"
    try:
        path.write_text(json.dumps(finite({"args": vars(args), **results}), default=float))
    except OSError as error:
        die(f"--out: cannot write {path} ({error.strerror})", code=1)


def train_fold(args, device, graphs, numbers, fold, data, about):
    """Trains one fold on one process, as a run of its own in --out/fold-N.

    numbers: those of the graphs in (train, val, test).  data: checksum of `graphs`.  about: printed at first.
    Returns (curve, weights, seconds), or None after a signal.
    """
    args = argparse.Namespace(**{**vars(args), "out": f"{args.out}/fold-{fold}"})
    run = Run(args, Process(0, 1, device), "", "table4", fold=fold, data=data)
    train_set, val, test = ([graphs[i] for i in part] for part in numbers)
    model = graph_model(args, graphs, args.seed * 1000 + fold).to(device)
    continued = run.state and run.state["epoch"] < args.epochs              # not one that had finished
    run.start(about if fold == 0 else f"fold {fold}" if continued else "", fold=fold)
    batches = [make_batch(train_set[i:i + args.batch_size], device)         # the same in every epoch
               for i in range(0, len(train_set), args.batch_size)]
    evaluation = {"test": make_batch(test, device, with_2a=args.evaluate_2a_too)}
    if args.evaluate_2a_too:
        evaluation["test_2a"] = with_2a(evaluation["test"])
    if args.val:
        evaluation["val"] = make_batch(val, device)
    # A fold is on one process, so no loss needs a factor.
    curve = train(args, run, model, batches, [1.0] * len(batches), evaluation, fold)
    weights = {name: w.cpu() for name, w in model.state_dict().items()}
    return curve and (curve, weights, run.seconds)


def cross_validate(args, process, graphs):
    """Trains on COX2 or PROTEINS.  The processes divide the folds, and meet once, at the end.

    Returns {"table": {protocol: accuracies of the folds}, ...}, or None after a signal.
    """
    labels, folder, data = [int(graph.y) for graph in graphs], Path(args.out), checksum(graphs)
    splits = split(args, labels)
    if min(min(len(train_set), len(test)) for train_set, _, test in splits) < 1:
        process.die(f"--folds {args.folds}: {len(graphs)} graphs are too few for it")

    def claim():                            # stops if --out has a run that is not to be resumed
        begun, ended = [*folder.glob("fold-*/checkpoint.pt*")], (folder / "checkpoint.pt").exists()
        if process.rank == 0:
            lock(folder)
        if begun and not args.resume or ended and not begun:
            die(f"--out {folder} already holds a run: continue it with --resume auto, or choose another "
                "folder")

    process.first(claim)
    if process.world_size > 1:      # a process may wait for hours, but the usual group allows half an hour
        meeting = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
    # The score of a model that always predicts the most frequent class of the test fold.
    majority = [100 * max(np.bincount([labels[i] for i in test])) / len(test) for _, _, test in splits]
    majority_class = f"{np.mean(majority):.1f} ± {np.std(majority):.1f} %"
    method, about = describe(graph_model(args, graphs, 0), args)
    about += (f"; {len(graphs)} graphs, {args.folds} {'un' * args.unstratified_folds}stratified folds, "
              f"{args.epochs} epochs; majority class {majority_class} of the test folds")
    own = {}
    for fold in range(process.rank, args.folds, process.world_size):
        own[fold] = train_fold(args, process.device, graphs, splits[fold], fold, data, about)
        if own[fold] is None:               # a signal came
            break

    if process.world_size > 1:
        dist.barrier(meeting)
    # [(fold, (curve, weights, seconds))] of all processes, by fold.
    folds = sorted(item for part in process.gather(own) for item in part.items())
    if any(found is None for _, found in folds):
        return None
    curves, weights, seconds = ({fold: found[i] for fold, found in folds} for i in range(3))
    table, minutes = protocols(curves), sum(seconds.values()) / 60
    if process.rank == 0:
        # One checkpoint with the weights of all folds, for --eval.
        if not (folder / "checkpoint.pt").exists():
            save_checkpoint(folder / "checkpoint.pt", {"weights": weights, "args": vars(args),
                                                       "facts": {"data": data}, "step": args.epochs})
        logs = [(folder / f"fold-{fold}" / "metrics.jsonl").read_text() for fold in curves]
        (folder / "metrics.jsonl").write_text("".join(logs))
        record = {name: [values.mean(), values.std(), *values] for name, values in table.items()}
        write_results(args, majority=majority, minutes=minutes, folds=curves, **{"mean, std, folds": record})
        print(f"{args.dataset}, {method}, {args.folds} folds: mean ± deviation; {minutes:.1f} minutes in all")
        print(f"  {'majority class':26s} {majority_class:>12s}")
        for name, values in table.items():
            print(f"  {name:26s} {values.mean():5.1f} ± {values.std():.1f} %", flush=True)
    return {"table": table, "majority": majority_class, "minutes": minutes, "method": method}


def train_nodes(args, process, splits, hops=0):
    """Trains on PPI, its look-alike or chains.  The processes divide the --batch-size graphs of a step.

    hops: 0, or the iterations of each layer of the few-hop network.
    Returns {"table": {protocol: test score (%)}, ...}, or None after a signal.
    """
    device, world, rank = process.device, process.world_size, process.rank
    if args.batch_size % world:
        process.die(f"--batch-size {args.batch_size} is not divisible by the {world} processes")
    if len(splits[0]) % args.batch_size:
        process.die(f"--batch-size {args.batch_size} does not divide the {len(splits[0])} training graphs")
    if min(map(len, splits)) < world:
        process.die(f"{min(map(len, splits))} graphs in a split for {world} processes: use fewer "
                    "(--nproc_per_node)")
    kind = "sym" if args.dataset == "chains" else ADJACENCY[args.ppi_model]
    # groups: the graphs of each step.  each: how many of them a process takes.
    each, groups = args.batch_size // world, [splits[0][i:i + args.batch_size]
                                              for i in range(0, len(splits[0]), args.batch_size)]
    batches = [make_batch(group[rank * each:(rank + 1) * each], device, kind=kind) for group in groups]
    # A step's loss is a mean over all its nodes, but DistributedDataParallel averages over the processes.
    shares = [world * len(batch.x) / sum(len(graph.x) for graph in group)
              for batch, group in zip(batches, groups)]
    evaluation = {name: make_batch(graphs[rank::world], device, kind=kind)
                  for name, graphs in zip(("val", "test"), splits[1:])}
    # With a raw adjacency W is projected by the largest radius of the step's graphs on all processes.
    for batch in [*batches, *evaluation.values()] if kind == "raw" else []:
        batch.rho = max(process.gather(batch.rho))
    run = Run(args, process, "", "table4", processes=world, hops=hops,
              data=checksum([graph for graphs in splits for graph in graphs]))
    y, binary = torch.cat([graph.y for graph in splits[1]]), splits[0][0].y.dim() == 2
    metric, constant = ("micro-F1", constant_f1(y)) if binary else ("accuracy", 100 * (     # of a constant
        y.bincount().max() / len(y)).item())
    classes = y.shape[1] if binary else int(max(graph.y.max() for graph in splits[0])) + 1
    model = node_model(args, splits[0][0].x.shape[1], classes, hops).to(device)
    method, about = describe(model, args)
    run.start(f"{about}; {' + '.join(str(len(s)) for s in splits)} graphs of {args.dataset}, {args.epochs} "
              f"epochs of {len(groups)} steps; a constant prediction has a validation {metric} of "
              f"{constant:.1f} %")
    curve = train(args, run, model, batches, shares, evaluation)
    if curve is None:
        return None
    test, best, minutes = curve["test"], best_epoch(curve), run.seconds / 60
    table = {"epoch by val": test[best], "best test epoch": max(test), "last epoch": test[-1]}
    note = collapse(curve, constant) if binary else ""
    if note:
        run.report("collapse", show=False, step=len(test), what=note)
    if rank == 0:
        write_results(args, minutes=minutes, val_epoch=best + 1, collapsed=note, curve=curve, **table)
        print(f"{args.dataset}, {method}, test {metric}: "
              + ", ".join(f"{name} {value:.2f} %" for name, value in table.items())
              + f"; {minutes:.1f} minutes" + f"; {note}" * bool(note), flush=True)
    return {"table": table, "note": note, "minutes": minutes, "method": method}


def collapse(curve, constant):
    """What went wrong in a training on PPI, judged by its validation score (%) after each epoch, or ''.

    In a collapse the score falls from well above that of the best constant prediction (`constant`) to it.
    """
    found, down, best = [], False, 0.0
    for epoch, score in enumerate(curve["val"], start=1):
        if not down and best > constant + 5 and score <= constant + 1:
            found.append(f"collapsed in epoch {epoch}: validation micro-F1 fell from {best:.1f} to "
                         f"{score:.1f} %, a constant prediction's")
            down = True
        elif down and score > constant + 5:
            found.append(f"recovered in epoch {epoch}")
            down = False
        best = max(best, score)
    if best <= constant + 1:
        found.append(f"never above the constant prediction's {constant:.1f} %")
    if not math.isfinite(curve["loss"][-1] + curve["test_loss"][-1]):
        found.append(f"not finite from epoch {len(curve['loss'])} on")
    return "; ".join(found)


def compare_hops(args, process, splits):
    """Chains: trains the equilibrium, then a few-hop network in --out/few-hops.  None after a signal."""
    found = train_nodes(args, process, splits)  # the equilibrium
    if found is None:
        return None
    # It has a folder of its own, so it needs --resume auto, too, if the run is resumed.
    few_args = argparse.Namespace(**{**vars(args), "out": f"{args.out}/few-hops",
                                     "resume": args.resume and "auto"})
    few = train_nodes(few_args, process, splits, hops=args.hops)
    if few and process.rank == 0:
        print(f"accuracy on chains of up to {args.chain_length} nodes: equilibrium "
              f"{found['table']['epoch by val']:.1f} %, {few['method']} {few['table']['epoch by val']:.1f} "
              "%, guessing 50.0 %", flush=True)
    return few


def table4(args, process, data):
    """Trains METHODS, each in a folder of its own, and prints the table.  None after a signal."""
    nodes, rows = args.dataset in ("PPI", "PPI-synthetic"), []
    for grad, lam in METHODS:
        out = f"{args.out}/{grad if lam is None else f'{grad}-{lam}'}"
        one = argparse.Namespace(**{**vars(args), "grad": grad, "lam": lam or args.lam, "out": out})
        rows.append((train_nodes if nodes else cross_validate)(one, process, data))
        if rows[-1] is None:
            return None
    if process.rank == 0:
        # note: whether there is a column for collapses.  True counts as 1, False as 0 in the products below.
        names, note = list(rows[0]["table"]), any(row.get("note") for row in rows)
        print(f"\nTable 4, {args.dataset}"
              + f", --ppi-model {args.ppi_model}; the paper has the best of three runs" * nodes)
        print("| method | paper | " + " | ".join(names) + " | minutes |" + note * " note |" + "\n"
              + "|---" * (len(names) + 3 + note) + "|")
        for row, paper in zip(rows, PAPER.get(args.dataset, [""] * 4)):
            cells = [f"{v:.2f}" if nodes else f"{v.mean():.1f} ± {v.std():.1f}"
                     for v in row["table"].values()]
            print(f"| {row['method']} | {paper} | " + " | ".join(cells) + f" | {row['minutes']:.1f} |"
                  + note * f" {row.get('note')} |", flush=True)
        if not nodes:
            print(f"Majority class of the test folds: {rows[0]['majority']}", flush=True)
    return rows


# --- evaluation ---------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, batch, process):
    """(score in %, loss) over all processes: micro-F1 of logit > 0 for 0/1 labels, else accuracy."""
    model.eval()
    logits, y = model(batch), batch.y
    model.train()
    if y.is_floating_point():               # F1 = 2 tp / (predicted + true)
        right, of = 2 * ((logits > 0) * y).sum(), (logits > 0).sum() + y.sum()
    else:
        right, of = (logits.argmax(dim=1) == y).sum(), y.new_tensor(len(y))
    loss, n = node_loss(logits, y, "sum"), y.new_tensor(y.numel())      # log-probabilities are logits, too
    counts = torch.stack([x.double() for x in (right, of, loss, n)])    # one sum over the processes for all
    right, of, loss, n = process.sum(counts).tolist()                                           # host sync
    return 100 * (right / max(of, 1)), loss / n


def with_2a(batch):
    """The batch with the adjacency that the official release evaluates with."""
    return dataclasses.replace(batch, adjacency=batch.adjacency_2a)


def constant_f1(y):
    """The best micro-F1 (%) of a prediction that is the same for all nodes, as a collapsed network's is."""
    positive = y.double().sum(dim=0).sort(descending=True).values       # (C,) nodes with each label
    predicted = len(y) * torch.arange(1, len(positive) + 1)             # with the j most frequent labels
    # F1 = 2 tp / (predicted + true), the best over j.
    return 100 * (2 * positive.cumsum(dim=0) / (predicted + positive.sum()).clamp_min(1)).max().item()


def protocols(curves):
    """{protocol: accuracies (folds,)} from {fold: curve}.  A protocol decides which epochs count."""
    test = np.array([curve["test"] for curve in curves.values()])                           # (folds, epochs)
    folds, common = range(len(test)), test.mean(axis=0).argmax()
    table = {"best test epoch per fold": test.max(axis=1), "one epoch for all": test[:, common],
             "last epoch": test[:, -1]}
    if all("val" in curve for curve in curves.values()):
        # The epoch with the best validation accuracy.  Among equal ones the lowest validation loss decides.
        by_val = [max(range(test.shape[1]), key=lambda e: (curve["val"][e], -curve["val_loss"][e]))
                  for curve in curves.values()]
        table["epoch by val"] = test[folds, by_val]
    if all("test_2a" in curve for curve in curves.values()):
        test = np.array([curve["test_2a"] for curve in curves.values()])
        table["2A + I: best per fold"], table["2A + I: last"] = test.max(axis=1), test[:, -1]
    return table


def evaluate_checkpoint(args, process, data):
    """--eval: scores of a checkpoint: of a cross-validation, one fold, a run on nodes or another release."""
    state, graphs = load_checkpoint(args.resume), args.dataset in ("COX2", "PROTEINS")
    where, ours = f"--resume {args.resume}", is_ours(state)
    if ours:
        for name in ("dataset", "seed", "folds", "unstratified_folds"):
            if state["args"][name] != getattr(args, name):
                die(f"{where} is of a run with --{name.replace('_', '-')} {state['args'][name]}: with "
                    f"{getattr(args, name)} it would be evaluated on what it was trained on")
        every = data if graphs else [graph for part in data for graph in part]
        if state["facts"]["data"] != checksum(every):
            die(f"{where} is of a run on other data than this: it may have seen these graphs")
    if not ours and not graphs and args.ppi_model == "robust":
        die(f"{where} is of another release, whose models have a raw adjacency: give --ppi-model literal or "
            "zoo")

    def loaded(model, state):
        load_weights(model, state, load_official, f"{where} does not fit the model (--hidden, --ppi-model)")
        return model.to(process.device)

    if not graphs:
        model = loaded(node_model(args, data[0][0].x.shape[1], data[0][0].y.shape[1]), state)
        for name, part in zip(("validation", "test"), data[1:]):
            batch = make_batch(part, process.device, kind=ADJACENCY[args.ppi_model])
            score, loss = evaluate(model, batch, process)
            print(f"{name}: micro-F1 {score:.2f} %, loss {loss:.4f}", flush=True)
        return
    # {what is printed: (checkpoint, graph numbers)}.  A release's folds are unknown, so it gets all graphs.
    parts = {"all graphs": (state, range(len(data)))}
    if ours:                                # each fold's weights on the test graphs of that fold
        weights = state.get("weights") or {state["facts"]["fold"]: state["model"]}
        splits = split(args, [int(graph.y) for graph in data])
        parts = {f"fold {fold}": ({**state, "model": w}, splits[fold][2])
                 for fold, w in sorted(weights.items())}
    scores = []
    for name, (state, numbers) in parts.items():
        model = loaded(graph_model(args, data, args.seed), state)
        batch = make_batch([data[i] for i in numbers], process.device, with_2a=True)
        (one, _), (two, _) = evaluate(model, batch, process), evaluate(model, with_2a(batch), process)
        scores.append((one, two))
        print(f"{name}: accuracy {one:.2f} % of {len(numbers)}; with 2A + I {two:.2f} %", flush=True)
    if len(scores) > 1:
        one, two = np.mean(scores, axis=0)
        print(f"mean: accuracy {one:.2f} %; with 2A + I {two:.2f} %", flush=True)


# --- benchmark ----------------------------------------------------------------------------------------------

def run_benchmark(args, process):
    """--benchmark: training steps with the three gradients on generated graphs.  NPG also with k = 1 and 20.

    The learning rate is 0, so that all rows are measured at the same weights.
    """
    nodes = args.dataset in ("PPI", "PPI-synthetic")
    if nodes:
        graphs = ppi_lookalike(args.graph_scale, args.seed)[0][:args.batch_size]
        model, kind = node_model(args, 50, 121), ADJACENCY[args.ppi_model]
    else:
        graphs = molecules(args.batch_size, args.seed)
        model, kind = graph_model(args, graphs, args.seed), "sym"
    batch, model = make_batch(graphs, process.device, kind=kind), model.to(process.device)
    optimizer, solve, calls = torch.optim.Adam(model.parameters(), lr=0.0), model.solve, {}

    def row(name, grad, k):
        def forward():
            model.solve, calls[name] = functools.partial(solve, grad=grad, k=k), []     # of the last step
            return (node_loss if nodes else F.nll_loss)(model(batch, log=calls[name]), batch.y)

        return forward

    def finish():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.project_(batch.rho)

    rows = {grad: row(grad, grad, args.k) for grad in ("implicit", "upg", "npg")}
    rows.update({f"npg, k = {k}": row(f"npg, k = {k}", "npg", k) for k in (1, 20)})
    with torch.no_grad():
        f, h0 = model.implicit[0].problem(batch.x, batch)   # for the forward solve alone
    benchmark(rows, finish, process, unit="graphs", n=len(graphs), h0=h0, f=f, repeats=5,
              solve=functools.partial(SOLVERS[args.solver](batch), max_iter=args.max_iter, tol=args.tol,
                                      stop_mode=args.stop_mode),
              about=f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(graphs)} generated "
              f"{'look-alikes of graphs of PPI' if nodes else 'graphs of the size of those of COX2'}, "
              f"{len(batch.x)} nodes, {args.solver} to {args.tol:g}, backward {args.backward_solver} to "
              f"{args.backward_tol:g}, k = {args.k}")
    for which in ("forward", "backward"):
        means = {name: statistics.mean([r.n_evals for way, r in log if way == which] or [0])
                 for name, log in calls.items()}
        print(f"calls of f in a {which} solve: "
              + ", ".join(f"{name} {mean:.1f}" for name, mean in means.items()), flush=True)


# --- main ---------------------------------------------------------------------------------------------------

def main(args):
    keep_freed_memory()
    process = init_process()
    if args.benchmark:
        run_benchmark(args, process)
        return
    of_graphs = args.dataset in ("COX2", "PROTEINS")
    data = (load_tu if of_graphs else load_nodes)(args, process)
    if args.eval:
        evaluate_checkpoint(args, process, data)
        return
    args.out = output_folder(args, process, f"ignn-{args.dataset}")
    came = catch_signals(process.rank == 0)         # once for all runs: folds, methods, networks
    method = (table4 if args.table4 else cross_validate if of_graphs else
              compare_hops if args.dataset == "chains" else train_nodes)
    if method(args, process, data) is None and process.rank == 0:       # None: a signal ended the training
        name = "Ctrl-C" if signal.SIGINT in came else "SIGTERM"
        print(f"{name}: saved to {args.out}; continue with the same command, --out {args.out} and "
              "--resume auto", flush=True)
    process.end()


if __name__ == "__main__":
    main(parse_args())
