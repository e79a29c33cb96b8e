"""Class averages over several batches: the definition index by index, its gradient, state, precision, invalid input,
compilation, and the argument of the callback"""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from gini_loss.losses import GiniKLLoss, class_probs
from gini_loss.running import RunningGiniKLLoss

pytestmark = pytest.mark.usefixtures('fresh_compiler')


def batches(n=6, m=5, c=4, classes=3, dtype=torch.float64):
    return [(torch.randn(m, c, dtype=dtype), torch.randint(0, classes, (m,))) for _ in range(n)]


def oracle(data, k, n, reverse=False):
    "The two terms after the last batch, in plain Python: an earlier image counts (1-1/k)^age"
    beta = 1 - 1 / k
    weight, total = [0.0] * n, [[0.0] * n for _ in range(data[0][0].shape[1])]
    for age, (A, y) in enumerate(reversed(data)):
        for a, label in zip(A.abs().tolist(), y.tolist()):
            if label < 0:
                continue
            weight[label] += beta**age
            for i, v in enumerate(a):
                total[i][label] += beta**age * v
    S = [[t / w if w else 0.0 for t, w in zip(row, weight)] for row in total]
    P = [[s / sum(row) for s in row] for row in S if sum(row) > 0]
    gini = sum(1 - sum(p * p for p in row) for row in P) / len(P)
    hS, hY = [sum(row[j] for row in P) / len(P) for j in range(n)], [w / sum(weight) for w in weight]
    kl = (
        sum(b * math.log(b / max(a, 1e-10)) for a, b in zip(hS, hY) if b)
        if reverse
        else sum(a * math.log(a / b) for a, b in zip(hS, hY) if a)
    )
    return gini, kl


@pytest.mark.parametrize('k', [1, 2, 7])
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('soft', [False, True])
def test_against_the_definition(k, reverse, soft):
    data = batches()
    loss = RunningGiniKLLoss(n_classes=3, n_batches=k, reverse_kl=reverse)
    for i, (A, y) in enumerate(data):
        got = loss.terms(A, nn.functional.one_hot(y, 3).double() if soft else y)
        for g, e in zip(got, oracle(data[: i + 1], k, 3, reverse)):
            assert g.item() == pytest.approx(e, abs=1e-12)


def test_one_batch_of_memory_is_the_plain_loss():
    plain, loss = GiniKLLoss(n_classes=3), RunningGiniKLLoss(n_classes=3, n_batches=1)
    for A, y in batches():
        A.requires_grad_()
        for got, expected in zip(loss.terms(A, y), plain.terms(A, y)):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
            torch.testing.assert_close(
                torch.autograd.grad(got, A, retain_graph=True)[0],
                torch.autograd.grad(expected, A, retain_graph=True)[0],
                rtol=0,
                atol=1e-14,
            )


def test_gradient_is_the_partial_derivative_over_the_share_of_the_batch():
    "Finite differences of the value in the latest batch, divided by the share of this batch in the averages"
    *before, (A, y) = batches()
    k, h = 4, 1e-6
    loss = RunningGiniKLLoss(n_classes=3, n_batches=k)
    for b in before:
        loss.terms(*b)
    share = len(y) / (loss.mass.sum().item() * (1 - 1 / k) + len(y))
    value = lambda A: copy.deepcopy(loss)(A, y)
    x = A.clone().requires_grad_()
    (got,) = torch.autograd.grad(value(x), x)
    for i in range(A.shape[0]):
        for j in range(A.shape[1]):
            d = torch.zeros_like(A)
            d[i, j] = h
            assert got[i, j].item() * share == pytest.approx((value(A + d) - value(A - d)).item() / (2 * h), abs=1e-7)


