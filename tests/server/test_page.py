"""The playground: its own files and no others, and in a browser it does what it promises."""

import re

import pytest

from tests.analysis.test_page import CONTRAST
from tests.server.fake_server import FILES, FakeServer, Script

HTML = FILES["playground.html"].decode()
PARTS = {name: text.decode() for name, text in FILES.items() if name != "playground.html"}
SCRIPTS = "\n".join(text for name, text in PARTS.items() if name.endswith(".js"))


def test_the_page_loads_its_own_files_all_of_them_and_nothing_else():
    assert sorted(re.findall(r'(?:src|href)="page/(.*?)"', HTML)) == sorted(PARTS)
    others = re.findall(r'(?:src|href)="(?!page/)(.*?)"', HTML)
    assert sorted(others) == ["#text", "data:,"]
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', HTML)[1].split("; ")
    assert "default-src 'none'" in policy and "script-src 'self'" in policy
    assert set(" ".join(policy).split()) & {"*", "'unsafe-inline'", "'unsafe-eval'"} == set()
    for text in (HTML, *PARTS.values()):
        assert not re.search(r"@import|url\(|\bimport\b|XMLHttpRequest|WebSocket", text)
        assert re.findall(r"https?://[^\s\"]+", text) in ([], ["http://www.w3.org/2000/svg"])
    assert set(re.findall(r'"((?:v1/|/)[\w/]+|stats)"', SCRIPTS)) == {
        "v1/models",
        "v1/completions",
        "v1/chat/completions",
        "stats",
    }, "relative paths, so that the page works behind a proxy's prefix"


def test_what_a_model_writes_can_never_be_read_as_html():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", SCRIPTS)
    assert not re.search(r"\son\w+=|javascript:", HTML)


def test_every_name_that_the_scripts_use_is_on_the_page_and_every_field_has_a_label():
    ids = re.findall(r'\bid="(.*?)"', HTML)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'byId\("(.*?)"\)', SCRIPTS))
    used |= set(re.findall(r'(?:for|aria-describedby|aria-controls)="(.*?)"', HTML))
    assert used and used <= set(ids), used - set(ids)
    labels = set(re.findall(r'<label for="(.*?)"', HTML))
    for kind, attributes, start in (
        (m[1], m[2], m.start()) for m in re.finditer(r"<(input|textarea)\b(.*?)>", HTML)
    ):
        inside = HTML.rfind("<label", 0, start) > HTML.rfind("</label>", 0, start)
        named = re.search(r'\bid="(.*?)"', attributes)
        assert inside or (named and named[1] in labels), f"{kind}{attributes} has no label"


# ---- in a browser


ANSWER = [
    ("<img src=x onerror=alert(1)>", "<img src=x onerror=alert(1)>", 1),
    (" cat", " cat", 2),
    ("", "bytes:\\xe6\\x97", 3),
    ("日", "bytes:\\xa5", 3),
    ("\n", "\n", 1),
    (" sat.", " sat.", 2),
]
TEXT = "".join(text for text, _, _ in ANSWER)


@pytest.fixture
def script():
    return Script(tokens=ANSWER)


@pytest.fixture
def server(script):
    with FakeServer(script) as running:
        yield running


@pytest.fixture
def show(browser, server):
    """Opens the page once it knows the model; fails for whatever a script or a policy complains
    about and for any request to elsewhere. ``refused`` are answers that the console may name."""
    problems, opened = [], []

    def open_page(*, url=server.url, refused=False, model="tiny", **settings):
        page = browser.new_page(**settings)

        def heard(message):
            if not (refused and message.text.startswith("Failed to load resource")):
                problems.append(message.text)

        page.on("console", heard)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda r: problems.append(r.url) if not r.url.startswith((url, "data:")) else None,
        )
        page.goto(url)
        opened.append(page)
        see(page, "#model", model)
        return page

    yield open_page
    for page in opened:
        page.close()
    assert problems == []


def see(page, selector, text):
    """Wait until the text is there. (The page's policy forbids waiting for a function.)"""
    from playwright.sync_api import expect

    expect(page.locator(selector).first).to_contain_text(text)


def finished(page):
    from playwright.sync_api import expect

    expect(page.locator("#stop")).to_be_disabled()


