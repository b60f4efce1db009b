# Stage report
# IN   metrics, detections and annotations of the validation images, if there are any; histories,
#      pseudo-labels, training annotations, stage times
# OUT  report.html: one file that opens offline
# COST seconds


rule report:
    input:
        template="lpovod/stages/report/template.html.jinja",
        script="lpovod/stages/report/classes.js",
        metrics=given("val" in SPLITS and f"{RESULTS}/evaluation/metrics.json"),
        detections=given("val" in SPLITS and f"{RESULTS}/evaluation/detections.json"),
        val=given("val" in SPLITS and f"{RESULTS}/dataset/val.json"),
        train=f"{RESULTS}/dataset/train.images.json",
        truth=f"{DATASET}/train_all_classes.json",
        pseudo_labels=[] if CONFIG.linear_probe.checkpoint else rules.pseudo_labels.output,
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
        # The whole configuration, because the page lists what differs from the defaults. Date,
        # machine and commit are no params: they would make the page stale.
        run=CONFIG.model_dump_json(exclude={"small_clip"}),
        benchmarks=f"{RESULTS}/benchmarks",
        proposals=lambda wildcards, input: option("--proposals-history", input.proposals),
        measured=lambda wildcards, input: measured_options(input),
    message:
        "The report"
    shell:
        "python -m workflow_scripts.report --run {params.run:q} --train {input.train}"
        " --truth {input.truth} --pseudo-labels {input.pseudo_labels}"
        " {params.proposals} --detector-history {input.base_detector} {params.measured}"
        " --benchmarks {params.benchmarks} --output {output} 2>&1 | tee {log}"
