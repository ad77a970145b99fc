"""Rewards worked out by hand, the official scorer written a second time, and the exploits that `strict` refuses."""

import math
import random
import re
import string
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_helpers import tiny_tokenizer

from mmsr import reward
from mmsr.assemble import Setup
from mmsr.chat import PROMPTS, Chat
from mmsr.config import Config, parse
from mmsr.episode import ANSWERED, INVALID, LENGTH, TURNS, Episode, Example, Observation, Turn
from mmsr.reward import (
    LEGAL_SHAPES,
    STRICT_SHAPES,
    RewardRule,
    answer_score,
    exact_match,
    format_score,
    score,
    strict_match,
)
from mmsr.system.errors import UserError
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH, NoSearch, search_tools

MARKUP = {
    "answer": "<answer>{}</answer>",
    IMAGE_SEARCH: "<search><img></search>",
    TEXT_SEARCH: "<text_search>{}</text_search>",
}
ALL_RULES = ("blog", "paper", "strict")


def well_formed(text):
    return re.fullmatch(r"<reason>[^<]*</reason>\s*<(\w+)>.*</\1>", text, re.DOTALL) is not None


def turn(text, action, source=None):
    """One assistant turn, or with a `source` the tool turn that answers it."""
    if source is None:
        return Turn("assistant", text, 0, 0, action=action)
    return Turn("tool", text, 0, 0, action=action, observation=Observation(source=source))


def episode(actions, answer="Paris", gold=("Paris",), found="Some page", source="toy"):
    """An episode of well-formed turns; each search in it is followed by its result."""
    turns = []
    for action in actions:
        turns.append(turn("<reason>Hm.</reason>\n" + MARKUP[action].format(answer), action))
        if action != "answer":
            turns.append(turn(found, action, source))
    return Episode(Example("e", b"", "Which city?", gold), 0, 0, turns=turns, status=ANSWERED)


def ended(text, gold=("Paris",), status=ANSWERED, action="answer"):
    """An episode of the single turn `text`."""
    return Episode(Example("e", b"", "Which city?", gold), 0, 0, turns=[turn(text, action)], status=status)


def rewarded(subject, rule):
    score([subject], RewardRule(rule) if isinstance(rule, str) else rule, well_formed)
    return subject


def accuracy(subject, rule):
    return rewarded(subject, rule).reward_parts["accuracy"]


# Every rule and shape, by hand.

SHAPES = {  # actions -> (right, wrong) under each rule
    ("answer",): {"blog": (1.0, 0.1), "paper": (1.0, 0.1), "strict": (1.0, 0.1)},
    ("image_search", "answer"): {"blog": (0.91, 0.01), "paper": (0.91, 0.1), "strict": (0.91, 0.1)},
    ("text_search", "answer"): {"blog": (0.91, 0.01), "paper": (0.91, 0.1), "strict": (0.91, 0.1)},
    ("image_search", "text_search", "answer"): {"blog": (0.91, 0.01), "paper": (0.91, 0.1), "strict": (0.91, 0.1)},
    ("text_search", "text_search", "answer"): {"blog": (0.81, -0.09), "paper": (0.81, 0.0), "strict": (0.91, 0.1)},
    ("text_search", "image_search", "answer"): {"blog": (0.81, -0.09), "paper": (0.81, 0.0), "strict": (0.81, 0.0)},
    ("image_search", "image_search", "answer"): {"blog": (0.81, -0.09), "paper": (0.81, 0.0), "strict": (0.81, 0.0)},
    ("image_search", "text_search", "text_search", "answer"): {
        "blog": (0.81, -0.09),
        "paper": (0.81, 0.0),
        "strict": (0.81, 0.0),
    },
    ("image_search",): {"blog": (-0.09, -0.09), "paper": (0.0, 0.0), "strict": (0.0, 0.0)},
}


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("actions", SHAPES, ids="-".join)
def test_rewards_worked_out_by_hand(actions, rule):
    right, wrong = SHAPES[actions][rule]
    assert rewarded(episode(actions), rule).reward == pytest.approx(right)
    assert rewarded(episode(actions, answer="Rome"), rule).reward == pytest.approx(wrong)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_the_parts_add_up_to_the_reward(rule):
    for actions in SHAPES:
        subject = rewarded(episode(actions), rule)
        parts = subject.reward_parts
        assert set(parts) == {"accuracy", "format", "penalty"}
        assert subject.reward == pytest.approx(0.9 * parts["accuracy"] + 0.1 * parts["format"] - parts["penalty"])
    assert parts["penalty"] == pytest.approx(0.09 if rule == "blog" else 0.0)


