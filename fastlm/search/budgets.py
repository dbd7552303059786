"""One option of each of several groups, so that what they cost stays within a budget and what they lose is least.

Notable: the multiple-choice knapsack problem, solved exactly up to the grain of costs, which are rounded up, so that
the budget is never passed.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm.errors import UserError

GRAINS = 4000  # of a budget


@dataclasses.dataclass(frozen=True)
class Option:
    """Something to choose.

    Attributes:
      what: it is.
      cost: in what the budget counts, not negative.
      loss: added up over what is chosen.
    """

    what: Any
    cost: float
    loss: float


def choose(groups: Sequence[Sequence[Option]], budget: float, where: str) -> list[Option]:
    """Returns the option of each group.

    Raises:
      UserError: the cheapest options cost more than the budget; says what they cost.
    """
    cheapest = [min(group, key=lambda option: (option.cost, option.loss)) for group in groups]
    least = math.fsum(option.cost for option in cheapest)
    if least > budget * (1 + 1e-9):
        raise UserError(f"{where}: {budget:.4g} cannot be met; the least that there is takes {least:.4g}")
    lossless = [min(group, key=lambda option: (option.loss, option.cost)) for group in groups]
    if math.fsum(option.cost for option in lossless) <= budget:
        return lossless
    # Grains are of what is to be had above the least, and each group's cheapest option costs none of them.
    if budget <= least:
        return cheapest
    grain = (budget - least) / GRAINS
    best = np.zeros(GRAINS + 1)  # the least loss of the groups so far, with so many grains
    taken: list[np.ndarray] = []
    for group, first in zip(groups, cheapest):
        costs = [math.ceil((option.cost - first.cost) / grain - 1e-9) for option in group]
        found = np.full((len(group), GRAINS + 1), np.inf)
        for number, (option, cost) in enumerate(zip(group, costs)):
            if cost <= GRAINS:
                found[number, cost:] = best[: GRAINS + 1 - cost] + option.loss
        taken.append(np.argmin(found, axis=0))
        best = np.min(found, axis=0)
    chosen, left = [], GRAINS
    for group, first, table in zip(reversed(groups), reversed(cheapest), reversed(taken)):
        option = group[table[left]]
        left -= math.ceil((option.cost - first.cost) / grain - 1e-9)
        chosen.append(option)
    return chosen[::-1]
