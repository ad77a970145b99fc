"""Rewards: whether the answer is right, whether the turns are well formed, and what the searches cost.

Three rules, by name. With s the accuracy (0 or 1), f the format (0 or 1), p the penalty (0.1), w the format weight
(0.1) and c = 1 if the episode made any search, else 0 (`per_call`: c = the number of searches):

    blog    r = (1 - w) (s - p c)     + w f      the penalty hits wrong answers too
    paper   r = (1 - w) s (1 - p)^c   + w f      the penalty hits correct answers only
    strict  the paper's formula with a scorer that the official one's loopholes do not fool

Reward and advantage are separate: `grpo.py` makes advantages from a group's rewards.

`blog` and `paper` judge answers as the official code does, loopholes included (EvolvingLMMs-Lab/multimodal-search-r1,
`mmsearch_r1/utils/reward_score/`). Formats differ a little. By a description of that code, a turn is one closed reason,
any words, and one closed action at the end, and the actions follow one another in a legal order (`LEGAL_SHAPES`). Here
a turn is what `Chat.well_formed` accepts (chat.py). R stands for `<reason>why</reason>`:

| a turn that one of them accepts              | example                                             | here | official |
|----------------------------------------------|-----------------------------------------------------|------|----------|
| a tag of another action, without its partner | R </search><answer>Paris</answer>                   | no   | yes      |
| the same within the reason                   | <reason>no </search></reason><answer>Paris</answer> | no   | yes      |
| the same within the action                   | R <answer>Paris</search></answer>                   | no   | yes      |
| a query without a word                       | R <text_search> </text_search>                      | no   | yes      |
| white space within the image search          | R <search> <img></search>                           | yes  | no       |

Conversations differ, too:
- The official code counts the search tags in the turns' text, this one the searches that were executed. So a call over
  its limit (a second image search) and one in the last turn, after which nothing is executed, cost no penalty here.
- A call that was refused earns no format here, even where its shape is legal (a text search where it is not allowed,
  then the answer).
- The official code raises on a conversation of four model turns. Here it has no format, unless a rule takes any shape.
"""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass
from typing import Callable, Iterable

from mmsr.episode import ANSWERED, JUDGED_RIGHT, Episode
from mmsr.system.errors import UserError

RULES = ("blog", "paper", "strict")

# Which sequences of actions earn format, unless a rule takes any. For a new tool, add the shapes with its name.
LEGAL_SHAPES: set[tuple[str, ...]] = {
    ("answer",),
    ("image_search", "answer"),
    ("text_search", "answer"),
    ("image_search", "text_search", "answer"),
}
# What `strict` allows, too: it is within the released limits, yet the official code gives it no format.
STRICT_SHAPES: set[tuple[str, ...]] = {("text_search", "text_search", "answer")}


@dataclass(frozen=True)
class RewardRule:
    """Which formula and scorer, with their numbers.

    Raises `UserError` for an unknown name, a number outside [0, 1], or `strict` with a substring match.
    """

    name: str = "paper"
    penalty: float = 0.1
    format_weight: float = 0.1
    per_call: bool = False  # every search costs, not only the first
    substring: bool = False  # an accepted answer inside the given one is enough (blog, paper)
    any_shape: bool = False  # format for any calls within their limits and then an answer, not only LEGAL_SHAPES

    def __post_init__(self):
        if self.name not in RULES:
            raise UserError(f"reward: unknown rule {self.name!r}; choose one of {', '.join(RULES)}")
        for field in ("penalty", "format_weight"):
            value = getattr(self, field)
            if not 0 <= value <= 1:
                raise UserError(f"reward: {field} is {value}; give a number from 0 to 1")
        if self.name == "strict" and self.substring:
            raise UserError("reward: strict has no substring match (a list of guesses would pass); leave it out")


