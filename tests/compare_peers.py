"""Our solvers and gradients beside torchdeq 0.1.0's and silva-networks 1.2.2's: speed, memory and behaviour.

    python3 -m venv peers                      # an environment of its own: silva-networks asks for numpy < 2
    peers/bin/pip install torch "numpy<2" tqdm silva-networks==1.2.2
    peers/bin/pip install --no-deps torchdeq==0.1.0
    OMP_NUM_THREADS=2 peers/bin/python tests/compare_peers.py                 # 18 iterations,
    OMP_NUM_THREADS=2 peers/bin/python tests/compare_peers.py --forward 26    # as MDEQ's on ImageNet
    OMP_NUM_THREADS=2 peers/bin/python tests/compare_peers.py --forward 40    # torchdeq's default
    peers/bin/python tests/compare_peers.py --device cuda
    peers/bin/python tests/compare_peers.py --behaviour
    peers/bin/python tests/compare_peers.py --mdeq                            # steps of the MDEQs of our scripts

If a package is missing, its part is left out.  The parts that are used here also run with numpy 2.  So if
torch and numpy are installed, a folder will do, with PYTHONPATH=both:
    pip install --no-deps --target both torchdeq==0.1.0 silva-networks==1.2.2 certifi

Speed: both sides get the same f, the same start, the same budget and no tolerance, in turns within one
process.  Times are medians over the repeats, and ratios are medians of the ratios of neighbouring runs.  The
work is printed beside the time: calls of f, and vector-Jacobian products (VJPs), including the one into the
parameters.  The time of a solve is also divided by the time of its calls of f alone, which are measured in
turns with it.  A solver that costs nothing would have 1.  The growth of memory is the peak during one solve
minus the memory in use before it.  On a CPU it is the resident set (Linux), in a process of its own for each
side, and on a GPU what is allocated.

Forward solves are by Broyden's method with full memory.  So are the backward solves beside torchdeq, which
has no GMRES.  Beside silva they are by GMRES, its default, with equal VJPs.  Silva's "phantom" is Eq. (16),
its "neumann" is Eq. (17).

"backward solve" is the linear system (I - J^T) w = g of implicit differentiation alone, J = df/dh at our h*
and g = h*, with VJPs of one graph of f.  The residual is ||g + J^T w - w|| / ||g||, over the batch.
    equal VJPs      silva's GMRES takes two VJPs per iteration, and ours takes one.  Both take one more VJP in
                    a solve.  So silva has half as many iterations for the same work
    until 1e-4      silva's stops when the batch has this residual, ours when every sample has it
    ours alone      "ours" is our Broyden and "the other" our GMRES, with as many VJPs

Behaviour: each question runs for every side in a process of its own, since one of them may not return.
"""
import argparse
import importlib.metadata
import importlib.util
import math
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (anderson, broyden, call_libc, clock, equilibrium, fixed_point, gmres, keep_freed_memory,
                    peak_memory, recomputed, reset_peak_memory)

BACKWARD, K, LAM = 20, 5, 0.8
TINY = 1e-300               # silva refuses a tolerance of 0
PEERS = {"torchdeq": "torchdeq", "silva": "silva_networks"}
SIDES = {"torchdeq": ("torchdeq, ift", "torchdeq, hook_ift"), "silva": ("silva",)}   # its two exact gradients


