"""MDEQ on CIFAR-10 with phantom gradients: "On Training Implicit Models" (NeurIPS 2021, arXiv:2111.05177).

MDEQ is a multiscale deep equilibrium model.  UPG A_{k,lam} differentiates through k steps from the solution
h*, damped by lam, Eq. (16).  NPG sums k terms of a Neumann series, Eq. (17).  The implicit gradient is exact.

    python mdeq_cifar.py                                     # Tiny, UPG A_{5,0.5}, downloads to data/cifar-10
    python mdeq_cifar.py --data toy                          # generated images: minutes on two CPU cores
    torchrun --nproc_per_node=4 mdeq_cifar.py --model large  # Large, UPG A_{5,0.5}: augmentation, 220 epochs
    python mdeq_cifar.py --benchmark                         # step time and memory of implicit, UPG and NPG
    python mdeq_cifar.py --eval --resume FILE                # evaluates our checkpoints and official ones

For Table 1 (Tiny, 50 epochs, batch 128, no augmentation), run python mdeq_cifar.py with the flags of a row.
The accuracies in % are the paper's.  Its backward solver is Broyden's method.  The default here is GMRES.
    1  85.0 +- 0.2  --grad implicit --backward-solver broyden --optimizer adam --dropout 0.25
                    --pretrain-steps 3000
    2  82.3 +- 1.3  --grad implicit --backward-solver broyden --optimizer adam --dropout 0.25
    3  83.7 +- 0.1  --grad implicit --backward-solver broyden --optimizer adam --pretrain-steps 3000
    4  84.5 +- 0.3  --grad implicit --backward-solver broyden --dropout 0.25 --pretrain-steps 3000
    5  82.9 +- 1.5  --grad implicit --backward-solver broyden --dropout 0.25
    6  85.8 +- 0.5  (none)
    7  85.6 +- 0.5  --grad npg
    8  86.1 +- 0.5  --k 9 --dropout 0.25
Table 3 (Large, 220 epochs, batch 128, augmentation):
       93.8 +- 0.17  --model large --grad implicit --backward-solver broyden --optimizer adam --weight-decay 0
                     --dropout 0.3 --pretrain-steps 20000
       95.0 +- 0.16  --model large
For Fig. 2, add --cosine-every 500 to row 1.  For Fig. 3, run assets/fig3.sh.  For the spectral radii of
App. D.2, add --radius-every 500.  The table rows have not been run yet.  Measurements are in
assets/results.md.

Differences from the paper and its release: The solver measures the residual and keeps the best iterate for
each image, not for the whole batch.  The first step of Broyden's method has the right sign, which the release
inverts.  NPG follows Eq. (17), not Algorithms 2 and 3.  BatchNorm sees all images of a process.  In the
official runs it sees 64 images per GPU (Large: 32).  As in the official CIFAR-10 code, weight-normalised
convolutions start from PyTorch's default, and all others from Normal(0, 0.01).
"""
import argparse
import functools
import hashlib
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

# Gives large CPU tensors pages of 2 MB.  MDEQ.f of Tiny at batch 128 is 1.05 to 1.4 times as fast on 2 cores.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # torch reads it at its first allocation

import torch
import torch.nn.functional as F         # in comments, F is the equilibrium module MDEQ.f
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm

from common import (Meter, Run, TrainingPass, add_run_flags, anderson, benchmark, broyden, captured,
                    compare_gradients, compiled, die, equilibrium, fixed_point, gmres, health,
                    image_folders, init_process, is_ours, keep_freed_memory, launched, load_checkpoint,
                    load_weights, make_parser, note_differences, parse_flags, read_image, recomputed,
                    rng_state, seed_everything, set_rng_state, spectral_radius, spell, upg, within)

