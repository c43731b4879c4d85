"""deq_wikitext.py: the model against the formulas written out in loops, data, official checkpoints, evaluation.

Training, wrong input, kill and resume are in test_wikitext_training.py.
"""
import copy
import itertools
import math
import os
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import deq_wikitext
from common import (Process, anderson, broyden, equilibrium, fixed_point, gmres, implicit, jacobian_regularization,
                    npg, recomputed, spectral_radius, upg)
from deq_wikitext import (BlockMasks, DEQTransformer, Masks, evaluate, load_official,
                          load_text, parse_args, streams, toy_text)

CPU = Process(0, 1, torch.device("cpu"))
SMALL = dict(n_token=60, cutoffs=(10, 20, 35), d_model=16, n_head=2, d_inner=24, div_val=2, mem_len=5)
VARIANTS = {"PostLN": {}, "PreLN": dict(pre_ln=True), "PreLN, raw residual": dict(pre_ln=True, preln_residual="raw"),
            "deq-lm": dict(pre_ln=True, preln_residual="raw", ln_affine=True, attn_out_ln=True, n_blocks=3),
            "two blocks, PostLN, window of 4": dict(n_blocks=2, ln_affine=True, local_size=4),
            "heads of 5, padded": dict(d_model=20, n_head=4, d_inner=12), "heads of 10, padded": dict(d_model=20)}


def solving(**settings):
    """A model's `solve` with these settings of common.equilibrium, and the default model's others."""
    tol = settings.get("tol", 1e-3)
    others = dict(lam=0.8, max_iter=30, tol=tol, backward_max_iter=35, backward_tol=tol)
    return partial(equilibrium, **{**others, **settings})


def build(seed=0, dtype=torch.float64, trained=True, solve=solving(), **more):
    """A small model in float64; trained: no parameter has a value that hides a mistake, as 0, 1, or g = ||v||."""
    torch.manual_seed(seed)
    model = DEQTransformer(**{**SMALL, **more}, solve=solve).to(dtype)
    if trained:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p += (0.02 if name.endswith("original1") else 0.2) * torch.randn_like(p)
    return model


def grouped_by_head(rows, n_head, back=False):
    """Rows of W_qkv or the injection from thirds (queries, keys, values; heads within each) to heads; back: reversed.

    Row s D + h d + a of locuslab/deq is row 3 d h + s d + a of torchdeq's deq-lm.
    """
    d = len(rows) // (3 * n_head)
    shape = (n_head, 3, d) if back else (3, n_head, d)
    return rows.unflatten(0, shape).transpose(0, 1).flatten(0, 2)


def official_names(model, lm):
    """{our key: key in locuslab/deq, or with `lm` in torchdeq's deq-lm}."""
    g, v = "parametrizations.weight.original0", "parametrizations.weight.original1"
    inject = "injection" if lm else "inject_conv"
    names = {"injection.weight": f"{inject}.weight", "injection.bias": f"{inject}.bias",
             "cluster_weight": "crit.cluster_weight", "cluster_bias": "crit.cluster_bias",
             "head_projection": "crit.out_projs.0.weight"}
    for i in range(len(model.tables)):
        names |= {f"tables.{i}": f"word_emb.emb_layers.{i}.weight", f"biases.{i}": f"crit.out_layers.{i}.bias",
                  f"projections.{i}": f"word_emb.emb_projs.{i}.weight"}
    for b in range(len(model.blocks)):
        attn, ff = (f"func.{part}.{b}." if lm else f"func.{part}." for part in ("dec_attn", "pos_ff"))
        names |= {f"blocks.{b}.{key}": attn + key for key in ("r_w_bias", "r_r_bias")}
        for ours, theirs in (("qkv", attn + "qkv_net"), ("r", attn + "r_net"), ("o", attn + "o_net"),
                             ("ff1", ff + "ff1_net"), ("ff2", ff + "ff2_net")):
            names |= {f"blocks.{b}.{ours}.{g}": f"{theirs}.weight_g", f"blocks.{b}.{ours}.{v}": f"{theirs}.weight_v",
                      f"blocks.{b}.{ours}.bias": f"{theirs}.bias"}
        for ours, theirs in (("ln1", attn + "ln1"), ("ln_out", attn + "ln2"), ("ln2", ff + "ln")):
            names |= {f"blocks.{b}.{ours}.{key}": f"{theirs}.{key}" for key in ("weight", "bias")}
    return {ours: theirs for ours, theirs in names.items() if ours in model.state_dict()}


def official_state_dict(model, lm=False):
    """The model's weights as locuslab/deq names and shapes them, or with `lm` as torchdeq's deq-lm does."""
    own, state = model.state_dict(), {}
    for ours, theirs in official_names(model, lm).items():
        value = own[ours]
        if lm and ("qkv_net" in theirs or theirs.startswith("injection.")):
            value = grouped_by_head(value, model.blocks[0].n_head)
        if not lm and value.dim() == 2 and theirs.startswith(("inject_conv", "func.dec_attn")) and "bias" not in theirs:
            value = value[:, :, None]
        state[theirs] = value
    for i in range(len(model.tables)):
        state[f"crit.out_layers.{i}.weight"] = own[f"tables.{i}"]
        if i > 0 and f"projections.{i}" in own:
            state[f"crit.out_projs.{i}.weight"] = own[f"projections.{i}"]
    state["pos_emb.inv_freq"] = 1 / 10000 ** (torch.arange(0.0, model.d_model, 2.0) / model.d_model)
    return state


def example(model, M=5, B=2, T=4, seed=1):
    """h (B, T, D), u (B, M + T, 3 D), h_mem (B, M, D), ids and targets (B, T)."""
    torch.manual_seed(seed)
    D, dtype = model.d_model, model.injection.weight.dtype
    ids = torch.randint(0, model.edges[-1], (2, B, T))
    return (torch.randn(B, T, D, dtype=dtype), torch.randn(B, M + T, 3 * D, dtype=dtype),
            torch.randn(B, M, D, dtype=dtype), *ids)


# --- F against its formulas, in loops --------------------------------------------------------------------------------

def layer_norm(x, module):
    y = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
    return y * module.weight + module.bias if module.weight is not None else y


def effective(linear):
    g, v = linear.parametrizations.weight.original0, linear.parametrizations.weight.original1
    return torch.stack([gi * vi / vi.square().sum().sqrt() for gi, vi in zip(g[:, 0], v)])


