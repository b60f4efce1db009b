"""Starts a module with one process per GPU, on one node or on several nodes of a SLURM job.

    python -m lpovod.launcher 1 4 workflow_scripts.base_detector --dataset ...

runs it under torch's launcher, on 1 node in 4 processes; for 0 or 1 process it runs without that
launcher. With several nodes, the second number counts the GPUs of all nodes together; the command
runs in the batch script of a SLURM job and starts itself once on each node.
"""

import os
import sys
from collections.abc import Mapping

from lpovod.devices import see_own_cards
from lpovod.exceptions import LpovodError


def command(
    nodes: int, gpus: int, arguments: list[str], environment: Mapping[str, str]
) -> list[str]:
    """The command line that runs a module in several processes.

    Args:
        nodes: number of nodes that take part.
        gpus: of all nodes together; with none, each node runs one process.
        arguments: the module's name and its arguments.
        environment: holds SLURM's variables of the job, and of the step that runs on a node.

    Raises:
        LpovodError: if several nodes are requested outside a SLURM job.
    """
    if nodes == 1 and gpus <= 1:
        return [sys.executable, "-m", *arguments]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    if nodes == 1:
        return [*torchrun, "--standalone", f"--nproc-per-node={gpus}", "-m", *arguments]
    if "SLURM_JOB_ID" not in environment:
        raise LpovodError(f"{nodes} nodes need a SLURM job; without one set training_nodes: 1")
    # A job may have more nodes than the step: the extra nodes would never join the rendezvous.
    if environment.get("SLURM_STEP_NUM_NODES") != str(nodes):
        # A surviving rank would wait for the others, holding its GPUs, until the job's time limit.
        step = ["srun", f"--nodes={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit"]
        # Its processes may use all of the job's processors on their node.
        launcher = [sys.executable, "-m", "lpovod.launcher", str(nodes), str(gpus)]
        return [*step, "--cpu-bind=none", *launcher, *arguments]
    return [
        *torchrun,
        f"--nnodes={nodes}",
        f"--node-rank={environment['SLURM_NODEID']}",
        # The batch script, which started the step, runs on the first node.
        f"--master-addr={environment['SLURM_LAUNCH_NODE_IPADDR']}",
        # Jobs that share the first node must not use the same port.
        f"--master-port={20_000 + int(environment['SLURM_JOB_ID']) % 10_000}",
        # SLURM may divide the GPUs unevenly.
        f"--nproc-per-node={'gpu' if gpus else 1}",
        "-m",
        *arguments,
    ]


if __name__ == "__main__":
    try:
        nodes, gpus = int(sys.argv[1]), int(sys.argv[2])
        line = command(nodes, gpus, sys.argv[3:], os.environ)
        if nodes == 1 and gpus > 1:  # ranks that chose for themselves might choose one card twice
            see_own_cards(gpus)
    except LpovodError as error:
        sys.exit(f"error: {error}")
    os.execvp(line[0], line)
