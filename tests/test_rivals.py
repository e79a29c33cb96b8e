"The rivals of the Gini and KL terms: their values, and the engine that trains them."

import math

import pytest
import torch
import torch.nn.functional as F

from gini_loss.config import OBJECTIVES, recipe
from gini_loss.rivals import CenterLoss, Rival, class_selectivity, mutual_channel
from gini_loss.train import Deadline, train

WEIGHTS = {"label-smoothing": 0.1, "center": 0.01, "supcon": 0.3, "selectivity": -0.3, "mutual-channel": 0.3}


def slow_mutual_channel(A, y, n, kept):
    "Group by group and image by image, as the paper writes it"
    groups = [list(map(int, g)) for g in torch.arange(A.shape[1]).tensor_split(n)]
    dis = div = 0.0
    for a, label in zip(A, y):
        logits = []
        for group in groups:
            on = [a[j].flatten() * float(kept[j]) for j in group]
            logits.append(torch.stack(on).max(0).values.mean())
            shares = torch.stack([a[j].flatten().softmax(0) for j in group])
            div += shares.max(0).values.sum() / len(group) / n / len(A)
        dis += F.cross_entropy(torch.stack(logits)[None], label[None]) / len(A)
    return dis + 20 / 1.5 * (1 - div)


@pytest.mark.parametrize("channels,n", [(4, 2), (7, 3), (5, 5)])
def test_mutual_channel_is_the_definition(channels, n):
    "Equal and unequal groups; half of each group's channels, rounded up, are kept"
    A, y = torch.rand(6, channels, 3, 3, dtype=torch.float64), torch.arange(6) % n
    sizes = [len(g) for g in torch.arange(channels).tensor_split(n)]
    torch.manual_seed(3)
    kept = torch.cat([torch.randperm(k) < math.ceil(k / 2) for k in sizes])
    torch.manual_seed(3)
    assert mutual_channel(A, y, n).item() == pytest.approx(slow_mutual_channel(A, y, n, kept).item(), rel=1e-10)


@pytest.mark.parametrize("A", [torch.rand(4, 8), torch.rand(4, 2, 3, 3)])
def test_mutual_channel_needs_maps_and_a_channel_a_class(A):
    with pytest.raises(ValueError, match="at least 3 channels"):
        mutual_channel(A, torch.tensor([0, 1, 2, 0]), 3)


def test_selectivity_of_one_class_is_zero():
    M = torch.rand(3, 4, requires_grad=True)
    class_selectivity(M, torch.tensor([1, 1, 1])).backward()
    assert M.grad.abs().sum() == 0


def test_center_moves_in_training_mode_alone():
    center = CenterLoss(2, 3).eval()
    center(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]))
    assert center.centers.abs().sum() == 0


def test_unknown_objective():
    with pytest.raises(ValueError, match="use one of label-smoothing"):
        Rival("magic", 1.0)


@pytest.mark.parametrize("objective", OBJECTIVES[1:])
def test_a_rival_changes_training_and_resumes_to_the_same_numbers(tmp_path, monkeypatch, objective):
    "Stopped after the first epoch and continued: equal to the last bit, the centres too"
    if objective == "supcon":
        pytest.importorskip("pytorch_metric_learning")
    options = dict(train_per_class=10, epochs=2, width=4, loss="ce")
    plain, config = (
        recipe("test", **options, **o) for o in ({}, dict(objective=objective, objective_weight=WEIGHTS[objective]))
    )

    class Stop(Deadline):
        def before_epoch(self):
            if self.learn.epoch == 1:
                self.stop()
            super().before_epoch()

    def run(config, name):
        return train(config, tmp_path / name, tmp_path / name / "c", device="cpu", verbose=False, checkpoint_every=1)

    with monkeypatch.context() as m:
        m.setattr("gini_loss.train.Deadline", Stop)
        assert run(config, "parts") is None
    parts, whole, ce = run(config, "parts"), run(config, "whole"), run(plain, "plain")
    assert parts["epochs"]["train_loss"] == whole["epochs"]["train_loss"] != ce["epochs"]["train_loss"]
    assert parts["last"] == whole["last"]


def test_centres_follow_their_images_by_the_rule_of_the_paper():
    "Δ_j = Σ (c_j - x) / (1 + n_j), Eq. 4 of Wen et al.; a class without images keeps its centre"
    loss = CenterLoss(3, 2, rate=0.5)
    loss(torch.tensor([[2.0, 4.0], [4.0, 0.0], [6.0, 2.0]]), torch.tensor([0, 0, 2]))
    torch.testing.assert_close(loss.centers, torch.tensor([[1.0, 2 / 3], [0.0, 0.0], [1.5, 0.5]]))
    before = loss.centers.clone()
    loss.eval()(torch.rand(2, 2), torch.tensor([0, 1]))
    assert torch.equal(loss.centers, before)
