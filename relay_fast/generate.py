"""Chains that a model writes: looped (all positions of a round at once) or token by token.

`python -m relay_fast.generate --out RUN --task arithmetic --length 12 --number 5` prints some.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from relay_fast._inference import inference
from relay_fast.batch import PackedBatch
from relay_fast.checkpoint import CheckpointError
from relay_fast.decode import Decoded, decode
from relay_fast.modules import AutoregressiveTransformer, LoopedTransformer
from relay_fast.plan import Plan
from relay_fast.ragged import offsets_of, ragged_index
from relay_fast.runs import RunFolder, RunFolderError
from relay_fast.store import MODEL_NAMES, Model, load_run_model, run_tasks
from relay_fast.tasks import TASK_NAMES, Samples, Task
from relay_fast.tasks.vocabulary import PAD

# Problem tokens in a batch, by device: what a CPU's caches hold (measured), what fills a GPU.
BATCH_TOKENS = {"cpu": 2048, "cuda": 1 << 17}
UNSEEN = 1 << 40  # added to a seed: training streams use small ones, so they never meet
NO_ANSWER = -1  # where what was written cannot be read as an answer

Progress = Callable[[int, int], Any]


def unseen_problems(task: Task, length: int, number: int, seed: int) -> Samples:
    """The first `number` problems of a length, of a stream that no training draws from.

    They depend on the task's parameters, length and seed alone: every model gets the same. (Short
    problems are few, those are met in training all the same.)
    """
    return task.sample(np.full(number, length), seed + UNSEEN)


def generate_chains(
    model: LoopedTransformer,
    problems: Samples,
    tasks: Mapping[str, Task],
    *,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Samples:
    """The same problems, in the same order, with the rounds and answers that the model writes.

    A problem gets `problems.loops` rounds; its true rounds and answer are not read. A round begins
    after the last `<pad>` read from the right, and may be empty. batch_tokens: problem tokens in a
    batch, by default those of BATCH_TOKENS. progress is called with (problems done, S). Raises
    ValueError for problems that the model cannot take.
    """
    batch_tokens = batch_tokens or BATCH_TOKENS[model.device.type]
    order = np.lexsort((-np.diff(problems.problem_offsets), -problems.loops))
    sizes = np.diff(problems.problem_offsets)[order]
    cuts = np.flatnonzero(np.diff((np.cumsum(sizes) - sizes) // batch_tokens)) + 1
    questions = _without_truth(problems)
    parts, done = [], 0
    with inference(model):
        for chosen in np.split(order, cuts):
            part = questions.take(chosen)
            batch = PackedBatch.looped(part, tasks, device=model.device)
            rounds, answers = model.read(batch)
            ids = torch.cat([*rounds, answers]).cpu().numpy().astype(np.int32)
            written, round_offsets = _strip(ids[: len(ids) - len(part)], batch.plan)
            parts.append(
                replace(
                    part.take(batch.order),
                    rounds=written,
                    round_offsets=round_offsets,
                    answer=ids[len(ids) - len(part) :],
                )
            )
            done += len(part)
            if progress is not None:
                progress(done, len(problems))
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return Samples.concat(parts).take(back)


def _without_truth(problems: Samples) -> Samples:
    """The problems with empty rounds and no answers."""
    return replace(
        problems,
        rounds=np.zeros(0, np.int32),
        round_offsets=np.zeros(len(problems.round_offsets), np.int64),
        answer=np.full(len(problems), PAD, np.int32),
    )


def _strip(ids: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Rounds (flat) and their offsets, sequence by sequence, from the ids of every iteration's
    active prefix, iteration-major."""
    active = np.array(plan.active_sequences, np.int64)
    owner = ragged_index(np.zeros_like(active), active)
    iteration = np.repeat(np.arange(len(active)), active)
    ends = np.cumsum(plan.lengths[owner])
    starts = ends - plan.lengths[owner]
    pads = np.where(ids == PAD, np.arange(len(ids)), -1)
    last_pad = np.maximum.reduceat(pads, starts) if len(starts) else starts
    begins = np.maximum(last_pad + 1, starts)
    by_sequence = np.lexsort((iteration, owner))
    begins, sizes = begins[by_sequence], (ends - begins)[by_sequence]
    return ids[ragged_index(begins, sizes)], offsets_of(sizes)


