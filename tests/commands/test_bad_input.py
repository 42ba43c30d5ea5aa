"""Every command, in this process, with wrong input of many kinds: refused with one sentence."""

import contextlib
import json
import random
import signal
from pathlib import Path

import pytest
import torch

import relay_fast.evaluate
import relay_fast.generate
import relay_fast.recipes.__main__ as recipes_command
import relay_fast.train
from relay_fast.recipes import RECIPES, load_recipe
from relay_fast.relay.presets import load_preset, override
from relay_fast.relay.presets.schema import RunConfig
from relay_fast.relay.run_folder import RunFolder
from relay_fast.relay.stages import Context
from relay_fast.training.model_files import model_path, save_model
from relay_fast.utils.settings import described
from tests.support.users import as_nobody, open_folder

INPUTS = 200
COMMANDS = {
    "train": relay_fast.train.main,
    "evaluate": relay_fast.evaluate.main,
    "generate": relay_fast.generate.main,
    "recipes": recipes_command.main,
}
# What is wrong for a setting of each kind, whatever its range.
WRONG = {
    "whole number": ["-1", "0.5", "true", "[1]", "many", "nan", "{a=1}", "1e3", '"1"', "-9e99"],
    "number": ["x", "nan", "inf", "-inf", "true", "[1.0]", "{a=1}", "-1", '"1"'],
    "true | false": ["1", "0", "yes", "null", "[true]"],
    "list": ["1", "x", "['a', 3]", "[0.5]", "[-1]", "{}", "null", "[true]"],
    "table": ["3", "x", "[1]", "null", "{a='b'}"],
    "text": ["3", "true", "[1]", "null"],
}
NAMES = {"tasks": "arithmetic", "model": "looped", "stages": "ar_self"}


def wrong_setting(rng: random.Random, schema: type) -> str:
    """A `--set` that must be refused: a value of another kind, or a key that nobody has."""
    rows = [row for row in described(schema) if not row.key.endswith(("parameters", "test_loops"))]
    row = rng.choice([row for row in rows if "NAME" not in row.key or row.key[0] in "tms"])
    key = row.key.replace("NAME", NAMES.get(row.key.split(".")[0], "training"))
    if rng.random() < 0.3:
        place = rng.randrange(len(key))
        return f"{key[:place]}{rng.choice('qz_.')}{key[place:]}=1"
    return f"{key}={rng.choice(WRONG.get(row.takes, ['nope', '3', 'true', '[]', 'null']))}"


def set_of(*values: str) -> list[list[str]]:
    return [["--set", value] for value in values]


@pytest.fixture(scope="module")
def place():
    """Folders that commands may be pointed at, each made in milliseconds."""
    with open_folder() as top:
        config = override(load_preset("cpu"), steps=2, batch_size=8, eval_problems=4)
        run = RunFolder(top / "run", config)
        context = Context(run.path, config, "cpu", "auto")
        for name, kind in (("looped_aligned", "looped"), ("ar_baseline", "autoregressive")):
            save_model(model_path(run.path, name), context.new_model(kind), {"seed": 0})
        RunFolder(top / "empty_run", config)
        RunFolder(top / "recipe", {"recipe": "p_hop", "preset": "cpu", "seed": 0, "settings": {}})
        sorting = {"tasks": {"sorting": config["tasks"]["arithmetic"]}}
        for name, text in {
            "hub": json.dumps({"model_type": "llama", "hidden_size": 64}),
            "damaged": '{"name": "cpu", ',
            "no_object": "[1, 2]",
            "newer": json.dumps({**config, "tasks": {"arithmetic": {"lengths": [1, 2]}}}),
            "other_task": json.dumps({**config, **sorting}),
        }.items():
            (top / name).mkdir()
            (top / name / "config.json").write_text(text)
            (top / name / "notes.txt").write_text("somebody's")
        (top / "file").write_text("mine")
        (top / "chains").mkdir()
        (top / "chains" / "manifest.json").write_text('{"kind": "relay_fast chains"}')
        (top / "full").mkdir()
        (top / "full" / "thing").write_text("mine")
        (top / "secret").mkdir(mode=0o700)
        yield top


