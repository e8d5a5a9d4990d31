"""Stage 3: an MLP on MNIST with Dropout and BatchNorm.

What to see here: dropout needs a random key, another one at each step; batch statistics
are neither parameters nor constants, so they come out of the forward pass, travel in the
train state, and take no part in the optimizer; training and evaluation differ.

    python mlp_flax_bn_dropout.py       --help shows the options

reaches 98.4% test accuracy in 5 epochs, in about 15 s on two CPU cores
(mean over five seeds: benchmarks/learning_curves.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from torch.utils.data import Dataset

from common import (
    DATA_DIR,
    Checkpoints,
    NumpyLoader,
    UserError,
    first_examples,
    load_mnist,
    run,
)

LAYER_SIZES = (512, 512, 10)
DROPOUT_RATES = (0.3, 0.4)  # the share of units dropped after each hidden layer
DECAY = 0.001  # the learning rate at the end, as a share of the one at the start
ADAM_B2 = 0.98  # a shorter memory than Adam's usual 0.999, for a short run
EVAL_BATCH_SIZE = 2000  # no gradients to keep, so larger batches than in training


@dataclass(frozen=True)
class Config:
    """Options of the command line: Annotated[type, help text, allowed range]."""

    data_dir: Annotated[Path, "where MNIST is or goes"] = DATA_DIR
    epochs: Annotated[int, "passes over the training set"] = 5
    batch_size: Annotated[int, "images per update", range(2, 2**32)] = 128
    learning_rate: Annotated[float, "of the first update"] = 2e-3
    seed: Annotated[int, "decides parameters, order and dropout", range(2**32)] = 0
    max_steps: Annotated[int | None, "stop after N updates", range(2**32)] = None
    train_examples: Annotated[int | None, "only the first N training images"] = None
    eval_every: Annotated[int | None, "evaluate every N updates, not each epoch"] = None
    checkpoint_dir: Annotated[
        Path | None,
        "save here after each epoch, and resume from here; a resumed run that is given "
        "more --epochs goes on along the schedule of the longer run",
    ] = None


class MLP(nn.Module):
    """Dense layers with relu, Dropout and BatchNorm in between, from images to logits.

    `layer_sizes` holds the outputs of each layer; the input's width is inferred by `init`.
    """

    layer_sizes: Sequence[int] = LAYER_SIZES
    dropout_rates: Sequence[float] = DROPOUT_RATES

    def setup(self) -> None:
        he_normal = nn.initializers.he_normal()
        self.layers = [nn.Dense(n, kernel_init=he_normal) for n in self.layer_sizes]
        self.dropouts = [nn.Dropout(rate) for rate in self.dropout_rates]
        # PyTorch would call this momentum 0.1: it counts the other way round.
        self.norms = [nn.BatchNorm(momentum=0.9) for _ in self.dropout_rates]

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """One image (784,) to logits (10,), or a batch (B, 784) to (B, 10)."""
        for layer, dropout, norm in zip(self.layers, self.dropouts, self.norms):
            x = layer(x)
            x = nn.relu(x)
            x = dropout(x, deterministic=not train)
            x = norm(x, use_running_average=not train)
        return self.layers[-1](x)


class CustomTrainState(TrainState):
    """A TrainState that carries the running statistics, which get no gradients."""

    batch_stats: dict


# Compiled as one program, which starts faster. In a notebook, define it again after MLP.
@partial(jax.jit, static_argnums=(1, 2))
def create_train_state(
    keys: dict[str, jax.Array], learning_rate: float, total_steps: int
) -> CustomTrainState:
    """Initial parameters, and Adam with a schedule that spans the run."""
    model = MLP()  # model(x) would fail: parameters come from init, and go into apply
    variables = model.init(keys, jnp.zeros((1, 784)), train=True)
    schedule = optax.linear_schedule(learning_rate, DECAY * learning_rate, total_steps)
    return CustomTrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.adam(schedule, b2=ADAM_B2),
    )


@partial(jax.jit, donate_argnums=0)
def train_step(
    state: CustomTrainState, x: jax.Array, y: jax.Array, dropout_key: jax.Array
) -> tuple[CustomTrainState, jax.Array]:
    """One update on images x (B, 784) and classes y (B,): new state, and the loss.

    The old state is donated: its memory is used again, so it cannot be read any more.
    """
    step_key = jax.random.fold_in(dropout_key, state.step)  # other units at each step

    def loss_fn(params):
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            train=True,
            rngs={"dropout": step_key},
            mutable=["batch_stats"],  # without this, BatchNorm's update is an error
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, updates["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


@jax.jit
def apply_model(state: CustomTrainState, x: jax.Array) -> jax.Array:
    """Predicted classes, int32 (B,), of images x (B, 784)."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return state.apply_fn(variables, x, train=False).argmax(axis=-1)


