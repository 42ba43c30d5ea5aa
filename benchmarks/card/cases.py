"""What is checked and timed, op by op: inputs, the op through `Ops`, and the same in eager PyTorch.

A case's backward includes the weight gradients, as eager's does. FLOPs count 2 a multiply-add; the
fewest bytes are those of every input, saved tensor and output, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.baselines import rotate
from benchmarks.card.device import nbytes
from relay_fast.batch.plan import Plan
from relay_fast.functional import SMALL_VOCABULARY, Ops
from relay_fast.kernels.loop_ref import LoopLayout, LoopWeights, loop_fwd_ref

EPS = 1e-6
Named = dict[str, Tensor]


class Draw:
    """Random tensors of one seed on one device: `wide` ones are fp32, the others of `dtype`."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, wide: bool = False) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return drawn if wide else drawn.to(self.dtype)

    def weight(self, rows: int, columns: int) -> Tensor:
        return self(rows, columns, scale=columns**-0.5)

    def norm(self, d: int) -> Tensor:
        return self(d, scale=0.1, wide=True) + 1

    def ids(self, high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    make: inputs as a namespace. forward and backward: outputs by name, computed by `ops` (backward
    is also given forward's). eager: the same as a user writes it, differentiable, from the inputs;
    leaves: which inputs it takes gradients of. flops: forward, backward. both: forward and backward
    in one op, where there is such a one. compiles: whether torch.compile is worth its time on it.
    """

    op: str
    shape: str
    make: Callable[[Draw], SimpleNamespace]
    forward: Callable[[Ops, SimpleNamespace], Named]
    eager: Callable[[SimpleNamespace], Tensor]
    flops: tuple[float, float]
    backward: Callable[[Ops, SimpleNamespace, Named], Named] | None = None
    leaves: tuple[str, ...] = ()
    both: Callable[[Ops, SimpleNamespace], Named] | None = None
    compiles: bool = True

    @property
    def name(self) -> str:
        return f"{self.op}/{self.shape}"

    def bytes(self, inputs: SimpleNamespace, out: Named, grads: Named) -> tuple[int, int]:
        """The fewest bytes of forward and of backward."""
        aside = ("g", "padded", "mask")
        kept = {k: v for k, v in vars(inputs).items() if k not in aside}
        given = [t for t in tree_leaves(kept) if isinstance(t, Tensor)]
        forward = nbytes(*given, *out.values())
        g = getattr(inputs, "g", None)
        return forward, nbytes(*given, g, *out.values(), *grads.values()) if grads else 0


def upcast_inputs(inputs: SimpleNamespace) -> SimpleNamespace:
    """The same inputs in fp64, for the truth."""
    wide = lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
    return SimpleNamespace(**tree_map(wide, vars(inputs)))


def weight_grad_of(ops: Ops, weight: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    """dyᵀ · x in fp32 (fp64 for fp64)."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    acc = torch.zeros(weight.shape, dtype=wide, device=weight.device)
    ops.weight_grad(acc, dy, x)
    return acc


def rms(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS).to(dtype)


def norm_linear(rows: int, d: int, heads: int) -> Case:
    """Norm, qkv projection, RoPE on q and k."""
    half, columns, rotary = d // heads // 2, 3 * d, 2 * d

    def make(draw: Draw) -> SimpleNamespace:
        angle = draw(rows, half, wide=True)
        return SimpleNamespace(
            x=draw(rows, d, wide=True),
            norm=draw.norm(d),
            weight=draw.weight(columns, d),
            cos=angle.cos(),
            sin=angle.sin(),
            g=draw(rows, columns),
        )

    def forward(ops: Ops, i) -> Named:
        return {"out": ops.norm_linear_fwd(i.x, i.norm, None, i.weight, None, i.cos, i.sin, rotary)}

    def backward(ops: Ops, i, out: Named) -> Named:
        dx, dnorm, _, dz, y = ops.norm_linear_bwd(
            i.g, i.x, i.norm, None, i.weight, i.cos, i.sin, rotary
        )
        return {"dx": dx, "dnorm": dnorm, "dweight": weight_grad_of(ops, i.weight, dz, y)}

    def eager(i) -> Tensor:
        z = F.linear(rms(i.x, i.norm, i.weight.dtype), i.weight)
        turned, v = z.split((rotary, columns - rotary), dim=-1)
        cos, sin = (t.to(z.dtype).unsqueeze(1) for t in (i.cos, i.sin))
        return torch.cat((rotate(turned.unflatten(-1, (-1, 2 * half)), cos, sin).flatten(1), v), -1)

    work = 2.0 * rows * d * columns
    return Case("norm_linear", f"{rows}x{d}", make, forward, eager, (work, 2 * work), backward,
                ("x", "norm", "weight"))  # fmt: skip


def attention(lengths: Sequence[int], heads: int, head_dim: int, causal: bool) -> Case:
    """Packed sequences; eager gets them padded, which it need not pay for here."""
    lengths = np.asarray(lengths)
    rows, longest, width = int(lengths.sum()), int(lengths.max()), heads * head_dim

    def make(draw: Draw) -> SimpleNamespace:
        plan = Plan(lengths, np.ones_like(lengths), draw.device)
        mask = torch.arange(longest) < torch.from_numpy(lengths)[:, None]
        return SimpleNamespace(
            qkv=draw(rows, 3 * width),
            g=draw(rows, width),
            padded=draw(3, len(lengths), heads, longest, head_dim),  # eager's q, k, v
            layout=plan.layout(0, len(lengths)),
            mask=None if mask.all() else mask[:, None, None, :].to(draw.device),
        )

    def forward(ops: Ops, i) -> Named:
        o, lse = ops.attention_fwd(i.qkv, i.layout, heads, heads, causal)
        return {"o": o} if lse is None else {"o": o, "lse": lse}

    def backward(ops: Ops, i, out: Named) -> Named:
        args = (i.g, i.qkv, out["o"], out.get("lse"), i.layout, heads, heads, causal)
        return {"dqkv": ops.attention_bwd(*args)}

    def eager(i) -> Tensor:
        return F.scaled_dot_product_attention(
            *i.padded, attn_mask=None if causal else i.mask, is_causal=causal
        )

    pairs = float((lengths * (lengths + 1) / 2 if causal else lengths**2).sum())
    kind = "causal" if causal else "both"
    return Case(
        "attention", f"{len(lengths)}x{longest}x{width} {kind}", make, forward, eager,
        (4 * pairs * width, 10 * pairs * width), backward, ("padded",),
    )  # fmt: skip


def linear_residual(rows: int, d: int) -> Case:
    """Output projection added into the residual stream."""

    def make(draw: Draw) -> SimpleNamespace:
        return SimpleNamespace(
            a=draw(rows, d),
            weight=draw.weight(d, d),
            residual=draw(rows, d, wide=True),
            g=draw(rows, d, wide=True),
        )

    def forward(ops: Ops, i) -> Named:
        return {"out": ops.linear_residual_fwd(i.a, i.weight, None, i.residual)}

    def backward(ops: Ops, i, out: Named) -> Named:
        da, dbranch = ops.linear_residual_bwd(i.g, i.weight)
        return {"da": da, "dweight": weight_grad_of(ops, i.weight, dbranch, i.a)}

    work = 2.0 * rows * d * d
    return Case("linear_residual", f"{rows}x{d}", make, forward,
                lambda i: i.residual + F.linear(i.a, i.weight), (work, 2 * work), backward,
                ("a", "weight", "residual"))  # fmt: skip


def mlp(rows: int, d: int) -> Case:
    """Norm, up, tanh-GELU, down, residual; what backward needs is kept."""
    hidden = 4 * d

    def make(draw: Draw) -> SimpleNamespace:
        return SimpleNamespace(
            x=draw(rows, d, wide=True),
            norm=draw.norm(d),
            up=draw.weight(hidden, d),
            down=draw.weight(d, hidden),
            g=draw(rows, d, wide=True),
        )

    def forward(ops: Ops, i) -> Named:
        out, up, _, a = ops.mlp_fwd(i.x, i.norm, None, i.up, None, None, None, i.down, None)
        return {"out": out, "u": up, "a": a}

    def backward(ops: Ops, i, out: Named) -> Named:
        dx, dnorm, _, y, dup, _, dbranch = ops.mlp_bwd(
            i.g, i.x, out["u"], None, i.norm, None, i.up, None, i.down
        )
        dweights = {"dup": weight_grad_of(ops, i.up, dup, y),
                    "ddown": weight_grad_of(ops, i.down, dbranch, out["a"])}  # fmt: skip
        return {"dx": dx, "dnorm": dnorm, **dweights}

    def eager(i) -> Tensor:
        u = F.linear(rms(i.x, i.norm, i.up.dtype), i.up)
        return i.x + F.linear(F.gelu(u, approximate="tanh"), i.down)

    work = 4.0 * rows * d * hidden
    return Case("mlp", f"{rows}x{d}", make, forward, eager, (work, 2 * work), backward,
                ("x", "norm", "up", "down"))  # fmt: skip


def cross_entropy(rows: int, d: int, vocabulary: int) -> Case:
    """Final norm, head and cross-entropy of every row; the loss is the rows' mean."""

    def make(draw: Draw) -> SimpleNamespace:
        return SimpleNamespace(
            h=draw(rows, d, wide=True),
            norm=draw.norm(d),
            head=draw.weight(vocabulary, d),
            targets=draw.ids(vocabulary, rows),
        )

    def forward(ops: Ops, i) -> Named:
        loss, lse, _ = ops.cross_entropy_fwd(i.h, i.targets, i.norm, None, i.head)
        return {"loss": loss, "lse": lse}

    def backward(ops: Ops, i, out: Named) -> Named:
        wide = out["lse"].dtype
        new = lambda like: torch.zeros(like.shape, dtype=wide, device=like.device)
        dhead, dnorm = new(i.head), new(i.norm)
        g = torch.full_like(out["lse"], 1 / rows)
        args = (g, i.h, i.targets, out["lse"], i.norm, None, i.head, dhead, dnorm, None)
        return {"dh": ops.cross_entropy_bwd(*args), "dhead": dhead, "dnorm": dnorm}

    def both(ops: Ops, i) -> Named:
        wide = torch.float64 if i.head.dtype == torch.float64 else torch.float32
        new = lambda like: torch.zeros(like.shape, dtype=wide, device=like.device)
        dhead, dnorm = new(i.head), new(i.norm)
        g = torch.full((rows,), 1 / rows, dtype=wide, device=i.h.device)
        args = (g, i.h, i.targets, i.norm, None, i.head, dhead, dnorm, None)
        loss, dh = ops.cross_entropy_grad(*args)
        return {"loss": loss, "dh": dh, "dhead": dhead, "dnorm": dnorm}

    def eager(i) -> Tensor:
        return F.cross_entropy(F.linear(rms(i.h, i.norm, i.head.dtype), i.head).float(), i.targets)

    work = 2.0 * rows * d * vocabulary
    return Case(
        "cross_entropy",
        f"{rows}x{d} V{vocabulary}",
        make,
        forward,
        eager,
        (work, 2 * work),
        backward,
        ("h", "norm", "head"),
        both if vocabulary > SMALL_VOCABULARY else None,
    )


def weight_grad(rows: int, columns: int, d: int) -> Case:
    """fp32 accumulator += dyᵀ · x."""

    def make(draw: Draw) -> SimpleNamespace:
        return SimpleNamespace(dy=draw(rows, columns), x=draw(rows, d))

    def forward(ops: Ops, i) -> Named:
        wide = torch.float64 if i.x.dtype == torch.float64 else torch.float32
        acc = torch.ones(columns, d, dtype=wide, device=i.x.device)
        ops.weight_grad(acc, i.dy, i.x)
        return {"acc": acc}

    def eager(i) -> Tensor:
        return torch.ones(columns, d, device=i.x.device).add_(i.dy.t() @ i.x)

    return Case("weight_grad", f"{rows}x{columns}x{d}", make, forward, eager,
                (2.0 * rows * columns * d, 0.0))  # fmt: skip


def argmax(rows: int, d: int, vocabulary: int) -> Case:
    """Final norm, head and argmax; no logits are stored."""

    def make(draw: Draw) -> SimpleNamespace:
        return SimpleNamespace(
            h=draw(rows, d, wide=True), norm=draw.norm(d), head=draw.weight(vocabulary, d)
        )

    def forward(ops: Ops, i) -> Named:
        return {"ids": ops.argmax(i.h, i.norm, None, i.head)}

    def eager(i) -> Tensor:
        return F.linear(rms(i.h, i.norm, i.head.dtype), i.head).argmax(-1)

    return Case("argmax", f"{rows}x{d} V{vocabulary}", make, forward, eager,
                (2.0 * rows * d * vocabulary, 0.0))  # fmt: skip


def whole_loop(lengths: Sequence[int], loops: int, d: int, vocabulary: int) -> Case:
    """Every iteration of every layer and its argmax in one launch; eager is the same packed."""
    heads, layers = 2 if d < 64 else 4, 1 if d < 64 else 3
    lengths = np.asarray(lengths)
    counts = np.sort(np.linspace(1, loops, len(lengths)).astype(int))[::-1].copy()
    layout = partial(LoopLayout, lengths, counts)
    rows, row_iterations = int(lengths.sum()), float(lengths @ counts)

    def make(draw: Draw) -> SimpleNamespace:
        stack = lambda r, c: torch.stack([draw.weight(r, c) for _ in range(layers)])
        norms = lambda: torch.stack([draw.norm(d) for _ in range(layers)])
        weights = LoopWeights(
            norms(),
            stack(3 * d, d),
            stack(d, d),
            norms(),
            stack(4 * d, d),
            None,
            stack(d, 4 * d),
            None,
            draw.norm(d),
            draw.weight(vocabulary, d),
        )
        angle = draw(rows, d // heads // 2, wide=True)
        return SimpleNamespace(
            x=draw(rows, d, wide=True),
            weights=weights,
            cos=angle.cos(),
            sin=angle.sin(),
            layout=layout(draw.device),
        )

    def forward(ops: Ops, i) -> Named:
        run = ops.loop_fwd or loop_fwd_ref
        final, ids = run(i.x, i.layout, i.weights, i.cos, i.sin, heads, heads)
        return {"final": final, "ids": ids}

    def eager(i) -> Tensor:
        return loop_fwd_ref(i.x, i.layout, i.weights, i.cos, i.sin, heads, heads)[0]

    pairs = float((lengths**2) @ counts)
    work = layers * (24.0 * d * d * row_iterations + 4 * d * pairs)
    work += 2.0 * d * vocabulary * row_iterations
    return Case("whole_loop", f"{len(lengths)}x{lengths.max()}x{d} T{loops}", make, forward, eager,
                (work, 0.0), compiles=False)  # fmt: skip


def mixed_lengths(sequences: int, longest: int) -> np.ndarray:
    """Lengths from 1 to `longest`, the same for every seed."""
    return np.random.default_rng(0).permutation(np.linspace(1, longest, sequences).astype(int))


def check_cases(tiny: bool) -> list[Case]:
    """Odd shapes, which must be right in every dtype; on a card the timed ones are checked too."""
    if tiny:
        return [
            norm_linear(65, 32, 2), attention((5, 31, 1, 17), 2, 16, False),
            attention((40, 33), 1, 16, True), linear_residual(33, 32), mlp(33, 32),
            cross_entropy(33, 32, 65), cross_entropy(5, 16, 1040), weight_grad(65, 48, 32),
            argmax(17, 32, 65), whole_loop((5, 3), 2, 16, 33),
        ]  # fmt: skip
    return [
        norm_linear(199, 256, 4), linear_residual(199, 256), mlp(199, 256),
        attention((63, 1, 127, 65), 4, 64, False), attention((760, 199, 1), 4, 64, True),
        cross_entropy(199, 256, 320), weight_grad(199, 130, 65), argmax(63, 256, 50_304),
        whole_loop((60, 9, 1, 31), 5, 64, 320), whole_loop((31, 9, 1), 3, 64, 65),
    ]  # fmt: skip


def timed_cases(tiny: bool) -> list[Case]:
    """RELAY's mix at 512 samples: its first iteration and its last; and d = 1,024, n = 1,024."""
    if tiny:
        return [
            norm_linear(20, 32, 2), attention((5, 11), 2, 16, False), linear_residual(20, 32),
            mlp(20, 32), cross_entropy(20, 32, 40), weight_grad(40, 32, 32), argmax(20, 32, 40),
        ]  # fmt: skip
    cases = []
    for rows in (24_000, 700):
        lengths = mixed_lengths(rows // 47, 93)
        cases += [
            norm_linear(rows, 256, 4), attention(lengths, 4, 64, False),
            linear_residual(rows, 256), mlp(rows, 256), cross_entropy(rows, 256, 320),
            weight_grad(rows, 1024, 256), argmax(rows, 256, 320),
        ]  # fmt: skip
    return [
        *cases,
        cross_entropy(8192, 256, 50_304),
        whole_loop(mixed_lengths(512, 93), 30, 128, 320),
        norm_linear(16_384, 1024, 16),
        attention([1024] * 16, 16, 64, True),
        linear_residual(16_384, 1024),
        mlp(16_384, 1024),
        weight_grad(16_384, 4096, 1024),
    ]
