"""scikit-learn's digits, which need no download."""

import numpy as np

from tlcli.data.listing import DIGITS
from tlcli.data.source import Arrays, Source, whole
from tlcli.specs import DigitsSpec


def load_digits(spec: DigitsSpec) -> Source:
    """1,797 images of 8 by 8 pixels, values 0..16 spread over 0..255, not split."""
    from sklearn import datasets  # here: it takes a second, and other data sets have no use for it

    data = datasets.load_digits()
    gray = np.rint(data.images * (255 / 16)).astype(np.uint8)
    images = Arrays(np.repeat(gray[..., None], 3, axis=3), spec.name)
    return Source(DIGITS, {"all": whole(images, data.target)}).keep(spec.classes, spec.name)
