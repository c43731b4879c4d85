"""Phantom gradients of a one-layer implicit model against theory: "On Training Implicit Models" (NeurIPS 2021,
arXiv:2111.05177), Figs. 1 and 4, Theorems 1 to 3, Table 2 (Sec. 2 and 3, App. D.1 and D.4).  Generated data only.

    python deq_synthetic.py                            # all tables, under a minute on two CPU cores
    python deq_synthetic.py --plot assets              # and fig1.png, fig4.png (needs matplotlib)
    python deq_synthetic.py --only fig1 --activation tanh --pairs 256

Measured: what each table says in words, and the figures, stand in README.md with the commit that made them.

Setting (App. D.1): h* = F(h* + u), F(x) = act(x W), W symmetric with spectral norm L_h, u and y standard normal
matrices of N x D = 32 x 128, loss the mean squared error between h* and y, gradient dL/du, h* by 100 fixed-point
iterations.

Differs from the paper: 64 pairs (u, y) instead of 50,000 (the standard errors are printed).  The paper does not name
the activation.  The default here is the identity, because it fits what the paper reports: 100 iterations just reach a
relative error of 1e-5 at L_h = 0.9, and the solver is ill-conditioned as L_h nears 1.  With tanh or relu the units
saturate, rho(J) stays near 0.7 whatever L_h is, and Fig. 4 shows nothing.  A linear F makes UPG and NPG equal.
"""
import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

from common import (MetricsLog, broyden, describe_run, die, equilibrium, fixed_point, gmres, implicit, npg, open_run,
                    seed_everything, spectral_radius, upg)

N, D = 32, 128
ACTIVATIONS = {"identity": lambda x: x, "tanh": torch.tanh, "relu": torch.relu}
METHODS = {"broyden": "Broyden", "gmres": "GMRES", "phantom": "phantom (NPG, $\\lambda = 1$)"}      # in Fig. 4
PARTS = ("fig1", "fig4", "theorem1", "theorem2", "theorem3", "table2")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Figs. 1 and 4, Theorems 1 to 3 and Table 2 on a one-layer implicit model.")
    p.add_argument("--only", action="append", choices=PARTS, help="compute this part only; repeatable (default all)")
    p.add_argument("--pairs", type=int, default=64, help="pairs (u, y) of 32 x 128 in Fig. 1 (default 64; paper 50000)")
    p.add_argument("--activation", choices=list(ACTIVATIONS), default="identity",
                   help="of Figs. 1 and 4 and Table 2; the theorems use tanh (default identity)")
    p.add_argument("--lip", type=float, default=0.9, help="Lipschitz constant L_h in Fig. 1, in (0, 1) (default 0.9)")
    p.add_argument("--seed", type=int, default=0, help="of weights and data (default 0)")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu",
                   help="of Figs. 1 and 4 and Table 2; the theorems run on the CPU (default cpu)")
    p.add_argument("--plot", metavar="DIR", help="draw fig1.png and fig4.png into this folder (needs matplotlib)")
    p.add_argument("--out", metavar="DIR", help="write every row of every table to DIR/metrics.jsonl")
    args = p.parse_args(argv)
    if args.pairs < 2:
        p.error(f"--pairs must be at least 2, for a standard deviation, got {args.pairs}")
    if not 0 < args.lip < 1:
        p.error(f"--lip must be in (0, 1), got {args.lip}")
    if not 0 <= args.seed < 2 ** 32:
        p.error(f"--seed must be in [0, 2^32), got {args.seed}")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error(f"--device {args.device}: there is no GPU here")
    args.only = args.only or list(PARTS)
    if args.plot and not {"fig1", "fig4"} <= set(args.only):
        p.error("--plot draws fig1 and fig4: leave --only out, or name both")
    return args


# --- setting ---------------------------------------------------------------------------------------------------------