def test_expected_gradient_is_that_of_the_large_batch():
    """With constant weights, the mean gradient over many batches of a few classes has the direction and length of the
    large batch's gradient; that of the plain loss does not"""
    g = torch.Generator().manual_seed(1)
    X, Y = torch.randn(400, 10, generator=g, dtype=torch.float64), torch.arange(400) % 8
    X = X + 1.5 * torch.eye(10, dtype=torch.float64)[Y]
    W = torch.randn(10, 12, generator=g, dtype=torch.float64).requires_grad_()

    def gradient(loss, i):
        return torch.autograd.grad(loss((X[i] @ W).relu(), Y[i]), W)[0].flatten()

    exact = gradient(GiniKLLoss(), torch.arange(400))
    order = [
        torch.cat(
            [(Y == c).nonzero()[:, 0][torch.randperm(50, generator=g)[:4]] for c in torch.randperm(8, generator=g)[:2]]
        )
        for _ in range(400)
    ]
    found = {}
    for name, loss in dict(plain=GiniKLLoss(), running=RunningGiniKLLoss(n_classes=8, n_batches=60)).items():
        mean = torch.stack([gradient(loss, i) for i in order][100:]).mean(0)
        found[name] = torch.cosine_similarity(mean, exact, 0).item(), (mean.norm() / exact.norm()).item()
    assert (
        found['running'][0] > 0.75
        and found['plain'][0] < 0.55
        and abs(found['running'][1] - 1) < 0.2 < 0.5 < abs(found['plain'][1] - 1)
    ), found


def test_absent_classes_and_ignored_images():
    loss = RunningGiniKLLoss(n_classes=1000, n_batches=3)
    a, b = torch.rand(4, 5), torch.rand(3, 5)
    loss.terms(a, torch.tensor([3, 3, -100, 900]))
    got = loss.terms(
        b, torch.tensor([-100, -100, -100])
    )  # nothing new: the averages do not change, and there is no gradient
    same = GiniKLLoss().terms(a[[0, 1, 3]], torch.tensor([3, 3, 900]))
    for g, e in zip(got, same):
        torch.testing.assert_close(g, e)
    x = b.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(x, torch.full((3,), -100)), x)
    assert (grad == 0).all() and (loss.mass > 0).sum() == 2
    empty = RunningGiniKLLoss(n_classes=3)
    assert empty(torch.rand(0, 5), torch.zeros(0).long()) == 0 and empty(torch.rand(2, 5), torch.full((2,), -100)) == 0


@pytest.mark.parametrize('dtype,tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_precision(dtype, tolerance):
    exact, loss = RunningGiniKLLoss(n_classes=3), RunningGiniKLLoss(n_classes=3)
    for A, y in batches(m=40, c=30):
        A = A.to(dtype).requires_grad_()
        B = A.detach().double().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16):
            got = loss.terms(A, y)
        for g, e in zip(got, exact.terms(B, y)):
            assert g.dtype == torch.float32 and abs(g - e) <= 1e-5 * e.abs() + 1e-7
            d, f = (
                torch.autograd.grad(g * 2**10, A, retain_graph=True)[0].double() / 2**10,
                torch.autograd.grad(e, B, retain_graph=True)[0],
            )
            assert (d - f).norm() <= tolerance * f.norm()
    assert loss.means.dtype == torch.float32


