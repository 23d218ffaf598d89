# Judges look at each image once; tables only read what they wrote.
MADE = {
    method: [file for maker in MAKERS[method] for kind in kinds for file in parts(kind, "made", maker)]
    for method, kinds in METHODS.items()
}
SCORES = [f"{OUT}/scores/{method}.parquet" for method in METHODS]
FORMS = (".csv", ".md", ".tex")
TABULATED = {"main": "single", "table3": "single", "multi": "multi", "context": "swap"}  # table: kind
QUALITY = [
    f"{OUT}/tables/{name}{form}" for name, kind in TABULATED.items() if kind in KINDS for form in FORMS
]
# How far trainings of a method that differ in their seed alone lie apart.
AGAIN = [kind for method, kinds in METHODS.items() if len(MAKERS[method]) > 1 for kind in kinds]
QUALITY += [f"{OUT}/tables/seeds{form}" for form in FORMS if {*AGAIN} & {"single", "multi", "swap"}]
DETAILS = [
    f"{OUT}/tables/{name}.csv"
    for name in ("differences", "progress", "groups")
    if KINDS & {"single", "multi"}
]
# The router is looked at on validation subjects, whatever is made of the test subjects.
ROUTED = [kind for kind in ("single", "swap") if kind in stages.kinds(CONFIG, "validation")]
ROUTER = [
    f"{OUT}/tables/{name}.csv" for name in ("router", "router_timesteps") if "moa" in METHODS and ROUTED
]
CLAIMS = [f"{OUT}/tables/{name}{form}" for name in ("claims", "metrics") for form in FORMS]
CLAIMS += [f"{OUT}/tables/sizes.csv"]
# What is left of the prior's images can be said only where there are any.
PRESERVED = [f"{OUT}/scores/{method}-preserved.parquet" for method in METHODS if "prior" in METHODS]
RIVALS = stages.rivals(CONFIG)  # compared over the same pixels
SHARED = [f"{OUT}/scores/shared.parquet"] if RIVALS else []
BASE = ["prior"] if "prior" in METHODS else []
COST = [f"{OUT}/tables/cost{form}" for form in FORMS]
ABLATIONS = [f"{OUT}/tables/ablations{form}" for form in FORMS if CONFIG.get("ablations")]
ABLATED = [f"{OUT}/ablations/measures.parquet"] if ABLATIONS else []
# What the claims are judged by.
MEASURED = {
    "kept": [f"{OUT}/scores/kept.parquet"],
    "measured": [*(f"{OUT}/scores/{method}-measures.parquet" for method in METHODS), *SHARED],
    "preserved": PRESERVED,
    "router": [f"{OUT}/router/rows.parquet"] if ROUTER else [],
    "alike": [f"{OUT}/router/alike.parquet"] if ROUTER else [],
    "ablations": ABLATED,
}
TABLES = [*QUALITY, *DETAILS, *CLAIMS, *ABLATIONS, *COST, *ROUTER, *ANNOTATION]


rule look_at_references:
    input:
        subjects=f"{OUT}/subjects/{{split}}.parquet",
        models=models("clip_judge", "segmenter", "identity", "detector"),
        weighed=WEIGHED,
    output:
        f"{OUT}/references/{{split}}.parquet",
    log:
        f"{OUT}/logs/look_at_references/{{split}}.log",
    benchmark:
        f"{OUT}/benchmarks/look_at_references/{{split}}.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        gpu=GPU,
    params:
        config=settings("look-at-references"),
        code=code("look-at-references"),
    message:
        "Looking at the photos of the {wildcards.split} subjects"
    shell:
        "python -m moa look-at-references --config {params.config:q} --subjects {input.subjects} --output {output}"
        " > {log} 2>&1"


rule score:
    input:
        made=lambda wildcards: MADE[wildcards.method],
        subjects=f"{OUT}/subjects/test.parquet",
        references=f"{OUT}/references/test.parquet",
        models=models("clip_judge", "segmenter", "identity", "detector"),
        weighed=WEIGHED,
    output:
        samples=f"{OUT}/scores/{{method}}.parquet",
        features=f"{OUT}/scores/{{method}}-features.parquet",
    log:
        f"{OUT}/logs/score/{{method}}.log",
    benchmark:
        f"{OUT}/benchmarks/score/{{method}}.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        gpu=GPU,
    params:
        config=settings("score"),
        code=code("score"),
        results=results,
    message:
        "Scoring {wildcards.method}"
    shell:
        "python -m moa score --config {params.config:q} --made {input.made} --subjects {input.subjects}"
        " --references {input.references} --results {params.results} --samples-out {output.samples} --features-out {output.features}"
        " > {log} 2>&1"


