"""Configurations of blocks and models, as frozen dataclasses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from relay_fast.kernels.mlp_ref import ACTIVATIONS
from relay_fast.kernels.norm_ref import NORMS
from relay_fast.utils.numbers import as_bool, as_float, as_int

LOOP_NORMS = ("none", "pre", "post")
INJECTIONS = ("none", "add", "concat")
FEEDBACKS = ("none", "tokens")
# Newer options: configs that leave them at their defaults are saved without them.
_ADDED = ("feedback", "carry_state", "feedback_noise", "trained_tokens")


@dataclass(frozen=True)
class BlockConfig:
    """Configuration of a block of pre-norm transformer layers.

    Args:
        d_model: width of the state.
        n_heads: number of attention heads, a divisor of d_model.
        n_layers: number of layers.
        n_kv_heads: number of key/value heads, a divisor of n_heads; default: n_heads.
        d_hidden: hidden width of the MLP; default: 4 · d_model.
        norm: "rms" or "layer".
        eps: epsilon of the norms.
        activation: "gelu_tanh", "gelu", "relu2" or "swiglu".
        bias: whether linear layers and LayerNorms have biases.
        causal: whether a token attends to itself and earlier tokens only.
        rope_base: base of RoPE's frequencies; None: no positions (NoPE).
        dropout: rate after attention and MLP, in [0, 1).
        loop_norm: norm of the state in each iteration: "none", "pre" (before the layers) or "post".
        injection: how the input enters each iteration: "none", "add" or "concat".
        max_loops: size of the loop-index embedding; 0: none.
        state_noise: noise added to the state before each iteration in training, relative to its
            RMS.

    Raises:
        ValueError: for values that are out of range or do not fit together.
    """

    d_model: int
    n_heads: int
    n_layers: int
    n_kv_heads: int | None = None
    d_hidden: int | None = None
    norm: str = "rms"
    eps: float = 1e-6
    activation: str = "gelu_tanh"
    bias: bool = False
    causal: bool = False
    rope_base: float | None = 10_000.0
    dropout: float = 0.0
    loop_norm: str = "none"
    injection: str = "none"
    max_loops: int = 0
    state_noise: float = 0.0

    def __post_init__(self) -> None:
        # Numbers from numpy and tensors become Python's, since configs are saved as JSON.
        for name in ("d_model", "n_heads", "n_layers", "n_kv_heads", "d_hidden"):
            value = getattr(self, name)
            if value is not None:
                self._set(name, as_int(name, value, least=1))
            elif name not in ("n_kv_heads", "d_hidden"):
                raise ValueError(f"{name} is missing: a block needs d_model, n_heads and n_layers")
        self._set("max_loops", as_int("max_loops", self.max_loops, least=0))
        for name in ("eps", "state_noise"):
            self._set(name, as_float(name, getattr(self, name), least=0))
        self._set("dropout", as_float("dropout", self.dropout))
        if self.rope_base is not None:
            self._set("rope_base", as_float("rope_base", self.rope_base))
        for name in ("bias", "causal"):
            self._set(name, as_bool(name, getattr(self, name)))
        if self.d_model % self.n_heads:
            raise ValueError(
                f"d_model = {self.d_model} is not divisible by n_heads = {self.n_heads}: "
                "choose a multiple of n_heads"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_heads = {self.n_heads} is not divisible by n_kv_heads = {self.kv_heads}: "
                "choose a divisor of n_heads"
            )
        if self.rope_base is not None and self.head_dim % 2:
            raise ValueError(
                f"head_dim = d_model / n_heads = {self.head_dim} is odd, but RoPE rotates pairs: "
                "choose an even head_dim, or rope_base=None"
            )
        for name, known in (
            ("norm", NORMS),
            ("activation", ACTIVATIONS),
            ("loop_norm", LOOP_NORMS),
            ("injection", INJECTIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r} is unknown: use one of {known}")
        if self.rope_base is not None and not 0 < self.rope_base < math.inf:
            raise ValueError(
                f"rope_base = {self.rope_base}: give a positive number (10000 is common), or None "
                f"for no positions"
            )
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps = {self.eps}: give a small positive number, such as 1e-6")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout}: it must be in [0, 1)")

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def hidden(self) -> int:
        return self.d_hidden or 4 * self.d_model

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(config: BlockConfig | Mapping[str, Any]) -> BlockConfig:
        """Returns a config unchanged, and builds one from the result of `to_dict`."""
        return BlockConfig(**config) if isinstance(config, Mapping) else config

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of a model.

    Args:
        block: a BlockConfig, or the result of its `to_dict`.
        vocabulary_size: number of tokens.
        max_tokens: longest sequence that the model accepts.
        feedback: of a looped model. "none": only the state passes from one iteration to the next;
            "tokens": each iteration gets what its task shows of the problem and the rounds so far
            as tokens.
        carry_state: with feedback, whether the state is passed on too; the last round is then fed
            right-aligned.
        feedback_noise: share of the fed tokens that are replaced by random ones in training, in [0,
            1).
        trained_tokens: longest input seen in training, counted by its positions; 0: unknown, or of
            no matter.

    Raises:
        ValueError: for values that are out of range or do not fit together.
    """

    block: BlockConfig
    vocabulary_size: int
    max_tokens: int = 4096
    feedback: str = "none"
    carry_state: bool = False
    feedback_noise: float = 0.0
    trained_tokens: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", BlockConfig.of(self.block))
        for name in ("vocabulary_size", "max_tokens"):
            object.__setattr__(self, name, as_int(name, getattr(self, name), least=1))
        trained = as_int("trained_tokens", self.trained_tokens, least=0)
        object.__setattr__(self, "trained_tokens", trained)
        object.__setattr__(self, "feedback_noise", as_float("feedback_noise", self.feedback_noise))
        object.__setattr__(self, "carry_state", as_bool("carry_state", self.carry_state))
        if self.feedback not in FEEDBACKS:
            raise ValueError(f"feedback = {self.feedback!r} is unknown: use one of {FEEDBACKS}")
        if not 0 <= self.feedback_noise < 1:
            raise ValueError(f"feedback_noise = {self.feedback_noise}: it must be in [0, 1)")
        if self.feedback == "none":
            if self.feedback_noise:
                raise ValueError(
                    f"feedback_noise = {self.feedback_noise} needs fed tokens: use "
                    'feedback = "tokens"'
                )
            if self.carry_state:
                raise ValueError(
                    'carry_state = True needs feedback = "tokens": without feedback the state is '
                    "always carried, so leave it out"
                )
        elif self.block.injection != "none" or self.block.max_loops:
            raise ValueError(
                f"feedback = {self.feedback!r} supports neither injection nor a loop-index "
                'embedding: use injection = "none" and max_loops = 0'
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as a dict, without newer options at their defaults, so that files and
        hashes of older models stay the same."""
        values = asdict(self)
        for name in _ADDED:
            if values[name] == getattr(ModelConfig, name):
                del values[name]
        return values

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ModelConfig:
        """Builds a config from the result of `to_dict`. Raises ValueError for an unknown option."""
        for kind, given in ((ModelConfig, values), (BlockConfig, values["block"])):
            unknown = set(given) - {field.name for field in fields(kind)}
            if unknown:
                raise ValueError(
                    f"model option {min(unknown)!r} is unknown: update relay_fast, or remove it"
                )
        return ModelConfig(**values)

    @staticmethod
    def of(config: ModelConfig | Mapping[str, Any]) -> ModelConfig:
        """Returns a config unchanged, and builds one from the result of `to_dict`."""
        return ModelConfig(**config) if isinstance(config, Mapping) else config


def tell_hub(module: Any, **arguments: Any) -> None:
    """Records constructor arguments for huggingface_hub's mixin if `module` uses it with a `config`
    argument: the mixin then stores only the config.

    Args:
        module: the module under construction.
        arguments: its constructor's arguments other than the config.
    """
    if "config" in getattr(module, "_hub_mixin_init_parameters", ()):
        module._hub_mixin_config = {"config": module.config.to_dict(), **arguments}