def symmetric_weight(size, lip, **kwargs):
    """A symmetric Gaussian matrix scaled to spectral norm lip, which is then the Lipschitz constant L_h of F.

    Its sign makes the largest eigenvalue the positive one: I - W is to become singular as lip goes to 1.
    """
    w = torch.randn(size, size, **kwargs)
    w = w + w.T
    eigenvalues = torch.linalg.eigvalsh(w)          # ascending
    if -eigenvalues[0] > eigenvalues[-1]:
        w = -w
    return lip * w / eigenvalues.abs().max()


def layer(h, u, w, act):
    """F(h + u): every row is a sample of its own, h, u (rows, D)."""
    return act((h + u) @ w)


def pair_cosines(a, b, pairs):
    """Cosine of each pair's N x D gradients: (pairs,)."""
    return torch.cosine_similarity(a.reshape(pairs, -1).double(), b.reshape(pairs, -1).double(), dim=1)


def dense_jacobian(f, h):
    """dF_i/dh_j per row: (rows, D, D), for a layer whose rows do not touch each other."""
    return torch.autograd.functional.jacobian(lambda v: f(v).sum(0), h).permute(1, 0, 2)


# --- Fig. 1: the precision of the phantom gradient -------------------------------------------------------------------

def fig1(args):
    """Cosine of UPG and NPG to the exact gradient over k and lam.  Rows: grad, lam, k, mean, std over the pairs."""
    act, device, pairs = ACTIVATIONS[args.activation], args.device, args.pairs
    w = symmetric_weight(D, args.lip, device=device)
    u, y = (torch.randn(pairs * N, D, device=device) for _ in range(2))
    u.requires_grad_()
    f = partial(layer, u=u, w=w, act=act)
    h0 = torch.zeros_like(y)

    def gradient(h):
        return torch.autograd.grad((h - y).square().mean(), u)[0]

    h, result = equilibrium(f, h0, grad="bptt", solver=fixed_point, max_iter=100)
    exact = gradient(h)
    h_star = h.detach()
    # Broyden and not the default GMRES: the paper's claim is about 20 Broyden iterations.
    by_implicit = gradient(implicit(f, h_star, solver=broyden, max_iter=20, tol=0))
    agreement = pair_cosines(exact, by_implicit, pairs)
    print(f"\nFig. 1.  L_h = {args.lip}, {args.activation}, {pairs} pairs of {N} x {D}; after 100 iterations the "
          f"relative error is at most {result.residual.max():.1e} (paper: 1e-5)")
    print("Exact gradient, back-propagation through 100 iterations against implicit differentiation with 20 Broyden "
          f"iterations:\ncosine at least {agreement.min():.7f} (paper: above 0.9999)")
    rows = [{"event": "exact", "cosine_min": agreement.min().item(), "residual_max": result.residual.max().item()}]
    lams = [round(0.1 * i, 1) for i in range(1, 11)]
    for name, phantom in (("upg", upg), ("npg", npg)):
        for lam in lams:
            for k in range(1, 21):
                c = pair_cosines(gradient(phantom(f, h_star, k, lam)), exact, pairs)
                rows.append({"event": "fig1", "grad": name, "lam": lam, "k": k, "mean": c.mean().item(),
                             "std": c.std().item()})
    cell = {(r["grad"], r["lam"], r["k"]): r for r in rows[1:]}
    ks = (1, 2, 3, 5, 10, 20)
    print("cosine to the exact gradient, mean (standard deviation) over the pairs")
    print("grad  lam  " + "".join(f"k = {k:<13d}" for k in ks))
    for name in ("upg", "npg"):
        for lam in (0.1, 0.3, 0.5, 0.8, 1.0):
            cells = [cell[name, lam, k] for k in ks]
            print(f"{name}   {lam:.1f}  " + "".join(f"{c['mean']:.4f} ({c['std']:.4f})  " for c in cells))
    growing = all(cell[g, lam, k + 1]["mean"] >= cell[g, lam, k]["mean"] - 1e-6
                  for g in ("upg", "npg") for lam in lams for k in range(1, 20))
    slower = all(cell[g, a, 5]["mean"] <= cell[g, b, 5]["mean"] for g in ("upg", "npg") for a, b in zip(lams, lams[1:]))
    apart = max(abs(cell["upg", lam, k]["mean"] - cell["npg", lam, k]["mean"]) for lam in lams for k in range(1, 21))
    error = max(r["std"] for r in rows[1:]) / pairs ** 0.5
    print(f"The cosine {'grows' if growing else 'does not always grow'} with k; at k = 5 a smaller lam is "
          f"{'always' if slower else 'not always'} further from the exact gradient.\nUPG and NPG differ by at most "
          f"{apart:.1e}.  Largest standard error of a mean: {error:.1e}.")
    return rows


