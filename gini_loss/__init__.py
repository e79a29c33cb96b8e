__version__ = "0.1.0"

# Everything that needs torch alone. The fastai callback is in gini_loss.callback.
from .channels import ablate, channels_of, explain, name_channels
from .losses import (Diagnostics, GiniKLLoss, Measured, Pull, class_means, class_probs, diagnostics, feature_histogram,
                     gini_impurity, gini_loss, kl_loss, label_histogram, pool, pull)
from .running import RunningGiniKLLoss
from .tap import FeatureTap, find_channel_dim, find_layer, last_stage
from .targets import MixedTargets
