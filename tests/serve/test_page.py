"""The page to chat, in headless Chromium (Debian's package `chromium`)."""

import json
import re
from importlib import resources

import chromium
import pytest
from serving import BYTES, say_what_user_says, section, serving, tool, wait_until

PAGE = resources.files("k2jax.serve").joinpath("page.html").read_text()
needs_browser = pytest.mark.skipif(not chromium.find(), reason="chromium is not installed")


def script(request):
    """What the user said; after a tool's result, that."""
    _, mark, result = BYTES.decode(request.prompt).rpartition("## Return of functions.f:0\n")
    return f"It is {result.partition('<|im_end|>')[0]}." if mark else say_what_user_says(request)


@pytest.fixture(scope="module")
def server():
    with serving(script, engine={"seconds": 0.002}) as made:
        yield made


@pytest.fixture(scope="module")
def browser():
    with chromium.browser() as tab:
        yield tab


@pytest.fixture
def tab(server, browser):
    browser.open(f"{server.url}/")
    browser.run("localStorage.clear(); fields.forEach(field => { field.value = '' }); true")
    return browser


def say(tab, text):
    tab.run("document.getElementById('prompt').focus()")
    tab.type(text)
    tab.press("Enter", 13)


def wait_for_end(tab):
    tab.wait("!running && document.querySelector('.assistant:not(.busy)') !== null")


def test_it_is_one_small_file_that_asks_for_nothing_from_outside():
    assert len(PAGE) < 24_000
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(""", PAGE)
    # What a model writes is never read as HTML.
    assert "innerHTML" not in PAGE and "insertAdjacentHTML" not in PAGE


def test_fields_have_labels():
    ids = re.findall(r'<(?:textarea|input|select)[^>]*\bid="(\w+)"', PAGE)
    assert all(f'for="{id_}"' in PAGE for id_ in ids)
    named = re.findall(r'<label[^>]*>[^<]+\s*<(?:textarea|input|select)[^>]*name="', PAGE)
    assert len(named) == len(re.findall(r'<(?:textarea|input|select)[^>]*name="', PAGE))


@needs_browser
def test_an_answer_streams_with_its_thought_and_speed(tab, server):
    say(tab, "<think>hm</think>Hello <b>you</b>, w\u00f6rld" + "." * 200)
    tab.wait("document.querySelector('.busy .text')?.textContent.startsWith('Hello')")
    wait_for_end(tab)
    text = tab.run("document.querySelector('.assistant .text').textContent")
    assert text == "Hello <b>you</b>, w\u00f6rld" + "." * 200
    assert tab.run("document.querySelector('details.thought div').textContent") == "hm"
    assert tab.run("document.querySelector('details.thought').open") is False
    facts = tab.run("document.querySelector('.facts span').textContent")
    assert re.search(r"\d+ tokens, [\d.]+ tokens/s, first token after", facts)
    assert tab.run("document.title") == "tiny - k2jax"
    assert all(url.startswith((server.url, "data:")) for url in tab.requested)


@needs_browser
def test_stop_ends_the_answer_on_the_server_too(tab, server):
    before = len(server.engine.aborted)
    say(tab, "a" * 3000)
    tab.wait("(document.querySelector('.busy .text')?.textContent.length || 0) > 5")
    tab.run("document.getElementById('stop').click()")
    wait_for_end(tab)
    # The page is done at once; the server learns of it when the connection has closed.
    wait_until(lambda: len(server.engine.aborted) == before + 1)
    assert tab.run("talk.at(-1).content.length") < 3000
    assert "(stopped)" in tab.run("document.querySelector('.facts').textContent")
    say(tab, "again")  # what was stopped is part of the conversation
    tab.wait("talk.length === 4 && !running")
    assert tab.run("talk.at(-1).content") == "again"


@needs_browser
def test_calls_are_shown_and_take_results(tab):
    tab.run(f"fields.find(f => f.name === 'tools').value = {json.dumps(json.dumps([tool('f')]))}")
    say(tab, section(("functions.f:0", '{"city": "Paris"}')))
    wait_for_end(tab)
    assert tab.run("document.querySelector('.call b').textContent") == "f functions.f:0"
    shown = tab.run("document.querySelector('.call pre').textContent")
    assert json.loads(shown) == {"city": "Paris"} and "\n" in shown
    tab.run("document.querySelector('.call textarea').value = '15C'")
    tab.run("document.querySelector('.call').parentNode.querySelector(':scope > button').click()")
    tab.wait("talk.length === 4 && !running")
    assert tab.run("talk.at(-1).content") == "It is 15C."


@needs_browser
def test_settings_are_sent_and_kept_and_a_mistake_is_shown(tab, server):
    tab.run("document.getElementById('open-settings').click()")
    tab.run("fields.find(f => f.name === 'temperature').value = '0.25'")
    tab.run("fields.find(f => f.name === 'system').value = 'Be brief.'")
    tab.run("document.querySelector('dialog button.main').click()")
    say(tab, "ok")
    wait_for_end(tab)
    request = server.engine.requests[-1]
    assert request.sampling.temperature == 0.25 and "Be brief." in BYTES.decode(request.prompt)
    tab.call("Page.reload")
    tab.wait("document.readyState === 'complete' && fields[0].value === '0.25'")
    tab.run("fields[0].value = '9'")
    say(tab, "ok")
    tab.wait("!document.getElementById('error').hidden")
    assert "temperature" in tab.run("document.getElementById('error').textContent")


@needs_browser
def test_it_is_dark_where_the_browser_is(tab):
    seen = []
    for scheme in ("light", "dark"):
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        tab.call("Emulation.setEmulatedMedia", features=media)
        color = tab.run("getComputedStyle(document.body).backgroundColor")
        seen.append(sum(map(int, re.findall(r"\d+", color))))
    assert seen[0] > 600 and seen[1] < 150


@needs_browser
def test_it_fits_a_narrow_screen(tab):
    size = {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    tab.call("Emulation.setDeviceMetricsOverride", **size)
    try:
        say(tab, "a" * 300)
        wait_for_end(tab)
        assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    finally:
        tab.call("Emulation.clearDeviceMetricsOverride")
