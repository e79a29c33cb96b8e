"""The loss against an independent oracle: values, derivatives, analytic cases, invariances, degenerate batches, mixed
labels, priors and masks."""

import math
from collections import Counter

import pytest
import torch
from oracle import as_lists, from_positions, one_hot_rows, oracle, random_case, terms_and_gradients

from gini_loss.losses import (
    GiniKLLoss,
    class_means,
    class_probs,
    diagnostics,
    feature_histogram,
    gini_impurity,
    gini_loss,
    kl_loss,
    label_histogram,
    pool,
    pull,
)
from gini_loss.running import RunningGiniKLLoss
from gini_loss.targets import MixedTargets, label_matrix


@pytest.mark.parametrize('chunk', range(6))
def test_agrees_with_the_oracle(chunk):
    "Values and gradients for 240 random shapes, layouts, targets and settings"
    for seed in range(40 * chunk, 40 * chunk + 40):
        A, y, Y, kwargs, reverse = random_case(seed)
        o = oracle(as_lists(A, kwargs['channel_dim']), Y, kwargs['rectify'], reverse)
        gini, kl, d_gini, d_kl = terms_and_gradients(A, y, reverse_kl=reverse, **kwargs)
        assert gini.dtype == kl.dtype == torch.float64 and gini.ndim == kl.ndim == 0
        assert abs(gini.item() - o['gini']) < 1e-10 and abs(kl.item() - o['kl']) < 1e-10, (
            seed,
            gini,
            o['gini'],
            kl,
            o['kl'],
        )
        for got, expected in ((d_gini, o['d_gini']), (d_kl, o['d_kl'])):
            torch.testing.assert_close(
                got,
                from_positions(expected, A, kwargs['channel_dim']),
                rtol=0,
                atol=1e-10,
                msg=lambda s: f"seed {seed}: {s}",
            )
        torch.testing.assert_close(gini_loss(A, y, **kwargs), gini, rtol=0, atol=1e-12)
        torch.testing.assert_close(kl_loss(A, y, reverse, **kwargs), kl, rtol=0, atol=1e-12)
        weighted = GiniKLLoss(0.3, 1.7, reverse_kl=reverse, **kwargs)(A, y)
        torch.testing.assert_close(weighted, 0.3 * gini + 1.7 * kl, rtol=0, atol=1e-12)


@pytest.mark.parametrize('seed', range(20))
def test_each_step_agrees_with_the_oracle(seed):
    "The public functions for the steps of the derivation return matrices with all columns"
    A, y, _, kwargs, _ = random_case(1000 + seed)
    if y.ndim == 1:
        y = torch.where(y == kwargs['ignore_index'], y, y % 10)
        n = 12
        Y = one_hot_rows(y, n, kwargs['ignore_index'])
    else:
        n, Y = y.shape[1], y.tolist()
    o = oracle(as_lists(A, kwargs['channel_dim']), Y, kwargs['rectify'])

    def close(got, expected):
        torch.testing.assert_close(
            got, torch.tensor(expected, dtype=torch.float64).reshape(got.shape), rtol=0, atol=1e-12
        )

    M = pool(A, kwargs['rectify'], kwargs['channel_dim'])
    close(M, o['M'])
    S = class_means(M, y, n, kwargs['ignore_index'])
    close(S, o['S'])
    P = class_probs(S)
    close(P, o['P'])
    close(gini_impurity(P)[o['live']], [o['impurity'][i] for i in o['live']])
    close(feature_histogram(P), o['hS'])
    torch.testing.assert_close(
        label_histogram(y, n, kwargs['ignore_index']).double(),
        torch.tensor(o['hY'], dtype=torch.float64),
        rtol=0,
        atol=1e-7,
    )
    d = diagnostics(A, y, **{**kwargs, 'n_classes': n})
    close(d.probs, o['P'])
    close(d.feature_histogram, o['hS'])
    assert d.gini == pytest.approx(o['gini'], abs=1e-10)
    assert d.kl == pytest.approx(oracle(as_lists(A, kwargs['channel_dim']), Y, kwargs['rectify'])['kl'], abs=1e-10)
    assert d.dead.tolist() == [i not in o['live'] for i in range(len(o['T']))] and not d.probs.requires_grad