def score(
    episodes: Iterable[Episode],
    rule: RewardRule,
    well_formed: Callable[[str], bool],
    accuracy: Callable[[Episode], float] | None = None,
) -> None:
    """Set each episode's `reward` and `reward_parts` {"accuracy", "format", "penalty"}.

    reward = (1 - w) accuracy + w format - penalty, where the penalty is what the searches took off:

        blog            (1 - w) p c
        paper, strict   (1 - w) accuracy (1 - (1 - p)^c)

    So 0 <= reward <= 1 under `paper` and `strict`, and -(1 - w) p c <= reward <= 1 under `blog`. `well_formed` judges
    one assistant turn's text. `accuracy` replaces the rule's own scorer (a model as judge, say); it must give a number
    from 0 to 1, else ValueError. What a judge found right is right. No text that the model writes makes this raise.
    """
    for episode in episodes:
        right = float(accuracy(episode)) if accuracy else answer_score(episode, rule)  # s
        if episode.judged == JUDGED_RIGHT:
            right = 1.0
        if not 0 <= right <= 1:
            raise ValueError(f"accuracy of example {episode.example.id!r} is {right}, not from 0 to 1")
        formed = format_score(episode, rule, well_formed)  # f
        weight = 1 - rule.format_weight
        penalty = weight * _search_cost(right, episode.searches(), rule)
        episode.reward = weight * right + rule.format_weight * formed - penalty
        episode.reward_parts = {"accuracy": right, "format": formed, "penalty": penalty}


def _search_cost(accuracy: float, searches: int, rule: RewardRule) -> float:
    """What the searches take off the accuracy: p c, or accuracy (1 - (1 - p)^c)."""
    calls = searches if rule.per_call else min(searches, 1)
    if rule.name == "blog":
        return rule.penalty * calls
    return accuracy * (1 - (1 - rule.penalty) ** calls)


# ---- accuracy

ARTICLES = re.compile(r"\b(a|an|the)\b")
ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def answer_score(episode: Episode, rule: RewardRule) -> float:
    """1.0 if the episode's answer is one of the example's, by the rule's own extraction and match; else 0.0."""
    given = given_answer(episode, rule)
    answers = episode.example.answers
    if given is None:
        return 0.0
    if rule.name == "strict":
        return float(strict_match(given, answers))
    return float(exact_match(given, answers, rule.substring))


def given_answer(episode: Episode, rule: RewardRule) -> str | None:
    """The answer that the rule reads in an episode; None where it finds none."""
    return strict_answer(episode) if rule.name == "strict" else official_answer(episode)


def official_answer(episode: Episode) -> str | None:
    """The inside of the last closed `<answer>` anywhere in the last assistant turn; None if there is none."""
    found = ANSWER.findall(_closed(_last_text(episode)))
    return found[-1].strip() if found else None


def _closed(text: str) -> str:
    """Up to the last `</answer>`: after it, ANSWER would look for an end from every `<answer>`, in quadratic time."""
    before, end, _ = text.rpartition("</answer>")
    return before + end


def _last_text(episode: Episode) -> str:
    for turn in reversed(episode.turns):
        if turn.role == "assistant":
            return turn.text if turn.said is None else turn.said
    return ""


def exact_match(prediction: str, answers: Iterable[str], substring: bool = False) -> bool:
    """The official match: equal to any answer after normalisation, or (`substring`) containing one.

    Normalisation: lower case, ASCII punctuation dropped, the words a, an, the dropped, white space collapsed. An empty
    prediction therefore equals the answer "A" or "The", but not by `strict_match`. As a substring, such an answer is
    never found.
    """
    given = _normalise(prediction)
    accepted = [_normalise(answer) for answer in answers]
    if substring:
        return any(answer and answer in given for answer in accepted)
    return given in accepted


def _normalise(text: str) -> str:
    text = text.lower().translate(ASCII_PUNCTUATION)
    text = ARTICLES.sub(" ", text)
    return _collapse(text)


def _collapse(text: str) -> str:
    return " ".join(text.split())


# ---- format


