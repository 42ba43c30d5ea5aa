"""Chains of models that are fed their rounds, against a loop in plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from relay_fast.decoding.chains import (
    generate_looped_chains,
    generate_scored,
    stream_chains,
    stream_order,
)
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.tasks import NO_ANSWER, Samples, Task
from relay_fast.tasks.vocabulary import PAD
from tests.support.fed_inputs import naive_inputs
from tests.support.fed_models import TASKS, D, new_model

# The shortest of each task and its longest, in no order.
LENGTHS = {"arithmetic": [3, 1, 8, 2], "edit_distance": [1, 7, 4], "lis": [5, 14, 1, 7]}


def problems() -> Samples:
    parts = [TASKS[name].sample(lengths, seed=3) for name, lengths in LENGTHS.items()]
    return Samples.concat(parts).take(np.random.default_rng(0).permutation(11))


class Chain:
    """Reads one problem, one iteration after the other."""

    def __init__(self, model: LoopedTransformer, task: Task, problem: list[int], loops: int):
        self.texts: list[list[int]] = []
        self.scores: list[float] = []
        self.model = model
        run = self._carried if model.config.carry_state else self._fed
        with torch.no_grad():
            run(task, problem, loops)

    def _fed(self, task: Task, problem: list[int], loops: int) -> None:
        most = self.model.config.max_tokens
        seen: list[list[int]] = []
        for _ in range(loops):
            inputs = naive_inputs(task, problem, seen)
            tokens, fed, positions = map(torch.tensor, inputs)
            x = self.model.embedding(tokens) + self.model.fed_embedding(fed)
            state = self.model.block(x[None], 1, positions=positions)[0]
            self._write(state)
            seen = [*self.texts[:-1], self.texts[-1][-(most - 1) :]]
        answer = task.answer_of(self.texts)
        self.answer, self.answer_score = NO_ANSWER if answer is None else answer, 0.0

    def _carried(self, task: Task, problem: list[int], loops: int) -> None:
        n = max(len(problem), task.min_input_tokens)
        tokens = [problem[0], *[PAD] * (n - len(problem)), *problem[1:]]
        state, fed = self.model.embedding(torch.tensor(tokens)), [PAD] * n
        for _ in range(loops):
            entered = state + self.model.fed_embedding(torch.tensor(fed))
            state = self.model.block(entered[None], 1)[0]
            self._write(state)
            fed = [PAD] * (n - len(self.texts[-1])) + self.texts[-1]
        logits = self.model.answer_head(self._normed(state[-1]))
        self.answer = int(logits.argmax())
        self.answer_score = float(logits.log_softmax(-1)[self.answer])

    def _write(self, state: torch.Tensor) -> None:
        logits = self.model.chain_head(self._normed(state))
        ids = logits.argmax(-1).tolist()
        begin = max((p + 1 for p, token in enumerate(ids) if token == PAD), default=0)
        self.texts.append(ids[begin:])
        self.scores += logits.log_softmax(-1)[range(begin, len(ids)), ids[begin:]].tolist()

    def _normed(self, state: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(state, (D,), self.model.norm.weight, self.model.config.block.eps)


def plain_chains(model: LoopedTransformer, many: Samples) -> list[Chain]:
    of_index = {task.index: task for task in TASKS.values()}
    return [
        Chain(model, of_index[int(many.task[i])], many.problem_of(i).tolist(), int(many.loops[i]))
        for i in range(len(many))
    ]


def texts_of(samples: Samples) -> list[list[list[int]]]:
    return [[text.tolist() for text in samples.rounds_of(i)] for i in range(len(samples))]


@pytest.mark.parametrize("carried", [False, True])
def test_chains_are_those_of_a_plain_loop_token_for_token(carried: bool) -> None:
    """In batches and alone, scored and not, streamed and at once."""
    many, model = problems(), new_model(carry_state=carried).eval()
    truth = plain_chains(model, many)
    texts, answers = [own.texts for own in truth], [own.answer for own in truth]
    scores = np.concatenate([own.scores for own in truth])
    for batch_tokens in (1, 60):  # each problem alone; some together
        written, log_probs = generate_scored(model, many, TASKS, batch_tokens=batch_tokens)
        assert texts_of(written) == texts and written.answer.tolist() == answers
        np.testing.assert_allclose(log_probs.rounds, scores, atol=1e-5)
        np.testing.assert_allclose(log_probs.answer, [own.answer_score for own in truth], atol=1e-5)
    at_once = generate_looped_chains(model, many, TASKS)
    assert texts_of(at_once) == texts and at_once.answer.tolist() == answers
    seen = []
    for chosen, part in stream_chains(model, many, TASKS, batch_tokens=60, first=4):
        assert texts_of(part) == [texts[i] for i in chosen]
        seen += chosen.tolist()
    assert seen == stream_order(many)[4:].tolist()
    sizes = [len(text) for chain in texts for text in chain]
    assert len(set(sizes)) > 5, "the test means something"
    assert not carried or len(set(answers)) > 2


def test_what_is_no_problem_and_no_task_is_refused() -> None:
    for wrong, said in (
        ((None, TASKS), "problems is None: give the Samples that a task's sample"),
        (([[1, 2]], TASKS), "problems is an object of type list: give the Samples"),
        ((problems(), [*TASKS.values()]), "tasks is an object of type list: give the problems' ta"),
    ):
        with pytest.raises(TypeError, match=said):
            generate_looped_chains(new_model(), *wrong)


def test_a_round_that_leaves_no_room_loses_its_first_tokens() -> None:
    """A model that writes no boundary makes each input longer by one, up to its limit."""
    many = TASKS["arithmetic"].sample([8, 2, 8, 5], seed=1)
    longest = int(np.diff(many.problem_offsets).max())
    model = new_model(max_tokens=longest + 1).eval()
    with torch.no_grad():
        model.chain_head.weight[PAD] = 0  # of the other logits some is positive
    truth = plain_chains(model, many)
    assert max(len(text) for own in truth for text in own.texts) == longest + 1
    written, scores = generate_scored(model, many, TASKS)
    assert texts_of(written) == [own.texts for own in truth]
    np.testing.assert_allclose(
        scores.rounds, np.concatenate([own.scores for own in truth]), atol=1e-5
    )
    with pytest.raises(ValueError, match="longer than the model's limit|beyond the model"):
        generate_looped_chains(new_model(max_tokens=longest - 1), many, TASKS)
