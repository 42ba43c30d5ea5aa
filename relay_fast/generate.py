"""Prints chains of a trained model, writes datasets of them and shows such datasets.

Its four forms:

    python -m relay_fast.generate --out RUN --task arithmetic --length 12 --number 5
    python -m relay_fast.generate --out RUN --task arithmetic --lengths 1-25 --number 100000
        --dataset DIR
    python -m relay_fast.generate --out RUN --task arithmetic --lengths 11-14 --number 1000
        --export chains.jsonl --format sft
    python -m relay_fast.generate --show DIR

The same command continues an interrupted dataset. Under torchrun, or with --shard I/N from any
scheduler, each process writes its files of the dataset. An export is text for other programs.
With --dataset it is made from that dataset, so that an interruption loses nothing, with --show from
an existing one.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from relay_fast._moved_paths import forward
from relay_fast.decoding.chains import (
    decode_chains,
    fitting_problems,
    generate_looped_chains,
    parse_chains,
)
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.relay import export, filter_metrics, label_free
from relay_fast.relay.chain_dataset import (
    SHARD_CHAINS,
    ChainDataset,
    DatasetError,
    dataset_tasks,
    kept_bounds,
    missing_shards,
    read_manifest,
    write_dataset,
)
from relay_fast.relay.chain_parts import chain_parts
from relay_fast.relay.presets.saved import AUTOCAST_HELP, open_run, run_autocast
from relay_fast.relay.run_folder import RunFolderError
from relay_fast.relay.shards import shared_start
from relay_fast.reporting.progress import Display, Problems
from relay_fast.reporting.tables import MODEL_NAMES
from relay_fast.reporting.terminal import lenient_output, refused
from relay_fast.tasks import NO_ANSWER, Samples, Task
from relay_fast.tasks.base import matches
from relay_fast.tasks.samples import tasks_present
from relay_fast.tasks.verify import same_answers
from relay_fast.training.model_files import Model, load_run_model, run_tasks
from relay_fast.training.ranks import silent, speaks
from relay_fast.utils.cores import limit_threads
from relay_fast.utils.deprecation import warn_renamed
from relay_fast.utils.errors import RunStopped
from relay_fast.utils.interrupts import interrupt_once, on_interrupt
from relay_fast.utils.lengths import parse_lengths
from relay_fast.utils.precision import DTYPES
from relay_fast.utils.settings import Seed, check_value
from relay_fast.utils.tensor_files import CheckpointError

MOST_PRINTED, MOST_WRITTEN = 10_000, 10**9
_REFUSED = (ValueError, RunFolderError, CheckpointError, DatasetError)
CHECKS = {"self": "self", "task": "task", "none": None}


def chain_text(
    task: Task,
    problem: np.ndarray,
    rounds: Sequence[Sequence[int]] | None,
    answer: int,
    truth: tuple[Sequence[Sequence[int]], int] | None = None,
) -> str:
    """Formats a problem, its rounds with ✓ or ✗ at each, and its answer.

    Args:
        task: The problem's task.
        problem: Token ids of the problem.
        rounds: Token ids of each round; None for a model that writes answers only.
        answer: Token id of the answer, NO_ANSWER if none can be read.
        truth: The true rounds and answer, by default those of the task's solver; a task without
            one gets no marks.
    """
    lines, read = [task.decode(problem)], [] if rounds is None else rounds
    given = "(none)" if answer == NO_ANSWER else task.answer_text(read, answer)
    if truth is None and not task.solves:
        lines += [f"    {task.decode(r) or '(nothing)'}" for r in read]
        return "\n".join([*lines, f"  answer {given}"])
    truth, true_answer = task.solve(problem) if truth is None else truth
    if rounds is not None:
        texts = [task.decode(r) or "(nothing)" for r in rounds]
        texts += ["(no round)"] * (len(truth) - len(rounds))
        for k, correct in enumerate(matches(truth, rounds)):
            wanted = task.decode(truth[k]) if k < len(truth) else "no further round"
            lines.append(
                f"  {_mark(correct)} {texts[k]}" + ("" if correct else f"   expected {wanted}")
            )
    expected = task.answer_text(truth, true_answer) if rounds else task.decode([true_answer])
    correct = answer == true_answer and (given == expected or not rounds)
    mark = _mark(correct)
    lines.append(f"  answer {given} {mark}" + ("" if correct else f" expected {expected}"))
    return "\n".join(lines)


def _mark(correct: bool) -> str:
    return "✓" if correct else "✗"


def _print_chains(model: Model, task: Task, problems: Samples, autocast: str) -> None:
    """Prints the model's chain for each problem, and how many are correct."""
    tasks, unended = {task.name: task}, 0
    if looped := isinstance(model, LoopedTransformer):
        written = generate_looped_chains(model, problems, tasks, autocast=autocast)
    else:
        decoded = decode_chains(model, problems, tasks, autocast=autocast)
        written, unended = parse_chains(decoded, problems, tasks), int((~decoded.ended).sum())
    writes_chains = not looped or model.supervise == "chain"
    for i in range(len(problems)):
        rounds = written.rounds_of(i) if writes_chains else None
        truth = problems.rounds_of(i), int(problems.answer[i])
        answer = int(written.answer[i])
        print(chain_text(task, problems.problem_of(i), rounds, answer, truth) + "\n")
    same = written.answer == problems.answer
    correct = int((same_answers(written, problems, tasks) if writes_chains else same).sum())
    parts = [f"{correct} of {len(problems)} answers right"]
    if writes_chains:
        chains = [
            all(matches(problems.rounds_of(i), written.rounds_of(i))) for i in range(len(problems))
        ]
        parts.insert(0, f"{sum(chains)} of {len(problems)} chains right")
    if unended:
        parts.append(f"{unended} did not end within the limit")
    print(", ".join(parts))


