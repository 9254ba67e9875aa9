"""The console in a real browser: headless Chromium against a real service."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from allocator.contract.manifest import Manifest
from tests.helm.charts import CHART, Helm, by_kind, render

from .browser import Page, browser, needs_chromium
from .conftest import gamma
from .replicas import in_turn
from .serving import Running, running

pytestmark = [
    pytest.mark.slow,
    needs_chromium,
]
SHOWN = ("#map svg", "#curve path", ".answer:not(.busy)")
READY = " && ".join(f"document.querySelector('{what}')" for what in SHOWN)
BOX = "e.getBoundingClientRect()"
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


@pytest.mark.parametrize(("scheme", "width"), [(s, w) for w in (360, 768, 1280) for s in ("light", "dark")])
def test_nothing_is_cut_off(page: Page, sidecar: Running, scheme: str, width: int) -> None:
    page.size(width, 740, mobile=width < 500)
    page.scheme(scheme)
    page.open("about:blank")
    page.open(f"{sidecar.url}/{TINY}")
    page.until(READY)
    assert page.js("document.documentElement.scrollWidth") <= width
    page.js("document.querySelector('#verdict small').textContent = 'sha256:' + '0'.repeat(64)")
    page.js("document.querySelector('#job').textContent = 'Done: /store/checkpoints/' + '0'.repeat(64)")
    assert page.js("document.documentElement.scrollWidth") <= width
    assert page.js(f"[...document.querySelectorAll('#verdict small, #job')].every((e) => {BOX}.right <= {width})")
    apart = "{code: document.querySelector('#code'), copy: document.querySelector('#copy')}"
    code, copy = page.js(f"Object.values({apart}).map((e) => {BOX}.toJSON())")
    text = page.js("(() => { const r = document.createRange(); r.selectNodeContents(document.querySelector('#code'));"
                   " return [...r.getClientRects()].map((b) => b.toJSON()); })()")  # fmt: skip
    seen = [line for line in text if line["left"] < code["right"]]
    assert seen
    assert not [
        b
        for b in seen
        if min(b["right"], code["right"]) > copy["left"] and b["bottom"] > copy["top"] and b["top"] < copy["bottom"]
    ]
    unlabelled = """[...document.querySelectorAll('input, select, button')].filter((e) => e.getClientRects().length &&
        !(e.labels && e.labels.length) && !e.textContent.trim() && !e.getAttribute('aria-label')).length"""
    assert page.js(unlabelled) == 0
    colours = page.js("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color].join()")
    dark = "rgb(19, 20, 22)" in colours
    assert dark == (scheme == "dark")


def _open(page: Page, sidecar: Running, state: str, until: str = READY) -> Page:
    page.size(1280, 900)
    page.open("about:blank")
    page.open(f"{sidecar.url}/#{state}")
    page.until(until)
    return page


def _text(page: Page, what: str) -> str:
    return str(page.js(f"document.querySelector({what!r}).textContent"))


def test_advice_to_take_another_gpu_takes_it(page: Page, sidecar: Running) -> None:
    _open(page, sidecar, "model=Qwen3-32B&gpu=rtx4060&length=256")
    assert _text(page, "#advice button").startswith("--gpu ")
    gpu = _text(page, "#advice button").removeprefix("--gpu ")
    page.js("document.querySelector('#advice button').click()")
    page.until("document.querySelector('#verdict b').textContent === 'Fits.'")
    assert page.js("document.querySelector('#gpu').value") == gpu


def test_what_does_not_fit_is_drawn_over_the_limit_and_not_made(page: Page, sidecar: Running) -> None:
    """It is the share that vLLM may use that is exceeded, though the card has more than that."""
    _open(page, sidecar, "model=Qwen3-32B&gpu=rtx4090&length=8192&bytes=21000000000")
    missing = _text(page, "#memory-legend li:last-child b")
    assert missing in _text(page, "#verdict")
    assert "too much" in _text(page, "#memory-legend")
    assert "left to others" not in _text(page, "#memory-legend")
    assert page.js("document.querySelectorAll('#memory-bar .m-over').length") == 2
    assert page.js("document.querySelector('#make').disabled")
    commands = (
        "['.tabs', '#pane', '#copy'].filter((what) => document.querySelector(what).getClientRects().length).length"
    )
    assert page.js(commands) == 0
    assert page.js("document.querySelector('#use-not').getClientRects().length") == 1
    page.js("document.querySelector('#fit').click()")
    page.until("document.querySelector('#verdict b').textContent === 'Fits.'")
    assert not page.js("document.querySelector('#make').disabled")
    assert page.js(commands) == 3
    assert page.js("document.querySelector('#use-not').getClientRects().length") == 0
    assert "left to others" in _text(page, "#memory-legend")


def test_a_wrong_value_leaves_no_other_answer_standing(page: Page, sidecar: Running) -> None:
    _open(page, sidecar, "model=Qwen3-32B&gpu=rtx4090&length=8192")
    change = "(() => { const e = document.querySelector('#length'); e.value = %r; %s })()"
    told = "e.dispatchEvent(new Event('change', {bubbles: true}));"
    visible = "['#code', '#map'].reduce((n, what) => n + document.querySelector(what).getClientRects().length, 0)"
    for value in ("9999999", "0", ""):
        page.js(change % (value, told))
        page.until("document.querySelector('.verdict.bad')")
        assert _text(page, "#verdict b") == "Context, tokens:"
        assert page.js(visible) == 0
        assert page.js("document.querySelector('#length').getAttribute('aria-invalid')") == "true"
        page.js(change % ("8192", told))
        page.until("document.querySelector('.verdict.good')")
        assert page.js(visible) > 0
        assert not page.js("document.querySelector('#length').hasAttribute('aria-invalid')")


@pytest.mark.parametrize("size", [11_500_000_000, 20_000_000_000, 65_000_000_000])
def test_what_is_chosen_lies_on_the_chart_and_axes_have_titles(page: Page, sidecar: Running, size: int) -> None:
    _open(page, sidecar, f"model=Qwen3-32B&gpu=b200&length=8192&fusion=free&bytes={size}")
    inside = """(() => { const d = document.querySelector('#curve .dot').getBoundingClientRect(),
        h = document.querySelector('#curve .hit').getBoundingClientRect();
        const x = (d.left + d.right) / 2, y = (d.top + d.bottom) / 2;
        return x >= h.left - 1 && x <= h.right + 1 && y >= h.top - 1 && y <= h.bottom + 1; })()"""
    assert page.js(inside)
    titles = page.js("[...document.querySelectorAll('#curve .axis-title')].map((e) => e.textContent)")
    assert titles == ["size of the checkpoint", "predicted loss, nats a token"]
    numbers = page.js(
        "[...document.querySelectorAll('#curve text')].map((e) => Number(e.textContent)).filter(isFinite)"
    )
    assert numbers
    assert max(numbers) <= 3
    assert (_text(page, "#f-loss").startswith("unusable")) == (size < 15_000_000_000)


@contextmanager
def _refusing(page: Page, where: str, code: int, **error: str) -> Iterator[None]:
    """The service's answer to requests for which `where` (JavaScript of `url` and `body`) holds is this error."""
    source = f"""(() => {{ const real = window.fetch; window.fetch = (url, options = {{}}) => {{
        const body = String(options.body || '');
        if (!({where.replace("url", "String(url)")})) return real(url, options);
        return Promise.resolve(new Response({json.dumps(json.dumps({"error": error}))},
            {{status: {code}, headers: {{'content-type': 'application/json'}}}}));
    }}; }})()"""
    made = page.send("Page.addScriptToEvaluateOnNewDocument", source=source)
    try:
        yield
    finally:
        page.send("Page.removeScriptToEvaluateOnNewDocument", identifier=made["identifier"])


