"""Makes a small run folder, to be shared, of a finished run.

It keeps the config, the accuracy and some models, each with a model card in its header: what it is,
how it was trained, how far it goes, what it is not for. `relay_fast.generate` and
`relay_fast.evaluate` use such a folder as any run.

    python benchmarks/trained_run.py --run runs/cpu --to benchmarks/results/trained
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from relay_fast.relay.presets.saved import open_run  # noqa: E402
from relay_fast.relay.run_folder import RunFolder  # noqa: E402
from relay_fast.reporting.tables import MODEL_NAMES  # noqa: E402
from relay_fast.reporting.terminal import refused  # noqa: E402
from relay_fast.training.model_files import load_model, model_path, save_model  # noqa: E402
from relay_fast.utils.tensor_files import CheckpointError  # noqa: E402

SHARED = ("looped_aligned", "ar_relay", "ar_baseline")
# Of results.json: curves and matrices are larger than the models' numbers.
KEPT = ("accuracy", "config", "labels", "seconds", "seed", "train_lengths", "trust", "versions")
PAPER = "RELAY: Yu et al., arXiv 2502.08482"


def model_card(results: Mapping[str, Any], name: str) -> str:
    """Returns the card of a run's model, in Markdown, from the content of results.json."""
    config, versions, training = (results[key] for key in ("config", "versions", "training"))
    seconds, model = training[name]["seconds"], config["model"]
    lines = [
        f"# {MODEL_NAMES[name]} ({name})",
        f"A transformer of {model['n_layers']} layers, width {model['d_model']}, from the"
        f" preset `{config['name']}` of relay_fast {versions['relay_fast']}, seed"
        f" {results['seed']}. Licence MIT. Method: {PAPER}.",
    ]
    for task, by_length in results["accuracy"][name].items():
        first, last = results["train_lengths"][task]
        settings = config["tasks"][task].get("parameters", {})
        label = results["labels"][task]
        lines += [
            f"## {label['title']}",
            f"Trained on {label['unit']} {first} to {last}, settings {settings}. Whole chains right"
            f" of {next(iter(by_length.values()))['n']} problems a length:",
            "\n".join(f"- {length}: {row['chain']:.1%}" for length, row in by_length.items()),
        ]
    lines += [
        "## Training",
        f"{training[name]['samples']:,} samples in {seconds:.0f} s on {versions['device_name']}"
        f" ({versions['cpu_count']} cores, torch {versions['torch']}).",
        "## Limits",
        "It solves problems of this task in the tokens of this vocabulary and nothing else; it"
        " shows the method and is no benchmark of it.",
    ]
    return "\n\n".join(lines)


def share(run: str | Path, to: str | Path, models: Sequence[str] = SHARED) -> Path:
    """Writes the folder `to` with models of the finished run `run`. Returns `to`.

    Args:
        run: The run folder.
        to: The folder to write; it must not hold another run.
        models: Names of its models.

    Raises:
        RunFolderError, CheckpointError: A folder or a model cannot be used.
        ValueError: A model of the run was not evaluated.
    """
    source = open_run(run)
    results = source.results()
    missing = [name for name in models if name not in results.get("accuracy", {})]
    if missing:
        raise ValueError(f"{run} has no accuracy of {', '.join(missing)}: finish the run first")
    folder = RunFolder(to, source.config)
    for name in models:
        model, info = load_model(model_path(run, name))
        card = model_card(results, name)
        save_model(model_path(to, name), model, {**info, "card": card})
    kept = {key: results[key] for key in KEPT if key in results}
    kept["accuracy"] = {name: results["accuracy"][name] for name in models}
    folder.update_results(kept)
    return Path(to)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="a finished run folder")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="the folder to write")
    parser.add_argument("--models", default=",".join(SHARED), help="comma-separated")
    a = parser.parse_args(arguments)
    try:
        folder = share(a.run, a.to, a.models.split(","))
    except (CheckpointError, RuntimeError, ValueError, OSError) as error:
        return refused(error)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
