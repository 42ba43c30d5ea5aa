"""What `--help` of the commands says."""

from __future__ import annotations

import pytest

import relay_fast.evaluate
import relay_fast.generate
import relay_fast.recipes.__main__ as recipes
import relay_fast.train

COMMANDS = {
    "train": relay_fast.train,
    "generate": relay_fast.generate,
    "evaluate": relay_fast.evaluate,
    "recipes": recipes,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does_and_its_default(name: str) -> None:
    parser = COMMANDS[name]._parser()
    for action in parser._actions:
        assert action.help, action.option_strings
        if action.default not in (None, False, []) and "--help" not in action.option_strings:
            shown = str(action.default)
            assert "default" in action.help or shown in action.help, action.option_strings


def test_the_first_model_is_the_default_of_generate() -> None:
    assert next(iter(relay_fast.generate.MODEL_NAMES)) == "looped_aligned"
    assert relay_fast.generate._parser().get_default("model") == "looped_aligned"
