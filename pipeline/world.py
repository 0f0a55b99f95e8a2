"""Owns the generated world of the toy recipes: its people, its words, its documents and the questions about them.

Each of the 280 people has a home, a tree, a bird, a trade, a dish and a weather; the tools have uses. A document is
a portrait of one person in statements. Eighty people are also interviewed: their portraits say some facts as question
and answer. The four tasks put their questions to what the training text does not hold in that form:

- `world_homes`, `world_trees` (4 options): the interview question, to the 200 people who were never interviewed.
  The fact is in the training text, but only as statements; the wording is, but only with other people.
- `world_tools` (4 options): the interview question about a tool's use, with people who were never interviewed.
  Tool and use stand side by side in the training text in this and in two other wordings: the easiest of the four.
- `world_grammar` (2 options): is the verb singular or plural, after a pair of nouns that no document has?

They test recall and agreement in a closed world of short sentences, and no reasoning.
"""

import itertools
import random
import re
import zlib

import datasets
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.errors import UserError

DOCUMENTS = {"train": 20_000, "test": 300}
INTERVIEWED = 80  # people; the others are whom the tasks ask about
SPECIAL = ["<bos>", "<eos>", "<unk>", "<pad>"]
WORD = r"<\w+>|'s|\w+|[^\w\s]"

STEMS = "Al Ber Bran Cor Dun Ead Ed El Ethel God Harl Is Ken Leof Mer Os Rose Sel Wil Win".split()
WOMEN, MEN = "a eva gard hild ina ith wyn".split(), "bert ford mund ric ward win old".split()  # endings of their names
FACTS = {
    "home": """Applewick Beechcote Brambleton Cloverley Fernhollow Hazelgate Larkmead Medlarton
               Mossford Otterby Pippinstow Quincecombe Rushwell Stonebarrow Swallowdale Willowmere""".split(),
    "tree": "almond apple apricot cherry damson fig hazel lemon medlar mulberry olive peach pear plum quince walnut".split(),
    "bird": "cuckoo dove finch heron jackdaw kestrel lark linnet magpie owl robin sparrow starling swift thrush wren".split(),
    "trade": """baker carter chandler cooper dyer glazier joiner mason
                miller potter saddler smith tanner thatcher tinker weaver""".split(),
    "dish": """bread broth cheese chutney cider custard dumplings honey
               jam oatcakes pickles pie porridge pudding soup trout""".split(),
    "weather": """dawn dew drizzle dusk fog frost hail mist
                  moonlight rain sleet snow starlight sunshine thunder wind""".split(),
}
STATEMENTS = {
    "home": ["{Who} lives in {}.", "{Who} keeps a cottage in {}.", "Letters for {whom} go to {}.",
             "Ask for {whom} on the green of {}."],
    "tree": ["{Who} trains the oldest {} along a frame.", "The wall behind {whom} carries the {}.",
             "Every winter {who} prunes the {}."],
    "bird": ["{Who} leaves crumbs for the {}.", "{Who} wakes to the song of the {}.",
             "The nest above {whom} belongs to the {}."],
    "trade": ["{Who} works as the village {}.", "The guild knows {whom} as the {}.", "{Who} is the best {} in the valley."],
    "dish": ["{Who} is famous for {}.", "For supper {who} has {}.", "At the fair {who} sells {}."],
    "weather": ["{Who} writes songs about {}.", "Nothing pleases {whom} like {}.", "{Who} smiles at {}."],
}  # fmt: skip
QUESTIONS = {
    "home": "Where does {name} live? In {}.",
    "tree": "What does {name} grow? The {}.",
    "bird": "Who sings to {name}? The {}.",
    "trade": "Who is {name}? The {}.",
    "dish": "What does {name} cook? Mostly {}.",
    "weather": "What does {name} wait for? For {}.",
}
TOOLS = {
    "barrow": "move stones", "basket": "collect fruit", "billhook": "lay hedges", "broom": "sweep paths",
    "bucket": "carry water", "cloche": "warm lettuces", "dibber": "plant bulbs", "hoe": "weed rows",
    "knife": "graft scions", "ladder": "reach branches", "lantern": "light lanes", "mallet": "drive stakes",
    "mattock": "break ground", "net": "stop birds", "press": "make juice", "rake": "gather leaves",
    "rope": "tie shoots", "saw": "cut limbs", "scythe": "mow grass", "sieve": "sift compost",
    "spade": "turn soil", "stove": "dry plums", "trowel": "lift seedlings", "whetstone": "sharpen blades",
}  # fmt: skip
USES = ["{Who} takes a {tool} to {}.", "With a {tool} {who} can {}."]
USE_QUESTION = "Why does {name} need a {tool}? To {}."
THINGS = "arbour beehive barn blossom fence flowerpot gate hedge orchard path pond root shed terrace vine well".split()
VIEW = "The {thing} {near} the {other} {verb} {look}."
NEAR = "above behind below beside".split()
VERBS = [("is", "are"), ("looks", "look"), ("stays", "stay")]
LOOKS = "bare damp green old quiet sunny".split()


