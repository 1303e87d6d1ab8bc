"""What can be told of a text by its words: repetition, overlap, phrases that point at a source."""

import re


def final_answer(text: str) -> str:
    """The text without the thoughts of a reasoning model, which are trained on but never judged.

    A chat template may open them in the prompt: then the text holds the closing tag alone, at the end of a line.
    "" where they were never closed.

    >>> final_answer("<think>2 + 2? Easy.</think>\\n\\nFour."), final_answer("Easy.\\n</think>\\nFour.")
    ('Four.', 'Four.')
    >>> final_answer("<think>Two plus two"), final_answer("The tag <think> opens, </think> closes.")
    ('', 'The tag <think> opens, </think> closes.')
    """
    opened = text.lstrip().startswith("<think>")
    first = re.search(r"</?think>[^\S\n]*(\n|\Z)?", text)
    if not opened and not (first and first[0].startswith("</") and first[1] is not None):
        return text
    _, closed, answer = text.rpartition("</think>")
    return answer.strip() if closed else ""


FUNCTION_WORDS = frozenset(
    """
    about above after again also among another because been before being between both cause caused causes
    could does doing down during each else even ever every explain from further given have having here into
    itself just keep know like made make makes many mean means more most much must need never only other over
    people person rather same should since some story such than that their them then there these they thing
    things this those through under until upon used using very want were what when where whether which while
    whose will with within without work works would write writes writing your opening important called happen
    happens
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
    again = covered = 0  # covered: where the last repeated run ends
    for start, run in enumerate(ngrams(text, n)):
        if run in seen:
            again += start + n - max(start, covered)
            covered = start + n
        seen.add(run)
    return again / max(1, total)


def taken_from(source: str, text: str, n: int) -> float:
    """The share of the text's runs of `n` words that stand in `source` too; of all its words if it has fewer."""
    n = min(n, len(words(text)))
    runs, known = ngrams(text, n), set(ngrams(source, n))
    return sum(run in known for run in runs) / len(runs) if n else 0.0


# Phrases that point at a text. "The text of the treaty", "the article by Lee" and document.title are no such phrase.
TEXT = r"(?:passage|excerpt|document|article|text|extract|paragraph)\b(?!\.\w|:|,? (?:of|by|titled|entitled|called)\b)"

PIECE = r"(?:passage|excerpt|document|article|text|extract|paragraph|sentence|information|content|details|facts)s?\b"

ABOVE = re.compile(rf"\b(?:the|this) (?:(?:above|preceding) {PIECE}|{PIECE} above\b)", re.IGNORECASE)

BELOW = re.compile(rf"\b(?:the|this) (?:following {PIECE}|{PIECE} below\b)", re.IGNORECASE)

SOURCE = re.compile(
    r"\b(?:according to|based (?:up)?on|(?:described|discussed|explained|given|listed|mentioned|outlined|presented|"
    r"provided|stated) (?:in|by)) (?:the|this) (?:(?:given|original|provided|source) )?"
    rf"(?:{TEXT}|author\b(?! of))"
    rf"|\b(?:the|this) (?:given|provided|source) {TEXT}"
    rf"|\b(?:the|this) {TEXT} (?:argue|claim|describe|discusse|emphasize|explain|give|highlight|indicate|mention|note|"
    r"present|provide|report|say|state|suggest)(?:s|d|ed)?\b"
    rf"|\b(?:do|does|did) (?:the|this) {TEXT}"
    r"|\b(?:in|from|of) (?:the|this) (?:passage|excerpt|article)\b(?! (?:of|by)\b)"
    rf"|\b(?:facts?|information|details?)\b[^.,?!\n]{{0,40}} (?:from|in|of) (?:the|this) {TEXT}"
    rf"|\b(?:analy[sz]e|paraphrase|proofread|read|rewrite|summari[sz]e|translate) the {TEXT}",
    re.IGNORECASE,
)

NOUN = re.compile(r"passage|excerpt|document|article|text|extract|paragraph|author", re.IGNORECASE)


def points_at_source(text: str, problem: str) -> bool:
    """Whether the text speaks of a text that the problem does not bring, nor asks for, nor itself introduced."""
    mentioned = {noun.lower() for match in SOURCE.finditer(text) for noun in NOUN.findall(match[0])}
    if not mentioned or brings_text(problem):
        return False
    introduced = (
        r"\b(?:an?|my|our|your) (?:(?!the |this )[\w-]+ ){0,4}"  # "write an article ... the article should ..."
    )
    return not any(re.search(introduced + noun, f"{problem}\n{text}", re.IGNORECASE) for noun in mentioned)


def brings_text(problem: str) -> bool:
    """Whether a problem holds material to work on: a quotation, something in tags or a code fence, or among its lines
    one of 20 words or more that is no item of a list and does not itself speak of a text.
    """
    if "```" in problem or re.search(r"</\w+>", problem):
        return True
    quotations = problem.split('"')[1::2] + re.findall(r"“([^“”]+)”", problem)
    if any(len(words(quotation)) >= 8 for quotation in quotations):
        return True
    lines = [line for line in problem.splitlines() if line.strip()]
    material = [line for line in lines if not (re.match(r"\s*(?:[-*•]|\d+[.)])", line) or SOURCE.search(line))]
    return len(lines) > 1 and any(len(words(line)) >= 20 for line in material)


def refers_to_nothing(problem: str) -> bool:
    """Whether a problem speaks of "the text above" where nothing stands above it, or "the following" of nothing."""
    if above := ABOVE.search(problem):
        *before, _ = re.split(r"[.!?:\n]", problem[: above.start()])
        if len(words(" ".join(before))) < 4:
            return True
    if below := BELOW.search(problem):
        after = re.search(r"[:\n<`\"“”‘]", problem[below.end() :])
        return not (after and words(problem[below.end() + after.end() :]))
    return False


FACTS_GIVEN = re.compile(
    r"\bbased on (?:the|these|this) (?:facts?|information)\b(?! (?:about|of|on|that) )"
    r"|\bthe (?:above|given|provided) (?:facts?|information|details)\b"
    r"|\b(?:the|these) (?:\w+ )?(?:facts?|information|details) (?:\w+ )?(?:above|given|provided)\b",
    re.IGNORECASE,
)


def given_facts(problem: str) -> bool:
    """Whether a problem speaks of "the facts provided" and provides none."""
    return bool(FACTS_GIVEN.search(problem)) and not brings_text(problem)


# Problems that a word, a name, a number or a line may answer, unless they ask for prose too.
SHORT = re.compile(
    r"\b(?:(?:one|single|two|three|few|five) words?|word or phrase|yes or no|true or false|title|slogan|headline|"
    r"tagline|calculate|compute|solve|convert|translate|classify|(?:only|just) (?:the|an?|one|with|by)|"
    r"(?:name|identify|state|give|pick|choose|select|find) (?:the|an?|one|two|three))\b|\bor [^.?!\n]{1,60}\?|"
    r"(?:\A|[,.?!:\n])\W{0,5}(?:(?:at|by|from|in|of|on|to) )?(?:who|whom|whose|which|when|where|what|what's|"
    r"how (?:many|much|old|long|far|tall|high|deep|big|large|fast|heavy|often)|"
    r"is|are|was|were|do|does|did|can|could|has|have|will|would|should)\b",
    re.IGNORECASE,
)

PROSE = re.compile(
    r"\b(?:why|explain|describe|discuss|compare|contrast|analy[sz]e|elaborate|essay|story|poem|letter|email|article|"
    r"report|paragraphs?|sentences?|in detail|step by step|how (?:to|do|does|did|can|could|should|would|is|are|was|"
    r"were|has|have))\b",
    re.IGNORECASE,
)


def short_answer_fits(problem: str) -> bool:
    """Whether a few words may be a whole answer: "Which river ...?", "Reply in one word", not "Explain which ...".

    >>> short_answer_fits("What is the capital of France?"), short_answer_fits("Why does bread rise?")
    (True, False)
    """
    return bool(SHORT.search(problem)) and not PROSE.search(problem)


def in_english(text: str) -> bool:
    """Whether most letters are Latin: the words of some other scripts cannot be told apart, let alone counted."""
    letters = [c for c in text if c.isalpha()]
    return 2 * sum(c.isascii() for c in letters) >= len(letters)