def test_penalty_per_call():
    actions = ("image_search", "text_search", "answer")
    assert rewarded(episode(actions), RewardRule("paper", per_call=True)).reward == pytest.approx(0.9 * 0.81 + 0.1)
    assert rewarded(episode(actions), RewardRule("blog", per_call=True)).reward == pytest.approx(0.9 * 0.8 + 0.1)


def test_penalty_and_format_weight_are_parameters():
    rule = RewardRule("paper", penalty=0.5, format_weight=0.2)
    assert rewarded(episode(("text_search", "answer")), rule).reward == pytest.approx(0.8 * 0.5 + 0.2)
    assert rewarded(episode(("answer",)), RewardRule("paper", penalty=0.0)).reward == pytest.approx(1.0)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_a_refused_call_costs_no_penalty_and_earns_no_format(rule):
    twice = episode(("image_search", "image_search", "answer"))
    twice.turns[3] = turn("limit reached", IMAGE_SEARCH, "limit")
    assert rewarded(twice, rule).reward == pytest.approx(0.81)
    forbidden = episode(("text_search", "answer"), source="limit")
    assert rewarded(forbidden, rule).reward == pytest.approx(0.9)


def test_one_malformed_turn_costs_the_format():
    subject = episode(("image_search", "answer"))
    subject.turns[0].text = MARKUP[IMAGE_SEARCH]
    assert rewarded(subject, "paper").reward == pytest.approx(0.81)


def test_forced_turns_score_like_others():
    subject = episode(("image_search", "answer"))
    for each in subject.turns:
        each.forced = True
    assert rewarded(subject, "paper").reward == pytest.approx(0.91)


def test_a_forkers_tool_is_one_more_shape(monkeypatch):
    monkeypatch.setitem(MARKUP, "map_search", "<map_search>{}</map_search>")
    subject = episode(("map_search", "answer"))
    assert rewarded(subject, "paper").reward_parts["format"] == 0
    monkeypatch.setattr("mmsr.reward.LEGAL_SHAPES", LEGAL_SHAPES | {("map_search", "answer")})
    assert rewarded(subject, "paper").reward_parts["format"] == rewarded(subject, "strict").reward_parts["format"] == 1


LONG = ("image_search", *["text_search"] * 5, "image_search", "answer")


@pytest.mark.parametrize(
    "actions, formed",
    [
        *[(shape, 1) for shape in sorted(LEGAL_SHAPES)],
        (LONG, 1),
        (("text_search", "text_search", "answer"), 1),
        (LONG[:-1], 0),
        (("answer", "answer"), 0),
        ((), 0),
    ],
)
def test_a_long_chain_of_searches_never_earns_format(actions, formed):
    subject = episode(actions)
    rule = parse(["--shapes", "any"]).reward_rule
    assert format_score(subject, rule, well_formed) == formed
    if actions == LONG:
        assert format_score(subject, RewardRule(), well_formed) == 0
        subject.turns[2].text = "<reason>why</reason>"
        assert format_score(subject, rule, well_formed) == 0, "a turn without an action"
        refused_one = episode(LONG)
        refused_one.turns[-2] = turn("limit reached", IMAGE_SEARCH, "limit")
        assert format_score(refused_one, rule, well_formed) == 0


def test_shapes_speak_the_tools_names():
    assert {name for shape in LEGAL_SHAPES | STRICT_SHAPES for name in shape} == {"answer", IMAGE_SEARCH, TEXT_SEARCH}


