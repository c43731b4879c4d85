"""MDEQ on CIFAR-10 with phantom gradients: "On Training Implicit Models" (NeurIPS 2021, arXiv:2111.05177).

    python mdeq_cifar.py                                         # Tiny, UPG A_{5,0.5}; downloads CIFAR-10 to ./data
    python mdeq_cifar.py --data toy                              # generated images: a few minutes on two CPU cores
    torchrun --nproc_per_node=4 mdeq_cifar.py --model large      # Large, UPG A_{5,0.5}: augmentation, 220 epochs
    python mdeq_cifar.py --benchmark                             # step time and memory of implicit, UPG and NPG
    python mdeq_cifar.py --eval --resume FILE                    # our checkpoints and the official ones

Table 1 (Tiny, 50 epochs, batch 128, no augmentation): every row is a command, python mdeq_cifar.py with these flags.
First the paper's accuracy (%).  The paper solves backwards by Broyden's method; the default here is GMRES.
    1  85.0 +- 0.2  --grad implicit --backward-solver broyden --optimizer adam --dropout 0.25 --pretrain-steps 3000
    2  82.3 +- 1.3  --grad implicit --backward-solver broyden --optimizer adam --dropout 0.25
    3  83.7 +- 0.1  --grad implicit --backward-solver broyden --optimizer adam --pretrain-steps 3000
    4  84.5 +- 0.3  --grad implicit --backward-solver broyden --optimizer sgd --dropout 0.25 --pretrain-steps 3000
    5  82.9 +- 1.5  --grad implicit --backward-solver broyden --optimizer sgd --dropout 0.25
    6  85.8 +- 0.5  (none)
    7  85.6 +- 0.5  --grad npg
    8  86.1 +- 0.5  --k 9 --dropout 0.25
Table 3 (Large, 220 epochs, batch 128, augmentation):
       93.8 +- 0.17  --model large --grad implicit --backward-solver broyden --optimizer adam --weight-decay 0
                     --dropout 0.3 --pretrain-steps 20000
       95.0 +- 0.16  --model large
Fig. 2: row 1 with --cosine-every 500.  Fig. 3: --fig3 FOLDER, rows 6 and 7 over k and lam, and the picture.
App. D.2: --radius-every 500.

Measured: the rows above are not run yet.  README.md has step times on one H200 (Tiny's UPG 39 ms with --cuda-graph),
and Fig. 3 and UPG, NPG, implicit at small scale on a CPU.

Differs from the paper and its release: residuals, and the choice of the best iterate, per image (there: one norm over
the batch); Broyden's first step has the right sign (theirs is inverted); NPG follows Eq. (17), not Algorithms 2 and 3;
BatchNorm sees a process's whole batch (there: 2 x 64 images, Large 4 x 32).  Initialised as the official CIFAR-10 code
is: Normal(0, 0.01) for plain convolutions, PyTorch's default for weight-normalised ones.
"""
import argparse
import functools
import hashlib
import itertools
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

# Large CPU allocations then come in 2 MB pages: F of Tiny at batch 128 runs 1.05 to 1.4 times faster on 2 cores.
# torch reads it at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
import torch.nn.functional as F       # in prose F is the equilibrium module, MDEQ.f
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from tqdm import tqdm

from common import (Meter, MetricsLog, SaveTimer, TrainingPass, all_reduce_sum, anderson, broyden, captured,
                    check_run_flags, check_same_run, choose_out, clock, compare_gradients, compiled, describe_run, die,
                    equilibrium, first_then_others, fixed_point, flag_checks, gmres, health, init_process, is_ours,
                    launched, line_by_line, load_checkpoint, load_weights, medians_in_turns, note_differences,
                    open_run, peak_memory, reset_peak_memory, rng_state, rng_states, save_checkpoint, seed_everything,
                    set_rng_state, set_rng_states, solver_overhead, spectral_radius, spell_health, start_log,
                    timed_step, upg, what_broke)

FIG3 = {"grad": ("upg", "npg"), "lam": (0.3, 0.5, 1.0), "k": (1, 3, 5, 9, 15)}

SOLVERS = {"broyden": broyden, "anderson": anderson, "fixed-point": fixed_point}
BACKWARD_SOLVERS = {"gmres": gmres, **SOLVERS}

