"""MDEQ on ImageNet with phantom gradients: "On Training Implicit Models" (NeurIPS 2021, arXiv:2111.05177).

MDEQ is a multiscale deep equilibrium model.  UPG A_{k,lam} differentiates through k steps from the solution
h*, damped by lam, Eq. (16).  NPG sums k terms of a Neumann series, Eq. (17).  The implicit gradient is exact.

    torchrun --nproc_per_node=8 mdeq_imagenet.py             # the paper's row: UPG A_{5,0.6}, 8 x 16 images
    python mdeq_imagenet.py --data toy                       # generated images: minutes on two CPU cores
    python mdeq_imagenet.py --accumulate 8                   # one GPU: a step in 8 micro-batches of 16
    python mdeq_imagenet.py --benchmark --batch-size 16      # step time and memory of implicit, UPG and NPG
    python mdeq_imagenet.py --eval --resume FILE             # evaluates our checkpoints and official ones

For two machines, run this on each of them, with a folder R that both see.  If a process dies, all processes
restart from the last checkpoint in R, up to three times:
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1     # torch's restarts fail without it, see init_process
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --max-restarts=3 \\
        mdeq_imagenet.py --out R --resume auto
If all processes get SIGTERM, they save a checkpoint and end with code 0.  If torchrun gets it, torchrun
passes it on, ends with code 1, and kills the processes that are left after 30 seconds.

For Table 3 (16,808,936 parameters, 100 epochs, batch 128), run torchrun --nproc_per_node=8 mdeq_imagenet.py
with the flags of a row.  The paper's backward solver is Broyden's method.  The default here is GMRES.
    paper 75.3 %   --grad implicit --backward-solver broyden --pretrain-steps 500000
          75.2 %   --pretrain-steps 500000          # App. D.3, setting 1: UPG after pretraining
          75.7 %   (none)                           # App. D.3, setting 2: UPG from the first step on
For the spectral radii of App. D.3, add --radius-every 10000, or use --eval.
The table rows have not been run yet.  Measurements are in assets/results.md.

Differences from the paper and its release: The solver measures the residual and keeps the best iterate for
each image, not for the whole batch.  The first step of Broyden's method has the right sign, which the release
inverts.  NPG follows Eq. (17), not Algorithms 2 and 3.  BatchNorm is per GPU, as for the paper's UPG numbers.
(The released script has SyncBN, here --sync-bn.)  Weights start from PyTorch's defaults, as in the release.
Random crops have the release's area and aspect, but torchvision makes them, not DALI.  The last, incomplete
batch of an epoch is dropped, which leaves 10,009 steps.  The paper's 75.3 presumably comes from
locuslab/mdeq.  That recipe differs in more than the gradient: 4 GPUs x 32 images, crops of 8 to 100 % of the
area, weights from Normal(0, 0.01).  Here all rows share UPG's recipe.
"""
import atexit
import contextlib
import argparse
import functools
import hashlib
import itertools
import math
import multiprocessing
import os
import re
import signal
import time

# Gives large CPU tensors pages of 2 MB.  MDEQ.f of Tiny at batch 128 is 1.05 to 1.4 times as fast on 2 cores.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # torch reads it at its first allocation

import numpy as np
import torch
import torch.nn.functional as F         # in comments, F is the equilibrium module MDEQ.f
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm

from common import (Meter, Run, TrainingPass, add_run_flags, anderson, benchmark, broyden, captured,
                    compiled, die, equilibrium, existing_file, fixed_point, gmres, health, image_folders,
                    init_process, is_ours, keep_freed_memory, launched, load_checkpoint, load_weights,
                    make_parser, note_differences, parse_flags, read_image, recomputed, rng_state,
                    seed_everything, set_rng_state, spectral_radius, spell, upg, within)

SOLVERS = {"broyden": broyden, "anderson": anderson, "fixed-point": fixed_point, "gmres": gmres}
# Defaults of options.  "small" is the official recipe.
PRESETS = {"small": dict(channels=[32, 64, 128, 256], head_channels=[24, 48, 96, 192], final_channels=2048,
                         max_iter=26, backward_max_iter=27, epochs=100, augment="yes", crop=224, resize=256,
                         lr=0.05, weight_decay=5e-5),
           "toy": dict(channels=[16, 16, 32, 32], head_channels=[4, 8, 8, 16], final_channels=256, epochs=8,
                       batch_size=40, crop=64, resize=72, log_every=20)}


def presets(args):
    return {**PRESETS["small"], **(PRESETS["toy"] if args.data == "toy" else {})}


