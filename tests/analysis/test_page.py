"""The page of `mor explain`: one file, everything in it, and it does in a browser what it
promises."""

import json
import re
from dataclasses import replace

import pytest

from mor.analysis.explain import Explanation, explain, shown
from mor.analysis.page import render
from mor.data.problems import StateTracking, task_tokenizer
from mor.data.tokenizer import byte_tokenizer, train_bpe
from mor.model.config import RouterConfig
from mor.model.loss import IGNORED
from mor.statistics import GroupMean
from tests.conftest import tiny

TEXT = (
    "The cat </script> sat on 12 mats; naïve 日本 & <b>two</b> dogs\nwatched.\n\n"
    "Then they left, one by one."
)


ROUTERS = {
    "expert_choice": {},
    "token_choice": {},
    "random": {},
    "fixed": {},
    "vanilla": {"num_recursions": 1},
    "from_0": {},
}
CONFIGS = {
    "vanilla": RouterConfig(),
    "from_0": RouterConfig(kind="random", capacities=(0.5, 0.3, 0.1)),
}


def explanation(kind, tokenizer=None, name="model", **settings):
    tokenizer = tokenizer or byte_tokenizer()
    router = CONFIGS[kind] if kind in CONFIGS else RouterConfig(kind=kind)
    model = tiny(router, vocab_size=tokenizer.vocab_size, max_seq_len=128, **ROUTERS[kind])
    return explain(model, tokenizer, TEXT, name=name, **settings)


def data_of(page):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    )


def test_the_page_holds_all_that_the_explanation_says_and_calls_for_nothing():
    found = explanation("expert_choice", name='a <&> "b"')
    page = render([found])
    (model,) = data_of(page)["models"]
    assert model["text"] == TEXT and len(model["tokens"]) == len(found.tokens)
    assert model["tokens"][5]["steps"][1]["exit_logprob"] == round(
        found.tokens[5].steps[1].exit_logprob, 4
    )
    assert not re.search(
        r"(src|href)=[\"']?(?![\"'#]|data:)[a-z/.]|(src|href)=[\"'](?!#|data:)|@import|url\(|fetch\(|XMLHttpRequest",
        page,
    )
    assert "<title>a &lt;&amp;&gt; &quot;b&quot;</title>" in page
    assert page.count("</script>") == 2, "no text can end the data early"


def test_512_tokens_fit_two_megabytes_even_for_two_models():
    tokenizer = byte_tokenizer()
    model = tiny("expert_choice", vocab_size=257, max_seq_len=512)
    found = explain(model, tokenizer, "The quick brown fox. " * 30)
    tokens = found.tokens[:512]
    assert len(tokens) == 512
    assert len(render([found, found]).encode()) < 2e6


def test_models_that_read_other_characters_are_not_put_side_by_side():
    other = explanation("fixed")
    short = explain(tiny("fixed", vocab_size=257), byte_tokenizer(), "abc")
    with pytest.raises(ValueError, match="cannot be aligned"):
        render([other, short])
    with pytest.raises(ValueError, match="one model or two"):
        render([])


def test_answers_are_not_compared_with_next_tokens_or_other_answers():
    tokenizer, length = byte_tokenizer(), len(TEXT.encode())
    text, *tasks = (
        explanation("fixed", tokenizer, answers=a and [a] * length) for a in (None, 70, 71)
    )
    for two in ([text, tasks[0]], [tasks[0], text], tasks):
        with pytest.raises(ValueError, match="compare runs on the same task, or runs on text"):
            render(two)
    assert len(data_of(render([tasks[0], tasks[0]]))["models"]) == 2


# ---- in a browser


@pytest.fixture
def show(browser, tmp_path):
    """Opens the page of some explanations; fails for anything on the console and any request but
    the page's own."""
    problems, opened = [], []

    def open_page(explanations, **settings):
        (tmp_path / "page.html").write_text(render(explanations), encoding="utf-8")
        page = browser.new_page(**settings)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: (
                problems.append(request.url) if "page.html" not in request.url else None
            ),
        )
        page.goto((tmp_path / "page.html").as_uri())
        opened.append(page)
        return page

    yield open_page
    for page in opened:
        page.close()
    assert problems == []