def slow_f(model, h, u, h_mem):
    """F for one stream, token by token and head by head; h (T, D), u (K, 3 D), h_mem (M, D)."""
    T, D = h.shape
    M = len(h_mem)
    K, H = M + T, model.blocks[0].n_head
    d = D // H
    for block in model.blocks:
        w_qkv, w_r, w_o, w_1, w_2 = (effective(m) for m in (block.qkv, block.r, block.o, block.ff1, block.ff2))
        rows = [*h_mem, *h]
        normed = [layer_norm(row, block.ln1) for row in rows] if block.pre_ln else rows
        qkv = [w_qkv @ row + ui for row, ui in zip(normed, u)]
        y = []
        for i in range(T):
            heads = []
            for a in range(H):
                part = slice(a * d, (a + 1) * d)
                q, scores, values = qkv[M + i][:D][part], [], []
                for j in range(K):
                    distance = i + M - j
                    if not 0 <= distance < model.local_size:
                        continue
                    angle = [distance / 10000 ** (2 * m / D) for m in range(D // 2)]
                    p = torch.tensor([math.sin(x) for x in angle] + [math.cos(x) for x in angle], dtype=h.dtype)
                    key, r = qkv[j][D:2 * D][part], (w_r @ p)[part]
                    scores.append(((q + block.r_w_bias[a]) @ key + (q + block.r_r_bias[a]) @ r) / math.sqrt(d))
                    values.append(qkv[j][2 * D:][part])
                weight = torch.stack(scores).softmax(0)
                heads.append(sum(w * v for w, v in zip(weight, values)))
            o = torch.cat(heads)
            if isinstance(block.ln_out, torch.nn.LayerNorm):
                o = layer_norm(o, block.ln_out)
            o = w_o @ o + block.o.bias + h[i]
            y.append(o if block.pre_ln else layer_norm(o, block.ln1))
        out = []
        for yi in y:
            x = layer_norm(yi, block.ln2) if block.pre_ln else yi
            g = w_2 @ (w_1 @ x + block.ff1.bias).clamp_min(0) + block.ff2.bias
            if not block.pre_ln:
                out.append(layer_norm(g + yi, block.ln2))
            else:
                out.append(g + (x if block.preln_residual == "normalized" else yi))
        h = torch.stack(out)
    return h


@pytest.mark.parametrize("M", [0, 2, 7])
@pytest.mark.parametrize("variant", VARIANTS)
def test_F_is_its_formula(variant, M):
    """Float64; the sinusoids are made in float32, which is 1e-7 of a distance."""
    model = build(**VARIANTS[variant])
    h, u, h_mem, *_ = example(model, M)
    expected = torch.stack([slow_f(model, *one) for one in zip(h, u, h_mem)])
    for grad in (False, True):              # fused attention, and the plain one
        with torch.set_grad_enabled(grad):
            assert torch.allclose(model.f(h, u, h_mem), expected, rtol=0, atol=2e-6 * expected.abs().max().item())
    if M == 0:
        assert torch.equal(model.f(h, u), model.f(h, u, h_mem))


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_and_plain_attention_agree(variant, monkeypatch):
    """Float64 rounding, with and without constants computed before; gradients of the plain one up to the second.

    The fused one is given heads whose size is a multiple of 8: a GPU has it for no others.
    """
    widths, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv, **more: (
        widths.extend(x.shape[-1] for x in qkv), real(*qkv, **more))[1])
    model = build(**VARIANTS[variant])
    h, u, h_mem, *_ = example(model)
    plain = model.f(h, u, h_mem)
    assert not widths               # with a graph never the fused one, whatever this machine's kernels can do
    with torch.no_grad():
        fused, again = model.f(h, u, h_mem), model.f(h, u, constants=model.constants(u, h_mem))
    assert plain.requires_grad and (plain - fused).abs().max() < 1e-12 and torch.equal(fused, again)
    assert widths and all(width % 8 == 0 for width in widths)
    small = build(**{**VARIANTS[variant], "d_model": 4, "d_inner": 3, "cutoffs": (10,)})
    h, u, h_mem, *_ = example(small, M=2, B=1, T=2)
    assert torch.autograd.gradgradcheck(lambda h: small.f(h, u, h_mem), h.requires_grad_(), atol=1e-4)


def test_positions_are_sines_then_cosines():
    """Row j of K is distance K - 1 - j, frequencies 10000^(-2 m / D): at distance 0 all sines 0, all cosines 1."""
    p = build().positions(6, "cpu")
    assert p.shape == (6, 16) and (p[-1, :8] == 0).all() and (p[-1, 8:] == 1).all()
    assert p[2, 3].item() == pytest.approx(math.sin(3 * 10000 ** (-6 / 16)), abs=1e-6)
    assert p[2, 8 + 3].item() == pytest.approx(math.cos(3 * 10000 ** (-6 / 16)), abs=1e-6)


def test_a_position_sees_exactly_local_size_keys():
    """The window counts the position itself: a key at distance 2 has an effect with 3, and none with 2."""
    for size, seen in ((2, [3, 4]), (3, [2, 3, 4]), (0, [0, 1, 2, 3, 4])):
        model = build(local_size=size)
        h, u, h_mem, *_ = example(model, M=0, B=1, T=5)
        u.requires_grad_()
        grad, = torch.autograd.grad(model.f(h, u)[0, 4].square().sum(), u)
        assert grad[0].abs().sum(1).nonzero()[:, 0].tolist() == seen
    assert build().local_size == 1000


def test_at_full_size_the_numbers_are_counted_once():
    """97,691,888 in locuslab/deq, 69,753,000 of them in F; 97,571,288 in torchdeq's deq-lm, with 88 names."""
    def count(module):
        return sum(p.numel() for p in module.parameters())

    for norm in ("post", "pre"):
        with torch.device("meta"):
            model = deq_wikitext.build_model(parse_args(["--norm", norm]), range(267735),
                                             Process(0, 1, torch.device("meta")))
            assert (count(model), count(model.blocks)) == (97_691_888, 69_753_000)
            assert [count(m) for m in (model.tables, model.projections, model.injection, model.biases)] == [
                25_057_350, 649_600, 1_472_100, 267_735]
            assert len(official_state_dict(model)) == 40
            assert sum(v.numel() for v in official_state_dict(model).values()) == 122_909_188
    flags = deq_wikitext.__doc__.split("22.34             ")[1].split("\n\n")[0].split()
    with torch.device("meta"):
        model = deq_wikitext.build_model(parse_args(flags), range(267735), Process(0, 1, torch.device("meta")))
        assert (count(model), count(model.blocks)) == (97_571_288, 69_632_400)
        assert len(official_state_dict(model, lm=True)) == 88


def test_weights_begin_as_the_official_ones_do():
    """N(0, 0.01) for tables, projections, injection and clusters; F's matrices keep PyTorch's default, as g = ||v||."""
    torch.manual_seed(0)
    shape = dict(n_token=4000, cutoffs=(500, 2000), d_model=128, n_head=4, d_inner=1000)
    model = DEQTransformer(**shape)
    for p in (*model.tables, *model.projections, model.head_projection, model.injection.weight):
        assert p.std().item() == pytest.approx(0.01, rel=0.1)
    assert all((b == 0).all() for n, b in model.named_parameters() if "bias" in n and "r_" not in n)
    block = model.blocks[0]
    for linear in (block.qkv, block.r, block.o, block.ff1, block.ff2):
        fan_in, w = linear.in_features, linear.weight
        assert w.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.03)
        assert w.abs().max() <= fan_in ** -0.5 + 1e-6
    model = DEQTransformer(**shape, init_before_norm=True, init_std=0.05)
    assert model.blocks[0].qkv.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert model.tables[0].std().item() == pytest.approx(0.05, rel=0.03)


# --- embedding and softmax -------------------------------------------------------------------------------------------

