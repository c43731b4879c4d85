"""DEQ-Transformer on WikiText-103, phantom gradients: "On Training Implicit Models" (NeurIPS 2021, arXiv:2111.05177).

    torchrun --nproc_per_node=4 deq_wikitext.py                     # PostLN, UPG A_{5,0.8}: 4 GPUs x 14 streams
    python deq_wikitext.py --data toy                               # a small model on generated text, on a CPU
    python deq_wikitext.py --accumulate 4                           # one GPU: the same streams in 4 micro-batches
    python deq_wikitext.py --eval --resume FILE --eval-mem-len 150 480    # ours with its own flags, or an official one
    python deq_wikitext.py --generate "The game was" --resume FILE         # continues it; toy text: "w5 w17"
    python deq_wikitext.py --benchmark --batch-size 14 --backward-solver broyden   # step time, memory of Table 3's rows

Text: --data DIR (default data/wikitext-103) with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens, the content
of the archive wikitext-103-v1.zip; or the same three as train.txt, valid.txt and test.txt.  --eval and --generate read
it too, for the vocabulary.  Our checkpoints bring the flags of text, model, solver and memory; to an official one give
its row's model flags (--norm above all: the files do not differ in it).

Table 3 (97,691,888 parameters, 300,000 steps of 56 streams x 150 tokens): test perplexity, and speed to the first row;
torchrun --nproc_per_node=4 deq_wikitext.py with
    paper 24.0  1.0x  --grad implicit --backward-solver broyden
          25.7  1.7x  (none)
          24.5  1.7x  --norm pre --dropout 0.06 --dropatt 0.01 --mem-len 300 --grad implicit
                      --backward-solver broyden --max-iter 14 --backward-max-iter 14 --jitter 2 --jr 2.0 --jr-freq 0.4
                      --jr-increment 30000
          24.4  2.2x  --norm pre --dropout 0.06 --dropatt 0.01 --mem-len 300 --max-iter 14 --jitter 2 --jr 0.1
          24.0  1.7x  --norm pre --dropout 0.06 --dropatt 0.01 --mem-len 300 --max-iter 20 --jitter 2 --jr 0.1
          fails -     --grad npg                          # App. D.3: --jr helps, or, without a number, the next row
          -     -     --grad npg --lam auto               # lam = 1 / rho(J)
The paper solves backwards by Broyden's method; the default here is GMRES.
torchdeq's "deq-lm" reports 22.34, or 21.85 with --eval-mem-len 480, in half the steps: three thinner blocks, no solver
in training, and twelve unrolled steps from zero:
    22.34             --norm pre --preln-residual raw --n-blocks 3 --d-inner 14800 --ln-affine --attn-out-ln
                      --init-before-norm --k 12 --lam 1 --max-iter 0 --checkpoint-blocks --pretrain-steps 0
                      --steps 150000 --warmup-steps 8000

What makes it faster (--benchmark with the flag measures all but --accumulate):
    --compile                   F by torch.compile: fewer launches; the same numbers to rounding
    --amp                       bf16 autocast, solver state and softmax in float32: changes results, so off by default
    TF32 products               on a GPU, of F and of the solver: changes results, as in torchdeq; --no-tf32 without
    --accumulate n              not faster: 1/n of the activations, for smaller cards; dropout masks are drawn for each
    --checkpoint-blocks         not faster: the blocks are computed again in the backward pass, for memory
    always on                   once per forward: effective weights, position keys, keys and values of the memory;
                                fused attention inside the solver (dropatt 0); targets sorted into clusters on the host
What costs: a step with the JR term (--jr) calls F once more.
No --cuda-graph, as mdeq_*.py have: the clusters of the softmax are as large as a batch happens to need.

Measured: step times of all rows on one H200, 109 ms for PostLN UPG at 14 streams; no training to the end.  README.md
has these, and a small-scale counterpart of Table 3 on real text, on a CPU.

Differs from the paper and locuslab/deq: residuals per stream (there: one norm over the batch); with --grad implicit and
npg loss and memory take h*, as evaluation does (there F(h*)); the learning rate of step s is that of step s (there: the
first step has the full rate, and the others lag by one); P_1 to P_3 are one parameter in embedding and softmax (there
two that share storage, each updated by Adam); the forward solver of the PreLN rows is Broyden, as in the paper (the
script that it cites has Anderson).  NPG follows Eq. (17), not Algorithms 2 and 3.  Pretraining is as in the official
protocol also for UPG (the paper leaves that open); --pretrain-steps 0 drops it.
"""
import argparse
import collections
import contextlib
import functools
import hashlib
import itertools
import math
import os
import random
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

# Large CPU allocations then come in 2 MB pages: faster on a CPU.  torch reads it at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F       # in prose F is the equilibrium module, DEQTransformer.f
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from common import (Meter, SaveTimer, adaptive_damping, all_reduce_sum, anderson, broyden, check_run_flags,
                    check_same_run, choose_out, clock, compiled, describe_run, die, equilibrium, first_then_others,
                    fixed_point, flag_checks, gather_objects, gmres, health, init_process, is_ours,
                    jacobian_regularization, launched, line_by_line, load_checkpoint, load_weights, medians_in_turns,
                    note_differences, open_run, rng_state, rng_states, save_checkpoint, seed_everything, set_rng_state,
                    set_rng_states, solver_overhead, spectral_radius, spell_health, start_log, timed_step, upg,
                    what_broke)

SOLVERS = {"broyden": broyden, "anderson": anderson, "fixed-point": fixed_point}
BACKWARD_SOLVERS = {"gmres": gmres, **SOLVERS}
DEFAULTS = {        # for WikiText-103, and for --data toy; None until then, so that what was given can be told
    "d_model": (700, 64), "n_head": (10, 4), "d_inner": (48000, 256), "cutoffs": ([20000, 40000, 200000], [200, 800]),
    "dropout": (0.05, 0.0), "solver": ("broyden", "broyden"), "max_iter": (30, 12), "backward_max_iter": (35, 12),
    "pretrain_steps": (32000, 0), "steps": (300000, 1000), "warmup_steps": (16000, 50), "batch_size": (56, 20),
    "segment": (150, 30), "mem_len": (150, 30), "lr": (2.5e-4, 2e-3), "eval_every": (5000, 250), "log_every": (200, 50)}
MODEL_FLAGS = {"norm", "preln_residual", "d_model", "d_embed", "n_head", "d_inner", "n_blocks", "cutoffs", "div_val",
               "ln_affine", "attn_out_ln"}
