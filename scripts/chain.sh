#!/usr/bin/env bash
# The quickstart's chain typed by hand: one process per stage, in order. `onebase run` does the same and skips what is
# fresh. With several GPUs, name an accelerate config: accelerate launch --config_file recipes/accelerate/ddp.yaml ...
set -euo pipefail
recipe=${1:-recipes/quickstart.yaml}
launch="accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"

$launch -m pipeline.runs.worker "$recipe" pretrain   # next-token loss on documents: a fresh adapter on the frozen base
$launch -m pipeline.runs.worker "$recipe" sft        # dialogues: goes on with pretrain's adapter
$launch -m pipeline.runs.worker "$recipe" reward     # comparisons: sft's trunk under a new score head
$launch -m pipeline.runs.worker "$recipe" dpo        # comparisons: goes on with sft's adapter, which is also its reference
$launch -m pipeline.runs.worker "$recipe" ppo        # prompts: goes on with sft's adapter, paid by the reward model
