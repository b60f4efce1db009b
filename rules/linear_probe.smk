# Stage linear_probe
# IN   pseudo-labels of the novel classes, features of all regions in their images
# OUT  weights.safetensors: (dimension,) float32 per novel class, keyed by name
# COST seconds


rule linear_probe:
    input:
        pseudo_labels=rules.pseudo_labels.output,
        features=expand(rules.retrieved_region_features.output, shard=range(RETRIEVED_SHARDS)),
    output:
        f"{RESULTS}/linear_probe/weights.safetensors",
    log:
        f"{RESULTS}/logs/linear_probe.log",
    benchmark:
        f"{RESULTS}/benchmarks/linear_probe.tsv"
    conda:
        "../envs/light.yaml"
    threads: 1
    resources:
        mem_mb=grows(LIGHT + CANDIDATES),
        runtime=grows(60),
    params:
        code=source("linear_probe"),
        seed=CONFIG.seed,
        settings=block("linear_probe"),
    message:
        "Training the novel classes' weights on frozen features"
    shell:
        "python -m workflow_scripts.linear_probe --pseudo-labels {input.pseudo_labels}"
        " --region-features {input.features} --settings {params.settings:q} --seed {params.seed}"
        " --output {output} 2>&1 | tee {log}"
