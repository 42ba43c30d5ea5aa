"""The plan: order, active prefix, row ranges under truncation, attention groups."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.numerics import assert_bitwise
from relay_fast.batch.paddings import MAX_GROUPS
from relay_fast.batch.plan import Plan, check_loops

LENGTHS, LOOPS = [3, 5, 1, 2], [2, 5, 0, 5]


def test_active_prefix() -> None:
    plan = Plan(LENGTHS, LOOPS)
    assert plan.order.tolist() == [1, 3, 0, 2]  # stable: equal loops keep the caller's order
    assert plan.offsets.tolist() == [0, 5, 7, 10, 11]
    assert (plan.max_loops, plan.sequences, plan.rows) == (5, 4, 11)
    assert plan.active_sequences == (3, 3, 2, 2, 2)
    assert plan.active_rows == (10, 10, 7, 7, 7)
    assert plan.state_offsets == (0, 10, 20, 27, 34, 41)
    assert plan.token_iterations == sum(n * t for n, t in zip(LENGTHS, LOOPS, strict=True))
    assert [plan.rows_at(t) for t in (0, 1, 5, 6)] == [0, 10, 7, 0]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 7)), max_size=9))
def test_orders_are_inverse_and_tables_agree(sequences: list[tuple[int, int]]) -> None:
    lengths, loops = ([s[i] for s in sequences] for i in (0, 1))
    plan = Plan(lengths, loops)
    rows = torch.arange(plan.rows)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=int))
    if plan.to_sorted is None:
        assert loops == sorted(loops, reverse=True)
        assert plan.to_caller is None and plan.active_to_caller(1) is None
    else:
        assert_bitwise("there and back", rows[plan.to_sorted][plan.to_caller], rows)
        sorted_owner = torch.from_numpy(np.repeat(plan.order, plan.lengths))
        assert_bitwise("owner", owner[plan.to_sorted], sorted_owner)
        for t in range(1, plan.max_loops + 1):
            state = rows[plan.to_sorted][: plan.rows_at(t)]
            callers = rows[torch.tensor(loops)[owner] >= t]
            assert_bitwise("active rows", state[plan.active_to_caller(t)], callers)
    assert_bitwise("tokens", plan.tokens, rows if plan.sorted else plan.to_sorted)
    expected = np.concatenate([np.arange(n) for n in plan.lengths] or [np.zeros(0, int)])
    assert plan.positions.tolist() == expected.tolist()
    assert plan.cu_seqlens.tolist() == plan.offsets.tolist()


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        ([0, 2**31], "positions from 0 to 2147483648 do not fit into 32 bits"),
        ([-(2**31) - 1, 0], "positions from -2147483649 to 0 do not fit"),
        ([0, 1, 2], r"positions have shape \(3,\) and type int64: give 2 whole numbers"),
        ([0.0, 1.0], "type float64: give 2 whole numbers"),
    ],
)
def test_positions_that_are_none_are_refused(positions: list, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Plan([2], [1], positions=np.array(positions))
    extremes = np.array([-(2**31), 2**31 - 1])
    assert Plan([2], [1], positions=extremes).positions.tolist() == extremes.tolist()


def test_positions_of_the_caller_follow_their_rows() -> None:
    plan = Plan([2, 3], [1, 2], positions=np.array([7, 8, 0, 10, 20]))
    assert plan.positions.tolist() == [0, 10, 20, 7, 8]
    assert plan.positions.dtype == torch.int32


def test_segments_cover_the_prefix() -> None:
    plan = Plan(LENGTHS, LOOPS)
    for truncate in (None, 1, 2, 3, 9):
        for t in range(1, 6):
            row_ranges = plan.row_ranges(t, truncate)
            assert row_ranges[0].first_row == 0 and row_ranges[-1].last_row == plan.rows_at(t)
            for s in row_ranges:
                own = plan.loops[s.first_sequence : s.last_sequence]
                learns = own - t < truncate if truncate else own > 0
                assert np.all(learns == s.grad)
    assert [s.rows for s in plan.row_ranges(1, 2)] == [slice(0, 7), slice(7, 10)]


def test_segments_without_rows_are_left_out() -> None:
    assert Plan([0, 3, 0], [7, 2, 1]).row_ranges(7) == ()
    assert Plan([], []).max_loops == 0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=40))
def test_layout_pads_and_unpads(lengths: list[int]) -> None:
    plan = Plan(lengths, [1] * len(lengths))
    layout = plan.layout(0, len(lengths))
    rows = torch.arange(plan.rows, dtype=torch.float32).unsqueeze(1) + 1
    padded = layout.pad(rows)
    assert len(padded) == layout.slots
    assert_bitwise("rows", layout.unpad(padded), rows)
    assert len(layout.groups) <= MAX_GROUPS
    assert sum(g.sequences for g in layout.groups) == sum(n > 0 for n in lengths)
    for g in layout.groups:
        slots = padded[g.first_slot : g.first_slot + g.sequences * g.length]
        empty = slots.view(g.sequences, 1, g.length) == 0
        if g.pad_mask is None:
            assert not empty.any()
        else:
            assert_bitwise("mask", g.pad_mask, empty)
        assert not empty[:, :, 0].any()  # no sequence without a key
    if len(set(lengths)) == 1:
        assert layout.slot is None


def test_layout_is_made_once_per_prefix() -> None:
    plan = Plan([2, 3, 4], [3, 2, 1])
    assert plan.layout(0, 2) is plan.layout(0, 2)
    assert plan.layout(0, 2) is not plan.layout(0, 3)


@pytest.mark.parametrize(
    "loops", [3, [3, 3], (3, 3), np.array([3, 3], np.int32), torch.tensor([3, 3]), np.int64(3)]
)
def test_loops_as_anything_integer(loops) -> None:
    counts = check_loops(loops, 2)
    assert counts.dtype == np.int64 and counts.tolist() == [3, 3]


def test_no_sequences() -> None:
    for loops in (4, [], np.zeros(0, int), torch.zeros(0, dtype=torch.int64)):
        assert check_loops(loops, 0).tolist() == []


@pytest.mark.parametrize(
    "loops, error, message",
    [
        (-1, ValueError, r"loops\[0\] = -1 is negative: give counts of 0 or more"),
        ([1, 2, -3], ValueError, r"loops\[2\] = -3 is negative"),
        ([1, 2], ValueError, r"loops has shape \(2,\) but the batch holds 3 sequences"),
        ([[1, 2, 3]], ValueError, r"loops has shape \(1, 3\)"),
        (1.0, TypeError, "loops must be integers, got float64"),
        ([1, 2, 3.5], TypeError, "loops must be integers, got float64"),
        (torch.tensor([1.0, 2.0, 3.0]), TypeError, "loops must be integers, got float32"),
        (True, TypeError, "loops must be integers, got bool"),
        ("3", TypeError, "loops must be integers"),
        (None, TypeError, "loops must be integers"),
    ],
)
def test_loops_that_are_refused(loops, error, message) -> None:
    with pytest.raises(error, match=message):
        check_loops(loops, 3)


@pytest.mark.parametrize(("rows", "loops"), [(3, 4), (1, 1), (0, 3), (5, 0)])
def test_plan_of_rows_is_the_constructors(rows: int, loops: int) -> None:
    quick = Plan.of_rows(rows, loops, torch.device("cpu"))
    full = Plan(np.ones(rows), [loops] * rows)
    assert vars(quick).keys() == vars(full).keys()
    for name, value in vars(full).items():
        np.testing.assert_array_equal(vars(quick)[name], value, err_msg=name)
    assert quick.positions.tolist() == [0] * rows and quick.row_ranges is not None


def test_truncation_by_sequence() -> None:
    plan = Plan(LENGTHS, LOOPS)
    for counts in itertools.product((0, 1, 3, 9), repeat=len(LOOPS)):
        truncate = np.array(counts)
        for t in range(1, plan.max_loops + 1):
            rows = {True: [], False: []}
            for part in plan.row_ranges(t, truncate):
                index = np.arange(plan.rows)[part.rows]
                rows[part.grad] += index.tolist()
                assert part.members is None or plan.layout_of(part).rows == len(index)
            owner = np.repeat(np.arange(plan.sequences), plan.lengths)
            reaches, learns = plan.loops >= t, plan.loops - t < truncate
            assert rows[True] == np.flatnonzero((reaches & learns)[owner]).tolist()
            assert rows[False] == np.flatnonzero((reaches & ~learns)[owner]).tolist()
