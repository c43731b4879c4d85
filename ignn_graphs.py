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
import copy
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

# Large CPU allocations then come in 2 MB pages: faster on a CPU.  torch reads it at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")          # by torch_geometric's import

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data import Batch, Data
from torch_geometric.datasets import PPI, TUDataset
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import degree, to_undirected
from tqdm import tqdm

from common import (SaveTimer, all_reduce_sum, anderson, broyden, check_run_flags, check_same_run, choose_out,
                    describe_run, die, equilibrium, finite, first_then_others, fixed_point, flag_checks,
                    gather_objects, gmres, health, init_process, is_ours, launched, line_by_line, load_checkpoint,
                    medians_in_turns, open_run, save_checkpoint, seed_everything, solver_overhead, start_log,
                    timed_step, upg, what_broke)

PAPER = {"COX2": ("84.1 ± 2.9", "83.9 ± 3.0", "83.9 ± 2.7", "83.0 ± 2.9"),
         "PROTEINS": ("78.6 ± 4.1", "78.4 ± 4.2", "78.6 ± 4.2", "78.8 ± 4.2"),
         "PPI": ("97.6", "98.2", "97.4", "96.2")}
METHODS = (("implicit", None), ("upg", 0.5), ("upg", 0.8), ("upg", 1.0))        # Table 4's rows


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Trains IGNN on graphs; no flags: the generated chains, a minute.")
    # data
    p.add_argument("--dataset", choices=["COX2", "PROTEINS", "PPI", "PPI-synthetic", "chains"], default="chains",
                   help="COX2, PROTEINS: graph classification; PPI: node classification; PPI-synthetic: its generated "
                   "look-alike; chains: generated long-range task (default chains)")
    p.add_argument("--data", default="data", help="folder with NAME/raw/*; PyG downloads what is not there "
                   "(default data)")
    p.add_argument("--folds", type=int, default=10, help="of the cross-validation, COX2 and PROTEINS (default 10)")
    p.add_argument("--val", action="store_true", help="choose the epoch on a tenth of each training fold")
    p.add_argument("--unstratified-folds", action="store_true", help="the official folds: graphs are shuffled after "
                   "stratification")
    p.add_argument("--evaluate-2a-too", action="store_true", help="also evaluate with the normalised 2A + I, as the "
                   "official release does; its own columns")
    p.add_argument("--graph-scale", type=float, default=0.1, help="nodes of PPI-synthetic's graphs as a fraction of "
                   "PPI's (default 0.1)")
    p.add_argument("--chain-length", type=int, default=20, help="nodes of the longest chain (default 20)")
    # model
    p.add_argument("--hidden", type=int, help="width (default 64, PPI 256, PPI-synthetic 32, chains 16)")
    p.add_argument("--kappa", type=float, help="bound of ||W||_inf rho(A), in (0, 1) (default 0.9; PPI, chains 0.98)")
    p.add_argument("--dropout", type=float, default=0.5, help="before the last layer of COX2, PROTEINS (default 0.5)")
    p.add_argument("--ppi-model", choices=["robust", "literal", "zoo"], default="robust",
                   help="robust: A / rho(A), relative tolerance, clipping; literal: the paper's, raw A; zoo: raw A, "
                   "spectral norm and Omega_2, torchdeq's (default robust)")
    p.add_argument("--hops", type=int, default=2, help="iterations of each of the two layers of the few-hop network of "
                   "chains, which sees twice as far (default 2)")
    # equilibrium
    p.add_argument("--grad", choices=["implicit", "upg", "npg"], default="upg",
                   help="how the gradient is computed (default upg)")
    p.add_argument("--solver", choices=["fixed-point", "anderson", "broyden"], help="finds the equilibrium (default "
                   "fixed-point for COX2, PROTEINS and --ppi-model literal, else anderson)")
    p.add_argument("--backward-solver", choices=["gmres", "fixed-point", "anderson", "broyden"],
                   help="solves for the gradient of --grad implicit; the paper's is fixed-point (default fixed-point "
                   "for COX2, PROTEINS and --ppi-model literal, whose F contracts fast, else gmres)")
    p.add_argument("--k", type=int, default=5, help="steps of the phantom gradient (default 5)")
    p.add_argument("--lam", type=float, default=0.5, help="damping of the phantom gradient, in (0, 1] (default 0.5)")
    p.add_argument("--max-iter", type=int, default=300, help="steps of the forward solver (default 300)")
    p.add_argument("--tol", type=float, help="residual at which a graph is solved: relative, or the largest entry with "
                   "--ppi-model literal (default COX2, PROTEINS 1e-5, else 1e-6; literal 3e-6)")
    p.add_argument("--backward-max-iter", type=int, default=300, help="steps of the backward solver of --grad "
                   "implicit (default 300)")
    p.add_argument("--backward-tol", type=float, help="residual at which the backward solve of a graph stops, "
                   "relative to dL/dH* (default ten times --tol, 1e-5 with literal)")
    # optimisation
    p.add_argument("--epochs", type=int, help="passes over the training graphs (default 200; PPI 1000; PPI-synthetic "
                   "100; chains 200)")
    p.add_argument("--batch-size", type=int, help="graphs per step over all processes; for COX2 and PROTEINS, whose "
                   "folds are divided, per fold (default 128; PPI 1; chains all)")
    p.add_argument("--lr", type=float, help="Adam's (default 0.001, halved from epoch 51 on; PPI 0.005; chains 0.01)")
    p.add_argument("--clip", type=float, help="largest norm of the gradient, PPI and chains; 0: none (default 1; "
                   "literal, zoo 0)")
    p.add_argument("--seed", type=int, default=42, help="of folds, weights, order and dropout (default 42)")
    # run
    p.add_argument("--table4", action="store_true", help="train implicit, UPG lam 0.5, 0.8, 1.0 and print Table 4")
    p.add_argument("--out", help="folder of checkpoint.pt, metrics.jsonl, results.json (default "
                   "--resume's, or runs/ignn-DATASET-TIME-PID)")
    p.add_argument("--resume", metavar="FILE", help="continue from this checkpoint; 'auto': from --out's, if "
                   "there is one")
    p.add_argument("--save-every", type=float, default=5.0, help="minutes between checkpoints; each fold, and SIGTERM, "
                   "saves one too (default 5)")
    p.add_argument("--log-every", type=int, help="epochs between log lines (default a tenth of --epochs)")
    p.add_argument("--eval", action="store_true", help="only evaluate the checkpoint of --resume, ours or an official "
                   "one; ours brings the flags that are not given")
    p.add_argument("--benchmark", action="store_true", help="only measure step time, memory and solver overhead of "
                   "implicit, UPG and NPG, on generated graphs")
    p.set_defaults(stop_mode=None)          # no flag: it follows from --ppi-model
    args = p.parse_args(argv)
    refuse, check = flag_checks(p)
    refuse(args.table4 and (args.eval or args.resume not in (None, "auto")),
           "--table4 takes neither --eval nor a FILE to --resume: use --out DIR --resume auto")
    for name in ("grad", "lam"):
        refuse(args.table4 and getattr(args, name) != p.get_default(name),
               f"--table4 sets --{name} itself: leave it out")
    refuse(args.eval and args.resume in (None, "auto"), "--eval needs --resume FILE, the checkpoint to evaluate")
    refuse(args.benchmark and (args.eval or args.resume or args.table4),
           "--benchmark measures a model with fresh weights: it takes no --eval, --resume or --table4")
    refuse((args.benchmark or args.eval) and launched(),
           f"--{'benchmark' if args.benchmark else 'eval'} is for one process: run it without torchrun")
    refuse(args.benchmark and args.dataset not in ("COX2", "PPI", "PPI-synthetic"),
           "--benchmark needs --dataset COX2, PPI or PPI-synthetic: graphs of those sizes are generated for it")
    if args.eval:                                   # what is not given here is as it was in training
        state = load_checkpoint(args.resume)
        if is_ours(state):
            check_same_run(args.resume, state["args"], args, free=vars(args))           # of this script at all?
            p.set_defaults(**{name: value for name, value in state["args"].items()
                              if hasattr(args, name) and (name == "data" or name not in FREE)})
            args = p.parse_args(argv)

    graphs, chains, ppi = args.dataset in ("COX2", "PROTEINS"), args.dataset == "chains", args.dataset == "PPI"
    official = args.ppi_model != "robust" and not graphs and not chains
    for names, of, here in (("folds val unstratified_folds evaluate_2a_too dropout", "COX2 and PROTEINS", graphs),
                            ("clip", "PPI and chains", not graphs), ("chain_length hops", "chains", chains),
                            ("ppi_model", "PPI and PPI-synthetic", not graphs and not chains),
                            ("graph_scale", "PPI-synthetic",
                             args.dataset == "PPI-synthetic" or ppi and args.benchmark)):
        for name in names.split():
            refuse(not here and getattr(args, name) != p.get_default(name),
                   f"--{name.replace('_', '-')} is of {of}: it has no effect on {args.dataset}")
    args.stop_mode = "max" if official and args.ppi_model == "literal" else "rel"
    defaults = {"hidden": 64 if graphs else 16 if chains else 256 if ppi else 32, "kappa": 0.9 if graphs else 0.98,
                "epochs": 1000 if ppi else 100 if args.dataset == "PPI-synthetic" else 200,
                "batch_size": 128 if graphs else 64 if chains else 1,
                "tol": 1e-5 if graphs else 3e-6 if args.stop_mode == "max" else 1e-6,
                "solver": "fixed-point" if graphs or args.stop_mode == "max" else "anderson",
                "backward_solver": "fixed-point" if graphs or args.stop_mode == "max" else "gmres",
                "lr": 0.001 if graphs else 0.01 if chains else 0.005, "clip": 0.0 if official else 1.0}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.backward_tol is None:
        args.backward_tol = 1e-5 if args.stop_mode == "max" else 10 * args.tol
    if args.log_every is None:
        args.log_every = max(1, args.epochs // 10)
    check(args, "k max_iter backward_max_iter epochs batch_size hidden hops log_every", lambda x: x >= 1,
          "must be at least 1")
    check(args, "tol backward_tol save_every clip", lambda x: x >= 0, "must not be negative")
    check(args, "lr graph_scale", lambda x: 0 < x < math.inf, "must be positive and finite")
    check(args, "seed", lambda x: 0 <= x < 2 ** 32, "must be in [0, 2^32)")
    check(args, "kappa", lambda x: 0 < x < 1, "must be in (0, 1), or the equilibrium may not exist")
    check(args, "lam", lambda x: 0 < x <= 1, "must be in (0, 1]")
    check(args, "dropout", lambda x: 0 <= x < 1, "must be in [0, 1)")
    check(args, "folds chain_length", lambda x: x >= 2, "must be at least 2")
    refuse(args.table4 and chains, "--table4 is of COX2, PROTEINS and PPI; --dataset chains is not in the paper")
    refuse(args.eval and chains,
           "--eval is of COX2, PROTEINS, PPI and PPI-synthetic: a run of chains prints its figures at its end")
    check_run_flags(args, refuse)
    return args


# --- data: graphs to one block-diagonal batch ------------------------------------------------------------------------

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
    batch = Batch.from_data_list(graphs)
    n, longest = batch.num_nodes, int(batch.ptr.diff().max())
    index, offsets, graph = (t.to(device) for t in (batch.edge_index, batch.ptr, batch.batch))
    nodes = torch.arange(n, device=device)

    def normalised(weight):
        """(D + I)^-1/2 (w A + I) (D + I)^-1/2 with D the degrees of w A."""
        values = torch.full(index.shape[1:], weight, dtype=dtype, device=device)
        return sparse(*gcn_norm(index, values, n, dtype=dtype), (n, n))

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


# --- data: COX2, PROTEINS, PPI ---------------------------------------------------------------------------------------

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

    return first_then_others(read, process)


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
        dataset = TUDataset(args.data, args.dataset)
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


# --- data: generated -------------------------------------------------------------------------------------------------

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
            edge_index = to_undirected(torch.stack([edges // n, edges % n]), num_nodes=n)
            x = ((torch.rand(n, 50, generator=rng) < 0.08).float() - 0.08) / math.sqrt(0.08 * 0.92)
            mean = torch.zeros(n, 50).index_add_(0, edge_index[0], x[edge_index[1]])
            mean = mean / degree(edge_index[0], n).clamp_min(1)[:, None]
            graphs.append(Data(x=x, edge_index=edge_index, y=x @ own + mean @ around))
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
            graphs.append(Data(x=x, edge_index=to_undirected(path), y=torch.full((n,), i % 2)))
        splits.append(graphs)
    return splits


# --- model -----------------------------------------------------------------------------------------------------------

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
           "anderson": functools.partial(padded, anderson), "broyden": functools.partial(padded, broyden)}
# memory: without it room for --backward-max-iter states, 300.
BACKWARD_SOLVERS = {"gmres": lambda batch: functools.partial(gmres, memory=40, offsets=batch.offsets), **SOLVERS}


@dataclasses.dataclass
class Solve:
    """How equilibria and their gradients are computed: the arguments of common.equilibrium."""
    solver: str = "fixed-point"
    grad: str = "upg"
    k: int = 5
    lam: float = 0.5
    max_iter: int = 300
    tol: float = 1e-6
    stop_mode: str = "rel"
    backward_solver: str = "gmres"
    backward_max_iter: int = 300
    backward_tol: float = 1e-5


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

        solvers = {"solver": SOLVERS[self.solve.solver](batch),
                   "backward_solver": BACKWARD_SOLVERS[self.solve.backward_solver](batch)}
        # From X = B, as in the official release.  From zero one more iteration would be needed: f(0) = relu(B).
        h, result = equilibrium(f, B.detach(), **{**vars(self.solve), **solvers},
                                on_backward=lambda r: keep("backward", r))
        keep("forward", result)
        return h


def check_kappa(kappa):
    if not 0 < kappa < 1:
        raise ValueError(f"kappa must be in (0, 1), got {kappa}")


class GraphIGNN(nn.Module):
    """Log-probabilities (G, classes): three implicit layers, sum over each graph's nodes, two linear layers."""

    def __init__(self, num_features, num_classes, hidden=64, kappa=0.9, dropout=0.5, solve=None):
        super().__init__()
        check_kappa(kappa)
        self.solve, self.dropout = solve or Solve(), dropout
        widths = [num_features, hidden, hidden, hidden]
        self.implicit = nn.ModuleList(ImplicitLayer(p, m, kappa, self.solve) for p, m in zip(widths, widths[1:]))
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

    def __init__(self, num_features, num_classes, hidden=256, kappa=0.98, solve=None, widths=None, omega_2=False,
                 spectral=False, hops=0):
        super().__init__()
        check_kappa(kappa)
        self.solve = solve or Solve(solver="anderson")
        widths = [num_features, *(widths or [4 * hidden, 2 * hidden, 2 * hidden, hidden]), num_classes]
        pairs = list(zip(widths, widths[1:]))
        self.implicit = nn.ModuleList(ImplicitLayer(p, m, kappa, self.solve, omega_2, spectral, hops) for p, m in pairs)
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

    Strict: ValueError names keys that are unknown, missing or of another shape.  Parameters that those models own and
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
    problems = [f"unknown {k}" for k in found if k not in own] + [f"missing {k}" for k in own if k not in found]
    problems += [f"{k} is {tuple(found[k].shape)} instead of {tuple(v.shape)}"
                 for k, v in own.items() if k in found and found[k].shape != v.shape]
    if problems:
        raise ValueError("; ".join(problems[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else ""))
    model.load_state_dict(found)
    if not any(layer.spectral for layer in model.implicit):         # else u and v of the checkpoint are as they must be
        model.project_()


# --- evaluation ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate_graphs(model, batch, with_2a=False):
    """(accuracy in %, loss), on the device; with_2a: with the official evaluation's adjacency."""
    training = model.training
    model.eval()
    if with_2a:
        batch = dataclasses.replace(batch, adjacency=batch.adjacency_2a)
    log_probs = model(batch)
    model.train(training)
    return 100 * (log_probs.argmax(dim=1) == batch.y).double().mean(), F.nll_loss(log_probs, batch.y).double()


def node_loss(logits, y, reduction="mean"):
    """Binary cross entropy over nodes and labels (y float), or cross entropy over nodes (y long)."""
    return (F.binary_cross_entropy_with_logits if y.is_floating_point() else F.cross_entropy)(logits, y,
                                                                                              reduction=reduction)


@torch.no_grad()
def evaluate_nodes(model, batch):
    """(score in %, loss) over all nodes of all processes: micro-F1 of logit > 0 for labels 0 or 1, else accuracy."""
    training = model.training
    model.eval()
    logits, y = model(batch), batch.y
    model.train(training)
    if y.is_floating_point():               # F1 = 2 tp / (predicted + true)
        counts = [2 * ((logits > 0) * y).sum(), (logits > 0).sum() + y.sum()]
    else:
        counts = [(logits.argmax(dim=1) == y).sum(), y.new_tensor(len(y))]
    sums = torch.stack([c.double() for c in (*counts, node_loss(logits, y, "sum"), y.new_tensor(y.numel()))])
    right, of, loss, n = all_reduce_sum(sums).tolist()                      # host sync
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
    if results[folds[0]]["val"]:
        epochs = [max(range(test.shape[1]), key=lambda e: (results[fold]["val"][e], -results[fold]["val_loss"][e]))
                  for fold in folds]                            # ties: the lower loss
        table["epoch by val"] = test[range(len(folds)), epochs]
    if results[folds[0]]["test_2a"]:
        test = np.array([results[fold]["test_2a"] for fold in folds])
        table["2A + I: best per fold"], table["2A + I: last"] = test.max(axis=1), test[:, -1]
    return table


# --- benchmark -------------------------------------------------------------------------------------------------------

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
        graphs.append(Data(x=x, edge_index=to_undirected(edge_index, num_nodes=n), y=torch.tensor([i % 2])))
    return graphs


def benchmark(args, process, repeats=5):
    """Times training steps with implicit, UPG and NPG in turns, and the solver's overhead: medians over the repeats."""
    device, grads, nodes = process.device, ("implicit", "upg", "npg"), args.dataset in ("PPI", "PPI-synthetic")
    if nodes:
        graphs = ppi_lookalike(args.graph_scale, args.seed)[0][:args.batch_size]
        batch = make_batch(graphs, device, kind=ADJACENCY[args.ppi_model])
        model = node_model(args, 50, 121).to(device)
    else:
        graphs = molecules(args.batch_size, args.seed)
        batch = make_batch(graphs, device)
        model = GraphIGNN(35, 2, args.hidden, args.kappa, args.dropout, solver_settings(args)).to(device)
    loss_of = (lambda log: node_loss(model(batch, log=log), batch.y)) if nodes else (
        lambda log: F.nll_loss(model(batch, log=log), batch.y))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)

    def finish():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.project_(batch.rho)

    def step(grad, k):
        model.solve.grad, model.solve.k, log = grad, k, []
        times = timed_step(lambda: loss_of(log), finish, device)
        return times + [statistics.mean([r.n_evals for name, r in log if name == which] or [0])
                        for which in ("forward", "backward")]

    @torch.no_grad()
    def overhead():
        layer = model.implicit[0]
        W, *Omegas = layer.weights(batch.rho)
        B = layer.injection(batch.x, batch.adjacency, *Omegas)
        solve = functools.partial(SOLVERS[args.solver](batch), max_iter=args.max_iter, tol=args.tol,
                                  stop_mode=args.stop_mode)
        return solver_overhead(solve, functools.partial(layer.f, B=B, W=W, A=batch.adjacency), B, device)

    median = medians_in_turns({**{grad: functools.partial(step, grad, args.k) for grad in grads},
                               "overhead": overhead}, repeats)
    about = describe_run(device, 1)
    print(f"\n{sum(p.numel() for p in model.parameters()):,} parameters, {len(graphs)} generated "
          f"{'look-alikes of graphs of PPI' if nodes else 'graphs of the size of those of COX2'}, "
          f"{len(batch.x)} nodes, {args.solver} to {args.tol:g}, backward {args.backward_solver} to "
          f"{args.backward_tol:g}, k = {args.k}; {about['device']}, torch {about['torch']}, commit {about['commit']}")
    print("gradient   forward ms  backward ms  step ms  peak GB  calls of f: forward, backward  backward    step  "
          "(ratios: implicit / this)")
    base = median["implicit"]
    for grad in grads:
        forward, backward, whole, gb, *evals = median[grad]
        print(f"{grad:9s} {forward:11.1f} {backward:12.1f} {whole:8.1f} {gb:8.3f} {evals[0]:20.1f} {evals[1]:9.1f} "
              f"{base[1] / backward:8.2f}x {base[2] / whole:6.2f}x")
    ratio, f_ms = median["overhead"]
    print(f"F: {f_ms:.2f} ms; solver overhead, solve / (calls of F x time of F): {ratio:.3f}")
    memory = {k: step("npg", k)[3] for k in (1, 20)}
    print(f"NPG peak memory: k = 1 {memory[1]:.3f} GB, k = 20 {memory[20]:.3f} GB, ratio {memory[20] / memory[1]:.3f}")


# --- training --------------------------------------------------------------------------------------------------------

ADJACENCY = {"robust": "rho", "literal": "raw", "zoo": "raw"}           # of --ppi-model, for make_batch


def solver_settings(args):
    return Solve(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Solve)})


def node_model(args, num_features, num_classes, hops=0):
    zoo = args.ppi_model == "zoo" and args.dataset != "chains"
    widths = [args.hidden] if args.dataset == "chains" else None
    return NodeIGNN(num_features, num_classes, args.hidden, args.kappa, solver_settings(args), widths, omega_2=zoo,
                    spectral=zoo, hops=hops)


def official_count(model):
    """Parameters as the paper counts them: with the official layers' Omega_2 and bias, which nothing uses."""
    dead = sum(layer.Omega_1.shape[0] * (1 + (layer.Omega_1.shape[1] if "Omega_2" not in layer.names else 0))
               for layer in model.implicit)
    return sum(p.numel() for p in model.parameters()) + dead


# What may differ in --resume; stop_mode is no flag, but follows from --ppi-model.
FREE = {"data", "out", "resume", "eval", "benchmark", "table4", "save_every", "log_every", "stop_mode"}


def begin(args, process, parameters, about_data, fingerprint):
    """Opens --out: (checkpoint's path, what --resume restores or None, log or None)."""
    path, resume = open_run(args.out, args.resume)
    state = None
    if resume:
        state = load_checkpoint(resume)
        if not is_ours(state):
            die(f"--resume {resume} was not written by this script: an official checkpoint can be evaluated (--eval)")
        check_same_run(resume, state["args"], args, FREE)
        if state["processes"] != process.world_size:
            die(f"--resume {resume} is of a run with {state['processes']} process(es), here are {process.world_size}")
        if state["fingerprint"] != fingerprint:
            die(f"--resume {resume} is of a run on other data than --data {args.data} holds")
    log = start_log(args, process, state["step"] if state else 0, parameters, about_data)
    return path, state, log


def checksum(graphs):
    """Of the edges, features and labels of a data set: a resumed run must go on with the same."""
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


def label(args):
    return "implicit" if args.grad == "implicit" else f"{args.grad.upper()} A_{{{args.k},{args.lam}}}"


def solves(log, args):
    """Calls of f (mean) and health of the solves in a log of this process's training; host sync."""
    record = {}
    for name, which, tol in (("train", "forward", args.tol), ("backward", "backward", args.backward_tol)):
        results = [r for direction, r in log if direction == which]
        if results:
            record[f"{name}_evals"] = statistics.mean(r.n_evals for r in results)
            record.update(health(name, [r.residual for r in results], tol, alone=True))
    return record


def spell(record):
    """Of what `solves` found: calls of f per solve, and solved graphs."""
    return ", ".join(f"{word} {record[name + '_evals']:.0f} calls of f, {100 * record[name + '_solved']:.0f} % solved"
                     for word, name in (("forward", "train"), ("backward", "backward")) if name + "_evals" in record)


def dropout_mask(args, fold, epoch, step, batch):
    """(G, hidden) for a step: the same whichever process trains this fold, and after a resume."""
    rng = torch.Generator().manual_seed((((args.seed * 1009 + fold) * 10007 + epoch) * 10007 + step) % 2 ** 63)
    keep = (torch.rand(len(batch.y), args.hidden, generator=rng) >= args.dropout) / (1 - args.dropout)
    return keep.to(batch.x.device, non_blocking=True)           # a blocking copy would wait for all steps before


def train_graphs(args, process, timer, graphs):
    """Cross-validation, the folds in turn; with several processes, each has its own folds.

    Returns {"table": {protocol: accuracies of the folds}, "majority", "minutes"}, or None after a SIGTERM.
    """
    device, world = process.device, process.world_size
    labels = [int(graph.y) for graph in graphs]
    splits = split(args, labels)
    if min(min(len(train), len(test)) for train, _, test in splits) < 1:
        die(f"--folds {args.folds}: {len(graphs)} graphs are too few for it")
    classes, features = max(labels) + 1, graphs[0].x.shape[1]
    own, rounds = range(process.rank, args.folds, world), math.ceil(args.folds / world)
    majority = [100 * max(np.bincount([labels[i] for i in test])) / len(test) for _, _, test in splits]

    def fold_model(fold):
        seed_everything(args.seed * 1000 + fold)            # the same weights for every method and arrangement
        return GraphIGNN(features, classes, args.hidden, args.kappa, args.dropout, solver_settings(args))

    parameters, fingerprint = sum(p.numel() for p in fold_model(0).parameters()), checksum(graphs)
    path, state, log = begin(
        args, process, parameters, f"{label(args)}: {parameters:,} parameters ({official_count(fold_model(0)):,} with "
        f"the official layers' unused ones); {len(graphs)} graphs, {args.folds} "
        f"{'un' if args.unstratified_folds else ''}stratified folds, {args.epochs} epochs; majority class "
        f"{statistics.mean(majority):.1f} ± {statistics.pstdev(majority):.1f} % of the test folds", fingerprint)
    state = state or {"ranks": [{"results": {}, "weights": {}, "model": None, "optimizer": None}] * world, "round": 0,
                      "epoch": 0, "seconds": 0.0}
    mine = copy.deepcopy(state["ranks"][process.rank])
    results, weights = mine["results"], mine["weights"]     # of the folds of this process
    started, since, last = time.perf_counter() - state["seconds"], time.perf_counter(), state["epoch"]
    stop = False

    def save(round, epoch, model, optimizer):
        parts = {"results": results, "weights": weights, "model": model and model.state_dict(),
                 "optimizer": optimizer and optimizer.state_dict()}
        ranks = gather_objects(parts)
        if process.rank == 0:
            save_checkpoint(path, {"ranks": ranks, "round": round, "epoch": epoch, "step": round * args.epochs + epoch,
                                   "args": vars(args), "processes": world, "seconds": time.perf_counter() - started,
                                   "fingerprint": fingerprint})

    for round in range(state["round"], rounds):
        fold, model, optimizer = own[round] if round < len(own) else None, None, None
        if fold is not None:
            train, val, test = ([graphs[i] for i in numbers] for numbers in splits[fold])
            model = fold_model(fold).to(device)
            optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
            if mine["model"] is not None:
                model.load_state_dict(mine["model"])
                optimizer.load_state_dict(mine["optimizer"])
            batches = [make_batch(train[i:i + args.batch_size], device)
                       for i in range(0, len(train), args.batch_size)]      # the same in every epoch, as in the release
            val = make_batch(val, device) if val else None
            test = make_batch(test, device, with_2a=args.evaluate_2a_too)
            results.setdefault(fold, {name: [] for name in ("loss", "test", "test_2a", "val", "val_loss")})
        for epoch in tqdm(range(state["epoch"], args.epochs), desc=f"fold {fold}", leave=False,
                          disable=not (process.rank == 0 and sys.stderr.isatty())):
            record, broken = None, ""
            if fold is not None:
                log_of_solves, losses = [], []
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * (0.5 if epoch >= 50 else 1)             # halved once, for epoch 51
                for step, batch in enumerate(batches):
                    mask = dropout_mask(args, fold, epoch, step, batch)
                    loss = F.nll_loss(model(batch, mask, log_of_solves), batch.y)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    model.project_()
                    losses.append(loss.detach().double() * len(batch.y))

                # --- the epoch's training ends here; what follows is evaluation, logging and saving ---
                columns = {"loss": torch.stack(losses).sum() / len(train), "test": evaluate_graphs(model, test)[0]}
                if args.evaluate_2a_too:
                    columns["test_2a"] = evaluate_graphs(model, test, with_2a=True)[0]
                if args.val:
                    columns["val"], columns["val_loss"] = evaluate_graphs(model, val)
                values = dict(zip(columns, torch.stack(list(columns.values())).tolist()))           # host sync
                for name, value in values.items():
                    results[fold][name].append(value)
                broken = what_broke(values["loss"], model.parameters())
                record = {"fold": fold, "lr": group["lr"], **values, **solves(log_of_solves, args)}
            records = [r for r in gather_objects(record) if r]
            for name, what in gather_objects((fold, broken)):
                if what:
                    kept = f"the last good state is {path}" if path.exists() else "nothing was saved yet"
                    die(f"fold {name}, epoch {epoch + 1}: {what}; try a lower --lr or --kappa; {kept}", code=1)
            done = epoch + 1 == args.epochs
            if process.rank == 0:
                for r in records:
                    log.write(event="epoch", step=round * args.epochs + epoch + 1, epoch=epoch + 1,
                              seconds=time.perf_counter() - started, **r)
                if (epoch + 1) % args.log_every == 0 or done:
                    now = time.perf_counter()
                    ms, since, last = 1e3 * (now - since) / (epoch + 1 - last), now, (epoch + 1) % args.epochs
                    tqdm.write(f"epoch {epoch + 1:4d}  " + "  ".join(
                        f"fold {r['fold']}  loss {r['loss']:.4f}  " + (f"val {r['val']:.1f} %  " if args.val else "")
                        + f"test {r['test']:.1f} %  {spell(r)}" for r in records) + f"  {ms:.0f} ms/epoch")
            if done and fold is not None:
                weights[fold] = {name: v.cpu().clone() for name, v in model.state_dict().items()}
            saving, stop = timer.poll()
            if done:
                save(round + 1, 0, None, None)
            elif saving:
                save(round, epoch + 1, model, optimizer)
            if stop:
                break
        state["epoch"], mine["model"] = 0, None
        if stop:
            break
    if stop:
        if process.rank == 0:
            print(f"SIGTERM: saved to {path}; continue with the same command, --out {args.out} and --resume auto",
                  flush=True)
        return None
    results = {fold: r for part in gather_objects(results) for fold, r in part.items()}
    table, minutes = protocols(results), (time.perf_counter() - started) / 60
    if process.rank == 0:
        record = {name: [values.mean(), values.std(), *values] for name, values in table.items()}
        write_results(args, majority=majority, minutes=minutes, folds=results, **{"mean, std, folds": record})
        print(f"{args.dataset}, {label(args)}, {args.folds} folds, mean ± standard deviation, {minutes:.1f} minutes")
        print(f"  {'majority class':26s} {statistics.mean(majority):5.1f} ± {statistics.pstdev(majority):.1f} %")
        for name, values in table.items():
            print(f"  {name:26s} {values.mean():5.1f} ± {values.std():.1f} %", flush=True)
    return {"table": table, "majority": np.array(majority), "minutes": minutes}


def train_nodes(args, process, timer, splits, hops=0):
    """PPI, its look-alike or chains; a step is --batch-size graphs, divided over the processes.

    Returns {protocol: test score (%), "collapsed": what happened or ""}, or None after a SIGTERM.
    """
    device, world, rank = process.device, process.world_size, process.rank
    if args.batch_size % world:
        die(f"--batch-size {args.batch_size} is not divisible by {world} processes")
    each, binary = args.batch_size // world, splits[0][0].y.dim() == 2
    if len(splits[0]) % args.batch_size:
        die(f"--batch-size {args.batch_size} does not divide the {len(splits[0])} training graphs")
    if min(map(len, splits)) < world:
        die(f"{min(map(len, splits))} graphs in a split for {world} processes: use fewer (--nproc_per_node)")
    kind = "sym" if args.dataset == "chains" else ADJACENCY[args.ppi_model]
    classes = splits[0][0].y.shape[1] if binary else int(max(graph.y.max() for graph in splits[0])) + 1
    groups = [splits[0][i:i + args.batch_size] for i in range(0, len(splits[0]), args.batch_size)]
    batches = [make_batch(group[rank * each:(rank + 1) * each], device, kind=kind) for group in groups]
    share = [world * len(batch.x) / sum(len(graph.x) for graph in group) for batch, group in zip(batches, groups)]
    evaluation = [make_batch(graphs[rank::world], device, kind=kind) for graphs in splits[1:]]
    # With a raw adjacency the projection's radius is that of a step's graph with the largest rho, of all processes.
    for batch in [*batches, *evaluation] if kind == "raw" else []:
        batch.rho = max(gather_objects(batch.rho))
    seed_everything(args.seed)                                  # the same weights on all processes
    model = node_model(args, splits[0][0].x.shape[1], classes, hops).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    metric, constant = ("micro-F1", constant_f1(splits[1])) if binary else ("accuracy", 100 * torch.cat(
        [graph.y for graph in splits[1]]).bincount().max().item() / sum(len(graph.y) for graph in splits[1]))
    method = f"{hops * len(model.implicit)} hops" if hops else label(args)
    fingerprint = checksum([graph for graphs in splits for graph in graphs])
    parameters = sum(p.numel() for p in model.parameters())
    path, state, log = begin(
        args, process, parameters, f"{method}: {parameters:,} parameters "
        f"({official_count(model):,} as the paper counts); {' + '.join(str(len(s)) for s in splits)} graphs of "
        f"{args.dataset}, {args.epochs} epochs of {len(groups)} steps; a constant prediction has a "
        f"validation {metric} of {constant:.1f} %", fingerprint)
    state = state or {"epoch": 0, "curve": [], "collapsed": "", "seconds": 0.0}
    if "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    curve, collapsed = state["curve"], state["collapsed"]       # [(val score, test score)] after each epoch
    started, since, last = time.perf_counter() - state["seconds"], time.perf_counter(), state["epoch"]
    net = DistributedDataParallel(model) if world > 1 else model
    stop, broken = False, ""
    for epoch in tqdm(range(state["epoch"], args.epochs), desc="training", leave=False,
                      disable=not (rank == 0 and sys.stderr.isatty())):
        log_of_solves, losses = [], []
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(args.seed * 1_000_003 + epoch))
        for i in order.tolist():
            model.project_(batches[i].rho)          # as in the release: with a raw adjacency, this graph's radius
            loss = node_loss(net(batches[i], log=log_of_solves), batches[i].y)
            (loss * share[i]).backward()            # processes' means weighted by their nodes
            if args.clip:
                nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach() * share[i])
        if kind != "raw":                           # else each forward pass projects for its own graph's radius
            model.project_()

        # --- the epoch's training ends here; what follows is evaluation, logging and saving ---
        loss = all_reduce_sum(torch.stack(losses).mean()).item() / world                        # host sync
        (val, val_loss), (test, _) = (evaluate_nodes(model, batch) for batch in evaluation)
        curve.append((val, test))
        best = max(range(len(curve)), key=lambda e: curve[e][0])
        down, new = collapsed and "recovered" not in collapsed.rpartition(";")[2], ""
        broken = what_broke(loss, model.parameters())
        if broken:
            new = f"{broken} in epoch {epoch + 1}"
        elif binary and not down and curve[best][0] > constant + 5 and val <= constant + 1:
            new = (f"collapsed in epoch {epoch + 1}: validation {metric} fell from {curve[best][0]:.1f} to "
                   f"{val:.1f} %, a constant prediction's")
        elif down and val > constant + 5:
            new = f"recovered in epoch {epoch + 1}"
        if new:
            collapsed = "; ".join(filter(None, [collapsed, new]))
            if rank == 0:
                log.write(event="collapse", step=epoch + 1, what=new)
                tqdm.write(new)
        done = epoch + 1 == args.epochs
        if rank == 0:
            record = {"loss": loss, "val": val, "val_loss": val_loss, "test": test, "best_val_epoch": best + 1, **(
                {} if hops else solves(log_of_solves, args))}
            log.write(event="epoch", step=epoch + 1, epoch=epoch + 1, seconds=time.perf_counter() - started, **record)
            if (epoch + 1) % args.log_every == 0 or done or new:
                now = time.perf_counter()
                ms, since, last = 1e3 * (now - since) / (epoch + 1 - last), now, epoch + 1
                tqdm.write(f"epoch {epoch + 1:4d}  loss {loss:.4g}  {metric}: val {val:.2f} %, test {test:.2f} %  "
                           + ("" if hops else f"{spell(record)}  ") + f"{ms:.0f} ms/epoch")
        if broken:
            break
        saving, stop = timer.poll()
        if (saving or done) and rank == 0:
            save_checkpoint(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1,
                                   "step": epoch + 1, "curve": curve, "collapsed": collapsed, "args": vars(args),
                                   "processes": world, "seconds": time.perf_counter() - started,
                                   "fingerprint": fingerprint})
        if stop:
            break
    if stop and not done:
        if rank == 0:
            print(f"SIGTERM: saved to {path}; continue with the same command, --out {args.out} and --resume auto",
                  flush=True)
        return None
    if binary and not collapsed and max(score for score, _ in curve) <= constant + 1:
        collapsed = f"never above the constant prediction's {constant:.1f} %"
    best, minutes = max(range(len(curve)), key=lambda e: curve[e][0]), (time.perf_counter() - started) / 60
    table = {"epoch by val": curve[best][1], "best test epoch": max(test for _, test in curve),
             "last epoch": curve[-1][1]}
    if rank == 0:
        write_results(args, minutes=minutes, val_epoch=best + 1, collapsed=collapsed, curve=curve, **table)
        print(f"{args.dataset}, {method}, test {metric}: "
              + ", ".join(f"{name} {value:.2f} %" for name, value in table.items()) + f"; {minutes:.1f} minutes"
              + (f"; {collapsed}" if collapsed else ""), flush=True)
    if broken and not args.table4:
        die(f"{collapsed}: try a lower --lr, --clip or --ppi-model robust; "
            + (f"the last good state is {path}" if path.exists() else "nothing was saved yet"), code=1)
    return {"table": table, "collapsed": collapsed, "minutes": minutes}


