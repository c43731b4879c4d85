"""Phantom gradients of a one-layer implicit model, compared with "On Training Implicit Models" (NeurIPS 2021,
arXiv:2111.05177): Figs. 1 and 4, Theorems 1 to 3, Table 2 (Sec. 2 and 3, App. D.1 and D.4).

    python deq_synthetic.py                            # all tables, under a minute on two CPU cores
    python deq_synthetic.py --plot assets              # and fig1.png, fig4.png (needs matplotlib)
    python deq_synthetic.py --only fig1 --activation tanh --pairs 256

Measured: assets/results.md has the figures, and each table's result in words with its commit.

Setting (App. D.1): h* = F(h* + u), F(x) = act(x W), W symmetric with spectral norm L_h.  u and y are standard
normal matrices of N x D = 32 x 128.  The loss is the mean squared error between h* and y.  The gradient is
dL/du.  h* comes from 100 fixed-point iterations.  All data are generated.

Names: J = dF/dh at h*, rho(J) is its spectral radius, g = dL/dh at h*.  The exact gradient needs g_hat, the
solution of (I - J^T) g_hat = g, Eq. (4).  A phantom gradient approximates g_hat: UPG by k unrolled steps with
damping lam, Eq. (16), and NPG by k terms of the Neumann series, Eq. (17).

Differences from the paper: 64 pairs (u, y) instead of 50,000 (the standard errors are printed).  The paper
does not name the activation.  The default is the identity, because it fits what the paper reports: 100
iterations just reach a relative error of 1e-5 at L_h = 0.9, and the backward system is ill-conditioned as L_h
approaches 1.  (It makes UPG and NPG equal, as J is the same everywhere.)  With tanh or relu, rho(J) stays
near 0.7 for every L_h, and Fig. 4 shows nothing.
"""
import json
import os
import statistics
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch

from common import (Process, broyden, clock, describe_run, die, equilibrium, finite, fixed_point, gmres,
                    implicit, lock, make_parser, npg, seed_everything, spectral_radius, upg, within)

N, D = 32, 128                              # samples of a pair (u, y) and their dimension
LIPS = (0.9, 0.99, 0.999, 0.9999)           # the Lipschitz constants L_h of Fig. 4
ACTIVATIONS = {"identity": lambda x: x, "tanh": torch.tanh, "relu": torch.relu}
PARTS = ("fig1", "fig4", "theorem1", "theorem2", "theorem3", "table2")


def parse_args(argv=None):
    p = make_parser("Figs. 1 and 4, Theorems 1 to 3 and Table 2 on a one-layer implicit model.")
    add = p.add_argument_group("problem").add_argument
    add("--only", action="append", choices=PARTS, help="compute only this part; repeatable (default: all)")
    add("--pairs", type=within(int, "[2, inf)"), default=64, help="pairs (u, y) in Fig. 1 (paper: 50,000)")
    add("--activation", choices=list(ACTIVATIONS), default="identity",
        help="activation of F in Figs. 1 and 4 and Table 2 (the theorems use tanh)")
    add("--lip", type=within(float, "(0, 1)"), default=0.9, help="Lipschitz constant L_h in Fig. 1")
    add("--seed", type=within(int, "[0, 4294967296)"), default=0, help="seed of weights and data")

    add = p.add_argument_group("run").add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu",
        help="device for Figs. 1 and 4 and Table 2 (the theorems run on the CPU)")
    add("--plot", metavar="DIR", type=os.path.expanduser,
        help="draw fig1.png and fig4.png into this folder (needs matplotlib)")
    add("--out", metavar="DIR", type=os.path.expanduser,
        help="write every row of every table to DIR/metrics.jsonl")
    args = p.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: there is no GPU here")
    args.only = args.only or list(PARTS)
    if args.plot and not {"fig1", "fig4"} <= set(args.only):
        p.error("--plot draws fig1 and fig4: leave --only out, or name both")
    return args


# --- setting ------------------------------------------------------------------------------------------------

def symmetric_weight(size, lip, **kwargs):
    """A symmetric Gaussian matrix with spectral norm lip, so that F has the Lipschitz constant L_h = lip."""
    w = torch.randn(size, size, **kwargs)
    w = w + w.T                                     # symmetric: singular values are |eigenvalues|
    eigenvalues = torch.linalg.eigvalsh(w)          # ascending
    # The eigenvalue of largest size must be positive: then I - W becomes singular as lip approaches 1.
    if -eigenvalues[0] > eigenvalues[-1]:
        w = -w
    return lip * w / eigenvalues.abs().max()


