"""`relay_fast.loop` around any module, against the loop as everybody writes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import relay_fast
from benchmarks.numerics import assert_bitwise, assert_close

POLICIES = ("none", "state", "every:2", "sqrt", "last:2", "budget:100000")
D = 6


class Users(nn.Module):
    """A module with a per-sequence and a shared argument, a frozen and an unused parameter."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(D, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, D))
        self.frozen = nn.Parameter(torch.randn(D), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("scale", torch.tensor(0.7))

    def forward(self, h: Tensor, x0: Tensor | None = None, shift: Tensor | float = 0.0) -> Tensor:
        new = h + self.scale * self.inner(h) + self.frozen
        return new + shift + (0 if x0 is None else 0.3 * x0)


def naive(module: nn.Module, x: Tensor, loops: list[int], truncate: int | None, x0: Tensor, shift):
    """Final state, and the states of every iteration, one sequence at a time."""
    final, states = [], [[] for _ in range(max(loops, default=0))]
    for i, count in enumerate(loops):
        h = x[i : i + 1]
        for t in range(1, count + 1):
            with torch.set_grad_enabled(truncate is None or t > count - truncate):
                h = module(h, x0=x0[i : i + 1], shift=shift)
            states[t - 1].append(h)
        final.append(h)
    return torch.cat([x[:0], *final]), [torch.cat(s) for s in states]


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]


def grad(loss: Tensor, module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    wanted = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    loops=st.lists(st.integers(0, 5), max_size=5),
    policy=st.sampled_from(POLICIES),
    truncate=st.sampled_from([None, 1, 2]),
    want_states=st.booleans(),
)
def test_equals_the_naive_loop(loops, policy, truncate, want_states) -> None:
    torch.manual_seed(0)
    module = Users().double()
    x, x0, shift = leaves((len(loops), 3, D), (len(loops), 3, D), (D,))
    arguments = {"per_row": {"x0": x0}, "shared": {"shift": shift}, "recompute": policy}
    final, states = naive(module, x, loops, truncate, x0, shift)
    got = relay_fast.loop(
        module, x, loops, truncate=truncate, return_states=want_states, **arguments
    )
    truth = states if want_states else [final]
    got = got if want_states else [got]
    weights = [torch.randn_like(s) for s in truth]
    loss = sum(((s * w).sum() for s, w in zip(truth, weights, strict=True)), x.sum() * 0)
    ours = sum(((s * w).sum() for s, w in zip(got, weights, strict=True)), x.sum() * 0)
    for t, (value, expected) in enumerate(zip(got, truth, strict=True), start=1):
        assert_close(f"state {t}", value, expected)
    expected = grad(loss, module, x, x0, shift)
    for i, value in enumerate(grad(ours, module, x, x0, shift)):
        assert_close(f"gradient {i}", value, expected[i])


