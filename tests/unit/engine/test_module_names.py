"""Following modules leaves no trace in what the user sees."""

import warnings

from torch import nn

from rightbatch.engine.module_names import ModuleNames


def test_a_compiled_module_does_not_warn_of_hooks_that_are_ours():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ModuleNames(nn.Linear(2, 2)):
            warnings.warn("Using `torch.compile(module)` when there are global hooks on modules", stacklevel=1)
            warnings.warn("another", stacklevel=1)
        warnings.warn("Using `torch.compile(module)` when there are global hooks on modules", stacklevel=1)

    assert [str(warning.message).split()[0] for warning in caught] == ["another", "Using"]
