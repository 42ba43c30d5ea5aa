"""Rounds fed back as tokens: what is fed, the loss side by side, generation, refusals."""

import copy
import warnings

import numpy as np
import pytest
import torch

from benchmarks.numerics import assert_bitwise, assert_close
from relay_fast.batch.packed import PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.data.feedback import iterations_of
from relay_fast.data.streams import BatchFormat, TruthStream
from relay_fast.decoding.chains import (
    generate_looped_chains,
    generate_scored,
    stream_chains,
    stream_order,
)
from relay_fast.engine.fused_inference import feedback_reason
from relay_fast.functional import explain, row_cross_entropy
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.tasks import (
    NO_ANSWER,
    TASK_NAMES,
    FeedbackDraws,
    Samples,
    Task,
    Written,
    build_tasks,
)
from relay_fast.tasks.vocabulary import NUMBER0, PAD
from relay_fast.training import cuda_graph
from relay_fast.training.model_files import load_model, model_hash, save_model
from relay_fast.training.schedule import Schedule
from relay_fast.training.trainer import train_model
from tests.support.fed_inputs import naive_inputs
from tests.support.fed_models import TASKS, VOCABULARY, D, mixed, new_model


@pytest.mark.parametrize("weighting", ["sequence", "row"])
def test_side_by_side_is_the_loss_of_one_iteration_after_the_other(weighting: str) -> None:
    samples = mixed()
    task_weights = {"lis": 2.0, "arithmetic": 0.5}
    draws = {name: FeedbackDraws(0.5, 20) for name in TASKS}
    draws["edit_distance"] = FeedbackDraws(0.5, 20, cut=9)
    model = new_model().double()
    batch = PackedBatch.side_by_side(
        samples,
        TASKS,
        task_weights=task_weights,
        chain_weight=0.7,
        weighting=weighting,
        draws=draws,
        rng=np.random.default_rng(0),
    )
    losses = model.loss(batch)
    losses.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    counts = np.diff(samples.round_offsets) + 1
    owner = np.repeat(np.arange(len(samples)), samples.loops)
    before = np.arange(len(owner)) - samples.first_round[owner]
    place = np.argsort(np.argsort(before + 1 == samples.loops[owner], kind="stable"))
    plan, total, head = batch.plan, 0.0, (model.norm.weight, model.chain_head.weight)
    for k, (i, t) in enumerate(zip(owner.tolist(), before.tolist(), strict=True)):
        name, texts = TASK_NAMES[samples.task[i]], [r.tolist() for r in samples.rounds_of(i)]
        n = int(plan.lengths[place[k]])
        gap = int(plan.positions[plan.offsets[place[k] + 1] - 1]) - n + 1
        gap = gap if name == "edit_distance" else 0
        state = one_iteration(model, TASKS[name], samples.problem_of(i).tolist(), texts[:t], n, gap)
        target = torch.tensor([PAD, *texts[t]])
        rows = torch.arange(n - len(target), n)
        loss, _ = row_cross_entropy(state, rows, target, *head)
        share = 1 / counts.sum()
        if weighting == "sequence":
            share = 1 / (len(samples) * samples.loops[i] * len(target))
        weight = np.float32(0.7 * task_weights.get(name, 1.0) * share)
        total = total + loss.sum() * float(weight)
    assert_close("loss", losses.loss, total.detach(), 1e-12)
    assert losses.answer == 0, "the rounds hold the answer"
    total.backward()
    for name, p in model.named_parameters():
        assert_close(name, ours[name], p.grad, 1e-12)
    assert len(batch) == len(samples) and sorted(batch.order) == list(range(len(samples)))
    assert batch.plan.rows > PackedBatch.side_by_side(samples, TASKS).plan.rows, "some are padded"


