"""A training ends where it should, goes on bit by bit, and says what it cannot do."""

import dataclasses
import math
import os
import random
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cases import rig_of, vectors
from rightbatch.errors import RunFolderBusyError, RunFolderError, UsageError, UserCodeError, WorkloadError
from rightbatch.fits.schedule_text import parse_schedule
from rightbatch.records.plan import BatchPlan
from rightbatch.records.schedule import SizeCoupling
from rightbatch.records.training_log import EvaluationLine, EventLine, LogEvent, LogLine, StepLine, TrainingTarget
from rightbatch.records.training_run import TrainingFolder, TrainingState
from rightbatch.training.log import TrainingLog
from rightbatch.training.request import SilentTraining, TrainingRequest
from rightbatch.training.session import Origin, TrainedRun, run_training
from rightbatch.workload.ingredients import Workload

SIZE = 200
PLAN = BatchPlan(global_batch_size=16, micro_batch_size=8, accumulation_steps=2)


class Disturbed(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Samples that are another one whenever they are read."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.samples = vectors(size, seed=seed)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = self.samples[index]
        return x + 0.1 * torch.randn(6) + random.gauss(0, 0.1), y


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 3))


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return (scores.argmax(1) == labels).float().mean().item()


def made(**ingredients: object) -> Workload:
    given = {
        "model": net,
        "train": Disturbed(SIZE),
        "valid": vectors(30, seed=1),
        "loss": cross_entropy,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        "metric": accuracy,
        "num_workers": 0,
    }
    return Workload(**given | ingredients)


def everything(**ingredients: object) -> Workload:
    """With all that has a state."""
    return made(
        scheduler=lambda optimizer: OneCycleLR(optimizer, max_lr=0.02, total_steps=100),
        average=lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
        clip_norm=1.0,
        **ingredients,
    )


def trained(workload: Workload, out: Path | None = None, **changes: object) -> TrainedRun:
    given = {"plan": PLAN, "epochs": 2, "out": out, "checkpoint_every_s": 1e9, "log_every_s": 0.0}
    request = TrainingRequest(**given | changes)
    return run_training(rig_of(workload), request, origin=Origin(), progress=SilentTraining())


def signalled(workload: Workload, at: int, number: signal.Signals = signal.SIGTERM) -> Workload:
    """The workload whose process gets a signal while it computes its n-th training loss."""
    calls = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), number)
        return cross_entropy(output, target)

    return dataclasses.replace(workload, loss=loss, loss_weight=len)


def weighed(workload: Workload) -> Workload:
    """The same workload without a signal."""
    return signalled(workload, at=-1)


def weights(run: TrainedRun) -> dict[str, Tensor]:
    average = {} if run.average is None else {f"average {name}": value for name, value in run.average.state_dict().items()}
    return dict(run.model.state_dict()) | average


def assert_same(one: TrainedRun, other: TrainedRun) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def without_times(lines: tuple[LogLine, ...]) -> list[dict[str, object]]:
    left_out = {"training_s", "samples_per_s"}
    return [line.model_dump(exclude=left_out) for line in lines if not isinstance(line, EventLine)]


def events(run: TrainedRun) -> list[LogEvent]:
    return [line.event for line in run.lines if isinstance(line, EventLine)]


SCHEDULES = {"constant": None, "geometric": "geometric:8..64@400", "noise": "noise:16,8..128,half=50,c=1"}


def schedule_of(name: str):
    text = SCHEDULES[name]
    return text and parse_schedule(text).model_copy(update={"coupling": SizeCoupling(base_batch_size=16, optimizer="AdamW")})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 1), (signal.SIGTERM, 11)])
def test_a_training_that_was_stopped_goes_on_bit_by_bit(
    tmp_path: Path, workers: int, schedule: str, number: signal.Signals, at: int
) -> None:
    torch.set_num_threads(1)
    asked = {"schedule": schedule_of(schedule), "noise_every": 2}
    workload = everything(num_workers=workers)
    whole = trained(weighed(workload), tmp_path / "whole", **asked)

    stopped = trained(signalled(workload, at, number), tmp_path / "cut", **asked)
    resumed = trained(weighed(workload), tmp_path / "cut", resume=True, **asked)

    assert (stopped.result.state, resumed.result.state) == (TrainingState.INTERRUPTED, TrainingState.FINISHED)
    assert 0 < stopped.result.samples < SIZE
    assert_same(whole, resumed)
    assert without_times(whole.lines) == without_times(resumed.lines)
    assert resumed.result.resumes == 1


