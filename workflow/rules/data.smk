# Photos → captions, segments → training records. One job a shard.
SPLITS = ("train", "validation")  # of photos
ANNOTATION = [f"{OUT}/tables/annotation.csv"] if CONFIG["source"] == "miniature" else []
QUARANTINED = [file for split in SPLITS for file in shards("quarantined", split)] if TAKEN_IN else []
# The archive brings its own phrases.
NAMED = (
    [f for split in SPLITS for f in shards("phrases", split)] if CONFIG["source"] != "fastcomposer" else []
)
# Captions and masks of ten shards can be one job where there are ten, for loading BLIP-2 takes as long as a shard.
TENS = [f"{split}-{n:02d}" for split in SPLITS for n in range(stages.shards(CONFIG, split) // 10)]
TENS = TENS if CONFIG.get("ten_shards_a_job") else []
CHECKED = [ancient(f"{OUT}/data/quarantine.csv")] if TAKEN_IN else []  # before a GPU is used
REFUSE = (
    f"test -e {OUT}/data/quarantine.passed || {{{{ echo 'The photos did not pass their checks: mend what"
    f" {OUT}/logs/quarantine.log says, and run `snakemake quarantine`.' | tee {{log}}; exit 1; }}}}; "
    if TAKEN_IN
    else ""
)


if CONFIG["source"] == "miniature":

    rule render:
        output:
            raw=f"{OUT}/data/raw/{{split}}-{{shard}}.parquet",
            truth=f"{OUT}/data/truth/{{split}}-{{shard}}.parquet",
        log:
            f"{OUT}/logs/render/{{split}}-{{shard}}.log",
        benchmark:
            f"{OUT}/benchmarks/render/{{split}}-{{shard}}.tsv"
        conda:
            "../../envs/miniature.yaml"
        threads: 1
        resources:
            mem_mb=1000,
        params:
            config=settings("render"),
            code=code("render"),
        message:
            "Drawing photos {wildcards.split}-{wildcards.shard}"
        shell:
            "python -m moa render --config {params.config:q} --split {wildcards.split} --shard {wildcards.shard}"
            " --raw {output.raw} --truth {output.truth} > {log} 2>&1"

    rule render_subjects:
        output:
            f"{OUT}/subjects/{{split}}.parquet",
        log:
            f"{OUT}/logs/render_subjects/{{split}}.log",
        benchmark:
            f"{OUT}/benchmarks/render_subjects/{{split}}.tsv"
        conda:
            "../../envs/miniature.yaml"
        threads: 1
        resources:
            mem_mb=1000,
        params:
            config=settings("render-subjects"),
            code=code("render-subjects"),
            occluded="",
        message:
            "Drawing a photo of each subject of {wildcards.split}"
        shell:
            "python -m moa render-subjects --config {params.config:q} --split {wildcards.split} {params.occluded}"
            " --output {output} > {log} 2>&1"

    use rule render_subjects as render_occluded with:
        output:
            f"{OUT}/subjects/{{split}}-occluded.parquet",
        log:
            f"{OUT}/logs/render_subjects/{{split}}-occluded.log",
        benchmark:
            f"{OUT}/benchmarks/render_occluded/{{split}}.tsv"
        params:
            occluded="--occluded",
        message:
            "Drawing a partly hidden photo of each subject of {wildcards.split}"

elif "subjects" in CONFIG["data"]:

    rule celeba_subjects:
        input:
            protocol=CONFIG["protocol"],
        output:
            f"{OUT}/subjects/test.parquet",
        log:
            f"{OUT}/logs/celeba_subjects.log",
        benchmark:
            f"{OUT}/benchmarks/celeba_subjects.tsv"
        conda:
            "../../envs/models.yaml"
        threads: 1
        resources:
            mem_mb=1000,
        params:
            config=settings("celeba-subjects"),
            code=code("celeba-subjects"),
            files=subjects_stamp,
        message:
            "Taking in the protocol's test subjects"
        shell:
            "python -m moa celeba-subjects --config {params.config:q} --protocol {input.protocol} --output {output}"
            " > {log} 2>&1"

    rule held_out_subjects:
        input:
            shards("records", "validation"),
        output:
            f"{OUT}/subjects/validation.parquet",
        log:
            f"{OUT}/logs/held_out_subjects.log",
        benchmark:
            f"{OUT}/benchmarks/held_out_subjects.tsv"
        conda:
            "../../envs/models.yaml"
        threads: 1
        resources:
            mem_mb=3000,
        params:
            config=settings("held-out-subjects"),
            code=code("held-out-subjects"),
            records=all_shards("records", "validation"),
        message:
            "Choosing validation subjects among the held-out photos"
        shell:
            "python -m moa held-out-subjects --config {params.config:q} --records {params.records} --output {output}"
            " > {log} 2>&1"

else:

    rule subjects_by_hand:
        output:
            f"{OUT}/subjects/{{split}}.parquet",
        log:
            f"{OUT}/logs/subjects_by_hand/{{split}}.log",
        conda:
            "../../envs/models.yaml"
        message:
            "{output}: without the key data.subjects you write it; docs/schemas.md has its columns."
        shell:
            "echo 'Without the key data.subjects you write {output}; docs/schemas.md has its columns.' 2>&1 | tee {log}; exit 1"


if CONFIG["source"] == "shards":

    rule photos_by_hand:
        output:
            f"{OUT}/data/raw/{{split}}-{{shard}}.parquet",
        log:
            f"{OUT}/logs/photos_by_hand/{{split}}-{{shard}}.log",
        conda:
            "../../envs/models.yaml"
        message:
            "{output}: `source: shards` means that you write it; docs/schemas.md has its columns."
        shell:
            "echo '`source: shards` means that you write {output}; docs/schemas.md has its columns.' 2>&1 | tee {log}; exit 1"


if TAKEN_IN:
    INDEX = f"{OUT}/data/photos.parquet"
    ON_THE_HUB = CONFIG["source"] == "dataset" and not Path(CONFIG["data"]["photos"]["path"]).is_dir()

    # After an error the `update`d files stay, so that shards and annotations need not be made again, and the touched
    # ones are gone. That a file is gone counts only below a target or a job that runs: so the targets ask for PASSED,
    # and what asks for CHECKED alone refuses to run without it.
    rule lock_photos:
        output:
            index=update(INDEX),
            checked=touch(f"{OUT}/data/photos.checked"),
        log:
            f"{OUT}/logs/lock_photos.log",
        benchmark:
            f"{OUT}/benchmarks/lock_photos.tsv"
        conda:
            "../../envs/models.yaml"
        threads: 1
        resources:
            mem_mb=1000,
        params:
            config=settings("lock-photos"),
            code=code("lock-photos"),
            files=stamp,
        message:
            "Holding the photos against their lock"
        shell:
            "python -m moa lock-photos --config {params.config:q} --output {output.index} > {log} 2>&1"

    # Of a job below another that runs, Snakemake looks at no parameters, and leaves it out if all that lies between
    # is `ancient`. So what decides whether a shard is made again is a file of its own, with nothing above it.
    rule files_of_shard:
        output:
            f"{OUT}/data/files/{{split}}-{{shard}}.txt",
        log:
            f"{OUT}/logs/files_of_shard/{{split}}-{{shard}}.log",
        localrule: True
        conda:
            "../../envs/models.yaml"
        threads: 1
        params:
            config=settings("photos"),
            code=code("photos"),
            files=stamp,
            shards=lambda wildcards: CONFIG["shards"][wildcards.split],
        message:
            "Noting the files behind {wildcards.split}-{wildcards.shard}"
        shell:
            "echo {params.files} > {output} 2> {log}"

    # In a folder the index is `ancient`: when it is made again, only shards behind which a file has changed follow. A
    # data set on the hub has no files to look at: its shards follow the index.
    rule photos:
        input:
            index=INDEX if ON_THE_HUB else ancient(INDEX),
            files=f"{OUT}/data/files/{{split}}-{{shard}}.txt",
        output:
            raw=f"{OUT}/data/raw/{{split}}-{{shard}}.parquet",
            quarantined=f"{OUT}/data/quarantined/{{split}}-{{shard}}.parquet",
        log:
            f"{OUT}/logs/photos/{{split}}-{{shard}}.log",
        benchmark:
            f"{OUT}/benchmarks/photos/{{split}}-{{shard}}.tsv"
        conda:
            "../../envs/models.yaml"
        threads: 1
        resources:
            mem_mb=4000,
        params:
            config=settings("photos"),
            code=code("photos"),
            shards=lambda wildcards: CONFIG["shards"][wildcards.split],
        message:
            "Taking in photos {wildcards.split}-{wildcards.shard}"
        shell:
            "python -m moa photos --config {params.config:q} --split {wildcards.split} --shard {wildcards.shard}"
            " --shards {params.shards} --index {input.index} --raw {output.raw} --quarantined {output.quarantined}"
            " > {log} 2>&1"

    rule quarantine:
        input:
            index=ancient(INDEX),
            checked=f"{OUT}/data/photos.checked",
            quarantined=QUARANTINED,
        output:
            csv=update(
                report(f"{OUT}/data/quarantine.csv", category="Data", caption="../report/quarantine.rst")
            ),
            passed=touch(f"{OUT}/data/quarantine.passed"),
        log:
            f"{OUT}/logs/quarantine.log",
        benchmark:
            f"{OUT}/benchmarks/quarantine.tsv"
        conda:
            "../../envs/models.yaml"
        threads: 1
        resources:
            mem_mb=1000,
        params:
            config=settings("quarantine"),
            code=code("quarantine"),
            quarantined=all_shards("quarantined", *SPLITS),
        message:
            "Counting the photos that were put aside"
        shell:
            "python -m moa quarantine --config {params.config:q} --index {input.index}"
            " --quarantined {params.quarantined} --output {output.csv} > {log} 2>&1"


rule caption:
    input:
        raw=f"{OUT}/data/raw/{{split}}-{{shard}}.parquet",
        model=models("captioner"),
        checked=CHECKED,
        weighed=WEIGHED,
    output:
        f"{OUT}/data/captions/{{split}}-{{shard}}.parquet",
    log:
        f"{OUT}/logs/caption/{{split}}-{{shard}}.log",
    benchmark:
        f"{OUT}/benchmarks/caption/{{split}}-{{shard}}.tsv"
    conda:
        "../../envs/models.yaml"
    threads: workers("caption")
    resources:
        mem_mb=2000,
        gpu=GPU,
    params:
        config=settings("caption"),
        code=code("caption"),
    message:
        "Captioning {wildcards.split}-{wildcards.shard}"
    shell:
        REFUSE
        + "python -m moa caption --config {params.config:q} --raw {input.raw} --output {output} > {log} 2>&1"


rule segment:
    input:
        raw=f"{OUT}/data/raw/{{split}}-{{shard}}.parquet",
        model=models("segmenter"),
        checked=CHECKED,
        weighed=WEIGHED,
    output:
        f"{OUT}/data/segments/{{split}}-{{shard}}.parquet",
    log:
        f"{OUT}/logs/segment/{{split}}-{{shard}}.log",
    benchmark:
        f"{OUT}/benchmarks/segment/{{split}}-{{shard}}.tsv"
    conda:
        "../../envs/models.yaml"
    threads: workers("segment")
    resources:
        mem_mb=2000,
        gpu=GPU,
    params:
        config=settings("segment"),
        code=code("segment"),
    message:
        "Finding people in {wildcards.split}-{wildcards.shard}"
    shell:
        REFUSE
        + "python -m moa segment --config {params.config:q} --raw {input.raw} --output {output} > {log} 2>&1"


if TENS:

    ruleorder: caption_ten > caption
    ruleorder: segment_ten > segment

    use rule caption as caption_ten with:
        input:
            raw=[f"{OUT}/data/raw/{{ten}}{n}.parquet" for n in range(10)],
            model=models("captioner"),
            checked=CHECKED,
            weighed=WEIGHED,
        output:
            [f"{OUT}/data/captions/{{ten}}{n}.parquet" for n in range(10)],
        log:
            f"{OUT}/logs/caption/{{ten}}.log",
        benchmark:
            f"{OUT}/benchmarks/caption_ten/{{ten}}.tsv"
        wildcard_constraints:
            ten="|".join(TENS),
        message:
            "Captioning the ten shards {wildcards.ten}*"

    use rule segment as segment_ten with:
        input:
            raw=[f"{OUT}/data/raw/{{ten}}{n}.parquet" for n in range(10)],
            model=models("segmenter"),
            checked=CHECKED,
            weighed=WEIGHED,
        output:
            [f"{OUT}/data/segments/{{ten}}{n}.parquet" for n in range(10)],
        log:
            f"{OUT}/logs/segment/{{ten}}.log",
        benchmark:
            f"{OUT}/benchmarks/segment_ten/{{ten}}.tsv"
        wildcard_constraints:
            ten="|".join(TENS),
        message:
            "Finding people in the ten shards {wildcards.ten}*"


rule align:
    input:
        raw=f"{OUT}/data/raw/{{split}}-{{shard}}.parquet",
        captions=f"{OUT}/data/captions/{{split}}-{{shard}}.parquet",
        segments=f"{OUT}/data/segments/{{split}}-{{shard}}.parquet",
        models=models("prior", "clip_judge"),
        own=stages.align_files(CONFIG),
    output:
        records=f"{OUT}/data/records/{{split}}-{{shard}}.parquet",
        rejected=f"{OUT}/data/rejected/{{split}}-{{shard}}.parquet",
        phrases=f"{OUT}/data/phrases/{{split}}-{{shard}}.parquet",
    log:
        f"{OUT}/logs/align/{{split}}-{{shard}}.log",
    benchmark:
        f"{OUT}/benchmarks/align/{{split}}-{{shard}}.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        gpu=GPU if CONFIG["data"]["align"].get("matcher") == "clip" else 0,
    params:
        config=settings("align"),
        code=code("align"),
    message:
        "Matching words and people of {wildcards.split}-{wildcards.shard}"
    shell:
        "python -m moa align --config {params.config:q} --split {wildcards.split} --raw {input.raw}"
        " --captions {input.captions} --segments {input.segments}"
        " --records {output.records} --rejected {output.rejected} --phrases {output.phrases} > {log} 2>&1"


if CONFIG["source"] == "fastcomposer":

    ruleorder: archive_records > align

    ARCHIVE = Path(CONFIG["data"]["photos"]["path"])

    rule archive_records:
        input:
            raw=f"{OUT}/data/raw/{{split}}-{{shard}}.parquet",
            models=models("prior"),
            checked=CHECKED,
            lists=sorted(map(str, ARCHIVE.glob("image_ids*.txt"))),
        output:
            records=f"{OUT}/data/records/{{split}}-{{shard}}.parquet",
            rejected=f"{OUT}/data/rejected/{{split}}-{{shard}}.parquet",
            archived=f"{OUT}/data/archived/{{split}}-{{shard}}.parquet",
        log:
            f"{OUT}/logs/archive_records/{{split}}-{{shard}}.log",
        benchmark:
            f"{OUT}/benchmarks/archive_records/{{split}}-{{shard}}.tsv"
        conda:
            "../../envs/models.yaml"
        threads: 1
        resources:
            mem_mb=4000,
        params:
            config=settings("archive-records"),
            code=code("archive-records"),
            root=str(ARCHIVE),
            lock=CONFIG["data"]["photos"]["lock"],
            files=stamp,
        message:
            "Reading the archive's captions and masks of {wildcards.split}-{wildcards.shard}"
        shell:
            REFUSE
            + "python -m moa archive-records --config {params.config:q} --split {wildcards.split} --raw {input.raw}"
            " --root {params.root:q} --lock {params.lock:q} --records {output.records} --rejected {output.rejected}"
            " --archived {output.archived} > {log} 2>&1"


rule data_card:
    input:
        records=[file for split in SPLITS for file in shards("records", split)],
        rejected=[file for split in SPLITS for file in shards("rejected", split)],
        quarantined=QUARANTINED,
        passed=[f"{OUT}/data/quarantine.passed"] if QUARANTINED else [],
        phrases=NAMED,
    output:
        json=f"{OUT}/data/card.json",
        markdown=report(f"{OUT}/data/card.md", category="Data", caption="../report/data.rst"),
        sheet=report(f"{OUT}/data/card.png", category="Data", caption="../report/data.rst"),
    log:
        f"{OUT}/logs/data_card.log",
    benchmark:
        f"{OUT}/benchmarks/data_card.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=2000,
    params:
        config=settings("card"),
        code=code("card"),
        records=all_shards("records", *SPLITS),
        rejected=all_shards("rejected", *SPLITS),
        more=lambda wildcards: " ".join(
            f"--{name} {all_shards(name, *SPLITS)(wildcards)}"
            for name, files in (("quarantined", QUARANTINED), ("phrases", NAMED))
            if files
        ),
    message:
        "Describing the training data"
    shell:
        "python -m moa card --config {params.config:q} --records {params.records} --rejected {params.rejected}"
        " --json-path {output.json} --markdown {output.markdown} --sheet {output.sheet} {params.more}"
        " > {log} 2>&1"


rule annotation_errors:
    input:
        raw=shards("raw", "validation"),
        truth=shards("truth", "validation"),
        captions=shards("captions", "validation"),
        segments=shards("segments", "validation"),
        records=shards("records", "validation"),
        train=shards("truth", "train"),
        models=models("prior", "clip_judge"),
        own=stages.align_files(CONFIG),
    output:
        report(f"{OUT}/tables/annotation.csv", category="Data", caption="../report/annotation.rst"),
    log:
        f"{OUT}/logs/annotation_errors.log",
    benchmark:
        f"{OUT}/benchmarks/annotation_errors.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        mem_mb=2000,
    params:
        config=settings("annotation"),
        code=code("annotation"),
        raw=all_shards("raw", "validation"),
        truth=all_shards("truth", "validation"),
        train=all_shards("truth", "train"),
        captions=all_shards("captions", "validation"),
        segments=all_shards("segments", "validation"),
        records=all_shards("records", "validation"),
    message:
        "Measuring the annotators against the truth"
    shell:
        "python -m moa annotation --config {params.config:q} --raw {params.raw} --truth {params.truth}"
        " --captions {params.captions} --segments {params.segments} --records {params.records}"
        " --train {params.train} --output {output} > {log} 2>&1"
