"""Membership of a process is read from the environments of Slurm, TPU pods and Kubernetes."""

import pytest

from decodax.sharding.membership import Membership, first_host, read_membership, split_address

SLURM = {
    "SLURM_JOB_ID": "200505",
    "SLURM_JOB_NODELIST": "gpu[010,012-014]",
    "SLURM_STEP_NODELIST": "gpu[012-013]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}
SLURM_PORT = 61440 + 3897  # of the last 4,096 ports, the one that the job's id picks: 200505 = 48 x 4096 + 3897


def test_an_empty_environment_means_a_single_process():
    assert read_membership({"HOME": "/root", "PATH": "/bin"}) is None


def test_slurm_one_task_per_node_uses_all_gpus_of_its_node():
    assert read_membership(SLURM) == Membership(f"gpu012:{SLURM_PORT}", 2, 1, None, "SLURM")


def test_slurm_tasks_of_one_node_share_its_gpus():
    several = SLURM | {"SLURM_NTASKS": "5", "SLURM_PROCID": "3", "SLURM_STEP_TASKS_PER_NODE": "3,2"}
    found = read_membership(several | {"SLURM_NODEID": "1", "SLURM_LOCALID": "1"})
    assert found is not None and found.local_device_ids == (2, 3)


def test_slurm_s_binding_of_tasks_to_gpus_is_kept():
    bound = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0", "CUDA_VISIBLE_DEVICES": "3"}
    found = read_membership(bound)
    assert found is not None and found.local_device_ids is None


def test_the_error_for_a_slurm_batch_script_names_srun():
    script = {name: value for name, value in SLURM.items() if "STEP" not in name}
    with pytest.raises(ValueError, match="start the program with srun"):
        read_membership(script | {"SLURM_PROCID": "0"})
    assert read_membership(script | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None


@pytest.mark.parametrize("nodes", ["", ",a", "[1-2", "[]"])
def test_bad_node_lists_are_refused(nodes: str):
    with pytest.raises(ValueError, match="node list must look like"):
        first_host(nodes)


def test_one_tpu_slice_and_several():
    slice_ = {"TPU_WORKER_HOSTNAMES": "tpu-0.svc,tpu-1.svc,tpu-2.svc", "TPU_WORKER_ID": "2"}
    found = read_membership(slice_)
    assert found == Membership("tpu-0.svc:8482", 3, 2, None, "the TPU slice's variables")
    several = {
        "MEGASCALE_NUM_SLICES": "5",
        "MEGASCALE_SLICE_ID": "4",
        "MEGASCALE_COORDINATOR_ADDRESS": "first.svc:8080",
    }
    assert read_membership(slice_ | several) == Membership("first.svc:8482", 15, 14, None, "the TPU slice's variables")


def test_leader_worker_set():
    environ = {"LWS_LEADER_ADDRESS": "llm-1.llm.ns", "LWS_GROUP_SIZE": "3", "LWS_WORKER_INDEX": "2"}
    assert read_membership(environ) == Membership("llm-1.llm.ns:8482", 3, 2, None, "LeaderWorkerSet")
    with pytest.raises(ValueError, match=r"LeaderWorkerSet leave open process_id.*DECODAX_PROCESS_ID"):
        read_membership({name: value for name, value in environ.items() if name != "LWS_WORKER_INDEX"})


def test_jobset():
    environ = {
        "JOB_COMPLETION_INDEX": "1",
        "JOBSET_NAME": "run",
        "REPLICATED_JOB_NAME": "hosts",
        "DECODAX_NUM_PROCESSES": "6",
    }
    found = read_membership(environ)
    assert found is not None
    assert (found.coordinator, found.num_processes, found.process_id) == ("run-hosts-0-0.run:8482", 6, 1)
    found = read_membership(environ | {"JOB_INDEX": "2", "REPLICATED_JOB_REPLICAS": "3"})
    assert found is not None and found.process_id == 2 * 2 + 1
    with pytest.raises(ValueError, match="6 processes do not divide over the 4 jobs"):
        read_membership(environ | {"JOB_INDEX": "2", "REPLICATED_JOB_REPLICAS": "4"})
    with pytest.raises(ValueError, match="leave open coordinator, num_processes"):
        read_membership({"JOB_COMPLETION_INDEX": "1"})


def test_own_variables_and_arguments_override_the_system():
    own = {"DECODAX_COORDINATOR": "10.0.0.1:77", "DECODAX_NUM_PROCESSES": "7", "DECODAX_PROCESS_ID": "5"}
    assert read_membership(own) == Membership("10.0.0.1:77", 7, 5, None, "DECODAX_* variables")
    found = read_membership(SLURM | own, process_id=3, local_device_ids=(0, 2))
    assert found == Membership("10.0.0.1:77", 7, 3, (0, 2), "SLURM and DECODAX_* variables and arguments")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"DECODAX_PROCESS_ID": "7"}, r"process_id must be in 0..6 \(7 processes\), got 7"),
        ({"DECODAX_NUM_PROCESSES": "0"}, "num_processes must be at least 1, got 0"),
        ({"DECODAX_PROCESS_ID": "two"}, "DECODAX_PROCESS_ID must be a whole number, got 'two'"),
        ({"DECODAX_COORDINATOR": "host:http"}, "HOST:PORT with a port in 1..65535, got 'host:http'"),
        ({"DECODAX_COORDINATOR": "host:65536"}, "got 'host:65536'"),
    ],
)
def test_inconsistent_values_are_refused(changes: dict[str, str], message: str):
    own = {"DECODAX_COORDINATOR": "10.0.0.1:77", "DECODAX_NUM_PROCESSES": "7", "DECODAX_PROCESS_ID": "5"}
    with pytest.raises(ValueError, match=message):
        read_membership(own | changes)


def test_addresses():
    assert split_address("[2001:db8::7]:80") == ("2001:db8::7", 80)
    for text in ("2001:db8::7:80", ":80", "host", "host:", "host:0"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            split_address(text)
