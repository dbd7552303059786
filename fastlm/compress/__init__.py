"""What makes a model smaller, or cheaper to train, while it learns: functions from `Task` to `Task`.

`config.wrappers` names them in order, innermost first; each has a section of its own in the config.
"""

from fastlm.compress.lora import Lora

WRAPPERS = {"lora": Lora}
