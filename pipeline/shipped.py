"""Files that come with Trimline beside the code: tokenizers/, ds_configs/, slurm/, recipes/."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(*parts: str) -> Path:
    """Path of a shipped file or folder, in an installed wheel or in a checkout; it need not exist.

    The wheel's place is asked first: beside an installed package lies the `tokenizers` library, under the name of our folder.
    """
    installed = _PACKAGE.joinpath("_shipped", *parts)
    return installed if installed.exists() else _PACKAGE.parent.joinpath(*parts)