SOLVERS = {"broyden": broyden, "anderson": anderson, "fixed-point": fixed_point, "gmres": gmres}
MODELS = {"tiny": dict(channels=(24, 24), head_channels=(8, 16), final_channels=200),
          "large": dict(channels=(32, 64, 128, 256), head_channels=(14, 28, 56, 112), final_channels=1680)}
# Defaults of options.  All but "toy" are from the official recipes.
PRESETS = {"tiny": dict(max_iter=22, backward_max_iter=24, epochs=50, augment="no"),
           "large": dict(max_iter=18, backward_max_iter=20, epochs=220, augment="yes"),
           "sgd": dict(lr=0.1, weight_decay=1e-4), "adam": dict(lr=0.001, weight_decay=2.5e-6),
           "toy": dict(epochs=4, batch_size=50, augment="no")}


def presets(args):
    toy = PRESETS["toy"] if args.data == "toy" else {}
    return {**PRESETS[args.model], **PRESETS[args.optimizer], **toy}


def parse_args(argv=None):
    p = make_parser("Trains an MDEQ on CIFAR-10.  Without options, it is Tiny with UPG A_{5,0.5} and SGD.  "
                    "PRESETS has the defaults of --model large and --data toy.")
    count, natural = within(int, "[1, inf)"), within(int, "[0, inf)")
    add = p.add_argument_group("data").add_argument     # a shorthand, one for each group
    add("--data", default="data/cifar-10", type=os.path.expanduser, help="folder of CIFAR-10 (downloaded if "
        "it is empty) or of images in train/CLASS/* and test/CLASS/*, or 'toy' for generated 16 x 16 images")
    add("--train-size", type=count, help="number of training images, equally many per class")
    add("--test-size", type=count, help="number of test images, equally many per class")
    add("--augment", choices=["yes", "no"], help="random crops after padding by 4, and horizontal flips")
    add = p.add_argument_group("model and equilibrium").add_argument
    add("--model", choices=list(MODELS), default="tiny", help="tiny has 158,986 parameters, large 11,098,398")
    add("--dropout", type=within(float, "[0, 1)"), default=0.0, help="probability of dropout in F")
    add("--pretrain-steps", type=natural, default=0, help="initial steps that unroll F instead of solving")
    add("--pretrain-layers", type=count, default=10, help="evaluations of F in each pretraining step")
    add("--grad", choices=["upg", "npg", "implicit", "bptt"], default="upg", help="how h* is differentiated")
    add("--k", type=count, default=5, help="steps of the phantom gradient")
    add("--lam", type=within(float, "(0, 1]"), default=0.5, help="damping of the phantom gradient")
    add("--solver", choices=["broyden", "anderson", "fixed-point"], default="broyden", help="solver for h*")
    add("--max-iter", type=count, help="maximum iterations of the solver")
    add("--tol", type=within(float, "[0, inf)"), default=0.0,
        help="relative residual at which an image counts as solved, or 0 to use all iterations")
    add("--backward-solver", choices=list(SOLVERS), default="gmres", help="solver for --grad implicit")
    add("--backward-max-iter", type=count, help="maximum iterations of the backward solver")
    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, help="passes over the training images")
    add("--batch-size", type=count, default=128, help="images per step over all processes")
    add("--optimizer", choices=["sgd", "adam"], default="sgd", help="SGD with momentum 0.9, or Adam")
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
        "with --tol 0 and without anderson)")
    add("--memory-format", choices=["contiguous", "channels-last"], help="layout of images and weights",
        default="contiguous" if torch.cuda.is_available() else "channels-last")
    add("--sync-bn", action="store_true", help="BatchNorm statistics over all processes (needs GPUs)")
    add = p.add_argument_group("diagnostics").add_argument
    add("--cosine-every", type=natural, default=0, help="steps between cosines of UPG, NPG and k steps of "
        "GMRES to the exact gradient (Fig. 2), or 0 for none")
    add("--radius-every", type=natural, default=0, help="steps between spectral radii of J = dF/dh and of "
        "lam J + (1 - lam) I on 64 test images (App. D.2), or 0 for none")
    add_run_flags(p, "MODEL-GRAD")
    args = parse_flags(p, argv, presets, "data train_size test_size model solver max_iter tol")  # for --eval
    if args.grad == "bptt" and args.solver != "fixed-point":
        p.error("--grad bptt differentiates the plain iteration: it needs --solver fixed-point")
    if args.recompute and args.grad not in ("upg", "bptt"):
        p.error(f"--recompute is for --grad upg and bptt: {args.grad} keeps only one graph of F")
    if (args.sync_bn or args.cuda_graph) and not torch.cuda.is_available():
        p.error(f"--{'sync-bn' if args.sync_bn else 'cuda-graph'} needs a GPU")
    waits = args.tol or "anderson" in (args.solver, args.backward_solver) or args.sync_bn
    if args.cuda_graph is None:
        args.cuda_graph = torch.cuda.is_available() and not waits and not launched()
    if args.cuda_graph and waits:
        p.error("--cuda-graph needs --tol 0, and neither anderson nor --sync-bn: a graph cannot wait")
    return args


