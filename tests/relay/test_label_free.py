"""The label-free filter of models without an answer head: its bound, and where it is kept."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from relay_fast.decoding import chains
from relay_fast.decoding.confidence import generate_confident
from relay_fast.generate import main as generate
from relay_fast.relay import filter_metrics, label_free, resumable_chains
from relay_fast.relay.chain_dataset import ChainDataset, kept_bounds, read_manifest, write_dataset
from relay_fast.relay.presets import load_preset, override
from relay_fast.relay.resumable_chains import generate_confident_in_parts
from relay_fast.tasks import Samples
from relay_fast.train import train
from tests.support.chain_models import looped_model as latent_model
from tests.support.fed_models import TASKS, mixed, new_model

RANGES = dict.fromkeys(TASKS, (1, 4))


@pytest.fixture
def graded(monkeypatch):
    """Chains are the truth, but every fourth has a wrong token; the confidence is -0.001 · index,
    and -1 lower for wrong ones."""

    def write(model, problems, tasks, **options) -> tuple[Samples, np.ndarray]:
        rounds, number = problems.rounds.copy(), np.arange(len(problems))
        starts = problems.round_offsets[problems.first_round[:-1]]
        rounds[starts[::4]] += 1
        confidence = -0.001 * number - (number % 4 == 0)
        return replace(problems, rounds=rounds), confidence.astype(np.float32)

    monkeypatch.setattr(label_free, "generate_confident", write)


def test_the_bound_is_what_the_right_chains_inside_the_range_reach(graded) -> None:
    bounds = label_free.confidence_bounds(new_model(), TASKS, RANGES, seed=0)
    # 192 of 256 are right, the last ones number 255, 254, 253; 1 % of the 191 steps between them
    # is one step. fp32's -0.254 is a little less, and the bound is rounded downwards.
    assert bounds == dict.fromkeys(TASKS, -0.2541)
    assert label_free.confidence_bounds(latent_model(), TASKS, RANGES, seed=0) is None


def test_what_a_bound_means() -> None:
    text = "keeps chains of sums whose tokens are each at least 0.779 likely, as 99% of the right"
    assert text in label_free.bound_text("sums", -0.25)
    nothing = label_free.bound_text("sums", label_free.UNREACHABLE)
    assert "keeps no chain of sums: none was right inside" in nothing
    assert "each at least 1 likely" in label_free.bound_text("sums", 0.0)


def test_where_nothing_is_right_nothing_is_kept(monkeypatch, graded) -> None:
    never = lambda written, truth: np.zeros(len(truth), bool)
    monkeypatch.setattr(label_free, "correct_chains", never)
    bounds = label_free.confidence_bounds(new_model(), TASKS, RANGES, 0)
    assert set(bounds.values()) == {label_free.UNREACHABLE}
    certain = np.zeros(
        len(mixed(8)), np.float32
    )  # a log-probability of 0: as sure as fp32 can tell
    assert not label_free.label_free(mixed(8), TASKS, certain, bounds).any()
    assert label_free.label_free(mixed(8), TASKS, certain, dict.fromkeys(TASKS, 0.0)).all()


def test_the_problems_are_of_the_longest_lengths_that_there_are() -> None:
    task = TASKS["arithmetic"]
    assert label_free._inside_problems(task, 1, 5, 7, seed=0).length.tolist() == [5] * 7

    class Few:
        """At most two unseen problems of each length."""

        lengths_between = task.lengths_between
        sample = task.sample

        def unseen(self, length, number, seed):
            return task.unseen(length, min(number, self.most), seed)

    few = Few()
    few.most = 2
    assert label_free._inside_problems(few, 2, 5, 5, seed=0).length.tolist() == [5, 5, 4, 4, 3]
    few.most = 0
    assert label_free._inside_problems(few, 2, 5, 3, seed=0).length.tolist() == [5, 5, 5]


def test_a_chain_must_reach_the_bound_of_its_task_and_be_readable() -> None:
    truth = mixed(4)
    confidence = np.linspace(-1, 0, len(truth)).astype(np.float32)
    bounds = {name: -0.5 for name in TASKS} | {"lis": -0.1}
    written = replace(truth, answer=np.where(np.arange(len(truth)) == 7, -1, truth.answer))
    kept = label_free.label_free(written, TASKS, confidence, bounds)
    least = np.where(truth.task == TASKS["lis"].index, -0.1, -0.5)
    assert kept.tolist() == ((confidence >= least) & (np.arange(len(truth)) != 7)).tolist()
    assert label_free.label_free(truth, TASKS).all(), "without a bound the answer alone decides"


def test_parts_keep_their_confidence(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(resumable_chains, "SAVE_EVERY", 0.0)
    monkeypatch.setitem(chains.BATCH_TOKENS, "cpu", 60)
    model, problems = new_model().eval(), mixed(8)
    written, confidence = generate_confident(model, problems, TASKS)
    stem = tmp_path / "chains"
    generate_confident_in_parts(model, problems, TASKS, stem)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 3
    files[-1].unlink()
    samples = resumable_chains.load_confident(files[2])[0]
    resumable_chains.save_samples(files[2], samples, {})  # as an earlier version wrote it
    found, own = generate_confident_in_parts(model, problems, TASKS, stem)
    assert np.array_equal(found.rounds, written.rounds) and np.array_equal(own, confidence)


def test_a_folder_of_chains_keeps_its_bounds(tmp_path) -> None:
    model, counts = new_model().eval(), {"arithmetic": {2: 12, 4: 12}}
    options = {"seed": 1, "verify": "self", "shard_chains": 8}
    bounds = {"arithmetic": -3.25}
    manifest = write_dataset(tmp_path / "a", model, TASKS, counts, bounds=bounds, **options)
    assert manifest["identity"]["bounds"] == kept_bounds(tmp_path / "a") == bounds
    written = ChainDataset(tmp_path / "a", only_passed=False)[:]
    again, confidence = generate_confident(model, written, TASKS)
    assert np.array_equal(again.rounds, written.rounds)
    passed = len(ChainDataset(tmp_path / "a"))
    assert passed == label_free.label_free(written, TASKS, confidence, bounds).sum()
    counted = filter_metrics.from_json(manifest["counts"])["arithmetic"]
    assert sum(c.kept for c in counted.values()) == passed < len(written)
    # Continued with other bounds, it is the same folder; without any, all readable chains pass.
    (tmp_path / "a" / "shard-00001.safetensors").unlink()
    other = {"arithmetic": 0.0}
    assert write_dataset(tmp_path / "a", model, TASKS, counts, bounds=other, **options) == manifest
    write_dataset(tmp_path / "b", model, TASKS, counts, **options)
    assert "bounds" not in read_manifest(tmp_path / "b")["identity"]
    assert len(ChainDataset(tmp_path / "b")) == label_free.label_free(written, TASKS).sum()


def test_a_run_measures_the_filter_and_generate_uses_it(tmp_path, capsys) -> None:
    values = ["workers=1", "model.d_model=16", "model.n_heads=2", "model.n_layers=1"]
    config = override(load_preset("cpu"), steps=2, batch_size=8, eval_problems=3, values=values)
    run = tmp_path / "run"
    results = train(config, run, stages=["chains"], print_table=False)
    bounds = results["filter"]["bounds"]
    assert bounds == {"arithmetic": label_free.UNREACHABLE}  # two steps teach nothing
    command = ["--out", str(run), "--task", "arithmetic", "--lengths", "9", "--number", "4"]
    capsys.readouterr()
    assert generate([*command, "--dataset", str(tmp_path / "set")]) == 0
    assert kept_bounds(tmp_path / "set") == bounds
    said = label_free.bound_text("arithmetic", bounds["arithmetic"])
    assert said in capsys.readouterr().out
    assert generate([*command, "--export", str(tmp_path / "out.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    with_bound = ChainDataset(tmp_path / "set", only_passed=False).parts()
    assert [line["passed"] for line in lines] == np.concatenate(
        [part.passed for part in with_bound]
    ).tolist()
