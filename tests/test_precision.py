"""How close float32 and half precision come to float64, and that autocast changes nothing."""

import math

import pytest
import torch
from oracle import terms_and_gradients

from gini_loss.losses import GiniKLLoss, class_means, class_probs, gini_loss, kl_loss, label_histogram, pool
from gini_loss.targets import MixedTargets

# ---- Precision ----


def realistic(name):
    "Typical batches: at the start of training, in the middle, and when each channel fires for one class"
    torch.manual_seed(len(name))
    y = torch.arange(200) % 10
    if name == 'initial':
        return torch.randn(128, 256, 4, 4).relu(), torch.randint(0, 100, (128,))
    if name == 'few images':
        return torch.randn(16, 4), torch.randint(0, 3, (16,))
    if name == 'balanced':
        return torch.rand(200, 256), y
    own = (y[:, None] == torch.arange(256) % 10).float()
    if name == 'specialised':
        return torch.rand(200, 256) * (own + 1e-3), y
    if name == 'pure':
        return torch.rand(200, 256) * (own + 1e-6), y
    if name == 'mixed labels':
        return torch.randn(64, 32, 2, 2), torch.rand(64, 10).softmax(1)
    if name == 'teacher':
        return torch.rand(64, 32), (torch.randn(64, 10) * 30).softmax(1)  # probabilities down to 1e-45


REALISTIC = ['initial', 'few images', 'balanced', 'specialised', 'pure', 'mixed labels', 'teacher']


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize('name', REALISTIC)
@pytest.mark.parametrize('reverse', [False, True])
def test_precision_of_float32(name, reverse):
    "Value and gradient of both terms are within 1e-5 of float64, also if the terms are close to zero"
    A, y = realistic(name)
    got, expected = (
        terms_and_gradients(A, y, reverse_kl=reverse),
        terms_and_gradients(A.double(), y, reverse_kl=reverse),
    )
    assert (
        got[0].dtype == torch.float32
        and [round(relative(g, e), 9) for g, e in zip(got, expected) if relative(g, e) > 1e-5] == []
    )


