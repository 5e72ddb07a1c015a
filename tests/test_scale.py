"A batch in parts, or over several processes, gives the gradients of the batch in one piece; and what can be known of GPUs without one."
import json, os, re, subprocess, sys, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import group, shard
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPConfig, T5Config, ViTConfig

import clipdino.data as data, clipdino.vlm as vlm
from clipdino.core import Settings, SettingsError, mix
from clipdino.data import BadData
from clipdino.encoders import load_encoder
from clipdino.objectives import OWN, Objective, Own, TextTower, clip_loss, dino_loss, make_encoder, siglip_loss, similarities
from clipdino.pretrain import MEAN, OBJECTIVES, Pretrain, STD, Trainer, accelerator, arguments, check_inputs, helps, main, make_objective, one_view, pretrain, program, settings, spawn, state_tensors, view_groups, world_size
from clipdino.views import make_views

root = Path(__file__).parent.parent
DINOS = dict(dino={}, dino_norm=dict(head_norm=True), dino_no_locals=dict(local_crops=0, freeze_last=0.))
CASES = {o: {} for o in OBJECTIVES if o not in ('dino', 'hybrid')} | DINOS | dict(hybrid=dict(head_norm=True, clip_weight=.5, dino_weight=2.))

def exact(case, **given):
    "In double precision; `eps` keeps AdamW from making much of gradients that are zero up to rounding, as of the biases of attention keys"
    return settings('smoke', case.split('_')[0], **{'name': 'x', 'probes': 0, 'batch': 12, 'samples': 120, 'precision': 'fp64',
                                                    'drop_path': .3, 'eps': 1e-4, **CASES[case], **given})

def three_steps(run, folder):
    "Loss of three steps, gradient of the first, and the state after them"
    Path(folder).mkdir(exist_ok=True)
    t, losses, grads = Trainer(run, Path(folder)), [], {}
    for _, batch in zip(range(3), t.batches()):
        if not grads:
            step = t.opt.step
            def record(): grads.update({k: p.grad.clone() for k, p in t.objective.named_parameters() if p.grad is not None}), step()
            t.opt.step = record
        losses.append({k: v.item() for k, v in t.update(batch).items()})
        t.opt.step = step
    return losses, {k: v.numpy() for k, v in grads.items()}, {k: v.numpy() for k, v in state_tensors(t.objective, t.opt).items()}

def same(a, b, but=()):
    "Losses, gradients and states agree; in the states, rounding has grown over three steps"
    for x, y in zip(a[0], b[0]):
        assert {k: v for k, v in x.items() if k not in but} == pytest.approx({k: v for k, v in y.items() if k not in but}, rel=1e-9)
    for x, y, tol in zip(a[1:], b[1:], (1e-11, 1e-8)):
        assert x.keys() == y.keys()
        for k in x:
            # timm resizes position embeddings in single precision
            assert abs(x[k] - y[k]).max() <= (1e-8 if 'pos_embed' in k else tol)*max(abs(x[k]).max(), 1e-4), k

@pytest.mark.parametrize('case', CASES)
def test_a_batch_in_parts_is_the_whole_batch(tmp_path, case):
    "Also where the parts are of unequal size; for the temperature and bias, the teacher and the centre; with drop path"
    whole = three_steps(exact(case), tmp_path/'whole')
    assert {'log_scale', 'bias'} & whole[1].keys() or case in DINOS
    same(whole, three_steps(exact(case, micro=5), tmp_path/'parts'))

@pytest.mark.parametrize('case, n', [*((c, 2) for c in CASES), *((c, 3) for c in CASES if c not in ('clip-lm', 'dino_no_locals', 'hybrid'))])
def test_several_processes_are_one(tmp_path, case, n):
    same(three_steps(exact(case), tmp_path/'one'), group(n, three_steps, exact(case, micro=3 if n == 2 else 0), tmp_path/'several'))

