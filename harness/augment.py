"""Image augmentation on the device, batch-wise, with the same draws on every backend.

All random numbers are drawn here in NumPy, a few a picture; what runs on the device has no
randomness of its own, so each backend makes the same pictures, up to float rounding. Whatever moves
pixels is one affine map, and so one gather; whatever recolours them is a table of 256 values for
each picture and channel, and so one more.
"""

import numpy as np


class _Ops:
    """keras.ops, imported when it is used: who only draws, as the peers do, needs no Keras."""

    def __getattr__(self, name):
        from keras import ops

        return getattr(ops, name)


ops = _Ops()

# Operations that move pixels, and that recolour them. RandAugment draws among the named ones with
# equal chance; TrivialAugment likewise, of its own list.
MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
RECOLOURS = ("identity", "autocontrast", "equalize", "invert", "posterize", "solarize")
RECOLOURS += ("solarize_add", "brightness", "contrast", "color", "sharpness")
RAND = (*MOVES, *RECOLOURS[1:])  # 15: "increasing" of timm's rand-m9-mstd0.5-inc1
TRIVIAL = (*MOVES, *RECOLOURS[:3], *RECOLOURS[4:6], *RECOLOURS[7:])  # 14: table 2 of the paper


# ---------------------------------------------------------------------------------------------
# Draws, in NumPy


def draw_affine(count, seed, epoch, rotation=0.02, zoom=0.2, flip=True):
    """Draw one map per picture: horizontal flip (half of them), rotation, zoom of height and width.

    Args:
        count: how many pictures.
        seed, epoch: the same pair gives the same draws on every backend and machine.
        rotation: largest angle, as a fraction of a full turn, to either side.
        zoom: largest relative change of height and of width, drawn apart; above 0 zooms out.
        flip: off for none.

    Returns:
        float32 (count, 2, 2): from an output pixel's (x, y), measured from the centre, to the place
        in the source picture that it shows. The ranges and their meaning are those of
        keras.layers.RandomFlip, RandomRotation and RandomZoom applied in this order.
    """
    rng = np.random.default_rng([seed, epoch, 0xA46])
    mirror = np.where((rng.random(count) < 0.5) & flip, -1.0, 1.0)
    angle = 2 * np.pi * rng.uniform(-rotation, rotation, count)
    zoom_x, zoom_y = 1 + rng.uniform(-zoom, zoom, (2, count))
    cos, sin = np.cos(angle), np.sin(angle)
    maps = [[mirror * cos * zoom_x, -mirror * sin * zoom_y], [sin * zoom_x, cos * zoom_y]]
    return np.moveaxis(np.array(maps, "float32"), -1, 0)  # (count, 2, 2)


def draw_crop(maps, seed, epoch, pad):
    """Draw shifts by whole pixels, up to `pad` each way: a crop of the padded picture.

    Returns:
        maps, (count, 2, 2), with a third column, the shift: float32 (count, 2, 3).
    """
    shift = np.random.default_rng([seed, epoch, 0xC20B]).integers(-pad, pad + 1, (len(maps), 2, 1))
    return np.concatenate([maps, shift.astype("float32")], axis=2)


