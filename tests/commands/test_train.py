"""`python -m relay_fast.train` from end to end, what it leaves, and what it says to bad input."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from relay_fast.relay.pipeline import _unfinished, with_needs
from relay_fast.relay.presets import load_preset, override
from relay_fast.relay.run_folder import RunFolder
from relay_fast.relay.stages import MODELS, STAGE_DEPENDENCIES, Context, run_stage
from relay_fast.reporting.progress import Display
from relay_fast.reporting.tables import MODEL_NAMES
from relay_fast.train import main, train
from relay_fast.training.model_files import RUN_MODELS, load_run_model
from relay_fast.utils.tensor_files import load_checkpoint

SMALL = ["--preset", "cpu", "--steps", "2", "--batch-size", "8", "--eval-problems", "4"]


def small(**options):
    return override(load_preset("cpu"), steps=2, batch_size=8, eval_problems=4, **options)


pytestmark = pytest.mark.usefixtures("quick_workers")  # but in processes of the command's own


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_workers):
    """The folder of a whole run, made by the command."""
    out = tmp_path_factory.mktemp("runs") / "cpu"
    assert main([*SMALL, "--out", str(out)]) == 0
    return out


def results_of(out) -> dict:
    return json.loads((out / "results.json").read_text())


# A whole run


def test_results_have_their_form(finished) -> None:
    results, config = results_of(finished), small()
    assert results["config"] == config and results["seed"] == config["seed"]
    assert results["versions"]["torch"] == torch.__version__
    assert set(results["accuracy"]) == set(MODEL_NAMES) == set(MODELS) == set(RUN_MODELS)
    for model, tasks in results["accuracy"].items():
        assert set(tasks) == set(config["tasks"])
        for task, by_length in tasks.items():
            entry = config["tasks"][task]
            lengths = range(entry["train"][0], entry["test"][1] + 1)
            assert [int(n) for n in by_length] == list(lengths)
            for row in by_length.values():
                columns = {"answer", "bit", "chain", "n"}
                columns |= {"bit_forced"} if model.startswith("ar_") else {"answer_once"}
                assert set(row) == columns and row["n"] == 4
                assert all(0 <= row[key] <= 1 for key in columns - {"n"})
    assert results["train_lengths"] == {t: e["train"] for t, e in config["tasks"].items()}
    assert set(results["seconds"]) == {"total", *STAGE_DEPENDENCIES}
    assert results["seconds"]["total"] > 0
    assert set(results["history"]) == set(results["training"]) == set(MODELS)
    for name, history in results["history"].items():
        phases = 5 if name.startswith("ar_self") else 1
        times = [entry["seconds"] for entry in history]
        assert (
            times == sorted(times) and 0 < times[-1] <= results["training"][name]["seconds"] + 0.1
        )
        assert results["training"][name]["samples"] == {5: 80, 1: 16}[phases]
        assert 0 <= results["training"][name]["data_wait_share"] <= 1
    (call,) = results["calls"]
    assert (
        set(call["finished"]) == set(STAGE_DEPENDENCIES)
        and call["seconds"] == results["seconds"]["total"]
    )
    assert call["torch"] == torch.__version__ and call["device_name"]
    for control in ("ar_self_loop", "ar_self_truth"):
        assert [row["phase"] for row in results["kept"][control]] == [1, 2, 3, 4, 5]
        assert all(0 <= row["kept"] <= row["written"] for row in results["kept"][control])
    for task, entry in config["tasks"].items():
        written = [counts["written"] for counts in results["trust"][task].values()]
        assert written == entry["merge_beyond"]
        assert set(results["hit_matrix"][task]) == {str(n) for n in entry["hit_matrix"]}
        for models in results["hit_matrix"][task].values():
            assert set(models) == set(MODELS)


def test_no_true_problem_beyond_the_training_range(finished) -> None:
    results = results_of(finished)
    assert set(results["longest_true_problem"]) == set(results["config"]["tasks"])
    for task, longest in results["longest_true_problem"].items():
        shortest, bound = results["train_lengths"][task]
        assert shortest <= longest <= bound


def test_models_and_plots_are_there(finished) -> None:
    for name in MODEL_NAMES:
        load_run_model(finished, name)
    names = {file.name for file in finished.glob("*.png")}
    assert {"accuracy_answer.png", "accuracy_chain.png", "accuracy_bit.png"} <= names
    for task, entry in small()["tasks"].items():
        assert {f"hits_{task}_{n}.png" for n in entry["hit_matrix"]} <= names
    assert all(file.stat().st_size > 1000 for file in finished.glob("*.png"))


def test_without_matplotlib_the_rest_is_there(finished, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert main([*SMALL, "--out", str(finished)]) == 0
    out, warning = capsys.readouterr()
    assert "plots need matplotlib" in warning and warning.count("\n") == 1
    assert "pip install relay_fast[train]; the same" in warning
    assert "whole chain correct" in out and "results:" in out


def test_the_same_command_again_does_nothing_new(finished, capsys) -> None:
    before = results_of(finished)
    stages = (finished / "stages.json").read_bytes()
    models = {name: (finished / f"{name}.safetensors").stat().st_mtime_ns for name in MODEL_NAMES}
    assert main([*SMALL, "--out", str(finished)]) == 0
    assert results_of(finished) == before
    assert (finished / "stages.json").read_bytes() == stages
    for name, time_ns in models.items():
        assert (finished / f"{name}.safetensors").stat().st_mtime_ns == time_ns
    out = capsys.readouterr().out
    assert "started" not in out
    assert "whole chain correct" in out and "results:" in out  # the table is shown again
    assert main([*SMALL, "--no-report", "--out", str(finished)]) == 0
    assert not capsys.readouterr().out


def test_another_config_in_the_same_folder_is_refused(finished, capsys) -> None:
    before = (finished / "results.json").read_bytes()
    assert main([*SMALL, "--seed", "1", "--out", str(finished)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the run folder") and "belongs to another config" in error
    assert "seed (1 here, 0 in the folder)" in error and "give another --out" in error
    assert error.count("\n") == 1
    assert (finished / "results.json").read_bytes() == before


def test_some_stages_and_their_needs(tmp_path) -> None:
    results = train(small(), tmp_path / "run", stages=["looped_vanilla"])
    assert set(results["seconds"]) == {"looped_vanilla", "total"} and "accuracy" not in results
    results = train(small(), tmp_path / "run", stages=["evaluate.looped_vanilla"])
    assert set(results["accuracy"]) == {"looped_vanilla"}
    first = results["seconds"]["looped_vanilla"]
    assert results["seconds"]["total"] > first
    stages = [call["finished"] for call in results["calls"]]
    assert stages == [["looped_vanilla"], ["evaluate.looped_vanilla"]]
    total = sum(call["seconds"] for call in results["calls"])
    assert results["seconds"]["total"] == pytest.approx(total)


def test_ctrl_c(tmp_path) -> None:
    out, stage = tmp_path / "run", "looped_vanilla"
    command = [sys.executable, "-m", "relay_fast.train", "--preset", "cpu", "--steps", "3000"]
    command += ["--batch-size", "8", "--stages", stage, "--out", str(out)]
    # As from a terminal: the whole group gets the signal, and it is not ignored.
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for line in process.stdout:
        if "step" in line:
            break
    for _ in range(3):  # impatient
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.15)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "interrupted; the same command continues this run" in error
    assert "Traceback" not in error
    state = out / "checkpoints" / f"{stage}.state.safetensors"
    assert state.is_file() and not (out / "stages.json").exists()
    assert not list(out.rglob("*.partial*")) and not list(out.rglob(".lock*"))
    assert load_checkpoint(state)[1]["step"] > 0
    deadline = time.monotonic() + 20
    while _group_is_alive(process.pid):
        assert time.monotonic() < deadline, "something is left running"
        time.sleep(0.1)


def test_a_killed_run_leaves_no_process_and_continues_to_the_same_model(finished, tmp_path) -> None:
    out, stage = tmp_path / "run", "ar_self_truth"
    command = [sys.executable, "-m", "relay_fast.train", *SMALL, "--stages", stage]
    process = subprocess.Popen(
        [*command, "--out", str(out)], start_new_session=True, stdout=subprocess.DEVNULL
    )
    scratch = out / "checkpoints"
    while not (scratch / f"{stage}.3.chains.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()  # no chance to say anything to its workers
    process.wait()
    deadline = time.monotonic() + 40
    while _group_is_alive(process.pid):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)
    assert not (out / f"{stage}.safetensors").exists()
    results = train(small(), out, stages=[stage])
    assert len(results["kept"][stage]) == 5
    assert results["kept"][stage] == results_of(finished)["kept"][stage]
    assert not list(scratch.iterdir())
    one, other = (load_run_model(folder, stage).state_dict() for folder in (out, finished))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_killed_worker_ends_the_run_with_one_sentence(tmp_path, capsys, monkeypatch) -> None:
    out, stages = tmp_path / "run", ["ar_baseline", "looped_vanilla"]
    reported = set()

    def kill_one(display, name, progress) -> None:
        if name in reported:
            return
        reported.add(name)
        if len(reported) == len(stages):  # both have taken a step
            workers = multiprocessing.active_children()
            next(p for p in workers if p.name.startswith("ForkServerProcess")).kill()

    monkeypatch.setattr(Display, "progress", kill_one)
    command = ["--preset", "cpu", "--steps", "30000", "--batch-size", "8"]
    assert main([*command, "--stages", ",".join(stages), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "error: a worker process was killed while" in error and "Traceback" not in error
    assert all(stage in error for stage in stages)
    assert "memory" in error and "the same command continues this run" in error
    assert list((out / "checkpoints").glob("*.state.safetensors"))  # of the one that was not killed
    assert not (out / "stages.json").exists() and not multiprocessing.active_children()


def test_out_of_minutes(finished, tmp_path, capsys) -> None:
    out, stage = tmp_path / "run", "looped_vanilla"
    command = ["--preset", "cpu", "--steps", "100000", "--batch-size", "8", "--stages", stage]
    state = out / "checkpoints" / f"{stage}.state.safetensors"
    for minutes in (0.02, 0.1, 0.4, 1.6):  # a busy machine may need more to take a step
        assert main([*command, "--minutes", str(minutes), "--out", str(out)]) == 0
        text = f"{minutes} minutes are over; the same command continues this run"
        assert text in capsys.readouterr().out
        if state.exists():
            break
    assert state.exists() and not (out / "stages.json").exists()
    calls = results_of(out)["calls"]
    assert calls[-1]["seconds"] >= 60 * minutes  # its time counts all the same
    assert calls[-1]["finished"] == []
    assert main([*SMALL, "--minutes", "0", "--out", str(tmp_path / "none")]) == 2
    assert "minutes = 0: give more than 0" in capsys.readouterr().err


def test_what_was_lost_is_made_again_only_if_needed(finished, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "chains.safetensors").unlink()
    folder = RunFolder.open(copy)
    assert _unfinished(folder, list(STAGE_DEPENDENCIES)) == []
    stages = json.loads((copy / "stages.json").read_text())
    del stages["ar_relay"]
    (copy / "stages.json").write_text(json.dumps(stages))
    assert _unfinished(folder, list(STAGE_DEPENDENCIES)) == ["chains", "ar_relay"]


def _group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# Bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "sorting"], "task 'sorting' is not in preset 'cpu': use some of arithmetic"),
        (["--preset", "huge"], "preset 'huge' is unknown: use one of cpu, cpu-addition, cpu-ar"),
        (["--steps", "0"], "steps = 0: give at least 1"),
        (["--batch-size", "0"], "batch size = 0: give at least 1"),
        (["--eval-problems", "-3"], "problems = -3: give at least 1"),
        (["--scale", "0"], "scale = 0: give more than 0 and at most 1"),
        (["--set", "model.width=8"], "'model.width=8': setting model.width is unknown: the near"),
        (["--set", "model.d_model"], "'model.d_model' sets nothing: write KEY=VALUE, like"),
        (
            ["--set", "model.d_model=big"],
            "model.d_model = 'big': give a whole number, at least 1",
        ),
        (
            ["--set", "model.d_model=0.5"],
            "model.d_model = 0.5: give a whole number, at least 1",
        ),
        (["--seed", "-1"], "seed = -1: give at least 0"),
        (["--stages", "looped"], "stage 'looped' is unknown: use some of looped_aligned"),
        (["--device", "abacus"], "device 'abacus' is unknown: use cpu or cuda"),
        (["--device", "meta"], "device 'meta' is unknown: use cpu or cuda"),
    ],
)
def test_bad_arguments_get_one_sentence(tmp_path, capsys, arguments, message) -> None:
    assert main([*SMALL, *arguments, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()  # nothing was begun


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(tmp_path, capsys) -> None:
    assert main([*SMALL, "--device", "cuda", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "device 'cuda'" in error and "CUDA is not available: use cpu" in error
    assert not (tmp_path / "run").exists()


def test_out_is_a_file_or_somebody_elses_folder(tmp_path, capsys) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        assert main([*SMALL, "--out", str(out)]) == 2
        assert "is a file, or lies below one" in capsys.readouterr().err
    assert main([*SMALL, "--out", str(tmp_path)]) == 2
    assert "is not empty and is not a run folder" in capsys.readouterr().err
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    "arguments", [[], ["--preset", "cpu"], ["--out", "x", "--impl", "c"], ["--steps", "x"]]
)
def test_argparse_refuses_with_2(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage: python -m relay_fast.train" in capsys.readouterr().err


def test_stages_bring_their_needs_in_order() -> None:
    assert with_needs(["ar_relay"]) == ["looped_aligned", "ar_baseline", "chains", "ar_relay"]
    assert with_needs(STAGE_DEPENDENCIES) == list(STAGE_DEPENDENCIES)
    assert with_needs(["evaluate.looped_vanilla"]) == ["looped_vanilla", "evaluate.looped_vanilla"]
    for name, needs in STAGE_DEPENDENCIES.items():
        assert all(
            list(STAGE_DEPENDENCIES).index(need) < list(STAGE_DEPENDENCIES).index(name)
            for need in needs
        )


@pytest.mark.parametrize("stage", ["chains", "evaluate.looped_aligned", "evaluate.ar_baseline"])
def test_stages_that_write_chains_say_how_far_they_are(finished, stage) -> None:
    seen = []
    run_stage(Context(finished, results_of(finished)["config"], "cpu", "auto"), stage, seen.append)
    assert seen and all(0 <= p.done <= p.total and p.total > 1 for p in seen)
