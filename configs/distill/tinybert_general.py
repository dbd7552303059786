"""TinyBERT's first stage: a narrow student learns a masked language model from the inside (arXiv 1909.10351).

    launch/local.sh -m fastlm.train --config configs/mlm_small.py
    launch/local.sh -m experiments.distill --config configs/distill/tinybert_general.py

Hidden states, embeddings (through learned projections) and scores of attention before the softmax, on text; nothing of
what is predicted, so the head learns nothing, and the terms say how it goes. tinybert_task.py goes on, and has the
paper's numbers. The paper: 3 epochs of Wikipedia, 256 rows of 128 tokens at a time. Otherwise than there, each pair of
layers has a projection of its own, words are hidden, and of hidden states directions are compared: BERT's are
normalized, those of layers with norms before them grow, and squared errors drown all else (15,000 in a small run).
Hardware: 2 cores. Not measured at this size yet.
"""

from configs import mlm_small


def get_config():
    config = mlm_small.get_config()
    config.tokenizer.update(kind="checkpoint", path="runs/mlm_small", vocab_size=0)
    config.model.update(layers=2, width=128, feed_forward_width=512)
    config.wrappers = ("distilled",)
    config.distilled.update(
        teachers=("runs/mlm_small",),
        terms=(("hidden(distance='cosine')", 2.0), ("embeddings", 1.0), ("attention_scores", 1.0)),
    )
    return config