def decode_chains(
    model: AutoregressiveTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> Decoded:
    """What the autoregressive model writes after each problem: up to the longest chain that a
    problem of that length can have. options: those of `relay_fast.decode.decode`."""
    limits = np.zeros(len(problems), np.int64)
    for name, task in _present(problems, tasks).items():
        of_task = problems.task == TASK_NAMES.index(name)
        for length in np.unique(problems.length[of_task]).tolist():
            limit = task.max_sequence_tokens(length) - task.max_problem_tokens(length)
            limits[of_task & (problems.length == length)] = limit
    return decode(model, problems.problem, problems.problem_offsets, max_new=limits, **options)


def write_chains(
    model: AutoregressiveTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> Samples:
    """The same problems with the rounds and answers that the autoregressive model writes.

    The number of rounds is what the model wrote; an answer that cannot be read is NO_ANSWER.
    options: those of `relay_fast.decode.decode`.
    """
    decoded = decode_chains(model, problems, tasks, **options)
    rounds, answers = _read_texts(decoded, problems, tasks)
    return replace(
        problems,
        rounds=np.array([token for chain in rounds for r in chain for token in r], np.int32),
        round_offsets=offsets_of(np.array([len(r) for chain in rounds for r in chain], np.int64)),
        loops=np.array([len(chain) for chain in rounds], np.int32),
        answer=np.array(answers, np.int32),
    )


def _read_texts(
    decoded: Decoded, problems: Samples, tasks: Mapping[str, Task]
) -> tuple[list[list[list[int]]], list[int]]:
    """Rounds and answer of every decoded sequence."""
    chains, answers = [], []
    tokens, bounds = decoded.tokens.tolist(), decoded.offsets.tolist()
    for k, begin, end in zip(problems.task.tolist(), bounds[:-1], bounds[1:], strict=True):
        chain, answer = tasks[TASK_NAMES[k]].split(tokens[begin:end])
        chains.append(chain)
        answers.append(NO_ANSWER if answer is None else answer)
    return chains, answers


def read_answers(decoded: Decoded, problems: Samples, tasks: Mapping[str, Task]) -> np.ndarray:
    """(S,) int32 answers of what was decoded, NO_ANSWER where there is none to read."""
    return np.array(_read_texts(decoded, problems, tasks)[1], np.int32)


def verify_chains(
    written: Samples, tasks: Mapping[str, Task], verify: str | None = "task"
) -> np.ndarray:
    """(S,) bool: which chains pass.

    verify="task": every round is what the problem's rules demand, and the answer is the one that
    the rounds imply. "self": the answer is the one that the rounds imply (needs no solver and no
    label). None: all pass. Raises ValueError for another name.
    """
    if verify not in ("task", "self", None):
        raise ValueError(f'verify = {verify!r} is unknown: use "task", "self" or None')
    passed = np.ones(len(written), bool)
    for i in range(len(written) if verify else 0):
        task, rounds = tasks[TASK_NAMES[written.task[i]]], written.rounds_of(i)
        passed[i] = task.answer_of(rounds) == written.answer[i]
        if passed[i] and verify == "task":
            passed[i] = all(task.check(written.problem_of(i), rounds))
    return passed


def _present(problems: Samples, tasks: Mapping[str, Task]) -> dict[str, Task]:
    """The tasks that occur."""
    names = [TASK_NAMES[k] for k in np.unique(problems.task)]
    return {name: tasks[name] for name in names}


# The command


def chain_text(
    task: Task, problem: np.ndarray, rounds: Sequence[Sequence[int]] | None, answer: int
) -> str:
    """A problem, its rounds with ✓ or ✗ at each, and its answer, to be read by people.

    rounds: None for a model that writes answers only. answer: NO_ANSWER where none can be read.
    """
    truth, right_answer = task.solve(problem)
    lines = [task.decode(problem)]
    if rounds is not None:
        texts = [task.decode(r) or "(nothing)" for r in rounds]
        texts += ["(no round)"] * (len(truth) - len(rounds))
        for k, right in enumerate(task.check(problem, rounds)):
            wanted = task.decode(truth[k]) if k < len(truth) else "no further round"
            lines.append(
                f"  {_mark(right)} {texts[k]}" + ("" if right else f"   expected {wanted}")
            )
    expected = task.decode([right_answer])
    given = "(none)" if answer == NO_ANSWER else task.decode([answer])
    right = answer == right_answer
    lines.append(f"  answer {given} {_mark(right)}" + ("" if right else f" expected {expected}"))
    return "\n".join(lines)


def _mark(right: bool) -> str:
    return "✓" if right else "✗"


def _check_fits(model: Model, task: Task, problems: Samples, length: int) -> None:
    """Raises ValueError where the model cannot take the problems or hold their true chains."""
    sizes = np.diff(problems.problem_offsets)
    if isinstance(model, AutoregressiveTransformer):
        sizes = np.diff(problems.sequences({task.name: task})[1]) - 1
    limit = model.config.max_tokens
    if sizes.max(initial=0) > limit:
        raise ValueError(
            f"{task.name} length {length} needs {sizes.max()} tokens, more than the model's limit "
            f"of {limit}: use a smaller length, or train a model with a larger test length."
        )


def _show(model: Model, task: Task, problems: Samples, tasks: Mapping[str, Task]) -> None:
    """Prints what the model writes for each problem, and how much of it is right."""
    looped = isinstance(model, LoopedTransformer)
    written = (generate_chains if looped else write_chains)(model, problems, tasks)
    writes_chains = not looped or model.supervise == "chain"
    for i in range(len(problems)):
        rounds = written.rounds_of(i) if writes_chains else None
        print(chain_text(task, problems.problem_of(i), rounds, int(written.answer[i])) + "\n")
    right = int((written.answer == problems.answer).sum())
    parts = [f"{right} of {len(problems)} answers right"]
    if writes_chains:
        chains = [
            all(task.check(problems.problem_of(i), written.rounds_of(i)))
            for i in range(len(problems))
        ]
        parts.insert(0, f"{sum(chains)} of {len(problems)} chains right")
    print(", ".join(parts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m relay_fast.generate", description="Print chains that a trained model writes."
    )
    parser.add_argument("--out", required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--task", required=True)
    parser.add_argument("--length", required=True, type=int, help="complexity of the problems")
    parser.add_argument("--number", type=int, default=5, help="how many problems (5)")
    parser.add_argument("--model", default=MODEL_NAMES[0], help=f"one of {', '.join(MODEL_NAMES)}")
    parser.add_argument("--seed", type=int, default=0, help="which problems (0)")
    parser.add_argument("--device", default="cpu")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 for bad input."""
    a = _parser().parse_args(arguments)
    try:
        config = RunFolder.open(a.out).config
        _, tasks = run_tasks(config)
        if a.task not in tasks:
            raise ValueError(f"unknown task {a.task!r}; this run has {', '.join(tasks)}.")
        if a.number < 1:
            raise ValueError(f"--number is {a.number}; give at least 1.")
        task = tasks[a.task]
        model = load_run_model(a.out, a.model, a.device)
        problems = unseen_problems(task, a.length, a.number, a.seed)
        _check_fits(model, task, problems, a.length)
        shortest, longest = config["tasks"][a.task]["train"]
        print(f"{a.model} on {a.task} of length {a.length}; trained on {shortest} to {longest}\n")
        _show(model, task, problems, tasks)
    except (ValueError, RunFolderError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