def test_a_curve_that_fails_leaves_the_answer_standing(page: Page, sidecar: Running) -> None:
    with _refusing(page, "url.includes('v1/sweeps')", 500, type="internal", message="the solvers are gone"):
        _open(page, sidecar, TINY[1:], "document.querySelector('#curve').textContent === 'the solvers are gone'")
        assert _text(page, "#verdict b") == "Fits."
        assert page.js("document.querySelectorAll('#map svg rect').length") > 14
        assert _text(page, "#code").startswith("vllm serve")


def test_a_size_that_nothing_fits_is_let_go(page: Page, sidecar: Running) -> None:
    """The slider is hidden then, so that nobody could take it back."""
    refused = {"type": "infeasible_budget", "message": "no assignment is so small", "param": "budget"}
    with _refusing(page, """url.includes('v1/fits') && body.includes('"budget"')""", 422, **refused):
        _open(page, sidecar, f"{TINY[1:]}&bytes=100000", "document.querySelector('.verdict.bad')")
        assert "no assignment is so small" in _text(page, "#verdict")
        page.js("document.querySelector('#gpu').value = 'l40s'")
        page.js("document.querySelector('#gpu').dispatchEvent(new Event('change', {bubbles: true}))")
        page.until("document.querySelector('#verdict b').textContent === 'Fits.'")
        assert "bytes=" not in page.js("location.hash")