def test_a_judge_replaces_the_scorer():
    subject = episode(("image_search", "answer"), answer="the French capital")
    score([subject], RewardRule("paper"), well_formed, accuracy=lambda episode: 0.5)
    assert subject.reward == pytest.approx(0.9 * 0.5 * 0.9 + 0.1)
    with pytest.raises(ValueError, match="nan"):
        score([subject], RewardRule("paper"), well_formed, accuracy=lambda episode: math.nan)


@pytest.mark.parametrize(
    "options", [{"name": "em"}, {"penalty": 1.5}, {"format_weight": math.nan}, {"name": "strict", "substring": True}]
)
def test_a_wrong_rule_is_a_users_error(options):
    with pytest.raises(UserError):
        RewardRule(**options)


# The official scorer, written here from its description and nowhere near mmsr.reward.


def official_normal(text):
    bare = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def official_score(text, answers):
    closed = [found.group(1).strip() for found in re.finditer(r"<answer>(.*?)</answer>", text, re.DOTALL)]
    return float(bool(closed) and official_normal(closed[-1]) in [official_normal(answer) for answer in answers])


AWKWARD = [  # prediction, answer, official verdict
    ("Paris", "Paris", True),
    ("  the   PARIS. ", "Paris", True),
    ("Paris, France", "Paris", False),
    ("", "A", True),
    ("", "The", True),
    ("a", "an", True),
    ("!?", "The", True),
    ("", "Paris", False),
    ("Best Buy Co Inc BBY", "Best Buy Co., Inc. (BBY)", True),
    ("foot and mouth", "Foot-and-mouth", False),
    ("footandmouth", "Foot-and-mouth", True),
    ("lipreading", "lip-reading", True),
    ("The-Hague", "Hague", False),
    ("theHague", "Hague", False),
    ("A-Team", "ATeam", True),
    ("a team", "team", True),
    ("$5", "5", True),
    ("1,000", "1000", True),
    ("3.14", "314", True),
    ("Zürich", "Zurich", False),
    ("ZÜRICH", "zürich", True),
    ("straße", "STRASSE", False),
    ("“Paris”", "Paris", False),
    ("Paris\u00a0", "Paris", True),
    ("San\u2003Marino", "San Marino", True),
    ("Paris\u200b", "Paris", False),
    ("Ｐａｒｉｓ", "Paris", False),
    ("東京", "東京", True),
    ("東京。", "東京", False),
    ("e\u0301", "é", False),
    ("a\u0301", "\u0301", True),
    ("İ", "i̇", True),
    ("Paris\nFrance", "paris france", True),
    ("2003 9 26", "26 9 2003", False),
]


@pytest.mark.parametrize("prediction, answer, verdict", AWKWARD)
def test_the_official_verdict_on_awkward_strings(prediction, answer, verdict):
    assert (official_normal(prediction) == official_normal(answer)) == verdict
    assert exact_match(prediction, [answer]) == verdict


PIECES = [
    "<answer>",
    "</answer>",
    "<reason>",
    "</reason>",
    "a",
    "an",
    "the",
    "A",
    "The",
    " ",
    "  ",
    "\n",
    "\t",
    "Paris",
    "paris",
    "Tōkyō",
    "-",
    ".",
    "'",
    "’",
    "“",
    "$",
    "é",
    "e\u0301",
    "ß",
    "İ",
    "\u200b",
    "\u00a0",
    "東",
    "①",
    "\ud800",
    "\0",
    "_",
    "9",
]


def babble(dice, most=9):
    return "".join(dice.choice(PIECES) for _ in range(dice.randrange(most)))


def test_paper_equals_the_official_scorer_on_random_strings():
    dice = random.Random(0)
    verdicts = []
    for _ in range(20_000):
        gold = tuple(babble(dice, 4) for _ in range(dice.randint(1, 3)))
        given = dice.choice([dice.choice(gold).upper(), babble(dice, 4)])
        closed = f"<answer>{given}</answer>"
        text = dice.choice([closed, f"{babble(dice)}{closed}{babble(dice)}", given])
        verdicts.append(official_score(text, gold))
        assert accuracy(ended(text, gold), "paper") == verdicts[-1], (text, gold)
    assert 4_000 < sum(verdicts) < 16_000  # the strings try both verdicts


