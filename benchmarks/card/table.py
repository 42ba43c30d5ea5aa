"""The results as one Markdown page."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.card.session import Row, Session, by_key

INTERPRETED = "**Interpreted on a CPU: a rehearsal. No figure here says anything about a GPU.**\n\n"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def milliseconds(row: Row) -> str:
    return f"{1e3 * float(row['seconds']):.4g}"


def best_baselines(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """The quickest baseline of each workload by its ratio to relay_fast: bucketed, compiled or not;
    eager padded, which is what everybody starts from, stands apart."""
    found = []
    for (workload,), group in by_key(rows, "workload").items():
        others = [r for r in group if str(r["provider"]).startswith(("eager bucketed", "compile"))]
        if others:
            found.append((workload, min(others, key=lambda r: float(r["times_relay_fast"]))))
    return found


def page(session: Session, interpreted: bool) -> str:
    """The whole page."""
    label = session.label
    parts = [f"# {label['machine']}\n\n{label['versions']}, commit {label['commit']}\n\n"]
    if interpreted:
        parts.append(INTERPRETED)
    ceilings = [
        (r["what"], r["size"], f"{float(r['rate']) / 1e12:.4g} T{r['unit_of_rate']}")
        for r in session.rows("ceilings") if r["status"] == "ok"
    ]  # fmt: skip
    if ceilings:
        parts.append("## Ceilings\n\n" + markdown(("what", "size", "rate"), ceilings))
    checks = by_key(session.rows("checks"), "op")
    if checks:
        parts.append("\n## Correct\n\n" + markdown(
            ("op", "cases", "largest RMS ratio", "eager's own there"),
            [(op or "compute-sanitizer", len(rows), *_worst(rows)) for (op,), rows in
             checks.items()],
        ))  # fmt: skip
    steps = [r for r in session.rows("steps") if r["status"] == "ok"]
    if steps:
        columns = ("workload", "provider", "policy", "ms", "samples/s", "share of peak",
                   "times relay_fast's graph", "peak MB", "note")  # fmt: skip
        lines = [
            (r["workload"], r["provider"], r["policy"], milliseconds(r), r["samples_per_s"],
             r["share_of_peak"], r["times_relay_fast"], f"{int(r['peak_bytes']) / 1e6:.4g}",
             r["note"])
            for r in steps
        ]  # fmt: skip
        parts.append("\n## Training steps\n\n" + markdown(columns, lines))
        for workload, row in best_baselines(steps):
            parts.append(
                f"\nBest baseline of {workload}: {row['provider']}, {row['times_relay_fast']} times"
                " the time of relay_fast's graph.\n"
            )
    kernels = [r for r in session.rows("kernels") if r["status"] == "ok"]
    if kernels:
        columns = ("op", "shape", "direction", "provider", "ms", "floor, ms", "share of floor",
                   "times eager")  # fmt: skip
        lines = [
            (r["op"], r["shape"], r["direction"], r["provider"], milliseconds(r),
             f"{1e3 * float(r['floor_seconds']):.4g}", r["share_of_floor"], r["times_eager"])
            for r in kernels
        ]  # fmt: skip
        parts.append("\n## Kernels\n\n" + markdown(columns, lines))
    sweep = [r for r in session.rows("sweep") if r.get("line")]
    if sweep:
        lines = sorted(
            f"{r['line']}  # {r['shape']}, {r['direction']}: {r['of_picked']} of the time"
            for r in sweep
        )
        parts.append("\n## Lines for kernels/tuning.py\n\n```\n" + "\n".join(lines) + "\n```\n")
    odd = [r for r in session.rows() if r["status"] != "ok"]
    if odd:
        parts.append("\n## Not measured\n\n" + markdown(
            ("unit", "status", "why"),
            [(r["unit"], r["status"], " ".join(filter(None, (r.get("provider"), r["note"]))))
             for r in odd],
        ))  # fmt: skip
    if session.left:
        names = ", ".join(unit.name for unit in session.left)
        parts.append(f"\nNot reached in time, the same command goes on with them: {names}.\n")
    return "".join(parts)


def _worst(rows: Sequence[Row]) -> tuple[object, object]:
    row = max(rows, key=lambda r: float(r.get("rms_ratio") or 0))
    return row.get("rms_ratio", ""), row.get("eager_rms_ratio", "")
