"""The schema of a run's config: every key with its range and meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WrapValidator, create_model, model_validator

from relay_fast.config import BIASES, FEEDBACKS, INJECTIONS, LOOP_NORMS
from relay_fast.engine.recompute import RecomputePolicy
from relay_fast.kernels.mlp_ref import ACTIVATIONS
from relay_fast.kernels.norm_ref import NORMS
from relay_fast.utils.precision import DTYPES
from relay_fast.utils.settings import (
    ABSENT,
    BatchSize,
    Below1,
    BetaPair,
    Clip,
    Count,
    Counts,
    DecayKind,
    Ema,
    LearningRate,
    MuonRate,
    NotNegative,
    Positive,
    Seed,
    Share,
    Table,
    Warmup,
    WeightDecay,
    Whole,
    check,
    says,
)

MOST = 1_000_000  # of lengths, and of numbers that are tokens: all of them are listed
LENGTHS_OF_A_STAGE = ("steps", "epochs", "token_iterations")


def _ordered(lengths: tuple[int, ...]) -> tuple[int, ...]:
    if len(lengths) != 2 or lengths[0] > lengths[1]:
        raise ValueError
    return lengths


def _recompute(text: str) -> str:
    RecomputePolicy.parse(text)
    return text


def _or_parts(value: Any, inner: Any) -> Any:
    """Takes true, false, or a list of the parts with a bias."""
    if not isinstance(value, list | tuple):
        return inner(value)
    if unknown := [part for part in value if part not in BIASES]:
        raise ValueError(f"{unknown[0]!r} has no bias: give parts of {list(BIASES)}")
    return value


def _or_table(value: Any, inner: Any) -> Any:
    """Takes a list of frequencies, or the table that they are computed from (`BlockConfig` checks
    it)."""
    return value if isinstance(value, dict) else inner(value)


Lengths = Annotated[
    tuple[Annotated[int, Field(ge=1, le=MOST), says("at least 1")], ...],
    Field(strict=False),
    AfterValidator(_ordered),
    says("the shortest and the longest length, like [1, 10]"),
]


class VocabularyTable(Table):
    max_number: Annotated[int, Field(ge=0, le=MOST), says("at least 0")] = Field(
        ABSENT, description="the numbers 0 to this are tokens, default 249 with a built-in task"
    )
    multiple: Count = Field(64, description="the embedding's rows are rounded up to this")
    tokens: tuple[str, ...] = Field(
        ABSENT, strict=False, description="of other tasks, default those of their samples"
    )


# Made by a call, because `class` is a keyword.
_TaskSource = create_model(
    "_TaskSource",
    __base__=Table,
    **{
        "class": (str, Field(ABSENT, description="module:Class or file.py:Class of a TextTask")),
        "data": (str, Field(ABSENT, description="or a file of chains")),
    },
)


class SavedTask(_TaskSource):
    """The settings of a task that evaluation needs; runs of every version have them."""

    train: Lengths = Field(description="the shortest and the longest length in training")
    test: Lengths = Field(description="the same, in evaluation: from the shortest trained on")
    parameters: dict[str, Any] = Field({}, description="the task's own, checked by the task")


class FeedbackTable(Table):
    """As `relay_fast.tasks.FeedbackDraws`."""

    pad_probability: Share = Field(ABSENT, description="of padding an input, default the stage's")
    pad_to: Whole = Field(ABSENT, description="up to so many tokens, default the stage's")
    cut: Whole = Field(ABSENT, description="most by which positions are moved, default the stage's")
    cut_probability: Share = Field(ABSENT, description="of moving them, default the stage's")
    shift: Whole = Field(0, description="most that is added to all numbers fed")
    shift_probability: Share = Field(0.5, description="of adding to them")


class TaskTable(SavedTask):
    feedback: FeedbackTable = Field(ABSENT, description="what training with feedback draws")
    self_lengths: Counts = Field(description="lengths of the self-written chains, one a phase")
    self_counts: Counts = Field(description="how many of each length a phase writes")
    merge_inside: Count = Field(description="true problems in the fine-tuning of ar_relay")
    merge_beyond: Counts = Field(description="chains of the looped model, by length beyond train")
    hit_matrix: tuple[Count, ...] = Field(description="lengths with accuracy by token")


class BlockTable(Table):
    """Settings of `relay_fast.config.BlockConfig`, which checks that they fit together."""

    d_model: Count = Field(ABSENT, description="width of the states")
    n_heads: Count = Field(ABSENT, description="heads of the attention")
    n_layers: Count = Field(ABSENT, description="layers of the block")
    n_kv_heads: Count | None = Field(None, description="key/value heads, default n_heads")
    d_hidden: Count | None = Field(None, description="width of the MLP, default 4 d_model")
    norm: Literal[*NORMS] = Field("rms", description="kind of norm")
    eps: Positive = Field(1e-6, description="added in the norm")
    activation: Literal[*ACTIVATIONS] = Field("gelu_tanh", description="of the MLP")
    bias: Annotated[bool, WrapValidator(_or_parts)] = Field(
        False, description="whether linear layers have biases, or a list of those that do"
    )
    rope_base: Positive | None = Field(10_000.0, description="of RoPE; null: no positions")
    dropout: Below1 = Field(0.0, description="share of the states dropped in training")
    loop_norm: Literal[*LOOP_NORMS] = Field("none", description="norm between iterations")
    injection: Literal[*INJECTIONS] = Field(
        "none", description="how the input enters each iteration"
    )
    max_loops: Whole = Field(0, description="size of the loop-index embedding, 0 for none")
    state_noise: NotNegative = Field(0.0, description="noise on the state, relative to its RMS")
    head_dim: Count | None = Field(None, description="columns of a head, default d_model / n_heads")
    qk_norm: bool = Field(False, description="RMSNorm of each query and key head")
    sandwich_norm: bool = Field(False, description="norms behind attention and MLP too")
    rotary_share: Share = Field(1.0, description="share of a head's columns that RoPE rotates")
    rope_frequencies: Annotated[
        tuple[NotNegative, ...] | None, Field(strict=False), WrapValidator(_or_table)
    ] = Field(None, description="RoPE's frequencies, or a table {rope_type = ..., factor = ...}")
    rope_scale: Positive = Field(1.0, description="factor of RoPE's cosines and sines")
    feedback: Literal[*FEEDBACKS] = Field(
        "none", description="what is fed back to the next iteration"
    )
    carry_state: bool = Field(False, description="with feedback: whether the state goes on too")
    feedback_noise: Below1 = Field(0.0, description="share of fed tokens made wrong in training")


class ModelTable(BlockTable):
    d_model: Count = Field(description="width of the states")
    n_heads: Count = Field(description="heads of the attention")
    n_layers: Count = Field(description="layers of the block")
    looped: BlockTable = Field(ABSENT, description="overrides for looped models")
    autoregressive: BlockTable = Field(ABSENT, description="for autoregressive models")


class EvaluationTable(Table):
    problems: Count = Field(description="problems of each length")


class InferenceTable(Table):
    autocast: Literal[*DTYPES] = Field(
        "fp32", description="precision of the GEMMs where models write chains and are evaluated"
    )


class FineTuning(Table):
    """Settings that every training stage may override."""

    lr: LearningRate = ABSENT
    muon_lr: MuonRate | None = None
    weight_decay: WeightDecay = ABSENT
    betas: BetaPair = ABSENT
    warmup: Warmup = ABSENT
    decay: DecayKind = ABSENT
    clip: Clip | None = None
    ema: Ema | None = None
    autocast: Literal[*DTYPES] = Field("fp32", description="precision of the GEMMs")
    graph: bool = Field(False, description="a step as one CUDA graph")
    batch_size: BatchSize = ABSENT
    batch_tokens: Count = Field(ABSENT, description="most tokens in a batch")
    weighting: Literal["sequence", "row"] = Field("sequence", description="unit with equal weight")
    task_weights: dict[str, NotNegative] = Field(
        ABSENT, description="weight of each task in the loss, {NAME = 1.0, ...}"
    )


class FromScratch(FineTuning):
    lengths: Literal["proportional", "uniform"] = Field(
        "uniform", description="longer problems more often, or all lengths equally often"
    )
    lengths_per_batch: Count = Field(ABSENT, description="different lengths in a batch")
    dataset_size: Count = Field(ABSENT, description="problems of each task, default unlimited")
    curriculum: Share = Field(0.0, description="share of the stage in which lengths grow")
    pad_probability: Share = Field(0.0, description="of padding a problem on the left")
    pad_to: Whole = Field(0, description="up to so many tokens")
    cut: Whole = Field(0, description="most by which positions behind a place are moved on")
    cut_probability: Share = Field(0.5, description="of moving them")
    chain_weight: NotNegative = Field(1.0, description="of the chain's tokens in the loss")
    truth: Share = Field(1.0, description="carry_state: share of true rounds fed in the end")


class TrainingTable(FromScratch):
    recompute: Annotated[str, AfterValidator(_recompute)] = Field(
        "none",
        description="recompute policy: none, state, sqrt, auto, every:k, last:m, budget:BYTES",
    )


class _Long(Table):
    """The length of a stage, given by exactly one of these."""

    steps: Count = Field(ABSENT, description="steps of the stage")
    epochs: Positive = Field(ABSENT, description="or passes over its data")
    token_iterations: Positive = Field(ABSENT, description="or tokens times loops, in all")

    @model_validator(mode="after")
    def _one_length(self):
        given = [name for name in LENGTHS_OF_A_STAGE if name in self.model_fields_set]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise ValueError(
                f"a stage's length is its steps, epochs or token_iterations: give one, not {found}"
            )
        return self


class ScratchStage(_Long, FromScratch):
    pass


class FineTuningStage(_Long, FineTuning):
    pass


class StagesTable(Table):
    looped_aligned: ScratchStage
    looped_vanilla: ScratchStage
    ar_baseline: ScratchStage
    ar_relay: FineTuningStage
    ar_self: FineTuningStage


class SavedRun(Table):
    """The part of a run's config that loading its models needs, in every version."""

    vocabulary: VocabularyTable
    tasks: dict[str, SavedTask] = Field(min_length=1)
    inference: InferenceTable = Field(ABSENT, description="how models are used")