# ---- Derivatives ----


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('rectify', ['abs', 'relu', 'none'])
@pytest.mark.parametrize('soft', [False, True])
def test_gradcheck(reverse, rectify, soft):
    "First and second derivatives agree with finite differences, away from activations of zero"
    torch.manual_seed(0)
    A = 0.2 + torch.rand(5, 3, 2, dtype=torch.float64)
    if rectify != 'none':
        A = A * torch.where(torch.rand_like(A) < 0.3, -1, 1)
    y = torch.rand(5, 3, dtype=torch.float64) if soft else torch.tensor([0, 2, 2, 0, 7])
    loss = GiniKLLoss(1, 0.7, rectify=rectify, reverse_kl=reverse)
    A.requires_grad_()
    assert torch.autograd.gradcheck(lambda A: loss.terms(A, y), A)
    assert torch.autograd.gradgradcheck(lambda A: loss(A, y), A)


def test_soft_targets_have_a_gradient_too():
    "Learned targets, such as those of a teacher, get the gradient of Eqs. 4 and 7"
    torch.manual_seed(0)
    A, y = torch.rand(5, 3, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64).requires_grad_()
    for reverse in (False, True):
        assert torch.autograd.gradcheck(lambda y: GiniKLLoss(reverse_kl=reverse).terms(A, y), y)


# ---- Analytic cases ----


@pytest.mark.parametrize('n', [1, 2, 5, 30])
def test_channels_that_fire_for_one_class_are_pure(n):
    y = torch.arange(2 * n) % n
    A = torch.eye(n, dtype=torch.float64)[y] * torch.rand(2 * n, n, dtype=torch.float64).add(0.1)
    gini, kl, d_gini, d_kl = terms_and_gradients(A, y)
    assert gini.item() == 0 and abs(kl.item()) < 1e-15 and d_gini.abs().max() < 1e-15 and d_kl.abs().max() < 1e-13


@pytest.mark.parametrize('n', [1, 2, 3, 10, 100])
def test_channels_that_fire_for_all_alike_are_at_the_bound(n):
    y = torch.arange(3 * n) % n
    gini, kl, d_gini, d_kl = terms_and_gradients(torch.full((3 * n, 4), 0.7, dtype=torch.float64), y)
    assert (
        gini.item() == pytest.approx(1 - 1 / n, abs=1e-14)
        and abs(kl.item()) < 1e-14
        and d_gini.abs().max() < 1e-13
        and d_kl.abs().max() < 1e-13
    )


@pytest.mark.parametrize('reverse', [False, True])
def test_kl_is_zero_for_equal_histograms_only(reverse):
    y, pure = torch.tensor([0, 0, 0, 1]), torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]], dtype=torch.float64)

    def kl(three_to_one):
        return kl_loss(pure[:, [0] * three_to_one[0] + [1] * three_to_one[1]], y, reverse).item()

    assert kl((3, 1)) == kl((6, 2)) == 0
    assert all(kl(k) > 1e-3 for k in [(1, 1), (1, 3), (2, 1), (4, 1), (7, 2), (1, 0), (0, 1)])


