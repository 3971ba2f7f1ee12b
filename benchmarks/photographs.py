"""Photographs of 12 megapixels: python -m benchmarks.photographs DATA [--small]

The rate at which one core turns JPEG files of phones into network inputs: with tlcli, with tlcli's rules from all
pixels, and with the transforms of torchvision's references and timm (Pillow, Resize, CenterCrop). The photographs are
those of hymenoptera, enlarged, with added grain. Then the difference between tlcli's pixels and those of fully decoded
photographs, in gray levels of 0 to 255.
"""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.figures import Measure, Rounds, at_least, interleaved, ratios, table
from benchmarks.run import out_folder, parser, publish, publish_measures
from tlcli.data.batches import Preprocessing
from tlcli.data.decode import raw_image, read_image
from tlcli.device import limit_threads
from tlcli.specs import Fit

TLCLI, WHOLE, TRANSFORMS = "tlcli", "the same from all pixels", "Pillow, Resize, CenterCrop"


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement; `width` and `height` of the photographs in pixels."""

    photographs: int = 12
    width: int = 4000
    height: int = 3000
    size: int = 224
    rounds: int = 3


SMALL = Settings(photographs=2, width=400, height=300, size=32, rounds=1)


def photographs(folder: Path, settings: Settings) -> list[bytes]:
    """Write JPEG files of quality 90."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return [_enlarged(file, settings, seed) for seed, file in enumerate(files[: settings.photographs])]


def _enlarged(file: Path, settings: Settings, seed: int) -> bytes:
    image = Image.fromarray(read_image(file)).resize((settings.width, settings.height), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(seed).normal(0, 6, (settings.height, settings.width, 1))
    stream = io.BytesIO()
    Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def ways(settings: Settings) -> dict[str, Callable[[bytes], Tensor]]:
    """Return uint8 (3, size, size) from the bytes of a file."""
    own = Preprocessing(settings.size, Fit.crop, (0.5,) * 3, (0.5,) * 3)  # type: ignore[arg-type]
    transforms = v2.Compose([v2.Resize(settings.size * 8 // 7), v2.CenterCrop(settings.size), v2.PILToTensor()])
    return {
        TLCLI: lambda content: own.apply(read_image(io.BytesIO(content))),
        WHOLE: lambda content: own.apply(raw_image(Image.open(io.BytesIO(content))).to_pixels(None)),
        TRANSFORMS: lambda content: transforms(Image.open(io.BytesIO(content)).convert("RGB")),
    }


def rates(files: Sequence[bytes], settings: Settings) -> Rounds:
    """Return photographs per second of each method, on one core."""

    def timer(way: Callable[[bytes], Tensor]) -> Callable[[], float]:
        def rate() -> float:
            began = time.perf_counter()
            for content in files:
                way(content)
            return len(files) / (time.perf_counter() - began)

        return rate

    with limit_threads(1):
        return interleaved({name: timer(way) for name, way in ways(settings).items()}, settings.rounds)


def distance(files: Sequence[bytes], settings: Settings) -> float:
    """Return the mean difference between tlcli's pixels and those of fully decoded photographs."""
    own, whole = (ways(settings)[name] for name in (TLCLI, WHOLE))
    return float(np.mean([(own(content).float() - whole(content).float()).abs().mean() for content in files]))


def main(data: Path, out: Path, *, small: bool = False) -> list[Measure]:
    """Measure, print the table of rates and the difference, and return the ratios."""
    settings = SMALL if small else Settings()
    files = photographs(data / "hymenoptera" / "train", settings)
    seen, far = rates(files, settings), distance(files, settings)
    header = [f"{settings.width} x {settings.height}, {len(files)} files", "photographs per second, median", "range"]
    publish("photographs", header, table(seen), out, {"rates": seen, "grey_levels": far})
    print(f"mean difference of tlcli's pixels from those of the whole: {far:.2f} of 255 grey levels\n")
    measures = [
        at_least("photographs of 12 megapixels, over decoding all of them", 1, ratios(seen[TLCLI], seen[WHOLE])),
        at_least("the same, over Pillow, Resize, CenterCrop", 1, ratios(seen[TLCLI], seen[TRANSFORMS])),
    ]
    return publish_measures("photographs_measures", measures, out)


if __name__ == "__main__":
    given = parser(__doc__).parse_args()
    main(given.data, out_folder(given.out, "photographs"), small=given.small)
