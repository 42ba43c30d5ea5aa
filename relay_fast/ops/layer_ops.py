"""A layer's op as a pair of custom ops, `relay_fast::<name>_fwd` and `relay_fast::<name>_bwd`.

The tensors are passed as a list of those that are there, with one flag for each that may be, since
torch differentiates no lists of optional tensors; the options as typed arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from relay_fast.ops.dispatch import chosen_ops, launch_context, refuse_transforms, requested_impl
from relay_fast.ops.flops import count_flops
from relay_fast.utils.arguments import check_one_device

Gradients = dict[str, Callable[[], Tensor | None]]


class LayerOpParts(NamedTuple):
    """The parts of an op. t: its tensors, o: its options, both NamedTuples."""

    tensors: type  # NamedTuple of tensors, None if absent
    options: type  # NamedTuple of int, float, bool and str
    forward: Callable[..., list[Tensor]]  # (ops, t, o) → the result, tensors for the backward
    fake: Callable[..., list[Tensor]]  # (t, o) → empty tensors like the forward's
    backward: Callable[..., Gradients]  # (ops, g, t, o, saved) → by tensor name
    unused_in_backward: frozenset[str]  # tensors whose values the backward does not read
    saves_output: bool  # whether the backward reads the result
    flops: Callable[..., int]  # (t, o, backward) → count


class LayerOp:
    """A differentiable op.

    Args:
        name: of the custom ops.
        parts: see LayerOpParts.
    """

    def __init__(self, name: str, parts: LayerOpParts):
        self.parts = parts
        hints = get_type_hints(parts.options)
        options = "".join(f", {kind.__name__} {field}" for field, kind in hints.items())
        self.forward = torch.library.custom_op(
            f"relay_fast::{name}_fwd",
            self._forward,
            mutates_args=(),
            schema=f"(Tensor[] tensors, bool[] present{options}, str impl) -> Tensor[]",
        )
        self.forward.register_fake(self._fake)
        self.backward = torch.library.custom_op(
            f"relay_fast::{name}_bwd",
            self._backward,
            mutates_args=(),
            schema="(Tensor grad, Tensor[] tensors, Tensor[] saved, bool[] needed, bool[] present"
            f"{options}, str impl) -> Tensor[]",
        )
        self.backward.register_fake(
            lambda grad, tensors, saved, needed, *_: [
                t.new_empty(t.shape) for t, need in zip(tensors, needed, strict=True) if need
            ]
        )
        self.forward.register_autograd(self._autograd, setup_context=self._save)
        count_flops(f"{name}_fwd", self._forward_flops)
        count_flops(f"{name}_bwd", self._backward_flops)

    def __call__(self, tensors: Any, options: Any, impl: str) -> Tensor:
        """Computes the op.

        Args:
            tensors: of the type `parts.tensors`.
            options: of the type `parts.options`.
            impl: "auto", "triton" or "torch".

        Raises:
            ValueError: unless all tensors are on one device.
        """
        named = tensors._asdict()
        named.pop("cu_seqlens", None)  # may be on the host
        check_one_device(**named)
        there = [t for t in tensors if t is not None]
        if not torch.compiler.is_compiling():
            refuse_transforms(*there)
        present = [t is not None for t in tensors]
        return self.forward(there, present, *options, requested_impl(impl))[0]

    def _named(self, tensors: list[Tensor], present: list[bool], options: tuple) -> tuple[Any, Any]:
        """Returns the tensors and the options by name."""
        rest = iter(tensors)
        t = self.parts.tensors(*(next(rest) if there else None for there in present))
        return t, self.parts.options(*options)

    def _forward(self, tensors: list[Tensor], present: list[bool], *rest: Any) -> list[Tensor]:
        t, o = self._named(tensors, present, rest[:-1])
        ops = chosen_ops(rest[-1], tensors[0].device)
        with launch_context(tensors[0]):
            return [made.contiguous() for made in self.parts.forward(ops, t, o)]

    def _fake(self, tensors: list[Tensor], present: list[bool], *rest: Any) -> list[Tensor]:
        return self.parts.fake(*self._named(tensors, present, rest[:-1]))

    def _backward(
        self,
        grad: Tensor,
        tensors: list[Tensor],
        saved: list[Tensor],
        needed: list[bool],
        present: list[bool],
        *rest: Any,
    ) -> list[Tensor]:
        """Returns the gradients of the tensors that need one, in their dtypes."""
        t, o = self._named(tensors, present, rest[:-1])
        ops = chosen_ops(rest[-1], tensors[0].device)
        with launch_context(grad):
            gradients = self.parts.backward(ops, grad, t, o, saved)
            wanted = self._wanted(needed, present)
            return [gradients[n]().to(getattr(t, n).dtype).contiguous() for n in wanted]

    def _wanted(self, needed: list[bool], present: list[bool]) -> list[str]:
        names = [n for n, p in zip(self.parts.tensors._fields, present, strict=True) if p]
        return [n for n, need in zip(names, needed, strict=True) if need]

    def _save(self, ctx, inputs, output) -> None:
        """Saves the tensors that the backward reads; the others may be changed in place or
        freed."""
        tensors, present, *ctx.rest = inputs
        ctx.present = present
        names = [n for n, p in zip(self.parts.tensors._fields, present, strict=True) if p]
        ctx.needed = [t.requires_grad for t in tensors]
        unused = [n in self.parts.unused_in_backward for n in names]
        ctx.unused = [
            (t.shape, t.dtype) if u else None for t, u in zip(tensors, unused, strict=True)
        ]
        used = (None if u else t for t, u in zip(tensors, unused, strict=True))
        ctx.save_for_backward(*used, *(output if self.parts.saves_output else output[1:]))

    def _autograd(self, ctx, grads):
        count, kept, g = len(ctx.needed), ctx.saved_tensors, grads[0]
        tensors = [
            t if like is None else g.new_zeros((), dtype=like[1]).expand(like[0])
            for t, like in zip(kept[:count], ctx.unused, strict=True)
        ]
        saved = list(kept[count:])
        found = iter(self.backward(g, tensors, saved, ctx.needed, ctx.present, *ctx.rest))
        gradients = [next(found) if need else None for need in ctx.needed]
        return gradients, None, *(None for _ in ctx.rest)

    def _forward_flops(self, tensors, present, *rest, out_val=None, **_) -> int:
        return self.parts.flops(*self._named(tensors, present, rest[:-1]), False)

    def _backward_flops(
        self, grad, tensors, saved, needed, present, *rest, out_val=None, **_
    ) -> int:
        return self.parts.flops(*self._named(tensors, present, rest[:-1]), True)
