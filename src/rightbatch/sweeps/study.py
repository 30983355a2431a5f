"""The state of a sweep: an Optuna study in a journal, written by the driver alone, readable by ``optuna-dashboard`` at any time.

An attempt at a trial goes through the journal as *waiting*, *running*, and an end. Its identity, and which attempt it is, are its
parameters, so that no attempt can be entered twice. The line that ends it is the only one that counts: an attempt without it is made again.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from rightbatch.errors import RunFolderError
from rightbatch.records.document import refuse_io
from rightbatch.records.sweep import TrialResult, TrialSpec, TrialStatus
from rightbatch.records.sweep_folder import JOURNAL_FILE, JOURNAL_LOCK_FILE

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

_NAME = "sweep"
_RESULT, _LOST = "result", "lost"
STALE = "the driver ended"
"""Why an attempt was lost that nobody followed to its end."""
KILLED = "killed"
"""Why an attempt was lost whose process was killed."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a trial, entered as running.

    Attributes:
        spec: The trial.
        number: Of the attempt in the study.
    """

    spec: TrialSpec
    number: int


class SweepStudy:
    """The journal of one sweep. The caller holds the lock of its folder.

    Args:
        folder: Where the journal lies.

    Raises:
        RunFolderError: The journal is damaged or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / JOURNAL_FILE
        with self._journal_errors():
            _cut_half_line(self._file)
            self._study = _open(self._file)
        self._results: dict[TrialSpec, TrialResult] = {}
        self._attempts: Counter[TrialSpec] = Counter()
        self._kills: Counter[TrialSpec] = Counter()
        self.stale = self._recover()
        """Attempts that were running when the last driver ended."""

    @property
    def results(self) -> tuple[TrialResult, ...]:
        """Of all trials that have ended."""
        return tuple(self._results.values())

    def start(self, spec: TrialSpec) -> Attempt:
        """Enter an attempt as running.

        Raises:
            RunFolderError: The journal cannot be written.
        """
        params = _params(spec, self._attempts[spec])
        with self._journal_errors():
            self._study.enqueue_trial(params, skip_if_exists=True)
            trial = self._study.ask(fixed_distributions=_distributions())
            if trial.params != params:
                raise ValueError(f"attempt {params} stands in it already")
        return Attempt(spec, trial.number)

    def finish(self, attempt: Attempt, result: TrialResult) -> None:
        """Keep the result of an attempt; it is there as a whole, or not at all.

        Raises:
            RunFolderError: The journal cannot be written.
        """
        with self._journal_errors():
            self._storage.set_trial_user_attr(self._id(attempt.number), _RESULT, result.model_dump(mode="json"))
            self._end(attempt.number, result)
        self._results[attempt.spec] = result

    def kills_of(self, spec: TrialSpec) -> int:
        """How often the process of a trial was killed."""
        return self._kills[spec]

    def lose(self, attempt: Attempt, reason: str) -> None:
        """Enter that an attempt came to nothing, so that the trial is made again.

        Raises:
            RunFolderError: The journal cannot be written.
        """
        with self._journal_errors():
            self._end_lost(attempt.number, reason)
        self._attempts[attempt.spec] += 1
        self._kills[attempt.spec] += reason == KILLED

    def _recover(self) -> int:
        """Read the journal: take results in, finish what was half entered, and give up what was running."""
        stale = 0
        with self._journal_errors():
            for trial in self._study.get_trials(deepcopy=False):
                stale += self._take_in(trial)
        return stale

    def _take_in(self, trial: "FrozenTrial") -> bool:
        """Take one attempt in; return whether it was running."""
        from optuna.trial import TrialState

        params = trial.system_attrs["fixed_params"]  # whole from the first line on, unlike trial.params
        spec = _spec(params)
        known = trial.user_attrs.get(_RESULT)
        if known is not None:
            self._results[spec] = TrialResult.model_validate(known)
            if not trial.state.is_finished():
                self._end(trial.number, self._results[spec])
            return False
        if not trial.state.is_finished():
            self._end_lost(trial.number, STALE)
        self._attempts[spec] = max(self._attempts[spec], int(params["attempt"]) + 1)
        self._kills[spec] += trial.user_attrs.get(_LOST) == KILLED
        return trial.state == TrialState.RUNNING

    def _end(self, number: int, result: TrialResult) -> None:
        from optuna.trial import TrialState

        if result.samples_to_target is not None:
            self._storage.set_trial_state_values(self._id(number), TrialState.COMPLETE, [result.samples_to_target])
        else:
            state = TrialState.FAIL if result.status is TrialStatus.FAILED else TrialState.PRUNED
            self._storage.set_trial_state_values(self._id(number), state)

    def _end_lost(self, number: int, reason: str) -> None:
        from optuna.trial import TrialState

        self._storage.set_trial_user_attr(self._id(number), _LOST, reason)
        self._storage.set_trial_state_values(self._id(number), TrialState.FAIL)

    @property
    def _storage(self) -> Any:  # optuna's storage, whose base class is private
        return self._study._storage  # noqa: SLF001  # the public way writes attributes through a trial of the asking process only

    def _id(self, number: int) -> int:
        return int(self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number))  # noqa: SLF001

    @contextmanager
    def _journal_errors(self) -> Iterator[None]:
        """Turn what goes wrong with the file into errors that name it; keep Optuna's own words out of the user's terminal."""
        import optuna  # sets the level of its logger when it is imported

        logger = logging.getLogger(optuna.__name__)
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        except OSError as error:
            refuse_io("write", self._file, error)
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(
                f"{self._file} is not the journal of a sweep: {type(error).__name__}: {error}; pass --fresh or another --out."
            ) from error
        finally:
            logger.setLevel(level)


def _open(file: Path) -> "Study":
    import optuna
    from optuna.samplers import RandomSampler
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    backend = JournalFileBackend(str(file), lock_obj=_OwnLock(file))  # type: ignore[arg-type]  # its base class is private
    storage = JournalStorage(backend)
    return optuna.create_study(storage=storage, study_name=_NAME, sampler=RandomSampler(seed=0), load_if_exists=True, direction="minimize")


class _OwnLock:
    """A lock that the kernel opens when its holder dies; Optuna's own would outlive a killed driver."""

    def __init__(self, file: Path) -> None:
        self._lock = FileLock(file.with_name(JOURNAL_LOCK_FILE))

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


def _cut_half_line(file: Path) -> None:
    """Drop a last line that a killed writer, or a full disk, left half written: it was never acknowledged."""
    if not file.exists():
        return
    with file.open("r+b") as stream:
        content = stream.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            stream.truncate(whole)
            stream.flush()
            os.fsync(stream.fileno())


def _params(spec: TrialSpec, attempt: int) -> dict[str, float | int]:
    return {
        "batch_size": spec.global_batch_size,
        "lr": spec.lr,
        "seed": spec.seed,
        "most_samples": spec.most_samples,
        "attempt": attempt,
    }


def _spec(params: dict[str, Any]) -> TrialSpec:
    return TrialSpec(global_batch_size=params["batch_size"], lr=params["lr"], seed=params["seed"], most_samples=params["most_samples"])


def _distributions() -> dict[str, Any]:
    from optuna.distributions import FloatDistribution, IntDistribution

    whole = IntDistribution(0, 2**53)
    return {"batch_size": whole, "lr": FloatDistribution(1e-300, 1e300), "seed": whole, "most_samples": whole, "attempt": whole}
