"""How several processes are started: torchrun, and srun's environment."""

import subprocess
import sys

from commands import ENV, free_port


def torchrun(config, *arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    launcher += [f"--master_port={free_port()}", "train_net.py", "--config-file", config]
    return subprocess.run(
        [*launcher, *arguments],
        capture_output=True,
        text=True,
        env=ENV,
        start_new_session=True,  # Or the tests would be told to stop with it.
    )


def slurm(rank, port):
    """What srun puts into the environment of one of two tasks of one machine."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "node[1-1]",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
