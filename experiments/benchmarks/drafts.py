"""Speculative decoding beside plain decoding: the same greedy text, tokens a second and tokens a reading, by turns.

    launch/local.sh -m experiments.benchmarks.drafts --workdir runs/lm_small --drafts lookup,runs/draft \\
        --prompts prompts.txt [--span 4] [--tokens 128]

Each prompt (a line of the file) is written alone, as a reader waits for it, by plain decoding and with each draft in
turn; all in one process, float32, fused products. Medians over turns, and of the ratios to plain
decoding in the same turn. A text that differs from the plain one is an error.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from fastlm.decoding import drafts, sample, speculative
from fastlm.parallel import mesh
from fastlm.training import restore

GREEDY = sample.Sampling(temperature=0.0)


def main() -> None:
    """Times, checks and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--drafts", required=True, help="lookup or a workdir, several with commas")
    parser.add_argument("--prompts", required=True, type=Path)
    parser.add_argument("--span", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    read = lambda workdir: restore.restore(workdir, mesh.make(), dtype="float32", fused=True)
    target = read(asked.workdir)
    rows = [sample.prompt_ids(target.tokenizer, line) for line in asked.prompts.read_text().splitlines() if line]
    known = {}
    for name in asked.drafts.split(","):
        draft = None if name == "lookup" else read(name)
        known[name] = (drafts.LookupDraft(), None) if draft is None else (drafts.ModelDraft(draft.model), draft.params)

    def plain(row: list[int]) -> tuple[np.ndarray, float]:
        chunks = sample.generate(target.model, target.params, [row], max_tokens=asked.tokens, how=GREEDY)
        return np.concatenate(list(chunks), axis=1)[0], 1.0

    def drafted(name: str, row: list[int]) -> tuple[np.ndarray, float]:
        options = {"max_tokens": asked.tokens, "how": GREEDY, "span": asked.span}
        chunks = speculative.generate(target.model, target.params, *known[name], [row], **options)
        tokens = np.concatenate([np.asarray(chunk[0]) for chunk in chunks])
        return tokens, chunks.tokens_per_reading

    seconds: dict[str, list[float]] = {name: [] for name in ("plain", *known)}
    readings: dict[str, list[float]] = {name: [] for name in seconds}
    for turn in range(asked.turns + 1):
        for name, own in seconds.items():
            begun, texts, accepted = time.perf_counter(), [], []
            for row in rows:
                tokens, each = plain(row) if name == "plain" else drafted(name, row)
                texts.append(tokens)
                accepted.append(each)
            own += [time.perf_counter() - begun] if turn else []  # the first compiles
            readings[name] = accepted
            if name == "plain":
                wanted = texts
            elif any(one.tolist() != other.tolist() for one, other in zip(wanted, texts, strict=True)):
                raise SystemExit(f"{name}: writes another text than plain decoding")
    print(f"| {len(rows)} x {asked.tokens} tokens | tok/s | of plain | tokens a reading |\n|---|---:|---:|---:|")
    for name, own in seconds.items():
        rate = statistics.median(len(rows) * asked.tokens / value for value in own)
        ratio = statistics.median(a / b for a, b in zip(seconds["plain"], own))
        each = f"{statistics.mean(readings[name]):.2f} ({min(readings[name]):.2f} - {max(readings[name]):.2f})"
        print(f"| {name} | {rate:.0f} | {ratio:.2f}x | {each} |")


if __name__ == "__main__":
    main()