@pytest.mark.browser
@pytest.mark.parametrize("kind", ROUTERS)
def test_every_family_draws_what_it_has(show, kind):
    found = explanation(kind)
    page = show([found])
    assert page.locator(".prose").text_content() == "".join(t.piece for t in found.tokens)
    assert page.locator(".prose .tok").count() == len(found.tokens)
    routed, looped = kind not in ("fixed", "vanilla"), kind != "vanilla"
    assert page.locator(".scores .col[data-i]").count() == (len(found.tokens) if routed else 0)
    assert page.locator(".exits .cell.chosen").count() == sum(t.depth > 0 for t in found.tokens)
    least = 0 if kind == "from_0" else 1
    if looped:
        depths = [f"depth {d}" for d in range(least, 4)]
        assert page.locator("#legend .tok").all_text_contents() == depths
    if routed:
        left = page.locator("[data-section=classes] svg text[text-anchor=middle]").first
        assert float(left.text_content()) == least
    changes = sum(t.more is not None for t in found.tokens) + sum(
        t.fewer is not None for t in found.tokens
    )
    assert page.locator(".stroke").count() == (changes if looped else 0)
    assert page.locator("[data-section=flow] svg").count() == routed
    assert page.locator("[data-section=classes] .mean").count() == (
        sum(map(len, found.by_class().values())) * routed
    )


@pytest.mark.browser
def test_every_line_of_columns_names_its_recursions(show):
    page = show([explanation("expert_choice")])
    tops = """(selector) => [...new Set([...document.querySelectorAll(selector)]
        .map((node) => Math.round(node.getBoundingClientRect().top)))]"""
    lines = page.evaluate(tops, ".scores .col[data-i]")
    assert len(lines) > 2 and set(lines) <= set(page.evaluate(tops, ".scores .keys .col"))


@pytest.mark.browser
def test_a_panel_says_that_it_goes_on_until_its_end_is_seen(show):
    page = show([explanation("expert_choice"), explanation("fixed")])
    panel = page.locator("[data-model='0'] .scores")
    page.wait_for_selector("[data-model='0'] .scores.cut")
    panel.evaluate("node => { node.scrollTop = node.scrollHeight; }")
    page.wait_for_selector("[data-model='0'] .scores:not(.cut)")
    assert "cut" not in page.locator("[data-model='0'] .prose").get_attribute("class"), "all seen"


@pytest.mark.browser
def test_the_page_rounds_as_the_terminal_does(show, monkeypatch):
    monkeypatch.setattr(Explanation, "mean_depth", 1.125)
    page = show([explanation("expert_choice")])
    assert shown(1.125, 2) == "1.13" and "1.13 of 3" in page.locator(".tiles").inner_text()


def test_words_of_a_task_are_named_by_what_they_are_for():
    task = StateTracking(states=4, moves=3)
    tokenizer = task_tokenizer(task.words())
    model = tiny("expert_choice", vocab_size=tokenizer.vocab_size)
    found = explain(model, tokenizer, "=3 p0 p2 =1", task=task)
    kinds = ["sets the state", "moves the state", "moves the state", "sets the state"]
    assert [t.kind for t in found.tokens] == kinds
    assert [g.group for g in found.by_class()["kind"]] == sorted(set(kinds))


@pytest.mark.browser
def test_answers_are_shown_in_place_of_next_tokens(show):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(TEXT)
    answers = [IGNORED if t % 2 else 70 for t in range(len(ids))]
    page = show([explanation("expert_choice", answers=answers)])
    page.locator("#t0-4").hover()
    detail = page.locator("#detail").inner_text()
    assert "answer" in detail and "next token" not in page.locator("main").inner_text()
    page.locator("#t0-5").hover()
    assert "none here" in page.locator("#detail").inner_text()
    page.get_by_label("surprise", exact=True).check()
    assert page.locator(".prose .tok.none").count() == len(ids) // 2


