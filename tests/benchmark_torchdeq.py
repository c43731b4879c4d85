"""Our solver and gradients beside torchdeq 0.1.0's, on three equilibrium modules: times, calls of f, memory.

    pip install --no-deps --target /tmp/torchdeq torchdeq==0.1.0        # in a folder of its own: no dependency of ours
    OMP_NUM_THREADS=2 PYTHONPATH=/tmp/torchdeq python tests/benchmark_torchdeq.py

Both sides get the same f, the same start, the same budget and no tolerance, in turns within one process; the figures are
medians over the repeats, the ratios medians of the ratios of neighbours.  The growth of memory is the peak of the
resident set during one solve over that before it, in a process of its own for each side (Linux).
"""
import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import broyden, equilibrium, peak_memory, reset_peak_memory

FORWARD, BACKWARD, K, LAM = 18, 20, 5, 0.8


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


def sides(cell):
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
                               max_iter=FORWARD, tol=0.0, backward_solver=broyden, backward_max_iter=BACKWARD,
                               backward_tol=0.0)
            return finish((h,) if single else h)
        return run

    def theirs(train, **options):
        deq = get_deq(f_solver="broyden", b_solver="broyden", f_max_iter=FORWARD, b_max_iter=BACKWARD, f_tol=0.0,
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


def growth(name, side):
    """MB by which the peak of the resident set exceeds what was there before a solve."""
    torch.manual_seed(0)
    run = sides(CELLS[name]())["solve"][side]
    with torch.no_grad():
        device = torch.device("cpu")
        reset_peak_memory(device)
        before = peak_memory(device)
        run()
        return 1e3 * (peak_memory(device) - before)


def main():
    p = argparse.ArgumentParser(description="Times our solver and gradients beside torchdeq's.")
    p.add_argument("--repeats", type=int, default=7, help="of every measurement (default 7)")
    p.add_argument("--growth", nargs=2, metavar=("CELL", "SIDE"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.growth:
        return print(growth(args.growth[0], int(args.growth[1])))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {FORWARD} forward and {BACKWARD} backward "
          f"iterations of Broyden, k = {K}; milliseconds, calls of f forward, MB\n")
    print("| cell | what | ours | torchdeq | torchdeq / ours |\n|---|---|---|---|---|")
    for name, make in CELLS.items():
        torch.manual_seed(0)
        for what, pair in sides(make()).items():
            calls = [run() for run in pair]                             # warm-up
            times = [[], []]
            for _ in range(args.repeats):
                for side, run in enumerate(pair):
                    start = time.perf_counter()
                    run()
                    times[side].append(1e3 * (time.perf_counter() - start))
            ratio = statistics.median(b / a for a, b in zip(*times))
            cells = [f"{statistics.median(t):.0f} ms, {n} calls" for t, n in zip(times, calls)]
            print(f"| {name} | {what} | {cells[0]} | {cells[1]} | {ratio:.2f} |", flush=True)
        mb = [float(subprocess.run([sys.executable, __file__, "--growth", name, str(side)], check=True, text=True,
                                   stdout=subprocess.PIPE).stdout) for side in (0, 1)]
        print(f"| {name} | memory of a solve | {mb[0]:.0f} MB | {mb[1]:.0f} MB | {mb[1] / mb[0]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
