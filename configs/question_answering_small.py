"""A small encoder that finds answers in State of the Union addresses: real text, SYNTHETIC questions made by rule.

    launch/local.sh -m fastlm.train --config configs/question_answering_small.py

Hardware: any CPU; made for 2 cores. Time: about 10 minutes there. Reaches: see experiments/RESULTS.md; saying the first
span of the kind that is asked for is right 28% of the time.
"""

from ml_collections import ConfigDict

from configs import lm_small


def get_config():
    config = lm_small.get_config()
    config.task = ConfigDict({"name": "question_answering", "stride": 32, "most_answer_tokens": 12})
    config.model.update(family="encoder", head="tokens", token_types=2, dropout=0.1, logit_softcap=0.0)
    config.data.update(sources=(("synthetic_questions", 1.0),), length=256, buckets=(128, 160, 192, 256), batch_size=32)
    config.training.update(steps=1000, accumulation=2)
    config.evaluation.update(every=250, batches=0, overlap=0)
    config.sample.prompts = ()
    return config
