"""A masked language model's student with half of its layers, which starts from them (DistilBERT, arXiv 1910.01108).

    launch/local.sh -m fastlm.train --config configs/mlm_small.py
    launch/local.sh -m experiments.distill --config configs/distill/distilbert.py

As there: 5 x KL at a temperature of 2, 2 x the loss of the masked words, 1 x the cosine of the last hidden states. The
paper's student has 40% fewer parameters than BERT-base, is 60% faster and keeps 97% of its score on GLUE.
Hardware: 2 cores. Not measured at this size yet.
"""

from ml_collections import ConfigDict

from configs import mlm_small


def get_config():
    config = mlm_small.get_config()
    config.init.update(source="runs/mlm_small", layers="evenly")
    config.model = ConfigDict({"layers": 2})
    config.schedule.peak = 0.005
    config.wrappers = ("distilled",)
    config.distilled.update(
        teachers=("runs/mlm_small",),
        terms=(
            ("forward_kl(temperature=2.0)", 5.0),
            ("cross_entropy", 2.0),
            ("hidden(layers='last', distance='cosine')", 1.0),
        ),
    )
    return config
