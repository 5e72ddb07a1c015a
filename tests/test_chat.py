"Conversations: what is read from files, which tokens carry loss, and in which batches they come."
import json, random
from collections import Counter
from datetime import datetime

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import clipdino.chat as chat
from clipdino.chat import AnyQuestions, Batches, Chats, LlavaJson, TEMPLATES, WorldCaptions, render
from clipdino.core import SettingsError
from clipdino.data import BadData
from clipdino.questions import Questions, prompt, squares

QWEN2 = ("{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful .<|im_end|>\n' }}{% endif %}"
         "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA2 = "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
DATES = dict(  # what begins chat templates that write a date, and what it is to write
    default=('{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% else %}{% set date_string = "1 Jan 1970" %}{% endif %}{% endif %}{{ "On " + date_string + "; " }}', 'On 26 Jul 2024; '),
    today=('\n\n{% macro head() %}{{ "On " + strftime_now("%A %a, %B %b %d, %y, %Y-%m-%d %H:%M:%S") + "; " }}{% endmacro %}{{ head() }}',
           f'\n\nOn {datetime(2024, 7, 26, 12):%A %a, %B %b %d, %y, %Y-%m-%d %H:%M:%S}; '))
SPECIAL = '<pad>', '<s>', '</s>', '<image>', '<|im_start|>', '<|im_end|>'

@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv('CLIPDINO_CACHE', str(tmp_path/'cache'))

def words(template=None, drop=(), adds_bos=False, **names):
    "A tokenizer of whole words, so that positions can be spelled out"
    t = Tokenizer(models.WordLevel({}, unk_token='?'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    vocabulary = '? user assistant system You are helpful . USER: ASSISTANT: [INST] [/INST] A chat between a curious user and an artificial intelligence assistant. The assistant gives ' \
                 "helpful, detailed, polite answers to the user's questions. What ? Where a cat dog there here"
    t.train_from_iterator([vocabulary], trainers.WordLevelTrainer(special_tokens=[s for s in SPECIAL if s not in drop] + ['?'],
                                                                  show_progress=False))
    if adds_bos: t.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', t.token_to_id('<s>'))])
    return PreTrainedTokenizerFast(tokenizer_object=t, chat_template=template,
                                   **(dict(pad_token='<pad>', bos_token='<s>', eos_token='</s>', unk_token='?') | names))

def pieces(template=None, texts=('the cat sat on the mat', 'what is it, then?')*20):
    "A byte-level BPE, whose tokens begin with spaces and may be parts of characters"
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=list(SPECIAL),
                                                     initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=t, chat_template=template, pad_token='<pad>', bos_token='<s>', eos_token='</s>')

def shown(tokenizer, turns, picture, n, **how):
    "Tokens, those with loss in brackets"
    ids, loss = render(tokenizer, turns, picture, n, **how)
    return ' '.join(f'[{t}]' if hit else t for t, hit in zip(tokenizer.convert_ids_to_tokens(ids), loss))

class Lists(Chats):
    "Conversations from a list of (turns, picture or -1)"
    def __init__(self, rows, name='lists'):
        super().__init__(name, chat.digest(rows), Dots())
        self.all = rows
    def __len__(self): return len(self.all)
    def turns(self, i): return self.all[i][0]
    def picture_id(self, i): return self.all[i][1]

class Dots:
    name = fingerprint = 'dots'
    def __len__(self): return 1000
    def batch(self, ids, size): return np.full((len(ids), size, size, 3), np.asarray(ids)[:, None, None, None], np.uint8)

def lengths_of(n, mean, spread, pictures=.7, most=400):
    "A source whose answers are of long-tailed lengths"
    r = np.random.default_rng(0)
    return Lists([([('What', ' '.join(['cat']*int(min(most, 1 + k))))], i if p else -1) for i, (k, p) in enumerate(zip(r.lognormal(np.log(mean), spread, n), r.random(n) < pictures))], f'{n} {mean} {spread}')

# ---- readers

def said(*texts, roles=('human', 'gpt')): return [{'from': roles[k % 2], 'value': t} for k, t in enumerate(texts)]
def row(image='a/1.jpg', q='<image>\nWhat?', a='A cat.'): return dict(id='7', image=image, conversations=said(q, a))

def written(d, rows, pictures=('a/1.jpg',), **how):
    "A list and its pictures on disk"
    for k, p in enumerate(pictures):
        (d/'pictures'/p).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (24, 40 + k, 3), np.uint8)).save(d/'pictures'/p)
    (d/'pictures').mkdir(exist_ok=True)
    (d/'list.json').write_text(rows if isinstance(rows, str) else json.dumps(rows, **how), 'utf-8')
    return d/'list.json', d/'pictures'