@pytest.mark.parametrize('dtype,tolerance', [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize('name', REALISTIC)
@pytest.mark.parametrize('reverse', [False, True])
def test_precision_of_half_inputs(name, dtype, tolerance, reverse):
    "Computed in float32 for any input: only the gradient is rounded to the precision of the input"
    A, y = realistic(name)
    if dtype == torch.float16:
        A = A.clamp(max=64.0) * 16  # large enough not to underflow in float16
    got, expected = (
        terms_and_gradients(A.to(dtype), y, reverse_kl=reverse),
        terms_and_gradients(A.to(dtype).double(), y, reverse_kl=reverse),
    )
    assert got[0].dtype == got[1].dtype == torch.float32 and got[2].dtype == dtype
    scale = 2.0**16 if dtype == torch.float16 else 1.0  # float16 is trained with a GradScaler
    if dtype == torch.float16:
        x = A.to(dtype).requires_grad_()
        got = (
            *got[:2],
            *(
                torch.autograd.grad(t * scale, x, retain_graph=True)[0].double() / scale
                for t in GiniKLLoss(reverse_kl=reverse).terms(x, y)
            ),
        )
    assert [relative(g, e) for g, e in zip(got, expected) if relative(g, e) > tolerance] == []


@pytest.mark.parametrize('reverse', [False, True])
def test_kl_is_never_negative(reverse):
    "For nearly equal histograms, rounding makes the divergence no more negative than in float64"
    torch.manual_seed(0)
    for _ in range(50):
        A, y = 1 + 1e-3 * torch.rand(40, 3), torch.arange(40) % 4
        assert kl_loss(A, y, reverse).item() >= -1e-15


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('amp', [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, amp):
    torch.manual_seed(0)
    A, y = torch.randn(20, 8, 3, 3).to(dtype).requires_grad_(), torch.randint(0, 5, (20,))
    for targets in (y, torch.rand(20, 5)):
        outside = GiniKLLoss()(A, targets)
        with torch.autocast('cpu', amp):
            inside = GiniKLLoss()(A, targets)
        gradients = [torch.autograd.grad(loss, A)[0] for loss in (inside, outside)]  # backward belongs outside autocast
        assert torch.equal(inside, outside) and inside.dtype == outside.dtype and torch.equal(*gradients)


def test_soft_targets_of_another_precision_do_not_change_the_result_type():
    A, y = torch.rand(6, 3), torch.rand(6, 4)
    for t in (y.double(), y.half(), y.bfloat16()):
        assert gini_loss(A, t).dtype == kl_loss(A, t).dtype == torch.float32
    assert gini_loss(A.double(), y).dtype == torch.float64


def test_masked_means_in_double_precision():
    "The share of the positions that count is as precise as the activations"
    A, mask = torch.rand(3, 7, 2, dtype=torch.float64), torch.arange(7) < torch.tensor([3, 6, 5])[:, None]
    expected = torch.stack([a[k].mean(0) for a, k in zip(A, mask)])
    torch.testing.assert_close(pool(A, channel_dim=-1, mask=mask), expected, rtol=1e-14, atol=0)


@pytest.fixture
def half_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_default_dtype_does_not_matter(half_by_default):
    "Shares of positions and of mixed labels are not rounded to it"
    A, mask = torch.rand(3, 7, 2, dtype=torch.float32), torch.arange(7) < torch.tensor([3, 6, 5])[:, None]
    expected = torch.stack([a[k].mean(0) for a, k in zip(A, mask)])
    torch.testing.assert_close(pool(A, channel_dim=-1, mask=mask), expected, rtol=1e-6, atol=0)
    y = torch.tensor([0, 1, 2])
    mass = label_histogram(MixedTargets(y, torch.zeros_like(y), 0.3))
    torch.testing.assert_close(mass, torch.tensor([0.8, 0.1, 0.1], dtype=torch.float32), rtol=1e-6, atol=0)


def test_mixed_labels_in_double_precision():
    "A share that is a number of Python's has its precision"
    A, y = torch.rand(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    dense = 0.3 * torch.eye(3, dtype=torch.float64)[y] + 0.7 * torch.eye(3, dtype=torch.float64)[y.flip(0)]
    got, expected = GiniKLLoss().terms(A, MixedTargets(y, y.flip(0), 0.3)), GiniKLLoss().terms(A, dense)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)


# ---- Large features ----


@pytest.mark.parametrize('m, c, n', [(256, 512, 10**6), (256, 512, 10), (100, 700, 10**6), (300, 2000, 150)])
def test_features_in_blocks_keep_their_precision(m, c, n):
    "Value and gradient for large float32 features are within 1e-5 of float64"
    torch.manual_seed(0)
    A, y = torch.randn(m, c), torch.randint(0, n, (m,))
    x, z = A.clone().requires_grad_(), A.double().requires_grad_()
    for got, expected in zip(GiniKLLoss().terms(x, y), GiniKLLoss().terms(z, y)):
        g, e = (
            torch.autograd.grad(got, x, retain_graph=True)[0].double(),
            torch.autograd.grad(expected, z, retain_graph=True)[0],
        )
        assert abs(got.item() - expected.item()) <= 1e-5 * abs(expected.item()) and (g - e).norm() <= 1e-5 * e.norm()


@pytest.mark.parametrize('rectify', ['abs', 'none'])
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_without_the_check_what_is_not_finite_reaches_the_terms(rectify, bad):
    "Without the check, the terms are not finite either: the callback checks the terms instead"
    A = torch.rand(6, 4)
    A[2, 1] = bad
    loss = GiniKLLoss(rectify=rectify)
    loss.check_finite = False
    assert not any(t.isfinite() for t in loss.terms(A, torch.tensor([0, 1, 2, 0, 1, 2])))


# ---- Nearly flat channels ----

FLAT = {
    '10 + noise, two classes': lambda: (10 + torch.randn(8192, 64), 2),
    'a sigmoid that hardly moves': lambda: (torch.sigmoid(0.01 * torch.randn(512, 64)), 2),
    'one in a million': lambda: (1 + 1e-6 * torch.randn(512, 64), 2),
}


@pytest.mark.parametrize('name', FLAT)
@pytest.mark.parametrize('reverse', [False, True])
def test_features_that_are_nearly_flat(name, reverse):
    "Class means are in double precision, so float32 features are within 1e-5 however weak the preferences are"
    A, n = FLAT[name]()
    y = torch.arange(len(A)) % n
    got, expected = (
        terms_and_gradients(A, y, reverse_kl=reverse),
        terms_and_gradients(A.double(), y, reverse_kl=reverse),
    )
    assert [relative(g, e) for g, e in zip(got, expected) if relative(g, e) > 1e-5] == []


@pytest.mark.parametrize('offset, side', [(1, 7), (10, 4), (10, 14), (100, 4)])
def test_maps_that_are_nearly_flat(offset, side):
    """The mean over the positions of a map is rounded to float32: the relative error of the gradient is about 5e-9
    divided by the preference of the channels, so it is below 1e-5 for preferences above .05 %"""
    A, y = offset + torch.randn(256, 32, side, side), torch.arange(256) % 2
    P = class_probs(class_means(pool(A.double()), y))
    preference = (2 * P - 1).abs().square().mean().sqrt().item()
    got, expected = terms_and_gradients(A, y), terms_and_gradients(A.double(), y)
    assert max(relative(got[i], expected[i]) for i in (2, 3)) < max(3e-8 / preference, 1e-6)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_the_histogram_of_soft_targets_is_as_precise_as_they_are(dtype):
    y = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = label_histogram(y)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found, (y.double().sum(0) / y.double().sum()).to(found.dtype))
