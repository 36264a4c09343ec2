"""Threads that compute the batches of a step at once."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from minidiff.training import ranks


@contextmanager
def workers(threads: int) -> Iterator[ThreadPoolExecutor | None]:
    """Threads that share out the cores evenly between them; None where one is enough, and where
    processes share them out."""
    if threads == 1 or ranks.size() > 1:
        yield None
        return
    cores = torch.get_num_threads()
    share = (max(1, cores // threads),)
    try:
        with ThreadPoolExecutor(threads, "", torch.set_num_threads, share) as workers:
            yield workers
    finally:
        torch.set_num_threads(cores)
