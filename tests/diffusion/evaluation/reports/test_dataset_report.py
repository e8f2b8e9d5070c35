"""Report on a data set version: every figure on the page is that of the images and records it stands for."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffusion.common.errors import UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.versions.takedown import Selection, remove
from diffusion.evaluation.reports import dataset_report as page_module
from diffusion.evaluation.reports.charts import LIGHT, Chart, Draw
from diffusion.evaluation.reports.dataset_report import write_dataset_report
from diffusion.evaluation.reports.dataset_summary import DatasetSummary
from diffusion.evaluation.reports.record_statistics import VARIABLE
from tests.builders.bucketed import bucketed_set
from tests.builders.built_datasets import BuiltDataset, Record, duplicate, image_record, quarantined
from tests.builders.html_pages import Page
from tests.builders.shapes import blob


def image(seed: int, channels: int = 3, size: int = 8) -> np.ndarray:
    """Noise of its own brightness: (size, size) or (size, size, 3) uint8."""
    random = np.random.default_rng(seed)
    shape = (size, size, 3) if channels == 3 else (size, size)
    return np.clip(random.normal(random.uniform(40, 215), 30, shape), 0, 255).astype(np.uint8)


def records(seeds: Sequence[int], split: str = "train", channels: int = 3, **fields: object) -> list[Record]:
    return [image_record(image(seed, channels), f"{seed}.png", split, **fields) for seed in seeds]


def report(built: BuiltDataset, name: str = "page.html") -> tuple[DatasetSummary, Page]:
    path = built.folder.parent / name
    summary = write_dataset_report(built.folder, path)
    return summary, Page(path.read_text())


@pytest.fixture
def built(tmp_path: Path) -> BuiltDataset:
    """A data set of 8×8 images with nothing in it yet."""
    return BuiltDataset(tmp_path / "built", size=8)


def blocks(sheet: np.ndarray, count: int, columns: int, scale: int = 8, size: int = 8) -> list[np.ndarray]:
    """The images of a contact sheet at their own size."""
    step = size * scale + 2
    corners = [(2 + number // columns * step, 2 + number % columns * step) for number in range(count)]
    return [sheet[y : y + size * scale : scale, x : x + size * scale : scale] for y, x in corners]


def test_counts_are_those_of_the_records(built: BuiltDataset) -> None:
    first = records(range(7), caption="seven") + records(range(10, 13), "held_out")
    built.version([*first, duplicate(first[0], "again.png"), quarantined("bad.png", "damaged")])
    summary, page = report(built)
    assert (summary.kept, summary.train, summary.held_out, summary.captioned) == (10, 7, 3, 7)
    assert (summary.duplicates, summary.quarantined, summary.removed, summary.classes) == (1, 1, 0, 0)
    assert (summary.channels, summary.size, summary.shards) == (3, 8, 1)
    files = [path for kind in ("shards", "records") for path in (built.folder / kind).iterdir()]
    assert summary.bytes == sum(path.stat().st_size for path in files)
    assert "10 images of 8×8 pixels in colour; 3 held out from training." in page.text
    assert re.search(r"\b10 images 7 for training 3 held out 0 classes 1 duplicates 1 in quarantine", page.text)
    assert "70.0 % of the images have a caption" in page.text


def test_report_is_self_contained(built: BuiltDataset) -> None:
    built.version([*records(range(5), label="a", caption="b"), quarantined("bad.png", "damaged")])
    _, page = report(built)
    anchors = {f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes}
    assert any(address.startswith("#") for address in page.addresses)
    assert all(each in anchors for each in page.addresses if not each.startswith("data:image/png;base64,"))
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    html = (built.folder.parent / "page.html").read_text()
    assert "url(" not in html
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html


def test_dataset_report_counts_quarantine_by_the_last_record(built: BuiltDataset) -> None:
    built.version(
        [
            *records([1]),
            quarantined("mended.png", "damaged: cut after 12 bytes"),
            quarantined("still.png", "damaged: cut after 13 bytes"),
            quarantined("other.png", "damaged: cut after 15 bytes"),
            image_record(image(2), "spoilt.png"),
        ]
    )
    built.version(
        [
            image_record(image(3), "mended.png"),
            quarantined("still.png", "too small"),
            quarantined("spoilt.png", "too small"),
        ]
    )
    summary, page = report(built)
    assert summary.quarantined == 3
    assert "too small 2 spoilt.png still.png damaged: cut after … bytes 1 other.png" in page.text
    assert "other.png damaged: cut after 15 bytes" in page.text
    assert "mended.png" not in page.text
    assert "Of 3 files read for this version, 1 were new images, 0 duplicates, 2 quarantined." in page.text


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("damaged: 12 of 400 bytes", "damaged: 7 of 38,000 bytes", True),
        ("https://a.org/1.png answered 404", "https://b.org/x/2.png answered 500", True),
        ("/tmp/a b.png is missing", "/tmp/c is missing", False),
        ("too small", "too large", False),
    ],
)
def test_reasons_are_one_kind_where_only_paths_and_numbers_differ(one: str, other: str, same: bool) -> None:
    assert (VARIABLE.sub("…", one) == VARIABLE.sub("…", other)) == same


@pytest.mark.parametrize("channels", [1, 3])
def test_mean_images_average_all_and_each_class(channels: int, built: BuiltDataset) -> None:
    built.version(records(range(9), channels=channels, label="dark") + records(range(20, 24), "held_out", channels))
    _, page = report(built)
    for name, seeds in (("Mean image", [*range(9), *range(20, 24)]), ("Mean of dark", range(9))):
        expected = np.mean([image(seed, channels) for seed in seeds], axis=0)
        mean_image = page.image(name)[::8, ::8]
        assert mean_image.shape == expected.shape
        assert np.abs(mean_image - expected).max() <= 0.5
    assert "all n = 13 dark n = 9" in page.text


def test_grey_images_among_coloured_ones_count_for_all_three_channels(built: BuiltDataset) -> None:
    built.version(records([1], channels=3) + records([2, 3], channels=1))
    summary, page = report(built)
    assert summary.channels == 3
    greys = [np.repeat(image(seed, 1)[..., None], 3, axis=2) for seed in (2, 3)]
    images = np.array([image(1), *greys]).astype(float)
    assert np.abs(page.image("Mean image")[::8, ::8] - images.mean(0)).max() <= 0.5
    red, green, blue = images.mean((0, 1, 2))
    assert f"Red mean {red:.1f} training" in page.text
    assert f"Green mean {green:.1f} training" in page.text
    assert f"Blue mean {blue:.1f} training" in page.text
    assert f"Brightness mean {0.299 * red + 0.587 * green + 0.114 * blue:.1f} training" in page.text


def test_histograms_count_images_by_brightness_and_contrast(
    built: BuiltDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars_of_split: dict[str, Axes] = {}

    def chart(title: str, draw: Draw, _size: tuple[float, float]) -> Chart:
        draw(bars_of_split.setdefault(title, Figure().subplots()), LIGHT)
        return Chart(title, b"", b"")

    monkeypatch.setattr(page_module, "chart", chart)
    built.version(records(range(40), channels=1) + records(range(40, 60), "held_out", 1))
    write_dataset_report(built.folder, built.folder.parent / "page.html")
    for name, measure, high in (("brightness", np.mean, 256), ("contrast", np.std, 128)):
        train, _, held_out = (patch.get_data() for patch in bars_of_split[f"Histogram of {name}"].patches)
        for histogram, seeds in ((train, range(40)), (held_out, range(40, 60))):
            counts, edges = np.histogram([measure(image(seed, 1)) for seed in seeds], 32, (0, high))
            assert histogram.values == pytest.approx(counts / len(seeds))
            assert histogram.edges == pytest.approx(edges)
    assert "Histogram of red" not in bars_of_split


def test_samples_of_a_class_are_images_of_that_class(built: BuiltDataset) -> None:
    seeds = {"cat": range(12), "dog": range(20, 24), "eel": range(30, 40), "fox": range(50, 60), "gnu": range(70, 80)}
    built.version([row for label, each in seeds.items() for row in records(each, label=label)])
    _, page = report(built)
    for label, each in seeds.items():
        shown_images = blocks(page.image(label), min(8, len(each)), 8)
        assert {pixels.tobytes() for pixels in shown_images} <= {image(seed).tobytes() for seed in each}
        assert len({pixels.tobytes() for pixels in shown_images}) == min(8, len(each))
        assert f"{label} {len(each)} images" in page.text
    assert "A sample" not in page.text


def test_one_class_and_images_without_any_are_all_shown(built: BuiltDataset) -> None:
    built.version(records(range(20), label="only") + records(range(30, 33)))
    _, page = report(built)
    labelled = blocks(page.image("only"), 20, 8)
    assert {each.tobytes() for each in labelled} == {image(seed).tobytes() for seed in range(20)}
    everything = blocks(page.image("A sample"), 23, 16)
    assert {each.tobytes() for each in everything} == {image(n).tobytes() for n in (*range(20), *range(30, 33))}
    assert "1 class 20 images" in page.text
    assert "3 images have no label" in page.text


def test_a_thousand_classes_are_summed_up(built: BuiltDataset) -> None:
    rows = [
        image_record(np.full((8, 8), n % 256, np.uint8) + np.eye(8, dtype=np.uint8) * (n // 256), f"{n}")
        for n in range(1003)
    ]
    for n, row in enumerate(rows):
        row["label"] = f"class {min(n, 999):03d}"
    built.version(rows)
    summary, page = report(built)
    assert summary.classes == 1000
    assert "4 images in the largest, 1 in the median one, 1 in the smallest; the 40 largest are shown" in page.text
    assert "960 smaller classes hold 960 images together" in page.text
    assert "1,000 classes have no held-out image" in page.text
    assert "The 12 largest of 1,000 classes." in page.text
    assert page.text.index("class 999") < page.text.index("class 000")


def test_duplicates_are_listed_with_the_image_that_was_kept(built: BuiltDataset) -> None:
    first = records([1, 2, 3])
    twice = [duplicate(first[1], f"copy-{n}.png") for n in range(3)]
    other = duplicate(first[2], "third.png") | {"reason": "came again with another label or caption"}
    built.version([*first, *twice[:1]])
    built.version([*twice[1:], other])
    summary, page = report(built)
    assert (summary.duplicates, summary.contradicted) == (4, 1)
    assert "1 of them came with another label or caption" in page.text
    listed = page.text[page.text.index("kept from") :]
    assert re.match(
        r"kept from duplicates 3 2\.png \w{16} copy-0\.png copy-1\.png and 1 more 1 3\.png \w{16} third\.png", listed
    )
    shown_images = [pixels[::8, ::8].tobytes() for name, pixels in page.images if name == "The image"]
    assert shown_images == [image(2).tobytes(), image(3).tobytes()]


def test_near_duplicate_groups_are_transitively_connected(built: BuiltDataset) -> None:
    rows = [row | {"phash": f"{n:064x}"} for n, row in enumerate(records(range(9)))]
    keys = [row["key"] for row in rows]
    for member, joined in ((1, [0]), (2, [1]), (4, [3]), (5, [3, 6]), (8, ["f" * 64])):
        rows[member]["near"] = [keys[each] if isinstance(each, int) else each for each in joined]
    built.version(rows[:4], rows[4:])
    summary, page = report(built)
    assert (summary.near_duplicate_groups, summary.near_duplicates) == (2, 7)
    shown_images = [
        set(map(bytes, blocks(pixels, int(name[0]), 8))) for name, pixels in page.images if name.endswith(" images")
    ]
    assert shown_images == [{image(n).tobytes() for n in group} for group in ((3, 4, 5, 6), (0, 1, 2))]
    assert "7 images in 2 groups" in page.text


def test_unsearched_near_duplicates_are_not_reported_as_none(built: BuiltDataset) -> None:
    built.version(records(range(3)))
    summary, page = report(built)
    assert (summary.near_duplicate_groups, summary.near_duplicates) == (None, None)
    assert "Near-duplicates not searched for" in page.text
    assert "dataset_near_duplicate_groups" not in summary.metrics()
    assert "Near-duplicates" not in summary.markdown()


def test_the_log_lists_every_version_with_what_it_changed(built: BuiltDataset) -> None:
    versions = [built.version(records(range(4)))]
    versions.append(built.version(records(range(10, 13), label="new")))
    versions.append(built.replace(0, records(range(1, 4)), "removal: asked for"))
    summary, page = report(built)
    listed = page.text[page.text.index("made by") :]
    expected = [("removal: asked for", "−1", 6), ("ingest", r"\+3", 7), ("ingest", r"\+4", 4)]
    pattern = " ".join(
        f"{version.digest[:12]}(?: this one)? {change} {moved} {count}"
        for version, (change, moved, count) in zip(reversed(versions), expected, strict=True)
    )
    assert re.search(pattern, listed)
    assert summary.parent == versions[1].digest


def test_classes_that_came_and_went_are_named(built: BuiltDataset) -> None:
    built.version(records([1], label="old"), records([2], label="stays"))
    built.replace(0, [row for n in range(9) for row in records([10 + n], label=f"new{n}")], "rebuild")
    _, page = report(built)
    assert "9 new classes: new0, new1, new2, new3, new4, new5, new6, new7 and 1 more." in page.text
    assert "1 class gone: old." in page.text


def test_removed_images_are_absent_from_the_dataset_report(dataset: Path, tmp_path: Path) -> None:
    before = write_dataset_report(dataset, tmp_path / "before.html")
    remove(dataset, Selection(sources=["even/00.png", "odd/01.png"]), "they asked for it")
    after = write_dataset_report(dataset, tmp_path / "after.html")
    assert (after.kept, after.removed) == (46, 2)
    assert (before.kept, after.parent) == (48, before.digest)
    pixels_by_page = {}
    for name, count in (("before", 24), ("after", 23)):
        page = Page((tmp_path / f"{name}.html").read_text())
        sheets = [blocks(page.image(label), count, 8) for label in ("even", "odd")]
        pixels_by_page[name] = {pixels.tobytes() for sheet in sheets for pixels in sheet}
    assert pixels_by_page["after"] < pixels_by_page["before"]
    assert (len(pixels_by_page["before"]), len(pixels_by_page["after"])) == (48, 46)
    assert "removal: they asked for it" in page.text


def test_a_data_set_fresh_from_the_ingest_is_reported(images: Path, tmp_path: Path) -> None:
    (images / "even" / "broken.png").write_bytes(b"no image")
    (images / "odd" / "again.png").write_bytes((images / "odd" / "01.png").read_bytes())
    folder = tmp_path / "data" / "blobs"
    result = ingest(folder, IngestConfig(source=str(images), size=8, held_out=0.33, near_duplicates=0))
    summary = write_dataset_report(folder, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert (summary.name, summary.digest, summary.kept) == ("blobs", result.digest, 48)
    assert (summary.duplicates, summary.quarantined, summary.classes, summary.near_duplicate_groups) == (1, 1, 2, 0)
    assert "12×12 pixels, all of them" in page.text
    assert "even/broken.png" in page.text
    assert "odd/again.png" in page.text


def test_the_calibrated_threshold_is_named_with_what_it_misses(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(80):
        blob(number, 24).save(tmp_path / "images" / f"{number}.png")
    folder = tmp_path / "data" / "blobs"
    config = IngestConfig(source=str(tmp_path / "images"), size=24, held_out=0.3, near_duplicates="auto")
    calibration = ingest(folder, config).near_duplicates
    assert calibration is not None
    assert calibration.copies is not None
    write_dataset_report(folder, tmp_path / "page.html")
    text = Page((tmp_path / "page.html").read_text()).text
    assert f"auto is {calibration.bits} bits in this data set" in text
    assert f"It misses about {100 - 100 * calibration.copies:.0f} % of these copies" in text


def test_dataset_report_works_with_a_single_image(built: BuiltDataset) -> None:
    built.version(records([1], "held_out"))
    summary, page = report(built)
    assert (summary.kept, summary.train) == (1, 0)
    assert "1 image of 8×8 pixels" in page.text
    (shown_images,) = blocks(page.image("A sample"), 1, 16)
    assert shown_images.tobytes() == image(1).tobytes()


def test_images_larger_than_a_page_needs_are_reduced(tmp_path: Path) -> None:
    built = BuiltDataset(tmp_path / "large", size=256)
    pixels = image(1, size=256)
    built.version([image_record(pixels, "1.png")])
    _, page = report(built)
    expected = pixels.reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(page.image("Mean image") - expected).max() <= 0.5


HOSTILE = "\"><script>alert('x')</script><img src=x onerror=y>&amp;`|[a](javascript:z)\n# {{ 7 * 7 }}"


def test_texts_from_outside_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    built = BuiltDataset(tmp_path / "built", size=8)
    first = [image_record(image(1), HOSTILE, label=HOSTILE, caption=HOSTILE)]
    built.version([*first, *records([2, 3], label="plain"), duplicate(first[0], f"again {HOSTILE}")])
    built.version([quarantined(f"bad {HOSTILE}", HOSTILE), *records([4], label=f"new {HOSTILE}")], change=HOSTILE)
    summary, page = report(built)
    allowed = (
        "html head meta title style body main header h1 h2 p div span a b i br figure figcaption img picture source"
    )
    allowed += " ul li dl dt dd code table thead tbody tr th td details summary"
    assert {tag for tag, _ in page.tags} <= set(allowed.split())
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all(each.startswith(("data:image/png;base64,", "#")) for each in page.addresses)
    seen = " ".join(HOSTILE.split())
    for text in ("built 4 images of", f"again {seen}", f"bad {seen}", f"new class: new {seen}", f"Made by {seen}"):
        assert text in page.text
    assert page.image(HOSTILE).shape[2] == 3
    rendered = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(summary.markdown()))
    assert {tag for tag, _ in rendered.tags} == {"h1", "table", "thead", "tbody", "tr", "th", "td", "code"}
    assert rendered.addresses == []
    assert "Data set built" in rendered.text
    assert f"by {seen} from" in rendered.text


def test_equal_versions_give_equal_pages(tmp_path: Path) -> None:
    pages = []
    for name in ("one", "other"):
        built = BuiltDataset(tmp_path / name / "built", size=8)
        rows = [row | {"phash": "0" * 64} for row in records(range(70), label="a", caption="b")]
        rows[1]["near"] = [rows[0]["key"]]
        built.version([*rows, duplicate(rows[0], "x"), duplicate(rows[3], "y"), quarantined("z", "no")])
        built.version(records(range(100, 155), label="c"))
        report(built)
        pages.append((tmp_path / name / "page.html").read_bytes())
        report(built, "again.html")
        pages.append((tmp_path / name / "again.html").read_bytes())
    assert len(set(pages)) == 1


def test_figures_are_flat_and_finite(built: BuiltDataset) -> None:
    built.version(records(range(5)))
    built.version(records(range(10, 12)))
    summary, _ = report(built)
    metrics = summary.metrics()
    assert (metrics["dataset_kept"], metrics["dataset_shards"]) == (7, 2)
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    assert DatasetSummary.model_validate_json(summary.model_dump_json()) == summary
    assert "| Images | 7: 7 for training, 0 held out |" in summary.markdown()


@pytest.mark.parametrize("kind", ["records", "shards"])
def test_what_is_missing_or_damaged_is_named(kind: str, built: BuiltDataset, tmp_path: Path) -> None:
    built.version(records(range(3)))
    (path,) = (built.folder / kind).iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match=path.name):
        write_dataset_report(built.folder, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_sizes_that_came_are_summed_up(built: BuiltDataset) -> None:
    sizes = [(4, 9), (30, 20), (30, 20), (7, 7), (500, 8)]
    built.version([image_record(image(n), f"{n}", width=w, height=h) for n, (w, h) in enumerate(sizes)])
    _, page = report(built)
    assert (
        "4 sizes shorter sides of 4 to 20 pixels, half of them at least 8; 40.0 % are below the stored 8" in page.text
    )
    assert re.search(r"30 × 20 2 40\.0 %", page.text)


def test_a_page_shows_images_of_several_shapes_and_counts_them(tmp_path: Path) -> None:
    folder = bucketed_set(tmp_path)
    summary = write_dataset_report(folder, tmp_path / "page.html")
    assert summary.buckets == {"12x24": 9, "16x16": 6, "24x12": 26}
    page = (tmp_path / "page.html").read_text()
    for name in ("12 × 24", "16 × 16", "24 × 12"):
        assert f"<td>{name}</td>" in page
    assert "24x12: 26" in summary.markdown()