# --- Fig. 4: the stability of the backward solver --------------------------------------------------------------------

def fig4(args, iterations=30):
    """Backward iterates of Broyden and GMRES, and the phantom gradient (lam = 1), for L_h nearer and nearer 1.

    Rows: lip, grad, iteration, objective ||(I - J^T) g_hat - g||, relative error objective / ||g_hat||, cosine to the
    exact gradient, L1 norm of g_hat over that of the exact gradient (`l1`): means over the N rows.

    The oscillation comes from Broyden's method, which the paper's Fig. 4 shows, not from the exact gradient.  Broyden's
    objective, the true residual, may climb while its relative error falls, since that is divided by the norm of an
    iterate that explodes.  GMRES minimises the objective, which never rises on the same systems.  The norm does come
    from the exact gradient: it grows like 1 / (1 - L_h).  And the objective says little of the cosine to it.

    Iteration t is the state after t - 1 products with J^T, which at t = 1 is g for all.
    """
    act, rows, limits = ACTIVATIONS[args.activation], [], {"cosine": 0.01, "l1": 1.5}
    columns, wild = (1, 2, 3, 5, 10, 15, 20, 30), {(name, key): [] for name in METHODS for key in limits}
    print(f"\nFig. 4.  {args.activation}; h after 100 fixed-point iterations; Broyden and GMRES on g_hat = J^T g_hat + "
          "g against the\nphantom gradient (Neumann, lam = 1, k = iteration); means over 32 samples, after iteration - "
          "1 products with J^T.\nobjective: ||g_hat - J^T g_hat - g||, the true residual, which GMRES minimises; "
          "relative error: that over\n||g_hat||, small also where g_hat explodes; cosine: to the exact gradient; l1: "
          "L1 norm over the exact one's;\nworst: the largest rise in one iteration, of the cosine the largest fall, of "
          "l1 the largest value")
    print("L_h     iteration            " + "".join(f"{t:>8d}" for t in columns) + "   worst   exact L1")
    unit = symmetric_weight(D, 1.0, device=args.device)
    u, y = (torch.randn(N, D, device=args.device) for _ in range(2))
    for lip in (0.9, 0.99, 0.999, 0.9999):
        w = lip * unit
        f = partial(layer, u=u, w=w, act=act)
        h = fixed_point(f, torch.zeros_like(y), max_iter=100, tol=0).h
        g = 2 * (h - y) / h.numel()
        f64 = partial(layer, u=u.double(), w=w.double(), act=act)
        matrix = torch.eye(D, dtype=torch.float64, device=args.device) - dense_jacobian(f64, h.double()).transpose(1, 2)
        exact = torch.linalg.solve(matrix, g.double()[:, :, None])[:, :, 0]
        exact_l1 = exact.abs().sum(1)
        h_in = h.clone().requires_grad_()
        f_h = f(h_in)

        def adjoint(v):
            return torch.autograd.grad(f_h, h_in, v, retain_graph=True)[0] + g

        iterates = []                       # broyden returns the best iterate per sample; the figure shows every one

        def recorded(v):
            iterates.append(v.clone())
            return adjoint(v)

        best = broyden(recorded, g, max_iter=iterations - 1, tol=0, stop_mode=g).h
        # GMRES evaluates directions and forms its state only at the end: a solve for every number of products.
        minimal = [g] + [gmres(adjoint, g, max_iter=t, tol=0, stop_mode=g).h for t in range(1, iterations)]
        phantom, v = [], g
        for _ in range(iterations):         # NPG with lam = 1 for k = 1, 2, ...: v holds its first k terms
            phantom.append(v)
            v = adjoint(v)
        stats = {}
        for name, sequence in (("broyden", iterates), ("gmres", minimal), ("phantom", phantom), ("best", [best])):
            stats[name] = []
            for t, v in enumerate(sequence, start=iterations if name == "best" else 1):
                v = v.double()
                objective = torch.linalg.vector_norm((matrix @ v[:, :, None])[:, :, 0] - g, dim=1)
                row = {"event": "fig4", "lip": lip, "grad": name, "iteration": t, "objective": objective.mean().item(),
                       "relative_error": (objective / torch.linalg.vector_norm(v, dim=1)).mean().item(),
                       "cosine": torch.cosine_similarity(v, exact, dim=1).mean().item(),
                       "l1": (v.abs().sum(1).mean() / exact_l1.mean()).item(), "exact_l1": exact_l1.mean().item()}
                stats[name].append(row)
                rows.append(row)
        for key, form in (("objective", "8.1e"), ("relative_error", "8.1e"), ("cosine", "8.3f"), ("l1", "8.2f")):
            for name in METHODS:
                series, sign = [r[key] for r in stats[name]], -1 if key == "cosine" else 1
                rises = [sign * (b - a) for a, b in zip(series, series[1:])]
                worst = max(series) if key == "l1" else max(0, *rises)
                if key in limits and worst > limits[key]:
                    wild[name, key].append(f"{lip:g}")
                label = f"{lip:<7g} " if key == "objective" and name == "broyden" else " " * 8
                values = "".join(format(v, form) for v in [*(series[t - 1] for t in columns), worst])
                tail = f"   {exact_l1.mean():.2e}" if label.strip() else ""
                print(f"{label}{name:8s}{key.replace('_', ' '):14s}{values}{tail}")
        print("        of Broyden's iterates the one of the lowest objective, which `implicit` takes: cosine "
              f"{stats['best'][0]['cosine']:.4f}")
    print("\"Broyden's gradient oscillates or explodes\": L_h where in an iteration the cosine falls by more than "
          f"{limits['cosine']}, and\nwhere the L1 norm exceeds {limits['l1']} x the exact one's")
    for name in METHODS:
        falls, exceeds = (", ".join(wild[name, key]) or "(none)" for key in limits)
        print(f"{name:8s}{falls:20s} {exceeds}")
    ends = {(name, key): "{:.1e} to {:.1e}".format(*(stats[name][t][key] for t in (0, -1)))
            for name in METHODS for key in ("objective", "relative_error")}
    print(f"From the method, at L_h = {lip:g}: Broyden's objective goes from {ends['broyden', 'objective']}, its "
          f"relative error, which is\ndivided by the norm of the iterate, from {ends['broyden', 'relative_error']}; "
          f"GMRES's objective from {ends['gmres', 'objective']}.\nFrom the exact gradient: its L1 norm, "
          f"{rows[0]['exact_l1']:.2g} at L_h = {rows[0]['lip']:g} and {rows[-1]['exact_l1']:.2g} at {lip:g}.")
    return rows


