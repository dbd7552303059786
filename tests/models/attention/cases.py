"""The attention kinds as the tests run them; adding a kind adds an entry here, and an oracle."""

from tests.models.attention import oracles
from tests.models.attention.bench import Case

CASES = (
    Case("full", oracles.full),
    Case("local(window=4, block=3)", oracles.local),
    Case("local(window=3)", oracles.local, {"kv_heads": 2, "positions": "none", "qk_norm": False}),
    Case("linear", oracles.linear),
    Case("gated_linear(rank=3)", oracles.gated_linear, finish=oracles.normalized_and_gated),
    Case("gated_delta", oracles.gated_delta, finish=oracles.normalized_and_gated),
)
