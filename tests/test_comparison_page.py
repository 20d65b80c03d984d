"""The comparison's table, charts and page: what they say of given results, also in a real browser."""

import json
import math
import re
import shutil
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipelines.comparison import charts
from pipelines.comparison.checks import check_before, check_to_come
from pipelines.comparison.entries import Entry
from pipelines.comparison.findings import COLUMNS, collect, training_of
from pipelines.comparison.page import best_rows, escape_markdown, protocol_of, write_page
from pipelines.comparison.plots import charts_of
from pipelines.comparison.report import as_json, terminal_table
from pipelines.comparison.running import Failure, Member, Runner, members_of
from pipelines.evaluation.protocol import ANY
from pipelines.pictures import save_grid
from tests.outline import Outline

# Numbers
# --------------------------------------------------------------------------------------------

PROTOCOL = {"data": {"name": "MNIST", "split": "test", "count": 100, "content": "c" * 64},
            "pixels": "2 discrete values, one fixed draw with seed 0", "num_draws": 10}  # fmt: skip


def evaluated(nats: float, **metrics) -> dict:
    metrics = {"nats": nats, "nats_se": 0.5, "bits_per_dim": nats / 543.4, "bits_per_dim_se": 0.001, **metrics}
    return {
        "metrics": metrics,
        "groups": {"likelihood": list(metrics)},
        "protocol": {"likelihood": dict(PROTOCOL)},
        "not_measured": {"fid": "it needs inception_weights"},
        "pictures": {},
        "data": PROTOCOL["data"],
        "seed": 0,
        "versions": {"python": "3.11", "torch": "2"},
    }


def make_run(folder: Path, result: dict, *, steps=(10, 20), rate=100.0, second=False) -> Path:
    """A run folder as far as a comparison reads it."""
    for stage, name in (("stage_one", "nll"), ("stage_two", "bits_per_image")) if second else (("stage_one", "nll"),):
        (folder / stage).mkdir(parents=True)
        config = {"data": {"name": "MNIST"}, "training": {"total_steps": steps[-1], "batch_size": 50}}
        (folder / stage / "config.yaml").write_text(yaml.safe_dump(config))
        lines = [{"step": step, "train/images_per_second": rate} for step in steps]
        lines += [{"step": step, f"validation/{name}": 2.0 / step} for step in steps]
        text = "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["step"]))
        (folder / stage / "log.jsonl").write_text(text + '{"step": 30, "cut o')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "config.json").write_text(json.dumps({"image_shape": [1, 28, 28]}))
    (folder / "evaluation.json").write_text(json.dumps(result))
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.fixture
def members(tmp_path):
    titles = {"a": "VQ <b>bold</b> & | more", "b": "DVAE++", "c": "third"}
    results = {
        "a": evaluated(
            100.0,
            rate_nats=30.0,
            distortion_nats=70.0,
            psnr=12.0,
            codebook_usage_0=1.0,
            codebook_usage_1=0.5,
            position_entropy_0=0.2,
            position_entropy_1=0.4,
        ),
        "b": evaluated(90.0, rate_nats=20.0, distortion_nats=70.5, psnr=9.5, log_partition=55.0, log_partition_se=0.01),
        "c": evaluated(
            1090.0, rate_nats=5.0, distortion_nats=1085.0, psnr=12.0, codebook_usage=0.25, position_entropy=0.5
        ),
    }
    return [
        Member(name, titles[name], make_run(tmp_path / "runs" / name, results[name], second=name != "b"), None)
        for name in titles
    ]


