"""The attention kinds as the tests run them; adding a kind adds an entry here, and an oracle."""

from tests.models.attention import oracles
from tests.models.attention.bench import Case

CASES = (
    Case("full", oracles.full),
    Case("local(window=4, block=3)", oracles.local),
    Case("local(window=3)", oracles.local, {"kv_heads": 2, "positions": "none", "qk_norm": False}),
    Case("linear", oracles.linear),
    Case("transformer_xl(memory=20)", oracles.transformer_xl),
    Case("chunk(size=4)", oracles.chunk),
    Case("chunk(size=2, back=2)", oracles.chunk, {"kv_heads": 2, "positions": "none", "qk_norm": False}),
    Case("dilated(stride=4)", oracles.dilated),
    Case("dilated(stride=2)", oracles.dilated, {"kv_heads": 2, "positions": "none", "qk_norm": False}),
    Case("block_sparse(block=2, window=3, global_blocks=1, random=2)", oracles.block_sparse),
    Case(
        "block_sparse(block=3, window=1, global_blocks=2, random=1, seed=5)",
        oracles.block_sparse,
        {"kv_heads": 2, "positions": "none", "qk_norm": False},
    ),
    Case("performer", oracles.performer),
    Case("performer(features=11, orthogonal=False)", oracles.performer, {"positions": "none", "qk_norm": False}),
    Case("linformer(rank=5)", oracles.linformer),
    Case("linformer(rank=3, tied=True)", oracles.linformer, {"attention_softcap": 2.0}),
    Case("latent", oracles.latent, {"qk_norm": False}),
    Case("latent(rank=6, query_rank=5, rotary_dim=2)", oracles.latent, {"qk_norm": False, "kv_heads": 2}),
    Case("gated_linear(rank=3)", oracles.gated_linear, finish=oracles.normalized_and_gated),
    Case("gated_delta", oracles.gated_delta, finish=oracles.normalized_and_gated),
    Case("lsh(chunk=2, rounds=3, buckets=4)", oracles.lsh),
    Case("lsh(chunk=4, rounds=1)", oracles.lsh, {"kv_heads": 2, "positions": "none", "qk_norm": False}),
    Case("hierarchical(block=2, means=1)", oracles.hierarchical),
    Case("hierarchical(block=4, means=2)", oracles.hierarchical, {"kv_heads": 2, "positions": "none"}),
)
