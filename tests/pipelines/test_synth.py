import pytest

from fr_core.errors import UserError
from pipelines.cli import data
from tests.helpers.commands import bigface


@pytest.mark.parametrize(
    ("identities", "shots", "said"),
    [(19, 2, "--pairs 3 needs 20 people, .* use --identities 20 or more"), (20, 1, "two images of each person")],
)
def test_pairs_that_the_people_cannot_make_are_refused_before_a_face_is_drawn(tmp_path, identities, shots, said):
    with pytest.raises(UserError, match=said):
        bigface("synth", "--out", tmp_path / "a", "--identities", identities, "--shots", shots, "--pairs", 3)
    assert not (tmp_path / "a").exists()


def test_the_fewest_people_make_pairs_and_repeats_are_told(tmp_path, monkeypatch):
    advanced = []
    monkeypatch.setattr(data, "growing", lambda advance: lambda done, total: advanced.append((done, total)))
    given = ("--identities", 20, "--shots", 2, "--size", 16, "--pairs", 3)
    printed = bigface("synth", "--out", tmp_path / "a", *given)
    assert len((tmp_path / "a" / "pairs.csv").read_text().splitlines()) == 1 + 10 * 2 * 3
    assert "a fold has 2 distinct pairs of one person: --pairs 3 repeats some" in printed
    assert advanced[-1] == (40, 40)
