"What the pages tell a reader to type would be accepted, the reference is that of this code, and objectives from elsewhere reach every process."
import importlib, json, os, re, shlex, subprocess, sys
from inspect import isclass, isfunction
from pathlib import Path

import pytest
from papermill.cli import _resolve_type

from clipdino import grid, pretrain, probe, vlm, vmcbench
from clipdino.core import PRESETS, SettingsError, digest, listed, one_of
from clipdino.data import _parts
from clipdino.encoders import SCHEMES, load_encoder
from clipdino.grid import RUNS
from clipdino.objectives import Own
from clipdino.questions import SPLIT_FILES
from clipdino.sets import split_spec

root = Path(__file__).parent.parent
NOTEBOOKS = {k.notebook: k.settings for k in RUNS.values() if k.notebook} | {'07_study': lambda preset='mini', studies='main': grid.settings(preset, studies=studies)}
MODULES = dict(pretrain=pretrain, vlm=vlm, grid=grid)
PAGES = 'README.md', 'nbs/index.ipynb', 'nbs/reproduce.ipynb', 'nbs/extend.ipynb'

def prose(path:Path)->str:
    "The text of a page, without the code that it runs"
    text = path.read_text()
    return text if path.suffix == '.md' else '\n\n'.join(''.join(c['source'])
                                                         for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown')

def commands(text:str)->list: # -> words of each
    "Every command in blocks of code and in code within a line"
    blocks, inline = re.findall(r'```\w*\n(.+?)\n```', text, re.S), re.findall(r'(?<!`)`([^`\n]+)`(?!`)', re.sub(r'```.+?```', '', text, flags=re.S))
    lines = [l for b in blocks for l in b.replace('\\\n', ' ').splitlines()] + inline
    parts = [shlex.split(p) for l in lines for p in re.split(r' && |; ', l) if re.search(r'papermill nbs/|-m clipdino\.', p)]
    return [p[p.index('papermill') if 'papermill' in p else p.index('-m'):] for p in parts]

def check(words:list)->list:
    "What the command would run; raise `SettingsError` or AssertionError if it would be refused"
    if words[0] == '-m': return check_program(words[1].removeprefix('clipdino.'), words[2:])
    name = re.fullmatch(r'nbs/(\w+)\.ipynb', words[1])[1]
    assert name in NOTEBOOKS and re.fullmatch(r'runs/[\w-]+\.ipynb', words[2]), words
    rest = [w for w in words[3:] if w not in ('--log-output', '--no-progress-bar')]
    assert len(rest) % 3 == 0 and set(rest[::3]) <= {'-p'}, words
    given = {k: _resolve_type(v) for k, v in zip(rest[1::3], rest[2::3])}
    run = NOTEBOOKS[name](**given)
    check_run(run)
    return [run]

def check_program(name:str, options:list)->list:
    "As the program would read them"
    if name == 'study':
        one_of('preset', *options or ['mini'], PRESETS)
        return []
    module, seen, program = MODULES[name], [], pretrain.program
    def only_settings(about, kind, go, text, args): program(about, kind, lambda **given: seen.append(module.settings(**given)), text, args)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, 'program', only_settings)
        try: module.main(options)
        except SystemExit as e: raise SettingsError(f'{name} {options}: {e}') from None
    for run in seen: check_run(run)
    assert seen
    return seen

def check_run(run):
    "The names in it are such as are read; whether files are there is another matter"
    if isinstance(run, grid.Grid):
        for j in grid.jobs(run): check_run(j.run)
    if isinstance(run, vlm.VLMRun):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(vlm.LlavaJson, 'places', lambda *places: places)
            vlm.check_inputs(run)
    if isinstance(run, probe.ProbeRun): [split_spec(s.removeprefix('maps:')) for s in listed(run.data) if s != 'world']
    if isinstance(run, pretrain.Pretrain):
        # `shards` is the folder that the page's own command fills
        assert run.data in ('world', 'shards') or all(p.endswith('.tar') or '/' in p for p in _parts(run.data)), run.data
        if run.probe_data: split_spec(run.probe_data)
    if isinstance(run, vmcbench.Score) and run.questions.startswith('vmcbench'):
        assert run.questions.split(':')[1] in SPLIT_FILES, run.questions
    encoder = getattr(run, 'encoder', '')
    assert ':' not in encoder or encoder.partition(':')[0] in SCHEMES, encoder

@pytest.fixture
def simclr(monkeypatch):
    "The objective that the page on extending has"
    monkeypatch.setitem(pretrain.OWN, 'simclr', Own(make=None, views=None))

@pytest.mark.parametrize('page', PAGES)
def test_every_command_would_be_accepted(page, simclr):
    found = commands(prose(root/page))
    assert found
    for words in found: check(words)

@pytest.mark.parametrize('page', PAGES)
def test_no_two_commands_of_a_page_take_one_folder_for_different_runs(page, simclr):
    made = {}
    for run in (r for words in commands(prose(root/page)) for r in check(words)):
        if not isinstance(run, grid.Grid): assert made.setdefault(run.folder_name, run) == run, f'{run.folder_name} is the folder of two runs'

def test_the_pages_have_a_command_for_every_kind_of_run():
    found = [w for p in PAGES for w in commands(prose(root/p))]
    assert {w[1].split('/')[1].split('.')[0] for w in found if w[0] == 'papermill'} >= {'02_pretrain', '03_probe', '05_vlm', '06_vmcbench'}
    assert {w[1] for w in found if w[0] == '-m'} == {f'clipdino.{m}' for m in (*MODULES, 'study')}

