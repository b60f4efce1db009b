"""Starts a module in as many processes as it has GPUs, on one node or on several of a SLURM job.

    python -m lpovod.launcher 4 workflow_scripts.base_detector --dataset ...

runs it under torch's own launcher, 4 processes per node; 0 and 1 run it as it is. For several nodes
start this command once on each of them (`srun --nodes=2 --ntasks-per-node=1 python -m ...`): the
first node of that job step is where all meet.
"""

import os
import re
import sys
from collections.abc import Mapping


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: ``gpu[03-05,9],x1`` starts with gpu03."""
    name, number = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes).groups()
    return name + (number or "")


def command(processes: int, arguments: list[str], environment: Mapping[str, str]) -> list[str]:
    """The command line that runs a module in several processes.

    Args:
        processes: on each node.
        arguments: the module's name and its own arguments.
        environment: where SLURM tells of several nodes.
    """
    # A job may have more nodes than the step: on those nobody would come to meet us.
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
    if nodes == 1 and processes <= 1:
        return [sys.executable, "-m", *arguments]
    if nodes == 1:
        meeting = ["--standalone"]
    else:
        meeting = [
            f"--nnodes={nodes}",
            f"--node-rank={environment['SLURM_NODEID']}",
            f"--master-addr={first_host(environment['SLURM_STEP_NODELIST'])}",
            # Jobs that share the first node must not meet on one port.
            f"--master-port={20_000 + int(environment['SLURM_JOB_ID']) % 10_000}",
        ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meeting]
    return [*torchrun, f"--nproc-per-node={max(1, processes)}", "-m", *arguments]


if __name__ == "__main__":
    line = command(int(sys.argv[1]), sys.argv[2:], os.environ)
    os.execv(line[0], line)
