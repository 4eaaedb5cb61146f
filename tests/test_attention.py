"""Our attention against JAX's own, which has other axes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genret.attention import attend


@pytest.mark.parametrize("dtype, atol", [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("masked", [False, True])
def test_against_jax(dtype, atol, masked):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.array(rng.normal(size=(3, n, 2, 24)), dtype) for n in (5, 7, 7))  # [B, R or T, H, D]
    allowed = jnp.array(rng.random((3, 1, 5, 7)) < 0.6).at[..., 0].set(True) if masked else None
    weights = rng.normal(size=q.shape)

    def theirs(q, k, v):
        out = jax.nn.dot_product_attention(q, k, v, mask=allowed)
        return (out * weights).sum(), out

    def ours(q, k, v):
        out = attend(*(x.swapaxes(1, 2) for x in (q, k, v)), allowed).swapaxes(1, 2)
        return (out * weights).sum(), out

    found, expected = (jax.grad(f, (0, 1, 2), has_aux=True)(q, k, v) for f in (ours, theirs))
    assert found[1].dtype == expected[1].dtype
    chex.assert_trees_all_close(found, expected, atol=atol * (10 if masked else 5))


def test_one_key_is_copied_and_a_forbidden_one_is_not_read():
    q, v = jnp.ones((1, 1, 2, 4)), jnp.arange(8.0).reshape(1, 1, 2, 4)
    np.testing.assert_allclose(attend(q, v[..., :1, :], v[..., :1, :])[0, 0], [v[0, 0, 0]] * 2)
    only = jnp.array([[True, False], [False, True]])
    np.testing.assert_allclose(attend(q, v, v, only)[0, 0], v[0, 0])
