"""A paper's construction put into the weights of the looped block, at the paper's sizes.

Saunshi et al. 2025 (arXiv 2502.17416), Theorem 5.1: one layer with 2 heads, looped ⌈log2 n⌉ times,
composes n elements of a group G, with d = 3 (⌈log2 |G|⌉ + ⌈log2 n + 1⌉) and
d_FF = |G|² + 6 ⌈log2 |G|⌉.
"""

from itertools import permutations, product
from math import ceil, log2

import numpy as np
import pytest
import torch

from relay_fast import LoopedBlock

PERMUTATIONS_3 = list(permutations(range(3)))
EVEN_4 = [
    p for p in permutations(range(4)) if np.linalg.det(np.eye(4)[list(p)]) > 0
]  # the alternating group of 12


def table(elements: list[tuple[int, ...]]) -> np.ndarray:
    """(|G|, |G|): index of a∘b."""
    return np.array([[elements.index(tuple(a[i] for i in b)) for b in elements] for a in elements])


def cyclic(order: int) -> np.ndarray:
    return np.add.outer(np.arange(order), np.arange(order)) % order


def codes(count: int, bits: int) -> torch.Tensor:
    """(count, bits) binary codes in ±1, most significant bit first."""
    return torch.tensor(
        [[1.0 if i >> b & 1 else -1.0 for b in reversed(range(bits))] for i in range(count)],
        dtype=torch.float64,
    )


def composing_block(group: np.ndarray, n: int, causal: bool) -> LoopedBlock:
    """The construction. A state holds (element, position, left, right, 0); a position is counted
    from the end, so that place i of a loop reads places 2i + 1 (left) and 2i (right). In double
    precision: each loop multiplies rounding errors by about 4k."""
    g, k, m = len(group), ceil(log2(len(group))), ceil(log2(n))
    d = 3 * (k + ceil(log2(n) + 1))
    block = LoopedBlock(
        d,
        2,
        1,
        causal=causal,
        rope_base=None,
        activation="relu2",
        bias=True,
        d_hidden=g * g + 6 * k,
        eps=1e-12,
    )
    element, position = slice(0, k), slice(k, k + m)
    left, right = slice(k + m, 2 * k + m), slice(2 * k + m, 3 * k + m)
    (layer,) = block.double().layers
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        # All bits are ±1, so the norm only divides by a number that is known.
        layer.norm1.weight.fill_(((k + m) / d) ** 0.5)
        layer.norm2.weight.fill_(((3 * k + m) / d) ** 0.5)
        # Two hard attentions: the position's bits moved up by one, and the last bit appended.
        head = d // 2
        sharp = 30 * head**0.5
        for h, (bit, slot) in enumerate(((1.0, left), (-1.0, right))):
            q, key, value = (torch.arange(head) + part * d + h * head for part in range(3))
            for b in range(m):
                layer.qkv.weight[key[b], position.start + b] = 1
                if b + 1 < m:
                    layer.qkv.weight[q[b], position.start + b + 1] = sharp
            layer.qkv.bias[q[m - 1]] = sharp * bit
            for b in range(k):
                layer.qkv.weight[value[b], b] = 1
                layer.out.weight[slot.start + b, h * head + b] = 1
        # A hidden unit for each pair of elements: 1 where left and right are the pair, else 0.
        code = codes(g, k)
        for unit, (a, b) in enumerate(product(range(g), repeat=2)):
            layer.up.weight[unit, left], layer.up.weight[unit, right] = code[a], code[b]
            layer.up.bias[unit] = 1 - 2 * k
            layer.down.weight[element, unit] = code[group[a, b]]
        # x = relu(x)² − relu(−x)² for x = ±1: takes element, left and right away.
        for i, place in enumerate([*range(k), *range(k + m, 3 * k + m)]):
            for unit, sign in ((g * g + 2 * i, 1.0), (g * g + 2 * i + 1, -1.0)):
                layer.up.weight[unit, place] = sign
                layer.down.weight[place, unit] = -sign
    return block


def read(block: LoopedBlock, group: np.ndarray, words: np.ndarray, loops: int) -> torch.Tensor:
    """(B, k): the code in the element's place of the last token."""
    n, k, m = words.shape[1], ceil(log2(len(group))), ceil(log2(words.shape[1]))
    x = torch.zeros(*words.shape, block.config.d_model, dtype=torch.float64)
    x[..., :k] = codes(len(group), k)[torch.from_numpy(words)]
    x[..., k : k + m] = codes(n, m).flip(0)
    with torch.no_grad():
        return block(x, loops)[:, -1, :k]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("group", "n", "sizes"),
    [
        (table(PERMUTATIONS_3), 16, (24, 54)),  # not commutative, 4 loops
        (table(EVEN_4), 8, (24, 168)),
        (table(PERMUTATIONS_3), 64, (30, 54)),
        (cyclic(2), 4, (12, 10)),  # parity
    ],
)
def test_group_composition_takes_log2_n_loops(group, n, sizes, causal) -> None:
    block = composing_block(group, n, causal)
    assert (block.config.d_model, block.config.hidden) == sizes
    words = np.random.default_rng(0).integers(0, len(group), (200, n))
    expected = words[:, 0]
    for step in range(1, n):
        expected = group[expected, words[:, step]]
    loops = ceil(log2(n))
    code = codes(len(group), ceil(log2(len(group))))
    torch.testing.assert_close(read(block, group, words, loops), code[expected], atol=1e-6, rtol=0)
    early = read(block, group, words, loops - 1)
    assert (early - code[expected]).abs().amax(1).gt(0.5).float().mean() > 0.3


def test_fewer_elements_take_their_own_log2() -> None:
    """Identities in front: 11 elements in 16 places, ⌈log2 11⌉ = 4 loops; 3 elements take 2."""
    group, n = table(PERMUTATIONS_3), 16
    block, code = composing_block(group, n, True), codes(6, 3)
    for count, loops in ((11, 4), (3, 2)):
        words = np.random.default_rng(0).integers(0, 6, (50, n))
        words[:, : n - count] = 0  # the identity
        expected = words[:, 0]
        for step in range(1, n):
            expected = group[expected, words[:, step]]
        torch.testing.assert_close(
            read(block, group, words, loops), code[expected], atol=1e-6, rtol=0
        )
