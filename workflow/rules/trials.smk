# Trials, on validation subjects only: the configuration with some changes (`moa.stages.trial`), trained, generated and
# scored by the rules of the main job. There are two grids of them. `tuning` chooses settings: `snakemake tune`.
# `ablations` shows what a part is worth, MoA beside itself without it: tables/ablations, and rows of the claims ledger.
# Trials of a method that train alike share one training, those that change nothing of it the main one.
use rule train as trial_train with:
    input:
        records=shards("records", "train"),
        subjects=f"{OUT}/subjects/validation.parquet",
        models=trial_models("prior", "image_encoder"),
        weighed=WEIGHED,
    output:
        folder=directory(f"{TRIAL}/{{method}}"),
    log:
        f"{OUT}/logs/{{grid}}/{{method}}-{{trial}}-train.log",
    benchmark:
        f"{OUT}/benchmarks/trial_train/{{grid}}/{{method}}-{{trial}}.tsv"
    message:
        "Training {wildcards.method}, {wildcards.grid}: {wildcards.trial}; `tail -f {log}` shows how far it is"


use rule generate as trial_generate with:
    input:
        requests=trial_requests,
        subjects=f"{OUT}/subjects/validation.parquet",
        models=trial_models("prior", "image_encoder"),
        trained=trial_training,
        weighed=WEIGHED,
    output:
        made=f"{TRIAL}/made.parquet",
        memory=f"{TRIAL}/made.json",
    log:
        f"{OUT}/logs/{{grid}}/{{method}}-{{trial}}-generate.log",
    benchmark:
        f"{OUT}/benchmarks/trial_generate/{{grid}}/{{method}}-{{trial}}.tsv"
    params:
        config=trial_settings("generate-shard"),
        root=trial_folder,
        folder=lambda wildcards: wildcards.method,
    message:
        "Making images: {wildcards.method}, {wildcards.grid}: {wildcards.trial}"


use rule score as trial_score with:
    input:
        made=f"{TRIAL}/made.parquet",
        subjects=f"{OUT}/subjects/validation.parquet",
        references=f"{OUT}/references/validation.parquet",
        models=models("clip_judge", "segmenter", "identity", "detector"),
        weighed=WEIGHED,
    output:
        samples=f"{TRIAL}/samples.parquet",
        features=f"{TRIAL}/features.parquet",
    log:
        f"{OUT}/logs/{{grid}}/{{method}}-{{trial}}-score.log",
    benchmark:
        f"{OUT}/benchmarks/trial_score/{{grid}}/{{method}}-{{trial}}.tsv"
    params:
        results=trial_folder,
    message:
        "Scoring {wildcards.method}, {wildcards.grid}: {wildcards.trial}"


use rule compare_swaps as trial_kept with:
    input:
        samples=f"{TRIAL}/samples.parquet",
        features=f"{TRIAL}/features.parquet",
        models=models("lpips"),
        weighed=WEIGHED,
    output:
        f"{TRIAL}/kept.parquet",
    log:
        f"{OUT}/logs/{{grid}}/{{method}}-{{trial}}-kept.log",
    benchmark:
        f"{OUT}/benchmarks/trial_kept/{{grid}}/{{method}}-{{trial}}.tsv"
    params:
        results=trial_folder,
    message:
        "Context kept under a swap by {wildcards.method}, {wildcards.grid}: {wildcards.trial}"


use rule compare_prior as trial_preserved with:
    input:
        samples=f"{TRIAL}/samples.parquet",
        features=f"{TRIAL}/features.parquet",
        prior=trial_prior("samples.parquet"),
        prior_features=trial_prior("features.parquet"),
        models=models("lpips"),
        weighed=WEIGHED,
    output:
        f"{TRIAL}/preserved.parquet",
    log:
        f"{OUT}/logs/{{grid}}/{{method}}-{{trial}}-preserved.log",
    benchmark:
        f"{OUT}/benchmarks/trial_preserved/{{grid}}/{{method}}-{{trial}}.tsv"
    params:
        results=trial_folder,
        prior_results=lambda wildcards, input: f"--prior-results {Path(input.prior).parent}",
    message:
        "What is left of the prior's images: {wildcards.method}, {wildcards.grid}: {wildcards.trial}"


rule tune:
    input:
        f"{OUT}/tables/tuning.csv",
        PASSED,


rule tuning_table:
    input:
        samples=[f"{OUT}/tuning/{method}/{trial}/samples.parquet" for method, trial in TRIALS["tuning"]],
        kept=[f"{OUT}/tuning/{method}/{trial}/kept.parquet" for method, trial in TRIALS["tuning"]],
    output:
        f"{OUT}/tables/tuning.csv",
    log:
        f"{OUT}/logs/tuning_table.log",
    benchmark:
        f"{OUT}/benchmarks/tuning_table.tsv"
    conda:
        "../../envs/models.yaml"
    params:
        code=code("tuning-table"),
        trials=[f"{method}/{trial}={OUT}/tuning/{method}/{trial}" for method, trial in TRIALS["tuning"]],
        changes=json.dumps(TRIED["tuning"], sort_keys=True),
    message:
        "Tabulating the tuning grid"
    shell:
        "python -m moa tuning-table --trials {params.trials} --changes {params.changes:q} --output {output}"
        " > {log} 2>&1"


rule ablations:
    input:
        ABLATIONS,
        PASSED,


rule ablation_table:
    input:
        [
            f"{OUT}/ablations/{method}/{trial}/{file}.parquet"
            for method, trial in TRIALS["ablations"]
            for file in ("samples", "kept", "preserved")
        ],
    output:
        tables=report(
            [f"{OUT}/tables/ablations{form}" for form in (".csv", ".md", ".tex")],
            category="Tables",
            caption="../report/ablations.rst",
        ),
        measures=f"{OUT}/ablations/measures.parquet",
    log:
        f"{OUT}/logs/ablation_table.log",
    benchmark:
        f"{OUT}/benchmarks/ablation_table.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=1000,
    params:
        code=code("ablation-table"),
        trials=[f"{m}/{trial}={OUT}/ablations/{m}/{trial}" for m, trial in TRIALS["ablations"]],
        changes=json.dumps(TRIED["ablations"], sort_keys=True),
        folder=subpath(output[0], parent=True),
    message:
        "Tabulating the ablations"
    shell:
        "python -m moa ablation-table --trials {params.trials} --changes {params.changes:q}"
        " --measures {output.measures} --output {params.folder} > {log} 2>&1"
