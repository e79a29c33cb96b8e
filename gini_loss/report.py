"""The old name of `gini_loss.paper`. It goes on working for one release, with a warning."""
import warnings

from gini_loss import paper as _new
from gini_loss.paper import * # noqa: F403

warnings.warn("gini_loss.report is now gini_loss.paper: change the import, the old name goes with the next release",
              DeprecationWarning, stacklevel=2)

def __getattr__(name): return getattr(_new, name)