# --- data: all images as uint8 on the device ----------------------------------------------------------------

class Images(NamedTuple):
    x: torch.Tensor         # (N, 3, S, S) uint8
    y: torch.Tensor         # (N,) int64
    classes: list           # class names

    def fingerprint(self):
        return hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in self[:2])).hexdigest()[:16]


def toy_images(n, seed, size=16):
    """Ten classes of noisy gratings: 5 orientations x 2 frequencies.  Place, phase and colour are random.

    The phase is uniform, so every class has the same mean image: a linear classifier stays near 10 %.
    """
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 10

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=rng)    # (N, *shape)

    angle = (y % 5 + uniform(-0.15, 0.15)) * torch.pi / 5
    frequency = torch.where(y < 5, 0.15, 0.28) * uniform(0.9, 1.1)              # (N,) cycles per pixel
    grid = torch.arange(size).float()
    dx = grid[None, None, :] - uniform(size / 4, 3 * size / 4, 1, 1)            # (N, 1, S)
    dy = grid[None, :, None] - uniform(size / 4, 3 * size / 4, 1, 1)            # (N, S, 1)
    along = dx * angle.cos()[:, None, None] + dy * angle.sin()[:, None, None]  # (N, S, S), across the stripes
    wave = torch.cos(2 * torch.pi * frequency[:, None, None] * along + uniform(0, 2 * torch.pi, 1, 1))
    wave = wave * torch.exp(-(dx ** 2 + dy ** 2) / (2 * (size / 4) ** 2))       # a Gaussian window
    colour = F.normalize(torch.randn(n, 3, generator=rng), dim=1)[:, :, None, None]
    noise = 20 * torch.randn(n, 3, size, size, generator=rng)
    x = uniform(90, 160, 3, 1, 1) + uniform(60, 120, 1, 1, 1) * colour * wave[:, None] + noise  # (N, 3, S, S)
    return Images(x.round().clamp(0, 255).to(torch.uint8), y, [str(c) for c in range(10)])


def decoded(classes, samples, process):
    """Decodes the images of a folder.  This happens at every start and takes 10 to 15 s for 60,000 images."""
    from torchvision.transforms.functional import pil_to_tensor
    if process.rank == 0:
        print(f"decoding {len(samples)} images", flush=True)
    x = torch.empty(len(samples), 3, 32, 32, dtype=torch.uint8)
    for i, (path, _) in enumerate(process.bar(samples, "decoding")):
        try:
            image = pil_to_tensor(read_image(path))
            if image.shape != (3, 32, 32):
                raise ValueError(f"its side must be 32, but its shape is {tuple(image.shape)}")
        except Exception as error:          # PIL raises half a dozen exception types for broken files
            die(f"--data: cannot use the image {path} ({error}); replace or remove it")
        x[i] = image
    return Images(x, torch.tensor([label for _, label in samples]), classes)