def one_iteration(model, task: Task, problem, texts, width: int = 0, gap: int = 0) -> torch.Tensor:
    """(n, d): the states of one iteration of one problem."""
    tokens, fed, positions = map(torch.tensor, naive_inputs(task, problem, texts, width, gap))
    x = model.embedding(tokens) + model.fed_embedding(fed)
    return model.block(x[None], 1, positions=positions)[0]


def test_shifted_rows_have_shifted_targets() -> None:
    samples = TASKS["edit_distance"].sample([5] * 8, 0)
    draws = {"edit_distance": FeedbackDraws(shift=4, shift_probability=1.0)}
    plain = PackedBatch.side_by_side(samples, TASKS)
    moved = PackedBatch.side_by_side(samples, TASKS, draws=draws, rng=np.random.default_rng(0))
    for column in ("fed", "targets"):
        a, b = getattr(plain, column), getattr(moved, column)
        numbers = a >= NUMBER0
        assert torch.equal(a[~numbers], b[~numbers])
        assert set((b - a)[numbers].tolist()) == {1, 2, 3, 4}
    assert torch.equal(plain.tokens, moved.tokens) and torch.equal(plain.weights, moved.weights)


def test_parts_add_up_to_the_batch(monkeypatch) -> None:
    draws = {"edit_distance": FeedbackDraws(cut=9)}
    batch = PackedBatch.side_by_side(mixed(), TASKS, draws=draws, rng=np.random.default_rng(0))
    model = new_model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    whole = cuda_graph.take_step(model, optimizer, batch)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    parts = list(batch.parts(100))
    assert len(parts) == 3 and max(part.plan.rows for part in parts) < 150
    assert np.concatenate([part.order for part in parts]).tolist() == batch.order.tolist()
    assert_bitwise("positions", torch.cat([p.plan.positions for p in parts]), batch.plan.positions)
    monkeypatch.setitem(cuda_graph.PART_TOKENS, "cpu", 100)
    losses = cuda_graph.take_step(model, optimizer, batch)
    for name, ours, truth in zip(losses._fields, losses, whole, strict=True):
        assert_close(name, ours, truth.detach(), 1e-6 if "correct" in name else 1e-12)
    for name, p in model.named_parameters():
        assert_close(name, p.grad, expected[name], 1e-12)


def naive_chain(model: LoopedTransformer, task: Task, problems: Samples, i: int):
    """One problem, one iteration after the other, with what is fed worked out from its texts."""
    texts, scores = [], []
    with torch.no_grad():
        for _ in range(int(problems.loops[i])):
            state = one_iteration(model, task, problems.problem_of(i).tolist(), texts)
            y = torch.nn.functional.rms_norm(state, (D,), model.norm.weight, 1e-6)
            logits = model.chain_head(y)
            ids = logits.argmax(-1).tolist()
            begin = max((p + 1 for p, token in enumerate(ids) if token == PAD), default=0)
            texts.append(ids[begin:])
            scores += logits.log_softmax(-1)[range(begin, len(ids)), ids[begin:]].tolist()
    answer = task.answer_of(texts)
    return texts, NO_ANSWER if answer is None else answer, scores


def test_generation_is_a_plain_loop_token_for_token() -> None:
    problems, model = mixed(8), new_model().eval()
    written, scores = generate_scored(model, problems, TASKS, batch_tokens=60)
    sizes, own = [], []
    for i in range(len(problems)):
        task = TASKS[TASK_NAMES[problems.task[i]]]
        texts, answer, log_probabilities = naive_chain(model, task, problems, i)
        assert [text.tolist() for text in written.rounds_of(i)] == texts
        assert written.answer[i] == answer
        sizes += map(len, texts)
        own += log_probabilities
    np.testing.assert_allclose(scores.rounds, own, atol=1e-5)
    assert not scores.answer.any()
    # The test means something: there are rounds of many sizes, and they differ between iterations.
    assert len(set(sizes)) > 5 and min(sizes) < 3
    assert any(len({tuple(r) for r in written.rounds_of(i)}) > 1 for i in range(len(problems)))
    at_once = generate_looped_chains(model, problems, TASKS)
    assert np.array_equal(at_once.rounds, written.rounds)
    for chosen, part in stream_chains(model, problems, TASKS, batch_tokens=100):
        assert np.array_equal(part.rounds, written.take(chosen).rounds)


