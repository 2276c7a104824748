"""Rules for the tokens of the Penn Treebank, as the COCO caption evaluation makes them.

The rules describe the output of the tokenizer of Stanford CoreNLP 3.4.1 and were found by
comparison; the longest match wins, of several the first. Patterns are in the syntax of scanner.py:
"quoted" is either case, {name} a pattern of NAMES.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from mplug_jax.metrics.captioning.ptb import characters

NEWLINE = "\n"


class TokenRule(NamedTuple):
  """One kind of token.

  Attributes:
    pattern: pattern of its text.
    before: pattern that must follow and is not part of the token.
    token: None: the token is the text itself; "": no token; a string: the token; a function: maps
      the text to the token.
    give_back: number of last code units of the text that are read again.
    keep_text: the token keeps these code units.
  """

  pattern: str
  before: str | None = None
  token: str | Callable[[str], str] | None = None
  give_back: int = 0
  keep_text: bool = False


def _class(ranges: str) -> str:
  """Returns the class of code units of ranges such as "41-5A AA"."""
  parts = ["-".join(f"\\u{int(end, 16):04X}" for end in part.split("-")) for part in ranges.split()]
  return f"[{''.join(parts)}]"


def _any_case(words: str) -> str:
  """Returns a pattern of words in either case."""
  return "|".join(f'"{word}"' for word in words.split())


def _fixed_start(words: str) -> str:
  """Returns a pattern of words with a fixed first letter and the others in either case."""
  return "|".join(f'{word[0]}"{word[1:]}"' if len(word) > 1 else word for word in words.split())


# Abbreviations that may end a sentence: the full stop after them then counts twice.
_ENDING = """
  al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq
  est etc ext feb fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon
  mont neb nev nov oct okla penn plc rd rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ
  va vt wed wis wisc wyo
"""
_ENDING_STATES = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
# Abbreviations that precede a word and never end a sentence.
_LEADING = """
  adj adm adv alex assoc asst atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr drs
  elec ens ft gen gov govs hon insp invt jos lieut lt maj messrs mlle mme mr mrs ms msgr mt natl
  pfc ph pres prof profs pvt rep reps rev sen sens sfc sgt spc st ste supt supts treas vs wm
"""
# Abbreviations that precede a number.
_NUMBERING = "art ca fig figs no nos op pp prop"
# Words that start a sentence after an acronym.
_STARTING = """
  A About According Additionally After An As At But Earlier He Her Here However If In It Last Many
  More Now Once One Other Our She Since So Some Such That The Their Then There These They This We
  When While What Yet You
"""
_EXTENSIONS = """
  bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl
  png ppt ps py sql tar txt wav x xml zip
"""
_WITH_APOSTROPHE = """
  "c'mon"|"e'er"|"ev'ry"|"li'l"|"nat'l"|"nor'easter"|"s'mores"|"o"{QUOTE}"o"|"c"{APOSTROPHE}"est"|
  "cap"{APOSTROPHE}"n"|"cont'd."|"ol"{APOSTROPHE}|"dunkin"{APOSTROPHE}|"somethin"{APOSTROPHE}|
  {APOSTROPHE}("em"|"til"|"till"|"cause")|{APOSTROPHE}"n"{APOSTROPHE}?|[dDjJlL]{APOSTROPHE}|
  {APOSTROPHE}[2-9]0[sS]
