"VLMs: what is saved is what was trained, in the form that others open; what runs are, however they are cut, split or fed."
import gc, json, os, random, shutil, signal, subprocess, sys, time, weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from helpers import context, group, start
from PIL import Image
from test_chat import DATES, said as turns, written
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from clipdino.chat import Form, LlavaJson, TEMPLATES, render
from clipdino.core import Metrics, SettingsError, generator
from clipdino.encoders import load_encoder
from clipdino.objectives import MEAN
from clipdino.pretrain import NonFinite, accelerator, arguments, pretrain, settings as clip_settings, tensors_digest
from clipdino.questions import LETTERS, prompt, squares
from clipdino.vlm import CONNECTORS, Held, Parts, Pool, Reader, Resampler, Seen, Stage, WORLD_ROWS, main, make_chats, make_processor, make_vlm, open_llm, rate, save_vlm, settings, tower_of, tower_tokens, train, train_vlm
from clipdino.vmcbench import answers, load_vlm
from clipdino.world import World
from clipdino.worldvqa import WorldVQA

context.set_forkserver_preload(['clipdino.vlm'])
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

def smoke(name, **given): return settings(**{'preset': 'smoke', 'name': name, 'encoder': TINY, 'questions': 0, **given})

def trained(name, **given):
    "A run's folder and result"
    result = train_vlm(smoke(name, **given))
    return Path('runs')/name, result

def parts(run):
    "What a run is made of, before it begins"
    (folder := Path('runs')/run.name).mkdir(parents=True, exist_ok=True)
    return Parts(run, folder, accelerator(run, folder))

def pictures(shapes=((32, 32), (20, 44), (61, 35))):
    "Noisy pictures of any shape (height, width)"
    r = np.random.default_rng(0)
    return [Image.fromarray(r.integers(0, 256, (h, w, 3), np.uint8)) for h, w in shapes]

def inputs(processor, questions, pictures):
    "What a user of transformers gives the model"
    chats = [[dict(role='user', content=[*[dict(type='image')]*(p is not None), dict(type='text', text=q)])]
             for q, p in zip(questions, pictures)]
    texts = [processor.apply_chat_template(c, add_generation_prompt=True) for c in chats]
    return processor(images=[p for p in pictures if p is not None] or None, text=texts, return_tensors='pt', padding=True)

QUESTIONS = 'What is it?', 'Is the boat red or blue?', 'How many, and where? \u00e9\u2603'

@torch.no_grad()
def said(folder, kind=AutoModelForImageTextToText):
    "Logits and greedy answers of a saved VLM"
    model, processor = kind.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    x = inputs(processor, QUESTIONS, pictures())
    return model(**x).logits, model.generate(**x, max_new_tokens=6, do_sample=False).tolist()

def elsewhere(top, f, *args):
    "`f(*args)` in the folder and with the cache of `top`, in another process"
    os.chdir(top)
    os.environ |= dict(CLIPDINO_CACHE=str(top/'cache'), OMP_NUM_THREADS='1')
    os.environ.pop('IN_TEST', None)
    torch.set_num_threads(1)
    return f(*args)

# ---- what is saved

@pytest.mark.parametrize('how', [dict(), dict(encoder=MINI, connector='resampler'),
                                 dict(connector='pool', image_tokens=4, layer=-1, template='vicuna')], ids=str)
def test_the_saved_model_is_the_trained_one(how):
    "From pixels and text through transformers, against our path: cached patch tokens, connector, language model, head"
    name = f'parity-{"-".join(map(str, how.values()))}'.replace(':', '-')
    run = smoke(name, **how)
    folder, _ = trained(**dict(how, name=name))
    vlm = load_vlm(folder)
    model, processor = vlm.model, vlm.processor
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
    processor = load_vlm(folder).processor
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
    done = subprocess.run([sys.executable, '-c', FRESH, str(Path(folder).absolute()), 'x.pt', 'out.pt'], env=env, cwd=tmp_path,
                          capture_output=True, text=True)
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
    model = load_vlm(folder).model
    assert type(model.model.multi_modal_projector).__name__ == dict(mlp='LlavaMultiModalProjector', linear='Linear', pool='Pool',
                                                                    resampler='Resampler')[connector]
    if connector == 'mlp': assert torch.equal(said(folder, LlavaForConditionalGeneration)[0], logits)
    x = inputs(AutoProcessor.from_pretrained(folder), QUESTIONS, pictures())
    with torch.no_grad(): assert torch.equal(model(**x).logits, logits) and torch.isfinite(logits[x['attention_mask'] > 0]).all()

def test_answers_do_not_depend_on_what_is_asked_beside_them():
    "One by one, and as a batch with padding and a text alone"
    folder, _ = trained('alone')
    vlm = load_vlm(folder)
    model, processor = vlm.model, vlm.processor
    pics, questions = [*pictures(), None], [*QUESTIONS, 'Hello?']
    def answers(*ids):
        return model.generate(**inputs(processor, [questions[i] for i in ids], [pics[i] for i in ids]), max_new_tokens=6,
                              do_sample=False)[:, -6:].tolist()
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
    (folder/'preprocessor_config.json').write_text(json.dumps(dict(size=dict(height=size, width=size), image_mean=[.4, .5, .6],
                                                                   image_std=[.2, .3, .2])))
    return f'hf:{folder}'

def of_open_clip(folder, quick=False, **vision):
    "A small model in a folder"
    import open_clip
    folder.mkdir()
    cfg = dict(embed_dim=16, quick_gelu=quick, vision_cfg=dict(image_size=32, layers=3, width=64, patch_size=8, **vision),
               text_cfg=dict(context_length=8, vocab_size=49408, width=32, heads=2, layers=1))
    (folder/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=cfg, preprocess_cfg=dict(mean=[.4, .5, .6], std=[.2, .3, .2]))))
    torch.save(noisy(open_clip.CLIP(**cfg)).state_dict(), folder/'open_clip_pytorch_model.bin')
    return f'open_clip:local-dir:{folder}'

