"""A language model of whole addresses: rows of 4,096 tokens, most of them one address from its first word on.

    launch/local.sh -m fastlm.train --config configs/long_range/language_model.py
    launch/local.sh -m fastlm.train --config configs/long_range/language_model.py:paper

Hardware: a CPU for the small one, a TPU or GPU for `:paper` (16,384 tokens a row). Neither has been run to its end.
Not a task of Long Range Arena. Another attention: --config.model.attention=linear
"""

from configs import lm_small


def get_config(size="small"):
    config = lm_small.get_config()
    config.model.update(max_length=4096, attention="local(window=256)")
    config.data.update(length=4096, batch_size=4)
    config.evaluation.overlap = 2048
    if size == "paper":
        config.model.update(layers=12, width=768, heads=6, head_dim=128, max_length=16_384)
        config.compute.update(remat="products", loss_chunk=8192)
        config.data.update(length=16_384, batch_size=16)
        config.evaluation.overlap = 8192
    return config
