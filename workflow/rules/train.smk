# Training, once with each of `train_seeds`. Checkpoints lie outside the declared output, so a killed run goes on from
# the newest one.


rule train:
    input:
        records=shards("records", "train"),
        subjects=f"{OUT}/subjects/validation.parquet",
        models=models("prior", "image_encoder"),
        weighed=WEIGHED,
    output:
        folder=directory(f"{OUT}/train/{{method}}{{seed}}"),
    log:
        f"{OUT}/logs/train/{{method}}{{seed}}.log",
    benchmark:
        f"{OUT}/benchmarks/train/{{method}}{{seed}}.tsv"
    conda:
        "../../envs/models.yaml"
    threads: lambda wildcards: max(2, PROCESSES * (1 + training(wildcards).get("workers", 0)))
    resources:
        mem_mb=6000,
        gpu=GPU * PROCESSES,
    params:
        config=trains,
        work=works,
        launch=launch,
        code=lambda wildcards: code(f"train-{wildcards.method}")(wildcards),
        records=all_shards("records", "train"),
    message:
        "Training {wildcards.method}{wildcards.seed}; `tail -f {log}` shows how far it is"
    shell:
        "python -m {params.launch}moa train-{wildcards.method} --config {params.config:q} --change {params.work:q}"
        " --records {params.records} --subjects {input.subjects} --output {output.folder} > {log} 2>&1"
