# Training. Checkpoints lie outside the declared output, so a killed run goes on from the newest one.


rule train:
    input:
        records=shards("records", "train"),
        subjects=f"{OUT}/subjects/validation.parquet",
        models=models("prior", "image_encoder"),
    output:
        folder=directory(f"{OUT}/train/{{method}}"),
    log:
        f"{OUT}/logs/train/{{method}}.log",
    benchmark:
        f"{OUT}/benchmarks/train/{{method}}.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 2
    resources:
        mem_mb=6000,
        gpu=GPU,
    params:
        config=lambda wildcards: settings(f"train-{wildcards.method}")(wildcards),
        code=lambda wildcards: code(f"train-{wildcards.method}")(wildcards),
    message:
        "Training {wildcards.method}; `tail -f {log}` shows how far it is"
    shell:
        "python -m moa train-{wildcards.method} --config {params.config:q} --records {input.records}"
        " --subjects {input.subjects} --output {output.folder} > {log} 2>&1"