# Official configurations; the budgets are steps of the forward and of the implicit baseline's backward solver.
MODELS = {
    "tiny": dict(channels=(24, 24), head_channels=(8, 16), final_channels=200,
                 max_iter=22, backward_max_iter=24, epochs=50, augment="no"),
    "large": dict(channels=(32, 64, 128, 256), head_channels=(14, 28, 56, 112), final_channels=1680,
                  max_iter=18, backward_max_iter=20, epochs=220, augment="yes"),
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Trains an MDEQ on CIFAR-10; no flags: Tiny with UPG A_{5,0.5}.")
    # data
    p.add_argument("--data", default="data", help="folder of CIFAR-10 (downloaded if absent), or with train/CLASS/* "
                   "and test/CLASS/*; or 'toy': 16 x 16 generated images, 4 epochs of 2000 by 50 (default data)")
    p.add_argument("--train-size", type=int, help="use so many training images, equally many per class (default all)")
    p.add_argument("--test-size", type=int, help="use so many test images, equally many per class (default all)")
    p.add_argument("--augment", choices=["yes", "no"], help="random crop after padding by 4, and horizontal flip "
                   "(default tiny and toy no, large yes)")
    # model
    p.add_argument("--model", choices=list(MODELS), default="tiny",
                   help="158,986 or 11,098,398 parameters (default tiny)")
    p.add_argument("--dropout", type=float, default=0.0, help="probability of variational dropout in F (default 0)")
    # equilibrium
    p.add_argument("--grad", choices=["upg", "npg", "implicit", "bptt"], default="upg",
                   help="how the gradient is computed (default upg)")
    p.add_argument("--k", type=int, default=5, help="steps of the phantom gradient (default 5)")
    p.add_argument("--lam", type=float, default=0.5, help="damping of the phantom gradient, in (0, 1] (default 0.5)")
    p.add_argument("--solver", choices=list(SOLVERS), default="broyden", help="finds the equilibrium (default broyden)")
    p.add_argument("--backward-solver", choices=list(BACKWARD_SOLVERS), default="gmres",
                   help="solves for the gradient of --grad implicit; the paper's is broyden (default gmres)")
    p.add_argument("--max-iter", type=int, help="steps of the forward solver (default tiny 22, large 18)")
    p.add_argument("--backward-max-iter", type=int,
                   help="steps of the backward solver of --grad implicit (default tiny 24, large 20)")
    p.add_argument("--tol", type=float, default=0.0, help="relative residual at which an image counts as solved; "
                   "0: always the whole budget (default 0)")
    p.add_argument("--pretrain-steps", type=int, default=0,
                   help="first optimiser steps, with an unrolled network in place of the solver (default 0)")
    p.add_argument("--pretrain-layers", type=int, default=10, help="evaluations of F in that network (default 10)")
    # optimisation
    p.add_argument("--epochs", type=int, help="passes over the training images (default tiny 50, large 220, toy 4)")
    p.add_argument("--batch-size", type=int, help="images per step over all processes (default 128, toy 50)")
    p.add_argument("--optimizer", choices=["sgd", "adam"], default="sgd",
                   help="SGD with momentum 0.9, or Adam (default sgd)")
    p.add_argument("--lr", type=float, help="initial, cosine to 1e-6 over all steps (default sgd 0.1, adam 0.001)")
    p.add_argument("--weight-decay", type=float, help="L2 penalty on every parameter (default sgd 1e-4, adam 2.5e-6)")
    p.add_argument("--seed", type=int, default=0, help="of weights, data order, augmentation and dropout (default 0)")
    # speed
    p.add_argument("--amp", action="store_true", help="bf16 autocast; the solver's own vectors stay float32")
    p.add_argument("--no-tf32", action="store_true", help="GPU convolutions in full float32; TF32 is torch's default")
    p.add_argument("--compile", action="store_true", help="torch.compile F and the head")
    p.add_argument("--cuda-graph", action="store_true", help="on a GPU: launch the kernels of a training step as two "
                   "CUDA graphs, up to 2.8 times faster; needs --tol 0, not anderson or --sync-bn; not in "
                   "pretraining and for batches of another size")
    p.add_argument("--memory-format", choices=["contiguous", "channels-last"],
                   help="of images, weights and states (default GPU contiguous, CPU channels-last)")
    p.add_argument("--sync-bn", action="store_true", help="BatchNorm statistics over all processes (GPUs only)")
    # run
    p.add_argument("--out", help="folder of checkpoint.pt and metrics.jsonl (default --resume's, or "
                   "runs/MODEL-GRAD-TIME-PID)")
    p.add_argument("--resume", metavar="FILE",
                   help="continue from this checkpoint; 'auto': from --out's, if there is one")
    p.add_argument("--save-every", type=float, default=5.0,
                   help="minutes between checkpoints; each epoch, and SIGTERM, saves one too (default 5)")
    p.add_argument("--log-every", type=int, default=50, help="steps between log lines (default 50)")
    p.add_argument("--cosine-every", type=int, default=0, help="steps between cosines of UPG, NPG and GMRES with k "
                   "steps to the exact gradient, Fig. 2; 0: never (default 0)")
    p.add_argument("--radius-every", type=int, default=0,
                   help="steps between spectral radii of J and J_lam on 64 test images, D.2; 0: never (default 0)")
    p.add_argument("--fig3", metavar="FOLDER", help="train UPG and NPG over k and lam, one after the other in --out, "
                   "and draw FOLDER/fig3.png; needs matplotlib")
    p.add_argument("--eval", action="store_true",
                   help="only evaluate the checkpoint of --resume, ours or an official one; ours brings the flags of "
                   "data, model and solver that are not given")
    p.add_argument("--benchmark", action="store_true",
                   help="only measure step time, memory and solver overhead of implicit, UPG and NPG, on noise images")
    args = p.parse_args(argv)
    refuse, check = flag_checks(p)
    refuse(args.eval and args.resume in (None, "auto"), "--eval needs --resume FILE, the checkpoint to evaluate")
    refuse(args.benchmark and args.eval, "--benchmark and --eval are two different things to do: choose one")
    refuse(args.benchmark and args.resume, "--benchmark measures a model with fresh weights: it takes no --resume")
    refuse(args.fig3 and (args.eval or args.benchmark or args.resume not in (None, "auto")),
           "--fig3 takes neither --eval, --benchmark nor a FILE to --resume: use --out DIR --resume auto")
    for name in ("grad", "k", "lam"):
        refuse(args.fig3 and getattr(args, name) != p.get_default(name), f"--fig3 sets --{name} itself: leave it out")
    refuse((args.benchmark or args.fig3) and launched(),
           f"--{'benchmark' if args.benchmark else 'fig3'} is for one process: run it without torchrun")
    check_run_flags(args, refuse)
    if args.eval:                                   # what is not given here is as it was in training
        saved = load_checkpoint(args.resume)
        if is_ours(saved):
            check_same_run(args.resume, saved["args"], args, free=vars(args))           # of this script at all?
            names = ("data", "train_size", "test_size", "model", "solver", "max_iter", "tol")
            p.set_defaults(**{name: value for name, value in saved["args"].items() if name in names})
            args = p.parse_args(argv)

    toy, adam, config = args.data == "toy", args.optimizer == "adam", MODELS[args.model]
    defaults = {"max_iter": config["max_iter"], "backward_max_iter": config["backward_max_iter"],
                "augment": "no" if toy else config["augment"], "epochs": 4 if toy else config["epochs"],
                "batch_size": 50 if toy else 128, "lr": 1e-3 if adam else 0.1, "weight_decay": 2.5e-6 if adam else 1e-4,
                "memory_format": "contiguous" if torch.cuda.is_available() else "channels-last"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check(args, "k max_iter backward_max_iter pretrain_layers epochs batch_size log_every", lambda x: x >= 1,
          "must be at least 1")
    check(args, "train_size test_size", lambda x: x is None or x >= 1, "must be at least 1")
    check(args, "tol pretrain_steps weight_decay save_every cosine_every radius_every", lambda x: x >= 0,
          "must not be negative")
    check(args, "lr", lambda x: 0 < x < math.inf, "must be positive and finite")
    check(args, "lam", lambda x: 0 < x <= 1, "must be in (0, 1]")
    check(args, "dropout", lambda x: 0 <= x < 1, "must be in [0, 1)")
    check(args, "seed", lambda x: 0 <= x < 2 ** 32, "must be in [0, 2^32)")
    refuse(args.grad == "bptt" and args.solver != "fixed-point",
           "--grad bptt differentiates the plain iteration: it needs --solver fixed-point")
    refuse(args.sync_bn and (not torch.cuda.is_available() or not launched()),
           "--sync-bn needs GPUs and torchrun: torch has no synchronised BatchNorm for CPUs")
    return args


# --- data: all images as uint8 on the device -------------------------------------------------------------------------

class Images(NamedTuple):
    x: torch.Tensor         # (N, 3, S, S) uint8
    y: torch.Tensor         # (N,) int64
    classes: int


def toy_images(n, seed, size=16):
    """Ten classes of gratings, 5 orientations x 2 frequencies, at a random place, phase and colour, in noise.

    The phase is uniform, so every class has the same mean image: a linear classifier stays near 10 %.
    """
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 10

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=rng)

    angle = (y % 5 + uniform(-0.15, 0.15)) * torch.pi / 5
    frequency = torch.where(y < 5, 0.15, 0.28) * uniform(0.9, 1.1)             # cycles per pixel
    grid = torch.arange(size).float()
    dx = grid[None, None, :] - uniform(size / 4, 3 * size / 4, 1, 1)            # (N, 1, S)
    dy = grid[None, :, None] - uniform(size / 4, 3 * size / 4, 1, 1)            # (N, S, 1)
    along = dx * angle.cos()[:, None, None] + dy * angle.sin()[:, None, None]
    wave = torch.cos(2 * torch.pi * frequency[:, None, None] * along + uniform(0, 2 * torch.pi, 1, 1))
    wave = wave * torch.exp(-(dx ** 2 + dy ** 2) / (2 * (size / 4) ** 2))       # (N, S, S)
    colour = F.normalize(torch.randn(n, 3, generator=rng), dim=1)[:, :, None, None]
    noise = 20 * torch.randn(n, 3, size, size, generator=rng)
    x = uniform(90, 160, 3, 1, 1) + uniform(60, 120, 1, 1, 1) * colour * wave[:, None] + noise
    return Images(x.round().clamp(0, 255).to(torch.uint8), y, 10)


def folder_images(root, split):
    """Decodes root/split/CLASS/* once: cached in root under a hash of the files' names, sizes and times."""
    try:
        folder = torchvision.datasets.ImageFolder(root / split)
    except FileNotFoundError as error:
        die(f"--data {root}: {error}")
    stats = [(path, os.stat(path)) for path, _ in folder.samples]
    key = [(os.path.relpath(p, root), s.st_size, s.st_mtime_ns) for p, s in stats]
    fingerprint = hashlib.sha1(repr(key).encode()).hexdigest()[:16]
    cache = root / f".decoded-{split}-{fingerprint}.pt"
    if cache.is_file():
        return Images(*torch.load(cache, weights_only=True), len(folder.classes))
    x = torch.empty(len(folder), 3, 32, 32, dtype=torch.uint8)
    for i, (path, _) in enumerate(tqdm(folder.samples, desc=f"decoding {split}", disable=not sys.stderr.isatty())):
        try:
            image = torchvision.transforms.functional.pil_to_tensor(folder.loader(path))
        except (OSError, SyntaxError) as error:
            die(f"--data: cannot read the image {path} ({error}); replace or remove it")
        if image.shape != (3, 32, 32):
            die(f"--data: {path} is {image.shape[2]} x {image.shape[1]} pixels, CIFAR-10 images are 32 x 32; "
                "replace or remove it")
        x[i] = image
        if not sys.stderr.isatty() and (i + 1) % 10000 == 0:
            print(f"decoded {i + 1} of {len(folder)} {split} images", flush=True)
    y = torch.tensor(folder.targets)
    try:
        torch.save((x, y), cache.with_suffix(".new"))
        os.replace(cache.with_suffix(".new"), cache)
    except OSError as error:
        print(f"note: decoded images are not cached, {root} is not writable ({error})", flush=True)
    return Images(x, y, len(folder.classes))


def load_images(args, process):
    """(train, test) on the device.  The first process of each machine downloads and decodes while the others wait."""
    root = Path(args.data)

    def read():
        if args.data == "toy":
            return toy_images(args.train_size or 2000, seed=1), toy_images(args.test_size or 1000, seed=2)
        if (root / "train").is_dir() or (root / "test").is_dir():
            a, b = ({d.name for d in (root / split).glob("*") if d.is_dir()} for split in ("train", "test"))
            if not a or a != b:
                die(f"--data {root}: train/ and test/ must hold the same class folders; only in train: "
                    f"{sorted(a - b)}, only in test: {sorted(b - a)}")
            return folder_images(root, "train"), folder_images(root, "test")
        try:
            sets = [torchvision.datasets.CIFAR10(str(root), train=split, download=True) for split in (True, False)]
        except (OSError, RuntimeError, EOFError) as error:
            die(f"--data {root}: no CIFAR-10 there, and the download failed ({error}); give a folder that holds "
                "cifar-10-batches-py, or images as train/CLASS/* and test/CLASS/*, or --data toy")
        return [Images(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets), 10)
                for s in sets]

    train, test = first_then_others(read, process)
    if len(test.y) < process.world_size:
        die(f"--data {root}: {len(test.y)} test images are too few for {process.world_size} processes")
    train, test = balanced(train, args.train_size, "--train-size"), balanced(test, args.test_size, "--test-size")
    return tuple(Images(s.x.to(process.device), s.y.to(process.device), s.classes) for s in (train, test))


