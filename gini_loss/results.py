"""The old name of `gini_loss.records`. It goes on working for one release, with a warning."""
import warnings

from gini_loss import records as _new
from gini_loss.records import * # noqa: F403

warnings.warn("gini_loss.results is now gini_loss.records: change the import, the old name goes with the next release",
              DeprecationWarning, stacklevel=2)

def __getattr__(name): return getattr(_new, name)