@pytest.mark.parametrize('case', ['clip', 'dino', 'hybrid'])
def test_parts_save_memory(tmp_path, case):
    "What is kept for the backward pass"
    def kept(micro):
        t, size = Trainer(exact(case, micro=micro, prototypes=2048), tmp_path), {}
        b = next(iter(t.batches()))
        def pack(x):
            size[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): t.model(b['views'], b.get('tokens'), b['ids'])
        return sum(size.values()) - sum(p.untyped_storage().nbytes() for p in t.objective.parameters())
    assert kept(1) < .3*kept(0)

def test_drop_path_drops_and_depends_on_the_sample_alone():
    from clipdino.objectives import encode, make_encoder
    encoder, x = make_encoder('clipdino_vit_smoke', 32, 0, drop_path=.5).train(), torch.rand(1, 3, 32, 32).repeat(64, 1, 1, 1)
    keys = mix(torch.arange(64))
    y = encode(encoder, x, keys)
    assert len(y.unique(dim=0)) == 4  # two branches of the last block, there or not
    torch.testing.assert_close(encode(encoder, x[:9], keys[9:18]), y[9:18])
    assert len(encoder.eval()(x).unique(dim=0)) == 1

def test_a_notebook_starts_processes(tmp_path, monkeypatch):
    "Which find what it finds from its own folder"
    results = []
    shard(tmp_path/'0.tar', 0, 60)
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    for n in 1, 2:
        (tmp_path/f'{n}/nbs').mkdir(parents=True)
        (tmp_path/f'{n}/settings.ini').touch()
        monkeypatch.chdir(tmp_path/f'{n}/nbs')
        results.append(pretrain(settings('smoke', 'siglip', name='x', processes=n, data='../../*.tar')))
    one, two = results
    monkeypatch.chdir('..')
    assert two['environment']['processes'] == 2 and two['loss'] == pytest.approx(one['loss'], rel=1e-5)
    assert sorted(p.name for p in Path('runs/x').iterdir()) == ['.lock', 'bad.jsonl', 'config.json', 'metrics.jsonl', 'model.safetensors',
                                                                'objective.safetensors', 'result.json', 'settings.json']
    with pytest.raises(SettingsError, match='seed was 0 and is now 1; data was'):
        pretrain(settings('smoke', 'siglip', name='x', processes=2, seed=1, data='../*.tar'))
    Path('runs/y').mkdir()
    Path('runs/y/settings.json').write_text(json.dumps(dict(json.loads(Path('runs/x/settings.json').read_text()), lr=9.)))
    Path('runs/y/state-000000001.safetensors').touch()  # of an attempt that was cut
    with pytest.raises(RuntimeError, match='y was begun with other settings: .*lr was 9.0 and is now 0.001'):
        pretrain(settings('smoke', 'siglip', name='y', processes=2))

def test_a_refusal_is_found_in_all_that_torchrun_reports(tmp_path, monkeypatch):
    "A shell script stands for torchrun"
    torchrun = tmp_path/'python'
    torchrun.write_text("#!/bin/sh\necho 'clipdino stops: the reason'\nseq 100\nexit 1\n")
    torchrun.chmod(0o755)
    monkeypatch.setattr('sys.executable', str(torchrun))
    with pytest.raises(RuntimeError, match='^the reason$'): spawn(settings('smoke', processes=4), tmp_path/'x')
    with pytest.raises(SystemExit) as e:
        program('x', Pretrain, lambda **given: spawn(settings('smoke', processes=4), tmp_path/'x'), 'About.', [])
    assert e.value.code == 'clipdino stops: the reason'
    torchrun.write_text("#!/bin/sh\necho '[rank1]: Traceback (most recent call last):'\necho '[rank1]: torch.OutOfMemoryError: no room'\nseq 100\necho torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\nexit 1\n")
    with pytest.raises(RuntimeError, match='^a process of x ended with code 1: torch.OutOfMemoryError: no room\n'):
        spawn(settings('smoke', processes=4), tmp_path/'x')
    torchrun.write_text("#!/bin/sh\necho 'Exception ignored in: <f>'\necho 'KeyError: 1'\necho 'During handling of the above exception, another exception occurred:'\necho 'OSError: the cause'\nkill -9 $$\n")
    with pytest.raises(RuntimeError, match='^a process of x ended with code -9: OSError: the cause\n'):
        spawn(settings('smoke', processes=4), tmp_path/'x')
    torchrun.write_text("#!/bin/sh\necho torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\necho 'Signal 9 (SIGKILL)'\nexit 1\n")
    with pytest.raises(RuntimeError, match='^a process of x ended with code 1: torch.*:\nSignal 9'):
        spawn(settings('smoke', processes=4), tmp_path/'x')