def layer(h, u, w, act):
    """F(h + u) for h and u (rows, D): each row is a sample of its own."""
    return act((h + u) @ w)


def solved(w, u, act, **limits):
    """The function f(h) = F(h + u) and its fixed point h*, found by plain iteration from zero."""
    f = partial(layer, u=u, w=w, act=act)
    return f, fixed_point(f, torch.zeros_like(u), **limits).h


def pair_cosines(a, b, pairs):
    """Cosine (pairs,) between a and b (pairs * N, D).  The N x D numbers of a pair (u, y) are one vector."""
    return torch.cosine_similarity(a.reshape(pairs, -1).double(), b.reshape(pairs, -1).double(), dim=1)


def dense_jacobian(f, h):
    """[row, i, j] = dF_i/dh_j: (rows, D, D), for a layer whose rows do not depend on each other."""
    # Row n of F depends on row n of h alone, so the sum over the rows has the Jacobians of all: (D, rows, D).
    return torch.autograd.functional.jacobian(lambda v: f(v).sum(0), h).permute(1, 0, 2)


# --- Fig. 1: the precision of the phantom gradient ----------------------------------------------------------

def fig1(args):
    """Cosine of UPG and NPG to the exact gradient.  Rows have grad, lam, k, mean and std over the pairs.

    The exact gradient is back-propagation through all iterations of the solve ("bptt").
    """
    pairs, grads = args.pairs, {"upg": upg, "npg": npg}
    w = symmetric_weight(D, args.lip, device=args.device)
    u, y = (torch.randn(pairs * N, D, device=args.device) for _ in range(2))
    u.requires_grad_()
    f = partial(layer, u=u, w=w, act=ACTIVATIONS[args.activation])

    def gradient(h):                        # dL/du, with the backward pass that is attached to h
        return torch.autograd.grad((h - y).square().mean(), u)[0]

    h, result = equilibrium(f, torch.zeros_like(y), grad="bptt", solver=fixed_point, max_iter=100)
    exact, h_star = gradient(h), h.detach()     # (pairs * N, D) both
    # Broyden instead of the default GMRES, since the paper's claim is about 20 Broyden iterations.
    by_implicit = gradient(implicit(f, h_star, solver=broyden, max_iter=20, tol=0))
    agreement = pair_cosines(exact, by_implicit, pairs).min().item()
    residual = result.residual.max().item()
    print(f"Fig. 1.  L_h = {args.lip}, {args.activation}, {pairs} pairs of {N} x {D}.  After 100 iterations "
          f"the relative error is at most {residual:.1e} (paper: 1e-5)\n"
          "Exact gradient, back-propagation through 100 iterations against implicit differentiation with 20 "
          f"Broyden iterations:\ncosine at least {agreement:.7f} (paper: above 0.9999)")

    lams, rows = [round(0.1 * i, 1) for i in range(1, 11)], []
    for grad, phantom in grads.items():
        for lam in lams:
            for k in range(1, 21):
                c = pair_cosines(gradient(phantom(f, h_star, k, lam)), exact, pairs)    # (pairs,)
                rows.append({"event": "fig1", "grad": grad, "lam": lam, "k": k, "mean": c.mean().item(),
                             "std": c.std().item()})
    mean, std = (torch.tensor([r[key] for r in rows], dtype=torch.float64).reshape(2, 10, 20)
                 for key in ("mean", "std"))            # (grad, lam, k)
    ks = (1, 2, 3, 5, 10, 20)
    print("cosine to the exact gradient, mean (standard deviation) over the pairs\n"
          "grad  lam  " + "".join(f"k = {k:<13d}" for k in ks))
    for i, grad in enumerate(grads):
        for lam in (0.1, 0.3, 0.5, 0.8, 1.0):
            m, s = mean[i, lams.index(lam)], std[i, lams.index(lam)]
            print(f"{grad}   {lam:.1f}  " + "".join(f"{m[k - 1]:.4f} ({s[k - 1]:.4f})  " for k in ks))
    growing = (mean.diff(dim=2) >= -1e-6).all()         # along k.  -1e-6: rounding, once the cosine is 1
    slower = (mean[:, :, 5 - 1].diff(dim=1) >= 0).all()     # along lam, at k = 5
    apart, error = (mean[0] - mean[1]).abs().max(), std.max() / pairs ** 0.5
    print(f"The cosine {'grows' if growing else 'does not always grow'} with k.  At k = 5 a smaller lam is "
          f"{'always' if slower else 'not always'} further from the exact gradient.\n"
          f"UPG and NPG differ by at most {apart:.1e}.  Largest standard error of a mean: {error:.1e}.")
    return [{"event": "exact", "cosine_min": agreement, "residual_max": residual}, *rows]