# --- main ------------------------------------------------------------------------------------------------------------

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
        return [list(PPI(root, split=name)) for name in ("train", "val", "test")]

    splits = load(args, process, make)
    for graphs in splits:
        check_graphs(args, graphs, nodes=True)
    return splits


def evaluate_checkpoint(args, process):
    """--eval: prints the scores of a checkpoint, ours or an official one."""
    state, graphs = load_checkpoint(args.resume), args.dataset in ("COX2", "PROTEINS")
    ours = is_ours(state)
    if ours and ("ranks" if graphs else "model") not in state:
        die(f"--resume {args.resume} is not of --dataset {args.dataset}")
    data = load_tu(args, process) if graphs else load_nodes(args, process)

    def model_with(weights):
        try:
            model = GraphIGNN(data[0].x.shape[1], max(int(graph.y) for graph in data) + 1, args.hidden, args.kappa,
                              args.dropout, solver_settings(args)) if graphs else (
                node_model(args, data[0][0].x.shape[1], data[0][0].y.shape[1]))
            model.load_state_dict(weights) if ours else load_official(model, weights)
            return model.to(process.device)
        except (ValueError, RuntimeError, KeyError, AttributeError) as error:
            die(f"--resume {args.resume} does not fit the model (--dataset, --hidden, --ppi-model): "
                f"{' '.join(str(error).split())[:400]}")

    if graphs:
        splits = split(args, [int(graph.y) for graph in data])
        weights = {f: w for part in state["ranks"] for f, w in part["weights"].items()} if ours else {None: state}
        if not weights:
            die(f"--resume {args.resume}: no fold of it is finished yet")
        for fold, w in sorted(weights.items()):
            model, numbers = model_with(w), splits[fold][2] if ours else range(len(data))
            batch = make_batch([data[i] for i in numbers], process.device, with_2a=True)
            scores = [evaluate_graphs(model, batch, with_2a)[0].item() for with_2a in (False, True)]
            print(f"{f'fold {fold}' if ours else 'all graphs'}: accuracy {scores[0]:.2f} % of {len(numbers)}; with "
                  f"2A + I {scores[1]:.2f} %", flush=True)
        return
    if not ours and args.ppi_model == "robust":
        die(f"--resume {args.resume} is of another release, whose models have a raw adjacency: give --ppi-model "
            "literal or zoo")
    model = model_with(state["model"] if ours else state)
    for name, part in zip(("validation", "test"), data[1:]):
        score, loss = evaluate_nodes(model, make_batch(part, process.device, kind=ADJACENCY[args.ppi_model]))
        print(f"{name}: micro-F1 {score:.2f} %, loss {loss:.4f}", flush=True)