EVALUATION_FLAGS = {"data", "vocab", "local_size", "solver", "max_iter", "tol", "k", "lam", "segment", "mem_len",
                    "pretrain_steps", "pretrain_layers", "eval_streams", "eval_mem_len", "eval_solver", "eval_max_iter"}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Trains a DEQ-Transformer on WikiText-103; no flags: PostLN, UPG.  --data "
                                "DIR has wiki.{train,valid,test}.tokens or {train,valid,test}.txt.")

    def add(flag, text, **more):
        full, toy = DEFAULTS.get(flag[2:].replace("-", "_"), 2 * (more.get("default"),))
        if full is not None:
            text += f" (default {full})" if full == toy else f" (default {full}, toy {toy})"
        p.add_argument(flag, help=text, **more)

    # data
    add("--data", "folder of the texts; or 'toy': text of a known random source", default="data/wikitext-103")
    add("--vocab", "types are of the training text, or of all three", choices=["train", "all"], default="train")
    # model
    add("--norm", "layer normalisation", choices=["post", "pre"], default="post")
    add("--preln-residual", "what --norm pre adds the feed-forward part to: locuslab/deq's, or the textbook's",
        choices=["normalized", "raw"], default="normalized")
    add("--d-model", "width of the state", type=int)
    add("--d-embed", "embedding width of the most frequent types (default --d-model)", type=int)
    add("--n-head", "attention heads", type=int)
    add("--d-inner", "hidden width of the feed-forward part", type=int)
    add("--n-blocks", "different pairs of attention and feed-forward part in F", type=int, default=1)
    add("--cutoffs", "first types, by falling frequency, of the softmax clusters after the first", type=int, nargs="+")
    add("--div-val", "each cluster's embedding is so many times narrower than the one before", type=int, default=4)
    add("--local-size", "keys that a position sees, itself included; 0: 1000, and --mem-len plus --segment must then "
        "be at most that", type=int, default=0)
    add("--ln-affine", "layer normalisation with scale and shift", action="store_true")
    add("--attn-out-ln", "one more, on the concatenated heads", action="store_true")
    add("--init-before-norm", "F's weights begin as N(0, 0.01), not as PyTorch's default", action="store_true")
    add("--dropout", "probability of variational dropout", type=float)
    add("--dropatt", "the same for attention probabilities", type=float, default=0.0)
    add("--output-dropout", "what is dropped before the softmax: whole tokens, as official, or channels",
        choices=["tokens", "channels"], default="tokens")
    add("--init", "begin with the weights of this checkpoint, ours or an official one", metavar="FILE")
    # equilibrium
    add("--grad", "how the gradient is computed", choices=["upg", "npg", "implicit", "bptt"], default="upg")
    add("--k", "steps of the phantom gradient", type=int, default=5)
    add("--lam", "damping of the phantom gradient; or 'auto': 1 / rho(J), each 100 steps, App. D.3", default="0.8")
    add("--solver", "finds the equilibrium", choices=list(SOLVERS))
    add("--backward-solver", "solves for the gradient of --grad implicit; the paper's is broyden",
        choices=list(BACKWARD_SOLVERS), default="gmres")
    add("--max-iter", "steps of the forward solver; 0: none, for UPG", type=int)
    add("--jitter", "in training up to so many steps fewer, drawn for each batch", type=int, default=0)
    add("--backward-max-iter", "steps of the backward solver of --grad implicit", type=int)
    add("--tol", "relative residual at which a stream is solved; 0: always the whole budget", type=float, default=1e-3)
    add("--pretrain-steps", "first optimiser steps, with an unrolled network in place of the solver", type=int)
    add("--pretrain-layers", "evaluations of F in that network", type=int, default=2)
    add("--jr", "weight of Jacobian regularisation; 0: none", type=float, default=0.0)
    add("--jr-freq", "share of the steps that have it", type=float, default=0.4)
    add("--jr-increment", "it grows by 0.1 at each multiple of this step after pretraining; 0: it does not", type=int,
        default=0)
    # optimisation
    add("--steps", "optimiser steps", type=int)
    add("--warmup-steps", "of linear warm-up", type=int)
    add("--batch-size", "streams of text over all processes", type=int)
    add("--segment", "tokens of each stream per step", type=int)
    add("--mem-len", "earlier tokens that are kept as memory", type=int)
    add("--accumulate", "micro-batches per step and process", type=int, default=1)
    add("--lr", "peak, of Adam; cosine to 0 over all steps", type=float)
    add("--clip", "largest norm of the gradient; 0: none", type=float, default=0.25)
    add("--seed", "of weights, dropout and probes", type=int, default=0)
    # evaluation
    add("--eval-every", "steps between evaluations on valid", type=int)
    add("--eval-streams", "streams that valid and test are cut into", type=int, default=16)
    add("--eval-mem-len", "memory in evaluation; evaluations during training use the first (default --mem-len)",
        type=int, nargs="+")
    add("--eval-solver", "solver in evaluation; 'unrolled': --eval-max-iter plain steps, which alone never look ahead "
        "in the text (default --solver; with --max-iter 0 unrolled)", choices=[*SOLVERS, "unrolled"])
    add("--eval-max-iter", "steps in evaluation (default --max-iter, or --k where that is 0)", type=int)
    # speed
    add("--amp", "bf16 autocast; the solver's own vectors and the softmax stay float32", action="store_true")
    add("--no-tf32", "GPU matrix products in full float32; TF32 is the default", action="store_true")
    add("--compile", "torch.compile F", action="store_true")
    add("--checkpoint-blocks", "compute F's parts again in the backward pass", action="store_true")
    # run
    add("--out", "folder of checkpoint.pt, best.pt and metrics.jsonl, a shared one on several machines (default "
        "--resume's, or runs/wikitext-GRAD-TIME-PID)")
    add("--resume", "continue from this checkpoint; 'auto': from --out's, if there is one", metavar="FILE")
    add("--save-every", "minutes between checkpoints; each evaluation, and SIGTERM, saves one too", type=float,
        default=15.0)
    add("--log-every", "steps between log lines", type=int)
    add("--radius-every", "steps between spectral radii of J and J_lam on valid; 0: never", type=int, default=0)
    add("--eval", "only evaluate the checkpoint of --resume, ours or an official one; as with --generate, ours brings "
        "the flags of text, model, solver and memory that are not given", action="store_true")
    add("--generate", "only continue this text with the checkpoint of --resume", metavar="TEXT")
    add("--generate-tokens", "how many tokens --generate adds", type=int, default=100)
    add("--temperature", "of --generate; 0: the likeliest token", type=float, default=0.9)
    add("--benchmark", "only measure step time, memory and solver overhead of Table 3's rows, on random tokens",
        action="store_true")
    args = p.parse_args(argv)
    refuse, check = flag_checks(p)
    only = [flag for flag, given in (("--eval", args.eval), ("--generate", args.generate is not None),
                                     ("--benchmark", args.benchmark)) if given]
    mode = " and ".join(only)
    refuse(len(only) > 1, f"{mode} are different things to do: choose one")
    refuse(only and not args.eval and launched(), f"{mode} is for one process: run it without torchrun")
    refuse(args.benchmark and args.resume, "--benchmark measures a model with fresh weights: it takes no --resume")
    refuse(args.init and only, "--init begins a training: evaluate a checkpoint with --eval --resume FILE")
    check_run_flags(args, refuse)
    if only and not args.benchmark:
        refuse(args.resume in (None, "auto"), f"{mode} needs --resume FILE, the checkpoint to use")
        state = load_checkpoint(args.resume)
        if is_ours(state):                          # what is not given here is as it was in training
            saved = state["args"]
            check_same_run(args.resume, saved, args, free=vars(args))                   # of this script at all?
            for name in ("solver", "max_iter", "mem_len"):      # a given --solver also overrides a saved --eval-solver
                saved = {k: v for k, v in saved.items() if k != f"eval_{name}" or getattr(args, name) is None}
            p.set_defaults(**{name: value for name, value in saved.items() if name in MODEL_FLAGS | EVALUATION_FLAGS})
            args = p.parse_args(argv)

    for name, (full, toy) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, toy if args.data == "toy" else full)
    args.d_embed, args.eval_mem_len = args.d_embed or args.d_model, args.eval_mem_len or [args.mem_len]
    args.eval_solver = args.eval_solver or (args.solver if args.max_iter else "unrolled")   # as it was trained
    if args.eval_max_iter is None:
        args.eval_max_iter = args.max_iter or args.k

    check(args, "max_iter jitter tol pretrain_steps jr jr_increment warmup_steps mem_len eval_mem_len local_size "
          "save_every radius_every temperature clip", lambda x: x >= 0, "must not be negative")
    check(args, "d_model n_head d_inner n_blocks div_val k backward_max_iter pretrain_layers steps batch_size segment "
          "accumulate eval_every eval_streams eval_max_iter log_every generate_tokens", lambda x: x >= 1,
          "must be at least 1")
    check(args, "lr", lambda x: 0 < x < math.inf, "must be positive and finite")
    check(args, "dropout dropatt", lambda x: 0 <= x < 1, "must be in [0, 1)")
    check(args, "jr_freq", lambda x: 0 < x <= 1, "must be in (0, 1]")
    check(args, "temperature", lambda x: x == 0 or x >= 0.01, "must be 0 or at least 0.01")
    check(args, "seed", lambda x: 0 <= x < 2 ** 32, "must be in [0, 2^32)")
    if args.lam != "auto":
        with contextlib.suppress(ValueError):
            args.lam = float(args.lam)
        check(args, "lam", lambda x: not isinstance(x, str) and 0 < x <= 1, "must be a number in (0, 1] or 'auto'")
    refuse(args.d_model % args.n_head or args.d_model % 2,
           f"--d-model {args.d_model} must be even, and a multiple of --n-head {args.n_head}")
    refuse(any(a >= b for a, b in zip([0, *args.cutoffs], args.cutoffs)),
           f"--cutoffs must be positive and increase, got {args.cutoffs}")
    n = len(args.cutoffs)
    refuse(args.d_embed < args.div_val ** n, f"--d-embed {args.d_embed}: the last of {n + 1} clusters would have width "
           f"{args.d_embed} / {args.div_val}^{n} < 1; use a lower --div-val or fewer --cutoffs")
    longest = max(args.mem_len, *args.eval_mem_len) + args.segment
    refuse(args.local_size == 0 and longest > 1000,
           f"--mem-len or --eval-mem-len plus --segment is {longest}: a position sees 1000 keys, the rest has no "
           "effect; shorten the memory, or say how many it sees with --local-size")
    refuse(args.lam == "auto" and args.grad not in ("upg", "npg"),
           "--lam auto is the damping of a phantom gradient: it needs --grad upg or npg")
    refuse(args.max_iter == 0 and (args.grad != "upg" or args.jr or args.lam == "auto"),
           "--max-iter 0 unrolls from zero without a solver: it needs --grad upg, and no --jr or --lam auto")
    refuse(args.jitter and args.jitter >= args.max_iter,
           f"--jitter {args.jitter} must be less than --max-iter {args.max_iter}")
    refuse(args.grad == "bptt" and args.solver != "fixed-point",
           "--grad bptt differentiates the plain iteration: it needs --solver fixed-point")
    return args


# --- data ------------------------------------------------------------------------------------------------------------

class Text(NamedTuple):
    """Three texts as ids, on the host.  Type 0 is <eos>; others follow by falling frequency in the training text."""
    train: torch.Tensor             # (tokens,) int32
    valid: torch.Tensor
    test: torch.Tensor
    vocabulary: list                # of str: type i is vocabulary[i]
    best: tuple = ()                # toy: perplexities (best that sees one token, best of all)


def read_tokens(path, vocabulary):
    """The types of a text in the order of their tokens, (tokens,) int32; adds <eos> for each line, also a blank one.

    vocabulary: {type: id}.  A defaultdict gives unknown types new ids; of a plain dict they are an error.
    """
    ids = []
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            lines = tqdm(file, desc=path.name, unit=" lines", mininterval=1, disable=not sys.stderr.isatty())
            for number, line in enumerate(lines, start=1):
                ids.append(np.fromiter(map(vocabulary.__getitem__, (*line.split(), "<eos>")), np.int32))
                if number % 500_000 == 0 and lines.disable:
                    print(f"{path.name}: {number} lines read", flush=True)
    except OSError as error:
        die(f"--data: cannot read {path} ({error.strerror})")
    except UnicodeDecodeError as error:
        die(f"--data: {path} is not UTF-8 text ({error.reason} after line {len(ids)}); get the file anew")
    except KeyError as error:
        die(f"--data: {path}, line {number}: the training text does not have {error.args[0]!r}; --vocab all takes the "
            "types of all three texts")
    if not ids:
        die(f"--data: {path} is empty; get the file anew")
    return np.concatenate(ids)


