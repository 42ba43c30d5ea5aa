"""Streams of batches: the same for everybody, inside the training range, and what a batch holds."""

import os

import numpy as np
import pytest
import torch

from relay_fast.batch.packed import PackedBatch
from relay_fast.data.sample_files import load_samples, save_samples
from relay_fast.data.streams import BatchFormat, SampleStream, TruthStream, mean_cost, prefetch
from relay_fast.tasks import TASK_NAMES, Samples, Vocabulary, build_tasks
from relay_fast.tasks.vocabulary import EOS, PAD
from relay_fast.training.schedule import Schedule
from relay_fast.utils.cores import usable_cores

VOCABULARY = Vocabulary(max_number=249)
TASKS = build_tasks(TASK_NAMES, VOCABULARY)
RANGES = {"arithmetic": (1, 5), "edit_distance": (2, 6), "lis": (1, 12)}
LOOPED, AUTOREGRESSIVE = BatchFormat("looped"), BatchFormat("autoregressive")


def stream(steps=4, form=LOOPED, tasks=TASKS, batch_size=12, seed=3, **options) -> TruthStream:
    schedule = Schedule.by_steps(steps)
    return TruthStream(tasks, RANGES, form, schedule, batch_size=batch_size, seed=seed, **options)


def only(name: str) -> dict:
    return {name: TASKS[name]}


class Recorded(BatchFormat):
    """A form that returns the samples and the padding themselves."""

    def collate(self, samples, tasks, extra_pad):
        return samples, extra_pad


def drawn(**options) -> list[tuple[Samples, np.ndarray | None]]:
    s = stream(form=Recorded("looped"), **options)
    return [s[i].batch for i in range(len(s))]


def assert_same(a: PackedBatch, b: PackedBatch) -> None:
    for name in ("tokens", "rows", "targets", "weights", "answers", "answer_weights"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.order == b.order).all() and a.plan.loops.tolist() == b.plan.loops.tolist()


def sample_all() -> Samples:
    lengths = {"arithmetic": [1, 4, 2], "edit_distance": [3, 1, 5], "lis": [11, 1, 10]}
    parts = [TASKS[name].sample(lengths[name], seed=5) for name in TASK_NAMES]
    return Samples.concat(parts).take([4, 0, 8, 2, 6, 1, 3, 7, 5])


# Streams


def test_cuts_move_positions_alone() -> None:
    plain, cut = stream(batch_size=90), stream(batch_size=90, cut=7)
    moved = []
    for step in range(len(plain)):
        a, b = plain[step].batch, cut[step].batch
        assert_same(a, b)
        assert torch.equal(cut[step].batch.plan.positions, b.plan.positions)
        by = (b.plan.positions - a.plan.positions).split(a.plan.lengths.tolist())
        for own in by:
            rises = own.diff()
            assert own[0] == 0 and (rises >= 0).all() and (rises > 0).sum() <= 1
        moved += [int(own[-1]) for own in by]
    assert set(moved) == set(range(8)) and 0.4 < np.mean(np.array(moved) > 0) < 0.6
    always = stream(cut=1, cut_probability=1.0)[0].batch
    assert (always.plan.positions[always.plan.last_rows] == torch.tensor(always.plan.lengths)).all()
    carried = stream(form=BatchFormat("looped", feedback=True, carry_state=True), cut=3)[0].batch
    assert carried.plan.once(2).positions.tolist() == (
        carried.plan.positions[: carried.plan.rows_at(2)].tolist()
    )
    with pytest.raises(ValueError, match="cut = 3: iterations that train side by side are cut"):
        stream(form=BatchFormat("looped", feedback=True), cut=3)


@pytest.mark.parametrize("form", [LOOPED, AUTOREGRESSIVE])
def test_a_step_is_always_the_same_batch(form) -> None:
    options = {"form": form, "pad_probability": 0.5, "pad_to": 40, "lengths_per_batch": 2}
    s, again = stream(**options), stream(**options)
    late = s[3]
    for step in (0, 1, 2, 3):
        assert_same(s[step].batch, again[step].batch)
    assert_same(late.batch, s[3].batch)
    assert not torch.equal(s[0].batch.tokens, s[1].batch.tokens)
    assert not torch.equal(s[0].batch.tokens, stream(**options | {"seed": 4})[0].batch.tokens)


