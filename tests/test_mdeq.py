"""The MDEQ model: parameter counts, a second implementation, official checkpoints, weight norm, dropout.

make_mdeq_example.py holds the second implementation: plain functions over an official state dict.  Set
MDEQ_PARITY to a parity file of the official release to compare with that as well.
"""
import copy
import itertools
import os
from functools import partial

import make_mdeq_example as reference
import pytest
import torch
import torch.nn.functional as F
from torch._functorch import config as functorch_config

import mdeq_cifar
from common import Process, SolverResult, broyden, equilibrium, fixed_point, npg, upg
from mdeq_cifar import MDEQ, load_official

# Narrow models with 1 to 4 branches.  From three on: injection transform and two-stage paths.  8 = 4 * 2
# channels into a bottleneck make its shortcut the identity.
NARROW = {1: dict(channels=(8,), head=(4,), final=16), 2: dict(channels=(8, 16), head=(4, 8), final=16),
          3: dict(channels=(8, 16, 8), head=(2, 4, 8), final=16),
          4: dict(channels=(8, 8, 16, 24), head=(4, 8, 4, 8), final=16)}
GRADS = ("upg", "npg", "implicit", "bptt")


def build(channels=(8, 16), head=(4, 8), final=16, classes=10, seed=0, dtype=torch.float64, dropout=0.0,
          stem_strides=0, **settings):
    """The settings are the solver's, and its gradient's."""
    torch.manual_seed(seed)
    settings = dict(max_iter=4, tol=0.0, backward_max_iter=4, backward_tol=0.0, stop_mode="rel_joint",
                    solver=fixed_point if settings.get("grad") == "bptt" else broyden) | settings
    return MDEQ(channels=channels, head_channels=head, final_channels=final, num_classes=classes,
                dropout=dropout, stem_strides=stem_strides, solve=partial(equilibrium, **settings)).to(dtype)


def pair(n, seed=0, **kwargs):
    """(model in eval mode, official state dict) with the same random values."""
    sd = reference.random_state_dict(seed=seed, **NARROW[n])
    model = build(**NARROW[n], **kwargs).eval()
    load_official(model, reference.with_aliases(sd))
    return model, sd


def state(channels, N=2, side=16, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(N, c, side >> i, side >> i, generator=rng, dtype=dtype)
                 for i, c in enumerate(channels))


def images(N=2, side=16, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(N, 3, side, side, generator=rng, dtype=dtype), torch.randint(10, (N,), generator=rng)


def error(ours, theirs):
    """Largest absolute difference over the reference's largest absolute value, the worst of all tensors."""
    if torch.is_tensor(ours):
        ours, theirs = [ours], [theirs]
    assert len(ours) == len(theirs)
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item() for a, b in zip(ours, theirs))


def grads_of(model, x, y):
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def cosine(a, b):
    a, b = a.flatten().double(), b.flatten().double()
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300))


def count(parameters):
    return sum(p.numel() for p in parameters)


# --- size ---------------------------------------------------------------------------------------------------

COUNTS = {      # the official classes, instantiated
    "tiny": dict(stem=5928, injection=0, blocks=[52320, 52320], post=[648, 648], bottlenecks=[1856, 5376],
                 down=[18624],
                 final=13400, classifier=2010, total=158986, gains=336, buffers=1116, fuse=5856),
    "large": dict(stem=10208, injection=1088, blocks=[92800, 369920, 1477120, 5903360],
                  post=[1120, 4288, 16768, 66304],
                  bottlenecks=[4900, 19376, 77056, 307328], down=[56784, 226464, 904512], final=757680,
                  classifier=16810, total=11098398, gains=3360, buffers=9343,
                  fuse=[[0, 2112, 4160, 8256], [18560, 0, 8320, 16512], [46400, 73984, 0, 33024],
                        [92800, 184960, 295424, 0]]),
    "imagenet": dict(stem=10208, injection=1088, blocks=[92800, 369920, 1477120, 5903360],
                     post=[1120, 4288, 16768, 66304], bottlenecks=[11520, 45696, 182016, 726528],
                     down=[166464, 664704, 2656512], final=1579008, classifier=2049000, total=16808936,
                     gains=3360,
                     buffers=14199, fuse=784512)}


@pytest.mark.parametrize("name", COUNTS)
def test_every_part_has_as_many_parameters_as_the_official_model(name):
    """158,986, 11,098,398 and 16,808,936: the released classes', not the paper's round figures."""
    expected = COUNTS[name]
    if name == "imagenet":
        shape = dict(channels=(32, 64, 128, 256), head_channels=(24, 48, 96, 192), final_channels=2048,
                     num_classes=1000, stem_strides=2)
    else:
        shape = {k: mdeq_cifar.MODELS[name][k] for k in ("channels", "head_channels", "final_channels")}
    with torch.device("meta"):
        model = MDEQ(**shape)
    got = {part: count(getattr(model, part).parameters())
           for part in ("stem", "injection", "final", "classifier")}
    got |= {part: [count(m.parameters()) for m in getattr(model, part)]
            for part in ("blocks", "bottlenecks", "down")}
    got["post"] = [count([*conv.parameters(), *gn.parameters()])
                   for conv, gn in zip(model.post, model.post_gn)]
    got["fuse"] = [[count(path.parameters()) for path in row] for row in model.fuse]
    if isinstance(expected["fuse"], int):
        got["fuse"] = sum(map(sum, got["fuse"]))
    got["total"], got["buffers"] = count(model.parameters()), count(model.buffers())
    got["gains"] = count(p for key, p in model.named_parameters() if key.endswith("original0"))
    assert got == expected