# what makes the encoder's name; its tower at layer -2, and at -1: transformers' class, our Tower, or None where there is none
TOWERS = dict(
    vit=(lambda d: TINY, 'ViTModel', 'Tower'), stem=(lambda d: MINI, 'Tower', 'Tower'), cnn=(lambda d: 'random:resnet18', 'Tower', 'Tower'),
    registers=(lambda d: 'random:vit_small_patch16_dinov3', 'Tower', 'Tower'),
    register_pooled=(lambda d: 'random:vit_pwee_patch16_reg1_gap_256', 'Tower', 'Tower'),  # the first with rotary tables that are not saved
    clip=(lambda d: of_transformers('CLIP', d), 'CLIPVisionModel', 'Tower'),
    dinov2=(lambda d: of_transformers('Dinov2', d, mlp_ratio=2), 'Dinov2Model', 'Tower'),
    hf_vit=(lambda d: of_transformers('ViT', d), 'ViTModel', 'Tower'),
    dinov2_registers=(lambda d: of_transformers('Dinov2WithRegisters', d, mlp_ratio=2), 'Tower', 'Tower'),
    siglip=(lambda d: of_transformers('Siglip', d), 'Tower', 'Tower'), larger=(lambda d: of_transformers('CLIP', d, 48), 'Tower', 'Tower'),
    open_clip=(lambda d: of_open_clip(d), 'CLIPVisionModel', None),
    open_clip_quick=(lambda d: of_open_clip(d, quick=True), 'CLIPVisionModel', None),
    open_clip_pooled=(lambda d: of_open_clip(d, pool_type='avg'), 'CLIPVisionModel', None))

@pytest.mark.parametrize('case', TOWERS)
def test_a_tower_gives_the_encoders_patch_tokens(tmp_path, case):
    "Also when it has been saved and opened again"
    make, *kinds = TOWERS[case]
    name = make(tmp_path/'e')
    for layer, kind in zip((-2, -1), kinds):
        e = load_encoder(name)
        if kind is None:
            with pytest.raises(SettingsError,
                               match=f'has no form among vision towers that gives its patch tokens at layer {layer} from pictures of {e.size} px') as said:
                tower_of(e, layer)
            assert '\n' not in str(said.value)
            continue
        x = torch.randn(2, 3, e.size, e.size, generator=generator(1))
        want, tower = load_encoder(name).tokens(x, (layer,))[0][1], tower_of(e, layer)
        assert type(tower).__name__ == kind and not any(p.requires_grad for p in tower.parameters())
        tower.save_pretrained(tmp_path/'t')
        for t in tower, transformers.AutoModel.from_pretrained(tmp_path/'t').eval():
            torch.testing.assert_close(tower_tokens(t, x, layer), want, atol=1e-4*float(want.abs().max()), rtol=0)
        half, elsewhere = (transformers.AutoModel.from_pretrained(tmp_path/'t', dtype=d).eval() for d in (torch.bfloat16, torch.float32))
        torch.testing.assert_close(tower_tokens(half, x.bfloat16(), layer).float(), want, atol=.1*float(want.abs().max()), rtol=0)
        assert tower_tokens(elsewhere.to('meta'), x.to('meta'), layer).shape == want.shape, 'when it was moved before its first picture'

@pytest.mark.parametrize('case', ['clip', 'dinov2', 'hf_vit', 'open_clip'])
def test_vlms_on_encoders_of_other_libraries_open_again(tmp_path, case):
    "With all weights where transformers looks for them"
    folder, result = trained(f'other-{case}', encoder=TOWERS[case][0](tmp_path/'e'), stage1_samples=16, stage2_samples=16)
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info['unexpected_keys'] and all('pooler' in k for k in info['missing_keys'])
    e, x = load_encoder(TOWERS[case][0](tmp_path/'f')), torch.randn(2, 3, 32, 32, generator=generator(1))
    assert e.fingerprint == result['encoder']['fingerprint']
    assert result['llm_weights'] == tensors_digest({k: v for k, v in open_llm('world', 'smoke', 0)[0].base_model.state_dict().items() if 'embed' not in k})[:12]
    torch.testing.assert_close(tower_tokens(model.model.vision_tower.eval(), x, -2), e.tokens(x, (-2,))[0][1], atol=1e-4, rtol=1e-4)

def test_a_layer_that_no_connector_fits_is_refused():
    with pytest.raises(SettingsError,
                       match='random:resnet18 makes 196 tokens of width 256 at layer -2, and 49 of width 512 at its end, which a VLM reads with layer=-1'):
        parts(smoke('cnn', encoder='random:resnet18'))

# ---- what is trained, and what is not

def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

def test_encoder_and_language_model_stay_as_they_were_until_they_are_trained():
    run = smoke('frozen', encoder=MINI)
    p = parts(run)
    p.open_metrics(0, 0)
    llm, tower = open_llm('world', 'smoke')[0].state_dict(), tower_of(load_encoder(MINI), -2).state_dict()
    connector = {k: v.clone() for k, v in p.reader.connector.state_dict().items()}
    Stage(p, 1).fit()
    assert same({f'model.{k}': v for k, v in p.reader.lm.state_dict().items()}, {k: v for k, v in llm.items() if k != 'lm_head.weight'})
    assert not any(torch.equal(v, connector[k]) for k, v in p.reader.connector.state_dict().items())
    Stage(p, 2).fit()
    assert not any(torch.equal(v, llm[f'model.{k}']) for k, v in p.reader.lm.state_dict().items() if v.ndim > 1)
    assert same(p.vlm.model.vision_tower.state_dict(), tower)
    folder, _ = trained('frozen-run', encoder=MINI)
    assert same(load_vlm(folder).model.model.vision_tower.state_dict(), tower)

def test_vlms_are_trained_on_training_pictures():
    "With captions and questions as the run says; held-out questions are of `val`"
    run, (n, m) = smoke('data', captions='full', answers='text', questions=8), WORLD_ROWS['smoke']
    captions, questions = (make_chats(run, k, MEAN) for k in (1, 2))
    assert captions.world.fingerprint == World('train', n, run.canvas, captions='full').fingerprint
    assert questions.pictures.fingerprint == WorldVQA('train', m, run.canvas).fingerprint and questions.answers == 'text'
    assert Held(parts(run)).questions.fingerprint == WorldVQA('val', 8, run.canvas).fingerprint

