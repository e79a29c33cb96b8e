"""The oracle for the tests of the loss: the paper's equations index by index in Python floats, their derivatives in
closed form, and random batches."""

import math
import random

import numpy as np
import torch

from gini_loss.losses import GiniKLLoss


def oracle(A, Y, rectify='abs', reverse=False, dead=0.0):
    """Values and gradients from nested lists: A (m, c, positions), Y (m, n). Channels whose class means add up to no
    more than `dead` are left out.

    For a class without channels the slope of Eq. 5 is infinite, and zero by convention; reversed, H^S is clamped to at
    least 1e-10."""
    m, c, n = len(Y), len(A[0]) if A else 0, len(Y[0]) if Y else 0
    f = {'abs': abs, 'relu': lambda a: max(a, 0.0), 'none': lambda a: a}[rectify]
    slope = {'abs': lambda a: (a > 0) - (a < 0), 'relu': lambda a: float(a > 0), 'none': lambda a: 1.0}[rectify]
    M = [[sum(f(a) / len(A[k][i]) for a in A[k][i]) for i in range(c)] for k in range(m)]
    mass = [math.fsum(Y[k][j] for k in range(m)) for j in range(n)]
    Y_bar = [[Y[k][j] / mass[j] if mass[j] > 0 else 0.0 for j in range(n)] for k in range(m)]  # Eq. 4
    S = [[sum(M[k][i] * Y_bar[k][j] for k in range(m)) for j in range(n)] for i in range(c)]  # Eq. 3
    T = [sum(row) for row in S]
    live = [i for i in range(c) if T[i] > dead]
    P = [[s / T[i] if i in live else 0.0 for s in S[i]] for i in range(c)]  # Eq. 2
    square = [sum(p * p for p in row) for row in P]
    impurity = [math.fsum(P[i][j] * (1 - P[i][j]) for j in range(n)) for i in range(c)]
    gini = sum(impurity[i] for i in live) / max(len(live), 1)  # Eq. 1
    hS = [sum(P[i][j] for i in live) / max(len(live), 1) for j in range(n)]  # Eq. 6
    hY = [x / sum(mass) if sum(mass) > 0 else 0.0 for x in mass]  # Eq. 7
    if not live:
        kl, g = 0.0, [0.0] * n  # Eq. 5 and its slope in hS
    elif reverse:
        kl = sum(b * math.log(b / max(a, 1e-10)) for a, b in zip(hS, hY) if b > 0)
        g = [-b / a if a > 1e-10 else 0.0 for a, b in zip(hS, hY)]
    else:
        kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(hS, hY) if a > 0)
        g = [math.log(a) - math.log(b) + 1 if a > 0 else 0.0 for a, b in zip(hS, hY)]
    d_gini, d_kl = ([[[0.0] * len(A[k][i]) for i in range(c)] for k in range(m)] for _ in range(2))
    for i in live:
        mean_g = sum(g[j] * P[i][j] for j in range(n))
        for k in range(m):
            by_S = [Y_bar[k][j] / len(A[k][i]) for j in range(n)]
            gini_k = sum(-2 * (P[i][j] - square[i]) * w for j, w in enumerate(by_S)) / len(live) / T[i]
            kl_k = sum((g[j] - mean_g) * w for j, w in enumerate(by_S)) / len(live) / T[i]
            for l, a in enumerate(A[k][i]):
                d_gini[k][i][l], d_kl[k][i][l] = gini_k * slope(a), kl_k * slope(a)
    faint = [
        (i, j, M[k][i] * Y_bar[k][j]) for i in live for k in range(m) for j in range(n) if 0 < Y_bar[k][j] < 2e-38
    ]  # float32 loses these
    lost = max((x / T[i] for i, j, x in faint), default=0.0)
    rough = any(x > 1e-7 * S[i][j] for i, j, x in faint) or any(0 < S[i][j] < 1e-36 for i in live for j in range(n))
    return dict(
        lost=lost,
        rough=rough,
        gini=gini,
        kl=kl,
        d_gini=np.array(d_gini),
        d_kl=np.array(d_kl),
        M=M,
        S=S,
        P=P,
        hS=hS,
        hY=hY,
        T=T,
        live=live,
        g=g,
        impurity=impurity,
    )


