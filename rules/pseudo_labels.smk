# Stage pseudo_labels
# IN   text embeddings of the classes, index and shards of the training regions
# OUT  novel.json: COCO json, a category per class, annotations with score (objectness) and cosine
# COST one pass over the index for all classes that the store lacks


rule pseudo_labels:
    input:
        text=rules.text_embeddings.output.novel,
        base=rules.text_embeddings.output.base,
        index=rules.region_index.output,
        shards=shards("region_embeddings", "train"),
        dataset=f"{RESULTS}/dataset/train.images.json",
    output:
        f"{RESULTS}/pseudo_labels/novel.json",
    log:
        f"{RESULTS}/logs/pseudo_labels.log",
    benchmark:
        f"{RESULTS}/benchmarks/pseudo_labels.tsv"
    conda:
        SEARCH_ENVIRONMENT
    threads: 2
    resources:
        mem_mb=grows(LIGHT + RETRIEVED, LISTED + REGION_ROWS),
        runtime=grows(30, 0.0003),
    params:
        code=source("pseudo_labels"),
        names=CONFIG.classes.novel,
        settings=block("pseudo_labels"),
        store=f"{STORE}/pseudo_labels",
    message:
        "Retrieving regions of the novel classes"
    shell:
        # The stage's own threads share the regions; BLAS would start as many again in each.
        "OMP_NUM_THREADS=1 python -m workflow_scripts.pseudo_labels --names {params.names:q}"
        " --text-embeddings {input.text} --base-text-embeddings {input.base}"
        " --index {input.index} --shards {input.shards} --dataset {input.dataset}"
        " --settings {params.settings:q} --output {output} --store {params.store}"
        " --code {params.code} --threads {threads} 2>&1 | tee {log}"