rule merge_samples:
    input:
        SCORES,
    output:
        f"{OUT}/samples.parquet",
    log:
        f"{OUT}/logs/merge_samples.log",
    benchmark:
        f"{OUT}/benchmarks/merge_samples.tsv"
    conda:
        "../../envs/models.yaml"
    params:
        code=code("merge"),
    message:
        "Joining all samples"
    shell:
        "python -m moa merge --parts {input} --output {output} > {log} 2>&1"


rule compare_swaps:
    input:
        samples=f"{OUT}/samples.parquet",
        features=[f"{OUT}/scores/{method}-features.parquet" for method in METHODS],
        models=models("lpips"),
        weighed=WEIGHED,
    output:
        f"{OUT}/scores/kept.parquet",
    log:
        f"{OUT}/logs/compare_swaps.log",
    benchmark:
        f"{OUT}/benchmarks/compare_swaps.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        gpu=LPIPS_GPU,
    params:
        config=settings("compare-swaps"),
        code=code("compare-swaps"),
        results=results,
    message:
        "Comparing images of one prompt and noise with different subjects"
    shell:
        "python -m moa compare-swaps --config {params.config:q} --made {input.samples} --seen {input.features}"
        " --results {params.results} --output {output} > {log} 2>&1"


rule quality_tables:
    input:
        samples=f"{OUT}/samples.parquet",
        kept=f"{OUT}/scores/kept.parquet",
        published="config/published.yaml",
    output:
        report(
            QUALITY,
            category="Tables",
            caption="../report/tables.rst",
        ),
        DETAILS,
    log:
        f"{OUT}/logs/quality_tables.log",
    benchmark:
        f"{OUT}/benchmarks/quality_tables.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=1000,
    params:
        code=code("tables"),
        folder=subpath(output[0], parent=True),
    message:
        "Tabulating quality"
    shell:
        "python -m moa tables --sample-files {input.samples} --kept {input.kept} --published {input.published}"
        " --output {params.folder} > {log} 2>&1"


rule compare_prior:
    input:
        samples=f"{OUT}/scores/{{method}}.parquet",
        features=f"{OUT}/scores/{{method}}-features.parquet",
        prior=f"{OUT}/scores/prior.parquet",
        prior_features=f"{OUT}/scores/prior-features.parquet",
        models=models("lpips"),
        weighed=WEIGHED,
    output:
        f"{OUT}/scores/{{method}}-preserved.parquet",
    log:
        f"{OUT}/logs/compare_prior/{{method}}.log",
    benchmark:
        f"{OUT}/benchmarks/compare_prior/{{method}}.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        gpu=LPIPS_GPU,
    params:
        config=settings("compare-prior"),
        code=code("compare-prior"),
        results=results,
        prior_results="",
    message:
        "Comparing {wildcards.method} with the prior's images of the same noise"
    shell:
        "python -m moa compare-prior --config {params.config:q} --made {input.samples} --seen {input.features}"
        " --prior {input.prior} --prior-seen {input.prior_features} --results {params.results} {params.prior_results}"
        " --output {output} > {log} 2>&1"


rule compare_methods:
    input:
        samples=[f"{OUT}/scores/{method}.parquet" for method in RIVALS],
        features=[f"{OUT}/scores/{method}-features.parquet" for method in RIVALS],
        prior=[f"{OUT}/scores/{method}.parquet" for method in BASE],
        prior_features=[f"{OUT}/scores/{method}-features.parquet" for method in BASE],
        models=models("lpips"),
        weighed=WEIGHED,
    output:
        f"{OUT}/scores/shared.parquet",
    log:
        f"{OUT}/logs/compare_methods.log",
    benchmark:
        f"{OUT}/benchmarks/compare_methods.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        gpu=LPIPS_GPU,
    params:
        config=settings("compare-methods"),
        code=code("compare-methods"),
        results=results,
        prior=lambda wildcards, input: option("--prior", input.prior),
        prior_seen=lambda wildcards, input: option("--prior-seen", input.prior_features),
    message:
        f"Comparing {' and '.join(RIVALS)} over the same pixels"
    shell:
        "python -m moa compare-methods --config {params.config:q} --made {input.samples} --seen {input.features}"
        " {params.prior} {params.prior_seen} --results {params.results} --output {output} > {log} 2>&1"


