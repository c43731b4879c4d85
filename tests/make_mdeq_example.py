"""A second implementation of MDEQ, and the small parity file mdeq_example.pt that it wrote.

    python tests/make_mdeq_example.py

Plain functions over a state dict with the key names of the official release (phantom_grad, MDEQ_CIFAR),
written from the architecture alone.  Nothing is shared with mdeq_cifar.py: norms are written out, upsampling
is a repetition, gradients are explicit sums.  Tests compare the two.  `mutation` does one thing of F wrong,
so that a test can show that the comparison would notice.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F

PATH = Path(__file__).with_name("mdeq_example.pt")

# Orders inside F that are easy to get wrong; the last one exists only where a path goes down two stages.
MUTATIONS = ("injection after the second norm", "shortcut before the second norm",
             "shortcut after the last ReLU",
             "third norm before the ReLU", "no third norm", "no ReLU before the post-fusion convolution",
             "8 groups after fusion", "ReLU after the last down stage", "ReLU after an up path",
             "bilinear upsampling",
             "weight norm over the whole tensor", "weight norm per input channel",
             "branches fused one after the other",
             "dropout after the injection", "no ReLU between down stages")


# --- the official layout ------------------------------------------------------------------------------------

def official_shapes(channels, head, final, classes=10, stem_strides=0):
    """Official key -> shape, without the aliases."""
    n, c0, shapes = len(channels), channels[0], {}

    def norm(key, c, affine=True, statistics=False):
        if affine:
            shapes[f"{key}.weight"] = shapes[f"{key}.bias"] = (c,)
        if statistics:
            shapes[f"{key}.running_mean"] = shapes[f"{key}.running_var"] = (c,)
            shapes[f"{key}.num_batches_tracked"] = ()

    def weight_norm(key, *shape):
        shapes[f"{key}.weight_g"], shapes[f"{key}.weight_v"] = (shape[0], 1, 1, 1), shape

    shapes["downsample.0.weight"] = (c0, 3, 3, 3)
    norm("downsample.1", c0, statistics=True)
    shapes["downsample.3.weight"] = (c0, c0, 3, 3)
    norm("downsample.4", c0, statistics=True)
    if n > 2 or stem_strides > 0:
        shapes["stage0.0.weight"] = (c0, c0, 1, 1)
        norm("stage0.1", c0, statistics=True)
    for i, c in enumerate(channels):
        block = f"fullstage.branches.{i}.blocks.0"
        weight_norm(f"{block}.conv1", 5 * c, c, 3, 3)
        norm(f"{block}.gn1", 5 * c)
        weight_norm(f"{block}.conv2", c, 5 * c, 3, 3)
        norm(f"{block}.gn2", c)
        norm(f"{block}.gn3", c)
    for i in range(n):
        for j in range(n):
            path = f"fullstage.fuse_layers.{i}.{j}.net"
            if j > i:
                shapes[f"{path}.conv.weight"] = (channels[i], channels[j], 1, 1)
                norm(f"{path}.gnorm", channels[i])
            for t in range(i - j):
                c = channels[i] if t == i - j - 1 else channels[j]
                shapes[f"{path}.{t}.conv.weight"] = (c, channels[j], 3, 3)
                norm(f"{path}.{t}.gnorm", c)
        weight_norm(f"fullstage.post_fuse_layers.{i}.conv", channels[i], channels[i], 1, 1)
        norm(f"fullstage.post_fuse_layers.{i}.gnorm", channels[i])
    for i, (c, p) in enumerate(zip(channels, head)):
        bottleneck = f"incre_modules.{i}.0"
        for t, shape in enumerate([(p, c, 1, 1), (p, p, 3, 3), (4 * p, p, 1, 1)], start=1):
            shapes[f"{bottleneck}.conv{t}.weight"] = shape
            norm(f"{bottleneck}.bn{t}", shape[0], affine=False, statistics=True)
        if c != 4 * p:
            shapes[f"{bottleneck}.downsample.0.weight"] = (4 * p, c, 1, 1)
            norm(f"{bottleneck}.downsample.1", 4 * p, statistics=True)
    for i, (a, b) in enumerate(zip(head, head[1:])):
        shapes[f"downsamp_modules.{i}.0.weight"] = (4 * b, 4 * a, 3, 3)
        shapes[f"downsamp_modules.{i}.0.bias"] = (4 * b,)
        norm(f"downsamp_modules.{i}.1", 4 * b, statistics=True)
    shapes["final_layer.0.weight"], shapes["final_layer.0.bias"] = (final, 4 * head[-1], 1, 1), (final,)
    norm("final_layer.1", final, statistics=True)
    shapes["classifier.weight"], shapes["classifier.bias"] = (classes, final), (classes,)
    return shapes


def random_state_dict(seed=0, **shape):
    """Official state dict in float64; every value is away from its default, so that a forgotten one shows."""
    rng, sd = torch.Generator().manual_seed(seed), {}
    for key, size in official_shapes(**shape).items():
        if key.endswith("num_batches_tracked"):
            sd[key] = torch.tensor(7)
        elif key.endswith(("running_var", "weight_g")) or key.endswith(".weight") and len(size) == 1:
            sd[key] = 0.5 + torch.rand(size, generator=rng, dtype=torch.float64)
        elif len(size) == 1:
            sd[key] = 0.3 * torch.randn(size, generator=rng, dtype=torch.float64)
        else:
            sd[key] = torch.randn(size, generator=rng, dtype=torch.float64) / math.prod(size[1:]) ** 0.5
    return sd


def with_aliases(sd):
    """As the release saves it: F's tensors a second time, under deq.func."""
    return sd | {k.replace("fullstage.", "deq.func."): v for k, v in sd.items() if k.startswith("fullstage.")}


