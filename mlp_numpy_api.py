"""Stage 1: an MLP on MNIST with jax.numpy, grad, jit, vmap and pytrees.

This stage shows that
- random keys are split, and never used twice;
- the forward pass is written for one image, and `vmap` makes it work on a batch;
- a list of tuples is already a pytree, so one `tree.map` updates all parameters.

Run `python mlp_numpy_api.py`. It reaches 98.4% test accuracy (mean of five seeds)
in 5 epochs, which take about half a minute on two CPU cores.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common import DataError, NumpyLoader, load_mnist

LAYER_SIZES = (784, 512, 512, 10)  # inputs, then units of each layer
EPOCHS = 5
BATCH_SIZE = 32
LEARNING_RATE = 0.3
FINAL_LEARNING_RATE = 0.1
EVAL_BATCH_SIZE = 2000

Params = list[tuple[Array, Array]]


def random_layer_params(m: int, n: int, key: Array) -> tuple[Array, Array]:
    """Return weights (n, m), normal with variance 2 / m, and biases (n,) of zero.

    Source of the variance: He et al., Delving Deep into Rectifiers, 2015.
    """
    weights = jnp.sqrt(2 / m) * jax.random.normal(key, (n, m))
    return weights, jnp.zeros(n)


def init_network_params(sizes: Sequence[int], key: Array) -> Params:
    """Return a list of (weights, biases), one pair for each layer."""
    # With the same key, two layers would get the same random numbers.
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        random_layer_params(m, n, layer_key)
        for m, n, layer_key in zip(sizes[:-1], sizes[1:], keys, strict=True)
    ]


def relu(x: Array) -> Array:
    return jnp.maximum(x, 0)


def model_forward(params: Params, x: Array) -> Array:
    """Return the logits (10,) of ONE image (784,)."""
    for w, b in params[:-1]:
        x = relu(w @ x + b)
    w, b = params[-1]
    return w @ x + b


# model_forward(params, batch) would fail: (512, 784) @ (32, 784) is a shape error. vmap
# turns it into a function from images (B, 784) to logits (B, 10).
batched_forward = jax.jit(jax.vmap(model_forward, in_axes=(None, 0)))


def one_hot(x: Array, k: int = 10) -> Array:
    """Return classes (B,), integers from 0 to k - 1, as float32 (B, k).

    Any other class becomes a row of zeros, which adds nothing to the loss.
    """
    return (x[:, None] == jnp.arange(k)).astype(jnp.float32)


@jax.jit
def loss(params: Params, images: Array, targets: Array) -> Array:
    """Return the mean cross-entropy on images (B, 784) and classes (B,)."""
    logits = batched_forward(params, images)
    # Without axis and keepdims, logsumexp would normalise over the whole batch.
    log_probs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return -(one_hot(targets) * log_probs).sum(axis=-1).mean()


@jax.jit
def sgd_update(params: Params, x: Array, y: Array, lr: float) -> Params:
    """Return the parameters after a step on images x (B, 784) and classes y (B,)."""
    grads = jax.grad(loss)(params, x, y)  # the same structure as params
    return jax.tree.map(lambda p, g: p - lr * g, params, grads)


def learning_rate_at(step: int, initial: float, total_steps: int) -> float:
    """Return the exponentially decayed learning rate after `step` steps."""
    decay = FINAL_LEARNING_RATE / initial
    return initial * decay ** (step / total_steps)


def accuracy(params: Params, loader: NumpyLoader) -> float:
    """Return the accuracy over the whole loader, from 0 to 1."""
    correct = [batched_forward(params, x).argmax(axis=-1) == y for x, y in loader]
    return float(np.concatenate(correct).mean())


# Pasted into a notebook, this code has no __file__.
SCRIPT = Path(globals().get("__file__", "notebook"))
DATA_DIR = SCRIPT.with_name("data")


# Argument types: if one raises an error, argparse reports it with the option's name.
def positive_int(text: str) -> int:
    value = int(text)
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 2**31 - 1")
    return value


def non_negative_int(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**31 - 1")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not positive and finite")
    return value


def user_path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train an MLP on MNIST with jax.numpy alone."
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        type=user_path,
        default=DATA_DIR,
        help="where MNIST is, or is downloaded to (default: data, beside the script)",
    )
    parser.add_argument(
        "--epochs",
        metavar="N",
        type=positive_int,
        default=EPOCHS,
        help="passes over the training set (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=positive_int,
        default=BATCH_SIZE,
        help="images per step (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rate",
        metavar="X",
        type=positive_float,
        default=LEARNING_RATE,
        help=f"initial learning rate; the final one is {FINAL_LEARNING_RATE} "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=non_negative_int,
        default=0,
        help="random seed (default: %(default)s)",
    )
    parser.add_argument(
        "--max-steps",
        metavar="N",
        type=non_negative_int,
        help="stop after step N of the run (default: after the last epoch)",
    )
    parser.add_argument(
        "--train-examples",
        metavar="N",
        type=positive_int,
        help="train on the first N images only (default: all of them)",
    )
    parser.add_argument(
        "--eval-every",
        metavar="N",
        type=positive_int,
        help="evaluate every N steps (default: once an epoch)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> float:
    """Train with the options in `argv`; return the test accuracy, from 0 to 1."""
    parser = make_parser()
    args = parser.parse_args(argv)

    try:
        device = jax.devices()[0]
    except (AssertionError, RuntimeError) as error:  # depending on the platform
        sys.exit(
            f"error: no device for JAX_PLATFORMS={jax.config.jax_platforms}: {error!r}"
        )

    train_set, test_set, data_name = load_mnist(args.data_dir)
    # train_set is a list; for a Dataset, use torch.utils.data.Subset, not a slice.
    train_set = train_set[: args.train_examples]
    if args.batch_size > len(train_set):
        parser.error(
            f"argument --batch-size: {args.batch_size} exceeds the "
            f"{len(train_set)} training images"
        )

    key = jax.random.key(args.seed)
    params_key, shuffle_key = jax.random.split(key)
    train_loader = NumpyLoader(
        train_set, shuffle_key, args.batch_size, shuffle=True, drop_last=True
    )
    # Evaluation has its own loaders: unshuffled, and no example is dropped.
    train_eval_loader = NumpyLoader(train_set, batch_size=EVAL_BATCH_SIZE)
    test_loader = NumpyLoader(test_set, batch_size=EVAL_BATCH_SIZE)

    steps_per_epoch = len(train_loader)
    total_steps = args.epochs * steps_per_epoch
    last_step = total_steps
    if args.max_steps is not None:
        last_step = min(args.max_steps, total_steps)
    eval_every = args.eval_every or steps_per_epoch

    params = init_network_params(LAYER_SIZES, params_key)
    num_params = sum(p.size for p in jax.tree.leaves(params))
    print(
        f"data: {data_name}, {len(train_set):,} training and {len(test_set):,} test images"
    )
    print(f"device: {device.device_kind}")
    print(f"parameters: {num_params:,}")

    batches = train_loader.batches_from(0)
    for step in range(1, last_step + 1):
        x, y = next(batches)  # NumPy arrays; the jitted step moves them to the device
        lr = learning_rate_at(step - 1, args.learning_rate, total_steps)
        is_eval_step = step % eval_every == 0 or step == last_step
        if is_eval_step:
            loss_before = loss(params, x, y)
        params = sgd_update(params, x, y, lr)

        if is_eval_step:
            leaves = jax.tree.leaves((loss_before, params))
            if not all(np.isfinite(leaf).all() for leaf in leaves):
                sys.exit(
                    f"error: diverged at step {step}: lower --learning-rate, or check for "
                    "labels that the model has no output for"
                )
            epoch = (step - 1) // steps_per_epoch + 1
            train_accuracy = accuracy(params, train_eval_loader)
            test_accuracy = accuracy(params, test_loader)
            print(
                f"epoch {epoch}  step {step}  loss {loss_before:.4f}  "
                f"train accuracy {train_accuracy:.2%}  test accuracy {test_accuracy:.2%}",
                flush=True,
            )

    test_accuracy = accuracy(params, test_loader)
    print(f"final test accuracy: {test_accuracy:.2%} ({data_name})")
    return test_accuracy


if __name__ == "__main__" and "__file__" not in globals():
    main([])  # pasted into a notebook, where sys.argv holds the options of Jupyter
elif __name__ == "__main__":
    # Ctrl-C stops the process at once, even during XLA's compilation.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error} (see --data-dir)")
