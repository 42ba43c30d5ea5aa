"""Runs RELAY: `python -m relay_fast.train --preset cpu --out RUN`.

The same command continues an interrupted run. It writes results.json, plots and checkpoints.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from relay_fast.ops.dispatch import select
from relay_fast.relay.pipeline import OutOfTime, run_pipeline, with_needs
from relay_fast.relay.presets import load_preset, override, preset_names, recipe
from relay_fast.relay.presets.own import config_text, read_config, resolved
from relay_fast.relay.presets.saved import refuse_foreign
from relay_fast.relay.presets.schema import RunConfig
from relay_fast.relay.run_folder import (
    MACHINE,
    RunFolder,
    RunFolderError,
    code_versions,
    versions,
)
from relay_fast.relay.stages import STAGE_DEPENDENCIES, Context
from relay_fast.relay.together import run_together
from relay_fast.reporting.progress import Display
from relay_fast.reporting.terminal import draw_all, lenient_output, refused
from relay_fast.tasks import TextTask
from relay_fast.tasks.references import refuse_while_loading
from relay_fast.training.model_files import check_device
from relay_fast.training.ranks import (
    agree,
    first_rank,
    joined_ranks,
    refuse_together,
    silent,
    speaks,
)
from relay_fast.utils.deprecation import renamed_keywords
from relay_fast.utils.errors import RunStopped, WorkerDied
from relay_fast.utils.interrupts import interrupt_once, on_interrupt
from relay_fast.utils.settings import check, described_text
from relay_fast.utils.tensor_files import CheckpointError


@renamed_keywords(report="print_table")
def train(
    config: Mapping[str, Any],
    out: str | Path,
    *,
    stages: Sequence[str] | None = None,
    device: str = "cpu",
    impl: str = "auto",
    minutes: float | None = None,
    print_table: bool = True,
    tasks: Sequence[TextTask] = (),
    display: Display | None = None,
) -> dict[str, Any]:
    """Runs RELAY, or some of its stages, in the run folder `out`; continues an interrupted run.

    Args:
        config: A preset of `relay_fast.relay.presets`, overridden or not, or a config of one's own.
        out: The run folder.
        stages: The stages to run, with their dependencies; by default all.
        device: "cpu" or a CUDA device; several, like "cuda:0,cuda:1", for stages side by side.
        impl: Implementation of the kernels: "auto", "triton" or "torch".
        minutes: Time limit, by default none.
        print_table: Print the table and draw the plots at the end.
        tasks: Tasks of one's own, each named in `config["tasks"]`.
        display: Shows the progress, by default one of its own.

    Returns:
        The content of results.json.

    Raises:
        ValueError: The config or an argument is invalid.
        RunFolderError, CheckpointError: The folder or a checkpoint cannot be used.
        RunStopped: A training diverged, or a worker process died.
        OutOfTime: `minutes` are over; everything is saved.
    """
    names, config = _checked(config, stages, device, minutes, tasks)
    with joined_ranks(device) as (ranks, device):
        agree(ranks, lambda: prove(config, device, impl, ranks.size), _identity(config, names))
        options = {"device": device, "impl": impl, "minutes": minutes}
        begin = lambda: _begin(config, out, device, impl)
        folder, call = first_rank(ranks, begin) or (None, None)
        try:
            if ranks.alone:
                with nullcontext(display) if display else Display() as shown:
                    run_pipeline(folder, names, shown, done=call.finish, **options)
            else:
                done = None if call is None else call.finish
                run_together(Path(out), config, folder, names, ranks, done=done, **options)
        except BaseException:
            if call is not None:
                call.record()
            raise
    if folder is None:
        return {}
    results = folder.results()
    if print_table:
        _show(results, folder.path)
    return results


def _checked(
    config: Mapping[str, Any],
    stages: Sequence[str] | None,
    device: str,
    minutes: float | None,
    tasks: Sequence[TextTask],
) -> tuple[list[str], dict[str, Any]]:
    """Returns the stages and the whole config; raises an error on all ranks."""
    try:
        names = _wanted_stages(stages, minutes)
        refuse_while_loading()
        return names, resolved(config, tasks)
    except (ValueError, RuntimeError, OSError) as error:
        refuse_together(error, device)


def _wanted_stages(stages: Sequence[str] | None, minutes: float | None) -> list[str]:
    """Returns stages with those that they need; raises ValueError for an unknown one, and for a
    time limit that is none."""
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes = {minutes:g}: give more than 0")
    return with_needs(STAGE_DEPENDENCIES if stages is None else stages)


def _begin(config: Mapping[str, Any], out: str | Path, device: str, impl: str):
    """Makes or continues the folder of a run; returns it and the record of this call."""
    refuse_foreign(out)
    device = device.split(",")[0]
    folder, context = RunFolder(out, config), Context(Path(), config, device, impl)
    _refuse_other_samples(folder, context.fingerprints)
    call = _Call(folder, device, context.labels)
    for note in context.notes:
        print(note, flush=True)
    _report_data(folder, context.data, context.untested)
    return folder, call


def _refuse_other_samples(folder: RunFolder, fingerprints: Mapping[str, str]) -> None:
    """Raises RunFolderError for a task that draws other samples than when the run began; keeps the
    hashes of a new run."""
    before = folder.results().get("samplers", {})
    for name, digest in fingerprints.items():
        if before.get(name, digest) != digest:
            raise RunFolderError(
                f"the class of task {name!r} draws other samples than when the run {folder.path} "
                f"began: restore it, or give another --out"
            )
    if fingerprints.keys() - before.keys():
        folder.update_results({"samplers": dict(fingerprints)})


def _report_data(
    folder: RunFolder,
    data: Mapping[str, Mapping[str, int]],
    untested: Mapping[str, Sequence[int]],
) -> None:
    """Prints counts of the records that tasks are trained and tested on, and keeps them and the
    lengths that cannot be evaluated."""
    for name, counts in data.items():
        shown = ", ".join(f"{key.replace('_', ' ')} {n:,}" for key, n in counts.items())
        print(f"records of {name}: {shown}", flush=True)
    if data:
        without = {name: {"untested": [*lengths]} for name, lengths in untested.items()}
        kept = {name: {**counts, **without.get(name, {})} for name, counts in data.items()}
        folder.update_results({"data": kept})


def _identity(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Returns what must be the same on all ranks."""
    shared = {key: value for key, value in config.items() if key not in MACHINE}
    return {"config": shared, "stages": ", ".join(names), **code_versions()}