def test_held_out_questions_are_answered_as_in_scoring(tmp_path):
    "By the likeliest letter, whatever is asked beside them"
    p = parts(smoke('held', questions=40))
    noisy(p.reader.connector)  # for pictures that make a difference
    held = Held(p)
    right = held(batch=7)
    save_vlm(p.vlm, p.processor, tmp_path)
    rows = next(answers(load_vlm(tmp_path), held.questions, [list(range(40))], how='likelihood'))
    assert right.tolist() == [LETTERS[int(np.argmax(r['scores']))] == r['answer'] for r in rows] and 0 < right.sum() < 40

@pytest.mark.parametrize('connector', CONNECTORS)
def test_a_connector_begins_as_its_seed_says(connector):
    "Whatever the encoder's and the language model's weights are, and whatever was drawn before"
    llm, tokenizer = open_llm('world', 'smoke')
    def made(seed, spoil):
        if spoil: noisy(llm), torch.rand(9)
        e = load_encoder(TINY)
        if spoil: noisy(e)
        return make_vlm(smoke('x', connector=connector, seed=seed), e, llm, tokenizer).model.multi_modal_projector.state_dict()
    before = torch.get_rng_state()
    a = made(0, False)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(a, made(0, True)) and not same(a, made(1, False))

def test_connectors_know_places():
    "The pooling one takes means of neighbours; the resampler tells patches apart that trade places"
    x = torch.arange(16.).view(1, 16, 1)*torch.tensor([1., 10.])
    assert Pool(nn.Identity(), 4)(x).tolist() == [[[2.5, 25.], [4.5, 45.], [10.5, 105.], [12.5, 125.]]]
    r, x = Resampler(8, 8, 4, 1), torch.randn(1, 4, 8, generator=generator(0))
    assert (r(x) - r(x[:, [1, 0, 2, 3]])).abs().max() > 1e-6

# ---- loss and gradients

def llava_data(d, n=48, text=.6):
    "A list with pictures of all shapes and rows without one, as JSON:FOLDER"
    r, rows = random.Random(0), []
    for k in range(n):
        q, a = f'What is in {r.choice("abcdef")*r.randrange(1, 9)}?', ' '.join(['cat', 'dog', 'two'][r.randrange(3)] for _ in range(r.randrange(1, 12)))
        rows.append(dict(id=str(k), conversations=turns(q, a, 'And?', 'No'))
                    if r.random() < text else dict(id=str(k), image=f'{k % 7}.png', conversations=turns(f'<image>\n{q}', a)))
    path, folder = written(d, rows, [f'{k}.png' for k in range(7)])
    return f'{path}:{folder}'

@torch.no_grad()
def naive(run, stage, step):
    "Mean cross-entropy of a step's answer tokens: conversation by conversation, from pixels, through transformers, in double precision"
    p = parts(run)
    s, vlm, losses = Stage(p, stage), p.vlm.double(), []
    for b in s.batches.micro(step, 1):
        ids, targets, length = b['ids'][0], b['targets'][0], int(b['mask'].sum())
        x = dict(pixel_values=p.encoder.prepare(s.seen.pictures.batch(b['pictures'].numpy(), p.encoder.size)).double()) if b['image'].any() else {}
        logits = vlm(input_ids=ids[None, :length], attention_mask=torch.ones(1, length, dtype=torch.int64), **x).logits[0]
        at = torch.tensor([t for t in range(1, length) if targets[t] != -100])
        assert (targets[at] == ids[at]).all()
        losses.append(-logits[at - 1].log_softmax(1)[range(len(at)), ids[at]])
    return float(torch.cat(losses).mean())

def steps(run, stage, n=3):
    "Loss of some steps, and gradients of the first"
    p, losses, grads = parts(run), [], {}
    s = Stage(p, stage)
    step = s.opt.step
    def record():
        grads.update({k: v.grad.numpy().copy() for k, v in p.reader.named_parameters() if v.grad is not None and k not in grads}), step()
    s.opt.step = record
    for k in range(n): losses.append(s.update(s.parts(k)))
    assert grads.keys() == {k for k, v in p.reader.named_parameters() if v.requires_grad}
    return losses, grads

def close(a, b):
    for x, y in zip(a[0], b[0]): assert x == pytest.approx(y, rel=1e-4)
    assert a[1].keys() == b[1].keys() and len(a[0]) == len(b[0])
    for k, v in a[1].items(): assert abs(v - b[1][k]).max() <= 1e-4*abs(v).max(), k

@pytest.mark.parametrize('stage', [1, 2])
def test_the_loss_is_the_mean_over_answer_tokens(tmp_path, stage):
    "On the world, and on conversations of which some have no picture"
    for name, given in ('world', {}), ('list', dict(stage2_data=llava_data(tmp_path))):
        run = smoke(f'loss-{name}-{stage}', clip_grad=1e9, **given)
        (out,), grads = steps(run, stage, 1)
        assert out['loss'] == pytest.approx(naive(run, stage, 0), rel=2e-5)
        assert out['grad_norm'] == pytest.approx(sum((g.astype(float)**2).sum() for g in grads.values())**.5, rel=1e-5)

@pytest.mark.parametrize('stage', [1, 2])
def test_a_batch_in_parts_is_the_whole_batch(tmp_path, stage):
    "Also in parts without a picture, and of unequal size"
    given = dict(stage2_data=llava_data(tmp_path), stage1_batch=10, stage2_batch=10, connector='resampler')
    whole = steps(smoke(f'whole-{stage}', **given), stage)
    for micro in 1, 4: close(whole, steps(smoke(f'parts-{stage}-{micro}', micro=micro, recompute=micro == 4, **given), stage))

def test_gradients_are_clipped():
    "To the norm that is set; what is logged is the norm before"
    (out,), grads = steps(smoke('clipped', clip_grad=1e-3), 1, 1)
    assert sum((g.astype(float)**2).sum() for g in grads.values())**.5 == pytest.approx(1e-3, rel=1e-2) and out['grad_norm'] > .01