# --- Theorems 1 and 2: dense, in float64 -----------------------------------------------------------------------------

def small_problem(size=8, lip=0.9, scale=0.3):
    """f, W and the state of a tanh layer with one sample, solved to rounding; `scale` of u: how far tanh saturates."""
    w = symmetric_weight(size, lip, dtype=torch.float64).requires_grad_()
    u = scale * torch.randn(1, size, dtype=torch.float64)
    f = partial(layer, u=u, w=w, act=torch.tanh)
    return f, w, fixed_point(f, torch.zeros_like(u), max_iter=2000, tol=1e-15).h


def gradient_matrix(h, w):
    """The matrix A (d_theta, d_h) of Eq. (5): column j is the gradient that h's graph sends back for dL/dh = e_j."""
    columns = [torch.autograd.grad(h[0, j], w, retain_graph=True)[0].flatten() for j in range(h.shape[1])]
    return torch.stack(columns, dim=1)


def exact_matrices(f, w, h):
    """(dF/dtheta, J, A_exact = dF/dtheta (I - J)^-1) in the paper's layout: J[i, j] = dF_j / dh_i."""
    df = gradient_matrix(f(h), w)
    j = dense_jacobian(f, h)[0].T.detach()
    return df, j, df @ torch.linalg.inv(torch.eye(len(j), dtype=j.dtype) - j)


