"""Rounds fed back as tokens: what is fed, the loss side by side, generation, refusals."""

import copy
import warnings

import numpy as np
import pytest
import torch

from benchmarks.numerics import assert_bitwise, assert_close
from relay_fast.batch.packed import PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.data.feedback import places_of
from relay_fast.data.streams import BatchFormat, TruthStream
from relay_fast.decoding.chains import generate_looped_chains, generate_scored, stream_chains
from relay_fast.engine.fused_inference import feedback_reason
from relay_fast.functional import row_cross_entropy
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.relay.presets import load_preset, override
from relay_fast.relay.stages import Context, run_stage
from relay_fast.tasks import TASK_NAMES, Samples, Task, Vocabulary, build_tasks
from relay_fast.tasks.vocabulary import BAR, PAD
from relay_fast.training import cuda_graph
from relay_fast.training.model_files import load_model, model_hash, save_model
from relay_fast.training.schedule import Schedule
from relay_fast.training.trainer import train_model

VOCABULARY = Vocabulary(49, 1)
TASKS = build_tasks(
    TASK_NAMES, VOCABULARY,
    arithmetic={"prime": 11}, edit_distance={"letters": 4, "alphabet": [2, 4]},
    lis={"group": 3, "low": 0, "high": 49},
)  # fmt: skip
D = 16


def mixed(each: int = 4) -> Samples:
    rng = np.random.default_rng(0)
    return Samples.concat(
        [
            TASKS[name].sample(rng.integers(1, most, each), seed=1)
            for name, most in (("arithmetic", 6), ("edit_distance", 6), ("lis", 14))
        ]
    )


def new_model(**options) -> LoopedTransformer:
    """A model that writes `<pad>` now and then, so that its rounds begin anywhere."""
    torch.manual_seed(1)
    model = LoopedTransformer(
        ModelConfig(BlockConfig(D, 2, 2), VOCABULARY.size, feedback="tokens", **options)
    )
    with torch.no_grad():
        model.chain_head.weight[PAD] *= 2.5
    return model


def seen(name: str, problem: str, width: int) -> list[str]:
    """What each iteration of a problem is fed, in an input of `width` tokens."""
    task = TASKS[name]
    ids = np.array(task.encode(problem), np.int32)
    one = task.sample([task.length_of(ids)], 0)
    problems = Samples(
        one.task, one.length, ids, np.array([0, len(ids)]), one.rounds, one.round_offsets,
        one.loops, one.answer,
    )  # fmt: skip
    pad = np.array([width - max(len(ids), task.min_input_tokens)])
    batch = PackedBatch.side_by_side(task.solve_samples(problems), TASKS, extra_pad=pad)
    fed = batch.fed.view(-1, width).tolist()
    return [VOCABULARY.decode(row).replace("<pad>", "_") for row in fed]


def test_arithmetic_is_fed_the_expression_that_is_left() -> None:
    #                                   [ARI] _ _ 3 * 2 + 6 / 3 =
    assert seen("arithmetic", "3*2+6/3=", 11) == [
        "_ _ _ _ _ _ _ _ _ _ _",
        "_ _ _ _ _ 6 + 6 / 3 =",
        "_ _ _ _ _ _ _ 6 + 2 =",
    ]


def test_edit_distance_is_fed_cells_under_their_letters_and_marks_under_those_used() -> None:
    #                                  [ED] _ a b | b a b <sep>
    assert seen("edit_distance", "ab|bab<sep>", 9) == [
        "_ _ _ _ _ _ _ _ _",
        "_ _ | _ _ 3 1 3 ,",
    ]


def test_lis_is_fed_every_length_under_its_value() -> None:
    #                                  [LIS] _ 5 7 6 8 9 <sep>
    assert seen("lis", "5 7 6 8 9 <sep>", 8) == [
        "_ _ _ _ _ _ _ _",
        "_ _ 1 2 2 _ _ _",
    ]
    assert seen("lis", "5 7 6 8 9 1 2 <sep>", 10)[2] == "_ _ 1 2 2 3 4 1 _ _"


