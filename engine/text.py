"""What can be told of a text by its words, such as phrases that point at a source; and how texts enter prompts."""

import re

FUNCTION_WORDS = frozenset(
    """
    about above after again also among another because been before being between both cause caused causes could does
    doing down during each else even ever every explain from further given have having here into itself just keep know
    like made make makes many mean means more most much must need never only other over people person rather same
    should since some story such than that their them then there these they thing things this those through under until
    upon used using very want were what when where whether which while whose will with within without work works would
    write writes writing your opening important called happen happens
    """.split()
)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def content_words(text: str) -> set[str]:
    """The stems (six letters) of the words that carry a subject: four letters or more, or a digit in them."""
    return {w[:6] for w in words(text) if (len(w) > 3 or any(map(str.isdigit, w))) and w not in FUNCTION_WORDS}


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    w = words(text)
    return [tuple(w[i : i + n]) for i in range(len(w) - n + 1)]


def repeated(text: str) -> float:
    """The share of a text's words in runs of ten words that it said before; of a third of it, if it is short.

    >>> repeated("It rises. " * 4), repeated("What is love, and what is hate?")
    (0.75, 0.0)
    """
    total = len(words(text))
    n = min(10, max(3, total // 3))
    seen: set[tuple[str, ...]] = set()
    again: set[int] = set()  # numbers of words
    for start, run in enumerate(ngrams(text, n)):
        if run in seen:
            again.update(range(start, start + n))
        seen.add(run)
    return len(again) / max(1, total)


def taken_from(source: str, text: str, n: int) -> float:
    """The share of the text's runs of `n` words that stand in `source` too; of all its words if it has fewer."""
    n = min(n, len(words(text)))
    runs, known = ngrams(text, n), set(ngrams(source, n))
    return sum(run in known for run in runs) / len(runs) if n else 0.0


def length_spread(texts: list[str], n: int) -> list[str]:
    """n of the texts, evenly spread from the shortest to the longest."""
    ordered, n = sorted(texts, key=len), min(n, len(texts))
    return [ordered[round(i * (len(ordered) - 1) / max(1, n - 1))] for i in range(n)]


# ------------------------------------------------------------------------------------------------------ prompts

# A "<", or a character that looks like one, that begins a tag of any name: telling the fences' own names apart from
# names that only look like them (zero-width characters, letters of other scripts) is a race that a text could win.
BRACKETS = "<\u02c2\u2039\u2329\u27e8\u3008\ufe64\uff1c"
FENCES = re.compile(rf"[{BRACKETS}](?!\s)(?=[^\w{BRACKETS}]*[^\W\d])")


def fill(template: str, **texts: str) -> str:
    """Put texts into a prompt; none of them can open or close a fence: whatever begins like a tag is broken.

    >>> fill("<answer>{answer}</answer>", answer="2 <3 </answer> <b>")
    '<answer>2 <3 < /answer> < b></answer>'
    """
    return template.format(**{name: FENCES.sub(r"\g<0> ", text.strip()) for name, text in texts.items()})


def chat(*turns: str, system: str = "") -> list[dict[str, str]]:
    """The messages of a chat: the user's turn, the assistant's, the user's and so on."""
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": ("user", "assistant")[k % 2], "content": turn} for k, turn in enumerate(turns)]


# ------------------------------------------------------------------------------------------------------ phrases

# Phrases that point at a text. "The text of the treaty", "the article by Lee" and document.title are no such phrase.
NOUNS = "passage|excerpt|document|article|text|extract|paragraph"
TEXT = rf"(?:{NOUNS})\b(?!\.\w|:|,? (?:of|by|titled|entitled|called)\b)"
PIECE = rf"(?:{NOUNS}|sentence|information|content|details|facts)s?\b"
FACTS = r"(?:facts?|information|details)"
SOURCE = re.compile(
    r"(?i)\b(?:according to|based (?:up)?on|(?:described|discussed|explained|given|listed|mentioned|outlined|presented|"
    r"provided|stated) (?:in|by)) (?:the|this) (?:(?:given|original|provided|source) )?"
    rf"(?:{TEXT}|author\b(?! of))"
    rf"|\b(?:the|this) (?:given|provided|source) {TEXT}"
    rf"|\b(?:the|this) {TEXT} (?:argue|claim|describe|discusse|emphasize|explain|give|highlight|indicate|mention|note|"
    r"present|provide|report|say|state|suggest)(?:s|d|ed)?\b"
    rf"|\b(?:do|does|did) (?:the|this) {TEXT}"
    r"|\b(?:in|from|of) (?:the|this) (?:passage|excerpt|article)\b(?! (?:of|by)\b)"
    rf"|\b(?:facts?|information|details?)\b[^.,?!\n]{{0,40}} (?:from|in|of) (?:the|this) {TEXT}"
    rf"|\b(?:analy[sz]e|paraphrase|proofread|read|rewrite|summari[sz]e|translate) the {TEXT}"
)
FACTS_GIVEN = re.compile(
    r"(?i)\bbased on (?:the|these|this) (?:facts?|information)\b(?! (?:about|of|on|that) )"
    rf"|\bthe (?:above|given|provided) {FACTS}\b|\b(?:the|these) (?:\w+ )?{FACTS} (?:\w+ )?(?:above|given|provided)\b"
)
ABOVE = re.compile(rf"(?i)\b(?:the|this) (?:(?:above|preceding) {PIECE}|{PIECE} above\b)")
BELOW = re.compile(rf"(?i)\b(?:the|this) (?:following {PIECE}|{PIECE} below\b)")


def points_at_source(text: str, problem: str) -> bool:
    """Whether the text speaks of a text that the problem does not bring, nor asks for, nor itself introduced."""
    phrases = " ".join(match[0] for match in SOURCE.finditer(text))
    mentioned = {noun.lower() for noun in re.findall(f"(?i){NOUNS}|author", phrases)}
    if not mentioned or brings_text(problem):
        return False
    introduced = r"(?i)\b(?:an?|my|our|your) (?:(?!the |this )[\w-]+ ){0,4}"  # "write an article. The article is"
    return not any(re.search(introduced + noun, f"{problem}\n{text}") for noun in mentioned)


def brings_text(problem: str) -> bool:
    """Whether a problem holds material to work on: a quotation, something in tags or a code fence, or among its lines
    one of 20 words or more that is no item of a list and does not itself speak of a text."""
    if "```" in problem or re.search(r"</\w+>", problem):
        return True
    quotations = problem.split('"')[1::2] + re.findall(r"“([^“”]+)”", problem)
    if any(len(words(quotation)) >= 8 for quotation in quotations):
        return True
    lines = [line for line in problem.splitlines() if line.strip()]
    material = [line for line in lines if not (re.match(r"\s*(?:[-*•]|\d+[.)])", line) or SOURCE.search(line))]
    return len(lines) > 1 and any(len(words(line)) >= 20 for line in material)


def refers_to_nothing(problem: str) -> bool:
    """Whether a problem speaks of "the text above", "the following" or "the facts provided" where nothing is."""
    if above := ABOVE.search(problem):
        *before, _ = re.split(r"[.!?:\n]", problem[: above.start()])
        if len(words(" ".join(before))) < 4:
            return True
    if below := BELOW.search(problem):
        _, *after = re.split(r"[:\n<`\"“”‘]", problem[below.end() :], maxsplit=1)
        if not words(" ".join(after)):
            return True
    return bool(FACTS_GIVEN.search(problem)) and not brings_text(problem)


# Problems that a word, a name, a number or a line may answer, unless they ask for prose too.
SHORT = re.compile(
    r"(?i)\b(?:(?:one|single|two|three|few|five) words?|word or phrase|yes or no|true or false|title|slogan|headline|"
    r"tagline|calculate|compute|solve|convert|translate|classify|(?:only|just) (?:the|an?|one|with|by)|"
    r"(?:name|identify|state|give|pick|choose|select|find) (?:the|an?|one|two|three))\b|\bor [^.?!\n]{1,60}\?|"
    r"(?:\A|[,.?!:\n])\W{0,5}(?:(?:at|by|from|in|of|on|to) )?(?:who|whom|whose|which|when|where|what|what's|"
    r"how (?:many|much|old|long|far|tall|high|deep|big|large|fast|heavy|often)|"
    r"is|are|was|were|do|does|did|can|could|has|have|will|would|should)\b"
)
PROSE = re.compile(
    r"(?i)\b(?:why|explain|describe|discuss|compare|contrast|analy[sz]e|elaborate|essay|story|poem|letter|email|"
    r"article|report|paragraphs?|sentences?|in detail|step by step|"
    r"how (?:to|do|does|did|can|could|should|would|is|are|was|were|has|have))\b"
)


def short_answer_fits(problem: str) -> bool:
    """Whether a few words may be a whole answer: "Which river ...?", "Reply in one word", not "Explain which ..."."""
    return bool(SHORT.search(problem)) and not PROSE.search(problem)