def prove(
    config: Mapping[str, Any], device: str = "cpu", impl: str = "auto", ranks: int = 1
) -> Context:
    """Checks a config before anything is written; returns the run as its stages see it.

    Args:
        config: The config of a run.
        device: Where it will run, as in `train`.
        impl: Implementation of the kernels.
        ranks: How many processes will train together.

    Raises:
        ValueError: The tasks or models cannot be built, or the device does not support `impl`.
    """
    check(RunConfig, config)
    _check_devices(device, impl)
    for stage in config["stages"]:
        size = recipe(config, stage)["batch_size"]
        if size < ranks:
            raise ValueError(
                f"{ranks} processes cannot share the {size} samples of a batch of {stage}: start "
                f"at most {size}, or give a larger batch_size"
            )
    context = Context(Path(), config, device.split(",")[0], impl)
    context.prove()
    return context


def _check_devices(device: str, impl: str) -> None:
    """Raises ValueError for a device that does not exist, or does not support `impl`."""
    for place in device.split(","):
        check_device(place)
        try:
            select(impl, place)
        except RuntimeError as error:
            raise ValueError(f"impl = {impl!r} cannot run on device {place!r}: {error}") from error


class _Call:
    """The record in results.json of a run and of each call: start, duration, device, stages.

    A call that has nothing to do is not recorded.
    """

    def __init__(self, folder: RunFolder, device: str, labels: Mapping[str, Any]):
        self.folder, self.labels, self.began = folder, labels, time.monotonic()
        self.versions = versions(device)
        self.before = folder.results().get("calls", [])
        self.call: dict[str, Any] = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
        self.call |= {key: self.versions[key] for key in ("device_name", "torch", "commit")}
        self.call["finished"] = []

    def finish(self, stage: str, result: Mapping[str, Any]) -> None:
        """Writes the results of a stage that has just finished."""
        longest = self.folder.results().get("longest_true_problem", {})
        part, seconds = dict(result["result"]), result["seconds"]
        for task, length in part.pop("longest_true_problem", {}).items():
            longest[task] = max(length, longest.get(task, 0))
        self.folder.update_results(
            {**part, "longest_true_problem": longest, "seconds": {stage: seconds}}
        )
        self.record(stage)
        self.folder.mark_done(stage, {"seconds": seconds})

    def record(self, stage: str | None = None) -> None:
        """Updates results.json; `stage` is the one that has just finished, if any."""
        self.call["finished"] += [stage] if stage else []
        self.call["seconds"] = round(time.monotonic() - self.began, 1)
        calls, config = [*self.before, self.call], self.folder.config
        self.folder.update_results(
            {
                "config": config,
                "seed": config["seed"],
                "versions": self.versions,
                "labels": self.labels,
                "train_lengths": {name: task["train"] for name, task in config["tasks"].items()},
                "calls": calls,
                "seconds": {"total": round(sum(call["seconds"] for call in calls), 1)},
            }
        )


