"""DEQ-Transformer on WikiText-103 with phantom gradients: "On Training Implicit Models" (NeurIPS 2021).

    torchrun --nproc_per_node=4 deq_wikitext.py             # PostLN, UPG A_{5,0.8}: 4 GPUs x 14 streams
    python deq_wikitext.py --data toy                       # a small model on generated text, on a CPU
    python deq_wikitext.py --accumulate 4                   # one GPU: the same streams in 4 micro-batches
    python deq_wikitext.py --eval --resume FILE --eval-mem-len 150 480      # ours, or an official checkpoint
    python deq_wikitext.py --generate "The game was" --resume FILE          # continues it (toy: "w5 w17")
    python deq_wikitext.py --benchmark --batch-size 14 --backward-solver broyden    # times, memory of Table 3

Words:
    h* = F(h*; u), J            Eq. (1): state h, equilibrium module F, equilibrium h*.  J = dF/dh
    u, the injection            how the tokens enter F: it is added to the queries, keys and values
    PostLN, PreLN               layer normalisation after, or before, each part of F
    UPG A_{k,lam}, NPG          phantom gradients: k steps from h* with damping lam, Eq. (16), or a Neumann
                                series of k terms, Eq. (17)
    JR                          Jacobian regularisation: a loss term for the size of J
    jitter                      each training step lowers the solver's iteration limit by a random number
    stream, segment, memory     the text is cut into streams, which are read side by side.  A step reads the
                                next segment of each, and attends to the memory: h and u of earlier tokens
    type, cluster               a type is an entry of the vocabulary.  The adaptive softmax sorts types by
                                frequency.  Its head has a column for each frequent type and one for each
                                cluster of rarer types (a "tail").  Rarer types have narrower embeddings

Text: --data DIR (default data/wikitext-103) has wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens of
the archive wikitext-103-v1.zip, or the same three as train.txt, valid.txt and test.txt.  --eval and
--generate need it too, for the vocabulary.  Our checkpoints contain the flags of text, model, solver and
memory.  An official one contains none: give the model flags of its row.  The file does not show its --norm.

Table 3 (97,691,888 parameters, 300,000 steps of 56 streams x 150 tokens): test perplexity, and speed relative
to the first row.  A row is the command torchrun --nproc_per_node=4 deq_wikitext.py with the flags at its end:
    paper 24.0  1.0x  --grad implicit --backward-solver broyden
          25.7  1.7x  (none)
          24.5  1.7x  --norm pre --dropout 0.06 --dropatt 0.01 --mem-len 300 --grad implicit
                      --backward-solver broyden --max-iter 14 --backward-max-iter 14 --jitter 2
                      --jr 2.0 --jr-freq 0.4 --jr-increment 30000
          24.4  2.2x  --norm pre --dropout 0.06 --dropatt 0.01 --mem-len 300 --max-iter 14 --jitter 2 --jr 0.1
          24.0  1.7x  --norm pre --dropout 0.06 --dropatt 0.01 --mem-len 300 --max-iter 20 --jitter 2 --jr 0.1
          fails -     --grad npg                    # App. D.3.  --jr or the next row helps (no number)
          -     -     --grad npg --lam auto         # lam = 1 / rho(J)
The paper solves the backward system by Broyden's method.  The default here is GMRES.
torchdeq reports 22.34 for its "deq-lm", or 21.85 with --eval-mem-len 480, in half the steps.  This model has
three thinner blocks, and training unrolls twelve steps from zero without a solver:
    22.34             --model deq-lm

Speed and memory (--benchmark with the flag measures all of these except --accumulate):
    --compile                   runs F through torch.compile: fewer launches, equal results up to rounding
    --amp                       bf16 autocast, with solver state and softmax in float32.  Changes results
    TF32 products               the default on a GPU, for F and the solver, as in torchdeq.  Changes results.
                                --no-tf32 turns it off
    --accumulate n              not faster, but keeps 1/n of the activations, and draws dropout for each part
    --recompute                 not faster, but saves memory: the backward pass of UPG computes F again
    always on                   weights, position keys, and the memory's keys and values are computed once per
                                forward pass.  The solver uses fused attention (if dropatt is 0).  Targets
                                are sorted into clusters on the host
A step with the JR term (--jr) calls F once more.  There is no --cuda-graph as in mdeq_*.py, because every
batch has softmax clusters of other sizes.

Measured on one H200: step times of the first six rows, with 150 tokens of memory and no jitter, for example
109 ms for PostLN UPG at 14 streams.  No training of a row was run to the end.  assets/results.md has the
times, and a small counterpart of Table 3 on real text, on a CPU.

Differs from the paper and locuslab/deq:
    residuals                   per stream (there: one norm over the batch)
    --grad implicit and npg     loss and memory use h*, as evaluation does (there: F(h*))
    learning rate               step s has the rate of step s (there: full in step 1, then that of step s - 1)
    P_1 to P_3                  embedding and softmax share one parameter (there: two that share storage)
    forward solver of PreLN     Broyden, as in the paper (the script that it cites uses Anderson)
    NPG                         Eq. (17), not Algorithms 2 and 3
    pretraining                 also for UPG, as in the official protocol.  The paper leaves this open.
                                --pretrain-steps 0 turns it off
"""
import collections
import contextlib
import functools
import hashlib
import itertools
import math
import multiprocessing
import os
import random
import re
import shlex
import sys
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

# Puts large CPU tensors into 2 MB pages, which is faster.  torch reads this at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
import torch.nn.functional as F       # in prose F is the equilibrium module, DEQTransformer.f
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from tqdm import tqdm

from common import (Meter, Run, adaptive_damping, add_run_flags, anderson, benchmark, broyden, check_version,
                    compiled, die, equilibrium, existing_file, fixed_point, gmres, health, init_process,
                    is_ours, jacobian_regularization, load_checkpoint, load_weights, make_parser,
                    note_differences, parse_flags, recomputed, rng_state, save_checkpoint, seed_everything,
                    set_rng_state, spectral_radius, spell, upg, within)

# gmres needs an affine map, so it is only for the backward solve.
SOLVERS = {"broyden": broyden, "anderson": anderson, "fixed-point": fixed_point, "gmres": gmres}
# What --model decides besides the options below.  torchdeq's F differs from the paper's not only in size.
MODELS = {"deq": {}, "deq-lm": dict(n_blocks=3, preln_residual="raw", ln_affine=True, attn_out_ln=True,
                                    init_before_norm=True)}
# Defaults of the options: the paper's PostLN row, what torchdeq's model changes, what the toy text changes.
PRESETS = {
    "deq": dict(norm="post", d_model=700, n_head=10, d_inner=48000, cutoffs=[20000, 40000, 200000],
                dropout=0.05, k=5, lam=0.8, max_iter=30, backward_max_iter=35, pretrain_steps=32000,
                steps=300000, warmup_steps=16000, batch_size=56, segment=150, mem_len=150, lr=2.5e-4,
                eval_every=5000, log_every=200),
    "deq-lm": dict(norm="pre", d_inner=14800, k=12, lam=1.0, max_iter=0, pretrain_steps=0, steps=150000,
                   warmup_steps=8000, recompute=True),
    "toy": dict(d_model=64, n_head=4, d_inner=256, cutoffs=[200, 800], dropout=0.0, max_iter=12,
                backward_max_iter=12, pretrain_steps=0, steps=1000, warmup_steps=50, batch_size=20,
                segment=30, mem_len=30, lr=2e-3, eval_every=250, log_every=50)}
MODEL_FLAGS = "model norm d_model d_embed n_head d_inner cutoffs div_val"
# What --eval and --generate take from a checkpoint of ours if the command does not give it.
FROM_CHECKPOINT = MODEL_FLAGS + (
    " data vocab local_size solver max_iter tol k lam segment mem_len pretrain_steps pretrain_layers "
    "eval_streams eval_mem_len eval_solver eval_max_iter")
# What may change when a run is resumed.  In training only rounding and dropout masks depend on these.
MAY_DIFFER = ("init radius_every compile recompute accumulate eval_streams eval_mem_len eval_solver "
              "eval_max_iter generate generate_tokens temperature")


def presets(args):
    found = {**PRESETS["deq"], **(PRESETS["deq-lm"] if args.model == "deq-lm" else {})}
    if args.data == "toy":
        found.update(PRESETS["toy"])
        if args.model == "deq-lm":
            found["max_iter"] = 0   # deq-lm has no solver on the toy text either
    return found


def eval_memories(args):
    """The memory lengths to evaluate with."""
    return args.eval_mem_len or [args.mem_len]


def number_or_auto(text):
    """The argparse type of --lam."""
    return text if text == "auto" else within(float, "(0, 1]")(text)


