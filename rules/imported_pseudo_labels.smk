# Stage pseudo_labels, read from one file for all classes instead of retrieval (pseudo_labels.file).
# IN   the file, train.json
# OUT  {novel}.json: COCO json, annotations with score (objectness) and cosine
# COST seconds


rule pseudo_labels:
    input:
        file=CONFIG.pseudo_labels.file,
        dataset=f"{RESULTS}/dataset/train.images.json",
    output:
        f"{RESULTS}/pseudo_labels/{{novel}}.json",
    log:
        f"{RESULTS}/logs/pseudo_labels/{{novel}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/pseudo_labels/{{novel}}.tsv"
    conda:
        "../envs/light.yaml"
    threads: 1
    resources:
        mem_mb=grows(2000),
        runtime=grows(30),
    params:
        code=source("imported_pseudo_labels"),
        name=lambda wildcards: NOVEL[wildcards.novel],
        settings=block("pseudo_labels"),
    message:
        "Pseudo-labels of {wildcards.novel}, from {input.file}"
    shell:
        "python -m workflow_scripts.imported_pseudo_labels --name {params.name:q}"
        " --file {input.file} --dataset {input.dataset} --settings {params.settings:q}"
        " --output {output} 2>&1 | tee {log}"