def test_cores_are_those_that_this_process_may_use(monkeypatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 7}, raising=False)
    assert usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 64


def test_workers_change_nothing_and_a_run_may_begin_anywhere() -> None:
    s = stream(3, tasks=only("arithmetic"))
    here = [s[i] for i in range(3)]
    assert [step.longest_true for step in prefetch(s, 0, 0)] == [x.longest_true for x in here]
    ahead = list(prefetch(s, 1, 2))
    assert len(ahead) == 2
    for step, expected in zip(ahead, here[1:], strict=True):
        assert_same(step.batch, expected.batch)
        assert step.longest_true == expected.longest_true
    assert list(prefetch(s, 3, 0)) == []


@pytest.mark.parametrize("lengths", ["proportional", "uniform"])
def test_no_problem_is_longer_than_the_range_and_longest_true_says_so(lengths) -> None:
    s = stream(8, form=Recorded("looped"), lengths=lengths, batch_size=30)
    seen = {name: set() for name in TASKS}
    for step in (s[i] for i in range(8)):
        samples, _ = step.batch
        assert np.bincount(samples.task).tolist() == [10] * len(TASKS)
        for name, task in TASKS.items():
            got = samples.length[samples.task == task.index].tolist()
            lengths_of = [
                task.length_of(samples.problem_of(i))
                for i in np.flatnonzero(samples.task == task.index)
            ]
            assert got == lengths_of
            assert step.longest_true[name] == max(got)
            seen[name] |= set(got)
    for name, (shortest, longest) in RANGES.items():
        assert shortest <= min(seen[name]) and max(seen[name]) <= longest
    assert seen["arithmetic"] == set(range(1, 6))


def test_proportional_and_uniform_lengths() -> None:
    for lengths, expected in (("proportional", 55 / 15), ("uniform", 3.0)):
        got = drawn(tasks=only("arithmetic"), lengths=lengths, batch_size=400)
        mean = np.mean([samples.length.mean() for samples, _ in got])
        assert abs(mean - expected) < 0.15


def test_few_lengths_a_batch() -> None:
    options = {"lengths_per_batch": 3, "pad_probability": 1.0, "pad_to": 40}
    batches = drawn(tasks=only("lis"), batch_size=10, **options)
    assert len(batches) > 1
    for samples, pad in batches:
        pairs = set(zip(samples.length.tolist(), pad.tolist(), strict=True))
        assert len(samples) == 10 and len(pairs) <= 3


def test_the_curriculum_grows_inside_the_range() -> None:
    s = stream(20, form=Recorded("looped"), curriculum=0.5, batch_size=90)
    longest = [s[i].longest_true for i in range(20)]
    for name, (shortest, last) in RANGES.items():
        bounds = [s._longest(name, i) for i in range(20)]
        assert bounds == sorted(bounds)
        assert bounds[0] == shortest + 1 and set(bounds[10:]) == {last}
        assert all(got[name] <= bound for got, bound in zip(longest, bounds, strict=True))
    assert longest[19]["arithmetic"] == 5


def test_a_data_set_of_fixed_size_comes_once_an_epoch() -> None:
    got = drawn(steps=9, tasks=only("arithmetic"), dataset_size=12, batch_size=4)
    epochs = [[samples.problem.tobytes() for samples, _ in got[i : i + 3]] for i in (0, 3, 6)]
    assert len(set(epochs[0])) == 3
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) > 1  # in another order
    fresh = drawn(steps=9, tasks=only("arithmetic"), batch_size=4)
    assert len({samples.problem.tobytes() for samples, _ in fresh}) == 9


