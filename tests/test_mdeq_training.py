"""mdeq_cifar.py as a program: data, wrong input, training, kill and resume, two processes, checkpoints."""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import make_mdeq_example as reference
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from processes import Forked, pair
from torch.nn.parallel import DistributedDataParallel

import common
import mdeq_cifar
from common import Process, equilibrium, init_process, seed_everything
from mdeq_cifar import MDEQ, main, parse_args, prepare, toy_images

ROOT = Path(mdeq_cifar.__file__).parent
SCRIPT = ROOT / "mdeq_cifar.py"
TINY_RUN = ("--data toy --train-size 100 --test-size 50 --batch-size 10 --max-iter 3 --backward-max-iter 3 "
            "--k 2 --epochs 2 --log-every 1").split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
CPU = Process(0, 1, torch.device("cpu"))
NARROW = dict(channels=(8, 8), head_channels=(4, 4), final_channels=16)


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


@pytest.fixture
def narrow(monkeypatch):
    """--model tiny with 8 channels."""
    monkeypatch.setitem(mdeq_cifar.MODELS, "tiny", NARROW)


def run(*flags):
    """The script in this process."""
    main(parse_args([str(flag) for flag in flags]))



@pytest.mark.parametrize("some, last", [(None, 99), (64, 98), (10, 90)])
def test_some_images_are_of_all_classes(some, last):
    """As files may be sorted by class; 64 of 100 were the first 64 once."""
    images = mdeq_cifar.Images(torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8),
                               torch.arange(100), [])
    batches = mdeq_cifar.evaluation_batches(images, parse_args([]), CPU, some)
    y = torch.cat([y for _, y in batches])
    assert len(y) == (some or 100) and y[-1] == last and y.unique().equal(y)


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


# --- data ---------------------------------------------------------------------------------------------------

def test_toy_images_are_the_same_every_time_and_balanced():
    a, b, other = toy_images(60, seed=1), toy_images(60, seed=1), toy_images(60, seed=2)
    assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and not torch.equal(a.x, other.x)
    assert a.x.shape == (60, 3, 16, 16) and a.x.dtype == torch.uint8 and a.y.bincount().tolist() == [6] * 10


def test_toy_images_cannot_be_told_apart_by_a_linear_classifier():
    """Uniform phases give all classes one mean image: logistic regression stays below 25 % (guess: 10 %)."""
    train, test = toy_images(1000, seed=1), toy_images(1000, seed=2)
    x, x_test = (prepare(s.x, False, torch.contiguous_format).flatten(1) for s in (train, test))
    weight, bias = torch.zeros(10, x.shape[1], requires_grad=True), torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.01)
    for _ in range(300):
        loss = F.cross_entropy(F.linear(x, weight, bias), train.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.0        # it has learnt the training images
    assert (F.linear(x_test, weight, bias).argmax(1) == test.y).float().mean() < 0.25


# of CIFAR-10's channels
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])


def test_images_are_normalised_by_the_statistics_of_CIFAR10():
    x = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    expected = ((x.double() / 255).permute(0, 2, 3, 1) - MEAN) / STD
    for memory_format in (torch.contiguous_format, torch.channels_last):
        got = prepare(x, False, memory_format)
        assert got.is_contiguous(memory_format=memory_format) and got.dtype == torch.float32
        assert (got.permute(0, 2, 3, 1) - expected).abs().max() < 1e-6


def test_augmentation_shifts_by_up_to_4_pixels_and_flips():
    """Each output is one of the 9 x 9 x 2 windows of the image padded by 4 black pixels; all 162 occur alike.

    6480 draws: 40 of each expected; chi^2 of 161 degrees of freedom is below 270 with probability 1 - 1e-7.
    """
    torch.manual_seed(0)
    image = torch.randint(1, 256, (3, 8, 8), dtype=torch.uint8)
    got = prepare(image.expand(6480, -1, -1, -1), True, torch.contiguous_format)
    got = ((got.permute(0, 2, 3, 1) * STD + MEAN) * 255).round().to(torch.uint8).permute(0, 3, 1, 2)
    padded = torch.zeros(3, 16, 16, dtype=torch.uint8)
    padded[:, 4:12, 4:12] = image
    windows = [padded[:, i:i + 8, j:j + 8] for i in range(9) for j in range(9)]
    windows = {w.numpy().tobytes(): n for n, w in enumerate([*windows, *(w.flip(2) for w in windows)])}
    assert len(windows) == 162
    counts = torch.zeros(162)
    for one in got:
        counts[windows[one.contiguous().numpy().tobytes()]] += 1            # KeyError: not one of the windows
    assert ((counts - 40) ** 2 / 40).sum() < 270


def test_a_subset_takes_the_first_images_of_each_class_equally():
    images = toy_images(50, seed=0)
    some = mdeq_cifar.balanced(images, 20, "--train-size")
    assert some.y.tolist() == sorted(list(range(10)) * 2)
    for c in range(10):
        assert torch.equal(some.x[some.y == c], images.x[images.y == c][:2])
    assert mdeq_cifar.balanced(images, None, "--train-size") is images


def make_folder(root, classes=("cat", "dog"), each=3, size=(32, 32), kind="png"):
    """root/train/CLASS/*, root/test/CLASS/*; returns {path: pixels (3, 32, 32)}."""
    rng, pixels = torch.Generator().manual_seed(0), {}
    for split in ("train", "test"):
        for c in classes:
            (root / split / c).mkdir(parents=True)
            for i in range(each):
                path = root / split / c / f"{i}.{kind}"
                x = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=rng)
                Image.fromarray(x.numpy()).save(path)
                pixels[path] = x.permute(2, 0, 1)
    return pixels


def load(root):
    return mdeq_cifar.load_images(parse_args(["--data", str(root), "--batch-size", "1"]), CPU)


def test_image_folders_are_read_with_their_labels(tmp_path):
    pixels = make_folder(tmp_path)
    for split, images in zip(("train", "test"), load(tmp_path)):
        assert images.classes == ["cat", "dog"] and images.y.tolist() == [0, 0, 0, 1, 1, 1]
        expected = [p for path, p in sorted(pixels.items()) if path.parts[-3] == split]
        assert torch.equal(images.x, torch.stack(expected))


