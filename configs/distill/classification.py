"""A classifier with 39% of fine-tuned MiniLM's parameters behind the embeddings, which starts from them.

    launch/local.sh -m fastlm.convert --from FOLDER_OF_MINILM --to runs/minilm
    launch/local.sh -m fastlm.train --config configs/classify_finetuned.py
    launch/local.sh -m experiments.distill --config configs/distill/classification.py
    launch/local.sh -m experiments.distill --config configs/distill/classification.py --compare --seeds 0,1,2

Three of six layers with two thirds of their feed-forward units; labels, KL (arXiv 1503.02531) and hidden states. For a
measure: TinyBERT's 6 of 12 layers are on par with BERT-base on GLUE (1909.10351), DistilBERT's keep 97% (1910.01108).
Other rows: --config.data.sources and --config.task.label as for the teacher.
Hardware: 2 cores. Not measured at this size yet.
"""

from configs import classify_finetuned


def get_config():
    config = classify_finetuned.get_config()
    config.init.update(source="runs/classify_finetuned", layers="evenly", feed_forward_width=1024)
    config.model.layers = 3
    config.wrappers = ("distilled",)
    config.distilled.update(
        teachers=("runs/classify_finetuned",),
        terms=(("cross_entropy", 0.3), ("forward_kl(temperature=2.0)", 0.7), ("hidden", 0.3)),
    )
    return config
