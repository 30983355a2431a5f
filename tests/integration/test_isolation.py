"""Probes leave the caller as they found it, whatever they do, and whatever becomes of the child."""

import contextlib
import gc
import hashlib
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import cloudpickle
import numpy as np
import psutil
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from cases import Residual, images, rig_of, sgd
from rightbatch.engine.isolation import ChildHost, Completed, InProcessHost, Killed, OutOfMemory
from rightbatch.engine.out_of_memory import is_out_of_memory
from rightbatch.engine.provenance import environment
from rightbatch.engine.rig import Rig
from rightbatch.errors import IsolationError, UserCodeError, WorkloadError
from rightbatch.probes import gradient_noise, loader, memory, step_time
from rightbatch.records.measurements import Contention
from rightbatch.workload.ingredients import Workload

cloudpickle.register_pickle_by_value(sys.modules[__name__])

QUIET = Contention(load_average_1m=0, cpu_count=2, other_processes_cpu=0)
PROBES = {
    "describe": Rig.describe,
    "memory.limit": partial(memory.limit, requested_bytes=None),
    "memory.trace": memory.trace,
    "memory.attempt": partial(memory.attempt, size=4, purpose="touch", traced_bytes=0, limit_bytes=2**40),
    "step_time.contention": step_time.contention,
    "step_time.scan": partial(step_time.scan, largest=4, budget_s=1.0, affordable_step_s=1.0),
    "step_time.measure": partial(
        step_time.measure, sizes=(2, 4), is_decided=lambda measured: True, budget_s=0.1, machine=QUIET, largest_affordable=None
    ),
    "loader": partial(loader.measure, budget_s=0.3),
    "gradient_noise": partial(
        gradient_noise.measure, micro_batch_size=4, pilot_batch_size=8, batch_norm=True, is_decided=lambda norms: True, budget_s=1.0
    ),
}


