"""When was it said, to the year? A small encoder dates passages of presidents' addresses between 1790 and 1989.

    launch/local.sh -m fastlm.train --config configs/regression_small.py

Hardware: any CPU; made for 2 cores. Time and what it reaches: see experiments/RESULTS.md.
"""

from ml_collections import ConfigDict

from configs import classify_small


def get_config():
    config = classify_small.get_config()
    config.task = ConfigDict({"name": "regression", "text": "text", "target": "year"})
    return config