# --- the model ----------------------------------------------------------------------------------------------

def group_norm(x, groups, sd, key):
    N, C, H, W = x.shape
    grouped = x.reshape(N, groups, -1)
    grouped = grouped - grouped.mean(dim=2, keepdim=True)
    x = (grouped / (grouped.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()).reshape(N, C, H, W)
    if f"{key}.weight" not in sd:               # locuslab/deq switches the affine map of the last norm off
        return x
    return x * sd[f"{key}.weight"][:, None, None] + sd[f"{key}.bias"][:, None, None]


def batch_norm(x, sd, key, train):
    if train:
        mean = x.mean(dim=(0, 2, 3))
        var = (x - mean[:, None, None]).square().mean(dim=(0, 2, 3))
    else:
        mean, var = sd[f"{key}.running_mean"], sd[f"{key}.running_var"]
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    if f"{key}.weight" not in sd:
        return x
    return x * sd[f"{key}.weight"][:, None, None] + sd[f"{key}.bias"][:, None, None]


def weight(sd, key, mutation=None):
    if f"{key}.weight" in sd:
        return sd[f"{key}.weight"]
    g, v = sd[f"{key}.weight_g"], sd[f"{key}.weight_v"]
    wrong = {"weight norm over the whole tensor": (0, 1, 2, 3), "weight norm per input channel": (0, 2, 3)}
    dims = wrong.get(mutation, (1, 2, 3))
    return g * v / v.square().sum(dim=dims, keepdim=True).sqrt()


def inject(sd, x, channels, train=False, strides=(1, 1)):
    for conv, norm, stride in ((0, 1, strides[0]), (3, 4, strides[1])):
        x = F.conv2d(x, sd[f"downsample.{conv}.weight"], stride=stride, padding=1)
        x = batch_norm(x, sd, f"downsample.{norm}", train).relu()
    if "stage0.0.weight" in sd:
        x = batch_norm(F.conv2d(x, sd["stage0.0.weight"]), sd, "stage0.1", train).relu()
    N, _, S, _ = x.shape
    return [x] + [x.new_zeros(N, c, S // 2 ** i, S // 2 ** i) for i, c in enumerate(channels) if i > 0]


def block(sd, i, h, u, mask, mutation):
    key = f"fullstage.branches.{i}.blocks.0"
    a = group_norm(F.conv2d(h, weight(sd, f"{key}.conv1", mutation), padding=1), 8, sd, f"{key}.gn1").relu()
    b = F.conv2d(a, weight(sd, f"{key}.conv2", mutation), padding=1)
    mask = 1 if mask is None else mask
    if mutation == "injection after the second norm":
        c = group_norm(b * mask, 8, sd, f"{key}.gn2") + u + h
    elif mutation == "shortcut before the second norm":
        c = group_norm(b * mask + u + h, 8, sd, f"{key}.gn2")
    elif mutation == "shortcut after the last ReLU":
        return group_norm(group_norm(b * mask + u, 8, sd, f"{key}.gn2").relu() + h, 8, sd, f"{key}.gn3")
    elif mutation == "dropout after the injection":
        c = group_norm((b + u) * mask, 8, sd, f"{key}.gn2") + h
    else:
        c = group_norm(b * mask + u, 8, sd, f"{key}.gn2") + h
    if mutation == "third norm before the ReLU":
        return group_norm(c, 8, sd, f"{key}.gn3").relu()
    return c.relu() if mutation == "no third norm" else group_norm(c.relu(), 8, sd, f"{key}.gn3")


def f(sd, h, u, masks=None, mutation=None):
    """The equilibrium module F(h, u)."""
    n = len(h)
    y = [block(sd, i, h[i], u[i], None if masks is None else masks[i], mutation) for i in range(n)]
    if n == 1:
        return y
    out = []
    for i in range(n):
        total = 0
        for j in range(n):
            path, t = f"fullstage.fuse_layers.{i}.{j}.net", y[j]
            if j > i:
                t = group_norm(F.conv2d(t, weight(sd, f"{path}.conv")), 8, sd, f"{path}.gnorm")
                if mutation == "bilinear upsampling":
                    t = F.interpolate(t, scale_factor=2 ** (j - i), mode="bilinear")
                else:
                    t = t.repeat_interleave(2 ** (j - i), dim=2).repeat_interleave(2 ** (j - i), dim=3)
                t = t.relu() if mutation == "ReLU after an up path" else t
            for stage in range(i - j):
                t = F.conv2d(t, weight(sd, f"{path}.{stage}.conv"), stride=2, padding=1)
                t = group_norm(t, 8, sd, f"{path}.{stage}.gnorm")
                last = stage == i - j - 1
                between = mutation != "no ReLU between down stages"
                if mutation == "ReLU after the last down stage" if last else between:
                    t = t.relu()
            total = total + t
        if mutation == "branches fused one after the other":
            y[i] = total
        if mutation != "no ReLU before the post-fusion convolution":
            total = total.relu()
        key = f"fullstage.post_fuse_layers.{i}"
        total = F.conv2d(total, weight(sd, f"{key}.conv", mutation))
        out.append(group_norm(total, 8 if mutation == "8 groups after fusion" else 4, sd, f"{key}.gnorm"))
    return out


def head(sd, h, train=False):
    y = 0
    for i, hi in enumerate(h):
        key = f"incre_modules.{i}.0"
        t = batch_norm(F.conv2d(hi, sd[f"{key}.conv1.weight"]), sd, f"{key}.bn1", train).relu()
        t = batch_norm(F.conv2d(t, sd[f"{key}.conv2.weight"], padding=1), sd, f"{key}.bn2", train).relu()
        t = batch_norm(F.conv2d(t, sd[f"{key}.conv3.weight"]), sd, f"{key}.bn3", train)
        if f"{key}.downsample.0.weight" in sd:
            hi = batch_norm(F.conv2d(hi, sd[f"{key}.downsample.0.weight"]), sd, f"{key}.downsample.1", train)
        y = (t + hi).relu() + y
        if i < len(h) - 1:
            key = f"downsamp_modules.{i}"
            y = F.conv2d(y, sd[f"{key}.0.weight"], sd[f"{key}.0.bias"], stride=2, padding=1)
            y = batch_norm(y, sd, f"{key}.1", train).relu()
    y = F.conv2d(y, sd["final_layer.0.weight"], sd["final_layer.0.bias"])
    y = batch_norm(y, sd, "final_layer.1", train).relu().mean(dim=(2, 3))
    return y @ sd["classifier.weight"].T + sd["classifier.bias"]


# --- gradients ----------------------------------------------------------------------------------------------

def parameters(sd):
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return {k: v for k, v in sd.items() if not k.endswith(buffers)}


def training_step(sd, x, labels, h, channels, grad, k=5, lam=0.5):
    """(loss, logits, official name -> gradient) of one step in train mode from the state h.

    upg: autograd through k damped steps, Eq. (16).  npg: the sum of Eq. (17), term by term.
    """
    leaves = {key: value.detach().clone().requires_grad_() for key, value in parameters(sd).items()}
    sd = {**sd, **leaves}
    u = inject(sd, x, channels, train=True)
    if grad == "upg":
        for _ in range(k):
            h = [(1 - lam) * a + lam * b for a, b in zip(h, f(sd, h, u))]
        logits = head(sd, h, train=True)
        loss = F.cross_entropy(logits, labels)
        grads = torch.autograd.grad(loss, list(leaves.values()))
    else:
        h = [hi.detach().clone().requires_grad_() for hi in h]
        logits = head(sd, h, train=True)
        loss = F.cross_entropy(logits, labels)
        direct = torch.autograd.grad(loss, [*h, *leaves.values()], allow_unused=True)
        term = list(direct[:len(h)])                                        # (B^T)^0 g
        f_h, total = f(sd, h, u), [torch.zeros_like(t) for t in term]
        for _ in range(k):
            total = [s + lam * t for s, t in zip(total, term)]
            jt = torch.autograd.grad(f_h, h, term, retain_graph=True)
            term = [lam * a + (1 - lam) * b for a, b in zip(jt, term)]      # B^T = lam J^T + (1 - lam) I
        through_f = torch.autograd.grad(f_h, list(leaves.values()), total, allow_unused=True)
        grads = [(0 if a is None else a) + (0 if b is None else b)
                 for a, b in zip(direct[len(h):], through_f)]
    return loss.detach(), logits.detach(), dict(zip(leaves, grads))


# --- the file -----------------------------------------------------------------------------------------------

def single(x):
    """float32 copies, through lists and dicts."""
    if torch.is_tensor(x):
        return x.detach().float().clone() if x.is_floating_point() else x.clone()
    if isinstance(x, dict):
        return {k: single(v) for k, v in x.items()}
    return [single(v) for v in x] if isinstance(x, list) else x


def make():
    """Inputs are rounded to float32 first; all else is computed from them in float64, then rounded."""
    config = dict(channels=[8, 8], head=[4, 8], final=16)
    rng = torch.Generator().manual_seed(1)
    given = single({"state_dict": random_state_dict(seed=2, **config),
                    "x": torch.randn(2, 3, 16, 16, generator=rng),
                    "h": [torch.randn(2, 8, 16 // 2 ** i, 16 // 2 ** i, generator=rng) for i in range(2)]})
    labels, channels = torch.tensor([3, 8]), config["channels"]
    sd = {k: v.double() if v.is_floating_point() else v for k, v in given["state_dict"].items()}
    x, h = given["x"].double(), [hi.double() for hi in given["h"]]
    u = inject(sd, x, channels)
    leaves = [t.clone().requires_grad_() for t in (*h, u[0])]
    f_out = f(sd, leaves[:2], [leaves[2], u[1]])
    d_h0, d_h1, d_u0 = torch.autograd.grad(f_out, leaves, [t.detach() for t in f_out])
    mask = [torch.bernoulli(torch.full((2, 8, 1, 1), 0.75), generator=rng) / 0.75 for _ in range(2)]
    train = {}
    for grad in ("upg", "npg"):
        loss, logits, grads = training_step(sd, x, labels, h, channels, grad)
        # a small file
        kept = ("downsample.0", "fullstage.branches.0.blocks.0.conv2", "fullstage.post_fuse_layers.1")
        train[grad] = {"k": 5, "lam": 0.5, "loss": float(loss), "logits": logits,
                       "grads": {k: v for k, v in grads.items() if k.startswith(kept)},
                       "grad_norms": {k: float(v.norm()) for k, v in grads.items()}}
    result = {"meta": {"source": "tests/make_mdeq_example.py", "computed in": "float64"}, "config": config,
              **given,
              "labels": labels, "u": u, "F_out": f_out, "F_vjp": {"d_h": [d_h0, d_h1], "d_u0": d_u0},
              "head_logits": head(sd, h), "dropout": {"masks": mask, "F_out": f(sd, h, u, masks=mask)},
              "train": train}
    result = single(result)
    result["state_dict"] = with_aliases(result["state_dict"])
    torch.save(result, PATH)
    print(f"{PATH.name}: {PATH.stat().st_size / 1e3:.0f} kB, {len(result['state_dict'])} keys")


if __name__ == "__main__":
    make()
