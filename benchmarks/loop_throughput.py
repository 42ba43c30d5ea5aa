"""Training steps a second: eager PyTorch as a careful user writes it against relay_fast.

    python benchmarks/loop_throughput.py [--config relay|lm|tiny] [--mix …] [--quick]

Same weights, same samples, same loss (checked first), interleaved timing. The multitask mix: the
three tasks equally likely, each length drawn in proportion to itself inside the training range.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402

# On a CPU a batch of 64 is the paper's mix on 2 cores; a GPU needs more to be busy.
BATCH = {"cpu": {"relay": 64, "lm": 4, "tiny": 64}, "cuda": {"relay": 512, "lm": 32, "tiny": 512}}
QUICK = {"relay": 6, "lm": 1, "tiny": 8}


def best_buckets(config, batch, group, dtype, device) -> int:
    """How many length buckets suit the eager user best: the quickest forward pass of 1, 2, 4, 8."""
    seconds = {}
    for at_most in (1, 2, 4, 8):
        (provider,) = common.make_providers(
            ["eager_bucketed"], [], config, batch, group, dtype, device, at_most
        )
        with torch.no_grad():
            seconds[at_most] = common.seconds_of(provider.forward_all, device)
    return min(seconds, key=seconds.get)


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    parser = common.arguments(__doc__.splitlines()[0], "loop_throughput.csv")
    parser.add_argument("--config", choices=common.CONFIGS, default="relay")
    parser.add_argument("--mix", choices=common.MIXES, default="multitask")
    parser.add_argument("--batch", type=int, help="samples a step")
    parser.add_argument("--providers", nargs="+", choices=common.PROVIDERS)
    parser.add_argument("--policies", nargs="+", help="of relay_fast; default: all")
    parser.add_argument("--seconds", type=float, help="for the timing alone")
    args = parser.parse_args(argv)
    config, dtype = common.CONFIGS[args.config], common.chosen_dtype(args)
    usual = QUICK if args.quick else BATCH[args.device]
    size = args.batch or usual[args.config]
    mix = "synthetic" if args.config == "lm" else args.mix
    batch, group = common.make_batch(args.config, args.mix, size, 0, args.device)
    names = args.providers or [
        n for n in common.PROVIDERS if not (args.quick and n == "compile_bucketed")
    ]
    policies = args.policies or common.policies_for(batch, config.block.d_model)
    at_most = best_buckets(config, batch, group, dtype, args.device)
    providers = common.make_providers(
        names, policies, config, batch, group, dtype, args.device, at_most
    )
    plan = batch.plan
    print(
        f"{size} samples, {plan.rows} tokens, {plan.token_iterations} token-iterations "
        f"({plan.token_iterations / size:.0f} a sample; padded "
        f"{plan.lengths.max() * plan.max_loops}); eager bucketed cuts each task into "
        f"{at_most} length buckets"
    )
    rows = common.measure(
        providers,
        {"config": args.config, "mix": mix},
        config,
        batch,
        args.seconds if args.seconds is not None else (5 if args.quick else 60),
        common.matmul_peak(args.device, dtype),
    )
    common.show(rows)
    extra = {"batch": size, "dtype": str(dtype).removeprefix("torch.")}
    common.append_rows(args.csv, [row | extra | common.machine(args.device) for row in rows])
    return rows


if __name__ == "__main__":
    main()
