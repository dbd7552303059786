"""StableHLO: programs that run without this code, and compute what the model does, of any number of rows and tokens."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from fastlm.decoding import beam, sample
from fastlm.errors import UserError
from fastlm.exports import onnx_session, stablehlo
from fastlm.exports.exported_model import ExportedModel
from fastlm.exports.programs import flat
from fastlm.exports.stablehlo_session import Programs
from fastlm.models import Compute, Model, ModelConfig

MODELS = {
    "decoder": {"norm": "rms_norm", "feed_forward": "swiglu"},
    "windows": {"attention": "local(window=4)"},
    "states": {"attention": ("gated_linear", "full")},
    "latent": {"attention": "latent"},
    "translator": {"family": "encoder_decoder", "encoder_layers": 1, "positions": "relative"},
    "classifier": {"family": "encoder", "head": "sequence", "classes": 3, "token_types": 2, "positions": "learned"},
    "encoder": {"family": "encoder", "head": "none", "norm_place": "post"},
}
FIXED = {"windows": 8, "states": 8, "latent": 8}


def make(name):
    cfg = {"vocab_size": 24, "layers": 2, "width": 16, "heads": 2, "max_length": 64, "init_scale": 0.3}
    model = Model(ModelConfig(**cfg | MODELS[name]), Compute(dtype="float32", attention_form="plain"))
    return model, model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Makes a model and its programs, once each."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model, params = make(name)
            files = stablehlo.write(folder, model, params, FIXED.get(name))
            assert sorted(files) == sorted(path.name for path in folder.iterdir())
            signature = json.loads((folder / "signature.json").read_text())["programs"]
            programs = {
                key: export.deserialize(bytearray((folder / value["file"]).read_bytes()))
                for key, value in signature.items()
            }
            made[name] = model, params, programs, signature, folder
        return made[name]

    return get


def tokens(rows, length, seed=0):
    return np.random.default_rng(seed).integers(1, 24, (rows, length), dtype=np.int32)


def source_of(model, rows):
    if not model.cfg.encoder_layers:
        return {}
    return {"source": tokens(rows, 5, 1), "source_segments": np.ones((rows, 5), np.int32)}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("classifier", "encoder")])
def test_forward_gives_the_model_s_logits(name, exported):
    model, params, programs, _, _ = exported(name)
    for rows, length in ((1, 8), (3, FIXED.get(name, 11))):
        given = source_of(model, rows)
        whole = {} if given else {"segments": np.ones((rows, length), np.int32)}
        found = programs["forward"].call(flat(params), {"tokens": tokens(rows, length), **whole, **given})
        wanted, _ = model.apply(params, tokens(rows, length), given.get("source"))
        np.testing.assert_allclose(found["logits"], wanted, atol=2e-5)


@pytest.mark.parametrize("name", ["classifier", "encoder"])
def test_encoders_leave_out_padding(name, exported):
    model, params, programs, signature, _ = exported(name)
    segments = np.array([[1] * 7 + [0] * 2, [1] * 9], np.int32)
    given = {"tokens": tokens(2, 9), "segments": segments}
    if model.cfg.token_types:
        given["token_types"] = np.tile(np.arange(9, dtype=np.int32) % 2, (2, 1))
    assert given.keys() == signature["forward"]["inputs"].keys()
    found = programs["forward"].call(flat(params), given)
    types = {"token_types": given["token_types"][:1, :7]} if model.cfg.token_types else {}
    read = model.features if model.cfg.head == "none" else model.apply
    wanted, _ = read(params, tokens(2, 9)[:1, :7], **types)
    (values,) = found.values()
    np.testing.assert_allclose(values[:1] if name == "classifier" else values[:1, :7], wanted, atol=2e-5)


@pytest.mark.parametrize("name", ["decoder", "windows", "states", "latent", "translator"])
def test_prefill_and_decode_write_what_the_model_writes(name, exported):
    model, params, programs, signature, _ = exported(name)
    prompts = [[1], [1]] if model.cfg.encoder_layers else [[5, 6, 7], [3, 9, 4, 8, 2]]
    given = source_of(model, 2)
    rows = list(given["source"]) if given else prompts
    start = {"start": 1} if given else {}
    how = sample.Sampling(temperature=0.0)
    wanted = np.concatenate(list(sample.generate(model, params, rows, max_tokens=6, how=how, **start)), axis=1)
    sizes = {"b": 2, "c": 24, "s": 5}
    shape = lambda told: [size if isinstance(size, int) else sizes[size] for size in told["shape"]]
    cache = {
        key: np.zeros(shape(told), told["dtype"])
        for key, told in signature["prefill"]["inputs"].items()
        if key.startswith("cache/")
    }
    padded = np.zeros((2, FIXED.get(name, 5)), np.int32)
    for row, prompt in zip(padded, prompts):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    out = programs["prefill"].call(flat(params), {"tokens": padded, "lengths": lengths, **given, **cache})
    written = []
    for _ in range(6):
        token = jnp.argmax(out.pop("logits"), axis=-1).astype(jnp.int32)
        written.append(token)
        assert out.keys() == cache.keys()
        out = programs["decode"].call(flat(params), {"token": token, **out})
    np.testing.assert_array_equal(np.stack(written, axis=1), wanted)


RUN = """
import json, sys
import numpy as np
from jax import export
def load(path):
    data = open(path, "rb").read()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    read = lambda told: np.frombuffer(data[8 + size :][slice(*told["data_offsets"])], np.float32).reshape(told["shape"])
    return {name: read(told) for name, told in header.items() if name != "__metadata__"}
forward = export.deserialize(bytearray(open("forward.stablehlo", "rb").read()))
given = {"tokens": np.array([[1, 2, 3]], np.int32), "segments": np.ones((1, 3), np.int32)}
found = forward.call(load("weights.safetensors"), given)
print(json.dumps(np.asarray(found["logits"]).tolist()))
assert not [name for name in sys.modules if name.startswith("fastlm")]
"""


def test_nothing_of_this_code_is_needed(exported):
    model, params, _, _, folder = exported("decoder")
    outcome = subprocess.run([sys.executable, "-I", "-c", RUN], cwd=folder, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    wanted, _ = model.apply(params, np.array([[1, 2, 3]]))
    np.testing.assert_allclose(json.loads(outcome.stdout), wanted, atol=2e-5)


@pytest.mark.parametrize(
    ("attention", "length", "message"),
    [
        ("local", None, "'forward': a kind of attention of this model goes by the length of rows, .* with --length"),
        ("hierarchical", 8, "keeps tokens in groups, a cache that cannot be exported yet"),
    ],
)
def test_models_that_have_no_such_form(attention, length, message, tmp_path):
    model = Model(ModelConfig(vocab_size=24, layers=1, width=16, heads=2, max_length=64, attention=attention))
    with pytest.raises(UserError, match=message):
        stablehlo.write(tmp_path, model, model.init(jax.random.key(0)), length)


@pytest.mark.parametrize("name", ["decoder", "states", "translator"])
def test_the_runtime_writes_what_the_model_writes(name, exported):
    model, params, _, _, folder = exported(name)
    programs = Programs(folder)
    runtime, weights = ExportedModel(model.cfg, model.compute, programs), programs.params()
    start = {"start": 1} if model.cfg.encoder_layers else {}
    rows = [[5, 6, 7], [3, 9, 4, 8, 2]]
    for how in (sample.Sampling(temperature=0.0), sample.Sampling(temperature=0.7, top_p=0.9)):
        options = {"max_tokens": 5, "how": how, "seed": 3, **start, "forbidden": (7,)}
        wanted = np.concatenate(list(sample.generate(model, params, rows, **options)), axis=1)
        found = np.concatenate(list(sample.generate(runtime, weights, rows, **options)), axis=1)
        np.testing.assert_array_equal(found, wanted)


def test_a_search_in_the_runtime_finds_what_the_model_s_own_finds(exported):
    model, params, _, _, folder = exported("decoder")
    programs = Programs(folder)
    runtime, weights = ExportedModel(model.cfg, model.compute, programs), programs.params()
    options = {"max_tokens": 5, "beams": 3, "n_best": 2, "end": 4, "length_penalty": 0.6}
    rows = [[5, 6, 7], [3, 9, 4, 8, 2]]
    wanted, found = beam.search(model, params, rows, **options), beam.search(runtime, weights, rows, **options)
    for ours, theirs in zip(wanted, found, strict=True):
        assert [one.tokens for one in theirs] == [one.tokens for one in ours]
        assert [one.score for one in theirs] == pytest.approx([one.score for one in ours], rel=1e-4)


def test_documents_of_a_row_are_told_apart(tmp_path):
    """Also by learned positions, which begin anew in each."""
    cfg = ModelConfig(vocab_size=24, layers=1, width=16, heads=2, max_length=64, positions="learned", init_scale=0.3)
    model = Model(cfg, Compute(dtype="float32", attention_form="plain"))
    params = model.init(jax.random.key(0))
    stablehlo.write(tmp_path, model, params, 12)
    programs = Programs(tmp_path)
    runtime, row = ExportedModel(cfg, model.compute, programs), tokens(1, 11)
    segments = np.array([[1] * 4 + [2] * 5 + [0] * 2], np.int32)
    read = jax.jit(lambda params: runtime.features(params, jnp.asarray(row), segment_ids=jnp.asarray(segments))[0])
    found = read(programs.params())
    assert found.shape == (1, 11, 24)  # and filled up to 12 inside
    for piece in (slice(0, 4), slice(4, 9)):
        np.testing.assert_allclose(found[:, piece], model.apply(params, row[:, piece])[0], atol=2e-5)
    with pytest.raises(UserError, match="rows of 13 tokens; the model was exported for 12"):
        runtime.features({}, tokens(1, 13))


def test_what_is_cut_short_or_of_another_format_is_refused(exported, tmp_path):
    _, _, _, _, folder = exported("decoder")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "decode.stablehlo").write_bytes(b"\0" * (folder / "decode.stablehlo").stat().st_size)
    with pytest.raises(UserError, match=r"cannot read 'decode' of .*; upgrade jax if it is older"):
        Programs(tmp_path).open("decode")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"weights\.safetensors: missing or cut short"):
        Programs(tmp_path)
    with pytest.raises(UserError, match="no onnx export; make one"):
        onnx_session.Programs(folder)
