"""What autograd, autocast, torch.func and modules that wrap others ask of hand-written passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import relay_fast
from benchmarks.numerics import assert_bitwise, assert_close
from relay_fast import functional as F
from relay_fast.batch.capacity import Capacity, CapacityBatch
from relay_fast.batch.plan import Plan
from relay_fast.decoding._inference import inference
from relay_fast.engine import block_iteration as block_module
from relay_fast.ops import dispatch
from relay_fast.training.cuda_graph import GraphedStep

D, ROWS = 8, 6
POLICIES = ("none", "state", "sqrt")
CU = torch.tensor([0, 2, 6])


class Case:
    """A differentiable function of x (ROWS, D) and its parameters, in fp64."""

    def __init__(self, function: Callable[[Tensor], Tensor], leaves: list[Tensor]):
        self.function, self.leaves = function, leaves

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def gradients(self, call: Callable[[], Tensor], x: Tensor) -> list[Tensor]:
        torch.manual_seed(1)  # of the dropout masks
        out = call()
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        return torch.autograd.grad((out * weights).sum(), [x, *self.leaves], materialize_grads=True,
                                   allow_unused=True)  # fmt: skip


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def layer_cases(dtype: torch.dtype = torch.float64) -> dict[str, Case]:
    torch.manual_seed(0)
    norm, qkv, out, up, gate, down, bias = (
        random(*shape, dtype=dtype)
        for shape in ((D,), (3 * D, D), (D, D), (16, D), (16, D), (D, 16), (D,))
    )
    swiglu = {"down_bias": bias, "activation": "swiglu"}
    return {
        "norm_linear": Case(lambda x: F.norm_linear(x, norm, qkv), [norm, qkv]),
        "attention": Case(lambda x: F.attention(torch.cat([x, x, x], 1), CU, 2), []),
        "linear_residual": Case(lambda x: F.linear_residual(x, out, x * 1, bias), [out, bias]),
        "mlp": Case(
            lambda x: F.mlp(x, norm, up, down, gate, **swiglu), [norm, up, down, gate, bias]
        ),
    }


def loop_cases() -> dict[str, Case]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.3), nn.Tanh()).double()
    cases = {}
    for policy in POLICIES:
        block = relay_fast.LoopedBlock(D, 2, 1, recompute=policy, dropout=0.1).double()
        weights = list(block.parameters())
        of_block = {"loops": [3, 2], "cu_seqlens": [0, 2, 6]}
        of_loop = {"loops": [3, 1, 2, 2, 0, 1], "recompute": policy}
        cases[f"block, {policy}"] = Case(lambda x, b=block, o=of_block: b(x, **o), weights)
        cases[f"states, {policy}"] = Case(
            lambda x, b=block, o=of_block: torch.cat(b(x, return_states=True, **o)), weights
        )
        cases[f"loop, {policy}"] = Case(
            lambda x, o=of_loop: relay_fast.loop(module, x, **o), list(module.parameters())
        )
    return cases


CASES = layer_cases() | loop_cases()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(2)
    return random(ROWS, D)


@pytest.mark.parametrize("name", CASES)
def test_checkpointing_and_offloading_around(name: str, x: Tensor) -> None:
    case = CASES[name]

    def offloaded() -> Tensor:
        with save_on_cpu():
            return case(x)

    truth = case.gradients(lambda: case(x), x)
    around = lambda: checkpoint(case, x, use_reentrant=False)
    for call in (around, offloaded):
        for value, expected in zip(case.gradients(call, x), truth, strict=True):
            assert_close(name, value, expected, 1e-13)


@pytest.mark.parametrize("name", [n for n in CASES if n[:6] not in ("attent", "states")])
def test_results_are_not_saved(name: str, x: Tensor) -> None:
    """So they may be changed in place, and are freed where they are dropped. (Attention's backward
    reads its result, as PyTorch's does.)"""
    case, packed = CASES[name], []
    pack = lambda t: packed.append(t.untyped_storage().data_ptr()) or t
    with saved_tensors_hooks(pack, lambda t: t):
        result = case(x)
    assert packed and result.untyped_storage().data_ptr() not in packed
    truth = case.gradients(lambda: torch.relu(case(x) * 2), x)
    values = case.gradients(lambda: torch.relu_(case(x).mul_(2)), x)
    for value, expected in zip(values, truth, strict=True):
        assert_close(name, value, expected, 1e-13)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_last_of_the_states_may_be_changed_in_place(policy: str, x: Tensor) -> None:
    block = relay_fast.LoopedBlock(D, 2, 1, recompute=policy).double()
    call = lambda: block(x, [3, 2], cu_seqlens=CU, return_states=True)
    case = Case(None, list(block.parameters()))
    truth = case.gradients(lambda: torch.cat([*call()[:-1], call()[-1] + 1]).square(), x)
    values = case.gradients(lambda: torch.cat([*(s := call())[:-1], s[-1].add_(1)]).square(), x)
    for value, expected in zip(values, truth, strict=True):
        assert_close(policy, value, expected, 1e-13)


def test_what_is_added_to_may_be_changed_in_place(x: Tensor) -> None:
    weight = random(D, D)
    residual = x * 1.0
    out = F.linear_residual(x, weight, residual)
    residual += 1.0
    values = torch.autograd.grad(out.square().sum(), [x, weight])
    plain = torch.nn.functional.linear(x, weight) + x
    for value, expected in zip(
        values, torch.autograd.grad(plain.square().sum(), [x, weight]), strict=True
    ):
        assert_close("gradient", value, expected, 1e-13)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", layer_cases())
def test_backward_inside_autocast_is_that_outside(name: str, dtype: torch.dtype | None) -> None:
    case, x = layer_cases(torch.float32)[name], random(ROWS, D, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        results = [case(x), case(x)]
    g = torch.linspace(-1, 1, results[0].numel()).view(results[0].shape).to(results[0].dtype)
    truth = torch.autograd.grad(results[0], [x, *case.leaves], g)
    with torch.autocast("cpu", torch.bfloat16):
        values = torch.autograd.grad(results[1], [x, *case.leaves], g)
    for value, expected in zip(values, truth, strict=True):
        assert_bitwise(name, value, expected)


def test_the_ops_do_not_see_the_callers_autocast() -> None:
    qkv = torch.randn(ROWS, 2 * D)
    arguments = ([qkv, CU], [True, True], 2, 1, False, "torch")
    truth = torch.ops.relay_fast.attention_fwd(*arguments)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise("attention", torch.ops.relay_fast.attention_fwd(*arguments)[0], truth)


def transforms(f: Callable[[Tensor], Tensor], x: Tensor) -> Iterator[Callable]:
    total = lambda x: f(x).sum()
    yield lambda: torch.func.grad(total)(x)
    yield lambda: torch.func.vjp(total, x)
    yield lambda: torch.func.jvp(total, (x,), (x,))
    yield lambda: torch.func.vmap(f)(torch.stack([x, x]))

    def dual() -> None:
        with forward_ad.dual_level():
            total(forward_ad.make_dual(x, x))

    yield dual
    yield torch.no_grad()(dual)


@pytest.mark.parametrize("name", [n for n in CASES if "states" not in n])
def test_transforms_that_would_be_lost_are_refused(name: str, x: Tensor) -> None:
    for run in transforms(CASES[name].function, x.detach()):
        with pytest.raises(
            RuntimeError, match=r"hand-written gradients do not support forward-mode AD"
        ):
            run()
    with forward_ad.dual_level():  # constants have no tangent to lose
        CASES[name](x)


def test_tangents_of_parameters_are_refused(x: Tensor) -> None:
    block = relay_fast.LoopedBlock(D, 2, 1).double()
    named = dict(block.named_parameters())

    def f(weight: Tensor) -> Tensor:
        return torch.func.functional_call(block, named | {"layers.0.up.weight": weight}, (x[None],))

    weight = named["layers.0.up.weight"].detach()
    with pytest.raises(RuntimeError, match="hand-written gradients do not support"):
        torch.func.jvp(f, (weight,), (weight,))


@pytest.mark.parametrize("policy", POLICIES)
def test_graphs_of_iterations_are_freed_as_the_callers_is(policy: str, x: Tensor) -> None:
    """Compiled modules donate buffers where the graph is used once."""
    seen = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return h * 2

        @staticmethod
        def backward(ctx, g):
            seen.append(torch._C._autograd._get_current_graph_task_keep_graph())
            return g * 2

    class Module(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return Looks.apply(h)

    out = relay_fast.loop(Module(), x, [3, 1, 2, 2, 1, 3], recompute=policy)
    out.sum().backward(retain_graph=True)
    assert seen == [policy == "none"] * 3
    out.sum().backward()
    assert seen[3:] == [False] * 3
    assert_close("gradient", x.grad[:2, 0], 2 * torch.tensor([8.0, 2.0]).double())


# Devices


class Cards:
    """Two cards, one of them current, of which `mine` holds every tensor on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.current, self.mine, self.launches = 0, 1, []
        monkeypatch.setattr(dispatch, "_is_current", lambda _: self.current == self.mine)
        monkeypatch.setattr(torch.cuda, "device", self.guard)

    @contextmanager
    def guard(self, _: torch.device) -> Iterator[None]:
        before, self.current = self.current, self.mine
        yield
        self.current = before

    def watch(self, op: Callable) -> Callable:
        @wraps(op)
        def launch(*args, **kwargs):
            self.launches.append((op.__name__, self.current))
            return op(*args, **kwargs)

        return launch


def test_every_launch_is_on_the_tensors_card(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    cards = Cards(monkeypatch)
    ops = F.Ops(*(op and cards.watch(op) for op in F.TORCH))
    monkeypatch.setattr(dispatch, "TORCH", ops)
    for case in CASES.values():
        case(x).sum().backward()
        with torch.no_grad():
            case(x)
    norm, head = random(D), random(11, D)
    rows = torch.arange(ROWS)
    F.row_cross_entropy(x, rows, rows, norm, head)[0].sum().backward()
    of_block = {"norm_linear", "attention", "linear_residual", "mlp"}
    wanted = {f"{name}_{way}" for name in of_block for way in ("fwd", "bwd")}
    seen = {name.removesuffix("_ref").removesuffix("_cpu") for name, _ in cards.launches}
    assert seen >= wanted | {"weight_grad", "cross_entropy_bwd"}
    engine_and_layers = [c for name, c in cards.launches if name != "cross_entropy_fwd_ref"]
    assert set(engine_and_layers) == {1} and cards.current == 0


def test_triton_launchers_go_to_their_first_tensors_card(monkeypatch) -> None:
    cards = Cards(monkeypatch)
    launch = dispatch._with_device_guard(cards.watch(lambda x, scale=1: x * scale))
    assert launch(torch.ones(2), scale=3).tolist() == [3, 3]
    with cards.guard(None):
        launch(torch.ones(2))
    assert [card for _, card in cards.launches] == [1, 1] and cards.current == 0
    assert all(hasattr(op, "__wrapped__") for op in dispatch._triton_ops())


def test_the_guard_asks_for_cuda_devices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: ("guard", device))
    assert dispatch.on_device(torch.device("cuda:1")) == ("guard", torch.device("cuda:1"))
    for kind in ("cpu", "meta", "cuda:0", "cuda"):
        assert isinstance(dispatch.on_device(torch.device(kind)), nullcontext)


def test_generation_and_graphs_work_on_the_models_card(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = Cards(monkeypatch)
    with inference(nn.Linear(2, 2)):
        assert cards.current == 1
    step = GraphedStep.__new__(GraphedStep)
    step.model = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(GraphedStep, "_step", lambda self, batch: (batch, cards.current))
    assert step("batch") == ("batch", 1) and cards.current == 0


def test_tensors_of_two_devices_are_named(x: Tensor) -> None:
    meta = torch.empty(ROWS, D, device="meta")
    block = relay_fast.LoopedBlock(D, 2, 1)
    with pytest.raises(ValueError, match=r"x is on meta and the parameter layers\.0.* on cpu"):
        block(meta[None], 2)
    with pytest.raises(ValueError, match="residual is on meta and a on cpu"):
        F.linear_residual(torch.randn(ROWS, D), torch.randn(D, D), meta)
    with pytest.raises(ValueError, match=r"x is on cpu and per_row\['y'\] on meta"):
        relay_fast.loop(nn.Identity(), x, 2, per_row={"y": meta})


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"n_kv_heads": 1, "dropout": 0.1, "state_noise": 0.1},
        {"injection": "concat", "loop_norm": "pre", "max_loops": 3},
    ],
    ids=str,
)
def test_the_default_device_does_not_matter(options: dict) -> None:
    block = relay_fast.LoopedBlock(D, 2, 1, **options)
    leaves = [torch.randn(1, ROWS, D).requires_grad_(), *block.parameters()]
    loops, g = torch.tensor([3]), torch.randn(1, ROWS, D)

    def gradients() -> list[Tensor]:
        torch.manual_seed(1)
        return torch.autograd.grad(block(leaves[0], loops), leaves, g, materialize_grads=True)

    truth = gradients()
    block_module._noise_table.cache_clear()
    with torch.device("meta"):
        values = gradients()
    for value, expected in zip(values, truth, strict=True):
        assert_bitwise(str(options), value, expected)


def test_tables_made_in_inference_mode_serve_training(x: Tensor) -> None:
    plan = Plan([2, 4, 3], [1, 3, 2])
    holder = CapacityBatch(Capacity((64, 64), (3, 3), (4, 4), 3, 8), "cpu")
    static = holder.plan
    with torch.inference_mode():
        static.write(Plan([2, 3], [2, 1]), holder._layout.views(holder._buffer)[: holder._indices])
        static.forget()
        made = [plan.layout(0, 2), plan.layout(1, 3), static.layout_of(static.row_ranges(1)[0])]
        tensors = [plan.tokens, plan.positions, plan.last_rows, plan.to_sorted, static.live(1)]
        tensors += [layout.cu_seqlens for layout in made] + [layout.slot for layout in made]
        tensors += [g.pad_mask for layout in made for g in layout.groups]
        tensors += [block_module._noise_table(3, torch.float32, torch.device("cpu"))]
        F.attention(x.detach().repeat(1, 3), torch.tensor([0, 1, 6]), 2)
    assert not any(t.is_inference() for t in tensors if t is not None)
    F.attention(torch.cat([x, x, x], 1), torch.tensor([0, 1, 6]), 2).sum().backward()


@pytest.mark.parametrize(
    ("impl", "policy"), [("torch", p) for p in POLICIES] + [("triton", "state")]
)
def test_the_layout_of_x_does_not_matter(impl: str, policy: str) -> None:
    block, rows = (
        relay_fast.LoopedBlock(16, 2, 1, impl="torch", recompute=policy),
        torch.randn(3, 16),
    )
    case, plain = Case(None, list(block.parameters())), rows.clone().requires_grad_()
    truth = case.gradients(lambda: block(plain[None], 2), plain)
    block.impl = impl
    given = rows.t().contiguous().t().requires_grad_()  # the output of a Conv1d, turned
    for value, expected in zip(
        case.gradients(lambda: block(given[None], 2), given), truth, strict=True
    ):
        assert_close(policy, value, expected, 1e-5)


# Wrappers


def replica(module: nn.Module) -> nn.Module:
    """What torch.nn.DataParallel makes on each card."""
    copy = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        if parameter is not None:
            setattr(copy, name, parameter * 1)
    copy._modules = {name: replica(part) for name, part in module._modules.items()}
    return copy


def test_replicas_of_data_parallel_are_refused_by_loop(x: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"DataParallel.*use torch.*DistributedDataParallel"):
        relay_fast.loop(replica(nn.Sequential(nn.Linear(D, D))), x.float(), 2)