@pytest.mark.parametrize('reverse', [False, True])
def test_bounds(reverse):
    "0 <= Gini <= 1-1/n and 0 <= KL <= its bound for n classes in the batch; KL reaches both bounds"
    for seed in range(50):
        torch.manual_seed(seed)
        n = 2 + seed % 7
        A, y = torch.rand(20, 6).pow(8).double(), torch.cat([torch.arange(n), torch.randint(0, n, (20 - n,))])
        gini, kl = GiniKLLoss(reverse_kl=reverse).terms(A, y)
        most = math.log(1e10) if reverse else -label_histogram(y).min().log().item()
        assert 0 <= gini <= 1 - 1 / n + 1e-15 and -1e-15 <= kl <= most + 1e-9
    y = torch.tensor([0, 0, 0, 1])
    A = (y == 1).double()[:, None].expand(4, 5)  # all channels on the rarest class
    expected = 0.75 * math.log(0.75e10) + 0.25 * math.log(0.25) if reverse else math.log(4)
    assert kl_loss(A, y, reverse).item() == pytest.approx(expected, abs=1e-9)


# ---- Invariances ----


def test_order_of_images_channels_positions_and_classes_does_not_matter():
    torch.manual_seed(0)
    A, y = torch.randn(30, 8, 3, 3, dtype=torch.float64), torch.randint(0, 6, (30,))
    images, channels, positions, classes = torch.randperm(30), torch.randperm(8), torch.randperm(9), torch.randperm(6)
    for reverse in (False, True):
        base = terms_and_gradients(A, y, reverse_kl=reverse)
        moved = terms_and_gradients(A.flatten(2)[images][:, channels][:, :, positions], y[images], reverse_kl=reverse)
        for got, expected in zip(moved[:2], base[:2]):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
        for got, expected in zip(moved[2:], base[2:]):
            torch.testing.assert_close(
                got, expected.flatten(2)[images][:, channels][:, :, positions], rtol=0, atol=1e-14
            )
        for new in (classes[y], classes[y] * 1000, y + 5, y + 2**40):
            for got, expected in zip(terms_and_gradients(A, new, reverse_kl=reverse), base):
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
        soft = torch.rand(30, 6, dtype=torch.float64)
        for got, expected in zip(
            terms_and_gradients(A, soft[:, classes], reverse_kl=reverse),
            terms_and_gradients(A, soft, reverse_kl=reverse),
        ):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_scale_of_a_channel_does_not_matter(dtype):
    "The scale of a channel does not change the value and divides the gradient, exactly for powers of two"
    torch.manual_seed(0)
    A, y = torch.randn(30, 8, dtype=dtype), torch.randint(0, 6, (30,))
    scale = 2.0 ** torch.arange(-40, 40, 10).to(dtype)
    for reverse in (False, True):
        base, scaled = (terms_and_gradients(x, y, reverse_kl=reverse) for x in (A, A * scale))
        assert torch.equal(scaled[0], base[0]) and torch.equal(scaled[1], base[1])
        assert torch.equal(scaled[2] * scale, base[2]) and torch.equal(scaled[3] * scale, base[3])


def test_scale_of_soft_targets_does_not_matter():
    torch.manual_seed(0)
    A, y = torch.rand(9, 4), torch.rand(9, 3)
    base = terms_and_gradients(A, y)
    assert torch.equal(label_histogram(torch.full((2, 4), 1e-42)), torch.full((4,), 0.25))
    for k in (-140, -120, -40, 40, 100):
        for got, expected in zip(terms_and_gradients(A, y * 2.0**k), base):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7 if k > -126 else 1e-3)


def test_repeating_the_batch_changes_nothing():
    torch.manual_seed(0)
    A, y = torch.rand(10, 4, dtype=torch.float64), torch.randint(0, 5, (10,))
    for got, expected in zip(GiniKLLoss().terms(A.repeat(3, 1), y.repeat(3)), GiniKLLoss().terms(A, y)):
        assert abs(got - expected) < 1e-14


# ---- Hard labels and their one-hot rows ----


