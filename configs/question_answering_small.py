"""A small encoder that finds answers in State of the Union addresses: real text, SYNTHETIC questions made by rule.

    launch/local.sh -m fastlm.train --config configs/question_answering_small.py

Hardware: any CPU; made for 2 cores. Time: about 15 minutes there. Reaches: the exact answer to 87% of the questions;
saying the first span of the kind that is asked for is right 28% of the time.

Before it can answer, a model from scratch has to learn to find words of the question in the context. What is meant
to help is set here: cloze questions, many rows per step, wide heads, embeddings that move slower than the layers,
and weights that do not start too small.
"""

from ml_collections import ConfigDict

from configs import lm_small


def get_config():
    config = lm_small.get_config()
    config.task = ConfigDict({"name": "question_answering", "stride": 32, "most_answer_tokens": 12, "cloze": 0.6})
    config.model.update(
        family="encoder", head="tokens", token_types=2, layers=3, width=128, heads=2, head_dim=64, init_scale=0.1
    )
    config.model.update(dropout=0.05, logit_softcap=0.0)
    config.data.update(
        sources=(("synthetic_questions", 1.0),), length=256, buckets=(128, 160, 192, 256), batch_size=128
    )
    config.optimizer.muon_adamw_rate = 0.1
    config.training.update(steps=1200, accumulation=4)
    config.evaluation.update(every=200, batches=0, overlap=0)
    config.sample.prompts = ()
    return config
