__version__ = "0.1.0"

# What needs torch alone. The fastai callback is in gini_loss.callback.
from .losses import (Diagnostics, GiniKLLoss, class_means, class_probs, diagnostics, feature_histogram, gini_impurity, gini_loss, kl_loss,
                     label_histogram, pool)
from .tap import FeatureTap