@pytest.mark.parametrize("name", TASK_NAMES)
def test_random_padding_stays_below_its_bound(name) -> None:
    s = stream(6, tasks=only(name), pad_probability=0.7, pad_to=20, batch_size=40)
    sizes = np.concatenate([s[i].batch.plan.lengths for i in range(6)])
    bare = stream(6, tasks=only(name), batch_size=40)
    before = np.concatenate([bare[i].batch.plan.lengths for i in range(6)])
    assert sizes.max() <= max(20, before.max())
    assert sizes.mean() > before.mean()
    pads = [pad for _, pad in drawn(tasks=only(name), pad_probability=0.7, pad_to=5)]
    if name == "lis":  # every input is padded to a round's size already
        assert not np.any(pads)


def test_batches_by_tokens() -> None:
    for kind in ("looped", "autoregressive"):
        free = stream(form=BatchFormat(kind), batch_size=60)[0].batch
        for budget in (150, 400, 10**6):
            form = BatchFormat(kind, batch_tokens=budget)
            batch = stream(form=form, batch_size=60)[0].batch
            assert batch.plan.rows <= budget
            assert batch.plan.rows > budget - 100 or len(batch) == len(free)
        assert len(batch) == 60
        assert len(stream(form=BatchFormat(kind, batch_tokens=1))[0].batch) == 1  # never empty
    form = BatchFormat("looped", batch_tokens=300)
    padded = stream(form=form, batch_size=60, pad_probability=1.0, pad_to=30)[0].batch
    assert padded.plan.rows <= 300


def test_cutting_by_tokens_keeps_the_tasks_in_step() -> None:
    form = BatchFormat("looped", batch_tokens=250)
    s = stream(form=form, batch_size=60)
    first = s[0].batch.tokens[s[0].batch.plan.offsets[:-1]].tolist()
    counts = [first.count(task.token) for task in TASKS.values()]
    assert min(counts) > 0 and max(counts) - min(counts) <= 1


def test_bad_streams_are_refused() -> None:
    with pytest.raises(ValueError, match='lengths = "?\'?cubic.*"proportional" or "uniform"'):
        stream(lengths="cubic")
    with pytest.raises(ValueError, match="length 0 is too short"):
        TruthStream(
            only("arithmetic"),
            {"arithmetic": (0, 3)},
            LOOPED,
            Schedule.by_steps(1),
            batch_size=2,
            seed=0,
        )


def samples_stream(samples, steps, batch_size, seed=0) -> SampleStream:
    return SampleStream(
        samples,
        TASKS,
        Recorded("autoregressive"),
        Schedule.by_steps(steps),
        batch_size=batch_size,
        seed=seed,
        longest_true={"arithmetic": 5},
    )


def test_a_set_of_samples_comes_once_an_epoch() -> None:
    samples = TASKS["arithmetic"].sample([4] * 12, seed=1)
    every = sorted(samples.problem_of(i).tobytes() for i in range(12))
    s = samples_stream(samples, 6, 4)
    orders = []
    for epoch in (0, 1):
        parts = [s[3 * epoch + i].batch[0] for i in range(3)]
        seen = [part.problem_of(i).tobytes() for part in parts for i in range(len(part))]
        assert sorted(seen) == every
        orders.append(seen)
    assert orders[0] != orders[1]
    back = s[1].batch[0]  # from an epoch that is over
    assert [back.problem_of(i).tobytes() for i in range(4)] == orders[0][4:8]
    assert s[2].longest_true == {"arithmetic": 5}
    assert len(samples_stream(samples, 1, 100)[0].batch[0]) == 12  # fewer than a batch
    assert len(s) == 6


def test_an_empty_set_is_refused() -> None:
    empty = sample_all().take(slice(0, 0))
    with pytest.raises(ValueError, match="no samples to train on: generate or keep more"):
        samples_stream(empty, 1, 4)


def test_samples_survive_the_disk(tmp_path) -> None:
    samples = sample_all()
    save_samples(tmp_path / "a.safetensors", samples, {"model": "looped_aligned"})
    back = load_samples(tmp_path / "a.safetensors")
    for name in ("task", "length", "problem", "problem_offsets", "rounds", "round_offsets"):
        assert np.array_equal(getattr(back, name), getattr(samples, name)), name
    save_samples(tmp_path / "b.safetensors", samples.take(slice(0, 0)), {})
    assert len(load_samples(tmp_path / "b.safetensors")) == 0