rule measure:
    input:
        samples=f"{OUT}/scores/{{method}}.parquet",
        features=f"{OUT}/scores/{{method}}-features.parquet",
        references=f"{OUT}/references/test.parquet",
    output:
        f"{OUT}/scores/{{method}}-measures.parquet",
    log:
        f"{OUT}/logs/measure/{{method}}.log",
    benchmark:
        f"{OUT}/benchmarks/measure/{{method}}.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=1000,
    params:
        code=code("measure"),
    message:
        "Measuring leaks, swaps and variation of {wildcards.method}"
    shell:
        "python -m moa measure --made {input.samples} --seen {input.features} --references {input.references}"
        " --output {output} > {log} 2>&1"


rule claims:
    input:
        **MEASURED,
        claims="config/claims.yaml",
        samples=f"{OUT}/samples.parquet",
    output:
        report(CLAIMS, category="Tables", caption="../report/claims.rst"),
    log:
        f"{OUT}/logs/claims.log",
    benchmark:
        f"{OUT}/benchmarks/claims.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=1000,
    params:
        code=code("claims"),
        folder=subpath(output[0], parent=True),
        measured=[option(f"--{name}", files) for name, files in MEASURED.items()],
    message:
        "Setting the paper's claims beside what was measured"
    shell:
        "python -m moa claims --claims {input.claims} --sample-files {input.samples} {params.measured}"
        " --output {params.folder} > {log} 2>&1"


rule cost_table:
    input:
        samples=f"{OUT}/samples.parquet",
        trained=expand(f"{OUT}/train/{{method}}{{seed}}", method=TRAININGS, seed=SEEDS),
        memory=[Path(file).with_suffix(".json") for files in MADE.values() for file in files],
    output:
        report(COST, category="Tables", caption="../report/tables.rst"),
    log:
        f"{OUT}/logs/cost_table.log",
    benchmark:
        f"{OUT}/benchmarks/cost_table.tsv"
    conda:
        "../../envs/models.yaml"
    params:
        code=code("cost"),
        folder=subpath(output[0], parent=True),
        training=lambda wildcards: option(
            "--training",
            [
                f"{method}={OUT}/train/{TRAINED[method]}{seed}/train.json"
                for method in METHODS
                if method in TRAINED
                for seed in SEEDS
            ],
        ),
        memory=[
            f"{method}={Path(file).with_suffix('.json')}" for method, files in MADE.items() for file in files
        ],
    message:
        "Tabulating cost"
    shell:
        "python -m moa cost --sample-files {input.samples} {params.training} --memory {params.memory}"
        " --output {params.folder}/cost.csv > {log} 2>&1"


rule router:
    input:
        requests=[f"{OUT}/requests/validation-{kind}-000.parquet" for kind in ROUTED],
        subjects=f"{OUT}/subjects/validation.parquet",
        trained=f"{OUT}/train/moa",
        models=models("prior", "image_encoder", "segmenter"),
        weighed=WEIGHED,
    output:
        rows=f"{OUT}/router/rows.parquet",
        maps=f"{OUT}/router/maps.safetensors",
        alike=f"{OUT}/router/alike.parquet",
    log:
        f"{OUT}/logs/router.log",
    benchmark:
        f"{OUT}/benchmarks/router.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=3000,
        gpu=GPU,
    params:
        config=settings("router"),
        code=code("router"),
    message:
        "Recording what the router does"
    shell:
        "python -m moa router --config {params.config:q} --requests {input.requests} --subjects {input.subjects}"
        " --trained {input.trained} --rows-out {output.rows} --maps-out {output.maps}"
        " --alike-out {output.alike} > {log} 2>&1"


rule router_table:
    input:
        f"{OUT}/router/rows.parquet",
    output:
        table=report(f"{OUT}/tables/router.csv", category="Tables", caption="../report/router.rst"),
        timesteps=report(
            f"{OUT}/tables/router_timesteps.csv", category="Tables", caption="../report/router.rst"
        ),
    log:
        f"{OUT}/logs/router_table.log",
    benchmark:
        f"{OUT}/benchmarks/router_table.tsv"
    conda:
        "../../envs/models.yaml"
    params:
        code=code("router-table"),
    message:
        "Tabulating what the router does"
    shell:
        "python -m moa router-table --rows {input} --output {output.table} --timesteps {output.timesteps} > {log} 2>&1"
