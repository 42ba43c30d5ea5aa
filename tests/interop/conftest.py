"""The fixtures of these tests."""

from tests.support.regression import trained  # noqa: F401