def test_substring_match_is_an_option():
    rule = RewardRule("paper", substring=True)
    assert accuracy(episode(("answer",), answer="in Paris, France"), rule) == 1
    assert accuracy(episode(("answer",), answer="in Paris, France"), "paper") == 0


@pytest.mark.parametrize("nothing", ["A", "The", "?", "", " ", "a, the"])
def test_an_accepted_answer_that_normalises_to_nothing_is_inside_every_answer(nothing):
    rule = RewardRule("paper", substring=True)
    for given in ("in Paris, France", "", "a", "?"):
        assert accuracy(episode(("answer",), answer=given, gold=(nothing,)), rule) == 0
        assert accuracy(episode(("answer",), answer=given, gold=(nothing, "Paris")), rule) == ("Paris" in given)


# Format, by the official rule: EvolvingLMMs-Lab/multimodal-search-r1, mmsearch_r1/utils/reward_score/. Written from a
# description of it: a turn has exactly one <reason>…</reason> and exactly one action, the action last; legal shapes.

OFFICIAL_ACTIONS = {
    "answer": ("<answer>", ".*", "</answer>"),
    IMAGE_SEARCH: ("<search>", "<img>", "</search>"),
    TEXT_SEARCH: ("<text_search>", ".*", "</text_search>"),
}
PARTS = ["<reason>", "</reason>", *(tag for pair in OFFICIAL_ACTIONS.values() for tag in (pair[0], pair[2]))]
PARTS += ["<img>", " ", "\n", "why"]


def official_action(text):
    """The action of a turn that is well formed by the official rule, else None."""
    shortest = {name: "".join(form).replace("*", "*?") for name, form in OFFICIAL_ACTIONS.items()}
    found = [name for name, form in shortest.items() for _ in re.findall(form, text, re.DOTALL)]
    if len(found) != 1:
        return None
    first, _, last = form = OFFICIAL_ACTIONS[found[0]]
    once = all(text.count(tag) == 1 for tag in ("<reason>", "</reason>", first, last))
    whole = re.fullmatch("<reason>.*</reason>.*" + "".join(form), text.strip(), re.DOTALL)
    return found[0] if once and whole else None


def official_format(texts):
    return tuple(map(official_action, texts)) in LEGAL_SHAPES


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return Chat(tiny_tokenizer(tmp_path_factory.mktemp("tiny")), PROMPTS / "real", search_tools(NoSearch(), 1, 2))


def our_format(chat, texts):
    subject = episode(())
    for text in texts:
        action = chat.parse(text).name
        subject.turns.append(turn(text, action))
        if action not in (None, "answer"):
            subject.turns.append(turn("Some page", action, "toy"))
    return format_score(subject, RewardRule("paper"), chat.well_formed) == 1


def departures():
    """(example, accepted here, accepted by the official code), as the module says."""
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| (yes|no) +\| (yes|no) +\|$", reward.__doc__, re.MULTILINE)
    return [(text.strip(), here == "yes", official == "yes") for text, here, official in rows]


@pytest.mark.parametrize("example, here, official", departures())
def test_a_listed_departure_from_the_official_format_is_none(chat, example, here, official):
    text = example.replace("R ", "<reason>why</reason> ", 1)
    texts = [text] if "answer" in text else [text, "<reason>why</reason><answer>Paris</answer>"]
    assert (our_format(chat, texts), official_format(texts)) == (here, official)


def test_algorithm_names_other_departures_than_the_module():
    said = (Path(__file__).parents[1] / "docs/algorithm.md").read_text(encoding="utf-8")
    examples = [example for example, _, _ in departures()]
    assert len(examples) == 5 and all(f"`{example}`" in said for example in (examples[0], *examples[3:]))


