"Encoders from anywhere: what is damaged, foreign or hostile is refused in a sentence, and random weights are always the same."
import json, os, shutil

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from clipdino.core import SettingsError, generator
from clipdino.encoders import load_encoder
from clipdino.objectives import make_encoder
from clipdino.pretrain import make_objective, pretrain, settings

VIT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
x = torch.randn(3, 3, 32, 32, generator=generator(0))

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder that looks like the repository's top, with finished runs of all objectives"
    top = tmp_path_factory.mktemp('top')
    (top/'settings.ini').touch()
    before, test = os.getcwd(), os.environ.pop('IN_TEST', None)
    os.chdir(top)
    for o in 'clip', 'siglip', 'clip-lm', 'dino', 'hybrid': pretrain(settings('smoke', o, name=o, probes=0, seed=3))
    pretrain(settings('smoke', name='fp64', probes=0, precision='fp64', drop_path=.1))
    os.chdir(before)
    if test is not None: os.environ['IN_TEST'] = test
    return top

@pytest.fixture
def top(made, tmp_path, monkeypatch):
    "A copy, to be spoilt"
    shutil.copytree(made, tmp_path/'top')
    monkeypatch.chdir(tmp_path/'top')
    return tmp_path/'top'

def refused(name, match):
    with pytest.raises(SettingsError, match=match) as e: load_encoder(str(name))
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('name', ['clip', 'siglip', 'clip-lm', 'hybrid'])
def test_runs_by_name_with_their_text(top, name):
    "The joint space is the objective's, and its text tower comes when it is asked for"
    e = load_encoder(name)
    assert (e.name, e.has_text, e.towers) == (name, True, None)
    o = make_objective(settings('smoke', name, seed=3)).eval()
    o.load_state_dict(load_file(f'runs/{name}/objective.safetensors'))
    texts = ['a red sea', 'two dogs', '']
    with torch.no_grad(): torch.testing.assert_close(e.embed_text(texts), o.embed_text(o.text.tokenize(texts)))
    with torch.no_grad(): torch.testing.assert_close(e.embed_image(x), F.normalize(o.proj(e.tokens(x)[0][0]), dim=1))
    assert not e.towers.training and not any(p.requires_grad for p in e.parameters())

def test_other_runs_have_none(top):
    e = load_encoder('dino')
    assert not e.has_text
    for f in lambda: e.embed_text(['a']), lambda: e.embed_image(x):
        with pytest.raises(SettingsError, match='dino has no text tower'): f()

@pytest.mark.parametrize('name,seed', [('clip', 3), ('dino', 3), ('fp64', 0)])
def test_random_is_what_the_run_began_with(top, name, seed):
    state = torch.get_rng_state()
    a = load_encoder(f'random:{name}')
    assert (torch.get_rng_state() == state).all()
    torch.manual_seed(1)
    b = load_encoder(f'random:runs/{name}')
    if name != 'fp64':
        assert all((v == a.model.state_dict()[k]).all() for k, v in make_encoder('clipdino_vit_smoke', 32, seed).state_dict().items())
    assert a.fingerprint == b.fingerprint != load_encoder(name).fingerprint
    assert a.tokens(x)[0][1].shape == (3, 16, 32) and a.tokens(x)[0][1].dtype == load_encoder(name).tokens(x)[0][1].dtype == torch.float32

@pytest.mark.parametrize('name', ['resnet18', 'vit_tiny_patch16_224'])
def test_random_timm_models_are_reproducible(name):
    "Whatever was drawn before"
    a = load_encoder(f'random:{name}')
    torch.rand(5)
    assert a.fingerprint == load_encoder(f'random:{name}').fingerprint

