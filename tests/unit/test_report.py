"""The report, on small made-up folders: self-contained, repeatable, honest about what is missing."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from domainstudio import config, report
from domainstudio.data import grid, save_png
from domainstudio.errors import DataError
from domainstudio.git import State
from domainstudio.metrics.catalogue import FIGURES
from domainstudio.report import curves as report_curves
from domainstudio.report import tables as report_tables
from domainstudio.report.pictures import evenly, picture
from domainstudio.report.reading import read
from domainstudio.report.sections import comparisons, section
from domainstudio.storage.files import write_json
from tests.models import image_set, tiny_images
from tests.modules import ROOT
from tests.unit.test_metrics_stage import write_samples

SHOTS, DOMAIN, SAMPLES = 10, 30, 20
VOID = {"meta", "img", "br", "link", "input", "hr", "base", "source", "track", "embed", "col", "wbr"}


def figures(frechet, intra=0.4, **other):
    known = {"frechet_distance_infinity": frechet, "kid": 0.01, "intra_distance_in_domain": intra}
    return {**known, **other}


def write_evaluation(root, name, values, features="tiny-net", domain_is_shots=False):
    real = {"frechet_distance_infinity": 5.0, "intra_distance_in_domain": 0.5}
    shots = {"frechet_distance_infinity": 90.0, "intra_distance_in_domain": None}
    metrics = {
        "features": features,
        "features_digest": "f00d" * 16,
        "number": SAMPLES,
        "domain_number": DOMAIN - SHOTS,
        "domain_is_shots": domain_is_shots,
        "samples": values,
        "references": {"shots": shots, "domain": real},
    }
    write_json(root / "evaluation" / name / "metrics.json", metrics)
    pairs = [
        {"sample": i, "training": i % SHOTS, "distance": 0.05 + 0.01 * i, "mirrored": i == 1}
        for i in range(SAMPLES)
    ]
    write_json(root / "evaluation" / name / "nearest.json", {"threshold": 0.0701, "pairs": pairs[::-1]})


def write_training(root, name):
    folder = root / "training" / name
    for step in (2, 1):
        preview = np.asarray(grid(tiny_images(4, 7 + step), 2)).transpose(2, 0, 1)
        save_png(preview[None], [folder / f"previews/step-00000{step}.png"])
    rows = ["step,total,learning_rate,grad_norm,simple,image,seconds"]
    rows += [f"{i},{2 / i},0.1,1.5,{1 / i},{'nan' if i == 3 else 0.5},{i}" for i in range(1, 41)]
    (folder / "losses.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def settings():
    values = config.load(ROOT / "params.yaml").model_dump(mode="json")
    domain = {"shots": "images", "domain": "images"}
    kept = {
        "sources": {"noto": {"subjects": "subjects.txt"}},
        "source_images": {"noto": {"images": "demo/none.yaml"}},
        "sweeps": {},
        "targets": {"ink": domain},
        "registry": {},
    }
    methods = {"plain": "finetune", "studio": "domainstudio"}
    pair = {"source": "noto", "target": "ink"}
    adaptations = {name: {**pair, "method": method} for name, method in methods.items()}
    return config.Settings.model_validate({**values, **kept, "adaptations": adaptations})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Everything that two adaptations leave behind; tests that change it take a copy, `root`."""
    folder = tmp_path_factory.mktemp("made")
    domain = tiny_images(DOMAIN, 1)
    sets = {"sources/noto": tiny_images(5), "targets/ink/domain": domain, "targets/ink/shots": domain[:SHOTS]}
    for place, pixels in sets.items():
        named = image_set(pixels, [f"shape {i}" for i in range(len(pixels))], "shapes")
        replace(named, licence="CC0-1.0", attribution="<i>someone</i> & others").save(folder / "data" / place)
    write_samples(folder / "samples/sources/noto", tiny_images(SAMPLES, 2))
    for seed, (name, frechet) in enumerate((("plain", 61.25), ("studio", 44.5))):
        write_samples(folder / "samples/adapted" / name, tiny_images(SAMPLES, 3 + seed))
        write_training(folder, name)
        write_evaluation(folder, name, figures(frechet))
    return folder


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "root")


