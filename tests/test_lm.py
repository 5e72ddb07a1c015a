"The small language model: made once, the same everywhere, whole or not at all, from text that is a function of its index."
import math, os, random
from dataclasses import replace
from glob import glob

import numpy as np
import pytest
import torch
from helpers import context, group, start
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import clipdino.lm as lm
from clipdino.chat import MARK, Form
from clipdino.core import SettingsError
from clipdino.lm import FORMS, NAME, SIZES, Documents, SmallLM, batches, settings, shuffled, small_lm, small_model, train_small, turn
from clipdino.questions import LETTERS, prompt
from clipdino.vlm import check_inputs, open_llm, settings as vlm_settings
from clipdino.world import NAMES, POSITIONS

context.set_forkserver_preload(['clipdino.vlm'])

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Its folder"
    with pytest.MonkeyPatch.context() as m:
        m.setenv('CLIPDINO_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield small_lm('smoke')

@pytest.fixture(scope='module')
def tokenizer(made): return AutoTokenizer.from_pretrained(made)

@pytest.fixture
def rows(): return [row for _, row in Documents(0).questions.made(range(200))]

def test_it_is_made_once(made, monkeypatch):
    before = {f.name: f.stat().st_mtime_ns for f in made.iterdir()}
    monkeypatch.setattr('clipdino.lm.train_small', None)
    assert small_lm('smoke') == made and {f.name: f.stat().st_mtime_ns for f in made.iterdir()} == before
    with pytest.raises(SettingsError, match="preset='huge' is not one of"): small_lm('huge')

def test_one_twice_as_wide(made, monkeypatch):
    monkeypatch.setenv('CLIPDINO_CACHE', str(made.parent))
    llm, plain = open_llm('world:wide', 'smoke')[0], AutoConfig.from_pretrained(made)
    assert (llm.config.hidden_size, llm.config.num_attention_heads, llm.config.num_hidden_layers) == (2*plain.hidden_size, 2*plain.num_attention_heads, plain.num_hidden_layers)
    assert small_lm('smoke') == made
    with pytest.raises(SettingsError, match='world:tall is no language model'): check_inputs(vlm_settings('smoke', llm='world:tall'))

def make_in(cache):
    os.environ |= dict(CLIPDINO_CACHE=str(cache), OMP_NUM_THREADS='1')
    torch.set_num_threads(1)
    torch.rand(3)
    small_lm('smoke')

def test_two_processes_make_the_same(tmp_path):
    "Each for itself, and both in one folder at the same time"
    ps = [start(make_in, tmp_path/d) for d in ('a', 'b', 'c', 'c')]
    for p in ps: p.join()
    assert [p.exitcode for p in ps] == [0]*4
    files = [sorted((tmp_path/d).glob('lm-*/*')) for d in 'abc']
    assert len({tuple(f.name for f in fs) for fs in files}) == 1 and {'model.safetensors', 'tokenizer.json', 'config.json'} <= {f.name for f in files[0]}
    for fs in zip(*files): assert len({f.read_bytes() for f in fs}) == 1, fs[0].name

def make_as_second(cache):
    torch.distributed.init_process_group('gloo')
    if torch.distributed.get_rank(): make_in(cache)
    torch.distributed.barrier()

def test_any_of_several_processes_makes_it_whole(tmp_path, made):
    "transformers saves only on the first of a group"
    group(2, make_as_second, tmp_path)
    assert {f.name for f in (tmp_path/made.name).iterdir()} == {f.name for f in made.iterdir()}

def test_a_gradient_that_is_not_finite_stops_it_before_it_is_saved(tmp_path, monkeypatch, tokenizer):
    run = replace(settings('smoke'), docs=320)
    def broken(*a):
        (model := small_model(*a)).model.norm.weight.data.fill_(math.nan)
        return model
    with monkeypatch.context() as m:
        m.setattr('clipdino.lm.small_model', broken)
        with pytest.raises(SettingsError, match='does not train: its gradient is not finite at step 1'):
            train_small(run, tokenizer, folder=tmp_path, every=1)
    assert not list(tmp_path.iterdir()) and all(v.isfinite().all()
                                                for v in train_small(run, tokenizer, folder=tmp_path, every=7).state_dict().values())

def test_killed_while_it_is_written(tmp_path, made):
    "What was begun is no model, and is cleared away"
    caught = 0
    for k in range(4):
        p = start(make_in, tmp_path)
        while p.is_alive() and not glob(str(tmp_path/('.lm-*/lm/*' if k % 2 else '.lm-*'))): pass
        p.kill()
        p.join()
        done = [d for d in tmp_path.glob('lm-*') if d.is_dir()]
        caught += not done
        assert all({f.name for f in d.iterdir()} == {f.name for f in made.iterdir()} for d in done)
    assert caught
    p = start(make_in, tmp_path)
    p.join()
    assert p.exitcode == 0 and sorted(d.name for d in tmp_path.iterdir() if d.is_dir() and 'lm-' in d.name) == [made.name]
    assert (tmp_path/made.name/'model.safetensors').read_bytes() == (made/'model.safetensors').read_bytes()

@pytest.mark.parametrize('cut', [7, 21, 35])
def test_a_training_that_was_cut_goes_on(tokenizer, tmp_path, monkeypatch, capsys, cut):
    "To the same weights as in one go"
    run, save = SmallLM(**SIZES['smoke'] | dict(docs=640)), lm.save_state
    def last(folder, model, opt, step):
        save(folder, model, opt, step)
        if step == cut: raise InterruptedError
    monkeypatch.setattr(lm, 'save_state', last)
    with pytest.raises(InterruptedError): train_small(run, tokenizer, folder=tmp_path, every=7)
    monkeypatch.undo()
    ends = [train_small(run, tokenizer, folder=f, every=7).state_dict() for f in (tmp_path, None)]
    assert f'continuing the small language model from step {cut} of 40' in capsys.readouterr().out and all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())

