# Stage linear_probe, read from a fine-tuned checkpoint of the same detector
# (linear_probe.checkpoint).
# IN   the checkpoint, the detector; dataset, for the order of classes
# OUT  weights.safetensors: (dimension,) float32 per novel class, keyed by name
# COST seconds


rule linear_probe:
    input:
        dataset=f"{RESULTS}/dataset/train_all_classes.json",
        checkpoint=CONFIG.linear_probe.checkpoint,
        detector=rules.base_detector.output.detector,
    output:
        f"{RESULTS}/linear_probe/weights.safetensors",
    log:
        f"{RESULTS}/logs/linear_probe.log",
    benchmark:
        f"{RESULTS}/benchmarks/linear_probe.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=grows(4000),
        runtime=grows(30),
    params:
        code=source("imported_linear_probe"),
        novel=CONFIG.classes.novel,
        settings=block("linear_probe"),
    message:
        "The novel classes' weights of {input.checkpoint}"
    shell:
        "python -m workflow_scripts.imported_linear_probe --dataset {input.dataset}"
        " --checkpoint {input.checkpoint} --detector {input.detector} --novel {params.novel:q}"
        " --settings {params.settings:q} --output {output} 2>&1 | tee {log}"