# --- Fig. 4: the stability of the backward solver -----------------------------------------------------------

def fig4(args, iterations=30):
    """Backward iterates of Broyden and GMRES, and the phantom gradient (lam = 1), as L_h approaches 1.

    Rows have lip, grad, iteration, and four means over the N samples: `objective` ||(I - J^T) g_hat - g||,
    `relative_error` objective / ||g_hat||, `cosine` to the exact gradient, and `l1`, the L1 norm of g_hat
    divided by that of the exact gradient.

    The oscillation in the paper's Fig. 4 comes from Broyden's method, not from the exact gradient.  Broyden's
    objective, the true residual, may rise while its relative error falls, since the relative error is divided
    by the norm of an exploding iterate.  GMRES minimises the objective, so on the same systems its objective
    never rises.  The large norm does come from the exact gradient: it grows like 1 / (1 - L_h).  The
    objective says little about the cosine to the exact gradient.
    """
    rows, unit = [], symmetric_weight(D, 1.0, device=args.device)   # unit: one W, scaled to each L_h
    u, y = (torch.randn(N, D, device=args.device) for _ in range(2))
    for lip in LIPS:
        w = lip * unit
        f, h = solved(w, u, ACTIVATIONS[args.activation], max_iter=100, tol=0)
        g = 2 * (h - y) / h.numel()         # dL/dh
        # The exact gradient: one dense system (I - J^T) g_hat = g per sample, in float64.  .mT transposes.
        h64 = h.double()
        jacobian = dense_jacobian(partial(f, u=u.double(), w=w.double()), h64)      # (N, D, D)
        matrix = torch.eye(D).to(h64) - jacobian.mT                                 # (N, D, D)
        exact = torch.linalg.solve(matrix, g.double()[:, :, None])[:, :, 0]         # (N, D)
        exact_l1 = exact.abs().sum(1).mean()
        h_in = h.clone().requires_grad_()
        f_h, iterates = f(h_in), []         # one graph of f, at h*, for all products with J^T

        def adjoint(v):                     # J^T v + g: its fixed point is g_hat
            return torch.autograd.grad(f_h, h_in, v, retain_graph=True)[0] + g

        def recorded(v):                    # broyden returns the best iterate, but the figure shows all
            iterates.append(v.clone())
            return adjoint(v)

        # Iteration t is the state after t - 1 products with J^T, so all start at g.  Residuals: over ||g||.
        best = broyden(recorded, g, max_iter=iterations - 1, tol=0, stop_mode=g).h
        # GMRES forms its state only at the end, so every number of products needs its own solve.
        minimal = [g] + [gmres(adjoint, g, max_iter=t, tol=0, stop_mode=g).h for t in range(1, iterations)]
        phantom = [g]                       # NPG with lam = 1: the first k terms of the series, k = 1, 2, ...
        for _ in range(1, iterations):
            phantom.append(adjoint(phantom[-1]))
        sequences = {"broyden": iterates, "gmres": minimal, "phantom": phantom, "best": [best]}
        for grad, sequence in sequences.items():
            for t, v in enumerate(sequence, start=iterations if grad == "best" else 1):
                v = v.double()                                                              # (N, D)
                objective = torch.linalg.vector_norm((matrix @ v[:, :, None])[:, :, 0] - g, dim=1)
                rows.append({"event": "fig4", "lip": lip, "grad": grad, "iteration": t,
                             "objective": objective.mean().item(),
                             "relative_error": (objective / torch.linalg.vector_norm(v, dim=1)).mean().item(),
                             "cosine": torch.cosine_similarity(v, exact, dim=1).mean().item(),
                             "l1": (v.abs().sum(1).mean() / exact_l1).item(), "exact_l1": exact_l1.item()})
    print_fig4(rows, args.activation)
    return rows


