"""Benchmarks: scripts to run, and what they share."""