# Long: a table of wrong calls.
def wrong_inputs(top: Path, rng: random.Random) -> list[tuple[str, list[str]]]:
    """(command, arguments) of INPUTS wrong calls, as many of each command."""
    new, run = str(top / "new" / "deeper"), str(top / "run")
    foreign = ["hub", "damaged", "no_object", "newer", "file", "full", "other_task", "file/below"]
    seeds = [["--seed", text] for text in ("-1", str(2**63), str(10**30), "x", "0.5", "nan")]
    devices = [["--device", text] for text in ("abacus", "cuda:99", "cuda:-1", "meta", "", "cpu:x")]
    at = lambda names: [["--out", str(top / name)] for name in names]

    train = ["--preset", "cpu", "--steps", "2", "--batch-size", "8", "--no-report", "--out", new]
    trains = [
        *seeds, *devices, *at([*foreign, "recipe"]),
        *([f"--{name}", text] for name in ("steps", "batch-size", "eval-problems")
          for text in ("0", "-3", "x", "1.5")),
        *([name, text] for name in ("--scale", "--minutes") for text in ("0", "-1", "nan", "x")),
        *([name, text] for name in ("--tasks", "--stages") for text in ("", "sorting", "lis,,")),
        ["--preset", ""], ["--preset", "../cpu"], ["--preset", "huge"], ["--impl", "c"],
        ["--scale", "2"], ["--unknown", "1"],
        *set_of(
            "", "=", "=3", "model", "model.d_model", "model={}", "model.n_heads=3", "a.b.c=1",
            "model.looped.n_heads=5", "model.d_model=60", "vocabulary.max_number=1", "name=x",
            "tasks.arithmetic.parameters.prime=4", "tasks.arithmetic.parameters.prime=x",
            "tasks.arithmetic.parameters.new=1", "tasks.arithmetic.parameters.operators=3",
            "tasks.arithmetic.parameters.operators=?", "tasks.arithmetic.hit_matrix=[99]",
            "tasks.arithmetic.train=[3, 1]", "tasks.lis.train=[1, 2]", "seed.x=1",
            "training.lr=[[[[", "training.recompute=every:0", "training.lr=1\nseed=2",
        ),
    ]  # fmt: skip
    trains += [["--set", wrong_setting(rng, RunConfig)] for _ in range(INPUTS)]

    evaluates = [
        *seeds, *devices, *at([*foreign, "recipe", "empty_run", "nowhere"]),
        *(["--problems", text] for text in ("0", "-1", "x", "1.5")),
        *(["--models", text] for text in ("", "gpt", "ar_relay", "looped_aligned,,")),
        *(["--lengths", text] for text in ("5-1", "", "-", "a-b", "0-2", "1-99999999999", "1-2-3",
                                           "-5", "1.5", "٣-²")),
    ]  # fmt: skip
    write = ["--dataset", new, "--lengths"]
    generates = [
        *seeds, *devices, *at([*foreign, "recipe", "empty_run", "nowhere"]),
        *(["--number", text] for text in ("0", "-1", "x", "99999999")),
        *(["--length", text] for text in ("0", "-1", "x", "99999999")),
        *(["--model", text] for text in ("", "gpt", "ar_relay", "../ar_baseline")),
        *(["--task", text] for text in ("", "sorting", "lis")),
        *([*write, text] for text in ("5-1", "", "0-2", "1-99999999999", "x")),
        [*write, "1-3", "--shard", "0"], [*write, "1-3", "--number", str(10**18)],
        [*write, "1-3", "--seed", "-4"], [*write, "1-3", "--verify", "maybe"],
        ["--dataset", new], ["--dataset", str(top / "full"), "--lengths", "1-3"],
        ["--dataset", str(top / "file"), "--lengths", "1-3"],
        *(["--show", str(top / name)] for name in ("hub", "chains", "file", "full", "nowhere")),
    ]  # fmt: skip
    recipes = []
    for name in RECIPES:
        schema = type(load_recipe(name).PRESETS["cpu"])
        recipes += [[name, "--set", wrong_setting(rng, schema)] for _ in range(6)]
        if any(row.key == "n_heads" for row in described(schema)):
            recipes += [[name, *option] for option in set_of("n_heads=3", "activation=tanh")]
    recipes += [
        ["p_hop", *option]
        for option in (
            *seeds,
            *devices,
            *at([*foreign, "run"]),
            ["--preset", "huge"],
            ["--steps", "0"],
            *set_of("", "=", "training", "models=[]", "models=['4']", "hops=[60]", "length.x=1"),
        )
    ]
    recipes += [["p_hops"], [""], ["p_hops", "--help"], ["looped_lm", "--set", "corpus=/nowhere"],
                ["length_generalization", "--set", "parity.heads=5"]]  # fmt: skip
    calls = []
    for command, base, options in [
        ("train", train, trains),
        ("evaluate", ["--out", run, "--problems", "4"], evaluates),
        ("generate", ["--out", run, "--task", "arithmetic", "--length", "3"], generates),
        ("recipes", ["--out", new], recipes),
    ]:
        chosen = rng.sample(options, min(len(options), INPUTS // 4))
        if command == "recipes":
            calls += [(command, [option[0], *base, *option[1:]]) for option in chosen]
        else:
            calls += [(command, [*base, *option]) for option in chosen]
    return calls


def everything(top: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below: size and time."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [top, *top.rglob("*")]
    }


def outcome(command: str, arguments: list[str], capsys) -> tuple[int, str]:
    """(exit status, what stands in stderr after argparse's usage)."""
    capsys.readouterr()
    usage = False
    try:
        status = COMMANDS[command](arguments)
    except SystemExit as left:  # argparse
        status, usage = left.code, True
    error = capsys.readouterr().err
    return status, error.rpartition("\npython -m ")[2] if usage else error


@pytest.mark.parametrize("seed", [0])
def test_wrong_input_is_one_sentence_and_leaves_nothing(place, capsys, monkeypatch, seed) -> None:
    monkeypatch.chdir(place)
    calls = wrong_inputs(place, random.Random(seed))
    assert len(calls) >= INPUTS - 20
    before, faults = everything(place), []
    for command, arguments in calls:
        try:
            status, error = outcome(command, arguments, capsys)
        except Exception as crash:
            faults.append((command, arguments, repr(crash)))
            continue
        one = error.count("\n") == 1 and ("error: " in error) and "Traceback" not in error
        if status != 2 or not one:
            faults.append((command, arguments, status, error))
        after = everything(place)
        if after != before:
            faults.append((command, arguments, "left", set(after) ^ set(before)))
            before = after
    assert not faults, "\n".join(map(str, faults))


def test_missing_permissions(place, capsys) -> None:
    run, secret = str(place / "run"), str(place / "secret")
    calls = [
        ("train", ["--steps", "2", "--out", secret]),
        ("train", ["--steps", "2", "--out", f"{secret}/below"]),
        ("train", ["--steps", "2", "--out", str(place / "new")]),
        ("evaluate", ["--out", secret]),
        ("evaluate", ["--out", run, "--problems", "1"]),
        ("generate", ["--out", secret, "--task", "arithmetic", "--length", "3"]),
        ("generate", ["--show", secret]),
        ("generate", ["--out", run, "--task", "arithmetic", "--lengths", "1-2", "--dataset",
                      str(place / "new")]),
        ("recipes", ["gd_conditioning", "--out", secret]),
        ("recipes", ["gd_conditioning", "--out", str(place / "new")]),
    ]  # fmt: skip
    load_recipe("gd_conditioning")
    before, faults = everything(place), []
    for command, arguments in calls:
        with as_nobody(), contextlib.suppress(SystemExit):
            status, error = outcome(command, arguments, capsys)
        if status != 2 or error.count("\n") != 1 or not error.startswith("error: "):
            faults.append((command, arguments, status, error))
    assert not faults, "\n".join(map(str, faults))
    assert everything(place) == before


@pytest.mark.parametrize(
    "wrong",
    [["--set", "model.n_heads=3"], ["--set", "tasks.arithmetic.parameters.prime=4"],
     ["--set", "vocabulary.max_number=1"], ["--seed", "-5"],
     ["--set", "model.d_model=1000000000000"], ["--set", f"model.n_layers={10**12}"]],
)  # fmt: skip
def test_a_refused_start_leaves_the_folder_free(tmp_path, wrong) -> None:
    words = ["--preset", "cpu", "--steps", "2", "--out", str(tmp_path / "run"), "--minutes", "9"]
    assert relay_fast.train.main([*words, *wrong]) == 2
    assert not list(tmp_path.iterdir())
    recipe = ["p_hop", "--steps", "2", "--out", str(tmp_path / "recipe")]
    assert recipes_command.main([*recipe, "--set", "n_heads=3"]) == 2
    assert not list(tmp_path.iterdir())
    config = override(load_preset("cpu"), steps=2)
    config["model"]["n_heads"] = 3
    with pytest.raises(ValueError, match="d_model = 64 is not divisible by n_heads = 3"):
        relay_fast.train.train(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())
    RunFolder(tmp_path / "run", override(load_preset("cpu"), steps=2))  # the right one may have it


def test_models_beyond_the_memory_are_refused_by_their_size(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("relay_fast.relay.context.machine_memory", lambda: 1e5)
    config = load_preset("cpu")
    model = Context(tmp_path, config, "cpu", "auto").new_model("looped")
    gigabytes = 2 * sum(p.nbytes for p in model.parameters()) / 1e9
    with pytest.raises(ValueError, match=f"take {gigabytes:.3g} GB and this machine has 0.0001:"):
        relay_fast.train.prove(config)
    with pytest.raises(ValueError, match="take inf GB"):  # more elements than torch can count
        relay_fast.train.prove(override(config, values=["model.d_model=2147483640"]))
    for size in (4294967296, 10**30):
        with pytest.raises(ValueError, match=f"^model.d_model = {size}: give at most 2147483647$"):
            override(config, values=[f"model.d_model={size}"])


def test_triton_on_a_cpu_is_refused_at_the_start(tmp_path, capsys, monkeypatch) -> None:
    def refuse(impl, device):
        raise RuntimeError("device 'cpu' is no CUDA device")

    monkeypatch.setattr(relay_fast.train, "select", refuse)
    words = ["--preset", "cpu", "--impl", "triton", "--out", str(tmp_path / "run")]
    assert relay_fast.train.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: impl = 'triton' cannot run on device 'cpu': device 'cpu' is no")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("folder", "words"),
    [("recipe", "holds a run of the recipe 'p_hop' where a run of RELAY was expected"),
     ("hub", "holds a model of another library ('llama') where a run of RELAY was expected"),
     ("newer", "holds a run of RELAY by another version where a run of RELAY was expected")],
)  # fmt: skip
@pytest.mark.parametrize("command", ["train", "evaluate", "generate"])
def test_a_foreign_folder_is_named(place, capsys, command, folder, words) -> None:
    arguments = {
        "train": ["--steps", "2"],
        "evaluate": [],
        "generate": ["--task", "arithmetic", "--length", "3"],
    }[command]
    before = everything(place)
    status, error = outcome(command, [*arguments, "--out", str(place / folder)], capsys)
    assert status == 2 and f"{place / folder} {words}" in error and error.count("\n") == 1
    assert everything(place) == before


def test_help_lists_every_setting(capsys) -> None:
    with pytest.raises(SystemExit) as left:
        relay_fast.train.main(["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    for row in described(RunConfig):
        assert any(row.key in line and row.meaning in line for line in shown.splitlines()), row


def test_a_command_called_from_python_leaves_the_signal_handlers_alone(tmp_path, capsys) -> None:
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(kind) for kind in kinds]
    nowhere = str(tmp_path / "nowhere")
    words = {
        "train": ["--preset", "cpu", "--seed", "-5", "--out", nowhere],
        "evaluate": ["--out", nowhere],
        "generate": ["--show", nowhere],
        "recipes": ["gd_conditioning", "--set", "nothing=1", "--out", nowhere],
    }
    for name, main in COMMANDS.items():
        assert main(words[name]) == 2, name
        assert [signal.getsignal(kind) for kind in kinds] == before, name


def test_a_card_too_small_is_told_in_bytes_with_a_remedy(tmp_path, monkeypatch, capsys) -> None:
    def train(*args, **options):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.78 "
            "GiB of which 1.21 GiB is free. Including non-PyTorch memory, this process has 6.6 GiB"
        )

    monkeypatch.setattr(relay_fast.train, "train", train)
    assert relay_fast.train.main(["--preset", "cpu", "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.strip() == (
        "error: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.78 "
        "GiB of which 1.21 GiB is free. Set a smaller batch_size, or training.recompute=auto"
    )
