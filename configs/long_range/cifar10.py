"""CIFAR-10 in gray, read pixel by pixel: Long Range Arena's own image task, 1,024 numbers in a row.

    launch/local.sh -m fastlm.data.prepare cifar10     # once, where there is a network
    launch/local.sh -m fastlm.train --config configs/long_range/cifar10.py
    launch/local.sh -m fastlm.train --config configs/long_range/cifar10.py:paper

Hardware: a TPU or GPU; neither size has been run. The last 5,000 training images validate, as in the paper (arXiv
2011.04006). `--config.data.sources="(('digits', 1.0),)" --config.evaluation.split=validation` tries it offline.
"""

from configs.long_range import digits


def get_config(size="small"):
    config = digits.get_config(size)
    config.model.max_length = 1026
    config.data.update(sources=(("cifar10", 1.0),), split="train[:45000]", length=1026, buckets=(1026,))
    config.evaluation.split = "train[45000:]"
    if size == "paper":
        config.training.steps = 35_000
    return config
