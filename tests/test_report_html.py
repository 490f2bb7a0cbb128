"""The page of a report: whole in itself; right in a browser, light, dark, wide and narrow."""

import html.parser
import json
import re
import shutil
import subprocess

import keras
import numpy as np
import pytest
from helpers import once

import keras_bitnet
from keras_bitnet.precision import Choice, Point, PrecisionPlan, PrecisionSearch
from keras_bitnet.report import svg
from keras_bitnet.report.quality import InputProbe

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the path")


@pytest.fixture(scope="module")
def report():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), dtype="int32")
    h = keras.layers.Embedding(11, 16, name="words <&> 'all'")(inputs)
    h = keras.layers.Dense(16, "relu", name="hidden")(h)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(h), name="a <b> & 'c'")
    kernel, bias = model.get_layer("hidden").get_weights()
    kernel[:, 3] *= 40  # an outlier channel in what the head sees
    model.get_layer("hidden").set_weights([kernel, bias])
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 11, (16, 4)).astype("int32"), rng.normal(size=(16, 4, 3))
    plan = PrecisionPlan({".": "int4"})
    plan.search = a_search()
    return keras_bitnet.quantization_report(
        keras_bitnet.quantize_model(model, plan, verbose=0),
        (x, y.astype("float32")), model, plan=plan, loss="mse", verbose=0,
    )  # fmt: skip


def a_search():
    points = [Point(2.0, 0.5, ["W2A8"]), Point(4.0, 0.01, ["W4A8"]), Point(8.0, 1e-4, ["W8A8"])]
    choices = [Choice("hidden", 256, ["W2A8", "W4A8", "W8A8"], [0.5, 0.01, 1e-4], [2, 4, 8])]
    return PrecisionSearch("output", "bits", 5.0, 4.0, 0.01, 2.0, 8.0, choices, points)


