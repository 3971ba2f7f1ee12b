"""List or remove the cached activations of frozen layers. A run computes removed
activations again if it needs them. The folder is $TLCLI_CACHE, or tlcli in the
user's cache directory.

fill computes the activations that `tlcli train` with the same overrides reads
(default: freeze=head), in shards, which may run on machines that share images and
cache. It writes a plan, then runs the missing shards here or as tasks of Ray. With
--engine slurm it prints an array job for sbatch instead. --shard runs one shard of
a plan, on any scheduler.

examples:
  tlcli cache remove 3f2a 9c01
  tlcli cache fill dataset=imagefolder dataset.root=photos --shards 64 --engine ray
  tlcli cache fill dataset=imagefolder dataset.root=photos --shards 64 --engine slurm | sbatch
  tlcli cache fill dataset=imagefolder dataset.root=photos --shard 0/64
"""

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tlcli.cli import exit_status, fast_imports
from tlcli.cli.parser import Parser, whole_number
from tlcli.cli.table import table_lines, terminal_columns
from tlcli.errors import TlcliError, UsageError
from tlcli.interrupts import handle_signals
from tlcli.store import CacheEntry, Store, cache_dir
from tlcli.text import did_you_mean, duration_text, one_line, size_text

if TYPE_CHECKING:
    from tlcli.fill import Plan
    from tlcli.specs import TrainSpec

MIN_KEY_CHARS = 4  # name an entry if only one key starts with them
SLURM_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=tlcli-fill
#SBATCH --array={array}
#SBATCH --cpus-per-task={threads}{gpus}
#SBATCH --requeue
cd {folder} && export TLCLI_CACHE={cache}
exec {python} -P -m tlcli cache fill {words} --shard "$SLURM_ARRAY_TASK_ID/{shards}"
"""


def _shard(value: str) -> tuple[int, int]:
    """Return the number of a shard and how many there are."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", value)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N-1, such as 0/64, not {value!r}")
    return int(match[1]), int(match[2])


PARSER = Parser("cache", __doc__)
add = PARSER.add_argument
actions = ("list", "remove", "clear", "fill")
removed = "clear removes all entries, leftovers, measured speeds, plans and digests of images"
add("action", choices=actions, help=removed)
keys = f"remove: the first {MIN_KEY_CHARS} or more characters of an entry's key; fill: overrides as for `tlcli train`"
add("keys", nargs="*", metavar="KEY|KEY=VALUE", help=keys)
add("--shards", type=whole_number, metavar="N", help="fill: number of shards (default: 1)")
add("--engine", choices=("here", "ray", "slurm"), help="fill: where the shards run (default: here)")
add("--shard", type=_shard, metavar="I/N", help="fill: run shard I, from 0 to N-1, of a plan with N shards")
PARSER.add_config_dir()
PARSER.add_format()


def run(argv: list[str]) -> int:
    """Do one action of `tlcli cache`; return the exit status."""
    arguments = PARSER.parse_intermixed_args(argv or ["--help"])
    flags = [name for name in ("shards", "engine", "shard", "config_dir") if getattr(arguments, name)]
    if flags and arguments.action != "fill":
        raise UsageError(f"--{flags[0].replace('_', '-')} goes with `tlcli cache fill`")
    if arguments.format == "json" and arguments.action != "list":
        raise UsageError("--format goes with `tlcli cache list`")
    store, keys = Store(cache_dir()), arguments.keys
    if keys and arguments.action in ("list", "clear"):
        raise UsageError(f"{arguments.action} takes no KEY. Did you mean 'tlcli cache remove {keys[0]}'?")
    try:
        if arguments.action == "fill":
            return _fill(arguments)
        entries = store.entries()
        if arguments.action == "list":
            _list(store, entries, as_json=arguments.format == "json")
        elif arguments.action == "remove":
            if not keys:
                raise UsageError("name the entries: tlcli cache remove KEY ... (`tlcli cache list` shows the keys)")
            chosen: dict[str, CacheEntry] = {}
            for start in keys:
                matches = [entry for entry in entries if entry.key.startswith(start)]
                if len(matches) != 1 or len(start) < MIN_KEY_CHARS:
                    near = "" if matches else did_you_mean(start, (e.key[: max(8, len(start))] for e in entries))
                    remedy = f"Give {MIN_KEY_CHARS} or more characters of one key; `tlcli cache list` shows the keys."
                    raise UsageError(f"{start!r} is the start of {len(matches)} keys.{near or f' {remedy}'}")
                chosen[matches[0].key] = matches[0]
            for key in chosen:
                store.remove(key)
            print(f"removed {_total(len(chosen), sum(entry.nbytes for entry in chosen.values()))}")
        else:
            print(f"removed {_total(*store.clear())}, from {store.root}")
    except BrokenPipeError:  # of `| head`
        raise
    except OSError as error:
        raise TlcliError(f"{error.filename or store.root}: {error.strerror or error}") from error
    return 0


