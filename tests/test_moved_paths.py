"""Modules that moved: old paths that README named work, others say where the module went."""

from __future__ import annotations

import importlib

import pytest

from relay_fast._moved_paths import MOVED
from tests.support.fresh_python import run_fresh


@pytest.mark.parametrize("path", sorted(MOVED))
def test_an_old_path_says_where_the_module_went(path: str) -> None:
    with pytest.raises(ModuleNotFoundError) as raised:
        importlib.import_module(path)
    assert str(raised.value) == f"{path} moved to {MOVED[path]}: import it from there"
    for new in MOVED[path].split(" and "):
        importlib.import_module(new)


def test_a_from_import_says_it_too() -> None:
    with pytest.raises(ModuleNotFoundError, match="moved to relay_fast.engine.recompute"):
        from relay_fast import policy  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="moved to relay_fast.engine.recompute"):
        from relay_fast.policy import RecomputePolicy  # noqa: F401


def test_what_never_was_is_not_found_as_ever() -> None:
    with pytest.raises(ModuleNotFoundError, match="No module named 'relay_fast.nothing'"):
        importlib.import_module("relay_fast.nothing")


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("relay_fast.graphs", "relay_fast.training.cuda_graph", "GraphedStep"),
        ("relay_fast.chain_dataset", "relay_fast.relay.chain_dataset", "ChainDataset"),
        ("relay_fast.presets", "relay_fast.relay.presets", "load_preset"),
        ("relay_fast.engine", "relay_fast.engine.loop", "run_loop"),
        ("relay_fast.batch", "relay_fast.batch.packed", "PackedBatch"),
        ("relay_fast.data", "relay_fast.data.streams", "SampleStream"),
        ("relay_fast.generate", "relay_fast.decoding.chains", "unseen_problems"),
        ("relay_fast.evaluate", "relay_fast.relay.evaluation", "grade_looped"),
    ],
)
def test_old_names_are_the_same_objects(old: str, new: str, name: str) -> None:
    here, there = importlib.import_module(old), importlib.import_module(new)
    assert getattr(here, name) is getattr(there, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        here.nothing  # noqa: B018


def test_the_public_engine_in_a_fresh_interpreter() -> None:
    code = "import relay_fast; print(relay_fast.engine.run_loop.__module__)"
    found = run_fresh(code)
    assert found.stdout.strip() == "relay_fast.engine.loop"
