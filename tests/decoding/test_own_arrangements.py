"""A user's task whose arrangement is not that of its inputs is refused, instead of wrong chains."""

from __future__ import annotations

import numpy as np
import pytest

from relay_fast.decoding._inference import inference
from relay_fast.decoding.chain_reader import ChainReader
from relay_fast.decoding.reading import read_batch
from relay_fast.tasks import LIS, Arithmetic, EditDistance, Task
from relay_fast.tasks.vocabulary import NUMBER0
from tests.support.fed_models import TASKS
from tests.support.graph_models import assert_same, batches, model_of
from tests.support.played_graphs import Played, played  # noqa: F401


class Right(Arithmetic):
    def arrangement(self, problems, widths):
        return super().arrangement(problems, widths)


class Longer(Arithmetic):
    def arrangement(self, problems, widths):
        own = super().arrangement(problems, widths)
        return own._replace(least=widths + 2)


class Still(LIS):
    """Forgets that a round shows where it was written."""

    def arrangement(self, problems, widths):
        own = super().arrangement(problems, widths)
        return own._replace(from_end=np.zeros_like(own.from_end))


class Border(EditDistance):
    def arrangement(self, problems, widths):
        own = super().arrangement(problems, widths)
        return own._replace(growth=own.growth + (own.fed[2] == NUMBER0))


def own_task(kind: type) -> Task:
    """A task of this class, with the parameters of the package's."""
    own = object.__new__(kind)
    vars(own).update(next(vars(task) for task in TASKS.values() if issubclass(kind, type(task))))
    return own


def read_three(kind: type, model: str = "fed") -> ChainReader:
    """Reads batches of all tasks, of which one is of this class."""
    own, model, (many,) = own_task(kind), model_of(model), batches(6)
    tasks = TASKS | {own.name: own}
    reader = ChainReader(model, tasks, False)
    with inference(model):
        truth = read_batch(model, many, TASKS, False)
        for _ in range(3):
            assert_same(reader.read(many), truth)
    return reader


@pytest.mark.parametrize(
    ("kind", "model"), [(Right, "fed"), (Longer, "carried"), (Longer, "latent")]
)
def test_a_right_or_unused_one_is_replayed(played: Played, kind: type, model: str) -> None:  # noqa: F811
    assert read_three(kind, model).reason is None and len(played.replays) == 1


def test_a_task_that_comes_late_is_looked_at_too(played: Played) -> None:  # noqa: F811
    wrong, model, (many,) = own_task(Still), model_of("fed"), batches(6)
    others = many.take(np.flatnonzero(many.task != wrong.index))
    reader = ChainReader(model, TASKS | {"lis": wrong}, False)
    with inference(model):
        for _ in range(3):
            reader.read(others)
        assert reader.reason is None
        few = many.take(np.flatnonzero(many.task == wrong.index)[:2])
        with pytest.raises(ValueError, match="mend Still.arrangement"):
            for _ in range(3):
                reader.read(few)
        with pytest.raises(ValueError, match="mend Still.arrangement"):
            reader.read(few)  # nor does it pass when it is read again


@pytest.mark.parametrize(("kind", "before"), [(Longer, 1), (Still, 1), (Border, 1)])
def test_a_wrong_one_is_named(played: Played, kind: type, before: int) -> None:  # noqa: F811
    said = (
        f"after {before} rounds, arrangement says other inputs than inputs makes; mend "
        f"{kind.__name__}.arrangement, or let it return None"
    )
    with pytest.raises(ValueError, match=said):
        read_three(kind)
    assert not played.captures
