"""The reference model: addresses, Python's standard library and the Old Testament in one model.

    launch/local.sh -m fastlm.train --config configs/lm_reference.py

Later work compresses this model. Hardware: 2 cores. Time: about 1.6 hours there, resumable. Reaches: test 1.120
bits/byte on addresses, 0.903 on Python, 1.226 on the Old Testament.
"""

from configs import lm_small


def get_config():
    config = lm_small.get_config()
    config.tokenizer.vocab_size = 8192
    config.model.update(layers=6, width=384, heads=6, max_length=1024)
    config.data.update(
        sources=(("state_of_the_union", 0.45), ("python_stdlib", 0.4), ("old_testament_en", 0.15)), length=512
    )
    config.training.update(steps=2000, accumulation=8)
    config.evaluation.update(every=400, overlap=256)
    config.checkpoint.every = 200
    return config
