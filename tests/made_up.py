"Made-up records of any configuration, in the form that the engine writes, for the tests that read records."

import json
from dataclasses import asdict

import numpy as np

from gini_loss.records import SCHEMA, known_labels, write_record
from gini_loss.train import recipe


def predictions(labels, accuracy):
    "Predictions (N,) int16; the first ones are correct, a share of `accuracy`"
    right = round(accuracy * len(labels))
    return np.where(np.arange(len(labels)) < right, labels, (labels + 1) % 100).astype(np.int16)


def made_up_record(config, test=0.5, caltech=None, best=None, device='a device', seconds=60.0):
    "A valid record and its arrays: test and Caltech accuracy after the last epoch, and `best` in the best epoch"
    labels, arrays, scores = known_labels(config), {}, {}
    for when, accuracy in (('last', test), ('best', test if best is None else best)):
        pred = predictions(labels['test'], accuracy)
        arrays |= {f'{when}_test_pred': pred, f'{when}_test_confidence': np.full(len(pred), 0.5, np.float16)}
        scores[when] = dict(
            epoch=config.epochs - 1,
            valid_accuracy=0.5,
            test_accuracy=float((pred == labels['test']).mean()),
            test_loss=1.0,
            caltech_accuracy=None,
            caltech_loss=None,
            caltech_accuracy_12=None,
        )
        if caltech is None:
            continue
        pred = predictions(labels['caltech'], caltech)
        right = float((pred == labels['caltech']).mean())
        arrays |= {f'{when}_caltech_pred': pred, f'{when}_caltech_pred_12': pred}
        scores[when] |= dict(caltech_accuracy=right, caltech_accuracy_12=right, caltech_loss=1.0)
    arrays |= dict(layer_impurity=np.full(32, 0.5, np.float32), layer_dead=np.zeros(32, bool))
    record = dict(
        format=1,
        run_id=config.run_id,
        config_hash=config.config_hash,
        pair_hash=config.pair_hash,
        config=json.loads(json.dumps(asdict(config))),
        **scores,
        layer=dict(name='layer4', channels=32, dead_channels=0, gini=0.5, kl=0.1),
        seconds=dict(training=seconds, session=seconds, sessions=1),
        hardware=dict(device='cpu', device_name=device, cores=2, threads=1, processes=1),
        versions=dict(python='3', torch='2', fastai='2', gini_loss='0'),
        source=dict(commit=None),
        finished='2026-01-01',
        epochs={name: [0.5] * config.epochs for name in SCHEMA['epochs']},
    )
    return record, arrays


def put(folder, config, *args, **options):
    "Write a made-up record, and return the path of its JSON file"
    return write_record(folder, *made_up_record(config, *args, **options))


def small(**changes):
    "A configuration of made-up images with two epochs"
    return recipe('test', **{'epochs': 2, **changes})


def without_digests(path):
    "Remove the digests of a record, as older versions wrote it, and return its path"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b''.join(line for line in lines if b'digest"' not in line))
    return path
