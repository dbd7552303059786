"""A small bidirectional encoder that guesses hidden words of State of the Union addresses.

    launch/local.sh -m fastlm.train --config configs/mlm_small.py

Hardware: any CPU; made for 2 cores. Time and what it reaches: see experiments/RESULTS.md.
"""

from ml_collections import ConfigDict

from configs import lm_small


def get_config():
    config = lm_small.get_config()
    config.task = ConfigDict({"name": "masked_language_modeling", "mask_share": 0.3})
    config.model.update(family="encoder", head="masked_language_model")
    config.evaluation.overlap = 0
    config.sample.prompts = ()
    return config