def format_score(episode: Episode, rule: RewardRule, well_formed: Callable[[str], bool]) -> float:
    """1.0 if every assistant turn is well formed, their actions make a legal shape and no call was refused; else 0.0.

    A refused call is an action of the shape too, so most shapes with one are illegal anyway. With a limit of 0 some are
    not: ("text_search", "answer") where the search was refused.
    """
    turns = [turn for turn in episode.turns if turn.role == "assistant"]
    shape = _shape(episode)
    if rule.any_shape:
        legal = shape[-1:] == ("answer",) and shape.count("answer") == 1
    else:
        legal = shape in LEGAL_SHAPES or (rule.name == "strict" and shape in STRICT_SHAPES)
    refused = any(turn.role == "tool" and turn.observation.source == "limit" for turn in episode.turns)
    if not legal or refused:
        return 0.0
    return float(all(well_formed(turn.text) for turn in turns))


def _shape(episode: Episode) -> tuple[str | None, ...]:
    """The actions of an episode without calls of tools that do not search, such as a closer look."""
    actions: list[str | None] = []
    for turn in episode.turns:
        if turn.role == "assistant":
            actions.append(turn.action)
        elif not turn.is_search:  # what the last action gave
            actions.pop()
    return tuple(actions)


# ---- the strict scorer

TAGS = re.compile(r"</?(?:reason|answer)>")
ONE_ANSWER = re.compile(r"(<reason></reason>)*<answer></answer>(<reason></reason>)*")

# What is done to a text before its punctuation is dropped, in this order.
BEFORE_NFKC = {  # which mark to put where NFKC would join digits into another number
    "^": re.compile(r"(?<=\d)(?=[\u00b2\u00b3\u00b9\u2070-\u207f])"),  # 10² is not 102
    " ": re.compile(r"(?<=\d)(?=[\u00bc-\u00be\u2080-\u208e\u2150-\u215f\u2189])"),  # nor 5½ 51/2
    "-": re.compile(r"(?<=\d)\uff5e(?=\d)"),  # 1990～1995
    "'": re.compile(r"\u00b4"),  # which would be a blank and an accent
    ",": re.compile(r"(?<=\d)['\u2019\u066c\u00a0\u2007\u2009\u202f](?=\d{3}(?!\d))"),  # thousands: 1'000
}
FILLERS = re.compile(r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\U000e0100-\U000e01ef]")
SAME_MARK = str.maketrans(  # marks that look alike become one
    dict.fromkeys("\u02d7\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2796\u301c", "-")
    | {"\u2044": "/", "\u2215": "/", "\u2236": ":", "\u066a": "%", "\u066b": ".", "\u066c": ",", "\u266f": "#"}
    | dict.fromkeys("`\u02bb\u02bc", "'")  # O'Brien, Hawai'i
)
CURRENCY = "[$\u00a2-\u00a5\u20a0-\u20cf]"
BLANKS = re.compile(  # 5 %, 5 €, 1990 - 1995, 3 : 1, $ 5, 40° N
    rf"(?<=\d) (?=[%\u2030\u00b0]|{CURRENCY}|[-/:] \d)|(?<=\d [-/:]) (?=\d)|(?<={CURRENCY}) (?=\d)"
    r"|(?:(?<=\u00b0)|(?<=[\d\u2032]['\"\u2032])) (?=[nsewcf]\b)"
)
THOUSANDS = re.compile(  # 1,000 and 10,00,000 and 1.000.000 and 1.000,50
    r"(?<![\d.,])[1-9]\d{0,2}(?:(?:,\d{3})+(?!,?\d)|(?:,\d\d)+,\d{3}(?!,?\d)|(?:\.\d{3}){2,}(?!\.?\d)"
    r"|\.\d{3}(?=,\d\d?(?![\d.,])))"
)
DECIMAL_COMMA = re.compile(r"(?<![\d.,])(0|\d+(?=,\d\d?(?!\d))),(?=\d+(?![.,]?\d))")  # 3,14; not May 26,2003
BARE_POINT = re.compile(r"(?<![\w.])\.(?=\d)")
MEANT = re.compile(  # the punctuation that stays
    r"(?<=\d)[.:/-](?=\d)"  # 3.14, 10:30, 1/2, 1990-1995
    r"|(?<!\w)-(?=[^\w\s]?\d)|(?<=\de)-(?=\d)"  # -5, -$5, 1e-5
    r"|(?<=\d)[%\u2030]|[%\u2030](?=\d)"
    r"|(?<=\b[^\W\d_])\#"  # C#
    r"|(?<=\b[a-z])-(?!\w)|(?<=\b[a-z]{2})-(?!\w)"  # O-, Cl-
)
STRICT_ARTICLES = re.compile(r"\b(a|an|the)\b(?![#+-])")  # A+ has none