def print_fig4(rows, activation):
    print(f"""Fig. 4.  {activation}, h by 100 fixed-point iterations.  Broyden and GMRES on g_hat = J^T g_hat
+ g against the phantom gradient (Neumann, lam = 1, k = iteration).  Means over {N} samples, after
iteration - 1 products with J^T.  objective: ||g_hat - J^T g_hat - g||, the true residual, which GMRES
minimises.  relative error: objective / ||g_hat||, also small if g_hat explodes.  cosine: to the exact
gradient.  l1: L1 norm over the exact one's.  worst: the largest rise in one iteration (cosine: largest
fall, l1: largest value)""")
    columns, names = (1, 2, 3, 5, 10, 15, 20, 30), ("broyden", "gmres", "phantom")
    print("L_h     iteration            " + "".join(f"{t:>8d}" for t in columns) + "   worst")
    limits, wild = {"cosine": 0.01, "l1": 1.5}, defaultdict(list)       # wild: the L_h that pass a limit
    forms = {"objective": "8.1e", "relative_error": "8.1e", "cosine": "8.3f", "l1": "8.2f"}
    line = defaultdict(list)                            # (lip, name) -> its rows, one per iteration
    for row in rows:
        line[row["lip"], row["grad"]].append(row)
    for lip in LIPS:
        for key, form in forms.items():
            for name in names:
                series = [row[key] for row in line[lip, name]]      # over the iterations
                rises = [a - b if key == "cosine" else b - a for a, b in zip(series, series[1:])]
                worst = max(series) if key == "l1" else max(0, *rises)
                if key in limits and worst > limits[key]:
                    wild[name, key].append(f"{lip:g}")
                values = [format(v, form) for v in [*(series[t - 1] for t in columns), worst]]
                print(f"{lip:<8g}{name:8s}{key.replace('_', ' '):14s}{''.join(values)}")
        best = line[lip, "best"][0]
        print(f"        exact L1 norm {best['exact_l1']:.2e}; cosine of Broyden's iterate of the lowest "
              f"objective, which `implicit` takes: {best['cosine']:.4f}")
    print("\"Broyden's gradient oscillates or explodes\": L_h at which the cosine falls by more than "
          f"{limits['cosine']} in one iteration, and\nL_h at which the L1 norm exceeds {limits['l1']} x the "
          "exact one's")
    for name in names:
        falls, exceeds = (", ".join(wild[name, key]) or "(none)" for key in limits)
        print(f"{name:8s}{falls:20s} {exceeds}")


# --- Theorems 1 and 2: dense, in float64 --------------------------------------------------------------------

def small_problem(size=8, lip=0.9, scale=0.3):
    """f, W (size, size) and h* (1, size) of a tanh layer with one sample, solved up to rounding errors."""
    w = symmetric_weight(size, lip, dtype=torch.float64).requires_grad_()
    u = scale * torch.randn(1, size, dtype=torch.float64)       # small, so that tanh does not saturate
    f, h = solved(w, u, torch.tanh, max_iter=2000, tol=1e-15)
    return f, w, h


def gradient_matrix(h, w):
    """A (d_theta, d_h) of Eq. (5): column j is the gradient that the graph of h gives for dL/dh = e_j."""
    columns = [torch.autograd.grad(h_j, w, retain_graph=True)[0].flatten() for h_j in h[0]]
    return torch.stack(columns, dim=1)


def exact_matrices(f, w, h):
    """(dF/dtheta, J, A_exact = dF/dtheta (I - J)^-1) in the paper's layout: J[i, j] = dF_j / dh_i."""
    df = gradient_matrix(f(h), w)                   # (d_theta, d_h)
    j = dense_jacobian(f, h)[0].T.detach()          # (d_h, d_h)
    return df, j, df @ torch.linalg.inv(torch.eye(len(j), dtype=j.dtype) - j)


