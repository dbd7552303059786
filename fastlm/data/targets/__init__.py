"""A teacher's sparse targets for every row of a training stream, made once and kept on disk.

`Key` says what they are of, `write` makes them from batches and a function of a batch, `Store` reads those of any row,
and `WithTargets` joins them to the batches of a run.
"""

from fastlm.data.targets.batches import WithTargets
from fastlm.data.targets.manifest import Key
from fastlm.data.targets.store import Store
from fastlm.data.targets.writing import Report, write

__all__ = ["Key", "Report", "Store", "WithTargets", "write"]
