"""What all tests share."""

import gc
import sys


def pytest_collection_finish() -> None:
    """Spare the many collections within tests what imports have left: torch's 300 000 objects take 0.15 s to look through each time."""
    if "torch" not in sys.modules:
        return
    import torch

    torch.optim.SGD([torch.zeros(1)], lr=1.0)  # the first optimizer of a process imports most of them
    gc.collect()
    gc.freeze()
