# Stage pseudo_labels
# IN   text embeddings of one novel class and of the base classes, index and shards of the
#      training regions
# OUT  {novel}.json: COCO json, annotations with score (objectness) and cosine
# COST one pass over the index


rule pseudo_labels:
    input:
        text_embedding=f"{RESULTS}/text_embeddings/novel/{{novel}}.safetensors",
        base=f"{RESULTS}/text_embeddings/base.safetensors",
        index=rules.region_index.output,
        shards=shards("train"),
        dataset=f"{RESULTS}/dataset/train.images.json",
    output:
        f"{RESULTS}/pseudo_labels/{{novel}}.json",
    log:
        f"{RESULTS}/logs/pseudo_labels/{{novel}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/pseudo_labels/{{novel}}.tsv"
    conda:
        "../envs/light.yaml"
    threads: 1
    resources:
        mem_mb=grows(LIGHT, 2 * LISTED),
        runtime=grows(30, 0.0003),
    params:
        code=source("pseudo_labels"),
        name=lambda wildcards: NOVEL[wildcards.novel],
        settings=block("pseudo_labels"),
    message:
        "Retrieving regions of {wildcards.novel}"
    shell:
        "python -m workflow_scripts.pseudo_labels --name {params.name:q}"
        " --text-embeddings {input.text_embedding} --base-text-embeddings {input.base}"
        " --index {input.index} --shards {input.shards} --dataset {input.dataset}"
        " --settings {params.settings:q} --output {output} 2>&1 | tee {log}"
