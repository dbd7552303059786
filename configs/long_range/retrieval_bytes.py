"""Are two passages of the same address? Both in one row, byte by byte.

    launch/local.sh -m fastlm.train --config configs/long_range/retrieval_bytes.py
    launch/local.sh -m fastlm.train --config configs/long_range/retrieval_bytes.py:paper

Hardware: any CPU for the small one, made for 2 cores; `:paper` (the model of Long Range Arena, arXiv 2011.04006, on
these texts) is for a TPU or GPU and has not been run.
"""

from configs.long_range import text_bytes


def get_config(size="small"):
    config = text_bytes.get_config()
    config.task.update(text="first", pair="second", label="label")
    config.model.token_types = 2
    config.data.sources = (("retrieval_bytes", 1.0),)
    if size == "paper":
        config.model.update(pooling="first", positions="learned", layers=4, width=128, heads=4, feed_forward_width=512)
        config.data.batch_size = 32
        config.optimizer.name = "adamw"
        config.schedule.update(name="rsqrt", peak=5.6e-4, warmup=1000, timescale=1000)
        config.training.steps = 5000
    return config