def test_damaged_files(top):
    for file in 'model.safetensors', 'objective.safetensors':
        p = top/'runs/clip'/file
        p.write_bytes(p.read_bytes()[:1000])
    refused('clip', 'runs/clip can not be read: ')
    shutil.copy(top/'runs/dino/model.safetensors', top/'runs/clip')
    with pytest.raises(SettingsError, match='runs/clip/objective.safetensors can not be read: '): load_encoder('clip').embed_text(['a'])
    (top/'runs/clip/config.json').write_text('{')
    refused('clip', 'runs/clip/config.json is damaged: Expecting property name')

def test_tensors_that_do_not_fit(top):
    p = top/'runs/clip/model.safetensors'
    t = load_file(p)
    save_file({**{k: v for k, v in t.items() if k != 'norm.bias'}, 'a': x, 'norm.weight': torch.ones(3)}, p)
    refused('clip', 'runs/clip does not fit its model: missing norm.bias; unexpected a; of another shape norm.weight$')

def test_folders_that_hold_no_encoder(top):
    (top/'runs/clip/config.json').unlink()
    refused('clip', 'runs/clip holds no encoder; is the run finished?')
    (top/'empty').mkdir()
    refused('empty', 'empty holds no encoder: neither a run of ours')
    refused('random:empty', 'is a folder, but of no pre-training run')
    (top/'empty/settings.json').write_text('{"encoder": "clip", "preset": "smoke"}')
    refused('random:empty', 'is a folder, but of no pre-training run')
    refused('hf:empty', 'hf:empty can not be read: ')
    refused('open_clip:local-dir:empty', 'open_clip:local-dir:empty can not be read: ')

class Evil:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, 'w')

@pytest.mark.parametrize('name,file', [('evil.pth', 'evil.pth'), ('hf:vit', 'vit/pytorch_model.bin'), ('timm', 'timm/pytorch_model.bin'),
                                       ('open_clip:ViT-B-32/evil.pth', 'evil.pth')])
def test_no_pickle_runs_code(top, name, file):
    transformers.ViTConfig(**VIT).save_pretrained('vit')
    (top/'timm').mkdir()
    shutil.copy('runs/clip/config.json', 'timm')
    torch.save(dict(teacher={'cls_token': x}, args=Evil(top/'done')), file)
    refused(name, 'is damaged or holds more than|can not be read')
    assert not (top/'done').exists()

def test_files_that_are_no_pickles(top):
    for data in b'', b'\x80\x02x', b'hello'*100:
        (top/'x.pth').write_bytes(data)
        refused('x.pth', 'x.pth (is damaged or|can not be read)')

def test_pickles_of_other_things(top):
    for data in dict(teacher=x), dict(cls_token=x[0, 0], pos_embed=x,
                                      **{'patch_embed.proj.weight': x, 'blocks.0.mlp.fc1.weight': x}), dict(args=3), {}:
        torch.save(data, 'x.pth')
        refused('x.pth', 'x.pth (can not be read|does not fit its model|is 32 wide)')

def test_transformers_of_other_kinds(top):
    transformers.BertConfig().save_pretrained('bert')
    refused('hf:bert', 'hf:bert is of type bert; clip, siglip, vit')
    transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)).save_pretrained('naflex')
    refused('hf:naflex', 'hf:naflex is of type siglip2_vision_model; clip')

