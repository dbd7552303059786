"""A step of decoding at the end of caches of two sizes, by attention kind: milliseconds a token.

    launch/local.sh -m experiments.benchmarks.decoding_steps [--kinds full,latent] [--slots 2048,16384] [--rows 1,8]

Two layers of width 256, four heads, a vocabulary of 512, float32, random weights; 32 tokens are written greedily near
the end of the cache, five times, of which the first compiles; medians. A minute with the defaults on 2 quiet cores.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.long_range import split_kinds
from fastlm.decoding import rules, sample
from fastlm.models import Compute, Model, ModelConfig

STEPS, TURNS, VOCABULARY = 32, 5, 512


def milliseconds(attention: str, rows: int, slots: int) -> float:
    """Returns the median time of a token."""
    cfg = ModelConfig(vocab_size=VOCABULARY, max_length=slots, layers=2, width=256, heads=4, attention=attention)
    model = Model(cfg, Compute(dtype="float32"))
    params, cache = model.init(jax.random.key(0)), model.empty_cache(rows, slots)
    cache = cache.replace(length=jnp.full((rows,), slots - STEPS * TURNS))
    logits, keys = jnp.zeros((rows, VOCABULARY)), sample.row_keys(0, range(rows))
    allowed, written = rules.make(VOCABULARY, STEPS), np.zeros(rows, np.int32)
    taken = []
    for _ in range(TURNS):
        begun = time.perf_counter()
        cache, logits, tokens, _ = sample.decode(
            model, params, STEPS, sample.Sampling(temperature=0.0), allowed, cache, logits, keys, written
        )
        tokens.block_until_ready()
        taken.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(taken[1:]) / STEPS


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="full,latent,hierarchical(block=32),dilated,block_sparse")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--slots", default="2048,16384")
    asked = parser.parse_args()
    slots = [int(text) for text in asked.slots.split(",")]
    print("| kind, rows | " + " | ".join(f"{count} slots" for count in slots) + " |\n|---|" + "---:|" * len(slots))
    for kind in split_kinds(asked.kinds):
        for rows in map(int, asked.rows.split(",")):
            found = " | ".join(f"{milliseconds(kind, rows, count):.2f}" for count in slots)
            print(f"| {kind}, {rows} | {found} |", flush=True)


if __name__ == "__main__":
    main()
