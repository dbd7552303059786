"""Beam search beside transformers, on the same weights: the same hypotheses, and how fast.

    launch/local.sh -m experiments.benchmarks.beam_search --torch-python PYTHON_THAT_HAS_TORCH_AND_TRANSFORMERS

About six minutes on 2 cores. First tiny T5, Marian and BART models of transformers, drawn at random, are searched
by both under several settings, and tokens and scores compared. Then the speed: a Marian-like model, 6 + 6 layers x 512,
8 heads, feed-forward 2048, vocabulary 32,000 (tied), 16 sources of 29 to 40 tokens, 4 beams, 64 new
tokens each, forced by forbidding the end token so that both do the same work. Weights travel as the folder that
transformers saves. Notable: each variant lives in a process of its own that waits between its turns, so that all
see the same minutes of a machine that others may be using; ratios are medians of per-turn ratios. Compilation
(ours) and the first call (theirs) are not timed.
"""

import argparse
import functools
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from fastlm.measurement import workers

PAD, END, FIRST = 0, 1, 2
VARIANTS = ("transformers float32", "fastlm float32", "transformers bfloat16", "fastlm bfloat16")
_T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2}
_BART = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
_LARGE = {
    "vocab_size": 32_000,
    "d_model": 512,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048,
    "max_position_embeddings": 512,
}
# Name: (classes in transformers, options, standard deviation of the weights)
MODELS: dict[str, tuple[str, dict[str, Any], float]] = {
    "t5": ("T5", _T5, 0.3),
    "t5 gated": ("T5", _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, 0.3),
    "marian": ("Marian", _BART | {"activation_function": "swish", "scale_embedding": True}, 0.3),
    "bart": ("Bart", _BART, 0.3),
    "large": ("Marian", _LARGE | {"activation_function": "swish", "scale_embedding": True}, 0.02),
}
_PLAIN = {"beams": 4, "n_best": 4, "max_tokens": 16, "start": PAD, "end": END}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": _PLAIN,
    "sums": _PLAIN | {"length_penalty": 0.0, "stop_when": "impossible"},
    "long": _PLAIN | {"length_penalty": 2.0, "stop_when": "impossible"},
    "full": _PLAIN | {"beams": 3, "n_best": 2, "stop_when": "full"},
    "ruled": _PLAIN | {"start": END, "forced_first": FIRST, "forbidden": [PAD, 5], "min_tokens": 4},
}
EARLY_STOPPING = {"full": True, "unlikely": False, "impossible": "never"}
Found = list[list[tuple[list[int], float]]]


