"""What each choice of the recipes for rounds fed back as tokens is worth, by task.

    python benchmarks/recipe_ablation.py --task lis --variants base,no_shift --scale 0.3

The looped model of the task's preset with the settings of a variant, a row a training, written as
it ends: chains right by length in %, inside the trained range, a fifth and a third beyond it. A
scale of 1 takes the preset's token-iterations. The same command goes on with the trainings that the
CSV does not hold yet, and draws all that it holds of the task at this scale.
"""

from __future__ import annotations

import csv
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.one_iteration import train_once
from benchmarks.truncated_loop import TruncatedContext
from relay_fast.relay.evaluation import evaluate_looped
from relay_fast.relay.presets import load_preset, override
from relay_fast.relay.stages import Context, run_stage
from relay_fast.reporting.palette import ORANGE, SKY
from relay_fast.reporting.plots import new_figure

PRESETS = {
    "arithmetic": "cpu-arithmetic", "edit_distance": "cpu-edit-distance", "lis": "cpu-lis",
}  # fmt: skip
STAGE = "looped_aligned"
ONE_ITERATION = "one_iteration"  # a control, of which only the answers count
TRUNCATED = "latent_truncated"  # "latent", with gradients that end at each iteration's start
ROWS = common.RESULTS / "recipe_search.csv"


def _stage(**values: Any) -> list[str]:
    return [f"stages.{STAGE}.{key}={json.dumps(value)}" for key, value in values.items()]


def _looped(**values: Any) -> list[str]:
    return [f"model.looped.{key}={json.dumps(value)}" for key, value in values.items()]


def _model(**values: Any) -> list[str]:
    return [f"model.{key}={json.dumps(value)}" for key, value in values.items()]


# RELAY's loop, its state carried and no round fed back, with what helped it in recipe_ablation.csv;
# "latent_cut" has the cut in the positions too that helps lengths beyond where rounds are fed back.
LATENT = [
    *_looped(feedback="none", loop_norm="post"),
    *_stage(lengths="proportional", lengths_per_batch=4, curriculum=0.5, weighting="sequence"),
    *_stage(muon_lr=0.003, warmup=0.03),
]
_LATENT_PADDING = {"arithmetic": 50, "edit_distance": 30, "lis": 40}  # tokens
_EVERY = {
    "base": [],
    "latent_as_base": _looped(feedback="none"),
    "carried_state": _looped(carry_state=True, loop_norm="post"),
    "carried_state_own_rounds": [
        *_looped(carry_state=True, loop_norm="post"), *_stage(truth=0.2)
    ],
    "fed_noise_2": _looped(feedback_noise=0.02),
    "fed_noise_10": _looped(feedback_noise=0.1),
    "sequence_weighting": _stage(weighting="sequence"),
    "curriculum": _stage(curriculum=0.5),
    "layers_1": _model(n_layers=1),
    "layers_2": _model(n_layers=2),
    "layers_4": _model(n_layers=4),
    "width_32": _model(d_model=32),
    "width_96": _model(d_model=96),
    "heads_2": _model(n_heads=2),
    "rope_base_1000": _model(rope_base=1e3),
    "rope_base_100000": _model(rope_base=1e5),
    "no_positions": _model(rope_base=None),
    "dropout_10": _model(dropout=0.1),
    "adamw": _stage(muon_lr=None),
    "adamw_lr_3e-3": _stage(muon_lr=None, lr=3e-3),
    "muon_lr_0.0025": _stage(muon_lr=0.0025),
    "muon_lr_0.005": _stage(muon_lr=0.005),
    "muon_lr_0.01": _stage(muon_lr=0.01),
    "muon_lr_0.02": _stage(muon_lr=0.02),
    "linear_decay": _stage(decay="linear"),
    "ema": _stage(ema=0.99),
    "fixed_data": _stage(dataset_size=20000),
    "bf16": _stage(autocast="bf16"),
}  # fmt: skip