class Tags(html.parser.HTMLParser):
    """Collects the tags and checks that they are closed in order."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.seen, self.open = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_else(report):
    text = report.to_html()
    tags = Tags(text).seen
    names = [name for name, _ in tags]
    assert not {"script", "link", "img", "iframe"} & set(names)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", text)
    # Three charts about all layers, for each one histogram or more, the channels of one.
    assert names.count("details") == 3
    assert names.count("svg") == 3 + (1 + 2 + 2) + 1
    assert all(attrs["aria-label"] for name, attrs in tags if name == "svg")
    assert "a &lt;b&gt; &amp; &#x27;c&#x27;" in text
    assert "words &lt;&amp;&gt;" in text
    assert "Outlier channels" in text
    assert "3 (" in text
    assert "nan" not in text.lower().replace("nanum", "")


def test_files_are_whole_or_not_there(report, tmp_path):
    report.save(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == report.to_html()
    report.save(tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["layers"][0]["input_sqnr"] is None
    with pytest.raises(ValueError, match=r"\.html or \.json"):
        report.save(tmp_path / "r.pdf")
    with pytest.raises(FileExistsError):
        report.save(tmp_path / "r.html", overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json"]


# What the page is like to the browser, told by a script that the test puts at its end.
_PROBE = """
<script>
const charts = [...document.querySelectorAll("section svg.chart")].filter(s => s.checkVisibility());
const box = s => s.getBoundingClientRect();
const out = {
  background: getComputedStyle(document.body).backgroundColor,
  color: getComputedStyle(document.body).color,
  bar: getComputedStyle(document.querySelector("details[open] rect.a")).fill,
  width: innerWidth,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  charts: charts.length,
  empty: charts.filter(s => box(s).width < 200 || box(s).height < 60).length,
  outside: charts.filter(s => [...s.querySelectorAll("rect, circle, text")].some(e =>
    box(e).right > box(s).right + 1 || box(e).left < box(s).left - 1)).length,
  headings: [...document.querySelectorAll("h2")].map(h => h.textContent),
};
document.body.insertAdjacentHTML("beforeend", "<pre id=probe>" + JSON.stringify(out) + "</pre>");
</script>
"""


def seen_by_browser(report, folder, dark, width):
    page = folder / f"page-{dark}-{width}.html"
    page.write_text(report.to_html().replace("</body>", _PROBE + "</body>"), encoding="utf-8")
    picture = page.with_suffix(".png")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--enable-logging=stderr",
    ]  # fmt: skip
    options = {"capture_output": True, "text": True, "timeout": 180, "check": True}
    result = subprocess.run([*command, "--dump-dom", page.as_uri()], **options)
    assert "CONSOLE" not in result.stderr, result.stderr  # what a page logs: errors of scripts too
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], **options)
    found = re.search(r'<pre id="probe">(.*?)</pre>', result.stdout)
    return json.loads(found.group(1).replace("&amp;", "&")), picture


@once
@needs_browser
def test_in_a_browser_light_and_dark_wide_and_narrow(report, tmp_path):
    found, pictures = {}, {}
    for name, dark, width in (("light", False, 1280), ("dark", True, 1280), ("narrow", False, 500)):
        found[name], pictures[name] = seen_by_browser(report, tmp_path, dark, width)
    for name, page in found.items():
        assert page["charts"] >= 4, name
        assert (page["empty"], page["outside"], page["overflow"]) == (0, 0, 0), (name, page)
        assert page["headings"] == [
            "Error, layer by layer", "Sensitivity", "Cost and error", "All figures",
            "Outlier channels", "Distributions",
        ]  # fmt: skip
    assert found["narrow"]["width"] < 600
    for what in ("background", "color", "bar"):
        assert found["light"][what] != found["dark"][what]
        assert found["light"][what] == found["narrow"][what]
    corner = {name: pixels(picture)[2, 2] for name, picture in pictures.items()}
    assert corner["light"].mean() > 0.9
    assert corner["dark"].mean() < 0.15
    for picture in pictures.values():
        image = pixels(picture)
        assert image.shape[0] >= 800
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 30  # something is drawn


def pixels(path):
    image = pytest.importorskip("matplotlib.image")
    return image.imread(path)[..., :3]


def test_ticks_cover_their_range():
    for low, high in ((0, 1), (-3, 7), (0.001, 0.0017), (5, 5), (0, 0), (1e6, 3e9)):
        found = svg.ticks(low, high)
        assert found[0] <= low + 1e-12
        assert found[-1] >= high - 1e-12
        assert 2 <= len(found) <= 12
    assert svg.log_ticks(2e-5, 0.3) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1])


def test_charts_of_odd_content():
    for chart in (
        svg.dot_chart([("a", (float("inf"), None, -3.0))], ("x", "y", "z"), "dB"),
        svg.dot_chart([("a", (None,))], ("x",), "dB"),
        svg.histogram([0, 0], 0.0, 0.0, "nothing"),
        svg.profile([0.0] * 5000, set(), "nothing"),
        svg.line_chart([(1.0, 0.0)], ["one"], "x", "y", log_y=True),
    ):
        Tags(chart)
        assert "nan" not in chart
        assert "inf" not in chart.lower().replace("infinity", "")


def test_a_profile_keeps_the_tallest_of_many_channels():
    values = [1.0] * 4000
    values[2345] = 9.0
    chart = svg.profile(values, {2345}, "channels")
    assert chart.count("<rect") <= 440
    assert "channel 2345: 9" in chart
    assert chart.count('class="b"') == 1


def test_a_histogram_grows_with_what_it_sees():
    layer = keras_bitnet.layers.BitLinear(2, activation_quantizer=None)
    layer.build((None, 4))
    probe = InputProbe(layer, batches=3)
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(50, 4)).astype("float32") * s for s in (1, 9, 3)]
    for batch in batches:
        probe.look(keras.ops.convert_to_tensor(batch))
    found, x = probe.histogram(), np.concatenate(batches)
    assert sum(found.counts) == x.size
    assert found.high >= np.abs(x).max()
    edges = np.linspace(found.low, found.high, len(found.counts) + 1)
    np.testing.assert_allclose(found.counts, np.histogram(x, edges)[0], atol=1)
