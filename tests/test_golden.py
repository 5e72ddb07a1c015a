"""Fifty steps of every objective in double precision give the losses they gave before, and files of earlier versions keep loading.

    python tests/test_golden.py curves    # who changes what is computed runs this, and says why in the commit
    python tests/test_golden.py files     # at a release: adds its files, and leaves those of others
"""
import json, platform, shutil, sys, tempfile
from pathlib import Path

import pytest
import torch
from helpers import Noise

import clipdino
from clipdino.pretrain import OBJECTIVES, Trainer, finish, fit, open_encoder, settings

here = Path(__file__).parent/'golden'
versions = sorted(p.name for p in here.glob('[0-9]*'))

def machine():
    "Where results are the same bit by bit"
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), '') if Path('/proc/cpuinfo').exists() else platform.processor()
    return f'{cpu}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}'

def curve(objective, folder):
    "Loss and gradient norm of each step; local crops as large as global ones, since timm resizes position embeddings in single precision"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    t = Trainer(settings('smoke', objective, name='golden', probes=0, samples=400, batch=8, precision='fp64', drop_path=.2, save_every=400, local_size=32), folder, source=Noise())
    fit(t)
    return [[r['loss'], r['grad_norm']] for r in t.metrics.rows()]

@pytest.mark.parametrize('objective', OBJECTIVES)
def test_losses_are_those_of_before(tmp_path, objective):
    then, now = json.loads((here/f'{objective}.json').read_text()), curve(objective, tmp_path)
    assert len(now) == 50
    assert now == (then['curve'] if then['machine'] == machine() else [pytest.approx(r, rel=1e-9) for r in then['curve']])

def small(objective): return settings('smoke', objective, name='old', probes=0, samples=96, batch=8, save_every=48, vocab=520, canvas=40)
def image(): return torch.arange(3*32*32).reshape(1, 3, 32, 32)/3072

def test_there_are_files_of_this_version(): assert clipdino.__version__ in versions

@pytest.mark.parametrize('objective', ['clip', 'dino'])
@pytest.mark.parametrize('version', versions)
def test_files_of_earlier_versions_keep_loading(tmp_path, version, objective):
    "A run that was cut continues; the encoder opens and gives its features"
    shutil.copytree(here/version/objective, tmp_path/'runs')
    then = json.loads((here/version/f'{objective}.json').read_text())
    t = Trainer(small(objective), tmp_path/'runs/cut', source=Noise())
    assert t.step == 6
    fit(t)
    assert [r['loss'] for r in t.metrics.rows()] == pytest.approx(then['losses'], rel=1e-4)
    with torch.no_grad(): features = open_encoder(tmp_path/'runs/old')(image())
    assert features[0, :8].tolist() == pytest.approx(then['features'], rel=1e-4, abs=1e-5)

def write_curves():
    for o in OBJECTIVES:
        with tempfile.TemporaryDirectory() as d: rows = ',\n'.join(map(json.dumps, curve(o, Path(d))))
        (here/f'{o}.json').write_text(f'{{"machine": {json.dumps(machine())}, "curve": [\n{rows}]}}\n')

def write_files():
    for o in 'clip', 'dino':
        d = here/clipdino.__version__/o
        for part in 'cut', 'old': (d/part).mkdir(parents=True)
        t = Trainer(small(o), d/'cut', source=Noise())
        scores = fit(t)
        losses = [r['loss'] for r in t.metrics.rows()]
        for f in d.glob('cut/*'): shutil.copy(f, d/'old')
        t.folder = d/'old'
        t.metrics.path = d/'old/metrics.jsonl'
        finish(t, scores, 0.)
        sorted(d.glob('cut/state*'))[-1].unlink()  # as if cut at step 6
        for f in d.glob('old/*'):
            if f.name not in ('config.json', 'model.safetensors'): f.unlink()
        with torch.no_grad(): features = open_encoder(d/'old')(image())[0, :8].tolist()
        (d.parent/f'{o}.json').write_text(json.dumps(dict(losses=losses, features=features), indent=1) + '\n')

if __name__ == '__main__':
    here.mkdir(exist_ok=True)
    {'curves': write_curves, 'files': write_files}[sys.argv[1]]()
