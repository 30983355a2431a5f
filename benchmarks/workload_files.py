"""Python files whose functions return workloads, as the benchmarks take them with ``--workloads``."""

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import rightbatch as rb


def workloads_of(path: Path) -> tuple[dict[str, rb.Workload], ModuleType]:
    """Call every public function of a file that needs no argument, and keep the workloads."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        sys.exit(f"--workloads must name a Python file; got {path}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    functions = inspect.getmembers(module, lambda value: inspect.isfunction(value) and value.__module__ == path.stem)
    functions.sort(key=lambda pair: pair[1].__code__.co_firstlineno)
    made = {name: function() for name, function in functions if not name.startswith("_") and _needs_nothing(function)}
    workloads = {name: value for name, value in made.items() if isinstance(value, rb.Workload)}
    if not workloads:
        sys.exit(f"{path} must hold functions that return a rightbatch.Workload when called without arguments; it holds none.")
    return workloads, module


def _needs_nothing(function: object) -> bool:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
