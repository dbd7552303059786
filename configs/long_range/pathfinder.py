"""Pathfinder: do two discs lie on one dashed path? 32 x 32 pixels, read one by one.

    launch/local.sh -m fastlm.train --config configs/long_range/pathfinder.py
    launch/local.sh -m fastlm.train --config configs/long_range/pathfinder.py:paper

Hardware: any CPU for the small one, made for 2 cores, which need a few minutes to make the images, once; `:paper`
(200,000 images, an hour to make) is for a TPU or GPU and has not been run.
"""

from configs.long_range import digits


def get_config(size="small"):
    config = digits.get_config()
    config.model.max_length = 1026
    config.data.update(sources=(("pathfinder", 1.0),), length=1026, buckets=(1026,))
    config.training.steps = 1500
    if size == "paper":
        config.model.update(layers=4, width=128, heads=8, feed_forward_width=128, dropout=0.1)
        config.data.update(sources=(("pathfinder_paper", 1.0),), batch_size=512)
        config.optimizer.name = "adamw"
        config.schedule.update(peak=1e-3, warmup=0.005, final=0.0)
        config.training.steps = 62_400
    return config
