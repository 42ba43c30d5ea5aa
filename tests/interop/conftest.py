"""The fixtures of these tests."""

from regression import trained  # noqa: F401