def test_documents_are_functions_of_their_index():
    all_, d = Documents(0)(range(40)), Documents(0)
    assert [d([i])[0] for i in (7, 3, 39)] == [all_[i] for i in (7, 3, 39)] and d([3, 7]) == [all_[3], all_[7]]
    assert sum(a == b for a, b in zip(all_, Documents(1)(range(40)))) < 4 and len({str(x) for x in all_}) > 35

def test_a_turn_says_how_it_is_to_be_answered(rows):
    "No two forms have the same prompt, and each answer is what was asked for"
    for row in rows:
        said = {f: turn(row, f, np.random.default_rng(3)) for f in FORMS}
        assert len({user.splitlines()[-1] + user.splitlines()[0] for user, _ in said.values()}) == len(FORMS)
        option = row[row['answer']]
        mixed = shuffled(row, np.random.default_rng(3))
        assert sorted(mixed[l] for l in LETTERS) == sorted(row[l] for l in LETTERS) and mixed[mixed['answer']] == option
        assert said['letter'] == (prompt(mixed), mixed['answer']) and said['text'][1] == option and said['both'][1] == f'{option} {mixed["answer"]}'
        assert said['name'] == (prompt(dict(mixed, question=NAME.format(option))), mixed['answer'])
        assert {l: f'{mixed[l]} {"yes" if mixed[l] == option else "no"}' in said['check'][1] for l in LETTERS} == dict.fromkeys(LETTERS, True)
        assert sorted(said['key'][1].split()) == sorted(' '.join(f'{mixed[l]} {l}' for l in LETTERS).split())
    assert {turn(rows[0], 'letter', np.random.default_rng(k))[1] for k in range(40)} == set(LETTERS)

def text_of(r, n=40):
    "Characters of all planes, with the marks of the template among them"
    pieces = [chr(c) for c in (r.choice((r.randrange(32, 127), r.randrange(160, 0xd800), r.randrange(0xe000, 0x110000), 10, 9, 32))
                               for _ in range(n))]
    return ''.join(r.choice(pieces) if r.random() < .9 else r.choice((MARK, '<|user|>', '\nA.', ' umbrella', '\r\n')) for _ in range(n))

def test_any_text_goes_through_the_tokenizer_and_back(tokenizer):
    r = random.Random(0)
    for k in range(300):
        text = text_of(r)
        ids = tokenizer(text, add_special_tokens=False)['input_ids']
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert ids.count(tokenizer.convert_tokens_to_ids(MARK)) == text.count(MARK)
    assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer.eos_token) == ('left', '<pad>', '<|end|>')

def test_names_of_several_words_are_one_token(tokenizer):
    "And so are the options' marks, so that questions are short"
    names = [n for n in (*NAMES, *POSITIONS) if ' ' in n or '-' in n]
    assert len(names) > 20 and [n for n in names if len(tokenizer.tokenize(f' {n}')) > 1] == []
    assert all(len(tokenizer.tokenize(f'\n{l}.')) == 1 for l in LETTERS[1:])
    form = Form(tokenizer)
    (ask, _), *said = form([([('?', a)], False) for a in (None, *LETTERS)])
    assert len({s[0][len(ask)] for s in said}) == 4

def test_the_model_begins_as_its_seed_says(tokenizer):
    run = SmallLM.make(SIZES, 'smoke')
    a = small_model(run, tokenizer).state_dict()
    torch.rand(7)
    b, c = (small_model(r, tokenizer).state_dict() for r in (run, SmallLM.make(SIZES, 'smoke', seed=1)))
    assert all(torch.equal(v, b[k]) for k, v in a.items()) and not torch.equal(a['model.embed_tokens.weight'], c['model.embed_tokens.weight'])

def test_batches(tokenizer):
    "Every document once; what is answered counts ten times as much as the rest, and padding nothing"
    run, form = SmallLM.make(SIZES, 'smoke'), Form(tokenizer)
    seen = [(tuple(i[w > 0].tolist()), tuple((w[w > 0] == 1).tolist())) for ids, weights in batches(run, form)
            for i, w in zip(ids, weights)]
    assert sorted(seen) == sorted((tuple(ids.tolist()), tuple(loss.tolist()))
                                  for ids, loss in form([(d, False) for d in Documents(0, run.docs//8)(range(run.docs))]))
    assert {float(v) for _, weights in batches(run, form) for v in weights.unique()} == {0., float(np.float32(.1)), 1.}

def test_it_opens_as_any_other(made, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(made)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id) and all(v.isfinite().all() for v in load_file(made/'model.safetensors').values())