def test_cifar10_comes_from_torchvision_and_a_failed_download_is_named(tmp_path, monkeypatch, capsys):
    """(N, 32, 32, 3) arrays and lists of labels become (N, 3, 32, 32); both splits, each at its place."""
    pixels = {split: torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8) for split in (True, False)}

    def offline(*_, **__):
        raise RuntimeError("no route to host")

    names = [str(c) for c in range(10)]
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, train, download: types.SimpleNamespace(
        data=pixels[train].numpy(), targets=[(i + train) % 10 for i in range(20)], classes=names))
    for split, images in zip((True, False), load(tmp_path)):
        assert images.classes == names and images.y.tolist() == [(i + split) % 10 for i in range(20)]
        assert torch.equal(images.x, torch.stack([x.permute(2, 0, 1) for x in pixels[split]]))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    flags = ["--data", tmp_path / "none", "--epochs", 1, "--out", tmp_path / "out"]
    assert "there is no such folder" in refused(capsys, *flags)         # and none is made for a misspelt name
    (tmp_path / "none").mkdir()
    message = refused(capsys, *flags)
    assert f"--data {tmp_path / 'none'}" in message and "no route to host" in message


def test_grey_and_transparent_files_become_three_channels(tmp_path):
    make_folder(tmp_path)
    Image.new("L", (32, 32), 77).save(tmp_path / "train" / "cat" / "0.png")
    Image.new("RGBA", (32, 32), (1, 2, 3, 4)).save(tmp_path / "train" / "cat" / "1.png")
    train, _ = load(tmp_path)
    assert (train.x[0] == 77).all() and train.x[1, :, 0, 0].tolist() == [1, 2, 3]


def test_sixteen_bits_become_eight_and_numbers_without_a_range_are_refused(tmp_path):
    """PIL's convert("RGB") would clip at 255: all that is not nearly black would be white."""
    x = np.array([[0, 255, 256], [65535, 40000, 513]])
    for name, mode in (("a.png", np.uint16), ("b.pgm", np.uint16)):
        Image.fromarray(x.astype(mode)).save(tmp_path / name)
        image = mdeq_cifar.read_image(tmp_path / name)
        assert image.mode == "RGB" and np.asarray(image)[:, :, 1].tolist() == [[0, 0, 1], [255, 156, 2]], name
    for kind in (np.uint16, np.int32, np.float32):          # of 16 bits a TIFF may use 12, or have white at 0
        Image.fromarray(x.astype(kind)).save(tmp_path / "e.tif")
        with pytest.raises(ValueError, match="the value of white is not known in a TIFF"):
            mdeq_cifar.read_image(tmp_path / "e.tif")


def test_every_image_counts_whatever_its_name_and_nothing_hidden_does(tmp_path, capsys):
    make_folder(tmp_path)
    image = Image.new("RGB", (32, 32))
    for name in ("a.jfif", "b.gif", "c", "d.JPEG", "notes.txt", ".hidden.png"):
        image.save(tmp_path / "train" / "cat" / name, format="PNG") if name != "notes.txt" else (
            tmp_path / "train" / "cat" / name).write_text("no image")
    for split in ("train", "test"):
        (tmp_path / split / ".ipynb_checkpoints").mkdir()
        image.save(tmp_path / split / ".ipynb_checkpoints" / "a.png")
    image.save(tmp_path / "test" / "loose.png")
    (tmp_path / "test" / "dog" / "more").mkdir()
    image.save(tmp_path / "test" / "dog" / "more" / "a.png")
    (tmp_path / "test" / "dog" / "again").symlink_to(tmp_path / "test" / "dog")        # without end
    train, test = load(tmp_path)
    assert train.classes == ["cat", "dog"] and train.y.bincount().tolist() == [7, 3] and len(test.y) == 7
    note, *_ = capsys.readouterr().out.splitlines()
    assert note.startswith("note: 3 file(s) of --data that are no images") and note.endswith("notes.txt")


def test_folders_that_are_numbers_are_the_classes_of_these_numbers(tmp_path):
    names = list(map(str, range(12)))
    make_folder(tmp_path, classes=names, each=1)
    train, _ = load(tmp_path)           # files are read in the order of their names: 0, 1, 10, 11, 2, ...
    assert train.classes == names and train.y.tolist() == list(map(int, sorted(names)))


@pytest.mark.parametrize("classes", [("cat", "dog"), ("1", "01", "2")])
def test_images_are_in_the_order_of_torchvision(classes, tmp_path):
    """Runs of earlier versions had torchvision's ImageFolder: a seed means the same batches."""
    make_folder(tmp_path, classes)
    ((ours, samples),) = mdeq_cifar.image_folders(tmp_path, CPU, "train")
    assert [path for path, _ in samples] == [path for path, _ in torchvision.datasets.ImageFolder(
        tmp_path / "train").samples]
    assert ours == sorted(classes)


def test_a_folder_named_like_a_preset_is_no_preset():
    assert parse_args(["--data", "large"]).epochs == 50


def test_a_run_knows_the_pixels_that_it_began_with(tmp_path, capsys):
    """As many images in the same classes, other pixels."""
    make_folder(tmp_path / "data")
    flags = [*"--batch-size 3 --max-iter 1 --k 1 --epochs 1".split(), "--data", tmp_path / "data",
             "--out", tmp_path / "out"]
    run(*flags)
    Image.new("RGB", (32, 32)).save(tmp_path / "data" / "train" / "cat" / "0.png")
    assert "is of a run with train_images" in refused(capsys, *flags, "--resume", "auto")


def test_cifar10_is_not_downloaded_among_other_files(tmp_path, monkeypatch, capsys):
    def download(*_, **__):
        pytest.fail("a download")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", download)
    make_folder(tmp_path / "data")
    (tmp_path / "data" / "test").rename(tmp_path / "data" / "val")
    for split in ("train", "train/cat"):            # without test/, then without train/
        message = refused(capsys, *TINY_RUN, "--data", tmp_path / "data", "--out", tmp_path / "out")
        assert "it must hold train/CLASS/*, test/CLASS/*" in message
        (tmp_path / "data" / "train").rename(tmp_path / "data" / "training") if split == "train" else None


