"""Inputs that a device lays of the tokens that it wrote are those that the host makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from relay_fast.batch.arranged import ArrangedInputs
from relay_fast.batch.capacity import CapacityBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.data.feedback import arranged_inputs, iterations_of
from relay_fast.decoding.chains import stream_order
from relay_fast.decoding.static_reading import capacity_of, prepare
from relay_fast.tasks import LIS, Samples, Task, TextTask, Vocabulary, Written
from relay_fast.tasks.vocabulary import PAD
from tests.support.fed_models import TASKS, mixed
from tests.support.text_tasks import VOCABULARY as OF_TEXTS
from tests.support.text_tasks import Folded, Parity

CONFIG = ModelConfig(BlockConfig(16, 2, 1), 200, feedback="tokens")
TEXTS = {task.name: task.bound(OF_TEXTS, 3 + k) for k, task in enumerate((Parity(), Folded()))}


def texts(each: int) -> Samples:
    drawn = [task.sample(np.arange(2, 2 + each), seed=2) for task in TEXTS.values()]
    return Samples.concat(drawn)


def sorted_problems(problems: Samples) -> Samples:
    return problems.take(stream_order(problems))


def written_so_far(ids: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
    """What stands behind the last `<pad>` of each sequence."""
    texts = []
    for a, b in zip(offsets[:-1], offsets[1:], strict=True):
        row = ids[a:b]
        pads = np.flatnonzero(row == PAD)
        texts.append(row[pads[-1] + 1 :] if len(pads) else row)
    return texts


class Host:
    """Makes inputs as `relay_fast.data.feedback.collate_next` does, of texts added one by one."""

    def __init__(self, problems: Samples, tasks: Mapping[str, Task]):
        self.problems, self.tasks = problems, tasks
        rounds = int(problems.first_round[-1])
        self.starts, self.sizes = np.zeros(rounds, np.int64), np.zeros(rounds, np.int64)
        self.tokens = np.zeros(0, np.int32)

    def write(self, before: int, texts: list[np.ndarray]) -> None:
        for i, text in enumerate(texts):
            r = self.problems.first_round[i] + before
            self.starts[r], self.sizes[r] = len(self.tokens), len(text)
            self.tokens = np.concatenate([self.tokens, text.astype(np.int32)])

    def inputs(self, before: int):
        owner = np.flatnonzero(self.problems.loops > before)
        written = Written(self.problems, self.tokens, self.starts, self.sizes)
        inputs, widths, _ = iterations_of(written, self.tasks, owner, np.full(len(owner), before))
        return inputs, widths


@pytest.mark.parametrize("names", ["arithmetic", "edit_distance lis", "lis", "all", "texts"])
@pytest.mark.parametrize("pads", [0.1, 0.5])
def test_what_a_device_lays_is_what_the_host_makes(names: str, pads: float) -> None:
    """Whatever the model writes: rounds of any size, empty ones and ones without a boundary."""
    tasks, problems = (TEXTS, texts(5)) if names == "texts" else (TASKS, mixed())
    if names not in ("all", "texts"):
        chosen = [TASKS[name].index for name in names.split()]
        problems = problems.take(np.flatnonzero(np.isin(problems.task, chosen)))
    problems = sorted_problems(problems)
    rng = np.random.default_rng(int(10 * pads))
    loaded = prepare(CONFIG, problems, tasks)
    assert loaded.moves == (names in ("arithmetic", "all", "texts"))
    capacity = capacity_of(loaded, CONFIG)
    capacity = replace(capacity, rows=tuple(2 * rows for rows in capacity.rows))
    static = CapacityBatch(capacity, "cpu", ArrangedInputs.beside_sizes(capacity))
    static.load(loaded.batch, loaded.beside)
    device, host, ids = ArrangedInputs(static, loaded.moves, PAD, 199), Host(problems, tasks), None
    for before in range(int(problems.loops.max())):
        batch = device.start() if ids is None else device.after(torch.from_numpy(ids), before)
        inputs, widths = host.inputs(before)
        rows, live = int(widths.sum()), batch.plan.row_count(1).tolist()
        assert live == [rows] and np.array_equal(device.widths[: len(widths)].numpy(), widths)
        offsets = batch.plan.cu_seqlens[: len(widths) + 1].numpy()
        assert offsets.tolist() == [0, *np.cumsum(widths)]
        for made, true in zip(
            (batch.tokens, batch.fed, batch.plan.positions), inputs, strict=False
        ):
            assert np.array_equal(made[:rows].numpy(), true), before
        ids = rng.integers(1, 50, capacity.rows[0])
        ids[rng.random(len(ids)) < pads] = PAD
        host.write(before, written_so_far(ids, offsets))


def test_inputs_that_outgrow_their_buffers_are_told() -> None:
    """Rounds without a boundary make an input longer each time; memory is never left."""
    problems = sorted_problems(TASKS["arithmetic"].sample([5, 5, 4, 1], seed=0))
    loaded = prepare(CONFIG, problems, TASKS)
    exact = capacity_of(loaded, CONFIG)
    least, most = loaded.batch.plan.rows, int(loaded.batch.plan.lengths.max())
    for rows, longest in ((least, exact.longest), (2 * least, most)):
        capacity = replace(exact, rows=(rows,) * len(exact.rows), longest=longest)
        static = CapacityBatch(capacity, "cpu", ArrangedInputs.beside_sizes(capacity))
        static.load(loaded.batch, loaded.beside)
        inputs = ArrangedInputs(static, True, PAD, 199)
        inputs.start()
        outgrown = False
        for before in range(1, 5):
            batch = inputs.after(torch.full((rows,), 7), before)
            offsets = batch.plan.cu_seqlens
            assert offsets.max() <= rows and offsets.diff().max() <= longest
            assert offsets.diff().min() >= 0 and batch.tokens.shape == (rows,)
            outgrown |= bool(inputs.widths.max() > longest or inputs.widths.sum() > rows)
        assert outgrown


class Marked(LIS):
    """Feeds a mark of its own."""

    def inputs(self, written, owner, before, widths):
        made = super().inputs(written, owner, before, widths)
        return made._replace(fed=made.fed + 0)


class Wider(LIS):
    def input_sizes(self, written, owner, before):
        return super().input_sizes(written, owner, before) + before


class Shown(Parity):
    def shown(self, problem, rounds):
        return problem, " ".join(rounds)


def test_inputs_made_in_python_stay_on_the_host() -> None:
    for task in (Marked(Vocabulary()), Wider(Vocabulary())):
        reason = arranged_inputs(task.sample([4], 0), {"lis": task})
        assert reason == "task 'lis' makes the inputs of an iteration in Python"
    text: TextTask = Shown()
    task = text.bound(Vocabulary(63, 1, ("[parity]", *"01")), 3)
    reason = arranged_inputs(task.sample([4], 0), {"parity": task})
    assert reason == "task 'parity' makes the inputs of an iteration in Python"
