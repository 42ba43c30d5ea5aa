"""nn.Modules: the drop-in looped block and the two models of RELAY made from it.

Shapes: B sequences, n tokens of a padded batch, N rows of a packed one, d model width, V
vocabulary,
R rows that carry a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from relay_fast._numbers import is_truth, whole
from relay_fast.batch import PackedBatch
from relay_fast.block import BlockBody, check_max_loops, parameter_names
from relay_fast.compiled import describe, skip_frame
from relay_fast.config import BlockConfig, ModelConfig, tell_hub
from relay_fast.dispatch import refuse_transforms
from relay_fast.engine import Readout, Run, check_truncate, iterate, run_loop
from relay_fast.functional import compute_dtype, row_cross_entropy, select, weighted_losses
from relay_fast.gradients import GATHER_ROWS
from relay_fast.kernels.dropout_ref import Dropout, dropout_mask_ref
from relay_fast.plain import check_inside, check_parts, check_pass, reset_inside
from relay_fast.plan import Plan, check_cu_seqlens, check_floating, check_loops, chosen_states
from relay_fast.policy import Policy
from relay_fast.tasks.vocabulary import PAD
from relay_fast.whole_loop import feedback_reason, read_whole_loop
from relay_fast.wrappers import refuse_flattened, refuse_wrapped


class Norm(nn.Module):
    """Weight (and for LayerNorm with biases, bias) of a norm; the ops apply it."""

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
    """The last linear of a residual branch: its weight is drawn with `std` where that is set."""

    std: float | None = None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.std is not None:
            nn.init.normal_(self.weight, std=self.std)


class ZeroEmbedding(nn.Embedding):
    """An embedding that starts at zero: it changes nothing until it is trained."""

    def reset_parameters(self) -> None:
        super().reset_parameters()  # its draw stays, for seeds to give the models they always gave
        nn.init.zeros_(self.weight)


class Layer(nn.Module):
    """Parameters of one pre-norm layer; qkv rows are [q; k; v]."""

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
        reset_inside(self)


class LoopedBlock(nn.Module):
    """A block of transformer layers applied `loops` times with shared weights: a drop-in module.

    Constructor arguments are those of `BlockConfig` (d_model, n_heads, n_layers, causal, norm,
    activation, dropout, injection, loop_norm, …), or one as `config` (or what its `to_dict` gave),
    not both. `recompute` is the
    policy of `relay_fast.policy`; `impl` is "auto", "triton" or "torch". The parameters are read by
    name and the modules inside are not called: those that would do more than their weights say
    (a forward of their own, hooks, parametrized, pruned) are refused. Hooks on the block work.
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
        gather_rows = whole("gather_rows", gather_rows, least=0)
        self.recompute, self.gather_rows, self.impl = recompute, gather_rows, impl
        Policy.parse(recompute)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.n_layers))
        if c.loop_norm != "none":
            self.loop_norm = Norm(c.d_model, c.bias and c.norm == "layer")
        if c.injection == "concat":
            self.injection = nn.Linear(2 * c.d_model, c.d_model, bias=False)
        if c.max_loops:
            self.loop_embedding = ZeroEmbedding(c.max_loops, c.d_model)
        self._describe()

    def _describe(self) -> None:
        """What follows from the config: for torch.compile, for `_named` and for the Hub."""
        self._spec, self._names = describe(self.config), parameter_names(self.config)
        tell_hub(self, recompute=self.recompute, gather_rows=self.gather_rows, impl=self.impl)

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as the constructor does."""
        reset_inside(self)

    def extra_repr(self) -> str:
        return f"{self.config}, recompute={self.recompute!r}, impl={self.impl!r}"

    def set_layers(self, layers: Sequence[nn.Module]) -> None:
        """Exchanges the layers for others of the same sizes; `config.n_layers` follows."""
        self.layers = nn.ModuleList(layers)
        self.config = replace(self.config, n_layers=len(self.layers))
        self._describe()

    def _named(self) -> dict[str, Tensor]:
        """The parameters by name. Raises RuntimeError where they are not those of the config, and
        for modules inside that would do more than their weights say."""
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
        check_inside(self, "block")
        return named

    @skip_frame
    def __call__(self, *args, **options):
        """See `forward`. Lists become tensors before torch.compile sees them: it would compile
        again for every length of a list."""
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
        """States after the last iteration of each sequence, in the caller's order.

        x: (B, n, d) padded or, with `cu_seqlens` (B + 1,), (N, d) packed. loops: an int, or one
        count per sequence (≥ 0). positions: (N,), (B, n) or (n,) int, default 0..n−1. truncate:
        gradient through each sequence's last `truncate` iterations only. Returns a tensor of x's
        shape; with return_states=True, a list of the states of iterations 1..T (or of the
        iterations given), each holding the sequences still looping then, in the caller's order.
        """
        packed, shape = self._pack(x, cu_seqlens)
        return_states = bool(return_states) if is_truth(return_states) else return_states
        if torch.compiler.is_compiling():
            return self._as_op(packed, shape, loops, cu_seqlens, positions, return_states, truncate)
        refuse_transforms(x, module=self)
        plan = self._plan(x, loops, cu_seqlens, positions)
        wanted = plan.chosen_states(return_states)
        if plan.to_sorted is not None:
            packed = packed[plan.to_sorted]
        inner = tuple(t for t in wanted if t < plan.max_loops)
        run = self.run(plan, states=inner, truncate=truncate)
        final, states, _, _ = run_loop(run, packed, list(self.parameters()))
        if return_states is False:
            final = final if plan.to_caller is None else final[plan.to_caller]
            return final.view(shape)
        result = run.collect(wanted, final, states)
        return result if len(shape) == 2 else [state.view(-1, *shape[1:]) for state in result]

    def _as_op(
        self, x: Tensor, shape: torch.Size, loops, cu_seqlens, positions, return_states, truncate
    ) -> Tensor | list[Tensor]:
        """The forward under torch.compile: one custom op (see `relay_fast.compiled`).

        States are returned where `loops` is an int; otherwise their sizes depend on data.
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

    def run(self, plan: Plan, **options) -> Run:
        """The engine's description of a pass of this block over a plan (see
        `relay_fast.engine.Run`)."""
        check_max_loops(self.config, plan)
        named = self._named()
        _check_devices(plan.device, named)
        names = list(named)
        weight = self.layers[0].qkv.weight
        dtype = compute_dtype(weight)
        ops = select(self.impl, weight.device)
        seed = None
        if self.training and (self.config.dropout or self.config.state_noise):
            seed = torch.randint(2**31, (), device=weight.device)

        def make_body(x: Tensor, parameters: Sequence[Tensor | None]) -> BlockBody:
            named = dict(zip(names, parameters, strict=False))
            return BlockBody(self.config, named, plan, x, ops, dtype, seed)

        return Run(
            plan, make_body, ops, Policy.parse(self.recompute), gather_rows=self.gather_rows,
            compute_dtype=dtype, **options,
        )  # fmt: skip

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
        return Plan(lengths, check_loops(loops, len(lengths)), x.device, flat)


