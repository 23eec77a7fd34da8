from dataclasses import replace

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from moji.world.icons import RESTRICTED
from vldnp.answers import NotUnderstood
from vldnp.concepts import ConceptSet, load_concepts

MOJI, NUDITY = load_concepts("moji"), load_concepts("nudity")
SHIPPED = ["hate-symbols", "moji", "nudity", "self-harm", "violence", "weapons"]
ALL = st.sampled_from([load_concepts(name) for name in SHIPPED])


def test_the_vocabularies_are_the_renderers_and_the_papers():
    assert list(MOJI.vocabulary) == list(RESTRICTED)
    assert len(NUDITY.vocabulary) == 9
    assert NUDITY.negative_prompt(["belly", "feet"]) == "Nudity, Sexual, feet, belly."
    assert NUDITY.negative_prompt([]) is None


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sets(name):
    concepts = load_concepts(name)
    assert concepts.name == name
    assert concepts.parse(", ".join(concepts.vocabulary)) == tuple(concepts.vocabulary)
    for term in concepts.vocabulary:
        assert name == "moji" or term in concepts.question
        assert term in concepts.again() and concepts.again().startswith(concepts.question)


# What is read
@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("dagger, skull", "dagger skull"),
        ("SKULL; Dagger.", "dagger skull"),
        ("a skull and two daggers".replace("two ", ""), "dagger skull"),
        ("Skull, knife, and blood.", "blood knife skull"),
        ("- skull\n- dagger\n", "dagger skull"),
        ("* **Skull**\n* **Dagger**", "dagger skull"),
        ("1. Skull\n2. Dagger", "dagger skull"),
        ('{"found": ["skull", "dagger"]}', "dagger skull"),
        ('["skull", "a dagger"]', "dagger skull"),
        ('```json\n["skull"]\n```', "skull"),
        ("guns", "pistol"),
        ("a revolver", "pistol"),
        ("axes", "axe"),
        ("skull, skull", "skull"),
        ("<think>Is that a knife? No.</think>\nskull", "skull"),
        # nothing there
        ("none", ""),
        ("None.", ""),
        ('"none"', ""),
        ("No.", ""),
        ("[]", ""),
        ('{"seen": []}', ""),
        ("knife: no", ""),
        # some there, some not
        ("knife: no\ngun: yes", "pistol"),
        ("Knife — No\nBlood — Yes".replace("—", "-"), "blood"),
        ("| knife | no |\n| skull | yes |", "skull"),
        ('{"knife": false, "skull": true}', "skull"),
        ('{"knife": "no", "skull": "Yes"}', "skull"),
    ],
)
def test_answers_that_are_understood(answer, found):
    expected = set(found.split())
    assert MOJI.parse(answer) == tuple(term for term in MOJI.vocabulary if term in expected)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "   \n",
        "xyzzy",
        "Yes.",
        "I'm sorry, but I can't assist with that request.",
        "I see a knife, not a gun",
        "no knife, dagger",
        "none, knife",
        "knife?",
        "maybe a knife",
        "pickaxe",
        "a cat, a knife",
        "<think>I see a knife",
        "thinking: knife or dagger",
        "没有刀",
        '{"knife": 0.9}',
        '{"visible": ["knife"], "hidden": ["gun"]}',
        '{"seen": [{"knife": true}]}',
        '{"seen": ["knife"',
        "[" * 5000,
        "knife: probably",
        "There is no blood.",
    ],
)
def test_anything_else_is_an_error_and_not_nothing(answer):
    with pytest.raises(NotUnderstood, match="not understood") as error:
        MOJI.parse(answer)
    assert "\n" not in str(error.value)


def test_terms_of_several_words():
    assert NUDITY.parse("female_breast; Male-Genitalia") == ("female breast", "male genitalia")
    assert NUDITY.parse("a bare foot") == ("feet",)
    concepts = ConceptSet("x", "?", {"bird": (), "early bird": (), "bird cage": ()})
    assert concepts.parse("an early bird") == ("early bird",)
    assert concepts.parse("bird cages and a bird") == ("bird", "bird cage")


