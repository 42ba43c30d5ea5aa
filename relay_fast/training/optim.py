"""Optimizers: AdamW, AdamW with Muon for the block's matrices, and Adafactor.

Weight decay applies to matrices only (no norms, no embeddings).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from relay_fast.utils.numbers import as_float, as_int

# Coefficients of the quintic Newton-Schulz iteration (Jordan et al. 2024, "Muon").
_A, _B, _C = 3.4445, -4.7750, 2.0315

OPTIMIZERS = ("adamw", "adafactor")
# The first is a lower bound on gradients: it must be tiny, but torch squares it, and 0 would divide
# by 0. The second, from the paper, is the smallest scale of a parameter.
_ADAFACTOR_EPS = (1e-15, 1e-3)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Approximates the nearest (semi-)orthogonal matrices: singular values in about 0.7..1.2.

    Args:
        matrix: (…, rows, columns).
        steps: Newton-Schulz iterations.
    """
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = matrix if wide else matrix.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        inner = torch.add(_B * gram, gram @ gram, alpha=_C)
        x = torch.add(inner @ x, x, alpha=_A)
    return x if wide else x.mT


def orthogonalize_all(updates: Sequence[Tensor], parts: int = 1) -> list[Tensor]:
    """Orthogonalizes many matrices, those of one shape (or its transpose) in one batch.

    On a GPU the products are in bf16, as Jordan et al. do: the iteration needs no more.

    Args:
        updates: matrices of one device and dtype; each stacks `parts` matrices.
        parts: how many.

    Returns:
        For each, its orthogonalized parts times √max(1, rows / columns), contiguous.
    """
    stacks = [u.reshape(parts, -1, u.shape[1]) for u in updates]
    wide = [s if s.shape[1] <= s.shape[2] else s.mT for s in stacks]
    batches: dict[tuple[int, ...], list[int]] = {}
    for i, stack in enumerate(wide):
        batches.setdefault(tuple(stack.shape[1:]), []).append(i)
    changes: list[Tensor] = [None] * len(wide)
    for members in batches.values():
        batch = torch.cat([wide[i] for i in members])
        half = batch.device.type != "cpu" and batch.dtype == torch.float32
        batch = orthogonalize(batch.bfloat16() if half else batch).to(batch.dtype)
        for i, own in zip(members, batch.split(parts), strict=True):
            changes[i] = own if wide[i] is stacks[i] else own.mT
    tall = [max(1.0, s.shape[1] / s.shape[2]) ** 0.5 for s in stacks]
    shaped = [c.reshape(u.shape) for c, u in zip(changes, updates, strict=True)]
    return list(torch._foreach_mul(shaped, tall))


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose parameter groups with `muon=True` take Muon's step (Jordan et al. 2024).

    Muon applies momentum, then orthogonalizes the update of each matrix. A weight that stacks
    `parts` matrices (the rows of qkv) is orthogonalized part by part. A Muon group has `momentum`
    (default 0.95), `parts` (default 1) and AdamW's lr, weight_decay and maximize; it ignores betas,
    eps and amsgrad. Raises ValueError for Muon groups with other parameters than real matrices of
    `parts` parts.
    """

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group.get("muon"):
            try:
                _check_muon(group)
            except ValueError:
                self.param_groups.pop()
                raise

    def __setstate__(self, state: dict) -> None:
        for own in state["state"].values():
            if own:  # old states of matrices lack the step count, which AdamW expects in all
                own.setdefault("step", 0.0)
        super().__setstate__(state)

    def _init_group(self, group: dict, *lists) -> bool:
        """Takes a Muon group's step, and leaves AdamW no tensors of it.

        AdamW's step calls this after the closure to gather a group's tensors.
        """
        if not group.get("muon"):
            return super()._init_group(group, *lists)
        by_kind: dict[tuple, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                by_kind.setdefault((p.device, p.dtype, p.grad.dtype), []).append(p)
        for params in by_kind.values():
            self._muon_step(params, group)
        return False

    def _muon_state(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        if "step" not in state:
            on_device = group["capturable"] or group["fused"]
            device = p.device if on_device else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        return state

    @torch.no_grad()
    def _muon_step(self, params: list[Tensor], group: dict) -> None:
        """Takes a group's step for parameters of one device and dtype, together."""
        grads = [p.grad for p in params]
        if any(grad.is_sparse for grad in grads):
            raise RuntimeError(
                "Muon does not support sparse gradients: use dense ones for its matrices"
            )
        scale, skip = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is not None:  # a GradScaler leaves the unscaling to a fused step
            torch._foreach_div_(grads, scale.to(params[0].device))
        if group["maximize"]:
            grads = torch._foreach_neg(grads)
        states = [self._muon_state(p, group) for p in params]
        momenta, steps = ([state[name] for state in states] for name in ("momentum", "step"))
        held = [*params, *momenta, *steps]
        before = None if skip is None else [value.clone() for value in held]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, momenta, group["momentum"])
        changes = orthogonalize_all(updates, group["parts"])
        lr = group["lr"]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        if isinstance(lr, Tensor):  # under a CUDA graph it cannot be read back
            torch._foreach_mul_(changes, lr)
            torch._foreach_sub_(params, changes)
        else:
            torch._foreach_add_(params, changes, alpha=-lr)
        torch._foreach_add_(steps, 1.0)
        if before is not None:  # `skip` is known on the device only
            for value, old in zip(held, before, strict=True):
                value.copy_(torch.where(skip.to(value.device) > 0, old, value))


