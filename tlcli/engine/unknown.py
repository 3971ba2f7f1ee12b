"""The unknown score: how far an image is from what a network has learned.

It is the sum of the energy of its logits, which misses images that are confidently taken for a class, and its distance
to the classes, which misses those between classes, each in its standard deviations over training images.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tlcli.data.dataset import limit_per_class
from tlcli.engine.inputs import Inputs, image_loader
from tlcli.engine.loaders import ActivationLoader, BatchLoader
from tlcli.engine.metrics import Predictions, energy, features
from tlcli.models.classifier import Classifier
from tlcli.models.tensorfile import damaged, read_tensors, write_tensors
from tlcli.reporter import Reporter
from tlcli.transfer.contract import linear_head
from tlcli.transfer.cut import NoCut

MIN_IMAGES, PER_CLASS, MAX_IMAGES = 1000, 20, 10_000  # training images that it is fitted to, half for its scales
ROWS = 4096  # scored at once
# In EfficientNets and MobileNets of timm it widens the output of the last block, which tells unknown images better than
# the input of the head: AUROC 0.863 against 0.852 on held-out training images of three splits of CIFAR-10
LAST_CONVOLUTION = "conv_head"


@dataclass(frozen=True, eq=False)
class UnknownScore:
    """Class means (C, D) of whitened features, the whitening (D, D), and mean and standard deviation of both parts.

    The distance is that of Mahalanobis to the nearest class mean, with one covariance for all classes (Lee et al.
    2018), shrunk as Ledoit and Wolf (2004) do.
    """

    means: Tensor
    whitening: Tensor
    scales: Tensor  # (2, 2): of the energy, and of the distance
    layer: str  # of the network, whose input has the features

    @classmethod
    def fit(cls, layer: str, features: Tensor, predictions: Predictions) -> "UnknownScore | None":
        """Return the score for features (N, D) and predictions of training images; None if they are too few.

        The covariance is fitted to every second image of a class, and the scales to the rest: fitted images are nearer.
        """
        from sklearn.covariance import ledoit_wolf  # here, because it takes a second

        labels = predictions.labels
        order = torch.argsort(labels, stable=True)
        fitted, scaled = order[::2], order[1::2]
        present, index = np.unique(labels[fitted].numpy(), return_inverse=True)
        if len(fitted) < 2 * len(present) or len(scaled) < 2:
            return None
        x = features[fitted].double()
        means = torch.stack([x[index == i].mean(dim=0) for i in range(len(present))])
        covariance = torch.from_numpy(ledoit_wolf((x - means[index]).numpy(), assume_centered=True)[0])
        if not covariance.trace() > 0:
            return None
        whitening = torch.linalg.inv(torch.linalg.cholesky(covariance)).T.bfloat16()
        score = cls((means @ whitening.double()).float(), whitening, torch.zeros(2, 2), layer)
        parts = score._parts(features[scaled], predictions.logits[scaled])
        return replace(score, scales=torch.stack([parts.mean(dim=1), parts.std(dim=1).clamp(min=1e-6)], dim=1))

    def __call__(self, features: Tensor, logits: Tensor) -> Tensor:
        """Return the score (N), float64, of features (N, D) and logits (N, classes)."""
        pairs = zip(torch.split(features, ROWS), torch.split(logits, ROWS), strict=True)
        parts = torch.cat([self._parts(*pair) for pair in pairs], dim=1)
        return ((parts - self.scales[:, :1]) / self.scales[:, 1:]).sum(dim=0)

    def _parts(self, features: Tensor, logits: Tensor) -> Tensor:
        """Return energy and distance (2, N), float64."""
        white = features.float() @ self.whitening.float()
        exact = "donot_use_mm_for_euclid_dist"  # the other way rounds by the size of the batch
        distances = torch.cdist(white, self.means, compute_mode=exact)
        return torch.stack([energy(logits), distances.min(dim=1).values.double()])

    def write(self, path: Path) -> None:
        tensors = {name: value for name, value in vars(self).items() if name != "layer"}
        write_tensors(path, tensors, {"layer": self.layer})

    @classmethod
    def read(cls, path: Path, classifier: Classifier) -> "UnknownScore":
        """Return the score of a file for a classifier. Raise UsageError if it is damaged."""
        tensors, metadata = read_tensors(path)
        layer = str(metadata.get("layer", classifier.head[0]))  # without it, it is of tlcli 0.14 or earlier
        modules = dict(classifier.network.named_modules())
        module = modules.get(layer) if layer in (LAST_CONVOLUTION, classifier.head[0]) else None
        n_features = getattr(module, "in_channels", getattr(module, "in_features", 0))
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        n = next(iter(shapes.get("means", ())), 0)
        is_float = all(tensor.is_floating_point() for tensor in tensors.values())
        expected = {"means": (n, n_features), "whitening": (n_features, n_features), "scales": (2, 2)}
        if min(n, n_features) < 1 or not is_float or shapes != expected:
            raise damaged(path, f"{shapes} for a layer {layer} with {n_features:,} inputs")
        return cls(**tensors, layer=layer)


def fit_unknown_score(inputs: Inputs, reporter: Reporter) -> UnknownScore | None:
    """Return the score of a trained network; None if its head is not one linear layer, or if images are too few."""
    workload, data, n_classes = inputs.workload, inputs.workload.data, len(inputs.workload.data.classes)
    if linear_head(workload.classifier) is None:
        return None
    network, cut, layer = workload.classifier.network, workload.cut, workload.classifier.head[0]
    if isinstance(getattr(network, LAST_CONVOLUTION, None), nn.Conv2d):
        names = [name for name, _ in network.named_modules()]  # in the order in which such a network computes
        start = "" if isinstance(cut, NoCut) else cut.suffix_start.partition(",")[0]
        if start in names[: names.index(LAST_CONVOLUTION) + 1]:  # else activations are stored behind it
            layer = LAST_CONVOLUTION
    limit = min(max(PER_CLASS, -(-MIN_IMAGES // n_classes)), max(1, MAX_IMAGES // n_classes))
    sample = limit_per_class(data.train, data.classes, limit, workload.spec.seed, "unknown score")
    # unless train is cached, train_eval has features of the network as it was
    is_cached = {"train", "train_eval"} <= inputs.cached.keys()
    loader: BatchLoader | None = inputs.open("train_eval", reporter) if is_cached else None
    if isinstance(loader, ActivationLoader):
        chosen = np.flatnonzero(np.isin(data.train.indices, sample.indices))
        loader = replace(loader, rows=loader.rows[torch.from_numpy(chosen)], split=loader.split.take(chosen))
    else:
        part = replace(workload, data=replace(data, train=sample))
        loader = image_loader(part, inputs.device, "train_eval", reporter)
    module = network.get_submodule(layer)
    return UnknownScore.fit(layer, *features(inputs, loader, reporter, "features for the unknown score", module))


def with_unknown_score(score: UnknownScore, loader: BatchLoader, inputs: Inputs, reporter: Reporter) -> Predictions:
    """Return the predictions of images that the network has not trained on, with their unknown score."""
    module = inputs.workload.classifier.network.get_submodule(score.layer)
    x, predictions = features(inputs, loader, reporter, "images held out", module)
    return replace(predictions, unknown=score(x, predictions.logits))
