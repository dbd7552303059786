"""A language model of Python, trained on the standard library of the interpreter that runs it.

    launch/local.sh -m fastlm.train --config configs/lm_code.py

Hardware: any CPU; made for 2 cores. Time: about 20 minutes there. Reaches: 0.94 bits/byte on
test files.
"""

from configs import lm_small


def get_config():
    config = lm_small.get_config()
    config.data.sources = (("python_stdlib", 1.0),)
    config.training.steps = 2400
    config.sample.update(prompts=("def read_lines(path):\n", "class Queue:\n"), tokens=150, temperature=0.6)
    return config
