"""`tlcli train`: compose a config, check it, and run it once or as a sweep."""

from tlcli.cli.conf_files import ConfFiles, conf_dir, extra_folders


def run(argv: list[str]) -> int:
    """Run `tlcli train` with these arguments; the exit code."""
    if "--help" in argv or "-h" in argv:
        return _help(argv)
    if "--version" in argv:
        from tlcli import __version__

        print(f"tlcli {__version__}")
        return 0
    from tlcli.cli import app

    return app.run(argv)


def _help(argv: list[str]) -> int:
    """Print the help, with the groups of a --config-dir, without Hydra."""
    from tlcli.cli.helptext import train_help

    print(train_help(ConfFiles([conf_dir(), *extra_folders(argv)])), end="")
    return 0
