"""BlockConfig's options for the blocks of other models: how they are saved, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from relay_fast.config import BIASES, BlockConfig, ModelConfig
from relay_fast.engine.parameter_names import parameter_names
from relay_fast.models.looped_block import LoopedBlock

OLD = {
    "d_model": 16, "n_heads": 2, "n_layers": 1, "n_kv_heads": None, "d_hidden": None,
    "norm": "rms", "eps": 1e-6, "activation": "gelu_tanh", "bias": False, "causal": False,
    "rope_base": 10_000.0, "dropout": 0.0, "loop_norm": "none", "injection": "none",
    "max_loops": 0, "state_noise": 0.0,
}  # fmt: skip
NEW = {
    "head_dim": 12, "qk_norm": True, "sandwich_norm": True, "rotary_share": 0.5,
    "rope_frequencies": [1.0, 0.5, 0.25], "rope_scale": 1.5, "bias": ["qkv", "down"],
}  # fmt: skip


def test_defaults_are_saved_as_before() -> None:
    config = BlockConfig(16, 2, 1)
    assert config.to_dict() == OLD and list(config.to_dict()) == list(OLD)
    assert BlockConfig(16, 2, 1, head_dim=8) == config == BlockConfig(**OLD)
    assert ModelConfig(config, 5).to_dict() == {
        "block": OLD, "vocabulary_size": 5, "max_tokens": 4096
    }  # fmt: skip


def test_options_pass_through_json() -> None:
    config = BlockConfig(16, 2, 1, **NEW)
    assert config.to_dict() == OLD | NEW == json.loads(json.dumps(config.to_dict()))
    assert BlockConfig(**config.to_dict()) == config and hash(config) is not None
    model = ModelConfig(config, 5)
    assert ModelConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    scaled = BlockConfig(16, 2, 1, rope_frequencies=yarn)
    assert scaled.rope_scale == pytest.approx(1.13863)
    assert BlockConfig(**scaled.to_dict()) == scaled
    assert BlockConfig(16, 2, 1, rope_frequencies=yarn, rope_scale=1.5).rope_scale == 1.5


def test_biases_of_parts() -> None:
    make = lambda bias, **options: BlockConfig(16, 2, 1, bias=bias, **options)
    assert make(()).bias is False and make(BIASES).bias is True
    assert make({"down", "qkv"}).bias == ("qkv", "down")
    config = make(("qkv", "norm"), activation="swiglu")
    named = lambda c: [name for name in parameter_names(c) if name.endswith("bias")]
    assert named(config) == ["layers.0.qkv.bias"]  # an RMSNorm has none
    layer = make(("norm",), norm="layer", loop_norm="post")
    assert named(layer) == ["layers.0.norm1.bias", "layers.0.norm2.bias", "loop_norm.bias"]


def test_the_parameters_are_those_of_the_config() -> None:
    for options in ({}, NEW, NEW | {"norm": "layer", "bias": True, "activation": "swiglu"}):
        block = LoopedBlock(16, 2, 2, **options)
        assert [*dict(block.named_parameters())] == parameter_names(block.config)
    shapes = {name: tuple(p.shape) for name, p in LoopedBlock(16, 2, 1, **NEW).named_parameters()}
    assert shapes["layers.0.qkv.weight"] == (3 * 2 * 12, 16)
    assert shapes["layers.0.out.weight"] == (16, 2 * 12)
    assert shapes["layers.0.q_norm.weight"] == shapes["layers.0.k_norm.weight"] == (12,)
    assert shapes["layers.0.post_norm1.weight"] == shapes["layers.0.post_norm2.weight"] == (16,)


def test_the_new_norms_draw_no_random_numbers() -> None:
    torch.manual_seed(0)
    plain = LoopedBlock(16, 2, 2).state_dict()
    torch.manual_seed(0)
    normed = LoopedBlock(16, 2, 2, qk_norm=True, sandwich_norm=True).state_dict()
    for name, weight in plain.items():
        assert torch.equal(weight, normed.pop(name)), name
    assert len(normed) == 2 * 4 and all((weight == 1).all() for weight in normed.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 3}, "d_model = 16 is not divisible by n_heads = 3: .* or give head_dim"),
        ({"head_dim": 0}, "head_dim = 0: it must be at least 1"),
        ({"head_dim": 7}, "head_dim = 7 .* is odd, but RoPE rotates pairs"),
        ({"qk_norm": 1}, "qk_norm = 1: it must be True or False"),
        ({"bias": ("qkv", "head")}, "bias = .*: 'head' is unknown, use parts of"),
        ({"rotary_share": 0.0}, "rotary_share = 0.0 rotates 0 of a head's 8 columns"),
        ({"rotary_share": 1.5}, "rotary_share = 1.5 rotates 12 of a head's 8 columns"),
        ({"rotary_share": 0.4}, "rotates 3 of a head's 8 columns: .* an even number"),
        ({"rope_scale": 0.0}, "rope_scale = 0.0: give a positive number"),
        ({"rope_frequencies": (1.0,)}, "rope_frequencies has 1 numbers for 8 rotated .* give 4"),
        ({"rope_frequencies": "yarn"}, "rope_frequencies = 'yarn': give a list of numbers"),
        ({"rope_frequencies": (1, 2, 3, "x")}, "rope_frequencies = 'x': it must be a number"),
        ({"rope_frequencies": {"rope_type": "dynamic"}}, "rope_type = 'dynamic' is not supported"),
        ({"rope_base": None, "rope_scale": 2.0}, "rope_scale = 2.0 needs RoPE"),
        ({"rope_base": None, "rotary_share": 0.5}, "rotary_share = 0.5 needs RoPE"),
    ],
)
def test_bad_input(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockConfig(**{"d_model": 16, "n_heads": 2, "n_layers": 1, **options})


@pytest.mark.parametrize("make", [ModelConfig.from_dict, ModelConfig.of])
def test_an_unknown_option_names_the_nearest(make) -> None:
    values = ModelConfig(BlockConfig(8, 2, 1), 10, 4).to_dict()
    with pytest.raises(ValueError, match="'d_modle' is unknown: the nearest is d_model;"):
        make(values | {"block": values["block"] | {"d_modle": 3}})
    with pytest.raises(ValueError, match="'max_token' is unknown: the nearest is max_tokens;"):
        make(values | {"max_token": 3})
