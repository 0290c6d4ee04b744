"""Who started this process: torchrun and accelerate, or SLURM and MPI, whose variables become those of torchrun.

A process that several tasks of `srun` or `mpirun` run side by side must not take itself for the only one: each would
train the whole run, into the same folder.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from zoo.registry import ZooError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
USE_TORCHRUN = "torchrun --nproc_per_node <processes of a node> -m zoo.train ..."


@dataclass(frozen=True)
class Place:
    """This process among those that a launcher started."""

    launcher: str
    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str | None  # of the node of rank 0; None: the launcher does not name it
    port: int

    @property
    def variables(self) -> dict[str, str]:
        """As torchrun sets them."""
        numbers = {"RANK": self.rank, "WORLD_SIZE": self.world, "LOCAL_RANK": self.local_rank}
        numbers |= {"LOCAL_WORLD_SIZE": self.local_world, "MASTER_PORT": self.port}
        return {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": self.address or ""}


def adopt_launcher(environment: dict[str, str] | os._Environ[str] = os.environ) -> Place | None:
    """Set the variables of torchrun where SLURM or MPI started several processes; return this process's place.

    `MASTER_ADDR` and `MASTER_PORT` that a person set are kept.

    Raises:
        ZooError: some variables of torchrun are set and others not, the node of rank 0 is not known, or what SLURM or
            MPI give contradicts itself; with the line to use.
    """
    given = [name for name in TORCHRUN if name in environment]
    if len(given) == len(TORCHRUN):
        return None  # by torchrun, accelerate or a script
    place = place_of(environment)
    if place is None:
        if given and environment.get("WORLD_SIZE", "1") != "1":
            missing = ", ".join(name for name in TORCHRUN if name not in environment)
            raise ZooError(
                f"The environment has {', '.join(f'{n}={environment[n]}' for n in given)} and no {missing}: a launcher "
                f"sets all of {', '.join(TORCHRUN)}. Start with {USE_TORCHRUN}, or unset them."
            )
        return None
    if place.address is None and "MASTER_ADDR" not in environment:
        raise ZooError(
            f"{place.launcher} started {place.world} processes on several nodes and does not name the first: export "
            "MASTER_ADDR=<host of rank 0> to all of them (mpirun -x MASTER_ADDR=...)."
        )
    for name, value in place.variables.items():
        if name not in environment or name in TORCHRUN:
            environment[name] = value
    return place


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is alone, or the first of those that a launcher started: ahead of `adopt_launcher`, too."""
    if (rank := environment.get("RANK")) is not None:
        return rank == "0"
    return (place := place_of(environment)) is None or place.rank == 0


def place_of(environment: Mapping[str, str]) -> Place | None:
    """Read the place of this process from what SLURM, Open MPI or MPICH and its relatives set; None: it is alone."""
    for read in (_slurm, _open_mpi, _hydra_pmi):
        if (place := read(environment)) is not None:
            return place if place.world > 1 else None
    return None


def _slurm(environment: Mapping[str, str]) -> Place | None:
    """A task of `srun`. A batch script has SLURM_NTASKS too, but runs once."""
    if "SLURM_PROCID" not in environment:
        return None
    step = "SLURM_STEP_NUM_TASKS" in environment
    rank = _number(environment, "SLURM_PROCID")
    if not step and rank == 0:
        return None
    world = _number(environment, "SLURM_STEP_NUM_TASKS" if step else "SLURM_NTASKS")
    node = _number(environment, "SLURM_NODEID", 0)
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or str(world)
    tasks = _tasks(per_node)
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    nodes = nodes or environment.get("SLURM_NODELIST", "")
    if rank >= world or node >= len(tasks):
        raise ZooError(
            f"SLURM's variables contradict each other: task {rank} of {world}, node {node} of {per_node!r} tasks. "
            f"Start with srun inside of the batch script, or with {USE_TORCHRUN} on each node."
        )
    job, number = _number(environment, "SLURM_JOB_ID", 0), _number(environment, "SLURM_STEP_ID", 0)
    local = _number(environment, "SLURM_LOCALID", rank)
    port = 15000 + (7 * job + number) % 15000  # steps of a job, and jobs that share a node, meet at different ports
    return Place("srun", rank, world, local, tasks[node], first_host(nodes) or None, port)


def _open_mpi(environment: Mapping[str, str]) -> Place | None:
    if "OMPI_COMM_WORLD_SIZE" not in environment:
        return None
    rank, world, local, local_world = (
        _number(environment, f"OMPI_COMM_WORLD_{word}") for word in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    )
    return Place("mpirun", rank, world, local, local_world, "127.0.0.1" if local_world == world else None, 29500)


def _hydra_pmi(environment: Mapping[str, str]) -> Place | None:
    """MPICH, Intel MPI, MVAPICH: the launcher that is called Hydra, nothing of the config library."""
    if "PMI_SIZE" not in environment:
        return None
    rank, world = _number(environment, "PMI_RANK"), _number(environment, "PMI_SIZE")
    if world > 1 and "MPI_LOCALRANKID" not in environment:
        raise ZooError(
            f"PMI_SIZE={world}: MPI started {world} processes, and MPI_LOCALRANKID, the place of this one on "
            f"its node, is not set: start with {USE_TORCHRUN}."
        )
    local, local_world = _number(environment, "MPI_LOCALRANKID", 0), _number(environment, "MPI_LOCALNRANKS", 1)
    return Place("mpirun", rank, world, local, local_world, "127.0.0.1" if local_world == world else None, 29500)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name, "" if default is None else str(default))
    if not value.isdecimal():
        raise ZooError(f"The launcher's variable {name} must be a number, got {value!r}. Start with {USE_TORCHRUN}.")
    return int(value)


def _tasks(text: str) -> list[int]:
    """Tasks of each node, as SLURM writes them: `4(x2),3` is 4, 4, 3."""
    found: list[int] = []
    for piece in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", piece.strip())
        if match is None:
            raise ZooError(f"The tasks of nodes {text!r} are not as SLURM writes them: 4(x2),3.")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def first_host(nodes: str) -> str:
    """The first host of a list as SLURM writes it: `gpu[007-012,14],login1` is gpu007; rank 0 runs there."""
    entry = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)  # up to a comma outside of brackets
    assert entry is not None, "it matches an empty text"
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", entry[0])