def theorem1(args):
    """Does Eq. (6), ||A (I - J) - dF/dtheta|| <= sigma_min^2 / sigma_max, imply the ascent of Eq. (7)?

    sigma: singular values of dF/dtheta.  Ascent: A g has no negative inner product with the exact gradient.
    """
    f, w, h = small_problem()
    df, j, exact = exact_matrices(f, w, h)
    sigma = torch.linalg.svdvals(df)                # descending
    right = (sigma[-1] ** 2 / sigma[0]).item()
    directions = torch.randn(h.shape[1], 2000, dtype=h.dtype)       # each column is a random g = dL/dh
    print(f"""Theorem 1.  tanh, D = {len(j)}, theta = W, kappa(dF/dtheta) = {sigma[0] / sigma[-1]:.3f}.
ascent: the smallest cosine of phantom and exact gradient over 2000 random dL/dh is not negative
k    lam   ||A (I - J) - dF/dtheta||   sigma_min^2 / sigma_max   condition   ascent   smallest cosine""")
    # wrong: how many rows contradict the theorem.  beyond: how many ascend without its condition.
    eye, rows, wrong, beyond = torch.eye(len(j), dtype=j.dtype), [], 0, 0
    for k, lam in ((1, 0.1), (1, 0.5), (1, 1.0), (2, 0.5), (5, 0.5), (5, 1.0), (10, 0.5), (20, 0.5),
                   (50, 0.5)):
        a = gradient_matrix(npg(f, h, k, lam), w)   # (d_theta, d_h)
        left = torch.linalg.matrix_norm(a @ (eye - j) - df, 2).item()       # 2: spectral norm
        cosine = torch.cosine_similarity(a @ directions, exact @ directions, dim=0).min().item()
        holds, ascends = left <= right, cosine >= 0
        wrong, beyond = wrong + (holds and not ascends), beyond + (ascends and not holds)
        rows.append(dict(event="theorem1", k=k, lam=lam, left=left, right=right, cosine_min=cosine))
        print(f"{k:<4d} {lam:.1f} {left:20.4f} {right:27.4f}   {'holds' if holds else 'fails':>12s} "
              f"{'yes' if ascends else 'no':>9s} {cosine:13.4f}")
    print(f"If the condition holds, the gradient ascends, with {wrong} exceptions.  It is sufficient, not "
          f"necessary: {beyond} of the rows that fail it ascend too.")
    return rows


def theorem2(args):
    """As k grows, the matrices A of NPG and UPG tend to the exact one.

    NPG's error falls like B^k, B = lam J + (1 - lam) I, so in the long run a step multiplies it by rho(B).
    """
    f, w, h = small_problem()
    df, j, exact = exact_matrices(f, w, h)
    start = h + 0.5 * torch.randn_like(h)           # UPG from here: Theorem 2 (ii) does not need h*
    ks, rows = (1, 5, 10, 20, 40, 80), []

    def error(phantom, state, k, lam):
        a = gradient_matrix(phantom(f, state, k, lam), w)
        return (torch.linalg.matrix_norm(a - exact, 2) / torch.linalg.matrix_norm(exact, 2)).item()

    print("Theorem 2.  Relative error ||A - A_exact|| / ||A_exact||.  NPG at h*, UPG from h* plus noise of "
          "size 0.5.\nrate: the error's factor per step, k = 30 to 40\n"
          "lam  grad " + "".join(f"k = {k:<7d}" for k in ks) + "   rate   rho(B)   rho(B), power method")
    for lam in (0.3, 0.5, 0.8, 1.0):
        b = lam * j + (1 - lam) * torch.eye(len(j), dtype=j.dtype)      # Eq. (17)
        rho = torch.linalg.eigvals(b).abs().max().item()            # exact.  power: by spectral_radius
        power = spectral_radius(f, h, lam=lam, n_iter=400).item()
        for grad, phantom, state in (("npg", npg, h), ("upg", upg, start)):
            errors = [error(phantom, state, k, lam) for k in ks]
            rate = (error(phantom, state, 40, lam) / error(phantom, state, 30, lam)) ** 0.1
            rows.append({"event": "theorem2", "lam": lam, "grad": grad, "rate": rate, "rho": rho,
                         "rho_power": power, **{f"error_{k}": e for k, e in zip(ks, errors)}})
            print(f"{lam:.1f}  {grad}  " + "".join(f"{e:<11.1e}" for e in errors)
                  + f"  {rate:.4f}  {rho:.4f}   {power:.4f}")
    off = max(abs(r["rate"] / r["rho"] - 1) for r in rows if r["grad"] == "npg")
    print(f"Error at k = 80: at most {max(r['error_80'] for r in rows):.1e} of the exact Jacobian.  "
          f"NPG's rate is rho(B) to {100 * off:.1f} %.")
    return rows


# --- Theorem 3: SGD with an inexact oracle ------------------------------------------------------------------

