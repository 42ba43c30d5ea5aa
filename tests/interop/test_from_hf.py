"""LoopedBlock.from_hf: tiny random models of transformers in fp64, their states and gradients, and
what is refused.

The originals run with norms in fp64 (transformers' are in fp32), and with cosines and sines of
their own inverse frequencies, in fp64.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks.numerics import assert_close
from relay_fast.models.from_hf import read_layers
from relay_fast.models.looped_block import LoopedBlock

transformers = pytest.importorskip("transformers", minversion="5.0")
from transformers.models.llama import modeling_llama as llama  # noqa: E402

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 20, "vocab_size": 11, "max_position_embeddings": 64,
    "attn_implementation": "sdpa", "pad_token_id": None,
}  # fmt: skip
GPT2 = {
    "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 11, "attn_pdrop": 0.0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_implementation": "sdpa",
}  # fmt: skip


def rope(kind: str = "default", theta: float = 1e4, **options) -> dict:
    return {"rope_type": kind, "rope_theta": theta, **options}


class OuroDecoderLayer(llama.LlamaDecoderLayer):
    """Ouro's layer: Llama's, with a second norm behind attention and MLP."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.input_layernorm_2 = llama.LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm_2 = copy.deepcopy(self.input_layernorm_2)

    def forward(self, x: Tensor, **options) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(x), **options)
        x = x + self.input_layernorm_2(attended)
        expanded = self.mlp(self.post_attention_layernorm(x))
        return x + self.post_attention_layernorm_2(expanded)


class OuroModel(llama.LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(OuroDecoderLayer(config, i) for i in range(2))


def build(name: str, **options) -> nn.Module:
    """A tiny model in fp64 with random weights, norms and biases."""
    torch.manual_seed(0)
    kind = "Llama" if name == "Ouro" else name
    config = getattr(transformers, f"{kind}Config")(**options)
    model = (OuroModel if name == "Ouro" else getattr(transformers, f"{name}Model"))(config)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.ndim == 1))
    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):
            width, eps = part.weight.shape, part.variance_epsilon
            part.forward = partial(fp64_norm, part, width, eps)
    return model


def fp64_norm(part: nn.Module, width, eps: float, x: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, width, part.weight, eps)


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.h if hasattr(model, "h") else model.layers


def original(model: nn.Module, x: Tensor, loops: int) -> Tensor:
    """The model's layers, `loops` times, on padded x."""
    options = {}
    if (rotary := getattr(model, "rotary_emb", None)) is not None:
        angle = torch.arange(x.shape[1]).double()[:, None] * rotary.inv_freq.double()
        angle = torch.cat((angle, angle), dim=-1)[None]
        tables = angle.cos(), angle.sin()
        options["position_embeddings"] = tuple(t * rotary.attention_scaling for t in tables)
    for _ in range(loops):
        for layer in layers_of(model):
            x = layer(x, attention_mask=None, **options)
    return x


LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "Llama": {**SIZES, "attention_bias": True},
    "Llama, llama3": {**SIZES, "head_dim": 6, "rope_parameters": rope("llama3", **LLAMA3)},
    "Llama, biases": {**SIZES, "mlp_bias": True, "rope_parameters": rope("linear", factor=2.0)},
    "Mistral": {**SIZES, "sliding_window": None},
    "Qwen2": SIZES,
    "Qwen3": {**SIZES, "head_dim": 8, "rope_parameters": rope("yarn", 1e3, **YARN)},
    "GPT2": GPT2,
    "GPT2, erf": {**GPT2, "n_inner": 9, "activation_function": "gelu"},
    "Ouro": SIZES,
    "Helium": {**SIZES, "head_dim": 4},
    "Glm": {**SIZES, "head_dim": 8, "attention_bias": True},
    "Glm4": {**SIZES, "head_dim": 8},
}


@pytest.mark.parametrize("name", MODELS)
def test_states_and_gradients_are_those_of_the_original(name: str) -> None:
    model = build(name.split(",")[0], **MODELS[name])
    rotary = getattr(model, "rotary_emb", None)
    block = LoopedBlock.from_hf(layers_of(model), rotary)
    assert block.layers[0].qkv.weight.dtype == torch.float64
    for loops, lengths in ((1, (5, 5)), (4, (5, 5)), ((4, 1, 2), (3, 6, 1))):
        model.zero_grad()
        block.zero_grad()
        if isinstance(loops, int):  # padded
            x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
            truth, out = original(model, x, loops), block(x, loops)
        else:  # packed
            x = torch.randn(sum(lengths), 16, dtype=torch.float64, requires_grad=True)
            pairs = zip(x.split(lengths), loops, strict=True)
            truth = torch.cat([original(model, part[None], t)[0] for part, t in pairs])
            out = block(x, torch.tensor(loops), cu_seqlens=[0, 3, 9, 10])
        assert_close("state", out, truth)
        g = torch.randn_like(truth)
        (dx,) = torch.autograd.grad((truth * g).sum(), x, retain_graph=True)
        (truth * g).sum().backward(inputs=list(layers_of(model).parameters()))
        (got,) = torch.autograd.grad((out * g).sum(), x, retain_graph=True)
        (out * g).sum().backward(inputs=list(block.parameters()))
        assert_close("gradient of x", got, dx)
        slopes = copy.deepcopy(layers_of(model))
        for p, own in zip(slopes.parameters(), layers_of(model).parameters(), strict=True):
            p.data = own.grad
        _, expected = read_layers(slopes, rotary)
        assert expected.keys() == dict(block.named_parameters()).keys()
        for key, p in block.named_parameters():
            assert_close(f"gradient of {key}", p.grad, expected[key])


