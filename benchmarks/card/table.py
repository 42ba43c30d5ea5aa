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
    title = f"# {label['machine']}\n\n{label['versions']}, commit {label['commit']}\n\n"
    sections = (_ceilings, _checks, _steps, _readings, _kernels, _sweep, _not_measured)
    return title + INTERPRETED * interpreted + "".join(part(session) for part in sections)


def _measured(session: Session, table: str) -> list[Row]:
    return [row for row in session.rows(table) if row["status"] == "ok"]


def _ceilings(session: Session) -> str:
    lines = [
        (r["what"], r["size"], f"{float(r['rate']) / 1e12:.4g} T{r['unit_of_rate']}")
        for r in _measured(session, "ceilings")
    ]
    return "## Ceilings\n\n" + markdown(("what", "size", "rate"), lines) if lines else ""


def _checks(session: Session) -> str:
    checks = by_key(session.rows("checks"), "op")
    columns = ("op", "cases", "largest RMS ratio", "eager's own there")
    lines = [
        (op or "compute-sanitizer", len(rows), *_worst(rows)) for (op,), rows in checks.items()
    ]
    return "\n## Correct\n\n" + markdown(columns, lines) if lines else ""


def _steps(session: Session) -> str:
    steps = _measured(session, "steps")
    if not steps:
        return ""
    columns = (
        "workload", "provider", "policy", "ms", "samples/s", "share of peak",
        "times relay_fast's graph", "peak MB", "note",
    )  # fmt: skip
    lines = [
        (
            r["workload"],
            r["provider"],
            r["policy"],
            milliseconds(r),
            r["samples_per_s"],
            r["share_of_peak"],
            r["times_relay_fast"],
            f"{int(r['peak_bytes']) / 1e6:.4g}",
            r["note"],
        )
        for r in steps
    ]
    best = "".join(
        f"\nBest baseline of {workload}: {row['provider']}, {row['times_relay_fast']} times"
        " the time of relay_fast's graph.\n"
        for workload, row in best_baselines(steps)
    )
    return "\n## Training steps\n\n" + markdown(columns, lines) + best


def _readings(session: Session) -> str:
    columns = (
        "model", "GEMMs", "problems", "provider", "ms", "chains/s", "times the graph",
        "same chains", "note",
    )  # fmt: skip
    lines = [
        (
            r["model"],
            r["dtype"],
            r["problems"],
            r["provider"],
            milliseconds(r),
            r["chains_per_s"],
            r["times_graph"],
            r["same_chains"],
            r["note"],
        )
        for r in _measured(session, "readings")
    ]
    return "\n## Reading chains\n\n" + markdown(columns, lines) if lines else ""


def _kernels(session: Session) -> str:
    columns = (
        "op", "shape", "direction", "provider", "ms", "floor, ms", "share of floor", "times eager",
    )  # fmt: skip
    lines = [
        (
            r["op"],
            r["shape"],
            r["direction"],
            r["provider"],
            milliseconds(r),
            f"{1e3 * float(r['floor_seconds']):.4g}",
            r["share_of_floor"],
            r["times_eager"],
        )
        for r in _measured(session, "kernels")
    ]
    return "\n## Kernels\n\n" + markdown(columns, lines) if lines else ""


def _sweep(session: Session) -> str:
    lines = sorted(
        f"{r['line']}  # {r['shape']}, {r['direction']}: {r['of_picked']} of the time"
        for r in session.rows("sweep")
        if r.get("line")
    )
    title = "\n## Lines for kernels/tuning.py\n\n"
    return title + "```\n" + "\n".join(lines) + "\n```\n" if lines else ""


def _not_measured(session: Session) -> str:
    lines = [
        (r["unit"], r["status"], " ".join(filter(None, (r.get("provider"), r["note"]))))
        for r in session.rows()
        if r["status"] != "ok"
    ]
    text = "\n## Not measured\n\n" + markdown(("unit", "status", "why"), lines) if lines else ""
    if session.left:
        names = ", ".join(unit.name for unit in session.left)
        text += f"\nNot reached in time, the same command goes on with them: {names}.\n"
    return text


def _worst(rows: Sequence[Row]) -> tuple[object, object]:
    row = max(rows, key=lambda r: float(r.get("rms_ratio") or 0))
    return row.get("rms_ratio", ""), row.get("eager_rms_ratio", "")