@pytest.mark.parametrize('m,c,n', [(16, 5, 3), (64, 33, 10), (100, 64, 100), (7, 3, 7), (128, 512, 17)])
@pytest.mark.parametrize('reverse', [False, True])
def test_one_hot_rows_equal_labels_exactly(m, c, n, reverse):
    """Values and gradients are bit for bit the same if both make the same matrix Y: n <= m, with n_classes given or the
    largest label present"""
    torch.manual_seed(0)
    A, y = torch.randn(m, c, 3), torch.cat([torch.arange(n), torch.randint(0, n, (m - n,))])
    one_hot = torch.nn.functional.one_hot(y, n).float()
    for n_classes in (None, n):
        for got, expected in zip(
            terms_and_gradients(A, one_hot, n_classes=n_classes, reverse_kl=reverse),
            terms_and_gradients(A, y, n_classes=n_classes, reverse_kl=reverse),
        ):
            assert torch.equal(got, expected)
    for kept in (one_hot.half(), one_hot.bfloat16(), one_hot.double()):  # 0 and 1 are exact in any of them
        assert torch.equal(gini_loss(A, kept), gini_loss(A, y)) and torch.equal(
            kl_loss(A, kept, reverse), kl_loss(A, y, reverse)
        )
    y[::3] = -100
    left_out = one_hot * (y != -100).float()[:, None]  # a row of zeros is left out as well
    for got, expected in zip(
        terms_and_gradients(A, left_out, reverse_kl=reverse), terms_and_gradients(A, y, n_classes=n, reverse_kl=reverse)
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize('n', [200, 10**4])
def test_one_hot_rows_equal_labels_with_more_classes_than_images(n):
    """The labels are renumbered into fewer columns, so sums over columns are rounded in another order: equal up to a
    few units in the last place"""
    torch.manual_seed(0)
    A, y = torch.randn(64, 20, 3), torch.randint(0, n, (64,))
    one_hot = torch.nn.functional.one_hot(y, n).float()
    for reverse in (False, True):
        for got, expected in zip(
            terms_and_gradients(A, one_hot, reverse_kl=reverse),
            terms_and_gradients(A, y, n_classes=n, reverse_kl=reverse),
        ):
            torch.testing.assert_close(
                got, expected, rtol=0, atol=4 * torch.finfo(torch.float32).eps * expected.abs().max().item()
            )


@pytest.mark.parametrize('n_classes', [None, 10**6])
def test_a_million_classes_equal_their_compact_numbering(n_classes):
    torch.manual_seed(0)
    A, y = torch.randn(50, 16, dtype=torch.float64), torch.randint(0, 10**6, (50,))
    y[:20] = y[20:40]
    y[-1] = -100
    compact = torch.unique(y, return_inverse=True)[1]
    for reverse in (False, True):
        for got, expected in zip(
            terms_and_gradients(A, y, n_classes=n_classes, reverse_kl=reverse),
            terms_and_gradients(A, compact, ignore_index=0, reverse_kl=reverse),
        ):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


def test_a_million_classes_need_no_million_columns():
    Y = label_matrix(torch.randint(0, 10**6, (64,)), n_classes=10**6, renumber=True)
    assert Y.n == 64 and Y.mass.sum() == 64


@pytest.mark.parametrize('ignore_index', [-100, -1, 0, 3, 255])
def test_ignored_images_take_no_part(ignore_index):
    torch.manual_seed(0)
    A, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(0, 5, (40,))
    y[::4] = ignore_index
    kept = y != ignore_index
    for n_classes in (None, 5):
        got, expected = (
            terms_and_gradients(A, y, ignore_index=ignore_index, n_classes=n_classes),
            terms_and_gradients(A[kept], y[kept], n_classes=n_classes),
        )
        for g, e in zip(got[:2], expected[:2]):
            torch.testing.assert_close(g, e, rtol=0, atol=1e-14)
        for g, e in zip(got[2:], expected[2:]):
            torch.testing.assert_close(g[kept], e, rtol=0, atol=1e-14)
            assert (g[~kept] == 0).all()
    assert class_means(A, y, ignore_index=ignore_index).shape == (
        6,
        int(y[kept].max()) + 1,
    )  # an ignored label is not counted
    assert label_histogram(y, ignore_index=ignore_index).shape == (int(y[kept].max()) + 1,)


# ---- Degenerate batches ----


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    'case', ['absent', 'one class', 'one image', 'some dead', 'all dead', 'class without a channel', 'one pixel']
)
def test_degenerate_batches_are_finite(case, dtype, reverse):
    torch.manual_seed(0)
    A, y = torch.randn(6, 4, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    if case == 'absent':
        y = torch.tensor([0, 90, 90, 0, 41, 0])
    if case == 'one class':
        y = torch.full((6,), 3)
    if case == 'one image':
        A, y = A[:1], y[1:2]
    if case == 'some dead':
        A[:, 1::2] = 0
    if case == 'all dead':
        A = torch.zeros_like(A)
    if case == 'class without a channel':
        A[y == 1] = 0
    if case == 'one pixel':
        A = torch.zeros_like(A)
        A[2, 3, 0, 1] = 0.5
    gini, kl, d_gini, d_kl = terms_and_gradients(A.to(dtype), y, reverse_kl=reverse, n_classes=100)
    assert all(t.isfinite().all() for t in (gini, kl, d_gini, d_kl))
    if case in ('one class', 'one image', 'all dead'):
        assert gini == kl == 0
    dead = (A == 0).all(0).flatten(1).all(1)
    assert (d_gini[:, dead] == 0).all() and (d_kl[:, dead] == 0).all()
    if case == 'some dead':  # the same as without these channels
        for got, expected in zip((gini, kl), GiniKLLoss(reverse_kl=reverse).terms(A[:, ::2].to(dtype), y)):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    'make',
    [
        lambda: (torch.rand(0, 3, 2, 2), torch.zeros(0).long()),
        lambda: (torch.rand(0, 3), torch.zeros(0, 5)),
        lambda: (torch.rand(4, 3), torch.full((4,), -100)),
        lambda: (torch.rand(4, 3), torch.zeros(4, 5)),
    ],
    ids=['empty', 'empty soft', 'all ignored', 'rows of zeros'],
)
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('n_classes', [None, 5])
def test_nothing_to_average_gives_zero_with_a_graph(make, reverse, n_classes):
    A, y = make()
    A.requires_grad_()
    for loss in (
        gini_loss(A, y, n_classes=n_classes),
        kl_loss(A, y, reverse, n_classes=n_classes),
        GiniKLLoss(n_classes=n_classes, reverse_kl=reverse)(A, y),
    ):
        assert loss.item() == 0 and loss.requires_grad
        A.grad = None
        loss.backward()
        assert A.grad.shape == A.shape and (A.grad == 0).all()