def test_cost_of_a_batch() -> None:
    tasks, ranges = only("arithmetic"), {"arithmetic": (1, 3)}
    task = TASKS["arithmetic"]
    looped = mean_cost(tasks, ranges, "looped", 10, "uniform", 0.0)(0.0)
    assert looped == pytest.approx(
        10 * np.mean([task.max_problem_tokens(n) * n for n in (1, 2, 3)])
    )
    growing = mean_cost(tasks, ranges, "looped", 10, "uniform", 0.5)
    assert growing(0.0) < growing(0.5) == growing(0.9) == looped
    causal = mean_cost(tasks, ranges, "autoregressive", 1, "proportional", 0.0)(0.0)
    sizes = [task.max_sequence_tokens(n) for n in (1, 2, 3)]
    assert causal == pytest.approx(np.dot(sizes, [1, 2, 3]) / 6)


# What a batch holds


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("name", TASK_NAMES)
def test_looped_batch_of_each_task(name, pad) -> None:
    task, samples = TASKS[name], TASKS[name].sample([3, 1, 5, 11, 2], seed=7)
    extra = np.full(len(samples), pad) if pad else None
    batch = PackedBatch.looped(samples, only(name), extra_pad=extra)
    check_looped(batch, samples, only(name), np.full(len(samples), pad))
    width = max(task.min_input_tokens, len(samples.problem_of(1))) + pad
    assert batch.plan.lengths[batch.order.tolist().index(1)] == width


def test_looped_batch_of_all_tasks() -> None:
    samples = sample_all()
    weights = {"arithmetic": 1.0, "edit_distance": 10.0, "lis": 5.0}
    batch = PackedBatch.looped(samples, TASKS, task_weights=weights, chain_weight=0.5)
    check_looped(batch, samples, TASKS, np.zeros(len(samples), int), weights, 0.5)
    expected = np.mean([weights[TASK_NAMES[k]] for k in samples.task])
    assert float(batch.answer_weights.sum()) == pytest.approx(expected)


def check_looped(batch, samples, tasks, pad, task_weights=None, chain_weight=1.0) -> None:
    """Every sequence, round by round, written out again the slow way."""
    plan = batch.plan
    per_row: dict[tuple[int, int], tuple[int, float]] = {}
    for t in range(1, plan.max_loops + 1):
        span = slice(*batch.row_offsets[t - 1 : t + 1])
        values = (x[span].tolist() for x in (batch.rows, batch.targets, batch.weights))
        for row, target, weight in zip(*values, strict=True):
            assert row < plan.active_rows[t - 1]
            assert (t, row) not in per_row
            per_row[t, row] = target, weight
    assert batch.row_offsets[0] == 0 and batch.row_offsets[-1] == len(batch.targets)
    total = 0.0
    for k, i in enumerate(batch.order.tolist()):
        a, b = int(plan.offsets[k]), int(plan.offsets[k + 1])
        tokens, problem = batch.tokens[a:b].tolist(), samples.problem_of(i).tolist()
        task = tasks[TASK_NAMES[samples.task[i]]]
        assert b - a == max(len(problem), task.min_input_tokens) + pad[i]
        # The task token is leftmost, then <pad>, then the problem.
        assert tokens == problem[:1] + [PAD] * (b - a - len(problem)) + problem[1:]
        assert tokens[0] == task.token
        assert int(batch.answers[k]) == samples.answer[i]
        rounds = samples.rounds_of(i)
        assert plan.loops[k] == len(rounds)
        w = (task_weights or {}).get(task.name, 1.0)
        for t, tokens_of_round in enumerate(rounds, 1):
            supervised = {r: per_row.pop((t, r)) for r in range(a, b) if (t, r) in per_row}
            # The last positions, the boundary <pad> before them once, nothing else.
            assert sorted(supervised) == list(range(b - len(tokens_of_round) - 1, b))
            targets = [supervised[r][0] for r in sorted(supervised)]
            assert targets == [PAD, *tokens_of_round.tolist()]
            share = w * chain_weight / (len(samples) * len(rounds) * len(targets))
            assert [x for _, x in supervised.values()] == pytest.approx([share] * len(targets))
        total += w * chain_weight / len(samples)
    assert not per_row
    assert float(batch.weights.sum()) == pytest.approx(total, rel=1e-5)
    if task_weights is None:
        assert float(batch.weights.sum()) == pytest.approx(chain_weight, rel=1e-5)
    assert batch.max_token == max(int(batch.tokens.max()), int(batch.targets.max()))


