"""What the channels of trained networks are good for: a table from the networks of `gini_study twelve --weights
FOLDER`.

    python benchmarks/uses.py weights --out results/twelve-uses.csv

The class that a channel stands for is read from the training images; everything else is measured on the test images.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch

from gini_loss.channels import ablate, channels_of, explain
from gini_loss.plots import inspect_layer
from gini_loss.train import load_images, load_run


def logits_of(model, x):
    return torch.cat([model(part) for part in x.split(300)])


def recalls(logits, y, n):
    return torch.stack([(logits.argmax(1)[y == k] == k).float().mean() for k in range(n)])


def switched_off(model, probs, x, y, n):
    "Recall that a class loses without its channels, and recall that the others lose: means over the classes"
    before, own, others = recalls(logits_of(model, x), y, n), [], []
    for k in range(n):
        with ablate(model, channels_of(probs, k)):
            lost = before - recalls(logits_of(model, x), y, n)
        own.append(lost[k])
        others.append((lost.sum() - lost[k]) / (n - 1))
    return torch.stack(own).mean().item(), torch.stack(others).mean().item()


def kept_alone(model, probs, x, y, n, k):
    "Accuracy with the k purest channels of each class and no others"
    kept = {int(c) for label in range(n) for c in channels_of(probs, label)[:k]}
    with ablate(model, [c for c in range(len(probs)) if c not in kept]):
        return (logits_of(model, x).argmax(1) == y).float().mean().item()


def retrieval(M, y, k=10):
    "Share of the same class among the k nearest other images, by cosine"
    M = torch.nn.functional.normalize(M.float(), dim=1)
    near = (M @ M.T).fill_diagonal_(-1).topk(k).indices
    return (y[near] == y[:, None]).float().mean().item()


@torch.no_grad()
def measure(path, root=None):
    "A row of the table for one network"
    model, transform, classes, config = load_run(path)
    train, _, test, _ = load_images(config, root)
    n, y = len(classes), test.labels
    x_train, x = transform(train.images), transform(test.images)
    probs = inspect_layer(model, list(zip(x_train.split(300), train.labels.split(300))), n_classes=n).diagnostics.probs
    seen = inspect_layer(model, list(zip(x.split(300), y.split(300))), n_classes=n)
    own, others = switched_off(model, probs, x, y, n)
    share = torch.cat([explain(model, part, probs).own_share for part in x.split(300)])
    return dict(
        run_id=config.run_id,
        loss=config.loss,
        class_prior=config.class_prior,
        seed=config.seed,
        accuracy=seen.right.float().mean().item(),
        gini=seen.diagnostics.gini,
        own_share=share.mean().item(),
        off_own=own,
        off_others=others,
        retrieval=retrieval(seen.features, y),
        one=kept_alone(model, probs, x, y, n, 1),
        three=kept_alone(model, probs, x, y, n, 3),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', help='folder of networks that `gini_study twelve --weights FOLDER` kept')
    parser.add_argument('--data-root', default=None, help="folder of CIFAR-100 (fastai's data folder)")
    parser.add_argument('--out', default='uses.csv')
    args = parser.parse_args()
    paths = sorted(Path(args.folder).glob('*.safetensors'))
    if not paths:
        parser.error(
            f'no networks (*.safetensors) in {args.folder}: `gini_study twelve --weights {args.folder}` keeps them'
        )
    rows = [measure(path, args.data_root) for path in paths]
    table = pd.DataFrame(rows).sort_values(['loss', 'class_prior', 'seed']).round(4)
    table.to_csv(args.out, index=False)
    print(table.groupby(['loss', 'class_prior']).mean(numeric_only=True).round(3).T.to_string())


if __name__ == '__main__':
    main()