def listed(text):
    """Whether a turn is of a kind that the module's table lists."""
    others = [tag for name, form in OFFICIAL_ACTIONS.items() if name != official_action(text) for tag in form[::2]]
    blank = re.search(r"<text_search>\s*</text_search>", text)
    spaced = "<search><img></search>" not in text and "<search><img></search>" in "".join(text.split())
    return bool(blank or spaced or any(tag in text for tag in others))


def test_format_departs_from_the_official_rule_where_the_module_does_not_say_so(chat):
    dice, verdicts = random.Random(0), Counter()
    for _ in range(10_000):
        texts = []
        for action in dice.choice(sorted(LEGAL_SHAPES)):
            first, inside, last = OFFICIAL_ACTIONS[action]
            parts = ["<reason>", "why", "</reason>", " ", first, inside.replace(".*", "Paris"), last]
            for _ in range(dice.choice([0, 0, 0, 1, 1, 2])):
                at = dice.randrange(len(parts))
                parts[at : at + dice.randrange(2)] = [dice.choice(PARTS)]
            texts.append("".join(parts))
        ours, official = our_format(chat, texts), official_format(texts)
        verdicts[ours, official] += 1
        assert ours == official or any(map(listed, texts)), texts
    assert len(verdicts) == 4 and min(verdicts.values()) > 10, "all four verdicts are tried"


def test_a_search_in_the_last_turn_is_paid_for_as_if_it_had_been_made():
    asked = episode(("image_search",))
    del asked.turns[1:]
    assert rewarded(asked, "blog").reward_parts == {"accuracy": 0, "format": 0, "penalty": 0}


@pytest.mark.parametrize("rule", ALL_RULES)
def test_four_turns_raise(rule):
    long = episode(("image_search", "text_search", "text_search", "answer"))
    assert rewarded(long, rule).reward_parts["format"] == 0


# Strict.


@pytest.mark.parametrize(
    "prediction, answer, verdict",
    [
        ("“Paris”", "Paris", True),
        ("Ｐａｒｉｓ", "Paris", True),
        ("東京。", "東京", True),
        ("straße", "STRASSE", True),
        ("e\u0301", "é", True),
        ("The Tagus River!", "tagus river", True),
        ("C", "C+", False),
        ("", "A", False),
        ("the", "The", False),
        ("?", "!", False),
        ("Paris or Rome", "Paris", False),
    ],
)
def test_strict_match(prediction, answer, verdict):
    assert strict_match(prediction, ["no such thing", answer]) == verdict


DIFFERENT = [  # texts of which no two are equal under strict
    "314 3.14 3:14 3/14 3-14 -314 -3.14 314% $314 314° 3.1.4 3'14 31*4",
    "5 -5 .5 -.5 5% -5% $5 -$5 5° 5½ 5² 5₂ 1/5 +5",
    "12 1/2 1.2 1:2 1-2 -12 1*2 ٣٫١٤ ٣١٤",
    "1030 10:30 10.30 10-30 10/30",
    "C C# C+ C++ c- F F# F♭ J#",
    "O O+ O- A+ A- AB AB+ AB- Cl Cl-",
    "1e5 1e-5 10^5 10^-5 105 10⁴ 104",
    "3.10 3.1 1.0 1 1.000 1000",
    "911 9/11 9-11 19901995 1990-1995 20030926 2003-09-26 26-9-2003",
]


@pytest.mark.parametrize("texts", DIFFERENT)
def test_numbers_and_names_that_differ_in_a_mark_are_one_under_strict(texts):
    texts = texts.split()
    equal = [(given, answer) for given in texts for answer in texts if strict_match(given, [answer])]
    assert equal == [(text, text) for text in texts]


