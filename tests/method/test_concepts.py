import csv
import random
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from moji.world.icons import RESTRICTED
from vldnp.concepts import ConceptSet, load_concepts

MOJI, NUDITY = load_concepts("moji"), load_concepts("nudity")
SHIPPED = ["hate-symbols", "moji", "nudity", "self-harm", "violence", "weapons"]
ALL = st.sampled_from([load_concepts(name) for name in SHIPPED])
SETS = st.sampled_from([MOJI, NUDITY, replace(MOJI, lead="Weapons, drugs")])


def subset(concepts):
    return st.sets(st.sampled_from(list(concepts.vocabulary)))


def test_the_moji_vocabulary_is_the_renderers():
    assert list(MOJI.vocabulary) == list(RESTRICTED)


def test_the_nine_parts_of_the_paper():
    assert len(NUDITY.vocabulary) == 9
    assert NUDITY.negative_prompt(["belly", "feet"]) == "Nudity, Sexual, feet, belly."
    assert NUDITY.negative_prompt([]) is None
    # The authors' own examples of answers, in their spelling.
    assert NUDITY.parse("I cannot spot any human body parts in this image.") == ()
    assert "female breast" in NUDITY.parse("female breast, butoocks, belly, feet.")


def test_an_end_mark_is_a_part_of_what_decides_the_images(tmp_path):
    (tmp_path / "mine.yaml").write_text('question: "Knife?"\nvocabulary: {knife: []}\nend: "!"\n')
    marked = load_concepts(tmp_path / "mine.yaml")
    assert marked.negative_prompt(["knife"]) == "knife!" and marked.describe()["end"] == "!"
    assert "end" not in MOJI.describe(), "older records stay those of the same set"


def table_of_answers():
    """Answers as VLMs phrase them, and what they say is there."""
    file = Path(__file__).parents[1] / "data" / "answers.csv"
    with file.open(newline="", encoding="utf-8") as lines:
        return [tuple(row.values()) for row in csv.DictReader(lines)]


def test_answers_as_vlms_phrase_them():
    table = table_of_answers()
    assert len(table) >= 750 and {name for name, *_ in table} == set(SHIPPED)
    sets, misread = {name: load_concepts(name) for name in SHIPPED}, {}
    for name, answer, expected in table:
        found = set(sets[name].parse(answer))
        if found != set(filter(None, expected.split("; "))):
            misread[answer] = found
    assert misread == {}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sets(name):
    concepts = load_concepts(name)
    assert concepts.name == name and ("none" in concepts.question) == (
        name not in {"moji", "nudity"}
    )
    assert concepts.parse(concepts.lead) == ()
    for term in concepts.vocabulary:
        assert name == "moji" or term in concepts.question
    assert concepts.parse(", ".join(concepts.vocabulary)) == tuple(concepts.vocabulary)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        # lists and forms
        ("dagger, skull", "dagger skull"),
        ("skull dagger", "dagger skull"),
        ("SKULL; Dagger.", "dagger skull"),
        ("- skull\n- dagger\n", "dagger skull"),
        ("1. Skull 2. Dagger", "dagger skull"),
        ('{"found": ["skull", "dagger"]}', "dagger skull"),
        ("I can see a skull and two daggers in the picture.", "dagger skull"),
        ("knives", "knife"),
        ("the knife's edge", "knife"),
        ("a revolver", "pistol"),
        ("Guns", "pistol"),
        ("skull, skull, skull", "skull"),
        # other words
        ("", ""),
        ("   \n", ""),
        ("pickaxe, knifelike, bombastic", ""),
        ("a cat on a pizza", ""),
        ("没有刀", ""),
        ("ein Messer und ein Totenkopf", ""),
        # nothing there
        ("none", ""),
        ("None.", ""),
        ("no knife", ""),
        ("There is no blood.", ""),
        ("without a weapon or a gun", ""),
        ("No knives, guns, or blood can be seen.", ""),
        ("neither a knife nor a gun", ""),
        ("I cannot see any knife", ""),
        ("I can't see a knife", ""),
        ("I don’t see a knife", ""),
        ("None of these: knife, gun, skull", ""),
        ("a picture free of anything, no skull", ""),
        ("A knife is not visible.", ""),
        ("Knives and guns are not visible.", ""),
        ("The knife isn't present", ""),
        ("knife: no", ""),
        ("knife - none", ""),
        ("{'knife': False}", ""),
        ("[]", ""),
        # some there, some not
        ("No. A skull.", "skull"),
        ("No, there is a skull", "skull"),
        ("no knife but a skull", "skull"),
        ("There is no knife, but I see two guns and a skull.", "pistol skull"),
        ("The image shows no knife, it shows a skull", "skull"),
        ("I see a knife, not a gun", "knife"),
        ("not only a knife but also a gun", "knife pistol"),
        ("nothing except a skull", "skull"),
        ("knife: no\ngun: yes", "pistol"),
        ("knife: no, gun: yes", "pistol"),
        ("Knife — No\nBlood — Yes", "blood"),
        ("knife (none), skull (yes)", "skull"),
        ('{"knife": false, "skull": true}', "skull"),
        ('{"not_visible": ["gun"], "visible": ["knife"]}', "knife"),
        ("A knife is not visible and blood is everywhere", "blood"),
        ("Is there a knife? No. Is there a skull? Yes.", "skull"),
        ("there is no knife and there is a skull", "skull"),
    ],
)
def test_answers(answer, found):
    expected = set(found.split())
    assert MOJI.parse(answer) == tuple(term for term in MOJI.vocabulary if term in expected)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Female breast, FEET and belly.", ("female breast", "feet", "belly")),
        ("female_breast; male-genitalia", ("female breast", "male genitalia")),
        ("I cannot see any feet.", ()),
        ("a bare foot", ("feet",)),
        ("an armpit, one buttock", ("buttocks", "armpits")),
        ("male chest", ("male breast",)),
    ],
)
def test_terms_of_several_words(answer, found):
    assert NUDITY.parse(answer) == found


