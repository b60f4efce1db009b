# Stage region_features
# IN   the trained detector, images, proposals (and, for training regions, pseudo-labels)
# OUT  {split}/{shard}.h5: region store of all proposals of a shard; retrieved/{shard}/: a file per image
#      that a novel class retrieved. Columns feature (float16), embedding (float16, unit rows) and refined
#      (float32 xyxy)
# COST COCO: one pass over 5,000 images, 3 KB per region; at most K images per novel class, once each;
#      images that the store holds are linked


rule region_features:
    input:
        dataset=f"{RESULTS}/dataset/{{split}}.images.json",
        proposals=f"{RESULTS}/proposals/{{split}}/{{shard}}.h5",
        detector=rules.base_detector.output.detector,
    output:
        f"{RESULTS}/region_features/{{split}}/{{shard}}.h5",
    log:
        f"{RESULTS}/logs/region_features/{{split}}/{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/region_features/{{split}}/{{shard}}.tsv"
    conda:
        ENVIRONMENT
    threads: max(2, FEEDING)
    resources:
        mem_mb=grows(NETWORK, LISTED),
        runtime=grows_in_shards(30, PASS),
        gpu=int(CONFIG.gpu),
    params:
        code=source("region_features"),
        device=DEVICE,
        backbone=block("backbone"),
        base_detector=block("base_detector"),
        settings=block("region_features"),
    message:
        "The frozen detector on the {wildcards.split} proposals, shard {wildcards.shard}"
    shell:
        "python -m workflow_scripts.region_features extract_split --dataset {input.dataset}"
        " --proposals {input.proposals} --detector {input.detector}"
        " --backbone {params.backbone:q} --base-detector {params.base_detector:q}"
        " --settings {params.settings:q} --output {output} --device {params.device}"
        " --threads {threads} 2>&1 | tee {log}"


rule retrieved_region_features:
    input:
        dataset=f"{RESULTS}/dataset/train.images.json",
        proposals=shards("proposals", "train"),
        pseudo_labels=rules.pseudo_labels.output,
        detector=rules.base_detector.output.detector,
    output:
        directory(f"{RESULTS}/region_features/retrieved/{{shard}}"),
    log:
        f"{RESULTS}/logs/region_features/retrieved/{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/region_features/retrieved/{{shard}}.tsv"
    conda:
        ENVIRONMENT
    threads: max(2, FEEDING)
    resources:
        mem_mb=grows(NETWORK, LISTED),
        runtime=grows(60, PASS / RETRIEVED_SHARDS),
        gpu=int(CONFIG.gpu),
    params:
        code=source("region_features"),
        device=DEVICE,
        backbone=block("backbone"),
        base_detector=block("base_detector"),
        settings=block("region_features"),
        shards=RETRIEVED_SHARDS,
        store=f"{STORE}/region_features",
    message:
        "The frozen detector on the retrieved images, shard {wildcards.shard}"
    shell:
        "python -m workflow_scripts.region_features extract_retrieved --dataset {input.dataset}"
        " --proposals {input.proposals} --pseudo-labels {input.pseudo_labels}"
        " --detector {input.detector} --backbone {params.backbone:q}"
        " --base-detector {params.base_detector:q} --settings {params.settings:q}"
        " --shard {wildcards.shard} --shards {params.shards} --output {output}"
        " --store {params.store} --code {params.code} --device {params.device}"
        " --threads {threads} 2>&1 | tee {log}"
