"""The command line in this process, as tests of the command line have it."""

from tests.cli.conftest import root_logger, tlcli, training

__all__ = ["root_logger", "tlcli", "training"]
