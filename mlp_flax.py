"""Stage 2: an MLP on MNIST with Flax, Optax and a TrainState.

This stage shows that
- a Flax module stores no parameters: `init` returns them, and `apply` takes them;
- Optax turns gradients into updates, and a schedule is part of the optimizer;
- a TrainState holds everything that training changes, so a training step is a function
  from the old state to the new one, and a checkpoint is a saved state.

Run `python mlp_flax.py`. It reaches 98.6% test accuracy (mean of five seeds)
in 5 epochs, which take about half a minute on two CPU cores.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from flax.training.train_state import TrainState
from jax import Array

from common import DataError, NumpyLoader, load_mnist

LAYER_SIZES = (512, 512, 10)  # units per layer; the last has one per class
EPOCHS = 5
BATCH_SIZE = 32
LEARNING_RATE = 1e-3
FINAL_LEARNING_RATE = 1e-5
EVAL_BATCH_SIZE = 2000


class MLP(nn.Module):
    """Dense layers with relu in between."""

    layer_sizes: Sequence[int] = LAYER_SIZES

    def setup(self) -> None:
        # The number of inputs is not given here: init infers it from an example.
        self.layers = [nn.Dense(size) for size in self.layer_sizes]

    def __call__(self, x: Array) -> Array:
        """Return the logits (B, 10) of images (B, 784)."""
        for layer in self.layers[:-1]:
            x = nn.relu(layer(x))
        return self.layers[-1](x)


def create_train_state(
    params_key: Array, learning_rate: float, total_steps: int
) -> TrainState:
    """Return a new state: initial parameters, and Adam with linear decay."""
    model = MLP()
    # A module holds no parameters, so model(x) would fail. jit makes init faster.
    init = jax.jit(model.init)
    variables = init(params_key, jnp.zeros((1, 784)))
    schedule = optax.linear_schedule(learning_rate, FINAL_LEARNING_RATE, total_steps)
    optimizer = optax.adam(schedule)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optimizer,
    )


@partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, x: Array, y: Array) -> tuple[TrainState, Array]:
    """Take one step on images x (B, 784) and classes y (B,), which count from 0.

    Returns the new state, and the loss of this batch before the update. The old state
    is donated: its memory is reused, so it cannot be read after the call.
    """

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    grad_fn = jax.value_and_grad(loss_fn)
    loss, grads = grad_fn(state.params)
    return state.apply_gradients(grads=grads), loss


@jax.jit
def apply_model(state: TrainState, x: Array) -> Array:
    """Return the predicted classes, int32 (B,), of images x (B, 784)."""
    logits = state.apply_fn({"params": state.params}, x)
    return logits.argmax(axis=-1)


def eval_model(state: TrainState, loader: NumpyLoader) -> float:
    """Return the accuracy over the whole loader, from 0 to 1."""
    correct = [apply_model(state, x) == y for x, y in loader]
    return float(np.concatenate(correct).mean())


def save_checkpoint(path: Path, run: dict[str, Any], state: TrainState) -> None:
    """Save `state` and `run`, a description of the run; exit if that is impossible.

    The file is replaced as a whole or not at all. A process that is killed meanwhile can
    leave a hidden directory beside it.
    """
    path = path.resolve()  # follow a symbolic link instead of replacing it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=".saving-") as scratch:
            new_file = Path(scratch, path.name)
            new_file.write_bytes(serialization.to_bytes({"run": run, "state": state}))
            new_file.replace(path)
    except OSError as error:
        sys.exit(f"error: cannot save the checkpoint {path}: {error}")


def load_checkpoint(path: Path, run: dict[str, Any], state: TrainState) -> TrainState:
    """Return the state saved in `path`; exit if it is not from the same run."""
    try:
        saved = serialization.msgpack_restore(path.read_bytes())
        for name, value in run.items():
            if saved["run"][name] != value:
                difference = f"its {name} is {saved['run'][name]}, not {value}"
                sys.exit(f"error: {path} is from another run: {difference}")
        return serialization.from_state_dict(state, saved["state"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        sys.exit(f"error: {path} is not a checkpoint of this script: {error}")


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
        description="Train an MLP on MNIST with Flax, Optax and a TrainState."
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
        help="evaluate, and save, every N steps (default: once an epoch)",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        type=user_path,
        help="save to FILE, and resume from it if it exists (default: save nothing)",
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
    if total_steps >= 2**31:
        parser.error("argument --epochs: Optax counts steps in 32 bits")
    last_step = total_steps
    if args.max_steps is not None:
        last_step = min(args.max_steps, total_steps)
    eval_every = args.eval_every or steps_per_epoch

    state = create_train_state(params_key, args.learning_rate, total_steps)
    num_params = sum(p.size for p in jax.tree.leaves(state.params))
    print(
        f"data: {data_name}, {len(train_set):,} training and {len(test_set):,} test images"
    )
    print(f"device: {device.device_kind}")
    print(f"parameters: {num_params:,}")

    # Only a run with the same description resumes a checkpoint: add what you vary. The
    # number of epochs is not part of it, so a finished run can be extended.
    run = {
        "script": SCRIPT.name,
        "data": data_name,
        "number of training images": len(train_set),
        "number of parameters": num_params,
        "seed": args.seed,
        "random number generator": str(jax.random.key_impl(params_key)),
        "batch size": args.batch_size,
        "learning rate": args.learning_rate,
    }
    if args.checkpoint and args.checkpoint.exists():
        state = load_checkpoint(args.checkpoint, run, state)
        print(f"resuming after step {state.step}")

    start = int(state.step)
    batches = train_loader.batches_from(start)
    for step in range(start + 1, last_step + 1):
        x, y = next(batches)  # NumPy arrays; the jitted step moves them to the device
        state, loss = train_step(state, x, y)

        if step % eval_every == 0 or step == last_step:
            leaves = jax.tree.leaves((loss, state))
            if not all(np.isfinite(leaf).all() for leaf in leaves):
                sys.exit(
                    f"error: diverged at step {step}: lower --learning-rate, or check for "
                    "labels that the model has no output for"
                )
            epoch = (step - 1) // steps_per_epoch + 1
            train_accuracy = eval_model(state, train_eval_loader)
            test_accuracy = eval_model(state, test_loader)
            print(
                f"epoch {epoch}  step {step}  loss {loss:.4f}  "
                f"train accuracy {train_accuracy:.2%}  test accuracy {test_accuracy:.2%}",
                flush=True,
            )
            if args.checkpoint:
                save_checkpoint(args.checkpoint, run, state)

    test_accuracy = eval_model(state, test_loader)
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
