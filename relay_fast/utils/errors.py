"""Why a run stops that is not to blame on its config."""


class RunStopped(RuntimeError):
    """A run that cannot go on; the text is one sentence that says why and what to do."""


class WorkerDied(RunStopped):
    """Another process of the run died, hangs or did not start."""


class Diverged(RunStopped):
    """A training whose loss or weights are no longer finite; its last good state is kept.

    history: as `relay_fast.training.trainer.Trained` has it, with the entry in which it was seen.
    """

    def __init__(self, text: str, history: list[dict] | None = None) -> None:
        super().__init__(text)
        self.history = history or []

    def __reduce__(self):  # or it would come back from another process without its history
        return type(self), (str(self), self.history)