def test_settings_reach_optimiser_and_order():
    p = parts(smoke('reach', beta2=.9, weight_decay=.1, seed=3))
    for k in 1, 2: assert {(g['betas'], g['weight_decay']) for g in Stage(p, k).opt.param_groups} == {((.9, .9), .1)}
    assert [b.seed for b in p.batches] == [3, 3]

def test_what_is_made_again_is_not_kept():
    "The language model's inner values take most of a step's memory, unless they are made again"
    kept = {}
    for recompute in False, True:
        s, sizes = Stage(parts(smoke(f'kept-{recompute}', recompute=recompute)), 2), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t): s.update(s.parts(0))
        kept[recompute] = sum(sizes)
    assert kept[True] < .5*kept[False], kept

@pytest.mark.parametrize('stage, given', [(1, {}), (2, {}), (2, dict(micro=1, lora=2))], ids=str)
def test_several_processes_are_one(top, tmp_path, stage, given):
    "Also at steps where one of them has no picture"
    given = dict(stage2_data=llava_data(tmp_path), stage1_batch=4, stage2_batch=4, **given)
    name = f'ranks-{stage}-{len(given)}'
    one = steps(smoke(name, **given), stage)
    s = Stage(parts(smoke(name, **given)), stage)
    pictures = [[s.batches.rows(k, r, 2)['image'].any().item() for r in (0, 1)] for k in range(3)]
    assert stage == 1 or [True, False] in pictures or [False, True] in pictures
    close(one, group(2, elsewhere, top, steps, smoke(name, **given), stage))

@pytest.mark.parametrize('given', [{}, dict(micro=1, lora=2, recompute=True)], ids=str)
def test_weights_that_are_split_over_processes(top, tmp_path, given):
    "Gradients of the parts that a process holds, put together, are those of one process; so is the end, also after a cut"
    given = dict(dict(stage2_data=llava_data(tmp_path), stage1_batch=4, stage2_batch=4, stage1_samples=8, stage2_samples=32, save_every=12,
                      connector='resampler', encoder=MINI), **given)
    one = trained(f'one{len(given)}', **given)[0]
    run = smoke(f'split{len(given)}', shard=True, **given)
    (top/'runs'/run.name).mkdir(parents=True)
    assert group(2, elsewhere, top, split, run, 5) == 5
    result, local = group(2, elsewhere, top, split, run, 0)
    assert sum(local) < .6*sum(result['parameters'][k] for k in ('lm', 'connector')) or given.get('lora')
    a, b = (load_file(f'runs/{n}/model.safetensors') for n in (one.name, run.name))
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(b[k], a[k], atol=2e-4, rtol=0)
    for x, y in zip(*(Metrics.read(f'runs/{n}/metrics.jsonl') for n in (one.name, run.name)), strict=True):
        assert (x['step'], x['loss'], x['grad_norm']) == (y['step'], pytest.approx(y['loss'], rel=1e-3),
                                                          pytest.approx(y['grad_norm'], rel=1e-3))
    load_vlm(run.name)

@pytest.mark.parametrize('given', [{}, dict(lora=2, micro=1)], ids=str)
def test_three_processes_that_were_cut(top, tmp_path, given):
    "From three on, a sum depends on the order of its terms"
    given = dict(stage2_data=llava_data(tmp_path), stage1_batch=6, stage2_batch=6, stage1_samples=24, stage2_samples=48, save_every=12,
                 connector='resampler', encoder=MINI, **given)
    ends = []
    for name, cuts in ('straight', ()), ('cut', (3, 5)):
        run = smoke(f'three-{name}-{len(given)}', **given)
        (top/'runs'/run.name).mkdir(parents=True)
        for until in *cuts, 0: group(3, elsewhere, top, split, run, until)
        ends.append(made(top/'runs'/run.name))
    assert ends[0] == ends[1]

def test_a_notebook_starts_processes(monkeypatch):
    "Which train as a program, and save classes of ours by their names; accelerate's own way to split weights is refused"
    given = dict(encoder=MINI, connector='linear', questions=40)
    (one, a), (two, b) = trained('alone-linear', **given), trained('several', processes=2, shard=True, **given)
    assert b['environment']['processes'] == 2 and [s['loss'] for s in a['stages']] == pytest.approx([s['loss'] for s in b['stages']], rel=1e-3)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir()) and (one/'config.json').read_text() == (two/'config.json').read_text()
    torch.testing.assert_close(said(one)[0], said(two)[0], atol=1e-2, rtol=0)
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    with pytest.raises(SettingsError, match='launched with ACCELERATE_USE_FSDP=true.* launch without.* shard'): trained('fsdp')

def split(run, until):
    "Train as one of several processes, up to a step of stage 2 or to the end; what was seen"
    update, fit, local, whole = Stage.update, Stage.fit, [], []
    def begin(self):
        if run.shard and self.k == 1: whole.extend(weakref.ref(v) for n, v in self.p.reader.lm.named_parameters() if 'embed' not in n)
        return fit(self)
    def step(self, parts):
        if until and (self.k, self.step) == (2, until): raise Cut
        if run.shard and self.k == 2 and not hasattr(self.p.acc, 'plain_backward'):
            self.p.acc.plain_backward = self.p.acc.backward
            def backward(loss):
                self.p.acc.plain_backward(loss)
                assert all(isinstance(v.grad, DTensor) for v in self.p.reader.parameters() if v.requires_grad), 'no process holds whole gradients, between the parts of a step either'
            self.p.acc.backward = backward
            assert 'forward' not in self.p.reader.__dict__, 'nor a forward of accelerate that keeps whole weights'
        out = update(self, parts)
        if run.shard and self.k == 2 and not local:
            gc.collect()
            assert not any(v() is not None for v in whole), 'nor does what trained stage 1'
            local.extend(v.to_local().numel() for v in self.p.reader.parameters())
        return out
    Stage.update, Stage.fit = step, begin
    try: return train(run, Path('runs')/run.name), local
    except Cut: return until