# --- against the second implementation ----------------------------------------------------------------------

@pytest.mark.parametrize("n", NARROW)
def test_every_part_equals_the_second_implementation(n):
    """inject, F, G with random affines, running statistics and gains: float64, so 1e-12 is rounding."""
    model, sd = pair(n)
    channels, (x, _) = NARROW[n]["channels"], images()
    h, u = state(channels), reference.inject(sd, x, channels)
    assert error(model.inject(x)[0], u[0]) < 1e-12
    assert all((a == 0).all() and a.shape == b.shape for a, b in zip(model.inject(x)[1:], u[1:]))
    u = state(channels, seed=1)                     # the formula also holds for injections into all branches
    assert error(model.f(h, u), reference.f(sd, h, u)) < 1e-12
    assert error(model.head(h), reference.head(sd, h)) < 1e-12


@pytest.mark.parametrize("n", NARROW)
def test_vector_jacobian_products_of_F_equal_those_of_the_second_implementation(n):
    """J^T v and (dF/du)^T v at a random state, v = F(h, u)."""
    model, sd = pair(n)
    channels = NARROW[n]["channels"]

    def vjp(f):
        leaves = [t.requires_grad_() for t in (*state(channels), *state(channels, seed=1))]
        out = f(leaves[:n], leaves[n:])
        return torch.autograd.grad(out, leaves, [o.detach() for o in out])

    assert error(vjp(model.f), vjp(partial(reference.f, sd))) < 1e-10       # sums of thousands, cancellation


def plain(f, h0, *, max_iter, **_):
    """A solver that a test can repeat: max_iter plain steps, the last state."""
    h = h0
    with torch.no_grad():
        for _ in range(max_iter):
            h = tuple(f(h))
    return SolverResult(h, torch.zeros(len(h[0])), max_iter, torch.zeros(max_iter, len(h[0])), None)


@pytest.mark.parametrize("n", NARROW)
@pytest.mark.parametrize("train", [False, True])
def test_forward_is_the_solver_from_zero_then_phantom_steps_in_training_then_the_head(n, train):
    """Algorithm 1: evaluation gives G(h*); training with UPG G(h_k), h <- (1 - lam) h + lam F(h).

    Four plain steps stand for the solver: the state has not converged, so every step after it shows.
    """
    model, sd = pair(n, solver=plain, k=3, lam=0.3)
    channels, (x, _) = NARROW[n]["channels"], images()
    with torch.set_grad_enabled(train):
        logits = model.train(train)(x)
    u = reference.inject(sd, x, channels, train=train)
    h = plain(lambda h: reference.f(sd, h, u), [torch.zeros_like(ui) for ui in u], max_iter=4).h
    for _ in range(3 if train else 0):
        h = [0.7 * a + 0.3 * b for a, b in zip(h, reference.f(sd, h, u))]
    assert error(logits.detach(), reference.head(sd, h, train=train)) < 1e-10       # 12 to 21 times F's


@pytest.mark.parametrize("mutation", reference.MUTATIONS)
def test_the_comparison_notices(mutation):
    """Each order of operations that is easy to get wrong moves F by more than 1e-3; 1e-12 is allowed."""
    model, sd = pair(3)
    channels = NARROW[3]["channels"]
    h, u = state(channels), state(channels, seed=1)
    masks = [2.0 * (torch.arange(2 * c).view(2, c, 1, 1) % 2) for c in channels]
    assert error(model.f(h, u, masks=masks), reference.f(sd, h, u, masks)) < 1e-12
    assert error(model.f(h, u, masks=masks), reference.f(sd, h, u, masks, mutation=mutation)) > 1e-3


def test_a_strided_stem_equals_the_second_implementation():
    """ImageNet's: strides 2 and 2, also two branches have an injection transform; sides S / 2^(i + 2)."""
    sd = reference.random_state_dict(stem_strides=2, **NARROW[2])
    model = build(**NARROW[2], stem_strides=2).eval()
    load_official(model, sd)
    x, _ = images(side=32)
    assert error(model.inject(x)[0],
                 reference.inject(sd, x, NARROW[2]["channels"], strides=(2, 2))[0]) < 1e-12
    assert [tuple(u.shape) for u in model.inject(x)] == [(2, 8, 8, 8), (2, 16, 4, 4)]


# --- parity files -------------------------------------------------------------------------------------------

# before a BatchNorm: only rounding is left
ZERO_GRADIENT = ("downsamp_modules.0.0.bias", "final_layer.0.bias")


