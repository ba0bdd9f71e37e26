"""Single images: decode what data sets store, and store a camera's frame as they do.

Axes: h, w pixels.
"""

import io

import numpy as np
from PIL import Image

try:
    import simplejpeg  # optional: the same pixels, decoded faster
except ImportError:
    simplejpeg = None


def decode_image(stored, channels=3, formats=("JPEG", "PNG")):
    """Return an image's bytes as u8 [height, width, channels]; JPEGs by simplejpeg where it is installed.

    formats: Pillow's names of those that are read, None for all.
    """
    if simplejpeg and channels == 3 and stored[:2] == b"\xff\xd8":
        return simplejpeg.decode_jpeg(stored, "RGB", fastdct=False, fastupsample=False)
    image = Image.open(io.BytesIO(stored), formats=formats)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"it has more than 8 bits a channel (Pillow's mode {image.mode})")
    if channels == 1:
        return np.asarray(image.convert("L"))[:, :, None]
    return np.asarray(image.convert("RGB"))


def encode_image(frame, size, format="JPEG", **options):
    """Return a camera's frame as it is stored, in demonstrations and in a policy's observations alike: a file's bytes.

    frame: u8 [h, w, 3] -> Lanczos to `size`, (height, width) or a side -> JPEG or PNG. options: Pillow's, quality=85 or
    the qtables=... and subsampling=... of a data set.
    """
    image = Image.fromarray(shrink(frame, size))
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def store_image(frame, size, format="JPEG", **options):
    """Return a frame u8 [h, w, 3] as it would be read after `encode_image` had stored it: u8 [height, width, 3]."""
    if format == "PNG":  # loses nothing
        return shrink(frame, size)
    return decode_image(encode_image(frame, size, format, **options))


def shrink(frame, size):
    """Return u8 [h, w, 3] resized by Lanczos' filter to (height, width), or to a side."""
    height, width = np.broadcast_to(size, 2).tolist()
    if frame.shape[:2] == (height, width):
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))


def read_image(name, image):
    """Return a frame as u8 [h, w, 3]; grey ones are repeated, floats in [0, 1] become bytes.

    Raise ValueError for other shapes and values, saying what to do.
    """
    image = np.asarray(image)
    if image.ndim == 3 and image.shape[2] not in (1, 3) and image.shape[0] in (1, 3):
        raise ValueError(
            f"the image of {name} is {image.shape}, channels first; it must be [height, width, 3]: "
            "image.transpose(1, 2, 0)"
        )
    if image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ValueError(f"the image of {name} is {image.shape}; it must be one image [height, width, 3]")
    if image.dtype.kind == "f":
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):  # NaN, too
            raise ValueError(
                f"the image of {name} is {image.dtype} from {low:g} to {high:g}; floats must lie in [0, 1]. Give bytes "
                "(uint8) from 0 to 255 instead, not normalised"
            )
        image = np.rint(image * 255).astype(np.uint8)
    if image.dtype != np.uint8:
        raise ValueError(f"the image of {name} is {image.dtype}; it must be uint8, or floats in [0, 1]")
    return image.repeat(3 // image.shape[2], 2)


def common_sides(datasets, cameras):
    """Return for each camera slot the side to which images are resized; 0: all data sets store one size, kept as it is.

    cameras: of each data set the names in order. Images whose size the data does not state may differ from one another.
    """
    sides = []
    for slot in range(max(map(len, cameras))):
        shapes = [
            dataset.image(names[slot], 0).shape[:2] if slot < len(names) else None
            for dataset, names in zip(datasets, cameras)
        ]
        stated = all(
            None not in dataset.index.features[dataset.spec.cameras[names[slot]]].shape
            for dataset, names in zip(datasets, cameras)
            if slot < len(names)
        )
        largest = max(max(shape) for shape in shapes if shape)
        sides.append(0 if stated and len(set(shapes)) == 1 else largest)
    return sides


def resize_image(pixels, side):
    """Return u8 [h, w, 3] resized to [side, side, 3], bicubic; as it is for side 0."""
    if not side or pixels.shape[:2] == (side, side):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))