def draw_policy(count, seed, epoch, policy, size, magnitude=9.0, magnitude_std=0.5, layers=2):
    """Draw the operations of RandAugment or TrivialAugment, and how strong each is.

    RandAugment (Cubuk et al. 2020, https://arxiv.org/abs/1909.13719) as timm's
    rand-m9-mstd0.5-inc1, which DeiT and MAE train with: `layers` operations, each done with
    probability 1/2, of a strength that is normal around magnitude / 10 (kept in 0 to 1) of the
    largest. TrivialAugment (Müller and Hutter 2021, https://arxiv.org/abs/2103.10158, the wide
    space): one operation, always, of a strength of 0 to 30 thirtieths of the largest.

    Args:
        policy: "rand" or "trivial".
        size: pixels a side of the pictures: translations are relative to it in "rand".

    Returns:
        dict: moves, float32 (count, 3, 3), the operations that move pixels as one map of
        (x, y, 1), the first operation done first; colours, int32 (count, layers), an index into
        RECOLOURS; strengths, float32 (count, layers), what that one needs.
    """
    rng = np.random.default_rng([seed, epoch, 0x9A9D])
    wide = policy == "trivial"
    if wide:
        layers, names, is_done = 1, np.array(TRIVIAL), np.ones((count, 1), bool)
        level = rng.integers(0, 31, (count, 1)) / 30
    else:
        names, is_done = np.array(RAND), rng.random((count, layers)) < 0.5
        level = np.clip(rng.normal(magnitude, magnitude_std, (count, layers)) / 10, 0, 1)
    name = names[rng.integers(0, len(names), (count, layers))]
    sign = np.where(rng.random((count, layers)) < 0.5, -1.0, 1.0)
    enhance = 1 + sign * level * (0.99 if wide else 0.9)
    strongest = {
        "rotate": sign * level * np.radians(135 if wide else 30),
        "shear_x": sign * level * (0.99 if wide else 0.3),
        "shear_y": sign * level * (0.99 if wide else 0.3),
        "translate_x": sign * level * (32 if wide else 0.45 * size),
        "translate_y": sign * level * (32 if wide else 0.45 * size),
        # how many values become one: 2 for each bit that is lost
        "posterize": 2 ** (np.round(level * 6) if wide else 4 + np.floor(level * 4)),
        # the first value that is inverted
        "solarize": 255 - level * 255 if wide else 256 - np.floor(level * 256),
        "solarize_add": np.minimum(128, np.floor(level * 110)),
        **dict.fromkeys(("brightness", "contrast", "color", "sharpness"), enhance),
    }
    strengths = np.zeros((count, layers))
    for operation, values in strongest.items():
        strengths = np.where(name == operation, values, strengths)
    moves = np.broadcast_to(np.eye(3), (count, 3, 3))
    for layer in range(layers):
        moved = _create_moves(name[:, layer], strengths[:, layer], size)
        # The map of a place in the output: back through the second operation, then the first.
        moves = np.where(is_done[:, layer, None, None], moves @ moved, moves)
    colours = sum(np.where(name == RECOLOURS[i], i, 0) for i in range(len(RECOLOURS)))
    return {
        "moves": moves.astype("float32"),
        "colours": np.where(is_done, colours, 0).astype("int32"),
        "strengths": strengths.astype("float32"),
    }


def _create_moves(name, strength, size):
    """The maps, (count, 3, 3), of one operation each; the identity where it moves nothing.

    Measured from the picture's centre. Shears leave its upper or left edge in place, as Pillow's
    do.
    """
    maps = np.zeros((len(name), 3, 3)) + np.eye(3)
    cos, sin = np.cos(strength), np.sin(strength)
    turned = name == "rotate"
    for row, column, value in ((0, 0, cos), (0, 1, -sin), (1, 0, sin), (1, 1, cos)):
        maps[turned, row, column] = value[turned]
    for operation, row in (("shear_x", 0), ("shear_y", 1)):
        chosen = name == operation
        maps[chosen, row, 1 - row] = strength[chosen]
        maps[chosen, row, 2] = strength[chosen] * size / 2
    for operation, row in (("translate_x", 0), ("translate_y", 1)):
        chosen = name == operation
        maps[chosen, row, 2] = strength[chosen]
    return maps


def draw_erasing(count, seed, epoch, probability, size):
    """Draw a rectangle to erase in this share of the pictures: of 2 to 33 % of the area, its sides'
    ratio 0.3 to 1/0.3 (Zhong et al. 2020, https://arxiv.org/abs/1708.04896), wholly inside.

    Returns:
        int32 (count, 4): top, left, bottom, right, the latter two exclusive; empty for none.
    """
    rng = np.random.default_rng([seed, epoch, 0xE4A5E])
    area = rng.uniform(0.02, 1 / 3, count) * size**2
    ratio = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3), count))
    sides = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], 1)
    sides = np.minimum(np.round(sides), size - 1) * (rng.random((count, 1)) < probability)
    corner = np.floor(rng.random((count, 2)) * (size - sides + 1))
    return np.concatenate([corner, corner + sides], 1).astype("int32")


