"""The loss against an independent oracle, its derivatives, analytic cases, invariances, precision, layouts, bad input, and a fuzz.

`GINI_LOSS_FUZZ=10000 pytest tests/test_losses.py -k fuzz` draws that many fresh examples; without it the fuzz draws 300, the same each time.
"""
import copy, math, os, pickle, random, warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from gini_loss import losses, targets
from gini_loss.targets import MixedTargets, label_matrix
from gini_loss.losses import (GiniKLLoss, class_means, class_probs, diagnostics, feature_histogram, gini_impurity, gini_loss, kl_loss,
    label_histogram, pool)

FUZZ = int(os.environ.get('GINI_LOSS_FUZZ', 0))
DEAD = losses.DEAD

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

# ---- The oracle: the paper's equations index by index in Python floats; the derivatives in closed form ----

def oracle(A, Y, rectify='abs', reverse=False, dead=0.):
    """Values and gradients from nested lists: A (m, c, positions), Y (m, n). Channels whose class means add up to no more than `dead` are left out.

    A class that no channel fires for has an infinite slope under Eq. 5, where zero is the convention; reversed, H^S is floored at 1e-10."""
    m, c, n = len(Y), len(A[0]) if A else 0, len(Y[0]) if Y else 0
    f = {'abs': abs, 'relu': lambda a: max(a, 0.), 'none': lambda a: a}[rectify]
    slope = {'abs': lambda a: (a > 0) - (a < 0), 'relu': lambda a: float(a > 0), 'none': lambda a: 1.}[rectify]
    M = [[sum(f(a) / len(A[k][i]) for a in A[k][i]) for i in range(c)] for k in range(m)]
    mass = [math.fsum(Y[k][j] for k in range(m)) for j in range(n)]
    Y_bar = [[Y[k][j] / mass[j] if mass[j] > 0 else 0. for j in range(n)] for k in range(m)]                        # Eq. 4
    S = [[sum(M[k][i] * Y_bar[k][j] for k in range(m)) for j in range(n)] for i in range(c)]                        # Eq. 3
    T = [sum(row) for row in S]
    live = [i for i in range(c) if T[i] > dead]
    P = [[s / T[i] if i in live else 0. for s in S[i]] for i in range(c)]                                          # Eq. 2
    square = [sum(p*p for p in row) for row in P]
    impurity = [math.fsum(P[i][j] * (1 - P[i][j]) for j in range(n)) for i in range(c)]
    gini = sum(impurity[i] for i in live) / max(len(live), 1)                                                      # Eq. 1
    hS = [sum(P[i][j] for i in live) / max(len(live), 1) for j in range(n)]                                        # Eq. 6
    hY = [x / sum(mass) if sum(mass) > 0 else 0. for x in mass]                                                    # Eq. 7
    if not live: kl, g = 0., [0.]*n                                                                                # Eq. 5 and its slope in hS
    elif reverse:
        kl = sum(b * math.log(b / max(a, 1e-10)) for a, b in zip(hS, hY) if b > 0)
        g = [-b/a if a > 1e-10 else 0. for a, b in zip(hS, hY)]
    else:
        kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(hS, hY) if a > 0)
        g = [math.log(a) - math.log(b) + 1 if a > 0 else 0. for a, b in zip(hS, hY)]
    d_gini, d_kl = ([[[0.]*len(A[k][i]) for i in range(c)] for k in range(m)] for _ in range(2))
    for i in live:
        mean_g = sum(g[j] * P[i][j] for j in range(n))
        for k in range(m):
            by_S = [Y_bar[k][j] / len(A[k][i]) for j in range(n)]
            gini_k = sum(-2 * (P[i][j] - square[i]) * w for j, w in enumerate(by_S)) / len(live) / T[i]
            kl_k = sum((g[j] - mean_g) * w for j, w in enumerate(by_S)) / len(live) / T[i]
            for l, a in enumerate(A[k][i]): d_gini[k][i][l], d_kl[k][i][l] = gini_k * slope(a), kl_k * slope(a)
    faint = [(i, j, M[k][i] * Y_bar[k][j]) for i in live for k in range(m) for j in range(n) if 0 < Y_bar[k][j] < 2e-38]   # float32 loses these
    lost = max((x / T[i] for i, j, x in faint), default=0.)
    rough = any(x > 1e-7 * S[i][j] for i, j, x in faint) or any(0 < S[i][j] < 1e-36 for i in live for j in range(n))
    return dict(lost=lost, rough=rough, gini=gini, kl=kl, d_gini=np.array(d_gini), d_kl=np.array(d_kl), M=M, S=S, P=P, hS=hS, hY=hY, T=T, live=live, g=g, impurity=impurity)

def as_lists(A, channel_dim=1):
    "A tensor of any layout as (m, c, positions) nested lists of Python floats"
    A = A.detach().double().movedim(channel_dim, 1)
    return A.flatten(2).tolist() if A.ndim > 2 else A[..., None].tolist()

def from_positions(G, A, channel_dim=1):
    "The oracle's gradient (m, c, positions) in the layout of A"
    shape = A.movedim(channel_dim, 1).shape
    return torch.tensor(G, dtype=torch.float64).reshape(shape).movedim(1, channel_dim)

def one_hot_rows(y, n, ignore_index=-100): return [[float(label == j and label != ignore_index) for j in range(n)] for label in y.tolist()]

def terms_and_gradients(A, y, **kwargs):
    "Both terms and the gradient of each on A"
    A = A.detach().requires_grad_()
    gini, kl = GiniKLLoss(**kwargs).terms(A, y)
    return gini.detach(), kl.detach(), *(torch.autograd.grad(t, A, retain_graph=True)[0] for t in (gini, kl))

LAYOUTS = [('mc', 1), ('mcl', 1), ('mchw', 1), ('mchw', -3), ('mtc', -1), ('mtc', 2), ('mhwc', 3), ('mcdhw', 1)]

def random_case(seed):
    "A float64 batch with its targets, as keyword arguments of the loss and as the oracle's lists"
    r = random.Random(seed); torch.manual_seed(seed)
    m, c, n = r.randint(1, 12), r.randint(1, 7), r.randint(1, 9)
    layout, channel_dim = r.choice(LAYOUTS)
    A = torch.randn([{'m': m, 'c': c}[d] if d in 'mc' else r.randint(1, 3) for d in layout], dtype=torch.float64)
    rectify = r.choice(['abs', 'relu', 'none'])
    if rectify == 'none': A = A.abs()
    channels = A.movedim(channel_dim, 1)
    if r.random() < .4: channels[:, r.randrange(c)] = 0                                        # a dead channel
    if r.random() < .3: channels.mul_((torch.rand(m, c) < .5).double().reshape(m, c, *[1]*(A.ndim - 2)))
    ignore_index, n_classes, kind = r.choice([-100, -100, 255, 0]), None, r.choice(['hard', 'hard', 'sparse', 'ignore', 'soft', 'multihot', 'onehot'])
    if kind in ('hard', 'ignore', 'sparse'):
        y = torch.randint(0, n, (m,))
        if kind == 'sparse': y = y * 1000 + 7                                                  # more classes than images
        size = int(y.max()) + 1 + r.randint(0, 2)
        if kind == 'ignore': y[torch.rand(m) < .4] = ignore_index
        if r.random() < .5 and (y[y != ignore_index] < size).all(): n_classes = size
        labels = sorted(set(y.tolist()) - {ignore_index})
        Y = [[float(label == j) for j in labels] for label in y.tolist()]                      # absent classes left out
    else:
        y = {'soft': torch.rand(m, n, dtype=torch.float64).softmax(1), 'multihot': (torch.rand(m, n) < .4).double(),
             'onehot': torch.eye(n, dtype=torch.float64)[torch.randint(0, n, (m,))]}[kind]
        if r.random() < .3: y[:, r.randrange(n)] = 0                                           # an absent class
        if r.random() < .5 or n == 1: n_classes = n                                            # one column has to be meant
        Y = y.tolist()
    kwargs = dict(rectify=rectify, n_classes=n_classes, channel_dim=channel_dim, ignore_index=ignore_index)
    return A, y, Y, kwargs, r.random() < .5

