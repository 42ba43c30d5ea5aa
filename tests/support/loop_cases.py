"""One pass of the engine over a batch, by the engine and by eager autograd."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from benchmarks.baselines import EagerBlock
from benchmarks.numerics import assert_close
from relay_fast.batch.plan import Plan
from relay_fast.config import BlockConfig
from relay_fast.engine.loop import run_loop
from relay_fast.engine.spec import Readout
from relay_fast.models.looped_block import LoopedBlock
from relay_fast.ops.gradients import GATHER_ROWS

POLICIES = ("none", "state", "every:2", "every:100", "sqrt", "last:1", "last:3", "budget:100000")
D, VOCABULARY = 8, 7
RAGGED = ((3, 5, 1, 2, 9, 4), (2, 5, 0, 1, 5, 3))  # lengths and loops, unsorted, one never loops


@dataclass(frozen=True)
class Case:
    """One pass: the block, the batch, and where gradients enter."""

    lengths: tuple[int, ...] = RAGGED[0]
    loops: tuple[int, ...] = RAGGED[1]
    options: dict = field(default_factory=dict)  # of BlockConfig
    policy: str = "state"
    states: tuple[int, ...] = ()
    final: bool = True
    truncate: int | None = None
    readout: bool = False
    gather_rows: int = GATHER_ROWS
    training: bool = False
    seed: int = 0

    @property
    def config(self) -> BlockConfig:
        return BlockConfig(**{"d_model": D, "n_heads": 2, "n_layers": 2, **self.options})

    @property
    def plan(self) -> Plan:
        return Plan(self.lengths, self.loops)


@dataclass
class Inputs:
    """Leaves and the fixed random weights of the outputs, in sorted order."""

    x: Tensor
    block: LoopedBlock
    extra: list[Tensor]  # final norm weight, head
    g_final: Tensor
    g_states: list[Tensor]  # one per iteration
    rows: list[Tensor]  # supervised rows of each iteration
    targets: list[Tensor]
    weights: list[Tensor]

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = dict(self.block.named_parameters())
        return {"x": self.x, **named, "norm": self.extra[0], "head": self.extra[1]}


def make_inputs(case: Case, dtype: torch.dtype = torch.float64) -> Inputs:
    torch.manual_seed(case.seed)
    plan = case.plan
    block = LoopedBlock(config=case.config, recompute=case.policy, gather_rows=case.gather_rows)
    block.to(dtype).train(case.training)
    for p in block.parameters():  # norms, biases and embeddings start at 0 or 1
        p.data += 0.1 * torch.randn_like(p)
    leaf = lambda *shape: torch.randn(*shape, dtype=dtype).requires_grad_()
    inputs = Inputs(leaf(plan.rows, D), block, [leaf(D), leaf(VOCABULARY, D)], None, [], [], [], [])
    inputs.g_final = torch.randn(plan.rows, D, dtype=dtype)
    for rows in plan.active_rows:
        inputs.g_states.append(torch.randn(rows, D, dtype=dtype))
        inputs.rows.append(torch.randperm(rows)[: rows // 2])
        inputs.targets.append(torch.randint(-1, VOCABULARY, (rows // 2,)))
        inputs.weights.append(torch.rand(rows // 2, dtype=dtype))
    return inputs


def relay(case: Case, i: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """A scalar loss of all outputs, and the outputs, by the engine."""
    plan, readout = case.plan, None
    parameters = list(i.block.parameters())
    if case.readout:
        offsets = (0, *np.cumsum([len(r) for r in i.rows], dtype=int).tolist())
        flat = lambda parts: torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        readout = Readout(flat(i.rows), flat(i.targets), offsets, label_smoothing=0.1, z_loss=0.01)
        parameters += [i.extra[0], None, i.extra[1]]
    run = i.block.run(plan, states=case.states, truncate=case.truncate, readout=readout)
    final, states, loss, _ = run_loop(run, i.x, parameters)
    outputs = {f"state {t}": states[span] for t, span in run.state_spans().items()}
    total = sum((outputs[f"state {t}"] * i.g_states[t - 1]).sum() for t in case.states)
    if case.final or not (case.states or case.readout):
        total = total + (final * i.g_final).sum()
    if case.readout:
        total = total + (loss * torch.cat([*i.weights, loss.new_empty(0)])).sum()
        outputs["row losses"] = loss
    return total, {"final": final, **outputs}


def eager(case: Case, i: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The same by autograd through padded batches."""
    plan = case.plan
    block = EagerBlock(case.config).to(i.x.dtype)
    mine = dict(i.block.named_parameters())
    assert mine.keys() == dict(block.named_parameters()).keys()
    filled = np.flatnonzero(plan.lengths > 0)  # eager attention knows no empty sequence
    n = int(plan.lengths.max(initial=1))
    slots = torch.from_numpy(
        np.concatenate([b * n + np.arange(plan.lengths[s]) for b, s in enumerate(filled)])
        if len(filled)
        else np.zeros(0, int)
    )
    x = i.x.new_zeros(len(filled) * n, D).index_copy(0, slots, i.x).view(len(filled), n, D)
    loops = torch.from_numpy(plan.loops[filled])
    mask = torch.zeros(len(filled) * n, dtype=torch.bool)
    mask[slots] = True

    def forward(x: Tensor) -> list[Tensor]:
        steps = int(loops.max()) if len(loops) else 0
        options = {"mask": mask.view(len(filled), n), "truncate": case.truncate}
        return list(block.states(x, steps, loops, **options))

    # The leaves themselves take the place of the eager block's own parameters.
    with torch.nn.utils.stateless._reparametrize_module(block, mine):
        states = forward(x)
    unpad = lambda padded: padded.flatten(0, 1)[slots]
    outputs = {"final": unpad(states[-1] if states else x)}
    total = i.x.new_zeros(())
    losses = [i.x.new_empty(0)]
    for t in range(1, plan.max_loops + 1):
        rows = plan.rows_at(t)
        state = unpad(states[t - 1])[:rows] if t <= len(states) else i.x.new_empty(0, D)
        if t in case.states:
            outputs[f"state {t}"] = state
            total = total + (state * i.g_states[t - 1]).sum()
        if case.readout:
            y = torch.nn.functional.rms_norm(state[i.rows[t - 1]], (D,), i.extra[0], 1e-6)
            logits = y @ i.extra[1].t()
            loss = torch.nn.functional.cross_entropy(
                logits, i.targets[t - 1], ignore_index=-1, reduction="none", label_smoothing=0.1
            )
            losses.append(loss + 0.01 * logits.logsumexp(-1) ** 2 * (i.targets[t - 1] >= 0))
            total = total + (losses[-1] * i.weights[t - 1]).sum()
    if case.final or not (case.states or case.readout):
        total = total + (outputs["final"] * i.g_final).sum()
    if case.readout:
        outputs["row losses"] = torch.cat(losses)
    return total, outputs


def gradients(loss: Tensor, leaves: dict[str, Tensor], **options) -> dict[str, Tensor]:
    if not loss.requires_grad:  # nothing loops and nothing is asked of x
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    values = torch.autograd.grad(
        loss, list(wanted.values()), allow_unused=True, materialize_grads=True, **options
    )
    return dict(zip(wanted, values, strict=True))


def check(case: Case) -> None:
    inputs = make_inputs(case)
    loss, outputs = relay(case, inputs)
    truth_loss, truth_outputs = eager(case, inputs)
    assert outputs.keys() == truth_outputs.keys()
    for name, truth in truth_outputs.items():
        assert_close(name, outputs[name], truth)
    got = gradients(loss, inputs.leaves)
    for name, truth in gradients(truth_loss, inputs.leaves).items():
        assert_close(f"gradient of {name}", got[name], truth)


def run_all(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Outputs and gradients of the engine."""
    inputs = make_inputs(case, dtype)
    torch.manual_seed(case.seed)  # the dropout seed
    loss, outputs = relay(case, inputs)
    return {**outputs, **{f"d {k}": v for k, v in gradients(loss, inputs.leaves).items()}}
