"Questions from files, the official prompt, parser and averages, and scoring runs of a tiny model: batches, resuming, comparing, and what is refused."
import base64, io, json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import binom

import clipdino.vmcbench as vmc
from clipdino.core import SettingsError, read_json
from clipdino.questions import CATEGORIES, GROUPS, LETTERS, open_questions, prompt
from clipdino.vmcbench import Squares, aggregate, answers, batched, calibrate, compare, evaluate, judge, load_vlm, parse, predictions, saved, score, settings, untrained_vlm

@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    "Runs in a folder of the test's own"
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setenv('CLIPDINO_CACHE', str(tmp_path))

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return untrained_vlm(tmp_path_factory.mktemp('vlm'), Squares())

@pytest.fixture(scope='module')
def vlm(folder): return load_vlm(folder)

def png(colour=(200, 30, 30), size=(40, 30))->bytes:
    Image.new('RGB', size, colour).save(b := io.BytesIO(), 'PNG')
    return b.getvalue()

def published(n=6, **changes)->list:
    "Rows with the columns of the published parquet files"
    rows = [dict(index=7*n - 7*i, question=f'What is in picture {i}?', A='a cat', B='a "dog"', C='tab and\nline', D=f'{i}',
                 answer=LETTERS[i % 4], category=CATEGORIES[i % 20], image=dict(bytes=png((40*i, 0, 0)), path=f'{i}.png'))
                 for i in range(n)]
    for i, change in changes.items(): rows[int(i[1:])].update(change)
    return rows

def parquet(path, rows, group=4):
    "In the layout of the hub's files"
    schema = pa.schema([('index', pa.int64()), *((c, pa.string()) for c in ('question', 'A', 'B', 'C', 'D', 'answer', 'category')),
                        ('image', pa.struct([('bytes', pa.binary()), ('path', pa.string())]))])
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=group)
    return str(path)

def tsv(path, rows): # VLMEvalKit's: written by pandas, pictures in base64
    pd.DataFrame([dict(r, image=base64.b64encode(r['image']['bytes']).decode()) for r in rows]).to_csv(path, sep='\t', index=False)
    return str(path)

def jsonl(path, rows):
    for r in rows: (path.parent/f'{r["index"]}.png').write_bytes(r['image']['bytes'])
    path.write_text(''.join(json.dumps(dict(id=f'q{r["index"]}', index=r['index'], image=f'{r["index"]}.png', question=r['question'], options=[r[l] for l in LETTERS], answer=r[r['answer']], answer_letter=r['answer'], category=r['category'])) + '\n' for r in rows))
    return str(path)

WRITERS = dict(parquet=parquet, tsv=tsv, jsonl=jsonl)

def test_names_that_are_cut():
    assert [vmc.short(n) for n in ('Doc', 'VQAv2', 'as long as this name, or longer')] == ['Doc & Chart', 'VQAv2', 'as long as this name,…']
    assert vmc.short('a/word/that/has/no/space/in/it') == 'a/word/that/has/no/space…'[:23] + '…' and len(vmc.short('x'*99, 8)) == 8

# questions from files

@pytest.mark.parametrize('form', WRITERS)
def test_every_form_reads_back_in_the_order_of_index(form, tmp_path):
    rows = published()
    q = open_questions(WRITERS[form](tmp_path/f'q.{form}', rows))
    expected = sorted(rows, key=lambda r: r['index'])
    assert q.rows == [{k: v for k, v in r.items() if k != 'image'} for r in expected]
    for i in (5, 0, 3): assert (np.asarray(q.picture(i)) == np.asarray(Image.open(io.BytesIO(expected[i]['image']['bytes'])))).all()
    assert len(open_questions(str(tmp_path/f'q.{form}'), limit=2)) == 2

def test_forms_share_a_fingerprint_that_knows_texts_and_pictures(tmp_path):
    a, b, c = (open_questions(w(tmp_path/f'q.{f}', published())).fingerprint for f, w in WRITERS.items())
    other = [open_questions(parquet(tmp_path/'o.parquet', published(**{'_2': change}))).fingerprint
             for change in (dict(question='?'), dict(answer='D'), dict(image=dict(bytes=png((1, 2, 3)), path=None)))]
    assert a == b == c and len({a, *other}) == 4

def test_vmcbench_from_a_local_copy(tmp_path):
    (tmp_path/'data').mkdir()
    rows = published(9)
    for k, part in enumerate((rows[:5], rows[5:])): parquet(tmp_path/f'data/test-{k:05}-of-00002.parquet', part)
    for where in (tmp_path, tmp_path/'data'):
        assert [r['index'] for r in open_questions(f'vmcbench:test:{where}').rows] == sorted(r['index'] for r in rows)
    assert open_questions(str(tmp_path/'data')).fingerprint == open_questions(f'vmcbench:test:{tmp_path}').fingerprint
    with pytest.raises(SettingsError, match='has no dev-00000-of-00001.parquet'): open_questions(f'vmcbench:dev:{tmp_path}')