@pytest.mark.parametrize('chunk', range(6))
def test_agrees_with_the_oracle(chunk):
    "Values and gradients on 240 random shapes, layouts, targets and settings"
    for seed in range(40*chunk, 40*chunk + 40):
        A, y, Y, kwargs, reverse = random_case(seed)
        o = oracle(as_lists(A, kwargs['channel_dim']), Y, kwargs['rectify'], reverse)
        gini, kl, d_gini, d_kl = terms_and_gradients(A, y, reverse_kl=reverse, **kwargs)
        assert gini.dtype == kl.dtype == torch.float64 and gini.ndim == kl.ndim == 0
        assert abs(gini.item() - o['gini']) < 1e-10 and abs(kl.item() - o['kl']) < 1e-10, (seed, gini, o['gini'], kl, o['kl'])
        for got, expected in ((d_gini, o['d_gini']), (d_kl, o['d_kl'])):
            torch.testing.assert_close(got, from_positions(expected, A, kwargs['channel_dim']), rtol=0, atol=1e-10, msg=lambda s: f"seed {seed}: {s}")
        torch.testing.assert_close(gini_loss(A, y, **kwargs), gini, rtol=0, atol=1e-12)
        torch.testing.assert_close(kl_loss(A, y, reverse, **kwargs), kl, rtol=0, atol=1e-12)
        weighted = GiniKLLoss(.3, 1.7, reverse_kl=reverse, **kwargs)(A, y)
        torch.testing.assert_close(weighted, .3*gini + 1.7*kl, rtol=0, atol=1e-12)

@pytest.mark.parametrize('seed', range(20))
def test_each_step_agrees_with_the_oracle(seed):
    "The public functions that show a reader the matrices, with all their columns"
    A, y, _, kwargs, _ = random_case(1000 + seed)
    if y.ndim == 1:
        y = torch.where(y == kwargs['ignore_index'], y, y % 10); n = 12; Y = one_hot_rows(y, n, kwargs['ignore_index'])
    else: n, Y = y.shape[1], y.tolist()
    o = oracle(as_lists(A, kwargs['channel_dim']), Y, kwargs['rectify'])
    def close(got, expected): torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64).reshape(got.shape), rtol=0, atol=1e-12)
    M = pool(A, kwargs['rectify'], kwargs['channel_dim']); close(M, o['M'])
    S = class_means(M, y, n, kwargs['ignore_index']); close(S, o['S'])
    P = class_probs(S); close(P, o['P'])
    close(gini_impurity(P)[o['live']], [o['impurity'][i] for i in o['live']])
    close(feature_histogram(P), o['hS'])
    torch.testing.assert_close(label_histogram(y, n, kwargs['ignore_index']).double(), torch.tensor(o['hY'], dtype=torch.float64), rtol=0, atol=1e-7)
    d = diagnostics(A, y, **{**kwargs, 'n_classes': n})
    close(d.probs, o['P']); close(d.feature_histogram, o['hS']); assert d.gini == pytest.approx(o['gini'], abs=1e-10)
    assert d.kl == pytest.approx(oracle(as_lists(A, kwargs['channel_dim']), Y, kwargs['rectify'])['kl'], abs=1e-10)
    assert d.dead.tolist() == [i not in o['live'] for i in range(len(o['T']))] and not d.probs.requires_grad

# ---- Derivatives ----

@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('rectify', ['abs', 'relu', 'none'])
@pytest.mark.parametrize('soft', [False, True])
def test_gradcheck(reverse, rectify, soft):
    "First and second derivatives against finite differences, away from the kink at zero"
    torch.manual_seed(0)
    A = .2 + torch.rand(5, 3, 2, dtype=torch.float64)
    if rectify != 'none': A = A * torch.where(torch.rand_like(A) < .3, -1, 1)
    y = torch.rand(5, 3, dtype=torch.float64) if soft else torch.tensor([0, 2, 2, 0, 7])
    loss = GiniKLLoss(1, .7, rectify=rectify, reverse_kl=reverse)
    A.requires_grad_()
    assert torch.autograd.gradcheck(lambda A: loss.terms(A, y), A)
    assert torch.autograd.gradgradcheck(lambda A: loss(A, y), A)

def test_soft_targets_have_a_gradient_too():
    "A learned label (a teacher, a mixing weight) gets the gradient of Eqs. 4 and 7"
    torch.manual_seed(0)
    A, y = torch.rand(5, 3, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64).requires_grad_()
    for reverse in (False, True): assert torch.autograd.gradcheck(lambda y: GiniKLLoss(reverse_kl=reverse).terms(A, y), y)

# ---- What is known without computing ----

@pytest.mark.parametrize('n', [1, 2, 5, 30])
def test_channels_that_fire_for_one_class_are_pure(n):
    y = torch.arange(2*n) % n
    A = torch.eye(n, dtype=torch.float64)[y] * torch.rand(2*n, n, dtype=torch.float64).add(.1)
    gini, kl, d_gini, d_kl = terms_and_gradients(A, y)
    assert gini.item() == 0 and abs(kl.item()) < 1e-15 and d_gini.abs().max() < 1e-15 and d_kl.abs().max() < 1e-13

@pytest.mark.parametrize('n', [1, 2, 3, 10, 100])
def test_channels_that_fire_for_all_alike_are_at_the_bound(n):
    y = torch.arange(3*n) % n
    gini, kl, d_gini, d_kl = terms_and_gradients(torch.full((3*n, 4), .7, dtype=torch.float64), y)
    assert gini.item() == pytest.approx(1 - 1/n, abs=1e-14) and abs(kl.item()) < 1e-14 and d_gini.abs().max() < 1e-13 and d_kl.abs().max() < 1e-13

@pytest.mark.parametrize('reverse', [False, True])
def test_kl_is_zero_for_equal_histograms_only(reverse):
    y, pure = torch.tensor([0, 0, 0, 1]), torch.tensor([[1., 0], [1, 0], [1, 0], [0, 1]], dtype=torch.float64)
    def kl(three_to_one): return kl_loss(pure[:, [0]*three_to_one[0] + [1]*three_to_one[1]], y, reverse).item()
    assert kl((3, 1)) == kl((6, 2)) == 0
    assert all(kl(k) > 1e-3 for k in [(1, 1), (1, 3), (2, 1), (4, 1), (7, 2), (1, 0), (0, 1)])