def theorem1(args):
    """Eq. (6), ||A (I - J) - dF/dtheta|| <= sigma_min^2 / sigma_max, against the measured ascent, Eq. (7)."""
    f, w, h = small_problem()
    df, j, exact = exact_matrices(f, w, h)
    sigma = torch.linalg.svdvals(df)
    right = (sigma[-1] ** 2 / sigma[0]).item()
    directions = torch.randn(h.shape[1], 2000, dtype=h.dtype)
    rows = []
    print(f"\nTheorem 1.  tanh, D = {h.shape[1]}, theta = W, kappa(dF/dtheta) = {sigma[0] / sigma[-1]:.3f}; ascent: "
          "the smallest cosine of\nphantom and exact gradient over 2000 random dL/dh is not negative")
    print("k    lam   ||A (I - J) - dF/dtheta||   sigma_min^2 / sigma_max   condition   ascent   smallest cosine")
    for k, lam in ((1, 0.1), (1, 0.5), (1, 1.0), (2, 0.5), (5, 0.5), (5, 1.0), (10, 0.5), (20, 0.5), (50, 0.5)):
        a = gradient_matrix(npg(f, h, k, lam), w)
        left = torch.linalg.matrix_norm(a @ (torch.eye(len(j), dtype=j.dtype) - j) - df, 2).item()
        cosine = torch.cosine_similarity(a @ directions, exact @ directions, dim=0).min().item()
        rows.append({"event": "theorem1", "k": k, "lam": lam, "left": left, "right": right, "cosine_min": cosine})
        print(f"{k:<4d} {lam:.1f} {left:20.4f} {right:27.4f}   {'holds' if left <= right else 'fails':>12s} "
              f"{'yes' if cosine >= 0 else 'no':>9s} {cosine:13.4f}")
    wrong = [r for r in rows if r["left"] <= r["right"] and r["cosine_min"] < 0]
    beyond = [r for r in rows if r["left"] > r["right"] and r["cosine_min"] >= 0]
    print(f"Where the condition holds the gradient ascends, {len(wrong)} exceptions.  It is sufficient, not necessary: "
          f"{len(beyond)} of the rows that fail it ascend too.")
    return rows