class Mean(nn.Module):
    """Mixes the rows of each packed sequence."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, h: Tensor, cu_seqlens: Tensor, bias: Tensor) -> Tensor:
        lengths = cu_seqlens.diff().long()
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        mean = h.new_zeros(len(lengths), D).index_add(0, owner, h) / lengths[:, None]
        return h + self.linear(mean)[owner].tanh() + bias


@pytest.mark.parametrize("truncate", [None, 1])
@pytest.mark.parametrize("policy", POLICIES)
def test_packed(policy: str, truncate: int | None) -> None:
    module, lengths, loops = Mean().double(), [2, 4, 1, 3], [1, 3, 0, 3]
    x, bias = leaves((10, D), (10, D))
    out = relay_fast.loop(
        module,
        x,
        loops,
        cu_seqlens=[0, 2, 6, 7, 10],
        per_row={"bias": bias},
        recompute=policy,
        truncate=truncate,
    )
    parts = []
    for h, b, n, count in zip(x.split(lengths), bias.split(lengths), lengths, loops, strict=True):
        for t in range(1, count + 1):
            with torch.set_grad_enabled(truncate is None or t > count - truncate):
                h = module(h, torch.tensor([0, n]), b)
        parts.append(h)
    truth, g = torch.cat(parts), torch.randn_like(out)
    assert_close("output", out, truth)
    expected = grad((truth * g).sum(), module, x, bias)
    for i, value in enumerate(grad((out * g).sum(), module, x, bias)):
        assert_close(f"gradient {i}", value, expected[i])


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_dropout_draws_the_same_mask_in_recompute(policy: str) -> None:
    module = Users(dropout=0.5)
    x = torch.randn(3, 4, D, requires_grad=True)
    results = []
    for recompute in ("none", policy):
        torch.manual_seed(3)
        out = relay_fast.loop(module, x, [3, 5, 1], recompute=recompute)
        after = torch.rand(1)
        results.append([out, after, *grad(out.square().sum(), module, x)])
        torch.rand(7)  # backward must not depend on what is drawn meanwhile
    for i, (value, expected) in enumerate(zip(*results, strict=True)):
        assert_bitwise(f"{i}", value, expected)
    assert not torch.equal(relay_fast.loop(module, x, 2), relay_fast.loop(module, x, 2))


@pytest.mark.parametrize("policy", ["none", "state"])
def test_recomputation_leaves_the_generator_alone(policy: str) -> None:
    module, x = Users(dropout=0.5), torch.randn(2, 4, D, requires_grad=True)
    out = relay_fast.loop(module, x, 3, recompute=policy)
    before = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("policy", ["none", "every:2"])
def test_second_backward_and_accumulation(policy: str) -> None:
    module, x = Users(), torch.randn(2, 4, D, requires_grad=True)
    out = relay_fast.loop(module, x, 3, recompute=policy).square().sum()
    out.backward(retain_graph=True)
    once = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    out.backward()
    twice = [p.grad for p in module.parameters() if p.grad is not None]
    for a, b in zip(once, twice, strict=True):
        assert_bitwise("gradient", b, 2 * a)


@pytest.mark.parametrize("policy", ["none", "state"])
def test_autocast_reaches_the_module(policy: str) -> None:
    module, x = Users(), torch.randn(2, 4, D, requires_grad=True)
    seen = []
    hook = lambda *a: seen.append(a[2].dtype)
    module.inner[0].register_forward_hook(hook)
    with torch.autocast("cpu", torch.bfloat16):
        out = relay_fast.loop(module, x, 2, recompute=policy)
    out.sum().backward()
    assert set(seen) == {torch.bfloat16} and out.dtype == torch.float32
    assert len(seen) == (2 if policy == "none" else 4)


def test_no_grad_and_frozen() -> None:
    module, x = Users(), torch.randn(2, 4, D)
    with torch.no_grad():
        quiet = relay_fast.loop(module, x, 3)
    assert not quiet.requires_grad
    module.requires_grad_(False)
    assert not relay_fast.loop(module, x, 3).requires_grad
    out = relay_fast.loop(module, x.requires_grad_(), 3)
    assert_bitwise("output", out.detach(), quiet)
    out.sum().backward()
    assert x.grad.abs().max() > 0


def test_tied_weights_and_double_backward() -> None:
    module = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)).double()
    module[2].weight = module[0].weight
    (x,) = leaves((2, D))
    out, truth = relay_fast.loop(module, x, 2), module(module(x))
    expected = grad(truth.sum(), module, x)
    for i, value in enumerate(grad(out.sum(), module, x)):
        assert_close(f"gradient {i}", value, expected[i])
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(relay_fast.loop(module, x, 2).sum(), x, create_graph=True)


class Nested(nn.Module):
    def forward(self, h: Tensor, rows: list[Tensor], extra: dict, log: list) -> Tensor:
        log.append(len(h))
        gain, (shift, power) = extra["gain"], extra["more"]
        return h * gain + rows[0] * rows[1] + (shift + extra["again"]) ** power


@pytest.mark.parametrize("policy", ["none", "every:2"])
def test_tensors_in_lists_and_dicts_get_gradients(policy: str) -> None:
    x, a, b, gain, shift = leaves((3, 4, D), (3, 4, D), (3, 1, 1), (D,), (1,))
    loops, log = [1, 3, 2], []
    extra = {"gain": gain, "more": (shift, 2), "again": shift}
    arguments = {"per_row": {"rows": [a, b]}, "shared": {"extra": extra, "log": log}}
    out = relay_fast.loop(Nested(), x, loops, recompute=policy, **arguments)
    assert log == [3, 2, 1]  # without a tensor it is the caller's own
    truth = []
    for i, count in enumerate(loops):
        h = x[i]
        for _ in range(count):
            h = Nested()(h, [a[i], b[i]], extra, [])
        truth.append(h)
    truth = torch.stack(truth)
    assert_close("output", out, truth)
    expected = torch.autograd.grad(truth.square().sum(), [x, a, b, gain, shift])
    values = torch.autograd.grad(out.square().sum(), [x, a, b, gain, shift])
    for i, value in enumerate(values):
        assert_close(f"gradient {i}", value, expected[i])


class Holds(nn.Module):
    """Has a tensor that autograd knows and `parameters()` does not."""

    def __init__(self, tensor: Tensor):
        super().__init__()
        self.inner, self.held = nn.Linear(D, D), [tensor]

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(h) + self.held[0]


@pytest.mark.parametrize("policy", ["none", "state"])
def test_unregistered_tensors_are_refused(policy: str) -> None:
    x, secret = torch.randn(2, D), torch.randn(D, requires_grad=True)
    for tensor in (secret, secret * 2):
        with pytest.raises(RuntimeError, match=r"a tensor of shape \(6,\) that needs a gradient"):
            relay_fast.loop(Holds(tensor), x, 2, recompute=policy).sum().backward()
    relay_fast.loop(Holds(secret.detach()), x, 2, recompute=policy).sum().backward()
    with torch.no_grad():
        relay_fast.loop(Holds(secret), x, 2)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h * 1


class InPlace(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.add_(1)


def test_what_is_refused() -> None:
    x = torch.randn(2, 3, D)
    norm = nn.Sequential(nn.BatchNorm1d(3))
    cases = [
        (lambda: relay_fast.loop(norm, x, 2), RuntimeError, "0 .BatchNorm1d. updates running"),
        (lambda: relay_fast.loop(Counts(), x, 2), RuntimeError, "changed its buffer 'calls'"),
        (lambda: relay_fast.loop(InPlace(), x, 2), RuntimeError, "changed its input in place"),
        (lambda: relay_fast.loop(nn.Linear(D, 3), x, 2), ValueError, "must keep the shape"),
        (lambda: relay_fast.loop(Users(), x, -1), ValueError, "negative"),
        (lambda: relay_fast.loop(Users(), x, [1, 2, 3]), ValueError, "holds 2 sequences"),
        (lambda: relay_fast.loop(Users(), x, 1.5), TypeError, "must be integers"),
        (
            lambda: relay_fast.loop(Users(), x, 2, recompute="x"),
            ValueError,
            "policy 'x' is unknown",
        ),
        (lambda: relay_fast.loop(Users(), x, 2, return_states=[3]), ValueError, "in 1..2"),
        (lambda: relay_fast.loop(Users(), x, 2, truncate=-1), ValueError, "truncate = -1"),
        (
            lambda: relay_fast.loop(Users(), x, 2, per_row={"x0": x[:1]}),
            ValueError,
            r"per_row\['x0'\] has shape \(1, 3, 6\) but x has 2 rows",
        ),
        (
            lambda: relay_fast.loop(Users(), x, 2, per_row={"x0": [x, 3]}),
            TypeError,
            r"per_row\['x0'\]\[1\] is of type int, not a tensor: pass it in",
        ),
        (
            lambda: relay_fast.loop(Users(), x[0], 2, cu_seqlens=[0, 2]),
            ValueError,
            "cu_seqlens ends at 2 but x has 3 rows",
        ),
        (lambda: relay_fast.loop(Users(), x[0], 2, cu_seqlens=[]), ValueError, "start at 0, not"),
        (lambda: relay_fast.loop(Users(), x.long(), 2), TypeError, "embed the tokens first"),
        (lambda: relay_fast.loop(nn.LSTM(D, D), x, 2), TypeError, "a value of type tuple"),
        (
            lambda: relay_fast.loop(torch.tanh, x, 2),
            TypeError,
            "module is an object of type builtin",
        ),
        (lambda: relay_fast.loop(Users, x, 2), TypeError, "module is the class Users: give"),
        (
            lambda: relay_fast.loop(Users(), x, 2, per_row=[x]),
            TypeError,
            "per_row is an object of type list: give a dict",
        ),
        (lambda: relay_fast.loop(Users(), x[0, 0, 0], 2), ValueError, r"x has shape \(\): a state"),
        (lambda: relay_fast.loop(Users(), x, 2**70), ValueError, r"loops = .* below 2\*\*63"),
        (lambda: relay_fast.loop(Users(), x, [1, 2**64]), ValueError, r"loops = .* below 2\*\*63"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    relay_fast.loop(norm.eval(), x, 2)  # its buffers stand still


def test_transformer_layer_of_torch_with_padding_mask() -> None:
    layer = nn.TransformerEncoderLayer(D, 2, 8, dropout=0.1, batch_first=True).double()
    mask = torch.tensor([[False, False, True], [False, False, False]])
    (x,) = leaves((2, 3, D))
    loops = [1, 3]
    layer.eval()
    out = relay_fast.loop(layer, x, loops, per_row={"src_key_padding_mask": mask})
    for i, count in enumerate(loops):
        h = x[i : i + 1]
        for _ in range(count):
            h = layer(h, src_key_padding_mask=mask[i : i + 1])
        keep = ~mask[i]
        assert_close(f"sequence {i}", out[i][keep], h[0][keep], 1e-9)


class Two(nn.Module):
    """Uses one of its parameters only."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, h: Tensor, e: Tensor | None = None) -> Tensor:
        return torch.tanh(self.used(h))


@pytest.mark.parametrize("policy", ["none", "state", "sqrt"])
def test_unused_parameters_get_no_gradient(policy: str) -> None:
    """As in a plain loop: weight decay then leaves them alone."""
    module, x, e = Two(), torch.randn(2, 3, D), torch.randn(2, 3, D, requires_grad=True)
    for loops in (3, [1, 3]):
        module.zero_grad()
        relay_fast.loop(module, x, loops, per_row={"e": e}, recompute=policy).sum().backward()
        assert module.used.weight.grad.abs().sum() > 0
        assert [p.grad for p in (*module.unused.parameters(), e)] == [None] * 3