def test_learning_rates():
    "Up over the warm-up, then down a cosine to 0; the language model's is a multiple of the connector's; found in the sizes of AdamW's first steps"
    assert [rate(k/100, .1) for k in (5, 10, 55, 100)] == pytest.approx([.5, 1, .5, 0]) and rate(0., 0.) == 1 and rate(1., 1.) == 1
    s = Stage(parts(smoke('rates', stage2_lr=1e-3, lm_lr=.1, warmup=.5)), 2)
    before = {k: v.detach().clone() for k, v in s.p.reader.named_parameters()}
    s.update(s.parts(0))
    moved = {k: float((v - before[k]).detach().abs().max()) for k, v in s.p.reader.named_parameters()}
    assert [g['lr'] for g in s.opt.param_groups] == pytest.approx([5e-4, 5e-5])
    for k, v in moved.items(): assert v == pytest.approx(5e-4 if k.startswith('connector.') else 5e-5, rel=.02), k

# ---- runs that are cut

def run_in(top, run):
    elsewhere(top, train_vlm, run)

def made(folder):
    "All that a run leaves, without what was measured with a clock"
    rows = [{k: v for k, v in r.items() if k not in ('per_s', 'waited')} for r in Metrics.read(folder/'metrics.jsonl')]
    result = {k: v for k, v in json.loads((folder/'result.json').read_text()).items()
              if k not in ('name', 'seconds_of_last_start', 'environment')}
    return rows, result, (folder/'model.safetensors').read_bytes(), sorted(p.name for p in folder.iterdir())

MOMENTS = dict(  # what is there when the process is killed
    stage1=lambda d: len(Metrics.read(d/'metrics.jsonl')) > 5, between=lambda d: (d/'stage1/state-000000020.safetensors').exists(),
    stage2=lambda d: len(Metrics.read(d/'metrics.jsonl')) > 27, writing=lambda d: any((d/'stage2').glob('.state*')),
    saving=lambda d: (d/'.vlm').exists())

@pytest.mark.parametrize('given', [dict(questions=40, micro=5), dict(lora=2, connector='pool', encoder=MINI)], ids=['plain', 'lora'])
def test_killed_at_any_moment(top, given):
    "In both stages, between them, while a state is written and while the model is saved: it ends with the bytes of an unbroken run"
    chance = random.Random(len(given))
    given = dict(dict(stage1_samples=160, stage2_samples=160, stage1_batch=8, stage2_batch=8, save_every=24), **given)
    straight, killed = (smoke(f'{k}-{len(given)}', **given) for k in ('straight', 'killed'))
    train_vlm(straight)
    d, n = top/'runs'/killed.name, 0
    for moment, there in MOMENTS.items():
        p = start(run_in, top, killed)
        while p.is_alive() and not there(d): time.sleep(.001)
        if moment in ('stage1', 'stage2'): time.sleep(chance.random()*.03)
        os.kill(p.pid, chance.choice((signal.SIGKILL, signal.SIGTERM)))
        p.join()
        n += p.exitcode < 0
    assert n >= 4 and not (d/'result.json').exists()
    p = start(run_in, top, killed)
    p.join()
    assert p.exitcode == 0 and made(d) == made(top/'runs'/straight.name)
    assert [r['step'] for r in made(d)[0]] == list(range(1, 41))

class Cut(Exception): pass

def cut(run, stage, step, monkeypatch):
    "Train up to a step"
    update = Stage.update
    def stop(self, parts):
        if (self.k, self.step) == (stage, step): raise Cut
        return update(self, parts)
    with monkeypatch.context() as m, pytest.raises(Cut):
        m.setattr(Stage, 'update', stop)
        train_vlm(run)

def spoil(path): path.write_bytes(path.read_bytes()[:-9] + b'123456789')

@pytest.mark.parametrize('given', [{}, dict(lora=2)], ids=['plain', 'lora'])
def test_damaged_states(monkeypatch, capsys, given):
    "The one before it serves; without one the stage begins again; the end is the same"
    given = dict(given, stage1_batch=8, stage2_batch=8, save_every=16, seed=5)
    whole = trained(f'sound{len(given)}', **given)[0]
    for k, damage in enumerate([['stage2/state-000000006'], ['stage2/state-000000006', 'stage2/state-000000004'],
                                ['stage1/state-000000008'], ['stage1/state-000000008', 'stage2/state-000000006',
                                                             'stage2/state-000000004']]):
        run = smoke(f'damaged{k}-{len(given)}', **given)
        cut(run, 2, 7, monkeypatch)
        for f in damage: spoil(Path('runs')/run.name/f'{f}.safetensors')
        (left := Path('runs')/run.name/'stage1/.state-000000008.safetensors.1.tmp').touch()
        (stale := Path('runs')/run.name/'.vlm/old.json').parent.mkdir()
        stale.touch()
        capsys.readouterr()
        with monkeypatch.context() as m:
            m.setattr('clipdino.vlm.shutil.rmtree', lambda d, rmtree=shutil.rmtree, **how: 'stage' in d.name or rmtree(d, **how))
            train_vlm(run)
        assert not left.exists()
        for d in ('stage1', 'stage2'): shutil.rmtree(left.parents[1]/d)
        out = capsys.readouterr().out
        assert out.count('is damaged') >= len(damage) and ('continuing' in out) == (k < 3)
        assert made(Path('runs')/run.name) == made(whole), damage

def test_other_settings_or_data_are_refused_by_name(tmp_path, monkeypatch):
    run = smoke('changed', stage2_data=llava_data(tmp_path), template='vicuna')
    cut(run, 1, 3, monkeypatch)
    for k, v in dict(stage1_lr=1., layer=-1, connector='linear', seed=4, encoder='random:clipdino_vit_mini').items():
        with pytest.raises(SettingsError, match=f'changed was begun with other settings: {k} was'): train_vlm(replace(run, **{k: v}))
    with monkeypatch.context() as m:
        m.setitem(TEMPLATES, 'vicuna', TEMPLATES['vicuna'].replace('curious', 'sleepy'))
        with pytest.raises(SettingsError, match='changed was begun with other settings: the data or models that it reads are others now'):
            train_vlm(run)
        m.undo()
        m.setattr('clipdino.vlm.precision_of', lambda run: 'bf16')
        with pytest.raises(SettingsError, match='changed was begun in fp32 and would go on in bf16 here'): train_vlm(run)
    text = (tmp_path/'list.json').read_text()
    (tmp_path/'list.json').write_text(text.replace('cat', 'cow', 1))
    with pytest.raises(SettingsError, match='changed was begun with other settings: the data or models that it reads are others now'):
        train_vlm(run)
    (tmp_path/'list.json').write_text(text)
    assert train_vlm(replace(run, save_every=16))['stages'][1]['seen'] == 64

