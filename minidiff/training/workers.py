"""Threads that compute the batches of a step at once."""
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def workers(threads: int) -> Iterator[ThreadPoolExecutor | None]:
    """Threads that share out the cores evenly between them; None where one is enough."""
    if threads == 1:
        yield None
        return
    cores = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(max(1, cores // threads),)) as workers:
            yield workers
    finally:
        torch.set_num_threads(cores)
