# Stage evaluation
# IN   region features of the split, base prototypes, novel weights, text embeddings; CLIP's own
#      embeddings of the same regions, for comparison
# OUT  metrics.json: AP50 in percent, with ablations; detections.json: COCO results;
#      ground_truth.json: the images and annotations that were measured;
#      in evaluation/ for the val images, in evaluation_tune/ for the tune images
# COST 33 s for 25,000 regions of 500 images and 17 variants, on two cores


rule evaluation:
    input:
        dataset=lambda wildcards: f"{RESULTS}/dataset/{evaluated(wildcards)}.json",
        features=lambda wildcards: shards("region_features", evaluated(wildcards)),
        embeddings=lambda wildcards: (
            shards("region_embeddings", evaluated(wildcards))
            if CONFIG.evaluation.clip_on_crops
            else []
        ),
        detector=rules.base_detector.output.detector,
        probe=rules.linear_probe.output,
        text=rules.text_embeddings.output,
    output:
        metrics=report(
            f"{RESULTS}/{{evaluation}}/metrics.json",
            category="Results",
            labels={"run": CONFIG.name, "what": "metrics ({evaluation})"},
            caption="../docs/captions/metrics.rst",
        ),
        detections=f"{RESULTS}/{{evaluation}}/detections.json",
        ground_truth=f"{RESULTS}/{{evaluation}}/ground_truth.json",
    log:
        f"{RESULTS}/logs/{{evaluation}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{evaluation}}.tsv"
    wildcard_constraints:
        evaluation="evaluation|evaluation_tune",
    conda:
        ENVIRONMENT
    threads: 2
    resources:
        mem_mb=grows(NETWORK, LISTED + REGION_ROWS + DETECTED, "val"),
        runtime=grows(60, PASS, "val"),
    params:
        code=source("evaluation"),
        settings=block("evaluation"),
    message:
        "AP50 of the method and of its ablations ({wildcards.evaluation})"
    shell:
        "python -m workflow_scripts.evaluation --dataset {input.dataset}"
        " --region-features {input.features} --detector {input.detector}"
        " --linear-probe {input.probe} --text-embeddings {input.text}"
        " --region-embeddings {input.embeddings} --settings {params.settings:q}"
        " --metrics {output.metrics} --detections {output.detections} --ground-truth {output.ground_truth}"
        " --workers {threads} 2>&1 | tee {log}"
