"""Random batches of any shape, layout, dtype and target against the oracle, over the whole range of finite numbers.

`GINI_LOSS_FUZZ=10000 pytest tests/test_fuzz.py` draws that many fresh examples; without it the fuzz draws 300, the
same each time.
"""

import math
import os

import numpy as np
import torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from oracle import LAYOUTS, as_lists, oracle

from gini_loss.losses import DEAD, GiniKLLoss

FUZZ = int(os.environ.get('GINI_LOSS_FUZZ', 0))

# ---- Fuzz ----


def magnitudes(rng, shape, dtype, hostile):
    "Random magnitudes of a dtype, with exact zeros; `hostile`: its whole finite range, including subnormal numbers"
    info = torch.finfo(dtype)
    low, high = (math.log10(info.smallest_normal) - 2, math.log10(info.max)) if hostile else (-3, 3)
    if dtype == torch.float64:
        low, high = max(low, -140), min(high, 140)  # the range of the float64 oracle
    x = 10.0 ** rng.uniform(low, high, shape)
    x = np.minimum(np.where(rng.random(shape) < rng.choice([0, 0.3, 0.9]), 0, x), info.max)
    return torch.tensor(x, dtype=torch.float64).to(dtype)


def strided(x, how):
    "The same values in another layout"
    if how == 'channels last':
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == 'every other':
        return torch.stack([x, torch.full_like(x, 7)], 1).flatten(0, 1)[::2]
    if how == 'slice':
        return torch.cat([torch.full_like(x[:1], 5), x])[1:]
    return x


@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(0, 6),
    c=st.integers(1, 4),
    n=st.integers(1, 6),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    hostile=st.booleans(),
    rectify=st.sampled_from(['abs', 'relu', 'none']),
    reverse=st.booleans(),
    targets=st.sampled_from(['hard', 'far apart', 'soft', 'multi-hot', 'hostile soft']),
    ignored=st.sampled_from([None, -100, 2, 255]),
    stride=st.sampled_from(['contiguous', 'channels last', 'every other', 'slice']),
    give_n=st.booleans(),
)
@settings(
    max_examples=FUZZ or 300,
    derandomize=not FUZZ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_fuzz(seed, m, c, n, layout, dtype, hostile, rectify, reverse, targets, ignored, stride, give_n):
    "Finite input gives the right finite numbers, or a clear error if averages leave the range of the dtype"
    rng = np.random.default_rng(seed)
    (names, channel_dim), info = layout, torch.finfo(dtype)
    A = magnitudes(rng, [{'m': m, 'c': c}[d] if d in 'mc' else int(rng.integers(1, 3)) for d in names], dtype, hostile)
    if rectify != 'none':
        A = A * torch.tensor(rng.choice([-1, 1], A.shape), dtype=dtype)
    A, ignore_index, n_classes = strided(A, stride), -100 if ignored is None else ignored, None
    if targets in ('hard', 'far apart'):
        y = torch.tensor(rng.integers(0, n, m), dtype=torch.int64) * (10**12 if targets == 'far apart' else 1)
        if ignored is not None:
            y[torch.tensor(rng.random(m) < 0.3, dtype=torch.bool)] = ignored
        if give_n:
            n_classes = int(y.max() if m else 0) + 1 if (y != ignore_index).any() else 3
        labels = sorted(set(y.tolist()) - {ignore_index})
        Y = [[float(label == j) for j in labels] for label in y.tolist()]
        y = strided(y[:, None], stride)[:, 0] if m else y
    else:
        kind = [torch.float32, dtype][int(rng.integers(2))]
        y = {
            'soft': lambda: torch.tensor(rng.random((m, n))).softmax(1),
            'multi-hot': lambda: torch.tensor(rng.random((m, n)) < 0.5).double(),
            'hostile soft': lambda: magnitudes(rng, (m, n), kind, True).double() / max(m * n, 1),
        }[targets]().to(kind)
        if give_n or n == 1:
            n_classes = n
        Y, y = y.double().tolist(), strided(y, stride) if m else y
    loss = GiniKLLoss(
        rectify=rectify, reverse_kl=reverse, n_classes=n_classes, channel_dim=channel_dim, ignore_index=ignore_index
    )
    o = oracle(as_lists(A, channel_dim), Y, rectify, reverse, DEAD)
    assume(all(not DEAD / 2 < t < DEAD * 2 for t in o['T']))  # at the threshold, both answers are right
    assume(
        o['lost'] < 1e-16
    )  # a share of an image below float32's range times an activation at the top of it is lost before they meet
    A.requires_grad_()
    try:
        gini, kl = loss.terms(A, y)
    except ValueError as e:
        assert (
            'too large' in str(e) and A.detach().abs().max().double() * A.numel() > torch.finfo(torch.float32).max / 10
        ), str(e)
        return
    d = [torch.autograd.grad(t, A, retain_graph=True)[0] for t in (gini, kl)]
    single = dtype != torch.float64
    assert abs(gini.item() - o['gini']) <= (1e-5 * o['gini'] + 1e-7 if single else 1e-10)
    assert abs(kl.item() - o['kl']) <= (1e-5 * abs(o['kl']) + 2e-6 if single else 1e-9)
    if reverse and any(0.9e-10 < h < 1.1e-10 for h in o['hS']):
        return  # at the clamp, the slope jumps
    T = torch.tensor([[t] for t in o['T']], dtype=torch.float64)
    for got, name, steep in zip(d, ('d_gini', 'd_kl'), (2.0, max(map(abs, o['g']), default=0.0) + 1)):
        if not m or not o['live']:
            assert (got == 0).all()
            continue
        got = got.double().movedim(channel_dim, 1).flatten(1).reshape(m, c, -1)
        expected = torch.tensor(o[name])
        fits = expected.abs() < 0.99 * info.max  # a float16 gradient above 65504 must be infinite
        assert got[fits].isfinite().all()
        if name == 'd_kl' and single and not reverse and o['rough']:
            continue  # log H^S of a class average that float32 cannot hold
        error = torch.where(fits, (got - expected) * T, 0).abs()
        eps = max(info.eps, 1e-5 if single else 1e-11)
        assert (error <= eps * ((expected * T).abs() + steep) + 2 * T * info.smallest_normal * info.eps).all()


@given(
    seed=st.integers(0, 2**32 - 1), m=st.integers(1, 5), c=st.integers(1, 3), reverse=st.booleans(), soft=st.booleans()
)
@settings(
    max_examples=(FUZZ or 300) // 3,
    derandomize=not FUZZ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_fuzz_float64_extremes(seed, m, c, reverse, soft):
    "Beyond the range of the oracle, from 1e-320 to 1e308: finite and within the bounds, or a clear error"
    rng = np.random.default_rng(seed)
    A = torch.tensor(10.0 ** rng.uniform(-322, 308, (m, c)) * (rng.random((m, c)) < 0.8)).requires_grad_()
    y = (
        torch.tensor(10.0 ** rng.uniform(-322, 307, (m, 3)) * (rng.random((m, 3)) < 0.8))
        if soft
        else torch.tensor(rng.integers(0, 3, m))
    )
    try:
        gini, kl = GiniKLLoss(reverse_kl=reverse).terms(A, y)
    except ValueError as e:
        assert 'too large' in str(e) and max(A.max(), y.max()) > 1e305
        return
    assert 0 <= gini <= 1 and -3e-10 <= kl < 1500  # reversed, the clamp can add 1e-10 to each class
    assert torch.autograd.grad(gini + kl, A)[0].isfinite().all()
