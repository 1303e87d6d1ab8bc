"""Worked examples of what the roles write, two for each task. They stand in the prompt as earlier turns of the chat.

Small models learn a format from such turns. When the examples stood in the instruction, they copied them word for word.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from engine.text import ngrams, words


@dataclass(frozen=True)
class Example:
    """A document and the problem a proposer makes of it; with some, the rubric that a rubric writer makes of both."""

    kind: str
    document: str
    facts: str
    problem: str
    reference: str = ""
    answers: list[str] = field(default_factory=list)
    rubric: dict[str, Any] = field(default_factory=dict)


EXAMPLES = {
    "instructions": [
        Example(
            kind="tells a person's situation and asks for advice",
            document="""Seasoning on cast iron is not bought but made: a thin film of oil, baked above its smoke point \
until it hardens. Rust has to be scrubbed off to the bare metal first. A thick coat does not harden through and stays \
sticky. Modern soap contains no lye and does the film no harm; soaking does, because water creeps under it and lifts \
it off.""",
            facts="""1. Seasoning is a thin film of oil that is baked until it hardens.
2. A thick coat of oil stays sticky.
3. Modern soap does it no harm, but soaking does.""",
            problem="""My grandmother's cast iron skillet was orange with rust. I scrubbed it bare, rubbed in plenty \
of oil and baked it, but the surface came out sticky, and a friend says I must never use soap on it. What did I do \
wrong, is my friend right, and how do I save the skillet? Answer in about 150 words.""",
            reference="""1. Wash the skillet with soap if you like: modern soap contains no lye and does no harm. Only \
soaking does, because water creeps under the film. 2. Scrub the sticky coat off: it was too thick to harden through. \
3. Rub in oil and wipe nearly all of it off again. 4. Bake it above the smoke point of the oil, until the film is \
hard.""",
            answers=[
                "Never use soap. Put more oil on the skillet and leave it in the sun until it is dry.",
                """1. Your friend is wrong, soap is fine. 2. You used too much oil. 3. Scrub it, oil it again and bake \
it in a warm oven for an hour.""",
            ],
            rubric=json.loads("""{"facts": ["A thick coat of oil does not harden through and stays sticky.", "The oil \
is baked above its smoke point until it hardens.", "Modern soap contains no lye and does no harm."],
"differences": ["One forbids soap, the other allows it but gives no reason.", "One adds more oil, the other sees that \
there was too much.", "Neither says how hot the skillet has to be."],
"criteria": [
{"name": "Why the surface is sticky", "gold": "coat of oil too thick", "description": "Says that the oil was too thick \
to harden, and that only a thin film may be left.", "weight": 5},
{"name": "Heat of the baking", "gold": "above the smoke point", "description": "Says that the skillet is baked above \
the smoke point, not just in a warm oven.", "weight": 3},
{"name": "Whether soap is allowed", "gold": "soap does no harm", "description": "Tells that the friend is wrong about \
soap, with the reason that it contains no lye.", "weight": 3},
{"name": "Advice for this skillet", "gold": "not applicable", "description": "Tells step by step how to save the \
sticky skillet, in about 150 words.", "weight": 2}]}"""),
        ),
        Example(
            kind="asks to compare two named things in certain respects",
            document="""The Suez Canal runs at sea level through flat desert and has no locks. In Panama a ridge \
stands in the way, so ships are lifted 26 metres to Gatun Lake and let down again on the other side. Each passage \
drains about 200 million litres of fresh water from the lake into the sea, and in dry years fewer ships may pass. The \
size of the lock chambers decides how large a ship can be.""",
            facts="""1. The Suez Canal lies at sea level and needs no locks.
2. The Panama Canal lifts ships 26 metres to a lake.
3. Each passage costs that lake 200 million litres of fresh water.""",
            problem="""Compare the Suez Canal and the Panama Canal: why does one need locks and the other none, and \
what follows from that for the size of ships and for the use of fresh water? Two or three paragraphs.""",
        ),
    ],
    "health": [
        Example(
            kind="somebody who looks after an old relative",
            document="""A nosebleed stops fastest if one sits up, leans forward and pinches the soft part of the nose \
for ten minutes without letting go. With the head back the blood runs down the throat and makes one sick. Whoever \
takes anticoagulants, or bleeds for more than half an hour, needs medical care.""",
            facts="""1. One sits up, leans forward and pinches the nose for ten minutes without letting go.
2. Swallowed blood makes one sick.
3. People on anticoagulants need medical care.""",
            problem="""My father is 78 and takes warfarin. His nose has been bleeding for twenty minutes; he lies on \
the sofa with his head back, and I look every minute whether it has stopped. What are we doing wrong, what must we do \
now, and does he need a doctor?""",
            reference="""Sit him up, let him lean forward and spit the blood out. Pinch the soft part of his nose for \
ten minutes by the clock and do not look in between. With the head back he swallows the blood, which makes him sick. \
He takes warfarin, so he needs medical care now, even if it stops.""",
            answers=[
                "Let him lie down with his head back and put ice on his neck. A nosebleed stops by itself.",
                """Sit him up and let him lean forward. Pinch his nose for five minutes and look now and then whether \
it has stopped. Warfarin makes bleeding last longer, so call his doctor tomorrow.""",
            ],
            rubric=json.loads("""{"facts": ["He must sit up and lean forward so that he does not swallow the blood.", \
"The soft part of the nose is pinched for ten minutes without letting go.", "Because of warfarin he needs medical care \
now."],
"differences": ["One lets him lie with his head back, the other sits him up and forward.", "One has the nose pinched, \
but too short and with looks in between.", "Both let him wait although he takes warfarin."],
"criteria": [
{"name": "Sitting up and leaning forward", "gold": "leaning forward", "description": "Has the father sit up and lean \
forward, not lie down or lay his head back.", "weight": 3},
{"name": "Pinching without letting go", "gold": "ten minutes", "description": "Says to pinch the soft part of the nose \
for ten minutes without looking in between.", "weight": 4},
{"name": "Warfarin needs a doctor now", "gold": "medical care now", "description": "Says that because of the warfarin \
he needs medical care at once, not tomorrow.", "weight": 5}]}"""),
        ),
        Example(
            kind="a nurse about a patient",
            document="""Deep vein thrombosis is most frequent in the weeks after an operation on hip or knee. Often \
the only signs are pain, swelling and warmth of one calf; fever is rare. Examination cannot exclude it: an ultrasound \
scan decides, the same day, because a clot may break off and reach the lungs.""",
            facts="""1. Deep vein thrombosis is frequent after hip operations.
2. Pain, swelling and warmth of one calf are its signs.
3. An ultrasound scan decides, the same day.""",
            problem="""I am a nurse on a surgical ward. A woman of 45, five days after a hip operation, complains of \
pain in her left calf, which is swollen; she has no fever and wants to get up and walk. What could it be, whom do I \
call and how fast, and what can make it dangerous?""",
        ),
    ],
    "writing": [
        Example(
            kind="a scene with dialogue",
            document="""Ingrid Moe had kept the lighthouse at Skarvoy for thirty years, and on one night of them, the \
night her brother Anders drowned, the lamp was out. Nobody had ever asked. On the day before the light went over to a \
computer, the engineer, a boy called Tveit, brought her the logbook, from which a page was missing.""",
            facts="""1. Ingrid Moe has kept the lighthouse at Skarvoy for thirty years; Tveit is a young engineer.
2. The lamp was out on the night her brother Anders drowned.
3. The day before the lighthouse is automated, a page is missing from the logbook.""",
            problem="""Write a scene with dialogue. Ingrid Moe has kept the lighthouse at Skarvoy for thirty years and \
has told nobody that its lamp was out on the night her brother Anders drowned. The day before the lighthouse is \
automated, the young engineer Tveit brings her the logbook, from which one page is missing. What they both know must \
come near and be spoken only in the last line. About 300 words.""",
            reference='''The lamp room smelled of paraffin, though there had been none in it for years. "They want it \
for the museum," said Tveit and laid the logbook on the sill. "There's a page gone. November." Ingrid went on \
polishing the lens. "Mice," she said. "Mice don't tear straight." Below them the sea did what it always did. "Your \
brother was out that night." "Anders," she said. "He had a name." Tveit closed the book. She put down the cloth. "I \
was asleep," she said. "It was dark because I was asleep."''',
            answers=[
                """Ingrid was sad because the light was off when Anders died. She told Tveit everything at once and he \
was very shocked. Then they hugged and the lighthouse was automated.""",
                """"You kept it thirty years," Tveit said and opened the logbook. Ingrid looked at the stub of the \
page. "It was a bad winter," she said. He waited. She told him about the lamp, then about the storm, and how she had \
loved her brother.""",
            ],
            rubric=json.loads("""{"facts": ["The lamp was out on the night Anders drowned.", "A page is missing from \
the logbook.", "Ingrid has told nobody for thirty years."],
"differences": ["One tells it as a summary, the other as a scene with dialogue.", "In both the truth comes out early \
instead of in the last line.", "One names the feelings, the other shows them in what is done."],
"criteria": [
{"name": "The truth in the last line", "gold": "not applicable", "description": "That the lamp was out is spoken only \
in the last line, after it came near before.", "weight": 5},
{"name": "The missing page", "gold": "page missing from the logbook", "description": "Tveit brings the logbook, and \
the missing page drives the talk.", "weight": 3},
{"name": "Dialogue between Ingrid and Tveit", "gold": "not applicable", "description": "What Ingrid hides shows in how \
she speaks and what she does; no feelings are named.", "weight": 4}]}"""),
        ),
        Example(
            kind="a poem",
            document="""In Varna there was one bell-founder left, Tomas, and he had one apprentice, Iliya, who was \
good and knew it. The letter from the car factory came in May. By then they had poured the last bell, and it would \
need nine days to cool; Iliya's train left on the fourth.""",
            facts="""1. Tomas is the last bell-founder of Varna; Iliya is his only apprentice.
2. Iliya leaves by train to work in a car factory.
3. Their last bell needs five more days to cool.""",
            problem="""Write a poem in the voice of Tomas, the last bell-founder of Varna, on the morning when his \
only apprentice Iliya takes the train to work in a car factory while their last bell is still cooling. He says nothing \
of farewell, but it must be felt in what he sees. Five unrhymed stanzas.""",
        ),
    ],
}

