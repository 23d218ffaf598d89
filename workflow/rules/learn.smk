# Trainings that see each subject by itself, from its photo, and no records: shards of the subjects that are to be shown,
# once with each of `train_seeds`.
# What a subject taught lies outside the declared output, so a killed job goes on with the subject it was at.
LEARNED = [f"{n:03d}" for n in range(CONFIG["shards"].get("subjects", 1))]


ruleorder: join_subjects > train


rule learn_subjects:
    input:
        requests=lambda wildcards: [
            file for kind in METHODS[wildcards.method] for file in parts(kind, "requests")
        ],
        subjects=f"{OUT}/subjects/test.parquet",
        models=models("prior"),
        weighed=WEIGHED,
    output:
        directory(f"{OUT}/learned/{{method}}{{seed}}-{{shard}}"),
    log:
        f"{OUT}/logs/learn/{{method}}{{seed}}-{{shard}}.log",
    benchmark:
        f"{OUT}/benchmarks/learn_subjects/{{method}}{{seed}}-{{shard}}.tsv"
    wildcard_constraints:
        method="|".join(PER_SUBJECT),
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=3000,
        gpu=GPU,
    params:
        config=trains,
        work=works,
        code=lambda wildcards: code(f"train-{wildcards.method}")(wildcards),
        shard=lambda wildcards: int(wildcards.shard),
        shards=len(LEARNED),
    message:
        "Learning subjects: {wildcards.method}{wildcards.seed}, shard {wildcards.shard}"
    shell:
        "python -m moa train-{wildcards.method} --config {params.config:q} --change {params.work:q} --requests {input.requests}"
        " --subjects {input.subjects} --shard {params.shard} --shards {params.shards} --output {output} > {log} 2>&1"


rule join_subjects:
    input:
        expand(f"{OUT}/learned/{{{{method}}}}{{{{seed}}}}-{{shard}}", shard=LEARNED),
    output:
        directory(f"{OUT}/train/{{method}}{{seed}}"),
    log:
        f"{OUT}/logs/learn/{{method}}{{seed}}.log",
    benchmark:
        f"{OUT}/benchmarks/join_subjects/{{method}}{{seed}}.tsv"
    wildcard_constraints:
        method="|".join(PER_SUBJECT),
    conda:
        "../../envs/models.yaml"
    params:
        code=lambda wildcards: code(f"join-{wildcards.method}")(wildcards),
    message:
        "Joining the subjects that {wildcards.method}{wildcards.seed} learned"
    shell:
        "python -m moa join-{wildcards.method} --parts {input} --output {output} > {log} 2>&1"