def _check_muon(group: dict) -> None:
    # Python's numbers: a saved state with numpy's is refused by torch.load(weights_only=True).
    parts = group["parts"] = as_int("parts", group.get("parts", 1), least=1)
    group["momentum"] = as_float("momentum", group.get("momentum", 0.95))
    if group["differentiable"]:
        raise ValueError("Muon does not support differentiable = True: use AdamW for this group")
    for p in group["params"]:
        if p.ndim != 2 or p.is_complex() or p.shape[0] % parts:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} and {p.dtype} is not a stack of {parts} "
                "real matrices: use AdamW for it, or give other `parts`"
            )


def make_optimizer(
    model: nn.Module,
    *,
    lr: float,
    optimizer: str = "adamw",
    weight_decay: float = 0.01,
    betas: Sequence[float] = (0.9, 0.95),
    muon_lr: float | None = None,
    momentum: float = 0.95,
) -> torch.optim.Optimizer:
    """Makes an optimizer for a model; each group has its learning rate as `base_lr` too.

    Args:
        model: its trainable parameters are optimized.
        lr: learning rate; for "adafactor" relative to each parameter's RMS.
        optimizer: one of OPTIMIZERS; "adafactor" is torch's (Shazeer and Stern 2018).
        weight_decay: of matrices other than embeddings.
        betas: of AdamW.
        muon_lr: learning rate of Muon for the block's linear weights; None for AdamW alone.
        momentum: of Muon.

    Raises:
        ValueError: for an unknown optimizer, Muon beside Adafactor, or numbers out of range.
    """
    check_optimizer(optimizer, muon_lr)
    _check_ranges(lr, muon_lr, weight_decay, betas, momentum)
    lr, weight_decay, betas = float(lr), float(weight_decay), tuple(map(float, betas))
    muon_lr = None if muon_lr is None else float(muon_lr)
    decayed, plain, matrices, qkv = [], [], [], []
    for name, p in model.named_parameters():
        if p.ndim < 2 or "embedding" in name:
            plain.append(p)
        elif muon_lr is None or ".layers." not in f".{name}":
            decayed.append(p)
        else:
            # With fewer key/value heads, q, k and v differ in size: one matrix then.
            even = name.endswith("qkv.weight") and p.shape[0] == 3 * p.shape[1]
            (qkv if even else matrices).append(p)
    muon = {"muon": True, "lr": muon_lr, "momentum": momentum, "weight_decay": weight_decay}
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": matrices, "parts": 1, **muon},
        {"params": qkv, "parts": 3, **muon},
    ]
    groups = [g for g in groups if g["params"]]
    if optimizer == "adafactor":
        made = torch.optim.Adafactor(groups, lr=lr, eps=_ADAFACTOR_EPS, foreach=True)
    else:
        fused = {"fused": True} if next(model.parameters()).is_cuda else {"foreach": True}
        made = MuonAdamW(groups, lr=lr, betas=betas, **fused)
    for group in made.param_groups:
        group["base_lr"] = group["lr"]
    return made


def check_optimizer(optimizer: str, muon_lr: float | None) -> None:
    """Raises ValueError for an unknown optimizer, and for Muon without AdamW."""
    if optimizer not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ValueError(f"optimizer = {optimizer!r} is unknown: use one of {known}")
    if muon_lr is not None and optimizer != "adamw":
        raise ValueError(f"muon_lr = {muon_lr} goes with optimizer = 'adamw': set it to null")


def _check_ranges(
    lr: float, muon_lr: float | None, weight_decay: float, betas: Sequence[float], momentum: float
) -> None:
    """Raises ValueError for numbers with which every training would diverge."""
    for name, value in (("lr", lr), ("muon_lr", muon_lr), ("weight_decay", weight_decay)):
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} = {value}: give a finite number of at least 0")
    for name, value in (("momentum", momentum), *(("betas", beta) for beta in betas)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} = {value}: give at least 0 and less than 1")


def set_lr_scale(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's learning rate to `factor` times its `base_lr`.

    A learning rate that is a tensor is filled in place, for CUDA graphs.
    """
    for group in optimizer.param_groups:
        lr = float(group["base_lr"] * factor)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
