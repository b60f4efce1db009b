# Stage base_detector
# IN   train.json, region embeddings of its images, and the start: the proposal network (backbone
#      and pyramid), or backbone.weights
# OUT  detector.safetensors, history.jsonl
# COST COCO: 20 epochs of 118k images, 16 per step (lpovod plan)


rule base_detector:
    input:
        dataset=f"{RESULTS}/dataset/train.json",
        shards=shards("region_embeddings", "train"),
        network=ancient(START_FILES) or rules.proposal_network.output.network,
    output:
        detector=f"{RESULTS}/base_detector/detector.safetensors",
        history=f"{RESULTS}/base_detector/history.jsonl",
    log:
        f"{RESULTS}/logs/base_detector.log",
    benchmark:
        f"{RESULTS}/benchmarks/base_detector.tsv"
    conda:
        ENVIRONMENT
    threads: training_threads(CONFIG.base_detector.training)
    resources:
        **training_resources(CONFIG.base_detector.training, LISTED + SHARD_ROWS),
    params:
        code=source("base_detector"),
        seed=CONFIG.seed,
        device=DEVICE,
        backbone=block("backbone"),
        weights=START_DIGESTS,
        settings=block("base_detector"),
        checkpoint=subpath(output.detector, with_suffix=".checkpoint"),
    message:
        "Training the detector on base classes, with distillation"
    shell:
        "python -m lpovod.launcher {resources.nodes} {resources.gpu}"
        " workflow_scripts.base_detector --dataset {input.dataset}"
        " --region-embeddings {input.shards} --network {input.network}"
        " --backbone {params.backbone:q} --settings {params.settings:q} --seed {params.seed}"
        " --checkpoint {params.checkpoint} --code {params.code} --detector {output.detector}"
        " --history {output.history} --device {params.device} --threads {threads}"
        " --workers {resources.workers} --images-at-once {resources.images_at_once}"
        " 2>&1 | tee {log}"