def eval_model(state: CustomTrainState, loader: NumpyLoader) -> float:
    """Accuracy over a loader: the share of examples predicted correctly."""
    correct = total = 0
    for x, y in loader:
        correct += int((apply_model(state, x) == y).sum())
        total += len(y)
    return correct / total


def check_loss(loss: jax.Array, params: dict, step: int, rate: float) -> None:
    """Raise UserError if training has diverged; not for every step, for it waits."""
    # The loss is from before the update, the parameters are from after it.
    squares = sum(jnp.vdot(p, p) for p in jax.tree.leaves(params))
    if not jnp.isfinite(loss + squares):
        raise UserError(
            f"training has diverged, with a loss of {loss} at step {step}; "
            f"try a --learning-rate below {rate}"
        )


def train(
    config: Config, train_set: Dataset, test_set: Dataset, data_name: str
) -> CustomTrainState:
    """Train, print a line for each evaluation, and return the last state.

    Raises:
        UserError: training has diverged, or a checkpoint cannot be used.
    """
    root_key = jax.random.key(config.seed)
    params_key, order_key, dropout_key = jax.random.split(root_key, 3)
    train_loader = NumpyLoader(
        train_set, order_key, config.batch_size, shuffle=True, drop_last=True
    )
    total_steps = config.epochs * len(train_loader)
    keys = {"params": params_key, "dropout": dropout_key}
    state = create_train_state(keys, config.learning_rate, total_steps)
    print(f"parameters: {sum(p.size for p in jax.tree.leaves(state.params)):,}")
    checkpoints = None
    if config.checkpoint_dir:
        settings = {
            "script": Path(__file__).stem,
            "data": data_name,
            "layer sizes": list(LAYER_SIZES),
            "dropout rates": list(DROPOUT_RATES),
            "Adam's b2": ADAM_B2,
            "decay": DECAY,
            "seed": config.seed,
            "batch size": config.batch_size,
            "learning rate": config.learning_rate,
            "training examples": len(train_set),
        }
        checkpoints = Checkpoints(config.checkpoint_dir, settings)
        state = checkpoints.restore(state)

    # Evaluation has loaders of its own, in order and over the whole sets.
    train_eval_loader = NumpyLoader(train_set, batch_size=EVAL_BATCH_SIZE)
    test_loader = NumpyLoader(test_set, batch_size=EVAL_BATCH_SIZE)
    eval_every = config.eval_every or len(train_loader)
    last_step = total_steps
    if config.max_steps is not None:
        last_step = min(config.max_steps, total_steps)
    step = int(state.step)
    if step > last_step:
        raise UserError(
            f"{config.checkpoint_dir} is at step {step} already, and the run is to end "
            f"with step {last_step}; raise --epochs or --max-steps"
        )
    try:
        for epoch in range(step // len(train_loader), config.epochs):
            train_loader.sampler.set_epoch(epoch)  # decides the order, with the key
            for x, y in islice(train_loader, last_step - step):  # --max-steps
                state, loss = train_step(state, x, y, dropout_key)
                step += 1
                if step % eval_every == 0 or step == last_step:
                    check_loss(loss, state.params, step, config.learning_rate)
                    print(
                        f"epoch {epoch + 1}  step {step}  loss {loss:.4f}  "
                        f"train accuracy {eval_model(state, train_eval_loader):.2%}  "
                        f"test accuracy {eval_model(state, test_loader):.2%}  "
                        f"({data_name})"
                    )
            if checkpoints and step == (epoch + 1) * len(train_loader):
                check_loss(loss, state.params, step, config.learning_rate)
                checkpoints.save(step, state)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"after {step} of {last_step} updates") from None
    return state


def main(config: Config) -> float:
    """Train on MNIST and return the accuracy on the test set."""
    train_set, test_set, data_name = load_mnist(config.data_dir)
    train_set = first_examples(train_set, config.train_examples, config.batch_size)
    print(
        f"data: {data_name}, {len(train_set):,} training and {len(test_set):,} test images"
    )
    print(f"device: {jax.devices()[0].device_kind}")
    state = train(config, train_set, test_set, data_name)
    test_accuracy = eval_model(state, NumpyLoader(test_set, batch_size=EVAL_BATCH_SIZE))
    print(f"final test accuracy: {test_accuracy:.2%} ({data_name})")
    return test_accuracy


if __name__ == "__main__":
    run(main, Config)
