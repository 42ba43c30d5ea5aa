"""Training steps a second: eager PyTorch as a careful user writes it against relay_fast.

    python benchmarks/loop_throughput.py [--config relay|lm|tiny] [--mix …] [--quick]

Same weights, same samples, same loss (checked first), interleaved timing. The multitask mix: the
three tasks equally likely, each length drawn in proportion to itself inside the training range.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, measuring  # noqa: E402

# On a CPU a batch of 64 is the paper's mix on 2 cores; a GPU needs more to be busy.
BATCH = {"cpu": {"relay": 64, "lm": 4, "tiny": 64}, "cuda": {"relay": 512, "lm": 32, "tiny": 512}}
BUCKETS = 4  # of length in each task, for the eager user: what --tune found on 2 CPU cores
QUICK = {"relay": 6, "lm": 1, "tiny": 8}


TUNE_BUCKETS, TUNE_BATCHES = (1, 2, 4, 8), (1, 2, 4)  # the latter in usual batches


def tune(config: str, mix: str, size: int, dtype, device: str) -> None:
    """Prints what suits the eager user best: samples a second by batch and length buckets."""
    print("batch  buckets  samples_per_s (eager_bucketed, median of three steps)")
    for share in TUNE_BATCHES:
        batch, group = common.make_batch(config, mix, size * share, 0, device)
        providers = [
            common.make_providers(
                ["eager_bucketed"], [], common.CONFIGS[config], batch, group, dtype, device, most
            )[0]
            for most in TUNE_BUCKETS
        ]
        for provider in providers:
            provider.step()
        times = measuring.interleave(providers, 0, least=3)
        for most, seen in zip(TUNE_BUCKETS, times, strict=True):
            print(f"{size * share:5}  {most:7}  {size * share / statistics.median(seen):.3f}")


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    parser = common.arguments(__doc__.splitlines()[0], "loop_throughput.csv")
    parser.add_argument("--config", choices=common.CONFIGS, default="relay")
    parser.add_argument("--mix", choices=common.MIXES, default="multitask")
    parser.add_argument("--batch", type=int, help="samples a step")
    parser.add_argument("--providers", nargs="+", choices=common.PROVIDERS)
    parser.add_argument("--policies", nargs="+", help="of relay_fast; default: all")
    parser.add_argument("--rounds", type=int, default=1, help="of timing, at least (1: 5 minutes)")
    parser.add_argument("--seconds", type=float, default=5, help="for the timing, at least (5)")
    parser.add_argument("--buckets", type=int, default=BUCKETS, help=f"eager's ({BUCKETS})")
    parser.add_argument("--tune", action="store_true", help="what batch and buckets suit eager")
    args = parser.parse_args(argv)
    config, dtype = common.CONFIGS[args.config], common.chosen_dtype(args)
    usual = QUICK if args.quick else BATCH[args.device]
    size = args.batch or usual[args.config]
    if args.tune:
        tune(args.config, args.mix, size, dtype, args.device)
        return []
    mix = "synthetic" if args.config == "lm" else args.mix
    batch, group = common.make_batch(args.config, args.mix, size, 0, args.device)
    names = args.providers or [
        n for n in common.PROVIDERS if not (args.quick and n == "compile_bucketed")
    ]
    policies = args.policies or common.policies_for(batch, config.block.d_model)
    providers = common.make_providers(
        names, policies, config, batch, group, dtype, args.device, args.buckets
    )
    plan = batch.plan
    print(
        f"{size} samples, {plan.rows} tokens, {plan.token_iterations} token-iterations "
        f"({plan.token_iterations / size:.0f} a sample; padded "
        f"{plan.lengths.max() * plan.max_loops}); eager bucketed cuts each task into "
        f"{args.buckets} length buckets"
    )
    rows = measuring.measure(
        providers,
        {"config": args.config, "mix": mix},
        config,
        batch,
        args.seconds,
        measuring.matmul_peak(args.device, dtype),
        args.rounds,
    )
    common.show(rows)
    extra = {"batch": size, "buckets": args.buckets, "dtype": str(dtype).removeprefix("torch.")}
    common.append_rows(args.csv, [row | extra | common.machine(args.device) for row in rows])
    return rows


if __name__ == "__main__":
    main()
