"""Moved to `relay_fast.training.cuda_graph`; this path keeps working."""

from relay_fast.training.cuda_graph import *  # noqa: F403
