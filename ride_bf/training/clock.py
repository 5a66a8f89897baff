"""How long training takes, without evaluation and saving."""

import time


class TrainingClock:
    """The seconds of training since an epoch was begun, or gone on with at `first_batch`."""

    def __init__(self, first_batch: int):
        self.first_batch = first_batch
        self.seconds = 0.0
        self.start()

    def start(self) -> None:
        """Training begins, or goes on."""
        self._started = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call or start, which are added to `seconds`."""
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        self.seconds += seconds
        return seconds
