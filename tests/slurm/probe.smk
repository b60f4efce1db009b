# What jobs ask SLURM for, tried on jobs of seconds; run in a copy of the project.

import sys

sys.path.insert(0, os.getcwd())


configfile: "config.yaml"


include: f"{os.getcwd()}/rules/common.smk"
SOURCES = {}  # the images are drawn


include: f"{os.getcwd()}/rules/resources.smk"


rule all:
    default_target: True
    input:
        expand("probe/gpu_{n}", n=range(2)),
        "probe/memory",
        "probe/time",


# Each waits for the other, so that it ends only if both run at once.
rule gpu:
    output:
        "probe/gpu_{n}",
    resources:
        mem_mb=grows(1000),
        runtime=grows(10),
        gpu=1,
    shell:
        "touch {output}.started;"
        " until [ -e probe/gpu_0.started ] && [ -e probe/gpu_1.started ]; do sleep 0.2; done;"
        " echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES > {output}"


rule memory:
    output:
        "probe/memory",
    resources:
        mem_mb=grows(1200),
        runtime=grows(10),
    shell:
        "echo {resources.mem_mb} $SLURMD_NODENAME ${{CUDA_VISIBLE_DEVICES:-}} >> probe/memory.attempts;"
        " python -c 'import time; held = bytearray(1300 << 20); time.sleep(5)';"
        " cp probe/memory.attempts {output}"


rule time:
    output:
        "probe/time",
    params:
        script=f"{workflow.basedir}/slow_training.py",
    resources:
        mem_mb=grows(2000),
        runtime=grows(2),
    shell:
        "PYTHONPATH=. python {params.script} probe/time.checkpoint {output} 2>> probe/time.log"
