"""report.html: its numbers are the report's, every expert is in its pictures, and nothing in it is
fetched or executed that should not be."""

import base64
import hashlib
import json
import math
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from unittest.mock import Mock

import pytest
import torch

from p48ray.checkpoint.index import open_checkpoint
from p48ray.finished.converter import convert_folder
from p48ray.report import run_sections, sample
from p48ray.report.gains import gains
from p48ray.report.html import report_html
from p48ray.report.inspect import inspect_linear
from p48ray.report.report import build_report, few_tokens
from p48ray.report.run_sections import idle
from p48ray.report.sample import mask_overlap, sample_checkpoint
from p48ray.report.scales import Scale, time_ticks
from p48ray.report.spans import Span
from p48ray.report.work import Extrapolation
from p48ray.run import run_root
from p48ray.run.manifest import LadderStep, LinearRecord, UnitManifest
from p48ray.run.plan import plan_units
from p48ray.stages.evaluate import EvaluationResult
from p48ray.store import LocalStore, MemoryStore
from p48ray.store.view import SubStore
from p48ray.unit.context import StageContext
from tests.stages.small_run import SmallRun

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
NO_VALUE = 255


class Page(HTMLParser):
    """What the tests look at: text by section, pictures by name, attributes that could load
    something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: Counter[str] = Counter()
        self.words: dict[str, str] = {}
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.policy, self.pictures, self.loads = "", {}, []  # type: ignore[var-annotated]
        self.tags: Counter[str] = Counter()
        self.section, self.heat, self.open = "top", "", ""
        self.feed(text)
        self.words = {section: re.sub(r"\s+", " ", words) for section, words in self.words.items()}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags[tag] += 1
        self.open = tag
        if tag == "section":
            self.section = found["id"] or ""
        elif tag == "meta" and found.get("http-equiv"):
            self.policy = found["content"] or ""
        elif tag == "script":
            self.scripts.append((found, ""))
        elif tag == "div" and "data-heat" in found:
            self.heat = found["data-heat"] or ""
        elif tag == "img":
            self.pictures[self.heat] = decode_png(found["src"] or "")
        self.loads += [
            v
            for k, v in attrs
            if k in ("src", "href", "srcset", "xlink:href", "action", "data") and v
        ]
        assert not any(name.startswith("on") for name in found), (tag, found)

    def handle_data(self, data: str) -> None:
        if self.open == "script" and self.scripts:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self.open != "style":
            self.words[self.section] = self.words.get(self.section, "") + " " + data

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    @property
    def data(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(
            next(body for attrs, body in self.scripts if attrs.get("id") == "data")
        )
        return found


def decode_png(uri: str) -> list[list[int]]:
    """Palette indices of an indexed PNG without filters."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    at, packed = 8, b""
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        assert zlib.crc32(data[at + 4 : at + 8 + size]) == int.from_bytes(
            data[at + 8 + size : at + 12 + size]
        )
        packed += data[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += 12 + size
    raw = zlib.decompress(packed)
    assert len(raw) == height * (width + 1)
    return [list(raw[y * (width + 1) + 1 : (y + 1) * (width + 1)]) for y in range(height)]


@pytest.fixture(scope="module")
def units(finished: SmallRun) -> list[UnitManifest]:
    return [
        UnitManifest.load(finished.prepared.store, run_root.unit_manifest(u.id))
        for u in finished.prepared.plan.units
    ]


@pytest.fixture(scope="module")
def page(finished: SmallRun, units: list[UnitManifest]) -> Page:
    return Page(report_html(finished.context, finished.report, units))


def changed(
    units: list[UnitManifest], pick: Callable[[LinearRecord], bool], **fields: object
) -> list[UnitManifest]:
    """Units with some fields of the picked records replaced."""
    return [
        u.model_copy(
            update={
                "linears": tuple(r.model_copy(update=fields) if pick(r) else r for r in u.linears)
            }
        )
        for u in units
    ]


def test_page_has_every_section(page: Page) -> None:
    assert list(page.words) == [
        "top",
        "quality",
        "domains",
        "ladder",
        "timeline",
        "errors",
        "routing",
        "outcomes",
        "scales",
        "regularization",
        "masks",
        "cost",
        "made",
    ]


def test_quality_is_the_reports(finished: SmallRun, units: list[UnitManifest], page: Page) -> None:
    q = finished.report.quality
    assert q is not None
    for value in (
        q.source_perplexity,
        q.compressed_perplexity,
        q.source_accuracy,
        q.compressed_accuracy,
        q.kl,
    ):
        assert f" {value:.4f} " in page.words["quality"] + " "
    assert "192 held-out tokens" in page.words["quality"]
    assert "one-shot" not in page.words["quality"]
    other = EvaluationResult(
        num_tokens=777,
        source_perplexity=2.0,
        source_accuracy=0.9,
        compressed_perplexity=3.0,
        compressed_accuracy=0.8,
        kl=0.5,
    )
    report = finished.report.model_copy(
        update={
            "quality": other,
            "baseline": other.model_copy(update={"kl": 0.625, "compressed_perplexity": 5.5}),
        }
    )
    both = Page(report_html(finished.context, report, units))
    for words in (
        "777 held-out tokens",
        "one-shot baseline 0.6250 5.5000 +175.00% 0.8000",
        "0.5000 3.0000 +50.00% 0.8000",
    ):
        assert words in re.sub(r"\s+", " ", both.words["quality"])
    assert "0.80 × the one-shot's 0.6250" in both.words["top"]
    assert "sparse kernels" not in both.words["quality"]
    assert q.in_groups_of_32 is not None
    assert (
        f"the same on sparse kernels {q.in_groups_of_32.kl:.4f} {q.in_groups_of_32.perplexity:.4f}"
        in page.words["quality"]
    )


def test_bars_of_kl_are_on_one_scale_wherever_they_stand(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    """The longest is the worst that is shown: here the result on sparse kernels."""
    own = finished.report.quality
    assert own is not None and own.in_groups_of_32 is not None
    sparse = own.in_groups_of_32.model_copy(update={"kl": 0.8})
    own = own.model_copy(update={"kl": 0.2, "in_groups_of_32": sparse})
    update = {"quality": own, "baseline": own.model_copy(update={"kl": 0.4})}
    report = build_report(finished.context, units, finished.prepared.shards, own, {})
    text = report_html(finished.context, report.model_copy(update=update), units)
    quality, _, rest = text.partition('<section id="quality">')[2].partition("</section>")
    lengths = re.findall(r'<b class="s\d" style="width:([\d.]+)%', quality)
    assert lengths == ["0.000", "50.000", "25.000", "100.000"]
    ladder = rest.partition("the whole checkpoint: KL")[2].partition("</figure>")[0]
    assert re.findall(r'<b class="s\d" style="width:([\d.]+)%', ladder) == ["50.000", "25.000"]


def test_single_bar_that_says_nothing_is_not_drawn(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    assert finished.report.quality is not None
    own = finished.report.quality.model_copy(update={"in_groups_of_32": None})
    report = finished.report.model_copy(update={"quality": own})
    text = report_html(finished.context, report, units)

    def section(name: str) -> str:
        return text.partition(f'<section id="{name}">')[2].partition("</section>")[0]

    assert 'class="bar"' not in section("quality") and f"{own.kl:.4f}" in section("quality")
    assert 'class="stack"' not in section("outcomes") and "solved 192" in section("outcomes")
    assert 'class="stack"' in section("cost")


def test_error_ladder_has_one_scale_for_both_sides(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    climbed = with_ladder(
        units, ("dense", 0.01, 0.02), ("block_descent", 0.02, 0.04), is_weighted=False
    )
    report = build_report(finished.context, climbed, finished.prepared.shards, None, {})
    text = report_html(finished.context, report, climbed).partition('<section id="ladder">')[2]
    lengths = re.findall(r'<b class="s\d" style="width:([\d.]+)%', text.partition("</section>")[0])
    assert lengths == ["25.000", "50.000", "50.000", "100.000"]


def test_page_says_what_is_gained_where_the_sizes_are_equal(
    finished: SmallRun, units: list[UnitManifest], page: Page
) -> None:
    """Counted from the files: the sample's experts are INT4 with a bf16 scale for 32 weights."""
    assert "experts' bits a weight 4.50 source 4.50; sparse 2.75 (0.61 ×)" in page.words["top"]
    assert (
        "take 4.50 bits a weight in the source, stored as int4, and 4.50 in NVFP4, dense. At the"
        " same size it is the arithmetic that is gained: weights and activations of their products"
        " have 4 bits (W4A4). In sparse storage ( p48ray convert , without loss) the same weights"
        " take 2.75 bits, 0.61 times the bytes of the dense form."
    ) in page.words["cost"]
    found = gains(finished.context)
    weights = sum(
        math.prod(e.shape) * 2
        for name, e in open_checkpoint(LocalStore(finished.checkpoint)).tensors.items()
        if ".mlp.experts." in name and name.endswith("weight_packed")
    )
    assert found.dense == pytest.approx(8 * finished.report.expert_bytes / weights)
    dense = with_compression(finished.context, sparsity="dense")
    assert gains(dense).sparse is None and gains(dense).sparse_ratio == 1.0
    assert gains(with_compression(finished.context, scale_span=16)).sparse is None
    words = Page(report_html(dense, finished.report, units)).words
    assert "sparse 2" not in words["top"] and "In sparse storage" not in words["cost"]


def with_compression(context: StageContext, **compression: object) -> StageContext:
    """A context with other settings of `compression`."""
    config = context.plan.config
    changed = config.compression.model_copy(update=compression)
    plan = context.plan.model_copy(
        update={"config": config.model_copy(update={"compression": changed})}
    )
    return replace(context, plan=plan)


def test_baseline_as_good_as_the_result_is_still_the_baseline(
    finished: SmallRun,
    units: list[UnitManifest],
) -> None:
    report = finished.report.model_copy(update={"baseline": finished.report.quality})
    text = report_html(finished.context, report, units).partition('<section id="quality">')[2]
    text = text.partition("</section>")[0]
    assert text.count("<strong>") == 5 and "<strong>block_descent, paired-4:8</strong>" in text
    assert text.count('<b class="s5"') == 1


def test_run_without_evaluation_shows_no_quality(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    found = Page(
        report_html(finished.context, finished.report.model_copy(update={"quality": None}), units)
    )
    assert "quality" not in found.words
    assert "perplexity" not in found.words["top"]


def with_ladder(
    units: list[UnitManifest], *steps: tuple[str, float, float], is_weighted: bool
) -> list[UnitManifest]:
    """Units that have measured these steps: name, error of gate and up, of down; the first unit's
    are twice the others'."""
    found = []
    for i, unit in enumerate(units):
        rungs = []
        for step, gate_up, down in steps:
            errors = {"gate_up": gate_up * (2 - bool(i)), "down": down * (2 - bool(i))}
            weighted = {side: value / 10 for side, value in errors.items()} if is_weighted else {}
            rungs.append(LadderStep(step=step, output_error=errors, loss_error=weighted))
        found.append(unit.model_copy(update={"ladder": tuple(rungs)}))
    return found


def test_ladder_shows_every_step_and_kl_only_where_it_was_measured(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    climbed = with_ladder(
        units,
        ("dense", 0.01, 0.02),
        ("one_shot", 0.04, 0.08),
        ("block_descent", 0.02, 0.04),
        is_weighted=False,
    )
    mean = 1 + 1 / len(units)
    for quality, baseline in (
        (None, None),
        (finished.report.quality, None),
        (finished.report.quality, finished.report.quality),
    ):
        report = build_report(
            finished.context, climbed, finished.prepared.shards, quality, {}
        ).model_copy(update={"baseline": baseline})
        words = re.sub(
            r"\s+", " ", Page(report_html(finished.context, report, climbed)).words["ladder"]
        )
        for name, errors in (
            ("NVFP4, dense", (0.01, 0.02)),
            ("one-shot", (0.04, 0.08)),
            ("block descent", (0.02, 0.04)),
        ):
            for error in errors:
                assert f" {name} {error * mean:.4f} " in words
        assert ("one-shot, as published" in words) == (baseline is not None)
        if quality is not None and baseline is not None:
            assert f"this checkpoint {quality.kl:.4f}" in words
        else:
            assert "KL" not in words, "a bar that stands alone says nothing"
        assert f"the mean of {len(units)} experts" in words and "without the metric" not in words


def test_ladder_of_a_run_with_gradients_is_in_their_metric_first(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    climbed = with_ladder(
        units[1:], ("dense", 0.01, 0.02), ("refined", 0.5, 0.25), is_weighted=True
    )
    report = build_report(
        finished.context,
        [units[0].model_copy(update={"ladder": ()}), *climbed],
        finished.prepared.shards,
        None,
        {},
    )
    assert [(m.step, m.experts) for m in report.ladder] == [
        ("dense", len(units) - 1),
        ("refined", len(units) - 1),
    ]
    words = Page(report_html(finished.context, report, climbed)).words["ladder"]
    shown, _, plain = words.partition("the same without the metric")
    mean = 1 + 1 / (len(units) - 1)
    assert f"{0.05 * mean:.4f}" in shown and f"{0.5 * mean:.4f}" not in shown
    assert f"{0.5 * mean:.4f}" in plain


def test_run_of_before_has_no_ladder(finished: SmallRun, units: list[UnitManifest]) -> None:
    bare = [u.model_copy(update={"ladder": ()}) for u in units]
    report = build_report(finished.context, bare, finished.prepared.shards, None, {})
    assert report.ladder == ()
    assert "ladder" not in Page(report_html(finished.context, report, bare)).words


def test_errors_outcomes_clipping_and_sizes_are_the_reports(
    finished: SmallRun, units: list[UnitManifest], page: Page
) -> None:
    for projection, errors in finished.report.relative_output_error.items():
        assert (
            f"{projection}: mean {errors.mean:.4f}, worst {errors.worst:.4f}"
            in page.words["errors"]
        )
    assert "solved 192" in page.words["outcomes"]
    for count in (
        finished.report.source_bytes,
        finished.report.checkpoint_bytes,
        finished.report.expert_bytes,
    ):
        assert f"{count:,}" in page.words["cost"]
    untouched = finished.report.checkpoint_bytes - finished.report.expert_bytes
    assert f" of it untouched {untouched:,} " in page.words["cost"]
    rows = report_html(finished.context, finished.report, units).partition("bytes of tensors")[2]
    most = max(finished.report.source_bytes, finished.report.checkpoint_bytes)
    shares = (finished.report.expert_bytes / most, untouched / most)
    assert re.findall(r"width:([\d.]+)%", rows)[2:4] == [f"{100 * share:.3f}" for share in shares]
    clipped = [
        u.model_copy(update={"clipped_input_share": 1e-3 * i, "clipped_intermediate_share": 0.0})
        for i, u in enumerate(units)
    ]
    report = build_report(finished.context, clipped, finished.prepared.shards, None, {})
    words = Page(report_html(finished.context, report, clipped)).words["outcomes"]
    assert (
        "inputs: 3.50e-03" in words
        and "layer 3: 4.50e-03" in words
        and "intermediates: none" in words
    )


def test_outcomes_other_than_solved_are_told_with_their_reasons(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    broken = changed(
        units,
        lambda r: ".experts.3.down" in r.name,
        outcome="round_to_nearest",
        reason="no factor at any damping",
    )
    report = build_report(finished.context, broken, finished.prepared.shards, None, {})
    found = Page(report_html(finished.context, report, broken))
    assert (
        "round to nearest 4" in found.words["outcomes"] and "solved 188" in found.words["outcomes"]
    )
    assert re.search(r"no factor at any damping\s+4\b", found.words["outcomes"])
    assert "4 round to nearest" in found.words["top"]


def test_every_expert_is_in_the_heat_map_at_its_place_and_in_its_colour(
    finished: SmallRun, units: list[UnitManifest], page: Page
) -> None:
    for projection in PROJECTIONS:
        records = {
            r.name: r.relative_output_error
            for u in units
            for r in u.linears
            if r.name.endswith(projection)
        }
        low, high = min(records.values()), max(records.values())
        expected = [
            [
                round(
                    254
                    * math.log(
                        records[f"language_model.model.layers.{layer}.mlp.experts.{e}.{projection}"]
                        / low
                    )
                    / math.log(high / low)
                )
                for e in range(16)
            ]
            for layer in (1, 2, 3, 4)
        ]
        assert page.pictures[projection] == expected
        assert {0, 254} <= {v for row in expected for v in row}


def test_numbers_that_the_script_reads_out_are_the_manifests(
    finished: SmallRun, units: list[UnitManifest], page: Page
) -> None:
    data = page.data
    assert (data["layers"], data["experts"], data["few"]) == (
        [1, 2, 3, 4],
        16,
        few_tokens(finished.prepared.plan),
    )
    for record in (r for u in units for r in u.linears):
        layer, expert = map(int, re.findall(r"\.(\d+)\.", record.name))
        projection = record.name.rpartition(".")[2]
        assert data["error"][projection][layer - 1][expert] == float(
            f"{record.relative_output_error:.4g}"
        )  # type: ignore[index]
        assert data["tokens"][layer - 1][expert] == record.tokens  # type: ignore[index]


def test_under_calibrated_experts_are_on_the_orange_side_and_empty_ones_apart(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    def at(layer: int, expert: int) -> Callable[[LinearRecord], bool]:
        return lambda r: f"layers.{layer}.mlp.experts.{expert}." in r.name

    few = few_tokens(finished.prepared.plan)
    loaded = changed(units, lambda r: True, tokens=few)
    for layer, expert, tokens in ((2, 5, 0), (3, 7, few - 1), (3, 8, few // 4), (4, 9, 3 * few)):
        loaded = changed(loaded, at(layer, expert), tokens=tokens)
    report = build_report(finished.context, loaded, finished.prepared.shards, None, {})
    found = Page(report_html(finished.context, report, loaded))
    picture = found.pictures["tokens"]
    assert picture[1][5] == NO_VALUE
    assert picture[2][8] == 0 < picture[2][7] <= picture[0][0] == 127 < picture[3][9] < 254
    assert "2 of 64 experts have few, 1 have none" in found.words["routing"]
    assert "language_model.model.layers.2.mlp.experts.5" in found.words["routing"]


def test_values_without_a_place_on_the_scale_do_not_break_the_page(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    odd = changed(
        units, lambda r: "layers.1.mlp.experts.0." in r.name, relative_output_error=math.nan
    )
    odd = changed(odd, lambda r: "layers.1.mlp.experts.1." in r.name, relative_output_error=0.0)
    found = Page(report_html(finished.context, finished.report, odd))
    assert found.pictures["up_proj"][0][:2] == [NO_VALUE, NO_VALUE]
    assert found.data["error"]["up_proj"][0][:2] == [None, 0.0]  # type: ignore[index]


def test_page_loads_nothing_and_its_policy_says_so(finished: SmallRun, page: Page) -> None:
    assert all(v.startswith(("data:", "#")) for v in page.loads), [
        v for v in page.loads if not v.startswith(("data:", "#"))
    ]
    _, script = next(s for s in page.scripts if not s[0])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in page.policy and f"script-src 'sha256-{digest}'" in page.policy
    assert set(re.findall(r"(\w+)-src", page.policy)) == {"default", "img", "style", "script"}


def test_page_is_the_same_at_any_time(
    finished: SmallRun, units: list[UnitManifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = report_html(finished.context, finished.report, units)
    monkeypatch.setattr(time, "time", lambda: 1.0)
    assert report_html(finished.context, finished.report, units) == first


def test_patterns_and_scales_are_those_of_the_sampled_linears(finished: SmallRun) -> None:
    """A linear of the small model is sampled whole, so that `inspect` counts the same."""
    samples = sample_checkpoint(finished.context, None)
    assert {s.layer for s in samples} == {1, 2, 3, 4} and {s.projection for s in samples} == set(
        PROJECTIONS
    )
    assert len(samples) == len({(s.layer, s.expert, s.projection) for s in samples}) == 48
    checkpoint = LocalStore(finished.checkpoint)
    for s in samples[::7]:
        found = inspect_linear(
            checkpoint,
            finished.context.layout.expert_linear_name(s.layer, s.expert, s.projection),
            None,
        )
        assert (s.patterns, s.scales, s.overlap) == (found.patterns, found.scales, None)


def test_rows_of_sparse_storage_are_sampled_as_those_of_dense(
    finished: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore("sampled-sparse")
    convert_folder(
        LocalStore(finished.checkpoint), SubStore(store, run_root.CHECKPOINT), "sparse", None
    )
    monkeypatch.setattr(sample, "SAMPLED_BYTES", 1000)  # 7 rows of 128 bytes, or 15 of 64
    dense = sample_checkpoint(finished.context, finished.prepared.store)
    assert {s.rows for s in dense} == {7, 15} and {s.overlap for s in dense} == {1.0}
    context = replace(finished.context, store=store)
    assert (
        sample_checkpoint(context, store)
        == sample_checkpoint(context, finished.prepared.store)
        == dense
    )


def test_overlap_is_shown_only_beside_another_checkpoint(
    finished: SmallRun, units: list[UnitManifest], page: Page
) -> None:
    assert "overlap" not in page.words["masks"]
    beside = Page(report_html(finished.context, finished.report, units, LocalStore(finished.root)))
    assert (
        "overlap with the one-shot's masks: gate_proj 100.0%, up_proj 100.0%, down_proj 100.0%"
        in beside.words["masks"]
    )
    absent = Page(report_html(finished.context, finished.report, units, MemoryStore("no-baseline")))
    assert "overlap" not in absent.words["masks"]


def test_overlap_counts_the_pairs_kept_by_both() -> None:
    a, b, c = (
        torch.tensor([[*row]], dtype=torch.uint8)
        for row in ((1, 1, 0, 0, 7, 0, 7, 0), (1, 0, 3, 0, 9, 0, 9, 0), (0, 0, 1, 1, 0, 1, 0, 1))
    )
    assert (mask_overlap(a, a), mask_overlap(a, b), mask_overlap(a, c)) == (1.0, 0.75, 0.0)


def test_timeline_shows_every_layer_and_no_more_time_than_there_was(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    text = report_html(finished.context, finished.report, units)
    for layer in (1, 2, 3, 4):
        for stage in ("capture", "compress"):
            assert f"layer {layer}, {stage}: " in text
    assert "gradients" not in Page(text).words["timeline"]
    hours = sum(sum(u.seconds.values()) for u in units)
    assert f"compress 8 {round(round(hours, 1))} s" in re.sub(r"\s+", " ", Page(text).words["cost"])


@pytest.mark.parametrize(
    ("workers", "gpus", "idle_s", "share", "hours"),
    [(2, 0.0, 12.0, 0.6, None), (1, 0.0, 2.0, 0.2, None), (3, 1.0, 22.0, 22 / 30, 22 / 3600)],
)
def test_idle_time_is_what_workers_were_there_for_less_what_they_worked(
    workers: int, gpus: float, idle_s: float, share: float, hours: float | None
) -> None:
    """Ten seconds from the first piece of work to the last, eight of them worked."""
    facts = Mock(spans=[Span("capture", 1, 0.0, 5.0), Span("compress", 1, 7.0, 10.0)])
    facts.context.plan.config.run.num_workers = workers
    facts.context.plan.config.run.gpus_per_worker = gpus
    found = idle(facts)
    assert found is not None
    assert (found["num_workers"], found["whole_s"], found["idle_s"]) == (workers, 10.0, idle_s)
    assert found["share"] == pytest.approx(share)
    assert found["gpu_hours"] == (hours and pytest.approx(hours))
    assert idle(Mock(spans=[])) is None


def test_timeline_has_no_more_workers_than_there_were(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    """Parts of a worker that became durable together, and units written behind the next."""
    busy_units = [
        u.model_copy(update={"worker": "ab"[i % 2], "finished_at": 1e9, "seconds": {"solve": 9.0}})
        for i, u in enumerate(units)
    ]
    words = Page(report_html(finished.context, finished.report, busy_units)).words["timeline"]
    assert "workers at work: up to 2 of 2" in words
    alone = [u.model_copy(update={"worker": u.unit}) for u in busy_units]
    words = Page(report_html(finished.context, finished.report, alone)).words["timeline"]
    assert f"workers at work: up to {len(units)} of {len(units)}" in words


@pytest.mark.parametrize(("shared_s", "is_said"), [(7.0, True), (0.4, False)])
def test_timeline_says_how_long_streams_and_units_ran_at_once(
    finished: SmallRun,
    units: list[UnitManifest],
    monkeypatch: pytest.MonkeyPatch,
    shared_s: float,
    is_said: bool,
) -> None:
    monkeypatch.setattr(run_sections, "shared_seconds", lambda *_: shared_s)
    words = Page(report_html(finished.context, finished.report, units)).words["timeline"]
    assert ("7 s of it with streams and units at once" in words) == is_said


def test_page_says_how_long_workers_were_idle(
    finished: SmallRun,
    units: list[UnitManifest],
    page: Page,
) -> None:
    idle_words = r"If all 2 workers .*, they were idle for [\dhmins ]+ together \(\d+%\)\."
    assert re.search(idle_words, page.words["cost"])
    plan = finished.prepared.plan
    run = plan.config.run.model_copy(update={"gpus_per_worker": 1.0, "num_workers": 3600})
    config = plan.config.model_copy(update={"run": run})
    context = replace(finished.context, plan=plan.model_copy(update={"config": config}))
    words = Page(report_html(context, finished.report, units)).words["cost"]
    assert re.search(r"If all 3,600 workers .* together, \d+\.\d\d GPU-hours \(\d+%\)\.", words)


def test_cost_is_there_where_gpus_have_a_price(
    finished: SmallRun, units: list[UnitManifest], page: Page
) -> None:
    plan = finished.prepared.plan
    run = plan.config.run.model_copy(update={"gpus_per_worker": 1.0, "gpu_hour_price": 2.5})
    context = replace(
        finished.context,
        plan=plan.model_copy(update={"config": plan.config.model_copy(update={"run": run})}),
    )
    long = [u.model_copy(update={"seconds": {"solve": 3600.0}}) for u in units]
    words = re.sub(r"\s+", " ", Page(report_html(context, finished.report, long)).words["cost"])
    assert "cost at 2.5 an hour" in words and "compress 8 8 h 00 min 8.00 20.00" in words
    assert "2.5" not in re.sub(r"\s+", " ", page.words["cost"]) and "- -" in re.sub(
        r"\s+", " ", page.words["cost"]
    )


def test_pilot_has_no_checkpoint_and_says_what_all_layers_would_cost(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    plan = finished.prepared.plan
    run = plan.config.run.model_copy(update={"layers": (2, 4)})
    few = tuple(u for u in plan.units if u.layer in (2, 4))
    pilot = plan.model_copy(
        update={"config": plan.config.model_copy(update={"run": run}), "units": few}
    )
    report = finished.report.model_copy(
        update={
            "pilot": Extrapolation(
                layers=2, of_layers=4, worker_hours=3.5, wall_hours=1.75, gpu_hours=3.5, cost=8.75
            ),
            "quality": None,
        }
    )
    own = [u for u in units if u.unit.startswith(("L002", "L004"))]
    found = Page(report_html(replace(finished.context, plan=pilot), report, own))
    assert len(found.pictures["down_proj"]) == 2 and found.data["layers"] == [2, 4]
    assert (
        "all 4 would take 3 h 30 min of workers' time, 3.5 GPU-hours, 8.75 at the configured price"
        in found.words["cost"]
    )
    assert "masks" not in found.words and "none: a pilot" in found.words["made"]


def kimi_sized(finished: SmallRun) -> tuple[StageContext, list[UnitManifest]]:
    """60 layers of 384 experts in 2,880 manifests, over an empty run root."""
    layers = tuple(range(1, 61))
    layout = replace(finished.context.layout, num_experts=384, num_layers=61, moe_layers=layers)
    plan = finished.prepared.plan
    source = plan.source.model_copy(
        update={"num_experts": 384, "moe_layers": layers, "num_layers": 61, "hidden_size": 7168}
    )
    plan = plan.model_copy(update={"source": source, "units": plan_units(layout, 8)})
    context = replace(finished.context, plan=plan, layout=layout, store=MemoryStore("kimi-sized"))
    sample = UnitManifest.load(
        finished.prepared.store, run_root.unit_manifest(finished.prepared.plan.units[0].id)
    )
    units = []
    for i, unit in enumerate(plan.units):
        linears = tuple(
            sample.linears[0].model_copy(
                update={
                    "name": layout.expert_linear_name(unit.layer, e, p),
                    "relative_output_error": 0.01 + 1e-4 * ((7 * e + 13 * unit.layer) % 997),
                    "tokens": 30000 + 97 * e,
                }
            )
            for p in PROJECTIONS
            for e in unit.experts
        )
        units.append(
            sample.model_copy(
                update={"unit": unit.id, "linears": linears, "finished_at": 1.7e9 + 30.0 * i}
            )
        )
    return context, units


@pytest.mark.slow
def test_page_of_kimis_size_is_small_and_quick_and_leaves_no_expert_out(finished: SmallRun) -> None:
    context, units = kimi_sized(finished)
    start = time.perf_counter()
    text = report_html(context, finished.report, units)
    assert time.perf_counter() - start < 30
    assert len(text.encode()) < 5_000_000
    found = Page(text)
    for projection in PROJECTIONS:
        picture = found.pictures[projection]
        assert (len(picture), {len(row) for row in picture}) == (60, {384})
        assert NO_VALUE not in {v for row in picture for v in row}
        assert found.data["error"][projection][59][383] == 0.01 + 1e-4 * ((7 * 383 + 13 * 60) % 997)  # type: ignore[index]


@pytest.mark.parametrize(("low", "high"), [(0.03, 0.36), (1.0, 1e9), (0.0101, 0.0102), (5e-7, 2.0)])
def test_logarithmic_ticks_lie_inside_and_are_few(low: float, high: float) -> None:
    ticks = Scale(low, high, "log").ticks()
    assert 1 <= len(ticks) <= 6 and ticks == sorted(ticks)
    assert all(low <= t <= high for t in ticks)


@pytest.mark.parametrize(
    ("seconds", "labels"),
    [
        (62, ["0 s", "15 s", "30 s", "45 s", "60 s"]),
        (22.8 * 3600, ["0 h", "6 h", "12 h", "18 h"]),
        (0.5, ["0 s"]),
    ],
)
def test_times_are_marked_at_round_numbers(seconds: float, labels: list[str]) -> None:
    assert [label for _, label in time_ticks(seconds)] == labels