def official_names(model, sd):
    """Official name -> our parameter: every official tensor is marked with its own number and found again."""
    marked, probe = {}, copy.deepcopy(model)
    for number, (key, value) in enumerate(sd.items()):
        if not key.startswith("deq."):
            marked[key] = torch.full_like(value, number)
    load_official(probe, marked)
    names = {p.flatten()[0].item(): name for name, p in probe.named_parameters()}
    numbers = {key: value.flatten()[0].item() for key, value in marked.items()}
    return {key: names[number] for key, number in numbers.items() if number in names}


def phantom_step(model, x, labels, h, grad, expected):
    """(logits, loss) of one training step from the state h; the gradients are left in the parameters."""
    model.zero_grad()
    f = partial(model.f, u=model.inject(x), weights=model.weights())
    logits = model.head({"upg": upg, "npg": npg}[grad](f, h, k=expected["k"], lam=expected["lam"]))
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return logits.detach(), loss.detach()


def gradient_errors(parameters, names, expected):
    """A norm below 1e-3 is compared absolutely: GroupNorm has cancelled that gradient down to rounding."""
    norms = {k: (parameters[names[k]].grad.norm().item(), norm) for k, norm in expected["grad_norms"].items()}
    assert len(norms) == len(parameters)
    return {"grads": max(error(parameters[names[k]].grad, g) for k, g in expected["grads"].items()),
            "grad_norms": max(abs(a - b) / max(b, 1e-3)
                              for k, (a, b) in norms.items() if k not in ZERO_GRADIENT),
            "zero gradients": max(abs(a - b) for k, (a, b) in norms.items() if k in ZERO_GRADIENT)}


def best_side_of_the_kinks(model, example, h, case, names, width=1e-6):
    """ReLU's derivative jumps at 0: of 400,000 arguments a few lie within float32 rounding of it, on a side.

    One of them on the other side moves a weight's gradient by up to 6e-3.  In float64 each side is tried.
    """
    model, expected = copy.deepcopy(model).double(), example["train"][case]
    near, calls, relu = [], [], F.relu

    def run(flipped):
        calls.clear()

        def sided(x, inplace=False):
            number, gate = len(calls), (x > 0).to(x.dtype)
            calls.append(number)
            if flipped is None:
                close = (x.abs() < width) & (x != 0)
                near.extend((number, i) for i in close.flatten().nonzero()[:, 0].tolist())
            for at, i in flipped or ():
                if at == number:
                    gate.view(-1)[i] = 1 - gate.view(-1)[i]
            return x * gate

        load_official(model, example["state_dict"])
        x, labels = example["x"].double(), example["labels"]
        F.relu = sided
        try:
            phantom_step(model, x, labels, tuple(p.double() for p in h), case[:3], expected)
        finally:
            F.relu = relu
        return gradient_errors(dict(model.named_parameters()), names, expected)

    results = [run(None)]
    assert len(near) < 20, "far more than rounding explains"
    for count in (1, 2):
        for flipped in itertools.combinations(near, count):
            if max(min(results, key=lambda e: e["grads"]).values()) > 1e-5:
                results.append(run(flipped))
    print(f"{case}: {len(near)} arguments of ReLU within {width} of 0, {len(results)} combinations tried")
    return min(results, key=lambda e: e["grads"])


def check_parity(example, model, dtype, report):
    """The quantities that both parity files hold; report(name, error, tolerance)."""
    def cast(value):
        return tuple(v.to(dtype) for v in value) if isinstance(value, list) else value.to(dtype)

    load_official(model, example["state_dict"])
    names, parameters = official_names(model, example["state_dict"]), dict(model.named_parameters())
    assert len(names) == len(parameters)
    x, h, u = cast(example["x"]), cast(example["h"]), cast(example["u"])
    model.eval()
    with torch.no_grad():
        report("u", error(model.inject(x)[0], u[0]), 1e-5)
        report("F_out", error(model.f(h, u), example["F_out"]), 1e-5)
        report("head_logits", error(model.head(h), example["head_logits"]), 1e-5)
        masks = cast(example["dropout"]["masks"])
        report("dropout", error(model.f(h, u, masks=masks), example["dropout"]["F_out"]), 1e-5)
    leaves = [t.clone().requires_grad_() for t in (*h, u[0])]
    out = model.f(leaves[:-1], (leaves[-1], *u[1:]))
    vjp = torch.autograd.grad(out, leaves, cast(example["F_out"]))
    report("F_vjp", error(vjp, [*example["F_vjp"]["d_h"], example["F_vjp"]["d_u0"]]), 1e-5)

    start = {"h": h, "h0": cast(example["train"]["h0"]) if "h0" in example["train"] else h}
    for case, expected in example["train"].items():
        if case == "h0":
            continue
        load_official(model.train(), example["state_dict"])
        model.zero_grad()
        first = start[case.partition("_")[2] or "h"]
        logits, loss = phantom_step(model, x, example["labels"], first, case[:3], expected)
        report(f"{case} loss", abs(loss.item() / expected["loss"] - 1), 1e-5)
        report(f"{case} logits", error(logits.detach(), expected["logits"]), 1e-5)
        errors = gradient_errors(parameters, names, expected)
        for key, value in expected.get("bn_after", {}).items():
            key = key.replace("downsample.", "stem.").replace("final_layer.", "final.")
            report(f"{case} {key}", error(model.state_dict()[key].double(), value.double()), 1e-5)
        if max(errors.values()) > 1e-5:
            errors = best_side_of_the_kinks(model, example, first, case, names)
        for name, value in errors.items():
            report(f"{case} {name}", value, 1e-5)


