"""Which attention kernel runs where, and both kernels against the plain attention: values, gradients, on a mesh too.

Splash runs in Pallas' interpreter here. cuDNN cannot run: what it is handed is checked, and computed by XLA.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diptych.errors import UserError
from diptych.families.family import read_model
from diptych.layout import MeshShape
from diptych_jax import attention, kernels, model
from diptych_jax.mesh import train_mesh
from diptych_jax.weights import pack

SCALE, LIMIT = 0.35, 5e-6
ALIBI = {"model_type": "bloom", "vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4}
GEMMA = {
    "model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 5,
    "tie_word_embeddings": True, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
RNN = {"model_type": "rnn", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}

# wanted, platform, dtype, changes of the config -> the choice, a piece of its reason or of the error
CHOICES = [
    ("auto", "cpu", "float32", {}, "xla", "fastest on cpu"),
    ("auto", "cpu", "float64", {}, "xla", "fastest on cpu"),
    ("auto", "gpu", "bfloat16", {}, "cudnn", "fastest on gpu"),
    ("auto", "gpu", "float32", {}, "xla", "not cudnn: it computes in bfloat16"),
    ("auto", "gpu", "bfloat16", GEMMA, "xla", "not cudnn: it cannot cap"),
    ("auto", "gpu", "bfloat16", {"head_dim": 12}, "xla", "multiple of 8"),
    ("auto", "gpu", "bfloat16", {"head_dim": 256}, "xla", "up to 128 columns"),
    ("auto", "gpu", "bfloat16", RNN, "xla", "no attention"),
    ("auto", "tpu", "bfloat16", {}, "splash", "fastest on tpu"),
    ("auto", "tpu", "bfloat16", GEMMA, "splash", "fastest on tpu"),
    ("auto", "tpu", "float32", {}, "splash", "fastest on tpu"),
    ("auto", "tpu", "float64", {}, "xla", "not splash: it computes in"),
    ("auto", "tpu", "bfloat16", ALIBI, "xla", "not splash: it takes no ALiBi"),
    ("xla", "tpu", "bfloat16", {}, "xla", "names it"),
    ("xla", "gpu", "bfloat16", RNN, "xla", "names it"),
    ("cudnn", "gpu", "bfloat16", {}, "cudnn", "fastest"),
    ("cudnn", "tpu", "bfloat16", {}, None, "layout.attention: cudnn cannot run: it needs a GPU, and this is a TPU"),
    ("cudnn", "gpu", "float32", {}, None, "the model in float32; set it to auto or xla"),
    ("splash", "cpu", "float32", {}, None, "it needs a TPU, and this is a CPU"),
    ("splash", "tpu", "bfloat16", RNN, None, "no attention"),
]


@pytest.mark.parametrize(("wanted", "platform", "dtype", "changes", "name", "reason"), CHOICES)
def test_the_choice(tiny_config, wanted, platform, dtype, changes, name, reason):
    config = read_model(changes if "hidden_size" in changes else tiny_config(**changes))
    if name is None:
        with pytest.raises(UserError, match=reason):
            kernels.choose(wanted, platform=platform, dtype=jnp.dtype(dtype), config=config)
    else:
        found = kernels.choose(wanted, platform=platform, dtype=jnp.dtype(dtype), config=config)
        assert found.name == name
        assert reason in found.reason


def test_a_named_kernel_that_cannot_run_stops_the_engine(tiny_config, hot_weights):
    from diptych.engine import EngineSettings, ModelSpec
    from diptych_jax.engine import create

    config = tiny_config()
    spec = ModelSpec(config=config, weights=hot_weights(config, "lm"), head="lm", optimizer=None, micro_batch_size=1)
    with pytest.raises(UserError, match="splash cannot run: it needs a TPU"):
        create(EngineSettings(precision="float32", attention="splash")).model(spec)
    engine = create(EngineSettings(precision="float32"))
    engine.check_model(read_model(config), "reference")
    assert engine.environment()["attention/reference"] == "xla (the fastest on cpu)"


# --- the kernels -----------------------------------------------------------------------------------------------------


def inputs(length: int, kv_heads: int, *, batch: int = 2):
    """q, k, v, the factors of a loss, and segments: padding on the left, and two examples with padding on the right."""
    draws = np.random.default_rng(0)
    shapes = [(batch, length, heads, 8) for heads in (4, kv_heads, kv_heads, 4)]
    q, k, v, factors = (jnp.asarray(draws.normal(size=shape), jnp.float32) for shape in shapes)
    segments = np.ones((batch, length), np.int32)
    segments[0, : length // 5] = 0
    segments[1, length // 3 :] = 2
    segments[1, -length // 4 :] = 0
    return q, k, v, factors, jnp.asarray(segments)


def values_and_gradients(attend, q, k, v, factors):
    def loss(*qkv):
        out = attend(*qkv)
        return jnp.sum(out * factors), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)


def plain(segments, *, window=None, softcap=None):
    read = attention.self_attention(
        segments, windows=(window,), scale=SCALE, softcap=softcap, bias_BNTS=None, kernel="xla"
    )
    return lambda q, k, v: read(q, k, v, None)


def error(a, b) -> float:
    leaves = zip(jax.tree.leaves(a[0][1]) + list(a[1]), jax.tree.leaves(b[0][1]) + list(b[1]), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in leaves)


@pytest.mark.parametrize(
    ("length", "kv_heads", "options"), [(100, 2, {}), (128, 1, {"window": 10}), (128, 4, {"softcap": 1.0})], ids=str
)
def test_splash_is_the_plain_attention(length, kv_heads, options):
    q, k, v, factors, segments = inputs(length, kv_heads)
    splash = partial(kernels.splash, segments_BT=segments, scale=SCALE, interpret=True, **options)
    found = values_and_gradients(splash, q, k, v, factors)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert error(found, values_and_gradients(plain(segments, **options), q, k, v, factors)) < LIMIT
    wrong = {"window": 11} if "window" in options else {"softcap": 1.01} if options else {"window": length // 2}
    assert error(found, values_and_gradients(plain(segments, **wrong), q, k, v, factors)) > 100 * LIMIT  # canary
    neighbours = jnp.minimum(segments, 1)  # canary: segment ids that let the second example read the first
    assert error(found, values_and_gradients(plain(neighbours, **options), q, k, v, factors)) > 100 * LIMIT


@pytest.mark.parametrize(("shape", "kv_heads"), [({"data": 2, "tensor": 2}, 2), ({"fsdp": 2, "tensor": 4}, 2)], ids=str)
def test_on_a_mesh_every_device_runs_the_kernel_on_its_own_rows_and_heads(shape, kv_heads):
    """Four tensor shards of two key-value heads: each device takes the head that its queries read."""
    layout = MeshShape(**shape)
    q, k, v, factors, segments = inputs(16, kv_heads, batch=4)
    expected = values_and_gradients(plain(segments), q, k, v, factors)
    mask = (segments[:, :, None] == segments[:, None]) & jnp.tril(jnp.ones((16, 16), bool))
    cudnn = partial(kernels.cudnn, mask_BTS=mask, scale=SCALE, implementation="xla")
    splash = partial(kernels.splash, segments_BT=segments, scale=SCALE, interpret=True)
    with jax.set_mesh(train_mesh(layout, jax.devices()[: layout.size])):
        for kernel in (cudnn, splash):
            assert error(values_and_gradients(kernel, q, k, v, factors), expected) < LIMIT


def test_cudnn_gets_half_precision_even_lengths_and_a_mask_without_empty_rows(monkeypatch):
    """An odd number of columns, and everything that jax.nn.dot_product_attention is called with."""
    q, k, v, _, segments = inputs(15, 2)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    calls = []
    plain_attention = jax.nn.dot_product_attention

    def record(q, k, v, *, mask, scale, implementation):
        calls.append((q, k, v, mask, implementation))
        return plain_attention(q, k, v, mask=mask, scale=scale, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    read = attention.self_attention(segments, windows=(4,), scale=SCALE, softcap=None, bias_BNTS=None, kernel="cudnn")(
        q, k, v, None
    )
    ((q_given, k_given, v_given, mask, implementation),) = calls
    assert implementation == "cudnn"
    assert q_given.shape == (2, 16, 4, 8)
    assert k_given.shape == v_given.shape == (2, 16, 2, 8)
    assert {x.dtype for x in (q_given, k_given, v_given)} == {jnp.dtype("bfloat16")}
    assert mask.shape == (2, 1, 16, 16)
    assert mask.dtype == bool
    assert mask.any(axis=-1).all()
    np.testing.assert_array_equal(read, plain(segments, window=4)(q, k, v))


def test_a_model_of_two_windows_runs_splash_in_its_scan(tiny_config, hot_weights, ragged_batch, monkeypatch):
    """Gemma 2: windowed and full layers alternate inside one `jax.lax.scan`, scores are capped; rematerialised."""
    config = tiny_config(**GEMMA)
    read_config = read_model(config)
    assert len(set(read_config.windows)) == 2
    monkeypatch.setattr(attention, "splash", partial(kernels.splash, interpret=True))
    weights = "scalar", hot_weights(config, "scalar"), np.dtype(np.float32)
    built = pack(read_config, *weights)
    batch = ragged_batch(2, 20)
    rows = [jnp.asarray(array) for array in (batch.tokens, batch.attention, batch.positions)]

    @partial(jax.jit, static_argnames="kernel")
    def run(built, kernel):
        def loss(built):
            found = model.scores(built, *rows, kernel=kernel)[0]
            return jnp.sum(jnp.where(batch.attention, found, 0) ** 2)

        return jax.value_and_grad(loss)(built)

    def distance(a, b) -> float:
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs)

    found = run(built, "splash")
    assert distance(found, run(built, "xla")) < 1e-5
    turned = pack(read_model(config | {"layer_types": ["full_attention", "sliding_attention"]}), *weights)
    canary = model.scores(turned, *rows)[0], model.scores(built, *rows)[0]  # the two layers' windows changed places
    assert distance(*(np.where(batch.attention, values, 0) for values in canary)) > 1e-3
