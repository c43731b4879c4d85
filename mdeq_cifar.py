"""MDEQ on CIFAR-10 with phantom gradients: "On Training Implicit Models" (NeurIPS 2021, arXiv:2111.05177), Tables 1 and 3, Figs. 2 and 3.

    python mdeq_cifar.py                                                # Table 1, row 6: Tiny, UPG A_{5,0.5}; downloads CIFAR-10 to ./data
    python mdeq_cifar.py --data toy                                     # generated images, two CPU cores, a few minutes
    torchrun --nproc_per_node=4 mdeq_cifar.py --model large             # Table 3: Large, UPG A_{5,0.5}, augmentation, 220 epochs
    python mdeq_cifar.py --benchmark                                    # step time and memory of implicit, UPG, NPG
    python mdeq_cifar.py --eval --resume FILE                           # our checkpoints and the official ones

Table 1 (Tiny, 50 epochs, batch 128, no augmentation), paper's accuracy in %, every row a command; OLD is the recipe of rows 1-5:
    OLD="--grad implicit --optimizer adam --dropout 0.25"
    1  85.0 +- 0.2   python mdeq_cifar.py $OLD --pretrain-steps 3000
    2  82.3 +- 1.3   python mdeq_cifar.py $OLD
    3  83.7 +- 0.1   python mdeq_cifar.py $OLD --pretrain-steps 3000 --dropout 0
    4  84.5 +- 0.3   python mdeq_cifar.py $OLD --pretrain-steps 3000 --optimizer sgd
    5  82.9 +- 1.5   python mdeq_cifar.py $OLD --optimizer sgd
    6  85.8 +- 0.5   python mdeq_cifar.py
    7  85.6 +- 0.5   python mdeq_cifar.py --grad npg
    8  86.1 +- 0.5   python mdeq_cifar.py --k 9 --dropout 0.25
Table 3 (Large, 220 epochs, batch 128, augmentation):
    93.8 +- 0.17     python mdeq_cifar.py --model large --grad implicit --optimizer adam --weight-decay 0 --dropout 0.3 --pretrain-steps 20000
    95.0 +- 0.16     python mdeq_cifar.py --model large
Fig. 2: add --cosine-every 500 to row 1.  Fig. 3: rows 6 and 7 over --k and --lam.  App. D.2: --radius-every 500.

Differs from the paper: residuals, and the choice of the best iterate, per image (the official release: one norm over the batch); the first
Broyden step has the right sign; NPG follows Eq. (17), not Algorithms 2 and 3; BatchNorm sees the whole batch of a process (official: 2 x 64,
Large 4 x 32).  Initialisation as in the official CIFAR-10 code: Normal(0, 0.01) for plain convolutions, PyTorch's for weight-normalised ones.
"""
import argparse
import hashlib
import math
import os
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

# Large CPU allocations then come as 2 MB pages: F of Tiny at batch 128 runs 1.05 to 1.4 times faster on 2 cores.  Must precede torch.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from tqdm import tqdm

from common import (MetricsLog, Meter, all_reduce_sum, anderson, broyden, cosine_similarity, describe_run, die, equilibrium, fixed_point,
                    init_process, load_checkpoint, peak_memory, reset_peak_memory, rng_states, save_checkpoint, seed_everything,
                    set_rng_state, spectral_radius, upg)

SOLVERS = {"broyden": broyden, "anderson": anderson, "fixed-point": fixed_point}