SOFTMAXES = {"narrowing": {}, "one width": dict(div_val=1), "one width, projected": dict(div_val=1, d_embed=12),
             "two clusters": dict(cutoffs=(25,))}


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_embedding_and_softmax_are_their_formulas(softmax):
    """e(w) = sqrt(D) P_i A_i[w - c_i]; tail i reads the head's column S + n - i, so the first tail the last column."""
    model = build(**SOFTMAXES[softmax])
    edges, D, n = model.edges, model.d_model, len(model.edges) - 2
    ids = torch.arange(60).view(4, 15)
    h = torch.randn(60, D, dtype=torch.float64)
    P = list(model.projections) if model.projections else [torch.eye(D, dtype=torch.float64)]
    P = P * (n + 1) if len(P) == 1 else P
    Q = [torch.eye(D, dtype=torch.float64) if model.head_projection is None else model.head_projection, *P[1:]]
    e, log_prob = [], []
    for w in range(60):
        i = max(i for i in range(n + 1) if edges[i] <= w)
        e.append(math.sqrt(D) * P[i] @ model.tables[i][w - edges[i]])
        rows, bias = [*model.tables[0], *model.cluster_weight], [*model.biases[0], *model.cluster_bias]
        head = torch.stack([row @ (Q[0].T @ h[w]) + b for row, b in zip(rows, bias)]).log_softmax(0)
        if i == 0:
            log_prob.append(head[w])
        else:
            tail = torch.stack([row @ (Q[i].T @ h[w]) + b for row, b in zip(model.tables[i], model.biases[i])])
            log_prob.append(head[edges[1] + n - i] + tail.log_softmax(0)[w - edges[i]])
    assert torch.allclose(model.embed(ids).flatten(0, 1), torch.stack(e), atol=1e-12)
    nll = model.nll(h.view(4, 15, D), ids)
    assert nll.shape == (4, 15) and torch.allclose(nll.flatten(), -torch.stack(log_prob), atol=1e-12)
    assert torch.allclose(model.log_prob(h).gather(1, ids.view(-1, 1))[:, 0], torch.stack(log_prob), atol=1e-12)
    assert (model.log_prob(h).exp().sum(1) - 1).abs().max() < 1e-12


def test_tied_parameters_get_the_gradients_of_both_uses():
    """Tables, and projections of the tails; P_0 belongs to the embedding alone, Q_0 to the softmax alone."""
    model = build()
    ids = torch.arange(60).view(2, 30)
    h = torch.randn(2, 30, 16, dtype=torch.float64)
    uses = (lambda: model.embed(ids).square().sum(), lambda: model.nll(h, ids).sum())
    parameters = [*model.tables, *model.projections, model.head_projection]
    apart = [torch.autograd.grad(use(), parameters, allow_unused=True) for use in uses]
    both = torch.autograd.grad(sum(use() for use in uses), parameters)
    for name, p, a, b in zip(["A"] * 4 + ["P"] * 4 + ["Q"], both, *apart):
        assert torch.allclose(p, (0 if a is None else a) + (0 if b is None else b))
    assert [a is None for a in apart[0]] == [False] * 8 + [True]
    assert [b is None for b in apart[1]] == [False] * 4 + [True, False, False, False, False]


def test_a_cluster_without_a_target_stays_in_the_graph():
    """Else DistributedDataParallel would wait for its gradients."""
    model = build()
    model.nll(torch.randn(3, 16, dtype=torch.float64), torch.tensor([1, 2, 12])).sum().backward()
    assert all(p.grad is not None for p in (*model.tables, *model.biases, model.cluster_weight))
    assert (model.tables[3].grad == 0).all() and (model.biases[1].grad != 0).any()


@pytest.mark.parametrize("bad", [-1, 60])
def test_ids_outside_the_vocabulary_are_refused(bad):
    model = build()
    with pytest.raises(ValueError, match=r"\[0, 60\)"):
        model.embed(torch.tensor([[1, bad]]))
    with pytest.raises(ValueError, match=r"\[0, 60\)"):
        model.nll(torch.zeros(1, 2, 16, dtype=torch.float64), torch.tensor([[1, bad]]))


@pytest.mark.parametrize("wrong, named", [(dict(cutoffs=(10, 10)), "cutoffs"), (dict(cutoffs=(10, 60)), "cutoffs"),
                                          (dict(n_head=3), "n_head 3"),
                                          (dict(d_model=15, n_head=1), "even"), (dict(local_size=-1), "local_size"),
                                          (dict(preln_residual="x"), "preln_residual"),
                                          (dict(output_dropout="x"), "output_dropout")])
def test_impossible_shapes_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        DEQTransformer(**{**SMALL, **wrong})


# --- a segment -------------------------------------------------------------------------------------------------------

def segments(model, n, T=4, B=2, seed=3):
    text = torch.randint(0, model.edges[-1], (B, n * T + 1), generator=torch.Generator().manual_seed(seed))
    return [(text[:, t:t + T], text[:, t + 1:t + T + 1]) for t in range(0, n * T, T)]


@pytest.mark.parametrize("mem_len", [0, 3, 4, 6, 20])
def test_the_memory_is_the_last_states_and_injections(mem_len):
    """Lengths min(mem_len, t T); the state that is kept is the one before output dropout, without a graph."""
    model, memory = build(mem_len=mem_len, dropout=0.3), None
    states = []
    for t, (ids, targets) in enumerate(segments(model, 4)):
        out = model(ids, targets, memory)
        states.append(out.h.detach())
        memory = out.memory
        kept = torch.cat(states, 1)[:, max(0, 4 * (t + 1) - mem_len):]
        assert memory.h.shape == (2, min(mem_len, 4 * (t + 1)), 16) and memory.u.shape[1:] == (memory.h.shape[1], 48)
        assert torch.equal(memory.h, kept) and not memory.h.requires_grad and not memory.u.requires_grad
    with torch.no_grad():
        model.eval()
        ids, _ = segments(model, 1)[0]
        kept = model(ids, mem_len=2).memory
        assert kept.h.shape[1] == 2 and torch.equal(kept.u, model.inject(model.embed(ids))[:, -2:])


@pytest.mark.parametrize("variant", ["PostLN", "PreLN"])
def test_at_the_fixed_point_two_segments_are_one(variant):
    """With a memory of a whole segment, to rounding in float64; with three unrolled applications they are not."""
    model = build(**VARIANTS[variant], mem_len=4,
                  solve=solving(solver=fixed_point, max_iter=500, tol=1e-15)).eval()
    (a, b), (whole,) = segments(model, 2), segments(model, 1, T=8)
    with torch.no_grad():
        for unroll, same in ((0, True), (3, False)):
            first = model(*a, unroll=unroll)
            second, once = model(*b, first.memory, unroll=unroll), model(*whole, unroll=unroll)
            error = (torch.cat([first.nll, second.nll], 1) - once.nll).abs().max() / once.nll.abs().max()
            assert error < 1e-9 if same else error > 1e-4


@pytest.mark.parametrize("memory", [False, True])
def test_later_tokens_change_nothing_before_them(memory):
    """Exactly for unrolled and plain iteration; Broyden and Anderson mix over the segment, within their tolerance.

    At a loose tolerance that leak is real, and shows: every perplexity found with these solvers carries it.
    """
    model = build(mem_len=4).eval()
    first, (ids, targets) = segments(model, 2)
    other = ids.clone()
    other[:, 2] = (ids[:, 2] + 7) % 60
    with torch.no_grad():
        before = model(*first).memory if memory else None

        def change(**settings):
            unroll = settings.pop("unroll", 0)
            solve = solving(**{"solver": fixed_point, "tol": 0.0, **settings})
            nll = [model(x, targets, before, unroll=unroll, solve=solve).nll for x in (ids, other)]
            assert (nll[0] - nll[1])[:, 2:].abs().min() > 0
            return (nll[0] - nll[1])[:, :2].abs().max().item()

        assert change(unroll=3) == change(max_iter=7) == 0
        for solver in (broyden, anderson):
            assert change(solver=solver, max_iter=60, tol=1e-12) < 1e-9
            assert change(solver=solver, max_iter=3) > 1e-9


