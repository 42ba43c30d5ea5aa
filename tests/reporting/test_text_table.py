import io

from relay_fast.reporting.text_table import make_console, make_table, text_table


def test_columns_are_aligned_by_their_kind() -> None:
    rows = [["a", 10, 0.123456], ["longer", 2, None]]
    assert text_table(["model", "n", "error"], rows).splitlines() == [
        "model    n   error",
        "──────────────────",
        "a       10  0.1235",
        "longer   2       –",
    ]
    assert text_table(["model", "n", "error"], rows, left=0).splitlines()[2] == "     a  10  0.1235"


def test_nothing_is_cropped_or_read_as_markup(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    long, marked = "x" * 200, "[bold]:smile:"
    assert text_table(["a", "b"], [[long, marked]]).splitlines()[2] == f"{long}  {marked}"


def test_an_ascii_stream_gets_an_ascii_table() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    table = make_table([True, False])
    table.columns[0].header, table.columns[1].header = "model", "n"
    table.add_row("a", "10")
    make_console(table, file).print(table)
    file.flush()
    lines = [line.rstrip() for line in raw.getvalue().decode("ascii").splitlines()]
    assert lines == ["model | n", "------+--", "a     |10"]
