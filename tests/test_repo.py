"The notebooks, the package, the README and the run command stay in step."
import hashlib, importlib, json, os, re, shutil, subprocess, sys
from dataclasses import fields
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
notebooks = sorted(p for p in root.glob('nbs/*.ipynb') if p.name[0] not in '_.')
each_notebook = pytest.mark.parametrize('p', notebooks, ids=lambda p: p.name)

def cells(p): return json.loads(p.read_text())['cells']
def source(c): return ''.join(c['source'])

def test_package_matches_notebooks(tmp_path):
    "Export afresh elsewhere, so that a stale package fails every time and not only the first"
    shutil.copy(root/'settings.ini', tmp_path)
    shutil.copytree(root/'nbs', tmp_path/'nbs')
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}  # with it, nbdev_export does nothing
    subprocess.run(['nbdev_export'], cwd=tmp_path, check=True, env=env)
    def code(d): return {p.name: p.read_text() for p in (d/'clipdino').glob('*.py')}
    assert code(tmp_path) == code(root), 'run nbdev_export and commit the result'

def test_notebooks_are_clean(tmp_path):
    shutil.copy(root/'settings.ini', tmp_path)
    shutil.copytree(root/'nbs', tmp_path/'nbs')
    subprocess.run(['nbdev_clean'], cwd=tmp_path, check=True)
    for p in notebooks: assert (tmp_path/'nbs'/p.name).read_text() == p.read_text(), f'run nbdev_clean and commit {p.name}'

def test_every_module_has_a_notebook_and_imports():
    named = {m for p in notebooks for m in re.findall(r'"#\| default_exp (\w+)', p.read_text())}
    assert named == {p.stem for p in root.glob('clipdino/*.py') if p.name[0] != '_'}
    code = "import importlib, sys\nfor m in sys.argv[1:]:\n    for k in [k for k in sys.modules if k.startswith('clipdino')]: del sys.modules[k]\n    importlib.import_module(f'clipdino.{m}')"
    # each anew, but for what it has from other packages
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *sorted(named)], cwd=root, check=True)

@each_notebook
def test_kernel_is_portable(p):
    assert json.loads(p.read_text())['metadata']['kernelspec'] == dict(name='python3', language='python', display_name='python3')

@each_notebook
def test_no_leftovers(p):
    text = p.read_text()
    assert 'injected-parameters' not in text
    assert not re.search(r'(?<![\w.])/(?:root|home/\w+|work|tmp)/', text), 'a path of one machine'
    assert not any(o['output_type'] == 'error' for c in cells(p) for o in c.get('outputs', []))

@each_notebook
def test_reads_well_unrun(p):
    code = [c for c in cells(p) if c['cell_type'] == 'code' and source(c).strip()]
    assert any(c['outputs'] for c in code), 'commit it executed'
    assert p.stat().st_size < 1_500_000

@each_notebook
def test_nbdev_and_quarto_options_never_share_a_cell(p):
    for c in cells(p):
        opts = re.findall(r'^#\|(.*)$', source(c), re.M)
        assert not (any(':' in o for o in opts) and any(':' not in o for o in opts)), source(c)

def filtered(cells):
    "What Quarto gets of `cells`"
    text = subprocess.run([sys.executable, root/'nbs/_quarto_filter.py'], input=json.dumps(dict(cells=cells)), capture_output=True,
                          text=True, check=True).stdout
    return json.loads(text)['cells']

def code(source, *data): return dict(cell_type='code', source=source, outputs=[dict(output_type='display_data', data=d) for d in data])

def test_the_site_hides_folds_and_loads_nothing():
    "Directives and hidden cells go, imports and long drawing code fold, no output makes Quarto load scripts"
    png, table = {'image/png': 'x'}, {'text/html': ['<td>&nbsp;</td>\n', '<td>1</td>'], 'text/plain': '1'}
    imports = 'import os\n\nfrom a import (b,\n               c)\nfrom d import e  # why\n'
    said = [source(c) for c in filtered([
        code('#| hide\n1'), code('#| default_exp x'), dict(cell_type='markdown', source='#| hide'), code('#| export\n#| label: x\nf()\n'),
        code('#| export\n' + imports), code(imports + 'f()'), code('a\nb\n# c\n\nd\n', png), code('a\nb\nc\nd', png),
        code('a\nb\nc\nd', {'text/plain': 'x'})])]
    fold = '#| code-fold: true\n#| code-summary: '
    assert said == ['#| hide', '#| label: x\nf()\n', fold + 'Imports\n' + imports, imports + 'f()', 'a\nb\n# c\n\nd\n',
                    fold + 'Code\na\nb\nc\nd', 'a\nb\nc\nd']
    c, = filtered([code('t', table, {'application/vnd.jupyter.widget-view+json': {}, 'text/plain': 'bar'})])
    assert [o['data'] for o in c['outputs']] == [{'text/plain': '1', 'text/markdown': ['```{=html}\n', '<td></td>\n<td>1</td>', '\n```\n']}]

@each_notebook
def test_every_figure_has_an_alternative_text(p):
    for c in cells(p):
        if any(k.startswith('image/') for o in c.get('outputs', []) for k in o.get('data', {})):
            assert '#| fig-alt: ' in source(c), source(c)

def test_every_notebook_is_on_the_site_and_in_the_readme():
    for text in (root/'_quarto.yml').read_text(), (root/'README.md').read_text():
        for p in notebooks: assert f'nbs/{p.name}' in text