def parse_args(argv=None):
    p = make_parser("Trains MDEQ-Small on ImageNet.  Without options, it uses UPG A_{5,0.6} as in the paper.  "
                    "PRESETS has the defaults of --data toy.")
    count, natural = within(int, "[1, inf)"), within(int, "[0, inf)")
    add = p.add_argument_group("data").add_argument     # a shorthand, one for each group
    add("--data", default="data/imagenet", type=os.path.expanduser, help="folder of images in train/CLASS/* "
        "and val/CLASS/*, or 'toy' for generated images of 10 classes")
    add("--augment", choices=["yes", "no"], help="random crops of 10 to 100 %% of the area, and flips")
    add("--crop", type=count, help="side of the model's input in pixels")
    add("--resize", type=count, help="shorter side of an image in pixels, before its central crop")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--workers", type=natural, default=min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
        help="processes that read images for each training process, or 0 if it reads them itself")
    add = p.add_argument_group("model and equilibrium").add_argument
    add("--channels", type=count, nargs="+", help="channels of each branch, multiples of 8")
    add("--head-channels", type=count, nargs="+", help="a quarter of the head's channels, for each branch")
    add("--final-channels", type=count, help="channels before the classifier")
    add("--init", metavar="FILE", type=existing_file, help="start from the weights of this checkpoint, ours "
        "or an official one, with a new classifier if its classes differ")
    add("--dropout", type=within(float, "[0, 1)"), default=0.0, help="probability of dropout in F")
    add("--pretrain-steps", type=natural, default=0, help="initial steps that unroll F instead of solving")
    add("--pretrain-layers", type=count, default=5, help="evaluations of F in each pretraining step")
    add("--grad", choices=["upg", "npg", "implicit", "bptt"], default="upg", help="how h* is differentiated")
    add("--k", type=count, default=5, help="steps of the phantom gradient")
    add("--lam", type=within(float, "(0, 1]"), default=0.6, help="damping of the phantom gradient")
    add("--solver", choices=["broyden", "anderson", "fixed-point"], default="broyden", help="solver for h*")
    add("--max-iter", type=count, help="maximum iterations of the solver")
    add("--tol", type=within(float, "[0, inf)"), default=0.0,
        help="relative residual at which an image counts as solved, or 0 to use all iterations")
    add("--backward-solver", choices=list(SOLVERS), default="gmres", help="solver for --grad implicit")
    add("--backward-max-iter", type=count, help="maximum iterations of the backward solver")
    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, help="passes over the training images")
    add("--batch-size", type=count, default=128, help="images per step over all processes")
    add("--accumulate", type=count, default=1, help="micro-batches per step: less memory, not less time")
    add("--lr", type=within(float, "(0, inf)"), help="initial learning rate, lowered to 1e-6 along a cosine")
    add("--weight-decay", type=within(float, "[0, inf)"), help="L2 penalty on every parameter")
    add = p.add_argument_group("speed").add_argument
    add("--amp", action="store_true", help="bf16 autocast: changes results (solver vectors stay float32)")
    add("--no-tf32", action="store_true", help="GPU convolutions in full float32 (torch's default is TF32)")
    add("--recompute", action="store_true", help="compute F again in the backward pass of UPG: less memory, "
        "more time, equal results (--benchmark has a row for it)")
    add("--compile", action="store_true", help="torch.compile F and the head: results differ by rounding")
    add("--cuda-graph", action=argparse.BooleanOptionalAction,
        help="launch a training step as two CUDA graphs: equal results, up to 2.8 times as fast.  "
        "Pretraining and batches of another size use no graphs (default: for one process on a GPU, "
        "with --tol 0 and --accumulate 1 and without anderson)")
    add("--memory-format", choices=["contiguous", "channels-last"], help="layout of images and weights",
        default="contiguous" if torch.cuda.is_available() else "channels-last")
    add("--sync-bn", action="store_true", help="BatchNorm statistics over all processes (needs GPUs)")
    add = p.add_argument_group("diagnostics").add_argument
    add("--radius-every", type=natural, default=0,
        help="steps between spectral radii of J = dF/dh and lam J + (1 - lam) I (App. D.3), or 0 for none")
    add("--radius-images", type=count, default=64, help="validation images for the radii, also in --eval")
    add_run_flags(p, "imagenet-GRAD", save_every=15.0)
    args = parse_flags(p, argv, presets, "data channels head_channels final_channels crop resize lam solver "
                       "max_iter tol")
    n, halvings = len(args.channels), len(args.channels) + 1
    if n < 2 or len(args.head_channels) != n or any(c % 8 for c in args.channels):
        p.error(f"--channels must be two or more multiples of 8, --head-channels as many numbers; got "
                f"{args.channels} and {args.head_channels}")
    if args.crop % 2 ** halvings or args.crop > args.resize:
        p.error(f"--crop {args.crop}: must be a multiple of {2 ** halvings}, as the stem and {n} branches "
                f"halve it {halvings} times, and at most --resize {args.resize}")
    if args.init and (args.eval or args.benchmark):
        p.error("--init begins a training: evaluate a checkpoint with --eval --resume FILE")
    if args.grad == "bptt" and args.solver != "fixed-point":
        p.error("--grad bptt differentiates the plain iteration: it needs --solver fixed-point")
    if args.recompute and args.grad not in ("upg", "bptt"):
        p.error(f"--recompute is for --grad upg and bptt: {args.grad} keeps only one graph of F")
    if (args.sync_bn or args.cuda_graph) and not torch.cuda.is_available():
        p.error(f"--{'sync-bn' if args.sync_bn else 'cuda-graph'} needs a GPU")
    waits = args.tol or "anderson" in (args.solver, args.backward_solver) or args.sync_bn
    if args.cuda_graph is None:
        args.cuda_graph = torch.cuda.is_available() and not waits and args.accumulate == 1 and not launched()
    if args.cuda_graph and (waits or args.accumulate > 1):
        p.error("--cuda-graph needs --tol 0 and --accumulate 1, and neither anderson nor --sync-bn")
    return args


# --- data: files, which worker processes decode and crop ----------------------------------------------------

class Images(torch.utils.data.Dataset):
    """(index, seed) -> (uint8 image (3, crop, crop), label).

    The seed decides the random crop and flip.  So an image's augmentation depends on --seed, the epoch and
    the image, but not on the worker that reads it.
    """

    def __init__(self, samples, classes, loader, transform):
        # Workers share an array's memory.  A list's pages would be copied, as its reference counts change.
        self.paths = np.array([os.fsencode(path) for path, _ in samples])
        self.y = np.array([label for _, label in samples])
        self.classes, self.loader, self.transform = classes, loader, transform

    def __getitem__(self, key):
        index, seed = key
        path = os.fsdecode(self.paths[index].item())
        try:
            image = self.loader(path)
            if max(image.size) > 100 * min(image.size):         # --resize would make gigabytes of it
                raise ValueError(f"its sides are {image.size}")
            with torch.random.fork_rng(devices=[]):     # restores the generator that dropout uses
                torch.default_generator.manual_seed(seed)
                return self.transform(image), int(self.y[index])
        except Exception as error:          # PIL raises half a dozen exception types for broken files
            raise OSError(f"cannot read the image {path} ({' '.join(str(error).split())}); "
                          "replace or remove it")

    def fingerprint(self, sizes=False):
        """A hash of file names and labels.  `sizes` adds file sizes, which takes a while for a million."""
        facts = [os.path.basename(path) for path in self.paths.tolist()]
        facts += [os.path.getsize(path) for path in self.paths.tolist()] if sizes else []
        return hashlib.sha256(repr(facts).encode() + self.y.tobytes()).hexdigest()[:16]