def test_results_of_different_protocols_do_not_stand_in_one_table(members):
    other = evaluated(80.0)
    other["protocol"]["likelihood"]["num_draws"] = 1
    (members[1].folder / "evaluation.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"of a and of b cannot stand in one table.*num_draws: 10 and 1"):
        collect(members, {})


def test_a_damaged_log_is_named(members):
    log = members[0].folder / "stage_one" / "log.jsonl"
    log.write_bytes(b"\0\0\0\n" + log.read_bytes())
    with pytest.raises(ValueError, match=r"stage_one/log\.jsonl has a damaged line"):
        collect(members, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draws": 1}, r"'likelihood' of a cannot stand in one table .* \(num_draws: 10 and 1\); give the options"),
        ({"pixels": "none"}, "pixels: 2 discrete values, one fixed draw with seed 0 and 256 discrete values"),
        ({"content": "d" * 64}, "data.content: c+ and d+"),
        ({"num_draws": 1, "metrics": ["codebook"]}, None),
        ({"num_draws": 1, "measured_draws": f"{ANY}the encoder is deterministic"}, None),
        ({"num_samples": 10}, "'memorisation' of a .*num_samples: 1000 and 10"),
        ({"seed": 0}, r"'classifier' of a .* \(seed: 3 and 0\); give the options that a was evaluated with"),
        ({"trained_on": "d" * 64}, "'classifier' of a .*trained_on.content: c+ and d+"),
        ({"seed": 0, "trained_on": "d" * 64, "metrics": ["likelihood"]}, None),  # which trains no classifier
        ({"seed": 0, "trained_on": "d" * 64, "inception_weights": "x.safetensors"}, None),
        ({}, None),
    ],
)
def test_a_run_that_cannot_stand_beside_what_is_to_come_is_found_before(options, message):
    options = {"metrics": None, "num_draws": 10, "num_samples": 1000, "inception_weights": None, "seed": 3} | options
    preprocessing = {"binarize": options.pop("pixels", "fixed"), "binarize_seed": 0}
    identity = PROTOCOL["data"] | {"content": options.pop("content", "c" * 64)}
    images = SimpleNamespace(identity=identity, preprocessing=preprocessing)
    train_images = SimpleNamespace(identity=PROTOCOL["data"] | {"content": options.pop("trained_on", "c" * 64)})
    result = evaluated(1.0)
    result["protocol"]["likelihood"]["num_draws"] = options.pop("measured_draws", 10)
    result["parts"] = [{"seed": 3, "groups": ["classifier", "samples"]}, {"seed": 0, "groups": ["likelihood"]}]
    result["protocol"]["classifier"] = {"features": {"weights": "w" * 64, "trained_on": PROTOCOL["data"]}}
    result["protocol"]["memorisation"] = {"data": PROTOCOL["data"], "num_samples": 1000, "num_held_out": 7}
    result["protocol"]["samples"] = {"num_samples": 1000}  # in the features of Inception, which others may not have
    if message is None:
        check_to_come({"a": result}, options, images, train_images)
        check_to_come({"a": result}, options)
    else:
        with pytest.raises(ValueError, match=message):
            check_to_come({"a": result}, options, images, train_images)


BITS = {"channels": 1, "binarize": "fixed", "binarize_seed": 0}
GREY = {"channels": 1, "binarize": "none"}
OTHER_PIXELS = r"preprocessing.binarize: fixed and none; preprocessing.binarize_seed: 0 and \(absent\)"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"preprocessing": GREY}, rf"a and b cannot stand in one table, their images differ \({OTHER_PIXELS}\); comp"),
        ({"name": "FashionMNIST"}, r"their images differ \(name: MNIST and FashionMNIST\)"),
        ({"split": "validation"}, r"their images differ \(split: test and validation\)"),
        ({"content": "d" * 64}, r"their images differ \(content: c+ and d+\)"),
        ({"split_seed": 7}, None),  # of data whose test split it does not change
    ],
)
def test_models_of_different_images_do_not_stand_in_one_table_though_they_share_no_metric(tmp_path, other, message):
    of_bits, of_others = evaluated(100.0), evaluated(1.0)
    of_bits["data"] = PROTOCOL["data"] | {"preprocessing": BITS, "split_seed": 0}
    of_others["data"] = of_bits["data"] | other
    of_others |= {"metrics": {"perplexity": 3.0}, "groups": {"codebook": ["perplexity"]}, "protocol": {"codebook": {}}}
    members = [
        Member(name, name, make_run(tmp_path / name, result), None)
        for name, result in {"a": of_bits, "b": of_others}.items()
    ]
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        collect(members, {})