def parse_args(argv=None):
    p = make_parser("Trains a DEQ-Transformer on WikiText-103.  Without options: the paper's PostLN model, "
                    "UPG A_{5,0.8}.  PRESETS has the defaults of --model deq-lm and --data toy.")
    count, natural = within(int, "[1, inf)"), within(int, "[0, inf)")       # whole numbers, from 1 and from 0
    share, positive = within(float, "[0, 1)"), within(float, "[0, inf)")    # fractions of 1, numbers from 0
    add = p.add_argument_group("data").add_argument
    add("--data", default="data/wikitext-103", type=os.path.expanduser, help="folder with wiki.{train,valid,"
        "test}.tokens or {train,valid,test}.txt, or 'toy' for text from a known random source")
    add("--vocab", choices=["train", "all"], default="train",
        help="build the vocabulary from the training text or from all three texts")

    add = p.add_argument_group("model").add_argument
    add("--model", choices=list(MODELS), default="deq",
        help="the paper's model, or torchdeq's with three thinner blocks")
    add("--norm", choices=["post", "pre"], help="layer normalisation after or before each part of F")
    add("--d-model", type=count, help="width of the state, a multiple of --n-head")
    add("--d-embed", type=count, help="embedding width of the most frequent types (default: --d-model)")
    add("--n-head", type=count, help="attention heads")
    add("--d-inner", type=count, help="hidden width of the feed-forward part")
    add("--cutoffs", type=count, nargs="+",
        help="ranks, by falling frequency, of the types with which the second and later clusters begin")
    add("--div-val", type=count, default=4,
        help="embeddings of each cluster are this many times narrower than those of the cluster before")
    add("--local-size", type=natural, default=0,
        help="number of keys that a position sees, itself included.  0 means 1000, and then --mem-len plus "
        "--segment must not exceed 1000")
    add("--dropout", type=share, help="dropout probability, with one mask for all evaluations of F in a step")
    add("--dropatt", type=share, default=0.0, help="the same for attention probabilities")
    add("--output-dropout", choices=["tokens", "channels"], default="tokens",
        help="what is dropped before the softmax: whole tokens, as in the official code, or channels")
    add("--init", type=existing_file, metavar="FILE",
        help="start from the weights of this checkpoint, ours or an official one")

    add = p.add_argument_group("equilibrium").add_argument
    add("--grad", choices=["upg", "npg", "implicit", "bptt"], default="upg",
        help="how the gradient is computed")
    add("--k", type=count, help="steps of the phantom gradient")
    add("--lam", type=number_or_auto,
        help="damping of the phantom gradient.  'auto' is 1 / rho(J), measured every 100 steps (App. D.3)")
    add("--solver", choices=["broyden", "anderson", "fixed-point"], default="broyden",
        help="solver that finds the equilibrium")
    add("--max-iter", type=natural, help="iterations of the solver.  0 means no solver: UPG from zero")
    add("--jitter", type=natural, default=0,
        help="each training step lowers --max-iter by a random number from 0 to this one")
    add("--tol", type=positive, default=1e-3,
        help="relative residual at which a stream counts as solved.  With 0 the solver uses all iterations")
    add("--backward-solver", choices=list(SOLVERS), default="gmres",
        help="solver of the backward pass of --grad implicit")
    add("--backward-max-iter", type=count, help="iterations of the backward solver")
    add("--pretrain-steps", type=natural, help="number of first steps, which unroll F without a solver")
    add("--pretrain-layers", type=count, default=2, help="evaluations of F in a step of pretraining")
    add("--jr", type=positive, default=0.0, help="weight of the Jacobian regularisation")
    add("--jr-freq", type=within(float, "(0, 1]"), default=0.4, help="fraction of the steps that have it")
    add("--jr-increment", type=natural, default=0,
        help="after pretraining, add 0.1 to --jr at each multiple of this step.  0 keeps it constant")

    add = p.add_argument_group("optimisation").add_argument
    add("--steps", type=count, help="optimiser steps")
    add("--warmup-steps", type=natural, help="steps in which the learning rate first rises linearly")
    add("--batch-size", type=count, help="streams of text over all processes")
    add("--segment", type=count, help="tokens of each stream in a step")
    add("--mem-len", type=natural, help="earlier tokens that are kept as memory")
    add("--accumulate", type=count, default=1, help="micro-batches per step and process")
    add("--lr", type=within(float, "(0, inf)"),
        help="peak learning rate of Adam, which then follows a cosine to 0 over all steps")
    add("--clip", type=positive, default=0.25, help="largest norm of the gradient.  0 means no clipping")

    add = p.add_argument_group("evaluation").add_argument
    add("--eval-every", type=count, help="steps between evaluations on the validation text")
    add("--eval-streams", type=count, default=16,
        help="streams that the validation and test texts are cut into")
    add("--eval-mem-len", type=natural, nargs="+",
        help="memory lengths in evaluation.  During training only the first is used (default: --mem-len)")
    add("--eval-solver", choices=["broyden", "anderson", "fixed-point", "unrolled"],
        help="solver in evaluation.  Only 'unrolled', plain steps of F, never looks ahead in the text "
        "(default: --solver, or unrolled with --max-iter 0)")
    add("--eval-max-iter", type=count,
        help="iterations in evaluation (default: --max-iter, or --k without a solver)")
    add("--radius-every", type=natural, default=0,
        help="steps between measurements of rho(J) and rho(J_lam) on the validation text.  0 means never")
    add("--generate-tokens", type=count, default=100, help="tokens that --generate adds")
    add("--temperature", type=positive, default=0.9,
        help="temperature of --generate.  0 always takes the likeliest token")

    add = p.add_argument_group("speed").add_argument
    add("--amp", action="store_true", help="bf16 autocast.  Solver vectors and the softmax stay float32")
    add("--no-tf32", action="store_true", help="GPU matrix products in full float32 instead of TF32")
    add("--compile", action="store_true", help="run F through torch.compile")
    add("--recompute", action="store_true",
        help="compute F again in the backward pass of UPG: less memory, equal results")
    modes = add_run_flags(p, "wikitext-GRAD", save_every=15.0, log_every=200)
    modes.add_argument("--generate", metavar="TEXT",
        help="only continue this text with the checkpoint of --resume")
    args = parse_flags(p, argv, presets, FROM_CHECKPOINT)
    complete(args, p, argv)
    return args


def complete(args, p, argv):
    """Lets --solver, --max-iter and --mem-len of an --eval command win, and rejects impossible options."""
    # A --solver given with --eval is for the evaluation: it replaces the --eval-solver of the checkpoint.
    names = [(name, f"eval_{name}") for name in ("solver", "max_iter", "mem_len")]
    given = p.parse_args(argv, Namespace(**dict.fromkeys(itertools.chain(*names))))     # None: not given
    for name, in_evaluation in names:
        if getattr(given, name) is not None:
            setattr(args, in_evaluation, getattr(given, in_evaluation))
    # n: clusters after the first.  longest: number of keys in attention, which are memory and segment.
    n, longest = len(args.cutoffs), max(args.mem_len, *eval_memories(args)) + args.segment
    d_embed = args.d_embed or args.d_model
    if args.d_model % args.n_head or args.d_model % 2:
        p.error(f"--d-model {args.d_model} must be even, and a multiple of --n-head {args.n_head}")
    if any(a >= b for a, b in zip(args.cutoffs, args.cutoffs[1:])):
        p.error(f"--cutoffs must increase, got {args.cutoffs}")
    if d_embed < args.div_val ** n:
        p.error(f"--d-embed (or --d-model) {d_embed}: the last of {n + 1} clusters would have width "
                f"{d_embed} / {args.div_val}^{n} < 1; use a lower --div-val or fewer --cutoffs")
    if args.local_size == 0 and longest > 1000:
        p.error(f"--mem-len or --eval-mem-len plus --segment is {longest}, but a position sees only 1000: "
                "shorten the memory, or set the number of visible keys with --local-size")
    if args.lam == "auto" and args.grad not in ("upg", "npg"):
        p.error("--lam auto is the damping of a phantom gradient: it needs --grad upg or npg")
    if args.max_iter == 0 and (args.grad != "upg" or args.jr or args.jr_increment or args.lam == "auto"):
        p.error("--max-iter 0 unrolls from zero without a solver: it needs --grad upg, and no --jr, "
                "--jr-increment or --lam auto")
    if args.recompute and args.grad not in ("upg", "bptt"):
        p.error(f"--recompute is for --grad upg and bptt: {args.grad} keeps only one graph of F")
    if args.jitter and args.jitter >= args.max_iter:
        p.error(f"--jitter {args.jitter} must be less than --max-iter {args.max_iter}")
    if args.grad == "bptt" and args.solver != "fixed-point":
        p.error("--grad bptt differentiates the plain iteration: it needs --solver fixed-point")
    if 0 < args.temperature < 0.01:
        p.error(f"--temperature {args.temperature}: must be 0 or at least 0.01")
    if args.init and (args.eval or args.benchmark or args.generate is not None):
        p.error("--init begins a training: evaluate a checkpoint with --eval --resume FILE")


# --- data ---------------------------------------------------------------------------------------------------

class Text(NamedTuple):
    """Three texts as ids of types, on the host.

    Type 0 is <eos>, the end of a line.  The others follow by falling frequency in the texts of --vocab.
    """
    train: torch.Tensor             # (tokens,) int32
    valid: torch.Tensor
    test: torch.Tensor
    vocabulary: list                # of str: type i is vocabulary[i]
    best: tuple = ()                # toy: perplexities (best that sees one token, best of all)


