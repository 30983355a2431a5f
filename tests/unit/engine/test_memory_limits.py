"""The limit on host memory is the least of all in force, read from planted kernel files."""

import resource
from types import SimpleNamespace

import psutil
import pytest

from rightbatch.engine import memory_limits
from rightbatch.engine.memory_limits import address_space_binds, cpu_memory_limit, free_memory_bytes
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


def test_max_at_every_level_of_version_2_limits_nothing(plant):
    free = plant("0::/a/b\n", {"a/b/memory.max": "max", "a/b/memory.current": GIB, "a/memory.max": "max", "memory.max": "max"})
    assert free == {"MemAvailable": 64 * GIB}


def test_version_1_without_a_limit_at_any_level_limits_nothing(plant):
    files = {f"memory/{level}memory.limit_in_bytes": V1_UNLIMITED for level in ("", "a/", "a/b/")}
    assert plant("3:memory:/a/b\n", files) == {"MemAvailable": 64 * GIB}


def test_of_deeply_nested_groups_the_tightest_binds_wherever_it_is(plant):
    free = plant(
        "0::/kubepods/burstable/pod1/container\n",
        {
            "kubepods/memory.max": 32 * GIB,
            "kubepods/memory.current": 20 * GIB,
            "kubepods/burstable/memory.max": "max",
            "kubepods/burstable/pod1/memory.max": 4 * GIB,
            "kubepods/burstable/pod1/memory.current": 3 * GIB,
            "kubepods/burstable/pod1/container/memory.max": 3 * GIB,
            "kubepods/burstable/pod1/container/memory.current": GIB,
        },
    )
    assert min(free, key=free.get) == "cgroup /kubepods/burstable/pod1"
    assert sorted(free.values()) == [GIB, 2 * GIB, 12 * GIB, 64 * GIB]


def test_a_hybrid_tree_counts_the_memory_controller_of_version_1_only_where_that_has_it(plant):
    free = plant(
        "4:memory:/job\n1:name=systemd:/job\n0::/job\n",
        {"memory/job/memory.limit_in_bytes": 2 * GIB, "memory/job/memory.usage_in_bytes": GIB, "unified/job/cgroup.controllers": ""},
    )
    assert free == {"MemAvailable": 64 * GIB, "cgroup /job": GIB}


def test_an_unreadable_usage_counts_as_none_and_a_senseless_limit_is_left_out(plant):
    free = plant("0::/a/b\n", {"a/b/memory.max": GIB, "a/b/memory.current": "?", "a/memory.max": "?"})
    assert free == {"MemAvailable": 64 * GIB, "cgroup /a/b": GIB}


def test_groups_that_are_named_but_not_mounted_limit_nothing(plant):
    assert plant("0::/pod/job\n4:memory:/pod/job\n", {}) == {"MemAvailable": 64 * GIB}


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
    free(**{"MemAvailable": 64 * GIB, "cgroup /job": 10 * GIB, "RLIMIT_AS": 20 * GIB})
    limit = cpu_memory_limit()
    assert (limit.source, limit.limit_bytes, limit.headroom_bytes) == ("cgroup /job", 9 * GIB, GIB)
    assert not limit.once_a_process
    assert not address_space_binds()


@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_on_this_process_alone_leaves_nothing_for_others_and_is_measured_once_a_process(free, name):
    free(**{"MemAvailable": 64 * GIB, name: 10 * GIB})
    limit = cpu_memory_limit()
    assert (limit.source, limit.limit_bytes, limit.headroom_bytes, limit.once_a_process) == (name, 10 * GIB, 0, True)
    assert address_space_binds()


def test_a_request_below_a_limit_on_address_space_counts_address_space(free):
    free(MemAvailable=64 * GIB, RLIMIT_AS=10 * GIB)
    limit = cpu_memory_limit(GIB)
    assert (limit.source, limit.limit_bytes, limit.once_a_process) == ("--limit", GIB, True)


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
