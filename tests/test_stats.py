"The judgement of results: each function against scipy or hand values; the rule on made-up runs; bad input."

import itertools, warnings

import numpy as np
import pytest

import pandas as pd
from hypothesis import given, settings, strategies as st
from scipy import stats

pytest.importorskip('fastai', reason="the judged tables are of trained runs")
from gini_loss.paper import (
    PAPER,
    arm_pairs,
    compare,
    compare_arms,
    judge,
    judgement_rule,
    paper_claims,
    paper_table,
    seed_pairs,
)
from gini_loss.stats import (
    PairedDifference,
    holm,
    mean_difference,
    paired_difference,
    paired_images,
    pairs_needed,
    sign_flip_test,
    smallest_detectable,
)

METRICS = {'CIFAR-100': 'cifar', 'Caltech 101': 'caltech'}


def made_up_runs(gains, seeds=range(5), losses=('ce', 'both'), sd=0.2, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        [
            dict(
                arch=arch,
                loss=loss,
                seed=s,
                cifar=(70 + s / 10 + gains.get((arch, loss), 0) + rng.normal(0, sd)) / 100,
                caltech=(60 + s / 10 + rng.normal(0, sd)) / 100,
            )
            for arch in {a for a, _ in gains}
            for s in seeds
            for loss in losses
        ]
    )


# ---- pairs


def test_paired_difference_is_scipys_paired_t():
    rng = np.random.default_rng(1)
    for n in (2, 3, 5, 20):
        a, b = rng.normal(72, 1, (2, n))
        got = paired_difference(dict(enumerate(a)), pd.Series(b), confidence=0.9)
        test = stats.ttest_rel(a, b)
        low, high = test.confidence_interval(0.9)
        np.testing.assert_allclose(
            [got.mean, got.low, got.high, got.p_t], [np.mean(a - b), low, high, test.pvalue], rtol=1e-9
        )
        assert got.n == n and got.differences.tolist() == (a - b).tolist()


def test_pairs_go_by_seed_and_not_by_position():
    ours, baseline = {3: 73.0, 1: 71.0, 2: 72.5, 9: 0.0}, {1: 70.0, 2: 71.0, 3: 72.0, 8: 100.0}
    got = paired_difference(ours, baseline)
    assert got.differences.to_dict() == {1: 1.0, 2: 1.5, 3: 1.0} and got.n == 3
    assert got.differences.equals(paired_difference(dict(reversed(ours.items())), baseline).differences)


def test_swapping_the_two_turns_the_interval_round():
    a, b = {0: 71.0, 1: 72.0, 2: 72.4}, {0: 70.0, 1: 71.9, 2: 71.0}
    one, two = paired_difference(a, b), paired_difference(b, a)
    np.testing.assert_allclose([one.mean, one.low, one.high, one.p_t], [-two.mean, -two.high, -two.low, two.p_t])


@pytest.mark.parametrize('shift', [0, 0.5, -0.01])
def test_differences_without_spread_are_never_significant(shift):
    base = {0: 71.13, 1: 72.41, 2: 71.77}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        got = paired_difference({s: a + shift for s, a in base.items()}, base)
    assert got.p_t == 1 and np.isnan([got.low, got.high]).all() and got.mean == pytest.approx(shift)
    assert judge(got, 1.0) == 'not detected'


