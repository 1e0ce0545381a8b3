"""What every vision model asks of its images."""

from jaxtyping import Array


def require_images(
    model: str, images: Array, channels: int, smallest: int, unit: str = "pixel"
) -> None:
    """Raises unless `images` are (B, Y, X, channels) and hold at least one unit.

    Args:
      model: name of the model, for the message.
      images: what came.
      channels: that the model takes.
      smallest: side of the smallest image, in pixels.
      unit: what has that side: a patch, a window.

    Raises:
      ValueError: another rank, other channels (first by mistake?), or too small.
    """
    if images.ndim != 4 or images.shape[-1] != channels:
        first = images.ndim == 4 and images.shape[1] == channels
        hint = "; this looks like channels first, transpose with (0, 2, 3, 1)" if first else ""
        raise ValueError(
            f"{model}: images of shape {images.shape} are not (B, Y, X, {channels}), "
            f"channels last with in_channels={channels}{hint}"
        )
    if min(images.shape[1:3]) < smallest:
        raise ValueError(
            f"{model}: images of {images.shape[1]} x {images.shape[2]} pixels are smaller than one "
            f"{unit} of {smallest} x {smallest}; resize or pad them"
        )
