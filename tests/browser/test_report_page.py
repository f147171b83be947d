"""report.html in a real browser, as wide as a desk's screen and a phone's: quiet, self-contained,
nothing sticks out, and its script works."""

import re
from pathlib import Path

import pytest

from p48ray.run.manifest import UnitManifest
from tests.browser.chromium import Chromium

pytestmark = pytest.mark.browser

WIDTHS = (1280, 390)
SIZES = "[innerWidth, document.documentElement.scrollWidth]"
OPEN_ALL = "document.querySelectorAll('details').forEach(d => { d.open = true })"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_page_is_quiet_fetches_nothing_and_does_not_scroll_sideways(
    chromium: Chromium, page_url: str, width: int, scheme: str
) -> None:
    chromium.open(page_url, width, scheme=scheme)
    assert chromium.evaluate(SIZES) == [width, width]
    chromium.evaluate(OPEN_ALL)
    assert chromium.evaluate(SIZES) == [width, width], "with everything unfolded"
    assert chromium.complaints() == []
    assert chromium.requested() == [page_url]


@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_too_wide_scrolls_in_its_own_frame(
    chromium: Chromium, page_url: str, width: int
) -> None:
    chromium.open(page_url, width)
    chromium.evaluate(OPEN_ALL)
    outside = (
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre') &&"
        " !e.classList.contains('cursor') && e.getBoundingClientRect().right > innerWidth +"
        " 0.5).map(e => e.outerHTML.slice(0, 80))"
    )
    assert chromium.evaluate(outside) == []
    assert chromium.evaluate(
        "[...document.querySelectorAll('table')].every(t => t.closest('.scroll'))"
    )
    assert (
        chromium.evaluate(
            "Math.min(...[...document.querySelectorAll('svg text, p, td')].map(e =>"
            " parseFloat(getComputedStyle(e).fontSize)))"
        )
        >= 11
    )


def test_pictures_are_drawn_and_have_words(chromium: Chromium, page_url: str) -> None:
    chromium.open(page_url, 1280)
    drawn = "[...document.images].map(i => [i.naturalWidth, i.naturalHeight, i.clientHeight > 40])"
    assert chromium.evaluate(drawn) == [[16, 4, True]] * 4
    silent = (
        "[...document.querySelectorAll('svg, [role=img]')].filter(e =>"
        " !e.hasAttribute('aria-hidden') && !e.getAttribute('aria-label')).length"
    )
    assert chromium.evaluate(silent) == 0
    assert chromium.evaluate("[document.title.length > 0, document.documentElement.lang]") == [
        True,
        "en",
    ]


def test_dark_pictures_are_others_than_light_ones(chromium: Chromium, page_url: str) -> None:
    found = []
    for scheme in ("light", "dark"):
        chromium.open(page_url, 1280, scheme=scheme)
        found.append(
            chromium.evaluate(
                "[getComputedStyle(document.body).backgroundColor, document.images[0].currentSrc]"
            )
        )
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]


def test_pointer_and_arrow_keys_read_out_an_experts_numbers(
    chromium: Chromium, page_url: str, units: list[UnitManifest]
) -> None:
    chromium.open(page_url, 1280)
    record = next(
        r for u in units for r in u.linears if "layers.3.mlp.experts.5.down_proj" in r.name
    )
    cells = "document.querySelector('[data-heat=down_proj]')"
    read = f"{cells}.closest('figure').querySelector('output').textContent"
    point = (
        f"(() => {{ const b = {cells}.getBoundingClientRect(); {cells}.dispatchEvent(new"
        " PointerEvent('pointermove', {clientX: b.left + b.width * 5.5 / 16, clientY: b.top +"
        " b.height * 2.5 / 4})) })()"
    )
    chromium.evaluate(point)
    words = chromium.evaluate(read)
    assert words.startswith("layer 3, expert 5, down_proj: relative output error ")
    assert float(re.findall(r"error ([\d.e-]+),", words)[0]) == float(
        f"{record.relative_output_error:.4g}"
    )
    assert f", {record.tokens:,} tokens" in words
    chromium.evaluate(f"{cells}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowRight'}}))")
    chromium.evaluate(f"{cells}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowUp'}}))")
    assert chromium.evaluate(read).startswith("layer 2, expert 6, ")


def test_browser_reports_what_these_tests_look_for(chromium: Chromium, tmp_path: Path) -> None:
    """A page with every fault, so that silence above means something."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<meta name="viewport" content="width=device-width"><h1 style="width:2000px">wide</h1><img'
        " src=\"http://127.0.0.1:9/a.png\"><script>console.error('said'); throw new"
        " Error('thrown')</script>"
    )
    chromium.open(bad.as_uri(), 390)
    said = " ".join(chromium.complaints())
    assert "said" in said and "thrown" in said
    assert "http://127.0.0.1:9/a.png" in chromium.requested()
    assert chromium.evaluate("document.documentElement.scrollWidth") > 390