def test_the_size_follows_the_noise_and_the_log_says_so(tmp_path: Path) -> None:
    run = trained(made(), schedule=schedule_of("noise"), noise_every=2, epochs=4)

    assert len(run.result.batch_sizes) > 1
    assert LogEvent.BATCH_SIZE in events(run)


def test_every_line_of_the_log_is_of_one_size() -> None:
    run = trained(made(), schedule=parse_schedule("milestones:0=16,96=48,192=8"), log_every_s=1e9, epochs=None, samples=240)

    steps = [line for line in run.lines if isinstance(line, StepLine)]
    assert [(line.samples, line.global_batch_size) for line in steps] == [(96, 16), (192, 48), (200, 8), (240, 8)]
    assert run.result.batch_sizes == ((0, 16), (96, 48), (192, 8))


def test_an_exact_number_of_samples_is_trained_on_in_every_epoch() -> None:
    run = trained(made(train=vectors(50)), plan=PLAN, epochs=3)

    steps = [line for line in run.lines if isinstance(line, StepLine)]
    assert run.result.samples == 150
    assert [line.samples for line in steps][:5] == [16, 32, 48, 50, 66]
    assert [line.samples for line in run.lines if isinstance(line, EvaluationLine)] == [50, 100, 150]


def test_samples_end_a_training_in_the_middle_of_an_epoch() -> None:
    run = trained(made(), epochs=None, samples=40)

    assert (run.result.samples, run.result.steps, run.result.state) == (48, 3, TrainingState.FINISHED)


def test_a_target_ends_it_and_a_missed_one_is_said() -> None:
    easy, hard = (TrainingTarget.parse(text) for text in ("accuracy>=0.0", "loss<=0.0"))

    reached, missed = trained(made(), target=easy), trained(made(), target=hard)

    assert (reached.result.state, reached.result.samples) == (TrainingState.TARGET_REACHED, SIZE)
    assert (missed.result.state, missed.result.samples) == (TrainingState.TARGET_MISSED, 2 * SIZE)


def test_the_caller_can_end_it_after_an_evaluation() -> None:
    asked: list[EvaluationLine] = []
    request = TrainingRequest(plan=PLAN, epochs=5, evaluate_every=48)

    def keep_going(evaluation: EvaluationLine) -> bool:
        asked.append(evaluation)
        return len(asked) < 2

    run = run_training(rig_of(made()), request, origin=Origin(), progress=SilentTraining(), keep_going=keep_going)

    assert (run.result.state, run.result.samples, len(asked)) == (TrainingState.STOPPED, 96, 2)


def test_epochs_that_leave_out_more_or_less_are_evaluated_at_their_ends() -> None:
    schedule = parse_schedule("milestones:0=32,120=48").model_copy(update={"coupling": SizeCoupling(base_batch_size=32, optimizer="AdamW")})

    run = trained(
        made(train=vectors(100)), plan=BatchPlan(global_batch_size=32, micro_batch_size=32), epochs=None, samples=368, schedule=schedule
    )

    assert [line.samples for line in run.lines if isinstance(line, EvaluationLine)] == [96, 176, 272, 368]


def test_evaluating_changes_nothing_of_the_training() -> None:
    often, once = trained(everything(), evaluate_every=16), trained(everything(valid=None, metric=None))

    assert_same(often, once)
    assert all(module.training for module in often.model.modules())


def test_the_moving_average_is_what_is_evaluated() -> None:
    run = trained(everything())

    assert run.result.evaluation is not None
    assert run.result.evaluation.of_average
    run.average.eval()
    x, y = (torch.stack([torch.as_tensor(part) for part in column]) for column in zip(*vectors(30, seed=1), strict=True))
    with torch.no_grad():
        assert run.result.evaluation.loss == pytest.approx(float(cross_entropy(run.average(x), y)), rel=1e-5)
        assert run.result.evaluation.metric == pytest.approx(accuracy(run.average(x), y))


def test_a_scheduler_is_stepped_by_samples_and_the_plans_rate_is_used() -> None:
    halving = made(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5),
    )
    half_size = parse_schedule("8")

    run = trained(halving, plan=PLAN.model_copy(update={"lr": 0.4}), epochs=None, samples=128, schedule=half_size)

    rates = [line.lr for line in run.lines if isinstance(line, StepLine)]
    assert rates == [0.4] * 8 + [0.2] * 8