def test_state_is_saved_moved_and_forgotten():
    data = batches()
    loss = RunningGiniKLLoss(n_classes=3, n_batches=4)
    for b in data[:4]:
        loss.terms(*b)
    f = io.BytesIO()
    torch.save(loss.state_dict(), f)
    f.seek(0)
    again = RunningGiniKLLoss(n_classes=3, n_batches=4)
    again.load_state_dict(torch.load(f, weights_only=True))
    holder = nn.Sequential()
    holder.loss = RunningGiniKLLoss(n_classes=3, n_batches=4)
    holder.load_state_dict({f'loss.{k}': v for k, v in loss.state_dict().items()})
    for twin in (again, holder.loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin.means.shape == (4, 3) and torch.equal(twin(*data[4]), copy.deepcopy(loss)(*data[4]))
    assert loss.to('meta').means.device.type == 'meta'
    again.reset()
    assert torch.equal(again(*data[5]), RunningGiniKLLoss(n_classes=3)(*data[5]))
    assert not list(loss.parameters()) and 'n_batches=4' in repr(loss)


def within_another(x):
    "The same number as a view of a buffer that holds other tensors too"
    return torch.cat([x.flatten(), torch.ones(30, dtype=x.dtype)])[0]


@pytest.mark.parametrize('copy_of', [torch.clone, torch.Tensor.double, within_another])
def test_a_copy_of_the_state_without_the_averages_is_told(copy_of):
    "Each tensor of a state dict copied for itself: the averages are not in it. A state before the first batch has none"
    loss = RunningGiniKLLoss(n_classes=3)
    again = copy.deepcopy(loss)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again.load_state_dict({k: copy_of(v) for k, v in loss.state_dict().items()})
    loss(*batches(dtype=torch.float32)[0])
    with pytest.warns(UserWarning, match="averages .* are not in this state dict.*torch.save and copy.deepcopy keep"):
        again.load_state_dict({k: copy_of(v) for k, v in loss.state_dict().items()})
    assert again.means.numel() == 0


@pytest.mark.parametrize('c, n', [(515, 3), (4, 5001)])
@pytest.mark.parametrize('convert', [nn.Module.half, nn.Module.bfloat16])
def test_the_state_of_a_module_in_half_precision(c, n, convert):
    "Sizes that half precision cannot hold come back as they were"
    loss, again = RunningGiniKLLoss(n_classes=n), RunningGiniKLLoss(n_classes=n)
    loss(torch.rand(4, c), torch.tensor([0, 1, 2, n - 1]))
    again.load_state_dict(convert(loss).state_dict())
    assert again.means.shape == (c, n) and torch.equal(again.means, loss.means) and torch.equal(again.mass, loss.mass)


def test_looking_does_not_remember_and_nothing_holds_the_graph():
    data = batches()
    loss = RunningGiniKLLoss(n_classes=3)
    for A, y in data[:2]:
        loss(A.requires_grad_(), y)
    before = loss.means.clone(), loss.mass.clone()
    loss.eval()
    loss(*data[2])
    assert (
        torch.equal(loss.means, before[0])
        and torch.equal(loss.mass, before[1])
        and not loss.means.requires_grad
        and not loss.mass.requires_grad
    )
    with pytest.raises(ValueError, match="NaN or infinite"):
        loss.train()(data[0][0] * math.nan, data[0][1])
    assert torch.equal(loss.means, before[0])  # an invalid batch is not added to the averages


def test_bad_input():
    A, y = torch.rand(4, 3), torch.tensor([0, 1, 2, 0])
    for bad in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match="n_batches must be a positive integer"):
            RunningGiniKLLoss(n_batches=bad)
    with pytest.raises(ValueError, match="needs n_classes"):
        RunningGiniKLLoss()(A, y)
    with pytest.raises(ValueError, match="label 2 is not below n_classes=2"):
        RunningGiniKLLoss(n_classes=2)(A, y)
    loss = RunningGiniKLLoss(n_classes=3)
    loss(A, y)
    with pytest.raises(ValueError, match=r"5 channels and 3 classes.* 3 and 3: call reset"):
        loss(torch.rand(4, 5), y)


def test_compiled():
    data = batches(dtype=torch.float32)
    loss, plain = RunningGiniKLLoss(n_classes=3, n_batches=4), RunningGiniKLLoss(n_classes=3, n_batches=4)
    compiled = torch.compile(loss, backend='aot_eager')
    for A, y in data:
        x, z = A.clone().requires_grad_(), A.clone().requires_grad_()
        got, expected = compiled(x, y), plain(z, y)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            torch.autograd.grad(got, x)[0], torch.autograd.grad(expected, z)[0], rtol=1e-4, atol=1e-6
        )
    torch.testing.assert_close(loss.means, plain.means)


