"""Starts a module in as many processes as it has GPUs, on one node or on several of a SLURM job.

    python -m lpovod.launcher 1 4 workflow_scripts.base_detector --dataset ...

runs it under torch's own launcher, on 1 node in 4 processes; 0 and 1 process run it as it is. With
several nodes the second number counts the GPUs of all; the command runs in the batch script of a
SLURM job, and starts itself once on each of the job's nodes.
"""

import os
import sys
from collections.abc import Mapping

from lpovod.exceptions import LpovodError


def command(
    nodes: int, gpus: int, arguments: list[str], environment: Mapping[str, str]
) -> list[str]:
    """The command line that runs a module in several processes.

    Args:
        nodes: how many take part.
        gpus: of all nodes together; without any, each node runs one process.
        arguments: the module's name and its own arguments.
        environment: where SLURM tells of its job, and of the step that a node runs.

    Raises:
        LpovodError: if there is no SLURM job to have several nodes.
    """
    if nodes == 1 and gpus <= 1:
        return [sys.executable, "-m", *arguments]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    if nodes == 1:
        return [*torchrun, "--standalone", f"--nproc-per-node={gpus}", "-m", *arguments]
    if "SLURM_JOB_ID" not in environment:
        raise LpovodError(f"{nodes} nodes need a SLURM job; without one set training_nodes: 1")
    # A job may have more nodes than the step: on those nobody would come to meet us.
    if environment.get("SLURM_STEP_NUM_NODES") != str(nodes):
        # A rank that is left alone would wait for the others, with its GPUs, until time is over.
        step = ["srun", f"--nodes={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit"]
        # Its processes may use all processors of the job on their node.
        again = [sys.executable, "-m", "lpovod.launcher", str(nodes), str(gpus)]
        return [*step, "--cpu-bind=none", *again, *arguments]
    return [
        *torchrun,
        f"--nnodes={nodes}",
        f"--node-rank={environment['SLURM_NODEID']}",
        # The batch script, which started the step, runs on the first node.
        f"--master-addr={environment['SLURM_LAUNCH_NODE_IPADDR']}",
        # Jobs that share the first node must not meet on one port.
        f"--master-port={20_000 + int(environment['SLURM_JOB_ID']) % 10_000}",
        # SLURM may divide the GPUs unevenly.
        f"--nproc-per-node={'gpu' if gpus else 1}",
        "-m",
        *arguments,
    ]


if __name__ == "__main__":
    try:
        line = command(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:], os.environ)
    except LpovodError as error:
        sys.exit(f"error: {error}")
    os.execvp(line[0], line)