@pytest.fixture(scope="module")
def html(made, settings):
    return report.render(made, settings)


class Page(HTMLParser):
    """Checks that tags nest, and keeps them with their text."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self):
        return re.sub(r"\s+", " ", " ".join(self.text))


def test_the_page_parses_loads_nothing_and_has_the_place_of_every_link(html):
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    loaded = [a[key] for _, a in page.tags for key in ("src", "href", "srcset", "poster", "data") if key in a]
    assert loaded
    assert all(address.startswith(("data:image/", "#")) for address in loaded)
    assert "@import" not in html
    assert "url(" not in html
    assert "default-src 'none'" in html
    places = [a["id"] for _, a in page.tags if "id" in a]
    assert len(places) == len(set(places))
    assert {a["href"][1:] for tag, a in page.tags if tag == "a"} <= set(places)


def test_same_folders_same_bytes(made, settings):
    first, second = (report.render(made, settings, State("c0ffee", dirty=True)) for _ in range(2))
    assert first == second
    assert "c0ffee</span>, with uncommitted changes" in first


def compared(root, settings):
    """Return the rows of the only pair of source and target, and that of the adaptation `plain`."""
    comparison = comparisons(read(root, settings), {"plain": 0, "studio": 1})[0]
    return comparison, next(strip for strip in comparison.generated if strip.name == "plain")


def test_columns_share_their_noise(root, settings):
    # The adapted model's samples lie on disk in another order: rows must follow the seeds, not the files.
    folder = root / "samples/adapted/plain"
    manifest = json.loads((folder / "manifest.json").read_text())
    samples = read(root, settings).results[0].samples
    assert samples is not None
    expected = picture(samples.image(0)).uri
    manifest["images"].reverse()
    write_json(folder / "manifest.json", manifest)
    comparison, row = compared(root, settings)
    assert comparison.seeds == tuple(range(1000, 1010))
    assert row.tiles[0].picture.uri == expected
    # A seed that was not drawn leaves a gap.
    write_samples(root / "samples/adapted/plain", tiny_images(3, 5), first_seed=1001)
    _, row = compared(root, settings)
    assert [tile.picture is not None for tile in row.tiles] == [False, True, True, True, *[False] * 6]


def test_pairs_are_sorted_and_memorised_ones_marked(made, settings, html):
    content = read(made, settings)
    shown = section(content, content.results[0], {"plain": 0, "studio": 1})
    distances = [float(pair.distance) for pair in shown.pairs]
    assert distances == sorted(distances)
    assert [pair.memorized for pair in shown.pairs] == [d < 0.0701 for d in distances]
    assert len(shown.results.memorized) == 3
    assert [pair.mirrored for pair in shown.pairs] == [i == 1 for i in range(12)]
    shot = Image.fromarray(tiny_images(DOMAIN, 1)[1].transpose(1, 2, 0))
    assert shown.pairs[1].training.picture == picture(ImageOps.mirror(shot), side=64)
    assert sum(count for _, count in shown.attraction) == SAMPLES
    page = Page(html)
    assert sum("memorized" in (a.get("class") or "") for tag, a in page.tags if tag == "figure") == 6
    assert "3 samples lie below 0.0701 and count as memorised" in page.words


def test_figures_stand_beside_network_and_hash_and_the_best_is_marked_once(html):
    assert re.findall(r'class="n best">([^<]+)<', html) == ["44.5"]
    words = Page(html).words
    assert "tiny-net" in words
    assert "f00d" * 16 in words
    assert "figures of different networks are not comparable" in words


def test_figures_of_two_networks_are_kept_apart(root, settings):
    write_evaluation(root, "plain", figures(1.0), features="other-net")
    html = report.render(root, settings)
    assert html.count('<table class="figures">') == 2
    assert 'class="n best"' not in html
    assert "compare within a table only" in html


MEASURED = ("samples/adapted/plain", "evaluation/plain", "evaluation", "data samples training evaluation")


@pytest.mark.parametrize(
    "gone", ["data/sources/noto", "data/targets", "samples/sources", "training/studio", *MEASURED]
)
def test_missing_parts_are_said(root, settings, gone):
    for name in gone.split():
        shutil.rmtree(root / name)
    words = Page(report.render(root, settings)).words
    if gone in MEASURED:
        assert " yet" in words
    for name in ("plain", "studio"):
        assert name in words


def test_null_figures_become_dashes(root, settings):
    write_evaluation(root, "plain", dict.fromkeys(figures(0)))
    page = Page(report.render(root, settings))
    assert "nan" not in page.words.lower().split()
    assert "–" in page.words


def test_a_domain_that_is_the_shots_is_said(root, settings, html):
    assert "not at hand" not in html
    for name in ("plain", "studio"):
        write_evaluation(root, name, figures(3.0), domain_is_shots=True)
    assert "not at hand" in report.render(root, settings)


def test_texts_from_outside_are_escaped(root, settings):
    # Names are checked in params.yaml; the page must not depend on that.
    odd = '"><script>alert(1)'
    for stage in ("samples/adapted", "training", "evaluation"):
        (root / stage / odd).symlink_to(root / stage / "plain")
    write_evaluation(root, "plain", figures(3.0), features=odd)
    (root / "training/plain/losses.csv").write_text(f"step,<b>{odd[2:]}\n1,2\n2,3\n", encoding="utf-8")
    renamed = settings.resolved["plain"].model_copy(update={"name": odd})
    changed = settings.model_copy()
    changed.__dict__["resolved"] = {odd: renamed, "studio": settings.resolved["studio"]}
    html = report.render(root, changed)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "<i>someone" not in html
    Page(html)


MANIFESTS = ("{", "[]", '{"format": 2, "images": []}', '{"format": 1, "images": [{}]}')


@pytest.mark.parametrize(
    ("file", "content"), [*(("manifest.json", text) for text in MANIFESTS), ("images/000003.png", None)]
)
def test_a_damaged_manifest_or_a_missing_sample_is_an_error_that_names_it(root, settings, file, content):
    path = root / "samples/adapted/plain" / file
    path.unlink()
    if content:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(str(path))):
        report.render(root, settings)


def test_only_settings_that_differ_are_listed_and_those_of_some_key_by_key(settings):
    first, second = settings.resolved.values()
    differing, shared = report_tables.setting_rows([first, second])
    assert "method" in dict(differing)
    assert "training.learning_rate" in dict(shared)
    assert all(len(set(values)) > 1 for _, values in differing)
    adapters = second.weights.model_copy(update={"lora": config.LoraSettings(rank=3)})
    differing, shared = report_tables.setting_rows([first, second.model_copy(update={"weights": adapters})])
    assert dict(differing)["weights.lora.rank"] == ["–", "3"]
    assert "weights.lora" not in dict(differing) | dict(shared)


def test_domain_pictures_leave_out_the_training_images(made, settings):
    assert (evenly(3, 6), evenly(100, 4)) == ([0, 1, 2], [0, 33, 66, 99]), "both ends are kept"
    target = read(made, settings).targets["ink"]
    assert target.unseen(5) == [10, 14, 18, 22, 26]
    assert target.shots is not None
    shown = np.asarray(target.shots.image(3)).transpose(2, 0, 1)
    assert np.array_equal(shown, tiny_images(DOMAIN, 1)[3]), "packed images are those that were saved"


@pytest.mark.parametrize(
    ("key", "values", "spreads", "best"),
    [
        ("frechet_distance_infinity", [3.0, 2.0], [None] * 2, {1}),
        ("frechet_distance_infinity", [2.0, 2.0], [None] * 2, set()),
        ("frechet_distance_infinity", [2.0, 2.0, 5.0], [None] * 3, {0, 1}),
        ("frechet_distance_infinity", [2.0, None], [None] * 2, set()),
        ("frechet_distance_infinity", [None, 4.0, 3.0], [None] * 3, {2}),
        ("kid", [0.010, 0.012], [0.003, 0.001], set()),
        ("kid", [0.010, 0.012], [0.001, 0.001], {0}),
    ],
)
def test_the_lowest_is_best_where_it_leads_by_more_than_the_spread(key, values, spreads, best):
    metric = next(metric for metric in FIGURES if metric.key == key)
    assert report_tables._best(metric, values, spreads, 4 if key == "kid" else 1) == best


def test_an_interval_stands_below_its_figure_and_marks_no_lead_within_it(root, settings):
    def row(width):
        for name, value in (("plain", 44.0), ("studio", 50.0)):
            known = {"frechet_distance_infinity": (value - width, value + width)}
            write_evaluation(root, name, figures(value, intervals=known, frechet_distance=99.0))
        table = report_tables.metric_tables(read(root, settings).results)[0]
        assert [item.figure.key for item in table.rows if item.figure.detail] == ["frechet_distance"]
        return table.rows[0]

    assert [cell.spread for cell in row(5.0).cells] == ["39.0 … 49.0", "45.0 … 55.0"]
    assert [cell.best for cell in row(5.0).cells] == [False, False]
    assert [cell.best for cell in row(4.0).cells] == [True, False]
    assert "Further figures" in Page(report.render(root, settings)).words


def test_more_varied_than_real_images_is_a_warning_not_a_win(root, settings):
    write_evaluation(root, "studio", figures(70.0, intra=0.9))
    table = report_tables.metric_tables(read(root, settings).results)[0]
    row = next(row for row in table.rows if row.figure.key == "intra_distance_in_domain")
    assert [cell.best for cell in row.cells] == [False, False]
    assert [cell.note is not None for cell in row.cells] == [False, True]


@pytest.mark.parametrize(
    ("value", "decimals", "shown"), [(1234567.0, 0, "1 234 567"), (-0.25, 2, "−0.25"), (61.25, 1, "61.2")]
)
def test_figures_read_well(value, decimals, shown):
    assert report_tables.text(value, decimals=decimals).replace(" ", " ") == shown


def test_axis_is_logarithmic_only_where_values_span_much():
    steps = np.arange(1.0, 201.0)
    wide, narrow, negative, empty = (
        str(report_curves.loss_panel(report_curves.Series("a", 0, steps, values), []))
        for values in (1 / steps, 1 + 0.1 / steps, -1 / steps, steps * np.nan)
    )
    assert "logarithmic" in wide
    assert "linear" in narrow
    assert "linear" in negative
    assert empty == "None"


def test_a_summary_keeps_the_mean_and_skips_gaps():
    steps, values = np.arange(120.0), np.tile([4.0, 2.0], 60)
    even = report_curves.summarize(report_curves.Series("a", 0, steps, values))
    values[5:8] = np.nan
    gaps = report_curves.summarize(report_curves.Series("a", 0, steps, values))
    assert even and gaps
    assert even.mean.tolist() == [3.0] * report_curves.BINS
    assert np.isfinite(gaps.mean).all()
    assert gaps.steps[-1] == 119.0


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 400, False), (-0.03, 0.04, False), (0.02, 0.3, True), (1e-6, 3, True)]
)
def test_ticks_lie_on_the_axis(low, high, log):
    axis = report_curves.Axis(low, high, 0, 100, log=log)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)
    assert [axis(low), axis(high)] == pytest.approx([0, 100])


def test_pixel_art_is_enlarged_by_whole_factors_and_photographs_are_reduced():
    small, large = (
        picture(Image.fromarray(tiny_images(1, side=side)[0].transpose(1, 2, 0))) for side in (32, 256)
    )
    assert small.crisp
    assert (small.width, small.height) == (96, 96)
    assert not large.crisp
    assert large.uri.startswith("data:image/jpeg")


def test_the_stage_writes_the_page_without_torch(root):
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.modules['matplotlib'] = None\n"
        f"sys.argv = ['report', '--root', {str(root)!r}, '--output', {str(root / 'report.html')!r}]\n"
        "runpy.run_module('stages.report', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    Page((root / "report.html").read_text(encoding="utf-8"))
    assert str(root / "report.html") in done.stdout
