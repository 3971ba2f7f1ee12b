"""Every way for a command line to be wrong: one line, exit code 2, nothing written."""

from pathlib import Path

import pytest

CASES = {
    "optimzer.lr=1": "Did you mean 'optimizer'?",
    "lr=1": "unknown key 'lr'. Did you mean 'optimizer.lr'?",
    "weight_deacy=1": "Did you mean 'optimizer.weight_decay'?",
    "optimizer.lrr=1": "Did you mean 'optimizer.lr'?",
    "freeze.n=2": "It belongs to freeze=last_stages.",
    "optimizer.momentum=0.9": "It belongs to optimizer=sgd.",
    "image.sizee=3": "Did you mean 'image.size'?",
    "epochs.x=1": "epochs holds a value",
    "+foo=1": "unknown key 'foo'",
    "+optimizer.x=1": "unknown key 'optimizer.x'",
    "schema=train": "unknown key 'schema'",
    "hydra.foo=1": "unknown key 'hydra.foo'",
    "optimizer@foo=sgd": "Did you mean 'optimizer'?",
    "backbone=resnet19": "backbone has no option 'resnet19'. Did you mean 'resnet18'?",
    "dataset=/x/y": "dataset has no option '/x/y'",
    "dataset=": "Choose from cifar10, cifar100",
    "optimizer=null": "optimizer=null: choose one of adam, adamw, sgd",
    "experiment=nope": "experiment has no option 'nope'",
    "freeze=[head,none]": "to sweep over several: tlcli train -m freeze=A,B",
    "epochs=1.5": "epochs=1.5: expected a whole number",
    "epochs=2 min_steps=100": "min_steps=100 has no effect with epochs=2: give one of the two",
    "experiment=cifar10_fast min_epochs=3": "min_epochs=3 has no effect with epochs=2",
    "epochs=": "epochs",
    "optimizer.lr=x": "optimizer.lr=x: expected a number",
    "device.compile=maybe": "device.compile=maybe: expected true or false",
    "dataset.classes=3": "dataset.classes=3: expected a list or null",
    "dataset.root=[a]": "expected a text or null",
    "image=3": "image=3: expected keys of its own",
    "optimizer.betas=[0.9]": "expected a list of length 2, got 1",
    "keep_best=acuracy": "is none of accuracy, macro_f1, loss. Did you mean 'accuracy'?",
    "device.kind=gpu": "device.kind=gpu is none of auto, cpu, cuda, mps",
    "dataset.kind=foo": "choose one with dataset=...",
    "epochs=0": "epochs=0: expected a whole number >= 1",
    "image.train_size=96 cache.views=2": "image.train_size has no effect with cache.views",
    "folds=1": "folds=1: expected a whole number >= 2",
    "fold=1": "fold=1: give folds=N, too",
    "folds=3 fold=3": "fold=3: must be below folds=3",
    "folds=3 early_stop=2": "early_stop=2: the refit of folds=3 has no validation images",
    "folds=3 scheduler=plateau": "scheduler=plateau: the refit of folds=3 has no validation images",
    "folds=3 dataset.val_fraction=0.2": "dataset.val_fraction=0.2 has no effect with folds=3: give one of the two",
    "dataset.val_fraction=1.5": "dataset.val_fraction=1.5: expected a number < 1.0",
    "optimizer.lr=inf": "optimizer.lr=inf is not a finite number",
    "dataset=imagefolder": "dataset.root",
    "dataset=imagefolder dataset.root=nowhere": "nowhere: no such folder",
    "backbone=timm": "backbone.name has no value yet; give it one: backbone.name=...",
    "epochs=???": "epochs has no value yet",
    "~batch_size": "batch_size has no value yet",
    "seed=1,2": "add -m to sweep over them, or write a list, seed=[1,2]",
    "freeze=head,none": "add -m",
    "foo": "write KEY=VALUE",
    "digits": "Did you mean 'dataset=digits' or 'experiment=digits'?",
    "=3": "write KEY=VALUE",
    "epochs=[1": "close its brackets",
    "epochs=a(b": "write 'epochs=\"a(b\"'",
    "name=${nope}": "name: Interpolation key 'nope' not found",
    "backbone.weights=nowhere": "no finished run or file of weights",
    "--foo": "unknown flag '--foo'",
    "--cfg": "expected one argument",
    "--resolve": "--resolve goes with --cfg job",
    "--config-dir nowhere": "no such folder",
    "--config-name nowhere": "there is no config 'nowhere'",
    "--config-path .": "unknown flag '--config-path'",
    "--experimental-rerun x": "unknown flag '--experimental-rerun'",
    "hydra.run.dir=/dev/null/x": "choose another folder with hydra.run.dir=...",
    "out=/dev/null": "choose another folder with out=...",
    "-m epochs=1,2 lr=1": "Did you mean 'optimizer.lr'?",
    "-m optimizer.lrr=1,2": "Did you mean 'optimizer.lr'?",
    "hydra.searchpath=[pkg://missing]": "hydra.searchpath: there is no package 'missing'",
    "-m freeze=head,nonee": "freeze has no option 'nonee'. Did you mean 'none'?",
    "-m epochs=1,2 =3": "write KEY=VALUE",
    # no config names code to run
    "hydra.sweeper._target_=os.system": "a config cannot name code to run",
    "+hydra.callbacks.x._target_=os.system": "a config cannot name code to run",
    "+dataset._target_=os.system": "a config cannot name code to run",
    "dataset=cifar10 +dataset.train._target_=os.system": "a config cannot name code to run",
}


@pytest.mark.parametrize("argv", CASES)
def test_one_line_exit_2_and_nothing_written(argv: str, tlcli, training, tmp_path: Path) -> None:
    training(lambda spec, run, reporter: pytest.fail("training began"))
    ended = tlcli("train", *argv.split(" "))
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("tlcli train: ") and ended.err.count("\n") == 1
    assert CASES[argv] in ended.err
    assert not list(tmp_path.iterdir())
