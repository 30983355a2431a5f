"""Which module is running, in the forward and in the backward pass, without holding on to any tensor.

``torch.utils.module_tracker`` answers the same by hooks on tensors. Under activation checkpointing those hooks keep the recomputed
activations alive, so that a recording of memory would show a leak that training does not have.
"""

import bisect
import warnings
from types import TracebackType

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class ModuleNames:
    """Follows the modules of a model from the moment it is entered until it is left.

    Autograd numbers its nodes in the order in which the forward pass makes them, so a node of the backward pass belongs to the innermost
    module that ran when its number was given.

    Args:
        model: The model; modules outside it have no name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._running: list[str] = []
        self._first_numbers: list[int] = []
        self._owners: list[str] = []

    @property
    def current(self) -> str:
        """Qualified name of the innermost module that runs; empty outside any."""
        node = torch._C._current_autograd_node()  # noqa: SLF001  # public nowhere
        if self._running or node is None:
            return self._running[-1] if self._running else ""
        place = bisect.bisect_right(self._first_numbers, node._sequence_nr()) - 1  # noqa: SLF001  # documented for profilers
        return self._owners[place] if place >= 0 else ""

    def __enter__(self) -> "ModuleNames":
        # A compiled module would warn its user of these hooks, which are ours and gone after the recording.
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", message="Using `torch.compile\\(module\\)` when there are global hooks")
        self._handles = (
            register_module_forward_pre_hook(lambda module, _: self._enter(module)),
            register_module_forward_hook(lambda *_: self._leave(), always_call=True),
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._warnings.__exit__(kind, error, trace)

    def _enter(self, module: nn.Module) -> None:
        self._running.append(self._names.get(id(module), self._running[-1] if self._running else ""))
        self._own_from_here()

    def _leave(self) -> None:
        if self._running:
            self._running.pop()
        self._own_from_here()

    def _own_from_here(self) -> None:
        number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]  # noqa: SLF001  # the number of the next node
        self._first_numbers.append(number)
        self._owners.append(self._running[-1] if self._running else "")