@pytest.mark.parametrize("flag", ["--data", "--out"])
def test_a_tilde_is_the_home_folder(flag, tmp_path, monkeypatch):
    """A shell expands it at the beginning of a word alone, not in --data=~/images."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert getattr(parse_args([f"{flag}=~/x"]), flag[2:]) == str(tmp_path / "x")
    (tmp_path / "checkpoint.pt").touch()
    assert common.existing_file("~/checkpoint.pt") == str(tmp_path / "checkpoint.pt")


# --- wrong flags and wrong data -----------------------------------------------------------------------------

@pytest.mark.parametrize("flags, named", [
    ("--k 0", "--k"), ("--lam 0", "--lam"), ("--lam 1.5", "--lam"), ("--lam nan", "--lam"),
    ("--solver newton", "--solver"), ("--backward-solver newton", "--backward-solver"),
    ("--max-iter 0", "--max-iter"), ("--backward-max-iter 0", "--backward-max-iter"),
    ("--epochs 0", "--epochs"),
    ("--batch-size 0", "--batch-size"), ("--tol -1", "--tol"), ("--dropout 1", "--dropout"),
    ("--lr abc", "--lr"),
    ("--grad bptt --solver broyden", "--grad bptt"), ("--eval", "--resume"), ("--resume auto", "--out"),
    ("--grad exact", "--grad"), ("--sync-bn", "--sync-bn needs a GPU"),
    ("--cuda-graph", "--cuda-graph needs a GPU"),
    ("--train-size 15", "--train-size 15: must be a multiple of the 10"),
    ("--batch-size 101", "there are only 100 training images"),
    ("--test-size 0", "--test-size"), ("--seed -1", "--seed"), ("--seed 4294967296", "--seed"),
    ("--benchmark --eval", "--eval"),
    ("--data nowhere --resume nowhere.pt --out unused", "argument --resume: there is no file nowhere.pt")])
def test_a_wrong_flag_is_named(flags, named, capsys, tmp_path, monkeypatch, narrow):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, *TINY_RUN, *flags.split())
    assert named in message
    assert not list(tmp_path.iterdir())                                     # nothing was written
    assert flags != "--k 0" or message.endswith("argument --k: must be in [1, inf), got 0")


@pytest.mark.parametrize("flags, named", [("--tol 1e-3", "--tol 0"),
                                          ("--solver anderson", "neither anderson"),
                                          ("--backward-solver anderson", "neither anderson"),
                                          ("--sync-bn", "--sync-bn")])
def test_what_a_cuda_graph_cannot_do_is_refused(flags, named, capsys, monkeypatch):
    """It is the default if a GPU is there and nothing is in its way."""
    assert not parse_args([]).cuda_graph
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parse_args([]).cuda_graph and not parse_args(["--no-cuda-graph"]).cuda_graph
    assert not parse_args(flags.split()).cuda_graph
    assert parse_args(["--cuda-graph"]).cuda_graph
    message = refused(capsys, "--cuda-graph", *flags.split())
    assert "--cuda-graph needs" in message and named in message


def test_a_batch_that_does_not_divide_by_the_processes_is_refused(capsys, monkeypatch, tmp_path):
    other = Process(0, 3, torch.device("cpu"))
    monkeypatch.setattr(mdeq_cifar, "init_process", lambda: other)
    monkeypatch.setattr(Process, "sum", lambda self, x: x)
    message = refused(capsys, *TINY_RUN, "--out", tmp_path / "run")
    assert message == "error: --batch-size 10 is not divisible by 3 process(es)"


def break_test_class(root):
    (root / "test" / "dog").rename(root / "test" / "dig")
    return "only in train: ['dog'], only in test: ['dig']"


def break_no_classes(root):
    for split in ("train", "test"):
        for path in sorted((root / split).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    return "train"


def break_empty_class(root):
    for path in (root / "train" / "cat").iterdir():
        path.unlink()
    return "cat"


def break_truncated(root):
    path = root / "train" / "dog" / "1.jpeg"
    path.write_bytes(path.read_bytes()[:200])
    return str(path)


def break_not_an_image(root):
    path = root / "test" / "cat" / "2.jpeg"
    path.write_text("<html>not found</html>")
    return str(path)


def break_side(root):
    path = root / "train" / "dog" / "0.jpeg"
    Image.new("RGB", (32, 31)).save(path)
    return str(path)


@pytest.mark.parametrize("break_it", [break_test_class, break_no_classes, break_empty_class, break_truncated,
                                      break_not_an_image, break_side])
def test_broken_data_is_named_before_training(break_it, tmp_path, capsys):
    """No traceback after an hour: one line that names the folder or the file."""
    make_folder(tmp_path / "data", kind="jpeg")
    named = break_it(tmp_path / "data")
    message = refused(capsys, "--data", tmp_path / "data", "--out", tmp_path / "out", "--epochs", 1,
                      "--max-iter", 1)
    assert "--data" in message and named in message
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_other_runs_are_refused(tmp_path, capsys, monkeypatch, narrow):
    """Other flags would change the curve in silence: the difference is named.

    What --eval brings may differ.
    """
    out = tmp_path / "run"
    run(*TINY_RUN, "--epochs", 1, "--out", out)
    before = (out / "metrics.jsonl").read_text()
    again = [*TINY_RUN, "--epochs", 1, "--out", out]
    assert "already holds a run" in refused(capsys, *again)
    more = "--lam 0.4 --seed 3 --grad npg --epochs 3 --model large --dropout 0.1"
    message = refused(capsys, *again, "--resume", "auto", *more.split())
    for named in ("--lam 0.5 (here 0.4)", "--seed 0 (here 3)", "--grad upg (here npg)", "--epochs 1 (here 3)",
                  "--model tiny (here large)", "--dropout 0.0 (here 0.1)"):
        assert named in message
    evaluation = ["--eval", "--resume", str(out / "checkpoint.pt")]         # brings what is not given
    args = parse_args(evaluation)
    assert (args.data, args.test_size, args.max_iter, args.k) == ("toy", 50, 3, 5)
    assert parse_args([*evaluation, "--max-iter", "9", "--data", "d"]).max_iter == 9
    assert "does not fit the model" in refused(capsys, *evaluation, "--model", "large")
    run(*evaluation, "--max-iter", 9)
    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["note: trained with --max-iter 3, evaluated with 9"]
    assert "50 images" in printed.out and "test accuracy" in printed.out
    torch.save({"args": {"crop": 224}, "model": {}}, tmp_path / "imagenet.pt")
    monkeypatch.setattr(mdeq_cifar, "load_images", lambda *_: pytest.fail("the data was read first"))
    assert "another script" in refused(capsys, "--eval", "--resume", tmp_path / "imagenet.pt")
    assert (out / "metrics.jsonl").read_text() == before


def test_official_checkpoints_can_be_evaluated_but_not_continued(tmp_path, capsys):
    """{"state_dict": {"module....": tensor}} as the release saves it; --eval prints that model's accuracy."""
    torch.manual_seed(0)
    sd = {k: v.float() if v.is_floating_point() else v for k, v in
          reference.random_state_dict(channels=(24, 24), head=(8, 16), final=200).items()}
    saved = {"epoch": 49, "perf": 0.0,
             "state_dict": {f"module.{k}": v for k, v in reference.with_aliases(sd).items()}}
    torch.save(saved, tmp_path / "official.pth.tar")
    flags = [*"--data toy --train-size 50 --test-size 50 --max-iter 3 --resume".split(),
             tmp_path / "official.pth.tar"]
    run(*flags, "--eval")
    printed = capsys.readouterr().out
    x, y = (t for t in toy_images(50, seed=2)[:2])
    model = MDEQ(solve=partial(equilibrium, max_iter=3, tol=0.0, stop_mode="rel_joint")).eval()
    mdeq_cifar.load_official(model, sd)
    with torch.no_grad():
        correct = (model(prepare(x, False, torch.contiguous_format)).argmax(1) == y).sum().item()
    assert f"test accuracy {2 * correct}" in printed and "50 images" in printed
    assert "--eval" in refused(capsys, *flags, "--out", tmp_path / "out")
    torch.save({"state_dict": {**saved["state_dict"], "module.surprise": torch.zeros(1)}},
               tmp_path / "odd.pth.tar")
    assert 'Unexpected key(s) in state_dict: "surprise"' in refused(capsys, *flags[:-1],
                                                                    tmp_path / "odd.pth.tar", "--eval")
    torch.save({"state_dict": {k: v for k, v in sd.items() if not k.endswith("0.blocks.0.conv1.weight_v")}},
               tmp_path / "less.pth.tar")
    assert 'Missing key(s) in state_dict: "blocks.0.conv1' in refused(capsys, *flags[:-1],
                                                                      tmp_path / "less.pth.tar", "--eval")


