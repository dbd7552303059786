"""A language model with two thin matrices in the place of each learns on, from the whole one.

    launch/local.sh -m fastlm.train --config configs/lm_small.py
    launch/local.sh -m experiments.low_rank --workdir runs/lm_small --share 0.5 --to runs/low_rank
    launch/local.sh -m fastlm.train --config configs/low_rank/recovery.py

The factors themselves learn. For a measure: SVD-LLM (arXiv 2403.07378) recovers by LoRA, which goes with
--config.wrappers="('lora', 'distilled')".
Hardware: 2 cores. Time: about 7 minutes there. What it reaches: see experiments/RESULTS.md.
"""

from configs.prune import rounds


def get_config():
    config = rounds.get_config()
    config.init.source = "runs/low_rank"
    return config
