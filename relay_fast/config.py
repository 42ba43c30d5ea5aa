"""Configurations of blocks and models, as frozen dataclasses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from relay_fast.kernels.mlp_ref import ACTIVATIONS
from relay_fast.kernels.norm_ref import NORMS
from relay_fast.utils.nearest import nearest
from relay_fast.utils.numbers import as_bool, as_float, as_int
from relay_fast.utils.rope import scaled_frequencies

LOOP_NORMS = ("none", "pre", "post")
INJECTIONS = ("none", "add", "concat")
FEEDBACKS = ("none", "tokens")
BIASES = ("norm", "qkv", "out", "up", "gate", "down")  # the parts of a layer that can have one
# Newer options: configs that leave them at their defaults are saved without them.
_ADDED = ("feedback", "carry_state", "feedback_noise", "trained_tokens")
_ADDED_TO_BLOCK = ("qk_norm", "sandwich_norm", "rotary_share", "rope_frequencies", "rope_scale")


@dataclass(frozen=True)
class BlockConfig:
    """Configuration of a block of pre-norm transformer layers.

        u ← u + drop(post₁(out(attention(rope(qk_norm(qkv(norm₁(u))))))))
        u ← u + drop(post₂(down(act(up(norm₂(u))))))

    RoPE (Su et al. 2021, arXiv 2104.09864) turns the pair of columns j and j + head_dim / 2 of each
    query and key head by the angle position · fⱼ, with fⱼ = rope_base^(−2j / r) for the first r / 2
    pairs, r = rotary_share · head_dim, and 0 for the others. Where other code rotates the first r
    columns of a head, or neighbouring columns (interleaved), the same function has the rows of qkv
    in another order (`relay_fast.models.from_hf.rotary_order`).

    Left out: soft-caps of attention scores and logits (Gemma 2, arXiv 2408.00118), because fused
    attention outside of Triton has none, and QK-norm, which bounds the scores too, has taken their
    place (Gemma 3, arXiv 2503.19786); a gate on each head's output (Qiu et al. 2025, arXiv
    2505.06708), because it is a second projection of the layer's normed input, which the fused
    projection does not keep: `relay_fast.loop` runs such layers as they are.

    Args:
        d_model: width of the state.
        n_heads: number of attention heads, a divisor of d_model.
        n_layers: number of layers.
        n_kv_heads: number of key/value heads, a divisor of n_heads; default: n_heads.
        d_hidden: hidden width of the MLP; default: 4 · d_model.
        norm: "rms" or "layer".
        eps: epsilon of the norms.
        activation: "gelu_tanh", "gelu", "relu2" or "swiglu".
        bias: whether linear layers and LayerNorms have biases; or the parts that have one, of
            "norm", "qkv", "out", "up", "gate" and "down".
        causal: whether a token attends to itself and earlier tokens only.
        rope_base: base of RoPE's frequencies; None: no positions (NoPE).
        dropout: rate after attention and MLP, in [0, 1).
        loop_norm: norm of the state in each iteration: "none", "pre" (before the layers) or "post".
        injection: how the input enters each iteration: "none", "add" or "concat".
        max_loops: size of the loop-index embedding; 0: none.
        state_noise: noise added to the state before each iteration in training, relative to its
            RMS.
        head_dim: columns of an attention head; default: d_model / n_heads.
        qk_norm: whether each query and key head passes through an RMSNorm before RoPE, with one
            weight (head_dim,) for all query heads and one for all key heads (Henry et al. 2020,
            arXiv 2010.04245; as in Qwen 3).
        sandwich_norm: whether the outputs of attention and MLP pass through a norm of their own
            before they are added to the state (Ding et al. 2021, arXiv 2105.13290; as in Gemma 2
            and Ouro). Dropout is behind it.
        rotary_share: share of a head's columns that RoPE rotates, in (0, 1].
        rope_frequencies: fⱼ of the rotated pairs, in place of rope_base's; or a dict of
            transformers' `rope_parameters`, from which they and `rope_scale` are computed
            (`relay_fast.utils.rope`: linear, llama3, yarn).
        rope_scale: factor of cos and sin, YaRN's attention factor.

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
    bias: bool | tuple[str, ...] = False
    causal: bool = False
    rope_base: float | None = 10_000.0
    dropout: float = 0.0
    loop_norm: str = "none"
    injection: str = "none"
    max_loops: int = 0
    state_noise: float = 0.0
    head_dim: int | None = None  # an int once constructed
    qk_norm: bool = False
    sandwich_norm: bool = False
    rotary_share: float = 1.0
    rope_frequencies: tuple[float, ...] | Mapping[str, Any] | None = None  # never a dict then
    rope_scale: float = 1.0

    def __post_init__(self) -> None:
        # Numbers from numpy and tensors become Python's, since configs are saved as JSON.
        for name in ("d_model", "n_heads", "n_layers", "n_kv_heads", "d_hidden", "head_dim"):
            value = getattr(self, name)
            if value is not None:
                self._set(name, as_int(name, value, least=1))
            elif name not in ("n_kv_heads", "d_hidden", "head_dim"):
                raise ValueError(f"{name} is missing: a block needs d_model, n_heads and n_layers")
        self._set("max_loops", as_int("max_loops", self.max_loops, least=0))
        for name in ("eps", "state_noise"):
            self._set(name, as_float(name, getattr(self, name), least=0))
        self._set("dropout", as_float("dropout", self.dropout))
        if self.rope_base is not None:
            self._set("rope_base", as_float("rope_base", self.rope_base))
        for name in ("causal", "qk_norm", "sandwich_norm"):
            self._set(name, as_bool(name, getattr(self, name)))
        self._set("bias", _biases(self.bias))
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model = {self.d_model} is not divisible by n_heads = {self.n_heads}: "
                "choose a multiple of n_heads, or give head_dim"
            )
        self._set("head_dim", self.head_dim or self.d_model // self.n_heads)
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_heads = {self.n_heads} is not divisible by n_kv_heads = {self.kv_heads}: "
                "choose a divisor of n_heads"
            )
        if self.rope_base is not None and self.head_dim % 2:
            raise ValueError(
                f"head_dim = {self.head_dim} (default: d_model / n_heads) is odd, but RoPE rotates "
                "pairs: choose an even head_dim, or rope_base=None"
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
        self._check_rope()
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps = {self.eps}: give a small positive number, such as 1e-6")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout}: it must be in [0, 1)")

    def _check_rope(self) -> None:
        """Checks what belongs to RoPE; turns a dict of frequencies into numbers."""
        for name in ("rotary_share", "rope_scale"):
            self._set(name, as_float(name, getattr(self, name)))
        if self.rope_base is None:
            for name in ("rotary_share", "rope_frequencies", "rope_scale"):
                if (value := getattr(self, name)) != getattr(BlockConfig, name):
                    raise ValueError(
                        f"{name} = {value} needs RoPE: leave it out with rope_base = None"
                    )
            return
        columns = self.rotary_dim
        if columns % 2 or not 2 <= columns <= self.head_dim:
            raise ValueError(
                f"rotary_share = {self.rotary_share} rotates {columns} of a head's {self.head_dim} "
                "columns: choose a share in (0, 1] that gives an even number of them"
            )
        if self.rope_scale <= 0:
            raise ValueError(f"rope_scale = {self.rope_scale}: give a positive number, usually 1")
        given = self.rope_frequencies
        if given is None:
            return
        if isinstance(given, Mapping):
            given, scale = scaled_frequencies(given, columns, self.rope_base)
            self._set("rope_scale", scale if self.rope_scale == 1 else self.rope_scale)
        elif isinstance(given, str):
            raise ValueError(f"rope_frequencies = {given!r}: give a list of numbers, or a dict")
        given = tuple(as_float("rope_frequencies", f, least=0) for f in given)
        if len(given) != columns // 2:
            raise ValueError(
                f"rope_frequencies has {len(given)} numbers for {columns} rotated columns: give "
                f"{columns // 2}"
            )
        self._set("rope_frequencies", given)

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def hidden(self) -> int:
        return self.d_hidden or 4 * self.d_model

    @property
    def rotary_dim(self) -> int:
        """Columns of a head that RoPE rotates; meaningless without RoPE."""
        return self.head_dim if self.rotary_share == 1 else round(self.head_dim * self.rotary_share)

    def has_bias(self, part: str) -> bool:
        """Returns whether a part of BIASES has a bias; norms only have one as LayerNorms."""
        there = self.bias if isinstance(self.bias, bool) else part in self.bias
        return there and (part != "norm" or self.norm == "layer")

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as a dict, without newer options at their defaults, so that files and
        hashes of older models stay the same."""
        values = asdict(self)
        for name in _ADDED_TO_BLOCK:
            if values[name] == getattr(BlockConfig, name):
                del values[name]
        for name in ("bias", "rope_frequencies"):  # lists, as a file holds them
            if isinstance(values.get(name), tuple):
                values[name] = list(values[name])
        if self.head_dim * self.n_heads == self.d_model:
            del values["head_dim"]
        return values

    @staticmethod
    def of(config: BlockConfig | Mapping[str, Any]) -> BlockConfig:
        """Returns a config unchanged, and builds one from the result of `to_dict`.

        Raises TypeError for anything else, and where a size is missing.
        """
        if isinstance(config, Mapping):
            if missing := {"d_model", "n_heads", "n_layers"}.difference(config):
                raise TypeError(f"the block's config has no {min(missing)!r}: add it")
            return BlockConfig(**config)
        if not isinstance(config, BlockConfig):
            raise TypeError(f"the block's config is {config!r:.60}: give a BlockConfig")
        return config

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
        feedback_noise: share of the fed tokens that are replaced in training by what is fed at a
            random place of the same input, in [0, 1).
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
        values = asdict(self) | {"block": self.block.to_dict()}
        for name in _ADDED:
            if values[name] == getattr(ModelConfig, name):
                del values[name]
        return values

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ModelConfig:
        """Builds a config from the result of `to_dict`. Raises ValueError for an unknown option."""
        for kind, given in ((ModelConfig, values), (BlockConfig, values.get("block"))):
            known = [field.name for field in fields(kind)]
            unknown = set(given).difference(known) if isinstance(given, Mapping) else ()
            if unknown:
                raise ValueError(
                    f"model option {min(unknown)!r} is unknown: the nearest is "
                    f"{nearest(min(unknown), known)}; correct or remove it, or update relay_fast"
                )
        if missing := {"block", "vocabulary_size"}.difference(values):
            raise TypeError(f"the model's config has no {min(missing)!r}: add it")
        return ModelConfig(**values)

    @staticmethod
    def of(config: ModelConfig | Mapping[str, Any]) -> ModelConfig:
        """Returns a config unchanged, and builds one from the result of `to_dict`.

        Raises TypeError for anything else, and where a size is missing.
        """
        if isinstance(config, Mapping):
            return ModelConfig.from_dict(config)
        if not isinstance(config, ModelConfig):
            raise TypeError(f"config is {config!r:.60}: give a ModelConfig, or its to_dict()")
        return config


def _biases(bias: Any) -> bool | tuple[str, ...]:
    """Returns True for all parts of a layer, False for none, or the parts that have a bias, in the
    order of BIASES. Raises ValueError for an unknown part."""
    if not isinstance(bias, list | tuple | set | frozenset):
        return as_bool("bias", bias)
    for part in bias:
        if part not in BIASES:
            raise ValueError(f"bias = {bias!r}: {part!r} is unknown, use parts of {BIASES}")
    parts = tuple(part for part in BIASES if part in bias)
    return parts if 0 < len(parts) < len(BIASES) else bool(parts)


def tell_hub(module: Any, **arguments: Any) -> None:
    """Records constructor arguments for huggingface_hub's mixin if `module` uses it with a `config`
    argument: the mixin then stores only the config.

    Args:
        module: the module under construction.
        arguments: its constructor's arguments other than the config.
    """
    if "config" in getattr(module, "_hub_mixin_init_parameters", ()):
        module._hub_mixin_config = {"config": module.config.to_dict(), **arguments}