@pytest.mark.parametrize("name", ["Llama, llama3", "Llama, biases", "Qwen3", "Glm4"])
def test_frequencies_of_the_config_are_the_model_s(name: str) -> None:
    """To the rounding of fp32, in which transformers computes them."""
    model = build(name.split(",")[0], **MODELS[name])
    computed, _ = read_layers(model.layers)
    given, _ = read_layers(model.layers, model.rotary_emb)
    assert computed.rope_scale == pytest.approx(given.rope_scale)
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    a, b = LoopedBlock.from_hf(model.layers), LoopedBlock.from_hf(model.layers, model.rotary_emb)
    assert_close("state", a(x), b(x), of_largest=1e-4)
    if computed.rope_frequencies is not None:
        assert computed.rope_frequencies == pytest.approx(given.rope_frequencies, rel=1e-6)


def test_the_config_and_what_is_free() -> None:
    model = build("Qwen3", **MODELS["Qwen3"])
    block = LoopedBlock.from_hf(
        model.layers, loop_norm="pre", injection="concat", max_loops=3, dropout=0.1, impl="torch"
    )
    c = block.config
    assert (c.d_model, c.n_heads, c.kv_heads, c.head_dim, c.hidden) == (16, 4, 2, 8, 20)
    assert c.qk_norm and c.causal and not c.bias and c.eps == model.config.rms_norm_eps
    assert (c.loop_norm, c.injection, c.max_loops, c.dropout) == ("pre", "concat", 3, 0.1)
    assert all(p.isfinite().all() for p in block.parameters())
    assert not block.loop_embedding.weight.any() and (block.loop_norm.weight == 1).all()
    assert LoopedBlock.from_hf(model.layers[0]).config.n_layers == 1
    assert LoopedBlock.from_hf(build("Qwen2", **SIZES).layers).config.bias == ("qkv",)
    half = LoopedBlock.from_hf(build("GPT2", **GPT2).float().h)
    assert half.config.bias is True and half.layers[0].up.weight.dtype == torch.float32
    weight = model.layers[0].mlp.down_proj.weight
    block.layers[0].down.weight.data.zero_()
    assert weight.any()  # copies


def layer(module: str, kind: str, config: str, **options) -> nn.Module:
    models = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=[kind])
    return getattr(models, kind)(getattr(transformers, config)(**options), 0)


