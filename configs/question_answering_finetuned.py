"""Answers in a text, from a pretrained encoder (MiniLM): real addresses, SYNTHETIC questions made by rule.

    launch/local.sh -m fastlm.convert --from FOLDER_OF_MINILM --to runs/minilm
    launch/local.sh -m fastlm.train --config configs/question_answering_finetuned.py

Hardware: any CPU; made for 2 cores. Time: about 10 minutes there. Reaches: 93% exact match; saying the first span of
the kind that is asked for is right 28% of the time. SQuAD, once TFDS has prepared it:
--config.data.sources="(('squad', 1.0),)" --config.task.answer=answers/text
--config.task.answer_start=answers/answer_start
"""

from ml_collections import ConfigDict

from configs import classify_finetuned


def get_config():
    config = classify_finetuned.get_config()
    config.task = ConfigDict({"name": "question_answering", "stride": 32, "most_answer_tokens": 12})
    config.model = ConfigDict({"dropout": 0.1, "pooler": ""})  # as BertForQuestionAnswering, which has none
    config.data.update(sources=(("synthetic_questions", 1.0),), length=256, buckets=(128, 160, 192, 256))
    config.schedule.peak = 2e-4
    config.training.update(steps=600, accumulation=4)
    return config