def balanced(images, size, flag):
    """The first size / classes images of each class."""
    if size is None:
        return images
    each = size // images.classes
    smallest = int(images.y.bincount(minlength=images.classes).min())
    if size % images.classes:
        die(f"{flag} {size}: must be a multiple of the {images.classes} classes")
    if each > smallest:
        die(f"{flag} {size}: must be at most {images.classes * smallest}, {smallest} images of each class")
    index = torch.cat([(images.y == c).nonzero()[:each, 0] for c in range(images.classes)])
    return Images(images.x[index], images.y[index], images.classes)


def memory_format(args):
    return torch.channels_last if args.memory_format == "channels-last" else torch.contiguous_format


@functools.cache
def normalisation(device):
    """Channel means and standard deviations, sent to the device once."""
    values = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]], device=device)
    return values[0, :, None, None], values[1, :, None, None]


def prepare(x, augment, memory_format):
    """uint8 (N, 3, S, S) -> normalised float32, on the device; `augment` pads by 4 with black, crops and flips."""
    if augment:
        N, _, S, _ = x.shape
        x = F.pad(x, (4, 4, 4, 4))
        offset = torch.randint(0, 9, (2, N, 1), device=x.device) + torch.arange(S, device=x.device)
        flip = torch.rand(N, 1, device=x.device) < 0.5
        rows, columns = offset[0], torch.where(flip, offset[1].flip(1), offset[1])          # (N, S) each
        n = torch.arange(N, device=x.device)[:, None, None]
        x = x.permute(0, 2, 3, 1)[n, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    mean, std = normalisation(x.device)
    return ((x / 255.0 - mean) / std).contiguous(memory_format=memory_format)


# --- model -----------------------------------------------------------------------------------------------------------

def conv(c_in, c_out, size=3, stride=1, bias=False):
    return nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, bias=bias)


class ResidualBlock(nn.Module):
    """y = GN(ReLU(GN(drop(conv(ReLU(GN(conv(h))))) + u) + h)): injection before the second norm, shortcut after it."""

    def __init__(self, c, groups, expansion):
        super().__init__()
        self.conv1, self.gn1 = weight_norm(conv(c, expansion * c)), nn.GroupNorm(groups, expansion * c)
        self.conv2, self.gn2 = weight_norm(conv(expansion * c, c)), nn.GroupNorm(groups, c)
        self.gn3 = nn.GroupNorm(groups, c)

    def forward(self, h, u, w1, w2, mask):
        a = F.relu(self.gn1(F.conv2d(h, w1, padding=1)), inplace=True)
        b = F.conv2d(a, w2, padding=1)
        if mask is not None:
            b = b * mask                        # before the injection, so that u is never dropped
        c = self.gn2(b + u) + h
        return self.gn3(F.relu(c, inplace=True))