def test_a_guess_of_the_pixels_is_said(top, capsys):
    transformers.ViTModel(transformers.ViTConfig(**VIT)).save_pretrained('vit')
    assert load_encoder('hf:vit').mean == (.485, .456, .406)
    assert 'hf:vit has no preprocessor_config.json: pictures of 32 px' in capsys.readouterr().out
    for size, crop, want in (dict(shortest_edge=40), dict(height=24, width=24), 24), (dict(shortest_edge=40), None, 40), (32, None, 32):
        c = dict(size=size, image_mean=[.1, .2, .3], image_std=[.4, .5, .6]) | (dict(do_center_crop=True, crop_size=crop) if crop else {})
        (top/'vit/preprocessor_config.json').write_text(json.dumps(c))
        e = load_encoder('hf:vit')
        assert (e.size, e.mean, e.std, e.grid) == (want, (.1, .2, .3), (.4, .5, .6), (want//8, want//8))
    for damage in '{', '{"size": {"longest_edge": 3}}':
        (top/'vit/preprocessor_config.json').write_text(damage)
        refused('hf:vit', 'vit/preprocessor_config.json is damaged: ' if damage == '{' else 'hf:vit can not be read: ')

def test_pixels_as_transformers_5_writes_them(top, capsys):
    "Within the settings of a processor"
    transformers.ViTModel(transformers.ViTConfig(**VIT)).save_pretrained('vit')
    of_pictures = dict(size=dict(height=16, width=16), image_mean=[.1, .2, .3], image_std=[.4, .5, .6])
    (top/'vit/processor_config.json').write_text(json.dumps(dict(processor_class='P', image_processor=of_pictures)))
    e = load_encoder('hf:vit')
    assert (e.size, e.mean, e.std) == (16, (.1, .2, .3), (.4, .5, .6)) and 'guess' not in capsys.readouterr().out

def test_models_of_timm_whose_class_token_is_not_in_every_block(top):
    refused('random:pit_ti_224', 'pit_ti_224 has a class token, and does not say before which patch tokens it stands')
    e = load_encoder('random:convit_tiny')
    x = torch.zeros(2, 3, e.size, e.size)
    cls, patches = e.tokens(x)[0]
    assert cls.shape == (2, e.dim) and patches.shape == (2, 196, e.dim)
    with pytest.raises(SettingsError, match='convit_tiny has no class token beside its patch tokens after layer 2; read its last one'):
        e.tokens(x, (2,))

def test_a_clip_without_tokenizer_has_no_text(top):
    "transformers would make a tokenizer of two words"
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=600,
                max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=24)).save_pretrained('clip')
    e = load_encoder('hf:clip')
    with pytest.raises(SettingsError, match='hf:clip has no text tower.*with a tokenizer'): e.embed_text(['a'])

def test_released_weights_of_timm(monkeypatch):
    "By a model's name and tag, the classifier left out; what the hub would send is made here"
    made = timm.create_model('vit_tiny_patch16_224')
    monkeypatch.setattr('timm.models._builder.load_state_dict_from_hf', lambda *a, **k: made.state_dict())
    e = load_encoder('vit_tiny_patch16_224.augreg_in21k_ft_in1k')
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad(): torch.testing.assert_close(e.tokens(images)[0][0], made.eval().forward_features(images)[:, 0])
    assert (e.size, e.dim, e.depth, e.patch, e.mean) == (224, 192, 12, 16, (.5, .5, .5))

def test_another_activation_is_refused(top, monkeypatch):
    "open_clip would warn and go on"
    monkeypatch.setattr('open_clip.factory.download_pretrained', lambda *a, **k: 'x.pt')
    refused('open_clip:ViT-B-32/openai', 'QuickGELU mismatch')

def test_layers_that_are_not_there(top):
    e = load_encoder('clip')
    for l in 0, 3, -3:
        with pytest.raises(SettingsError, match=f'layer {l} is not there: clip has layers 1 to 2, or -2 to -1'): e.tokens(x, (-1, l))

def test_pictures_do_not_depend_on_their_batch(top):
    images = torch.randint(0, 256, (5, 48, 48, 3), dtype=torch.uint8, generator=generator(1))
    for name in 'clip', 'random:resnet18':
        e = load_encoder(name)
        layers = range(1, e.depth + 1)
        whole = e.tokens(e.prepare(images), layers)
        for i in range(5):
            for (c, p), (c1, p1) in zip(whole, e.tokens(e.prepare(images[i:i + 1].numpy()), layers)):
                torch.testing.assert_close(c[i:i + 1], c1, atol=1e-4, rtol=1e-4), torch.testing.assert_close(p[i:i + 1], p1, atol=1e-4, rtol=1e-4)
