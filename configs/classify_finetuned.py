"""Classification that starts from a pretrained encoder: here MiniLM, and the eras of presidents' addresses.

    launch/local.sh -m fastlm.convert --from FOLDER_OF_MINILM --to runs/minilm
    launch/local.sh -m fastlm.train --config configs/classify_finetuned.py

What it reaches is with MiniLM's own pooling, the mean, which no class of transformers has; a classifier that goes
back there with fastlm.convert is trained with --config.model.pooling=first (not measured).
Hardware: any CPU; made for 2 cores. Time: about 10 minutes there. What it reaches on other rows (sentences about
films: 0.85): see experiments/RESULTS.md. Rows of your own:
--config.data.sources="(('csv:reviews.csv#group=movie', 1.0),)" --config.task.text=review --config.task.label=verdict
"""

from ml_collections import ConfigDict

from configs import base


def get_config():
    config = base.get_config()
    config.task = ConfigDict({"name": "classification", "text": "text", "label": "era"})
    config.init.source = "runs/minilm"
    config.model.dropout = 0.1
    config.data.update(sources=(("state_of_the_union_passages", 1.0),), length=128, batch_size=32)
    config.data.buckets = (32, 64, 128)
    config.optimizer.update(name="adamw", b2=0.999, weight_decay=0.01)
    config.schedule.update(name="linear", peak=1e-4, warmup=0.1, final=0.0)
    config.training.update(steps=800, accumulation=2)
    config.evaluation.update(every=100, batches=0)
    config.checkpoint.every = 100
    return config
