"""English to Spanish with the parts of the original Transformer: LayerNorm, ReLU, sinusoidal positions, AdamW.

    launch/local.sh -m fastlm.train --config configs/translate_transformer.py

Hardware: any CPU; made for 2 cores. Time: about 15 minutes there. Reaches: BLEU 16.7, chrF 38.6 written greedily, as
torch.nn.Transformer does with the same batches (16.6, 38.1).
"""

from configs import translate_small


def get_config():
    config = translate_small.get_config()
    config.task.beams = 1
    config.model.update(
        encoder_layers=3,
        layers=3,
        norm="layer_norm",
        feed_forward="relu",
        feed_forward_width=1024,
        bias=True,
        positions="sinusoidal",
        embedding_scale=16.0,
        init_scale=0.0625,
        residual_init="scaled",
        qk_norm=False,
        dropout=0.1,
    )
    config.data.length = 64
    config.data.buckets = (32, 64)
    config.optimizer.update(name="adamw", b2=0.98, weight_decay=0.01)
    config.schedule.update(name="linear", peak=1e-3, warmup=0.1, final=0.0)
    config.training.steps = 2000
    config.checkpoint.every = 200
    return config