def test_a_loss_that_is_not_finite_ends_it_without_spoiling_the_checkpoint(tmp_path: Path) -> None:
    wild = made(model=lambda: nn.Linear(6, 3), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e38))

    run = trained(wild, tmp_path / "run", checkpoint_every_s=1e-9)

    assert run.result.state is TrainingState.DIVERGED
    assert run.result.samples < SIZE
    for file in (tmp_path / "run").glob("checkpoint-*.pt"):
        state = torch.load(file, weights_only=True)["state"]["model"]
        assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_batches_in_which_nothing_counts_are_no_divergence() -> None:
    ignored = [(x, -100 if index < 190 else 0) for index, (x, _) in enumerate(vectors(SIZE))]

    run = trained(made(train=ignored), epochs=1)

    assert run.result.state is TrainingState.FINISHED


def test_a_last_batch_of_one_is_left_out_under_batch_norm_and_that_is_said() -> None:
    run = trained(made(train=vectors(SIZE + 9)), plan=PLAN, epochs=1)
    plain = trained(made(train=vectors(SIZE + 9), model=lambda: nn.Linear(6, 3)), plan=PLAN, epochs=1)

    assert (run.result.samples, plain.result.samples) == (SIZE + 8, SIZE + 9)
    first = run.lines[0]
    assert isinstance(first, EventLine)
    assert "the last batch of an epoch is left out" in first.detail


def test_a_finished_training_is_not_trained_again_and_a_longer_one_goes_on(tmp_path: Path) -> None:
    first = trained(made(), tmp_path / "run", epochs=1)

    again = trained(made(), tmp_path / "run", epochs=1, resume=True)
    longer = trained(made(), tmp_path / "run", epochs=2, resume=True)
    whole = trained(made(), tmp_path / "whole", epochs=2)

    assert (again.was_complete, again.lines) == (True, first.lines)
    assert not longer.was_complete
    assert_same(longer, whole)


def test_a_folder_that_holds_a_training_is_not_trained_over(tmp_path: Path) -> None:
    trained(made(), tmp_path / "run", epochs=1)

    with pytest.raises(UsageError, match="pass --resume to go on with it, --fresh to start again, or another --out"):
        trained(made(), tmp_path / "run", epochs=1)
    fresh = trained(made(), tmp_path / "run", epochs=1, fresh=True)

    assert (fresh.result.resumes, events(fresh)[0]) == (0, LogEvent.STARTED)


def test_a_folder_whose_manifest_is_damaged_can_only_be_started_again(tmp_path: Path) -> None:
    trained(made(), tmp_path / "run", epochs=1)
    (tmp_path / "run/training.json").write_text("{")

    with pytest.raises(RunFolderError, match=r"training\.json is not a rightbatch record"):
        trained(made(), tmp_path / "run", epochs=1, resume=True)

    assert trained(made(), tmp_path / "run", epochs=1, fresh=True).result.state is TrainingState.FINISHED


@pytest.mark.parametrize(
    "change",
    [
        {"plan": PLAN.model_copy(update={"lr": 0.5})},
        {"schedule": parse_schedule("8")},
        {"workload": made(model=lambda: nn.Linear(6, 3))},
        {"workload": made(train=vectors(SIZE + 1))},
        {"workload": made(precision="fp64")},
    ],
)
def test_another_training_does_not_go_on_from_its_checkpoint(tmp_path: Path, change: dict) -> None:
    trained(made(), tmp_path / "run", epochs=1)

    with pytest.raises(UsageError, match="a checkpoint must belong to the training that goes on"):
        trained(change.pop("workload", made()), tmp_path / "run", epochs=2, resume=True, **change)


