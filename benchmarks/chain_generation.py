"""Chains a second by task and length: eager PyTorch, Hugging Face and relay_fast.

    python benchmarks/chain_generation.py [--quick] [--cases …]

Same weights (random) and problems; equal tokens are checked first, in fp64 on a few problems. An
untrained autoregressive model never ends, so each sequence gets as many tokens as its true chain
has, for all providers alike: `<eos>` is kept from being written. Eager code takes problems in
batches as they come. `mixed`: the three tasks alike often, lengths drawn in proportion to length
inside the training range.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import chain_baselines, common, measuring  # noqa: E402
from benchmarks.baselines import EagerTransformer  # noqa: E402
from relay_fast.config import ModelConfig  # noqa: E402
from relay_fast.decoding.autoregressive import decode  # noqa: E402
from relay_fast.decoding.chains import generate_looped_chains, read_batch  # noqa: E402
from relay_fast.functional import supports  # noqa: E402
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer  # noqa: E402
from relay_fast.reporting.palette import COLORS  # noqa: E402
from relay_fast.reporting.plots import new_figure  # noqa: E402
from relay_fast.tasks import TASK_NAMES, Samples, Vocabulary, build_tasks  # noqa: E402
from relay_fast.tasks.vocabulary import EOS  # noqa: E402

COLUMNS = "task length provider chains_per_s tokens_per_s peak_bytes flops_per_chain".split()
LOOPED = ("eager_padded", "relay_fast_torch", "relay_fast_triton")
AUTOREGRESSIVE = ("ar_eager", "ar_hf", "ar_relay_fast")
PROVIDERS = (*LOOPED, *AUTOREGRESSIVE)
LENGTHS = {"arithmetic": (5, 15, 25), "edit_distance": (10, 25, 40), "lis": (40, 80, 120)}
QUICK_LENGTHS = {"arithmetic": (2, 6), "lis": (12, 24)}
QUICK_LONGEST = {"arithmetic": 6, "edit_distance": 5, "lis": 24}
CHECKED = 6  # problems whose tokens are compared
TASKS = build_tasks(TASK_NAMES, Vocabulary())


class Case(NamedTuple):
    """Problems to write chains for, with their truth, whose sizes are taken."""

    task: str
    length: str
    problems: Samples

    @property
    def limits(self) -> np.ndarray:
        """(S,) tokens of each true chain, `<eos>` included."""
        _, offsets, prompts = self.problems.sequences(TASKS)
        return np.diff(offsets) - prompts

    def take(self, number: int) -> Case:
        return self._replace(problems=self.problems.take(slice(0, number)))


class Provider(NamedTuple):
    """One way to write chains. run(case) gives tokens, to be compared; flops(case) those it needs
    for real tokens."""

    name: str
    run: Callable[[Case], np.ndarray]
    flops: Callable[[Case], float]


def mixed_case(number: int, longest: dict[str, int], seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(TASK_NAMES), size=number)
    parts = []
    for k, name in enumerate(TASK_NAMES):
        lengths = np.arange(TASKS[name].min_length, longest[name] + 1)
        chosen = rng.choice(lengths, int((drawn == k).sum()), p=lengths / lengths.sum())
        parts.append(TASKS[name].sample(chosen, seed))
    problems = Samples.concat(parts)
    return Case("mixed", "mixed", problems.take(rng.permutation(number)))


def make_cases(quick: bool, number: int, mixed: int, names: list[str]) -> list[Case]:
    lengths = QUICK_LENGTHS if quick else LENGTHS
    cases = [
        Case(name, str(n), TASKS[name].sample(np.full(number, n), 0))
        for name in lengths
        if name in names
        for n in lengths[name]
    ]
    if "mixed" in names:
        cases.append(mixed_case(mixed, QUICK_LONGEST if quick else common.LONGEST))
    return cases


# FLOPs of real tokens only: no padding, nothing after a sequence's end


def _flops(config: ModelConfig, tokens: float, pairs: float, read: float) -> float:
    """tokens that pass the block, pairs of tokens in attention, rows that are read out."""
    c = config.block
    linear = c.d_model * (c.n_heads + 2 * c.kv_heads) * c.head_dim + c.d_model**2
    linear += 2 * c.d_model * c.hidden
    layers = c.n_layers * (2 * linear * tokens + 4 * c.d_model * pairs)
    return layers + 2 * c.d_model * config.vocabulary_size * read


def looped_flops(config: ModelConfig, case: Case) -> float:
    """For each chain, on average."""
    p = case.problems
    least = np.array([TASKS[TASK_NAMES[k]].min_input_tokens for k in p.task])
    n = np.maximum(np.diff(p.problem_offsets), least)
    tokens = float(n @ p.loops)
    return _flops(config, tokens, float(n**2 @ p.loops), tokens + len(p)) / len(p)


def autoregressive_flops(config: ModelConfig, case: Case) -> float:
    """For each chain, on average."""
    limits = case.limits
    n = np.diff(case.problems.problem_offsets) + limits - 1  # the last token is not read
    pairs = float((n * (n + 1) / 2).sum())
    return _flops(config, float(n.sum()), pairs, float(limits.sum())) / len(limits)


# Providers


def looped_providers(
    config: ModelConfig, names: list[str], batch: int, dtype: torch.dtype, device: str
) -> list[Provider]:
    torch.manual_seed(0)
    weights = LoopedTransformer(config).state_dict()

    def load(model: torch.nn.Module) -> torch.nn.Module:
        model.load_state_dict(weights)
        return model.to(device, dtype).eval()

    def eager(case: Case) -> np.ndarray:
        problems, parts = case.problems, []
        for begin in range(0, len(problems), batch):
            chosen = np.arange(begin, min(begin + batch, len(problems)))
            chosen = chosen[np.argsort(-problems.loops[chosen], kind="stable")]
            with torch.inference_mode():
                written, _ = read_batch(model, problems.take(chosen), TASKS, False)
            parts.append(written.take(np.argsort(chosen)))
        return _tokens(Samples.concat(parts))

    def ours(impl: str) -> Callable[[Case], np.ndarray]:
        own = load(LoopedTransformer(config, impl=impl))
        return lambda case: _tokens(generate_looped_chains(own, case.problems, TASKS))

    made = []
    for name in names:
        if name == "eager_padded":
            model = load(chain_baselines.EagerReader(config))
            run = eager
        elif name in LOOPED:
            run = ours(name.removeprefix("relay_fast_"))
        else:
            continue
        made.append(Provider(name, run, lambda case: looped_flops(config, case)))
    return made


def _tokens(written: Samples) -> np.ndarray:
    return np.concatenate([np.diff(written.round_offsets), written.rounds, written.answer])


def autoregressive_providers(
    config: ModelConfig, names: list[str], batch: int, dtype: torch.dtype, device: str
) -> list[Provider]:
    torch.manual_seed(0)
    own = AutoregressiveTransformer(config)
    with torch.no_grad():
        own.chain_head.weight[EOS] = 0  # its logit is 0, and never the largest of so many
    own = own.to(device, dtype).eval()

    def in_batches(write: Callable) -> Callable[[Case], np.ndarray]:
        def run(case: Case) -> np.ndarray:
            offsets, limits, parts = case.problems.problem_offsets, case.limits, []
            for a in range(0, len(limits), batch):
                b = min(a + batch, len(limits))
                part, start = offsets[a : b + 1], offsets[a]
                prompts = case.problems.problem[start : part[-1]]
                written = write(prompts, part - start, limits[a:b])
                parts.append(chain_baselines.flat(written, limits[a:b])[0])
            return np.concatenate(parts)

        return run

    def ours(case: Case) -> np.ndarray:
        p = case.problems
        options = {"max_new": case.limits, "batch": batch}
        return decode(own, p.problem, p.problem_offsets, **options).tokens

    made = []
    for name in names:
        if name == "ar_eager":
            eager = EagerTransformer(config)
            eager.load_state_dict(own.state_dict(), strict=False)  # it has an answer head, too
            eager = eager.to(device, dtype).eval()
            run = in_batches(partial(chain_baselines.eager_decode, eager))
        elif name == "ar_hf":
            theirs = chain_baselines.huggingface_model(own)
            run = in_batches(partial(chain_baselines.huggingface_decode, theirs))
        elif name == "ar_relay_fast":
            run = ours
        else:
            continue
        made.append(Provider(name, run, lambda case: autoregressive_flops(config, case)))
    return made


def available(names: list[str], device: str, dtype: torch.dtype) -> list[str]:
    """The providers that can run here; says why the others cannot."""
    reasons = {}
    if (reason := supports(device, dtype=dtype)) or device != "cuda":
        reasons["relay_fast_triton"] = reason or "Triton's kernels are for a GPU"
    try:
        import transformers  # noqa: F401
    except ImportError:
        reasons["ar_hf"] = "transformers is not installed: pip install transformers"
    for name in names:
        if name in reasons:
            print(f"left out: {name} ({reasons[name]})")
    return [name for name in names if name not in reasons]


# Measuring


def check_equal(names: list[str], config: ModelConfig, case: Case, device: str) -> None:
    """Raises RuntimeError unless all providers of a kind write the same tokens."""
    few = case.take(CHECKED)
    causal = causal_of(config)
    for make, of in ((looped_providers, config), (autoregressive_providers, causal)):
        exact = make(of, [n for n in names if n != "relay_fast_triton"], 4, torch.float64, device)
        truth = None
        for provider in exact:
            tokens = provider.run(few)
            truth = tokens if truth is None else truth
            if not np.array_equal(tokens, truth):
                raise RuntimeError(
                    f"{provider.name} writes other tokens than {exact[0].name} on {few.task} "
                    f"{few.length}: nothing was timed"
                )


def causal_of(config: ModelConfig) -> ModelConfig:
    return replace(config, block=replace(config.block, causal=True))


class PeakMemory:
    """Most memory beyond what was in use before; on a CPU resident memory, sampled every 2 ms."""

    def __init__(self, device: str):
        self.device, self.bytes = device, 0

    def __enter__(self) -> PeakMemory:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what earlier work freed goes back to the system
        self._before, self._stop = _resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, _resident() - self._before)

    def __exit__(self, *_) -> None:
        if self.device == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._stop.set()
        self._thread.join()


def _resident() -> int:
    return psutil.Process().memory_info().rss


def measure(providers: list[Provider], case: Case, seconds: float, device: str) -> list[dict]:
    """One row a provider, from rounds in turn until the time is up (one round at least)."""
    times: dict[str, list[float]] = {p.name: [] for p in providers}
    peaks: dict[str, int] = {}
    start = time.perf_counter()
    while True:
        for p in providers:
            with PeakMemory(device) as memory:
                times[p.name].append(measuring.seconds_of(lambda p=p: p.run(case), device))
            peaks[p.name] = max(memory.bytes, peaks.get(p.name, 0))
        spent = time.perf_counter() - start
        if spent * (1 + 1 / len(times[providers[0].name])) > seconds:
            break
    tokens, number = int(case.limits.sum()), len(case.problems)
    rows = []
    for p in providers:
        second = statistics.median(times[p.name])
        values = (
            case.task, case.length, p.name, round(number / second, 3), round(tokens / second),
            peaks[p.name], f"{p.flops(case):.4g}",
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


# Results


def print_ratios(rows: list[dict]) -> None:
    """How the providers compare, and looped against autoregressive beside the FLOPs of each."""
    by_case: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        by_case.setdefault((row["task"], row["length"]), {})[row["provider"]] = row
    print("\nratios of chains/s (of FLOPs a chain, looped : autoregressive, in brackets)")
    pairs = (
        ("relay_fast_torch", "eager_padded"), ("ar_relay_fast", "ar_eager"),
        ("ar_relay_fast", "ar_hf"), ("relay_fast_torch", "ar_relay_fast"),
    )  # fmt: skip
    for (task, length), own in by_case.items():
        parts = []
        for a, b in pairs:
            if a in own and b in own:
                ratio = own[a]["chains_per_s"] / own[b]["chains_per_s"]
                parts.append(f"{a} : {b} {ratio:.2f}")
                if b == "ar_relay_fast":
                    flops = [float(own[name]["flops_per_chain"]) for name in (a, b)]
                    parts[-1] += f" ({flops[0] / flops[1]:.2f})"
        print(f"{task} {length}: " + ", ".join(parts))


def plot(rows: list[dict], path: Path) -> None:
    """Chains a second against length, a panel for each task."""
    tasks = [name for name in TASK_NAMES if any(row["task"] == name for row in rows)]
    if not tasks:
        return
    figure = new_figure(4 * len(tasks) + 2.5, 4)
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        panel.set_prop_cycle(color=COLORS)
        for name in PROVIDERS:
            own = [row for row in rows if (row["task"], row["provider"]) == (task, name)]
            style = "-o" if "relay_fast" in name else "--s"
            lengths = [int(row["length"]) for row in own]
            panel.plot(lengths, [row["chains_per_s"] for row in own], style, label=name)
        panel.set_yscale("log")
        panel.set_title(task)
        panel.set_xlabel("length")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("chains/s")
    handles, labels = panels[0].get_legend_handles_labels()
    shown = [(h, label) for h, label in zip(handles, labels, strict=True) if len(h.get_xdata())]
    figure.legend(*zip(*shown, strict=True), loc="outside right center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"plot: {path}")


def main(argv: list[str] | None = None) -> list[dict]:
    parser = common.arguments(__doc__.splitlines()[0], "chain_generation.csv")
    parser.add_argument("--config", choices=("relay", "tiny"), help="default: relay; quick: tiny")
    cases = (*TASK_NAMES, "mixed")
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--number", type=int, help="chains of each task and length")
    parser.add_argument("--mixed", type=int, help="chains of the mixed case")
    parser.add_argument("--batch", type=int, help="sequences decoded together")
    parser.add_argument("--looped-batch", type=int, default=64, help="problems an eager pass takes")
    parser.add_argument("--seconds", type=float, help="for each case; one round at least")
    parser.add_argument("--png", type=Path, help="default: beside the CSV")
    args = parser.parse_args(argv)
    dtype, usual = common.chosen_dtype(args), (32, 96, 64) if args.quick else (32, 256, 256)
    number, mixed, batch = (
        given or default
        for given, default in zip((args.number, args.mixed, args.batch), usual, strict=True)
    )
    config = common.CONFIGS[args.config or ("tiny" if args.quick else "relay")]
    seconds = args.seconds if args.seconds is not None else (2 if args.quick else 60)
    names = available(args.providers, args.device, dtype)
    providers = looped_providers(config, names, args.looped_batch, dtype, args.device)
    providers += autoregressive_providers(causal_of(config), names, batch, dtype, args.device)
    rows = []
    for case in make_cases(args.quick, number, mixed, args.cases):
        check_equal(names, config, case, args.device)
        for p in providers:  # what is compiled or loaded at the first call is not timed
            p.run(case.take(2))
        rows += measure(providers, case, seconds, args.device)
        print(f"{case.task} {case.length}: {len(case.problems)} chains done", flush=True)
    common.show(rows, COLUMNS)
    print_ratios(rows)
    extra = {"config": args.config or config_name(config), "batch": batch}
    extra["dtype"] = str(dtype).removeprefix("torch.")
    common.append_rows(args.csv, [row | extra | common.machine(args.device) for row in rows])
    plot(rows, args.png or args.csv.with_suffix(".png"))
    return rows


def config_name(config: ModelConfig) -> str:
    return next(name for name, known in common.CONFIGS.items() if known is config)


if __name__ == "__main__":
    main()
