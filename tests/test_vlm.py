"VLMs: what is saved is what was trained, in the form that others open; what runs are, however they are cut, split or fed."
import json, os, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from clipdino.chat import render
from clipdino.core import Metrics, SettingsError, generator
from clipdino.encoders import load_encoder
from clipdino.lm import small_lm
from clipdino.pretrain import NonFinite, accelerator
from clipdino.questions import prompt, squares
from clipdino.vlm import CONNECTORS, Parts, Reader, Stage, agrees, check_inputs, make_connector, make_processor, make_vlm, open_llm, open_vlm, settings, tower_of, tower_tokens, train, train_vlm
from clipdino.worldvqa import WorldVQA

root = Path(__file__).parent.parent
TINY, MINI = 'random:clipdino_vit_smoke', 'random:clipdino_vit_mini'  # a plain ViT of 32 px with 16 patches; one with a convolutional stem

@pytest.fixture(scope='module', autouse=True)
def top(tmp_path_factory):
    "A folder that looks like the repository's top, and a cache of its own in which the language model is made once"
    top = tmp_path_factory.mktemp('top')
    (top/'settings.ini').touch()
    with pytest.MonkeyPatch.context() as m:
        m.setenv('CLIPDINO_CACHE', str(top/'cache'))
        m.setenv('OMP_NUM_THREADS', '1')
        m.delenv('IN_TEST', raising=False)
        m.chdir(top)
        yield top

def smoke(name, **given): return settings('smoke', **{'name': name, 'encoder': TINY, 'questions': 0, **given})

def trained(name, **given):
    "A run's folder and result"
    result = train_vlm(smoke(name, **given))
    return Path('runs')/name, result

def parts(run):
    "What a run is made of, before it begins"
    (folder := Path('runs')/run.name).mkdir(parents=True, exist_ok=True)
    return Parts(run, folder, accelerator(run, folder))

def pictures(shapes=((32, 32), (20, 44), (61, 35)), smooth=False):
    "Noisy pictures of any shape (height, width)"
    r = np.random.default_rng(0)
    return [Image.fromarray(r.integers(0, 256, (h, w, 3), np.uint8)) for h, w in shapes]

def inputs(processor, questions, pictures):
    "What a user of transformers gives the model"
    chats = [[dict(role='user', content=[*[dict(type='image')]*(p is not None), dict(type='text', text=q)])] for q, p in zip(questions, pictures)]
    texts = [processor.apply_chat_template(c, add_generation_prompt=True) for c in chats]
    return processor(images=[p for p in pictures if p is not None] or None, text=texts, return_tensors='pt', padding=True)

QUESTIONS = 'What is it?', 'Is the boat red or blue?', 'How many, and where? \u00e9\u2603'

@torch.no_grad()
def said(folder, kind=AutoModelForImageTextToText):
    "Logits and greedy answers of a saved VLM"
    model, processor = kind.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    x = inputs(processor, QUESTIONS, pictures())
    return model(**x).logits, model.generate(**x, max_new_tokens=6, do_sample=False).tolist()

# ---- what is saved

@pytest.mark.parametrize('how', [dict(), dict(encoder=MINI, connector='resampler'), dict(connector='pool', image_tokens=4, layer=-1, template='vicuna')], ids=str)
def test_the_saved_model_is_the_trained_one(how):
    "From pixels and text through transformers, against our path: cached patch tokens, connector, language model, head"
    name = f'parity-{"-".join(map(str, how.values()))}'.replace(':', '-')
    run = smoke(name, **how)
    folder, _ = trained(**dict(how, name=name))
    model, processor = open_vlm(folder)
    e, pics = load_encoder(run.encoder), pictures()
    x = inputs(processor, QUESTIONS, pics)
    torch.testing.assert_close(x['pixel_values'], e.prepare(squares(pics, e.size, mean=e.mean)), atol=1e-6, rtol=0)
    n = model.config.image_seq_length
    for q, ids, mask in zip(QUESTIONS, x['input_ids'], x['attention_mask']):
        assert ids[mask > 0].tolist() == render(processor.tokenizer, [(q, None)], True, n, template=run.template)[0].tolist()
    model.requires_grad_(False)
    reader = Reader(model)
    h = reader.lm(inputs_embeds=reader.embed(x['input_ids'], x['input_ids'] == model.config.image_token_index, e.tokens(x['pixel_values'], (run.layer,))[0][1]), attention_mask=x['attention_mask']).last_hidden_state
    theirs, keep = model(**x).logits, x['attention_mask'] > 0
    torch.testing.assert_close(reader.logits(h)[keep], theirs[keep], atol=1e-4, rtol=0)
    shuffled = model(**dict(x, pixel_values=x['pixel_values'].flip(0))).logits
    assert (shuffled - theirs)[keep].abs().max() > 1e-3, 'the picture matters'