@pytest.mark.parametrize(
    ("name", "preprocessing", "message"),
    [
        ("MNIST", GREY, rf"a and b cannot stand in one table, their images differ \({OTHER_PIXELS}\)"),
        ("Omniglot", BITS, "name: MNIST and Omniglot"),
        ("MNIST", BITS, None),
    ],
)
@pytest.mark.parametrize("measured", ["", "a", "b"])
def test_run_folders_of_different_images_are_refused_before_they_are_evaluated(
    tmp_path, name, preprocessing, message, measured
):
    for run, data_name, of in (("a", "MNIST", BITS), ("b", name, preprocessing)):
        result = evaluated(1.0)
        result["data"] = PROTOCOL["data"] | {"name": data_name, "preprocessing": of}
        folder = make_run(tmp_path / run, result)
        (folder / "tokenizer" / "config.json").write_text(json.dumps({"preprocessing": of}))
        (folder / "stage_one" / "config.yaml").write_text(yaml.safe_dump({"data": {"name": data_name}}))
        if run not in measured:
            (folder / "evaluation.json").unlink()
    options = {"split": "test", "metrics": None, "num_draws": 10, "num_samples": 10, "inception_weights": None,
               "lpips_weights": None, "seed": 0, "batch_size": 8}  # fmt: skip
    runner = Runner(tmp_path / "out", tmp_path, options)
    members = members_of([], [str(tmp_path / "a"), str(tmp_path / "b")], runner.output)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_before(members, runner)


def test_the_seconds_of_training_are_those_of_its_steps(tmp_path):
    folder = make_run(tmp_path / "run", evaluated(1.0), steps=(10, 20, 40), rate=25.0)
    found = training_of(Member("run", "run", folder, None))
    assert found == {"stage_one_steps": 40, "stage_one_seconds": pytest.approx(40 * 50 / 25)}


def test_a_shared_tokenizer_counts_as_trained_once_for_each_that_uses_it(tmp_path):
    make_run(tmp_path / "owner", evaluated(1.0))
    shutil.copytree(tmp_path / "owner", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "stage_one")
    entry = Entry("other", "other", "owner", {}, {})
    assert training_of(Member("other", "other", tmp_path / "other", entry))["stage_one_steps"] == 20


def test_levels_of_codes_are_summed_up_in_one_column(members):
    findings = collect(members, {})
    assert [row.get("codebook_usage") for row in findings.rows] == [0.75, None, 0.25]
    assert [row.get("position_entropy") for row in findings.rows] == [pytest.approx(0.3), None, 0.5]


def test_curves_are_in_nats_per_image(members):
    curves = collect(members, {}).curves
    assert curves["distortion"][0].points == [(10, pytest.approx(0.2 * 784)), (20, pytest.approx(0.1 * 784))]
    assert curves["codes"][0].points == [(10, pytest.approx(0.2 * math.log(2))), (20, pytest.approx(0.1 * math.log(2)))]
    assert [curve.name for curve in curves["codes"]] == ["a", "c"]


# Of each group of metrics and each data set, what its columns show
OF_GROUPS = [
    ("samples", {"inception_score_classifier": 3.5, "inception_score_classifier_std": 0.1},
     {"Inception score of a classifier ↑": "3.50"}),
    ("samples", {"inception_score": 3.5}, {"Inception score ↑": "3.50"}),
    ("memorisation", {"copying": 0.53, "nearest_train_sample": 0.125, "nearest_train_held_out": 0.25},
     {"copying": "0.530", "nearest, of samples": "0.1250", "nearest, of held-out": "0.2500"}),
    ("local", {"class_agreement": 0.686, "class_agreement_se": 0.01, "class_agreement_by_chance": 0.1},
     {"same class (%) ↑": "68.6 ± 1.0", "same class, by chance (%)": "10.0"}),
    ("codebook", {"position_entropy": 0.5}, {"position entropy (nats)": "0.500"}),
    ("ood_a|b", {"ood_auroc_a|b": 0.9, "ood_nats_a|b": 70.0}, {r"AUROC, a\|b ↑": "0.900"}),
]  # fmt: skip


@pytest.mark.parametrize(("group", "metrics", "shown"), OF_GROUPS)
def test_each_group_that_was_measured_has_its_columns(tmp_path, group, metrics, shown):
    result = evaluated(1.0) | {"metrics": metrics, "groups": {group: list(metrics)}, "protocol": {group: {}}}
    members = [Member(name, name, make_run(tmp_path / name, result), None) for name in ("a", "b")]
    write_page(collect(members, {}), tmp_path, title="t", command="c", pictures={})
    head, _, row = re.findall(r"^\|.*\|$", (tmp_path / "comparison.md").read_text(), re.MULTILINE)[:3]
    head, row = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in (head, row))
    assert shown.items() <= dict(zip(head, row)).items()
    html = {text for _, text in Outline((tmp_path / "comparison.html").read_text()).all("td")}
    assert set(shown.values()) <= html


