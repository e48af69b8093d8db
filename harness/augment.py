"""Image augmentation on the device, batch-wise, with the same draws on every backend.

Flip, rotation and zoom about the centre are one affine map, so they cost one gather at the
pictures' own size instead of three resamplings. The random numbers are drawn here in NumPy (four
floats a picture); what runs on the device has no randomness of its own, so each backend makes the
same pictures, up to float rounding.
"""

import numpy as np


def draw_affine(count, seed, epoch, rotation=0.02, zoom=0.2):
    """Draw one map per picture: horizontal flip (half of them), rotation, zoom of height and width.

    Args:
        count: how many pictures.
        seed, epoch: the same pair gives the same draws on every backend and machine.
        rotation: largest angle, as a fraction of a full turn, to either side.
        zoom: largest relative change of height and of width, drawn apart; above 0 zooms out.

    Returns:
        float32 (count, 2, 2): from an output pixel's (x, y), measured from the centre, to the place
        in the source picture that it shows. The ranges and their meaning are those of
        keras.layers.RandomFlip, RandomRotation and RandomZoom applied in this order.
    """
    rng = np.random.default_rng([seed, epoch, 0xA46])
    mirror = np.where(rng.random(count) < 0.5, -1.0, 1.0)
    angle = 2 * np.pi * rng.uniform(-rotation, rotation, count)
    zoom_x, zoom_y = 1 + rng.uniform(-zoom, zoom, (2, count))
    cos, sin = np.cos(angle), np.sin(angle)
    maps = [[mirror * cos * zoom_x, -mirror * sin * zoom_y], [sin * zoom_x, cos * zoom_y]]
    return np.moveaxis(np.array(maps, "float32"), -1, 0)  # (count, 2, 2)


def apply_affine(images, maps):
    """Resample each picture through its own map: bilinear, mirrored at the border.

    Args:
        images: (batch, height, width, channels), any dtype.
        maps: float32 (batch, 2, 2), as `draw_affine` gives them.

    Returns:
        float32 (batch, height, width, channels), in the range of the input.
    """
    from keras import ops  # here: who only draws, as the peers do, needs no Keras

    def mirror(index, size):
        """Fold an index that left the picture back into it: 1 0 | 0 1 2 ... (at most one size)."""
        index = ops.where(index < 0, -1 - index, index)
        index = ops.where(index >= size, 2 * size - 1 - index, index)
        return ops.clip(index, 0, size - 1)

    batch, height, width, channels = images.shape
    center_x, center_y = (width - 1) / 2, (height - 1) / 2
    y, x = np.mgrid[:height, :width].reshape(2, 1, -1)
    x = ops.convert_to_tensor(x - center_x, "float32")  # (1, pixels)
    y = ops.convert_to_tensor(y - center_y, "float32")
    source_x = maps[:, 0, :1] * x + maps[:, 0, 1:] * y + center_x  # (batch, pixels)
    source_y = maps[:, 1, :1] * x + maps[:, 1, 1:] * y + center_y
    left, top = ops.floor(source_x), ops.floor(source_y)
    right_share, bottom_share = source_x - left, source_y - top
    left, top = ops.cast(left, "int32"), ops.cast(top, "int32")
    columns = (mirror(left, width), mirror(left + 1, width))
    first = ops.expand_dims(ops.arange(batch, dtype="int32") * (height * width), 1)
    rows = [first + mirror(row, height) * width for row in (top, top + 1)]
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
    return ops.reshape(result, (batch, height, width, channels))
