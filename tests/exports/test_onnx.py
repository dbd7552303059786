"""ONNX: graphs that ONNX Runtime runs, and that compute what the model does, of any number of rows and tokens."""

import json
from collections import Counter, defaultdict

import jax
import numpy as np
import onnx
import pytest

from fastlm.decoding import beam, sample
from fastlm.errors import UserError
from fastlm.exports import onnx as onnx_format
from fastlm.exports import onnx_products
from fastlm.exports.exported_model import ExportedModel
from fastlm.exports.onnx_session import Programs
from fastlm.models import Compute, Model, ModelConfig

LLAMA = {"norm": "rms_norm", "feed_forward": "swiglu", "kv_heads": 1}
DECODERS = {
    "llama": LLAMA,
    "gpt": {"positions": "learned", "norm": "layer_norm", "feed_forward": "gelu", "bias": True},
    "gemma": {"norm": "rms_norm", "feed_forward": "geglu", "qk_norm": True, "attention_softcap": 30.0},
    "alibi": {"positions": "alibi"},
    "narrow": LLAMA | {"heads": 4},  # heads of 8, too narrow for the runtime's own rotation
    "odd": {"positions": "learned", "width": 24},  # heads of 12, for which its attention over a cache has no form
    "odd, grouped": LLAMA | {"width": 24},
    "latent": {"attention": "latent"},
    "windows": {"attention": ("local(window=4)", "chunk(size=4)")},
    "states": {"attention": ("linear", "gated_delta")},
    "memory": {"attention": "transformer_xl"},
    "translator": {"family": "encoder_decoder", "encoder_layers": 1, "positions": "sinusoidal"},
    "relative": {"family": "encoder_decoder", "encoder_layers": 1, "positions": "relative"},
}
SLOWLY = ("states", "windows", "relative")  # their graphs are large
SOME_AT_ONCE = [pytest.param(name, marks=pytest.mark.slow) if name in SLOWLY else name for name in DECODERS]
ENCODERS = {
    "classifier": {"head": "sequence", "classes": 3, "token_types": 2, "positions": "learned"},
    "bert": {"head": "none", "norm_place": "post", "positions": "learned", "feed_forward": "gelu_exact", "bias": True},
    "rotary": {"head": "masked_language_model"},
}
FIXED = {"latent": 8, "windows": 8, "states": 8, "memory": 8}
GREEDY = sample.Sampling(temperature=0.0)