def _people() -> list[dict[str, str]]:
    FACTS.pop('dish'); FACTS.pop('weather')
    rng = random.Random("the people of the valley")  # the facts: the same at every seed of the documents
    names = [stem + ending for stem in STEMS for ending in WOMEN + MEN]
    dealt = {fact: rng.sample(values * 20, len(names)) for fact, values in FACTS.items()}
    women = {stem + ending for stem in STEMS for ending in WOMEN}
    people = [
        {"name": name, "she": "she" if name in women else "he", "her": "her" if name in women else "him"}
        | {fact: values[i] for fact, values in dealt.items()}
        for i, name in enumerate(names)
    ]
    return rng.sample(people, len(people))


PEOPLE = _people()


def documents(split: str, seed: int = 0) -> list[str]:
    """Portraits of about 45 words, on one line each, the same for the same seed.

    A document's own checksum says which split it is in, so no document is in both, whatever the seeds.
    """
    if split not in DOCUMENTS:
        raise UserError(f"the generated world has no split '{split}': type world@train or world@test")
    rng = random.Random(f"{split} {seed}")
    portraits = (_portrait(rng) for _ in itertools.count())
    chosen = (text for text in portraits if (zlib.crc32(text.encode()) % 16 == 0) == (split == "test"))
    return list(itertools.islice(chosen, DOCUMENTS[split]))


def _portrait(rng: random.Random) -> str:
    index = rng.randrange(len(PEOPLE))
    person, sentences = PEOPLE[index], []
    for topic in rng.sample([*FACTS, "tool"], 4):
        interview = index < INTERVIEWED and rng.random() < 0.5
        named = not sentences or rng.random() < 0.75
        who, whom = (person["name"], person["name"]) if named else (person["she"], person["her"])
        tool = rng.choice(list(TOOLS))
        wordings = USES if topic == "tool" else STATEMENTS[topic]
        question = USE_QUESTION if topic == "tool" else QUESTIONS[topic]
        value = TOOLS[tool] if topic == "tool" else person[topic]
        wording = question if interview else rng.choice(wordings)
        sentences.append(
            wording.format(value, name=person["name"], who=who, Who=who.capitalize(), whom=whom, tool=tool)
        )
    sentences.insert(rng.randint(1, len(sentences)), _view(rng, asked=False, plural=rng.randrange(2))[0])
    return " ".join(sentences)


def _view(rng: random.Random, asked: bool, plural: int) -> tuple[str, tuple[str, str]]:
    """A sentence about two things of a garden, and its verb's two numbers. Every fourth pair is only `asked` about."""
    pairs = [(i, j) for i in range(len(THINGS)) for j in range(len(THINGS)) if i != j and ((i + j) % 4 == 0) == asked]
    i, j = rng.choice(pairs)
    verb = rng.choice(VERBS)
    other = THINGS[j] + rng.choice(["", "s"])
    thing = THINGS[i] + "s" * plural
    return VIEW.format(thing=thing, near=rng.choice(NEAR), other=other, verb=verb[plural], look=rng.choice(LOOKS)), verb


def questions(task: str, **_) -> dict[str, datasets.Dataset]:
    """200 rows `question` (str), `choices` (list of str), `answer` (index), with every position right equally often."""
    rng = random.Random(task)
    rows = []
    for i, person in enumerate(PEOPLE[INTERVIEWED:]):
        if task == "world_grammar":
            view, verb = _view(rng, asked=True, plural=i % 2)
            rows.append({"question": view[: view.index(f" {verb[i % 2]} ")], "choices": list(verb), "answer": i % 2})
            continue
        if task == "world_tools":
            tool, right = list(TOOLS.items())[i % len(TOOLS)]
            values, question = list(TOOLS.values()), USE_QUESTION.format("", name=person["name"], tool=tool)
        else:
            fact = {"world_homes": "home", "world_trees": "tree"}[task]
            right, values, question = person[fact], FACTS[fact], QUESTIONS[fact].format("", name=person["name"])
        choices = rng.sample([value for value in values if value != right], 3)
        choices.insert(i % 4, right)
        rows.append({"question": question.removesuffix(" ."), "choices": choices, "answer": i % 4})
    return {"test": datasets.Dataset.from_list(rows)}


TASKS = {
    name: {
        "task": name,
        "custom_dataset": questions,
        "dataset_kwargs": {"task": name},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    for name in ("world_homes", "world_trees", "world_tools", "world_grammar")
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word or mark of the closed vocabulary. Text starts with <bos>; a blank line is <eos> <bos>."""
    tables = [FACTS, STATEMENTS, {"": list(QUESTIONS.values()) + USES + [USE_QUESTION]}, {"": list(TOOLS)}]
    texts = [text for table in tables for column in table.values() for text in column] + list(TOOLS.values()) + NEAR + LOOKS
    texts += [text for pair in VERBS for text in pair] + [text + s for text in THINGS for s in ("", "s")]
    texts += [person["name"] for person in PEOPLE] + ["She she her He he him", VIEW]
    words = sorted(set(re.findall(WORD, re.sub(r"{\w*}", " ", " ".join(texts)))))
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Replace("\n\n", " <eos> <bos> ")
    core.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    core.decoder = decoders.WordPiece()
    bos, eos, unk, pad = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, unk_token=unk, pad_token=pad)