def test_the_best_is_the_lowest_the_highest_or_none():
    columns = {column.metric: column for column in COLUMNS}
    rows = [{"nats": 3.0, "psnr": 1.0, "rate_nats": 1.0}, {"nats": 2.0, "psnr": 2.0}, {"psnr": 2.0, "rate_nats": 2.0}]
    assert best_rows(rows, columns["nats"]) == {1}
    assert best_rows(rows, columns["psnr"]) == {1, 2}
    assert best_rows(rows, columns["rate_nats"]) == set()
    assert best_rows(rows[:1], columns["nats"]) == set()


# The page
# --------------------------------------------------------------------------------------------


@pytest.fixture
def page(members, tmp_path):
    output = tmp_path / "out"
    findings = collect(members, {"x": Failure("X", "stage_one", "no <luck>", output / "x.log")})
    pictures = {}
    for member in members:
        path = output / "pictures" / f"{member.name}-samples.png"
        save_grid(torch.rand(4, 1, 8, 8), path, columns=2)
        pictures[member.name] = {"samples": path}
    write_page(findings, output, title="A & B", command="python compare.py --x '<y>'", pictures=pictures)
    return output / "comparison.html", findings


def test_the_page_is_well_formed_and_needs_nothing_else(page):
    path, _ = page
    text = path.read_text()
    outline = Outline(text)
    for tag, attributes, _ in outline.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
                assert value.startswith("data:"), f"<{tag} {name}={value}> is not inside the page"
    assert not re.search(r"https?://|@import|url\(|//cdn", text)
    assert len(outline.all("img")) == 3
    assert all(attributes["alt"] for attributes, _ in outline.all("img"))
    assert outline.all("html")[0][0]["lang"] == "en"
    assert "width=device-width" in text


def test_texts_of_users_are_escaped(page):
    path, _ = page
    outline = Outline(path.read_text())
    assert "b" not in [tag for tag, _, texts in outline.elements if texts == ["bold"]]
    assert any("VQ <b>bold</b> & | more" in text for _, text in outline.all("th"))
    assert any("no <luck>" in text for _, text in outline.all("li"))
    assert outline.all("title")[0][1] == "A & B"
    assert outline.all("code")[-1][1] == "python compare.py --x '<y>'"


def test_each_cell_can_be_sorted_by_its_value_and_shows_it(page):
    path, findings = page
    cells = Outline(path.read_text()).all("td")
    expected = [row.get(column.metric) for row in findings.rows for column in findings.columns]
    assert len(cells) == len(expected)
    for (attributes, text), value in zip(cells, expected):
        assert (float(attributes["data-sort"]) if "data-sort" in attributes else None) == value
        assert (text == "–") == (value is None)
    texts = [text for _, text in cells]
    assert "90.00 (best) ± 0.50" in texts
    assert "1,090.00 ± 0.50" in texts
    assert "75.0 (best)" in texts


def test_the_page_says_how_it_was_measured_and_what_was_not(page):
    text = page[0].read_text()
    outline = Outline(text)
    said = dict(zip([text for _, text in outline.all("dt")], [text for _, text in outline.all("dd")]))
    assert said["pixels"] == PROTOCOL["pixels"]
    assert said["data"] == "MNIST test, 100 images, content cccccccccccc"
    assert said["num draws"] == "10"
    assert said["torch"] == "2"
    assert any("it needs inception_weights (all models)" in text for _, text in outline.all("li"))
    assert "stage one takes 20 steps of 50 images" in text


def test_a_budget_that_is_not_equal_is_said(members, tmp_path):
    config = members[0].folder / "stage_one" / "config.yaml"
    config.write_text(config.read_text().replace("batch_size: 50", "batch_size: 51"))
    findings = collect(members, {})
    write_page(findings, tmp_path / "out", title="t", command="c", pictures={})
    assert "stage one was NOT equally long" in (tmp_path / "out" / "comparison.md").read_text()


def test_the_markdown_finds_the_pictures_of_any_run_folder(members, tmp_path):
    name = "my run (1) [ä]"
    member = Member(name, name, members[0].folder, None)
    (tmp_path / "pictures").mkdir()
    path = save_grid(torch.rand(4, 1, 8, 8), tmp_path / "pictures" / f"{name}-samples.png", columns=2)
    write_page(collect([member], {}), tmp_path, title="t", command="c", pictures={name: {"samples": path}})
    (link,) = re.findall(r"\]\((pictures/[^\s()<>]*-samples\.png)\)", (tmp_path / "comparison.md").read_text())
    assert (tmp_path / unquote(link)).is_file()