@pytest.mark.browser
def test_intervals_wider_than_the_axis_end_at_it(show, monkeypatch):
    wide = GroupMean(group="2", count=3, mean=1.5, low=-40.0, high=40.0)
    monkeypatch.setattr(Explanation, "by_class", lambda self: {"kind": [wide]})
    monkeypatch.setattr(
        Explanation,
        "counterfactuals",
        lambda self: {"fewer": [wide], "more": [replace(wide, low=None)]},
    )
    page = show([explanation("expert_choice")])
    lines = page.locator("line.interval")
    assert lines.count() == 2 and page.locator("circle.mean").count() == 3
    for line in lines.all():
        axis = line.locator("xpath=..").locator("line.axis")
        assert [line.get_attribute(x) for x in ("x1", "x2")] == [
            axis.get_attribute(x) for x in ("x1", "x2")
        ]


@pytest.mark.browser
def test_keys_and_pointer_choose_a_token_and_enter_holds_it(show):
    found = explanation("expert_choice")
    page = show([found])
    panel, chosen = page.locator(".prose"), page.locator(".prose .tok.now")
    panel.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert chosen.get_attribute("data-i") == "2"
    detail = page.locator("#detail").inner_text()
    token = found.tokens[2]
    assert f"{token.depth} of 3" in detail and f"{token.logprob:.2f}".replace("-", "−") in detail
    assert page.locator(".exits .now").get_attribute("data-i") == "2"
    assert panel.get_attribute("aria-activedescendant") == "t0-2"
    page.keyboard.press("ArrowDown")
    below = chosen.bounding_box()["y"]
    page.keyboard.press("ArrowUp")
    assert chosen.bounding_box()["y"] < below and chosen.get_attribute("data-i") == "2"
    page.keyboard.press("Enter")
    page.locator("#t0-9").hover()
    assert chosen.get_attribute("data-i") == "2", "held"
    page.keyboard.press("Escape")
    page.locator("#t0-10").hover()
    assert chosen.get_attribute("data-i") == "10"
    page.keyboard.press("End")
    assert chosen.get_attribute("data-i") == str(len(found.tokens) - 1)


@pytest.mark.browser
def test_two_models_are_aligned_by_characters(show):
    left, right = (
        explanation("expert_choice", name="a"),
        explanation("token_choice", train_bpe([TEXT * 3], 280), "b"),
    )
    page = show([left, right])
    page.locator("#t0-30").hover()
    twin = right.tokens[int(page.locator("[data-model='1'] .prose .now").get_attribute("data-i"))]
    assert twin.start <= left.tokens[30].start < twin.end
    assert page.locator("#detail .one").count() == 2
    page.get_by_label("against the other model").check()
    first = min({t.end for t in left.tokens} & {t.end for t in right.tokens})
    unpredicted = sum(t.end <= first for e in (left, right) for t in e.tokens)
    assert page.locator(".prose .tok.none").count() == unpredicted, (
        "every stretch but the first is compared"
    )


@pytest.mark.browser
@pytest.mark.parametrize("scheme", [pytest.param("light", marks=pytest.mark.slow), "dark"])
def test_a_slider_moves_the_text_from_budget_to_budget_by_keys(show, scheme):
    found = explanation("random", depths=[1.5, 2.0, "full", 4.5])
    page = show([found, explanation("expert_choice")], color_scheme=scheme)
    section = page.locator("[data-section=budgets]")
    slider, said = section.get_by_label("Depth budget"), section.locator("output")
    assert section.get_by_text("at its own depths alone").count() == 1, "of the other model"
    slider.focus()
    for key, at in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("End", 3)):
        page.keyboard.press(key)
        budget = found.budgets[at]
        name = ("budget 1.5", "budget 2", "full depth", "budget 4.5")[at]
        text = f"mean depth {shown(budget.mean_depth, 2)} · {shown(budget.nll, 3)} nats per token"
        assert said.inner_text() == f"{name} · {text}"
        assert slider.get_attribute("aria-valuetext") == f"{name}, {text}"
        bars = section.locator(".prose .tok").evaluate_all(
            "nodes => nodes.map((n) => +n.style.getPropertyValue('--bars'))"
        )
        assert bars == budget.depth
        assert page.evaluate(CONTRAST) >= 4.5
    assert page.locator("#text .prose .tok").count() == 2 * len(found.tokens)


