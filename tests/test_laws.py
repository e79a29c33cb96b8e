"""The laws of the page "When does it pull?": exact ones to 1e-10, statistical ones within five standard errors.

Symbols: batch of m images, n classes present, c live channels, P = S̄, T the sums of the rows of S, s = T/n,
q the sums of squares of the rows of P, u = n·P - 1 a channel's preferences, v their mean square.
"""

from itertools import product
from math import comb, lgamma, log

import pytest
import torch

from gini_loss.losses import (
    GiniKLLoss,
    class_means,
    class_probs,
    feature_histogram,
    gini_loss,
    kl_loss,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def random_batch(seed, m=60, n=7, c=9, balanced=False, spread=1.0):
    "Activations (m, c) and labels; unless `balanced` with dead channels, an absent class and classes of unequal size"
    g = torch.Generator().manual_seed(seed)
    M = (1 + spread * torch.randn(m, c, generator=g, dtype=torch.double)).abs()
    if balanced:
        return M, torch.arange(m) % n
    M[:, [2, 5]] = 0
    y = torch.multinomial(torch.arange(1.0, n + 1), m, replacement=True, generator=g)
    y[y == 3] = 4
    return M, y


def parts(M, y):
    "P (c, n), T (c, 1), q (c, 1) of live channels and present classes; label mass, column of each image, live channels"
    present, columns = y.unique(return_inverse=True)
    S = class_means(M, y)[:, present]
    live = S.sum(1) > 0
    T = S[live].sum(1, keepdim=True)
    P = S[live] / T
    return P, T, (P * P).sum(1, keepdim=True), torch.bincount(columns).double(), columns, live


def gradient(loss, M, *args, **kwargs):
    leaf = M.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *args, **kwargs), leaf)[0]


def preference(M, y):
    P = class_probs(class_means(M, y))
    u = P.shape[1] * P - 1
    return u, (u * u).mean(1, keepdim=True)


# ---- The Gini term ----


