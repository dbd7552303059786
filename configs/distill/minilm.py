"""A narrow student learns how the tokens of a masked language model relate in its last layer (MiniLM's two papers).

    launch/local.sh -m fastlm.train --config configs/mlm_small.py
    launch/local.sh -m experiments.distill --config configs/distill/minilm.py

Relations of queries, keys and values in 8 relation heads (arXiv 2012.15828, where BERT-base has 48); any width and
number of heads goes. The first paper (2002.10957) has attention itself and relations of values, with as many heads on
both sides: ("attention(layers='last')", 1.0), ("relations(of='v')", 1.0). Its student keeps more than 99% of its
teacher's scores on SQuAD 2 and several tasks of GLUE with half of its Transformer's parameters. Nothing is predicted:
the head, and what stands behind the last queries, keys and values, learn when the student is fine-tuned.
Left out: an assistant of a size between; text without hidden words.
Hardware: 2 cores. Not measured at this size yet.
"""

from configs import mlm_small


def get_config():
    config = mlm_small.get_config()
    config.tokenizer.update(kind="checkpoint", path="runs/mlm_small", vocab_size=0)
    config.model.update(layers=3, width=144, heads=3, head_dim=48, feed_forward_width=576)
    config.wrappers = ("distilled",)
    config.distilled.update(teachers=("runs/mlm_small",), terms=(("relations(of='qkv', heads=8)", 1.0),))
    return config
