"""One job at a time in a thread, such as the writing of a file while the next layer is computed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Holds at most one job, so that at most one job's data is in memory. A job's error is raised by the next call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)  # starts its thread with the first job
        self._job: Future | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Starts a job, after the job before it has ended."""
        self.wait()
        self._job = self._pool.submit(job)

    def check(self) -> None:
        """Raises the error of a job that has failed; does not wait."""
        if self._job and self._job.done():
            self.wait()

    def wait(self) -> None:
        job, self._job = self._job, None
        if job:
            job.result()