def test_effective_weights_are_computed_once_per_forward(monkeypatch):
    """Weight normalisation reads 70 million numbers at full size: not at every evaluation of F."""
    model, calls = build(n_blocks=2), []
    norm = type(model.blocks[0].qkv.parametrizations.weight[0])
    real = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, g, v: (calls.append(self), real(self, g, v))[1])
    out = model(*segments(model, 1)[0])
    assert out.result.n_evals > 3 and len(calls) == 10          # five matrices of each block
    out.nll.sum().backward()
    assert len(calls) == 10
    assert all(p.grad is not None for p in model.parameters())


def test_a_step_of_the_optimiser_is_seen_by_the_next_forward():
    """For each of F's matrices alone: their effective weights are kept over a solve, and no longer."""
    model, segment = build(), segments(build(), 1)[0]
    for linear in (getattr(model.blocks[0], name) for name in ("qkv", "r", "o", "ff1", "ff2")):
        before = model(*segment).nll
        before.sum().backward()
        torch.optim.SGD(linear.parametrizations.parameters(), lr=0.1).step()
        assert not torch.equal(before, model(*segment).nll)


def test_dropout_masks_are_fixed_over_a_solve_and_new_in_the_next_forward(monkeypatch):
    model, seen = build(dropout=0.5, dropatt=0.5), []
    real = model.constants
    monkeypatch.setattr(model, "constants", lambda *args: (seen.append(args[2]), real(*args))[1])
    segment = segments(model, 1)[0]
    for _ in range(2):
        assert model(*segment).result.n_evals > 3
    first, second = seen
    shapes = [m.shape for m in (first.embedding, first.positions, first.output, *first.blocks[0])]
    assert shapes == [(2, 1, 16), (1, 16), (2, 4, 1), (2, 2, 4, 4), (2, 1, 16), (2, 1, 24), (2, 1, 16)]
    for a, b in zip((*first[:3], *first.blocks[0]), (*second[:3], *second.blocks[0])):
        assert set(a.unique().tolist()) <= {0.0, 2.0} and (a.shape.numel() < 10 or not torch.equal(a, b))
    model.eval()
    model(*segment)
    assert seen[2] == Masks(blocks=(BlockMasks(),)) and model(*segment).nll.equal(model(*segment).nll)
    model.train()
    model.output_dropout = "channels"
    assert model.masks(2, 4, 4, "cpu").output.shape == (2, 1, 16)


def test_masks_act_where_the_specification_says():
    """Each mask alone, set to zero at one place, against F with the corresponding number removed by hand."""
    model = build()
    h, u, h_mem, *_ = example(model)
    block = model.blocks[0]

    def f(**masks):
        positions = masks.pop("positions", None)
        return model.f(h, u, h_mem, Masks(positions=positions, blocks=(BlockMasks(**masks),)))

    one = torch.ones(2, 1, 16, dtype=torch.float64)
    one[:, :, 3] = 0
    edited = copy.deepcopy(model)
    with torch.no_grad():
        edited.blocks[0].o.parametrizations.weight.original0[3] = 0     # row 3 of W_o
        edited.blocks[0].o.bias[3] = 0
    assert torch.allclose(f(attn_out=one), edited.f(h, u, h_mem))
    edited = copy.deepcopy(model)
    with torch.no_grad():
        edited.blocks[0].ff2.parametrizations.weight.original0[3] = 0
        edited.blocks[0].ff2.bias[3] = 0
    assert torch.allclose(f(ff_out=one), edited.f(h, u, h_mem))
    edited, hidden = copy.deepcopy(model), torch.ones(2, 1, 24, dtype=torch.float64)
    hidden[:, :, 5] = 0
    with torch.no_grad():
        edited.blocks[0].ff1.parametrizations.weight.original0[5] = 0
        edited.blocks[0].ff1.bias[5] = 0
    assert torch.allclose(f(ff_hidden=hidden), edited.f(h, u, h_mem))
    nothing = torch.zeros(2, 2, 4, 9, dtype=torch.float64)               # after the softmax: no value comes through
    expected = block.feed_forward(block.ln1(block.o.bias + h), model.constants(u, h_mem)[0])
    assert torch.allclose(f(attn_prob=nothing), expected)
    with torch.no_grad():
        edited = copy.deepcopy(model)
        edited.blocks[0].r.parametrizations.weight.original0.zero_()        # no positions at all
    assert torch.allclose(f(positions=torch.zeros(1, 16, dtype=torch.float64)), edited.f(h, u, h_mem))


def test_output_and_embedding_masks_act_outside_F(monkeypatch):
    """Whole tokens before the softmax, though not in the memory; channels before the injection."""
    model = build()
    ids, targets = segments(model, 1)[0]
    drop_token = torch.ones(2, 4, 1, dtype=torch.float64)
    drop_token[:, 1] = 0
    channel = torch.ones(2, 1, 16, dtype=torch.float64)
    channel[:, :, 2] = 0
    monkeypatch.setattr(model, "masks", lambda *_: Masks(output=drop_token, embedding=channel))
    out = model(ids, targets)
    assert torch.allclose(out.nll, model.nll(out.h * drop_token, targets))
    assert torch.allclose(out.memory.u, model.inject(model.embed(ids) * channel)[:, -5:])


# --- gradients -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant, backward_solver", [("PostLN", gmres), ("PreLN", gmres), ("PostLN", broyden)])
def test_the_exact_gradient_is_that_of_the_fixed_point(variant, backward_solver):
    """Central differences of the loss at h* in float64, along random directions of all parameters."""
    model = build(**VARIANTS[variant], solve=solving(grad="implicit", solver=fixed_point, max_iter=400, tol=1e-13,
                                                     backward_solver=backward_solver, backward_max_iter=400))
    first, segment = segments(model, 2)
    with torch.no_grad():
        memory = model(*first).memory
    model(*segment, memory).nll.mean().backward()
    for seed in range(3):
        torch.manual_seed(seed)
        directions = [torch.randn_like(p) for p in model.parameters()]
        expected = sum((p.grad * v).sum() for p, v in zip(model.parameters(), directions)).item()
        losses = []
        with torch.no_grad():
            for eps in (1e-5, -2e-5):
                for p, v in zip(model.parameters(), directions):
                    p += eps * v
                losses.append(model(*segment, memory).nll.mean().item())
            for p, v in zip(model.parameters(), directions):
                p += 1e-5 * v
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("grad, k, lam, cosine", [("upg", 40, 0.9, 0.999999), ("npg", 40, 0.9, 0.999999),
                                                  ("upg", 5, 0.8, 0.9), ("npg", 5, 0.8, 0.9)])
def test_phantom_gradients_tend_to_the_exact_one(grad, k, lam, cosine):
    model = build()
    segment, grads = segments(model, 1)[0], []
    for settings in (dict(grad="implicit"), dict(grad=grad, k=k, lam=lam)):
        model.solve = solving(solver=fixed_point, max_iter=400, tol=1e-13, backward_max_iter=400, **settings)
        model.zero_grad()
        model(*segment).nll.mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert F.cosine_similarity(*grads, dim=0) > cosine


