"""The console in a real browser: headless Chromium against a real service."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .browser import Page, browser, needs_chromium
from .serving import Running, running

pytestmark = [
    pytest.mark.slow,
    needs_chromium,
]
SHOWN = ("#map svg", "#curve path", ".answer:not(.busy)")
READY = " && ".join(f"document.querySelector('{what}')" for what in SHOWN)
TINY = "#model=tiny&gpu=l4&length=128"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture
def console(page: Page, sidecar: Running) -> Page:
    page.size(1280, 900)
    page.scheme("light")
    page.open("about:blank")
    page.problems.clear()
    page.open(f"{sidecar.url}/{TINY}")
    page.until(READY)
    return page


def _size(page: Page) -> str:
    return str(page.js("document.querySelector('#f-size small').textContent"))


def test_it_answers_and_breaks_no_policy(console: Page) -> None:
    assert console.js("document.querySelector('#verdict b').textContent") == "Fits."
    assert console.js("document.querySelectorAll('#map svg rect').length") > 14
    assert console.js("document.querySelectorAll('#memory-legend li').length") >= 5
    assert console.problems == []


def test_the_slider_works_by_keyboard(console: Page) -> None:
    before = _size(console)
    console.js("document.querySelector('#budget').focus()")
    console.key("ArrowLeft", 900)
    console.until(f"document.querySelector('#f-size small').textContent !== {before!r} && {READY}")
    assert "GiB" in console.js("document.querySelector('#budget').ariaValueText") or "MiB" in console.js(
        "document.querySelector('#budget').getAttribute('aria-valuetext')"
    )
    assert "bytes=" in console.js("location.hash")
    console.js("document.querySelector('#fit').click()")
    console.until(f"document.querySelector('#f-size small').textContent === {before!r} && {READY}")


def test_the_heat_map_is_read_with_the_arrow_keys(console: Page) -> None:
    console.js("document.querySelector('#map').focus()")
    console.key("ArrowRight")
    console.key("ArrowDown", 2)
    assert console.js("document.querySelector('#map-readout').textContent").startswith("Block 0, self_attn.v_proj: ")


def test_two_assignments_are_compared(console: Page) -> None:
    console.js("document.querySelector('#pin').click()")
    console.until("document.querySelector('#diff').textContent.startsWith('0 of 15 modules differ')")
    console.js("document.querySelector('#budget').value = 200")
    console.js("document.querySelector('#budget').dispatchEvent(new Event('input'))")
    console.until("document.querySelectorAll('#diff tbody tr').length > 2")
    assert console.js("document.querySelectorAll('#map .changed').length") > 0


def test_commands_can_be_copied_and_name_what_was_chosen(console: Page) -> None:
    assert console.js("document.querySelector('#code').textContent").startswith("vllm serve ./tiny-gamma")
    console.js("document.querySelector('#tab-serve').focus()")
    console.key("ArrowRight")
    values = console.js("document.querySelector('#code').textContent")
    assert "allocations:\n  - name: tiny\n" in values
    assert "budget: auto" in values
    console.key("ArrowRight")
    assert "gamma prepare tiny --store" in console.js("document.querySelector('#code').textContent")


def test_a_checkpoint_is_made_from_the_page(console: Page) -> None:
    console.js("document.querySelector('#make').click()")
    console.until("document.querySelector('#job').textContent.startsWith('Done: ')", 120)
    folder = Path(console.js("document.querySelector('#job').textContent").removeprefix("Done: "))
    assert (folder / "model.safetensors").exists()
    assert str(folder) in console.js("document.querySelector('#code').textContent")


def test_advice_makes_it_fit(page: Page, sidecar: Running) -> None:
    page.open("about:blank")
    page.open(f"{sidecar.url}/#model=Qwen3-32B&gpu=rtx4090&length=40960&sequences=8")
    page.until("document.querySelector('#verdict b')?.textContent === 'Does not fit.'")
    page.js("document.querySelector('#advice button').click()")
    page.until("document.querySelector('#verdict b').textContent === 'Fits.'")


def test_what_is_too_large_is_drawn_as_large_as_it_is(page: Page, sidecar: Running) -> None:
    page.open("about:blank")
    page.open(f"{sidecar.url}/#model=Qwen3-32B&gpu=rtx4090&length=8192&bytes={33 << 30}")
    page.until(f"document.querySelector('#verdict b')?.textContent === 'Does not fit.' && {READY}")
    assert page.js("document.querySelector('#f-size').textContent").startswith("33.00 GiB")
    weights, *_, too_much = page.js("[...document.querySelectorAll('#memory-legend b')].map((b) => b.textContent)")
    assert weights.startswith("33.0")  # after loading, a little more than in the file
    assert too_much in page.js("document.querySelector('#verdict').textContent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off(page: Page, sidecar: Running, scheme: str) -> None:
    page.size(360, 740, mobile=True)
    page.scheme(scheme)
    page.open("about:blank")
    page.open(f"{sidecar.url}/{TINY}")
    page.until(READY)
    assert page.js("document.documentElement.scrollWidth") <= 360
    unlabelled = """[...document.querySelectorAll('input, select, button')].filter((e) => e.getClientRects().length &&
        !(e.labels && e.labels.length) && !e.textContent.trim() && !e.getAttribute('aria-label')).length"""
    assert page.js(unlabelled) == 0
    colours = page.js("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color].join()")
    dark = "rgb(19, 20, 22)" in colours
    assert dark == (scheme == "dark")


def test_a_token_is_asked_for_and_used(page: Page, store: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("read reader-token-0123456789\n")
    with running(tmp_path / "log", "--store", store, "--token-file", tokens) as service:
        page.size(1280, 900)
        page.open(f"{service.url}/{TINY}")
        page.until("document.querySelector('#token-dialog').open")
        page.js("document.querySelector('#token').value = 'reader-token-0123456789'")
        page.js("document.querySelector('#token-form button[type=submit]').click()")
        page.until(READY)
        page.js("document.querySelector('#make').click()")
        page.until("document.querySelector('#job').textContent.includes('write token')")