def test_an_empty_store_says_how_to_add_a_model(page: Page, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with running(tmp_path / "log", "--store", tmp_path / "store") as service:
        page.size(1280, 900)
        page.problems.clear()
        page.open(service.url)
        page.until("document.querySelector('#verdict b').textContent === 'The store is empty.'")
        assert "gamma store add work --model MODEL" in page.js("document.body.innerText")
        assert not page.js("document.querySelector('#controls').getClientRects().length")
        assert page.problems == []


def test_a_page_needs_no_replica_twice(page: Page, store: Path, tmp_path: Path) -> None:
    """The chart's cluster sidecar: two replicas that write nothing, asked in turn."""
    flags = ["--store", store, "--read-only"]
    with (
        running(tmp_path / "log1", *flags) as one,
        running(tmp_path / "log2", *flags) as two,
        in_turn(one, two) as url,
    ):
        page.size(1280, 900)
        page.problems.clear()
        page.open(f"{url}/{TINY}")
        page.until(READY)
        page.js("document.querySelector('#pin').click()")
        page.until("document.querySelector('#diff').textContent.startsWith('0 of 15 modules differ')")
        page.js("document.querySelector('#budget').value = 200")
        page.js("document.querySelector('#budget').dispatchEvent(new Event('input'))")
        page.until("document.querySelectorAll('#diff tbody tr').length > 2")
        assert page.problems == []
        gamma("remote", "allocate", "tiny", "--budget", "180kB", "--out", tmp_path / "manifest.json", "--url", url)
        assert Manifest.read(tmp_path / "manifest.json").tensor_bytes <= 180_000


def test_one_width_a_layer_is_what_a_gpu_gets_and_every_command_says_which(page: Page, sidecar: Running) -> None:
    """Without a word prepare and chart take one width on a GPU, and solve takes a width each."""
    _open(page, sidecar, "model=tiny&gpu=l4&length=128&bytes=120000")
    page.until("document.querySelector('#fusion-hint').textContent.startsWith('One width costs ')")
    page.js("document.querySelector('#fusion-hint').textContent = ''")
    page.size(1000, 900)  # draws the page anew
    page.until("document.querySelector('#fusion-hint').textContent.startsWith('One width costs ')")
    assert "gamma solve WORK/scores.json" in _text(page, "#code")
    for tab, said in (("serve", "--fusion tied"), ("helm", "fusion: tied"), ("prepare", "--fusion tied")):
        page.js(f"document.querySelector('#tab-{tab}').click()")
        assert said in _text(page, "#code")
    page.js("document.querySelector('input[name=fusion][value=free]').click()")
    for tab, said in (("helm", "fusion: free"), ("prepare", "--fusion free")):
        page.js(f"document.querySelector('#tab-{tab}').click()")
        page.until(f"document.querySelector('#code').textContent.includes({said!r})")
    page.js("document.querySelector('#tab-serve').click()")
    assert "fusion" not in _text(page, "#code")
    page.until("document.querySelector('#fusion-hint').textContent.startsWith('One width costs ')")


def test_while_it_is_worked_out_the_page_says_so(page: Page, sidecar: Running) -> None:
    never = """(() => { const real = window.fetch; window.fetch = (url, options) =>
        String(url).includes('v1/fits') ? new Promise(() => {}) : real(url, options); })()"""
    made = page.send("Page.addScriptToEvaluateOnNewDocument", source=never)
    try:
        _open(
            page,
            sidecar,
            TINY[1:],
            "document.querySelector('#verdict').textContent.startsWith('Working out what fits')",
        )
        assert page.js("document.querySelector('#verdict').getClientRects().length") == 1
    finally:
        page.send("Page.removeScriptToEvaluateOnNewDocument", identifier=made["identifier"])


def test_names_of_points_cover_no_others(page: Page, sidecar: Running) -> None:
    page.size(360, 740, mobile=True)
    page.open("about:blank")
    page.open(f"{sidecar.url}/#model=Qwen3-32B&gpu=rtx4090&length=8192&fusion=free")
    page.until(READY)
    boxes = page.js("[...document.querySelectorAll('#curve text')].filter((e) => e.textContent.startsWith('all '))"
                    ".map((e) => e.getBoundingClientRect().toJSON())")  # fmt: skip
    assert len(boxes) >= 2
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            apart = (
                a["left"] >= b["right"] or b["left"] >= a["right"] or a["top"] >= b["bottom"] or b["top"] >= a["bottom"]
            )
            assert apart


def test_helm_values_of_every_gpu_are_taken_by_the_chart(page: Page, sidecar: Running, tmp_path: Path) -> None:
    """Also of those that the chart has no profile for, and of a GPU that is known by its memory only."""
    _open(page, sidecar, "model=tiny&gpu=l4&length=128")
    code = """(async () => { const { helmValues, CHART_PROFILES } = await import('./format.js');
        const common = {model: 'tiny', count: 1, length: 128, sequences: 1, kv: 'auto', utilization: 0.92,
                        automatic: true, fusion: 'free'};
        const gpus = (await (await fetch('v1/gpus')).json()).data;
        const of = (g) => helmValues({...common, gpu: g.id, productLabel: g.product_label});
        const byMemory = (memory) => helmValues({...common, gpu: '', memory, deviceBytes: 24 * 2 ** 30});
        return [CHART_PROFILES, ...gpus.map(of), ...['24GiB', '24 GB', '24_000_000_000'].map(byMemory)]; })()"""
    profiles, *exported = page.js(code)
    chart = yaml.safe_load((CHART / "values.yaml").read_text())["gpuProfiles"]
    assert set(profiles) <= chart.keys()
    values = [yaml.safe_load(text) for text in exported]
    assert len(values) > 60
    merged: dict = {"store": {"url": "s3://models/gamma"}, "allocations": [], "gpuProfiles": {}}
    for i, one in enumerate(values):
        (allocation,) = one["allocations"]
        assert allocation["gpu"] != "any"
        assert allocation["gpu"] in chart | one.get("gpuProfiles", {})
        merged["allocations"].append(allocation | {"name": f"a{i}"})
        merged["gpuProfiles"] |= one.get("gpuProfiles", {})
    deployments = by_kind(render(Helm("helm4"), merged), "Deployment")
    pods = {pod["metadata"]["labels"]["gamma/allocation"]: pod["spec"]["template"]["spec"] for pod in deployments}
    assert len(pods) == len(values)
    selectors = [pod.get("nodeSelector", {}).get("nvidia.com/gpu.product") for pod in pods.values()]
    assert sum(label is None for label in selectors) == 3  # by memory


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