def test_the_page_names_the_seeds_and_versions_of_all_evaluations(members):
    result = evaluated(1.0)
    result["parts"] = [{"seed": seed, "versions": {"torch": f"2.{seed}"}} for seed in (3, 4)]
    (members[0].folder / "evaluation.json").write_text(json.dumps(result))
    assert dict(dict(protocol_of(collect(members[:1], {})))["seed and versions"]) == {
        "seed": "3, 4",
        "torch": "2.3, 2.4",
    }


def test_the_page_says_how_many_draws_there_were_where_that_mattered(members):
    result = evaluated(1.0)
    result["protocol"]["likelihood"]["num_draws"] = f"{ANY}the encoder is deterministic"
    (members[0].folder / "evaluation.json").write_text(json.dumps(result))
    assert dict(dict(protocol_of(collect(members, {})))["likelihood"])["num draws"] == "10"


def test_the_markdown_has_the_same_table(page):
    path, findings = page
    text = path.with_suffix(".md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")][: len(findings.rows) + 2]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert {len(row) for row in cells} == {len(findings.columns) + 1}
    assert cells[0][1].strip() == "-log p(x) (nats) ↓"
    assert cells[2][0].strip() == r"VQ \<b\>bold\</b\> & \| more"
    assert cells[3][1].strip() == "**90.00 ± 0.50**"
    for target in re.findall(r"!\[[^\]]*\]\((.*?)\)", text):
        assert (path.parent / target).is_file()


@given(st.text())
def test_escaped_text_makes_no_cells_and_no_lines(text):
    escaped = escape_markdown(text)
    assert not re.search(r"(?<!\\)(\\\\)*[|<`*]", escaped)
    assert "\n" not in escaped


def test_without_any_model_there_is_still_a_page(tmp_path):
    write_page(collect([], {}), tmp_path, title="none", command="c", pictures={})
    assert "No model was measured." in (tmp_path / "comparison.html").read_text()
    assert "No model was measured." in (tmp_path / "comparison.md").read_text()


def test_the_terminal_shows_aligned_columns_and_json_all(members):
    findings = collect(members, {})
    lines = terminal_table(findings).splitlines()
    assert lines[3].startswith("DVAE++ ")
    assert lines[3].index("90.00") > lines[2].index("100.00")  # to the right
    found = json.loads(json.dumps(as_json(findings, title="t", command="c")))
    assert found["models"][1]["metrics"]["nats"] == 90.0
    assert "psnr" in [column["metric"] for column in found["columns"]]


# Charts
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_model_whose_bound_is_nan_is_charted_with_the_others(tmp_path, order):
    whole, broken = evaluated(100.0), evaluated(1.0, distortion_nats=70.0, rate_nats=3.0)
    for result in (whole, broken):
        result["protocol"]["likelihood"]["pixels"] = "256 discrete values, no dequantisation"
    del broken["metrics"]["nats"], broken["metrics"]["bits_per_dim"]
    results = {"a": whole, "b": broken}
    findings = collect([Member(name, name, make_run(tmp_path / name, results[name]), None) for name in order], {})
    assert all("bits/dim" in chart.svg for chart in charts_of(findings))


VALUES = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 4))


@given(st.lists(VALUES, min_size=1, max_size=5), st.booleans())
def test_ticks_are_round_even_and_hold_all_values(values, from_zero):
    found = charts.ticks(values, from_zero)
    steps = [b - a for a, b in pairwise(found)]
    assert 2 <= len(found) <= 12
    slack = 1e-6 * max(1, *map(abs, values))
    assert found[0] <= min(values) + slack
    assert found[-1] >= max(values) - slack
    assert max(steps) - min(steps) <= 1e-6 * max(1, max(map(abs, found)))
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5, 10)) < 1e-3


def test_ticks_of_values_that_hardly_differ_or_are_tiny():
    assert charts.ticks([100.0, 100.0 + 1e-11]) == charts.ticks([100.0])
    found = charts.ticks([1e-12, 2e-12])
    assert found[0] <= 1e-12
    assert found[-1] >= 2e-12
    assert 2 <= len(set(found)) == len(found)