def toy_image(name):
    """The image SPLIT/CLASS/NUMBER, always the same: two noisy waves that cross at +angle and -angle.

    The classes are 5 angles x smooth or square waves.  Flips, crops and colours keep the class.  The phase
    is uniform, so all classes have the same mean image: a linear classifier stays near 32 % (guessing: 10 %).
    """
    from torchvision.transforms.functional import to_pil_image
    split, label, number = name.split("/")
    label, rng = int(label), torch.Generator().manual_seed(2 * int(number) + (split == "val"))

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=rng)

    height, width = torch.randint(72, 110, (2,), generator=rng).tolist()  # of various sizes, like photographs
    angle, wavelength = math.radians((10, 27.5, 45, 62.5, 80)[label % 5]), uniform(9, 13)
    y, x = torch.arange(height)[:, None], torch.arange(width)   # (H, 1), (W,)
    phase = uniform(0, 1, 2)
    wave = sum(torch.cos(2 * math.pi * ((math.cos(angle) * x + sign * math.sin(angle) * y) / wavelength + p))
               for sign, p in zip((1, -1), phase))                                          # (H, W)
    wave = wave if label < 5 else wave.sign()
    colour = F.normalize(torch.randn(3, generator=rng), dim=0)
    noise = 10 * torch.randn(3, height, width, generator=rng)
    image = uniform(90, 160, 3, 1, 1) + 60 * wave * colour[:, None, None] + noise           # (3, H, W)
    return to_pil_image(image.round().clamp(0, 255).to(torch.uint8))


def load_images(args, process):
    """(training images, validation images).  --eval needs no train/: both are validation images then."""
    from torchvision import transforms as T
    crop = T.Compose([T.Resize(args.resize), T.CenterCrop(args.crop), T.PILToTensor()])
    random_crop = T.Compose([T.RandomResizedCrop(args.crop, scale=(0.1, 1.0), ratio=(0.8, 1.25)),
                             T.RandomHorizontalFlip(), T.PILToTensor()])
    if args.data == "toy":
        classes = [str(c) for c in range(10)]
        train_set, eval_set = (
            Images([(f"{split}/{i % 10}/{i}", i % 10) for i in range(n)], classes, toy_image, crop)
            for split, n in (("train", 800), ("val", 200)))
    else:
        folders = image_folders(args.data, process, *(("val",) if args.eval else ("train", "val")))
        train_set, eval_set = (
            Images(samples, classes, read_image, crop) for classes, samples in (folders[0], folders[-1]))
    if args.augment == "yes":
        train_set.transform = random_crop
    if not args.eval and len(train_set.y) < args.batch_size:
        die(f"--batch-size {args.batch_size}: there are only {len(train_set.y)} training images")
    if len(eval_set.y) < process.world_size:
        die(f"--data {args.data}: {len(eval_set.y)} evaluation image(s) for {process.world_size} processes")
    return train_set, eval_set


def memory_format(args):
    return torch.channels_last if args.memory_format == "channels-last" else torch.contiguous_format


@functools.cache
def normalisation(device):
    """The channels' means and standard deviations.  They are sent to the device only once."""
    values = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device)
    return values[0, :, None, None], values[1, :, None, None]   # (3, 1, 1) each


def prepare(x, args, device):
    """uint8 (N, 3, S, S) -> normalised float32 on the device."""
    x = x.to(device, non_blocking=True)     # from pinned memory, with a quarter of float32's bytes
    mean, std = normalisation(x.device)
    return ((x / 255.0 - mean) / std).contiguous(memory_format=memory_format(args))


def leave_signals_to_parent(_):
    for number in (signal.SIGTERM, signal.SIGINT):      # a cluster and a terminal send them to all processes
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """Kills the workers at exit.  Python would send SIGTERM, which they ignore, and wait for ever."""
    if hasattr(signal, "SIGCHLD"):                          # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch's handler would take this for an error
    for worker in multiprocessing.active_children():
        worker.kill()


def read(images, keys, args, process):
    """Yields (x, y, seconds waited) on the device for each list of keys.  A broken image ends the run."""
    atexit.register(end_workers)
    loader = torch.utils.data.DataLoader(
        images, batch_sampler=keys, num_workers=args.workers, pin_memory=process.device.type == "cuda",
        worker_init_fn=leave_signals_to_parent, prefetch_factor=4 if args.workers else None,
        generator=torch.Generator())        # otherwise the training's generator would draw its seed
    asked = time.perf_counter()
    try:
        for x, y in loader:
            waited = time.perf_counter() - asked
            yield prepare(x, args, process.device), y.to(process.device, non_blocking=True), waited
            asked = time.perf_counter()
    except (OSError, RuntimeError) as error:        # RuntimeError: a killed worker, or a GPU's error
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        what = str(error.with_traceback(None))          # a traceback would keep the workers alive
        die(f"--data: {what.splitlines()[-1].removeprefix('OSError: ')}")       # below a worker's traceback


