"""TinyBERT's second stage: its student learns a task, inside first, then what is predicted (arXiv 1909.10351).

    launch/local.sh -m fastlm.train --config configs/classify_finetuned.py --workdir runs/classify_mlm \\
        --config.init.source=runs/mlm_small --config.model.pooling=mean
    launch/local.sh -m experiments.distill --config configs/distill/tinybert_general.py
    launch/local.sh -m experiments.augment_texts --workdir runs/mlm_small --source state_of_the_union_passages \\
        --folder runs/augmented
    launch/local.sh -m experiments.distill --config configs/distill/tinybert_task.py

On augmented rows, one run: for 10/13 of it hidden states, embeddings and scores of attention, then KL alone (the paper:
10 epochs, then 3). The paper's 4-layer student keeps 96.8% of BERT-base on GLUE, 7.5x smaller and 9.4x faster; its
6-layer one is on par. Left out: GloVe neighbours in augmentation, and a search over rates; projections are made anew.
Hardware: 2 cores. Not measured at this size yet.
"""

from ml_collections import ConfigDict

from configs import classify_finetuned


def get_config():
    config = classify_finetuned.get_config()
    config.init.source = "runs/tinybert_general"
    config.model = ConfigDict({"pooling": "mean", "dropout": 0.1})
    config.data.sources = (("jsonl:runs/augmented/*.jsonl", 1.0),)
    config.training.steps = 2600
    config.evaluation.every = config.checkpoint.every = 200
    config.wrappers = ("distilled",)
    inside = (("hidden(distance='cosine')", 2), ("embeddings", 1), ("attention_scores", 1))
    config.distilled.update(
        teachers=("runs/classify_mlm",),
        terms=(
            *((term, f"switch(start={weight}, end=0, until=0.77)") for term, weight in inside),
            ("forward_kl", "switch(start=0, end=1, until=0.77)"),
        ),
    )
    return config
