"""A control: the looped model trained to answer in a single iteration, where no round is written.

If this model had the answers, a task would need no loop, and a looped model no credit for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np

from relay_fast.batch.packed import PackedBatch
from relay_fast.data.streams import BatchFormat, TruthStream
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.relay.context import Context
from relay_fast.relay.presets import recipe
from relay_fast.tasks import Samples, Task
from relay_fast.training.schedule import Schedule
from relay_fast.training.trainer import train_model
from relay_fast.utils.ragged import concat_ranges, lengths_to_offsets

PROBE = 8  # batches that the mean number of tokens is taken from


@dataclass(frozen=True)
class OneIteration(BatchFormat):
    """Batches of the looped model in which every problem gets one iteration."""

    def collate(
        self, samples: Samples, tasks: Mapping[str, Task], extra_pad: np.ndarray | None, **more
    ) -> PackedBatch:
        return super().collate(last_rounds_alone(samples), tasks, extra_pad, **more)


def last_rounds_alone(samples: Samples) -> Samples:
    """The samples with their last round as the only one."""
    last = samples.first_round[1:] - 1
    starts, sizes = samples.round_offsets[:-1][last], np.diff(samples.round_offsets)[last]
    return replace(
        samples,
        rounds=samples.rounds[concat_ranges(starts, sizes)],
        round_offsets=lengths_to_offsets(sizes),
        loops=np.ones_like(samples.loops),
    )


def train_once(context: Context, stage: str) -> tuple[LoopedTransformer, dict[str, int]]:
    """Trains on the answers, in as many token-iterations as the stage has.

    Returns:
        The model, and the longest true problem of each task.
    """
    settings = recipe(context.config, stage)
    names = ("batch_size", "lengths", "lengths_per_batch", "curriculum")
    form = context.form(settings, "looped")
    options = {
        "seed": context.seed,
        **{name: settings[name] for name in names if name in settings},
    }
    form = OneIteration(**{name: getattr(form, name) for name in asdict(form)})

    def stream(steps: int) -> TruthStream:
        schedule = Schedule.by_steps(steps, warmup=settings["warmup"], decay=settings["decay"])
        return TruthStream(context.tasks, context.ranges, form, schedule, **options)

    probe = stream(PROBE)
    tokens = np.mean([probe[k].batch.plan.token_iterations for k in range(PROBE)])
    steps = max(1, round(settings["token_iterations"] / tokens))
    model = context.new_model("looped", "answer")
    path = context.state_path("one_iteration")
    trained = train_model(model, stream(steps), settings, path, seed=context.seed)
    return model.eval(), trained.longest_true