def test_the_longest_match_wins():
    concepts = ConceptSet("x", "?", {"bird": (), "early bird": (), "bird cage": ()})
    assert concepts.parse("an early bird") == ("early bird",)
    assert concepts.parse("bird cages and a bird") == ("bird", "bird cage")


@given(SETS, st.text())
@example(MOJI, "no " * 2000 + "knife")
@example(MOJI, "knife " * 20000)
def test_any_text_is_read(concepts, answer):
    found = concepts.parse(answer)
    assert set(found) <= set(concepts.vocabulary)
    assert list(found) == [term for term in concepts.vocabulary if term in found]


PHRASINGS = st.sampled_from(
    [
        str.upper,
        str.title,
        lambda text: f"- {text}",
        lambda text: f"1. **{text}**",
        lambda text: f'{{"seen": ["{text}"]}}',
        lambda text: f"I can see: {text}.",
        lambda text: f"In the picture there is a {text}, clearly visible!",
        lambda text: f"{text}: yes",
        lambda text: f"<answer>{text}</answer>",
    ]
)
DENIALS = st.sampled_from(
    [
        lambda text: f"I cannot see any {text}.",
        lambda text: f"no visible {text}",
        lambda text: f"There isn't any {text} here.",
        lambda text: f"{text}: no",
        lambda text: f'{{"{text}": false}}',
        lambda text: f"The {text} is not visible.",
        lambda text: f"- {text} (none)",
        lambda text: f"The picture is free of {text}.",
    ]
)


@given(st.data(), ALL, PHRASINGS, DENIALS)
def test_phrasing_does_not_matter(data, concepts, phrased, denied):
    term, other = data.draw(st.permutations(list(concepts.vocabulary)))[:2]
    assert concepts.parse(phrased(term)) == (term,)
    assert concepts.parse(denied(term)) == ()
    found = concepts.parse(f"{phrased(term)}\n{denied(other)}\n")
    assert found == (term,)


WORDS = "no not knife skull gun blood , . : and or but is visible none ? yes the a \n { } without"


@given(st.lists(st.sampled_from(WORDS.split(" "))).map(" ".join))
def test_any_grammar_is_read(answer):
    assert set(MOJI.parse(answer)) <= set(MOJI.vocabulary)


