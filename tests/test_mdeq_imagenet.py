"""mdeq_imagenet.py: the model's twin in mdeq_cifar.py, data, wrong input, training, kill, resume.

Narrow models on small images; SIGKILL and SIGTERM are sent to real processes, also to one of torchrun's two.
"""
import functools
import inspect
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import make_mdeq_example as reference
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import Forked, pair, script
from test_mdeq import zoo_imagenet
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import common
import mdeq_cifar
import mdeq_imagenet
from common import Process, equilibrium, seed_everything
from mdeq_imagenet import MDEQ, Images, load_images, load_official, main, parse_args, prepare, training_keys

ROOT = Path(mdeq_imagenet.__file__).parent
SCRIPT = ROOT / "mdeq_imagenet.py"
CPU = Process(0, 1, torch.device("cpu"))
NARROW = "--channels 8 16 --head-channels 4 8 --final-channels 16".split()
SMALL_RUN = [*NARROW,
             *"--crop 32 --resize 36 --batch-size 8 --max-iter 3 --backward-max-iter 3 --k 2 --workers 0 "
             "--epochs 1 --log-every 1 --radius-images 4".split()]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
CLASSES, TRAIN, VAL = 7, 42, 7  # of the small images: 5 steps of 8 and 2 left over; top-5 is not all classes


