"""Stand-in film reviews, made up by rule, for SST-2 where the real data cannot be had.

Not SST-2, and no result on them says anything about SST-2: they are here so that everything runs
and can be tested offline. The sentiment of a sentence is fixed by the rule that made it, and a
count of its words is not enough to find it (it gets four in five right): an eighth of the clauses
are negated ("never dull", "not a good film") and a fifth of the sentences set one clause against
another ("although the plot is thin , the cast is superb ."), where the main clause decides.

Write them in the layout of the official files:  python -m ppo_nlu.data.bundled FOLDER [SEED]
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ppo_nlu.storage.files import atomic_write_text, make_folder

TASK = "sst2"
SIZES = {"train": 6000, "dev": 600, "test": 600}
NEGATED = 0.12  # of the clauses
CONTRAST = 0.2  # of the sentences

Rows = list[tuple[str, str | None]]  # sentence, data value (None in the test split)

# For each slot that carries sentiment: the favourable words, the unfavourable ones.
LEXICON: dict[str, tuple[list[str], list[str]]] = {
    "adj": (
        """good great fine superb wonderful charming witty clever funny hilarious moving touching
        tender warm graceful elegant gripping absorbing riveting compelling engaging thrilling
        exciting delightful enchanting magical luminous gorgeous beautiful lovely stunning dazzling
        brilliant masterful inventive original imaginative fresh lively spirited vibrant energetic
        smart intelligent thoughtful insightful profound poignant heartfelt sincere honest subtle
        nuanced convincing satisfying rewarding memorable unforgettable remarkable splendid
        exquisite polished assured confident likable endearing irresistible rousing powerful
        haunting entertaining enjoyable sharp crisp radiant playful""".split(),
        """bad poor awful terrible dreadful dull boring tedious tiresome dreary bland flat lifeless
        limp listless sluggish plodding clumsy awkward inept sloppy messy muddled confused
        incoherent pointless senseless silly stupid moronic idiotic shallow hollow empty vapid trite
        stale predictable formulaic derivative unoriginal uninspired contrived phony false
        pretentious pompous smug sappy maudlin mawkish syrupy overwrought overlong bloated heavy
        ugly crude vulgar tasteless offensive irritating annoying grating unpleasant repellent
        unfunny humorless joyless charmless forgettable disposable disappointing frustrating
        exhausting laughable amateurish shoddy wooden unconvincing""".split(),
    ),
    "thing": (
        """triumph delight treasure gem marvel masterpiece pleasure joy winner treat knockout
        wonder revelation feast achievement success""".split(),
        """bore mess dud failure disaster chore bomb embarrassment ordeal disgrace mistake
        travesty misfire letdown nuisance stinker""".split(),
    ),
    "stuff": (
        """charm wit warmth grace insight intelligence imagination tenderness passion humor
        elegance depth suspense magic wisdom honesty style vitality""".split(),
        """tedium nonsense noise clutter cliches stupidity pretension bombast drivel monotony
        banality vulgarity confusion melodrama sentimentality padding silliness filler""".split(),
    ),
    "verb": (
        """delight charm move thrill entertain enchant captivate dazzle engage reward surprise
        touch enthrall amuse satisfy inspire""".split(),
        """bore annoy disappoint irritate exhaust insult frustrate tire numb confuse alienate
        depress offend weary bewilder torment""".split(),
    ),
    "felt": (
        "enjoyed loved admired adored treasured relished liked savored".split(),
        "hated disliked loathed endured regretted resented despised detested".split(),
    ),
    "left": (
        "happy uplifted exhilarated moved charmed satisfied refreshed enriched".split(),
        "bored drained irritated cheated depressed annoyed numb weary".split(),
    ),
}

# Words that say nothing about the sentiment.
NEUTRAL: dict[str, list[str]] = {
    "film": """the_film the_movie this_film this_movie it the_picture the_whole_thing this_story
        the_sequel the_remake""".split(),
    "genre": """film movie comedy drama thriller romance documentary western musical satire fable
        adventure portrait picture story tale sequel debut farce""".split(),
    "aspect": """plot script screenplay dialogue acting direction pacing ending score soundtrack
        cinematography camerawork premise opening narration editing story animation production
        climax love_story final_act first_hour second_half voice-over courtroom_scene""".split(),
    "person": """director writer lead cast star ensemble supporting_cast heroine screenwriter
        cinematographer composer leading_man young_actress""".split(),
    "deg": """very truly quite rather really so utterly thoroughly deeply remarkably surprisingly
        consistently undeniably often strangely almost unexpectedly relentlessly""".split(),
    "tail": """from_start_to_finish in_its_first_hour in_the_final_reel on_the_big_screen
        for_most_of_its_running_time by_any_standard at_every_turn all_the_way_through
        from_the_opening_scene in_spite_of_its_budget in_nearly_every_scene
        about_growing_up_in_a_small_town about_two_brothers set_in_postwar_paris
        from_a_first-time_director for_the_whole_family for_its_ninety_minutes
        when_the_lights_go_down""".split(),
}

# Clauses with subject and verb. {Slot} in plain clauses takes words of the clause's own sentiment,
# in negated ones words of the other. "a" turns into "an" where it must.
PLAIN = (
    "the {aspect} is {adj}",
    "the {aspect} is {deg} {adj}",
    "{film} is a {adj} {genre}",
    "{film} is a {deg} {adj} {genre}",
    "{film} is {adj} and {adj}",
    "{film} is {deg} {adj}",
    "{film} is a {thing}",
    "{film} is a {adj} {thing}",
    "the {aspect} is a {thing}",
    "{film} manages to {verb} its audience",
    "{film} will {verb} anyone who sees it",
    "{film} is full of {stuff}",
    "the {person} fills it with {stuff}",
    "the {person} brings {stuff} to every scene",
    "there is plenty of {stuff} in the {aspect}",
    "the {person} is {deg} {adj}",
    "i {felt} every minute of it",
    "i {felt} the {aspect}",
    "we leave the theater {left}",
    "the {person} gives a {adj} performance",
)
NEGATION = (
    "the {aspect} is not {adj}",
    "the {aspect} is never {adj}",
    "the {aspect} is hardly {adj}",
    "{film} is far from {adj}",
    "{film} is not a {adj} {genre}",
    "{film} is never {deg} {adj}",
    "{film} is neither {adj} nor {adj}",
    "{film} is hardly a {thing}",
    "{film} is not a {thing}",
    "{film} is n't {deg} {adj}",
    "{film} lacks {stuff}",
    "there is no {stuff} in the {aspect}",
    "the {person} works without {stuff}",
    "{film} does n't {verb} its audience",
    "{film} will never {verb} anyone",
    "nobody could call the {aspect} {adj}",
    "nobody {felt} the {aspect}",
    "i never {felt} it",
    "we never feel {left}",
    "the {person} never gives a {adj} performance",
)
# Fragments, of which SST is full; only whole sentences are made of them.
PLAIN_FRAGMENTS = (
    "a {adj} {genre}",
    "a {deg} {adj} {genre}",
    "a {adj} , {adj} {genre}",
    "{adj} , {adj} and {deg} {adj}",
    "{deg} {adj}",
    "a {thing} of a {genre}",
    "a {genre} full of {stuff}",
    "a {genre} of {deg} {adj} {stuff}",
    "{adj} {genre} {tail}",
)
NEGATED_FRAGMENTS = (
    "not a {adj} {genre}",
    "never {adj}",
    "hardly a {thing}",
    "far from {adj}",
    "a {genre} without {stuff}",
    "a {genre} that never feels {adj}",
    "neither {adj} nor {adj}",
    "a {genre} with no {stuff}",
    "not {deg} {adj} , and never {adj}",
)
# {main} decides; {other} and its slots have the other sentiment.
CONTRASTS = (
    "although {other} , {main}",
    "though {other} , {main}",
    "while {other} , {main}",
    "even if {other} , {main}",
    "{other} , but {main}",
    "{other} , yet {main}",
    "{main} , although {other}",
    "{main} , though {other}",
    "{main} , even if {other}",
)
AGREEMENTS = ("{one} , and {two}", "{one} ; {two}", "{one} because {two}", "{one} , and so {two}")
_SOUNDS_LIKE_VOWEL, _SOUNDS_LIKE_CONSONANT = {"honest", "hour"}, {"one", "unique", "useful"}


class _Writer:
    """Draws sentences from one seeded stream, using `random()` only: the one method whose sequence
    Python promises to keep from version to version."""

    def __init__(self, seed: int) -> None:
        self.uniform = random.Random(seed).random

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self.uniform() * len(options))]

    def shuffle(self, rows: list[tuple[str, str]]) -> None:
        for last in range(len(rows) - 1, 0, -1):
            other = int(self.uniform() * (last + 1))
            rows[last], rows[other] = rows[other], rows[last]

    def fill(self, template: str, good: bool) -> str:
        """Put words into the slots; no word comes twice in a clause."""
        words: list[str] = []
        for token in template.split(" "):
            slot = token[1:-1] if token.startswith("{") else ""
            if not slot:
                words.append(token)
                continue
            options = LEXICON[slot][0 if good else 1] if slot in LEXICON else NEUTRAL[slot]
            free = [option for option in options if option not in words]
            words.append(self.pick(free))
        return " ".join(words).replace("_", " ")

    def clause(self, good: bool, fragment: bool = False) -> str:
        plain, negated = (PLAIN_FRAGMENTS, NEGATED_FRAGMENTS) if fragment else (PLAIN, NEGATION)
        if self.uniform() < NEGATED:
            return self.fill(self.pick(negated), not good)
        return self.fill(self.pick(plain), good)

    def sentence(self, good: bool) -> str:
        kind = self.uniform()
        if kind < CONTRAST:
            text = self.pick(CONTRASTS)
            text = text.format(main=self.clause(good), other=self.clause(not good))
        elif kind < CONTRAST + 0.2:
            text = self.pick(AGREEMENTS).format(one=self.clause(good), two=self.clause(good))
        elif kind < CONTRAST + 0.4:
            text = self.clause(good, fragment=True)
        else:
            text = self.clause(good)
            if self.uniform() < 0.3:
                text += " " + self.fill("{tail}", good)
        end = "" if self.uniform() < 0.15 else " ."
        return _articles(text) + end


def _articles(text: str) -> str:
    words = text.split(" ")
    for place, (word, after) in enumerate(itertools.pairwise(words)):
        vowel = after[0] in "aeiou" and after not in _SOUNDS_LIKE_CONSONANT
        if word == "a" and (vowel or after in _SOUNDS_LIKE_VOWEL):
            words[place] = "an"
    return " ".join(words)


@lru_cache(maxsize=2)
def splits(seed: int = 0) -> dict[str, Rows]:
    """All rows by split: distinct sentences, so no two splits share one, half of them favourable
    in each; the test split has no labels, as the official one."""
    writer = _Writer(seed)
    seen: set[str] = set()
    result: dict[str, Rows] = {}
    for split, size in SIZES.items():
        rows: list[tuple[str, str]] = []
        while len(rows) < size:
            good = len(rows) % 2 == 0
            sentence = writer.sentence(good)
            if sentence.removesuffix(" .") not in seen:
                seen.add(sentence.removesuffix(" ."))
                rows.append((sentence, "1" if good else "0"))
        writer.shuffle(rows)
        result[split] = [(text, None if split == "test" else value) for text, value in rows]
    return result


def write(folder: str | Path, seed: int = 0) -> None:
    """Write train.tsv, dev.tsv and test.tsv as the official ones are: no quoting, a space behind
    each labelled sentence, an index and no label in the test split."""
    folder = make_folder(folder)
    for split, rows in splits(seed).items():
        if split == "test":
            lines = ["index\tsentence"] + [f"{n}\t{text}" for n, (text, _) in enumerate(rows)]
        else:
            lines = ["sentence\tlabel"] + [f"{text} \t{value}" for text, value in rows]
        atomic_write_text(folder / f"{split}.tsv", "".join(f"{x}\n" for x in lines))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m ppo_nlu.data.bundled FOLDER [SEED]")
    write(sys.argv[1], *map(int, sys.argv[2:]))