def test_marks_are_of_the_first_string_alone() -> None:
    samples = TASKS["edit_distance"].sample([4, 2], 0)
    widths = np.diff(samples.problem_offsets) + [3, 0]
    places = places_of(samples, TASKS, widths)
    tokens = PackedBatch.looped(samples, TASKS, extra_pad=np.array([3, 0])).tokens.numpy()
    letters = tokens[places.token == BAR]
    first = [samples.problem_of(0)[1:5], samples.problem_of(1)[1:3]]
    assert letters.tolist() == np.concatenate(first).tolist()


def test_what_a_model_wrote_is_fed_as_the_truth_is() -> None:
    samples = mixed()
    extra = np.random.default_rng(2).integers(0, 4, len(samples))
    truth = PackedBatch.side_by_side(samples, TASKS, extra_pad=extra)
    batch = PackedBatch.looped(samples, TASKS, extra_pad=extra, feedback=True)
    plan, fed = batch.plan, batch.feeder.start()
    expected = _true_feed(samples, truth)
    for t in range(1, plan.max_loops + 1):
        for k in range(plan.active_sequences[t - 1]):
            rows = slice(plan.offsets[k], plan.offsets[k + 1])
            assert fed[rows].tolist() == expected[int(batch.order[k]), t - 1].tolist()
        # What stands before the boundary <pad> is nobody's: it must not be fed.
        ids = torch.full((plan.rows_at(t),), 7)
        part = slice(*batch.row_offsets[t - 1 : t + 1])
        ids[batch.rows[part]] = batch.targets[part]
        fed = batch.feeder.after(t, ids, fed, plan.rows_at(t + 1))


def _true_feed(samples: Samples, batch: PackedBatch) -> dict[tuple[int, int], torch.Tensor]:
    """What each iteration of each sample is fed in a side-by-side batch."""
    split, owner, before = samples.iterations()
    order = np.argsort(before + 1 == samples.loops[owner], kind="stable")
    pieces = batch.fed.split(batch.plan.lengths.tolist())
    keys = zip(owner[order].tolist(), before[order].tolist(), strict=True)
    return dict(zip(keys, pieces, strict=True))


@pytest.mark.parametrize("weighting", ["sequence", "row"])
def test_side_by_side_is_the_loss_of_one_iteration_after_the_other(weighting: str) -> None:
    samples = mixed()
    extra = np.random.default_rng(3).integers(0, 5, len(samples))
    options = {
        "task_weights": {"lis": 2.0, "arithmetic": 0.5}, "chain_weight": 0.7,
        "weighting": weighting, "extra_pad": extra,
    }  # fmt: skip
    model = new_model().double()
    batch = PackedBatch.side_by_side(samples, TASKS, **options)
    losses = model.loss(batch)
    losses.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    looped = PackedBatch.looped(samples, TASKS, **options)
    feed = _true_feed(samples, batch)
    plan, chain, answer = looped.plan, 0.0, 0.0
    head = (model.norm.weight, model.chain_head.weight)
    for k, i in enumerate(looped.order.tolist()):
        rows = slice(int(plan.offsets[k]), int(plan.offsets[k + 1]))
        x = model.embedding(looped.tokens[rows])
        for t in range(1, int(plan.loops[k]) + 1):
            state = model.block((x + model.fed_embedding(feed[i, t - 1]))[None], 1)[0]
            part = slice(*looped.row_offsets[t - 1 : t + 1])
            own = (looped.rows[part] >= rows.start) & (looped.rows[part] < rows.stop)
            targets, weights = looped.targets[part][own], looped.weights[part][own].double()
            loss, _ = row_cross_entropy(state, looped.rows[part][own] - rows.start, targets, *head)
            chain = chain + (loss * weights).sum()
        loss, _ = row_cross_entropy(
            state, torch.tensor([len(state) - 1]), looped.answers[k : k + 1], model.norm.weight,
            model.answer_head.weight,
        )  # fmt: skip
        answer = answer + loss[0] * looped.answer_weights[k].double()
    assert_close("chain", losses.chain, chain.detach(), 1e-12)
    assert_close("answer", losses.answer, answer.detach(), 1e-12)
    (chain + answer).backward()
    for name, p in model.named_parameters():
        assert_close(name, ours[name], p.grad, 1e-12)
    assert len(batch) == len(samples) and sorted(batch.order) == list(range(len(samples)))