def test_pixels_of_the_worlds_pictures_and_prompts(top):
    "Questions of the world in the processor's hands"
    folder, _ = trained('pixels')
    _, processor = open_vlm(folder)
    e, w = load_encoder(TINY), WorldVQA('val', 8, 32)
    x = inputs(processor, [prompt(r) for r in w.rows], [w.picture(i) for i in range(8)])
    torch.testing.assert_close(x['pixel_values'], e.prepare(w.batch(range(8), e.size)), atol=1e-6, rtol=0)

FRESH = '''
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
x = torch.load(sys.argv[2], weights_only=True)
out = []
for kind in AutoModelForImageTextToText, LlavaForConditionalGeneration:
    m, p = kind.from_pretrained(sys.argv[1]).eval(), AutoProcessor.from_pretrained(sys.argv[1])
    with torch.no_grad(): out += [m(**x).logits, m.generate(**x, max_new_tokens=6, do_sample=False)]
assert 'clipdino' not in sys.modules
torch.save(out, sys.argv[3])
'''

def fresh(folder, tmp_path):
    "The same as `said`, of both classes, in a process that knows nothing of this package"
    x = inputs(AutoProcessor.from_pretrained(folder), QUESTIONS, pictures())
    torch.save(dict(x), tmp_path/'x.pt')
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run([sys.executable, '-c', FRESH, str(Path(folder).absolute()), 'x.pt', 'out.pt'], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path/'out.pt', weights_only=True)

def test_it_opens_where_this_package_is_not(tmp_path):
    "A plain ViT with LLaVA-1.5's connector is transformers' alone"
    folder, result = trained('alone')
    assert result['tower'] == 'ViTModel'
    logits, text = said(folder)
    for l, t in zip(*[iter(fresh(folder, tmp_path))]*2): assert torch.equal(l, logits) and t.tolist() == text

@pytest.mark.parametrize('connector', CONNECTORS)
def test_every_connector_opens_again(connector):
    "On a tower of ours"
    folder, result = trained(f'c-{connector}', connector=connector, encoder=MINI)
    assert result['tower'] == 'Tower' and result['image_tokens'] == (16 if connector in ('mlp', 'linear') else 4)
    logits, text = said(folder)
    model, _ = open_vlm(folder)
    assert type(model.model.multi_modal_projector).__name__ == dict(mlp='LlavaMultiModalProjector', linear='Linear', pool='Pool', resampler='Resampler')[connector]
    if connector == 'mlp': assert torch.equal(said(folder, LlavaForConditionalGeneration)[0], logits)
    x = inputs(AutoProcessor.from_pretrained(folder), QUESTIONS, pictures())
    with torch.no_grad(): assert torch.equal(model(**x).logits, logits) and torch.isfinite(logits[x['attention_mask'] > 0]).all()

def test_answers_do_not_depend_on_what_is_asked_beside_them():
    "One by one, and as a batch with padding and a text alone"
    folder, _ = trained('alone')
    model, processor = open_vlm(folder)
    pics, questions = [*pictures(), None], [*QUESTIONS, 'Hello?']
    def answers(*ids): return model.generate(**inputs(processor, [questions[i] for i in ids], [pics[i] for i in ids]), max_new_tokens=6, do_sample=False)[:, -6:].tolist()
    assert answers(0, 1, 2, 3) == [answers(i)[0] for i in range(4)]

# ---- towers

VIT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8)
TEXT = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)

def noisy(model):
    "Weights that are large enough to matter, whatever they were"
    g = generator(9)
    for p in model.parameters(): p.data = torch.randn(p.shape, generator=g)*.2
    return model

def of_transformers(kind, folder, size=32, **more):
    "A small model in a folder"
    given = dict(VIT, **more)
    if kind in ('CLIP', 'Siglip'): given = dict(vision_config=given, text_config=TEXT, **dict(projection_dim=16) if kind == 'CLIP' else {})
    noisy(getattr(transformers, f'{kind}Model')(getattr(transformers, f'{kind}Config')(**given))).save_pretrained(folder)
    (folder/'preprocessor_config.json').write_text(json.dumps(dict(size=dict(height=size, width=size), image_mean=[.4, .5, .6], image_std=[.2, .3, .2])))
    return f'hf:{folder}'

def of_open_clip(folder, quick=False, **vision):
    "A small model in a folder"
    import open_clip
    folder.mkdir()
    cfg = dict(embed_dim=16, quick_gelu=quick, vision_cfg=dict(image_size=32, layers=3, width=64, patch_size=8, **vision), text_cfg=dict(context_length=8, vocab_size=49408, width=32, heads=2, layers=1))
    (folder/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=cfg, preprocess_cfg=dict(mean=[.4, .5, .6], std=[.2, .3, .2]))))
    torch.save(noisy(open_clip.CLIP(**cfg)).state_dict(), folder/'open_clip_pytorch_model.bin')
    return f'open_clip:local-dir:{folder}'

