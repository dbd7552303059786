"""What each attention kind should give, from its definition: dense, slow, one function each."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fastlm.models import positions
from fastlm.models.attention.lsh import rotations
from fastlm.models.attention.performer import fixed_directions
from tests.models.attention.bench import LayerConfig, Pairs


def full(pairs: Pairs) -> Array:
    """Softmax over all that is visible."""
    return pairs.attend(pairs.see)


def local(pairs: Pairs) -> Array:
    """Softmax over the window."""
    return pairs.attend(pairs.see & (abs(pairs.distance) < pairs.options.window))


def kernel(pairs: Pairs, feature_q: Array, feature_k: Array) -> Array:
    """Weights phi(q) . phi(k), normalized; features [B, T, N, P]."""
    weights = jnp.where(pairs.see[:, None], jnp.einsum("BTNP,BSNP->BNTS", feature_q, feature_k), 0)
    total = jnp.maximum(jnp.sum(weights, -1, keepdims=True), 1e-6)  # of padding, which sees nothing
    return jnp.einsum("BNTS,BSNH->BTNH", weights / total, pairs.v)


def linear(pairs: Pairs) -> Array:
    """phi(x) = elu(x) + 1."""
    feature = lambda x: jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))
    return kernel(pairs, feature(pairs.q), feature(pairs.k))


def transformer_xl(pairs: Pairs) -> Array:
    """(q + u) . k + (q + w) . r(distance), softmax over all that is visible."""
    params, (heads, width) = pairs.params, (pairs.cfg.heads, pairs.cfg.width)
    frequencies = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angles = pairs.distance[..., None] * frequencies
    r = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1) @ params["distance"]
    r = r.reshape(*pairs.distance.shape, heads, -1)
    content = jnp.einsum("BTNH,BSNH->BNTS", pairs.q + params["content_bias"], pairs.k)
    position = jnp.einsum("BTNH,TSNH->BNTS", pairs.q + params["position_bias"], r)
    scores = jnp.where(pairs.see[:, None], (content + position) * pairs.cfg.attention_scale, -1e30)
    return jnp.einsum("BNTS,BSNH->BTNH", pairs.softmax(scores), pairs.v)


def chunk(pairs: Pairs) -> Array:
    """Softmax over the token's own chunk of slots and `back` chunks around; causality has cut what lies ahead."""
    of = np.arange(pairs.see.shape[1]) // pairs.options.size
    return pairs.attend(pairs.see & (abs(of[:, None] - of) <= pairs.options.back))


def dilated(pairs: Pairs) -> Array:
    """Softmax over all that is less than a stride away, or a multiple of it."""
    distance, stride = abs(pairs.distance), pairs.options.stride
    return pairs.attend(pairs.see & ((distance < stride) | (distance % stride == 0)))


