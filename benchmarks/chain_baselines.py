"""Chains written as a careful user of eager PyTorch, or of Hugging Face transformers, does it.

Each takes the weights of relay_fast's own models (same state-dict keys).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines import EagerTransformer, rotate
from relay_fast.batch.packed import PackedBatch
from relay_fast.config import ModelConfig
from relay_fast.tasks.vocabulary import EOS, PAD
from relay_fast.utils.ragged import concat_ranges, lengths_to_offsets


class EagerReader(EagerTransformer):
    """The looped model on problems padded to the longest, all looping as often as the last does."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.config, self.has_answer_head = config, True

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def predict_rounds(self, batch: PackedBatch) -> tuple[list[Tensor], Tensor]:
        """As `LoopedTransformer.predict_rounds`; every row is read out after every iteration."""
        plan, device = batch.plan, self.device
        lengths = torch.from_numpy(plan.lengths).to(device)
        mask = torch.arange(int(plan.lengths.max()), device=device) < lengths[:, None]
        tokens = torch.full(mask.shape, PAD, device=device)
        tokens[mask] = batch.tokens
        loops = torch.from_numpy(plan.loops).to(device)
        rounds, state = [], None
        for state in self.block.states(self.embedding(tokens), plan.max_loops, loops, mask):
            ids = self.chain_head(self.norm(state)).argmax(-1)
            active = plan.active_sequences[len(rounds)]
            rounds.append(ids[:active][mask[:active]])
        last = state[torch.arange(len(batch), device=device), lengths - 1]
        return rounds, self.answer_head(self.norm(last)).argmax(-1)


@torch.inference_mode()
def eager_decode(
    model: EagerTransformer, prompts: np.ndarray, offsets: np.ndarray, limits: np.ndarray
) -> np.ndarray:
    """(S, steps) tokens: one plain loop over a preallocated cache, prompts padded on the left.

    It ends when every sequence has written `<eos>` or its limit; rows go on until then.
    """
    c, device = model.block.config, model.embedding.weight.device
    tokens, mask = left_padded(prompts, offsets, device)
    size, width = tokens.shape
    steps = int(limits.max())
    limits = torch.from_numpy(limits).to(device)
    visible = torch.ones(size, width + steps, dtype=torch.bool, device=device)
    visible[:, :width] = mask
    positions = (visible.cumsum(1) - 1).clamp_(min=0)
    cos, sin = model.block.rope(width + steps, device, model.embedding.weight.dtype)
    shape = (len(model.block.layers), size, c.kv_heads, width + steps, c.head_dim)
    keys, values = (model.embedding.weight.new_zeros(shape) for _ in range(2))
    written = torch.zeros(size, steps, dtype=torch.int64, device=device)
    done = torch.zeros(size, dtype=torch.bool, device=device)
    begin, end, x = 0, width, model.embedding(tokens)
    for step in range(steps):
        at = positions[:, begin:end]
        rope = cos[at].unsqueeze(1), sin[at].unsqueeze(1)
        seen = visible[:, None, None, :end]
        if step == 0:
            seen = seen & torch.ones(width, width, dtype=torch.bool, device=device).tril()
            seen = seen | torch.eye(width, dtype=torch.bool, device=device)  # padding sees itself
        for i, layer in enumerate(model.block.layers):
            qkv = layer.qkv(layer.norm1(x)).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
            q, k, v = qkv.split((c.n_heads, c.kv_heads, c.kv_heads), dim=1)
            keys[i, :, :, begin:end] = rotate(k, *rope)
            values[i, :, :, begin:end] = v
            o = F.scaled_dot_product_attention(
                rotate(q, *rope), keys[i, :, :, :end], values[i, :, :, :end], attn_mask=seen
            )
            x = x + layer.out(o.transpose(1, 2).flatten(2))
            x = x + layer.down(F.gelu(layer.up(layer.norm2(x)), approximate="tanh"))
        chosen = model.chain_head(model.norm(x[:, -1])).argmax(-1)
        written[:, step] = chosen
        done |= (chosen == EOS) | (step + 1 >= limits)
        if bool(done.all()):
            break
        begin, end, x = end, end + 1, model.embedding(chosen[:, None])
    return written.cpu().numpy()


def huggingface_model(model: torch.nn.Module):
    """transformers' Arcee, the decoder whose block is ours (RMSNorm, RoPE, MLP without a gate),
    with the weights of our autoregressive model. Raises ImportError without transformers."""
    from transformers import ArceeConfig, ArceeForCausalLM

    c, size = model.config.block, model.config.vocabulary_size
    config = ArceeConfig(
        vocab_size=size,
        hidden_size=c.d_model,
        intermediate_size=c.hidden,
        rms_norm_eps=c.eps,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.kv_heads,
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=model.config.max_tokens,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
    )
    theirs = ArceeForCausalLM(config)
    weights = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.chain_head.weight,
    }
    sizes = [heads * c.head_dim for heads in (c.n_heads, c.kv_heads, c.kv_heads)]
    for i, layer in enumerate(model.block.layers):
        own = f"model.layers.{i}."
        projections = layer.qkv.weight.split(sizes)
        for name, weight in zip("qkv", projections, strict=True):
            weights[f"{own}self_attn.{name}_proj.weight"] = weight
        weights[f"{own}self_attn.o_proj.weight"] = layer.out.weight
        weights[f"{own}mlp.up_proj.weight"] = layer.up.weight
        weights[f"{own}mlp.down_proj.weight"] = layer.down.weight
        weights[f"{own}input_layernorm.weight"] = layer.norm1.weight
        weights[f"{own}post_attention_layernorm.weight"] = layer.norm2.weight
    theirs.load_state_dict(weights)
    return theirs.to(model.device, model.embedding.weight.dtype).eval()


@torch.inference_mode()
def huggingface_decode(
    model, prompts: np.ndarray, offsets: np.ndarray, limits: np.ndarray
) -> np.ndarray:
    """(S, steps) tokens of `generate`, each sequence stopped at its limit."""
    from transformers import StoppingCriteria

    tokens, mask = left_padded(prompts, offsets, model.device)
    width, ends = tokens.shape[1], torch.from_numpy(limits).to(model.device)

    class OwnLimit(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return input_ids.shape[1] - width >= ends

    written = model.generate(
        tokens,
        attention_mask=mask.long(),
        max_new_tokens=int(limits.max()),
        do_sample=False,
        stopping_criteria=[OwnLimit()],
    )
    return written[:, width:].cpu().numpy()


def left_padded(
    prompts: np.ndarray, offsets: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Tokens (S, longest) and where they are (S, longest) bool."""
    lengths = np.diff(offsets)
    width = int(lengths.max())
    tokens = np.full((len(lengths), width), PAD, np.int64)
    mask = np.arange(width) >= (width - lengths)[:, None]
    tokens[mask] = prompts
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)


def flat(written: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(S, steps) tokens as flat tokens up to each limit, and their offsets."""
    index = concat_ranges(np.arange(len(limits)) * written.shape[1], limits)
    return written.ravel()[index], lengths_to_offsets(limits)