def balanced(images, size, flag):
    """The first size / C images of each of the C classes."""
    if size is None:
        return images
    C = len(images.classes)
    each, smallest = size // C, int(images.y.bincount(minlength=C).min())
    if size % C:
        die(f"{flag} {size}: must be a multiple of the {C} classes")
    if each > smallest:
        die(f"{flag} {size}: must be at most {C} x {smallest}, as the smallest class has {smallest} images")
    index = torch.cat([(images.y == c).nonzero()[:each, 0] for c in range(C)])  # sorted by class
    return images._replace(x=images.x[index], y=images.y[index])


def load_images(args, process):
    """(training images, test images) on the device."""
    root = Path(args.data)
    try:
        there = os.listdir(root) if os.path.isdir(root) else []
    except OSError as error:
        die(f"--data: cannot read {root} ({error.strerror})")
    if args.data == "toy":
        train_set, eval_set = toy_images(args.train_size or 2000, 1), toy_images(args.test_size or 1000, 2)
    elif "train" in there or there and not any(name.startswith("cifar-10-") for name in there):
        train_set, eval_set = (decoded(*f, process) for f in image_folders(root, process, "train", "test"))
    elif not root.is_dir() and root != Path("data/cifar-10"):
        die(f"--data {root}: there is no such folder; make it if CIFAR-10 is to be downloaded into it")
    else:
        from torchvision.datasets import CIFAR10
        try:
            sets = [CIFAR10(root, train=train, download=True) for train in (True, False)]
        except (OSError, RuntimeError, EOFError) as error:
            die(f"--data {root}: no CIFAR-10 there, and the download failed ({error}); give a folder with "
                "cifar-10-batches-py, or with train/CLASS/* and test/CLASS/*, or --data toy")
        train_set, eval_set = (
            Images(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(),       # (N, 3, 32, 32)
                   torch.tensor(s.targets), s.classes) for s in sets)
    train_set = balanced(train_set, args.train_size, "--train-size")
    eval_set = balanced(eval_set, args.test_size, "--test-size")
    N, last = len(train_set.y), len(train_set.y) % args.batch_size
    if not args.eval and (N < args.batch_size or 0 < last < process.world_size):
        die(f"--batch-size {args.batch_size}: there are only {N} training images, and the last batch of an "
            f"epoch must have one for each of {process.world_size} process(es)")
    if len(eval_set.y) < process.world_size:
        die(f"--data {args.data}: {len(eval_set.y)} evaluation image(s) for {process.world_size} processes")
    return [s._replace(x=s.x.to(process.device), y=s.y.to(process.device)) for s in (train_set, eval_set)]


def memory_format(args):
    return torch.channels_last if args.memory_format == "channels-last" else torch.contiguous_format


@functools.cache
def normalisation(device):
    """The channels' means and standard deviations.  They are sent to the device only once."""
    values = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]], device=device)
    return values[0, :, None, None], values[1, :, None, None]   # (3, 1, 1) each


