"""What each attention kind should give, from its definition: dense, slow, one function each."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

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
