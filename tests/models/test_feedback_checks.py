"""Weights and configs of another kind of feedback are refused in one sentence."""

from __future__ import annotations

import pytest
import torch

from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.training.checkpoint import pack_training_state, unpack_training_state
from relay_fast.utils.tensor_files import CheckpointError

BLOCK = BlockConfig(16, 2, 1)
FEEDBACKS = {
    "feedback = 'none' and carry_state = False": {},
    "feedback = 'tokens' and carry_state = False": {"feedback": "tokens"},
    "feedback = 'tokens' and carry_state = True": {"feedback": "tokens", "carry_state": True},
}


def model_of(said: str) -> LoopedTransformer:
    return LoopedTransformer(ModelConfig(BLOCK, 9, **FEEDBACKS[said]))


@pytest.mark.parametrize("saved", FEEDBACKS)
@pytest.mark.parametrize("own", FEEDBACKS)
def test_weights_of_another_feedback(saved: str, own: str) -> None:
    weights, model = model_of(saved).state_dict(), model_of(own)
    if saved == own:
        model.load_state_dict(weights)
        assert torch.equal(model.embedding.weight, weights["embedding.weight"])
        return
    text = f"weights are those of a looped model with {saved}, this one has {own}: build it with"
    with pytest.raises(RuntimeError, match=text):
        model.load_state_dict(weights)
    model.load_state_dict(weights, strict=False)  # asked for: what both have
    assert torch.equal(model.embedding.weight, weights["embedding.weight"])
    with pytest.raises(CheckpointError, match="it was written for other objects: build them with"):
        unpack_training_state(pack_training_state(model_of(saved)), model)


def test_other_missing_weights_are_told_by_torch() -> None:
    model = model_of("feedback = 'tokens' and carry_state = False")
    weights = model.state_dict()
    del weights["chain_head.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(weights)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({}, assign=True)


def test_an_autoregressive_model_is_fed_nothing() -> None:
    block = BlockConfig(16, 2, 1, causal=True)
    with pytest.raises(ValueError, match="feedback = 'tokens' is of a looped model: .* use feedb"):
        AutoregressiveTransformer(ModelConfig(block, 9, feedback="tokens"))
