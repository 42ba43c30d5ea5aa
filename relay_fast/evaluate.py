"""Evaluates the models of a run: `python -m relay_fast.evaluate --out RUN`.

Under torchrun, or with --shard I/N from any scheduler, each process evaluates its lengths, and the
last to finish merges them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from relay_fast._moved_paths import forward
from relay_fast.relay.context import untested_lengths, untested_notes
from relay_fast.relay.evaluation import Metrics, evaluate_problems, evaluation_problems
from relay_fast.relay.presets.saved import AUTOCAST_HELP, open_run, run_autocast
from relay_fast.relay.run_folder import RunFolder, RunFolderError, versions
from relay_fast.relay.shards import EvaluationShards, Share, Start, share_lengths, shared_start
from relay_fast.reporting.progress import Display, Problems
from relay_fast.reporting.tables import MODEL_NAMES
from relay_fast.reporting.terminal import lenient_output, refused
from relay_fast.tasks import Samples, Task
from relay_fast.training.model_files import (
    Model,
    check_device,
    load_run_model,
    model_hash,
    model_path,
    run_tasks,
)
from relay_fast.training.ranks import silent, speaks
from relay_fast.utils.cores import limit_threads
from relay_fast.utils.errors import RunStopped
from relay_fast.utils.interrupts import interrupt_once, on_interrupt
from relay_fast.utils.lengths import parse_lengths
from relay_fast.utils.precision import DTYPES
from relay_fast.utils.settings import Seed, check_value
from relay_fast.utils.tensor_files import CheckpointError


def evaluate_run(
    run: str,
    models: Sequence[str] | None = None,
    lengths: range | None = None,
    number: int = 500,
    seed: int | None = None,
    device: str = "cpu",
    display: Display | None = None,
    share: Share = (0, 1),
    ready: Callable[[], None] = lambda: None,
    autocast: str | None = None,
) -> dict[str, Any]:
    """Evaluates models of a run folder and writes RUN/evaluation.json.

    The file is updated after each model, so that an interruption loses one model's numbers at most.

    Args:
        run: The run folder.
        models: Names of the models, by default all that are trained.
        lengths: By default, from the shortest trained to the longest test length of each task.
        number: Number of problems of each length.
        seed: Selects the problems, by default the run's seed.
        device: "cpu" or a CUDA device.
        display: Shows the progress.
        share: (i, n): evaluate the i-th of n shares of the lengths.
        ready: Called when all is checked, before the work.
        autocast: Precision of the GEMMs, "fp32" (the parameters' own dtype) or "bf16"; by default
            the run's.

    Returns:
        The content of evaluation.json; or this share's, with the names of those "missing".

    Raises:
        RunFolderError, CheckpointError: The folder or a model cannot be used.
        ValueError: An argument is invalid.
    """
    folder = open_run(run)
    config = folder.config
    seed = check_value("seed", config.get("seed", 0) if seed is None else seed, Seed)
    check_device(device)
    autocast = run_autocast(config, autocast)
    tasks, names = run_tasks(config)[1], _trained_models(run) if models is None else models
    results = _empty_results(config, tasks, seed, device, every=lengths is None)
    results["autocast"] = autocast
    folder.check_writable()  # whatever can be refused comes before the lock, which is a file
    loaded = {name: load_run_model(run, name, device) for name in names}
    draw = partial(evaluation_problems, [*loaded.values()], number=number, seed=seed)
    wanted = {n: [*(lengths or _all_lengths(config, task))] for n, task in tasks.items()}
    shards = None
    if share[1] > 1:
        shards = EvaluationShards(folder, share, _identity(results, loaded, wanted, number))
        wanted = share_lengths(tasks, wanted, share)
    problems = {name: draw(tasks[name], own) for name, own in wanted.items()}
    if shards is None:
        folder = open_run(run, write=True)
    ready()
    _measure(loaded, tasks, problems, results, display, folder if shards is None else None)
    if shards is None:
        return results
    return shards.write(results) or {**results, "missing": shards.missing()}


def _empty_results(
    config: Mapping[str, Any], tasks: Mapping[str, Task], seed: int, device: str, every: bool
) -> dict[str, Any]:
    """Returns the content of evaluation.json before any model is measured; if `every` length is to
    be, also those of which there are no problems."""
    results = {
        "config": config,
        "seed": seed,
        "versions": versions(device),
        "labels": {name: task.label for name, task in tasks.items()},
        "train_lengths": {name: config["tasks"][name]["train"] for name in tasks},
        "complete": False,
        "accuracy": {},
    }
    ranges = {n: (config["tasks"][n]["train"][0], config["tasks"][n]["test"][1]) for n in tasks}
    untested = untested_lengths(tasks, ranges) if every else {}
    return results | ({"untested": untested} if untested else {})


def _measure(
    loaded: Mapping[str, Model],
    tasks: Mapping[str, Task],
    problems: Mapping[str, Samples],
    results: dict,
    display: Display | None,
    folder: RunFolder | None,
) -> None:
    """Adds the accuracy of each model to `results`, and writes them into `folder` if it is given.

    Args:
        loaded, tasks, problems: By name; the problems by task.
        results: The content of evaluation.json.
        display: Shows the progress.
        folder: The run's.
    """
    for name, model in loaded.items():
        started, options = time.monotonic(), {"autocast": results["autocast"]}
        if display is not None:
            display.start(name)
            options["progress"] = lambda *done, name=name: display.progress(name, Problems(*done))
        results["accuracy"][name] = _accuracy(model, tasks, problems, options)
        results["complete"] = len(results["accuracy"]) == len(loaded)
        if folder is not None:
            folder.write("evaluation.json", results)
        if display is not None:
            display.finish(name, time.monotonic() - started)


def _identity(results: dict, loaded: Mapping[str, Model], lengths: dict, number: int) -> dict:
    """Returns what all shards of an evaluation have in common."""
    shared = {key: results[key] for key in ("config", "seed")}
    if results["autocast"] != "fp32":  # which an older version did not say
        shared["autocast"] = results["autocast"]
    hashes = {name: model_hash(model) for name, model in loaded.items()}
    return shared | {"problems": number, "models": hashes, "lengths": lengths}


def _all_lengths(config: Mapping[str, Any], task: Task) -> list[int]:
    """Returns the lengths from the shortest trained to the longest tested one."""
    entry = config["tasks"][task.name]
    return task.tested_lengths(entry["train"][0], entry["test"][1]).tolist()


def _trained_models(run: str) -> list[str]:
    """Returns the models of a run that are trained; raises CheckpointError if there is none."""
    names = [name for name in MODEL_NAMES if model_path(run, name).is_file()]
    if not names:
        raise CheckpointError(f"{run} holds no trained model yet; finish training first.")
    return names


def _accuracy(
    model: Model, tasks: Mapping[str, Task], problems: Mapping[str, Samples], options: dict
) -> dict[str, dict[str, Metrics]]:
    """Evaluates one model on the problems of each task; returns {task: {length: metrics}}."""
    accuracy = {}
    for name, drawn in problems.items():
        by_length = evaluate_problems(model, tasks, drawn, **options)
        accuracy[name] = {str(length): metrics for length, metrics in by_length.items()}
    return accuracy


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m relay_fast.evaluate",
        description="Evaluates the models of a run, prints tables, and writes evaluation.json.",
    )
    parser.add_argument("--out", required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--models", help=f"comma-separated; default all: {', '.join(MODEL_NAMES)}")
    parser.add_argument(
        "--lengths", metavar="A-B", help="lengths of the problems; default the run's"
    )
    parser.add_argument(
        "--problems", type=int, default=500, help="problems of each length; default 500"
    )
    parser.add_argument("--seed", type=int, help="selects the problems; default the run's")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--autocast", choices=DTYPES, help=AUTOCAST_HELP)
    parser.add_argument(
        "--shard", metavar="I/N", help="evaluate the I-th of N shares of the lengths, 0 ≤ I < N"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 0, 2 for bad input or 130 when interrupted."""
    with lenient_output():
        return _main(_parser().parse_args(arguments))


def _asked(a: argparse.Namespace) -> dict[str, Any]:
    """Returns what must be the same in all processes that evaluate together."""
    return {name: value for name, value in vars(a).items() if name != "device"}


def _evaluate(a: argparse.Namespace, start: Start) -> dict[str, Any]:
    """Does what the arguments ask for; returns what `evaluate_run` does."""
    if a.problems < 1:
        raise ValueError(f"--problems is {a.problems}; give at least 1.")
    models = None if a.models is None else a.models.split(",")
    asked = (models, parse_lengths(a.lengths), a.problems, a.seed)
    share, device, ready = start
    try:
        with Display() as display:
            shown = display if speaks() else None
            options = {"display": shown, "share": share, "ready": ready, "autocast": a.autocast}
            return evaluate_run(a.out, *asked, device, **options)
    except MemoryError as error:
        raise ValueError(f"no memory for {a.problems} problems a length: give fewer") from error


def _main(a: argparse.Namespace) -> int:
    limit_threads()
    file = Path(a.out) / "evaluation.json"
    before = None
    try:
        before = file.stat().st_mtime_ns if file.is_file() else None
        with shared_start(a.shard, a.device, partial(_asked, a)) as start:
            results = _evaluate(a, start)
    except (ValueError, RunFolderError, CheckpointError, OSError) as error:
        return 2 if silent(error) else refused(error)
    except RunStopped as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if speaks():
            written = file.is_file() and file.stat().st_mtime_ns != before
            kept = f"the models finished by then are in {file}"
            kept = kept if written else "no model was finished"
            print(f"\ninterrupted; {kept}, the same command begins anew", file=sys.stderr)
        return 130
    if missing := results.get("missing"):
        i, n = start.share
        print(f"shard {i}/{n} is done; missing: {', '.join(missing)}")
        return 0
    from relay_fast.reporting.tables import print_report

    for note in untested_notes(results.get("untested", {})):
        print(note)
    print_report(results, metrics=("answer", "chain", "bit", "answer_once"))
    print(f"results: {file}")
    return 0


__getattr__ = forward(
    __name__, "relay_fast.relay.evaluation", "relay_fast.utils.lengths"
)  # old import paths


if __name__ == "__main__":
    on_interrupt(interrupt_once)  # not in main: who calls it keeps their own handlers
    sys.exit(main())