def _check_devices(device: torch.device, named: dict[str, Tensor]) -> None:
    """Raises ValueError where a parameter lies elsewhere than the rows."""
    for name, p in named.items():
        if p.device.type != device.type or device.index not in (None, p.device.index):
            raise ValueError(
                f"x is on {device} and the parameter {name} on {p.device}: move them to one device"
            )


@skip_frame
def _listed(values):
    """A list of ints as a tensor on the host; anything else as it is."""
    if isinstance(values, list | tuple) and set(map(type, values)) == {int}:
        return torch.tensor(values, dtype=torch.int64, device="cpu")
    return values


def _flat_positions(positions: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Positions (N,) of all rows of an x of `shape`, from one for each row or each of n tokens."""
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


class Losses(NamedTuple):
    """A step's losses and counts, all on the device (nothing is read back)."""

    loss: Tensor  # () total
    chain: Tensor  # () weighted chain loss
    answer: Tensor  # () weighted answer loss
    chain_correct: Tensor  # () share of supervised rows read out right
    answer_correct: Tensor  # () share of answers right


class _Transformer(nn.Module):
    """Embedding, block, final norm and chain head: what both models share."""

    def __init__(self, config: ModelConfig, recompute: str, impl: str):
        super().__init__()
        c = self.config = ModelConfig.of(config)
        self.embedding = nn.Embedding(c.vocabulary_size, c.block.d_model)
        nn.init.normal_(self.embedding.weight, std=1.0)
        self.block = LoopedBlock(config=c.block, recompute=recompute, impl=impl)
        self.norm = Norm(c.block.d_model, c.block.bias and c.block.norm == "layer")
        self.chain_head = nn.Linear(c.block.d_model, c.vocabulary_size, bias=False)
        tell_hub(self, recompute=recompute, impl=impl)

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as the constructor does."""
        reset_inside(self)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def forward(self, batch: PackedBatch) -> Losses:
        """`loss`, as what wraps a module (DistributedDataParallel, torch.compile) calls it. Under
        torch.compile it is a graph break."""
        if torch.compiler.is_compiling():
            from relay_fast._eager import eager

            return eager(self.loss, batch)
        return self.loss(batch)

    def loss(self, batch: PackedBatch) -> Losses:
        raise NotImplementedError

    def embed(self, batch: PackedBatch) -> Tensor:
        """(N, d) embeddings of the batch's tokens, with dropout in training."""
        self._check(batch)
        x = self._embed_tokens(batch)
        p = self.config.block.dropout
        if self.training and p:
            seed = torch.randint(2**31, (), device=x.device)
            x = x * dropout_mask_ref(Dropout(p, seed, 0, 0, batch.plan.tokens), x.shape[1], x.dtype)
        return x

    def _embed_tokens(self, batch: PackedBatch) -> Tensor:
        return self.embedding(batch.tokens)

    def _check(self, batch: PackedBatch) -> None:
        fed = batch.fed is not None or batch.true_feed is not None
        if fed and self.config.feedback == "none":
            raise ValueError(
                "the batch has rounds that are fed back, the model takes none: use "
                'ModelConfig(feedback="tokens") or PackedBatch.looped'
            )
        if batch.max_token >= self.config.vocabulary_size:
            raise ValueError(
                f"token {batch.max_token} is outside the model's vocabulary of "
                f"{self.config.vocabulary_size}: encode with the vocabulary the model was made with"
            )
        longest = int(batch.plan.lengths.max(initial=0))
        if longest > self.config.max_tokens:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than the model's limit of "
                f"{self.config.max_tokens}: shorten the problem or build the model with larger "
                f"max_tokens"
            )

    def check_parts(self) -> None:
        """Raises RuntimeError, naming it, for a part whose weights are read and that would do more
        than they say (a forward of its own, hooks)."""
        check_parts(self, block=LoopedBlock, norm=Norm, chain_head=nn.Linear)

    def _readout_parameters(self) -> list[Tensor | None]:
        return [self.norm.weight, self.norm.bias, self.chain_head.weight]

    def _pass(self, batch: PackedBatch, supervised: bool) -> tuple[Tensor, Tensor, Tensor]:
        """final (N, d), row losses (R,) and correct (R,)."""
        self.check_parts()
        c = self.config.block
        readout = None
        if supervised and batch.targets.numel():
            readout = Readout(batch.rows, batch.targets, batch.row_offsets, c.eps, c.norm)
        run = self.block.run(batch.plan, readout=readout)
        parameters = list(self.block.parameters())
        if readout is not None:
            parameters += self._readout_parameters()
        final, _, loss, correct = run_loop(run, self.embed(batch), parameters)
        return final, loss, correct


