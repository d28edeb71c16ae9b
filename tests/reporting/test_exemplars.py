"""Typical and doubtful patches, and what they are counted by."""

import pytest
import torch
from torch.nn import functional as F

from reporting.exemplars import DOUBTFUL, SCENES, TYPICAL, ClusterSurvey, cut, nearest_clusters


def unit(*degrees: float) -> torch.Tensor:
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()])


def test_the_survey_finds_the_most_typical_and_the_most_doubtful_patch_of_a_picture():
    centroids = unit(0, 90)
    survey = ClusterSurvey(2)
    codes = (unit(3, 44, 20, 89) * 5).reshape(2, 2, 2)  # rows: 3, 44 | 20, 89 degrees
    image = (
        torch.arange(4.0).div(4).reshape(1, 2, 2).repeat_interleave(40, 1).repeat_interleave(40, 2).expand(3, -1, -1)
    )
    valid = torch.ones(80, 80, dtype=torch.bool)
    survey.add("one", image, valid, (centroids.T @ codes.flatten(1)).reshape(2, 2, 2), codes)
    assert survey.patches.tolist() == [3, 1]
    assert survey.pictures.tolist() == [1, 1]
    assert survey.shares().tolist() == [75, 25]
    wanted = torch.deg2rad(torch.tensor([3.0, 44, 20])).cos().mean()
    assert survey.mean_cosines()[0] == pytest.approx(float(wanted), abs=1e-5)
    (typical,), (doubtful,) = (survey.exemplars(kind, 0) for kind in ("typical", "doubtful"))
    assert typical.value == pytest.approx(float(torch.deg2rad(torch.tensor(3.0)).cos()), abs=1e-5)
    colours = [item.crop[sum(item.box[1::2]) // 2, sum(item.box[::2]) // 2, 0] for item in (typical, doubtful)]
    assert colours == [0, 64]  # the middles of patches 0 and 1
    assert doubtful.other == 1
    assert doubtful.value < 0.05


def test_padding_is_no_patch_and_each_picture_counts_once():
    survey = ClusterSurvey(3)
    valid = torch.zeros(16, 32, dtype=torch.bool)
    valid[:, :16] = True
    for number in range(20):
        codes = F.normalize(torch.randn(4, 2, 4, generator=torch.Generator().manual_seed(number)), dim=0)
        survey.add(str(number), torch.rand(3, 16, 32), valid, codes[:3], codes)
    assert survey.patches.sum() == 20 * 4
    for cluster in range(3):
        found = survey.exemplars("typical", cluster)
        assert len(found) == TYPICAL
        assert len({item.picture for item in found}) == TYPICAL
        assert [item.value for item in found] == sorted((item.value for item in found), reverse=True)
        doubts = survey.exemplars("doubtful", cluster)
        assert len(doubts) == DOUBTFUL
        assert [item.value for item in doubts] == sorted(item.value for item in doubts)


def test_pictures_that_a_cluster_takes_most_of_show_it_and_fade_the_rest():
    survey = ClusterSurvey(2)
    valid = torch.zeros(40, 80, dtype=torch.bool)
    valid[:, :40] = True  # the right half is padding
    centroids = unit(0, 90)
    for number, count in enumerate((1, 3, 2, 0, 4, 1)):  # patches of cluster 0, of four
        codes = unit(*[0] * count, *[90] * (4 - count), 0, 0, 0, 0).reshape(2, 2, 4)[:, :, [0, 1, 2, 3]]
        codes = torch.stack([codes[:, 0, :2], codes[:, 0, 2:]], 1)  # [D,2,2] of the picture
        codes = torch.cat([codes, unit(0, 0, 0, 0).reshape(2, 2, 2)], 2)
        image = torch.tensor([0.9, 0.1, 0.1])[:, None, None].expand(3, 40, 80)
        survey.add(str(number), image, valid, torch.einsum("dk,dhw->khw", centroids, codes), codes)
    found = survey.scenes(0)
    assert [item.picture for item in found] == ["4", "1", "2", "0"]
    assert [item.share for item in found] == [100, 75, 50, 25]
    assert len(survey.scenes(1)) == SCENES
    assert found[0].image.shape == (40, 40, 3)
    assert (found[0].image == [230, 26, 26]).all()
    half = found[2].image  # the upper row of patches is the cluster's
    assert (half[:15] == [230, 26, 26]).all()
    assert (half[25:, :30].max(-1) == half[25:, :30].min(-1)).all()  # grey
    assert half[25:, :30].min() > 180


def test_a_cut_stays_inside_the_picture_and_frames_its_patch():
    image = torch.zeros(3, 100, 120)
    image[:, 92:100, 0:8] = 1.0
    crop, (left, top, right, bottom) = cut(image, (92 // 8 + 0, 0), 8)
    assert crop.shape == (40, 40, 3)
    assert (left, right, bottom - top) == (0, 8, 8)
    assert crop[top + 5, 2, 0] == 255
    assert cut(image[:, :10, :10], (0, 0), 8)[0].shape == (40, 40, 3)


def test_nearest_clusters_are_sorted_and_never_the_own_one():
    near = nearest_clusters(unit(0, 10, 50, 180).T * 3, 2)
    assert [[other for other, _ in row] for row in near] == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert near[0][0][1] == pytest.approx(float(torch.deg2rad(torch.tensor(10.0)).cos()), abs=1e-5)
    assert nearest_clusters(unit(0).T) == [[]]