def test_a_run_that_is_complete_is_looked_up(monkeypatch, capsys):
    folder, result = trained('done')
    for what in 'Parts', 'check_inputs': monkeypatch.setattr(f'clipdino.vlm.{what}', None)  # its data may have moved
    assert train_vlm(smoke('done')) == result and 'done is complete; delete its folder to run it again' in capsys.readouterr().out
    with pytest.raises(SettingsError, match='done was begun with other settings: seed was 0 and is now 1'): train_vlm(smoke('done', seed=1))

def test_an_encoder_that_was_trained_again():
    def again(seed): return pretrain(clip_settings('smoke', name='again', probes=0, seed=seed))
    again(0)
    run = smoke('of-again', encoder='again')
    assert train_vlm(run) == train_vlm(run)
    shutil.rmtree('runs/again')
    again(1)
    with pytest.raises(SettingsError, match='again was trained again since of-again was'): train_vlm(run)

def test_tokens_that_are_on_the_gpu_are_not_pinned(monkeypatch):
    "They are where pictures are encoded as they come; `meta` stands for the GPU"
    s = Stage(parts(smoke('pinned', cached=False)), 1)
    pinned = []
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda t: pinned.append(t.device.type) or t)
    s.seen.e.model.to('meta')
    s.p.acc = SimpleNamespace(device=torch.device('cuda'), process_index=0, num_processes=1)
    (b, _), *_ = s.parts(0)
    assert b['tokens'].device.type == 'meta' and set(pinned) == {'cpu'}

def test_what_is_not_finite_stops_the_run_before_it_does_harm():
    p = parts(smoke('nan'))
    p.open_metrics(4, 0)
    s, ids = Stage(p, 1), None
    good = p.seen[0].rows
    p.seen[0].rows = s.seen.rows = np.array(good)
    bad = int(s.batches.rows(2)['pictures'][3])
    p.seen[0].rows[bad, 1, 1] = np.nan
    with pytest.raises(NonFinite, match=r'stage 1, step 2: loss nan, gradient norm nan; no weight was changed. Its conversations: \d+(, \d+){7} ...'):
        s.fit()
    assert s.step == 2 and all(v.isfinite().all() for v in p.reader.parameters()) and len(p.metrics.rows()) == 2
    s = Stage(p, 2)
    with torch.no_grad(): next(p.reader.lm.parameters())[0, 0] = np.inf
    before = {k: v.clone() for k, v in p.reader.state_dict().items()}
    with pytest.raises(NonFinite, match='stage 2, step 0'): s.fit()
    assert same(before, p.reader.state_dict())

def test_features_that_are_not_finite_are_refused():
    run, e = smoke('x'), load_encoder(TINY)
    e.blocks[0].mlp.fc1.weight.data[0] = np.nan
    with pytest.raises(SettingsError, match='features of picture 0 of world are not finite under random:clipdino_vit_smoke'):
        Seen(e, make_chats(run, 1, e.mean).pictures, run)

# ---- adapters

def test_adapters_are_trained_alone_and_then_become_part_of_the_model():
    run = smoke('lora', lora=4, connector='mlp', lm_lr=3.)
    p = parts(run)
    p.open_metrics(0, 0)
    llm = open_llm('world', 'smoke')[0].model.state_dict()
    s = Stage(p, 2)
    assert all('.lora_' in n or n.startswith('connector.') for n, v in p.reader.named_parameters() if v.requires_grad)
    assert {'.'.join(n.split('.')[-4:-1]) for n, v in p.reader.named_parameters() if '.lora_A' in n} == {f'{m}.lora_A.default' for m in ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')}
    before = {n: v.clone() for n, v in p.reader.named_parameters() if '.lora_' in n}
    s.fit()
    with safe_open(max(s.folder.glob('state-*')), 'pt') as f:
        assert {k[6:] for k in f.keys() if k.startswith('model.')} == {n for n, v in p.reader.named_parameters() if v.requires_grad}, 'what is frozen is not saved'
    after = p.reader.state_dict()
    assert not any(torch.equal(v, after[n]) for n, v in before.items())
    assert same({n.removeprefix('lm.').replace('.base_layer', ''): v
                 for n, v in after.items() if n.startswith('lm.') and '.lora_' not in n}, llm)
    x = inputs(p.processor, QUESTIONS, pictures())
    with torch.no_grad():
        adapted = p.vlm(**x).logits
        p.merge()
        torch.testing.assert_close(p.vlm(**x).logits, adapted, atol=1e-4, rtol=0)

def test_a_run_with_adapters_leaves_a_plain_llava(tmp_path):
    folder, result = trained('lora-run', lora=4, questions=40)
    assert result['val']['questions'] == 40 and not any('lora' in k for k in load_file(folder/'model.safetensors')) and not list(folder.glob('adapter*'))
    assert result['parameters'] == trained('alone')[1]['parameters']
    for l, t in zip(*[iter(fresh(folder, tmp_path))]*2): assert torch.equal(l, said(folder)[0])

# ---- language models

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, bos_token_id=1,
             eos_token_id=2, pad_token_id=None)

def language_model(d, kind='Llama', template=TEMPLATES['vicuna'], spare=0, mark=True, **config):
    "A small one with a tokenizer of its own; its generation settings are as Vicuna's, which transformers will not save"
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator([], trainers.BpeTrainer(special_tokens=['?', '<s>', '</s>'] + ['<image>']*mark,
                                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=t, chat_template=template, bos_token='<s>', eos_token='</s>',
                                                     unk_token='?')
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f'{kind}Config')(**SIZES, vocab_size=len(tokenizer) + spare, **config))
    noisy(model).save_pretrained(d)
    tokenizer.save_pretrained(d)
    (d/'generation_config.json').write_text(json.dumps(dict(bos_token_id=1, eos_token_id=2, temperature=.9, top_p=.6, do_sample=False)))
    return str(d)