def test_weights_by_row() -> None:
    samples = sample_all()
    for pack in (PackedBatch.looped, PackedBatch.autoregressive):
        weights = pack(samples, TASKS, weighting="row").weights
        assert float(weights.sum()) == pytest.approx(1, rel=1e-5)
        assert float(weights.min()) == float(weights.max())


@pytest.mark.parametrize("names", [*([n] for n in TASK_NAMES), list(TASK_NAMES)])
def test_autoregressive_batch(names) -> None:
    tasks = {name: TASKS[name] for name in names}
    samples = Samples.concat([TASKS[name].sample([3, 1, 12], seed=2) for name in names])
    batch = PackedBatch.autoregressive(samples, tasks)
    sequence, offsets, prompts = samples.sequences(tasks)
    end = 0
    for i in range(len(samples)):
        whole = sequence[offsets[i] : offsets[i + 1]].tolist()
        a, b = int(batch.plan.offsets[i]), int(batch.plan.offsets[i + 1])
        assert batch.tokens[a:b].tolist() == whole[:-1]
        # The first target is the first token after the problem, read at the problem's last token.
        begin, end = end, end + len(whole) - int(prompts[i])
        assert batch.rows[begin:end].tolist() == list(range(a + int(prompts[i]) - 1, b))
        assert batch.targets[begin:end].tolist() == whole[int(prompts[i]) :]
        assert int(batch.tokens[batch.rows[begin]]) == TASKS[TASK_NAMES[samples.task[i]]].end
        assert int(batch.targets[end - 1]) == EOS
        first = samples.rounds_of(i)[0].tolist()
        assert batch.targets[begin : begin + len(first)].tolist() == first
        assert float(batch.weights[begin:end].sum()) == pytest.approx(1 / len(samples))
    assert end == len(batch.targets) == len(batch.rows)
    assert batch.plan.loops.tolist() == [1] * len(samples)
    weighted = PackedBatch.autoregressive(samples, tasks, task_weights={names[-1]: 5.0})
    assert float(weighted.weights.sum()) == pytest.approx((len(names) - 1 + 5) / len(names))


@pytest.mark.parametrize("pack", [PackedBatch.looped, PackedBatch.autoregressive])
def test_a_batch_refuses_what_it_does_not_know(pack) -> None:
    samples = sample_all()
    with pytest.raises(ValueError, match="weighting = 'rows' is unknown: use one of"):
        pack(samples, TASKS, weighting="rows")
    with pytest.raises(ValueError, match="task_weights names 'lsi': the tasks are arithmetic, "):
        pack(samples, TASKS, task_weights={"lsi": 5.0})
    samples.problem[1] = -3
    with pytest.raises(ValueError, match="token -3 is negative"):
        pack(samples, TASKS)


def test_an_answer_that_could_not_be_read_is_no_target() -> None:
    samples = sample_all()
    samples.answer[:] = -1
    assert PackedBatch.looped(samples, TASKS).answers.eq(-1).all()


def test_empty_batches_work() -> None:
    empty = sample_all().take(slice(0, 0))
    for pack in (PackedBatch.looped, PackedBatch.autoregressive):
        batch = pack(empty, TASKS)
        assert len(batch) == 0 and not batch.tokens.numel() and not batch.targets.numel()