def load_text(args, process):
    """--data as a Text.  The first process of each machine reads and caches it while the others wait."""
    if args.data == "toy":
        return toy_text()
    return first_then_others(lambda: read_text(args), process)


def read_text(args):
    """The texts in the folder --data, or their ids from a cache beside them."""
    root, splits = Path(args.data), ("train", "valid", "test")
    names = next((names for names in ([f"wiki.{s}.tokens" for s in splits], [f"{s}.txt" for s in splits])
                  if all(os.path.isfile(root / name) for name in names)), None)
    if names is None:
        die(f"--data {root}: needs the files wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens, or train.txt, "
            "valid.txt and test.txt: unpack the archive wikitext-103-v1.zip there (torchtext, which downloaded it, is "
            "discontinued; mirrors are found under its name); --data toy needs no files")
    stats = [(root / name).stat() for name in names]
    key = hashlib.sha1(repr([args.vocab, names, [(s.st_size, s.st_mtime_ns) for s in stats]]).encode()).hexdigest()
    cache = root / f".ids-{args.vocab}-{key[:16]}.npz"
    with contextlib.suppress(Exception):            # none yet, or damaged: read the texts
        with np.load(cache, allow_pickle=False) as saved:
            ids, types = [saved[s] for s in splits], saved["vocabulary"].tobytes()
            if hashlib.sha1(types).hexdigest() == str(saved["checksum"]):
                return Text(*map(torch.from_numpy, ids), types.decode().split("\n"))

    seen = collections.defaultdict(itertools.count().__next__, {})
    seen["<eos>"]                                   # 0
    ids = [read_tokens(root / names[0], seen)]
    ids += [read_tokens(root / name, seen if args.vocab == "all" else dict(seen)) for name in names[1:]]
    counts = np.bincount(np.concatenate(ids if args.vocab == "all" else ids[:1]), minlength=len(seen))
    counts[0] = counts.max() + 1                    # <eos> is type 0 however often it occurs
    order = np.argsort(-counts, kind="stable")      # equally frequent ones stay in the order of their first appearance
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order))
    ids, types = [rank[i] for i in ids], list(seen)
    vocabulary = [types[i] for i in order]
    types = "\n".join(vocabulary).encode()
    try:
        new = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez(new, **dict(zip(splits, ids)), vocabulary=np.frombuffer(types, np.uint8),
                 checksum=hashlib.sha1(types).hexdigest())
        os.replace(new, cache)
    except OSError as error:
        print(f"note: the ids are not cached, {root} is not writable ({error.strerror})", flush=True)
    return Text(*map(torch.from_numpy, ids), vocabulary)


def toy_text(types=2000, classes=6, sizes=(400_000, 20_000, 20_000)):
    """Text of a Markov source of second order: the classes of the last two tokens say which the next may be of.

    After each pair of classes three may follow, with probabilities 0.7, 0.2 and 0.1; within its class a type is drawn
    by Zipf's law.  The entropy rate is known, and so is the best that a model can do which sees the last token alone.
    """
    rng = np.random.default_rng(0)
    follow = np.zeros((classes, classes, classes))          # P(c | a, b) after classes a, b
    for a, b in itertools.product(range(classes), repeat=2):
        follow[a, b, rng.permutation(classes)[:3]] = 0.7, 0.2, 0.1
    zipf = (np.arange(types) + 3.0) ** -1.3
    members = [np.arange(c, types, classes) for c in range(classes)]        # type 0, <eos>, is the commonest of class 0
    emit = [zipf[m] / zipf[m].sum() for m in members]

    pairs = np.full((classes, classes), classes ** -2.0)    # stationary distribution of pairs of classes
    for _ in range(1000):
        pairs = np.einsum("ab,abc->bc", pairs, follow)

    def entropy(p):
        return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)

    within = pairs.sum(0) @ [entropy(e) for e in emit]
    one = np.einsum("ab,abc->bc", pairs, follow) / pairs.sum(0)[:, None]      # P(c | b)
    best = tuple(float(np.exp(within + h)) for h in (pairs.sum(0) @ entropy(one), (pairs * entropy(follow)).sum()))

    total, cumulative = sum(sizes), follow.cumsum(-1).tolist()
    a = b = 0
    path, draws = [], rng.random(total).tolist()
    for draw in draws:
        row = cumulative[a][b]
        a, b = b, next(c for c in range(classes) if draw < row[c] or c == classes - 1)
        path.append(b)
    path, ids = np.array(path), np.empty(total, np.int32)
    for c in range(classes):
        ids[path == c] = rng.choice(members[c], (path == c).sum(), p=emit[c])
    texts = [torch.from_numpy(part) for part in np.split(ids, np.cumsum(sizes)[:-1])]
    return Text(*texts, ["<eos>", *(f"w{i}" for i in range(1, types))], best)


BEST = "best possible perplexity: {1:.2f}; for a model that sees the last token alone: {0:.2f}"


def streams(ids, n):
    """(n, tokens): the text cut into n runs of equal length, one below the other; what is left over is dropped."""
    length = len(ids) // n
    return ids[:length * n].view(n, length)


def checksum(vocabulary):
    return hashlib.sha1("\n".join(vocabulary).encode()).hexdigest()


# --- model -----------------------------------------------------------------------------------------------------------

class Memory(NamedTuple):
    """What is kept of earlier segments: M states and their injections.  States alone could not rebuild the keys."""
    h: torch.Tensor                 # (B, M, D)
    u: torch.Tensor                 # (B, M, 3 D)


class Output(NamedTuple):
    nll: torch.Tensor               # (B, T) -log p(target), or None without targets
    memory: Memory
    result: tuple                   # the solver's SolverResult, or None where no solver ran
    jr: torch.Tensor                # Jacobian regularisation term, or None
    h: torch.Tensor                 # (B, T, D) the state


class BlockMasks(NamedTuple):
    """Dropout masks of a block, scaled by 1 / (1 - p), the same for all evaluations of F in a forward; None: without.

    A mask per evaluation would make F another function at each: it would have no fixed point.
    """
    attn_prob: torch.Tensor = None  # (B, H, T, K)
    attn_out: torch.Tensor = None   # (B, 1, D)
    ff_hidden: torch.Tensor = None  # (B, 1, d_inner)
    ff_out: torch.Tensor = None     # (B, 1, D)


class Masks(NamedTuple):
    embedding: torch.Tensor = None  # (B, 1, D)
    positions: torch.Tensor = None  # (1, D)
    output: torch.Tensor = None     # (B, T, 1): whole tokens, maybe an accident of the official code; or (B, 1, D)
    blocks: tuple = ()              # of BlockMasks


