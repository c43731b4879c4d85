"""Draws the figures of this repository, and the learning curves of any training run.  Needs matplotlib.

    python assets/figures.py curves runs/A runs/B curves.png     # loss, scores, residuals, ... of these runs
    python assets/figures.py curves runs/A cosine.png --only cosine training
    python assets/figures.py fig3 runs/fig3 assets/fig3.png      # Fig. 3, after assets/fig3.sh runs/fig3
    python deq_synthetic.py --plot assets                        # Figs. 1 and 4, by `fig1` and `fig4` below

RUN is the folder of a run, or its metrics.jsonl.  Fig. 2, cosines during training, is among the curves of a
run with --cosine-every.
"""
import argparse
import itertools
import json
import math
import sys
from pathlib import Path

FIG3 = {"grad": ("upg", "npg"), "lam": (0.3, 0.5, 1.0), "k": (1, 3, 5, 9, 15)}          # as in fig3.sh
# Flags in which the runs of Fig. 3 may differ.  The others must be the same in a fair comparison.
FREE = {*FIG3, "data", "out", "resume", "save_every", "log_every", "cosine_every", "radius_every", "compile",
        "cuda_graph", "memory_format"}
# The panels of `curves`: title, scale, names of the values in the records, training first.
PANELS = (("loss", "linear", ("loss", "test_loss", "val_loss", "valid_nll", "test_nll")),
          ("score (%)", "linear", ("accuracy", "test_accuracy", "val_top1", "test", "val", "test_2a")),
          ("perplexity", "log", ("perplexity", "valid_perplexity", "test_perplexity")),
          ("training residual (10, 50, 90 %)", "log", ("train_residual",)),
          ("backward residual (10, 50, 90 %)", "log", ("backward_residual",)),
          ("evaluation residual (10, 50, 90 %)", "log", ("test_residual", "val_residual", "valid_residual")),
          ("cosine to the exact gradient", "linear", ("cosine_upg", "cosine_npg", "cosine_gmres")),
          ("spectral radius", "linear", ("rho_J", "rho_J_lam")))
STYLES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (1, 4)))


def die(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def prepare(picture):
    """Returns matplotlib's pyplot and makes the picture's folder.  Ends with one line if that fails."""
    try:
        import matplotlib
    except ImportError:
        die("figures need matplotlib: pip install matplotlib")
    folder = Path(picture).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        die(f"{folder}: cannot make this folder ({error.strerror})")
    matplotlib.use("Agg")               # draws into files and needs no display
    import matplotlib.pyplot as plt
    return plt


def save(fig, picture):
    try:
        fig.savefig(picture, dpi=110)
    except OSError as error:
        die(f"{picture}: cannot write this picture ({error.strerror})")
    print(f"wrote {picture}")


# --- records of runs ----------------------------------------------------------------------------------------

def records(run):
    """The lines of a run's metrics.jsonl.  Half a line at the end, left by a killed run, is ignored."""
    path = Path(run, "metrics.jsonl") if Path(run).is_dir() else Path(run)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        die(f"{path}: {error.strerror}")
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            if number < len(lines):
                die(f"{path}, line {number}: not a record of a training run")
    return found


def series(log, name):
    """(steps, values) of the records that have this value.  A null, which was not finite, is a gap."""
    line = [(r["step"], math.nan if r[name] is None else r[name]) for r in log if name in r]
    return [step for step, _ in line], [value for _, value in line]


# --- learning curves ----------------------------------------------------------------------------------------

def curves(runs, picture, only=None):
    """Draws a panel per kind of value, with a colour per run and a line style per value.

    only: words, of which a panel's title has at least one.
    """
    logs, present = {str(run): records(run) for run in runs}, set()
    for run, log in logs.items():
        own = {name.removesuffix("_p50") for record in log for name in record}
        own &= {name for *_, names in PANELS for name in names}
        if not own:
            die(f"{run}: nothing to draw, no record has a loss, a score, a residual, a cosine or a radius")
        present |= own
    panels = [(title, scale, [name for name in names if name in present]) for title, scale, names in PANELS]
    panels = [panel for panel in panels if panel[2]]
    drawable = [title.split(" (")[0] for title, *_ in panels]
    panels = [panel for panel in panels if not only or any(word in panel[0] for word in only)]
    if not panels:
        die(f"--only {' '.join(only)}: these runs have no such panel, but {', '.join(drawable)}")
    plt = prepare(picture)
    rows, columns = math.ceil(len(panels) / 3), min(3, len(panels))
    fig, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.4 * rows + 0.4), squeeze=False,
                             layout="constrained")
    few = len(logs) <= 10               # matplotlib repeats its own colours after ten
    colors = [f"C{i}" if few else plt.cm.turbo(i / (len(logs) - 1)) for i in range(len(logs))]
    for ax, (title, scale, names) in zip(axes.flat, panels):
        for name, style in zip(names, STYLES):
            ax.plot([], [], color="black", linestyle=style, label=name)         # for the legend
            for log, color in zip(logs.values(), colors):
                draw(ax, log, name, color=color, linestyle=style)
        ax.set(title=title, xlabel="step", yscale=scale)
        ax.legend(fontsize=8)
    for ax in axes.flat[len(panels):]:
        ax.remove()
    fig.legend(handles=[plt.Line2D([], [], color=color, label=run) for run, color in zip(logs, colors)],
               loc="outside upper center", ncols=columns)
    save(fig, picture)