def ask(page, text, *, key="Control+Enter"):
    page.locator("#text").fill(text)
    page.locator("#text").press(key)


def answer_of(page):
    return page.locator(".answer >> visible=true").last


@pytest.mark.browser
def test_a_completion_streams_in_coloured_by_depth(show, script):
    page = show()
    script.hold_at = 3
    ask(page, "Once <b>upon</b>")
    see(page, ".hint >> visible=true", "generates")
    tokens = answer_of(page).locator(".tok")
    see(page, ".answer", " cat")
    assert tokens.count() == 3 and page.locator("#stop").is_enabled(), "shown before the end"
    script.go_on.set()
    finished(page)
    assert answer_of(page).text_content() == TEXT
    assert page.locator("#page .given").text_content() == "Once <b>upon</b>"
    assert page.locator("#page img, #page b").count() == 0
    bars = tokens.evaluate_all("all => all.map((t) => +t.style.getPropertyValue('--bars'))")
    assert bars == [depth for _, _, depth in ANSWER]
    shades = tokens.evaluate_all("all => all.map((t) => getComputedStyle(t).backgroundColor)")
    assert len(set(shades)) == 3 and shades[1] == shades[5] != shades[0]
    legend = page.locator("#legend")
    assert legend.locator(".tok").all_text_contents() == ["depth 1", "depth 2", "depth 3"]
    assert "as many lines below as recursions" in legend.text_content()
    see(page, "#page .hint", "6 tokens · mean depth 2.00 of 3")
    assert "reached the most new tokens" in page.locator("#page .hint").text_content()
    assert page.locator("#text").input_value() == "Once <b>upon</b>"
    assert page.locator("#said").text_content().startswith(TEXT), "spoken once, at the end"
    ((path, body),) = script.asked
    assert path == "/v1/completions" and "depth" not in body and "seed" not in body
    assert body == {
        "model": "tiny",
        "prompt": "Once <b>upon</b>",
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_depths": True,
        "logprobs": 5,
        "temperature": 0.8,
        "top_p": 0.95,
        "max_tokens": 128,
    }


@pytest.mark.browser
def test_settings_and_the_budget_go_into_the_request(show, script):
    page = show()
    for name, value in (("Temperature", "0"), ("Top-p", "0.5"), ("Most new tokens", "7")):
        page.get_by_label(name).fill(value)
    page.get_by_label("Seed").fill("11")
    slider = page.get_by_label("Depth budget")
    assert slider.get_attribute("aria-valuetext") == "left to the server"
    page.get_by_label("left to the server").uncheck()
    assert slider.get_attribute("aria-valuetext") == "3.00 recursions"
    page.get_by_label("left to the server").check()
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "2.95 recursions"
    page.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == "1.20 recursions"
    assert not page.get_by_label("left to the server").is_checked(), "moving it is choosing it"
    ask(page, "a")
    finished(page)
    body = script.asked[0][1]
    sent = {n: body[n] for n in ("temperature", "top_p", "max_tokens", "seed", "depth")}
    assert sent == {"temperature": 0, "top_p": 0.5, "max_tokens": 7, "seed": 11, "depth": 1.2}
    page.reload()
    see(page, "#depth-said", "1.20 recursions")
    assert page.get_by_label("Seed").input_value() == "11"
    page.get_by_label("left to the server").check()
    page.get_by_label("Top-p").fill("3")
    ask(page, "b")
    assert len(script.asked) == 1, "nothing wrong is sent"
    page.get_by_label("Top-p").fill("1")
    ask(page, "b")
    finished(page)
    assert "depth" not in script.asked[1][1]


