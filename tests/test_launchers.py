"""Processes find each other however they were started, and none takes itself for the only one."""

import os

import pytest

from tests.killed_runs import SERVER, served
from zoo.registry import ZooError
from zoo.runs.launchers import adopt_launcher, first_host, is_first, place_of

STEP = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "7", "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_STEP_NODELIST": "gpu[007-008]", "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[007-012,14],login1", "gpu007"),
        ("gpu[3]", "gpu3"),
        ("gpu[3,5].cluster", "gpu3.cluster"),
        ("rack[1-2]node[03-04]", "rack1node03"),
        ("a-b-[1-2]", "a-b-1"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_a_task_of_srun_gets_the_variables_of_torchrun():
    environment = dict(STEP)
    place = adopt_launcher(environment)
    assert (place.rank, place.world, place.local_rank, place.local_world) == (5, 7, 1, 3)
    assert {n: environment[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "gpu007",
    }  # fmt: skip
    other = adopt_launcher(first := dict(STEP, SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0"))
    assert first["MASTER_PORT"] == environment["MASTER_PORT"] and other.local_world == 4
    adopt_launcher(second := dict(STEP, SLURM_STEP_ID="1"))
    assert second["MASTER_PORT"] != environment["MASTER_PORT"]


def test_the_first_process_is_known_ahead_of_its_group():
    task = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    assert is_first({}) and is_first({**task, "SLURM_PROCID": "0"}) and is_first({"RANK": "0"})
    assert not is_first({**task, "SLURM_PROCID": "1"}) and not is_first({"RANK": "1"})


def test_what_a_person_or_torchrun_set_stays():
    environment = dict(STEP, MASTER_ADDR="10.0.0.1", MASTER_PORT="1234")
    adopt_launcher(environment)
    assert environment["MASTER_ADDR"] == "10.0.0.1" and environment["MASTER_PORT"] == "1234"
    within = dict(STEP, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")  # torchrun as the one task of a node
    assert adopt_launcher(within) is None and within["RANK"] == "1"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"},  # a batch script, which runs once
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
         "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
        {"WORLD_SIZE": "1"},
    ],
)  # fmt: skip
def test_a_process_that_is_alone(environment):
    before = dict(environment)
    assert adopt_launcher(environment) is None and environment == before


@pytest.mark.parametrize("prefix", ["open_mpi", "pmi"])
def test_mpi(prefix):
    names = {
        "open_mpi": [f"OMPI_COMM_WORLD_{w}" for w in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")],
        "pmi": ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
    }[prefix]
    one_node = dict(zip(names, "3434", strict=True)) | {names[0]: "3"}
    place = place_of(one_node)
    assert (place.rank, place.world, place.local_rank, place.local_world) == (3, 4, 3, 4)
    assert adopt_launcher(one_node).address == one_node["MASTER_ADDR"] == "127.0.0.1"
    several = dict(zip(names, "3412", strict=True))
    with pytest.raises(ZooError, match="MASTER_ADDR"):
        adopt_launcher(several)
    adopt_launcher(several := several | {"MASTER_ADDR": "node0"})
    assert several["RANK"] == "3" and several["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"WORLD_SIZE": "4"}, ["WORLD_SIZE=4", "RANK, LOCAL_RANK", "torchrun"]),
        ({"WORLD_SIZE": "4", "RANK": "0"}, ["RANK=0", "LOCAL_RANK", "torchrun"]),
        (dict(STEP, SLURM_PROCID="7"), ["task 7 of 7", "srun"]),
        (dict(STEP, SLURM_NODEID="2"), ["node 2", "4,3"]),
        (dict(STEP, SLURM_PROCID="x"), ["SLURM_PROCID", "'x'"]),
        (dict(STEP, SLURM_STEP_TASKS_PER_NODE="4x2"), ["'4x2'", "4(x2),3"]),
        ({k: v for k, v in STEP.items() if k != "SLURM_STEP_NODELIST"}, ["srun", "MASTER_ADDR"]),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, ["PMI_SIZE=2", "MPI_LOCALRANKID", "torchrun"]),
    ],
)
def test_what_is_refused(environment, words):
    with pytest.raises(ZooError) as error:
        adopt_launcher(dict(environment))
    assert all(word in str(error.value) for word in words), error.value


def task(file, variables):
    """What each task of the next test does."""
    import torch
    from torch import distributed as dist

    from zoo.runs.processes import start_accelerator

    os.environ |= variables
    a = start_accelerator("cpu")
    x = torch.tensor([a.process_index + 1.0])
    dist.all_reduce(x)
    file.write_text(f"{a.process_index} {a.num_processes} {a.is_main_process} {x.item()}")
    dist.destroy_process_group()


def test_two_tasks_of_srun_are_one_group(tmp_path):
    """Real processes, with the variables that SLURM 23.11 sets on one node; each tells its rank and the sum of both."""
    step = STEP | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    step |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0", "SLURM_JOB_ID": str(os.getpid())}
    own = [step | {"SLURM_PROCID": str(k), "SLURM_LOCALID": str(k)} for k in range(2)]
    with served():
        tasks = [SERVER.Process(target=task, args=(tmp_path / str(k), own[k])) for k in range(2)]
        for one in tasks:
            one.start()
        for one in tasks:
            one.join(120)
    hang = [one.kill() for one in tasks if one.exitcode is None]
    assert not hang and [one.exitcode for one in tasks] == [0, 0]
    assert [(tmp_path / str(k)).read_text() for k in range(2)] == ["0 2 True 3.0", "1 2 False 3.0"]
