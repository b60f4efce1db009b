# Stage proposals
# IN   dataset, backbone.weights if given
# OUT  network.safetensors, history.jsonl: the proposal network, learned from base annotations;
#      {split}.h5: region store of box and objectness, best first; {split}.recall.json
# COST COCO: 8 epochs of 118k images (python -m lpovod.plan); 3.5 GB for 1,500 boxes per image


rule proposal_network:
    input:
        script="workflow_scripts/proposals.py",
        code=code(
            *("proposals", "backbone", "timm_backbone", "boxes", "images"),
            *("training", "schedule", "distributed"),
            *START_CODE,
        ),
        dataset=f"{RESULTS}/dataset/train.json",
        images=rules.dataset.output.images,
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
    threads: TRAINING_THREADS
    resources:
        **TRAINING_ON,
        mem_mb=grows(NETWORK, LISTED),
        runtime=grows(60, CONFIG.proposals.training.epochs * EPOCH),
    params:
        seed=CONFIG.seed,
        device=DEVICE,
        backbone=block("backbone"),
        weights=START_DIGESTS,
        settings=block("proposals"),
        state=subpath(output.network, with_suffix=".resume"),
    message:
        "Training the proposal network on base annotations"
    shell:
        "python -m lpovod.launcher {resources.nodes} {resources.gpu}"
        " workflow_scripts.proposals train_proposals"
        " --dataset {input.dataset}"
        " --backbone {params.backbone:q} --settings {params.settings:q} --seed {params.seed}"
        " --state {params.state} --code {input.script} {input.code} --network {output.network}"
        " --history {output.history} --device {params.device} 2>&1 | tee {log}"


rule proposals:
    input:
        script="workflow_scripts/proposals.py",
        code=code("proposals", "backbone", "timm_backbone", "boxes", "images"),
        dataset=f"{RESULTS}/dataset/{{split}}.json",
        images=rules.dataset.output.images,
        network=rules.proposal_network.output.network,
    output:
        proposals=f"{RESULTS}/proposals/{{split}}.h5",
        recall=f"{RESULTS}/proposals/{{split}}.recall.json",
    log:
        f"{RESULTS}/logs/proposals/{{split}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/proposals/{{split}}.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=grows(NETWORK, 2 * LISTED),
        runtime=grows(30, PASS),
        gpu=int(CONFIG.gpu),
    params:
        device=DEVICE,
        backbone=block("backbone"),
        settings=block("proposals"),
    message:
        "Proposals of the {wildcards.split} images"
    shell:
        "python -m workflow_scripts.proposals propose --dataset {input.dataset}"
        " --network {input.network} --backbone {params.backbone:q} --settings {params.settings:q}"
        " --output {output.proposals} --recall {output.recall} --device {params.device} 2>&1 | tee {log}"
