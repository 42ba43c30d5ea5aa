"""Configs of one's own: what a file may leave out, its base, its tasks and their vocabulary."""

from __future__ import annotations

import json
import re
import tomllib

import pytest

from relay_fast.relay.presets import load_preset, override, preset_names
from relay_fast.relay.presets.complete import completed, used_lengths
from relay_fast.relay.presets.own import config_text, read_config, resolved
from relay_fast.relay.run_folder import RunFolderError
from relay_fast.tasks import TextTask
from relay_fast.train import _begin, main, prove
from tests.support.text_tasks import Parity, Total

CLASS = "tests.support.text_tasks:"
PARITY = f'base = "cpu"\n[tasks.parity]\nclass = "{CLASS}Parity"\ntrain = [1, 4]\ntest = [4, 6]\n'


@pytest.fixture
def file(tmp_path):
    def write(text: str):
        (tmp_path / "mine.toml").write_text(text)
        return tmp_path / "mine.toml"

    return write


@pytest.mark.parametrize("preset", preset_names())
def test_presets_are_complete_and_survive_being_printed(preset) -> None:
    config = load_preset(preset)
    assert completed(config) == config
    assert resolved(config) == config
    assert tomllib.loads(config_text(config)) == config


def test_a_file_changes_its_base(file) -> None:
    text = PARITY.replace("[tasks", "seed = 3\n[stages.looped_aligned]\nsteps = 5\n[tasks", 1)
    config, base = read_config(file(text)), load_preset("cpu")
    assert (config["name"], config["seed"]) == ("mine", 3)
    assert config["model"] == base["model"] and config["evaluation"] == base["evaluation"]
    stage = {k: v for k, v in base["stages"]["looped_aligned"].items() if k != "token_iterations"}
    assert config["stages"]["looped_aligned"] == stage | {"steps": 5}
    assert config["tasks"] == {
        "parity": {
            "class": f"{CLASS}Parity",
            "parameters": {},
            "train": [1, 4],
            "test": [4, 6],
            "self_lengths": [5, 6],
            "self_counts": [64, 64],
            "merge_inside": 4000,
            "merge_beyond": [1000, 1000],
            "hit_matrix": [4, 6],
        }
    }
    prove(resolved(config))


def test_tasks_of_the_base_that_the_file_names_stay(file) -> None:
    own = PARITY.replace('"cpu"', '"cpu-lis"')
    config = read_config(file(f"{own}[tasks.lis]\nmerge_inside = 9\n"))
    base = load_preset("cpu-lis")["tasks"]["lis"]
    assert config["tasks"]["lis"] == base | {"merge_inside": 9}
    assert len(config["tasks"]["parity"]["self_lengths"]) == len(base["self_lengths"])
    whole = resolved(config)
    assert whole["vocabulary"] == {
        **load_preset("cpu-lis")["vocabulary"],
        "tokens": ["[parity]", "<sep>", "0", "1"],
    }
    context = prove(whole)
    assert {name: task.index for name, task in context.tasks.items()} == {"parity": 3, "lis": 2}


