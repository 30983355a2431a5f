"""Ranks agree, hear of one another's failures, and never wait for ever; here they are threads around one store."""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fakes import FakeDevice, planted_rig, planted_samples, planted_workload
from rightbatch.engine.ranks import (
    RankError,
    SingleRank,
    TorchRanks,
    bucket_bytes,
    failure_told,
    is_lead,
    is_one_of_many,
    local_device,
    ranks_from_environment,
    share_of_limit,
)
from rightbatch.errors import UserCodeError
from rightbatch.records.measurements import MemoryLimit

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


class PatientClock:
    """Time passes only where a rank pauses; another rank's thread gets its turn then."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.now = 0.0
        self.step_s = step_s
        self.turn = threading.Event()

    def now_s(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += self.step_s
        self.turn.wait(1e-3)


class BrokenStore:
    """Fails as a TCP store does once the process that held it has ended."""

    def set(self, key: str, value: str, /) -> None:
        raise dist.DistNetworkError("Broken pipe")

    def get(self, key: str, /) -> bytes:
        raise dist.DistNetworkError("Broken pipe")

    def check(self, keys: list[str], /) -> bool:
        raise dist.DistNetworkError("Broken pipe")

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        raise dist.DistNetworkError("Broken pipe")


class SmallStore(dist.HashStore):
    """Refuses large values, as the store that ``torchrun`` holds does above 8 MiB."""

    def set(self, key: str, value: str, /) -> None:
        if len(value) > 2 * 2**20:
            raise dist.DistNetworkError("Invalid value length")
        super().set(key, value)


def meeting(count: int, **arguments: object) -> list[TorchRanks]:
    """As many ranks around one store; they wait without an end unless a clock that moves is given."""
    store = SmallStore()
    clock = arguments.pop("clock", PatientClock())
    given = {"world_size": count, "local_world_size": count, "clock_s": clock.now_s, "pause": clock.pause} | arguments
    return [TorchRanks(store, rank=rank, **given) for rank in range(count)]


def each(ranks: list[TorchRanks], program: Callable[[TorchRanks], object]) -> list[object]:
    """Run the program on every rank at once; return what each returned or raised."""

    def run(one: TorchRanks) -> object:
        try:
            return program(one)
        except Exception as error:  # noqa: BLE001  # it is what the test looks at
            return error

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(run, ranks))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)


def test_every_rank_gets_the_smallest_value():
    answers = each(meeting(3), lambda one: one.agree_min(10 - one.rank, stage="size"))

    assert answers == [8, 8, 8]


def test_values_of_one_stage_do_not_reach_the_next():
    def program(one: TorchRanks) -> list[int]:
        return [one.agree_min(value, stage="size") for value in ((5, 9)[one.rank], (7, 8)[one.rank], -one.rank)]

    assert each(meeting(2), program) == [[5, 7, -1], [5, 7, -1]]


def test_text_is_produced_once_and_every_rank_gets_it():
    calls = []

    def program(one: TorchRanks) -> str:
        return one.share_text(lambda: calls.append(one.rank) or f"traced on rank {one.rank}", stage="trace")

    assert each(meeting(3), program) == ["traced on rank 0"] * 3
    assert calls == [0]


def test_text_larger_than_a_value_of_a_store_arrives_whole():
    generator = torch.Generator().manual_seed(0)
    text = "".join(map(chr, torch.randint(32, 0x2FF, (1_500_000,), generator=generator).tolist()))

    first, second = each(meeting(2), lambda one: one.share_text(lambda: text, stage="trace"))

    assert first == second == text


def test_failure_reaches_the_ranks_that_wait_with_rank_stage_and_reason():
    def program(one: TorchRanks) -> int:
        one.agree_min(1, stage="limit")
        with failure_told(one):
            if one.rank == 1:
                raise UserCodeError("the workload's code raised ValueError: odd sample")
            return one.agree_min(1, stage="size")

    waiting, failing, third = each(meeting(3), program)

    assert isinstance(failing, UserCodeError)
    for heard in (waiting, third):
        assert isinstance(heard, RankError)
        assert "rank 1 gave up in the stage 'limit': UserCodeError: the workload's code raised ValueError: odd sample" in str(heard)


def test_failure_reaches_a_rank_that_comes_to_its_next_stage_later():
    early, late = meeting(2, clock=PatientClock(step_s=1.0))
    early.fail("killed by SIGKILL")

    with pytest.raises(RankError, match="rank 0 gave up in the stage 'starting': killed by SIGKILL"):
        late.share_text(str, stage="trace")


def test_nothing_is_produced_for_ranks_of_which_one_has_failed():
    producer, receiver = meeting(2, clock=PatientClock(step_s=1.0))
    receiver.fail("killed by SIGKILL")

    with pytest.raises(RankError, match="rank 1 gave up"):
        producer.share_text(lambda: pytest.fail("produced"), stage="trace")


def test_failure_of_the_rank_that_produces_reaches_those_that_would_receive():
    def produce() -> str:
        raise MemoryError("no room")

    def program(one: TorchRanks) -> str:
        with failure_told(one):
            return one.share_text(produce, stage="trace")

    producer, receiver = each(meeting(2), program)

    assert isinstance(producer, MemoryError)
    assert "rank 0 gave up in the stage 'trace': MemoryError: no room" in str(receiver)


def test_ranks_that_fail_together_each_raise_their_own_error():
    def program(one: TorchRanks) -> None:
        with failure_told(one):
            raise ValueError(f"of rank {one.rank}")

    assert [str(error) for error in each(meeting(2), program)] == ["of rank 0", "of rank 1"]


def test_rank_that_never_comes_is_given_up_after_the_wait():
    waiting, _ = meeting(2, wait_s=30.0, clock=PatientClock(step_s=10.0))

    with pytest.raises(RankError, match="the stage 'size'; rank 1 did not come to it within 30 s of rank 0"):
        waiting.agree_min(1, stage="size")


def test_ranks_in_different_stages_are_told_so_instead_of_waiting():
    def program(one: TorchRanks) -> int:
        with failure_told(one):
            return one.agree_min(1, stage=("size", "limit")[one.rank])

    answers = each(meeting(2), program)

    assert all(isinstance(answer, RankError) for answer in answers)
    assert all("all ranks must do the same; rank" in str(answer) for answer in answers)


def test_store_that_has_gone_is_a_clear_error():
    (lonely,) = meeting(1)
    lonely._store = BrokenStore()

    with pytest.raises(RankError, match="must answer; got Broken pipe; has rank 0 or the launcher ended"):
        lonely.agree_min(1, stage="size")


def test_failing_and_leaving_do_not_need_the_store():
    lonely = TorchRanks(BrokenStore(), rank=1, world_size=2, local_world_size=2)

    lonely.fail("killed by SIGKILL")
    lonely.close()


def test_first_rank_leaves_only_after_the_others_or_the_farewell_has_passed():
    clock = PatientClock(step_s=1.0)
    first, _ = meeting(2, clock=clock)
    first.close()
    waited_s = clock.now
    punctual = meeting(2, clock=clock)
    punctual[1].close()
    punctual[0].close()

    assert waited_s == 30.0
    assert clock.now == waited_s


def test_single_rank_agrees_with_itself():
    alone = SingleRank()
    alone.fail("nobody hears it")
    alone.close()

    assert (alone.agree_min(7, stage="size"), alone.share_text(lambda: "text", stage="trace")) == (7, "text")


def test_process_without_a_launcher_is_alone(monkeypatch: pytest.MonkeyPatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)

    assert isinstance(ranks_from_environment(), SingleRank)
    assert (is_one_of_many(), is_lead()) == (False, True)


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "1"), ("MASTER_ADDR", ""), ("RANK", "")])
def test_launcher_of_one_process_or_without_a_meeting_place_is_none(launched: None, monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    monkeypatch.setenv(name, value)

    assert isinstance(ranks_from_environment(), SingleRank)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_variable_of_a_launcher_that_is_no_number_is_named(launched: None, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(name, "two")
    with pytest.raises(RankError, match=f"{name} must be a number, as a launcher sets it; got 'two'; start with torchrun, or unset"):
        ranks_from_environment()


def test_launched_process_is_one_of_many_and_only_the_first_leads(launched: None, monkeypatch: pytest.MonkeyPatch):
    follows = (is_one_of_many(), is_lead())
    monkeypatch.setenv("RANK", "0")

    assert (follows, is_lead()) == ((True, False), True)


@pytest.mark.parametrize(
    ("asked", "visible", "device"),
    [("auto", 2, "cuda:1"), ("cuda", 2, "cuda:1"), ("cuda:0", 2, "cuda:0"), ("cpu", 2, "cpu"), ("auto", 0, "auto"), ("cuda", 1, "cuda")],
)
def test_local_rank_names_the_gpu(launched: None, monkeypatch: pytest.MonkeyPatch, asked: str, visible: int, device: str):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)

    assert local_device(asked) == device


def test_process_on_its_own_keeps_the_device_it_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    assert local_device("cuda") == "cuda"


@pytest.mark.parametrize(
    ("source", "share_bytes"),
    [("MemAvailable", 333), ("cgroup /jobs/7", 333), ("device", 1000), ("--limit", 1000), ("RLIMIT_AS", 1000)],
)
def test_ranks_of_one_machine_share_what_the_machine_has_but_not_what_each_has(source: str, share_bytes: int):
    limit = MemoryLimit(limit_bytes=1000, source=source)

    assert share_of_limit(limit, meeting(3)[1]) == MemoryLimit(limit_bytes=share_bytes, source=source)


def test_buckets_are_as_large_as_the_gradients_that_ddp_keeps_in_them():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Linear(24, 100).requires_grad_(False)  # noqa: FBT003
            self.trained = nn.Linear(24, 3)
            self.half = nn.Linear(24, 5, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.trained(x)

    device = FakeDevice()
    workload = replace(planted_workload(device, planted_samples(10.0, 32, seed=1)), model=Half)

    assert bucket_bytes(planted_rig(device, workload)()) == 4 * 3 * 25 + 2 * 5 * 25


def test_importing_the_module_and_being_alone_needs_no_torch():
    program = "import sys; from rightbatch.engine.ranks import *; ranks_from_environment(); sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False, env={}).returncode == 0
