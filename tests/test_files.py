"""Fuzz the files that the package reads. Records, checkpoints and studies of any bytes are read, or raise an error of
the documented type.

`GINI_LOSS_FUZZ=10000 pytest tests/test_files.py` draws that many fresh examples; without it each fuzz draws 150, the
same each time.
"""

import copy, hashlib, io, json, os, struct, warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

for name in ('fastai', 'pandas'):
    pytest.importorskip(name, reason="records are read with pandas and the engine")
warnings.filterwarnings('ignore', category=FutureWarning)
from gini_loss.records import RecordError, check_record, load_results, read_predictions, read_record
from gini_loss.study import Study, load_study, study_state
from gini_loss.checkpoint import CHECKPOINT_MAGIC
from gini_loss.train import (
    CheckpointError,
    Config,
    load_checkpoint,
    read_checkpoint_header,
    recipe,
    save_checkpoint,
    train,
)
from made_up import made_up_record, put, small, without_digests

FUZZ = int(os.environ.get('GINI_LOSS_FUZZ', 0))
profile = settings(
    max_examples=FUZZ or 150,
    derandomize=not FUZZ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

GOOD = made_up_record(small())[0]  # a good record, as versions before digests wrote it
NAME = GOOD['run_id']
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**30, -1, 0, 'nan', '../..']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    "All places in nested dicts and lists"
    yield path
    for k, v in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(v, (*path, k))


def with_changes(record, changes):
    record = copy.deepcopy(record)
    for path, how, new in changes:
        at = record
        try:
            for k in path[:-1]:
                at = at[k]
            if not path:
                record = new
            elif how == 'delete':
                del at[path[-1]]
            elif how == 'add' and isinstance(at, dict):
                at[str(new)[:8]] = new
            else:
                at[path[-1]] = new
        except (KeyError, IndexError, TypeError):
            pass
    return record


PLACES = list(places(GOOD))
changes = st.lists(
    st.tuples(st.sampled_from(PLACES), st.sampled_from(['replace', 'delete', 'add']), json_values),
    min_size=1,
    max_size=3,
)


def mutated(data):
    "`data` with a few bytes changed, removed, doubled or inserted"
    return st.lists(
        st.tuples(
            st.integers(0, max(len(data) - 1, 0)),
            st.sampled_from(['flip', 'cut', 'insert', 'double']),
            st.binary(max_size=4),
        ),
        max_size=4,
    ).map(lambda edits: _edit(data, edits))


def _edit(data, edits):
    for place, how, new in edits:
        place = min(place, len(data))
        data = {
            'flip': data[:place] + new + data[place + len(new) :],
            'cut': data[:place],
            'insert': data[:place] + new + data[place:],
            'double': data[:place] + data[place:] * 2,
        }[how]
    return data


def unchanged(folder, before):
    assert {p: p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()} == before


