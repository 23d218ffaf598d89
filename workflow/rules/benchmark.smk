# What a pass of Stable Diffusion 1.5's U-Net and a training step cost: `snakemake benchmark`. Random weights, for
# time and memory do not depend on them; nothing of the main job is read or made.


rule benchmark:
    output:
        "results/benchmark/unet.csv",
    log:
        "results/benchmark/logs/unet.log",
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