def test_curves_pass_through_their_points():
    series = [
        charts.Series(0, "one", [(0, 0.0), (5, 50.0), (10, 100.0)]),
        charts.Series(9, "two", [(0, 100.0), (10, 0.0)]),
    ]
    svg = ElementTree.fromstring(charts.curves(series, x_label="x", y_label="y", description="d"))
    lines = [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()] for line in svg.iter("polyline")
    ]
    (left, low), middle, (right, high) = lines[0]
    assert left < right
    assert low > high  # y grows downwards
    assert middle == pytest.approx(((left + right) / 2, (low + high) / 2))
    assert lines[1] == [(left, high), (right, low)]
    dashes = [line.get("stroke-dasharray") for line in svg.iter("polyline")]
    assert dashes == ["none", "6 4"]  # of the same colour circle, a second time round


def test_charts_name_their_axes_models_and_values():
    series = [charts.Series(i, f"model <{i}>", [(10.0 + 0.1 * i, 20.0)]) for i in range(5)]
    svg = ElementTree.fromstring(
        charts.scatter(series, x_label="rate (nats)", y_label="distortion", description="a & b", sum_label="sum")
    )
    texts = [text.text for text in svg.iter("text")]
    assert {"rate (nats)", "distortion", *(one.title for one in series)} <= set(texts)
    assert svg.get("aria-label") == "a & b"
    assert [title.text for title in svg.iter("title")] == [one.title for one in series]
    assert any(text.startswith("sum ") for text in texts)


def test_labels_of_a_crowd_do_not_cover_each_other():
    points = [(10, 100), (11, 101), (12, 99), (10, 98), (60, 40), (61, 41), (60, 42)]
    series = [charts.Series(i, f"model number {i}", [point]) for i, point in enumerate(points)]
    svg = ElementTree.fromstring(charts.scatter(series, x_label="x", y_label="y", description="d", sum_label=""))
    labels = [text for text in svg.iter("text") if text.text.startswith("model")]
    boxes = [charts._box_of_text(text.text, float(text.get("x")), float(text.get("y"))) for text in labels]
    assert all(charts._overlap(a, b) == 0 for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box[0] >= charts.LEFT and box[2] <= charts.WIDTH for box in boxes)


def test_a_chart_as_a_file_brings_its_colours(page):
    path, _ = page
    for name in ("rate-distortion", "stage-one-distortion", "stage-two-codes"):
        svg = ElementTree.parse(path.parent / "pictures" / f"{name}.svg").getroot()
        assert svg.tag == "{http://www.w3.org/2000/svg}svg"
        used = set(re.findall(r"var\(--(\w+)\)", ElementTree.tostring(svg, encoding="unicode")))
        style = svg.find("{http://www.w3.org/2000/svg}style").text
        assert all(f"--{variable}:" in style for variable in used)


# In a browser
# --------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")  # fmt: skip


@contextmanager
def browser(profile: Path):
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def test_the_page_sorts_and_fits_a_phone_in_a_real_browser(page, tmp_path):
    path, _ = page
    with browser(tmp_path / "profile") as driver:
        size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(path.as_uri())

        def names() -> list[str]:
            return [cell.text for cell in driver.find_elements("css selector", "tbody th")]

        def click(column: int) -> str:
            head = driver.find_elements("css selector", "thead th")[column]
            driver.execute_script("arguments[0].querySelector('button').click()", head)
            return head.get_attribute("aria-sort")

        first, second, third = names()
        assert click(1) == "ascending"  # nats, lower is better: 90, 100, 1,090, not by their letters
        assert names() == [second, first, third]
        assert click(1) == "descending"
        assert names() == [third, first, second]
        headings = [cell.text.split("\n")[0] for cell in driver.find_elements("css selector", "thead th")]
        assert click(headings.index("codes used ↑")) == "descending"  # higher is better, and b has none
        assert names() == [first, third, second]
        assert click(headings.index("codes used ↑")) == "ascending"
        assert names() == [third, first, second]  # what is missing stays below
        assert click(0) == "ascending"
        assert names() == [first, second, third]

        button = driver.find_elements("css selector", "thead button")[1]
        driver.execute_script("arguments[0].focus()", button)
        button.send_keys("\n")  # the keyboard sorts too
        assert names() == [second, first, third]

        width, scroll = driver.execute_script(
            "return [document.documentElement.clientWidth, document.documentElement.scrollWidth]"
        )
        assert width == 390
        assert scroll <= width
        inner = driver.find_element("css selector", "div.scroll")
        assert driver.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", inner)
        colours = []
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            colours.append(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
        assert colours == ["rgb(255, 255, 255)", "rgb(20, 24, 29)"]
        assert driver.get_log("browser") == []
