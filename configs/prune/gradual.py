"""A trained language model loses 70% of its weights while it trains on: cubic, by magnitude (arXiv 1710.01878).

    launch/local.sh -m fastlm.train --config configs/lm_small.py
    launch/local.sh -m fastlm.train --config configs/prune/gradual.py

Other ways at the same length: --config.pruned.method=straight_through; --config.pruned.score=movement (2005.07683);
--config.pruned.allocation=2:4. For a measure: T5's loss on C4 rose from 2.58 to 2.95 by magnitude and 2.71 straight
through (JaxPruner's README, share of zeros not stated).
Hardware: 2 cores. Time: about 5 minutes there.
"""

from configs import lm_small


def get_config():
    config = lm_small.get_config()
    config.init.source = "runs/lm_small"
    config.training.steps = 300
    # a fifth of the rate that the model was trained with, as after pruning (Minitron, 2407.14679)
    config.schedule.peak = 0.002
    config.evaluation.every = config.checkpoint.every = 100
    config.wrappers = ("pruned",)
    config.pruned.update(method="masked", sparsity="cubic(start=0.0, end=0.7, until=0.6)", every=10)
    return config
