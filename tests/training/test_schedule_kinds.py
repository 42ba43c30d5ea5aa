"""The settings' schema, which stands below the training, names the training's kinds."""

from typing import get_args

from relay_fast.training.schedule import DECAYS
from relay_fast.utils.settings import Decay


def test_the_schema_knows_the_decays() -> None:
    assert get_args(Decay) == DECAYS
