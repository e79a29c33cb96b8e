"""Invalid input: each kind has its own message, which says what to do. Unusual but valid input is accepted."""

import math
import warnings

import numpy as np
import pytest
import torch

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
from gini_loss.targets import MixedTargets

# ---- Invalid input: each kind has its own message ----

A4, Y4, SOFT = torch.rand(4, 3), torch.tensor([0, 1, 2, 0]), torch.eye(3)[[0, 1, 2, 0]]
LEAF = torch.rand(4, 3, requires_grad=True)
BAD = {
    'label below 0': (
        lambda: GiniKLLoss()(A4, torch.tensor([0, -1, 2, 0])),
        ValueError,
        r"label -1 is below 0.*ignore_index \(-100\)",
    ),
    'label at n_classes': (
        lambda: GiniKLLoss(n_classes=2)(A4, Y4),
        ValueError,
        r"label 2 is not below n_classes=2: labels must be 0 to 1",
    ),
    'label above n_classes': (
        lambda: GiniKLLoss(n_classes=2)(A4, Y4 + 7),
        ValueError,
        r"label 9 is not below n_classes=2",
    ),
    'int32 labels': (lambda: GiniKLLoss()(A4, Y4.int()), TypeError, r"must be int64, got torch.int32: call \.long\(\)"),
    'float labels': (
        lambda: GiniKLLoss()(A4, Y4.float()),
        TypeError,
        r"must be int64, got torch.float32.*soft targets",
    ),
    'bool labels': (lambda: GiniKLLoss()(A4, Y4 > 0), TypeError, r"must be int64, got torch.bool"),
    'too few labels': (lambda: GiniKLLoss()(A4, Y4[:3]), ValueError, r"3 targets for 4 rows"),
    'too many labels': (lambda: GiniKLLoss()(A4, torch.cat([Y4, Y4])), ValueError, r"8 targets for 4 rows"),
    'labels of 0 dimensions': (
        lambda: GiniKLLoss()(A4, torch.tensor(1)),
        ValueError,
        r"labels \(m,\) or distributions \(m, n\), got shape \(\)",
    ),
    'labels of 3 dimensions': (lambda: GiniKLLoss()(A4, SOFT[..., None]), ValueError, r"got shape \(4, 3, 1\)"),
    'labels as a list': (
        lambda: GiniKLLoss()(A4, [0, 1, 2, 0]),
        TypeError,
        r"targets must be a torch.Tensor, got list",
    ),
    'integer one-hot': (
        lambda: GiniKLLoss()(A4, SOFT.long()),
        TypeError,
        r"must be floating point \(one-hot, soft or multi-hot\), got torch.int64",
    ),
    'integer labels in a column': (
        lambda: GiniKLLoss()(A4, Y4[:, None]),
        ValueError,
        r"\(4, 1\) have one column.*for labels call \.squeeze\(1\),",
    ),
    'integer labels in a column, one class': (
        lambda: GiniKLLoss(n_classes=1)(A4, Y4[:, None]),
        ValueError,
        r"for labels call \.squeeze\(1\),",
    ),
    'float labels in a column': (
        lambda: GiniKLLoss()(A4, Y4[:, None].float()),
        ValueError,
        r"have one column.*for labels call \.squeeze\(1\)\.long\(\).*\[1-p, p\]",
    ),
    'class_means of labels in a column': (lambda: class_means(A4, Y4[:, None]), ValueError, r"\.squeeze\(1\)"),
    'mixed labels below 0': (
        lambda: GiniKLLoss()(A4, MixedTargets(Y4, Y4 - 1, 0.5)),
        ValueError,
        r"label -1 is below 0",
    ),
    'mixed labels above n_classes': (
        lambda: GiniKLLoss(n_classes=3)(A4, MixedTargets(Y4, Y4 + 1, 0.5)),
        ValueError,
        r"label 3 is not below n_classes=3",
    ),
    'mixed one-hot': (
        lambda: GiniKLLoss()(A4, MixedTargets(SOFT, SOFT, 0.5)),
        ValueError,
        r"mixed targets must be labels \(m,\), got shape \(4, 3\)",
    ),
    'too few mixed labels': (
        lambda: GiniKLLoss()(A4, MixedTargets(Y4[:3], Y4[:3], 0.5)),
        ValueError,
        r"3 targets for 4 rows",
    ),
    'fewer other labels': (
        lambda: MixedTargets(Y4, Y4[:3], 0.5),
        ValueError,
        r"one label and one other label, got shapes \(4,\) and \(3,\)",
    ),
    'mixed lists': (lambda: MixedTargets([0, 1], [1, 0], 0.5), TypeError, r"labels must be a torch.Tensor, got list"),
    'shares of fewer images': (
        lambda: MixedTargets(Y4, Y4, torch.rand(3)),
        ValueError,
        r"lam must be one share, or one for each of the 4 images, got 3",
    ),
    'soft below 0': (
        lambda: GiniKLLoss()(A4, SOFT - 0.1),
        ValueError,
        r"soft targets must be finite and not negative, got values from -0.1 to 0.9",
    ),
    'soft NaN': (lambda: GiniKLLoss()(A4, SOFT * math.nan), ValueError, r"soft targets must be finite"),
    'soft infinite': (lambda: GiniKLLoss()(A4, SOFT / 0.0), ValueError, r"soft targets must be finite"),
    'soft too large': (
        lambda: GiniKLLoss()(A4, SOFT * 3e38),
        ValueError,
        r"soft targets of up to 3e\+38 are too large",
    ),
    'soft of the wrong width': (
        lambda: GiniKLLoss(n_classes=4)(A4, SOFT),
        ValueError,
        r"\(4, 3\) have 3 columns for n_classes=4",
    ),
    'n_classes 0': (
        lambda: GiniKLLoss(n_classes=0)(A4, Y4),
        ValueError,
        r"n_classes must be a positive integer, got 0",
    ),
    'n_classes a float': (
        lambda: GiniKLLoss(n_classes=3.0)(A4, Y4),
        ValueError,
        r"n_classes must be a positive integer, got 3.0",
    ),
    'ignore_index None': (
        lambda: GiniKLLoss(ignore_index=None)(A4, Y4),
        TypeError,
        r"ignore_index must be an integer, got None",
    ),
    'NaN': (
        lambda: GiniKLLoss()(A4.clone().fill_(math.nan), Y4),
        ValueError,
        r"activations are NaN or infinite.* in 3 of 3 channels",
    ),
    'one NaN': (
        lambda: GiniKLLoss()(A4.index_fill(1, torch.tensor([1]), math.nan), Y4),
        ValueError,
        r"NaN or infinite.* in 1 of 3 channels",
    ),
    'infinite': (lambda: GiniKLLoss()(A4 / 0.0, Y4), ValueError, r"activations are NaN or infinite"),
    'minus infinite': (lambda: GiniKLLoss()(-A4 / 0.0, Y4), ValueError, r"activations are NaN or infinite"),
    'minus infinite under relu': (lambda: GiniKLLoss(rectify='relu')(-A4 / 0.0, Y4), ValueError, r"infinite"),
    'NaN under none': (
        lambda: GiniKLLoss(rectify='none')(A4 * math.nan, Y4),
        ValueError,
        r"activations are NaN or infinite",
    ),
    'negative under none': (
        lambda: GiniKLLoss(rectify='none')(A4 - 2, Y4),
        ValueError,
        r"activations below zero \(-[12].*rectify='none'",
    ),
    'integer activations': (
        lambda: GiniKLLoss()(torch.ones(4, 3).long(), Y4),
        TypeError,
        r"activations must be floating point, got torch.int64",
    ),
    'complex activations': (
        lambda: GiniKLLoss()(A4 + 0j, Y4),
        TypeError,
        r"activations must be floating point, got torch.complex64",
    ),
    'activations as an array': (
        lambda: GiniKLLoss()(A4.numpy(), Y4),
        TypeError,
        r"activations must be a torch.Tensor, got ndarray",
    ),
    'activations of rank 1': (lambda: GiniKLLoss()(A4[0], Y4), ValueError, r"at least 2 dimensions.*got shape \(3,\)"),
    'no channels': (lambda: GiniKLLoss()(A4[:, :0], Y4), ValueError, r"shape \(4, 0\) have an empty dimension"),
    'no pixels': (lambda: GiniKLLoss()(torch.rand(4, 3, 0, 2), Y4), ValueError, r"empty dimension"),
    'channel_dim 0': (
        lambda: GiniKLLoss(channel_dim=0)(A4, Y4),
        ValueError,
        r"channel_dim=0 does not name a channel dimension.*dimension 0 is the batch",
    ),
    'channel_dim -2': (lambda: GiniKLLoss(channel_dim=-2)(A4, Y4), ValueError, r"channel_dim=-2"),
    'channel_dim 2': (lambda: GiniKLLoss(channel_dim=2)(A4, Y4), ValueError, r"channel_dim=2 .*use 1 to 1 or -1 to -1"),
    'channel_dim a string': (lambda: GiniKLLoss(channel_dim='c')(A4, Y4), ValueError, r"channel_dim=.*c"),
    'rectify': (
        lambda: GiniKLLoss(rectify='square'),
        ValueError,
        r"rectify='square' is not known: use 'abs', 'relu' or 'none'",
    ),
    'rectify in a function': (lambda: gini_loss(A4, Y4, rectify='square'), ValueError, r"use 'abs', 'relu' or 'none'"),
    'rectify in place of reverse': (
        lambda: kl_loss(A4, Y4, 'relu'),
        TypeError,
        r"must be True \(reversed\) or False, got 'relu': pass the other settings by name",
    ),
    'n_classes in place of reverse_kl': (lambda: GiniKLLoss(0.5, 0.5, 'abs', 10), TypeError, r"got 10"),
    'lambda_gini below 0': (
        lambda: GiniKLLoss(-0.1),
        ValueError,
        r"lambda_gini must be finite and not negative, got -0.1",
    ),
    'lambda_kl below 0': (
        lambda: GiniKLLoss(lambda_kl=-1),
        ValueError,
        r"lambda_kl must be finite and not negative, got -1",
    ),
    'lambda NaN': (lambda: GiniKLLoss(math.nan), ValueError, r"lambda_gini must be finite"),
    'lambda infinite': (lambda: GiniKLLoss(0.5, math.inf), ValueError, r"lambda_kl must be finite"),
    'lambda a word': (lambda: GiniKLLoss('much'), TypeError, r"lambda_gini must be a number, got 'much'"),
    'lambda None': (lambda: GiniKLLoss(0.5, None), TypeError, r"lambda_kl must be a number, got None"),
    'class_means of maps': (
        lambda: class_means(torch.rand(4, 3, 2, 2), Y4),
        ValueError,
        r"shape \(m, c\), got \(4, 3, 2, 2\): call pool\(\) first",
    ),
    'class_means of integers': (lambda: class_means(torch.ones(4, 3).long(), Y4), TypeError, r"floating point"),
    'class_means of a bad label': (lambda: class_means(A4, Y4, 2), ValueError, r"label 2 is not below n_classes=2"),
    'class_probs below 0': (lambda: class_probs(A4 - 1), ValueError, r"class means below zero"),
    'class_probs NaN': (lambda: class_probs(A4 * math.nan), ValueError, r"NaN"),
    'class_probs of rank 1': (lambda: class_probs(A4[0]), ValueError, r"\(c, n\), got \(3,\)"),
    'class_probs of integers': (lambda: class_probs(Y4[:, None]), TypeError, r"floating point, got torch.int64"),
    'gini_impurity of rank 1': (lambda: gini_impurity(A4[0]), ValueError, r"\(c, n\), got \(3,\)"),
    'gini_impurity of integers': (lambda: gini_impurity(Y4[:, None]), TypeError, r"floating point, got torch.int64"),
    'gini_impurity of class averages': (
        lambda: gini_impurity(torch.tensor([[5.0, 0.5]])),
        ValueError,
        r"sum to 1, or be zero, got values from 0.5 to 5 and sums from 5.5 to 5.5: class_probs",
    ),
    'gini_impurity below 0': (
        lambda: gini_impurity(torch.tensor([[0.5, 0.5], [1.5, -0.5]])),
        ValueError,
        r"non-negative and sum to 1.*from -0.5 to 1.5",
    ),
    'gini_impurity NaN': (
        lambda: gini_impurity(torch.tensor([[math.nan, 1.0]])),
        ValueError,
        r"non-negative and sum to 1",
    ),
    'feature_histogram of class averages': (
        lambda: feature_histogram(torch.tensor([[5.0, 0.5]])),
        ValueError,
        r"sum to 1, or be zero",
    ),
    'feature_histogram of rank 1': (lambda: feature_histogram(A4[0]), ValueError, r"\(c, n\), got \(3,\)"),
    'feature_histogram of integers': (
        lambda: feature_histogram(Y4[:, None]),
        TypeError,
        r"floating point, got torch.int64",
    ),
    'label_histogram of a bad label': (lambda: label_histogram(Y4, 2), ValueError, r"label 2 is not below n_classes=2"),
    'label_histogram of floats': (lambda: label_histogram(Y4.float()), TypeError, r"must be int64"),
    'pull of a detached layer': (
        lambda: pull(A4, Y4, A4.sum()),
        ValueError,
        r"loss was not computed from these activations: pass the layer's output itself",
    ),
    'pull of another forward pass': (
        lambda: pull(LEAF * 2, Y4, (LEAF * 2).sum()),
        ValueError,
        r"loss was not computed from these activations",
    ),
    'pull of a loss per image': (
        lambda: pull(LEAF, Y4, LEAF.sum(1)),
        ValueError,
        r"loss must be a scalar tensor, got shape \(4,\): call \.mean\(\)",
    ),
    'pull of a number': (lambda: pull(LEAF, Y4, 1.0), ValueError, r"loss must be a scalar tensor, got float"),
    'diagnostics of a bad label': (lambda: diagnostics(A4, Y4, 2), ValueError, r"label 2 is not below n_classes=2"),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_has_its_own_message(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize('y', [Y4, SOFT, MixedTargets(Y4, Y4, 0.5)], ids=['labels', 'soft', 'mixed'])
@pytest.mark.parametrize('rectify', ['abs', 'relu', 'none'])
def test_tensors_without_values(y, rectify):
    "On the meta device there is nothing to check, and shapes come out"
    A = torch.rand(4, 3, 2, 2, device='meta', requires_grad=True)
    y = MixedTargets(y.labels.to('meta'), y.others.to('meta'), 0.5) if isinstance(y, MixedTargets) else y.to('meta')
    mask = torch.ones(4, 2, 2, dtype=torch.bool, device='meta')
    terms = GiniKLLoss(rectify=rectify, class_prior=[1, 2, 3])
    loss = terms(A, y, mask)
    loss.backward()
    assert loss.is_meta and loss.shape == () and A.grad.shape == A.shape
    assert terms(A4, Y4) == GiniKLLoss(class_prior=[1, 2, 3])(A4, Y4)  # and the prior is still there


def test_targets_and_activations_on_two_devices():
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        GiniKLLoss()(A4, Y4.to('meta'))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_of_any_precision_are_accepted(dtype):
    "Probabilities of many classes, few, one, and of a dead channel: rounding does not make them invalid"
    for n in (1, 2, 100, 5000):
        P = class_probs(torch.rand(30, n)).to(dtype)
        P[0] = 0
        assert gini_impurity(P).shape == (30,) and feature_histogram(P).isfinite().all()


# ---- Integers of any kind, and what is not an integer ----


def test_numpy_integers_are_numbers():
    A, y = torch.rand(6, 4, 2, 2), torch.arange(6) % 3
    expected = GiniKLLoss(n_classes=3)(A, y)
    assert GiniKLLoss(n_classes=np.int64(3), channel_dim=np.int32(1), ignore_index=np.int64(-100))(A, y) == expected
    assert gini_loss(A, y, n_classes=np.int64(3), channel_dim=np.int64(1)) == gini_loss(A, y)


@pytest.mark.parametrize('n', [0, -3, 2.5, '3', True, torch.tensor(3)])
def test_what_is_no_number_of_classes(n):
    for call in (
        lambda: GiniKLLoss(n_classes=n),
        lambda: gini_loss(torch.rand(2, 3), torch.tensor([0, 1]), n_classes=n),
    ):
        with pytest.raises(ValueError, match="n_classes must be a positive integer"):
            call()


@pytest.mark.parametrize('dim', [0, 1.5, '1'])
def test_what_is_no_channel_dim(dim):
    with pytest.raises(ValueError, match="channel_dim=.* does not name a channel dimension: use an integer"):
        GiniKLLoss(channel_dim=dim)


def test_a_weight_is_not_learnt():
    with pytest.raises(TypeError, match="lambda_gini must be a constant, got a tensor that requires a gradient"):
        GiniKLLoss(torch.nn.Parameter(torch.tensor(0.3)))
    assert GiniKLLoss(torch.tensor(0.5)).lambda_gini == 0.5


# ---- Tensors of other kinds ----


def jagged():
    return torch.nested.nested_tensor([torch.rand(3, 6), torch.rand(5, 6)], layout=torch.jagged)


KINDS = {
    'jagged': (jagged, "to_padded_tensor"),
    'nested': (lambda: torch.nested.nested_tensor([torch.rand(3, 6), torch.rand(5, 6)]), "to_padded_tensor"),
    'sparse': (lambda: torch.rand(4, 3).to_sparse(), r"\.to_dense\(\)"),
    'sparse rows': (lambda: torch.rand(4, 3).to_sparse_csr(), r"\.to_dense\(\)"),
    'mkldnn': (lambda: torch.rand(4, 3).to_mkldnn(), r"\.to_dense\(\)"),
    'float8': (lambda: torch.rand(4, 3).to(torch.float8_e4m3fn), r"\.float\(\)"),
    'quantized': (lambda: torch.quantize_per_tensor(torch.rand(4, 3), 0.1, 0, torch.quint8), r"\.dequantize\(\)"),
    'complex': (lambda: torch.rand(4, 3) * 1j, r"\.abs\(\)"),
}


@pytest.mark.parametrize('name', KINDS)
def test_other_kinds_of_tensors_are_refused(name):
    "As activations and as targets; the message names the call to convert them"
    make, advice = KINDS[name]
    try:
        x = make()
    except (RuntimeError, NotImplementedError) as e:
        pytest.skip(f"this torch has none: {e}")
    for call in (lambda: GiniKLLoss()(x, Y4), lambda: gini_loss(x, Y4), lambda: pool(x)):
        with pytest.raises(TypeError, match=advice):
            call()
    if name != 'complex':
        with pytest.raises(TypeError, match=f"targets.*{advice}"):
            GiniKLLoss()(A4, x)


@pytest.mark.parametrize('name', ['sparse', 'mkldnn', 'float8', 'complex'])
def test_the_advice_works(name):
    x = KINDS[name][0]()
    remedy = {
        'sparse': lambda t: t.to_dense(),
        'mkldnn': lambda t: t.to_dense(),
        'float8': lambda t: t.float(),
        'complex': lambda t: t.abs(),
    }[name]
    assert GiniKLLoss()(remedy(x), Y4).isfinite()


def test_the_advice_for_nested_tensors_works():
    "Padded and masked, terms and gradients are those of the mean of each sequence"
    rows, y = [torch.randn(k, 6) for k in (3, 5, 2, 4)], torch.tensor([0, 1, 0, 2])
    x = torch.nested.to_padded_tensor(torch.nested.nested_tensor(rows, layout=torch.jagged), 0.0).requires_grad_()
    mask = torch.arange(5) < torch.tensor([3, 5, 2, 4])[:, None]
    leaves = [r.clone().requires_grad_() for r in rows]
    got, expected = (
        GiniKLLoss(channel_dim=-1)(x, y, mask),
        GiniKLLoss()(torch.stack([r.abs().mean(0) for r in leaves]), y),
    )
    got.backward()
    expected.backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(x.grad[mask], torch.cat([r.grad for r in leaves]))


# ---- Masks ----

A5 = torch.rand(4, 3, 2, 5)
MASKS = {
    'shape': (
        torch.ones(4, 2).bool(),
        ValueError,
        r"mask of shape \(4, 2\).*one entry per position, shape \(4, 2, 5\)",
    ),
    'with channels': (torch.ones(4, 3, 2, 5).bool(), ValueError, r"shape \(4, 2, 5\)"),
    'float': (torch.ones(4, 2, 5), TypeError, r"must be bool, or integers 0 and 1, got torch.float32: call .bool\(\)"),
    'complex': (torch.ones(4, 2, 5) * 1j, TypeError, r"must be bool"),
    'other integers': (torch.full((4, 2, 5), 2), ValueError, r"mask must be 0 or 1, got values from 2 to 2"),
    'a list': ([[True]], TypeError, r"mask must be a torch.Tensor, got list"),
    'nothing left': (torch.arange(4)[:, None, None].expand(4, 2, 5) != 2, ValueError, r"leaves no position of image 2"),
}


@pytest.mark.parametrize('name', MASKS)
def test_bad_masks(name):
    mask, kind, message = MASKS[name]
    for call in (
        lambda: pool(A5, mask=mask),
        lambda: GiniKLLoss()(A5, Y4, mask),
        lambda: GiniKLLoss().terms(A5, Y4, mask=mask),
    ):
        with pytest.raises(kind, match=message):
            call()


# ---- Priors ----

PRIORS = {
    'too short': (dict(class_prior=[0.5, 0.5], n_classes=3), r"each of the 3 classes, got shape \(2,\)"),
    'a matrix': (dict(class_prior=torch.ones(3, 3)), r"got shape \(3, 3\)"),
    'negative': (dict(class_prior=[0.5, -0.1, 0.6]), r"finite and not negative, got values from -0.1 to 0.6"),
    'NaN': (dict(class_prior=[0.5, math.nan, 0.5]), r"finite and not negative"),
    'infinite': (dict(class_prior=[0.5, math.inf, 0.5]), r"finite and not negative"),
    'zeros': (dict(class_prior=[0, 0, 0]), r"0 for all classes"),
    'empty': (dict(class_prior=[]), r"got shape \(0,\)"),
}


@pytest.mark.parametrize('name', PRIORS)
def test_bad_priors_are_told_at_construction(name):
    kwargs, message = PRIORS[name]
    with pytest.raises(ValueError, match=f"class_prior.*{message}"):
        GiniKLLoss(**kwargs)
    with pytest.raises(ValueError, match="class_prior"):
        kl_loss(A4, Y4, **{**kwargs, 'n_classes': None}) if name != 'too short' else kl_loss(
            A4, Y4, class_prior=[0.5, 0.5]
        )


@pytest.mark.parametrize('prior', [{}, {'cat': 3, 'dog': 1}, {0: 1, 1.5: 2}], ids=str)
def test_priors_by_another_key_than_the_class(prior):
    with pytest.raises((TypeError, ValueError), match="class_prior"):
        GiniKLLoss(class_prior=prior)
    with pytest.raises(ValueError, match=r"each of the 2 classes, got shape \(3,\)"):
        GiniKLLoss(class_prior={0: 1, 2: 1}, n_classes=2)


@pytest.mark.parametrize('y', [Y4, SOFT, MixedTargets(Y4, Y4.flip(0), 0.5)], ids=['labels', 'soft', 'mixed'])
def test_a_prior_of_zero_for_a_class_of_the_batch(y):
    with pytest.raises(ValueError, match="class_prior has no share for class 2, but the batch has images of it"):
        GiniKLLoss(class_prior=[0.5, 0.5, 0])(A4, y)
    with pytest.raises(ValueError, match="class_prior has (4 entries|no share for class 2)"):
        kl_loss(A4, y, class_prior=[0.3, 0.3, 0, 0.4])


# ---- Targets that are not classes ----


def test_regression_targets():
    "One column, or a value for each image: the message does not advise a conversion that would train on nonsense"
    values = torch.tensor([0.5, 1.25, 3.0, -2.2])
    for y in (values, values[:, None]):
        with pytest.raises((TypeError, ValueError), match="regression targets.*bucketize") as e:
            GiniKLLoss()(A4, y)
        assert '.long()' not in str(e.value)


def test_rows_that_are_no_shares_get_a_word():
    """Positive regression targets in several columns cannot be distinguished from class shares with certainty: a
    warning says how they are used"""
    with pytest.warns(UserWarning, match="some rows sum to 15.7.*regression targets have no classes"):
        GiniKLLoss()(A4, torch.tensor([[12.5, 3.2], [0.4, 0.6], [1, 0], [0, 1]]))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for y in (
            SOFT,
            SOFT * 0,
            torch.ones(4, 3),
            torch.rand(4, 3).softmax(1),
            torch.rand(4, 3).softmax(1).half(),
            torch.tensor([[1.0, 1, 0], [0, 0, 0], [0.2, 0.3, 0.5], [0, 1, 0]]),
        ):
            GiniKLLoss()(A4, y)


def test_labels_for_each_position():
    "They raise an error that says what works: count each position as an image"
    A, y = torch.rand(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    with pytest.raises(
        ValueError, match=r"one label per position.*A\.movedim\(1, -1\)\.flatten\(0, -2\) and y\.flatten\(\)"
    ):
        GiniKLLoss()(A, y)
    by_hand = torch.stack([A[k, :, i, j] for k in range(2) for i in range(4) for j in range(5)])
    assert torch.equal(GiniKLLoss()(A.movedim(1, -1).flatten(0, -2), y.flatten()), GiniKLLoss()(by_hand, y.reshape(-1)))