# Few-shot examples for the gate: problems, each with the right reply to both of its questions.
GATE_SHOTS = [
    ("Why did he leave the city, and what did he take with him?", "No"),
    (
        "Why did Napoleon leave Moscow in October 1812, and what became of his army on the way back? Two paragraphs.",
        "Yes",
    ),
    ("Summarise the three arguments that are made against the bridge.", "No"),
    ("I am 30 and have had a dry cough since I began to take ramipril six weeks ago. What should I do?", "Yes"),
    ("What should the patient be told about the test?", "No"),
    ("Write a poem about an old tram driver in Lisbon on his last night shift. Twelve lines.", "Yes"),
    ("Write a story with the characters and events that were described.", "No"),
    ("List three reasons why concrete cracks as it dries, each with a remedy.", "Yes"),
]
# Some models lean to Yes, others to No: the limit is half-way between the means for these bad and good problems.
GATE_BAD = ("What was found there, and why was she fined for it?", "Explain the second step and the reason for it.")
GATE_GOOD = (
    "Explain to a child why ice floats on water. Five sentences.",
    "How did the Black Death reach Europe in 1347?",
)


COPIED = 8  # words in a row


def example_fault(problem: str, document: str, task: str) -> str | None:
    """The fault of a problem with a name (a capital within a sentence) or a run of COPIED words from the examples that
    its document lacks. In the wording of one problem a 0.5B wrote 55 of 128, a 1.5B 6 of 35."""
    shown = " ".join(f"{x.document} {x.problem}" for x in EXAMPLES[task])
    names = set(re.findall(r"(?<=[a-z,] )[A-Z]\w{3,}", shown)) & set(re.findall(r"\w+", problem))
    runs = {run for x in EXAMPLES[task] for run in ngrams(x.problem, COPIED)} & set(ngrams(problem, COPIED))
    own = {name.lower() for name in names} <= set(words(document)) and runs <= set(ngrams(document, COPIED))
    return None if own else "copies an example"