def test_what_is_printed_gives_the_same_run(file, capsys) -> None:
    assert main(["--config", str(file(PARITY)), "--print-config", "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    again = read_config(file(printed))
    assert again["seed"] == 5
    assert resolved(override(again)) == again  # nothing is left to be found out
    assert again["vocabulary"] == {"multiple": 16, "tokens": ["[parity]", "<sep>", "0", "1"]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stages", "looped"], "stage 'looped' is unknown"),
        (["--minutes", "0"], "minutes = 0: give more than 0"),
        (["--minutes", "nan"], "minutes = nan: give more than 0"),
        (["--device", "gpu"], "device 'gpu' is unknown: use cpu or cuda"),
        (["--device", "cpu,tpu"], "device 'tpu' is unknown: use cpu or cuda"),
    ],
)
def test_what_a_run_would_refuse_is_refused_before_it_is_printed(
    arguments, said, tmp_path, capsys
) -> None:
    errors = []
    for command in (["--print-config"], ["--out", str(tmp_path / "run")]):
        assert main(["--preset", "cpu", *arguments, *command]) == 2
        out, error = capsys.readouterr()
        assert not out and error.count("\n") == 1 and re.search(said, error)
        errors.append(error)
    assert errors[0] == errors[1] and not (tmp_path / "run").exists()


def test_classes_beside_the_file_are_found_from_anywhere(file, tmp_path) -> None:
    (tmp_path / "my_tasks.py").write_text(
        "from tests.support.text_tasks import Parity as P\nclass Parity(P):\n    pass\n"
    )
    config = read_config(file(PARITY.replace(f"{CLASS}Parity", "my_tasks:Parity")))
    assert config["tasks"]["parity"]["class"] == f"{tmp_path / 'my_tasks.py'}:Parity"
    assert set(prove(resolved(config)).tasks) == {"parity"}


def test_a_task_given_as_an_object_becomes_its_class_and_parameters(file) -> None:
    config = read_config(file(PARITY))
    config["tasks"] = {"total": {"train": [1, 3], "test": [3, 4]}}
    whole = resolved(config, [Total(base=4)])
    assert whole["tasks"]["total"]["class"] == f"{CLASS}Total"
    assert whole["tasks"]["total"]["parameters"] == {"base": 4}
    assert whole["vocabulary"]["tokens"][:2] == ["[total]", "<sep>"]
    assert set(whole["vocabulary"]["tokens"][2:]) <= set("0123456789+")
    assert resolved(whole, [Total(base=4)]) == whole == resolved(whole)


def test_used_lengths_are_all_that_a_run_draws() -> None:
    entry = {"train": [2, 4], "test": [4, 5], "merge_beyond": [1, 1, 1], "self_lengths": [9],
             "hit_matrix": [3]}  # fmt: skip
    assert used_lengths(entry) == [2, 3, 4, 5, 6, 7, 9]


def test_self_chains_are_of_lengths_that_there_are_records_of(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RELAY_FAST_CACHE", str(tmp_path / "cache"))
    lines = [
        json.dumps({"problem": f"{n} {k}", "rounds": ["0"] * n, "answer": "0"}) + "\n"
        for n in (1, 2, 3, 5)
        for k in range(9)
    ]
    (tmp_path / "r.jsonl").write_text("".join(lines))

    def lengths(train: list[int], test: list[int], **table) -> list[int]:
        entry = {"data": str(tmp_path / "r.jsonl"), "train": train, "test": test, **table}
        config = load_preset("cpu") | {"tasks": {"r": entry}}
        return resolved(config)["tasks"]["r"]["self_lengths"]

    assert lengths([1, 3], [3, 3]) == [3], "the length beyond has no records"
    assert lengths([1, 2], [2, 5]) == [3, 3, 5]
    assert lengths([1, 3], [3, 7]) == [3, 5, 5]
    own = {"self_lengths": [4, 4], "self_counts": [2, 2]}
    assert lengths([1, 3], [3, 5], **own) == [4, 4], "what was given is refused, not changed"


def test_a_class_that_was_changed_under_its_run_is_refused(file, tmp_path, monkeypatch) -> None:
    config, run = resolved(read_config(file(PARITY))), tmp_path / "run"
    begin = lambda: _begin(config, run, "cpu", "torch")
    begin()
    kept = json.loads((run / "results.json").read_text())["samplers"]
    begin()
    assert list(kept) == ["parity"]
    assert json.loads((run / "results.json").read_text())["samplers"] == kept
    monkeypatch.setattr(Parity, "title", "Another title")
    begin()
    monkeypatch.setattr(Parity, "sample", lambda self, n, rng: ("0", *self.solve("0")))
    with pytest.raises(RunFolderError, match="the class of task 'parity' draws other samples than"):
        begin()
    (run / "results.json").write_text("{}")  # as an earlier version left it
    begin()


class Unsteady(Parity):
    name = "unsteady"
    calls = 0

    def sample(self, length, rng):
        Unsteady.calls += 1
        rounds = [str(Unsteady.calls % 2)] * length
        return " ".join("0" * length), rounds, rounds[-1]


class Longer(Parity):
    name = "longer"

    def sample(self, length, rng):
        return super().sample(length + 1, rng)


class Unsolved(Parity):
    name = "unsolved"

    def solve(self, problem):
        rounds, answer = super().solve(problem)
        return rounds, {"0": "1", "1": "0"}[answer]

    def sample(self, length, rng):
        problem = " ".join("1" * length)
        return problem, *Parity.solve(self, problem)


class NoTask:
    name = "no_task"


HERE = f"{__name__}:"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("unsteady", "", r"task 'unsteady': sample\(1, rng\) differs between two calls"),
        ("longer", "", r"task 'longer': sample\(1, rng\) returned the problem .*, of length 2"),
        ("unsolved", "", "task 'unsolved': the problem '1' has the rounds .* in solve; make"),
        ("no_task", "", "tasks.no_task.class = .*NoTask' is no task; derive it from"),
        ("parity", '[vocabulary]\ntokens = ["0"]', "holds the token '1', which the vocabulary"),
        ("parity", "[vocabulary]\ntokens = [3]", r"vocabulary.tokens = \[3\]"),
        ("parity", "[tasks.lost]\ntrain = [1, 2]\ntest = [2, 3]", "tasks.lost: unknown task"),
        ("parity", "[tasks.other]\nclass = 3", "tasks.other.class = 3: give a text"),
        ("parity", "[model]\nwidth = 3", "setting model.width is unknown"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(
    name, change, message, file, tmp_path, capsys
) -> None:
    where = HERE if name != "parity" else CLASS
    cls = {"no_task": "NoTask"}.get(name, name.title())
    text = PARITY.replace(f"{CLASS}Parity", f"{where}{cls}").replace(
        "tasks.parity", f"tasks.{name}"
    )
    path = file(f"{text}{change}\n")
    assert main(["--config", str(path), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([Parity(), Parity()], "two tasks are called 'parity': give each a name of its own"),
        ([Total()], r"config\['tasks'\] has no 'total': give it train and test lengths there"),
        ([Parity], "tasks holds <class .*, which is no task: give instances"),
    ],
)
def test_bad_task_objects_are_refused(tasks, message, file) -> None:
    with pytest.raises(ValueError, match=message):
        resolved(read_config(file(PARITY)), tasks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "missing.toml", "--out", "x"], "the config missing.toml cannot be read"),
        (["--config", "damaged.toml", "--out", "x"], "the config damaged.toml is damaged"),
        (["--config", "list.json", "--out", "x"], "list.json holds [1, 2]: give a table of set"),
        (["--config", "misspelt.toml", "--out", "x"], "table stage is unknown: the nearest is st"),
        (["--config", "base.toml", "--out", "x"], "preset 'nothing' is unknown"),
        (["--config", "a.toml", "--preset", "cpu", "--out", "x"], "give --preset or --config"),
    ],
)
def test_bad_files_are_refused(arguments, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.toml").write_text("[tasks")
    (tmp_path / "base.toml").write_text('base = "nothing"\n')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "misspelt.toml").write_text("[stage]\n")
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_tasks_of_the_tests_are_tasks() -> None:
    assert issubclass(Unsteady, TextTask) and not issubclass(NoTask, TextTask)


class Widened(Parity):
    name = "widened"
    zeros = 0

    def sample(self, length, rng):
        problem, rounds, answer = super().sample(length, rng)
        return "0 " * self.zeros + problem, rounds, answer


def test_what_only_the_given_instance_has_is_refused() -> None:
    """Every process builds a task of its class and arguments."""
    config = load_preset("cpu") | {"tasks": {"widened": {"train": [1, 3], "test": [3, 4]}}}
    task = Widened()
    resolved(config, [task])
    task.zeros = 2
    with pytest.raises(ValueError, match="^task 'widened' draws other samples than Widened built"):
        resolved(config, [task])


def test_a_task_without_a_name_is_named_by_its_class() -> None:
    class Nameless(Parity):
        name = None

    config = load_preset("cpu") | {"tasks": {"parity": {"train": [1, 3], "test": [3, 4]}}}
    with pytest.raises(ValueError, match="^Nameless has no name: write name = 'my_task' in the"):
        resolved(config, [Nameless()])


class Named(Parity):
    def __init__(self, name: str) -> None:
        self.name = name


@pytest.mark.parametrize(
    ("name", "preset", "message"),
    [
        (
            "ED",
            "cpu-lis",
            r"tasks.ED: \[ED\] is the token of a built-in task: give it another name",
        ),
        (
            "x" * 101,
            "cpu",
            "tasks.x*: use letters, digits, _ and - in the name of a task, at most 1",
        ),
        ("a b", "cpu", "tasks.a b: use letters, digits, _ and - in the name of a task"),
        ("ED", "cpu", None),  # alone, it may
        ("x" * 100, "cpu-lis", None),
    ],
)
def test_names_that_would_be_taken_for_others(name, preset, message) -> None:
    base = load_preset(preset)
    there = base["tasks"] if preset == "cpu-lis" else {}
    entries = {**there, name: {"train": [1, 3], "test": [3, 4]}}
    config = base | {"tasks": entries}
    if message is None:
        assert name in resolved(config, [Named(name)])["tasks"]
        return
    with pytest.raises(ValueError, match=f"^{message}"):
        resolved(config, [Named(name)])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "own.toml",
            "",
            "the config .*own.toml has no vocabulary: add it, or begin with base = .cpu",
        ),
        (
            "own.toml",
            PARITY.partition("\n")[2],
            "the config .*own.toml has no vocabulary: add it, or begin",
        ),
        (
            "own.toml",
            PARITY + "[stages]\nlooped_aligned = 3",
            "stages.looped_aligned = 3: give a t",
        ),
        ("own.toml", "training = 3\n" + PARITY, "training = 3: give a table"),
        ("own.json", "[1]", "the config .*own.json holds .1.: give a table of settings"),
        ("own.json", "null", "the config .*own.json holds None: give a table of settings"),
    ],
)
def test_a_config_that_lacks_parts_is_refused(name, text, message, tmp_path, capsys) -> None:
    (tmp_path / name).write_text(text)
    assert main(["--config", str(tmp_path / name), "--print-config", "--scale", "0.5"]) == 2
    error = capsys.readouterr().err
    assert re.match(f"error: {message}", error) and error.count("\n") == 1


def test_a_byte_order_mark_does_no_harm(tmp_path) -> None:
    (tmp_path / "mine.toml").write_text(PARITY, encoding="utf-8-sig")
    assert read_config(tmp_path / "mine.toml")["tasks"]["parity"]["train"] == [1, 4]