def block_sparse(pairs: Pairs) -> Array:
    """Softmax over blocks: near ones, the first ones, drawn ones; an encoder's first ones see all."""
    options, causal = pairs.options, pairs.cfg.causal
    of = np.arange(pairs.see.shape[1]) // options.block
    near, first = abs(of[:, None] - of) <= options.window // 2, of < options.global_blocks
    seen = near | first | ((not causal) & first[:, None])
    for i in range(of[-1] + 1):
        others = {j for j in range(of[-1] + 1) if abs(i - j) > options.window // 2 and j >= options.global_blocks}
        others = sorted(j for j in others if j < i or not causal)
        drawn = np.random.default_rng((options.seed, i)).choice(others, min(options.random, len(others)), replace=False)
        seen |= (of == i)[:, None] & np.isin(of, drawn)
    return pairs.attend(pairs.see & seen)


def performer(pairs: Pairs) -> Array:
    """phi(x) = exp(w . x - |x|^2 / 2) of x times the root of the scale; the w of the seed."""
    options, width = pairs.options, pairs.cfg.head_dim
    w = fixed_directions(options.seed, options.count(width), width, options.orthogonal)

    def feature(x: Array) -> Array:
        x = x * pairs.cfg.attention_scale**0.5
        return jnp.exp(x @ w.T - jnp.sum(x**2, -1, keepdims=True) / 2) / len(w) ** 0.5

    return kernel(pairs, feature(pairs.q), feature(pairs.k))


def linformer(pairs: Pairs) -> Array:
    """Softmax over sums of keys and of values, each sum with its own weight for each real token."""
    params, real = pairs.params, jnp.any(pairs.see, axis=1)
    weights = lambda name: jnp.where(real[..., None], params[name][: real.shape[1]], 0)
    k = jnp.einsum("BSNH,BSR->BRNH", pairs.k, weights("key_rows"))
    v = jnp.einsum("BSNH,BSR->BRNH", pairs.v, weights("key_rows" if pairs.options.tied else "value_rows"))
    scores = jnp.einsum("BTNH,BRNH->BNTR", pairs.q, k) * pairs.cfg.attention_scale
    if pairs.cfg.attention_softcap:
        scores = pairs.cfg.attention_softcap * jnp.tanh(scores / pairs.cfg.attention_softcap)
    return jnp.einsum("BNTR,BRNH->BTNH", pairs.softmax(scores), v)


def latent(pairs: Pairs) -> Array:
    """Scores of keys made of a latent plus scores of one rotated key, from the parameters."""
    params, cfg, options = pairs.params, pairs.cfg, pairs.options

    def narrowed(x: Array, name: str) -> Array:
        y = x @ params[name]
        y = y / jnp.sqrt(jnp.mean(y**2, -1, keepdims=True) + cfg.norm_epsilon)
        return y * params[f"{name}_norm"]["scale"]

    def heads(x: Array, name: str, count: int) -> Array:
        y = (x @ params[name]).reshape(*x.shape[:2], count, -1)
        return jnp.repeat(y, cfg.heads // count, axis=2)

    source = narrowed(pairs.x, "q_latent") if options.query_rank else pairs.x
    c, width = narrowed(pairs.context, "latent"), cfg.head_dim
    q, k, v = heads(source, "q", cfg.heads), heads(c, "k", cfg.kv_heads), heads(c, "v", cfg.kv_heads)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k)
    if cfg.rotary:
        rotary = params["k_rotary"].shape[1]
        width += rotary
        angles = positions.rotary_angles(pairs.positions, rotary, cfg.rotary_base)
        turned = lambda x, name, count: positions.rotate(heads(x, name, count), *angles)
        q, k = turned(source, "q_rotary", cfg.heads), turned(pairs.context, "k_rotary", 1)
        scores += jnp.einsum("BTNP,BSNP->BNTS", q, k)
    p = pairs.softmax(jnp.where(pairs.see[:, None], scores / width**0.5, -1e30))
    return jnp.einsum("BNTS,BSNH->BTNH", p, v)


def halves(pairs: Pairs, read: Callable[..., Array], *arrays: Array) -> Array:
    """A decoder's heads read forwards; of an encoder's, the second half reads everything backwards."""
    forwards = read(pairs.see, *arrays)
    if pairs.cfg.causal:
        return forwards
    back = lambda t: jnp.flip(t, 1)
    backwards = back(read(jnp.flip(pairs.see, (1, 2)), *map(back, arrays)))
    half = pairs.cfg.heads // 2
    return jnp.concatenate([forwards[:, :, :half], backwards[:, :, half:]], 2)


def token_by_token(see: Array, step: Callable[..., Array], q: Array, *arrays: Array) -> Array:
    """y_t = q_t S_t with S_t = step(S_(t-1), *arrays_t), S 0 where a token does not see the one before it."""
    own = jnp.diagonal(see, axis1=1, axis2=2)
    goes_on = jnp.pad(jnp.diagonal(see, -1, axis1=1, axis2=2), ((0, 0), (1, 0)))

    def one(state, now):
        goes_on, own, q, *values = now
        wide = lambda flags: flags[:, None, None, None]
        state = jnp.where(wide(own), step(jnp.where(wide(goes_on), state, 0), *values), state)
        return state, jnp.einsum("BNP,BNPH->BNH", q, state)

    first = jnp.zeros((*q.shape[:1], *q.shape[2:], q.shape[-1]))
    _, y = jax.lax.scan(one, first, [jnp.swapaxes(t, 0, 1) for t in (goes_on, own, q, *arrays)])
    return jnp.swapaxes(y, 0, 1)


def gated_linear(pairs: Pairs) -> Array:
    """S_t = diag(a_t) S_(t-1) + k_t v_t^T."""
    logits = pairs.context @ pairs.params["decay_in"] @ pairs.params["decay_out"] + pairs.params["decay_bias"]
    decay = (jax.nn.sigmoid(logits) ** (1 / pairs.options.temperature)).reshape(pairs.q.shape)
    step = lambda state, k, v, decay: decay[..., None] * state + k[..., None] * v[..., None, :]
    return halves(pairs, lambda see, *arrays: token_by_token(see, step, *arrays), pairs.q, pairs.k, pairs.v, decay)


def gated_delta(pairs: Pairs) -> Array:
    """S_t = a_t (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T, from x itself: the map of q, k, v is part of the kind."""
    params, x, size = pairs.params, pairs.context, pairs.cfg.head_dim
    step_size = jnp.log1p(jnp.exp(x @ params["decay"] + params["decay_bias"]))
    decay, rate = jnp.exp(-jnp.exp(params["decay_log"]) * step_size), jax.nn.sigmoid(x @ params["rate"])

    def projected(name):
        y = (x @ params[name]).reshape(*x.shape[:2], -1, size)
        if name != "v" and pairs.cfg.qk_norm:
            y = rms_norm(y, params[f"{name}_norm"]["scale"], pairs.cfg.norm_epsilon)
        return y

    def convolved(see, name, y):
        if pairs.options.conv:
            w = params[f"{name}_conv"].reshape(pairs.options.conv, *y.shape[2:])
            distance = jnp.arange(y.shape[1])[:, None] - jnp.arange(y.shape[1])
            y = sum(jnp.einsum("BTS,BSNH->BTNH", see & (distance == i), y) * w[i] for i in range(len(w)))
        y = jnp.repeat(y * jax.nn.sigmoid(y), pairs.cfg.heads // y.shape[2], axis=2)
        return y if name == "v" else y / jnp.sqrt(jnp.sum(y * y, -1, keepdims=True) + 1e-6 * size)

    def step(state, k, v, decay, rate):
        decay, rate = decay[..., None, None], rate[..., None, None]
        held = jnp.einsum("BNP,BNPH->BNH", k, state)[..., None, :]
        return decay * (state - rate * k[..., None] * held) + rate * k[..., None] * v[..., None, :]

    def read(see, q, k, v, decay, rate):
        q, k, v = convolved(see, "q", q), convolved(see, "k", k), convolved(see, "v", v)
        return token_by_token(see, step, q, k, v, decay, rate)

    return halves(pairs, read, projected("q"), projected("k"), projected("v"), decay, rate)


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """x over the root of its mean square."""
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon) * scale


def normalized_and_gated(params: dict, cfg: LayerConfig, x: Array, y: Array) -> Array:
    """Heads normalized each, times silu(x W)."""
    gate = (x @ params["gate"]).reshape(y.shape)
    return rms_norm(y, params["out_norm"]["scale"], cfg.norm_epsilon) * gate * jax.nn.sigmoid(gate)


def lsh(pairs: Pairs) -> Array:
    """Softmax over the union of what the rounds show, token pair by token pair; a token itself where that is nothing.

    Padding sees nothing and is seen by nobody, so it is sorted behind all others.
    """
    _, t, n, h = pairs.q.shape
    options, real = pairs.options, jnp.diagonal(pairs.see, axis1=1, axis2=2)
    count, chunk = options.buckets_of(t), min(options.chunk, t)
    union = jnp.zeros((pairs.q.shape[0], n, t, t), bool)
    for rotation in rotations(None, h, options.rounds, count):
        near = pairs.q @ rotation
        bucket = jnp.argmax(jnp.concatenate([near, -near], -1), -1) if count > 1 else jnp.zeros(near.shape[:-1], int)
        bucket = jnp.swapaxes(jnp.where(real[..., None], bucket, count), 1, 2)
        place = jnp.argsort(jnp.argsort(bucket, axis=-1, stable=True), axis=-1) // chunk
        back = place[..., :, None] - place[..., None, :]
        union |= (bucket[..., :, None] == bucket[..., None, :]) & ((back == 0) | (back == 1))
    own = jnp.eye(t, dtype=bool)
    union &= pairs.see[:, None] & ~own
    scores = jnp.where(union, pairs.scores(), -1e30)
    p = jnp.where(union.any(-1, keepdims=True), jax.nn.softmax(scores, -1), own)
    return jnp.einsum("BNTS,BSNH->BTNH", p, pairs.v)


def hierarchical(pairs: Pairs) -> Array:
    """One softmax over near tokens, and over means of what a token may see of the runs farther away.

    Runs of level l are the tokens of 2^l blocks, cut into `means` pieces. A block looks at those whose parent (two of
    them make one of the next level) is its own parent or beside it, and that are not beside it themselves.
    """
    block, means, t = pairs.options.block, pairs.options.means, pairs.see.shape[1]
    slots = np.arange(t)
    near = abs(slots[:, None] // block - slots // block) <= 1
    members, lookers = [], []
    for level in range(t.bit_length()):
        group = block << level
        for j in range(-(-t // group)):
            here = slots // group
            looks = (abs(here - j) > 1) & (abs(here // 2 - j // 2) <= 1)
            for part in range(means):
                members.append((slots // group == j) & (slots % group * means // group == part))
                lookers.append(looks)
    members, lookers = np.stack(members), np.stack(lookers, 1)
    assert ((near + lookers.astype(int) @ members) == 1).all()  # every token is seen exactly once, from everywhere
    part = pairs.see[:, :, None] & members & lookers[..., None]  # [B, T, runs, S]
    count = part.sum(-1)
    share = part / jnp.maximum(count, 1)[..., None]
    k, v = (jnp.einsum("BTRS,BSNH->BTRNH", share, x) for x in (pairs.k, pairs.v))
    far = (
        jnp.einsum("BTNH,BTRNH->BNTR", pairs.q, k) * pairs.cfg.attention_scale + jnp.log(jnp.maximum(count, 1))[:, None]
    )
    scores = jnp.concatenate(
        [jnp.where((pairs.see & near)[:, None], pairs.scores(), -1e30), jnp.where((count > 0)[:, None], far, -1e30)], -1
    )
    p = pairs.softmax(scores)
    return jnp.einsum("BNTS,BSNH->BTNH", p[..., :t], pairs.v) + jnp.einsum("BNTR,BTRNH->BTNH", p[..., t:], v)
