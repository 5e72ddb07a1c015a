"Runs as a user starts them: papermill on the pre-training notebook."
import json, os, shutil, subprocess
from pathlib import Path

import pytest
from helpers import shard

root = Path(__file__).parent.parent

@pytest.fixture
def here(tmp_path):
    "A folder that looks like the repository's top, so that runs/ is made in it"
    shutil.copy(root/'settings.ini', tmp_path)
    (tmp_path/'runs').mkdir()
    return tmp_path

def papermill(here, *args):
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    return subprocess.run(['papermill', root/'nbs/02_pretrain.ipynb', 'runs/out.ipynb', '--log-output', '-p', 'preset', 'smoke',
                           *map(str, args)],
                          cwd=here, env=dict(env, OMP_NUM_THREADS='1'), stdin=subprocess.DEVNULL, capture_output=True, text=True)

def result(here, name): return json.loads((here/'runs'/name/'result.json').read_text())

def test_a_run_leaves_what_it_promises(here):
    done = papermill(here, '-p', 'objective', 'dino', '-p', 'name', 'x', '-p', 'seed', 3)
    assert done.returncode == 0, done.stderr[-3000:]
    r = result(here, 'x')
    assert (r['objective'], r['seed'], r['preset'], r['samples']) == ('dino', 3, 'smoke', 128)
    assert all({'object_linear', 'object_knn', 'word_linear', 'word_knn'} == r[k].keys() for k in ('val', 'test', 'untrained'))
    import timm, torch, clipdino.objectives
    encoder = timm.create_model(f'local-dir:{here}/runs/x', pretrained=True)
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 32)
    stamp = (here/'runs/x/result.json').stat().st_mtime_ns
    again = papermill(here, '-p', 'objective', 'dino', '-p', 'name', 'x', '-p', 'seed', 3)
    assert again.returncode == 0 and 'is complete' in again.stderr + again.stdout and (here/'runs/x/result.json').stat().st_mtime_ns == stamp
    other = papermill(here, '-p', 'objective', 'dino', '-p', 'name', 'x', '-p', 'seed', 4)
    assert other.returncode != 0 and 'seed was 3 and is now 4' in other.stderr

@pytest.mark.parametrize('name,value,message', [('objectiv', 'clip', 'no such setting: objectiv'),
                                                ('objective', 'mae', 'is not one of clip, siglip'), ('samples', '250.5', 'must be int'),
                                                ('data', 'nowhere/*.tar', 'nowhere')])
def test_bad_settings_stop_the_run(here, name, value, message):
    done = papermill(here, '-p', name, value)
    assert done.returncode != 0 and message in done.stderr
    assert list((here/'runs').glob('*/')) == []

def test_shards_with_broken_samples(here):
    for k in range(3): shard(here/f'{k}.tar', 50*k, 50, broken=(7, 60))
    done = papermill(here, '-p', 'data', f'{here}/{{0..1}}.tar', '-p', 'name', 'w', '-p', 'workers', 2, '-p', 'max_bad', .1, '-p',
                     'eval_data', f'{here}/2.tar')
    assert done.returncode == 0, done.stderr[-3000:]
    r = result(here, 'w')
    assert r['data']['bad'] and set(r['data']['bad']) == {'undecodable image'} and r['retrieval']['pairs'] == 50
    done = papermill(here, '-p', 'data', f'{here}/0.tar', '-p', 'name', 'v', '-p', 'max_bad', .001)
    assert done.returncode != 0 and 'max_bad=0.001' in done.stderr and not (here/'runs/v/result.json').exists()