def test_the_layout_of_llava_pretrain(tmp_path):
    c = LlavaJson(*written(tmp_path, [dict(id='004539375', image='00453/004539375.jpg',
                                           conversations=said('Give a brief description.\n<image>', 'a sofa , two chairs')),
                                      dict(id='002239345', image='00223/002239345.jpg', conversations=said('<image>\nWhat is it?', 'a dress'))], ['00453/004539375.jpg', '00223/002239345.jpg']))
    assert [c.turns(i) for i in range(2)] == [[('Give a brief description.', 'a sofa , two chairs')], [('What is it?', 'a dress')]]
    assert [c.picture_id(i) for i in range(2)] == [0, 1] and c.pictures.names == ['00453/004539375.jpg', '00223/002239345.jpg']
    assert (c.pictures.batch([1], 32)[0] == squares([Image.open(tmp_path/'pictures/00223/002239345.jpg')], 32)[0]).all()

def test_the_layout_of_llava_instruct(tmp_path):
    "Several turns, shared pictures, text alone, a human who has the last word, a gpt who has the first, and pictures that are missing"
    rows = [dict(id='1', image='coco/train2017/1.jpg', model='',
                 conversations=said('<image>\nWhat?', 'A cat.', 'Where?', 'There.', 'Why?')),
            dict(id='2', image='gqa/images/2.jpg', conversations=said('<image>\nWhat?\nAnswer the question using a single word or phrase.',
                                                                      'dog')),
            dict(id='3', model='gpt-4', conversations=said('Hello', 'Hi')),
            dict(id='4', image='ocr_vqa/images/4.jpg', conversations=said('<image>\nWho wrote it?', 'Nobody')),
            dict(id='5', image='coco/train2017/1.jpg', conversations=said('Is it grey?\n<image>', 'No')),
            dict(id='6', conversations=[*said('left out', roles=('gpt', 'human')), *said('And?', 'Yes')])]
    c = LlavaJson(*written(tmp_path, rows, ['coco/train2017/1.jpg', 'gqa/images/2.jpg']), max_bad=.2)
    assert [c.turns(i) for i in range(len(c))] == [[('What?', 'A cat.'), ('Where?', 'There.')],
                                                   [('What?\nAnswer the question using a single word or phrase.', 'dog')],
                                                   [('Hello', 'Hi')], [('Is it grey?', 'No')], [('And?', 'Yes')]]
    assert [c.picture_id(i) for i in range(5)] == [0, 1, -1, 0, -1] and len(c.pictures) == 2
    assert c.bad == [('row 3, ocr_vqa/images/4.jpg', 'missing picture')] and c.missing == Counter({'missing picture': 1})

@pytest.mark.parametrize('ascii', [True, False])
def test_any_script_and_any_spacing(tmp_path, ascii):
    "Rows are found again by their bytes, whatever characters they hold"
    texts = ['naïve café', '日本語 \u2028 \x85', '🎉👍🏽 "quoted" \\ [{', 'plain']
    rows = [row(q=f'<image>\n{t}', a=t, image='é/1.jpg') for t in texts]
    path, d = written(tmp_path, rows, ['é/1.jpg'], ensure_ascii=ascii, indent=3)
    path.write_bytes(b'\xef\xbb\xbf \n' + path.read_bytes() + b'\n')
    c = LlavaJson(path, d)
    assert [c.turns(i) for i in range(4)] == [[(t.strip(), t.strip())] for t in texts]

FAULTS = {'no list of conversations': [5, {}, dict(conversations='x'), dict(conversations=[1]), dict(conversations=[{'from': 'human'}])],
          'image is not one path': [row(image=['a/1.jpg', 'b.jpg']), row(image='')],
          'a role that is neither': [dict(conversations=said('a', 'b', roles=('user', 'gpt')))],
          'no question with an answer': [dict(conversations=[]), dict(conversations=said('a')),
                                         dict(conversations=said('a', roles=('gpt', 'human')))],
          'do not take turns': [dict(conversations=said('a', 'b', 'c', 'd', roles=('human', 'human')) + said('a', 'b'))],
          '<image> must stand once': [row(q='What?'), row(q='<image> and <image>'), row(a='<image>'),
                                      dict(row(q='What?'), conversations=said('a', 'b', '<image>', 'c'))],
          '<image> in a row without': [dict(conversations=said('<image>\na', 'b')), dict(conversations=said('a', 'b <image>'))],
          'an empty answer': [row(a=' \n')], 'half a character': [row(a='\ud83d')]}