def _print_some(a: argparse.Namespace) -> None:
    """Prints chains of one length (`--length`)."""
    model, tasks, config = _load(a)
    task = tasks[a.task]
    problems = fitting_problems([model], task, a.length, a.number, a.seed)
    shortest, longest = config["tasks"][a.task]["train"]
    print(f"{a.model} on {a.task} of length {a.length}; trained on {shortest} to {longest}\n")
    _print_chains(model, task, problems, run_autocast(config, a.autocast))


def _write(a: argparse.Namespace) -> None:
    """Writes a dataset of chains (`--dataset`), text of chains (`--export`), or both."""
    if a.export is not None:
        export.check_export(a.export, a.format)
    (share, n), ready = a.start.share, a.start.ready
    if n > 1 and (a.dataset is None or a.export is not None):
        raise ValueError(
            "a shard of chains goes into a --dataset: write text of all with --show DIR --export."
        )
    model, tasks, config = _load(a)
    limit = model.config.max_tokens
    chosen = parse_lengths(a.lengths)
    if chosen[-1] > limit:
        raise ValueError(
            f"--lengths {a.lengths} goes beyond this model's limit of {limit} tokens: give "
            f"shorter ones."
        )
    lengths = np.array(chosen)
    numbers = np.full(len(lengths), a.number // len(lengths))
    numbers[: a.number % len(lengths)] += 1
    counts = dict(zip(lengths.tolist(), numbers.tolist(), strict=True))
    started, shown = time.monotonic(), speaks()
    if shown:
        print(
            f"{a.model} writes {a.number} chains of {a.task} into {a.dataset or a.export}",
            flush=True,
        )
    with Display() as display:
        bounds = _bounds(a, model, tasks[a.task], config)
        options = {"seed": a.seed, "verify": CHECKS[a.verify], "bounds": bounds}
        options["autocast"] = run_autocast(config, a.autocast)
        if shown:
            display.start(a.model)
            options["progress"] = lambda *done: display.progress(a.model, Problems(*done))
        wanted = {a.task: counts}
        if a.dataset is None:
            parts = chain_parts(model, tasks, wanted, part_chains=a.shard_chains, **options)
            exported = export.export_chains(a.export, parts, tasks, a.format)
        else:
            options |= {"shard_chains": a.shard_chains, "share": a.start.share, "ready": ready}
            manifest = write_dataset(a.dataset, model, tasks, wanted, **options)
        if shown:
            display.finish(a.model, time.monotonic() - started)
    if a.dataset is None:
        print(_exported(a, exported))
    else:
        print(_summary(a.dataset, manifest))
        if missing := missing_shards(a.dataset, manifest):
            waiting = ", ".join(f"{k}/{n}" for k in sorted({index % n for index in missing}))
            print(f"shard {share}/{n} is done; files of {waiting} are missing")
        if a.export is not None:
            _export_folder(a, a.dataset, tasks)


def _bounds(
    a: argparse.Namespace, model: Model, task: Task, config: dict
) -> label_free.Bounds | None:
    """Returns the bounds of the label-free filter: those of a dataset that is continued, or new
    ones from problems inside the training range."""
    if a.dataset is not None and (Path(a.dataset) / "manifest.json").is_file():
        return kept_bounds(a.dataset)
    ranges = {a.task: config["tasks"][a.task]["train"]}
    few = min(label_free.PROBLEMS, config.get("evaluation", {}).get("problems", 500))
    seed, autocast = config.get("seed", 0), run_autocast(config, a.autocast)
    return label_free.confidence_bounds(model, {a.task: task}, ranges, seed, few, autocast)


def _export_folder(a: argparse.Namespace, folder: str, tasks: dict[str, Task]) -> None:
    """Writes the chains of a dataset as text."""
    parts = ChainDataset(folder, only_passed=False, unfinished=True).parts()
    print(_exported(a, export.export_chains(a.export, parts, tasks, a.format)))


def _exported(a: argparse.Namespace, counts: tuple[int, int]) -> str:
    return f"{a.export}: {counts[0]} chains as {a.format}, {counts[1]} of them passed"


def _show(a: argparse.Namespace) -> None:
    """Prints some chains of a dataset and its counts (`--show`)."""
    manifest = read_manifest(a.show)
    tasks = dataset_tasks(manifest)
    if a.export is not None:
        return _export_folder(a, a.show, tasks)
    chains = ChainDataset(a.show, only_passed=False, unfinished=True)
    rng = np.random.default_rng(a.seed)
    chosen = np.sort(rng.permutation(len(chains))[: a.number])
    for i in chosen.tolist():
        chain = chains[i]
        task = tasks_present(chain.task, tasks)[int(chain.task[0])]
        rounds, answer = chain.rounds_of(0), int(chain.answer[0])
        print(f"{task.name} of length {chain.length[0]}, chain {i}")
        print(chain_text(task, chain.problem_of(0), rounds, answer) + "\n")
    print(_summary(a.show, manifest))
    if not manifest["complete"]:
        print(f"{len(chains)} chains so far; the command that writes them has not finished")


def _summary(folder: str, manifest: dict) -> str:
    identity = manifest["identity"]
    check = {"self": "the label-free filter", "task": "the task's rules", None: "no check"}
    precision = f" in {identity['autocast']}" if "autocast" in identity else ""
    lines = [
        f"{folder}: {manifest['shards']} shards of up to {identity['shard_chains']} chains, seed "
        f"{identity['seed']}, written by {identity['model']['kind']} {identity['model']['hash']}"
        f"{precision}; passed: by {check[identity['verify']]}"
    ]
    for task, bound in identity.get("bounds", {}).items():
        lines.append(label_free.bound_text(task, bound))
    if manifest["complete"]:
        lines.append(filter_metrics.table_text(filter_metrics.from_json(manifest["counts"])))
    return "\n".join(lines)


def _load(a: argparse.Namespace) -> tuple[Model, dict[str, Task], dict]:
    config = open_run(a.out).config
    _, tasks = run_tasks(config)
    if a.task not in tasks:
        raise ValueError(f"unknown task {a.task!r}; this run has {', '.join(tasks)}.")
    return load_run_model(a.out, a.model, a.start.device), tasks, config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m relay_fast.generate",
        description="Print chains that a trained model writes (--length), write a folder of them "
        "(--lengths, --dataset; the same command continues it), or show such a folder (--show).",
    )
    parser.add_argument("--out", metavar="RUN", help="the run's folder")
    parser.add_argument("--task", help="one of the run's tasks, such as arithmetic")
    parser.add_argument("--length", type=int, help="length of the problems to print")
    parser.add_argument(
        "--lengths", metavar="A-B", help="lengths of the problems whose chains are written"
    )
    parser.add_argument("--dataset", metavar="DIR", help="the folder to write chains into")
    parser.add_argument("--show", metavar="DIR", help="print what a folder of chains holds")
    parser.add_argument(
        "--export", metavar="FILE", help="write chains as text, one JSON object a line"
    )
    parser.add_argument(
        "--format",
        choices=export.FORMATS,
        default="rounds",
        help="of --export: problem, rounds and answer (rounds), or prompt and completion (sft)",
    )
    parser.add_argument("--number", type=int, default=5, help="how many chains in all; default 5")
    parser.add_argument(
        "--model",
        default="looped_aligned",
        help=f"one of {', '.join(MODEL_NAMES)}; default the first",
    )
    parser.add_argument(
        "--verify",
        choices=CHECKS,
        default="self",
        help="which chains are marked as passed: those whose answer agrees with their rounds or, "
        "without an answer head, of whose every token the model is sure (self, the default); those "
        "that follow the task's rules (task); all (none)",
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="write the I-th of N shares of --dataset's files, 0 ≤ I < N; the folder is finished "
        "when all are there",
    )
    parser.add_argument(
        "--shard-chains",
        type=int,
        default=SHARD_CHAINS,
        help=f"chains in a file; default {SHARD_CHAINS}",
    )
    parser.add_argument("--seed", type=int, default=0, help="selects the problems; default 0")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--autocast", choices=DTYPES, help=AUTOCAST_HELP)
    return parser