@pytest.mark.parametrize(
    'ours, baseline, error, message',
    [
        ([71.0, 72.0], {0: 71.0, 1: 72.0}, TypeError, "ours must be a mapping"),
        ({0: 71.0, 1: 72.0}, np.array([71.0, 72.0]), TypeError, "baseline must be a mapping"),
        ({0: 71.0}, {0: 70.0}, ValueError, "at least 2 seeds"),
        ({0: 71.0, 1: 72.0}, {2: 71.0, 3: 72.0}, ValueError, "got 0"),
        ({}, {}, ValueError, "at least 2 seeds"),
        (pd.Series([71.0, 72.0], index=[4, 4]), {4: 71.0, 5: 72.0}, ValueError, "more than one accuracy for seed 4"),
        ({0: 71.0, 1: 72.0}, {0: float('nan'), 1: 70.0}, ValueError, "from 0 to 100 percent, got nan for seed 0"),
        ({0: 71.0, 1: float('inf')}, {0: 70.0, 1: 70.0}, ValueError, "got inf for seed 1"),
        ({0: 171.0, 1: 72.0}, {0: 70.0, 1: 70.0}, ValueError, "got 171"),
        ({0: -1.0, 1: 72.0}, {0: 70.0, 1: 70.0}, ValueError, "got -1"),
        ({0: 0.71, 1: 0.72}, {0: 0.70, 1: 0.71}, ValueError, "fractions"),
    ],
)
def test_paired_difference_refuses(ours, baseline, error, message):
    with pytest.raises(error, match=message):
        paired_difference(ours, baseline)


@pytest.mark.parametrize('confidence', [0, 1, 95, -0.5, float('nan')])
def test_confidence_is_a_probability(confidence):
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        paired_difference({0: 71, 1: 72}, {0: 70, 1: 70.5}, confidence)


def test_coverage_of_the_t_interval_at_five_pairs():
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(600):
        base = rng.normal(72, 0.4, 5)
        got = paired_difference(pd.Series(base + 0.5 + rng.normal(0, 0.3, 5)), pd.Series(base))
        inside += got.low <= 0.5 <= got.high
    assert 0.92 <= inside / 600 <= 0.98


# ---- sign flips


def by_counting(d):
    signs = np.array(list(itertools.product([1, -1], repeat=len(d))))
    return np.mean(np.abs(signs @ d) >= abs(np.sum(d)) - 1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-300, 300), min_size=1, max_size=9))
def test_sign_flips_are_counted(hundredths):
    d = np.array(hundredths) / 100
    got = sign_flip_test(d)
    assert got.p == pytest.approx(by_counting(d)) and got.exact and got.n == len(d)
    assert got.minimum_p == min(1, 2 * 0.5 ** len(d)) <= got.p <= 1
    assert sign_flip_test(-d).p == got.p


def test_sign_flips_agree_with_scipy():
    d = np.random.default_rng(3).normal(0.4, 1, 8)
    want = stats.permutation_test(
        (d,), lambda x, axis: x.mean(axis), permutation_type='samples', n_resamples=np.inf
    ).pvalue
    assert sign_flip_test(d).p == pytest.approx(want)


def test_ties_by_rounding_are_ties():
    d = np.array([71.5 - 71.2, 70.3 - 70.0, 0.6])  # 0.3, 0.3, 0.6 in exact numbers: ±0.3 ± 0.3 ± 0.6
    assert sign_flip_test(d).p == 2 / 8 and sign_flip_test([0.3, 0.3, -0.6]).p == 1


def test_five_pairs_cannot_reach_five_percent():
    assert sign_flip_test([1, 2, 3, 4, 5]).p == sign_flip_test(np.ones(5)).minimum_p == 0.0625
    assert sign_flip_test(np.ones(6)).p == 0.03125


def test_twenty_is_exact_and_more_is_sampled():
    d = np.random.default_rng(4).normal(0.5, 1, 21)
    assert sign_flip_test(d[:20]).exact
    got = sign_flip_test(d)
    assert not got.exact and got.p == sign_flip_test(d).p and got.minimum_p == 2e-5
    assert got.p == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.02)


@pytest.mark.parametrize(
    'bad, message',
    [
        ([], "non-empty"),
        ([[1, 2]], r"shape \(1, 2\)"),
        (3.0, r"shape \(\)"),
        ([1, float('nan')], "finite"),
        ([1, float('inf')], "finite"),
    ],
)
def test_sign_flip_refuses(bad, message):
    with pytest.raises(ValueError, match=message):
        sign_flip_test(bad)


# ---- Holm


def holm_by_hand(p):
    out, running = [None] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        running = max(running, min(1.0, p[i] * (len(p) - rank)))
        out[i] = running
    return out


probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=8)


@settings(max_examples=15, deadline=None)
@given(probabilities)
def test_holm_by_hand(p):
    got = holm(p)
    np.testing.assert_allclose(got, holm_by_hand(p), atol=1e-12)
    assert (got >= np.array(p) - 1e-12).all()


@settings(max_examples=15, deadline=None)
@given(probabilities, st.data())
def test_a_comparison_that_is_run_later_takes_no_verdict_back(p, data):
    waiting = data.draw(st.lists(st.booleans(), min_size=len(p), max_size=len(p)))
    early = [1.0 if w else o for o, w in zip(p, waiting)]
    assert (holm(p) <= holm(early) + 1e-12).all()


def test_holm_keeps_the_index():
    p = pd.Series([0.03, 0.01], index=['a', 'b'])
    assert holm(p).to_dict() == pytest.approx({'a': 0.03, 'b': 0.02})


@pytest.mark.parametrize('bad', [[], [0.1, float('nan')], [-0.1], [1.1], 0.5, [[0.1]]])
def test_holm_refuses(bad):
    with pytest.raises(ValueError, match="p_values|p-values"):
        holm(bad)


# ---- power


@pytest.mark.parametrize('n', [5, 8, 10, 20, 60])
@pytest.mark.parametrize('power', [0.5, 0.8, 0.9])
def test_smallest_detectable_is_the_noncentral_t_where_that_answers(n, power):
    effect = smallest_detectable(1, n, power)
    bar, shift = stats.t.isf(0.025, n - 1), effect * n**0.5
    assert stats.nct.sf(bar, n - 1, shift) + stats.nct.cdf(-bar, n - 1, shift) == pytest.approx(power, abs=1e-3)
    assert smallest_detectable(0.37, n, power) == pytest.approx(0.37 * effect)


@pytest.mark.parametrize('n, alpha', [(2, 0.05), (2, 0.05 / 8), (3, 0.05 / 8), (5, 0.05 / 8), (4, 0.001)])
def test_smallest_detectable_by_simulation(n, alpha):
    x = np.random.default_rng(5).normal(smallest_detectable(1, n, alpha=alpha), 1, (20_000, n))
    assert np.mean(stats.ttest_1samp(x, 0, axis=1).pvalue <= alpha) == pytest.approx(0.8, abs=0.015)


@pytest.mark.parametrize('alpha', [0.05, 0.05 / 8, 0.05 / 20, 0.001])
def test_more_pairs_and_looser_levels_detect_less(alpha):
    sizes = [smallest_detectable(0.4, n, alpha=alpha) for n in range(2, 15)]
    assert all(a > b for a, b in zip(sizes, sizes[1:])) and smallest_detectable(
        0.4, 5, alpha=alpha
    ) <= smallest_detectable(0.4, 5, alpha=alpha / 2)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 3), st.floats(0.05, 1))
def test_pairs_needed_inverts(difference, sd):
    n = pairs_needed(-difference, sd)
    assert smallest_detectable(sd, n) <= difference * (1 + 1e-6)
    assert n == 2 or smallest_detectable(sd, n - 1) > difference * (1 - 1e-6)


def test_no_spread_needs_two_pairs():
    assert pairs_needed(0.1, 0) == 2 and smallest_detectable(0, 5) == 0


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: smallest_detectable(-1, 5), "sd must be"),
        (lambda: smallest_detectable(float('nan'), 5), "sd must be"),
        (lambda: smallest_detectable(1, 1), "at least 2 pairs"),
        (lambda: smallest_detectable(1, 2.5), "whole number"),
        (lambda: smallest_detectable(1, 5, power=1), "power must lie"),
        (lambda: smallest_detectable(1, 5, alpha=0), "alpha must lie"),
        (lambda: smallest_detectable(1, 5, power=0.01), "power must exceed alpha"),
        (lambda: pairs_needed(0, 1), "difference must be"),
        (lambda: pairs_needed(float('inf'), 1), "difference must be"),
    ],
)
def test_power_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_absurd_number_of_pairs_is_said():
    with pytest.raises(OverflowError, match="more than a million"):
        pairs_needed(1e-4, 1)