@pytest.mark.browser
def test_a_short_text_of_deep_tokens_keeps_still(show):
    """The lines below them once made a panel say that it goes on, which made room for them."""
    model = tiny("random", vocab_size=257)
    page = show([explain(model, byte_tokenizer(), "abc", depth=6.0, depths=[6.0])])
    heights = page.evaluate(
        """async () => { const found = [];
            for (let i = 0; i < 6; i++) {
              await new Promise(requestAnimationFrame);
              found.push(document.body.scrollHeight);
            }
            return found; }"""
    )
    assert len(set(heights)) == 1 and page.locator(".prose.cut").count() == 0


@pytest.mark.browser
def test_a_page_without_budgets_has_no_slider(show):
    page = show([explanation("expert_choice")])
    assert page.locator("[data-section=budgets], input[type=range]").count() == 0


CONTRAST = """
() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((c) => c / 255)
      .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return Math.min(...[...document.querySelectorAll(".tok, .cell.on")].map((node) => {
    const style = getComputedStyle(node), back = style.backgroundColor;
    const paper = getComputedStyle(document.querySelector(".prose")).backgroundColor;
    const under = back === "rgba(0, 0, 0, 0)" ? paper : back;
    const pair = [luminance(style.color), luminance(under)].sort((a, b) => a - b);
    return (pair[1] + 0.05) / (pair[0] + 0.05);
  }));
}
"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_shade(show, scheme):
    page = show([explanation("expert_choice")], color_scheme=scheme)
    for mode in ("depth", "surprise", "doubt", "one recursion fewer", "one recursion more"):
        page.get_by_label(mode, exact=True).check()
        assert page.evaluate(CONTRAST) >= 4.5, mode


@pytest.mark.browser
def test_a_narrow_page_does_not_overflow_and_print_shows_everything(show):
    page = show(
        [explanation("expert_choice"), explanation("fixed")], viewport={"width": 390, "height": 800}
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#bar").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.emulate_media(media="print")
    assert not page.locator("#detail").is_visible()
    full = page.evaluate(
        "(() => { const c = document.querySelector('.columns'); return c.scrollHeight <= "
        "c.clientHeight + 1; })()"
    )
    assert full, "nothing is cut off by a scrolling panel"
    assert page.pdf()[:4] == b"%PDF"


@pytest.mark.browser
@pytest.mark.parametrize("size", [(1000, 800), (800, 600)])
def test_on_a_narrow_page_the_detail_is_a_line_that_opens(show, size):
    found, other = explanation("expert_choice"), explanation("fixed", name="other")
    page = show([found, other], viewport=dict(width=size[0], height=size[1]))
    bar, facts = page.locator("#bar"), page.locator("#facts")
    top = bar.bounding_box()["y"]
    for first in ("#t0-0", "#t1-0"):
        box = page.locator(first).bounding_box()
        assert box["y"] + box["height"] < top, "the text begins above the line"
    page.locator("#t0-2").hover()
    token = found.tokens[2]
    said = f"depth {token.depth} of 3 → ␣ · log p {token.logprob:.2f}".replace("-", "−")
    assert said in bar.inner_text() and not facts.is_visible()
    bar.focus()
    page.keyboard.press("Enter")
    assert facts.is_visible() and bar.get_attribute("aria-expanded") == "true"
    bar.click()
    assert not facts.is_visible()
    page.set_viewport_size(dict(width=1400, height=800))
    assert facts.is_visible() and not bar.is_visible()