# --- training -----------------------------------------------------------------------------------------------

def test_a_short_run_learns_what_a_linear_classifier_cannot(tmp_path, narrow):
    """80 steps of 8 channels reach about 58 % of the gratings; 45 % is far beyond the linear 25 %."""
    run(*"--data toy --train-size 1000 --test-size 200 --batch-size 25 --epochs 2 --max-iter 4 --k 3".split(),
        "--log-every", 20, "--out", tmp_path)
    losses = [record["loss"] for record in metrics(tmp_path, "train")]
    assert losses[-1] < 0.8 * losses[0]
    first, last = metrics(tmp_path, "epoch")
    assert last["test_accuracy"] > 45
    assert [(r["best_accuracy"], r["best_epoch"]) for r in (first, last)] == [
        (first["test_accuracy"], 1), max((r["test_accuracy"], r["epoch"]) for r in (first, last))]
    assert last["test_evals"] == 5 and last["step"] == 80
    score = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["score"]
    assert score["last"] == last["test_accuracy"] and score["best"] == last["best_accuracy"]


@pytest.mark.parametrize("grad", ["npg", "implicit", "bptt"])
def test_every_gradient_trains(grad, tmp_path, narrow):
    """A few steps of Adam with pretraining, dropout and augmentation switched on."""
    solver = ["--solver", "fixed-point"] if grad == "bptt" else []
    run(*TINY_RUN, *solver, *"--train-size 50 --optimizer adam --pretrain-steps 2 --dropout 0.1".split(),
        *"--augment yes --epochs 1 --grad".split(), grad, "--out", tmp_path)
    assert [r["step"] for r in metrics(tmp_path, "train")] == [1, 2, 3, 4, 5]
    assert all(0 < r["loss"] < 10 for r in metrics(tmp_path, "train"))
    (epoch,) = metrics(tmp_path, "epoch")
    assert epoch["train_residual_p50"] > 0 and ("backward_residual_p50" in epoch) == (grad == "implicit")


@pytest.mark.parametrize("name", mdeq_cifar.SOLVERS)
def test_the_backward_solver_of_the_command_solves_for_the_gradient_alone(name, tmp_path, monkeypatch,
                                                                          narrow):
    """Three steps, three backward solves of the whole budget: --backward-max-iter and one more call."""
    found, forward = [], "anderson" if name == "broyden" else "broyden"
    for other, solver in mdeq_cifar.SOLVERS.items():
        monkeypatch.setitem(mdeq_cifar.SOLVERS, other, lambda *a, other=other, solver=solver, **options: (
            found.append((other, solver(*a, **options))), found[-1][1])[1])
    run(*TINY_RUN, *"--train-size 30 --test-size 10 --epochs 1 --grad implicit --backward-max-iter 4".split(),
        "--solver", forward, "--backward-solver", name, "--out", tmp_path)
    assert [result.n_evals for other, result in found if other == name] == 3 * [5]
    assert [result.n_evals for other, result in found if other == forward] == 4 * [4]      # and an evaluation


def test_a_captured_pass_trains_as_an_eager_one(tmp_path, monkeypatch, narrow):
    """--cuda-graph with a stand-in, which overwrites what it returned before; the last batch is eager."""
    captures = []

    def captured(training, example):
        kept = None
        captures.append(tuple(example.shape))

        def forward(x, unroll=0):
            nonlocal kept
            logits, residual = training(x, unroll=unroll)
            if x.shape != example.shape or unroll:
                return logits, residual
            kept = residual if kept is None else kept.copy_(residual)
            return logits, kept

        return forward

    note, solves = mdeq_cifar.TrainingPass.note, []
    monkeypatch.setattr(mdeq_cifar.TrainingPass, "note", lambda self, result: (
        solves.append(result.residual.clone()), note(self, result))[1])
    monkeypatch.setattr(mdeq_cifar, "captured", captured)
    flags = [*TINY_RUN, *"--train-size 50 --batch-size 20 --pretrain-steps 1 --grad implicit --out".split()]
    for graph in (False, True):
        args = parse_args([*flags, str(tmp_path / str(graph))])
        args.cuda_graph = graph
        main(args)
    eager, graph = (metrics(tmp_path / name, "epoch") for name in ("False", "True"))
    same = [name for name in eager[0] if name != "seconds"]
    assert captures == [(20, 3, 16, 16)] and {"train_residual_p50", "backward_residual_p90"} <= set(same)
    assert [[r[name] for name in same] for r in eager] == [[r[name] for name in same] for r in graph]
    last = mdeq_cifar.health("backward", solves[-3:], 0, CPU)       # the last epoch's three
    assert len(solves) == 2 * 5 and last == {name: graph[-1][name] for name in last}


