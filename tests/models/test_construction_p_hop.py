"""p-hop induction put into the weights of one looped layer (Saunshi et al. 2025, Corollary 5.3).

The corollary: 1 layer, at most 3 heads, ⌊log2 p⌋ + 2 loops, for every p. So here, with 2 heads; the
sizes are our own, since the paper's are not known to us: d = 14 + 2 (s + 1) + 2T and
d_FF = 20 + 6 (s + 1) + 4T for s letters and up to T loops, whatever n is. What grows with n is
precision: double holds n up to about 100. One block serves every p: its bits stand in the input.

A row knows its letter C and a place J. Loop 1 finds: the last earlier row with the same letter,
whose successor becomes J. Each further loop follows J: it takes J's J, so that J goes 1, 2, 4, …
hops back, and, where the next bit of p is set, J's letter.
"""

from functools import cache
from math import ceil, cos, floor, log2, pi

import numpy as np
import pytest
import torch

from relay_fast import LoopedBlock
from relay_fast.recipes.p_hop import draw_chained, hop

LETTERS, LOOPS = 4, 7
SIZES = {"at": 2, "after": 2, "order": 4, "place": 2, "letter": LETTERS + 1, "plan": 2 * LOOPS,
         "found": 2, "next_place": 2, "next_letter": LETTERS + 1}  # fmt: skip
KNOWN = 7 + 2 * LOOPS  # squared norm of a state; what the heads write adds 3


def parts() -> dict[str, range]:
    """The coordinates of each part of a state."""
    ends = np.cumsum(list(SIZES.values())).tolist()
    return {name: range(e - size, e) for (name, size), e in zip(SIZES.items(), ends, strict=True)}


def fading(n: int) -> float:
    """y: 5 · y^distance is less than half a step of age, unless the distance is 0."""
    return 2.0 ** -ceil(log2(10 * (n + 1)))


def states(v: np.ndarray, p: int) -> torch.Tensor:
    """(B, n + 1, d) of letters v (B, n) and the number of hops; row 0 stands for "nowhere"."""
    batch, n = v.shape
    part, row = parts(), torch.arange(n + 1, dtype=torch.float64)
    circle = lambda r: torch.stack([(2 * pi / (n + 1) * r).cos(), (2 * pi / (n + 1) * r).sin()], -1)
    x = torch.zeros(batch, n + 1, sum(SIZES.values()), dtype=torch.float64)
    x[..., part["at"]] = x[..., part["place"]] = circle(row)
    x[..., part["after"]] = circle(torch.where(row > 0, row + 1, row))
    order = torch.stack([row / (n + 1), fading(n) ** row, fading(n) ** (n - row)], -1)
    x[..., part["order"]] = torch.cat([order, (3 - order.square().sum(-1, True)).sqrt()], -1)
    letters = torch.from_numpy(np.pad(v, ((0, 0), (1, 0)), constant_values=LETTERS))
    x[..., part["letter"]] = torch.nn.functional.one_hot(letters, LETTERS + 1).double()
    # Two signs for each loop: whether it finds, and whether it takes the letter.
    takes = [False, *(bool(p >> b & 1) for b in range(LOOPS - 1))]
    plan = [[loop == 0, take] for loop, take in enumerate(takes)]
    x[..., part["plan"]] = torch.tensor(plan).double().flatten() * 2 - 1
    return x