SAME = [  # texts that are all equal under strict, between bars
    "5|5.|5!|“5”|**5**|(5)|#5|\u200f5\u200e|\u20685\u2069|\ufeff5|５",
    "-5|−5|–5|‑5|﹣5|－5|➖5|(-5)|−5.|\u200e-5|\u2066−\u20695",
    "-$1,000.50|−$1000.50|–$1,000.50.",
    "1,000,000|1000000|1'000'000|1’000’000|1\u00a0000\u00a0000|1\u202f000\u2009000|1.000.000|10,00,000|１，０００，０００",
    "3.14|3,14|３．１４|3.14.|3\u200b.14|٣٫١٤|۳٫۱۴|३.१४",
    "1000.5|1.000,5|1,000.5",
    "$5|$ 5",
    "5 €|5€",
    "3:1|3 : 1",
    "40° N|40°N",
    "40°26′46″ N|40°26′46″N|40°26'46\" N",
    "O'Brien|O’Brien|O`Brien|O´Brien|OʼBrien",
    "Hawaiʻi|Hawai'i|Hawaii|Hawai\u2800i",
    "0.125|.125|0,125",
    "May 26, 2003|May 26,2003|may 26 2003",
    "1/2|½|1⁄2|1∕2|1 / 2",
    "5 1/2|5½",
    "10:30|10：30|10∶30|10:30.",
    "1990-1995|1990–1995|1990—1995|1990 – 1995|1990\u00a0-\u00a01995|1990〜1995|1990～1995",
    "1,2,3|1, 2, 3|1;2;3|1、2、3",
    "5%|5 %|5％|５％",
    "20 °C|20°C|20℃",
    "10⁻⁵|10^-5|10^−5",
    "m²|m2|M²",
    "H₂O|H2O",
    "C#|c#|C＃|C♯|(C#)|C#.",
    "C++|c＋＋|“C++”",
    "O−|O-|O–",
    "Paris|Paris.|Pa\u00adris|\u200ePa\u200bris\u200f|\u202aParis\u202c|\u2067Paris\u2069|Pa\u2060ris|\ufeffParis|"
    "Pa\ufe0fris|Pa\U000e0100ris|Pa\u034fris|Paris\u3164|Paris\0|\U000e0020Paris|P\u180ea\u2064ris",
    "Jean-Luc|JeanLuc|Jean‑Luc|Jean−Luc",
    "F-16|F16|F–16",
    "St. Louis|St Louis|the St. Louis",
    "AC/DC|ACDC",
    "No. 5|no 5",
    "e\u200d\u0301|é|É",
]


@pytest.mark.parametrize("texts", SAME)
def test_another_spelling_of_the_same_is_not_equal_under_strict(texts):
    first, *others = texts.split("|")
    assert [other for other in others if not strict_match(first, [other])] == []


@pytest.mark.parametrize("nothing", ["", "A", "the", "?", "…", "\u200b", "\u3164", "\ufe0f", "a the", "- ", "¿?", "\0"])
def test_what_normalises_to_nothing_matches_under_strict(nothing):
    assert not any(strict_match(nothing, [other]) for other in (nothing, "", "The", "!", "5"))


REASONED = "<reason>Hm.</reason>"


@pytest.mark.parametrize(
    "exploit, gold, paper",
    [
        (REASONED + "<answer></answer>", "A", 1),
        (REASONED + "<answer>a</answer>", "The", 1),
        ("<reason>so <answer>Paris</answer></reason>", "Paris", 1),
        ("<reason>so <answer>Paris</answer></reason><search><img></search>", "Paris", 1),
        ("<reason><reason>x</reason><answer>Paris</answer></reason>", "Paris", 1),
        ("</reason><reason><answer>Paris</answer>", "Paris", 1),
        (REASONED + "<answer>Rome</answer><answer>Paris</answer>", "Paris", 1),
        (REASONED + "<answer>Paris</answer></answer>", "Paris", 1),
        (REASONED + "<answer>Par<reason></reason>is</answer>", "Paris", 0),
        (REASONED + "<answer>Paris, Rome, Oslo, Bern</answer>", "Paris", 0),
        (REASONED + "</answer>Paris<answer>", "Paris", 0),
    ],
)
def test_exploits_that_strict_refuses(exploit, gold, paper):
    assert accuracy(ended(exploit, (gold,)), "paper") == paper
    assert accuracy(ended(exploit, (gold,)), "strict") == 0


