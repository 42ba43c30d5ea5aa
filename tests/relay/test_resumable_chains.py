"""Chains in parts: those of one uninterrupted call, whatever happened on the way."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.decoding import chains
from relay_fast.decoding.chains import generate_looped_chains, stream_chains
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.relay import resumable_chains, stages
from relay_fast.relay.presets import load_preset, override
from relay_fast.relay.resumable_chains import generate_in_parts
from relay_fast.relay.stages import Context, run_stage, scratch_files
from relay_fast.tasks import Samples, Vocabulary, build_tasks
from relay_fast.training.model_files import save_model
from relay_fast.utils.tensor_files import CheckpointError
from tests.support.forked import fork

TASKS = build_tasks(
    ["arithmetic", "lis"],
    Vocabulary(max_number=60, multiple=1),
    arithmetic={"prime": 5},
    lis={"group": 4, "high": 60},
)


def make_model(seed: int = 0) -> LoopedTransformer:
    torch.manual_seed(seed)
    size = TASKS["lis"].vocabulary.size
    return LoopedTransformer(ModelConfig(BlockConfig(16, 2, 1), size, max_tokens=64))


def make_problems() -> Samples:
    """Of both tasks, in an order that no batch keeps."""
    rng = np.random.default_rng(0)
    problems = Samples.concat([t.sample(rng.integers(1, 9, 200), 1) for t in TASKS.values()])
    return problems.take(rng.permutation(len(problems)))


def same(a: Samples, b: Samples) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Samples))


@pytest.fixture
def often(monkeypatch):
    """A file for each batch, and small batches."""
    monkeypatch.setattr(resumable_chains, "SAVE_EVERY", 0.0)
    monkeypatch.setitem(chains.BATCH_TOKENS, "cpu", 200)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("chains.*.safetensors"))


def test_continuing_writes_the_rest_only(tmp_path, often, monkeypatch):
    model, problems = make_model(), make_problems()
    expected = generate_looped_chains(model, problems, TASKS)
    assert same(generate_in_parts(model, problems, TASKS, tmp_path / "chains"), expected)
    there = files(tmp_path)
    assert len(there) > 10
    for file in there[7:]:
        file.unlink()
    kept = [file.stat().st_mtime_ns for file in there[:7]]
    seen = []
    continued = generate_in_parts(
        model, problems, TASKS, tmp_path / "chains", lambda *a: seen.append(a)
    )
    assert same(continued, expected) and files(tmp_path) == there
    assert [file.stat().st_mtime_ns for file in there[:7]] == kept
    assert len(seen) == len(there) - 7 and seen[-1] == (len(problems), len(problems))

    monkeypatch.setattr(
        model, "predict_rounds", lambda batch: pytest.fail("all was written already")
    )
    assert same(generate_in_parts(model, problems, TASKS, tmp_path / "chains"), expected)


def test_batches_from_any_on_are_those_of_the_whole(often):
    model, problems = make_model(), make_problems()
    whole = list(stream_chains(model, problems, TASKS))
    first = sum(len(chosen) for chosen, _ in whole[:4])
    rest = list(stream_chains(model, problems, TASKS, first=first))
    assert [chosen.tolist() for chosen, _ in rest] == [chosen.tolist() for chosen, _ in whole[4:]]


def test_another_model_begins_anew(tmp_path, often):
    problems, (one, other) = make_problems(), (make_model(0), make_model(1))
    generate_in_parts(one, problems, TASKS, tmp_path / "chains")
    written = generate_in_parts(other, problems, TASKS, tmp_path / "chains")
    assert same(written, generate_looped_chains(other, problems, TASKS))


def test_other_problems_begin_anew(tmp_path, often):
    model, problems = make_model(), make_problems()
    generate_in_parts(model, problems, TASKS, tmp_path / "chains")
    others = problems.take(slice(1, None))
    written = generate_in_parts(model, others, TASKS, tmp_path / "chains")
    assert same(written, generate_looped_chains(model, others, TASKS))


def test_few_chains_and_none_leave_no_file(tmp_path):
    problems = make_problems()
    for some in (problems.take(slice(0, 5)), problems.take(slice(0, 0))):
        written = generate_in_parts(make_model(), some, TASKS, tmp_path / "chains")
        assert same(written, generate_looped_chains(make_model(), some, TASKS))
    assert not files(tmp_path)


def test_files_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable_chains, "PART_TOKENS", 300)
    monkeypatch.setitem(chains.BATCH_TOKENS, "cpu", 200)
    generate_in_parts(make_model(), make_problems(), TASKS, tmp_path / "chains")
    assert len(files(tmp_path)) > 5


def test_a_damaged_file(tmp_path, often):
    generate_in_parts(make_model(), make_problems(), TASKS, tmp_path / "chains")
    file = files(tmp_path)[3]
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=f"{file.name} is truncated or not a safetensors"):
        generate_in_parts(make_model(), make_problems(), TASKS, tmp_path / "chains")


def test_killed_at_random_moments(tmp_path, often, monkeypatch):
    monkeypatch.setitem(chains.BATCH_TOKENS, "cpu", 100)
    model, problems = make_model(), make_problems()
    writer = lambda: generate_in_parts(model, problems, TASKS, tmp_path / "chains")
    rng = random.Random(0)
    before: list[Path] = []
    for _ in range(4):
        target, deadline = len(before) + rng.randint(0, 6), time.monotonic() + 60
        child = fork(writer)
        while len(files(tmp_path)) < target and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.02)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, "killed before it was done"
        there = files(tmp_path)
        assert len(there) >= target and there[: len(before)] == before
        before = there
    written = generate_in_parts(model, problems, TASKS, tmp_path / "chains")
    assert same(written, generate_looped_chains(model, problems, TASKS))
    assert 0 < len(before) < len(files(tmp_path))


def test_the_stage_goes_on_where_it_was_interrupted(tmp_path, often, monkeypatch):
    monkeypatch.setattr(stages, "LOG_EVERY", 0.0)
    config = override(load_preset("cpu"), steps=2)
    config["tasks"]["arithmetic"]["merge_beyond"] = [60, 60, 60]
    results = []
    for name in ("whole", "interrupted"):
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        context = Context(folder, config, "cpu", "torch")
        save_model(folder / "looped_aligned.safetensors", context.new_model("looped"), {})
        seen = []

        def report(progress, seen=seen, name=name):
            seen.append(progress)
            if name == "interrupted" and len(seen) == 8:
                raise KeyboardInterrupt

        if name == "interrupted":
            with pytest.raises(KeyboardInterrupt):
                run_stage(context, "chains", report)
            assert len(scratch_files(folder, "chains")) == 7
            assert not (folder / "chains.safetensors").exists()
        results.append(run_stage(context, "chains", report))
    whole, interrupted = (
        tmp_path / name / "chains.safetensors" for name in ("whole", "interrupted")
    )
    assert whole.read_bytes() == interrupted.read_bytes() and results[0] == results[1]
