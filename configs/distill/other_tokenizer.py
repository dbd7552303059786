"""A student with a vocabulary of its own, a quarter of its teacher's, taught on spans of text (arXiv 2503.20083).

    launch/local.sh -m fastlm.train --config configs/lm_small.py
    launch/local.sh -m experiments.distill --config configs/distill/other_tokenizer.py
    launch/local.sh -m experiments.distill --config configs/distill/other_tokenizer.py --compare --seeds 0,1,2

The teacher may be any language model, a converted one too: --config.distilled.teachers="('runs/smollm2',)".
Hardware: 2 cores. Not measured at this size yet.
"""

from configs import lm_small


def get_config():
    config = lm_small.get_config()
    config.tokenizer.vocab_size = 1024
    config.model.update(layers=3, width=192, heads=3)
    config.wrappers = ("distilled",)
    config.distilled.update(
        teachers=("runs/lm_small",),
        terms=(("cross_entropy", 0.5), ("span_likelihood(temperature=10.0)", 0.5), ("shared_tokens", 0.5)),
    )
    return config
