# Stage region_embeddings
# IN   dataset, proposals, CLIP
# OUT  {split}/{shard}.h5: region store with the column embedding (n, D) float16, unit rows
# COST 1,044 bytes per region at D = 512 (vector 1,024, box and objectness 20) and 24 per image;
#      COCO train with 300 regions per image: 37 GB, and as much again while a shard is unfinished


rule region_embeddings:
    input:
        clip=ancient(CLIP_FILES),
        dataset=f"{RESULTS}/dataset/{{split}}.images.json",
        proposals=rules.proposals.output[0],
    output:
        f"{RESULTS}/region_embeddings/{{split}}/{{shard}}.h5",
    log:
        f"{RESULTS}/logs/region_embeddings/{{split}}/{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/region_embeddings/{{split}}/{{shard}}.tsv"
    conda:
        ENVIRONMENT
    threads: FEEDING
    resources:
        mem_mb=grows(NETWORK, LISTED),
        runtime=grows(30, EMBEDDING),
        gpu=int(CONFIG.gpu),
    params:
        code=source("region_embeddings"),
        device=DEVICE,
        clip=block("clip"),
        clip_files=CLIP_DIGESTS,
        settings=block("region_embeddings"),
        checkpoint=subpath(output[0], with_suffix=".checkpoint"),
    message:
        "CLIP on the {wildcards.split} proposals, shard {wildcards.shard}"
    shell:
        "python -m workflow_scripts.region_embeddings --dataset {input.dataset}"
        " --proposals {input.proposals} --clip {params.clip:q} --settings {params.settings:q}"
        " --shard {wildcards.shard} --checkpoint {params.checkpoint} --code {params.code}"
        " --output {output} --device {params.device} --threads {threads}"
        " 2>&1 | tee {log}"
