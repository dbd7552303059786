"""A language model that was pruned at once learns on with its zeros.

    launch/local.sh -m fastlm.train --config configs/lm_small.py
    launch/local.sh -m experiments.sparsify --workdir runs/lm_small --score wanda --sparsity 0.7 --to runs/pruned
    launch/local.sh -m fastlm.train --config configs/prune/at_once.py

With a teacher: --config.wrappers="('pruned', 'distilled')" --config.distilled.teachers="('runs/lm_small',)".
Zeros of trained weights in what they were earlier (arXiv 1803.03635): experiments.sparsify --rewind 200.
Hardware: 2 cores. Time: about 5 minutes there.
"""

from configs.prune import gradual


def get_config():
    config = gradual.get_config()
    config.init.source = "runs/pruned"
    config.pruned.method = "kept"
    return config
