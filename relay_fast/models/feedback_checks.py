"""Refuses batches and weights that are not of a looped model's feedback, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from relay_fast.batch.packed import PackedBatch
from relay_fast.config import ModelConfig


def check_learnable(config: ModelConfig, batch: PackedBatch) -> None:
    """Raises ValueError for a batch without the true rounds that a model is fed."""
    c = config
    if c.feedback != "none" and (batch.true_feed if c.carry_state else batch.fed) is None:
        maker = "carried" if c.carry_state else "side_by_side"
        raise ValueError(
            f"a model with feedback = {c.feedback!r} and carry_state = {c.carry_state} learns "
            f"from true rounds that are fed back: make the batch with PackedBatch.{maker}"
        )


def check_readable(config: ModelConfig, batch: PackedBatch) -> None:
    """Raises ValueError for a batch off which a model cannot read its rounds."""
    c = config
    if batch.plan.fixed_capacity:  # its live rows are known on the device only
        raise ValueError(
            "fixed-capacity batches are for training: generate from the PackedBatch that was loaded"
        )
    if c.feedback != "none" and (batch.feeder if c.carry_state else batch.fed) is None:
        maker = "PackedBatch.looped(..., carry_state=True)" if c.carry_state else "collate_next"
        raise ValueError(
            f"a model with feedback = {c.feedback!r} and carry_state = {c.carry_state} reads "
            f"its own rounds back: make the batch with {maker}, or write whole chains with "
            f"relay_fast.decoding.chains.generate_looped_chains"
        )


def check_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError, as torch does for weights of another model, if weights are those of a
    looped model with another feedback."""
    fed, answers = (f"{name}.weight" in weights for name in ("fed_embedding", "answer_head"))
    wanted = config.feedback != "none", config.feedback == "none" or config.carry_state
    if (fed, answers) == wanted or not (fed or answers):
        return
    own = f"feedback = {config.feedback!r} and carry_state = {config.carry_state}"
    found = f"feedback = {'tokens' if fed else 'none'!r} and carry_state = {fed and answers}"
    raise RuntimeError(
        f"the weights are those of a looped model with {found}, this one has {own}: build it with "
        f"the config that was saved beside them"
    )
