"""deq_synthetic.py: the paper's theorems, as its own functions measure them."""
import json
import statistics
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import deq_synthetic
from common import seed_everything

ROOT = Path(__file__).resolve().parent.parent


def rows(part, *flags, **sizes):
    args = deq_synthetic.parse_args(["--only", part, *flags])
    seed_everything(args.seed)
    return getattr(deq_synthetic, part)(args, **sizes)


@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_fig1_the_cosine_grows_with_k_and_falls_with_damping(activation):
    """Sec. 3; and the two exact gradients agree above 0.9999.  Standard error of a mean: a few 1e-3."""
    exact, *grid = rows("fig1", "--pairs", "4", "--activation", activation)
    assert exact["cosine_min"] > 0.9999 and exact["residual_max"] < 1e-5
    mean = {(r["grad"], r["lam"], r["k"]): r["mean"] for r in grid}
    assert len(mean) == 2 * 10 * 20
    for grad in ("upg", "npg"):
        for lam in (0.1, 0.5, 1.0):
            assert all(mean[grad, lam, k + 1] > mean[grad, lam, k] - 1e-6 for k in range(1, 20))
        assert mean[grad, 0.1, 5] < mean[grad, 0.5, 5] < mean[grad, 1.0, 5]
    assert max(abs(mean["upg", lam, k] - mean["npg", lam, k]) for _, lam, k in mean) < 1e-4


@pytest.fixture(scope="module")
def fig4():
    line = {}
    for r in rows("fig4"):
        line.setdefault((r["lip"], r["grad"]), []).append(r)
    return line


def test_fig4_broyden_oscillates_and_the_phantom_gradient_stays_bounded(fig4):
    """App. D.4: Broyden's cosine falls at L_h = 0.9999, its norm passes the exact one's at 0.9.

    The phantom's never do.  Rounding, and so the number of threads, decides where it peaks at 0.9999."""
    line = {at: r for at, r in fig4.items() if at[1] in ("broyden", "phantom")}
    assert all(len(line[0.9999, grad]) == 30 for grad in ("broyden", "phantom"))
    fall = {at: max(a["cosine"] - b["cosine"] for a, b in zip(r, r[1:])) for at, r in line.items()}
    largest = {at: max(row["l1"] for row in r) for at, r in line.items()}
    assert fall[0.9999, "broyden"] > 0.05 and largest[0.9, "broyden"] > 1.1
    assert all(fall[at] < 1e-4 and largest[at] < 1 + 1e-3 for at in line if at[1] == "phantom")


def test_fig4_broydens_climbing_true_residual_is_not_the_gradients(fig4):
    """GMRES on the same systems: its true residual never rises, its norm and its cosine do not overshoot.

    Broyden's climbs at L_h = 0.9999 while the paper's relative error falls: medians of the last ten
    iterations, since rounding decides its path."""
    for lip in (0.9, 0.99, 0.999, 0.9999):
        gmres = fig4[lip, "gmres"]
        assert len(gmres) == 30
        assert gmres[1]["cosine"] == pytest.approx(gmres[0]["cosine"], abs=1e-6)    # a multiple of g
        for a, b in zip(gmres, gmres[1:]):
            assert b["objective"] <= a["objective"] + 1e-6 * gmres[0]["objective"]
            assert b["cosine"] >= a["cosine"] - 1e-4 and b["l1"] < 1 + 1e-3
    broyden, gmres = (fig4[0.999, grad][-1] for grad in ("broyden", "gmres"))
    assert gmres["objective"] < 0.1 * broyden["objective"] and gmres["cosine"] > 0.99
    first, *later = fig4[0.9999, "broyden"]
    late = {key: statistics.median(r[key] / first[key] for r in later[-10:])
            for key in ("objective", "relative_error")}
    assert late["objective"] > 3 and late["relative_error"] < 0.1


def test_the_weight_is_symmetric_with_the_given_norm_and_a_positive_top_eigenvalue():
    for seed in range(6):
        torch.manual_seed(seed)
        w = deq_synthetic.symmetric_weight(16, 0.7, dtype=torch.float64)
        eigenvalues = torch.linalg.eigvalsh(w)
        assert torch.equal(w, w.T)
        torch.testing.assert_close(eigenvalues[-1].item(), 0.7)
        assert eigenvalues[0] > -0.7