def theorem2(args):
    """NPG's and UPG's matrix tend to the exact one, NPG's error as B^k: rate rho(B), B = lam J + (1 - lam) I."""
    f, w, h = small_problem()
    df, j, exact = exact_matrices(f, w, h)
    start = h + 0.5 * torch.randn_like(h)           # UPG from here: limit (ii) does not need h*
    ks, rows = (1, 5, 10, 20, 40, 80), []
    print("\nTheorem 2.  Relative error ||A - A_exact|| / ||A_exact||; NPG at h*, UPG from h* plus noise of size 0.5; "
          "rate: the\nerror's factor per step, k = 30 to 40")
    print("lam  grad " + "".join(f"k = {k:<7d}" for k in ks) + "   rate   rho(B)   rho(B), power method")
    for lam in (0.3, 0.5, 0.8, 1.0):
        b = lam * j + (1 - lam) * torch.eye(len(j), dtype=j.dtype)
        rho = torch.linalg.eigvals(b).abs().max().item()
        power = spectral_radius(f, h, lam=lam, n_iter=400).item()
        for name, phantom, state in (("npg", npg, h), ("upg", upg, start)):
            def error(k):
                return (torch.linalg.matrix_norm(gradient_matrix(phantom(f, state, k, lam), w) - exact, 2)
                        / torch.linalg.matrix_norm(exact, 2)).item()
            errors = [error(k) for k in ks]
            rate = (error(40) / error(30)) ** 0.1
            rows.append({"event": "theorem2", "lam": lam, "grad": name, "rate": rate, "rho": rho, "rho_power": power,
                         **{f"error_{k}": e for k, e in zip(ks, errors)}})
            print(f"{lam:.1f}  {name}  " + "".join(f"{e:<11.1e}" for e in errors)
                  + f"  {rate:.4f}  {rho:.4f}   {power:.4f}")
    off = max(abs(r["rate"] / r["rho"] - 1) for r in rows if r["grad"] == "npg")
    last = max(r["error_80"] for r in rows)
    print(f"Error at k = 80: at most {last:.1e} of the exact Jacobian; NPG's rate is rho(B) to {100 * off:.1f} %.")
    return rows


# --- Theorem 3: SGD with an inexact oracle ---------------------------------------------------------------------------

def theorem3(args, steps=100, size=8, samples=64, batch=16):
    """SGD with eta_n ~ 1 / sqrt(n): the weighted mean of ||grad R||^2, Eq. (20), against the oracle's error epsilon.

    The mean is over the second half of the steps: the theorem holds from any step on, and by then the transient, which
    knows nothing of epsilon, is over.  Oracles: NPG with fewer and fewer terms, and the exact gradient pulled back by a
    vector of length up to epsilon, the worst that Eq. (19) allows.  Eq. (57): epsilon adds at most G epsilon to the
    mean, G = max ||grad R||.
    """
    teacher, start = symmetric_weight(size, 0.8, dtype=torch.float64), symmetric_weight(size, 0.5, dtype=torch.float64)
    u = torch.randn(samples, size, dtype=torch.float64)
    y = fixed_point(partial(layer, u=u, w=teacher, act=torch.tanh), torch.zeros_like(u), max_iter=200, tol=1e-12).h

    def gradient(w, index, attach):
        w = w.detach().requires_grad_()
        f = partial(layer, u=u[index], w=w, act=torch.tanh)
        h = fixed_point(f, torch.zeros_like(u[index]), max_iter=60, tol=1e-7).h
        return torch.autograd.grad((attach(f, h) - y[index]).square().sum(1).mean() / 2, w)[0]

    exact = partial(implicit, solver=gmres, max_iter=2 * size, tol=1e-10)      # `size` products, more against rounding
    everything = torch.arange(samples)

    def pulled(g, epsilon):                 # shortened by epsilon, at most to zero: the worst error of that length
        return g * (1 - min(1.0, epsilon / g.norm().item()))

    oracles = [(f"NPG k = {k}, lam = 0.5", partial(npg, k=k, lam=0.5), 0.0) for k in (1, 2, 4, 8)]
    oracles += [(f"exact, pulled by {e}", exact, e) for e in (0.2, 0.1, 0.05)] + [("exact", exact, 0.0)]
    rows = []
    for name, attach, pull in oracles:
        w, order = start.clone(), torch.Generator().manual_seed(args.seed)      # every oracle sees the same batches
        epsilon = largest = weighted = total = 0.0
        for n in range(1, steps + 1):
            index = torch.randint(samples, (batch,), generator=order)
            late = n > steps // 2
            true = gradient(w, index, exact) if late or attach is exact else None
            full = gradient(w, everything, exact) if late else None
            g = pulled(true, pull) if attach is exact else gradient(w, index, attach)
            eta = 0.5 / n ** 0.5
            w = w - eta * g
            if late:
                weighted, total = weighted + eta * full.square().sum().item(), total + eta
                epsilon, largest = max(epsilon, (g - true).norm().item()), max(largest, full.norm().item())
        rows.append({"event": "theorem3", "oracle": name, "epsilon": epsilon, "mean": weighted / total,
                     "bound": largest * epsilon, "last": full.square().sum().item()})
    base = rows[-1]["mean"]
    print(f"\nTheorem 3.  {steps} SGD steps, eta_n = 0.5 / sqrt(n), a tanh layer fitted to another one's equilibria; "
          "means of the second half")
    print("oracle                  epsilon   weighted mean ||grad R||^2   last step   added by it   bound G epsilon")
    for r in rows:
        r["added"] = r["mean"] - base
        print(f"{r['oracle']:22s} {r['epsilon']:8.4f} {r['mean']:20.5f} {r['last']:18.1e} {r['added']:13.5f} "
              f"{r['bound']:17.5f}")
    kept = all(r["added"] <= r["bound"] + 1e-12 for r in rows)
    falls = all(a["mean"] >= b["mean"] for family in (rows[:4], rows[4:]) for a, b in zip(family, family[1:]))
    print(f"The mean {'falls' if falls else 'does not always fall'} with epsilon, and what epsilon adds is "
          f"{'always' if kept else 'NOT always'} below G epsilon.")
    return rows