def collector():
    """A report function, and the quantities beyond their tolerance."""
    too_large = {}

    def report(name, value, tolerance):
        print(f"{name:40s} {value:.1e}   (tolerance {tolerance:.0e})")
        if not value <= tolerance:
            too_large[name] = value

    return report, too_large


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_example_file_is_reproduced(dtype):
    """u, F, its products, dropout, head, UPG's and NPG's gradients, official keys; 1e-5, float32 rounding."""
    example = torch.load(reference.PATH, weights_only=True)
    report, too_large = collector()
    check_parity(example, build(**example["config"], dtype=dtype), dtype, report)
    assert not too_large


@pytest.mark.skipif("MDEQ_PARITY" not in os.environ,
                    reason="MDEQ_PARITY names no parity file of the official release")
def test_the_official_release_is_reproduced():
    """All that the file holds and we compute: also whole forwards, with the right sign of the first step.

    Float32 logits 1e-5; traces 1e-4 for ten entries and 1e-2 after, where rounding has grown; float64 1e-8.
    """
    example = torch.load(os.environ["MDEQ_PARITY"], weights_only=True)
    report, too_large = collector()
    shape = dict(channels=example["config"]["num_channels"], head=example["config"]["head_channels"],
                 final=example["config"]["final_channels"])
    check_parity(example, build(**shape, dtype=torch.float32), torch.float32, report)
    for dtype in (torch.float32, torch.float64):
        for run in ("corrected_free_5", "corrected_free_22"):
            expected = example["eval"][run]
            model = build(**shape, dtype=dtype, max_iter=expected["f_thres"], stop_mode="abs").eval()
            load_official(model, example["state_dict"])
            with torch.no_grad():
                logits, result = model(example["x"].to(dtype), with_result=True)
            if dtype == torch.float32:
                report(f"{run} logits", error(logits, expected["logits_per_sample_best"]), 1e-5)
                relative = (result.trace / torch.as_tensor(expected["trace_per_sample"]) - 1).abs()
                report(f"{run} trace, first ten", relative[:10].max().item(), 1e-4)
                relative = (result.trace.norm(dim=1) / torch.as_tensor(expected["trace"]) - 1).abs()
                report(f"{run} trace", relative.max().item(), 1e-2)
            else:
                trace = torch.tensor(expected["trace_f64"], dtype=dtype)
                relative = (result.trace.norm(dim=1) / trace - 1).abs()
                report(f"{run} trace, float64", relative.max().item(), 1e-8)
                report(f"{run} logits, float64", error(logits, expected["logits_f64"]), 1e-8)
    assert not too_large


# --- official checkpoints -----------------------------------------------------------------------------------

def plain_weight(sd, key):
    return sd[f"{key}.weight_g"] * sd[f"{key}.weight_v"] / channel_norm(sd[f"{key}.weight_v"])


def channel_norm(weight):
    return weight.flatten(1).norm(dim=1)[:, None, None, None]


def frozen_copy(sd):
    """locuslab/mdeq: a second F with plain weights, stale (here: zeros), under two names."""
    extra = {}
    for key, value in reference.with_aliases(sd).items():
        for prefix, name in (("fullstage.", "fullstage_copy."), ("deq.func.", "deq.func_copy.")):
            if key.startswith(prefix) and not key.endswith("weight_g"):
                extra[name + key.removeprefix(prefix).replace("weight_v", "weight")] = torch.zeros_like(value)
    return {**reference.with_aliases(sd), **extra}


def without_post_affine(sd):
    return {k: v for k, v in sd.items() if not ("post_fuse_layers" in k and "gnorm" in k)}


def zoo_cifar(sd):
    """Fuse convolutions are weight-normalised too: W = g v / ||v||, v a multiple of W per output channel."""
    out = {}
    for key, value in sd.items():
        if "fuse_layers" in key and key.endswith("conv.weight"):
            out[key + "_g"] = channel_norm(value)
            scale = torch.linspace(0.5, 3, len(value), dtype=value.dtype)
            out[key + "_v"] = value * scale[:, None, None, None]
        else:
            out[key] = value
    return {k.replace("fullstage.", "full_stage."): v for k, v in out.items()}


def zoo_imagenet(sd):
    """Post-fusion convolutions are plain."""
    out = {}
    for key, value in sd.items():
        if "post_fuse_layers" not in key or "conv.weight_" not in key:
            out[key.replace("fullstage.", "full_stage.")] = value
        elif key.endswith("_g"):
            conv = key.removesuffix(".weight_g")
            out[conv.replace("fullstage.", "full_stage.") + ".weight"] = plain_weight(sd, conv)
    return out


