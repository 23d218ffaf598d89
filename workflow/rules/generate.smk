# The protocol's requests, and every method's images of them. A killed job goes on with the images that are there.
METHODS = stages.methods(CONFIG)  # method: kinds
KINDS = {kind for kinds in METHODS.values() for kind in kinds}
MAKERS = {
    method: [f"{method}{seed}" for seed in (SEEDS if method in TRAINED else [""])] for method in METHODS
}  # method: the folders of its images, one a training
TRAININGS = sorted({TRAINED[method] for method in METHODS if method in TRAINED})


rule plan:
    input:
        protocol=CONFIG["protocol"],
        subjects=f"{OUT}/subjects/{{split}}.parquet",
    output:
        f"{OUT}/requests/{{split}}-{{kind}}-{{shard}}.parquet",
    log:
        f"{OUT}/logs/plan/{{split}}-{{kind}}-{{shard}}.log",
    benchmark:
        f"{OUT}/benchmarks/plan/{{split}}-{{kind}}-{{shard}}.tsv"
    conda:
        "../../envs/models.yaml"
    params:
        code=code("plan"),
        shard=lambda wildcards: int(wildcards.shard),
        shards=lambda wildcards: CONFIG["shards"][wildcards.kind] if wildcards.split == "test" else 1,
    message:
        "Writing down the requests {wildcards.split}-{wildcards.kind}-{wildcards.shard}"
    shell:
        "python -m moa plan --protocol {input.protocol} --subjects {input.subjects} --split {wildcards.split}"
        " --kind {wildcards.kind} --shard {params.shard} --shards {params.shards} --output {output} > {log} 2>&1"


rule generate:
    input:
        requests=f"{OUT}/requests/{{split}}-{{kind}}-{{shard}}.parquet",
        subjects=subject_photos,
        models=models("prior", "image_encoder"),
        trained=lambda wildcards: (
            f"{OUT}/train/{TRAINED[wildcards.method]}{wildcards.seed}" if wildcards.method in TRAINED else []
        ),
        weighed=WEIGHED,
    output:
        made=f"{OUT}/made/{{method}}{{seed}}/{{split}}-{{kind}}-{{shard}}.parquet",
        memory=f"{OUT}/made/{{method}}{{seed}}/{{split}}-{{kind}}-{{shard}}.json",
    log:
        f"{OUT}/logs/generate/{{method}}{{seed}}-{{split}}-{{kind}}-{{shard}}.log",
    benchmark:
        f"{OUT}/benchmarks/generate/{{method}}{{seed}}-{{split}}-{{kind}}-{{shard}}.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=3000,
        gpu=GPU,
    params:
        config=settings("generate-shard"),
        code=lambda wildcards: stages.code("generate-shard", wildcards.method),
        trained=lambda wildcards, input: f"--trained {input.trained}" if input.trained else "",
        root=results,
        folder=lambda wildcards: f"{wildcards.method}{wildcards.seed}",
    message:
        "Making images: {wildcards.method}{wildcards.seed}, {wildcards.kind}"
    shell:
        "python -m moa generate-shard --config {params.config:q} --method {wildcards.method}"
        " --requests {input.requests} --subjects {input.subjects} {params.trained}"
        " --root {params.root} --folder {params.folder} --output {output.made} --memory {output.memory} > {log} 2>&1"