@pytest.mark.parametrize('module', ['pretrain', 'probe', 'analysis', 'vlm', 'vmcbench', 'lm', 'grid'])
def test_help_says_something_of_every_setting(module):
    for kind in (k for k in vars(import_module(f'clipdino.{module}')).values() if isinstance(k, type) and issubclass(k, Settings)):
        assert {f.name for f in fields(kind)} == set(helps(kind))

def test_an_interrupted_program_says_so(capsys):
    def go(**given): raise KeyboardInterrupt
    with pytest.raises(SystemExit) as e: program('x', Pretrain, go, 'About.', [])
    assert e.value.code == 130 and 'goes on from the last saved state' in capsys.readouterr().out

def test_a_process_that_is_done_ends_well(tmp_path):
    "Though its group has work left, whose tensors would be given back to an interpreter that is being torn down"
    code = '''if True:
        import sys, time, torch, torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from clipdino.pretrain import Pretrain, program
        def go(**given):
            dist.init_process_group('gloo', init_method='file://' + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
            sys.held = init_device_mesh('cpu', (2,))
            tensors = [torch.ones(1) for _ in range(20_000)]
            for t in tensors:
                dist.all_reduce(t, async_op=True)
                if sys.argv[2] == '1': time.sleep(1e-4)
            return 'done'
        program('x', Pretrain, go, 'About.', [])'''
    first, slow = [subprocess.Popen([sys.executable, '-c', code, tmp_path/'group', str(k)], env=dict(os.environ, RANK=str(k)), stdout=subprocess.PIPE,
                                    stderr=subprocess.STDOUT, text=True) for k in range(2)]
    try:
        out, _ = first.communicate(timeout=120)
        assert first.returncode == 0 and '"done"' in out, out
    finally:
        for p in first, slow:
            p.kill()
            p.communicate()

def test_a_batch_that_processes_can_not_share_is_refused():
    with pytest.raises(SettingsError, match='batch=16 must be a multiple of the 3 processes'): check_inputs(settings('smoke', processes=3))

def test_options_give_the_settings(monkeypatch, capsys):
    run, seen = settings('smoke', 'dino', lr=3e-4, head_norm=True, name='o', workers=2), []
    monkeypatch.setattr('clipdino.pretrain.pretrain', lambda r: seen.append(r)
                        or dict.fromkeys(('name', 'samples', 'loss', 'images_per_s', 'val')))
    main(arguments(run))
    assert seen == [run]
    with pytest.raises(SystemExit): main(['--objectiv', 'clip'])
    with pytest.raises(SystemExit): main(['--head_norm', 'maybe'])
    said = capsys.readouterr().err
    assert 'unrecognized arguments: --objectiv' in said and "invalid true_or_false value: 'maybe'" in said
    with pytest.raises(SystemExit, match='objective=.mae. is not one of'): main(['--objective', 'mae'])