def prepare(x, augment, memory_format):
    """uint8 (N, 3, S, S) -> normalised float32.  `augment` pads by 4 (black), crops and flips at random."""
    if augment:
        N, _, S, _ = x.shape
        x = F.pad(x, (4, 4, 4, 4))                                                  # (N, 3, S + 8, S + 8)
        offset = torch.randint(0, 9, (2, N, 1), device=x.device) + torch.arange(S, device=x.device)
        flip = torch.rand(N, 1, device=x.device) < 0.5  # (N, 1), a flip reads columns backwards
        rows, columns = offset[0], torch.where(flip, offset[1].flip(1), offset[1])  # (N, S) each
        n = torch.arange(N, device=x.device)[:, None, None]  # (N, 1, 1): one gather for all images
        x = x.permute(0, 2, 3, 1)[n, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    mean, std = normalisation(x.device)
    return ((x / 255.0 - mean) / std).contiguous(memory_format=memory_format)


def training_batches(images, args, process, epoch, first):
    """Yields (batch number, x, y, share) for this process, from batch `first` of the epoch on.

    The order depends only on --seed and the epoch.  DistributedDataParallel averages gradients over
    processes.  If each loss is multiplied by its `share`, this is the batch mean, also for unequal parts.
    """
    order = torch.Generator().manual_seed(args.seed + 1_000_003 * (epoch + 1))  # --resume can repeat it
    batches = torch.randperm(len(images.y), generator=order).to(process.device).split(args.batch_size)
    for batch in process.bar(range(first, len(batches)), f"epoch {epoch + 1}"):
        index = batches[batch].tensor_split(process.world_size)[process.rank]   # sizes differ by at most 1
        x = prepare(images.x[index], args.augment == "yes", memory_format(args))
        yield batch, x, images.y[index], process.world_size * len(index) / len(batches[batch])


def evaluation_batches(images, args, process, some=None):
    """Yields (x, y) of all images, or of `some` from all classes.  Each image goes to exactly one process."""
    # `some` images are taken at equal distances, because files may be sorted by class.
    n = len(images.y)
    m = min(some or n, n)
    chosen = torch.arange(m, device=process.device) * n // m
    own = chosen[process.rank::process.world_size].split(max(1, args.batch_size // process.world_size))
    for index in process.bar(own, "evaluating"):
        yield prepare(images.x[index], False, memory_format(args)), images.y[index]


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

    def __init__(self, channels=(24, 24), head_channels=(8, 16), final_channels=200, num_classes=10,
                 dropout=0.0, stem_strides=0, groups=8, expansion=5,
                 solve=functools.partial(equilibrium, max_iter=22, tol=0.0, stop_mode="rel_joint",
                                         backward_max_iter=24, backward_tol=0.0)):
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
        for module in self.modules():       # as in the official code, without weight-normalised convolutions
            if isinstance(module, nn.Conv2d) and not nn.utils.parametrize.is_parametrized(module):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.01)

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
    model = MDEQ(**MODELS[args.model], num_classes=classes, dropout=args.dropout, solve=solve)
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


def train(args, process, train_set, eval_set):
    """Trains, evaluates after each epoch, and saves the run in --out."""
    world, N = process.world_size, len(train_set.y)
    steps_per_epoch = math.ceil(N / args.batch_size)        # the last, incomplete batch is kept
    steps = args.epochs * steps_per_epoch
    run = Run(args, process, f"{args.model}-{args.grad}", classes=train_set.classes, images=N,
              train_images=train_set.fingerprint(),
              may_differ="cosine_every radius_every compile recompute cuda_graph memory_format")
    model = build_model(args, len(train_set.classes), process)
    kind = functools.partial(torch.optim.SGD, momentum=0.9) if args.optimizer == "sgd" else torch.optim.Adam
    optimizer = kind(model.parameters(), args.lr, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=1e-6)
    first_epoch, first_batch = 0, 0     # where training begins, or continues from a checkpoint
    score = {"last": math.nan, "best": -1.0, "best_epoch": 0, "measured_on": eval_set.fingerprint()}
    if run.state:
        model.load_state_dict(run.state["model"])
        optimizer.load_state_dict(run.state["optimizer"])
        scheduler.load_state_dict(run.state["scheduler"])
        first_epoch, first_batch = run.state["epoch"], run.state["batch"]
        if run.state["score"]["measured_on"] == score["measured_on"]:
            score = run.state["score"]          # otherwise the best epoch was found with other images
    # This comes before DistributedDataParallel, because CUDA graphs capture the bare model.  It draws random
    # numbers, so it also comes before run.start, which seeds the generators.
    training, net = training_pass(args, model, args.batch_size // world, train_set.x.shape[-1], process)
    if world > 1:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True,    # saves a copy of the gradients
                                      device_ids=[process.device] if torch.cuda.is_available() else None)
    parameters = sum(p.numel() for p in model.parameters())
    note = " (all are pretraining, without a solver: lower --pretrain-steps)" * (args.pretrain_steps >= steps)
    run.start(f"{parameters:,} parameters; {N} images to train on, {len(eval_set.y)} to evaluate on; "
              f"{args.epochs} epochs of {steps_per_epoch} steps{note}", parameters=parameters)
    meter = Meter(process)

    def save(epoch, batch):
        """Saves the state after the first `batch` batches of this epoch."""
        run.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "score": score,
                  "scheduler": scheduler.state_dict(), "epoch": epoch, "batch": batch,
                  "step": epoch * steps_per_epoch + batch})

    for epoch in range(first_epoch, args.epochs):
        meter.reset()
        first = first_batch if epoch == first_epoch else 0
        for batch, x, y, share in training_batches(train_set, args, process, epoch, first):
            step = epoch * steps_per_epoch + batch + 1
            unroll = args.pretrain_layers if step <= args.pretrain_steps else 0
            with autocast(args, process.device):
                logits, residual = net(x, unroll=unroll) if unroll else net(x)  # graphs take only x
            loss = F.cross_entropy(logits.float(), y)   # with --amp the logits are bf16
            (share * loss).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            lr = scheduler.get_last_lr()[0]                 # of this step
            scheduler.step()

            # --- The step ends here.  Diagnostics, logging and saving follow. ---
            meter.add(len(y), loss=loss, accuracy=100 * (logits.argmax(1) == y).float().mean())
            if residual is not None:                        # there is none in pretraining
                run.note_residuals(train=residual)
                if args.grad == "implicit":
                    run.note_residuals(backward=training.backward_residual[:len(y)])
            if args.cosine_every and step % args.cosine_every == 0:
                with meter.paused():
                    run.report("cosine", step=step, **gradient_cosines(model, x, y, args))
            if args.radius_every and step % args.radius_every == 0:
                with meter.paused():
                    run.report("radius", step=step, **radii(model, eval_set, args, process))
            saving, stop = run.due()    # by time or by a signal, the same on all processes
            saving = saving or batch + 1 == steps_per_epoch         # the evaluation may take long
            if saving or step % args.log_every == 0:
                run.report("train", step=step, epoch=epoch + 1, lr=lr, **meter.read())          # host sync
            if saving:
                save(epoch, batch + 1)
                meter.reset()
            if stop:
                return run.stopped(step)

        record = evaluate(model, eval_set, args, process)
        score["last"] = record["test_accuracy"]
        if score["last"] > score["best"]:   # the first of equal scores stays
            score["best"], score["best_epoch"] = score["last"], epoch + 1
        run.report("epoch", step=(epoch + 1) * steps_per_epoch, epoch=epoch + 1, **record,
                   best_accuracy=score["best"], best_epoch=score["best_epoch"], **run.health(args.tol))
        save(epoch + 1, batch=0)
    if process.rank == 0:
        print(f"done: test accuracy {score['last']:.2f} % after the last epoch; best epoch "
              f"{score['best']:.2f} % (epoch {score['best_epoch']}; chosen on the test images, as the paper "
              f"does); {run.seconds / 60:.1f} minutes", flush=True)


