"""The picture of the engine: the active prefix, the kept states, RELAY's rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.picture_style import INK, save, svg_figure
from relay_fast.reporting.palette import BLUE, GREEN, VERMILION

# Sequences, sorted by loops: (name, tokens, loops).
SEQUENCES = (("A", 3, 5), ("B", 2, 4), ("C", 4, 2), ("D", 2, 1))
LONGEST = max(loops for _, _, loops in SEQUENCES)
# Kept states of T = 9 by policy; h_0 and h_T are the caller's.
POLICIES = {
    "none": "and everything inside",
    "state": "every state",
    "sqrt": "every third state",
    "last:2": "the last two",
}
ROUNDS = (("(3+4)×2=", "problem"), ("7×2=", "round 1"), ("3", "round 2"))


def draw(path: Path) -> Path:
    """Draws the three panels. Returns the path."""
    figure = svg_figure(8.6, 3.3)
    prefix, kept, relay = figure.subplots(1, 3, width_ratios=(1.15, 1, 1.05))
    _draw_prefix(prefix)
    _draw_kept(kept)
    _draw_relay(relay)
    for axes in (prefix, kept, relay):
        axes.axis("off")
        axes.title.set_color(INK)
        axes.title.set_fontsize(9.5)
    return save(figure, path, shown())


def shown() -> list[Any]:
    """Returns what the picture depends on."""
    return [SEQUENCES, POLICIES, ROUNDS, [sorted(kept_states(policy)) for policy in POLICIES]]


def _text(axes: Any, x: float, y: float, words: str, **options: Any) -> None:
    options = {"color": INK, "fontsize": 8, "ha": "center", "va": "center", **options}
    axes.text(x, y, words, **options)


def _draw_prefix(axes: Any) -> None:
    """Rows are tokens, columns iterations; what a padded loop would compute is outlined."""
    from matplotlib.patches import Rectangle

    axes.set_title("Computed: the active prefix")
    total, longest_input = 0, max(tokens for _, tokens, _ in SEQUENCES)
    for name, tokens, loops in SEQUENCES:
        _text(axes, -0.35, total + tokens / 2, name)
        for t in range(LONGEST):
            for row in range(tokens):
                active = t < loops
                style = {"facecolor": BLUE, "alpha": 0.75} if active else {"fill": False}
                cell = Rectangle((t + 0.06, total + row + 0.08), 0.88, 0.84, **style)
                cell.set_edgecolor("none" if active else INK)
                cell.set_linewidth(0.5)
                axes.add_patch(cell)
        total += tokens
    for t in range(LONGEST):
        _text(axes, t + 0.5, total + 0.6, str(t + 1))
    work = sum(tokens * loops for _, tokens, loops in SEQUENCES)
    padded = len(SEQUENCES) * longest_input * LONGEST
    _text(axes, LONGEST / 2, total + 1.6, "iteration; rows: tokens of A, B, C, D")
    _text(axes, LONGEST / 2, total + 2.7, f"{work} token-iterations, padded {padded}")
    axes.set_xlim(-0.8, LONGEST + 0.2)
    axes.set_ylim(total + 3.2, -0.3)


def kept_states(policy: str, loops: int = 9) -> frozenset[int]:
    """Returns the kept states, as the engine does."""
    from relay_fast.engine.recompute import RecomputePolicy

    return RecomputePolicy.parse(policy).kept(loops, [1] * loops)


def _draw_kept(axes: Any) -> None:
    axes.set_title("Kept for backward: h₁ … h₈ of T = 9")
    for row, (policy, words) in enumerate(POLICIES.items()):
        kept, y = kept_states(policy), 2.2 * row
        _text(axes, 0.5, y, f"{policy}: {words}", ha="left")
        for t in range(1, 9):
            full = t in kept
            axes.plot(
                t,
                y + 0.85,
                marker="o",
                markersize=8,
                markeredgecolor=GREEN,
                markerfacecolor=GREEN if full else "none",
                markeredgewidth=1,
            )
            if policy == "none" and t < 8:
                axes.plot([t + 0.3, t + 0.7], [y + 0.85] * 2, color=GREEN, linewidth=4)
    _text(axes, 4.5, 9.0, "the rest is computed again in backward;")
    _text(axes, 4.5, 9.8, "gradients are the same, bit for bit")
    axes.set_xlim(0.3, 8.8)
    axes.set_ylim(10.4, -0.7)


def _draw_relay(axes: Any) -> None:
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    axes.set_title("RELAY: iteration t writes round t")

    def box(x: float, y: float, words: str, color: str, width: float = 2.3) -> None:
        corner = (x - width / 2, y - 0.42)
        patch = FancyBboxPatch(corner, width, 0.84, boxstyle="round,pad=0.06", linewidth=1.2)
        patch.set(facecolor=color, alpha=0.22)
        axes.add_patch(patch)
        _text(axes, x, y, words)

    def arrow(start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
        style = {"arrowstyle": "-|>", "mutation_scale": 9, "color": color, "linewidth": 1.1}
        axes.add_patch(FancyArrowPatch(start, end, **style))

    problem, *rounds = ROUNDS
    box(1.2, 0.5, problem[0], INK)
    _text(axes, 3.6, 0.5, problem[1], ha="left")
    for t, (text, name) in enumerate(rounds, 1):
        y = 0.5 + 2.2 * (t - 1)
        arrow((1.2, y + 0.55), (1.2, y + 1.65))
        box(1.2, y + 2.2, "block", BLUE)
        arrow((2.5, y + 2.2), (3.5, y + 2.2), VERMILION)
        box(4.6, y + 2.2, text, VERMILION, 2.0)
        _text(axes, 4.6, y + 1.35, f"{name}, its own loss", fontsize=7)
    _text(axes, 3.2, 6.4, "one block, the same weights; longer problems:")
    _text(axes, 3.2, 7.1, "more loops, whose chains teach an")
    _text(axes, 3.2, 7.8, "autoregressive model")
    axes.set_xlim(-0.2, 6.6)
    axes.set_ylim(8.3, -0.3)
