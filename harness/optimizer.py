"""What a training step minimises, and how it moves the weights: loss, schedule, AdamW or Muon,
averages."""

import math
import re

import keras
from keras import ops


@keras.saving.register_keras_serializable("vit")
def crossentropy(labels, logits):
    """Cross-entropy of logits, (batch,); labels: classes (batch,) or their shares (batch, classes),
    which augmentation makes of them where it mixes or smooths."""
    if len(labels.shape) == 1:
        return ops.sparse_categorical_crossentropy(ops.cast(labels, "int32"), logits, True)
    return ops.categorical_crossentropy(labels, logits, from_logits=True)


@keras.saving.register_keras_serializable("vit")
class Muon(keras.optimizers.Muon):
    """Muon for kernels, but those that `exclude_layers` names, as it should the last layer's; AdamW
    for everything else.

    What moves a kernel is its momentum with all singular values made about 1 by five steps of a
    Newton-Schulz iteration (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), scaled
    to the length that AdamW's steps have (Liu et al. 2025, https://arxiv.org/abs/2502.16982).

    Keras' own takes weights of two dimensions, one after the other. Here the projections of
    attention and convolutions are matrices, too, and all of one shape are computed at once, in the
    precision of the model's matrix products.
    """

    def is_matrix(self, variable):
        """Whether Muon moves it: a kernel that is no vector and not excluded."""
        is_excluded = any(re.search(words, variable.path) for words in self.exclude_layers)
        return variable.name == "kernel" and not is_excluded and 1 not in flatten(variable)

    def _should_use_adamw(self, variable):
        return not self.is_matrix(variable)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        self.update_matrices(grads, trainable_variables, learning_rate)
        for gradient, variable in zip(grads, trainable_variables):
            if not self.is_matrix(variable):
                self.update_step(gradient, variable, learning_rate)

    def update_matrices(self, gradients, variables, learning_rate):
        """Move those of the variables that are matrices. (PyTorch's compiled training has kernels
        of its own for it, see engine.py.)"""
        groups = {}
        for gradient, variable in zip(gradients, variables):
            if self.is_matrix(variable):
                groups.setdefault(flatten(variable), []).append((gradient, variable))
        for shape, members in groups.items():
            moves = []
            for gradient, variable in members:
                momentum = self.momentums[self._get_variable_index(variable)]
                momentum.assign(momentum.value * self.momentum + gradient)
                ahead = momentum.value * self.momentum + gradient
                moves.append(ops.reshape(ahead if self.nesterov else momentum.value, shape))
            moves = ops.stack(moves)  # of which float16 could not hold the squares
            moves = moves / (ops.norm(moves, axis=(1, 2), keepdims=True) + 1e-7)
            moves = ops.cast(moves, keras.config.dtype_policy().compute_dtype)
            moves = ops.cast(self.zeropower_via_newtonschulz5(moves, self.ns_steps), "float32")
            length = self.rms_rate * math.sqrt(max(shape)) if self.rms_rate else 1.0
            moves = moves * (learning_rate * length)
            for number, (_, variable) in enumerate(members):
                variable.assign(variable.value - ops.reshape(moves[number], variable.shape))


def flatten(kernel):
    """The shape of a kernel as a matrix of inputs and outputs: for attention's projections
    (inputs, heads, size) and (heads, size, outputs), for a convolution (height, width, channels,
    filters)."""
    is_projection = kernel.path.split("/")[-2] in ("query", "key", "value")
    cut = 1 if is_projection else len(kernel.shape) - 1
    return math.prod(kernel.shape[:cut]), math.prod(kernel.shape[cut:])


def create_optimizer(config, model, steps):
    """AdamW or Muon for a model, over epochs of so many steps, scheduled as the configuration
    asks."""
    rate = config.learning_rate
    if config.learning_rate_batch:  # Goyal et al. 2017, https://arxiv.org/abs/1706.02677
        rate *= config.batch_size / config.learning_rate_batch
    schedule = rate
    if config.schedule == "cosine":
        warmup = round(config.warmup_epochs * steps)
        schedule = keras.optimizers.schedules.CosineDecay(
            0.0 if warmup else rate,
            decay_steps=max(1, config.num_epochs * steps - warmup),
            alpha=config.final_learning_rate / rate,
            warmup_target=rate if warmup else None,
            warmup_steps=warmup,
        )
    choices = {
        "learning_rate": schedule,
        "weight_decay": config.weight_decay,
        "global_clipnorm": config.clip_norm,
        "use_ema": config.ema is not None,
        "ema_momentum": config.ema or 0.0,
    }
    if config.optimizer == "muon":
        optimizer = Muon(
            **choices,
            adam_weight_decay=config.weight_decay,
            adam_beta_1=config.beta_1,
            adam_beta_2=config.beta_2,
            exclude_layers=["(^|/)(logits|painted)/"],  # the last layer, pretrain.py's included
        )
    else:
        optimizer = keras.optimizers.AdamW(**choices, beta_1=config.beta_1, beta_2=config.beta_2)
    if config.decay_kernels_only:
        others = [v for v in model.trainable_variables if v.name != "kernel"]
        optimizer.exclude_from_weight_decay(var_list=others)
    return optimizer


class AverageWeights(keras.callbacks.Callback):
    """Put the optimiser's average of the weights into the model for validation, the checkpoint and
    after the last epoch. (On PyTorch's CPU keras.callbacks.SwapEMAWeights loses the weights: what
    it keeps of them is a view of their memory.)"""

    is_average = False

    def on_train_begin(self, logs=None):
        # fit would end by putting the average into the model: there it is, and the weights not.
        self.model.optimizer.finalize_variable_values = lambda weights: None

    def swap(self, is_average):
        if self.is_average != is_average:
            self.is_average, optimizer = is_average, self.model.optimizer
            optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # in float16
            averages = optimizer._model_variables_moving_average
            for weight, average in zip(optimizer._trainable_variables, averages):
                kept = ops.copy(weight.value)
                weight.assign(average)
                average.assign(kept)

    def on_epoch_begin(self, epoch, logs=None):
        self.swap(False)

    def on_test_begin(self, logs=None):
        self.swap(True)

    def on_epoch_end(self, epoch, logs=None):
        self.swap(True)

    def on_train_end(self, logs=None):
        self.swap(True)