@pytest.mark.parametrize('reason, rows', FAULTS.items(), ids=str)
def test_rows_that_can_not_be_used_are_counted(tmp_path, reason, rows):
    c = LlavaJson(*written(tmp_path, [row(), *rows, row(a='last')]), max_bad=.9)
    assert [c.turns(i)[0][1] for i in range(len(c))] == ['A cat.', 'last']
    assert list(c.missing.values()) == [len(rows)] and reason in next(iter(c.missing)) and [k.split(',')[0] for k, _ in c.bad] == [f'row {k + 1}' for k in range(len(rows))]

def test_too_many_of_them_are_refused(tmp_path):
    rows = [row()]*90 + [row(image=f'a/{k}.jpg') for k in range(2, 12)]
    with pytest.raises(BadData, match=r'10 of 100 rows of .*list.json can not be used \(max_bad=0.05 allows 5.0%\), mostly: missing picture \(10\), as in row 90, a/2.jpg; row 91, a/3.jpg; row 92, a/4.jpg$'):
        LlavaJson(*written(tmp_path, rows))
    assert len(LlavaJson(*written(tmp_path, rows), max_bad=.1)) == 90
    rows[0], listed = dict(conversations=[]), tmp_path/'bad.jsonl'
    with pytest.raises(BadData, match=r'mostly: missing picture \(10\), no question with an answer \(1\), as in row 90, .*; bad.jsonl lists them$'):
        LlavaJson(*written(tmp_path, rows), listed=listed)
    assert [json.loads(l)['key'] for l in listed.read_text().splitlines()] == ['row 0, id None', *(f'row {k}, a/{k - 88}.jpg' for k in range(90, 100))]
    with pytest.raises(BadData, match='1 of 1 rows'): LlavaJson(*written(tmp_path, [dict(conversations=[])]), max_bad=1.)

@pytest.mark.parametrize('text, what', [('{"a": 1}', r"'{' instead of \[ at byte 0"), ('[{"a": tru}]', 'row 0 can not be read at byte 7'),
                                        ('[{}, {"a": "', 'row 1 can not be read'), ('[{}', 'row 0 is not followed by'),
                                        ('[{} {}]', 'row 0 is not followed by'), ('[] []', 'something after the list'),
                                        ('[' + '[{"a":'*100000, 'row 0 can not be read'), ('[]', 'has no rows'), ('\n', 'instead of')])
def test_files_that_are_no_lists(tmp_path, text, what):
    with pytest.raises(BadData, match=what) as e: LlavaJson(*written(tmp_path, text))
    assert 'list.json' in str(e.value) and '\n' not in str(e.value)

def test_paths_that_are_wrong(tmp_path):
    path, d = written(tmp_path, [row()])
    with pytest.raises(SettingsError, match='nowhere.json is not there, or empty'): LlavaJson(tmp_path/'nowhere.json', d)
    with pytest.raises(SettingsError, match='list.json is no folder'): LlavaJson(path, path)
    with pytest.raises(SettingsError, match="square='oval' is not one of pad, crop"): LlavaJson(path, d, 'oval')

def test_text_that_is_not_utf8(tmp_path):
    path, d = written(tmp_path, [row(), row(a='caf\xe9')], ensure_ascii=False)
    path.write_bytes(path.read_bytes().replace('é'.encode(), b'\xe9'))
    assert LlavaJson(path, d, max_bad=.5).missing == Counter({'not UTF-8': 1})

