# The miniature's own models, from nothing: `snakemake pretrain`. The main job starts from the shipped ones; set
# `weights: results/pretrain/weights` to start from these.
PRETRAINED = "results/pretrain"
PARTS = ["vae", "decoder", "clip", "unet", "details", "finish", "text", "polish", "props", "props_decoder"]
NEEDS = {
    "decoder": ["vae"],
    "unet": ["vae", "clip"],
    "details": ["vae", "clip", "unet"],
    "finish": ["vae", "clip", "details"],
    "text": ["clip"],
    "polish": ["vae", "text", "finish"],
    "props": ["vae", "text", "polish"],
    "props_decoder": ["decoder"],
    "image_encoder": ["clip"],
}
WHOLE = ["image_encoder", "identity", "attributes", "clip_judge", "segmenter", "captioner"]


wildcard_constraints:
    model="|".join(PARTS + WHOLE),


rule pretrain:
    input:
        f"{PRETRAINED}/gates.csv",
        f"{PRETRAINED}/cards.done",


rule pretrain_model:
    input:
        unpack(
            lambda wildcards: {part: f"{PRETRAINED}/parts/{part}" for part in NEEDS.get(wildcards.model, [])}
        ),
    output:
        directory(f"{PRETRAINED}/parts/{{model}}"),
    log:
        f"{PRETRAINED}/logs/{{model}}.log",
    benchmark:
        f"{PRETRAINED}/benchmarks/{{model}}.tsv"
    conda:
        "../../envs/models.yaml"
    threads: lambda wildcards: CONFIG["pretrain"][wildcards.model].get("threads", 2)
    resources:
        mem_mb=6000,
    params:
        config=settings("pretrain"),
        code=code("pretrain"),
        parts=lambda wildcards, input: " ".join(f"--{name} {path}" for name, path in input.items()),
        cache=lambda wildcards: f"{PRETRAINED}/corpus",
        checkpoints=lambda wildcards: f"{PRETRAINED}/runs",
    message:
        "Pretraining the miniature's {wildcards.model}"
    shell:
        "python -m moa pretrain --config {params.config:q} --model {wildcards.model} {params.parts}"
        " --cache {params.cache} --checkpoints {params.checkpoints} --output {output} > {log} 2>&1"


rule assemble_prior:
    input:
        **{part: f"{PRETRAINED}/parts/{part}" for part in PARTS},
    output:
        directory(f"{PRETRAINED}/weights/prior"),
    log:
        f"{PRETRAINED}/logs/assemble.log",
    benchmark:
        f"{PRETRAINED}/benchmarks/assemble.tsv"
    conda:
        "../../envs/models.yaml"
    params:
        code=code("assemble"),
    message:
        "Joining the prior's parts"
    shell:
        "python -m moa assemble --vae {input.vae} --decoder {input.decoder} --clip {input.clip} --unet {input.unet}"
        " --details {input.details} --finish {input.finish} --text {input.text} --polish {input.polish} --props {input.props}"
        " --props-decoder {input.props_decoder} --prior {output} > {log} 2>&1"


rule publish_model:
    input:
        f"{PRETRAINED}/parts/{{model}}",
    output:
        directory(f"{PRETRAINED}/weights/{{model}}"),
    log:
        f"{PRETRAINED}/logs/publish-{{model}}.log",
    wildcard_constraints:
        model="|".join(WHOLE),
    conda:
        "../../envs/models.yaml"
    message:
        "Putting the {wildcards.model} beside the other weights"
    shell:
        "cp -r {input} {output} > {log} 2>&1"


rule gates:
    input:
        expand(f"{PRETRAINED}/weights/{{model}}", model=["prior", *WHOLE]),
    output:
        csv=f"{PRETRAINED}/gates.csv",
        samples=f"{PRETRAINED}/prior.png",
    log:
        f"{PRETRAINED}/logs/gates.log",
    benchmark:
        f"{PRETRAINED}/benchmarks/gates.tsv"
    conda:
        "../../envs/models.yaml"
    threads: 2
    resources:
        mem_mb=4000,
    params:
        config=settings("gates"),
        code=code("gates"),
        weights=lambda wildcards, input: Path(input[0]).parent,
        cache=lambda wildcards: f"{PRETRAINED}/corpus",
    message:
        "Measuring the pretrained models on held-out identities"
    shell:
        "python -m moa gates --config {params.config:q} --weights {params.weights} --cache {params.cache}"
        " --output {output.csv} --samples {output.samples} > {log} 2>&1"


rule model_cards:
    input:
        f"{PRETRAINED}/gates.csv",
    output:
        touch(f"{PRETRAINED}/cards.done"),
    log:
        f"{PRETRAINED}/logs/cards.log",
    benchmark:
        f"{PRETRAINED}/benchmarks/cards.tsv"
    conda:
        "../../envs/models.yaml"
    params:
        code=code("cards"),
        weights=lambda wildcards: f"{PRETRAINED}/weights",
    message:
        "Writing the model cards"
    shell:
        "python -m moa cards --weights {params.weights} --gates {input} > {log} 2>&1"


# The weaker prior that the repository shipped before the trainings `text`, `polish` and `props`: what the ablation
# `another-prior` trains on.
rule earlier_prior:
    output:
        expand(
            "{folder}/{file}",
            folder=EARLIER_PRIOR,
            file=[
                "model_index.json",
                "scheduler/scheduler_config.json",
                *[f"{part}/config.json" for part in ("text_encoder", "unet", "vae")],
                "text_encoder/model.safetensors",
                *[f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")],
                *[f"tokenizer/{file}" for file in ("tokenizer.json", "tokenizer_config.json")],
            ],
        ),
    log:
        "results/logs/earlier_prior.log",
    benchmark:
        "results/benchmarks/earlier_prior.tsv"
    conda:
        "../../envs/miniature.yaml"
    threads: 1
    params:
        commit="dcb4354f5b5043c3510fd01928682f2227f4843e",
        shipped="moa/miniature/weights/prior",
        parts="model_index.json scheduler text_encoder tokenizer unet vae",
        folder=lambda wildcards: EARLIER_PRIOR,
    message:
        "Taking an earlier prior from the history of the repository"
    shell:
        "(git cat-file -e {params.commit} || (echo 'The ablation another-prior takes an earlier prior from the history"
        " of this repository, which is not here: clone it whole (git fetch --unshallow), or remove the ablation.';"
        " exit 1)) > {log} 2>&1; git archive {params.commit}:{params.shipped} {params.parts} 2>> {log}"
        " | tar --extract --directory {params.folder} --touch 2>> {log}"
