"""The RELAY method: stages and pipeline, run folders, evaluation, chain datasets, presets."""