def test_an_installation_inside_of_another_repository_has_no_commit(tmp_path):
    def git(*a): subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *a], cwd=tmp_path, check=True, capture_output=True)
    (copy := tmp_path/'core.py').write_text((root/'clipdino/core.py').read_text())
    git('init'), git('commit', '--allow-empty', '-m', 'theirs')
    spec = importlib.util.spec_from_file_location('a_copy', copy)
    spec.loader.exec_module(m := importlib.util.module_from_spec(spec))
    assert m.commit() == ''
    git('add', '.'), git('commit', '-m', 'ours')
    assert re.fullmatch('[0-9a-f]{12}', m.commit())

def anchor(heading:str)->str: return re.sub(r'^[^a-z]+', '', re.sub(r'[^\w\s.-]', '', heading.lower()).strip().replace(' ', '-'))

def shown(p)->str:
    "The Markdown of a page: its own, and what its cells print"
    if p.suffix == '.md': return p.read_text()
    parts = [source(c) if c['cell_type'] == 'markdown' else
             '\n'.join(''.join(o['data'].get('text/markdown', '')) for o in c['outputs'] if 'data' in o) for c in cells(p) if c['cell_type'] != 'raw']
    return '\n'.join(parts)

def test_links_lead_somewhere():
    "Within the site and the repository, down to the heading or the figure"
    targets, links = {}, []
    for p in (*notebooks, *root.glob('*.md')):
        text = re.sub(r'^```.*?^```|`[^`\n]+`', lambda m: '' if m[0].startswith('```') else re.sub(r'[][]', '', m[0]), shown(p), flags=re.M | re.S)
        targets[p] = {anchor(re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', h)) for h in re.findall(r'^#+ (.+)$', text, re.M)}
        if p.suffix == '.ipynb': targets[p] |= set(re.findall(r'^#\| label: (\S+)', '\n'.join(map(source, cells(p))), re.M))
        links += [(p, u) for u in re.findall(r'\]\(([^)\s]+)\)', text) if not re.match(r'\w+:', u)]
    assert len(links) > 150
    for p, u in links:
        path, _, at = u.partition('#')
        to = (p.parent/path).resolve() if path else p
        assert to.exists(), f'{p.name}: {u}'
        assert not at or at in targets[to], f'{p.name}: {u}'

def test_no_page_is_older_than_the_results():
    "Every page that reads the study's tables prints their digest, and it is today's; so does the README's table of claims"
    from clipdino.core import stamp
    pages = [p for p in notebooks if re.search(r"results_dir\(\)/'study'/|Results\(", ''.join(map(source, cells(p))))]
    assert len(pages) >= 5
    for p in pages: assert f'from result files {stamp()}' in p.read_text(), f'execute {p.name} again'
    assert f'from result files {stamp()}:' in (root/'README.md').read_text(), 'run python -m clipdino.study again'
    from clipdino.study import OTHERWISE
    for p in (root/'nbs'/f'{n}.ipynb' for n in ('07_study', 'index')):
        shown = ''.join(o['data']['text/html'] if isinstance(o['data']['text/html'], str) else ''.join(o['data']['text/html'])
                        for c in cells(p) for o in c.get('outputs', []) if 'text/html' in o.get('data', {}))
        assert [k for k in OTHERWISE if f'>{k}</th>' not in shown] == [], f'execute {p.name} again'

@pytest.mark.parametrize('page, module, name', [('02_pretrain', 'pretrain', 'Pretrain'), ('03_probe', 'probe', 'ProbeRun'),
                                                ('04_analysis', 'analysis', 'AnalysisRun'), ('05_vlm', 'vlm', 'VLMRun'),
                                                ('06_vmcbench', 'vmcbench', 'Score')])
def test_every_setting_is_a_parameter(page, module, name):
    settings = getattr(importlib.import_module(f'clipdino.{module}'), name)
    tagged, = [c for c in cells(root/f'nbs/{page}.ipynb') if 'parameters' in c['metadata'].get('tags', [])]
    assert sorted(re.findall(r'^(\w+) = ', source(tagged), re.M)) == sorted(f.name for f in fields(settings))

def test_the_readme_has_two_commands():
    "One ends with the main job run, one with the tests passed; CI takes the second from here"
    commands = re.findall(r'```sh\n(.+)\n```', (root/'README.md').read_text())
    assert [c.split(' && ')[-1] for c in commands] == ['papermill nbs/02_pretrain.ipynb runs/clip.ipynb -p objective clip',
                                                       'OMP_NUM_THREADS=1 pytest tests']

def test_pixels_belong_to_a_version():
    "Cached worlds are keyed by `VERSION`: who changes what is drawn or said has to raise it, and these digests with it"
    from clipdino.world import KINDS, POLICIES, VERSION, caption, render, scene, versions
    said = '\n'.join(caption(scene(0, 'test', i, k), p) for i in range(20) for k in KINDS for p in POLICIES)
    factors = [(s.kind, s.object, s.word, s.colour, s.background, s.texture, s.style, s.position, s.scale, s.rotation, s.count)
               for s in (scene(0, 'test', i) for i in range(200))]
    assert (VERSION, hashlib.sha256((said + repr(factors)).encode()).hexdigest()[:12]) == SCENES
    pixels = b''.join(render(scene(0, 'test', i, k), 48).tobytes() for i in range(8) for k in KINDS)
    if versions() == PIXELS[0]: assert hashlib.sha256(pixels).hexdigest()[:12] == PIXELS[1]

SCENES = ('2', '4ecf69035a24')
PIXELS = ('world 2, matplotlib 3.11.2, Pillow 13.0.0, FreeType 2.14.3', 'f17bff6d7b88')
