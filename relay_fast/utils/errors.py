"""Errors that stop a run although its config is valid."""


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