class Constants(NamedTuple):
    """What a block computes once per forward, with the graph on, and every evaluation of F uses.

    A head's d numbers are followed by zeros up to e, the next multiple of 8: without effect on scores and values, but
    a GPU's fused attention is not to be had for d = 70, and on a CPU attention is 5 to 8 % faster.
    """
    u: torch.Tensor                 # (B, T, 3 H e) injection of the present
    qkv: torch.Tensor               # (3 H e, D); effective weights g v / ||v||
    o: torch.Tensor
    ff1: torch.Tensor
    ff2: torch.Tensor
    r: torch.Tensor                 # (H, e, K + 1) position keys / sqrt(d), after a zero one
    r_w: torch.Tensor               # (H, 1, e) biases of the queries
    r_r: torch.Tensor
    k_mem: torch.Tensor             # (B, H, M, e) keys and values of the memory
    v_mem: torch.Tensor
    hidden: torch.Tensor            # (T, K) 0, or -inf where a key is later than the query or too long ago
    masks: BlockMasks


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Block(nn.Module):
    """Relative multi-head attention and feed-forward part, each with its residual and layer normalisation."""

    def __init__(self, d_model, n_head, d_inner, pre_ln, preln_residual, ln_affine, attn_out_ln, init_before_norm):
        super().__init__()
        D = d_model
        self.n_head, self.d_head, self.pre_ln, self.preln_residual = n_head, D // n_head, pre_ln, preln_residual
        self.qkv = nn.Linear(D, 3 * D, bias=False)          # thirds: queries, keys, values; the injection is its bias
        self.r = nn.Linear(D, D, bias=False)
        self.o, self.ff1, self.ff2 = nn.Linear(D, D), nn.Linear(D, d_inner), nn.Linear(d_inner, D)
        self.r_w_bias, self.r_r_bias = (nn.Parameter(0.01 * torch.randn(n_head, self.d_head)) for _ in range(2))
        self.ln1, self.ln2 = (nn.LayerNorm(D, elementwise_affine=ln_affine) for _ in range(2))
        self.ln_out = nn.LayerNorm(D, elementwise_affine=ln_affine) if attn_out_ln else nn.Identity()
        for linear in (self.qkv, self.r, self.o, self.ff1, self.ff2):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
            if init_before_norm:
                nn.init.normal_(linear.weight, std=0.01)
            weight_norm(linear)
        if ln_affine:
            for module in (self.ln1, self.ln2, self.ln_out):
                if isinstance(module, nn.LayerNorm):
                    nn.init.normal_(module.weight, 1.0, 0.01)

    def heads(self, x, n):
        """(B, L, n H e) -> n of (B, H, L, e)."""
        return x.unflatten(2, (n, self.n_head, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def constants(self, u, h_mem, positions, hidden, masks):
        """u: (B, K, 3 D) injections of memory and present; h_mem: (B, M, D); positions: (K, D)."""
        device, M, d = u.device.type, h_mem.shape[1], self.d_head

        def padded(x, dim):                         # n d numbers along dim -> n e
            x = x.unflatten(dim, (-1, d))
            return F.pad(x, (0, 0) * (x.dim() - dim - 2) + (0, -d % 8)).flatten(dim, dim + 1)

        weights = [linear.weight for linear in (self.qkv, self.o, self.ff1, self.ff2)]
        if torch.is_autocast_enabled(device):       # cast once per forward: autocast would do so at every evaluation
            weights = [w.to(torch.get_autocast_dtype(device)) for w in weights]
        weights[0], u = padded(weights[0], 0), padded(u, 2)
        r = padded(F.linear(positions, self.r.weight), 1).unflatten(1, (self.n_head, -1)) / math.sqrt(d)
        r = F.pad(r.permute(1, 2, 0), (1, 0))                                               # (H, e, K + 1)
        biases = [padded(b, 1)[:, None] for b in (self.r_w_bias, self.r_r_bias)]
        q = u.shape[2] // 3                         # the memory asks no queries
        kv = F.linear(self.ln1(h_mem) if self.pre_ln else h_mem, weights[0][q:]) + u[:, :M, q:]
        return Constants(u[:, M:], *weights, r, *biases, *self.heads(kv, 2), hidden, masks)

    def attention(self, h, c):
        """LN(attn(h) + h), or attn(LN(h)) + h with pre_ln; h: (B, T, D)."""
        B, T, D = h.shape
        x = self.ln1(h) if self.pre_ln else h
        q, k, v = self.heads(F.linear(x, c.qkv) + c.u, 3)
        k, v = torch.cat([c.k_mem, k.to(c.k_mem.dtype)], 2), torch.cat([c.v_mem, v.to(c.v_mem.dtype)], 2)
        K = k.shape[2]
        # Score of positions: query i needs key distance i + M - j in column j, that is row i shifted by T - 1 - i.  The
        # zero key in front makes every row K + 1 long: read as rows of K from element T on, the rows are shifted.
        s = torch.matmul(q + c.r_r.to(q.dtype), c.r)                                        # (B, H, T, K + 1)
        s = at_least_float32(s.flatten(2)[:, :, T:].unflatten(2, (T, K))) + c.hidden
        q, scale = q + c.r_w.to(q.dtype), 1 / math.sqrt(self.d_head)
        if c.masks.attn_prob is None and not torch.is_grad_enabled():
            a = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=s.to(q.dtype), scale=scale)
        else:       # with a graph: the fused kernels take no mask that needs a gradient, and have no second derivative
            s = s + at_least_float32(torch.matmul(q, k.transpose(2, 3))) * scale
            p = torch.softmax(s, dim=-1)
            p = p if c.masks.attn_prob is None else p * c.masks.attn_prob
            a = torch.matmul(p.to(v.dtype), v)
        a = self.ln_out(a[..., :self.d_head].transpose(1, 2).reshape(B, T, D))
        y = F.linear(a, c.o, self.o.bias)
        y = (y if c.masks.attn_out is None else y * c.masks.attn_out) + h
        return y if self.pre_ln else self.ln1(y)

    def feed_forward(self, y, c):
        """LN(g(y) + y); with pre_ln g(LN(y)) + LN(y) as in locuslab/deq ("normalized"), or g(LN(y)) + y ("raw")."""
        x = self.ln2(y) if self.pre_ln else y
        t = F.relu(F.linear(x, c.ff1, self.ff1.bias), inplace=True)
        t = F.linear(t if c.masks.ff_hidden is None else t * c.masks.ff_hidden, c.ff2, self.ff2.bias)
        t = t if c.masks.ff_out is None else t * c.masks.ff_out
        if self.pre_ln:
            return t + (x if self.preln_residual == "normalized" else y)
        return self.ln2(t + y)


class DEQTransformer(nn.Module):
    """Deep equilibrium language model: -log p = softmax(h*), h* = F(h*; memory, u), u = injection(embedding(ids)).

    The state h is (B, T, D): B streams, T tokens of the present segment, D = d_model.  K = M + T with M the length of
    the memory.  F is n_blocks pairs of attention and feed-forward part; all of them see the same u and memory.
    Embedding and softmax are adaptive, with the types split at `cutoffs`; cluster i has width d_embed // div_val^i.
    Layer norms have no scale and shift unless ln_affine.  Solver settings as in common.equilibrium; max_iter = 0 with
    grad = "upg" unrolls k steps from zero without a solver.
    """

    def __init__(self, n_token=267735, cutoffs=(20000, 40000, 200000), d_model=700, d_embed=None, n_head=10,
                 d_inner=48000, div_val=4, n_blocks=1, pre_ln=False, preln_residual="normalized",
                 ln_affine=False, attn_out_ln=False, init_std=0.01, init_before_norm=False, local_size=0, mem_len=150,
                 dropout=0.0, dropatt=0.0, output_dropout="tokens", checkpoint_blocks=False, grad="upg", k=5, lam=0.8,
                 solver=broyden, max_iter=30, tol=1e-3, backward_solver=gmres, backward_max_iter=35):
        super().__init__()
        d_embed = d_embed or d_model
        if d_model % n_head or d_model % 2:
            raise ValueError(f"d_model {d_model} must be even, and a multiple of n_head {n_head}")
        edges = [0, *cutoffs, n_token]
        if any(a >= b for a, b in zip(edges, edges[1:])):
            raise ValueError(f"cutoffs must increase between 0 and n_token, got {list(cutoffs)} and {n_token}")
        if local_size < 0:
            raise ValueError(f"local_size must not be negative, got {local_size}")
        if preln_residual not in ("normalized", "raw") or output_dropout not in ("tokens", "channels"):
            raise ValueError("preln_residual must be 'normalized' or 'raw', output_dropout 'tokens' or 'channels', got "
                             f"{preln_residual!r}, {output_dropout!r}")
        self.d_model, self.edges, self.local_size, self.mem_len = d_model, edges, local_size or 1000, mem_len
        self.dropout, self.dropatt, self.output_dropout = dropout, dropatt, output_dropout
        self.checkpoint_blocks = checkpoint_blocks
        self.grad, self.k, self.lam, self.solver, self.max_iter = grad, k, lam, solver, max_iter
        self.tol, self.backward_solver, self.backward_max_iter = tol, backward_solver, backward_max_iter

        def normal(*shape):
            return nn.Parameter(init_std * torch.randn(*shape))

        sizes = [b - a for a, b in zip(edges, edges[1:])]
        widths = [d_embed // div_val ** i for i in range(len(sizes))]
        self.tables = nn.ParameterList(normal(n, width) for n, width in zip(sizes, widths))     # A_i, softmax too
        if div_val > 1:
            self.projections = nn.ParameterList(normal(d_model, width) for width in widths)     # P_i, and Q_i for i > 0
        else:                       # one table in effect; a projection only between different widths
            self.projections = nn.ParameterList([normal(d_model, d_embed)] if d_embed != d_model else [])
        self.head_projection = normal(*self.projections[0].shape) if len(self.projections) else None    # Q_0 is not P_0
        self.injection = nn.Linear(d_model, 3 * d_model)
        nn.init.normal_(self.injection.weight, std=init_std)
        nn.init.zeros_(self.injection.bias)
        self.blocks = nn.ModuleList(Block(d_model, n_head, d_inner, pre_ln, preln_residual, ln_affine, attn_out_ln,
                                          init_before_norm) for _ in range(n_blocks))
        self.cluster_weight = normal(len(cutoffs), d_embed)
        self.cluster_bias = nn.Parameter(torch.zeros(len(cutoffs)))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(n)) for n in sizes)

    def projection(self, i):
        """P_i (D, E_i), or None where embedding and state have one width and need none."""
        return self.projections[min(i, len(self.projections) - 1)] if len(self.projections) else None

    def clusters(self, ids):
        """Per cluster, which of the flat ids are its.  On the host if the ids are there: no synchronisation then."""
        index = [((ids >= a) & (ids < b)).nonzero()[:, 0] for a, b in zip(self.edges, self.edges[1:])]
        if sum(map(len, index)) != len(ids):
            raise ValueError(f"ids must be in [0, {self.edges[-1]})")
        return index

    def embed(self, ids):
        """e (B, T, D) of ids (B, T), in sqrt(D) P_i A_i[w - c_i]."""
        flat, device = ids.reshape(-1), self.tables[0].device
        index, parts = self.clusters(flat), []
        for i, own in enumerate(index):
            e = F.embedding((flat[own] - self.edges[i]).to(device, non_blocking=True), self.tables[i])
            parts.append(e if self.projection(i) is None else F.linear(e, self.projection(i)))
        back = torch.cat(index).argsort().to(device, non_blocking=True)
        return torch.cat(parts)[back].view(*ids.shape, -1) * math.sqrt(self.d_model)

    def inject(self, e):
        """u (B, T, 3 D): what is added to queries, keys and values."""
        return self.injection(e)

    def positions(self, K, device):
        """(K, D): row j is distance K - 1 - j, first the sines of all frequencies, then the cosines."""
        frequency = 10000 ** -(torch.arange(0, self.d_model, 2, device=device, dtype=torch.float32) / self.d_model)
        phase = torch.arange(K - 1, -1, -1, device=device, dtype=torch.float32)[:, None] * frequency
        return torch.cat([phase.sin(), phase.cos()], dim=1).to(self.injection.weight.dtype)

    def masks(self, B, T, K, device):
        """New dropout masks of a forward; none in evaluation mode."""
        def mask(p, *shape):
            return torch.bernoulli(torch.full(shape, 1 - p, device=device)) / (1 - p) if p and self.training else None

        p, D = self.dropout, self.d_model
        output = (B, T, 1) if self.output_dropout == "tokens" else (B, 1, D)
        return Masks(mask(p, B, 1, D), mask(p, 1, D), mask(p, *output),
                     tuple(BlockMasks(mask(self.dropatt, B, b.n_head, T, K), mask(p, B, 1, D),
                                      mask(p, B, 1, b.ff1.out_features), mask(p, B, 1, D)) for b in self.blocks))

    def constants(self, u, h_mem, masks=Masks()):
        """What stays the same during a solve, a Constants per block; u (B, K, 3 D), h_mem (B, M, D)."""
        K, M = u.shape[1], h_mem.shape[1]
        positions = self.positions(K, u.device)
        positions = positions if masks.positions is None else positions * masks.positions
        distance = torch.arange(M, K, device=u.device)[:, None] - torch.arange(K, device=u.device)     # (T, K)
        hidden = torch.zeros(K - M, K, device=u.device)
        hidden.masked_fill_((distance < 0) | (distance >= self.local_size), -math.inf)
        return [block.constants(u, h_mem, positions, hidden, m)
                for block, m in zip(self.blocks, masks.blocks or [BlockMasks()] * len(self.blocks))]

    def f(self, h, u, h_mem=None, masks=Masks(), constants=None):
        """The equilibrium module F (B, T, D) at h (B, T, D); u (B, K, 3 D) of memory and present, h_mem (B, M, D).

        constants: those of u, h_mem and masks, where F is evaluated more than once.
        """
        if constants is None:
            h_mem = h.new_empty(h.shape[0], 0, h.shape[2]) if h_mem is None else h_mem
            constants = self.constants(u, h_mem, masks)
        for block, c in zip(self.blocks, constants):
            for part in (block.attention, block.feed_forward):
                if self.checkpoint_blocks and torch.is_grad_enabled():
                    h = recompute(part, h, c, use_reentrant=False, preserve_rng_state=False)     # F draws nothing
                else:
                    h = part(h, c)
        return h

    def segment(self, ids, memory=None, masks=Masks()):
        """(f, h0, u, memory) of ids (B, T): F of h alone, its start 0, u (B, T, 3 D), and the memory, if only empty."""
        e = self.embed(ids)
        u = self.inject(e if masks.embedding is None else e * masks.embedding)
        h0 = torch.zeros(*ids.shape, self.d_model, device=u.device, dtype=self.injection.weight.dtype)
        memory = memory or Memory(h0[:, :0], u[:, :0].detach())
        whole = torch.cat([memory.u.to(u.dtype), u], dim=1)                                 # (B, K, 3 D)
        f = functools.partial(self.f, u=whole, constants=self.constants(whole, memory.h, masks))
        return f, h0, u, memory

    def softmax_parts(self, h):
        """Logits of h (N, D): head (N, S + n), with columns of the n later clusters in reverse, and a function of i."""
        def linear(h, weight, bias, projection):
            if not self.training:           # a perplexity to report is of logits in full precision, also under autocast
                with torch.autocast(h.device.type, enabled=False):
                    return F.linear(h if projection is None else h @ projection, weight, bias)
            return at_least_float32(F.linear(h if projection is None else h @ projection, weight, bias))

        weight = torch.cat([self.tables[0], self.cluster_weight])
        head = linear(h, weight, torch.cat([self.biases[0], self.cluster_bias]), self.head_projection)
        return head, lambda i, h: linear(h, self.tables[i], self.biases[i], self.projection(i))

    def nll(self, h, targets):
        """-log p(targets | h), in the shape and order of targets (...); h: (..., D).  Float32 also under autocast."""
        flat, h_flat = targets.reshape(-1), h.reshape(-1, self.d_model)
        index, last = self.clusters(flat), self.edges[1] + len(self.edges) - 2
        column = flat.clone()                   # in the head: a word of cluster 0, or the column of its cluster
        for i, own in enumerate(index[1:], start=1):
            column[own] = last - i              # the first tail has the last column
        head, tail = self.softmax_parts(h_flat)
        nll = F.cross_entropy(head, column.to(h.device, torch.long, non_blocking=True), reduction="none")
        for i, own in enumerate(index[1:], start=1):        # also where it is empty: its parameters stay in the graph
            target = (flat[own] - self.edges[i]).to(h.device, torch.long, non_blocking=True)
            own = own.to(h.device, non_blocking=True)
            nll = nll.index_add(0, own, F.cross_entropy(tail(i, h_flat[own]), target, reduction="none"))
        return nll.view(targets.shape)

    def log_prob(self, h):
        """log p of every type, (N, n_token), after h (N, D)."""
        head, tail = self.softmax_parts(h)
        head, first = head.log_softmax(1), self.edges[1]
        tails = [tail(i, h).log_softmax(1) + head[:, first + len(self.edges) - 2 - i, None]
                 for i in range(1, len(self.edges) - 1)]
        return torch.cat([head[:, :first], *tails], dim=1)

    def forward(self, ids, targets=None, memory=None, mem_len=None, unroll=0, max_iter=None, regularize=False,
                on_backward=None):
        """Output of a segment ids (B, T), of which targets (B, T) are the next tokens; memory: of the segment before.

        mem_len: length of the memory that is handed on (default self.mem_len).
        unroll > 0: the pretraining network of so many layers in place of the solver.
        max_iter: steps of the solver (default self.max_iter).
        regularize: compute the Jacobian regularisation term too.
        on_backward: called with the result of the backward solve of grad="implicit".
        """
        B, T = ids.shape
        mem_len = self.mem_len if mem_len is None else mem_len
        max_iter = self.max_iter if max_iter is None else max_iter
        masks = self.masks(B, T, T + (0 if memory is None else memory.h.shape[1]), self.injection.weight.device)
        f, h0, u, memory = self.segment(ids, memory, masks)
        result = jr = None
        if unroll:
            h = upg(f, h0, k=unroll, lam=1.0)
        elif max_iter == 0:
            h = upg(f, h0, k=self.k, lam=self.lam)
        else:
            h, result = equilibrium(f, h0, grad=self.grad, k=self.k, lam=self.lam, solver=self.solver,
                                    max_iter=max_iter, tol=self.tol, backward_solver=self.backward_solver,
                                    backward_max_iter=self.backward_max_iter, backward_tol=self.tol,
                                    on_backward=on_backward)
            if regularize:
                # One more call of F.  To share the gradient's would cost UPG's backward as much; npg and implicit would
                # save it, but their graph belongs to common.equilibrium, and a compiled one has no second derivative.
                eager = functools.partial(type(self).f, self, **f.keywords)
                jr = jacobian_regularization(eager, result.h)
        kept = Memory(*(torch.cat([old, new.detach().to(old.dtype)], 1) for old, new in zip(memory, (h, u))))
        kept = Memory(*(part[:, max(0, part.shape[1] - mem_len):] for part in kept))
        nll = None if targets is None else self.nll(h if masks.output is None else h * masks.output, targets)
        return Output(nll, kept, result, jr, h)


