"""The looped block: transformer layers applied several times with shared weights.

Shapes: B sequences, n tokens of a padded batch, N rows of a packed one, d model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from relay_fast.batch.plan import Plan, check_cu_seqlens, check_floating, check_loops, chosen_states
from relay_fast.batch.plan_cache import cached_plan
from relay_fast.config import BlockConfig, tell_hub
from relay_fast.engine.block_iteration import BlockIteration, check_max_loops, parameter_names
from relay_fast.engine.compile_op import describe, skip_frame
from relay_fast.engine.loop import run_loop
from relay_fast.engine.plain_modules import check_submodules, reset_submodules
from relay_fast.engine.recompute import RecomputePolicy
from relay_fast.engine.spec import LoopSpec, check_truncate
from relay_fast.engine.wrappers import refuse_flattened, refuse_wrapped
from relay_fast.ops.dispatch import compute_dtype, refuse_transforms, select
from relay_fast.ops.gradients import GATHER_ROWS
from relay_fast.utils.numbers import as_int, is_bool


class Norm(nn.Module):
    """Holds the weight of a norm, and the bias of a LayerNorm; the ops apply it."""

    def __init__(self, d: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.bias = nn.Parameter(torch.empty(d)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ResidualLinear(nn.Linear):
    """The last linear of a residual branch; `std`, where set, scales the initial weight."""

    std: float | None = None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.std is not None:
            nn.init.normal_(self.weight, std=self.std)


class ZeroEmbedding(nn.Embedding):
    """An embedding that starts at zero, and so has no effect before training."""

    def reset_parameters(self) -> None:
        super().reset_parameters()  # keeps the random stream, so that seeds give the same models
        nn.init.zeros_(self.weight)


class Layer(nn.Module):
    """Holds the parameters of one pre-norm layer; the rows of qkv are [q; k; v]."""

    def __init__(self, c: BlockConfig):
        super().__init__()
        norm_bias = c.bias and c.norm == "layer"
        self.norm1 = Norm(c.d_model, norm_bias)
        self.qkv = nn.Linear(c.d_model, (c.n_heads + 2 * c.kv_heads) * c.head_dim, bias=c.bias)
        self.out = ResidualLinear(c.d_model, c.d_model, bias=c.bias)
        self.norm2 = Norm(c.d_model, norm_bias)
        self.up = nn.Linear(c.d_model, c.hidden, bias=c.bias)
        if c.activation == "swiglu":
            self.gate = nn.Linear(c.d_model, c.hidden, bias=c.bias)
        self.down = ResidualLinear(c.hidden, c.d_model, bias=c.bias)
        for linear in (self.out, self.down):  # residual branches start small
            linear.std = (2 * c.n_layers * linear.in_features) ** -0.5
            nn.init.normal_(linear.weight, std=linear.std)

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as the constructor does."""
        reset_submodules(self)