def test_parts_add_up_to_the_batch(monkeypatch) -> None:
    batch = PackedBatch.side_by_side(
        mixed(), TASKS, position_range=40, rng=np.random.default_rng(0)
    )
    model = new_model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    whole = cuda_graph.take_step(model, optimizer, batch)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    parts = list(batch.parts(100))
    assert len(parts) == 4 and max(part.plan.rows for part in parts) < 150
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
    problem = problems.problem_of(i).tolist()
    n = max(len(problem), task.min_input_tokens)
    body, texts, scores = problem[1:], [], []
    tokens = torch.tensor([problem[0], *[PAD] * (n - len(problem)), *body])
    positions = None
    if span := model.config.position_range:
        positions = torch.tensor([round(p * (span - 1) / max(1, n - 1)) for p in range(n)])
    with torch.no_grad():
        for _ in range(int(problems.loops[i])):
            fed = torch.full((n,), PAD)
            first = n - len(body)
            if texts and task.name != "lis":
                fed[n - len(texts[-1]) :] = torch.tensor(texts[-1], dtype=torch.long)
            if task.name == "edit_distance":
                fed[first : first + problems.length[i]] = PAD
                fed[first : first + len(texts)] = BAR
            if task.name == "lis":
                values = []
                for text in texts:
                    padded = [PAD] * (task.group + 1) + text
                    values += padded[len(padded) - task.group - 1 : -1]
                values = values[: len(body) - 1]
                fed[first : first + len(values)] = torch.tensor(values, dtype=torch.long)
            x = model.embedding(tokens) + model.fed_embedding(fed)
            state = model.block(x[None], 1, positions=positions)[0]
            y = torch.nn.functional.rms_norm(state, (D,), model.norm.weight, 1e-6)
            logits = model.chain_head(y)
            ids = logits.argmax(-1).tolist()
            begin = max((p + 1 for p, token in enumerate(ids) if token == PAD), default=0)
            texts.append(ids[begin:])
            scores += logits.log_softmax(-1)[range(begin, n), ids[begin:]].tolist()
        answer = int(model.answer_head(y[-1]).argmax())
    return texts, answer, scores


@pytest.mark.parametrize("position_range", [0, 30])
def test_generation_is_a_plain_loop_token_for_token(position_range: int) -> None:
    problems = mixed(8)
    model = new_model(position_range=position_range).eval()
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
    # The test means something: there are rounds of many sizes, and they differ between iterations.
    assert len(set(sizes)) > 5 and min(sizes) < 3
    assert any(len({tuple(r) for r in written.rounds_of(i)}) > 1 for i in range(len(problems)))
    at_once = generate_looped_chains(model, problems, TASKS)
    assert np.array_equal(at_once.rounds, written.rounds)
    for chosen, part in stream_chains(model, problems, TASKS, batch_tokens=100):
        assert np.array_equal(part.rounds, written.take(chosen).rounds)


def test_rounds_that_are_empty_or_have_no_end_are_fed_as_they_are() -> None:
    samples = TASKS["arithmetic"].sample([3, 2], 0)
    feeder = PackedBatch.looped(samples, TASKS, feedback=True).feeder
    n = int(np.diff(samples.problem_offsets)[0])
    rows = len(feeder.source)
    ids = torch.arange(rows) + 1
    assert torch.equal(feeder.after(1, ids, feeder.start(), rows), ids)
    ids[n - 1] = PAD  # of the first sequence alone
    fed = feeder.after(1, ids, feeder.start(), rows)
    assert not fed[:n].any() and torch.equal(fed[n:], ids[n:])
    assert len(feeder.after(1, ids, feeder.start(), n)) == n