# --- official checkpoints --------------------------------------------------------------------------------------------

def grouped_by_head(rows, n_head, back=False):
    """Rows of W_qkv or the injection from thirds (queries, keys, values; heads within each) to heads; back: reversed.

    Row s D + h d + a of locuslab/deq is row 3 d h + s d + a of torchdeq's deq-lm.
    """
    d = len(rows) // (3 * n_head)
    shape = (n_head, 3, d) if back else (3, n_head, d)
    return rows.unflatten(0, shape).transpose(0, 1).flatten(0, 2)


def official_names(model, lm):
    """{our key: key in locuslab/deq, or with `lm` in torchdeq's deq-lm}."""
    g, v = "parametrizations.weight.original0", "parametrizations.weight.original1"
    inject = "injection" if lm else "inject_conv"
    names = {"injection.weight": f"{inject}.weight", "injection.bias": f"{inject}.bias",
             "cluster_weight": "crit.cluster_weight", "cluster_bias": "crit.cluster_bias",
             "head_projection": "crit.out_projs.0.weight"}
    for i in range(len(model.tables)):
        names |= {f"tables.{i}": f"word_emb.emb_layers.{i}.weight", f"biases.{i}": f"crit.out_layers.{i}.bias",
                  f"projections.{i}": f"word_emb.emb_projs.{i}.weight"}
    for b in range(len(model.blocks)):
        attn, ff = (f"func.{part}.{b}." if lm else f"func.{part}." for part in ("dec_attn", "pos_ff"))
        names |= {f"blocks.{b}.{key}": attn + key for key in ("r_w_bias", "r_r_bias")}
        for ours, theirs in (("qkv", attn + "qkv_net"), ("r", attn + "r_net"), ("o", attn + "o_net"),
                             ("ff1", ff + "ff1_net"), ("ff2", ff + "ff2_net")):
            names |= {f"blocks.{b}.{ours}.{g}": f"{theirs}.weight_g", f"blocks.{b}.{ours}.{v}": f"{theirs}.weight_v",
                      f"blocks.{b}.{ours}.bias": f"{theirs}.bias"}
        for ours, theirs in (("ln1", attn + "ln1"), ("ln_out", attn + "ln2"), ("ln2", ff + "ln")):
            names |= {f"blocks.{b}.{ours}.{key}": f"{theirs}.{key}" for key in ("weight", "bias")}
    return {ours: theirs for ours, theirs in names.items() if ours in model.state_dict()}