def read_part(path, start, stop):
    """Reads the lines of a text that begin in bytes [start, stop).  Returns ((tokens,) int32, types).

    The integers index the list `types`.  <eos> comes first in it, and every line, also a blank one, adds an
    <eos> to the text.  The other types are in the order of their first appearance.
    """
    # Looking up a new type gives it the next number.
    number, ids = collections.defaultdict(itertools.count().__next__, {}), []
    number["<eos>"]                                 # 0
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)    # so that a line that begins at start itself is not skipped
            file.readline()                         # the rest of a line that begins earlier
        # Reads 1 MB at a time.  The part in which a line begins reads the whole line, even beyond stop.
        while file.tell() < stop and (text := file.read(min(2 ** 20, stop - file.tell()))):
            if not text.endswith(b"\n"):
                text += file.readline().rstrip(b"\n") + b"\n"       # the file's last line may lack its "\n"
            if b"\0" in text:
                raise ValueError("it holds NUL bytes: is it UTF-16? It must be UTF-8 text")
            words = text.decode("utf-8" if start or ids else "utf-8-sig")   # -sig drops a byte order mark
            words = words.replace("\n", " <eos> ").split()
            ids.append(np.fromiter(map(number.__getitem__, words), np.int32, len(words)))
            if (ids[-1] == 0).sum() != text.count(b"\n"):
                raise ValueError("it has <eos> written out, but every line end is one already: remove it")
    return np.concatenate([np.empty(0, np.int32), *ids]), list(number)


def read_tokens(path, number, size=2 ** 27):
    """The ids of a text's tokens, (tokens,) int32.  Adds new types to the dict `number`, {type: id}.

    Parts of 128 MB are read in parallel.  Two cores need 20 s for a text of WikiText-103's size, so no cache
    is kept on the disk.
    """
    starts, ids = range(0, os.path.getsize(path), size), []
    if not starts:
        raise ValueError("it is empty; get the file anew")
    workers = min(len(starts), 8, os.cpu_count() or 1)      # under torchrun the first process reads alone
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) if workers > 1 else None
    with pool or contextlib.nullcontext():
        parts = (pool.map if pool else map)(
            read_part, itertools.repeat(path), starts, (start + size for start in starts))
        for part, types in tqdm(parts, f"reading {path.name}", len(starts), leave=False,
                                disable=not sys.stderr.isatty()):
            table = np.array([number.setdefault(word, len(number)) for word in types], np.int32)
            ids.append(table[part])                 # translates the part's numbers to those of all texts
    return np.concatenate(ids)


def load_text(args, process):
    """--data as a Text.  One process per machine reads it before the others, so an error is printed once."""
    if args.data == "toy":
        return toy_text()
    return process.first(lambda: read_text(args))


def read_text(args):
    """The three texts in the folder --data, and their vocabulary."""
    root, splits = Path(args.data), ("train", "valid", "test")
    names = next((names for names in ([f"wiki.{s}.tokens" for s in splits], [f"{s}.txt" for s in splits])
                  if all(os.path.isfile(root / name) for name in names)), None)
    if names is None:
        die(f"--data {root}: needs the files wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens, or "
            "train.txt, valid.txt and test.txt: unpack the archive wikitext-103-v1.zip there (torchtext, "
            "which downloaded it, is discontinued; mirrors are found under its name); --data toy needs none")
    number, ids = {"<eos>": 0}, []
    for path in (root / name for name in names):
        known = len(number)
        try:
            ids.append(read_tokens(path, number))
        except OSError as error:
            die(f"--data: cannot read {path} ({error.strerror})")
        except UnicodeDecodeError as error:
            die(f"--data: {path} is not UTF-8 text ({error.reason}); get the file anew")
        except ValueError as error:
            die(f"--data: {path}: {error}")
        if len(ids) > 1 and len(number) > known and args.vocab == "train":
            # The first new type has the id `known`.  Each <eos> (id 0) before it has ended a line.
            line = 1 + (ids[-1][:(ids[-1] == known).argmax()] == 0).sum()
            die(f"--data: {path}, line {line}: the training text does not have {list(number)[known]!r}; "
                "--vocab all takes the types of all three texts")
    counts = np.bincount(np.concatenate(ids if args.vocab == "all" else ids[:1]), minlength=len(number))
    counts[0] = counts.max() + 1                    # <eos> is type 0 however often it occurs
    order = np.argsort(-counts, kind="stable")      # equally frequent types keep their order
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order))     # new id of each type
    types = list(number)
    return Text(*(torch.from_numpy(rank[i]) for i in ids), [types[i] for i in order])


def toy_text(types=2000, classes=6, sizes=(400_000, 20_000, 20_000)):
    """Text from a second-order Markov chain over classes of types.

    The classes of the last two tokens decide which three classes may come next, with probabilities 0.7, 0.2
    and 0.1.  Within its class a type is drawn by Zipf's law.  So the best possible perplexity is known, and
    also the best one for a model that sees only the last token.
    """
    rng = np.random.default_rng(0)
    follow = np.zeros((classes, classes, classes))          # P(c | a, b) after classes a, b
    for a, b in itertools.product(range(classes), repeat=2):
        follow[a, b, rng.permutation(classes)[:3]] = 0.7, 0.2, 0.1
    zipf = (np.arange(types) + 3.0) ** -1.3
    members = [np.arange(c, types, classes) for c in range(classes)]
    emit = [zipf[m] / zipf[m].sum() for m in members]       # P(type | class)

    pairs = np.full((classes, classes), classes ** -2.0)    # stationary distribution of pairs of classes
    for _ in range(1000):
        pairs = np.einsum("ab,abc->bc", pairs, follow)

    def entropy(p):
        return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)         # in nats, 0 log 0 = 0

    within = pairs.sum(0) @ [entropy(e) for e in emit]      # entropy of a type, given its class
    one = np.einsum("ab,abc->bc", pairs, follow) / pairs.sum(0)[:, None]      # P(c | b)
    rates = pairs.sum(0) @ entropy(one), (pairs * entropy(follow)).sum()    # of classes, given one and two
    best = tuple(float(np.exp(within + rate)) for rate in rates)

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
    """Cuts the text into n streams of equal length: (n, length).  Drops the rest at its end."""
    length = len(ids) // n
    return ids[:length * n].view(n, length)


def checksum(vocabulary):                   # for checkpoints, whose weights are useless with other ids
    return hashlib.sha1("\n".join(vocabulary).encode()).hexdigest()


# --- model --------------------------------------------------------------------------------------------------

class Memory(NamedTuple):
    """States and injections of M earlier tokens.  Their keys and values need both: W h + u."""
    h: torch.Tensor                 # (B, M, D)
    u: torch.Tensor                 # (B, M, 3 D)


class Output(NamedTuple):
    nll: torch.Tensor               # (B, T) -log p(target), or None without targets
    memory: Memory
    result: tuple                   # the solver's SolverResult, or None if no solver ran
    jr: torch.Tensor                # () Jacobian regularisation term, or None
    h: torch.Tensor                 # (B, T, D) the state: h*, or the last unrolled one


class BlockMasks(NamedTuple):
    """Dropout masks of a block, scaled by 1 / (1 - p).  None means no dropout.

    All evaluations of F in a forward pass use the same masks.  With new masks for each evaluation F would be
    another function each time, and have no fixed point.
    """
    attn_prob: torch.Tensor = None  # (B, H, T, K)
    attn_out: torch.Tensor = None   # (B, 1, D)
    ff_hidden: torch.Tensor = None  # (B, 1, d_inner)
    ff_out: torch.Tensor = None     # (B, 1, D)


class Masks(NamedTuple):
    embedding: torch.Tensor = None  # (B, 1, D)
    positions: torch.Tensor = None  # (1, D)
    output: torch.Tensor = None     # (B, T, 1), whole tokens as in the official code, or (B, 1, D)
    blocks: tuple = ()              # of BlockMasks


class Constants(NamedTuple):
    """What a block computes once per forward pass, with a graph, and uses in every evaluation of F.

    Zeros pad a head's d numbers to e, the next multiple of 8.  They change no score and no value.  Without
    them a GPU has no fused attention for d = 70.  On a CPU they make attention 5 to 8 % faster.
    """
    u: torch.Tensor                 # (B, T, 3 H e) injection of the segment
    qkv: torch.Tensor               # (3 H e, D) effective weight g v / ||v||, also o, ff1 and ff2
    o: torch.Tensor                 # (D, D)
    ff1: torch.Tensor               # (d_inner, D)
    ff2: torch.Tensor               # (D, d_inner)
    r: torch.Tensor                 # (H, e, K + 1) a zero, then the keys of positions / sqrt(d)
    r_w: torch.Tensor               # (H, 1, e) query bias for contents, called u in Transformer-XL
    r_r: torch.Tensor               # (H, 1, e) query bias for positions, called v there
    k_mem: torch.Tensor             # (B, H, M, e) keys and values of the memory
    v_mem: torch.Tensor
    hidden: torch.Tensor            # (T, K) -inf if the key is later than the query or too long ago, else 0
    masks: BlockMasks


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dropped(x, mask):
    return x if mask is None else x * mask