def as_lists(A, channel_dim=1):
    "A tensor of any layout as (m, c, positions) nested lists of Python floats"
    A = A.detach().double().movedim(channel_dim, 1)
    return A.flatten(2).tolist() if A.ndim > 2 else A[..., None].tolist()


def from_positions(G, A, channel_dim=1):
    "The oracle's gradient (m, c, positions) in the layout of A"
    shape = A.movedim(channel_dim, 1).shape
    return torch.tensor(G, dtype=torch.float64).reshape(shape).movedim(1, channel_dim)


def one_hot_rows(y, n, ignore_index=-100):
    return [[float(label == j and label != ignore_index) for j in range(n)] for label in y.tolist()]


def terms_and_gradients(A, y, **kwargs):
    "Both terms and the gradient of each on A"
    A = A.detach().requires_grad_()
    gini, kl = GiniKLLoss(**kwargs).terms(A, y)
    return gini.detach(), kl.detach(), *(torch.autograd.grad(t, A, retain_graph=True)[0] for t in (gini, kl))


LAYOUTS = [('mc', 1), ('mcl', 1), ('mchw', 1), ('mchw', -3), ('mtc', -1), ('mtc', 2), ('mhwc', 3), ('mcdhw', 1)]


def random_case(seed):
    "A float64 batch with its targets, as keyword arguments of the loss and as the oracle's lists"
    r = random.Random(seed)
    torch.manual_seed(seed)
    m, c, n = r.randint(1, 12), r.randint(1, 7), r.randint(1, 9)
    layout, channel_dim = r.choice(LAYOUTS)
    A = torch.randn([{'m': m, 'c': c}[d] if d in 'mc' else r.randint(1, 3) for d in layout], dtype=torch.float64)
    rectify = r.choice(['abs', 'relu', 'none'])
    if rectify == 'none':
        A = A.abs()
    channels = A.movedim(channel_dim, 1)
    if r.random() < 0.4:
        channels[:, r.randrange(c)] = 0  # a dead channel
    if r.random() < 0.3:
        channels.mul_((torch.rand(m, c) < 0.5).double().reshape(m, c, *[1] * (A.ndim - 2)))
    ignore_index, n_classes, kind = (
        r.choice([-100, -100, 255, 0]),
        None,
        r.choice(['hard', 'hard', 'sparse', 'ignore', 'soft', 'multihot', 'onehot']),
    )
    if kind in ('hard', 'ignore', 'sparse'):
        y = torch.randint(0, n, (m,))
        if kind == 'sparse':
            y = y * 1000 + 7  # more classes than images
        size = int(y.max()) + 1 + r.randint(0, 2)
        if kind == 'ignore':
            y[torch.rand(m) < 0.4] = ignore_index
        if r.random() < 0.5 and (y[y != ignore_index] < size).all():
            n_classes = size
        labels = sorted(set(y.tolist()) - {ignore_index})
        Y = [[float(label == j) for j in labels] for label in y.tolist()]  # absent classes left out
    else:
        y = {
            'soft': torch.rand(m, n, dtype=torch.float64).softmax(1),
            'multihot': (torch.rand(m, n) < 0.4).double(),
            'onehot': torch.eye(n, dtype=torch.float64)[torch.randint(0, n, (m,))],
        }[kind]
        if r.random() < 0.3:
            y[:, r.randrange(n)] = 0  # an absent class
        if r.random() < 0.5 or n == 1:
            n_classes = n  # one column has to be meant
        Y = y.tolist()
    kwargs = dict(rectify=rectify, n_classes=n_classes, channel_dim=channel_dim, ignore_index=ignore_index)
    return A, y, Y, kwargs, r.random() < 0.5
