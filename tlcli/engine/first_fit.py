"""The start of a run on pretrained weights: the probe that its head starts from, and a first fit on part of the images.

A small set has no validation images. So a first fit leaves a fifth of the training images out, which then say how far
the final weights are from the initial ones (WiSE-FT, Wortsman et al. 2022), and what temperature calibrates them.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from msgspec import structs
from torch import Tensor
from torch.nn import functional as F

from tlcli.engine.activations import Workload
from tlcli.engine.inputs import Inputs
from tlcli.engine.loaders import BatchLoader
from tlcli.engine.metrics import Predictions, evaluate, features, likely_temperature
from tlcli.engine.trainer import Trainer
from tlcli.engine.unknown import fit_unknown_score, with_unknown_score
from tlcli.reporter import Reporter
from tlcli.transfer.contract import linear_head
from tlcli.transfer.freeze import HeadSpec
from tlcli.transfer.probe import DEFAULT_PENALTY, choose_penalty, fit_probe

SHARES = (1.0, 0.85, 0.7, 0.5)


def fit_head(inputs: Inputs, reporter: Reporter) -> bool:
    """Fill the head with a linear probe, if it should start from one; return True if it does.

    If only the head trains, rows that the weights have for classes of theirs stay.
    """
    workload, head = inputs.workload, linear_head(inputs.workload.classifier)
    if workload.needs_probe and head is None:
        reporter.note("head starts random: a probe needs a head of one linear layer")
    if not workload.needs_probe or head is None:
        return False
    x, predictions = features(inputs, inputs.open("train_eval", reporter), reporter, "features for the probe")
    y = predictions.labels
    known, initial = list[int](), copy.deepcopy(head.state_dict())
    if isinstance(workload.spec.freeze, HeadSpec):
        known += workload.classifier.known_rows
    digest = hashlib.sha256(x.numpy().data)
    digest.update(y.numpy().data)

    def fit() -> tuple[str, dict[str, Tensor]]:
        found = choose_penalty(x, y, workload.spec.seed)
        penalty = found.penalty if found else DEFAULT_PENALTY
        reason = f"L2 penalty {penalty:g} per image"
        if found:
            n = len(found.correct)
            reason += f", accuracy {found.accuracy:.3f} in {found.folds}-fold cross-validation on {n:,} images"
        state = fit_probe(head, x, y, penalty)
        if known:
            reason += f"; rows of {head.out_features - len(known):,} new classes are its"
            rows = torch.tensor(known, device=head.weight.device)
            for name, tensor in state.items():
                own = initial[name][rows]  # softmax does not see what is added to all rows, so that is free to choose
                state[name] = (tensor + (own - tensor[rows]).mean(dim=0)).index_copy(0, rows, own)
        return reason, state

    ranks, reason = inputs.device.ranks, ""
    if ranks.is_main:
        reason, state = workload.session.get_or_create(("probe", digest.hexdigest(), workload.spec.seed, *known), fit)
        head.load_state_dict(state)
    ranks.copy_tensors(head.state_dict().values())
    inputs.add_reason("probe", ranks.broadcast(reason))
    return True


def run_first_fit(inputs: Inputs, part: Workload, reporter: Reporter) -> Predictions:
    """Train on the images of `part`, decide on the share by its val, and restore the network.

    Return the predictions of val, the images left out, at that share.
    """
    decisions, network = inputs.decisions, part.classifier.network
    if "train" in decisions.cached:
        decisions = structs.replace(decisions, cached=decisions.cached | {"val"})
    own, before = Inputs(decisions, part), copy.deepcopy(network.state_dict())
    trainer = Trainer(part, own.device, label="first fit, epoch")
    fit_head(own, reporter)
    trainer.remember_start()
    loader, val_loader = own.open("train", reporter), own.open("val", reporter)
    for epoch in range(1, part.epochs + 1):
        trainer.fit(loader, epoch, reporter)
    with trainer.averaged():
        by_share = evaluate_shares(trainer, own, val_loader, reporter)
        chosen = choose_share(by_share, inputs, reporter)
        trainer.interpolate(SHARES[chosen] / SHARES[-1])
        predictions = by_share[chosen]
        if (score := fit_unknown_score(own, reporter)) is not None:
            scored = with_unknown_score(score, val_loader, own, reporter)
            predictions = replace(predictions, unknown=scored.unknown)
    network.load_state_dict(before)
    return predictions


def evaluate_shares(trainer: Trainer, inputs: Inputs, loader: BatchLoader, reporter: Reporter) -> list[Predictions]:
    """Return the predictions at each of SHARES of the way to the trained weights; those of the last one stay."""
    network = inputs.workload.classifier.network
    predictions = []
    for share, previous in zip(SHARES, (1.0, *SHARES), strict=False):
        trainer.interpolate(share / previous)
        predictions.append(evaluate(network, loader, inputs.device, reporter, "images left out"))
    return predictions


def choose_share(predictions: Sequence[Predictions], inputs: Inputs, reporter: Reporter) -> int:
    """Decide on the share with the lowest loss, given the predictions at each of SHARES, and return its position.

    It is taken if its loss is lower than that of the trained weights by more than one standard error of the paired
    difference: of the loss at the best temperature, since a share below 1 also makes a network less confident.
    """
    scaled = [p.logits / likely_temperature(p.logits, p.labels) for p in predictions]
    losses = torch.stack([F.cross_entropy(x, predictions[0].labels, reduction="none") for x in scaled]).double()
    best, n, means = int(losses.mean(dim=1).argmin()), losses.shape[1], losses.mean(dim=1).tolist()
    gain = losses[0] - losses[best]
    if not gain.mean() > gain.std() / n**0.5:  # that of one image is NaN
        best = 0
    found = ", ".join(f"{share:g} {loss:.3f}" for share, loss in zip(SHARES, means, strict=True))
    reason = f"{SHARES[best]:g} of the way from the initial to the trained ones; loss of {n:,} images left out: {found}"
    inputs.decisions = structs.replace(inputs.decisions, interpolate=SHARES[best])
    inputs.add_reason("weights", reason)
    reporter.note(f"weights: {reason}")
    return best
