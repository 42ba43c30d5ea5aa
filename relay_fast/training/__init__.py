"""Training: the trainer, optimisers, schedules, checkpoints and the CUDA graph of a step."""