def training_keys(n, args, process, epoch, first):
    """Yields this process's micro-batches, as lists of keys of Images, from batch `first` of the epoch on.

    The order depends only on --seed and the epoch.  Processes and micro-batches divide the same batches.
    """
    N, seed = args.batch_size, args.seed * 1_000_003 + epoch
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))    # --resume can repeat it
    for batch in range(first, n // N):
        own = order[batch * N:(batch + 1) * N].tensor_split(process.world_size)[process.rank]   # equal parts
        for micro_batch in own.tensor_split(args.accumulate):
            yield [(i, (seed * 1_000_000_007 + i) % 2 ** 32) for i in micro_batch.tolist()]  # (index, seed)


def training_batches(images, args, process, epoch, first):
    """Yields (batch number, its micro-batches as from `read`), from batch `first` of the epoch on."""
    n = len(images.y)
    micro_batches = read(images, training_keys(n, args, process, epoch, first), args, process)
    for batch in process.bar(range(first, n // args.batch_size), f"epoch {epoch + 1}"):
        yield batch, itertools.islice(micro_batches, args.accumulate)


def evaluation_batches(images, args, process, some=None):
    """Yields (x, y) of all images, or of `some` from all classes.  Each image goes to exactly one process."""
    # `some` images are taken at equal distances, because files may be sorted by class.
    n, size = len(images.y), max(1, args.batch_size // process.world_size // args.accumulate)
    m = min(some or n, n)
    own = [i * n // m for i in range(m)][process.rank::process.world_size]
    keys = [[(j, 0) for j in own[i:i + size]] for i in range(0, len(own), size)]  # central crops need no seed
    for x, y, _ in process.bar(read(images, keys, args, process), "evaluating", total=len(keys)):
        yield x, y


# --- model --------------------------------------------------------------------------------------------------

def conv(c_in, c_out, size=3, stride=1, bias=False):
    return nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, bias=bias)


class ResidualBlock(nn.Module):
    """y = GN(ReLU(GN(drop(conv(ReLU(GN(conv(h))))) + u) + h)), with GroupNorm GN and injection u."""

    def __init__(self, c, groups, expansion):
        super().__init__()
        self.conv1, self.gn1 = weight_norm(conv(c, expansion * c)), nn.GroupNorm(groups, expansion * c)
        self.conv2, self.gn2 = weight_norm(conv(expansion * c, c)), nn.GroupNorm(groups, c)
        self.gn3 = nn.GroupNorm(groups, c)

    def forward(self, h, u, w1, w2, mask):
        # w1, w2: the weights of conv1 and conv2, which MDEQ.weights computes once for all evaluations of F.
        a = F.relu(self.gn1(F.conv2d(h, w1, padding=1)), inplace=True)          # (N, 5 c, H, W)
        b = F.conv2d(a, w2, padding=1)                                          # (N, c, H, W)
        if mask is not None:
            b = b * mask            # before the injection, so that u is never dropped
        c = self.gn2(b + u) + h     # the shortcut comes after the norm
        return self.gn3(F.relu(c, inplace=True))


class Bottleneck(nn.Module):
    """The head's residual block from c to 4 p channels: 1 x 1, 3 x 3 and 1 x 1 convolutions."""

    def __init__(self, c, p):
        super().__init__()          # bn1, bn2 and bn3 have no affine parameters, as in the official code
        self.conv1, self.bn1 = conv(c, p, 1), nn.BatchNorm2d(p, affine=False)
        self.conv2, self.bn2 = conv(p, p), nn.BatchNorm2d(p, affine=False)
        self.conv3, self.bn3 = conv(p, 4 * p, 1), nn.BatchNorm2d(4 * p, affine=False)
        self.shortcut = nn.Identity()
        if c != 4 * p:
            self.shortcut = nn.Sequential(conv(c, 4 * p, 1), nn.BatchNorm2d(4 * p))

    def forward(self, h):
        t = F.relu(self.bn1(self.conv1(h)))
        t = F.relu(self.bn2(self.conv2(t)))
        return F.relu(self.bn3(self.conv3(t)) + self.shortcut(h))


def fusion(c_from, c_to, groups, steps_down):
    """The path between two branches: stride-2 convolutions down, or a 1 x 1 convolution up.

    The caller upsamples last.  This is cheaper and exact, as nearest neighbours commute with both layers.
    """
    if steps_down < 0:
        return nn.Sequential(conv(c_from, c_to, 1), nn.GroupNorm(groups, c_to))
    layers = []
    for stage in range(steps_down):
        c = c_to if stage == steps_down - 1 else c_from  # the last one changes the channels
        layers += [conv(c_from, c, stride=2), nn.GroupNorm(groups, c), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])          # no ReLU after the last, as all paths are summed first


class MDEQ(nn.Module):
    """Multiscale deep equilibrium classifier: logits = G(h*), h* = F(h*, u), u = M(x), Eq. (1).

    The state h is a tuple.  Branch i has shape (N, channels[i], S / 2^i, S / 2^i), and S is the image side
    after the stem.  head_channels are the p of the Bottlenecks.  solve(f, h0) is common.equilibrium with its
    settings and returns (state, the solver's result).
    """

    def __init__(self, channels=(32, 64, 128, 256), head_channels=(24, 48, 96, 192), final_channels=2048,
                 num_classes=1000, dropout=0.0, stem_strides=2, groups=8, expansion=5,
                 solve=functools.partial(equilibrium, max_iter=26, tol=0.0, stop_mode="rel_joint", lam=0.6,
                                         backward_max_iter=27, backward_tol=0.0)):
        super().__init__()
        n, c0, wide = len(channels), channels[0], [4 * p for p in head_channels]  # wide: the head's
        self.channels, self.dropout, self.solve = tuple(channels), dropout, solve
        self.stem_strides = stem_strides        # how many of the stem's two convolutions halve the image

        # M(x): from the image (N, 3, ., .) to the injection (N, C_0, S, S)
        self.stem = nn.Sequential(
            conv(3, c0, stride=1 + (stem_strides > 0)), nn.BatchNorm2d(c0), nn.ReLU(inplace=True),
            conv(c0, c0, stride=1 + (stem_strides > 1)), nn.BatchNorm2d(c0), nn.ReLU(inplace=True))
        self.injection = nn.Identity()
        if stem_strides or n > 2:   # otherwise the stem alone is M, as in the official code
            self.injection = nn.Sequential(conv(c0, c0, 1), nn.BatchNorm2d(c0), nn.ReLU(inplace=True))
        # F(h, u) has no BatchNorm, so that the images of a batch do not affect each other
        self.blocks = nn.ModuleList(ResidualBlock(c, groups, expansion) for c in channels)
        self.fuse = nn.ModuleList(nn.ModuleList(    # fuse[i][j] leads from branch j to branch i
            nn.Identity() if i == j else fusion(channels[j], channels[i], groups, i - j) for j in range(n))
            for i in range(n))
        self.post = nn.ModuleList(weight_norm(conv(c, c, 1)) for c in channels)     # after the fusion
        self.post_gn = nn.ModuleList(nn.GroupNorm(groups // 2, c) for c in channels)
        # G(h): the branches are added from fine to coarse
        self.bottlenecks = nn.ModuleList(Bottleneck(c, p) for c, p in zip(channels, head_channels))
        self.down = nn.ModuleList(  # from each branch to the next, coarser one
            nn.Sequential(conv(a, b, stride=2, bias=True), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
            for a, b in zip(wide, wide[1:]))
        self.final = nn.Sequential(conv(wide[-1], final_channels, 1, bias=True),
                                   nn.BatchNorm2d(final_channels), nn.ReLU(inplace=True))
        self.classifier = nn.Linear(final_channels, num_classes)

    def inject(self, x):
        """u = M(x): the stem's output for the finest branch, and zeros that take no memory for the others."""
        divisor = 2 ** (self.stem_strides + len(self.channels) - 1)
        if x.shape[-1] % divisor or x.shape[-2] % divisor:
            raise ValueError(f"image sides must be divisible by {divisor} for {len(self.channels)} branches, "
                             f"got {tuple(x.shape[-2:])}")
        u = self.injection(self.stem(x))    # (N, C_0, S, S)
        N, _, H, W = u.shape
        return u, *(u.new_zeros(1).expand(N, c, H >> i, W >> i) for i, c in enumerate(self.channels) if i > 0)

    def zeros(self, u, dtype=torch.float32):
        """The initial state: zeros in u's shapes and layout, but not in u's dtype (bf16 under autocast)."""
        layout = torch.channels_last if u[0].stride(1) == 1 else torch.contiguous_format
        return tuple(torch.zeros_like(ui, dtype=dtype, memory_format=layout) for ui in u)

    def weights(self):
        """The weights g v / ||v||, with a graph: for each branch, two of the block and one after fusion."""
        weights = [[block.conv1.weight, block.conv2.weight, post.weight]
                   for block, post in zip(self.blocks, self.post)]
        device = weights[0][0].device.type
        if torch.is_autocast_enabled(device):       # autocast would cast them at every evaluation
            weights = [[w.to(torch.get_autocast_dtype(device)) for w in branch] for branch in weights]
        if self.stem[0].weight.is_contiguous(memory_format=torch.channels_last):    # g v / ||v|| may lose it
            weights = [[w.contiguous(memory_format=torch.channels_last) for w in branch]
                       for branch in weights]
        return weights

    def masks(self, h):
        """Variational dropout: a mask (N, C_i, 1, 1) per branch, the same for all evaluations of F.

        With a new mask for each evaluation, F would change every time and have no fixed point.
        """
        if not self.training or self.dropout == 0:
            return [None] * len(h)
        keep = 1 - self.dropout
        return [torch.bernoulli(p.new_full((p.shape[0], p.shape[1], 1, 1), keep)) / keep for p in h]

    def f(self, h, u, weights=None, masks=None):
        """F(h, u): a residual block per branch, fusion of all branches, a convolution per branch."""
        weights = weights or self.weights()
        masks = masks or [None] * len(h)
        y = [block(hi, ui, w[0], w[1], mask)
             for block, hi, ui, w, mask in zip(self.blocks, h, u, weights, masks)]
        if len(y) == 1:     # a single branch has nothing to fuse
            return tuple(y)
        out = []
        for i, (post_gn, w) in enumerate(zip(self.post_gn, weights)):
            s = y[i]                                # (N, C_i, S / 2^i, S / 2^i), like all terms added to it
            for j, yj in enumerate(y):
                if j < i:
                    s = s + self.fuse[i][j](yj)     # from a finer branch, by strided convolutions
                elif j > i:                         # from a coarser branch, enlarged 2^(j - i) times
                    s = s + F.interpolate(self.fuse[i][j](yj), scale_factor=2.0 ** (j - i), mode="nearest")
            out.append(post_gn(F.conv2d(F.relu(s, inplace=True), w[2])))
        return tuple(out)

    def head(self, h):
        """G(h): adds the branches from fine to coarse, then pools and applies the linear classifier."""
        y = self.bottlenecks[0](h[0])   # (N, 4 p_0, S, S)
        for i, down in enumerate(self.down):
            y = self.bottlenecks[i + 1](h[i + 1]) + down(y)
        return self.classifier(self.final(y).mean(dim=(2, 3)))  # (N, classes)

    def problem(self, x):
        """(f, h0) for images x (N, 3, ., .), so that h* = f(h*).  Weights and masks are computed once."""
        u = self.inject(x)
        h0 = self.zeros(u, x.dtype)
        return functools.partial(self.f, u=u, weights=self.weights(), masks=self.masks(h0)), h0

    def forward(self, x, unroll=0, with_result=False, on_backward=None):
        """Logits (N, classes) of images x (N, 3, ., .).  with_result: (logits, the solver's result or None).

        unroll: evaluate F this many times instead of solving.  on_backward: as in common.equilibrium.
        """
        f, h0 = self.problem(x)
        if unroll:
            h, result = upg(f, h0, k=unroll, lam=1.0), None         # lam = 1: plain evaluations of F
        else:
            h, result = self.solve(f, h0, on_backward=on_backward)
        logits = self.head(h)
        return (logits, result) if with_result else logits


def load_official(model, state_dict):
    """Loads a state dict of phantom_grad, locuslab/mdeq, locuslab/deq (MDEQ-Vision) or torchdeq's zoo.

    If keys are unknown, missing or of another shape, a RuntimeError names them.
    """
    renames = [(r"^module\.", ""), (r"^full_stage\.", "fullstage."),  # module.: by DistributedDataParallel
               (r"^downsample\.", "stem."), (r"^stage0\.", "injection."),
               (r"^fullstage\.branches\.(\d+)\.blocks\.0\.", r"blocks.\1."),    # F
               (r"^fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.(?:(\d+)\.)?(conv|gnorm)\.",
                # Here a step of a path is three modules: convolution, GroupNorm, ReLU.
                lambda m: f"fuse.{m[1]}.{m[2]}.{3 * int(m[3] or 0) + (m[4] == 'gnorm')}."),
               (r"^fullstage\.post_fuse_layers\.(\d+)\.conv\.", r"post.\1."),
               (r"^fullstage\.post_fuse_layers\.(\d+)\.gnorm\.", r"post_gn.\1."),
               (r"^incre_modules\.(\d+)\.0\.downsample\.", r"bottlenecks.\1.shortcut."),    # the head
               (r"^incre_modules\.(\d+)\.0\.", r"bottlenecks.\1."),
               (r"^downsamp_modules\.", "down."), (r"^final_layer\.", "final.")]
    found = {}
    for key, value in state_dict.get("state_dict", state_dict).items():
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        if not key.startswith(("deq.func.", "deq.func_copy.", "fullstage_copy.")):      # duplicates
            found[key] = value

    def norm(v):
        return torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)

    # weight_norm stores g as original0 and v as original1.  Older files call them weight_g and weight_v.
    own, affine = model.state_dict(), any(name.startswith("post_gn.") for name in found)
    for name in own:
        plain = name.replace("parametrizations.weight.original1", "weight")
        if plain != name and plain in found:            # normalised only in this model: v = W, g = ||W||
            found[plain + "_g"], found[plain + "_v"] = norm(found[plain]), found.pop(plain)
        elif plain == name and name + "_g" in found:    # normalised only in the file: W = g v / ||v||
            v = found.pop(name + "_v")
            found[name] = found.pop(name + "_g") * v / norm(v)
        elif name.startswith("post_gn.") and not affine:        # locuslab/deq has none: weight 1, bias 0
            found[name] = torch.full_like(own[name], name.endswith("weight"))
    model.load_state_dict(found)        # weight_norm's own hook renames the other pairs (g, v)


# --- training -----------------------------------------------------------------------------------------------

def autocast(args, device):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.amp)


def build_model(args, classes, process):
    solve = functools.partial(
        equilibrium, grad=args.grad, k=args.k, lam=args.lam, tol=args.tol, backward_tol=args.tol,
        solver=SOLVERS[args.solver], max_iter=args.max_iter, backward_solver=SOLVERS[args.backward_solver],
        backward_max_iter=args.backward_max_iter, stop_mode="rel_joint")    # one norm over all branches
    seed_everything(args.seed)          # the same weights on all processes
    model = MDEQ(args.channels, args.head_channels, args.final_channels, num_classes=classes,
                 dropout=args.dropout, solve=solve)
    model = model.to(process.device, memory_format=memory_format(args))
    for p in model.parameters():
        if p.dim() == 4 and p[0, 0].numel() == 1:
            # A 1 x 1 kernel fits both memory formats, so its strides may differ from its gradient's, and
            # DistributedDataParallel would warn of that.  Both are made contiguous here, at no cost.
            p.data = p.data.flatten().view(p.shape)
            p.register_hook(lambda g: g.flatten().view(g.shape))
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.compile:
        model.f, model.head = compiled(model.f), compiled(model.head)
    if args.recompute and not args.benchmark:           # --benchmark has its own row for it
        model.f = recomputed(model.f)
    return model


def training_pass(args, model, batch, side, process):
    """(the model's TrainingPass for `batch` images, the module to call: the same, or its CUDA graphs)."""
    training = TrainingPass(model, batch, process.device)
    if not args.cuda_graph:
        return training, training
    example = torch.randn(batch, 3, side, side, device=process.device)
    with autocast(args, process.device):
        return training, captured(training, example.contiguous(memory_format=memory_format(args)))


def initialise(args, model, classes, process):
    """--init: loads the weights of a checkpoint, but not its classifier if its classes differ."""
    state, own = load_checkpoint(args.init, flag="--init"), model.state_dict()
    found = state.get("model" if is_ours(state) else "state_dict", state) if isinstance(state, dict) else {}
    same = not is_ours(state) or state.get("facts", {}).get("classes") == classes
    if not is_ours(state) and process.rank == 0:
        print(f"note: {args.init} names no classes: its first is taken for {classes[0]!r}, its last for "
              f"{classes[-1]!r}", flush=True)
    for key in list(found):
        name = str(key).removeprefix("module.")
        if name.startswith("classifier.") and not (same and len(found[key]) == len(own[name])):
            found[key] = own[name]          # changes `state`, which is loaded below
            if process.rank == 0:
                print(f"note: --init has other classes than --data: new {name}", flush=True)
    load_weights(model, state, load_official, f"--init {args.init} does not fit the model of these flags")


def train(args, process, train_set, eval_set):
    """Trains, evaluates after each epoch, and saves the run in --out."""
    world, N = process.world_size, len(train_set.y)
    steps_per_epoch = N // args.batch_size                  # the last, incomplete batch is dropped
    steps = args.epochs * steps_per_epoch
    run = Run(args, process, f"imagenet-{args.grad}", classes=train_set.classes, images=N,
              train_images=train_set.fingerprint(),
              may_differ="init workers radius_every radius_images compile recompute cuda_graph memory_format")
    model = build_model(args, len(train_set.classes), process)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, nesterov=True,
                                weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=1e-6)
    first_epoch, first_batch = 0, 0     # where training begins, or continues from a checkpoint
    score = {"last": math.nan, "best": -1.0, "best_epoch": 0,
             "measured_on": eval_set.fingerprint(sizes=args.data != "toy")}
    if run.state:
        model.load_state_dict(run.state["model"])
        optimizer.load_state_dict(run.state["optimizer"])
        scheduler.load_state_dict(run.state["scheduler"])
        first_epoch, first_batch = run.state["epoch"], run.state["batch"]
        if run.state["score"]["measured_on"] == score["measured_on"]:
            score = run.state["score"]          # otherwise the best epoch was found with other images
    elif args.init:
        initialise(args, model, train_set.classes, process)
    # This comes before DistributedDataParallel, because CUDA graphs capture the bare model.  It draws random
    # numbers, so it also comes before run.start, which seeds the generators.
    size = args.batch_size // world // args.accumulate
    training, net = training_pass(args, model, size, args.crop, process)
    if world > 1:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True,    # saves a copy of the gradients
                                      device_ids=[process.device] if torch.cuda.is_available() else None)
    parameters = sum(p.numel() for p in model.parameters())
    note = " (all are pretraining, without a solver: lower --pretrain-steps)" * (args.pretrain_steps >= steps)
    run.start(f"{parameters:,} parameters; {N} images to train on, {len(eval_set.y)} to evaluate on; "
              f"{args.epochs} epochs of {steps_per_epoch} steps{note}", parameters=parameters)
    meter, waited = Meter(process), 0.0

    def save(epoch, batch):
        """Saves the state after the first `batch` batches of this epoch."""
        run.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "score": score,
                  "scheduler": scheduler.state_dict(), "epoch": epoch, "batch": batch,
                  "step": epoch * steps_per_epoch + batch})

    for epoch in range(first_epoch, args.epochs):
        meter.reset()
        first = first_batch if epoch == first_epoch else 0
        for batch, micro_batches in training_batches(train_set, args, process, epoch, first):
            step = epoch * steps_per_epoch + batch + 1
            unroll = args.pretrain_layers if step <= args.pretrain_steps else 0
            for i, (x, y, seconds) in enumerate(micro_batches):
                meet = world == 1 or i == args.accumulate - 1       # average gradients once per step
                with contextlib.nullcontext() if meet else net.no_sync():
                    with autocast(args, process.device):
                        logits, residual = net(x, unroll=unroll) if unroll else net(x)  # graphs take only x
                    loss = F.cross_entropy(logits.float(), y)   # with --amp the logits are bf16
                    (loss / args.accumulate).backward()
                waited += seconds
                meter.add(len(y), loss=loss, accuracy=100 * (logits.argmax(1) == y).float().mean())
                if residual is not None:                    # there is none in pretraining
                    run.note_residuals(train=residual)
                    if args.grad == "implicit":
                        run.note_residuals(backward=training.backward_residual[:len(y)])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            lr = scheduler.get_last_lr()[0]                 # of this step
            scheduler.step()

            # --- The step ends here.  Diagnostics, logging and saving follow. ---
            if args.radius_every and step % args.radius_every == 0:
                with meter.paused():
                    run.report("radius", step=step, **radii(model, eval_set, args, process))
            saving, stop = run.due()    # by time or by a signal, the same on all processes
            saving = saving or batch + 1 == steps_per_epoch         # the evaluation may take long
            if saving or step % args.log_every == 0:
                data_wait = waited / (time.perf_counter() - meter.start)
                record, waited = meter.read(), 0.0                                              # host sync
                record["ms_per_step"] *= args.accumulate            # the meter counts micro-batches
                run.report("train", step=step, epoch=epoch + 1, lr=lr, **record, data_wait=data_wait)
            if saving:
                save(epoch, batch + 1)
                meter.reset()
            if stop:
                return run.stopped(step)

        record = evaluate(model, eval_set, args, process)
        score["last"] = record["val_top1"]
        if score["last"] > score["best"]:   # the first of equal scores stays
            score["best"], score["best_epoch"] = score["last"], epoch + 1
        run.report("epoch", step=(epoch + 1) * steps_per_epoch, epoch=epoch + 1, **record,
                   best_top1=score["best"], best_epoch=score["best_epoch"], **run.health(args.tol))
        save(epoch + 1, batch=0)
    if process.rank == 0:
        print(f"done: top-1 {score['last']:.2f} % after the last epoch; best epoch {score['best']:.2f} % "
              f"(epoch {score['best_epoch']}; chosen on the validation images); "
              f"{run.seconds / 60:.1f} minutes", flush=True)