class Users:
    """A user in the middle of a training of their own: gradients set, optimizer state, some layers frozen in evaluation mode."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = Residual()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        inputs, targets = torch.randn(6, 2, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
        for _ in range(2):
            self.optimizer.zero_grad()
            cross_entropy(self.model(inputs), targets).backward()
            self.optimizer.step()
        self.model.first.eval()
        self.model.stem.weight.requires_grad_(requires_grad=False)

    def workload(self) -> Workload:
        return Workload(model=self.model, train=images(64), loss=cross_entropy, optimizer=sgd)

    def digest(self) -> str:
        """SHA-256 of everything of the user's that a probe could change."""
        model = self.model
        tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]
        tensors += [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        cudnn = torch.backends.cudnn
        plain = (
            [(name, module.training) for name, module in model.named_modules()],
            [(name, parameter.requires_grad, parameter.grad is None) for name, parameter in model.named_parameters()],
            self.optimizer.state_dict()["param_groups"],
            random.getstate(),
            [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],  # noqa: NPY002
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            str(torch.get_default_dtype()),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.get_float32_matmul_precision(),
            (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
            str(Path.cwd()),
            sorted(os.environ.items()),
            [str(entry) for entry in warnings.filters],
        )
        content = pickle.dumps(plain) + b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)
        return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def users():
    return Users()


def build(workload):
    return lambda: rig_of(workload)


def said(_line: str) -> None:
    """Progress goes nowhere."""


@pytest.fixture(scope="module")
def child(users):
    host = ChildHost(build(users.workload()), said)
    yield host
    host.close()


@pytest.fixture(scope="module")
def in_process(users):
    return InProcessHost(build(users.workload()), said)


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("host", ["in_process", "child"])
def test_every_probe_leaves_the_user_as_they_were(host, probe, users, request):
    runs = request.getfixturevalue(host)
    before = users.digest()
    outcome = runs.call(PROBES[probe])
    assert isinstance(outcome, Completed), outcome
    assert users.digest() == before


def test_a_probe_runs_with_gradients_where_the_user_has_them_off(in_process, users):
    with torch.no_grad():
        before = users.digest()
        assert isinstance(in_process.call(PROBES["memory.trace"]), Completed)
        assert users.digest() == before


def change_weights(rig):
    with torch.no_grad():
        rig.workload.model.head.weight.view(-1)[0].add_(1e-6)


def change_buffers(rig):
    rig.workload.model.first[0].running_mean[0] += 1e-6


def change_gradients(rig):
    rig.workload.model.head.bias.grad = None


def change_mode(rig):
    rig.workload.model.train()


@pytest.mark.parametrize("dirty", [change_weights, change_buffers, change_gradients, change_mode])
def test_the_digest_sees_a_probe_that_changes_the_users_model(dirty):
    users = Users()
    before = users.digest()
    InProcessHost(build(users.workload()), said).call(dirty)
    assert users.digest() != before


def draw_from_every_generator(_rig=None):
    random.random()  # noqa: S311
    np.random.rand()  # noqa: NPY002
    torch.rand(1)


def turn_every_switch(_rig=None):
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(2 if torch.get_num_threads() == 1 else 1)
    torch.set_grad_enabled(mode=False)
    warnings.simplefilter("ignore")


@pytest.mark.parametrize("dirty", [draw_from_every_generator, turn_every_switch])
def test_what_a_probe_changes_in_the_process_is_put_back_and_the_digest_would_see_it(dirty, users, in_process):
    before = users.digest()
    in_process.call(dirty)
    assert users.digest() == before

    def untidy(rig):
        dirty()
        return users.digest()

    assert in_process.call(untidy).value != before


@pytest.fixture
def new_precision():
    """The switch that torch's older ones cannot tell of, set by the user."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"


def fp32_precisions():
    backends = torch.backends
    return [owner.fp32_precision for owner in (backends, backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)]


def test_the_users_float32_precision_is_told_and_left_as_it_was(users, new_precision):
    before = fp32_precisions()
    host = InProcessHost(build(users.workload()), said)

    told = dict(host.call(environment, "in-process").value.flags)["float32 matmul precision"]
    host.call(lambda rig: setattr(torch.backends, "fp32_precision", "ieee"))

    assert told == "tf32 on CUDA, none in oneDNN"
    assert fp32_precisions() == before


def test_switches_that_nothing_changed_are_not_written_down_as_set(in_process):
    torch.backends.cuda.matmul.fp32_precision = "none"
    in_process.call(lambda rig: None)
    assert torch.backends.cuda.matmul.fp32_precision == "none"


def test_a_default_device_is_put_back(in_process):
    in_process.call(lambda rig: torch.set_default_device("meta"))
    assert torch.get_default_device() == torch.device("cpu")


def test_what_a_failing_probe_changes_is_put_back_too(users, in_process):
    def fails(rig):
        turn_every_switch()
        raise ValueError("no")

    before = users.digest()
    with pytest.raises(UserCodeError):
        in_process.call(fails)
    assert users.digest() == before


def test_switches_that_loading_the_workload_sets_hold_in_every_probe_and_nowhere_else(users):
    def build_and_set():
        turn_every_switch()
        torch.set_grad_enabled(mode=True)
        return rig_of(users.workload())

    before, threads = users.digest(), torch.get_num_threads()
    host = InProcessHost(build_and_set, said)
    assert users.digest() == before
    assert host.call(lambda rig: (torch.get_num_threads() != threads, torch.get_default_dtype())).value == (True, torch.float64)
    assert users.digest() == before


def kill_itself(rig):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_child_is_an_outcome_and_the_host_works_again(child, users):
    before = users.digest()
    assert child.call(kill_itself) == Killed("SIGKILL")
    outcome = child.call(lambda rig: rig.train_size)
    assert outcome == Completed(64)
    assert users.digest() == before


def test_a_crash_of_compiled_code_is_no_lack_of_memory_and_shows_where_it_was(capfd):
    with pytest.raises(UserCodeError, match="must not crash; it ended the child process with SIGSEGV, which is no lack of memory"):
        ChildHost(lambda: os.kill(os.getpid(), signal.SIGSEGV), said)
    assert "Fatal Python error: Segmentation fault" in capfd.readouterr().err


def test_an_abort_may_be_a_failed_allocation_and_counts_as_killed(child):
    assert child.call(lambda rig: os.abort()) == Killed("SIGABRT")


def fail_within_an_address_space(rig):
    """Enlarge convolutions until they no longer fit in little more address space than there is now; return what was raised."""
    net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.Flatten())
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 100 * 2**20, before[1]))
    errors = []
    try:
        for size in range(40, 400, 20):
            try:
                net(torch.randn(size, 3, 32, 32)).sum().backward()
            except RuntimeError as error:
                errors.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    return errors


def test_whatever_a_cnn_says_within_an_address_space_that_is_too_small_means_out_of_memory(child):
    errors = child.call(fail_within_an_address_space).value
    assert errors
    assert [message for message in errors if not is_out_of_memory(RuntimeError(message))] == []


def raise_memory_error(rig):
    raise MemoryError


def raise_allocator_error(rig):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nmore")


def ask_for_too_much(rig):
    torch.empty(2**55)


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (raise_memory_error, "MemoryError"),
        (raise_allocator_error, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        (ask_for_too_much, None),
    ],
)
@pytest.mark.parametrize("host", ["in_process", "child"])
def test_running_out_of_memory_is_an_outcome_and_the_host_goes_on(host, probe, message, request):
    runs = request.getfixturevalue(host)
    pid = runs.call(lambda rig: os.getpid())
    outcome = runs.call(probe)
    assert isinstance(outcome, OutOfMemory)
    assert "\n" not in outcome.message
    assert message is None or outcome.message == message
    assert runs.call(lambda rig: os.getpid()) == pid


def users_function(rig):
    return users_inner_function({})


def users_inner_function(mapping):
    return mapping["missing"]


@pytest.mark.parametrize("host", ["in_process", "child"])
def test_an_error_of_the_users_code_comes_with_the_users_frames_only(host, request):
    with pytest.raises(UserCodeError, match="raised KeyError: 'missing'") as caught:
        request.getfixturevalue(host).call(users_function)
    traceback = caught.value.user_traceback
    assert "users_function" in traceback
    assert "users_inner_function" in traceback
    assert traceback.endswith("KeyError: 'missing'\n")
    assert "isolation.py" not in traceback.replace("test_isolation.py", "")
    assert "_attempt" not in traceback


def refuse(rig):
    raise WorkloadError("the rule; what was got; what to do.")


@pytest.mark.parametrize("host", ["in_process", "child"])
def test_an_error_of_ours_passes_as_it_is(host, request):
    with pytest.raises(WorkloadError, match=r"^the rule; what was got; what to do\.$"):
        request.getfixturevalue(host).call(refuse)


def test_a_child_that_exits_is_an_error_and_the_next_call_starts_another(child):
    with pytest.raises(IsolationError, match="must answer; it exited with status 3"):
        child.call(lambda rig: os._exit(3))
    assert child.call(lambda rig: rig.train_size) == Completed(64)


def test_progress_reaches_the_caller_from_both_hosts(child, in_process, monkeypatch):
    lines = []
    monkeypatch.setattr(child, "_say", lines.append)
    in_process._rig.say = lines.append
    for host in (child, in_process):
        host.call(lambda rig: rig.say("half way"))
    assert lines == ["half way", "half way"]


def test_a_workload_that_cannot_be_sent_is_refused_with_what_to_do():
    lock = threading.Lock()
    with pytest.raises(IsolationError, match=r"must be picklable .* where they are first used, or pass isolation='in-process'"):
        ChildHost(lambda: lock, said)


def test_a_child_that_cannot_be_started_is_a_loud_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(IsolationError, match=r"must be startable .*; free some processes or memory"):
        ChildHost(lambda: None, said)


def test_a_child_without_a_free_descriptor_is_a_loud_error():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(IsolationError, match=r"must be startable .*; got .*Too many open files"):
            ChildHost(lambda: None, said)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_child_that_cannot_import_what_it_needs_says_so(tmp_path, monkeypatch):
    package = tmp_path / "rightbatch"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('half an installation')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(IsolationError, match=r"must be startable .*; got ImportError: half an installation; free some"):
        ChildHost(lambda: None, said)


def test_a_child_that_is_killed_while_it_loads_is_an_error_with_the_signal():
    with pytest.raises(IsolationError, match=r"must load the workload before it measures; it ended with SIGKILL; is memory short\?"):
        ChildHost(lambda: kill_itself(None), said)


def test_loading_errors_of_the_users_code_are_raised_and_leave_no_child():
    def build_badly():
        raise ZeroDivisionError("in the loading")

    alive = {process.pid for process in psutil.Process().children()}
    with pytest.raises(UserCodeError, match="ZeroDivisionError: in the loading"):
        ChildHost(build_badly, said)
    assert {process.pid for process in psutil.Process().children()} <= alive


def batch_sum_loss(output, target):
    return cross_entropy(output, target, reduction="sum")


def leave_workers_running(rig):
    """Start data loader workers that outlive the probe, and a process that does not watch for its parent."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    rig.left = iter(DataLoader(rig.workload.train, batch_size=4, num_workers=2, persistent_workers=True))
    next(rig.left)
    return [os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))]