def draw(ax, log, name, color, linestyle):
    """Draws one value of one run, a line per fold (IGNN).  A residual is a median in a band, 10 to 90 %."""
    residual = name.endswith("_residual")
    for fold in sorted({record.get("fold", 0) for record in log}):
        own = [record for record in log if record.get("fold", 0) == fold]
        steps, values = series(own, f"{name}_p50" if residual else name)
        alone = "." if len(steps) < 20 else None        # a line of one point cannot be seen
        ax.plot(steps, values, color=color, linestyle=linestyle, marker=alone, linewidth=1)
        if residual:
            (_, low), (_, high) = series(own, f"{name}_p10"), series(own, f"{name}_p90")
            ax.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)


# --- Fig. 3: accuracy over k and lam ------------------------------------------------------------------------

def result(log):
    """Test accuracy (%) after the last epoch, or why there is none."""
    if any(record.get("event") == "broken" for record in log):
        return "diverged"
    epochs = [record["args"]["epochs"] for record in log if record.get("event") == "start"]
    done = [record for record in log if record.get("event") == "epoch"]
    return done[-1]["test_accuracy"] if done and done[-1]["epoch"] in epochs[-1:] else "not finished"


def fig3(out, picture):
    """Prints the table of the runs that assets/fig3.sh has made in `out`, and draws them."""
    names = {at: Path(out, "-".join(map(str, at))) for at in itertools.product(*FIG3.values())}
    logs = {at: records(run) for at, run in names.items() if Path(run, "metrics.jsonl").exists()}
    if not logs:
        die(f"{out}: no run of Fig. 3 is there, such as {names['upg', 0.5, 5]}; assets/fig3.sh makes them")
    flags = [record["args"] for log in logs.values() for record in log if record.get("event") == "start"]
    for name in sorted({name for args in flags for name in args} - FREE):
        values = sorted({str(args.get(name)) for args in flags})
        if len(values) > 1:
            print(f"warning: these runs differ in --{name.replace('_', '-')}: {', '.join(values)}",
                  file=sys.stderr)
    accuracy = {at: result(logs.get(at, [])) for at in names}
    print("| test accuracy, last epoch | " + " | ".join(f"k = {k}" for k in FIG3["k"]) + " |\n"
          + "|---" * (1 + len(FIG3["k"])) + "|")
    for grad, lam in itertools.product(FIG3["grad"], FIG3["lam"]):
        line = [accuracy[grad, lam, k] for k in FIG3["k"]]
        print(f"| {grad.upper()}, lam = {lam} | "
              + " | ".join(x if isinstance(x, str) else f"{x:.2f}" for x in line) + " |", flush=True)
    plt = prepare(picture)
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for ax, grad in zip(axes, FIG3["grad"]):
        for lam in FIG3["lam"]:
            line = [accuracy[grad, lam, k] for k in FIG3["k"]]
            ax.plot(FIG3["k"], [math.nan if isinstance(x, str) else x for x in line], "o-",
                    label=f"$\\lambda$ = {lam}")
        ax.set(title=grad.upper(), xlabel="k", xticks=FIG3["k"])
    axes[0].set_ylabel("test accuracy (%)")
    axes[1].legend(fontsize=8)
    save(fig, picture)


