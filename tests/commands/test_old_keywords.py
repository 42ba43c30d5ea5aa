import pytest

from relay_fast.train import train


def test_train_still_takes_report(tmp_path) -> None:
    with (
        pytest.warns(
            DeprecationWarning, match="report of train.. is deprecated: use print_table"
        ) as seen,
        pytest.raises(ValueError, match="minutes = 0: give more than 0"),
    ):
        train({}, tmp_path, minutes=0, report=False)
    assert len(seen) == 1 and seen[0].filename == __file__
    with pytest.raises(TypeError, match="report and print_table, which are the same"):
        train({}, tmp_path, report=False, print_table=False)
