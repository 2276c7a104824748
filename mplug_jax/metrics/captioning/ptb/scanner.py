"""Longest-match scanner: regular expressions -> NFA -> DFA that is built while it reads.

Python's `re` takes the first alternative that matches; a lexer's rules need the longest match over
all rules, the earlier rule on a tie. Building DFA states on demand makes the import cheap: captions
visit a few hundred of many thousands of states.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_TOP = 0xFFFF  # text is in UTF-16 code units, as Java's char


class Rule(NamedTuple):
  """One alternative of a scanner; `_Parser` documents the syntax.

  Attributes:
    pattern: pattern of the text.
    before: pattern that must follow.
  """

  pattern: str
  before: str | None = None


class _Parser:
  r"""Recursive descent over one pattern, adding to an NFA.

  Syntax: a|b, (), ?, *, +, {m}, {m,n}, [class], [^class], \x (x itself), \uXXXX, {name} for a named
  pattern, and "quoted" text in either case of each letter A-Z. White space is ignored outside
  classes and quotes. In a class, {name} means the code units of a named pattern that is itself a
  class.
  """

  def __init__(self, nfa, names, pattern):
    self._nfa = nfa
    self._names = names
    self._text = pattern
    self._at = 0

  def parse(self, start):
    """Adds the pattern from state `start`. Returns its end state."""
    end = self._choice(start)
    if self._at < len(self._text):
      raise ValueError(f"pattern {self._text!r}: unexpected {self._text[self._at]!r} at {self._at}")
    return end

  def _peek(self):
    while self._at < len(self._text) and self._text[self._at].isspace():
      self._at += 1
    return self._text[self._at : self._at + 1]

  def _choice(self, start):
    ends = [self._sequence(start)]
    while self._peek() == "|":
      self._at += 1
      ends.append(self._sequence(start))
    if len(ends) == 1:
      return ends[0]
    end = self._nfa.state()
    for state in ends:
      self._nfa.empty[state].append(end)
    return end

  def _sequence(self, start):
    while self._peek() not in ("", "|", ")"):
      start = self._repeated(start)
    return start

  def _repeated(self, start):
    # Each copy of an atom is parsed again from its text; it starts in a new state, so that loops
    # stay inside it.
    begin = self._at
    first = self._nfa.state()
    self._nfa.empty[start].append(first)
    end = self._atom(first)
    low, high = self._counts()
    after = self._at
    if low == 0:
      self._nfa.empty[start].append(end)
    for i in range(1, low if high is None else high):
      self._at = begin
      copy = self._nfa.state()
      self._nfa.empty[end].append(copy)
      copy_end = self._atom(copy)
      if i >= low:
        self._nfa.empty[copy].append(copy_end)
      first = copy
      end = copy_end
    if high is None:
      self._nfa.empty[end].append(first)
    self._at = after
    out = self._nfa.state()
    self._nfa.empty[end].append(out)
    return out

  def _counts(self):
    """Parses the (least, most) repetitions after an atom; most None = any number."""
    char = self._peek()
    if char and char in "?*+":
      self._at += 1
      return {"?": (0, 1), "*": (0, None), "+": (1, None)}[char]
    if char == "{" and self._text[self._at + 1].isdigit():
      body, self._at = self._until("}")
      low, _, high = body.partition(",")
      return int(low), int(high or low)
    return 1, 1

  def _until(self, mark):
    end = self._text.index(mark, self._at + 1)
    return self._text[self._at + 1 : end], end + 1

  def _atom(self, start):
    char = self._peek()
    if char == "(":
      self._at += 1
      end = self._choice(start)
      if self._peek() != ")":
        raise ValueError(f"pattern {self._text!r}: missing ) at {self._at}")
      self._at += 1
      return end
    if char == "{":
      name, self._at = self._until("}")
      return _Parser(self._nfa, self._names, self._names[name]).parse(start)
    if char == '"':
      word, self._at = self._until('"')
      for letter in word:
        start = self._nfa.edge(
          start, _merged([(ord(c), ord(c)) for c in (letter.lower(), letter.upper())])
        )
      return start
    return self._nfa.edge(start, self._class() if char == "[" else _merged([self._char()]))

  def _char(self):
    """Parses one code unit to the range (c, c)."""
    char = self._text[self._at]
    self._at += 1
    if char == "\\":
      char = self._text[self._at]
      self._at += 1
      if char == "u":
        char = chr(int(self._text[self._at : self._at + 4], 16))
        self._at += 4
    return ord(char), ord(char)

  def _class(self):
    """Parses [...] to ranges."""
    self._at += 1
    negated = self._text[self._at] == "^"
    if negated:
      self._at += 1
    ranges = []
    while self._text[self._at] != "]":
      if self._text[self._at] == "{" and self._text[self._at + 1].isalpha():
        name, self._at = self._until("}")
        ranges += _Parser(self._nfa, self._names, self._names[name])._class()
        continue
      low, high = self._char()
      if self._text[self._at] == "-" and self._text[self._at + 1] != "]":
        self._at += 1
        high = self._char()[0]
      ranges.append((low, high))
    self._at += 1
    return _merged(ranges, negated)


def _merged(ranges, negated=False):
  """Merges ranges (first, last) to ascending ranges with gaps; `negated`: of all other units."""
  merged = []
  for low, high in sorted(ranges):
    if merged and low <= merged[-1][1] + 1:
      merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
    else:
      merged.append((low, high))
  if not negated:
    return tuple(merged)
  bounds = [-1, *(x for pair in merged for x in pair), _TOP + 1]
  return tuple(
    (a + 1, b - 1) for a, b in zip(bounds[::2], bounds[1::2], strict=True) if a + 1 <= b - 1
  )


class _Nfa:
  """Nondeterministic automaton.

  Attributes:
    empty: state -> [state].
    edges: state -> [(class number, state)].
    accepts: state -> rule number.
    classes: ranges -> class number.
  """

  def __init__(self):
    self.empty = []
    self.edges = []
    self.accepts = {}
    self.classes = {}

  def state(self):
    self.empty.append([])
    self.edges.append([])
    return len(self.empty) - 1

  def edge(self, start, ranges):
    end = self.state()
    self.edges[start].append((self.classes.setdefault(ranges, len(self.classes)), end))
    return end

  def closure(self, states):
    seen = set(states)
    todo = list(states)
    while todo:
      for state in self.empty[todo.pop()]:
        if state not in seen:
          seen.add(state)
          todo.append(state)
    return seen


class _State(dict):
  """A DFA state: code unit (as str) -> state or None; entries are made on first use."""

  __slots__ = ("rule", "_dfa", "_edges", "_by_kind")

  def __init__(self, dfa, rule, edges):
    super().__init__()
    self.rule = rule
    self._dfa = dfa
    self._edges = edges
    self._by_kind = {}

  def __missing__(self, char):
    kind = self._dfa.kinds[char]
    if kind not in self._by_kind:
      self._by_kind[kind] = self._dfa.state({end for number, end in self._edges if number in kind})
    self[char] = self._by_kind[kind]
    return self[char]


class _Kinds(dict):
  """Code unit (as str) -> frozenset of the numbers of its classes; equal sets are one object."""

  def __init__(self, classes):
    super().__init__()
    self._bounds = [
      ([x for low, high in ranges for x in (low, high + 1)], number)
      for ranges, number in classes.items()
    ]
    self._sets = {}

  def __missing__(self, char):
    code = ord(char)
    kind = frozenset(number for bounds, number in self._bounds if bisect_right(bounds, code) % 2)
    self[char] = self._sets.setdefault(kind, kind)
    return self[char]


class Dfa:
  """The union of patterns as one automaton.

  Attributes:
    start: first state. A state maps a code unit to the next state or None; `state.rule` is the
      number of the first pattern that accepts there, None if none does.
    kinds: code unit -> equivalence class, for tests that visit every transition.
  """

  def __init__(self, patterns: Sequence[str], names: Mapping[str, str]):
    """Parses the patterns.

    Args:
      patterns: in the syntax of `_Parser`.
      names: named patterns.
    """
    self._nfa = _Nfa()
    self._states = {}
    begin = self._nfa.state()
    for number, pattern in enumerate(patterns):
      first = self._nfa.state()
      self._nfa.empty[begin].append(first)
      self._nfa.accepts[_Parser(self._nfa, names, pattern).parse(first)] = number
    self.kinds = _Kinds(self._nfa.classes)
    start = self.state({begin})
    assert start is not None
    self.start = start

  def state(self, nfa_states: set[int]) -> _State | None:
    """Returns the state of a set of NFA states, None for the empty set.

    Args:
      nfa_states: NFA states.
    """
    if not nfa_states:
      return None
    key = frozenset(self._nfa.closure(nfa_states))
    if key not in self._states:
      rule = min((self._nfa.accepts[s] for s in key if s in self._nfa.accepts), default=None)
      self._states[key] = _State(self, rule, [edge for s in key for edge in self._nfa.edges[s]])
    return self._states[key]

  def ends(self, text: str, begin: int, limit: int) -> list[int]:
    """Returns all ends e <= limit such that text[begin:e] is accepted, ascending.

    Args:
      text: the text.
      begin: first code unit.
      limit: largest end.
    """
    state: _State | None = self.start
    accepted = []
    for at in range(begin, limit + 1):
      assert state is not None
      if state.rule is not None:
        accepted.append(at)
      state = state[text[at]] if at < limit else None
      if state is None:
        break
    return accepted


class Scanner:
  """Finds the rule with the longest match, including its `before`; on a tie the earliest rule.

  Attributes:
    dfa: automaton of all rules.
  """

  def __init__(self, rules: Sequence[Rule], names: Mapping[str, str]):
    """Parses the rules.

    Args:
      rules: in order of precedence.
      names: named patterns.
    """
    self.dfa = Dfa(
      [r.pattern if r.before is None else f"({r.pattern})({r.before})" for r in rules], names
    )
    self._parts = {
      i: (Dfa([r.pattern], names), Dfa([r.before], names))
      for i, r in enumerate(rules)
      if r.before is not None
    }

  def match(self, text: str, begin: int) -> tuple[int, int, int]:
    """Finds the rule that matches at a position.

    Args:
      text: the text.
      begin: position inside the text.

    Returns:
      (rule number, end of the match without `before`, end of the part that was read); (-1, begin,
      ...) if no rule matches. Reaching the end of the text counts as reading one more unit.
    """
    state = self.dfa.start
    rule = -1
    end = begin
    seen = len(text) + 1
    for at in range(begin, len(text)):
      state = state[text[at]]
      if state is None:
        seen = at + 1
        break
      if state.rule is not None:
        rule = state.rule
        end = at + 1
    if rule in self._parts:
      pattern, before = self._parts[rule]
      # The longest text of the pattern such that the rest matches `before`.
      end = next(
        e for e in reversed(pattern.ends(text, begin, end)) if end in before.ends(text, e, end)
      )
    return rule, end, seen
