"""MDEQ-Small on ImageNet with phantom gradients: "On Training Implicit Models" (NeurIPS 2021, arXiv:2111.05177).

    torchrun --nproc_per_node=8 mdeq_imagenet.py --grad upg --k 5 --lam 0.6     # the paper's row: 8 GPUs x 16 images
    python mdeq_imagenet.py --data toy                          # generated images, narrow: 2 min on two CPU cores
    python mdeq_imagenet.py --accumulate 8                      # one GPU: the same gradient in 8 micro-batches of 16
    python mdeq_imagenet.py --eval --resume FILE --max-iter 20  # top-1, top-5, residuals, spectral radii
    python mdeq_imagenet.py --benchmark --batch-size 16         # step time and memory of the three gradients

Images: --data DIR (default data/imagenet) with DIR/train/CLASS/* and DIR/val/CLASS/*.  On each of two machines (R is a
folder that both see):
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 mdeq_imagenet.py --out R
The same, carrying on by itself up to three times after a process is lost:
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1             # torch's restarts fail without it, see init_process
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --max-restarts=3 \\
        mdeq_imagenet.py --out R --resume auto
SIGTERM, to all processes, saves and ends them with code 0; torchrun itself passes one on, ends with code 1, and kills
what is left after 30 seconds.

Table 3 (16,808,936 parameters, 100 epochs, batches of 128): torchrun --nproc_per_node=8 mdeq_imagenet.py with
    paper 75.3 %   --grad implicit --backward-solver broyden --pretrain-steps 500000
          75.2 %   --pretrain-steps 500000                         # App. D.3, setting 1: UPG after pretraining
          75.7 %   (none)                                          # App. D.3, setting 2: UPG from the first step on
The paper solves backwards by Broyden's method; the default here is GMRES.
App. D.3's spectral radii: --radius-every 10000, or --eval.

What makes it faster (--benchmark with the flag measures the first five; README.md has what was measured):
    --cuda-graph                a step's 10,000 kernels in two launches: 2.3 to 2.8 times faster at 16 images per GPU,
                                where to launch one takes longer than to run it; the same numbers to rounding
    --compile                   F and head by torch.compile: fewer launches, fused norms; the same numbers to rounding
    --memory-format FORMAT      channels-last or contiguous; the same numbers to rounding
    --amp                       bf16 autocast, solver state in float32: changes results, so it is off by default
    TF32 convolutions           torch's default on a GPU, so here too, though it changes results; --no-tf32 without
    --accumulate n              not faster: 1/n of the activations, for smaller cards; BatchNorm sees micro-batches
    always on                   effective weights once per forward, a solver that never waits for the GPU (--tol 0),
                                images travel as uint8, and are cropped in worker processes (--workers)

Measured: step times on one H200, 65 ms for UPG at 16 images and 280 at 128 (--cuda-graph); no training to the end.
README.md has these, and CPU runs on 1000 real images.

Differs from the paper and its release: residuals, and the choice of the best iterate, per image (there: one norm over
the batch); Broyden's first step has the right sign (theirs is inverted); NPG follows Eq. (17), not Algorithms 2 and 3.
Initialised by PyTorch's defaults, as its release is (CIFAR-10's is not).  BatchNorm is per GPU, which is how UPG's
numbers were made; the released script has SyncBN (here --sync-bn).  Random crops by torchvision with the release's area
and aspect (there: DALI).  The last, incomplete batch of an epoch is dropped: 10,009 steps.  The paper's 75.3 is of
locuslab/mdeq, whose recipe differs in more than the gradient: 4 GPUs x 32 images, crops of 8 to 100 % of the area,
weights from Normal(0, 0.01); here all rows share UPG's.
"""
import argparse
import atexit
import contextlib
import functools
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path

# Large CPU allocations then come in 2 MB pages: faster on a CPU.  torch reads it at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
import torch.nn.functional as F       # in prose F is the equilibrium module, MDEQ.f
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torchvision import transforms
from tqdm import tqdm

from common import (Meter, SaveTimer, TrainingPass, all_reduce_sum, anderson, broyden, captured, check_run_flags,
                    check_same_run, choose_out, clock, compiled, describe_run, die, equilibrium, fixed_point,
                    flag_checks, gmres, health, init_process, is_ours, launched, line_by_line, load_checkpoint,
                    load_weights, medians_in_turns, note_differences, open_run, peak_memory, reset_peak_memory,
                    rng_state, rng_states, save_checkpoint, seed_everything, set_rng_state, set_rng_states,
                    solver_overhead, spectral_radius, spell_health, start_log, timed_step, upg, what_broke)