@pytest.mark.parametrize('objective, given', [(o, g) for o in OBJECTIVES for g in ({}, dict(micro=4))], ids=str)
def test_all_is_on_the_gpu(objective, given, monkeypatch):
    "Tensors without contents stand for those of a GPU, and refuse to meet others"
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *a, **k: True)
    run = settings('smoke', objective, **given)
    o, n = make_objective(run).train(), 8
    o.set_progress(.5)
    told = o.text.tokenize(['a word']).shape[1:] if o.captions else ()
    with FakeTensorMode() as mode:
        def there(v): return torch.empty(v.shape, dtype=v.dtype, device='cuda:0')
        fake = {k: torch.nn.Parameter(there(v), requires_grad=v.requires_grad) if isinstance(v, torch.nn.Parameter) else there(v)
                for k, v in (*o.named_parameters(), *o.named_buffers())}
        views = [torch.empty(len(g)*n, 3, g[0].size, g[0].size, device='cuda:0') for g in view_groups(run)]
        tokens = torch.zeros((n, *told), dtype=torch.int64, device='cuda:0') if o.captions else None
        with torch.autocast('cuda', torch.bfloat16):
            out = torch.func.functional_call(o, fake, (views, tokens, torch.zeros(n, dtype=torch.int64, device='cuda:0')))
        assert {v.device for v in out.values()} == {torch.device('cuda:0')} and out['loss'].dtype == torch.float32

def test_the_slurm_example_is_sound():
    "bash reads it, accelerate knows its options, and we know ours"
    from accelerate.commands.launch import launch_command_parser
    page = '\n'.join(''.join(c['source']) for c in json.loads((root/'nbs/02_pretrain.ipynb').read_text())['cells'])
    script, = re.findall(r'```bash\n(.+?)```', page, re.S)
    assert subprocess.run(['bash', '-n'], input=script, text=True, capture_output=True).stderr == ''
    fake = 'srun() { while [[ $1 == --* ]]; do shift; done; "$@"; }; scontrol() { echo node0; echo node1; }; accelerate() { printf "%s\\n" "$@"; }; export -f accelerate\n'
    env = dict(os.environ, SLURM_NNODES='4', SLURM_CPUS_PER_TASK='96', SLURM_NODEID='2', SLURM_JOB_NODELIST='node[0-3]',
               DATA='s/{0..3}.tar')
    said = subprocess.run(['bash'], input=fake + script, text=True, capture_output=True, env=env)
    words = said.stdout.split('\n')[:-1]
    assert words[0] == 'launch' and said.stderr == '', said.stderr
    a = launch_command_parser().parse_args(words[1:])
    assert (a.module, a.training_script, a.num_processes, a.num_machines, a.machine_rank, a.main_process_ip) == (True, 'clipdino.pretrain', 32, 4, 2, 'node0')
    options = dict(zip(*[iter(a.training_script_args)]*2))
    assert settings(**{k.removeprefix('--'): v for k, v in options.items()}).data == 's/{0..3}.tar'

def waits(run, folder):
    "Seconds that a process waits for the others"
    accelerator(run, Path(folder))
    return torch.distributed.distributed_c10d._get_default_group()._get_backend(torch.device('cpu')).options._timeout.total_seconds()

def test_processes_wait_for_a_long_probe_or_export(tmp_path):
    assert group(2, waits, settings('smoke'), tmp_path) == 3600

def apart(run, top):
    "What a process says whose folder is its own, where the first one's has a state"
    try: Trainer(run, Path(top)/os.environ['RANK'])
    except SettingsError as e: return str(e)

def test_processes_that_share_no_folder_are_refused(tmp_path):
    "Else some would go on and others begin"
    run = settings('smoke', name='x', probes=0)
    for d in '01': (tmp_path/d).mkdir()
    t = Trainer(run, tmp_path/'0')
    t.update(next(t.batches()))
    t.save()
    assert group(2, apart, run, tmp_path).startswith('processes found different steps: 1, 0;')

def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr('torch.cuda.device_count', lambda: 1)
    for run, refuse in (settings('smoke', processes=2), check_inputs), (vlm.settings('smoke', processes=2), vlm.check_inputs):
        with pytest.raises(SettingsError, match='processes=2, but this machine has 1 GPUs'): refuse(run)

# ---- what only a GPU would show

