"""When was it said? Passages of a thousand to four thousand bytes of presidents' addresses into eras, byte by byte.

    launch/local.sh -m fastlm.train --config configs/long_range/text_bytes.py
    launch/local.sh -m fastlm.train --config configs/long_range/text_bytes.py:paper

Hardware: any CPU for the small one, made for 2 cores; `:paper` (the model of Long Range Arena, arXiv 2011.04006, on
these texts) is for a TPU or GPU and has not been run. IMDB, once TFDS has prepared it:
--config.data.sources="(('imdb_reviews', 1.0),)" --config.task.label=label --config.evaluation.split=test
"""

from configs.long_range import list_ops


def get_config(size="small"):
    config = list_ops.get_config()
    config.task.label = "era"
    config.model.update(pooling="mean", positions="rotary", layers=2, width=64, heads=2, max_length=4002)
    config.data.update(sources=(("text_bytes", 1.0),), length=4002, buckets=(2002, 3002, 4002), batch_size=8)
    config.training.steps = 400
    config.evaluation.update(every=200, batches=0)
    config.checkpoint.every = 200
    if size == "paper":
        config.model.update(
            pooling="first", positions="learned", layers=4, width=256, heads=4, feed_forward_width=1024, dropout=0.1
        )
        config.data.batch_size = 32
        config.optimizer.name = "adamw"
        config.schedule.update(name="rsqrt", peak=5.6e-4, warmup=8000, timescale=8000)
        config.training.steps = 20_000
    return config
