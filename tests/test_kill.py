"Runs that are killed at any moment and started again end with the bytes of an unbroken run."
import json, os, random, signal, time

import pytest
import torch
from helpers import group, shard, start

from clipdino.core import Metrics
from clipdino.pretrain import OBJECTIVES, Trainer, fit, pretrain, settings, state_tensors, tensors_digest

def run(folder, given):
    os.chdir(folder)
    torch.set_num_threads(1)
    pretrain(settings('smoke', **given))

def made(folder):
    "All that a run leaves, without what was measured with a clock"
    d = folder/'runs/x'
    rows = [{k: v for k, v in r.items() if k not in ('seconds', 'images_per_s', 'waited')} for r in Metrics.read(d/'metrics.jsonl')]
    result = {k: v for k, v in json.loads((d/'result.json').read_text()).items()
              if k not in ('images_per_s', 'waited', 'seconds_of_last_start', 'environment')}
    return rows, result, [(d/f).read_bytes() for f in ('model.safetensors', 'objective.safetensors', 'config.json', 'bad.jsonl')], sorted(p.name for p in d.iterdir())

def lines(folder): return len(Metrics.read(folder/'runs/x/metrics.jsonl'))

CASES = dict(clip=dict(objective='clip', probes=2, micro=5), dino=dict(objective='dino', drop_path=.2),
             siglip=dict(objective='siglip', data='shards'), lm=dict(objective='clip-lm', data='shards', micro=8, samples=1600))

OWN = os.environ.get('CLIPDINO_SHARDS')  # of your own, to run the test on them too
if OWN: CASES |= {f'own_{o}': dict(objective=o, data=OWN) for o in OBJECTIVES}

@pytest.mark.parametrize('case', CASES)
def test_killed_at_random_moments(tmp_path, case):
    "Twelve times, some with another number of loader processes at each start, on the world and on shards with broken samples"
    chance = random.Random(case)
    given = dict(dict(name='x', samples=3200, save_every=32, max_bad=.2), **CASES[case])
    for d in 'straight', 'killed':
        (tmp_path/d).mkdir()
        (tmp_path/d/'settings.ini').touch()
    if given.get('data') == 'shards':
        for k in 0, 1: shard(tmp_path/f'{k}.tar', 40*k, 40, broken=(3, 50, 61))
        given['data'] = f'{tmp_path}/*.tar'
    start(run, tmp_path/'straight', given).join()
    for kill in range(12):
        before, more = lines(tmp_path/'killed'), chance.randrange(5)
        p = start(run, tmp_path/'killed',
                  dict(given, workers=chance.choice((0, 1, 2)) if case in ('dino', 'siglip', 'own_clip', 'own_dino') else 0))
        while p.is_alive() and lines(tmp_path/'killed') < before + more: time.sleep(.002)
        time.sleep(chance.random()*(.05 if more else .5))
        os.kill(p.pid, chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
        p.join()
        assert p.exitcode < 0, 'it ended before it was killed'
    p = start(run, tmp_path/'killed', given)
    p.join()
    assert p.exitcode == 0 and made(tmp_path/'killed') == made(tmp_path/'straight')
    rows = made(tmp_path/'straight')[0]
    assert [r['step'] for r in rows if 'loss' in r] == list(range(1, given['samples']//16 + 1))
    if case in ('siglip', 'lm'):
        assert made(tmp_path/'straight')[1]['data']['bad'] == {'undecodable image': len((tmp_path/'straight/runs/x/bad.jsonl').read_text().splitlines())}

def test_killed_while_a_state_is_written(tmp_path):
    "Large states, and the process killed when one is half there"
    given = dict(objective='dino', name='x', samples=192, save_every=16, probes=0, prototypes=32768, bottleneck=32)
    for d in 'straight', 'killed':
        (tmp_path/d).mkdir()
        (tmp_path/d/'settings.ini').touch()
    start(run, tmp_path/'straight', given).join()
    halves = 0
    for kill in range(4):
        p, d = start(run, tmp_path/'killed', given), tmp_path/'killed/runs/x'
        done = {s.name for s in d.glob('state-*')} if kill else set()
        while p.is_alive() and not (d.is_dir() and any(f.startswith('.state') and f[1:].split('.')[0] + '.safetensors' not in done
                                                       for f in os.listdir(d))):
            pass
        p.kill()
        p.join()
        halves += any(f.startswith('.state') for f in os.listdir(d))
        while kill == 0 and not list(d.glob('state-*')):  # let the next start find something
            q = start(run, tmp_path/'killed', given)
            while q.is_alive() and not list(d.glob('state-*')): pass
            q.kill(), q.join()
    assert halves >= 2
    start(run, tmp_path/'killed', given).join()
    assert made(tmp_path/'killed') == made(tmp_path/'straight')

def some_steps(given, folder, until):
    "Train up to step `until` as one of several processes; digest of the state"
    t = Trainer(settings('smoke', **given), folder)
    update = t.update
    def stop(batch):
        if t.step == until: raise InterruptedError
        return update(batch)
    t.update = stop
    try: fit(t)
    except InterruptedError: pass
    return tensors_digest(state_tensors(t.objective, t.opt)), [(r['step'], r['loss']) for r in t.metrics.rows()]

@pytest.mark.parametrize('objective,n', [('clip', 2), ('dino', 2), ('clip', 3)])
def test_several_processes_that_were_cut(tmp_path, objective, n):
    "From three on, a sum depends on the order of its terms"
    given, ends = dict(objective=objective, name='x', batch=12, samples=192, save_every=36, probes=0, drop_path=.2), []
    for cuts in (), (4, 11):
        d = tmp_path/f'{len(cuts)}'
        d.mkdir()
        for until in *cuts, -1: end = group(n, some_steps, given, d, until)
        ends.append(end)
    assert ends[0] == ends[1] and len(ends[0][1]) == 16