class TanhLinear(nn.Module):
    """h -> tanh(W h + u), a contraction of 0.9 in the Frobenius sense; N 32, D 4096."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(0.45 * torch.randn(4096, 4096) / 64)          # spectral norm about 0.9
        self.u = torch.randn(32, 4096)

    def forward(self, h):
        return torch.tanh(F.linear(h, self.W) + self.u)


class Transformer(nn.Module):
    """A post-norm Transformer block with injection; N 4, D 32768 = 128 tokens x 256."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(256, 768), nn.Linear(256, 256)
        self.up, self.down = nn.Linear(256, 1024), nn.Linear(1024, 256)
        self.norm1, self.norm2 = nn.LayerNorm(256), nn.LayerNorm(256)
        self.u = torch.randn(4, 128, 256)

    def forward(self, h):
        q, k, v = (x.view(4, 128, 4, 64).transpose(1, 2)
                   for x in (self.qkv(h) + self.u.repeat(1, 1, 3)).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(4, 128, 256)
        h = self.norm1(h + self.out(a))
        return self.norm2(h + self.down(F.relu(self.up(h))))


class TwoBranches(nn.Module):
    """Two resolutions that exchange, as in the MDEQ; N 16, D 30720 = 24 x 32 x 32 + 24 x 16 x 16."""

    def __init__(self, N=16):
        super().__init__()
        self.high, self.low = (nn.Conv2d(24, 24, 3, padding=1) for _ in range(2))
        self.to_low, self.to_high = nn.Conv2d(24, 24, 3, stride=2, padding=1), nn.Conv2d(24, 24, 1)
        self.norm = nn.ModuleList(nn.GroupNorm(4, 24) for _ in range(2))
        self.u = [torch.randn(N, 24, s, s) for s in (32, 16)]

    def forward(self, high, low):
        up = F.interpolate(self.to_high(low), scale_factor=2)
        return (self.norm[0](F.relu(0.5 * self.high(high) + up + self.u[0])),
                self.norm[1](F.relu(0.5 * self.low(low) + self.to_low(high) + self.u[1])))


class Equilibrium(nn.Module):
    """F of an MDEQ of our scripts, with plain weights and the injection of noise images.

    Plain, since weight_norm would compute its weights at every call of F.  The scripts do so once per step.
    """

    def __init__(self, script, *size):
        super().__init__()
        mdeq = importlib.import_module(script).MDEQ().to(memory_format=torch.channels_last)
        for module in list(mdeq.modules()):
            if nn.utils.parametrize.is_parametrized(module):
                nn.utils.parametrize.remove_parametrizations(module, "weight")
        with torch.no_grad():
            self.u = tuple(u.contiguous(memory_format=torch.channels_last)
                           for u in mdeq.inject(torch.randn(*size).to(memory_format=torch.channels_last)))
        self.mdeq = mdeq

    def forward(self, *h):
        return self.mdeq.f(h, self.u)


MDEQS = {"MDEQ-Tiny, N 32": partial(Equilibrium, "mdeq_cifar", 32, 3, 32, 32),
         "MDEQ-Small (ImageNet), N 16": partial(Equilibrium, "mdeq_imagenet", 16, 3, 224, 224)}
CELLS = {"tanh-linear": TanhLinear, "transformer": Transformer, "two-branch conv": TwoBranches,
         "two-branch conv, N 128": partial(TwoBranches, 128)}
OURS_ALONE = "two-branch conv, N 128"           # batch and state of MDEQ-Tiny


def make(name, device):
    torch.manual_seed(0)
    with device:
        return {**CELLS, **MDEQS}[name]()


def start(cell):
    return torch.zeros_like(cell.u) if torch.is_tensor(cell.u) else tuple(torch.zeros_like(u) for u in cell.u)


def package(side, grad="implicit", max_iter=60, tol=1e-12, backward_max_iter=60, backward_solver="gmres",
            method="broyden", damping=1.0, train=True, k=K):
    """solve(f, h0, needed): this package's equilibrium, with the gradient `grad` of the tensors `needed`.

    Tolerances are relative.  The backward solver of torchdeq is always Broyden's.
    """
    if side == "ours":
        solvers = {"broyden": broyden, "gmres": gmres, "anderson": anderson,
                   "picard": partial(fixed_point, lam=damping)}
        return lambda f, h0, _: equilibrium(
            f, h0, grad=grad, k=k, lam=LAM, solver=solvers[method], max_iter=max_iter, tol=tol,
            backward_solver=solvers[backward_solver], backward_max_iter=backward_max_iter,
            backward_tol=tol)[0]
    if side == "silva":
        from silva_networks import SILVADEQEngine, SolverConfig
        if grad == "npg":
            damping = LAM               # one number damps the series and, at no cost, the steps of the solve
        engine = SILVADEQEngine(SolverConfig(
            solver=method, max_iter=max_iter, tol=max(tol, TINY), stop_mode="relative", alpha=damping,
            history=max_iter if method == "broyden" else 5, return_best=True,
            backward_mode={"upg": "phantom", "npg": "neumann", "bptt": "unrolled"}.get(grad, grad),
            phantom_steps=k, phantom_tau=LAM, neumann_terms=k, backward_solver=backward_solver,
            backward_max_iter=backward_max_iter,
            backward_tol=max(tol, TINY), backward_stop_mode="relative")).train(train)
        return lambda f, h0, needed: engine(f, h0, params=needed)
    from torchdeq import get_deq
    kind = {"grad": k, "tau": LAM} if grad == "upg" else {"hook_ift" if "hook_ift" in side else "ift": True}
    deq = get_deq(f_solver=method.replace("picard", "fixed_point_iter"), b_solver="broyden",
                  f_max_iter=max_iter,
                  b_max_iter=backward_max_iter, f_tol=tol, b_tol=tol, f_stop_mode="rel", b_stop_mode="rel",
                  **kind).train(train)
    return lambda f, h0, _: deq(f, h0, solver_kwargs={"tau": damping})[0][-1]


# --- speed --------------------------------------------------------------------------------------------------

def parts(h):
    return (h,) if torch.is_tensor(h) else h


class Counted:
    """The cell as all three packages call it; counts the calls, and by a hook on their result the VJPs."""

    def __init__(self, cell):
        self.cell, self.calls, self.vjps = cell, 0, 0

    def __call__(self, *h):
        self.calls += 1
        # torchdeq hands over a tuple's parts one by one
        out = self.cell(*(h if torch.is_tensor(h[0]) else h[0]))
        if parts(out)[0].requires_grad:
            parts(out)[0].register_hook(self.count_vjp)
        return out

    def count_vjp(self, _):
        self.vjps += 1


def step(f, side, grad, forward, backward_max_iter=BACKWARD, backward_solver="broyden", train=True, k=K,
         recompute=False):
    """A function that runs a training step of f (a Counted), or a solve, and returns its calls and VJPs."""
    h0, weights = start(f.cell), list(f.cell.parameters())
    solver = package(side, grad, forward, 0.0, backward_max_iter, backward_solver, train=train, k=k)
    call = recomputed(f) if recompute else f

    def run():
        f.calls = f.vjps = 0
        with torch.set_grad_enabled(train):
            h = solver(call, h0, weights)
            if train:
                sum(part.square().mean() for part in parts(h)).backward()
                f.cell.zero_grad()
        return f.calls, f.vjps
    return run


def steps(cell, forward, peer):
    """{what: (ours, the peer's)}: functions that run it and return how many calls of f and VJPs it took.

    The third function of "solve" is its calls of f alone: for their time a state is as good as another.
    """
    f, h0 = Counted(cell), start(cell)

    def both(grad, **options):
        return tuple(step(f, side, grad, forward, **options) for side in ("ours", peer))

    @torch.no_grad()
    def f_alone():
        for _ in range(forward + 1):
            cell(*parts(h0))

    theirs = step(f, peer, "upg", forward)
    rows = {"solve": (*both("implicit", train=False), f_alone), f"step, UPG {K}": both("upg"),
            f"step, UPG {K}, ours recomputed": (step(f, "ours", "upg", forward, recompute=True), theirs)}
    if peer == "torchdeq":
        ours, exact = both("implicit")
        return {**rows, "step, implicit": (ours, exact),
                f"step, our NPG {K}, its implicit": (step(f, "ours", "npg", forward), exact)}
    return {**rows, f"step, NPG {K}": both("npg"),
            "step, implicit by GMRES": (step(f, "ours", "implicit", forward, BACKWARD, "gmres"),
                                        step(f, peer, "implicit", forward, BACKWARD // 2, "gmres"))}


@torch.no_grad()
def backward_solves(cell, forward, with_silva):
    """({what: (ours, the other)}, work): functions that return w; one that runs them, for what that took."""
    f = Counted(cell)
    g = list(parts(broyden(f, start(cell), max_iter=forward, tol=0.0).h))
    h = [part.detach().requires_grad_() for part in g]
    with torch.enable_grad():
        f_h = parts(f(*h))

    def vjp(v):
        return torch.autograd.grad(f_h, h, v, retain_graph=True)

    def flat(state):        # silva takes one tensor; its engine makes one of a tuple in the same way
        return state[0].flatten() if len(state) == 1 else torch.cat([part.flatten() for part in state])

    def unflat(w):
        return [part.view_as(hi) for part, hi in zip(w.split([hi.numel() for hi in h]), h)]

    def ours(solver, max_iter, tol):
        return lambda: solver(lambda w: [j + gi for j, gi in zip(vjp(w), g)], g, max_iter=max_iter, tol=tol,
                              stop_mode=g).h

    @torch.no_grad()
    def silvas(max_iter, tol):
        from silva_networks import gmres as its_gmres
        return unflat(its_gmres(lambda w: w - flat(vjp(unflat(w))), flat(g), max_iter=max_iter, tol=tol,
                                stop_mode="relative").x)

    @torch.no_grad()
    def work(run):
        f.vjps = 0
        w, vjps = run(), f.vjps
        rest = flat([j + gi - wi for j, gi, wi in zip(vjp(w), g, w)])
        return f"{vjps} VJPs, residual {(rest.norm() / flat(g).norm()).item():.1e}"

    by_gmres = ours(gmres, BACKWARD, 0.0)
    rows = {"ours alone: backward solve, GMRES / Broyden": (ours(broyden, BACKWARD, 0.0), by_gmres)}
    if with_silva:
        rows["silva: backward solve by GMRES, equal VJPs"] = by_gmres, partial(silvas, BACKWARD // 2, TINY)
        rows["silva: backward solve by GMRES, until 1e-4"] = (ours(gmres, 100, 1e-4),
                                                              partial(silvas, 100, 1e-4))
    return rows, work


def growth(run, device):
    """MB by which the peak of a run exceeds the memory in use before."""
    run()                               # torch imports some parts of itself when they are first needed
    call_libc("malloc_trim", 0)
    reset_peak_memory(device)
    before = peak_memory(device)
    run()
    return 1e3 * (peak_memory(device) - before)


def grows(device, *what):
    """growth of what `growing` makes of these words; on a CPU in a process of its own."""
    if device.type == "cuda":
        return growth(growing(device, *what), device)
    return float(subprocess.run([sys.executable, __file__, "--growth", *map(str, what)], check=True, text=True,
                                stdout=subprocess.PIPE).stdout)


def growing(device, name, forward, side, grad, k=K, recompute=0, backward=BACKWARD):
    solver, train = "broyden" if side == "torchdeq" else "gmres", grad != "solve"
    return step(Counted(make(name, device)), side, grad if train else "implicit", int(forward), int(backward), solver,
                train, int(k), bool(int(recompute)))


def race(name, what, runs, work, args, device):
    """Prints the row of the first two of the runs, by their work.  Returns all milliseconds, in turns."""
    times = [[] for _ in runs]
    for _ in range(args.repeats):
        for found, run in zip(times, runs):
            start = clock(device)
            run()
            found.append(1e3 * (clock(device) - start))
    ours, other = (f"{statistics.median(t):.1f} ms, {w}" for t, w in zip(times, work))
    ratio = statistics.median(b / a for a, b, *_ in zip(*times))
    print(f"| {name} | {what} | {ours} | {other} | {ratio:.2f} |", flush=True)
    return times


def compare_steps(name, cell, peer, args, device):
    """The rows of one cell beside one peer."""
    for what, runs in steps(cell, args.forward, peer).items():
        counts = [run() for run in runs][:2]                            # warm-up
        work = [f"{calls} calls" + (f", {vjps} VJPs" if vjps else "") for calls, vjps in counts]
        times = race(name, f"{peer}: {what}", runs, work, args, device)
        if what == "solve":
            overhead = [statistics.median(t / alone * (args.forward + 1) / calls
                                          for t, alone in zip(taken, times[2]))
                        for taken, (calls, _) in zip(times, counts)]
            print(f"| {name} | {peer}: solve / (calls of f x time of f) | {overhead[0]:.2f} | "
                  f"{overhead[1]:.2f} | |")
    for what, grad, ours in (("solve", "solve", ()), (f"step, UPG {K}", "upg", ()),
                             (f"step, UPG {K}, ours recomputed", "upg", (K, 1))):
        mb = grows(device, name, args.forward, "ours", grad, *ours), grows(device, name, args.forward, peer, grad)
        print(f"| {name} | {peer}: memory of a {what} | {mb[0]:.0f} MB | {mb[1]:.0f} MB | "
              f"{mb[1] / mb[0]:.2f} |", flush=True)


def mdeq_memory(name, peers, forward, device):
    """A table: by how many MB the peak of a step exceeds the memory in use before."""
    print(f"\n| {name}: memory of a step | k = 1 | k = 5 | k = 20 |\n|{'---|' * 4}")
    rows = {"UPG": ("ours", "upg", 0), "UPG, recomputed": ("ours", "upg", 1), "NPG": ("ours", "npg", 0),
            "implicit, GMRES 5": ("ours", "implicit", 0, 5), "implicit, GMRES 24": ("ours", "implicit", 0, 24),
            **{f"{peer}: UPG": (peer, "upg", 0) for peer in peers}}
    for what, (side, grad, *rest) in rows.items():
        mb = [grows(device, name, forward, side, grad, k, *rest) for k in ((1, 5, 20) if grad != "implicit" else (1,))]
        print(f"| {what} | " + " | ".join(f"{x:.0f} MB" for x in mb) + " | " * (3 - len(mb)) + " |", flush=True)


# --- behaviour: each function returns what one side does, in a few words ------------------------------------

def example(side, **options):
    """(layer, f, run): f(h, u) = tanh(layer(h) + u) contracts by 0.9, run(u) is its equilibrium."""
    torch.manual_seed(0)
    layer, solve = nn.Linear(8, 8).double(), package(side, **options)
    with torch.no_grad():
        layer.weight.mul_(0.9 / torch.linalg.matrix_norm(layer.weight, 2))

    def f(h, u):
        return torch.tanh(layer(h) + u)

    return layer, f, lambda u: solve(lambda h: f(h, u), torch.zeros_like(u), [*layer.parameters(), u])


U = torch.linspace(-1, 1, 32, dtype=torch.float64).view(4, 8)


def off(a, b):
    return f"{((a - b).norm() / b.norm()).item():.0e}"


def grad(h, x, **options):
    return torch.autograd.grad(h.square().sum(), x, **options)[0]


def unrolled(f, u, steps=2000):
    h = torch.zeros_like(u)
    for _ in range(steps):
        h = f(h, u)
    return h


def dense(f):
    """h* with the gradient (I - J)^-1 df, by a dense solve for each sample."""
    h = unrolled(f, U).detach()
    J = torch.stack([torch.autograd.functional.jacobian(lambda x: f(x, u), x) for x, u in zip(h, U)])
    return h + torch.linalg.solve(torch.eye(8, dtype=h.dtype) - J, (f(h, U) - h)[:, :, None])[:, :, 0]


def exact_gradient(side):
    """the exact gradient against a dense solve; the same under bf16 autocast: relative errors"""
    layer, f, run = example(side)
    exact = off(grad(run(U), layer.weight), grad(dense(f), layer.weight))
    layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = run(U.float())
    return f"{exact}, {off(grad(h.float(), layer.weight), grad(unrolled(f, U.float()), layer.weight))}"


def through_anderson(side):
    """gradient through Anderson's iterations (silva's "unrolled") against a dense solve: relative error"""
    if side.startswith("torchdeq"):
        return "has none"
    layer, f, run = example(side, grad="bptt", method="anderson", max_iter=200)
    return off(grad(run(U), layer.weight), grad(dense(f), layer.weight))


def coupling(side):
    """a sample in a batch and alone, 6 iterations of each solve: relative difference of state, gradient"""
    run, solved, u = example(side, max_iter=6, tol=0.0)[2], example(side, backward_max_iter=6)[2], U.clone()
    u.requires_grad_()
    return f"{off(run(U)[1], run(U[1:2])[0])}, {off(grad(solved(u), u)[1], grad(solved(u[1:2]), u)[1])}"


def second_backward(side):
    """a second backward pass over one graph: relative error of its gradient"""
    layer, _, run = example(side)
    h = run(U)
    first, second = (grad(h, layer.weight, retain_graph=True) for _ in range(2))
    return off(second, first)


def two_forwards(side):
    """two forward passes of one module before one backward pass: relative error of the gradient"""
    layer, f, run = example(side)
    return off(*(torch.autograd.grad(h(U).square().sum() + h(2 * U).square().sum(), layer.weight)[0]
                 for h in (run, partial(unrolled, f))))


def second_derivative(side):
    """a second derivative through the exact gradient: relative error"""
    _, f, run = example(side)
    u = U.clone().requires_grad_()
    return off(*(grad(grad(h(u), u, create_graph=True), u) for h in (run, partial(unrolled, f))))


def eval_mode(side):
    """the gradient in eval mode with grad mode on (fine-tuning with frozen statistics)"""
    return "there" if example(side, train=False)[2](U).requires_grad else "none, without a word"


@torch.no_grad()
def one_bad_evaluation(side):
    """one NaN of f in iteration 10 of one sample: relative error of that sample's best state, Broyden"""
    f, calls = example("ours")[1], []

    def broken(h):
        calls.append(None)
        return torch.where((torch.arange(4)[:, None] == 1) & (len(calls) == 10), math.nan, f(h, U))

    h = package(side, max_iter=40, tol=1e-10, train=False)(broken, torch.zeros_like(U), [])
    return off(h[1], unrolled(f, U)[1])


@torch.no_grad()
def anderson_stalls(side):
    """Anderson's relative residual after 40 iterations on a small-scaled tanh map (the ridge)"""
    torch.manual_seed(0)
    W = torch.randn(64, 64, dtype=torch.float64)
    W, u = 0.95 * W / torch.linalg.matrix_norm(W, 2), 1e-2 * torch.randn(4, 64, dtype=torch.float64)
    solve = package(side, method="anderson", max_iter=40, tol=0.0, train=False)
    h = solve(lambda h: torch.tanh(h @ W + u), torch.zeros_like(u), [])
    return off(h, torch.tanh(h @ W + u))


@torch.no_grad()
def damped_residual(side):
    """the relative residual of f at which the plain iteration with damping 0.1 stops, tolerance 1e-6"""
    _, f, run = example(side, method="picard", max_iter=2000, tol=1e-6, damping=0.1, train=False)
    h = run(U)
    return f"{((f(h, U) - h).norm(dim=1) / f(h, U).norm(dim=1)).max().item():.1e}"


class Watch(TorchDispatchMode):
    """Counts operators without views, and the numbers that the host reads: it waits for a GPU at each."""

    def __init__(self):
        super().__init__()
        self.operators = self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += func.namespace == "aten" and not func.is_view
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads += 1
            if args[0].is_meta:
                return True                     # there is no number: "some sample still moves"
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def an_iteration(side):
    """an iteration of Broyden; GMRES: operators without f and views (on a GPU about kernels), waits for it"""
    torch.manual_seed(0)
    # Ours reads more often on a CPU, where it costs nothing; tensors without numbers it treats as a GPU's.
    # The others do the same everywhere.
    with torch.device("meta" if side == "ours" else "cpu"):
        J, b = 0.08 * torch.randn(100, 100), torch.randn(4, 100)
    if side == "ours":
        torch.is_autocast_enabled = lambda device: False  # the meta device has none, and torch refuses to ask

    def f(h):
        return torch.addmm(b, h, J)

    def mean(solve, calls=1):        # of the 9th to the 24th iteration; a call of f is one operator
        few, many = Watch(), Watch()
        for watch, n in ((few, 8), (many, 24)):
            with watch:
                solve(n)
        return f"{(many.operators - few.operators) / 16 - calls:.0f}, {(many.reads - few.reads) / 16:.3g}"

    by_broyden = mean(lambda n: package(side, max_iter=n, tol=TINY, train=False)(f, b, []))
    if side == "ours":
        return f"{by_broyden}; {mean(lambda n: gmres(f, b, max_iter=n, tol=TINY, stop_mode=b))}"
    if side != "silva":
        return f"{by_broyden}; has none"
    from silva_networks import gmres as its_gmres
    by_gmres = mean(lambda n: its_gmres(lambda w: w.addmm(w, J, alpha=-1), b, max_iter=n, tol=TINY), calls=2)
    return f"{by_broyden}; {by_gmres}"


QUESTIONS = (exact_gradient, through_anderson, coupling, second_backward, two_forwards, second_derivative,
             eval_mode,
             one_bad_evaluation, anderson_stalls, damped_residual, an_iteration)


def answer(question, side):
    """What this side does, in a process of its own."""
    try:
        done = subprocess.run([sys.executable, "-W", "ignore", __file__, "--ask", question.__name__, side],
                              capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "does not return (120 s)"
    if done.returncode:
        return f"error: {(done.stderr.strip().splitlines() or ['crash'])[-1].split('Error: ')[-1][:70]}"
    return done.stdout.strip()


def main():
    p = argparse.ArgumentParser(description="Compares our solvers with torchdeq's and silva-networks'.")
    p.add_argument("--forward", type=int, default=18,
                   help="iterations of Broyden of the forward solve (default 18)")
    p.add_argument("--repeats", type=int, default=7, help="of every measurement of time (default 7)")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu",
                   help="where speed is measured (default cpu)")
    p.add_argument("--behaviour", action="store_true",
                   help="what each does where users of such code get hurt")
    p.add_argument("--mdeq", action="store_true",
                   help="memory of steps of the F of mdeq_cifar.py and mdeq_imagenet.py, time of the first")
    p.add_argument("--growth", nargs="+", help=argparse.SUPPRESS)
    p.add_argument("--ask", nargs=2, metavar=("QUESTION", "SIDE"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.growth:
        cpu = torch.device("cpu")
        return print(growth(growing(cpu, *args.growth), cpu))
    if args.ask:
        return print(globals()[args.ask[0]](args.ask[1]))
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: there is no GPU here")
    peers = [peer for peer, module in PEERS.items() if importlib.util.find_spec(module)]
    if not peers:
        p.error("neither torchdeq nor silva-networks is installed: the top of this file says how")
    for peer, module in PEERS.items():
        version = (importlib.metadata.version(module) if peer in peers else
                   "is not installed: its part is left out")
        print(module.replace("_", "-"), version)
    if args.behaviour:
        sides = ["ours", *(side for peer in peers for side in SIDES[peer])]
        print(f"\n| | {' | '.join(sides)} |\n|---|{'---|' * len(sides)}")
        for question in QUESTIONS:
            print(f"| {question.__doc__} | {' | '.join(answer(question, side) for side in sides)} |",
                  flush=True)
        return
    device = torch.device(args.device)
    hardware = f"{torch.get_num_threads()} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {hardware}; {args.forward} forward and {BACKWARD} backward "
          f"iterations, k = {K}; milliseconds, work, MB\n\n"
          f"| cell | what | ours | the other | the other / ours |\n|{'---|' * 5}")
    if args.mdeq:
        keep_freed_memory()             # as the scripts do; it helps both sides
        for peer in peers:
            compare_steps("MDEQ-Tiny, N 32", make("MDEQ-Tiny, N 32", device), peer, args, device)
        for name in MDEQS:
            mdeq_memory(name, peers, args.forward, device)
        return
    for name in CELLS:
        cell = make(name, device)
        for peer in peers if name != OURS_ALONE else ():
            compare_steps(name, cell, peer, args, device)
        rows, work = backward_solves(cell, args.forward, "silva" in peers and name != OURS_ALONE)
        for what, pair in rows.items():
            race(name, what, pair, [work(run) for run in pair], args, device)


if __name__ == "__main__":
    main()