@pytest.mark.parametrize("seed", range(3))
def test_gini_is_the_mean_square_of_the_preferences(seed):
    M, y = random_batch(seed)
    P, *_ = parts(M, y)
    n = P.shape[1]
    torch.testing.assert_close(gini_loss(M, y), 1 - (1 + ((n * P - 1) ** 2).mean()) / n, **EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_the_gini_term(seed):
    M, y = random_batch(seed)
    P, T, q, mass, columns, live = parts(M, y)
    expected = torch.zeros_like(M)
    expected[:, live] = (-2 * (P - q) / (len(P) * T) / mass)[:, columns].T
    torch.testing.assert_close(gradient(gini_loss, M, y), expected, **EXACT)


def test_gradient_of_the_gini_term_in_a_balanced_batch():
    M, y = random_batch(0, m=70, balanced=True)
    (u, v), s = preference(M, y), class_means(M, y).mean(1, keepdim=True)
    m, c, n = *M.shape, 7
    torch.testing.assert_close(gradient(gini_loss, M, y), (-2 * (u - v) / (c * m * n * s))[:, y].T, **EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_pull_of_the_gini_term_summed_over_the_batch(seed):
    "The pull does not depend on the number of channels, and falls as 1/n for fixed preferences"
    M, y = random_batch(seed)
    P, *_ = parts(M, y)
    n, u = P.shape[1], P.shape[1] * P - 1
    v = (u * u).mean(1, keepdim=True)
    torch.testing.assert_close(
        (M * gradient(gini_loss, M, y)).abs().sum(), 2 / n * ((1 + u) * (u - v).abs()).mean(), **EXACT
    )


@pytest.mark.parametrize("loss", [gini_loss, kl_loss])
def test_no_term_pulls_at_the_scale_of_a_channel(loss):
    M, y = random_batch(1)
    torch.testing.assert_close((M * gradient(loss, M, y)).sum(0), torch.zeros(M.shape[1], dtype=torch.double), **EXACT)


@pytest.mark.parametrize("loss", [gini_loss, kl_loss])
def test_a_faint_channel_is_pulled_harder_in_proportion(loss):
    M, y = random_batch(1)
    faint = M.clone()
    faint[:, 0] /= 1000
    expected = gradient(loss, M, y)
    expected[:, 0] *= 1000
    torch.testing.assert_close(gradient(loss, faint, y), expected, **EXACT)


def test_preferences_grow_in_proportion_under_the_gini_term():
    """Gradient flow on the activations of a balanced batch: du/dt = 2(1+v)u/(c·n·m·s²).
    So dv/dt = 4v(1+v)/(c·n·m·s²), and ds/dt = -2v/(c·n·m·s)"""
    M, y = random_batch(2, m=70, balanced=True)
    (u, v), s = preference(M, y), class_means(M, y).mean(1, keepdim=True)
    rate = 2 * (1 + v) / (M.shape[1] * 7 * len(M) * s**2)
    _, (du, dv) = torch.func.jvp(lambda M: preference(M, y), (M,), (-gradient(gini_loss, M, y),))
    _, ds = torch.func.jvp(lambda M: class_means(M, y).mean(1, keepdim=True), (M,), (-gradient(gini_loss, M, y),))
    torch.testing.assert_close(du, rate * u, **EXACT)
    torch.testing.assert_close(dv, 2 * rate * v, **EXACT)
    torch.testing.assert_close(ds, -rate * v * s / (1 + v), **EXACT)


@pytest.mark.parametrize("n", [2, 3, 10, 100])
def test_a_favourite_keeps_the_pull_at_any_number_of_classes(n):
    "Half of the mass on one class gives a pull of ½ - ½/(n-1): 0 for two classes, where half is no preference"
    M = torch.full((n, 1), 0.5 / (n - 1), dtype=torch.double)
    M[0] = 0.5
    expected = torch.tensor(0.5 - 0.5 / (n - 1), dtype=torch.double)
    torch.testing.assert_close((M * gradient(gini_loss, M, torch.arange(n))).abs().sum(), expected, **EXACT)


def test_undecided_channels_are_pulled_less_the_more_classes_there_are():
    "Spread 30 %: the mean over 400 channels is (2/n)·E|(1+u)(u-v)| of 20,000 others, within five standard errors"
    g = torch.Generator().manual_seed(0)

    def per_channel(n, c):
        M = (1 + 0.3 * torch.randn(n, c, generator=g, dtype=torch.double)).abs()
        return c * (M * gradient(gini_loss, M, torch.arange(n))).abs().sum(0), preference(M, torch.arange(n))

    for n in (3, 10, 100):
        pull, _ = per_channel(n, 400)
        _, (u, v) = per_channel(n, 20_000)
        drawn = 2 / n * ((1 + u) * (u - v).abs()).mean(1)
        error = (pull.var() / len(pull) + drawn.var() / len(drawn)).sqrt()
        assert (pull.mean() - drawn.mean()).abs() < 5 * error
    assert pull.mean() < 0.005


# ---- The KL term ----


@pytest.mark.parametrize("with_prior", [False, True])
def test_gradient_and_pull_of_the_kl_term(with_prior):
    "With g = log(H^S/H^Y): (g - Σ P·g)/(c·T·m_y); summed over the batch the mean of Σ P·|g - Σ P·g|, with no 1/n"
    M, y = random_batch(0)
    prior = torch.arange(1.0, 8).double() if with_prior else None
    P, T, _, mass, columns, live = parts(M, y)
    target = prior[y.unique()] if with_prior else mass
    g = (P.mean(0) / (target / target.sum())).log()
    lean = g - P @ g[:, None]
    expected = torch.zeros_like(M)
    expected[:, live] = (lean / (len(P) * T) / mass)[:, columns].T
    got = gradient(kl_loss, M, y, class_prior=prior)
    torch.testing.assert_close(got, expected, **EXACT)
    torch.testing.assert_close((M * got).abs().sum(), (P * lean.abs()).sum(1).mean(), **EXACT)


def pure(n, per_class=1):
    "A function of the labels that returns activations (m, c): each class has `per_class` channels, all pure"
    owner = torch.arange(n).repeat_interleave(torch.as_tensor(per_class).expand(n))
    return lambda y: (y[:, None] == owner).double()


def occupancy(n, m):
    "P(k of n classes are present in m draws), k = 0 to n"
    share = torch.zeros(n + 1, dtype=torch.double)
    share[0] = 1
    k = torch.arange(n + 1).double()
    for _ in range(m):
        share = share * k / n + torch.cat([share.new_zeros(1), (share * (n - k) / n)[:-1]])
    return share


def floor(n, m):
    """Exact E L_KL for equal classes and perfectly spread channels: log m - E log K - n·E[log(N)/K],
    with N images of the first class and K classes present"""
    K = torch.arange(1, n + 1).double()
    value = log(m) - (occupancy(n, m)[1:] * K.log()).sum().item()
    for N in range(2, m + 1):
        weight = comb(m, N) * (n - 1) ** (m - N) / n**m
        others = occupancy(n - 1, m - N)  # how many of the other classes are present
        value -= n * weight * log(N) * (others / K).sum().item()
    return value


def test_floor_by_hand_for_two_classes_and_four_images():
    "Of 16 draws 8 are three to one, with log(4/3)/2 each; the others have a loss of 0, also those with one class"
    mean = sum(kl_loss(pure(2)(y), y).item() for y in map(torch.tensor, product(range(2), repeat=4))) / 16
    assert mean == pytest.approx(log(4 / 3) / 4, abs=1e-10)
    assert floor(2, 4) == pytest.approx(mean, abs=1e-10)


def test_floor_with_absent_classes_is_exact():
    draws = torch.cartesian_prod(*[torch.arange(3)] * 5)
    mean = sum(kl_loss(pure(3)(y), y).item() for y in draws) / len(draws)
    assert floor(3, 5) == pytest.approx(mean, abs=1e-10)


def mean_and_error(values):
    values = torch.tensor(values, dtype=torch.double)
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


@pytest.mark.parametrize("n, m", [(5, 100), (10, 64), (20, 100)])
def test_floor_formulas(n, m):
    "600 draws against the exact mean, within five standard errors; two formulas against it, within their next order"
    g = torch.Generator().manual_seed(n)
    mean, error = mean_and_error([kl_loss(pure(n)(y), y).item() for y in torch.randint(n, (600, m), generator=g)])
    exact = floor(n, m)
    assert abs(mean - exact) < 5 * error
    series = (n - 1) / (2 * m) + (n - 1) * (5 * n - 1) / (12 * m * m)
    if n * (1 - 1 / n) ** m < 1e-6:
        assert abs(series - exact) < 2 * (n / m) ** 3  # the next term is of the order (n/m)³
    present = n * (1 - (1 - 1 / n) ** m)
    log_count = sum(comb(m, k) * (n - 1) ** (m - k) / n**m * log(k) for k in range(2, m + 1)) / (1 - (1 - 1 / n) ** m)
    assert abs(log(m / present) - log_count - exact) < 0.01 * exact  # it replaces K by E K


def test_floor_for_unequal_classes():
    "Σ p·E log(m·p/N), exactly and as a series to 1/m²"
    p, m = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.double), 200
    exact = sum(
        q * comb(m, k) * q**k * (1 - q) ** (m - k) * log(m * q / k) for q in p.tolist() for k in range(1, m + 1)
    )
    series = (len(p) - 1) / (2 * m) + ((1 - p) * (5 - p) / (12 * p * m * m)).sum().item()
    assert abs(series - exact) < 2 * ((1 / (m * p)) ** 3 * p).sum().item()
    g = torch.Generator().manual_seed(0)
    A = pure(4, (4, 3, 2, 1))
    draws = torch.multinomial(p, 600 * m, replacement=True, generator=g).view(600, m)
    mean, error = mean_and_error([kl_loss(A(y), y).item() for y in draws])
    assert abs(mean - exact) < 5 * error


def test_draws_without_replacement_have_a_lower_floor():
    "Without replacement, the variance of the counts, and so the leading term, is multiplied by (t-m)/(t-1)"
    n, m, t = 5, 100, 200
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(t) % n
    draws = [labels[torch.randperm(t, generator=g)[:m]] for _ in range(600)]
    mean, error = mean_and_error([kl_loss(pure(n)(y), y).item() for y in draws])
    assert abs(mean - (n - 1) / (2 * m) * (t - m) / (t - 1)) < 5 * error + (n - 1) * (5 * n - 1) / (12 * m * m)
    mean_square, error = mean_and_error(
        [((torch.bincount(y, minlength=n) / m - 1 / n) ** 2).sum().item() * n / 2 for y in draws]
    )
    assert abs(mean_square - (n - 1) / (2 * m) * (t - m) / (t - 1)) < 5 * error


def test_stratified_batches_have_no_floor():
    y = torch.arange(40) % 5
    assert kl_loss(pure(5, 3)(y), y).abs() < 1e-10


@pytest.mark.parametrize("seed", range(3))
def test_a_class_prior_removes_the_draw(seed):
    "Pure channels spread as the prior have no loss and no gradient, for any draw and any absent classes"
    counts = torch.tensor([5, 3, 1, 1])
    y = torch.multinomial(counts.double(), 6, replacement=True, generator=torch.Generator().manual_seed(seed))
    M = pure(4, counts)(y)
    assert kl_loss(M, y, class_prior=counts).abs() < 1e-10
    assert gradient(kl_loss, M, y, class_prior=counts).abs().max() < 1e-10


def every_draw(p, m):
    "All label counts (r, n) of m images and their probabilities, for classes with shares p"
    counts = torch.tensor([k for k in product(range(m + 1), repeat=len(p)) if sum(k) == m], dtype=torch.double)
    return counts, (lgamma(m + 1) - (counts + 1).lgamma().sum(1) + (counts * p.log()).sum(1)).exp()


def expected_kl(P, w, counts, weight, target=None):
    "E L_KL over all draws, for kinds of channels with probabilities P (c, n) and shares w (c,); H^Y: batch or `target`"
    here = counts > 0
    R = P * here[:, None]  # (draws, c, n)
    total = R.sum(2)
    alive = w * (total > 0)
    H = (alive[:, :, None] * R / torch.where(total > 0, total, 1)[:, :, None]).sum(1) / alive.sum(1, keepdim=True)
    Y = (counts if target is None else target) * here
    Y = Y / Y.sum(1, keepdim=True)
    return (weight * (H * (torch.where(here, H, 1) / torch.where(here, Y, 1)).log()).sum(1)).sum()


def best_histogram(P, counts, weight, target=None):
    "H^S with the smallest E L_KL, over the shares of the kinds of channels (rows of P)"
    z = torch.zeros(len(P), dtype=torch.double, requires_grad=True)
    tolerances = {"tolerance_grad": 1e-12, "tolerance_change": 1e-14}
    optimizer = torch.optim.LBFGS([z], max_iter=200, line_search_fn="strong_wolfe", **tolerances)

    def closure():
        optimizer.zero_grad()
        value = expected_kl(P, z.softmax(0), counts, weight, target)
        value.backward()
        return value

    optimizer.step(closure)
    return (z.softmax(0)[:, None] * P).sum(0).detach()


UNEQUAL = [(4, (0.298, 0.263, 0.233, 0.206)), (16, (0.399, 0.292, 0.193, 0.117)), (32, (0.408, 0.302, 0.195, 0.095))]


@pytest.mark.parametrize("m, expected", UNEQUAL)
def test_the_labels_of_the_batch_bias_the_histogram_of_unequal_classes(m, expected):
    "The bias over all draws is against rare classes in large batches, p·exp(-(1-p)/(2mp)), for them in small ones"
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.double)
    best = best_histogram(torch.eye(4, dtype=torch.double), *every_draw(p, m))
    torch.testing.assert_close(best, torch.tensor(expected).double(), rtol=0, atol=6e-4)
    assert (best[3] > 0.1) == (m < 20)
    if m == 32:
        first_order = p * (-(1 - p) / (2 * m * p)).exp()
        torch.testing.assert_close(best, first_order / first_order.sum(), rtol=0, atol=0.005)