class Block(nn.Module):
    """Relative multi-head attention and feed-forward part, each with a residual and layer normalisation."""

    def __init__(self, d_model, n_head, d_inner, pre_ln, preln_residual, ln_affine, attn_out_ln,
                 init_before_norm):
        super().__init__()
        D = d_model
        self.n_head, self.d_head = n_head, D // n_head
        self.pre_ln, self.preln_residual = pre_ln, preln_residual
        self.qkv = nn.Linear(D, 3 * D, bias=False)          # thirds: queries, keys, values.  u is the bias
        self.r = nn.Linear(D, D, bias=False)        # keys of positions
        self.o, self.ff1, self.ff2 = nn.Linear(D, D), nn.Linear(D, d_inner), nn.Linear(d_inner, D)
        self.r_w_bias, self.r_r_bias = (nn.Parameter(0.01 * torch.randn(n_head, self.d_head))
                                        for _ in range(2))  # for contents, for positions
        self.ln1, self.ln2 = (nn.LayerNorm(D, elementwise_affine=ln_affine) for _ in range(2))
        # Only deq-lm normalises the joined heads, before o.
        self.ln_out = nn.LayerNorm(D, elementwise_affine=ln_affine) if attn_out_ln else nn.Identity()
        for linear in (self.qkv, self.r, self.o, self.ff1, self.ff2):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
            # Otherwise torch's default initial weights stay, as they effectively do in locuslab/deq.
            if init_before_norm:
                nn.init.normal_(linear.weight, std=0.01)
            weight_norm(linear)     # W = g v / ||v||, with one number g per row
        if ln_affine:
            for module in (self.ln1, self.ln2, self.ln_out):
                if isinstance(module, nn.LayerNorm):
                    nn.init.normal_(module.weight, 1.0, 0.01)

    def heads(self, x, n):
        """(B, L, n H e) -> n of (B, H, L, e)."""
        return x.unflatten(2, (n, self.n_head, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def constants(self, u, h_mem, positions, hidden, masks):
        """For u (B, K, 3 D), the injections of memory and segment, h_mem (B, M, D) and positions (K, D)."""
        device, M, d = u.device.type, h_mem.shape[1], self.d_head

        def padded(x, dim):                         # n d -> n e in dim, with zeros after each d numbers
            x = x.unflatten(dim, (-1, d))
            # F.pad counts dimensions from the last one.  -d % 8 is e - d.
            return F.pad(x, (0, 0) * (x.dim() - dim - 2) + (0, -d % 8)).flatten(dim, dim + 1)

        # Each access to a weight computes g v / ||v|| again, so it is done here, once per forward pass.
        weights = [linear.weight for linear in (self.qkv, self.o, self.ff1, self.ff2)]
        if torch.is_autocast_enabled(device):       # cast once per forward, not at every evaluation of F
            weights = [w.to(torch.get_autocast_dtype(device)) for w in weights]
        weights[0], u = padded(weights[0], 0), padded(u, 2)
        r = padded(F.linear(positions, self.r.weight), 1).unflatten(1, (self.n_head, -1)) / math.sqrt(d)
        r = F.pad(r.permute(1, 2, 0), (1, 0))                                               # (H, e, K + 1)
        biases = [padded(b, 1)[:, None].to(weights[0].dtype) for b in (self.r_w_bias, self.r_r_bias)]
        q = u.shape[2] // 3                         # H e.  The memory has keys and values, but no queries
        kv = F.linear(self.ln1(h_mem) if self.pre_ln else h_mem, weights[0][q:]) + u[:, :M, q:]
        return Constants(u[:, M:], *weights, r, *biases, *self.heads(kv, 2), hidden, masks)

    def attention(self, h, c):
        """LN(attn(h) + h), or attn(LN(h)) + h with pre_ln, for h (B, T, D)."""
        B, T, D = h.shape
        x = self.ln1(h) if self.pre_ln else h
        q, k, v = self.heads(F.linear(x, c.qkv) + c.u, 3)                                   # (B, H, T, e)
        k = torch.cat([c.k_mem, k.to(c.k_mem.dtype)], 2)                                    # (B, H, K, e)
        v = torch.cat([c.v_mem, v.to(c.v_mem.dtype)], 2)
        K = k.shape[2]
        # Position scores.  Column m of the product is for distance K - 1 - m, but query i needs distance
        # i + M - j in column j, so row i must move T - 1 - i to the left.  With the zero key in front a row
        # has K + 1 elements.  Reading rows of K from element T on moves each row one less than the row above.
        # Elements that come in from the next row are in the future, and `hidden` masks them.
        s = torch.matmul(q + c.r_r.to(q.dtype), c.r)                                        # (B, H, T, K + 1)
        s = at_least_float32(s.flatten(2)[:, :, T:].unflatten(2, (T, K))) + c.hidden        # (B, H, T, K)
        q, scale = q + c.r_w.to(q.dtype), 1 / math.sqrt(self.d_head)
        if c.masks.attn_prob is None and not torch.is_grad_enabled():       # s goes in as an additive mask
            a = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=s.to(q.dtype),
                                               scale=scale)
        else:       # fused kernels take no mask that needs a gradient, and have no second derivative
            s = s + at_least_float32(torch.matmul(q, k.transpose(2, 3))) * scale
            p = dropped(torch.softmax(s, dim=-1), c.masks.attn_prob)        # (B, H, T, K)
            a = torch.matmul(p.to(v.dtype), v)      # (B, H, T, e)
        a = self.ln_out(a[..., :self.d_head].transpose(1, 2).reshape(B, T, D))     # (B, T, D)
        y = dropped(F.linear(a, c.o, self.o.bias), c.masks.attn_out) + h
        return y if self.pre_ln else self.ln1(y)

    def feed_forward(self, y, c):
        """LN(g(y) + y).

        With pre_ln it is g(LN(y)) + LN(y) as in locuslab/deq ("normalized"), or g(LN(y)) + y ("raw").
        """
        x = self.ln2(y) if self.pre_ln else y
        t = F.relu(F.linear(x, c.ff1, self.ff1.bias), inplace=True)                         # (B, T, d_inner)
        t = F.linear(dropped(t, c.masks.ff_hidden), c.ff2, self.ff2.bias)   # (B, T, D)
        t = dropped(t, c.masks.ff_out)
        if self.pre_ln:
            return t + (x if self.preln_residual == "normalized" else y)
        return self.ln2(t + y)


def unrolled(f, h0, k, lam=1.0, on_backward=None):
    """A `solve` without a solver: k damped steps from h0, all with a graph.  Never calls on_backward."""
    return upg(f, h0, k=k, lam=lam), None   # Eq. (16), with h0 in place of h*


class DEQTransformer(nn.Module):
    """Deep equilibrium language model: u = injection(embedding), h* = F(h*, memory, u), p = softmax of h*.

    The state h is (B, T, D): B streams, T tokens of the segment, D = d_model.  The memory has M tokens, and
    K = M + T.  F is n_blocks pairs of attention and feed-forward part, which share u and memory.
    Embedding and softmax are adaptive: types are split into clusters at `cutoffs`, and embeddings of cluster
    i have width E_i = d_embed // div_val^i.  Layer norms have no scale and shift unless ln_affine.
    solve(f, h0) -> (h*, result) is the solver with its gradient: common.equilibrium or `unrolled`.
    """

    def __init__(self, n_token=267735, cutoffs=(20000, 40000, 200000), d_model=700, d_embed=None, n_head=10,
                 d_inner=48000, div_val=4, n_blocks=1, pre_ln=False, preln_residual="normalized",
                 ln_affine=False, attn_out_ln=False, init_std=0.01, init_before_norm=False, local_size=0,
                 mem_len=150, dropout=0.0, dropatt=0.0, output_dropout="tokens",
                 solve=functools.partial(equilibrium, lam=0.8, max_iter=30, tol=1e-3, backward_max_iter=35,
                                         backward_tol=1e-3)):
        super().__init__()
        d_embed = d_embed or d_model
        if d_model % n_head or d_model % 2:
            raise ValueError(f"d_model {d_model} must be even, and a multiple of n_head {n_head}")
        edges = [0, *cutoffs, n_token]
        if any(a >= b for a, b in zip(edges, edges[1:])):
            raise ValueError(f"cutoffs must increase between 0 and n_token, got {list(cutoffs)}, {n_token}")
        if local_size < 0:
            raise ValueError(f"local_size must not be negative, got {local_size}")
        if preln_residual not in ("normalized", "raw") or output_dropout not in ("tokens", "channels"):
            raise ValueError("preln_residual must be 'normalized' or 'raw', output_dropout 'tokens' or "
                             f"'channels', got {preln_residual!r}, {output_dropout!r}")
        self.d_model, self.edges, self.local_size, self.mem_len = d_model, edges, local_size or 1000, mem_len
        self.dropout, self.dropatt, self.output_dropout = dropout, dropatt, output_dropout
        self.solve = solve

        def normal(*shape):
            return nn.Parameter(init_std * torch.randn(*shape))

        sizes = [b - a for a, b in zip(edges, edges[1:])]   # e.g. 20000, 20000, 160000, 67735
        widths = [d_embed // div_val ** i for i in range(len(sizes))]       # E_i, e.g. 700, 175, 43, 10
        # Embedding and softmax share the tables A_i and the projections P_i, but the softmax has Q_0 for P_0.
        self.tables = nn.ParameterList(normal(n, width) for n, width in zip(sizes, widths))         # A_i
        if div_val > 1:
            self.projections = nn.ParameterList(normal(d_model, width) for width in widths)         # P_i
        else:                       # all widths are d_embed: one projection for all, or none if it equals D
            self.projections = nn.ParameterList([normal(d_model, d_embed)] if d_embed != d_model else [])
        first = self.projections[0].shape if len(self.projections) else None
        self.head_projection = normal(*first) if first else None                                    # Q_0
        self.injection = nn.Linear(d_model, 3 * d_model)    # u, the thirds of q, k, v
        nn.init.normal_(self.injection.weight, std=init_std)
        nn.init.zeros_(self.injection.bias)
        self.blocks = nn.ModuleList(
            Block(d_model, n_head, d_inner, pre_ln, preln_residual, ln_affine, attn_out_ln, init_before_norm)
            for _ in range(n_blocks))
        self.cluster_weight = normal(len(cutoffs), d_embed)         # one head column per tail
        self.cluster_bias = nn.Parameter(torch.zeros(len(cutoffs)))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(n)) for n in sizes)

    def projection(self, i):
        """P_i (D, E_i), or None if div_val is 1 and embedding and state have the same width."""
        return self.projections[min(i, len(self.projections) - 1)] if len(self.projections) else None

    def clusters(self, ids):
        """For each cluster, the indices of its types in ids (N,).  Waits for a GPU only if ids are on it."""
        index = [((ids >= a) & (ids < b)).nonzero()[:, 0] for a, b in zip(self.edges, self.edges[1:])]
        if sum(map(len, index)) != len(ids):
            raise ValueError(f"ids must be in [0, {self.edges[-1]})")
        return index

    def embed(self, ids):
        """Embeddings (B, T, D) of ids w (B, T): sqrt(D) P_i A_i[w - c_i].  w's cluster i begins at c_i."""
        flat, device = ids.reshape(-1), self.tables[0].device
        index, parts = self.clusters(flat), []
        for i, own in enumerate(index):
            e = F.embedding((flat[own] - self.edges[i]).to(device, non_blocking=True), self.tables[i])
            parts.append(e if self.projection(i) is None else F.linear(e, self.projection(i)))
        back = torch.cat(index).argsort().to(device, non_blocking=True)     # back to the order of the text
        return torch.cat(parts)[back].view(*ids.shape, -1) * math.sqrt(self.d_model)

    def inject(self, e):
        """u (B, T, 3 D): what is added to queries, keys and values."""
        return self.injection(e)

    def positions(self, K, device):
        """(K, D): row j encodes distance K - 1 - j.  First the sines of all frequencies, then the cosines."""
        even = torch.arange(0, self.d_model, 2, device=device, dtype=torch.float32)
        frequency = 10000 ** -(even / self.d_model)         # (D / 2,)
        phase = torch.arange(K - 1, -1, -1, device=device, dtype=torch.float32)[:, None] * frequency
        return torch.cat([phase.sin(), phase.cos()], dim=1).to(self.injection.weight.dtype)

    def masks(self, B, T, K, device):
        """New dropout masks for a forward pass with all its evaluations of F.  None in evaluation mode."""
        def mask(p, *shape):
            if p and self.training:         # else None
                return torch.bernoulli(torch.full(shape, 1 - p, device=device)) / (1 - p)

        p, D = self.dropout, self.d_model
        output = (B, T, 1) if self.output_dropout == "tokens" else (B, 1, D)
        return Masks(mask(p, B, 1, D), mask(p, 1, D), mask(p, *output),
                     tuple(BlockMasks(mask(self.dropatt, B, b.n_head, T, K), mask(p, B, 1, D),
                                      mask(p, B, 1, b.ff1.out_features), mask(p, B, 1, D))
                           for b in self.blocks))

    def constants(self, u, h_mem, masks=Masks()):
        """What stays the same during a solve: a Constants per block.  u: (B, K, 3 D), h_mem: (B, M, D)."""
        K, M = u.shape[1], h_mem.shape[1]
        positions = dropped(self.positions(K, u.device), masks.positions)                   # (K, D)
        column = torch.arange(K, device=u.device)   # of the keys: memory, then segment
        distance = column[M:, None] - column            # (T, K) from key to query, < 0: the future
        hidden = torch.zeros(K - M, K, device=u.device)
        hidden.masked_fill_((distance < 0) | (distance >= self.local_size), -math.inf)
        return [block.constants(u, h_mem, positions, hidden, m)
                for block, m in zip(self.blocks, masks.blocks or [BlockMasks()] * len(self.blocks))]

    def f(self, h, u, h_mem=None, masks=Masks(), constants=None):
        """The equilibrium module F (B, T, D) at h (B, T, D).

        u: (B, K, 3 D) of memory and segment.  h_mem: (B, M, D).  constants: the result of self.constants for
        these, to be passed if F is called often.
        """
        if constants is None:
            h_mem = h.new_empty(h.shape[0], 0, h.shape[2]) if h_mem is None else h_mem
            constants = self.constants(u, h_mem, masks)
        for block, c in zip(self.blocks, constants):
            h = block.feed_forward(block.attention(h, c), c)
        return h

    def segment(self, ids, memory=None, masks=Masks()):
        """(f, h0, u, memory) for ids (B, T): F as a function of h, the start 0, u (B, T, 3 D), the memory."""
        e = self.embed(ids)
        u = self.inject(dropped(e, masks.embedding))
        h0 = torch.zeros(*ids.shape, self.d_model, device=u.device, dtype=self.injection.weight.dtype)
        memory = memory or Memory(h0[:, :0], u[:, :0].detach())     # at first empty, M = 0
        whole = torch.cat([memory.u.to(u.dtype), u], dim=1)                                 # (B, K, 3 D)
        f = functools.partial(self.f, u=whole, constants=self.constants(whole, memory.h, masks))
        return f, h0, u, memory

    def softmax_parts(self, h):
        """Logits of h (N, D): the head's, and a function (i, h) that returns those of the i-th tail cluster.

        The head is (N, S + n): one column per own type, then one per tail cluster, the last cluster first.
        """
        def linear(h, weight, bias, projection):
            if not self.training:           # evaluation: full precision, also under autocast
                with torch.autocast(h.device.type, enabled=False):
                    return F.linear(h if projection is None else h @ projection, weight, bias)
            return at_least_float32(F.linear(h if projection is None else h @ projection, weight, bias))

        weight = torch.cat([self.tables[0], self.cluster_weight])   # (S + n, d_embed)
        head = linear(h, weight, torch.cat([self.biases[0], self.cluster_bias]), self.head_projection)
        return head, lambda i, h: linear(h, self.tables[i], self.biases[i], self.projection(i))

    def nll(self, h, targets):
        """-log p(targets | h), shaped like targets (...), for h (..., D).  Float32 also under autocast."""
        flat, h_flat = targets.reshape(-1), h.reshape(-1, self.d_model)
        index, last = self.clusters(flat), self.edges[1] + len(self.edges) - 2      # last = S + n
        column = flat.clone()               # each target's column in the head: its own or its cluster's
        for i, own in enumerate(index[1:], start=1):
            column[own] = last - i              # the first tail has the last column
        head, tail = self.softmax_parts(h_flat)
        nll = F.cross_entropy(head, column.to(h.device, torch.long, non_blocking=True), reduction="none")
        for i, own in enumerate(index[1:], start=1):    # also empty clusters: DDP needs all gradients
            target = (flat[own] - self.edges[i]).to(h.device, torch.long, non_blocking=True)
            own = own.to(h.device, non_blocking=True)
            # log p(type) = log p(its cluster) + log p(type | cluster)
            nll = nll.index_add(0, own, F.cross_entropy(tail(i, h_flat[own]), target, reduction="none"))
        return nll.view(targets.shape)

    def log_prob(self, h):
        """log p of every type, (N, n_token), after h (N, D)."""
        head, tail = self.softmax_parts(h)
        head, first = head.log_softmax(1), self.edges[1]
        tails = [tail(i, h).log_softmax(1) + head[:, first + len(self.edges) - 2 - i, None]
                 for i in range(1, len(self.edges) - 1)]
        return torch.cat([head[:, :first], *tails], dim=1)

    def forward(self, ids, targets=None, memory=None, mem_len=None, unroll=0, solve=None, regularize=False,
                on_backward=None):
        """Output of a segment ids (B, T).  targets (B, T): the next tokens.  memory: from the segment before.

        mem_len: length of the memory that is returned (default self.mem_len).
        unroll > 0: use the pretraining network of this many layers instead of the solver.
        solve: replaces self.solve.
        regularize: also compute the JR term, at the solver's h*.
        on_backward: called with the result of the backward solve of grad="implicit".
        """
        B, T = ids.shape
        mem_len = self.mem_len if mem_len is None else mem_len
        K = T + (0 if memory is None else memory.h.shape[1])
        masks = self.masks(B, T, K, self.injection.weight.device)
        f, h0, u, memory = self.segment(ids, memory, masks)
        solve = functools.partial(unrolled, k=unroll) if unroll else solve or self.solve
        h, result = solve(f, h0, on_backward=on_backward)
        jr = None
        if regularize and result is not None:
            # One more call of F, not compiled because torch.compile has no second derivative.  UPG's graph of
            # F could be used instead, but its backward pass would then cost as much more.  The graph of npg
            # and implicit would save a call, but it is inside common.equilibrium.
            u_and_constants = {name: f.keywords[name] for name in ("u", "constants")}
            eager = functools.partial(type(self).f, self, **u_and_constants)
            jr = jacobian_regularization(eager, result.h)
        # Detached, so that no gradient flows into earlier segments.  The memory has no output dropout.
        kept = Memory(*(torch.cat([old, new.detach().to(old.dtype)], 1) for old, new in zip(memory, (h, u))))
        kept = Memory(*(part[:, max(0, part.shape[1] - mem_len):] for part in kept))
        nll = None if targets is None else self.nll(dropped(h, masks.output), targets)
        return Output(nll, kept, result, jr, h)


