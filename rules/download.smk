# Stage download: the missing parts of COCO 2017, and published files that are missing: CLIP, backbones,
# and what LP-OVOD's authors release (lpovod/catalogue.py)
# IN   nothing
# OUT  COCO's images and annotations, below dataset.coco.root (undeclared: Snakemake removes the
#      outputs of a rule before running it, and the folder may belong to the user); a record of each
#      archive; the files, under the paths that the configuration names; resources/published.json:
#      size and digest of first downloads, where nobody publishes them
# COST COCO: 20.4 GB to download, as much again on disk while an archive is extracted; CLIP 354 MB,
#      torchvision's backbone 103 MB; the sizes of LP-OVOD's files are not published

COCO_DOWNLOADS = []
if CONFIG.dataset.source == "coco" and CONFIG.dataset.coco.download:
    COCO_DOWNLOADS = [f"{RESULTS}/download/{archive}.json" for archive in needed_archives()]


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
        digest=lambda wildcards: given_digest(wildcards.archive),
    message:
        "COCO's {wildcards.archive}, unless its content is in {params.root}"
    shell:
        "python -m workflow_scripts.download download_coco --archive {wildcards.archive}"
        " --root {params.root:q} --record {output} {params.digest} 2>&1 | tee {log}"


# An existing file is never an output: Snakemake might remove it, and it may belong to the user.
MISSING = sorted({path for path in CONFIG.files() if not path.is_file()})
EXTRACTED = [path for path in MISSING if path.name in MEMBERS]
ARCHIVES = sorted({path.with_name(MEMBERS[path.name]) for path in EXTRACTED})
DOWNLOADED = [path for path in MISSING if path.name in FILES]

for path in DOWNLOADED + [path for path in ARCHIVES if not path.is_file()]:

    rule:
        name:
            f"download_{slug(str(path))}"
        output:
            temp(str(path)) if path in ARCHIVES else str(path),
        log:
            f"{RESULTS}/logs/download/{slug(str(path))}.log",
        benchmark:
            f"{RESULTS}/benchmarks/download/{slug(str(path))}.tsv"
        localrule: True
        conda:
            "../envs/light.yaml"
        threads: 1
        resources:
            mem_mb=grows(1000),
            runtime=grows(1440),
        params:
            records=str(RECORDS),
            digest=given_digest(path.name),
        message:
            f"Download of {{output}} from {FILES[path.name].url}"
        shell:
            "python -m workflow_scripts.download download_file --output {output:q}"
            " --records {params.records} {params.digest} 2>&1 | tee {log}"


for path in EXTRACTED:

    rule:
        name:
            f"extract_{slug(str(path))}"
        input:
            str(path.with_name(MEMBERS[path.name])),
        output:
            str(path),
        log:
            f"{RESULTS}/logs/download/{slug(str(path))}.log",
        benchmark:
            f"{RESULTS}/benchmarks/download/{slug(str(path))}.tsv"
        localrule: True
        conda:
            "../envs/light.yaml"
        threads: 1
        resources:
            mem_mb=grows(1000),
            runtime=grows(60),
        message:
            "{output} of {input}"
        shell:
            "python -m workflow_scripts.download extract_member --archive {input:q}"
            " --output {output:q} 2>&1 | tee {log}"