# ---- images


def test_paired_images_against_the_binomial_and_hand():
    rng = np.random.default_rng(6)
    a, b = rng.random((2, 500)) < 0.7
    got = paired_images(a, b)
    table = np.array([[np.sum((a == x) & (b == y)) for y in (True, False)] for x in (True, False)])
    only_a, only_b = table[0, 1], table[1, 0]  # McNemar: a fair coin for each image on which they disagree
    assert got.p == pytest.approx(min(1, 2 * stats.binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)))
    assert (got.only_ours, got.only_baseline, got.n) == (table[0, 1], table[1, 0], 500)
    assert got.difference == pytest.approx(100 * (a.mean() - b.mean())) and got.low < got.difference < got.high
    x, y, n = table[0, 1] + 0.5, table[1, 0] + 0.5, 502  # Agresti and Min: half an image more in each cell
    half = stats.norm.ppf(0.975) * ((x + y) - (x - y) ** 2 / n) ** 0.5 / n
    np.testing.assert_allclose([got.low, got.high], [100 * ((x - y) / n - half), 100 * ((x - y) / n + half)])


def test_paired_images_turns_round_and_takes_zeros_and_ones():
    a, b = np.array([1, 1, 0, 1, 0]), np.array([1, 0, 0, 0, 1])
    one, two = paired_images(a, b), paired_images(b.astype(bool), a.astype(float))
    np.testing.assert_allclose(
        [one.difference, one.low, one.high, one.p], [-two.difference, -two.high, -two.low, two.p]
    )


def test_two_that_never_disagree_keep_a_width():
    got = paired_images([True] * 50, [True] * 50)
    assert got.difference == 0 and got.p == 1 and got.low < 0 < got.high
    assert paired_images([True], [False]).high <= 100


def test_coverage_of_the_images_interval():
    rng = np.random.default_rng(7)
    inside = 0
    for _ in range(400):
        kind = rng.choice(3, 200, p=[0.12, 0.08, 0.8])
        got = paired_images(kind != 1, kind != 0)
        inside += got.low <= 4 <= got.high
    assert 0.92 <= inside / 400 <= 0.985


@pytest.mark.parametrize(
    'a, b, message',
    [
        ([True, False], [True], "shapes"),
        ([], [], "shapes"),
        ([[True]], [[True]], "shapes"),
        ([3, 41], [3, 40], "True or False"),
        ([0.5, 1], [1, 1], "True or False"),
        ([float('nan'), 1], [1, 1], "True or False"),
    ],
)
def test_paired_images_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired_images(a, b)


# ---- the verdict


def difference(mean, p):
    return PairedDifference(mean, mean - 1, mean + 1, 5, pd.Series(dtype=float), p)


@pytest.mark.parametrize(
    'mean, p, paper, adjusted, verdict',
    [
        (1.0, 0.01, 1.12, None, 'replicated'),
        (-1.0, 0.01, -1.6, None, 'replicated'),
        (-1.0, 0.01, 1.12, None, 'contradicted'),
        (1.0, 0.01, -1.6, None, 'contradicted'),
        (1.0, 0.01, 1.12, 0.08, 'not detected'),
        (-1.0, 0.01, 1.12, 0.08, 'not detected'),
        (1.0, 0.2, 1.12, None, 'not detected'),
        (1.0, 0.01, 1.12, 0.05, 'replicated'),
        (1.0, 0.01, None, None, 'higher'),
        (-1.0, 0.01, None, 0.02, 'lower'),
        (1.0, 0.3, None, None, 'not detected'),
    ],
)
def test_judge(mean, p, paper, adjusted, verdict):
    assert judge(difference(mean, p), paper, adjusted) == verdict


def test_judge_without_pairs():
    assert judge(None, 1.0) == judge(None) == judge(None, 1.0, float('nan')) == 'not run'