def test_a_child_that_was_started_again_still_knows_a_sum_from_a_mean_and_closing_ends_its_workers():
    workload = Workload(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), train=images(64), loss=batch_sum_loss, num_workers=2)
    host = ChildHost(build(workload), said)
    assert host.call(Rig.describe).value.loss_reduction == "sum"
    assert host.call(kill_itself) == Killed("SIGKILL")
    assert host.call(lambda rig: rig.new_trainee().objective.loss_is_sum) == Completed(value=True)
    processes = [psutil.Process(pid) for pid in host.call(leave_workers_running).value]
    host.close()
    assert len(processes) >= 4
    assert not still_running(processes)


def still_running(processes) -> list[psutil.Process]:
    """Those that have not ended after a bounded wait; a zombie that nobody reaps has ended."""
    for _ in range(1000):
        running = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    running.append(process)
        if not running:
            return []
        time.sleep(0.02)
    return running


PARENT = """
import os, sys, time
import torch
from rightbatch.engine.isolation import ChildHost
from cases import images, plain_cnn, rig_of
from rightbatch.workload.ingredients import Workload

def endless(rig):
    rig.say(str(os.getpid()))
    while True:
        time.sleep(0.01)

workload = Workload(model=plain_cnn, train=images(8), loss=torch.nn.functional.cross_entropy)
host = ChildHost(lambda: rig_of(workload), lambda line: print(line, flush=True))
if sys.argv[1] == "busy":
    host.call(endless)
print(host._process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("doing", ["idle", "busy"])
def test_the_child_ends_with_a_parent_that_is_killed(doing):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, doing], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    with parent:
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    assert still_running([child]) == []


SCRIPT = """
import torch
import rightbatch as rb
from rightbatch.errors import InconclusiveError

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def forward(self, x):
        print("chatter of the model")
        return self.layer(x)

samples = [(torch.randn(4), i % 2) for i in range(256)]
workload = rb.Workload(
    model=lambda: Net(),
    train=samples,
    loss=lambda output, target: torch.nn.functional.cross_entropy(output, target),
    optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    num_workers=0,
)
try:
    plan = rb.find(workload, budget="3s", threads=1)
except InconclusiveError:
    print("found nothing")
else:
    print("found", plan.global_batch_size)
"""


def test_a_script_without_a_main_guard_finds_a_plan_and_its_stdout_is_its_own(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "found"
    assert done.stdout.count("\n") == 1
    assert "chatter of the model" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.py"]


def _collection_counts(_rig: Rig) -> tuple[int, int]:
    return gc.get_freeze_count(), len(gc.get_objects())


def test_a_child_does_not_walk_through_torch_at_every_collection() -> None:
    host = ChildHost(build(Users().workload()), lambda _: None)

    with contextlib.closing(host):
        frozen, walked = host.call(_collection_counts).value

    assert frozen > 10 * walked
