# The miniature world's CLIP, as shipped in resources/small_clip; not part of the default run.
# IN   nothing: crops are drawn
# OUT  architecture.json, weights.safetensors, vocabulary.txt.gz, record.json
# COST twelve minutes on two cores


rule small_clip:
    output:
        multiext(
            "results/small_clip/",
            "architecture.json",
            "weights.safetensors",
            "vocabulary.txt.gz",
            "record.json",
        ),
    log:
        "results/small_clip/train.log",
    benchmark:
        "results/small_clip/benchmark.tsv"
    conda:
        ENVIRONMENT
    threads: 8
    resources:
        mem_mb=grows(NETWORK),
        runtime=grows(120),
    params:
        code=source("small_clip"),
        settings=block("small_clip"),
        folder=subpath(output[0], parent=True),
    message:
        "Training the small CLIP on drawn crops and captions"
    shell:
        "python -m workflow_scripts.small_clip --output-dir {params.folder}"
        " --settings {params.settings:q} 2>&1 | tee {log}"
