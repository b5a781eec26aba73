"""From a card to a data set."""

from __future__ import annotations

from noprop_dist.config import DataCard, default_root
from noprop_dist.data.folder import open_folder
from noprop_dist.data.info import DataInfo, DataSet, Split
from noprop_dist.data.memory import open_digits, open_npz
from noprop_dist.data.vision import SOURCES, describe_vision, open_vision

__all__ = ["DataInfo", "DataSet", "Split", "describe", "open_data"]


def open_data(card: DataCard) -> DataSet:
    """Open the card's data set; torchvision's are fetched where they are missing.

    Raises :class:`~noprop_dist.config.UserError`: one line with what is wrong, where, and how to mend it.
    """
    root = (card.root or default_root()).expanduser()
    if card.name == "digits":
        return open_digits()
    if card.name == "npz":
        return open_npz(root)
    if card.name == "imagefolder":
        return open_folder(card, root)
    return open_vision(card.name, root)


def describe(card: DataCard) -> DataInfo:
    """The facts of the card's data set. For torchvision's no file is read: mean and std stand at 0 and 1.

    Raises :class:`~noprop_dist.config.UserError` as :func:`open_data` does, for the data sets that it has to open.
    """
    return describe_vision(card.name) if card.name in SOURCES else open_data(card).info