def test_questions_without_four_options_are_left_out_and_counted(tmp_path):
    lines = [dict(image='1.png', question='?', options=list('wxyz')[:k] + ['v']*(k > 4), answer_letter='A') for k in (2, 3, 4, 5)] + [dict(image='1.png', question='?', options=['x', 'x', 'y', 'z'], answer='B')]
    (tmp_path/'1.png').write_bytes(png())
    (tmp_path/'q.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    q = open_questions(str(tmp_path/'q.jsonl'))
    assert (len(q), q.skipped['not four options'], q.doubled, [r['index'] for r in q.rows], q.rows[0]['category']) == (2, 3, 1, [2, 4], 'q')
    p = open_questions(parquet(tmp_path/'q.parquet', published(**{'_1': dict(D=None), '_2': dict(C=' ')})))
    assert len(p) == 4 and p.skipped['not four options'] == 2
    (tmp_path/'gap.jsonl').write_text('\n'.join(json.dumps(dict(image='1.png', question='?', options=o, answer='C'))
                                                for o in (['', *'wxyz'], [*'wxyz', ''])))
    gap = open_questions(str(tmp_path/'gap.jsonl'))
    assert [(r['index'], r['C']) for r in gap.rows] == [(1, 'y')], 'where A is empty, C is not the third of those that are left'

def test_a_table_may_name_the_row_with_the_same_picture(tmp_path):
    rows = published()
    table = pd.DataFrame([dict(r, image=base64.b64encode(r['image']['bytes']).decode()) for r in rows])
    table.loc[3, 'image'] = str(rows[1]['index'])
    table.to_csv(tmp_path/'q.tsv', sep='\t', index=False)
    q = open_questions(str(tmp_path/'q.tsv'))
    where = {r['index']: i for i, r in enumerate(q.rows)}
    assert (np.asarray(q.picture(where[rows[3]['index']])) == np.asarray(q.picture(where[rows[1]['index']]))).all()

def test_pictures_of_parquet_stay_on_disk(tmp_path, monkeypatch):
    import clipdino.questions as questions
    monkeypatch.setattr(questions, 'KEPT', 1)
    q = open_questions(parquet(tmp_path/'q.parquet', published(12), group=3))
    for i in range(12): q.picture(i)
    assert len(q.reader.kept) == 1

def test_few_broken_pictures_cost_their_question_and_many_the_run(tmp_path):
    def some(k):
        return parquet(tmp_path/f'{k}.parquet',
                       published(40, **{f'_{i}': dict(image=dict(bytes=(None, png()[:60], b'none')[i % 3], path=None)) for i in range(k)}))
    q = open_questions(some(2))
    assert len(q) == 38 and q.skipped['no picture'] == 2
    with pytest.raises(SettingsError,
                       match=r'3 of 40 questions of 3 lack a picture, more than 5%; the first, 3.parquet, row 2, has a picture that does not decode'):
        open_questions(some(3))
    path = jsonl(tmp_path/'q.jsonl', published())
    (tmp_path/'7.png').unlink()
    with pytest.raises(SettingsError, match='q.jsonl, row 5, has no picture'): open_questions(path)

def test_what_other_programs_write_into_lines(tmp_path):
    "A byte-order mark, blank lines, no picture, a mark where the picture stands; pictures of 16 bits keep their greys"
    rows = published(40)
    lines = Path(jsonl(tmp_path/'a.jsonl', rows)).read_text().splitlines()
    lines[0], lines[1] = lines[0].replace('What is', '<image>\\nWhat is'), json.dumps(dict(json.loads(lines[1]), image=None))
    Image.fromarray(np.full((4, 4), 100 << 8, np.uint16)).save(tmp_path/f'{rows[0]["index"]}.png')
    (tmp_path/'b.jsonl').write_text('\n\n'.join(lines) + '\n \n', encoding='utf-8-sig')
    q = open_questions(str(tmp_path/'b.jsonl'))
    assert len(q) == 39 and q.skipped['no picture'] == 1
    at = [r['index'] for r in q.rows].index(rows[0]['index'])
    assert q.rows[at]['question'] == rows[0]['question'] and q.picture(at).getpixel((0, 0)) == (100, 100, 100)
    Path(jsonl(tmp_path/'d.jsonl', published(_2=dict(A='<image>'), _3=dict(question='<image>')))).read_text()
    with pytest.raises(SettingsError, match='d.jsonl, row 3 has no question'): open_questions(str(tmp_path/'d.jsonl'))
    assert open_questions(jsonl(tmp_path/'e.jsonl', published(_2=dict(A='<image>')))).skipped['not four options'] == 1
    (tmp_path/'c.jsonl').write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(SettingsError, match='c.jsonl is not UTF-8 .invalid start byte at byte 14'): open_questions(str(tmp_path/'c.jsonl'))

@pytest.mark.parametrize('change, sentence', [(dict(answer='E'), r"q.parquet, row 4: the answer is 'E' and must be one of A, B, C, D"),
                                              (dict(answer=''), "the answer is ''"), (dict(answer='AB'), "the answer is 'AB'"),
                                              (dict(question=None), 'q.parquet, row 4 has no question')])
def test_a_row_that_means_nothing_is_named(tmp_path, change, sentence):
    with pytest.raises(SettingsError, match=sentence): open_questions(parquet(tmp_path/'q.parquet', published(_4=change)))

def test_damaged_files_get_a_sentence(tmp_path):
    whole = Path(parquet(tmp_path/'q.parquet', published())).read_bytes()
    (tmp_path/'cut.parquet').write_bytes(whole[:-300])
    (tmp_path/'empty.parquet').touch()
    pq.write_table(pa.table(dict(index=[1], question=['?'])), tmp_path/'few.parquet')
    table = Path(tsv(tmp_path/'q.tsv', published())).read_text()
    (tmp_path/'cut.tsv').write_text(table[:table.rindex('\t')])
    (tmp_path/'few.tsv').write_text('index\tquestion\n1\t?\n')
    (tmp_path/'bad.jsonl').write_text('{"question": 1\n')
    (tmp_path/'few.jsonl').write_text('{"question": "?"}\n')
    (tmp_path/'none.jsonl').write_text('')
    (tmp_path/'latin.tsv').write_bytes(table.replace('a cat', 'un château').encode('latin-1'))
    (tmp_path/'return.tsv').write_text(table.replace('a cat', 'a\rcat'), newline='')
    for name, change in dict(object=dict(options=dict(A='x', B='y', C='z', D='w')), text=dict(options='abcd'), part=dict(index=1.2)).items():
        (tmp_path/f'{name}.jsonl').write_text(json.dumps(dict(question='?', image='1.png', options=list('wxyz'), answer='A') | change) + '\n')
    for name, sentence in {'cut.parquet': 'is no whole parquet file', 'empty.parquet': 'is no whole parquet file',
                           'few.parquet': 'has no column A, B, C, D, answer, category, image',
                           'cut.tsv': 'row 5 has 8 of 9 fields: the file seems cut off',
                           'few.tsv': 'has no column A, B', 'bad.jsonl': 'bad.jsonl, row 0 is no JSON',
                           'few.jsonl': 'few.jsonl, row 0 has no column image', 'none.jsonl': 'none has no question with four options',
                           'gone.tsv': 'is nothing to read', 'latin.tsv': '^latin.tsv is not UTF-8 .invalid continuation byte at byte [0-9]+.$',
                           'return.tsv': '^return.tsv is no table with tabs, after byte [0-9]+ .new-line character',
                           'object.jsonl': 'object.jsonl, row 0: options must be a list, and are {"A": "x"',
                           'text.jsonl': 'text.jsonl, row 0: options must be a list, and are "abcd"$',
                           'part.jsonl': 'part.jsonl, row 0: index=1.2 is no whole number',
                           'vmcbench:val': "split of vmcbench='val'"}.items():
        with pytest.raises(SettingsError, match=sentence): open_questions(name)

def test_without_network_the_hub_gets_a_sentence(monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('clipdino.questions.HUB', 'nobody/nothing')
    with pytest.raises(SettingsError, match='nobody/nothing can not be fetched .* give vmcbench:dev:FOLDER'): open_questions('vmcbench:dev')
    with pytest.raises(SettingsError, match="vlm='nobody/nothing' is no run, folder or hub name"): load_vlm('nobody/nothing')

# the official protocol

def test_prompt_is_the_published_one():
    row = dict(question='What is it?', A='a', B='b', C='c', D='d')
    assert prompt(row) == "Question: What is it?\nOptions:\nA. a\nB. b\nC. c\nD. d\nAnswer with the option's letter from the given choices directly.\n"

OPTIONS = ['a red kite', 'two dogs', 'the sea', 'dogs']
CASES = [  # answer, letter (None: drawn), because
    ('A', 'A', 'a letter between the added spaces'), ('B.', 'B', 'the stop is taken off'), ('(C)', 'C', 'in brackets'),
    ('(C).', 'C', 'the stop goes, the brackets stay'), ('D,', 'D', 'the comma is taken off'),
    ("'B'", 'B', 'quotes are taken off'), ('"B"', None, 'double quotes are not'), ('B)', None, 'half a bracket'),
    ('A:', 'A', 'the colon goes'), ('B. two dogs', 'B', 'letter, stop, space'), ('B.two dogs', None, 'no space after the stop'),
    ('b', None, 'letters are capital'), ('(b)', None, 'in brackets too'), ('', None, 'nothing'), ('   ', None, 'nothing but space'),
    ('...', None, 'nothing but stops'), ('The answer is C', 'C', 'a letter between spaces'),
    ('The answer is C.', 'C', 'the last stop is taken off'), ('The answer is (D).', 'D', 'in brackets'),
    ('The answer is C. It is wet', 'C', 'letter, stop, space'), ('A or B', 'B', 'of two letters the last'),
    ('B or A', 'A', 'by place, not by alphabet'),
    ('A B A', 'A', 'by the last place of each'), ('(A) or (D)', 'D', 'of two in brackets the last'), ('(D) or (A)', 'A', 'by place'),
    ('not A but (C)', 'C', 'brackets come before bare letters'), ('(C), not A', 'C', 'even when earlier'),
    ('B. no, A. yes', 'A', 'several with stops have no place: the first letter'),
    ('(B) and not D. at all', 'B', 'only brackets have a place'), ('A kite is red', 'A', 'the article counts as a letter'),
    ('two dogs', None, 'texts count from six words on'),
    ('I think it is two dogs', 'D', 'both texts occur; that of D begins later'),
    ('It shows THE SEA at night, maybe', 'C', 'texts in any case'), ('I do not know this at all', None, 'no option in it'),
    ('DNA', None, 'a letter within a word'), ('PhD. is it', 'D', 'a word that ends as letter, stop, space'),
    ('Answer:\nB', None, 'a line break is no space'), (' B\n', 'B', 'space around is taken off first'),
    ('B:;', 'B', 'one sign after another, in the order , . ! ? ; : \''), ('B;:', None, 'so of these only the colon goes'),
    ("B,.", None, 'and of these only the stop'), ('AB', None, 'two letters in one')]

@pytest.mark.parametrize('raw, letter, why', CASES, ids=[c[2] for c in CASES])
def test_parser(raw, letter, why): assert parse(raw, OPTIONS) == letter

def test_an_index_that_comes_twice(tmp_path):
    "Two questions would have one and the same draw"
    rows = published()
    rows[3]['index'] = rows[1]['index']
    path = parquet(tmp_path/'q.parquet', rows)
    with pytest.raises(SettingsError, match=f'q has two questions with the index {rows[1]["index"]}; each must have its own'):
        open_questions(str(path))

def test_what_cannot_be_parsed_is_drawn_from_seed_and_index():
    rows = [dict(row=i, index=i, category='GQA', options=OPTIONS, answer='A', raw='?', tokens=1) for i in range(4000)]
    a, again, other = judge(rows), judge(rows[::-1])[::-1], judge(rows, 1)
    assert [r['letter'] for r in a] == [r['letter'] for r in again] != [r['letter'] for r in other]
    count = np.bincount([LETTERS.index(r['letter']) for r in a], minlength=4)
    assert (binom.cdf(count, 4000, .25) > .001).all() and (binom.cdf(count, 4000, .25) < .999).all()
    s = score(a)
    assert s['unparsed'] == 4000 and s['protocols']['strict']['questions']['overall']['value'] == 0 and abs(s['protocols']['generate']['questions']['overall']['value'] - .25) < .03

# averages

def test_averages_where_the_three_ways_differ():
    "By hand: TextVQA 8 of 10, OCRVQA 15 of 30, GQA 6 of 60, an unknown set 0 of 4"
    categories = ['TextVQA']*10 + ['OCRVQA']*30 + ['GQA']*60 + ['mine']*4
    values = [1]*8 + [0]*2 + [1]*15 + [0]*15 + [1]*6 + [0]*54 + [0]*4
    order = np.random.default_rng(0).permutation(104)
    t = aggregate(np.array(values)[order], np.array(categories)[order].tolist())
    got = {a: {l: c['value'] for l, c in t[a].items()} for a in vmc.AGGREGATIONS}
    for a, ocr, overall in ('questions', 23/40, 29/104), ('sets', .65, 29/104), ('twenty', .65, (.8 + .5 + .1 + 0)/4):
        assert got[a] == pytest.approx(dict(overall=overall, Reasoning=.1, OCR=ocr))
    assert {c: (v['value'], v['n']) for c, v in t['data_sets'].items()} == dict(GQA=(.1, 60), TextVQA=(.8, 10), OCRVQA=(.5, 30), mine=(0, 4))

def test_intervals_are_those_of_the_stratified_bootstrap():
    "Analytic spread: each set's mean has variance p(1 - p)/n, weighted"
    categories, p, n = ['TextVQA']*200 + ['OCRVQA']*600, (.8, .4), (200, 600)
    t = aggregate([1]*160 + [0]*40 + [1]*240 + [0]*360, categories)
    var = [a*(1 - a)/b for a, b in zip(p, n)]
    for way, w in ('questions', (.25, .75)), ('sets', (.5, .5)):
        c = t[way]['OCR']
        half = 1.96*sum(v*k*k for v, k in zip(var, w))**.5
        assert np.allclose(c['interval'], [c['value'] - half, c['value'] + half], atol=.006)

def test_intervals_cover():
    g, hits = np.random.default_rng(0), 0
    for _ in range(100):
        a, b = g.random(60) < .7, g.random(90) < .3
        low, high = aggregate([*a, *b], ['GQA']*60 + ['MMMU']*90)['twenty']['overall']['interval']
        hits += low <= .5 <= high
    assert 88 <= hits <= 98  # of 100, at 95%

@pytest.mark.parametrize('spread', [0., .1, 1.])
def test_intervals_over_three_seeds_cover(spread):
    "Whether seeds or questions differ more"
    g, hits = np.random.default_rng(0), 0
    for _ in range(100):
        values = spread*g.normal(size=(3, 1)) + .5*g.normal(size=150) + .5*g.normal(size=(3, 150))
        low, high = aggregate(values, ['GQA']*60 + ['MMMU']*90)['questions']['overall']['interval']
        hits += low <= 0 <= high
    assert hits >= 88  # of 100, at 95%

def test_intervals_over_three_seeds_are_no_wider_than_they_need_be():
    "Where seeds differ by their answers alone: wider than if their spread were known, and narrower than Student's, which is 2.2 times as wide"
    g, widths = np.random.default_rng(0), []
    for _ in range(40):
        widths.append(np.ptp(aggregate(.3*g.normal(size=200) + .55*g.normal(size=(3, 200)), ['GQA']*200, draws=800, between=(-9, 9))['twenty']['overall']['interval'])/2)
    assert 1 < np.mean(widths)/(1.96*(.3**2/200 + .55**2/600)**.5) < 2

def test_a_difference_may_be_negative_where_no_question_was_lost():
    d = np.zeros((3, 40))
    d[0, :4], d[1, :1], d[2, :2] = 1, 1, 1
    assert aggregate(d, ['GQA']*40, between=(-1., 1.))['twenty']['overall']['interval'][0] < 0 == aggregate(d, ['GQA']*40)['twenty']['overall']['interval'][0]

def test_no_mean_is_beyond_its_numbers():
    cells = aggregate([[1.]*99 + [0.], [1.]*100, [.0]*60 + [1.]*40], ['GQA']*100)['twenty']
    assert cells['overall']['interval'][1] == 1 and cells['overall']['interval'][0] >= 0

def test_one_seed_is_no_seeds():
    values, categories = np.arange(8) % 3, ['GQA']*3 + ['OCRVQA']*5
    assert aggregate(values, categories) == aggregate([values], categories)

def made_rows(right, categories, seed=0):
    "Predictions whose likeliest letter is right where `right` says so"
    g, rows = np.random.default_rng(seed), []
    for i, (ok, c) in enumerate(zip(right, categories)):
        s = g.normal(size=4) - 3
        s[i % 4] = s.max() + (1 if ok else -5)
        rows.append(dict(row=i, index=i, category=c, question='?', options=OPTIONS, answer=LETTERS[i % 4], scores=s.tolist()))
    return judge(rows)

def test_differences_of_two_models():
    categories = ['GQA']*30 + ['MMMU']*10
    a, b = made_rows([1]*25 + [0]*5 + [1]*5 + [0]*5, categories), made_rows([1]*15 + [0]*15 + [0]*2 + [1]*8, categories, 1)
    d = compare(a, b)['likelihood']
    assert d['data_sets']['GQA']['value'] == pytest.approx(1/3) and d['data_sets']['MMMU']['value'] == pytest.approx(-.3)
    assert d['twenty']['overall']['value'] == pytest.approx(1/60) and d['questions']['overall']['value'] == pytest.approx(7/40)
    assert d['data_sets']['GQA']['p'] == pytest.approx(2*.5**10)  # ten questions on which only the first is right
    assert d['questions']['overall']['p'] == pytest.approx(2*binom.cdf(5, 17, .5))  # 12 against 5
    assert d['questions']['overall']['interval'][0] < 7/40 < d['questions']['overall']['interval'][1]
    assert 'p' not in d['twenty']['overall']  # where data sets count alike and not questions
    with pytest.raises(SettingsError, match='answered different questions'): compare(a, b[1:])

def test_calibration_takes_a_preference_away():
    g = np.random.default_rng(0)
    y = np.arange(1000) % 4
    s = g.normal(size=(1000, 4)) + 2*np.eye(4)[y]
    liked = s + [0, 3., 0, 0]
    assert (liked.argmax(1) == y).mean() < .6 < .75 < (calibrate(liked).argmax(1) == y).mean()
    p = np.exp(s)/np.exp(s).sum(1, keepdims=True)
    assert np.allclose(calibrate(s), np.log(p) - np.log(p.mean(0))) and np.allclose(calibrate(s - 5), calibrate(s))

# a model

def all_answers(vlm, q, size, **kw):
    return sorted((r for b in answers(vlm, q, batched(vmc.order_of(vlm, q.rows), size), **kw) for r in b), key=lambda r: r['row'])

def test_answers_do_not_depend_on_the_batch(vlm):
    q = Squares(24)
    one, eight = (all_answers(vlm, q, b) for b in (1, 8))
    assert [r['raw'] for r in one] == [r['raw'] for r in eight] and len({r['raw'] for r in one}) > 20
    assert np.allclose([r['scores'] for r in one], [r['scores'] for r in eight], atol=2e-5)
    assert len({len(vmc.token_ids(vlm, vmc.chat(vlm, r))) for r in q.rows}) > 1  # so that there was padding

def test_a_padded_batch_is_written_as_each_alone_with_plain_argmax(vlm):
    "Greedy decoding the slow way: no cache, no padding, a forward pass for each token"
    q = Squares(6, seed=1)  # of seed 0 one is answered with the mark of a picture, which this loop could not read again
    for r in all_answers(vlm, q, 6, max_new_tokens=5):
        x = vlm.processor(text=[vmc.chat(vlm, q.rows[r['row']])], images=[[q.picture(r['row'])]], return_tensors='pt',
                          add_special_tokens=False)
        ids, start = x['input_ids'], x['input_ids'].shape[1]
        for _ in range(5):
            with torch.no_grad(): z = vlm.model(input_ids=ids, pixel_values=x['pixel_values']).logits[0, -1]
            ids = torch.cat([ids, z.argmax()[None, None]], 1)
            if ids[0, -1] == 2: break
        assert vlm.processor.tokenizer.decode(ids[0, start:], skip_special_tokens=True) == r['raw'] and ids.shape[1] - start == r['tokens']

def test_likelihood_is_the_softmax_over_all_tokens(vlm):
    q = Squares(8)
    letters = [vlm.processor.tokenizer.convert_tokens_to_ids(l) for l in LETTERS]
    for r in all_answers(vlm, q, 4, how='likelihood'):
        x = vlm.processor(text=[vmc.chat(vlm, q.rows[r['row']])], images=[[q.picture(r['row'])]], return_tensors='pt',
                          add_special_tokens=False)
        with torch.no_grad(): z = vlm.model(**x).logits[0, -1].double()
        assert np.allclose(r['scores'], (z - z.exp().sum().log())[letters], atol=1e-5) and 'raw' not in r
    both, only = all_answers(vlm, q, 4), all_answers(vlm, q, 4, how='likelihood')
    assert np.allclose([r['scores'] for r in both], [r['scores'] for r in only], atol=1e-5)

def test_text_that_ends_early_ends_there(vlm, monkeypatch):
    q = Squares(8)
    eos = vlm.model.generate(**vmc.inputs(vlm, q, [0]), max_new_tokens=3)[0, -1].item()
    monkeypatch.setattr(vlm.model.generation_config, 'eos_token_id', [eos, 2])
    rows = all_answers(vlm, q, 8)
    assert min(r['tokens'] for r in rows) <= 3 and [r['raw'] for r in rows] == [r['raw'] for r in all_answers(vlm, q, 1)]

def test_pictures_matter_unless_blind(vlm):
    class Black(Squares):
        def picture(self, i): return Image.new('RGB', (40, 30))
    seen, black = ([r['scores'] for r in all_answers(vlm, q, 8, how='likelihood')] for q in (Squares(8), Black(8)))
    assert not np.allclose(seen, black, atol=1e-3)
    blind = [[r['scores'] for r in all_answers(vlm, q, 8, how='likelihood', blind=True)] for q in (Squares(8), Black(8))]
    assert blind[0] == blind[1] and '<image>' not in vmc.chat(vlm, Squares(8).rows[0], blind=True)

def test_letters_as_the_template_puts_them(vlm, monkeypatch):
    "LLaVA's template sets an answer off by a space, which belongs to the letter's token"
    spaced = "{% for m in messages %}{{ m.role }}:{% for c in m.content %}{{ '<image>\n' if c.type == 'image' else ' ' + c.text }}{% endfor %}{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
    monkeypatch.setattr(vlm.processor, 'chat_template', spaced)
    row, tok = Squares(1).rows[0], vlm.processor.tokenizer
    assert vmc.chat(vlm, row).endswith('assistant:') and vmc.chat(vlm, row, answer='B').endswith('assistant: B<|end|>')
    with pytest.raises(SettingsError, match='four different tokens for A, B, C, D; give how=generate'):
        vmc.letter_ids(vlm, row)  # with this tokenizer the space is a token of its own
    parted = spaced.replace("' ' + c.text", 'c.text')
    monkeypatch.setattr(vlm.processor, 'chat_template', parted)
    assert [tok.decode([i]) for i in vmc.letter_ids(vlm, row)] == list(LETTERS)

# runs

def go(folder, name='s', q=None, **given):
    return evaluate(settings('smoke', vlm=str(folder), name=name, **{**dict(batch=8), **given}), q or Squares())

def test_a_run_and_its_numbers_from_predictions_alone(folder):
    r = go(folder)
    rows = [json.loads(l) for l in Path('runs/s/predictions.jsonl').read_text().splitlines()]
    assert score(rows) == r['score'] == read_json('runs/s/result.json')['score']
    assert rows == judge([{k: r[k] for k in ('row', 'index', 'category', 'question', 'options', 'answer', 'raw', 'tokens', 'scores')}
                          for r in rows])
    assert [r['index'] for r in rows] == list(range(40)) and rows[3]['options'] == [Squares().rows[3][l] for l in LETTERS]
    right = {p: np.mean([x[k] == x['answer'] for x in rows])
             for p, k in dict(generate='letter', likelihood='likely', calibrated='calibrated').items()}
    assert {p: r['score']['protocols'][p]['questions']['overall']['value'] for p in right} == pytest.approx(right)
    assert r['score']['missing'] == [] and r['questions']['n'] == 40 and set(r['score']['protocols']) == set(vmc.PROTOCOLS)

def test_only_what_is_asked_for(folder):
    assert list(go(folder, 'g', how='generate')['score']['protocols']) == ['generate', 'strict'] and list(go(folder, 'l', how='likelihood')['score']['protocols']) == ['likelihood', 'calibrated']
    assert 'raw' not in predictions('runs/l')[0] and 'scores' not in predictions('runs/g')[0]

@pytest.mark.parametrize('after', [0, 1, 3])
def test_an_interrupted_run_ends_as_if_it_had_not_been(folder, monkeypatch, after):
    whole = go(folder, 'whole')
    real, calls = vmc.ask, []
    def dies(*a, **k):
        calls.append(1)
        if len(calls) > after: raise KeyboardInterrupt
        return real(*a, **k)
    monkeypatch.setattr(vmc, 'ask', dies)
    with pytest.raises(KeyboardInterrupt): go(folder, 'cut')
    path = Path('runs/cut/predictions.jsonl')
    if after:
        path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[0]*3 + '{"row": 3')  # half a batch, and half a line
    monkeypatch.setattr(vmc, 'ask', lambda *a, **k: calls.append(1) or real(*a, **k))
    calls.clear()
    again = go(folder, 'cut')
    assert len(calls) == 5 - after and path.read_bytes() == Path('runs/whole/predictions.jsonl').read_bytes()
    assert {**again, 'name': ''} == {**whole, 'name': ''}

def test_a_complete_run_is_not_repeated_and_other_settings_are_refused(folder, monkeypatch, capsys):
    first = go(folder)
    monkeypatch.setattr(vmc, 'ask', None)
    assert go(folder) == first and 'is complete' in capsys.readouterr().out
    for other in (dict(how='generate'), dict(blind=True), dict(batch=4), dict(seed=1), dict(q=Squares(40, seed=1))):
        with pytest.raises(SettingsError, match='was begun with other settings'): go(folder, **other)
    Path('runs/s/result.json').unlink()  # killed between the last two files
    assert go(folder) == first

def test_the_folder_of_a_vlm_is_left_alone(folder):
    (note := Path('runs/v/settings.json')).parent.mkdir(parents=True)
    note.write_text('{"llm": "world", "encoder": "e"}')
    before = note.read_bytes()
    with pytest.raises(SettingsError, match='v is a run of vlm, and not of vmcbench: give this one another name'): go(folder, 'v')
    assert note.read_bytes() == before
    with pytest.raises(SettingsError, match='v is a run of vlm'): go('untrained', 'v')
    assert not (note.parent/'untrained').exists()

def test_a_complete_run_binds_even_without_its_answers(folder):
    go(folder)
    note = Path('runs/s/settings.json')
    before = note.read_bytes()
    Path('runs/s/predictions.jsonl').unlink()
    with pytest.raises(SettingsError, match='begun with other settings: seed was 0 and is now 1'): go(folder, seed=1)
    assert note.read_bytes() == before
    with pytest.raises(SettingsError, match='s is no finished scoring run to compare with'): go(folder, 't', against='s')

def test_two_runs_on_the_same_questions(folder, tmp_path):
    a = go(folder, 'a')
    b = go(untrained_vlm(tmp_path/'other', Squares(), seed=1), 'b', against='a')
    d = b['against']['differences']
    assert d == vmc.compare_runs('runs/b', 'runs/a')
    for p in vmc.PROTOCOLS:
        assert d[p]['questions']['overall']['value'] == pytest.approx(b['score']['protocols'][p]['questions']['overall']['value'] - a['score']['protocols'][p]['questions']['overall']['value'])
    go(folder, 'c', Squares(16))
    with pytest.raises(SettingsError, match='c answered other questions'): vmc.compare_runs('runs/a', 'runs/c')
    with pytest.raises(SettingsError, match='a answered other questions'): go(folder, 'd', Squares(16), against='a')
    with pytest.raises(SettingsError, match='nothing is no finished scoring run'): go(folder, 'd', against='nothing')
    pairs = vmc.disagreements(predictions('runs/a'), predictions('runs/b'), 'likelihood', 6)
    assert len(pairs) == 6 and all((x['likely'] == x['answer']) != (y['likely'] == y['answer']) for x, y in pairs)

def test_a_table_of_letters_holds_every_number(folder, tmp_path):
    "Written and read again"
    results = [go(untrained_vlm(tmp_path/f'{seed}', Squares(), seed=seed), f't{seed}', max_new_tokens=3) for seed in (1, 2)]
    vmc.collect(['runs/t1', 'runs/t2']).to_csv(tmp_path/'t.csv', index=False)
    t = pd.read_csv(tmp_path/'t.csv')
    for p in vmc.PROTOCOLS:
        assert [aggregate(v, [r['category'] for r in Squares().rows]) for v in vmc.right(t, Squares(), p)] == [r['score']['protocols'][p] for r in results]
    assert any(l.islower() for l in ''.join(t.letter)), 'some answers could not be parsed'
    with pytest.raises(SettingsError, match="'t1'.* answered other questions than squares"): vmc.right(t, Squares(16))
    t.loc[1, 'calibrated'] = np.nan
    with pytest.raises(SettingsError, match="'t2'.* was not asked in the way that protocol='calibrated' judges"): vmc.right(t, Squares())

def table(**seeds):
    "Letters of made-up runs, of which a share is right"
    q, rows = Squares(200), []
    for o, shares in seeds.items():
        for s, share in enumerate(shares):
            letters = ''.join(r['answer'] if np.random.default_rng((s, i)).random() < share else 'ABCD'['BCDA'.index(r['answer'])]
                              for i, r in enumerate(q.rows))
            rows.append(dict(run=f'{o}{s}', encoder=f'{o}-mini-s{s}' if o != 'untrained' else f'random:clip-mini-s{s}', blind=False,
                             seed=s, fingerprint=q.fingerprint, calibrated=letters))
    return pd.DataFrame(rows), q

def test_objectives_over_seeds():
    t, q = table(clip=(.7, .72, .74), dino=(.5, .55, .6), untrained=(.3, .3, .3))
    found, d = vmc.by_objective(t, q), vmc.gap(t, q)
    assert list(found) == ['clip', 'dino', 'untrained'] and found['clip']['questions']['overall']['value'] == pytest.approx(vmc.right(t[:3], q).mean())
    cell = d['questions']['overall']
    assert cell['value'] == pytest.approx(vmc.right(t[:3], q).mean() - vmc.right(t[3:6], q).mean()) and 0 < cell['interval'][0] < cell['value'] < cell['interval'][1]
    assert vmc.gap(t, q, 'dino', 'clip')['questions']['overall']['value'] == -cell['value']
    blind = vmc.by_objective(pd.concat([t, t[t.run == 'clip0'].assign(blind=True), t[t.run == 'dino1'].assign(blind=True)]), q)
    assert {o: blind[o] for o in found} == found and blind['blind'] == aggregate(vmc.right(t[t.run.isin(('clip0', 'dino1'))], q).mean(0), [r['category'] for r in q.rows])
    assert vmc.gap(pd.concat([t, t[t.run == 'clip2'].assign(run='clip3', seed=3)]), q) == d, 'a seed more of one is left out'
    with pytest.raises(SettingsError, match=r'clip has the seeds \[0, 1, 2\] and dino has \[0, 1\]'): vmc.gap(t[t.run != 'dino2'], q)
    with pytest.raises(SettingsError, match=r'clip has several runs of seed \[1\], clip0, clip1, clip1, clip2: give those'):
        vmc.gap(pd.concat([t, t[t.run == 'clip1']]), q)
    with pytest.raises(SettingsError, match='siglip has the seeds'): vmc.gap(t, q, 'siglip', 'clip')

def test_a_template_that_writes_the_date(folder, tmp_path):
    "A model of others reads the same on all days"
    for f in folder.iterdir(): (tmp_path/f.name).write_bytes(f.read_bytes())
    plain, path = load_vlm(tmp_path), tmp_path/'chat_template.jinja'
    path.write_text("{{ 'On ' + strftime_now('%d %b %Y') + '; ' }}" + path.read_text())
    row = Squares().rows[0]
    assert vmc.chat(load_vlm(tmp_path), row) == 'On 26 Jul 2024; ' + vmc.chat(plain, row)

def test_what_is_no_model_is_refused(folder, tmp_path):
    (tmp_path/'runs/begun').mkdir(parents=True)
    with pytest.raises(SettingsError, match='begun holds no finished vision-language model: it has no config.json'): load_vlm('begun')
    for f in folder.iterdir(): (tmp_path/'runs/begun'/f.name).write_bytes(f.read_bytes())
    (tmp_path/'runs/begun/settings.json').write_text('{"encoder": "runs/clip-mini-s0", "llm": "x", "seed": 1, "preset": "mini"}')
    with pytest.raises(SettingsError, match='the run begun is not finished: it has no result.json'): load_vlm('begun')
    (tmp_path/'runs/begun/result.json').write_text('{"encoder": {"name": "clip-mini-s0", "fingerprint": "f"}}')
    assert load_vlm('begun').about['encoder'] == 'clip-mini-s0' and load_vlm('begun').about['encoder_weights'] == 'f' and load_vlm('begun').about['llm_weights'] == '' and load_vlm('begun').fingerprint == load_vlm(folder).fingerprint
    assert load_vlm('begun').about['saved'] == load_vlm('begun', precision='bf16').about['saved'] == saved(folder)
    weights = load_file(tmp_path/'runs/begun/model.safetensors')
    save_file({k: v for k, v in weights.items() if 'projector.linear_2.bias' not in k}, tmp_path/'runs/begun/model.safetensors',
              dict(format='pt'))
    with pytest.raises(SettingsError, match='begun lacks 1 of its weights, .*linear_2.bias'): load_vlm('begun')
    (tmp_path/'runs/begun/model.safetensors').write_bytes((folder/'model.safetensors').read_bytes()[:-100])
    with pytest.raises(SettingsError, match="vlm='begun' is no run, folder or hub name"): load_vlm('begun')
    (tmp_path/'runs/begun/model.safetensors').write_bytes((folder/'model.safetensors').read_bytes())
    (tmp_path/'runs/begun/chat_template.jinja').unlink()
    with pytest.raises(SettingsError, match='has no chat template'): load_vlm('begun')
    (tmp_path/'runs/begun/config.json').write_text('{"architecture": "clipdino_vit_mini"}')
    with pytest.raises(SettingsError, match="vlm='begun' is no run, folder or hub name of an image-text-to-text model"): load_vlm('begun')
    with pytest.raises(SettingsError, match="vlm='nothing' is no folder"): load_vlm('nothing')
    with pytest.raises(SettingsError, match='how=.guess. is not one of both, generate, likelihood'): settings(how='guess')

def test_a_question_that_is_too_long_is_refused(vlm, monkeypatch):
    monkeypatch.setattr(vlm.model.config.get_text_config(), 'max_position_embeddings', 50)
    with pytest.raises(SettingsError, match='tokens with its answer, and .* takes 50'): all_answers(vlm, Squares(4), 4)

def test_untrained_is_a_model_for_any_questions(tmp_path):
    path = parquet(tmp_path/'q.parquet', published(20))
    r = evaluate(settings('smoke', vlm='untrained', questions=path, how='likelihood', limit=12))
    assert r['score']['n'] == 12 and r['vlm']['name'] == 'untrained' and len(r['score']['missing']) == 8 and Path('runs/score-untrained/result.json').exists()

def test_the_worlds_questions():
    r = evaluate(settings('smoke', vlm='untrained', how='likelihood'))
    assert r['score']['n'] == 40 and r['score']['missing'] == [] and {g for g in GROUPS} < set(r['score']['protocols']['likelihood']['sets'])
