"""The old name of `gini_loss.datasets` and `gini_loss.loader`. It goes on working for one release, with a warning."""
import warnings

from gini_loss import datasets as _datasets
from gini_loss import loader as _loader

__all__ = [*_datasets.__all__, *_loader.__all__]

from gini_loss.datasets import *  # noqa: F403
from gini_loss.loader import *  # noqa: F403

warnings.warn("gini_loss.data is now gini_loss.datasets and gini_loss.loader: change the import, the old name goes with "
              "the next release", DeprecationWarning, stacklevel=2)
