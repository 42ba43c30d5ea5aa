"""Memory and speed against the number of loops T, for every provider and recompute policy.

    python benchmarks/memory_vs_loops.py [--quick]

All sequences are equally long and loop T times, so that eager wastes nothing on padding: what
differs is what is kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, measuring  # noqa: E402
from relay_fast.reporting.palette import COLORS  # noqa: E402
from relay_fast.reporting.plots import new_figure  # noqa: E402

LOOPS, QUICK_LOOPS = (1, 2, 4, 8, 16, 30, 64), (1, 4, 30)
TOKENS, TARGETS = 48, 12  # of a sequence; supervised ones in each iteration


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """saved_bytes and peak_bytes over T, both axes logarithmic."""
    figure = new_figure(9, 4)
    left, right = figure.subplots(1, 2, sharey=True)
    names = dict.fromkeys((str(r["provider"]), str(r["policy"]).split(":")[0]) for r in rows)
    loops = sorted({r["loops"] for r in rows})
    for axis, column in ((left, "saved_bytes"), (right, "peak_bytes")):
        axis.set_prop_cycle(color=COLORS)
        for name, policy in names:
            own = [
                r for r in rows if (r["provider"], str(r["policy"]).split(":")[0]) == (name, policy)
            ]
            style = "-o" if name == "relay_fast" else "--s"
            axis.loglog(
                [r["loops"] for r in own],
                [max(1, r[column]) / 2**20 for r in own],
                style,
                markersize=4,
                label=f"{name} {policy}".strip(),
            )
        axis.set_xlabel("loops T")
        axis.set_xticks(loops, [str(t) for t in loops])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    left.set_ylabel("MiB")
    left.set_title("alive between forward and backward")
    right.set_title("peak of the step, workspaces included")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    parser = common.arguments(__doc__.splitlines()[0], "memory_vs_loops.csv")
    parser.add_argument("--config", choices=common.CONFIGS, default="relay")
    parser.add_argument("--batch", type=int, help="sequences")
    parser.add_argument("--loops", type=int, nargs="+")
    parser.add_argument("--png", type=Path, help="default: beside the CSV")
    args = parser.parse_args(argv)
    config, dtype = common.CONFIGS[args.config], common.chosen_dtype(args)
    size = args.batch or (2 if args.quick else 8 if args.device == "cpu" else 256)
    peak = measuring.matmul_peak(args.device, dtype)
    names = [n for n in common.PROVIDERS if not (args.quick and n == "compile_bucketed")]
    extra = {"batch": size, "dtype": str(dtype).removeprefix("torch.")}
    rows = []
    for loops in args.loops or (QUICK_LOOPS if args.quick else LOOPS):
        full = lambda value: np.full(size, value, np.int64)
        batch = common.synthetic_batch(
            full(TOKENS), full(loops), TARGETS, config.vocabulary_size, args.device
        )
        policies = common.policies_for(batch, config.block.d_model)
        providers = common.make_providers(
            names, policies, config, batch, full(0), dtype, args.device
        )
        label = {"config": args.config, "mix": "equal"}
        seconds, least = (0, 1) if args.quick else (5, 2)
        rows += measuring.measure(providers, label, config, batch, seconds, peak, least)
    common.show(rows)
    common.append_rows(args.csv, [row | extra | common.machine(args.device) for row in rows])
    png = args.png or args.csv.with_suffix(".png")
    plot(rows, png)
    print(f"plot: {png}")
    return rows


if __name__ == "__main__":
    main()