LLMS = dict(llama=dict(), llama_tied=dict(tie_word_embeddings=True, spare=13), llama_without_mark=dict(mark=False),
            tied_without_mark=dict(mark=False, tie_word_embeddings=True), spare_without_mark=dict(mark=False, spare=3),
            qwen2=dict(kind='Qwen2', tie_word_embeddings=True), qwen2_untied=dict(kind='Qwen2', mark=False),
            gpt_neox=dict(kind='GPTNeoX', hidden_dropout=.3, attention_dropout=.3, tie_word_embeddings=False))

@pytest.mark.parametrize('case', LLMS)
def test_language_models(tmp_path, case):
    "Trained, saved, opened; the head is trained where it is one of its own; dropout, where a family has it, makes no difference"
    llm = language_model(tmp_path/'lm', **LLMS[case])
    folder, result = trained(f'llm-{case}', llm=llm, stage1_samples=16, stage2_samples=32)
    assert folder.name == f'llm-{case}' and settings('smoke', encoder='e', llm=llm).folder_name == 'vlm-e-lm'
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    assert {k: getattr(model.generation_config, k) for k in ('bos_token_id', 'eos_token_id', 'temperature', 'do_sample')} == dict(bos_token_id=1, eos_token_id=2, temperature=None, do_sample=None)
    run, began = smoke(f'llm-{case}-again', llm=llm, stage1_samples=16, stage2_samples=32), open_llm(llm, 'smoke')[0]
    assert result['stages'][0]['loss'] == pytest.approx(naive(run, 1, 0), rel=1e-5)
    own = {id(v): v.numel() for v in (*model.model.language_model.parameters(), *model.lm_head.parameters())}
    assert result['parameters']['lm'] == sum(own.values())
    head, first = model.lm_head.weight, began.get_output_embeddings().weight
    assert head.shape == first.shape and not torch.equal(head, first)
    assert torch.equal(head, model.get_input_embeddings().weight) == bool(began.config.tie_word_embeddings)

def test_embeddings_grow_for_the_mark_alone_and_as_the_seed_says(tmp_path):
    llm = language_model(tmp_path/'lm', mark=False)
    (a, t), (b, _), (c, _) = (open_llm(llm, 'smoke', seed) for seed in (0, 0, 1))
    weights = [m.get_input_embeddings().weight for m in (a, b, c)]
    n = len(t) - 1
    assert t.convert_tokens_to_ids('<image>') == n and weights[0].shape[0] % 64 == 0
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0][:n], weights[2][:n]) and not torch.equal(weights[0], weights[2])
    same_size = language_model(tmp_path/'spare', mark=False, spare=1)
    assert open_llm(same_size, 'smoke')[0].get_input_embeddings().num_embeddings == n + 1

def test_language_models_that_do_not_fit(tmp_path):
    def refused(match, kind='Llama', **given):
        with pytest.raises(SettingsError, match=match) as e:
            trained('unfit', llm=language_model(tmp_path/f'{kind}{len(given)}', kind, **given))
        assert '\n' not in str(e.value)
    refused('the tokenizer has no chat template: give one of vicuna, chatml as template', template=None)
    refused('PhiForCausalLM does more between its decoder and its logits than LLaVA', 'Phi')
    refused('Gemma2ForCausalLM does more between its decoder and its logits', 'Gemma2', head_dim=16)
    refused('GPT2LMHeadModel keeps its decoder or embeddings where LLaVA does not look', 'GPT2')
    llm = language_model(tmp_path/'bare', template=None)
    assert trained('given-template', llm=llm, template='vicuna', stage1_samples=16, stage2_samples=16)[1]['llm'] == llm
    with pytest.raises(SettingsError, match='begins some of A, B, C, D with one and the same token'):
        trained('letters', llm=llm, template='vicuna', stage1_samples=16, stage2_samples=16, questions=8)
    assert not list(Path('runs/letters').glob('stage*'))

def test_a_model_stops_where_its_template_ends_an_answer(tmp_path):
    "Base models end texts with another token than chats end turns with"
    llm = language_model(tmp_path/'base', template=None, spare=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llm)
    tokenizer.add_special_tokens(dict(additional_special_tokens=['<|im_start|>', '<|im_end|>']))
    tokenizer.save_pretrained(llm)
    folder, _ = trained('chatml', llm=llm, template='chatml', stage1_samples=16, stage2_samples=16)
    said = json.loads((folder/'generation_config.json').read_text())['eos_token_id']
    assert said == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids('<|im_end|>')] and tokenizer.eos_token_id == 2

def test_a_language_model_is_known_by_its_name_not_by_where_it_is():
    assert settings('mini', llm='/data/vicuna-study/Qwen2-7B-Instruct').template == '' and settings('mini', llm='/data/vicuna-7b-v1.5').template == 'vicuna'

# ---- data in LLaVA's format

def test_lists_of_conversations(tmp_path):
    "With rows of text alone, rows that are counted as unusable, and pictures of all shapes; cached and not"
    spec = llava_data(tmp_path)
    rows = json.loads((tmp_path/'list.json').read_text()) + [dict(id='gone', image='gone.png',
                                                                  conversations=turns('<image>\nWhat?', 'cat'))]
    (tmp_path/'list.json').write_text(json.dumps(rows))
    captions = [dict(r, conversations=r['conversations'][:2]) for r in rows if 'image' in r]
    (tmp_path/'captions.json').write_text(json.dumps(captions))
    given = dict(stage1_data=f'{tmp_path}/captions.json:{tmp_path}/pictures', stage2_data=spec, stage1_batch=6, stage2_batch=6,
                 stage1_samples=0, stage2_samples=96, max_bad=.2)
    made = {cached: trained(f'list-{cached}', cached=cached, **given) for cached in (True, False)}
    for folder, result in made.values():
        assert [s['unusable'] for s in result['stages']] == [{'missing picture': 1}]*2
        assert [json.loads((folder/f'bad-stage{k}.jsonl').read_text())['reason'] for k in (1, 2)] == ['missing picture']*2
        assert [s['conversations'] for s in result['stages']] == [len(captions) - 1, len(rows) - 1] and result['stages'][0]['seen'] == (len(captions) - 1)//6*6
    (a, _), (b, _) = made.values()
    for x, y in zip(Metrics.read(a/'metrics.jsonl'), Metrics.read(b/'metrics.jsonl')):
        assert x['loss'] == pytest.approx(y['loss'], rel=1e-4)

