"""The images of a run's data set, found again by their keys."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from msgspec import structs

from tlcli.data.dataset import SOURCES
from tlcli.data.decode import BadImage, Pixels
from tlcli.data.source import Images
from tlcli.errors import TlcliError
from tlcli.reporter import Reporter
from tlcli.specs import DatasetSpec, TorchvisionDatasetSpec


@dataclass(frozen=True, eq=False)
class Pictures:
    """Reads images by their keys. `missing`: why there are none, in one sentence, or None."""

    places: Mapping[str, Callable[[], Pixels]]
    missing: str | None = None

    @staticmethod
    def of(spec: DatasetSpec) -> "Pictures":
        """The images of a data set as it is now; nothing is decoded before it is read, and nothing is downloaded."""
        if isinstance(spec, TorchvisionDatasetSpec):
            spec = structs.replace(spec, download=False)
        try:
            source = SOURCES[type(spec)](spec, Reporter())
        except (TlcliError, OSError) as exc:
            return Pictures({}, f"The images are not shown, because the data set cannot be read: {exc}.")
        splits = source.splits.values()
        return Pictures({s.images.key(i): _reader(s.images, i) for s in splits for i in s.indices.tolist()})

    def read(self, key: str) -> Pixels | None:
        """uint8 (height, width, 3) RGB; None where the image is not there any more, or does not decode."""
        try:
            return self.places[key]() if key in self.places else None
        except (BadImage, OSError):
            return None


def _reader(images: Images, index: int) -> Callable[[], Pixels]:
    return lambda: images.read(index)