LAYOUTS = {"phantom_grad": reference.with_aliases, "locuslab/mdeq": frozen_copy,
           "locuslab/deq": lambda sd: sd,
           "locuslab/deq, post-fusion norm without affine": without_post_affine, "zoo, CIFAR": zoo_cifar,
           "zoo, ImageNet": zoo_imagenet,
           "module. prefix": lambda sd: {f"module.{k}": v for k, v in zoo_imagenet(sd).items()},
           "module. prefix and aliases": lambda sd: {f"module.{k}": v for k, v in frozen_copy(sd).items()},
           "checkpoint.pth.tar": lambda sd: {"epoch": 3, "state_dict": reference.with_aliases(sd),
                                             "perf": 0.5}}


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_official_layout_loads_to_the_same_F(layout, n):
    """Also one that weight-normalises other convolutions: g v / ||v|| = W.  No affine: weight 1, bias 0."""
    sd = reference.random_state_dict(seed=5, **NARROW[n])
    saved = LAYOUTS[layout](sd)
    model = build(**NARROW[n]).eval()
    load_official(model, saved)
    expected = without_post_affine(sd) if "without affine" in layout else sd
    h, u, (x, _) = state(NARROW[n]["channels"]), state(NARROW[n]["channels"], seed=1), images()
    assert error(model.f(h, u), reference.f(expected, h, u)) < 1e-12
    assert error(model.head(h), reference.head(expected, h)) < 1e-12
    assert error(model.inject(x)[0], reference.inject(expected, x, NARROW[n]["channels"])[0]) < 1e-12
    assert all(not v.is_floating_point() or torch.equal(v, LAYOUTS[layout](sd).get(k, v))
               for k, v in saved.items()
               if torch.is_tensor(v))       # and the caller's tensors are left alone


def test_aliases_are_never_what_is_loaded():
    """deq.func.* is the same tensor in a real file; where a broken one differs, fullstage.* decides."""
    sd = reference.random_state_dict(**NARROW[2])
    model = build(**NARROW[2])
    saved = reference.with_aliases(sd)
    load_official(model, {k: v * float("nan") if k.startswith("deq.") else v for k, v in saved.items()})
    assert all(p.isfinite().all() for p in model.parameters())


KEYS = ("downsample.0.weight", "downsample.4.running_var", "stage0.0.weight", "stage0.1.running_mean",
        "fullstage.branches.1.blocks.0.conv1.weight_g", "fullstage.branches.1.blocks.0.conv1.weight_v",
        "fullstage.branches.0.blocks.0.gn3.bias", "fullstage.fuse_layers.2.0.net.1.conv.weight",
        "fullstage.fuse_layers.0.2.net.gnorm.weight", "fullstage.post_fuse_layers.2.conv.weight_g",
        "fullstage.post_fuse_layers.2.conv.weight_v", "fullstage.post_fuse_layers.0.gnorm.weight",
        "incre_modules.1.0.bn2.running_mean", "incre_modules.2.0.downsample.0.weight",
        "downsamp_modules.1.0.bias",
        "final_layer.1.weight", "classifier.bias")


def ours(key, model, sd):
    """Our name of an official key."""
    probe = copy.deepcopy(model)
    load_official(model, sd)
    load_official(probe, {**sd, key: sd[key] + 1})
    return [k for k, v in model.state_dict().items() if not torch.equal(v, probe.state_dict()[k])]


@pytest.mark.parametrize("key", KEYS)
def test_missing_keys_and_wrong_shapes_are_refused_by_name(key):
    """Loading is strict: the official resume code is not, and hides mistakes."""
    sd = reference.random_state_dict(**NARROW[3])
    model = build(**NARROW[3])
    name = ours(key, model, sd)
    assert len(name) == 1                           # every official key fills one tensor of ours
    with pytest.raises(RuntimeError, match=rf'(?s)Missing key\(s\)[^:]*:.*"{name[0]}"'):
        load_official(model, {k: v for k, v in sd.items() if k != key})
    for shape in ((3, 5), (3, *sd[key].shape[1:])):
        with pytest.raises(RuntimeError, match=f"size mismatch for {name[0]}"):
            load_official(model, {**sd, key: torch.zeros(shape, dtype=torch.float64)})


@pytest.mark.parametrize("key, name", [
    ("surprise", None), ("fullstage.branches.7.blocks.0.gn1.weight", "blocks.7.gn1.weight"),
    ("full_stage.extra.weight_g", "fullstage.extra.weight_g"),
    ("fullstage.branches.0.blocks.1.gn1.weight", None), ("incre_modules.0.1.conv1.weight", None)])