@given(st.data(), SETS)
def test_its_own_negative_prompt_says_what_was_found(data, concepts):
    found = concepts.parse(concepts.negative_prompt(data.draw(subset(concepts))) or "none")
    assert concepts.parse(concepts.negative_prompt(found) or "") == found


@given(st.data(), SETS, st.sampled_from([", ", "\n", " and ", "; "]), st.randoms())
def test_order_does_not_matter(data, concepts, separator, shuffler: random.Random):
    terms = sorted(data.draw(subset(concepts)))
    shuffled = terms[:]
    shuffler.shuffle(shuffled)
    found = concepts.parse(separator.join(shuffled))
    assert found == concepts.parse(separator.join(terms))
    assert set(found) == set(terms)


@given(st.data(), ALL)
def test_every_written_form_is_found(data, concepts):
    term = data.draw(st.sampled_from(list(concepts.vocabulary)))
    written = data.draw(st.sampled_from([term, *concepts.vocabulary[term]]))
    assert concepts.parse(f"I see: {written.upper()}!") == (term,)
    assert concepts.parse(f"There is no {written} here") == ()


def test_negative_prompts():
    assert MOJI.negative_prompt([]) is None
    assert MOJI.negative_prompt(["skull", "axe", "skull"]) == "axe, skull"
    assert replace(MOJI, lead="a weapon").negative_prompt(["axe"]) == "a weapon, axe"


def test_only_terms_of_the_vocabulary_get_into_a_negative_prompt():
    with pytest.raises(ValueError, match="'knifes'.*did you mean 'knife'"):
        MOJI.negative_prompt(["knifes"])


def test_a_form_belongs_to_one_term():
    with pytest.raises(ValueError, match="'gun'.*'pistol' and 'rifle'"):
        ConceptSet("x", "?", {"pistol": ("gun",), "rifle": ("gun",)})
    given_form_first = ConceptSet("x", "?", {"glass": (), "glasses": ()})
    assert given_form_first.parse("glasses") == ("glasses",)


def test_sets_are_data():
    assert hash(MOJI) == hash(load_concepts("moji"))
    assert MOJI == load_concepts("moji")
    assert yaml.safe_load(yaml.safe_dump(MOJI.describe())) == MOJI.describe()


def test_load_from_a_file(tmp_path):
    file = tmp_path / "fruit.yaml"
    file.write_text("question: Which fruit?\nvocabulary: {apple: [pippin], pear: }\n")
    fruit = load_concepts(file)
    assert (fruit.name, fruit.lead) == ("fruit", "")
    assert fruit.parse("pippins and pears") == ("apple", "pear")
    assert load_concepts(fruit) is fruit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a, b]", "must be a mapping"),
        ("question: x", "is missing 'vocabulary'"),
        ("vocabulary: {a: []}", "is missing 'question'"),
        ("question: x\nvocabulary: {a: []}\nleed: y", "leed.*did you mean 'lead'"),
        ("question: x\nvocabulary: [a]", "vocabulary: it should be a valid mapping"),
        ("question: x\nvocabulary: {no: []}", "False"),
        ("question: x\nvocabulary: {a: b}", "it should be a valid list, not 'b'"),
        ("question: 7\nvocabulary: {a: []}", "question: it should be a valid string, not 7"),
        ("question: ''\nvocabulary: {a: []}", "question: it should have at least 1 character"),
        ("question: x\nvocabulary: {a: [b, no]}", "vocabulary: it should be .*, not False"),
        ("question: x\nvocabulary: {}", "empty vocabulary"),
        ("question: x\nvocabulary: {'!': []}", "no word"),
        ("question: [", "is not YAML"),
        (
            "question: x\nvocabulary:\n  axe: []\n  bow: []\n  axe: []\n",
            "'axe' stands twice.*line 5",
        ),
        ("question: x\nvocabulary: {'': []}", "'' .*has no word"),
        ("question: x\nvocabulary: {axe: ['  ']}", "has no word"),
        ("question: x\nvocabulary: {axe: [], Axe: []}", "belongs to both 'axe' and 'Axe'"),
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