def test_the_minimum_with_a_class_prior_is_nearly_at_the_prior_for_mixed_channels():
    "At the prior for pure channels, or with a favourite on top of the prior; for others only if no class is absent"
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.double)
    eye = torch.eye(4, dtype=torch.double)
    draws = every_draw(p, 4)
    torch.testing.assert_close(best_histogram(eye, *draws, target=p), p, rtol=0, atol=1e-6)
    torch.testing.assert_close(best_histogram(0.5 * eye + 0.5 * p, *draws, target=p), p, rtol=0, atol=1e-6)
    # with a trace of equal shares, a channel is live if its class is absent, and then counts for the others
    nearly_pure = 0.98 * eye + 0.005
    assert best_histogram(nearly_pure, *draws, target=p)[3].item() == pytest.approx(0.0105, abs=1e-4)
    counts, weight = draws
    whole = (counts > 0).all(1)
    best = best_histogram(nearly_pure, counts[whole], weight[whole], target=p)
    torch.testing.assert_close(best, p, rtol=0, atol=1e-6)


# ---- The purity of a batch ----


def activations(P, k, cv, draws, seed=0):
    "Activations (draws, 2, k, n) of a channel: two halves with k images per class, means n·P, spread `cv` times that"
    torch.manual_seed(seed)
    shape = 1 / cv**2
    return torch.distributions.Gamma(shape, shape).sample((draws, 2, k, len(P))).double() * P * len(P)


