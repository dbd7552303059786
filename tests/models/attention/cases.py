"""The attention kinds as the tests run them; adding a kind adds an entry here, and an oracle."""

from tests.models.attention import oracles
from tests.models.attention.bench import Case

CASES = (
    Case("full", oracles.full),
    Case("local(window=4, block=3)", oracles.local),
    Case("local(window=3)", oracles.local, {"kv_heads": 2, "positions": "none", "qk_norm": False}),
    Case("linear", oracles.linear),
    Case("performer", oracles.performer),
    Case("performer(features=11, orthogonal=False)", oracles.performer, {"positions": "none", "qk_norm": False}),
    Case("linformer(rank=5)", oracles.linformer),
    Case("linformer(rank=3, tied=True)", oracles.linformer, {"attention_softcap": 2.0}),
    Case("latent", oracles.latent, {"qk_norm": False}),
    Case("latent(rank=6, query_rank=5, rotary_dim=2)", oracles.latent, {"qk_norm": False, "kv_heads": 2}),
)
