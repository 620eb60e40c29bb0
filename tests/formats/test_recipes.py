"""Recipes: equal ones have one hash, and of two that differ it is said in what."""

from hasten.formats import recipe_hash
from hasten.formats.recipes import recipe_difference


def test_a_recipe_hash_depends_on_content_and_not_on_order():
    one = {"a": 1, "b": {"c": 2.5, "d": [1, 2]}}
    other = {"b": {"d": [1, 2], "c": 2.5}, "a": 1}
    assert recipe_hash(one) == recipe_hash(other)
    assert len(recipe_hash(one)) == 12 and int(recipe_hash(one), 16) >= 0
    assert recipe_hash(one) != recipe_hash(one | {"a": 2})


def test_the_difference_of_two_recipes_names_its_keys():
    one = {"optimizer": {"lr": 0.01, "rho": 0.1}, "shape": (3, 8), "only": 1}
    other = {"optimizer": {"lr": 0.1, "rho": 0.1}, "shape": [3, 8], "new": None}
    assert recipe_difference(one, other) == "optimizer.lr (0.01 and 0.1), only (1 and nothing), new (nothing and None)"
    assert recipe_difference(one, other, shown=1) == "optimizer.lr (0.01 and 0.1) and 2 more"
    assert recipe_difference(one, one) == ""
