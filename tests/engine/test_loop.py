"""The engine against eager autograd in fp64, and what it draws and reads back."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.numerics import assert_bitwise, assert_close
from relay_fast.batch.plan import Plan
from relay_fast.engine.loop import iterate, run_loop
from relay_fast.ops.gradients import GATHER_ROWS
from tests.support.loop_cases import POLICIES, Case, check, gradients, make_inputs, relay, run_all


@pytest.mark.parametrize("truncate", [None, 2])
@pytest.mark.parametrize("injection", ["none", "add", "concat"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_eager(policy: str, causal: bool, injection: str, truncate: int | None) -> None:
    options = {"causal": causal, "injection": injection}
    check(Case(options=options, policy=policy, truncate=truncate, readout=True, states=(2, 4)))


@pytest.mark.parametrize(
    "options",
    [
        {"loop_norm": "pre", "injection": "concat"},
        {"loop_norm": "post", "norm": "layer", "bias": True},
        {"max_loops": 6, "loop_norm": "pre", "injection": "add"},
        {"n_kv_heads": 1, "activation": "swiglu", "bias": True, "norm": "layer"},
        {"activation": "relu2", "rope_base": None, "d_hidden": 5},
        {"activation": "gelu", "n_layers": 1},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)
@pytest.mark.parametrize("policy", ["none", "state", "every:2"])
def test_block_options(policy: str, options: dict) -> None:
    check(Case(options=options, policy=policy, states=(1, 5)))
    check(Case(options=options, policy=policy, readout=True, truncate=1))


SHAPES = {
    "empty batch": ((), ()),
    "nothing loops": ((3, 2), (0, 0)),
    "one token": ((1,), (3,)),
    "length one": ((1, 1, 1), (1, 4, 2)),
    "all equal": ((4, 4, 4), (3, 3, 3)),
    "one giant": ((2, 61, 1), (2, 2, 5)),
    "giant ends first": ((61, 2), (1, 6)),
    "no tokens, yet loops": ((0, 3, 0), (7, 2, 1)),
    "already sorted": ((5, 2, 3), (4, 2, 0)),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(shape: str, policy: str) -> None:
    lengths, loops = SHAPES[shape]
    check(
        Case(
            lengths,
            loops,
            policy=policy,
            readout=True,
            states=(1,) if max(loops, default=0) else (),
        )
    )


@st.composite
def cases(draw) -> Case:
    sequences = draw(st.integers(0, 6))
    ints = lambda most: tuple(
        draw(st.lists(st.integers(0, most), min_size=sequences, max_size=sequences))
    )
    lengths, loops = ints(9), ints(6)
    if draw(st.booleans()) and sequences:
        loops = (draw(st.integers(0, 6)),) * sequences
    top = max(loops, default=0)
    states = draw(st.sets(st.integers(1, top))) if top else set()
    options = {
        "causal": draw(st.booleans()),
        "injection": draw(st.sampled_from(["none", "add", "concat"])),
        "loop_norm": draw(st.sampled_from(["none", "pre", "post"])),
        "max_loops": draw(st.sampled_from([0, 6])),
        "norm": draw(st.sampled_from(["rms", "layer"])),
        "bias": draw(st.booleans()),
        "activation": draw(st.sampled_from(["gelu_tanh", "gelu", "relu2", "swiglu"])),
        "n_kv_heads": draw(st.sampled_from([None, 1])),
        "n_layers": draw(st.integers(1, 2)),
    }
    return Case(
        lengths,
        loops,
        options,
        policy=draw(st.sampled_from(POLICIES)),
        states=tuple(sorted(states)),
        final=draw(st.booleans()),
        truncate=draw(st.sampled_from([None, 1, 2, 5])),
        readout=draw(st.booleans()),
        gather_rows=draw(st.sampled_from([0, 5, GATHER_ROWS])),
        seed=draw(st.integers(0, 3)),
    )


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(cases())
def test_equals_eager_everywhere(case: Case) -> None:
    check(case)


BITWISE = [
    Case(readout=True),
    Case(readout=True, states=(2, 3), options={"injection": "concat", "loop_norm": "pre"}),
    Case(truncate=2, readout=True, options={"causal": True}),
    Case(truncate=2, states=(1, 2, 3, 4, 5)),
    Case(training=True, options={"dropout": 0.3, "state_noise": 0.1}, readout=True),
    # Long enough for gathered and for single weight gradients.
    Case(lengths=(90, 200, 31), loops=(7, 3, 9), readout=True, gather_rows=128),
]


@pytest.mark.parametrize("case", BITWISE)
def test_bitwise_between_runs_and_policies(case: Case) -> None:
    first = run_all(replace(case, policy="none"))
    for policy in ("none", *POLICIES):
        again = run_all(replace(case, policy=policy))
        for name, value in first.items():
            assert_bitwise(f"{name} under {policy}", again[name], value)


@pytest.mark.parametrize("rows", [0, 1, 50, 10_000])
def test_gathering_changes_rounding_only(rows: int) -> None:
    case = Case(readout=True, options={"injection": "concat"})
    truth = run_all(replace(case, gather_rows=0), torch.float64)
    for name, value in run_all(replace(case, gather_rows=rows), torch.float64).items():
        assert_close(name, value, truth[name], 1e-12)


FREEZE = {
    "input": lambda n: n == "x",
    "parameters": lambda n: n not in ("x", "norm", "head"),
    "readout": lambda n: n in ("norm", "head"),
    "all but input": lambda n: n != "x",
    "all but head": lambda n: n != "head",
    "all but one": lambda n: n != "layers.0.up.weight",
    "norms": lambda n: "norm" in n,
    "injection": lambda n: "injection" in n or "embedding" in n,
}


@pytest.mark.parametrize("policy", ["none", "state", "sqrt"])
@pytest.mark.parametrize("which", FREEZE)
def test_frozen_leaves_change_nothing_else(which: str, policy: str) -> None:
    case = Case(
        policy=policy, readout=True, states=(3,), options={"injection": "concat", "max_loops": 5}
    )
    inputs = make_inputs(case)
    full = gradients(relay(case, inputs)[0], inputs.leaves)
    for name, leaf in inputs.leaves.items():
        leaf.requires_grad_(not FREEZE[which](name))
    some = gradients(relay(case, inputs)[0], inputs.leaves)
    assert 0 < len(some) < len(full)
    for name, value in some.items():
        assert_bitwise(name, value, full[name])


@pytest.mark.parametrize("policy", ["state", "every:2"])
def test_all_frozen_but_head_runs_no_iteration_backward(monkeypatch, policy: str) -> None:
    case = Case(policy=policy, readout=True)
    inputs = make_inputs(case)
    for name, leaf in inputs.leaves.items():
        leaf.requires_grad_(name == "head")
    loss, _ = relay(case, inputs)
    refuse = lambda *_: pytest.fail("an iteration ran backward for nothing")
    monkeypatch.setattr("relay_fast.engine.block_iteration.BlockIteration.backward", refuse)
    assert gradients(loss, inputs.leaves)["head"].abs().max() > 0


def test_iterate_yields_every_state() -> None:
    case = Case(states=(1, 2, 3, 4, 5))
    inputs = make_inputs(case)
    truth = relay(case, inputs)[1]
    seen = 0
    for t, state in iterate(inputs.block.run(case.plan), inputs.x, list(inputs.block.parameters())):
        assert_bitwise(f"state {t}", state, truth[f"state {t}"].detach())
        seen += 1
    assert seen == 5


class NoReadBack(TorchDispatchMode):
    """Refuses everything that would make the host wait for the device."""

    FORBIDDEN = frozenset(
        "_local_scalar_dense item nonzero is_nonzero masked_select equal allclose "
        "_unique _unique2 unique_dim unique_consecutive".split()
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.FORBIDDEN:
            raise AssertionError(f"{name} reads a tensor back to Python")
        if name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1]):
            raise AssertionError("indexing by a mask has a shape that depends on data")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["none", "state", "sqrt", "last:2"])
def test_nothing_is_read_back_after_the_plan(monkeypatch, policy: str) -> None:
    case = Case(
        policy=policy,
        training=True,
        readout=True,
        states=(2,),
        truncate=4,
        options={"dropout": 0.1, "state_noise": 0.1, "injection": "concat", "loop_norm": "pre"},
    )
    inputs, plan = make_inputs(case), case.plan
    monkeypatch.setattr(Case, "plan", plan)
    warm, _ = relay(case, inputs)
    gradients(warm, inputs.leaves)
    refuse = partial(pytest.fail, "the host wrote or read a tensor")
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, name, lambda *_, **__: refuse())
    # After the first step not even an index goes to the device: a CUDA graph can hold the step.
    monkeypatch.setattr(Plan, "_tensor", lambda *_: refuse())
    with NoReadBack():
        loss, _ = relay(case, inputs)
        loss.backward()
    monkeypatch.undo()
    assert all(leaf.grad.isfinite().all() and leaf.grad.any() for leaf in inputs.leaves.values())


def test_gradient_accumulation_and_scaling() -> None:
    case = Case(readout=True)
    inputs = make_inputs(case)
    once = gradients(relay(case, inputs)[0], inputs.leaves)
    for _ in range(2):
        (relay(case, inputs)[0] * 1024).backward()
    for name, leaf in inputs.leaves.items():
        assert_close(name, leaf.grad / 2048, once[name], 1e-14)


def test_second_backward_over_a_retained_graph() -> None:
    for policy in ("none", "every:2"):
        case = Case(readout=True, policy=policy)
        inputs = make_inputs(case)
        loss, _ = relay(case, inputs)
        first = gradients(loss, inputs.leaves, retain_graph=True)
        for name, value in gradients(loss, inputs.leaves).items():
            assert_bitwise(name, value, first[name])
        with pytest.raises(RuntimeError, match="a second time"):
            gradients(loss, inputs.leaves)


def test_double_backward_is_refused() -> None:
    # Even where it would only see constants (a loss that is linear in the outputs).
    inputs = make_inputs(Case())
    loss, _ = relay(Case(), inputs)
    with pytest.raises(RuntimeError, match="call backward without create_graph=True"):
        torch.autograd.grad(loss, inputs.x, create_graph=True)


@pytest.mark.parametrize("policy", ["none", "state", "sqrt"])
def test_outputs_that_backward_does_not_read_may_be_changed_in_place(policy: str) -> None:
    case = Case(policy=policy, states=(len(Case().plan.active_rows),))
    inputs = make_inputs(case)
    run = inputs.block.run(case.plan, states=case.states)
    parameters = list(inputs.block.parameters())
    grads = []
    for edit in (Tensor.mul, Tensor.mul_):
        final, states, *_ = run_loop(run, inputs.x, parameters)
        total = edit(final, inputs.g_final).square().sum() + edit(states, 3.0).square().sum()
        grads.append(gradients(total, {"x": inputs.x, **dict(inputs.block.named_parameters())}))
    for name, value in grads[1].items():
        assert_close(name, value, grads[0][name], 1e-13)


@pytest.mark.parametrize("read", ["the last state, by the readout", "a state before it"])
def test_an_output_that_backward_reads_changed_in_place_is_noticed(read: str) -> None:
    case = Case(readout="readout" in read, states=() if "readout" in read else (1,))
    inputs = make_inputs(case)
    total, outputs = relay(case, inputs)
    with torch.no_grad():
        outputs["final" if case.readout else "state 1"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("policy", ["none", "state", "sqrt"])
def test_autocast(policy: str) -> None:
    case = Case(readout=True, policy=policy)
    inputs = make_inputs(case, torch.float32)
    truth_loss, truth = relay(case, inputs)
    truth_grads = gradients(truth_loss, inputs.leaves)
    with torch.autocast("cpu", torch.bfloat16):
        loss, outputs = relay(case, inputs)
    grads = gradients(loss, inputs.leaves)  # outside of autocast, as users do
    assert outputs["final"].dtype == torch.float32  # the state's dtype, not the GEMMs'
    for name, value in {**outputs, **grads}.items():
        assert_close(name, value, {**truth, **truth_grads}[name], 0.1)
    assert not torch.equal(outputs["final"], truth["final"])


def test_dropout_differs_between_calls_and_not_in_eval() -> None:
    case = Case(training=True, options={"dropout": 0.5})
    inputs = make_inputs(case)
    first, second = (relay(case, inputs)[1]["final"] for _ in range(2))
    assert not torch.equal(first, second)
    inputs.block.eval()
    assert_bitwise("eval", *(relay(case, inputs)[1]["final"] for _ in range(2)))


def test_dropout_gradient_by_finite_differences() -> None:
    case = Case(lengths=(3, 2), loops=(3, 1), training=True, options={"dropout": 0.4})
    inputs = make_inputs(case)

    def loss() -> Tensor:
        torch.manual_seed(5)
        return relay(case, inputs)[0]

    grads = gradients(loss(), inputs.leaves)
    for name, leaf in inputs.leaves.items():
        direction = torch.randn_like(leaf)
        with torch.no_grad():
            step = 1e-6 * direction
            leaf += step
            up = loss()
            leaf -= 2 * step
            slope = (up - loss()) / 2e-6
            leaf += step
        assert abs(float(slope - (grads[name] * direction).sum())) < 1e-6 * (1 + abs(float(slope)))