class LoopedBlock(nn.Module):
    """A block of transformer layers applied `loops` times with shared weights.

    The parameters are read by name; the modules inside are not called. Submodules whose forward,
    hooks, parametrization or pruning would thus be ignored are refused. Hooks on the block work.

    Args:
        d_model, n_heads, n_layers: sizes, as in `BlockConfig`.
        config: a BlockConfig, or the dict of its `to_dict`, in place of sizes and `options`.
        recompute: recompute policy (`relay_fast.engine.recompute`).
        gather_rows: iterations with fewer rows are gathered for their weight-gradient GEMMs.
        impl: "auto", "triton" or "torch".
        **options: further fields of `BlockConfig` (causal, norm, activation, dropout, …).
    """

    def __init__(
        self,
        d_model: int | None = None,
        n_heads: int | None = None,
        n_layers: int | None = None,
        *,
        config: BlockConfig | None = None,
        recompute: str = "state",
        gather_rows: int = GATHER_ROWS,
        impl: str = "auto",
        **options,
    ):
        super().__init__()
        sizes = {"d_model": d_model, "n_heads": n_heads, "n_layers": n_layers}
        given = [*(k for k, v in sizes.items() if v is not None), *options]
        if config is None:
            config = BlockConfig(**sizes, **options)
        elif given:
            raise ValueError(f"config and {', '.join(given)} are both given: put all into config")
        c = self.config = BlockConfig.of(config)
        gather_rows = as_int("gather_rows", gather_rows, least=0)
        self.recompute, self.gather_rows, self.impl = recompute, gather_rows, impl
        RecomputePolicy.parse(recompute)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.n_layers))
        if c.loop_norm != "none":
            self.loop_norm = Norm(c.d_model, c.bias and c.norm == "layer")
        if c.injection == "concat":
            self.injection = nn.Linear(2 * c.d_model, c.d_model, bias=False)
        if c.max_loops:
            self.loop_embedding = ZeroEmbedding(c.max_loops, c.d_model)
        self._describe()

    def _describe(self) -> None:
        """Updates what is derived from the config for torch.compile, `_named` and the Hub."""
        self._spec, self._names = describe(self.config), parameter_names(self.config)
        tell_hub(self, recompute=self.recompute, gather_rows=self.gather_rows, impl=self.impl)

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as the constructor does."""
        reset_submodules(self)

    def extra_repr(self) -> str:
        return f"{self.config}, recompute={self.recompute!r}, impl={self.impl!r}"

    def set_layers(self, layers: Sequence[nn.Module]) -> None:
        """Replaces the layers by others of the same sizes; updates `config.n_layers`."""
        self.layers = nn.ModuleList(layers)
        self.config = replace(self.config, n_layers=len(self.layers))
        self._describe()

    def _named(self) -> dict[str, Tensor]:
        """Returns the parameters by name.

        Raises RuntimeError if they do not fit the config, or a submodule is not plain.
        """
        named = dict(self.named_parameters())
        known = named.keys() == set(self._names)
        if not (known and all(type(p) is nn.Parameter for p in named.values())):
            refuse_wrapped(self)
        if not known:
            refuse_flattened(self)
            missing = sorted(set(self._names).difference(named))
            others = sorted(set(named).difference(self._names))
            raise RuntimeError(
                f"the block's parameters are not those of its config (missing: {missing}, unknown: "
                f"{others}): it reads them by name, so parametrized, pruned, tied or exchanged "
                "parts have to be made plain first (torch.nn.utils.parametrize."
                "remove_parametrizations, torch.nn.utils.prune.remove)"
            )
        check_submodules(self, "block")
        return named

    @skip_frame
    def __call__(self, *args, **options):
        """Calls `forward`, with lists turned into tensors.

        torch.compile would compile again for every length of a list.
        """
        for name in ("loops", "cu_seqlens"):
            if name in options:
                options[name] = _listed(options[name])
        return super().__call__(*map(_listed, args), **options)

    def forward(
        self,
        x: Tensor,
        loops: int | Sequence[int] | Tensor = 1,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        positions: Tensor | None = None,
        return_states: bool | Sequence[int] = False,
        truncate: int | None = None,
    ) -> Tensor | list[Tensor]:
        """Applies the block `loops` times.

        Args:
            x: (B, n, d) padded or, with `cu_seqlens`, (N, d) packed.
            loops: an int, or one count per sequence, (B,), each 0 or more.
            cu_seqlens: (B + 1,) offsets of the packed sequences.
            positions: (N,), (B, n) or (n,) int, default 0..n − 1.
            return_states: True for the states of all iterations 1..T, or the iterations to return.
            truncate: number of last iterations of each sequence that get gradients, default all.

        Returns:
            The states after each sequence's last iteration, in the shape of x. With
            `return_states`, a list with the states of each iteration, which hold the sequences
            that are still looping then, in the caller's order.
        """
        packed, shape = self._pack(x, cu_seqlens)
        return_states = bool(return_states) if is_bool(return_states) else return_states
        if torch.compiler.is_compiling():
            return self._as_op(packed, shape, loops, cu_seqlens, positions, return_states, truncate)
        refuse_transforms(x, module=self)
        plan = self._plan(x, loops, cu_seqlens, positions)
        wanted = plan.chosen_states(return_states)
        if plan.to_sorted is not None:
            packed = packed[plan.to_sorted]
        inner = tuple(t for t in wanted if t < plan.max_loops)
        named = self._named()
        run = self._run(plan, named, states=inner, truncate=truncate)
        final, states, _, _ = run_loop(run, packed, list(named.values()))
        if return_states is False:
            final = final if plan.to_caller is None else final[plan.to_caller]
            return final.view(shape)
        result = run.collect(wanted, final, states)
        return result if len(shape) == 2 else [state.view(-1, *shape[1:]) for state in result]

    def _as_op(
        self, x: Tensor, shape: torch.Size, loops, cu_seqlens, positions, return_states, truncate
    ) -> Tensor | list[Tensor]:
        """Runs the forward under torch.compile as one op (`relay_fast.engine.compile_op`).

        States are returned for an int `loops` only; otherwise their sizes depend on data.
        """
        count = loops if isinstance(loops, int) else 0
        tensor = lambda t: (
            t if t is None or isinstance(t, Tensor) else torch.tensor(t, device="cpu")
        )
        if return_states is not False and not isinstance(loops, int):
            raise ValueError("under torch.compile, return_states needs loops to be an int")
        wanted = list(chosen_states(return_states, count))
        truncate = check_truncate(truncate)
        named = self._named()
        seed = None
        if self.training and (self.config.dropout or self.config.state_noise):
            seed = torch.randint(2**31, (), device=x.device)
        final, states, _ = torch.ops.relay_fast.loop_fwd(
            x, [named[name] for name in self._names], self._spec,
            f'["{self.recompute}", "{self.impl}", {self.gather_rows}]',
            compute_dtype(self.layers[0].qkv.weight), 0 if cu_seqlens is not None else shape[0],
            tensor(cu_seqlens), count, None if isinstance(loops, int) else tensor(loops),
            _flat_positions(positions, shape), seed, wanted, truncate or 0, torch.is_grad_enabled(),
        )  # fmt: skip
        if return_states is False:
            return final.view(shape)
        return [s.view(shape) for s in states.split(x.shape[0])] if wanted else []

    def run(self, plan: Plan, **options) -> LoopSpec:
        """Describes a pass of this block over a plan for the engine.

        Args:
            plan: the batch's sequences and loop counts.
            **options: further fields of `relay_fast.engine.spec.LoopSpec`.
        """
        return self._run(plan, self._named(), **options)

    def _run(self, plan: Plan, named: dict[str, Tensor], **options) -> LoopSpec:
        """As `run`, with the parameters by name: collecting them costs as much as a small op."""
        check_max_loops(self.config, plan)
        _check_devices(plan.device, named)
        names = list(named)
        weight = self.layers[0].qkv.weight
        dtype = compute_dtype(weight)
        ops = select(self.impl, weight.device)
        seed = None
        if self.training and (self.config.dropout or self.config.state_noise):
            seed = torch.randint(2**31, (), device=weight.device)

        def make_iteration(x: Tensor, parameters: Sequence[Tensor | None]) -> BlockIteration:
            named = dict(zip(names, parameters, strict=False))
            return BlockIteration(self.config, named, plan, x, ops, dtype, seed)

        return LoopSpec(
            plan,
            make_iteration,
            ops,
            RecomputePolicy.parse(self.recompute),
            gather_rows=self.gather_rows,
            compute_dtype=dtype,
            **options,
        )

    def _pack(self, x: Tensor, cu_seqlens) -> tuple[Tensor, torch.Size]:
        d = self.config.d_model
        if x.shape[-1] != d or x.ndim != (3 if cu_seqlens is None else 2):
            raise ValueError(
                f"x has shape {tuple(x.shape)}: pass (B, n, {d}), or (tokens, {d}) together with "
                f"cu_seqlens"
            )
        check_floating(x)
        return x.reshape(-1, d), x.shape

    def _plan(self, x: Tensor, loops, cu_seqlens, positions) -> Plan:
        if cu_seqlens is None:
            lengths = np.full(x.shape[0], x.shape[1])
        else:
            lengths = np.diff(check_cu_seqlens(cu_seqlens, x.shape[0]))
        flat = _flat_positions(positions, x.shape)
        if flat is not None:
            flat = flat.cpu().numpy()
        return cached_plan(lengths, check_loops(loops, len(lengths)), x.device, flat)


def _check_devices(device: torch.device, named: dict[str, Tensor]) -> None:
    """Raises ValueError if a parameter is on another device than the rows."""
    for name, p in named.items():
        if p.device.type != device.type or device.index not in (None, p.device.index):
            raise ValueError(
                f"x is on {device} and the parameter {name} on {p.device}: move them to one device"
            )


@skip_frame
def _listed(values):
    """Returns a list of ints as a tensor on the CPU; anything else as it is."""
    if isinstance(values, list | tuple) and set(map(type, values)) == {int}:
        return torch.tensor(values, dtype=torch.int64, device="cpu")
    return values


def _flat_positions(positions: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Returns the positions (N,) of all rows of an x of `shape`."""
    if positions is None:
        return None
    positions = torch.as_tensor(positions)
    if positions.is_floating_point():
        raise TypeError(f"positions must be integers, got {positions.dtype}")
    if positions.shape not in (shape[:-1], shape[-2:-1]):
        raise ValueError(
            f"positions has shape {tuple(positions.shape)} but x has {tuple(shape)}: pass "
            f"{tuple(shape[:-1])} or {tuple(shape[-2:-1])}"
        )
    return positions.expand(shape[:-1]).reshape(-1)