def theorem3(args, steps=100, size=8, samples=64, batch=16):
    """SGD with eta_n ~ 1 / sqrt(n): the weighted mean of ||grad R||^2, Eq. (20), for oracles of any error.

    R is half the mean squared distance to the equilibria y of a teacher, the same layer with another W.

    An oracle is what SGD takes for the gradient.  Its error epsilon is the largest distance to the exact
    gradient of the same batch, Eq. (19).  The oracles are NPG with more and more terms, and the exact
    gradient shortened by a vector of length up to epsilon, which is the worst that Eq. (19) allows.  By Eq.
    (57), epsilon adds at most G epsilon to the mean, with G = max ||grad R||.

    The mean is over the second half of the steps.  The theorem holds from any step on, and by then the
    transient, which does not depend on epsilon, is over.
    """
    teacher, start = (symmetric_weight(size, lip, dtype=torch.float64) for lip in (0.8, 0.5))
    u = torch.randn(samples, size, dtype=torch.float64)
    _, y = solved(teacher, u, torch.tanh, max_iter=200, tol=1e-12)          # (samples, size)

    def gradient(w, index, attach):         # for the batch u[index], by attach: npg or implicit
        w = w.detach().requires_grad_()
        f, h = solved(w, u[index], torch.tanh, max_iter=60, tol=1e-7)
        return torch.autograd.grad((attach(f, h) - y[index]).square().sum(1).mean() / 2, w)[0]

    exact = partial(implicit, solver=gmres, max_iter=2 * size, tol=1e-10)   # `size` in exact arithmetic
    oracles = [(f"NPG k = {k}, lam = 0.5", partial(npg, k=k, lam=0.5), 0.0) for k in (1, 2, 4, 8)]
    oracles += [(f"exact, pulled by {e}", exact, e) for e in (0.2, 0.1, 0.05)] + [("exact", exact, 0.0)]
    rows = []
    for name, attach, pull in oracles:          # pull: by how much the exact gradient is shortened
        w, order = start.clone(), torch.Generator().manual_seed(args.seed)      # all see the same batches
        epsilon = largest = weighted = total = 0.0
        for n in range(1, steps + 1):
            index = torch.randint(samples, (batch,), generator=order)
            g, eta = gradient(w, index, attach), 0.5 / n ** 0.5
            step = g * (1 - min(1.0, pull / g.norm().item()))       # at most to zero, never reversed
            if n > steps // 2:              # only here the costly exact gradients are needed
                true = g if attach is exact else gradient(w, index, exact)
                full = gradient(w, torch.arange(samples), exact)    # grad R
                weighted, total = weighted + eta * full.square().sum().item(), total + eta
                epsilon, largest = max(epsilon, (step - true).norm().item()), max(largest, full.norm().item())
            w = w - eta * step
        rows.append({"event": "theorem3", "oracle": name, "epsilon": epsilon, "mean": weighted / total,
                     "bound": largest * epsilon, "last": full.square().sum().item()})
    print(f"""Theorem 3.  {steps} SGD steps, eta_n = 0.5 / sqrt(n), a tanh layer fitted to another one's
equilibria.  Means of the second half
oracle                  epsilon   weighted mean ||grad R||^2   last step   added by it   bound G epsilon""")
    for r in rows:
        r["added"] = r["mean"] - rows[-1]["mean"]           # the last row is the exact oracle's
        print(f"{r['oracle']:22s} {r['epsilon']:8.4f} {r['mean']:20.5f} {r['last']:18.1e} {r['added']:13.5f} "
              f"{r['bound']:17.5f}")
    kept = all(r["added"] <= r["bound"] + 1e-12 for r in rows)      # Eq. (57)
    # In both families of oracles, NPG and exact, epsilon falls from row to row.
    falls = all(a["mean"] >= b["mean"] for own in (rows[:4], rows[4:]) for a, b in zip(own, own[1:]))
    print(f"The mean {'falls' if falls else 'does not always fall'} with epsilon, and what epsilon adds is "
          f"{'always' if kept else 'NOT always'} below G epsilon.")
    return rows


# --- Table 2: time and memory -------------------------------------------------------------------------------

