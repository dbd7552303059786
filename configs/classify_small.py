"""When was it said? A small encoder puts passages of presidents' addresses into eight eras of 25 years.

    launch/local.sh -m fastlm.train --config configs/classify_small.py

Hardware: any CPU; made for 2 cores. Time and what it reaches: see experiments/RESULTS.md.
"""

from ml_collections import ConfigDict

from configs import lm_small


def get_config():
    config = lm_small.get_config()
    config.task = ConfigDict({"name": "classification", "text": "text", "label": "era", "label_smoothing": 0.1})
    config.model.update(family="encoder", head="sequence", pooling="mean", dropout=0.2, logit_softcap=0.0)
    config.data.update(sources=(("state_of_the_union_passages", 1.0),), length=128, batch_size=32)
    config.schedule.peak = 0.003
    config.training.update(steps=1000, accumulation=1)
    config.evaluation.update(every=100, batches=0, overlap=0)
    config.sample.prompts = ()
    return config