def test_a_budget_of_zero_unrolls_from_zero_without_a_solver():
    """torchdeq's deq-lm: k plain applications, differentiated through."""
    args = parse_args("--data toy --d-model 16 --n-head 2 --d-inner 24 --cutoffs 10 20 --max-iter 0 --k 3 "
                      "--lam 1".split())
    model = build(solve=deq_wikitext.build_model(args, range(60), CPU).solve)
    segment = segments(model, 1)[0]
    out, expected = model(*segment), model(*segment, unroll=3)
    assert out.result is None and torch.equal(out.nll, expected.nll)
    for o in (out, expected):
        model.zero_grad()
        o.nll.sum().backward()
    u = model.inject(model.embed(segment[0]))
    h = torch.zeros(2, 4, 16, dtype=torch.float64)
    for _ in range(3):
        h = model.f(h, u)
    assert torch.allclose(out.h, h, atol=1e-14)


def test_jacobian_regularisation_is_the_dense_jacobians_at_the_solvers_state(monkeypatch):
    """||v^T J||^2 / (B T D) for the probe v, at h* and not at h_k; no gradient flows through the state."""
    model, probe = build(), torch.randn(2, 4, 16, dtype=torch.float64)
    ids, targets = segments(model, 1)[0]
    monkeypatch.setattr(torch, "randn_like", lambda x: probe.view_as(x))
    out = model(ids, targets, regularize=True)
    h = out.result.h
    assert not torch.equal(out.h, h)
    u = model.inject(model.embed(ids))
    J = torch.autograd.functional.jacobian(lambda h: model.f(h, u), h).view(128, 128)
    assert out.jr.item() == pytest.approx(((probe.flatten() @ J).square().sum() / 128).item(), rel=1e-9)
    grads = torch.autograd.grad(out.jr, model.blocks.parameters(), allow_unused=True)
    leaf = h.detach().requires_grad_()
    vjp, = torch.autograd.grad(model.f(leaf, u), leaf, probe, create_graph=True)
    expected = torch.autograd.grad(vjp.square().sum() / 128, model.blocks.parameters(), allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in grads)
    assert all((a is None) == (b is None) and (a is None or torch.allclose(a, b)) for a, b in zip(grads, expected))
    assert model(ids, targets).jr is None and model(ids, targets, unroll=2, regularize=True).jr is None


def saved_bytes(run):
    """Bytes that autograd keeps for the backward pass of run()."""
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        keep = run()
    return sum(sizes.values()), keep


def test_memory_of_npg_and_implicit_depends_on_neither_budget_nor_k():
    """UPG's grows by a graph of F per step, and --recompute leaves a state of it."""
    model, segment = build(d_inner=2000), segments(build(), 1)[0]
    sizes = {}
    for grad, k, max_iter, again in (("npg", 1, 5, False), ("npg", 9, 20, False), ("implicit", 1, 5, False),
                                     ("implicit", 1, 20, False), ("upg", 1, 5, False), ("upg", 5, 5, False),
                                     ("upg", 5, 5, True)):
        model.solve = solving(grad=grad, k=k, max_iter=max_iter, tol=0.0)
        if again:
            model.f = recomputed(model.f)
        sizes[grad, k, max_iter, again] = saved_bytes(lambda: model(*segment))[0]
    assert len({sizes[key] for key in sizes if key[0] in ("npg", "implicit")}) == 1
    assert sizes["upg", 5, 5, False] - sizes["upg", 1, 5, False] > 4 * 2 * 4 * 2000 * 8      # the hidden layer alone
    assert sizes["upg", 5, 5, True] - sizes["upg", 1, 5, False] < 2 * 4 * 2000 * 8


@pytest.mark.parametrize("grad", ["upg", "npg", "implicit"])
def test_computing_f_again_or_compiled_gives_the_same_gradients(grad, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    args = parse_args(f"--data toy --d-model 16 --n-head 2 --d-inner 24 --cutoffs 10 20 --grad {grad} --tol 0 "
                      "--max-iter 6".split())
    results = []
    for args.recompute, args.compile in ((False, False), (True, False), (False, True)):
        torch.manual_seed(0)
        model = deq_wikitext.build_model(args, range(60), CPU)
        segment = segments(model, 1)[0]
        out = model(*segment, regularize=True)
        (out.nll.mean() + 0.1 * out.jr).backward()
        results.append((out.nll, [p.grad for p in model.parameters()], out.jr))
    (nll, grads, jr), *others = results
    for nll_again, grads_again, jr_again in others:
        assert torch.allclose(nll, nll_again, atol=1e-5) and torch.allclose(jr, jr_again, atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads, grads_again))


@pytest.mark.parametrize("grad", ["upg", "npg", "implicit"])
def test_under_bf16_autocast_the_loss_and_gradient_stay_close(grad):
    """State, softmax and NLL are float32; bf16 has 8 bits, and the gradient is a product of some ten factors."""
    model, losses, grads = build(dtype=torch.float32, solve=solving(grad=grad)), [], []
    first, segment = segments(model, 2)
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = model(*segment, model(*first).memory, regularize=grad == "upg")
        assert out.nll.dtype == out.h.dtype == out.memory.h.dtype == torch.float32
        out.nll.mean().backward()
        losses.append(out.nll.mean().item())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert F.cosine_similarity(*grads, dim=0) > 0.97


def test_the_softmax_is_float32_also_under_autocast():
    """Logits are bf16 products, handed on in float32 whatever autocast does with a softmax; log p of them is exact."""
    model, h = build(dtype=torch.float32), 3 * torch.randn(40, 16)
    ids = torch.arange(40) % 10
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head, _ = model.softmax_parts(h)
        nll = model.nll(h, ids)
    exact = -head.double().log_softmax(1)[torch.arange(40), ids]
    assert head.dtype == nll.dtype == torch.float32 and (nll - exact).abs().max() < 1e-5


def test_models_are_copied_and_saved_whole():
    model, segment = build(**VARIANTS["deq-lm"]), segments(build(), 1)[0]
    other = build(seed=5, **VARIANTS["deq-lm"])
    assert not torch.equal(model(*segment).nll, other(*segment).nll)
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model)):
        assert torch.equal(model(*segment).nll, twin(*segment).nll)


# --- official checkpoints --------------------------------------------------------------------------------------------

def test_rows_are_regrouped_by_head_and_back():
    """Row s D + h d + a of locuslab/deq is row 3 d h + s d + a of deq-lm."""
    H, d = 3, 4
    D = H * d
    rows = torch.arange(3 * D)
    by_head = grouped_by_head(rows, H)
    for s, h, a in itertools.product(range(3), range(H), range(d)):
        assert by_head[3 * d * h + s * d + a] == s * D + h * d + a
    assert torch.equal(grouped_by_head(by_head, H, back=True), rows)


