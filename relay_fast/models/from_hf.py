"""Reads decoder layers of Hugging Face's transformers as the layers of a block.

Layers are known by the name of their class (`_FAMILIES`), and transformers need not be installed.
A layer that computes something that a block does not is refused with the name of that part, and so
is one with a parameter that has no place in a block.

RoPE: a block rotates the columns j and j + head_dim / 2 of a head, for the first rotary_dim / 2 of
these pairs. Layers that rotate the first rotary_dim columns (half-split), or neighbouring columns
2j and 2j + 1 (interleaved), compute the same function with the rows of their q and k projections in
another order, because q · k is a sum over columns: `rotary_order`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from relay_fast.config import BlockConfig
from relay_fast.engine.plain_modules import CUSTOM_FORWARD, call_reason

# Options of a block that the layers do not determine.
FREE = ("causal", "dropout", "loop_norm", "injection", "max_loops", "state_noise")


class _Family(NamedTuple):
    """The names that a class of layers gives its parts.

    parts: modules by the block's names; the rows of several are put end to end.
    interleaved: whether RoPE rotates neighbouring columns.
    joined: whether the first half of up's module is the gate.
    transposed: whether weights are (inputs, outputs).
    """

    parts: Mapping[str, tuple[str, ...]]
    interleaved: bool = False
    joined: bool = False
    transposed: bool = False


_LLAMA = {
    "norm1": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "norm2": ("post_attention_layernorm",),
    "up": ("mlp.up_proj",),
    "gate": ("mlp.gate_proj",),
    "down": ("mlp.down_proj",),
}
_QWEN3 = _LLAMA | {"q_norm": ("self_attn.q_norm",), "k_norm": ("self_attn.k_norm",)}
_OURO = _LLAMA | {
    "post_norm1": ("input_layernorm_2",), "post_norm2": ("post_attention_layernorm_2",)
}  # fmt: skip
_GLM = _LLAMA | {"up": ("mlp.gate_up_proj",), "gate": ("mlp.gate_up_proj",)}
_GLM4 = _GLM | {
    "post_norm1": ("post_self_attn_layernorm",), "post_norm2": ("post_mlp_layernorm",)
}  # fmt: skip
_GPT2 = {
    "norm1": ("ln_1",), "qkv": ("attn.c_attn",), "out": ("attn.c_proj",),
    "norm2": ("ln_2",), "up": ("mlp.c_fc",), "down": ("mlp.c_proj",),
}  # fmt: skip
_FAMILIES = {
    "LlamaDecoderLayer": _Family(_LLAMA),
    "MistralDecoderLayer": _Family(_LLAMA),
    "Qwen2DecoderLayer": _Family(_LLAMA),
    "Qwen3DecoderLayer": _Family(_QWEN3),
    "OuroDecoderLayer": _Family(_OURO),
    "HeliumDecoderLayer": _Family(_LLAMA, interleaved=True),
    "GlmDecoderLayer": _Family(_GLM, interleaved=True, joined=True),
    "Glm4DecoderLayer": _Family(_GLM4, interleaved=True, joined=True),
    "GPT2Block": _Family(_GPT2, transposed=True),
}
_GATED = {"silu": "swiglu", "swish": "swiglu"}
_PLAIN = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"
}  # fmt: skip


def read_layers(
    layers: nn.Module | Sequence[nn.Module], rotary: nn.Module | None = None, **options: Any
) -> tuple[BlockConfig, dict[str, Tensor]]:
    """Reads decoder layers of transformers.

    Args:
        layers: the layers, all of one class, or one layer.
        rotary: the model's rotary embedding, whose inverse frequencies and factor are used; by
            default they are computed from the layers' config, in fp64 instead of its fp32.
        **options: values of `FREE`; causal is True by default.

    Returns:
        The block's config, and its weights by state-dict key, copies of the layers' own.

    Raises:
        TypeError: for anything else than layers.
        ValueError: for layers that compute something that a block does not, and for options that
            the layers determine.
    """
    layers = [layers] if _is_layer(layers) else layers
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(
            f"layers is of type {type(layers).__name__}: give decoder layers of transformers, such "
            "as model.model.layers"
        )
    layers = list(layers)
    if not layers:
        raise ValueError("layers is empty: give at least one decoder layer")
    for name in options:
        if name not in FREE:
            known = {*BlockConfig.__dataclass_fields__}
            what = "is determined by the layers" if name in known else "is no option of a block"
            raise ValueError(f"{name} {what}: leave it out, or give {FREE}")
    if rotary is not None:
        _check_rotary(rotary)
    sizes = [_sizes(layer, rotary, options) for layer in layers]
    for layer in layers:
        _refuse_changed(layer)
    for i, own in enumerate(sizes):
        for name, value in own.items():
            if value != sizes[0].get(name):
                raise ValueError(
                    f"layer {i} has {name} = {value} and layer 0 {sizes[0].get(name)}: the layers "
                    "of a block are alike"
                )
    config = BlockConfig(n_layers=len(layers), **sizes[0])
    weights = {
        f"layers.{i}.{name}": weight.detach().clone()
        for i, layer in enumerate(layers)
        for name, weight in _weights(layer, config)
    }
    return config, weights


def _refuse_changed(layer: nn.Module) -> None:
    """Raises ValueError for a part whose forward or hooks would be lost with the layer.

    Hooks of transformers only read outputs, and those of accelerate only move tensors. A norm may
    have a forward of its own, in another precision.
    """
    for path, part in layer.named_modules():
        is_linear = isinstance(part, nn.Linear)
        reason = call_reason(part, nn.Linear if is_linear else type(part))
        kinds = "_forward_pre_hooks _forward_hooks _backward_pre_hooks _backward_hooks".split()
        hooks = [hook for kind in kinds for hook in getattr(part, kind).values()]
        harmless = hasattr(part, "_hf_hook")
        if reason == CUSTOM_FORWARD:
            harmless |= not is_linear and not part._modules
        else:
            harmless |= all(str(hook.__module__).startswith("transformers") for hook in hooks)
        if reason is not None and not harmless:
            raise ValueError(
                f"{type(layer).__name__} cannot become a layer of a block: its part "
                f"{path or 'forward'} ({type(part).__name__}) {reason}, which a copy of the "
                "weights would lose; remove it, or loop the layers by relay_fast.loop"
            )


def _check_rotary(rotary: nn.Module) -> None:
    """Raises ValueError for a module that has no fixed frequencies."""
    if not isinstance(getattr(rotary, "inv_freq", None), Tensor):
        raise ValueError(
            f"rotary is a {type(rotary).__name__} without inv_freq: give the model's rotary "
            "embedding, such as model.model.rotary_emb"
        )
    kind = getattr(rotary, "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ValueError(
            f"rotary has rope_type = {kind!r}, whose frequencies depend on the length of the "
            "input, and a block's are fixed: build the block from its config instead, with "
            "rope_frequencies as a list of numbers"
        )


def rotary_order(head_dim: int, rotary_dim: int, interleaved: bool) -> list[int]:
    """Returns which column of a head in other code each column of a block's head is.

    Args:
        head_dim: columns of a head.
        rotary_dim: columns that RoPE rotates, the first ones in the other code.
        interleaved: whether the other code rotates columns 2j and 2j + 1, instead of j and j +
            rotary_dim / 2.
    """
    half, rest = rotary_dim // 2, (head_dim - rotary_dim) // 2
    turned = list(range(rotary_dim))
    first, second = (turned[::2], turned[1::2]) if interleaved else (turned[:half], turned[half:])
    still = list(range(rotary_dim, head_dim))
    return first + still[:rest] + second + still[rest:]


def _is_layer(layers: Any) -> bool:
    return isinstance(layers, nn.Module) and not isinstance(layers, nn.ModuleList | nn.Sequential)


def _family(layer: nn.Module) -> _Family:
    """Returns the layer's family; raises ValueError with the part that a block does not have."""
    kind = type(layer).__name__
    reason = missing_part(layer)
    if reason is None and kind not in _FAMILIES:
        reason = f"its class is not one of {', '.join(_FAMILIES)}"
    if reason is not None:
        raise ValueError(f"{kind} cannot become a layer of a block: {reason}")
    return _FAMILIES[kind]


