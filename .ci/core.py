"""Test the core alone: import gini_loss with nothing but torch installed, and train with the loop of
nbs/14_pytorch.ipynb.

The network and the loop are those of the page. The images are made here, because those of the page need scikit-learn.
"""

import ast
import importlib.util
import sys

import torch
from common import cells, root, text
from torch import nn
from torch.nn.functional import cross_entropy

import gini_loss
from gini_loss import FeatureTap, GiniKLLoss

OTHERS = ["fastai", "fastcore", "numpy", "pandas", "matplotlib", "torchvision", "nbdev"]


def functions_of(page, *names):
    "The source of these functions of a page"
    found = {}
    for cell in cells(root / "nbs" / page):
        source = text(cell["source"])
        if cell["cell_type"] != "code" or "def " not in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                found[node.name] = ast.get_source_segment(source, node)
    return "\n\n".join(found[name] for name in names)


def make_images(n_classes=10, per_class=60):
    "Images of 8×8 pixels, a faint pattern per class plus noise, and their labels"
    torch.manual_seed(0)
    y = torch.arange(n_classes).repeat(per_class)
    patterns = torch.rand(n_classes, 1, 8, 8)
    return patterns[y] + 0.3 * torch.randn(len(y), 1, 8, 8), y


def check_alone():
    there = [name for name in OTHERS if importlib.util.find_spec(name)]
    assert not there, f"the core must need torch alone, but {there} came with it"
    try:
        import gini_loss.callback
    except ImportError as e:
        assert "pip install" in str(e), f"the error must say what to install, got: {e}"
        print("without fastai:", e)
    else:
        sys.exit(f"{gini_loss.callback.__file__} was imported without fastai")


def main():
    check_alone()
    x, y = make_images()
    page = dict(torch=torch, nn=nn, cross_entropy=cross_entropy, FeatureTap=FeatureTap, GiniKLLoss=GiniKLLoss, x=x, y=y)
    exec(functions_of("14_pytorch.ipynb", "get_model", "train"), page)
    impurity = {}
    for name, weight in {"cross-entropy": 0.0, "both terms": 0.5}.items():
        model = page["train"](GiniKLLoss(weight, weight))
        with FeatureTap(model, "8") as tap, torch.no_grad():
            accuracy = (model(x).argmax(1) == y).float().mean().item()
            impurity[name] = GiniKLLoss().terms(tap.activations, y)[0].item()
        assert accuracy > 0.9, f"{name}: the network did not learn, accuracy {accuracy:.2f}"
        print(f"{name}: accuracy {accuracy:.3f}, L_Gini {impurity[name]:.3f}")
    assert impurity["both terms"] < impurity["cross-entropy"] - 0.02, "the terms did nothing"
    print("gini_loss", gini_loss.__version__, "trains with torch", torch.__version__, "alone")


if __name__ == "__main__":
    main()