MOE = {**SIZES, "num_local_experts": 2}
REFUSED = [
    ("mistral", "MistralDecoderLayer", "MistralConfig", SIZES,
     r"a block has no sliding window \(4096 tokens; "),
    ("qwen2", "Qwen2DecoderLayer", "Qwen2Config",
     {**SIZES, "use_sliding_window": True, "max_window_layers": 0, "sliding_window": 4},
     r"sliding window \(4 tokens"),
    ("mixtral", "MixtralDecoderLayer", "MixtralConfig", MOE, "mixture of experts"),
    ("cohere", "CohereDecoderLayer", "CohereConfig", SIZES, "parallel residual"),
    ("phi", "PhiDecoderLayer", "PhiConfig", SIZES, "parallel residual"),
    ("gpt_neox", "GPTNeoXLayer", "GPTNeoXConfig",
     {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, "parallel residual"),
    ("gemma2", "Gemma2DecoderLayer", "Gemma2Config", SIZES,
     "has no soft-cap of the attention scores"),
    ("gemma", "GemmaDecoderLayer", "GemmaConfig", SIZES, r"norms that scale by 1 \+ weight"),
    ("qwen3_next", "Qwen3NextDecoderLayer", "Qwen3NextConfig", {**SIZES, "num_experts": 2},
     "no linear attention"),
    ("dory", "DoryDecoderLayer", "DoryConfig", {}, "attention gate"),
    ("olmo2", "Olmo2DecoderLayer", "Olmo2Config", SIZES, "norms behind attention and MLP only"),
    ("granite", "GraniteDecoderLayer", "GraniteConfig", {**SIZES, "residual_multiplier": 0.5},
     "scaled residual"),
    ("phi3", "Phi3DecoderLayer", "Phi3Config", SIZES, "its class is not one of LlamaDecoderLayer"),
    ("llama", "LlamaDecoderLayer", "LlamaConfig", {**SIZES, "hidden_act": "relu"},
     "hidden_act = 'relu' is not one of silu, swish"),
    ("llama", "LlamaDecoderLayer", "LlamaConfig", {**SIZES, "attention_dropout": 0.1},
     r"dropout of attention probabilities \(0.1\): give dropout"),
    ("llama", "LlamaDecoderLayer", "LlamaConfig",
     {**SIZES, "rope_parameters": rope("dynamic", factor=2.0)}, "rope_type = 'dynamic'"),
    ("gpt2", "GPT2Block", "GPT2Config", {**GPT2, "scale_attn_by_inverse_layer_idx": True,
     "scale_attn_weights": False}, "it scales the scores by 1.0, not by head_dim"),
    ("gpt2", "GPT2Block", "GPT2Config", {**GPT2, "add_cross_attention": True}, "cross-attention"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "kind", "config", "options", "message"), REFUSED)
def test_refused_with_the_part_that_is_missing(module, kind, config, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        LoopedBlock.from_hf(layer(module, kind, config, **options))


def test_bad_input() -> None:
    model = build("Llama", **SIZES)
    refused = lambda match: pytest.raises(ValueError, match=match)
    with refused("layers is empty"):
        LoopedBlock.from_hf([])
    with refused(r"norm is determined by the layers: leave it out, or give \('causal'"):
        LoopedBlock.from_hf(model.layers, norm="rms")
    with refused(r"dropot is no option of a block: leave it out, or give \('causal'"):
        LoopedBlock.from_hf(model.layers, dropot=0.1)
    for value in (None, "llama"):
        with pytest.raises(TypeError, match=r"layers is of type \w+: give decoder layers"):
            LoopedBlock.from_hf(value)
    with refused("rotary is a LlamaRMSNorm without inv_freq"):
        LoopedBlock.from_hf(model.layers, model.norm)
    scaled = build("Llama", **SIZES, rope_parameters=rope("dynamic", factor=2.0))
    with refused("rotary has rope_type = 'dynamic', whose frequencies depend on the length"):
        LoopedBlock.from_hf(scaled.layers, scaled.rotary_emb)
    with refused("Linear cannot become a layer of a block: it has no attention"):
        LoopedBlock.from_hf(nn.Linear(2, 2))
    with refused("layer 1 has d_hidden = 24 and layer 0 20"):
        other = build("Llama", **{**SIZES, "intermediate_size": 24})
        LoopedBlock.from_hf([model.layers[0], other.layers[0]])
    model.layers[1].self_attn.temperature = nn.Parameter(torch.ones(1))
    with refused("its parameter self_attn.temperature has no place there"):
        LoopedBlock.from_hf(model.layers)
    model.layers[0].self_attn.gate_proj = nn.Linear(16, 4)
    with refused("a block has no attention gate"):
        LoopedBlock.from_hf(model.layers)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_forwards_and_hooks_are_not_lost_in_a_copy() -> None:
    model = build("Llama", **SIZES)
    model(torch.zeros(1, 3, dtype=torch.long), output_hidden_states=True)  # leaves its own hooks
    assert model.layers[0]._forward_hooks or model.layers[0].self_attn._forward_hooks
    LoopedBlock.from_hf(model.layers)
    mlp = model.layers[1].mlp
    hook = mlp.register_forward_hook(lambda part, given, out: 2 * out)
    refused = lambda match: pytest.raises(ValueError, match=match)
    with refused(r"its part mlp \(LlamaMLP\) has a forward hook, which a copy of the weights"):
        LoopedBlock.from_hf(model.layers)
    hook.remove()
    hook = mlp.register_full_backward_hook(lambda part, given, out: None)
    with refused("has a backward hook"):
        LoopedBlock.from_hf(model.layers)
    hook.remove()
    plain, mlp.up_proj = mlp.up_proj, Doubled(16, 20, bias=False)
    with refused(r"its part mlp.up_proj \(Doubled\) has a custom forward"):
        LoopedBlock.from_hf(model.layers)
    mlp.up_proj = plain
    model.layers[0].forward = lambda h, **options: h
    with refused(r"its part forward \(LlamaDecoderLayer\) has a custom forward"):
        LoopedBlock.from_hf(model.layers)


def test_parts_keep_their_own_dtype() -> None:
    model = build("Llama", **SIZES).to(torch.bfloat16)
    for layer_ in model.layers:
        layer_.input_layernorm.float()  # as a model that keeps its norms in fp32
    with torch.no_grad():
        model.layers[0].input_layernorm.weight.copy_(1 + 2**-12 * torch.arange(16))
    block = LoopedBlock.from_hf(model.layers)
    assert torch.equal(block.layers[0].norm1.weight, model.layers[0].input_layernorm.weight)
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16, torch.float32}
    assert all(p.requires_grad for p in block.parameters())
    assert block(torch.randn(2, 3, 16).bfloat16(), 2).isfinite().all()