@pytest.mark.parametrize("lm, variant", [(False, "PostLN"), (False, "PreLN"), (True, "deq-lm")])
def test_official_checkpoints_come_back(lm, variant):
    """Random weights through both converters, in the dicts and under the prefix that the releases use."""
    model, segment = build(**VARIANTS[variant]), segments(build(), 1)[0]
    saved = official_state_dict(model, lm)
    for state in (saved, {"state_dict": {"module." + k: v for k, v in saved.items()}},
                  {**saved, "func_copy.dec_attn.r_w_bias": torch.zeros(1), "deq.func.x": torch.zeros(1)}):
        other = build(seed=7, **VARIANTS[variant])
        load_official(other, state)
        assert torch.equal(model(*segment).nll, other(*segment).nll)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert set(saved) - {"pos_emb.inv_freq"} >= set(official_names(model, lm).values())
    qkv = saved["func.dec_attn.0.qkv_net.weight_v" if lm else "func.dec_attn.qkv_net.weight_v"]
    assert qkv.shape == ((48, 16) if lm else (48, 16, 1))
    ours = model.blocks[0].qkv.parametrizations.weight.original1
    assert torch.equal(qkv.flatten(1), ours) == (not lm)


def test_checkpoints_without_weight_normalisation_give_the_same_function():
    model, segment = build(), segments(build(), 1)[0]
    saved = official_state_dict(model)
    for key in [k for k in saved if k.endswith("weight_v")]:
        g, v = saved.pop(key[:-1] + "g"), saved.pop(key)
        saved[key[:-2]] = g.view(-1, *[1] * (v.dim() - 1)) * v / v.flatten(1).norm(dim=1).view(-1, *[1] * (v.dim() - 1))
    other = build(seed=7)
    load_official(other, saved)
    assert torch.allclose(model(*segment).nll, other(*segment).nll, atol=1e-12)


def test_checkpoints_that_do_not_fit_are_refused_by_name():
    model = build()

    def message(**changes):
        saved = official_state_dict(model)
        for key, value in changes.items():
            if value is None:
                del saved[key]
            else:
                saved[key] = value
        with pytest.raises((ValueError, RuntimeError)) as error:
            load_official(model, saved)
        return " ".join(str(error.value).split())

    assert 'Missing key(s) in state_dict: "injection.bias"' in message(**{"inject_conv.bias": None})
    assert 'Unexpected key(s) in state_dict: "surprise"' in message(surprise=torch.zeros(1))
    assert "size mismatch for cluster_bias" in message(**{"crit.cluster_bias": torch.zeros(2)})
    untied = {"crit.out_layers.1.weight": torch.zeros(10, 8), "crit.out_projs.2.weight": torch.zeros(16, 4)}
    for key, value in untied.items():
        assert f"{key} differs from" in message(**{key: value})
    with pytest.raises(RuntimeError, match="Unexpected key.*ln"):
        load_official(model, official_state_dict(build(**VARIANTS["deq-lm"]), lm=True))


@pytest.mark.skipif("DEQ_PARITY" not in os.environ, reason="DEQ_PARITY=FILE names tensors made by the official release")
def test_official_numbers():
    """Relative error of whole tensors 1e-5 in float32 (1e-4 for the radius); NLLs in float64 1e-7."""
    parity = torch.load(os.environ["DEQ_PARITY"], weights_only=True)
    c, x, y = parity["config"], parity["inputs"], parity["expected"]
    model = DEQTransformer(c["n_token"], c["cutoffs"], c["d_model"], c["d_embed"], c["n_head"], c["d_inner"],
                           c["div_val"], pre_ln=c["pre_lnorm"], mem_len=c["mem_len"]).eval()
    load_official(model, parity["state_dict"])
    ids, targets = x["tokens"].transpose(1, 2), x["targets"].transpose(1, 2)            # (3, B, T)
    worst = {}

    def compare(name, ours, theirs, tolerance=1e-5):
        worst[name] = ((ours - theirs).norm() / theirs.norm()).item()
        assert worst[name] <= tolerance, (name, worst[name])

    def t(name, group=y):
        return group[name].transpose(1, 2)

    z, h_mem, u_mem, h0 = (t(name, x) for name in ("z", "mem_z", "mem_u", "h0"))
    e = model.embed(ids[0])
    u = torch.cat([u_mem, model.inject(e)], 1)
    compare("emb", e, y["emb"])
    compare("inj", model.inject(e), t("inj"))
    compare("pos_emb_mem", model.positions(u.shape[1], "cpu"), t("pos_emb_mem")[0])
    compare("attn_nomem", model.blocks[0].attention(z, model.constants(t("inj"), z[:, :0])[0]), t("attn_nomem"))
    compare("attn_mem", model.blocks[0].attention(z, model.constants(u, h_mem)[0]), t("attn_mem"))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            compare("F_nomem", model.f(z, model.inject(e)), t("F_nomem"))
            compare("F_mem", model.f(z, u, h_mem), t("F_mem"))
    model.local_size = c["local_size_probe"]
    compare("F_mem_local", model.f(z, u, h_mem), t("F_mem_local"))
    model.local_size = 1000
    m = x["dropout_masks"]
    masks = Masks(positions=m["pos_emb"][:, :, 0], blocks=(BlockMasks(m["attn_prob"], t("attn_out", m), m["ff_hidden"],
                                                                      m["ff_out"]),))
    compare("F_mem_dropout", model.f(z, u, h_mem, masks), t("F_mem_dropout"))
    compare("softmax_nll", model.nll(x["hidden"], x["hidden_targets"]), y["softmax_nll"])

    def three_segments(**settings):
        memory, nll = None, []
        with torch.no_grad():
            for i in range(3):
                out = model(ids[i], targets[i], memory, **settings)
                memory = out.memory
                nll.append(out.nll.T)
        return torch.stack(nll), memory

    model.solve = solving(solver=fixed_point, max_iter=400, tol=0.0)
    for name, settings in (("unroll", dict(unroll=c["unroll_K"])), ("fixedpoint", {})):
        nll, memory = three_segments(**settings)
        compare(f"{name}_nll", nll, y[f"{name}_nll"])
        compare(f"{name}_mem_z", memory.h.transpose(0, 1), y[f"{name}_mem_z"])
        compare(f"{name}_mem_u", memory.u.transpose(0, 1), y[f"{name}_mem_u"])

    names = {theirs: ours for ours, theirs in official_names(model, False).items()}

    def compare_gradients(name):
        """Tied tensors: the file has a gradient for each of their two names, or the sum for tables."""
        parameters, theirs = dict(model.named_parameters()), y[f"{name}_grads"]
        for key, value in theirs.items():
            if key not in names or parameters[names[key]].grad is None:
                continue
            tied = key.replace("word_emb.emb_projs", "crit.out_projs")
            if tied != key and tied in theirs and tied not in names:
                value = value + theirs[tied]
            compare(f"{name} {key}", parameters[names[key]].grad, value.reshape(parameters[names[key]].shape))

    def f_of_u():
        model.zero_grad()
        u = torch.cat([u_mem, model.inject(model.embed(ids[0]))], 1)
        return partial(model.f, u=u, constants=model.constants(u, h_mem))

    h = upg(f_of_u(), h0, c["upg_k"], c["upg_lambda"])
    compare("upg_h_k", h, t("upg_h_k"))
    h_star = fixed_point(f_of_u(), h0, max_iter=400, tol=0).h
    compare("ift_h_star", h_star, t("ift_h_star"))
    for name, state in (("upg", lambda f: upg(f, h0, c["upg_k"], c["upg_lambda"])),
                        ("npg", lambda f: npg(f, h0, c["upg_k"], c["upg_lambda"])),
                        ("ift", lambda f: implicit(f, h_star, solver=fixed_point, max_iter=300, tol=0))):
        loss = model.nll(state(f_of_u()), targets[0]).mean()
        compare(f"{name}_loss", loss, y[f"{name}_loss"])
        loss.backward()
        compare_gradients(name)
    model.zero_grad()
    u = torch.cat([u_mem, t("inj")], 1)
    f, leaf = partial(model.f, u=u, constants=model.constants(u, h_mem)), z.clone().requires_grad_()
    vjp, = torch.autograd.grad(f(leaf), leaf, t("jr_probe", x), create_graph=True)
    compare("jr_vJ", vjp, t("jr_vJ"))
    jr = vjp.square().sum() / vjp.numel()
    compare("jr_loss", jr, y["jr_loss"])
    jr.backward()
    compare_gradients("jr")
    compare("jac_rho_sample0", spectral_radius(f, z, n_iter=2000)[0], y["jac_rho_sample0"], 1e-4)
    probes = [jacobian_regularization(lambda h: model.f(h, u[:1], h_mem[:1]), z[:1]).item() for _ in range(400)]
    error = 5 * np.std(probes) / 20                      # five standard errors of the mean of 400
    assert np.mean(probes) == pytest.approx(y["jac_fro2_over_n_sample0"].item(), abs=error)

    model.double()
    x["hidden"] = x["hidden"].double()
    for name, settings in (("unroll", dict(unroll=c["unroll_K"])), ("fixedpoint", {})):
        compare(f"{name}_nll, float64", three_segments(**settings)[0], parity["expected_nll64"][f"{name}_nll"], 1e-7)
    nll = model.nll(x["hidden"], x["hidden_targets"])
    compare("softmax_nll, float64", nll, parity["expected_nll64"]["softmax_nll"], 1e-7)
    print(f"worst of {len(worst)}: {max(worst.items(), key=lambda item: item[1])}")