@pytest.mark.parametrize('reverse', [False, True])
def test_bounds(reverse):
    "0 <= Gini <= 1-1/n and 0 <= KL <= its bound for n classes in the batch; both ends of KL are reached"
    for seed in range(50):
        torch.manual_seed(seed); n = 2 + seed % 7
        A, y = torch.rand(20, 6).pow(8).double(), torch.cat([torch.arange(n), torch.randint(0, n, (20 - n,))])
        gini, kl = GiniKLLoss(reverse_kl=reverse).terms(A, y)
        most = math.log(1e10) if reverse else -label_histogram(y).min().log().item()
        assert 0 <= gini <= 1 - 1/n + 1e-15 and -1e-15 <= kl <= most + 1e-9
    y = torch.tensor([0, 0, 0, 1])
    A = (y == 1).double()[:, None].expand(4, 5)                                                # all channels on the rarest class
    expected = .75*math.log(.75e10) + .25*math.log(.25) if reverse else math.log(4)
    assert kl_loss(A, y, reverse).item() == pytest.approx(expected, abs=1e-9)

# ---- Invariances ----

def test_order_of_images_channels_positions_and_classes_does_not_matter():
    torch.manual_seed(0)
    A, y = torch.randn(30, 8, 3, 3, dtype=torch.float64), torch.randint(0, 6, (30,))
    images, channels, positions, classes = torch.randperm(30), torch.randperm(8), torch.randperm(9), torch.randperm(6)
    for reverse in (False, True):
        base = terms_and_gradients(A, y, reverse_kl=reverse)
        moved = terms_and_gradients(A.flatten(2)[images][:, channels][:, :, positions], y[images], reverse_kl=reverse)
        for got, expected in zip(moved[:2], base[:2]): torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
        for got, expected in zip(moved[2:], base[2:]):
            torch.testing.assert_close(got, expected.flatten(2)[images][:, channels][:, :, positions], rtol=0, atol=1e-14)
        for new in (classes[y], classes[y]*1000, y + 5, y + 2**40):
            for got, expected in zip(terms_and_gradients(A, new, reverse_kl=reverse), base): torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
        soft = torch.rand(30, 6, dtype=torch.float64)
        for got, expected in zip(terms_and_gradients(A, soft[:, classes], reverse_kl=reverse), terms_and_gradients(A, soft, reverse_kl=reverse)):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_scale_of_a_channel_does_not_matter(dtype):
    "Values stay, the gradient goes with one over the scale: exactly so for powers of two"
    torch.manual_seed(0)
    A, y = torch.randn(30, 8, dtype=dtype), torch.randint(0, 6, (30,))
    scale = 2. ** torch.arange(-40, 40, 10).to(dtype)
    for reverse in (False, True):
        base, scaled = (terms_and_gradients(x, y, reverse_kl=reverse) for x in (A, A*scale))
        assert torch.equal(scaled[0], base[0]) and torch.equal(scaled[1], base[1])
        assert torch.equal(scaled[2]*scale, base[2]) and torch.equal(scaled[3]*scale, base[3])

def test_scale_of_soft_targets_does_not_matter():
    torch.manual_seed(0)
    A, y = torch.rand(9, 4), torch.rand(9, 3)
    base = terms_and_gradients(A, y)
    assert torch.equal(label_histogram(torch.full((2, 4), 1e-42)), torch.full((4,), .25))
    for k in (-140, -120, -40, 40, 100):
        for got, expected in zip(terms_and_gradients(A, y * 2.**k), base): torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7 if k > -126 else 1e-3)

def test_repeating_the_batch_changes_nothing():
    torch.manual_seed(0)
    A, y = torch.rand(10, 4, dtype=torch.float64), torch.randint(0, 5, (10,))
    for got, expected in zip(GiniKLLoss().terms(A.repeat(3, 1), y.repeat(3)), GiniKLLoss().terms(A, y)): assert abs(got - expected) < 1e-14

# ---- Hard labels and their one-hot rows ----

@pytest.mark.parametrize('m,c,n', [(16, 5, 3), (64, 33, 10), (100, 64, 100), (7, 3, 7), (128, 512, 17)])
@pytest.mark.parametrize('reverse', [False, True])
def test_one_hot_rows_equal_labels_exactly(m, c, n, reverse):
    "Bit for bit, values and gradients, where both make the same matrix Y: n <= m, with n_classes given or the largest label present"
    torch.manual_seed(0)
    A, y = torch.randn(m, c, 3), torch.cat([torch.arange(n), torch.randint(0, n, (m - n,))])
    one_hot = torch.nn.functional.one_hot(y, n).float()
    for n_classes in (None, n):
        for got, expected in zip(terms_and_gradients(A, one_hot, n_classes=n_classes, reverse_kl=reverse),
                                 terms_and_gradients(A, y, n_classes=n_classes, reverse_kl=reverse)): assert torch.equal(got, expected)
    for kept in (one_hot.half(), one_hot.bfloat16(), one_hot.double()):                         # 0 and 1 are exact in any of them
        assert torch.equal(gini_loss(A, kept), gini_loss(A, y)) and torch.equal(kl_loss(A, kept, reverse), kl_loss(A, y, reverse))
    y[::3] = -100
    left_out = one_hot * (y != -100).float()[:, None]                                           # a row of zeros takes no part either
    for got, expected in zip(terms_and_gradients(A, left_out, reverse_kl=reverse), terms_and_gradients(A, y, n_classes=n, reverse_kl=reverse)):
        assert torch.equal(got, expected)

@pytest.mark.parametrize('n', [200, 10**4])
def test_one_hot_rows_equal_labels_with_more_classes_than_images(n):
    "Labels are then renumbered into fewer columns, so sums over columns round in another order: equal to a few units in the last place"
    torch.manual_seed(0)
    A, y = torch.randn(64, 20, 3), torch.randint(0, n, (64,))
    one_hot = torch.nn.functional.one_hot(y, n).float()
    for reverse in (False, True):
        for got, expected in zip(terms_and_gradients(A, one_hot, reverse_kl=reverse), terms_and_gradients(A, y, n_classes=n, reverse_kl=reverse)):
            torch.testing.assert_close(got, expected, rtol=0, atol=4 * torch.finfo(torch.float32).eps * expected.abs().max().item())

@pytest.mark.parametrize('n_classes', [None, 10**6])
def test_a_million_classes_equal_their_compact_numbering(n_classes):
    torch.manual_seed(0)
    A, y = torch.randn(50, 16, dtype=torch.float64), torch.randint(0, 10**6, (50,))
    y[:20] = y[20:40]; y[-1] = -100
    compact = torch.unique(y, return_inverse=True)[1]
    for reverse in (False, True):
        for got, expected in zip(terms_and_gradients(A, y, n_classes=n_classes, reverse_kl=reverse),
                                 terms_and_gradients(A, compact, ignore_index=0, reverse_kl=reverse)): torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)

def test_a_million_classes_need_no_million_columns():
    Y = label_matrix(torch.randint(0, 10**6, (64,)), n_classes=10**6, renumber=True)
    assert Y.n == 64 and Y.mass.sum() == 64

@pytest.mark.parametrize('ignore_index', [-100, -1, 0, 3, 255])
def test_ignored_images_take_no_part(ignore_index):
    torch.manual_seed(0)
    A, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(0, 5, (40,))
    y[::4] = ignore_index; kept = y != ignore_index
    for n_classes in (None, 5):
        got, expected = terms_and_gradients(A, y, ignore_index=ignore_index, n_classes=n_classes), terms_and_gradients(A[kept], y[kept], n_classes=n_classes)
        for g, e in zip(got[:2], expected[:2]): torch.testing.assert_close(g, e, rtol=0, atol=1e-14)
        for g, e in zip(got[2:], expected[2:]):
            torch.testing.assert_close(g[kept], e, rtol=0, atol=1e-14); assert (g[~kept] == 0).all()
    assert class_means(A, y, ignore_index=ignore_index).shape == (6, int(y[kept].max()) + 1)    # an ignored label needs no column
    assert label_histogram(y, ignore_index=ignore_index).shape == (int(y[kept].max()) + 1,)

