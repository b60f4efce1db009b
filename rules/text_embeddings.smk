# Stage text_embeddings
# IN   class names, CLIP (or, with text_embeddings.file, rows from another project)
# OUT  safetensors: a unit vector (D,) float32 per class, keyed by name; base and novel classes
# COST seconds; only names that the store lacks are embedded


rule text_embeddings:
    input:
        clip=ancient(CLIP_FILES),
        file=given(CONFIG.text_embeddings.file),
        classes=given(CONFIG.text_embeddings.classes),
    output:
        base=f"{RESULTS}/text_embeddings/base.safetensors",
        novel=f"{RESULTS}/text_embeddings/novel.safetensors",
    log:
        f"{RESULTS}/logs/text_embeddings.log",
    benchmark:
        f"{RESULTS}/benchmarks/text_embeddings.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=grows(NETWORK),
        runtime=grows(30),
    params:
        code=source("text_embeddings"),
        classes=block("classes"),
        clip=block("clip"),
        clip_files=CLIP_DIGESTS,
        settings=block("text_embeddings"),
        store=f"{STORE}/text_embeddings",
    message:
        "Text embeddings of the classes"
    shell:
        "python -m workflow_scripts.text_embeddings --classes {params.classes:q}"
        " --clip {params.clip:q} --settings {params.settings:q} --base {output.base}"
        " --novel {output.novel} --store {params.store} --code {params.code} 2>&1 | tee {log}"
