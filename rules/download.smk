# Stage download: the missing parts of COCO 2017 and of CLIP's weights
# IN   nothing
# OUT  COCO's images and annotations, below dataset.coco.root (undeclared: Snakemake removes the
#      outputs of a rule before running it, and the folder may belong to the user); a record of each
#      archive; CLIP's weights
# COST COCO: 20.4 GB to download, as much again on disk while an archive is extracted

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
if CONFIG.clip.weights and not CONFIG.clip.weights.is_file():

    rule download_weights:
        output:
            str(CONFIG.clip.weights),
        log:
            f"{RESULTS}/logs/download_weights.log",
        benchmark:
            f"{RESULTS}/benchmarks/download_weights.tsv"
        localrule: True
        conda:
            "../envs/light.yaml"
        threads: 1
        resources:
            mem_mb=grows(1000),
            runtime=grows(240),
        message:
            "CLIP's weights"
        shell:
            "python -m workflow_scripts.download download_weights --output {output} 2>&1 | tee {log}"
