"""Tasks of texts are evaluated as the built-in ones are; their answers may have several tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.relay import evaluation
from relay_fast.relay.evaluation import evaluate_problems, grade_autoregressive, grade_looped
from relay_fast.tasks import Vocabulary
from tests.support.text_tasks import Parity, Total

VOCABULARY = Vocabulary(None, 1, ("[parity]", "[total]", *"0123456789+"))
TASKS = {"parity": Parity().bound(VOCABULARY, 3), "total": Total().bound(VOCABULARY, 4)}


def models():
    torch.manual_seed(0)
    config = lambda causal=False, **more: ModelConfig(
        BlockConfig(16, 2, 1, causal=causal), VOCABULARY.size, 80, **more
    )
    yield LoopedTransformer(config())
    yield LoopedTransformer(config(feedback="tokens"))
    yield LoopedTransformer(config(), supervise="answer")
    yield AutoregressiveTransformer(config(causal=True))


@pytest.mark.parametrize("name", TASKS)
def test_every_model_is_graded(name: str) -> None:
    problems = TASKS[name].sample([2, 2, 3, 3], seed=0)
    for model in models():
        rows = evaluate_problems(model, TASKS, problems)
        assert sorted(rows) == [2, 3] and all(row["n"] == 2 for row in rows.values())
        answers_alone = getattr(model, "supervise", "chain") == "answer"
        nothing = name == "total" and answers_alone  # it cannot write an answer of two digits
        assert all((row["answer"] is None) == nothing for row in rows.values())


def test_true_chains_are_right_and_wrong_answers_are_not(monkeypatch) -> None:
    looped, _, _, autoregressive = models()
    truth = TASKS["total"].sample([4, 4, 4], seed=1)
    wrong = truth.rounds.copy()
    first = truth.round_offsets[truth.first_round[1] - 1]
    wrong[first] = VOCABULARY.id_of("+")
    written = replace(truth, rounds=wrong)
    monkeypatch.setattr(evaluation, "generate_looped_chains", lambda *a, **k: written)
    grades = grade_looped(looped, truth, TASKS)
    assert grades.answer.tolist() == grades.chain.tolist() == [False, True, True]
    monkeypatch.setattr(evaluation, "parse_chains", lambda *a, **k: written)
    assert grade_autoregressive(autoregressive, truth, TASKS).answer.tolist() == [False, True, True]
