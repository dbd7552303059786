"""What each of several ways to change a trained model costs on the test split, a line as soon as it is known."""

from collections.abc import Iterable, Sequence

from absl import flags
from jax.sharding import Mesh

from fastlm.training import quality
from fastlm.training.restore import Restored

SHOWN = ("bits_per_byte", "accuracy", "loss")


def define_flags() -> None:
    """Defines what the table is of: --score_batches."""
    flags.DEFINE_integer("score_batches", 0, "batches of the test split to score; 0 for all", lower_bound=0)


def table(
    whole: Restored, mesh: Mesh, columns: Sequence[str], ways: Iterable[tuple[Sequence[str], Restored]], batches: int
) -> None:
    """Prints the model as it is, then each way.

    Args:
      columns: names of the cells that describe a way; those that are numbers end with a colon.
      ways: (cells, the changed model); made one at a time, as they are asked for.
      batches: of the test split to score; 0 for all.
    """
    asked = quality.Asked(batches=batches)
    before = quality.score(whole, mesh, asked).metrics
    names = [name for name in SHOWN if name in before][:2]
    row = lambda cells, found: print(
        "| " + " | ".join([*cells, *(f"{found[name]:.4f}" for name in names)]) + " |", flush=True
    )
    print("| " + " | ".join([*(name.rstrip(":") for name in columns), *names]) + " |")
    print("|" + "".join("---:|" if name.endswith(":") else "---|" for name in columns) + "---:|" * len(names))
    row(["(whole)", *[""] * (len(columns) - 1)], before)
    for cells, changed in ways:
        row(cells, quality.score(changed, mesh, asked).metrics)
