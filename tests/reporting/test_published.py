"""What papers report: the page is the file, and a comparison shows cited rows apart from measured ones."""

import csv
import re
from io import StringIO

import config
import run
from reporting import comparison, comparison_tables, published
from tests.reporting.test_comparison import finished

NAMES = "cocostuff27, cityscapes27, potsdam3, cocostuff15, potsdam6, pascal_voc, cityscapes19, kitti, coco81, coco20k"


def test_the_page_is_that_of_the_file():
    assert published.PAGE.read_text(encoding="utf-8") == published.page(), "run make published"


def test_every_row_has_a_score_a_protocol_and_a_source_and_names_no_place():
    found = published.rows()
    assert len(found) == sum(1 for _ in published.FILE.open(encoding="utf-8")) - 1 > 150
    for row in found:
        assert row.method, row
        assert row.protocol, row
        assert re.search(r"20\d\d|^COMUS", row.source), row
        assert row.figures(), row
        assert all(re.fullmatch(r"\d+(\.\d)?( ± \d\.\d)?", figure) for figure in row.figures().values()), row
        assert all(0 <= float(figure.split(" ")[0]) <= 100 for figure in row.figures().values()), row
    text = published.FILE.read_text(encoding="utf-8") + published.page()
    assert not re.search(r"/work|/home|http|\.md\b", text)


def test_other_classes_under_one_name_are_another_protocol():
    (row,) = [row for row in published.of("cocostuff27") if row.method == "AC"]
    assert row.protocol.startswith("15 stuff classes")
    assert row.caution


def test_an_unknown_data_set_is_one_line_that_names_those_there_are(capsys):
    assert run.main(["compare", "methods=stego", "published=cocostuf27"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: published=cocostuf27: no published row of such a data set; did you mean cocostuff27?"
    )
    assert f"(there are {NAMES}, " in line
    assert run.main(["compare", "methods=stego", "published="]) == 2
    assert "published: names no data set; those with" in capsys.readouterr().err


def test_cited_rows_stand_below_and_are_never_ranked_with_measured_ones():
    sections = comparison.arrange([finished(seed=seed, miou=10.0 + seed) for seed in range(3)])
    sections[0].entries[0].label = "mine"
    cited = published.of("kitti potsdam3")
    text = comparison_tables.markdown(sections, "T", cited)
    alone = comparison_tables.markdown(sections, "T")
    assert text.startswith(alone)
    below = text.removeprefix(alone)
    assert below.count("\n| cited | ") == len(cited) == 15
    assert below.count(published.SAID) == 2
    assert "\n## Cited: kitti\n" in below
    assert "**" not in below
    assert all(row.source in below for row in cited)

    text, alone = comparison_tables.latex(sections, "T", cited), comparison_tables.latex(sections, "T")
    assert text.startswith(alone)
    below = text.removeprefix(alone)
    assert below.count("    cited & ") == 15
    assert below.count("\\color{gray}") == below.count("\\end{table}") == 2
    assert "mathbf" not in below

    rows = list(csv.DictReader(StringIO(comparison_tables.as_csv(sections, cited))))
    measured = list(csv.DictReader(StringIO(comparison_tables.as_csv(sections))))
    assert [{key: row[key] for key in measured[0]} for row in rows[: len(measured)]] == measured
    below = rows[len(measured) :]
    assert {(row["protocol"], row["stage"], row["runs"]) for row in below} == {("cited", "cited", "")}
    hsg = [row for row in below if (row["method"], row["data"]) == ("HSG", "kitti")]
    assert [(row["probe"], row["metric"], row["mean"], row["source"]) for row in hsg] == [
        ("retrieval", "miou", "21.7", "HSG (CVPR 2022), poster")
    ]


def test_names_of_data_sets_that_are_here_are_ours():
    """Those that are none of ours (other classes of the same pictures, instances) do not look like one."""
    ours = set(config.names("data"))
    assert {"cocostuff27", "cityscapes27", "potsdam3", "pascal_voc", "kitti", "coco81"} <= ours & {
        row.data for row in published.rows()
    }


def test_every_row_has_as_many_fields_as_the_header():
    """An unquoted comma would cut a caution short in silence."""
    with published.FILE.open(newline="", encoding="utf-8") as handle:
        header, *rest = csv.reader(handle)
    assert {len(row) for row in rest} == {len(header)}