@pytest.mark.skipif("DEQ_PARITY" not in os.environ, reason="DEQ_PARITY=FILE names tensors made by the official release")
def test_official_vocabulary_and_batches(tmp_path):
    data = torch.load(os.environ["DEQ_PARITY"], weights_only=True)["data"]
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(data[f"{split}_text"])
    text = load_text(parse_args(["--data", str(tmp_path)]), CPU)
    assert text.vocabulary == data["idx2sym"]
    for split in ("train", "valid", "test"):
        assert torch.equal(getattr(text, split).long(), data[f"{split}_ids"].long())
    tokens, T = streams(text.train, data["bsz"]), data["tgt_len"]
    for s, batch in enumerate(data["batches"]):
        end = min((s + 1) * T, tokens.shape[1] - 1)
        assert torch.equal(tokens[:, s * T:end].T, batch["data"])
        assert torch.equal(tokens[:, s * T + 1:end + 1].T, batch["target"])
    assert end == tokens.shape[1] - 1


# --- data ------------------------------------------------------------------------------------------------------------

TRAIN = " \n = Title = \n \n the cat sat on the mat . The dog , the\tcat and . \n b a a <unk> B c \n"
VALID, TEST = " \n the dog sat \n", "a cat \n\n"


def write_text(root, train=TRAIN, valid=VALID, test=TEST, names="{}.txt"):
    root.mkdir(parents=True, exist_ok=True)
    for split, content in (("train", train), ("valid", valid), ("test", test)):
        (root / names.format(split)).write_text(content, newline="")
    return root


@pytest.mark.parametrize("names", ["{}.txt", "wiki.{}.tokens"])
def test_types_are_numbered_by_frequency_and_ties_by_appearance(tmp_path, names):
    """<eos> ends each line, blank ones too, is 0, and is not counted."""
    text = load_text(parse_args(["--data", str(write_text(tmp_path, names=names))]), CPU)
    assert text.vocabulary == ["<eos>", "the", "=", "cat", ".", "a", "Title", "sat", "on", "mat", "The", "dog", ",",
                               "and", "b", "<unk>", "B", "c"]
    words = [text.vocabulary[i] for i in text.train]
    assert words[:6] == ["<eos>", "=", "Title", "=", "<eos>", "<eos>"] and words.count("<eos>") == 5
    assert text.valid.tolist() == [0, 1, 11, 7, 0] and text.test.tolist() == [5, 3, 0, 0]
    assert text.train.dtype == torch.int32


def test_only_line_feeds_end_a_line(tmp_path):
    """A carriage return, a form feed or U+2028 is white space: str.splitlines would add an <eos> for each."""
    root = write_text(tmp_path, train="a " * 9 + "\rb\x0cc\u2028d \r\n e\n")
    text = load_text(parse_args(["--data", str(root), "--vocab", "all"]), CPU)
    assert [text.vocabulary[i] for i in text.train] == [*"a" * 9, "b", "c", "d", "<eos>", "e", "<eos>"]
    assert text.vocabulary[:2] == ["<eos>", "a"]                # the first, though not the most frequent


def test_a_type_that_training_lacks_is_named_and_can_be_taken_in(tmp_path, capsys):
    root = write_text(tmp_path, valid="the cat \n the zebra \n")
    with pytest.raises(SystemExit) as end:
        load_text(parse_args(["--data", str(root)]), CPU)
    message = capsys.readouterr().err
    assert end.value.code == 2 and "valid.txt, line 2" in message and "'zebra'" in message and "--vocab all" in message
    text = load_text(parse_args(["--data", str(root), "--vocab", "all"]), CPU)
    assert text.vocabulary[1:3] == ["the", "cat"] and text.vocabulary[-1] == "zebra"        # counted over all three
    assert text.valid.tolist() == [1, 2, 0, 1, len(text.vocabulary) - 1, 0]


@pytest.mark.parametrize("size", [1, 7, 30, 10 ** 6])
def test_a_text_in_parts_is_the_text(size, tmp_path, monkeypatch):
    """Parts end inside lines, words and letters of two bytes; two processes read them."""
    content = "the c\u00e4t\n\n sat on \u2028 the m\u00e4t \n" * 3 + "and the last line has no end"
    path, expected = write_text(tmp_path, train=content) / "train.txt", {"<eos>": 0}
    ids = [expected.setdefault(word, len(expected))
           for line in content.split("\n") for word in (*line.split(), "<eos>")]
    monkeypatch.setattr(deq_wikitext.os, "cpu_count", lambda: 2 if size == 30 else 1)
    number = {"<eos>": 0}
    assert deq_wikitext.read_tokens(path, number, size).tolist() == ids and number == expected


