"""Draw nbs/images/card.png, the picture that other sites show with a link: the two heat maps of the home page, 1200 x
630.

It trains two narrow networks on scikit-learn's digits, about a minute on a CPU. Run it again when the project's
sentence or the style of the figures changes.
"""

import warnings

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from common import cfg, root
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.torch_core import set_seed
from sklearn.datasets import load_digits

from gini_loss.callback import GiniLossCallback
from gini_loss.loader import device_dls
from gini_loss.models import resnet18
from gini_loss.plots import LOSS_NAMES, layer_diagnostics

SENTENCE = ("A loss that asks every channel", "of a network to stand for one class")
BACK, WHITE, PALE, YELLOW = "#1d3557", "#ffffff", "#c9d6e6", "#ffd166"

digits = load_digits()
images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None].repeat(1, 3, 1, 1)
labels = torch.from_numpy(digits.target).long()


def trained(loss):
    set_seed(0)
    dls = device_dls(
        (images[:1400], labels[:1400]), (images[1400:], labels[1400:]), bs=100, seed=0, augment=False, device="cpu"
    )
    weight = 0.5 if loss == "both" else 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        terms = GiniLossCallback(lambda_gini=weight, lambda_kl=weight, start_epoch=2)
        learn = Learner(dls, resnet18(10, width=16), lr=2e-3, cbs=terms)
        learn.remove_cb(ProgressCallback)
        with learn.no_logging():
            learn.fit(8)
    return layer_diagnostics(learn.model, dls.valid)


def heat_map(ax, d, title):
    P = d.probs[~d.dead]
    order = np.lexsort((-P.max(1).values.numpy(), P.argmax(1).numpy()))
    ax.imshow(P[order], aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    ax.set(yticks=[], xticks=range(10))
    ax.tick_params(colors=PALE, labelsize=13, length=0)
    ax.set_title(title, color=WHITE, fontsize=19, pad=12)
    for side in ax.spines.values():
        side.set_visible(False)


fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor=BACK)
fig.text(0.05, 0.72, cfg["title"], color=YELLOW, fontsize=62, family="monospace", weight="bold")
for i, line in enumerate(SENTENCE):
    fig.text(0.05, 0.58 - 0.085 * i, line, color=WHITE, fontsize=23.5)
fig.text(
    0.05,
    0.27,
    "Derived by hand, packaged for PyTorch\nand fastai, put to the test in the open",
    color=PALE,
    fontsize=18,
    linespacing=1.5,
)
fig.text(0.05, 0.1, f"pip install {cfg['lib_name']}", color=WHITE, fontsize=19, family="monospace")
for i, loss in enumerate(("ce", "both")):
    ax = fig.add_axes((0.555 + 0.215 * i, 0.17, 0.185, 0.63))
    heat_map(ax, trained(loss), LOSS_NAMES[loss])
fig.text(0.7475, 0.065, "a row per channel, a column per digit", color=PALE, fontsize=15, ha="center")
target = root / "nbs" / "images" / "card.png"
target.parent.mkdir(exist_ok=True)
fig.savefig(target, facecolor=BACK, metadata={"Software": None})
print("wrote", target.relative_to(root))
