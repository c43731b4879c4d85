"""A user's own equilibrium layer, with nothing but common.py, inside what PyTorch offers to train a model.

The expected gradients are written by hand, without common.py.  Other tests of the gradients: test_phantom.py.
"""
import copy
import math
import operator
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch._dynamo
import torch._functorch.config
from processes import pair
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from common import Process, broyden, captured, cosine_similarity, equilibrium, init_process

GRADS = ("upg", "npg", "implicit")
K, LAM = 3, 0.6
SOLVE = dict(k=K, lam=LAM, solver=broyden, max_iter=60, tol=1e-13, backward_max_iter=60, backward_tol=1e-13)


class One(nn.Module):
    """Its state is a tensor."""

    def __init__(self, grad, **options):
        super().__init__()
        self.linear, self.options = nn.Linear(5, 5), {**SOLVE, "grad": grad, **options}

    def f(self, h, u):
        return torch.tanh(0.5 * self.linear(h) + u)

    def zeros(self, u):
        return torch.zeros_like(u)

    def forward(self, u):
        h, _ = equilibrium(partial(self.f, u=u), self.zeros(u), **self.options)
        return h


class Two(One):
    """Its state is a tuple of two tensors of different size, each a function of the other."""

    def __init__(self, grad, **options):
        super().__init__(grad, **options)
        self.down, self.up = nn.Linear(5, 3), nn.Linear(3, 5)

    def f(self, h, u):
        one = torch.tanh(0.5 * self.linear(h[0]) + 0.4 * self.up(h[1]) + u)
        return one, torch.tanh(0.5 * self.down(h[0]))

    def zeros(self, u):
        return torch.zeros_like(u), u.new_zeros(len(u), 3)


def every(test):
    """Each kind of state, each gradient."""
    return pytest.mark.parametrize("Model", [One, Two])(pytest.mark.parametrize("grad", GRADS)(test))


def build(Model, grad, device="cpu", dtype=torch.float64, N=4, **options):
    """(model, u); float64, so that no TF32 is involved."""
    torch.manual_seed(0)
    model, u = Model(grad, **options), torch.randn(N, 5)
    return model.to(device, dtype), u.to(device, dtype)


def parts(h):
    return (h,) if torch.is_tensor(h) else h


def loss_of(h):
    return sum((p ** 3).sum() for p in parts(h))


def by_hand(model, u):
    """Autograd through 100 plain iterations, which have converged; for phantom gradients K damped steps more.

    That is UPG's definition, and at a fixed point NPG equals it.
    """
    h, exact = model.zeros(u), model.options["grad"] == "implicit"
    with torch.set_grad_enabled(exact):
        for _ in range(100):
            h = model.f(h, u)
    for _ in range(0 if exact else K):
        f_h = model.f(h, u)
        h = (1 - LAM) * h + LAM * f_h if torch.is_tensor(h) else [(1 - LAM) * a + LAM * b
                                                                  for a, b in zip(h, f_h)]
    return torch.autograd.grad(loss_of(h), list(model.parameters()))


def left_in(model):
    """The gradients that backward has left; the next backward begins anew."""
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    return grads


def assert_equal(got, expected):
    assert all(e.abs().max() > 1e-3 for e in expected) and len(got) == len(expected)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


