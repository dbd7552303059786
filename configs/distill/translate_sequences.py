"""A translator with half of its teacher's decoder learns the teacher's own translations (arXiv 1606.07947).

    launch/local.sh -m fastlm.train --config configs/translate_small.py
    launch/local.sh -m experiments.teacher_texts --workdir runs/translate_small --folder runs/teacher_texts --beams 5
    launch/local.sh -m fastlm.train --config configs/distill/translate_sequences.py

Sequence-level distillation: the best of the teacher's beams stand in for the data's targets; no teacher is loaded, so
`fastlm.train` trains it. The paper's student runs 10 times faster than its teacher with little loss, and gains 4.2 BLEU
without and 1.7 with beams over one that learned from the data; --config.task.beams=1 scores without.
Hardware: 2 cores. Not measured at this size yet.
"""

from configs.distill import translate


def get_config():
    config = translate.get_config()
    config.wrappers = ()
    config.data.sources = (("jsonl:runs/teacher_texts/*.jsonl", 1.0),)
    return config