class LoopedTransformer(_Transformer):
    """The looped model: embedding, block, chain head on every state, answer head on the last.

    `supervise="chain"` aligns every iteration with a round; `"answer"` is the vanilla looped model.
    With feedback (`ModelConfig.feedback`) it trains on `PackedBatch.side_by_side`, or, with the
    state carried too, on `PackedBatch.carried`; and reads `PackedBatch.looped(..., feedback=True)`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        supervise: str = "chain",
        recompute: str = "state",
        impl: str = "auto",
    ):
        super().__init__(config, recompute, impl)
        config = self.config
        if supervise not in ("chain", "answer"):
            raise ValueError(f'supervise = {supervise!r} is unknown: use "chain" or "answer"')
        self.supervise = supervise
        tell_hub(self, supervise=supervise, recompute=recompute, impl=impl)
        self.answer_head = nn.Linear(config.block.d_model, config.vocabulary_size, bias=False)
        if config.feedback != "none":
            if supervise == "answer":
                raise ValueError(
                    'a model that learns answers only (supervise = "answer") writes no rounds that '
                    'could be fed back: use feedback = "none"'
                )
            self.fed_embedding = nn.Embedding(config.vocabulary_size, config.block.d_model)

    def _embed_tokens(self, batch: PackedBatch) -> Tensor:
        x = super()._embed_tokens(batch)
        if batch.fed is None:
            return x
        return x + self._embed_fed(batch.fed)

    def _embed_fed(self, fed: Tensor) -> Tensor:
        """(N, d) embeddings of what is fed, with noise in training."""
        p = self.config.feedback_noise
        if self.training and p and len(fed):
            wrong = torch.rand(fed.shape, device=fed.device) < p
            others = fed[torch.randint(len(fed), fed.shape, device=fed.device)]
            fed = torch.where(wrong & (fed != PAD), others, fed)
        return self.fed_embedding(fed)

    def _pass(self, batch: PackedBatch, supervised: bool) -> tuple[Tensor, Tensor, Tensor]:
        if not self.config.carry_state:
            return super()._pass(batch, supervised)
        c, plan = self.config.block, batch.plan
        parameters = [*self.block.parameters(), *self._readout_parameters()]
        state, own = self.embed(batch), batch.feeder.start()
        final = [state[plan.rows_at(1) :]]
        losses, corrects = [state.new_empty(0)], [own.new_empty(0, dtype=torch.bool)]
        for t in range(1, plan.max_loops + 1):
            rows, later = plan.rows_at(t), plan.rows_at(t + 1)
            once, part = plan.once(t), slice(*batch.row_offsets[t - 1 : t + 1])
            fed = batch.true_feed[plan.state_offsets[t - 1] : plan.state_offsets[t]]
            if batch.truth < 1:
                told = torch.rand(once.sequences, device=fed.device) < batch.truth
                told = told.repeat_interleave(once.cu_seqlens.diff(), output_size=rows)
                fed = torch.where(told, fed, own)
            offsets = (0, part.stop - part.start)
            readout = Readout(batch.rows[part], batch.targets[part], offsets, c.eps, c.norm)
            run = self.block.run(once, readout=readout)
            entered = state[:rows] + self._embed_fed(fed)
            state, _, loss, correct = run_loop(run, entered, parameters)
            final.append(state[later:])
            losses.append(loss)
            corrects.append(correct)
            if batch.truth < 1 and later:
                own = batch.feeder.after(t, self._best(run, state, self.chain_head), fed, later)
        return torch.cat(final[::-1]), torch.cat(losses), torch.cat(corrects)

    def check_parts(self) -> None:
        super().check_parts()
        check_parts(self, answer_head=nn.Linear)

    def loss(self, batch: PackedBatch) -> Losses:
        """L = Σ weights · CE(rounds) + Σ answer_weights · CE(answers)."""
        self._check_training_batch(batch)
        final, row_loss, correct = self._pass(batch, self.supervise == "chain")
        c = self.config.block
        answer_loss, answer_correct = row_cross_entropy(
            final, batch.answer_rows, batch.answers, self.norm.weight, self.answer_head.weight,
            self.norm.bias, eps=c.eps, norm=c.norm, impl=self.block.impl,
        )  # fmt: skip
        chain = _chain_loss(row_loss, batch) if row_loss.numel() else final.new_zeros(())
        answer = weighted_losses(answer_loss, batch.answer_weights, batch.answers).sum()
        return Losses(
            chain + answer, chain.detach(), answer.detach(), _share(correct), _share(answer_correct)
        )

    def _check_training_batch(self, batch: PackedBatch) -> None:
        c = self.config
        if c.feedback != "none" and (batch.true_feed if c.carry_state else batch.fed) is None:
            maker = "carried" if c.carry_state else "side_by_side"
            raise ValueError(
                f"a model with feedback = {c.feedback!r} and carry_state = {c.carry_state} learns "
                f"from true rounds that are fed back: make the batch with PackedBatch.{maker}"
            )

    @torch.no_grad()
    def read(self, batch: PackedBatch) -> tuple[list[Tensor], Tensor]:
        """Reads the chains off: token ids (N_t,) of each iteration's active prefix, answers (B,).

        No state outlives its iteration; only token ids are kept. One launch where the whole-loop
        kernel serves (`relay_fast.whole_loop`). Raises TypeError for a subclass with a forward or
        loss of its own, which this pass would not follow.
        """
        check_pass(self, LoopedTransformer, "forward", "loss", "_pass")
        self.check_parts()
        run = self.block.run(batch.plan)
        x = self.embed(batch)
        read = feedback_reason(self.config) or read_whole_loop(
            self.config.block, run, x, dict(self.block.named_parameters()), self.norm.weight,
            self.chain_head.weight, self.training,
        )  # fmt: skip
        final, rounds = self._read_iterations(run, x, batch) if isinstance(read, str) else read
        return rounds, self._best(run, final[batch.plan.last_rows], self.answer_head)

    @torch.no_grad()
    def _best(self, run: Run, states: Tensor, head: nn.Linear) -> Tensor:
        """(rows,) the most likely token of each row."""
        c, weight = self.config.block, head.weight.to(run.compute_dtype)
        return run.ops.argmax(states, self.norm.weight, self.norm.bias, weight, c.eps, c.norm)

    def _read_iterations(
        self, run: Run, x: Tensor, batch: PackedBatch
    ) -> tuple[Tensor, list[Tensor]]:
        """final (N, d), and the token ids (N_t,) of each iteration."""
        plan, final, rounds = run.plan, x.clone(), []
        for t, state, ids in self.iterations(run, x, batch):
            rounds.append(ids)
            final[plan.rows_at(t + 1) : len(state)] = state[plan.rows_at(t + 1) :]
        return final, rounds

    def iterations(
        self, run: Run, x: Tensor, batch: PackedBatch
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields (t, state t of the active prefix, its token ids), without gradients.

        A state is valid until the next but one is asked for. With feedback, each iteration is fed
        the ids of those before it.

        Args:
            run: a pass of the block over the batch's plan.
            x: (N, d) the batch's embeddings.
            batch: of `PackedBatch.looped`.
        """
        feeder, parameters = batch.feeder, list(self.block.parameters())
        if self.config.feedback == "none":
            for t, state in iterate(run, x, parameters):
                yield t, state, self._best(run, state, self.chain_head)
            return
        if feeder is None:
            raise ValueError(
                f"a model with feedback = {self.config.feedback!r} reads its own rounds back: make "
                "the batch with PackedBatch.looped(..., feedback=True)"
            )
        fed = feeder.start()

        def enter(state: Tensor, t: int) -> Tensor:
            before = state if self.config.carry_state else x
            return before[: run.plan.rows_at(t)] + self.fed_embedding(fed)

        for t, state in iterate(run, x, parameters, enter):
            ids = self._best(run, state, self.chain_head)
            yield t, state, ids
            fed = feeder.after(t, ids, fed, run.plan.rows_at(t + 1))