# Long: one layer's weights, written down in the order of the proof.
@cache
def hopping_block(n: int) -> LoopedBlock:
    """The construction, for sequences of n letters, in double precision."""
    part, d = parts(), sum(SIZES.values())
    hidden = 2 * (10 + 3 * (LETTERS + 1) + 2 * LOOPS)
    block = LoopedBlock(
        d,
        2,
        1,
        causal=True,
        rope_base=None,
        activation="relu2",
        bias=True,
        d_hidden=hidden,
        eps=1e-30,
    )
    (layer,) = block.double().layers
    head = d // 2
    rows = lambda kind, h: range((kind * 2 + h) * head, (kind * 2 + h + 1) * head)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        # Norms are known, so normalising only divides by a number.
        layer.norm1.weight.fill_((KNOWN / d) ** 0.5)
        layer.norm2.weight.fill_(((KNOWN + 3) / d) ** 0.5)

        weight, bias = layer.qkv.weight, layer.qkv.bias
        query, key, value = (rows(kind, 0) for kind in range(3))
        # Head 0 finds. Score: 3 for the same letter, or 2 for "nowhere"; + age; − 5 y^distance.
        sharp = 100 * (n + 1) * head**0.5
        for k, letter in enumerate(part["letter"]):
            weight[query[k], letter], weight[key[k], letter] = 3 * sharp, 1
        bias[query[LETTERS]] = 2 * sharp
        age, fade, rise, _ = part["order"]
        k = LETTERS + 1
        bias[query[k]], weight[key[k], age] = sharp, 1
        weight[query[k + 1], fade], weight[key[k + 1], rise] = -5 * sharp * fading(n) ** -n, 1
        for k, (after, found) in enumerate(zip(part["after"], part["found"], strict=True)):
            weight[value[k], after] = layer.out.weight[found, k] = 1
        # Head 1 follows: to the row that stands at the place.
        query, key, value = (rows(kind, 1) for kind in range(3))
        sharp = 50 / (1 - cos(2 * pi / (n + 1))) * head**0.5
        for k in range(2):
            weight[query[k], part["place"][k]], weight[key[k], part["at"][k]] = sharp, 1
        read, write = [*part["place"], *part["letter"]], [*part["next_place"], *part["next_letter"]]
        for k, (source, target) in enumerate(zip(read, write, strict=True)):
            weight[value[k], source] = layer.out.weight[target, head + k] = 1

        # Hidden units: 4x = relu(1 + x)² − relu(1 − x)² for |x| ≤ 1, or 0 where a sign forbids it.
        units = iter(range(hidden))

        def move(source: range, *targets: tuple[range, int], sign: int | None = None, on: int = 1):
            for k, x in enumerate(source):
                for slope in (1, -1):
                    unit = next(units)
                    layer.up.weight[unit, x] = slope
                    if sign is None:
                        layer.up.bias[unit] = 1
                    else:
                        layer.up.weight[unit, sign] = on
                    for target, factor in targets:
                        layer.down.weight[target[k], unit] = factor * slope / 4

        finds, takes = part["plan"][:2]
        for name in ("place", "found", "next_place", "next_letter"):
            move(part[name], (part[name], -1))
        move(part["found"], (part["place"], 1), sign=finds)
        move(part["next_place"], (part["place"], 1), sign=finds, on=-1)
        move(part["letter"], (part["letter"], -1), sign=takes)
        move(part["next_letter"], (part["letter"], 1), sign=takes)
        plan = part["plan"]
        before = [plan[k - 2] for k in range(len(plan))]
        move(plan, (plan, -1), (before, 1))
    return block


def letters(v: np.ndarray, p: int, loops: int) -> torch.Tensor:
    """(B, n, s + 1): the letter of each row after so many loops."""
    with torch.no_grad():
        return hopping_block(v.shape[1])(states(v, p), loops)[:, 1:, parts()["letter"]]


def one_hot(v: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.from_numpy(v), LETTERS + 1).double()


@pytest.mark.parametrize("n", [5, 16, 64])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 7, 13, 16, 31, 32, 63])
def test_p_hops_take_log2_p_and_two_loops_at_every_position(n, p) -> None:
    """Random letters: equal neighbours, hops that find nothing."""
    v = np.random.default_rng(p).integers(0, LETTERS, (20, n))
    got = letters(v, p, floor(log2(p)) + 2)
    torch.testing.assert_close(got, one_hot(hop(v, p, absent=LETTERS)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("p", [1, 2, 3, 5, 16, 31])
def test_one_loop_fewer_does_not_reach_the_answer(p) -> None:
    """p hops from the last letter always exist; one loop fewer leaves out p's highest bit."""
    v, answers = draw_chained(np.random.default_rng(p), 100, 64, p, LETTERS)
    loops = floor(log2(p)) + 2
    right = lambda loops: letters(v, p, loops)[:, -1].argmax(-1).numpy() == answers
    assert right(loops).all()
    assert right(loops - 1).mean() < 0.6


def test_the_width_does_not_depend_on_the_length() -> None:
    assert hopping_block(5).config == hopping_block(64).config
    assert (hopping_block(5).config.n_heads, hopping_block(5).config.d_model) == (2, 38)
