"""Moved to `relay_fast.relay.chain_dataset`; this path keeps working."""

from relay_fast.relay.chain_dataset import *  # noqa: F403