def test_broken_pictures_are_found_before_training_and_once(tmp_path, monkeypatch):
    path, d = written(tmp_path, [row(), row('a/2.jpg'), row('a/3.jpg'), row('a/4.jpg')], [f'a/{k}.jpg' for k in range(1, 5)])
    data = (d/'a/2.jpg').read_bytes()
    (d/'a/2.jpg').write_bytes(data[:len(data)//2])
    (d/'a/4.jpg').write_bytes(b'')
    c = LlavaJson(path, d, max_bad=.5)
    assert c.bad == [('row 1, a/2.jpg', 'undecodable picture'), ('row 3, a/4.jpg', 'missing picture')] and c.pictures.names == ['a/1.jpg', 'a/3.jpg'] and c.picture_id(1) == 1
    with monkeypatch.context() as m:
        m.setattr(chat.PictureFiles, 'picture', None)  # nothing is decoded again
        assert LlavaJson(path, d, max_bad=.5).fingerprint == c.fingerprint
    third = (d/'a/3.jpg').read_bytes()
    (d/'a/3.jpg').write_bytes(third[:len(third)//2])
    with pytest.raises(BadData, match='a/3.jpg: undecodable picture. It was not when the list was opened'): c.pictures.batch([1], 32)
    (d/'a/3.jpg').write_bytes(third)
    next((tmp_path/'cache/chats').glob('broken-*.json')).write_text('{')
    assert len(LlavaJson(path, d, max_bad=.5)) == 2
    (d/'a/2.jpg').write_bytes(data)
    assert len(mended := LlavaJson(path, d, max_bad=.5)) == 3 and mended.pictures.fingerprint != c.pictures.fingerprint

def test_fingerprints_tell_what_matters(tmp_path):
    "Text changes that of the conversations, not that of the pictures; a list that changes while it is open is noticed"
    path, d = written(tmp_path, [row()])
    a = LlavaJson(path, d)
    written(tmp_path, [row(a='A dog, and more.')], ())
    b = LlavaJson(path, d)
    assert a.fingerprint != b.fingerprint and a.pictures.fingerprint == b.pictures.fingerprint != LlavaJson(path, d, 'crop').pictures.fingerprint
    with pytest.raises(BadData, match='list.json has changed since it was opened'): a.turns(0)
    Image.new('RGB', (9, 9)).save(d/'a/1.jpg')
    assert LlavaJson(path, d).pictures.fingerprint != b.pictures.fingerprint

def test_the_worlds_captions():
    a, b = WorldCaptions(128, 32), WorldCaptions(128, 32, captions='full')
    assert [a.turns(i)[0][1] for i in range(128)] == a.world.captions and len({a.turns(i)[0][0] for i in range(128)}) == len(chat.WORDINGS)
    assert a.fingerprint != b.fingerprint and a.pictures.fingerprint == b.pictures.fingerprint != WorldCaptions(128, 32, 1).pictures.fingerprint
    assert (a.pictures.batch([5, 3], 32) == a.world.images[[5, 3]]).all() and a.pictures.batch([5], 48).shape == (1, 48, 48, 3)

def some_questions(n=40, answer='C'):
    rows = [dict(index=i, question=f'What {i}?', A='cat', B='dog', C='cow', D='hen', answer=answer, category=str(i % 2)) for i in range(n)]
    return Questions('some', f'some {n}', rows)

def test_questions_in_both_of_llavas_forms():
    q = some_questions()
    assert AnyQuestions(q).turns(3) == [(prompt(q.rows[3]), 'C')]
    assert AnyQuestions(q, 'text').turns(3) == [('What 3?\nAnswer the question using a single word or phrase.', 'cow')]
    both = AnyQuestions(q, 'both')
    letters = [both.turns(i)[0][1] == 'C' for i in range(40)]
    assert all(both.turns(i) == AnyQuestions(q, 'letter' if l else 'text').turns(i) for i, l in enumerate(letters))
    assert all(0 < sum(letters[k::2]) < 20 for k in (0, 1)), 'each category has both forms'
    with pytest.raises(SettingsError, match="answers='words' is not one of letter, text, both"): AnyQuestions(q, 'words')
    with pytest.raises(SettingsError, match='the answer of question 0 is none of A, B, C, D'): AnyQuestions(some_questions(answer='E'))

# ---- tokens

TURNS = [('What', 'a cat'), ('Where', 'there')]
SYSTEM = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."

def test_positions_of_the_plain_form():
    assert shown(words(), TURNS[:1], True, 3, plain=True) == '<s> <image> <image> <image> [a] [cat] [</s>]'
    assert shown(words(), TURNS[:1], False, 3, plain=True) == '<s> [a] [cat] [</s>]'
    assert shown(words(bos_token=None), TURNS[:1], True, 1, plain=True) == '<image> [a] [cat] [</s>]'
    assert shown(words(bos_token=None), TURNS[:1], False, 1, plain=True) == 'a [cat] [</s>]', 'nothing predicts the first token'

def test_positions_of_vicunas_form():
    assert shown(words(), TURNS, True, 2, template='vicuna') == f'<s> {SYSTEM} USER: <image> <image> What ASSISTANT: [a] [cat] [</s>] USER: Where ASSISTANT: [there] [</s>]'

def test_positions_of_chatml():
    assert shown(words(), TURNS, True, 2, template='chatml') == '<|im_start|> user <image> <image> What <|im_end|> <|im_start|> assistant [a] [cat] [<|im_end|>] <|im_start|> user Where <|im_end|> <|im_start|> assistant [there] [<|im_end|>]'

def test_positions_of_the_tokenizers_own_template():
    assert shown(words(QWEN2), TURNS[:1], False, 2) == '<|im_start|> system You are helpful . <|im_end|> <|im_start|> user What <|im_end|> <|im_start|> assistant [a] [cat] [<|im_end|>]'
    assert shown(words(LLAMA2), TURNS, False, 2) == '<s> [INST] What [/INST] [a] [cat] [</s>] <s> [INST] Where [/INST] [there] [</s>]'

@pytest.mark.parametrize('adds_bos', [False, True])
def test_bos_comes_once(adds_bos):
    "Whoever writes it: the template, the tokenizer, or both"
    for template, own in ((LLAMA2, True), (QWEN2, False), (TEMPLATES['vicuna'], True)):
        for turns in (TURNS[:1], [('What', None)]):
            got = shown(words(template, adds_bos=adds_bos), turns, True, 2).split()
            assert got.count('<s>') == (own or adds_bos) and (got[0] == '<s>') == (own or adds_bos)
    assert shown(words(adds_bos=adds_bos), TURNS[:1], True, 1, plain=True) == '<s> <image> [a] [cat] [</s>]'

def replies(seed):
    "Turns of words, spaces, signs and characters of several bytes"
    r = random.Random(seed)
    def text():
        return ' '.join(r.choice(['the cat', 'sat', 'on', '日本', '🎉👍🏽', "it's", 'a  b', 'x\n\ny', '.', 'é', '[/INST]', 'USER:', '\u200b'])
                        for _ in range(r.randint(1, 12))).strip()
    return [(text(), text()) for _ in range(r.randint(1, 5))]

@pytest.mark.parametrize('template, end, gap',
                         [('vicuna', '</s>', ' '), ('chatml', '<|im_end|>', ''), (QWEN2, '<|im_end|>', ''), (LLAMA2, ' </s>', ' ')],
                         ids=['vicuna', 'chatml', 'qwen2', 'llama2'])
def test_targets_are_the_answers_and_their_ends(template, end, gap):
    "Against transformers' own path: the whole conversation as text, with as many marks as the picture has tokens"
    t = pieces(TEMPLATES.get(template, template))
    for seed in range(60):
        turns, picture = replies(seed), bool(seed % 3)
        ids, loss = render(t, turns, picture, 5)
        assert t.decode(ids[loss]) == ''.join(gap + a + end for _, a in turns)
        assert (ids[loss] != t.convert_tokens_to_ids('<image>')).all() and (ids == t.convert_tokens_to_ids('<image>')).sum() == 5*picture
        spoken = [dict(role=r, content=('<image>\n' if picture and not k and r == 'user' else '') + c) for k, turn in enumerate(turns)
                  for r, c in zip(('user', 'assistant'), turn)]
        assert ids.tolist() == t(t.apply_chat_template(spoken, tokenize=False).replace('<image>', '<image>'*5),
                                 add_special_tokens=False)['input_ids']
        for k in range(len(turns)):  # what a model is asked is how the conversation began
            ask, none = render(t, [*turns[:k], (turns[k][0], None)], picture, 5)
            assert (ids[:len(ask)] == ask).all() and (none == loss[:len(ask)]).all() and loss[len(ask)]

@pytest.mark.parametrize('begin, date', DATES.values(), ids=DATES)
def test_the_date_is_always_the_same(begin, date):
    "As is what follows it"
    conversation = [([('What?', 'A cat.'), ('Where?', None)], False)]
    (got,), _ = chat.Form(pieces(begin + TEMPLATES['vicuna'])).write(conversation)
    (undated,), _ = chat.Form(pieces(), 'vicuna').write(conversation)
    assert got == date + undated

@pytest.mark.parametrize('legacy', [True, False])
def test_sentencepiece_and_characters_in_bytes(legacy):
    "As Llama's tokenizers put spaces: before a text and after each special token, or before a text alone"
    t = Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True))
    if legacy:
        t.normalizer, t.pre_tokenizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]), pre_tokenizers.Split('▁', 'merged_with_next')
    else: t.pre_tokenizer = pre_tokenizers.Metaspace('▁', prepend_scheme='first')
    t.train_from_iterator(['USER: what is it ASSISTANT: a cat. it is there']*30,
                          trainers.BpeTrainer(vocab_size=400, special_tokens=['<unk>', *SPECIAL, *(f'<0x{i:02X}>' for i in range(256))],
                                              show_progress=False))
    t.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', t.token_to_id('<s>'))])
    t = PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<s>', eos_token='</s>', unk_token='<unk>')
    turns = [('what is it', 'a cat. 日'), ('is it', 'it is there')]
    got = shown(t, turns, True, 2, template='vicuna')
    user = '▁USER:' if legacy else 'USER :'
    assert got.startswith('<s> ') and got.count('<s>') == 1
    assert got.endswith(f'▁ASSISTANT: [▁a] [▁cat.] [▁] [<0xE6>] [<0x97>] [<0xA5>] [</s>] {user} ▁is ▁it ▁ASSISTANT: [▁it] [▁is] [▁there] [</s>]')
    assert shown(t, turns[:1], True, 2, plain=True) == '<s> <image> <image> ' + ('[▁a]' if legacy else '[a]') + ' [▁cat.] [▁] [<0xE6>] [<0x97>] [<0xA5>] [</s>]'

