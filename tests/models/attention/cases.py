"""The attention kinds as the tests run them; adding a kind adds an entry here, and an oracle."""

from tests.models.attention import oracles
from tests.models.attention.bench import Case

CASES = (
    Case("full", oracles.full),
    Case("local(window=4, block=3)", oracles.local),
    Case("local(window=3)", oracles.local, {"kv_heads": 2, "positions": "none", "qk_norm": False}),
    Case("linear", oracles.linear),
    Case("lsh(chunk=2, rounds=3, buckets=4)", oracles.lsh),
    Case("lsh(chunk=4, rounds=1)", oracles.lsh, {"kv_heads": 2, "positions": "none", "qk_norm": False}),
    Case("hierarchical(block=2, means=1)", oracles.hierarchical),
    Case("hierarchical(block=4, means=2)", oracles.hierarchical, {"kv_heads": 2, "positions": "none"}),
)
