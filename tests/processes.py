"""Processes with the training engine already imported, for tests that kill them or train with several.

A server imports the engine once and forks the processes, so starting one takes milliseconds instead of seconds.
"""

import multiprocessing
import sys
import warnings

kind = 'forkserver' if 'forkserver' in multiprocessing.get_all_start_methods() else 'spawn'
context = multiprocessing.get_context(kind)
if kind == 'forkserver':
    context.set_forkserver_preload(['gini_loss.study'])


def start(target, *args):
    "A process that runs `target(*args)` on one thread"
    process = context.Process(target=_on_one_thread, args=(target, *args), daemon=True)
    process.start()
    return process


def _on_one_thread(target, *args):
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    sys.exit(target(*args))


def finish(*processes):
    "Wait until all processes have ended, and assert that none failed"
    for process in processes:
        process.join(300)
        assert process.exitcode == 0, f"exit status {process.exitcode}"


def import_engine():
    "Nothing else: start this first in a test whose processes must begin at once"
    import gini_loss.study  # noqa: F401


def run_train(argv):
    "The command `gini_train`"
    from gini_loss.train import main

    return main(argv)


def run_study(argv, deadline=None):
    "The command `gini_study`; with a deadline, as a worker that has it from the command that started it"
    import os

    from gini_loss.study import main

    if deadline is not None:
        os.environ['GINI_LOSS_DEADLINE'] = str(deadline)
    return main(argv)


def train_an_epoch(path, arch, precision, lr, turned, rank=0, processes=1):
    "Train ten steps, alone or as one of several processes. The first saves the state of the network and its log"
    import torch
    import torch.distributed as dist

    from gini_loss.train import build_dls, build_learner, recipe

    if processes > 1:
        dist.init_process_group('gloo', init_method=f'file://{path}.store', rank=rank, world_size=processes)
    c = recipe(
        'test',
        loss='both',
        start_epoch=0,
        optimizer='sgd',
        lr=lr,
        momentum=0.9,
        train_per_class=20,
        bs=20,
        epochs=1,
        arch=arch,
        precision=precision,
    )
    dls = build_dls(c, device='cpu')
    if turned:  # each batch with its images in reverse order
        order = torch.cat([part.flip(0) for part in dls.train.order(0).split(dls.train.bs)])
        dls.loaders[0] = dls.train.new(get_idxs=order.tolist)
    learn = build_learner(c, dls)
    learn.fit(1)
    if rank == 0:
        torch.save((learn.plain_model.state_dict(), learn.epoch_log.columns), path)
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def take_a_lock_often(lock, held):
    "Take the lock up to eight times. FileExistsError if another process holds it at the same time"
    import os
    import time

    from gini_loss.checkpoint import RunLock, RunLocked

    for _ in range(8):
        try:
            with RunLock(lock):
                with open(held, 'x'):
                    time.sleep(0.01)
                os.remove(held)
        except RunLocked:
            time.sleep(0.01)
