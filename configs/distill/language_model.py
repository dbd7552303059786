"""The reference model's student with a third of its parameters, on the same data (arXiv 1503.02531, 1910.01108).

    launch/local.sh -m fastlm.train --config configs/lm_reference.py
    launch/local.sh -m experiments.distill --config configs/distill/language_model.py
    launch/local.sh -m experiments.distill --config configs/distill/language_model.py --compare --seeds 0,1,2

DistilGPT-2 lost 29% of GPT-2's perplexity on WikiText-103 with 66% of its parameters (21.1 against 16.3). Another
teacher: --config.distilled.teachers="('runs/lm_small',)" --config.tokenizer.path=runs/lm_small.
Hardware: 2 cores. Not measured at this size yet.
"""

from configs import lm_reference


def get_config():
    config = lm_reference.get_config()
    config.tokenizer.update(kind="checkpoint", path="runs/lm_reference", vocab_size=0)
    config.model.update(layers=4, width=256, heads=4, feed_forward_width=768)
    config.wrappers = ("distilled",)
    config.distilled.update(
        teachers=("runs/lm_reference",),
        terms=(("cross_entropy", 0.3), ("forward_kl(temperature=1.0)", 0.7)),
    )
    return config