# --- official checkpoints -----------------------------------------------------------------------------------

def load_official(model, state_dict):
    """Loads a state dict of locuslab/deq (DEQ-Sequence), torchdeq's deq-seq, or torchdeq's deq-lm.

    The file does not show whether its model is PostLN or PreLN: build the right one.  Raises RuntimeError if
    keys are unknown, missing or of another shape, ValueError if two tied parameters differ.
    """
    # These patterns, applied in order, turn their names into ours.  Tied parameters have two names there.
    renames = [(r"^module\.", ""), (r"^inject_conv\.", "injection."), (r"^crit\.(cluster_\w+)$", r"\1"),
               (r"^(?:word_emb\.emb|crit\.out)_layers\.(\d+)\.weight$", r"tables.\1"),
               (r"^crit\.out_layers\.(\d+)\.bias$", r"biases.\1"),
               (r"^crit\.out_projs\.0\.weight$", "head_projection"),
               (r"^(?:word_emb\.emb|crit\.out)_projs\.(\d+)\.weight$", r"projections.\1"),
               (r"^func\.(dec_attn|pos_ff)\.(?!\d)", r"func.\1.0."),       # a single block has no number
               (r"^func\.dec_attn\.(\d+)\.ln2\.", r"blocks.\1.ln_out."),
               (r"^func\.pos_ff\.(\d+)\.ln\.", r"blocks.\1.ln2."),
               (r"^func\.(?:dec_attn|pos_ff)\.(\d+)\.", r"blocks.\1."), (r"_net\.", ".")]
    state_dict, found = state_dict.get("state_dict", state_dict), {}
    if not all(map(torch.is_tensor, state_dict.values())):
        raise ValueError("it is no state dict: a dict of tensors")
    # Only files of deq-lm have these names.
    lm = any(re.match(r"(module\.)?(injection|func\.dec_attn\.0)\.", key) for key in state_dict)
    for theirs, value in state_dict.items():
        key = theirs
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        if key.startswith(("func_copy.", "deq.")) or key == "pos_emb.inv_freq":     # copies of F, a constant
            continue
        value = value.flatten(1) if value.dim() == 3 else value                     # from a convolution
        if lm and re.match(r"(blocks\.\d+\.qkv|injection)\.", key):
            # Their rows are grouped by head, ours by q, k and v: row 3 d h + s d + a becomes s D + h d + a.
            value = value.unflatten(0, (model.blocks[0].n_head, 3, -1)).transpose(0, 1).flatten(0, 2)
        if key in found and not torch.equal(found[key], value):
            raise ValueError(f"{theirs} differs from the parameter it is tied to: both become our {key}")
        found[key] = value
    for key in [k for k in found if re.fullmatch(r"blocks\.\d+\.(qkv|r|o|ff1|ff2)\.weight", k)]:
        found[key + "_v"] = v = found.pop(key)                  # a file without weight norm: v = W, g = ||W||
        found[key + "_g"] = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    model.load_state_dict(found)                # weight_norm's own hook puts (g, v) in their place


