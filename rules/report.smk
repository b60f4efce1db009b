# Stage report
# IN   metrics, detections, histories, pseudo-labels, annotations, stage times
# OUT  report.html: one file that opens offline
# COST seconds


rule report:
    input:
        template="lpovod/stages/report/template.html.jinja",
        metrics=f"{RESULTS}/evaluation/metrics.json",
        detections=f"{RESULTS}/evaluation/detections.json",
        val=f"{RESULTS}/dataset/val.json",
        train=f"{RESULTS}/dataset/train.images.json",
        truth=f"{DATASET}/train_all_classes.json",
        pseudo_labels=(
            []
            if CONFIG.linear_probe.checkpoint
            else expand(rules.pseudo_labels.output, novel=NOVEL)
        ),
        proposals=[] if CONFIG.proposals.files else rules.proposal_network.output.history,
        base_detector=rules.base_detector.output.history,
    output:
        report(
            f"{RESULTS}/report/report.html",
            category="Results",
            labels={"run": CONFIG.name, "what": "everything on one page"},
            caption="../docs/captions/report.rst",
        ),
    log:
        f"{RESULTS}/logs/report.log",
    conda:
        "../envs/light.yaml"
    threads: 1
    resources:
        mem_mb=grows(LIGHT, 3 * LISTED),
        runtime=grows(30, 0.0003),
    params:
        code=source("report"),
        settings=block("report"),
        benchmarks=f"{RESULTS}/benchmarks",
        proposals=lambda wildcards, input: option("--proposals-history", input.proposals),
    message:
        "The report"
    shell:
        "python -m workflow_scripts.report --metrics {input.metrics}"
        " --detections {input.detections} --val {input.val} --train {input.train}"
        " --truth {input.truth} --pseudo-labels {input.pseudo_labels}"
        " {params.proposals} --detector-history {input.base_detector}"
        " --benchmarks {params.benchmarks} --settings {params.settings:q} --output {output}"
        " 2>&1 | tee {log}"