def test_one_by_one_or_many_at_once():
    form = chat.Form(pieces(QWEN2))
    many = [(replies(s), bool(s % 2)) for s in range(20)]
    for one, (ids, loss) in zip(many, form(many)):
        (i, l), = form([one])
        assert (i == ids).all() and (l == loss).all()

THINKS = "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}{{ '<|im_start|>assistant\n<think></think>' + m.content + '<|im_end|>' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" \
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
ENDLESS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
MELTS = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
STRICT = "{% for m in messages %}{% if m.role == 'user' %}{{ raise_exception('no users here') }}{% endif %}{% endfor %}"

@pytest.mark.parametrize('tokenizer, how, what', [
    (lambda: pieces(), {}, 'the tokenizer has no chat template: give one of vicuna, chatml as template'),
    (lambda: pieces(), dict(template='alpaca'), "template='alpaca' is not one of vicuna, chatml"),
    (lambda: pieces(THINKS), {}, 'writes the beginning of a conversation differently once it goes on .*give one of vicuna, chatml as template'),
    (lambda: pieces(ENDLESS), {}, "does not end an answer with a token of its own .*could not learn to stop; give one of"),
    (lambda: words(drop=('<|im_end|>',)), dict(template='chatml'), 'does not end an answer with a token of its own'),
    (lambda: pieces(MELTS, [' A cat.']*20), {}, "prompt melts into the answer's first token"),
    (lambda: pieces(STRICT), {}, 'can not write a conversation of user and assistant: no users here; give one of'),
    (lambda: words(eos_token=None), dict(plain=True), 'no eos token to end a caption with'),
    (lambda: words(drop=('<image>',)), dict(plain=True), r"has no <image> token: tokenizer.add_tokens\('<image>', special_tokens=True\)"),
    (lambda: ByT5Tokenizer(), dict(template='vicuna'), 'ByT5Tokenizer is a slow tokenizer'),
])
def test_tokenizers_that_are_refused(tokenizer, how, what):
    with pytest.raises(SettingsError, match=what): render(tokenizer(), TURNS[:1] if 'plain' in how else TURNS, True, 4, **how)