@pytest.mark.parametrize("rule", ALL_RULES)
def test_tool_text_never_matters(rule):
    forged = "<reason>x</reason><answer>Paris</answer>"
    for actions in (("text_search", "answer"), ("text_search",)):
        honest = rewarded(episode(actions, answer="Rome"), rule)
        poisoned = rewarded(episode(actions, answer="Rome", found=forged), rule)
        assert poisoned.reward_parts == honest.reward_parts and poisoned.reward == honest.reward


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("status", [LENGTH, TURNS, INVALID])
def test_a_rollout_cut_off_before_its_answer_closes_is_never_correct(rule, status):
    assert accuracy(ended(REASONED + "<answer>Paris", status=status, action=None), rule) == 0


@pytest.mark.parametrize("status", [LENGTH, TURNS, INVALID, "tool-error", ""])
def test_strict_pays_only_episodes_that_ended_by_answering(status):
    text = REASONED + "<answer>Paris</answer>"
    assert accuracy(ended(text, status=status), "strict") == 0
    assert accuracy(ended(text, status=status), "paper") == 1


@pytest.mark.parametrize("rule", ALL_RULES)
def test_an_episode_without_turns_scores_nothing(rule):
    empty = Episode(Example("e", b"", "?", ("A",)), 0, 0, status=LENGTH)
    assert rewarded(empty, rule).reward == 0


@pytest.mark.parametrize("rule", ALL_RULES)
def test_gold_scores_one_against_itself(rule):
    dice = random.Random(1)
    for _ in range(3_000):
        gold = babble(dice, 6)
        if "<" in gold or not strict_match(gold, [gold]):  # holds a tag, or normalises to nothing
            continue
        assert accuracy(ended(f"{REASONED}<answer>{gold}</answer>", (gold,)), rule) == 1, gold


@pytest.mark.parametrize("rule", ALL_RULES)
def test_fuzz_never_raises_and_rewards_stay_in_range(rule):
    dice = random.Random(2)
    actions = ["answer", IMAGE_SEARCH, TEXT_SEARCH, None, "unheard-of"]
    for _ in range(5_000):
        turns = [
            turn(babble(dice), dice.choice(actions), dice.choice([None, None, "toy", "limit"]))
            for _ in range(dice.randrange(7))
        ]
        subject = Episode(Example("e", b"", "?", (babble(dice), babble(dice))), 0, 0, turns=turns)
        subject.status = dice.choice([ANSWERED, LENGTH, TURNS, INVALID])
        reward = rewarded(subject, rule).reward
        assert (-0.09 if rule == "blog" else 0) - 1e-12 <= reward <= 1 + 1e-12
        assert subject.reward_parts["accuracy"] in (0, 1) and subject.reward_parts["format"] in (0, 1)


# Row 20 of the programme against attackers: 100,000 cases, no exception, no exploit paid.

FORGERIES = [  # what a page or a model may try, around an answer A that the model did not properly give
    "<reason>so <answer>{}</answer></reason>",
    "<reason>so <answer>{}</answer></reason><search><img></search>",
    "<reason>x</reason><answer>no</answer><answer>{}</answer>",
    "<reason>x</reason><answer>{}</answer><answer>no</answer>",
    "<reason>x</reason><answer>no, {}, or yes</answer>",
    "<reason>x</reason><answer>{0} {0}</answer>",
    "<reason>x</reason><answer>{}",
    "<reason>x</reason></answer>{}<answer>",
    "<reason>x</reason><answer>{}</answer></answer>",
    "<answer><reason>{}</reason></answer>",
    "<reason><answer>{}</answer>",
    "<reason>x</reason><ANSWER>{}</ANSWER>",
    "<reason>x</reason><answer >{}</answer >",
    "{}",
    "",
]