def test_the_answer_is_what_the_rounds_say(monkeypatch) -> None:
    """With the truth written in place of the argmax, answers and inputs are the truth's."""
    problems, model = mixed(8), new_model().eval()
    truth, seen = Written.truth(problems), []

    def read(batch):
        t = len(seen)
        owner = np.flatnonzero(problems.loops[order] > t)
        ids = torch.full_like(batch.tokens, PAD)
        for k, i in enumerate(order[owner]):
            text = torch.from_numpy(problems.rounds_of(i)[t].astype(np.int64))
            end = int(batch.plan.offsets[k + 1])
            ids[end - len(text) : end] = text
        wanted = iterations_of(truth, TASKS, order[owner], np.full(len(owner), t)).inputs
        assert batch.tokens.tolist() == wanted.tokens.tolist()
        assert batch.fed.tolist() == wanted.fed.tolist()
        assert batch.plan.positions.tolist() == wanted.positions.tolist()
        seen.append(t)
        return [ids], ids[:0]

    order = stream_order(problems)
    monkeypatch.setattr(model, "predict_rounds", read)
    written = generate_looped_chains(model, problems, TASKS)
    assert np.array_equal(written.rounds, problems.rounds)
    assert np.array_equal(written.answer, problems.answer)


def test_what_is_fed_matters() -> None:
    problems, model = TASKS["lis"].sample([9] * 20, 0), new_model().eval()
    before = generate_looped_chains(model, problems, TASKS)
    with torch.no_grad():
        model.fed_embedding.weight[NUMBER0:] += 1  # what no first iteration of LIS is fed
    after = generate_looped_chains(model, problems, TASKS)
    changed = [
        not np.array_equal(a, b) for a, b in zip(_rounds(before), _rounds(after), strict=True)
    ]
    first = [t == 0 for n in problems.loops for t in range(n)]
    assert not any(c for c, f in zip(changed, first, strict=True) if f) and any(changed)


def _rounds(samples: Samples) -> list[np.ndarray]:
    return [text for i in range(len(samples)) for text in samples.rounds_of(i)]


def test_noise_replaces_its_share_of_the_fed_tokens_in_training_only() -> None:
    batch = PackedBatch.side_by_side(TASKS["edit_distance"].sample([9] * 40, 0), TASKS)
    model = new_model(feedback_noise=0.25)
    clean = model.eval().embed(batch)
    assert_bitwise("eval", clean, model.embed(batch))
    changed = (model.train().embed(batch) != clean).any(1)
    assert not changed[batch.fed == PAD].any(), "what is fed nothing stays so"
    share = changed[batch.fed != PAD].float().mean().item()
    assert 0.15 < share < 0.25, "some of the tokens put in happen to be right"


def test_a_small_model_learns_and_is_saved(tmp_path) -> None:
    task = build_tasks(["arithmetic"], VOCABULARY, arithmetic={"prime": 3, "operators": "+"})
    schedule = Schedule.by_steps(60, warmup=0.1, decay="wsd")
    stream = TruthStream(
        task, {"arithmetic": (1, 3)}, BatchFormat("looped", feedback=True), schedule,
        batch_size=32, seed=0, lengths="uniform",
    )  # fmt: skip
    torch.manual_seed(0)
    config = ModelConfig(
        BlockConfig(32, 2, 2, activation="relu2"), VOCABULARY.size, feedback="tokens"
    )
    model = LoopedTransformer(config, recompute="none")
    trained = train_model(
        model,
        stream,
        {"lr": 3e-3, "muon_lr": 0.02, "graph": True},
        tmp_path / "s.safetensors",
        seed=0,
    )
    assert trained.samples == 60 * 32, "samples count, not iterations"
    assert trained.history[-1]["loss"] < 0.5 * trained.history[0]["loss"]
    save_model(tmp_path / "m.safetensors", model, {})
    loaded, _ = load_model(tmp_path / "m.safetensors")
    assert loaded.config == config
    problems = task["arithmetic"].sample([1, 2, 3] * 5, 99)
    assert np.array_equal(
        generate_looped_chains(loaded, problems, task).rounds,
        generate_looped_chains(model, problems, task).rounds,
    )