class Copies(TorchDispatchMode):
    "Copies from the CPU to the device `meta`, which stands for a GPU: those that block would make the CPU wait for all that the GPU still has to do"
    def __init__(self): super().__init__(); self.seen = Counter()
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        k = kwargs or {}
        if f is torch.ops.aten._to_copy.default and args[0].device.type == 'cpu' and str(k.get('device')) == 'meta':
            self.seen[bool(k.get('non_blocking'))] += 1
        return f(*args, **k)

@pytest.mark.parametrize('objective', ['clip', 'dino'])
def test_no_copy_to_the_device_blocks(objective):
    run, n = settings('small', objective), 8
    with torch.device('meta'): o = make_objective(run).train()
    o.set_progress(.5)
    with Copies() as copies:
        views = make_views(view_groups(run), torch.empty(n, run.canvas, run.canvas, 3, dtype=torch.uint8, device='meta'),
                           torch.full((n, 2), run.canvas), 0, torch.zeros(n, dtype=torch.int64), torch.arange(n), MEAN, STD)
        if objective == 'dino': o(views, None, torch.zeros(n, dtype=torch.int64, device='meta'))
    assert copies.seen[True] > 1 and not copies.seen[False]

@pytest.mark.parametrize('loss',
                         [lambda x, t: clip_loss(x, t, torch.tensor(100.)), lambda x, t: siglip_loss(x, t, torch.tensor(100.), torch.tensor(-10.)),
                          lambda x, t: dino_loss(similarities(x[:, None], t)/.1, similarities(t[:, None], x).div(.02).softmax(-1))], ids=['clip', 'siglip', 'dino'])
def test_logits_are_not_rounded(loss):
    x, t = (F.normalize(torch.randn(16, 64, generator=torch.Generator().manual_seed(k)), dim=1) for k in (0, 1))
    with torch.autocast('cpu', torch.bfloat16): rounded = loss(x, t)
    assert rounded == loss(x, t)

def test_objectives_of_ones_own_see_patch_tokens(monkeypatch):
    "Ours need the class token alone, and get no others"
    monkeypatch.setitem(OWN, 'mine', Own(make=lambda run, encoder: Objective(encoder), views=None))
    seen = {o: make_objective(settings('smoke', o)).encoder.forward_features(torch.zeros(2, 3, 32, 32)).shape[1] for o in ('clip', 'mine')}
    assert seen == dict(clip=1, mine=17)

class Scores(Objective):
    "Returns what a test gives it"
    def forward(self, views, tokens, keys): return self.said(self.encoder(views[0]).sum())

@pytest.mark.parametrize('said, refused', [(lambda y: y, True), (lambda y: dict(other=y), True), (lambda y: dict(loss=y, scale=1.), True),
                                           (lambda y: dict(loss=y, parts=y[None]), True),
                                           (lambda y: dict(loss=y, scale=y.detach()), False)])
def test_what_ones_own_objective_returns_is_looked_at(monkeypatch, tmp_path, said, refused):
    def make(run, encoder):
        (o := Scores(encoder)).said = said
        return o
    monkeypatch.setitem(OWN, 'mine', Own(make=make, views=one_view))
    t = Trainer(settings('smoke', 'mine', probes=0), tmp_path)
    if not refused: assert 'scale' in t.update(next(t.batches()))
    else:
        with pytest.raises(SettingsError,
                           match='forward of mine must return `loss`, and what else is worth logging, as a dict of tensors without dimensions'):
            t.update(next(t.batches()))

def test_slips_in_ones_own_objective_are_named(monkeypatch):
    monkeypatch.setitem(OWN, 'mine', Own(make=lambda run, encoder: encoder, views=one_view, changes=dict(learning_rate=1.)))
    with pytest.raises(SettingsError, match='no such setting: learning_rate'): settings('smoke', 'mine')
    monkeypatch.setitem(OWN, 'mine', Own(make=lambda run, encoder: encoder, views=one_view))
    with pytest.raises(SettingsError,
                       match='make of mine returns a VisionTransformer, which does not derive from clipdino.objectives.Objective'):
        make_objective(settings('smoke', 'mine'))

