"""A chain of thought put into a loop (Saunshi et al. 2025, Theorem 5.4).

The theorem: m greedy tokens of an L-layer model are m loops of a model with L + O(1) layers, on the
input followed by m blanks. Here L + 2 layers and one head more, for a random causal model without
position encoding whose embeddings have one norm. The width is our own, since the paper's is not
known to us: 2 ⌈log2 (n + m)⌉ + 3V + 2 more for V tokens, rounded up to a multiple of the heads.

In each loop all rows predict: the first L layers are the model's, one compares the logits, one
hands the best token of a row to the next row if that is a blank. After t loops t tokens stand,
since a row depends on those before it only.

A state is the model's own and, much smaller, so that the model's norms do not feel them, bits: the
row's number, the one before, and the input's token or blank. The layer that compares writes all
bits anew and 10⁷ times larger, so that norms are known from there on; the norm between iterations
scales all back.
"""

from itertools import permutations
from math import ceil, log2

import pytest
import torch
from torch import Tensor

from relay_fast import LoopedBlock

LARGE, SMALL = 1e7, 1e-6


class Model:
    """A random causal transformer that decodes greedily."""

    def __init__(self, vocabulary: int, d: int, heads: int, layers: int, seed: int):
        torch.manual_seed(seed)
        self.block = LoopedBlock(d, heads, layers, causal=True, rope_base=None, eps=1e-30).double()
        signs = torch.randint(0, 2, (vocabulary, d)).double() * 2 - 1
        self.embedding, self.norm = signs, torch.rand(d).double() + 0.5
        self.head = torch.randn(vocabulary, d, dtype=torch.float64)
        with torch.no_grad():
            for name, p in self.block.named_parameters():
                p.copy_(torch.rand_like(p) + 0.5 if "norm" in name else 2 * torch.randn_like(p) / 4)

    @torch.no_grad()
    def decode(self, tokens: Tensor, steps: int) -> Tensor:
        """(B, steps) tokens that follow tokens (B, n)."""
        for _ in range(steps):
            last = self.block(self.embedding[tokens])[:, -1]
            logits = torch.nn.functional.rms_norm(last, (last.shape[1],), self.norm) @ self.head.T
            tokens = torch.cat([tokens, logits.argmax(-1, True)], 1)
        return tokens[:, -steps:]


def parts(model: Model, rows: int) -> dict[str, range]:
    """The coordinates of each part of a state."""
    v, bits = len(model.embedding), ceil(log2(rows))
    sizes = {"state": model.block.config.d_model, "one": 1, "row": bits, "before": bits,
             "given": v + 1, "wins": v, "best": v}  # fmt: skip
    found, end = {}, 0
    for name, size in sizes.items():
        found[name] = range(end, end := end + size)
    return found