def table4(args, process, timer):
    """Trains METHODS, each in a folder of its own, and prints the table beside the paper's."""
    data = load_tu(args, process) if args.dataset in ("COX2", "PROTEINS") else load_nodes(args, process)
    rows = []
    for i, (grad, lam) in enumerate(METHODS):
        name = grad if lam is None else f"{grad}-{lam}"
        one = argparse.Namespace(**{**vars(args), "grad": grad, "lam": lam or args.lam, "out": f"{args.out}/{name}"})
        row = (train_graphs if args.dataset in ("COX2", "PROTEINS") else train_nodes)(one, process, timer, data)
        if row is None:
            return
        rows.append((label(one), PAPER.get(args.dataset, [""] * 4)[i], row))
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
    line_by_line()
    process = init_process()
    choose_out(args, f"ignn-{args.dataset}")
    timer = None if args.benchmark or args.eval else SaveTimer(args.save_every)
    if args.benchmark:
        benchmark(args, process)
    elif args.eval:
        evaluate_checkpoint(args, process)
    elif args.table4:
        table4(args, process, timer)
    elif args.dataset in ("COX2", "PROTEINS"):
        train_graphs(args, process, timer, load_tu(args, process))
    else:
        splits, out = load_nodes(args, process), args.out
        row = train_nodes(args, process, timer, splits)
        if args.dataset == "chains" and row:
            args.out, args.resume = f"{out}/few-hops", args.resume and "auto"
            few = train_nodes(args, process, timer, splits, hops=args.hops)
            if few and process.rank == 0:
                print(f"accuracy on chains of up to {args.chain_length} nodes: equilibrium "
                      f"{row['table']['epoch by val']:.1f} %, {2 * args.hops} hops "
                      f"{few['table']['epoch by val']:.1f} %, "
                      "guessing 50.0 %", flush=True)
    if process.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
