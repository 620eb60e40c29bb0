import pytest

from hasten import registry
from hasten.errors import HastenError


def test_a_group_lists_its_options_by_their_first_comment_line():
    summaries = registry.group("trainer")
    assert summaries["cpu"] == "One process on the CPU."


@pytest.mark.parametrize("name", ["experiment", "data", "model", "module", "trainer", "logger", "callbacks"])
def test_every_config_file_begins_with_a_sentence_about_itself(name):
    without = [option for option, summary in registry.group(name).items() if not summary.endswith((".", "!"))]
    assert without == []


def test_a_card_without_front_matter_is_refused_in_one_line():
    with pytest.raises(HastenError, match=r"^cards/x.md: expected YAML front matter"):
        registry._card("x.md", "# X\n")


def test_a_card_names_what_its_front_matter_lacks():
    with pytest.raises(HastenError, match=r"^cards/x.md: front matter: expected exports, tests, ddp, got none of it"):
        registry._card("x.md", "---\nname: x\nkind: tool\ngives: time\n---\ntext\n")