def _fill(arguments: argparse.Namespace) -> int:
    """Write a plan and run its shards, or run one shard of a plan; return the exit status."""
    if arguments.shard and (arguments.shards or arguments.engine):
        raise UsageError("--shard runs one shard of a plan here: leave out --shards and --engine")
    with fast_imports():
        from tlcli.cli.job import check_spec
        from tlcli.cli.view import TerminalReporter
        from tlcli.engine.session import session_for
        from tlcli.fill import complete, plan_file, read_plan, run_shards, write_plan
        from tlcli.ray_tasks import check_ray

    if arguments.engine == "ray":
        check_ray()
    words, spec = _spec_to_fill(arguments)
    session, reporter = session_for(spec.cache), TerminalReporter(on_stderr=True)
    shard, shards = arguments.shard or (None, arguments.shards or 1)
    store, file, failed = session.store, plan_file(session.store, spec, shards), 0
    try:
        with handle_signals():
            if shard is None:
                check_spec(spec)
                reporter.note(write_plan(spec, shards, session, reporter).summary)
            plan = read_plan(file)
            todo = complete(plan, store) if shard is None else [shard]
            if arguments.engine == "slurm" and todo:
                print(_slurm_script(plan, todo, words, store), end="")
                return 0
            for done, result in run_shards(file, todo, store, reporter, on_ray=arguments.engine == "ray"):
                if isinstance(result, BaseException):
                    failed += 1
                    reason = exit_status(result)[1]
                    if isinstance(result, OSError) and result.filename is None:  # of the store
                        reason = result.strerror or reason
                    elif type(result).__module__.startswith("ray."):
                        reason = one_line(result)
                    print(f"shard {done}/{shards} failed: {reason}", file=sys.stderr, flush=True)
                elif (rows := result[0]) or shard is not None:
                    print(f"shard {done}/{shards}: {rows:,} rows in {duration_text(result[1])}", flush=True)
            missing = complete(plan, store)
    except KeyboardInterrupt as exc:
        exc.args = ("the same command computes the shards that are missing",)
        raise
    if missing and shard is None:
        reason = f"{failed} failed" if failed else f"nodes must share the cache, {store.root}"
        raise TlcliError(f"{len(missing)} of {shards} shards are missing ({reason}); the same command computes them")
    if missing:
        print(f"{len(missing)} of {shards} shards are missing")
        return 0
    entries = [entry for planned in plan.entries if (entry := store.find(planned.key, verify=False))]
    stream = sys.stderr if arguments.engine == "slurm" else sys.stdout  # which sbatch reads
    total = _total(len(entries), sum(entry.nbytes for entry in entries))
    print(f"the cache has {total}, in {store.root}; next:\n  tlcli train {shlex.join(words)}", file=stream)
    return 0


def _slurm_script(plan: "Plan", todo: Sequence[int], words: Sequence[str], store: Store) -> str:
    """Return an array job for sbatch, with a task per missing shard of a plan."""
    import torch

    folder, cache, python = (shlex.quote(str(path)) for path in (Path.cwd(), store.root, sys.executable))
    values = {"folder": folder, "cache": cache, "python": python, "words": shlex.join(words)}
    values["gpus"] = "\n#SBATCH --gpus-per-task=1" if plan.spec["device"]["kind"] == "cuda" else ""
    values["array"] = f"0-{plan.shards - 1}" if len(todo) == plan.shards else ",".join(map(str, todo))
    return SLURM_SCRIPT.format(**values, shards=plan.shards, threads=torch.get_num_threads())


def _spec_to_fill(arguments: argparse.Namespace) -> tuple[list[str], "TrainSpec"]:
    """Return the words of the run that reads what is filled, and its spec with absolute paths."""
    from msgspec import structs, to_builtins

    from tlcli.cli.compose import compose_spec, resolve_paths
    from tlcli.cli.conf_files import files_for
    from tlcli.specs import CacheMode, spec_from

    words, default = [*arguments.config_dir, *arguments.keys], files_for(arguments.config_dir).defaults["freeze"]
    spec = compose_spec(words)
    if spec.freeze.kind == default and f"freeze={default}" not in words:  # no experiment names another one either
        words.append("freeze=head")
        spec = compose_spec(words)
    if spec.cache.mode is CacheMode.off:
        raise UsageError("cache.mode=off: there is nothing to fill")
    values = to_builtins(structs.replace(spec, cache=structs.replace(spec.cache, mode=CacheMode.require)))
    resolve_paths(values, Path.cwd())
    return words, spec_from(values)


def _total(count: int, nbytes: int) -> str:
    return f"{count:,} {'entry' if count == 1 else 'entries'}, {size_text(nbytes)}"


def _list(store: Store, entries: Sequence[CacheEntry], *, as_json: bool) -> None:
    if as_json:
        records = [
            {
                "key": entry.key,
                "path": str(entry.path),
                "bytes": entry.nbytes,
                "rows": entry.rows,
                "columns": [{"dtype": column.dtype, "shape": list(column.shape)} for column in entry.columns],
                "created": entry.created,
                "used": datetime.fromtimestamp(entry.used, UTC).isoformat(timespec="seconds"),
                "facts": dict(entry.metadata),
            }
            for entry in entries
        ]
        print(json.dumps(records, indent=2))
        return
    if not entries:
        print(f"the cache is empty: {store.root}")
        return
    rows = []
    for entry in entries:
        metadata, images, size = entry.metadata, f"{entry.rows:,}", size_text(entry.nbytes)
        dataset = " ".join(str(metadata[name]) for name in ("dataset", "split", "shard") if name in metadata) or None
        minutes = max(0, round(time.time() - entry.used)) // 60
        used = f"{minutes}m" if minutes < 60 else f"{minutes // 60}h" if minutes < 2880 else f"{minutes // 1440}d"
        network = metadata.get("backbone"), metadata.get("at")
        rows.append((entry.key[:8], dataset, *network, images, size, f"{used} ago"))
    titles = ("key", "<dataset", "<backbone", "<at", "images", "size", "used")
    less_important = ("images", "at", "used", "backbone", "dataset")
    print(*table_lines(titles, rows, terminal_columns(), less_important), sep="\n")
    print(f"{_total(len(entries), sum(entry.nbytes for entry in entries))}, in {store.root}")