# Long: the weights of all layers, written down in the order of the proof.
def looped(model: Model, rows: int) -> LoopedBlock:
    """The construction, for inputs and blanks of so many rows together."""
    c, part = model.block.config, parts(model, rows)
    v, d, bits = len(model.embedding), c.d_model, len(part["row"])
    heads = c.n_heads + 1
    wide = -(-(part["best"].stop) // heads) * heads
    pairs = list(permutations(range(v), 2))
    digits = [*part["row"], *part["before"], *part["given"]]
    block = LoopedBlock(
        wide,
        heads,
        c.n_layers + 2,
        causal=True,
        rope_base=None,
        bias=True,
        eps=1e-30,
        d_hidden=max(c.hidden, 2 * (len(pairs) + len(digits)), 4 * v),
        loop_norm="post",
    ).double()
    head, theirs = block.config.head_dim, c.head_dim
    assert head >= max(theirs, bits, v)
    *inner, compare, hand_on = block.layers
    with torch.no_grad():
        for p in block.parameters():
            p.zero_()
        # The model's layers: its coordinates and heads come first.
        for ours, layer in zip(inner, model.block.layers, strict=True):
            for name in ("norm1", "norm2"):
                weight = getattr(layer, name).weight
                getattr(ours, name).weight[:d] = weight * (d / wide) ** 0.5
            for h in range(c.n_heads):
                for kind, scale in enumerate(((head / theirs) ** 0.5, 1, 1)):
                    source = layer.qkv.weight.view(3, c.n_heads, theirs, d)[kind, h]
                    ours.qkv.weight.view(3, heads, head, wide)[kind, h, :theirs, :d] = (
                        scale * source
                    )
                source = layer.out.weight.view(d, c.n_heads, theirs)[:, h]
                ours.out.weight.view(wide, heads, head)[:d, h, :theirs] = source
            ours.up.weight[: c.hidden, :d] = layer.up.weight
            ours.down.weight[:d, : c.hidden] = layer.down.weight

        def step(layer, unit: int, reads: dict, bias: float, writes: dict) -> None:
            """Two units: 1 where the weighted sum of `reads` and `bias` is positive, else 0."""
            for i, sign in ((unit, 1), (unit + 1, -1)):
                for place, weight in reads.items():
                    layer.up.weight[i, place] = weight
                layer.up.bias[i] = bias + (i == unit)
                for place, weight in writes.items():
                    layer.down.weight[place, i] += sign * weight

        # Compares each two logits, and writes all bits anew. Only signs count: the scale is free.
        (one,), wins = part["one"], part["wins"]
        compare.norm2.weight[:d] = model.norm
        compare.norm2.weight[one:] = 1
        unit = 0
        for a, b in pairs:
            reads = dict(enumerate((LARGE * (model.head[a] - model.head[b])).tolist()))
            step(compare, unit, reads, 0, {wins[a]: LARGE})
            unit += 2
        for place in digits:
            signed = place not in part["given"]
            reads = {place: LARGE / SMALL, one: 0 if signed else -LARGE / SMALL / 2}
            step(compare, unit, reads, 0, {place: 2 * LARGE if signed else LARGE})
            compare.down.bias[place] = -LARGE if signed else 0
            unit += 2
        compare.down.bias[one] = LARGE

        # Takes the wins of the row before, and puts the winner, or what is given, into the state.
        squares = sum(k * k for k in range(v))
        known = 2 * bits + 2 + squares
        hand_on.norm1.weight.fill_((known / wide) ** 0.5)
        hand_on.norm2.weight.fill_(((known + squares) / wide) ** 0.5)
        query, key, value = hand_on.qkv.weight.view(3, heads, head, wide)[:, -1]
        for k in range(bits):
            query[k, part["before"][k]], key[k, part["row"][k]] = 50 * head**0.5, 1
        for k in range(v):
            value[k, wins[k]] = 1
            hand_on.out.weight.view(wide, heads, head)[part["best"][k], -1, k] = LARGE
        blank = part["given"][v]
        for token, vector in enumerate((LARGE * model.embedding).tolist()):
            writes = dict(enumerate(vector))
            best, given = part["best"][token], part["given"][token]
            reads = {best: 100.0, blank: 100.0 * v}
            step(hand_on, 4 * token, reads, -100 * (2 * v - 1.5), writes)
            step(hand_on, 4 * token + 2, {given: 100.0}, -50, writes)

        scale = ((known + squares + d) / wide) ** 0.5
        block.loop_norm.weight[:d] = scale
        block.loop_norm.weight[one : wins.start] = SMALL * scale
    return block


def states(model: Model, tokens: Tensor, blanks: int, wide: int) -> Tensor:
    """(B, n + blanks, wide): tokens (B, n), then blanks."""
    batch, n = tokens.shape
    part, v = parts(model, n + blanks), len(model.embedding)
    row = torch.arange(n + blanks)
    signs = lambda numbers: torch.stack(
        [(numbers >> b & 1) * 2.0 - 1 for b in range(len(part["row"]))], -1
    )
    given = torch.nn.functional.pad(tokens, (0, blanks), value=v)
    x = torch.zeros(batch, n + blanks, wide, dtype=torch.float64)
    x[..., part["state"]] = model.embedding[given % v]
    x[..., part["one"]] = SMALL
    x[..., part["row"]] = SMALL * signs(row).double()
    x[..., part["before"]] = SMALL * signs((row - 1).clamp(min=0)).double()
    x[..., part["given"]] = SMALL * torch.nn.functional.one_hot(given, v + 1).double()
    return x


@pytest.mark.parametrize(
    ("vocabulary", "d", "heads", "layers", "n", "steps"),
    [(6, 16, 2, 2, 5, 11), (6, 16, 4, 1, 1, 7), (3, 24, 2, 3, 9, 8)],
)
def test_m_loops_write_the_m_tokens_of_the_chain(vocabulary, d, heads, layers, n, steps) -> None:
    model = Model(vocabulary, d, heads, layers, seed=0)
    block = looped(model, n + steps)
    assert (block.config.n_layers, block.config.n_heads) == (layers + 2, heads + 1)
    tokens = torch.randint(0, vocabulary, (30, n), generator=torch.Generator().manual_seed(1))
    chain = model.decode(tokens, steps)
    assert (chain[:, 1:] != chain[:, :-1]).any(1).float().mean() > 0.5  # no trivial chains
    x = states(model, tokens, steps, block.config.d_model)
    with torch.no_grad():
        after = block(x, steps, return_states=True)
    for t, state in enumerate(after, start=1):
        written = state[:, n : n + t, :d]
        torch.testing.assert_close(written, model.embedding[chain[:, :t]], atol=1e-4, rtol=0)
    wrong = (after[-2][:, -1, :d] - model.embedding[chain[:, -1]]).abs().amax(-1) > 0.5
    assert wrong.float().mean() > 0.1  # the last loop is needed