# ---- Mixed labels ----


def mixed_case(seed, m, c, n, ignored=False):
    "A batch with two labels for each image, and the equivalent matrix of all classes"
    torch.manual_seed(seed)
    A, y, other, lam = (
        torch.randn(m, c, 2, dtype=torch.float64),
        torch.randint(0, n, (m,)),
        torch.randint(0, n, (m,)),
        torch.rand(m, dtype=torch.float64),
    )
    other[: m // 4] = y[: m // 4]
    lam[m // 2 : m // 2 + 3] = torch.tensor([0.0, 1, 0.5])[: max(0, m - m // 2)]
    if ignored:
        y, other = (torch.where(torch.rand(m) < 0.3, -100, t) for t in (y, other))
    dense = torch.zeros(m, n, dtype=torch.float64)
    for k in range(m):
        for label, share in ((int(y[k]), lam[k]), (int(other[k]), 1 - lam[k])):
            if label >= 0:
                dense[k, label] += share
    return A, MixedTargets(y, other, lam), dense


@pytest.mark.parametrize(
    'm, c, n',
    [(20, 6, 3), (20, 6, 39), (20, 6, 41), (20, 6, 5000), (80, 5, 100), (80, 5, 129), (80, 5, 5000), (1, 3, 50)],
)
@pytest.mark.parametrize('ignored', [False, True])
@pytest.mark.parametrize('give_n', [False, True])
@pytest.mark.parametrize('reverse', [False, True])
def test_mixed_labels_equal_the_matrix_of_all_classes(m, c, n, ignored, give_n, reverse):
    """Terms, gradients and the second derivative agree to 1e-12, with products and with sums of rows, for fewer and for
    more than two classes per image"""
    A, mixed, dense = mixed_case(m + n, m, c, n, ignored)
    x, loss = A.requires_grad_(), GiniKLLoss(reverse_kl=reverse, n_classes=n if give_n else None)
    Y = label_matrix(mixed, n_classes=n if give_n else None, renumber=True)
    assert Y.n == len(Y.mass) <= max(2 * m, n if n <= 2 * m else 0)
    for got, expected in zip(loss.terms(x, mixed), loss.terms(x, dense)):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        g, e = (torch.autograd.grad(t, x, create_graph=True)[0] for t in (got, expected))
        torch.testing.assert_close(g, e, rtol=0, atol=1e-12)
        g2, e2 = (torch.autograd.grad(t.square().sum(), x, retain_graph=True)[0] for t in (g, e))
        torch.testing.assert_close(g2, e2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('n_classes', [None, 7, 10**6])
@pytest.mark.parametrize('m', [16, 80])
def test_mixed_labels_compiled(n_classes, m):
    "A compiled loss is one graph, as for hard labels"
    A, mixed, dense = mixed_case(0, m, 5, 7)
    A, y, other, lam = A.float(), mixed.labels, mixed.others, mixed.lam.float()
    loss = GiniKLLoss(n_classes=n_classes)
    compiled = torch.compile(
        lambda A, y, other, lam: loss(A, MixedTargets(y, other, lam)), fullgraph=True, backend='aot_eager'
    )
    x, z = A.clone().requires_grad_(), A.double().requires_grad_()
    got, expected = compiled(x, y, other, lam), GiniKLLoss()(z, dense)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(got, x)[0].double(), torch.autograd.grad(expected, z)[0], rtol=1e-4, atol=1e-7
    )


# ---- A prior instead of the labels of the batch ----


def kl_with_prior(A, Y, prior, reverse):
    "Eq. 5 from nested lists, where H^Y is the prior of the classes in the batch"
    o = oracle(as_lists(A), Y)
    present = [sum(row[j] for row in Y) > 0 for j in range(len(prior))]
    kept = [p if there else 0.0 for p, there in zip(prior, present)]
    hY = [p / sum(kept) for p in kept]
    if reverse:
        return sum(b * math.log(b / max(a, 1e-10)) for a, b in zip(o['hS'], hY) if b > 0)
    return sum(a * math.log(a / b) for a, b in zip(o['hS'], hY) if a > 0)


PRIOR = [0.3, 0.1, 0.25, 0.05, 0.2, 0.1]


def prior_case(kind, m=14, n=6):
    "Targets with some of six classes, and their matrix as lists"
    g = torch.Generator().manual_seed(3)
    y = torch.randint(0, 4, (m,), generator=g)  # classes 4 and 5 are absent
    if kind == 'ignored':
        y[::4] = -100
    if kind in ('labels', 'ignored'):
        return y, one_hot_rows(y, n)
    if kind == 'mixed':
        other, lam = torch.randint(0, 5, (m,), generator=g), torch.rand(m, generator=g, dtype=torch.float64)
        Y = [
            [lam[k].item() * (y[k].item() == j) + (1 - lam[k].item()) * (other[k].item() == j) for j in range(n)]
            for k in range(m)
        ]
        return MixedTargets(y, other, lam), Y
    soft = torch.rand(m, n, generator=g, dtype=torch.float64).softmax(1)
    soft[:, 2] = 0
    return soft, soft.tolist()


@pytest.mark.parametrize('kind', ['labels', 'ignored', 'mixed', 'soft'])
@pytest.mark.parametrize('reverse', [False, True])
def test_a_prior_stands_for_the_labels(kind, reverse):
    "A prior of shares or counts is restricted to the classes of the batch and scaled; the Gini term does not change"
    A, (y, Y) = torch.randn(14, 5, dtype=torch.float64), prior_case(kind)
    expected = kl_with_prior(A, Y, PRIOR, reverse)
    for prior in (PRIOR, torch.tensor(PRIOR) * 640, [round(1000 * p) for p in PRIOR]):
        loss = GiniKLLoss(reverse_kl=reverse, class_prior=prior)
        gini, kl = loss.terms(A, y)
        assert (
            loss.n_classes == 6
            and kl.item() == pytest.approx(expected, abs=1e-7)
            and gini == GiniKLLoss().terms(A, y)[0]
        )
        assert kl_loss(A, y, reverse, class_prior=prior).item() == pytest.approx(expected, abs=1e-7)
        assert RunningGiniKLLoss(reverse_kl=reverse, class_prior=prior, n_batches=1).terms(A, y)[
            1
        ].item() == pytest.approx(expected, abs=1e-7)
    assert torch.autograd.gradcheck(
        lambda A: GiniKLLoss(reverse_kl=reverse, class_prior=PRIOR).terms(A, y)[1], A.requires_grad_()
    )


@pytest.mark.parametrize('n_classes', [None, 4])
def test_a_prior_by_class(n_classes):
    "A dict, a Counter and pandas' value_counts are read by class, not in the order that they have"
    pd, labels = pytest.importorskip('pandas'), [2, 2, 2, 0, 0, 1]
    A, y = torch.rand(6, 4), torch.tensor(labels)
    expected = GiniKLLoss(class_prior=[2, 1, 3])(A, y)
    for counts in (Counter(labels), {2: 0.5, 0: 1 / 3, 1: 1 / 6}, pd.Series(labels).value_counts()):
        loss = GiniKLLoss(class_prior=counts, n_classes=n_classes)
        torch.testing.assert_close(loss(A, y), expected)
        assert loss.n_classes == (n_classes or 3)
    torch.testing.assert_close(kl_loss(A, y, class_prior=Counter(labels)), kl_loss(A, y, class_prior=[2, 1, 3]))


def test_a_prior_with_renumbered_classes():
    "With more classes than images, the prior of each column is that of its class"
    prior, y = torch.rand(10**5) + 0.1, torch.tensor([7, 99_999, 7, -100, 50_000, 12])
    A, few = torch.rand(6, 4, dtype=torch.float64), [7, 12, 50_000, 99_999]
    compact = torch.tensor([0, 3, 0, -100, 2, 1])
    got, expected = GiniKLLoss(class_prior=prior).terms(A, y), GiniKLLoss(class_prior=prior[few]).terms(A, compact)
    for g, e in zip(got, expected):
        assert g.item() == pytest.approx(e.item(), abs=1e-12)


def test_a_prior_equal_to_the_labels_changes_nothing():
    A, y = torch.randn(12, 5, 3, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 4] * 2)
    for got, expected in zip(terms_and_gradients(A, y, class_prior=[6, 4, 0, 0, 2]), terms_and_gradients(A, y)):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
    assert label_histogram(torch.tensor([0, 1, 1]), 3, class_prior=[1, 1, 8]).tolist() == [0.5, 0.5, 0]


def test_nothing_to_average_with_a_prior():
    A = torch.rand(3, 4, requires_grad=True)
    loss = GiniKLLoss(class_prior=[0.5, 0.5])(A, torch.full((3,), -100))
    loss.backward()
    assert loss == 0 and (A.grad == 0).all()


# ---- The pull of each term ----


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_pull_is_the_norm_of_each_gradient(dtype):
    "Norms for the unweighted terms and for the main loss, whose graph is kept"
    x, W = torch.randn(20, 6, 2, 2, dtype=torch.float64).to(dtype), torch.randn(6, 4, dtype=torch.float64).to(dtype)
    A, y = (x * 2).requires_grad_(), torch.randint(0, 4, (20,))
    main = torch.nn.functional.cross_entropy(A.relu().mean((2, 3)) @ W, y)
    p = pull(A, y, main, lambda_gini=7.0, reverse_kl=True, class_prior=[1, 2, 3, 4])
    expected = torch.autograd.grad(main, A)[0].double().norm().item()
    gini, kl = (
        g.norm().item() for g in terms_and_gradients(A.double(), y, reverse_kl=True, class_prior=[1, 2, 3, 4])[2:]
    )
    assert p._fields == ('main', 'gini', 'kl') and p == pytest.approx((expected, gini, kl), rel=1e-12)


@pytest.mark.parametrize('size', [1e-6, 1.0, 1e4])
def test_pull_of_a_main_loss_in_half_precision(size):
    "Gradients that float16 cannot hold unscaled are not lost, and large ones do not overflow"
    W = torch.randn(6, 4)
    A, y = torch.randn(64, 6, 8, 8).half().requires_grad_(), torch.randint(0, 4, (64,))

    def main(A):
        return size * torch.nn.functional.cross_entropy(A.float().mean((2, 3)) @ W, y)

    B = A.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(main(B), B)
    assert pull(A, y, main(A)).main == pytest.approx(expected.norm().item(), rel=1e-3)


def test_pull_where_gradients_are_off():
    "As in code that logs: the graph of the main loss is there, and that of the terms is made"
    A, y = torch.rand(6, 4, requires_grad=True), torch.arange(6) % 3
    main = A.square().sum()
    expected = pull(A, y, main)
    with torch.no_grad():
        assert pull(A, y, main) == expected and not torch.is_grad_enabled()


# ---- Masked positions ----


@pytest.mark.parametrize('rectify', ['abs', 'relu', 'none'])
@pytest.mark.parametrize('kind', ['bool', 'integer'])
def test_masked_positions_take_no_part(rectify, kind):
    "Masked positions, NaN included, do not count in the means and get no gradient"
    A = torch.rand(5, 7, 3, dtype=torch.float64) if rectify == 'none' else torch.randn(5, 7, 3, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([3, 7, 1, 5, 2])[:, None]
    padded = torch.where(mask[..., None], A, math.nan).requires_grad_()
    f = {'abs': torch.abs, 'relu': torch.relu, 'none': lambda a: a}[rectify]
    M = torch.stack([f(a[k]).mean(0) for a, k in zip(A, mask)])
    given, y = mask if kind == 'bool' else mask.long(), torch.tensor([0, 1, 1, 2, 0])
    torch.testing.assert_close(pool(padded, rectify, -1, given), M)
    loss = GiniKLLoss(rectify=rectify, channel_dim=-1)
    for got, expected in zip(loss.terms(padded, y, mask=given), GiniKLLoss(rectify='none').terms(M, y)):
        torch.testing.assert_close(got, expected)
    (grad,) = torch.autograd.grad(loss(padded, y, given), padded)
    assert (grad[~mask] == 0).all() and grad.isfinite().all() and (grad[mask] != 0).any()


def test_padding_does_not_matter():
    "The same for maps with the channels first, and for averages over several batches"
    A, y = torch.randn(6, 4, 3, 2), torch.tensor([0, 1, 2] * 2)
    padded = torch.nn.functional.pad(A, (0, 3, 0, 5), value=9.0)
    mask = torch.zeros(6, 8, 5, dtype=torch.bool)
    mask[:, :3, :2] = True
    for make in (GiniKLLoss, lambda: RunningGiniKLLoss(n_classes=3)):
        for got, expected in zip(make().terms(padded, y, mask), make().terms(A, y)):
            torch.testing.assert_close(got, expected)
    assert GiniKLLoss()(padded[:0], y[:0], mask[:0]) == 0  # a process without images
