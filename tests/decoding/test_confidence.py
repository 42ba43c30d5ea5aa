"""Confidences of chains: the least likely token of each, whatever the batches and the order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from relay_fast.decoding.chains import generate_looped_chains, generate_scored
from relay_fast.decoding.confidence import (
    generate_confident,
    least_log_probs,
    stream_confident,
    tells_confidence,
)
from tests.support import chain_models
from tests.support.fed_models import TASKS, mixed, new_model


def least(written, log_probs: np.ndarray) -> list[float]:
    ends = written.round_offsets[written.first_round].tolist()
    pairs = zip(ends[:-1], ends[1:], strict=True)
    return [min(log_probs[a:b].tolist(), default=-np.inf) for a, b in pairs]


def test_it_is_the_least_log_probability_of_a_chain() -> None:
    problems, model = mixed(8), new_model().eval()
    written, scores = generate_scored(model, problems, TASKS)
    chains, confidence = generate_confident(model, problems, TASKS, batch_tokens=60)
    assert tells_confidence(model) and confidence.dtype == np.float32
    assert np.array_equal(chains.rounds, written.rounds)
    np.testing.assert_allclose(confidence, least(written, scores.rounds), atol=1e-5)
    assert len(np.unique(confidence)) > len(problems) // 2
    for chosen, _, own in stream_confident(model, problems, TASKS, batch_tokens=100):
        np.testing.assert_allclose(own, confidence[chosen], atol=1e-5)


def test_chains_without_tokens_have_none() -> None:
    problems = mixed(4)
    truth = np.random.default_rng(0).standard_normal(len(problems.rounds)).astype(np.float32)
    assert least_log_probs(problems, truth).tolist() == least(problems, truth)
    sizes = np.diff(problems.round_offsets)
    owner = np.repeat(np.arange(len(problems)), problems.loops)
    sizes[np.isin(owner, [0, 5, len(problems) - 1])] = 0
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    holes = replace(problems, round_offsets=offsets, rounds=problems.rounds[: offsets[-1]])
    found = least_log_probs(holes, truth[: offsets[-1]])
    assert found.tolist() == least(holes, truth)
    assert np.flatnonzero(np.isneginf(found)).tolist() == [0, 5, len(problems) - 1]
    assert least_log_probs(problems.take(slice(0)), truth[:0]).shape == (0,)


def test_a_model_with_an_answer_head_tells_none() -> None:
    torch.manual_seed(0)
    model, problems = chain_models.looped_model(), chain_models.mixed_problems(3)
    written, confidence = generate_confident(model, problems, chain_models.TASKS)
    assert confidence is None and not tells_confidence(model)
    expected = generate_looped_chains(model, problems, chain_models.TASKS)
    assert np.array_equal(written.rounds, expected.rounds)
    assert not tells_confidence(new_model(carry_state=True))
    assert not tells_confidence(chain_models.ar_model())