@pytest.mark.parametrize("stage", ["TrainingLog", "TrainingLoop"])
def test_a_training_that_ended_before_its_first_step_can_be_resumed(tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"rightbatch.training.session.{stage}", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(made(), tmp_path / "run", epochs=1)

    assert trained(made(), tmp_path / "run", epochs=1, resume=True).result.state is TrainingState.FINISHED


def test_the_folder_is_a_trainings_before_anything_else_lies_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    class Watched(TrainingLog):
        def __init__(self, *args: object, **kwargs: object) -> None:
            seen.append(sorted(file.name for file in (tmp_path / "run").iterdir()))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr("rightbatch.training.session.TrainingLog", Watched)
    trained(made(), tmp_path / "run", epochs=1)

    assert seen == [[".lock", "training.json"]]


def test_a_rate_held_as_a_tensor_is_the_same_tensor_after_resuming(tmp_path: Path) -> None:
    built: list[tuple[torch.optim.Optimizer, Tensor]] = []

    def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        rate = torch.tensor(0.01)
        built.append((torch.optim.Adam(parameters, lr=rate), rate))
        return built[-1][0]

    workload = dataclasses.replace(weighed(made()), optimizer=adam)
    trained(workload, tmp_path / "run", epochs=1)
    trained(workload, tmp_path / "run", resume=True)

    assert all(optimizer.param_groups[0]["lr"] is rate for optimizer, rate in built)


def test_resuming_an_empty_folder_starts(tmp_path: Path) -> None:
    run = trained(made(), tmp_path / "run", epochs=1, resume=True)

    assert events(run)[0] is LogEvent.STARTED


def test_a_damaged_checkpoint_is_passed_over_and_that_is_said(tmp_path: Path) -> None:
    asked = {"epochs": 2, "checkpoint_every_s": 1e-9}
    whole = trained(made(), tmp_path / "run", **asked)
    last = max((tmp_path / "run").glob("checkpoint-*.pt"))
    last.write_bytes(last.read_bytes()[:-100])
    folder = TrainingFolder(tmp_path / "run")
    folder.write_manifest(whole.manifest.model_copy(update={"state": TrainingState.UNFINISHED}))

    resumed = trained(made(), tmp_path / "run", resume=True, **asked)

    assert_same(whole, resumed)
    assert without_times(whole.lines) == without_times(resumed.lines)
    assert LogEvent.CHECKPOINT_DAMAGED in events(resumed)


def test_two_trainings_cannot_share_a_folder(tmp_path: Path) -> None:
    with TrainingFolder.create(tmp_path / "run").lock(), pytest.raises(RunFolderBusyError, match="another process is using"):
        trained(made(), tmp_path / "run")


def test_a_folder_that_cannot_be_written_is_said_and_nothing_is_trained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(RunFolderError, match="is a file; pass another --out"):
        trained(made(), tmp_path / "file")


BROKEN: dict[str, tuple[dict, type[Exception], str]] = {
    "no metric": ({"metric": None}, WorkloadError, "the workload has no metric"),
    "no validation samples": ({"valid": None}, WorkloadError, "a target needs validation samples"),
    "a step": (
        {"loss": None, "step": lambda model, batch: cross_entropy(model(batch[0]), batch[1], reduction="none")},
        WorkloadError,
        "a step, whose outputs a metric cannot be given",
    ),
    "a metric that raises": ({"metric": lambda scores, labels: 1 / 0}, UserCodeError, "ZeroDivisionError"),
    "a dataset that raises": (
        {"train": type("Bad", (Disturbed,), {"__getitem__": lambda self, i: self.samples[10**6]})(9)},
        UserCodeError,
        "IndexError",
    ),
    "a scheduler that is none": ({"scheduler": lambda optimizer: 3}, WorkloadError, "scheduler must build a torch.optim.lr_scheduler"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_trained_is_said(name: str) -> None:
    change, kind, message = BROKEN[name]

    with pytest.raises(kind, match=message):
        trained(made(**change), target=TrainingTarget.parse("accuracy>=0.5"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a positive, finite number of epochs or of samples"),
        ({"epochs": 1, "samples": 5}, "give one, such as --epochs 10"),
        ({"epochs": 0}, "needs a positive, finite number"),
        ({"epochs": math.inf}, "got epochs inf"),
        ({"samples": math.nan}, "samples nan"),
        ({"epochs": 1, "evaluate_every": 0}, "evaluate_every must be at least 1; got 0"),
        ({"epochs": 1, "noise_every": -1}, "noise_every must be at least 1, or 0 not to measure; got -1"),
        ({"epochs": 1, "resume": True}, "needs its folder; got none"),
        ({"epochs": 1, "resume": True, "fresh": True, "out": Path("x")}, r"either goes on \(resume\) or starts again \(fresh\)"),
    ],
)
def test_requests_that_contradict_themselves_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainingRequest(plan=PLAN, **arguments)


def test_signals_are_handled_as_before_once_it_has_ended() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    trained(made(), epochs=1)

    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_signal_ends_it_at_once() -> None:
    def interrupted_twice(output: Tensor, target: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return cross_entropy(output, target)

    with pytest.raises(KeyboardInterrupt):
        trained(made(loss=interrupted_twice))


def first_noise(workload: Workload, **changes: object) -> object:
    run = trained(workload, epochs=1, log_every_s=0, **changes)
    return next((line.noise_scale for line in run.lines if isinstance(line, StepLine) and line.noise_scale is not None), None)


def test_noise_is_measured_unless_that_would_change_the_training() -> None:
    whole = BatchPlan(global_batch_size=2, micro_batch_size=2)
    plain = made(model=lambda: nn.Linear(6, 3))

    assert first_noise(plain, plan=whole) is not None
    assert first_noise(plain, plan=whole, noise_every=0) is None
    assert first_noise(made(), plan=whole) is None
    assert first_noise(made(), plan=BatchPlan(global_batch_size=4, micro_batch_size=2, accumulation_steps=2)) is not None
