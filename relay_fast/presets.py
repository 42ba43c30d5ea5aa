"""Moved to `relay_fast.relay.presets`; this path keeps working."""

from relay_fast.relay.presets import *  # noqa: F403