def strict_answer(episode: Episode) -> str | None:
    """The one answer of an episode that ended by answering; None for several, or one within the reason."""
    if episode.status != ANSWERED:
        return None
    text = _last_text(episode)
    tags = "".join(TAGS.findall(text))
    if not ONE_ANSWER.fullmatch(tags):
        return None
    return ANSWER.search(text).group(1).strip()


def strict_match(prediction: str, answers: Iterable[str]) -> bool:
    """Equal to any answer after NFKC, case folding and dropping articles, invisible characters and punctuation.

    What normalises to nothing never matches. Symbols (categories S*: $, +, <, °) stay: "C" is not "C+". Punctuation
    (P*) stays where it changes what its neighbour means:

    - between digits: 3.14, 10:30, 1/2, 2-1, 1990-1995;
    - before a number: -5, -$5, with any kind of hyphen, dash or minus;
    - after one: 50%; and after a single letter: C#, O- (a minus also after two: Cl-).

    Digits of any script become 0 to 9. Separators of thousands are dropped (1,000 and 1'000 are 1000; 1.000.000 is
    1000000, but 1.000 is not 1000), a decimal comma is a point, and other marks between digits leave a blank (1,2,3).
    Then numbers are compared as they are written: 1.0 is not 1, version 3.10 not 3.1, 26/9/2003 not 26-9-2003.
    """
    given = _normalise_strictly(prediction)
    if not given:
        return False
    return any(given == _normalise_strictly(answer) for answer in answers)


def _normalise_strictly(text: str) -> str:
    text = _visible(text)
    text = _plain_numbers(text)
    meant = {mark.start() for mark in MEANT.finditer(text)}
    characters = []
    for i, character in enumerate(text):
        punctuation = unicodedata.category(character)[0] == "P"
        characters.append("\0" if punctuation and i not in meant else character)
    text = "".join(characters)
    text = re.sub(r"(?<=\d)\0+(?=\d)", " ", text)  # between digits, what is dropped leaves a blank
    text = text.replace("\0", "")
    text = STRICT_ARTICLES.sub(" ", text)
    return _collapse(text)


def _visible(text: str) -> str:
    """NFKC and case-folded, without invisible characters, and with one mark for those that look alike."""
    for mark, places in BEFORE_NFKC.items():
        text = places.sub(mark, text)
    text = unicodedata.normalize("NFKC", text)
    text = FILLERS.sub("", text)
    text = "".join(char for char in text if char.isspace() or unicodedata.category(char) not in ("Cf", "Cc"))
    text = re.sub(r"\d", lambda digit: str(int(digit[0])), text)  # of any script
    text = unicodedata.normalize("NFKC", text.casefold())
    return _collapse(text.translate(SAME_MARK))


def _plain_numbers(text: str) -> str:
    """Numbers with a decimal point alone: 1,000.5 as 1000.5, 3,14 as 3.14, .5 as 0.5."""
    text = BLANKS.sub("", text)
    text = THOUSANDS.sub(lambda number: re.sub("[.,]", "", number[0]), text)
    text = DECIMAL_COMMA.sub(r"\1.", text)
    return BARE_POINT.sub("0.", text)
