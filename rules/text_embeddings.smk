# Stage text_embeddings
# IN   class names, CLIP (or, with text_embeddings.file, rows from another project)
# OUT  safetensors: a unit vector (D,) float32 per class, keyed by name;
#      one file for the base classes, one per novel class
# COST seconds


rule text_embeddings:
    input:
        clip=ancient(CLIP_FILES),
        file=given(CONFIG.text_embeddings.file),
        classes=given(CONFIG.text_embeddings.classes),
    output:
        f"{RESULTS}/text_embeddings/{{classes}}.safetensors",
    log:
        f"{RESULTS}/logs/text_embeddings/{{classes}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/text_embeddings/{{classes}}.tsv"
    wildcard_constraints:
        classes="base|novel/[a-z0-9_]+",
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=grows(NETWORK),
        runtime=grows(30),
    params:
        code=source("text_embeddings"),
        names=names_of,
        prompts=prompts_of,
        clip=block("clip"),
        clip_files=CLIP_DIGESTS,
        settings=block("text_embeddings"),
    message:
        "Text embeddings of {wildcards.classes}"
    shell:
        "python -m workflow_scripts.text_embeddings --names {params.names:q}"
        " {params.prompts} --clip {params.clip:q} --settings {params.settings:q} --output {output} 2>&1 | tee {log}"