def test_the_recipe_is_the_papers(tmp_path, narrow):
    """SGD 0.1 and momentum 0.9 with 1e-4, or Adam 0.001 with 2.5e-6, of all parameters; cosine to 1e-6.

    Convolutions in TF32 are torch's default, which --no-tf32 changes.
    """
    for name, lr, decay in (("sgd", 0.1, 1e-4), ("adam", 0.001, 2.5e-6)):
        out = tmp_path / name
        run(*TINY_RUN, *"--train-size 20 --test-size 10 --optimizer".split(), name, "--out", out,
            *["--no-tf32"] * (name == "adam"))
        assert torch.backends.cudnn.allow_tf32 == (name == "sgd")
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        (group,), schedule = state["optimizer"]["param_groups"], state["scheduler"]
        assert group["weight_decay"] == decay and group.get("momentum") == (0.9 if name == "sgd" else None)
        assert len(group["params"]) == len(list(MDEQ().parameters()))
        assert (schedule["T_max"], schedule["eta_min"], schedule["base_lrs"]) == (4, 1e-6, [lr])
        expected = [1e-6 + (lr - 1e-6) * (1 + math.cos(t * math.pi / 4)) / 2 for t in range(4)]
        assert [r["lr"] for r in metrics(out, "train")] == pytest.approx(expected, rel=1e-5)


def test_the_pretraining_network_is_used_for_the_first_steps_and_the_solver_after(tmp_path, monkeypatch,
                                                                                  narrow):
    forward, unrolls = MDEQ.forward, []

    def watched(self, x, unroll=0, **kwargs):
        if self.training:
            unrolls.append(unroll)
        return forward(self, x, unroll=unroll, **kwargs)

    monkeypatch.setattr(MDEQ, "forward", watched)
    run(*TINY_RUN, *"--train-size 50 --epochs 1 --pretrain-steps 3 --pretrain-layers 2 --out".split(),
        tmp_path)
    assert unrolls == [2] * 3 + [0] * 2


def test_training_images_alone_are_augmented(tmp_path, monkeypatch, narrow):
    seen, prepare_one = [], mdeq_cifar.prepare
    monkeypatch.setattr(mdeq_cifar, "prepare", lambda x, augment, memory_format: (
        seen.append(augment), prepare_one(x, augment, memory_format))[1])
    for augment in ("yes", "no"):
        run(*TINY_RUN, *"--train-size 20 --test-size 10 --epochs 1 --augment".split(), augment, "--out",
            tmp_path / augment)
    assert seen == [True, True] + [False] * 4


def test_cosines_and_radii_do_not_change_a_run(tmp_path, narrow, capsys):
    """Fig. 2 and D.2 leave dropout masks, BatchNorm statistics and the gradient of the training alone."""
    flags = [*TINY_RUN, *"--train-size 30 --test-size 10 --epochs 1 --dropout 0.2".split()]
    run(*flags, "--out", tmp_path / "a")
    capsys.readouterr()
    run(*flags, *"--cosine-every 2 --radius-every 2 --out".split(), tmp_path / "b")
    ((cosine,), (radius,)) = (metrics(tmp_path / "b", event) for event in ("cosine", "radius"))
    assert cosine["step"] == radius["step"] == 2 and radius["rho_J"] > 0
    assert all(-1 <= cosine[f"cosine_{name}"] <= 1 for name in ("upg", "npg", "gmres"))
    printed = capsys.readouterr().out
    assert f"cosine upg {cosine['cosine_upg']:.5g}  " in printed
    assert f"rho J {radius['rho_J']:.5g}  " in printed
    a, b = (torch.load(tmp_path / d / "checkpoint.pt", weights_only=True) for d in "ab")
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert torch.equal(a["rng"][0]["torch"], b["rng"][0]["torch"])


def small_model(max_iter, scale=0.5):
    """(model, images, labels, arguments); scale: of gains in F, which contracts with 0.5, not with 20."""
    torch.manual_seed(0)
    solve = partial(equilibrium, max_iter=max_iter, tol=0.0, stop_mode="rel_joint", k=3)
    model = MDEQ(**NARROW, solve=solve).double()
    for block, norm in zip(model.blocks, model.post_gn):
        for p, value in ((block.gn1.weight, 0.6 * scale), (block.gn1.bias, 1.0), (norm.weight, scale)):
            torch.nn.init.constant_(p, value)
    args = parse_args([*TINY_RUN, "--k", "3", "--max-iter", str(max_iter)])
    return model, torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.arange(3), args


def of_f(model):
    others = ("stem", "injection", "bottlenecks", "down", "final", "classifier")
    return [p for name, p in model.named_parameters() if not name.startswith(others)]


def gradient_of_f(model, x, y, **settings):
    """What an ordinary backward pass with these settings of `solve` leaves in the parameters of F."""
    model.solve = partial(model.solve, **settings)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return torch.cat([p.grad.flatten() for p in of_f(model)])


def exact_gradient_of_f(model, x, y):
    """The same by (I - J^T)^-1 with the dense Jacobian of each image, at the state that the solver finds."""
    f, h0 = model.problem(x)
    with torch.no_grad():
        h, _ = model.solve(f, h0)
    h = [part.requires_grad_() for part in h]

    def flat(parts):
        return torch.cat([part.flatten(1) for part in parts], dim=1)                                # (N, D)

    g = flat(torch.autograd.grad(F.cross_entropy(model.head(h), y), h))
    f_h = flat(f(tuple(h)))
    # One image's row says nothing of the others: row i of each Jacobian at once.
    J = [flat(torch.autograd.grad(f_h[:, i].sum(), h, retain_graph=True)) for i in range(f_h.shape[1])]
    g_hat = torch.linalg.solve(torch.eye(len(J)).double() - torch.stack(J, 1).mT, g)
    return torch.cat([p.flatten() for p in torch.autograd.grad(f_h, of_f(model), g_hat)])