def test_what_is_fed_matters() -> None:
    problems, model = mixed(8), new_model().eval()
    before = generate_looped_chains(model, problems, TASKS)
    with torch.no_grad():
        model.fed_embedding.weight[BAR:] += 1
    after = generate_looped_chains(model, problems, TASKS)
    changed = [
        not np.array_equal(a, b) for a, b in zip(_rounds(before), _rounds(after), strict=True)
    ]
    first = [t == 0 for n in problems.loops for t in range(n)]
    assert not any(c for c, f in zip(changed, first, strict=True) if f) and any(changed)


def _rounds(samples: Samples) -> list[np.ndarray]:
    return [text for i in range(len(samples)) for text in samples.rounds_of(i)]


def carried_pair(truth: float = 1.0) -> tuple[LoopedTransformer, PackedBatch]:
    samples = mixed()
    extra = np.random.default_rng(3).integers(0, 5, len(samples))
    batch = PackedBatch.carried(samples, TASKS, extra_pad=extra, truth=truth)
    return new_model(carry_state=True).double(), batch


@pytest.mark.parametrize("truth", [1.0, 0.0])
def test_carried_states_with_true_rounds_or_its_own(truth: float) -> None:
    """Against one sample after the other; without truth, what is fed is what the model reads."""
    model, batch = carried_pair(truth)
    losses = model.loss(batch)
    losses.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    samples, plan, total = mixed(), batch.plan, 0.0
    extra = np.random.default_rng(3).integers(0, 5, len(samples))
    feed = _true_feed(samples, PackedBatch.side_by_side(samples, TASKS, extra_pad=extra))
    read, answers = model.read(batch)
    head = (model.norm.weight, model.chain_head.weight)
    for k, i in enumerate(batch.order.tolist()):
        rows = slice(int(plan.offsets[k]), int(plan.offsets[k + 1]))
        state, own = model.embedding(batch.tokens[rows]), batch.feeder.start()
        for t in range(1, int(plan.loops[k]) + 1):
            fed = feed[i, t - 1] if truth else own[rows]
            state = model.block((state + model.fed_embedding(fed))[None], 1)[0]
            part = slice(*batch.row_offsets[t - 1 : t + 1])
            mine = (batch.rows[part] >= rows.start) & (batch.rows[part] < rows.stop)
            targets, weights = batch.targets[part][mine], batch.weights[part][mine].double()
            loss, _ = row_cross_entropy(state, batch.rows[part][mine] - rows.start, targets, *head)
            total = total + (loss * weights).sum()
            own = batch.feeder.after(t, read[t - 1], own, plan.rows_at(t + 1))
            if not truth:
                y = torch.nn.functional.rms_norm(state, (D,), model.norm.weight, 1e-6)
                assert torch.equal(model.chain_head(y).argmax(-1), read[t - 1][rows])
        loss, right = row_cross_entropy(
            state, torch.tensor([len(state) - 1]), batch.answers[k : k + 1], model.norm.weight,
            model.answer_head.weight,
        )  # fmt: skip
        total = total + loss[0] * batch.answer_weights[k].double()
        if not truth:
            assert bool(right) == bool(answers[k] == batch.answers[k])
    assert_close("loss", losses.loss, total, 1e-12)
    total.backward()
    for name, p in model.named_parameters():
        assert_close(name, ours[name], p.grad, 1e-12)


def test_a_share_of_the_sequences_is_fed_the_truth() -> None:
    model, batch = carried_pair(0.5)
    torch.manual_seed(0)
    losses = {round(model.loss(batch).loss.item(), 9) for _ in range(4)}
    torch.manual_seed(0)
    assert round(model.loss(batch).loss.item(), 9) in losses and len(losses) == 4


def test_noise_replaces_its_share_of_the_fed_tokens_in_training_only() -> None:
    batch = PackedBatch.side_by_side(TASKS["arithmetic"].sample([9] * 40, 0), TASKS)
    model = new_model(feedback_noise=0.25)
    clean = model.eval().embed(batch)
    assert_bitwise("eval", clean, model.embed(batch))
    changed = (model.train().embed(batch) != clean).any(1)
    assert not changed[batch.fed == PAD].any(), "what is fed nothing stays so"
    share = changed[batch.fed != PAD].float().mean().item()
    assert 0.15 < share < 0.25, "some of the tokens put in happen to be right"


