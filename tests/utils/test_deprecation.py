import warnings

import pytest

from relay_fast.train import train
from relay_fast.utils.deprecation import renamed


@renamed(old="new", before="after")
def function(a: int, *, new: int = 0, after: int = 0) -> tuple[int, int, int]:
    """Some text."""
    return a, new, after


def test_an_old_keyword_is_accepted_with_one_warning() -> None:
    with pytest.warns(DeprecationWarning, match="old is now called new: use that name") as seen:
        assert function(1, old=2, after=3) == (1, 2, 3)
    assert len(seen) == 1 and seen[0].filename == __file__
    assert (function.__name__, function.__doc__) == ("function", "Some text.")


def test_the_new_keyword_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert function(1, new=2) == (1, 2, 0)


def test_both_keywords_are_refused() -> None:
    with pytest.raises(TypeError, match="old and new are the same argument: give new only"):
        function(1, old=2, new=3)


def test_train_still_takes_report(tmp_path) -> None:
    with (
        pytest.warns(DeprecationWarning, match="report is now called print_table"),
        pytest.raises(ValueError, match="minutes = 0: give more than 0"),
    ):
        train({}, tmp_path, minutes=0, report=False)
