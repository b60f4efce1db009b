# Stage region_index
# IN   region embeddings of the training images, all shards
# OUT  train.index: FAISS index, inner product; its ids are region keys (image id, place); boxes and
#      objectness
# COST 1,052 bytes per region at D = 512: vector 1,024, key 8, box and objectness 20


rule region_index:
    input:
        shards=shards("region_embeddings", "train"),
    output:
        f"{RESULTS}/region_index/train.index",
    log:
        f"{RESULTS}/logs/region_index.log",
    benchmark:
        f"{RESULTS}/benchmarks/region_index.tsv"
    conda:
        SEARCH_ENVIRONMENT
    threads: 2
    resources:
        mem_mb=grows(LIGHT, LISTED + SHARD_ROWS),
        runtime=grows(30, 0.001),
    params:
        code=source("region_index"),
        settings=block("region_index"),
    message:
        "FAISS index of the training regions"
    shell:
        "python -m workflow_scripts.region_index --shards {input.shards}"
        " --settings {params.settings:q} --output {output} 2>&1 | tee {log}"