def _show(results: Mapping[str, Any], path: Path) -> None:
    """Prints the tables and draws the plots into the folder."""
    from relay_fast.reporting.plots import pictures
    from relay_fast.reporting.tables import print_report

    if results.get("accuracy"):
        print_report(results)
        draw_all(pictures(results, path))
    print(f"results: {path / 'results.json'}   {results.get('seconds', {}).get('total', 0):.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m relay_fast.train",
        description=__doc__,
        epilog=f"settings (--set KEY=VALUE), as in a preset:\n{described_text(RunConfig)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", help=f"one of {', '.join(preset_names())}; default cpu")
    parser.add_argument("--config", metavar="FILE", help="a TOML file in place of a preset")
    parser.add_argument("--out", metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--print-config", action="store_true", help="only print all settings, as TOML"
    )
    parser.add_argument("--tasks", help="comma-separated; default all of the preset")
    parser.add_argument(
        "--stages",
        help="comma-separated; what they need is run first; default all: "
        + ", ".join(STAGE_DEPENDENCIES),
    )
    parser.add_argument("--steps", type=int, help="steps of every training stage")
    parser.add_argument("--batch-size", type=int, help="problems in a batch")
    parser.add_argument("--eval-problems", type=int, help="problems of each length in evaluation")
    parser.add_argument("--scale", type=float, help="share of all steps and problems, such as 0.01")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="values",
        help="change a setting, such as model.d_model=64; may be repeated",
    )
    parser.add_argument("--seed", type=int, help="of all random numbers; default the preset's")
    parser.add_argument(
        "--minutes", type=float, help="stop and save after so many; the same command continues"
    )
    parser.add_argument("--no-report", action="store_true", help="print no table and draw no plots")
    parser.add_argument(
        "--device",
        default="cpu",
        help="cpu (default), cuda, or several such as cuda:0,cuda:1 for stages side by side",
    )
    parser.add_argument(
        "--impl",
        default="auto",
        choices=("auto", "triton", "torch"),
        help="Triton kernels, plain PyTorch, or what suits the device (auto, the default)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status.

    It is 0 (also out of minutes), 1 if training diverged, a worker died or memory ran out, 2 for
    bad input, 130 when interrupted.
    """
    with lenient_output():
        parser = _parser()
        a = parser.parse_args(arguments)
        if a.out is None and not a.print_config:
            parser.error("give --out RUN, or --print-config")
        return _main(a)


def _names(text: str | None) -> list[str] | None:
    """Splits a comma-separated option; an empty text gives an empty name, which is refused."""
    return None if text is None else text.split(",")


def _chosen_config(a: argparse.Namespace) -> dict[str, Any]:
    """Reads the preset or the file. Raises ValueError if both are given."""
    if a.config is None:
        return load_preset(a.preset or "cpu")
    if a.preset is not None:
        raise ValueError(
            f"give --preset or --config; {a.config} names the preset that it changes as base"
        )
    return read_config(a.config)


def _wanted_config(a: argparse.Namespace) -> dict[str, Any]:
    """Returns the config that the arguments ask for. Raises ValueError, OSError."""
    try:
        return override(
            _chosen_config(a),
            tasks=_names(a.tasks),
            steps=a.steps,
            batch_size=a.batch_size,
            eval_problems=a.eval_problems,
            seed=a.seed,
            scale=a.scale,
            values=a.values,
        )
    except (ValueError, OSError) as error:
        if a.print_config:
            raise
        refuse_together(error, a.device)


def _main(a: argparse.Namespace) -> int:
    try:
        config, stages = _wanted_config(a), _names(a.stages)
        if a.print_config:
            _wanted_stages(stages, a.minutes)
            _check_devices(a.device, a.impl)
            print(config_text(resolved(config)), end="")
            return 0
        options = {"device": a.device, "impl": a.impl, "minutes": a.minutes}
        options["print_table"] = not a.no_report
        train(config, a.out, stages=stages, **options)
    except (ValueError, RunFolderError, CheckpointError, OSError, MemoryError) as error:
        return 2 if silent(error) else refused(error)
    except RunStopped as error:
        if speaks() or isinstance(error, WorkerDied):
            print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        if speaks():
            told = ". ".join(str(error).split(". ")[:3]).rstrip(".")  # what was asked, and is free
            print(
                f"\nerror: {told}. Set a smaller batch_size, or training.recompute=auto",
                file=sys.stderr,
            )
        return 1
    except OutOfTime:
        if speaks():
            print(f"\n{a.minutes:g} minutes are over; the same command continues this run")
    except KeyboardInterrupt:
        if speaks():
            print("\ninterrupted; the same command continues this run", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    on_interrupt(interrupt_once)  # not in main: who calls it keeps their own handlers
    sys.exit(main())
