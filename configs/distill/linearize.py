"""The main job's model with another attention: learned from itself, block by block, then end to end.

    launch/local.sh -m fastlm.train --config configs/lm_small.py
    launch/local.sh -m experiments.linearize --config configs/distill/linearize.py --blocks schedule.peak=0.02
    launch/local.sh -m experiments.linearize --config configs/distill/linearize.py --blocks schedule.peak=0.02 \\
        --folder runs/converted/hybrid --config.model.attention="('local(window=64)','full')" --lengths 2048,8192

What is made anew wants a higher rate (--blocks schedule.peak) than weights that are trained already. Another teacher:
--config configs/distill/linearize.py:runs/other. Without the first stage: -m fastlm.train with the same config.
Hardware: 2 cores. Not measured at this size yet.
"""

from ml_collections import ConfigDict

from configs import lm_small


def get_config(teacher="runs/lm_small"):
    config = lm_small.get_config()
    config.init.source = teacher
    config.model = ConfigDict({"attention": "gated_linear"})
    config.wrappers = ("distilled",)
    config.distilled.update(teachers=(teacher,), terms=(("cross_entropy", 0.5), ("forward_kl(temperature=1.0)", 0.5)))
    config.schedule.peak = 0.003
    config.training.steps = 300
    config.evaluation.every = 100
    config.checkpoint.every = 100
    return config
