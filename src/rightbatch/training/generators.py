"""The process's random generators as plain values that fit into a checkpoint."""

import random
from typing import Any

import numpy as np
import torch

from rightbatch.training.checkpoint import State


def generators_state(device: torch.device) -> State:
    """Return the state of the generators of Python, NumPy, torch and the device, in tensors, numbers and lists.

    Args:
        device: Where this process trains; of several GPUs only this one's generator is taken.
    """
    version, words, next_gauss = random.getstate()
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  # users' transforms draw from it
    state: State = {
        "python": [version, list(words), next_gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_generators(state: State, device: torch.device) -> None:
    """Put the generators back.

    Args:
        state: What ``generators_state`` returned.
        device: Where this process trains.
    """
    python: Any = state["python"]
    version, words, next_gauss = python
    random.setstate((version, tuple(words), next_gauss))
    numpy: Any = state["numpy"]
    kind, keys, position, has_gauss, gauss = numpy
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(_on_host(state["torch"]))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(_on_host(state["cuda"]), device)
    if "mps" in state and device.type == "mps":
        torch.mps.set_rng_state(_on_host(state["mps"]))


def _on_host(state: object) -> torch.Tensor:
    assert isinstance(state, torch.Tensor), "the state of a torch generator is a tensor"  # noqa: S101
    return state.cpu()