@pytest.fixture(autouse=True)
def a_process_of_its_own(monkeypatch):
    """The script takes over signals and reads torchrun's variables; runs in this process are on the CPU."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def make_folder(root, classes=CLASSES, train=TRAIN, val=VAL):
    """root/train/CLASS/*.JPEG and root/val/CLASS/*.JPEG: blotches of random colours, sides of 40 to 60."""
    rng = torch.Generator().manual_seed(0)
    for split, n in (("train", train), ("val", val)):
        for i in range(n):
            folder = root / split / f"class{i % classes}"
            folder.mkdir(parents=True, exist_ok=True)
            blotches = torch.randint(0, 256, (9, 8, 3), dtype=torch.uint8, generator=rng)
            size = torch.randint(40, 61, (2,), generator=rng).tolist()
            Image.fromarray(blotches.numpy()).resize(size, Image.BILINEAR).save(folder / f"{i:03d}.JPEG")
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small images; no test may change them."""
    return make_folder(tmp_path_factory.mktemp("images") / "small")


def run(*flags):
    """The script in this process."""
    main(parse_args([str(flag) for flag in flags]))


def metrics(out, event):
    records = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == event]


def refused(capsys, *flags, code=2):
    """Runs the script, which must end with this exit code; its last line on stderr, the message."""
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    assert stop.value.code == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert "error: " in lines[-1] and not any("Traceback" in line for line in lines)
    return lines[-1]


def checkpoint(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def assert_same_end(a, b):
    """Weights, BatchNorm statistics, momenta, schedule and results equal bit for bit."""
    assert all(a[key] == b[key] for key in ("step", "epoch", "batch", "score", "scheduler"))
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    momenta = [[s["momentum_buffer"] for s in c["optimizer"]["state"].values()] for c in (a, b)]
    assert len(momenta[0]) > 50 and all(torch.equal(x, y) for x, y in zip(*momenta, strict=True))
    assert len(a["rng"]) == len(b["rng"])
    assert all(torch.equal(x["torch"], y["torch"]) for x, y in zip(a["rng"], b["rng"]))


# --- the model ----------------------------------------------------------------------------------------------

TWINS = ("conv", "ResidualBlock", "Bottleneck", "fusion", "load_official", "autocast", "memory_format",
         "training_pass", "MDEQ.inject", "MDEQ.zeros", "MDEQ.weights",
         "MDEQ.masks", "MDEQ.f", "MDEQ.head", "MDEQ.problem", "MDEQ.forward")


@pytest.mark.parametrize("name", TWINS)
def test_what_both_scripts_have_is_written_alike(name):
    """Each script is whole by itself; a correction of one that the other did not get would show here."""
    ours, theirs = mdeq_imagenet, mdeq_cifar
    for part in name.split("."):
        ours, theirs = getattr(ours, part), getattr(theirs, part)
    assert inspect.getsource(ours) == inspect.getsource(theirs)


def test_the_model_is_that_of_mdeq_cifar_with_a_strided_stem():
    """What is not written alike are first weights and defaults: the same keys and logits, bit for bit."""
    shape = dict(channels=(8, 16, 8), head_channels=(4, 8, 4), final_channels=16, num_classes=7,
                 solve=functools.partial(equilibrium, max_iter=4, tol=0.0))
    torch.manual_seed(0)
    ours, theirs = MDEQ(**shape).eval(), mdeq_cifar.MDEQ(**shape, stem_strides=2).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 3, 48, 32)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_without_flags_the_model_is_the_papers():
    """16,808,936 parameters, 14,199 numbers in buffers, as in the official classes; sides 56, 28, 14, 7."""
    args = parse_args([])
    with torch.device("meta"):
        model = mdeq_imagenet.build_model(args, 1000, Process(0, 1, torch.device("meta")))

        def count(*modules):
            return sum(p.numel() for module in modules for p in module.parameters())

        assert count(model) == 16_808_936 and sum(b.numel() for b in model.buffers()) == 14_199
        assert [count(model.stem), count(model.injection), count(model.final), count(model.classifier)] == [
            10_208, 1_088, 1_579_008, 2_049_000]
        assert [count(block) for block in model.blocks] == [92_800, 369_920, 1_477_120, 5_903_360]
        assert [count(*pair) for pair in zip(model.post, model.post_gn)] == [1_120, 4_288, 16_768, 66_304]
        assert [count(b) for b in model.bottlenecks] == [11_520, 45_696, 182_016, 726_528]
        assert [count(d) for d in model.down] == [166_464, 664_704, 2_656_512]
        assert [[count(path) for path in row] for row in model.fuse] == [
            [0, 2_112, 4_160, 8_256], [18_560, 0, 8_320, 16_512], [46_400, 73_984, 0, 33_024],
            [92_800, 184_960, 295_424, 0]]
        state = model.zeros(model.inject(torch.empty(2, 3, args.crop, args.crop)))
    assert [h.shape[1:] for h in state] == [(32, 56, 56), (64, 28, 28), (128, 14, 14), (256, 7, 7)]
    assert sum(h[0].numel() for h in state) == 188_160


def test_without_flags_the_recipe_is_the_papers(tmp_path, small):
    """App. D.3, setting 2: UPG A_{5,0.6}, Broyden 26, SGD 0.05, Nesterov 0.9, 5e-5, cosine to 1e-6."""
    args = parse_args([])
    assert (args.grad, args.k, args.lam, args.solver, args.max_iter, args.tol, args.pretrain_steps,
            args.pretrain_layers) == ("upg", 5, 0.6, "broyden", 26, 0.0, 0, 5)
    assert (args.backward_solver, args.backward_max_iter) == ("gmres", 27)
    assert (args.epochs, args.batch_size, args.lr, args.weight_decay, args.dropout, args.crop,
            args.resize) == (
        100, 128, 0.05, 5e-5, 0.0, 224, 256)
    run(*SMALL_RUN, "--data", small, "--out", tmp_path)
    (group,), schedule = checkpoint(tmp_path)["optimizer"]["param_groups"], checkpoint(tmp_path)["scheduler"]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 5e-5)
    assert len(group["params"]) == len(list(MDEQ(channels=(8, 16), head_channels=(4, 8)).parameters()))
    assert (schedule["T_max"], schedule["eta_min"], schedule["base_lrs"]) == (5, 1e-6, [0.05])
    expected = [1e-6 + (0.05 - 1e-6) * (1 + math.cos(t * math.pi / 5)) / 2 for t in range(5)]
    assert [r["lr"] for r in metrics(tmp_path, "train")] == pytest.approx(expected, rel=1e-5)
    assert torch.backends.cudnn.allow_tf32


def test_convolutions_begin_with_pytorchs_defaults():
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): standard deviation 1/sqrt(3 fan_in), not 0.01.

    5000 numbers or more each: the standard deviation is known to 1 %.
    """
    torch.manual_seed(0)
    model, seen = MDEQ(num_classes=10), 0
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or module.weight.numel() < 5000:
            continue
        fan_in, seen = module.weight[0].numel(), seen + 1
        for values in (module.weight,
                       *([module.bias] if module.bias is not None and len(module.bias) > 1000 else [])):
            assert values.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)
            assert values.abs().max().item() <= fan_in ** -0.5 + 1e-6
    assert seen == 41
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)


class ChannelsLastGradient(torch.autograd.Function):
    """A copy; its gradient has the strides of a kernel in channels-last format."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.ones(g.numel()).as_strided(g.shape, (g.shape[1], 1, g.shape[1], g.shape[1]))


@pytest.mark.parametrize("module", [mdeq_cifar, mdeq_imagenet])
def test_gradients_have_the_strides_of_their_1_x_1_kernels(module):
    """Whatever an operator gives them, as on a GPU channels-last ones: else DistributedDataParallel warns."""
    args = module.parse_args(["--data", "toy", "--memory-format", "channels-last"])
    model = module.build_model(args, 10, CPU)
    kernels = [p for p in model.parameters() if p.dim() == 4 and p[0, 0].numel() == 1]
    for p in kernels:
        ChannelsLastGradient.apply(p).sum().backward()
        assert p.grad.stride() == p.stride() == (p.shape[1], 1, 1, 1)
    assert len(kernels) > 8


def test_image_sides_that_do_not_halve_evenly_are_refused():
    model = MDEQ(channels=(8, 8), head_channels=(4, 4), final_channels=16)
    with pytest.raises(ValueError, match="divisible by 8"):
        model.inject(torch.zeros(1, 3, 32, 36))


# --- data: order --------------------------------------------------------------------------------------------

def micro_batches(n=50, world=1, accumulate=1, epoch=0, step=0, seed=0, batch=12):
    """[step][rank][micro-batch] -> keys, from step `step` on."""
    args = parse_args(["--batch-size", str(batch), "--accumulate", str(accumulate), "--seed", str(seed)])
    ranks = [list(training_keys(n, args, Process(rank, world, torch.device("cpu")), epoch, step))
             for rank in range(world)]
    return [[own[i:i + accumulate] for own in ranks] for i in range(0, len(ranks[0]), accumulate)]


def flat(steps):
    return [[key for own in step for micro in own for key in micro] for step in steps]


@pytest.mark.parametrize("world, accumulate", [(2, 1), (1, 2), (2, 2), (3, 4), (12, 1)])
def test_processes_and_micro_batches_divide_the_same_steps(world, accumulate):
    """Keys (images with their augmentation) of a step: contiguous equal parts of the single process's."""
    whole, parts = micro_batches(epoch=3), micro_batches(epoch=3, world=world, accumulate=accumulate)
    assert flat(parts) == flat(whole) and len(whole) == 4  # the last, incomplete batch is dropped
    assert {len(micro) for step in parts for own in step for micro in own} == {12 // world // accumulate}


def test_an_epoch_is_a_permutation_and_the_next_is_another():
    epochs = [[i for step in flat(micro_batches(n=48, epoch=epoch)) for i, _ in step] for epoch in range(2)]
    assert all(sorted(epoch) == list(range(48)) for epoch in epochs)
    other = [i for step in flat(micro_batches(n=48, seed=1)) for i, _ in step]
    assert len({tuple(epochs[0]), tuple(epochs[1]), tuple(other), tuple(range(48))}) == 4


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 2)])
def test_a_resumed_epoch_has_the_same_rest(world, accumulate):
    for step in range(5):
        rest = micro_batches(epoch=2, world=world, accumulate=accumulate, step=step)
        assert rest == micro_batches(epoch=2, world=world, accumulate=accumulate)[step:]


def test_no_image_is_augmented_alike_in_two_epochs_or_under_two_seeds():
    """The number that decides a crop differs between all images, epochs 0 to 99 and seeds 0 and 1."""
    seeds = [seed for run in (0, 1) for epoch in range(100)
             for step in flat(micro_batches(48, epoch=epoch, seed=run)) for _, seed in step]
    assert len(set(seeds)) == len(seeds) == 2 * 100 * 48
    assert all(0 <= seed < 2 ** 32 for seed in seeds)


# --- data: pixels -------------------------------------------------------------------------------------------

def read(small, workers, epoch=0, seed=0):
    """{image: pixels} of an epoch, through the training's loader."""
    args = parse_args([*SMALL_RUN, "--data", str(small), "--workers", str(workers), "--seed", str(seed)])
    images, _ = load_images(args, CPU)
    keys = list(training_keys(TRAIN, args, CPU, epoch, first=0))
    x = torch.cat([x for x, _, _ in mdeq_imagenet.read(images, keys, args, CPU)])
    return {i: one for i, one in sorted(zip((i for micro_batch in keys for i, _ in micro_batch), x))}


def test_augmentation_depends_on_seed_epoch_and_image_alone(small):
    """The same pixels with 0 and 2 worker processes; all others in the next epoch and with another seed.

    Reading in this process leaves its generators alone: dropout masks do not depend on --workers.
    """
    seed_everything(5)
    before = torch.get_rng_state(), random.getstate()
    first = read(small, 0)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    torch.rand(1)
    again = read(small, 2)
    assert first.keys() == again.keys() and all(torch.equal(first[i], again[i]) for i in first)
    for other in (read(small, 0, epoch=1), read(small, 0, seed=1)):
        common = first.keys() & other.keys()
        assert len(common) > 30 and not any(torch.equal(first[i], other[i]) for i in common)


def test_random_crops_have_10_to_100_percent_of_the_area_and_aspects_of_4_to_5():
    """Measured: red and green of a test image are its coordinates, so a crop's corners tell where it was cut.

    The means: area uniform, 0.55 less what does not fit; half are mirrored.  400 images: 0.1 is 4 deviations.
    """
    args = parse_args(["--data", "toy", "--crop", "64", "--resize", "72"])
    ramp = torch.arange(256, dtype=torch.uint8)
    image = Image.fromarray(torch.stack([ramp.expand(256, 256), ramp[:, None].expand(256, 256),
                                         torch.zeros(256, 256, dtype=torch.uint8)], dim=2).numpy())
    images = Images([("x", 0)] * 400, ["a"], lambda _: image, load_images(args, CPU)[0].transform)
    x = torch.stack([images[i, i][0] for i in range(400)]).double()
    width = (x[:, 0, 32, 60] - x[:, 0, 32, 3]) * 64 / 57
    height = (x[:, 1, 60, 32] - x[:, 1, 3, 32]) * 64 / 57
    area, aspect = (width.abs() * height).div(256 ** 2), width.abs() / height
    assert 0.08 < area.min() < 0.15 and 0.85 < area.max() < 1.03 and 0.4 < area.mean() < 0.6
    assert 0.77 < aspect.min() < 0.82 and 1.22 < aspect.max() < 1.29 and (height > 0).all()
    assert 0.4 < (width < 0).double().mean() < 0.6
    left, top = x[:, 0, 32].min(dim=1).values, x[:, 1, :, 32].min(dim=1).values
    room = (width.abs() < 200) & (height < 200)
    for start, size in ((left, width.abs()), (top, height)):  # the place is uniform over where it fits
        assert 0.4 < (start / (256 - size))[room].mean() < 0.6
    random_crop, flip, _ = images.transform.transforms
    assert (random_crop.scale, random_crop.ratio, flip.p) == ((0.1, 1.0), (0.8, 1.25), 0.5)


def test_evaluation_takes_the_centre_of_the_resized_image(tmp_path):
    """75 x 53 to 50 x 36 by PIL, then the central 32 x 32; the same for training images with --augment no."""
    make_folder(tmp_path, classes=1, train=8, val=8)
    noise = torch.randint(0, 256, (53, 75, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for split in ("train", "val"):
        Image.fromarray(noise.numpy()).save(tmp_path / split / "class0" / "a.png")
    for resize, size, (left, top) in ((36, (50, 36), (9, 2)), (53, (75, 53), (22, 10))):
        resized = Image.fromarray(noise.numpy()).resize(size, Image.BILINEAR)
        expected = resized.crop((left, top, left + 32, top + 32))
        args = parse_args([*SMALL_RUN, "--data", str(tmp_path), "--resize", str(resize), "--augment", "no"])
        for images in load_images(args, CPU):
            index = next(i for i, path in enumerate(images.paths) if path.endswith(b"a.png"))
            x, label = images[index, 3]
            assert label == 0 and x.dtype == torch.uint8 and torch.equal(x, pil_to_tensor(expected))


@pytest.mark.parametrize("mode, kind",
                         [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "png"), ("RGBA", "png"), ("1", "png")])
def test_files_of_every_mode_become_three_channels(mode, kind, tmp_path):
    """ImageNet has grey and CMYK JPEGs, and a PNG under the name of a JPEG."""
    make_folder(tmp_path, classes=1, train=8, val=1)
    colours = Image.open(tmp_path / "val" / "class0" / "000.JPEG").resize((32, 32))
    path = tmp_path / "val" / "class0" / "000.JPEG"
    colours.convert(mode).save(path, format=kind)
    _, val_set = load_images(parse_args([*SMALL_RUN, "--data", str(tmp_path), "--resize", "32"]), CPU)
    with Image.open(path) as saved:
        assert saved.mode == mode and torch.equal(val_set[0, 0][0], pil_to_tensor(saved.convert("RGB")))


def test_labels_are_the_sorted_class_folders(small):
    sets = load_images(parse_args([*SMALL_RUN, "--data", str(small)]), CPU)
    assert [len(images.y) for images in sets] == [TRAIN, VAL]
    for images in sets:
        assert images.classes == [f"class{c}" for c in range(CLASSES)]
        names = [Path(os.fsdecode(path)).parent.name for path in images.paths]
        assert names == [f"class{label}" for label in images.y]


MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of ImageNet's channels


def test_images_are_normalised_by_the_statistics_of_ImageNet():
    x = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    expected = ((x.double() / 255).permute(0, 2, 3, 1) - MEAN) / STD
    for name in ("contiguous", "channels-last"):
        args = parse_args(["--memory-format", name])
        got = prepare(x, args, CPU.device)
        assert got.is_contiguous(memory_format=mdeq_imagenet.memory_format(args))
        assert got.dtype == torch.float32
        assert (got.permute(0, 2, 3, 1) - expected).abs().max() < 1e-6


def toy(crop=32, resize=36):
    """((x, y) of the training images, (x, y) of the validation images): central crops."""
    args = parse_args(["--data", "toy", "--augment", "no", "--crop", str(crop), "--resize", str(resize)])
    return [(torch.stack([images[i, 0][0] for i in range(len(images.y))]), torch.tensor(images.y))
            for images in load_images(args, CPU)]


def test_toy_images_cannot_be_told_apart_by_a_linear_classifier():
    """800 and 200, the same every time, balanced.  Logistic regression stays below 40 % (guessing: 10 %)."""
    (x, y), (x_val, y_val) = toy()
    assert len(y) == 800 and len(y_val) == 200 and x.dtype == torch.uint8 and x.shape[1:] == (3, 32, 32)
    assert y.bincount().tolist() == [80] * 10 and y_val.bincount().tolist() == [20] * 10
    assert torch.equal(toy()[1][0], x_val) and not torch.equal(x[:200], x_val)
    x, x_val = (prepare(images, parse_args([]), CPU.device).flatten(1) for images in (x, x_val))
    weight, bias = torch.zeros(10, x.shape[1], requires_grad=True), torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.003)
    for _ in range(100):
        loss = F.cross_entropy(F.linear(x, weight, bias), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.0  # it has learnt the training images
    assert (F.linear(x_val, weight, bias).argmax(1) == y_val).float().mean() < 0.4


# --- unreadable files ---------------------------------------------------------------------------------------

def break_file(root, split, kind):
    """One file of the split is cut short, or is no image; returns its path."""
    path = sorted((root / split).rglob("*.JPEG"))[3]
    path.write_bytes(path.read_bytes()[:300] if kind == "truncated" else b"<html>not found</html>")
    return path


@pytest.mark.parametrize("split, kind, workers",
                         [("train", "truncated", 0), ("train", "text", 2), ("val", "text", 0),
                                                  ("val", "truncated", 2)])
def test_an_unreadable_file_is_named_and_ends_the_run(split, kind, workers, tmp_path, capsys):
    """In one line, also where a worker process met it."""
    make_folder(tmp_path / "data", train=40)        # of 42 training images two would be in no step
    path = break_file(tmp_path / "data", split, kind)
    message = refused(capsys, *SMALL_RUN, "--data", tmp_path / "data", "--workers", workers, "--out",
                      tmp_path / "run")
    assert message.startswith(f"error: --data: cannot read the image {path} (") and "remove it" in message


@pytest.fixture(scope="module")
def ends(small, tmp_path_factory):
    """{last line of a program: (exit code, stderr)}: a Python with the script imported, forked for each."""
    folder = tmp_path_factory.mktemp("ends")
    lasts = ["", "raise RuntimeError('no memory')", "raise KeyboardInterrupt"]
    program = f"""
import os, sys, torch, mdeq_imagenet as m
from common import Process
args = m.parse_args([*{NARROW!r}, '--data', {str(small)!r}, '--crop', '32', '--resize', '36',
                     '--workers', '2', '--batch-size', '8'])
train, val = m.load_images(args, process := Process(0, 1, torch.device('cpu')))
codes = []
for last in {lasts!r}:
    if (pid := os.fork()):
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    else:
        os.dup2(os.open(f"{folder}/{{len(codes)}}", os.O_WRONLY | os.O_CREAT), 2)
        sys.kept = m.read(val, [[(0, 0)], [(1, 0)]], args, process)
        next(sys.kept)
        exec(last)
        break
else:
    print(codes)
"""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, env=ENVIRONMENT,
                               text=True,
                               stdout=subprocess.PIPE, start_new_session=True)
    try:
        codes = json.loads(process.communicate(timeout=60)[0])
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return {last: (code, (folder / str(i)).read_text()) for i, (last, code) in enumerate(zip(lasts, codes))}


@pytest.mark.parametrize("last, codes, printed", [
    ("", [0], ""), ("raise RuntimeError('no memory')", [1], "RuntimeError: no memory"),
    ("raise KeyboardInterrupt", [-signal.SIGINT, 1], "KeyboardInterrupt")])         # 1: python 3.12's `-c`
def test_workers_never_keep_a_process_from_ending(last, codes, printed, ends):
    """They ignore SIGTERM, by which Python ends those that still exist at exit as something holds them.

    A rank that hangs after its traceback would never be restarted by torchrun.
    """
    assert ends[last][0] in codes and ends[last][1].strip().split("\n")[-1] == printed


# --- wrong flags and wrong data -----------------------------------------------------------------------------

@pytest.mark.parametrize("flags, named", [
    ("--crop 225", "--crop 225"), ("--crop 36 --resize 40", "--crop 36"), ("--crop 64", "--resize 36"),
    ("--channels 8 12", "--channels"), ("--channels 4 8", "--channels"),
    ("--channels 8 --head-channels 4", "two or more"), ("--head-channels 4", "--head-channels"),
    ("--head-channels 4 0", "--head-channels"), ("--k 0", "--k"), ("--lam 0", "--lam"),
    ("--lam nan", "--lam"),
    ("--lam 1.5", "--lam"), ("--epochs 0", "--epochs"), ("--lr nan", "--lr"), ("--lr 0", "--lr"),
    ("--lr inf", "--lr"), ("--save-every -1", "--save-every"), ("--save-every nan", "--save-every"),
    ("--seed 4294967296", "--seed"), ("--accumulate 0", "--accumulate"), ("--workers -1", "--workers"),
    ("--weight-decay nan", "--weight-decay"), ("--tol -1", "--tol"), ("--dropout 1", "--dropout"),
    ("--max-iter 0", "--max-iter"), ("--grad exact", "--grad"),
    ("--backward-solver newton", "--backward-solver"),
    ("--grad bptt", "--solver fixed-point"), ("--eval", "--resume"), ("--resume auto", "--out"),
    ("--eval --resume auto --out x", "--eval needs"), ("--benchmark --eval", "--benchmark"),
    ("--init x", "--init: there is no file x"), ("--sync-bn", "--sync-bn needs a GPU"),
    ("--cuda-graph", "--cuda-graph needs a GPU"),
    ("--radius-every 3 --radius-images 0", "--radius-images"), ("--accumulate 3", "--batch-size 8"),
    ("--batch-size 48", "there are only 42 training images"), ("--resume nowhere.pt --eval", "nowhere.pt"),
    ("--data nowhere --resume nowhere.pt --out unused", "--resume: there is no file nowhere.pt"),
    ("--data nowhere", "nowhere/train holds no class folders")])
def test_a_wrong_flag_is_named(flags, named, capsys, tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    assert named in refused(capsys, *SMALL_RUN, "--data", small, *flags.split())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]              # nothing was written


@pytest.mark.parametrize("flags, named",
                         [("--tol 1e-3", "--tol 0"), ("--solver anderson", "neither anderson"),
                                          ("--backward-solver anderson", "neither anderson"),
                                          ("--sync-bn", "--sync-bn"), ("--accumulate 2", "--accumulate 1")])
def test_what_a_cuda_graph_cannot_do_is_refused(flags, named, capsys, monkeypatch):
    """It is the default if a GPU is there and nothing is in its way."""
    assert not parse_args([]).cuda_graph
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parse_args([]).cuda_graph and not parse_args(["--no-cuda-graph"]).cuda_graph
    assert not parse_args(flags.split()).cuda_graph
    assert parse_args(["--cuda-graph"]).cuda_graph
    message = refused(capsys, "--cuda-graph", *flags.split())
    assert "--cuda-graph needs" in message and named in message


def test_an_output_folder_that_cannot_be_made_is_named(capsys, tmp_path, small):
    (tmp_path / "file").write_text("in the way")
    assert f"--out {tmp_path / 'file' / 'run'}" in refused(capsys, *SMALL_RUN, "--data", small, "--out",
                                                          tmp_path / "file" / "run")


def test_processes_that_do_not_fit_the_data_are_refused(capsys, monkeypatch, tmp_path, small):
    monkeypatch.setattr(mdeq_imagenet, "init_process", lambda: Process(0, 9, torch.device("cpu")))
    monkeypatch.setattr(Process, "sum", lambda self, x: x)
    flags = [*SMALL_RUN, "--data", small, "--out", tmp_path / "run"]
    message = refused(capsys, *flags)
    assert "--batch-size 8" in message and "9 process(es)" in message
    message = refused(capsys, *flags, "--batch-size", 18)
    assert "7 evaluation image(s) for 9 processes" in message


def test_a_job_that_torchrun_restarts_must_find_its_checkpoint(capsys, monkeypatch, tmp_path, small):
    """Else each restart would begin again in a folder of its own."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    (tmp_path / "checkpoint.pt").touch()
    for flags in ([], ["--out", tmp_path], ["--resume", tmp_path / "checkpoint.pt"]):
        message = refused(capsys, *SMALL_RUN, "--data", small, *flags)
        assert "--max-restarts" in message and "--resume auto" in message
    parse_args(["--out", "x", "--resume", "auto"])
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    parse_args([])


def break_no_val(root):
    (root / "val").rename(root / "test")
    return f"{root / 'val'} holds no class folders; it must hold train/CLASS/*, val/CLASS/*"


def break_classes(root):
    (root / "val" / "class2").rename(root / "val" / "klasse2")
    return "only in train: ['class2'], only in val: ['klasse2']"


def break_many_classes(root):
    """Five of them are named."""
    for c in range(CLASSES):
        (root / "val" / f"class{c}").rename(root / "val" / f"klasse{c}")
    return "'class3', 'class4'], only in val: ['klasse0'"


def break_class_of_train_alone(root):
    for path in (root / "val" / "class6").iterdir():
        path.unlink()
    (root / "val" / "class6").rmdir()
    return "only in train: ['class6'], only in val: []"


def break_empty_class(root):
    for path in (root / "train" / "class1").iterdir():
        path.unlink()
    return "class1"


def break_a_thousand_empty_classes(root):
    """The first one is named."""
    for c in range(1000):
        (root / "train" / f"n{c:08d}").mkdir()
    return "n00000000"


def break_no_classes(root):
    for path in sorted((root / "train").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    return str(root / "train")


@pytest.mark.parametrize("break_it", [break_no_val, break_classes, break_many_classes,
                                      break_class_of_train_alone,
                                      break_empty_class, break_a_thousand_empty_classes, break_no_classes])
def test_broken_folders_are_named_before_training(break_it, tmp_path, capsys):
    make_folder(tmp_path / "data")
    named = break_it(tmp_path / "data")
    message = refused(capsys, *SMALL_RUN, "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert "--data" in message and named in message and len(message) < 600
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_other_runs_are_refused(tmp_path, capsys, small):
    """Other flags would change the curve in silence: the difference is named.  No run is overwritten."""
    out = tmp_path / "run"
    flags = [*SMALL_RUN, "--data", small, "--out", out]
    run(*flags)
    before = (out / "metrics.jsonl").read_text()
    assert "already holds a run" in refused(capsys, *flags)
    assert "already holds a run" in refused(capsys, *flags, "--init", out / "checkpoint.pt")
    assert "--init begins a training" in refused(capsys, *flags, "--init", out / "checkpoint.pt", "--eval",
                                                 "--resume", out / "checkpoint.pt")
    for more, named in (("--lam 0.4", "--lam 0.6 (here 0.4)"), ("--seed 3", "--seed 0 (here 3)"),
                        ("--epochs 3", "--epochs 1 (here 3)"), ("--accumulate 2", "--accumulate 1 (here 2)"),
                        ("--batch-size 4", "--batch-size 8 (here 4)"), ("--crop 24", "--crop 32 (here 24)"),
                        ("--augment no", "--augment yes (here no)"),
                        ("--dropout 0.1", "--dropout 0.0 (here 0.1)"),
                        ("--channels 8 8", "--channels [8, 16] (here [8, 8])"),
                        ("--lr 0.1", "--lr 0.05 (here 0.1)"),
                        ("--pretrain-steps 3", "--pretrain-steps 0 (here 3)")):
        assert named in refused(capsys, *flags, "--resume", "auto", *more.split())
    message = refused(capsys, *flags, "--eval", "--resume", out / "checkpoint.pt", "--final-channels", 24)
    assert "does not fit the model of these flags" in message and "final.0.weight" in message
    assert parse_args([*SMALL_RUN, "--resume", str(out / "checkpoint.pt")]).data == str(small)
    evaluation = ["--eval", "--resume", str(out / "checkpoint.pt")]         # brings what is not given
    for more, crop in (([], 32), (["--crop", "16"], 16)):
        taken = mdeq_imagenet.parse_args([*evaluation, *more])
        assert (taken.channels, taken.final_channels, taken.crop, taken.max_iter) == ([8, 16], 16, crop, 3)
        assert taken.data == str(small) and taken.lam == 0.6
    torch.save({**checkpoint(out), "args": {**checkpoint(out)["args"], "lam": 0.9}}, tmp_path / "lam.pt")
    assert mdeq_imagenet.parse_args(["--eval", "--resume", str(tmp_path / "lam.pt")]).lam == 0.9
    more = make_folder(tmp_path / "more", train=49)
    message = refused(capsys, *SMALL_RUN, "--data", more, "--out", out, "--resume", "auto")
    assert "is of a run with images 42, here 49" in message
    (other := make_folder(tmp_path / "other"))
    for split in ("train", "val"):
        (other / split / "class6").rename(other / split / "class9")
    for mode, named in ((["--resume", "auto"], "is of a run with classes ["),
                        (["--eval", "--resume", out / "checkpoint.pt"], "with other classes")):
        message = refused(capsys, *SMALL_RUN, "--data", other, "--out", out, *mode)
        assert named in message and len(message) < 500
    cifar = {"args": vars(mdeq_cifar.parse_args(["--data", "toy"])), "model": {}, "step": 3}
    torch.save(cifar, tmp_path / "cifar.pt")
    for mode in (["--out", tmp_path / "new"], ["--eval"]):
        message = refused(capsys, *SMALL_RUN, "--data", small, "--resume", tmp_path / "cifar.pt", *mode)
        assert "cifar.pt is of another script" in message
    assert "another script" in refused(capsys, "--data", "nowhere", "--eval", "--resume",
                                       tmp_path / "cifar.pt")
    message = refused(capsys, *SMALL_RUN, "--data", small, "--out", tmp_path / "new", "--init",
                      tmp_path / "cifar.pt")
    assert "--init" in message and "does not fit" in message
    assert (out / "metrics.jsonl").read_text() == before


def test_a_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, small):
    """The last one but one was saved before the evaluation: the run repeats that and ends the same."""
    flags = [*SMALL_RUN, "--data", small, "--out", tmp_path]
    run(*flags)
    end, path = checkpoint(tmp_path), tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    run(*flags, "--resume", "auto")
    message = capsys.readouterr().err
    assert str(path) in message and "checkpoint.pt.previous" in message
    assert_same_end(checkpoint(tmp_path), end)


# --- training -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("grad, more", [("upg", "--amp --accumulate 2"), ("npg", "--dropout 0.1"),
                                        ("implicit", "--solver anderson --augment no"),
                                        ("bptt", "--solver fixed-point --memory-format contiguous")])
def test_every_gradient_trains(grad, more, tmp_path, small):
    """Five steps, the first two with the pretraining network; radii of J and J_lam beside."""
    run(*SMALL_RUN, "--data", small, "--grad", grad, *more.split(),
        *"--pretrain-steps 2 --radius-every 3".split(),
        "--out", tmp_path)
    assert [r["step"] for r in metrics(tmp_path, "train")] == [1, 2, 3, 4, 5]
    assert all(0 < r["loss"] < 10 and 0 < r["data_wait"] < 1 for r in metrics(tmp_path, "train"))
    (radius,), (epoch,) = metrics(tmp_path, "radius"), metrics(tmp_path, "epoch")
    assert radius["step"] == 3 and radius["rho_J"] > 0 and radius["rho_J_lam"] > 0
    assert 0 <= radius["rho_J_above_1"] <= 1 and epoch["val_images"] == 7 and epoch["val_evals"] == 4
    assert ("backward_solved" in epoch) == (grad == "implicit")


@pytest.mark.parametrize("name", mdeq_imagenet.SOLVERS)
def test_the_backward_solver_of_the_command_solves_for_the_gradient_alone(name, tmp_path, monkeypatch, small):
    """Five steps, five backward solves of the whole budget: --backward-max-iter and one more call."""
    found = []
    for other, solver in mdeq_imagenet.SOLVERS.items():
        def noted(*args, other=other, solver=solver, **options):
            result = solver(*args, **options)
            found.append((other, options["max_iter"], result.n_evals))
            return result

        monkeypatch.setitem(mdeq_imagenet.SOLVERS, other, noted)
    run(*SMALL_RUN, "--data", small, *"--grad implicit --backward-max-iter 4 --backward-solver".split(), name,
        "--out",
        tmp_path)
    assert [call for call in found if call[1] == 4] == [(name, 4, 5)] * 5
    assert {call for call in found if call[1] != 4} == {("broyden", 3, 4)}


def test_a_captured_pass_trains_as_an_eager_one(tmp_path, monkeypatch, small):
    """--cuda-graph with a stand-in for graphs, which overwrites what it returned before."""
    solves, captures = {"train": [], "backward": []}, []

    class Captured(nn.Module):
        def __init__(self, training, example):
            super().__init__()
            note, self.eager, self.kept = training.note, training, []
            captures.append(tuple(example.shape))
            training.note = lambda result: (solves["backward"].append(result.residual.clone()), note(result))

        def forward(self, x, unroll=0):
            logits, residual = self.eager(x, unroll=unroll)
            if unroll:
                return logits, residual
            solves["train"].append(residual.clone())
            self.kept.append(self.kept[0].copy_(residual) if self.kept else residual)
            return logits, self.kept[-1]

    monkeypatch.setattr(mdeq_imagenet, "captured", Captured)
    flags = [*SMALL_RUN, "--data", str(small), *"--grad implicit --pretrain-steps 1 --out".split()]
    for graph in (False, True):
        args = parse_args([*flags, str(tmp_path / str(graph))])
        args.cuda_graph = graph
        main(args)
    (eager,), (graph,) = (metrics(tmp_path / name, "epoch") for name in ("False", "True"))
    assert captures == [(8, 3, 32, 32)] and {k: v for k, v in eager.items() if k != "seconds"} == {
        k: v for k, v in graph.items() if k != "seconds"}
    for name, found in solves.items():              # each solve's own, not the last one's four times
        expected = common.health(name, found, tol=0, process=CPU)
        assert len(found) == 4 and expected == {k: graph[k] for k in expected}


def test_the_pretraining_network_is_used_for_the_first_steps_and_the_solver_after(tmp_path, monkeypatch,
                                                                                  small):
    forward, unrolls = MDEQ.forward, []

    def watched(self, x, unroll=0, **kwargs):
        if self.training:
            unrolls.append(unroll)
        return forward(self, x, unroll=unroll, **kwargs)

    monkeypatch.setattr(MDEQ, "forward", watched)
    run(*SMALL_RUN, "--data", small, "--out", tmp_path,
        *"--pretrain-steps 3 --pretrain-layers 2 --accumulate 2".split())
    assert unrolls == [2] * 6 + [0] * 4


def test_radii_do_not_change_a_run(tmp_path, small):
    """Diagnostics leave the random numbers alone: the same dropout masks and weights with and without."""
    flags = [*SMALL_RUN, "--data", small, "--dropout", 0.2]
    run(*flags, "--out", tmp_path / "a")
    run(*flags, "--radius-every", 2, "--out", tmp_path / "b")
    assert len(metrics(tmp_path / "b", "radius")) == 2
    assert_same_end(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"))


def test_radii_are_means_at_the_equilibria_of_images_over_all_of_val(monkeypatch, small):
    """Images 0, 2, 4 of 7 in batches of 2 and 1: radii of J (lam = 1), of J_lam, and J's share above 1."""
    args = parse_args([*SMALL_RUN, "--data", str(small),
                       *"--batch-size 2 --radius-images 3 --lam 0.5".split()])
    _, images = load_images(args, CPU)
    model, states = mdeq_imagenet.build_model(args, CLASSES, CPU), []

    def radius(f, h, *, lam, n_iter):
        states.append(h[0])
        return lam + torch.arange(len(h[0])) - 0.5

    monkeypatch.setattr(mdeq_imagenet, "spectral_radius", radius)
    record = mdeq_imagenet.radii(model, images, args, CPU)
    assert record == pytest.approx({"rho_J": 2.5 / 3, "rho_J_lam": 1 / 3, "rho_J_above_1": 1 / 3})
    x = prepare(torch.stack([images[i, 0][0] for i in (0, 2, 4)]), args, CPU.device)
    with torch.no_grad():
        _, result = model.eval()(x, with_result=True)
    assert (torch.cat(states[::2]) - result.h[0]).abs().max() < 1e-4 and torch.equal(states[0], states[1])


def test_a_run_continues_with_another_memory_format(tmp_path, small):
    """What changes rounding alone may differ: a run begun on a GPU (contiguous) can go on on a CPU."""
    flags = [*SMALL_RUN, "--data", small, "--out", tmp_path]
    run(*flags, "--memory-format", "contiguous")
    run(*flags, "--memory-format", "channels-last", "--resume", "auto")
    assert [r["step"] for r in metrics(tmp_path, "start")] == [0, 5]


def test_a_few_images_are_learnt_by_heart(tmp_path):
    """UPG on 12 images, 4 of each class, is 100 % right on them, evaluated by the solver."""
    make_folder(tmp_path / "data", classes=3, train=12, val=12)
    for path in (tmp_path / "data" / "val").rglob("*.JPEG"):
        shutil.copy(tmp_path / "data" / "train" / path.relative_to(tmp_path / "data" / "val"), path)
    run(*SMALL_RUN, "--data", tmp_path / "data",
        *"--augment no --batch-size 12 --epochs 60 --max-iter 6".split(),
        "--save-every", 1000, "--out", tmp_path / "run")
    epochs = metrics(tmp_path / "run", "epoch")
    last, best = epochs[-1], itertools.accumulate((r["val_top1"] for r in epochs), max)
    assert [r["best_top1"] for r in epochs] == list(best)
    assert epochs[last["best_epoch"] - 1]["val_top1"] == 100
    assert last["val_top1"] == 100 and last["val_images"] == 12 and last["step"] == 60
    losses = [r["loss"] for r in metrics(tmp_path / "run", "train")]
    assert losses[-1] < 0.1 * losses[0]


def test_evaluation_counts_every_image_once(tmp_path, small):
    """Top-1, top-5, loss of 7 images in batches of 3, 3, 1 equal those of the logits."""
    args = parse_args([*SMALL_RUN, "--data", str(small), "--batch-size", "3"])
    _, images = load_images(args, CPU)
    model = mdeq_imagenet.build_model(args, CLASSES, CPU)
    record = mdeq_imagenet.evaluate(model, images, args, CPU)
    assert model.training                                                       # and goes on training
    model.eval()
    y = torch.tensor(images.y)
    with torch.no_grad():
        logits = model(prepare(torch.stack([images[i, 0][0] for i in range(7)]), args, CPU.device))
    order = logits.argsort(dim=1, descending=True)
    top1, top5 = (100 / 7 * sum(y[i] in order[i, :n] for i in range(7)) for n in (1, 5))
    assert (record["val_top1"], record["val_top5"]) == pytest.approx((top1, top5)) and top1 < top5
    assert record["val_loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert (record["val_images"], record["val_evals"]) == (7, 4)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_divide_the_validation_images_without_a_repetition(world, accumulate, monkeypatch):
    """All, or some of them that are spread over the classes."""
    monkeypatch.setattr(mdeq_imagenet, "read", lambda images, keys, *_: [(key, 0, 0) for key in keys])
    args = parse_args(["--batch-size", "8", "--accumulate", str(accumulate)])
    for some, expected in ((None, range(19)), (4, [0, 4, 9, 14]), (30, range(19)),
                           (12, [0, 1, 3, 4, 6, 7, 9, 11, 12, 14, 15, 17])):    # up to the last class
        shares = [[keys for keys, _ in mdeq_imagenet.evaluation_batches(
            SimpleNamespace(y=range(19)), args, Process(rank, world, CPU.device),
            some)] for rank in range(world)]
        assert sorted(i for share in shares for batch in share for i, _ in batch) == list(expected)
        assert max(len(batch) for share in shares for batch in share) <= max(1, 8 // world // accumulate)


def all_finite(state):
    return all(v.isfinite().all() for v in state["model"].values())


def test_a_loss_that_is_not_a_number_ends_the_run_at_the_last_good_checkpoint(tmp_path, capsys, monkeypatch,
                                                                              small):
    """Exit code 1; the message names step and checkpoint, which has finite weights and can be continued."""
    prepare_once, calls = mdeq_imagenet.prepare, []

    def broken(x, args, device):
        calls.append(1)
        return prepare_once(x, args, device) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(mdeq_imagenet, "prepare", broken)
    flags = [*SMALL_RUN, "--data", small, "--save-every", 0, "--out", tmp_path / "run"]
    message = refused(capsys, *flags, code=1)
    assert "nan" in message and "step 4" in message and str(tmp_path / "run" / "checkpoint.pt") in message
    assert checkpoint(tmp_path / "run")["step"] == 3 and all_finite(checkpoint(tmp_path / "run"))
    run(*flags, "--resume", "auto")                 # prepare breaks only once
    assert [r["step"] for r in metrics(tmp_path / "run", "train")] == [1, 2, 3, 4, 5]


def test_broken_weights_are_never_saved(tmp_path, capsys, monkeypatch, small):
    """A step with a finite loss and a gradient that is not: its weights are not to replace the good."""
    build, calls = mdeq_imagenet.build_model, []

    def build_model(*args):
        model = build(*args)
        model.classifier.bias.register_hook(
            lambda g: calls.append(1) or g * (float("nan") if len(calls) == 4 else 1))
        return model

    monkeypatch.setattr(mdeq_imagenet, "build_model", build_model)
    message = refused(capsys, *SMALL_RUN, "--data", small, "--save-every", 0, "--out", tmp_path, code=1)
    assert "a weight became infinite" in message and str(tmp_path / "checkpoint.pt") in message
    assert checkpoint(tmp_path)["step"] == 3 and all_finite(checkpoint(tmp_path))


# --- official checkpoints -----------------------------------------------------------------------------------

def official(shape, layout=reference.with_aliases, seed=0):
    """(what phantom_grad's ImageNet script saves, the state dict in float64)."""
    sd = reference.random_state_dict(seed=seed, stem_strides=2, **shape)
    weights = {f"module.{k}": reference.single(v) for k, v in layout(sd).items()}
    return {"epoch": 99, "state_dict": weights, "best_acc1": torch.tensor(75.7),
            "optimizer": {"state": {}}}, sd


def direct_evaluation(sd, channels, args, max_iter):
    """(top-1 in %, loss) of the validation images, by the second implementation: plain, best state each."""
    _, images = load_images(args, CPU)
    x = prepare(torch.stack([images[i, 0][0] for i in range(len(images.y))]), args, CPU.device).double()
    y, u = torch.tensor(images.y), reference.inject(sd, x, channels, strides=(2, 2))
    h, best, lowest = [torch.zeros_like(ui) for ui in u], None, torch.full((len(x),), torch.inf,
                                                                           dtype=torch.float64)
    for _ in range(max_iter + 1):
        f_h = reference.f(sd, h, u)
        gap, size = (torch.cat([p.flatten(1) for p in parts], dim=1).norm(dim=1)
                     for parts in ([a - b for a, b in zip(f_h, h)], f_h))
        better = (gap / size < lowest)[:, None, None, None]
        best = h if best is None else [torch.where(better, a, b) for a, b in zip(h, best)]
        h, lowest = f_h, torch.minimum(lowest, gap / size)
    logits = reference.head(sd, best)
    return 100 * (logits.argmax(1) == y).double().mean().item(), F.cross_entropy(logits, y).item()


TWO_BRANCHES = dict(channels=(8, 16), head=(4, 8), final=16, classes=CLASSES)
FOUR_BRANCHES = dict(channels=(8, 8, 16, 24), head=(4, 8, 4, 8), final=24, classes=CLASSES)


@pytest.mark.parametrize("shape, layout", [(TWO_BRANCHES, reference.with_aliases),
                                           (FOUR_BRANCHES, reference.with_aliases),
                                           (FOUR_BRANCHES, zoo_imagenet)])
def test_official_checkpoints_are_evaluated(shape, layout, tmp_path, capsys, small):
    """{"state_dict": {"module.KEY": tensor}} with aliases, and torchdeq's layout."""
    saved, sd = official(shape, layout)
    torch.save(saved, tmp_path / "official.pth")
    flags = [*SMALL_RUN, "--data", str(small), "--channels", *map(str, shape["channels"]), "--head-channels",
             *map(str, shape["head"]), "--final-channels", str(shape["final"]),
             *"--solver fixed-point".split()]
    run(*flags, "--eval", "--resume", tmp_path / "official.pth")
    printed = capsys.readouterr().out
    top1, loss = direct_evaluation(sd, shape["channels"], parse_args(flags), max_iter=3)
    assert f"val top1 {top1:.5g} " in printed and "val images 7 " in printed and "rho J lam " in printed
    assert float(printed.split("val loss ")[1].split()[0]) == pytest.approx(loss, abs=2e-4)


def test_official_checkpoints_cannot_be_continued_and_other_keys_are_named(tmp_path, capsys, small):
    saved, _ = official(TWO_BRANCHES)
    torch.save(saved, tmp_path / "official.pth")
    flags = [*SMALL_RUN, "--data", small]
    message = refused(capsys, *flags, "--resume", tmp_path / "official.pth", "--out", tmp_path / "out")
    assert "--eval" in message and "official.pth" in message
    weights = saved["state_dict"]
    torch.save({"state_dict": {**weights, "module.surprise": torch.zeros(1)}}, tmp_path / "odd.pth")
    gone = "module.fullstage.branches.0.blocks.0.gn1.bias"
    torch.save({"state_dict": {k: v for k, v in weights.items() if k != gone}}, tmp_path / "less.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, reason in (("odd", 'Unexpected key(s) in state_dict: "surprise"'),
                         ("less", 'Missing key(s) in state_dict: "blocks.0.gn1.bias"'),
                         ("list", "does not fit")):
        path = tmp_path / f"{name}.pth"
        for mode in (["--eval", "--resume", path], ["--init", path, "--out", tmp_path / "out"]):
            message = refused(capsys, *flags, *mode)
            assert reason in message and f"{mode[-1] if mode[0] == '--eval' else path}" in message
            assert ("--resume" if "--eval" in mode else "--init") in message.split(str(path))[0]
    message = refused(capsys, *flags, "--channels", 8, 8, "--eval", "--resume", tmp_path / "official.pth")
    assert "does not fit the model of these flags" in message and "size mismatch for blocks.1" in message
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_a_classifier_of_other_names_is_not_taken_over(tmp_path, capsys, small):
    """--init: as many classes under other names get a new classifier; the same names keep theirs."""
    flags = [*SMALL_RUN, "--lr", 1e-30, "--weight-decay", 0]
    run(*flags, "--data", small, "--out", tmp_path / "a")
    shutil.copytree(small, tmp_path / "others")
    for split in ("train", "val"):
        (tmp_path / "others" / split / "class0").rename(tmp_path / "others" / split / "zebra")
    for data, noted in ((small, False), (tmp_path / "others", True)):
        capsys.readouterr()
        out = tmp_path / str(noted)
        run(*flags, "--data", data, "--init", tmp_path / "a" / "checkpoint.pt", "--out", out, "--seed", 1)
        assert ("other classes than --data: new classifier.weight" in capsys.readouterr().out) == noted
        a, b = (checkpoint(path)["model"]["classifier.weight"] for path in (tmp_path / "a", out))
        assert torch.allclose(a, b, atol=1e-3) != noted


def test_an_official_checkpoint_says_what_its_classes_are_taken_for(tmp_path, capsys, small):
    torch.save(official({**TWO_BRANCHES, "classes": CLASSES})[0], tmp_path / "official.pth")
    run(*SMALL_RUN, "--data", small, "--eval", "--resume", tmp_path / "official.pth")
    printed = capsys.readouterr().out
    assert "names no classes: its first is taken for 'class0', its last for 'class6'" in printed


def test_sizes_that_the_model_or_the_memory_cannot_take_are_refused(tmp_path, capsys):
    one = "--data toy --crop 32 --resize 40 --batch-size 4 --accumulate 4 --workers 0 --epochs 1".split()
    assert "--crop 32 the coarsest branch is 1 x 1" in refused(capsys, *one, "--out", tmp_path / "out")
    path = make_folder(tmp_path / "data") / "val" / "class0" / "000.JPEG"
    Image.new("RGB", (2, 3000)).save(path)          # --resize would make it 1,500 times as long as broad
    message = refused(capsys, *SMALL_RUN, "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert str(path) in message and "(2, 3000)" in message


@pytest.mark.parametrize("classes", [CLASSES, 10])
def test_training_can_begin_with_an_official_checkpoint(classes, tmp_path, capsys, small):
    """One step at a rate of 1e-30 changes no weight: the saved ones are the official ones.

    Another number of classes is announced and gets a new classifier, all the rest stays the official model's.
    """
    saved, sd = official({**TWO_BRANCHES, "classes": classes})
    torch.save(saved, tmp_path / "official.pth")
    run(*SMALL_RUN, "--data", small, "--init", tmp_path / "official.pth", "--lr", 1e-30, "--weight-decay", 0,
        "--batch-size", TRAIN, "--out", tmp_path / "run")
    printed, end = capsys.readouterr().out, checkpoint(tmp_path / "run")
    note = "note: --init has other classes than --data: new classifier.weight"
    assert end["step"] == 1 and (note in printed) == (classes != CLASSES)
    expected = MDEQ(channels=(8, 16), head_channels=(4, 8), final_channels=16, num_classes=classes)
    load_official(expected, saved)
    seed_everything(0)
    fresh = mdeq_imagenet.build_model(parse_args(SMALL_RUN), CLASSES, CPU).state_dict()
    for name, parameter in expected.named_parameters():
        new = name.startswith("classifier") and classes != CLASSES
        assert torch.equal(end["model"][name], fresh[name] if new else parameter), name
    assert end["model"]["stem.1.num_batches_tracked"] == 7 + 1      # the statistics were taken over, too
    assert (end["model"]["stem.1.running_mean"] - 0.9 * sd["downsample.1.running_mean"]).abs().max() > 1e-3


def test_training_can_begin_with_a_checkpoint_of_another_run(tmp_path, capsys, monkeypatch, small):
    """Weights alone: other flags are no difference to complain of, the optimiser and the step begin anew.

    A run that is resumed with the same flags does not begin with them again.
    """
    run(*SMALL_RUN, "--data", small, "--out", tmp_path / "a")
    flags = [*SMALL_RUN, "--data", small, "--seed", 4, "--lr", 1e-30, "--weight-decay", 0, "--batch-size",
             TRAIN]
    run(*flags, "--init", tmp_path / "a" / "checkpoint.pt", "--out", tmp_path / "b")
    a, b = (checkpoint(tmp_path / name) for name in "ab")
    assert b["step"] == 1 and all(torch.equal(a["model"][name], b["model"][name]) for name, _ in
                                  MDEQ(channels=(8, 16), head_channels=(4, 8)).named_parameters())
    capsys.readouterr()
    monkeypatch.setattr(mdeq_imagenet, "initialise", lambda *_: pytest.fail("the trained weights are lost"))
    run(*flags, "--init", tmp_path / "a" / "checkpoint.pt", "--out", tmp_path / "b", "--resume", "auto")
    assert "continues after step 1" in capsys.readouterr().out


# --- evaluation is interrupted ------------------------------------------------------------------------------

def interrupted(monkeypatch, where, happens):
    """`happens` is called once: before or after the images of the first evaluation, or as that is saved."""
    once, save, batches = iter([1]), common.save_checkpoint, mdeq_imagenet.evaluation_batches

    def saving(path, state):
        if where == "saving" and state["batch"] == 0 and next(once, None):
            happens()
        return save(path, state)

    def evaluating(*args):
        if where == "start" and next(once, None):
            happens()
        yield from batches(*args)
        if where == "end" and next(once, None):
            happens()

    monkeypatch.setattr(common, "save_checkpoint", saving)
    monkeypatch.setattr(mdeq_imagenet, "evaluation_batches", evaluating)


def kill():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def two_epochs(small, tmp_path_factory):
    """(flags, last checkpoint) of an undisturbed run in this process."""
    out = tmp_path_factory.mktemp("two_epochs")
    flags = [*SMALL_RUN, "--data", small, "--dropout", 0.2, "--epochs", 2]
    with mock.patch.object(torch.cuda, "is_available", lambda: False):  # it comes before a_process_of_its_own
        run(*flags, "--out", out)
    return flags, checkpoint(out)


@pytest.mark.parametrize("where", ["start", "end", "saving"])
def test_an_evaluation_that_was_killed_is_done_by_the_resumed_run(where, two_epochs, tmp_path, monkeypatch):
    """The state was saved before it.  Each epoch is logged once; the end is the same, bit for bit."""
    flags, end = two_epochs
    interrupted(monkeypatch, where, kill)
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--out", tmp_path)
    state = checkpoint(tmp_path)
    assert (state["step"], state["epoch"], state["batch"]) == (5, 0, 5)
    run(*flags, "--out", tmp_path, "--resume", "auto")
    assert [r["step"] for r in metrics(tmp_path, "train")] == list(range(1, 11))
    assert [(r["step"], r["epoch"]) for r in metrics(tmp_path, "epoch")] == [(5, 1), (10, 2)]
    assert_same_end(checkpoint(tmp_path), end)


@pytest.mark.parametrize("where", ["start", "end", "saving"])
def test_SIGTERM_in_an_evaluation_ends_the_run_after_the_next_step(where, two_epochs, tmp_path, monkeypatch,
                                                                   capsys):
    """The evaluation is finished and saved; the resumed run ends the same bit for bit."""
    flags, end = two_epochs
    interrupted(monkeypatch, where, terminate)
    run(*flags, "--out", tmp_path)
    assert "SIGTERM: saved after step 6" in capsys.readouterr().out and checkpoint(tmp_path)["step"] == 6
    run(*flags, "--out", tmp_path, "--resume", "auto")
    assert [(r["step"], r["epoch"]) for r in metrics(tmp_path, "epoch")] == [(5, 1), (10, 2)]
    assert_same_end(checkpoint(tmp_path), end)


def test_a_best_epoch_is_of_the_validation_images_that_it_was_found_on(small, tmp_path, monkeypatch):
    """The run goes on with one image more to evaluate on: its first epoch there is the best one."""
    other = shutil.copytree(small, tmp_path / "other")
    shutil.copy(other / "val" / "class0" / "000.JPEG", other / "val" / "class0" / "100.JPEG")
    interrupted(monkeypatch, "saving", terminate)
    run(*SMALL_RUN, "--data", small, "--epochs", 2, "--out", tmp_path / "run")
    state = checkpoint(tmp_path / "run")
    torch.save({**state, "score": {**state["score"], "best": 100.0}}, tmp_path / "run" / "checkpoint.pt")
    for data, best in ((small, (100, 1)), (other, None)):
        out = shutil.copytree(tmp_path / "run", tmp_path / data.name / "run")
        run(*SMALL_RUN, "--data", data, "--epochs", 2, "--out", out, "--resume", "auto")
        epoch = metrics(out, "epoch")[-1]
        found = epoch["val_top1"]
        assert (epoch["best_top1"], epoch["best_epoch"]) == (best or (found, 2 if found else 0))


# --- kill and resume, real processes ------------------------------------------------------------------------

LONG_RUN = [*SMALL_RUN, *"--epochs 8 --save-every 0 --dropout 0.2".split()]         # 40 steps, each saved
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(out, *command, launcher=None, **environment):
    """The script as a process group of its own; what it prints goes to OUT.log.

    Forked, or, with a launcher, begun as from a shell: `python LAUNCHER mdeq_imagenet.py ...`.
    """
    if launcher is None:
        return Forked(f"{out}.log", script, "mdeq_imagenet", *command, "--out", out)
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen([sys.executable, *launcher, *map(str, (SCRIPT, *command)), "--out", str(out)],
                                env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1", **environment}, stdout=log,
                                stderr=subprocess.STDOUT, start_new_session=True)


def start_pair(out, *command):
    return pair(f"{out}.log", script, "mdeq_imagenet", *command, "--out", out)


def finish(out, *processes):
    """Waits for the end, which must be a good one."""
    for process in processes:
        assert process.wait(timeout=120) == 0, Path(f"{out}.log").read_text()[-3000:]
    return checkpoint(out)


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < end, "it ended or hung before it was disturbed"
        time.sleep(0.005)
    return found


def saved_at(out):
    path = out / "checkpoint.pt"
    return path.stat().st_mtime_ns if path.exists() else None


def wait_for_new_checkpoint(out, process, before):
    wait_for(lambda: saved_at(out) not in (None, before), process)


def steps_of(out, event="train"):
    return [record["step"] for record in metrics(out, event)]


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    """A run of one process and one of two, which go on as the tests begin: {n: (out, *processes)}."""
    root = tmp_path_factory.mktemp("undisturbed")
    runs = {1: (root / "1", start(root / "1", *LONG_RUN, "--data", small)),
            2: (root / "2", *start_pair(root / "2", *LONG_RUN, "--data", small))}
    yield runs
    for process in (*runs[1][1:], *runs[2][1:]):
        process.kill()


def test_a_run_killed_at_random_moments_ends_with_the_same_weights(tmp_path, small, undisturbed):
    """SIGKILL three times, --resume auto with 2, 1 and 0 workers: all is equal bit for bit, each step once.

    Data order, augmentation, dropout masks, optimiser and schedule all continue where they were.
    """
    out, rng = tmp_path / "run", random.Random(0)
    for workers in (0, 2, 1):
        before = saved_at(out)
        process = start(out, *LONG_RUN, "--data", small, "--resume", "auto", "--workers", workers)
        wait_for_new_checkpoint(out, process, before)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    process = start(out, *LONG_RUN, "--data", small, "--resume", "auto")
    end, expected = finish(out, process), finish(*undisturbed[1])
    assert end["step"] == 40
    assert_same_end(end, expected)
    assert steps_of(out, "start")[0] == 0 and min(steps_of(out, "start")[1:]) > 0  # resumed, not begun again
    for folder in (out, undisturbed[1][0]):
        assert steps_of(folder) == list(range(1, 41)) and steps_of(folder, "epoch") == list(range(5, 41, 5))
    losses = [[r["loss"] for r in metrics(folder, "train")] for folder in (out, undisturbed[1][0])]
    assert losses[0] == losses[1]


def test_signals_save_and_end_with_code_0(tmp_path, small, undisturbed):
    """Sent to the whole group, as a cluster or a terminal does: the workers leave them to the training.

    --save-every is far away: in the first epoch the signals alone ask for checkpoints.
    """
    out, step = tmp_path / "run", 0
    flags = [*LONG_RUN, "--data", small, "--save-every", 1000, "--workers", 2, "--resume", "auto"]
    for number, name in ((signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")):
        process = start(out, *flags, launcher=())
        wait_for(lambda: (out / "metrics.jsonl").exists() and max(steps_of(out), default=0) > step, process)
        os.killpg(process.pid, number)
        before, step = step, finish(out, process)["step"]
        printed = Path(f"{out}.log").read_text()
        assert before < step < 40 and f"{name}: saved after step {step} " in printed
        assert printed.count(f"{number.name}: will save") == 1                      # and not from each worker
    end, expected = finish(out, start(out, *flags)), finish(*undisturbed[1])
    assert_same_end(end, expected)
    assert steps_of(out) == list(range(1, 41)) and steps_of(out, "epoch") == list(range(5, 41, 5))


# --- two processes ------------------------------------------------------------------------------------------

def ranks(agent):
    """{rank: pid} of torchrun's running processes."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == agent.pid and str(SCRIPT).encode() in (entry / "cmdline").read_bytes():
                    environment = dict(v.split(b"=",
                                               1) for v in (entry / "environ").read_bytes().split(b"\0") if v)
                    found[int(environment[b"RANK"])] = int(entry.name)
            except (OSError, KeyError):
                continue                        # it has just ended, or has not begun
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux")
def test_torchrun_restarts_a_job_that_lost_a_process(tmp_path, small, undisturbed):
    """SIGKILL to the second process, later to the first: the job carries on, to the same end bit for bit."""
    out = tmp_path / "run"
    flags = [*LONG_RUN, "--data", small, "--resume", "auto"]
    agent = start(out, *flags, launcher=[*TORCHRUN, "--max-restarts=2", "--monitor-interval=0.1"],
                  TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    for rank in (1, 0):
        wait_for_new_checkpoint(out, agent, saved_at(out))
        victim = wait_for(lambda: ranks(agent).get(rank), agent)
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: ranks(agent).get(rank) not in (None, victim), agent)
    end, expected = finish(out, agent), finish(*undisturbed[2])
    assert len(end["rng"]) == 2 and not torch.equal(*(state["torch"] for state in end["rng"]))
    assert_same_end(end, expected)
    starts = steps_of(out, "start")
    assert len(starts) <= 3 and starts[0] == 0 and starts[-1] > 0
    assert steps_of(out) == list(range(1, 41)) and steps_of(out, "epoch") == list(range(5, 41, 5))


def test_a_batch_that_cannot_be_divided_is_refused_in_one_line(tmp_path, small):
    processes = start_pair(tmp_path / "run", *SMALL_RUN, "--data", small, "--batch-size", 9)
    assert [process.wait() for process in processes] == [2, 2]
    assert (tmp_path / "run.log").read_text() == (
        "error: --batch-size 9 is not divisible by 2 process(es) x --accumulate 1\n")


def test_SIGTERM_to_torchrun_saves_the_work_of_all_processes(tmp_path, small, undisturbed):
    """Both stop at the same step; the job continued ends the same bit for bit, with both's dropout masks."""
    out = tmp_path / "run"
    flags = [*LONG_RUN, "--data", small, "--save-every", 1000]
    agent = start(out, *flags, launcher=TORCHRUN)
    log = out / "metrics.jsonl"
    wait_for(lambda: log.exists() and '"train"' in log.read_text(), agent)
    agent.send_signal(signal.SIGTERM)
    agent.wait(timeout=60)
    step, printed = checkpoint(out)["step"], Path(f"{out}.log").read_text()
    assert 0 < step < 40 and printed.count(f"SIGTERM: saved after step {step} ") == 1
    end = finish(out, *start_pair(out, *flags, "--resume", "auto"))
    assert_same_end(end, finish(*undisturbed[2]))
    assert steps_of(out) == list(range(1, 41)) and steps_of(out, "epoch") == list(range(5, 41, 5))


def test_two_processes_take_the_steps_of_one_that_accumulates(tmp_path, small):
    """BatchNorm sees the same micro-batches; after 5 steps the weights have moved alike, to float32 rounding.

    The evaluation under two processes counts each of the 7 images once: a single process that evaluates the
    checkpoint, and two, get the same.
    """
    flags = [*SMALL_RUN, "--data", small, "--lr", 0.005]  # at 0.05 rounding grows a million times in 5 steps
    together = start_pair(tmp_path / "two", *flags)
    run(*flags, "--accumulate", 2, "--out", tmp_path / "one")
    two, one = finish(tmp_path / "two", *together), checkpoint(tmp_path / "one")
    seed_everything(0)
    model = mdeq_imagenet.build_model(parse_args(SMALL_RUN), CLASSES, CPU)
    moved = {name: one["model"][name] - p.detach() for name, p in model.named_parameters()}
    largest = max(m.abs().max() for m in moved.values())
    worst = max((one["model"][name] - two["model"][name]).abs().max() for name in moved)
    assert largest > 0.001 and worst < 1e-4 * largest
    assert "Grad strides" not in (tmp_path / "two.log").read_text()
    rates = [[r["lr"] for r in metrics(tmp_path / n, "train")] for n in ("one", "two")]
    assert rates[0] == rates[1]

    evaluation = [*flags, "--batch-size", 6, "--eval", "--resume", tmp_path / "two" / "checkpoint.pt"]
    lines, out = {}, tmp_path / "eval"
    for n, processes in ((1, [start(f"{out}1", *evaluation)]), (2, start_pair(f"{out}2", *evaluation))):
        assert [process.wait() for process in processes] == [0] * n
        (lines[n],) = [line for line in Path(f"{out}{n}.log").read_text().splitlines() if "top1" in line]
    measured = [line.partition("  rho")[0] for line in lines.values()]
    assert measured[0] == measured[1] and "val images 7" in measured[0]
    (epoch,) = metrics(tmp_path / "two", "epoch")
    assert common.spell({k: epoch[k] for k in ("val_top1", "val_top5", "val_loss")}) in measured[0]
    assert epoch["val_images"] == 7 and len(metrics(tmp_path / "two", "start")) == 1
    assert epoch["val_evals"] == 1 + parse_args(SMALL_RUN).max_iter