# --- evaluation and diagnostics -----------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, images, args, process):
    """Accuracy (%), loss and the solver's health.  Each image counts once.  Always uses the solver."""
    process.broadcast_buffers(model)        # all use the first process's BatchNorm statistics
    model.eval()
    sums, residuals = torch.zeros(5, dtype=torch.float64, device=process.device), []
    for x, y in evaluation_batches(images, args, process):
        with autocast(args, process.device):
            logits, result = model(x, with_result=True)
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]               # (N, 5)
        sums[0] += hits[:, 0].sum()
        sums[1] += F.cross_entropy(logits, y, reduction="sum")
        sums[2] += len(y) * result.n_evals
        sums[3] += len(y)
        sums[4] += hits.sum()
        residuals.append(result.residual)
    model.train()
    top1, loss, evals, count, top5 = process.sum(sums).tolist()     # host sync
    return {"val_top1": 100 * top1 / count, "val_top5": 100 * top5 / count, "val_loss": loss / count,
            "val_evals": evals / count, "val_images": int(count),
            **health("val", residuals, args.tol, process)}


def evaluate_checkpoint(args, process, images):
    """--eval: evaluates the weights of --resume and prints the results."""
    state = load_checkpoint(args.resume)
    if is_ours(state):
        note_differences(state["args"], args, "solver max_iter tol crop resize", process)
        if state["facts"]["classes"] != images.classes:
            process.die(f"--resume {args.resume} is of a run with other classes than --data {args.data} has")
    elif process.rank == 0:
        print(f"note: {args.resume} names no classes: its first is taken for {images.classes[0]!r}, its last "
              f"for {images.classes[-1]!r}", flush=True)
    model = build_model(args, len(images.classes), process)
    load_weights(model, state, load_official, f"--resume {args.resume} does not fit the model of these flags")
    record = {**evaluate(model, images, args, process), **radii(model, images, args, process)}
    if process.rank == 0:
        print(f"{args.resume}: {args.solver}, at most {args.max_iter} iterations, tolerance {args.tol:g}; "
              f"{len(images.y)} images\n{spell(record)}")