"""

NAMES = {
  "LETTER": _class(characters.LETTERS),
  "DIGIT": _class(characters.DIGITS),
  "MARK": _class(characters.MARKS),
  "UPPER": _class(characters.UPPERCASE),
  "SYMBOL": _class(characters.SYMBOLS),
  "SPACE": r"[\ \u0009\u00A0\u2000-\u200A\u3000]",
  "BREAK": r"(\u000D\u000A?|[\u000A-\u000C\u2028\u2029])",
  "GAP": r"({SPACE}|{BREAK}|\u0085)",
  "APOSTROPHE": r"""(['\u0092\u2019]|&"apos";)""",
  "QUOTE": r"([`\u0091\u2018\u201B]|{APOSTROPHE})",
  "WORD_CHAR": r'([{LETTER}{MARK}\u00AD]|&[aeiouAEIOU]("acute"|"grave"|"uml");)',
  "WORD": "{WORD_CHAR}({WORD_CHAR}|{DIGIT})*([.!?]{WORD_CHAR}({WORD_CHAR}|{DIGIT})*)*",
  "THING_CHAR": r"[{LETTER}{DIGIT}]",
  "THING_PART": "([dDoOlL]{QUOTE}{THING_CHAR})?{THING_CHAR}+",
  "THING": r"{THING_PART}([\-_\u058A\u2010\u2011]{THING_PART})*",
  "COMPOUND": r"[A-Za-z0-9][A-Za-z0-9.,\u00AD]*(\-([A-Za-z0-9\u00AD]+|{ACRONYM}))+",
  "COMPANY": r'[A-Z]+(([+&]|&"amp";)[A-Z]+)+',
  "NUMBER": r"({DIGIT}+|{DIGIT}*([.:,\u00AD\u066B\u066C]{DIGIT}+)+)",
  "ACRONYM": r"[A-Za-z](\.[A-Za-z])+\.",
  "TAG_NAME": r"[A-Za-z][A-Za-z0-9_:.\-]*",
  "TAG": r"""<([!?][A-Za-z\-][^>\u000D\u000A]*|
             \/{TAG_NAME}|{TAG_NAME}(\ +{TAG_NAME}(\ *=\ *('[^']*'|\"[^\"]*\"))?)*\ *\/?)\ *>""",
  "URL_CHAR": r"[^\ \u0009\u000A\u000C\u000D\"<>|(){}]",
  "URL_END": r"[^\ \u0009\u000A\u000C\u000D\"<>|.!?(){},\-]",
  "HOST_PART": r"[^\ \u0009\u000A\u000C\u000D\"<>|(){}.\u00A0]+",
  "MAIL": r"""[a-zA-Z0-9][^\ \u0009\u000A\u000C\u000D\"<>|()\u00A0{}]*
              @({HOST_PART}\.)*{HOST_PART}""",
  "ENDING": rf"""({_any_case(_ENDING)}|{_fixed_start(_ENDING_STATES)}
                 |[pP]?[pP][tT][ye][sS]?|"ph.d"|"ed.d")\.""",
  "STARTING": rf'({_fixed_start(_STARTING)}|M("r"|"s")\.)',
  "CLITIC": '{APOSTROPHE}([sSmMdD]|"ll"|"re"|"ve")',
  "EXTENSION": f"({_any_case(_EXTENSIONS)})",
  "EYE": r"[\-\^x=~<>']",
  "NT": '"n"{QUOTE}"t"',
}

_BRACKETS = {"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-"}


def _parentheses(text: str) -> str:
  return text.replace("(", "-LRB-").replace(")", "-RRB-")


def _phrase(text: str) -> str:
  """Replaces spaces in a token by no-break spaces, and spells parentheses."""
  return _parentheses(text.replace(" ", "\u00a0"))


def _spaced(text: str) -> str:
  """Replaces spaces in a token by no-break spaces."""
  return text.replace(" ", "\u00a0")


def _word(text: str) -> str:
  """Deletes soft hyphens; a single soft hyphen becomes a hyphen."""
  return text.replace("\u00ad", "") or "-"


_PLAIN_QUOTES = str.maketrans(
  {
    "\u0092": "'",
    "\u2019": "'",
    "\u0091": "`",
    "\u2018": "`",
    "\u201b": "`",
    "\u0093": "``",
    "\u201c": "``",
    "\u0094": "''",
    "\u201d": "''",
    "\u00ab": "``",
    "\u00bb": "''",
    "\u2039": "`",
    "\u203a": "'",
  }
)


def _quotes(text: str) -> str:
  """Converts quotation marks to ASCII."""
  return text.replace("&apos;", "'").translate(_PLAIN_QUOTES)


def _ampersands(text: str) -> str:
  return re.sub("&amp;", "&", text, flags=re.IGNORECASE)


def _dashes(text: str) -> str:
  """Converts two to four hyphens to a dash."""
  return text if len(text) == 1 or len(text) > 4 else "--"


# Each comment is for the rules below it, up to the next. The order matters only for matches of
# equal length.
RULES = (
  # Words that are two tokens.
  TokenRule('"cannot"', give_back=3),
  TokenRule('"gonna"|"gotta"|"wanna"|"lemme"|"gimme"', give_back=2),
  TokenRule('"\'tis"', give_back=2),
  TokenRule('"\'twas"', give_back=3),
  # Markup and entities.
  TokenRule("{TAG}", token=_spaced),
  TokenRule(r'&("mdash"|"ndash"|"md");|[\u0096\u0097\u2013-\u2015]', token="--"),
  TokenRule('&("ht"|"tl"|"ur"|"lr"|"qc"|"ql"|"qr"|"odq"|"cdq"|#[0-9]+);'),
  TokenRule('&"amp";', token="&"),
  TokenRule('&"lt";', token="<"),
  TokenRule('&"gt";', token=">"),
  TokenRule("&quot;", before="[A-Za-z0-9$]", token="``"),
  TokenRule('&"quot";', token=lambda text: "''" if text == "&quot;" else text),
  TokenRule('&"nbsp";', token=""),
  # Words; "n't", "'s", ... are separate tokens.
  TokenRule("{NT}", token=_quotes),
  TokenRule(r"[A-Za-z\u00AD]*[A-MO-Za-mo-z]\u00AD*", before="{NT}", token=_word),
  TokenRule("{WORD}", before="{CLITIC}", token=_word),
  TokenRule("{WORD}", token=_word),
  TokenRule(r'("pro"|"anti")\-'),
  TokenRule(r'"c"(\+\+|#)|"f"#'),
  TokenRule(
    r"[A-HJ-XZn]{QUOTE}{LETTER}{2}{LETTER}*|{LETTER}+[aeiouyAEIOUY]{QUOTE}[aeiouA-Z]{LETTER}*"
  ),
  TokenRule("[yY]{APOSTROPHE}", before="{LETTER}"),
  TokenRule(_WITH_APOSTROPHE),
  TokenRule("{APOSTROPHE}[0-9][0-9]", before="{GAP}"),
  # Addresses, handles, hashtags. The second class of the host excludes comma to underscore: it
  # matches small letters and other scripts.
  TokenRule(r'"http""s"?:\/\/{URL_CHAR}+{URL_END}'),
  TokenRule(r"""("www"\.([^\ \u0009\u000A\u000C\u000D\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}
                |([^\ \u0009\u000A\u000C\u000D\"`'<>|.!?(){},-_$]+\.)+("com"|"net"|"org"|"edu"))
                (\/[^\ \u0009\u000A\u000C\u000D\"<>|()]+{URL_END})?"""),
  TokenRule('(<|&"lt";)?{MAIL}(>|&"gt";)?'),
  TokenRule("@[A-Za-z_][A-Za-z0-9_]*"),
  TokenRule("#{WORD_CHAR}+"),
  # Clitics; "'ll" at the end of the text is an opening quote instead (below).
  TokenRule("{CLITIC}", before="[^A-Za-z]", token=_quotes),
  # Dates, numbers, fractions, currencies.
  TokenRule(r"{DIGIT}{1,2}[\-\/]{DIGIT}{1,2}[\-\/]{DIGIT}{2,4}"),
  TokenRule(r"[\-+]?{NUMBER}", token=_word),
  TokenRule(r"[\u00B2\u00B3\u00B9\u2070\u2074-\u2079\u2080-\u2089]+"),
  TokenRule(r"({DIGIT}{1,4}[\-\ \u00A0])?{DIGIT}{1,4}(\\?\/|\u2044){DIGIT}{1,4}", token=_spaced),
  *(
    TokenRule(sign, token=text)
    for sign, text in zip("¼½¾⅓⅔", ("1/4", "1/2", "3/4", "1/3", "2/3"), strict=True)
  ),
  TokenRule(r"[A-Z]*\$|#"),
  TokenRule(r"[\u0080\u00A4\u20A0\u20AC]", token="$"),
  TokenRule(r"\u00A3", token="#"),
  TokenRule(r"\u00A2", token="cents"),
  # Abbreviations, acronyms, names of files.
  TokenRule(r'("pt"[eyEY]|"co")\.', before='{SPACE}("ltd"|"lim")'),
  TokenRule("{ENDING}", before="{GAP}({GAP}|{UPPER}|{TAG})", give_back=1, keep_text=True),
  TokenRule("{ENDING}", before="[^][^]"),
  TokenRule("{ENDING}", give_back=1, keep_text=True),
  TokenRule(rf"({_any_case(_LEADING)}|[Mm][tf][Gg])\."),
  TokenRule(rf"({_any_case(_NUMBERING)})\.", before="{GAP}?{DIGIT}"),
  TokenRule("{ACRONYM}", before="{GAP}+({STARTING}|{TAG}){GAP}", give_back=1, keep_text=True),
  TokenRule("{ACRONYM}"),
  TokenRule(
    r"({WORD_CHAR}|{DIGIT})+(\.({WORD_CHAR}|{DIGIT})+)*\.{EXTENSION}", before="({GAP}|[.?!,])"
  ),
  TokenRule(r"[A-Za-z]\.", before="{GAP}+({STARTING}|{TAG}){GAP}", give_back=1),
  TokenRule(r"[A-Za-z]\."),
  # Telephone numbers, straight quotes, smileys.
  TokenRule(
    r"""(\([0-9]{2,3}\)[\ \u00A0]?|(\+\+?)?([0-9]{2,4}[\-\ \u00A0])?[0-9]{2,4}[\-\ \u00A0])
        [0-9]{3,4}[\-\ \u00A0]?[0-9]{3,5}
        |((\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}""",
    token=_phrase,
  ),
  TokenRule(r"\"", before="[A-Za-z0-9$]", token="``"),
  TokenRule(r"\"", token="''"),
  TokenRule("'", before=r"[A-Za-z][^\ \u0009\u000A\u000D\u00A0]", token="`"),
  TokenRule("{CLITIC}", token=_quotes),
  TokenRule(r"[<>]?[:;=][\-o*']?[()DPdpO\\{@|\[\]]", before="[^A-Za-z0-9]", token=_parentheses),
  TokenRule(r"{EYE}_{EYE}|\({EYE}[_.]?{EYE}\)|\([\^x=~<>']\-[\^x=~<>'`]\)", token=_parentheses),
  # Brackets, dashes, dots, other punctuation.
  *(TokenRule("\\" + sign, token=text) for sign, text in _BRACKETS.items()),
  TokenRule(r"\-+", token=_dashes),
  TokenRule(r"\.{3,5}|(\.[\ \u00A0]){2,4}\.|[\u0085\u2026]", token="..."),
  TokenRule(r"@+|_+|\*+|(\\\*){1,3}|#+|[?!]+|<<|>>|[<>]"),
  TokenRule(
    r"''|'|[`\u0091-\u0094\u00AB\u00BB\u2018-\u201F\u2039\u203A]{1,2}|{APOSTROPHE}", token=_quotes
  ),
  # Words with digits, hyphens, slashes, "&" and "+".
  TokenRule("{THING}", token=_word),
  TokenRule("{COMPOUND}", token=_word),
  TokenRule("{COMPANY}", token=_ampersands),
  TokenRule(r"({WORD}|{THING}|{COMPOUND})\.", before=r"[,;:\u3001]", token=_word),
  TokenRule(r"{COMPANY}\.", before=r"[,;:\u3001]", token=_ampersands),
  TokenRule(r"[A-Za-z0-9]+(\-[A-Za-z]+){0,2}(\\?\/[A-Za-z0-9]+(\-[A-Za-z]+){0,2}){1,2}"),
  # Single signs, line breaks, spaces. Other characters are in no token.
  TokenRule(r"[+%&,.;:=\/~$*\\|\^\u2044]|{SYMBOL}"),
  TokenRule("{BREAK}", token=NEWLINE),
  TokenRule("{SPACE}+", token=""),
)
