"""Every key that a config may have, once, with the value it has unless a config says otherwise.

The other files in this folder call `get_config` here and change values; the command line changes
them again: `--config.model.layers=8`. What a key means stands in the docstring of the class or
function that its section is passed to (named beside each section).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the base config: a small decoder on the shipped corpus."""
    config = ConfigDict()
    config.seed = 0

    # the class of fastlm.tasks.KINDS[name]; another task brings its own keys
    config.task = ConfigDict({"name": "language_modeling", "z_loss": 0.0, "label_smoothing": 0.0})

    # names of fastlm.compress.WRAPPERS, innermost first; each has the section below that has its name
    config.wrappers = ()
    config.lora = ConfigDict(
        {
            "rank": 8,
            "alpha": 16.0,
            "paths": ("(cross_)?attention/(q|k|v|out)", "feed_forward/(up|gate|down)"),
            "train": ("head", "pooler"),
        }
    )

    config.distilled = ConfigDict(
        {
            "teachers": (),
            "step": "",
            "dtype": "",
            "weights": "",
            "terms": (("cross_entropy", 0.5), ("forward_kl(temperature=2.0)", 0.5)),
            "cache": "",
            "on_policy": {"share": 0.0, "prompt": 0, "temperature": 1.0},
            "noise": {"rows": 0.0, "words": 0.4},
            "teacher_length": 0,
        }
    )

    config.gated = ConfigDict(
        {"target": "linear(start=0.0, end=0.5, until=0.4)", "units": ("heads", "feed_forward"), "rate": 1.0}
    )
    config.pruned = ConfigDict(
        {
            "method": "masked",
            "sparsity": "cubic(start=0.0, end=0.7, until=0.6)",
            "score": "magnitude",
            "allocation": "matrix",
            "every": 10,
            "until": 0.75,
            "share": 0.3,
            "paths": ("(cross_)?attention/(q|k|qk|v|out)", "feed_forward/(up|gate|down)"),
        }
    )

    # fastlm.training.initial.Init; with a source, of the model's keys those count that the command line names or that
    # differ from the values here; a config that sets one to the value here gives a section of its own,
    # config.model = ConfigDict({"dropout": 0.0}), of which every key counts
    config.init = ConfigDict({"source": "", "step": "", "layers": "", "width": 0, "feed_forward_width": 0, "heads": 0})

    # fastlm.models.ModelConfig; 0 means "derive it"
    config.model = ConfigDict(
        {
            "family": "decoder",
            "vocab_size": 0,
            "max_length": 1024,
            "layers": 6,
            "encoder_layers": 0,
            "width": 384,
            "heads": 6,
            "kv_heads": 0,
            "head_dim": 0,
            "attention": "full",
            "cross_attention": "full",
            "softmax": "exact",
            "feed_forward": "gelu",
            "feed_forward_width": 0,
            "norm": "layer_norm",
            "norm_place": "pre",
            "norm_epsilon": 1e-5,
            "positions": "rotary",
            "position_offset": 0,
            "rotary_base": 10_000.0,
            "rotary_scaling": (),
            "relative_buckets": 32,
            "relative_distance": 128,
            "token_types": 0,
            "embedding_norm": False,
            "embedding_scale": 1.0,
            "qk_norm": False,
            "attention_scale": 0.0,
            "attention_softcap": 0.0,
            "logit_softcap": 0.0,
            "tied_embeddings": True,
            "bias": False,
            "qkv_bias": False,
            "head": "language_model",
            "head_bias": False,
            "head_scale": 1.0,
            "classes": 0,
            "pooler": "",
            "pooling": "first",
            "dropout": 0.0,
            "init_scale": 0.02,
            "residual_init": "scaled",
            "formats": (),
            "fused": False,
        }
    )

    # fastlm.models.Compute
    config.compute = ConfigDict(
        {
            "dtype": "bfloat16",
            "residual_dtype": "float32",
            "remat": "none",
            "attention_form": "auto",
            "loss_chunk": 1024,
            "cache_dtype": "",
        }
    )

    # fastlm.data.tokenizers.make; kind "checkpoint" takes that of the workdir `path`
    config.tokenizer = ConfigDict({"kind": "bpe", "path": "", "vocab_size": 4096})

    # fastlm.data.settings.Data; sources are (spec, share)
    config.data = ConfigDict(
        {
            "sources": (("state_of_the_union", 1.0),),
            "split": "train",
            "length": 256,
            "source_length": 0,
            "batch_size": 16,
            "buckets": (),
            "mode": "packed",
            "packing": "concat",
            "shards": 0,
            "prefetch": 2,
            "data_dir": None,
        }
    )

    # fastlm.data.settings.Evaluation
    config.evaluation = ConfigDict(
        {"every": 250, "batches": 20, "split": "validation", "final_split": "test", "batch_size": 0, "overlap": 0}
    )

    # fastlm.training.optimizers.make
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "b1": 0.9,
            "b2": 0.95,
            "epsilon": 1e-8,
            "weight_decay": 0.1,
            "decay_exclude": ("embedding",),
            "clip": 1.0,
            "groups": (),
            "muon_paths": ("layers",),
            "muon_momentum": 0.95,
            "muon_nesterov": True,
            "muon_rounds": 5,
            "muon_dtype": "float32",
            "muon_shape_factor": "rms",
            "muon_adamw_rate": 1.0,
        }
    )

    # fastlm.training.schedules.make; fractions below 1 are of all steps
    config.schedule = ConfigDict(
        {
            "name": "cosine",
            "peak": 1e-3,
            "warmup": 0.02,
            "final": 0.1,
            "decay_fraction": 0.1,
            "decay_shape": "linear",
            "timescale": 0.1,
        }
    )

    # fastlm.training.settings.Training
    config.training = ConfigDict({"steps": 1000, "accumulation": 1, "average_decay": 0.0, "max_skipped": 10})

    # fastlm.parallel.mesh.make; -1 is what is left
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1})

    # fastlm.training.settings.Checkpoint, Logging, Sample
    config.checkpoint = ConfigDict({"every": 250, "keep": 2})
    config.logging = ConfigDict({"every": 20, "tensorboard": True, "wandb": ""})
    config.sample = ConfigDict({"prompts": (), "tokens": 120, "temperature": 0.8, "top_p": 0.95})
    return config