def test_conversations_that_are_refused():
    with pytest.raises(SettingsError, match='this conversation has 2 turns'): render(words(), TURNS, True, 4, plain=True)
    with pytest.raises(SettingsError, match="<image> stands for a picture and may not be in a text, as in 'a <image>"):
        render(words(QWEN2.replace('<|im_start|>system', 'a <image>')), TURNS, False, 4)
    with pytest.raises(SettingsError, match='may not be in a text'): render(words(), [('What', 'a <image>')], True, 4, template='vicuna')

def test_a_tokenizer_without_picture_token_serves_text():
    assert shown(words(drop=('<image>',)), TURNS[:1], False, 4, template='chatml').endswith('[a] [cat] [<|im_end|>]')

# ---- batches

def batches(c, batch=8, tokens=4, **how): return Batches(c, words(), tokens, batch, **(dict(template='chatml') | how))

def test_rows_are_what_render_gives():
    c = lengths_of(40, 6, .8)
    b = batches(c)
    step, ids = b.rows(3), b.plan(3)
    for k, i in enumerate(ids):
        want, loss = render(words(), c.turns(i), c.picture_id(i) >= 0, 4, template='chatml')
        n = len(want)
        assert (step['ids'][k, :n].numpy() == want).all() and (step['targets'][k, :n].numpy() == np.where(loss, want, -100)).all()
        assert step['mask'][k].tolist() == [1]*n + [0]*(len(step['mask'][k]) - n) and (step['targets'][k, n:] == -100).all() and (step['ids'][k, n:] == words().pad_token_id).all()
        assert step['image'][k].sum() == 4*(c.picture_id(i) >= 0) and step['pictures'][k] == c.picture_id(i)
    assert step['ids'].shape[1] - max(b.lengths[ids]) in range(8) and step['n_targets'] == (step['targets'] != -100).sum()