def reading(S):
    return S / S.sum(-1, keepdim=True)


@pytest.mark.parametrize("favourite", [None, 0.5])
def test_bias_of_purity_read_from_a_batch_and_from_two_halves(favourite):
    """Of q = ΣP², variance σ² in each class: [(1+3q)Σσ² - 4ΣPσ²]/(2kT²) plain, 2[qΣσ² - ΣPσ²]/(kT²) from two halves.
    The next order is smaller by cv²/k: three times that and five standard errors are what we allow"""
    n, k, cv = 20, 10, 0.5
    P = torch.full((n,), 1 / n, dtype=torch.double)
    if favourite is not None:
        P = torch.tensor([favourite] + [(1 - favourite) / (n - 1)] * (n - 1)).double()
    means = activations(P, k, cv, 20_000).mean(2)
    q, T, s2 = (P * P).sum(), n, (cv * n * P) ** 2
    plain = (reading(means.mean(1)) ** 2).sum(1) - q
    halves = reading(means).prod(1).sum(1) - q
    plain_law = ((1 + 3 * q) * s2.sum() - 4 * (P * s2).sum()) / (2 * k * T * T)
    halves_law = 2 * (q * s2.sum() - (P * s2).sum()) / (k * T * T)
    for bias, law in ((plain, plain_law), (halves, halves_law)):
        assert (bias.mean() - law).abs() < 5 * bias.std() / len(bias) ** 0.5 + 3 * cv * cv / k * law.abs()
    if favourite is None:
        assert plain.mean().item() == pytest.approx((n - 1) / n * cv**2 / (2 * k * n), rel=0.05)  # cv²/m, nearly
        assert halves.mean().abs() < 0.01 * plain.mean()


