# Weights that no hub pins: FaceNet's, which IP needs, and LPIPS's two files. They are fetched, or asked for, and held
# against their lock before a GPU is used, as photos are: `snakemake lock_models`. Models of the hub are pinned by their revision.
if FACENET:

    # `update`: Snakemake removes nothing that somebody put there.
    rule fetch_identity:
        output:
            update(FACENET),
        log:
            f"{OUT}/logs/fetch_identity.log",
        benchmark:
            f"{OUT}/benchmarks/fetch_identity.tsv"
        localrule: True
        conda:
            "../../envs/models.yaml"
        params:
            config=settings("fetch-identity"),
            code=code("fetch-identity"),
        message:
            "Fetching {output}"
        shell:
            "python -m moa fetch-identity --config {params.config:q} > {log} 2>&1"


if LPIPS:

    rule lpips_by_hand:
        output:
            update(LPIPS),
        log:
            f"{OUT}/logs/lpips_by_hand.log",
        localrule: True
        conda:
            "../../envs/models.yaml"
        message:
            "{output}: models.lpips means that you put them there; config/paper.yaml says where they are from."
        shell:
            "echo 'models.lpips means that you put {output} there; config/paper.yaml says where they are from.'"
            " 2>&1 | tee {log}; exit 1"


# After an error the `update`d file stays, so that what is `ancient` to it need not be made again, trainings least of all;
# the touched one is gone, and asked for by every target, so that the error comes again. There is a job also where no such
# weights are named: with a changed set of inputs, naming some later would make everything anew.
rule lock_models:
    input:
        FACENET,
        LPIPS,
    output:
        checked=update(f"{OUT}/models.checked"),
        passed=touch(f"{OUT}/models.passed"),
    log:
        f"{OUT}/logs/lock_models.log",
    benchmark:
        f"{OUT}/benchmarks/lock_models.tsv"
    localrule: True
    conda:
        "../../envs/models.yaml"
    params:
        config=settings("lock-models"),
        code=code("lock-models"),
    message:
        "Holding weights against their lock"
    shell:
        "python -m moa lock-models --config {params.config:q} > {log} 2>&1 && touch {output.checked}"