@torch.no_grad()
def radii(model, images, args, process):
    """App. D: spectral radii of J and of lam J + (1 - lam) I at h*, in evaluation mode.  Leaves no trace.

    Returns means over some images of all classes, and the share of these with a radius of J above 1.
    """
    rng = rng_state()
    process.broadcast_buffers(model)
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=process.device)
    for x, _ in evaluation_batches(images, args, process, some=args.radius_images):
        with autocast(args, x.device):
            f, h0 = model.problem(x)
            h, _ = model.solve(f, h0)   # only solves, as grad is off
            rho, rho_lam = (spectral_radius(f, h, lam=lam, n_iter=50) for lam in (1.0, args.lam))
        sums += torch.stack([rho.sum(), rho_lam.sum(), (rho > 1).sum(), torch.ones_like(rho).sum()])
    model.train()
    set_rng_state(rng)
    rho, rho_lam, above, count = process.sum(sums).tolist()     # host sync
    return {"rho_J": rho / count, "rho_J_lam": rho_lam / count, "rho_J_above_1": above / count}


# --- benchmark ----------------------------------------------------------------------------------------------

def run_benchmark(args, process):
    """--benchmark: training steps by implicit, UPG and NPG on noise images, NPG's memory at k = 1 and 20."""
    side, classes = args.crop, 1000
    x = torch.randint(0, 256, (args.batch_size, 3, side, side), dtype=torch.uint8, device=process.device)
    y = torch.arange(args.batch_size, device=process.device) % classes
    x, model = prepare(x, args, process.device), build_model(args, classes, process)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)     # all steps are the same

    def row(grad, k, f=model.f):
        solve, net = functools.partial(model.solve, grad=grad, k=k, tol=0.0, backward_tol=0.0), None

        def forward():
            nonlocal net
            model.solve, model.f = solve, f
            if net is None:         # in the first turn, because CUDA graphs capture this solve
                _, net = training_pass(args, model, len(x), side, process)
            with autocast(args, process.device):
                return F.cross_entropy(net(x)[0].float(), y)

        return forward

    def finish():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    rows = {"implicit": row("implicit", args.k), "upg": row("upg", args.k),
            "upg, --recompute": row("upg", args.k, recomputed(model.f)), "npg": row("npg", args.k),
            **{f"npg, k = {k}": row("npg", k) for k in (1, 20)}}
    with torch.no_grad(), autocast(args, process.device):
        f, h0 = model.problem(x)
    benchmark(rows, finish, process, unit="images", n=len(y), h0=h0, f=autocast(args, process.device)(f),
              solve=functools.partial(SOLVERS[args.solver], max_iter=args.max_iter, tol=0.0),
              about=f"{sum(p.numel() for p in model.parameters()):,} parameters, images {tuple(x.shape)}, "
              f"{args.solver}: {args.max_iter} forward, {args.backward_solver}: {args.backward_max_iter} "
              f"backward iterations, k = {args.k}")


# --- main ---------------------------------------------------------------------------------------------------

def main(args):
    keep_freed_memory()
    process = init_process()
    if args.batch_size % (process.world_size * args.accumulate):
        process.die(f"--batch-size {args.batch_size} is not divisible by {process.world_size} process(es) x "
                    f"--accumulate {args.accumulate}")
    coarsest = args.crop // 2 ** (len(args.channels) + 1)       # side of the last branch
    if args.batch_size == process.world_size * args.accumulate and coarsest == 1:
        process.die(f"--batch-size {args.batch_size}: with --crop {args.crop} the coarsest branch is 1 x 1, "
                    "and BatchNorm then needs two images in each process and micro-batch")
    torch.backends.cudnn.allow_tf32 = not args.no_tf32      # only for convolutions: the solver uses float32
    torch.backends.cudnn.benchmark = True   # finds the fastest kernels once, as shapes repeat
    if args.benchmark:
        return run_benchmark(args, process)
    train_set, eval_set = process.first(lambda: load_images(args, process))
    if args.eval:
        evaluate_checkpoint(args, process, eval_set)
    else:
        train(args, process, train_set, eval_set)
    process.end()


if __name__ == "__main__":
    main(parse_args())
