"""How axes of counts are labelled."""

import pytest

from train.figures import label_counts, new_figure, save_figure


@pytest.mark.parametrize(
    ("scale", "limits", "labels", "minor"),
    [
        ("log", (150, 450), set(), {"200", "300", "400"}),
        ("log", (1, 50_000), {"1", "10", "1,000", "10,000"}, {""}),
        ("linear", (0, 1.2), {"0", "1"}, set()),
        ("linear", (0, 25_000), {"0", "10,000", "20,000"}, set()),
    ],
)
def test_axes_of_counts_have_whole_numbers(tmp_path, scale, limits, labels, minor):
    figure, [ax] = new_figure(1)
    ax.set(yscale=scale, ylim=limits)
    label_counts(ax.yaxis)
    save_figure(figure, tmp_path / "plot.png")
    shown = [
        [
            label.get_text()
            for label in ax.yaxis.get_ticklabels(minor=is_minor)
            if limits[0] <= label.get_position()[1] <= limits[1]
        ]
        for is_minor in (False, True)
    ]
    assert labels <= set(shown[0]) and len(set(shown[0])) == len(shown[0])
    assert minor <= set(shown[1]) and not any("$" in label for labels in shown for label in labels)