class Bottleneck(nn.Module):
    """R: c -> 4 p channels.  Its three inner BatchNorms have no affine parameters, as in the official code."""

    def __init__(self, c, p):
        super().__init__()
        self.conv1, self.bn1 = conv(c, p, 1), nn.BatchNorm2d(p, affine=False)
        self.conv2, self.bn2 = conv(p, p), nn.BatchNorm2d(p, affine=False)
        self.conv3, self.bn3 = conv(p, 4 * p, 1), nn.BatchNorm2d(4 * p, affine=False)
        self.shortcut = nn.Identity() if c == 4 * p else nn.Sequential(conv(c, 4 * p, 1), nn.BatchNorm2d(4 * p))

    def forward(self, h):
        t = F.relu(self.bn1(self.conv1(h)))
        t = F.relu(self.bn2(self.conv2(t)))
        return F.relu(self.bn3(self.conv3(t)) + self.shortcut(h))


def fusion(c_from, c_to, groups, steps_down):
    """T_{j->i}.  Down: stride-2 stages with ReLU between, not after, them.  Up: 1x1 convolution, the caller upsamples.

    Upsampling last is only the cheaper order: nearest neighbours commute with a 1x1 convolution and with GroupNorm.
    """
    if steps_down < 0:
        return nn.Sequential(conv(c_from, c_to, 1), nn.GroupNorm(groups, c_to))
    layers = []
    for stage in range(steps_down):
        c = c_to if stage == steps_down - 1 else c_from
        layers += [conv(c_from, c, stride=2), nn.GroupNorm(groups, c), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class MDEQ(nn.Module):
    """Multiscale deep equilibrium classifier: logits = G(h*), h* = F(h*, u), u = M(x).

    The state h is a tuple, branch i of shape (N, channels[i], S / 2^i, S / 2^i); S is the image side after the stem's
    strides.  F has no BatchNorm: it is the same function for every image of a batch.  Its effective weights and dropout
    masks are computed once per forward and handed to every evaluation.  Solver settings as in common.equilibrium.
    """

    def __init__(self, channels=(24, 24), head_channels=(8, 16), final_channels=200, num_classes=10, dropout=0.0,
                 stem_strides=0, groups=8, expansion=5, grad="upg", k=5, lam=0.5, solver=broyden, max_iter=22, tol=0.0,
                 stop_mode="rel_joint", backward_solver=gmres, backward_max_iter=24):
        super().__init__()
        n, c0 = len(channels), channels[0]
        self.channels, self.dropout, self.stem_strides = tuple(channels), dropout, stem_strides
        self.grad, self.k, self.lam = grad, k, lam
        self.solver, self.max_iter, self.tol, self.stop_mode = solver, max_iter, tol, stop_mode
        self.backward_solver, self.backward_max_iter = backward_solver, backward_max_iter

        strides = [2 if stem_strides > i else 1 for i in range(2)]
        self.stem = nn.Sequential(conv(3, c0, stride=strides[0]), nn.BatchNorm2d(c0), nn.ReLU(inplace=True),
                                  conv(c0, c0, stride=strides[1]), nn.BatchNorm2d(c0), nn.ReLU(inplace=True))
        self.injection = (nn.Identity() if stem_strides == 0 and n <= 2 else
                          nn.Sequential(conv(c0, c0, 1), nn.BatchNorm2d(c0), nn.ReLU(inplace=True)))

        self.blocks = nn.ModuleList(ResidualBlock(c, groups, expansion) for c in channels)
        self.fuse = nn.ModuleList(nn.ModuleList(
            nn.Identity() if i == j else fusion(channels[j], channels[i], groups, i - j) for j in range(n))
            for i in range(n))
        self.post = nn.ModuleList(weight_norm(conv(c, c, 1)) for c in channels)
        self.post_gn = nn.ModuleList(nn.GroupNorm(groups // 2, c) for c in channels)

        wide = [4 * p for p in head_channels]
        self.bottlenecks = nn.ModuleList(Bottleneck(c, p) for c, p in zip(channels, head_channels))
        self.down = nn.ModuleList(
            nn.Sequential(conv(a, b, stride=2, bias=True), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
            for a, b in zip(wide, wide[1:]))
        self.final = nn.Sequential(conv(wide[-1], final_channels, 1, bias=True), nn.BatchNorm2d(final_channels),
                                   nn.ReLU(inplace=True))
        self.classifier = nn.Linear(final_channels, num_classes)

        for module in self.modules():       # the official initialisation never reaches weight-normalised convolutions
            if isinstance(module, nn.Conv2d) and not nn.utils.parametrize.is_parametrized(module):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.01)

    def inject(self, x):
        """u = M(x): the stem's output for the finest branch, zeros (without memory of their own) for the others."""
        divisor = 2 ** (self.stem_strides + len(self.channels) - 1)
        if x.shape[-1] % divisor or x.shape[-2] % divisor:
            raise ValueError(f"image sides must be divisible by {divisor} for {len(self.channels)} branches, got "
                             f"{tuple(x.shape[-2:])}")
        u = self.injection(self.stem(x))
        N, _, H, W = u.shape
        return (u, *(u.new_zeros(1).expand(N, c, H >> i, W >> i) for i, c in enumerate(self.channels[1:], start=1)))

    def zeros(self, u, dtype=torch.float32):
        """The initial state, in u's shapes and memory format; not in its dtype, which is bf16 under autocast."""
        channels_last = u[0].is_contiguous(memory_format=torch.channels_last) and not u[0].is_contiguous()
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return tuple(torch.zeros_like(ui, dtype=dtype, memory_format=memory_format) for ui in u)

    def weights(self):
        """Effective weights g v / ||v|| per branch: block's first and second convolution, post-fusion; graph on."""
        weights = [[block.conv1.weight, block.conv2.weight, post.weight] for block, post in zip(self.blocks, self.post)]
        device = weights[0][0].device.type
        if torch.is_autocast_enabled(device):       # cast once per forward: autocast would do so at every evaluation
            weights = [[w.to(torch.get_autocast_dtype(device)) for w in branch] for branch in weights]
        if self.stem[0].weight.is_contiguous(memory_format=torch.channels_last):
            weights = [[w.contiguous(memory_format=torch.channels_last) for w in branch] for branch in weights]
        return weights

    def masks(self, h):
        """Variational dropout: a mask (N, C_i, 1, 1) per branch, the same for all evaluations of F in a forward.

        A mask per evaluation would make F another function at each: it would have no fixed point.
        """
        if not self.training or self.dropout == 0:
            return [None] * len(h)
        keep = 1 - self.dropout
        return [torch.bernoulli(p.new_full((p.shape[0], p.shape[1], 1, 1), keep)) / keep for p in h]

    def f(self, h, u, weights=None, masks=None):
        """The equilibrium module F(h, u): a residual block per branch, fusion of all, a convolution per branch."""
        weights = weights or self.weights()
        masks = masks or [None] * len(h)
        y = [block(hi, ui, w[0], w[1], mask)
             for block, hi, ui, w, mask in zip(self.blocks, h, u, weights, masks)]
        if len(y) == 1:
            return tuple(y)
        out = []
        for i, (post_gn, w) in enumerate(zip(self.post_gn, weights)):
            s = y[i]
            for j, yj in enumerate(y):
                if j < i:
                    s = s + self.fuse[i][j](yj)
                elif j > i:
                    s = s + F.interpolate(self.fuse[i][j](yj), scale_factor=2.0 ** (j - i), mode="nearest")
            out.append(post_gn(F.conv2d(F.relu(s, inplace=True), w[2])))
        return tuple(out)

    def head(self, h):
        """G(h): from fine to coarse, then pooling and the linear classifier."""
        y = self.bottlenecks[0](h[0])
        for i, down in enumerate(self.down):
            y = self.bottlenecks[i + 1](h[i + 1]) + down(y)
        return self.classifier(self.final(y).mean(dim=(2, 3)))

    def forward(self, x, unroll=0, with_result=False, on_backward=None):
        """Logits (N, classes) of x (N, 3, S, S); with_result: (logits, the solver's result or None).

        unroll > 0: the pretraining network of so many layers in place of the solver.
        on_backward: called with the result of the backward solve of grad="implicit".
        """
        u = self.inject(x)
        h0 = self.zeros(u, x.dtype)
        f = functools.partial(self.f, u=u, weights=self.weights(), masks=self.masks(h0))
        if unroll:
            h, result = upg(f, h0, k=unroll, lam=1.0), None
        else:
            h, result = equilibrium(f, h0, grad=self.grad, k=self.k, lam=self.lam, solver=self.solver,
                                    max_iter=self.max_iter, tol=self.tol, stop_mode=self.stop_mode,
                                    backward_solver=self.backward_solver,
                                    backward_max_iter=self.backward_max_iter, backward_tol=self.tol,
                                    on_backward=on_backward)
        logits = self.head(h)
        return (logits, result) if with_result else logits


def load_official(model, state_dict):
    """Loads a state dict of phantom_grad, locuslab/mdeq, locuslab/deq (MDEQ-Vision) or torchdeq's zoo.

    Strict: ValueError names keys that are unknown, missing or of another shape.  Aliases of a tensor are dropped.
    Where that release has a plain weight and we (g, v), v = W and g = ||W||; the other way round W = g v / ||v||.
    """
    renames = [(r"^full_stage\.", "fullstage."), (r"^downsample\.", "stem."), (r"^stage0\.", "injection."),
               (r"^fullstage\.branches\.(\d+)\.blocks\.0\.", r"blocks.\1."),
               (r"^fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.conv\.", r"fuse.\1.\2.0."),
               (r"^fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.gnorm\.", r"fuse.\1.\2.1."),
               (r"^fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.(\d+)\.(conv|gnorm)\.",
                lambda m: f"fuse.{m[1]}.{m[2]}.{3 * int(m[3]) + (m[4] == 'gnorm')}."),
               (r"^fullstage\.post_fuse_layers\.(\d+)\.conv\.", r"post.\1."),
               (r"^fullstage\.post_fuse_layers\.(\d+)\.gnorm\.", r"post_gn.\1."),
               (r"^incre_modules\.(\d+)\.0\.downsample\.", r"bottlenecks.\1.shortcut."),
               (r"^incre_modules\.(\d+)\.0\.", r"bottlenecks.\1."),
               (r"^downsamp_modules\.", "down."), (r"^final_layer\.", "final.")]
    state_dict = state_dict.get("state_dict", state_dict)
    found = {}
    for key, value in state_dict.items():
        key = key.removeprefix("module.")
        if key.startswith(("deq.func.", "deq.func_copy.", "fullstage_copy.")):      # aliases, and a frozen copy
            continue
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        found[key] = value

    own = model.state_dict()
    for key in [k for k in found if k.endswith(".weight_g") and k.removesuffix("g") + "v" in found]:
        stem, g, v = key.removesuffix("_g"), found.pop(key), found.pop(key.removesuffix("g") + "v")
        name = stem.removesuffix("weight") + "parametrizations.weight.original"
        if name + "0" in own:
            found[name + "0"], found[name + "1"] = g, v
        else:
            found[stem] = g * v / torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)
    for name in [k.removesuffix("original0") for k in own if k.endswith("original0")]:
        plain = name.replace("parametrizations.weight.", "weight")
        if plain in found:
            found[name + "original1"] = found.pop(plain)
            found[name + "original0"] = torch.linalg.vector_norm(found[name + "original1"], dim=(1, 2, 3), keepdim=True)
    if not any(k.startswith("post_gn.") for k in found):        # locuslab/deq: this norm has no affine parameters
        found.update({k: torch.full_like(v, k.endswith("weight")) for k, v in own.items() if k.startswith("post_gn.")})

    problems = [f"unknown {k}" for k in found if k not in own] + [f"missing {k}" for k in own if k not in found]
    problems += [f"{k} is {tuple(found[k].shape)} instead of {tuple(v.shape)}"
                 for k, v in own.items() if k in found and found[k].shape != v.shape]
    if problems:
        raise ValueError("; ".join(problems[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else ""))
    model.load_state_dict(found)


# --- evaluation and diagnostics --------------------------------------------------------------------------------------

def autocast(args, device):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.amp)


@torch.no_grad()
def evaluate(model, images, args, process):
    """Accuracy (%), loss and the solver's health over all images, each counted once, by the solver alone."""
    model.eval()
    sums, residuals = torch.zeros(4, dtype=torch.float64, device=process.device), []
    own = torch.arange(process.rank, len(images.y), process.world_size, device=process.device)
    for index in tqdm(own.split(max(1, args.batch_size // process.world_size)), desc="evaluating", leave=False,
                      disable=process.rank > 0 or not sys.stderr.isatty()):
        x, y = prepare(images.x[index], False, memory_format(args)), images.y[index]
        with autocast(args, process.device):
            logits, result = model(x, with_result=True)
        logits = logits.float()
        sums[0] += (logits.argmax(1) == y).sum()
        sums[1] += F.cross_entropy(logits, y, reduction="sum")
        sums[2] += len(y)
        sums[3] += len(y) * result.n_evals
        residuals.append(result.residual)
    model.train()
    correct, loss, count, evals = all_reduce_sum(sums).tolist()
    return {"test_accuracy": 100 * correct / count, "test_loss": loss / count, "test_evals": evals / count,
            **health("test", residuals, args.tol)}


def f_parameters(model):
    return [p for name, p in model.named_parameters() if name.split(".")[0] in ("blocks", "fuse", "post", "post_gn")]


def gradient_cosines(model, x, y, args):
    """Fig. 2: cosine, over the parameters of F, of other gradients to the exact one, on this process's images.

    The others are UPG, NPG and k steps of GMRES.  Exact: GMRES until 1e-3, at most 200 products with the Jacobian; the
    residuals say how exact (medians over the images).  All are taken at one h*.  Leaves no trace: the training goes on
    as if it had not been called.
    """
    buffers, rng = [b.clone() for b in model.buffers()], rng_state()
    with autocast(args, x.device):
        u = model.inject(x)
        h0 = model.zeros(u, x.dtype)
        f = functools.partial(model.f, u=u, weights=model.weights(), masks=model.masks(h0))
        found = compare_gradients(f, h0, lambda h: F.cross_entropy(model.head(h).float(), y), f_parameters(model),
                                  [(grad, args.k, args.lam) for grad in ("upg", "npg", "implicit")],
                                  solver=functools.partial(model.solver, stop_mode=model.stop_mode),
                                  max_iter=model.max_iter, tol=model.tol, radius_iter=0)
    set_rng_state(rng)
    for buffer, old in zip(model.buffers(), buffers):       # BatchNorm has counted this batch more than once
        buffer.copy_(old)
    return {**{f"cosine_{name}": row["cosine"] for name, row in zip(("upg", "npg", "gmres"), found["rows"])},
            "cosine_forward_residual": found["forward_residual"].median().item(),
            "cosine_backward_residual": found["backward_residual"].median().item(), "cosine_verified": found["exact"]}


def spell_cosines(step, found, k):
    """One line of what `gradient_cosines` found; says so if the exact gradient was not reached."""
    verified = found["cosine_verified"]
    return (f"step {step}: cosine to the exact gradient: UPG {found['cosine_upg']:.4f}, NPG {found['cosine_npg']:.4f}, "
            f"GMRES {k} {found['cosine_gmres']:.4f}; median residual forward {found['cosine_forward_residual']:.0e}, "
            f"backward {found['cosine_backward_residual']:.0e}"
            + ("" if verified == 1 else f"; exact (both at most 1e-3) for only {100 * verified:.0f} % of the images"))


@torch.no_grad()
def radii(model, images, args):
    """App. D.2: spectral radius of J and of lam J + (1 - lam) I at h* of 64 images, evaluation mode; no trace.

    Means, and the share of the images where that of J exceeds 1.
    """
    rng = rng_state()
    model.eval()
    spread = images.x[::max(1, len(images.y) // 64)][:64]       # over all classes: the images may be sorted by class
    x = prepare(spread, False, memory_format(args))
    with autocast(args, x.device):
        u = model.inject(x)
        f = functools.partial(model.f, u=u, weights=model.weights())
        h = model.solver(f, model.zeros(u), max_iter=model.max_iter, tol=model.tol, stop_mode=model.stop_mode).h
        rho, rho_lam = (spectral_radius(f, h, lam=value, n_iter=50) for value in (1.0, args.lam))
    model.train()
    set_rng_state(rng)
    return {"rho_J": rho.mean().item(), "rho_J_lam": rho_lam.mean().item(),
            "rho_J_above_1": (rho > 1).float().mean().item()}


# --- benchmark -------------------------------------------------------------------------------------------------------

def benchmark(model, x, y, args, repeats=3):
    """Times training steps with implicit, UPG and NPG in turns, and the solver's overhead: medians over the repeats.

    With --cuda-graph all of them hold their memory at once.
    """
    device, grads = x.device, ("implicit", "upg", "npg")
    optimizer, passes = torch.optim.SGD(model.parameters(), lr=0.0), {}
    model.tol = 0.0                     # all iterations
    model.train()
    reset_peak_memory(device)
    at_start = peak_memory(device)

    def finish():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step(grad, k):
        model.grad, model.k = grad, k
        if (grad, k) not in passes:         # what a graph needs it takes when it is captured, and keeps
            reset_peak_memory(device)
            before = peak_memory(device)
            training = training_pass(args, model, len(x), x.shape[-1], device)
            passes[grad, k] = training, at_start + peak_memory(device) - before
        training, captured_gb = passes[grad, k]

        def forward():
            with autocast(args, device):
                return F.cross_entropy(training(x)[0].float(), y)

        *times, gb = timed_step(forward, finish, device)
        return [*times, captured_gb if args.cuda_graph else gb]

    def overhead():
        with torch.no_grad(), autocast(args, device):
            u = model.inject(x)
            f, h0 = functools.partial(model.f, u=u, weights=model.weights()), model.zeros(u)
            return solver_overhead(functools.partial(model.solver, max_iter=model.max_iter, tol=0), f, h0, device)

    median = medians_in_turns({**{grad: functools.partial(step, grad, args.k) for grad in grads},
                               "overhead": overhead}, repeats)
    about = describe_run(device, 1)
    print(f"\n{sum(p.numel() for p in model.parameters()):,} parameters, images {tuple(x.shape)}, {args.solver}: "
          f"{model.max_iter} forward, {args.backward_solver}: {model.backward_max_iter} backward iterations, "
          f"k = {args.k}; {about['device']}, torch {about['torch']}, commit {about['commit']}")
    print("gradient   forward ms  backward ms  step ms  peak GB  images/s  backward    step  (ratios: implicit / this)")
    base = median["implicit"]
    for grad in grads:
        forward_ms, backward_ms, whole, gb = median[grad]
        print(f"{grad:9s} {forward_ms:11.1f} {backward_ms:12.1f} {whole:8.1f} {gb:8.3f} {1e3 * len(y) / whole:9.1f} "
              f"{base[1] / backward_ms:8.2f}x {base[2] / whole:6.2f}x")
    ratio, f_ms = median["overhead"]
    print(f"F: {f_ms:.1f} ms; solver overhead, solve / (calls of F x time of F): {ratio:.3f}")
    memory = {k: step("npg", k)[3] for k in (1, 20)}
    print(f"NPG peak memory: k = 1 {memory[1]:.3f} GB, k = 20 {memory[20]:.3f} GB, ratio {memory[20] / memory[1]:.3f}")


# --- training --------------------------------------------------------------------------------------------------------

def build_model(args, classes, process):
    shape = {key: MODELS[args.model][key] for key in ("channels", "head_channels", "final_channels")}
    model = MDEQ(**shape, num_classes=classes, dropout=args.dropout, grad=args.grad, k=args.k, lam=args.lam,
                 solver=SOLVERS[args.solver], max_iter=args.max_iter, tol=args.tol,
                 backward_solver=BACKWARD_SOLVERS[args.backward_solver], backward_max_iter=args.backward_max_iter)
    model = model.to(process.device, memory_format=memory_format(args))
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.compile:
        model.f, model.head = compiled(model.f), compiled(model.head)
    return model


def training_pass(args, model, batch, side, device):
    """The model's TrainingPass for batches of `batch` images; with --cuda-graph as CUDA graphs."""
    training = TrainingPass(model, batch, device)
    if args.cuda_graph:
        example = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=memory_format(args))
        with autocast(args, device):
            captured(training, example)
    return training


def restore(args, model, images, optimizer=None, scheduler=None):
    """Loads --resume into the model, and in training all the rest of the state.  Returns what was read."""
    state = load_checkpoint(args.resume)
    ours = is_ours(state)
    if not ours and not args.eval:
        die(f"--resume {args.resume} was not written by this script: an official checkpoint can be evaluated (--eval), "
            "not continued")
    if ours:
        free = {"data", "out", "resume", "eval", "benchmark", "fig3", "save_every", "log_every", "cosine_every",
                "radius_every", "compile", "cuda_graph", "memory_format"}
        if args.eval:
            free |= set(vars(args)) - {"model"}             # in training, the others can change the curve
            note_differences(state["args"], args, "solver max_iter tol")
        check_same_run(args.resume, state["args"], args, free)
        if state["classes"] != images.classes:
            die(f"--resume {args.resume} is of a run with {state['classes']} classes, --data {args.data} has "
                f"{images.classes}")
        if not args.eval and state["images"] != len(images.y):
            die(f"--resume {args.resume} is of a run with {state['images']} training images, --data {args.data} has "
                f"{len(images.y)}: their order would be another one")
    load_weights(model, state, load_official, f"--resume {args.resume} does not fit --model {args.model}")
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
    return state


def train(args, process, timer, model, train_set, test_set):
    """The last epoch's test accuracy; None after a SIGTERM, nan where a run of --fig3 has diverged."""
    device, rank, world = process.device, process.rank, process.world_size
    main = rank == 0
    checkpoint, args.resume = open_run(args.out, args.resume)
    N = len(train_set.y)
    steps_per_epoch = math.ceil(N / args.batch_size)        # the last, incomplete batch is kept
    steps = args.epochs * steps_per_epoch
    if N < args.batch_size:
        die(f"--batch-size {args.batch_size}: there are only {N} training images")
    if N % args.batch_size and N % args.batch_size < world:
        die(f"--batch-size {args.batch_size}: the last batch of an epoch has {N % args.batch_size} image(s) for "
            f"{world} processes; choose another size")
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=1e-6)
    state = {"step": 0, "evaluated": 0, "best": 0.0, "best_epoch": 0, "last": 0.0, "seconds": 0.0}
    if args.resume:
        state = restore(args, model, train_set, optimizer, scheduler)
    step, evaluated, best, best_epoch, last = (state[k] for k in ("step", "evaluated", "best", "best_epoch", "last"))
    # Before the seeds are set and DistributedDataParallel comes: it draws an example, and captures the bare model.
    training = net = training_pass(args, model, args.batch_size // world, train_set.x.shape[-1], device)
    seed_everything(args.seed + rank)
    if args.resume:
        set_rng_states(state["rng"], process)
    if world > 1:
        net = DistributedDataParallel(training, device_ids=[device.index] if device.type == "cuda" else None)
    parameters = sum(p.numel() for p in model.parameters())
    log = start_log(args, process, step, parameters, f"{args.model}: {parameters:,} parameters; {N} training and "
                    f"{len(test_set.y)} test images; {args.epochs} epochs of {steps_per_epoch} steps",
                    last_step_of={"epoch": evaluated}, steps=steps)

    def save():
        rng = rng_states()                                  # all processes take part
        if main:
            save_checkpoint(checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                         "scheduler": scheduler.state_dict(), "rng": rng, "step": step,
                                         "evaluated": evaluated, "best": best, "best_epoch": best_epoch, "last": last,
                                         "classes": train_set.classes, "images": N, "args": vars(args),
                                         "seconds": time.perf_counter() - started})

    meter, residuals, backward_residuals, stop = Meter(device), [], [], False
    started = time.perf_counter() - state["seconds"]
    # Evaluation comes first: a run that was cut off in one finds its checkpoint at the end of that epoch.
    while not stop and (step < steps or evaluated < step):
        if step > evaluated and step % steps_per_epoch == 0:        # an epoch has ended, maybe in the run before this
            for buffer in model.buffers() if world > 1 else ():     # BatchNorm's statistics, of the first process
                torch.distributed.broadcast(buffer, 0)
            with timer.saved():
                record = evaluate(model, test_set, args, process)
            epoch, evaluated, last = step // steps_per_epoch, step, record["test_accuracy"]
            if last > best:
                best, best_epoch = last, epoch
            for name, found in (("train", residuals), ("backward", backward_residuals)):
                record.update(health(name, found, args.tol))
                found.clear()
            if main:
                log.write(event="epoch", step=step, epoch=epoch, best_accuracy=best, best_epoch=best_epoch,
                          seconds=time.perf_counter() - started, **record)
                tqdm.write(f"epoch {epoch}: test accuracy {last:.2f} %, best {best:.2f} % (epoch {best_epoch}), test "
                           f"loss {record['test_loss']:.4f}")
                tqdm.write(f"  {spell_health(record, 'train', 'test', 'backward')}; {record['test_evals']:g} calls of "
                           "F per solve")
            save()
            continue

        epoch, done = divmod(step, steps_per_epoch)
        order = torch.Generator().manual_seed(args.seed + 1_000_003 * (epoch + 1))          # the same on all processes
        batches = torch.randperm(N, generator=order).to(device).split(args.batch_size)
        meter.reset()
        for b in tqdm(range(done, steps_per_epoch), desc=f"epoch {epoch + 1}", leave=False,
                      disable=not (main and sys.stderr.isatty())):
            index = batches[b].tensor_split(world)[rank]
            x, y = prepare(train_set.x[index], args.augment == "yes", memory_format(args)), train_set.y[index]
            unroll = args.pretrain_layers if step < args.pretrain_steps else 0
            with autocast(args, device):
                logits, residual = net(x, unroll=unroll) if unroll else net(x)
            # DDP averages over processes: this is the mean over the global batch also where it does not divide evenly
            share = world * len(y) / len(batches[b])
            loss = share * F.cross_entropy(logits.float(), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            lr = scheduler.get_last_lr()[0]                 # of this step
            scheduler.step()
            step += 1
            meter.add(len(y), loss=loss / share, accuracy=100 * (logits.argmax(1) == y).float().mean())
            if residual is not None:                        # copies: the next step may overwrite them
                residuals.append(residual.detach().clone())
                if args.grad == "implicit":
                    backward_residuals.append(training.backward_residual[:len(y)].clone())

            # --- the step ends here; what follows is logging, diagnostics and saving ---
            saving, stop = timer.poll()
            saving = saving or b == steps_per_epoch - 1             # before the evaluation, which may take long
            cosines_due, radii_due = (every and step % every == 0 for every in (args.cosine_every, args.radius_every))
            if cosines_due or radii_due:
                paused = clock(device)
                if cosines_due:
                    cosines = gradient_cosines(model, x, y, args)
                    if main:
                        log.write(event="cosine", step=step, **cosines)
                        tqdm.write(spell_cosines(step, cosines, args.k))
                if radii_due:
                    radius = radii(model, test_set, args)
                    if main:
                        log.write(event="radius", step=step, **radius)
                        tqdm.write(f"step {step}: spectral radius of J {radius['rho_J']:.3f}, of J_lam "
                                   f"{radius['rho_J_lam']:.3f}")
                meter.start += clock(device) - paused               # diagnostics do not count as training time
            if step % args.log_every == 0 or saving:
                record = meter.read()                                   # host sync
                broken = what_broke(record["loss"], model.parameters() if saving else ())
                if broken:
                    kept = f"the last good state is {checkpoint}" if checkpoint.exists() else "nothing was saved yet"
                    if args.fig3:
                        log.write(event="diverged", step=step, reason=broken)
                        tqdm.write(f"diverged: {broken} by step {step}; --fig3 goes on with the next run")
                        return math.nan
                    die(f"{broken} by step {step}: try a lower --lr or --lam; {kept}", code=1)
                if main:
                    log.write(event="train", step=step, epoch=epoch + 1, lr=lr, seconds=time.perf_counter() - started,
                              **record)
                    gb = f"  {record['peak_gb']:.2f} GB" if "peak_gb" in record else ""
                    tqdm.write(f"step {step:6d}  epoch {epoch + 1:3d}  loss {record['loss']:.4f}  accuracy "
                               f"{record['accuracy']:5.2f} %  lr {lr:.5f}  {record['ms_per_step']:.0f} ms/step  "
                               f"{record['samples_per_s']:.0f} images/s{gb}")
            if saving:
                save()
                meter.reset()
            if stop:
                break
    if stop:
        if main and not args.fig3:
            print(f"SIGTERM: saved after step {step} to {checkpoint}; continue with the same command, --out {args.out} "
                  "and --resume auto", flush=True)
        return None
    if main:
        print(f"done: test accuracy {last:.2f} % after the last epoch; best epoch {best:.2f} % (epoch {best_epoch}; "
              f"chosen on the test images, as the paper does); {(time.perf_counter() - started) / 60:.1f} minutes",
              flush=True)
    return last


# --- Fig. 3 ----------------------------------------------------------------------------------------------------------

def figure3(args, process, timer, train_set, test_set):
    """Trains UPG and NPG over k and lam, each run in a folder of its own under --out: [{"grad", "lam", "k", ...}].

    All begin with the same weights and see the same images in the same order.  None after a SIGTERM.
    """
    out, rows = Path(args.out), []
    open_run(out, None)                     # the folder of a training run is none for this
    for grad, lam, k in itertools.product(*FIG3.values()):
        one = argparse.Namespace(**{**vars(args), "grad": grad, "lam": lam, "k": k,
                                    "out": str(out / f"{grad}-{lam}-{k}")})
        before = Path(one.out, "metrics.jsonl")
        if args.resume and before.exists() and '"event": "diverged"' in before.read_text():
            print(f"{one.out} has diverged before", flush=True)
            rows.append({"grad": grad, "lam": lam, "k": k, "accuracy": math.nan})
            continue
        seed_everything(args.seed)
        accuracy = train(one, process, timer, build_model(one, train_set.classes, process), train_set, test_set)
        if accuracy is None or timer.poll()[1]:         # a SIGTERM may also have come after the run's last step
            print(f"--fig3: continue with the same command, --out {out} and --resume auto", flush=True)
            return None
        rows.append({"grad": grad, "lam": lam, "k": k, "accuracy": accuracy})
    log = MetricsLog(out / "metrics.jsonl", last_step=-1)
    log.write(event="start", args=vars(args), **describe_run(process.device, 1))
    for row in rows:
        log.write(event="fig3", **row)
    print("\n| test accuracy, last epoch | " + " | ".join(f"k = {k}" for k in FIG3["k"]) + " |\n"
          + "|---" * (1 + len(FIG3["k"])) + "|")
    for grad, lam in itertools.product(FIG3["grad"], FIG3["lam"]):
        line = ["diverged" if math.isnan(row["accuracy"]) else f"{row['accuracy']:.2f}" for row in rows
                if (row["grad"], row["lam"]) == (grad, lam)]
        print(f"| {grad.upper()}, lam = {lam} | " + " | ".join(line) + " |", flush=True)
    return rows


def plot(rows, folder):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for ax, grad in zip(axes, FIG3["grad"]):
        for lam in FIG3["lam"]:
            line = [row for row in rows if (row["grad"], row["lam"]) == (grad, lam)]
            ax.plot([row["k"] for row in line], [row["accuracy"] for row in line], "o-", label=f"$\\lambda$ = {lam}")
        ax.set(title=grad.upper(), xlabel="k", xticks=FIG3["k"])
    axes[0].set_ylabel("test accuracy (%)")
    axes[1].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(folder / "fig3.png", dpi=110)
    print(f"wrote {folder / 'fig3.png'}", flush=True)


# --- main ------------------------------------------------------------------------------------------------------------

def main(args):
    if args.fig3:
        try:
            import matplotlib  # noqa: F401, here and not after hours of work
            Path(args.fig3).mkdir(parents=True, exist_ok=True)
        except ImportError:
            die("--fig3 needs matplotlib: pip install matplotlib")
        except OSError as error:
            die(f"--fig3 {args.fig3}: cannot make this folder ({error.strerror})")
    line_by_line()
    process = init_process()
    choose_out(args, f"{args.model}-{args.grad}")
    if args.batch_size % process.world_size:
        die(f"--batch-size {args.batch_size} is not divisible by the {process.world_size} processes")
    torch.backends.cudnn.allow_tf32 = not args.no_tf32      # convolutions; the solver's own products stay in float32
    torch.backends.cudnn.benchmark = True
    seed_everything(args.seed)          # the same weights on all processes
    if args.benchmark:
        side = 16 if args.data == "toy" else 32
        x = torch.randint(0, 256, (args.batch_size, 3, side, side), dtype=torch.uint8, device=process.device)
        y = torch.arange(args.batch_size, device=process.device) % 10
        benchmark(build_model(args, 10, process), prepare(x, False, memory_format(args)), y, args)
        return
    train_set, test_set = load_images(args, process)
    if args.eval:
        model = build_model(args, train_set.classes, process)
        restore(args, model, test_set)
        if process.rank == 0:
            print(f"{args.resume}: {args.solver}, at most {args.max_iter} steps, tolerance {args.tol:g}; "
                  f"{len(test_set.y)} images", flush=True)
        record = evaluate(model, test_set, args, process)
        if process.rank == 0:
            print(f"test accuracy {record['test_accuracy']:.2f} %, test loss {record['test_loss']:.4f}\n"
                  f"{spell_health(record, 'test')}; {record['test_evals']:g} calls of F per solve")
    elif args.fig3:
        rows = figure3(args, process, SaveTimer(args.save_every), train_set, test_set)
        if rows:
            plot(rows, Path(args.fig3))
    else:
        model = build_model(args, train_set.classes, process)
        timer = SaveTimer(args.save_every)
        done = train(args, process, timer, model, train_set, test_set) is not None
        if done and args.data == "toy" and process.world_size == 1:
            x, y = train_set.x[:args.batch_size], train_set.y[:args.batch_size]
            with timer.saved():             # a SIGTERM may end it at once
                benchmark(model, prepare(x, False, memory_format(args)), y, args)
    if process.world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
