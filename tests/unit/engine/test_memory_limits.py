"""The limit on host memory is the least of all in force, read from planted kernel files."""

import resource
from types import SimpleNamespace

import psutil
import pytest

from rightbatch.engine import memory_limits
from rightbatch.engine.memory_limits import cpu_memory_limit, free_memory_bytes
from rightbatch.units import GIB, MIB

V1_UNLIMITED = 9223372036854771712


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Plants files of the kernel, and a machine with 64 GiB available and no resource limits."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def planted(cgroup: str, files: dict[str, object]) -> dict[str, int]:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
        for name, content in files.items():
            file = tmp_path / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{content}\n")
        return free_memory_bytes(proc=tmp_path / "proc", cgroup_root=tmp_path / "cgroup")

    return planted


def test_every_level_of_a_version_2_group_counts(plant):
    free = plant(
        "0::/pod/job\n",
        {
            "pod/job/memory.max": 8 * GIB,
            "pod/job/memory.current": 3 * GIB,
            "pod/memory.max": 6 * GIB,
            "pod/memory.current": 5 * GIB,
            "memory.max": "max",
        },
    )
    assert free == {"MemAvailable": 64 * GIB, "cgroup /pod/job": 5 * GIB, "cgroup /pod": GIB}


def test_the_root_of_a_containers_own_namespace_counts(plant):
    assert plant("0::/\n", {"memory.max": 4 * GIB, "memory.current": GIB})["cgroup /"] == 3 * GIB


def test_every_level_of_a_version_1_group_counts(plant):
    free = plant(
        "5:cpu,cpuacct:/other\n4:memory:/docker/abc\n1:name=systemd:/\n",
        {
            "memory/docker/abc/memory.limit_in_bytes": 2 * GIB,
            "memory/docker/abc/memory.usage_in_bytes": GIB,
            "memory/docker/memory.limit_in_bytes": V1_UNLIMITED,
            "memory/memory.limit_in_bytes": 16 * GIB,
            "memory/memory.usage_in_bytes": 10 * GIB,
            "cpu,cpuacct/other/memory.limit_in_bytes": 1,
        },
    )
    assert free == {"MemAvailable": 64 * GIB, "cgroup /docker/abc": GIB, "cgroup /": 6 * GIB}


def test_a_container_that_sees_only_its_own_mount_is_limited_by_its_root(plant):
    free = plant("4:memory:/docker/abc\n", {"memory/memory.limit_in_bytes": 2 * GIB, "memory/memory.usage_in_bytes": GIB})
    assert free["cgroup /"] == GIB


def test_reclaimable_page_cache_counts_as_free(plant):
    free = plant(
        "0::/job\n",
        {
            "job/memory.max": 4 * GIB,
            "job/memory.current": 3 * GIB,
            "job/memory.stat": f"anon 5\nactive_file {GIB}\ninactive_file {2 * GIB}",
        },
    )
    assert free["cgroup /job"] == 3 * GIB


def test_page_cache_that_version_1_lists_twice_counts_once(plant):
    free = plant(
        "4:memory:/job\n",
        {
            "memory/job/memory.limit_in_bytes": 4 * GIB,
            "memory/job/memory.usage_in_bytes": 3 * GIB,
            "memory/job/memory.stat": f"inactive_file {GIB}\ntotal_inactive_file {GIB}",
        },
    )
    assert free["cgroup /job"] == 2 * GIB


def test_a_group_over_its_limit_has_nothing_free(plant):
    assert plant("0::/job\n", {"job/memory.max": GIB, "job/memory.current": 2 * GIB})["cgroup /job"] == 0


def test_of_two_hierarchies_with_one_name_the_tighter_counts(plant):
    free = plant(
        "4:memory:/job\n0::/job\n",
        {"memory/job/memory.limit_in_bytes": GIB, "job/memory.max": 2 * GIB},
    )
    assert free["cgroup /job"] == GIB


def test_without_control_groups_the_machine_is_the_limit(tmp_path, plant):
    assert free_memory_bytes(proc=tmp_path / "absent", cgroup_root=tmp_path) == {"MemAvailable": 64 * GIB}


@pytest.mark.parametrize(("kind", "name", "counted"), [("RLIMIT_AS", "RLIMIT_AS", "vms"), ("RLIMIT_DATA", "RLIMIT_DATA", "data")])
def test_a_resource_limit_counts_less_what_is_used_of_it(plant, monkeypatch, kind, name, counted):
    used = {"rss": GIB, "vms": 5 * GIB, "data": 2 * GIB}
    fake = SimpleNamespace(memory_info=lambda: SimpleNamespace(**used))
    monkeypatch.setattr(psutil, "Process", lambda: fake)
    limits = {getattr(resource, kind): (10 * GIB, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits.get(which, (resource.RLIM_INFINITY,) * 2))
    assert plant("", {}) == {"MemAvailable": 64 * GIB, name: 10 * GIB - used[counted]}


@pytest.fixture
def free(monkeypatch):
    def plant_free(**limits: int) -> None:
        monkeypatch.setattr(memory_limits, "free_memory_bytes", lambda: limits)

    return plant_free


def test_the_least_free_limit_binds_and_keeps_a_tenth_free(free):
    free(MemAvailable=64 * GIB, RLIMIT_AS=10 * GIB)
    limit = cpu_memory_limit()
    assert (limit.source, limit.limit_bytes, limit.headroom_bytes) == ("RLIMIT_AS", 9 * GIB, GIB)


def test_the_headroom_is_at_least_256_mib(free):
    free(MemAvailable=GIB)
    assert cpu_memory_limit().headroom_bytes == 256 * MIB


def test_nothing_is_left_when_less_than_the_headroom_is_free(free):
    free(MemAvailable=100 * MIB)
    assert cpu_memory_limit().limit_bytes == 0


def test_a_request_below_what_is_free_is_taken_as_it_is(free):
    free(MemAvailable=10 * GIB)
    limit = cpu_memory_limit(GIB)
    assert (limit.source, limit.limit_bytes, limit.headroom_bytes) == ("--limit", GIB, 0)


def test_a_request_above_what_is_free_does_not_raise_the_limit(free):
    free(MemAvailable=10 * GIB)
    limit = cpu_memory_limit(20 * GIB)
    assert (limit.source, limit.limit_bytes) == ("MemAvailable", 9 * GIB)


def test_this_machine_has_a_limit():
    assert cpu_memory_limit().limit_bytes < psutil.virtual_memory().total