def table2(args, rows_n=64, size=1024, repeats=3):
    """Time and memory of the gradient alone, with h* given, over k (phantom) and K (solver iterations).

    Memory is the size of the distinct tensors that autograd keeps for the backward pass, without W.  So it is
    the same on any device.
    """
    device = torch.device(args.device)
    w = symmetric_weight(size, 0.9, device=device).requires_grad_()
    u, y = (torch.randn(rows_n, size, device=device) for _ in range(2))
    f, h = solved(w, u, ACTIVATIONS[args.activation], max_iter=100, tol=0)
    bptt = partial(equilibrium, f, torch.zeros_like(u), grad="bptt", solver=fixed_point)
    # {gradient: (numbers of steps, function of n)}.  Broyden, as in the paper.  GMRES keeps the same memory.
    attach = {"implicit": ((10, 20, 40), lambda n: implicit(f, h, solver=broyden, max_iter=n, tol=0)),
              "upg": ((1, 5, 10, 20), lambda n: upg(f, h, n, 0.5)),
              "npg": ((1, 5, 10, 20), lambda n: npg(f, h, n, 0.5)),
              "bptt": ((10, 20, 40), lambda n: bptt(max_iter=n)[0])}

    def measure(name, n):                   # (milliseconds, megabytes)
        kept = {}                           # {address: bytes}: a tensor kept twice counts once

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() != w.untyped_storage().data_ptr():
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()          # an output that kept itself would never be freed

        began = clock(device)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            state = attach[name][1](n)      # autograd keeps tensors here, not in the backward pass
        torch.autograd.grad((state - y).square().mean(), w)
        return 1e3 * (clock(device) - began), sum(kept.values()) / 1e6

    print(f"""Table 2.  N x D = {rows_n} x {size}.  K or k: solver iterations or phantom steps.  implicit: by
Broyden.  Time to attach the gradient, and of the backward pass (bptt: and of the solve).  Memory of autograd
gradient   K or k       ms      MB       per step: ms       MB      (least squares)""")
    state, rows, words = rows_n * size * 4 / 1e6, [], []
    for name, (steps, _) in attach.items():
        measure(name, steps[0])                                     # warm-up
        repeated = [[measure(name, n) for _ in range(repeats)] for n in steps]
        ms = [statistics.median(time for time, _ in runs) for runs in repeated]
        mb = [runs[0][1] for runs in repeated]
        # The slope of least squares leaves out the constant part.  It is the cost of one more step.
        ms_per_step, mb_per_step = (statistics.linear_regression(steps, values).slope for values in (ms, mb))
        tail = f"{ms_per_step:19.2f} {mb_per_step:10.3f}"
        for i, n in enumerate(steps):
            rows.append({"event": "table2", "grad": name, "steps": n, "ms": ms[i], "mb": mb[i],
                         "ms_per_step": ms_per_step, "mb_per_step": mb_per_step})
            print(f"{'' if i else name:9s} {n:7d} {ms[i]:8.1f} {mb[i]:7.2f} {'' if i else tail}")
        flat = abs(mb_per_step) < 0.05 * state          # state: MB of one tensor of h's size
        words.append(f"{name} {'flat' if flat else f'linear, {mb_per_step / state:.1f} states'}")
    print(f"One state is {state:.2f} MB.  Memory per step: {', '.join(words)}.\n"
          "Broyden's own history, K states during the backward solve, is not autograd's.  It is not counted.")
    return rows


# --- main ---------------------------------------------------------------------------------------------------

def main(args):
    if args.plot:
        from assets import figures
        figures.prepare(Path(args.plot, "fig1.png"))        # ends the run here if it cannot draw
    if args.out:
        if Path(args.out, "metrics.jsonl").exists():
            die(f"--out {args.out} already holds a run: choose another folder")
        lock(Path(args.out))
    began, rows = time.perf_counter(), []
    for part in (fig1, fig4, theorem1, theorem2, theorem3, table2):
        if part.__name__ in args.only:
            print(flush=True)
            seed_everything(args.seed)      # a part gives the same numbers with or without the others
            rows += part(args)
    if args.out:
        rows.insert(0, {"event": "start", "step": 0, "args": vars(args),
                        **describe_run(Process(0, 1, torch.device(args.device)))})
        Path(args.out, "metrics.jsonl").write_text("".join(json.dumps(finite(row)) + "\n" for row in rows))
    if args.plot:
        print()
        figures.fig1(rows, Path(args.plot, "fig1.png"))
        figures.fig4(rows, Path(args.plot, "fig4.png"))
    print(f"\ndone in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(parse_args())