def test_theorem_1_the_condition_implies_ascent():
    table = rows("theorem1")
    holds = [r for r in table if r["left"] <= r["right"]]
    assert 0 < len(holds) < len(table) and all(r["cosine_min"] >= 0 for r in holds)


def test_theorem_1s_left_side_is_that_of_b_to_the_k():
    """For NPG, A (I - J) - dF/dtheta = -dF/dtheta B^k."""
    torch.manual_seed(0)
    f, w, h = deq_synthetic.small_problem()
    df, j, _ = deq_synthetic.exact_matrices(f, w, h)
    eye = torch.eye(len(j), dtype=j.dtype)
    a = deq_synthetic.gradient_matrix(deq_synthetic.npg(f, h, 4, 0.6), w)
    b = 0.6 * j + 0.4 * eye
    remainder = -df @ torch.linalg.matrix_power(b, 4)
    torch.testing.assert_close(a @ (eye - j) - df, remainder, rtol=1e-9, atol=1e-11)


def test_theorem_2_the_rate_is_the_spectral_radius():
    for r in rows("theorem2"):
        assert r["error_80"] < 0.01 * r["error_1"]
        assert r["rho_power"] == pytest.approx(r["rho"], rel=0.01)
        if r["grad"] == "npg":
            assert r["rate"] == pytest.approx(r["rho"], rel=0.02)


def test_theorem_3_the_floor_falls_with_epsilon_and_stays_below_the_bound():
    """50 steps of larger batches, in place of 100: less noise, so that the floors are as far apart."""
    table = rows("theorem3", steps=50, batch=32)
    for family in (table[:4], table[4:]):
        assert all(a["epsilon"] > b["epsilon"] and a["mean"] > b["mean"] for a, b in zip(family, family[1:]))
    assert all(r["added"] <= r["bound"] + 1e-12 for r in table)
    assert table[0]["mean"] > 4 * table[-1]["mean"] and table[4]["mean"] > 4 * table[-1]["mean"]


def test_table_2_npgs_memory_is_flat_and_upgs_linear():
    args = deq_synthetic.parse_args([])
    torch.manual_seed(0)
    table = deq_synthetic.table2(args, rows_n=8, size=64, repeats=1)
    mb = {(r["grad"], r["steps"]): r["mb"] for r in table}
    assert mb["npg", 20] == pytest.approx(mb["npg", 1], rel=0.05)
    assert mb["implicit", 40] == pytest.approx(mb["implicit", 10], rel=0.05)
    assert mb["upg", 20] == pytest.approx(20 * mb["upg", 1], rel=0.05)


def test_the_script_writes_its_rows(tmp_path):
    run = subprocess.run([sys.executable, "deq_synthetic.py", "--only", "theorem1", "--out", str(tmp_path)],
                         cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert len([json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]) == 1 + 9
    assert "0 exceptions" in run.stdout


@pytest.mark.parametrize("flags", [["--pairs", "1"], ["--lip", "1"], ["--only", "fig2"],
                                   ["--activation", "gelu"], ["--seed", "4294967296"],
                                   ["--plot", "x", "--only", "fig1"]])
def test_wrong_flags_end_with_one_line_and_code_2(flags, capsys):
    with pytest.raises(SystemExit) as end:
        deq_synthetic.parse_args(flags)
    assert end.value.code == 2 and flags[0] in capsys.readouterr().err


def test_folders_that_cannot_be_used_are_named_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))      # it may be absent
    monkeypatch.setattr(deq_synthetic, "seed_everything", lambda _: pytest.fail("the work was done first"))
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("of a run")
    for flags, named in ((["--only", "theorem1", "--out", tmp_path / "run"], "run already holds a run"),
                         (["--only", "theorem1", "--out", tmp_path / "file"], "cannot make this folder"),
                         (["--plot", tmp_path / "file" / "x"], "x: cannot make this folder")):
        with pytest.raises(SystemExit) as end:
            deq_synthetic.main(deq_synthetic.parse_args([str(flag) for flag in flags]))
        assert end.value.code == 2 and named in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "of a run"


def test_without_matplotlib_a_figure_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(deq_synthetic, "seed_everything", lambda _: pytest.fail("the work was done first"))
    with pytest.raises(SystemExit) as end:
        deq_synthetic.main(deq_synthetic.parse_args(["--plot", str(tmp_path)]))
    assert end.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err
