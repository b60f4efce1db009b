# Stage dataset
# IN   nothing (miniature), or COCO json and images on disk or downloaded (coco)
# OUT  train.json: base annotations only; val.json and, miniature only, tune.json: all classes;
#      train_all_classes.json: to judge retrieved regions in the report, never for training;
#      images/: a folder, or a link to one, per split
# COST seconds; images on disk are linked, not copied


rule dataset:
    input:
        downloads=ancient(COCO_DOWNLOADS),
    output:
        splits=expand(f"{RESULTS}/dataset/{{split}}.json", split=SPLITS),
        truth=f"{RESULTS}/dataset/train_all_classes.json",
        images=directory(f"{RESULTS}/dataset/images"),
    log:
        f"{RESULTS}/logs/dataset.log",
    benchmark:
        f"{RESULTS}/benchmarks/dataset.tsv"
    conda:
        "../envs/light.yaml"
    threads: 1
    resources:
        mem_mb=grows(LIGHT, 0.04),
        runtime=grows(30, 0.001),
    params:
        code=source("dataset"),
        seed=CONFIG.seed,
        settings=block("dataset"),
        base=CONFIG.classes.base,
        folder=subpath(output.truth, parent=True),
    message:
        "Images and annotations of every split ({CONFIG.dataset.source})"
    shell:
        "python -m workflow_scripts.dataset --output {params.folder} --seed {params.seed}"
        " --settings {params.settings:q} --base {params.base:q} 2>&1 | tee {log}"