def missing_part(layer: nn.Module) -> str | None:
    """Returns what the layer computes that a block does not, or None if nothing is known."""
    names = [name for name, _ in (*layer.named_modules(), *layer.named_parameters())]
    if any(word in name for name in names for word in ("linear_attn", "mamba", "ssm")):
        return "a block has no linear attention or state-space layer"
    attention, c = _attention(layer)
    kinds = {type(part).__name__ for part in layer.modules()}
    has = lambda *words: any(word in name.split(".")[-1] for name in names for word in words)
    inner = [name for name, _ in attention.named_children()]
    norms = [part for part in layer.children() if "norm" in type(part).__name__.lower()]
    option = lambda name, owner=c: getattr(owner, name, None)
    window = option("sliding_window", attention)
    if not hasattr(attention, "sliding_window"):  # Mistral has it in the config only
        window = option("sliding_window") if not option("layer_types") else None
    parallel = option("use_parallel_residual") or option("parallel_attn")
    gated = any("gate" in name or name == "g_proj" for name in inner)
    q = getattr(attention, "q_proj", None)
    heads = option("num_attention_heads")
    if isinstance(q, nn.Linear) and heads and hasattr(attention, "head_dim"):
        gated |= q.out_features == 2 * heads * attention.head_dim
    found = {
        "mixture of experts": has("expert", "router") or any("Moe" in kind for kind in kinds),
        "cross-attention": has("crossattention", "encoder_attn", "cross_attn"),
        "attention sinks": has("sinks"),
        "attention gate": gated,
        "soft-cap of the attention scores": option("attn_logit_softcapping") is not None,
        f"sliding window ({window} tokens; config.sliding_window = None if no sequence is "
        "longer)": window is not None,
        "parallel residual": parallel or len(norms) == 1,
        "norms that scale by 1 + weight": any("Gemma" in kind for kind in kinds),
        "clipped queries, keys and values": option("clip_qkv") is not None,
        "scaled residual": option("residual_multiplier") not in (None, 1.0),
    }
    missing = next((part for part, there in found.items() if there), None)
    if missing is None and type(layer).__name__ not in _FAMILIES and not has("input_layernorm"):
        if has("post_attention_layernorm"):
            missing = "norms behind attention and MLP only"
    return None if missing is None else f"a block has no {missing}"