def test_unknown_keys_are_refused_by_name(key, name):
    """More blocks or branches than the model has must not be dropped in silence."""
    sd = reference.random_state_dict(**NARROW[2])
    model = build(**NARROW[2])
    with pytest.raises(RuntimeError, match=rf'Unexpected key\(s\) in state_dict: "{name or key}"'):
        load_official(model, {**sd, key: torch.zeros(3)})
    with pytest.raises(RuntimeError, match="(?s)Missing key.*Unexpected key"):
        load_official(model, reference.random_state_dict(**NARROW[3]))


# --- effective weights, masks -------------------------------------------------------------------------------

@pytest.mark.parametrize("grad", GRADS)
def test_every_parameter_gets_a_gradient(grad):
    """Gains and directions of weight norm too, the stem through u; only biases before a BatchNorm get zero.

    A cached effective weight that was first read under the solver's no_grad would leave g and v without a
    gradient.
    """
    model = build(grad=grad)
    grads = grads_of(model, *images(4))
    assert [name for name, g in grads.items() if g is None] == []
    zero = {name for name, g in grads.items() if float(g.abs().max()) < 1e-12}
    assert zero == {"down.0.0.bias", "final.0.bias"}


def test_no_effective_weight_survives_an_optimizer_step():
    """g v / ||v|| is computed anew in every forward: after a step the logits are those of a fresh model."""
    model, (x, y) = build(), images(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = [w.detach().clone() for branch in model.weights() for w in branch]
    for _ in range(2):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = [w.detach() for branch in model.weights() for w in branch]
    assert all(error(a, b) > 1e-6 for a, b in zip(after, before))
    fresh = build(seed=1)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(x), fresh.eval()(x))


def test_effective_weights_are_the_gain_times_the_unit_direction_of_an_output_channel():
    model, sd = pair(2)
    keys = [[f"fullstage.branches.{i}.blocks.0.conv1", f"fullstage.branches.{i}.blocks.0.conv2",
             f"fullstage.post_fuse_layers.{i}.conv"] for i in range(2)]
    for ours_i, keys_i in zip(model.weights(), keys):
        for w, key in zip(ours_i, keys_i):
            assert error(w.detach(), plain_weight(sd, key)) < 1e-14
            assert error(w.detach().flatten(1).norm(dim=1), sd[f"{key}.weight_g"].flatten()) < 1e-14


def test_F_may_compute_its_own_weights():
    model, _ = pair(2)
    h, u = state((8, 16)), state((8, 16), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.f(h, u), model.f(h, u, weights=model.weights())))


def test_initial_gains_leave_the_default_initialisation_and_other_convolutions_are_small():
    """The official Normal(0, 0.01) never reaches weight-normalised ones: U(-b, b), b = fan_in^-1/2, stays."""
    model = build(channels=(24, 24), head=(8, 16), final=200)
    for (w1, w2, w3), c in zip(model.weights(), (24, 24)):
        for w, fan_in in ((w1, 9 * c), (w2, 9 * 5 * c), (w3, c)):
            # 576 numbers or more: 1 in 24
            assert w.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)
    for conv in (model.stem[0], model.fuse[0][1][0], model.down[0][0], model.final[0],
                 model.bottlenecks[0].conv2):
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert model.down[0][0].bias.std().item() == pytest.approx(0.01, rel=0.4)
    assert model.classifier.weight.std().item() == pytest.approx((3 * 200) ** -0.5, rel=0.1)


def test_copies_state_dicts_and_dtypes_keep_the_function():
    """The official derived weight is not converted by .double(), is stale after loading, breaks deepcopy."""
    model = build(dtype=torch.float32).train()
    x, y = images(4, dtype=torch.float32)
    F.cross_entropy(model(x), y).backward()
    model.eval()
    with torch.no_grad():
        logits = model(x)
        assert torch.equal(copy.deepcopy(model)(x), logits)
        other = build(seed=3, dtype=torch.float32).eval()
        assert not torch.equal(other(x), logits)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), logits)
        double = copy.deepcopy(model).double()
        assert double(x.double()).dtype == torch.float64
        assert error(double(x.double()), logits.double()) < 1e-4      # float32 rounding through 5 evaluations
        assert torch.equal(double.float()(x), logits)


def recorded(model):
    """The keyword arguments of all later calls of F."""
    calls, f = [], model.f

    def wrapper(h, **kwargs):
        calls.append({"h": h, **kwargs})
        return f(h, **kwargs)

    model.f = wrapper
    return calls


@pytest.mark.parametrize("grad", GRADS)
def test_one_dropout_mask_per_forward(grad):
    """All evaluations of a forward share a mask, otherwise F has no fixed point; the next draws anew."""
    model = build(dropout=0.5, grad=grad).train()
    calls, (x, y) = recorded(model), images(4)
    seen = []
    for _ in range(2):
        F.cross_entropy(model(x), y).backward()
        assert len(calls) > 4
        assert all(c[what] is calls[0][what] for c in calls for what in ("masks", "weights"))
        seen.append(calls[0]["masks"])
        calls.clear()
    assert [tuple(m.shape) for m in seen[0]] == [(4, 8, 1, 1), (4, 16, 1, 1)]
    assert set(torch.cat([m.flatten() for m in seen[0]]).tolist()) == {0.0, 2.0}          # 0 or 1 / (1 - p)
    assert not all(torch.equal(a, b) for a, b in zip(*seen))
    assert not torch.equal(seen[0][0][0], seen[0][0][1])        # of its own for every image


