"""Our solvers and gradients beside torchdeq 0.1.0's: speed, calls of f and memory on three modules, and behaviour.

    pip install --no-deps --target /tmp/torchdeq torchdeq==0.1.0        # in a folder of its own: no dependency of ours
    OMP_NUM_THREADS=2 PYTHONPATH=/tmp/torchdeq python tests/compare_torchdeq.py                 # 18 iterations,
    OMP_NUM_THREADS=2 PYTHONPATH=/tmp/torchdeq python tests/compare_torchdeq.py --forward 26    # MDEQ's on ImageNet
    OMP_NUM_THREADS=2 PYTHONPATH=/tmp/torchdeq python tests/compare_torchdeq.py --forward 40    # torchdeq's default
    PYTHONPATH=/tmp/torchdeq python tests/compare_torchdeq.py --device cuda
    PYTHONPATH=/tmp/torchdeq python tests/compare_torchdeq.py --behaviour

Speed: both sides get the same f, the same start, the same budget and no tolerance, in turns within one process; figures
are medians over the repeats, the ratios medians of the ratios of neighbours.  A solve is also given over the time that
its calls of f alone take, measured in turns with it: 1 would be a solver that costs nothing.  The growth of memory is
the peak of the memory in use during one solve over that before it: of the resident set (Linux), in a process of its own
for each side, or allocated on the GPU.
Behaviour: each question is asked of both sides in a process of its own, since one of them may not return.
"""
import argparse
import importlib.util
import math
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import anderson, broyden, clock, equilibrium, fixed_point, peak_memory, reset_peak_memory

BACKWARD, K, LAM = 20, 5, 0.8