@pytest.mark.parametrize(
    'paper, adjusted, alpha, message',
    [
        (0.0, None, 0.05, "finite and not zero"),
        (float('nan'), None, 0.05, "finite and not zero"),
        (1.0, 0.001, 0.05, "unadjusted"),
        (1.0, 1.5, 0.05, "p_adjusted"),
        (1.0, float('nan'), 0.05, "p_adjusted"),
        (1.0, None, 5, "alpha"),
    ],
)
def test_judge_refuses(paper, adjusted, alpha, message):
    with pytest.raises(ValueError, match=message):
        judge(difference(1.0, 0.01), paper, adjusted, alpha)


def test_the_rule_names_every_verdict_and_its_level():
    rule = judgement_rule(0.01, 0.9)
    for word in (
        'replicated',
        'contradicted',
        'not detected',
        'not run',
        'higher',
        'lower',
        'p ≤ 0.01',
        '99 %',
        'probability 0.9',
    ):
        assert word in rule


# ---- the paper


def test_the_papers_tables():
    assert len(PAPER) == 20 and len(paper_table(1)) == 16 and len(paper_table(2)) == 4
    both = paper_table(1).merge(paper_table(2), on=['arch', 'data', 'loss'])
    assert (both.mean_x == both.mean_y).all() and len(both) == 2  # ResNet-18 on CIFAR-100 stands in both tables
    with pytest.raises(ValueError, match="got 3"):
        paper_table(3)
    with pytest.raises(ValueError, match="ddof"):
        paper_claims(1, ddof=2)


@pytest.mark.parametrize('ddof', [0, 1])
def test_the_papers_intervals_are_welchs(ddof):
    got = paper_claims(1, ddof=ddof).set_index(['arch', 'data']).loc[('resnet18', 'CIFAR-100')]

    def sample(mean, sd):  # five values with just this mean and standard deviation
        x = np.array([-2.0, -1, 0, 1, 2])
        return mean + sd * x / x.std(ddof=ddof)

    test = stats.ttest_ind(sample(72.34, 0.13), sample(71.47, 0.36), equal_var=False)
    low, high = test.confidence_interval()
    np.testing.assert_allclose([got.paper_low, got.paper_high, got.paper_p], [low, high, test.pvalue])
    assert got.paper_difference == 0.87


def test_two_of_the_papers_eight_gains_stand_out():
    claims = paper_claims(1)
    assert claims[holm(claims.paper_p) <= 0.05].arch.tolist() == ['resnet17', 'resnet18'] and claims[
        holm(claims.paper_p) <= 0.05
    ].data.unique() == ['CIFAR-100']


# ---- frames


def test_compare_judges_table_1():
    runs = made_up_runs({('resnet17', 'both'): 3, ('resnet18', 'both'): -3, ('resnet50', 'both'): 0})
    got = compare(runs.sample(frac=1, random_state=0), METRICS, paper_claims(1)).set_index(['arch', 'data'])
    assert len(got) == 8
    verdicts = got.verdict.to_dict()
    assert verdicts[('resnet17', 'CIFAR-100')] == 'replicated' and verdicts[('resnet18', 'CIFAR-100')] == 'contradicted'
    assert (
        verdicts[('resnet50', 'CIFAR-100')] == 'not detected'
        and verdicts[('cvt7', 'CIFAR-100')] == verdicts[('cvt7', 'Caltech 101')] == 'not run'
    )
    row, pick = (
        got.loc[('resnet17', 'CIFAR-100')],
        runs[runs.arch == 'resnet17'].pivot(index='seed', columns='loss', values='cifar'),
    )
    pick = 100 * pick
    want = paired_difference(pick['both'], pick['ce'])
    np.testing.assert_allclose(
        [row.difference, row.low, row.high, row.p_t, row.n, row.ours, row.baseline],
        [want.mean, want.low, want.high, want.p_t, 5, pick['both'].mean(), pick['ce'].mean()],
    )
    assert (
        row.detectable == pytest.approx(smallest_detectable(row.sd, 5, alpha=0.05 / 8)) and row.p_sign_minimum == 0.0625
    )
    ran = got.n > 0
    np.testing.assert_allclose(got.p_holm[ran], holm(got.p_t.fillna(1))[ran])
    assert got.p_holm[~ran].isna().all() and row.paper_inside == False and got.paper_inside[~ran].isna().all()


