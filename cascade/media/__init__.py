"""Video and image files in and out: the one package that knows ffmpeg, PyAV, imageio and Pillow."""

from cascade.media.decoding import Clip, decode, read_video, resampled
from cascade.media.encoding import VIDEO_SUFFIXES, check_rate, encoded
from cascade.media.images import png, read_image, sheet
from cascade.media.pixels import MAX_PIXELS, RATES, Unreadable, covering, fit, to_bytes, to_float

__all__ = [
    "MAX_PIXELS",
    "RATES",
    "VIDEO_SUFFIXES",
    "Clip",
    "Unreadable",
    "check_rate",
    "covering",
    "decode",
    "encoded",
    "fit",
    "png",
    "read_image",
    "read_video",
    "resampled",
    "sheet",
    "to_bytes",
    "to_float",
]