SOLVERS = {"broyden": broyden, "anderson": anderson, "fixed-point": fixed_point}
BACKWARD_SOLVERS = {"gmres": gmres, **SOLVERS}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Trains MDEQ-Small on ImageNet; no flags: UPG A_{5,0.6}, the paper's row.")
    # data
    p.add_argument("--data", default="data/imagenet", help="folder with train/CLASS/* and val/CLASS/*; or 'toy': "
                   "generated images, 10 classes, crops of 64 (default data/imagenet)")
    p.add_argument("--augment", choices=["yes", "no"], default="yes",
                   help="random crops of 10 to 100 %% of the area, and flips; no: as in evaluation (default yes)")
    p.add_argument("--crop", type=int, help="side of the model's input, a multiple of 32 (default 224, toy 64)")
    p.add_argument("--resize", type=int,
                   help="shorter side of an image before its central crop, in evaluation (default 256, toy 72)")
    p.add_argument("--workers", type=int, help="processes that read images, for each training process; 0: none "
                   "(default 8, at most one per CPU core)")
    p.add_argument("--on-bad-image", choices=["stop", "skip"], default="stop",
                   help="an unreadable file is named, and ends the run or is left out (default stop)")
    # model
    p.add_argument("--channels", type=int, nargs="+",
                   help="of each branch, multiples of 8 (default 32 64 128 256, toy 16 16 32 32)")
    p.add_argument("--head-channels", type=int, nargs="+",
                   help="a quarter of the head's channels, per branch (default 24 48 96 192, toy 4 8 8 16)")
    p.add_argument("--final-channels", type=int, help="before the classifier (default 2048, toy 256)")
    p.add_argument("--dropout", type=float, default=0.0, help="probability of variational dropout in F (default 0)")
    p.add_argument("--init", metavar="FILE", help="begin with the weights of this checkpoint, ours or an official one; "
                   "another number of classes: with a new classifier")
    # equilibrium
    p.add_argument("--grad", choices=["upg", "npg", "implicit", "bptt"], default="upg",
                   help="how the gradient is computed (default upg)")
    p.add_argument("--k", type=int, default=5, help="steps of the phantom gradient (default 5)")
    p.add_argument("--lam", type=float, default=0.6, help="damping of the phantom gradient, in (0, 1] (default 0.6)")
    p.add_argument("--solver", choices=list(SOLVERS), default="broyden", help="finds the equilibrium (default broyden)")
    p.add_argument("--backward-solver", choices=list(BACKWARD_SOLVERS), default="gmres",
                   help="solves for the gradient of --grad implicit; the paper's is broyden (default gmres)")
    p.add_argument("--max-iter", type=int, default=26, help="steps of the forward solver (default 26)")
    p.add_argument("--backward-max-iter", type=int, default=27,
                   help="steps of the backward solver of --grad implicit (default 27)")
    p.add_argument("--tol", type=float, default=0.0, help="relative residual at which an image counts as solved; "
                   "0: always the whole budget (default 0)")
    p.add_argument("--pretrain-steps", type=int, default=0,
                   help="first optimiser steps, with an unrolled network in place of the solver (default 0)")
    p.add_argument("--pretrain-layers", type=int, default=5, help="evaluations of F in that network (default 5)")
    # optimisation
    p.add_argument("--epochs", type=int, help="passes over the training images (default 100, toy 8)")
    p.add_argument("--batch-size", type=int, help="images per step over all processes (default 128, toy 40)")
    p.add_argument("--accumulate", type=int, default=1, help="micro-batches per step and process (default 1)")
    p.add_argument("--lr", type=float, default=0.05,
                   help="initial, of SGD with Nesterov momentum 0.9; cosine to 1e-6 over all steps (default 0.05)")
    p.add_argument("--weight-decay", type=float, default=5e-5, help="L2 penalty on every parameter (default 5e-5)")
    p.add_argument("--seed", type=int, default=0, help="of weights, data order, augmentation and dropout (default 0)")
    # speed
    p.add_argument("--amp", action="store_true", help="bf16 autocast; the solver's own vectors stay float32")
    p.add_argument("--no-tf32", action="store_true", help="GPU convolutions in full float32; TF32 is torch's default")
    p.add_argument("--compile", action="store_true", help="torch.compile F and the head")
    p.add_argument("--cuda-graph", action="store_true", help="on a GPU: launch the kernels of a training step as two "
                   "CUDA graphs, up to 2.8 times faster; needs --tol 0 and --accumulate 1, not anderson or "
                   "--sync-bn; not in pretraining and for batches of another size")
    p.add_argument("--memory-format", choices=["contiguous", "channels-last"],
                   help="of images, weights and states (default GPU contiguous, CPU channels-last)")
    p.add_argument("--sync-bn", action="store_true", help="BatchNorm statistics over all processes (GPUs only)")
    # run
    p.add_argument("--out", help="folder of checkpoint.pt and metrics.jsonl (default --resume's, or "
                   "runs/imagenet-GRAD-TIME-PID); on several machines a shared one")
    p.add_argument("--resume", metavar="FILE",
                   help="continue from this checkpoint; 'auto': from --out's, if there is one")
    p.add_argument("--save-every", type=float, default=15.0,
                   help="minutes between checkpoints; each epoch, and SIGTERM, saves one too (default 15)")
    p.add_argument("--log-every", type=int, help="steps between log lines (default 50, toy 20)")
    p.add_argument("--radius-every", type=int, default=0,
                   help="steps between spectral radii of J and J_lam, App. D.3; 0: never (default 0)")
    p.add_argument("--radius-images", type=int, default=64,
                   help="validation images for these radii, also in --eval; 0: none (default 64)")
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
    refuse(args.benchmark and launched(), "--benchmark is for one process: run it without torchrun")
    refuse(args.init and (args.eval or args.benchmark),
           "--init begins a training: evaluate a checkpoint with --eval --resume FILE")
    check_run_flags(args, refuse)
    if args.eval:                                   # what is not given here is as it was in training
        saved = load_checkpoint(args.resume)
        if is_ours(saved):
            check_same_run(args.resume, saved["args"], args, free=vars(args))           # of this script at all?
            names = ("data", "channels", "head_channels", "final_channels", "crop", "resize", "lam", "solver",
                     "max_iter", "tol")
            p.set_defaults(**{name: value for name, value in saved["args"].items() if name in names})
            args = p.parse_args(argv)

    toy = args.data == "toy"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1   # a job's own
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    defaults = {"channels": [16, 16, 32, 32] if toy else [32, 64, 128, 256],
                "head_channels": [4, 8, 8, 16] if toy else [24, 48, 96, 192], "final_channels": 256 if toy else 2048,
                "crop": 64 if toy else 224, "resize": 72 if toy else 256, "epochs": 8 if toy else 100,
                "batch_size": 40 if toy else 128, "log_every": 20 if toy else 50, "workers": min(8, cores),
                "memory_format": "contiguous" if torch.cuda.is_available() else "channels-last"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check(args, "k max_iter backward_max_iter pretrain_layers epochs batch_size accumulate crop final_channels "
          "head_channels log_every", lambda x: x >= 1, "must be at least 1")
    check(args, "tol pretrain_steps weight_decay workers save_every radius_every radius_images", lambda x: x >= 0,
          "must not be negative")
    check(args, "lr", lambda x: 0 < x < math.inf, "must be positive and finite")
    check(args, "lam", lambda x: 0 < x <= 1, "must be in (0, 1]")
    check(args, "dropout", lambda x: 0 <= x < 1, "must be in [0, 1)")
    check(args, "seed", lambda x: 0 <= x < 2 ** 32, "must be in [0, 2^32)")
    check(args, "channels", lambda x: x >= 8 and x % 8 == 0, "must be multiples of 8, the groups of GroupNorm")
    branches = len(args.channels)
    refuse(branches < 2, f"--channels needs at least two branches, got {args.channels}: with one, F has no fusion")
    refuse(len(args.head_channels) != branches, f"--head-channels needs one number per branch: {branches} --channels, "
           f"{len(args.head_channels)} --head-channels")
    refuse(args.crop % 2 ** (branches + 1), f"--crop {args.crop}: the input side must be divisible by "
           f"{2 ** (branches + 1)}, as the stem and the {branches} branches halve it {branches + 1} times")
    refuse(args.crop > args.resize,
           f"--crop {args.crop} is larger than the resized image: it must be at most --resize {args.resize}")
    refuse(args.grad == "bptt" and args.solver != "fixed-point",
           "--grad bptt differentiates the plain iteration: it needs --solver fixed-point")
    refuse(args.sync_bn and (not torch.cuda.is_available() or not launched()),
           "--sync-bn needs GPUs and torchrun: torch has no synchronised BatchNorm for CPUs")
    refuse(args.radius_every and not args.radius_images, "--radius-every needs --radius-images of at least 1, got 0")
    return args


# --- data ------------------------------------------------------------------------------------------------------------

TOY_ANGLES = (10, 27.5, 45, 62.5, 80)       # degrees


def toy_image(name):
    """The image of a name SPLIT/CLASS/NUMBER, always the same: two crossing waves, at +angle and -angle, in noise.

    Ten classes, 5 angles x smooth or square waves.  Flips keep the class, random crops and colours too; phases are
    uniform, so that all classes have the same mean image and a linear classifier stays near 32 % (guessing: 10 %).
    """
    split, label, number = name.split("/")
    label, rng = int(label), torch.Generator().manual_seed(2 * int(number) + (split == "val"))

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=rng)

    height, width = torch.randint(72, 110, (2,), generator=rng).tolist()
    angle, wavelength = math.radians(TOY_ANGLES[label % 5]), uniform(9, 13)
    y, x = torch.arange(height)[:, None], torch.arange(width)
    phase = uniform(0, 1, 2)
    wave = sum(torch.cos(2 * math.pi * ((math.cos(angle) * x + sign * math.sin(angle) * y) / wavelength + p))
               for sign, p in zip((1, -1), phase))                                          # (H, W)
    wave = wave if label < 5 else wave.sign()
    colour = F.normalize(torch.randn(3, generator=rng), dim=0)
    noise = 10 * torch.randn(3, height, width, generator=rng)
    image = uniform(90, 160, 3, 1, 1) + 60 * wave * colour[:, None, None] + noise           # (3, H, W)
    return transforms.functional.to_pil_image(image.round().clamp(0, 255).to(torch.uint8))