def _attention(layer: nn.Module) -> tuple[nn.Module, Any]:
    """Returns the layer's attention and its config; raises ValueError if it has none."""
    for name in ("self_attn", "attn", "attention", "self_attention"):
        attention = getattr(layer, name, None)
        if isinstance(attention, nn.Module):
            return attention, getattr(attention, "config", getattr(layer, "config", None))
    raise ValueError(
        f"{type(layer).__name__} cannot become a layer of a block: it has no attention; give "
        "decoder layers of transformers, such as model.model.layers"
    )


def _sizes(layer: nn.Module, rotary: nn.Module | None, options: Mapping[str, Any]) -> dict:
    """Returns the options of BlockConfig that the layer determines, and the given ones."""
    family = _family(layer)
    attention, c = _attention(layer)
    kind, head_dim = type(layer).__name__, attention.head_dim
    refuse = lambda what: ValueError(f"{kind} cannot become a layer of a block: {what}")
    norms = [
        _module(layer, name)
        for part in family.parts
        if "norm" in part
        for name in family.parts[part]
    ]
    epsilons = {getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) for norm in norms}
    if len(epsilons) > 1:
        raise refuse(f"its norms have different epsilons, {sorted(epsilons)}")
    name = "hidden_act" if hasattr(c, "hidden_act") else "activation_function"
    known = _GATED if "gate" in family.parts else _PLAIN
    if (activation := getattr(c, name, None)) not in known:
        raise refuse(f"{name} = {activation!r} is not one of {', '.join(known)}")
    if abs((scale := _score_scale(attention, c)) * head_dim**0.5 - 1) > 1e-6:
        raise refuse(f"it scales the scores by {scale}, not by head_dim^(−1/2)")
    dropout = getattr(c, "attention_dropout", getattr(c, "attn_pdrop", 0.0))
    if dropout and "dropout" not in options:
        raise refuse(
            f"a block has no dropout of attention probabilities ({dropout}): give dropout, "
            "the block's own rate behind attention and MLP"
        )
    biased = lambda part: any(
        getattr(_module(layer, name), "bias", None) is not None for name in family.parts[part]
    )
    is_layer_norm = isinstance(norms[0], nn.LayerNorm)
    parts = [part for part in ("qkv", "out", "up", "gate", "down") if part in family.parts]
    bias = [*(part for part in parts if biased(part)), *(["norm"] if biased("norm1") else [])]
    if len(bias) == len(parts) + is_layer_norm:
        bias = True  # what it has not, a gate or a bias of RMSNorms, does not matter
    width = _module(layer, family.parts["up"][0]).weight
    return {
        "d_model": c.hidden_size,
        "n_heads": c.num_attention_heads,
        "n_kv_heads": getattr(c, "num_key_value_heads", None) or c.num_attention_heads,
        "head_dim": head_dim,
        "d_hidden": width.shape[family.transposed] // (2 if family.joined else 1),
        "norm": "layer" if is_layer_norm else "rms",
        "eps": epsilons.pop(),
        "activation": known[activation],
        "bias": bias,
        "qk_norm": "q_norm" in family.parts,
        "sandwich_norm": "post_norm1" in family.parts,
        **_rope(c, head_dim, rotary),
        "causal": True,
        "dropout": getattr(c, "resid_pdrop", 0.0),
        **options,
    }


