"""Neighbours of RELAY as runnable recipes: `python -m relay_fast.recipes NAME`.

A recipe is a module of this folder with

- `PRESETS`: dict of settings (`relay_fast.utils.settings.settings`: each field has its range and
  meaning), "cpu" and "paper" (the paper's exact sizes); one that trains holds a
  `relay_fast.recipes._common.Training` called `training`;
- `PUBLISHED`: the paper's numbers as printed, only those known;
- `prove(settings)`, if settings can be wrong in a way that only a look at files shows: ValueError;
- `run(settings, folder, *, seed, device, display)`: the results, JSON-able; continues in `folder`;
- `rows(results)`: (header, rows) of the table, measured beside published;
- `plot(results, path)`: a PNG.

`rows` and `plot` get the results as read back from JSON: keys are strings, tuples are lists.
"""

from __future__ import annotations

import importlib
from types import ModuleType

# Name -> one line with the paper. The lines are here so that listing them imports no torch.
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
}


def load_recipe(name: str) -> ModuleType:
    """The module of a recipe. Raises ValueError for an unknown name."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is unknown: use one of {', '.join(RECIPES)}")
    return importlib.import_module(f"{__name__}.{name}")