# Official configurations; the budgets are steps of the forward and of the implicit baseline's backward solver.
MODELS = {
    "tiny": dict(channels=(24, 24), head_channels=(8, 16), final_channels=200, max_iter=22, backward_max_iter=24, epochs=50, augment="no"),
    "large": dict(channels=(32, 64, 128, 256), head_channels=(14, 28, 56, 112), final_channels=1680, max_iter=18, backward_max_iter=20,
                  epochs=220, augment="yes"),
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Train an MDEQ on CIFAR-10.  No flags: the paper's UPG A_{5,0.5} row for Tiny.")
    # data
    p.add_argument("--data", default="data", help="folder of CIFAR-10 (downloaded if absent), or with train/CLASS/* and test/CLASS/*; or 'toy': "
                   "generated 16 x 16 images, and then 6 epochs of 2000 in batches of 50, unless said otherwise (default data)")
    p.add_argument("--train-size", type=int, help="train on the first so many images, equally many of each class (default all)")
    p.add_argument("--test-size", type=int, help="the same for the test images (default all)")
    p.add_argument("--augment", choices=["yes", "no"], help="random crop after padding by 4, and horizontal flip (default tiny no, large yes)")
    # model
    p.add_argument("--model", choices=list(MODELS), default="tiny", help="158,986 or 11,098,398 parameters (default tiny)")
    p.add_argument("--dropout", type=float, default=0.0, help="probability of variational dropout in F (default 0)")
    # equilibrium
    p.add_argument("--grad", choices=["upg", "npg", "implicit", "bptt"], default="upg", help="how the gradient is computed (default upg)")
    p.add_argument("--k", type=int, default=5, help="steps of the phantom gradient (default 5)")
    p.add_argument("--lam", type=float, default=0.5, help="damping of the phantom gradient, in (0, 1] (default 0.5)")
    p.add_argument("--solver", choices=list(SOLVERS), default="broyden", help="forward and backward solver (default broyden)")
    p.add_argument("--max-iter", type=int, help="steps of the forward solver (default tiny 22, large 18)")
    p.add_argument("--backward-max-iter", type=int, help="steps of the backward solver of --grad implicit (default tiny 24, large 20)")
    p.add_argument("--tol", type=float, default=0.0, help="relative residual at which an image counts as solved; 0: always the whole budget (default 0)")
    p.add_argument("--pretrain-steps", type=int, default=0, help="optimiser steps with an unrolled network in place of the solver (default 0)")
    p.add_argument("--pretrain-layers", type=int, default=10, help="evaluations of F in that network (default 10)")
    # optimisation
    p.add_argument("--epochs", type=int, help="passes over the training images (default tiny 50, large 220, toy 6)")
    p.add_argument("--batch-size", type=int, help="images per step over all processes (default 128, toy 50)")
    p.add_argument("--optimizer", choices=["sgd", "adam"], default="sgd", help="SGD with momentum 0.9, or Adam (default sgd)")
    p.add_argument("--lr", type=float, help="initial learning rate, cosine to 1e-6 over all steps (default sgd 0.1, adam 0.001)")
    p.add_argument("--weight-decay", type=float, help="L2 penalty on every parameter (default sgd 1e-4, adam 2.5e-6)")
    p.add_argument("--seed", type=int, default=0, help="of weights, data order, augmentation and dropout (default 0)")
    # speed
    p.add_argument("--amp", action="store_true", help="bf16 autocast; the solver's own vectors stay float32")
    p.add_argument("--compile", action="store_true", help="torch.compile F and the head")
    p.add_argument("--memory-format", choices=["contiguous", "channels-last"], help="of images, weights and states (default: channels-last on a CPU)")
    p.add_argument("--sync-bn", action="store_true", help="BatchNorm statistics over all processes (GPUs only)")
    # run
    p.add_argument("--out", help="folder of checkpoint.pt and metrics.jsonl (default runs/MODEL-GRAD-TIME)")
    p.add_argument("--resume", metavar="FILE", help="continue from this checkpoint; 'auto': from --out's, if there is one")
    p.add_argument("--save-every", type=int, default=500, help="steps between checkpoints; one more after every epoch (default 500)")
    p.add_argument("--log-every", type=int, default=50, help="steps between log lines (default 50)")
    p.add_argument("--cosine-every", type=int, default=0, help="steps between cosines of UPG and NPG to the exact gradient (Fig. 2); 0: never")
    p.add_argument("--radius-every", type=int, default=0, help="steps between spectral radii of J and J_lam on 64 test images (D.2); 0: never")
    p.add_argument("--eval", action="store_true", help="only evaluate the checkpoint of --resume, ours or an official one")
    p.add_argument("--benchmark", action="store_true", help="only measure step time, memory and solver overhead of implicit, UPG and NPG")
    args = p.parse_args(argv)

    toy, adam = args.data == "toy", args.optimizer == "adam"
    defaults = {"max_iter": MODELS[args.model]["max_iter"], "backward_max_iter": MODELS[args.model]["backward_max_iter"],
                "augment": "no" if toy else MODELS[args.model]["augment"], "epochs": 6 if toy else MODELS[args.model]["epochs"],
                "batch_size": 50 if toy else 128, "lr": 1e-3 if adam else 0.1, "weight_decay": 2.5e-6 if adam else 1e-4,
                "memory_format": "contiguous" if torch.cuda.is_available() else "channels-last"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("k", "max_iter", "backward_max_iter", "pretrain_layers", "epochs", "batch_size", "save_every", "log_every"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("tol", "pretrain_steps", "weight_decay", "cosine_every", "radius_every"):
        if getattr(args, name) < 0:
            p.error(f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}")
    if not 0 < args.lam <= 1:
        p.error(f"--lam must be in (0, 1], got {args.lam}")
    if not 0 <= args.dropout < 1:
        p.error(f"--dropout must be in [0, 1), got {args.dropout}")
    if args.grad == "bptt" and args.solver != "fixed-point":
        p.error("--grad bptt differentiates the plain iteration: it needs --solver fixed-point")
    if args.sync_bn and (not torch.cuda.is_available() or "RANK" not in os.environ):
        p.error("--sync-bn needs GPUs and torchrun: torch has no synchronised BatchNorm for CPUs")
    if args.eval and not args.resume:
        p.error("--eval needs --resume FILE, the checkpoint to evaluate")
    if args.resume == "auto" and not args.out:
        p.error("--resume auto needs --out DIR, the folder to look in")
    return args


# --- data: all images as uint8 on the device ---------------------------------------------------------------------------------------------

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
    wave = torch.cos(2 * torch.pi * frequency[:, None, None] * (dx * angle.cos()[:, None, None] + dy * angle.sin()[:, None, None])
                     + uniform(0, 2 * torch.pi, 1, 1))
    wave = wave * torch.exp(-(dx ** 2 + dy ** 2) / (2 * (size / 4) ** 2))       # (N, S, S)
    colour = F.normalize(torch.randn(n, 3, generator=rng), dim=1)[:, :, None, None]
    x = uniform(90, 160, 3, 1, 1) + uniform(60, 120, 1, 1, 1) * colour * wave[:, None] + 20 * torch.randn(n, 3, size, size, generator=rng)
    return Images(x.round().clamp(0, 255).to(torch.uint8), y, 10)


def folder_images(root, split):
    """Decodes root/split/CLASS/* once; the result is cached in root, under the fingerprint of the files' names, sizes and times."""
    try:
        folder = torchvision.datasets.ImageFolder(root / split)
    except FileNotFoundError as error:
        die(f"--data {root}: {error}")
    stats = [(path, os.stat(path)) for path, _ in folder.samples]
    fingerprint = hashlib.sha1(repr([(p, s.st_size, s.st_mtime_ns) for p, s in stats]).encode()).hexdigest()[:16]
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
            die(f"--data: {path} is {image.shape[2]} x {image.shape[1]} pixels, CIFAR-10 images are 32 x 32; replace or remove it")
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
    """(train, test) on the device.  The first process downloads and decodes while the others wait."""
    if process.world_size > 1 and process.rank > 0:
        torch.distributed.barrier()
    root = Path(args.data)
    if args.data == "toy":
        train, test = toy_images(args.train_size or 2000, seed=1), toy_images(args.test_size or 1000, seed=2)
    elif (root / "train").is_dir() or (root / "test").is_dir():
        classes = [sorted(d.name for d in (root / s).iterdir() if d.is_dir()) if (root / s).is_dir() else [] for s in ("train", "test")]
        if not classes[0] or classes[0] != classes[1]:
            die(f"--data {root}: train/ and test/ must hold the same class folders; only in train: {sorted(set(classes[0]) - set(classes[1]))}, "
                f"only in test: {sorted(set(classes[1]) - set(classes[0]))}")
        train, test = folder_images(root, "train"), folder_images(root, "test")
    else:
        try:
            sets = [torchvision.datasets.CIFAR10(str(root), train=split, download=True) for split in (True, False)]
        except (OSError, RuntimeError, EOFError) as error:
            die(f"--data {root}: no CIFAR-10 there, and the download failed ({error}); give a folder that has it, or --data toy")
        train, test = (Images(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets), 10) for s in sets)
    if process.world_size > 1 and process.rank == 0:
        torch.distributed.barrier()
    train, test = balanced(train, args.train_size, "--train-size"), balanced(test, args.test_size, "--test-size")
    return tuple(Images(s.x.to(process.device), s.y.to(process.device), s.classes) for s in (train, test))


def balanced(images, size, flag):
    """The first size / classes images of each class."""
    if size is None:
        return images
    each = size // images.classes
    if size < 1 or size % images.classes or each > images.y.bincount(minlength=images.classes).min():
        die(f"{flag} {size}: must be a multiple of {images.classes}, the number of classes, and at most {len(images.y)}")
    index = torch.cat([(images.y == c).nonzero()[:each, 0] for c in range(images.classes)])
    return Images(images.x[index], images.y[index], images.classes)


def prepare(x, augment, memory_format):
    """uint8 (N, 3, S, S) -> normalised float32 of the same shape, on the device; `augment` pads by 4 with black, crops and flips."""
    if augment:
        N, _, S, _ = x.shape
        x = F.pad(x, (4, 4, 4, 4))
        offset = torch.randint(0, 9, (2, N, 1), device=x.device) + torch.arange(S, device=x.device)     # (2, N, S) rows, columns
        flip = torch.rand(N, 1, device=x.device) < 0.5
        columns = torch.where(flip, offset[1].flip(1), offset[1])
        n = torch.arange(N, device=x.device)[:, None, None]
        x = x.permute(0, 2, 3, 1)[n, offset[0][:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    mean = torch.tensor((0.4914, 0.4822, 0.4465), device=x.device)[:, None, None]
    std = torch.tensor((0.2023, 0.1994, 0.2010), device=x.device)[:, None, None]
    return ((x / 255.0 - mean) / std).contiguous(memory_format=memory_format)


# --- model -------------------------------------------------------------------------------------------------------------------------------

def conv(c_in, c_out, size=3, stride=1, bias=False):
    return nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, bias=bias)


class ResidualBlock(nn.Module):
    """y = GN(ReLU(GN(drop(conv(ReLU(GN(conv(h))))) + u) + h)): the injection comes before the second norm, the shortcut after it."""

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
    """T_{j->i}.  Down: stride-2 stages with ReLU between, not after them.  Up: 1x1 convolution; the caller upsamples last, which is cheaper."""
    if steps_down < 0:
        return nn.Sequential(conv(c_from, c_to, 1), nn.GroupNorm(groups, c_to))
    layers = []
    for stage in range(steps_down):
        c = c_to if stage == steps_down - 1 else c_from
        layers += [conv(c_from, c, stride=2), nn.GroupNorm(groups, c), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class MDEQ(nn.Module):
    """Multiscale deep equilibrium classifier: logits = G(h*), h* = F(h*, u), u = M(x).

    The state h is a tuple, branch i of shape (N, channels[i], S / 2^i, S / 2^i); S is the side of the images after the stem's strides.
    F has no BatchNorm, so it is the same function for every image of a batch; its effective weights and dropout masks are computed once
    per forward and handed to every evaluation.
    """

    def __init__(self, channels=(24, 24), head_channels=(8, 16), final_channels=200, num_classes=10, dropout=0.0, stem_strides=0,
                 groups=8, expansion=5, grad="upg", k=5, lam=0.5, solver=broyden, max_iter=22, tol=0.0, stop_mode="rel",
                 backward_max_iter=24):
        super().__init__()
        n, c0 = len(channels), channels[0]
        self.channels, self.dropout, self.stem_strides = tuple(channels), dropout, stem_strides
        self.grad, self.k, self.lam = grad, k, lam
        self.solver, self.max_iter, self.tol, self.stop_mode, self.backward_max_iter = solver, max_iter, tol, stop_mode, backward_max_iter

        self.stem = nn.Sequential(conv(3, c0, stride=2 if stem_strides >= 1 else 1), nn.BatchNorm2d(c0), nn.ReLU(inplace=True),
                                  conv(c0, c0, stride=2 if stem_strides >= 2 else 1), nn.BatchNorm2d(c0), nn.ReLU(inplace=True))
        self.injection = (nn.Identity() if stem_strides == 0 and n <= 2 else
                          nn.Sequential(conv(c0, c0, 1), nn.BatchNorm2d(c0), nn.ReLU(inplace=True)))

        self.blocks = nn.ModuleList(ResidualBlock(c, groups, expansion) for c in channels)
        self.fuse = nn.ModuleList(nn.ModuleList(nn.Identity() if i == j else fusion(channels[j], channels[i], groups, i - j)
                                                for j in range(n)) for i in range(n))
        self.post = nn.ModuleList(weight_norm(conv(c, c, 1)) for c in channels)
        self.post_gn = nn.ModuleList(nn.GroupNorm(groups // 2, c) for c in channels)

        wide = [4 * p for p in head_channels]
        self.bottlenecks = nn.ModuleList(Bottleneck(c, p) for c, p in zip(channels, head_channels))
        self.down = nn.ModuleList(nn.Sequential(conv(a, b, stride=2, bias=True), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
                                  for a, b in zip(wide, wide[1:]))
        self.final = nn.Sequential(conv(wide[-1], final_channels, 1, bias=True), nn.BatchNorm2d(final_channels), nn.ReLU(inplace=True))
        self.classifier = nn.Linear(final_channels, num_classes)

        for module in self.modules():       # weight-normalised convolutions keep PyTorch's default: the official initialisation never reaches them
            if isinstance(module, nn.Conv2d) and not nn.utils.parametrize.is_parametrized(module):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.01)

    def inject(self, x):
        """u = M(x): the stem's output for the finest branch, zeros (without memory of their own) for the others."""
        divisor = 2 ** (self.stem_strides + len(self.channels) - 1)
        if x.shape[-1] % divisor or x.shape[-2] % divisor:
            raise ValueError(f"image sides must be divisible by {divisor} for {len(self.channels)} branches, got {tuple(x.shape[-2:])}")
        u = self.injection(self.stem(x))
        N, _, H, W = u.shape
        return (u, *(u.new_zeros(1).expand(N, c, H >> i, W >> i) for i, c in enumerate(self.channels[1:], start=1)))

    def weights(self):
        """Effective weights g v / ||v|| of the weight-normalised convolutions, per branch (block 1, block 2, post-fusion), with the graph on."""
        weights = [[block.conv1.weight, block.conv2.weight, post.weight] for block, post in zip(self.blocks, self.post)]
        device = weights[0][0].device.type
        if torch.is_autocast_enabled(device):       # cast once per forward; autocast itself would cast at every evaluation
            weights = [[w.to(torch.get_autocast_dtype(device)) for w in branch] for branch in weights]
        if self.stem[0].weight.is_contiguous(memory_format=torch.channels_last):
            weights = [[w.contiguous(memory_format=torch.channels_last) for w in branch] for branch in weights]
        return weights

    def masks(self, h):
        """Variational dropout: one mask (N, C_i, 1, 1) per branch, the same for all evaluations of F in a forward; None when inactive."""
        if not self.training or self.dropout == 0:
            return [None] * len(h)
        return [torch.bernoulli(p.new_full((p.shape[0], p.shape[1], 1, 1), 1 - self.dropout)) / (1 - self.dropout) for p in h]

    def f(self, h, u, weights=None, masks=None):
        """The equilibrium module F(h, u): one residual block per branch, fusion of all branches, a convolution per branch."""
        weights = weights or self.weights()
        masks = masks or [None] * len(h)
        y = [block(hi, ui, w[0], w[1], mask) for block, hi, ui, w, mask in zip(self.blocks, h, u, weights, masks)]
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
        """Logits (N, classes) of x (N, 3, S, S); with_result: and the solver's result.  unroll > 0: the pretraining network of so many layers.

        on_backward is called with the result of the backward solve of grad="implicit".
        """
        u = self.inject(x)
        channels_last = u[0].is_contiguous(memory_format=torch.channels_last) and not u[0].is_contiguous()
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        h0 = tuple(torch.zeros_like(ui, dtype=x.dtype, memory_format=memory_format) for ui in u)     # not u's dtype: bf16 under autocast
        f = partial(self.f, u=u, weights=self.weights(), masks=self.masks(h0))
        if unroll:
            h, result = upg(f, h0, k=unroll, lam=1.0), None
        else:
            h, result = equilibrium(f, h0, grad=self.grad, k=self.k, lam=self.lam, solver=self.solver, max_iter=self.max_iter, tol=self.tol,
                                    stop_mode=self.stop_mode, backward_solver=self.solver, backward_max_iter=self.backward_max_iter,
                                    backward_tol=self.tol, on_backward=on_backward)
        logits = self.head(h)
        return (logits, result) if with_result else logits


def load_official(model, state_dict):
    """Loads a state dict of the official releases: phantom_grad, locuslab/mdeq, locuslab/deq (MDEQ-Vision), torchdeq's zoo.

    Strict: ValueError names keys that are unknown, missing or of another shape.  Known aliases of the same tensors are dropped, a plain weight
    where we keep (g, v) becomes v = W, g = ||W||, a (g, v) pair where ours is plain becomes g v / ||v||; both give the same F.
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
        if key.startswith(("deq.func.", "deq.func_copy.", "fullstage_copy.")):      # the same tensors under a second name, or a frozen copy
            continue
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        found[key] = value

    own = model.state_dict()
    for key in [k for k in found if k.endswith(".weight_g")]:
        stem, g, v = key.removesuffix("_g"), found.pop(key), found.pop(key.removesuffix("g") + "v")
        name = stem.removesuffix("weight") + "parametrizations.weight.original"
        if name + "0" in own:
            found[name + "0"], found[name + "1"] = g, v
        else:
            found[stem] = g * v / v.norm(dim=(1, 2, 3), keepdim=True)
    for name in [k.removesuffix("original0") for k in own if k.endswith("original0")]:
        plain = name.replace("parametrizations.weight.", "weight")
        if plain in found:
            found[name + "original1"] = found.pop(plain)
            found[name + "original0"] = found[name + "original1"].norm(dim=(1, 2, 3), keepdim=True)
    if not any(k.startswith("post_gn.") for k in found):                            # locuslab/deq: this norm has no affine parameters
        found.update({k: torch.full_like(v, k.endswith("weight")) for k, v in own.items() if k.startswith("post_gn.")})

    problems = [f"unknown {k}" for k in found if k not in own] + [f"missing {k}" for k in own if k not in found]
    problems += [f"{k} is {tuple(found[k].shape)} instead of {tuple(own[k].shape)}" for k in own if k in found and found[k].shape != own[k].shape]
    if problems:
        raise ValueError(f"not a checkpoint of this model: {'; '.join(problems[:5])}{' ...' if len(problems) > 5 else ''}")
    model.load_state_dict(found)


# --- evaluation and diagnostics ----------------------------------------------------------------------------------------------------------

def autocast(args, device):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.amp)


def health(name, residuals, tol):
    """Quantiles of the relative residuals of many solves, and the share that counts as solved: at most tol, or 1e-3 if tol is 0."""
    r = torch.cat(residuals).float()
    q = torch.quantile(r, torch.tensor([0.1, 0.5, 0.9], device=r.device)).tolist()
    return {f"{name}_residual_p10": q[0], f"{name}_residual_p50": q[1], f"{name}_residual_p90": q[2],
            f"{name}_solved": (r <= (tol or 1e-3)).float().mean().item()}


@torch.no_grad()
def evaluate(model, images, args, process):
    """Accuracy (%) and loss over all images, each counted once, with the solver alone; the health of the solves of this process."""
    model.eval()
    sums, residuals = torch.zeros(3, dtype=torch.float64, device=process.device), []
    for index in torch.arange(process.rank, len(images.y), process.world_size, device=process.device).split(args.batch_size):
        x, y = prepare(images.x[index], False, memory_format(args)), images.y[index]
        with autocast(args, process.device):
            logits, result = model(x, with_result=True)
        logits = logits.float()
        sums += torch.stack([(logits.argmax(1) == y).sum(), F.cross_entropy(logits, y, reduction="sum"), torch.ones_like(y).sum()]).double()
        residuals.append(result.residual)
    model.train()
    correct, loss, count = all_reduce_sum(sums).tolist()
    return {"test_accuracy": 100 * correct / count, "test_loss": loss / count, **health("test", residuals, args.tol), "test_evals": result.n_evals}


def f_parameters(model):
    return [p for name, p in model.named_parameters() if name.split(".")[0] in ("blocks", "fuse", "post", "post_gn")]


def gradient_cosines(model, x, y, args):
    """Fig. 2: cosine of UPG's and NPG's gradient, over the parameters of F, to the exact one, on one batch with the same dropout masks."""
    buffers, rng, grads = [b.clone() for b in model.buffers()], rng_states()[0], {}
    for grad in ("implicit", "upg", "npg"):
        set_rng_state(rng)
        model.grad = grad
        with autocast(args, x.device):
            logits = model(x)
        grads[grad] = torch.autograd.grad(F.cross_entropy(logits.float(), y), f_parameters(model))
    model.grad = args.grad
    for buffer, old in zip(model.buffers(), buffers):       # BatchNorm has counted this batch three times
        buffer.copy_(old)
    return {f"cosine_{grad}": cosine_similarity(grads[grad], grads["implicit"]).item() for grad in ("upg", "npg")}


@torch.no_grad()
def radii(model, x, lam):
    """App. D.2: mean spectral radius of J and of J_lam = lam J + (1 - lam) I at h*, evaluation mode."""
    model.eval()
    u, weights = model.inject(x), model.weights()
    f = partial(model.f, u=u, weights=weights)
    h = model.solver(f, tuple(torch.zeros_like(ui) for ui in u), max_iter=model.max_iter, tol=model.tol).h
    radius = {name: spectral_radius(f, h, lam=value, n_iter=50).mean().item() for name, value in (("rho_J", 1.0), ("rho_J_lam", lam))}
    model.train()
    return radius


# --- benchmark ---------------------------------------------------------------------------------------------------------------------------

def benchmark(model, x, y, args, repeats=3):
    """Times one training step with implicit, UPG and NPG in turns, medians over the repeats, and the solver's overhead.  Prints a table."""
    device, grads = x.device, ("implicit", "upg", "npg")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.train()

    def clock():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(grad, k):
        model.grad, model.k = grad, k
        reset_peak_memory(device)
        start = clock()
        with autocast(args, device):
            loss = F.cross_entropy(model(x).float(), y)
        forward = clock()
        loss.backward()
        backward = clock()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end = clock()
        return 1e3 * (forward - start), 1e3 * (backward - forward), 1e3 * (end - start), peak_memory(device)

    def overhead():
        with torch.no_grad(), autocast(args, device):
            u = model.inject(x)
            f = partial(model.f, u=u, weights=model.weights())
            h0 = tuple(torch.zeros_like(ui, dtype=x.dtype, memory_format=torch.preserve_format if i == 0 else torch.contiguous_format)
                       for i, ui in enumerate(u))
            start = clock()
            result = model.solver(f, h0, max_iter=model.max_iter, tol=0)
            solved = clock()
            for _ in range(result.n_evals):
                f(result.h)
            return (solved - start) / (clock() - solved), 1e3 * (clock() - solved) / result.n_evals

    for grad in grads:
        step(grad, args.k)      # warm-up, and compilation
    times = {grad: [] for grad in grads}
    overheads = [overhead()]
    for _ in range(repeats):
        for grad in grads:
            times[grad].append(step(grad, args.k))
        overheads.append(overhead())
    median = {grad: [statistics.median(column) for column in zip(*times[grad])] for grad in grads}
    print(f"\n{args.model}, {tuple(x.shape)}, {args.solver} {model.max_iter} forward and {model.backward_max_iter} backward iterations, k = {args.k}")
    print("gradient   forward ms  backward ms  step ms  peak GB  images/s   backward    step   (ratios: implicit / this)")
    base = median["implicit"]
    for grad in grads:
        f, b, s, gb = median[grad]
        print(f"{grad:9s} {f:11.1f} {b:12.1f} {s:8.1f} {gb:8.3f} {1e3 * len(y) / s:9.1f} {base[1] / b:9.2f}x {base[2] / s:6.2f}x")
    ratio, f_ms = (statistics.median(column) for column in zip(*overheads[1:]))
    print(f"F: {f_ms:.1f} ms; solver overhead, solve / (calls of F x time of F): {ratio:.3f}")
    memory = {k: step("npg", k)[3] for k in (1, 20)}
    print(f"NPG peak memory: k = 1 {memory[1]:.3f} GB, k = 20 {memory[20]:.3f} GB, ratio {memory[20] / memory[1]:.3f}")
    model.grad, model.k = args.grad, args.k
    return {"event": "benchmark", "model": args.model, "shape": list(x.shape), "f_ms": f_ms, "solver_overhead": ratio, "npg_peak_k20_k1":
            memory[20] / memory[1], **{f"{grad}_{name}": value for grad in grads for name, value in
                                       zip(("forward_ms", "backward_ms", "step_ms", "peak_gb"), median[grad])}}


# --- training ----------------------------------------------------------------------------------------------------------------------------

def memory_format(args):
    return torch.channels_last if args.memory_format == "channels-last" else torch.contiguous_format


def build_model(args, classes, process):
    shape = {key: MODELS[args.model][key] for key in ("channels", "head_channels", "final_channels")}
    model = MDEQ(**shape, num_classes=classes, dropout=args.dropout, grad=args.grad, k=args.k, lam=args.lam, solver=SOLVERS[args.solver],
                 max_iter=args.max_iter, tol=args.tol, backward_max_iter=args.backward_max_iter)
    model = model.to(process.device, memory_format=memory_format(args))
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.compile:
        # npg and implicit run F's backward several times on one graph: its buffers must not be given away after the first
        torch._functorch.config.donated_buffer = False
        model.f, model.head = torch.compile(model.f), torch.compile(model.head)
    return model


def restore(args, model, optimizer=None, scheduler=None):
    """Loads --resume into the model, and of our own checkpoints all the rest of the state.  Returns what was read."""
    state = load_checkpoint(args.resume)
    ours = isinstance(state, dict) and isinstance(state.get("args"), dict)
    if not ours and not args.eval:
        die(f"--resume {args.resume} was not written by this script: an official checkpoint can be evaluated (--eval), not continued")
    if ours:
        free = {"data", "out", "resume", "eval", "benchmark", "save_every", "log_every"}      # everything else changes the curve
        if args.eval:
            free |= set(vars(args)) - {"model"}
        differ = [f"--{k.replace('_', '-')} {v} (here {vars(args)[k]})" for k, v in state["args"].items() if k not in free and v != vars(args)[k]]
        if differ:
            die(f"--resume {args.resume} is of a run with {', '.join(differ)}; use the same flags, or start afresh with another --out")
    try:
        model.load_state_dict(state["model"]) if ours else load_official(model, state)
    except (ValueError, RuntimeError, AttributeError) as error:
        die(f"--resume {args.resume} does not fit --model {args.model}: {' '.join(str(error).split())[:400]}")
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
    return state


def train(args, process, model, train_set, test_set):
    device, rank, world = process.device, process.rank, process.world_size
    main = rank == 0
    out = Path(args.out)
    checkpoint = out / "checkpoint.pt"
    if args.resume == "auto":
        args.resume = str(checkpoint) if checkpoint.exists() else None
    if not args.resume and checkpoint.exists():
        die(f"--out {out} already holds a run: continue it with --resume auto, or choose another folder")
    N = len(train_set.y)
    steps_per_epoch = math.ceil(N / args.batch_size)        # the last, incomplete batch is kept
    if N % args.batch_size and N % args.batch_size < world:
        die(f"--batch-size {args.batch_size}: the last batch of an epoch has {N % args.batch_size} image(s) for {world} processes; choose another size")
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs * steps_per_epoch, eta_min=1e-6)
    state = restore(args, model, optimizer, scheduler) if args.resume else {"step": 0, "best": 0.0, "best_epoch": 0, "last": 0.0}
    step, best, best_epoch, last = (state[k] for k in ("step", "best", "best_epoch", "last"))
    seed_everything(args.seed + rank)
    if args.resume:
        if len(state["rng"]) == world:
            set_rng_state(state["rng"][rank])
        elif main:
            print(f"note: the checkpoint is of {len(state['rng'])} process(es): dropout and augmentation are seeded afresh", flush=True)
    net = model
    if world > 1:
        net = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    log = None
    if main:
        out.mkdir(parents=True, exist_ok=True)
        log = MetricsLog(out / "metrics.jsonl", last_step=step if args.resume else None)
        log.write(event="start", step=step, parameters=sum(p.numel() for p in model.parameters()), args=vars(args), **describe_run(device, world))
        print(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters; {N} training and {len(test_set.y)} test images; "
              f"{args.epochs} epochs of {steps_per_epoch} steps; {describe_run(device, world)['device']} x {world}; writing to {out}", flush=True)

    def save():
        rng = rng_states()                                  # all processes take part
        if main:
            save_checkpoint(checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
                                         "rng": rng, "step": step, "best": best, "best_epoch": best_epoch, "last": last, "args": vars(args)})

    meter, residuals, backward_residuals = Meter(device), [], []
    started = time.perf_counter()
    for epoch in range(step // steps_per_epoch, args.epochs):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(args.seed + 1_000_003 * (epoch + 1))).to(device)  # same on all processes
        batches = order.split(args.batch_size)
        bar = tqdm(range(step % steps_per_epoch, steps_per_epoch), desc=f"epoch {epoch + 1}", leave=False, disable=not (main and sys.stderr.isatty()))
        for b in bar:
            index = batches[b].tensor_split(world)[rank]
            x, y = prepare(train_set.x[index], args.augment == "yes", memory_format(args)), train_set.y[index]
            unroll = args.pretrain_layers if step < args.pretrain_steps else 0
            with autocast(args, device):
                logits, result = net(x, unroll=unroll, with_result=True, on_backward=lambda r: backward_residuals.append(r.residual))
            logits = logits.float()
            # DDP averages over processes: this is the mean over the global batch also when it does not divide evenly
            loss = F.cross_entropy(logits, y, reduction="sum") * world / len(batches[b])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            step += 1
            meter.add(len(y), loss=F.cross_entropy(logits.detach(), y), accuracy=100 * (logits.detach().argmax(1) == y).float().mean())
            if result is not None:
                residuals.append(result.residual)

            # --- the step ends here; what follows is logging, diagnostics and saving ---
            epoch_ends = b == steps_per_epoch - 1
            saving = step % args.save_every == 0 and not epoch_ends     # an epoch's end saves after its evaluation
            if args.cosine_every and step % args.cosine_every == 0:
                cosines = gradient_cosines(model, x, y, args)
                if main:
                    log.write(event="cosine", step=step, **cosines)
                    tqdm.write(f"step {step}: cosine to the exact gradient: UPG {cosines['cosine_upg']:.4f}, NPG {cosines['cosine_npg']:.4f}")
            if args.radius_every and step % args.radius_every == 0:
                radius = radii(model, prepare(test_set.x[:64], False, memory_format(args)), args.lam)
                if main:
                    log.write(event="radius", step=step, **radius)
                    tqdm.write(f"step {step}: spectral radius of J {radius['rho_J']:.3f}, of J_lam {radius['rho_J_lam']:.3f}")
            if step % args.log_every == 0 or saving or epoch_ends:
                record = meter.read()                                   # one synchronisation
                if not math.isfinite(record["loss"]):
                    kept = f"the last good state is {checkpoint}" if checkpoint.exists() else "nothing was saved yet"
                    die(f"the loss became {record['loss']} before step {step}: try a lower --lr or --lam; {kept}", code=1)
                if main:
                    log.write(event="train", step=step, epoch=epoch + 1, lr=scheduler.get_last_lr()[0], seconds=time.perf_counter() - started,
                              **record)
                    gb = f", {record['peak_gb']:.2f} GB" if "peak_gb" in record else ""
                    tqdm.write(f"step {step:6d}  epoch {epoch + 1:3d}  loss {record['loss']:.4f}  accuracy {record['accuracy']:5.2f} %  lr "
                               f"{scheduler.get_last_lr()[0]:.5f}  {record['ms_per_step']:.0f} ms/step  {world * record['samples_per_s']:.0f} images/s{gb}")
            if saving:
                save()

        if world > 1:
            for buffer in model.buffers():          # evaluate the first process's BatchNorm statistics on all
                torch.distributed.broadcast(buffer, 0)
        record = evaluate(model, test_set, args, process)
        last = record["test_accuracy"]
        if last > best:
            best, best_epoch = last, epoch + 1
        if residuals:
            record.update(health("train", residuals, args.tol), train_evals=result.n_evals if result is not None else 0)
        if backward_residuals:
            record.update(health("backward", backward_residuals, args.tol))
        residuals.clear()
        backward_residuals.clear()
        if main:
            log.write(event="epoch", step=step, epoch=epoch + 1, best_accuracy=best, best_epoch=best_epoch, seconds=time.perf_counter() - started,
                      **record)
            tqdm.write(f"epoch {epoch + 1}: test accuracy {last:.2f} %, best {best:.2f} % (epoch {best_epoch}), test loss {record['test_loss']:.4f}")
            for name in ("train", "test", "backward"):
                if f"{name}_solved" in record:
                    tqdm.write(f"  {name} solves: relative residual {record[f'{name}_residual_p10']:.1e} / {record[f'{name}_residual_p50']:.1e} / "
                               f"{record[f'{name}_residual_p90']:.1e} (10, 50, 90 %), {100 * record[f'{name}_solved']:.0f} % below {args.tol or 1e-3:g}"
                               + (f", {record[f'{name}_evals']} calls of F" if f"{name}_evals" in record else ""))
        save()
        meter.reset()
    if main:
        print(f"done: test accuracy after the last epoch {last:.2f} %, best epoch {best:.2f} % (epoch {best_epoch}; the paper's protocol), "
              f"{(time.perf_counter() - started) / 60:.1f} minutes", flush=True)


def main(args):
    if not args.out:
        args.out = f"runs/{args.model}-{args.grad}-{time.strftime('%Y%m%d-%H%M%S')}"
    process = init_process()
    if args.batch_size % process.world_size:
        die(f"--batch-size {args.batch_size} is not divisible by the {process.world_size} processes")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    seed_everything(args.seed)          # the same weights on all processes
    if args.benchmark:
        side = 16 if args.data == "toy" else 32
        x = torch.randn(args.batch_size, 3, side, side, device=process.device).contiguous(memory_format=memory_format(args))
        return benchmark(build_model(args, 10, process), x, torch.arange(args.batch_size, device=process.device) % 10, args)
    train_set, test_set = load_images(args, process)
    model = build_model(args, train_set.classes, process)
    if args.eval:
        restore(args, model)
        record = evaluate(model, test_set, args, process)
        if process.rank == 0:
            print(f"{args.resume}: test accuracy {record['test_accuracy']:.2f} %, test loss {record['test_loss']:.4f}, relative residual "
                  f"{record['test_residual_p50']:.1e} (median) after {record['test_evals']} calls of F, {len(test_set.y)} images")
        return None
    train(args, process, model, train_set, test_set)
    if args.data == "toy" and process.rank == 0:
        benchmark(model, prepare(train_set.x[:args.batch_size], False, memory_format(args)), train_set.y[:args.batch_size], args)
    if process.world_size > 1:
        torch.distributed.destroy_process_group()
    return None


if __name__ == "__main__":
    main(parse_args())
