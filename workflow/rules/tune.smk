# Choosing settings, on validation subjects only: `snakemake tune` trains and scores every trial of `tuning`.
# A trial is the configuration with changes to train.<method> (`train`) and to generate.sampling (`sampling`);
# trials of a method with the same changes to `train` share one training, those without any the main one.
TRIALS = [(method, trial) for method, trials in TUNING.items() for trial in trials]
TUNED = [
    f"{OUT}/requests/validation-{kind}-000.parquet" for kind in ROUTED
]  # subjects one by one, and swapped


wildcard_constraints:
    trial=r"[\w.+-]+",


rule tune:
    input:
        f"{OUT}/tables/tuning.csv",


rule tune_train:
    input:
        records=shards("records", "train"),
        subjects=f"{OUT}/subjects/validation.parquet",
        models=models("prior", "image_encoder"),
    output:
        directory(f"{OUT}/tuning/{{method}}/{{trial}}/{{method}}"),
    log:
        f"{OUT}/logs/tuning/{{method}}-{{trial}}-train.log",
    benchmark:
        f"{OUT}/benchmarks/tuning/{{method}}-{{trial}}-train.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=6000,
        gpu=GPU,
    params:
        config=lambda wildcards: json.dumps(
            stages.settings(f"train-{wildcards.method}", CONFIG)
            | changes(wildcards.method, wildcards.trial, "train"),
            sort_keys=True,
        ),
        code=lambda wildcards: code(f"train-{wildcards.method}")(wildcards),
    message:
        "Tuning {wildcards.method}: training the trial {wildcards.trial}"
    shell:
        "python -m moa train-{wildcards.method} --config {params.config:q} --records {input.records}"
        " --subjects {input.subjects} --output {output} > {log} 2>&1"


rule tune_generate:
    input:
        requests=TUNED,
        subjects=f"{OUT}/subjects/validation.parquet",
        models=models("prior", "image_encoder"),
        trained=lambda wildcards: training_of(wildcards.method, wildcards.trial),
    output:
        f"{OUT}/tuning/{{method}}/{{trial}}/made.parquet",
    log:
        f"{OUT}/logs/tuning/{{method}}-{{trial}}-generate.log",
    benchmark:
        f"{OUT}/benchmarks/tuning/{{method}}-{{trial}}-generate.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=3000,
        gpu=GPU,
    params:
        config=lambda wildcards: json.dumps(
            stages.settings("generate-shard", CONFIG)
            | {
                "sampling": CONFIG["generate"]["sampling"]
                | changes(wildcards.method, wildcards.trial, "sampling")
            },
            sort_keys=True,
        ),
        code=code("generate-shard"),
        root=lambda wildcards: f"{OUT}/tuning/{wildcards.method}/{wildcards.trial}",
    message:
        "Tuning {wildcards.method}: images of the trial {wildcards.trial}"
    shell:
        "python -m moa generate-shard --config {params.config:q} --method {wildcards.method}"
        " --requests {input.requests} --subjects {input.subjects} --trained {input.trained}"
        " --root {params.root} --output {output} > {log} 2>&1"


rule tune_score:
    input:
        made=f"{OUT}/tuning/{{method}}/{{trial}}/made.parquet",
        subjects=f"{OUT}/subjects/validation.parquet",
        models=models("clip_judge", "segmenter", "identity", "detector"),
    output:
        samples=f"{OUT}/tuning/{{method}}/{{trial}}/samples.parquet",
        features=f"{OUT}/tuning/{{method}}/{{trial}}/features.parquet",
    log:
        f"{OUT}/logs/tuning/{{method}}-{{trial}}-score.log",
    benchmark:
        f"{OUT}/benchmarks/tuning/{{method}}-{{trial}}-score.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        gpu=GPU,
    params:
        config=settings("score"),
        code=code("score"),
        root=lambda wildcards: f"{OUT}/tuning/{wildcards.method}/{wildcards.trial}",
    message:
        "Tuning {wildcards.method}: scoring the trial {wildcards.trial}"
    shell:
        "python -m moa score --config {params.config:q} --made {input.made} --subjects {input.subjects}"
        " --results {params.root} --samples-out {output.samples} --features-out {output.features} > {log} 2>&1"


rule tune_kept:
    input:
        samples=f"{OUT}/tuning/{{method}}/{{trial}}/samples.parquet",
        features=f"{OUT}/tuning/{{method}}/{{trial}}/features.parquet",
    output:
        f"{OUT}/tuning/{{method}}/{{trial}}/kept.parquet",
    log:
        f"{OUT}/logs/tuning/{{method}}-{{trial}}-kept.log",
    benchmark:
        f"{OUT}/benchmarks/tuning/{{method}}-{{trial}}-kept.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=1000,
    params:
        code=code("compare-swaps"),
        root=lambda wildcards: f"{OUT}/tuning/{wildcards.method}/{wildcards.trial}",
    message:
        "Tuning {wildcards.method}: context kept by the trial {wildcards.trial}"
    shell:
        "python -m moa compare-swaps --made {input.samples} --seen {input.features} --results {params.root}"
        " --output {output} > {log} 2>&1"


rule tuning_table:
    input:
        samples=[f"{OUT}/tuning/{method}/{trial}/samples.parquet" for method, trial in TRIALS],
        kept=[f"{OUT}/tuning/{method}/{trial}/kept.parquet" for method, trial in TRIALS],
    output:
        f"{OUT}/tables/tuning.csv",
    log:
        f"{OUT}/logs/tuning_table.log",
    conda:
        "../../envs/models.yaml"
    params:
        code=code("tuning-table"),
        trials=[f"{method}/{trial}={OUT}/tuning/{method}/{trial}" for method, trial in TRIALS],
        changes=json.dumps(TUNING, sort_keys=True),
    message:
        "Tabulating the tuning grid"
    shell:
        "python -m moa tuning-table --trials {params.trials} --changes {params.changes:q} --output {output}"
        " > {log} 2>&1"
