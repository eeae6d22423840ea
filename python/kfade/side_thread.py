"""A thread that does jobs in order beside the one that hands them in."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class SideThread:
    """Runs jobs in order beside the caller, who is told of the first error at the next call of any method."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kfade-writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(job)
            del job  # and the tensors that it holds
            self._jobs.task_done()

    def _do(self, job: Callable[[], None]) -> None:
        try:
            if self._error is None:
                job()
        except BaseException as error:
            self._error = error

    @property
    def idle(self) -> bool:
        """Whether no other job waits; to be asked by a job."""
        return self._jobs.empty()

    def submit(self, job: Callable[[], None]) -> None:
        self.raise_if_failed()
        self._jobs.put(job)

    def wait(self) -> None:
        """Return when all jobs are done."""
        self._jobs.join()
        self.raise_if_failed()

    def raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Finish the jobs and the thread; errors are left to be asked for."""
        # Not before: a job asks whether others wait.
        self._jobs.join()
        self._jobs.put(None)
        self._thread.join()