# ---- A prior, and a mask ----


def test_a_prior_is_restricted_to_the_classes_remembered():
    prior, data = (
        [0.5, 0.3, 0.2],
        [(torch.rand(4, 5, dtype=torch.float64), torch.tensor(y)) for y in ([0, 0, 0, 0], [1, 1, 0, 1], [2, 0, 1, 2])],
    )
    loss = RunningGiniKLLoss(class_prior=prior, n_batches=3)
    for shares, (A, y) in zip(([1, 0, 0], [0.625, 0.375, 0], prior), data):
        kl = loss.terms(A, y)[1]
        P = class_probs(loss.means)
        hS = P.mean(0)
        assert kl.item() == pytest.approx(
            sum(h * math.log(h / s) for h, s in zip(hS.tolist(), shares) if h > 0), abs=1e-12
        )


# ---- Weight averaging that starts before the first batch ----


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.aux = nn.Linear(3, 6), RunningGiniKLLoss(n_classes=3)

    def forward(self, x):
        return self.layer(x)


def averaged_model(net):
    return torch.optim.swa_utils.AveragedModel(net), lambda ema, net: ema.update_parameters(net)


def averaged_buffers(net):
    return torch.optim.swa_utils.AveragedModel(net, use_buffers=True), lambda ema, net: ema.update_parameters(net)


def timm_ema(net):
    return pytest.importorskip('timm').utils.ModelEmaV3(net), lambda ema, net: ema.update(net)


def timm_old_ema(net):
    return pytest.importorskip('timm').utils.ModelEmaV2(net), lambda ema, net: ema.update(net)


def ema_pytorch(net):
    return pytest.importorskip('ema_pytorch').EMA(
        net, update_after_step=0, update_every=1
    ), lambda ema, net: ema.update()


@pytest.mark.parametrize('make', [averaged_model, averaged_buffers, timm_ema, timm_old_ema, ema_pytorch])
def test_averages_of_the_weights_leave_the_state_alone(make):
    "Made before the first batch, when the number of channels is unknown, and updated after it"
    net = Net()
    ema, update = make(net)
    for A, y in batches(2, c=3, dtype=torch.float32):
        net.aux(net.layer(A), y)
        update(ema, net)
    assert net.aux.means.shape == (6, 3) and net.aux.mass.sum() > 0 and 'aux._extra_state' in net.state_dict()
    twin = Net()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin.aux.means, net.aux.means) and torch.equal(twin.aux.mass, net.aux.mass)


def test_lightning_averages(tmp_path):
    L = pytest.importorskip('lightning')
    averaging = getattr(L.pytorch.callbacks, 'WeightAveraging', None) or pytest.skip(
        "this Lightning has no WeightAveraging"
    )

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, i):
            x, y = batch
            A = self.net(x)
            return nn.functional.cross_entropy(A, y) + self.net.aux(A, y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module, data = Module(), torch.utils.data.TensorDataset(torch.rand(12, 3), torch.arange(12) % 3)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator='cpu',
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[averaging()],
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, 4))
    assert module.net.aux.means.shape == (6, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_counts_like_one_without_labels(bad):
    "It fades the earlier batches, and adds neither averages nor mass"
    torch.manual_seed(0)
    (A, y), (B, z) = ((torch.rand(8, 5), torch.randint(0, 3, (8,))) for _ in range(2))
    found = []
    for between in ((A * bad, y), (A, torch.full((8,), -100))):
        loss = RunningGiniKLLoss(n_classes=3, n_batches=4, check_finite=False)
        for batch in ((A, y), between):
            loss(*batch)
        found.append(loss.terms(B, z))
    assert torch.equal(torch.stack(found[0]), torch.stack(found[1]))