def draw_mix(count, seed, epoch, mixup, cutmix, size, probability=1.0, switch=0.5):
    """Draw how pictures 0 and 1, 2 and 3, ... are mixed: by mixup (Zhang et al. 2018,
    https://arxiv.org/abs/1710.09412), cutmix (Yun et al. 2019, https://arxiv.org/abs/1905.04899)
    or not at all.

    Args:
        mixup, cutmix: the parameter of the symmetric beta distribution of shares; 0 for never.
        probability: that a pair is mixed at all.
        switch: that it is cutmix where both are on.

    Returns:
        dict: share, float32 (count,), a picture's own part of its label; box, int32 (count, 4), as
        `draw_erasing` gives them, what comes from the other picture in cutmix, else empty.
    """
    rng = np.random.default_rng([seed, epoch, 0x312])
    pairs = (count + 1) // 2
    is_mixed = rng.random(pairs) < probability
    cut = (rng.random(pairs) < (switch if mixup and cutmix else float(cutmix > 0))) & is_mixed
    share = rng.beta(mixup or 1, mixup or 1, pairs)
    share = np.where(cut, rng.beta(cutmix or 1, cutmix or 1, pairs), share)
    side = np.round(size * np.sqrt(1 - share))[:, None]
    centre = rng.integers(0, size, (pairs, 2))
    corners = np.concatenate([centre - side // 2, centre - side // 2 + side], 1)
    box = (np.clip(corners, 0, size) * cut[:, None]).astype("int32")
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    share = np.where(cut, 1 - area / size**2, np.where(is_mixed, share, 1.0)).astype("float32")
    return {"share": np.repeat(share, 2)[:count], "box": np.repeat(box, 2, axis=0)[:count]}


# ---------------------------------------------------------------------------------------------
# All that a configuration asks for


def create_augmentation(config, count, size, mean):
    """What is done to `count` square training pictures of `size` pixels a side.

    Args:
        config: has the fields of ViTConfig from `augment` to `label_smoothing`.
        mean: the pictures' mean colour, (channels,). Where they are cropped or a policy moves
            them, it fills what lies outside; it also covers what is erased.

    Returns:
        (draw, apply), or (None, None) where nothing is done. draw(epoch): a dict of arrays of
        `count` rows, for the pictures in the epoch's order. apply(images, labels, rows of the
        draws): float32 images and, where labels are mixed or smoothed, shares of the classes,
        float32 (batch, classes).
    """
    fill = np.round(np.asarray(mean, "float32"))
    is_policy = config.policy != "none"
    is_mixed = config.augment and bool(config.mixup or config.cutmix)
    is_filled = bool(config.crop_padding) or is_policy
    is_whole = is_filled and not (config.rotation or config.zoom or is_policy)
    if not config.augment and not config.label_smoothing:
        return None, None

    def draw(epoch):
        if not config.augment:
            return {}
        seeds, draws = (config.seed, epoch), {}
        maps = draw_affine(count, *seeds, config.rotation, config.zoom, config.flip)
        if is_filled:
            maps = draw_crop(maps, *seeds, config.crop_padding)
        if is_policy:
            rand = (config.rand_magnitude, config.rand_std, config.rand_layers)
            draws = draw_policy(count, *seeds, config.policy, size, *rand)
            maps = maps @ draws.pop("moves")
        if config.erasing:
            draws["erased"] = draw_erasing(count, *seeds, config.erasing, size)
        if is_mixed:
            beta = (config.mixup, config.cutmix)
            mix = draw_mix(count, *seeds, *beta, size, config.mix_probability, config.mix_switch)
            draws |= mix
        return {"maps": maps, **draws}

    def apply(images, labels, draws):
        if config.augment:
            move = apply_shift if is_whole else apply_affine
            images = move(images, draws["maps"], *([fill] if is_filled else []))
            if is_policy:
                images = apply_colours(
                    ops.floor(images + 0.5), draws["colours"], draws["strengths"]
                )
            if config.erasing:
                images = apply_erasing(images, draws["erased"], fill)
        images = ops.cast(images, "float32")
        if is_mixed or config.label_smoothing:
            labels = soften(labels, config.num_classes, config.label_smoothing)
        if is_mixed:
            images, labels = apply_mix(images, labels, draws["share"], draws["box"])
        return images, labels

    return draw, apply


# ---------------------------------------------------------------------------------------------
# On the device


def apply_affine(images, maps, fill=None):
    """Resample each picture through its own map, bilinearly.

    Args:
        images: (batch, height, width, channels), any dtype.
        maps: float32 (batch, 2, 2), as `draw_affine` gives them, or with a shift (batch, 2, 3).
        fill: what lies outside a picture: its mirror image (None), or a colour, (channels,).

    Returns:
        float32 (batch, height, width, channels), in the range of the input.
    """
    batch, height, width, channels = images.shape
    source_x, source_y = _find_sources(maps, height, width)
    left, top = ops.floor(source_x), ops.floor(source_y)
    right_share, bottom_share = source_x - left, source_y - top
    left, top = ops.cast(left, "int32"), ops.cast(top, "int32")
    fold = _mirror if fill is None else _clamp
    columns = (fold(left, width), fold(left + 1, width))
    first = ops.expand_dims(ops.arange(batch, dtype="int32") * (height * width), 1)
    rows = [first + fold(row, height) * width for row in (top, top + 1)]
    pixels = ops.reshape(images, (-1, channels))

    def tap(row, column, share):
        values = ops.take(pixels, ops.reshape(row + column, (-1,)), axis=0)
        return ops.cast(values, "float32") * ops.reshape(share, (-1, 1))

    result = (
        tap(rows[0], columns[0], (1 - bottom_share) * (1 - right_share))
        + tap(rows[0], columns[1], (1 - bottom_share) * right_share)
        + tap(rows[1], columns[0], bottom_share * (1 - right_share))
        + tap(rows[1], columns[1], bottom_share * right_share)
    )
    if fill is not None:
        result = _fill_outside(result, source_x, source_y, height, width, fill)
    return ops.reshape(result, (batch, height, width, channels))


def apply_shift(images, maps, fill):
    """`apply_affine` for maps that only flip and shift by whole pixels: one tap, not four."""
    batch, height, width, channels = images.shape
    source_x, source_y = _find_sources(maps, height, width)
    x, y = ops.cast(ops.round(source_x), "int32"), ops.cast(ops.round(source_y), "int32")
    first = ops.expand_dims(ops.arange(batch, dtype="int32") * (height * width), 1)
    index = first + _clamp(y, height) * width + _clamp(x, width)
    result = ops.take(ops.reshape(images, (-1, channels)), ops.reshape(index, (-1,)), axis=0)
    result = ops.cast(result, "float32")
    result = _fill_outside(result, source_x, source_y, height, width, fill)
    return ops.reshape(result, (batch, height, width, channels))


def _find_sources(maps, height, width):
    """Where each output pixel comes from: x and y, float32 (batch, height * width) each."""
    center_x, center_y = (width - 1) / 2, (height - 1) / 2
    y, x = np.mgrid[:height, :width].reshape(2, 1, -1)
    x = ops.convert_to_tensor(x - center_x, "float32")  # (1, pixels)
    y = ops.convert_to_tensor(y - center_y, "float32")
    source_x = maps[:, 0, :1] * x + maps[:, 0, 1:2] * y + center_x
    source_y = maps[:, 1, :1] * x + maps[:, 1, 1:2] * y + center_y
    if maps.shape[-1] == 3:
        source_x, source_y = source_x + maps[:, 0, 2:], source_y + maps[:, 1, 2:]
    return source_x, source_y


def _mirror(index, size):
    """Fold an index that left the picture back into it: 1 0 | 0 1 2 ... (at most one size)."""
    index = ops.where(index < 0, -1 - index, index)
    index = ops.where(index >= size, 2 * size - 1 - index, index)
    return ops.clip(index, 0, size - 1)


def _clamp(index, size):
    return ops.clip(index, 0, size - 1)


def _fill_outside(pixels, source_x, source_y, height, width, fill):
    """A colour for the pixels, (batch * height * width, channels), whose source is outside."""
    inside = (source_x >= -0.5) & (source_x < width - 0.5)
    inside = inside & (source_y >= -0.5) & (source_y < height - 0.5)
    return ops.where(ops.reshape(inside, (-1, 1)), pixels, ops.cast(fill, "float32"))


def apply_colours(images, colours, strengths):
    """Recolour each picture as Pillow's ImageOps and ImageEnhance would, one operation a layer.

    Args:
        images: (batch, height, width, 3), whole numbers 0 to 255, any dtype.
        colours: int32 (batch, layers), indices into RECOLOURS.
        strengths: float32 (batch, layers).

    Returns:
        float32 (batch, height, width, 3), whole numbers 0 to 255.
    """
    x = ops.cast(images, "int32")
    for layer in range(colours.shape[1]):
        chosen = [colours[:, layer] == i for i in range(len(RECOLOURS))]
        x = _recolour(x, dict(zip(RECOLOURS, chosen)), strengths[:, layer])
    return ops.cast(x, "float32")


def _recolour(x, chosen, strength):
    """One layer of `apply_colours`. chosen: by operation, whether it is a picture's, (batch,)."""
    batch, height, width, channels = x.shape
    value = ops.reshape(ops.arange(256, dtype="int32"), (1, 1, 256))
    real = ops.cast(value, "float32")
    flat = ops.reshape(ops.transpose(x, (0, 3, 1, 2)), (batch, channels, -1))
    first = ops.reshape(ops.arange(batch * channels, dtype="int32") * 256, (batch, channels, 1))
    places = flat + first
    grey = _grey(x)  # (batch, height, width)
    strength = ops.reshape(strength, (-1, 1, 1))
    whole = ops.cast(strength, "int32")

    low = ops.cast(ops.min(flat, axis=2, keepdims=True), "float32")
    high = ops.cast(ops.max(flat, axis=2, keepdims=True), "float32")
    scale = 255 / ops.maximum(high - low, 1)
    stretched = _whole((real - low) * scale + 1e-3)  # where exact arithmetic gives a whole number
    mean = ops.sum(ops.cast(grey, "float32"), axis=(1, 2)) / (height * width)
    mean = ops.floor(ops.reshape(mean, (-1, 1, 1)) + 0.5)
    tables = {  # (batch, channels or 1, 256) each
        "autocontrast": ops.where(high > low, stretched, value),
        "equalize": _equalize(flat, places),
        "invert": 255 - value,
        "posterize": value - value % ops.maximum(whole, 1),
        "solarize": ops.where(real < strength, value, 255 - value),
        "solarize_add": ops.where(value < 128, ops.minimum(value + whole, 255), value),
        "brightness": _whole(real * strength),
        "contrast": _whole(mean + (real - mean) * strength),
    }
    table = ops.broadcast_to(value, (batch, channels, 256))
    for name, candidate in tables.items():
        table = ops.where(ops.reshape(chosen[name], (-1, 1, 1)), candidate, table)
    flat = ops.take(ops.reshape(table, (-1,)), places, axis=0)
    result = ops.transpose(ops.reshape(flat, (batch, channels, height, width)), (0, 2, 3, 1))

    # The two that look at other channels or neighbours leave their tables as they were.
    strength = ops.expand_dims(strength, 3)
    for name, plain in (("color", ops.expand_dims(grey, 3)), ("sharpness", _smooth(x))):
        plain = ops.cast(plain, "float32")
        blended = _whole(plain + (ops.cast(x, "float32") - plain) * strength)
        result = ops.where(ops.reshape(chosen[name], (-1, 1, 1, 1)), blended, result)
    return result


def _whole(x):
    """Cut to a whole number of 0 to 255, as Pillow's blend does."""
    return ops.cast(ops.clip(x, 0, 255), "int32")


def _grey(x):
    """Luma of ITU-R 601-2 in Pillow's fixed-point arithmetic: int32 (batch, height, width)."""
    grey = x[..., 0] * 19595 + x[..., 1] * 38470 + x[..., 2] * 7471 + 0x8000
    return ops.right_shift(grey, 16)  # TensorFlow's tensors have no >>


def _smooth(x):
    """Pillow's ImageFilter.SMOOTH: a 3 x 3 mean with five times the centre; edges stay."""
    batch, height, width, channels = x.shape
    rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * x[:, 1:-1, 1:-1]
    inner = (total * 2 + 13) // 26
    inner = ops.concatenate([x[:, 1:-1, :1], inner, x[:, 1:-1, -1:]], axis=2)
    return ops.concatenate([x[:, :1], inner, x[:, -1:]], axis=1)


def _equalize(flat, places):
    """Pillow's ImageOps.equalize as a table: int32 (batch, channels, 256).

    Args:
        flat: the pixels, int32 (batch, channels, pixels).
        places: where each has its entry, in the tables of all pictures and channels in a row.
    """
    batch, channels, pixels = flat.shape
    index = ops.reshape(places, (-1, 1))
    counts = ops.zeros((batch * channels * 256,), "int32")
    counts = ops.scatter_update(counts, index, ops.ones_like(index[:, 0]), reduction="add")
    counts = ops.reshape(counts, (batch, channels, 256))
    highest = ops.max(flat, axis=2, keepdims=True)
    value = ops.reshape(ops.arange(256, dtype="int32"), (1, 1, 256))
    last = ops.sum(ops.where(value == highest, counts, 0), axis=2, keepdims=True)
    step = (pixels - last) // 255
    before = ops.cast(ops.cumsum(counts, axis=2), "int32") - counts
    table = (step // 2 + before) // ops.maximum(step, 1)
    return ops.where(step > 0, ops.minimum(table, 255), value)


def apply_erasing(images, boxes, fill):
    """Paint each picture's box, as `draw_erasing` gives it, with a colour, (channels,)."""
    return ops.where(_is_inside(boxes, images), ops.cast(fill, images.dtype), images)


def apply_mix(images, targets, share, box):
    """Mix pictures 0 and 1, 2 and 3, ..., as `draw_mix` has it.

    Args:
        images: float32 (batch, height, width, channels); the batch is even.
        targets: float32 (batch, classes).
    """
    own = ops.reshape(share, (-1, 1, 1, 1))
    is_cut = ops.reshape(box[:, 2] > box[:, 0], (-1, 1, 1, 1))
    other = ops.cast(_is_inside(box, images), "float32")
    weight = ops.where(is_cut, 1 - other, own)
    images = images * weight + _swap_pairs(images) * (1 - weight)
    own = ops.reshape(share, (-1, 1))
    return images, targets * own + _swap_pairs(targets) * (1 - own)


def _swap_pairs(x):
    return ops.reshape(ops.flip(ops.reshape(x, (-1, 2, *x.shape[1:])), axis=1), x.shape)


def _is_inside(boxes, images):
    """Whether a pixel is in its picture's box: bool (batch, height, width, 1)."""
    _, height, width, _ = images.shape
    y = ops.reshape(ops.arange(height, dtype="int32"), (1, -1, 1, 1))
    x = ops.reshape(ops.arange(width, dtype="int32"), (1, 1, -1, 1))
    top, left, bottom, right = (ops.reshape(boxes[:, i], (-1, 1, 1, 1)) for i in range(4))
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def soften(labels, num_classes, smoothing=0.0):
    """Shares of the classes, float32 (batch, classes), from their numbers (batch,): `smoothing` is
    spread evenly over all classes (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567)."""
    return ops.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes
