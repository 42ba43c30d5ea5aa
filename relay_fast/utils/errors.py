"""Errors of a run: those that stop it although its config is valid, and of several processes."""


class RefusedTogether(ValueError):
    """Raised in all processes of a run for what one of them, or all, cannot do; rank 0 says it."""


class RunStopped(RuntimeError):
    """Raised when a run cannot go on; the message says why and what to do."""


class WorkerDied(RunStopped):
    """Raised when a worker process died, hangs or did not start."""


class Diverged(RunStopped):
    """Raised when the loss or the weights are no longer finite; the last good state is kept.

    Args:
        text: The message.
        history: As in `relay_fast.training.trainer.Trained`, up to the entry that diverged.
    """

    def __init__(self, text: str, history: list[dict] | None = None) -> None:
        super().__init__(text)
        self.history = history or []

    def __reduce__(self):  # keeps the history when pickled by a worker process
        return type(self), (str(self), self.history)
