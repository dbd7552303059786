"""Answers from a student with 39% of fine-tuned MiniLM's parameters behind the embeddings, which starts from them.

    launch/local.sh -m fastlm.convert --from FOLDER_OF_MINILM --to runs/minilm
    launch/local.sh -m fastlm.train --config configs/question_answering_finetuned.py
    launch/local.sh -m experiments.distill --config configs/distill/question_answering.py

Questions are SYNTHETIC, see the teacher's config. DistilBERT, distilled from a teacher fine-tuned on SQuAD in this last
step too, has F1 86.9 where BERT-base has 88.5 (arXiv 1910.01108). The teacher that is trained from scratch:
--config.init.source=runs/question_answering_small --config.init.feed_forward_width=0 --config.model.layers=2
--config.distilled.teachers="('runs/question_answering_small',)"
Hardware: 2 cores. Not measured at this size yet.
"""

from configs import question_answering_finetuned


def get_config():
    config = question_answering_finetuned.get_config()
    config.init.update(source="runs/question_answering_finetuned", layers="evenly", feed_forward_width=1024)
    config.model.layers = 3
    config.wrappers = ("distilled",)
    config.distilled.update(
        teachers=("runs/question_answering_finetuned",),
        terms=(("cross_entropy", 0.3), ("forward_kl(temperature=2.0)", 0.7), ("hidden", 0.3)),
    )
    return config
