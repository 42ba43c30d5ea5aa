"""RELAY's two models, each built around a looped block: looped and autoregressive.

Shapes: B sequences, N rows of a packed batch, d model width, R rows that carry a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from relay_fast.batch.packed import PackedBatch
from relay_fast.batch.plan import Plan
from relay_fast.config import ModelConfig, tell_hub
from relay_fast.engine.block_weights import BlockWeights
from relay_fast.engine.fused_inference import feedback_reason, run_fused_loop
from relay_fast.engine.loop import iterate, run_loop
from relay_fast.engine.plain_modules import check_not_overridden, check_parts, reset_submodules
from relay_fast.engine.spec import LoopSpec, Readout
from relay_fast.kernels.dropout_ref import Dropout, dropout_mask_ref, row_uniform
from relay_fast.kernels.supports import require
from relay_fast.models.feedback_checks import check_learnable, check_readable, check_weights
from relay_fast.models.layer import Norm
from relay_fast.models.looped_block import LoopedBlock
from relay_fast.models.readouts import NormAndHead, ReadoutWeights
from relay_fast.ops.cross_entropy import weighted_losses
from relay_fast.tasks.vocabulary import PAD
from relay_fast.utils.arguments import check_choice, check_kind
from relay_fast.utils.deprecation import renamed_method
from relay_fast.utils.draws import one_draw


class Losses(NamedTuple):
    """The losses and accuracies of a step, as scalars on the device."""

    loss: Tensor  # () total
    chain: Tensor  # () weighted chain loss
    answer: Tensor  # () weighted answer loss
    chain_correct: Tensor  # () share of supervised rows whose token is correct
    answer_correct: Tensor  # () share of correct answers


def _check_kind(batch: PackedBatch) -> None:
    remedy = "give a PackedBatch, as PackedBatch.looped and .autoregressive make them"
    check_kind("batch", batch, PackedBatch, remedy)


class _Transformer(nn.Module):
    """Base of both models: embedding, block, final norm and chain head."""

    next_tokens: bool  # whether it learns the tokens that follow

    def __init__(self, config: ModelConfig, recompute: str, impl: str):
        super().__init__()
        c = self.config = ModelConfig.of(config)
        self.embedding = nn.Embedding(c.vocabulary_size, c.block.d_model)
        nn.init.normal_(self.embedding.weight, std=1.0)
        self.block = LoopedBlock(config=c.block, recompute=recompute, impl=impl)
        self.norm = Norm(c.block.d_model, c.block.has_bias("norm"))
        self.chain_head = nn.Linear(c.block.d_model, c.vocabulary_size, bias=False)
        tell_hub(self, recompute=recompute, impl=impl)

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as the constructor does."""
        reset_submodules(self)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def forward(self, batch: PackedBatch) -> Losses:
        """Calls `loss`, for wrappers such as DistributedDataParallel; graph break when compiled."""
        if torch.compiler.is_compiling():
            from relay_fast.ops.eager import eager

            return eager(self.loss, batch)
        return self.loss(batch)

    def loss(self, batch: PackedBatch) -> Losses:
        raise NotImplementedError

    def embed(self, batch: PackedBatch) -> Tensor:
        """Returns the embeddings (N, d) of the batch's tokens, with dropout in training."""
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
        _check_kind(batch)
        if batch.next_tokens not in (None, self.next_tokens):
            other = "rounds" if self.next_tokens else "next tokens"
            maker = "autoregressive" if self.next_tokens else "looped"
            raise ValueError(
                f"the targets of the batch are {other}, which {type(self).__name__} does not "
                f"learn: make the batch with PackedBatch.{maker}"
            )
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

    def readout(self, head: str = "chain_head") -> NormAndHead:
        """Returns the final norm with one of the heads."""
        c = self.config.block
        return NormAndHead(self, "norm", head, c.eps, c.norm)

    def _pass(self, batch: PackedBatch, supervised: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the block; returns final states (N, d), row losses (R,) and correct (R,)."""
        _check_kind(batch)
        rows = (batch.rows, batch.targets, batch.row_offsets)
        supervised = supervised and bool(batch.targets.numel())
        return self._loop(batch.plan, self.embed(batch), rows if supervised else None)[:3]

    def _loop(
        self, plan: Plan, x: Tensor, rows: tuple[Tensor, Tensor, tuple[int, ...]] | None
    ) -> tuple[Tensor, Tensor, Tensor, LoopSpec]:
        """Runs the block over a plan.

        Args:
            plan: sequences and loop counts.
            x: (N, d) the first state.
            rows: `rows`, `targets` and `offsets` of a Readout of the chain head; None: no loss.

        Returns:
            What `_pass` does, and the description of the pass.
        """
        check_parts(self, block=LoopedBlock)
        c, readout = self.config.block, self.readout()

        def compute(x: Tensor) -> tuple[Tensor, Tensor, Tensor, LoopSpec]:
            weights, options = self.block.weights(), {}
            parameters = weights.tensors
            head = readout.weights() if rows is not None else None
            if isinstance(head, ReadoutWeights):
                options["readout"] = Readout(*rows, c.eps, c.norm)
                parameters = [*parameters, *head]
            elif head is not None:
                options["states"] = tuple(range(1, plan.max_loops + 1))
            run = self.block.run(plan, weights, **options)
            final, states, loss, correct = run_loop(run, x, parameters)
            if isinstance(head, str):
                flat = _flat_rows(plan, *rows[::2])
                loss, correct = readout.called_losses(states, flat, rows[1])
            return final, loss, correct, run

        return self.block.gathered(x, compute, called=False, beside=readout.parts())


def _flat_rows(plan: Plan, rows: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """Returns where the readout's rows are in the states of all iterations, end to end."""
    require(
        "fixed-capacity batches do not support a head with a forward or hooks of its own"
        if plan.fixed_capacity
        else None
    )
    starts = np.repeat(plan.state_offsets[:-1], np.diff(offsets))
    return rows + torch.from_numpy(starts).to(rows.device)


class LoopedTransformer(_Transformer):
    """The looped model: embedding, block, chain head on every state, answer head on the last.

    Args:
        config: sizes and options of the model.
        supervise: "chain" trains each iteration on its round; "answer", the vanilla looped model,
            trains on the answer only.
        recompute: recompute policy (`relay_fast.engine.recompute`).
        impl: "auto", "triton" or "torch".

    With feedback (`ModelConfig.feedback`) the model trains on `PackedBatch.side_by_side` and reads
    `relay_fast.data.feedback.collate_next`. If it carries its state too, it trains on
    `PackedBatch.carried` and reads `PackedBatch.looped(..., carry_state=True)`; otherwise it has no
    answer head, because the rounds hold the answer.
    """

    next_tokens = False

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
        check_choice("supervise", supervise, ("chain", "answer"))
        self.supervise = supervise
        tell_hub(self, supervise=supervise, recompute=recompute, impl=impl)
        self.has_answer_head = config.feedback == "none" or config.carry_state
        if self.has_answer_head:
            self.answer_head = nn.Linear(config.block.d_model, config.vocabulary_size, bias=False)
        if config.feedback != "none":
            if supervise == "answer":
                raise ValueError(
                    'a model that learns answers only (supervise = "answer") writes no rounds that '
                    'could be fed back: use feedback = "none"'
                )
            self.fed_embedding = nn.Embedding(config.vocabulary_size, config.block.d_model)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Does what `torch.nn.Module.load_state_dict` does, but names weights of another feedback.

        Args:
            state_dict, strict, assign: As there.

        Raises:
            RuntimeError: The weights are those of another model.
        """
        if strict:
            check_weights(self.config, state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def _embed_tokens(self, batch: PackedBatch) -> Tensor:
        x = super()._embed_tokens(batch)
        if batch.fed is None:
            return x
        return x + self._embed_fed(batch.fed, batch.plan)

    def _embed_fed(self, fed: Tensor, plan: Plan) -> Tensor:
        """Returns the embeddings (N, d) of the tokens fed to a plan's rows, with noise in
        training: some become another token of the same input."""
        p = self.config.feedback_noise
        if self.training and p:
            wrong, other = (
                row_uniform(torch.randint(2**31, (), device=fed.device), plan.tokens)
                for _ in range(2)
            )
            offsets = plan.cu_seqlens.long()
            sizes = offsets.diff().repeat_interleave(offsets.diff(), output_size=plan.rows)
            starts = offsets[:-1].repeat_interleave(offsets.diff(), output_size=plan.rows)
            others = fed[starts + (other * sizes).long()]
            fed = torch.where((wrong < p) & (fed != PAD), others, fed)
        return self.fed_embedding(fed)

    def _pass(self, batch: PackedBatch, supervised: bool) -> tuple[Tensor, Tensor, Tensor]:
        if not self.config.carry_state:
            return super()._pass(batch, supervised)
        with one_draw(self.device):  # however many iterations there are
            return self._carried_pass(batch)

    def _carried_pass(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        plan = batch.plan
        state, own = self.embed(batch), batch.feeder.start()[: plan.rows_at(1)]
        final = [state[plan.rows_at(1) :]]
        losses, corrects = [state.new_empty(0)], [own.new_empty(0, dtype=torch.bool)]
        for t in range(1, plan.max_loops + 1):
            rows, later = plan.rows_at(t), plan.rows_at(t + 1)
            once, part = plan.once(t), slice(*batch.row_offsets[t - 1 : t + 1])
            fed = batch.true_feed[plan.state_offsets[t - 1] : plan.state_offsets[t]]
            if batch.truth < 1:
                seed = torch.randint(2**31, (), device=fed.device)
                told = row_uniform(seed, once.tokens[once.cu_seqlens[:-1]]) < batch.truth
                told = told.repeat_interleave(once.cu_seqlens.diff(), output_size=rows)
                fed = torch.where(told, fed, own)
            offsets = (0, part.stop - part.start)
            entered = state[:rows] + self._embed_fed(fed, once)
            supervised = (batch.rows[part], batch.targets[part], offsets)
            state, loss, correct, run = self._loop(once, entered, supervised)
            final.append(state[later:])
            losses.append(loss)
            corrects.append(correct)
            if batch.truth < 1 and later:
                own = batch.feeder.after(self._best(run, state, self.readout()), later)
        return torch.cat(final[::-1]), torch.cat(losses), torch.cat(corrects)

    def loss(self, batch: PackedBatch) -> Losses:
        """Computes L = Σ weights · CE(rounds), plus Σ answer_weights · CE(answers) with an answer
        head."""
        check_learnable(self.config, batch)
        final, row_loss, correct = self._pass(batch, self.supervise == "chain")
        if not self.has_answer_head:
            chain = _chain_loss(row_loss, batch) if row_loss.numel() else final[:0].sum()
            zero = chain.new_zeros(())
            return Losses(chain, chain.detach(), zero, _share(correct), zero)
        answer_loss, answer_correct = self.readout("answer_head").row_losses(
            final, batch.answer_rows, batch.answers, self.block.impl
        )
        chain = _chain_loss(row_loss, batch) if row_loss.numel() else final.new_zeros(())
        answer = weighted_losses(answer_loss, batch.answer_weights, batch.answers).sum()
        return Losses(
            chain + answer, chain.detach(), answer.detach(), _share(correct), _share(answer_correct)
        )

    @torch.no_grad()
    def predict_rounds(self, batch: PackedBatch) -> tuple[list[Tensor], Tensor]:
        """Predicts the chains of a batch; keeps token ids only, no states of past iterations.

        One kernel launch where the fused loop applies (`relay_fast.engine.fused_inference`).

        Returns:
            Token ids (N_t,) of each iteration's active prefix, and answers (B,), of which there are
            none without an answer head.

        Raises:
            TypeError: for a subclass that overrides forward or loss, which this pass does not call.
        """
        check_not_overridden(self, LoopedTransformer, "forward", "loss", "_pass", "read")
        check_parts(self, block=LoopedBlock)
        _check_kind(batch)
        weights = self.block.weights()
        run = self.block.run(batch.plan, weights)
        x = self.embed(batch)
        read = feedback_reason(self.config) or self._run_fused(run, weights, x)
        final, rounds = (
            self._read_iterations(run, weights, x, batch) if isinstance(read, str) else read
        )
        if not self.has_answer_head:
            return rounds, batch.tokens[:0]
        return rounds, self._best(run, final[batch.plan.last_rows], self.readout("answer_head"))

    read = renamed_method("read", "predict_rounds")

    def _run_fused(
        self, run: LoopSpec, weights: BlockWeights, x: Tensor
    ) -> tuple[Tensor, list[Tensor]] | str:
        """Runs the loop and its readout in one launch, or returns why it cannot."""
        head = self.readout().weights()
        if weights.called or isinstance(head, str):
            return "the whole-loop kernel cannot call parts"
        config, training = self.config.block, self.training
        return run_fused_loop(config, run, x, weights.named, head.norm, head.head, training)

    @torch.no_grad()
    def _best(self, run: LoopSpec, states: Tensor, head: NormAndHead) -> Tensor:
        """Returns the most likely token of each row, (rows,)."""
        return head.argmax(states, run.ops, run.compute_dtype)

    def _read_iterations(
        self, run: LoopSpec, weights: BlockWeights, x: Tensor, batch: PackedBatch
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns final states (N, d), and the token ids (N_t,) of each iteration."""
        plan, final, rounds = run.plan, x.clone(), []
        for t, state, ids in self.iterations(run, weights, x, batch):
            rounds.append(ids)
            final[plan.rows_at(t + 1) : len(state)] = state[plan.rows_at(t + 1) :]
        return final, rounds

    def iterations(
        self, run: LoopSpec, weights: BlockWeights, x: Tensor, batch: PackedBatch
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields (t, state t of the active prefix, its token ids), without gradients.

        A state is overwritten two iterations later. With feedback and the state carried,
        each iteration is fed the ids of the one before it.

        Args:
            run: a pass of the block over the batch's plan.
            weights: the block's weights, of that pass.
            x: (N, d) the batch's embeddings.
            batch: of `PackedBatch.looped`, or what a model with feedback reads.
        """
        check_readable(self.config, batch)
        parameters, head, fed = weights.tensors, self.readout(), None

        def enter(state: Tensor, t: int) -> Tensor:
            return state[: run.plan.rows_at(t)] + self.fed_embedding(fed)

        if not self.config.carry_state:
            for t, state in iterate(run, x, parameters):
                yield t, state, self._best(run, state, head)
            return
        fed = batch.feeder.start()[: run.plan.rows_at(1)]
        for t, state in iterate(run, x, parameters, enter):
            ids = self._best(run, state, head)
            yield t, state, ids
            fed = batch.feeder.after(ids, run.plan.rows_at(t + 1))


class AutoregressiveTransformer(_Transformer):
    """The autoregressive model: a causal block, applied once.

    Args:
        config: sizes and options of the model; its block must be causal.
        recompute: recompute policy (`relay_fast.engine.recompute`).
        impl: "auto", "triton" or "torch".
    """

    next_tokens = True

    def __init__(self, config: ModelConfig, *, recompute: str = "none", impl: str = "auto"):
        config = ModelConfig.of(config)
        if not config.block.causal:
            raise ValueError("an autoregressive model must be causal: use BlockConfig(causal=True)")
        if config.feedback != "none":
            raise ValueError(
                f"feedback = {config.feedback!r} is of a looped model: an autoregressive one reads "
                'all that it wrote anyway, use feedback = "none"'
            )
        super().__init__(config, recompute, impl)

    def loss(self, batch: PackedBatch) -> Losses:
        """Computes the weighted next-token cross-entropy of the tokens after the problem."""
        final, row_loss, correct = self._pass(batch, True)
        loss = _chain_loss(row_loss, batch) if row_loss.numel() else final[:0].sum()
        zero = loss.new_zeros(())
        return Losses(loss, loss.detach(), zero, _share(correct), zero)

    @torch.no_grad()
    def teacher_forced_correct(self, batch: PackedBatch) -> Tensor:
        """Returns (R,) bool: whether each target is the argmax given the true tokens before it.

        Raises TypeError for a subclass that overrides forward or loss.
        """
        check_not_overridden(self, AutoregressiveTransformer, "forward", "loss", "forced")
        return self._pass(batch, True)[2]

    forced = renamed_method("forced", "teacher_forced_correct")


def _chain_loss(row_loss: Tensor, batch: PackedBatch) -> Tensor:
    return weighted_losses(row_loss, batch.weights, batch.targets).sum()


def _share(correct: Tensor) -> Tensor:
    return correct.sum() / max(1, correct.numel())