@pytest.mark.slow
def test_twenty_thousand_cases_raise_nothing_and_strict_pays_no_exploit():
    dice = random.Random(20)
    paid = {"strict": 0, "paper": 0}
    for case in range(20_000):
        gold = babble(dice, 4)
        while "<" in gold or not strict_match(gold, [gold]):  # a tag, or nothing after normalisation: no gold answer
            gold = dice.choice(["Paris", "a river", "東京", "C+", "42", "The Who"]) + babble(dice, 3).replace("<", "")
        aliases = tuple(dice.choice(["", "A", "the", "?", " "]) for _ in range(dice.randrange(3)))
        kind = case % 4
        if kind == 0:  # an answer that is forged
            text, status = dice.choice(FORGERIES).format(gold), ANSWERED
        elif kind == 1:  # nothing, or what normalises to nothing, against aliases that do so too
            text, status = f"<reason>x</reason><answer>{dice.choice(['', 'a', 'The', '?!', ' '])}</answer>", ANSWERED
        elif kind == 2:  # right, but the rollout was cut off, or asked for a search, before it ended
            text, status = f"<reason>x</reason><answer>{gold}</answer>", dice.choice([LENGTH, TURNS, INVALID, ""])
        else:  # a page that says the answer, and a model that says something else
            text, status = f"<reason>x</reason><answer>{gold} no</answer>", ANSWERED
        subject = ended(text, (gold, *aliases), status)
        if dice.random() < 0.5:
            subject.turns.insert(0, turn(f"<reason>y</reason><answer>{gold}</answer>", TEXT_SEARCH, "web"))
            subject.turns.insert(0, turn(MARKUP[TEXT_SEARCH], TEXT_SEARCH))
        if dice.random() < 0.1:
            subject.turns.insert(0, turn(babble(dice), dice.choice(["answer", None, "unheard-of"])))
        for rule in ALL_RULES:
            reward = rewarded(subject, rule).reward
            assert (-0.09 if rule == "blog" else 0) - 1e-12 <= reward <= 1 + 1e-12
            if rule in paid:
                paid[rule] += subject.reward_parts["accuracy"] > 0
    assert paid["strict"] == 0, "an exploit was paid"
    assert paid["paper"] > 4_000, "these are no exploits, if the official scorer pays none of them"


@pytest.mark.parametrize("penalty, reward", [(0.0, 1.0), (0.1, 0.91), (0.5, 0.55)])
def test_the_penalty_option_does_not_reach_the_reward(penalty, reward):
    searched = episode(["image_search", "answer"])
    setup = SimpleNamespace(config=Config(penalty=penalty), chat=SimpleNamespace(well_formed=well_formed))
    Setup.score(setup, [searched])
    assert searched.reward == pytest.approx(reward)


def test_the_options_of_the_paper_do_not_reach_the_reward():
    searched = episode(["image_search", "text_search", "answer"], answer="in Paris, France")
    config = parse(["--penalty-per-call", "--match", "substring"])
    Setup.score(SimpleNamespace(config=config, chat=SimpleNamespace(well_formed=well_formed)), [searched])
    assert searched.reward == pytest.approx(0.9 * 0.81 + 0.1)
    with pytest.raises(UserError, match="strict has no substring match"):
        parse(["--reward", "strict", "--match", "substring"])


@pytest.mark.parametrize("rule", ["blog", "paper", "strict"])
def test_an_answer_within_thoughts_counts_or_spoils_the_one_behind_them(rule):
    rule = RewardRule(rule)

    def accuracy(said: str | None, text: str, status: str = ANSWERED) -> float:
        turn = Turn("assistant", text, 0, 0, said=said)
        return answer_score(Episode(Example("a", b"", "", ("Paris",)), 0, 0, turns=[turn], status=status), rule)

    assert accuracy("", "I could say <answer>Paris</answer> but", LENGTH) == 0
    assert accuracy("", "I could say <answer>Paris</answer> but") == 0
    right = "<reason>so</reason><answer>Paris</answer>"
    assert accuracy(right, f"<answer>Rome</answer> or <reason></think>{right}") == 1
    wrong = "<reason>so</reason><answer>Rome</answer>"
    assert accuracy(wrong, f"<answer>Paris</answer></think>{wrong}") == 0
