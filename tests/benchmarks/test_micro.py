"""The small measurements: both sides compute the same, and a bound that is not kept is told."""

import torch

from benchmarks import micro
from benchmarks.numerics import assert_close


def test_one_loop_is_the_same_as_eager() -> None:
    eager, ours = micro.blocks()
    x = torch.randn(2, 9, micro.CONFIG.d_model)
    out, truth = ours(x, 1), list(eager.states(x, 1))[-1]
    assert_close("state", out, truth, 1e-5)
    g = torch.randn_like(out)
    grads = torch.autograd.grad(out, list(ours.parameters()), g)
    truths = torch.autograd.grad(truth, list(eager.parameters()), g)
    names = [name for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in eager.named_parameters()] and len(names) > 10
    for name, grad, expected in zip(names, grads, truths, strict=True):
        assert_close(name, grad, expected, 1e-4)


def test_a_bound_that_is_not_kept_fails(monkeypatch, capsys) -> None:
    monkeypatch.setattr(micro, "one_loop_ratio", lambda rounds: 1.2)
    monkeypatch.setattr(micro, "tiny_module_ratio", lambda rounds: 1.9)
    monkeypatch.setattr(micro, "samples_per_second", lambda task, rounds: 6000.0)
    assert micro.main(["--quick"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAIL one loop, relay_fast / eager: 1.2 (at most 1.05)"
    assert lines[1] == "ok   a tiny module, relay_fast.loop / Python: 1.9 (at most 2)"
    assert lines[2] == "ok   arithmetic, samples/s: 6,000 (at least 5,000)" and len(lines) == 5
    monkeypatch.setattr(micro, "one_loop_ratio", lambda rounds: 1.05)
    assert micro.main(["--quick"]) == 0


def test_measurements_are_numbers() -> None:
    assert micro.one_loop_ratio(1) > 0
    assert micro.tiny_module_ratio(1) > 0
    assert micro.samples_per_second("arithmetic", 1) > 0
