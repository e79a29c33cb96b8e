"Records: reading, refusing what is not whole, selecting and pairing. Synthetic images, one thread."
import json, shutil, warnings
import numpy as np
import pytest
import torch
warnings.filterwarnings('ignore', category=FutureWarning)
from gini_loss.results import RecordError, load_results, paired_runs, read_epochs, read_predictions, read_record, select_runs
from gini_loss.train import load_images, recipe, train

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('made')
    for c in [recipe('test', loss=l, seed=s, epochs=2, train_per_class=4) for s in (0, 1) for l in ('ce', 'both')] + [recipe('test', loss='ce', lr=.02, epochs=2, train_per_class=4)]:
        train(c, folder/'results', folder/'checkpoints', folder='deep/er', verbose=False, device='cpu')
    return folder/'results'

@pytest.fixture
def copy(made, tmp_path): return shutil.copytree(made, tmp_path/'results')

def test_frame(made):
    runs = load_results(made)
    assert len(runs) == 5 and runs.study.unique().tolist() == ['deep/er'] and runs.run_id.is_unique
    assert runs.test_accuracy.between(0, 1).all() and runs.caltech_accuracy.isna().all()

def test_absent_and_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'records_path\(\).*gini_study'): load_results(tmp_path/'no')
    (tmp_path/'file').write_text('')
    with pytest.raises(NotADirectoryError): load_results(tmp_path/'file')
    empty = load_results(tmp_path)
    assert len(empty) == 0 and {'run_id', 'test_accuracy', 'config_hash'} <= set(empty.columns)

def test_empty_frame_has_the_columns_of_a_full_one(made, tmp_path): assert list(load_results(tmp_path).columns) == list(load_results(made).columns)

def damage(record, how):
    if how == 'format': record['format'] = 2
    elif how == 'missing': del record['best']
    elif how == 'percent': record['last']['test_accuracy'] = 71.5
    elif how == 'text': record['last']['test_accuracy'] = '0.7'
    elif how == 'edited': record['config']['lr'] = 1.
    elif how == 'unknown': record['config']['luck'] = 1
    elif how == 'short': record['epochs']['lr'].pop()
    elif how == 'bool': record['layer']['channels'] = True
    elif how == 'no source': del record['source']
    elif how == 'source': record['source'] = 'a1b2c3d'
    return record

@pytest.mark.parametrize('how', ['format', 'missing', 'percent', 'text', 'edited', 'unknown', 'short', 'bool', 'no source', 'source'])
def test_bad_records_are_named(copy, how):
    file = next(copy.rglob('*.json'))
    file.write_text(json.dumps(damage(json.loads(file.read_text()), how)))
    with pytest.raises(RecordError, match=file.name): load_results(copy)

def test_truncated_and_doubled(copy):
    file = next(copy.rglob('*.json'))
    text = file.read_text()
    (copy/'again').mkdir()
    (copy/'again'/file.name).write_text(text)
    with pytest.raises(RecordError, match='same run'): load_results(copy)
    shutil.rmtree(copy/'again')
    file.write_text(text[:len(text)//2])
    with pytest.raises(RecordError, match=file.name): load_results(copy)

def test_names_of_records_that_are_none(made, copy):
    (copy/'old.json').mkdir()
    with pytest.raises(RecordError, match='old.json is a folder, not a record'): load_results(copy)
    (copy/'old.json').rmdir(); (copy/'gone.json').symlink_to(copy/'nowhere.json')
    with pytest.raises(RecordError, match='gone.json is a link that leads nowhere'): load_results(copy)

def test_select_and_pair(made):
    runs = load_results(made)
    with pytest.raises(ValueError, match=r'lr \(0.01, 0.02\)'): select_runs(runs, loss='ce')
    ce, both = select_runs(runs, loss='ce', lr=.01), select_runs(runs, loss='both')
    pairs = paired_runs(ce, both)
    assert pairs.seed.tolist() == [0, 1] and np.allclose(pairs.difference, both.test_accuracy - ce.test_accuracy)
    with pytest.raises(ValueError, match='lr'): paired_runs(select_runs(runs, lr=.02), both)
    with pytest.raises(ValueError, match='no run has'): select_runs(runs, loss='gini')
    with pytest.raises(ValueError, match='no column'): select_runs(runs, losses='ce')
    with pytest.raises(ValueError, match='no seed'): paired_runs(ce[ce.seed == 0], both[both.seed == 1])
    with pytest.raises(ValueError, match='one configuration'): paired_runs(runs, both)

def test_details(made, copy):
    runs = load_results(made)
    labels = load_images(recipe('test'))[2].labels.numpy()
    for _, run in runs.iterrows():
        p = read_predictions(run)
        assert np.isclose((p['last_test_pred'] == labels).mean(), run.test_accuracy)
        assert np.isclose((p['best_test_pred'] == labels).mean(), run.best_test_accuracy)
        assert p['layer_impurity'].shape == (32,) and np.isclose(p['feature_histogram'].sum(), 1, atol=1e-5)
    name = runs.run_id[0]
    assert read_record(name, made)['run_id'] == name and len(read_epochs(name, made)) == 2
    with pytest.raises(FileNotFoundError, match='no record'): read_record('resnet18-ce-s9-00000000', made)
    file = next(copy.rglob(f'{name}.npz'))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(RecordError, match=file.name): read_predictions(name, copy)
    file.unlink()
    with pytest.raises(FileNotFoundError, match='has no predictions.*put it back'): read_predictions(name, copy)
