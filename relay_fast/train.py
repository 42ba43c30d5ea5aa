"""RELAY from the shell: `python -m relay_fast.train --preset cpu --out RUN`.

The same command continues an interrupted run. Leaves results.json, tables, plots and checkpoints.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from relay_fast.ops.dispatch import select
from relay_fast.relay.pipeline import OutOfTime, run_pipeline, with_needs
from relay_fast.relay.presets import load_preset, override, preset_names
from relay_fast.relay.presets.saved import refuse_foreign
from relay_fast.relay.presets.schema import RunConfig
from relay_fast.relay.run_folder import RunFolder, RunFolderError, versions
from relay_fast.relay.stages import STAGE_DEPENDENCIES, Context
from relay_fast.reporting.progress import Display
from relay_fast.reporting.terminal import draw_all, lenient_output, refused
from relay_fast.training.model_files import check_device
from relay_fast.utils.errors import RunStopped
from relay_fast.utils.interrupts import interrupt_once, on_interrupt
from relay_fast.utils.settings import check, described_text
from relay_fast.utils.tensor_files import CheckpointError


def train(
    config: Mapping[str, Any],
    out: str | Path,
    *,
    stages: Sequence[str] | None = None,
    device: str = "cpu",
    impl: str = "auto",
    minutes: float | None = None,
    report: bool = True,
) -> dict[str, Any]:
    """Runs RELAY (or the given stages and what they need) in the run folder `out`.

    config: a preset from `relay_fast.relay.presets`, overridden or not. report: print the table and
    draw the plots in the end. Returns the content of results.json. Raises RunFolderError,
    ValueError, CheckpointError with one clear sentence, RunStopped for a training that diverged and
    a worker that was killed, and OutOfTime after `minutes`, with everything saved.
    """
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes = {minutes:g}: give more than 0")
    names = with_needs(STAGE_DEPENDENCIES if stages is None else stages)
    check_device(device)
    prove(config, device, impl)
    refuse_foreign(out)
    folder = RunFolder(out, config)
    call = _Call(folder, device)

    def done(name: str, result: Mapping[str, Any]) -> None:
        longest = folder.results().get("longest_true_problem", {})
        part = dict(result["result"])
        for task, length in part.pop("longest_true_problem", {}).items():
            longest[task] = max(length, longest.get(task, 0))
        folder.update_results(
            {**part, "longest_true_problem": longest, "seconds": {name: result["seconds"]}}
        )
        call.record(name)
        folder.mark_done(name, {"seconds": result["seconds"]})

    try:
        with Display() as display:
            run_pipeline(
                folder, names, display, device=device, impl=impl, minutes=minutes, done=done
            )
    except BaseException:
        call.record()
        raise
    results = folder.results()
    if report:
        _show(results, folder.path)
    return results


def prove(config: Mapping[str, Any], device: str = "cpu", impl: str = "auto") -> None:
    """Raises ValueError, before anything is written, for a config whose tasks or models cannot be,
    and for an implementation that the device has not."""
    check(RunConfig, config)
    try:
        select(impl, device)
    except RuntimeError as error:
        raise ValueError(f"impl = {impl!r} cannot run on device {device!r}: {error}") from error
    Context(Path(), config, device, impl).prove()


class _Call:
    """What results.json says about a run as a whole, and about each call that it took: when, how
    long, on what, what it finished. A call with nothing to do leaves it as it is."""

    def __init__(self, folder: RunFolder, device: str):
        self.folder, self.began = folder, time.monotonic()
        self.versions = versions(device)
        self.before = folder.results().get("calls", [])
        self.call: dict[str, Any] = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
        self.call |= {key: self.versions[key] for key in ("device_name", "torch", "commit")}
        self.call["finished"] = []

    def record(self, stage: str | None = None) -> None:
        """Writes down how things are; stage: what has just finished."""
        self.call["finished"] += [stage] if stage else []
        self.call["seconds"] = round(time.monotonic() - self.began, 1)
        calls, config = [*self.before, self.call], self.folder.config
        self.folder.update_results(
            {
                "config": config,
                "seed": config["seed"],
                "versions": self.versions,
                "train_lengths": {name: task["train"] for name, task in config["tasks"].items()},
                "calls": calls,
                "seconds": {"total": round(sum(call["seconds"] for call in calls), 1)},
            }
        )


def _show(results: Mapping[str, Any], path: Path) -> None:
    """The table on the terminal, the plots into the folder."""
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
    parser.add_argument("--preset", default="cpu", help=f"one of {', '.join(preset_names())}")
    parser.add_argument("--out", required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--tasks", help="comma-separated, default all of the preset")
    parser.add_argument("--stages", help="comma-separated, default all; what they need runs too")
    parser.add_argument("--steps", type=int, help="so many steps in every training stage")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--eval-problems", type=int, help="problems a length in evaluation")
    parser.add_argument("--scale", type=float, help="this share of all steps and problems (0.01)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="values",
                        help="another value in the preset (model.d_model=64)")  # fmt: skip
    parser.add_argument("--seed", type=int)
    parser.add_argument("--minutes", type=float, help="stop and save after so many")
    parser.add_argument("--no-report", action="store_true", help="no table and plots in the end")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--impl", default="auto", choices=("auto", "triton", "torch"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 (out of minutes too), 1 where training diverged or a worker died, 2 for bad
    input, 130 when interrupted."""
    with lenient_output():
        return _main(_parser().parse_args(arguments))


def _names(text: str | None) -> list[str] | None:
    """What a comma-separated option says; an empty text is one empty name, which is refused."""
    return None if text is None else text.split(",")


def _main(a: argparse.Namespace) -> int:
    on_interrupt(interrupt_once)
    try:
        config = override(
            load_preset(a.preset), tasks=_names(a.tasks), steps=a.steps,
            batch_size=a.batch_size, eval_problems=a.eval_problems, seed=a.seed,
            scale=a.scale, values=a.values,
        )  # fmt: skip
        stages = _names(a.stages)
        options = {"device": a.device, "impl": a.impl, "minutes": a.minutes}
        options["report"] = not a.no_report
        train(config, a.out, stages=stages, **options)
    except (ValueError, RunFolderError, CheckpointError, OSError, MemoryError) as error:
        return refused(error)
    except RunStopped as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except OutOfTime:
        print(f"\n{a.minutes:g} minutes are over; the same command continues this run")
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues this run", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