@pytest.mark.parametrize('n, batch, mega', [(100, 8, 3), (64, 8, 64), (8, 8, 1), (37, 5, 2)])
def test_an_epoch_has_everything_once(n, batch, mega):
    b = batches(lengths_of(n, 6, .8), batch, mega=mega)
    def epoch(e): return [i for s in range(e*len(b), (e + 1)*len(b)) for i in b.plan(s)]
    first, second = epoch(0), epoch(1)
    assert len(b) == n//batch and len(set(first)) == len(first) == len(b)*batch
    if n > batch: assert first != second
    if n % batch: assert len({*first, *second}) > len(first), 'others are left out'
    if len(b) > mega > 1: assert sorted(first[:mega*batch]) != sorted(second[:mega*batch])

def test_lengths_do_not_come_in_order():
    b = batches(lengths_of(512, 20, .8))
    longest = [b.lengths[b.plan(s)].max() for s in range(len(b))]
    assert longest != sorted(longest) and abs(np.corrcoef(longest, range(len(b)))[0, 1]) < .4

def test_order_is_a_function_of_seed_and_step():
    "A start at any step gives the same; another seed another order"
    c = lengths_of(100, 6, .8)
    straight = [batches(c).rows(s) for s in range(30)]
    again = batches(c)
    for s in (29, 3, 14): assert all((straight[s][k] == again.rows(s)[k]).all() for k in ('ids', 'mask', 'targets', 'image', 'pictures'))
    assert any((batches(c, seed=1).plan(s) != again.plan(s)).any() for s in range(12))
    assert len({batches(c).fingerprint, batches(c, seed=1).fingerprint, batches(c, tokens=5).fingerprint,
                batches(c, context=64).fingerprint, batches(c, template='vicuna').fingerprint}) == 5
    assert again.fingerprint == batches(c).fingerprint != batches(lengths_of(101, 6, .8)).fingerprint