@pytest.mark.parametrize('mean', [(.1, .6, .3), (.485, .456, .406)])
def test_padding_has_the_same_colour_in_training_and_after(tmp_path, mean):
    "The encoder's mean"
    e, llm = load_encoder(TINY), open_llm('world', 'smoke')
    e.mean = mean
    path, folder = llava_data(tmp_path).split(':')
    processor, run = make_processor(smoke('x'), e, llm[1]), smoke('x', stage2_data=f'{path}:{folder}')
    files = make_chats(run, 2, e.mean).pictures
    want = inputs(processor, ['?']*len(files), [files.picture(i) for i in range(len(files))])['pixel_values']
    assert {files.picture(i).size[0] == files.picture(i).size[1] for i in range(len(files))} == {False}
    torch.testing.assert_close(e.prepare(files.batch(range(len(files)), e.size)), want, atol=1e-6, rtol=0)
    assert len({LlavaJson(path, folder, mean=m).pictures.fingerprint for m in (mean, (.5, .5, .5))}) == 2

@pytest.mark.parametrize('begin, date', DATES.values(), ids=DATES)
def test_the_date_is_the_same_in_training_and_after(tmp_path, begin, date):
    "In what is saved, opened by transformers"
    tokenizer = open_llm('world', 'smoke')[1]
    tokenizer.chat_template = begin + TEMPLATES['vicuna']
    make_processor(smoke('x'), load_encoder(TINY), tokenizer).save_pretrained(tmp_path)
    (want,), _ = Form(tokenizer).write([([('What?', None)], True)])
    content = [dict(type='image'), dict(type='text', text='What?')]
    assert AutoProcessor.from_pretrained(tmp_path).apply_chat_template([dict(role='user', content=content)],
                                                                       add_generation_prompt=True) == want
    assert want.startswith(date)

# ---- what is refused

@pytest.mark.parametrize('given, message', [
    (dict(encoder='nowhere'), "'nowhere' names no encoder; what does:"), (dict(llm='/nowhere/lm'), '/nowhere/lm can not be read: '),
    (dict(connector='pool', image_tokens=5), 'image_tokens=5 must be a square number'),
    (dict(image_tokens=4), 'image_tokens is for the connectors pool and resampler; mlp makes one token of each patch'),
    (dict(connector='pool', image_tokens=64), 'image_tokens=64 must be at most the 16 patches of'),
    (dict(beta2=1.), 'beta2=1.0 must be at least 0 and below 1'),
    (dict(layer=0), 'layer=0 is none: blocks count from 1, or from -1 backwards'),
    (dict(layer=3), 'layer=3 is not there: random:clipdino_vit_smoke has layers 1 to 2'),
    (dict(preset='paper'), "stage1_data is empty: give data in LLaVA's format as JSON:FOLDER"), (dict(llm=''), 'llm is empty: give world'),
    (dict(stage2_data='somewhere'), "stage2_data='somewhere' is neither world nor JSON:FOLDER"),
    (dict(stage2_data='a.json:b'), 'a.json is not there, or empty'),
    (dict(stage1_samples=3), 'stage1_samples=3 must be at least one batch, 16, or 0'),
    (dict(stage2_batch=15, processes=2), 'stage2_batch=15 must be a multiple of the 2 processes'),
    (dict(tracker='paper'), "tracker='paper' is not one of"), (dict(template='alpaca'), "template='alpaca' is not one of vicuna, chatml"),
    (dict(connector='qformer'), "connector='qformer' is not one of mlp, linear, pool, resampler"),
    (dict(context=8), 'context=8 has no room for the 16 tokens of a picture'), (dict(lm_lr=-1.), 'lm_lr=-1.0 must be a finite number'),
    (dict(clip_grad=0.), 'clip_grad=0.0 must be above 0'),
    (dict(stage1_batch=65, stage1_samples=65),
     'world captions, web has 64 conversations with targets within context=512, fewer than batch=65')], ids=str)
def test_settings_that_are_refused(given, message):
    with pytest.raises(SettingsError, match=message) as e: trained('refused', **given)
    assert '\n' not in str(e.value) and not Path('runs/refused/settings.json').exists(), 'the corrected command may have the same name'

def test_folders_that_hold_no_vlm(top):
    pretrain(clip_settings('smoke', name='clip', probes=0))
    with pytest.raises(SettingsError, match='vlm=.clip. is no run, folder or hub name of an image-text-to-text model'): load_vlm('clip')

def test_options_give_the_settings(monkeypatch, capsys):
    run, seen = settings('smoke', encoder='e', lora=8, cached=False, lm_lr=.5, name='o'), []
    monkeypatch.setattr('clipdino.vlm.train_vlm', lambda r: seen.append(r) or {})
    main(arguments(run, settings('smoke')))
    assert seen == [run] and json.loads(capsys.readouterr().out) == dict(name=None, stages=None, val=None)

def test_a_language_model_that_a_gpu_cannot_train_is_refused_at_once(monkeypatch):
    p = parts(smoke('large'))
    n = sum(v.numel() for v in p.reader.parameters())
    shared = replace(p.run, shard=True)
    for bytes_each, run, processes in (16, p.run, 1), (16, p.run, 2), (8, shared, 2), (4, shared, 8), (4, replace(p.run, lora=2), 1):
        p.run, p.acc = run, SimpleNamespace(device=p.acc.device, num_processes=processes)
        monkeypatch.setattr('clipdino.vlm.gpu_memory', lambda device: bytes_each*n + 1)
        p.check_memory()
        monkeypatch.setattr('clipdino.vlm.gpu_memory', lambda device: bytes_each*n - 1)
        with pytest.raises(SettingsError, match='give more processes and shard=true, adapters'): p.check_memory()
