"""Experiments of papers related to RELAY, and examples: `python -m relay_fast.recipes NAME`.

A recipe is a module of this folder with

- `PRESETS`: dict of settings (`relay_fast.utils.settings.settings`, each field with its range and
  meaning), "cpu" and "paper" (the paper's exact sizes); a recipe that trains has a
  `relay_fast.recipes._common.Training` called `training`;
- `PUBLISHED`: the paper's numbers as printed, as far as they are known;
- `prove(settings)`, optional: raises ValueError for settings that do not fit existing files;
- `run(settings, folder, *, seed, device, display)`: returns JSON-able results; continues an
  interrupted run in `folder`; with a parameter `tasks` it runs on tasks of a config too
  (`relay_fast.recipes._own_tasks.OwnTasks`);
- `rows(results)`: returns (header, rows) of the table, measured beside published numbers;
- `plot(results, path)`: draws a PNG.

An example (`EXAMPLES`) is a recipe to copy from, with the preset "cpu" alone and nothing published.

`rows` and `plot` get the results as read back from JSON: keys are strings, tuples are lists.
"""

from __future__ import annotations

import importlib
from types import ModuleType

# Name -> one line with the paper; here, so that listing them does not import torch.
RECIPES: dict[str, str] = {
    "p_hop": "p-hop induction, one looped layer against stacks (Saunshi et al. 2025)",
    "loop_regularizer": "a stack drawn towards a loop, then made one (Saunshi et al. 2025)",
    "stacking": "stacks that grow while they train (MIDAS, Saunshi et al. 2024)",
    "looped_lm": "a small looped language model over bytes, with early exit",
    "addition": "adding many numbers, looped layers against stacks (Saunshi et al. 2025)",
    "i_gsm": "arithmetic on a graph, looped layers against stacks (Saunshi et al. 2025)",
    "linear_loop": "linear attention loops learn gradient descent (Gatmiry et al. 2024)",
    "cot_gd": "a chain of thought that is gradient descent (Huang, Wang, Lee 2025)",
    "gd_conditioning": "loops of linear attention against e^(-T/condition) (Chen et al. 2024)",
    "length_generalization": "as many loops as the problem is long (Fan et al. 2024)",
    "drop_in": "example: a looped block in a plain training loop",
    "fabric": "example: the same under Lightning Fabric",
    "own_jsonl": "example: RELAY on your own records in a JSONL file",
    "sft": "example: a Llama of transformers fine-tuned on a looped model's chains",
}
EXAMPLES = ("drop_in", "fabric", "own_jsonl", "sft")


def load_recipe(name: str) -> ModuleType:
    """Imports the module of a recipe. Raises ValueError for an unknown name."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is unknown: use one of {', '.join(RECIPES)}")
    return importlib.import_module(f"{__name__}.{name}")
