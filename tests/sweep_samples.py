"""Results of sweeps for tests of the report: planted trainings, so that nothing in them is made up by hand."""

from collections.abc import Callable

from planted_sweeps import SIZES, Law, settings_of, step_time_s, summary, sweep
from rightbatch.fits.sweep import fit_sweep
from rightbatch.records.plan import BatchPlan
from rightbatch.records.sweep import SweepResult, TrialStatus

HOSTILE_NAME = "</script><script>alert(1)</script>\x1b[31m\u202e"
_STEP_TIMES = {size: step_time_s(size) for size in SIZES}


def good() -> SweepResult:
    plan = BatchPlan(global_batch_size=96, micro_batch_size=96, lr=0.12)
    settings = settings_of(noise_scale=100.0)
    return fit_sweep(
        settings, summary(), sweep(Law(), settings), is_complete=True, device_name="planted", step_times_s=_STEP_TIMES, plan=plan
    )


def never() -> SweepResult:
    settings = settings_of(sizes=(32, 64))
    return fit_sweep(settings, summary(), sweep(Law(largest=1), settings), is_complete=True, device_name="planted")


def partial() -> SweepResult:
    settings = settings_of()
    trials = sweep(Law(), settings)[:25]
    return fit_sweep(settings, summary(), trials, is_complete=False, device_name="planted")


def troubled() -> SweepResult:
    """One seed, sizes that never arrive, processes that were killed."""
    settings = settings_of(seeds=1)
    trials = sweep(Law(largest=64, noise=0.2), settings)
    failed = trials[-1].model_copy(update={"status": TrialStatus.FAILED, "reason": "its process was killed (SIGKILL), twice"})
    return fit_sweep(settings, summary(), [*trials[:-1], failed], is_complete=True, device_name="planted")


def hostile_names() -> SweepResult:
    return good().model_copy(update={"workload": summary(name=HOSTILE_NAME)})


ALL: dict[str, Callable[[], SweepResult]] = {
    "good": good,
    "never": never,
    "partial": partial,
    "troubled": troubled,
    "hostile_names": hostile_names,
}