class Images(torch.utils.data.Dataset):
    """(index, seed) -> (uint8 image (3, crop, crop), label, None), or (None, label, what is wrong with which file).

    The seed decides the random crop and flip: an image's augmentation depends on --seed, the epoch and the image, not
    on which worker reads it.  Paths are one array of bytes, which worker processes share; a list of a million strings
    would be copied into each of them, page by page, as reference counts change.
    """

    def __init__(self, samples, loader, transform):
        self.paths = np.array([os.fsencode(path) for path, _ in samples])
        self.labels = np.array([label for _, label in samples])
        self.loader, self.transform = loader, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        index, seed = key
        path, label = os.fsdecode(self.paths[index].item()), int(self.labels[index])
        try:
            image = self.loader(path)
        except Exception as error:      # PIL raises half a dozen types for a broken file
            return None, label, f"{path} ({type(error).__name__}: {error})"
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(image), label, None


def collate(items):
    """(x (n, 3, S, S) uint8, y (n,), problems): unreadable images are left out."""
    good = [(x, y) for x, y, problem in items if problem is None]
    x = torch.stack([x for x, _ in good]) if good else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    return x, torch.tensor([y for _, y in good], dtype=torch.long), [problem for *_, problem in items if problem]


class Batches(torch.utils.data.Sampler):
    """The micro-batches of this process, as lists of keys of Images, from step `step` of epoch `epoch` on.

    Which images make up which step depends on --seed and the epoch alone; processes and micro-batches divide them.
    """

    def __init__(self, n, args, process):
        self.n, self.args, self.process, self.epoch, self.step = n, args, process, 0, 0

    def __iter__(self):
        N, seed = self.args.batch_size, self.args.seed * 1_000_003 + self.epoch
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(seed))
        for step in range(self.step, self.n // N):
            own = order[step * N:(step + 1) * N].tensor_split(self.process.world_size)[self.process.rank]
            for micro_batch in own.tensor_split(self.args.accumulate):
                yield [(i, (seed * 1_000_000_007 + i) % 2 ** 32) for i in micro_batch.tolist()]


def leave_sigterm_to_parent(_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)   # a cluster sends it to all; the training process ends its workers


def end_workers():
    """Those still there when the process ends: Python would send SIGTERM, and wait for them for ever."""
    if hasattr(signal, "SIGCHLD"):                  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch's handler calls the end of a worker an error
    for worker in multiprocessing.active_children():
        worker.kill()


def image_loader(images, batches, args, device):
    atexit.register(end_workers)
    more = dict(persistent_workers=True, prefetch_factor=4, worker_init_fn=leave_sigterm_to_parent)
    return torch.utils.data.DataLoader(
        images, batch_sampler=batches, collate_fn=collate, num_workers=args.workers, pin_memory=device.type == "cuda",
        generator=torch.Generator(),        # else each epoch would draw a number from the training's own generator
        **(more if args.workers else {}))


def own_batches(n, args, process):
    """Keys of every world_size-th of n images, for evaluation: none is repeated to make the shares equal."""
    own = range(process.rank, n, process.world_size)
    each = max(1, args.batch_size // process.world_size // args.accumulate)
    return [[(j, 0) for j in own[i:i + each]] for i in range(0, len(own), each)]


def load_images(args, process):
    """(training images or None with --eval, validation images, names of the classes)."""
    crop = transforms.Compose([transforms.Resize(args.resize), transforms.CenterCrop(args.crop),
                               transforms.PILToTensor()])
    random_crop = transforms.Compose([transforms.RandomResizedCrop(args.crop, scale=(0.1, 1.0), ratio=(0.8, 1.25)),
                                      transforms.RandomHorizontalFlip(), transforms.PILToTensor()])
    splits = ("val",) if args.eval else ("train", "val")
    samples, loader, root = {}, toy_image, Path(args.data)
    if args.data == "toy":
        classes = [str(c) for c in range(10)]
        for split, n in zip(("train", "val"), (800, 200)):
            samples[split] = [(f"{split}/{i % 10}/{i}", i % 10) for i in range(n)]
    else:
        names = {}
        for split in splits:
            if not (root / split).is_dir():
                die(f"--data {root}: there is no folder {root / split}; it must hold one folder of images per class "
                    "(ImageNet's archives unpacked); --data toy needs no images")
            try:
                folder = torchvision.datasets.ImageFolder(root / split)
            except (OSError, RuntimeError) as error:
                die(f"--data {root}: {str(error).splitlines()[0]}")
            samples[split], names[split], loader = folder.samples, folder.classes, folder.loader
        classes = names["val"]
        if len(splits) == 2 and names["train"] != classes:
            a, b = set(names["train"]), set(classes)
            die(f"--data {root}: train/ and val/ must hold the same class folders; only in train: {listing(a - b)}; "
                f"only in val: {listing(b - a)}")
    for split in splits:
        if len(samples[split]) < process.world_size:
            die(f"--data {root}: {len(samples[split])} {split} image(s) for {process.world_size} processes; each needs "
                "one at least: use fewer processes (--nproc_per_node)")
    if not args.eval and len(samples["train"]) < args.batch_size:
        die(f"--batch-size {args.batch_size}: there are only {len(samples['train'])} training images")
    train_set = None if args.eval else Images(samples["train"], loader, random_crop if args.augment == "yes" else crop)
    return train_set, Images(samples["val"], loader, crop), classes


def listing(names, most=5):
    return ", ".join(sorted(names)[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"


def report(problems, args):
    """Names unreadable files, each time they are met, and stops where --on-bad-image says so."""
    for problem in problems:
        if args.on_bad_image == "stop":
            die(f"--data: cannot read the image {problem}; replace or remove it, or use --on-bad-image skip")
        tqdm.write(f"warning: left out the image {problem}", file=sys.stderr)


def memory_format(args):
    return torch.channels_last if args.memory_format == "channels-last" else torch.contiguous_format


@functools.cache
def normalisation(device):
    """Channel means and standard deviations, sent to the device once."""
    values = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device)
    return values[0, :, None, None], values[1, :, None, None]


def prepare(x, args, device):
    """uint8 (N, 3, S, S) -> normalised float32 on the device."""
    x = x.to(device, non_blocking=True)
    mean, std = normalisation(device)
    return ((x / 255.0 - mean) / std).contiguous(memory_format=memory_format(args))


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

    The state h is a tuple, branch i of shape (N, channels[i], S / 2^i, S / 2^i); S is a quarter of the image side: 56,
    28, 14, 7 for ImageNet.  F has no BatchNorm: it is the same function for every image of a batch.  Its effective
    weights and dropout masks are computed once per forward and handed to every evaluation.  Solver settings as in
    common.equilibrium.
    """

    def __init__(self, channels=(32, 64, 128, 256), head_channels=(24, 48, 96, 192), final_channels=2048,
                 num_classes=1000, dropout=0.0, groups=8, expansion=5, grad="upg", k=5, lam=0.6, solver=broyden,
                 max_iter=26, tol=0.0, stop_mode="rel_joint", backward_solver=gmres, backward_max_iter=27):
        super().__init__()
        n, c0 = len(channels), channels[0]
        self.channels, self.dropout = tuple(channels), dropout
        self.grad, self.k, self.lam = grad, k, lam
        self.solver, self.max_iter, self.tol, self.stop_mode = solver, max_iter, tol, stop_mode
        self.backward_solver, self.backward_max_iter = backward_solver, backward_max_iter

        self.stem = nn.Sequential(conv(3, c0, stride=2), nn.BatchNorm2d(c0), nn.ReLU(inplace=True),
                                  conv(c0, c0, stride=2), nn.BatchNorm2d(c0), nn.ReLU(inplace=True))
        self.injection = nn.Sequential(conv(c0, c0, 1), nn.BatchNorm2d(c0), nn.ReLU(inplace=True))

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

    def inject(self, x):
        """u = M(x): the stem's output for the finest branch, zeros (without memory of their own) for the others."""
        divisor = 2 ** (len(self.channels) + 1)
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
def evaluate(model, loader, args, process):
    """Top-1, top-5 (%), loss and the solver's health over all images, each counted once, by the solver alone."""
    model.eval()
    sums, residuals = torch.zeros(3, dtype=torch.float64, device=process.device), []
    count = evals = unreadable = 0
    for x, y, problems in tqdm(loader, desc="evaluating", leave=False,
                               disable=process.rank > 0 or not sys.stderr.isatty()):
        report(problems, args)
        unreadable += len(problems)
        if len(y) == 0:
            continue
        x, y = prepare(x, args, process.device), y.to(process.device, non_blocking=True)
        with autocast(args, process.device):
            logits, result = model(x, with_result=True)
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]               # (n, 5)
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), F.cross_entropy(logits, y, reduction="sum")])
        residuals.append(result.residual)
        count += len(y)
        evals += len(y) * result.n_evals
    model.train()
    if count == 0:
        die(f"--data {args.data}: not one of this process's validation images could be read")
    counts = torch.tensor([count, unreadable, evals], dtype=torch.float64, device=process.device)
    top1, top5, loss, total, missing, evals = all_reduce_sum(torch.cat([sums, counts])).tolist()
    return {"val_top1": 100 * top1 / total, "val_top5": 100 * top5 / total, "val_loss": loss / total,
            "val_images": int(total), "val_unreadable": int(missing), "val_evals": evals / total,
            **health("val", residuals, args.tol)}