# --- Table 2: time and memory ----------------------------------------------------------------------------------------

def table2(args, rows_n=64, size=1024, repeats=3):
    """Time and memory of the gradient alone, h* given, against k (phantom) and K (solver iterations), with slopes.

    Memory: bytes of distinct tensors that autograd keeps for the backward pass, on any device, W itself left out.
    """
    act, device = ACTIVATIONS[args.activation], torch.device(args.device)
    w = symmetric_weight(size, 0.9, device=device).requires_grad_()
    u, y = torch.randn(rows_n, size, device=device), torch.randn(rows_n, size, device=device)
    f = partial(layer, u=u, w=w, act=act)
    h = fixed_point(f, torch.zeros_like(u), max_iter=100, tol=0).h
    # Broyden, as in the paper: GMRES keeps as little for autograd.
    attach = {"implicit": lambda n: implicit(f, h, solver=broyden, max_iter=n, tol=0),
              "upg": lambda n: upg(f, h, n, 0.5),
              "npg": lambda n: npg(f, h, n, 0.5),
              "bptt": lambda n: equilibrium(f, torch.zeros_like(u), grad="bptt", solver=fixed_point, max_iter=n)[0]}
    counts = {"implicit": (10, 20, 40), "upg": (1, 5, 10, 20), "npg": (1, 5, 10, 20), "bptt": (10, 20, 40)}

    def measure(name, n):
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() != w.untyped_storage().data_ptr():
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()          # an output that kept itself would never be freed

        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            state = attach[name](n)
        torch.autograd.grad((state - y).square().mean(), w)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start), sum(kept.values()) / 1e6

    print(f"\nTable 2.  N x D = {rows_n} x {size}; K or k: solver iterations or phantom steps; implicit: by Broyden; "
          "time of\nattaching the gradient and of the backward pass (bptt: and of the solve); memory that autograd "
          "keeps")
    print("gradient   K or k       ms      MB       per step: ms       MB      (least squares)")
    rows = []
    for name, steps in counts.items():
        measure(name, steps[0])                                     # warm-up
        points = []
        for n in steps:
            runs = [measure(name, n) for _ in range(repeats)]
            points.append((n, statistics.median(t for t, _ in runs), runs[0][1]))
        slopes = [statistics.linear_regression([p[0] for p in points], [p[i] for p in points]).slope for i in (1, 2)]
        for i, (n, ms, mb) in enumerate(points):
            rows.append({"event": "table2", "grad": name, "steps": n, "ms": ms, "mb": mb, "ms_per_step": slopes[0],
                         "mb_per_step": slopes[1]})
            tail = f"{slopes[0]:19.2f} {slopes[1]:10.3f}" if i == 0 else ""
            print(f"{name if i == 0 else '':9s} {n:7d} {ms:8.1f} {mb:7.2f} {tail}")
    slope = {r["grad"]: r["mb_per_step"] for r in rows}
    state = rows_n * size * 4 / 1e6
    words = [f"{name} {'flat' if abs(mb) < 0.05 * state else f'linear, {mb / state:.1f} states'}"
             for name, mb in slope.items()]
    print(f"One state is {state:.2f} MB.  Memory per step: {', '.join(words)}.\nBroyden's own history, K states during "
          "the backward solve, is not autograd's and not counted.")
    return rows