def test_masks_keep_a_share_of_1_minus_p():
    """4096 draws: the share's standard deviation is 0.0063, the bound four of them."""
    model = build(dropout=0.2).train()
    kept = model.masks([torch.zeros(512, 8, 1, 1)])[0]
    assert abs((kept > 0).double().mean() - 0.8) < 0.025
    assert kept.max() == pytest.approx(1.25)


def test_dropout_is_inactive_in_evaluation_and_at_p_0():
    h = state((8, 16))
    assert build(dropout=0.5).eval().masks(h) == [None, None]
    assert build(dropout=0.0).train().masks(h) == [None, None]


def test_the_injection_is_never_dropped():
    """With all channels dropped, F still depends on u: y = GN(ReLU(GN(0 + u) + h))."""
    model, sd = pair(2)
    h, u = state((8, 16)), state((8, 16), seed=1)
    zeros = [torch.zeros(2, c, 1, 1, dtype=torch.float64) for c in (8, 16)]
    assert error(model.f(h, u, masks=zeros), reference.f(sd, h, u, masks=zeros)) < 1e-12
    assert error(model.f(h, u, masks=zeros), model.f(h, state((8, 16), seed=2), masks=zeros)) > 0.1


# --- forward ------------------------------------------------------------------------------------------------

def test_only_the_finest_branch_is_injected():
    """u = (u_0, 0, ..., 0), branch i of side S / 2^i."""
    model = build(**NARROW[3])
    u = model.inject(images()[0])
    assert [tuple(ui.shape) for ui in u] == [(2, 8, 16, 16), (2, 16, 8, 8), (2, 8, 4, 4)]
    assert u[0].abs().max() > 0 and all((ui == 0).all() for ui in u[1:])


@pytest.mark.parametrize("side, n, strides", [(15, 2, 0), (18, 3, 0), (31, 1, 1), (36, 2, 2)])
def test_sides_that_do_not_halve_evenly_are_refused(side, n, strides):
    """A stride-2 convolution rounds S / 2 up, the state's shape rounds it down."""
    model = build(**NARROW[n], stem_strides=strides)
    with pytest.raises(ValueError, match="divisible by"):
        model(images(side=side)[0])
    for shape in ((32, side), (side, 32)):
        with pytest.raises(ValueError, match="divisible by"):
            model(torch.zeros(1, 3, *shape, dtype=torch.float64))


@pytest.mark.parametrize("grad, more", [("upg", 3), ("npg", 1), ("implicit", 1)])
def test_evaluation_is_the_solver_alone_and_training_adds_the_gradient(grad, more):
    """Calls of F: max_iter + 1 in evaluation, k more with UPG, one with NPG and with --grad implicit."""
    model = build(grad=grad, k=3, max_iter=5)
    calls, (x, _) = recorded(model), images(4)
    with torch.no_grad():
        model.eval()(x)
    assert len(calls) == 6
    calls.clear()
    model.train()(x)
    assert len(calls) == 6 + more
    calls.clear()
    with torch.no_grad():
        model.train()(x)
    assert len(calls) == 6


@pytest.mark.parametrize("grad", GRADS)
def test_training_mode_works_without_gradients(grad):
    model, (x, _) = build(grad=grad, dropout=0.2).train(), images(4)
    with torch.no_grad():
        logits, result = model(x, with_result=True)
    assert logits.isfinite().all() and not logits.requires_grad and result.residual.shape == (4,)


@pytest.mark.parametrize("grad", ["upg", "implicit"])
def test_pretraining_unrolls_plain_evaluations_from_zero(grad):
    """unroll = 10: G(F(...F(0))), ten times, whatever the gradient; back-propagation reaches everything."""
    model, (x, y) = build(grad=grad).train(), images(4)
    reference_model = copy.deepcopy(model)
    calls = recorded(model)
    logits, result = model(x, unroll=10, with_result=True)
    assert result is None and len(calls) == 10
    u = reference_model.inject(x)
    h = tuple(torch.zeros_like(ui) for ui in u)
    for _ in range(10):
        h = reference_model.f(h, u)
    expected = reference_model.head(h)
    assert error(logits.detach(), expected.detach()) < 1e-12
    for m, out in ((model, logits), (reference_model, expected)):
        F.cross_entropy(out, y).backward()
    for a, b in zip(model.parameters(), reference_model.parameters()):
        assert float((a.grad - b.grad).abs().max()) < 1e-10 * max(1.0, float(b.grad.abs().max()))


def test_on_backward_reports_the_backward_solve():
    model, (x, y) = build(grad="implicit", backward_max_iter=3), images(4)
    results = []
    F.cross_entropy(model(x, on_backward=results.append), y).backward()
    assert len(results) == 1 and results[0].n_evals == 4 and results[0].residual.shape == (4,)