def test_compare_judges_table_2_where_drops_are_claimed():
    runs = made_up_runs(
        {('resnet18', 'gini'): -2, ('resnet18', 'kl'): 2, ('resnet18', 'both'): 2}, losses=('ce', 'gini', 'kl', 'both')
    )
    got = compare(runs, {'CIFAR-100': 'cifar'}, paper_claims(2))
    assert dict(zip(got.loss, got.verdict)) == {'gini': 'replicated', 'kl': 'contradicted', 'both': 'replicated'}


def test_compare_without_claims():
    runs = made_up_runs({('narrow', 'both'): 2, ('narrow', 'gini'): -2}, losses=('ce', 'gini', 'both'))
    got = compare(runs, {'test': 'cifar'}, treatments=('gini', 'kl', 'both'))
    assert dict(zip(got.loss, got.verdict)) == {'gini': 'lower', 'kl': 'not run', 'both': 'higher'}


def test_one_seed_or_no_partner_is_not_run():
    runs = made_up_runs({('resnet17', 'both'): 3})
    one = runs[(runs['loss'] == 'ce') | (runs.seed == 0)]
    got = compare(one, METRICS, paper_claims(1))
    assert (got.verdict == 'not run').all() and got.n.max() == 1
    assert (compare(runs[runs['loss'] == 'both'], METRICS, paper_claims(1)).verdict == 'not run').all()
    assert (compare(runs[:0], METRICS, paper_claims(1)).verdict == 'not run').all() and len(
        compare(runs[:0], METRICS)
    ) == 0


def test_an_accuracy_that_was_not_measured_leaves_its_pair_out():
    runs = made_up_runs({('resnet17', 'both'): 3})
    runs.loc[runs.seed == 2, 'caltech'] = np.nan
    pairs = seed_pairs(runs, METRICS)
    assert pairs.groupby('data').seed.apply(list).to_dict() == {
        'CIFAR-100': [0, 1, 2, 3, 4],
        'Caltech 101': [0, 1, 3, 4],
    }


def test_equal_differences_in_a_frame():
    runs = pd.DataFrame(
        [
            dict(arch='a', loss=l, seed=s, cifar=(70.0 + s + (l == 'both')) / 100)
            for s in range(3)
            for l in ('ce', 'both')
        ]
    )
    got = compare(runs, {'CIFAR-100': 'cifar'}).iloc[0]
    assert got.verdict == 'not detected' and got.difference == 1 and np.isnan(got.detectable)


def test_mixed_configurations_are_refused_unless_told_apart():
    off = [0.3, -0.3, 0.1, -0.1, 0.2]  # no clear difference, then the same and 3 points
    runs = pd.DataFrame(
        [
            dict(
                arch='resnet18',
                weight=w,
                loss=l,
                seed=s,
                cifar=(70 + (l == 'both') * (w + off[s])) / 100,
                caltech=0.6 + s / 100,
            )
            for w in (0, 3)
            for l in ('ce', 'both')
            for s in range(5)
        ]
    )
    with pytest.raises(ValueError, match="more than one run has arch='resnet18'"):
        compare(runs, METRICS)
    got = compare(runs, {'CIFAR-100': 'cifar'}, by=('arch', 'weight')).set_index('weight')
    assert got.verdict.to_dict() == {0: 'not detected', 3: 'higher'}


def test_hashes_that_agree_are_no_hindrance():
    runs = made_up_runs({('resnet17', 'both'): 3}).assign(pair_hash='a')
    runs['config_hash'] = runs['loss']
    assert compare(runs, METRICS, paper_claims(1)).verdict[0] == 'replicated'