@pytest.mark.parametrize('command, said', [
    ('papermill nbs/02_pretrain.ipynb runs/x.ipynb -p objectiv clip', 'did you mean objective'),
    ('papermill nbs/02_pretrain.ipynb runs/x.ipynb -p lr fast', 'must be float'), ('papermill nbs/08_x.ipynb runs/x.ipynb', ''),
    ('papermill nbs/03_probe.ipynb runs/x.ipynb -p data imagnet:data/x', 'did you mean imagenet'),
    ('papermill nbs/05_vlm.ipynb runs/x.ipynb -p stage1_data list.json', 'neither world nor JSON:FOLDER'),
    ('papermill nbs/06_vmcbench.ipynb runs/x.ipynb -p questions vmcbench:train', ''), ('papermill nbs/02_pretrain.ipynb -p seed 1', ''),
    ('papermill nbs/05_vlm.ipynb runs/x.ipynb -p encoder openclip:ViT-B-16/openai', ''),
    ('accelerate launch -m clipdino.pretrain --objectives clip', ''), ('python -m clipdino.grid --preset large', 'is not one of smoke'),
    ('python -m clipdino.grid --preset paper', 'has no data of its own'),
    ('python -m clipdino.grid --given "vlm.lora=many"', 'must be int'),
    ('accelerate launch -m clipdino.vlm --preset paper', 'as JSON:FOLDER')])
def test_wrong_commands_are_noticed(command, said):
    (words,) = commands(f'text\n\n```sh\n{command}\n```\n')
    with pytest.raises((SettingsError, AssertionError, TypeError), match=re.escape(said) or None): check(words)

def test_commands_are_found_wherever_they_stand():
    text = 'a `papermill nbs/02_pretrain.ipynb runs/a.ipynb` and\n\n```sh\npip install x && CLIPDINO_PLUGINS=y papermill nbs/03_probe.ipynb \\\n  runs/b.ipynb\naccelerate launch -m clipdino.vlm --preset mini\n```\n'
    assert [w[:3] for w in commands(text)] == [['papermill', 'nbs/03_probe.ipynb', 'runs/b.ipynb'], ['-m', 'clipdino.vlm', '--preset'],
                                               ['papermill', 'nbs/02_pretrain.ipynb', 'runs/a.ipynb']]

def test_the_reference_is_of_this_code():
    cells = json.loads((root/'nbs/reference.ipynb').read_text())['cells']
    space, (shown,) = {}, [c['outputs'] for c in cells if c.get('outputs')]
    for c in cells:
        if c['cell_type'] == 'code' and not c['outputs']: exec(''.join(c['source']), space)
    made = space['reference']()
    assert ''.join(shown[0]['data']['text/markdown']) == made, 'execute nbs/reference.ipynb and commit it'
    for p in root.glob('clipdino/[a-z]*.py'):
        m = importlib.import_module(f'clipdino.{p.stem}')
        part = re.search(rf'^## clipdino\.{p.stem}$.*?(?=^## |\Z)', made, re.M | re.S)[0]
        there = set(re.findall(r'^(?:def|class) (\w+)', part, re.M))
        assert there == {n for n in m.__all__ if (isclass(v := getattr(m, n)) or isfunction(getattr(v, '__wrapped__', v)))
                         and v.__module__ == m.__name__}

def test_objectives_from_elsewhere(tmp_path, monkeypatch, capsys):
    "The class on the page on extending as a plugin: trained by the program; its encoder opens where nobody knows the objective"
    source, = [s for c in json.loads((root/'nbs/extend.ipynb').read_text())['cells'] if 'class SimCLR' in (s := ''.join(c['source']))]
    (tmp_path/'simclr.py').write_text(source)
    with pytest.raises(SettingsError, match='is not one of clip'): pretrain.settings('smoke', objective='simclr')
    env = dict(os.environ, PYTHONPATH=f'{tmp_path}{os.pathsep}{root}', CLIPDINO_PLUGINS='simclr')
    p = subprocess.run([sys.executable, '-m', 'clipdino.pretrain', *'--objective simclr --preset smoke --samples 32 --probes 0'.split()],
                       cwd=tmp_path, env=env, capture_output=True, text=True)
    folder = tmp_path/'runs'/'simclr-smoke-s0'
    assert p.returncode == 0 and (folder/'result.json').exists(), p.stderr
    capsys.readouterr()
    e = load_encoder(str(folder))
    assert e.dim == 32 and not e.has_text and 'the objective simclr is not known here, so that a text tower, if there is one, is not read' in capsys.readouterr().out
    assert load_encoder(f'random:{folder}').fingerprint != e.fingerprint
    assert json.loads((folder/'result.json').read_text())['environment']['plugins'] == dict(simclr=digest((tmp_path/'simclr.py').read_bytes()))
    def importing(plugins, first):
        return subprocess.run([sys.executable, '-c', f'import clipdino.{first}; from clipdino.core import load_plugins; load_plugins(); from clipdino.objectives import OWN; print(list(OWN))'], cwd=tmp_path, env=dict(env, CLIPDINO_PLUGINS=plugins), capture_output=True, text=True)
    for first in 'pretrain', 'objectives', 'encoders': assert importing('simclr', first).stdout == "['simclr']\n", first
    (tmp_path/'late.py').write_text('from clipdino.probe import device_of')  # which itself needs all of pre-training
    assert importing('late', 'encoders').returncode == 0
    for wrong in 'simclr.py', 'nothing', 'clipdino.nothing.at_all', './simclr.py':
        assert f'CLIPDINO_PLUGINS names {wrong}, and no such module is found' in importing(wrong, 'pretrain').stderr
    monkeypatch.setitem(pretrain.OWN, 'simclr', Own(make=None, views=None, joint=True))
    assert load_encoder(str(folder)).has_text and not capsys.readouterr().out  # as it says of itself where it is known