def load_official(model, state_dict):
    """Loads a state dict of locuslab/deq (DEQ-Sequence), torchdeq's deq-seq, or torchdeq's deq-lm.

    The file does not say whether it is of a PostLN or a PreLN model: build the right one.  Strict: ValueError names
    keys that are unknown, missing, of another shape, or not tied where they must be.
    """
    state_dict = state_dict.get("state_dict", state_dict) if isinstance(state_dict, dict) else None
    if not isinstance(state_dict, dict) or not all(map(torch.is_tensor, state_dict.values())):
        raise ValueError("it is no state dict: a dict of tensors")
    found = {}
    for key, value in state_dict.items():
        key = key.removeprefix("module.")
        if key.startswith(("func_copy.", "deq.")) or key == "pos_emb.inv_freq":     # a copy of F; a constant
            continue
        found[key] = value.flatten(1) if value.dim() == 3 else value                # kernel-1 convolutions
    lm = any(key.startswith(("injection.", "func.dec_attn.0.")) for key in found)
    own, names = model.state_dict(), official_names(model, lm)
    for key in [k for k in names.values() if k.endswith(".weight_v") and k[:-2] in found]:
        found[key] = found.pop(key[:-2])                        # without weight norm: v = W, g = ||W||
        found[key[:-1] + "g"] = torch.linalg.vector_norm(found[key], dim=1, keepdim=True)
    problems = []
    for i in range(len(model.tables)):
        for tied in ("layers", "projs"):
            copy, original = f"crit.out_{tied}.{i}.weight", f"word_emb.emb_{tied}.{i}.weight"
            if copy in found and copy not in names.values():
                value = found.pop(copy)
                if original in found and not torch.equal(value, found[original]):
                    problems.append(f"{copy} differs from {original}, which is the same parameter here")
    problems += [f"unknown {k}" for k in sorted(found.keys() - set(names.values()))]
    problems += [f"missing {k}" for k in names.values() if k not in found]
    problems += [f"{theirs} is {tuple(found[theirs].shape)} instead of {tuple(own[ours].shape)}"
                 for ours, theirs in names.items() if theirs in found and found[theirs].shape != own[ours].shape]
    if problems:
        raise ValueError("; ".join(problems[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else ""))
    for key in [k for k in names.values() if lm and ("qkv_net" in k or k.startswith("injection."))]:
        found[key] = grouped_by_head(found[key], model.blocks[0].n_head, back=True)
    model.load_state_dict({ours: found[theirs] for ours, theirs in names.items()})


def official_state_dict(model, lm=False):
    """The model's weights as locuslab/deq names and shapes them, or with `lm` as torchdeq's deq-lm does."""
    own, state = model.state_dict(), {}
    for ours, theirs in official_names(model, lm).items():
        value = own[ours]
        if lm and ("qkv_net" in theirs or theirs.startswith("injection.")):
            value = grouped_by_head(value, model.blocks[0].n_head)
        if not lm and value.dim() == 2 and theirs.startswith(("inject_conv", "func.dec_attn")) and "bias" not in theirs:
            value = value[:, :, None]
        state[theirs] = value
    for i in range(len(model.tables)):
        state[f"crit.out_layers.{i}.weight"] = own[f"tables.{i}"]
        if i > 0 and f"projections.{i}" in own:
            state[f"crit.out_projs.{i}.weight"] = own[f"projections.{i}"]
    state["pos_emb.inv_freq"] = 1 / 10000 ** (torch.arange(0.0, model.d_model, 2.0) / model.d_model)
    return state


# --- evaluation and diagnostics --------------------------------------------------------------------------------------

def autocast(args, device):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.amp)


@contextlib.contextmanager
def evaluating(model, args):
    """The model in evaluation mode, with the solver of evaluation.

    A solver sees the future a little: its inner products, its stop and its choice of the best state are of a stream's
    whole segment.  The leak is of the size of the residual.
    """
    before = model.solver, model.max_iter, model.training
    model.solver, model.max_iter = SOLVERS.get(args.eval_solver, fixed_point), args.eval_max_iter
    model.eval()
    yield
    model.solver, model.max_iter, training = before
    model.train(training)


@torch.no_grad()
def evaluate(model, name, ids, args, process, mem_len, unroll=0):
    """Perplexity of a text in --eval-streams streams with a memory of their own; the first token of each is given.

    unroll: layers of the unrolled network in place of the solver; 0: the solver.
    """
    text = streams(ids, args.eval_streams)
    own = text.tensor_split(process.world_size)[process.rank]              # some may have one stream more, or none
    sums, residuals, memory = torch.zeros(4, dtype=torch.float64, device=process.device), [], None
    starts = range(0, text.shape[1] - 1, args.segment)
    with evaluating(model, args):
        for start in tqdm(starts if len(own) else (), desc=f"evaluating {name}", leave=False,
                          disable=process.rank > 0 or not sys.stderr.isatty()):
            stop = min(start + args.segment, text.shape[1] - 1)
            with autocast(args, process.device):
                out = model(own[:, start:stop], own[:, start + 1:stop + 1], memory, mem_len=mem_len, unroll=unroll)
            memory = out.memory
            sums[0] += out.nll.sum()
            sums[1] += out.nll.numel()
            if out.result is not None:
                residuals.append(out.result.residual)
                sums[2] += out.result.n_evals
                sums[3] += 1
    nll, count, evals, solves = all_reduce_sum(sums).tolist()
    record = {f"{name}_nll": nll / count, f"{name}_perplexity": math.exp(min(nll / count, 700.0)),
              f"{name}_tokens": int(count), f"{name}_mem_len": mem_len}
    if solves:
        record.update(health(name, residuals, args.tol), **{f"{name}_evals": evals / solves})
    return record


def spell(name, record):
    """What `evaluate` found, on one line."""
    return (f"{name} perplexity {record[f'{name}_perplexity']:.6g} of {record[f'{name}_tokens']} tokens, memory "
            f"{record[f'{name}_mem_len']}")


def spell_solves(name, record):
    """A second line: how its solves went, and those of training where they are in the record; "" without a solver."""
    if f"{name}_evals" not in record:
        return ""
    return (f"\n  {spell_health(record, 'train', name, 'backward')}; {record[f'{name}_evals']:.1f} calls of F per "
            "segment")


@torch.no_grad()
def radius(model, ids, memory, lams=(1.0,), n_iter=50):
    """Spectral radius per stream of lam J + (1 - lam) I at h* of a segment, for each lam; dropout off."""
    f, h0, *_ = model.segment(ids, memory)
    h = model.solver(f, h0, max_iter=model.max_iter, tol=model.tol).h
    return [spectral_radius(f, h, lam=lam, n_iter=n_iter) for lam in lams]