def test_captions_take_a_text_with_tokenize(monkeypatch):
    class Reads(Objective): captions = True
    monkeypatch.setitem(OWN, 'mine', Own(make=lambda run, encoder: Reads(encoder), views=one_view))
    with pytest.raises(SettingsError, match='^mine reads captions, and has no text with tokenize$'): make_objective(settings('smoke', 'mine'))

class Both(Objective):
    "Has what a joint space takes"
    def embed_image(self, x, keys=None): return self.encoder(x)
    def embed_text(self, tokens): return tokens

@pytest.mark.parametrize('kind, joint', [(Objective, True), (Both, False)])
def test_an_entry_and_its_class_agree_about_a_joint_space(monkeypatch, kind, joint):
    for j in joint, not joint:
        monkeypatch.setitem(OWN, 'mine', Own(make=lambda run, encoder: kind(encoder), views=one_view, joint=j))
        if j == joint:
            with pytest.raises(SettingsError,
                               match=f'the entry of mine says joint={joint}, but its class has {"not " if joint else ""}both embed_image and embed_text'):
                make_objective(settings('smoke', 'mine'))
        else: assert make_objective(settings('smoke', 'mine'))

class Captioner(Objective):
    "Reads captions, and has no joint space"
    captions = True
    def __init__(self, encoder, text):
        super().__init__(encoder)
        self.text = text
    def forward(self, views, tokens, keys): return dict(loss=self.encoder(views[0]).square().mean() + self.text(tokens).square().mean())

def test_an_objective_that_reads_captions_without_a_joint_space(monkeypatch, tmp_path):
    "Is probed without zero-shot, and has no retrieval"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(OWN, 'captioner', Own(make=lambda run,
                                              encoder: Captioner(encoder, TextTower(run.vocab, run.context, run.text_width, run.text_layers, run.dim)), views=one_view))
    result = pretrain(settings('smoke', 'captioner', samples=32, probes=0))
    assert not (e := load_encoder(str(tmp_path/'runs'/result['name']))).has_text and e.dim == 32
    with pytest.raises(SettingsError, match='eval_data is for objectives with images and captions in one space, and captioner has none'):
        check_inputs(settings('smoke', 'captioner', eval_data='x.tar'))

class Joint(Captioner):
    def embed_image(self, x, keys=None): return F.normalize(self.encoder(x), dim=1)
    def embed_text(self, tokens): return F.normalize(self.text(tokens), dim=1)

def test_a_joint_space_of_ones_own(monkeypatch, tmp_path):
    "Has retrieval, and classifies by names"
    monkeypatch.chdir(tmp_path)
    shard(tmp_path/'held.tar', 0, 20)
    monkeypatch.setitem(OWN, 'joint',
                        Own(make=lambda run, encoder: Joint(encoder, TextTower(run.vocab, run.context, run.text_width, run.text_layers, run.dim)), views=one_view, joint=True))
    result = pretrain(settings('smoke', 'joint', samples=32, probes=0, eval_data=str(tmp_path/'held.tar')))
    e = load_encoder(str(tmp_path/'runs'/result['name']))
    assert result['retrieval']['pairs'] == 20 and e.embed_text(['a dog', 'a cat']).shape == e.embed_image(torch.zeros(2, 3, 32, 32)).shape == (2, 32)

@pytest.mark.parametrize('arch, said', [('beit_base_patch16_224', 'is a Beit, and must be one of'),
                                        ('vit_base_patch16_siglip_224', 'with a class token')])
def test_other_architectures_are_refused(arch, said):
    with pytest.raises(SettingsError, match=said): settings('smoke', arch=arch, image_size=224)

def test_a_distilled_vit_keeps_both_its_tokens():
    assert make_encoder('deit_tiny_distilled_patch16_224', 32, 0)(torch.zeros(2, 3, 32, 32)).shape == (2, 192)

