"""A student of the summariser of functions learns what the teacher would have said to its own texts (arXiv 2306.08543).

    launch/local.sh -m fastlm.train --config configs/lm_code.py
    launch/local.sh -m fastlm.train --config configs/summarize_small.py
    launch/local.sh -m experiments.distill --config configs/distill/summarize_minillm.py

In the spirit of MiniLLM: reverse KL, in half of the batches on what the student writes, in the others on the data,
whose targets count there too. Left out of it: the long part of its policy gradient with length normalisation (reverse
KL of each token is the single-step part), sampling mixed with the teacher, a corpus of plain text beside. There,
students of 120M to 13B parameters follow instructions better than with forward KL or on the teacher's texts.
Hardware: 2 cores. Not measured at this size yet.
"""

from ml_collections import ConfigDict

from configs import summarize_small


def get_config():
    config = summarize_small.get_config()
    config.init.update(source="runs/summarize_small", layers="evenly")
    config.model = ConfigDict({"layers": 2, "dropout": 0.1})
    config.wrappers = ("distilled",)
    config.distilled.update(teachers=("runs/summarize_small",), terms=(("reverse_kl", 1.0), ("cross_entropy", 0.3)))
    config.distilled.on_policy.share = 0.5
    return config
