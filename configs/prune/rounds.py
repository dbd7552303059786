"""What is left of a language model after a cut learns from the whole one: a round of experiments.prune_rounds.

    launch/local.sh -m fastlm.train --config configs/lm_small.py
    launch/local.sh -m experiments.prune_rounds --config configs/prune/rounds.py --from runs/lm_small \\
        --budgets 0.7,0.5 --folder runs/rounds

A fifth of the rate that the model was trained with, and its whole for a teacher (Minitron, arXiv 2407.14679). Another
model: --config.distilled.teachers="('runs/other',)", and its data.
Hardware: 2 cores. Time: about 7 minutes a round there. What it reaches: see experiments/RESULTS.md.
"""

from ml_collections import ConfigDict

from configs import lm_small


def get_config():
    config = lm_small.get_config()
    config.init.source = "runs/lm_small"  # each round has its own
    config.model = ConfigDict({})  # sizes are those of the cut
    config.training.steps = 300
    config.schedule.peak = 0.002
    config.evaluation.every = config.checkpoint.every = 100
    config.sample.prompts = ()
    config.wrappers = ("distilled",)
    config.distilled.update(
        teachers=("runs/lm_small",),
        terms=(("cross_entropy", 0.3), ("forward_kl(temperature=1.0)", 0.7)),
    )
    return config