DEVICES = ["cpu", pytest.param("cuda",
                               marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@every
def test_the_gradient_is_the_one_written_by_hand(Model, grad, device):
    model, u = build(Model, grad, device)
    h = model(u)
    assert type(h) is type(model.zeros(u)) and all(p.device.type == device for p in parts(h))
    loss_of(h).backward()
    assert_equal(left_in(model), by_hand(model, u))


@pytest.mark.parametrize("device", DEVICES)
@every
def test_bf16_autocast_reaches_every_weight(Model, grad, device):
    """The trap: a leaf weight cast under no_grad sits in autocast's cache without a graph: no gradient.

    (torch 2.14 no longer has it.)  The state stays float32.  bf16 has 8 bits of mantissa, 0.4 % per
    operation; a few operations in a row: cosine above 0.999, norm to 3 %.
    """
    model, u = build(Model, grad, device, torch.float32, N=64, max_iter=20, tol=0.0, backward_max_iter=20,
                     backward_tol=0.0)
    exact = by_hand(model, u)
    for backward_too in (False, True):
        with torch.autocast(device, dtype=torch.bfloat16):
            h = model(u)
            assert all(p.dtype == torch.float32 for p in parts(h)) and model.linear(u).dtype == torch.bfloat16
            loss = loss_of(h)
            if backward_too:
                loss.backward()
        if not backward_too:
            loss.backward()
        rough = left_in(model)
        assert cosine_similarity(rough, exact) > 0.999
        for a, b in zip(rough, exact):
            assert a.dtype == torch.float32 and abs(a.norm() / b.norm() - 1) < 0.03


@every
def test_gradients_accumulate(Model, grad):
    model, u = build(Model, grad)
    for part in u.split(2):
        loss_of(model(part)).backward()
    assert_equal(left_in(model), by_hand(model, u))


# --- processes ----------------------------------------------------------------------------------------------

def train_together(folder):
    """One of two processes: each model's gradients under DistributedDataParallel on half of the batch."""
    process, results = init_process(), {}
    for Model in (One, Two):
        for grad in GRADS:
            model, u = build(Model, grad)
            net, own = DistributedDataParallel(model), u.chunk(2)[process.rank]
            for _ in range(2):                  # twice: the reducer must be ready again after the first
                loss_of(net(own)).backward()
                results[Model.__name__, grad] = left_in(model)
            with net.no_sync():
                loss_of(net(own[:1])).backward()
            loss_of(net(own[1:])).backward()
            results[Model.__name__, grad, "accumulated"] = left_in(model)
    torch.save(results, folder / f"{process.rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradient_of_one(tmp_path):
    """gloo; DistributedDataParallel averages the two halves' gradients.  Also accumulated, with no_sync."""
    for rank, process in enumerate(pair(tmp_path / "log", train_together, tmp_path)):
        process.finish()
        results = torch.load(tmp_path / f"{rank}.pt")
        assert len(results) == 2 * 3 * 2
        for name, got in results.items():
            assert_equal([2 * g for g in got], by_hand(*build({"One": One, "Two": Two}[name[0]], name[1])))


# --- compilation --------------------------------------------------------------------------------------------

@every
def test_f_can_be_compiled(Model, grad):
    """Recommended: f is compiled once, without a graph break, for the solver and for the gradient."""
    model, u = build(Model, grad)
    expected = by_hand(model, u)
    torch._dynamo.reset()
    model.f = torch.compile(model.f, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        loss_of(model(u)).backward()
        assert_equal(left_in(model), expected)


def test_a_compiled_f_must_not_donate_its_buffers():
    """npg and implicit run the backward of one graph repeatedly; the first may overwrite a donated buffer.

    torch gives none away if a graph's first backward keeps it, so npg alone works.  After upg's, or with the
    compile cache of a run of upg, it refuses: torch._functorch.config.donated_buffer has to be False before f
    is compiled.
    """
    class Deep(One):
        def f(self, h, u):        # several operations, so that there is an intermediate to donate
            return torch.tanh(torch.relu(torch.sigmoid(self.linear(h)) * h.sin() + u) * 0.5 + self.linear(u))

    for donate in (True, False):
        torch._dynamo.reset()
        with torch._functorch.config.patch(donated_buffer=donate):
            model, u = build(Deep, "upg")
            model.f = torch.compile(model.f, backend="aot_eager")
            for grad in GRADS:
                model.options["grad"] = grad
                loss = loss_of(model(u))
                if donate and grad != "upg":
                    with pytest.raises(RuntimeError, match="donated buffers"):
                        loss.backward()
                    continue
                loss.backward()
                assert_equal(left_in(model), by_hand(build(Deep, grad)[0], u))


@pytest.mark.parametrize("Model, grads", [(One, ("upg", "npg")), (Two, ("implicit",))])
def test_the_whole_model_can_be_compiled(Model, grads):
    """torch.compile leaves the compiled code where the solver asks whether it is done (a graph break)."""
    torch._dynamo.reset()
    for grad in grads:
        model, u = build(Model, grad, max_iter=3, backward_max_iter=3)
        loss_of(model(u)).backward()
        expected = left_in(model)
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            loss_of(compiled(u)).backward()
            assert_equal(left_in(model), expected)


def test_a_graph_of_the_whole_model_without_a_break_is_refused():
    """fullgraph=True: how often the solver calls f depends on the data.

    torch's message names the solver's line.
    """
    model, u = build(One, "upg")
    torch._dynamo.reset()
    with pytest.raises(Exception, match="finished") as refusal:
        torch.compile(model, backend="eager", fullgraph=True)(u)
    assert isinstance(refusal.value, torch._dynamo.exc.TorchDynamoException)


def test_a_captured_model_is_replayed_only_where_it_can_be(monkeypatch):
    """What `captured` adds to torch's make_graphed_callables, here a stand-in; on a GPU: test_gpu.py."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x, unroll=0, name=None):
            return f"eager {unroll} {name}" if self.norm(x).isfinite().all() else "not finite"

    def capture(model, examples, allow_unused_input):
        assert allow_unused_input and not torch.is_autocast_cache_enabled()
        model(*examples)                        # a warm-up, which changes the statistics and draws numbers
        torch.rand(3)
        model.forward = lambda x: "replayed"

    fork_rng, devices = torch.random.fork_rng, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 7)
    monkeypatch.setattr(torch.random, "fork_rng", lambda given: (devices.extend(given), fork_rng([]))[1])
    torch.manual_seed(0)
    model, x, state = Net(), torch.randn(4, 3), torch.get_rng_state()
    with pytest.raises(ValueError, match="needs a GPU"):
        captured(model, x)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="takes an nn.Module, got function"):
        captured(lambda h: h, x)
    with pytest.raises(ValueError, match="training mode"):
        captured(model.eval(), x)
    plain, before = model.train(), copy.deepcopy(model.state_dict())
    model = captured(plain, x)
    assert devices == [7] and all(map(operator.is_, model.parameters(), plain.parameters()))
    assert torch.equal(torch.get_rng_state(), state) and torch.is_autocast_cache_enabled()
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in before.items())
    assert plain(x) == "eager 0 None" and "forward" not in vars(plain)          # as it was
    assert model(x) == model(x + 1) == "replayed"
    for other in (x[:2], x.double(), x.clone().requires_grad_()):
        assert model.to(other.dtype)(other) == "eager 0 None"
    assert model.float()(x, 3) == "eager 3 None" and model(x, unroll=0) == "eager 0 None"
    assert model(x, name="a") == "eager 0 a"
    assert model.eval()(x) == "eager 0 None" and model.train()(x) == "replayed"
    with torch.no_grad():
        assert model(x) == "eager 0 None"
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.fill_(math.nan)
    assert other(x) == "not finite" and model(x) == "replayed"                  # a copy has its own weights
    with pytest.raises(ValueError, match="captured before"):
        captured(model, x)
    assert captured(plain, x)(x) == "replayed"
    gone = weakref.ref(model)
    del model
    assert gone() is None                                   # it is in no cycle that would keep its graphs


# --- checkpointing, functional calls, copies ----------------------------------------------------------------

@pytest.mark.parametrize("use_reentrant", [False, True])
@every
def test_the_model_can_be_checkpointed(Model, grad, use_reentrant):
    """The solve runs twice, the second time for the backward pass."""
    model, u = build(Model, grad)
    loss_of(checkpoint(model, u.clone().requires_grad_(), use_reentrant=use_reentrant)).backward()
    assert_equal(left_in(model), by_hand(model, u))


@every
def test_a_reentrant_checkpoint_wants_an_input_with_a_gradient(Model, grad):
    """torch's own rule for any model: without one it warns, and there is no gradient.

    The other kind needs none.
    """
    model, u = build(Model, grad)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        assert not any(p.requires_grad for p in parts(checkpoint(model, u, use_reentrant=True)))
    loss_of(checkpoint(model, u, use_reentrant=False)).backward()
    assert_equal(left_in(model), by_hand(model, u))


@pytest.mark.parametrize("script", ["mdeq_cifar", "mdeq_imagenet", "deq_wikitext"])
def test_torch_compiles_f_whole(script):
    """One graph, so that a compiled F has one launch per kernel and fits into a CUDA graph."""
    module, process = __import__(script), Process(0, 1, torch.device("cpu"))
    args = module.parse_args(["--data", "toy"])
    if script == "deq_wikitext":
        model = module.build_model(args, range(2000), process)
        f, h, *_ = model.segment(torch.zeros(2, 8, dtype=torch.long))
    else:
        model = module.build_model(args, 10, process)
        f, h = model.problem(torch.zeros(2, 3, 64, 64))
    with torch.no_grad():
        expected = f(h)
        found = torch.compile(f, fullgraph=True, backend="eager")(h)
    for a, b in zip([*expected], [*found]):
        assert torch.equal(a, b)


@every
def test_f_can_be_checkpointed(Model, grad):
    """What is recomputed is one call of f, for npg and implicit at every product with its Jacobian."""
    model, u = build(Model, grad)
    expected, f = by_hand(model, u), model.f
    model.f = lambda h, u: checkpoint(f, h, u, use_reentrant=False)
    loss_of(model(u)).backward()
    assert_equal(left_in(model), expected)


@pytest.mark.parametrize("grad", GRADS)
def test_a_reentrant_checkpoint_inside_f_is_wrong_or_refused(grad):
    """torch refuses npg's and implicit's products with the Jacobian, which autograd.grad takes.

    upg's first step has no input with a gradient, so that what this step gives the weight is lost; torch's
    warning does not help, as it comes in the solve already.
    """
    model, u = build(One, grad)
    expected, linear = by_hand(model, u), model.linear
    model.f = lambda h, u: torch.tanh(0.5 * checkpoint(linear, h,
                                                       use_reentrant=True) + 0 * linear.bias.sum() + u)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = loss_of(model(u))
        if grad != "upg":
            with pytest.raises(RuntimeError, match=r"\.grad\(\)"):
                loss.backward()
            return
        loss.backward()
    lost = model.linear.weight.grad - expected[0]
    assert 0.01 < lost.norm() / expected[0].norm() < 1


@every
def test_functional_calls_and_copies_have_gradients_of_their_own(Model, grad):
    """They reach the substituted parameters, and not the model's."""
    model, u = build(Model, grad)
    expected = by_hand(model, u)
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    loss_of(torch.func.functional_call(model, params, (u,))).backward()
    assert_equal([p.grad for p in params.values()], expected)
    assert left_in(model) == [None] * len(params)
    model.load_state_dict(params)
    clone = copy.deepcopy(model)
    loss_of(clone(u)).backward()
    assert_equal(left_in(clone), expected)
    assert left_in(model) == [None] * len(params)
