"""The worker processes of torch's DataLoader."""


def end_workers(iterator: object) -> None:
    """End the workers of a DataLoader's iterator now; one without workers, or ``None``, is left alone.

    After an error its traceback keeps them alive, and the garbage collector then waits five seconds for them.

    Args:
        iterator: What ``iter(data_loader)`` returned.
    """
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


def workers_are_alive(iterator: object) -> bool:
    """Return whether all workers of a DataLoader's iterator are alive; true for one without workers, or ``None``.

    Args:
        iterator: What ``iter(data_loader)`` returned.
    """
    return all(worker.is_alive() for worker in getattr(iterator, "_workers", ()))