def test_images_do_not_influence_each_other_in_evaluation():
    """Solver decisions are per image: the official code takes one norm over the batch."""
    model, _ = pair(2, max_iter=8)
    x, _ = images(3)
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(xi[None]) for xi in x])
    assert error(alone, together) < 1e-9


# --- speed without a change of meaning ----------------------------------------------------------------------

@pytest.mark.parametrize("grad", GRADS)
def test_channels_last_changes_nothing(grad):
    """Another order of summation only: float64 rounding, which solve and gradient may amplify to 1e-9."""
    model = build(**NARROW[3], grad=grad)
    fast = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x, y = images(4)
    calls = recorded(fast)
    logits, fast_logits = model(x), fast(x.contiguous(memory_format=torch.channels_last))
    assert error(fast_logits.detach(), logits.detach()) < 1e-10
    for m, out in ((model, logits), (fast, fast_logits)):
        F.cross_entropy(out, y).backward()
    for (name, a), b in zip(fast.named_parameters(), model.parameters()):
        assert float((a.grad - b.grad).abs().max()) < 1e-9 * max(1e-3, float(b.grad.abs().max())), name
    for call in calls:          # no evaluation of F starts with a conversion
        assert all(h.stride(1) == 1 for h in call["h"])
        assert all(w.is_contiguous(memory_format=torch.channels_last) for branch in call["weights"]
                   for w in branch)


@pytest.mark.parametrize("grad", GRADS)
def test_bf16_autocast_keeps_the_state_in_float32_and_the_direction_of_the_gradient(grad):
    """The solver's vectors stay float32; no parameter loses its gradient to a weight cast under no_grad.

    bf16 rounds by 2^-9 and turns ReLUs over; the whole gradient of a fresh model keeps a cosine of 0.96 (UPG,
    NPG), 0.95 (BPTT) and, through two solves that amplify rounding, 0.85 (implicit).  Unrelated ones: 0.
    """
    model = build(grad=grad, dtype=torch.float32, channels=(16, 16))
    x, y = images(16, dtype=torch.float32)
    exact = grads_of(model, x, y)
    calls = recorded(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, result = model(x, with_result=True)
    assert calls[0]["weights"][0][0].dtype == torch.bfloat16
    assert calls[0]["h"][0].dtype == torch.float32
    assert all(part.dtype == torch.float32 for part in result.h)
    model.zero_grad()
    F.cross_entropy(logits.float(), y).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    low = torch.cat([p.grad.flatten() for p in model.parameters()])
    exact = torch.cat([g.flatten() for g in exact.values()])
    assert cosine(low, exact) > (0.7 if grad == "implicit" else 0.9)


def test_a_compiled_model_equals_the_eager_one(monkeypatch):
    """--compile, without code generation: the same operations, so float64 rounding only.

    npg and implicit run the backward pass of one graph several times: its buffers must not be given away.
    """
    monkeypatch.setitem(mdeq_cifar.MODELS, "tiny",
                        dict(channels=(8, 16), head_channels=(4, 8), final_channels=16))
    compile, compiled = partial(torch.compile, backend="aot_eager"), []
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f.__name__) or compile(f))
    functorch_config.donated_buffer, torch._dynamo.config.cache_size_limit = True, 8        # torch's defaults
    args = mdeq_cifar.parse_args(["--compile", "--max-iter", "3", "--backward-max-iter", "3"])
    model = mdeq_cifar.build_model(args, 10, Process(0, 1, torch.device("cpu")))
    assert compiled == ["f", "head"] and not functorch_config.donated_buffer
    assert torch._dynamo.config.cache_size_limit == 64
    eager, (x, y) = build(max_iter=3, backward_max_iter=3), images(4)
    eager.load_state_dict(model.double().state_dict())
    for grad in ("upg", "npg", "implicit"):         # upg first: its graph is the one that gives buffers away
        for m in (model, eager):
            m.solve = partial(m.solve, grad=grad)
        ours, theirs = grads_of(model, x, y), grads_of(eager, x, y)
        for name in ours:
            assert (ours[name] - theirs[name]).abs().max() < 1e-9 * max(1e-3, theirs[name].abs().max()), name
    with torch.no_grad():
        assert error(model.eval()(x), eager.eval()(x)) < 1e-10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_GPU_gives_the_same_logits_and_gradients(monkeypatch):
    """float64: no TF32 is involved.  Even then torch's fused weight norm takes its root in float32."""
    monkeypatch.setattr(torch, "_weight_norm", lambda v, g, dim: v * (g / torch.norm_except_dim(v, 2, dim)))
    model, (x, y) = build(**NARROW[3]), images(4)
    on_gpu = copy.deepcopy(model).cuda()
    cpu, gpu = grads_of(model, x, y), grads_of(on_gpu, x.cuda(), y.cuda())
    off = {name: float((gpu[name].cpu() - g).abs().max()) / max(1e-3, float(g.abs().max()))
           for name, g in cpu.items()}
    assert max(off.values()) < 1e-9, off