def variants(task: str) -> dict[str, list[str]]:
    """The variants of a task: name, and the settings that it changes in the task's preset."""
    fed = f"tasks.{task}.feedback"
    padded = _stage(pad_probability=0.3, pad_to=_LATENT_PADDING[task])
    found = {**_EVERY, "latent": [*LATENT, *padded], "latent_no_norm": [*LATENT, *padded]}
    found["latent_no_norm"] += _looped(loop_norm="none")
    found["latent_injected"] = [*found["latent"], *_looped(injection="add")]
    found["latent_cut"] = [*found["latent"], *_stage(cut=31)]
    found[TRUNCATED] = found["latent"]
    found["latent_noise"] = [*found["latent"], *_looped(state_noise=0.1)]
    preset = load_preset(PRESETS[task])["stages"][STAGE]
    batch = preset["batch_size"]
    del found[f"muon_lr_{preset['muon_lr']}"]  # its own
    found["batch_4_times"] = _stage(batch_size=4 * batch)
    found["batch_quarter"] = _stage(batch_size=batch // 4)
    found[ONE_ITERATION] = [*_looped(feedback="none"), *_stage(batch_size=4 * batch)]
    if task == "arithmetic":
        found["no_padding"] = _stage(pad_probability=0.0)
        found["proportional_lengths"] = _stage(lengths="proportional")
    else:
        found["padding"] = padded
        found["uniform_lengths"] = _stage(lengths="uniform")
        found["no_shift"] = [f"{fed}.shift=0"]
        found["no_shift_uniform_lengths"] = [*found["no_shift"], *found["uniform_lengths"]]
    if task != "lis":  # its positions are clipped
        found["no_cut"] = [f"{fed}.cut=0"]
        found["cut_always"] = [f"{fed}.cut_probability=1.0"]
    if task == "edit_distance":
        found["cut_half"] = [f"{fed}.cut_probability=0.5"]
    return found


def trained(task: str, variant: str, seed: int, scale: float, problems: int) -> dict[str, Any]:
    """What the training of a variant led to."""
    preset = load_preset(PRESETS[task])
    work = scale * preset["stages"][STAGE]["token_iterations"]
    values = [*variants(task)[variant], *_stage(token_iterations=work)]
    config = override(preset, values=values, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        kind = TruncatedContext if variant == TRUNCATED else Context
        context = kind(Path(folder), config, "cpu", "auto")
        began = time.process_time()
        if variant == ONE_ITERATION:
            model, longest_true = train_once(context, STAGE)
        else:
            longest_true = run_stage(context, STAGE, lambda _: None)["longest_true_problem"]
            model = context.load(STAGE)
        seconds = time.process_time() - began
    lengths = range(1, config["tasks"][task]["test"][1] + 1)
    right = evaluate_looped(model, context.tasks, task, lengths, problems, seed)
    return {
        "longest_true_problem": longest_true[task],
        "cpu_seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        **told(right, config["tasks"][task]["train"][1], once=variant == ONE_ITERATION),
    }


def told(
    right: Mapping[int, Mapping[str, float]], longest: int, once: bool = False
) -> dict[str, Any]:
    """The accuracies of a row, in %.

    Args:
        right: By length, as `evaluate_looped` measures it.
        longest: The longest trained length.
        once: The model answers in one iteration and writes no chains.
    """
    percent = lambda what: {n: round(100 * row[what], 2) for n, row in right.items()}
    chain, answer = percent("chain"), percent("answer_once" if once else "answer")
    inside = [chain[n] for n in range(1, longest + 1)]
    fifth, third = beyond(longest)
    chains = {
        "mean_inside": round(float(np.mean(inside)), 2),
        "least_inside": min(inside),
        "longest": inside[-1],
        "fifth_beyond": chain[fifth],
        "third_beyond": chain[third],
        "bit_fifth_beyond": percent("bit")[fifth],
        "chains": json.dumps(chain),
    }
    if once:
        chains = dict.fromkeys(chains, "")
    answers = {"answer_longest": answer[longest], "answer_fifth_beyond": answer[fifth]}
    return {**chains, **answers, "answers": json.dumps(answer)}


def beyond(longest: int) -> tuple[int, int]:
    """The lengths a fifth and a third beyond the longest trained one."""
    return round(1.2 * longest), round(4 / 3 * longest)


def rows_of(path: Path, **same: Any) -> list[dict[str, str]]:
    """The rows of a CSV file that hold these values, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            row for row in csv.DictReader(file) if all(row[k] == str(v) for k, v in same.items())
        ]


def plot(task: str, rows: list[dict[str, str]], path: Path) -> None:
    """Chains right inside and beyond the trained range: a bar a variant, a dot a seed."""
    longest = load_preset(PRESETS[task])["tasks"][task]["train"][1]
    fifth, third = beyond(longest)
    columns = {
        "mean_inside": f"mean of 1 to {longest}", "longest": f"{longest}, the longest trained",
        "fifth_beyond": f"{fifth}", "third_beyond": f"{third}",
    }  # fmt: skip
    names = [name for name in variants(task) if any(row["variant"] == name for row in rows)]
    figure = new_figure(12, 0.32 * len(names) + 1.4)
    places = range(len(names))
    colors = [ORANGE if name == "base" else SKY for name in names]
    for axis, (column, title) in zip(
        figure.subplots(1, 4, sharey=True), columns.items(), strict=True
    ):
        seen = [[float(r[column]) for r in rows if r["variant"] == name] for name in names]
        axis.barh(places, [float(np.mean(values)) for values in seen], color=colors)
        for place, values in zip(places, seen, strict=True):
            axis.plot(values, [place] * len(values), "k.", markersize=4, clip_on=False)
        axis.set_title(title)
        axis.set_xlim(0, 101)
        axis.grid(axis="x", alpha=0.3)
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    work = float(rows[0]["token_iterations"]) / 1e6
    figure.suptitle(f"{task}: {work:.2g} M token-iterations a training")
    figure.supxlabel(f"chains right (%), by length; trained on 1 to {longest}")
    figure.savefig(path, dpi=120)


def chosen(task: str, names: Sequence[str] | None) -> dict[str, list[str]]:
    """The variants `names`, all by default. Raises ValueError for an unknown one."""
    known = variants(task)
    for name in names or ():
        if name not in known:
            raise ValueError(f"variant {name!r} is unknown: use some of {', '.join(known)}")
    return {name: known[name] for name in names or known}


def shown(task: str, names: Sequence[str] | None) -> str:
    """The variants as options of `relay_fast.train`, a line each."""
    command = f"{{}}: --preset {PRESETS[task]}"
    return "\n".join(
        " ".join([command.format(name), *(f"--set '{value}'" for value in values)])
        for name, values in chosen(task, names).items()
    )


def search(
    task: str,
    names: Sequence[str] | None,
    seeds: Sequence[int],
    scale: float,
    problems: int,
    path: Path,
) -> list[dict[str, Any]]:
    """Trains what the file does not hold yet, writes a row a training, and draws the plot.

    Args:
        task: The task.
        names: Its variants, all by default.
        seeds: Seeds of each.
        scale: Share of the preset's token-iterations.
        problems: Problems a length in evaluation.
        path: The CSV file; the plot lies beside it.

    Returns:
        The new rows.

    Raises:
        ValueError: A variant is unknown.
    """
    known, new = chosen(task, names), []
    work = scale * load_preset(PRESETS[task])["stages"][STAGE]["token_iterations"]
    same = {"task": task, "token_iterations": f"{work:g}", "problems": problems}
    for seed in seeds:
        for name in known:
            row = {**same, "variant": name, "seed": seed}
            if rows_of(path, **row):
                continue
            row |= trained(task, name, seed, scale, problems)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            common.append_rows(path, [row | common.machine("cpu")])
            new.append(row)
    if drawn := [row for row in rows_of(path, **same) if row["chains"]]:
        plot(task, drawn, path.with_name(f"{path.stem}_{task}.png"))
    return new
