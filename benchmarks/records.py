"""Records from a JSONL file: memory, records a second and core, and the order of what is drawn.

    python benchmarks/records.py [--records 1000000] [--quick]

Each record has 10 rounds of 10 whitespace tokens. Memory is what the process holds in RAM more than
before, file pages that the system may drop included; times are of the processor, so that other
jobs on the machine count little. The rows go to records.csv.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from relay_fast.data.streams import BatchFormat, TruthStream, prefetch  # noqa: E402
from relay_fast.reporting.text_table import text_table  # noqa: E402
from relay_fast.tasks import RecordsTask, Task, Vocabulary  # noqa: E402
from relay_fast.tasks.record_rules import texts_of  # noqa: E402

ROUNDS, TOKENS, WORDS = 10, 10, 1000
LEAST = 20_000  # records a second and core
BATCH, BATCHES, STEPS = 64, 200, 12


def write_records(path: Path, number: int) -> None:
    rng = np.random.default_rng(0)
    words = np.array([f"w{k}" for k in range(WORDS)])
    with open(path, "w") as file:
        for _ in range(-(-number // 1000)):
            drawn = words[rng.integers(0, WORDS, (1000, ROUNDS + 1, TOKENS))]
            for rows in drawn[: min(1000, number)].tolist():
                texts = [" ".join(row) for row in rows]
                record = {"problem": texts[0], "rounds": texts[1:], "answer": rows[-1][-1]}
                file.write(json.dumps(record) + "\n")
            number -= 1000


def write_tokeniser(path: Path) -> None:
    """A file of the `tokenizers` library with the same tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{k}": k for k in range(WORDS)} | {"<unk>": WORDS}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(path))


def resident() -> float:
    """MB of this process in RAM."""
    return psutil.Process().memory_info().rss / 1e6


def rate(function: Callable[[int], object], records: int) -> float:
    """Records a second and core of function(k) for k in 0..BATCHES - 1."""
    function(0)
    started = time.process_time()
    for k in range(BATCHES):
        function(k)
    return records * BATCHES / (time.process_time() - started)


def opened(path: Path, **options) -> tuple[RecordsTask, Task]:
    task = RecordsTask("words", str(path), held_out=0.01, **options)
    tokens = (*task.special_tokens(), *task.vocabulary_tokens([]))
    made = task.bound(Vocabulary(max_number=None, tokens=tokens), 3)
    made.check_range(ROUNDS, ROUNDS)
    return task, made


def drawn(task: Task, workers: int, first: int = 0) -> list[str]:
    """Hashes of a stream's batches from step `first` on."""
    schedule = SimpleNamespace(steps=STEPS, progress=np.linspace(0, 1, STEPS))
    stream = TruthStream(
        {"words": task}, {"words": (ROUNDS, ROUNDS)}, BatchFormat("looped"), schedule,
        batch_size=BATCH, seed=1,
    )  # fmt: skip
    steps = prefetch(stream, first, workers)
    return [hashlib.sha256(step.batch.targets.numpy().tobytes()).hexdigest() for step in steps]


def measure(folder: Path, number: int) -> list[dict]:
    """Opens a file of so many records, samples from it, and says what that took."""
    path = folder / f"{number}.jsonl"
    write_records(path, number)
    rows, before, started = [], resident(), time.process_time()
    task, made = opened(path)
    rows.append({"what": "index", "rate": number / (time.process_time() - started)})
    lengths = np.full(BATCH, ROUNDS)
    speed = rate(lambda k: made.sample(lengths, 1, k * BATCH), BATCH)
    rows.append({"what": "read, encoded: whitespace", "rate": speed})
    rows[-1]["grown_mb"] = resident() - before
    for row in rows:
        row |= {"records": number, "file_mb": path.stat().st_size / 1e6}
    return rows


def against_library(folder: Path, path: Path) -> list[dict]:
    """A tokeniser file's rate, and that of the library on the same texts already in memory."""
    write_tokeniser(folder / "words.json")
    task, made = opened(path, tokeniser=str(folder / "words.json"))
    lengths = np.full(BATCH, ROUNDS)
    ours = rate(lambda k: made.sample(lengths, 1, k * BATCH), BATCH)
    index, library = task.pools.index, task.tokeniser
    read = lambda k: index.read(task.pools.draw(lengths, 1, k * BATCH))
    texts = [[t for record in read(k) for t in texts_of(record)[:-1]] for k in range(BATCHES)]
    encode = library._library.encode_batch_fast
    ids = lambda k: [e.ids for e in encode(texts[k], add_special_tokens=False)]
    alone = rate(ids, BATCH)
    reading = rate(read, BATCH)
    return [
        {"what": "read, encoded: tokenizers file", "rate": ours},
        {"what": "read and parsed alone", "rate": reading},
        {"what": "the library alone", "rate": alone},
        {"what": "both of these, one after the other", "rate": 1 / (1 / alone + 1 / reading)},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="20,000 records")
    parser.add_argument("--csv", type=Path, default=common.RESULTS / "records.csv")
    a = parser.parse_args()
    number = 20_000 if a.quick else a.records
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # rates are of one core
    sys.stdout.reconfigure(line_buffering=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["RELAY_FAST_CACHE"] = str(folder / "cache")
        rows = measure(folder, number // 10) + measure(folder, number)
        rows += against_library(folder, folder / f"{number // 10}.jsonl")
        task = opened(folder / f"{number}.jsonl")[1]
        alone = drawn(task, 0)
        same = {f"{workers} workers": drawn(task, workers) == alone for workers in (1, 2)}
        same["resumed at step 5"] = drawn(task, 2, first=5) == alone[5:]
    header = ("what", "records", "file MB", "records/s", "RAM + MB")
    keys = ("what", "records", "file_mb", "rate", "grown_mb")
    facts = common.machine("cpu")
    common.write_rows(a.csv, [{key: row.get(key) for key in keys} | facts for row in rows])
    text = lambda value: f"{value:,.0f}" if isinstance(value, float | int) else value
    print(text_table(header, [[text(row.get(key)) for key in keys] for row in rows], left=1))
    print("the same batches as without workers:", ", ".join(f"{k} {v}" for k, v in same.items()))
    slow = [row for row in rows if row["what"].endswith("whitespace") and row["rate"] < LEAST]
    if slow or not all(same.values()):
        sys.exit(f"below {LEAST:,} records/s, or another order")


if __name__ == "__main__":
    main()