def test_nothing_is_kept_of_a_text_that_is_read(tmp_path):
    """Another text of the same size and time under the same name is another text."""
    args = parse_args(["--data", str(write_text(tmp_path))])
    load_text(args, CPU)
    before = os.stat(tmp_path / "train.txt")
    (tmp_path / "train.txt").write_text(TRAIN.replace("Title", "Other"))
    os.utime(tmp_path / "train.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "Other" in load_text(args, CPU).vocabulary
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.txt", "train.txt", "valid.txt"]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_byte_order_mark_is_no_part_of_a_word(split, tmp_path):
    """Notepad and Excel write one at the beginning of a UTF-8 file."""
    plain = load_text(parse_args(["--data", str(write_text(tmp_path / "plain"))]), CPU)
    path = write_text(tmp_path / "marked") / f"{split}.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    marked = load_text(parse_args(["--data", str(path.parent)]), CPU)
    assert marked.vocabulary == plain.vocabulary and all(map(torch.equal, plain[:3], marked[:3]))


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_eos_that_is_written_out_is_refused(split, tmp_path, capsys):
    root = write_text(tmp_path, **{split: "the cat <eos> \n the cat \n"})
    with pytest.raises(SystemExit):
        load_text(parse_args(["--data", str(root)]), CPU)
    assert f"{split}.txt: it has <eos> written out" in capsys.readouterr().err


@pytest.mark.parametrize("tokens, n, dropped, predicted, segments_of_150", [
    (217_646, 16, 14, 217_616, 91), (217_646, 10, 6, 217_630, 146), (217_646, 1, 0, 217_645, 1_451),
    (245_569, 16, 1, 245_552, 103), (245_569, 10, 9, 245_550, 164), (245_569, 1, 0, 245_568, 1_638)])
def test_streams_are_contiguous_and_predict_what_the_protocol_says(tokens, n, dropped, predicted, segments_of_150):
    """WikiText-103's valid and test in 16, 10 and 1 streams; the first token of each is not predicted."""
    text = streams(torch.arange(tokens), n)
    assert text.numel() == tokens - dropped and text.numel() - n == predicted
    assert (text[:, 1:] - text[:, :-1] == 1).all() and text[0, 0] == 0
    assert math.ceil((text.shape[1] - 1) / 150) == segments_of_150


def test_the_toy_texts_best_perplexities_are_those_of_its_source():
    """Measured on a text of it: the source's own predictions, and counts of which type follows which class."""
    text = toy_text(types=60, classes=4, sizes=(200_000, 1_000, 50_000))
    again = toy_text(types=60, classes=4, sizes=(200_000, 1_000, 50_000))
    assert torch.equal(text.train, again.train) and len(text.vocabulary) == 60 and text.train.max() < 60

    def perplexity(context):
        """Of counts of the next type after a context, learnt on train and measured on test."""
        counts = np.full((64, 60), 1e-3)
        ids, test = text.train.numpy(), text.test.numpy()
        np.add.at(counts, (context(ids), ids[2:]), 1)
        p = counts / counts.sum(1, keepdims=True)
        return math.exp(-np.log(p[context(test), test[2:]]).mean())

    two = perplexity(lambda ids: 4 * (ids[:-2] % 4) + ids[1:-1] % 4)
    one = perplexity(lambda ids: ids[1:-1] % 4)
    assert one == pytest.approx(text.best[0], rel=0.01) and two == pytest.approx(text.best[1], rel=0.01)
    assert text.best[0] > 1.3 * text.best[1]


# --- evaluation ------------------------------------------------------------------------------------------------------

def evaluation_args(*more):
    return parse_args(["--data", "toy", "--cutoffs", "10", "20", "--segment", "8", "--mem-len", "5", *map(str, more)])


def test_perplexity_is_that_of_all_predicted_tokens():
    """Streams one at a time, by hand; the last segment is shorter.  Solver and mode are given back."""
    args = evaluation_args("--eval-streams", 3, "--eval-max-iter", 9, "--tol", 0, "--eval-solver", "fixed-point")
    model = build(dropout=0.4)
    ids = torch.randint(0, 60, (3 * 21 + 2,), dtype=torch.int32)
    record = evaluate(model, "valid", ids, args, CPU, mem_len=7)
    assert model.training and model.solve.keywords["max_iter"] == 30
    model.eval()
    model.solve = solving(solver=fixed_point, max_iter=9, tol=0)
    total = 0
    with torch.no_grad():
        for stream in ids[:63].view(3, 21):
            memory = None
            for start in (0, 8, 16):
                end = min(start + 8, 20)
                out = model(stream[None, start:end], stream[None, start + 1:end + 1], memory, mem_len=7)
                memory, total = out.memory, total + out.nll.sum().item()
    assert record["valid_tokens"] == 60 and record["valid_evals"] == 10 and record["valid_mem_len"] == 7
    assert record["valid_perplexity"] == pytest.approx(math.exp(total / 60), rel=1e-9)


@pytest.mark.parametrize("solver, ahead", [("unrolled", False), ("broyden", True)])
def test_unrolled_evaluation_alone_never_looks_ahead(solver, ahead):
    """Another last token of the segment changes no earlier prediction; a solver that is cut off lets it."""
    args = evaluation_args("--eval-streams", 2, "--eval-max-iter", 4, "--tol", 1e-2, "--eval-solver", solver)
    model, nll = build(dropout=0.0), []
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)                   # far from solved after four steps
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    for last in (3, 50):
        ids[:, 7] = last
        with deq_wikitext.evaluating(model, args), torch.no_grad():
            nll.append(model(ids[:, :-1], ids[:, 1:], None, mem_len=5).nll.view(2, 8))
    change = (nll[0] - nll[1]).abs()
    assert (change[:, :6].max() > 1e-6) == ahead and change[:, 7].max() > 1e-2


def test_processes_divide_the_streams(monkeypatch):
    """Three streams over two processes and over five, of which two have none: the sums are those of one."""
    args, model = evaluation_args("--eval-streams", 3), build()
    ids = torch.randint(0, 60, (70,), dtype=torch.int32)
    expected = evaluate(model, "test", ids, args, CPU, 5)
    for world in (2, 5):
        sums = []
        monkeypatch.setattr(Process, "sum", lambda self, x: (sums.append(x.clone()), x + 1)[1])
        monkeypatch.setattr(Process, "gather", lambda self, value: [value])
        for rank in range(world):
            evaluate(model, "test", ids, args, Process(rank, world, torch.device("cpu")), 5)
        nll, count, evals, solves = sum(sums).tolist()
        assert count == 66 and nll / count == pytest.approx(expected["test_nll"], rel=1e-6)
        assert solves == 3 * min(world, 3) and evals / solves <= expected["test_evals"]     # of a batch: its slowest


def test_a_longer_memory_or_another_cut_into_segments_is_the_same_model():
    """At the fixed point and with a memory of the whole text, segments of 4 and of 16 give one perplexity."""
    model = build(mem_len=100)
    ids, found = torch.randint(0, 60, (2 * 33,), dtype=torch.int32), []
    for segment in (4, 16):
        args = evaluation_args("--eval-streams", 2, "--segment", segment, "--eval-solver", "fixed-point",
                               "--eval-max-iter", 300, "--tol", 1e-14)
        found.append(evaluate(model, "valid", ids, args, CPU, 100)["valid_nll"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_fresh_model_guesses_by_cluster():
    """Logits near 0: ln(head size) for a word of cluster 0, and ln(cluster size) more for the others."""
    model = build(trained=False, n_token=600, cutoffs=(100, 200, 400), d_model=32)
    ids = torch.arange(600).view(2, 300)
    nll = model(ids[:, :60], ids[:, 1:61]).nll
    for start in range(0, 600, 50):
        target = torch.arange(start + 1, min(start + 49, 600))[None]
        nll = model(target, target).nll
        i = sum(start >= edge for edge in (100, 200, 400))
        expected = math.log(103) + (math.log([100, 200, 200][i - 1]) if i else 0)
        assert nll.mean().item() == pytest.approx(expected, rel=0.02)
