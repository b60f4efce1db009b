# LP-OVOD as a workflow. `snakemake -n` explains what would run, `snakemake --cores all` runs it.

import gc
import sys
from pathlib import Path

gc.freeze()  # Snakemake's modules, which no collection needs to read: a tenth of a plan's seconds

sys.path.insert(0, workflow.basedir)


configfile: "config.yaml"


include: "rules/console.smk"
include: "rules/common.smk"
include: "rules/check.smk"
include: "rules/preflight.smk"
include: "rules/resources.smk"
include: "rules/download.smk"
include: "rules/dataset.smk"
include: "rules/text_embeddings.smk"
include: "rules/proposal_network.smk"
include: rules_of("proposals", CONFIG.proposals.files)
include: "rules/region_embeddings.smk"
include: "rules/region_index.smk"
include: rules_of("base_detector", CONFIG.base_detector.checkpoint)
include: rules_of("pseudo_labels", CONFIG.pseudo_labels.file)
include: "rules/region_features.smk"
include: rules_of("linear_probe", CONFIG.linear_probe.checkpoint)
include: "rules/evaluation.smk"
include: "rules/model.smk"
include: "rules/report.smk"
include: "rules/small_clip.smk"
include: "rules/pictures.smk"


finish_preflight()


# Without a validation split there is nothing to measure, and the probe is the result.
METRICS = rules.evaluation.output.metrics.format(evaluation="evaluation")


rule all:
    default_target: True
    input:
        METRICS if "val" in SPLITS else rules.linear_probe.output,
        # Imported proposals come without a network, and a model cannot do without.
        [] if CONFIG.proposals.files else rules.model.output,
        rules.report.output,


onsuccess:
    print_results()