def test_purity_of_a_pure_channel_is_read_right():
    means = activations(torch.tensor([1.0, 0, 0]).double(), 3, 1.0, 50).mean(2)
    torch.testing.assert_close(reading(means).prod(1).sum(1), torch.ones(50, dtype=torch.double), **EXACT)


# ---- Optimisers ----


def trained(optimizer, weight, steps, **options):
    "Activations after some steps of training on both terms alone, weighted by `weight`"
    M, y = random_batch(0, m=42, balanced=True, spread=0.2)
    M.requires_grad_()
    loss, opt = GiniKLLoss(weight, weight), optimizer([M], **options)
    for _ in range(steps):
        opt.zero_grad()
        loss(M, y).backward()
        opt.step()
    return M.detach()


def test_adam_forgets_the_weight_of_terms_that_are_alone():
    strong, weak = (trained(torch.optim.Adam, w, 20, lr=0.01, eps=1e-30) for w in (0.5, 0.005))
    torch.testing.assert_close(strong, weak, **EXACT)


def test_sgd_keeps_the_proportion_to_the_weight():
    start, _ = random_batch(0, m=42, balanced=True, spread=0.2)
    moved = [trained(torch.optim.SGD, w, 1, lr=1.0) - start for w in (0.5, 0.005)]
    torch.testing.assert_close(moved[0], 100 * moved[1], **EXACT)


def test_feature_histogram_of_pure_channels_is_their_share():
    "One channel per class gives a uniform histogram"
    y = torch.arange(12) % 4
    shares = feature_histogram(class_probs(class_means(pure(4)(y), y)))
    torch.testing.assert_close(shares, torch.full((4,), 0.25).double(), **EXACT)