# --- Figs. 1 and 4: from the rows of deq_synthetic.py -------------------------------------------------------

def fig1(rows, picture):
    """Cosine of the phantom gradient to the exact one over k, mean and standard deviation."""
    fig, axes = prepare(picture).subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for ax, grad in zip(axes, ("upg", "npg")):
        for lam in (0.1, 0.2, 0.3, 0.5, 0.8, 1.0):
            line = [r for r in rows if r["event"] == "fig1" and (r["grad"], r["lam"]) == (grad, lam)]
            k, mean, std = ([r[key] for r in line] for key in ("k", "mean", "std"))
            low, high = [m - s for m, s in zip(mean, std)], [m + s for m, s in zip(mean, std)]
            ax.plot(k, mean, label=f"$\\lambda$ = {lam}")
            ax.fill_between(k, low, high, alpha=0.2)
        ax.set(title=grad.upper(), xlabel="k", xticks=range(0, 21, 5))
    axes[0].set_ylabel("cosine to the exact gradient")
    axes[1].legend(fontsize=8)
    save(fig, picture)


def fig4(rows, picture):
    """Backward iterates over the number of products with J^T, a column per L_h."""
    rows = [r for r in rows if r["event"] == "fig4"]
    lips = sorted({r["lip"] for r in rows})
    panels = {"objective": "objective", "relative_error": "relative error", "cosine": "cosine",
              "l1": "L1 norm"}
    labels = {"broyden": "Broyden", "gmres": "GMRES", "phantom": "phantom (NPG, $\\lambda = 1$)"}
    fig, axes = prepare(picture).subplots(len(panels), len(lips), figsize=(11, 8), sharex=True,
                                           layout="constrained")
    for (i, (key, title)), (j, lip) in itertools.product(enumerate(panels.items()), enumerate(lips)):
        ax = axes[i][j]
        for grad, label in labels.items():
            line = [r for r in rows if (r["lip"], r["grad"]) == (lip, grad)]
            scale = line[0]["exact_l1"] if key == "l1" else 1.0
            ax.plot([r["iteration"] for r in line], [scale * r[key] for r in line], label=label)
        if key == "l1":
            ax.axhline(scale, color="gray", linestyle="--", label="exact")
            ax.set_xlabel("backward iterations")
        if key != "cosine":
            ax.set_yscale("log")
        if i == 0:
            ax.set_title(f"$L_h$ = {lip}")
        if j == 0:
            ax.set_ylabel(title)
    axes[-1][0].legend(fontsize=8)
    fig.suptitle("Objective: the true residual, which GMRES minimises.  Relative error: that over the norm "
                 "of the iterate, so it is small also where this explodes.", fontsize=9)
    save(fig, picture)


def picture(text):
    """An argparse type: the file to draw into.  Refuses a run, which is last if the picture was forgotten."""
    if not text.endswith((".png", ".pdf", ".svg")):
        raise argparse.ArgumentTypeError(f"must end in .png, .pdf or .svg, got {text}")
    return text


def main(argv=None):
    p = argparse.ArgumentParser(description="Draws Fig. 3, or the learning curves of training runs.")
    commands = p.add_subparsers(dest="command", required=True)
    one = commands.add_parser("curves", help="draw the learning curves of one or more runs")
    one.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, or its metrics.jsonl")
    one.add_argument("picture", metavar="PICTURE.png", type=picture, help="the file to draw into")
    one.add_argument("--only", nargs="+", metavar="WORD", help="only the panels with these words in their titles")
    one = commands.add_parser("fig3", help="print the table of Fig. 3 and draw it")
    one.add_argument("out", metavar="OUT", help="folder of the runs, as given to assets/fig3.sh")
    one.add_argument("picture", metavar="PICTURE.png", type=picture, help="the file to draw into")
    args = p.parse_args(argv)
    if args.command == "curves":
        curves(args.runs, args.picture, args.only)
    else:
        fig3(args.out, args.picture)


if __name__ == "__main__":
    main()