@pytest.mark.browser
def test_pointer_and_focus_show_depth_scores_and_alternatives(show):
    page = show()
    ask(page, "a")
    finished(page)
    tokens, facts = answer_of(page).locator(".tok"), page.locator("#facts")
    tokens.nth(1).hover()
    said = facts.inner_text()
    assert "␣cat" in said and "●●○ 2 of 3" in said and "−0.50 (61%)" in said
    rows = facts.locator("tr").all_inner_texts()[1:]
    assert [row.split()[0] for row in rows] == ["␣cat", "␣other", "<b>bold</b>"]
    assert "22%" in rows[1] and "−1.50" in rows[1]
    answer_of(page).focus()
    page.keyboard.press("ArrowRight")
    chosen = page.locator(".tok.now")
    assert chosen.get_attribute("data-i") == "2"
    assert answer_of(page).get_attribute("aria-activedescendant") == chosen.get_attribute("id")
    assert chosen.get_attribute("aria-selected") == "true"
    spoken = chosen.get_attribute("aria-label")
    assert spoken.startswith("‹e6 97›, depth 3 of 3, log-probability −0.50 (61%), likeliest: ")
    page.keyboard.press("Enter")
    tokens.nth(5).hover()
    assert chosen.get_attribute("data-i") == "2", "held"
    page.keyboard.press("Escape")
    tokens.nth(0).hover()
    assert chosen.get_attribute("data-i") == "0"
    page.get_by_role("radio", name="surprise").check()
    assert page.locator("#legend .tok").first.inner_text() == "expected"
    assert chosen.get_attribute("data-i") == "0", "painted anew, and still chosen"


@pytest.mark.browser
def test_a_conversation_by_keyboard_alone(show, script):
    page = show()
    page.keyboard.press("Shift+Tab")  # from the text field, where the page begins
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")
    assert page.get_by_label("chat", exact=True).is_checked()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("you")
    page.keyboard.press("Enter")
    finished(page)
    assert page.locator("#text").input_value() == "", "sent"
    page.get_by_label("System message").fill("Be kind.")
    ask(page, "And then?", key="Enter")
    finished(page)
    assert page.locator(".turn").count() == 4
    path, body = script.asked[1]
    assert path == "/v1/chat/completions" and body["logprobs"] is True and body["top_logprobs"] == 5
    assert body["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello\nyou"},
        {"role": "assistant", "content": TEXT},
        {"role": "user", "content": "And then?"},
    ]
    page.keyboard.press("Shift+Tab")  # back into the last answer
    page.keyboard.press("End")
    assert page.locator(".tok.now").text_content() == " sat."
    assert "●●○ 2 of 3" in page.locator("#facts").inner_text()
    page.get_by_label("completion").check()
    assert not page.locator("#talk").is_visible(), "each mode has its own text"
    page.get_by_label("chat", exact=True).check()
    page.reload()
    see(page, "#model", "tiny")
    assert page.locator(".turn").count() == 4 and answer_of(page).text_content() == TEXT
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0
    script.hold_at = -1
    ask(page, "one", key="Enter")
    page.locator("#text").type(" two")
    script.go_on.set()
    finished(page)
    assert page.locator(".turn").count() == 2
    assert page.locator("#text").input_value() == "one two", "typed while the server had it"


@pytest.mark.browser
@pytest.mark.parametrize("by", ["Escape", "button"])
def test_stop_closes_the_stream_and_keeps_what_came(show, script, by):
    page = show()
    script.hold_at = 2
    ask(page, "a")
    see(page, ".answer", " cat")
    page.locator("#text").type(" and more")
    if by == "button":
        page.get_by_role("button", name="Stop").focus()
        page.keyboard.press("Enter")
    else:
        page.keyboard.press("Escape")
    finished(page)
    assert script.client_left.wait(5), "the server sees that the client went away"
    assert answer_of(page).locator(".tok").count() == 2
    see(page, "#page .hint", "2 tokens · mean depth 1.50 of 3 · stopped by you")
    assert page.locator("#text").input_value() == "a and more"
    assert not page.locator("#problem").is_visible()
    if by == "button":
        assert page.evaluate("document.activeElement.id") == "send", "the focus is not lost"


REFUSALS = [
    ((429, {"Retry-After": "3"}, "64 wait"), "The server is busy. Try again in about 3 s"),
    ((400, {}, "top_p: <b>no</b>"), "refuses this request: top_p: <b>no</b>"),
    ((413, {}, "5 MiB"), "more text than the server takes at once: 5 MiB"),
    ((500, {}, "its log has the reason"), "The server failed (500): its log"),
]


