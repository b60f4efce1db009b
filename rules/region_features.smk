# Stage region_features
# IN   the trained detector, images, proposals (and, for training regions, pseudo-labels)
# OUT  {split}.h5: all proposals of a split; retrieved/{novel}.h5: all regions in the images that
#      one novel class retrieved. Region stores with the columns feature (float16), embedding
#      (float16, unit rows) and refined (float32 xyxy)
# COST COCO: one pass over 5,000 images, 3 KB per region; at most K images per novel class


rule region_features:
    input:
        dataset=f"{RESULTS}/dataset/{{split}}.images.json",
        proposals=rules.proposals.output[0],
        detector=rules.base_detector.output.detector,
    output:
        f"{RESULTS}/region_features/{{split}}.h5",
    log:
        f"{RESULTS}/logs/region_features/{{split}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/region_features/{{split}}.tsv"
    conda:
        ENVIRONMENT
    threads: 2
    resources:
        mem_mb=grows(NETWORK, 2 * LISTED),
        runtime=grows(30, PASS),
        gpu=int(CONFIG.gpu),
    params:
        code=source("region_features"),
        device=DEVICE,
        backbone=block("backbone"),
        base_detector=block("base_detector"),
        settings=block("region_features"),
    message:
        "The frozen detector on the {wildcards.split} proposals"
    shell:
        "python -m workflow_scripts.region_features extract_split --dataset {input.dataset}"
        " --proposals {input.proposals} --detector {input.detector}"
        " --backbone {params.backbone:q} --base-detector {params.base_detector:q}"
        " --settings {params.settings:q} --output {output} --device {params.device} 2>&1 | tee {log}"


rule retrieved_region_features:
    input:
        dataset=f"{RESULTS}/dataset/train.images.json",
        proposals=f"{RESULTS}/proposals/train.h5",
        pseudo_labels=f"{RESULTS}/pseudo_labels/{{novel}}.json",
        detector=rules.base_detector.output.detector,
    output:
        f"{RESULTS}/region_features/retrieved/{{novel}}.h5",
    log:
        f"{RESULTS}/logs/region_features/retrieved/{{novel}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/region_features/retrieved/{{novel}}.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=grows(NETWORK, LISTED),
        runtime=grows(60),
        gpu=int(CONFIG.gpu),
    params:
        code=source("region_features"),
        device=DEVICE,
        backbone=block("backbone"),
        base_detector=block("base_detector"),
        settings=block("region_features"),
    message:
        "The frozen detector on the images that {wildcards.novel} retrieved"
    shell:
        "python -m workflow_scripts.region_features extract_retrieved --dataset {input.dataset}"
        " --proposals {input.proposals} --pseudo-labels {input.pseudo_labels}"
        " --detector {input.detector} --backbone {params.backbone:q}"
        " --base-detector {params.base_detector:q} --settings {params.settings:q}"
        " --output {output} --device {params.device} 2>&1 | tee {log}"
