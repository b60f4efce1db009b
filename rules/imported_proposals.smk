# Stage proposals, read from files instead of a trained network (proposals.files).
# IN   dataset; an OpenMMLab pickle or COCO results of the split
# OUT  {split}/{shard}.h5: region store of box and objectness, best first; all shards of a split come from
#      one job, since a pickle is read as a whole
# COST a pickle is read into memory as a whole: 3.5 GB for 1,500 boxes on each image of COCO train


for split in SPLITS:

    rule:
        name:
            f"proposals_{split}"
        input:
            dataset=f"{RESULTS}/dataset/{split}.images.json",
            file=lambda wildcards, split=split: of_split(CONFIG.proposals.files, split),
            id_map=given(CONFIG.proposals.id_maps.get(split)),
        output:
            shards("proposals", split),
        log:
            f"{RESULTS}/logs/proposals/{split}.log",
        benchmark:
            f"{RESULTS}/benchmarks/proposals/{split}.tsv"
        conda:
            ENVIRONMENT
        threads: 1
        resources:
            mem_mb=grows(8000),
            runtime=grows(60),
        params:
            code=source("imported_proposals"),
            settings=block("proposals"),
            id_map=lambda wildcards, input: option("--id-map", input.id_map),
        message:
            f"Proposals of the {split} images, from {{input.file}}"
        shell:
            "python -m workflow_scripts.imported_proposals --dataset {input.dataset}"
            " --file {input.file} {params.id_map} --settings {params.settings:q}"
            " --output {output} 2>&1 | tee {log}"
