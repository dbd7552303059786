"""About 100M parameters on C4, for one TPU v5e-8 host or one 80 GB GPU.

    python -m fastlm.data.prepare c4/en        # once, where there is a network; needs tensorflow-cpu
    launch/local.sh -m fastlm.train --config configs/lm_base.py --config.mesh.fsdp=8 --config.mesh.data=1

Hardware: 8 TPU v5e chips or an H100. Not run to its end here: it builds, and the same step compiles for
TPU v5e ahead of time at a smaller size (tests).
`--config.data.sources="(('state_of_the_union', 1.0),)"` tries it offline.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.tokenizer.vocab_size = 32_768
    config.model.update(
        layers=12,
        width=768,
        heads=6,
        head_dim=128,
        feed_forward="swiglu",
        norm="rms_norm",
        qk_norm=True,
        max_length=2048,
    )
    config.compute.update(remat="products", loss_chunk=8192)
    config.data.update(sources=(("c4/en", 1.0),), length=1024, batch_size=256)
    config.optimizer.update(name="muon", weight_decay=0.05)
    config.schedule.update(name="wsd", peak=0.01, warmup=300, decay_fraction=0.2, final=0.0)
    config.training.steps = 20_000
    config.evaluation.update(every=1000, batches=20, final_split="validation")
    config.checkpoint.every = 1000
    return config