@pytest.mark.parametrize("max_iter, solved", [(30, True), (3, False)])
def test_cosines_are_of_the_gradients_of_the_parameters_of_F(max_iter, solved):
    """Each beside the dense solution at the same state.  A residual of 1e-3 turns the exact one by so much.

    At a fixed point UPG is NPG; away from it all three differ.
    """
    model, x, y, args = small_model(max_iter)
    got, exact = mdeq_cifar.gradient_cosines(model, x, y, args), exact_gradient_of_f(model, x, y)
    others = {"upg": dict(grad="upg"), "npg": dict(grad="npg"),
              "gmres": dict(grad="implicit", backward_max_iter=3, backward_tol=0.0)}
    expected = {name: F.cosine_similarity(gradient_of_f(model, x, y, **settings), exact, dim=0).item()
                for name, settings in others.items()}
    assert all(abs(got[f"cosine_{name}"] - expected[name]) < 1e-3 for name in others), (got, expected)
    assert len({round(value, 2)
                for value in expected.values()}) == 3 - solved and max(expected.values()) < 0.95
    assert got["cosine_backward_residual"] <= 1e-3 and (got["cosine_forward_residual"] <= 1e-3) == solved
    assert got["cosine_verified"] == solved


def test_a_gradient_that_is_not_exact_is_not_called_so():
    """A Jacobian for which 200 products do not suffice."""
    got = mdeq_cifar.gradient_cosines(*small_model(max_iter=30, scale=20.0))
    assert got["cosine_backward_residual"] > 1e-3 and got["cosine_verified"] == 0


