# Stage pictures: the README's pictures; not part of the default run (make pictures)
# IN   metrics, detections and report of a finished run
# OUT  docs/pictures/detections.png, docs/pictures/report.png
# COST seconds; needs a browser (Debian's chromium)


rule pictures:
    input:
        metrics=f"{RESULTS}/evaluation/metrics.json",
        detections=f"{RESULTS}/evaluation/detections.json",
        dataset=f"{RESULTS}/dataset/val.json",
        report=f"{RESULTS}/report/report.html",
    output:
        scenes="docs/pictures/detections.png",
        page="docs/pictures/report.png",
    log:
        f"{RESULTS}/logs/pictures.log",
    conda:
        "../envs/light.yaml"
    threads: 1
    resources:
        mem_mb=grows(LIGHT),
        runtime=grows(30),
    params:
        code=source("pictures"),
    message:
        "The README's pictures"
    shell:
        "python -m workflow_scripts.pictures --metrics {input.metrics}"
        " --detections {input.detections} --dataset {input.dataset} --report {input.report}"
        " --scenes {output.scenes} --page {output.page} 2>&1 | tee {log}"