def test_models_without_feedback_are_written_as_before(tmp_path) -> None:
    config = ModelConfig(BlockConfig(D, 2, 1), VOCABULARY.size)
    assert set(config.to_dict()) == {"block", "vocabulary_size", "max_tokens"}
    model = LoopedTransformer(config)
    assert not any("fed" in name for name in model.state_dict())
    save_model(tmp_path / "m.safetensors", model, {})
    assert model_hash(load_model(tmp_path / "m.safetensors")[0]) == model_hash(model)
    fed = ModelConfig(
        BlockConfig(D, 2, 1), 9, feedback="tokens", feedback_noise=0.1, trained_tokens=9
    )
    assert ModelConfig.from_dict(fed.to_dict()) == fed


def test_inputs_longer_than_in_training_are_named() -> None:
    problems = TASKS["arithmetic"].sample([1, 6], 0)
    longest, lis = int(np.diff(problems.problem_offsets).max()), TASKS["lis"].sample([12, 3], 0)
    text = f"longest input has {longest} tokens, the model was trained on up to {longest - 1} "
    with pytest.warns(UserWarning, match=text):
        generate_looped_chains(new_model(trained_tokens=longest - 1), problems, TASKS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_looped_chains(new_model(trained_tokens=longest), problems, TASKS)
        generate_looped_chains(new_model(trained_tokens=3), lis, TASKS)  # clips its positions
    with pytest.warns(UserWarning, match="longest input has 14 tokens, .* up to 13 ") as told:
        generate_looped_chains(
            new_model(trained_tokens=13, carry_state=True), lis, TASKS, batch_tokens=1
        )
    assert len(told) == 1, "once a call"
    for use in (generate_scored, lambda *own: list(stream_chains(*own))):
        with pytest.warns(UserWarning, match="longest input has") as told:
            use(new_model(trained_tokens=5), problems, TASKS)
        assert [warning.filename for warning in told] == [__file__]


class Silent(type(TASKS["arithmetic"])):
    input_sizes, inputs = Task.input_sizes, Task.inputs


class TooNarrow(type(TASKS["lis"])):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.min_input_tokens = 4


def test_bad_input() -> None:
    samples, plain = mixed(2), LoopedTransformer(ModelConfig(BlockConfig(D, 2, 1), VOCABULARY.size))
    fed = PackedBatch.side_by_side(samples, TASKS)
    silent = {**TASKS, "arithmetic": Silent(VOCABULARY, prime=11)}
    for use in (
        lambda: PackedBatch.side_by_side(samples, silent),
        lambda: generate_looped_chains(new_model(), samples, silent),
    ):
        with pytest.raises(ValueError, match="'arithmetic' does not say what an iter.*Silent.inp"):
            use()
    narrow = {"lis": TooNarrow(VOCABULARY, group=6, low=0, high=49)}
    with pytest.raises(
        ValueError, match="task 'lis': a round of .* fit into its input of 4: raise the task"
    ):
        PackedBatch.side_by_side(narrow["lis"].sample([1], 0), narrow)
    with pytest.raises(ValueError, match="a sample without rounds has no iteration"):
        PackedBatch.side_by_side(_without_rounds(samples, loops=0), TASKS)
    with pytest.raises(ValueError, match="weighting = 'token' is unknown"):
        PackedBatch.side_by_side(samples, TASKS, weighting="token")
    with pytest.raises(ValueError, match="the batch has rounds that are fed back, the model takes"):
        plain.loss(fed)
    with pytest.raises(ValueError, match="learns from true rounds .* PackedBatch.side_by_side"):
        new_model().loss(PackedBatch.looped(samples, TASKS))
    with pytest.raises(ValueError, match="reads its own rounds back: .*collate_next, or write who"):
        new_model().predict_rounds(PackedBatch.looped(samples, TASKS))
    with pytest.raises(ValueError, match=r"PackedBatch.looped\(..., carry_state=True\), or write"):
        new_model(carry_state=True).predict_rounds(PackedBatch.looped(samples, TASKS))
    with pytest.raises(ValueError, match='answers only .* use feedback = "none"'):
        LoopedTransformer(new_model().config, supervise="answer")
    block = BlockConfig(D, 2, 1)
    for options, message in (
        ({"feedback": "latent"}, "feedback = 'latent' is unknown: use one of"),
        ({"feedback_noise": 0.1}, "feedback_noise = 0.1 needs fed tokens"),
        ({"carry_state": True}, "carry_state = True needs feedback"),
        ({"feedback": "tokens", "feedback_noise": 1.0}, "feedback_noise = 1.0: it must be in"),
        ({"trained_tokens": -1}, "trained_tokens = -1: it must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig(block, 9, **options)
    carried = PackedBatch.carried(samples, TASKS)
    with pytest.raises(ValueError, match="carry_state = True learns .* PackedBatch.carried"):
        new_model(carry_state=True).loss(fed)
    with pytest.raises(ValueError, match="the batch has rounds that are fed back"):
        plain.loss(carried)
    with pytest.raises(ValueError, match=r"truth = 1.5: it must lie in \[0, 1\]"):
        PackedBatch.carried(samples, TASKS, truth=1.5)
    with pytest.raises(ValueError, match="truth = 0.5: iterations that train side by side are"):
        TruthStream(
            {"lis": TASKS["lis"]}, {"lis": (1, 3)}, BatchFormat("looped", feedback=True),
            Schedule.by_steps(2), batch_size=2, seed=0, truth=0.5,
        )  # fmt: skip
    for options in ({"injection": "add"}, {"max_loops": 4}):
        with pytest.raises(
            ValueError, match="supports neither injection nor a loop-index embedding: use"
        ):
            ModelConfig(BlockConfig(D, 2, 1, **options), 9, feedback="tokens")


def _without_rounds(samples: Samples, loops: int | None = None) -> Samples:
    """The problems alone."""
    counts = samples.loops if loops is None else np.full_like(samples.loops, loops)
    offsets = np.zeros(int(counts.sum()) + 1, np.int64)
    values = {name: getattr(samples, name) for name in Samples.__dataclass_fields__}
    return Samples(
        **{**values, "rounds": samples.rounds[:0], "round_offsets": offsets, "loops": counts}
    )


def test_what_does_not_serve_says_why() -> None:
    model = new_model()
    assert feedback_reason(LoopedTransformer(ModelConfig(BlockConfig(D, 2, 1), 9)).config) is None
    assert "does not support feedback = 'tokens'" in feedback_reason(model.config)
    assert "no fixed shape yet" in cuda_graph.feedback_graph_reason(model)
    said = "; the whole-loop kernel does not support feedback = 'tokens'"
    for device in ("cpu", "meta"):
        assert explain(device, feedback="tokens") == explain(device) + said
        assert "whole-loop" not in explain(device)


def test_empty_batch() -> None:
    none = mixed().take(slice(0, 0))
    batch = PackedBatch.side_by_side(none, TASKS)
    loss = new_model(feedback_noise=0.5).loss(batch).loss
    assert loss.item() == 0 and len(batch) == 0
    assert new_model(carry_state=True).loss(PackedBatch.carried(none, TASKS)).loss.item() == 0
    assert len(generate_looped_chains(new_model(), none, TASKS)) == 0
    assert copy.copy(batch).to("cpu") is not None
