"""A classifier with 40% of fine-tuned MiniLM's parameters behind the embeddings, cut out of it and taught by it.

    launch/local.sh -m fastlm.convert --from FOLDER_OF_MINILM --to runs/minilm
    launch/local.sh -m fastlm.train --config configs/classify_finetuned.py
    launch/local.sh -m experiments.prune --workdir runs/classify_finetuned \\
        --heads 8 --feed_forward_width 384 --to runs/classify_cut
    launch/local.sh -m experiments.distill --config configs/distill/classification.py
    launch/local.sh -m experiments.distill --config configs/distill/classification.py --compare --seeds 0,1,2

Eight of twelve heads and a quarter of the feed-forward units of each layer; labels, KL (arXiv 1503.02531), hidden
states, and most texts with words of others in them. Fewer layers of whole width are worse, before and after.
For a measure: TinyBERT's 6 of 12 layers are on par with BERT-base on GLUE (1909.10351), DistilBERT's keep 97%
(1910.01108). Other rows: --config.data.sources and --config.task.label as for the teacher.
Hardware: 2 cores. Time: about 20 minutes there. What it reaches: see experiments/RESULTS.md.
"""

from ml_collections import ConfigDict

from configs import classify_finetuned


def get_config():
    config = classify_finetuned.get_config()
    config.init.source = "runs/classify_cut"
    config.wrappers = ("distilled",)
    config.distilled.update(
        teachers=("runs/classify_finetuned",),
        terms=(("cross_entropy", 0.1), ("forward_kl(temperature=2.0)", 0.9), ("hidden", 0.5)),
        noise={"rows": 0.7, "words": 0.5},
    )
    config.model = ConfigDict({"dropout": 0.0})  # its own section, or the value of base.py would not count
    config.schedule.peak = 2e-4
    config.training.steps = 2400
    config.evaluation.every = config.checkpoint.every = 400
    return config