def _check_numbers(a: argparse.Namespace) -> None:
    if a.number < 1:
        raise ValueError(f"--number is {a.number}; give at least 1.")
    check_value("--seed", a.seed, Seed)


def _mode(a: argparse.Namespace) -> Callable[[argparse.Namespace], None]:
    """Selects the function for the arguments. Raises ValueError if they do not fit together."""
    _check_numbers(a)
    if a.out is None or a.task is None:
        raise ValueError("give --out RUN and --task, or --show DIR.")
    if a.dataset is not None or a.export is not None:
        if a.number > MOST_WRITTEN:
            raise ValueError(
                f"--number is {a.number}; at most {MOST_WRITTEN} chains go into a folder."
            )
        if a.lengths is None:
            option = "--export" if a.dataset is None else "--dataset"
            raise ValueError(f"{option} needs --lengths, for example --lengths 1-25.")
        return _write
    if a.number > MOST_PRINTED:
        raise ValueError(
            f"--number is {a.number}; at most {MOST_PRINTED} chains are printed, any number goes "
            f"into a folder with --lengths and --dataset."
        )
    if a.start.share[1] > 1:
        raise ValueError("a shard of chains goes into a folder: give --lengths and --dataset.")
    if a.length is None:
        raise ValueError("give --length to print chains, or --lengths and --dataset to write them.")
    return _print_some


def _run(a: argparse.Namespace) -> None:
    if a.show is not None:
        _check_numbers(a)
        return _show(a)
    asked = {name: value for name, value in vars(a).items() if name != "device"}
    with shared_start(a.shard, a.device, lambda: asked) as a.start:
        _mode(a)(a)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 0, 2 for bad input or 130 when interrupted."""
    with lenient_output():
        return _main(_parser().parse_args(arguments))


def _main(a: argparse.Namespace) -> int:
    limit_threads()
    if a.shard is not None and re.fullmatch("[0-9]+", a.shard):
        warn_renamed("--shard N", "--shard-chains N")
        a.shard, a.shard_chains = None, int(a.shard)
    try:
        _run(a)
    except (*_REFUSED, OSError, MemoryError) as error:
        return 2 if silent(error) else refused(error)
    except RunStopped as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if speaks():
            print("\ninterrupted; the same command continues a folder of chains", file=sys.stderr)
        return 130
    return 0


__getattr__ = forward(
    __name__, "relay_fast.decoding.reading", "relay_fast.decoding.chains"
)  # old import paths


if __name__ == "__main__":
    on_interrupt(interrupt_once)  # not in main: who calls it keeps their own handlers
    sys.exit(main())
