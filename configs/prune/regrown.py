"""A language model that has 70% zeros from its first step on, which change places: RigL (arXiv 1911.11134).

    launch/local.sh -m fastlm.train --config configs/prune/regrown.py

For a measure: ResNet-50 at 80% zeros reaches 74.6 on ImageNet, the dense model 76.8 (1911.11134).
Hardware: 2 cores. Time: about 15 minutes there.
"""

from configs import lm_small


def get_config():
    config = lm_small.get_config()
    config.wrappers = ("pruned",)
    config.pruned.update(method="regrown", sparsity="0.7", allocation="erdos_renyi", every=20, until=0.75)
    return config
