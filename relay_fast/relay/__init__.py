"""RELAY, the method: its stages and their order, run folders, evaluation, chain datasets."""
