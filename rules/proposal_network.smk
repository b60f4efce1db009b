# Stage proposal_network
# IN   train.json, backbone.weights if given
# OUT  network.safetensors, history.jsonl: the proposal network, learned from base annotations
# COST COCO: 8 epochs of 118k images (lpovod plan)


rule proposal_network:
    input:
        dataset=f"{RESULTS}/dataset/train.json",
        weights=ancient(START_FILES),
    output:
        network=f"{RESULTS}/proposals/network.safetensors",
        history=f"{RESULTS}/proposals/history.jsonl",
    log:
        f"{RESULTS}/logs/proposal_network.log",
    benchmark:
        f"{RESULTS}/benchmarks/proposal_network.tsv"
    conda:
        ENVIRONMENT
    threads: training_threads(CONFIG.proposals.training)
    resources:
        **training_resources(CONFIG.proposals.training, LISTED),
    params:
        code=source("proposal_network"),
        seed=CONFIG.seed,
        device=DEVICE,
        backbone=block("backbone"),
        weights=START_DIGESTS,
        settings=CONFIG.proposals.model_dump_json(include=CONFIG.proposals.LEARNED),
        checkpoint=subpath(output.network, with_suffix=".checkpoint"),
    message:
        "Training the proposal network on base annotations"
    shell:
        "python -m lpovod.launcher {resources.nodes} {resources.gpu}"
        " workflow_scripts.proposal_network"
        " --dataset {input.dataset}"
        " --backbone {params.backbone:q} --settings {params.settings:q} --seed {params.seed}"
        " --checkpoint {params.checkpoint} --code {params.code} --network {output.network}"
        " --history {output.history} --device {params.device} --threads {threads}"
        " --workers {resources.workers} --images-at-once {resources.images_at_once}"
        " 2>&1 | tee {log}"