# --- training -----------------------------------------------------------------------------------------------

def autocast(args, device):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.amp)


def build_model(args, vocabulary, process):
    """The model of the flags.  A smaller d_model has larger initial weights, so that u keeps its size."""
    types = len(vocabulary)
    if args.cutoffs[-1] >= types:
        fits = [c for c in args.cutoffs if c < types] or [types // 2]
        process.die(f"--cutoffs {' '.join(map(str, args.cutoffs))}: the text has only {types} types; all "
                    f"cutoffs must be below that, as in --cutoffs {' '.join(map(str, fits))}")
    solve = functools.partial(
        equilibrium, grad=args.grad, k=args.k, lam=1.0 if args.lam == "auto" else args.lam, tol=args.tol,
        solver=SOLVERS[args.solver], max_iter=args.max_iter, backward_solver=SOLVERS[args.backward_solver],
        backward_max_iter=args.backward_max_iter, backward_tol=args.tol)
    if args.max_iter == 0:
        solve = functools.partial(unrolled, k=args.k, lam=args.lam)
    same = "d_model d_embed n_head d_inner div_val local_size mem_len dropout dropatt output_dropout"
    seed_everything(args.seed)          # the same weights on all processes
    model = DEQTransformer(types, args.cutoffs, pre_ln=args.norm == "pre", solve=solve, **MODELS[args.model],
                           init_std=0.01 * math.sqrt(700 / args.d_model),
                           **{name: getattr(args, name) for name in same.split()}).to(process.device)
    if args.compile:
        model.f = compiled(model.f)
    if args.recompute and not args.benchmark:           # the benchmark decides it for each row
        model.f = recomputed(model.f)
    return model


def learning_rate(args, done):
    """Learning rate of step done + 1 as a factor of --lr: a linear warm-up, then a cosine to 0."""
    s = done + 1
    # As in the official code the cosine also counts the warm-up, so the rate drops by 0.7 % after it.
    return s / args.warmup_steps if s < args.warmup_steps else (1 + math.cos(math.pi * s / args.steps)) / 2


def jr_weight(args, done):
    """JR weight after `done` steps: --jr, plus 0.1 for each multiple of --jr-increment after pretraining."""
    if not args.jr_increment:
        return args.jr
    return args.jr + 0.1 * (done // args.jr_increment - min(done, args.pretrain_steps) // args.jr_increment)


def step_settings(args, model, done):
    """How step done + 1 calls the model: unrolled or not, the solver's iterations after jitter, JR or not.

    The draws depend only on seed and step, so they are the same on all processes and after a restart.
    """
    draw = random.Random(f"{args.seed}-{done}")
    unroll = args.pretrain_layers if done < args.pretrain_steps else 0
    # Only a random part of the steps has JR, because it costs a call of F and a second derivative.
    regularize = not unroll and jr_weight(args, done) > 0 and draw.random() < args.jr_freq
    solve = model.solve
    if args.jitter:
        solve = functools.partial(solve, max_iter=args.max_iter - draw.randint(0, args.jitter))
    return dict(unroll=unroll, solve=solve, regularize=regularize)


def measured_damping(args, process, model, streams, memories, step):
    """--lam auto: 1 / rho(J), with the mean of rho over the streams of this segment.

    streams and memories have one entry per micro-batch.  The power method starts from new random vectors each
    time, because those of 100 steps ago fit the Jacobian of another text.  On the toy text 50 iterations from
    them gave a rho 24 % too low, but less than 1 % from random ones.
    """
    with autocast(args, process.device):
        rho = sum(radius(model, ids, memory)[0].mean() for ids, memory in zip(streams, memories))
    rho = process.sum(rho.double()) / (len(memories) * process.world_size)
    if not torch.isfinite(rho):
        process.die(f"--lam auto: the spectral radius of J is {rho.item()} at step {step}; use --jr, a lower "
                    "--lr, or --grad upg", code=1)
    return adaptive_damping(rho)


def gathered(memories, process):
    """The memory of all streams for a checkpoint, [h, u] on the CPU, or None at the beginning of an epoch."""
    if memories[0] is None:
        return None
    # Joins micro-batches, then processes, which gives the streams in their order in the text.
    return [torch.cat(process.gather(torch.cat(parts).cpu())) for parts in zip(*memories)]


def scattered(memory, process, n):
    """Undoes `gathered`: a Memory for each of n micro-batches.  n and the world size may have changed."""
    if memory is None:
        return [None] * n
    rank, world = process.rank, process.world_size
    own = [x.tensor_split(world)[rank].to(process.device).tensor_split(n) for x in memory]
    return [Memory(*pair) for pair in zip(*own)]


def about(args, model, text, segments):
    """The line printed at the start: sizes, and which flags do not fit a short run."""
    n = sum(p.numel() for p in model.parameters())
    line = (f"{n:,} parameters; {len(text.train)} training tokens of {len(text.vocabulary)} types; "
            f"{args.steps} steps, {args.steps / segments:.1f} epochs of {segments}")
    if args.warmup_steps >= args.steps:
        line += f"; the learning rate never reaches --lr: lower --warmup-steps {args.warmup_steps}"
    if args.pretrain_steps >= args.steps:
        line += "; all of them are pretraining, without a solver: lower --pretrain-steps"
    return line


def train(args, process, model, text):
    """Trains, evaluates every --eval-every steps, and evaluates the best weights on the test text."""
    device, world, T, n = process.device, process.world_size, args.segment, args.accumulate
    tokens = streams(text.train, args.batch_size)                       # (B, length)
    segments = math.ceil((tokens.shape[1] - 1) / T)                     # per epoch, the last may be short
    own = tokens.tensor_split(world)[process.rank].tensor_split(n)      # n micro-batches
    run = Run(args, process, f"wikitext-{args.grad}", MAY_DIFFER, types=checksum(text.vocabulary),
              train_text=fingerprint(text.train))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(learning_rate, args))
    # step: number of steps done.  evaluated: step of the last evaluation.  lam: damping, changed by "auto".
    step, evaluated, memories, lam = 0, 0, [None] * n, 1.0 if args.lam == "auto" else args.lam
    score = {"best": math.inf, "best_step": 0, "measured_on": fingerprint(text.valid)}
    if run.state:
        model.load_state_dict(run.state["model"])
        optimizer.load_state_dict(run.state["optimizer"])
        scheduler.load_state_dict(run.state["scheduler"])
        step, evaluated, lam = (run.state[name] for name in ("step", "evaluated", "lam"))
        memories = scattered(run.state["memory"], process, n)
        if run.state["score"]["measured_on"] == score["measured_on"]:
            score = run.state["score"]
        elif process.rank == 0:
            print("note: the validation text is another one: the best perplexity starts anew", flush=True)
    elif args.init:
        load_init(args, process, model, run)
    # No device_ids, so ids stay on the host.  Sorting them into clusters there does not wait for the GPU.
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    run.start(about(args, model, text, segments), parameters=sum(p.numel() for p in model.parameters()))
    meter = Meter(process, "tokens")

    def save(step):
        run.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "lam": lam,
                  "scheduler": scheduler.state_dict(), "memory": gathered(memories, process), "step": step,
                  "evaluated": evaluated, "score": score})

    # Each round trains up to the next evaluation, then evaluates on the validation text.
    ends = [*range(args.eval_every, args.steps, args.eval_every), args.steps]
    for end in (end for end in ends if end > evaluated):        # a resumed run has done some
        for done in process.bar(range(step, end), f"to step {end}"):
            start = done % segments * T
            stop_at = min(start + T, tokens.shape[1] - 1)
            if start == 0:
                memories = [None] * n                       # an epoch begins
            if args.lam == "auto" and done >= args.pretrain_steps and (
                    done % 100 == 0 or done == args.pretrain_steps):
                segment = [ids[:, start:stop_at] for ids in own]
                lam = measured_damping(args, process, model, segment, memories, done)
            if args.lam == "auto":
                model.solve = functools.partial(model.solve, lam=lam)
            settings = step_settings(args, model, done)
            means = collections.defaultdict(float)          # over the micro-batches
            for i in range(n):
                ids, targets = own[i][:, start:stop_at], own[i][:, start + 1:stop_at + 1]   # the next tokens
                # DDP averages gradients once per step, in the last micro-batch.
                with contextlib.nullcontext() if world == 1 or i == n - 1 else net.no_sync():
                    with autocast(args, device):
                        output = net(ids, targets, memories[i], **settings,
                                     on_backward=lambda r: run.note_residuals(backward=r.residual))
                    loss = nll = output.nll.mean()  # Eq. (3)
                    if settings["regularize"]:
                        loss = nll + jr_weight(args, done) * output.jr
                        means["jr"] += output.jr.detach() / n
                    (loss / n).backward()
                means["loss"] += nll.detach() / n
                memories[i] = output.memory
                if output.result is not None:
                    run.note_residuals(train=output.result.residual)
            means["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            lr = scheduler.get_last_lr()[0]                 # of this step
            scheduler.step()
            step = done + 1
            # --- the step ends here.  Diagnostics, logging and saving follow ---
            meter.add(n * ids.numel(), **means)     # tokens of this process
            if args.radius_every and step % args.radius_every == 0:
                with meter.paused():
                    run.report("radius", step=step, **radii(model, text.valid, args, process, lam))
            saving, stop = run.due()
            saving = saving or step == end                  # the evaluation may be long, and killed
            if saving or step % args.log_every == 0:
                record = meter.read()                                                       # host sync
                run.report("train", step=step, epoch=step / segments, lr=lr, lam=lam, **record,
                           perplexity=math.exp(min(record["loss"], 700.0)))
            if saving:
                save(step)
                meter.reset()
            if stop:
                return run.stopped(step)

        record = evaluate(model, "valid", text.valid, args, process, eval_memories(args)[0], step)
        if evaluated <= args.pretrain_steps < step:
            score["best"] = math.inf                        # until now it was the pretraining network's
        evaluated = step
        if record["valid_perplexity"] < score["best"]:
            score["best"], score["best_step"] = record["valid_perplexity"], step
            if process.rank == 0:
                save_checkpoint(run.folder / "best.pt", {
                    "model": model.state_dict(), "args": vars(args), "facts": run.facts, "lam": lam,
                    "step": step, "valid_perplexity": score["best"]})
        run.report("eval", step=step, **record, best_perplexity=score["best"], best_step=score["best_step"],
                   **run.health(args.tol))
        save(step)
        meter.reset()
    test_the_best(args, process, run, model, text, score)


def test_the_best(args, process, run, model, text, score):
    """After training: test perplexity of the weights that were best on the validation text."""
    # A run that was resumed into another folder may have no best.pt there.  If the validation text has
    # changed and was not evaluated since, best.pt belongs to the old text, and best_step is 0.
    path, step = run.folder / "best.pt", score["best_step"]
    if not step or not path.exists():
        path, step = run.checkpoint, args.steps
    if step != args.steps:
        model.load_state_dict(load_checkpoint(path, flag="--out")["model"])
    record = evaluate(model, "test", text.test, args, process, eval_memories(args)[0], step)
    run.report("test", step=args.steps, of_step=step, **record)
    if process.rank == 0:
        flags = "".join(f" --{name.replace('_', '-')}" for name in ("amp", "no_tf32") if getattr(args, name))
        best = "\n" + BEST.format(*text.best) if text.best else ""
        print(f"done: test perplexity {record['test_perplexity']:.6g} of {record['test_tokens']} tokens, "
              f"memory {record['test_mem_len']} (weights of step {step}; best on valid: step "
              f"{score['best_step']}); {run.seconds / 60:.1f} minutes{best}\nweights: {path}; evaluate them "
              f"with: python deq_wikitext.py --eval --resume {shlex.quote(str(path))}{flags}", flush=True)


def fingerprint(ids):
    return hashlib.sha256(ids.numpy()).hexdigest()[:16]


# --- evaluation and diagnostics -----------------------------------------------------------------------------

def check_model(args, process, state, types, flag, path):
    """Stops if a checkpoint of ours has another model or another vocabulary than this run."""
    check_version(path, state["args"], args, flag)
    for name in MODEL_FLAGS.split():
        theirs, ours = state["args"][name], getattr(args, name)
        if theirs != ours:
            process.die(f"{flag} {path} is of a run with --{name.replace('_', '-')} {theirs} (here {ours})")
    if state["facts"]["types"] != types:
        process.die(f"{flag} {path} is of a run with another vocabulary than --data {args.data} has")


MISFIT = "{} {} does not fit the model (--model, --d-model, --d-inner, --cutoffs, ..., types of --data)"


def load_init(args, process, model, run):
    """--init: the weights of a checkpoint, ours or an official one."""
    state = load_checkpoint(args.init, flag="--init")
    if is_ours(state):
        check_model(args, process, state, run.facts["types"], "--init", args.init)
    load_weights(model, state, load_official, MISFIT.format("--init", args.init))


def evaluation_solve(args, step):
    """(`solve` for evaluation, its description) for weights of this step, which may be one of pretraining."""
    solver = args.eval_solver or (args.solver if args.max_iter else "unrolled")         # as it was trained
    k = args.eval_max_iter or args.max_iter or args.k
    if step <= args.pretrain_steps or solver == "unrolled":
        k = args.pretrain_layers if step <= args.pretrain_steps else k
        return functools.partial(unrolled, k=k), f"an unrolled network of {k} layers"
    return (functools.partial(equilibrium, solver=SOLVERS[solver], max_iter=k, tol=args.tol),
            f"{solver}, at most {k} steps, tolerance {args.tol:g}")


@contextlib.contextmanager
def evaluating(model, args, step=math.inf):
    """Puts the model into evaluation mode, with the solver of evaluation for the weights of this step.

    A solver lets a token see a little of the future, because its inner products, its stop and its choice of
    the best state depend on the whole segment of a stream.  The leak is about as large as the residual.
    """
    before, training = model.solve, model.training
    model.solve, _ = evaluation_solve(args, step)
    model.eval()
    yield
    model.solve = before
    model.train(training)


@torch.no_grad()
def evaluate(model, name, ids, args, process, mem_len, step=math.inf):
    """Perplexity of a text in --eval-streams streams, each with its own memory.

    The first token of a stream is given, not predicted.  step: that of the weights, see `evaluating`.
    """
    text = streams(ids, args.eval_streams)
    own = text.tensor_split(process.world_size)[process.rank]           # a process may get none
    # sums: nll, tokens, evaluations of F, solves.  They are added over processes, so each token counts once.
    sums, residuals, memory = torch.zeros(4, dtype=torch.float64, device=process.device), [], None
    starts = range(0, text.shape[1] - 1, args.segment)
    with evaluating(model, args, step):
        for start in process.bar(starts if len(own) else (), f"evaluating {name}"):
            stop = min(start + args.segment, text.shape[1] - 1)
            with autocast(args, process.device):
                out = model(own[:, start:stop], own[:, start + 1:stop + 1], memory, mem_len=mem_len)
            memory = out.memory
            sums[0] += out.nll.sum()
            sums[1] += out.nll.numel()
            if out.result is not None:
                residuals.append(out.result.residual)
                sums[2] += out.result.n_evals
                sums[3] += 1
    nll, count, evals, solves = process.sum(sums).tolist()
    record = {f"{name}_nll": nll / count, f"{name}_perplexity": math.exp(min(nll / count, 700.0)),
              f"{name}_tokens": int(count), f"{name}_mem_len": mem_len}
    if solves:
        record.update(health(name, residuals, args.tol, process), **{f"{name}_evals": evals / solves})
    return record


@torch.no_grad()
def radius(model, ids, memory, lams=(1.0,), n_iter=50):
    """For each lam, the spectral radius per stream of lam J + (1 - lam) I at h* of a segment, no dropout."""
    f, h0, *_ = model.segment(ids, memory)
    h, _ = model.solve(f, h0)
    return [spectral_radius(f, h, lam=lam, n_iter=n_iter) for lam in lams]


@torch.no_grad()
def radii(model, ids, args, process, lam):
    """App. D.3: spectral radii of J and lam J + (1 - lam) I at h*, means over the streams' second segments.

    Does not change the random numbers of training.
    """
    rng, own = rng_state(), streams(ids, args.eval_streams)
    own = own.tensor_split(process.world_size)[process.rank]
    sums, T = torch.zeros(4, dtype=torch.float64, device=process.device), min(args.segment, own.shape[1] // 2)
    if len(own):
        with evaluating(model, args), autocast(args, process.device):
            memory = model(own[:, :T], mem_len=eval_memories(args)[0]).memory
            rho, rho_lam = radius(model, own[:, T:2 * T], memory, lams=(1.0, lam))
        # Sums of this process: rho(J), rho(J_lam), streams with rho(J) > 1, streams.
        sums += torch.stack([rho.sum(), rho_lam.sum(), (rho > 1).sum(), torch.ones_like(rho).sum()])
    set_rng_state(rng)
    rho, rho_lam, above, count = process.sum(sums).tolist()
    return {"rho_J": rho / count, "rho_J_lam": rho_lam / count, "rho_J_above_1": above / count, "lam": lam}


def evaluate_checkpoint(args, process, model, text, state):
    """--eval: perplexities at each memory length, and spectral radii."""
    step, main = state["step"] if is_ours(state) else math.inf, process.rank == 0
    if main:
        of_step = f", step {step}" if step < math.inf else ""
        print(f"{args.resume}{of_step}: {evaluation_solve(args, step)[1]}; {args.eval_streams} streams, "
              f"segments of {args.segment}", flush=True)
    for mem_len, name in itertools.product(eval_memories(args), ("valid", "test")):
        record = evaluate(model, name, getattr(text, name), args, process, mem_len, step)
        if main:
            print(spell(record), flush=True)
    if step > args.pretrain_steps:                      # else it was never trained with the solver
        lam = args.lam if args.lam != "auto" else state["lam"] if is_ours(state) else 1.0
        record = radii(model, text.valid, args, process, lam)
        if main:
            print(spell(record))
    if main and text.best:
        print(BEST.format(*text.best))


@torch.no_grad()
def generate(model, vocabulary, args, process, step):
    """Continues --generate with tokens drawn from the model's distribution, and prints each one at once."""
    known = {word: i for i, word in enumerate(vocabulary)}
    words = args.generate.replace("\n", " <eos> ").split() or ["<eos>"]
    missing = [word for word in words if word not in known]
    if missing and "<unk>" not in known:
        die(f"--generate: {missing[0]!r} is not in the vocabulary, which has whole words, such as "
            f"{' '.join(vocabulary[1:4])!r}")
    if missing:
        print(f"note: not in the vocabulary, read as <unk>: {' '.join(missing)}", file=sys.stderr, flush=True)
    ids, memory = torch.tensor([[known.get(word, known.get("<unk>")) for word in words]]), None
    print(args.generate, end=" ", flush=True)
    with evaluating(model, args, step), autocast(args, process.device):
        for _ in range(args.generate_tokens):
            # First the whole given text, then only the last token: the memory holds what came before it.
            for segment in ids.split(args.segment, dim=1):
                out = model(segment, memory=memory, mem_len=eval_memories(args)[0])
                memory = out.memory
            log_prob = model.log_prob(out.h[:, -1])
            ids = (torch.multinomial((log_prob / args.temperature).softmax(1), 1) if args.temperature else
                   log_prob.argmax(1, keepdim=True)).cpu()
            word = vocabulary[ids.item()]
            print("\n" if word == "<eos>" else word + " ", end="", flush=True)
    print()


# --- benchmark ----------------------------------------------------------------------------------------------

TABLE3 = {      # norm, gradient, iterations forward and backward, and whether the loss has the JR term
    "PostLN implicit": ("post", "implicit", 30, 35, False), "PostLN UPG": ("post", "upg", 30, 35, False),
    "PreLN JR implicit": ("pre", "implicit", 14, 14, True), "PreLN JR UPG": ("pre", "upg", 14, 14, True),
    "PreLN JR UPG, 20": ("pre", "upg", 20, 14, True), "PostLN NPG": ("post", "npg", 30, 35, False)}


def run_benchmark(args, process):
    """--benchmark: training steps of Table 3's rows on random tokens, and NPG's memory at k = 1 and 20.

    A row with JR is the mean of steps with and without the term, weighted by --jr-freq.  All rows have the
    command's --mem-len, --dropout, --dropatt and --backward-solver, and no jitter: they differ only in norm,
    gradient, JR and iterations.
    """
    types = 2000 if args.data == "toy" else max(267735, args.cutoffs[-1] + 1)
    model, device = build_model(args, range(types), process), process.device
    # With lr 0 Adam does all its work, but every row is measured at the same weights.
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)
    rng = torch.Generator().manual_seed(0)
    text = types * torch.rand(args.batch_size, args.segment + 1, generator=rng) ** 4
    text = text.long().clamp_max(types - 1)
    B, M, D, memory = args.batch_size, args.mem_len, args.d_model, None
    if M:
        memory = Memory(torch.randn(B, M, D, device=device), 0.1 * torch.randn(B, M, 3 * D, device=device))

    def row(norm, grad, max_iter, backward_max_iter, regularize, k=args.k, f=model.f):
        # With tol 0 a row uses all its iterations, so that its time does not depend on the random weights.
        solve = functools.partial(
            equilibrium, grad=grad, k=k, lam=1.0 if args.lam == "auto" else args.lam,
            solver=SOLVERS[args.solver], max_iter=max_iter, tol=0.0,
            backward_solver=SOLVERS[args.backward_solver], backward_max_iter=backward_max_iter,
            backward_tol=0.0)

        def forward():
            model.f = recomputed(f) if args.recompute and grad == "upg" else f
            for block in model.blocks:
                block.pre_ln = norm == "pre"        # same weights in both
            with autocast(args, device):
                out = model(text[:, :-1], text[:, 1:], memory, solve=solve, regularize=regularize)
            return out.nll.mean() + (0.1 * out.jr if regularize else 0)

        return forward

    def finish():
        nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    rows = {name: row(*settings[:4], False) for name, settings in TABLE3.items()}
    rows.update({f"PostLN NPG, k = {k}": row(*TABLE3["PostLN NPG"], k=k) for k in (1, 20)})
    with torch.no_grad(), autocast(args, device):
        f, h0, *_ = model.segment(text[:, :-1], memory)
    benchmark(rows, finish, process, unit="tokens", n=B * args.segment, h0=h0, f=autocast(args, device)(f),
              sometimes={name: (args.jr_freq, row(*settings))
                         for name, settings in TABLE3.items() if settings[4]},
              solve=functools.partial(SOLVERS[args.solver], max_iter=args.max_iter or 30, tol=0.0),
              about=f"{sum(p.numel() for p in model.parameters()):,} parameters, {B} streams x "
              f"{args.segment} tokens, memory {M}, dropatt {args.dropatt}, no jitter, {args.solver} forward, "
              f"{args.backward_solver} backward, k = {args.k}")


# --- main ---------------------------------------------------------------------------------------------------

def main(args):
    process = init_process()
    training = not (args.eval or args.benchmark or args.generate is not None)
    if training and args.batch_size % (process.world_size * args.accumulate):
        process.die(f"--batch-size {args.batch_size} is not divisible by {process.world_size} process(es) x "
                    f"--accumulate {args.accumulate}")
    torch.set_float32_matmul_precision("highest" if args.no_tf32 else "high")   # "high": TF32, on GPUs only
    if args.benchmark:
        return run_benchmark(args, process)
    text = load_text(args, process)
    for name, ids in (("valid", text.valid), ("test", text.test)):
        if len(ids) < 2 * args.eval_streams:
            process.die(f"--eval-streams {args.eval_streams}: the {name} text has only {len(ids)} tokens")
    if training and len(text.train) < 2 * args.batch_size:
        process.die(f"--batch-size {args.batch_size}: the training text has only {len(text.train)} tokens")
    model = build_model(args, text.vocabulary, process)
    if training:
        train(args, process, model, text)
    else:
        state = load_checkpoint(args.resume)
        if is_ours(state):
            check_model(args, process, state, checksum(text.vocabulary), "--resume", args.resume)
            same = "solver max_iter tol segment mem_len local_size amp"
            note_differences(state["args"], args, same, process)
        load_weights(model, state, load_official, MISFIT.format("--resume", args.resume))
        if args.eval:
            evaluate_checkpoint(args, process, model, text, state)
        else:
            generate(model, text.vocabulary, args, process, state["step"] if is_ours(state) else math.inf)
    process.end()


if __name__ == "__main__":
    main(parse_args())
