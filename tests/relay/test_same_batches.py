"""The built-in presets train on the batches that they always had, bit for bit."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from relay_fast.relay import stages
from relay_fast.relay.context import Context
from relay_fast.relay.presets import load_preset, override

SMALL = [
    "model.d_model=16",
    "model.n_heads=2",
    "model.n_layers=1",
    "model.d_hidden=32",
    "data_workers=0",
]
# Of the two first batches of looped_aligned and ar_baseline. A preset that is changed on purpose
# gets new ones.
DIGESTS = {
    "cpu": ("f0054a594e4f", "9658ee4cfa68"),
    "cpu-addition": ("d958496b5d50", "e08a941c3de6"),
    "cpu-arithmetic": ("f0054a594e4f", "9658ee4cfa68"),
    "cpu-arithmetic-long": ("df55a7f74cd3", "0df7a3bc72bb"),
    "cpu-edit-distance": ("ff375987cbee", "d945cd380b0a"),
    "cpu-latent": ("8cb1fae9a523", "d77de2a52469"),
    "cpu-lis": ("d24e5f451698", "e88141dc0e4d"),
    "cpu-multitask": ("10b48f1a5f3a", "3d811d7a86e1"),
    "paper": ("44e8598c83ae", "42364d237289"),
    "paper-fast": ("45be4b8ddb1c", "9ad9e79a19fc"),
}


class Seen(Exception):
    """Ends a stage where it would begin to train."""


def digest(stream) -> str:
    found = hashlib.sha256()
    for step in (0, 1):
        batch = stream[step].batch
        parts = (batch.tokens, batch.rows, batch.targets, batch.weights, batch.answers, batch.fed)
        for part in (*(p.numpy() for p in parts if p is not None), batch.plan.lengths, batch.order):
            found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()[:12]


@pytest.mark.parametrize("preset", DIGESTS)
def test_the_first_batches_are_the_same(preset, tmp_path, monkeypatch) -> None:
    found = []

    def look(model, stream, *args, **kwargs):
        found.append(digest(stream))
        raise Seen

    monkeypatch.setattr(stages, "train_model", look)
    config = override(load_preset(preset), steps=2, batch_size=9, values=SMALL)
    context = Context(tmp_path, config, "cpu", "torch")
    for stage in ("looped_aligned", "ar_baseline"):
        with pytest.raises(Seen):
            stages.run_stage(context, stage, lambda progress: None)
    assert tuple(found) == DIGESTS[preset]
