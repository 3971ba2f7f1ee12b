"""The linear probe that a head can start from (LP-FT, Kumar et al. 2022: a random head distorts good features)."""

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from tlcli.models.classifier import Classifier

L2_PER_IMAGE = 0.1
"""L2 penalty per image. Of 1 down to 0.003, the loss on held-out training images was lowest here for hymenoptera (220
images) and CIFAR-10 (200), and near its lowest for CIFAR-10 (5,000: at 0.03) and digits (1,300: at 0.003).
scikit-learn's C is not such a constant: its weight against the penalty grows with the number of images."""
MAX_ITERATIONS = 200


def linear_head(classifier: Classifier) -> nn.Linear | None:
    """Return the head if it is one linear layer, which a probe can fill; else None (distilled models: two heads)."""
    modules = [classifier.network.get_submodule(name) for name in classifier.architecture.head]
    return modules[0] if len(modules) == 1 and isinstance(modules[0], nn.Linear) else None


def fit_probe(head: nn.Linear, features: Tensor, labels: Tensor) -> None:
    """Fill a linear layer with the multinomial logistic regression on features (N, D) and labels (N).

    The regression sees features centered and divided by one number, so that one penalty suits every backbone; the layer
    gets the equivalent weights for the features as they are. (A number for each feature would give the nearly constant
    ones huge weights, and the head would explode with the first step that moves them.)
    """
    x = features.numpy().astype(np.float32)
    mean, scale = x.mean(axis=0), float(np.sqrt(x.var(axis=0).mean())) or 1.0
    regression = LogisticRegression(C=1 / (L2_PER_IMAGE * len(x)), max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings(), threadpool_limits(1):  # more help little, and harm if other processes run
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is a starting point
        regression.fit((x - mean) / scale, labels.numpy())
    coefficients, intercept = regression.coef_, regression.intercept_
    if len(regression.classes_) == 2:  # scikit-learn gives one row, the log-odds of the second class
        coefficients, intercept = np.vstack([-coefficients, coefficients]) / 2, np.hstack([-intercept, intercept]) / 2
    weight = coefficients / scale
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        if head.bias is not None:
            head.bias.copy_(torch.from_numpy(intercept - weight @ mean))


def probe_weights(head: nn.Linear, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the state of a head after `fit_probe`."""
    fit_probe(head, features, labels)
    return {name: tensor.detach().clone() for name, tensor in head.state_dict().items()}
