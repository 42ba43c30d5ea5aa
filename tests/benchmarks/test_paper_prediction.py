"""What the paper's experiment should take on a card: sums that can be checked by hand."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.card import predict
from benchmarks.card.predict import Training, Writing
from relay_fast.relay.presets import load_preset, override
from relay_fast.relay.stages import Context
from tests.support.fresh_python import run_fresh


def context(**options) -> Context:
    config = override(load_preset("paper-fast"), **options)
    return Context(Path("nowhere"), config, "cpu", "triton")


def test_what_is_written_is_counted_by_task_and_length() -> None:
    own = context(tasks=["lis"])
    one = predict.writing(own, [("lis", 10, 1)])
    two = predict.writing(own, [("lis", 10, 3), ("lis", 120, 2)])
    # 10 values, <sep>, the answer, <eos>.
    assert one.tokens == 13 and two.tokens == 3 * 13 + 2 * (12 * 11 + 2) and two.chains == 5
    # 256 positions of 2 · 3 layers · 256 numbers of 4 bytes, 13 times.
    seconds = 13 * 256 * 2 * 3 * 256 * 4 / (4.3e12 * predict.ROWS_AT_WORK)
    assert one.autoregressive == pytest.approx(seconds)
    # 12 problem tokens, one iteration, 3 layers of 12 · 256² weights.
    work = 2 * 12 * 3 * 12 * 256**2
    assert one.looped == pytest.approx(work / (67e12 * predict.FP32_SHARE), rel=0.1)


def test_sets_are_those_of_the_preset() -> None:
    sets = predict.sets(context(scale=0.001))
    tasks = load_preset("paper-fast")["tasks"].values()
    lengths = sum(task["test"][1] for task in tasks)
    assert sets["evaluation"].chains == lengths  # one problem a length
    assert sets["chains"].chains == sum(
        int(np.ceil(n / 1000)) for task in tasks for n in task["merge_beyond"]
    )
    own = [-(-n // 1000) * (k + 1) for task in tasks for k, n in enumerate(task["self_counts"])]
    assert sets["self chains"].chains == sum(own)


def test_the_whole_is_the_sum_of_its_stages() -> None:
    training = {name: Training(name, 8, 10, 1, 1.0, 1.0, 0.5, 1, 1.0) for name in predict.KIND}
    written = {
        "evaluation": Writing(1, 1, 7.0, 3.0, 2.0), "chains": Writing(1, 1, 0.0, 11.0, 4.0),
        "self chains": Writing(1, 1, 13.0, 17.0),
    }  # fmt: skip
    found = predict.stages(training, written, phases=5)
    assert found["looped_vanilla"] == 5 + 3 + 2 * predict.BEGIN
    assert found["looped_aligned"] == found["looped_vanilla"] + 2  # the inputs of its iterations
    assert found["ar_self_loop"] - found["ar_self_truth"] == 17
    assert found["ar_self_truth"] == 5 * 5 + 13 + 7 + 2 * predict.BEGIN
    assert found["chains"] == 11 + 4 + predict.BEGIN
    second = found.pop("looped model, second seed")
    assert second == found["looped_aligned"]
    assert found.pop("all") == pytest.approx(sum(found.values()))


def test_what_was_measured_stands_beside_it() -> None:
    entry = lambda step, seconds: {"step": step, "seconds": seconds}
    results = {
        "history": {
            "looped_aligned": [entry(1, 30.0), entry(51, 31.0), entry(101, 34.0)],  # 30 s to begin
            "ar_self_loop": [entry(1, 5.0), entry(3, 5.2), entry(1, 9.0), entry(3, 9.2)],
            "ar_relay": [entry(1, 9.0)],  # nothing to tell yet
        },
        "training": {
            name: {"data_wait_share": 0.125, "cuda_graph": "replayed"}
            for name in ("looped_aligned", "ar_self_loop", "ar_relay")
        },
        "versions": {"device_name": "NVIDIA H200", "commit": "abc"},
    }
    found = predict.measured_steps(results)
    assert found == {
        "looped_aligned": (pytest.approx(0.04), 0.125), "ar_self_loop": (pytest.approx(0.1), 0.125),
    }  # fmt: skip
    training = {name: Training(name, 8, 10, 1, 2e12, 0.04, 0.02, 1, 1.0) for name in predict.KIND}
    text = predict.compared(training, results)
    (line,) = (row for row in text.splitlines() if row.startswith("| looped_aligned"))
    # Of 2 TFLOP half, in 0.04 s: 25 TFLOP/s of 790.
    assert line == "| looped_aligned | 20 | 40 | 2.00× | 25 | 3.2% | 12.5% | replayed |"
    assert "NVIDIA H200, commit abc" in text


SMALL = """
from benchmarks.card import predict
from relay_fast.relay.presets import load_preset, override
from relay_fast.relay.stages import Context
from pathlib import Path
found = []
for place in (0.0, 0.9):
    config = override(load_preset("paper-fast"), batch_size=6, tasks=["arithmetic"])
    config["stages"]["looped_aligned"]["curriculum"] = place
    own = Context(Path("nowhere"), config, "cpu", "triton")
    found.append(predict.training(predict.latent(own), "looped_aligned"))
whole, growing = found
assert whole.mean == whole.longest > growing.mean > 0, found  # shorter problems are quicker
assert whole.batch == 6 and whole.steps == config["stages"]["looped_aligned"]["steps"]
assert whole.nodes > 500 and whole.memory > 1e6 and whole.flops > 1e9, whole

config["stages"]["looped_aligned"]["curriculum"] = 0.0
own = Context(Path("nowhere"), config, "cpu", "triton")
once = predict.training(own, "looped_aligned")
assert predict.fed(own, "looped_aligned") and not predict.fed(own, "looped_vanilla")
assert once.batch == 6 and once.mean == once.longest < whole.longest, once
assert once.nodes < whole.nodes / 3, once  # one pass, whatever the number of iterations
stream = predict.stream_of(own, "looped_aligned")
step = stream[len(stream) - 1].batch
assert once.token_iterations == step.plan.token_iterations == step.plan.rows
predict.PART_TOKENS["cuda"] = step.plan.rows // 2 + 60  # two parts: every layer twice
twice = predict.training(own, "looped_aligned")
assert 2 <= twice.nodes / once.nodes < 2.2, (once, twice)  # and the gradients are added up
assert 0.4 < twice.memory / once.memory < 0.6, (once, twice)
assert twice.flops >= once.flops
"""


def test_steps_of_a_growing_curriculum_and_of_iterations_side_by_side_are_quicker() -> None:
    done = run_fresh(SMALL, environment={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr[-2000:]
