# Stage download: the missing parts of COCO 2017, of CLIP's weights and of the backbone's
# IN   nothing
# OUT  COCO's images and annotations, below dataset.coco.root (undeclared: Snakemake removes the
#      outputs of a rule before running it, and the folder may belong to the user); a record of each
#      archive; the weights
# COST COCO: 20.4 GB to download, as much again on disk while an archive is extracted; CLIP 354 MB,
#      the backbone 103 MB

COCO_DOWNLOADS = []
if CONFIG.dataset.source == "coco" and CONFIG.dataset.coco.download:
    COCO_DOWNLOADS = [f"{RESULTS}/download/{archive}.json" for archive in COCO]


rule download:
    output:
        f"{RESULTS}/download/{{archive}}.json",
    log:
        f"{RESULTS}/logs/download/{{archive}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/download/{{archive}}.tsv"
    wildcard_constraints:
        archive="|".join(COCO),
    # Compute nodes often have no internet access.
    localrule: True
    conda:
        "../envs/light.yaml"
    threads: 1
    resources:
        mem_mb=grows(1000),
        runtime=grows(1440),
    params:
        root=str(CONFIG.dataset.coco.root),
        digest=lambda wildcards: COCO[wildcards.archive].digest,
    message:
        "COCO's {wildcards.archive}, unless its content is in {params.root}"
    shell:
        "python -m workflow_scripts.download download_coco --archive {wildcards.archive}"
        " --root {params.root:q} --record {output} 2>&1 | tee {log}"


# Existing weights are never an output: they may belong to the user.
for rule_name, path in {
    "download_weights": CONFIG.clip.weights,
    "download_backbone": CONFIG.backbone.weights,
}.items():
    if path and not path.is_file():

        rule:
            name:
                rule_name
            output:
                str(path),
            log:
                f"{RESULTS}/logs/{rule_name}.log",
            benchmark:
                f"{RESULTS}/benchmarks/{rule_name}.tsv"
            localrule: True
            conda:
                "../envs/light.yaml"
            threads: 1
            resources:
                mem_mb=grows(1000),
                runtime=grows(240),
            message:
                "Published weights: {output}"
            shell:
                "python -m workflow_scripts.download download_weights --output {output}"
                " 2>&1 | tee {log}"