@pytest.mark.parametrize(
    'change, kwargs, error, message',
    [
        (lambda r: r.drop(columns='seed'), {}, ValueError, "no column 'seed'"),
        (lambda r: r.drop(columns='loss'), {}, ValueError, "no column 'loss'"),
        (lambda r: r.drop(columns='cifar'), {}, ValueError, "no column 'cifar'"),
        (lambda r: r, dict(metrics='cifar'), TypeError, "metrics must be a mapping"),
        (
            lambda r: r,
            dict(metrics={'CIFAR-100': 'cifar'}, claims=paper_claims(1)),
            ValueError,
            "no column for 'Caltech 101'",
        ),
        (lambda r: r, dict(treatments=('ce', 'both')), ValueError, "also among the treatments"),
        (lambda r: r.assign(seed=[None, *r.seed[1:]]), {}, ValueError, "column 'seed' has missing values"),
        (lambda r: r.assign(cifar=r.cifar * 100), {}, ValueError, "divide percentages by 100"),
        (lambda r: r, dict(by=[]), ValueError, "by is empty"),
        (lambda r: r.assign(pair_hash=[*'abababab', 'a', 'a']), {}, ValueError, "must not be mixed.*'pair_hash'"),
        (lambda r: r.assign(config_hash=[*'abababab', 'c', 'b']), {}, ValueError, "must not be mixed.*'config_hash'"),
    ],
)
def test_compare_refuses(change, kwargs, error, message):
    runs = made_up_runs({('resnet17', 'both'): 1})
    with pytest.raises(error, match=message):
        compare(change(runs), **{'metrics': METRICS, **kwargs})


def test_false_alarms_of_the_whole_rule_stay_rare():
    wrong = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        runs = pd.DataFrame(
            [
                dict(arch=a, loss=l, seed=s, cifar=rng.normal(0.72, 0.004), caltech=rng.normal(0.63, 0.01))
                for a in ('resnet17', 'resnet18', 'resnet50', 'cvt7')
                for s in range(5)
                for l in ('ce', 'both')
            ]
        )
        wrong += compare(runs, METRICS, paper_claims(1)).verdict.isin(['replicated', 'contradicted']).any()
    assert wrong <= 6  # 1.5 expected of 30; more than 6 has a probability below 0.1 %


# ---- arms

ARMS = dict(ce=dict(loss='ce'), both=dict(loss='both'), heavy=dict(loss='both', weight=5.0))


def runs_of_arms(gains, seeds=range(5)):
    "Made-up runs: (loss, optimizer, weight) → gain in points"
    noise = np.random.default_rng(0).normal(0, 0.05, 100)
    rows = [
        dict(
            loss=l,
            optimizer=o,
            weight=w,
            seed=s,
            pair_hash=o,
            config_hash=f'{l}{o}{w}',
            test_accuracy=(70 + s + gain + noise[7 * s + i]) / 100,
            layer_gini=0.9 - gain / 10 + noise[s + i] / 100,
        )
        for i, ((l, o, w), gain) in enumerate(gains.items())
        for s in seeds
    ]
    return pd.DataFrame(rows)


def test_arms_are_judged_against_their_own_baseline():
    "Cross-entropy with SGD is the partner of the arm with SGD, and that with Adam of the others"
    runs = runs_of_arms(
        {('ce', 'adam', 0.0): 0, ('both', 'adam', 0.5): 2, ('ce', 'sgd', 0.0): 5, ('both', 'sgd', 0.5): 3}
    )
    arms = {name: dict(loss='both', optimizer=name) for name in ('adam', 'sgd')} | dict(later=dict(loss='kl'))
    got = compare_arms(runs, arms, 'ce').set_index('arm')
    assert got.verdict.to_dict() == dict(adam='higher', sgd='lower', later='not run') and got.n.to_dict() == dict(
        adam=5, sgd=5, later=0
    )
    assert got.difference['adam'] == pytest.approx(2, abs=0.2) and got.difference['sgd'] == pytest.approx(-2, abs=0.2)
    np.testing.assert_allclose(
        got.p_holm[['adam', 'sgd']], holm([*got.p_t[['adam', 'sgd']], 1])[:2]
    )  # what was not run counts
    assert compare_arms(runs, arms, dict(loss='ce')).set_index('arm').verdict.equals(got.verdict)
    pairs = arm_pairs(runs, arms, dict(loss='ce')).query("arm == 'sgd'")
    want = mean_difference(pairs.set_index('seed').difference)
    np.testing.assert_allclose([got.low['sgd'], got.high['sgd'], got.p_t['sgd']], [want.low, want.high, want.p_t])