def files(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('files')


# ---- Records ----


def read_all(folder, file):
    "Whether the record is read: the same by the frame, by name and by a study, without changing the files"
    before = files(folder)
    try:
        runs = load_results(folder)
    except RecordError as e:
        assert file.stem in str(e)
        good = False
    else:
        assert len(runs) == 1
        good = True
    try:
        record = read_record(str(file))
        assert isinstance(record, dict) and good
    except RecordError as e:
        assert file.stem in str(e) and not good
    (state,) = study_state(Study('a', 'a', [small()]), folder, folder / 'checkpoints')
    assert state.state == ('done' if good else 'damaged')
    unchanged(folder, before)
    return good


@pytest.fixture
def unsealed(folder, request):
    "The path of a good record without digests, in a folder of its own"
    where = folder / request.node.originalname
    return without_digests(put(where, small()))


def test_the_good_record_is_good(unsealed):
    assert read_all(unsealed.parent, unsealed) and check_record(GOOD).run_id == GOOD['run_id']


@given(data=mutated(json.dumps(GOOD).encode()) | st.binary(max_size=60))
@profile
def test_fuzz_record_bytes(unsealed, data):
    unsealed.write_bytes(data)
    read_all(unsealed.parent, unsealed)


@given(edits=changes)
@profile
def test_fuzz_record_values(unsealed, edits):
    unsealed.write_text(json.dumps(with_changes(GOOD, edits)))
    read_all(unsealed.parent, unsealed)


@pytest.mark.parametrize(
    'text',
    ['', '[', '[]', '{}', 'null', '"a"', '1e999', '[' * 100_000, '{"a":' * 100_000, '1' * 10_000, '\ufeff{}', '\x00'],
)
def test_odd_json_is_a_bad_record(tmp_path, text):
    file = put(tmp_path, small())
    file.write_text(text)
    assert not read_all(tmp_path, file)


@given(data=st.data())
@profile
def test_fuzz_predictions(folder, data):
    "Any bytes as the npz of a record, with and without digests, are read, or raise an error that names the record"
    sealed = data.draw(st.booleans())
    file = put(folder / 'npz', small())
    if not sealed:
        without_digests(file)
    packed = file.with_suffix('.npz')
    any_bytes = (
        st.binary(max_size=60) | st.binary(max_size=40).map(lambda b: b'PK\x03\x04' + b) | mutated(packed.read_bytes())
    )
    whole, given = packed.read_bytes(), data.draw(any_bytes)
    packed.write_bytes(given)
    before = files(file.parent)
    try:
        assert isinstance(read_predictions(str(file)), dict) and (given == whole or not sealed)
    except RecordError as e:
        assert file.stem in str(e)
    unchanged(file.parent, before)


# ---- Checkpoints ----

CONFIG = recipe('test', epochs=2)
HEADER = dict(run_id=CONFIG.run_id, config=json.loads(json.dumps(asdict(CONFIG))), epoch=0, seconds=1.5, sessions=1)


def packed(header, payload, magic=CHECKPOINT_MAGIC):
    "A checkpoint with these bytes as header and state, and a valid checksum"
    digest = hashlib.blake2b(header + bytes(1), digest_size=32)
    digest.update(payload)
    return magic + struct.pack('<Q', len(header)) + header + digest.digest() + payload


@pytest.fixture(scope='module')
def good_checkpoint(folder):
    save_checkpoint(folder / 'good.pt', HEADER, dict(a=torch.arange(4.0), b=[1, 'x']))
    return (folder / 'good.pt').read_bytes()


def read_checkpoint(path, data):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    for read in (
        lambda: read_checkpoint_header(path),
        lambda: load_checkpoint(path)[0],
        lambda: load_checkpoint(path, CONFIG)[0],
    ):
        try:
            assert isinstance(read(), dict)
        except CheckpointError as e:
            assert path.name in str(e)
    assert path.read_bytes() == data and len(list(path.parent.iterdir())) == 1
    (state,) = study_state(Study('a', 'a', [CONFIG]), path.parent, path.parent)
    assert state.state in ('stopped', 'missing') and state.epochs >= 0


@given(data=st.data())
@profile
def test_fuzz_checkpoint_bytes(folder, good_checkpoint, data):
    kind = data.draw(st.sampled_from(['mutated', 'any', 'after the magic']))
    raw = data.draw(mutated(good_checkpoint) if kind == 'mutated' else st.binary(max_size=80))
    read_checkpoint(
        folder / 'checkpoint' / f'{CONFIG.run_id}.pt', CHECKPOINT_MAGIC + raw if kind == 'after the magic' else raw
    )


@given(
    header=json_values
    | changes.map(lambda c: with_changes(HEADER, [(p[-1:], h, v) for p, h, v in c]))
    | st.fixed_dictionaries(
        {}, optional=dict(epoch=json_values, seconds=json_values, config=json_values, sessions=json_values)
    ),
    payload=st.binary(max_size=40),
    whole=st.booleans(),
)
@profile
def test_fuzz_checkpoint_headers(folder, header, payload, whole):
    "With a valid checksum, so that the content is read"
    if whole:
        buffer = io.BytesIO()
        torch.save(dict(a=torch.ones(2)), buffer)
        payload = buffer.getvalue()
    read_checkpoint(folder / 'header' / f'{CONFIG.run_id}.pt', packed(json.dumps(header).encode(), payload))


@pytest.mark.parametrize('header', [b'', b'[', b'[]', b'null', b'[' * 100_000, b'\xff\xfe', b'1' * 10_000])
def test_odd_headers(tmp_path, header):
    read_checkpoint(tmp_path / 'c' / f'{CONFIG.run_id}.pt', packed(header, b''))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    "Only tensors, numbers and strings are unpickled"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'pwned'),)

    buffer = io.BytesIO()
    torch.save(dict(a=Evil()), buffer)
    (tmp_path / 'c.pt').write_bytes(packed(json.dumps(HEADER).encode(), buffer.getvalue()))
    with pytest.raises(CheckpointError, match='c.pt'):
        load_checkpoint(tmp_path / 'c.pt')
    assert not (tmp_path / 'pwned').exists()