def test_radii_are_means_at_the_equilibria_of_images_of_all_classes(monkeypatch, narrow):
    """64 images, evenly from 130 that are sorted by class: of J (lam = 1) and of J_lam."""
    args, states = parse_args([*TINY_RUN, "--lam", "0.7", "--batch-size", "64"]), []
    model, images = mdeq_cifar.build_model(args, 10, CPU), toy_images(130, seed=2)

    def radius(f, h, *, lam, n_iter):
        states.append(h[0])
        return lam + torch.arange(len(h[0])).float()

    monkeypatch.setattr(mdeq_cifar, "spectral_radius", radius)
    assert mdeq_cifar.radii(model, images, args, CPU) == pytest.approx({
        "rho_J": 1 + 31.5, "rho_J_lam": 0.7 + 31.5, "rho_J_above_1": 63 / 64})
    with torch.no_grad():
        _, result = model.eval()(prepare(images.x[torch.arange(64) * 130 // 64], False, mdeq_cifar.memory_format(args)),
                                 with_result=True)
    assert (states[0] - result.h[0]).abs().max() < 1e-4 and torch.equal(states[0], states[1])


def test_evaluation_counts_every_image_once(narrow):
    """The last, smaller batch weighs by its images."""
    args = parse_args([*TINY_RUN, "--batch-size", "8"])
    model, images = mdeq_cifar.build_model(args, 10, CPU), toy_images(19, seed=3)
    record = mdeq_cifar.evaluate(model, images, args, CPU)
    model.eval()
    with torch.no_grad():
        logits = model(prepare(images.x, False, mdeq_cifar.memory_format(args)))
    accuracy = 100 * (logits.argmax(1) == images.y).float().mean().item()
    assert record["test_accuracy"] == pytest.approx(accuracy, abs=1e-4)
    assert record["test_loss"] == pytest.approx(F.cross_entropy(logits, images.y).item(), rel=1e-4)


def all_finite(state):
    return all(v.isfinite().all() for v in state["model"].values())


def test_a_loss_that_is_not_a_number_ends_the_run_at_the_last_good_checkpoint(tmp_path, capsys, monkeypatch,
                                                                              narrow):
    """The message names the step and the checkpoint, which has finite weights and can be continued."""
    prepare_once, calls = mdeq_cifar.prepare, []

    def broken(x, augment, memory_format):
        calls.append(1)
        return prepare_once(x, augment, memory_format) * (float("nan") if len(calls) == 6 else 1)

    monkeypatch.setattr(mdeq_cifar, "prepare", broken)
    flags = [*TINY_RUN, "--save-every", 0, "--log-every", 2, "--out", tmp_path / "run"]
    message = refused(capsys, *flags, code=1)
    assert "nan" in message and "step 6" in message and str(tmp_path / "run" / "checkpoint.pt") in message
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 5 and all_finite(state)
    run(*flags, "--resume", "auto")                 # prepare breaks only once
    assert [r["step"] for r in metrics(tmp_path / "run", "train")] == list(range(1, 21))


@pytest.mark.parametrize("lr", ["1e9", "1e38"])
def test_a_learning_rate_far_too_high_ends_the_run(lr, tmp_path, capsys, narrow):
    """Exit code 1, and the checkpoint that the message names has finite weights."""
    flags = [*TINY_RUN, "--lr", lr, "--save-every", 0, "--out", tmp_path / "run"]
    message = refused(capsys, *flags, code=1)
    assert "step" in message
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    assert not checkpoint.exists() or all_finite(torch.load(checkpoint, weights_only=True))
    assert not checkpoint.exists() or str(checkpoint) in message


def test_broken_weights_are_never_saved(tmp_path, capsys, monkeypatch, narrow):
    """A step with a finite loss and a gradient that is not: its weights must not replace the good ones."""
    build, calls = mdeq_cifar.build_model, []

    def build_model(*args):
        model = build(*args)
        model.classifier.bias.register_hook(lambda g: calls.append(1)
                                            or g * (float("nan") if len(calls) == 4 else 1))
        return model

    monkeypatch.setattr(mdeq_cifar, "build_model", build_model)
    message = refused(capsys, *TINY_RUN, "--save-every", 0, "--out", tmp_path / "run", code=1)
    assert str(tmp_path / "run" / "checkpoint.pt") in message
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert all_finite(state) and state["step"] == 3


def test_the_benchmark_measures_every_gradient_and_leaves_the_weights_as_they_are(capsys, monkeypatch,
                                                                                  narrow):
    """Steps in turns, with all of the iterations; ratios are those of the printed times.

    Table: common.py's.
    """
    steps, models, forward, build = [], [], MDEQ.forward, mdeq_cifar.build_model
    monkeypatch.setattr(MDEQ, "forward", lambda self, x, **more: (
        steps.append(tuple(self.solve.keywords[name] for name in ("grad", "k", "tol", "max_iter"))),
        forward(self, x, **more))[1])
    monkeypatch.setattr(mdeq_cifar, "build_model", lambda *args: (
        models.append(build(*args)), models.append([p.clone() for p in models[0].parameters()]))[0]
        or models[0])
    monkeypatch.setattr(mdeq_cifar, "benchmark", partial(common.benchmark, repeats=1))
    run(*"--benchmark --data toy --grad npg --k 2 --max-iter 3 --backward-max-iter 3 --tol 0.5".split(),
        "--batch-size", 20)
    assert steps == 2 * [("implicit", 2, 0, 3), ("upg", 2, 0, 3), ("upg", 2, 0, 3), ("npg", 2, 0, 3),
                         ("npg", 1, 0, 3), ("npg", 20, 0, 3)]
    assert all(map(torch.equal, models[0].parameters(), models[1]))
    lines = [line.replace("x", "").split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines if line and line[0] == "upg,"] == [["upg,", "--recompute"]]
    rows = {line[0]: [float(v) for v in line[1:]] for line in lines if line and line[0] in dict.fromkeys(
        step[0] for step in steps)}
    assert list(rows) == ["implicit", "upg", "npg"]
    for _, backward, step, _, per_second, backward_ratio, step_ratio in rows.values():
        assert backward_ratio == pytest.approx(rows["implicit"][1] / backward, rel=0.1)
        assert step_ratio == pytest.approx(rows["implicit"][2] / step, rel=0.1)
        assert per_second == pytest.approx(20e3 / step, rel=0.1)


# --- kill and resume ----------------------------------------------------------------------------------------

def same_run(a, b, steps, epochs):
    """Both ended with the same weights, momenta and random numbers, and have logged each step once, alike."""
    one, two = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (a, b))
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    momenta = [[s["momentum_buffer"] for s in c["optimizer"]["state"].values()] for c in (one, two)]
    assert all(map(torch.equal, *momenta)) and len(momenta[0]) > 50 and one["score"] == two["score"]
    assert all(torch.equal(x["torch"], y["torch"]) for x, y in zip(one["rng"], two["rng"], strict=True))
    for event, expected in (("train", steps), ("epoch", epochs)):
        logs = [metrics(out, event) for out in (a, b)]
        assert [[r["step"] for r in log] for log in logs] == 2 * [list(expected)]
        kept = [name for name in logs[0][0] if name.startswith(("loss", "test", "train", "best", "accuracy"))]
        assert [[r[name] for name in kept] for r in logs[0]] == [[r[name] for name in kept] for r in logs[1]]


def test_a_signal_in_an_evaluation_is_obeyed_after_it_and_nothing_is_lost(tmp_path, monkeypatch, narrow,
                                                                          capsys):
    """The epoch is evaluated and saved, the next one's first step done; the run then ends like any other."""
    flags = [*TINY_RUN, "--dropout", 0.2, "--out"]
    run(*flags, tmp_path / "a")
    real, calls = mdeq_cifar.evaluate, []

    def sent(*args):
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(mdeq_cifar, "evaluate", sent)
    run(*flags, tmp_path / "b")
    assert "Ctrl-C: saved after step 11" in capsys.readouterr().out and len(calls) == 1
    assert [record["step"] for record in metrics(tmp_path / "b", "epoch")] == [10]
    run(*flags, tmp_path / "b", "--resume", "auto")
    same_run(tmp_path / "a", tmp_path / "b", range(1, 21), (10, 20))


def test_an_evaluation_that_was_logged_but_not_saved_is_logged_once(tmp_path, monkeypatch, narrow):
    real, saves = common.save_checkpoint, []

    def crash(path, state):
        saves.append((state["step"], state["batch"]))
        if saves[-1] == (10, 0) and saves.count((10, 0)) == 1:      # the epoch's steps are saved already
            raise KeyboardInterrupt
        real(path, state)

    monkeypatch.setattr(common, "save_checkpoint", crash)
    with pytest.raises(KeyboardInterrupt):
        run(*TINY_RUN, "--out", tmp_path)
    run(*TINY_RUN, "--out", tmp_path, "--resume", "auto")
    assert [record["step"] for record in metrics(tmp_path, "epoch")] == [10, 20]
    assert [record["step"] for record in metrics(tmp_path, "train")] == list(range(1, 21))


def test_a_run_is_not_continued_on_other_images(tmp_path, narrow, capsys):
    flags = [*TINY_RUN, *"--train-size 20 --test-size 10 --epochs 1 --out".split()]
    run(*flags, tmp_path / "a")
    state = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)
    for key, value, message in (("images", 99, "images 99, here 20"),
                                ("classes", ["cat"], "classes ['cat'], here")):
        torch.save({**state, "facts": {**state["facts"], key: value}}, tmp_path / "b.pt")
        assert message in refused(capsys, *flags, tmp_path / "c", "--resume", tmp_path / "b.pt")
    assert "other classes" in refused(capsys, "--data", "toy", "--eval", "--resume", tmp_path / "b.pt")


def test_the_best_epoch_counts_only_as_long_as_the_test_images_are_the_same(tmp_path, narrow, monkeypatch):
    flags = [*TINY_RUN, *"--train-size 20 --test-size 10 --epochs 1 --out".split(), tmp_path]
    run(*flags)
    for seed, kept in ((2, True), (3, False)):
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        state["score"].update(best=100.0, best_epoch=7)
        torch.save({**state, "epoch": 0, "batch": 2}, tmp_path / "checkpoint.pt")      # before the evaluation
        monkeypatch.setattr(mdeq_cifar, "toy_images", lambda n, seed,
                            s=seed: toy_images(n, s if seed == 2 else 1))
        run(*flags, "--resume", "auto")
        record = metrics(tmp_path, "epoch")[-1]
        assert record["best_epoch"] == (7 if kept else 1)
        assert record["best_accuracy"] == (100 if kept else record["test_accuracy"])


