"""A trained language model learns which heads and feed-forward units it can do without: a gate on each.

    launch/local.sh -m fastlm.train --config configs/lm_small.py
    launch/local.sh -m fastlm.train --config configs/prune/gates.py
    launch/local.sh -m experiments.prune --workdir runs/gates --dead --to runs/gates_cut
    launch/local.sh -m experiments.distill --config configs/prune/rounds.py --config.init.source=runs/gates_cut

Half of the numbers of what has gates go, with the whole model for a teacher (CoFi, arXiv 2204.00408: 2.1 times as fast
at 60% less of BERT for about one point; Sheared LLaMA, 2310.06694).
Hardware: 2 cores. Time: about 9 minutes there. What it reaches: see experiments/RESULTS.md.
"""

from configs.prune import rounds


def get_config():
    config = rounds.get_config()
    config.training.steps = 400
    config.wrappers = ("distilled", "gated")
    config.gated.target = "linear(start=0.0, end=0.5, until=0.5)"
    # Gates move a few units in the whole run, weights a hundredth.
    config.optimizer.groups = (("gated", {"rate": 20.0, "decay": 0.0}),)
    return config
