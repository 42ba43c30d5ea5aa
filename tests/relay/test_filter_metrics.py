"""Counts of correct chains and of those that the label-free filter keeps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from relay_fast.relay import filter_metrics
from relay_fast.relay.filter_metrics import Counts
from relay_fast.tasks import Samples, Vocabulary, build_tasks
from relay_fast.tasks.verify import correct_chains, verify_chains
from relay_fast.tasks.vocabulary import NUMBER0

VOCABULARY = Vocabulary(max_number=60, multiple=1)
TASKS = build_tasks(
    ["arithmetic", "lis"], VOCABULARY, arithmetic={"prime": 5}, lis={"group": 4, "high": 60}
)


def problems() -> Samples:
    parts = [TASKS["arithmetic"].sample([1, 2, 3] * 4, 0), TASKS["lis"].sample([3, 9] * 4, 0)]
    return Samples.concat(parts)


def spoiled(truth: Samples, rng: np.random.Generator) -> Samples:
    """Some tokens, answers and round boundaries changed."""
    rounds, offsets, answer = truth.rounds.copy(), truth.round_offsets.copy(), truth.answer.copy()
    rounds[rng.integers(0, len(rounds), rng.integers(0, 5))] = NUMBER0 + 60
    answer[rng.integers(0, len(answer), rng.integers(0, 3))] += 1
    inner = rng.integers(1, len(offsets) - 1)
    offsets[inner] = offsets[inner - 1]
    return replace(truth, rounds=rounds, round_offsets=offsets, answer=answer)


@pytest.mark.parametrize("case", range(8))
def test_right_is_right_in_everything(case):
    truth = problems()
    written = spoiled(truth, np.random.default_rng(case))
    same = [
        written.answer[i] == truth.answer[i]
        and [r.tolist() for r in written.rounds_of(i)] == [r.tolist() for r in truth.rounds_of(i)]
        for i in range(len(truth))
    ]
    assert 0 < sum(same) < len(same)
    assert correct_chains(written, truth).tolist() == same
    assert verify_chains(written, TASKS, "task").tolist() == same
    assert correct_chains(truth, truth).all()


def test_another_number_of_rounds_is_wrong():
    truth = TASKS["arithmetic"].sample([2, 2], 0)
    short = replace(truth, loops=np.array([2, 1], np.int32), round_offsets=truth.round_offsets[:-1])
    assert correct_chains(short, truth).tolist() == [True, False]
    assert verify_chains(short, TASKS, "task").tolist() == [True, False]
    assert correct_chains(truth, short).tolist() == [True, False]  # a surplus round


def test_counts_by_task_and_length():
    truth = problems()
    answer, rounds = truth.answer.copy(), truth.rounds.copy()
    answer[[0, 12]] += 1  # neither correct nor kept: arithmetic 1, lis 3
    first = truth.round_offsets[truth.first_round[2]]  # arithmetic 3: kept, but not correct
    rounds[first + np.argmax(rounds[first:] >= NUMBER0)] = NUMBER0 + 60
    written = replace(truth, answer=answer, rounds=rounds)
    ended = np.arange(len(truth)) != 3
    table = filter_metrics.count(written, truth, TASKS, ended=ended)
    assert table["arithmetic"]["1"] == Counts(4, 4, 3, 3, 3, unended=1)
    assert table["arithmetic"]["2"] == Counts(4, 4, 4, 4, 4)
    assert table["arithmetic"]["3"] == Counts(4, 4, 4, 3, 3)
    assert table["lis"] == {"3": Counts(4, 4, 3, 3, 3), "9": Counts(4, 4, 4, 4, 4)}
    assert table["arithmetic"]["3"].precision == 3 / 4
    assert table["arithmetic"]["1"].recall == 1 and table["arithmetic"]["1"].keep_rate == 3 / 4
    assert filter_metrics.from_json(filter_metrics.to_json(table)) == table


def test_tables_add_up_in_order():
    a = {"lis": {"12": Counts(1)}, "arithmetic": {"2": Counts(1, kept_and_correct=1)}}
    b = {"lis": {"3": Counts(5)}, "arithmetic": {"2": Counts(2, kept_and_correct=1)}}
    total = filter_metrics.add([a, b])
    assert list(total) == ["arithmetic", "lis"] and list(total["lis"]) == ["3", "12"]
    assert total["arithmetic"]["2"] == Counts(3, kept_and_correct=2)


def test_the_report_says_what_it_does_not_know():
    table = {"lis": {"3": Counts(4, 2, 2, 3, 2), "9": Counts(5, 0, 0, 0, 0)}}
    lines = filter_metrics.table_text(table).splitlines()
    assert lines[3].split() == "lis 3 4 2 3 50.0 % 100.0 % 66.7 % 0".split()
    assert lines[4].split() == "lis 9 5 0 0 0.0 % – – 0".split()
    assert lines[5].split()[:5] == "lis all 9 2 3".split()


def test_files_keep_their_keys():
    table = {"lis": {"3": Counts(6, passed=5, kept=4, correct=3, kept_and_correct=2, unended=1)}}
    found = {"written": 6, "passed": 5, "agreeing": 4, "right": 3, "both": 2, "unended": 1}
    assert filter_metrics.to_json(table) == {"lis": {"3": found}}