@given(ALL, st.text())
@example(MOJI, "no " * 2000 + "knife")
@example(MOJI, "knife, " * 20000)
def test_any_text_is_read_or_not_understood(concepts, answer):
    try:
        found = concepts.parse(answer)
    except NotUnderstood:
        return
    assert list(found) == [term for term in concepts.vocabulary if term in found]


@given(st.data(), ALL, st.sampled_from([", ", "\n", " and ", "; "]), st.randoms())
def test_every_written_form_in_any_order_and_case(data, concepts, separator, shuffler):
    terms = sorted(data.draw(st.sets(st.sampled_from(list(concepts.vocabulary)), min_size=1)))
    forms = [data.draw(st.sampled_from([t, *concepts.vocabulary[t]])) for t in terms]
    forms = [form.upper() for form in forms if " and " not in form]
    shuffler.shuffle(forms)
    if len(forms) == len(terms):
        assert set(concepts.parse(separator.join(forms))) == set(terms)


def test_readings_are_described():
    official = load_concepts("nudity", "official")
    assert official.describe()["reading"] == "official" and "reading" not in NUDITY.describe()


# Negative prompts
def test_negative_prompts():
    assert MOJI.negative_prompt([]) is None
    assert MOJI.negative_prompt(["skull", "axe", "skull"]) == "axe, skull"
    assert replace(MOJI, lead="a weapon").negative_prompt(["axe"]) == "a weapon, axe"
    with pytest.raises(ValueError, match="'knifes'.*did you mean 'knife'"):
        MOJI.negative_prompt(["knifes"])


def test_an_end_mark_is_a_part_of_what_decides_the_images(tmp_path):
    (tmp_path / "mine.yaml").write_text('question: "Knife?"\nvocabulary: {knife: []}\nend: "!"\n')
    marked = load_concepts(tmp_path / "mine.yaml")
    assert marked.negative_prompt(["knife"]) == "knife!" and marked.describe()["end"] == "!"
    assert "end" not in MOJI.describe(), "older records stay those of the same set"


# Sets as data
def test_a_form_belongs_to_one_term():
    with pytest.raises(ValueError, match="'gun'.*'pistol' and 'rifle'"):
        ConceptSet("x", "?", {"pistol": ("gun",), "rifle": ("gun",)})
    given_form_first = ConceptSet("x", "?", {"glass": (), "glasses": ()})
    assert given_form_first.parse("glasses") == ("glasses",)


def test_load_from_a_file(tmp_path):
    file = tmp_path / "fruit.yaml"
    file.write_text("question: Which fruit?\nvocabulary: {apple: [pippin], cherry: }\n")
    fruit = load_concepts(file)
    assert (fruit.name, fruit.lead) == ("fruit", "")
    assert fruit.parse("pippins and cherries") == ("apple", "cherry")
    assert load_concepts(fruit) is fruit
    assert hash(MOJI) == hash(load_concepts("moji")) and MOJI == load_concepts("moji")
    assert yaml.safe_load(yaml.safe_dump(MOJI.describe())) == MOJI.describe()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a, b]", "must be a mapping"),
        ("question: x", "is missing 'vocabulary'"),
        ("question: x\nvocabulary: {a: []}\nleed: y", "leed.*did you mean 'lead'"),
        ("question: x\nvocabulary: [a]", "vocabulary: it should be a valid mapping"),
        ("question: x\nvocabulary: {no: []}", "False"),
        ("question: ''\nvocabulary: {a: []}", "question: it should have at least 1 character"),
        ("question: x\nvocabulary: {}", "empty vocabulary"),
        ("question: x\nvocabulary: {'!': []}", "'' stands for both 'nothing' and '!'"),
        ("question: x\nvocabulary: {axe: ['  ']}", "'' stands for both"),
        ("question: [", "is not YAML"),
        ("question: x\nvocabulary:\n  axe: []\n  bow: []\n  axe: []\n", "'axe' .* twice.*line 3"),
        ("question: x\nvocabulary: {axe: [], Axe: []}", "stands for both 'axe' and 'Axe'"),
    ],
)
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_concepts(file)
    assert "\n" not in str(caught.value)


def test_unknown_sets():
    with pytest.raises(ValueError, match="concept set 'mojis'.*did you mean 'moji'.*nudity"):
        load_concepts("mojis")
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_concepts("nowhere.yaml")