def of_8_channels(*flags):
    """Not too fast, so that a kill meets it."""
    real, mdeq_cifar.MODELS["tiny"] = mdeq_cifar.prepare, NARROW
    mdeq_cifar.prepare = lambda *args: time.sleep(0.01) or real(*args)
    run(*flags)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(world, tmp_path):
    """SIGKILL, SIGTERM to one process, SIGKILL, Ctrl-C: equal bit for bit, on one process and on two.

    Data order, augmentation, dropout masks, optimiser and schedule all continue where they were.
    """
    def start(out, *more):
        flags = [*TINY_RUN, *"--epochs 3 --save-every 0 --dropout 0.2 --augment yes --out".split(), out,
                 *more]
        return pair(f"{out}.log", of_8_channels, *flags) if world == 2 else [
            Forked(f"{out}.log", of_8_channels, *flags)]

    undisturbed, rng, path = start(tmp_path / "a"), random.Random(0), tmp_path / "b" / "checkpoint.pt"
    for kill, name in ((signal.SIGKILL, ""), (signal.SIGTERM, "SIGTERM"), (signal.SIGKILL, ""),
                       (signal.SIGINT, "Ctrl-C")):
        processes = start(tmp_path / "b", "--resume", "auto")
        before = path.stat().st_mtime_ns if path.exists() else None
        while processes[0].poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.01)        # until there is something new to resume
        time.sleep(rng.uniform(0, 0.03))
        for process in processes[:1] if kill == signal.SIGTERM else processes:
            os.kill(process.pid, kill)
        ends = [process.wait() for process in processes]
        assert ends == world * [-kill if kill == signal.SIGKILL else 0]     # the others save and end
        assert f"{name}: saved after step" in (tmp_path / "b.log").read_text() or not name
    for process in (*undisturbed, *start(tmp_path / "b", "--resume", "auto")):
        process.finish()
    text = (tmp_path / "b.log").read_text()
    assert text.count("done: ") == 1 and text.count("saved after step") == 2
    assert metrics(tmp_path / "b", "start")[-1]["step"] >= 4                # it was resumed, not begun again
    same_run(tmp_path / "a", tmp_path / "b", range(1, 31), (10, 20, 30))


# --- two processes ------------------------------------------------------------------------------------------

def changes(grad, process):
    """What a step of SGD adds to each parameter; in eval mode, as BatchNorm's statistics are per process."""
    torch.manual_seed(0)
    solve = partial(equilibrium, grad=grad, max_iter=4, tol=0.0, backward_max_iter=4, backward_tol=0.0)
    model = MDEQ(channels=(8, 16), head_channels=(4, 8), final_channels=16, solve=solve).double().eval()
    net = DistributedDataParallel(model) if process.world_size > 1 else model
    x, y = torch.randn(8, 3, 16, 16, dtype=torch.float64), torch.arange(8)
    x, y = (t.tensor_split(process.world_size)[process.rank] for t in (x, y))
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(net(x), y).backward()
    torch.optim.SGD(model.parameters(), lr=10.0).step()
    return [p.detach() - b for p, b in zip(model.parameters(), before)]


def save_changes(folder):
    process = init_process()
    torch.save({grad: changes(grad, process) for grad in ("upg", "npg", "implicit")},
               folder / f"{process.rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_take_the_step_of_one(tmp_path):
    """DistributedDataParallel of two halves = one process on the whole batch, to 1e-9: float64 rounding."""
    for process in pair(tmp_path / "log", save_changes, tmp_path):
        process.finish()
    together = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for grad in ("upg", "npg", "implicit"):
        alone = changes(grad, CPU)
        for own in together:
            for a, b in zip(alone, own[grad]):
                assert (a - b).abs().max() <= 1e-9 * max(a.abs().max(), 1e-6)


def without_batch_statistics(*flags):
    """A run whose BatchNorm is that of evaluation: it does not depend on how processes divide a batch."""
    build = mdeq_cifar.build_model
    mdeq_cifar.build_model = lambda *args: build(*args).eval()
    run(*flags)


def test_two_processes_weigh_every_image_alike(tmp_path):
    """Batches of 6 and 3 images, the latter divided as 2 + 1: the script's steps are those of one process."""
    make_folder(tmp_path / "data", classes="abc")
    sizes = "--batch-size 6 --max-iter 3 --k 2 --epochs 1 --lr 0.05".split()
    flags = [*sizes, "--data", tmp_path / "data"]
    one = Forked(tmp_path / "log1", without_batch_statistics, *flags, "--out", tmp_path / "1")
    for process in (one, *pair(tmp_path / "log2", without_batch_statistics, *flags, "--out", tmp_path / "2")):
        process.finish()
    one, two = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["model"] for n in "12")
    seed_everything(0)
    model = mdeq_cifar.build_model(parse_args([]), 3, CPU)
    largest = max((one[name] - p.detach()).abs().max() for name, p in model.named_parameters())
    assert largest > 1e-3 and max((one[name] - two[name]).abs().max() for name in one) < 1e-3 * largest


def test_torchrun_starts_the_script_and_its_Ctrl_C_saves(tmp_path):
    """The terminal sends one SIGINT to the whole group and torchrun one more, with a traceback of its own.

    14 images and 8 in the last batch, half of them in each process; the continued run counts every image
    once.
    """
    flags = [*TINY_RUN, *"--train-size 400 --test-size 30 --batch-size 14 --epochs 1 --out".split(),
             tmp_path / "a"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT]
    job = subprocess.Popen([*map(str, launcher + flags)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True,
                           stderr=subprocess.PIPE, start_new_session=True)
    log = tmp_path / "a" / "metrics.jsonl"
    while job.poll() is None and not (log.exists() and '"train"' in log.read_text()):
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGINT)
    out, err = job.communicate(timeout=100)
    assert out.count("Ctrl-C: saved after step") == 1, out + err
    assert err.count("SIGINT: will save and stop after this step") == 1
    assert "mdeq_cifar.py" not in err.split("Traceback", 1)[-1].split("Root Cause")[0]
    for process in pair(tmp_path / "log", run, *flags, "--resume", "auto"):
        process.finish()
    assert (tmp_path / "log").read_text().count("done: ") == 1
    first, second = metrics(tmp_path / "a", "start")
    assert first["processes"] == second["processes"] == 2 and 1 <= second["step"] < 29
    assert [r["step"] for r in metrics(tmp_path / "a", "train")] == list(range(1, 30))
    (epoch,) = metrics(tmp_path / "a", "epoch")
    assert (epoch["test_accuracy"] * 30 / 100) % 1 == pytest.approx(0, abs=1e-6)
    own = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["rng"]
    assert not torch.equal(own[0]["torch"], own[1]["torch"])                # each draws masks of its own