# --- evaluation and diagnostics -----------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, images, args, process):
    """Accuracy (%), loss and the solver's health.  Each image counts once.  Always uses the solver."""
    process.broadcast_buffers(model)        # all use the first process's BatchNorm statistics
    model.eval()
    sums, residuals = torch.zeros(4, dtype=torch.float64, device=process.device), []
    for x, y in evaluation_batches(images, args, process):
        with autocast(args, process.device):
            logits, result = model(x, with_result=True)
        logits = logits.float()
        sums[0] += (logits.argmax(1) == y).sum()
        sums[1] += F.cross_entropy(logits, y, reduction="sum")
        sums[2] += len(y) * result.n_evals
        sums[3] += len(y)
        residuals.append(result.residual)
    model.train()
    correct, loss, evals, count = process.sum(sums).tolist()    # host sync
    return {"test_accuracy": 100 * correct / count, "test_loss": loss / count, "test_evals": evals / count,
            **health("test", residuals, args.tol, process)}


def evaluate_checkpoint(args, process, images):
    """--eval: evaluates the weights of --resume and prints the results."""
    state = load_checkpoint(args.resume)
    if is_ours(state):
        note_differences(state["args"], args, "solver max_iter tol", process)
        if state["facts"]["classes"] != images.classes:
            process.die(f"--resume {args.resume} is of a run with other classes than --data {args.data} has")
    elif process.rank == 0:
        print(f"note: {args.resume} names no classes: its first is taken for {images.classes[0]!r}, its last "
              f"for {images.classes[-1]!r}", flush=True)
    model = build_model(args, len(images.classes), process)
    load_weights(model, state, load_official, f"--resume {args.resume} does not fit the model of these flags")
    record = evaluate(model, images, args, process)
    if process.rank == 0:
        print(f"{args.resume}: {args.solver}, at most {args.max_iter} iterations, tolerance {args.tol:g}; "
              f"{len(images.y)} images\n{spell(record)}")