@torch.no_grad()
def radii(model, images, args, process):
    """App. D.3: spectral radius of J and of lam J + (1 - lam) I at h* of validation images, evaluation mode; no trace.

    Means over --radius-images images, and the share of them where that of J exceeds 1; each process does its part.
    """
    rng = rng_state()
    model.eval()
    spread = range(0, len(images), max(1, len(images) // args.radius_images))[:args.radius_images]
    own, n = spread[process.rank::process.world_size], max(1, args.batch_size // process.world_size // args.accumulate)
    sums = torch.zeros(4, dtype=torch.float64, device=process.device)
    for i in range(0, len(own), n):                             # all classes: the images are sorted by class
        x, _, problems = collate([images[j, 0] for j in own[i:i + n]])
        report(problems, args)
        if len(x) == 0:
            continue
        x = prepare(x, args, process.device)
        with autocast(args, x.device):
            u = model.inject(x)
            f = functools.partial(model.f, u=u, weights=model.weights())
            h = model.solver(f, model.zeros(u), max_iter=model.max_iter, tol=model.tol, stop_mode=model.stop_mode).h
            rho, rho_lam = (spectral_radius(f, h, lam=value, n_iter=50) for value in (1.0, args.lam))
        sums += torch.stack([rho.sum(), rho_lam.sum(), (rho > 1).sum(), torch.ones_like(rho).sum()])
    model.train()
    set_rng_state(rng)
    rho, rho_lam, above, count = all_reduce_sum(sums).tolist()
    if count == 0:
        die(f"--data {args.data}: not one of the --radius-images could be read")
    return {"rho_J": rho / count, "rho_J_lam": rho_lam / count, "rho_J_above_1": above / count}


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
    model = MDEQ(args.channels, args.head_channels, args.final_channels, classes, args.dropout, grad=args.grad,
                 k=args.k, lam=args.lam, solver=SOLVERS[args.solver], max_iter=args.max_iter, tol=args.tol,
                 backward_solver=BACKWARD_SOLVERS[args.backward_solver], backward_max_iter=args.backward_max_iter)
    model = model.to(process.device, memory_format=memory_format(args))
    # A 1 x 1 kernel is in both formats.  With other strides than its gradient's, DistributedDataParallel copies it.
    for p in model.parameters():
        if p.dim() == 4 and p[0, 0].numel() == 1:
            p.data = p.data.flatten().view(p.shape)
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


MISFIT = "{} {} does not fit the model (--channels, --head-channels, --final-channels, classes of --data)"


def initialise(args, model):
    """--init: the weights of a checkpoint, and a new classifier where its number of classes is another one."""
    state = load_checkpoint(args.init, flag="--init")
    if is_ours(state):
        check_same_run(args.init, state["args"], args, free=vars(args), flag="--init")      # of this script at all?
    weights = {}
    if isinstance(state, dict):
        weights = state.get("model", {}) if is_ours(state) else state.get("state_dict", state)
    own = model.state_dict()
    for key in list(weights):
        name = str(key).removeprefix("module.")
        if name in ("classifier.weight", "classifier.bias") and torch.is_tensor(weights[key]) and (
                len(weights[key]) != len(own[name])):
            print(f"note: --init has {len(weights[key])} classes, --data {len(own[name])}: new {name}", flush=True)
            weights[key] = own[name]
    load_weights(model, state, load_official, MISFIT.format("--init", args.init))


def restore(args, model, classes, train_images=None, optimizer=None, scheduler=None):
    """Loads --resume into the model, and in training all the rest of the state.  Returns what was read."""
    state = load_checkpoint(args.resume)
    ours = is_ours(state)
    if not ours and not args.eval:
        die(f"--resume {args.resume} was not written by this script: an official checkpoint can be evaluated (--eval), "
            "or begun with (--init)")
    if ours:
        free = {"data", "out", "resume", "init", "eval", "benchmark", "workers", "on_bad_image", "save_every",
                "log_every", "radius_every", "radius_images", "compile", "cuda_graph", "memory_format"}
        if args.eval:
            free |= set(vars(args)) - {"channels", "head_channels", "final_channels"}
            note_differences(state["args"], args, "solver max_iter tol crop resize")
        check_same_run(args.resume, state["args"], args, free)
        if state.get("classes") != classes:
            die(f"--resume {args.resume} is of a run with other classes than --data {args.data} has")
        if not args.eval and state["images"] != train_images:
            die(f"--resume {args.resume} is of a run with {state['images']} training images, --data {args.data} has "
                f"{train_images}: their order would be another one")
    load_weights(model, state, load_official, MISFIT.format("--resume", args.resume))
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
    return state


def train(args, process, model, train_set, val_set, classes):
    device, rank, world = process.device, process.rank, process.world_size
    main = rank == 0
    checkpoint, args.resume = open_run(args.out, args.resume)
    steps_per_epoch = len(train_set) // args.batch_size
    steps = args.epochs * steps_per_epoch
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=True,
                                weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=1e-6)
    state = {"step": 0, "evaluated": 0, "best": 0.0, "best_epoch": 0, "last": 0.0, "seconds": 0.0}
    if args.resume:
        state = restore(args, model, classes, len(train_set), optimizer, scheduler)
    elif args.init:
        initialise(args, model)
    step, evaluated, best, best_epoch, last = (state[k] for k in ("step", "evaluated", "best", "best_epoch", "last"))
    # Before the seeds are set and DistributedDataParallel comes: it draws an example, and captures the bare model.
    training = net = training_pass(args, model, args.batch_size // (world * args.accumulate), args.crop, device)
    seed_everything(args.seed + rank)
    if args.resume:
        set_rng_states(state["rng"], process)
    if world > 1:       # BatchNorm statistics are those of the first process, sent to the others where they are needed
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")      # its successor is too new for 2.6
        net = DistributedDataParallel(training, device_ids=[device.index] if device.type == "cuda" else None,
                                      broadcast_buffers=False, gradient_as_bucket_view=True)
    batches = Batches(len(train_set), args, process)
    train_loader = image_loader(train_set, batches, args, device)
    val_loader = image_loader(val_set, own_batches(len(val_set), args, process), args, device)
    timer = SaveTimer(args.save_every)
    parameters = sum(p.numel() for p in model.parameters())
    log = start_log(args, process, step, parameters, f"{parameters:,} parameters; {len(train_set)} training and "
                    f"{len(val_set)} validation images of {len(classes)} classes; {args.epochs} epochs of "
                    f"{steps_per_epoch} steps", last_step_of={"epoch": evaluated}, steps=steps)

    def share_statistics():
        """BatchNorm's, of the first process, for whatever uses the model in evaluation mode."""
        for buffer in model.buffers() if world > 1 else ():
            torch.distributed.broadcast(buffer, 0)

    def save():
        rng = rng_states()                                  # all processes take part
        if main:
            save_checkpoint(checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                         "scheduler": scheduler.state_dict(), "rng": rng, "step": step,
                                         "evaluated": evaluated, "best": best, "best_epoch": best_epoch, "last": last,
                                         "classes": classes, "images": len(train_set), "args": vars(args),
                                         "seconds": time.perf_counter() - started})

    meter, residuals, backward_residuals, waited = Meter(device), [], [], 0.0
    started = time.perf_counter() - state["seconds"]
    stop = False
    # Evaluation comes first: a run that was cut off in one finds its checkpoint at the end of that epoch.
    while not stop and (step < steps or evaluated < step):
        if step > evaluated and step % steps_per_epoch == 0:        # an epoch has ended, maybe in the run before this
            share_statistics()
            with timer.saved():
                record = evaluate(model, val_loader, args, process)
            epoch, evaluated, last = step // steps_per_epoch, step, record["val_top1"]
            if last > best:
                best, best_epoch = last, epoch
            for name, found in (("train", residuals), ("backward", backward_residuals)):
                record.update(health(name, found, args.tol))
                found.clear()
            if main:
                log.write(event="epoch", step=step, epoch=epoch, best_top1=best, best_epoch=best_epoch,
                          seconds=time.perf_counter() - started, **record)
                tqdm.write(f"epoch {epoch}: top-1 {last:.2f} %, top-5 {record['val_top5']:.2f} % of "
                           f"{record['val_images']} images, best top-1 {best:.2f} % (epoch {best_epoch}), loss "
                           f"{record['val_loss']:.4f}")
                tqdm.write(f"  {spell_health(record, 'train', 'val', 'backward')}; {record['val_evals']:g} calls of F "
                           "per solve")
            save()
            continue

        batches.epoch, batches.step = divmod(step, steps_per_epoch)
        meter.reset()
        micro_batches = iter(train_loader)
        for b in tqdm(range(batches.step, steps_per_epoch), desc=f"epoch {batches.epoch + 1}", leave=False,
                      disable=not (main and sys.stderr.isatty())):
            unroll = args.pretrain_layers if step < args.pretrain_steps else 0
            for i in range(args.accumulate):
                asked = time.perf_counter()
                x, y, problems = next(micro_batches)
                waited += time.perf_counter() - asked
                report(problems, args)
                if len(y) == 0:
                    die("--data: not one image of a batch could be read")
                x, y = prepare(x, args, device), y.to(device, non_blocking=True)
                reduce = world == 1 or i == args.accumulate - 1         # gradients meet once per step
                with contextlib.nullcontext() if reduce else net.no_sync():
                    with autocast(args, device):
                        logits, residual = net(x, unroll=unroll) if unroll else net(x)
                    loss = F.cross_entropy(logits.float(), y)
                    (loss / args.accumulate).backward()
                meter.add(len(y), loss=loss, accuracy=100 * (logits.argmax(1) == y).float().mean())
                if residual is not None:                    # copies: the next step may overwrite them
                    residuals.append(residual.detach().clone())
                    if args.grad == "implicit":
                        backward_residuals.append(training.backward_residual[:len(y)].clone())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            lr = scheduler.get_last_lr()[0]                 # of this step
            scheduler.step()
            step += 1

            # --- the step ends here; what follows is logging, diagnostics and saving ---
            saving, stop = timer.poll()
            saving = saving or b == steps_per_epoch - 1             # before the evaluation, which may take long
            if args.radius_every and step % args.radius_every == 0:
                paused = clock(device)
                share_statistics()
                radius = radii(model, val_set, args, process)
                if main:
                    log.write(event="radius", step=step, **radius)
                    tqdm.write(f"step {step}: spectral radius of J {radius['rho_J']:.3f}, of J_lam "
                               f"{radius['rho_J_lam']:.3f}")
                meter.start += clock(device) - paused         # diagnostics do not count as training time
            if step % args.log_every == 0 or saving:
                elapsed = time.perf_counter() - meter.start
                record = meter.read()                                   # host sync
                record["ms_per_step"] *= args.accumulate
                record["data_wait"], waited = waited / elapsed, 0.0
                broken = what_broke(record["loss"], model.parameters() if saving else ())
                if broken:
                    kept = f"the last good state is {checkpoint}" if checkpoint.exists() else "nothing was saved yet"
                    die(f"{broken} by step {step}: try a lower --lr or --lam; {kept}", code=1)
                if main:
                    log.write(event="train", step=step, epoch=batches.epoch + 1, lr=lr,
                              seconds=time.perf_counter() - started, **record)
                    gb = f"  {record['peak_gb']:.2f} GB" if "peak_gb" in record else ""
                    tqdm.write(f"step {step:6d}  epoch {batches.epoch + 1:3d}  loss {record['loss']:.4f}  accuracy "
                               f"{record['accuracy']:5.2f} %  lr {lr:.5f}  {record['ms_per_step']:.0f} ms/step  "
                               f"{record['samples_per_s']:.0f} images/s  {100 * record['data_wait']:.0f} % "
                               f"waiting for data{gb}")
            if saving:
                save()
                meter.reset()
            if stop:
                break
    if main and stop:
        print(f"SIGTERM: saved after step {step} to {checkpoint}; continue with the same command, --out {args.out} and "
              "--resume auto", flush=True)
    elif main:
        print(f"done: top-1 {last:.2f} % after the last epoch; best epoch {best:.2f} % (epoch {best_epoch}; chosen on "
              f"the validation images); {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)


# --- main ------------------------------------------------------------------------------------------------------------

def main(args):
    line_by_line()
    process = init_process()
    choose_out(args, f"imagenet-{args.grad}")
    if args.batch_size % (process.world_size * args.accumulate):
        die(f"--batch-size {args.batch_size} is not divisible by {process.world_size} process(es) x --accumulate "
            f"{args.accumulate}")
    torch.backends.cudnn.allow_tf32 = not args.no_tf32      # convolutions; the solver's own products stay in float32
    torch.backends.cudnn.benchmark = True
    seed_everything(args.seed)          # the same weights on all processes
    if args.benchmark:
        x = torch.randint(0, 256, (args.batch_size, 3, args.crop, args.crop), dtype=torch.uint8)
        y = torch.arange(args.batch_size, device=process.device) % 1000
        benchmark(build_model(args, 1000, process), prepare(x, args, process.device), y, args)
        return
    train_set, val_set, classes = load_images(args, process)
    model = build_model(args, len(classes), process)
    if args.eval:
        restore(args, model, classes)
        if process.rank == 0:
            print(f"{args.resume}: {args.solver}, at most {args.max_iter} steps, tolerance {args.tol:g}; "
                  f"{len(val_set)} images", flush=True)
        loader = image_loader(val_set, own_batches(len(val_set), args, process), args, process.device)
        record = evaluate(model, loader, args, process)
        if args.radius_images:
            record.update(radii(model, val_set, args, process))
        if process.rank == 0:
            print(f"top-1 {record['val_top1']:.2f} %, top-5 {record['val_top5']:.2f} %, loss "
                  f"{record['val_loss']:.4f}, {record['val_images']} images, {record['val_unreadable']} unreadable\n"
                  f"{spell_health(record, 'val')}; {record['val_evals']:g} calls of F per solve")
            if args.radius_images:
                print(f"spectral radius of J {record['rho_J']:.3f} (above 1 for {100 * record['rho_J_above_1']:.0f} % "
                      f"of the images), of J_lam {record['rho_J_lam']:.3f} (lam = {args.lam})")
    else:
        train(args, process, model, train_set, val_set, classes)
    if process.world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
