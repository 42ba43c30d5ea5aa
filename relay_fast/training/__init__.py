"""The trainer, optimizers, schedules, checkpoints and the CUDA graph of a training step."""