@pytest.mark.browser
def test_a_refusal_is_told_and_the_message_is_still_in_its_field(show, script):
    page = show(refused=True)
    page.get_by_label("chat", exact=True).check()
    page.locator("#text").fill("My long message")
    for script.refusal, said in REFUSALS:
        page.locator("#text").press("Enter")
        see(page, "#problem", said)
        assert page.locator("#text").input_value() == "My long message"
        assert page.locator(".turn").count() == 0 and page.locator("#problem b").count() == 0
    script.refusal = None
    page.locator("#text").press("Enter")
    finished(page)
    assert answer_of(page).text_content() == TEXT and not page.locator("#problem").is_visible()
    assert page.locator("#text").input_value() == ""


@pytest.mark.browser
@pytest.mark.parametrize("how", ["break_after", "fail_after"])
def test_an_answer_that_breaks_off_is_kept_as_far_as_it_came(show, script, how):
    setattr(script, how, 2)
    page = show()
    page.get_by_label("chat", exact=True).check()
    ask(page, "My message", key="Enter")
    words = {"break_after": "the connection was lost", "fail_after": "out of <i>luck</i>"}
    see(page, "#problem", words[how])
    assert answer_of(page).locator(".tok").count() == 2
    see(page, ".turn.assistant .hint", "broke off")
    setattr(script, how, 0)
    page.get_by_role("button", name="New conversation").click()
    ask(page, "Another", key="Enter")
    see(page, "#problem", words[how])
    finished(page)
    assert page.locator(".turn").count() == 0
    assert page.locator("#text").input_value() == "Another", "no answer at all: given back"


@pytest.mark.browser
def test_a_server_that_is_gone_is_told_and_the_text_stays(show, script, server):
    page = show(refused=True)
    page.locator("#text").fill("kept")
    server.__exit__()
    page.locator("#text").press("Control+Enter")
    see(page, ".problem >> visible=true", "The server cannot be reached")
    see(page, "#lost", "What you typed is still here")
    assert page.locator("#text").input_value() == "kept"
    assert page.locator("#speed").text_content() == "–"
    script.name = "another"
    with FakeServer(script, port=server.server_address[1]):
        see(page, "#model", "another")
        page.locator("#lost").wait_for(state="hidden")
        page.locator("#text").press("Control+Enter")
        finished(page)
        assert answer_of(page).text_content() == TEXT


@pytest.mark.browser
def test_a_key_can_be_typed_where_the_server_asks_for_one(show, script):
    script.key = "secret"
    page = show(refused=True, model="No model yet")
    see(page, "#lost", "asks for an API key")
    page.locator("#text").fill("kept")
    page.get_by_label("API key").fill("wrong")
    page.get_by_label("API key").press("Tab")
    see(page, "#lost", "does not know this API key")
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Tab")
    see(page, "#model", "tiny")
    ask(page, "kept")
    finished(page)
    assert answer_of(page).text_content() == TEXT
    stored = page.evaluate("JSON.stringify(sessionStorage) + JSON.stringify(localStorage)")
    assert "secret" not in stored and "kept" in stored


@pytest.mark.browser
def test_a_plain_model_has_no_slider_no_chat_and_no_depths(show, script):
    script.model = {"num_recursions": 1, "depths": None, "has_chat_template": False}
    page = show()
    assert not page.locator("#budget").is_visible()
    assert page.get_by_label("chat", exact=True).is_disabled()
    assert page.locator("#no-chat").is_visible()
    assert page.locator("#modes input").count() == 1
    ask(page, "a")
    finished(page)
    answer_of(page).locator(".tok").nth(1).hover()
    assert "log-probability" in page.locator("#facts").inner_text()


@pytest.mark.browser
def test_the_end_of_a_long_answer_stays_in_sight_unless_one_reads_above(show, script):
    script.tokens = [(f" word{i}", f" word{i}", 1) for i in range(400)]
    script.hold_at = 300
    page = show()
    ask(page, "a")
    see(page, ".answer", "word299")
    below = "node => node.scrollHeight - node.clientHeight - node.scrollTop"
    box = page.locator("#page")
    box.evaluate("node => node.scrollTo(0, 0)")
    script.go_on.set()
    finished(page)
    assert box.evaluate(below) > 100
    ask(page, "a")
    finished(page)
    page.evaluate("() => new Promise(requestAnimationFrame)")
    assert box.evaluate(below) < 2


