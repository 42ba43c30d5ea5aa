"""Accuracy by length, for every model on the same problems.

`answer`: the final answer is right. `chain`: every token of every round is right. `bit`: share of
the true chain's tokens that are right. All of them free-running; `bit_forced` (autoregressive
models only) is `bit` with the true tokens before each one given.

A looped model's round is compared right-aligned, as it is supervised; an autoregressive model's
text is compared token by token from the end of the prompt on. A missing token is wrong.

`python -m relay_fast.evaluate --out RUN` evaluates the models of a run again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from relay_fast._cores import limit_threads
from relay_fast._inference import inference
from relay_fast._interrupts import interrupt_once, on_interrupt
from relay_fast.batch import PackedBatch
from relay_fast.checkpoint import CheckpointError
from relay_fast.display import Display, Problems
from relay_fast.generate import (
    decode_chains,
    fitting_problems,
    generate_chains,
    read_answers,
    unseen_problems,
)
from relay_fast.modules import AutoregressiveTransformer, LoopedTransformer
from relay_fast.presets.saved import open_run
from relay_fast.ragged import ragged_index
from relay_fast.report import MODEL_NAMES
from relay_fast.runs import RunFolderError, versions
from relay_fast.settings import Seed, check_value
from relay_fast.store import Model, check_device, load_run_model, model_path, run_tasks
from relay_fast.tasks import Samples, Task
from relay_fast.tasks.vocabulary import EOS
from relay_fast.terminal import lenient_output, refused

FORCED_TOKENS = 16384  # tokens in a teacher-forced batch
Metrics = dict[str, float | int]


class Marks(NamedTuple):
    """What is right in the answers to S problems with C chain tokens in all."""

    answer: np.ndarray  # (S,) bool
    chain: np.ndarray  # (S,) bool
    hits: np.ndarray  # (C,) bool, of the tokens in Samples.rounds
    forced: np.ndarray | None = None  # (C,) bool


def mark_looped(
    model: LoopedTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> Marks:
    """Compares what the looped model writes with the truth in `problems`.

    options: those of `relay_fast.generate.generate_chains`.
    """
    written = generate_chains(model, problems, tasks, **options)
    true_sizes, sizes = np.diff(problems.round_offsets), np.diff(written.round_offsets)
    owner = np.repeat(np.arange(len(true_sizes)), true_sizes)
    from_right = problems.round_offsets[owner + 1] - np.arange(len(owner))  # 1 for the last token
    there = from_right <= sizes[owner]
    place = written.round_offsets[owner + 1] - from_right
    hits = np.zeros(len(owner), bool)
    hits[there] = written.rounds[place[there]] == problems.rounds[there]
    wrong = (sizes != true_sizes) | (np.bincount(owner[~hits], minlength=len(sizes)) > 0)
    sample = np.repeat(np.arange(len(problems)), problems.loops)
    chain = np.bincount(sample[wrong], minlength=len(problems)) == 0
    return Marks(written.answer == problems.answer, chain, hits)


def mark_autoregressive(
    model: AutoregressiveTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> Marks:
    """Compares what the autoregressive model writes with the truth in `problems`.

    options: those of `relay_fast.decode.decode`. Raises ValueError where a true sequence is longer
    than the model takes.
    """
    forced = _forced(model, problems, tasks)
    decoded = decode_chains(model, problems, tasks, **options)
    sequence, offsets, prompts = problems.sequences(tasks)
    sizes = np.diff(offsets) - prompts
    truth = sequence[ragged_index(offsets[:-1] + prompts, sizes)]
    owner = np.repeat(np.arange(len(problems)), sizes)
    place = ragged_index(np.zeros_like(sizes), sizes)
    there = place < np.diff(decoded.offsets)[owner]
    hits = np.zeros(len(truth), bool)
    hits[there] = decoded.tokens[(decoded.offsets[owner] + place)[there]] == truth[there]
    chain_sizes = np.diff(problems.round_offsets[problems.first_round])[owner]
    in_chain = place < chain_sizes
    # A last round without a delimiter of its own ends with <eos>: more after it would be wrong.
    decides = in_chain | ((place == chain_sizes) & (truth == EOS))
    chain = np.bincount(owner[decides & ~hits], minlength=len(problems)) == 0
    answer = read_answers(decoded, problems, tasks) == problems.answer
    return Marks(answer, chain, hits[in_chain], forced[in_chain])


def _forced(
    model: AutoregressiveTransformer, problems: Samples, tasks: Mapping[str, Task]
) -> np.ndarray:
    """Whether each token after the prompts is the argmax, given the true tokens before it."""
    sizes = np.diff(problems.sequences(tasks)[1])
    cuts = np.flatnonzero(np.diff((np.cumsum(sizes) - sizes) // FORCED_TOKENS)) + 1
    parts = [np.zeros(0, bool)]
    with inference(model):
        for chosen in np.split(np.arange(len(problems)), cuts):
            batch = PackedBatch.autoregressive(problems.take(chosen), tasks, device=model.device)
            parts.append(model.forced(batch).cpu().numpy())
    return np.concatenate(parts)


def evaluate_looped(
    model: LoopedTransformer,
    tasks: Mapping[str, Task],
    name: str,
    lengths: Iterable[int],
    problems_per_length: int,
    seed: int = 0,
    **options,
) -> dict[int, Metrics]:
    """{length: {answer, bit, chain, n}} of task `name`, on `unseen_problems`.

    options: `progress`, called with (problems done, all of them), and the others of the model's
    kind. Raises ValueError for lengths that the task or the model cannot take.
    """
    return _evaluate(mark_looped, model, tasks, name, lengths, problems_per_length, seed, options)


def evaluate_autoregressive(
    model: AutoregressiveTransformer,
    tasks: Mapping[str, Task],
    name: str,
    lengths: Iterable[int],
    problems_per_length: int,
    seed: int = 0,
    **options,
) -> dict[int, Metrics]:
    """{length: {answer, bit, bit_forced, chain, n}} of task `name`, on `unseen_problems`.

    options: `progress`, called with (problems done, all of them), and the others of the model's
    kind. Raises ValueError for lengths that the task or the model cannot take.
    """
    mark = mark_autoregressive
    return _evaluate(mark, model, tasks, name, lengths, problems_per_length, seed, options)


def _evaluate(mark, model, tasks, name, lengths, number, seed, options) -> dict[int, Metrics]:
    # All lengths at once: short sequences take the places of finished ones.
    drawn = [fitting_problems(model, tasks[name], length, number, seed) for length in lengths]
    problems = Samples.concat(drawn)
    marks = mark(model, problems, tasks, **options)
    token_length = np.repeat(problems.length, np.diff(problems.round_offsets[problems.first_round]))
    result = {}
    for length in np.unique(problems.length).tolist():
        samples, tokens = problems.length == length, token_length == length
        result[length] = {
            "answer": float(marks.answer[samples].mean()),
            "bit": float(marks.hits[tokens].mean()),
            "chain": float(marks.chain[samples].mean()),
            "n": int(samples.sum()),
        }
        if marks.forced is not None:
            result[length]["bit_forced"] = float(marks.forced[tokens].mean())
    return result


def hit_matrix(model: Model, task: Task, length: int, n: int, seed: int = 0) -> np.ndarray:
    """(rounds, positions) share of n problems whose token there is right, NaN where none has one.

    Positions count from the beginning of the true round.
    """
    problems = unseen_problems(task, length, n, seed)
    mark = mark_looped if isinstance(model, LoopedTransformer) else mark_autoregressive
    hits = mark(model, problems, {task.name: task}).hits
    sizes = np.diff(problems.round_offsets)
    position = ragged_index(np.zeros_like(sizes), sizes)
    round_index = np.repeat(ragged_index(np.zeros_like(problems.loops), problems.loops), sizes)
    shape = (int(problems.loops.max(initial=0)), int(sizes.max(initial=0)))
    cell = round_index * shape[1] + position
    cells = shape[0] * shape[1]
    right = np.bincount(cell, weights=hits, minlength=cells)
    count = np.bincount(cell, minlength=cells)
    return np.where(count > 0, right / np.maximum(count, 1), np.nan).reshape(shape)


# The command


def evaluate_run(
    run: str,
    models: Sequence[str] | None = None,
    lengths: range | None = None,
    number: int = 500,
    seed: int | None = None,
    device: str = "cpu",
    display: Display | None = None,
) -> dict[str, Any]:
    """Evaluates models of a run folder again and writes RUN/evaluation.json, which it returns; as
    far as it is after each model, so that an interruption loses one model's numbers at most.

    models: default all that are there. lengths: default from the shortest trained to the longest
    test length of each task. seed: default the run's. display: told how far each model is. Raises
    RunFolderError, CheckpointError, ValueError.
    """
    config = open_run(run).config
    seed = config.get("seed", 0) if seed is None else seed
    check_value("seed", seed, Seed)
    check_device(device)
    _, tasks = run_tasks(config)
    there = [name for name in MODEL_NAMES if model_path(run, name).is_file()]
    if models is None and not there:
        raise CheckpointError(f"{run} holds no trained model yet; finish training first.")
    results = {
        "config": config,
        "seed": seed,
        "versions": versions(device),
        "train_lengths": {name: config["tasks"][name]["train"] for name in tasks},
        "complete": False,
        "accuracy": {},
    }
    folder = open_run(run, write=True)
    # All of them first: what cannot be loaded is said before any work.
    chosen_models = there if models is None else models
    loaded = {name: load_run_model(run, name, device) for name in chosen_models}
    for model_name, model in loaded.items():
        looped = isinstance(model, LoopedTransformer)
        evaluate = evaluate_looped if looped else evaluate_autoregressive
        accuracy, started = {}, time.monotonic()
        options = {}
        if display is not None:
            display.start(model_name)
            options["progress"] = lambda done, total, name=model_name: display.progress(
                name, Problems(done, total)
            )
        for name in tasks:
            entry = config["tasks"][name]
            chosen = lengths or range(entry["train"][0], entry["test"][1] + 1)
            by_length = evaluate(model, tasks, name, chosen, number, seed, **options)
            accuracy[name] = {str(length): row for length, row in by_length.items()}
        results["accuracy"][model_name] = accuracy
        results["complete"] = len(results["accuracy"]) == len(loaded)
        folder.write("evaluation.json", results)
        if display is not None:
            display.finish(model_name, time.monotonic() - started)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m relay_fast.evaluate", description="Evaluate the models of a run again."
    )
    parser.add_argument("--out", required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--models", help=f"comma-separated, default all of {','.join(MODEL_NAMES)}")
    parser.add_argument("--lengths", metavar="A-B", help="default: all that the run evaluates")
    parser.add_argument("--problems", type=int, default=500, help="problems a length (500)")
    parser.add_argument("--seed", type=int, help="which problems; default the run's seed")
    parser.add_argument("--device", default="cpu")
    return parser


def parse_lengths(text: str | None) -> range | None:
    """The range that `10-13` or `10` means. Raises ValueError for anything else."""
    if text is None:
        return None
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
        raise ValueError(f"--lengths {text!r} is not understood; give a range like 10-13.")
    return range(int(first), int(last or first) + 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for bad input, 130 when interrupted."""
    with lenient_output():
        return _main(_parser().parse_args(arguments))



def _main(a: argparse.Namespace) -> int:
    on_interrupt(interrupt_once)
    limit_threads()
    file = Path(a.out) / "evaluation.json"
    before = None
    try:
        before = file.stat().st_mtime_ns if file.is_file() else None
        if a.problems < 1:
            raise ValueError(f"--problems is {a.problems}; give at least 1.")
        models = None if a.models is None else a.models.split(",")
        lengths = parse_lengths(a.lengths)
        with Display() as display:
            results = evaluate_run(
                a.out, models, lengths, a.problems, a.seed, a.device, display=display
            )
    except (ValueError, RunFolderError, CheckpointError, OSError) as error:
        return refused(error)
    except MemoryError:
        print(f"error: no memory for {a.problems} problems a length: give fewer", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        written = file.is_file() and file.stat().st_mtime_ns != before
        kept = f"the models finished by then are in {file}" if written else "no model was finished"
        print(f"\ninterrupted; {kept}, the same command begins anew", file=sys.stderr)
        return 130
    from relay_fast.report import print_report

    print_report(results, metrics=("answer", "chain", "bit"))
    print(f"results: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
