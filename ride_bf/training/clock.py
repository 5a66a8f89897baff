"""Measures how long training takes, without evaluation and saving."""

import time


class TrainingClock:
    """Seconds of training since the epoch began, or was resumed at `first_batch`."""

    def __init__(self, first_batch: int):
        self.first_batch = first_batch
        self.seconds = 0.0
        self.start()

    def start(self) -> None:
        """Starts the clock, or starts it again after a pause."""
        self._started = time.perf_counter()

    def lap(self) -> float:
        """Returns the seconds since the last call or start, and adds them to `seconds`."""
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        self.seconds += seconds
        return seconds