@pytest.mark.browser
def test_deeper_than_trained_is_shown_as_such(show, script):
    script.tokens = [(" a", " a", 0), (" b", " b", 5)]
    page = show()
    ask(page, "a")
    finished(page)
    legend = [f"depth {d}" for d in range(6)]
    assert page.locator("#legend .tok").all_text_contents() == legend
    page.reload()
    see(page, "#model", "tiny")
    assert page.locator("#legend .tok").all_text_contents() == legend
    answer_of(page).focus()
    page.keyboard.press("End")
    assert "●●●●● 5, trained with 3" in page.locator("#facts").inner_text()


@pytest.mark.browser
def test_numbers_of_the_server_are_live(show, script):
    page = show()
    see(page, "#speed", "41.3")
    assert page.locator("#pages").text_content() == "7 of 512"
    script.stats |= {"pages_used": 9, "waiting": 4}
    see(page, "#pages", "9 of 512")
    see(page, "#waiting", "4")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_shade_can_be_read_and_400_pixels_are_enough(show, scheme):
    page = show(color_scheme=scheme, viewport={"width": 400, "height": 800})
    ask(page, "word " * 40 + "W" * 200)
    finished(page)
    for colour in ("surprise", "depth"):
        page.get_by_role("radio", name=colour).check()
        assert page.evaluate(CONTRAST.replace(".prose", "#page")) >= 4.5, colour
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 28)"
    assert dark == (scheme == "dark")
    answer_of(page).locator(".tok").first.click()
    assert "depth 1 of 3 · log p −0.50" in page.locator("#bar").inner_text()
    page.locator("#bar").focus()
    page.keyboard.press("Enter")
    assert page.locator("#facts table").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.get_by_label("chat", exact=True).check()
    ask(page, "W" * 200, key="Enter")
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def hold_after(tokens, engine, monkeypatch):
    """The engine waits once, when a request has this many."""
    step, held = engine.step, []

    def step_and_hold():
        outputs = step()
        if not held and any(len(r.token_ids) >= tokens for r in engine.requests.values()):
            held.append(True)
            engine.may_go.clear()
        return outputs

    monkeypatch.setattr(engine, "step", step_and_hold)


@pytest.mark.browser
def test_the_real_server_and_the_page_understand_each_other(show, monkeypatch):
    from tests.server.served import running

    with running() as real, real.client() as client:
        page = show(url=f"{real.url}/")
        page.get_by_label("Seed").fill("5")
        page.get_by_label("Most new tokens").fill("12")
        for mode, path in (("completion", "completions"), ("chat", "chat/completions")):
            page.get_by_role("radio", name=mode).check()
            with page.expect_request(f"**/v1/{path}") as sent:
                ask(page, "Hello")
            finished(page)
            body = sent.value.post_data_json | {"stream": False}
            said = client.post(f"/v1/{path}", json=body).raise_for_status().json()["choices"][0]
            tokens = answer_of(page).locator(".tok")
            text = said["text"] if mode == "completion" else said["message"]["content"]
            assert answer_of(page).text_content() == text != ""
            bars = tokens.evaluate_all("a => a.map((t) => +t.style.getPropertyValue('--bars'))")
            assert bars == said["depths"] and len(set(bars)) > 1
            depth = f"12 tokens · mean depth {said['mean_depth']:.2f} of 3"
            assert depth in answer_of(page).locator("xpath=following-sibling::p").inner_text()
            tokens.nth(4).hover()
            assert "log-probability" in page.locator("#facts").inner_text()
            assert page.locator("#facts tr").count() >= 6, "five alternatives and a head"
        page.get_by_role("radio", name="completion").check()
        page.get_by_role("button", name="Clear").click()
        page.get_by_label("Most new tokens").fill("90")
        hold_after(3, real.engine, monkeypatch)
        ask(page, "Hello")
        answer_of(page).locator(".tok").nth(2).wait_for()
        page.keyboard.press("Escape")
        finished(page)
        real.engine.may_go.set()
        real.wait_until_idle()
        assert answer_of(page).locator(".tok").count() == 3
        see(page, "#page .hint", "stopped by you")
        page.close()  # before the server, which it would miss
