"""The tokens of coco-caption, on which published English scores are computed, without Java.

coco-caption splits captions with the Penn Treebank tokenizer of Stanford CoreNLP 3.4.1, lowers the case and drops
PUNCTUATIONS: "A man's T-shirt (red)." -> a man 's t-shirt -lrb- red -rrb-. This tokenizer has the same rules, as their
documentation and the program's output show them: contractions become two words, abbreviations keep their full stop,
brackets have names. Tests compare it with the program on the captions of Flickr8k and of COCO's validation set, each by
itself: in a file, the program drops the full stop of a last single letter if the next caption starts like a sentence.
Rare tokens of other texts, such as telephone numbers and most emoticons, may differ.

    coco-caption   Chen et al. 2015, https://arxiv.org/abs/1504.00325, section 3
    PTBTokenizer   https://nlp.stanford.edu/software/tokenizer.html
"""

from __future__ import annotations

import re

from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

DROPPED = frozenset(PUNCTUATIONS)
REPLACEMENTS = str.maketrans(
    {
        "’": "'",
        "‘": "'",
        "“": '"',
        "”": '"',
        "…": "...",
        "–": " -- ",
        "—": " -- ",
        "£": "#",
        "€": "$",
        "¢": " cents ",
        "½": "1/2",
    }
)
ENTITIES = {"&amp;": "&", "&quot;": '"', "&apos;": "'", "&lt;": "<", "&gt;": ">", "&nbsp;": " "}
ENTITY = re.compile("|".join(ENTITIES), re.IGNORECASE)
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
BRACKET = re.compile("|".join(map(re.escape, BRACKETS)))
TWO_WORDS = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "lemme": "lem me",
    "gimme": "gim me",
    "'tis": "'t is",
    "'twas": "'t was",
}

# What keeps its full stop: titles, parts of addresses and names, months, days, states of the USA.
ABBREVIATIONS = (
    "adm al ala apr ariz assn asst atty aug ave bldg blvd bros calif capt cf cmdr co col colo conn corp cos cpl ct "
    "dec dept det dr esq est etc ext feb fla fri ft ga gen gov hon inc ind insp intl jan jr jul jun kan kans ky lt "
    "ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs ms mt natl neb nev nov oct okla penn ph pres "
    "prof pvt rd rep rev sen sep sept sgt spc sq sr st supt tel tenn thu thurs tue tues univ va vs vt wed wis wyo"
).split()
CAPITALISED_ABBREVIATIONS = "Ark Del Ill La Mass Miss Ore Pa Tex Wash".split()  # the others are words, too
SENTENCE_STARTS = (
    "A About After An As At But Earlier He Her Here However If In It Last Many More Now Once One Other Our She Since "
    "So Some Such That The Their Then There These They This We What When While Yet You"
).split()
BEFORE_NUMBERS = "art ca fig no nos pp prop".split()

# Alternatives are tried in order. A token that is none of them is a single character.
TOKEN = re.compile(
    rf"""
      [a-z]+(?=\s|$)                                                    # most words
    | <[/!]?[a-z][^<>]*>                                                # a tag: <unk>
    | https?://[^\s<>"]*[^\s<>"'.,;:!?()] | www\.[^\s<>"]*[^\s<>"'.,;:!?()]
    | [a-z0-9][\w.+-]*@[\w-]+(?:\.[\w-]+)*                              # e-mail
    | [:;=]-?[()] | [:;=]-?[dp](?![a-z0-9])                             # emoticons
    | (?:{"|".join(ABBREVIATIONS)})\.(?![a-z]) | (?-i:{"|".join(CAPITALISED_ABBREVIATIONS)})\.(?![A-Za-z])
    | [a-z]+\.(?=[,;:])                                                 # before a comma it is no full stop
    | (?:{"|".join(BEFORE_NUMBERS)})\.(?=\s*[0-9])
    | ph\.d\. | [a-z](?:\.[a-z])+\.(?![a-z])                            # U.S.
    | [a-z]\.(?![a-z]|\s+(?-i:{"|".join(SENTENCE_STARTS)})(?![A-Za-z]))   # J. Smith, but not: plan B. It is
    | [0-9]{{1,2}}:[0-9]{{2}}(?=[ap]\.?m)                               # 5:30 pm
    | [a-z]+(?=n't(?![a-z])) | n't(?![a-z])                             # do n't
    | '(?:s|m|d|ll|re|ve)(?![a-z0-9])                                   # it 's
    | 't(?:is|was)(?![a-z]) | 'n(?:'|(?![a-z])) | '(?:em|til|cause)(?![a-z]) | '[0-9]0s | ol'(?!\w)
    | [a-z]*[aeiou]'[aeiou][a-z]*                                       # Hawai'i
    | ma'am | c'mon
    | (?:[dlo]|(?-i:[A-HJ-XZn]))'(?!(?:ll|re|ve)(?![a-z]))[a-z]{{2,}}   # O'Brien, o'clock
    | (?-i:[A-Z]+(?:&[A-Z]+)+)                                         # AT&T
    | [a-z]+(?:\.[a-z]+)+ | [a-z]+[!?][a-z]+                            # a space is missing: grass.A dog
    | [^\W_]+(?:[-/_][^\W_]+)+                                          # t-shirt, and/or, 1/2
    | [-+]?[0-9]*(?:[.,:][0-9]+)+ | [-+]?[0-9]+(?![^\W_])               # 1,000.5, 12:30
    | [#@][a-z]+
    | [^\W_]+
    | [!?]{{2,}} | \.{{3}}\.* | --+ | '' | [*_]{{2,}}
    | \S
    """,
    re.IGNORECASE | re.VERBOSE,
)


def coco_tokens(caption: str) -> list[str]:
    """The tokens of an English caption that coco-caption's metrics compare."""
    text = ENTITY.sub(lambda entity: ENTITIES[entity[0].lower()], caption).translate(REPLACEMENTS)
    tokens = []
    for token in TOKEN.findall(text):
        token = token.lower()
        if token in TWO_WORDS:
            tokens += TWO_WORDS[token].split()
        elif token not in DROPPED and token != '"' and not token.startswith(("...", "--")):
            tokens.append(BRACKET.sub(lambda bracket: BRACKETS[bracket[0]], token))
    return tokens