def test_several_metrics_are_one_table():
    runs = runs_of_arms({('ce', 'adam', 0.0): 0, ('both', 'adam', 0.5): 2, ('both', 'adam', 5.0): -2})
    arms = dict(ARMS, both=dict(loss='both', weight=0.5))
    got = compare_arms(runs, arms, 'ce', ['test_accuracy', 'layer_gini']).set_index(['metric', 'arm'])
    assert len(got) == 4 and 'ce' not in got.index.get_level_values('arm')
    assert got.verdict['test_accuracy', 'both'] == 'higher' and got.verdict['layer_gini', 'both'] == 'lower'
    assert got.ours['test_accuracy', 'both'] == pytest.approx(74, abs=0.2) and got.ours[
        'layer_gini', 'both'
    ] == pytest.approx(0.7, abs=0.01)
    np.testing.assert_allclose(got.p_holm, holm(got.p_t))


def test_seeds_without_a_partner_and_missing_values_are_left_out():
    runs = runs_of_arms({('ce', 'adam', 0.0): 0, ('both', 'adam', 0.5): 2})
    runs = runs[(runs.loss == 'ce') | (runs.seed < 4)]
    runs.loc[(runs.loss == 'both') & (runs.seed == 2), 'test_accuracy'] = np.nan
    assert arm_pairs(runs, dict(both=dict(loss='both')), dict(loss='ce')).seed.tolist() == [0, 1, 3]
    assert compare_arms(runs[runs.seed > 2], dict(both=dict(loss='both'))).verdict.tolist() == ['not run']
    assert len(compare_arms(runs, {})) == 0 and len(compare_arms(runs[:0], dict(both=dict(loss='both')))) == 1


@pytest.mark.parametrize(
    'change, arms, metric, message',
    [
        (lambda r: r, dict(both=dict(loss='both')), 'luck', "no column 'luck'"),
        (lambda r: r, dict(both=dict(lambda_gini=0.5)), 'test_accuracy', "has no column lambda_gini"),
        (lambda r: r.assign(test_accuracy=70.0), dict(both=dict(weight=0.5)), 'test_accuracy', "divide percentages by"),
        (lambda r: r, dict(both=dict(loss='both')), 'test_accuracy', "several configurations"),
        (lambda r: pd.concat([r, r[-1:]]), dict(heavy=dict(weight=5.0)), 'test_accuracy', "two runs of seed 4"),
    ],
)
def test_arms_refuse(change, arms, metric, message):
    runs = change(runs_of_arms({('ce', 'adam', 0.0): 0, ('both', 'adam', 0.5): 2, ('both', 'adam', 5.0): 1}))
    with pytest.raises(ValueError, match=message):
        compare_arms(runs, arms, 'ce', metric)


@pytest.mark.parametrize('differences', [[], [1.0], [1, 2, np.nan], pd.Series([1, np.inf])])
def test_a_mean_difference_needs_two_finite_numbers(differences):
    "A seed without a partner is NaN in a difference of two Series, and would give the mean of the others"
    with pytest.raises(ValueError, match='at least 2 finite numbers, got .* without a partner'):
        mean_difference(differences)
    assert mean_difference([1, 2, 3]).mean == 2


def test_the_old_places_work_with_a_warning():
    from gini_loss import stats as old

    with pytest.warns(DeprecationWarning, match='gini_loss.paper.compare'):
        assert old.compare is compare
    with pytest.raises(AttributeError):
        old.nothing  # noqa: B018
