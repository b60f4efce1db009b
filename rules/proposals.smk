# Stage proposals
# IN   the trained proposal network, a split
# OUT  {split}/{shard}.h5: region store of box and objectness, best first
# COST COCO: one pass over 123k images, divided over the shards; 3.5 GB for 1,500 boxes per image


rule proposals:
    input:
        dataset=f"{RESULTS}/dataset/{{split}}.images.json",
        network=rules.proposal_network.output.network,
    output:
        f"{RESULTS}/proposals/{{split}}/{{shard}}.h5",
    log:
        f"{RESULTS}/logs/proposals/{{split}}/{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/proposals/{{split}}/{{shard}}.tsv"
    conda:
        ENVIRONMENT
    threads: FEEDING
    resources:
        mem_mb=grows(NETWORK, LISTED),
        runtime=grows_in_shards(30, PASS),
        gpu=int(CONFIG.gpu),
    params:
        code=source("proposals"),
        device=DEVICE,
        backbone=block("backbone"),
        settings=block("proposals"),
        shards=lambda wildcards: shard_count(wildcards.split),
    message:
        "Proposals of the {wildcards.split} images, shard {wildcards.shard}"
    shell:
        "python -m workflow_scripts.proposals --dataset {input.dataset}"
        " --network {input.network} --backbone {params.backbone:q} --settings {params.settings:q}"
        " --shard {wildcards.shard} --shards {params.shards} --output {output}"
        " --device {params.device} --threads {threads} 2>&1 | tee {log}"