def test_random_positions_ascend_inside_the_range_and_are_spread_without_an_rng() -> None:
    samples = TASKS["lis"].sample([2, 5, 9], 0)
    drawn = PackedBatch.looped(samples, TASKS, position_range=20, rng=np.random.default_rng(0))
    again = PackedBatch.looped(samples, TASKS, position_range=20, rng=np.random.default_rng(1))
    for part in drawn.plan.positions.split(drawn.plan.lengths.tolist()):
        assert (part.diff() > 0).all() and part[0] >= 0 and part[-1] < 20
    assert not torch.equal(drawn.plan.positions, again.plan.positions)
    spread = PackedBatch.looped(samples.take([1]), TASKS, position_range=20).plan.positions
    assert spread.tolist() == [0, 3, 6, 10, 13, 16, 19]
    with pytest.raises(ValueError, match="an input of 11 tokens has no room in position_range = 8"):
        PackedBatch.looped(samples, TASKS, position_range=8)


def test_a_small_model_learns_and_is_saved(tmp_path) -> None:
    task = build_tasks(["arithmetic"], VOCABULARY, arithmetic={"prime": 3, "operators": "+"})
    schedule = Schedule.by_steps(60, warmup=0.1, decay="late")
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
    longest = int(np.diff(problems.problem_offsets).max())
    text = f"longest input has {longest} tokens, the model was trained on up to {longest - 1} "
    with pytest.warns(UserWarning, match=text):
        generate_looped_chains(new_model(trained_tokens=longest - 1), problems, TASKS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_looped_chains(new_model(trained_tokens=longest), problems, TASKS)


class Silent(type(TASKS["arithmetic"])):
    fed_places = Task.fed_places


class TooFar(type(TASKS["lis"])):
    min_input_tokens = 4

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.min_input_tokens = 4


def test_bad_input() -> None:
    samples, plain = mixed(2), LoopedTransformer(ModelConfig(BlockConfig(D, 2, 1), VOCABULARY.size))
    fed = PackedBatch.side_by_side(samples, TASKS)
    silent = {**TASKS, "arithmetic": Silent(VOCABULARY, prime=11)}
    for pack in (PackedBatch.side_by_side, lambda *a: PackedBatch.looped(*a, feedback=True)):
        with pytest.raises(
            ValueError, match="'arithmetic' does not say what is fed back .*define S"
        ):
            pack(samples, silent)
    narrow = {"lis": TooFar(VOCABULARY, group=6, low=0, high=49)}
    one = narrow["lis"].sample([1], 0)
    with pytest.raises(ValueError, match="a round does not fit into its input: raise"):
        PackedBatch.side_by_side(one, narrow)
    with pytest.raises(ValueError, match="'lis' feeds the token 7 from the end .* of 4 tokens"):
        PackedBatch.looped(_without_rounds(one), narrow, feedback=True)
    with pytest.raises(ValueError, match="a sample without rounds has no iteration"):
        PackedBatch.side_by_side(_without_rounds(samples, loops=0), TASKS)
    with pytest.raises(ValueError, match="the batch has rounds that are fed back, the model takes"):
        plain.loss(fed)
    with pytest.raises(ValueError, match="learns from true rounds .* PackedBatch.side_by_side"):
        new_model().loss(PackedBatch.looped(samples, TASKS))
    with pytest.raises(ValueError, match=r"make the batch with PackedBatch.looped\(..., feedback"):
        new_model().read(PackedBatch.looped(samples, TASKS))
    with pytest.raises(ValueError, match='answers only .* use feedback = "none"'):
        LoopedTransformer(new_model().config, supervise="answer")
    block = BlockConfig(D, 2, 1)
    for options, message in (
        ({"feedback": "latent"}, "feedback = 'latent' is unknown: use one of"),
        ({"feedback_noise": 0.1}, "feedback_noise = 0.1 needs fed tokens"),
        ({"carry_state": True}, "carry_state = True says what feedback"),
        ({"feedback": "tokens", "feedback_noise": 1.0}, "feedback_noise = 1.0: it must be in"),
        ({"position_range": -1}, "position_range = -1: it must be 0 or more"),
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
        with pytest.raises(ValueError, match="makes every iteration the first: use"):
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
    assert "reads tokens in between" in feedback_reason(model.config)
    assert "no fixed shape yet" in cuda_graph.feedback_graph_reason(model)


def test_empty_batch() -> None:
    none = mixed().take(slice(0, 0))
    batch = PackedBatch.side_by_side(none, TASKS)
    loss = new_model(feedback_noise=0.5).loss(batch).loss
    assert loss.item() == 0 and len(batch) == 0
    assert new_model(carry_state=True).loss(PackedBatch.carried(none, TASKS)).loss.item() == 0
    assert len(generate_looped_chains(new_model(), none, TASKS)) == 0
    assert copy.copy(batch).to("cpu") is not None


def test_a_run_with_feedback(tmp_path) -> None:
    """The stages take it from the preset: the aligned looped model has it, the others do not."""
    values = [
        "model.feedback=tokens",
        "model.looped.feedback_noise=0.05",
        "model.position_range=40",
    ]
    config = override(load_preset("cpu"), steps=2, batch_size=8, eval_problems=2, values=values)
    context = Context(tmp_path, config, "cpu", "auto")
    (tmp_path / "checkpoints").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pad_to is as long as the longest test problem
        for stage in ("looped_aligned", "looped_vanilla", "ar_baseline", "evaluate.looped_aligned"):
            result = run_stage(context, stage, lambda progress: None)
    aligned = context.load("looped_aligned").config
    assert (aligned.feedback, aligned.feedback_noise, aligned.position_range) == (
        "tokens",
        0.05,
        40,
    )
    assert aligned.trained_tokens == 29
    unpadded = override(config, values=["stages.looped_aligned.pad_probability=0.0"])
    model = Context(tmp_path, unpadded, "cpu", "auto").new_model("looped")
    assert model.config.trained_tokens == context.tasks["arithmetic"].max_problem_tokens(10)
    assert context.load("looped_vanilla").config.feedback == "none"
    assert context.load("looped_vanilla").config.position_range == 40
    assert context.load("ar_baseline").config.position_range == 0
    assert set(result["accuracy"]["looped_aligned"]["arithmetic"]) == set(map(str, range(1, 14)))
    paper = Context(tmp_path, load_preset("paper"), "cpu", "auto").new_model("looped")
    assert paper.config.feedback == "none", "the paper's own is untouched"


def test_a_run_that_carries_the_state(tmp_path) -> None:
    values = ["model.feedback=tokens", "model.carry_state=true", "training.truth=0.2"]
    config = override(load_preset("cpu"), steps=3, batch_size=8, eval_problems=2, values=values)
    context = Context(tmp_path, config, "cpu", "auto")
    (tmp_path / "checkpoints").mkdir()
    for stage in ("looped_aligned", "looped_vanilla", "ar_baseline"):
        run_stage(context, stage, lambda progress: None)
    assert context.load("looped_aligned").config.carry_state
    assert not context.load("looped_vanilla").config.carry_state
    run_stage(context, "evaluate.looped_aligned", lambda progress: None)


@pytest.mark.parametrize(
    "value", ["model.feedback=state", "model.feedback_noise=1.0", "model.position_range=-1"]
)
def test_presets_refuse_values_out_of_range(value: str) -> None:
    with pytest.raises(ValueError, match=value.split("=")[0]):
        override(load_preset("cpu"), values=[value])


def test_a_position_range_that_is_too_small_is_said_before_training(tmp_path) -> None:
    config = override(load_preset("cpu"), values=["model.position_range=20"])
    with pytest.raises(ValueError, match="model.position_range = 20, the longest input has"):
        Context(tmp_path, config, "cpu", "auto").new_model("looped")