def make(options, **more):
    cfg = {"vocab_size": 24, "layers": 1, "width": 32, "heads": 2, "max_length": 64, "init_scale": 0.3}
    cfg |= {"layers": 2} if isinstance(options.get("attention"), tuple) else {}
    model = Model(ModelConfig(**cfg | options | more), Compute(dtype="float32", attention_form="plain"))
    return model, model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Makes a model and its graphs, once each."""
    made = {}

    def get(name):
        if name not in made:
            model, params = make(DECODERS.get(name) or ENCODERS[name] | {"family": "encoder"})
            folder = tmp_path_factory.mktemp(name)
            files = onnx_format.write(folder, model, params, FIXED.get(name))
            assert sorted(files) == sorted(path.name for path in folder.iterdir())
            made[name] = model, params, Programs(folder)
        return made[name]

    return get


def tokens(rows, length, seed=0):
    return np.random.default_rng(seed).integers(1, 24, (rows, length), dtype=np.int32)


def source_of(model, rows):
    if not model.cfg.encoder_layers:
        return {}
    segments = np.ones((rows, 5), np.int32)
    segments[-1, 3:] = rows == 1  # the last of several is shorter
    return {"source": tokens(rows, 5, 1), "source_segments": segments}


def agree(found, wanted):
    """In float32, differences of at most 1e-5 of the largest value."""
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", SOME_AT_ONCE)
def test_forward_gives_the_model_s_logits(name, exported):
    model, params, programs = exported(name)
    for rows, length in ((1, 8), (3, FIXED.get(name, 11))):
        given = source_of(model, rows)
        memory = model.encode(params, given["source"], segment_ids=given["source_segments"])[0] if given else None
        hidden, _ = model.features(params, tokens(rows, length), memory=memory)
        found = programs.call("forward", {"tokens": tokens(rows, length), **given})
        agree(found["logits"], np.asarray(model.head(params, hidden)))


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_leave_out_padding(name, exported):
    model, params, programs = exported(name)
    segments = np.array([[1] * 7 + [0] * 2, [1] * 9], np.int32)
    types = {"token_types": np.tile(np.arange(9, dtype=np.int32) % 2, (2, 1))} if model.cfg.token_types else {}
    (found,) = programs.call("forward", {"tokens": tokens(2, 9), "segments": segments, **types}).values()
    read = model.features if model.cfg.head == "none" else model.apply
    wanted = np.asarray(read(params, tokens(2, 9)[:1, :7], **{key: value[:1, :7] for key, value in types.items()})[0])
    agree(found[:1] if name == "classifier" else found[:1, :7], wanted)


@pytest.mark.parametrize("name", DECODERS)
def test_the_runtime_writes_what_the_model_writes(name, exported):
    model, params, programs = exported(name)
    start = {"start": 1} if model.cfg.encoder_layers else {}
    rows = [[5, 6, 7], [3, 9, 4, 8, 2]]
    runtime = ExportedModel(model.cfg, model.compute, programs)
    for how in (GREEDY, sample.Sampling(temperature=0.7, top_p=0.9)):
        options = {"max_tokens": 5, "how": how, "seed": 3, **start, "forbidden": (7,)}
        wanted = np.concatenate(list(sample.generate(model, params, rows, **options)), axis=1)
        found = np.concatenate(list(sample.generate(runtime, {}, rows, **options)), axis=1)
        np.testing.assert_array_equal(found, wanted)


def test_a_decoder_of_fixed_length_writes_with_a_graph_of_its_own(tmp_path):
    """The one that reads prompts, of so many tokens, cannot read a single one."""
    model, params = make(LLAMA)
    onnx_format.write(tmp_path, model, params, length=8)
    programs = Programs(tmp_path)
    assert programs.has("decode") and programs.signature["decode"]["in_place"]
    rows, options = [[5, 6, 7], [3, 9, 4, 8, 2]], {"max_tokens": 6, "how": GREEDY}
    wanted = np.concatenate(list(sample.generate(model, params, rows, **options)), axis=1)
    runtime = ExportedModel(model.cfg, model.compute, programs)
    np.testing.assert_array_equal(np.concatenate(list(sample.generate(runtime, {}, rows, **options)), axis=1), wanted)


@pytest.mark.parametrize("name", ["llama", "alibi", "translator"])
def test_a_search_in_the_runtime_finds_what_the_model_s_own_finds(name, exported):
    model, params, programs = exported(name)
    runtime = ExportedModel(model.cfg, model.compute, programs)
    start = {"start": 1} if model.cfg.encoder_layers else {}
    options = {"max_tokens": 5, "beams": 3, "n_best": 2, "end": 4, "length_penalty": 0.6, "forbidden": (7,), **start}
    rows = [[5, 6, 7], [3, 9, 4, 8, 2]]
    wanted, found = beam.search(model, params, rows, **options), beam.search(runtime, {}, rows, **options)
    for ours, theirs in zip(wanted, found, strict=True):
        assert [(one.tokens, one.ended) for one in theirs] == [(one.tokens, one.ended) for one in ours]
        assert [one.score for one in theirs] == pytest.approx([one.score for one in ours], rel=1e-4)


@pytest.mark.parametrize("name", ["windows", "states"])
def test_a_search_in_the_runtime_takes_kinds_that_our_own_refuses(name, exported):
    """With as many beams as there are continuations nothing is lost: the best of all pairs of tokens is found."""
    model, params, programs = exported(name)
    runtime, row = ExportedModel(model.cfg, model.compute, programs), [5, 6, 7]
    ((best,),) = beam.search(runtime, {}, [row], max_tokens=2, beams=24)
    both = np.array([[*row, token] for token in range(24)])
    hidden, _ = model.features(params, both)
    chances = np.asarray(jax.nn.log_softmax(model.head(params, hidden)))
    pairs = chances[0, 2][:, None] + chances[:, 3]
    assert best.tokens == np.unravel_index(pairs.argmax(), pairs.shape)
    assert best.score == pytest.approx(pairs.max() / 2, rel=1e-4)


@pytest.mark.parametrize("rules", [{"end": 5, "min_tokens": 4}, {"forced_first": 7, "forbidden": (7, 9, 3)}], ids=str)
def test_the_likeliest_token_obeys_the_rules(rules, exported):
    model, params, programs = exported("llama")
    runtime, options = ExportedModel(model.cfg, model.compute, programs), {"max_tokens": 6, "how": GREEDY, **rules}
    for rows in ([[5, 6, 7]], [[3], [8, 8]], [[11], [2], [14]]):
        wanted = np.concatenate(list(sample.generate(model, params, rows, **options)), axis=1)
        np.testing.assert_array_equal(
            np.concatenate(list(sample.generate(runtime, {}, rows, **options)), axis=1), wanted
        )


def test_one_graph_reads_prompts_and_single_tokens_where_caches_are_by_slot(exported):
    """And in it attention is one node, with the cache where it lies."""
    _, _, programs = exported("llama")
    assert not programs.has("decode")
    assert programs.signature["prefill"]["in_place"] == ["cache/layers/0/keys", "cache/layers/0/values"]
    nodes = Counter(node.op_type for node in onnx.load(programs.folder / "prefill.onnx").graph.node)
    assert nodes["GroupQueryAttention"] == 1
    assert nodes["MatMul"] == 4  # queries, keys and values in one; out; gate and up in one; down
    assert nodes["SkipSimplifiedLayerNormalization"] == 2
    assert exported("states")[2].has("decode")


@pytest.mark.parametrize("weights", onnx_format.WEIGHTS)
def test_bytes_are_those_of_the_weights(weights, tmp_path):
    model, params = make(LLAMA, width=256, heads=4, vocab_size=512, max_length=16)
    ranges = defaultdict(lambda: (-4.0, 4.0)) if weights == onnx_format.STATIC else None
    onnx_format.write(tmp_path, model, params, weights=weights, ranges=ranges)
    stored = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    share = (tmp_path / "weights.data").stat().st_size / stored
    assert share < {"float32": 1.02, "int4": 0.17}.get(weights, 0.27)


@pytest.mark.parametrize("weights", ["int8", "int8_blocks", "int4"])
@pytest.mark.parametrize("options", [LLAMA, {"tied_embeddings": False}], ids=["tied", "untied"])
def test_weights_on_the_grid_lose_nothing_but_the_rounding_of_inputs(weights, options, tmp_path):
    """Of weights that the format can say, only inputs are rounded: to 1 part in 254, which errors stay near."""
    model, params = make(options, width=128)
    largest = {"int8": 127, "int8_blocks": 128, "int4": 8}[weights]

    def on_grid(leaf):
        if leaf.ndim < 2:
            return leaf
        levels = np.random.default_rng(0).integers(-largest + 1, largest - 1, leaf.shape)
        levels[::2], levels[:, ::2] = -largest, np.where(levels[:, ::2] > 0, largest - 1, -largest)
        return (levels * np.float32(0.25 / largest)).astype(np.float32)

    params = jax.tree.map(on_grid, params)
    onnx_format.write(tmp_path, model, params, weights=weights)
    found = Programs(tmp_path).call("forward", {"tokens": tokens(2, 7)})["logits"]
    wanted = np.asarray(model.apply(params, tokens(2, 7))[0])
    assert np.sqrt(np.mean(np.square(found - wanted)) / np.mean(np.square(wanted))) < 0.03


def test_four_bits_come_back_as_the_nearest_levels():
    weight = np.random.default_rng(0).normal(size=(3, 70)).astype(np.float32)
    weight[1, 32:64] = 0
    packed, scales = onnx_products.FORMATS["int4"].pack(weight).values()
    assert packed.shape == (3, 3, 16) and scales.shape == (3, 3)
    levels = np.stack([packed & 15, packed >> 4], axis=-1).reshape(3, 3, 32).astype(np.int32) - 8
    back = (levels * scales[..., None]).reshape(3, 96)[:, :70]
    blocks = np.abs(np.pad(weight, ((0, 0), (0, 26))).reshape(3, 3, 32)).max(-1)
    assert (np.abs(back - weight) <= np.repeat(blocks / 7, 32, axis=1)[:, :70]).all()
    # The scale with the least error is no worse than the one that puts the largest value at the end of the range.
    plain = np.repeat(blocks / 8, 32, axis=1)[:, :70]
    rounded = np.clip(np.rint(weight / np.where(plain, plain, 1)), -8, 7) * plain
    assert np.square(back - weight).sum() <= np.square(rounded - weight).sum() * 1.001


@pytest.mark.parametrize(
    ("options", "length", "words"),
    [
        ({"attention": "block_sparse(block=4)"}, 8, "goes by"),
        ({"attention": "lsh(chunk=4)"}, 8, "cannot be written as ONNX"),
        ({"attention": "gated_linear"}, None, "--length"),
    ],
)
def test_what_cannot_be_said_is_refused(options, length, words, tmp_path):
    model, params = make(options)
    with pytest.raises(UserError, match=words):
        onnx_format.write(tmp_path, model, params, length)


def test_what_is_cut_short_is_refused(exported, tmp_path):
    _, _, programs = exported("llama")
    for name in ("signature.json", "weights.data", "prefill.onnx", "forward.onnx"):
        (tmp_path / name).write_bytes((programs.folder / name).read_bytes())
    Programs(tmp_path)
    (tmp_path / "weights.data").write_bytes((tmp_path / "weights.data").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"weights\.data.*cut short"):
        Programs(tmp_path)
    (tmp_path / "signature.json").write_text(json.dumps({})[:-1])
    with pytest.raises(UserError, match="no onnx export"):
        Programs(tmp_path)


def test_what_has_no_form_in_onnx_is_one_line_even_of_an_error_without_words(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr("jax2onnx.to_onnx", fail)
    with pytest.raises(UserError, match="'forward' cannot be written as ONNX: NotImplementedError"):
        onnx_format.write(tmp_path, *make(LLAMA))


def test_prompts_that_do_not_fit_are_refused(exported):
    model, _, programs = exported("states")
    runtime = ExportedModel(model.cfg, model.compute, programs)
    with pytest.raises(UserError, match="exported for 8"):
        next(sample.generate(runtime, {}, [[1] * 9], max_tokens=2))
    with pytest.raises(UserError, match="context"):
        sample.generate(runtime, {}, [[1] * 9], max_tokens=60)
    with pytest.raises(UserError, match="no tokens"):
        sample.generate(runtime, {}, [[]], max_tokens=2)
