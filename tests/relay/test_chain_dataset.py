"""Folders of chains: what is in them, how they are continued, what is refused."""

from __future__ import annotations

import errno
import json
import pickle
import random
import signal
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.data.streams import BatchFormat, SampleStream
from relay_fast.decoding.chains import generate_looped_chains
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.relay import chain_dataset, chain_parts
from relay_fast.relay.chain_dataset import (
    ChainDataset,
    DatasetError,
    read_manifest,
    shard_path,
    write_dataset,
)
from relay_fast.tasks import TASK_NAMES, Samples, Vocabulary, build_tasks
from relay_fast.tasks.verify import verify_chains
from relay_fast.training.schedule import Schedule
from relay_fast.utils import tensor_files
from relay_fast.utils.seeds import DATASET_SEED_OFFSET
from relay_fast.utils.tensor_files import CheckpointError
from tests.support.forked import fork

VOCABULARY = Vocabulary(max_number=60, multiple=1)
TASKS = build_tasks(
    ["arithmetic", "lis"], VOCABULARY, arithmetic={"prime": 5}, lis={"group": 4, "high": 60}
)
COUNTS = {"arithmetic": {1: 9, 3: 14, 4: 0}, "lis": {5: 12, 9: 6}}


def looped_model(seed: int = 0, **options) -> LoopedTransformer:
    torch.manual_seed(seed)
    config = ModelConfig(BlockConfig(16, 2, 1), VOCABULARY.size, max_tokens=32)
    return LoopedTransformer(config, **options)


def ar_model() -> AutoregressiveTransformer:
    config = ModelConfig(BlockConfig(16, 2, 1, causal=True), VOCABULARY.size, max_tokens=100)
    return AutoregressiveTransformer(config)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def equal(a: Samples, b: Samples) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Samples))


