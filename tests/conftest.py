"""What all tests share."""

import gc
import signal
import sys

import pytest
from beartype import BeartypeConf
from beartype.claw import beartype_package

# All calls within the engine have their types checked. Shapes are dearer: pyproject names the modules that state any to jaxtyping's plugin,
# and beside them ``ranks``, which names types that only a type checker imports: beartype alone refuses these.
beartype_package("rightbatch.engine", conf=BeartypeConf(claw_is_pep526=False))


@pytest.fixture(scope="session", autouse=True)
def heeded_interrupts() -> None:
    """Let interrupts reach this process and those that it starts: a suite in the background of a shell ignores them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Spare the many collections within tests what imports have left: torch's 300 000 objects take 0.15 s to look through each time."""
    if "torch" not in sys.modules:
        return
    import torch

    torch.optim.SGD([torch.zeros(1)], lr=1.0)  # the first optimizer of a process imports most of them
    gc.collect()
    gc.freeze()