# ---- Degenerate batches ----

@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('case', ['absent', 'one class', 'one image', 'some dead', 'all dead', 'class without a channel', 'one pixel'])
def test_degenerate_batches_are_finite(case, dtype, reverse):
    torch.manual_seed(0)
    A, y = torch.randn(6, 4, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    if case == 'absent': y = torch.tensor([0, 90, 90, 0, 41, 0])
    if case == 'one class': y = torch.full((6,), 3)
    if case == 'one image': A, y = A[:1], y[1:2]
    if case == 'some dead': A[:, 1::2] = 0
    if case == 'all dead': A = torch.zeros_like(A)
    if case == 'class without a channel': A[y == 1] = 0
    if case == 'one pixel': A = torch.zeros_like(A); A[2, 3, 0, 1] = .5
    gini, kl, d_gini, d_kl = terms_and_gradients(A.to(dtype), y, reverse_kl=reverse, n_classes=100)
    assert all(t.isfinite().all() for t in (gini, kl, d_gini, d_kl))
    if case in ('one class', 'one image', 'all dead'): assert gini == kl == 0
    dead = (A == 0).all(0).flatten(1).all(1)
    assert (d_gini[:, dead] == 0).all() and (d_kl[:, dead] == 0).all()
    if case == 'some dead':                                                                    # as if they were not there
        for got, expected in zip((gini, kl), GiniKLLoss(reverse_kl=reverse).terms(A[:, ::2].to(dtype), y)): torch.testing.assert_close(got, expected)

@pytest.mark.parametrize('make', [lambda: (torch.rand(0, 3, 2, 2), torch.zeros(0).long()), lambda: (torch.rand(0, 3), torch.zeros(0, 5)),
    lambda: (torch.rand(4, 3), torch.full((4,), -100)), lambda: (torch.rand(4, 3), torch.zeros(4, 5))], ids=['empty', 'empty soft', 'all ignored', 'rows of zeros'])
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('n_classes', [None, 5])
def test_nothing_to_average_gives_zero_with_a_graph(make, reverse, n_classes):
    A, y = make(); A.requires_grad_()
    for loss in (gini_loss(A, y, n_classes=n_classes), kl_loss(A, y, reverse, n_classes=n_classes), GiniKLLoss(n_classes=n_classes, reverse_kl=reverse)(A, y)):
        assert loss.item() == 0 and loss.requires_grad
        A.grad = None; loss.backward()
        assert A.grad.shape == A.shape and (A.grad == 0).all()

# ---- Precision ----

def realistic(name):
    "Batches as networks give them: at the start of training, in the middle, and when every channel has its class"
    torch.manual_seed(len(name))
    y = torch.arange(200) % 10
    if name == 'initial': return torch.randn(128, 256, 4, 4).relu(), torch.randint(0, 100, (128,))
    if name == 'few images': return torch.randn(16, 4), torch.randint(0, 3, (16,))
    if name == 'balanced': return torch.rand(200, 256), y
    own = (y[:, None] == torch.arange(256) % 10).float()
    if name == 'specialised': return torch.rand(200, 256) * (own + 1e-3), y
    if name == 'pure': return torch.rand(200, 256) * (own + 1e-6), y
    if name == 'mixed labels': return torch.randn(64, 32, 2, 2), torch.rand(64, 10).softmax(1)
    if name == 'teacher': return torch.rand(64, 32), (torch.randn(64, 10) * 30).softmax(1)     # probabilities down to 1e-45

REALISTIC = ['initial', 'few images', 'balanced', 'specialised', 'pure', 'mixed labels', 'teacher']
def relative(got, expected): return ((got.double() - expected).norm() / expected.norm()).item()

@pytest.mark.parametrize('name', REALISTIC)
@pytest.mark.parametrize('reverse', [False, True])
def test_precision_of_float32(name, reverse):
    "At most 1e-5 from float64, for the value and the gradient of either term, also where the terms are close to zero"
    A, y = realistic(name)
    got, expected = terms_and_gradients(A, y, reverse_kl=reverse), terms_and_gradients(A.double(), y, reverse_kl=reverse)
    assert got[0].dtype == torch.float32 and [round(relative(g, e), 9) for g, e in zip(got, expected) if relative(g, e) > 1e-5] == []

@pytest.mark.parametrize('dtype,tolerance', [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize('name', REALISTIC)
@pytest.mark.parametrize('reverse', [False, True])
def test_precision_of_half_inputs(name, dtype, tolerance, reverse):
    "Computed in float32 whatever comes in: only the rounding of the gradient to the input's own precision remains"
    A, y = realistic(name)
    if dtype == torch.float16: A = A.clamp(max=64.) * 16                                       # away from float16's own underflow
    got, expected = terms_and_gradients(A.to(dtype), y, reverse_kl=reverse), terms_and_gradients(A.to(dtype).double(), y, reverse_kl=reverse)
    assert got[0].dtype == got[1].dtype == torch.float32 and got[2].dtype == dtype
    scale = 2.**16 if dtype == torch.float16 else 1.                                           # float16 is trained with a GradScaler
    if dtype == torch.float16:
        x = A.to(dtype).requires_grad_()
        got = *got[:2], *(torch.autograd.grad(t * scale, x, retain_graph=True)[0].double() / scale for t in GiniKLLoss(reverse_kl=reverse).terms(x, y))
    assert [relative(g, e) for g, e in zip(got, expected) if relative(g, e) > tolerance] == []

@pytest.mark.parametrize('reverse', [False, True])
def test_kl_is_never_negative(reverse):
    "Nearly equal histograms: rounding must not make a divergence negative by more than float64 does"
    torch.manual_seed(0)
    for _ in range(50):
        A, y = 1 + 1e-3*torch.rand(40, 3), torch.arange(40) % 4
        assert kl_loss(A, y, reverse).item() >= -1e-15

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('amp', [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, amp):
    torch.manual_seed(0)
    A, y = torch.randn(20, 8, 3, 3).to(dtype).requires_grad_(), torch.randint(0, 5, (20,))
    for targets in (y, torch.rand(20, 5)):
        outside = GiniKLLoss()(A, targets)
        with torch.autocast('cpu', amp): inside = GiniKLLoss()(A, targets)
        gradients = [torch.autograd.grad(loss, A)[0] for loss in (inside, outside)]             # backward belongs outside autocast
        assert torch.equal(inside, outside) and inside.dtype == outside.dtype and torch.equal(*gradients)

def test_soft_targets_of_another_precision_do_not_change_the_result_type():
    A, y = torch.rand(6, 3), torch.rand(6, 4)
    for t in (y.double(), y.half(), y.bfloat16()): assert gini_loss(A, t).dtype == kl_loss(A, t).dtype == torch.float32
    assert gini_loss(A.double(), y).dtype == torch.float64

# ---- Layouts, subclasses, compilation, copies ----

def other_layouts(A):
    yield A.to(memory_format=torch.channels_last)
    yield A.transpose(2, 3).contiguous().transpose(2, 3)
    yield torch.cat([A, A])[:len(A)]
    big = torch.empty(A.shape[0]*2, A.shape[1], A.shape[2]*2, A.shape[3]).copy_(torch.rand(1)); big[::2, :, ::2] = A; yield big[::2, :, ::2]
    yield A.flip(0).flip(0)

def test_memory_layout_does_not_matter():
    torch.manual_seed(0)
    A, y = torch.randn(10, 6, 4, 5), torch.randint(0, 4, (20,))
    for targets in (y[:10], torch.rand(20, 4)[:10]):
        expected = terms_and_gradients(A, targets)
        for other in other_layouts(A):
            assert torch.equal(other, A)
            for got, e in zip(terms_and_gradients(other, targets), expected): torch.testing.assert_close(got, e, rtol=1e-6, atol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        strided = torch.stack([y, y*1000], 1)[:10, 1]                                          # labels read from a table: not contiguous, renumbered
        for got, e in zip(terms_and_gradients(A, strided), terms_and_gradients(A, strided.contiguous())): assert torch.equal(got, e)
    expanded = A[:1].expand(10, -1, -1, -1)
    for got, e in zip(terms_and_gradients(expanded, y[:10])[:2], terms_and_gradients(expanded.clone(), y[:10])[:2]): torch.testing.assert_close(got, e)

def test_inputs_are_not_changed():
    A, y, soft = torch.randn(6, 3), torch.tensor([0, 1, -100, 2, 2, 0]), torch.rand(6, 4)
    before = [t.clone() for t in (A, y, soft)]
    for targets in (y, soft): GiniKLLoss()(A, targets); diagnostics(A, targets)
    assert all(torch.equal(a, b) for a, b in zip((A, y, soft), before))

def test_tensor_subclasses():
    core = pytest.importorskip('fastai.torch_core')
    torch.manual_seed(0)
    A, y = torch.randn(8, 3, 2, 2), torch.randint(0, 3, (8,))
    for kind, target in ((core.TensorImage, core.TensorCategory), (core.TensorImageBW, core.TensorCategory), (core.TensorBase, core.TensorBase)):
        x = kind(A.clone()).requires_grad_()
        loss = GiniKLLoss()(x, target(y)); loss.backward()
        assert type(loss) is torch.Tensor and torch.equal(loss, GiniKLLoss()(A, y)) and x.grad is not None
        assert all(type(t) in (torch.Tensor, float) for t in diagnostics(kind(A), target(y)))
        assert torch.equal(GiniKLLoss()(kind(A), core.TensorMultiCategory(torch.eye(3)[y])), loss)
    assert type(gini_loss(torch.nn.Parameter(A), y)) is torch.Tensor

@pytest.mark.parametrize('kwargs', [{}, dict(n_classes=5), dict(n_classes=10**6, reverse_kl=True), dict(rectify='relu', channel_dim=-1), dict(rectify='none', n_classes=5)], ids=str)
@pytest.mark.parametrize('soft', [False, True])
def test_compiled_with_fullgraph(kwargs, soft):
    torch.manual_seed(0); torch._dynamo.reset()
    A, y = torch.randn(16, 8, 6), torch.randint(0, 5, (16,)); y[3] = -100
    if kwargs.get('rectify') == 'none': A = A.abs()
    if soft: y = torch.rand(16, 5); kwargs = {**kwargs, 'n_classes': 5}
    compiled = torch.compile(GiniKLLoss(**kwargs).terms, fullgraph=True, backend='aot_eager')
    x = A.clone().requires_grad_()
    gini, kl = compiled(x, y)
    for got, expected in zip((gini, kl, *(torch.autograd.grad(t, x, retain_graph=True)[0] for t in (gini, kl))), terms_and_gradients(A, y, **kwargs)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)

@pytest.mark.parametrize('bad', ['nan', 'label too large', 'label below 0', 'negative', 'soft'])
def test_compiled_checks_are_not_lost(bad):
    torch._dynamo.reset()
    A, y = torch.rand(4, 3), torch.tensor([0, 1, 2, 0])
    compiled = torch.compile(GiniKLLoss(n_classes=3, rectify='none').terms, fullgraph=True, backend='aot_eager')
    compiled(A, y)
    if bad == 'nan': A[1, 1] = math.nan
    if bad == 'negative': A[1, 1] = -1
    if bad == 'label too large': y[0] = 3
    if bad == 'label below 0': y[0] = -1
    if bad == 'soft': y = -torch.eye(3)[y]
    with pytest.raises((RuntimeError, AssertionError), match="check on the loss's input"): compiled(A, y)

def test_module_is_plain():
    "No parameters, no buffers, no state: it copies, pickles and moves like any module"
    loss = GiniKLLoss(.25, .75, rectify='relu', reverse_kl=True, n_classes=7)
    A, y = torch.randn(6, 3), torch.arange(6)
    assert not list(loss.parameters()) and not loss.state_dict()
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.half().train()): assert torch.equal(twin(A, y), loss(A, y))
    assert "lambda_gini=0.25, lambda_kl=0.75" in repr(loss)

def test_works_without_gradients():
    A, y = torch.rand(6, 3), torch.arange(6)
    with torch.no_grad(): a = GiniKLLoss()(A.clone().requires_grad_(), y)
    with torch.inference_mode(): b = GiniKLLoss()(A, y)
    assert not a.requires_grad and torch.equal(a, b)

# ---- Bad input: each its own message ----

A4, Y4, SOFT = torch.rand(4, 3), torch.tensor([0, 1, 2, 0]), torch.eye(3)[[0, 1, 2, 0]]
BAD = {
    'label below 0': (lambda: GiniKLLoss()(A4, torch.tensor([0, -1, 2, 0])), ValueError, r"label -1 is below 0.*ignore_index \(-100\)"),
    'label at n_classes': (lambda: GiniKLLoss(n_classes=2)(A4, Y4), ValueError, r"label 2 is not below n_classes=2: labels must be 0 to 1"),
    'label above n_classes': (lambda: GiniKLLoss(n_classes=2)(A4, Y4 + 7), ValueError, r"label 9 is not below n_classes=2"),
    'int32 labels': (lambda: GiniKLLoss()(A4, Y4.int()), TypeError, r"must be int64, got torch.int32: call \.long\(\)"),
    'float labels': (lambda: GiniKLLoss()(A4, Y4.float()), TypeError, r"must be int64, got torch.float32.*soft targets"),
    'bool labels': (lambda: GiniKLLoss()(A4, Y4 > 0), TypeError, r"must be int64, got torch.bool"),
    'too few labels': (lambda: GiniKLLoss()(A4, Y4[:3]), ValueError, r"3 targets for 4 rows"),
    'too many labels': (lambda: GiniKLLoss()(A4, torch.cat([Y4, Y4])), ValueError, r"8 targets for 4 rows"),
    'labels of 0 dimensions': (lambda: GiniKLLoss()(A4, torch.tensor(1)), ValueError, r"labels \(m,\) or distributions \(m, n\), got shape \(\)"),
    'labels of 3 dimensions': (lambda: GiniKLLoss()(A4, SOFT[..., None]), ValueError, r"got shape \(4, 3, 1\)"),
    'labels as a list': (lambda: GiniKLLoss()(A4, [0, 1, 2, 0]), TypeError, r"targets must be a torch.Tensor, got list"),
    'integer one-hot': (lambda: GiniKLLoss()(A4, SOFT.long()), TypeError, r"must be floating point \(one-hot, soft or multi-hot\), got torch.int64"),
    'integer labels in a column': (lambda: GiniKLLoss()(A4, Y4[:, None]), ValueError, r"\(4, 1\) have one column.*for labels call \.squeeze\(1\),"),
    'integer labels in a column, one class': (lambda: GiniKLLoss(n_classes=1)(A4, Y4[:, None]), ValueError, r"for labels call \.squeeze\(1\),"),
    'float labels in a column': (lambda: GiniKLLoss()(A4, Y4[:, None].float()), ValueError, r"have one column.*for labels call \.squeeze\(1\)\.long\(\).*\[1-p, p\]"),
    'class_means of labels in a column': (lambda: class_means(A4, Y4[:, None]), ValueError, r"\.squeeze\(1\)"),
    'mixed labels below 0': (lambda: GiniKLLoss()(A4, MixedTargets(Y4, Y4 - 1, .5)), ValueError, r"label -1 is below 0"),
    'mixed labels above n_classes': (lambda: GiniKLLoss(n_classes=3)(A4, MixedTargets(Y4, Y4 + 1, .5)), ValueError, r"label 3 is not below n_classes=3"),
    'mixed one-hot': (lambda: GiniKLLoss()(A4, MixedTargets(SOFT, SOFT, .5)), ValueError, r"mixed targets must be labels \(m,\), got shape \(4, 3\)"),
    'too few mixed labels': (lambda: GiniKLLoss()(A4, MixedTargets(Y4[:3], Y4[:3], .5)), ValueError, r"3 targets for 4 rows"),
    'soft below 0': (lambda: GiniKLLoss()(A4, SOFT - .1), ValueError, r"soft targets must be finite and not negative, got values from -0.1 to 0.9"),
    'soft NaN': (lambda: GiniKLLoss()(A4, SOFT * math.nan), ValueError, r"soft targets must be finite"),
    'soft infinite': (lambda: GiniKLLoss()(A4, SOFT / 0.), ValueError, r"soft targets must be finite"),
    'soft too large': (lambda: GiniKLLoss()(A4, SOFT * 3e38), ValueError, r"soft targets of up to 3e\+38 are too large"),
    'soft of the wrong width': (lambda: GiniKLLoss(n_classes=4)(A4, SOFT), ValueError, r"\(4, 3\) have 3 columns for n_classes=4"),
    'n_classes 0': (lambda: GiniKLLoss(n_classes=0)(A4, Y4), ValueError, r"n_classes must be a positive integer, got 0"),
    'n_classes a float': (lambda: GiniKLLoss(n_classes=3.)(A4, Y4), ValueError, r"n_classes must be a positive integer, got 3.0"),
    'ignore_index None': (lambda: GiniKLLoss(ignore_index=None)(A4, Y4), TypeError, r"ignore_index must be an integer, got None"),
    'NaN': (lambda: GiniKLLoss()(A4.clone().fill_(math.nan), Y4), ValueError, r"activations are NaN or infinite.* in 3 of 3 channels"),
    'one NaN': (lambda: GiniKLLoss()(A4.index_fill(1, torch.tensor([1]), math.nan), Y4), ValueError, r"NaN or infinite.* in 1 of 3 channels"),
    'infinite': (lambda: GiniKLLoss()(A4 / 0., Y4), ValueError, r"activations are NaN or infinite"),
    'minus infinite': (lambda: GiniKLLoss()(-A4 / 0., Y4), ValueError, r"activations are NaN or infinite"),
    'minus infinite under relu': (lambda: GiniKLLoss(rectify='relu')(-A4 / 0., Y4), ValueError, r"infinite"),
    'NaN under none': (lambda: GiniKLLoss(rectify='none')(A4 * math.nan, Y4), ValueError, r"activations are NaN or infinite"),
    'negative under none': (lambda: GiniKLLoss(rectify='none')(A4 - 2, Y4), ValueError, r"activations below zero \(-[12].*rectify='none'"),
    'integer activations': (lambda: GiniKLLoss()(torch.ones(4, 3).long(), Y4), TypeError, r"activations must be floating point, got torch.int64"),
    'complex activations': (lambda: GiniKLLoss()(A4 + 0j, Y4), TypeError, r"activations must be floating point, got torch.complex64"),
    'activations as an array': (lambda: GiniKLLoss()(A4.numpy(), Y4), TypeError, r"activations must be a torch.Tensor, got ndarray"),
    'activations of rank 1': (lambda: GiniKLLoss()(A4[0], Y4), ValueError, r"at least 2 dimensions.*got shape \(3,\)"),
    'no channels': (lambda: GiniKLLoss()(A4[:, :0], Y4), ValueError, r"shape \(4, 0\) have an empty dimension"),
    'no pixels': (lambda: GiniKLLoss()(torch.rand(4, 3, 0, 2), Y4), ValueError, r"empty dimension"),
    'channel_dim 0': (lambda: GiniKLLoss(channel_dim=0)(A4, Y4), ValueError, r"channel_dim=0 does not name a channel dimension.*dimension 0 is the batch"),
    'channel_dim -2': (lambda: GiniKLLoss(channel_dim=-2)(A4, Y4), ValueError, r"channel_dim=-2"),
    'channel_dim 2': (lambda: GiniKLLoss(channel_dim=2)(A4, Y4), ValueError, r"channel_dim=2 .*use 1 to 1 or -1 to -1"),
    'channel_dim a string': (lambda: GiniKLLoss(channel_dim='c')(A4, Y4), ValueError, r"channel_dim=.*c"),
    'rectify': (lambda: GiniKLLoss(rectify='square'), ValueError, r"rectify='square' is not known: use 'abs', 'relu' or 'none'"),
    'rectify in a function': (lambda: gini_loss(A4, Y4, rectify='square'), ValueError, r"use 'abs', 'relu' or 'none'"),
    'lambda_gini below 0': (lambda: GiniKLLoss(-.1), ValueError, r"lambda_gini must be finite and not negative, got -0.1"),
    'lambda_kl below 0': (lambda: GiniKLLoss(lambda_kl=-1), ValueError, r"lambda_kl must be finite and not negative, got -1"),
    'lambda NaN': (lambda: GiniKLLoss(math.nan), ValueError, r"lambda_gini must be finite"),
    'lambda infinite': (lambda: GiniKLLoss(.5, math.inf), ValueError, r"lambda_kl must be finite"),
    'lambda a word': (lambda: GiniKLLoss('much'), TypeError, r"lambda_gini must be a number, got 'much'"),
    'lambda None': (lambda: GiniKLLoss(.5, None), TypeError, r"lambda_kl must be a number, got None"),
    'class_means of maps': (lambda: class_means(torch.rand(4, 3, 2, 2), Y4), ValueError, r"shape \(m, c\), got \(4, 3, 2, 2\): call pool\(\) first"),
    'class_means of integers': (lambda: class_means(torch.ones(4, 3).long(), Y4), TypeError, r"floating point"),
    'class_means of a bad label': (lambda: class_means(A4, Y4, 2), ValueError, r"label 2 is not below n_classes=2"),
    'class_probs below 0': (lambda: class_probs(A4 - 1), ValueError, r"class means below zero"),
    'class_probs NaN': (lambda: class_probs(A4 * math.nan), ValueError, r"NaN"),
    'class_probs of rank 1': (lambda: class_probs(A4[0]), ValueError, r"\(c, n\), got \(3,\)"),
    'class_probs of integers': (lambda: class_probs(Y4[:, None]), TypeError, r"floating point, got torch.int64"),
    'gini_impurity of rank 1': (lambda: gini_impurity(A4[0]), ValueError, r"\(c, n\), got \(3,\)"),
    'gini_impurity of integers': (lambda: gini_impurity(Y4[:, None]), TypeError, r"floating point, got torch.int64"),
    'gini_impurity of class averages': (lambda: gini_impurity(torch.tensor([[5., .5]])), ValueError, r"sum to 1, or be zero, got values from 0.5 to 5 and sums from 5.5 to 5.5: class_probs"),
    'gini_impurity below 0': (lambda: gini_impurity(torch.tensor([[.5, .5], [1.5, -.5]])), ValueError, r"non-negative and sum to 1.*from -0.5 to 1.5"),
    'gini_impurity NaN': (lambda: gini_impurity(torch.tensor([[math.nan, 1.]])), ValueError, r"non-negative and sum to 1"),
    'feature_histogram of class averages': (lambda: feature_histogram(torch.tensor([[5., .5]])), ValueError, r"sum to 1, or be zero"),
    'feature_histogram of rank 1': (lambda: feature_histogram(A4[0]), ValueError, r"\(c, n\), got \(3,\)"),
    'feature_histogram of integers': (lambda: feature_histogram(Y4[:, None]), TypeError, r"floating point, got torch.int64"),
    'label_histogram of a bad label': (lambda: label_histogram(Y4, 2), ValueError, r"label 2 is not below n_classes=2"),
    'label_histogram of floats': (lambda: label_histogram(Y4.float()), TypeError, r"must be int64"),
    'diagnostics of a bad label': (lambda: diagnostics(A4, Y4, 2), ValueError, r"label 2 is not below n_classes=2"),
}

@pytest.mark.parametrize('name', BAD)
def test_bad_input_has_its_own_message(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message): call()

def test_targets_and_activations_on_two_devices():
    with pytest.raises((ValueError, RuntimeError), match="meta"): GiniKLLoss()(A4, Y4.to('meta'))

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_of_any_precision_are_accepted(dtype):
    "Many classes, few, one, and a dead channel: rounding does not make them improbable"
    for n in (1, 2, 100, 5000):
        P = class_probs(torch.rand(30, n)).to(dtype); P[0] = 0
        assert gini_impurity(P).shape == (30,) and feature_histogram(P).isfinite().all()

# ---- Mixed labels ----

def mixed_case(seed, m, c, n, ignored=False):
    "A batch with two labels for each image, and the same as a matrix of all classes"
    torch.manual_seed(seed)
    A, y, other, lam = torch.randn(m, c, 2, dtype=torch.float64), torch.randint(0, n, (m,)), torch.randint(0, n, (m,)), torch.rand(m, dtype=torch.float64)
    other[:m//4] = y[:m//4]; lam[m//2:m//2 + 3] = torch.tensor([0., 1, .5])[:max(0, m - m//2)]
    if ignored: y, other = (torch.where(torch.rand(m) < .3, -100, t) for t in (y, other))
    dense = torch.zeros(m, n, dtype=torch.float64)
    for k in range(m):
        for label, share in ((int(y[k]), lam[k]), (int(other[k]), 1 - lam[k])):
            if label >= 0: dense[k, label] += share
    return A, MixedTargets(y, other, lam), dense

@pytest.mark.parametrize('m, c, n', [(20, 6, 3), (20, 6, 39), (20, 6, 41), (20, 6, 5000), (80, 5, 100), (80, 5, 129), (80, 5, 5000), (1, 3, 50)])
@pytest.mark.parametrize('ignored', [False, True])
@pytest.mark.parametrize('give_n', [False, True])
@pytest.mark.parametrize('reverse', [False, True])
def test_mixed_labels_equal_the_matrix_of_all_classes(m, c, n, ignored, give_n, reverse):
    "Terms, gradients and the second derivative, to 1e-12, by products and by rows, with fewer classes and with more than two for each image"
    A, mixed, dense = mixed_case(m + n, m, c, n, ignored)
    x, loss = A.requires_grad_(), GiniKLLoss(reverse_kl=reverse, n_classes=n if give_n else None)
    Y = label_matrix(mixed, n_classes=n if give_n else None, renumber=True)
    assert Y.n == len(Y.mass) <= max(2*m, n if n <= 2*m else 0)
    for got, expected in zip(loss.terms(x, mixed), loss.terms(x, dense)):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        g, e = (torch.autograd.grad(t, x, create_graph=True)[0] for t in (got, expected))
        torch.testing.assert_close(g, e, rtol=0, atol=1e-12)
        g2, e2 = (torch.autograd.grad(t.square().sum(), x, retain_graph=True)[0] for t in (g, e))
        torch.testing.assert_close(g2, e2, rtol=1e-9, atol=1e-12)

@pytest.mark.parametrize('n_classes', [None, 7, 10**6])
@pytest.mark.parametrize('m', [16, 80])
def test_mixed_labels_compiled(n_classes, m):
    "One graph, as for hard labels"
    A, mixed, dense = mixed_case(0, m, 5, 7)
    A, y, other, lam = A.float(), mixed.labels, mixed.others, mixed.lam.float()
    loss = GiniKLLoss(n_classes=n_classes)
    compiled = torch.compile(lambda A, y, other, lam: loss(A, MixedTargets(y, other, lam)), fullgraph=True, backend='aot_eager')
    x, z = A.clone().requires_grad_(), A.double().requires_grad_()
    got, expected = compiled(x, y, other, lam), GiniKLLoss()(z, dense)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(got, x)[0].double(), torch.autograd.grad(expected, z)[0], rtol=1e-4, atol=1e-7)

# ---- Large features ----

@pytest.mark.parametrize('m, c, n', [(256, 512, 10**6), (256, 512, 10), (100, 700, 10**6), (300, 2000, 150)])
def test_features_in_blocks_keep_their_precision(m, c, n):
    "float32 features, from which S in double precision is made in blocks: value and gradient within 1e-5 of float64"
    torch.manual_seed(0)
    A, y = torch.randn(m, c), torch.randint(0, n, (m,))
    x, z = A.clone().requires_grad_(), A.double().requires_grad_()
    for got, expected in zip(GiniKLLoss().terms(x, y), GiniKLLoss().terms(z, y)):
        g, e = torch.autograd.grad(got, x, retain_graph=True)[0].double(), torch.autograd.grad(expected, z, retain_graph=True)[0]
        assert abs(got.item() - expected.item()) <= 1e-5 * abs(expected.item()) and (g - e).norm() <= 1e-5 * e.norm()

@pytest.mark.parametrize('rectify', ['abs', 'none'])
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_without_the_check_what_is_not_finite_reaches_the_terms(rectify, bad):
    "A loss whose check is turned off must not hide it: the callback looks at the terms instead"
    A = torch.rand(6, 4); A[2, 1] = bad
    loss = GiniKLLoss(rectify=rectify); loss.check_finite = False
    assert not any(t.isfinite() for t in loss.terms(A, torch.tensor([0, 1, 2, 0, 1, 2])))

# ---- Fuzz ----

def magnitudes(rng, shape, dtype, hostile):
    "Random magnitudes of a dtype with exact zeros; `hostile`: over its whole finite range, subnormal numbers included"
    info = torch.finfo(dtype)
    low, high = (math.log10(info.smallest_normal) - 2, math.log10(info.max)) if hostile else (-3, 3)
    if dtype == torch.float64: low, high = max(low, -140), min(high, 140)                      # as far as the float64 oracle itself reaches
    x = 10. ** rng.uniform(low, high, shape)
    x = np.minimum(np.where(rng.random(shape) < rng.choice([0, .3, .9]), 0, x), info.max)
    return torch.tensor(x, dtype=torch.float64).to(dtype)

def strided(x, how):
    "The same values in another layout"
    if how == 'channels last': return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == 'every other': return torch.stack([x, torch.full_like(x, 7)], 1).flatten(0, 1)[::2]
    if how == 'slice': return torch.cat([torch.full_like(x[:1], 5), x])[1:]
    return x

@given(seed=st.integers(0, 2**32 - 1), m=st.integers(0, 6), c=st.integers(1, 4), n=st.integers(1, 6), layout=st.sampled_from(LAYOUTS),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), hostile=st.booleans(), rectify=st.sampled_from(['abs', 'relu', 'none']),
       reverse=st.booleans(), targets=st.sampled_from(['hard', 'far apart', 'soft', 'multi-hot', 'hostile soft']), ignored=st.sampled_from([None, -100, 2, 255]),
       stride=st.sampled_from(['contiguous', 'channels last', 'every other', 'slice']), give_n=st.booleans())
@settings(max_examples=FUZZ or 300, derandomize=not FUZZ, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_fuzz(seed, m, c, n, layout, dtype, hostile, rectify, reverse, targets, ignored, stride, give_n):
    "From finite input: the right finite numbers, or a clear error where averages leave the range of the dtype"
    rng = np.random.default_rng(seed); (names, channel_dim), info = layout, torch.finfo(dtype)
    A = magnitudes(rng, [{'m': m, 'c': c}[d] if d in 'mc' else int(rng.integers(1, 3)) for d in names], dtype, hostile)
    if rectify != 'none': A = A * torch.tensor(rng.choice([-1, 1], A.shape), dtype=dtype)
    A, ignore_index, n_classes = strided(A, stride), -100 if ignored is None else ignored, None
    if targets in ('hard', 'far apart'):
        y = torch.tensor(rng.integers(0, n, m), dtype=torch.int64) * (10**12 if targets == 'far apart' else 1)
        if ignored is not None: y[torch.tensor(rng.random(m) < .3, dtype=torch.bool)] = ignored
        if give_n: n_classes = int(y.max() if m else 0) + 1 if (y != ignore_index).any() else 3
        labels = sorted(set(y.tolist()) - {ignore_index})
        Y = [[float(label == j) for j in labels] for label in y.tolist()]
        y = strided(y[:, None], stride)[:, 0] if m else y
    else:
        kind = [torch.float32, dtype][int(rng.integers(2))]
        y = {'soft': lambda: torch.tensor(rng.random((m, n))).softmax(1), 'multi-hot': lambda: torch.tensor(rng.random((m, n)) < .5).double(),
             'hostile soft': lambda: magnitudes(rng, (m, n), kind, True).double() / max(m*n, 1)}[targets]().to(kind)
        if give_n or n == 1: n_classes = n
        Y, y = y.double().tolist(), strided(y, stride) if m else y
    loss = GiniKLLoss(rectify=rectify, reverse_kl=reverse, n_classes=n_classes, channel_dim=channel_dim, ignore_index=ignore_index)
    o = oracle(as_lists(A, channel_dim), Y, rectify, reverse, DEAD)
    assume(all(not DEAD/2 < t < DEAD*2 for t in o['T']))                                       # on the edge, either answer is right
    assume(o['lost'] < 1e-16)        # a share of an image below float32's range times an activation at the top of it is lost before they meet
    A.requires_grad_()
    try: gini, kl = loss.terms(A, y)
    except ValueError as e:
        assert 'too large' in str(e) and A.detach().abs().max().double() * A.numel() > torch.finfo(torch.float32).max / 10, str(e)
        return
    d = [torch.autograd.grad(t, A, retain_graph=True)[0] for t in (gini, kl)]
    single = dtype != torch.float64
    assert abs(gini.item() - o['gini']) <= (1e-5*o['gini'] + 1e-7 if single else 1e-10)
    assert abs(kl.item() - o['kl']) <= (1e-5*abs(o['kl']) + 2e-6 if single else 1e-9)
    if reverse and any(.9e-10 < h < 1.1e-10 for h in o['hS']): return                          # on the edge of the floor the slope jumps
    T = torch.tensor([[t] for t in o['T']], dtype=torch.float64)
    for got, name, steep in zip(d, ('d_gini', 'd_kl'), (2., max(map(abs, o['g']), default=0.) + 1)):
        if not m or not o['live']: assert (got == 0).all(); continue
        got = got.double().movedim(channel_dim, 1).flatten(1).reshape(m, c, -1)
        expected = torch.tensor(o[name])
        fits = expected.abs() < .99*info.max                                                   # a float16 gradient beyond 65504 is infinite, as it has to be
        assert got[fits].isfinite().all()
        if name == 'd_kl' and single and not reverse and o['rough']: continue                    # log H^S of a class average that float32 cannot hold
        error = torch.where(fits, (got - expected) * T, 0).abs()
        eps = max(info.eps, 1e-5 if single else 1e-11)
        assert (error <= eps * ((expected*T).abs() + steep) + 2 * T * info.smallest_normal * info.eps).all()

@given(seed=st.integers(0, 2**32 - 1), m=st.integers(1, 5), c=st.integers(1, 3), reverse=st.booleans(), soft=st.booleans())
@settings(max_examples=(FUZZ or 300) // 3, derandomize=not FUZZ, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_fuzz_float64_extremes(seed, m, c, reverse, soft):
    "Beyond the oracle's reach, up to 1e308 and down to 1e-320: finite, within the bounds, or a clear error"
    rng = np.random.default_rng(seed)
    A = torch.tensor(10. ** rng.uniform(-322, 308, (m, c)) * (rng.random((m, c)) < .8)).requires_grad_()
    y = torch.tensor(10. ** rng.uniform(-322, 307, (m, 3)) * (rng.random((m, 3)) < .8)) if soft else torch.tensor(rng.integers(0, 3, m))
    try: gini, kl = GiniKLLoss(reverse_kl=reverse).terms(A, y)
    except ValueError as e: assert 'too large' in str(e) and max(A.max(), y.max()) > 1e305; return
    assert 0 <= gini <= 1 and -3e-10 <= kl < 1500                                               # reversed, the floor can add 1e-10 to each class
    assert torch.autograd.grad(gini + kl, A)[0].isfinite().all()

# ---- Whole numbers of any kind, and what is none ----

def test_numpy_integers_are_numbers():
    A, y = torch.rand(6, 4, 2, 2), torch.arange(6) % 3
    expected = GiniKLLoss(n_classes=3)(A, y)
    assert GiniKLLoss(n_classes=np.int64(3), channel_dim=np.int32(1), ignore_index=np.int64(-100))(A, y) == expected
    assert gini_loss(A, y, n_classes=np.int64(3), channel_dim=np.int64(1)) == gini_loss(A, y)

@pytest.mark.parametrize('n', [0, -3, 2.5, '3', True, torch.tensor(3)])
def test_what_is_no_number_of_classes(n):
    for call in (lambda: GiniKLLoss(n_classes=n), lambda: gini_loss(torch.rand(2, 3), torch.tensor([0, 1]), n_classes=n)):
        with pytest.raises(ValueError, match="n_classes must be a positive integer"): call()

@pytest.mark.parametrize('dim', [0, 1.5, '1'])
def test_what_is_no_channel_dim(dim):
    with pytest.raises(ValueError, match="channel_dim=.* does not name a channel dimension: use an integer"): GiniKLLoss(channel_dim=dim)

def test_a_weight_is_not_learnt():
    with pytest.raises(TypeError, match="lambda_gini must be a constant, got a tensor that requires a gradient"): GiniKLLoss(torch.nn.Parameter(torch.tensor(.3)))
    assert GiniKLLoss(torch.tensor(.5)).lambda_gini == .5