def _score_scale(attention: nn.Module, c: Any) -> float:
    """Returns the factor of the attention scores."""
    if hasattr(attention, "scaling"):
        return attention.scaling
    scale = attention.head_dim**-0.5 if getattr(c, "scale_attn_weights", True) else 1.0
    by_layer = getattr(c, "scale_attn_by_inverse_layer_idx", False)  # GPT-2's, before 5
    return scale / (attention.layer_idx + 1) if by_layer else scale


def _rope(c: Any, head_dim: int, rotary: nn.Module | None) -> dict[str, Any]:
    """Returns the options of BlockConfig that describe the layer's RoPE."""
    parameters = getattr(c, "rope_parameters", None)
    if parameters is None and hasattr(c, "rope_theta"):  # transformers before 5
        parameters = {**(getattr(c, "rope_scaling", None) or {}), "rope_theta": c.rope_theta}
    if parameters is None:
        return {"rope_base": None}
    parameters = dict(parameters)
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise ValueError("a block has no RoPE that differs between its layers")
    share = getattr(c, "partial_rotary_factor", None) or 1.0
    share = parameters.pop("partial_rotary_factor", None) or share
    base = parameters.pop("rope_theta", None) or 10_000.0
    # transformers cuts fractions of a column off.
    made = {"rope_base": base, "rotary_share": int(head_dim * share) / head_dim}
    if rotary is not None:
        frequencies = rotary.inv_freq.double().tolist()
        return made | {"rope_frequencies": frequencies, "rope_scale": rotary.attention_scaling}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return made
    if kind in ("llama3", "yarn"):
        longest = c.max_position_embeddings
        if parameters.get("original_max_position_embeddings") is None:
            parameters["original_max_position_embeddings"] = longest
        if parameters.get("factor") is None:
            parameters["factor"] = longest / parameters["original_max_position_embeddings"]
    return made | {"rope_frequencies": parameters}


def _module(layer: nn.Module, name: str) -> nn.Module:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{type(layer).__name__} cannot become a layer of a block: it has no {name}"
        ) from None


def _weights(layer: nn.Module, config: BlockConfig) -> Iterator[tuple[str, Tensor]]:
    """Yields the layer's weights by their names in a block's layer."""
    family, c, used = _family(layer), config, set()
    order = list(range(c.head_dim))
    if c.rope_base is not None:
        order = rotary_order(c.head_dim, c.rotary_dim, family.interleaved)
    for part, modules in family.parts.items():
        for kind in ("weight", "bias"):
            names = [f"{module}.{kind}" for module in modules]
            found = [getattr(_module(layer, module), kind, None) for module in modules]
            if any(t is None for t in found):
                continue
            used.update(names)
            found = [t.t() if family.transposed and t.ndim == 2 else t for t in found]
            weight = torch.cat(found)
            if family.joined and part in ("gate", "up"):
                weight = weight.chunk(2)[part == "up"]
            if part == "qkv":
                heads = rearrange(weight, "(head c) ... -> head c ...", c=c.head_dim)
                turned, v = heads.split((c.n_heads + c.kv_heads, c.kv_heads))
                heads = torch.cat((turned[:, order], v))
                weight = rearrange(heads, "head c ... -> (head c) ...")
            elif part in ("q_norm", "k_norm"):
                weight = weight[order]
            yield f"{part}.{kind}", weight
    for name, _ in layer.named_parameters():
        if name not in used:
            raise ValueError(
                f"{type(layer).__name__} cannot become a layer of a block: its parameter {name} "
                "has no place there"
            )
