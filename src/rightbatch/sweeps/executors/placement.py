"""What a cluster's nodes give to each trial, and how many trials they take at once. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from rightbatch.errors import ClusterError, UsageError
from rightbatch.sweeps.executors.local import MOST_SIDE_BY_SIDE


@dataclass(frozen=True)
class Node:
    """What one node has.

    Attributes:
        cpus: Cores that it lends.
        gpus: GPUs that it lends.
    """

    cpus: int
    gpus: int


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How trials are placed.

    Attributes:
        cpus: Cores of a trial.
        gpus: GPUs of a trial: one, or none.
        slots: Trials at once.
    """

    cpus: int
    gpus: int
    slots: int


def place(nodes: Sequence[Node], *, device: str, jobs: int | None) -> Placement:
    """Give each trial a GPU where the cluster has any, else an even share of the cores.

    Args:
        nodes: Nodes that can be used.
        device: Device of a trial, as the user named it.
        jobs: Trials at once; none takes as many as the nodes hold. More than they hold wait for their turn.

    Raises:
        UsageError: The device is one that no cluster can be asked for.
        ClusterError: No node has what a trial needs.
    """
    if device not in {"auto", "cpu", "cuda"}:
        raise UsageError(f"on a cluster --device must be auto, cpu or cuda, because its scheduler picks the GPU; got {device}.")
    with_gpus = [node for node in nodes if node.gpus > 0]
    if device == "cuda" and not with_gpus:
        raise ClusterError(f"--device cuda needs a node with a GPU; none of the {len(nodes)} nodes of the cluster lends one.")
    if with_gpus and device != "cpu":
        cpus = min(node.cpus // node.gpus for node in with_gpus)
        return Placement(cpus=cpus, gpus=1, slots=jobs or sum(node.gpus for node in with_gpus))
    cores = [node.cpus for node in nodes]
    if sum(cores) == 0:
        raise ClusterError(f"a trial needs a core; none of the {len(nodes)} nodes of the cluster lends one.")
    slots = jobs or sum(min(count, MOST_SIDE_BY_SIDE) for count in cores)
    share = next((share for share in range(max(cores), 0, -1) if sum(count // share for count in cores) >= slots), 1)
    return Placement(cpus=share, gpus=0, slots=slots)
