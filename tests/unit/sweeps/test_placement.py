"""How trials are placed on a cluster's nodes."""

import pytest

from rightbatch.errors import ClusterError, UsageError
from rightbatch.sweeps.executors.placement import Node, Placement, place


def test_each_gpu_takes_one_trial_with_its_share_of_the_cores() -> None:
    nodes = [Node(cpus=32, gpus=4), Node(cpus=12, gpus=2), Node(cpus=64, gpus=0)]

    assert place(nodes, device="auto", jobs=None) == Placement(cpus=6, gpus=1, slots=6)


def test_a_cpu_sweep_leaves_gpus_alone() -> None:
    assert place([Node(cpus=8, gpus=4)], device="cpu", jobs=None) == Placement(cpus=2, gpus=0, slots=4)


def test_small_nodes_take_a_trial_a_core() -> None:
    assert place([Node(cpus=1, gpus=0), Node(cpus=1, gpus=0)], device="auto", jobs=None) == Placement(cpus=1, gpus=0, slots=2)


def test_fewer_jobs_get_more_cores_each() -> None:
    assert place([Node(cpus=8, gpus=0), Node(cpus=8, gpus=0)], device="cpu", jobs=2) == Placement(cpus=8, gpus=0, slots=2)


def test_more_jobs_than_cores_wait_for_their_turn() -> None:
    assert place([Node(cpus=2, gpus=0)], device="cpu", jobs=9) == Placement(cpus=1, gpus=0, slots=9)


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_device_that_only_this_machine_has_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match="must be auto, cpu or cuda"):
        place([Node(cpus=8, gpus=4)], device=device, jobs=None)


def test_a_cluster_without_gpus_is_refused_where_one_is_needed() -> None:
    with pytest.raises(ClusterError, match="none of the 1 nodes"):
        place([Node(cpus=8, gpus=0)], device="cuda", jobs=None)


def test_a_cluster_without_cores_is_refused() -> None:
    with pytest.raises(ClusterError, match="a trial needs a core"):
        place([Node(cpus=0, gpus=0)], device="cpu", jobs=None)
