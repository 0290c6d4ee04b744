"""Licences of `zoo export --license`, and how a card states them."""

import pytest

from zoo.composed.card_facts import PERMISSIVE
from zoo.composed.licences import IDENTIFIERS, licence_given, on_card
from zoo.registry import ZooError


@pytest.mark.parametrize("word", ["apache-2.0", "MIT", " cc-by-nc-4.0", "llama3.1", "openrail++", ""])
def test_identifiers_of_the_hub_are_taken(word):
    name = licence_given(word, "--license")
    assert name == word.strip().lower() and on_card(name) == (name, "")


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("apache2", "Did you mean 'apache-2.0'"),
        ("apache-2", "Did you mean 'apache-2.0'"),
        ("agpl3.0", "Did you mean 'agpl-3.0'"),
        ("cc-by-nc-4", "Did you mean 'cc-by-nc-4.0'"),
        ("llama-3.1", "Did you mean 'llama3.1'"),
        ("proprietary", "Common ones: apache-2.0"),
        ("other", "needs a name"),
        ("other:", "needs a name"),
        ("other:a b", "needs a name"),
        ("other:../x", "needs a name"),
    ],
)
def test_others_are_refused_with_the_nearest(word, why):
    with pytest.raises(ZooError) as caught:
        licence_given(word, "--license")
    assert str(caught.value).startswith(f"--license {word}: ") and why in str(caught.value)
    assert "--license other:<name>" in str(caught.value)


def test_one_of_your_own_has_a_name():
    name = licence_given("other:My-Terms_1.0", "--license")
    assert name == "my-terms_1.0" and on_card(name) == ("other", name)
    assert set(PERMISSIVE) <= IDENTIFIERS and on_card("") == ("", "")
