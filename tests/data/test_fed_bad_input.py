"""What is wrong in samples, draws and a user's own task is named before a model sees it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from relay_fast.batch.packed import PackedBatch
from relay_fast.data.feedback import arranged_inputs
from relay_fast.data.streams import BatchFormat, SampleStream, TruthStream
from relay_fast.decoding.chains import generate_looped_chains
from relay_fast.tasks import Arithmetic, FeedbackDraws, Inputs, build_tasks
from relay_fast.tasks.feedback import right_aligned
from relay_fast.tasks.vocabulary import Vocabulary
from relay_fast.training.schedule import Schedule
from tests.support.fed_models import TASKS, VOCABULARY, mixed, new_model

PROBLEMS = TASKS["arithmetic"].sample([3, 2, 1, 3], 0)
ITERATIONS = int(PROBLEMS.loops.sum())


def own_task(**methods) -> dict:
    """The tasks, of which arithmetic has methods of its own."""
    kind = type("Own", (Arithmetic,), methods)
    return {**TASKS, "arithmetic": kind(VOCABULARY, prime=11)}


def changed(**fields) -> dict:
    """Arithmetic whose inputs have changed fields, each given as a function of the right one."""

    def inputs(self, *arguments) -> Inputs:
        made = Arithmetic.inputs(self, *arguments)
        return made._replace(**{name: f(getattr(made, name)) for name, f in fields.items()})

    return own_task(inputs=inputs)


def sized(change) -> dict:
    return own_task(input_sizes=lambda self, *own: change(Arithmetic.input_sizes(self, *own)))


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (changed(tokens=lambda x: x[:-1]), r"the tokens of inputs have shape \(\d+,\)"),
        (changed(fed=lambda x: x[None]), r"the fed tokens of inputs have shape \(1, \d+\)"),
        (changed(fed=lambda x: x + 0.5), "the fed tokens of inputs have .*type float64: give"),
        (changed(fed=lambda x: x - 1), "the fed tokens of inputs hold -1: they must be 0 or more"),
        (changed(positions=lambda x: np.arange(3)), r"the positions of inputs have shape \(3,\)"),
        (changed(cuts=lambda x: np.ones(2, int)), r"the cuts of inputs have shape \(2,\)"),
        (own_task(inputs=lambda *_: None), r"inputs returned None: return Inputs\(tokens, fed\)"),
        (sized(lambda sizes: sizes[:1]), r"input_sizes have shape \(1,\) and type int64: give"),
        (sized(lambda sizes: sizes * 1.0), "input_sizes have shape .* type float64: give"),
        (sized(lambda sizes: sizes * 0), "input_sizes hold 0: they must be 1 or more"),
    ],
)
def test_inputs_of_a_wrong_shape_or_kind_are_named(tasks: dict, said: str) -> None:
    for use in (
        lambda: PackedBatch.side_by_side(PROBLEMS, tasks),
        lambda: generate_looped_chains(new_model(), PROBLEMS, tasks),
    ):
        with pytest.raises(ValueError, match=f"task 'arithmetic': {said}"):
            use()


def test_a_fed_round_that_is_longer_than_its_input_is_named() -> None:
    """It would be written over the input before it."""
    narrow = sized(lambda sizes: np.minimum(3, sizes))
    for use in (
        lambda: PackedBatch.side_by_side(PROBLEMS, narrow),
        lambda: generate_looped_chains(new_model(), PROBLEMS, narrow),
    ):
        with pytest.raises(
            ValueError, match="tokens do not fit into an input of 3: let the task's"
        ):
            use()
    widths, starts = np.array([4, 4]), np.array([0, 8])
    with pytest.raises(ValueError, match="^7 tokens do not fit into an input of 4"):
        right_aligned(widths, np.arange(20), starts, np.array([2, 7]))
    laid = right_aligned(widths, np.arange(20), starts, np.array([1, 4]))
    assert laid.tolist() == [0, 0, 0, 0, 8, 9, 10, 11]


def test_an_arrangement_of_a_wrong_shape_is_named() -> None:
    def arrangement(self, problems, widths):
        own = Arithmetic.arrangement(self, problems, widths)
        return own._replace(fed=own.fed[0])

    tasks = own_task(arrangement=arrangement)
    rows = int(np.diff(PROBLEMS.problem_offsets).sum())
    said = rf"'arithmetic': fed of its arrangement has shape \({rows},\): give \(3, {rows}\)"
    with pytest.raises(ValueError, match=said):
        arranged_inputs(PROBLEMS, tasks)
    tasks = own_task(arrangement=lambda *_: (1, 2))
    with pytest.raises(
        TypeError, match="arrangement of task 'arithmetic' is an object of type tup"
    ):
        arranged_inputs(PROBLEMS, tasks)


def test_samples_whose_tokens_are_no_integers_are_refused() -> None:
    samples = mixed(2)
    for name in ("problem", "rounds", "answer"):
        wrong = replace(samples, **{name: getattr(samples, name) + 0.5})
        for make in (PackedBatch.side_by_side, PackedBatch.carried, PackedBatch.autoregressive):
            with pytest.raises(TypeError, match=f"samples.{name} is float64: give token ids, wh"):
                make(wrong, TASKS)


def test_draws_and_padding_that_would_be_ignored() -> None:
    samples, cut, rng = mixed(2), FeedbackDraws(cut=5), np.random.default_rng(0)
    side, looped = PackedBatch.side_by_side, PackedBatch.looped
    for error, use, said in (
        (
            ValueError,
            lambda: side(samples, TASKS, draws={"ari": cut}, rng=rng),
            "draws names 'ari'",
        ),
        (TypeError, lambda: side(samples, TASKS, draws={"lis": 5}, rng=rng), r"draws\['lis'\] is"),
        (TypeError, lambda: side(samples, TASKS, draws=cut, rng=rng), "draws is an object of type"),
        (
            TypeError,
            lambda: side(samples, TASKS, draws={"lis": FeedbackDraws()}),
            "rng of draws is",
        ),
        (TypeError, lambda: looped(samples, TASKS, cut=cut), "rng of cut is None: give numpy.rand"),
        (TypeError, lambda: looped(samples, TASKS, cut=3, rng=rng), "cut is an object of type int"),
        (
            ValueError,
            lambda: looped(samples, TASKS, extra_pad=np.ones(1, int)),
            r"extra_pad has sh",
        ),
        (
            ValueError,
            lambda: looped(samples, TASKS, extra_pad=-np.ones(6, int)),
            "least value -1: ",
        ),
        (ValueError, lambda: looped(samples, TASKS, extra_pad=np.ones(6)), "type float64"),
    ):
        with pytest.raises(error, match=said):
            use()
    for name, value in (("cut", 2.5), ("pad_to", True), ("shift", "3"), ("cut", float("nan"))):
        with pytest.raises(ValueError, match=f"{name} = .*: it must be a whole number"):
            FeedbackDraws(**{name: value})
    with pytest.raises(ValueError, match="pad_probability = nan: it must be finite"):
        FeedbackDraws(pad_probability=float("nan"))
    assert FeedbackDraws(cut=np.int64(3), pad_probability=1).cut == 3


def stream(form: BatchFormat, **options) -> TruthStream:
    task = {"arithmetic": TASKS["arithmetic"]}
    schedule = Schedule.by_steps(5)
    return TruthStream(
        task, {"arithmetic": (1, 3)}, form, schedule, batch_size=4, seed=0, **options
    )


def test_shares_of_a_stream_are_checked_when_it_is_made() -> None:
    latent, carried = BatchFormat("looped"), BatchFormat("looped", feedback=True, carry_state=True)
    for name, form in (("truth", carried), ("pad_probability", latent), ("curriculum", latent)):
        kinds = {-0.5: "lie in", 2: "lie in", float("nan"): "be finite", "x": "be a number"}
        for value, said in kinds.items():
            with pytest.raises(ValueError, match=f"{name} = {value!r}: it must {said}"):
                stream(form, **{name: value})
    with pytest.raises(ValueError, match="pad_probability = 0.5: iterations .* are padded each"):
        stream(BatchFormat("looped", feedback=True), pad_probability=0.5, pad_to=30)


def test_the_share_of_true_rounds_falls_from_one_to_what_is_asked() -> None:
    carried = BatchFormat("looped", feedback=True, carry_state=True)
    for last in (0.0, 0.2):
        falling = stream(carried, truth=last)
        progress = falling.schedule.progress
        shares = [falling[step].batch.truth for step in range(5)]
        assert shares == [1 - (1 - last) * float(p) for p in progress]
        assert shares[0] == 1 and sorted(set(shares), reverse=True) == shares and shares[-1] >= last
    assert stream(carried)[4].batch.truth == 1


def test_a_fixed_set_of_samples_is_drawn_for_too() -> None:
    samples = TASKS["arithmetic"].sample([3] * 8, 0)
    form = BatchFormat("looped", feedback=True, draws={"arithmetic": FeedbackDraws(1.0, 40)})
    fixed = SampleStream(
        samples, TASKS, form, Schedule.by_steps(2), batch_size=8, seed=0, longest_true={}
    )
    first, again, other = (fixed[step].batch.plan.lengths.tolist() for step in (0, 0, 1))
    assert first == again != other and max(first) > np.diff(samples.problem_offsets).max()


def test_numbers_that_are_fed_beyond_the_vocabulary_are_refused() -> None:
    """Behind the last number stand other tokens, which a model would be fed without a word."""
    parameters = {"letters": 4, "alphabet": [2, 4], "border": 5, "insert": 1, "delete": 1}
    tasks = build_tasks(["edit_distance"], Vocabulary(30, 64), edit_distance=parameters)
    short, long = (tasks["edit_distance"].sample([n] * 3, 0) for n in (4, 6))
    model = new_model()
    assert len(generate_looped_chains(model, short, tasks)) == 3  # row 0 ends at 30
    for use in (
        lambda: generate_looped_chains(model, long, tasks),
        lambda: PackedBatch.side_by_side(long, tasks),
        lambda: arranged_inputs(long, tasks),
    ):
        with pytest.raises(ValueError, match="row 0 of the table, here up to .* ends at 30: use"):
            use()
