# Stage check
# IN   the user's images and COCO json (source: coco)
# OUT  check.json: findings; ids of the images that bad_images: skip leaves out;
#      check.html: the same with pictures. With errors neither is written, but errors.html beside
#      them (undeclared: Snakemake deletes the outputs of a failed job)
# COST headers alone: a minute and a half for COCO's 123,000 images on two cores; with
#      bad_images: skip, which decodes them, 11 minutes


def check_options():
    """Options for the user's files of every split."""
    files = CONFIG.dataset.coco
    words = []
    for split in SPLITS:
        words += [f"--{split}-images", str(files.images(split))]
        words += [f"--{split}-annotations", str(files.annotations(split))]
    return shlex.join(words)


rule check:
    input:
        downloads=ancient(COCO_DOWNLOADS),
        template="lpovod/stages/check/template.html.jinja",
    output:
        findings=f"{RESULTS}/check/check.json",
        page=f"{RESULTS}/check/check.html",
    log:
        f"{RESULTS}/logs/check.log",
    benchmark:
        f"{RESULTS}/benchmarks/check.tsv"
    conda:
        "../envs/light.yaml"
    threads: 2
    resources:
        mem_mb=grows(LIGHT, 0.04),
        runtime=grows(30, 0.001),
    params:
        code=source("check"),
        options=check_options(),
        base=CONFIG.classes.base,
        novel=CONFIG.classes.novel,
        bad_images=CONFIG.dataset.bad_images,
        digests=[f"{name} {source.digest()}" for name, source in SOURCES.items()],
    message:
        "Check of images and annotations"
    shell:
        "python -m workflow_scripts.check {params.options} --base {params.base:q}"
        " --novel {params.novel:q} --bad-images {params.bad_images} --workers {threads}"
        " --output {output.findings} --page {output.page} 2>&1 | tee {log}"