@pytest.mark.parametrize('kind', [lambda d: CLIPConfig().save_pretrained(d), lambda d: ViTConfig().save_pretrained(d),
                                  lambda d: T5Config().save_pretrained(d)])
def test_a_text_model_of_another_kind_is_refused(tmp_path, kind):
    kind(tmp_path)
    with pytest.raises(SettingsError, match='is a (clip|vit|t5), and must be a language model of one stack of layers'):
        check_inputs(settings('smoke', 'clip-lm', text_model=str(tmp_path)))

@pytest.mark.parametrize('given, said', [(dict(eval_data='notes.tar'), 'is not a tar file'), (dict(probe_data='set'), 'has no test split')])
def test_what_is_needed_at_the_end_is_looked_at_first(tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'notes.tar').write_text('no tar')
    for k in 'ab':
        (d := tmp_path/'set/train'/k).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(d/'0.png')
    with pytest.raises((SettingsError, BadData), match=said): check_inputs(settings('smoke', **given))
    if 'probe_data' in given: check_inputs(settings('smoke', probes=0, **given))  # nobody will read it

def test_a_complete_run_is_looked_up_without_its_data(tmp_path, monkeypatch):
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('IN_TEST', raising=False)
    shard(tmp_path/'0.tar', 0, 60)
    run = settings('smoke', name='x', data='0.tar', probes=0)
    result = pretrain(run)
    (tmp_path/'0.tar').unlink()
    assert pretrain(run) == result
    for few in '0.tar', '::'.join(f'{k:05d}.tar' for k in range(40)), '0'*300: # longer than a name or a path may be
        with pytest.raises(SettingsError, match='no shards at 0'): pretrain(settings('smoke', name='y', data=few, probes=0))
    with pytest.raises(SettingsError, match='batch=16 is more than the 8 pictures that there are'):
        pretrain(settings('smoke', name='z', images=8, probes=0))
    assert not Path('runs/y').exists()

def test_two_precisions_in_one_process(tmp_path):
    assert [accelerator(settings('smoke', precision=p), tmp_path).mixed_precision for p in ('bf16', 'fp32', 'bf16')] == ['bf16', 'no', 'bf16']

@pytest.mark.parametrize('name, value', [('USE_FSDP', 'true'), ('USE_DEEPSPEED', 'true'), ('GRADIENT_ACCUMULATION_STEPS', '8'),
                                         ('DYNAMO_BACKEND', 'INDUCTOR')])
def test_a_launch_changes_no_run(monkeypatch, name, value):
    for k, v in dict(USE_FSDP='false', GRADIENT_ACCUMULATION_STEPS='1', DYNAMO_BACKEND='NO').items():
        monkeypatch.setenv(f'ACCELERATE_{k}', v)
    check_inputs(settings('smoke'))
    monkeypatch.setenv(f'ACCELERATE_{name}', value)
    with pytest.raises(SettingsError, match=f'launched with ACCELERATE_{name}={value}, which would change the run'):
        check_inputs(settings('smoke'))

def test_one_process_in_tests_whatever_the_gpus(monkeypatch):
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    assert world_size(settings('smoke')) == 2
    monkeypatch.setenv('IN_TEST', '1')
    assert world_size(settings('smoke')) == 1 and world_size(settings('smoke', processes=3)) == 3

def test_a_shard_is_scanned_once(tmp_path, monkeypatch):
    "Also if several want its index at the same time"
    monkeypatch.setenv('CLIPDINO_CACHE', str(tmp_path/'cache'))
    shard(tmp_path/'a.tar', 0, 40)
    scans = []
    monkeypatch.setattr(data, 'scan', lambda path, scan=data.scan: scans.append(path) or time.sleep(.2) or scan(path))
    with ThreadPoolExecutor(4) as ex: found = list(ex.map(data.index, [tmp_path/'a.tar']*4))
    assert len(scans) == 1 and all(len(ix) == 40 for ix in found)
