# Stage model
# IN   proposal network, detector, novel weights, text embeddings
# OUT  model.safetensors: everything that detects, in one file
# COST seconds


rule model:
    input:
        dataset=f"{RESULTS}/dataset/{'val' if 'val' in SPLITS else 'train'}.json",
        network=rules.proposal_network.output.network,
        detector=rules.base_detector.output.detector,
        probe=rules.linear_probe.output,
        text=rules.text_embeddings.output,
    output:
        f"{RESULTS}/model/model.safetensors",
    log:
        f"{RESULTS}/logs/model.log",
    conda:
        "../envs/light.yaml"
    threads: 1
    resources:
        mem_mb=grows(LIGHT, LISTED, "val"),
        runtime=grows(30),
    params:
        code=source("model"),
        run=CONFIG.model_dump_json(exclude={"small_clip", "report"}),
    message:
        "One file that detects"
    shell:
        "python -m workflow_scripts.model --run {params.run:q} --dataset {input.dataset}"
        " --network {input.network} --detector {input.detector} --linear-probe {input.probe}"
        " --text-embeddings {input.text} --output {output} 2>&1 | tee {log}"
