"""Prompts: templates filled from records, files of subjects, paraphrases, and what is wrong with them."""

import pytest

from domainstudio.data import ImageRecord, prompts
from domainstudio.errors import ConfigError


def record(**values):
    return ImageRecord("a", "0", 8, 8, "folder/a.png", **values)


def test_templates_are_filled_from_the_record_or_a_subject():
    cat = record(caption="cat face", label="animal")
    assert prompts.of_image("{caption} in [V] style", cat, "p") == "cat face in [V] style"
    assert prompts.of_image("{label}: {caption}", cat, "p") == "animal: cat face"
    assert prompts.of_image("a house in [V] style", record(), "p") == "a house in [V] style"
    assert prompts.of_subject("{caption} in [V] style", "dog", "p") == "dog in [V] style"
    assert prompts.of_subject("{label}", "animal", "p") == "animal"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{caption} in style", r"prompts\.target .*: an image has no caption: folder/a\.png\. .*\.txt file"),
        ("{label}", r"has no label.*a folder for a label"),
        ("{capton}", r"\{capton\} is none of \{caption\} and \{label\}"),
        ("{caption", r"is not a template"),
    ],
)
def test_what_cannot_be_filled_is_named(template, message):
    with pytest.raises(ConfigError, match=message):
        prompts.of_image(template, record(), "adaptations.a.prompts.target")


def test_subjects_are_read_without_comments_and_empty_lines(tmp_path):
    path = tmp_path / "s.txt"
    with pytest.raises(ConfigError, match=r"s\.txt cannot be read"):
        prompts.read_subjects(path)
    path.write_text("# drawn by hand\ncat face\n\n  dog \n")
    assert prompts.read_subjects(path) == ["cat face", "dog"]
    for content in b"", b"# nothing\n", b"\xff\xfe":
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"s\.txt"):
            prompts.read_subjects(path)


def test_paraphrases_are_always_the_same_and_use_the_keywords():
    cat = record(caption="cat face", keywords=("cat", "pet", "whiskers", "meow", "kitten"))
    texts = prompts.paraphrases(cat, 3)
    assert texts == prompts.paraphrases(cat, 3)
    assert texts[:2] == ["cat face", "cat"]
    assert len(texts) == 5
    assert all(set(text.split(", ")) < {"pet", "whiskers", "meow", "kitten"} for text in texts[2:])
    assert prompts.paraphrases(record(caption="cat face"), 3) == ["cat face", "cat face"]