@pytest.mark.parametrize('ranks', [2, 4])
def test_processes_share_a_step(ranks):
    "Together they have its conversations, in equal numbers and with nearly equal tokens"
    b = batches(lengths_of(640, 30, .8), 32)
    for s in range(len(b)):
        shares = [b.share(s, r, ranks) for r in range(ranks)]
        assert sorted(np.concatenate(shares)) == sorted(b.plan(s)) and {len(x) for x in shares} == {32//ranks}
        tokens = [b.lengths[x].sum() for x in shares]
        assert max(tokens) - min(tokens) <= b.lengths[b.plan(s)].max() - b.lengths[b.plan(s)].min()
    assert {b.rows(0, r, ranks)['n_targets'] for r in range(ranks)} == {b.rows(0)['n_targets']}
    with pytest.raises(SettingsError, match='batch=32 can not be split evenly over 5 processes'): b.rows(0, 0, 5)

@pytest.mark.parametrize('size', [1, 3, 8, 100])
def test_micro_batches_add_up(size):
    b = batches(lengths_of(64, 30, .8), 16)
    parts = [m for r in (0, 1) for m in b.micro(2, size, r, 2)]
    assert all(len(m['ids']) <= size for m in parts) and sum(len(m['ids']) for m in parts) == 16
    assert sum(int((m['targets'] != -100).sum()) for m in parts) == b.rows(2)['n_targets'] == parts[0]['n_targets']
    assert sorted(p for m in parts for p in m['pictures'].tolist()) == sorted(b.rows(2)['pictures'].tolist())
    assert len(list(b.micro(2, size, 0, 2))) == len(list(b.micro(2, size, 1, 2)))

def test_what_is_too_long_is_cut_or_left_out():
    "32 tokens hold: 2 of the user's header, 4 of the picture, the question, 3 up to the answer, the answer and its end"
    rows = [([('What '*q, 'cat '*a)], p) for q, a, p in [(1, 5, 0), (1, 40, 1), (20, 40, -1), (22, 5, 2), (27, 1, -1), (23, 5, 3),
                                                         (28, 1, -1)]]
    b = batches(Lists(rows), 1, context=32)
    assert b.lengths.tolist() == [2 + 4 + 1 + 3 + 6, 32, 32, 32, 32, 32, 32]
    assert b.targets.tolist() == [6, 22, 7, 1, 0, 0, 0] and b.use.tolist() == [0, 1, 2, 3] and b.counts() == dict(conversations=7, cut=6, without_targets=3)
    step = b.collate(np.arange(7), 0)
    assert step['ids'].shape == (7, 32) and (step['targets'] != -100).sum(1).tolist() == b.targets.tolist() and step['image'].sum(1).tolist() == [4, 4, 0, 4, 0, 4, 0]

def test_padding_never_exceeds_the_context(): assert batches(lengths_of(16, 100, .1), context=61).rows(0)['ids'].shape == (8, 61)

@pytest.mark.parametrize('how, what', [(dict(context=5), 'context=5 has no room for the 4 tokens of a picture, which end at token 6'),
                                       (dict(batch=64), 'has 40 conversations with targets within context=2048, fewer than batch=64'),
                                       (dict(tokens=0), 'image_tokens=0 must be above 0'), (dict(mega=0), 'mega=0 must be above 0')])
def test_settings_that_are_refused(how, what):
    with pytest.raises(SettingsError, match=what): batches(lengths_of(40, 6, .8), **how)

def test_the_room_for_pictures_is_asked_where_there_are_any():
    assert len(batches(lengths_of(40, 1, .1, pictures=0), tokens=40, context=7)) == 5

@pytest.mark.parametrize('how', [dict(plain=True), dict(template='vicuna'), dict(template='chatml')], ids=str)
def test_waste_on_the_world(how):
    c = WorldCaptions(2048, 32)
    t = pieces(texts=[t for i in range(512) for t in c.turns(i)[0]])
    b, unsorted = Batches(c, t, 36, 16, **how), Batches(c, t, 36, 16, mega=1, **how)
    assert b.waste() < .1 and b.waste(ranks=4) < .1 and b.waste() < .6*unsorted.waste()

def test_waste_on_a_long_tail():
    "Against a count of the batches that are made, and against batches as they come"
    c = lengths_of(4096, 60, 1., most=2000)
    b = batches(c, 32, tokens=196)
    made = [m for s in range(len(b)) for m in b.micro(s, 8)]
    assert b.waste(size=8) == pytest.approx(1 - sum(int(m['mask'].sum()) for m in made)/sum(m['mask'].numel() for m in made))
    assert b.waste() < .1 and b.waste(size=8) < .1 and b.waste(epoch=1) < .1 and b.waste() < .25*batches(c, 32, tokens=196, mega=1).waste()

@pytest.mark.parametrize('damage', [lambda d: d[:-4], lambda d: d[:len(d)//2], lambda d: b'',
                                    lambda d: d[:40] + bytes([d[40] ^ 1]) + d[41:], lambda d: d + b'\0\0\0\0', lambda d: b'no tokens',
                                    lambda d: d[:-1]])
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    c = lengths_of(40, 6, .8)
    want = batches(c).rows(0)
    path, = (tmp_path/'cache/chats').glob('*.tokens')
    data = path.read_bytes()
    path.write_bytes(damage(data))
    (path.parent/f'.{path.name}.123.tmp').write_bytes(b'of a process that was killed')
    assert all((batches(c).rows(0)[k] == want[k]).all() for k in ('ids', 'mask', 'targets', 'pictures'))
    assert path.read_bytes() == data and not list(path.parent.glob('.*.tmp'))

def test_the_cache_is_used_and_keyed_by_all_that_decides_it(tmp_path, monkeypatch):
    c, calls = lengths_of(40, 6, .8), []
    monkeypatch.setattr(chat, 'fill', lambda *a, f=chat.fill: (calls.append(a), f(*a)))
    batches(c), batches(c, tokens=9), batches(c, context=64, batch=4, seed=3)
    words_ = words()
    words_(['What', 'a cat'], padding=True, truncation=True, max_length=4)  # leaves its traces in the tokenizer
    Batches(c, words_, 4, 8, template='chatml')
    assert len(calls) == 1
    batches(c, template='vicuna'), batches(c, plain=True), batches(lengths_of(41, 6, .8)), Batches(c, pieces(), 4, 8, template='chatml')
    assert len(calls) == 5

def test_tokens_do_not_depend_on_how_many_are_made_at_once(tmp_path):
    c, form = lengths_of(50, 6, .8), chat.Form(words(), 'chatml')
    for k, n in enumerate((1, 7, 512)): chat.fill(tmp_path/f'{k}', c, form, n)
    assert (tmp_path/'0').read_bytes() == (tmp_path/'1').read_bytes() == (tmp_path/'2').read_bytes()