class RunConfig(SavedRun):
    """The config of a run, or a preset."""

    name: str = Field(description="the preset's")
    seed: Seed = Field(description="of all random numbers")
    workers: Count = Field(description="training processes side by side")
    data_workers: Whole = Field(description="processes that make batches ahead")
    tasks: dict[str, TaskTable] = Field(min_length=1)
    model: ModelTable
    evaluation: EvaluationTable
    training: TrainingTable
    stages: StagesTable

    @model_validator(mode="after")
    def _tasks_fit_together(self):
        phases = {len(task.self_lengths) for task in self.tasks.values()}
        for name, task in self.tasks.items():
            _check_task(f"tasks.{name}", task, phases)
        return self


def _check_task(key: str, task: TaskTable, phases: set[int]) -> None:
    """Raises ValueError for lengths of a task that do not fit together.

    Args:
        key: The task's key in the config.
        task: Its settings.
        phases: Numbers of self-chain phases of all tasks.
    """
    if task.test[1] < task.train[0]:
        raise ValueError(
            f"{key}.test = {list(task.test)} ends below train = {list(task.train)}: "
            f"test up to longer problems"
        )
    max_length = max(task.test[1], task.train[1] + len(task.merge_beyond), *task.self_lengths)
    if max(task.hit_matrix, default=0) > max_length:
        raise ValueError(
            f"{key}.hit_matrix = {list(task.hit_matrix)}: give lengths up to {max_length}, the "
            f"longest that this run reads"
        )
    if len({len(task.self_lengths), len(task.self_counts)} | phases) > 1:
        raise ValueError(
            f"{key}.self_lengths = {list(task.self_lengths)} and self_counts = "
            f"{list(task.self_counts)}: give one of each for every phase, as many in all tasks"
        )


def check_tables(config: Mapping[str, Any]) -> None:
    """Raises the ValueError of `RunConfig` unless tasks and stages are tables of tables."""
    for key in ("tasks", "stages"):
        table = config.get(key)
        tables = isinstance(table, Mapping) and all(isinstance(t, Mapping) for t in table.values())
        if not tables:
            check(RunConfig, config)
