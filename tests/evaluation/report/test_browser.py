"""The report in a real browser: search, order and filters, hostile text, many documents."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from evaluation.report import page, sample_data
from evaluation.report.document_text import printable
from evaluation.report.results import (
    Cascaded,
    Cost,
    Curve,
    Evaluation,
    Floor,
    Losses,
    PoolDocuments,
    Results,
    Run,
    Sample,
    Sampler,
    Score,
)

sys.path.insert(0, str(Path(__file__).parent))
import headless

pytestmark = pytest.mark.skipif(
    headless.executable() is None, reason="no Chromium or Chrome found: set WINNOW_CHROMIUM"
)

HOSTILE = [
    "</script><script>window.hurt = 'closed the data'</script>",
    '<img src=x onerror="window.hurt = \'event handler\'"> <svg onload="window.hurt = 1">',
    "<!--<script>window.hurt = 'comment'</script>",
    "{{ 7 * 7 }} &lt;b&gt; \" ' ` \\u003c \\",
    "line\u2028separator\u2029 and \u202e reversed \x00\x1b[31m",
    "a line of " + "very " * 20_000 + "great length",
    "javascript:window.hurt=2",
]


def results_of(count: int) -> Results:
    """Made-up results with `count` documents to browse, hostile ones first."""
    rng = np.random.default_rng(0)
    ordinary = [
        f"Document {i} speaks of {'wheat' if i % 10 == 0 else 'chaff'}." for i in range(count)
    ]
    text = tuple((HOSTILE + ordinary)[:count])
    scores = rng.normal(size=count)
    scores[5] = np.nan
    kept = scores > 0.8
    tokens = np.arange(1, count + 1)
    losses = Losses(np.arange(5), np.full(5, 40.0), np.full(5, 10), np.full(5, 40.0))

    def run(sampler: str, rate: float) -> Run:
        return Run(
            sampler=sampler,
            keep_rate=rate,
            seed=0,
            size="",
            documents=10,
            tokens=100,
            share_kept=rate,
            epochs=1.0,
            steps=20,
            parameters=1000,
            seconds=1.0,
            flops=1e9,
            losses={"good": losses},
            curves={"good": Curve(np.array([10, 20]), np.array([5.0, 4.0]))},
        )

    everything = np.ones(count, bool)
    return Results(
        title="<script>window.hurt = 'title'</script>",
        description="",
        caveats=("<img src=x onerror='window.hurt = 3'>",),
        evaluations=(Evaluation("good", "good text", "By hand.", 5, 50, 200),),
        samplers=(
            Sampler("full", "Full data", "All.", None),
            Sampler("best", "Best", "The best.", "quality"),
        ),
        runs=(run("full", 1.0), run("best", 0.2)),
        floors={"good": (Floor("Unigram", np.full(5, 50.0), np.full(5, 10), 1000),)},
        pool=PoolDocuments(
            np.arange(count),
            tokens,
            np.array(["field", "barn"], object)[tokens % 2],
            np.full(count, "grain.example", object),
            rng.normal(6, 1, count),
        ),
        pool_shards=(1, 1),
        kept={("full", 1.0, 0): everything, ("best", 0.2, 0): kept},
        scores=(Score("quality", "Quality", "goodness", scores, {"ok": count}, "0" * 64),),
        examples={"quality": ()},
        sample=Sample(
            rows=np.arange(count),
            text=text,
            cut=np.zeros(count, bool),
            place=tuple(f"https://grain.example/{i}" for i in range(count)),
            tokens={8: (["Document", " 1", " speaks"], np.array([0.5, np.nan, 7.0]))},
        ),
        cascades=(Cascaded("cascade", ("<script>window.hurt = 4</script>",)),),
        corpus={
            "rows": count,
            "tokens": 1,
            "counts": {},
            "summary": {"vocabulary": {"kind": "bytes", "size": 256}},
        },
        costs=(),
        sampler_costs={"best": Cost("select", 1.0, 1e8, 5)},
        training_cost=Cost("train", 2.0, 1e9, 5),
        sizes={},
        tasks={},
        configuration={"name": "</pre><script>window.hurt = 4</script>"},
        provenance=(),
        commands=("echo </pre><script>window.hurt = 5</script>",),
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[headless.Browser]:
    opened = headless.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def small(browser, tmp_path_factory) -> headless.Browser:
    index = page.write(results_of(300), tmp_path_factory.mktemp("report"))
    browser.open(index.as_uri())
    return browser


def set_control(browser: headless.Browser, name: str, value: str) -> int:
    """Sets a control as a user would, and gives the number of documents then listed."""
    event = "input" if name == "query" else "change"
    return browser.evaluate(
        f"new Promise(done => {{ const control = document.getElementById('{name}');"
        f" control.value = {value!r}; control.dispatchEvent(new Event('{event}'));"
        " setTimeout(() => done(Number(document.getElementById('count').textContent"
        ".split(' ')[0].replace(',', ''))), 200); })"
    )


def first_row(browser: headless.Browser) -> str:
    return browser.evaluate("document.querySelector('#rows button').textContent")


@pytest.fixture
def clean(small) -> headless.Browser:
    for name in ("query", "kept_by", "dropped_by", "source", "sort"):
        set_control(small, name, "")
    return small


def test_search_order_and_filters(clean):
    results = results_of(300)
    scores, kept = results.scores[0].values, results.kept["best", 0.2, 0]
    texts = results.sample.text
    assert set_control(clean, "query", "WHEAT") == sum("wheat" in text for text in texts)
    assert "wheat" in clean.evaluate("document.querySelector('#rows mark').textContent")
    assert set_control(clean, "kept_by", "0") == sum(
        "wheat" in text and k for text, k in zip(texts, kept, strict=True)
    )
    assert set_control(clean, "query", "") == kept.sum()
    assert set_control(clean, "dropped_by", "0") == 0
    assert set_control(clean, "kept_by", "") == (~kept).sum()
    assert set_control(clean, "dropped_by", "") == 300
    barn = sum(name == "barn" for name in results.pool.source)
    assert {set_control(clean, "source", str(k)) for k in (0, 1)} == {barn, 300 - barn}
    set_control(clean, "source", "")

    set_control(clean, "sort", "0 high")
    best = int(np.nanargmax(scores))
    assert texts[best][:60] in first_row(clean) and f"{scores[best]:.4g}"[:4] in first_row(clean)
    set_control(clean, "sort", "0 low")
    assert texts[int(np.nanargmin(scores))][:60] in first_row(clean)
    set_control(clean, "sort", "tokens low")
    assert first_row(clean).startswith("1 tokens")
    assert set_control(clean, "query", "there is no such word") == 0
    assert "No document" in clean.evaluate("document.getElementById('reader').textContent")


def test_a_document_is_read_with_its_scores_and_its_tokens(clean):
    assert set_control(clean, "query", '"document 1 speaks"') == 1
    reader = clean.evaluate("document.getElementById('reader').innerText")
    assert "Quality" in reader and "Best 20%" in reader and "Document 1 speaks" in reader
    clean.evaluate("document.querySelector('.shading input').click()")
    shown = clean.evaluate(
        "[...document.querySelectorAll('.shaded span')].map(s => [s.textContent, s.className])"
    )
    assert [text for text, _ in shown] == ["Document", " 1", " speaks"]
    assert shown[1][1] == "" and shown[0][1] < shown[2][1]
    assert clean.evaluate("document.querySelector('#reader pre:not(.shaded)').hidden")


def test_hostile_text_runs_nothing_and_is_shown_as_it_is(clean):
    for place, text in enumerate(HOSTILE):
        clean.evaluate(f"document.querySelectorAll('#rows button')[{place}].click()")
        shown = clean.evaluate("document.querySelector('#reader pre:not(.shaded)').textContent")
        assert shown == printable(text)
    assert clean.evaluate("window.hurt === undefined")
    assert clean.evaluate("document.querySelectorAll('img, iframe, #reader svg').length") == 0
    requests = [entry for entry in clean.log if entry.startswith("request: ")]
    assert all(entry.startswith("request: file:") for entry in requests) and len(requests) <= 2
    assert not [entry for entry in clean.log if "exception" in entry]


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_answer_certainty_and_floor_are_on_the_first_screen(clean, tmp_path, width, height):
    clean.screenshot(tmp_path / "page.png", width, height)
    bottom = clean.evaluate("document.querySelector('.grounds').getBoundingClientRect().bottom")
    top = clean.evaluate("window.scrollY")
    assert bottom + top < height
    shown = clean.evaluate("document.querySelector('header').innerText")
    assert "No conclusion" in shown, "one seed"
    assert "no significance can be stated" in shown and "Perplexity of unigram 148.4" in shown


def test_the_page_fits_a_phone(clean):
    clean.call(
        "Emulation.setDeviceMetricsOverride",
        width=390,
        height=844,
        deviceScaleFactor=1,
        mobile=True,
    )
    assert clean.evaluate("document.documentElement.scrollWidth") == 390
    clean.call("Emulation.clearDeviceMetricsOverride")


def test_a_hundred_thousand_documents_stay_responsive(browser, tmp_path):
    """Few rows exist at a time, and no step takes the page longer than a person notices."""
    results = results_of(100_000)
    data = sample_data.inert(sample_data.data(dataclasses.replace(results)))
    body = (
        "<div id=browser hidden><label><input id=query></label><div><select id=source>"
        "<option value=''></select></div><select id=kept_by><option value=''></select>"
        "<select id=dropped_by><option value=''></select><select id=sort><option value=''></select>"
        "<output id=count></output><div id=list style='height:600px;overflow-y:auto'>"
        "<div id=rows style='position:relative'></div></div><article id=reader></article></div>"
    )
    script = (Path(page.__file__).parent / "page.js").read_text()
    file = tmp_path / "many.html"
    file.write_text(
        f"<!doctype html><meta charset=utf-8>{body}<script type='application/json' "
        f"id=documents>{data}</script><script>{script}</script>"
    )
    browser.open(file.as_uri())
    timed = "(() => {{ const start = performance.now(); {}; return performance.now() - start; }})()"
    control = "document.getElementById('{}').value = '{}'; update()"
    took = {
        "search": browser.evaluate(timed.format(control.format("query", "wheat"))),
        "search again": browser.evaluate(timed.format(control.format("query", "wheat 90"))),
        "filter": browser.evaluate(timed.format(control.format("kept_by", "0"))),
        "all": browser.evaluate(timed.format(control.format("query", ""))),
        "sort": browser.evaluate(timed.format(control.format("sort", "0 high"))),
        "scroll": browser.evaluate(
            timed.format("document.getElementById('list').scrollTop = 1e6; draw()")
        ),
    }
    print({name: f"{value:.0f} ms" for name, value in took.items()})
    assert browser.evaluate("document.querySelectorAll('#rows button').length") < 40
    assert browser.evaluate("shown.length") == results.kept["best", 0.2, 0].sum()
    assert all(value < 1500 for value in took.values()), took  # on a busy machine