# --- figures ---------------------------------------------------------------------------------------------------------

def plot(rows, folder):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    folder.mkdir(parents=True, exist_ok=True)
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for ax, grad in zip(axes, ("upg", "npg")):
        for lam in (0.1, 0.2, 0.3, 0.5, 0.8, 1.0):
            line = [r for r in rows if r["event"] == "fig1" and r["grad"] == grad and r["lam"] == lam]
            k, mean, std = ([r[key] for r in line] for key in ("k", "mean", "std"))
            ax.plot(k, mean, label=f"$\\lambda$ = {lam}")
            ax.fill_between(k, [m - s for m, s in zip(mean, std)], [m + s for m, s in zip(mean, std)], alpha=0.2)
        ax.set(title=grad.upper(), xlabel="k", xticks=range(0, 21, 5))
    axes[0].set_ylabel("cosine to the exact gradient")
    axes[1].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(folder / "fig1.png", dpi=110)
    lips, keys = (0.9, 0.99, 0.999, 0.9999), ("objective", "relative_error", "cosine", "l1")
    fig, axes = plt.subplots(len(keys), len(lips), figsize=(11, 8), sharex=True)
    for i, key in enumerate(keys):
        for ax, lip in zip(axes[i], lips):
            for grad, label in METHODS.items():
                line = [r for r in rows if r["event"] == "fig4" and r["grad"] == grad and r["lip"] == lip]
                scale = line[0]["exact_l1"] if key == "l1" else 1.0
                ax.plot([r["iteration"] for r in line], [scale * r[key] for r in line], label=label)
            if key == "l1":
                ax.axhline(scale, color="gray", linestyle="--", label="exact")
                ax.set_xlabel("backward iterations")
            if key != "cosine":
                ax.set_yscale("log")
            if i == 0:
                ax.set_title(f"$L_h$ = {lip}")
        axes[i][0].set_ylabel({"objective": "objective", "relative_error": "relative error", "cosine": "cosine",
                               "l1": "L1 norm"}[key])
    axes[-1][0].legend(fontsize=8)
    fig.suptitle("Objective: the true residual, which GMRES minimises.  Relative error: that over the norm of the "
                 "iterate, so it is small also where this explodes.", fontsize=9)
    fig.tight_layout()
    fig.savefig(folder / "fig4.png", dpi=110)
    print(f"\nwrote {folder / 'fig1.png'} and {folder / 'fig4.png'}")


def main(args):
    if args.plot:
        try:
            import matplotlib  # noqa: F401, here and not after a minute of work
        except ImportError:
            die("--plot needs matplotlib: pip install matplotlib")
        try:
            Path(args.plot).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            die(f"--plot {args.plot}: cannot make this folder ({error.strerror})")
    if args.out:
        open_run(args.out, None)                            # the folder of a training run is none for this
        log = MetricsLog(Path(args.out) / "metrics.jsonl", last_step=-1)
    started, rows = time.perf_counter(), []
    for part in PARTS:
        if part in args.only:
            seed_everything(args.seed)                      # a part gives the same numbers alone as with the others
            rows += globals()[part](args)
            sys.stdout.flush()
    if args.out:
        log.write(event="start", step=0, args=vars(args), **describe_run(torch.device(args.device), 1))
        for row in rows:
            log.write(**row)
    if args.plot:
        plot(rows, Path(args.plot))
    print(f"\ndone in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(parse_args())
