"""Densities in the plane and of digits: a normalising flow and diffusion models.

Source: L. Dinh, J. Sohl-Dickstein and S. Bengio, "Density estimation using Real NVP", 2017; J. Ho, A. Jain
and P. Abbeel, "Denoising Diffusion Probabilistic Models", 2020, with the cosine schedule of A. Nichol and P.
Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import make_moons

from experiments.tasks.base import Batch, Params, Task
from experiments.tasks.images import load_digits
from experiments.tasks.networks import init_dense, init_mlp, mlp

_COUPLINGS, _FLOW_HIDDEN = 6, 32
_POINTS, _TEST_POINTS = 8192, 2048
_DENOISER_HIDDEN = 128
_FREQUENCIES = 2.0 ** np.arange(4)  # of the noise level's embedding


def _moons(rng: np.random.Generator, count: int) -> np.ndarray:
    return make_moons(count, noise=0.08, random_state=int(rng.integers(2**31)))[0]


def _pinwheel(rng: np.random.Generator, count: int) -> np.ndarray:
    """Five arms, bent more the further out."""
    arm = rng.integers(0, 5, count)
    along, across = 1 + 0.35 * rng.normal(size=count), 0.08 * rng.normal(size=count)
    angle = 2 * np.pi * arm / 5 + 0.7 * np.exp(along)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([along * cos - across * sin, along * sin + across * cos], axis=1)


def _grid(rng: np.random.Generator, count: int) -> np.ndarray:
    """Nine Gaussians on a grid."""
    return rng.integers(-1, 2, (count, 2)) + 0.1 * rng.normal(size=(count, 2))


SHAPES = {"moons": _moons, "pinwheel": _pinwheel, "grid": _grid}


def sample_shape(shape: str) -> tuple[Batch, Batch]:
    """Training and test points in the plane, of mean 0 and variance 1 in each coordinate."""
    points = SHAPES[shape](np.random.default_rng(0), _POINTS + _TEST_POINTS)
    points = ((points - points.mean(axis=0)) / points.std(axis=0)).astype(np.float32)
    points = np.random.default_rng(1).permutation(points)
    return {"input": points[:_POINTS]}, {"input": points[_POINTS:]}


def make_flow(name: str, shape: str) -> Task:
    """RealNVP with six couplings; the loss is the negative log-likelihood of a point, in nats."""

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, _COUPLINGS)
        return [init_mlp(key, (1, _FLOW_HIDDEN, _FLOW_HIDDEN, 2)) for key in keys]

    def loss(params: Params, batch: Batch) -> jax.Array:
        kept, changed = batch["input"][:, :1], batch["input"][:, 1:]
        log_determinant = jnp.zeros(len(kept))
        for layers in params:
            log_scale, shift = jnp.split(mlp(layers, kept, jnp.tanh), 2, axis=1)
            log_scale = 2 * jnp.tanh(log_scale / 2)
            kept, changed = changed * jnp.exp(log_scale) + shift, kept
            log_determinant += log_scale[:, 0]
        latent = jnp.concatenate([kept, changed], axis=1)
        return jnp.mean(0.5 * jnp.sum(latent**2, axis=1) + jnp.log(2 * jnp.pi) - log_determinant)

    train, test = sample_shape(shape)
    return Task(name, init, loss, loss, "negative log-likelihood", train, test, 128, measure="loss")


def make_diffusion_points(name: str, shape: str) -> Task:
    """A denoiser of points in the plane."""
    return _diffusion(name, *sample_shape(shape))


def make_diffusion_digits(name: str, data_dir: Path | None = None) -> Task:
    """A denoiser of the 8x8 digits."""

    def load(split: str) -> Batch:
        images = load_digits(split, data_dir)["input"]
        return {"input": 2 * images.reshape(len(images), -1) - 1}

    return _diffusion(name, load("train"), load("test"))


def _diffusion(name: str, train: Batch, test: Batch) -> Task:
    """A perceptron predicts the noise in an example, with a skip connection from the example.

    There are several copies of each example, each with a seed of its noise; the metric is the squared error
    of the noise that is predicted in the test examples.
    """
    size = train["input"].shape[1]
    rng = np.random.default_rng(0)
    repeated = lambda rows, times: np.tile(rows, (times, 1))  # noqa: E731
    train, test = (
        {"input": rows, "seed": rng.integers(0, 2**32, len(rows), dtype=np.uint32)}
        for rows in (repeated(train["input"], 32 if size > 2 else 8), repeated(test["input"], 2))
    )

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key)
        inputs = size + 1 + 2 * len(_FREQUENCIES)
        return {
            "denoiser": init_mlp(keys[0], (inputs, _DENOISER_HIDDEN, _DENOISER_HIDDEN, size)),
            "skip": init_dense(keys[1], size, size),
        }

    def loss(params: Params, batch: Batch) -> jax.Array:
        keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(batch["seed"])
        level = jax.vmap(jax.random.uniform)(keys[:, 0])[:, None]
        noise = jax.vmap(lambda key: jax.random.normal(key, (size,)))(keys[:, 1])
        angle = 0.5 * jnp.pi * level
        noisy = jnp.cos(angle) * batch["input"] + jnp.sin(angle) * noise
        waves = level * _FREQUENCIES * jnp.pi
        inputs = jnp.concatenate([noisy, level, jnp.sin(waves), jnp.cos(waves)], axis=1)
        hidden = mlp(params["denoiser"], inputs, jax.nn.silu)
        predicted = hidden + noisy @ params["skip"]["kernel"] + params["skip"]["bias"]
        return jnp.mean((predicted - noise) ** 2)

    return Task(name, init, loss, loss, "mean squared error", train, test, 128, measure="loss")
