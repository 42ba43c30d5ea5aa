"""The paper's experiment in leases: what travels from one machine to the next, what does not."""

import json
import os
import time

import numpy as np
import pytest
import torch

from benchmarks.card import paper
from relay_fast.relay.presets import load_preset
from relay_fast.relay.run_folder import RunFolder
from relay_fast.relay.stages import STAGE_DEPENDENCIES, Context
from relay_fast.training.model_files import load_run_model, model_path, save_model


def put(folder, name: str, size: int = 100, age: float = 0.0) -> None:
    """A file of random bytes, last changed `age` seconds ago."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.random.default_rng(0).bytes(size))
    os.utime(path, (time.time() - age,) * 2)


@pytest.fixture
def run(tmp_path):
    """Interrupted in `ar_relay`: before it, in earlier calls, three models and the chains."""
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    for name in ("looped_aligned", "ar_baseline", "looped_vanilla", "chains"):
        folder.mark_done(name)
    for name in ("evaluate.looped_aligned", "evaluate.ar_baseline", "evaluate.looped_vanilla"):
        folder.mark_done(name)
    for name in ("looped_aligned", "ar_baseline", "looped_vanilla"):
        put(folder.path, model_path("", name).name, age=1000)
    put(folder.path, "chains.safetensors", 5000)
    for part in ("", ".0a1b2c3d-1"):
        put(folder.path, f"checkpoints/ar_relay.state{part}.safetensors", 300)
    put(folder.path, "accuracy_bit.png")
    put(folder.path, ".triton/ab/kernel.cubin")
    return folder


def carried(run, back) -> set[str]:
    """What arrives on the next machine, from a call that began 500 seconds ago."""
    paper.pack(run.path, back, time.time() - 500)
    there = back.parent / "there"
    paper.unpack(back, there)
    found = {str(f.relative_to(there)) for f in there.rglob("*") if f.is_file()}
    for name in found:
        assert (there / name).read_bytes() == (run.path / name).read_bytes()
    return found


STATE = {f"checkpoints/ar_relay.state{part}.safetensors" for part in ("", ".0a1b2c3d-1")}


def test_what_is_needed_travels_whole(run, tmp_path) -> None:
    found = carried(run, tmp_path / "back")
    assert found == STATE | {
        "config.json", "stages.json", "accuracy_bit.png", ".triton/ab/kernel.cubin",
        "looped_aligned.safetensors", "ar_baseline.safetensors", "looped_vanilla.safetensors",
        "chains.safetensors",
    }  # fmt: skip
    assert paper.unfinished(tmp_path / "there", ["evaluate.ar_relay"]) == [
        "ar_relay", "evaluate.ar_relay",
    ]  # fmt: skip


def test_parts_of_interrupted_chains_travel(run, tmp_path) -> None:
    stages = run.path / "stages.json"
    done = {k: v for k, v in json.loads(stages.read_text()).items() if k != "chains"}
    stages.write_text(json.dumps(done))
    (run.path / "chains.safetensors").unlink()
    part = "checkpoints/chains.0123456789abcdef-00000000.safetensors"
    put(run.path, part)
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "run.tar.7").write_bytes(b"of an earlier call")
    assert part in carried(run, tmp_path / "back")
    assert not (tmp_path / "back" / "run.tar.7").exists()


def test_finished_models_that_nothing_needs_stay_once_they_were_sent(run, tmp_path) -> None:
    for name in STAGE_DEPENDENCIES:
        if name != "evaluate.ar_self_truth":
            run.mark_done(name)
    for name, age in (("ar_relay", 1000), ("ar_self_loop", 10), ("ar_self_truth", 1000)):
        put(run.path, f"{name}.safetensors", age=age)
    found = {name for name in carried(run, tmp_path / "back") if name.endswith(".safetensors")}
    # One is new, the other is still to be evaluated.
    assert found - STATE == {"ar_self_loop.safetensors", "ar_self_truth.safetensors"}


def test_what_is_too_large_stays_whole_parts_are_small(run, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(paper, "TRAVEL_BYTES", 2000)
    monkeypatch.setattr(paper, "PART_BYTES", 512)
    found = carried(run, tmp_path / "back")
    assert found >= STATE | {"looped_aligned.safetensors"} and "chains.safetensors" not in found
    assert "made again where it is needed: chains.safetensors" in capsys.readouterr().out
    parts = list((tmp_path / "back").iterdir())
    assert len(parts) > 2 and all(part.stat().st_size <= 512 for part in parts)


def test_a_state_in_parts_travels_whole_or_not_at_all(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(paper, "TRAVEL_BYTES", 1000)
    assert not STATE & carried(run, tmp_path / "back")


def test_many_parts_are_joined_in_their_order(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(paper, "PART_BYTES", 64)
    folder = RunFolder(tmp_path / "run", {"seed": 0, "text": [str(k) for k in range(500)]})
    paper.pack(folder.path, tmp_path / "back", 0.0)
    assert (tmp_path / "back" / "run.tar.10").exists()
    paper.unpack(tmp_path / "back", tmp_path / "there")
    assert RunFolder.open(tmp_path / "there").config == folder.config
    paper.unpack(tmp_path / "nowhere", tmp_path / "there")  # the first call carries nothing


def test_shares_are_taken_up_in_turn_until_the_time_is_over(tmp_path, monkeypatch, capsys) -> None:
    calls, most = [], 3

    def train(arguments) -> int:
        assert arguments[-1] == "--no-report"  # which takes the card's time
        flags = dict(zip(arguments[:-1:2], arguments[1:-1:2], strict=True))
        calls.append(flags)
        folder = RunFolder(flags["--out"], {"seed": 0})
        for name in paper.with_needs(flags["--stages"].split(",")):
            if len(calls) <= most:
                folder.mark_done(name)
        return 0

    monkeypatch.setattr(paper.train, "main", train)
    run = tmp_path / "run"
    command = ["--minutes", "1", "--run", str(run), "--device", "cpu", "--scale", "0.01"]
    assert paper.main([*command, "--back", str(tmp_path / "back")]) == 0
    assert [call["--stages"] for call in calls] == [
        ",".join(share.stages) for share in paper.PLAN[:4]
    ]
    for call in calls:
        given = [call[f"--{name}"] for name in ("preset", "device", "scale", "out")]
        assert given == ["paper-fast", "cpu", "0.01", str(run)]
        assert 0 < float(call["--minutes"]) <= 1
    left = capsys.readouterr().out.splitlines()[-1]
    assert left.startswith("left: looped_vanilla, evaluate.looped_vanilla, ar_self_truth")
    assert left.endswith("seed1/looped_aligned, seed1/evaluate.looped_aligned")

    most = 100
    del calls[:]
    assert paper.main(command) == 0
    assert len(calls) == len(paper.PLAN) - 3  # what is done is not taken up again
    assert (calls[-1]["--out"], calls[-1]["--seed"]) == (str(run / "seed1"), "1")
    assert capsys.readouterr().out.splitlines()[-1] == "everything is done"
    del calls[:]
    monkeypatch.setattr(paper, "LEAST_MINUTES", 2.0)  # more than there is
    assert paper.main(command) == 0 and not calls


def test_every_model_is_in_the_plan_and_the_looped_one_twice() -> None:
    stages = [name for share in paper.PLAN if not share.folder for name in share.stages]
    assert set(paper.with_needs(stages)) == set(STAGE_DEPENDENCIES)
    assert paper.PLAN[0].stages[0] == "evaluate.looped_aligned"
    (second,) = [share for share in paper.PLAN if share.folder]
    assert second.stages == ("evaluate.looped_aligned",) and second.flags == ("--seed", "1")


def test_two_models_are_released_in_twelve_megabytes(tmp_path, capsys) -> None:
    config = load_preset("paper-fast")
    run = RunFolder(tmp_path / "run", config)
    context = Context(run.path, config, "cpu", "auto")
    for name, kind in (("looped_aligned", "looped"), ("ar_relay", "autoregressive")):
        save_model(model_path(run.path, name), context.new_model(kind), {"stage": name})
    out = tmp_path / "release"
    assert paper.main(["--run", str(run.path), "--release", str(out)]) == 0
    assert RunFolder.open(out).config == run.config
    assert sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) < 12e6
    for name in ("looped_aligned", "ar_relay"):
        pairs = (load_run_model(folder, name).state_dict() for folder in (run.path, out))
        for a, b in zip(*(models.values() for models in pairs), strict=True):
            assert torch.equal(a.bfloat16(), b.bfloat16()) and b.dtype == torch.float32