def write(folder: Path, model=None, counts=COUNTS, **options):
    options = {"shard_chains": 8, **options}
    return write_dataset(folder, model or looped_model(), TASKS, counts, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A finished dataset; tests that change it copy it first."""
    path = tmp_path_factory.mktemp("chains") / "set"
    write(path, verify="task")
    return path


@pytest.fixture
def own_folder(folder, tmp_path) -> Path:
    for name, value in content(folder).items():
        (tmp_path / name).write_bytes(value)
    return tmp_path


def test_the_chains_are_the_models(folder):
    chains = ChainDataset(folder, only_passed=False)
    assert len(chains) == 41
    everything = chains.take(slice(None))
    for name, own in COUNTS.items():
        mine = everything.take(everything.task == TASK_NAMES.index(name))
        found = dict(zip(*np.unique(mine.length, return_counts=True), strict=True))
        assert found == {length: n for length, n in own.items() if n}
        truth = TASKS[name].sample(mine.length, DATASET_SEED_OFFSET)
        assert np.array_equal(mine.problem, truth.problem), "nothing is doubled or lost"
    assert equal(generate_looped_chains(looped_model(), everything, TASKS), everything)
    passed = verify_chains(everything, TASKS, "task")
    assert len(ChainDataset(folder)) == passed.sum()


def test_chains_that_did_not_pass_are_left_out(tmp_path, monkeypatch):
    """Every third chain is the truth, which an untrained model hardly ever writes."""
    wrong = chain_parts.generate_confident

    def third(model, problems, tasks, **options):
        index = np.arange(len(problems))
        written, confidence = wrong(model, problems, tasks, **options)
        both = Samples.concat([problems, written])
        return both.take(np.where(index % 3, index + len(problems), index)), confidence

    monkeypatch.setattr(chain_parts, "generate_confident", third)
    write(tmp_path, verify="task")
    everything = ChainDataset(tmp_path, only_passed=False).take(slice(None))
    passed = verify_chains(everything, TASKS, "task")
    assert len(everything) / 4 < passed.sum() < len(everything) / 2
    assert equal(ChainDataset(tmp_path).take(slice(None)), everything.take(passed))


def test_every_shard_has_its_share(folder):
    manifest = read_manifest(folder)
    assert manifest["shards"] == 6 and manifest["complete"]
    for index in range(6):
        tensors, _ = tensor_files.load_checkpoint(shard_path(folder, index))
        by_task = np.bincount(tensors["task"].numpy(), minlength=3)
        assert by_task[0] in (3, 4) and by_task[2] == 3
    counts = manifest["counts"]["arithmetic"]
    assert {length: c["written"] for length, c in counts.items()} == {"1": 9, "3": 14}


def test_what_passed_is_recorded(tmp_path):
    write(tmp_path, verify=None)
    chains = ChainDataset(tmp_path)
    assert len(chains) == 41
    manifest = read_manifest(tmp_path)
    for name, by_length in manifest["counts"].items():
        for length, c in by_length.items():
            assert c["passed"] == c["written"] == COUNTS[name][int(length)]
            everything = chains.take(slice(None))
            here = (everything.task == TASK_NAMES.index(name)) & (everything.length == int(length))
            agree = verify_chains(everything.take(here), TASKS, "self").sum()
            assert c["agreeing"] == agree


def test_chains_that_never_end_are_counted(tmp_path):
    model = ar_model()
    with torch.no_grad():
        model.chain_head.weight[1] = 0  # <eos> is hardly ever the largest
    manifest = write(tmp_path, model, {"arithmetic": {2: 5}})
    assert manifest["counts"]["arithmetic"]["2"]["unended"] == 5
    assert len(ChainDataset(tmp_path, only_passed=False)) == 5


def test_the_same_command_continues(own_folder, folder):
    before = content(folder)
    shard_path(own_folder, 1).unlink()
    shard_path(own_folder, 4).unlink()
    left = own_folder / ".shard-00004.1234.partial.safetensors"
    left.mkdir()
    (left / ".tmpQ1w2e3").write_bytes(b"half")  # as safetensors leaves it
    kept = shard_path(own_folder, 0).stat().st_mtime_ns
    seen = []
    write(own_folder, verify="task", progress=lambda *a: seen.append(a))
    assert content(own_folder) == before
    assert shard_path(own_folder, 0).stat().st_mtime_ns == kept
    assert [done for done, _ in seen] == [13, 34] and {total for _, total in seen} == {41}


def test_killed_at_random_moments(tmp_path):
    """The finished folder is that of an uninterrupted writer, bit for bit."""
    model, counts = looped_model(), {"arithmetic": {2: 60, 3: 60}}
    write(tmp_path / "whole", model, counts, shard_chains=4)
    expected = content(tmp_path / "whole")
    killed = tmp_path / "killed"
    writer = lambda: write_dataset(killed, model, TASKS, counts, shard_chains=4)
    rng = random.Random(0)
    done: set[str] = set()
    for _ in range(7):
        target = len(done) + rng.randint(0, 3)
        child, deadline = fork(writer), time.monotonic() + 60
        while len(list(killed.glob("shard-*"))) < target and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, "killed before it was done"
        there = {path.name: path.read_bytes() for path in killed.glob("shard-*")}
        assert done <= set(there) and len(there) >= target
        assert all(expected[name] == value for name, value in there.items())
        done = set(there)
        if len(done) > 15:  # the next writer could be done before it is killed
            break
    assert 0 < len(done) < 30
    last = fork(writer)
    last.join()
    assert last.exitcode == 0
    assert content(killed) == expected


def test_disk_full(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    write(whole)
    save, calls = tensor_files.save_file, []

    def full(tensors, path, **options):
        save(tensors, path, **options)
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device.*disk is not full"):
        write(tmp_path / "set")
    left = sorted(content(tmp_path / "set"))
    assert left == ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    with pytest.raises(DatasetError, match="not finished; run the command that writes them"):
        ChainDataset(tmp_path / "set")
    assert len(ChainDataset(tmp_path / "set", only_passed=False, unfinished=True)) == 13
    write(tmp_path / "set")
    assert content(tmp_path / "set") == content(whole)


def test_disk_full_at_the_manifest(tmp_path, monkeypatch):
    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(chain_dataset, "write_json", full)
    with pytest.raises(DatasetError, match="manifest.json cannot be written .No space left on dev"):
        write(tmp_path / "set")
    monkeypatch.undo()
    write(tmp_path / "set")
    write(tmp_path / "whole")
    assert content(tmp_path / "set") == content(tmp_path / "whole")


@pytest.mark.parametrize("use", ["continue", "read"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("truncated", "shard-00002.* is truncated or not a safetensors file"),
        ("flipped", "shard-00002.* is damaged \\(its content does not match its digest\\); delete"),
        ("of another run", "shard-00002.* belongs to another dataset or index; move it out"),
        ("renamed", "shard-00002.* belongs to another dataset or index"),
    ],
)
def test_bad_shards(own_folder, tmp_path_factory, use, harm, message):
    path = shard_path(own_folder, 2)
    if harm == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif harm == "flipped":
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    elif harm == "renamed":
        path.write_bytes(shard_path(own_folder, 3).read_bytes())
    else:
        other = tmp_path_factory.mktemp("other")
        write(other, verify="task", seed=1)
        path.write_bytes(shard_path(other, 2).read_bytes())
    with pytest.raises((DatasetError, CheckpointError), match=message):
        if use == "continue":
            write(own_folder, verify="task")
        else:
            ChainDataset(own_folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": looped_model(seed=1)}, 'holds other chains: model.hash \\("'),
        ({"seed": 5}, "holds other chains: seed \\(5 here, 0 there\\); give another --dataset"),
        ({"verify": None}, "verify \\(null here"),
        ({"counts": {"arithmetic": {1: 9}}}, "counts.arithmetic.3"),
    ],
)
def test_a_folder_of_other_chains(own_folder, options, message):
    before = content(own_folder)
    with pytest.raises(DatasetError, match=message):
        write(own_folder, **{"verify": "task", **options})
    assert content(own_folder) == before


def test_folders_that_are_none(tmp_path, own_folder):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    with pytest.raises(DatasetError, match="file cannot be used"):
        write(tmp_path / "file")
    with pytest.raises(DatasetError, match="not empty and holds no chains"):
        write(tmp_path / "other")
    for name in ("file", "other", "nowhere"):
        with pytest.raises(DatasetError, match=f"{name} is no folder of chains"):
            ChainDataset(tmp_path / name)
    shard_path(own_folder, 3).unlink()
    with pytest.raises(DatasetError, match="shard-00003.* is missing; run the command"):
        ChainDataset(own_folder)
    (own_folder / "manifest.json").write_text("{")
    with pytest.raises(DatasetError, match="manifest.json is damaged"):
        ChainDataset(own_folder)


def test_two_writers_at_once(tmp_path):
    def second(done, shards):
        with pytest.raises(DatasetError, match="another process is writing"):
            write(tmp_path)

    write(tmp_path, progress=second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": {"arithmetic": {30: 1}}}, "arithmetic length 30 can need .* limit of 32"),
        ({"counts": {"arithmetic": {30: 1}}, "model": ar_model()}, "can need .* limit of 100"),
        ({"counts": {"lis": {0: 1}}}, "lis length 0 is too short"),
        ({"counts": {"lis": {5: -1}}}, "-1 chains of lis length 5"),
        ({"verify": "truth"}, "verify = 'truth' is unknown"),
        ({"shard_chains": 0}, "shard_chains = 0"),
        ({"model": looped_model(supervise="answer")}, "writes answers only"),
    ],
)
def test_bad_input_leaves_no_folder(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()


def test_the_trainers_stream_shuffles_from_its_seed(folder):
    chains = ChainDataset([folder, folder], only_passed=False)
    assert len(chains) == 82
    schedule = Schedule.by_steps(8, warmup=0.0, decay="linear")

    def stream(samples, seed):
        form = BatchFormat("autoregressive")
        options = {"batch_size": 20, "seed": seed, "longest_true": {}}
        return SampleStream(samples, TASKS, form, schedule, **options)

    plain = chains.take(slice(None))
    one, again, other = stream(chains, 3), stream(plain, 3), stream(chains, 4)
    for step in range(8):
        assert torch.equal(one[step].batch.tokens, again[step].batch.tokens)
    assert not torch.equal(one[0].batch.tokens, other[0].batch.tokens)
    assert not torch.equal(one[0].batch.tokens, one[4].batch.tokens), "another order each epoch"


def test_as_a_torch_dataset(folder):
    chains = ChainDataset(folder, only_passed=False)
    loader = torch.utils.data.DataLoader(
        chains,
        batch_size=16,
        shuffle=True,
        collate_fn=Samples.concat,
        generator=torch.Generator().manual_seed(0),
    )
    parts = list(loader)
    assert [len(part) for part in parts] == [16, 16, 9]
    key = lambda samples: sorted(tuple(samples.problem_of(i)) for i in range(len(samples)))
    assert key(Samples.concat(parts)) == key(chains.take(slice(None)))
    assert equal(chains[-1], chains.take([40])) and len(chains.take([])) == 0
    with pytest.raises(IndexError):
        chains[41]
    sent = pickle.dumps(chains)  # what a worker process gets
    assert b"safetensors" in sent and len(sent) < 5000
    assert equal(pickle.loads(sent).take([5, 40, 1]), chains.take([5, 40, 1]))


def test_default_collate_slices_and_indices(folder):
    chains = ChainDataset(folder, only_passed=False)
    loader = torch.utils.data.DataLoader(chains, batch_size=16)
    batches = list(loader)
    assert [type(batch) for batch in batches] == [Samples] * 3
    assert equal(Samples.concat(batches), chains.take(slice(None)))
    (whole,) = torch.utils.data.DataLoader(chains, batch_size=41, num_workers=1)
    assert equal(whole, chains[:])
    for part, rows in [
        (chains[1:3], [1, 2]), (chains[-3:], [38, 39, 40]), (chains[5:1:-2], [5, 3]),
        (chains[-41], [0]), (chains[np.int64(7)], [7]), (chains[np.int8(-2)], [39]),
        (chains[torch.tensor(4)], [4]), (chains[3:3], []), (chains[39:99], [39, 40]),
    ]:  # fmt: skip
        assert equal(part, chains.take(np.array(rows, np.int64))) and len(part) == len(rows)
    for index in (41, -42, np.int64(41)):
        with pytest.raises(IndexError):
            chains[index]
    assert len(list(chains)) == 41  # a plain loop ends


def test_a_manifest_of_another_version(own_folder):
    path = own_folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for key in ("shards", "identity"):
        path.write_text(json.dumps({k: v for k, v in manifest.items() if k != key}))
        with pytest.raises(DatasetError, match=f"another version .* has no '{key}'; use that"):
            read_manifest(own_folder)
    del manifest["identity"]["verify"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match="another version .* has no 'verify'"):
        ChainDataset(own_folder)


def test_the_manifest_is_plain_json(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    identity = manifest["identity"]
    assert identity["counts"]["lis"] == {"5": 12, "9": 6} and identity["seed"] == 0
    assert len(identity["model"]["hash"]) == 16 and identity["verify"] == "task"
    tasks = chain_dataset.dataset_tasks(manifest)
    assert {name: task.to_dict() for name, task in tasks.items()} == identity["tasks"]