class AutoregressiveTransformer(_Transformer):
    """The autoregressive model: the same block, causal, one iteration."""

    def __init__(self, config: ModelConfig, *, recompute: str = "none", impl: str = "auto"):
        config = ModelConfig.of(config)
        if not config.block.causal:
            raise ValueError("an autoregressive model needs BlockConfig(causal=True)")
        super().__init__(config, recompute, impl)

    def loss(self, batch: PackedBatch) -> Losses:
        """Weighted next-token cross-entropy of everything after the problem."""
        final, row_loss, correct = self._pass(batch, True)
        loss = _chain_loss(row_loss, batch) if row_loss.numel() else final[:0].sum()
        zero = loss.new_zeros(())
        return Losses(loss, loss.detach(), zero, _share(correct), zero)

    @torch.no_grad()
    def forced(self, batch: PackedBatch) -> Tensor:
        """correct (R,) bool: whether each target is the argmax, given the true tokens before it.

        Raises TypeError for a subclass with a forward or loss of its own."""
        check_pass(self, AutoregressiveTransformer, "forward", "loss")
        return self._pass(batch, True)[2]


def _chain_loss(row_loss: Tensor, batch: PackedBatch) -> Tensor:
    return weighted_losses(row_loss, batch.weights, batch.targets).sum()


def _share(correct: Tensor) -> Tensor:
    return correct.sum() / max(1, correct.numel())
