"""The looped block: transformer layers applied several times with shared weights.

Shapes: B sequences, n tokens of a padded batch, N rows of a packed one, d model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from relay_fast.batch.plan import Plan, chosen_states
from relay_fast.config import BlockConfig, tell_hub
from relay_fast.engine.auto_policy import inside_row_bytes
from relay_fast.engine.block_iteration import BlockIteration
from relay_fast.engine.block_weights import BlockWeights, PartTable, read_weights
from relay_fast.engine.compile_op import describe, skip_frame
from relay_fast.engine.loop import run_loop
from relay_fast.engine.parameter_names import parameter_names
from relay_fast.engine.plain_modules import reset_submodules
from relay_fast.engine.recompute import RecomputePolicy
from relay_fast.engine.resumption import Entry, check_max_loops
from relay_fast.engine.spec import LoopSpec, check_truncate
from relay_fast.engine.states import States
from relay_fast.engine.stopping import loops_run, pass_options
from relay_fast.engine.wrappers import gathered, sharding_used, shards
from relay_fast.models.arguments import (
    check_devices,
    flat_positions,
    listed,
    make_plan,
    packed_rows,
    refuse_compiled,
)
from relay_fast.models.from_hf import read_layers
from relay_fast.models.layer import Layer, Norm, ZeroEmbedding
from relay_fast.models.padding import check_masked, forward_padded
from relay_fast.ops.dispatch import (
    check_impl,
    compute_dtype,
    refuse_transforms,
    requested_impl,
    select,
)
from relay_fast.ops.gradients import GATHER_ROWS
from relay_fast.utils.numbers import as_int, is_bool

T = TypeVar("T")
OF_THE_LOOP = ("loop_norm", "injection", "loop_embedding")  # modules beside the layers


class LoopedBlock(nn.Module):
    """A block of transformer layers applied `loops` times with shared weights.

    The weights are read as attributes of the modules inside, once a call, so that whatever computes
    them works: parametrizations, pruning, weight norm, tied layers, `functional_call`, LoRA (peft),
    `fully_shard`. The modules themselves are called only where they are more than their weights
    (a forward or hooks of their own): these then run in torch ops, on packed rows, and again in a
    recomputation.

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
        check_impl(impl)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.n_layers))
        if c.loop_norm != "none":
            self.loop_norm = Norm(c.d_model, c.has_bias("norm"))
        if c.injection == "concat":
            self.injection = nn.Linear(2 * c.d_model, c.d_model, bias=False)
        if c.max_loops:
            self.loop_embedding = ZeroEmbedding(c.max_loops, c.d_model)
        self._describe()

    def _describe(self) -> None:
        """Updates what is derived from the config for torch.compile, `weights` and the Hub."""
        self._spec, self._table = describe(self.config), PartTable.of(parameter_names(self.config))
        tell_hub(self, recompute=self.recompute, gather_rows=self.gather_rows, impl=self.impl)

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as the constructor does."""
        reset_submodules(self)

    @classmethod
    def from_hf(
        cls,
        layers: nn.Module | Sequence[nn.Module],
        rotary: nn.Module | None = None,
        *,
        recompute: str = "state",
        gather_rows: int = GATHER_ROWS,
        impl: str = "auto",
        **options,
    ) -> LoopedBlock:
        """Builds a block from decoder layers of Hugging Face's transformers, with copies of their
        weights, in their dtype and on their device.

        Llama, Mistral, Qwen 2 and 3, GPT-2, Ouro, Helium and GLM layers are known; others are
        refused with the part that a block does not have (`relay_fast.models.from_hf`).

        Args:
            layers: the layers, such as `model.model.layers`, or one of them.
            rotary: the model's rotary embedding, such as `model.model.rotary_emb`, to rotate by its
                own frequencies in fp32; by default they are computed from the config in fp64.
            recompute, gather_rows, impl: as in the constructor.
            **options: causal (default True), dropout, loop_norm, injection, max_loops, state_noise.
        """
        config, weights = read_layers(layers, rotary, **options)
        own = {"recompute": recompute, "gather_rows": gather_rows, "impl": impl}
        like = weights["layers.0.qkv.weight"]
        with torch.device("meta"):
            block = cls(config=config, **own)
        block.to(like.dtype).to_empty(device=like.device)
        block.load_state_dict(weights, strict=False, assign=True)
        for part in (block._modules.get(name) for name in OF_THE_LOOP):
            if part is not None:
                part.reset_parameters()
        return block

    def extra_repr(self) -> str:
        return f"{self.config}, recompute={self.recompute!r}, impl={self.impl!r}"

    def set_layers(self, layers: Sequence[nn.Module]) -> None:
        """Replaces the layers by others of the same sizes; updates `config.n_layers`."""
        self.layers = nn.ModuleList(layers)
        self.config = replace(self.config, n_layers=len(self.layers))
        self._describe()

    def weights(self) -> BlockWeights:
        """Reads the weights of one pass from the modules.

        Raises RuntimeError if the parts do not fit the config.
        """
        return read_weights(self, self._table)

    @skip_frame
    def __call__(self, *args, **options):
        """Calls `forward`, with lists turned into tensors.

        torch.compile would compile again for every length of a list.
        """
        for name in ("loops", "cu_seqlens"):
            if name in options:
                options[name] = listed(options[name])
        return super().__call__(*map(listed, args), **options)

    # Long: the signature and its description are most of it.
    def forward(
        self,
        x: Tensor,
        loops: int | Sequence[int] | Tensor = 1,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        inject: Tensor | None = None,
        start: int = 0,
        seed: int | Tensor | None = None,
        until: Callable[..., Tensor] | None = None,
        return_states: bool | Sequence[int] = False,
        return_loops: bool = False,
        truncate: int | Sequence[int] | Tensor | None = None,
    ) -> Tensor | States | tuple[Tensor | States, Tensor]:
        """Applies the block `loops` times.

        Args:
            x: (B, n, d) padded or, with `cu_seqlens`, (N, d) packed.
            loops: an int, or one count per sequence, (B,), each 0 or more; with `until`, the
                largest number.
            cu_seqlens: (B + 1,) offsets of the packed sequences.
            attention_mask: (B, n), 1 or True for tokens and 0 or False for padding, on the left,
                on the right, or both. The tokens are packed, and computed as each sequence alone;
                padding is 0 in what is returned. The host waits for the mask.
            positions: (N,), (B, n) or (n,) int, default 0..n − 1, from a sequence's first token.
            inject: what injection adds or joins in each iteration, shaped as x; default: x.
            start: number of iterations that x has been through, for the loop-index embedding and
                the random numbers: block(block(x, s), t, inject=x, start=s) is block(x, s + t),
                in training with the same `seed`.
            seed: of the dropout masks and the state noise; default: drawn from torch's generator.
            until: (t, state t, state t − 1) → (active sequences,) bool: which of them stop. It sees
                the sequences that still loop in the caller's order, as (active, n, d), or as packed
                rows with `cu_seqlens` or a mask; with arguments `cu_seqlens` or `sequences` it also
                gets their row offsets or their indices. The host waits for its answer, once an
                iteration. See `relay_fast.engine.criteria`.
            return_states: True for the states of all iterations 1..T, or the iterations to return.
            return_loops: also return how many iterations each sequence ran, (B,) int64.
            truncate: number of last iterations of each sequence that get gradients, an int or one
                per sequence, each 0 or more; default: all.

        Returns:
            The states after each sequence's last iteration, in the shape of x. With
            `return_states`, a list with the states of each iteration, which hold the sequences
            that are still looping then, in the caller's order; `list.sequences` has their indices.
            With `return_loops`, a tuple of that and the loops.

        Raises:
            ValueError, TypeError: for arguments that do not fit together.
            RuntimeError: under torch.compile, for until and return_loops.
        """
        options = {"inject": inject, "start": start, "seed": seed, "until": until,
                   "return_loops": return_loops}  # fmt: skip
        if torch.compiler.is_compiling():
            refuse_compiled(until=until, return_loops=return_loops)
            return_states = bool(return_states) if is_bool(return_states) else return_states
            return self._as_op(
                x,
                loops,
                cu_seqlens,
                attention_mask,
                positions,
                inject,
                start,
                seed,
                return_states,
                truncate,
            )
        if attention_mask is not None:
            return forward_padded(
                self.forward,
                x,
                attention_mask,
                loops=loops,
                cu_seqlens=cu_seqlens,
                positions=positions,
                return_states=return_states,
                truncate=truncate,
                **options,
            )
        packed, shape = packed_rows(x, cu_seqlens, self.config.d_model)
        return_states = bool(return_states) if is_bool(return_states) else return_states
        refuse_transforms(x, module=self)
        plan = make_plan(x, loops, cu_seqlens, positions, stops=until is not None)
        wanted = plan.chosen_states(return_states)
        entry = Entry.of(self.config, x, inject, start, seed)
        if plan.to_sorted is not None:
            packed, entry = packed[plan.to_sorted], entry.sorted(plan)
        is_packed = len(shape) == 2
        view = (lambda h, _: h) if is_packed else lambda h, n: h.view(n, *shape[1:])
        passes = pass_options(until, plan, wanted, view, is_packed, entry.start)

        def pass_(packed: Tensor) -> tuple[LoopSpec, tuple[Tensor, ...]]:
            weights = self.weights()
            run = entry.enter(self.run(plan, weights, truncate=truncate, **passes), self.config)
            return run, run_loop(run, packed, [*weights.tensors, *entry.parameters])

        run, (final, states, _, _) = self.gathered(packed, pass_)
        if return_states is False:
            final = final if plan.to_caller is None else final[plan.to_caller]
            if sharding_used():  # its hook on a view would be lost if that is changed in place
                result = torch.ops.aten._unsafe_view(final, shape)
            else:
                result = final.view(shape)
        else:
            result = run.collect(wanted, final, states).map(lambda h, ids: view(h, len(ids)))
            if until is not None and return_states is True:
                result = result.first(plan.max_loops)
        return (result, loops_run(plan)) if return_loops else result

    def _called_forward(
        self, x, loops, cu_seqlens, mask, positions, inject, start, seed, return_states, truncate
    ) -> Tensor | list[Tensor]:
        """`forward` with positional arguments."""
        return self.forward(
            x,
            loops,
            cu_seqlens=cu_seqlens,
            attention_mask=mask,
            positions=positions,
            inject=inject,
            start=start,
            seed=seed,
            return_states=return_states,
            truncate=truncate,
        )

    def _as_op(
        self, x, loops, cu_seqlens, mask, positions, inject, start, seed, return_states, truncate
    ) -> Tensor | list[Tensor]:
        """Runs the forward under torch.compile as one op (`relay_fast.engine.compile_op`).

        States are returned for an int `loops` only; otherwise their sizes depend on data.
        """
        if mask is not None:
            check_masked(x, cu_seqlens)
        packed, shape = packed_rows(x, cu_seqlens, self.config.d_model)
        count = loops if isinstance(loops, int) else 0
        tensor = lambda t: (
            t if t is None or isinstance(t, Tensor) else torch.tensor(t, device="cpu")
        )
        if return_states is not False and not isinstance(loops, int):
            raise ValueError("under torch.compile, return_states needs loops to be an int")
        wanted = list(chosen_states(return_states, count))
        last = check_truncate(truncate)
        last = 0 if last is None else last or -1  # as the op counts
        weights = self.weights()
        if weights.called:  # an op cannot call modules
            from relay_fast.ops.eager import eager

            given = (cu_seqlens, mask, positions, inject, start, seed, return_states, truncate)
            return eager(self._called_forward, x, loops, *given)
        entry = Entry.of(self.config, x, inject, start, seed)
        seed = None
        if self.training and (self.config.dropout or self.config.state_noise):
            seed = torch.randint(2**31, (), device=x.device) if entry.seed is None else entry.seed
        final, states, _ = torch.ops.relay_fast.loop_fwd(
            packed,
            [*weights.tensors, *entry.parameters],
            *self._spec,
            self.recompute,
            requested_impl(self.impl),
            self.gather_rows,
            compute_dtype(weights.of_gemms),
            0 if cu_seqlens is not None else shape[0],
            tensor(cu_seqlens),
            count,
            None if isinstance(loops, int) else tensor(loops),
            flat_positions(positions, shape),
            tensor(mask),
            entry.start,
            inject is not None,
            seed,
            wanted,
            last,
            torch.is_grad_enabled(),
        )
        if return_states is False:
            return final.view(shape)
        return [s.view(shape) for s in states.split(len(packed))] if wanted else []

    def run(self, plan: Plan, weights: BlockWeights | None = None, **options) -> LoopSpec:
        """Describes a pass of this block over a plan for the engine.

        Args:
            plan: the batch's sequences and loop counts.
            weights: what `weights()` returned; the engine gets their tensors as parameters.
                Default: read now, in the order of `parameters()` for plain parts.
            **options: further fields of `relay_fast.engine.spec.LoopSpec`.
        """
        weights = self.weights() if weights is None else weights
        check_max_loops(self.config, plan)
        check_devices(plan.device, weights)
        weight = weights.of_gemms
        dtype = compute_dtype(weight)
        ops = select(self.impl, weight.device)
        seed = None
        if self.training and (self.config.dropout or self.config.state_noise):
            seed = torch.randint(2**31, (), device=weight.device)
        policy = RecomputePolicy.parse(self.recompute)
        inside_bytes = lambda x: inside_row_bytes(self.config, x.dtype, dtype)
        if weights.called:
            inside_bytes = None  # the graph of a called part is not known
            from relay_fast.engine.called_parts import iterations_with_calls

            policy, make_iteration = iterations_with_calls(
                self.config, weights, plan, policy, ops, dtype, seed
            )
        else:

            def make_iteration(x: Tensor, parameters: Sequence[Tensor | None]) -> BlockIteration:
                named = dict(zip(weights.names, parameters, strict=False))
                return BlockIteration(self.config, named, plan, x, ops, dtype, seed)

        return LoopSpec(
            plan,
            make_iteration,
            ops,
            policy,
            gather_rows=self.gather_rows,
            compute_dtype=dtype,
            inside_bytes=inside_bytes,
            **options,
        )

    def gathered(
        self,
        x: Tensor,
        compute: Callable[[Tensor], T],
        called: bool = True,
        beside: Sequence[nn.Module | None] = (),
    ) -> T:
        """Returns compute(x), computed while what `fully_shard` sharded holds whole weights.

        Args:
            x: the first state.
            compute: reads the block's weights and runs the loop.
            called: whether the block itself was called, and so is gathered already.
            beside: other modules whose weights `compute` reads.
        """
        if not sharding_used():
            return compute(x)
        through = [*(() if called else (self,)), *self.layers]
        parts = [m for root in (self, *beside) if root is not None for m in root.modules()]
        others = [m for m in parts if m is not self and m not in through]
        return gathered(x, compute, shards(through), shards(others))
