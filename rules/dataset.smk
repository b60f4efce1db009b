# Stage dataset
# IN   nothing (miniature), or the user's images and COCO json (coco), compared by content
# OUT  {split}.images.json: the images, what most stages need;
#      train.json: with base annotations only; val.json and, miniature only, tune.json: with all;
#      train_all_classes.json: to judge retrieved regions in the report, never for training
# COST seconds; images on disk are neither copied nor linked

if CONFIG.dataset.source == "miniature":

    rule dataset:
        output:
            images=f"{DATASET}/{{split}}.images.json",
            annotations=f"{DATASET}/drawn/{{split}}.json",
            folder=directory(f"{DATASET}/images/{{split}}"),
        log:
            f"{RESULTS}/logs/dataset/{{split}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/dataset/{{split}}.tsv"
        conda:
            "../envs/light.yaml"
        threads: 1
        resources:
            mem_mb=grows(LIGHT, 0.04),
            runtime=grows(30, 0.001),
        params:
            code=source("dataset"),
            seed=CONFIG.seed,
            settings=lambda wildcards: miniature_of(wildcards.split),
        message:
            "Drawing the {wildcards.split} images of the miniature world"
        shell:
            "python -m workflow_scripts.dataset draw --split {wildcards.split}"
            " --settings {params.settings:q} --seed {params.seed} --folder {output.folder}"
            " --images {output.images} --annotations {output.annotations} 2>&1 | tee {log}"

else:

    rule dataset:
        input:
            downloads=ancient(COCO_DOWNLOADS),
        output:
            images=f"{DATASET}/{{split}}.images.json",
        log:
            f"{RESULTS}/logs/dataset/{{split}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/dataset/{{split}}.tsv"
        conda:
            "../envs/light.yaml"
        threads: 1
        resources:
            mem_mb=grows(LIGHT, 0.04),
            runtime=grows(30, 0.001),
        params:
            code=source("dataset"),
            folder=lambda wildcards: str(DATA.images(wildcards.split)),
            annotations=lambda wildcards: str(DATA.annotations(wildcards.split)),
            bad_images=CONFIG.dataset.bad_images,
            digest=lambda wildcards: SOURCES.get(wildcards.split, PUBLISHED).images,
            # What it says follows from the data and bad_images.
            check=option("--check", CHECK if SOURCES else ""),
        message:
            "The {wildcards.split} images"
        shell:
            "python -m workflow_scripts.dataset list_images --split {wildcards.split}"
            " --folder {params.folder:q} --annotations {params.annotations:q}"
            " --digest {params.digest} {params.check}"
            " --output {output.images} 2>&1 | tee {log}"


rule annotations:
    input:
        images=lambda wildcards: f"{DATASET}/{split_of(wildcards.annotations)}.images.json",
        drawn=lambda wildcards: drawn(split_of(wildcards.annotations)),
    output:
        f"{DATASET}/{{annotations}}.json",
    log:
        f"{RESULTS}/logs/annotations/{{annotations}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/annotations/{{annotations}}.tsv"
    wildcard_constraints:
        annotations="train|train_all_classes|val|tune",
    conda:
        "../envs/light.yaml"
    threads: 1
    resources:
        mem_mb=grows(LIGHT, 0.04),
        runtime=grows(30, 0.001),
    params:
        code=source("dataset"),
        file=lambda wildcards: annotations_of(split_of(wildcards.annotations)),
        # The user's file is no input: its content counts, not the time of its last change.
        digest=lambda wildcards: digest_of_annotations(wildcards.annotations),
        base=lambda wildcards: base_options(wildcards.annotations),
    message:
        "The annotations of {wildcards.annotations}"
    shell:
        "python -m workflow_scripts.dataset annotate --images {input.images}"
        " --annotations {params.file:q} {params.base} --output {output} 2>&1 | tee {log}"
