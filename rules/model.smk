# Stage model
# IN   proposal network, detector, novel weights, text embeddings
# OUT  model.safetensors: everything that detects, in one file
# COST seconds

import json

from lpovod.sources import category_ids

# What neither detection nor learning a class needs; it would make the file stale.
UNNEEDED = dict.fromkeys(
    (
        "dataset",
        "region_index",
        "report",
        "shards",
        "small_clip",
        "training_gpus",
        "training_nodes",
    ),
    True,
)
UNNEEDED["evaluation"] = {"protocol", "clip_on_crops"}


rule model:
    input:
        network=rules.proposal_network.output.network,
        detector=rules.base_detector.output.detector,
        probe=rules.linear_probe.output,
        text=rules.text_embeddings.output,
    output:
        f"{RESULTS}/model/model.safetensors",
    log:
        f"{RESULTS}/logs/model.log",
    benchmark:
        f"{RESULTS}/benchmarks/model.tsv"
    conda:
        "../envs/light.yaml"
    threads: 1
    resources:
        mem_mb=grows(LIGHT, LISTED),
        runtime=grows(30),
    params:
        code=source("model"),
        run=CONFIG.model_dump_json(exclude=UNNEEDED),
        categories=json.dumps(category_ids(CONFIG, SOURCES), sort_keys=True),
    message:
        "One file that detects"
    shell:
        "python -m workflow_scripts.model --run {params.run:q} --categories {params.categories:q}"
        " --network {input.network} --detector {input.detector} --linear-probe {input.probe}"
        " --text-embeddings {input.text} --output {output} 2>&1 | tee {log}"
