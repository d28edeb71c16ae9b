"""What a comparison says in a terminal."""

from io import StringIO

from rich.console import Console

from reporting import comparison, comparison_screen
from tests.reporting.test_comparison import finished


def test_a_row_of_many_scores_is_one_line_of_a_terminal():
    config = {"data.label_suffix": ""}
    scores = {f"val/{probe}/{metric}": 20.0 for probe in ("kmeans", "linear") for metric in ("acc", "miou")}
    known = {"headline": "kmeans", **scores}
    runs = [finished("kmeans_baseline", seed, 20.0 + seed, config=config, **known) for seed in range(3)]
    runs += [finished("hidden_positives", seed, 40.0 + seed, config=config, **scores) for seed in range(3)]
    other = finished("hsg", config={**config, "method.num_clusters": 27})
    out = StringIO()
    screen = Console(file=out, width=120, force_terminal=True, no_color=True)
    for part in comparison_screen.lines(comparison.arrange([*runs, other])):
        screen.print(part)
    rows = [row for row in out.getvalue().splitlines() if "hidden_positives" in row]
    assert len(rows) == 1
    assert "41.0 ± 1.0" in rows[0]
    assert "\x1b[1m" in rows[0]  # ahead of all others
    assert "82.0 ± 2.0" in rows[0]
    assert "score" in out.getvalue()
    assert " of " in out.getvalue()
    assert "not comparable with the first table: clusters: 12 -> 27" in out.getvalue()
    assert out.getvalue().count("Protocol: data.name scenes") == 2
