# What a person looks at. Nothing is computed here; everything is read from samples, logs and tables.
import os

GRIDS = {"benchmark": "single", "pairs": "multi", "swap": "swap"}
DRAWN = [
    *(name for name, kind in GRIDS.items() if kind in KINDS),
    *(["training"] if TRAININGS else []),
    *(["scores"] if "single" in KINDS else []),
    *(["router"] if ROUTER else []),
]
FIGURES = [f"{OUT}/figures/{name}.png" for name in DRAWN]
# Of rules that were given others than their own (`--set-threads`), which change a training's last digits.
THREADS = [
    f"{rule}={getattr(n, 'raw', n)}" for rule, n in workflow.resource_settings.overwrite_threads.items()
]
NOTEBOOKS = [f"{OUT}/notebooks/router_maps.ipynb"] if ROUTER else []


rule grid:
    input:
        samples=f"{OUT}/samples.parquet",
        subjects=f"{OUT}/subjects/test.parquet",
    output:
        report(f"{OUT}/figures/{{grid}}.png", category="Figures", caption="../report/grid.rst"),
    log:
        f"{OUT}/logs/grid-{{grid}}.log",
    benchmark:
        f"{OUT}/benchmarks/grid/{{grid}}.tsv"
    wildcard_constraints:
        grid="|".join(GRIDS),
    conda:
        "../../envs/models.yaml"
    params:
        code=lambda wildcards: code(f"figure-{wildcards.grid}")(wildcards),
        results=results,
    message:
        "Drawing the grid {wildcards.grid}"
    shell:
        "python -m moa figure-{wildcards.grid} --sample-files {input.samples} --subjects {input.subjects}"
        " --results {params.results} --output {output} > {log} 2>&1"


rule training_curves:
    input:
        expand(f"{OUT}/train/{{method}}", method=TRAININGS),
    output:
        report(f"{OUT}/figures/training.png", category="Figures", caption="../report/training.rst"),
    log:
        f"{OUT}/logs/training_curves.log",
    benchmark:
        f"{OUT}/benchmarks/training_curves.tsv"
    conda:
        "../../envs/models.yaml"
    params:
        code=code("figure-training"),
        logs=lambda wildcards, input: [f"{folder}/log.csv" for folder in input],
    message:
        "Drawing the losses"
    shell:
        "python -m moa figure-training --logs {params.logs} --output {output} > {log} 2>&1"


rule score_figure:
    input:
        f"{OUT}/tables/main.csv",
    output:
        report(f"{OUT}/figures/scores.png", category="Figures", caption="../report/tables.rst"),
    log:
        f"{OUT}/logs/score_figure.log",
    benchmark:
        f"{OUT}/benchmarks/score_figure.tsv"
    conda:
        "../../envs/models.yaml"
    params:
        code=code("figure-scores"),
    message:
        "Drawing the main table"
    shell:
        "python -m moa figure-scores --table {input} --output {output} > {log} 2>&1"


rule router_figure:
    input:
        f"{OUT}/router/maps.safetensors",
    output:
        report(f"{OUT}/figures/router.png", category="Figures", caption="../report/router.rst"),
    log:
        f"{OUT}/logs/router_figure.log",
    benchmark:
        f"{OUT}/benchmarks/router_figure.tsv"
    conda:
        "../../envs/models.yaml"
    params:
        code=code("figure-router"),
    message:
        "Drawing router maps"
    shell:
        "python -m moa figure-router --maps {input} --output {output} > {log} 2>&1"


rule router_notebook:
    input:
        rows=f"{OUT}/router/rows.parquet",
        maps=f"{OUT}/router/maps.safetensors",
    output:
        f"{OUT}/notebooks/router_maps.ipynb",
    log:
        notebook=f"{OUT}/notebooks/router_maps.ipynb",
    benchmark:
        f"{OUT}/benchmarks/router_notebook.tsv"
    conda:
        "../../envs/models.yaml"
    params:
        code=lambda wildcards: code_hash("moa.figures.router_maps", "moa.evaluation.maps"),
    message:
        "Running the router-map notebook"
    notebook:
        "../../notebooks/router_maps.ipynb"


rule made:
    input:
        shipped=[*TABLES, *FIGURES, *sum(MEASURED.values(), []), f"{OUT}/samples.parquet"],
        report=f"{OUT}/report.html",
    output:
        f"{OUT}/made.json",
    log:
        f"{OUT}/logs/made.log",
    benchmark:
        f"{OUT}/benchmarks/made.tsv"
    conda:
        "../../envs/models.yaml"
    params:
        config=lambda wildcards: json.dumps(CONFIG),
        code=code("provenance"),
        command=" ".join(
            [
                "snakemake --cores all full",
                option("--configfile", map(os.path.relpath, workflow.configfiles)),
                option("--set-threads", THREADS),
            ]
        ).strip(),
        results=results,
    message:
        "Writing down what made {params.results}"
    shell:
        "python -m moa provenance --results {params.results} --files {input.shipped} --config {params.config:q}"
        " --command {params.command:q} --output {output} > {log} 2>&1"


rule html_report:
    input:
        TABLES,
        FIGURES,
        NOTEBOOKS,
        [f"{OUT}/data/card{form}" for form in (".md", ".png")],
        [f"{OUT}/data/quarantine.csv"] if TAKEN_IN else [],
        expand(f"{OUT}/train/{{method}}", method=TRAININGS),
        template="moa/report.html",
    output:
        f"{OUT}/report.html",
    log:
        f"{OUT}/logs/report.log",
    benchmark:
        f"{OUT}/benchmarks/html_report.tsv"
    conda:
        "../../envs/models.yaml"
    params:
        config=lambda wildcards: json.dumps(CONFIG),
        code=code("report"),
        shown=lambda wildcards, input: [file for file in input if file != input.template],
        results=results,
    message:
        "Writing the report: {output}"
    shell:
        "python -m moa report --results {params.results} --config {params.config:q} --shown {params.shown}"
        " --output {output} > {log} 2>&1"
