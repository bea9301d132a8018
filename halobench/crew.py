"""Processes of one thread each that take jobs side by side: how small conversions fill the cores of one machine."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from types import TracebackType
from typing import Any

from halobench.errors import HalobenchError, UserError
from halobench.progress import say


class Crew:
    """Processes of one thread that take jobs. Ctrl-C reaches the parent alone, which asks them to save and stop."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise UserError(f"--workers {size} leaves nobody to do the work; give 1 or more")
        self.size = size

    def __enter__(self) -> Crew:
        self._threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # read by the workers when they start
        self._pool = ProcessPoolExecutor(self.size, mp_context=get_context("spawn"), initializer=_start_worker)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.environ.pop("OMP_NUM_THREADS")
        if self._threads is not None:
            os.environ["OMP_NUM_THREADS"] = self._threads
        if kind is not None:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def do(self, jobs: list[tuple[Any, ...]]) -> None:
        """Runs jobs (a function and its arguments each) and says what each has to say; the first failure ends all."""
        for future in as_completed([self._pool.submit(*job) for job in jobs]):
            try:
                said = future.result()
            except BrokenProcessPool as error:
                raise HalobenchError(
                    "a worker process was ended from outside, most often for lack of memory; use fewer --workers, and "
                    "run again to resume"
                ) from error
            if said:
                say(said)


def _start_worker() -> None:
    import torch

    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(1)


def end_with_parent(parent: int) -> None:
    """A parent that was killed cannot stop its workers; they notice."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
