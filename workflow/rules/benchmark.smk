# What things cost. `snakemake benchmark`: a pass of Stable Diffusion 1.5's U-Net and a training step, on random weights,
# for time and memory do not depend on them; nothing of the main job is read or made. `snakemake sparse`: what sparse
# experts save and change of the images of the main job's adapter, on validation subjects. `snakemake benchmark_data`:
# captions and masks in batches against one photo at a time, and of more and more photos. `snakemake benchmark_scoring`:
# what scoring in batches saves, with the judges of the configuration and with random ones of true size.


rule benchmark:
    output:
        "results/benchmark/unet.csv",
    log:
        "results/benchmark/logs/unet.log",
    benchmark:
        "results/benchmark/benchmarks/unet.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 2
    resources:
        mem_mb=20000,
        gpu=GPU,
    params:
        config=settings("benchmark-unet"),
        code=code("benchmark-unet"),
    message:
        "Measuring U-Net passes and training steps; `tail -f {log}` shows how far it is"
    shell:
        "python -m moa benchmark-unet --config {params.config:q} --output {output} > {log} 2>&1"


rule benchmark_data:
    input:
        models=stages.benchmark_files(CONFIG),
    output:
        "results/benchmark/data.csv",
    log:
        "results/benchmark/logs/data.log",
    benchmark:
        "results/benchmark/benchmarks/data.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 2
    resources:
        mem_mb=20000 if CONFIG["data"].get("benchmark", {}).get("true_size") else 6000,
        gpu=GPU,
    params:
        config=settings("benchmark-data"),
        code=code("benchmark-data"),
    message:
        "Measuring captions and masks; `tail -f {log}` shows how far it is"
    shell:
        "python -m moa benchmark-data --config {params.config:q} --output {output} > {log} 2>&1"


rule sparse:
    input:
        f"{OUT}/figures/sparse.png",
        PASSED,


rule sparse_curve:
    input:
        requests=f"{OUT}/requests/validation-single-000.parquet",
        subjects=f"{OUT}/subjects/validation.parquet",
        trained=f"{OUT}/train/moa",
        models=models("prior", "image_encoder", "clip_judge", "segmenter", "identity", "detector"),
        weighed=WEIGHED,
    output:
        f"{OUT}/tables/sparse.csv",
    log:
        f"{OUT}/logs/sparse_curve.log",
    benchmark:
        f"{OUT}/benchmarks/sparse_curve.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 2
    resources:
        mem_mb=3000,
        gpu=GPU,
    params:
        config=settings("sparse-curve"),
        code=code("sparse-curve"),
    message:
        "Generating with sparse experts"
    shell:
        "python -m moa sparse-curve --config {params.config:q} --requests {input.requests}"
        " --subjects {input.subjects} --trained {input.trained} --output {output} > {log} 2>&1"


rule sparse_figure:
    input:
        f"{OUT}/tables/sparse.csv",
    output:
        f"{OUT}/figures/sparse.png",
    log:
        f"{OUT}/logs/sparse_figure.log",
    benchmark:
        f"{OUT}/benchmarks/sparse_figure.tsv"
    conda:
        "../../envs/models.yaml"
    params:
        code=code("figure-sparse"),
    message:
        "Drawing what sparse experts save and change"
    shell:
        "python -m moa figure-sparse --table {input} --output {output} > {log} 2>&1"


rule benchmark_scoring:
    input:
        models=models("clip_judge", "segmenter", "identity", "detector"),
        weighed=WEIGHED,
    output:
        "results/benchmark/scoring.csv",
    log:
        "results/benchmark/logs/scoring.log",
    benchmark:
        "results/benchmark/benchmarks/scoring.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=6000,
        gpu=GPU,
    params:
        config=settings("benchmark-scoring"),
        code=code("benchmark-scoring"),
    message:
        "Scoring in batches, and one at a time"
    shell:
        "python -m moa benchmark-scoring --config {params.config:q} --output {output} > {log} 2>&1"