@torch.no_grad()
def radii(model, ids, args, process):
    """App. D.3: spectral radii of J and lam J + (1 - lam) I at h*, means over the streams' second segment; no trace."""
    rng, own = rng_state(), streams(ids, args.eval_streams)
    own = own.tensor_split(process.world_size)[process.rank]
    sums, T = torch.zeros(4, dtype=torch.float64, device=process.device), min(args.segment, own.shape[1] // 2)
    if len(own):
        with evaluating(model, args), autocast(args, process.device):
            memory = model(own[:, :T], mem_len=args.eval_mem_len[0]).memory
            rho, rho_lam = radius(model, own[:, T:2 * T], memory, lams=(1.0, model.lam))
        sums += torch.stack([rho.sum(), rho_lam.sum(), (rho > 1).sum(), torch.ones_like(rho).sum()])
    set_rng_state(rng)
    rho, rho_lam, above, count = all_reduce_sum(sums).tolist()
    return {"rho_J": rho / count, "rho_J_lam": rho_lam / count, "rho_J_above_1": above / count, "lam": model.lam}


@torch.no_grad()
def generate(model, vocabulary, args, process, unroll=0):
    """Continues --generate token by token, each drawn from the model's distribution; prints as it goes."""
    known = {word: i for i, word in enumerate(vocabulary)}
    words = args.generate.replace("\n", " <eos> ").split() or ["<eos>"]
    missing = [word for word in words if word not in known]
    if missing and "<unk>" not in known:
        die(f"--generate: {missing[0]!r} is not in the vocabulary; it has whole words, and punctuation marks as words")
    if missing:
        print(f"note: not in the vocabulary, read as <unk>: {' '.join(missing)}", file=sys.stderr, flush=True)
    ids, memory = torch.tensor([[known.get(word, known.get("<unk>")) for word in words]]), None
    print(args.generate, end=" ", flush=True)
    with evaluating(model, args), autocast(args, process.device):
        for _ in range(args.generate_tokens):
            for segment in ids.split(args.segment, dim=1):
                out = model(segment, memory=memory, mem_len=args.eval_mem_len[0], unroll=unroll)
                memory = out.memory
            log_prob = model.log_prob(out.h[:, -1])
            ids = (torch.multinomial((log_prob / args.temperature).softmax(1), 1) if args.temperature else
                   log_prob.argmax(1, keepdim=True)).cpu()
            word = vocabulary[ids.item()]
            print("\n" if word == "<eos>" else word + " ", end="", flush=True)
    print()


# --- benchmark -------------------------------------------------------------------------------------------------------

TABLE3 = {      # of the model: norm, gradient, forward and backward steps; and whether the loss has the JR term
    "PostLN implicit": (False, "implicit", 30, 35, False), "PostLN UPG": (False, "upg", 30, 35, False),
    "PreLN JR implicit": (True, "implicit", 14, 14, True), "PreLN JR UPG": (True, "upg", 14, 14, True),
    "PreLN JR UPG, 20": (True, "upg", 20, 14, True), "PostLN NPG": (False, "npg", 30, 35, False)}


def benchmark(model, args, device, repeats=3):
    """Times training steps of Table 3's rows in turns, and the solver's overhead: medians over the repeats.

    A row with JR is the mean of steps with and without the term, weighted by --jr-freq.  All rows have the --mem-len,
    --dropout, --dropatt and --backward-solver of the command and no jitter: only gradient, JR and iterations differ.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)
    model.train()
    model.tol, n, rng = 0.0, model.edges[-1], torch.Generator().manual_seed(0)
    text = (n * torch.rand(args.batch_size, args.segment + 1, generator=rng) ** 4).long().clamp_max(n - 1)
    B, M, D = args.batch_size, args.mem_len, args.d_model
    memory = Memory(torch.randn(B, M, D, device=device), 0.1 * torch.randn(B, M, 3 * D, device=device)) if M else None

    def configure(row):
        pre_ln, model.grad, model.max_iter, model.backward_max_iter, regular = TABLE3[row]
        for block in model.blocks:
            block.pre_ln = pre_ln
        return regular

    def step(regularize):
        def forward():
            with autocast(args, device):
                out = model(text[:, :-1], text[:, 1:], memory, regularize=regularize)
            return out.nll.mean() + (0.1 * out.jr if regularize else 0)

        return timed_step(forward, finish, device)

    def finish():
        nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def measure(row):
        share = args.jr_freq if configure(row) else 0
        plain = step(False)
        more = step(True) if share else plain
        return [(1 - share) * a + share * b for a, b in zip(plain[:3], more)] + [max(plain[3], more[3])]

    def overhead():
        configure("PostLN UPG")
        with torch.no_grad(), autocast(args, device):
            f, h0, *_ = model.segment(text[:, :-1], memory)
            return solver_overhead(functools.partial(model.solver, max_iter=model.max_iter, tol=0), f, h0, device)

    median = medians_in_turns({**{row: functools.partial(measure, row) for row in TABLE3}, "overhead": overhead},
                              repeats)
    ratio, f_ms = median.pop("overhead")
    about = describe_run(device, 1)
    print(f"\n{sum(p.numel() for p in model.parameters()):,} parameters, {B} streams x {args.segment} tokens, memory "
          f"{M}, dropatt {args.dropatt}, no jitter, {args.solver} forward, {args.backward_solver} backward, k = "
          f"{model.k}; {about['device']}, torch {about['torch']}, commit {about['commit']}")
    print("row                forward ms  backward ms  step ms  peak GB  tokens/s  backward    step (first row / this)")
    base = median["PostLN implicit"]
    for row, (forward, backward, whole, gb) in median.items():
        print(f"{row:18s} {forward:10.1f} {backward:12.1f} {whole:8.1f} {gb:8.3f} "
              f"{1e3 * B * args.segment / whole:9.0f} {base[1] / backward:8.2f}x {base[2] / whole:6.2f}x")
    print(f"F: {f_ms:.1f} ms; solver overhead, solve / (calls of F x time of F): {ratio:.3f}")
    configure("PostLN NPG")
    few, many = (step(False)[3] for model.k in (1, 20))
    print(f"NPG peak memory: k = 1 {few:.3f} GB, k = 20 {many:.3f} GB, ratio {many / few:.3f}")


# --- training --------------------------------------------------------------------------------------------------------

def build_model(args, n_token, process):
    """The model of the flags; a narrow one begins with wider weights, so that its injections are of equal size."""
    if args.cutoffs[-1] >= n_token:
        die(f"--cutoffs {' '.join(map(str, args.cutoffs))}: the text has only {n_token} types")
    same = ("d_model d_embed n_head d_inner div_val n_blocks preln_residual ln_affine attn_out_ln init_before_norm "
            "local_size mem_len dropout dropatt output_dropout checkpoint_blocks grad k max_iter tol backward_max_iter")
    model = DEQTransformer(n_token, args.cutoffs, pre_ln=args.norm == "pre", solver=SOLVERS[args.solver],
                           backward_solver=BACKWARD_SOLVERS[args.backward_solver],
                           init_std=0.01 * math.sqrt(700 / args.d_model), lam=1.0 if args.lam == "auto" else args.lam,
                           **{name: getattr(args, name) for name in same.split()}).to(process.device)
    if args.compile:
        model.f = compiled(model.f)
    return model


MISFIT = "{} {} does not fit the model (--d-model, --d-inner, --cutoffs, ..., types of --data)"


def check_model_flags(flag, path, state, args, types, remedy):
    """Ends the run where a checkpoint of ours is of another model, or of another vocabulary, than this run."""
    check_same_run(path, state["args"], args, set(vars(args)) - MODEL_FLAGS, flag, remedy)
    check_vocabulary(flag, path, state, args, types)


def check_vocabulary(flag, path, state, args, types):
    if state["types"] != types:
        die(f"{flag} {path} is of a run with another vocabulary than --data {args.data} has")


def restore(args, model, types, train_text, optimizer, scheduler):
    """--resume in training: all of the state.  Returns what was read."""
    state = load_checkpoint(args.resume)
    if not is_ours(state):
        die(f"--resume {args.resume} was not written by this script: an official checkpoint can be evaluated (--eval), "
            "or begun with (--init)")
    free = ("data out resume init save_every log_every radius_every compile checkpoint_blocks accumulate eval "
            "eval_streams eval_mem_len eval_solver eval_max_iter benchmark generate generate_tokens temperature")
    check_same_run(args.resume, state["args"], args, free.split())
    check_vocabulary("--resume", args.resume, state, args, types)
    if "optimizer" not in state:
        die(f"--resume {args.resume} has weights alone: continue from checkpoint.pt, or begin with --init")
    if state.get("train_text") != train_text:
        die(f"--resume {args.resume} is of a run on another training text than --data {args.data} holds")
    load_weights(model, state, load_official, MISFIT.format("--resume", args.resume))
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    model.lam = state["lam"]
    return state


def unrolled_layers(args, step, evaluation=False):
    """Layers of the unrolled network in place of the solver after `step` steps, in pretraining above all; 0: none."""
    if step < args.pretrain_steps:
        return args.pretrain_layers
    return args.eval_max_iter if evaluation and args.eval_solver == "unrolled" else 0


def jr_weight(args, step):
    """Weight of the JR term after `step` steps: --jr, and 0.1 more per --jr-increment, after pretraining."""
    if not args.jr_increment:
        return args.jr
    return args.jr + 0.1 * (step // args.jr_increment - min(step, args.pretrain_steps) // args.jr_increment)


def train(args, process, model, text):
    device, rank, world = process.device, process.rank, process.world_size
    main, types = rank == 0, checksum(text.vocabulary)
    train_text = hashlib.sha256(text.train.numpy()).hexdigest()[:16]
    checkpoint, args.resume = open_run(args.out, args.resume)
    best_path = checkpoint.with_name("best.pt")
    B, T, n = args.batch_size, args.segment, args.accumulate
    if len(text.train) < 2 * B:
        die(f"--batch-size {B}: the training text has only {len(text.train)} tokens")
    tokens = streams(text.train, B)                                                          # (B, length)
    segments = math.ceil((tokens.shape[1] - 1) / T)                                          # per epoch; last: short
    own = tokens.tensor_split(world)[rank].tensor_split(n)                                   # n micro-batches
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)

    def schedule(done):             # the rate of step done + 1
        s = done + 1
        return s / args.warmup_steps if s < args.warmup_steps else (1 + math.cos(math.pi * s / args.steps)) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    state = {"step": 0, "evaluated": 0, "best": math.inf, "best_step": 0, "seconds": 0.0}
    memories = [None] * n
    if args.resume:
        state = restore(args, model, types, train_text, optimizer, scheduler)
        if state["memory"] is not None:
            parts = [part.tensor_split(world)[rank].to(device).tensor_split(n) for part in state["memory"]]
            memories = [Memory(*pair) for pair in zip(*parts)]
    elif args.init:
        first = load_checkpoint(args.init, flag="--init")
        if is_ours(first):
            check_model_flags("--init", args.init, first, args, types, "use the same flags")
        load_weights(model, first, load_official, MISFIT.format("--init", args.init))
    step, evaluated, best, best_step = (state[k] for k in ("step", "evaluated", "best", "best_step"))
    seed_everything(args.seed + rank)
    if args.resume:
        set_rng_states(state["rng"], process)
    # No device_ids: ids stay on the host, where they are sorted into clusters without waiting for the GPU.
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    timer = SaveTimer(args.save_every)
    parameters = sum(p.numel() for p in model.parameters())
    log = start_log(args, process, step, parameters, f"{parameters:,} parameters; {len(text.train)} training tokens of "
                    f"{len(text.vocabulary)} types; {args.steps} steps, {args.steps / segments:.1f} epochs of "
                    f"{segments}", last_step_of={"eval": evaluated, "test": -1}, steps=args.steps)

    def save():
        rng, memory = rng_states(), None                    # all processes take part
        if memories[0] is not None:
            memory = [torch.cat(gather_objects(torch.cat(parts).cpu())) for parts in zip(*memories)]
        if main:
            save_checkpoint(checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                         "scheduler": scheduler.state_dict(), "rng": rng, "memory": memory,
                                         "lam": model.lam, "step": step, "evaluated": evaluated, "best": best,
                                         "best_step": best_step, "types": types, "train_text": train_text,
                                         "args": vars(args), "seconds": time.perf_counter() - started})

    meter, residuals, backward_residuals, stop = Meter(device), [], [], False
    started, due = time.perf_counter() - state["seconds"], step % args.eval_every == 0 or step == args.steps
    bar = tqdm(total=args.steps, initial=step, disable=not (main and sys.stderr.isatty()))
    # Evaluation comes first: a run that was cut off in one finds its checkpoint just before it.
    while not stop and (step < args.steps or evaluated < step):
        if step > evaluated and due:
            unroll = unrolled_layers(args, step - 1, evaluation=True)
            with timer.saved():
                record = evaluate(model, "valid", text.valid, args, process, args.eval_mem_len[0], unroll)
            if evaluated <= args.pretrain_steps < step:
                best = math.inf                             # until now it was of the pretraining network
            evaluated, last = step, record["valid_perplexity"]
            if last < best:
                best, best_step = last, step
                if main:
                    save_checkpoint(best_path, {"model": model.state_dict(), "types": types, "args": vars(args),
                                                "lam": model.lam, "step": step, "valid_perplexity": last})
            for name, found in (("train", residuals), ("backward", backward_residuals)):
                record.update(health(name, found, args.tol))
                found.clear()
            if main:
                log.write(event="eval", step=step, best_perplexity=best, best_step=best_step,
                          seconds=time.perf_counter() - started, **record)
                tqdm.write(f"step {step}: {spell('valid', record)}; best {best:.6g} (step {best_step})"
                           + spell_solves("valid", record))
            save()
            meter.reset()
            continue

        start = step % segments * T
        end = min(start + T, tokens.shape[1] - 1)
        if start == 0:
            memories = [None] * n                           # an epoch begins
        # The same choices on all processes, and again after a restart: drawn from seed and step alone.
        draw = random.Random(f"{args.seed}-{step}")
        unroll = unrolled_layers(args, step)
        regularize = not unroll and jr_weight(args, step) > 0 and draw.random() < args.jr_freq
        max_iter = args.max_iter - draw.randint(0, args.jitter)
        # Each time from new random vectors: those of 100 steps ago have settled on another text's Jacobian.  On the toy
        # text 50 iterations from them gave a rho 24 % too low, from random ones less than 1 %.
        if args.lam == "auto" and not unroll and (step % 100 == 0 or step == args.pretrain_steps):
            with autocast(args, device):
                rho = sum(radius(model, ids[:, start:end], memory)[0].mean() for ids, memory in zip(own, memories))
            rho = all_reduce_sum(rho.double()) / (n * world)
            if not torch.isfinite(rho):
                die(f"--lam auto: the spectral radius of J is {rho.item()} at step {step}; use --jr, a lower --lr, or "
                    "--grad upg", code=1)
            model.lam = adaptive_damping(rho)                   # of the mean over the streams
        means = collections.defaultdict(float)              # over the micro-batches
        for i in range(n):
            ids, targets = own[i][:, start:end], own[i][:, start + 1:end + 1]
            reduce = world == 1 or i == n - 1               # gradients meet once per step
            with contextlib.nullcontext() if reduce else net.no_sync():
                with autocast(args, device):
                    output = net(ids, targets, memories[i], unroll=unroll, max_iter=max_iter, regularize=regularize,
                                 on_backward=lambda r: backward_residuals.append(r.residual))
                loss = nll = output.nll.mean()
                if regularize:
                    loss = nll + jr_weight(args, step) * output.jr
                    means["jr"] += output.jr.detach() / n
                (loss / n).backward()
            means["loss"] += nll.detach() / n
            memories[i] = output.memory
            if output.result is not None:
                residuals.append(output.result.residual)
        means["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
        meter.add(n * ids.numel(), **means)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        lr = scheduler.get_last_lr()[0]                     # of this step
        scheduler.step()
        step += 1
        bar.update()

        # --- the step ends here; what follows is logging, diagnostics and saving ---
        saving, stop = timer.poll()
        due = step % args.eval_every == 0 or step == args.steps
        saving = saving or due                              # before the evaluation, which may take long
        if args.radius_every and step % args.radius_every == 0:
            paused = clock(device)
            record = radii(model, text.valid, args, process)
            if main:
                log.write(event="radius", step=step, **record)
                tqdm.write(f"step {step}: spectral radius of J {record['rho_J']:.3f}, of J_lam "
                           f"{record['rho_J_lam']:.3f} (lam = {model.lam:.2f})")
            meter.start += clock(device) - paused     # diagnostics do not count as training time
        if step % args.log_every == 0 or saving:
            record = meter.read()                                           # host sync
            broken = what_broke(record["loss"], model.parameters() if saving else ())
            if broken:
                kept = f"the last good state is {checkpoint}" if checkpoint.exists() else "nothing was saved yet"
                die(f"{broken} by step {step}: try a lower --lr or --lam, or --jr; {kept}", code=1)
            if main:
                log.write(event="train", step=step, epoch=step / segments, lr=lr, lam=model.lam,
                          seconds=time.perf_counter() - started, **record)
                more = f"  JR {record['jr']:.3f}" if "jr" in record else ""
                more += f"  lam {model.lam:.2f}" if args.lam == "auto" else ""
                more += f"  {record['peak_gb']:.2f} GB" if "peak_gb" in record else ""
                tqdm.write(f"step {step:6d}  epoch {step / segments:5.2f}  loss {record['loss']:.4f}  perplexity "
                           f"{math.exp(min(record['loss'], 700.0)):<8.6g}  lr {lr:.2e}  |g| {record['grad_norm']:.3f}  "
                           f"{record['ms_per_step']:.0f} ms/step  {record['samples_per_s']:.0f} tokens/s{more}")
        if saving:
            save()
            meter.reset()
    bar.close()
    if stop:
        if main:
            print(f"SIGTERM: saved after step {step} to {checkpoint}; continue with the same command, --out {args.out} "
                  "and --resume auto", flush=True)
        return
    # best.pt is not there where the run was continued in another folder.
    here, of_step = (best_path, best_step) if best_path.exists() else (checkpoint, step)
    if of_step != step:
        load_weights(model, load_checkpoint(here, flag="--out"), load_official, MISFIT.format("--out", here))
    unroll = unrolled_layers(args, of_step - 1, evaluation=True)
    with timer.saved():
        record = evaluate(model, "test", text.test, args, process, args.eval_mem_len[0], unroll)
    if main:
        log.write(event="test", step=step, of_step=of_step, seconds=time.perf_counter() - started, **record)
        print(f"done: {spell('test', record)} (weights of step {of_step}; best on valid: step {best_step}); "
              f"{(time.perf_counter() - started) / 60:.1f} minutes{spell_solves('test', record)}", flush=True)
        if text.best:
            print(BEST.format(*text.best), flush=True)
        flags = "".join(f" --{name.replace('_', '-')}" for name in ("amp", "no_tf32") if getattr(args, name))
        print(f"weights: {here}; evaluate them with: python deq_wikitext.py --eval --resume {shlex.quote(str(here))}"
              + flags, flush=True)


# --- main ------------------------------------------------------------------------------------------------------------

def evaluate_checkpoint(args, process, model, text, state):
    """--eval: perplexities at each memory length, and spectral radii."""
    ours, main = is_ours(state), process.rank == 0
    unroll = unrolled_layers(args, state["step"] - 1 if ours else math.inf, evaluation=True)
    if main:
        print(args.resume + (f", step {state['step']}: " if ours else ": ")
              + (f"an unrolled network of {unroll} layers" if unroll else
                 f"{args.eval_solver}, at most {args.eval_max_iter} steps, tolerance {args.tol:g}")
              + f"; {args.eval_streams} streams, segments of {args.segment}", flush=True)
    for mem_len, name in itertools.product(args.eval_mem_len, ("valid", "test")):
        record = evaluate(model, name, getattr(text, name), args, process, mem_len, unroll)
        if main:
            print(spell(name, record) + spell_solves(name, record), flush=True)
    if ours and state["step"] <= args.pretrain_steps:
        return                          # it has not seen its equilibrium yet
    record = radii(model, text.valid, args, process)
    if main:
        print(f"spectral radius of J {record['rho_J']:.3f} (above 1 for {100 * record['rho_J_above_1']:.0f} % of the "
              f"streams), of J_lam {record['rho_J_lam']:.3f} (lam = {record['lam']:.2f})")
        if text.best:
            print(BEST.format(*text.best))


def main(args):
    line_by_line()
    process, state = init_process(), None
    if args.eval or args.generate is not None:
        state = load_checkpoint(args.resume)
    elif args.batch_size % (process.world_size * args.accumulate):
        die(f"--batch-size {args.batch_size} is not divisible by {process.world_size} process(es) x --accumulate "
            f"{args.accumulate}")
    torch.set_float32_matmul_precision("highest" if args.no_tf32 else "high")       # "high": TF32, on GPUs only
    seed_everything(args.seed)          # the same weights on all processes
    if args.benchmark:
        n_token = 267735 if args.cutoffs[-1] < 267735 else args.cutoffs[-1] + 1
        benchmark(build_model(args, 2000 if args.data == "toy" else n_token, process), args, process.device)
        return
    text = load_text(args, process)
    for name, ids in (("valid", text.valid), ("test", text.test)):
        if len(ids) < 2 * args.eval_streams:
            die(f"--eval-streams {args.eval_streams}: the {name} text has only {len(ids)} tokens")
    model = build_model(args, len(text.vocabulary), process)
    if state is None:
        choose_out(args, f"wikitext-{args.grad}")
        train(args, process, model, text)
    else:
        if is_ours(state):
            check_model_flags("--resume", args.resume, state, args, checksum(text.vocabulary), "leave them out")
            note_differences(state["args"], args, "solver max_iter tol segment mem_len local_size amp")
            model.lam = state["lam"] if args.lam == "auto" else args.lam
        load_weights(model, state, load_official, MISFIT.format("--resume", args.resume))
        if args.eval:
            evaluate_checkpoint(args, process, model, text, state)
        else:
            step = state["step"] - 1 if is_ours(state) else math.inf
            generate(model, text.vocabulary, args, process, unrolled_layers(args, step, evaluation=True))
    if process.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