TOWERS = dict(  # what makes the encoder's name; its tower at layer -2, and at -1: transformers' class, our Tower, or None where there is none
    vit=(lambda d: TINY, 'ViTModel', 'Tower'), stem=(lambda d: MINI, 'Tower', 'Tower'), cnn=(lambda d: 'random:resnet18', 'Tower', 'Tower'),
    registers=(lambda d: 'random:vit_small_patch16_dinov3', 'Tower', 'Tower'), register_pooled=(lambda d: 'random:vit_pwee_patch16_reg1_gap_256', 'Tower', 'Tower'),  # the first with rotary tables that are not saved
    clip=(lambda d: of_transformers('CLIP', d), 'CLIPVisionModel', None), dinov2=(lambda d: of_transformers('Dinov2', d, mlp_ratio=2), 'Dinov2Model', None),
    hf_vit=(lambda d: of_transformers('ViT', d), 'ViTModel', None), dinov2_registers=(lambda d: of_transformers('Dinov2WithRegisters', d, mlp_ratio=2), None, None),
    siglip=(lambda d: of_transformers('Siglip', d), None, None), larger=(lambda d: of_transformers('CLIP', d, 48), None, None),
    open_clip=(lambda d: of_open_clip(d), 'CLIPVisionModel', None), open_clip_quick=(lambda d: of_open_clip(d, quick=True), 'CLIPVisionModel', None), open_clip_pooled=(lambda d: of_open_clip(d, pool_type='avg'), 'CLIPVisionModel', None))

@pytest.mark.parametrize('case', TOWERS)
def test_a_tower_gives_the_encoders_patch_tokens(tmp_path, case):
    "Also when it has been saved and opened again"
    make, *kinds = TOWERS[case]
    name = make(tmp_path/'e')
    for layer, kind in zip((-2, -1), kinds):
        e = load_encoder(name)
        if kind is None:
            with pytest.raises(SettingsError, match=f'has no form among vision towers that gives its patch tokens at layer {layer} from pictures of {e.size} px') as said: tower_of(e, layer)
            assert '\n' not in str(said.value)
            continue
        x = torch.randn(2, 3, e.size, e.size, generator=generator(1))
        want, tower = load_encoder(name).tokens(x, (layer,))[0][1], tower_of(e, layer)
        assert type(tower).__name__ == kind and not any(p.requires_grad for p in tower.parameters())
        tower.save_pretrained(tmp_path/'t')
        for t in tower, transformers.AutoModel.from_pretrained(tmp_path/'t').eval():
            torch.testing.assert_close(tower_tokens(t, x, layer), want, atol=1e-4*float(want.abs().max()), rtol=0)

@pytest.mark.parametrize('case', ['clip', 'dinov2', 'hf_vit', 'open_clip'])
def test_vlms_on_encoders_of_other_libraries_open_again(tmp_path, case):
    "With all weights where transformers looks for them"
    folder, result = trained(f'other-{case}', encoder=TOWERS[case][0](tmp_path/'e'), stage1_samples=16, stage2_samples=16)
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info['unexpected_keys'] and all('pooler' in k for k in info['missing_keys'])
    e, x = load_encoder(TOWERS[case][0](tmp_path/'f')), torch.randn(2, 3, 32, 32, generator=generator(1))
    assert e.fingerprint == result['encoder']['fingerprint']
    torch.testing.assert_close(tower_tokens(model.model.vision_tower.eval(), x, -2), e.tokens(x, (-2,))[0][1], atol=1e-4, rtol=1e-4)

# ---- what is trained, and what is not

def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

def test_encoder_and_language_model_stay_as_they_were_until_they_are_trained():
    run = smoke('frozen', encoder=MINI)
    p = parts(run)
    p.first_steps, p.metrics = 0, Metrics(p.folder/'metrics.jsonl')
    llm, tower = open_llm('small', 'smoke')[0].state_dict(), tower_of(load_encoder(MINI), -2).state_dict()
    connector = {k: v.clone() for k, v in p.reader.connector.state_dict().items()}
    Stage(p, 1).fit()
    assert same({f'model.{k}': v for k, v in p.reader.lm.state_dict().items()}, {k: v for k, v in llm.items() if k != 'lm_head.weight'})
    assert not any(torch.equal(v, connector[k]) for k, v in p.reader.connector.state_dict().items())
    Stage(p, 2).fit()
    assert not any(torch.equal(v, llm[f'model.{k}']) for k, v in p.reader.lm.state_dict().items() if v.ndim > 1)
    assert same(p.vlm.model.vision_tower.state_dict(), tower)
    folder, _ = trained('frozen-run', encoder=MINI)
    assert same(open_vlm(folder)[0].model.vision_tower.state_dict(), tower)

@pytest.mark.parametrize('connector', CONNECTORS)
def test_a_connector_begins_as_its_seed_says(connector):
    "Whatever the encoder's and the language model's weights are, and whatever was drawn before"
    llm, tokenizer = open_llm('small', 'smoke')
    def made(seed, spoil):
        if spoil: noisy(llm), torch.rand(9)
        e = load_encoder(TINY)
        if spoil: noisy(e)
        return make_vlm(smoke('x', connector=connector, seed=seed), e, llm, tokenizer).model.multi_modal_projector.state_dict()
    before = torch.get_rng_state()
    a = made(0, False)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(a, made(0, True)) and not same(a, made(1, False))
