"""Every way for a command line to be wrong: one line, exit code 2, nothing written."""

from pathlib import Path
from unittest.mock import Mock

import pytest

from tlcli.cli import COMMANDS, main

TRAIN = {
    "optimzer.lr=1": "Did you mean 'optimizer'?",
    "lr=1": "unknown key 'lr'. Did you mean 'optimizer.lr'?",
    "optimizer.lrr=1": "Did you mean 'optimizer.lr'?",
    "freeze.n=2": "It belongs to freeze=last_stages.",
    "optimizer.momentum=0.9": "It belongs to optimizer=sgd.",
    "epochs.x=1": "epochs holds a value",
    "+foo=1": "unknown key 'foo'",
    "schema=train": "unknown key 'schema'",
    "hydra.foo=1": "unknown key 'hydra.foo'",
    "optimizer@foo=sgd": "Did you mean 'optimizer'?",
    "backbone=resnet19": "backbone has no option 'resnet19'. Did you mean 'resnet18'?",
    "dataset=": "Choose from cifar10, cifar100",
    "optimizer=adamW": "Did you mean 'adamw'?",
    "optimizer=null": "optimizer=null: choose one of adam, adamw, sgd",
    "freeze=[head,none]": "to sweep over several: tlcli train -m freeze=A,B",
    "epochs=1.5": "epochs=1.5: expected a whole number",
    "epochs=2 min_steps=100": "min_steps=100 has no effect with epochs=2: give one of the two",
    "experiment=cifar10_fast min_epochs=3": "min_epochs=3 has no effect with epochs=2",
    "epochs=": "epochs",
    "optimizer.lr=x": "optimizer.lr=x: expected a number",
    "device.compile=maybe": "device.compile=maybe: expected true or false or null",
    "dataset.classes=3": "dataset.classes=3: expected a list or null",
    "dataset.root=[a]": "expected a text or null",
    "image=3": "image=3: expected keys of its own",
    "optimizer.betas=[0.9]": "expected a list of length 2, got 1",
    "keep_best=acuracy": "is none of accuracy, macro_f1, loss. Did you mean 'accuracy'?",
    "device.kind=gpu": "device.kind=gpu is none of auto, cpu, cuda, mps",
    "dataset.kind=foo": "choose one with dataset=...",
    "epochs=0": "epochs=0: expected a whole number >= 1",
    "cache.views=-1": "cache.views=-1: expected a whole number >= 0",
    "fold=1": "fold=1: give folds=N, too",
    "tta=flip dataset.flip=0": "tta=flip: with dataset.flip=0 a mirrored image is another image",
    "sampler=balanced class_weights=balanced": "correct for rare classes twice: give one",
    "fits=2 ema=0.9": "fits=2 does not work with ema=0.9",
    "fits=2 freeze=lora": "fits=2 does not work with freeze=lora",
    "fits=3 early_stop=2": "fits=3 does not work with early_stop=2",
    "freeze=lora interpolate=0.7": "interpolate=0.7 does not work with freeze=lora",
    "folds=3 fold=3": "fold=3: must be below folds=3",
    "folds=3 early_stop=2": "early_stop=2: the refit of folds=3 has no validation images",
    "folds=3 scheduler=plateau": "scheduler=plateau: the refit of folds=3 has no validation images",
    "folds=3 dataset.val_fraction=0.2": "dataset.val_fraction=0.2 has no effect with folds=3; leave one out",
    "dataset.val_fraction=1.5": "dataset.val_fraction=1.5: expected a number < 1.0",
    "optimizer.lr=inf": "optimizer.lr=inf is not a finite number",
    "dataset=imagefolder": "dataset.root",
    "dataset=digits dataset.root=x": "dataset.root=x has no effect with dataset=digits; add dataset=imagefolder",
    "dataset=imagefolder dataset.root=nowhere": "nowhere: no such folder",
    "backbone=timm": "backbone.name has no value yet; give it one: backbone.name=...",
    "epochs=???": "epochs has no value yet",
    "~batch_size": "batch_size has no value yet",
    "seed=1,2": "`tlcli train -m` sweeps over them; else write a list, seed=[1,2]",
    "dataset.root=A,B": "else write a list, dataset.root=[A,B], or a text, 'dataset.root=\"A,B\"'",
    "foo": "write KEY=VALUE",
    "digits": "Did you mean 'dataset=digits' or 'experiment=digits'?",
    "=3": "write KEY=VALUE",
    "epochs=[1": "close its brackets",
    "epochs=a(b": "write 'epochs=\"a(b\"'",
    "name=${nope}": "name: Interpolation key 'nope' not found",
    "epochs=${device.nope}": "epochs: Interpolation key 'device.nope' not found",
    "name=${optimizer.momentum}": "optimizer.momentum has no value, but name needs it",
    "+freeze=head": "freeze has an option: write freeze=..., or `- override /freeze: ...` in a file",
    "out=": "out=: expected a text of length >= 1",
    "dataset=imagefolder dataset.root=": "dataset.root=: expected a text of length >= 1",
    "hydra.run.dir=": "hydra.run.dir is empty: name a folder",
    "hydra.sweep.dir=x": "hydra.sweep.dir has no effect on a single run: give hydra.run.dir",
    "-m seed=0,1 hydra.run.dir=x": "hydra.run.dir has no effect on a sweep: give hydra.sweep.dir",
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
    "hydra.searchpath=[pkg://missing]": "hydra.searchpath: there is no package 'missing'",
    "-m freeze=head,nonee": "freeze has no option 'nonee'. Did you mean 'none'?",
    "-m epochs=1,2 =3": "write KEY=VALUE",
    # no config names code to run
    "hydra.sweeper._target_=os.system": "a config cannot name code to run",
    "+hydra.callbacks.x._target_=os.system": "a config cannot name code to run",
    "+dataset._target_=os.system": "a config cannot name code to run",
    "dataset=cifar10 +dataset.train._target_=os.system": "a config cannot name code to run",
}
OTHERS = {
    "trian": "Did you mean 'train'?",
    "--vesion": "Did you mean '--version'?",
    "epochs=3": "Did you mean 'tlcli train epochs=3'?",
    "completion bsh": "Did you mean 'bash'?",
    "list nowhere": "no such folder",
    "list --sort tst": "Did you mean 'test'",
    "list --limit 0": "--limit: must be a whole number from 1",
    "inspect resnet19": "Did you mean 'resnet18'",
    "inspect resnet18 freez=head": "Did you mean 'freeze'",
    "inspect resnet18 head": "'head': name one backbone or run",
    "inspect resnet18 -m": "unknown flag '-m'",
    "inspect resnet18 dataset=imagefolder dataset.root=nowhere": "nowhere",
    "inspect .": "not a run directory",
    "export": "required: RUN",
    "report": "required: RUN",
    "demo": "required: RUN",
    "export nowhere": "required: --to",
    "export nowhere --to onx": "Did you mean 'onnx'?",
    "export nowhere --to timm --with-preprocessing": "timm holds weights and no graph",
    "export nowhere --to timm": "no such run directory",
    "predict r": "the following arguments are required: PATH",
    "predict r x --top 0": "--top: must be a whole number from 1, not '0'",
    "predict r x --format jsn": "choose from table, csv, jsonl",
    "predict nowhere photos --output new.jsonl": "nowhere: no such run directory.",
    "embed r x": "nothing to write: give --to features.parquet",
    "embed r x --to f.csv": "f.csv: must end in .parquet or .npz",
    "embed r x --plot map.png": "map.png: must end in .html",
    "embed r x --to no/f.npz": "no/f.npz: not a file in an existing folder",
    "embed nowhere x --to f.npz": "nowhere: no such run directory",
    "embed backbone=resnet19 x --to f.npz": "Did you mean 'resnet18'?",
    "embed backbone=resnet18 x --to f.npz --checkpoint last": "--checkpoint last goes with a run; leave it out",
    "similar r x": "required: PATH",
    "similar nowhere x y": "nowhere: no such run directory",
    "export nowhere --to pt2 --int8": "--int8 needs --to onnx",
    "export nowhere --to timm --force": "--force goes with --int8",
    "eval": "required: RUN",
    "eval nowhere": "nowhere: no such run directory",
    "eval a b": "name one run",
    "eval a split=tset": "Did you mean 'test'?",
    "eval a freeze=head": "cannot be changed after training",
    "eval a dataset.val_fraction=0.5": "dataset.val_fraction=0.5: cannot be changed after training",
    "eval a dataset.image_size=64": "dataset.image_size=64: cannot be changed after training",
    "eval a dataset.min_crop=0.5": "dataset.min_crop=0.5: cannot be changed after training",
    "eval a dataset.flip=0": "dataset.flip=0: cannot be changed after training",
    "data chek": "action chek: choose from check. Did you mean 'check'?",
    "data check --formt=json": "unknown flag '--formt'. Did you mean '--format'?",
    "doctor ": "unknown argument ''.",
    "data check photos": "cannot read 'photos': write KEY=VALUE, as in dataset=imagefolder dataset.root=photos",
    "data check ": "cannot read '': write KEY=VALUE",
    "data check --output=~nobody-here/x": "~nobody-here/x: no such home directory; write the whole path",
    "predict r x --output=~nobody-here/x": "~nobody-here/x: no such home directory",
    "embed r x --to=~nobody-here/f.npz": "~nobody-here/f.npz: no such home directory",
    "rank --plot=~nobody-here/x.svg": "~nobody-here/x.svg: no such home directory",
    "report r --output=~nobody-here/x": "~nobody-here/x: no such home directory",
    "report ~nobody-here": "~nobody-here: no such home directory",
    "inspect ~nobody-here": "~nobody-here: no such home directory",
    "tune --resume ~nobody-here": "~nobody-here: no such home directory",
    "train --resume ~nobody-here": "~nobody-here: no such home directory",
    "rank backbone=~nobody-here": "~nobody-here: no such home directory",
    "data check seed=1,2": "seed=1,2 has several values",
    "data check dataset=imagefolder dataset.root=nowhere": "nowhere: no such folder.",
    "data check datset=digits": "Did you mean 'dataset'?",
}
CASES = {f"train {words}": told for words, told in TRAIN.items()} | OTHERS


@pytest.mark.parametrize("line", CASES)
def test_one_line_exit_2_and_nothing_written(line: str, tlcli, training, tmp_path: Path) -> None:
    training(lambda spec, run, reporter: pytest.fail("training began"))
    command, *words = line.split(" ")
    ended = tlcli(command, *words)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith(f"tlcli {command}: " if command in COMMANDS else "tlcli: ")
    assert ended.err.count("\n") == 1
    assert CASES[line] in ended.err
    assert not list(tmp_path.iterdir())


def test_a_user_without_a_home_directory_gets_one_line(tlcli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", Mock(side_effect=KeyError("no such user")))
    ended = tlcli("train", "dataset=imagefolder", "dataset.root=~/photos")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "~/photos: no such home directory; write the whole path" in ended.err


def test_torchrun_starts_nothing_but_train(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for command in COMMANDS.keys() - {"train"}:
        assert main([command]) == 2
        error = "torchrun has started several processes, but this command runs in one"
        assert capsys.readouterr().err == f"tlcli {command}: {error}\n"
