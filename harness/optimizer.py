"""What a training step minimises, and how it moves the weights: loss, schedule, AdamW, averages."""

import keras
from keras import ops


@keras.saving.register_keras_serializable("vit")
def crossentropy(labels, logits):
    """Cross-entropy of logits, (batch,); labels: classes (batch,) or their shares (batch, classes),
    which augmentation makes of them where it mixes or smooths."""
    if len(labels.shape) == 1:
        return ops.sparse_categorical_crossentropy(ops.cast(labels, "int32"), logits, True)
    return ops.categorical_crossentropy(labels, logits, from_logits=True)


def create_optimizer(config, model, steps):
    """AdamW for a model, over epochs of so many steps, scheduled as the configuration asks."""
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
    optimizer = keras.optimizers.AdamW(
        schedule,
        weight_decay=config.weight_decay,
        beta_1=config.beta_1,
        beta_2=config.beta_2,
        global_clipnorm=config.clip_norm,
        use_ema=config.ema is not None,
        ema_momentum=config.ema or 0.0,
    )
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
