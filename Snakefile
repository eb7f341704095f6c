# The one runner, on a laptop as on a cluster: every rule is one notebook, executed by papermill.
# Started by `make study` (notebooks/study/workflow/commands.py), which also clears up after a kill.

import shlex
import sys
from pathlib import Path

from study.provenance.freshness import fingerprint
from study.training.checkpoints import own_code
from study.stages.tiers import NOTEBOOKS, load_tier, network_seed, notebook_sha256

tier = load_tier(
    config.get("tier", "demo"), Path(workflow.basedir), Path(config.get("work", "work"))
)
if "only" in config:
    tier = tier.only(config["only"])
# What papermill injects into every notebook.
tier.write_parameter_files()
study = tier.folder
threads_of_a_run = tier.setting("finetuning", "threads")


def resources_of(stage):
    """What a job asks a cluster for, in MB and minutes; --set-resources changes it.

    The stages with a network take an hour on a GPU at full size.
    """
    return {"gpu": tier.gpus_of(stage), "mem_mb": 16000, "runtime": 240}


START = "{dataset}-{backbone}-fold{fold}"
NETWORK = START + "-network{network}"
POINT = START + "-seed{seed}"

# The executed copy is a log, which Snakemake keeps when a notebook fails. A cell may take 12 hours.
# What it says stays in a file where it fails, for the launcher, which has the last word.
PYTHON = shlex.quote(sys.executable)
PAPERMILL = (
    PYTHON + " -m papermill notebooks/{params.notebook:q}.ipynb {log:q} -f {params.file:q}"
    " --cwd notebooks --execution-timeout 43200 --no-progress-bar --autosave-cell-every 0"
    " 2> {log:q}.failed && rm -f {log:q}.failed"
)
# Where the clock was set back, inputs are newer than what was just made from them: Snakemake would
# delete that. They get its date; by their checksums, nothing else is made again.
DATES = " && find {input:q} -newer {output:q} -exec touch -r {output:q} {{}} +"


def parameters(stage, job):
    """Parameters of a rule, whose jobs run again when one of them is another.

    They are what papermill injects, the cells of the notebook, and the code of the stage.
    """

    def file(wildcards):
        return str(study.parameter_file(job.format(**dict(wildcards.items()))))

    notebook = NOTEBOOKS[stage]
    return {
        "notebook": notebook,
        "cells": notebook_sha256(Path(workflow.basedir, "notebooks", f"{notebook}.ipynb")),
        "code": fingerprint(stage),
        "file": file,
        "network": lambda wildcards: own_code(dict(wildcards.items()).get("backbone", "")),
        "values": lambda wildcards: Path(file(wildcards)).read_text(),
    }


def committed_weights(wildcards):
    """The network that comes with the repository, where the tier starts from it."""
    if tier.setting("pretraining", "weights") != "committed":
        return []
    point = wildcards.dataset, wildcards.backbone, int(wildcards.fold), int(wildcards.network)
    return tier.manifest.network(*point).weights


def scored_network(wildcards):
    """The scoring of the network that a fine-tuning starts from."""
    network = network_seed(tier.pretraining_seed, int(wildcards.seed))
    point = wildcards.dataset, wildcards.backbone, wildcards.fold, network
    return study.scores(*point) / "probabilities.json"


wildcard_constraints:
    dataset="[^/]+",
    backbone="[^/]+",
    fold="[0-9]+",
    network="[0-9]+",
    seed="[0-9]+",


localrules:
    all,
    publish,


rule all:
    input:
        study.root / "published.txt",


rule data:
    output:
        study.prepared("{dataset}") / "patches.csv",
    log:
        study.executed_notebook(NOTEBOOKS["data"] + "-{dataset}"),
    params:
        **parameters("data", NOTEBOOKS["data"] + "-{dataset}"),
        definition=lambda wildcards: tier.manifest.dataset(wildcards.dataset).model_dump_json(),
    shell:
        PAPERMILL


rule pretraining:
    input:
        patches=rules.data.output,
        committed=committed_weights,
    output:
        study.pretrained("{dataset}", "{backbone}", "{fold}", "{network}")
        / "weights.safetensors",
    log:
        study.executed_notebook(NOTEBOOKS["pretraining"] + "-" + NETWORK),
    params:
        **parameters("pretraining", NOTEBOOKS["pretraining"] + "-" + NETWORK),
    threads: threads_of_a_run
    resources:
        **resources_of("pretraining"),
    shell:
        PAPERMILL + DATES


rule scoring:
    input:
        weights=rules.pretraining.output,
    output:
        study.scores("{dataset}", "{backbone}", "{fold}", "{network}") / "probabilities.json",
    log:
        study.executed_notebook(NOTEBOOKS["scoring"] + "-" + NETWORK),
    params:
        **parameters("scoring", NOTEBOOKS["scoring"] + "-" + NETWORK),
    threads: threads_of_a_run
    resources:
        **resources_of("scoring"),
    shell:
        PAPERMILL + DATES


# All methods of a seed in one notebook: they share data and initial weights, and starting a kernel
# takes as long as a short run. What each method wrote is not an output here, since Snakemake would
# delete it before going on with a notebook that was killed; `finetune` knows what is done.
rule finetuning:
    input:
        probabilities=scored_network,
    output:
        study.runs("{dataset}", "{backbone}", "{fold}", "{seed}") / "scores.csv",
    log:
        study.executed_notebook(NOTEBOOKS["finetuning"] + "-" + POINT),
    params:
        **parameters("finetuning", NOTEBOOKS["finetuning"] + "-" + POINT),
    threads: threads_of_a_run
    resources:
        **resources_of("finetuning"),
    shell:
        PAPERMILL + DATES


rule evaluation:
    input:
        scores=[study.runs(*point) / "scores.csv" for point in tier.points()],
    output:
        study.evaluation / "summary.csv",
    log:
        study.executed_notebook(NOTEBOOKS["evaluation"]),
    params:
        **parameters("evaluation", NOTEBOOKS["evaluation"]),
    threads: threads_of_a_run
    shell:
        PAPERMILL + DATES


rule publish:
    input:
        rules.evaluation.output,
    output:
        study.root / "published.txt",
    params:
        tier=tier.name,
    shell:
        PYTHON + " -m study publish {params.tier:q} > {output:q}"
        " 2> {output:q}.failed && rm -f {output:q}.failed" + DATES
