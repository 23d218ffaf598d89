"""Mixture-of-Attention, from photos to tables. `snakemake --cores all` runs the miniature preset.

The paper preset: `snakemake --cores all --configfile config/paper.yaml`.
More of the miniature, in hours: `snakemake --cores all full --configfile config/full.yaml`.
"""

from snakemake.utils import min_version

from moa import runlock, stages
from moa.config import check, complete
from moa.evaluation import protocol

min_version("9.27")


# A configuration with the key `preset` stands alone; one without it changes the miniature's.
config.update(complete(config))
SCHEMA = workflow.source_path("workflow/schemas/config.schema.json")
check(config, SCHEMA)
for changed in stages.every_trial(config):
    check(changed, SCHEMA)
protocol.load(config["protocol"])

if workflow.is_main_process:
    runlock.start_run()


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/generate.smk"
include: "workflow/rules/learn.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/trials.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/benchmark.smk"


rule all:
    default_target: True
    input:
        f"{OUT}/report.html",
        f"{OUT}/samples.parquet",
        TABLES,
        FIGURES,
        NOTEBOOKS,
        f"{OUT}/data/card.md",
        PASSED,


rule tables:
    input:
        TABLES,
        PASSED,


rule full:
    input:
        rules.all.input,
        f"{OUT}/made.json",
