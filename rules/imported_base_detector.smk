# Stage base_detector, read from the original's checkpoint (base_detector.checkpoint).
# IN   the checkpoint; dataset, for the order of classes
# OUT  detector.safetensors; history.jsonl, empty
# COST seconds


rule base_detector:
    input:
        dataset=f"{RESULTS}/dataset/train_all_classes.json",
        checkpoint=CONFIG.base_detector.checkpoint,
    output:
        detector=f"{RESULTS}/base_detector/detector.safetensors",
        history=f"{RESULTS}/base_detector/history.jsonl",
    log:
        f"{RESULTS}/logs/base_detector.log",
    benchmark:
        f"{RESULTS}/benchmarks/base_detector.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=grows(4000),
        runtime=grows(30),
    params:
        code=source("imported_base_detector"),
        base=CONFIG.classes.base,
        backbone=block("backbone"),
        settings=block("base_detector"),
    message:
        "The detector of {input.checkpoint}"
    shell:
        "python -m workflow_scripts.imported_base_detector --dataset {input.dataset}"
        " --checkpoint {input.checkpoint} --base {params.base:q} --backbone {params.backbone:q}"
        " --settings {params.settings:q} --detector {output.detector}"
        " --history {output.history} 2>&1 | tee {log}"