def gradient_cosines(model, x, y, args):
    """Fig. 2: cosines of UPG, NPG and k steps of GMRES to the exact gradient, over the parameters of F.

    All are taken at the same h* of this process's images.  GMRES solves for the exact gradient to 1e-3, with
    at most 200 products with the Jacobian.  `cosine_verified` is the share of images whose forward and
    backward residuals are at most 1e-3.  The medians of both are returned, too.  Leaves no trace.
    """
    buffers, rng = [b.clone() for b in model.buffers()], rng_state()
    of_f = [p for name, p in model.named_parameters() if name.startswith(("blocks", "fuse", "post"))]
    with autocast(args, x.device):
        f, h0 = model.problem(x)
        found = compare_gradients(
            f, h0, lambda h: F.cross_entropy(model.head(h).float(), y), of_f,
            [(grad, args.k, args.lam) for grad in ("upg", "npg", "implicit")], radius_iter=0, tol=args.tol,
            max_iter=args.max_iter, solver=functools.partial(SOLVERS[args.solver], stop_mode="rel_joint"))
    set_rng_state(rng)
    for buffer, old in zip(model.buffers(), buffers):       # BatchNorm has counted this batch several times
        buffer.copy_(old)
    upg, npg, gmres = (row["cosine"] for row in found["rows"])
    return {"cosine_upg": upg, "cosine_npg": npg, "cosine_gmres": gmres, "cosine_verified": found["exact"],
            "cosine_forward_residual": found["forward_residual"].median().item(),
            "cosine_backward_residual": found["backward_residual"].median().item()}


@torch.no_grad()
def radii(model, images, args, process):
    """App. D: spectral radii of J and of lam J + (1 - lam) I at h*, in evaluation mode.  Leaves no trace.

    Returns means over some images of all classes, and the share of these with a radius of J above 1.
    """
    rng = rng_state()
    process.broadcast_buffers(model)
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=process.device)
    for x, _ in evaluation_batches(images, args, process, some=64):
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
    side, classes = 16 if args.data == "toy" else 32, 10
    x = torch.randint(0, 256, (args.batch_size, 3, side, side), dtype=torch.uint8, device=process.device)
    y = torch.arange(args.batch_size, device=process.device) % classes
    x, model = prepare(x, False, memory_format(args)), build_model(args, classes, process)
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
    if args.batch_size % process.world_size:
        process.die(f"--batch-size {args.batch_size} is not divisible by {process.world_size} process(es)")
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
