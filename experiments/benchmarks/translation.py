"""The same translation model in torch.nn.Transformer: BLEU at equal steps, and the ratio of speeds.

    launch/local.sh -m fastlm.train --config configs/translate_transformer.py
    launch/local.sh -m experiments.benchmarks.translation --torch-python PYTHON_THAT_HAS_TORCH

The first command trains ours; the second has PyTorch train on exactly the same batches, in the same order, with the
same schedule, AdamW, dropout, label smoothing, clipping and bfloat16 products (autocast), writes the test translations
of both greedily and scores them with the same code, the difference by a paired bootstrap; then the two take turns at
training steps, in processes of their own. Both start from normal weights of the same spread (projections into the
residual stream smaller), but not from the same numbers. `--speed-only` leaves out the training.
PyTorch's training is resumable: it saves itself in `--folder` every 100 steps. About an hour on 2 cores.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.measurement import workers

CONFIG = "configs/translate_transformer.py"
VARIANTS = ("torch f32", "torch bf16", "fastlm f32", "fastlm bf16")
SAVE_EVERY = 100
DTYPE = "bf16"  # of PyTorch's products while it learns: what the config says of ours


def torch_model(shape: dict[str, Any]) -> Any:
    """Returns torch.nn.Transformer with embeddings, sinusoidal positions and a tied output."""
    import torch
    from torch import nn

    width = shape["width"]

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(shape["vocabulary"], width)
            self.body = nn.Transformer(
                width,
                shape["heads"],
                shape["encoder_layers"],
                shape["layers"],
                shape["feed_forward"],
                shape["dropout"],
                "relu",
                batch_first=True,
                norm_first=True,
            )
            for weight in self.parameters():
                if weight.dim() > 1:
                    nn.init.normal_(weight, std=shape["init_scale"])
            for name, weight in self.named_parameters():
                if name.endswith(("out_proj.weight", "linear2.weight")):
                    weight.data.mul_(shape["residual_scale"])
            self.drop = nn.Dropout(shape["dropout"])
            places = torch.arange(shape["longest"])[:, None]
            rates = torch.exp(-np.log(10_000.0) * torch.arange(0, width, 2) / width)
            self.register_buffer("waves", torch.cat([torch.sin(places * rates), torch.cos(places * rates)], dim=1))

        def embed(self, tokens):
            return self.drop(self.table(tokens) * width**0.5 + self.waves[: tokens.shape[1]])

        def encode(self, source, source_length):
            self.hidden = torch.arange(source.shape[1])[None] >= source_length[:, None]
            return self.body.encoder(self.embed(source), src_key_padding_mask=self.hidden)

        def decode(self, tokens, memory):
            causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
            x = self.body.decoder(
                self.embed(tokens), memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=self.hidden
            )
            return x @ self.table.weight.T

        def forward(self, source, source_length, tokens):
            return self.decode(tokens, self.encode(source, source_length))

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    return Translator()


def torch_step(model: Any, optimizer: Any, batch: dict[str, np.ndarray], shape: dict[str, Any], dtype: str) -> float:
    """Runs one optimizer step; returns nats per token, without the smoothing."""
    import torch
    import torch.nn.functional as F

    source, length, tokens, targets = (
        torch.from_numpy(batch[name].astype(np.int64)) for name in ("source", "source_length", "tokens", "targets")
    )
    real = torch.arange(targets.shape[1])[None] < torch.from_numpy(batch["tokens_length"].astype(np.int64))[:, None]
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
        logits = model(source, length, tokens)
    logits = logits[real].float()
    loss = F.cross_entropy(logits, targets[real], label_smoothing=shape["label_smoothing"])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), shape["clip"])
    optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(logits, targets[real]))


def torch_optimizer(model: Any, shape: dict[str, Any]) -> Any:
    """Returns AdamW that decays the matrices, not the embedding."""
    import torch

    decayed = [w for name, w in model.named_parameters() if w.dim() > 1 and not name.startswith("table")]
    rest = [w for name, w in model.named_parameters() if w.dim() < 2 or name.startswith("table")]
    groups = [{"params": decayed, "weight_decay": shape["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1.0, betas=(shape["b1"], shape["b2"]), eps=shape["epsilon"])


def train_torch(folder: Path) -> None:
    """Trains on the batches in `folder`, goes on where it stopped, and writes the greedy translations."""
    import torch

    shape = json.loads((folder / "shape.json").read_text())
    batches, rates = np.load(folder / "batches.npz"), np.load(folder / "rates.npy")
    model, saved, start = torch_model(shape), folder / "torch.pt", 0
    optimizer = torch_optimizer(model, shape)
    if saved.is_file():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        start = state["step"]
    model.train()
    for step in range(start, len(rates)):
        for group in optimizer.param_groups:
            group["lr"] = float(rates[step])
        names = ("source", "source_length", "tokens", "tokens_length", "targets")
        batch = {name: batches[f"{step}/{name}"] for name in names}
        loss = torch_step(model, optimizer, batch, shape, DTYPE)
        if (step + 1) % 20 == 0:
            print(f"step {step + 1}: {loss:.4f}", flush=True)
        if (step + 1) % SAVE_EVERY == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"rng": torch.get_rng_state(), "step": step + 1}, folder / "torch.tmp")
            (folder / "torch.tmp").rename(saved)
    model.eval()
    sources = [np.array(source) for source in json.loads((folder / "sources.json").read_text())]
    written = [greedy(model, sources[i : i + 64], shape) for i in range(0, len(sources), 64)]
    (folder / "written.json").write_text(json.dumps([row for rows in written for row in rows]))


def greedy(model: Any, sources: list[np.ndarray], shape: dict[str, Any]) -> list[list[int]]:
    """Returns the likeliest next tokens up to the end token, for each source; without a cache."""
    import torch

    lengths = torch.tensor([len(source) for source in sources])
    padded = torch.zeros(len(sources), int(lengths.max()), dtype=torch.int64)
    for row, source in zip(padded, sources):
        row[: len(source)] = torch.from_numpy(source)
    tokens = torch.full((len(sources), 1), shape["start"])  # which may be the end token
    with torch.no_grad():
        memory = model.encode(padded, lengths)
        while tokens.shape[1] <= shape["longest_target"] and not (tokens[:, 1:] == shape["end"]).any(dim=1).all():
            tokens = torch.cat([tokens, model.decode(tokens, memory)[:, -1:].argmax(dim=-1)], dim=1)
    rows = [row[1:] for row in tokens.tolist()]
    return [row[: row.index(shape["end"])] if shape["end"] in row else row for row in rows]


def torch_turn(dtype: str, folder: Path) -> Callable[[], float]:
    """Returns one training step of PyTorch on the longest batch."""
    shape, batch = json.loads((folder / "shape.json").read_text()), dict(np.load(folder / "longest.npz"))
    model = torch_model(shape)
    optimizer = torch_optimizer(model, shape | {"lr": 1e-4})
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    model.train()
    return lambda: torch_step(model, optimizer, batch, shape, dtype)


def fastlm_turn(dtype: str, folder: Path) -> Callable[[], Any]:
    """Returns one training step of ours on the same batch."""
    from experiments import steps
    from fastlm import command_line

    config = command_line.load_config(CONFIG, [])
    config["compute"]["dtype"] = {"f32": "float32", "bf16": "bfloat16"}[dtype]
    return steps.TrainingStep(config, folder / "unused", dict(np.load(folder / "longest.npz")))


def work(variant: str, folder: Path) -> None:
    """The body of a timed process: warm up, then as many steps as each request says."""
    framework, dtype = variant.split()
    step = (torch_turn if framework == "torch" else fastlm_turn)(dtype, folder)
    for _ in range(3):
        step()
    workers.serve(lambda steps: workers.timed(step, steps))


def prepare(folder: Path) -> None:
    """Writes what PyTorch needs: shape, schedule, batches in order, and the test sources as tokens."""
    from experiments import steps as training_steps
    from fastlm import command_line
    from fastlm.training import build

    experiment = build.build(command_line.load_config(CONFIG, []), folder / "unused")
    cfg, kind, steps = experiment.model.cfg, experiment.kind, experiment.training.steps
    optimizer = experiment.config["optimizer"]
    shape = {
        "vocabulary": cfg.vocab_size,
        "width": cfg.width,
        "heads": cfg.heads,
        "layers": cfg.layers,
        "encoder_layers": cfg.encoder_layers,
        "feed_forward": cfg.feed_forward_width,
        "dropout": cfg.dropout,
        "init_scale": cfg.init_scale,
        "residual_scale": cfg.layer(0).residual_init_scale / cfg.init_scale,
        "longest": cfg.max_length,
        "longest_target": experiment.data.length,
        "label_smoothing": kind.label_smoothing,
        "start": kind.start_token(experiment.tokenizer),
        "end": experiment.tokenizer.eos,
        **{name: optimizer[name] for name in ("b1", "b2", "epsilon", "weight_decay", "clip")},
    }
    (folder / "shape.json").write_text(json.dumps(shape))
    np.save(folder / "rates.npy", np.array([float(experiment.schedule(step)) for step in range(steps)]))
    reader, batches = experiment.train_batches(), {}
    for step in range(steps):
        batch = next(reader)
        batches |= {f"{step}/{name}": value for name, value in batch.items() if name not in ("record", "epoch")}
    reader.close()
    np.savez(folder / "batches.npz", **batches)
    np.savez(folder / "longest.npz", **training_steps.longest_batch(experiment))
    encode = kind.encoder(cfg, experiment.tokenizer, experiment.data)
    rows = kind.load(experiment.data, experiment.evaluation.final_split)[0][0]
    (folder / "sources.json").write_text(json.dumps([encode(row)["source"].tolist() for row in rows]))


def compare(folder: Path, workdir: str) -> None:
    """Prints BLEU and chrF of both on the test split, with the error of their difference."""
    import jax

    from fastlm import configuration
    from fastlm.data.settings import Data
    from fastlm.measurement import text_scores
    from fastlm.parallel import mesh as meshes
    from fastlm.training import restore

    mesh = meshes.make()
    jax.set_mesh(mesh)
    restored = restore.restore(workdir, mesh)
    config = restored.about["config"]
    kind, data = restored.kind(), configuration.make(Data, "data", config["data"])
    rows = list(kind.load(data, config["evaluation"]["final_split"])[0][0])
    wanted = [kind.texts(row)[1] for row in rows]
    said = {"fastlm": kind.write(restored.trained(kind, mesh), rows, data, 64)}
    said["torch"] = [restored.tokenizer.decode(row) for row in json.loads((folder / "written.json").read_text())]
    for metric in (text_scores.bleu, text_scores.chrf):
        scores = {name: metric(texts, wanted) for name, texts in said.items()}
        difference = text_scores.compare(scores["fastlm"], scores["torch"])
        print(", ".join(f"{metric.__name__} of {name} {score.estimate}" for name, score in scores.items()))
        print(f"  fastlm - torch: {difference}, p = {difference.p_value:.3f}")
    for i in range(0, len(rows), len(rows) // 5):
        print(json.dumps({"wanted": wanted[i]} | {name: texts[i] for name, texts in said.items()}, ensure_ascii=False))


def speed(folder: Path, torch_python: str, turns: int, steps: int) -> None:
    """Prints seconds per step of each variant and the ratio to PyTorch's faster one."""
    running = {
        variant: workers.Worker(
            __file__,
            *("--worker", variant, "--folder", str(folder)),
            python=torch_python if variant.startswith("torch") else None,
        )
        for variant in VARIANTS
    }
    asks = {variant: functools.partial(worker.ask, steps) for variant, worker in running.items()}
    results = workers.take_turns(asks, turns)
    workers.close(running.values())
    seconds = {variant: [turn["seconds"] for turn in taken] for variant, taken in results.items()}
    best = min(VARIANTS[:2], key=lambda variant: statistics.median(seconds[variant]))
    print(f"| variant | s/step (median) | quartiles | ratio to {best} |\n|---|---|---|---|")
    for variant, taken in seconds.items():
        low, _, high = statistics.quantiles(taken, n=4)
        ratio = statistics.median(base / mine for base, mine in zip(seconds[best], taken, strict=True))
        print(f"| {variant} | {statistics.median(taken):.3f} | {low:.3f}-{high:.3f} | {ratio:.2f} |")


def main() -> None:
    """Reads the flags and runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter that can import torch")
    parser.add_argument("--workdir", default="runs/translate_transformer", help="the finished run of ours")
    parser.add_argument("--folder", default="runs/translate_torch", help="where PyTorch's part is kept")
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    folder = Path(flags.folder)
    if flags.worker == "train":
        train_torch(folder)
    elif flags.worker:
        work(flags.worker, folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "sources.json").is_file():
            prepare(folder)
        if not flags.speed_only:
            command = [flags.torch_python, os.path.abspath(__file__), "--worker", "train", "--folder", str(folder)]
            subprocess.run(command, check=True, env=workers.environment())
            compare(folder, flags.workdir)
        speed(folder, flags.torch_python, flags.turns, flags.steps)


if __name__ == "__main__":
    main()