class TanhLinear(nn.Module):
    """h -> tanh(W h + u), a contraction of 0.9 in the Frobenius sense; N 32, D 4096."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(0.45 * torch.randn(4096, 4096) / 64)          # spectral norm about 0.9
        self.u = torch.randn(32, 4096)

    def start(self):
        return torch.zeros_like(self.u)

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

    def start(self):
        return torch.zeros_like(self.u)

    def forward(self, h):
        q, k, v = (x.view(4, 128, 4, 64).transpose(1, 2) for x in (self.qkv(h) + self.u.repeat(1, 1, 3)).chunk(3, -1))
        h = self.norm1(h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(4, 128, 256)))
        return self.norm2(h + self.down(F.relu(self.up(h))))


class TwoBranches(nn.Module):
    """Two resolutions that exchange, as in the MDEQ; N 16, D 30720 = 24 x 32 x 32 + 24 x 16 x 16."""

    def __init__(self):
        super().__init__()
        self.high, self.low = (nn.Conv2d(24, 24, 3, padding=1) for _ in range(2))
        self.to_low, self.to_high = nn.Conv2d(24, 24, 3, stride=2, padding=1), nn.Conv2d(24, 24, 1)
        self.norm = nn.ModuleList(nn.GroupNorm(4, 24) for _ in range(2))
        self.u = [torch.randn(16, 24, s, s) for s in (32, 16)]

    def start(self):
        return tuple(torch.zeros_like(u) for u in self.u)

    def forward(self, high, low):
        up = F.interpolate(self.to_high(low), scale_factor=2)
        return (self.norm[0](F.relu(0.5 * self.high(high) + up + self.u[0])),
                self.norm[1](F.relu(0.5 * self.low(low) + self.to_low(high) + self.u[1])))


CELLS = {"tanh-linear": TanhLinear, "transformer": Transformer, "two-branch conv": TwoBranches}


def sides(cell, forward):
    """{what: (ours, torchdeq's)}: functions that run it and return how often f was called forward."""
    from torchdeq import get_deq

    calls, h0 = [0], cell.start()
    single = torch.is_tensor(h0)

    def f(*h):
        calls[0] += 1
        return cell(*h)

    def ours(grad):
        def run():
            calls[0] = 0
            h, _ = equilibrium(f if single else lambda h: f(*h), h0, grad=grad, k=K, lam=LAM, solver=broyden,
                               max_iter=forward, tol=0.0, backward_solver=broyden, backward_max_iter=BACKWARD,
                               backward_tol=0.0)
            return finish((h,) if single else h)
        return run

    def theirs(train, **options):
        deq = get_deq(f_solver="broyden", b_solver="broyden", f_max_iter=forward, b_max_iter=BACKWARD, f_tol=0.0,
                      b_tol=0.0, f_stop_mode="rel", b_stop_mode="rel", **options).train(train)

        def run():
            calls[0] = 0
            h = deq(f, h0)[0][-1]
            return finish((h,) if torch.is_tensor(h) else h)
        return run

    def finish(h):
        if torch.is_grad_enabled():
            sum(part.square().mean() for part in h).backward()
            for p in cell.parameters():
                p.grad = None
        return calls[0]

    solve = (torch.no_grad()(ours("upg")), torch.no_grad()(theirs(False)))
    exact = theirs(True, ift=True)
    return {"solve": solve, f"step, UPG {K}": (ours("upg"), theirs(True, grad=K, tau=LAM)),
            "step, implicit": (ours("implicit"), exact), f"step, our NPG {K}, its implicit": (ours("npg"), exact)}


def f_alone(cell, calls):
    """Runs f so often, without a solver, from the start: a state is as good as another for its time."""
    h0 = cell.start()
    h = (h0,) if torch.is_tensor(h0) else h0

    @torch.no_grad()
    def run():
        for _ in range(calls):
            cell(*h)
    return run


def make(name, device):
    torch.manual_seed(0)
    with device:
        return CELLS[name]()


def growth(name, side, forward, device):
    """MB by which the peak of the memory in use exceeds what was there before a solve."""
    run = sides(make(name, device), forward)["solve"][side]
    with torch.no_grad():
        reset_peak_memory(device)
        before = peak_memory(device)
        run()
        return 1e3 * (peak_memory(device) - before)


# --- behaviour: each function returns what one side does, in a few words ---------------------------------------------

def small(side, train=True):
    """(layer, run): run(u) is the equilibrium of tanh(layer(h) + u), to rounding, with the exact gradient.

    side: 0 ours, 1 torchdeq's ift=True, 2 its hook_ift=True.
    """
    torch.manual_seed(0)
    layer = nn.Linear(8, 8).double()
    with torch.no_grad():
        layer.weight.mul_(0.9 / torch.linalg.matrix_norm(layer.weight, 2))

    def run(u):
        def f(h):
            return torch.tanh(layer(h) + u)

        h0 = torch.zeros_like(u)
        if side == 0:
            return equilibrium(f, h0, grad="implicit", max_iter=60, tol=1e-12, backward_max_iter=60,
                               backward_tol=1e-12)[0]
        from torchdeq import get_deq
        deq = get_deq(f_solver="broyden", b_solver="broyden", f_max_iter=60, b_max_iter=60, f_tol=1e-12, b_tol=1e-12,
                      f_stop_mode="rel", b_stop_mode="rel", ift=side == 1, hook_ift=side == 2).train(train)
        return deq(f, h0)[0][-1]

    return layer, run


def off(a, b):
    return f"{((a - b).norm() / b.norm()).item():.0e}"


def unrolled(layer, u, steps=2000):
    h = torch.zeros_like(u)
    for _ in range(steps):
        h = torch.tanh(layer(h) + u)
    return h


U = torch.linspace(-1, 1, 32, dtype=torch.float64).view(4, 8)


def second_backward(side):
    """a second backward pass over one graph: relative error of its gradient"""
    layer, run = small(side)
    loss = run(U).square().sum()
    first, second = (torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for _ in range(2))
    return off(second, first)


def two_forwards(side):
    """two forward passes before one backward pass: relative error of the gradient"""
    layer, run = small(side)
    grad, exact = (torch.autograd.grad(h(U).square().sum() + h(2 * U).square().sum(), layer.weight)[0]
                   for h in (run, lambda u: unrolled(layer, u)))
    return off(grad, exact)


def second_derivative(side):
    """a second derivative through the exact gradient: relative error"""
    layer, run = small(side)

    def twice(h, u):
        g, = torch.autograd.grad(h.square().sum(), u, create_graph=True)
        return torch.autograd.grad(g.square().sum(), u)[0]

    u, v = U.clone().requires_grad_(), U.clone().requires_grad_()
    return off(twice(run(u), u), twice(unrolled(layer, v), v))


def eval_mode(side):
    """the gradient in eval mode with grad mode on (fine-tuning with frozen statistics)"""
    layer, run = small(side, train=False)
    return "there" if run(U).requires_grad else "none, without a word"


def autocast(side):
    """the exact gradient under bf16 autocast: relative error"""
    layer, run = small(side)
    layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = run(U.float())
    grad, = torch.autograd.grad(h.float().square().sum(), layer.weight)
    exact, = torch.autograd.grad(unrolled(layer, U.float()).square().sum(), layer.weight)
    return off(grad, exact)


def one_bad_evaluation(side):
    """one NaN of f in iteration 10 of one sample: relative error of that sample's best state, Broyden"""
    layer, _ = small(side)
    calls = [0]

    def f(h):
        calls[0] += 1
        out = torch.tanh(layer(h) + U)
        return torch.where((torch.arange(4)[:, None] == 1) & (calls[0] == 10), math.nan, out)

    with torch.no_grad():
        h = solver("broyden", side)(f, torch.zeros_like(U), max_iter=40, tol=1e-10)
        return off(h[1], unrolled(layer, U)[1])


def solver(name, side):
    if side == 0:
        chosen = {"broyden": broyden, "anderson": anderson, "fixed_point_iter": fixed_point}[name]
        return lambda f, h0, **options: chosen(f, h0, **options).h
    from torchdeq.solver import get_solver
    return lambda f, h0, **options: get_solver(name)(f, h0, stop_mode="rel", **options)[0]


def anderson_stalls(side):
    """Anderson's relative residual after 40 iterations on a small-scaled tanh map (the ridge)"""
    torch.manual_seed(0)
    W = torch.randn(64, 64, dtype=torch.float64)
    W, u = 0.95 * W / torch.linalg.matrix_norm(W, 2), 1e-2 * torch.randn(4, 64, dtype=torch.float64)

    def f(h):
        return torch.tanh(h @ W + u)

    h = solver("anderson", side)(f, torch.zeros_like(u), max_iter=40, tol=0.0)
    return f"{((f(h) - h).norm() / f(h).norm()).item():.0e}"


def damped_residual(side):
    """the relative residual of f at which the plain iteration with damping 0.1 stops, tolerance 1e-6"""
    layer, _ = small(side)
    options = {"lam": 0.1} if side == 0 else {"tau": 0.1}
    with torch.no_grad():
        h = solver("fixed_point_iter", side)(lambda h: torch.tanh(layer(h) + U), torch.zeros_like(U), max_iter=2000,
                                             tol=1e-6, **options)
        f_h = torch.tanh(layer(h) + U)
        return f"{((f_h - h).norm(dim=1) / f_h.norm(dim=1)).max().item():.1e}"


def operators(side):
    """torch operators in an iteration of Broyden, without f and views (on a GPU about one kernel each)"""
    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += func.namespace == "aten" and not func.is_view
            return func(*args, **(kwargs or {}))

    found = []
    for steps in (10, 20):
        with Count() as count, torch.no_grad():
            solver("broyden", side)(torch.cos, torch.randn(4, 100), max_iter=steps, tol=0.0)
        found.append(count.n)
    return f"{(found[1] - found[0]) / 10 - 1:.0f}"


QUESTIONS = (second_backward, two_forwards, second_derivative, eval_mode, autocast, one_bad_evaluation, anderson_stalls,
             damped_residual, operators)


def answer(question, side):
    """What this side does, in a process of its own."""
    try:
        done = subprocess.run([sys.executable, "-W", "ignore", __file__, "--ask", question.__name__, str(side)],
                              capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "does not return (120 s)"
    if done.returncode:
        return f"error: {(done.stderr.strip().splitlines() or ['crash'])[-1].removeprefix('RuntimeError: ')[:70]}"
    return done.stdout.strip()


def main():
    p = argparse.ArgumentParser(description="Compares our solvers and gradients with torchdeq's.")
    p.add_argument("--forward", type=int, default=18, help="iterations of Broyden of the forward solve (default 18)")
    p.add_argument("--repeats", type=int, default=7, help="of every measurement of time (default 7)")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where speed is measured (default cpu)")
    p.add_argument("--behaviour", action="store_true", help="what each does where users of such code get hurt")
    p.add_argument("--growth", nargs=2, metavar=("CELL", "SIDE"), help=argparse.SUPPRESS)
    p.add_argument("--ask", nargs=2, metavar=("QUESTION", "SIDE"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.growth:
        return print(growth(args.growth[0], int(args.growth[1]), args.forward, torch.device("cpu")))
    if args.ask:
        return print(globals()[args.ask[0]](int(args.ask[1])))
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: there is no GPU here")
    if importlib.util.find_spec("torchdeq") is None:
        p.error("torchdeq is not there: pip install --no-deps --target FOLDER torchdeq==0.1.0, then PYTHONPATH=FOLDER")
    if args.behaviour:
        print("| | ours | torchdeq 0.1.0, ift | torchdeq 0.1.0, hook_ift |\n|---|---|---|---|")
        for question in QUESTIONS:
            answers = " | ".join(answer(question, side) for side in range(3))
            print(f"| {question.__doc__} | {answers} |", flush=True)
        return
    device = torch.device(args.device)
    hardware = f"{torch.get_num_threads()} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {hardware}; {args.forward} forward and {BACKWARD} "
          f"backward iterations of Broyden, k = {K}; milliseconds, calls of f forward, MB\n")
    print("| cell | what | ours | torchdeq | torchdeq / ours |\n|---|---|---|---|---|")
    for name in CELLS:
        cell = make(name, device)
        for what, pair in sides(cell, args.forward).items():
            calls = [run() for run in pair]                             # warm-up
            runs = [*pair, f_alone(cell, calls[0])] if what == "solve" else pair
            times = [[] for _ in runs]
            for _ in range(args.repeats):
                for side, run in enumerate(runs):
                    start = clock(device)
                    run()
                    times[side].append(1e3 * (clock(device) - start))
            ratio = statistics.median(b / a for a, b, *_ in zip(*times))
            cells = [f"{statistics.median(t):.1f} ms, {n} calls" for t, n in zip(times, calls)]
            print(f"| {name} | {what} | {cells[0]} | {cells[1]} | {ratio:.2f} |", flush=True)
            if what == "solve":
                overhead = [statistics.median(t / f * calls[0] / n for t, f in zip(times[side], times[2]))
                            for side, n in enumerate(calls)]
                print(f"| {name} | solve / (calls of f x time of f) | {overhead[0]:.2f} | {overhead[1]:.2f} | |",
                      flush=True)
        mb = [growth(name, side, args.forward, device) if args.device == "cuda" else
              float(subprocess.run([sys.executable, __file__, "--growth", name, str(side), "--forward",
                                    str(args.forward)], check=True, text=True, stdout=subprocess.PIPE).stdout)
              for side in (0, 1)]
        print(f"| {name} | memory of a solve | {mb[0]:.0f} MB | {mb[1]:.0f} MB | {mb[1] / mb[0]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
