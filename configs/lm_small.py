"""The main job: a language model that learns to write addresses to Congress in minutes.

    launch/local.sh -m fastlm.train --config configs/lm_small.py

Hardware: any CPU; made for 2 cores. Time: at most 10 minutes there. Reaches: 1.17 bits/byte
on test addresses.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.tokenizer.vocab_size = 4096
    config.model.update(
        layers=4,
        width=256,
        heads=4,
        feed_forward="relu2",
        norm="rms_norm",
        qk_norm=True,
        residual_init="zero",
        logit_softcap=15.0,
        max_length=512,
    )
    config.data.update(length=256, batch_size=16)
    config.optimizer.update(name="muon", weight_decay=0.05)
    config.schedule.update(name="wsd", peak=0.01, warmup=0.02, decay_fraction=0.4, final=0.0)
    # On a CPU, the activations of four rows stay in the cache; set accumulation to 1 on an accelerator.
    config.training.update(steps=1000, accumulation=4)
    config.evaluation.update(every=200, batches=16, overlap=128)
    config.checkpoint.every = 200
    config.sample.update(
        prompts=("Fellow citizens of the Senate and House of Representatives:", "The state of our Union"), tokens=150
    )
    return config
