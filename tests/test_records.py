"Records, made up and trained: writing, reading, errors for damaged ones, selecting and pairing."

import io, json, mmap, re, shutil, struct, warnings, zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

warnings.filterwarnings('ignore', category=FutureWarning)
from gini_loss.records import (
    RecordError,
    config_of,
    find_record,
    known_labels,
    load_results,
    paired_runs,
    read_epochs,
    read_predictions,
    read_record,
    record_files,
    seal_record,
    seal_records,
    select_runs,
    write_record,
)
from gini_loss.study import main as study_main
from gini_loss.study import load_study, study_state
from gini_loss.train import load_images, recipe, train
from gini_loss.train import main as train_main
from made_up import made_up_record, put, small, without_digests


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('made')
    configs = [recipe('test', loss=l, seed=s, epochs=2, train_per_class=4) for s in (0, 1) for l in ('ce', 'both')]
    for c in [*configs, recipe('test', loss='ce', lr=0.02, epochs=2, train_per_class=4)]:
        train(c, folder / 'results', folder / 'checkpoints', folder='deep/er', verbose=False, device='cpu')
    return folder / 'results'


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / 'results')


# ---- the frame


def test_frame(made):
    runs = load_results(made)
    assert len(runs) == 5 and runs.study.unique().tolist() == ['deep/er'] and runs.run_id.is_unique
    assert runs.test_accuracy.between(0, 1).all() and runs.caltech_accuracy.isna().all()
    assert [config_of(run).run_id for _, run in runs.iterrows()] == runs.run_id.tolist()


def test_absent_and_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'records_path\(\).*gini_study'):
        load_results(tmp_path / 'no')
    (tmp_path / 'file').write_text('')
    with pytest.raises(NotADirectoryError):
        load_results(tmp_path / 'file')
    empty = load_results(tmp_path)
    assert len(empty) == 0 and {'run_id', 'test_accuracy', 'config_hash'} <= set(empty.columns)


def test_empty_frame_has_the_columns_of_a_full_one(made, tmp_path):
    assert list(load_results(tmp_path).columns) == list(load_results(made).columns)


def test_fields_of_newer_records(tmp_path):
    "The terms over the training images and the pull of each epoch are read if present, and may be missing"
    old, new = small(loss='ce'), small(loss='both')
    put(tmp_path, old)
    record, arrays = made_up_record(new)
    record['layer_train'] = dict(record['layer'], gini=0.25, kl=0.125)
    record['epochs'] |= dict(pull_gini=[None, 0.5], pull_kl=[None, 0.25])
    write_record(tmp_path, record, arrays)
    runs = load_results(tmp_path).set_index('loss')
    assert (
        runs.layer_train_gini['both'] == 0.25
        and runs.layer_train_kl['both'] == 0.125
        and np.isnan(runs.layer_train_gini['ce'])
    )
    assert read_epochs(new.run_id, tmp_path).pull_gini.tolist()[1] == 0.5 and 'pull_kl' not in read_epochs(
        old.run_id, tmp_path
    )
    record['layer_train']['gini'] = 'pure'
    with pytest.raises(RecordError, match='layer_train.gini must be'):
        load_results(write_record(tmp_path / 'bad', record, arrays).parent)


# ---- the schema


def damage(record, how):
    if how == 'format':
        record['format'] = 2
    elif how == 'missing':
        del record['best']
    elif how == 'percent':
        record['last']['test_accuracy'] = 71.5
    elif how == 'text':
        record['last']['test_accuracy'] = '0.7'
    elif how == 'edited':
        record['config']['lr'] = 1.0
    elif how == 'unknown':
        record['config']['luck'] = 1
    elif how == 'short':
        record['epochs']['lr'].pop()
    elif how == 'bool':
        record['layer']['channels'] = True
    elif how == 'no source':
        del record['source']
    elif how == 'source':
        record['source'] = 'a1b2c3d'
    return record


DAMAGES = ['format', 'missing', 'percent', 'text', 'edited', 'unknown', 'short', 'bool', 'no source', 'source']


@pytest.mark.parametrize('sealed', [True, False])
@pytest.mark.parametrize('how', DAMAGES)
def test_bad_records_are_named(tmp_path, how, sealed):
    file = put(tmp_path, small())
    if not sealed:
        without_digests(file)
    file.write_text(json.dumps(damage(json.loads(file.read_text()), how)))
    with pytest.raises(RecordError, match=file.name):
        load_results(tmp_path)


