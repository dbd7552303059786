"""ListOps: what is the result of nested operations on digits? One character per symbol.

    launch/local.sh -m fastlm.train --config configs/long_range/list_ops.py
    launch/local.sh -m fastlm.train --config configs/long_range/list_ops.py:paper

Hardware: any CPU for the small one (64 to 512 symbols), made for 2 cores; `:paper` (500 to 2,000 symbols, the model of
Long Range Arena, arXiv 2011.04006) is for a TPU or GPU and has not been run. Another attention:
--config.model.attention="local(window=64)"
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size="small"):
    config = base.get_config()
    config.task = ConfigDict({"name": "classification", "text": "text", "label": "label"})
    config.tokenizer.kind = "bytes"
    config.model.update(family="encoder", head="sequence", pooling="first", positions="learned")
    config.model.update(layers=2, width=128, heads=2, max_length=514)
    config.data.update(sources=(("list_ops", 1.0),), length=514, buckets=(130, 258, 386, 514), batch_size=32)
    config.optimizer.name = "muon"
    config.schedule.update(peak=5e-3, warmup=0.05, final=0.0)
    config.training.steps = 1500
    config.evaluation.update(every=500, batches=20)
    config.checkpoint.every = 500
    config.logging.update(every=20, tensorboard=False)
    if size == "paper":
        config.model.update(layers=6, width=512, heads=8, feed_forward_width=2048, max_length=2002)
        config.data.update(sources=(("list_ops_paper", 1.0),), length=2002, buckets=(1026, 2002))
        config.optimizer.name = "adamw"
        config.schedule.update(name="rsqrt", peak=1.6e-3, warmup=1000, timescale=1000)
        config.training.steps = 5000
    return config
