"""Handwritten digits, read pixel by pixel: 784 numbers from 0 to 255 in a row.

    launch/local.sh -m fastlm.train --config configs/long_range/digits.py
    launch/local.sh -m fastlm.train --config configs/long_range/digits.py:paper

Hardware: any CPU for the small one, made for 2 cores; `:paper` (widths of Long Range Arena's images, arXiv 2011.04006)
is for a TPU or GPU and has not been run. Another attention: --config.model.attention="local(window=64)"
"""

from configs.long_range import list_ops


def get_config(size="small"):
    config = list_ops.get_config()
    config.task.text = "image"
    config.tokenizer.update(kind="numbers", vocab_size=257)
    config.model.update(pooling="mean", layers=2, width=64, max_length=786)
    config.data.update(sources=(("digits", 1.0),), length=786, buckets=(786,), batch_size=16)
    config.training.steps = 1000
    if size == "paper":
        config.model.update(layers=3, heads=4, feed_forward_width=128, dropout=0.3)
        config.data.batch_size = 256
        config.optimizer.name = "adamw"
        config.schedule.update(peak=5e-4, warmup=0.005, final=0.0)
        config.training.steps = 6_250
    return config
