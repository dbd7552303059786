"""A language model so small that it trains in seconds: for tests and for trying things out.

    launch/local.sh -m fastlm.train --config configs/lm_tiny.py

Hardware: any CPU. Time: under half a minute, compilation included. Reaches: about 3.3 bits/byte, no more.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.tokenizer.kind = "bytes"
    config.model.update(layers=2, width=64, heads=4, max_length=256)
    config.compute.dtype = "float32"
    config.data.update(length=64, batch_size=8)
    config.training.steps = 60
    config.schedule.peak = 3e-3
    config.evaluation.update(every=30, batches=4, final_split="validation")
    config.checkpoint.every = 30
    config.logging.every = 10
    config.sample.update(prompts=("Fellow citizens",), tokens=60)
    return config
