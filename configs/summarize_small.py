"""Says in a sentence what a Python function does, starting from the model of configs/lm_code.py.

    launch/local.sh -m fastlm.train --config configs/lm_code.py
    launch/local.sh -m fastlm.train --config configs/summarize_small.py

Hardware: any CPU; made for 2 cores. Time: about 12 minutes there. Reaches: ROUGE-1 0.197 (the function's name: 0.143).
Other texts to shorten:
--config.data.sources="(('jsonl:mine.jsonl', 1.0),)" --config.task.source=article --config.task.target=headline
"""

from ml_collections import ConfigDict

from configs import code_small


def get_config():
    config = code_small.get_config()
    config.task = ConfigDict(
        {
            "name": "sequence_to_sequence",
            "source": "function",
            "target": "docstring",
            "separator": '\n"""',
            "scores": ("rouge",),
            "label_smoothing": 0.1,
        }
    )
    config.data.source_length = 384
    config.training.steps = 600
    config.evaluation.every = 100
    return config