@pytest.mark.parametrize(
    'data',
    [
        b'',
        b'x',
        CHECKPOINT_MAGIC,
        CHECKPOINT_MAGIC + b'\xff' * 8,
        packed(b'[]', b''),
        packed(json.dumps(HEADER).encode(), b'junk'),
    ],
    ids=['empty', 'x', 'magic', 'length', 'list', 'junk'],
)
def test_training_does_not_overwrite_a_checkpoint_that_it_cannot_read(tmp_path, data):
    path = tmp_path / 'checkpoints' / f'{CONFIG.run_id}.pt'
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=path.name):
        train(CONFIG, tmp_path / 'results', tmp_path / 'checkpoints', verbose=False, device='cpu')
    assert path.read_bytes() == data


# ---- Studies ----

STUDY = b"[study]\ntitle = a test # of studies\n[runs]\npreset = test\nloss = ce both\nseed = 0-2\nlr = 0.01 0.02\nmilestones = 1 2\nwidth = none 4\n[more]\npreset = laptop\nepochs = 3\n"
words = st.sampled_from(
    'preset loss seed lr width milestones arch title none test laptop both ce 0-2 3-1 0.1 nan inf true % [ ] = : # ; \n \t é ² \x00'.split(
        ' '
    )
    + ['[runs]\n', '[study]\n', '[DEFAULT]\n', '\n', ' = ']
)


def read_study(path, data):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    try:
        study = load_study(path)
    except ValueError:
        pass
    else:
        assert study.configs and all(isinstance(c, Config) for c in study.configs)
    assert path.read_bytes() == data and len(list(path.parent.iterdir())) == 1


def test_the_good_study_is_good(tmp_path):
    (tmp_path / 's.ini').write_bytes(STUDY)
    assert len(load_study(tmp_path / 's.ini').configs) == 2 * 3 * 2 * 2 + 1


@given(
    data=mutated(STUDY)
    | st.binary(max_size=60)
    | st.lists(words, max_size=14).map(lambda w: ' '.join(w).encode())
    | st.lists(words, max_size=14).map(lambda w: ('[runs]\n' + ' '.join(w)).encode())
)
@profile
def test_fuzz_study(folder, data):
    read_study(folder / 'study' / 's.ini', data)


@pytest.mark.parametrize(
    'line',
    ['seed = 0-999999999999', 'seed = 0-9999\nepochs = 1-9999', 'seed = ' + '1' * 5000, 'milestones = ' + '9' * 5000],
)
def test_studies_too_large_to_be_meant(tmp_path, line):
    "An error, not hours of computing or gigabytes of memory"
    (tmp_path / 's.ini').write_text(f'[runs]\npreset = test\n{line}\n')
    with pytest.raises(ValueError):
        load_study(tmp_path / 's.ini')