def test_truncated_and_doubled(copy):
    file = next(copy.rglob('*.json'))
    text = file.read_text()
    shutil.copytree(file.parent, copy / 'again')
    with pytest.raises(RecordError, match='same run'):
        load_results(copy)
    with pytest.raises(RecordError, match='same run'):
        find_record(copy, config_of(load_results(file.parent).set_index('file', drop=False).loc[str(file)]))
    shutil.rmtree(copy / 'again')
    file.write_text(text[: len(text) // 2])
    with pytest.raises(RecordError, match=file.name):
        load_results(copy)


def test_names_of_records_that_are_none(copy):
    (copy / 'old.json').mkdir()
    with pytest.raises(RecordError, match='old.json is a folder, not a record'):
        load_results(copy)
    (copy / 'old.json').rmdir()
    (copy / 'gone.json').symlink_to(copy / 'nowhere.json')
    with pytest.raises(RecordError, match='gone.json is a broken symlink'):
        load_results(copy)


# ---- digests


def test_no_flipped_bit_passes(tmp_path):
    "Every single bit of both files of a record"
    config = small()
    file, tried = put(tmp_path, config), 0
    for path in (file, file.with_suffix('.npz')):
        with open(path, 'r+b') as opened, mmap.mmap(opened.fileno(), 0) as content:
            for bit in range(8 * len(content)):
                content[bit // 8] ^= 1 << bit % 8
                tried += 1
                with pytest.raises(RecordError, match=file.stem):
                    read_record(file)
                content[bit // 8] ^= 1 << bit % 8
    assert find_record(tmp_path, config) == file and tried > 20_000


@pytest.mark.parametrize('sealed', [True, False])
def test_swapped_predictions(tmp_path, sealed):
    a, b = (put(tmp_path, small(loss=loss), accuracy) for loss, accuracy in (('ce', 0.5), ('both', 0.6)))
    if not sealed:
        without_digests(a)
        without_digests(b)
    assert len(load_results(tmp_path)) == 2
    one, two = a.with_suffix('.npz'), b.with_suffix('.npz')
    one.rename(tmp_path / 'kept')
    two.rename(one)
    (tmp_path / 'kept').rename(two)
    with pytest.raises(RecordError, match='not the one that was written with it' if sealed else 'its predictions give'):
        load_results(tmp_path)


@pytest.mark.parametrize('sealed', [True, False])
@pytest.mark.parametrize(
    'when, score',
    [(w, s) for w in ('last', 'best') for s in ('test_accuracy', 'caltech_accuracy', 'caltech_accuracy_12')],
)
def test_an_edited_score(tmp_path, sealed, when, score):
    "Scores are computed again from the predictions, so an edit is detected even without a digest"
    record, arrays = made_up_record(recipe('laptop'), test=0.1973, caltech=0.1357)
    file = write_record(tmp_path, record, arrays)
    if not sealed:
        without_digests(file)
    assert load_results(tmp_path).test_accuracy.tolist() == [0.1973]
    said = json.dumps(record[when][score])
    head, found, tail = file.read_text().partition(f'"{when}": {{')
    file.write_text(head + found + tail.replace(f'"{score}": {said}', f'"{score}": 0.9{said[3:]}', 1))
    with pytest.raises(
        RecordError, match='its digest is wrong' if sealed else f'{when}.{score} is 0.9.*its predictions give'
    ):
        load_results(tmp_path)


def test_one_digest_of_two_is_damage(tmp_path):
    file = put(tmp_path, small())
    text = file.read_text()
    for name in ('digest', 'arrays_digest'):
        file.write_text(re.sub(rf' "{name}": .*\n', '', text))
        with pytest.raises(RecordError, match='its digest is wrong'):
            load_results(tmp_path)


def test_line_endings_of_windows_are_no_damage(tmp_path):
    file = put(tmp_path, small())
    file.write_bytes(file.read_bytes().replace(b'\n', b'\r\n'))
    assert len(load_results(tmp_path)) == 1


def test_old_records_are_sealed_once(tmp_path):
    old, new = without_digests(put(tmp_path / 'a', small())), put(tmp_path / 'b', small(loss='ce'))
    before, other, arrays = old.read_bytes().splitlines(), new.read_bytes(), old.with_suffix('.npz').read_bytes()
    assert len(load_results(tmp_path)) == 2
    assert seal_records(tmp_path) == [old] and seal_records(tmp_path) == []
    after = old.read_bytes().splitlines()
    assert [line for line in after if b'digest' not in line] == before and len(after) == len(before) + 2
    assert (
        new.read_bytes() == other
        and old.with_suffix('.npz').read_bytes() == arrays
        and len(load_results(tmp_path)) == 2
    )


def test_sealing_says_no_before_it_writes(tmp_path):
    good, bad = without_digests(put(tmp_path, small())), without_digests(put(tmp_path, small(loss='ce')))
    bad.with_suffix('.npz').write_bytes(b'')
    before = good.read_bytes()
    with pytest.raises(RecordError, match=bad.stem):
        seal_records(tmp_path)
    assert good.read_bytes() == before


def test_the_same_input_gives_the_same_files():
    a, b = (seal_record(*made_up_record(small())) for _ in range(2))
    assert a == b and json.loads(a[0])['run_id'] == small().run_id


# ---- arrays of strangers


def store(path, members, claim=None):
    "Write an npz of these members (bytes by name). `claim`: the unpacked size of the first that its directory states"
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f'{name}.npy', data)
    if claim is None:
        return
    data, size = bytearray(path.read_bytes()), struct.pack('<I', len(next(iter(members.values()))))
    while (at := data.find(size)) >= 0:
        data[at : at + 4] = struct.pack('<I', claim)
    path.write_bytes(data)


def npy(array=None, shape=None, dtype='<i2', body=b''):
    buffer = io.BytesIO()
    if array is not None:
        np.save(buffer, array)
    else:
        np.lib.format.write_array_header_1_0(buffer, dict(shape=shape, fortran_order=False, descr=dtype))
        buffer.write(body)
    return buffer.getvalue()


def hostile():
    big = npy(np.zeros(2**28, np.int8))
    yield 'claims 256 MB', lambda path: store(path, dict(last_test_pred=big))
    yield 'says it is small', lambda path: store(path, dict(last_test_pred=big), claim=1000)
    yield 'header claims 2 TB', lambda path: store(path, dict(last_test_pred=npy(shape=(2**40,))))
    yield 'header claims less', lambda path: store(path, dict(last_test_pred=npy(shape=(3,), body=bytes(1000))))
    yield 'objects', lambda path: store(path, dict(last_test_pred=npy(shape=(1,), dtype='|O', body=bytes(8))))
    yield 'another version', lambda path: store(path, dict(last_test_pred=b'\x93NUMPY\x09\x00'))
    yield 'not an array', lambda path: store(path, dict(last_test_pred=b'text'))
    yield 'empty', lambda path: path.write_bytes(b'')
    yield 'cut', lambda path: path.write_bytes(path.read_bytes()[:-30])
    yield 'no predictions in it', lambda path: store(path, dict(layer_dead=npy(np.zeros(3, bool))))


@pytest.mark.parametrize('how', [name for name, _ in hostile()])
def test_arrays_of_strangers_take_no_memory(tmp_path, how):
    resource = pytest.importorskip('resource')
    config = small()
    file = without_digests(put(tmp_path, config))
    dict(hostile())[how](file.with_suffix('.npz'))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RecordError, match=file.stem):
        load_results(tmp_path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000  # kB


# ---- one behaviour


def break_it(file, how):
    if how == 'empty':
        file.write_bytes(b'')
    elif how == 'cut':
        file.write_bytes(file.read_bytes()[:200])
    elif how == 'not JSON':
        file.write_text('a note')
    elif how == 'foreign':
        file.write_text('{"title": "of another program"}')
    elif how == 'later format':
        file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    elif how == 'of another run':
        shutil.copy(put(file.parent.parent / 'other', small(seed=7)), file)
    elif how == 'without predictions':
        file.with_suffix('.npz').unlink()
    elif how == 'predictions of another':
        shutil.copy(put(file.parent.parent / 'other', small(seed=7), 0.3).with_suffix('.npz'), file.with_suffix('.npz'))
    elif how == 'a folder':
        file.unlink()
        file.mkdir()
    elif how == 'a broken link':
        file.unlink()
        file.symlink_to('nowhere')


@pytest.mark.parametrize(
    'how',
    [
        'empty',
        'cut',
        'not JSON',
        'foreign',
        'later format',
        'of another run',
        'without predictions',
        'predictions of another',
        'a folder',
        'a broken link',
    ],
)
def test_what_is_no_record_is_named_and_never_counts_as_done(tmp_path, capsys, how):
    "The frame, the search, a single run and a study agree, and do not change the files"
    (tmp_path / 's.ini').write_text('[runs]\npreset = test\nepochs = 2\nloss = both\nseed = 0\n')
    (config,) = load_study(tmp_path / 's.ini').configs
    file = put(tmp_path / 'results' / 's', config)
    break_it(file, how)
    shutil.rmtree(tmp_path / 'results' / 'other', ignore_errors=True)
    before = {p: p.read_bytes() for p in (tmp_path / 'results').rglob('*') if p.is_file()}
    for read in (
        lambda: load_results(tmp_path / 'results'),
        lambda: find_record(tmp_path / 'results', config),
        lambda: read_record(config.run_id, tmp_path / 'results'),
    ):
        with pytest.raises((RecordError, FileNotFoundError), match=file.stem):
            read()
    where = ['--results', str(tmp_path / 'results'), '--checkpoints', str(tmp_path / 'checkpoints')]
    assert (
        study_state(load_study(tmp_path / 's.ini'), tmp_path / 'results', tmp_path / 'checkpoints')[0].state
        == 'damaged'
    )
    assert (
        study_main([str(tmp_path / 's.ini'), '--list', *where]) == 0
        and file.stem in (said := capsys.readouterr().out)
        and '0 done' in said
    )
    assert train_main(['--preset', 'test', '--epochs', '2', *where]) == 1 and file.stem in capsys.readouterr().err
    assert study_main([str(tmp_path / 's.ini'), *where]) == 1
    said = capsys.readouterr()
    assert file.stem in said.err and '0 done' in said.out
    assert before == {p: p.read_bytes() for p in (tmp_path / 'results').rglob('*') if p.is_file()}


def test_a_record_under_another_name_is_refused(tmp_path):
    "A run's record is found by its name, so a table must not show a record that the search would miss"
    file = put(tmp_path, small())
    for suffix in ('.json', '.npz'):
        file.with_suffix(suffix).rename(tmp_path / f'renamed{suffix}')
    with pytest.raises(RecordError, match=f'renamed.json.*{file.stem}'):
        load_results(tmp_path)
    assert find_record(tmp_path, small()) is None


# ---- folders


def test_linked_folders_are_followed_once(tmp_path):
    put(tmp_path / 'disk' / 'deep', small())
    (tmp_path / 'results').mkdir()
    (tmp_path / 'results' / 'link').symlink_to(tmp_path / 'disk')
    (tmp_path / 'disk' / 'back').symlink_to(tmp_path / 'results')  # leads back to where it came from
    (tmp_path / 'results' / 'again').symlink_to(tmp_path / 'disk')  # the same folder under a second name
    runs = load_results(tmp_path / 'results')
    assert len(runs) == 1 and find_record(tmp_path / 'results', small()) == Path(runs.file[0])
    assert len(load_results(tmp_path / 'results' / 'link')) == 1


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    put(tmp_path, small())
    (tmp_path / 'more').symlink_to(tmp_path / 'unmounted')
    for look in (lambda: load_results(tmp_path), lambda: find_record(tmp_path, small())):
        with pytest.raises(RecordError, match='more is a broken symlink'):
            look()


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    file = put(tmp_path, small())
    (tmp_path / '.ipynb_checkpoints').mkdir()
    shutil.copy(file, tmp_path / '.ipynb_checkpoints' / f'{file.stem}-checkpoint.json')
    (tmp_path / '.half.json').write_text('{')
    assert list(record_files(tmp_path)) == [file] and len(load_results(tmp_path)) == 1


# ---- the clock


def test_a_configuration_of_a_later_version(tmp_path):
    record, arrays = made_up_record(small())
    record['config']['speed'] = 9
    write_record(tmp_path, record, arrays)
    with pytest.raises(RecordError, match='has speed, unknown to this version.*update gini_loss'):
        load_results(tmp_path)


def test_a_configuration_survives_csv(tmp_path):
    "Also those with tuples, words and no values"
    configs = [small(milestones=(1, 3), layer='layer3'), recipe('twelve', seed=3), small(milestones=(), loss='ce')]
    for config in configs:
        put(tmp_path, config)
    load_results(tmp_path).to_csv(tmp_path / 'runs.csv', index=False)
    runs = pd.read_csv(tmp_path / 'runs.csv')
    assert {config_of(run).run_id for _, run in runs.iterrows()} == {config.run_id for config in configs}


def test_a_run_that_moved_names_all_it_ran_on(tmp_path):
    record, arrays = made_up_record(small(), device='second')
    other = {**record, 'source': dict(commit='0' * 40), 'hardware': {**record['hardware'], 'device_name': 'first'}}
    record['earlier'] = [{name: other[name] for name in ('hardware', 'versions', 'source')}]
    record['source'] = dict(commit='1' * 40)
    write_record(tmp_path, record, arrays)
    run = load_results(tmp_path).iloc[0]
    assert (run.device_name, run.device, run.commit) == ('first + second', 'cpu', '0' * 40 + ' + ' + '1' * 40)
    record['earlier'] = [dict(hardware='another')]
    write_record(tmp_path, record, arrays)
    with pytest.raises(RecordError, match='earlier.0.hardware must be an object'):
        load_results(tmp_path)


def test_durations_are_never_negative(tmp_path):
    record, arrays = made_up_record(small(), seconds=-86_392.0)
    record['epochs']['seconds'] = [1.0, -3.0]
    read = read_record(write_record(tmp_path, record, arrays))
    assert read['seconds'] == dict(training=0, session=0, sessions=1) and read['epochs']['seconds'] == [1.0, 0]
    file = next(tmp_path.glob('*.json'))  # one that an older version wrote
    without_digests(file).write_text(file.read_text().replace('"training": 0', '"training": -86392.0'))
    assert np.isnan(load_results(tmp_path).training_seconds[0])


# ---- choosing and comparing


def test_select_and_pair(made):
    runs = load_results(made)
    with pytest.raises(ValueError, match=r'lr \(0.01, 0.02\)'):
        select_runs(runs, loss='ce')
    ce, both = select_runs(runs, loss='ce', lr=0.01), select_runs(runs, loss='both')
    pairs = paired_runs(ce, both)
    assert pairs.seed.tolist() == [0, 1] and np.allclose(pairs.difference, both.test_accuracy - ce.test_accuracy)
    with pytest.raises(ValueError, match='lr'):
        paired_runs(select_runs(runs, lr=0.02), both)
    with pytest.raises(ValueError, match='the treatment has seed 0 more than once'):
        paired_runs(ce, pd.concat([both, both]))
    with pytest.raises(ValueError, match='no run has'):
        select_runs(runs, loss='gini')
    with pytest.raises(ValueError, match='no column'):
        select_runs(runs, losses='ce')
    with pytest.raises(ValueError, match='no seed'):
        paired_runs(ce[ce.seed == 0], both[both.seed == 1])
    with pytest.raises(ValueError, match='one configuration'):
        paired_runs(runs, both)


def test_details(made, copy):
    runs = load_results(made)
    labels = load_images(recipe('test'))[2].labels.numpy()
    assert np.array_equal(labels, known_labels(recipe('test'))['test'])
    for _, run in runs.iterrows():
        p = read_predictions(run)
        assert np.isclose((p['last_test_pred'] == labels).mean(), run.test_accuracy)
        assert np.isclose((p['best_test_pred'] == labels).mean(), run.best_test_accuracy)
        assert p['layer_impurity'].shape == (32,) and np.isclose(p['feature_histogram'].sum(), 1, atol=1e-5)
    name = runs.run_id[0]
    assert read_record(name, made)['run_id'] == name and len(read_epochs(name, made)) == 2
    with pytest.raises(FileNotFoundError, match='no record'):
        read_record('resnet18-ce-s9-00000000', made)
    file = next(copy.rglob(f'{name}.npz'))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(RecordError, match=file.stem):
        read_predictions(name, copy)
    file.unlink()
    with pytest.raises(FileNotFoundError, match='has no predictions.*put it back'):
        read_predictions(name, copy)


def test_the_old_name_works_with_a_warning():
    import importlib, sys

    sys.modules.pop('gini_loss.results', None)
    with pytest.warns(DeprecationWarning, match='gini_loss.records'):
        old = importlib.import_module('gini_loss.results')
    assert old.load_results is load_results and old.RecordError is RecordError


def test_scores_of_chosen_classes(tmp_path):
    "A run of some classes renumbers them, in both test sets"
    config = recipe('twelve')
    labels = known_labels(config)
    assert (
        labels['test'].shape == (1200,)
        and labels['caltech'].shape == (781,)
        and set(labels['caltech']) == set(range(12))
    )
    two = known_labels(recipe('twelve', classes='beaver+cup+apple'))
    assert (
        two['test'].max() == 2
        and set(two['caltech']) == {1, 2}
        and 'caltech' not in known_labels(recipe('twelve', classes='apple+bear'))
    )
    put(tmp_path, config, 0.25, caltech=0.125)
    runs = load_results(tmp_path)
    assert runs.test_accuracy[0] == 0.25 and runs.caltech_accuracy[0] == pytest.approx(0.125, abs=1e-3)
