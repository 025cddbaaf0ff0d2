"""Small solvers that the weightings share, for jit and vmap, in float32."""

import jax
import jax.numpy as jnp

_INTERIOR_STEPS = 40
_JACOBI_SWEEPS = 8


def divide(x: jax.Array, y: jax.Array) -> jax.Array:
  """x / y, 0 where y is 0."""
  return jnp.where(y != 0, x / jnp.where(y != 0, y, 1), 0)


def nonnegative(matrix: jax.Array, linear: jax.Array) -> jax.Array:
  """argmin x^T M x / 2 - b^T x over x >= 0, M positive definite [G, G].

  Primal-dual interior point: Newton on M x - b = z, x z = mu, mu -> 0; at most
  99 % of the way to the boundary. diag(M) is to be of order 1.

  Reference: Nocedal & Wright, Numerical Optimization, 2006, section 16.6.
  """
  largest = jnp.abs(linear).max()
  linear = divide(linear, largest)

  def body(
    _: int, point: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    x, z = point
    mu = 0.1 * jnp.mean(x * z)
    root = jnp.sqrt(x / z)
    system = jnp.eye(len(x)) + root[:, None] * matrix * root[None, :]
    slope = mu / x - (matrix @ x - linear)
    dx = root * jnp.linalg.solve(system, root * slope)
    dz = (mu - z * dx) / x - z
    furthest = jnp.maximum(jnp.max(-dx / x), jnp.max(-dz / z))
    length = jnp.minimum(1, 0.99 / jnp.maximum(furthest, 0.99))
    keep = jnp.isfinite(length) & (mu > 1e-15)
    length = jnp.where(keep, length, 0)
    return x + length * dx, z + length * dz

  ones = jnp.ones_like(linear)
  x, _ = jax.lax.fori_loop(0, _INTERIOR_STEPS, body, (ones, ones))
  return largest * x


def singular(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(singular values [G], right singular vectors [G, G]) of a matrix [G, G].

  One-sided Jacobi: pairs of columns are rotated until all are orthogonal, which
  keeps small values as exact as large ones.

  Reference: Demmel & Veselic, "Jacobi's method is more accurate than QR", SIAM
    J. Matrix Anal. Appl. 1992.
  """
  size = len(matrix)
  pairs = jnp.stack(jnp.triu_indices(size, 1), -1)

  def rotate(stacked: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
    x, y = stacked[:, pair].T
    a, b, c = (jnp.sum((u * v)[:size]) for u, v in ((x, x), (y, y), (x, y)))
    slope = (b - a) / jnp.where(c != 0, 2 * c, 1)
    tangent = 1 / (jnp.abs(slope) + jnp.hypot(1, slope))
    tangent = jnp.where(c != 0, jnp.where(slope < 0, -tangent, tangent), 0)
    cosine = 1 / jnp.hypot(1, tangent)
    sine = cosine * tangent
    turned = jnp.stack([cosine * x - sine * y, sine * x + cosine * y], -1)
    return stacked.at[:, pair].set(turned), None

  stacked = jnp.concatenate([matrix, jnp.eye(size)])
  order = jnp.tile(pairs, (_JACOBI_SWEEPS, 1))
  stacked, _ = jax.lax.scan(rotate, stacked, order)
  return jnp.linalg.norm(stacked[:size], axis=0), stacked[size:]