def save_models(folder: Path) -> None:
    """Draws every model with transformers and saves it as FOLDER/name."""
    import torch
    import transformers

    torch.manual_seed(0)
    for name, (kind, options, deviation) in MODELS.items():
        options = options | {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
        config = getattr(transformers, f"{kind}Config")(**options)
        suffix = "MTModel" if kind == "Marian" else "ForConditionalGeneration"
        model = getattr(transformers, kind + suffix)(config)
        for path, parameter in model.named_parameters():
            scale = "norm" in path and path.endswith("weight")
            if "embed_positions" not in path:  # Marian's are sinusoids
                torch.nn.init.normal_(parameter, float(scale), deviation)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias[:, END] = 2.0
        model.save_pretrained(folder / name)


@functools.cache
def their_model(folder: str, dtype: str) -> Any:
    """Loads a model with transformers."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, GenerationConfig

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config = GenerationConfig()  # Marian's own would force an end token at the last step
    return model


def their_search(folder: str, dtype: str, sources: list[list[int]], scored: bool, settings: dict[str, Any]) -> Found:
    """Searches with `transformers.generate`; scores are 0 unless asked for, since keeping them costs time."""
    import torch
    from transformers import GenerationConfig

    model, rows = their_model(folder, dtype), [torch.tensor(row) for row in sources]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    how = GenerationConfig(
        num_beams=settings["beams"],
        num_return_sequences=settings["n_best"],
        max_new_tokens=settings["max_tokens"],
        min_new_tokens=settings.get("min_tokens"),
        length_penalty=settings.get("length_penalty", 1.0),
        early_stopping=EARLY_STOPPING[settings.get("stop_when", "unlikely")],
        forced_bos_token_id=settings.get("forced_first"),
        suppress_tokens=settings.get("forbidden"),
        decoder_start_token_id=settings["start"],
        eos_token_id=END,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=scored,
    )
    with torch.inference_mode():
        found = model.generate(input_ids=tokens, attention_mask=mask, generation_config=how)
    scores = found.sequences_scores.tolist() if scored else [0.0] * len(found.sequences)
    texts = [(text[: text.index(END)] if END in text else text) for text in found.sequences[:, 1:].tolist()]
    flat, count = list(zip(texts, scores, strict=True)), settings["n_best"]
    return [flat[i : i + count] for i in range(0, len(flat), count)]


@functools.cache
def our_model(folder: str, dtype: str) -> tuple[Any, Any]:
    """Reads a model from the folder that transformers saved."""
    import jax

    from fastlm.models import Compute, Model, huggingface

    imported = huggingface.read(folder)
    return Model(imported.cfg, Compute(dtype=dtype)), jax.tree.map(jax.numpy.asarray, imported.params)


def our_search(folder: str, dtype: str, sources: list[list[int]], scored: bool, settings: dict[str, Any]) -> Found:
    """Searches with `beam.search`."""
    from fastlm.decoding import beam

    found = beam.search(*our_model(folder, dtype), sources, **settings)
    return [[(list(one.tokens), one.score if scored else 0.0) for one in hypotheses] for hypotheses in found]


def work(variant: str) -> None:
    """The body of one process: a search for every request."""
    library, dtype = variant.split()
    search = {"transformers": their_search, "fastlm": our_search}[library]

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        found = []
        run = lambda: found.append(
            search(request["folder"], dtype, request["sources"], request["scored"], request["settings"])
        )
        return workers.timed(run) | {"found": found[0]}

    workers.serve(answer)


def ask(worker: workers.Worker, folder: Path, sources: list, settings: dict[str, Any], scored: bool) -> dict:
    """Has a worker search; returns what it found, and its seconds."""
    return worker.ask({"folder": str(folder), "sources": sources, "settings": settings, "scored": scored})


def draw_sources(count: int, longest: int, vocabulary: int) -> list[list[int]]:
    """Returns `count` rows of up to `longest` tokens, none of them special."""
    import numpy as np

    rng = np.random.default_rng(0)
    return [rng.integers(FIRST + 1, vocabulary, longest - i % 12).tolist() for i in range(count)]


def compare(running: dict[str, workers.Worker], folder: Path) -> str:
    """Returns a Markdown table of where both find the same, over the tiny models and all settings."""
    lines = ["| model | settings | hypotheses | same tokens | largest difference of scores |", "|---|---|---|---|---|"]
    for name in MODELS:
        for title, settings in SETTINGS.items() if name != "large" else ():
            request = (folder / name, draw_sources(5, 13, 97), settings, True)
            theirs, ours = (ask(running[variant], *request)["found"] for variant in VARIANTS[:2])
            pairs = [pair for rows in zip(theirs, ours, strict=True) for pair in zip(*rows, strict=True)]
            same = sum(a[0] == b[0] for a, b in pairs)
            apart = max(abs(a[1] - b[1]) for a, b in pairs)
            lines.append(f"| {name} | {title} | {len(pairs)} | {same} | {apart:.1e} |")
    return "\n".join(lines)


def time_turns(running: dict[str, workers.Worker], folder: Path, sources: list, tokens: int, turns: int) -> dict:
    """Returns every variant's answers, one per turn, in alternation after one turn that is not counted."""
    settings = {"beams": 4, "n_best": 1, "max_tokens": tokens, "start": PAD, "end": END, "forbidden": [PAD, END]}

    def turn(worker: workers.Worker) -> dict:
        result = ask(worker, folder / "large", sources, settings, False)
        lengths = {len(hypotheses[0][0]) for hypotheses in result["found"]}
        if lengths != {tokens}:
            raise SystemExit(f"a variant wrote {lengths} tokens instead of {tokens}: not the same work")
        return result

    asks = {variant: functools.partial(turn, worker) for variant, worker in running.items()}
    workers.take_turns(asks, 1)
    return workers.take_turns(asks, turns)


def table(results: dict[str, list[dict]], rows: int) -> str:
    """Returns the speeds as a Markdown table; ratios above 1 are faster than transformers in the same type."""
    lines = [
        "| variant | sentences/s (median) | range of s/batch | CPU s/batch | ratio | CPU ratio | same texts |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, turns in results.items():
        base = results.get(f"transformers {variant.split()[1]}", turns)
        seconds = [turn["seconds"] for turn in turns]
        pairs = list(zip(base, turns, strict=True))
        ratio, cpu = (statistics.median(a[key] / b[key] for a, b in pairs) for key in ("seconds", "cpu"))
        same = sum(a[0][0] == b[0][0] for a, b in zip(base[0]["found"], turns[0]["found"], strict=True))
        lines.append(
            f"| {variant} | {rows / statistics.median(seconds):.2f} | {min(seconds):.2f}-{max(seconds):.2f} "
            f"| {statistics.median(turn['cpu'] for turn in turns):.2f} | {ratio:.2f} | {cpu:.2f} | {same} of {rows} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Reads the flags, compares, measures, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", help="interpreter that can import torch and transformers")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="which are timed")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--save", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        return work(flags.worker)
    if flags.save:
        return save_models(Path(flags.save))
    if not flags.torch_python:
        parser.error("--torch-python is needed: the peer is transformers")
    timed = flags.variants.split(",")
    with tempfile.TemporaryDirectory() as folder:
        command = [flags.torch_python, os.path.abspath(__file__), "--save", folder]
        subprocess.run(command, check=True, env=workers.environment())
        python = {variant: flags.torch_python if variant.startswith("transformers") else None for variant in VARIANTS}
        running = {
            variant: workers.Worker(__file__, "--worker", variant, python=python[variant])
            for variant in {*VARIANTS[:2], *timed}
        }
        print(compare(running, Path(folder)), flush=True)
        sources = draw_sources(flags.batch, 40, _LARGE["vocab_size"])
        chosen = {variant: running[variant] for variant in timed}
        results = time_turns(chosen, Path(folder), sources, flags.tokens, flags.turns)
        print(table(results, flags.batch))
        workers.close(running.values())
    return None


if __name__ == "__main__":
    main()
